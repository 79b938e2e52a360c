//! The change map: a delta without data.
//!
//! While updates cannot be kept, the map notes what they touched: of each object, which ranges of its content, whether
//! its attributes, which extended attributes and which names. Reading again what the map names, at any later time, and
//! folding that over the state before the first noted update, gives the state at that time (the idea is that of the
//! out-of-sync bitmaps of US 6,260,124 and 6,772,303, with names and objects in place of tracks).
//!
//! The map is bounded. Coarser is always right, only dearer: ranges grow together, an object is read as a whole instead
//! of its parts, and in the end the map says "everything".
//!
//! A map is filled as a *level*. When what it names is being read again it is *in flight*; if that is interrupted, what
//! is left of it is [merged](ChangeMap::merge) into the level that was opened meanwhile.

mod codec;
mod ranges;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

pub use codec::BadChangeMap;
use ranges::Ranges;
pub use ranges::TO_THE_END;

use crate::id::FileId;
use crate::limits;
use crate::update::{AttrList, Kind, Op};

/// Estimated memory of an object in the map apart from what grows.
const OBJECT_BYTES: usize = size_of::<FileId>() + size_of::<Change>() + 16;
/// Estimated memory of a range.
const RANGE_BYTES: usize = 32;
/// Estimated memory of a name or extended attribute apart from its bytes.
const NAME_BYTES: usize = 96;

/// What a name stood for before the first change that the map noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// It is not known any more.
    Unknown,
    /// This, or nothing.
    Was(Option<FileId>),
}

/// What changed of one object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    attrs: bool,
    whole: bool,
    gone: bool,
    /// It did not exist before the level was opened: if it goes, nobody ever needs to hear of it.
    born: bool,
    ranges: Ranges,
    xattrs: BTreeSet<Box<[u8]>>,
    names: BTreeMap<Box<[u8]>, Before>,
}

impl Change {
    /// Whether all of it has to be read again. Then there is nothing else in here.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.whole
    }

    /// Whether its last name went. Then there is nothing else in here.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        self.gone
    }

    /// Ranges of its content as start and end, in order; an end of [`TO_THE_END`] says that the file was, perhaps, shorter
    /// in between.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = (u64, u64)> {
        self.ranges.iter()
    }

    /// Extended attributes that were set or removed.
    pub fn xattrs(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.xattrs.iter().map(|name| &**name)
    }

    /// Names in this directory that stand for something else than before, or for nothing.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.names.keys().map(|name| &**name)
    }

    /// Everything has to be read again.
    #[must_use]
    pub fn whole() -> Self {
        Self { whole: true, ..Self::default() }
    }

    /// Adds a range of content.
    pub fn add_range(&mut self, start: u64, end: u64) {
        self.note_content(start, end);
    }

    fn set_whole(&mut self) {
        *self = Self { whole: true, born: self.born, ..Self::default() };
    }

    fn set_gone(&mut self) {
        *self = Self { gone: true, ..Self::default() };
    }

    const fn is_detailed(&self) -> bool {
        !self.whole && !self.gone
    }

    fn bytes(&self) -> usize {
        let text = |name: &[u8]| NAME_BYTES + name.len();
        OBJECT_BYTES
            + self.ranges.len() * RANGE_BYTES
            + self.xattrs.iter().map(|name| text(name)).sum::<usize>()
            + self.names.keys().map(|name| text(name)).sum::<usize>()
    }

    /// Adds a range; returns by how many bytes the estimate grew, as the other two do.
    fn note_content(&mut self, start: u64, end: u64) -> isize {
        if !self.is_detailed() {
            return 0;
        }
        let before = self.ranges.len();
        self.ranges.add(start, end);
        if self.ranges.len() > limits::CHANGE_RANGES_MAX {
            self.ranges.coarsen(limits::CHANGE_RANGES_MAX / 2);
        }
        (self.ranges.len() as isize - before as isize) * RANGE_BYTES as isize
    }

    fn note_xattr(&mut self, name: &[u8]) -> isize {
        let is_new = self.is_detailed() && !self.xattrs.contains(name) && self.xattrs.insert(name.into());
        if is_new { (NAME_BYTES + name.len()) as isize } else { 0 }
    }

    /// A name stood for `before`, and stands for `after` now.
    fn note_name(&mut self, name: &[u8], before: Before, after: Option<FileId>) -> isize {
        if !self.is_detailed() {
            return 0;
        }
        let bytes = (NAME_BYTES + name.len()) as isize;
        match self.names.get(name) {
            None if before == Before::Was(after) => 0,
            None => {
                self.names.insert(name.into(), before);
                bytes
            }
            Some(first) if *first == Before::Was(after) => {
                self.names.remove(name);
                -bytes
            }
            Some(_) => 0,
        }
    }

    fn merge(&mut self, newer: &Self) {
        if self.gone || newer.gone {
            self.set_gone();
        } else if self.whole || newer.whole {
            self.set_whole();
        } else {
            self.attrs |= newer.attrs;
            newer.ranges.iter().for_each(|(start, end)| self.ranges.add(start, end));
            self.ranges.coarsen(limits::CHANGE_RANGES_MAX);
            self.xattrs.extend(newer.xattrs.iter().cloned());
            for (name, before) in &newer.names {
                self.names.entry(name.clone()).or_insert(*before);
            }
        }
    }
}

/// What changed on a volume. See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChangeMap {
    objects: BTreeMap<FileId, Change>,
    everything: bool,
    bytes: usize,
}

impl ChangeMap {
    /// Notes what an update changed. Updates come in their order.
    pub fn note<B: AsRef<[u8]>>(&mut self, op: &Op<B>, attrs: &AttrList) {
        if self.everything {
            return;
        }
        let lost = match op {
            Op::Unlink { file, .. } => Some(*file),
            Op::Rename { replaced, .. } => *replaced,
            _ => None,
        };
        // What programs still do to an open file without a name is nobody's business.
        let is_named = |file: FileId| attrs.get(file).is_none_or(|attr| attr.nlink > 0);
        if op.files()[0].is_none_or(is_named) {
            self.note_op(op, attrs);
        }
        for (file, _) in attrs.iter().filter(|(file, _)| is_named(*file)) {
            self.note_attrs(*file);
        }
        if let Some(file) = lost.filter(|file| is_gone(*file, attrs)) {
            self.note_gone(file);
        }
        self.keep_bound(limits::CHANGE_MAP_BYTES_MAX);
    }

    fn note_op<B: AsRef<[u8]>>(&mut self, op: &Op<B>, attrs: &AttrList) {
        match *op {
            Op::Write { file, offset, len } => self.content(file, offset, offset + u64::from(len)),
            Op::Zero { file, offset, len, .. } => {
                // What lies beyond the end of the file is none of its content.
                let end = (offset + len).min(attrs.get(file).map_or(u64::MAX, |attr| attr.size));
                self.content(file, offset, end);
            }
            Op::Truncate { file, size: start }
            | Op::Collapse { file, offset: start, .. }
            | Op::Insert { file, offset: start, .. } => self.content(file, start, TO_THE_END),
            Op::Create { dir, ref name, file, .. } => {
                let born = !self.objects.contains_key(&file);
                self.replace(file, |change| (change.whole, change.born) = (true, born));
                self.name(dir, name, Before::Was(None), Some(file));
            }
            Op::Link { dir, ref name, file } => self.name(dir, name, Before::Was(None), Some(file)),
            Op::Unlink { dir, ref name, file } => self.name(dir, name, Before::Was(Some(file)), None),
            Op::Bind { dir, ref name, file } => self.name(dir, name, Before::Unknown, Some(file)),
            Op::Unbind { dir, ref name } => self.name(dir, name, Before::Unknown, None),
            Op::Rename { from_dir, ref from, to_dir, ref to, file, replaced } => {
                self.name(from_dir, from, Before::Was(Some(file)), None);
                self.name(to_dir, to, Before::Was(replaced), Some(file));
            }
            Op::Exchange { a_dir, ref a, a_file, b_dir, ref b, b_file } => {
                self.name(a_dir, a, Before::Was(Some(a_file)), Some(b_file));
                self.name(b_dir, b, Before::Was(Some(b_file)), Some(a_file));
            }
            Op::SetAttr { file } => self.note_attrs(file),
            Op::SetXattr { file, ref name, .. } | Op::RemoveXattr { file, ref name } => {
                self.edit(file, |change| change.note_xattr(name.as_ref()));
            }
            Op::Object { file, .. } => self.note_whole(file),
            Op::Complete | Op::Resync => {}
        }
    }

    /// Notes that the attributes of an object changed.
    pub fn note_attrs(&mut self, file: FileId) {
        self.edit(file, |change| {
            change.attrs |= change.is_detailed();
            0
        });
    }

    fn content(&mut self, file: FileId, start: u64, end: u64) {
        self.edit(file, |change| change.note_content(start, end));
    }

    fn name<B: AsRef<[u8]>>(&mut self, dir: FileId, name: &B, before: Before, after: Option<FileId>) {
        self.edit(dir, |change| change.note_name(name.as_ref(), before, after));
    }

    /// Notes that nothing is known of what changed of an object.
    pub fn note_whole(&mut self, file: FileId) {
        self.replace(file, Change::set_whole);
        self.keep_bound(limits::CHANGE_MAP_BYTES_MAX);
    }

    /// Notes that the last name of an object went. One that was born in this level leaves no trace.
    pub fn note_gone(&mut self, file: FileId) {
        if let Entry::Occupied(entry) = self.objects.entry(file)
            && entry.get().born
        {
            self.bytes -= entry.remove().bytes();
            return;
        }
        self.replace(file, Change::set_gone);
    }

    /// Notes that anything may have changed.
    pub fn note_everything(&mut self) {
        *self = Self { everything: true, ..Self::default() };
    }

    /// Whether anything may have changed. Then the map names no objects.
    #[must_use]
    pub const fn is_everything(&self) -> bool {
        self.everything
    }

    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && !self.everything
    }

    /// Every object that changed, in the order of their identifiers.
    pub fn objects(&self) -> impl ExactSizeIterator<Item = (FileId, &Change)> {
        self.objects.iter().map(|(file, change)| (*file, change))
    }

    /// What changed of an object, if anything did.
    #[must_use]
    pub fn object(&self, file: FileId) -> Option<&Change> {
        self.objects.get(&file)
    }

    /// Takes an object out of the map: it is being read.
    pub fn take(&mut self, file: FileId) -> Option<Change> {
        let change = self.objects.remove(&file)?;
        self.bytes -= change.bytes();
        Some(change)
    }

    /// The object after another one, or else the first one.
    #[must_use]
    pub fn next_after(&self, file: Option<FileId>) -> Option<FileId> {
        let after =
            file.and_then(|file| self.objects.range((Bound::Excluded(file), Bound::Unbounded)).next());
        after.or_else(|| self.objects.first_key_value()).map(|(file, _)| *file)
    }

    /// Puts an object back, beside what was noted of it meanwhile.
    pub fn put_back(&mut self, file: FileId, mut change: Change) {
        if self.everything {
            return;
        }
        if let Some(newer) = self.take(file) {
            change.merge(&newer);
        }
        self.bytes += change.bytes();
        self.objects.insert(file, change);
    }

    /// Makes this map name what either names. `newer` was opened when this one was taken to be read again, and some of that
    /// may have been published: what was noted as new or as a name's old meaning is not so any more.
    pub fn merge(&mut self, newer: Self) {
        if self.everything || newer.everything {
            return self.note_everything();
        }
        self.settle();
        for (file, change) in newer.objects {
            match self.take(file) {
                None => self.put_back(file, change),
                Some(mut older) => {
                    older.merge(&change);
                    self.put_back(file, older);
                }
            }
        }
        self.keep_bound(limits::CHANGE_MAP_BYTES_MAX);
    }

    /// Forgets what only holds as long as nothing of the map was read again: which objects are new, and what names stood
    /// for.
    pub fn settle(&mut self) {
        for change in self.objects.values_mut() {
            change.born = false;
            change.names.values_mut().for_each(|before| *before = Before::Unknown);
        }
    }

    /// Estimated memory, in bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes the map coarser until its memory is within `max` bytes: first ranges, then objects, in the end all.
    /// [`note`](Self::note) does so by itself for the bound of [`limits`].
    pub fn keep_bound(&mut self, max: usize) {
        if self.bytes <= max {
            return;
        }
        // Well below the bound, so that the next update does not ask for the same again.
        let enough = max / 4 * 3;
        let mut ranges_max = limits::CHANGE_RANGES_MAX;
        while self.bytes > enough && ranges_max > 1 {
            ranges_max /= 4;
            self.coarsen(|change| change.ranges.coarsen(ranges_max));
        }
        if self.bytes > enough {
            self.coarsen(|change| {
                if change.xattrs.len() + change.names.len() > 1 {
                    change.set_whole();
                }
            });
        }
        if self.bytes > max {
            self.note_everything();
        }
    }

    fn coarsen(&mut self, step: impl Fn(&mut Change)) {
        self.bytes = 0;
        for change in self.objects.values_mut() {
            step(change);
            self.bytes += change.bytes();
        }
    }

    /// Changes an entry by a function that says by how much its memory grew.
    fn edit(&mut self, file: FileId, change: impl FnOnce(&mut Change) -> isize) {
        if self.everything {
            return;
        }
        let entry = self.objects.entry(file).or_insert_with(|| {
            self.bytes += OBJECT_BYTES;
            Change::default()
        });
        self.bytes = self.bytes.saturating_add_signed(change(entry));
    }

    fn replace(&mut self, file: FileId, change: impl FnOnce(&mut Change)) {
        if self.everything {
            return;
        }
        let entry = self.objects.entry(file).or_insert_with(|| {
            self.bytes += OBJECT_BYTES;
            Change::default()
        });
        self.bytes -= entry.bytes();
        change(entry);
        self.bytes += entry.bytes();
    }
}

/// Whether an object that lost a name has none left.
fn is_gone(file: FileId, attrs: &AttrList) -> bool {
    attrs.get(file).is_some_and(|attr| attr.nlink == 0 || attr.kind() == Some(Kind::Dir))
}
