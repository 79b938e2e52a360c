//! Harness of the end-to-end tests: pairs of sites, loop-mounted file systems, a relay that can slow and cut the link,
//! full comparison of trees, a seeded generator of operations. And the simulator.
//!
//! A test that cannot be set up (no root, no /dev/fuse, a tool is missing) fails; nothing is skipped in silence.
#![forbid(unsafe_code)]

pub mod fixture;
pub mod ledger;
pub mod loads;
pub mod loop_fs;
pub mod ops;
pub mod order;
pub mod pair;
pub mod process;
pub mod relay;
pub mod sampler;
pub mod scene;
pub mod seed;
pub mod sim;
pub mod stranger;
pub mod tree;
pub mod watchdog;
pub mod watcher;
