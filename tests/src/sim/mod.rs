//! The simulator: a primary and a replica in one thread, over simulated disks, network and clock.
//!
//! The replica is the engine of production with its journal, control file, file table and image. The primary is the engine of
//! production with its sidefile, activity log and start; in place of its file system stands a model. Each has a machine whose
//! power goes in the middle of any change of its disks, and at any fail point. Everything random comes from one seed, so a
//! run can be repeated byte by byte.
//!
//! `check` holds what must be true after every step.

pub(crate) mod check;
mod disk;
mod network;
mod primary;
mod replica;
mod tree;
mod world;

pub use primary::Sabotage;
pub use world::rot::{Rotted, simulate_rot};
pub use world::{Figures, Options, Run, simulate};
