//! The state of the simulated file system, and what changes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use twinfs_core::model::PAGE_BYTES;
use twinfs_core::update::{Attr, Kind};

pub(super) const PAGE: u64 = PAGE_BYTES as u64;
/// What real file systems set modification times to, and mirrors must set right.
pub(super) const SPOILT_MTIME: (i64, u32) = (9_999_999_999, 999);

type Page = Arc<[u8; PAGE_BYTES]>;
/// An inode number and its generation.
pub(super) type Key = (u64, u64);

#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) generation: u64,
    pub(super) attr: Attr,
    pub(super) target: Box<[u8]>,
    pub(super) names: BTreeMap<Box<[u8]>, u64>,
    pub(super) pages: BTreeMap<u64, Page>,
    pub(super) xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl Inode {
    pub(super) fn new(generation: u64, attr: Attr, target: &[u8]) -> Self {
        let (names, pages, xattrs) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { generation, attr, target: target.into(), names, pages, xattrs }
    }

    pub(super) fn is_dir(&self) -> bool {
        self.attr.kind() == Some(Kind::Dir)
    }

    pub(super) fn spoil(&mut self) {
        (self.attr.mtime_s, self.attr.mtime_ns) = SPOILT_MTIME;
    }

    pub(super) fn write(&mut self, page: u64, within: usize, bytes: &[u8]) {
        let content = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
        Arc::make_mut(content)[within..within + bytes.len()].copy_from_slice(bytes);
        self.attr.size = self.attr.size.max(page * PAGE + (within + bytes.len()) as u64);
        self.spoil();
    }

    pub(super) fn zero(&mut self, start: u64, end: u64) {
        let first = start / PAGE;
        let last = end.div_ceil(PAGE);
        let mut empty = Vec::new();
        for (number, page) in self.pages.range_mut(first..last) {
            let from = start.saturating_sub(number * PAGE).min(PAGE) as usize;
            let to = (end - number * PAGE).min(PAGE) as usize;
            if from == 0 && to == PAGE_BYTES {
                empty.push(*number);
            } else {
                Arc::make_mut(page)[from..to].fill(0);
            }
        }
        for number in empty {
            self.pages.remove(&number);
        }
        self.spoil();
    }
}

/// One change, absolute enough to be done again on the durable state.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Create { key: Key, attr: Attr, target: Box<[u8]>, dir: Key, name: Box<[u8]> },
    Link { key: Key, dir: Key, name: Box<[u8]> },
    Unlink { dir: Key, name: Box<[u8]> },
    Rename { from_dir: Key, from: Box<[u8]>, to_dir: Key, to: Box<[u8]> },
    Write { key: Key, page: u64, within: usize, bytes: Box<[u8]> },
    Punch { key: Key, start: u64, end: u64 },
    SetLen { key: Key, len: u64 },
    SetOwnerAndMode { key: Key, mode: u32, uid: u32, gid: u32 },
    SetMtime { key: Key, seconds: i64, nanoseconds: u32 },
    SetXattr { key: Key, name: Box<[u8]>, value: Option<Box<[u8]>> },
}

#[derive(Debug, Clone, Default)]
pub(super) struct Fs {
    pub(super) inodes: BTreeMap<u64, Arc<Inode>>,
}

impl Fs {
    pub(super) fn get(&self, (ino, generation): Key) -> Option<&Inode> {
        self.inodes.get(&ino).map(|inode| &**inode).filter(|inode| inode.generation == generation)
    }

    pub(super) fn get_mut(&mut self, (ino, generation): Key) -> Option<&mut Inode> {
        self.inodes.get_mut(&ino).filter(|inode| inode.generation == generation).map(Arc::make_mut)
    }

    pub(super) fn key(&self, ino: u64) -> Option<Key> {
        self.inodes.get(&ino).map(|inode| (ino, inode.generation))
    }

    /// What a name stands for.
    pub(super) fn child(&self, dir: Key, name: &[u8]) -> Option<Key> {
        self.key(*self.get(dir)?.names.get(name)?)
    }

    /// Does a change; nothing if what it is about is not there: then an earlier one did not survive.
    pub(super) fn apply(&mut self, change: &Change) -> Option<()> {
        match change {
            Change::Create { key, attr, target, dir, name } => {
                let parent = self.get_mut(*dir)?;
                parent.names.insert(name.clone(), key.0);
                parent.attr.nlink += u32::from(attr.kind() == Some(Kind::Dir));
                parent.spoil();
                self.inodes.insert(key.0, Arc::new(Inode::new(key.1, *attr, target)));
            }
            Change::Link { key, dir, name } => {
                self.get(*dir)?;
                self.get_mut(*key)?.attr.nlink += 1;
                let parent = self.get_mut(*dir)?;
                parent.names.insert(name.clone(), key.0);
                parent.spoil();
            }
            Change::Unlink { dir, name } => {
                let key = self.child(*dir, name)?;
                let parent = self.get_mut(*dir)?;
                parent.names.remove(name);
                parent.spoil();
                let inode = self.get_mut(key)?;
                let is_dir = inode.is_dir();
                inode.attr.nlink = if is_dir { 0 } else { inode.attr.nlink - 1 };
                if inode.attr.nlink == 0 {
                    self.inodes.remove(&key.0);
                }
                if is_dir {
                    self.get_mut(*dir)?.attr.nlink -= 1;
                }
            }
            Change::Rename { from_dir, from, to_dir, to } => {
                let key = self.child(*from_dir, from)?;
                self.get(*to_dir)?;
                let dirs = u32::from(self.get(key)?.is_dir());
                let parent = self.get_mut(*from_dir)?;
                parent.names.remove(from);
                parent.attr.nlink -= dirs;
                parent.spoil();
                let parent = self.get_mut(*to_dir)?;
                parent.names.insert(to.clone(), key.0);
                parent.attr.nlink += dirs;
                parent.spoil();
            }
            Change::Write { key, page, within, bytes } => self.get_mut(*key)?.write(*page, *within, bytes),
            Change::Punch { key, start, end } => self.get_mut(*key)?.zero(*start, *end),
            Change::SetLen { key, len } => {
                let inode = self.get_mut(*key)?;
                inode.zero(*len, u64::MAX);
                inode.attr.size = *len;
            }
            Change::SetOwnerAndMode { key, mode, uid, gid } => {
                let attr = &mut self.get_mut(*key)?.attr;
                (attr.mode, attr.uid, attr.gid) = (attr.mode & 0o170_000 | mode & 0o7777, *uid, *gid);
            }
            Change::SetMtime { key, seconds, nanoseconds } => {
                let attr = &mut self.get_mut(*key)?.attr;
                (attr.mtime_s, attr.mtime_ns) = (*seconds, *nanoseconds);
            }
            Change::SetXattr { key, name, value } => {
                let xattrs = &mut self.get_mut(*key)?.xattrs;
                match value {
                    Some(value) => xattrs.insert(name.clone(), value.clone()),
                    None => xattrs.remove(name),
                };
            }
        }
        Some(())
    }
}
