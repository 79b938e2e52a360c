//! What a run of updates did to one object.

use std::ops::Range;
use std::sync::Arc;

use super::content::Content;
use super::small_map::SmallMap;
use super::{Piece, Source};
use crate::id::FileId;
use crate::update::{Attr, Kind};

/// Estimated memory of an object apart from what grows: itself, its allocation and its place in the map of objects.
pub(super) const OBJECT_BYTES: usize = size_of::<ObjectDelta>() + 112;
/// Estimated memory of a name or extended attribute apart from its bytes: map entry and allocations.
const ENTRY_BYTES: usize = 96;

/// The net effect of a run of updates on one object.
///
/// Only what the updates said is here; of the rest, the layer below holds unless the object was [born](Self::born).
///
/// Names and xattrs that came and went stay as "unbound" and "removed", even where nothing below can have them: a
/// delta that is folded anew after a crash meets a tree in which an earlier checkpoint may already have made them.
#[derive(Clone)]
pub struct ObjectDelta {
    attr: Option<Attr>,
    born: Option<Arc<[u8]>>,
    unlinked: bool,
    content: Content,
    names: SmallMap<Arc<[u8]>, Option<FileId>>,
    xattrs: SmallMap<Arc<[u8]>, Option<Arc<[u8]>>>,
    /// Estimated memory of names, xattrs and symlink target.
    text_bytes: usize,
}

impl ObjectDelta {
    pub(super) fn untouched() -> Self {
        Self {
            attr: None,
            born: None,
            unlinked: false,
            content: Content::untouched(),
            names: SmallMap::default(),
            xattrs: SmallMap::default(),
            text_bytes: 0,
        }
    }

    /// The latest attributes, if any update said them. Of a born object they are always there.
    #[must_use]
    pub fn attr(&self) -> Option<&Attr> {
        self.attr.as_ref()
    }

    /// Whether the object was created in this delta, or reset by a copy: then nothing below counts, and what this delta
    /// says is all there is. The bytes are the target of a symlink, empty for anything else.
    ///
    /// In the tree such an object may exist nevertheless, as something older or as the leftover of a checkpoint that
    /// crashed; a checkpoint makes it anew.
    #[must_use]
    pub fn born(&self) -> Option<&[u8]> {
        self.born.as_deref()
    }

    /// Whether the last name of the object is gone. It stays here because an open file may still be read.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.unlinked || self.attr.is_some_and(|attr| attr.nlink == 0)
    }

    /// What a name in this directory stands for: `None` if this delta says nothing of it, `Some(None)` if it is unbound.
    ///
    /// That nothing is said of a name in a [born](Self::born) directory means that it is unbound, too.
    #[must_use]
    pub fn name(&self, name: &[u8]) -> Option<Option<FileId>> {
        self.names.get(name).copied()
    }

    /// Every name that this delta says something of, in byte order.
    pub fn names(&self) -> impl Iterator<Item = (&[u8], Option<FileId>)> {
        self.names.iter().map(|(name, file)| (&**name, *file))
    }

    /// An extended attribute: `None` if this delta says nothing of it, `Some(None)` if it was removed.
    #[must_use]
    pub fn xattr(&self, name: &[u8]) -> Option<Option<&[u8]>> {
        self.xattrs.get(name).map(Option::as_deref)
    }

    /// Every extended attribute that this delta says something of, in byte order; `None` if it was removed.
    pub fn xattrs(&self) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        self.xattrs.iter().map(|(name, value)| (&**name, value.as_deref()))
    }

    /// What a range of the content consists of, in order and without gaps. Where this delta says nothing, that is
    /// [`Source::Below`] at the same offset.
    ///
    /// The end of the file is not marked: what lies beyond it comes out as zeros or as something below that is also
    /// beyond an end. Clip to the size in the attributes, and let the layer below read as zeros beyond its own end.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> {
        self.content.pieces(range)
    }

    /// Whether the content is anything but what is below. Always so for a born object.
    #[must_use]
    pub fn content_changed(&self) -> bool {
        self.content.is_changed()
    }

    /// Whether content of the layer below was moved, so that the file cannot be changed in place and has to be written
    /// anew from [`pieces`](Self::pieces). (Content that was moved away and back counts, too.)
    #[must_use]
    pub fn content_shifted(&self) -> bool {
        self.content.is_shifted()
    }

    /// The extents to write into the file below if the content is not [shifted](Self::content_shifted): data, and ranges
    /// to punch. First the file has to be cut to [`below_limit`](Self::below_limit), if it is longer; last it gets the
    /// size of its attributes.
    pub fn changed(&self) -> impl Iterator<Item = Piece> {
        self.content.changed()
    }

    /// The offset from which on nothing below counts, because the file was cut there; `None` if it never was.
    #[must_use]
    pub fn below_limit(&self) -> Option<u64> {
        self.content.limit()
    }

    /// Estimated memory, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        OBJECT_BYTES + self.text_bytes + self.content.bytes()
    }

    pub(super) fn reset(&mut self, target: &[u8]) {
        *self = Self {
            born: Some(target.into()),
            content: Content::empty(),
            text_bytes: target.len(),
            ..Self::untouched()
        };
    }

    pub(super) fn set_attr(&mut self, attr: Attr) {
        self.attr = Some(attr);
    }

    /// One of its names is gone. For a directory that was the only one, whatever the file system gives as its link count.
    pub(super) fn set_unlinked(&mut self) {
        self.unlinked = self.attr.is_some_and(|attr| attr.kind() == Some(Kind::Dir));
    }

    pub(super) fn set_linked(&mut self) {
        self.unlinked = false;
    }

    pub(super) fn set_name(&mut self, name: &[u8], file: Option<FileId>) {
        if self.names.insert(name.into(), file).is_none() {
            self.text_bytes += ENTRY_BYTES + name.len();
        }
    }

    pub(super) fn set_xattr(&mut self, name: &[u8], value: Option<&[u8]>) {
        self.text_bytes += value.map_or(0, <[u8]>::len);
        match self.xattrs.insert(name.into(), value.map(Into::into)) {
            Some(old) => self.text_bytes -= old.map_or(0, |old| old.len()),
            None => self.text_bytes += ENTRY_BYTES + name.len(),
        }
    }

    pub(super) fn set_content(&mut self, offset: u64, len: u64, source: Source) {
        self.content.set(offset, len, source);
    }

    pub(super) fn truncate(&mut self, size: u64) {
        self.content.truncate(size);
    }

    /// `size` is that after the operation.
    pub(super) fn collapse(&mut self, offset: u64, len: u64, size: u64) {
        self.content.collapse(offset, len, size.saturating_add(len));
    }

    /// `size` is that after the operation.
    pub(super) fn open_hole(&mut self, offset: u64, len: u64, size: u64) {
        self.content.open_hole(offset, len, size.saturating_sub(len));
    }
}
