//! Small programs over the libraries of twinfs: see the directory `examples/` of this package.
//!
//! * `read_set` prints a record set with nothing at hand but its bytes.
