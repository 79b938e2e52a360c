//! Names: lookup, create, link, unlink, rename.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, linkat, mkdirat, mknodat, openat, renameat_with, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use twinfs_core::limits;
use twinfs_core::update::{AttrList, Intent, Kind, Note, Op, OpKind};

use crate::copier::until_told;
use crate::credentials::{Caller, Making};
use crate::errno::{FsError, Result};
use crate::mirror::{Attributes, Child, Entry, Mirror, Reserved, Target, attr, names, read_back, unrecorded};
use crate::ops::attr::SetAttr;
use crate::ops::data::{OpenFile, backing_flags, is_heavy};
use crate::stripes::Guard;

/// An object to be made.
#[derive(Debug, Clone, Copy)]
pub enum NewNode<'a> {
    /// A directory with these permissions.
    Dir {
        /// Permission bits, before the umask.
        mode: u32,
    },
    /// A file, fifo, socket or device.
    Node {
        /// Type and permission bits, before the umask.
        mode: u32,
        /// Device number, as `stat(2)` tells it.
        rdev: u64,
    },
    /// A symbolic link.
    Symlink {
        /// What it says.
        target: &'a [u8],
    },
}

impl Mirror {
    /// Looks up a name, and counts a lookup of what it stands for. `None` if there is no such name.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Entry>> {
        if self.is_list(parent) {
            return self.lookup_volume(name);
        }
        let dir = self.target(parent)?;
        if name.len() > limits::NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        let _kept = self.stripes.share(dir.node.id);
        match dir.volume.child(&dir.fd, name) {
            Ok(child) => Ok(Some(self.learn(&dir, name, child))),
            Err(FsError::Os(Errno::NOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn lookup_volume(&self, name: &[u8]) -> Result<Option<Entry>> {
        let Some(volume) = self.volumes.iter().find(|volume| volume.name.as_str().as_bytes() == name) else {
            return Ok(None);
        };
        let stat = rustix::fs::fstat(&volume.root_fd)?;
        Ok(Some(Entry {
            nodeid: volume.root_node,
            generation: volume.root.generation,
            attributes: Attributes::from(&stat),
        }))
    }

    /// Takes back lookups. What is returned takes a while to drop: it frees a lot of space.
    #[must_use]
    pub fn forget(&self, nodeid: u64, lookups: u64) -> Option<impl Send + 'static> {
        self.nodes.forget(nodeid, lookups).filter(|fd| is_heavy(fd))
    }

    /// Makes an object.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn make(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        umask: u32,
        new: NewNode<'_>,
    ) -> Result<Entry> {
        let target = if let NewNode::Symlink { target } = new { target } else { &[] };
        if target.len() > limits::SYMLINK_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        let (entry, _) = self.create_with(caller, parent, name, umask, target, |dir| {
            match new {
                NewNode::Dir { mode } => mkdirat(dir, name, Mode::from_raw_mode(mode))?,
                NewNode::Node { mode, rdev } => {
                    mknodat(
                        dir,
                        name,
                        FileType::from_raw_mode(mode),
                        Mode::from_raw_mode(mode & 0o7777),
                        rdev,
                    )?;
                }
                NewNode::Symlink { target } => symlinkat(target, dir, name)?,
            }
            Ok(None)
        })?;
        Ok(entry)
    }

    /// Makes a file (or finds one, without `O_EXCL`), opens it and returns a handle for it.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: i32,
    ) -> Result<(Entry, u64)> {
        let how = backing_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = self.create_with(caller, parent, name, umask, &[], |dir| {
            Ok(Some(openat(dir, name, how, Mode::from_raw_mode(mode & 0o7777))?))
        });
        let (entry, file) = match made {
            Ok((entry, Some(file))) => (entry, file),
            Err(FsError::Os(Errno::EXIST)) if flags & libc::O_EXCL == 0 => {
                let entry = self.lookup(parent, name)?.ok_or(FsError::Os(Errno::NOENT))?;
                let fh = self.open_existing(caller, entry.nodeid, flags).inspect_err(|_| {
                    drop(self.forget(entry.nodeid, 1));
                })?;
                return Ok((entry, fh));
            }
            Ok((_, None)) => unreachable!("the call above returns a file"),
            Err(error) => return Err(error),
        };
        let node = self.nodes.get(entry.nodeid).ok_or(FsError::NoNode)?;
        Ok((entry, self.files.insert(OpenFile::new(&node, file).with_flags(flags))))
    }

    /// Opens a file that was to be created but exists, and truncates it with `O_TRUNC`.
    fn open_existing(&self, caller: Caller, nodeid: u64, flags: i32) -> Result<u64> {
        if flags & libc::O_TRUNC != 0 {
            let empty = SetAttr { size: Some(0), ..SetAttr::default() };
            self.setattr(caller, nodeid, &empty, None)?;
        }
        self.open(nodeid, flags)
    }

    /// What all ways of making an object have in common. `call` makes it, as the caller; it may return it opened.
    fn create_with(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        umask: u32,
        target: &[u8],
        call: impl FnOnce(BorrowedFd<'_>) -> rustix::io::Result<Option<OwnedFd>>,
    ) -> Result<(Entry, Option<OwnedFd>)> {
        use std::os::fd::AsFd;
        let dir = self.parent(parent, name)?;
        let (reserved, _guard) = self.reserve_birth(&dir, name, target.len())?;
        let mut reserved = reserved.into_iter();
        let pending = reserved.next().ok_or(FsError::Unrecorded)?;
        if names(&dir.fd, name, None)? {
            pending.note(Note { op: OpKind::Create, first: None, second: None });
        }
        let opened = {
            let _making = Making::files_of(caller, umask)?;
            call(dir.fd.as_fd())?
        };
        let child =
            dir.volume.child(&dir.fd, name).map_err(|error| unrecorded("looking up a new object", error))?;
        let op = Op::Create { dir: dir.node.id, name, file: child.id, target };
        let attrs = [(child.id, attr(&child.stat)), (dir.node.id, attr(&read_back(&dir.fd)?))];
        let _stamp = pending.publish(op, attrs.into_iter().collect(), &[]);
        let kind = child.kind;
        let entry = self.learn(&dir, name, child);
        if reserved.len() > 0 && kind != Kind::Symlink {
            self.record_inherited_acls(&self.target(entry.nodeid)?, reserved)?;
        }
        Ok((entry, opened))
    }

    /// Reserves room for a birth, and for the ACLs that the new object inherits; and locks the directory.
    fn reserve_birth<'a>(
        &'a self,
        dir: &Target<'a>,
        name: &[u8],
        target_len: usize,
    ) -> Result<(Vec<Reserved<'a>>, Guard<'a>)> {
        let id = dir.node.id;
        let birth = (Intent::Names { first: (id, name), second: None }, name.len() + target_len, 0);
        for _ in 0..limits::LOOKUP_RETRIES_MAX {
            let inherits = self.default_acl_len(dir);
            let reserved = match inherits {
                None => vec![self.reserve(dir.volume, &birth.0, birth.1, 0)?],
                Some(len) => {
                    let [access, default] = Self::inherited_acls(id, name, len);
                    self.reserve_all(dir.volume, &[birth, access, default])?
                }
            };
            let guard = self.stripes.lock(&[id]);
            // Under the lock: an ACL that is set now is not inherited any more.
            if self.default_acl_len(dir) == inherits {
                return Ok((reserved, guard));
            }
        }
        Err(FsError::Restless)
    }

    /// Gives an object a further name.
    ///
    /// # Errors
    /// The backing file system's; [`FsError::CrossVolume`].
    pub fn link(&self, nodeid: u64, parent: u64, name: &[u8]) -> Result<Entry> {
        let (dir, file) = (self.parent(parent, name)?, self.target(nodeid)?);
        if dir.volume.slot() != file.volume.slot() {
            return Err(FsError::CrossVolume);
        }
        self.tell_of_symlink(&file)?;
        let intent = Intent::Names { first: (dir.node.id, name), second: None };
        let pending = self.reserve(dir.volume, &intent, name.len(), 0)?;
        let _guard = self.stripes.lock(&[dir.node.id, file.node.id]);
        dir.volume.copy.found(file.node.id);
        pending.note(Note { op: OpKind::Link, first: Some((file.node.id, file.node.kind)), second: None });
        linkat(&file.fd, c"", &dir.fd, name, AtFlags::EMPTY_PATH)?;
        let child =
            dir.volume.child(&dir.fd, name).map_err(|error| unrecorded("looking up a new name", error))?;
        let op = Op::Link { dir: dir.node.id, name, file: child.id };
        let attrs = [(child.id, attr(&child.stat)), (dir.node.id, attr(&read_back(&dir.fd)?))];
        let _stamp = pending.publish(op, attrs.into_iter().collect(), &[]);
        Ok(self.learn(&dir, name, child))
    }

    /// Removes a name: of a directory, which must be empty, or of anything else.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn remove(&self, parent: u64, name: &[u8], directory: bool) -> Result<()> {
        let dir = self.parent(parent, name)?;
        let intent = Intent::Names { first: (dir.node.id, name), second: None };
        let (pending, (child, _guard)) = until_told(|| {
            self.tell_of_name(&dir, name)?;
            let pending = self.reserve(dir.volume, &intent, name.len(), 0)?;
            let locked = self.lock_child(&dir, name, &[])?;
            let told = !dir.volume.copy.owes(locked.0.id, locked.0.kind);
            Ok(told.then_some((pending, locked)))
        })?;
        pending.note(Note { op: OpKind::Unlink, first: Some((child.id, child.kind)), second: None });
        unlinkat(&dir.fd, name, if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() })?;
        let stat = read_back(&child.fd)?;
        let op = Op::Unlink { dir: dir.node.id, name, file: child.id };
        let attrs = [(child.id, attr(&stat)), (dir.node.id, attr(&read_back(&dir.fd)?))];
        let _stamp = pending.publish(op, attrs.into_iter().collect(), &[]);
        if directory || stat.st_nlink == 0 {
            self.gone(child);
        }
        Ok(())
    }

    /// Moves a name, over another one if that exists, or (with `RENAME_EXCHANGE`) exchanges two.
    ///
    /// # Errors
    /// The backing file system's; [`FsError::CrossVolume`]; [`FsError::Unsupported`] for other flags.
    pub fn rename(
        &self,
        parent: u64,
        name: &[u8],
        new_parent: u64,
        new_name: &[u8],
        flags: u32,
    ) -> Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE).contains(flags) {
            return Err(FsError::Os(Errno::INVAL));
        }
        let (from, to) = (self.parent(parent, name)?, self.parent(new_parent, new_name)?);
        if from.volume.slot() != to.volume.slot() {
            return Err(FsError::CrossVolume);
        }
        let intent = Intent::Names { first: (from.node.id, name), second: Some((to.node.id, new_name)) };
        let copy = &from.volume.copy;
        let (pending, (child, other, _guard)) = until_told(|| {
            self.tell_of_name(&from, name)?;
            self.tell_of_name(&to, new_name)?;
            let pending = self.reserve(from.volume, &intent, name.len() + new_name.len(), 0)?;
            let locked = self.lock_children(&from, name, &to, new_name)?;
            let told = [Some(&locked.0), locked.1.as_ref()]
                .into_iter()
                .flatten()
                .all(|child| !copy.owes(child.id, child.kind));
            Ok(told.then_some((pending, locked)))
        })?;
        for moved in [Some(&child), other.as_ref()].into_iter().flatten() {
            copy.found(moved.id);
        }
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        pending.note(Note {
            op: if exchange { OpKind::Exchange } else { OpKind::Rename },
            first: Some((child.id, child.kind)),
            second: other.as_ref().map(|other| (other.id, other.kind)),
        });
        renameat_with(&from.fd, name, &to.fd, new_name, flags)?;
        if other.as_ref().is_some_and(|other| other.id == child.id) {
            return Ok(()); // Two names of one object: POSIX says that nothing happens, so nothing is recorded.
        }
        let mut attrs = AttrList::new();
        for dir in [&from, &to] {
            attrs.push(dir.node.id, attr(&read_back(&dir.fd)?));
        }
        attrs.push(child.id, attr(&read_back(&child.fd)?));
        let mut other_links = 1;
        if let Some(other) = &other {
            let stat = read_back(&other.fd)?;
            other_links = stat.st_nlink;
            attrs.push(other.id, attr(&stat));
        }
        let op = match &other {
            Some(other) if exchange => Op::Exchange {
                a_dir: from.node.id,
                a: name,
                a_file: child.id,
                b_dir: to.node.id,
                b: new_name,
                b_file: other.id,
            },
            _ => Op::Rename {
                from_dir: from.node.id,
                from: name,
                to_dir: to.node.id,
                to: new_name,
                file: child.id,
                replaced: other.as_ref().map(|other| other.id),
            },
        };
        let _stamp = pending.publish(op, attrs, &[]);
        self.nodes.moved(child.id.ino, to.node.nodeid, new_name);
        match other {
            Some(other) if exchange => self.nodes.moved(other.id.ino, from.node.nodeid, name),
            Some(other) if other.kind == Kind::Dir || other_links == 0 => self.gone(other),
            _ => {}
        }
        Ok(())
    }

    /// Looks up both names of a rename, and locks both directories and what the names stand for.
    fn lock_children(
        &self,
        from: &Target<'_>,
        name: &[u8],
        to: &Target<'_>,
        new_name: &[u8],
    ) -> Result<(Child, Option<Child>, Guard<'_>)> {
        for _ in 0..limits::LOOKUP_RETRIES_MAX {
            let other = match to.volume.child(&to.fd, new_name) {
                Ok(other) => Some(other),
                Err(FsError::Os(Errno::NOENT)) => None,
                Err(error) => return Err(error),
            };
            let mut also = vec![to.node.id];
            also.extend(other.as_ref().map(|other| other.id));
            let (child, guard) = self.lock_child(from, name, &also)?;
            if names(&to.fd, new_name, other.as_ref())? {
                return Ok((child, other, guard));
            }
        }
        Err(FsError::Restless)
    }
}
