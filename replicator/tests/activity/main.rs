//! The activity log over real and simulated storage.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod crash;
mod damage;
mod eras;
mod threads;

use std::collections::BTreeSet;
use std::sync::Arc;

use twinfs_core::id::{FileId, SessionId, VolumeIndex};
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::sample_file;
use twinfs_replicator::primary::activity_log::{ActivityConfig, ActivityError, ActivityLog, Found};
use twinfs_replicator::storage::{SimStorage, Storage};

const SESSION: SessionId = SessionId::from_bytes(*b"a session's name");
const V: VolumeIndex = VolumeIndex(0);

type Name = (VolumeIndex, FileId);

/// Small bounds, and nobody who flushes behind the test's back.
fn config() -> ActivityConfig {
    ActivityConfig { files_max: 400, file_bytes_max: 64 << 10, eras_max: 6, era_ns: 10, flush_ns: None }
}

fn open_with(
    storage: &SimStorage,
    now: u64,
    config: ActivityConfig,
) -> Result<(ActivityLog, Found), ActivityError> {
    let storage: Arc<dyn Storage> = Arc::new(storage.clone());
    ActivityLog::open(storage, SESSION, Timestamp(now), config)
}

fn open(storage: &SimStorage) -> Result<(ActivityLog, Found), ActivityError> {
    open_with(storage, 1000, config())
}

/// What a run that starts on this disk is told.
fn found(storage: &SimStorage) -> Found {
    open(storage).unwrap().1
}

/// The files of eras.
fn era_files(disk: &SimStorage) -> Vec<String> {
    disk.list().unwrap().into_iter().filter(|name| name.ends_with(".era")).collect()
}

fn touch(log: &ActivityLog, names: &[Name]) -> Result<(), ActivityError> {
    for (volume, file) in names {
        drop(log.touch(*volume, std::iter::once(*file))?);
    }
    Ok(())
}

fn name(n: u64) -> Name {
    (VolumeIndex((n % 3) as u16), sample_file(n))
}

fn names(range: std::ops::Range<u64>) -> Vec<Name> {
    range.map(name).collect()
}

fn set(names: &[Name]) -> BTreeSet<Name> {
    names.iter().copied().collect()
}

/// SplitMix64, seeded.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
