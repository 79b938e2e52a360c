use std::sync::Arc;

use twinfs_core::delta::SetLocation;
use twinfs_core::id::GroupNumber;
use twinfs_core::limits;
use twinfs_core::stamp::Timestamp;
use twinfs_replicator::replica::journal::{
    Journal, JournalConfig, JournalError, Recovered, Trimmed, describe,
};
use twinfs_replicator::storage::{RealStorage, SimStorage, Storage, open_file};

use super::{Appended, Random, SESSION, commit, config, is_prefix, open, recover};

#[test]
fn what_was_appended_comes_back_over_several_openings() {
    let dir = tempfile::tempdir().unwrap();
    let open_real = || {
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(&dir.path().join("journal")).unwrap());
        Journal::open(storage, SESSION, config(512 << 10)).unwrap()
    };
    let mut random = Random(1);
    let (mut appended, mut places) = (Vec::new(), Vec::new());
    for round in 0..4 {
        let (mut journal, recovery) = open_real();
        assert!(!recovery.is_torn());
        let recovered: Vec<_> = recovery.map(Result::unwrap).collect();
        assert_eq!(recovered.len(), appended.len());
        assert!(is_prefix(&recovered, &appended));
        let found: Vec<_> = recovered
            .iter()
            .filter_map(|r| match r {
                Recovered::Set { at, .. } => Some(*at),
                _ => None,
            })
            .collect();
        assert_eq!(found, places);
        for n in 1..=20 {
            let len = if n % 5 == 0 { 100_000 } else { 1 + random.below(5000) };
            let set = Appended::Set(random.bytes(len as usize));
            places.extend(set.append(&mut journal).unwrap());
            appended.push(set);
            if n % 4 == 0 {
                let commit = Appended::Commit(commit(round * 5 + n / 4));
                commit.append(&mut journal).unwrap();
                appended.push(commit);
                journal.sync().unwrap();
            }
        }
        assert_eq!(journal.last_commit(), Some(&commit(round * 5 + 5)));
        assert_eq!(journal.bytes_used(), journal.segments() as u64 * (512 << 10));
    }
    assert!(places.windows(2).all(|pair| pair[0] < pair[1]));
    assert!(places.last().unwrap().segment >= 4);
}

#[test]
fn a_small_set_and_its_commit_cost_one_write_and_one_sync() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = open(&storage, 1 << 20).unwrap();
    journal.append_set(b"the first one makes a segment").unwrap();
    journal.sync().unwrap();
    let (before, changes) = (journal.stats(), storage.changes());
    journal.append_set(b"small").unwrap();
    journal.append_commit(&commit(1)).unwrap();
    assert_eq!(storage.changes(), changes, "nothing is written before the sync");
    journal.sync().unwrap();
    let after = journal.stats();
    assert_eq!((after.writes, after.syncs), (before.writes + 1, before.syncs + 1));
    assert_eq!(after.written_bytes - before.written_bytes, 4096);
    assert_eq!(storage.changes(), changes + 2);
    journal.sync().unwrap();
    assert_eq!(storage.changes(), changes + 2, "nothing to do");
}

#[test]
fn a_large_set_is_written_with_what_came_before_it() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = open(&storage, 1 << 20).unwrap();
    journal.append_set(&[1; 100]).unwrap();
    journal.append_set(&vec![2; 200_000]).unwrap();
    journal.append_set(&[3; 100]).unwrap();
    journal.sync().unwrap();
    let stats = journal.stats();
    assert_eq!((stats.sets, stats.set_bytes), (3, 200_200));
    assert_eq!(stats.writes, 1 + 2, "the segment, then 1 and 2, then 3");
    drop(journal);
    let (_, recovered, torn) = recover(&storage, 1 << 20).unwrap();
    assert_eq!((recovered.len(), torn), (3, false));
}

#[test]
fn trim_removes_whole_segments_and_keeps_the_last_commit() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = open(&storage, 64 << 10).unwrap();
    let mut places = Vec::new();
    for group in 1..=40 {
        places.push(journal.append_set(&vec![group as u8; 5000]).unwrap());
        journal.append_commit(&commit(group)).unwrap();
        journal.sync().unwrap();
    }
    assert_eq!(journal.segments(), 6);
    assert_eq!(journal.trim(places[0]).unwrap(), Trimmed::default());
    let keep = places.iter().position(|at| at.segment == 4).unwrap();
    let trimmed = journal.trim(places[keep]).unwrap();
    assert_eq!(trimmed, Trimmed { segments: 3, bytes: 3 * (64 << 10) });
    assert_eq!(storage.list().unwrap()[0], "00000004.seg");
    drop(journal);

    let (mut journal, recovered, _) = recover(&storage, 64 << 10).unwrap();
    assert_eq!(recovered[0], Recovered::Standing(commit(keep as u64)));
    assert_eq!(recovered.len(), 1 + 2 * (40 - keep));
    assert!(matches!(&recovered[1], Recovered::Set { at, .. } if *at == places[keep]));
    assert_eq!(recovered.last(), Some(&Recovered::Commit(commit(40))));
    // The last segment stays, however much is checkpointed.
    journal.trim(journal.end()).unwrap();
    journal.trim(SetLocation { segment: u64::MAX, offset: 0 }).unwrap();
    assert_eq!(journal.segments(), 1);
    drop(journal);
    let (journal, recovered, _) = recover(&storage, 64 << 10).unwrap();
    assert_eq!(journal.last_commit(), Some(&commit(40)));
    assert!(matches!(recovered[0], Recovered::Standing(_)));
}

#[test]
fn what_does_not_belong_is_refused() {
    let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(1));
    for segment_bytes in [0, 4096, 8191, 10_000, limits::SEGMENT_BYTES + 4096, u64::MAX] {
        let config = JournalConfig { segment_bytes, floor_bytes: 0 };
        let error = Journal::open(Arc::clone(&storage), SESSION, config).unwrap_err();
        assert_eq!(error, JournalError::SegmentSize { bytes: segment_bytes });
    }
    let (mut journal, _) = Journal::open(storage, SESSION, JournalConfig::default()).unwrap();
    assert!(matches!(journal.append_set(&[]), Err(JournalError::EntrySize { bytes: 0 })));
    let large = vec![0; limits::SET_BYTES_MAX + 1];
    assert!(matches!(journal.append_set(&large), Err(JournalError::EntrySize { .. })));
    journal.append_set(&large[1..]).unwrap();
    journal.append_commit(&commit(5)).unwrap();
    for group in [1, 4, 5, 7] {
        let (last, group) = (GroupNumber(5), GroupNumber(group));
        let error = journal.append_commit(&commit(group.0)).unwrap_err();
        assert_eq!(error, JournalError::CommitOrder { last, group });
    }
    let mut early = commit(6);
    early.time = Timestamp(0);
    assert!(matches!(journal.append_commit(&early), Err(JournalError::CommitOrder { .. })));
    journal.append_commit(&commit(6)).unwrap();
    journal.sync().unwrap();
}

#[test]
fn a_segment_can_be_read_by_a_person() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(dir.path()).unwrap());
    let (mut journal, _) = Journal::open(storage, SESSION, config(64 << 10)).unwrap();
    journal.append_set(&super::reading::record_set(7, &[(0, vec![1; 5000])]).bytes).unwrap();
    journal.append_commit(&commit(1)).unwrap();
    journal.sync().unwrap();
    journal.append_set(b"no set at all").unwrap();
    journal.sync().unwrap();
    let mut text = String::new();
    describe(open_file(&dir.path().join("00000001.seg")).unwrap(), &mut text).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "journal segment 1");
    assert!(lines[2].ends_with("612073657373696f6e2773206e616d65"), "{}", lines[2]);
    assert!(
        lines[6].contains("1 at     4160  record set 7 of volume data, 1 updates from #"),
        "{}",
        lines[6]
    );
    assert!(lines[7].contains("2 at "), "{}", lines[7]);
    assert!(lines[7].ends_with("commit of group 1, consistency time 1970-01-01T00:00:00.001000Z"));
    assert!(lines[8].ends_with("data through #11, record sets through 1, joins"), "{}", lines[8]);
    assert!(lines[9].ends_with("log through #12, record sets through 1, no member yet"), "{}", lines[9]);
    assert!(lines[10].ends_with("record set of 13 bytes, unreadable: this is not a record set"));
    assert!(lines[11].ends_with(": nothing was written after it"), "{}", lines[11]);
    assert_eq!(lines.len(), 12);

    std::fs::write(dir.path().join("x"), b"something else").unwrap();
    let error = describe(open_file(&dir.path().join("x")).unwrap(), &mut text).unwrap_err();
    assert!(error.to_string().contains("the header ends too early"), "{error}");
}
