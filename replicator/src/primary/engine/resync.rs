//! Going on after a suspension by itself: the mover's part of a resync.
//!
//! When what was captured before the suspension is at the replica and the reason for it is gone, capture goes on under a
//! short hold, a *resync* mark goes first, and the file system layer reads again what the change maps name. If that fills the
//! sidefile again, the session is suspended again, what is left of the maps is noted with what was dropped meanwhile, and
//! after a pause it starts over. All of it becomes one group at the replica, which therefore is bounded.

use std::time::Duration;

use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::VolumeIndex;
use twinfs_core::limits;
use twinfs_core::session::{Role, SuspendReason, VolumeState};
use twinfs_core::stamp::Seq;

use super::{Connection, Engine, Outlet};
use crate::primary::clock::Reading;

/// What the mover knows of resyncs.
#[derive(Debug)]
pub(super) struct Resyncs {
    running: bool,
    /// What was captured last of each volume before the first mark of all that the replica has not shown yet.
    since: Option<Vec<Seq>>,
    /// The last update that the replica has of each volume, if its place in the chain was adopted.
    pub(super) restart: Option<Vec<Seq>>,
    /// By the boot clock.
    not_before: u64,
    pause_ns: u64,
}

impl Default for Resyncs {
    fn default() -> Self {
        Self { running: false, since: None, restart: None, not_before: 0, pause_ns: limits::RESYNC_PAUSE_NS }
    }
}

impl Resyncs {
    /// Puts the next attempt off, for longer each time.
    fn put_off(&mut self, now: u64) {
        self.not_before = now.saturating_add(self.pause_ns);
        self.pause_ns = (self.pause_ns * 2).min(limits::RESYNC_PAUSE_NS_MAX);
    }
}

impl<O: Outlet> Engine<O> {
    /// Begins, watches and ends resyncs. Called after everything else that may suspend the session.
    pub(super) fn advance_resync(&mut self, now: Reading) {
        if self.role == Role::Fenced {
            return;
        }
        self.take_restart();
        if self.resyncs.running {
            self.watch_resync(now);
        } else if self.may_resync(now) {
            self.begin_resync(now);
        }
    }

    /// Whether the session is suspended for a reason that is gone, and nothing from before is under way.
    fn may_resync(&self, now: Reading) -> bool {
        self.is_passing()
            && self.site_trouble().is_none()
            && !self.examining
            && self.connection == Connection::Welcomed
            && self.sender.is_connected()
            && self.sender.needs_resync()
            && self.sender.is_idle()
            && self.capture.fill().suspended
            && self.capture.queued().1 == 0
            && self.capture.is_covered()
            && self.promote.is_none()
            && now.boot >= self.resyncs.not_before
    }

    fn begin_resync(&mut self, now: Reading) {
        self.release();
        // A copy that has not noticed the suspension must not go on in the middle of what follows.
        self.volume_indices().for_each(|index| drop(self.files.stop_resync(index)));
        if !self.capture.hold(Duration::from_nanos(limits::HOLD_NS_MAX)) {
            self.capture.let_go();
            tracing::warn!("operations under way do not end: the resync waits");
            // That took as long as it may.
            return self.resyncs.put_off(now.boot.saturating_add(limits::HOLD_NS_MAX));
        }
        let begun = self.begin_held();
        self.capture.let_go();
        if let Err(why) = begun {
            tracing::error!(%why, "the resync cannot begin");
            self.capture.suspend();
            self.abandon_resync(now);
        }
    }

    /// Under the hold: no operation is under way, so nothing falls between the maps and the mark.
    fn begin_held(&mut self) -> Result<(), String> {
        let restart = self.resyncs.restart.take();
        self.capture.resume(restart.as_deref()).map_err(|error| error.to_string())?;
        self.sender.resume_with_resync();
        (self.resyncs.running, self.drained, self.reason) = (true, false, None);
        let since = self.capture.last_seqs();
        self.resyncs.since.get_or_insert(since);
        for (index, map) in self.volume_indices().zip(self.capture.take_changes()) {
            let root = self.volumes[index.as_usize()].root;
            if self.sender.volume_state(index) == Some(VolumeState::Resync) {
                self.capture.publish_resync(index, root).map_err(|error| error.to_string())?;
                tracing::info!(
                    volume = %self.volumes[index.as_usize()].name,
                    objects = map.objects().len(),
                    everything = map.is_everything(),
                    "RESYNC: what changed while the session was suspended is being sent"
                );
                self.files.start_resync(index, map);
            } else {
                self.sender.handle_copy_started(index).map_err(|error| error.to_string())?;
                self.files.restart_copy(index);
            }
        }
        Ok(())
    }

    /// The chain begins again where the replica stands: what was captured and is not there is given up.
    fn take_restart(&mut self) {
        let Some(last_seqs) = self.sender.poll_restart() else { return };
        if let Some(damage) = self.sender.poll_damage() {
            self.note_damage(&damage);
        }
        tracing::warn!(
            "the replica stands elsewhere in the chain than this site remembers: it will be resynced"
        );
        let sets = self.rooms.iter_mut().flat_map(std::mem::take);
        let made: Vec<_> = sets.flat_map(|(_, updates)| updates).collect();
        self.capture.give_up(&made);
        (self.resyncs.restart, self.resyncs.since) = (Some(last_seqs), None);
    }

    fn watch_resync(&mut self, now: Reading) {
        let captured = self.capture.last_seqs();
        let since = self.resyncs.since.as_deref().unwrap_or_default();
        let updates: u64 = captured.iter().zip(since).map(|(now, then)| now.0.saturating_sub(then.0)).sum();
        let states = self.volume_indices().map(|index| self.sender.volume_state(index));
        if self.capture.fill().suspended {
            self.abandon_resync(now);
        } else if states.into_iter().all(|state| state != Some(VolumeState::Resync)) {
            // Not of one that is still being copied: its copy began again, and goes on.
            let whole = |index: &VolumeIndex| self.sender.volume_state(*index) == Some(VolumeState::Duplex);
            self.volume_indices().filter(whole).for_each(|index| drop(self.files.stop_resync(index)));
            self.resyncs = Resyncs::default();
            self.capture.settle_dropped();
            tracing::info!("the resync is complete: the replica shows it");
        } else if updates > limits::RESYNC_UPDATES_MAX {
            let most = limits::RESYNC_UPDATES_MAX;
            let why = format!("the resync needs more than {most} updates in one consistency group");
            self.give_resync_up(why, now);
        } else if self.volume_indices().any(|index| self.files.resync_failed(index)) {
            self.give_resync_up("too much changed while the resync ran".into(), now);
        }
    }

    /// Suspends the session until a person acts.
    fn give_resync_up(&mut self, why: String, now: Reading) {
        tracing::error!(%why, "the session is SUSPENDED");
        self.capture.suspend();
        self.sender.handle_let_go();
        self.sender.suspend(SuspendReason::Error);
        self.reason = Some(why);
        self.abandon_resync(now);
    }

    /// The session was suspended again in the middle: what is left of the maps belongs to what is noted now.
    fn abandon_resync(&mut self, now: Reading) {
        for index in self.volume_indices() {
            let left = self.files.stop_resync(index).unwrap_or_default();
            self.capture.merge_changes(index, left);
        }
        self.resyncs.running = false;
        self.resyncs.put_off(now.boot);
    }

    /// For a clean stop: ends a resync before its time. Returns what is left of its maps.
    pub(super) fn stop_resync(&mut self, now: Reading) -> Vec<ChangeMap> {
        if self.resyncs.running {
            self.abandon_resync(now);
        }
        self.capture.take_changes()
    }
}
