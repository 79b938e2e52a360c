//! The sidefile: the ring of captured updates that no replica has made durable yet.
//!
//! It is memory that outlives the process: a shared mapping of a preallocated file. Fixed slots say what is captured; a
//! data ring holds the bytes. A mutation goes through it in three steps (the caller's side stands in [`Capture`]):
//!
//! 1. *reserve*, before any lock: a slot, room for the bytes, and the **intent** – enough to read again, after a crash,
//!    what the operation may or may not have changed. Writers are paced here.
//! 2. the backing call, under the locks of all that it changes; before it, an operation on names *notes* what it found.
//! 3. *publish*, under the same locks: the bytes are copied, then stamp and publication are one atomic step. A failed
//!    operation makes its slot void instead.
//!
//! A process that is killed leaves published updates, and intents of operations that nobody was answered for: see
//! [`Survivors`].
//!
//! ```text
//! header, words of 8 bytes:
//!    0 magic   1 version   2–3 session   4 slots   5 bytes of the data ring   6 clean mark   7 last timestamp
//!    8 updates were let go   from 64 on, 24 words for each volume:
//!       0 time and 1 number of the mark that ended its copy      2 which of the two following holds
//!       4–10, 11–17 the last record set that was acknowledged without a gap: number, hash (4), last update, end
//! slots, 64 bytes each, after the header:
//!    0 state (8 bits), a record set ends here (bit 8), volume (16 bits from bit 16)
//!    1 number of the slot since the file was made
//!    2 position of its room in the ring since the file was made (the offset is the remainder by the ring's size)
//!    3 bytes of room (32 bits), bytes of the intent (16), bytes before the update (16)
//!    4 bytes of the encoded update (low half), bytes of data (high half)      5 timestamp   6 sequence number
//!    7 the note: an operation, the kinds of the files it names (4 bits each from bit 8), that it was written (bit 32)
//! data ring, up to the end of the file; in the room of a slot, each part padded to 8 bytes:
//!    intent, at least 48 bytes · the files of the note, for an operation on names · encoded update · data
//!    (once a record set ends with the update, its number, hash and end stand in place of the intent)
//! ```

mod drain;
mod layout;
mod memory;
mod queued;
mod reserve;
mod resume;
mod survivors;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use twinfs_core::id::{SessionId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::ChainPoint;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};

use self::layout::{
    FREE, HEADER_BYTES, MAGIC, PAGE_BYTES, RING_BYTES_PER_SLOT, SLOT_BYTES, SLOT_WORDS, SlotState, VERSION,
    VolumeWords, W_CLEAN, W_DROPPED, W_LAST_TIME, W_MAGIC, W_RING, W_SESSION, W_SLOTS, W_VERSION,
    session_words,
};
pub use self::reserve::{Reservation, Wanted};
pub use self::resume::NotHeld;
pub use self::survivors::{LeftIntent, SurvivingChain, Survivors};
use super::clock::{StampClock, SystemTime, TimeSource};
use crate::sys::map::{SharedMap, WORD};

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
    /// No overflow: what has to stand in the site directory before updates may be captured cannot be written.
    Site,
}

/// What a primary writes in its site directory while it runs, beside the activity log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SitePart {
    /// The mark that timestamps stay below.
    StampMark,
    /// The control file.
    State,
}

/// How many parts there are.
const SITE_PARTS: usize = SitePart::State as usize + 1;

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
    time: Arc<dyn TimeSource>,
    slots: usize,
    ring_at: usize,
    ring_bytes: usize,
    /// Lock order: `ring` before `publish`. Neither is held over a system call other than a wake-up.
    ring: Mutex<Ring>,
    room: Condvar,
    publish: Mutex<Publish>,
    published: Condvar,
    link_up: AtomicBool,
    /// What was dropped while the session was suspended.
    changes: resume::Changes,
    /// Why a part of the site directory cannot be written, in the order of [`SitePart`]. A lock is held for nothing else.
    troubles: [Mutex<Option<String>>; SITE_PARTS],
    /// No earlier run gave a later timestamp out.
    begun: Timestamp,
}

#[derive(Debug)]
struct Ring {
    mode: Mode,
    held: bool,
    /// Whom a hold does not hold.
    passes: Option<ThreadId>,
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
    /// The volumes.
    pub volumes: &'a [StartVolume],
    /// No earlier update has a later timestamp.
    pub floor: Timestamp,
    /// Timestamps stay below this until [`Capture::raise_limit`].
    pub limit: Timestamp,
}

/// What is known of a volume when the sidefile is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartVolume {
    /// The last sequence number known from elsewhere.
    pub last_seq: Seq,
    /// The end of what the replica has acknowledged without a gap.
    pub acked: ChainPoint,
    /// The end of that set's interval.
    pub end: Timestamp,
    /// Stamp of the mark that ended its copy.
    pub complete: Option<Stamp>,
}

impl StartVolume {
    /// A volume without a past.
    pub const NEW: Self =
        Self { last_seq: Seq::ZERO, acked: ChainPoint::START, end: Timestamp::ZERO, complete: None };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section below leaves its state valid at each step; a panic elsewhere must not stop the mirror.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the blocks of all bytes of a file: a store into the mapping of a hole would kill the process when the file system
/// is full.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    if bytes > 0 {
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    }
    // Some file systems (ZFS) agree and do nothing.
    if file.metadata()?.blocks().saturating_mul(512) < bytes {
        tracing::warn!(
            "the file system of the site directory reserves no space for the sidefile: if it gets full, the daemon ends \
             as if it were killed; see that it does not"
        );
    }
    Ok(())
}

impl Capture {
    /// Makes a sidefile of `bytes` bytes at `path`, mode 0600, with all its blocks allocated.
    ///
    /// # Errors
    /// [`SidefileError`]; a half-made file is removed.
    pub fn create(path: &Path, bytes: u64, start: &Start<'_>) -> Result<Self, SidefileError> {
        Self::make(path, bytes, start, false)
    }

    /// As [`create`](Self::create), for a run that begins after a power loss: should it be killed before it has noted what
    /// was lost, the sidefile says that updates are missing.
    ///
    /// # Errors
    /// [`SidefileError`]; a half-made file is removed.
    pub fn create_after_loss(path: &Path, bytes: u64, start: &Start<'_>) -> Result<Self, SidefileError> {
        Self::make(path, bytes, start, true)
    }

    fn make(path: &Path, bytes: u64, start: &Start<'_>, lost: bool) -> Result<Self, SidefileError> {
        let fail = |source| SidefileError::Io { path: path.to_owned(), source };
        let size = usize::try_from(bytes).ok().filter(|_| bytes >= bytes_min());
        let size = size.ok_or(SidefileError::Size { bytes })?.next_multiple_of(PAGE_BYTES);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        let made = allocate(&file, size as u64).and_then(|()| SharedMap::new(&file));
        let map = made.map_err(|source| {
            drop(std::fs::remove_file(path));
            fail(source)
        })?;
        Self::format(&map, start, lost);
        Self::over(path, map, Arc::new(SystemTime), start)
    }

    /// Opens the sidefile of an earlier run and takes over what was published and not released. What it knows of its
    /// volumes goes before what `start` says; volumes that are new are added.
    ///
    /// # Errors
    /// [`SidefileError`]; the file is left as it is.
    pub fn open(path: &Path, start: &Start<'_>) -> Result<(Self, Survivors), SidefileError> {
        let fail = |source| SidefileError::Io { path: path.to_owned(), source };
        let file = File::options().read(true).write(true).open(path).map_err(fail)?;
        // Somebody may have copied it, and left its zeros out.
        let bytes = file.metadata().map_err(fail)?.len();
        allocate(&file, bytes).map_err(fail)?;
        let map = SharedMap::new(&file).map_err(fail)?;
        Self::reopen(path, map, Arc::new(SystemTime), start)
    }

    /// Writes the header of a new sidefile.
    fn format(map: &SharedMap, start: &Start<'_>, lost: bool) {
        let size = map.words().len() * WORD;
        let slots = (size - HEADER_BYTES) / (RING_BYTES_PER_SLOT + SLOT_BYTES);
        let ring_bytes = size - HEADER_BYTES - slots * SLOT_BYTES;
        let words = map.words();
        let (session_a, session_b) = session_words(start.session);
        words[W_VERSION].store(VERSION, Ordering::Relaxed);
        words[W_SESSION].store(session_a, Ordering::Relaxed);
        words[W_SESSION + 1].store(session_b, Ordering::Relaxed);
        words[W_SLOTS].store(slots as u64, Ordering::Relaxed);
        words[W_RING].store(ring_bytes as u64, Ordering::Relaxed);
        words[W_DROPPED].store(u64::from(lost), Ordering::Relaxed);
        for (at, volume) in start.volumes.iter().enumerate() {
            let words = VolumeWords::of(map, at);
            words.set_acked(volume.acked, volume.end);
            words.set_complete(volume.complete);
        }
        words[W_MAGIC].store(MAGIC, Ordering::Release);
    }

    fn reopen(
        path: &Path,
        map: SharedMap,
        time: Arc<dyn TimeSource>,
        start: &Start<'_>,
    ) -> Result<(Self, Survivors), SidefileError> {
        let capture = Self::over(path, map, time, start)?;
        for (at, volume) in start.volumes.iter().enumerate() {
            let words = VolumeWords::of(&capture.map, at);
            if words.acked().0.number < volume.acked.number {
                words.set_acked(volume.acked, volume.end);
            }
            if words.complete().is_none() {
                words.set_complete(volume.complete);
            }
        }
        let survivors = capture.take_over()?;
        Ok((capture, survivors))
    }

    fn over(
        path: &Path,
        map: SharedMap,
        time: Arc<dyn TimeSource>,
        start: &Start<'_>,
    ) -> Result<Self, SidefileError> {
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
        let fills = ring_at.checked_add(ring_bytes) == Some(words.len() * WORD);
        if !fills || slots == 0 || ring_bytes == 0 || !ring_bytes.is_multiple_of(WORD) {
            return Err(damaged("its sizes do not fit"));
        }
        if start.volumes.len() > limits::VOLUMES_MAX {
            return Err(damaged("there are more volumes than it has room for"));
        }
        let last_seq = start.volumes.iter().enumerate().map(|(at, volume)| {
            let acked = VolumeWords::of(&map, at).acked().0.last_seq;
            volume.last_seq.max(volume.acked.last_seq).max(acked)
        });
        let last_seq: Vec<Seq> = last_seq.collect();
        let floor = start.floor.max(Timestamp(word(W_LAST_TIME)));
        // Half the range is never reached, and leaves room to count on.
        if last_seq.iter().any(|seq| seq.0 > u64::MAX / 2) || floor.0 > u64::MAX / 2 {
            return Err(damaged("it counts further than anybody can"));
        }
        // The next run goes on from there, though this one may end before it gives any timestamp out.
        words[W_LAST_TIME].fetch_max(floor.0, Ordering::Relaxed);
        words[W_CLEAN].store(0, Ordering::Release);
        Ok(Self {
            path: path.to_owned(),
            slots,
            ring_at,
            ring_bytes,
            ring: Mutex::new(Ring {
                mode: Mode::Active,
                held: false,
                passes: None,
                outstanding: 0,
                head_slot: 0,
                tail_slot: 0,
                head_at: 0,
                tail_at: 0,
            }),
            room: Condvar::new(),
            publish: Mutex::new(Publish {
                clock: StampClock::new(time.read(), floor, start.limit),
                last_seq,
                queue: VecDeque::new(),
                queued_bytes: 0,
                wake_at_bytes: usize::MAX,
                poked: false,
                closed: None,
            }),
            published: Condvar::new(),
            link_up: AtomicBool::new(false),
            changes: resume::Changes::new(start.volumes.len()),
            troubles: [const { Mutex::new(None) }; SITE_PARTS],
            map,
            time,
            begun: floor,
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

    fn fill_of(&self, ring: &Ring) -> f64 {
        let bytes = (ring.tail_at - ring.head_at) as f64 / self.ring_bytes as f64;
        let slots = (ring.tail_slot - ring.head_slot) as f64 / self.slots as f64;
        bytes.max(slots)
    }

    fn slot_words(&self, slot: u64) -> &[AtomicU64] {
        let index = (slot % self.slots as u64) as usize;
        &self.map.words()[(HEADER_BYTES + index * SLOT_BYTES) / WORD..][..SLOT_WORDS]
    }

    fn advance_head(&self, ring: &mut Ring) {
        while ring.head_slot < ring.tail_slot {
            let words = self.slot_words(ring.head_slot);
            if SlotState::of(words[0].load(Ordering::Acquire)).state != FREE {
                ring.head_at = words[2].load(Ordering::Relaxed);
                return;
            }
            ring.head_slot += 1;
        }
        ring.head_at = ring.tail_at;
    }

    /// Says whether a link drains the sidefile; while none does, a full sidefile suspends at once.
    pub fn set_link_up(&self, up: bool) {
        self.link_up.store(up, Ordering::Relaxed);
        self.room.notify_all();
    }

    /// Whether a link drains the sidefile, as far as it was told.
    pub fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }

    /// The share of the sidefile that is in use: of its bytes, or of its slots. Above three quarters writers are paced.
    pub fn fullness(&self) -> f64 {
        self.fill_of(&lock(&self.ring))
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
        lock(&self.publish).clock.tick(self.time.read())
    }

    /// The last sequence number of each volume.
    pub fn last_seqs(&self) -> Vec<Seq> {
        lock(&self.publish).last_seq.clone()
    }

    /// Allows timestamps up to `limit`, after the mark was made durable.
    pub fn raise_limit(&self, limit: Timestamp) {
        lock(&self.publish).clock.raise_limit(limit);
    }

    // ---- status changes ----

    /// Stops capturing: later updates are dropped and noted, published ones stay. Programs go on at full speed. A person
    /// has to act, also if it was suspended before for something that passes.
    pub fn suspend(&self) {
        let mut ring = lock(&self.ring);
        self.suspend_locked(&mut ring, None);
        if matches!(ring.mode, Mode::Suspended(_)) {
            ring.mode = Mode::Suspended(None);
        }
    }

    /// The same until what failed works again; an earlier reason stays.
    pub fn suspend_while(&self, overflow: Overflow) {
        self.suspend_locked(&mut lock(&self.ring), Some(overflow));
    }

    /// Notes that something in the site directory cannot be written, for status; `None`: it can again. It is tried again
    /// by whoever says so.
    pub fn set_trouble(&self, part: SitePart, why: Option<String>) {
        *lock(&self.troubles[part as usize]) = why;
    }

    /// What cannot be written in the site directory, if something cannot.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.troubles.iter().find_map(|trouble| lock(trouble).clone())
    }

    /// How far time can go on before the durable mark holds it back, in nanoseconds.
    #[must_use]
    pub fn stamps_ahead_ns(&self) -> u64 {
        lock(&self.publish).clock.ahead_ns()
    }

    fn suspend_locked(&self, ring: &mut Ring, overflow: Option<Overflow>) {
        self.suspend_as_of(ring, overflow, None);
    }

    /// Suspends. Nothing was dropped up to `since`: by default, up to now.
    fn suspend_as_of(&self, ring: &mut Ring, overflow: Option<Overflow>, since: Option<Timestamp>) {
        if ring.mode == Mode::Active {
            ring.mode = Mode::Suspended(overflow);
            self.map.words()[W_DROPPED].store(1, Ordering::Release);
            // Operations under way publish nothing either: what they would publish follows updates already dropped.
            let mut publish = lock(&self.publish);
            publish.closed = Some(since.unwrap_or(publish.clock.last()));
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
        let mut ring = lock(&self.ring);
        (ring.held, ring.passes) = (false, None);
        drop(ring);
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

#[cfg(test)]
mod tests;
