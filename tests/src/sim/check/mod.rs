//! What must be true, a file for each.

pub(crate) mod acknowledged;
pub(crate) mod atomicity;
pub(crate) mod bounds;
pub(crate) mod convergence;
pub(crate) mod loss;
pub(crate) mod prefix;
