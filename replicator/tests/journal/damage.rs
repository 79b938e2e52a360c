//! Damaged segments: what is wrong is noticed, and never comes back as an entry.

use twinfs_core::id::SessionId;
use twinfs_replicator::replica::journal::{Journal, JournalError, Recovered, describe};
use twinfs_replicator::storage::{SimStorage, Storage};

use super::{Appended, Random, SESSION, commit, config, is_prefix, open, recover};

const NAME: &str = "00000001.seg";

/// What became of a damaged journal.
#[derive(Debug, PartialEq)]
enum Outcome {
    Refused(JournalError),
    /// So many entries, the first ones; and whether a torn batch was reported.
    Prefix(usize, bool),
}

/// Opens a journal of one segment with those bytes.
fn outcome(bytes: &[u8], appended: &[Appended]) -> Outcome {
    let storage = SimStorage::new(9);
    storage.put(NAME, bytes);
    let mut text = String::new();
    let _ = describe(storage.open(NAME).unwrap(), &mut text);
    match recover(&storage, 64 << 10) {
        Err(error) => Outcome::Refused(error),
        Ok((mut journal, recovered, torn)) => {
            assert!(is_prefix(&recovered, appended), "{recovered:?}");
            // And the journal can go on from there.
            if recovered.len() % 2 == 0 {
                journal.append_set(b"next").unwrap();
                journal.sync().unwrap();
                drop(journal);
                let (_, again, _) = recover(&storage, 64 << 10).unwrap();
                assert_eq!(again.len(), recovered.len() + 1);
            }
            Outcome::Prefix(recovered.len(), torn)
        }
    }
}

/// A segment of the given size with these batches, and its bytes.
fn segment(segment_bytes: u64, batches: &[&[Appended]]) -> Vec<u8> {
    let storage = SimStorage::new(4);
    let (mut journal, _) = open(&storage, segment_bytes).unwrap();
    for batch in batches {
        for entry in *batch {
            entry.append(&mut journal).unwrap();
        }
        journal.sync().unwrap();
    }
    assert_eq!(journal.segments(), 1);
    storage.bytes(NAME).unwrap()
}

/// A segment of 8 KiB, with one batch.
fn small() -> (Vec<u8>, Vec<Appended>) {
    let mut random = Random(3);
    let entries = vec![
        Appended::Set(random.bytes(1001)),
        Appended::Commit(commit(1)),
        Appended::Set(random.bytes(700)),
        Appended::Set(random.bytes(64)),
        Appended::Commit(commit(2)),
    ];
    (segment(8192, &[&entries]), entries)
}

/// A segment of 24 KiB, with four batches of which the last one ends at byte 20,480.
fn four_batches() -> (Vec<u8>, Vec<Appended>) {
    let mut random = Random(3);
    let entries: Vec<_> = (0..4).map(|_| Appended::Set(random.bytes(3000))).collect();
    let batches: Vec<_> = entries.chunks(1).collect();
    (segment(24 << 10, &batches), entries)
}

/// What version 1 wrote once can be read for ever, and is what it writes.
#[test]
fn the_golden_segment_is_still_what_is_written_and_read() {
    let (bytes, entries) = small();
    let golden = include_bytes!("segment_v1.bin");
    assert!(bytes == golden, "the format changed: make a new version");
    assert_eq!(outcome(golden, &entries), Outcome::Prefix(5, false));
}

#[test]
fn a_flipped_bit_is_noticed_wherever_it_is() {
    let (good, entries) = small();
    assert_eq!(outcome(&good, &entries), Outcome::Prefix(5, false));
    let used = good.iter().rposition(|b| *b != 0).unwrap();
    for index in 0..good.len() {
        let mut bytes = good.clone();
        bytes[index] ^= 1 << (index % 8);
        match outcome(&bytes, &entries) {
            Outcome::Refused(_) => assert!(index < 4096, "byte {index}"),
            Outcome::Prefix(count, torn) => {
                assert!(
                    index >= 4096 && torn && (count < 5 || index > used),
                    "byte {index}: {count} entries"
                );
            }
        }
    }
}

#[test]
fn a_truncated_segment_is_refused_at_every_length() {
    let (good, entries) = small();
    for len in 0..good.len() {
        let outcome = outcome(&good[..len], &entries);
        assert!(matches!(outcome, Outcome::Refused(JournalError::Damaged { .. })), "{len}: {outcome:?}");
    }
}

#[test]
fn rot_before_a_later_batch_is_not_taken_for_a_tear() {
    let (good, entries) = four_batches();
    assert_eq!(outcome(&good, &entries), Outcome::Prefix(4, false));
    for index in (0..good.len()).step_by(7).chain(16_384..16_450) {
        let mut bytes = good.clone();
        bytes[index] ^= 0x10;
        match outcome(&bytes, &entries) {
            Outcome::Refused(error) => {
                assert!(matches!(error, JournalError::Damaged { segment: 1, .. }));
                assert!(index < 16_384, "byte {index}");
            }
            Outcome::Prefix(count, torn) => {
                let whole = if index < 16_384 + 3064 { 3 } else { 4 };
                assert!(index >= 16_384 && torn && count == whole, "byte {index}: {count} entries");
            }
        }
    }
}

#[test]
fn zeros_over_the_end_leave_a_prefix() {
    let (good, entries) = small();
    let (batches, batch_entries) = four_batches();
    let cases = [(good, entries, 8192), (batches, batch_entries, 24 << 10)];
    for (good, entries, size) in cases {
        for from in (4096..good.len()).step_by(64) {
            let mut bytes = good.clone();
            bytes[from..].fill(0);
            assert!(matches!(outcome(&bytes, &entries), Outcome::Prefix(..)), "zeros from {from}");
        }
        // A hole, on the other hand, is damage as soon as something later proves it.
        let mut bytes = good;
        bytes[4096..8192].fill(0);
        let holed = outcome(&bytes, &entries);
        assert_eq!(matches!(holed, Outcome::Refused(_)), size > 8192, "{holed:?}");
    }
}

#[test]
fn swapped_and_copied_blocks_are_refused() {
    let (good, entries) = four_batches();
    let block = |n: usize| n * 4096..(n + 1) * 4096;
    for a in 0..6 {
        for b in 0..6 {
            if a == b {
                continue;
            }
            let (mut swapped, mut copied) = (good.clone(), good.clone());
            swapped[block(a)].copy_from_slice(&good[block(b)]);
            swapped[block(b)].copy_from_slice(&good[block(a)]);
            copied[block(a)].copy_from_slice(&good[block(b)]);
            for bytes in [swapped, copied] {
                match outcome(&bytes, &entries) {
                    Outcome::Refused(JournalError::Damaged { .. }) => (),
                    // The last batch went, or something came after it: as a tear.
                    Outcome::Prefix(count, torn) => {
                        let last_went = count == 3 && (a == 4 || b == 4);
                        assert!((count == 4 && torn) || last_went, "{a} and {b}: {count}, {torn}");
                    }
                    Outcome::Refused(error) => panic!("{a} and {b}: {error}"),
                }
            }
        }
    }
}

/// A journal over several segments, and everything in it.
fn several(seed: u64, session: SessionId) -> (SimStorage, Vec<Appended>) {
    let storage = SimStorage::new(seed);
    let shared = std::sync::Arc::new(storage.clone());
    let (mut journal, _) = Journal::open(shared, session, config(16 << 10)).unwrap();
    let mut random = Random(5);
    let mut appended = Vec::new();
    for group in 1..=6 {
        for entry in [Appended::Set(random.bytes(4500)), Appended::Commit(commit(group))] {
            entry.append(&mut journal).unwrap();
            appended.push(entry);
        }
        journal.sync().unwrap();
    }
    assert!(journal.segments() >= 4);
    (storage, appended)
}

#[test]
fn segments_of_other_journals_are_refused() {
    let (storage, appended) = several(1, SESSION);
    let (twin, _) = several(2, SESSION);
    let (stranger, _) = several(3, SessionId::from_bytes([5; 16]));
    let names = storage.list().unwrap();
    for (index, name) in names.iter().enumerate() {
        let good = storage.bytes(name).unwrap();
        storage.put(name, &stranger.bytes(name).unwrap());
        let error = recover(&storage, 16 << 10).unwrap_err();
        assert!(matches!(error, JournalError::ForeignSession { .. }), "{error}");

        // The same entries under another salt.
        storage.put(name, &twin.bytes(name).unwrap());
        let error = recover(&storage, 16 << 10).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{error}");

        // The entries of the twin under our own header.
        let mixed = [&good[..4096], &twin.bytes(name).unwrap()[4096..]].concat();
        storage.put(name, &mixed);
        match recover(&storage, 16 << 10) {
            Err(JournalError::Damaged { .. }) => (),
            Ok((_, recovered, torn)) => {
                assert!(index + 1 == names.len() && torn && is_prefix(&recovered, &appended));
            }
            Err(error) => panic!("{error}"),
        }

        // Another segment of our own.
        storage.put(name, &storage.bytes(&names[(index + 1) % names.len()]).unwrap());
        let error = recover(&storage, 16 << 10).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { at: 0, .. }), "{error}");
        storage.put(name, &good);
    }
    recover(&storage, 16 << 10).unwrap();
}

#[test]
fn a_missing_or_emptied_segment_is_refused() {
    for index in 0..4 {
        let (storage, appended) = several(1, SESSION);
        let names = storage.list().unwrap();
        storage.put(&names[index], &[0; 16 << 10]);
        let error = recover(&storage, 16 << 10).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { at: 0, .. }), "{error}");
        storage.remove(&names[index]).unwrap();
        let missing = recover(&storage, 16 << 10);
        match index {
            0 => {
                // The rest looks like a trimmed journal.
                let (_, recovered, _) = missing.unwrap();
                assert!(matches!(recovered[0], Recovered::Standing(_)));
                assert!(recovered.len() < appended.len());
            }
            _ if index + 1 < names.len() => {
                let segment = index as u64 + 1;
                assert_eq!(missing.unwrap_err(), JournalError::Missing { segment });
            }
            _ => (),
        }
    }
}

#[test]
fn rot_in_an_earlier_segment_is_found_when_it_is_read() {
    let (storage, appended) = several(1, SESSION);
    let good = storage.bytes("00000002.seg").unwrap();
    for at in [4096, 5000, 9000] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        storage.put("00000002.seg", &bytes);
        let (_, mut recovery) = open(&storage, 16 << 10).unwrap();
        let before: Vec<_> = recovery.by_ref().map_while(Result::ok).collect();
        assert!(before.len() < appended.len() && is_prefix(&before, &appended));
        assert!(recovery.next().is_none(), "nothing comes after an error");
        let error = recover(&storage, 16 << 10).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { segment: 2, .. }));
    }
}

#[test]
fn another_version_is_called_by_its_number() {
    let (mut bytes, entries) = small();
    bytes[8] = 2;
    assert!(matches!(outcome(&bytes, &entries), Outcome::Refused(JournalError::Damaged { .. })), "it rotted");
    let sum = blake3::hash(&bytes[..96]);
    bytes[96..128].copy_from_slice(sum.as_bytes());
    let expected = JournalError::UnknownVersion { segment: 1, version: 2 };
    assert_eq!(outcome(&bytes, &entries), Outcome::Refused(expected));
}
