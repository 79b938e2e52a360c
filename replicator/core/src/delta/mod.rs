//! The net effect of a run of updates.
//!
//! *Folding* updates, in the order of their stamps, makes a [`Delta`]: names bound, attributes set, extents written.
//! Laid over the plain tree as of the update before the run, it shows the tree as of the run's last update. Written into
//! that tree, it makes that state for good. Data is not in a delta, only its place in the journal.
//!
//! A delta is a persistent map: cloning costs O(1), and folding a group into a clone costs O(changed · log n) and leaves
//! the original as it is. So the view of a replica is a pointer to a delta that never changes, and showing a group is
//! to fold it into a clone and swap the pointer. Several deltas can lie on top of each other, see [`layers`].
//!
//! Renames, exchanges, links and removals all come down to what a name in a directory stands for. Which object lost its
//! last name is told by the attributes that come with each update.

mod content;
pub mod layers;
mod object;
mod small_map;

use std::sync::Arc;

use imbl::OrdMap;

pub use self::object::ObjectDelta;
use crate::id::FileId;
use crate::update::{Op, Update};

/// Where a record set stands in the replica's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetLocation {
    /// The journal segment.
    pub segment: u64,
    /// Offset of the set's first byte in the segment.
    pub offset: u64,
}

/// Where a byte of written data stands in the journal: in the data section of a record set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataRef {
    /// The record set.
    pub set: SetLocation,
    /// Offset in the set's (uncompressed) data section.
    pub offset: u32,
}

/// Where bytes of a file stand, as one delta sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In the journal.
    Journal(DataRef),
    /// Nowhere: they are zeros, and best a hole. (Whether blocks were allocated to zeros is not mirrored.)
    Zero,
    /// In the layer below (an older delta, then the tree), at that layer's own offset.
    Below(u64),
}

/// A part of a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte, in the file as this delta shows it.
    pub offset: u64,
    /// Bytes; never zero.
    pub len: u64,
    /// Where they are.
    pub source: Source,
}

/// The net effect of a run of updates on one volume.
#[derive(Clone, Default)]
pub struct Delta {
    objects: OrdMap<FileId, Arc<ObjectDelta>>,
    bytes: usize,
}

impl Delta {
    /// Adds an update to the run. Updates come in the order of their stamps; `data` says where the data of a write stands
    /// in the journal.
    ///
    /// Folding a run again that is part of the delta already, up to its end, changes nothing unless it has a `collapse` or
    /// `insert`.
    ///
    /// # Panics
    /// If `data` is missing for a write.
    pub fn fold(&mut self, update: &Update, data: Option<DataRef>) {
        self.fold_op(update, data);
        for (file, attr) in update.attrs.iter() {
            self.edit(*file, |object| object.set_attr(*attr));
        }
        match update.op {
            Op::Unlink { file, .. } | Op::Rename { replaced: Some(file), .. } => {
                self.edit(file, ObjectDelta::set_unlinked);
            }
            _ => {}
        }
    }

    fn fold_op(&mut self, update: &Update, data: Option<DataRef>) {
        let size_after = |file| update.attrs.get(file).map_or(0, |attr| attr.size);
        match &update.op {
            Op::Write { file, offset, len } => {
                let source =
                    Source::Journal(data.expect("the caller knows where the data of a write stands"));
                self.edit(*file, |object| object.set_content(*offset, u64::from(*len), source));
            }
            Op::Truncate { file, size } => self.edit(*file, |object| object.truncate(*size)),
            Op::Zero { file, offset, len, .. } => {
                self.edit(*file, |object| object.set_content(*offset, *len, Source::Zero));
            }
            Op::Collapse { file, offset, len } => {
                self.edit(*file, |object| object.collapse(*offset, *len, size_after(*file)));
            }
            Op::Insert { file, offset, len } => {
                self.edit(*file, |object| object.open_hole(*offset, *len, size_after(*file)));
            }
            Op::Create { dir, name, file, target } => {
                self.edit(*file, |object| object.reset(target));
                self.bind(*dir, name, *file);
            }
            Op::Object { file, target } => self.edit(*file, |object| object.reset(target)),
            Op::Link { dir, name, file } | Op::Bind { dir, name, file } => self.bind(*dir, name, *file),
            Op::Unlink { dir, name, .. } | Op::Unbind { dir, name } => {
                self.edit(*dir, |dir| dir.set_name(name, None))
            }
            Op::Rename { from_dir, from, to_dir, to, file, .. } => {
                self.edit(*from_dir, |dir| dir.set_name(from, None));
                self.bind(*to_dir, to, *file);
            }
            Op::Exchange { a_dir, a, a_file, b_dir, b, b_file } => {
                self.bind(*a_dir, a, *b_file);
                self.bind(*b_dir, b, *a_file);
            }
            Op::SetXattr { file, name, value } => {
                self.edit(*file, |object| object.set_xattr(name, Some(value)));
            }
            Op::RemoveXattr { file, name } => self.edit(*file, |object| object.set_xattr(name, None)),
            Op::SetAttr { .. } | Op::Complete | Op::Resync => {}
        }
    }

    /// The net effect on one object; `None` if no update of the run touched it.
    #[must_use]
    pub fn object(&self, file: FileId) -> Option<&ObjectDelta> {
        self.objects.get(&file).map(Arc::as_ref)
    }

    /// Every object that an update of the run touched, in the order of their identifiers.
    pub fn objects(&self) -> impl Iterator<Item = (FileId, &ObjectDelta)> {
        self.objects.iter().map(|(file, object)| (*file, &**object))
    }

    /// Whether the run touched nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Estimated memory, in bytes. What clones share is counted in each of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn bind(&mut self, dir: FileId, name: &[u8], file: FileId) {
        self.edit(dir, |dir| dir.set_name(name, Some(file)));
        if self.object(file).is_some_and(ObjectDelta::is_gone) {
            self.edit(file, ObjectDelta::set_linked);
        }
    }

    /// Changes one object, which is copied first if a clone shares it, and keeps the estimate of memory.
    fn edit(&mut self, file: FileId, change: impl FnOnce(&mut ObjectDelta)) {
        let known = self.objects.len();
        let object = self.objects.entry(file).or_insert_with(|| Arc::new(ObjectDelta::untouched()));
        let object = Arc::make_mut(object);
        let before = object.bytes();
        change(object);
        let after = object.bytes();
        let added = self.objects.len() - known;
        self.bytes = self.bytes + after - if added == 0 { before } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::stamp::Stamp;
    use crate::update::{Attr, sample_file};

    fn root() -> FileId {
        sample_file(1)
    }

    fn dir_attr() -> Attr {
        *Model::new(root()).object(root()).expect("the root is there").attr()
    }

    fn fold(delta: &mut Delta, op: Op, attrs: &[(FileId, Attr)]) {
        let update = Update { stamp: Stamp::default(), op, attrs: attrs.iter().copied().collect() };
        delta.fold(&update, None);
    }

    fn name(text: &str) -> Box<[u8]> {
        text.as_bytes().into()
    }

    #[test]
    fn deltas_may_be_shared_between_threads() {
        fn check<T: Send + Sync>() {}
        check::<Delta>();
    }

    /// Some file systems give the link count of a removed directory as if it still were there.
    #[test]
    fn a_removed_directory_is_gone_whatever_its_link_count() {
        let (file, attr) = (sample_file(5), dir_attr());
        let mut delta = Delta::default();
        let is_gone = |delta: &Delta| delta.object(file).is_some_and(ObjectDelta::is_gone);
        fold(&mut delta, Op::Unlink { dir: root(), name: name("d"), file }, &[(file, attr)]);
        assert!(is_gone(&delta));
        fold(&mut delta, Op::Bind { dir: root(), name: name("d"), file }, &[]);
        assert!(!is_gone(&delta));
        let moved = sample_file(6);
        let (from, to) = (name("e"), name("d"));
        let op = Op::Rename { from_dir: root(), from, to_dir: root(), to, file: moved, replaced: Some(file) };
        fold(&mut delta, op, &[(file, attr), (moved, attr)]);
        assert!(is_gone(&delta));
        assert!(!delta.object(moved).is_some_and(ObjectDelta::is_gone));
        assert_eq!(layers::lookup(&[&delta], root(), b"d"), Some(Some(moved)));
    }

    #[test]
    fn a_file_with_another_name_is_not_gone() {
        let (file, attr) = (sample_file(5), Attr { mode: 0o100_644, nlink: 1, ..dir_attr() });
        let mut delta = Delta::default();
        fold(&mut delta, Op::Unlink { dir: root(), name: name("a"), file }, &[(file, attr)]);
        assert!(!delta.object(file).is_some_and(ObjectDelta::is_gone));
        let attr = Attr { nlink: 0, ..attr };
        fold(&mut delta, Op::Unlink { dir: root(), name: name("b"), file }, &[(file, attr)]);
        assert!(delta.object(file).is_some_and(ObjectDelta::is_gone));
    }

    #[test]
    fn only_a_born_object_answers_for_what_was_never_said() {
        let (file, attr) = (sample_file(5), dir_attr());
        let (mut old, mut new) = (Delta::default(), Delta::default());
        fold(&mut old, Op::SetXattr { file, name: name("user.x"), value: name("1") }, &[(file, attr)]);
        fold(&mut old, Op::Bind { dir: file, name: name("a"), file: root() }, &[]);
        fold(&mut new, Op::SetAttr { file }, &[(file, attr)]);
        assert_eq!(layers::lookup(&[&new, &old], file, b"b"), None);
        assert_eq!(layers::xattr(&[&new, &old], file, b"user.y"), None);
        assert_eq!(layers::xattr(&[&new, &old], file, b"user.x"), Some(Some(b"1".as_slice())));
        fold(&mut new, Op::Object { file, target: name("") }, &[(file, attr)]);
        assert_eq!(layers::lookup(&[&new, &old], file, b"a"), Some(None));
        assert_eq!(layers::xattr(&[&new, &old], file, b"user.x"), Some(None));
        assert_eq!(layers::target(&[&new, &old], file), Some(b"".as_slice()));
        assert!(!layers::tree_counts(&[&new, &old], file) && layers::tree_counts(&[&old], file));
        assert!(!layers::names(&[&new, &old], file).tree);
    }
}
