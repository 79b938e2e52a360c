//! Open descriptors: the ones that the kernel's handles stand for, and a few that save opening objects again.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinfs_core::id::FileId;
use twinfs_core::limits;

/// The `O_PATH` descriptors of the objects used last, at most [`limits::PATH_FDS_MAX`], evicted by the clock algorithm.
#[derive(Debug, Default)]
pub struct PathFds {
    clock: Mutex<Clock>,
}

#[derive(Debug, Default)]
struct Clock {
    index: HashMap<FileId, usize>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    file: FileId,
    fd: Arc<OwnedFd>,
    used: bool,
}

impl PathFds {
    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor of an object, if it is kept.
    #[must_use]
    pub fn get(&self, file: FileId) -> Option<Arc<OwnedFd>> {
        let mut clock = self.clock();
        let place = *clock.index.get(&file)?;
        let slot = clock.slots[place].as_mut().expect("the index names slots in use");
        slot.used = true;
        Some(slot.fd.clone())
    }

    /// Keeps a descriptor, in the place of one that was not used for long.
    pub fn insert(&self, file: FileId, fd: Arc<OwnedFd>) {
        let mut clock = self.clock();
        // The evicted descriptor is closed after the lock is gone: closing the last one of a deleted file takes long.
        let _evicted = clock.insert(Slot { file, fd, used: false });
        drop(clock);
    }

    /// Lets go of an object: it is gone, and its space must be freed.
    pub fn remove(&self, file: FileId) {
        let mut clock = self.clock();
        let removed = clock.index.remove(&file).and_then(|place| {
            clock.free.push(place);
            clock.slots[place].take()
        });
        drop(clock);
        drop(removed);
    }
}

impl Clock {
    fn insert(&mut self, slot: Slot) -> Option<Slot> {
        let place = if let Some(place) = self.index.get(&slot.file) {
            *place
        } else if let Some(place) = self.free.pop() {
            place
        } else if self.slots.len() < limits::PATH_FDS_MAX {
            self.slots.push(None);
            self.slots.len() - 1
        } else {
            self.sweep()
        };
        let old = self.slots[place].take();
        if let Some(old) = &old {
            self.index.remove(&old.file);
        }
        self.index.insert(slot.file, place);
        self.slots[place] = Some(slot);
        old
    }

    /// The next place that was not used since the hand passed it last.
    fn sweep(&mut self) -> usize {
        loop {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            match &mut self.slots[place] {
                Some(slot) if slot.used => slot.used = false,
                _ => return place,
            }
        }
    }
}

/// What the kernel's file handles stand for. Each is an open file of a program, so their number is the programs' affair.
#[derive(Debug)]
pub struct Handles<T> {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { next: AtomicU64::new(1), open: Mutex::new(HashMap::new()) }
    }
}

impl<T> Handles<T> {
    fn table(&self) -> MutexGuard<'_, HashMap<u64, Arc<T>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an open file and returns its number, which is never used again.
    pub fn insert(&self, item: T) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.table().insert(number, Arc::new(item));
        number
    }

    /// The open file of a number.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Arc<T>> {
        self.table().get(&number).cloned()
    }

    /// Forgets a number; the file closes when the last call that uses it is done.
    pub fn remove(&self, number: u64) -> Option<Arc<T>> {
        self.table().remove(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::update::sample_file;

    fn null() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let cache = PathFds::default();
        let fd = null();
        let count = limits::PATH_FDS_MAX as u64;
        for ino in 0..3 * count {
            cache.insert(sample_file(ino), fd.clone());
            assert!(cache.get(sample_file(0)).is_some(), "what is used each round stays (round {ino})");
        }
        assert_eq!(cache.clock().index.len(), limits::PATH_FDS_MAX);
        assert_eq!(Arc::strong_count(&fd), 1 + limits::PATH_FDS_MAX);
        cache.remove(sample_file(0));
        assert!(cache.get(sample_file(0)).is_none());
        assert_eq!(Arc::strong_count(&fd), limits::PATH_FDS_MAX);
        cache.insert(sample_file(1), fd.clone());
        cache.insert(sample_file(1), fd.clone());
        assert_eq!(Arc::strong_count(&fd), 1 + limits::PATH_FDS_MAX);
    }
}
