//! Cutting intervals, and shipping what they make.

use twinfs_core::limits;
use twinfs_core::session::sender::Backlog;
use twinfs_core::wire::Message;

use super::{Connection, Engine, Outlet};
use crate::primary::chain::BadCapture;
use crate::primary::sidefile::{Captured, Overflow};

/// Bytes of updates that leave at once, in one packet, when nothing is in flight: their tokens would not be sooner.
const PACKET_BYTES: usize = 1024;

impl<O: Outlet> Engine<O> {
    /// Cuts what is due, has it made into sets, and sends what may be sent.
    pub(super) fn ship(&mut self) -> Result<(), BadCapture> {
        loop {
            let now = self.capture.now();
            let (queued_bytes, queued, _) = self.capture.queued();
            let due = self.sender.is_cut_due(now, &self.backlog(queued, queued_bytes)) && self.may_issue();
            if !due {
                break;
            }
            let is_idle = self.sender.is_idle();
            if !is_idle || queued_bytes > PACKET_BYTES {
                self.send_tokens();
            }
            let cut = self.capture.cut(limits::SET_RAW_BYTES_TARGET);
            self.logged = self.log.as_ref().map_or(self.logged, |log| log.mark());
            // More may have come in the meantime; its tokens follow.
            if is_idle && cut.updates.iter().map(Captured::bytes).sum::<usize>() <= PACKET_BYTES {
                self.tokened = self.tokened.max(cut.end);
            }
            let nulls =
                self.maker.issue(&self.capture, &mut self.sender, &mut self.rooms, &cut, &*self.files)?;
            self.sender.handle_cut(cut.end, cut.updates.is_empty());
            self.transmit();
            for null in nulls {
                self.say(Message::NullSet(null));
            }
            if cut.emptied {
                break;
            }
        }
        self.transmit();
        self.vouch_for_idle_volumes()
    }

    /// While the window is full no interval ends. Volumes that write nothing say so all the same: otherwise a loss report
    /// could not tell that nothing of theirs is lost.
    fn vouch_for_idle_volumes(&mut self) -> Result<(), BadCapture> {
        let now = self.capture.now();
        let sends = self.sender.is_connected() && self.sender.suspended().is_none();
        if !sends || self.may_issue() || now.ns_since(self.vouched) < limits::INTERVAL_NS {
            return Ok(());
        }
        self.vouched = now;
        let (end, idle) = self.capture.idle_volumes();
        for volume in idle {
            let null = self.maker.null(&mut self.sender, volume, end)?;
            self.say(Message::NullSet(null));
        }
        Ok(())
    }

    /// What waits in the sidefile. It is one queue for all volumes, so each volume may have as much as all.
    pub(super) fn backlog(&self, queued: usize, queued_bytes: usize) -> Vec<Backlog> {
        let backlog = match queued {
            0 => Backlog::None,
            _ if self.promote.is_some() || queued_bytes >= limits::SET_RAW_BYTES_TARGET => Backlog::Full,
            _ => Backlog::Some,
        };
        vec![backlog; self.volumes.len()]
    }

    pub(super) fn may_issue(&self) -> bool {
        self.volume_indices().all(|index| self.sender.can_issue(index))
    }

    fn transmit(&mut self) {
        if self.connection == Connection::None {
            return;
        }
        // What the replica has must be in the log, because after a power loss this site may have it no more.
        if self.log.as_ref().is_some_and(|log| log.wait_durable(self.logged).is_err()) {
            self.capture.suspend_while(Overflow::Site);
            return;
        }
        while let Some((_, set)) = self.sender.poll_transmit() {
            self.outlet.set(set.handle.clone());
            self.sets_sent += 1;
        }
    }
}
