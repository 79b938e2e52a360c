//! What is left of a resync: the objects of a change map that were not read again yet.
//!
//! Always holds: outside of what the map still names, the replica has what the volume has. So a change of an object
//! that waits need not be published if it is noted; a change of any other object is published as ever. So is a change
//! of the object at hand, which is read part by part: only content that is moved has to be read again.

use twinfs_core::change_map::{Change, ChangeMap, TO_THE_END};
use twinfs_core::id::FileId;
use twinfs_core::update::{AttrList, Op};

use super::state::{Current, Item, WHOLE, follow, key};

#[derive(Debug)]
pub(super) struct Level {
    waiting: ChangeMap,
    /// The object at hand, and what is to be read of it.
    doing: Option<(FileId, Change)>,
    /// Content of the object at hand from here on was moved after it was read.
    moved: Option<u64>,
    /// The object at hand, or the one before.
    last: Option<FileId>,
}

impl Level {
    pub(super) fn new(mut map: ChangeMap) -> Self {
        map.settle();
        Self { waiting: map, doing: None, moved: None, last: None }
    }

    /// How many objects wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.objects().len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.doing.is_none()
    }

    /// Whether programs changed so much meanwhile that the map does not name objects any more.
    pub(super) fn is_lost(&self) -> bool {
        self.waiting.is_everything()
    }

    /// What is to be read of the object at hand.
    pub(super) fn doing(&self) -> Option<&Change> {
        self.doing.as_ref().map(|(_, change)| change)
    }

    pub(super) fn take_moved(&mut self) -> Option<u64> {
        self.moved.take()
    }

    /// Takes the next object. One that could not be read comes again when all others had their turn.
    pub(super) fn next(&mut self) -> Option<Current> {
        let file = self.waiting.next_after(self.last)?;
        let change = self.waiting.take(file)?;
        let item = Item { key: key(file), bytes: 0 };
        let started = !change.is_whole();
        (self.doing, self.moved, self.last) = (Some((file, change)), None, Some(file));
        Some(Current::new(item, if started { WHOLE } else { 0 }, started))
    }

    pub(super) fn finish(&mut self) {
        self.doing = None;
    }

    /// The object at hand could not be read.
    pub(super) fn put_back(&mut self) {
        if let Some((file, mut change)) = self.doing.take() {
            if let Some(offset) = self.moved.take() {
                change.add_range(offset, TO_THE_END);
            }
            self.waiting.put_back(file, change);
        }
    }

    /// All that is left.
    pub(super) fn leave(mut self) -> ChangeMap {
        self.put_back();
        self.waiting
    }

    /// Whether a change must be published. If not, it is noted here.
    pub(super) fn admits(&mut self, current: Option<&mut Current>, op: &Op<&[u8]>, attrs: &AttrList) -> bool {
        let file = match *op {
            Op::Write { file, .. }
            | Op::Truncate { file, .. }
            | Op::Zero { file, .. }
            | Op::Collapse { file, .. }
            | Op::Insert { file, .. }
            | Op::SetAttr { file }
            | Op::SetXattr { file, .. }
            | Op::RemoveXattr { file, .. } => file,
            // Names are always published: so no name is lost between two directories of which one was read.
            Op::Create { .. }
            | Op::Link { .. }
            | Op::Unlink { .. }
            | Op::Rename { .. }
            | Op::Exchange { .. }
            | Op::Object { .. }
            | Op::Bind { .. }
            | Op::Unbind { .. }
            | Op::Complete
            | Op::Resync => return true,
        };
        if let Some((_, change)) = self.doing.as_ref().filter(|(doing, _)| *doing == file) {
            let Some(current) = current else { return true };
            if change.is_whole() {
                return current.started && follow(&mut current.cursor, op);
            }
            if let Op::Collapse { offset, .. } | Op::Insert { offset, .. } = *op {
                self.moved = Some(self.moved.map_or(offset, |moved| moved.min(offset)));
            }
            return true;
        }
        match self.waiting.object(file) {
            Some(change) if !change.is_gone() => {
                self.waiting.note(op, attrs);
                false
            }
            _ => true,
        }
    }
}
