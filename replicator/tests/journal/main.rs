//! The journal over real and simulated storage.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod crash;
mod damage;
mod failing;
mod faults;
mod hostile;
mod memory;
mod reading;
mod round_trip;

use std::sync::Arc;

use twinfs_core::delta::SetLocation;
use twinfs_core::id::{GroupNumber, SessionId, SetHash, SetNumber, VolumeInstance, VolumeName};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::update::sample_file;
use twinfs_replicator::replica::journal::{
    Commit, CommitBase, CommitVolume, Journal, JournalConfig, JournalError, Recovered, Recovery,
};
use twinfs_replicator::storage::{SimStorage, Storage};

const SESSION: SessionId = SessionId::from_bytes(*b"a session's name");

/// Small segments and no floor.
fn config(segment_bytes: u64) -> JournalConfig {
    JournalConfig { segment_bytes, floor_bytes: 0 }
}

fn open(storage: &SimStorage, segment_bytes: u64) -> Result<(Journal, Recovery), JournalError> {
    let storage: Arc<dyn Storage> = Arc::new(storage.clone());
    Journal::open(storage, SESSION, config(segment_bytes))
}

/// Opens and reads everything back.
fn recover(
    storage: &SimStorage,
    segment_bytes: u64,
) -> Result<(Journal, Vec<Recovered>, bool), JournalError> {
    let (journal, recovery) = open(storage, segment_bytes)?;
    let torn = recovery.is_torn();
    Ok((journal, recovery.collect::<Result<_, _>>()?, torn))
}

fn commit(group: u64) -> Commit {
    let volume = |name: &str, n: u64| CommitVolume {
        volume: VolumeName::new(name).unwrap(),
        instance: VolumeInstance::new(n).unwrap(),
        root: sample_file(n),
        member: group >= n,
        joins: group == n,
        through: Seq(10 * group + n),
        base: CommitBase {
            number: SetNumber(group),
            hash: SetHash([group as u8; 32]),
            last_seq: Seq(10 * group),
            end: Timestamp(group),
        },
    };
    Commit {
        group: GroupNumber(group),
        time: Timestamp(1_000_000 * group),
        volumes: vec![volume("data", 1), volume("log", 2)],
    }
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

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 7);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// Something appended, as a test remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Appended {
    Set(Vec<u8>),
    Commit(Commit),
}

impl Appended {
    fn append(&self, journal: &mut Journal) -> Result<Option<SetLocation>, JournalError> {
        match self {
            Self::Set(bytes) => journal.append_set(bytes).map(Some),
            Self::Commit(commit) => journal.append_commit(commit).map(|()| None),
        }
    }

    fn is(&self, recovered: &Recovered) -> bool {
        match (self, recovered) {
            (Self::Set(bytes), Recovered::Set { bytes: found, .. }) => bytes == found,
            (Self::Commit(commit), Recovered::Commit(found)) => commit == found,
            _ => false,
        }
    }
}

/// Whether the recovered entries are the first ones of those appended.
fn is_prefix(recovered: &[Recovered], appended: &[Appended]) -> bool {
    recovered.len() <= appended.len() && recovered.iter().zip(appended).all(|(r, a)| a.is(r))
}
