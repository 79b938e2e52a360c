//! The side of those who change something: room is reserved, then an update is published in it, or it becomes void.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use twinfs_core::id::VolumeIndex;
use twinfs_core::limits;
use twinfs_core::stamp::{Stamp, Timestamp};
use twinfs_core::update::{self, AttrList, Intent, Note, Op, OpKind, Update};

use super::layout::{
    self, FREE, INTENT, NOTE_BYTES, PUBLISHED, SlotState, VolumeWords, W_DROPPED, W_LAST_TIME, from_halves,
    intent_room, padded,
};
use super::{Capture, Captured, Mode, Overflow, Publish, Refused, Ring, lock};
use crate::failpoint::{self, FailPoint};
use crate::sys::map::WORD;

/// One of several updates that an operation will publish.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// What it may change.
    pub intent: Intent<'a>,
    /// Bound of the encoded update without data, in bytes.
    pub meta_bytes: usize,
    /// Bound of its data, in bytes.
    pub data_bytes: usize,
}

/// Room for one update: a slot with its intent, and space for its bytes. Dropped without [`Reservation::publish`], it
/// becomes void: the operation failed and left no record.
#[derive(Debug)]
#[must_use = "publish it, or the operation leaves no record"]
pub struct Reservation<'a> {
    capture: &'a Capture,
    volume: VolumeIndex,
    /// `None` while the session is suspended: the update will be dropped.
    room: Option<Room>,
}

#[derive(Debug, Clone, Copy)]
struct Room {
    slot: u64,
    /// Byte offset of the note in the mapping, for an operation on names.
    note_at: Option<usize>,
    /// Byte offset of the update in the mapping.
    at: usize,
    bytes: usize,
}

/// What an update takes in the ring, in bytes.
struct RoomBytes {
    intent: usize,
    note: usize,
    update: usize,
}

impl RoomBytes {
    const fn total(&self) -> usize {
        self.intent + self.note + self.update
    }
}

impl Wanted<'_> {
    fn room(&self) -> RoomBytes {
        let Self { intent, meta_bytes, data_bytes } = *self;
        assert!(meta_bytes <= limits::UPDATE_META_BYTES_MAX && data_bytes <= limits::WRITE_BYTES_MAX);
        RoomBytes {
            intent: intent_room(intent.encoded_len()),
            note: if matches!(intent, Intent::Names { .. }) { NOTE_BYTES } else { 0 },
            update: padded(meta_bytes) + padded(data_bytes),
        }
    }
}

impl Capture {
    /// Reserves a slot and room, and writes the intent. Call it before taking any lock: this is where writers are paced.
    ///
    /// `meta_bytes` bounds the encoded update without data, `data_bytes` its data.
    ///
    /// # Errors
    /// [`Refused`] if this site may not write.
    ///
    /// # Panics
    /// If the bounds exceed those of an update.
    pub fn reserve(
        &self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Reservation<'_>, Refused> {
        let wanted = Wanted { intent: *intent, meta_bytes, data_bytes };
        let Some((mut ring, at)) = self.admit(wanted.room().total(), 1)? else {
            return Ok(Reservation { capture: self, volume, room: None });
        };
        let room = Some(self.claim(&mut ring, at, volume, &wanted));
        Ok(Reservation { capture: self, volume, room })
    }

    /// The same for several updates of one operation, all at once: a thread that waited for a second reservation while it
    /// holds a first one could wait for itself.
    ///
    /// # Errors
    /// [`Refused`] if this site may not write.
    ///
    /// # Panics
    /// If the bounds exceed those of an update.
    pub fn reserve_all(
        &self,
        volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Reservation<'_>>, Refused> {
        let need = wanted.iter().map(|wanted| wanted.room().total()).sum();
        let reservation = |room| Reservation { capture: self, volume, room };
        let Some((mut ring, mut at)) = self.admit(need, wanted.len())? else {
            return Ok(wanted.iter().map(|_| reservation(None)).collect());
        };
        let claimed = wanted.iter().map(|wanted| {
            let room = self.claim(&mut ring, at, volume, wanted);
            at += wanted.room().total() as u64;
            reservation(Some(room))
        });
        Ok(claimed.collect())
    }

    /// Waits until there are `slots` slots and `need` bytes of room in one piece, and returns where it begins; `None` if
    /// updates are dropped. They count as outstanding.
    fn admit(&self, need: usize, slots: usize) -> Result<Option<(MutexGuard<'_, Ring>, u64)>, Refused> {
        let mut ring = lock(&self.ring);
        let mut waited = Pacing::default();
        let at = loop {
            if ring.held && ring.mode != Mode::Fenced && ring.passes != Some(std::thread::current().id()) {
                ring = self.room.wait(ring).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            match ring.mode {
                Mode::Fenced => return Err(Refused::Fenced),
                Mode::Suspended(_) => {
                    ring.outstanding += slots;
                    return Ok(None);
                }
                Mode::Active => {}
            }
            let place = self.place(&ring, need, slots);
            let link_up = self.link_up.load(Ordering::Relaxed);
            let pause = match place {
                Some(_) => waited.before_room(self.fill_of(&ring), link_up),
                None if !link_up => {
                    self.suspend_locked(&mut ring, Some(Overflow::LinkDown));
                    continue;
                }
                None => match waited.while_full() {
                    Some(pause) => Some(pause),
                    None => {
                        self.suspend_locked(&mut ring, Some(Overflow::TooSlow));
                        continue;
                    }
                },
            };
            match (pause, place) {
                (Some(pause), _) => {
                    ring = self.room.wait_timeout(ring, pause).unwrap_or_else(PoisonError::into_inner).0;
                }
                (None, Some(at)) => break at,
                (None, None) => {}
            }
        };
        ring.outstanding += slots;
        Ok(Some((ring, at)))
    }

    /// Takes the next slot with room at `at`, and writes the intent.
    fn claim(&self, ring: &mut Ring, at: u64, volume: VolumeIndex, wanted: &Wanted<'_>) -> Room {
        let RoomBytes { intent, note, update } = wanted.room();
        let (skip, need) = (intent + note, intent + note + update);
        let mut intent_bytes = Vec::with_capacity(Intent::BYTES_MAX);
        wanted.intent.encode(&mut intent_bytes);
        let slot = ring.tail_slot;
        if ring.head_slot == slot {
            ring.head_at = at;
        }
        ring.tail_slot += 1;
        ring.tail_at = at + need as u64;
        let words = self.slot_words(slot);
        words[1].store(slot, Ordering::Relaxed);
        words[2].store(at, Ordering::Relaxed);
        words[3].store(from_halves(need, intent_bytes.len() | skip << 16), Ordering::Relaxed);
        words[7].store(0, Ordering::Relaxed);
        let begin = self.ring_at + (at % self.ring_bytes as u64) as usize;
        self.map.copy_in(begin, &intent_bytes);
        words[0].store(SlotState::word(INTENT, volume, false), Ordering::Release);
        failpoint::pass(FailPoint::Reserved);
        Room { slot, note_at: (note > 0).then_some(begin + intent), at: begin + skip, bytes: update }
    }

    /// The time of the next stamp; `None` if nothing is published any more. No stamp reaches the durable mark: if that could
    /// not be raised in time, this is where publishing ends, for all that follows.
    fn stamp(&self, publish: &mut Publish) -> Option<Timestamp> {
        if publish.closed.is_some() {
            return None;
        }
        let time = publish.clock.stamp(self.time.read());
        if time.is_none() {
            // Before anybody drops an update for it.
            self.map.words()[W_DROPPED].store(1, Ordering::Release);
            publish.closed = Some(publish.clock.last());
        }
        time
    }

    /// Where room for `need` bytes begins, or `None` if there is none.
    fn place(&self, ring: &Ring, need: usize, slots: usize) -> Option<u64> {
        let size = self.ring_bytes as u64;
        if ring.tail_slot - ring.head_slot + slots as u64 > self.slots as u64 {
            return None;
        }
        let left_to_wrap = size - ring.tail_at % size;
        // An empty ring starts over, so that a lightly used sidefile touches few pages.
        let restart = ring.head_slot == ring.tail_slot && left_to_wrap < size;
        let at =
            if need as u64 > left_to_wrap || restart { ring.tail_at + left_to_wrap } else { ring.tail_at };
        let head_at = if ring.head_slot == ring.tail_slot { at } else { ring.head_at };
        (at + need as u64 - head_at <= size).then_some(at)
    }

    /// Ends a reservation: published, dropped or void.
    fn settle(&self, void: Option<Room>) {
        let mut ring = lock(&self.ring);
        if let Some(room) = void {
            self.slot_words(room.slot)[0].store(FREE, Ordering::Release);
            self.advance_head(&mut ring);
        }
        ring.outstanding -= 1;
        if ring.outstanding == 0 && ring.held {
            self.room.notify_all();
        }
    }
}

/// How long one writer has waited for room, and how long it shall wait next.
#[derive(Debug, Default)]
struct Pacing {
    paused: bool,
    full_since: Option<Instant>,
}

impl Pacing {
    /// Room is there. Above three quarters writers are slowed down once each, the more the fuller, so that they feel
    /// the link's speed before they hit the wall.
    fn before_room(&mut self, fill: f64, link_up: bool) -> Option<Duration> {
        if self.paused || self.full_since.is_some() || !link_up || fill < 0.75 {
            return None;
        }
        self.paused = true;
        Some(Duration::from_nanos(limits::PACE_STEP_NS_MAX).mul_f64((fill - 0.75) * 4.0))
    }

    /// No room is there. `None` when the wait was long enough.
    fn while_full(&mut self) -> Option<Duration> {
        let since = *self.full_since.get_or_insert_with(Instant::now);
        let left = Duration::from_nanos(limits::PACE_NS_MAX).saturating_sub(since.elapsed());
        (!left.is_zero()).then_some(left)
    }
}

impl Reservation<'_> {
    /// Notes what an operation on names found under its locks. Call it right before the call that changes something:
    /// without a note, it is known after a crash that nothing happened.
    pub fn note(&self, note: Note) {
        if let Some(Room { slot, note_at: Some(at), .. }) = self.room {
            layout::put_note(&self.capture.map, at, &self.capture.slot_words(slot)[7], note);
        }
    }

    /// Copies the update and its data, takes the stamp and publishes, in one atomic step. Call it under the locks of
    /// all that the operation changed, after the backing call, before the reply.
    ///
    /// Returns the stamp, or `None` if the session is suspended and the update was dropped.
    ///
    /// # Panics
    /// If the update is larger than was reserved.
    pub fn publish<B: AsRef<[u8]>>(mut self, op: Op<B>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        let capture = self.capture;
        let Some(room) = self.room.take() else {
            capture.changes.note(self.volume, &op, &attrs);
            return None;
        };
        let op_kind = op.kind();
        let mut encoded = Vec::with_capacity(256);
        let update = Update { stamp: Stamp::default(), op, attrs };
        update::encode(&update, &mut encoded);
        assert!(padded(encoded.len()) + padded(data.len()) <= room.bytes, "more than was reserved");
        capture.map.copy_in(room.at, &encoded);
        let data_at = room.at + padded(encoded.len());
        capture.map.copy_in(data_at, data);
        let words = capture.slot_words(room.slot);
        words[4].store(from_halves(encoded.len(), data.len()), Ordering::Relaxed);

        let mut publish = lock(&capture.publish);
        let Some(time) = capture.stamp(&mut publish) else {
            drop(publish);
            // Nothing, unless it was this one that closed it.
            capture.suspend_while(Overflow::Site);
            capture.changes.note(self.volume, &update.op, &update.attrs);
            capture.settle(Some(room));
            // The reservation is settled: its drop would do it again.
            std::mem::forget(self);
            return None;
        };
        let seq = publish.last_seq[self.volume.as_usize()].next();
        let stamp = Stamp { time, seq };
        publish.last_seq[self.volume.as_usize()] = seq;
        let header = &capture.map.words()[room.at / WORD..];
        header[1].store(stamp.time.0.to_le(), Ordering::Relaxed);
        header[2].store(seq.0.to_le(), Ordering::Relaxed);
        words[5].store(stamp.time.0, Ordering::Relaxed);
        words[6].store(seq.0, Ordering::Relaxed);
        capture.map.words()[W_LAST_TIME].store(stamp.time.0, Ordering::Relaxed);
        words[0].store(SlotState::word(PUBLISHED, self.volume, false), Ordering::Release);
        if op_kind == OpKind::Complete {
            VolumeWords::of(&capture.map, self.volume.as_usize()).set_complete(Some(stamp));
        }
        let captured = Captured {
            volume: self.volume,
            stamp,
            slot: room.slot,
            meta_at: room.at,
            meta_len: encoded.len(),
            data_at,
            data_len: data.len(),
        };
        publish.queue.push_back(captured);
        publish.queued_bytes += captured.bytes();
        let wake = publish.queued_bytes >= publish.wake_at_bytes;
        if wake {
            publish.wake_at_bytes = usize::MAX;
        }
        drop(publish);
        if wake {
            capture.published.notify_all();
        }
        Some(stamp)
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.capture.settle(self.room.take());
    }
}
