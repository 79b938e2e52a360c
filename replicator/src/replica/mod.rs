//! The replica: from arriving record sets to a view of the primary's past.
//!
//! * [`engine`] – the session: journal, order, commit, acknowledge, show.
//! * [`driver`] – the one thread that owns it, and its links.
//! * [`journal`] – the log of record sets, as they travelled, and of commits.
//! * [`loss`] – what a promote gave up, kept on disk.
//! * [`image`] – plain trees as of the last checkpoint, and the folded groups after it.

mod door;
pub mod driver;
pub mod engine;
pub mod image;
pub mod journal;
pub mod loss;
mod recovery;
mod repair;
mod takeover;
