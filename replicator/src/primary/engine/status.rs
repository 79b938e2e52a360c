//! What an engine tells of itself.

use twinfs_core::id::VolumeIndex;
use twinfs_core::session::{Role, SessionState, SuspendReason, VolumeState};
use twinfs_core::stamp::Timestamp;

use super::suspension::suspend_reason;
use super::{Connection, Engine, Outlet};
use crate::status::{PeerStatus, Status, VolumeStatus, age_seconds};

impl<O: Outlet> Engine<O> {
    /// The instant up to which the replica has everything in its plain trees; zero unless the session is DUPLEX. While it is
    /// not, they may lack what was let go, and what a resync has not brought yet.
    #[must_use]
    pub fn both_have(&self) -> Timestamp {
        match self.sender.session_state() {
            SessionState::Duplex if !self.capture.fill().suspended => self.sender.progress().applied,
            _ => Timestamp::ZERO,
        }
    }

    /// The session's state. What only the links know – name and address of the peer, round trip, bytes on the wire – is
    /// left out.
    #[must_use]
    pub fn status(&self) -> Status {
        let now = self.capture.now();
        let fill = self.capture.fill();
        let (queued_bytes, queued, queued_oldest) = self.capture.queued();
        let behind = self.sender.behind();
        let oldest = [behind.oldest, queued_oldest].into_iter().flatten().min();
        let progress = self.sender.progress();
        let known = progress.time > Timestamp::ZERO;
        let state = match self.sender.session_state() {
            state @ (SessionState::Diverged | SessionState::Suspended(_)) => state,
            _ if self.role == Role::Fenced => SessionState::Suspended(SuspendReason::Error),
            _ if fill.suspended => SessionState::Suspended(suspend_reason(fill.overflow)),
            state => state,
        };
        let word = match state {
            SessionState::Suspended(reason) => Some(reason.to_string()),
            _ => None,
        };
        let reason = match (word, self.why_suspended()) {
            (Some(word), Some(text)) => Some(format!("{word}: {text}")),
            (word, text) => word.or(text),
        };
        let volumes = self.volumes.iter().enumerate().map(|(at, volume)| {
            let index = VolumeIndex(at as u16);
            let copy = self.files.copy_progress(index).unwrap_or_default();
            VolumeStatus {
                name: volume.name.to_string(),
                state: match self.role {
                    Role::Fenced => state.to_string(),
                    _ => self.sender.volume_state(index).unwrap_or(VolumeState::Pending).to_string(),
                },
                files_copied: copy.files_copied,
                files_total: copy.files_total,
                bytes_copied: copy.bytes_copied,
                bytes_total: copy.bytes_total,
            }
        });
        Status {
            role: self.role,
            session_state: state.to_string(),
            reason,
            epoch: self.epoch.number,
            group: progress.group.0,
            consistency_time: known.then(|| progress.time.to_string()),
            delay_seconds: known.then(|| age_seconds(now, progress.time)),
            exposure_seconds: oldest.map_or(0.0, |oldest| age_seconds(now, oldest)),
            behind_bytes: behind.bytes.max(self.unreleased_bytes()) + queued_bytes as u64,
            behind_records: behind.records + queued as u64,
            peer: PeerStatus {
                connected: self.connection == Connection::Welcomed && self.sender.is_connected(),
                last_error: self.last_error.clone(),
                ..PeerStatus::default()
            },
            volumes: volumes.collect(),
            wire_bytes: 0,
            sets_sent: self.sets_sent,
            sets_received: 0,
            sets_out_of_order: 0,
            tokens_held: 0,
            store_bytes: fill.used,
            store_bytes_max: fill.size,
        }
    }

    /// Bytes of updates, uncompressed, in sets that the replica does not have without a gap.
    fn unreleased_bytes(&self) -> u64 {
        let updates = self.rooms.iter().flatten().flat_map(|(_, updates)| updates);
        updates.map(|captured| captured.bytes() as u64).sum()
    }
}
