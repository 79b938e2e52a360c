//! The activity log: the primary's durable list of the files that were touched since the last point that both sites
//! have for good.
//!
//! The sidefile does not outlive a power loss, and no file system tells afterwards what it lost. So every file in this
//! log is compared then, in both directions; and nothing else needs to be. That holds because an entry is durable
//!
//! * before an fsync, or a synchronous or direct write, of its file returns ([`ActivityLog::flush_file`]): what a
//!   program was told is safe may be on the primary's disk and not at the replica;
//! * before a record set with an update of the file is shipped ([`ActivityLog::wait_durable`]): what the replica
//!   has, the primary may have rolled back;
//! * and otherwise within 100 ms: what the kernel wrote back in that time is not known to differ.
//!
//! # Eras
//!
//! The log is a row of *eras*, each a set of files in a file of its own. An era ends when it is
//! [`ACTIVITY_ERA_NS`](twinfs_core::limits::ACTIVITY_ERA_NS) old, at an instant at which nobody is between touching
//! a file and having the update stamped ([`Touched`]): so all updates that it stands for are stamped before its end.
//! It goes once the replica has everything up to its end, and the backing trees were synced after it ([`Keeper`]).
//! Files touched in two eras stand in both. While no era may go, at most
//! [`ACTIVITY_ERAS_MAX`](twinfs_core::limits::ACTIVITY_ERAS_MAX) are kept, and the last one goes on.
//!
//! What is found at the start of a run is gathered into one era of its own. It goes only after the owner
//! said that it was dealt with ([`ActivityLog::settle_found`]).
//!
//! # Bytes
//!
//! Files `00000001.era`, `00000002.era`, …; integers are little-endian; everything not named here is zero.
//!
//! ```text
//! offset  bytes  meaning
//!                HEADER, alone in the first 4096 bytes
//!      0      8  magic "TWINACT\0"
//!      8      4  version, 1
//!     12      4  zero
//!     16     16  session
//!     32      8  number of the era
//!     40      8  no update that it stands for is older, ns
//!     48     16  salt: random
//!     64     32  BLAKE3 over the 64 bytes before, in every version
//!                BATCHES, each at a multiple of 4096: sectors of 512 bytes one after the other
//!      0     16  checksum of the 496 bytes after: BLAKE3, cut, keyed by the BLAKE3 of the header (96 bytes)
//!     16      8  number of the batch: 1, 2, 3, …
//!     24      4  place of this sector in the file, counted in sectors
//!     28      1  number of entries, 0 to 20
//!     29      1  flags: 1 last sector of its batch, 2 the era stands for everything
//!     30      2  zero
//!     32     24  an entry: volume index (2), zero (2), file (20)      and so on
//! ```
//!
//! # What a crash leaves
//!
//! * A batch is what one sync made durable; the next one is written only after that. It starts with a block of its
//!   own, so that no later write touches what is durable.
//! * Each sector is zeros, so it was never written, or passes its checksum. Anything else is damage, and after damage
//!   everything has to be compared. So neither rot nor a disk that tears sectors ever hides an entry.
//! * Of the last batch any sectors may be missing: a crash came before its sync returned, and nobody was answered.
//!   If one is missing in an earlier batch, that is damage.
//! * A file of the log is made under another name, `….new`, and gets its own once its header is durable. So `….new`
//!   files are remains, and a `….era` file without a whole header is damage.
//!
//! # When it cannot be written
//!
//! A failed write or sync is final for its era: nobody knows which entries are on the medium, and what is touched from then
//! on is in no file of the log. So at once, and before an fsync that comes later returns, the file `incomplete.spare` is
//! renamed to `incomplete`: with that there, everything has to be compared. (The spare stands ready because a full disk
//! takes no new file, but takes a new name for one. A disk that takes neither leaves what stands in docs/guarantees.md.)
//!
//! Programs go on. Their updates are not captured any more, but noted in the change maps; what was captured before stays in
//! the sidefile, and what of it was not yet named in the log is not shipped. The [`Keeper`] tries to begin anew
//! ([`ActivityLog::recover`]), and when the disk takes it,
//!
//! 1. a new era that stands for **everything** becomes durable, in place of all eras before it. From here on the log alone
//!    says enough again, for all that was touched before, meanwhile, and as long as this era lasts;
//! 2. the mark goes, and files are named again; what waited in the sidefile is shipped;
//! 3. the session resyncs **what the change maps name**. Nothing else: each update since the failure is either in the
//!    sidefile, because it was stamped before capture stopped, or in a map.
//!
//! A kill before 3. has lost the maps, and a power loss the sidefile, too. The log then says everything, because the era of 1.
//! goes like any other: ended, and at the replica in a session in DUPLEX, which comes after 3.

mod config;
mod error;
mod format;
mod found;
mod keeper;
mod named;
mod set;
mod writer;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use twinfs_core::id::{FileId, SessionId, VolumeIndex};
use twinfs_core::stamp::Timestamp;

pub use config::ActivityConfig;
pub use error::ActivityError;
pub use format::{ACTIVITY_MAGIC, ACTIVITY_VERSION};
pub use found::Found;
pub use keeper::{Keeper, KeeperParts, KeeperThread};
pub use named::Named;

use crate::storage::{Storage, StorageError};
use set::{Batch, EraSet, Line};
use writer::{EraWriter, era_name, new_era_name};

/// How long the log waits before it tries again to leave the mark of a failure.
const MARK_AGAIN: Duration = Duration::from_secs(1);

/// The number of an era: 1, 2, 3, …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EraId(u64);

impl EraId {
    const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for EraId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "era {}", self.0)
    }
}

/// A place in the row of all entries: those touched before it was taken have lower ones or the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Mark(u64);

/// A running activity log. All methods may be called from several threads.
#[derive(Debug)]
pub struct ActivityLog {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

/// Keeps the era from ending. To be held from the touch until the update has its stamp, and no longer: an update
/// stamped after the end of the only era that names its file would be forgotten with that era.
#[derive(Debug)]
#[must_use = "hold it until the update has its stamp"]
pub struct Touched<'a> {
    _era: RwLockReadGuard<'a, EraSet>,
}

/// Lock order: `eras`, `writer`, `current`, a shard of it, `line`. Only the first two are held over I/O.
#[derive(Debug)]
struct Inner {
    storage: Arc<dyn Storage>,
    session: SessionId,
    config: ActivityConfig,
    eras: Mutex<Eras>,
    writer: Mutex<EraWriter>,
    current: RwLock<EraSet>,
    line: Mutex<Line>,
    /// Something is in line, or the thread shall end.
    wake: Condvar,
    /// Every entry with a mark up to this one is durable.
    durable: AtomicU64,
    has_failed: AtomicBool,
    failure: Mutex<Option<ActivityError>>,
    /// The mark of a failure is on the disk. Held over I/O; no other lock is taken under it.
    is_marked: Mutex<bool>,
}

#[derive(Debug)]
struct Eras {
    /// From the oldest on.
    ended: Vec<Ended>,
    /// When the current era began.
    started: Timestamp,
    /// The last number that was given to a file, made or not.
    last: EraId,
}

#[derive(Debug)]
struct Ended {
    era: EraId,
    /// No update that it stands for is older.
    start: Timestamp,
    /// All updates that it stands for are stamped before; `None` if the owner has to say so first.
    end: Option<Timestamp>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its state valid at each step; a panic elsewhere must not stop the log.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn share<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn own<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl ActivityLog {
    /// Opens the log in a directory of its own, and tells what the runs before left in it. `now` is the session's
    /// clock.
    ///
    /// # Errors
    /// [`ActivityError`]. Damaged files are no error: see [`Found::everything`].
    pub fn open(
        storage: Arc<dyn Storage>,
        session: SessionId,
        now: Timestamp,
        config: ActivityConfig,
    ) -> Result<(Self, Found), ActivityError> {
        let gathered = found::gather(&storage, session, now, &config)?;
        let mut last = gathered.last.next();
        let none = Batch::default();
        let create = |era, start, first: &Batch| {
            EraWriter::create(Arc::clone(&storage), session, era, start, first, config.file_bytes_max)
        };
        found::make_spare(&*storage)?;
        let mut ended = Vec::new();
        let found = gathered.found;
        if found.everything || !found.files.is_empty() {
            let all = Batch { entries: found.files.clone(), everything: found.everything };
            create(last, found.since, &all)?;
            ended.push(Ended { era: last, start: found.since, end: None });
            last = last.next();
        }
        let writer = create(last, now, &none)?;
        // Only now that it stands in the new files.
        gathered.names.iter().try_for_each(|name| storage.remove(name))?;
        if !gathered.names.is_empty() {
            storage.sync_dir()?;
        }
        let first = Mark(1);
        let inner = Arc::new(Inner {
            storage,
            session,
            config,
            eras: Mutex::new(Eras { ended, started: now, last }),
            writer: Mutex::new(writer),
            current: RwLock::new(EraSet::new(first)),
            line: Mutex::new(Line { queued: first, ..Line::default() }),
            wake: Condvar::new(),
            durable: AtomicU64::new(first.0),
            has_failed: AtomicBool::new(false),
            failure: Mutex::default(),
            is_marked: Mutex::new(false),
        });
        let mut thread = None;
        if let Some(gather_ns) = config.flush_ns {
            let inner = Arc::clone(&inner);
            let gather = Duration::from_nanos(gather_ns);
            let builder = std::thread::Builder::new().name("activity-log".into());
            let started = builder.spawn(move || inner.keep_flushing(gather));
            thread = Some(started.map_err(|error| no_thread(&error))?);
        }
        Ok((Self { inner, thread }, found))
    }

    /// Names files that an update changes, and puts them in line to be written. Never waits for a disk. To be called
    /// after the backing call and before the update is stamped, under the locks of the files.
    ///
    /// # Errors
    /// [`ActivityError`] if the log has failed: the session cannot go on, programs can.
    pub fn touch(
        &self,
        volume: VolumeIndex,
        files: impl Iterator<Item = FileId> + Clone,
    ) -> Result<Touched<'_>, ActivityError> {
        self.inner.check()?;
        let era = share(&self.inner.current);
        let (mut need, mut is_first) = (Mark::default(), false);
        for file in files.clone() {
            let entered = era.enter((volume, file), &self.inner.line, self.inner.config.files_max);
            need = need.max(entered.mark);
            is_first |= entered.is_first;
        }
        if self.inner.durable() < need {
            // A file system makes a name durable together with its file: all files of an operation count as one.
            files.for_each(|file| era.raise(&(volume, file), need));
        }
        if is_first {
            self.inner.wake.notify_one();
        }
        Ok(Touched { _era: era })
    }

    /// Makes everything durable that was touched before the call. Callers at the same time share one sync.
    ///
    /// # Errors
    /// [`ActivityError`]
    pub fn flush(&self) -> Result<(), ActivityError> {
        self.inner.flush_to(self.mark())
    }

    /// Whether a file's entry is durable already, and so [`Self::flush_file`] will not wait.
    #[must_use]
    pub fn is_durable(&self, volume: VolumeIndex, file: FileId) -> bool {
        self.inner.need(volume, file) <= self.inner.durable()
    }

    /// Makes the entry of a file durable, and those of the files that were changed together with it. Costs nothing if
    /// they are durable already.
    ///
    /// # Errors
    /// [`ActivityError`]: the log has failed. Then that is durable, if the disk takes it: what becomes durable from here on
    /// is found after a power loss all the same.
    pub fn flush_file(&self, volume: VolumeIndex, file: FileId) -> Result<(), ActivityError> {
        let flushed = self.inner.check().and_then(|()| self.inner.flush_to(self.inner.need(volume, file)));
        flushed.inspect_err(|_| self.inner.leave_mark())
    }

    /// Where the row of entries ends: everything touched before this call lies before.
    #[must_use]
    pub fn mark(&self) -> Mark {
        lock(&self.inner.line).queued
    }

    /// Up to where all entries are durable.
    #[must_use]
    pub fn durable_mark(&self) -> Mark {
        self.inner.durable()
    }

    /// Makes everything up to a mark durable.
    ///
    /// # Errors
    /// [`ActivityError`]
    pub fn wait_durable(&self, mark: Mark) -> Result<(), ActivityError> {
        self.inner.flush_to(mark)
    }

    /// Why the log failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<ActivityError> {
        self.inner.check().err()
    }

    /// Whether it is time for [`Self::end_era`]: the current era is old enough and names something, and there is room
    /// for another one.
    #[must_use]
    pub fn is_era_due(&self, now: Timestamp) -> bool {
        let eras = lock(&self.inner.eras);
        let is_used = || {
            let is_everything = share(&self.inner.current).everything().is_some();
            is_everything || lock(&self.inner.line).named > 0
        };
        eras.ended.len() + 1 < self.inner.config.eras_max
            && now.ns_since(eras.started) >= self.inner.config.era_ns
            && is_used()
    }

    /// How often to look whether an era is due.
    #[must_use]
    pub fn era_period(&self) -> Duration {
        Duration::from_nanos(self.inner.config.era_ns)
    }

    /// Ends the current era and begins the next one. `now` must answer later than every stamp given before.
    ///
    /// # Errors
    /// [`ActivityError`]
    pub fn end_era(&self, now: &dyn Fn() -> Timestamp) -> Result<EraId, ActivityError> {
        self.inner.check()?;
        self.inner.end_era(now).map_err(|error| self.inner.fail(error))
    }

    /// The last era that ended by then, like all before it, and was not released.
    #[must_use]
    pub fn ended_by(&self, time: Timestamp) -> Option<EraId> {
        let eras = lock(&self.inner.eras);
        let old = eras.ended.iter().take_while(|ended| ended.end.is_some_and(|end| end <= time));
        old.last().map(|ended| ended.era)
    }

    /// Says that what was found at the start is dealt with once the replica has everything up to `end`: after a power
    /// loss, the stamp at which the comparison was complete. Until then nothing of the log goes.
    pub fn settle_found(&self, end: Timestamp) {
        if let Some(found) = lock(&self.inner.eras).ended.first_mut() {
            found.end.get_or_insert(end);
        }
    }

    /// Removes the eras up to one, durably. Only right if both sites have what they stand for: see [`Keeper`].
    ///
    /// # Errors
    /// [`ActivityError`]
    pub fn release(&self, through: EraId) -> Result<(), ActivityError> {
        self.inner.check()?;
        self.inner.release(through).map_err(|error| self.inner.fail(error))
    }

    /// Begins anew after a failure, with an era that stands for everything. The session then needs a resync.
    ///
    /// # Errors
    /// [`ActivityError`]: the disk still takes nothing.
    pub fn recover(&self, now: &dyn Fn() -> Timestamp) -> Result<(), ActivityError> {
        match self.inner.check() {
            Ok(()) => Ok(()),
            Err(_) => Ok(self.inner.recover(now)?),
        }
    }
}

impl Drop for ActivityLog {
    fn drop(&mut self) {
        lock(&self.inner.line).stop = true;
        self.inner.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the activity log panicked");
        }
    }
}

fn no_thread(error: &std::io::Error) -> StorageError {
    let errno = rustix::io::Errno::from_io_error(error).unwrap_or(rustix::io::Errno::AGAIN);
    StorageError::Io { operation: crate::storage::Operation::OpenDir, name: "activity".into(), errno }
}

impl Inner {
    fn durable(&self) -> Mark {
        Mark(self.durable.load(Ordering::Acquire))
    }

    fn check(&self) -> Result<(), ActivityError> {
        if self.has_failed.load(Ordering::Acquire)
            && let Some(error) = lock(&self.failure).clone()
        {
            return Err(error);
        }
        Ok(())
    }

    /// What must be durable before a file counts as logged. A file that the current era does not name may stand in the
    /// era before, whose last entries are being written.
    fn need(&self, volume: VolumeIndex, file: FileId) -> Mark {
        let era = share(&self.current);
        era.need(&(volume, file)).unwrap_or(era.before())
    }

    fn flush_to(&self, mark: Mark) -> Result<(), ActivityError> {
        if self.durable() >= mark {
            return Ok(());
        }
        // Whoever waits here finds all done, or does it for all who wait.
        let mut writer = lock(&self.writer);
        if self.durable() >= mark {
            return Ok(());
        }
        self.check()?;
        let (batch, upto) = self.take_line();
        self.write(&mut writer, batch, upto).map_err(|error| self.fail(error))
    }

    fn take_line(&self) -> (Batch, Mark) {
        let mut line = lock(&self.line);
        (std::mem::take(&mut line.batch), line.queued)
    }

    fn write(&self, writer: &mut EraWriter, mut batch: Batch, upto: Mark) -> Result<(), StorageError> {
        if !batch.is_empty() {
            if writer.is_full_for(&batch) {
                // Whatever has a mark up to `upto` is in the set: it was put in line under the lock of its shard.
                let era = share(&self.current);
                batch = Batch { entries: era.all(), everything: era.everything().is_some() };
                drop(era);
                writer.pack(&batch)?;
            } else {
                writer.append(&batch)?;
            }
        }
        // Durable first, then said so.
        self.durable.store(upto.0, Ordering::Release);
        Ok(())
    }

    fn end_era(&self, now: &dyn Fn() -> Timestamp) -> Result<EraId, StorageError> {
        let mut eras = lock(&self.eras);
        let start = now();
        eras.last = eras.last.next();
        let fresh = self.make_writer(eras.last, start, &Batch::default())?;
        let mut writer = lock(&self.writer);
        let (batch, upto, end) = self.switch(now);
        let mut old = std::mem::replace(&mut *writer, fresh);
        let era = old.era();
        eras.ended.push(Ended { era, start: old.start(), end: Some(end) });
        eras.started = start;
        // What was in line belongs to the old era. Its set is gone, so its file is not packed any more; it may grow
        // past its bound by this once.
        if !batch.is_empty() {
            old.append(&batch)?;
        }
        self.durable.store(upto.0, Ordering::Release);
        Ok(era)
    }

    /// Puts a new set in place while nobody is between touch and stamp. Returns what was in line, and the instant.
    fn switch(&self, now: &dyn Fn() -> Timestamp) -> (Batch, Mark, Timestamp) {
        let mut current = own(&self.current);
        let (batch, upto) = self.take_line();
        lock(&self.line).named = 0;
        let old = std::mem::replace(&mut *current, EraSet::new(upto));
        let end = now();
        drop(current);
        // A large set takes a while to free; nobody waits for it here.
        drop(old);
        (batch, upto, end)
    }

    fn make_writer(&self, era: EraId, start: Timestamp, first: &Batch) -> Result<EraWriter, StorageError> {
        let storage = Arc::clone(&self.storage);
        let made = EraWriter::create(storage, self.session, era, start, first, self.config.file_bytes_max);
        made.inspect_err(|_| {
            // Or it stays until the next start.
            let _ = self.storage.remove(&new_era_name(era));
        })
    }

    fn release(&self, through: EraId) -> Result<(), StorageError> {
        let mut eras = lock(&self.eras);
        let count = eras.ended.iter().take_while(|ended| ended.era <= through).count();
        for ended in eras.ended.drain(..count) {
            self.storage.remove(&era_name(ended.era))?;
        }
        if count > 0 { self.storage.sync_dir() } else { Ok(()) }
    }

    fn recover(&self, now: &dyn Fn() -> Timestamp) -> Result<(), StorageError> {
        let mut eras = lock(&self.eras);
        let mut writer = lock(&self.writer);
        let start =
            eras.ended.iter().map(|ended| ended.start).chain([writer.start()]).min().unwrap_or_default();
        eras.last = eras.last.next();
        let everything = Batch { entries: Vec::new(), everything: true };
        let fresh = self.make_writer(eras.last, start, &everything)?;
        let (_, upto, end) = self.switch(now);
        share(&self.current).start_with_everything(upto);
        let old = std::mem::replace(&mut *writer, fresh);
        eras.ended.push(Ended { era: old.era(), start: old.start(), end: Some(end) });
        eras.started = end;
        self.durable.store(upto.0, Ordering::Release);
        *lock(&self.failure) = None;
        self.has_failed.store(false, Ordering::Release);
        // The new era stands for them, too: a log that fails again and again does not grow. One that cannot be removed is
        // tried again the next time.
        eras.ended.retain(|ended| ended.end.is_none() || self.storage.remove(&era_name(ended.era)).is_err());
        // The new era says it now. If the mark stays, the next start compares too much, that is all.
        let mut is_marked = lock(&self.is_marked);
        if std::mem::take(&mut *is_marked) {
            drop(self.storage.rename(found::INCOMPLETE, found::SPARE).and_then(|()| self.storage.sync_dir()));
        }
        drop(is_marked);
        tracing::warn!("the activity log goes on: after a power loss, everything would be compared");
        Ok(())
    }

    // ---- failure ----

    fn fail(&self, error: impl Into<ActivityError>) -> ActivityError {
        let error = error.into();
        let mut failure = lock(&self.failure);
        if let Some(first) = &*failure {
            return first.clone();
        }
        tracing::error!(%error, "the activity log cannot be written: what is touched from now on is not in it");
        *failure = Some(error.clone());
        self.has_failed.store(true, Ordering::Release);
        drop(failure);
        self.leave_mark();
        error
    }

    /// Leaves word on the disk that the log is not complete. Whoever calls this meanwhile waits for it.
    fn leave_mark(&self) {
        let mut is_marked = lock(&self.is_marked);
        if *is_marked || !self.has_failed.load(Ordering::Acquire) {
            return;
        }
        match found::mark_incomplete(&*self.storage) {
            Ok(()) => *is_marked = true,
            Err(error) => tracing::debug!(%error, "cannot mark the activity log as incomplete yet"),
        }
    }

    // ---- the thread ----

    fn keep_flushing(&self, gather: Duration) {
        let mut line = lock(&self.line);
        while !line.stop {
            if self.has_failed.load(Ordering::Acquire) {
                drop(line);
                self.leave_mark();
                line = lock(&self.line);
                let stop = |line: &mut Line| !line.stop;
                line = wait(&self.wake, line, MARK_AGAIN, stop);
            } else if line.batch.is_empty() {
                line = self.wake.wait(line).unwrap_or_else(PoisonError::into_inner);
            } else {
                line = wait(&self.wake, line, gather, |line| !line.stop);
                let upto = line.queued;
                drop(line);
                // The failure is remembered, and was logged.
                let _ = self.flush_to(upto);
                line = lock(&self.line);
            }
        }
        let upto = line.queued;
        drop(line);
        let _ = self.flush_to(upto);
    }
}

/// Waits as long as `goes_on` holds, at most `timeout`.
fn wait<'a, T>(
    wake: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
    goes_on: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    wake.wait_timeout_while(guard, timeout, goes_on).unwrap_or_else(PoisonError::into_inner).0
}
