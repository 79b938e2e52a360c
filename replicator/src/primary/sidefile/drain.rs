//! The data mover's side: it takes what was published, and frees its room once the replica has it.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use twinfs_core::id::{SetHash, SetNumber, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::ChainPoint;
use twinfs_core::stamp::{Seq, Timestamp};

use super::layout::{self, FREE, INTENT, PUBLISHED, SlotState, VolumeWords, W_LAST_TIME};
use super::{Capture, Captured, Cut, lock};
use crate::sys::map::WORD;

impl Capture {
    /// Waits until `wake_at_bytes` bytes are queued, someone pokes, or `deadline` passes. Returns the queued bytes.
    pub fn wait_queued(&self, wake_at_bytes: usize, deadline: Instant) -> usize {
        let mut publish = lock(&self.publish);
        loop {
            let timeout = deadline.saturating_duration_since(Instant::now());
            if std::mem::take(&mut publish.poked)
                || publish.queued_bytes >= wake_at_bytes
                || timeout.is_zero()
            {
                publish.wake_at_bytes = usize::MAX;
                return publish.queued_bytes;
            }
            publish.wake_at_bytes = wake_at_bytes;
            publish = self.published.wait_timeout(publish, timeout).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Wakes the mover.
    pub fn poke(&self) {
        lock(&self.publish).poked = true;
        self.published.notify_all();
    }

    /// Takes the oldest updates, up to about `bytes_max` bytes of them, and the instant up to which they are complete.
    pub fn cut(&self, bytes_max: usize) -> Cut {
        let mut publish = lock(&self.publish);
        let mut updates = Vec::new();
        let mut bytes = 0;
        while bytes < bytes_max && updates.len() < limits::SET_UPDATES_MAX {
            let Some(captured) = publish.queue.pop_front() else { break };
            bytes += captured.bytes();
            updates.push(captured);
        }
        publish.queued_bytes -= bytes;
        let emptied = publish.queue.is_empty();
        let end = match (updates.last(), publish.closed) {
            (Some(last), _) if !emptied => last.stamp.time,
            (_, Some(closed)) => closed,
            // Under this lock nothing is being published, so whatever comes is stamped later than this.
            (_, None) => publish.clock.tick(self.time.read()),
        };
        // A cut by size ends before what is published already.
        self.map.words()[W_LAST_TIME].fetch_max(end.0, Ordering::Relaxed);
        Cut { end, updates, emptied }
    }

    /// The volumes of which nothing waits to be cut, and the instant up to which that is so.
    pub fn idle_volumes(&self) -> (Timestamp, Vec<VolumeIndex>) {
        let publish = &mut *lock(&self.publish);
        let mut is_idle = vec![true; publish.last_seq.len()];
        for captured in &publish.queue {
            is_idle[captured.volume.as_usize()] = false;
        }
        // As for a cut: whatever comes is stamped later.
        let end = publish.closed.unwrap_or_else(|| publish.clock.tick(self.time.read()));
        self.map.words()[W_LAST_TIME].store(publish.clock.last().0, Ordering::Relaxed);
        let idle = (0..).map(VolumeIndex).zip(is_idle).filter(|(_, is_idle)| *is_idle);
        (end, idle.map(|(volume, _)| volume).collect())
    }

    /// The updates that wait to be cut and were stamped after `after`, oldest first, at most `max`: what write tokens are
    /// made of.
    pub fn queued_after(&self, after: Timestamp, max: usize) -> Vec<Captured> {
        let publish = lock(&self.publish);
        let from = publish.queue.partition_point(|captured| captured.stamp.time <= after);
        publish.queue.range(from..).take(max).copied().collect()
    }

    /// Appends the encoded update to `out`.
    pub fn copy_meta(&self, captured: &Captured, out: &mut Vec<u8>) {
        self.map.copy_out(captured.meta_at, captured.meta_len, out);
    }

    /// Appends the update's data to `out`.
    pub fn copy_data(&self, captured: &Captured, out: &mut Vec<u8>) {
        self.map.copy_out(captured.data_at, captured.data_len, out);
    }

    /// Notes, for after a crash, which record set ends with the last of `updates`, and that none ends with the others.
    pub fn note_set(&self, updates: &[Captured], number: SetNumber, hash: SetHash, end: Timestamp) {
        let Some((last, others)) = updates.split_last() else { return };
        for captured in others {
            let word = &self.slot_words(captured.slot)[0];
            if SlotState::of(word.load(Ordering::Relaxed)).set_ends {
                word.store(SlotState::word(PUBLISHED, captured.volume, false), Ordering::Release);
            }
        }
        let words = self.slot_words(last.slot);
        let begin = self.ring_at + (words[2].load(Ordering::Relaxed) % self.ring_bytes as u64) as usize;
        layout::put_set_end(&self.map.words()[begin / WORD..], number, hash, end);
        words[0].store(SlotState::word(PUBLISHED, last.volume, true), Ordering::Release);
    }

    /// The replica has a volume's record sets up to `point` without a gap. Then [`release`](Self::release) their updates.
    pub fn acknowledge(&self, volume: VolumeIndex, point: ChainPoint, end: Timestamp) {
        VolumeWords::of(&self.map, volume.as_usize()).set_acked(point, end);
    }

    /// Takes out of the queue what the replica turned out to have, up to the update `through`: after a restart, before
    /// anything was cut.
    pub fn discard(&self, volume: VolumeIndex, through: Seq) {
        let mut publish = lock(&self.publish);
        let known = |captured: &Captured| captured.volume == volume && captured.stamp.seq <= through;
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut publish.queue).into_iter().partition(known);
        publish.queue = kept.into();
        publish.queued_bytes = publish.queue.iter().map(Captured::bytes).sum();
        drop(publish);
        self.release(&gone);
    }

    /// Frees the slots of operations that an earlier run had under way: what they did has been published anew.
    pub fn settle_left(&self) {
        let mut ring = lock(&self.ring);
        for slot in ring.head_slot..ring.tail_slot {
            let word = &self.slot_words(slot)[0];
            if SlotState::of(word.load(Ordering::Acquire)).state == INTENT {
                word.store(FREE, Ordering::Release);
            }
        }
        self.advance_head(&mut ring);
    }

    /// Frees the room of updates that the replica has made durable.
    pub fn release(&self, updates: &[Captured]) {
        let mut ring = lock(&self.ring);
        for captured in updates {
            self.slot_words(captured.slot)[0].store(FREE, Ordering::Release);
        }
        self.advance_head(&mut ring);
        drop(ring);
        self.room.notify_all();
    }

    /// Bytes and number of updates that were not cut yet, and the time of the oldest.
    pub fn queued(&self) -> (usize, usize, Option<Timestamp>) {
        let publish = lock(&self.publish);
        (publish.queued_bytes, publish.queue.len(), publish.queue.front().map(|captured| captured.stamp.time))
    }
}
