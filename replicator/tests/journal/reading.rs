use std::sync::Arc;

use bytes::Bytes;
use twinfs_core::delta::{DataRef, SetLocation};
use twinfs_core::format::v1::{Builder, EncodedSet, SetPlace};
use twinfs_core::id::{Epoch, Incarnation, SetHash, SetNumber, SiteId, VolumeInstance, VolumeName};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, Op, Update, sample_file};
use twinfs_replicator::replica::journal::{Journal, ReadError};
use twinfs_replicator::storage::{RealStorage, SimStorage, Storage};

use super::{Random, SESSION, config, open};

const SEGMENT_BYTES: u64 = 4 << 20;

/// A record set with those writes.
pub(crate) fn record_set(number: u64, writes: &[(u64, Vec<u8>)]) -> EncodedSet {
    let mut builder = Builder::new();
    let first = number * 1000;
    for (seq, (offset, data)) in (first..).zip(writes) {
        let file = sample_file(5);
        let size = offset + data.len() as u64;
        let attr = Attr { mode: 0o100_644, uid: 0, gid: 0, nlink: 1, rdev: 0, size, mtime_s: 0, mtime_ns: 0 };
        let mut update: Update = Update {
            stamp: Stamp { time: Timestamp(1000 * seq), seq: Seq(seq) },
            op: Op::Write { file, offset: *offset, len: data.len() as u32 },
            attrs: Default::default(),
        };
        update.attrs.push(file, attr);
        builder.push_update(&update, data).unwrap();
    }
    let place = SetPlace {
        session: SESSION,
        volume: VolumeName::new("data").unwrap(),
        instance: VolumeInstance::new(1).unwrap(),
        root: sample_file(2),
        epoch: Epoch { number: 1, site: SiteId::from_bytes([1; 16]) },
        incarnation: Incarnation(1),
        number: SetNumber(number),
        predecessor: SetHash([9; 32]),
        first_seq: Seq(first),
        start: Timestamp(1000 * first - 1),
        end: Timestamp(1000 * (first + writes.len() as u64)),
    };
    builder.finish(place, 1).unwrap()
}

/// Half random, half not, so that frames are stored both ways.
fn content(random: &mut Random, len: usize) -> Vec<u8> {
    let mut data = random.bytes(len / 2);
    data.resize(len, number_byte(len));
    data
}

fn number_byte(len: usize) -> u8 {
    (len % 251) as u8
}

#[test]
fn any_range_of_any_set_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(dir.path()).unwrap());
    let (mut journal, _) = Journal::open(storage, SESSION, config(SEGMENT_BYTES)).unwrap();
    let mut random = Random(7);
    let mut sets = Vec::new();
    let early = journal.reader();
    for number in 2..12 {
        let len = [1, 300, 131_072, 131_073, 700_000][number as usize % 5];
        let data = content(&mut random, len);
        let set = record_set(number, &[(0, data.clone())]);
        sets.push((journal.append_set(&set.bytes).unwrap(), data, set.bytes));
    }
    journal.sync().unwrap();
    let late = journal.reader();
    for round in 0..600 {
        let (set, data, encoded) = &sets[random.below(sets.len() as u64) as usize];
        let from = random.below(data.len() as u64 + 1) as usize;
        let len = random.below((data.len() - from) as u64 + 1) as usize;
        let mut buf = vec![0xee; len];
        let reader = if round % 2 == 0 { &early } else { &late };
        reader.read(DataRef { set: *set, offset: from as u32 }, &mut buf).unwrap();
        assert!(buf == data[from..from + len], "set at {set:?}, {from}+{len}");
        assert_eq!(reader.read_set(*set).unwrap(), encoded);
    }
    // From several threads.
    std::thread::scope(|scope| {
        for (set, data, _) in &sets {
            let reader = late.clone();
            scope.spawn(move || {
                let mut buf = vec![0; data.len()];
                reader.read(DataRef { set: *set, offset: 0 }, &mut buf).unwrap();
                assert!(buf == *data);
            });
        }
    });
    let (set, data, _) = &sets[0];
    let error = late.read(DataRef { set: *set, offset: data.len() as u32 }, &mut [0]).unwrap_err();
    assert!(matches!(error, ReadError::Set { .. }), "{error}");
    for offset in [0, set.offset - 1, set.offset + 8, SEGMENT_BYTES - 3, SEGMENT_BYTES, u64::MAX] {
        let set = SetLocation { segment: 1, offset };
        late.read(DataRef { set, offset: 0 }, &mut [0]).unwrap_err();
        late.read_set(set).unwrap_err();
    }
}

#[test]
fn a_reader_keeps_the_segments_that_it_saw() {
    let storage = SimStorage::new(3);
    let (mut journal, _) = open(&storage, 64 << 10).unwrap();
    let data = Random(1).bytes(20_000);
    let append = |journal: &mut Journal, number| {
        let at = journal.append_set(&record_set(number, &[(0, data.clone())]).bytes).unwrap();
        journal.sync().unwrap();
        at
    };
    let first = append(&mut journal, 2);
    let old = journal.reader();
    let mut last = first;
    while last.segment < 3 {
        last = append(&mut journal, 3);
    }
    assert_eq!(journal.trim(last).unwrap().segments, 2);
    let new = journal.reader();
    let mut buf = vec![0; data.len()];
    for (reader, set) in [(&old, first), (&old, last), (&new, last), (&old.clone(), first)] {
        buf.fill(0);
        reader.read(DataRef { set, offset: 0 }, &mut buf).unwrap();
        assert!(buf == data);
        reader.read_set(set).unwrap();
    }
    let error = new.read_set(first).unwrap_err();
    assert_eq!(error, ReadError::NoSegment { segment: 1 });
}

#[test]
fn rot_is_never_returned_as_data() {
    let storage = SimStorage::new(3);
    let (mut journal, _) = open(&storage, 64 << 10).unwrap();
    let data = [Random(1).bytes(2000), vec![3; 2000]].concat();
    let set: Bytes = record_set(2, &[(0, data.clone())]).bytes;
    let at = journal.append_set(&set).unwrap();
    journal.sync().unwrap();
    drop(journal);
    let good = storage.bytes("00000001.seg").unwrap();
    let mut refused = 0;
    for index in 0..set.len() {
        // The segment is put back whole to open it, and rots while the journal is open.
        storage.put("00000001.seg", &good);
        let (journal, _) = open(&storage, 64 << 10).unwrap();
        let file = storage.open("00000001.seg").unwrap();
        file.write_at(&[&[set[index] ^ (1 << (index % 8))]], at.offset + index as u64).unwrap();
        let whole = journal.reader().read_set(at);
        assert!(matches!(whole, Err(ReadError::Set { .. })), "byte {index}: {whole:?}");
        let mut buf = vec![0; data.len()];
        match journal.reader().read(DataRef { set: at, offset: 0 }, &mut buf) {
            Ok(()) => assert!(buf == data, "byte {index}"),
            Err(ReadError::Set { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    // All but the metadata frame, which a read of data does not touch.
    assert!(refused > set.len() - 200, "{refused} of {}", set.len());
}
