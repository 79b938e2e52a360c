//! What happens once the sidefile has stopped capturing.

use twinfs_core::session::{Role, SuspendReason};

use super::{Engine, Outlet};
use crate::primary::sidefile::Overflow;

impl<O: Outlet> Engine<O> {
    /// What this site cannot write beside the sidefile: why, and what helps.
    pub(super) fn site_trouble(&self) -> Option<String> {
        let failure = self.log.as_ref().and_then(|log| log.failure());
        let is_late = || self.capture.stamps_ahead_ns() == 0;
        let late =
            || is_late().then(|| "the mark that timestamps stay below is not raised in time".to_owned());
        failure.map(|error| error.trouble()).or_else(|| self.capture.trouble()).or_else(late)
    }

    /// Why the session is suspended, or soon will be, for status.
    pub(super) fn why_suspended(&self) -> Option<String> {
        let is_cause = self.capture.fill().overflow == Some(Overflow::Site);
        match (self.reason.clone(), self.site_trouble()) {
            (Some(reason), Some(trouble)) if !is_cause => Some(format!("{reason}; {trouble}")),
            (_, Some(trouble)) => Some(trouble),
            (reason, None) => reason,
        }
    }

    /// Whether the session is suspended for something that ends by itself, and a resync then makes good.
    pub(super) fn is_passing(&self) -> bool {
        match (self.sender.suspended(), self.capture.fill().overflow) {
            (Some(SuspendReason::Link | SuspendReason::Lag | SuspendReason::Journal), Some(_)) => true,
            (Some(SuspendReason::Error), Some(Overflow::Site)) => true,
            (Some(SuspendReason::Error | SuspendReason::Operator), _) | (_, None) | (None, _) => false,
        }
    }

    /// Takes note that the sidefile has stopped capturing.
    pub(super) fn note_suspension(&mut self) {
        if self.log.as_ref().is_some_and(|log| log.failure().is_some()) {
            self.capture.suspend_while(Overflow::Site);
        }
        let fill = self.capture.fill();
        if !fill.suspended || self.role == Role::Fenced {
            return;
        }
        if self.reason.is_none() {
            let why = match fill.overflow {
                Some(Overflow::LinkDown) => "the sidefile was full and no link drained it",
                Some(Overflow::TooSlow) => "the sidefile was full and the link too slow to drain it",
                Some(Overflow::Site) => "the site directory could not be written",
                None => "it was suspended here",
            };
            let trouble = self.site_trouble();
            tracing::error!(
                why,
                trouble,
                "the session is SUSPENDED: programs go on, their changes are not mirrored"
            );
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
        Some(Overflow::Site) | None => SuspendReason::Error,
    }
}
