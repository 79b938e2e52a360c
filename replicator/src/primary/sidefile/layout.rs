//! Where things stand in the mapping of a sidefile.

use std::sync::atomic::{AtomicU64, Ordering};

use twinfs_core::id::{FileId, SessionId, SetHash, SetNumber, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::ChainPoint;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Kind, Note, OpKind};

use crate::sys::map::{SharedMap, WORD};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"TWINSIDE");
pub(super) const VERSION: u64 = 2;
pub(super) const PAGE_BYTES: usize = 4096;
pub(super) const HEADER_BYTES: usize =
    ((W_VOLUMES + limits::VOLUMES_MAX * VOLUME_WORDS) * WORD).next_multiple_of(PAGE_BYTES);
pub(super) const SLOT_WORDS: usize = 8;
pub(super) const SLOT_BYTES: usize = SLOT_WORDS * WORD;
/// One slot for this many bytes of the ring: small operations fill slots and ring about evenly.
pub(super) const RING_BYTES_PER_SLOT: usize = 1024;

pub(super) const W_MAGIC: usize = 0;
pub(super) const W_VERSION: usize = 1;
pub(super) const W_SESSION: usize = 2;
pub(super) const W_SLOTS: usize = 4;
pub(super) const W_RING: usize = 5;
pub(super) const W_CLEAN: usize = 6;
pub(super) const W_LAST_TIME: usize = 7;
pub(super) const W_DROPPED: usize = 8;
const W_VOLUMES: usize = 64;

const VOLUME_WORDS: usize = 24;
const V_COMPLETE_TIME: usize = 0;
const V_COMPLETE_SEQ: usize = 1;
const V_SELECTED: usize = 2;
const V_POINTS: usize = 4;
const POINT_WORDS: usize = 7;

pub(super) const FREE: u64 = 0;
pub(super) const INTENT: u64 = 1;
pub(super) const PUBLISHED: u64 = 2;
/// In the first word of a slot: a record set ends with this update.
const SET_ENDS: u64 = 1 << 8;

/// What stands in the first word of a slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotState {
    pub(super) state: u64,
    pub(super) set_ends: bool,
    pub(super) volume: VolumeIndex,
}

impl SlotState {
    pub(super) const fn of(word: u64) -> Self {
        Self {
            state: word & 0xff,
            set_ends: word & SET_ENDS != 0,
            volume: VolumeIndex((word >> 16 & 0xffff) as u16),
        }
    }

    pub(super) const fn word(state: u64, volume: VolumeIndex, set_ends: bool) -> u64 {
        state | (volume.0 as u64) << 16 | if set_ends { SET_ENDS } else { 0 }
    }
}

/// Bytes that an intent takes in the ring: at least what says, later, that a record set ends here.
pub(super) const fn intent_room(intent_bytes: usize) -> usize {
    let room = padded(intent_bytes);
    if room < POINT_BYTES { POINT_BYTES } else { room }
}

/// A set's number and hash, and the end of its interval; the last sequence number is the slot's.
const POINT_BYTES: usize = 6 * WORD;
/// Two files.
pub(super) const NOTE_BYTES: usize = 2 * padded(FileId::BYTES);

pub(super) const fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(WORD)
}

pub(super) fn halves(word: u64) -> (usize, usize) {
    ((word & 0xffff_ffff) as usize, (word >> 32) as usize)
}

pub(super) const fn from_halves(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

pub(super) fn session_words(session: SessionId) -> (u64, u64) {
    let mut words = session.as_bytes().chunks_exact(8).map(|half| {
        let mut raw = [0; 8];
        raw.copy_from_slice(half);
        u64::from_le_bytes(raw)
    });
    (words.next().unwrap_or(0), words.next().unwrap_or(0))
}

/// What the header keeps of a volume.
pub(super) struct VolumeWords<'a>(&'a [AtomicU64]);

impl<'a> VolumeWords<'a> {
    pub(super) fn of(map: &'a SharedMap, volume: usize) -> Self {
        Self(&map.words()[W_VOLUMES + volume * VOLUME_WORDS..][..VOLUME_WORDS])
    }

    /// The end of what the replica has acknowledged without a gap, and of that set's interval.
    pub(super) fn acked(&self) -> (ChainPoint, Timestamp) {
        let copy = (self.0[V_SELECTED].load(Ordering::Acquire) & 1) as usize;
        let words = &self.0[V_POINTS + copy * POINT_WORDS..][..POINT_WORDS];
        let word = |at: usize| words[at].load(Ordering::Relaxed);
        let point =
            ChainPoint { number: SetNumber(word(0)), hash: hash_of(&words[1..5]), last_seq: Seq(word(5)) };
        (point, Timestamp(word(6)))
    }

    /// Sets it; a process that is killed amid this leaves the old one or the new one.
    pub(super) fn set_acked(&self, point: ChainPoint, end: Timestamp) {
        let other = 1 - (self.0[V_SELECTED].load(Ordering::Relaxed) & 1);
        let words = &self.0[V_POINTS + other as usize * POINT_WORDS..][..POINT_WORDS];
        words[0].store(point.number.0, Ordering::Relaxed);
        put_hash(&words[1..5], point.hash);
        words[5].store(point.last_seq.0, Ordering::Relaxed);
        words[6].store(end.0, Ordering::Relaxed);
        self.0[V_SELECTED].store(other, Ordering::Release);
    }

    /// Stamp of the mark that ended the volume's copy.
    pub(super) fn complete(&self) -> Option<Stamp> {
        let seq = self.0[V_COMPLETE_SEQ].load(Ordering::Acquire);
        let time = Timestamp(self.0[V_COMPLETE_TIME].load(Ordering::Relaxed));
        (seq != 0).then_some(Stamp { time, seq: Seq(seq) })
    }

    pub(super) fn set_complete(&self, stamp: Option<Stamp>) {
        let stamp = stamp.unwrap_or_default();
        self.0[V_COMPLETE_TIME].store(stamp.time.0, Ordering::Relaxed);
        self.0[V_COMPLETE_SEQ].store(stamp.seq.0, Ordering::Release);
    }
}

/// Writes, over a published slot's intent, which set ends with it.
pub(super) fn put_set_end(words: &[AtomicU64], number: SetNumber, hash: SetHash, end: Timestamp) {
    words[0].store(number.0, Ordering::Relaxed);
    put_hash(&words[1..5], hash);
    words[5].store(end.0, Ordering::Relaxed);
}

pub(super) fn set_end(words: &[AtomicU64], last_seq: Seq) -> (ChainPoint, Timestamp) {
    let number = SetNumber(words[0].load(Ordering::Relaxed));
    let point = ChainPoint { number, hash: hash_of(&words[1..5]), last_seq };
    (point, Timestamp(words[5].load(Ordering::Relaxed)))
}

fn hash_of(words: &[AtomicU64]) -> SetHash {
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.chunks_exact_mut(WORD).zip(words) {
        bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
    }
    SetHash(bytes)
}

fn put_hash(words: &[AtomicU64], hash: SetHash) {
    for (bytes, word) in hash.0.chunks_exact(WORD).zip(words) {
        let mut raw = [0; WORD];
        raw.copy_from_slice(bytes);
        word.store(u64::from_le_bytes(raw), Ordering::Relaxed);
    }
}

/// A note was written. The bits of a file's kind, as in its mode, say that there is the file.
const NOTED: u64 = 1 << 32;
const FIRST_KIND: u32 = 8;
const SECOND_KIND: u32 = 12;

/// Writes a note: the files to byte offset `at`, then, in one store, that it stands there.
pub(super) fn put_note(map: &SharedMap, at: usize, word: &AtomicU64, note: Note) {
    let mut noted = NOTED | note.op as u64;
    for (file, shift, at) in [(note.first, FIRST_KIND, at), (note.second, SECOND_KIND, at + NOTE_BYTES / 2)] {
        if let Some((file, kind)) = file {
            map.copy_in(at, &file.to_bytes());
            noted |= u64::from(kind.mode_bits() >> 12) << shift;
        }
    }
    word.store(noted, Ordering::Release);
}

/// Reads a note; `Ok(None)` if none was written.
pub(super) fn note(map: &SharedMap, at: usize, word: &AtomicU64) -> Result<Option<Note>, &'static str> {
    let word = word.load(Ordering::Acquire);
    if word & NOTED == 0 {
        return Ok(None);
    }
    let op = OpKind::from_u8((word & 0xff) as u8).ok_or("a note names no operation")?;
    let file = |shift: u32, at: usize| {
        let bits = (word >> shift) as u32 & 0xf;
        if bits == 0 {
            return Ok(None);
        }
        let kind = Kind::of_mode(bits << 12).ok_or("a note names no kind of object")?;
        let mut bytes = Vec::new();
        map.copy_out(at, FileId::BYTES, &mut bytes);
        let file = bytes.first_chunk().and_then(FileId::from_bytes);
        file.map(|file| Some((file, kind))).ok_or("a note names no file")
    };
    Ok(Some(Note { op, first: file(FIRST_KIND, at)?, second: file(SECOND_KIND, at + NOTE_BYTES / 2)? }))
}
