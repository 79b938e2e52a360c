//! The simulator: a primary and a replica in one thread, over simulated disks, network and clock.
//!
//! The replica is the engine of production with its journal, control file, file table and image, over a disk whose
//! power goes in the middle of any of its changes. The primary is the sender of production with a history that a model
//! made up, and never fails. Everything random comes from one seed, so a run can be repeated byte by byte.
//!
//! `check` holds what must be true after every step.

pub(crate) mod check;
mod disk;
mod network;
mod primary;
mod replica;
mod tree;
mod world;

pub use world::rot::{Rotted, simulate_rot};
pub use world::{Figures, Options, Run, simulate};
