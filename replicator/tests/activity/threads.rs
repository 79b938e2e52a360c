//! Several threads at once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};

use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::activity_log::{ActivityConfig, ActivityLog};
use twinfs_replicator::storage::{File, SimStorage, Storage, StorageError, StorageFile};

use super::{Name, Random, SESSION, config, name, names, open_with, set, touch};

/// Threads touch and flush, eras end and go, and the power goes at any time: whatever a flush had answered for, and no
/// removed era named, is found.
#[test]
fn a_flush_that_returned_in_any_thread_counts() {
    let disk = SimStorage::new(1);
    let config = ActivityConfig { flush_ns: None, files_max: 5000, file_bytes_max: 1 << 20, ..config() };
    let working = ActivityConfig { flush_ns: Some(1000), ..config };
    let (log, _) = open_with(&disk, 1, working).unwrap();
    let promised: Mutex<BTreeSet<Name>> = Mutex::default();
    let done = AtomicBool::new(false);
    let clock = AtomicU64::new(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3_u64)
            .map(|thread| {
                let (log, promised) = (&log, &promised);
                scope.spawn(move || {
                    let mut random = Random(thread);
                    for round in 0..300 {
                        let from = 10_000 * thread + random.below(1000);
                        let names = names(from..from + 1 + random.below(3));
                        touch(log, &names).unwrap();
                        match round % 3 {
                            0 => log.flush().unwrap(),
                            1 => log.wait_durable(log.mark()).unwrap(),
                            _ => names.iter().for_each(|(v, f)| log.flush_file(*v, *f).unwrap()),
                        }
                        promised.lock().unwrap().extend(names);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let so_far = promised.lock().unwrap().clone();
                let (_, found) = open_with(&disk.crash(0), 1, config).unwrap();
                assert!(!found.everything);
                let missing = so_far.difference(&set(&found.files)).count();
                assert_eq!(missing, 0, "of {}", so_far.len());
            }
        });
        scope.spawn(|| {
            // Ends eras, and lets none go: nothing says that both sites have it.
            for _ in 0..4 {
                std::thread::sleep(std::time::Duration::from_millis(5));
                log.end_era(&|| Timestamp(clock.fetch_add(1, Ordering::Relaxed))).unwrap();
            }
        });
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    drop(log);
    let (_, found) = open_with(&disk.crash(0), 1, config).unwrap();
    assert_eq!((set(&found.files), found.everything), (promised.into_inner().unwrap(), false));
}

/// A disk whose syncs wait until the gate lets them pass, and are counted.
#[derive(Debug)]
struct Gate {
    /// So many may pass.
    passes: Mutex<u64>,
    opened: Condvar,
    /// Syncs that came, and that passed.
    came: AtomicU64,
    passed: AtomicU64,
}

impl Gate {
    fn open() -> Arc<Self> {
        let counters = || AtomicU64::new(0);
        Arc::new(Self {
            passes: Mutex::new(u64::MAX),
            opened: Condvar::new(),
            came: counters(),
            passed: counters(),
        })
    }

    /// Lets so many more pass.
    fn let_pass(&self, count: u64) {
        *self.passes.lock().unwrap() = count;
        self.opened.notify_all();
    }

    /// Waits until so many have come since `before`.
    fn wait_for(&self, count: u64, before: u64) {
        while self.came.load(Ordering::SeqCst) < before + count {
            std::thread::yield_now();
        }
    }
}

#[derive(Debug)]
struct GatedStorage(SimStorage, Arc<Gate>);

#[derive(Debug)]
struct GatedFile(File, Arc<Gate>);

impl Storage for GatedStorage {
    fn create(&self, name: &str) -> Result<File, StorageError> {
        Ok(Arc::new(GatedFile(self.0.create(name)?, Arc::clone(&self.1))))
    }
    fn open(&self, name: &str) -> Result<File, StorageError> {
        self.0.open(name)
    }
    fn list(&self) -> Result<Vec<String>, StorageError> {
        self.0.list()
    }
    fn remove(&self, name: &str) -> Result<(), StorageError> {
        self.0.remove(name)
    }
    fn rename(&self, name: &str, to: &str) -> Result<(), StorageError> {
        self.0.rename(name, to)
    }
    fn sync_dir(&self) -> Result<(), StorageError> {
        self.0.sync_dir()
    }
    fn free_bytes(&self) -> Result<u64, StorageError> {
        self.0.free_bytes()
    }
    fn salt(&self) -> Result<[u8; 16], StorageError> {
        self.0.salt()
    }
}

impl StorageFile for GatedFile {
    fn size(&self) -> Result<u64, StorageError> {
        self.0.size()
    }
    fn allocate(&self, size: u64) -> Result<(), StorageError> {
        self.0.allocate(size)
    }
    fn truncate(&self, size: u64) -> Result<(), StorageError> {
        self.0.truncate(size)
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> Result<(), StorageError> {
        self.0.write_at(parts, offset)
    }
    fn sync_data(&self) -> Result<(), StorageError> {
        let mut passes = self.1.passes.lock().unwrap();
        self.1.came.fetch_add(1, Ordering::SeqCst);
        while *passes == 0 {
            passes = self.1.opened.wait(passes).unwrap();
        }
        *passes -= 1;
        self.1.passed.fetch_add(1, Ordering::SeqCst);
        self.0.sync_data()
    }
    fn settle(&self) -> Result<(), StorageError> {
        self.0.settle()
    }
}

fn gated() -> (Arc<Gate>, ActivityLog) {
    let gate = Gate::open();
    let storage: Arc<dyn Storage> = Arc::new(GatedStorage(SimStorage::new(1), Arc::clone(&gate)));
    let (log, _) = ActivityLog::open(storage, SESSION, Timestamp(1), config()).unwrap();
    (gate, log)
}

#[test]
fn callers_at_the_same_time_share_one_sync() {
    const CALLERS: u64 = 8;
    let (gate, log) = gated();
    let before = gate.passed.load(Ordering::SeqCst);
    gate.let_pass(0);
    let touched = Barrier::new(CALLERS as usize + 1);
    let mut early = false;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            touch(&log, &[name(1)]).unwrap();
            log.flush().unwrap();
        });
        // The first sync is under way, so whatever comes now is not part of it.
        gate.wait_for(1, before);
        // Looked at later, so that nobody waits for ever when it fails.
        early = log.is_durable(name(1).0, name(1).1);
        for caller in 0..CALLERS {
            let (log, touched) = (&log, &touched);
            scope.spawn(move || {
                touch(log, &[name(100 + caller)]).unwrap();
                touched.wait();
                log.flush().unwrap();
                assert!(log.is_durable(name(100 + caller).0, name(100 + caller).1));
            });
        }
        touched.wait();
        gate.let_pass(u64::MAX);
    });
    assert!(!early, "its sync had not returned");
    assert_eq!(gate.passed.load(Ordering::SeqCst) - before, 2, "one for the first, one for all others");
}

/// A file that only the era before names is not durable before the rest of that era is.
#[test]
fn the_last_entries_of_an_era_count_when_they_are_synced() {
    let (gate, log) = gated();
    let before = gate.passed.load(Ordering::SeqCst);
    touch(&log, &[name(1)]).unwrap();
    // The header of the next era's file may pass, what is left of the old era may not yet.
    gate.let_pass(1);
    let mut early = false;
    std::thread::scope(|scope| {
        scope.spawn(|| log.end_era(&|| Timestamp(2)).unwrap());
        gate.wait_for(2, before);
        early = log.is_durable(name(1).0, name(1).1);
        let flushed = scope.spawn(|| log.flush_file(name(1).0, name(1).1));
        gate.let_pass(u64::MAX);
        flushed.join().unwrap().unwrap();
        assert!(log.is_durable(name(1).0, name(1).1));
    });
    assert!(!early, "the sync of the old era had not returned");
}
