//! What the tests of the byte formats share: arbitrary updates, and a forger of record sets.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod forge;
pub(crate) mod strategy;

use proptest::test_runner::{Config, RngSeed};
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, SiteId, VolumeInstance, VolumeName,
};
use twinfs_core::record_set::SetPlace;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, AttrList, Op, Update};

/// The instance of the volume of the tests.
pub(crate) const INSTANCE: VolumeInstance = VolumeInstance::new(0x0123_4567_89ab_cdef).unwrap();
/// Start of the interval of [`place`]: 2026-01-01 00:00:00 UTC.
pub(crate) const START: u64 = 1_767_225_600_000_000_000;

/// A number of cases with a seed that is the same each time, unless `PROPTEST_RNG_SEED` gives another.
pub(crate) fn config(cases: u32) -> Config {
    let mut config = Config { cases, failure_persistence: None, ..Config::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(0x0077_17f5);
    }
    if let RngSeed::Fixed(seed) = config.rng_seed {
        println!("replay with PROPTEST_RNG_SEED={seed}");
    }
    config
}

pub(crate) fn file(ino: u64) -> FileId {
    FileId { instance: INSTANCE, ino, generation: 7 }
}

pub(crate) fn attr(mode: u32) -> Attr {
    Attr {
        mode,
        uid: 1000,
        gid: 100,
        nlink: 1,
        rdev: 0,
        size: 5,
        mtime_s: 1_767_225_600,
        mtime_ns: 123_456_789,
    }
}

/// The place of a set whose updates are stamped by [`stamp`].
pub(crate) fn place() -> SetPlace {
    SetPlace {
        session: SessionId::from_bytes([0x5e; 16]),
        volume: VolumeName::new("home").unwrap(),
        instance: INSTANCE,
        root: file(2),
        epoch: Epoch { number: 3, site: SiteId::from_bytes([0x51; 16]) },
        incarnation: Incarnation(0xfeed_beef),
        number: SetNumber(12),
        predecessor: SetHash([0xab; 32]),
        first_seq: Seq(101),
        start: Timestamp(START),
        end: Timestamp(START + 50_000_000),
    }
}

/// The stamp of the update with the given index.
pub(crate) fn stamp(index: u64) -> Stamp {
    Stamp { time: Timestamp(START + 1000 * (index + 1)), seq: Seq(101 + index) }
}

pub(crate) fn update(index: u64, op: Op, attrs: &[(FileId, Attr)]) -> Update {
    Update { stamp: stamp(index), op, attrs: attrs.iter().copied().collect::<AttrList>() }
}

/// A small set: a file is made, written to, and renamed over another.
pub(crate) fn sample() -> Vec<(Update, Vec<u8>)> {
    let create = Op::Create { dir: file(2), name: (*b"new").into(), file: file(40), target: [].into() };
    let write = Op::Write { file: file(40), offset: 0, len: 5 };
    let rename = Op::Rename {
        from_dir: file(2),
        from: (*b"new").into(),
        to_dir: file(2),
        to: (*b"old").into(),
        file: file(40),
        replaced: Some(file(33)),
    };
    vec![
        (update(0, create, &[(file(40), attr(0o100_644))]), vec![]),
        (update(1, write, &[(file(40), attr(0o100_644))]), b"hello".to_vec()),
        (update(2, rename, &[(file(2), attr(0o040_755))]), vec![]),
    ]
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .chunks(32)
        .map(|line| line.iter().map(|b| format!("{b:02x}")).collect::<String>())
        .collect::<Vec<_>>()
        .join("\n")
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}
