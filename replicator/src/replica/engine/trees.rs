//! Plain trees that cannot be written: a full disk below them, a quota, a disk that fails.
//!
//! What was committed goes on to show, for the journal has it, but the journal cannot be trimmed, and the memory of what is
//! not in the trees may not grow without bound. So a checkpoint that fails suspends the session: no group is formed and the
//! primary is refused, with the reason. The checkpoint is tried again now and then, and when it succeeds the primary may
//! come back.

use twinfs_core::limits;
use twinfs_core::wire::RefuseCode;

use super::{Engine, Outlet};
use crate::primary::clock::Reading;
use crate::replica::image::ImageError;

/// Why the last checkpoint failed.
#[derive(Debug)]
pub(super) struct TreeTrouble {
    why: String,
    /// When it is tried again, by the boot clock in nanoseconds; `None` until somebody looks at the clock.
    again: Option<u64>,
}

impl<O: Outlet> Engine<O> {
    /// A checkpoint failed.
    pub(super) fn trees_failed(&mut self, error: &ImageError) {
        let why = error.trouble();
        if self.tree_trouble.is_none() {
            tracing::error!(%error, "a checkpoint failed: the session is SUSPENDED, the journal keeps its groups");
        }
        self.tree_trouble = Some(TreeTrouble { why: why.clone(), again: None });
        if let Some(id) = self.connection() {
            self.refuse_with(id, RefuseCode::Failed, why);
        }
    }

    /// A checkpoint succeeded.
    pub(super) fn trees_written(&mut self) {
        if self.tree_trouble.take().is_some() {
            tracing::info!("the plain trees can be written again");
        }
    }

    /// Whether a checkpoint that failed is to wait before it is tried again.
    pub(super) fn must_trees_wait(&mut self, now: Reading) -> bool {
        let Some(trouble) = &mut self.tree_trouble else { return false };
        now.boot < *trouble.again.get_or_insert(now.boot.saturating_add(limits::SITE_AGAIN_NS))
    }

    /// Why nothing is taken at present, if so, and whether that is for good.
    pub(super) fn suspended(&self) -> Option<(&str, bool)> {
        let journal = self.trouble.as_ref().map(|(why, is_final)| (why.as_str(), *is_final));
        journal.or_else(|| self.tree_trouble.as_ref().map(|trouble| (trouble.why.as_str(), false)))
    }
}
