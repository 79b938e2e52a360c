//! The sidefile: the ring of captured updates that no replica has made durable yet.
//!
//! It is memory that outlives the process: a shared mapping of a preallocated file. Fixed slots say what is captured; a
//! data ring holds the bytes. A mutation goes through it in three steps (the caller's side stands in [`Capture`]):
//!
//! 1. *reserve*, before any lock: a slot, room for the bytes, and the **intent** – enough to read again, after a crash,
//!    what the operation may or may not have changed. Writers are paced here.
//! 2. the backing call, under the locks of all that it changes.
//! 3. *publish*, under the same locks: the bytes are copied, then stamp and publication are one atomic step. A failed
//!    operation makes its slot void instead.
//!
//! ```text
//! header page, words of 8 bytes:
//!    0 magic   1 version   2–3 session   4 slots   5 bytes of the data ring   6 clean mark   7 last timestamp
//!    64 + v    last sequence number of volume v
//! slots, 64 bytes each, from byte 4096:
//!    0 state (8 bits), volume (16 bits from bit 16)      1 number of the slot since the file was made
//!    2 position of its room in the ring since the file was made (the offset is the remainder by the ring's size)
//!    3 bytes of room (low half), bytes of the intent (high half)
//!    4 bytes of the encoded update (low half), bytes of data (high half)      5 timestamp   6 sequence number   7 zero
//! data ring, up to the end of the file; in the room of a slot, each part padded to 8 bytes:
//!    intent · encoded update · data
//! ```

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use twinfs_core::id::{SessionId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{self, AttrList, Intent, Op, Update};

use super::clock::{Reading, StampClock};
use crate::sys::map::{SharedMap, WORD};

const MAGIC: u64 = u64::from_le_bytes(*b"TWINSIDE");
const VERSION: u64 = 1;
const HEADER_BYTES: usize = 4096;
const SLOT_WORDS: usize = 8;
const SLOT_BYTES: usize = SLOT_WORDS * WORD;
/// One slot for this many bytes of the ring: small operations fill slots and ring about evenly.
const RING_BYTES_PER_SLOT: usize = 1024;

const W_MAGIC: usize = 0;
const W_VERSION: usize = 1;
const W_SESSION: usize = 2;
const W_SLOTS: usize = 4;
const W_RING: usize = 5;
const W_CLEAN: usize = 6;
const W_LAST_TIME: usize = 7;
const W_LAST_SEQ: usize = 64;

const FREE: u64 = 0;
const INTENT: u64 = 1;
const PUBLISHED: u64 = 2;

/// Why a sidefile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SidefileError {
    /// The file system said no.
    #[error("cannot use the sidefile {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// It is smaller than one update, or larger than the address space.
    #[error("a sidefile of {bytes} bytes is out of range: use at least {min}", min = bytes_min())]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The bytes are not those of a sidefile of this session.
    #[error("the sidefile {path} is damaged or of another session ({what})")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// Smallest sidefile that can hold two of the largest updates.
#[must_use]
pub const fn bytes_min() -> u64 {
    4 * (limits::WRITE_BYTES_MAX + limits::UPDATE_META_BYTES_MAX) as u64
}

/// Why a mutation may not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// This site is no primary any more.
    #[error("this site is FENCED: another site was promoted")]
    Fenced,
}

/// Why the session stopped capturing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The sidefile is full and no link drains it.
    LinkDown,
    /// The sidefile is full, and stayed so for [`limits::PACE_NS_MAX`] although the link is up.
    TooSlow,
}

/// Whether captured updates are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Active,
    /// Updates after the last published one are dropped; what was published before stays.
    Suspended(Option<Overflow>),
    Fenced,
}

/// The capture side of a session: what the file system layer calls for each mutation, and what the data mover drains.
#[derive(Debug)]
pub struct Capture {
    path: PathBuf,
    map: SharedMap,
    slots: usize,
    ring_at: usize,
    ring_bytes: usize,
    /// Lock order: `ring` before `publish`. Neither is held over a system call other than a wake-up.
    ring: Mutex<Ring>,
    room: Condvar,
    publish: Mutex<Publish>,
    published: Condvar,
    link_up: AtomicBool,
}

#[derive(Debug)]
struct Ring {
    mode: Mode,
    held: bool,
    /// Reservations that are neither published nor void.
    outstanding: usize,
    head_slot: u64,
    tail_slot: u64,
    head_at: u64,
    tail_at: u64,
}

#[derive(Debug)]
struct Publish {
    clock: StampClock,
    last_seq: Vec<Seq>,
    /// In the order of stamps.
    queue: VecDeque<Captured>,
    queued_bytes: usize,
    /// The mover wants to be woken when this many bytes are queued.
    wake_at_bytes: usize,
    poked: bool,
    /// How many updates at the front of the queue were given out for write tokens.
    tokened: usize,
    /// Nothing is published any more, and nothing was dropped up to this instant.
    closed: Option<Timestamp>,
}

/// A published update in the sidefile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured {
    /// Its volume.
    pub volume: VolumeIndex,
    /// Its stamp.
    pub stamp: Stamp,
    slot: u64,
    meta_at: usize,
    meta_len: usize,
    data_at: usize,
    data_len: usize,
}

impl Captured {
    /// Bytes of the encoded update and its data.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.meta_len + self.data_len
    }
}

/// Updates taken from the sidefile: all that were stamped at or before `end` and not taken before.
#[derive(Debug)]
pub struct Cut {
    /// The instant up to which nothing is missing, on every volume.
    pub end: Timestamp,
    /// The updates in the order of their stamps.
    pub updates: Vec<Captured>,
    /// Whether nothing was left behind: only then does `end` lie at the present.
    pub emptied: bool,
}

/// How full the sidefile is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Bytes in use.
    pub used: u64,
    /// Bytes in all.
    pub size: u64,
    /// Why capture stopped, if the session is suspended.
    pub suspended: bool,
    /// The overflow that suspended it, if that was the cause.
    pub overflow: Option<Overflow>,
}

/// What is known of a session when its sidefile is opened.
#[derive(Debug)]
pub struct Start<'a> {
    /// The session that the sidefile belongs to.
    pub session: SessionId,
    /// For each volume, the last sequence number known from elsewhere.
    pub last_seq: &'a [Seq],
    /// No earlier update has a later timestamp.
    pub floor: Timestamp,
    /// Timestamps stay below this until [`Capture::raise_limit`].
    pub limit: Timestamp,
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
    /// Byte offset in the mapping, after the intent.
    at: usize,
    bytes: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section below leaves its state valid at each step; a panic elsewhere must not stop the mirror.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(WORD)
}

impl Capture {
    /// Makes a sidefile of `bytes` bytes at `path`, mode 0600, with all its blocks allocated.
    ///
    /// # Errors
    /// [`SidefileError`]; a half-made file is removed.
    pub fn create(path: &Path, bytes: u64, start: &Start<'_>) -> Result<Self, SidefileError> {
        let fail = |source| SidefileError::Io { path: path.to_owned(), source };
        let size = usize::try_from(bytes).ok().filter(|_| bytes >= bytes_min());
        let size = size.ok_or(SidefileError::Size { bytes })?.next_multiple_of(HEADER_BYTES);
        let slots = (size - HEADER_BYTES) / (RING_BYTES_PER_SLOT + SLOT_BYTES);
        let ring_bytes = size - HEADER_BYTES - slots * SLOT_BYTES;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        let made = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size as u64)
            .map_err(io::Error::from)
            .and_then(|()| SharedMap::new(&file));
        let map = made.map_err(|source| {
            drop(std::fs::remove_file(path));
            fail(source)
        })?;
        let words = map.words();
        let (session_a, session_b) = session_words(start.session);
        words[W_VERSION].store(VERSION, Ordering::Relaxed);
        words[W_SESSION].store(session_a, Ordering::Relaxed);
        words[W_SESSION + 1].store(session_b, Ordering::Relaxed);
        words[W_SLOTS].store(slots as u64, Ordering::Relaxed);
        words[W_RING].store(ring_bytes as u64, Ordering::Relaxed);
        words[W_MAGIC].store(MAGIC, Ordering::Release);
        Self::over(path, map, start)
    }

    /// Opens the sidefile of an earlier run and takes over what was published and not released. Returns the number of
    /// slots that were left as intents beside it: operations in flight when the process was killed.
    ///
    /// # Errors
    /// [`SidefileError`]; the file is left as it is.
    pub fn open(path: &Path, start: &Start<'_>) -> Result<(Self, usize), SidefileError> {
        let fail = |source| SidefileError::Io { path: path.to_owned(), source };
        let file = File::options().read(true).write(true).open(path).map_err(fail)?;
        let map = SharedMap::new(&file).map_err(fail)?;
        let capture = Self::over(path, map, start)?;
        let intents = capture.take_over()?;
        Ok((capture, intents))
    }

    fn over(path: &Path, map: SharedMap, start: &Start<'_>) -> Result<Self, SidefileError> {
        let damaged = |what| SidefileError::Damaged { path: path.to_owned(), what };
        let words = map.words();
        let word = |at: usize| words.get(at).map_or(0, |word| word.load(Ordering::Acquire));
        if word(W_MAGIC) != MAGIC || word(W_VERSION) != VERSION {
            return Err(damaged("no sidefile of this version"));
        }
        if (word(W_SESSION), word(W_SESSION + 1)) != session_words(start.session) {
            return Err(damaged("it belongs to another session"));
        }
        let slots = usize::try_from(word(W_SLOTS)).unwrap_or(usize::MAX);
        let ring_bytes = usize::try_from(word(W_RING)).unwrap_or(usize::MAX);
        let ring_at = slots.checked_mul(SLOT_BYTES).and_then(|bytes| bytes.checked_add(HEADER_BYTES));
        let ring_at = ring_at.ok_or(damaged("its sizes do not fit"))?;
        if ring_at.checked_add(ring_bytes) != Some(words.len() * WORD) || slots == 0 || ring_bytes % WORD != 0
        {
            return Err(damaged("its sizes do not fit"));
        }
        let last_seq: Vec<Seq> = start
            .last_seq
            .iter()
            .enumerate()
            .map(|(volume, known)| Seq(word(W_LAST_SEQ + volume)).max(*known))
            .collect();
        let floor = start.floor.max(Timestamp(word(W_LAST_TIME)));
        words[W_CLEAN].store(0, Ordering::Release);
        Ok(Self {
            path: path.to_owned(),
            slots,
            ring_at,
            ring_bytes,
            ring: Mutex::new(Ring {
                mode: Mode::Active,
                held: false,
                outstanding: 0,
                head_slot: 0,
                tail_slot: 0,
                head_at: 0,
                tail_at: 0,
            }),
            room: Condvar::new(),
            publish: Mutex::new(Publish {
                clock: StampClock::new(Reading::now(), floor, start.limit),
                last_seq,
                queue: VecDeque::new(),
                queued_bytes: 0,
                wake_at_bytes: usize::MAX,
                poked: false,
                tokened: 0,
                closed: None,
            }),
            published: Condvar::new(),
            link_up: AtomicBool::new(false),
            map,
        })
    }

    /// Whether the run that last used the sidefile at `path` ended cleanly. An unreadable file was not.
    #[must_use]
    pub fn was_clean(path: &Path) -> bool {
        let read = || -> io::Result<bool> {
            let map = SharedMap::new(&File::options().read(true).write(true).open(path)?)?;
            let word = |at: usize| map.words().get(at).map_or(0, |word| word.load(Ordering::Acquire));
            Ok(word(W_MAGIC) == MAGIC && word(W_CLEAN) == 1)
        };
        read().unwrap_or(false)
    }

    /// Rebuilds ring and queue from the slots of an earlier run.
    fn take_over(&self) -> Result<usize, SidefileError> {
        let damaged = |what| SidefileError::Damaged { path: self.path.clone(), what };
        let mut found = Vec::new();
        let mut intents = 0;
        let mut ends = Vec::new();
        for index in 0..self.slots {
            let words = self.slot_words(index as u64);
            let word = |at: usize| words[at].load(Ordering::Acquire);
            let state = word(0) & 0xff;
            if state == FREE {
                continue;
            }
            let (slot, at) = (word(1), word(2));
            let (room, intent_len) = halves(word(3));
            if slot % self.slots as u64 != index as u64 || room > self.ring_bytes {
                return Err(damaged("a slot is out of place"));
            }
            let offset = (at % self.ring_bytes as u64) as usize;
            if !offset.is_multiple_of(WORD) || offset + room > self.ring_bytes || padded(intent_len) > room {
                return Err(damaged("the room of a slot is outside the ring"));
            }
            ends.push((slot, at, at + room as u64));
            if state == INTENT {
                intents += 1;
                continue;
            }
            let (meta_len, data_len) = halves(word(4));
            let meta_at = self.ring_at + offset + padded(intent_len);
            let data_at = meta_at + padded(meta_len);
            if padded(intent_len) + padded(meta_len) + padded(data_len) > room {
                return Err(damaged("an update is larger than its room"));
            }
            let stamp = Stamp { time: Timestamp(word(5)), seq: Seq(word(6)) };
            let volume = VolumeIndex((word(0) >> 16) as u16);
            found.push(Captured { volume, stamp, slot, meta_at, meta_len, data_at, data_len });
        }
        found.sort_by_key(|captured| captured.stamp);
        let mut publish = lock(&self.publish);
        let mut encoded = Vec::new();
        for captured in &found {
            encoded.clear();
            self.map.copy_out(captured.meta_at, captured.meta_len, &mut encoded);
            let (update, _) =
                update::decode(&encoded, 0).map_err(|_| damaged("an update does not decode"))?;
            let volumes = publish.last_seq.len();
            if update.stamp != captured.stamp || captured.volume.as_usize() >= volumes {
                return Err(damaged("an update is not the one that its slot names"));
            }
        }
        publish.queued_bytes = found.iter().map(Captured::bytes).sum();
        publish.queue = found.into();
        drop(publish);
        let mut ring = lock(&self.ring);
        if let (Some(first), Some(last)) = (ends.iter().min(), ends.iter().max()) {
            (ring.head_slot, ring.head_at) = (first.0, first.1);
            (ring.tail_slot, ring.tail_at) = (last.0 + 1, last.2);
            if ring.tail_slot - ring.head_slot > self.slots as u64
                || ring.tail_at - ring.head_at > self.ring_bytes as u64
            {
                return Err(damaged("its slots do not follow each other"));
            }
        }
        Ok(intents)
    }

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
        assert!(meta_bytes <= limits::UPDATE_META_BYTES_MAX && data_bytes <= limits::WRITE_BYTES_MAX);
        let mut intent_bytes = Vec::with_capacity(Intent::BYTES_MAX);
        intent.encode(&mut intent_bytes);
        let intent_room = padded(intent_bytes.len());
        let bytes = padded(meta_bytes) + padded(data_bytes);
        let need = intent_room + bytes;

        let mut ring = lock(&self.ring);
        let mut waited = Pacing::default();
        let at = loop {
            match ring.mode {
                Mode::Fenced => return Err(Refused::Fenced),
                Mode::Suspended(_) => {
                    ring.outstanding += 1;
                    return Ok(Reservation { capture: self, volume, room: None });
                }
                Mode::Active => {}
            }
            if ring.held {
                ring = self.room.wait(ring).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let place = self.place(&ring, need);
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
        let slot = ring.tail_slot;
        if ring.head_slot == slot {
            ring.head_at = at;
        }
        ring.tail_slot += 1;
        ring.tail_at = at + need as u64;
        ring.outstanding += 1;
        let words = self.slot_words(slot);
        words[1].store(slot, Ordering::Relaxed);
        words[2].store(at, Ordering::Relaxed);
        words[3].store(from_halves(need, intent_bytes.len()), Ordering::Relaxed);
        let offset = self.ring_at + (at % self.ring_bytes as u64) as usize;
        self.map.copy_in(offset, &intent_bytes);
        words[0].store(INTENT | u64::from(volume.0) << 16, Ordering::Release);
        Ok(Reservation { capture: self, volume, room: Some(Room { slot, at: offset + intent_room, bytes }) })
    }

    /// Where room for `need` bytes begins, or `None` if there is none.
    fn place(&self, ring: &Ring, need: usize) -> Option<u64> {
        let size = self.ring_bytes as u64;
        if ring.tail_slot - ring.head_slot >= self.slots as u64 {
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

    fn fill_of(&self, ring: &Ring) -> f64 {
        let bytes = (ring.tail_at - ring.head_at) as f64 / self.ring_bytes as f64;
        let slots = (ring.tail_slot - ring.head_slot) as f64 / self.slots as f64;
        bytes.max(slots)
    }

    fn slot_words(&self, slot: u64) -> &[AtomicU64] {
        let index = (slot % self.slots as u64) as usize;
        &self.map.words()[(HEADER_BYTES + index * SLOT_BYTES) / WORD..][..SLOT_WORDS]
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

    fn advance_head(&self, ring: &mut Ring) {
        while ring.head_slot < ring.tail_slot {
            let words = self.slot_words(ring.head_slot);
            if words[0].load(Ordering::Acquire) & 0xff != FREE {
                ring.head_at = words[2].load(Ordering::Relaxed);
                return;
            }
            ring.head_slot += 1;
        }
        ring.head_at = ring.tail_at;
    }

    // ---- the data mover's side ----

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
        publish.tokened = publish.tokened.saturating_sub(updates.len());
        let emptied = publish.queue.is_empty();
        let end = match (updates.last(), publish.closed) {
            (Some(last), _) if !emptied => last.stamp.time,
            (_, Some(closed)) => closed,
            // Under this lock nothing is being published, so whatever comes is stamped later than this.
            (_, None) => publish.clock.tick(Reading::now()),
        };
        self.map.words()[W_LAST_TIME].store(end.0, Ordering::Relaxed);
        Cut { end, updates, emptied }
    }

    /// The updates that wait to be cut and were not returned before, oldest first, at most `max`: what write tokens are
    /// made of.
    pub fn take_untokened(&self, max: usize) -> Vec<Captured> {
        let mut publish = lock(&self.publish);
        let fresh: Vec<Captured> = publish.queue.iter().skip(publish.tokened).take(max).copied().collect();
        publish.tokened += fresh.len();
        fresh
    }

    /// Appends the encoded update to `out`.
    pub fn copy_meta(&self, captured: &Captured, out: &mut Vec<u8>) {
        self.map.copy_out(captured.meta_at, captured.meta_len, out);
    }

    /// Appends the update's data to `out`.
    pub fn copy_data(&self, captured: &Captured, out: &mut Vec<u8>) {
        self.map.copy_out(captured.data_at, captured.data_len, out);
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

    /// Says whether a link drains the sidefile; while none does, a full sidefile suspends at once.
    pub fn set_link_up(&self, up: bool) {
        self.link_up.store(up, Ordering::Relaxed);
        self.room.notify_all();
    }

    /// How full it is, and whether the session is suspended.
    pub fn fill(&self) -> Fill {
        let ring = lock(&self.ring);
        let (suspended, overflow) = match ring.mode {
            Mode::Suspended(overflow) => (true, overflow),
            Mode::Active | Mode::Fenced => (false, None),
        };
        let size = (self.ring_at + self.ring_bytes) as u64;
        Fill { used: ring.tail_at - ring.head_at, size, suspended, overflow }
    }

    /// Blocks until less than a quarter of the sidefile is in use, or the session stops capturing (then `false`): the
    /// initial copy takes only the room that writers leave.
    pub fn wait_copy_room(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut ring = lock(&self.ring);
        loop {
            if ring.mode != Mode::Active {
                return false;
            }
            let timeout = deadline.saturating_duration_since(Instant::now());
            if self.fill_of(&ring) < 0.25 {
                return true;
            }
            if timeout.is_zero() {
                return false;
            }
            ring = self.room.wait_timeout(ring, timeout).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The timestamp and time now, on the session's clock, without advancing past `limit`.
    pub fn now(&self) -> Timestamp {
        lock(&self.publish).clock.tick(Reading::now())
    }

    /// The last sequence number of each volume.
    pub fn last_seqs(&self) -> Vec<Seq> {
        lock(&self.publish).last_seq.clone()
    }

    /// Bytes and number of updates that were not cut yet, and the time of the oldest.
    pub fn queued(&self) -> (usize, usize, Option<Timestamp>) {
        let publish = lock(&self.publish);
        (publish.queued_bytes, publish.queue.len(), publish.queue.front().map(|captured| captured.stamp.time))
    }

    /// Allows timestamps up to `limit`, after the mark was made durable.
    pub fn raise_limit(&self, limit: Timestamp) {
        lock(&self.publish).clock.raise_limit(limit);
    }

    // ---- status changes ----

    /// Stops capturing: later updates are dropped, published ones stay. Programs go on at full speed.
    pub fn suspend(&self) {
        self.suspend_locked(&mut lock(&self.ring), None);
    }

    fn suspend_locked(&self, ring: &mut Ring, overflow: Option<Overflow>) {
        if ring.mode == Mode::Active {
            ring.mode = Mode::Suspended(overflow);
            // Operations under way publish nothing either: what they would publish follows updates already dropped.
            let mut publish = lock(&self.publish);
            publish.closed = Some(publish.clock.last());
            publish.poked = true;
            drop(publish);
            self.published.notify_all();
            self.room.notify_all();
        }
    }

    /// Holds new mutations and waits until those under way are done, at most `timeout`. Returns whether they are; if
    /// not, or to go on, call [`Self::let_go`]. Programs wait, none gets an error.
    pub fn hold(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut ring = lock(&self.ring);
        ring.held = true;
        while ring.outstanding > 0 {
            let timeout = deadline.saturating_duration_since(Instant::now());
            if timeout.is_zero() {
                return false;
            }
            ring = self.room.wait_timeout(ring, timeout).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Ends a hold.
    pub fn let_go(&self) {
        lock(&self.ring).held = false;
        self.room.notify_all();
    }

    /// Refuses every further mutation: another site is the primary now.
    pub fn fence(&self) {
        let mut ring = lock(&self.ring);
        ring.mode = Mode::Fenced;
        ring.held = false;
        let mut publish = lock(&self.publish);
        let last = publish.clock.last();
        publish.closed.get_or_insert(last);
        drop((publish, ring));
        self.room.notify_all();
    }

    /// Ends the use of the sidefile cleanly. What it still holds is made durable for the next run; an empty one is
    /// removed.
    ///
    /// # Errors
    /// [`SidefileError::Io`]
    pub fn close(&self) -> Result<(), SidefileError> {
        let fail = |source| SidefileError::Io { path: self.path.clone(), source };
        let empty = {
            let ring = lock(&self.ring);
            ring.head_slot == ring.tail_slot
        };
        if empty {
            return std::fs::remove_file(&self.path).map_err(fail);
        }
        self.map.words()[W_CLEAN].store(1, Ordering::Release);
        self.map.sync().map_err(fail)
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

fn session_words(session: SessionId) -> (u64, u64) {
    let mut words = session.as_bytes().chunks_exact(8).map(|half| {
        let mut raw = [0; 8];
        raw.copy_from_slice(half);
        u64::from_le_bytes(raw)
    });
    (words.next().unwrap_or(0), words.next().unwrap_or(0))
}

fn halves(word: u64) -> (usize, usize) {
    ((word & 0xffff_ffff) as usize, (word >> 32) as usize)
}

fn from_halves(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

impl Reservation<'_> {
    /// Copies the update and its data, takes the stamp and publishes, in one atomic step. Call it under the locks of
    /// all that the operation changed, after the backing call, before the reply.
    ///
    /// Returns the stamp, or `None` if the session is suspended and the update was dropped.
    ///
    /// # Panics
    /// If the update is larger than was reserved.
    pub fn publish<B: AsRef<[u8]>>(mut self, op: Op<B>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        let room = self.room.take()?;
        let capture = self.capture;
        let mut encoded = Vec::with_capacity(256);
        update::encode(&Update { stamp: Stamp::default(), op, attrs }, &mut encoded);
        assert!(padded(encoded.len()) + padded(data.len()) <= room.bytes, "more than was reserved");
        capture.map.copy_in(room.at, &encoded);
        let data_at = room.at + padded(encoded.len());
        capture.map.copy_in(data_at, data);
        let words = capture.slot_words(room.slot);
        words[4].store(from_halves(encoded.len(), data.len()), Ordering::Relaxed);

        let mut publish = lock(&capture.publish);
        if publish.closed.is_some() {
            drop(publish);
            capture.settle(Some(room));
            // The reservation is settled: its drop would do it again.
            std::mem::forget(self);
            return None;
        }
        let seq = publish.last_seq[self.volume.as_usize()].next();
        let stamp = Stamp { time: publish.clock.tick(Reading::now()), seq };
        publish.last_seq[self.volume.as_usize()] = seq;
        let header = &capture.map.words()[room.at / WORD..];
        header[1].store(stamp.time.0.to_le(), Ordering::Relaxed);
        header[2].store(seq.0.to_le(), Ordering::Relaxed);
        words[5].store(stamp.time.0, Ordering::Relaxed);
        words[6].store(seq.0, Ordering::Relaxed);
        capture.map.words()[W_LAST_SEQ + self.volume.as_usize()].store(seq.0, Ordering::Relaxed);
        capture.map.words()[W_LAST_TIME].store(stamp.time.0, Ordering::Relaxed);
        words[0].store(PUBLISHED | u64::from(self.volume.0) << 16, Ordering::Release);
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

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::update::{Attr, sample_file};

    const SESSION: SessionId = SessionId::from_bytes([7; 16]);
    const V: VolumeIndex = VolumeIndex(0);

    fn start(last_seq: &[Seq]) -> Start<'_> {
        Start { session: SESSION, last_seq, floor: Timestamp::ZERO, limit: Timestamp(u64::MAX) }
    }

    fn sidefile(dir: &tempfile::TempDir) -> Capture {
        let capture =
            Capture::create(&dir.path().join("sidefile"), bytes_min(), &start(&[Seq::ZERO; 2])).unwrap();
        capture.set_link_up(true);
        capture
    }

    fn attr() -> Attr {
        Attr { mode: 0o100_644, uid: 0, gid: 0, nlink: 1, rdev: 0, size: 0, mtime_s: 1, mtime_ns: 2 }
    }

    fn reserve(capture: &Capture, volume: VolumeIndex, bytes: usize) -> Reservation<'_> {
        let file = sample_file(5);
        capture.reserve(volume, &Intent::Range { file, offset: 0, len: bytes as u64 }, 256, bytes).unwrap()
    }

    fn publish(reservation: Reservation<'_>, data: &[u8]) -> Option<Stamp> {
        let file = sample_file(5);
        let op: Op<&[u8]> = Op::Write { file, offset: 0, len: data.len() as u32 };
        reservation.publish(op, [(file, attr())].into_iter().collect(), data)
    }

    fn write(capture: &Capture, volume: VolumeIndex, data: &[u8]) -> Option<Stamp> {
        publish(reserve(capture, volume, data.len()), data)
    }

    #[test]
    fn updates_come_out_in_the_order_of_stamps_with_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let early = reserve(&capture, V, 8);
        let first = write(&capture, VolumeIndex(1), b"first").unwrap();
        let failed = reserve(&capture, V, 8);
        let second = publish(early, b"second").unwrap();
        drop(failed);
        assert!(first < second);
        assert_eq!((first.seq, second.seq), (Seq(1), Seq(1)), "sequence numbers are dense for each volume");
        let cut = capture.cut(usize::MAX);
        assert!(cut.emptied && cut.end > second.time);
        assert_eq!(cut.updates.iter().map(|u| u.stamp).collect::<Vec<_>>(), [first, second]);
        for (captured, data) in cut.updates.iter().zip([&b"first"[..], b"second"]) {
            let (mut meta, mut bytes) = (Vec::new(), Vec::new());
            capture.copy_meta(captured, &mut meta);
            capture.copy_data(captured, &mut bytes);
            assert_eq!(update::decode(&meta, 0).unwrap().0.stamp, captured.stamp);
            assert_eq!(bytes, data);
        }
    }

    #[test]
    fn no_cut_passes_an_update_in_flight() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let in_flight = reserve(&capture, V, 1);
        write(&capture, V, b"x").unwrap();
        let end = capture.cut(usize::MAX).end;
        assert!(publish(in_flight, b"y").unwrap().time > end);
    }

    #[test]
    fn a_cut_by_size_ends_at_its_last_update() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let stamps: Vec<_> = (0..3).map(|_| write(&capture, V, &[1; 1000]).unwrap()).collect();
        let cut = capture.cut(1500);
        assert_eq!((cut.updates.len(), cut.emptied, cut.end), (2, false, stamps[1].time));
    }

    #[test]
    fn the_ring_wraps_and_fills_and_frees() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let mut held = VecDeque::new();
        for round in 0..200u32 {
            let data = vec![round as u8; 100_000 + round as usize * 37];
            write(&capture, V, &data).unwrap();
            held.push_back((capture.cut(usize::MAX).updates, data));
            if held.len() > 20 {
                let (updates, data) = held.pop_front().unwrap();
                let mut bytes = Vec::new();
                capture.copy_data(&updates[0], &mut bytes);
                assert!(bytes == data, "round {round}: bytes were overwritten before their release");
                capture.release(&updates);
            }
        }
        while let Some((updates, _)) = held.pop_back() {
            capture.release(&updates);
        }
        assert_eq!(capture.fill().used, 0);
    }

    #[test]
    fn without_a_link_a_full_sidefile_suspends_and_keeps_the_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        capture.set_link_up(false);
        let in_flight = reserve(&capture, V, 10);
        let mut kept = 0;
        while write(&capture, V, &[0; 500_000]).is_some() {
            kept += 1;
        }
        assert!(kept > 5);
        assert_eq!(capture.fill().overflow, Some(Overflow::LinkDown));
        assert_eq!(publish(in_flight, b"late"), None, "it would follow a dropped update");
        let cut = capture.cut(usize::MAX);
        assert_eq!(cut.updates.len(), kept);
        assert_eq!(
            cut.end,
            cut.updates.last().unwrap().stamp.time,
            "nothing is known after the last kept update"
        );
        capture.now();
        assert_eq!(capture.cut(usize::MAX).end, cut.end, "time stands still");
    }

    #[test]
    fn what_was_published_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sidefile");
        let capture = sidefile(&dir);
        write(&capture, V, b"released").unwrap();
        capture.release(&capture.cut(usize::MAX).updates);
        let kept = [write(&capture, V, b"kept").unwrap(), write(&capture, VolumeIndex(1), b"too").unwrap()];
        std::mem::forget(reserve(&capture, V, 3));
        drop(capture);
        assert!(!Capture::was_clean(&path));

        let (again, intents) = Capture::open(&path, &start(&[Seq::ZERO; 2])).unwrap();
        assert_eq!(intents, 1);
        let cut = again.cut(usize::MAX);
        assert_eq!(cut.updates.iter().map(|u| u.stamp).collect::<Vec<_>>(), kept);
        again.set_link_up(true);
        let next = write(&again, V, b"next").unwrap();
        assert_eq!(next.seq, kept[0].seq.next());
        assert!(next > kept[1]);
        again.release(&cut.updates);
        again.close().unwrap();
        assert!(Capture::was_clean(&path));
        let other = Start { session: SessionId::from_bytes([8; 16]), ..start(&[Seq::ZERO; 2]) };
        assert!(matches!(Capture::open(&path, &other), Err(SidefileError::Damaged { .. })));
    }

    #[test]
    fn tokens_are_given_out_once_and_only_before_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let first = write(&capture, V, b"1").unwrap();
        assert_eq!(capture.take_untokened(10).iter().map(|c| c.stamp).collect::<Vec<_>>(), [first]);
        let second = write(&capture, V, b"2").unwrap();
        assert_eq!(capture.take_untokened(10).iter().map(|c| c.stamp).collect::<Vec<_>>(), [second]);
        write(&capture, V, b"3").unwrap();
        capture.cut(usize::MAX);
        assert_eq!(capture.take_untokened(10), []);
    }

    #[test]
    fn a_hold_waits_for_what_is_under_way_and_a_fence_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let in_flight = reserve(&capture, V, 1);
        assert!(!capture.hold(Duration::from_millis(1)));
        publish(in_flight, b"x").unwrap();
        assert!(capture.hold(Duration::from_secs(60)));
        std::thread::scope(|scope| {
            let held = scope.spawn(|| write(&capture, V, b"y"));
            capture.let_go();
            assert!(held.join().unwrap().is_some());
        });
        capture.fence();
        let refused = capture.reserve(V, &Intent::Attrs { file: sample_file(1) }, 100, 0);
        assert_eq!(refused.err(), Some(Refused::Fenced));
    }
}
