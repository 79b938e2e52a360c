//! The locks that put the changes of one object into one order.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use twinfs_core::id::FileId;
use twinfs_core::limits;

/// A fixed table of locks; an object's lock is chosen by its [`FileId`].
///
/// **Lock order**: stripes are taken in ascending index, all at once, by [`Stripes::lock`]. A thread that holds stripes
/// never takes another one, and never reserves room in the sidefile: whoever waits for room waits for those who hold
/// reservations, and those may be waiting for a stripe. Below the stripes come the short locks of the tables
/// ([`crate::inode`], [`crate::fds`]), which are never held over a system call.
#[derive(Debug)]
pub struct Stripes {
    locks: Box<[RwLock<()>]>,
    hasher: BuildHasherDefault<DefaultHasher>,
}

/// The locks of all objects that an operation changes.
#[derive(Debug)]
#[must_use]
pub struct Guard<'a> {
    _held: [Option<RwLockWriteGuard<'a, ()>>; limits::STRIPES_HELD_MAX],
}

impl Default for Stripes {
    fn default() -> Self {
        Self {
            locks: (0..limits::STRIPES).map(|_| RwLock::new(())).collect(),
            hasher: BuildHasherDefault::default(),
        }
    }
}

impl Stripes {
    fn index(&self, file: FileId) -> usize {
        let stripes = u64::try_from(limits::STRIPES).expect("a small number");
        usize::try_from(self.hasher.hash_one(file) % stripes).expect("less than a small number")
    }

    /// Locks all that an operation changes, at most [`limits::STRIPES_HELD_MAX`] objects.
    pub fn lock(&self, files: &[FileId]) -> Guard<'_> {
        let mut indices: Vec<usize> = files.iter().map(|file| self.index(*file)).collect();
        indices.sort_unstable();
        indices.dedup();
        let mut held = [const { None }; limits::STRIPES_HELD_MAX];
        for (place, index) in held.iter_mut().zip(indices) {
            *place = Some(self.locks[index].write().unwrap_or_else(PoisonError::into_inner));
        }
        Guard { _held: held }
    }

    /// Keeps a directory as it is while names in it are looked up, so that nobody learns of an object whose creation is
    /// not published yet.
    pub fn share(&self, file: FileId) -> RwLockReadGuard<'_, ()> {
        self.locks[self.index(file)].read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use twinfs_core::update::sample_file;

    #[test]
    fn locking_one_object_twice_or_in_any_order_neither_deadlocks_nor_lets_two_in() {
        let stripes = Stripes::default();
        let (inside, worst) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (stripes, inside, worst) = (&stripes, &inside, &worst);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let other = sample_file(2 + (round * 7 + thread) % 50);
                        let (a, b) =
                            if round % 2 == 0 { (sample_file(1), other) } else { (other, sample_file(1)) };
                        let _guard = stripes.lock(&[a, b, a]);
                        worst.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(worst.into_inner(), 1);
    }
}
