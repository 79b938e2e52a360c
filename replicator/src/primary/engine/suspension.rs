//! What happens once the sidefile has stopped capturing.

use twinfs_core::session::{Role, SuspendReason};

use super::{Engine, Outlet};
use crate::primary::sidefile::Overflow;

impl<O: Outlet> Engine<O> {
    /// Takes note that the sidefile has stopped capturing.
    pub(super) fn note_suspension(&mut self) {
        let fill = self.capture.fill();
        if !fill.suspended || self.role == Role::Fenced {
            return;
        }
        if self.reason.is_none() {
            let why = match fill.overflow {
                Some(Overflow::LinkDown) => "the sidefile was full and no link drained it",
                Some(Overflow::TooSlow) => "the sidefile was full and the link too slow to drain it",
                None if self.log.as_ref().is_some_and(|log| log.failure().is_some()) => {
                    "the activity log cannot be written"
                }
                None => "it was suspended here",
            };
            tracing::error!(why, "the session is SUSPENDED: programs go on, their changes are not mirrored");
            self.reason = Some(why.into());
        }
        // What was captured before still goes to the replica; then nothing more.
        if !self.drained && self.capture.queued().1 == 0 && self.sender.is_connected() {
            self.drained = true;
            self.sender.handle_let_go();
            self.sender.suspend(suspend_reason(fill.overflow));
        }
    }
}

pub(super) const fn suspend_reason(overflow: Option<Overflow>) -> SuspendReason {
    match overflow {
        Some(Overflow::LinkDown) => SuspendReason::Link,
        Some(Overflow::TooSlow) => SuspendReason::Lag,
        None => SuspendReason::Error,
    }
}
