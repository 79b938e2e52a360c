//! What an engine tells of itself.

use twinfs_core::session::Role;
use twinfs_core::stamp::Timestamp;

use super::{Engine, Outlet};
use crate::primary::clock::Reading;
use crate::replica::journal::Journal;
use crate::replica::repair;
use crate::status::{PeerStatus, Status, VolumeStatus, age_seconds};

impl<O: Outlet> Engine<O> {
    /// The session's state. What only the links know – round trip, bytes on the wire – is left out.
    #[must_use]
    pub fn status(&self, now: Reading) -> Status {
        let progress = self.receiver.progress();
        let shown = progress.time > Timestamp::ZERO;
        let now = Timestamp(now.real);
        let delay = shown.then(|| age_seconds(now, progress.time));
        let tokens = self.receiver.bare_tokens();
        let members = self.receiver.volumes().filter(|(.., member)| *member).count();
        let all = self.receiver.volumes().count();
        let (session_state, reason) = match (self.suspended(), self.receiver.role()) {
            (_, Role::Promoted) => ("SUSPENDED", Some("promoted, without a replica of its own".to_owned())),
            (Some((why, true)), _) => ("SUSPENDED", Some(format!("ERROR: {why}"))),
            (Some((why, false)), _) => ("SUSPENDED", Some(format!("JOURNAL: {why}"))),
            (None, _) if self.state.repair.is_some() => {
                let words = self.state.repair.as_ref().map(repair::words).unwrap_or_default();
                // Once the primary has begun with it, it is a resync as any other.
                match self.receiver.damage() {
                    Some(_) => ("SUSPENDED", Some(format!("ERROR: {words}"))),
                    None => ("RESYNC", Some(words)),
                }
            }
            _ if all == 0 => ("PENDING", None),
            _ if self.receiver.volumes().any(|(volume, ..)| self.receiver.is_resyncing(volume)) => {
                ("RESYNC", None)
            }
            _ if members < all => ("COPY", None),
            _ => ("DUPLEX", None),
        };
        let state_of = |volume, member| match member {
            true if self.receiver.is_resyncing(volume) => "RESYNC",
            true => "DUPLEX",
            false => "COPY",
        };
        let volumes = self.receiver.volumes().map(|(volume, name, member)| VolumeStatus {
            name: name.to_string(),
            state: state_of(volume, member).to_owned(),
            files_copied: 0,
            files_total: 0,
            bytes_copied: 0,
            bytes_total: 0,
        });
        let connected = self.current.is_some();
        let (pending_records, pending_bytes) = self.pending();
        Status {
            role: self.receiver.role(),
            session_state: session_state.to_owned(),
            reason,
            epoch: self.receiver.paired().map_or(0, |(_, epoch)| epoch.number),
            group: progress.group.0,
            consistency_time: shown.then(|| progress.time.to_string()),
            delay_seconds: delay,
            // What a silent primary has written since is not known here: at worst, everything since then.
            exposure_seconds: if connected { 0.0 } else { delay.unwrap_or(0.0) },
            behind_bytes: tokens.bytes + pending_bytes,
            behind_records: tokens.count + tokens.not_held + pending_records,
            peer: self.peer_status(),
            volumes: volumes.collect(),
            wire_bytes: 0,
            sets_sent: 0,
            sets_received: self.sets_received,
            sets_out_of_order: self.receiver.sets_out_of_order(),
            tokens_held: tokens.count,
            store_bytes: self.journal.as_ref().map_or(0, Journal::bytes_used),
            store_bytes_max: self.journal_room(),
        }
    }

    /// Bytes that the journal could grow to, at present.
    fn journal_room(&self) -> u64 {
        let used = self.journal.as_ref().map_or(0, Journal::bytes_used);
        used + self.store.free_bytes().saturating_sub(self.journal_config.floor_bytes)
    }

    /// Updates that were received and are in no group, and the bytes of their sets.
    fn pending(&self) -> (u64, u64) {
        let updates = self.tracked.iter().map(|tracked| {
            let last = tracked.sets.values().map(|set| set.last_seq).max().unwrap_or(tracked.through);
            last.0.saturating_sub(tracked.through.0)
        });
        (updates.sum(), self.receiver.held_bytes() as u64)
    }

    fn peer_status(&self) -> PeerStatus {
        PeerStatus {
            name: self.state.peer.as_ref().map(ToString::to_string),
            address: self.last_peer.map(|address| address.to_string()),
            connected: self.current.is_some(),
            rtt_ms: None,
            last_error: self.last_error.clone(),
        }
    }
}
