//! A naive file system tree in memory: the oracle of the tests.
//!
//! It applies updates one by one, in the order of their stamps, in the most obvious way. What any cleverer part of
//! twinfs shows after the same updates must be the same; [`Model::listing`] makes that comparable as text, also with a
//! real directory, and [`generate`] makes random runs of updates as a primary could have captured them.
//!
//! ```
//! use twinfs_core::model::{Model, generate::{Generator, Options}};
//!
//! let mut primary = Generator::new(7, Options::default());
//! let mut replica = Model::new(primary.model().root());
//! for change in primary.run(100) {
//!     replica.apply(&change.update, &change.data);
//! }
//! assert_eq!(primary.model().listing(), replica.listing());
//! ```
//!
//! This is for tests: it panics on an update that cannot follow what it has seen, and it keeps everything in memory.

pub mod generate;
mod listing;
mod random;

use std::collections::{BTreeMap, BTreeSet};

pub use self::listing::{ContentHasher, Entry, Listing};
pub use self::random::Random;
use crate::id::FileId;
use crate::update::{Attr, Kind, Op, Update};

/// Bytes of a page, in which contents are kept: those that were never written are not there, so that files may be huge.
pub const PAGE_BYTES: usize = 4096;

/// An object of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    attr: Attr,
    target: Box<[u8]>,
    /// By page number.
    pages: BTreeMap<u64, Box<[u8]>>,
    names: BTreeMap<Box<[u8]>, FileId>,
    xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl Object {
    fn new(attr: Attr, target: &[u8]) -> Self {
        Self {
            attr,
            target: target.into(),
            pages: BTreeMap::new(),
            names: BTreeMap::new(),
            xattrs: BTreeMap::new(),
        }
    }

    /// Its attributes.
    #[must_use]
    pub fn attr(&self) -> &Attr {
        &self.attr
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.attr.kind() == Some(Kind::Dir)
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.attr.kind() == Some(Kind::File)
    }

    /// The target of a symlink, empty for anything else.
    #[must_use]
    pub fn target(&self) -> &[u8] {
        &self.target
    }

    /// The names in a directory.
    #[must_use]
    pub fn names(&self) -> &BTreeMap<Box<[u8]>, FileId> {
        &self.names
    }

    /// The extended attributes.
    #[must_use]
    pub fn xattrs(&self) -> &BTreeMap<Box<[u8]>, Box<[u8]>> {
        &self.xattrs
    }

    /// The pages that are not known to be zero, by page number; each has [`PAGE_BYTES`] bytes.
    #[must_use]
    pub fn pages(&self) -> &BTreeMap<u64, Box<[u8]>> {
        &self.pages
    }

    /// Reads `len` bytes; beyond the end of the file they are zeros.
    #[must_use]
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let (page, within) = place(offset + done as u64);
            let part = (PAGE_BYTES - within).min(len - done);
            if let Some(page) = self.pages.get(&page) {
                bytes[done..done + part].copy_from_slice(&page[within..within + part]);
            }
            done += part;
        }
        bytes
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let (page, within) = place(offset + done as u64);
            let part = (PAGE_BYTES - within).min(bytes.len() - done);
            let page = self.pages.entry(page).or_insert_with(|| vec![0; PAGE_BYTES].into());
            page[within..within + part].copy_from_slice(&bytes[done..done + part]);
            done += part;
        }
    }

    fn zero(&mut self, start: u64, end: u64) {
        for (number, page) in self.pages.range_mut(place(start).0..) {
            let page_start = number * PAGE_BYTES as u64;
            if page_start >= end {
                break;
            }
            let from = start.saturating_sub(page_start);
            let to = (end - page_start).min(PAGE_BYTES as u64);
            page[from as usize..to as usize].fill(0);
        }
        self.pages.retain(|_, page| page.iter().any(|byte| *byte != 0));
    }

    /// Takes out everything from `start` on, and puts it back at `to`.
    fn move_tail(&mut self, start: u64, to: u64) {
        let first = place(start).0;
        let tail: Vec<(u64, Vec<u8>)> = self
            .pages
            .range(first..)
            .map(|(number, page)| {
                let page_start = number * PAGE_BYTES as u64;
                let skip = start.saturating_sub(page_start);
                (page_start + skip - start, page[skip as usize..].to_vec())
            })
            .collect();
        self.zero(start.min(to), u64::MAX);
        for (distance, bytes) in tail {
            self.write(to + distance, &bytes);
        }
    }
}

/// The page that an offset lies in, and where in it.
fn place(offset: u64) -> (u64, usize) {
    (offset / PAGE_BYTES as u64, (offset % PAGE_BYTES as u64) as usize)
}

/// A file system tree. Objects without a name stay in it: an open file may still be read and written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    root: FileId,
    objects: BTreeMap<FileId, Object>,
}

impl Model {
    /// A tree with nothing but a root directory.
    #[must_use]
    pub fn new(root: FileId) -> Self {
        let attr = Attr {
            mode: 0o040_755,
            uid: 0,
            gid: 0,
            nlink: 2,
            rdev: 0,
            size: PAGE_BYTES as u64,
            mtime_s: 0,
            mtime_ns: 0,
        };
        Self { root, objects: BTreeMap::from([(root, Object::new(attr, b""))]) }
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> FileId {
        self.root
    }

    /// An object, whether it has a name or not.
    #[must_use]
    pub fn object(&self, file: FileId) -> Option<&Object> {
        self.objects.get(&file)
    }

    /// All objects, also those without a name.
    pub fn objects(&self) -> impl Iterator<Item = (FileId, &Object)> {
        self.objects.iter().map(|(file, object)| (*file, object))
    }

    /// Applies an update; `data` is what a write wrote, empty otherwise.
    ///
    /// # Panics
    /// If the update cannot follow what was applied before: an unknown object, a name that is bound or unbound against
    /// what the update says, data of another length.
    pub fn apply(&mut self, update: &Update, data: &[u8]) {
        assert_eq!(update.op.data_len() as usize, data.len(), "data of {update:?}");
        match &update.op {
            Op::Write { file, offset, .. } => self.get(*file).write(*offset, data),
            Op::Truncate { file, size } => self.get(*file).zero(*size, u64::MAX),
            Op::Zero { file, offset, len, .. } => self.get(*file).zero(*offset, offset + len),
            Op::Collapse { file, offset, len } => self.get(*file).move_tail(offset + len, *offset),
            Op::Insert { file, offset, len } => self.get(*file).move_tail(*offset, offset + len),
            Op::Create { dir, name, file, target } => {
                let attr = update.attrs.get(*file).expect("a created object has attributes");
                let known = self.objects.insert(*file, Object::new(*attr, target));
                assert!(known.is_none(), "{file} is created twice");
                self.bind(*dir, name, *file, None);
            }
            Op::Object { file, target } => {
                let attr = update.attrs.get(*file).expect("a copied object has attributes");
                self.objects.insert(*file, Object::new(*attr, target));
            }
            Op::Link { dir, name, file } => self.bind(*dir, name, *file, None),
            Op::Bind { dir, name, file } => {
                self.get(*dir).names.insert(name.clone(), *file);
            }
            Op::Unlink { dir, name, file } => self.unbind(*dir, name, *file),
            Op::Rename { from_dir, from, to_dir, to, file, replaced } => {
                self.unbind(*from_dir, from, *file);
                self.bind(*to_dir, to, *file, *replaced);
            }
            Op::Exchange { a_dir, a, a_file, b_dir, b, b_file } => {
                self.bind(*a_dir, a, *b_file, Some(*a_file));
                self.bind(*b_dir, b, *a_file, Some(*b_file));
            }
            Op::SetXattr { file, name, value } => {
                self.get(*file).xattrs.insert(name.clone(), value.clone());
            }
            Op::RemoveXattr { file, name } => {
                assert!(self.get(*file).xattrs.remove(name).is_some(), "no such xattr: {update:?}");
            }
            Op::Unbind { dir, name } => {
                self.get(*dir).names.remove(name);
            }
            Op::SetAttr { .. } | Op::Complete | Op::Resync => {}
        }
        for (file, attr) in update.attrs.iter() {
            self.get(*file).attr = *attr;
        }
    }

    /// Forgets the objects without a name: nobody has one open any more.
    pub fn drop_unnamed(&mut self) {
        let mut named = BTreeSet::from([self.root]);
        let mut open = vec![self.root];
        while let Some(dir) = open.pop() {
            for child in self.objects[&dir].names.values() {
                if named.insert(*child) {
                    open.push(*child);
                }
            }
        }
        self.objects.retain(|file, _| named.contains(file));
    }

    /// What stands in the tree, in a form that can be compared and read.
    #[must_use]
    pub fn listing(&self) -> Listing {
        let mut listing = Listing::default();
        let mut open: Vec<(Vec<u8>, FileId)> = vec![(Vec::new(), self.root)];
        let numbers: BTreeMap<FileId, u64> = self.objects.keys().copied().zip(0..).collect();
        while let Some((path, file)) = open.pop() {
            let object = &self.objects[&file];
            for (name, child) in &object.names {
                let mut path = path.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                open.push((path, *child));
            }
            let mut content = ContentHasher::default();
            object.pages.iter().for_each(|(number, page)| content.page(*number, page));
            listing.add(Entry {
                path,
                identity: numbers[&file],
                attr: object.attr,
                target: object.target.to_vec(),
                xattrs: object.xattrs.clone(),
                content,
            });
        }
        listing
    }

    fn get(&mut self, file: FileId) -> &mut Object {
        self.objects.get_mut(&file).unwrap_or_else(|| panic!("unknown object {file}"))
    }

    fn bind(&mut self, dir: FileId, name: &[u8], file: FileId, expected: Option<FileId>) {
        assert!(self.objects.contains_key(&file), "unknown object {file}");
        let before = self.get(dir).names.insert(name.into(), file);
        assert_eq!(before, expected, "what `{}` in {dir} stood for", name.escape_ascii());
    }

    fn unbind(&mut self, dir: FileId, name: &[u8], expected: FileId) {
        let before = self.get(dir).names.remove(name);
        assert_eq!(before, Some(expected), "what `{}` in {dir} stood for", name.escape_ascii());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::sample_file;

    #[test]
    fn content_is_what_a_plain_vector_says() {
        let mut random = Random::new(5);
        let mut object = Object::new(*Model::new(sample_file(1)).objects[&sample_file(1)].attr(), b"");
        let mut plain = vec![0u8; 60_000];
        for step in 0..400 {
            let (offset, len) = (random.below(15_000), random.below(9_000));
            let (start, end) = (offset as usize, (offset + len) as usize);
            match random.below(4) {
                0 | 1 => {
                    let data = random.bytes(len as usize);
                    object.write(offset, &data);
                    plain[start..end].copy_from_slice(&data);
                }
                2 => {
                    object.zero(offset, offset + len);
                    plain[start..end].fill(0);
                }
                _ if step % 2 == 0 => {
                    object.move_tail(offset + len, offset);
                    plain.drain(start..end);
                    plain.resize(60_000, 0);
                }
                _ => {
                    object.move_tail(offset, offset + len);
                    plain.splice(start..start, std::iter::repeat_n(0, len as usize));
                    plain.truncate(60_000);
                    object.zero(60_000, u64::MAX);
                }
            }
            assert!(object.read(0, 60_000) == plain, "step {step}");
        }
    }
}
