//! Examples of twinfs: see `examples/`.
