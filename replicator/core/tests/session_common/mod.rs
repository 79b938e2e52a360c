//! What the tests of the session share: a small random generator, seeds, and record sets without bytes.
#![allow(dead_code, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;

use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, SiteId, SiteName, VolumeInstance, VolumeName,
};
use twinfs_core::record_set::{SetHeader, SetMeta};
use twinfs_core::session::ChainPoint;
use twinfs_core::session::VolumeState;
use twinfs_core::session::sender::{ChainLink, IssuedSet, SenderConfig, SenderVolume};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{AttrList, Op, Update};

/// SplitMix64 (Steele, Lea, Flood 2014): one word of state, good enough for tests, the same everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number in `low..=high`.
    pub(crate) fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// Runs a test for the seed `TWINFS_SEED`, or for the kept seeds and the first `TWINFS_SEEDS` (or `count`) numbers.
pub(crate) fn for_seeds(file: &str, test: &str, count: u64, run: impl Fn(u64) -> Result<(), String>) {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a seed is a number"));
    let seeds: Vec<u64> = match number("TWINFS_SEED") {
        Some(seed) => vec![seed],
        None => kept_seeds().chain(0..number("TWINFS_SEEDS").unwrap_or(count)).collect(),
    };
    for seed in seeds {
        let replay = format!("TWINFS_SEED={seed} cargo test -p twinfs-core --test {file} {test}");
        let _guard = PrintOnPanic(&replay);
        if let Err(why) = run(seed) {
            panic!("seed {seed}: {why}");
        }
    }
}

/// Seeds that failed once.
fn kept_seeds() -> impl Iterator<Item = u64> {
    let lines = include_str!("seeds.txt").lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(|line| line.parse().expect("a seed"))
}

struct PrintOnPanic<'a>(&'a str);

impl Drop for PrintOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to replay: {}", self.0);
        }
    }
}

pub(crate) const SESSION: SessionId = SessionId::from_bytes([7; 16]);
pub(crate) const PRIMARY: SiteId = SiteId::from_bytes([1; 16]);
pub(crate) const REPLICA: SiteId = SiteId::from_bytes([2; 16]);
pub(crate) const EPOCH: Epoch = Epoch { number: 1, site: PRIMARY };
pub(crate) const INCARNATION: Incarnation = Incarnation(99);

pub(crate) fn volume_name(index: usize) -> VolumeName {
    VolumeName::new(format!("vol{index}")).unwrap()
}

/// Which volume a name stands for.
pub(crate) fn canonical(name: &VolumeName) -> usize {
    name.as_str()[3..].parse().unwrap()
}

pub(crate) fn instance(index: usize) -> VolumeInstance {
    VolumeInstance::new(1000 + index as u64).unwrap()
}

pub(crate) fn root(index: usize) -> FileId {
    FileId { instance: instance(index), ino: 2, generation: 0 }
}

pub(crate) fn sender_config() -> SenderConfig {
    SenderConfig {
        session: SESSION,
        site: PRIMARY,
        name: SiteName::new("nyc").unwrap(),
        epoch: EPOCH,
        incarnation: INCARNATION,
    }
}

pub(crate) fn sender_volume<H>(index: usize) -> SenderVolume<H> {
    SenderVolume {
        name: volume_name(index),
        instance: instance(index),
        root: root(index),
        state: VolumeState::Pending,
        complete: None,
        acked: ChainPoint::START,
        end: Timestamp::ZERO,
        issued: Vec::new(),
        acked_end: Timestamp::ZERO,
        forgotten: Vec::new(),
    }
}

/// A record set as a verified one would come out of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TestSet {
    pub(crate) header: SetHeader,
    pub(crate) hash: SetHash,
    pub(crate) meta: SetMeta,
}

impl TestSet {
    pub(crate) fn point(&self) -> ChainPoint {
        ChainPoint { number: self.header.number, hash: self.hash, last_seq: self.header.last_seq() }
    }

    pub(crate) fn issued(self, bytes: u64) -> IssuedSet<Arc<TestSet>> {
        let stamp = |at: usize| self.meta.updates[at].0.stamp;
        let complete = self.meta.updates.iter().find(|(update, _)| update.op == Op::Complete);
        IssuedSet {
            number: self.header.number,
            hash: self.hash,
            first: stamp(0),
            last: stamp(self.meta.updates.len() - 1),
            end: self.header.end,
            bytes,
            complete: complete.map(|(update, _)| update.stamp),
            handle: Arc::new(self),
        }
    }
}

/// An update of a volume: its time, and whether it is the mark that ends the copy or a resync, or begins a resync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) time: u64,
    pub(crate) complete: bool,
    pub(crate) resync: bool,
}

impl Change {
    pub(crate) fn write(time: u64) -> Self {
        Self { time, complete: false, resync: false }
    }

    pub(crate) fn complete(time: u64) -> Self {
        Self { complete: true, ..Self::write(time) }
    }

    pub(crate) fn resync(time: u64) -> Self {
        Self { resync: true, ..Self::write(time) }
    }
}

pub(crate) fn update(volume: usize, seq: Seq, change: Change) -> Update {
    let file = root(volume);
    let op = match (change.complete, change.resync) {
        (true, _) => Op::Complete,
        (_, true) => Op::Resync,
        _ => Op::Write { file, offset: change.time, len: 100 },
    };
    Update { stamp: Stamp { time: Timestamp(change.time), seq }, op, attrs: AttrList::new() }
}

/// A set at a place in the chain; without changes a null set.
pub(crate) fn make_set(volume: usize, link: ChainLink, changes: &[Change], end: u64) -> TestSet {
    let updates: Vec<_> =
        (link.first_seq.0..).map(Seq).zip(changes).map(|(seq, c)| (update(volume, seq, *c), 0)).collect();
    let header = SetHeader {
        session: SESSION,
        volume: volume_name(volume),
        instance: instance(volume),
        root: root(volume),
        epoch: EPOCH,
        incarnation: INCARNATION,
        number: link.number,
        predecessor: link.predecessor,
        first_seq: link.first_seq,
        updates: updates.len() as u32,
        start: link.start,
        end: Timestamp(end),
        meta_len: 100 * updates.len() as u32,
        data_len: 0,
    };
    let hash = SetHash(*blake3::hash(format!("{header:?}{changes:?}").as_bytes()).as_bytes());
    TestSet { header, hash, meta: SetMeta { files: Vec::new(), updates } }
}

/// Makes the chain of a volume without a sender.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    pub(crate) volume: usize,
    pub(crate) last: ChainPoint,
    pub(crate) end: u64,
}

impl Chain {
    pub(crate) fn new(volume: usize) -> Self {
        Self { volume, last: ChainPoint::START, end: 0 }
    }

    fn link(&self, number: SetNumber) -> ChainLink {
        ChainLink {
            number,
            predecessor: self.last.hash,
            first_seq: self.last.last_seq.next(),
            start: Timestamp(self.end),
        }
    }

    pub(crate) fn set(&mut self, changes: &[Change], end: u64) -> TestSet {
        let set = make_set(self.volume, self.link(self.last.number.next()), changes, end);
        self.last = set.point();
        self.end = end;
        set
    }

    /// A set of plain writes at these times, which ends with the last of them.
    pub(crate) fn writes(&mut self, times: &[u64]) -> TestSet {
        let changes: Vec<_> = times.iter().map(|time| Change::write(*time)).collect();
        self.set(&changes, *times.last().unwrap())
    }

    pub(crate) fn null(&mut self, end: u64) -> TestSet {
        let set = make_set(self.volume, self.link(self.last.number), &[], end);
        self.end = end;
        set
    }
}
