//! The primary: from captured updates to a peer that has them.
//!
//! * [`activity_log`] – the durable list of touched files, for power loss.
//! * [`sidefile`] – what the file system layer publishes its updates into.
//! * [`clock`] – where timestamps come from.
//! * [`chain`] – from a cut of the sidefile to record sets.
//! * [`engine`] – the session: it cuts, ships, and takes acknowledgements.
//! * [`mover`] – the one thread that owns the engine.
//! * `link` – keeps a connection to the replica, and carries bytes between it and the mover.
//! * [`start`] – how a run takes up what the one before it left.
//! * [`store`] – what is kept from run to run.

pub mod activity_log;
pub mod chain;
pub mod clock;
pub mod engine;
mod link;
pub mod mover;
pub mod sidefile;
pub mod start;
pub mod store;
