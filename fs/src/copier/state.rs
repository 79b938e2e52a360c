//! How far the copy of a volume is, and which updates of programs must be recorded meanwhile.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinfs_core::change_map::{Change, ChangeMap};
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::update::{AttrList, Kind, Op};
use twinfs_replicator::primary::mover::CopyProgress;

use super::level::Level;
use super::saved::{BadCopyState, Saved};

/// An object of the volume: inode number and generation.
pub(super) type Key = (u64, u32);

/// An object that waits to be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) key: Key,
    /// Bytes of data that it is thought to have.
    pub(super) bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Copied,
}

/// The one object that is being copied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Current {
    pub(super) item: Item,
    /// Up to here its content is as the replica will have it: beyond it, the replica has nothing but zeros.
    /// [`WHOLE`] if all of it is.
    pub(super) cursor: u64,
    /// Its `Object` update is published.
    pub(super) started: bool,
    copied_bytes: u64,
}

impl Current {
    pub(super) const fn new(item: Item, cursor: u64, started: bool) -> Self {
        Self { item, cursor, started, copied_bytes: 0 }
    }
}

/// The cursor of an object whose content is copied, or that has none.
pub(super) const WHOLE: u64 = u64::MAX;

/// The state of a volume's copy, shared by the thread that copies and the operations of programs.
///
/// Whether an object is copied, and how far, only changes under the object's stripe, and what is published of it is
/// decided and published under the same stripe: so each change either is read by the copy later, or follows it.
#[derive(Debug)]
pub struct CopyState {
    volume: VolumeIndex,
    root: FileId,
    /// It is a resync: all that it publishes becomes one group.
    resync: bool,
    complete: AtomicBool,
    /// **Lock order**: below the stripes. Nothing is published under it but the end of the copy.
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    complete: bool,
    /// What is left of a resync; there is no walk then.
    level: Option<Level>,
    /// Nothing is copied any more, and whatever programs do is somebody else's to note.
    left: bool,
    /// The objects that were found; those not in here have not been met yet.
    stages: HashMap<Key, Stage>,
    /// Taken from the back, so that a directory is followed by what is in it.
    waiting: VecDeque<Item>,
    waiting_bytes: u64,
    current: Option<Current>,
    files_copied: u64,
    bytes_copied: u64,
}

pub(super) fn key(file: FileId) -> Key {
    (file.ino, file.generation)
}

impl CopyState {
    pub(super) fn new(
        volume: VolumeIndex,
        root: FileId,
        resume: Option<&[u8]>,
    ) -> Result<Self, BadCopyState> {
        let mut inner = Inner::default();
        match resume {
            None => inner.push(Item { key: key(root), bytes: 0 }),
            Some(bytes) => {
                let saved = Saved::decode(bytes)?;
                if saved.root != root {
                    return Err(BadCopyState::OtherVolume);
                }
                saved.waiting.into_iter().for_each(|item| inner.push(item));
                inner.stages.extend(saved.copied.into_iter().map(|key| (key, Stage::Copied)));
                (inner.files_copied, inner.bytes_copied) = (saved.files_copied, saved.bytes_copied);
            }
        }
        Ok(Self { volume, root, resync: false, complete: AtomicBool::new(false), inner: Mutex::new(inner) })
    }

    /// The resync of what a change map names; of the whole tree, by a walk like that of a copy, if it says so.
    pub(super) fn resync(volume: VolumeIndex, root: FileId, map: ChangeMap) -> Self {
        let mut inner = Inner::default();
        if map.is_everything() {
            inner.push(Item { key: key(root), bytes: 0 });
        } else {
            inner.level = Some(Level::new(map));
        }
        Self { volume, root, resync: true, complete: AtomicBool::new(false), inner: Mutex::new(inner) }
    }

    pub(super) fn is_resync(&self) -> bool {
        self.resync
    }

    /// Ends a resync before its time, and says what of its map is left: from here on whatever programs do is published.
    pub(super) fn leave(&self) -> ChangeMap {
        let mut inner = self.lock();
        let mut left = ChangeMap::default();
        match inner.level.take() {
            _ if inner.complete => {}
            Some(level) => left = level.leave(),
            None => left.note_everything(),
        }
        inner.left = true;
        left
    }

    /// What is to be read of the current object, in a resync of what a map names.
    pub(super) fn change(&self) -> Option<Change> {
        self.lock().level.as_ref().and_then(Level::doing).cloned()
    }

    /// Content of the current object from here on has to be read again: programs have moved it.
    pub(super) fn moved(&self) -> Option<u64> {
        self.lock().level.as_mut().and_then(Level::take_moved)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeIndex {
        self.volume
    }

    pub(super) fn root(&self) -> FileId {
        self.root
    }

    /// Whether the whole volume is copied.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// How much is copied of what was found so far.
    #[must_use]
    pub fn progress(&self) -> CopyProgress {
        let inner = self.lock();
        let (files_left, bytes_left) = inner
            .current
            .map_or((0, 0), |current| (1, current.item.bytes.saturating_sub(current.copied_bytes)));
        let waiting = inner.level.as_ref().map_or(inner.waiting.len(), Level::len);
        CopyProgress {
            files_copied: inner.files_copied,
            files_total: inner.files_copied + waiting as u64 + files_left,
            bytes_copied: inner.bytes_copied,
            bytes_total: inner.bytes_copied + inner.waiting_bytes + bytes_left,
        }
    }

    /// All that is needed to go on with the copy in a later run; `None` if it is complete.
    ///
    /// What programs change after this must not be published any more, or be covered by other means: so call it when
    /// the volume is not mounted any more.
    #[must_use]
    pub fn save(&self) -> Option<Vec<u8>> {
        let inner = self.lock();
        if inner.complete {
            return None;
        }
        // An object that is being copied starts over: its `Object` update takes back what was sent of it.
        let waiting = inner.waiting.iter().copied().chain(inner.current.map(|current| current.item));
        let copied = inner.stages.iter().filter(|(_, stage)| **stage == Stage::Copied);
        let saved = Saved {
            root: self.root,
            files_copied: inner.files_copied,
            bytes_copied: inner.bytes_copied - inner.current.map_or(0, |current| current.copied_bytes),
            waiting: waiting.collect(),
            copied: copied.map(|(key, _)| *key).collect(),
        };
        Some(saved.encode())
    }

    // ---- for the operations of programs ----

    fn admits(&self, op: &Op<&[u8]>, attrs: &AttrList) -> bool {
        self.lock().admits(op, attrs)
    }

    /// Notes an object that is about to get a name in a place where the walk may have been already.
    pub(super) fn found(&self, file: FileId, bytes: u64) {
        let mut inner = self.lock();
        if inner.is_walk() && !inner.stages.contains_key(&key(file)) {
            inner.push(Item { key: key(file), bytes });
        }
    }

    // ---- for the thread that copies ----

    /// Whether an object is a symlink that the replica does not know yet.
    pub(super) fn owes(&self, file: FileId, kind: Kind) -> bool {
        kind == Kind::Symlink && {
            let inner = self.lock();
            let current = inner.current.filter(|current| current.item.key == key(file));
            let is_known = current.map_or_else(
                || inner.stages.get(&key(file)) == Some(&Stage::Copied),
                |current| current.started,
            );
            inner.is_walk() && !is_known
        }
    }

    /// An object is copied at once, without waiting for its turn.
    pub(super) fn made(&self, file: FileId) {
        let mut inner = self.lock();
        match inner.current.as_mut().filter(|current| current.item.key == key(file)) {
            Some(current) => (current.started, current.cursor) = (true, WHOLE),
            None => {
                inner.stages.insert(key(file), Stage::Copied);
                inner.files_copied += 1;
            }
        }
    }

    /// That failed, and is left to the walk.
    pub(super) fn unmade(&self, file: FileId) {
        let mut inner = self.lock();
        if inner.stages.get(&key(file)) == Some(&Stage::Copied) {
            inner.stages.remove(&key(file));
            inner.files_copied -= 1;
        }
    }

    /// Takes the next object.
    pub(super) fn next(&self) -> Option<Item> {
        let mut inner = self.lock();
        if let Some(level) = &mut inner.level {
            let current = level.next();
            inner.current = current;
            return current.map(|current| current.item);
        }
        loop {
            let item = inner.waiting.pop_back()?;
            inner.waiting_bytes -= item.bytes;
            if inner.stages.get(&item.key) == Some(&Stage::Waiting) {
                inner.current = Some(Current::new(item, 0, false));
                return Some(item);
            }
        }
    }

    /// From now on, changes of the current object are published, but for content beyond the cursor.
    pub(super) fn start(&self, cursor: u64, bytes: u64) {
        if let Some(current) = &mut self.lock().current {
            (current.started, current.cursor, current.item.bytes) = (true, cursor, bytes);
        }
    }

    /// The cursor of the current object.
    pub(super) fn cursor(&self) -> u64 {
        self.lock().current.map_or(WHOLE, |current| current.cursor)
    }

    /// The content of the current object is copied up to `cursor`, by `bytes` more bytes of data.
    pub(super) fn advance(&self, cursor: u64, bytes: u64) {
        let mut inner = self.lock();
        inner.bytes_copied += bytes;
        if let Some(current) = &mut inner.current {
            current.cursor = cursor;
            current.copied_bytes += bytes;
        }
    }

    /// The current object is copied as a whole.
    pub(super) fn finish(&self) {
        let mut inner = self.lock();
        if let Some(current) = inner.current.take() {
            inner.files_copied += 1;
            match &mut inner.level {
                Some(level) => level.finish(),
                None => _ = inner.stages.insert(current.item.key, Stage::Copied),
            }
        }
    }

    /// The last name of the current object is gone.
    pub(super) fn skip(&self) {
        let mut inner = self.lock();
        if let Some(current) = inner.current.take() {
            inner.stages.remove(&current.item.key);
            inner.bytes_copied -= current.copied_bytes;
            if let Some(level) = &mut inner.level {
                level.finish();
            }
        }
    }

    /// The current object could not be copied, and will be started over when everything else is done.
    pub(super) fn put_back(&self) {
        let mut inner = self.lock();
        if let Some(current) = inner.current.take() {
            inner.bytes_copied -= current.copied_bytes;
            if let Some(level) = &mut inner.level {
                return level.put_back();
            }
            inner.waiting_bytes += current.item.bytes;
            inner.waiting.push_front(current.item);
        }
    }

    /// Calls `publish` if nothing is left to be copied, and nothing can be found before it is done. The copy is complete
    /// if it says so.
    pub(super) fn complete(&self, publish: impl FnOnce() -> bool) -> Option<bool> {
        let mut inner = self.lock();
        if inner.level.as_ref().is_some_and(Level::is_lost) {
            return Some(false);
        }
        if !inner.waiting.is_empty() || inner.level.as_ref().is_some_and(|level| !level.is_empty()) {
            return None;
        }
        let published = publish();
        if published {
            inner.complete = true;
            inner.stages = HashMap::new();
            self.complete.store(true, Ordering::Release);
        }
        Some(published)
    }
}

impl Inner {
    fn push(&mut self, item: Item) {
        self.stages.insert(item.key, Stage::Waiting);
        self.waiting_bytes += item.bytes;
        self.waiting.push_back(item);
    }

    fn is_walk(&self) -> bool {
        !self.complete && !self.left && self.level.is_none()
    }

    fn admits(&mut self, op: &Op<&[u8]>, attrs: &AttrList) -> bool {
        if self.complete || self.left {
            return true;
        }
        if let Some(level) = &mut self.level {
            return level.admits(self.current.as_mut(), op, attrs);
        }
        match *op {
            // Born while the walk goes on: every change of it is published.
            Op::Create { file, .. } => {
                self.stages.insert(key(file), Stage::Copied);
                true
            }
            // What a name stands for is always published, so that no name is lost between two places of the walk.
            Op::Link { .. } | Op::Unlink { .. } | Op::Rename { .. } | Op::Exchange { .. } => true,
            Op::Object { .. } | Op::Bind { .. } | Op::Unbind { .. } | Op::Complete | Op::Resync => true,
            Op::Write { file, .. }
            | Op::Truncate { file, .. }
            | Op::Zero { file, .. }
            | Op::Collapse { file, .. }
            | Op::Insert { file, .. }
            | Op::SetAttr { file }
            | Op::SetXattr { file, .. }
            | Op::RemoveXattr { file, .. } => {
                let current = self.current.as_mut().filter(|current| current.item.key == key(file));
                match current {
                    Some(current) => current.started && follow(&mut current.cursor, op),
                    None => self.stages.get(&key(file)) == Some(&Stage::Copied),
                }
            }
        }
    }
}

/// Whether a change of the object that is being copied must be published; the cursor goes with it. Afterwards it holds
/// again that the replica's content is right below the cursor, and nothing but zeros from there on.
pub(super) fn follow(cursor: &mut u64, op: &Op<&[u8]>) -> bool {
    if *cursor == WHOLE {
        return true;
    }
    match *op {
        Op::Write { offset, len, .. } if offset < *cursor => *cursor = (offset + u64::from(len)).max(*cursor),
        Op::Write { .. } => return false,
        Op::Zero { offset, .. } => return offset < *cursor,
        Op::Collapse { offset, len, .. } if offset < *cursor => {
            *cursor = cursor.saturating_sub(len).max(offset);
        }
        Op::Insert { offset, len, .. } if offset < *cursor => *cursor += len,
        _ => {}
    }
    true
}

/// A volume's place for the state of its copy. Without a copy it costs one atomic load for each update.
#[derive(Debug, Default)]
pub(crate) struct CopySwitch {
    on: AtomicBool,
    state: Mutex<Option<Arc<CopyState>>>,
}

impl CopySwitch {
    fn slot(&self) -> MutexGuard<'_, Option<Arc<CopyState>>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a copy is in force.
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    pub(super) fn state(&self) -> Option<Arc<CopyState>> {
        if self.is_on() { self.slot().clone() } else { None }
    }

    /// Puts a copy in force, in place of any other.
    pub(super) fn turn_on(&self, state: Arc<CopyState>) {
        *self.slot() = Some(state);
        self.on.store(true, Ordering::Release);
    }

    /// Forgets a copy that is complete.
    pub(super) fn turn_off(&self, state: &Arc<CopyState>) {
        let mut slot = self.slot();
        if slot.as_ref().is_some_and(|known| Arc::ptr_eq(known, state)) {
            *slot = None;
            self.on.store(false, Ordering::Release);
        }
    }

    /// Whether an update must be published; if not, the copy reads later what the operation did. Called under the stripes
    /// of all that the update changes, right before it is published.
    pub(crate) fn admits(&self, op: &Op<&[u8]>, attrs: &AttrList) -> bool {
        self.state().is_none_or(|state| state.admits(op, attrs))
    }

    /// Whether a copy is going on, and an object is a symlink that the replica does not know yet.
    pub(crate) fn owes(&self, file: FileId, kind: Kind) -> bool {
        kind == Kind::Symlink && self.state().is_some_and(|state| state.owes(file, kind))
    }

    /// Notes that an object is about to get a further or another name. Called under the stripes, *before* it happens:
    /// else the walk could miss the object at its old name, and end before it hears of the new one.
    pub(crate) fn found(&self, file: FileId) {
        if let Some(state) = self.state() {
            state.found(file, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::model::Random;
    use twinfs_core::update::sample_file;

    /// Does to bytes what an operation on contents does to a file.
    fn apply(op: &Op<&[u8]>, fill: u8, bytes: &mut Vec<u8>) {
        let place = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match *op {
            Op::Write { offset, len, .. } => {
                let range = place(offset, len.into());
                bytes.resize(bytes.len().max(range.end), 0);
                bytes[range].fill(fill);
            }
            Op::Truncate { size, .. } => bytes.resize(size as usize, 0),
            Op::Zero { offset, len, .. } => bytes[place(offset, len)].fill(0),
            Op::Collapse { offset, len, .. } => drop(bytes.drain(place(offset, len))),
            Op::Insert { offset, len, .. } => {
                bytes.splice(offset as usize..offset as usize, vec![0; len as usize]);
            }
            _ => unreachable!("the test makes no such operation"),
        }
    }

    #[test]
    fn below_the_cursor_the_replica_is_right_and_beyond_it_has_nothing() {
        let file = sample_file(1);
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let mut here: Vec<u8> = random.bytes(300);
            let mut there = vec![0; here.len()];
            let mut cursor = 0_u64;
            for step in 0..60 {
                let size = here.len() as u64;
                let offset = random.below(size + 1);
                let len = random.below(size - offset + 1).min(40);
                let op = match random.below(8) {
                    0..=2 => Op::Write { file, offset, len: 1 + random.below(40) as u32 },
                    3 => Op::Truncate { file, size: random.below(size + 30) },
                    4 => Op::Zero { file, offset, len, hole: true },
                    5 => Op::Collapse { file, offset, len },
                    6 => Op::Insert { file, offset, len: 20 },
                    _ => {
                        // The copy goes on.
                        let end = (cursor + len).min(size).max(cursor);
                        let range = cursor.min(size) as usize..end.min(size) as usize;
                        there[range.clone()].copy_from_slice(&here[range]);
                        cursor = end;
                        continue;
                    }
                };
                let fill = 1 + random.below(255) as u8;
                apply(&op, fill, &mut here);
                if follow(&mut cursor, &op) {
                    apply(&op, fill, &mut there);
                }
                there.resize(here.len(), 0); // The size comes with the attributes.
                let split = here.len().min(cursor as usize);
                assert!(here[..split] == there[..split], "seed {seed}, step {step}: {op:?}");
                assert!(there[split..].iter().all(|byte| *byte == 0), "seed {seed}, step {step}: {op:?}");
            }
        }
    }

    #[test]
    fn a_copy_in_progress_is_saved_as_if_its_object_had_not_been_begun() {
        let root = sample_file(1);
        let state = CopyState::new(VolumeIndex(0), root, None).unwrap();
        let before = state.save().unwrap();
        state.next().unwrap();
        state.start(0, 50);
        state.advance(10, 10);
        assert_eq!(state.progress().bytes_copied, 10);
        assert_eq!(state.progress().bytes_total, 50);
        let saved = Saved::decode(&state.save().unwrap()).unwrap();
        assert_eq!(saved.waiting, [Item { key: key(root), bytes: 50 }]);
        assert_eq!(Saved { waiting: vec![Item { key: key(root), bytes: 0 }], ..saved }.encode(), before);
    }

    #[test]
    fn a_copy_that_is_over_asks_for_nothing() {
        let (root, file) = (sample_file(1), sample_file(2));
        let switch = CopySwitch::default();
        let op = Op::SetAttr { file };
        assert!(switch.admits(&op, &AttrList::new()), "there is no copy");
        let state = Arc::new(CopyState::new(VolumeIndex(0), root, None).unwrap());
        switch.turn_on(state.clone());
        assert!(!switch.admits(&op, &AttrList::new()));
        assert_eq!(state.complete(|| true), None, "the root waits");
        state.next().unwrap();
        state.finish();
        assert_eq!(state.complete(|| false), Some(false));
        assert!(state.save().is_some());
        assert_eq!(state.complete(|| true), Some(true));
        assert!(state.save().is_none() && switch.admits(&op, &AttrList::new()), "complete");
        let next = Arc::new(CopyState::new(VolumeIndex(0), root, None).unwrap());
        switch.turn_on(next.clone());
        switch.turn_off(&state);
        assert!(!switch.admits(&op, &AttrList::new()), "another copy is in force");
        switch.turn_off(&next);
        assert!(switch.admits(&op, &AttrList::new()) && switch.state().is_none());
    }
}
