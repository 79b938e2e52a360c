//! Copies one object after the other.

use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{
    Advice, Mode, OFlags, RawDir, SeekFrom, Stat, fadvise, fstat, listxattr, openat, readlinkat, seek,
};
use rustix::io::Errno;
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::{AttrList, Intent, Kind, Op};
use twinfs_replicator::failpoint::{self, FailPoint};

use super::state::{CopyState, Item, WHOLE};
use super::{CopyRoom, Room};
use crate::errno::FsError;
use crate::mirror::{Mirror, Target, Volume, attr};
use crate::ops::attr::fd_path;
use crate::ops::data::read_full;
use crate::ops::xattr::is_mirrored;
use crate::recorder::Pending;

/// Why the copy does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// Somebody asked for it.
    Stopped,
    /// Updates are not kept any more: the session is suspended, or this site is fenced.
    Closed,
    /// This object cannot be copied.
    Failed(FsError),
}

impl From<FsError> for Halt {
    fn from(error: FsError) -> Self {
        if let FsError::Refused(_) = error { Self::Closed } else { Self::Failed(error) }
    }
}

impl From<Errno> for Halt {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno.into())
    }
}

pub(super) type Step<T = ()> = Result<T, Halt>;

/// Whether an object still has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Named,
    Gone,
}

/// What the thread of a copy works with.
pub(super) struct Worker {
    pub(super) mirror: Arc<Mirror>,
    pub(super) state: Arc<CopyState>,
    pub(super) room: Arc<dyn CopyRoom>,
    pub(super) stopping: Arc<AtomicBool>,
    /// Its volume's place in the mirror's list.
    pub(super) slot: usize,
}

impl Worker {
    pub(super) fn volume(&self) -> &Volume {
        &self.mirror.volumes[self.slot]
    }

    /// Waits for room, so that programs always have the most of it.
    pub(super) fn wait_room(&self) -> Step {
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return Err(Halt::Stopped);
            }
            match self.room.wait(Duration::from_millis(limits::COPY_ROOM_WAIT_MS)) {
                Room::Free => return Ok(()),
                Room::Full => {}
                Room::Closed => return Err(Halt::Closed),
            }
        }
    }

    pub(super) fn reserve(
        &self,
        intent: &Intent<'_>,
        payload: usize,
        data: usize,
    ) -> Step<Box<dyn Pending + '_>> {
        self.wait_room()?;
        Ok(self.mirror.reserve_for_copy(self.volume(), intent, payload, data)?)
    }

    /// Copies an object, or what changed of it, and notes that.
    pub(super) fn copy(&self, item: Item) -> Step {
        let (ino, generation) = item.key;
        let root = self.state.root();
        let id = FileId { ino, generation, ..root };
        let Some(target) = self.mirror.object(self.volume(), id)? else {
            self.gone(id)?;
            self.state.skip();
            return Ok(());
        };
        let life = match self.state.change().filter(|change| !change.is_whole()) {
            Some(change) => self.reread(&target, &change)?,
            None => self.parts(&target)?,
        };
        match life {
            Life::Named => self.state.finish(),
            Life::Gone => {
                self.gone(id)?;
                self.state.skip();
            }
        }
        Ok(())
    }

    fn parts(&self, target: &Target<'_>) -> Step<Life> {
        let kind = target.node.kind;
        // Opened first, so that nothing is left to fail once the replica's content has been reset.
        let opened = match kind {
            Kind::File => {
                self.mirror.open_backing(target, OFlags::RDONLY | OFlags::NOATIME).map_err(Halt::from)
            }
            Kind::Dir => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOATIME;
                openat(&target.fd, c".", flags, Mode::empty()).map_err(Halt::from)
            }
            _ => Ok(target.fd.try_clone().map_err(FsError::from)?),
        };
        let opened = match opened {
            Err(_) if fstat(&target.fd)?.st_nlink == 0 => return Ok(Life::Gone),
            other => other?,
        };
        if self.object(target, &opened)? == Life::Gone {
            return Ok(Life::Gone);
        }
        failpoint::pass(FailPoint::CopierObject);
        self.mirror.copy_xattrs(target)?;
        match kind {
            Kind::File => self.content(target, &opened),
            Kind::Dir => self.names(target, &opened),
            _ => Ok(Life::Named),
        }
    }

    /// Publishes that the object exists. From here on, what programs do to it is published, too.
    fn object(&self, target: &Target<'_>, opened: &OwnedFd) -> Step<Life> {
        let file = target.node.id;
        let link = match target.node.kind {
            Kind::Symlink => readlinkat(&target.fd, c"", Vec::new())?.into_bytes(),
            _ => Vec::new(),
        };
        let pending = self.reserve(&Intent::Attrs { file }, link.len(), 0)?;
        let _guard = self.mirror.stripes.lock(&[file]);
        let stat = fstat(&target.fd)?;
        if stat.st_nlink == 0 {
            return Ok(Life::Gone);
        }
        let has_data = target.node.kind == Kind::File && next_data(opened, 0)?.is_some();
        self.state.start(if has_data { 0 } else { WHOLE }, data_bytes(&stat));
        publish(pending, Op::Object { file, target: &link }, attrs_of(&[(file, &stat)]), &[])?;
        Ok(Life::Named)
    }

    /// Copies what a file holds; holes are passed over.
    fn content(&self, target: &Target<'_>, opened: &OwnedFd) -> Step<Life> {
        let file = target.node.id;
        let mut buffer = Vec::new();
        loop {
            let cursor = self.state.cursor();
            if cursor == WHOLE {
                return Ok(Life::Named);
            }
            // Without the lock, to know how much room is needed; the kernel may read meanwhile, so that few wait for a disk
            // under the lock.
            let (offset, room) = next_data(opened, cursor)?.unwrap_or((cursor, 0));
            buffer.resize(room, 0);
            let ahead = NonZeroU64::new(2 * room as u64);
            let _ = fadvise(opened, offset, ahead, Advice::WillNeed);
            let intent = Intent::Range { file, offset, len: room as u64 };
            let pending = self.reserve(&intent, 0, room)?;
            let _guard = self.mirror.stripes.lock(&[file]);
            let stat = fstat(&target.fd)?;
            if stat.st_nlink == 0 {
                return Ok(Life::Gone);
            }
            let Some((offset, len)) = next_data(opened, self.state.cursor())? else {
                self.state.advance(WHOLE, 0);
                publish(pending, Op::SetAttr { file }, attrs_of(&[(file, &stat)]), &[])?;
                return Ok(Life::Named);
            };
            let len = len.min(room);
            if len == 0 {
                continue; // There was nothing, and now there is.
            }
            if read_full(opened, offset, &mut buffer[..len])? < len {
                return Err(Halt::Failed(FsError::Os(Errno::IO)));
            }
            let end = offset + len as u64;
            // The attributes that come with the last piece are the final ones.
            let cursor = if next_data(opened, end)?.is_some() { end } else { WHOLE };
            self.state.advance(cursor, len as u64);
            let op = Op::Write { file, offset, len: u32::try_from(len).expect("at most WRITE_BYTES_MAX") };
            publish(pending, op, attrs_of(&[(file, &stat)]), &buffer[..len])?;
        }
    }

    /// Copies the names in a directory. Names that come into it from now on are published by whoever makes them.
    fn names(&self, target: &Target<'_>, opened: &OwnedFd) -> Step<Life> {
        let mut buffer = vec![MaybeUninit::uninit(); limits::DIR_BUFFER_BYTES];
        let mut entries = RawDir::new(opened, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                self.symlink(target, name)?;
                self.name(target, name)?;
            }
        }
        Ok(if fstat(&target.fd)?.st_nlink == 0 { Life::Gone } else { Life::Named })
    }

    /// Publishes a symlink before its name: see [`Mirror::copy_symlink`].
    fn symlink(&self, dir: &Target<'_>, name: &[u8]) -> Step {
        // If it is gone, or comes only now, then whoever changes the name tells of it.
        match self.volume().child(&dir.fd, name) {
            Ok(child) if self.state.owes(child.id, child.kind) => {
                self.wait_room()?;
                self.mirror.copy_symlink(&dir.sibling(child))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn name(&self, dir: &Target<'_>, name: &[u8]) -> Step {
        let id = dir.node.id;
        let intent = Intent::Names { first: (id, name), second: None };
        let pending = self.reserve(&intent, name.len(), 0)?;
        let (child, _guard) = match self.mirror.lock_child(dir, name, &[]) {
            Ok(locked) => locked,
            // Whoever took it away has published that, and has told of the object if it has another place now.
            Err(FsError::Os(Errno::NOENT | Errno::STALE)) => return Ok(()),
            Err(FsError::Foreign) => {
                tracing::warn!(name = %name.escape_ascii(), "not copied: it belongs to another file system");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let stat = fstat(&child.fd)?;
        self.state.found(child.id, data_bytes(&stat));
        let attrs = attrs_of(&[(child.id, &stat), (id, &fstat(&dir.fd)?)]);
        publish(pending, Op::Bind { dir: id, name, file: child.id }, attrs, &[])
    }

    /// Ends the copy if nothing is left to be copied. Returns whether it is complete.
    pub(super) fn complete(&self) -> Step<bool> {
        let pending = self.reserve(&Intent::Attrs { file: self.state.root() }, 0, 0)?;
        failpoint::pass(FailPoint::CopierComplete);
        match self.state.complete(|| pending.publish(Op::Complete, AttrList::new(), &[]).is_some()) {
            None => Ok(false),
            Some(true) => {
                self.volume().copy.turn_off(&self.state);
                Ok(true)
            }
            Some(false) => Err(Halt::Closed),
        }
    }
}

impl Mirror {
    /// Publishes the extended attributes of an object. Those that are set meanwhile are published by whoever sets them.
    pub(super) fn copy_xattrs(&self, target: &Target<'_>) -> Step {
        let mut names = vec![0; limits::XATTR_VALUE_BYTES_MAX];
        let len = match listxattr(fd_path(target), names.as_mut_slice()) {
            Err(Errno::OPNOTSUPP) => 0,
            other => other?,
        };
        for name in names[..len].split(|byte| *byte == 0).filter(|name| is_mirrored(name)) {
            self.copy_xattr(target, name)?;
        }
        Ok(())
    }

    /// Publishes one extended attribute as it is now. Returns whether it is there.
    pub(super) fn copy_xattr(&self, target: &Target<'_>, name: &[u8]) -> Step<bool> {
        let file = target.node.id;
        // Until its value has not grown since room was reserved for it.
        while let Some(room) = self.xattr_len(target, name)? {
            let intent = Intent::Attrs { file };
            let pending = self.reserve_for_copy(target.volume, &intent, name.len() + room, 0)?;
            let _guard = self.stripes.lock(&[file]);
            let Some(value) = self.read_xattr(target, name)? else { break };
            if value.len() <= room {
                let op = Op::SetXattr { file, name, value: value.as_slice() };
                publish(pending, op, attrs_of(&[(file, &fstat(&target.fd)?)]), &[])?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

pub(super) fn publish(pending: Box<dyn Pending + '_>, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Step {
    pending.publish(op, attrs, data).map(|_| ()).ok_or(Halt::Closed)
}

pub(super) fn attrs_of(stats: &[(FileId, &Stat)]) -> AttrList {
    stats.iter().map(|(file, stat)| (*file, attr(stat))).collect()
}

/// How much data an object is thought to have.
fn data_bytes(stat: &Stat) -> u64 {
    let is_file = Kind::of_mode(stat.st_mode) == Some(Kind::File);
    let bytes = stat.st_size.min(stat.st_blocks.saturating_mul(512));
    if is_file { u64::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// The first piece of data at or after `from`, and how long it is, at most [`limits::WRITE_BYTES_MAX`]; `None` if there
/// is none up to the end of the file.
pub(crate) fn next_data(file: &OwnedFd, from: u64) -> rustix::io::Result<Option<(u64, usize)>> {
    let start = match seek(file, SeekFrom::Data(from)) {
        Err(Errno::NXIO) => return Ok(None),
        other => other?,
    };
    let end = match seek(file, SeekFrom::Hole(start)) {
        Err(Errno::NXIO) => return Ok(None), // Cut off in between.
        other => other?,
    };
    let len = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
    Ok(Some((start, len.min(limits::WRITE_BYTES_MAX))))
}
