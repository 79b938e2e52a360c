//! When eras end and go, and what their bounds do.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use twinfs_core::stamp::Timestamp;
use twinfs_core::update::sample_file;
use twinfs_replicator::primary::activity_log::{ActivityConfig, ActivityLog, Keeper, KeeperParts};
use twinfs_replicator::storage::{Fault, Operation, RealStorage, SimStorage, Storage};

use super::{SESSION, V, config, era_files, found, name, names, open, open_with, set, touch};

/// A keeper whose world the test moves.
struct World {
    disk: SimStorage,
    log: Arc<ActivityLog>,
    keeper: Keeper,
    clock: Arc<AtomicU64>,
    applied: Arc<AtomicU64>,
    syncs: Arc<AtomicU64>,
    sync_fails: Arc<AtomicBool>,
}

fn world() -> World {
    let disk = SimStorage::new(1);
    world_on(disk)
}

fn world_on(disk: SimStorage) -> World {
    let log = Arc::new(open_with(&disk, 100, config()).unwrap().0);
    let clock = Arc::new(AtomicU64::new(100));
    let applied = Arc::new(AtomicU64::new(0));
    let syncs = Arc::new(AtomicU64::new(0));
    let sync_fails = Arc::new(AtomicBool::new(false));
    let (now, has) = (Arc::clone(&clock), Arc::clone(&applied));
    let (counted, failing) = (Arc::clone(&syncs), Arc::clone(&sync_fails));
    let keeper = Keeper::new(KeeperParts {
        log: Arc::clone(&log),
        sync_backing: Box::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            if failing.load(Ordering::Relaxed) { Err(io::Error::other("broken")) } else { Ok(()) }
        }),
        applied: Box::new(move || Timestamp(has.load(Ordering::Relaxed))),
        now: Box::new(move || Timestamp(now.load(Ordering::Relaxed))),
    });
    World { disk, log, keeper, clock, applied, syncs, sync_fails }
}

impl World {
    fn touch_and_step(&mut self, n: u64, time: u64) {
        touch(&self.log, &[name(n)]).unwrap();
        self.step(time);
    }

    fn step(&mut self, time: u64) {
        self.clock.store(time, Ordering::Relaxed);
        self.keeper.step().unwrap();
    }

    fn files(&self) -> Vec<u64> {
        let mut inos: Vec<u64> = found(&self.disk.crash(0)).files.iter().map(|(_, file)| file.ino).collect();
        inos.sort_unstable();
        inos
    }
}

#[test]
fn an_era_goes_when_the_replica_has_it_and_the_tree_was_synced() {
    let mut world = world();
    world.step(150);
    assert_eq!(era_files(&world.disk).len(), 1, "nothing was touched, so no era ends");
    world.touch_and_step(1, 150);
    world.touch_and_step(2, 155);
    assert_eq!(world.files(), [1], "the era of 2 is too young, and nobody asked for a flush");
    world.touch_and_step(3, 160);
    assert_eq!((world.files(), world.syncs.load(Ordering::Relaxed)), (vec![1, 2, 3], 0));

    world.applied.store(155, Ordering::Relaxed);
    world.step(161);
    assert_eq!((world.files(), world.syncs.load(Ordering::Relaxed)), (vec![2, 3], 1));
    world.applied.store(160, Ordering::Relaxed);
    world.step(162);
    assert_eq!(world.files(), Vec::<u64>::new());
    assert_eq!(world.syncs.load(Ordering::Relaxed), 1, "the second era ended before that sync, too");
    world.applied.store(180, Ordering::Relaxed);
    world.touch_and_step(4, 175);
    world.step(176);
    assert_eq!(
        (world.files(), world.syncs.load(Ordering::Relaxed)),
        (vec![], 2),
        "a later era needs a later sync"
    );
}

/// The keeper has a log that failed begin anew, and its era that stands for everything goes like any other.
#[test]
fn a_log_that_failed_begins_anew_when_the_disk_takes_it() {
    let mut world = world();
    let errno = rustix::io::Errno::NOSPC;
    touch(&world.log, &[name(1)]).unwrap();
    for _ in 0..3 {
        world.disk.inject(Fault { operation: Operation::Write, after: 0, errno });
    }
    world.log.flush().unwrap_err();
    for _ in 0..2 {
        world.keeper.step().unwrap_err();
        assert!(world.log.failure().is_some());
    }
    world.step(120);
    assert_eq!(world.log.failure(), None);
    let everything = |world: &World| found(&world.disk.crash(0)).everything;
    world.touch_and_step(2, 140);
    assert!(everything(&world), "the replica does not have it");
    world.applied.store(139, Ordering::Relaxed);
    world.step(141);
    assert!(everything(&world), "not all of it");
    world.applied.store(141, Ordering::Relaxed);
    world.step(142);
    assert!(!everything(&world));
    world.touch_and_step(3, 152);
    assert_eq!(world.files(), [3]);
}

#[test]
fn after_a_failed_sync_of_the_tree_no_era_ever_goes() {
    let mut world = world();
    world.touch_and_step(1, 150);
    world.sync_fails.store(true, Ordering::Relaxed);
    world.applied.store(u64::MAX, Ordering::Relaxed);
    world.step(151);
    world.sync_fails.store(false, Ordering::Relaxed);
    for time in 152..200 {
        world.touch_and_step(time, time);
    }
    assert_eq!(world.syncs.load(Ordering::Relaxed), 1, "a second sync would prove nothing");
    world.log.flush().unwrap();
    assert_eq!(world.files().len(), 49);
    assert!(era_files(&world.disk).len() <= config().eras_max);
}

#[test]
fn what_was_found_goes_only_once_it_is_settled() {
    let mut first = world();
    first.touch_and_step(1, 150);
    drop(first.log);
    drop(first.keeper);
    let mut world = world_on(first.disk.crash(0));
    world.applied.store(1000, Ordering::Relaxed);
    world.touch_and_step(2, 150);
    world.step(170);
    assert_eq!(world.files(), [1, 2], "nobody said that it was dealt with");
    world.log.settle_found(Timestamp(1500));
    world.step(180);
    assert_eq!(world.files(), [1, 2], "the replica does not have all that deals with it");
    world.applied.store(1500, Ordering::Relaxed);
    world.step(190);
    assert_eq!(world.files(), Vec::<u64>::new());
}

#[test]
fn while_no_era_may_go_the_last_one_goes_on() {
    let mut world = world();
    for time in 0..100 {
        world.touch_and_step(time % 10, 200 + 20 * time);
    }
    assert_eq!(era_files(&world.disk).len(), config().eras_max);
    world.log.flush().unwrap();
    assert_eq!(world.files(), (0..10).collect::<Vec<_>>());
    world.applied.store(5000, Ordering::Relaxed);
    world.step(5000);
    world.step(5001);
    assert_eq!(era_files(&world.disk).len(), 1 + 1, "the last era ends when there is room again");
}

/// An era ends only while nobody is between touch and stamp: with the lock held, its end waits.
#[test]
fn an_era_does_not_end_between_touch_and_stamp() {
    let disk = SimStorage::new(1);
    let (log, _) = open(&disk).unwrap();
    let clock = AtomicU64::new(10);
    let touched = log.touch(V, std::iter::once(sample_file(1))).unwrap();
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| {
            let era = log.end_era(&|| Timestamp(clock.fetch_add(1, Ordering::SeqCst))).unwrap();
            (era, clock.load(Ordering::SeqCst))
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        let stamp = clock.fetch_add(1, Ordering::SeqCst);
        drop(touched);
        let (era, end) = ended.join().unwrap();
        assert_eq!(log.ended_by(Timestamp(stamp)), None, "the update is stamped before the end");
        assert_eq!(log.ended_by(Timestamp(end)), Some(era));
    });
}

#[test]
fn past_its_bound_an_era_says_everything() {
    let disk = SimStorage::new(1);
    let (log, _) = open(&disk).unwrap();
    let bound = config().files_max as u64;
    touch(&log, &names(0..bound)).unwrap();
    log.flush().unwrap();
    assert!(!found(&disk.crash(0)).everything);
    touch(&log, &[name(bound + 1)]).unwrap();
    assert!(!log.is_durable(name(bound + 1).0, name(bound + 1).1));
    log.flush_file(name(bound + 1).0, name(bound + 1).1).unwrap();
    let syncs = disk.changes();
    touch(&log, &names(bound..3 * bound)).unwrap();
    log.flush().unwrap();
    assert_eq!(disk.changes(), syncs, "there is nothing more to say");
    assert!(found(&disk.crash(0)).everything);

    let era = log.end_era(&|| Timestamp(2000)).unwrap();
    touch(&log, &[name(5)]).unwrap();
    log.flush().unwrap();
    assert!(found(&disk.crash(0)).everything);
    log.release(era).unwrap();
    let found = found(&disk.crash(0));
    assert_eq!((found.files, found.everything), (vec![name(5)], false));
}

#[test]
fn a_long_era_is_packed() {
    let disk = SimStorage::new(1);
    let (log, _) = open(&disk).unwrap();
    for n in 0..200 {
        touch(&log, &[name(n)]).unwrap();
        log.flush().unwrap();
        assert!(log.is_durable(name(n).0, name(n).1));
        assert_eq!(era_files(&disk).len(), 1);
    }
    let bytes = disk.bytes("00000001.era").unwrap();
    let used = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
    assert!(used as u64 <= config().file_bytes_max, "{used}");
    let found = found(&disk.crash(0));
    assert_eq!((set(&found.files), found.everything), (set(&names(0..200)), false));
}

#[test]
fn files_of_one_operation_count_as_one() {
    let disk = SimStorage::new(1);
    let (log, _) = open(&disk).unwrap();
    touch(&log, &[(V, sample_file(1))]).unwrap();
    log.flush().unwrap();
    // A rename: the file is logged, its new directory is not.
    drop(log.touch(V, [1, 2].map(sample_file).into_iter()).unwrap());
    assert!(!log.is_durable(V, sample_file(1)), "an fsync of the file makes its name durable, too");
    log.flush_file(V, sample_file(1)).unwrap();
    let changes = disk.changes();
    log.flush_file(V, sample_file(2)).unwrap();
    log.flush_file(V, sample_file(3)).unwrap();
    log.flush().unwrap();
    assert_eq!(disk.changes(), changes, "what is durable costs nothing");
    assert_eq!(found(&disk.crash(0)).files.len(), 2);
}

#[test]
fn on_a_real_directory_entries_become_durable_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(&dir.path().join("activity")).unwrap());
        ActivityLog::open(storage, SESSION, Timestamp(7), ActivityConfig::default()).unwrap()
    };
    let (log, first) = open();
    assert!(first.is_empty());
    touch(&log, &names(0..50)).unwrap();
    let mark = log.mark();
    while log.durable_mark() < mark {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    touch(&log, &names(50..60)).unwrap();
    drop(log);
    let (_log, found) = open();
    assert_eq!((set(&found.files), found.everything, found.since), (set(&names(0..60)), false, Timestamp(7)));
}
