//! What a primary keeps from run to run: the sets that were made and not acknowledged, and the mark that timestamps
//! stay below.

use std::path::Path;
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
use super::sidefile::{Capture, Overflow, SitePart};
use crate::site::{SiteDir, SiteError, replace_durably};

/// Why the sets of the last run cannot be sent again.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The site directory cannot be used.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The file ends too early, or rotted.
    #[error("the file of unacknowledged record sets {0} is damaged: its checksum is wrong")]
    Checksum(std::path::PathBuf),
    /// The file does not hold record sets.
    #[error("the file of unacknowledged record sets {0} is damaged: {1}")]
    Damaged(std::path::PathBuf, BadSet),
}

/// Keeps sets over a clean stop: their bytes one after the other, for they say themselves where they end; then BLAKE3 over
/// all of it, or a file that was cut between two of them would be taken for one of fewer.
///
/// # Errors
/// [`StoreError::Site`]
pub fn save_sets<'a>(
    site: &SiteDir,
    sets: impl Iterator<Item = &'a IssuedSet<Bytes>>,
) -> Result<(), StoreError> {
    let mut bytes = Vec::new();
    sets.for_each(|set| bytes.extend_from_slice(&set.handle));
    bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
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
    decode_sets(bytes, &path)
}

/// The sets in the file's bytes.
fn decode_sets(bytes: Bytes, path: &Path) -> Result<Vec<(VolumeName, IssuedSet<Bytes>)>, StoreError> {
    let damaged = |error| StoreError::Damaged(path.to_owned(), error);
    let (body, hash) = bytes
        .split_last_chunk::<{ blake3::OUT_LEN }>()
        .ok_or_else(|| StoreError::Checksum(path.to_owned()))?;
    if blake3::hash(body) != *hash {
        return Err(StoreError::Checksum(path.to_owned()));
    }
    let mut rest = bytes.slice(..body.len());
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

/// The mark to make durable at the instant `now` of the session's clock: timestamps stay below it until the next one. Never
/// before real time, so that a session clock that was held back by its mark catches up.
#[must_use]
pub fn mark_after(now: Timestamp, clocks: Reading) -> Timestamp {
    Timestamp(now.0.max(clocks.real) + limits::STAMP_RESERVE_NS)
}

/// Raises the durable mark that timestamps stay below, ahead of their use, on a thread of its own: no write waits for it.
///
/// If it cannot be raised, that is said, and tried again. Before it is reached the session is suspended: no update is
/// stamped any more, and programs go on. If the write does not even come back, the sidefile finds the mark reached and does
/// the same.
#[derive(Debug)]
pub struct MarkKeeper {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl MarkKeeper {
    /// Starts to keep the mark ahead of `capture`'s clock.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(site: SiteDir, capture: Arc<Capture>) -> std::io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("stamp-mark".into()).spawn(move || {
            let (stopped, wake) = &*stopping;
            let mut stopped = stopped.lock().unwrap_or_else(PoisonError::into_inner);
            while !*stopped {
                let pause = Duration::from_nanos(raise_mark(&capture, |mark| site.save_stamp_mark(mark)));
                stopped = wake.wait_timeout(stopped, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// Raises the mark once, by `save`, or suspends the session if it is near. Returns after how many nanoseconds it has to be
/// raised again.
fn raise_mark(capture: &Capture, save: impl FnOnce(Timestamp) -> Result<(), SiteError>) -> u64 {
    let mark = mark_after(capture.now(), Reading::now());
    match save(mark) {
        Ok(()) => {
            capture.raise_limit(mark);
            capture.set_trouble(SitePart::StampMark, None);
            limits::STAMP_RESERVE_NS / 4
        }
        Err(error) => {
            if capture.trouble().is_none() {
                tracing::error!(%error, "the mark that timestamps stay below cannot be raised");
            }
            let until = if error.is_no_space() { "there is room" } else { "it can be written" };
            let why = format!("{error}; mirroring goes on when {until}");
            capture.set_trouble(SitePart::StampMark, Some(why));
            if capture.stamps_ahead_ns() < limits::STAMP_RESERVE_NS / 2 {
                capture.suspend_while(Overflow::Site);
            }
            limits::SITE_AGAIN_NS
        }
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

#[cfg(test)]
mod tests {
    use twinfs_core::format::{Builder, SetPlace};
    use twinfs_core::id::{Epoch, Incarnation, SessionId, SetHash, SetNumber, SiteId, VolumeInstance};
    use twinfs_core::stamp::Seq;
    use twinfs_core::update::{AttrList, sample_file};

    use super::*;
    use crate::primary::sidefile::{self, Start, StartVolume};

    fn issued(number: u64) -> IssuedSet<Bytes> {
        let stamp = Stamp { time: Timestamp(number), seq: Seq(number) };
        let op: Op = Op::Unlink { dir: sample_file(1), name: (*b"name").into(), file: sample_file(2) };
        let mut builder = Builder::new();
        builder.push_update(&Update { stamp, op, attrs: AttrList::new() }, &[]).unwrap();
        let place = SetPlace {
            session: SessionId::from_bytes([3; 16]),
            volume: VolumeName::new("data").unwrap(),
            instance: VolumeInstance::new(9).unwrap(),
            root: sample_file(1),
            epoch: Epoch { number: 1, site: SiteId::from_bytes([1; 16]) },
            incarnation: Incarnation(7),
            number: SetNumber(number),
            predecessor: if number == 1 { SetHash::NONE } else { SetHash([9; 32]) },
            first_seq: stamp.seq,
            start: Timestamp(number - 1),
            end: stamp.time,
        };
        let set = builder.finish(place, 0).unwrap();
        let bytes = set.bytes.len() as u64;
        let (number, handle) = (SetNumber(number), set.bytes);
        IssuedSet {
            number,
            hash: set.hash,
            first: stamp,
            last: stamp,
            end: stamp.time,
            bytes,
            complete: None,
            handle,
        }
    }

    #[test]
    fn sets_that_were_kept_come_back_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteDir::new(dir.path());
        assert_eq!(load_sets(&site).unwrap().len(), 0, "there is no file");
        save_sets(&site, std::iter::empty()).unwrap();
        assert_eq!(load_sets(&site).unwrap().len(), 0);
        save_sets(&site, [issued(1), issued(2)].iter()).unwrap();
        let found = load_sets(&site).unwrap();
        let places: Vec<_> =
            found.iter().map(|(name, set)| (name.as_str(), set.number.0, set.last.seq.0)).collect();
        assert_eq!(places, [("data", 1, 1), ("data", 2, 2)]);

        let good = std::fs::read(site.unacknowledged()).unwrap();
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 1 << (at % 8);
            let refused = |bytes: Vec<u8>| {
                matches!(decode_sets(bytes.into(), dir.path()), Err(StoreError::Checksum(_)))
            };
            assert!(refused(damaged), "byte {at}");
            assert!(refused(good[..at].to_vec()), "cut at {at}");
        }
    }

    /// The session is suspended before the mark is reached, and goes on being told what is wrong until it can be raised.
    #[test]
    fn a_mark_that_cannot_be_raised_suspends_before_it_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp(Reading::now().real);
        let start = |limit| Start {
            session: SessionId::from_bytes([3; 16]),
            volumes: &[StartVolume::NEW],
            floor: now,
            limit,
        };
        let full = |_| {
            let source = std::io::ErrorKind::StorageFull.into();
            Err(SiteError::Io { action: "write", path: "stamp-mark".into(), source })
        };
        let far = Capture::create(
            &dir.path().join("far"),
            sidefile::bytes_min(),
            &start(mark_after(now, Reading::now())),
        )
        .unwrap();
        assert_eq!(raise_mark(&far, full), limits::SITE_AGAIN_NS);
        assert!(!far.fill().suspended, "there is time to try again");
        assert!(
            far.trouble().is_some_and(|why| why.contains("stamp-mark") && why.contains("when there is room"))
        );
        assert_eq!(raise_mark(&far, |_| Ok(())), limits::STAMP_RESERVE_NS / 4);
        assert_eq!(far.trouble(), None);

        let near = Timestamp(now.0 + limits::STAMP_RESERVE_NS / 2);
        let near = Capture::create(&dir.path().join("near"), sidefile::bytes_min(), &start(near)).unwrap();
        raise_mark(&near, full);
        assert_eq!(near.fill().overflow, Some(Overflow::Site));
        assert!(near.stamps_ahead_ns() > 0, "it is not reached");
    }
}
