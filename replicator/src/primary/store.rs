//! What a primary keeps from run to run: the sets that were made and not acknowledged, and the mark that timestamps
//! stay below.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use twinfs_core::format::{BadSet, SetPrefix, UnverifiedSet};
use twinfs_core::id::VolumeName;
use twinfs_core::limits;
use twinfs_core::session::sender::IssuedSet;
use twinfs_core::stamp::{Stamp, Timestamp};
use twinfs_core::update::{Op, Update};

use super::clock::Reading;
use super::sidefile::Capture;
use crate::site::{SiteDir, SiteError, replace_durably};

/// Why the sets of the last run cannot be sent again.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The site directory cannot be used.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The file does not hold record sets.
    #[error("the file of unacknowledged record sets {0} is damaged: {1}")]
    Damaged(std::path::PathBuf, BadSet),
}

/// Keeps sets over a clean stop: their bytes one after the other, for they say themselves where they end.
///
/// # Errors
/// [`StoreError::Site`]
pub fn save_sets<'a>(
    site: &SiteDir,
    sets: impl Iterator<Item = &'a IssuedSet<Bytes>>,
) -> Result<(), StoreError> {
    let mut bytes = Vec::new();
    sets.for_each(|set| bytes.extend_from_slice(&set.handle));
    Ok(replace_durably(&site.unacknowledged(), &bytes)?)
}

/// Reads the sets back that [`save_sets`] kept, each with the name of its volume.
///
/// # Errors
/// [`StoreError`]
pub fn load_sets(site: &SiteDir) -> Result<Vec<(VolumeName, IssuedSet<Bytes>)>, StoreError> {
    let path = site.unacknowledged();
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => Bytes::from(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(SiteError::Io { action: "read", path, source }.into()),
    };
    let damaged = |error| StoreError::Damaged(path.clone(), error);
    let mut rest = bytes;
    let mut sets = Vec::new();
    while !rest.is_empty() {
        let len = SetPrefix::parse(&rest).map_err(damaged)?.encoded_len();
        if len > rest.len() {
            return Err(damaged(BadSet::Length { have: rest.len(), want: len }));
        }
        let set = UnverifiedSet(rest.split_to(len)).verify().map_err(damaged)?;
        let meta = set.meta().map_err(damaged)?;
        let stamp = |at: Option<&(Update, u32)>| at.map(|(update, _)| update.stamp);
        let (Some(first), Some(last)) = (stamp(meta.updates.first()), stamp(meta.updates.last())) else {
            return Err(damaged(BadSet::Header("a null set is never kept")));
        };
        let complete: Option<Stamp> =
            meta.updates.iter().find(|(update, _)| update.op == Op::Complete).map(|(update, _)| update.stamp);
        let header = set.header();
        let issued = IssuedSet {
            number: header.number,
            hash: set.hash(),
            first,
            last,
            end: header.end,
            bytes: len as u64,
            complete,
            handle: set.bytes().clone(),
        };
        sets.push((header.volume.clone(), issued));
    }
    Ok(sets)
}

/// The mark to make durable at the instant `now`: timestamps stay below it until the next one. Never before real time,
/// so that a session clock that was held back by its mark catches up.
#[must_use]
pub fn mark_after(now: Timestamp) -> Timestamp {
    Timestamp(now.0.max(Reading::now().real) + limits::STAMP_RESERVE_NS)
}

/// Raises the durable mark that timestamps stay below, ahead of their use, on a thread of its own: no write waits for it.
#[derive(Debug)]
pub struct MarkKeeper {
    stop: Arc<(Mutex<bool>, Condvar)>,
    failed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MarkKeeper {
    /// Starts to keep the mark ahead of `capture`'s clock.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(site: SiteDir, capture: Arc<Capture>) -> std::io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let failed = Arc::new(AtomicBool::new(false));
        let (stopping, failing) = (Arc::clone(&stop), Arc::clone(&failed));
        let thread = std::thread::Builder::new().name("stamp-mark".into()).spawn(move || {
            let (stopped, wake) = &*stopping;
            let mut stopped = stopped.lock().unwrap_or_else(PoisonError::into_inner);
            let period = Duration::from_nanos(limits::STAMP_RESERVE_NS / 4);
            while !*stopped {
                let mark = mark_after(capture.now());
                match site.save_stamp_mark(mark) {
                    Ok(()) => {
                        capture.raise_limit(mark);
                        failing.store(false, Ordering::Relaxed);
                    }
                    Err(error) => {
                        if !failing.swap(true, Ordering::Relaxed) {
                            tracing::error!(%error, "timestamps stand still until the mark can be written");
                        }
                    }
                }
                stopped = wake.wait_timeout(stopped, period).unwrap_or_else(PoisonError::into_inner).0;
            }
        })?;
        Ok(Self { stop, failed, thread: Some(thread) })
    }

    /// Whether the mark cannot be written at present.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

impl Drop for MarkKeeper {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the stamp mark panicked");
        }
    }
}
