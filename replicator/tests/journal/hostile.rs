//! Damage of every kind, anywhere in a journal of several segments and batches. The rule is always the same: it is refused
//! by a typed error, or everything that was durable comes back byte for byte, but for the very last batch, where rot and
//! a tear look alike; and nothing that was not appended ever comes back.
//!
//! `TWINFS_SEED=n` runs the random flips with another seed.

use std::sync::Arc;

use twinfs_core::id::SessionId;
use twinfs_replicator::replica::journal::{Journal, JournalError, Recovered};
use twinfs_replicator::storage::{SimStorage, Storage};

use super::memory::Memory;
use super::{Appended, Random, SESSION, commit, config};

const BLOCK: usize = 4096;

/// A journal, what it gives back while it is whole, and how much of that came before the last batch.
struct Fixture {
    disk: Memory,
    names: Vec<String>,
    segment_bytes: u64,
    whole: Vec<Recovered>,
    before_last: usize,
}

/// What became of a damaged journal.
#[derive(Debug, PartialEq)]
enum Verdict {
    Refused,
    /// So many entries came back; whether a torn batch was reported.
    Recovered(usize, bool),
}

fn recover(disk: &Memory, segment_bytes: u64) -> (Vec<Recovered>, Result<bool, JournalError>) {
    let mut entries = Vec::new();
    let mut read = || {
        let (_, mut recovery) = Journal::open(Arc::new(disk.clone()), SESSION, config(segment_bytes))?;
        let torn = recovery.is_torn();
        for entry in recovery.by_ref() {
            entries.push(entry?);
        }
        Ok(torn)
    };
    let result = read();
    (entries, result)
}

impl Fixture {
    /// Batches of one set and one commit each, over as many segments as that takes; the first `trimmed` batches are
    /// trimmed.
    fn new(salts: u64, session: SessionId, segment_bytes: u64, sets: &[usize], trimmed: usize) -> Self {
        let storage = SimStorage::new(salts);
        let (mut journal, _) =
            Journal::open(Arc::new(storage.clone()), session, config(segment_bytes)).unwrap();
        let mut random = Random(5);
        let mut places = Vec::new();
        for (batch, len) in sets.iter().enumerate() {
            places.push(journal.append_set(&random.bytes(*len)).unwrap());
            journal.append_commit(&commit(batch as u64 + 1)).unwrap();
            journal.sync().unwrap();
        }
        if trimmed > 0 {
            assert!(journal.trim(places[trimmed]).unwrap().segments > 0);
        }
        let disk = Memory::of(&storage);
        let names = disk.list().unwrap();
        let (whole, torn) = recover(&disk, segment_bytes);
        let (before_last, torn) = if session == SESSION { (whole.len() - 2, torn) } else { (0, Ok(false)) };
        assert_eq!(torn, Ok(false));
        Self { disk, names, segment_bytes, whole, before_last }
    }

    /// Three segments, each a header and two batches.
    fn small() -> Self {
        Self::new(1, SESSION, 16 << 10, &[1500, 700, 2000, 90, 1001, 333], 0)
    }

    /// Opens and reads what is there, and checks the rule.
    fn judge(&self, what: impl Fn() -> String) -> Verdict {
        let (entries, torn) = recover(&self.disk, self.segment_bytes);
        assert!(self.whole.starts_with(&entries), "{}: something else came back", what());
        match torn {
            Ok(torn) => {
                assert!(entries.len() >= self.before_last, "{}: {} came back", what(), entries.len());
                Verdict::Recovered(entries.len(), torn)
            }
            Err(JournalError::Poisoned | JournalError::Full { .. }) => panic!("{}: not damage", what()),
            Err(_) => Verdict::Refused,
        }
    }

    /// Judges with a file changed in place, and takes the change back.
    fn judge_with(&self, name: &str, range: std::ops::Range<usize>, new: &[u8]) -> Verdict {
        let mut old = Vec::new();
        self.disk.change(name, |bytes| {
            old = bytes[range.clone()].to_vec();
            bytes[range.clone()].copy_from_slice(new);
        });
        let verdict = self.judge(|| format!("{name} changed at {range:?}"));
        self.disk.change(name, |bytes| bytes[range].copy_from_slice(&old));
        verdict
    }

    fn flip(&self, name: &str, at: usize, bit: u32) -> Verdict {
        let mut byte = 0;
        self.disk.change(name, |bytes| byte = bytes[at]);
        self.judge_with(name, at..at + 1, &[byte ^ (1 << bit)])
    }

    fn is_last(&self, name: &str) -> bool {
        self.names.last().is_some_and(|last| last == name)
    }
}

/// Segments as small as they can be with a commit before them: header, standing commit, one batch.
const SMALLEST: u64 = 12 << 10;

fn smallest(trimmed: usize) -> Fixture {
    let fixture = Fixture::new(1, SESSION, SMALLEST, &[6500, 700, 900], trimmed);
    assert_eq!(fixture.names.len(), 3 - trimmed);
    fixture
}

/// In `damage.rs` it is a single segment of 8 KiB; here the damaged one has others before and after it.
#[test]
fn one_bit_flipped_at_every_byte_is_noticed_in_every_segment() {
    for trimmed in [0, 1] {
        let fixture = smallest(trimmed);
        for name in &fixture.names {
            for at in 0..SMALLEST as usize {
                // The zeros after the end of an earlier segment belong to nothing: a bit there harms nobody.
                match fixture.flip(name, at, (at % 8) as u32) {
                    Verdict::Refused => {
                        assert!(at < 2 * BLOCK || !fixture.is_last(name), "{name}, byte {at}")
                    }
                    Verdict::Recovered(count, torn) => {
                        let unused = !fixture.is_last(name) && count == fixture.whole.len() && !torn;
                        let tear = fixture.is_last(name) && torn;
                        assert!(at >= BLOCK && (unused || tear), "{name}, byte {at}: {count}, {torn}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_truncation_at_every_byte_is_refused_in_every_segment() {
    let fixture = smallest(0);
    for name in &fixture.names {
        let good = fixture.disk.bytes(name);
        for len in 0..good.len() {
            fixture.disk.put(name, good[..len].to_vec());
            assert_eq!(
                fixture.judge(|| format!("{name} cut at {len}")),
                Verdict::Refused,
                "{name} cut at {len}"
            );
        }
        // Nor may it be longer.
        fixture.disk.put(name, [&good[..], &[0]].concat());
        assert_eq!(fixture.judge(|| format!("{name} and a byte")), Verdict::Refused);
        fixture.disk.put(name, good);
    }
}

/// What a file system does after a crash with a size that it kept and data that it lost.
#[test]
fn zeros_from_anywhere_to_the_end_of_a_segment_give_back_nothing_else() {
    let mut fixture = Fixture::small();
    let used = |bytes: &[u8]| bytes.iter().rposition(|b| *b != 0).unwrap();
    for name in fixture.names.clone() {
        let good = fixture.disk.bytes(&name);
        for from in (0..good.len()).step_by(64) {
            // Zeros over several batches of the last segment look like a log that ends earlier. The primary notices.
            fixture.before_last =
                if fixture.is_last(&name) { fixture.whole.len() - 4 } else { fixture.whole.len() };
            let verdict = fixture.judge_with(&name, from..good.len(), &vec![0; good.len() - from]);
            // The last segment is known to start with a header and the standing commit; the others go on to their end.
            let known = if fixture.is_last(&name) { used(&good[..2 * BLOCK]) } else { used(&good) };
            assert_eq!(verdict == Verdict::Refused, from <= known, "{name}, zeros from {from}: {verdict:?}");
        }
    }
}

/// Two writes that changed places, also between segments.
#[test]
fn blocks_that_changed_places_are_refused() {
    let fixture = Fixture::small();
    let per_segment = fixture.segment_bytes as usize / BLOCK;
    let block = |index: usize| {
        let name = fixture.names[index / per_segment].as_str();
        let at = index % per_segment * BLOCK;
        (name, at..at + BLOCK)
    };
    let count = fixture.names.len() * per_segment;
    for (a, b) in (0..count).flat_map(|a| (a + 1..count).map(move |b| (a, b))) {
        let ((name_a, range_a), (name_b, range_b)) = (block(a), block(b));
        let (bytes_a, bytes_b) = (
            fixture.disk.bytes(name_a)[range_a.clone()].to_vec(),
            fixture.disk.bytes(name_b)[range_b.clone()].to_vec(),
        );
        if bytes_a == bytes_b {
            continue;
        }
        fixture.disk.change(name_a, |bytes| bytes[range_a.clone()].copy_from_slice(&bytes_b));
        let verdict = fixture.judge_with(name_b, range_b, &bytes_a);
        fixture.disk.change(name_a, |bytes| bytes[range_a].copy_from_slice(&bytes_a));
        // A block may have come from the last batch, or to the zeros after the end; else it is noticed.
        let harmless = [&bytes_a, &bytes_b].iter().any(|bytes| bytes.iter().all(|b| *b == 0));
        let last_batch = b >= count - per_segment;
        assert!(verdict == Verdict::Refused || harmless || last_batch, "{a} and {b}: {verdict:?}");
    }
    assert_eq!(fixture.judge(String::new), Verdict::Recovered(fixture.whole.len(), false));
}

/// The same entries under other salts (a journal of an earlier life of the same session, from a backup), and the same
/// entries of another session, block by block and as whole segments.
#[test]
fn blocks_of_another_journal_are_never_taken() {
    let fixture = Fixture::small();
    let sets = [1500, 700, 2000, 90, 1001, 333];
    let earlier = Fixture::new(2, SESSION, fixture.segment_bytes, &sets, 0);
    let stranger = Fixture::new(1, SessionId::from_bytes([9; 16]), fixture.segment_bytes, &sets, 0);
    for other in [&earlier, &stranger] {
        for name in &fixture.names {
            let theirs = other.disk.bytes(name);
            for at in (0..theirs.len()).step_by(BLOCK) {
                let block = &theirs[at..at + BLOCK];
                let verdict = fixture.judge_with(name, at..at + BLOCK, block);
                let is_zero = block.iter().all(|b| *b == 0);
                match verdict {
                    Verdict::Refused => {}
                    // Only where the log goes on behind it can anybody know.
                    Verdict::Recovered(count, torn) => {
                        assert!(at > 0 && (is_zero || fixture.is_last(name)), "{name} at {at}");
                        assert!(is_zero || (torn && count < fixture.whole.len()), "{name} at {at}");
                    }
                }
            }
            let all = fixture.judge_with(name, 0..theirs.len(), &theirs);
            assert_eq!(all, Verdict::Refused, "{name}");
            // All of its entries under our own header.
            let entries = fixture.judge_with(name, BLOCK..theirs.len(), &theirs[BLOCK..]);
            assert!(entries == Verdict::Refused || fixture.is_last(name), "{name}: {entries:?}");
        }
    }
}

/// Blocks that never reached the medium although its disk said so, below others that did: what stood there before.
#[test]
fn lost_writes_below_later_ones_are_refused() {
    let storage = SimStorage::new(1);
    let (mut journal, _) = Journal::open(Arc::new(storage.clone()), SESSION, config(64 << 10)).unwrap();
    let mut random = Random(5);
    let mut generations = Vec::new();
    for group in 1..=8 {
        for entry in [Appended::Set(random.bytes(3000)), Appended::Commit(commit(group))] {
            entry.append(&mut journal).unwrap();
        }
        journal.sync().unwrap();
        generations.push(storage.bytes("00000001.seg").unwrap());
    }
    let fixture = Fixture::new(1, SESSION, 64 << 10, &[3000; 8], 0);
    let last = generations.last().unwrap().clone();
    assert!(fixture.disk.bytes("00000001.seg") == last);
    for old in &generations[..7] {
        for at in (0..last.len()).step_by(BLOCK) {
            let (range, block) = (at..at + BLOCK, &old[at..at + BLOCK]);
            if *block != last[range.clone()] {
                let verdict = fixture.judge_with("00000001.seg", range, block);
                let is_last_batch = at >= BLOCK * 8;
                assert!(verdict == Verdict::Refused || is_last_batch, "block at {at}: {verdict:?}");
            }
        }
    }
}

/// Sixteen sets to a segment of 1 MiB, and two segments.
fn large(number: u64) -> Fixture {
    let mut random = Random(number);
    let sets: Vec<usize> = (0..30).map(|_| 40_000 + random.below(50_000) as usize).collect();
    let fixture = Fixture::new(number, SESSION, 1 << 20, &sets, 0);
    assert!(fixture.names.len() >= 2);
    fixture
}

fn flips_in_large_segments(number: u64, seed: u64, count: usize) -> usize {
    let fixture = large(number);
    let mut random = Random(seed);
    let mut noticed = 0;
    for _ in 0..count {
        let name = &fixture.names[random.below(fixture.names.len() as u64) as usize];
        let (at, bit) = (random.below(fixture.segment_bytes) as usize, random.below(8) as u32);
        match fixture.flip(name, at, bit) {
            Verdict::Recovered(count, false) => {
                // After the end of an earlier segment.
                assert!(!fixture.is_last(name) && count == fixture.whole.len(), "{name}, byte {at}");
            }
            _ => noticed += 1,
        }
    }
    noticed
}

#[test]
fn ten_thousand_flips_in_large_segments_are_noticed() {
    let seed = std::env::var("TWINFS_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!(
        "replay: TWINFS_SEED={seed} cargo test -p twinfs-replicator --test journal -- --exact \
         hostile::ten_thousand_flips_in_large_segments_are_noticed"
    );
    const EACH: usize = 2500;
    let noticed: usize = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|number| scope.spawn(move || flips_in_large_segments(number + 1, seed * 4 + number, EACH)))
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert!(noticed > 4 * EACH * 9 / 10, "{noticed}");
}
