//! Byte formats, a module for each version. A reader looks at the version first and refuses what it does not know.

pub mod v1;
