//! A crash at every point of a run. `TWINFS_CRASH_SEED=n` runs seed n instead of the usual ones.

use twinfs_core::delta::SetLocation;
use twinfs_replicator::replica::journal::{Journal, JournalError, Recovered};
use twinfs_replicator::storage::{SimStorage, Storage};

use super::{Appended, Random, commit, open, recover};

const SEGMENT_BYTES: u64 = 256 << 10;

/// What a run did before the power went, as a test remembers it.
#[derive(Clone, Default)]
pub(super) struct History {
    /// Everything that was handed to the journal, also what it had no time to answer for.
    appended: Vec<Appended>,
    places: Vec<SetLocation>,
    /// How many of them a sync answered for.
    acknowledged: usize,
    /// Entries from this one on were never given up by a trim.
    kept_from: usize,
    groups: u64,
}

impl History {
    /// Two volumes' worth of sets and commits, synced and trimmed now and then, until `steps` are done or the power
    /// goes.
    pub(super) fn run(
        &mut self,
        journal: &mut Journal,
        random: &mut Random,
        steps: usize,
    ) -> Result<(), JournalError> {
        for _ in 0..steps {
            match random.below(10) {
                0..6 => {
                    let len = if random.below(8) == 0 { 66_000 } else { 30 + random.below(3000) };
                    self.append(journal, Appended::Set(random.bytes(len as usize)))?;
                }
                6..8 => {
                    self.append(journal, Appended::Commit(commit(self.groups + 1)))?;
                    self.groups += 1;
                }
                _ => {
                    journal.sync()?;
                    self.acknowledged = self.appended.len();
                    if random.below(4) == 0 && self.acknowledged > 0 {
                        let upto = random.below(self.acknowledged as u64) as usize;
                        self.kept_from = self.kept_from.max(upto);
                        journal.trim(self.places[self.kept_from])?;
                    }
                }
            }
        }
        Ok(())
    }

    fn append(&mut self, journal: &mut Journal, entry: Appended) -> Result<(), JournalError> {
        self.appended.push(entry);
        let entry = self.appended.last().expect("it was just pushed");
        let place = entry.append(journal)?.unwrap_or_else(|| journal.end());
        self.places.push(place);
        Ok(())
    }

    /// Forgets an entry that the journal refused, and so never took.
    pub(super) fn take_back(&mut self) {
        self.appended.truncate(self.places.len());
    }

    /// Checks what came back, and goes on from it: the rest is lost, and was never acknowledged.
    pub(super) fn check(&mut self, recovered: &[Recovered], end: SetLocation, context: &str) {
        let (standing, entries) = match recovered.split_first() {
            Some((Recovered::Standing(commit), rest)) => (Some(commit), rest),
            _ => (None, recovered),
        };
        // The sets are random, so at most one place fits, unless nothing but a standing commit came back.
        let matches = |from: usize| {
            from + entries.len() <= self.appended.len()
                && self.appended[from..].iter().zip(entries).all(|(a, r)| a.is(r))
                && self.last_commit(from) == standing
        };
        let froms = 0..=self.kept_from;
        let fits = |from: &usize| matches(*from) && from + entries.len() >= self.acknowledged;
        let Some(from) = froms.rev().find(fits) else {
            panic!(
                "{context}: {} entries came back (standing: {}), which are not those from at most {} on up to at \
                 least {}, of {}",
                entries.len(),
                standing.is_some(),
                self.kept_from,
                self.acknowledged,
                self.appended.len()
            );
        };
        self.appended.truncate(from + entries.len());
        self.places.truncate(self.appended.len());
        // The last one may have had no answer, and yet be there.
        self.places.resize(self.appended.len(), end);
        self.acknowledged = self.appended.len();
        self.groups = self.last_commit(self.appended.len()).map_or(0, |commit| commit.group.0);
    }

    /// The last commit before an entry, if a trim could have made it a standing one.
    fn last_commit(&self, before: usize) -> Option<&twinfs_replicator::replica::journal::Commit> {
        self.appended[..before].iter().rev().find_map(|appended| match appended {
            Appended::Commit(commit) => Some(commit),
            Appended::Set(_) => None,
        })
    }
}

/// Runs until the power goes at the given change, and says whether the run ended before it. For each crash seed then:
/// crashes and recovers, runs until the next cut, twice more.
fn crash_thrice(run_seed: u64, cut_at: u64) -> bool {
    let storage = SimStorage::new(run_seed);
    storage.cut_power_at(cut_at);
    let mut random = Random(run_seed);
    let mut history = History::default();
    let ended = open(&storage, SEGMENT_BYTES)
        .and_then(|(mut journal, _)| history.run(&mut journal, &mut random, 150))
        .is_ok();
    let crash_seeds = if cut_at.is_multiple_of(4) { 0..8 } else { 0..4 };
    for crash_seed in crash_seeds {
        let (mut history, mut random) = (history.clone(), Random(run_seed + cut_at));
        let mut disk = storage.clone();
        for again in 0..3 {
            let context = format!(
                "TWINFS_CRASH_SEED={run_seed} cargo test -p twinfs-replicator --test journal crash: cut at {cut_at}, \
                 crash seed {crash_seed}, again {again}"
            );
            disk = disk.crash(crash_seed + again);
            let (mut journal, recovered, _) = recover(&disk, SEGMENT_BYTES).expect(&context);
            history.check(&recovered, journal.end(), &context);
            disk.cut_power_at(random.below(20));
            let _ = history.run(&mut journal, &mut random, 30);
        }
    }
    ended
}

/// The second entry of a torn batch reached the disk, the first did not. It must not come back once another first entry
/// of the same size has been written.
#[test]
fn what_was_torn_never_comes_back() {
    let mut torn_batches = 0;
    for seed in 0..64 {
        let storage = SimStorage::new(seed);
        let (mut journal, _) = open(&storage, 64 << 10).unwrap();
        journal.append_set(b"durable").unwrap();
        journal.sync().unwrap();
        // Header and payload fill a block, so the second entry stands where the next batch would.
        journal.append_set(&[1; 4096 - 64]).unwrap();
        journal.append_set(b"second").unwrap();
        storage.cut_power_at(storage.changes() + 2);
        journal.sync().unwrap_err();

        let disk = storage.crash(seed);
        let (mut journal, before, torn) = recover(&disk, 64 << 10).unwrap();
        torn_batches += usize::from(torn && before.len() == 1);
        journal.append_set(&[2; 4096 - 64]).unwrap();
        journal.sync().unwrap();
        let (_, after, _) = recover(&disk.crash(0), 64 << 10).unwrap();
        assert!(after.starts_with(&before), "seed {seed}");
        assert_eq!(after.len(), before.len() + 1, "seed {seed}");
    }
    assert!(torn_batches > 10, "{torn_batches}");
}

/// Whatever a crash keeps of a new segment's header and of the standing commit behind it, also several times in a row.
#[test]
fn a_crash_while_a_segment_is_made_loses_no_commit() {
    for (cut, seed) in (1..=8).flat_map(|cut| (0..24).map(move |seed| (cut, seed))) {
        let mut disk = SimStorage::new(seed);
        let (mut journal, _) = open(&disk, 64 << 10).unwrap();
        journal.append_set(&[1; 40_000]).unwrap();
        journal.append_commit(&commit(1)).unwrap();
        journal.sync().unwrap();
        for again in 0..3 {
            disk.cut_power_at(disk.changes() + cut);
            let _ = journal.append_set(&[2; 40_000]);
            disk = disk.crash(seed + again);
            let recovered;
            (journal, recovered, _) = recover(&disk, 64 << 10).unwrap();
            let context = format!("cut {cut}, seed {seed}, again {again}");
            assert_eq!(journal.last_commit(), Some(&commit(1)), "{context}");
            let known = [Recovered::Commit(commit(1)), Recovered::Standing(commit(1))];
            assert!(recovered.iter().any(|r| known.contains(r)), "{context}");
            journal.trim(journal.end()).unwrap();
            assert!(recover(&disk.crash(0), 64 << 10).unwrap().0.last_commit().is_some(), "{context}");
        }
        journal.append_set(&[3; 40_000]).unwrap();
        journal.append_commit(&commit(2)).unwrap();
        journal.sync().unwrap();
        journal.trim(journal.end()).unwrap();
        let (_, recovered, _) = recover(&disk.crash(0), 64 << 10).unwrap();
        assert_eq!(recovered.len(), 3);
        assert_eq!(recovered[0], Recovered::Standing(commit(1)));
        assert_eq!(recovered[2], Recovered::Commit(commit(2)));
    }
}

fn run_seeds() -> Vec<u64> {
    match std::env::var("TWINFS_CRASH_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => vec![11, 12],
    }
}

#[test]
fn no_crash_loses_what_was_acknowledged_or_shows_what_was_not_written() {
    for run_seed in run_seeds() {
        let mut cut_at = 1;
        while !crash_thrice(run_seed, cut_at) {
            cut_at += 1;
        }
        assert!(cut_at > 50, "the run is too short to say much: {cut_at}");
    }
}

#[test]
fn the_same_seeds_give_the_same_bytes() {
    let run = || {
        let storage = SimStorage::new(5);
        storage.cut_power_at(60);
        let (mut journal, _) = open(&storage, SEGMENT_BYTES).unwrap();
        let _ = History::default().run(&mut journal, &mut Random(5), 200);
        let image = storage.crash(77);
        let names = image.list().unwrap();
        names.into_iter().map(|name| (image.bytes(&name).unwrap(), name)).collect::<Vec<_>>()
    };
    let first = run();
    assert!(!first.is_empty());
    assert!(first == run());
}
