//! Looking through several deltas that lie on top of each other, the newest first, and a tree below them.
//!
//! While a checkpoint writes a frozen delta into the tree, the view is the live delta on the frozen one on the tree. All
//! functions here are pure: they say where the answer is, and whoever has journal and tree reads it there. An object
//! that was born in a layer hides every layer under that.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{DataRef, Delta, ObjectDelta, Piece, Source};
use crate::id::FileId;
use crate::update::Attr;

/// Where bytes of a file stand once all layers were looked through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// In the journal.
    Journal(DataRef),
    /// Nowhere: they are zeros.
    Zero,
    /// In the tree's file, at this offset; zeros where that file has already ended.
    Tree(u64),
}

/// A part of a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolved {
    /// First byte, in the file as it shows.
    pub offset: u64,
    /// Bytes; never zero.
    pub len: u64,
    /// Where they are.
    pub content: Content,
}

/// What all layers together say about a set of keys, and whether the tree adds to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged<'a, V> {
    /// What the layers say, in byte order; `None` for what is gone.
    pub said: BTreeMap<&'a [u8], Option<V>>,
    /// Whether the tree's entries that are not in `said` count.
    pub tree: bool,
}

/// The layers that count for an object, and whether the tree does after them.
fn counting<'a>(layers: &'a [&Delta], file: FileId) -> (impl Iterator<Item = &'a ObjectDelta>, bool) {
    let born = layers.iter().position(|layer| layer.object(file).is_some_and(|o| o.born().is_some()));
    let above = &layers[..born.map_or(layers.len(), |at| at + 1)];
    (above.iter().filter_map(move |layer| layer.object(file)), born.is_none())
}

/// Whether the tree has any say about an object: not if it was born in one of the layers.
#[must_use]
pub fn tree_counts(layers: &[&Delta], file: FileId) -> bool {
    counting(layers, file).1
}

/// The attributes of an object; `None` if they are those of the tree.
#[must_use]
pub fn attr<'a>(layers: &'a [&Delta], file: FileId) -> Option<&'a Attr> {
    counting(layers, file).0.find_map(ObjectDelta::attr)
}

/// The target of a symlink; `None` if it is that of the tree.
#[must_use]
pub fn target<'a>(layers: &'a [&Delta], file: FileId) -> Option<&'a [u8]> {
    counting(layers, file).0.find_map(ObjectDelta::born)
}

/// What a name in a directory stands for, `Some(None)` if nothing; `None` if the tree has to say.
#[must_use]
pub fn lookup(layers: &[&Delta], dir: FileId, name: &[u8]) -> Option<Option<FileId>> {
    let (mut objects, tree) = counting(layers, dir);
    objects.find_map(|object| object.name(name)).or((!tree).then_some(None))
}

/// The value of an extended attribute, `Some(None)` if there is none; `None` if the tree has to say.
#[must_use]
pub fn xattr<'a>(layers: &'a [&Delta], file: FileId, name: &[u8]) -> Option<Option<&'a [u8]>> {
    let (mut objects, tree) = counting(layers, file);
    objects.find_map(|object| object.xattr(name)).or((!tree).then_some(None))
}

/// All names of a directory.
#[must_use]
pub fn names<'a>(layers: &'a [&Delta], dir: FileId) -> Merged<'a, FileId> {
    merge(layers, dir, ObjectDelta::names)
}

/// All extended attributes of an object.
#[must_use]
pub fn xattrs<'a>(layers: &'a [&Delta], file: FileId) -> Merged<'a, &'a [u8]> {
    merge(layers, file, ObjectDelta::xattrs)
}

fn merge<'a, V, I>(layers: &'a [&Delta], file: FileId, said: impl Fn(&'a ObjectDelta) -> I) -> Merged<'a, V>
where
    I: Iterator<Item = (&'a [u8], Option<V>)>,
{
    let (objects, tree) = counting(layers, file);
    let mut merged = BTreeMap::new();
    for (key, value) in objects.flat_map(said) {
        merged.entry(key).or_insert(value);
    }
    Merged { said: merged, tree }
}

/// Where the bytes of a range of a file are, in order and without gaps.
///
/// As with [`ObjectDelta::pieces`], clip the range to the file's size first.
#[must_use]
pub fn resolve(layers: &[&Delta], file: FileId, range: Range<u64>) -> Vec<Resolved> {
    let mut found = Vec::new();
    if range.start < range.end {
        let whole =
            Piece { offset: range.start, len: range.end - range.start, source: Source::Below(range.start) };
        descend(layers, file, whole, &mut found);
    }
    found
}

/// Looks for a piece in the first of `layers` at the offset that its source names. Recursion ends with the layers.
fn descend(layers: &[&Delta], file: FileId, piece: Piece, found: &mut Vec<Resolved>) {
    let Piece { offset, len, source } = piece;
    let content = match source {
        Source::Journal(data) => Content::Journal(data),
        Source::Zero => Content::Zero,
        Source::Below(below) => {
            let Some((layer, under)) = layers.split_first() else {
                return push(found, Resolved { offset, len, content: Content::Tree(below) });
            };
            let Some(object) = layer.object(file) else { return descend(under, file, piece, found) };
            for inner in object.pieces(below..below.saturating_add(len)) {
                descend(under, file, Piece { offset: offset + (inner.offset - below), ..inner }, found);
            }
            return;
        }
    };
    push(found, Resolved { offset, len, content });
}

/// Adds a piece, joined with the one before if they are one run.
fn push(found: &mut Vec<Resolved>, next: Resolved) {
    let source = |content| match content {
        Content::Journal(data) => Source::Journal(data),
        Content::Zero => Source::Zero,
        Content::Tree(offset) => Source::Below(offset),
    };
    match found.last_mut() {
        Some(last) if source(last.content).continues(last.len, source(next.content), next.len) => {
            last.len += next.len;
        }
        _ => found.push(next),
    }
}
