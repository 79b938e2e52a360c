//! The primary's part of a planned promote: writes are held until all that was captured is at the replica.

use std::time::Duration;

use twinfs_core::limits;
use twinfs_core::session::SessionState;
use twinfs_core::wire::{Message, PromoteReady, Text};

use super::{Engine, Outlet};
use crate::primary::clock::Reading;

/// A planned promote under way; `since` is by the boot clock.
#[derive(Debug)]
pub(super) enum Handover {
    /// Writes are held; what was captured is being shipped.
    Draining { since: u64 },
    /// The replica was told that all is drained.
    Ready { since: u64 },
}

impl<O: Outlet> Engine<O> {
    pub(super) fn begin_handover(&mut self, now: Reading) {
        let state = self.sender.session_state();
        if state != SessionState::Duplex || self.capture.fill().suspended {
            let text = format!("the session is {state}, not DUPLEX: something would be lost");
            self.say(Message::PromoteRefused(Text::new(text)));
            return;
        }
        tracing::info!("a planned promote begins: new writes are held");
        if !self.capture.hold(Duration::from_nanos(limits::HOLD_NS_MAX)) {
            self.capture.let_go();
            self.say(Message::PromoteRefused(Text::new("operations under way do not end; try again")));
            return;
        }
        self.promote = Some(Handover::Draining { since: now.boot });
    }

    pub(super) fn advance_handover(&mut self, now: Reading) {
        let (since, ready) = match &self.promote {
            None => return,
            Some(Handover::Draining { since }) => (*since, false),
            Some(Handover::Ready { since }) => (*since, true),
        };
        if now.boot.saturating_sub(since) > limits::HANDOVER_NS_MAX {
            self.promote = None;
            self.capture.let_go();
            self.say(Message::PromoteRefused(Text::new("it took too long; writes go on at the primary")));
            tracing::warn!("the planned promote took too long: writes go on here");
            return;
        }
        if ready || self.capture.queued().1 > 0 || !self.sender.is_connected() {
            return;
        }
        let end = self.sender.last_end();
        if let Some(ready) = self.sender.promote_ready(end) {
            self.say(Message::PromoteReady(PromoteReady { end, ..ready }));
            self.promote = Some(Handover::Ready { since: now.boot });
        }
    }
}
