//! What a sidefile still holds when it is opened again.

use std::sync::atomic::Ordering;

use twinfs_core::id::VolumeIndex;
use twinfs_core::session::ChainPoint;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{self, Intent, Note};

use super::layout::{
    self, FREE, INTENT, NOTE_BYTES, PUBLISHED, SlotState, VolumeWords, W_DROPPED, intent_room, padded,
};
use super::{Capture, Captured, SidefileError, lock};
use crate::sys::map::WORD;

/// What an earlier run left in a sidefile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivors {
    /// For each volume, what it knew of its chain.
    pub volumes: Vec<SurvivingChain>,
    /// Operations that were under way when the process ended, in the order in which they took their slots.
    pub intents: Vec<LeftIntent>,
    /// Updates that the replica may lack.
    pub updates: usize,
    /// The session was suspended and let updates go.
    pub dropped: bool,
}

/// What an earlier run knew of the chain of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SurvivingChain {
    /// The end of what the replica has acknowledged without a gap.
    pub acked: ChainPoint,
    /// The end of that set's interval.
    pub end: Timestamp,
    /// Stamp of the mark that ended its copy.
    pub complete: Option<Stamp>,
    /// The record sets that were made of surviving updates, and the ends of their intervals.
    pub issued: Vec<(ChainPoint, Timestamp)>,
}

/// An operation of which nobody knows whether it took place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftIntent {
    /// Its volume.
    pub volume: VolumeIndex,
    /// What it found under its locks; none if it had not come so far, or has no names.
    pub note: Option<Note>,
    intent: Vec<u8>,
}

impl LeftIntent {
    /// What it may have changed.
    #[must_use]
    pub fn intent(&self) -> Intent<'_> {
        Intent::decode(&self.intent).expect("it was decoded when the sidefile was opened")
    }
}

/// The slots of an earlier run.
#[derive(Default)]
struct Found {
    published: Vec<Captured>,
    set_ends: Vec<(VolumeIndex, ChainPoint, Timestamp)>,
    intents: Vec<(u64, LeftIntent)>,
    /// Number, begin and end of the room of each slot in use.
    rooms: Vec<(u64, u64, u64)>,
    encoded: Vec<u8>,
}

impl Capture {
    /// Rebuilds ring and queue from the slots of an earlier run.
    pub(super) fn take_over(&self) -> Result<Survivors, SidefileError> {
        let damaged = |what| SidefileError::Damaged { path: self.path.clone(), what };
        let mut found = Found::default();
        for index in 0..self.slots {
            self.take_slot(index as u64, &mut found).map_err(damaged)?;
        }
        let Found { mut published, mut set_ends, mut intents, mut rooms, .. } = found;
        rooms.sort_unstable();
        published.sort_by_key(|captured| captured.stamp);
        set_ends.sort_by_key(|(_, point, _)| point.number);
        intents.sort_by_key(|(slot, _)| *slot);

        let mut publish = lock(&self.publish);
        let volumes = publish.last_seq.len();
        if published.iter().any(|captured| captured.volume.as_usize() >= volumes)
            || intents.iter().any(|(_, intent)| intent.volume.as_usize() >= volumes)
        {
            return Err(damaged("a slot is of no known volume"));
        }
        if published.last().is_some_and(|last| last.stamp.time > publish.clock.last()) {
            return Err(damaged("an update is later than the last timestamp"));
        }
        // The process may have ended after it noted an acknowledgement and before it let go of what that covers.
        published.retain(|captured| {
            let (acked, _) = VolumeWords::of(&self.map, captured.volume.as_usize()).acked();
            let is_left = captured.stamp.seq > acked.last_seq;
            if !is_left {
                self.slot_words(captured.slot)[0].store(FREE, Ordering::Release);
            }
            is_left
        });
        for captured in &published {
            let last = &mut publish.last_seq[captured.volume.as_usize()];
            *last = (*last).max(captured.stamp.seq);
        }
        let updates = published.len();
        publish.queued_bytes = published.iter().map(Captured::bytes).sum();
        publish.queue = published.into();
        drop(publish);

        let mut ring = lock(&self.ring);
        if let (Some(first), Some(last)) = (rooms.first(), rooms.last()) {
            (ring.head_slot, ring.head_at) = (first.0, first.1);
            (ring.tail_slot, ring.tail_at) = (last.0 + 1, last.2);
            if ring.tail_slot - ring.head_slot > self.slots as u64
                || rooms.windows(2).any(|pair| pair[0].2 > pair[1].1)
                || ring.tail_at - ring.head_at > self.ring_bytes as u64
            {
                return Err(damaged("its slots do not follow each other"));
            }
            self.advance_head(&mut ring);
        }
        let chains = (0..volumes).map(|volume| {
            let words = VolumeWords::of(&self.map, volume);
            let (acked, end) = words.acked();
            let mine = set_ends
                .iter()
                .filter(|(index, point, _)| index.as_usize() == volume && point.number > acked.number);
            let issued = mine.map(|(_, point, end)| (*point, *end)).collect();
            SurvivingChain { acked, end, complete: words.complete(), issued }
        });
        Ok(Survivors {
            volumes: chains.collect(),
            intents: intents.into_iter().map(|(_, intent)| intent).collect(),
            updates,
            dropped: self.map.words()[W_DROPPED].load(Ordering::Acquire) != 0,
        })
    }

    fn take_slot(&self, index: u64, found: &mut Found) -> Result<(), &'static str> {
        let words = self.slot_words(index);
        let word = |at: usize| words[at].load(Ordering::Acquire);
        let SlotState { state, set_ends, volume } = SlotState::of(word(0));
        if state == FREE {
            return Ok(());
        }
        if !matches!(state, INTENT | PUBLISHED) {
            return Err("a slot is in no known state");
        }
        let (slot, at) = (word(1), word(2));
        let (room, intent) = layout::halves(word(3));
        let (intent_len, skip) = (intent & 0xffff, intent >> 16);
        if slot > u64::MAX / 2 || at > u64::MAX / 2 {
            return Err("it counts further than anybody can");
        }
        if slot % self.slots as u64 != index || room > self.ring_bytes {
            return Err("a slot is out of place");
        }
        let offset = (at % self.ring_bytes as u64) as usize;
        let noted = intent_room(intent_len) + NOTE_BYTES == skip;
        if !(offset.is_multiple_of(WORD) && room.is_multiple_of(WORD))
            || offset + room > self.ring_bytes
            || skip > room
            || !(noted || intent_room(intent_len) == skip)
        {
            return Err("the room of a slot is outside the ring");
        }
        found.rooms.push((slot, at, at + room as u64));
        let begin = self.ring_at + offset;
        if state == INTENT {
            let mut bytes = Vec::new();
            self.map.copy_out(begin, intent_len, &mut bytes);
            if Intent::decode(&bytes).is_err() {
                return Err("an intent does not decode");
            }
            let note =
                if noted { layout::note(&self.map, begin + skip - NOTE_BYTES, &words[7])? } else { None };
            found.intents.push((slot, LeftIntent { volume, note, intent: bytes }));
            return Ok(());
        }
        let (meta_len, data_len) = layout::halves(word(4));
        let meta_at = begin + skip;
        let data_at = meta_at + padded(meta_len);
        if skip + padded(meta_len) + padded(data_len) > room {
            return Err("an update is larger than its room");
        }
        let stamp = Stamp { time: Timestamp(word(5)), seq: Seq(word(6)) };
        found.encoded.clear();
        self.map.copy_out(meta_at, meta_len, &mut found.encoded);
        let (update, len) =
            update::decode_borrowed(&found.encoded, 0).map_err(|_| "an update does not decode")?;
        let lengths = (len, update.op.data_len() as usize) == (meta_len, data_len);
        if !lengths || update.stamp != stamp {
            return Err("an update is not the one that its slot names");
        }
        found.published.push(Captured { volume, stamp, slot, meta_at, meta_len, data_at, data_len });
        if set_ends {
            let (point, end) = layout::set_end(&self.map.words()[begin / WORD..], stamp.seq);
            found.set_ends.push((volume, point, end));
        }
        Ok(())
    }
}
