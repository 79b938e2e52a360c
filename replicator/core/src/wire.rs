//! Messages between sites, other than record sets.
