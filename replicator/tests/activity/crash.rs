//! A crash, or a failing disk, at every point of a run. `TWINFS_CRASH_SEED=n` runs seed n instead of the usual ones.

use std::collections::BTreeSet;

use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::activity_log::{ActivityError, ActivityLog, EraId, Found};
use twinfs_replicator::storage::{Fault, Operation, SimStorage};

use super::{Name, Random, era_files, name, open, touch};

/// An era as a test remembers it. The first one of a run is what that run found.
#[derive(Debug, Clone, Default)]
struct Era {
    touched: BTreeSet<Name>,
    /// Those of them that a flush answered for.
    promised: BTreeSet<Name>,
    id: Option<EraId>,
}

/// What a run did, as a test remembers it.
#[derive(Debug, Clone, Default)]
struct History {
    eras: Vec<Era>,
    /// Eras whose removal was not answered for: they may be found or not.
    leaving: Vec<Era>,
    clock: u64,
}

impl History {
    fn started(&mut self, found: &Found) {
        let files: BTreeSet<Name> = found.files.iter().copied().collect();
        self.leaving.clear();
        self.eras = vec![Era { touched: files.clone(), promised: files, id: None }, Era::default()];
    }

    /// Touches, flushes, ends eras and has them go, until `steps` are done or the log fails.
    fn run(&mut self, log: &ActivityLog, random: &mut Random, steps: usize) -> Result<(), ActivityError> {
        for _ in 0..steps {
            match random.below(12) {
                0..6 => {
                    let from = random.below(60);
                    let count = if random.below(6) == 0 { 50 } else { 1 + random.below(4) };
                    let names: Vec<Name> = (from..from + count).map(name).collect();
                    touch(log, &names)?;
                    self.eras.last_mut().unwrap().touched.extend(names);
                }
                6..8 => {
                    log.flush()?;
                    self.all_promised();
                }
                8 => {
                    let (volume, file) = name(random.below(60));
                    let era = self.eras.last().unwrap();
                    let is_named = era.touched.contains(&(volume, file));
                    log.flush_file(volume, file)?;
                    assert!(log.is_durable(volume, file));
                    if is_named {
                        self.eras.last_mut().unwrap().promised.insert((volume, file));
                    }
                }
                9 => {
                    let mark = log.mark();
                    log.wait_durable(mark)?;
                    assert!(log.durable_mark() >= mark);
                    self.all_promised();
                }
                10 if self.eras.len() < 5 => {
                    self.clock += 1;
                    let id = log.end_era(&|| Timestamp(self.clock))?;
                    self.eras.last_mut().unwrap().id = Some(id);
                    self.all_promised();
                    self.eras.push(Era::default());
                }
                10 => {}
                _ => self.release(log, random)?,
            }
        }
        Ok(())
    }

    fn release(&mut self, log: &ActivityLog, random: &mut Random) -> Result<(), ActivityError> {
        let ended = self.eras.len() - 1;
        let count = random.below(ended as u64 + 1) as usize;
        let Some(through) = self.eras[..count].last().and_then(|era| era.id) else { return Ok(()) };
        self.leaving = self.eras.drain(..count).collect();
        log.release(through)?;
        self.leaving.clear();
        Ok(())
    }

    fn all_promised(&mut self) {
        for era in &mut self.eras {
            era.promised = era.touched.clone();
        }
    }

    /// Everything that was promised is found, and nothing that was never touched, or was removed for good.
    fn check(&self, found: &Found, context: &str) {
        let files: BTreeSet<Name> = found.files.iter().copied().collect();
        assert_eq!(files.len(), found.files.len(), "{context}: each file is told once");
        for era in &self.eras {
            let missing: Vec<_> = era.promised.difference(&files).collect();
            assert!(missing.is_empty(), "{context}: not found: {missing:?}");
        }
        let known: BTreeSet<Name> =
            self.eras.iter().chain(&self.leaving).flat_map(|era| era.touched.iter().copied()).collect();
        let strange: Vec<_> = files.difference(&known).collect();
        assert!(strange.is_empty(), "{context}: found, but never touched or gone for good: {strange:?}");
    }
}

fn start(disk: &SimStorage, history: &mut History) -> Result<ActivityLog, ActivityError> {
    let (log, found) = open(disk)?;
    history.started(&found);
    log.settle_found(Timestamp(0));
    Ok(log)
}

/// Runs until the power goes at the given change, and says whether the run ended before it. For each crash seed then:
/// crashes and starts again, runs until the next cut, twice more.
fn crash_thrice(run_seed: u64, cut_at: u64) -> bool {
    let storage = SimStorage::new(run_seed);
    storage.cut_power_at(cut_at);
    let mut history = History::default();
    let mut random = Random(run_seed);
    let ended = start(&storage, &mut history).and_then(|log| history.run(&log, &mut random, 120)).is_ok();
    for crash_seed in 0..4 {
        let (mut history, mut random) = (history.clone(), Random(run_seed + cut_at));
        let mut disk = storage.clone();
        for again in 0..3 {
            let context = format!(
                "TWINFS_CRASH_SEED={run_seed} cargo test -p twinfs-replicator --test activity crash: cut at {cut_at}, \
                 crash seed {crash_seed}, again {again}"
            );
            disk = disk.crash(crash_seed + again);
            // What a start finds is looked at on a copy, so that the power can go during a start, too.
            let (_, found) = open(&disk.crash(1)).expect(&context);
            assert!(!found.everything, "{context}: a crash is no damage");
            history.check(&found, &context);
            disk.cut_power_at(random.below(25));
            if let Ok(log) = start(&disk, &mut history) {
                let _ = history.run(&log, &mut random, 30);
            }
        }
    }
    ended
}

fn run_seeds() -> Vec<u64> {
    match std::env::var("TWINFS_CRASH_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => vec![21, 22],
    }
}

#[test]
fn no_crash_loses_what_a_flush_answered_for() {
    for run_seed in run_seeds() {
        let mut cut_at = 1;
        while !crash_thrice(run_seed, cut_at) {
            cut_at += 1;
        }
        assert!(cut_at > 60, "the run is too short to say much: {cut_at}");
    }
}

/// Whatever fails, and whenever: what was promised is found, or everything has to be compared. And because what is
/// touched after the failure is not in the log, it always has to be, unless the disk took nothing any more.
#[test]
fn after_a_failure_everything_has_to_be_compared() {
    for operation in [
        Operation::Create,
        Operation::Write,
        Operation::SyncData,
        Operation::SyncDir,
        Operation::Rename,
        Operation::Remove,
    ] {
        for after in 0..40 {
            let context = format!("{operation} fails after {after}");
            let disk = SimStorage::new(after);
            let mut history = History::default();
            let log = start(&disk, &mut history).unwrap();
            disk.inject(Fault { operation, after, errno: rustix::io::Errno::IO });
            let Err(error) = history.run(&log, &mut Random(after), 200) else { continue };
            assert_eq!(log.failure(), Some(error.clone()), "{context}");
            assert_eq!(touch(&log, &[name(77)]), Err(error.clone()), "{context}");
            log.touch(super::V, std::iter::empty()).expect_err(&context);
            drop(log);
            for image in [disk.restart(), disk.crash(0), disk.crash(1), disk.crash(after + 2)] {
                let (_, found) = open(&image).expect(&context);
                assert!(found.everything, "{context}");
                let (_, again) = open(&image.crash(0)).expect(&context);
                assert!(again.everything, "{context}: it is said until it is dealt with");
            }
        }
    }
}

#[test]
fn a_log_that_failed_can_begin_anew() {
    let disk = SimStorage::new(1);
    let (log, _) = open(&disk).unwrap();
    touch(&log, &[name(1)]).unwrap();
    disk.inject(Fault { operation: Operation::SyncData, after: 0, errno: rustix::io::Errno::IO });
    log.flush().unwrap_err();
    disk.inject(Fault { operation: Operation::Write, after: 0, errno: rustix::io::Errno::NOSPC });
    log.recover(&|| Timestamp(5)).unwrap_err();
    touch(&log, &[name(2)]).unwrap_err();
    log.recover(&|| Timestamp(6)).unwrap();
    assert_eq!(log.failure(), None);
    touch(&log, &[name(3)]).unwrap();
    assert!(log.is_durable(name(3).0, name(3).1), "the era stands for everything, durably");
    assert!(super::found(&disk.crash(0)).everything);

    let ended = log.end_era(&|| Timestamp(7)).unwrap();
    touch(&log, &[name(4)]).unwrap();
    log.flush().unwrap();
    log.release(ended).unwrap();
    let found = super::found(&disk.crash(0));
    assert_eq!((found.files, found.everything), (vec![name(4)], false));
}

/// A full disk takes neither bytes nor new files, but it takes the mark; and whoever was told that the log has failed finds
/// it there.
#[test]
fn a_full_disk_takes_the_mark_of_a_failure() {
    for errno in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
        let disk = SimStorage::new(1);
        let (log, _) = open(&disk).unwrap();
        touch(&log, &[name(1)]).unwrap();
        for _ in 0..50 {
            disk.inject(Fault { operation: Operation::Write, after: 0, errno });
            disk.inject(Fault { operation: Operation::Create, after: 0, errno });
        }
        let failed = log.flush_file(name(1).0, name(1).1).unwrap_err();
        assert!(failed.trouble().contains("no space left on device"), "{}", failed.trouble());
        for seed in 0..4 {
            assert!(super::found(&disk.crash(seed)).everything, "{errno}");
        }
    }
}

/// The mark is tried again before an fsync returns, until the disk takes it.
#[test]
fn an_fsync_after_a_failure_waits_for_the_mark() {
    let disk = SimStorage::new(1);
    let (log, _) = open(&disk).unwrap();
    touch(&log, &[name(1)]).unwrap();
    disk.inject(Fault { operation: Operation::Write, after: 0, errno: rustix::io::Errno::IO });
    disk.inject(Fault { operation: Operation::Rename, after: 0, errno: rustix::io::Errno::IO });
    log.flush().unwrap_err();
    assert!(!super::found(&disk.crash(0)).everything, "the disk did not take the mark");
    log.flush_file(name(2).0, name(2).1).unwrap_err();
    assert!(super::found(&disk.crash(0)).everything);
}

/// However often it fails and begins anew, and wherever the power goes meanwhile: everything has to be compared, until the
/// era goes that says so; and the log does not grow.
#[test]
fn a_power_loss_while_it_begins_anew_is_covered() {
    for cut_at in 1.. {
        let disk = SimStorage::new(cut_at);
        let (log, _) = open(&disk).unwrap();
        touch(&log, &[name(1)]).unwrap();
        let before = era_files(&disk).len();
        for round in 0..5 {
            disk.inject(Fault { operation: Operation::SyncData, after: 0, errno: rustix::io::Errno::IO });
            log.flush().unwrap_err();
            log.recover(&|| Timestamp(10 + round)).unwrap();
            touch(&log, &[name(2 + round)]).unwrap();
            log.end_era(&|| Timestamp(10 + round)).unwrap();
            touch(&log, &[name(20 + round)]).unwrap();
        }
        assert!(era_files(&disk).len() <= before + 2, "{:?}", era_files(&disk));
        disk.inject(Fault { operation: Operation::Write, after: 0, errno: rustix::io::Errno::NOSPC });
        log.flush().unwrap_err();
        disk.cut_power_at(cut_at);
        let ended = log.recover(&|| Timestamp(50)).is_ok();
        for seed in 0..4 {
            assert!(super::found(&disk.crash(seed)).everything, "cut at {cut_at}, seed {seed}");
        }
        if ended && cut_at > 20 {
            return;
        }
    }
}

#[test]
fn the_same_seeds_give_the_same_bytes() {
    let run = || {
        let storage = SimStorage::new(5);
        storage.cut_power_at(60);
        let mut history = History::default();
        let log = start(&storage, &mut history).unwrap();
        let _ = history.run(&log, &mut Random(5), 200);
        let image = storage.crash(77);
        twinfs_replicator::storage::Storage::list(&image)
            .unwrap()
            .into_iter()
            .map(|name| (image.bytes(&name).unwrap(), name))
            .collect::<Vec<_>>()
    };
    let first = run();
    assert!(!first.is_empty());
    assert!(first == run());
}
