//! A device that fails once, at every operation of a run: the journal is failed for good, whatever the device does later,
//! and the medium tells the truth to whoever opens it next.

use std::sync::Arc;

use rustix::io::Errno;
use twinfs_replicator::replica::journal::{Journal, JournalError};
use twinfs_replicator::storage::{Fault, Operation, SimStorage, Storage};

use super::crash::History;
use super::{Random, commit, open, recover};

const SEGMENT_BYTES: u64 = 256 << 10;
const STEPS: usize = 120;

/// How a run went whose device fails once.
enum Run {
    /// Nothing failed: the run has fewer such operations.
    Untouched,
    /// The journal refused what it could not take, lost nothing, and went on.
    WentOn,
    /// The journal takes nothing any more.
    Failed,
}

fn run(operation: Operation, after: u64, errno: Errno) -> Run {
    let context = format!("{operation} number {after} fails with {errno:?}");
    let storage = SimStorage::new(7);
    let (mut journal, _) = open(&storage, SEGMENT_BYTES).unwrap();
    storage.inject(Fault { operation, after, errno });
    let (mut history, mut random) = (History::default(), Random(7));
    let mut refusals = 0;
    for _ in 0..STEPS {
        let Err(error) = history.run(&mut journal, &mut random, 1) else { continue };
        refusals += 1;
        assert_ne!(error, JournalError::Poisoned, "{context}: the cause is said first");
        if journal.is_poisoned() {
            takes_nothing(&mut journal, &storage, &context);
            reopens_with_the_truth(&storage, &history, &context);
            return Run::Failed;
        }
        history.take_back();
    }
    reopens_with_the_truth(&storage, &history, &context);
    if refusals == 0 { Run::Untouched } else { Run::WentOn }
}

/// The device works again. That must not turn what failed into a success.
fn takes_nothing(journal: &mut Journal, storage: &SimStorage, context: &str) {
    let (changes, end) = (storage.changes(), journal.end());
    let next = journal.last_commit().map_or(1, |last| last.group.0 + 1);
    for _ in 0..2 {
        assert_eq!(journal.sync(), Err(JournalError::Poisoned), "{context}");
        assert_eq!(journal.append_set(b"more"), Err(JournalError::Poisoned), "{context}");
        assert_eq!(journal.append_set(&vec![1; 100_000]), Err(JournalError::Poisoned), "{context}");
        assert_eq!(journal.append_commit(&commit(next)), Err(JournalError::Poisoned), "{context}");
        assert_eq!(journal.trim(end), Err(JournalError::Poisoned), "{context}");
    }
    assert_eq!(storage.changes(), changes, "{context}: the medium is left alone");
}

/// A new process, and a machine that lost its power, find everything that was acknowledged, and go on.
fn reopens_with_the_truth(storage: &SimStorage, history: &History, context: &str) {
    let disks = (0..4).map(|seed| storage.crash(seed)).chain([storage.restart()]);
    for (index, disk) in disks.enumerate() {
        let context = format!("{context}, disk {index}");
        let mut history = history.clone();
        let (mut journal, recovered, _) = recover(&disk, SEGMENT_BYTES).expect(&context);
        history.check(&recovered, journal.end(), &context);
        history.run(&mut journal, &mut Random(8), 20).expect(&context);
        let (journal, recovered, _) = recover(&disk.crash(0), SEGMENT_BYTES).expect(&context);
        history.check(&recovered, journal.end(), &context);
    }
}

/// Runs with the first, second, … operation of that kind failing; how many runs failed, and how many went on.
fn every(operation: Operation, errno: Errno) -> (u64, u64) {
    let (mut failed, mut went_on) = (0, 0);
    for after in 0.. {
        match run(operation, after, errno) {
            Run::Untouched => break,
            Run::Failed => failed += 1,
            Run::WentOn => went_on += 1,
        }
    }
    (failed, went_on)
}

#[test]
fn a_sync_that_fails_is_final_whichever_it_is_and_whatever_it_answers() {
    for errno in [Errno::IO, Errno::NOSPC, Errno::DQUOT] {
        for (operation, least) in [(Operation::SyncData, 15), (Operation::SyncDir, 2)] {
            let (failed, went_on) = every(operation, errno);
            assert!(failed >= least && went_on == 0, "{operation}, {errno:?}: {failed} and {went_on}");
        }
    }
}

#[test]
fn a_write_that_fails_is_final_unless_there_was_no_room() {
    let changes = [Operation::Write, Operation::Create, Operation::Allocate, Operation::Rename];
    for operation in changes {
        let (failed, went_on) = every(operation, Errno::IO);
        assert!(failed > 0 && went_on == 0, "{operation}: {failed} and {went_on}");
        for errno in [Errno::NOSPC, Errno::DQUOT] {
            let (failed, went_on) = every(operation, errno);
            assert!(failed == 0 && went_on > 0, "{operation}, {errno:?}: {failed} and {went_on}");
        }
    }
}

#[test]
fn a_question_that_fails_changes_nothing() {
    for operation in [Operation::Free, Operation::Salt, Operation::Remove] {
        let (failed, went_on) = every(operation, Errno::IO);
        assert!(failed == 0 && went_on > 0, "{operation}: {failed} and {went_on}");
    }
}

/// Opening must not take for durable what it could not make durable.
#[test]
fn an_open_that_fails_opens_nothing() {
    let storage = SimStorage::new(7);
    let (mut journal, _) = open(&storage, SEGMENT_BYTES).unwrap();
    History::default().run(&mut journal, &mut Random(7), STEPS).unwrap();
    journal.sync().unwrap();
    let (_, whole, _) = recover(&storage, SEGMENT_BYTES).unwrap();
    let before: Vec<_> = names(&storage);
    let questions = [
        Operation::List,
        Operation::Open,
        Operation::Size,
        Operation::Read,
        Operation::SyncData,
        Operation::SyncDir,
    ];
    for operation in questions {
        let mut refused = 0;
        for after in 0.. {
            let disk = storage.restart();
            disk.inject(Fault { operation, after, errno: Errno::IO });
            match recover(&disk, SEGMENT_BYTES) {
                Ok((_, recovered, _)) => {
                    assert_eq!(recovered, whole);
                    break;
                }
                Err(error) => {
                    assert!(matches!(error, JournalError::Storage(_)), "{operation} {after}: {error}")
                }
            }
            refused += 1;
            assert_eq!(names(&disk), before);
            assert_eq!(recover(&disk.restart(), SEGMENT_BYTES).unwrap().1, whole);
        }
        assert!(refused > 0, "{operation}");
    }
}

fn names(storage: &SimStorage) -> Vec<(String, Option<Arc<[u8]>>)> {
    let names = storage.list().unwrap().into_iter();
    names.map(|name| (name.clone(), storage.bytes(&name).map(Arc::from))).collect()
}
