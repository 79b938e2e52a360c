//! The files that the current era names, and what waits to be written.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use twinfs_core::limits;

use super::format::Entry;
use super::{Mark, lock};

/// The set of files that an era names, divided by a hash so that threads seldom meet.
#[derive(Debug)]
pub(super) struct EraSet {
    /// For each file the mark that must be durable before the file counts as logged.
    shards: Box<[Mutex<HashMap<Entry, Mark>>]>,
    /// The mark of the entry "everything"; zero while there is none.
    everything: AtomicU64,
    /// All entries of the eras before have marks up to this one.
    before: Mark,
}

impl EraSet {
    pub(super) fn new(before: Mark) -> Self {
        let shards = (0..limits::ACTIVITY_SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, everything: AtomicU64::new(0), before }
    }

    pub(super) const fn before(&self) -> Mark {
        self.before
    }

    fn shard(&self, entry: &Entry) -> MutexGuard<'_, HashMap<Entry, Mark>> {
        // Inode numbers follow each other; the product's top bits spread them evenly.
        let spread = (entry.1.ino ^ entry.1.instance.get()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = spread >> (u64::BITS - limits::ACTIVITY_SHARDS.trailing_zeros());
        lock(&self.shards[index as usize])
    }

    /// The mark of the entry "everything", if the era has it.
    pub(super) fn everything(&self) -> Option<Mark> {
        match self.everything.load(Ordering::Acquire) {
            0 => None,
            mark => Some(Mark(mark)),
        }
    }

    /// What must be durable before the file counts as logged; `None` if this era does not name it.
    pub(super) fn need(&self, entry: &Entry) -> Option<Mark> {
        self.everything().or_else(|| self.shard(entry).get(entry).copied())
    }

    /// Raises what must be durable before a file counts as logged.
    pub(super) fn raise(&self, entry: &Entry, need: Mark) {
        if let Some(known) = self.shard(entry).get_mut(entry) {
            *known = need.max(*known);
        }
    }

    /// Names a file, and puts it in line for the next write if that is news. Returns its mark.
    pub(super) fn enter(&self, entry: Entry, line: &Mutex<Line>, files_max: usize) -> Entered {
        if let Some(mark) = self.everything() {
            return Entered { mark, is_first: false };
        }
        let mut shard = self.shard(&entry);
        if let Some(mark) = shard.get(&entry) {
            return Entered { mark: *mark, is_first: false };
        }
        // Under the lock of the shard, so that whoever finds the file in the set finds it in line, too.
        let mut line = lock(line);
        if let Some(mark) = self.everything() {
            return Entered { mark, is_first: false };
        }
        let is_first = line.batch.is_empty();
        line.queued = Mark(line.queued.0 + 1);
        let mark = line.queued;
        if line.named >= files_max {
            line.batch.everything = true;
            self.everything.store(mark.0, Ordering::Release);
        } else {
            line.named += 1;
            line.batch.entries.push(entry);
            shard.insert(entry, mark);
        }
        Entered { mark, is_first }
    }

    /// Has the era say "everything" from its start.
    pub(super) fn start_with_everything(&self, mark: Mark) {
        self.everything.store(mark.0.max(1), Ordering::Release);
    }

    /// All files, in no order.
    pub(super) fn all(&self) -> Vec<Entry> {
        self.shards.iter().flat_map(|shard| lock(shard).keys().copied().collect::<Vec<_>>()).collect()
    }
}

/// The outcome of [`EraSet::enter`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Entered {
    pub(super) mark: Mark,
    /// Nothing was in line before it.
    pub(super) is_first: bool,
}

/// Entries to be written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) entries: Vec<Entry>,
    pub(super) everything: bool,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && !self.everything
    }
}

/// What waits to be written.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) batch: Batch,
    /// The mark of the last entry ever put in line.
    pub(super) queued: Mark,
    /// Files that the current era names.
    pub(super) named: usize,
    /// The thread that writes shall end.
    pub(super) stop: bool,
}
