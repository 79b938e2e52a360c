//! What the tests of the copy share: programs that act at random, and what a replica makes of the records.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "this is a part of tests")]

pub mod actor;
pub mod replay;
