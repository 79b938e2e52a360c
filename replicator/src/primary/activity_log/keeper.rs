//! When eras end, and when they may go; and how the log begins anew after a failure.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use twinfs_core::limits;
use twinfs_core::stamp::Timestamp;

use super::{ActivityError, ActivityLog, EraId, lock};

/// What a [`Keeper`] asks and has done.
pub struct KeeperParts {
    /// The log.
    pub log: Arc<ActivityLog>,
    /// Makes everything durable that was written to the backing trees before the call (`syncfs(2)` of each).
    pub sync_backing: Box<dyn Fn() -> io::Result<()> + Send>,
    /// The instant up to which the replica has everything for good. It may go back when it is not known for a while.
    pub applied: Box<dyn Fn() -> Timestamp + Send>,
    /// The session's clock: later than every stamp given before the call.
    pub now: Box<dyn Fn() -> Timestamp + Send>,
}

impl std::fmt::Debug for KeeperParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeeperParts").field("log", &self.log).finish_non_exhaustive()
    }
}

/// Ends eras of an activity log when they are old enough, and has them go when both sites have what they name: the
/// replica has everything up to their end, and the backing trees were synced after it.
///
/// The replica is asked first: while it is away, no tree is synced for nothing.
#[derive(Debug)]
pub struct Keeper {
    parts: KeeperParts,
    /// A sync of the backing trees failed. The kernel tells that once and forgets it, so no later sync proves anything.
    sync_failed: bool,
    /// The last era that ended before a sync of the backing trees began.
    synced: Option<EraId>,
}

impl Keeper {
    /// Takes up the work, but does none yet.
    #[must_use]
    pub const fn new(parts: KeeperParts) -> Self {
        Self { parts, sync_failed: false, synced: None }
    }

    /// Does what is due, and has a log that failed begin anew if the disk takes that. To be called again after a fraction of
    /// [`ACTIVITY_ERA_NS`](twinfs_core::limits::ACTIVITY_ERA_NS). Returns the last era that went.
    ///
    /// # Errors
    /// [`ActivityError`]: the log has failed, or still fails.
    pub fn step(&mut self) -> Result<Option<EraId>, ActivityError> {
        let KeeperParts { log, sync_backing, applied, now } = &self.parts;
        if log.failure().is_some() {
            log.recover(now)?;
        }
        if log.is_era_due(now()) {
            log.end_era(now)?;
        }
        if self.sync_failed {
            return Ok(None);
        }
        let Some(through) = log.ended_by(applied()) else { return Ok(None) };
        if self.synced < Some(through) {
            // All eras that ended by now are covered.
            let ended = log.ended_by(Timestamp(u64::MAX));
            if let Err(error) = sync_backing() {
                self.sync_failed = true;
                tracing::error!(
                    %error,
                    "the backing directory could not be synced: the activity log is kept whole until the next mount"
                );
                return Ok(None);
            }
            self.synced = ended;
        }
        log.release(through)?;
        Ok(Some(through))
    }

    /// Does it on a thread of its own, until what is returned is dropped.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn start(mut self) -> io::Result<KeeperThread> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let stopping = Arc::clone(&stop);
        let period = (self.parts.log.era_period() / 4).min(Duration::from_nanos(limits::SITE_AGAIN_NS));
        let thread = std::thread::Builder::new().name("activity-eras".into()).spawn(move || {
            let (stopped, wake) = &*stopping;
            while !*lock(stopped) {
                // The log has said so itself, once.
                let _ = self.step();
                let guard = lock(stopped);
                if !*guard {
                    drop(wake.wait_timeout(guard, period).unwrap_or_else(PoisonError::into_inner));
                }
            }
        })?;
        Ok(KeeperThread { stop, thread: Some(thread) })
    }
}

/// A [`Keeper`] at work. It ends when this is dropped.
#[derive(Debug)]
pub struct KeeperThread {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for KeeperThread {
    fn drop(&mut self) {
        *lock(&self.stop.0) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the activity log's eras panicked");
        }
    }
}
