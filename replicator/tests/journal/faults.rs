//! Full disks and failing devices.

use std::sync::Arc;

use rustix::io::Errno;
use twinfs_replicator::replica::journal::{Journal, JournalConfig, JournalError, Recovered};
use twinfs_replicator::storage::{Fault, Operation, SimStorage, Storage, StorageError};

use super::{SESSION, commit, open, recover};

const SEGMENT_BYTES: u64 = 64 << 10;

fn fault(operation: Operation, after: u64, errno: Errno) -> Fault {
    Fault { operation, after, errno }
}

/// Fills the last segment with sets until a new one is refused.
fn fill(journal: &mut Journal) -> (usize, JournalError) {
    for count in 0..100 {
        if let Err(error) = journal.append_set(&[7; 3000]) {
            return (count, error);
        }
    }
    panic!("it never gets full");
}

#[test]
fn the_floor_refuses_sets_before_anything_is_written_but_lets_commits_pass() {
    let storage = SimStorage::new(1);
    storage.set_free_bytes(3 * SEGMENT_BYTES);
    let config = JournalConfig { segment_bytes: SEGMENT_BYTES, floor_bytes: SEGMENT_BYTES + 1 };
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let (mut journal, _) = Journal::open(shared, SESSION, config).unwrap();
    let (sets, error) = fill(&mut journal);
    let full =
        JournalError::Full { needed: SEGMENT_BYTES, free: 2 * SEGMENT_BYTES, floor: SEGMENT_BYTES + 1 };
    assert_eq!(error, full);
    journal.sync().unwrap();
    let changes = storage.changes();
    assert_eq!(journal.append_set(&[7; 3000]), Err(full));
    assert_eq!(storage.changes(), changes);
    // What was received can be committed, even if that takes a segment.
    for group in 1..=25 {
        journal.append_commit(&commit(group)).unwrap();
        journal.sync().unwrap();
    }
    assert!(journal.segments() > 1);
    let end = journal.end();
    journal.trim(end).unwrap();
    storage.set_free_bytes(9 * SEGMENT_BYTES);
    journal.append_set(&[8; 3000]).unwrap();
    journal.sync().unwrap();
    drop(journal);
    let (journal, recovered, _) = recover(&storage, SEGMENT_BYTES).unwrap();
    assert!(sets > 15 && matches!(recovered[0], Recovered::Standing(_)));
    assert_eq!(journal.last_commit(), Some(&commit(25)));
}

#[test]
fn a_segment_that_finds_no_room_is_given_up_without_a_trace() {
    for operation in [Operation::Create, Operation::Allocate, Operation::Write, Operation::Rename] {
        let storage = SimStorage::new(1);
        let (mut journal, _) = open(&storage, SEGMENT_BYTES).unwrap();
        let first = journal.append_set(&[1; 40_000]).unwrap();
        journal.append_commit(&commit(1)).unwrap();
        journal.sync().unwrap();
        storage.inject(fault(operation, 0, Errno::NOSPC));
        let error = journal.append_set(&[2; 40_000]).unwrap_err();
        assert!(matches!(error, JournalError::Full { .. }), "{operation}: {error}");
        assert!(!journal.is_poisoned());
        // The old segment goes on, durably, whatever a crash does.
        journal.append_commit(&commit(2)).unwrap();
        journal.sync().unwrap();
        for seed in 0..6 {
            let (_, recovered, _) = recover(&storage.crash(seed), SEGMENT_BYTES).unwrap();
            assert_eq!(recovered.last(), Some(&Recovered::Commit(commit(2))), "{operation}, seed {seed}");
        }
        let second = journal.append_set(&[2; 40_000]).unwrap();
        assert_eq!((first.segment, second.segment), (1, 2));
        journal.sync().unwrap();
        let (_, recovered, torn) = recover(&storage.crash(0), SEGMENT_BYTES).unwrap();
        assert_eq!((recovered.len(), torn), (4, false));
    }
}

#[test]
fn a_write_without_room_can_be_repeated() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = open(&storage, 1 << 20).unwrap();
    journal.append_set(&[1; 100]).unwrap();
    journal.sync().unwrap();

    journal.append_set(&[2; 5000]).unwrap();
    storage.inject(fault(Operation::Write, 0, Errno::NOSPC));
    assert!(matches!(journal.sync(), Err(JournalError::Full { .. })));
    // Another one, large, refused as well, and not repeated.
    storage.inject(fault(Operation::Write, 0, Errno::NOSPC));
    assert!(matches!(journal.append_set(&vec![3; 100_000]), Err(JournalError::Full { .. })));
    journal.append_set(&[4; 100]).unwrap();
    journal.sync().unwrap();
    journal.append_set(&[5; 100]).unwrap();
    journal.sync().unwrap();

    for seed in 0..4 {
        let (_, recovered, _) = recover(&storage.crash(seed), 1 << 20).unwrap();
        let firsts: Vec<u8> = recovered
            .iter()
            .map(|r| match r {
                Recovered::Set { bytes, .. } => bytes[0],
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(firsts, [1, 2, 4, 5]);
    }
}

#[test]
fn a_failed_sync_or_write_is_final() {
    for operation in [Operation::SyncData, Operation::Write] {
        let storage = SimStorage::new(1);
        let (mut journal, _) = open(&storage, SEGMENT_BYTES).unwrap();
        journal.append_set(b"durable").unwrap();
        journal.append_commit(&commit(1)).unwrap();
        journal.sync().unwrap();
        journal.append_set(b"never acknowledged").unwrap();
        storage.inject(fault(operation, 0, Errno::IO));
        let error = journal.sync().unwrap_err();
        let io = |error: &JournalError| {
            matches!(error, JournalError::Storage(StorageError::Io { errno: Errno::IO, .. }))
        };
        assert!(io(&error), "{error}");
        // The device works again, but nobody knows what it forgot.
        let end = journal.end();
        assert!(journal.is_poisoned());
        for _ in 0..2 {
            assert_eq!(journal.sync(), Err(JournalError::Poisoned));
            assert_eq!(journal.append_set(b"more"), Err(JournalError::Poisoned));
            assert_eq!(journal.append_commit(&commit(2)), Err(JournalError::Poisoned));
            assert_eq!(journal.trim(end), Err(JournalError::Poisoned));
        }
        drop(journal);
        // A new process sees cached bytes that never reached the medium; it must not take them for durable.
        let disk = storage.restart();
        let (mut journal, recovered, _) = recover(&disk, SEGMENT_BYTES).unwrap();
        if operation == Operation::SyncData {
            assert_eq!(recovered.len(), 2, "the lost batch is not shown");
        }
        journal.append_set(b"on it goes").unwrap();
        journal.sync().unwrap();
        let (_, after, _) = recover(&disk.crash(0), SEGMENT_BYTES).unwrap();
        assert!(after.starts_with(&recovered) && after.len() == recovered.len() + 1);
    }
}

#[test]
fn a_process_that_dies_before_its_sync_leaves_entries_that_recovery_makes_durable() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = open(&storage, 1 << 20).unwrap();
    journal.append_set(b"durable").unwrap();
    journal.sync().unwrap();
    // Written at once for its size, but not synced.
    journal.append_set(&vec![1; 100_000]).unwrap();
    drop(journal);
    let disk = storage.restart();
    let (_, recovered, _) = recover(&disk, 1 << 20).unwrap();
    assert_eq!(recovered.len(), 2);
    let (_, after, _) = recover(&disk.crash(0), 1 << 20).unwrap();
    assert_eq!(after, recovered, "what recovery gave back once, it gives back always");
}

#[test]
fn a_trim_that_fails_leaves_no_gap() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = open(&storage, 16 << 10).unwrap();
    for group in 1..=12 {
        journal.append_set(&[1; 5000]).unwrap();
        journal.append_commit(&commit(group)).unwrap();
        journal.sync().unwrap();
    }
    assert!(journal.segments() > 4);
    let end = journal.end();
    storage.inject(fault(Operation::Remove, 1, Errno::ACCESS));
    journal.trim(end).unwrap_err();
    assert!(!journal.is_poisoned(), "a name that stays harms nobody");
    storage.inject(fault(Operation::SyncDir, 0, Errno::IO));
    journal.trim(end).unwrap_err();
    assert!(journal.is_poisoned());
    for seed in 0..8 {
        let (_, recovered, _) = recover(&storage.crash(seed), 16 << 10).unwrap();
        assert_eq!(recovered.last(), Some(&Recovered::Commit(commit(12))));
    }
}
