//! Contents of files: open, read, write, truncate, sync.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, SeekFrom, fstat, ftruncate, openat, seek};
use rustix::io::{Errno, pread, pwrite};
use rustix::path::DecInt;
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::{Intent, Kind, Op};

use crate::credentials::{Caller, SetId};
use crate::errno::{FsError, Result};
use crate::inode::NodeRef;
use crate::mirror::{Mirror, Reserved, Target, attr, read_back, unrecorded};
use crate::ops::partial::may_be_partial;
use crate::stripes::Guard;

/// A file that a program has open.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) fd: OwnedFd,
    pub(crate) nodeid: u64,
    pub(crate) id: FileId,
    pub(crate) slot: usize,
    /// Its writes are durable when they return, or go past the cache: `O_SYNC`, `O_DSYNC`, `O_DIRECT`.
    synchronous: bool,
}

impl OpenFile {
    pub(crate) fn new(node: &NodeRef, fd: OwnedFd) -> Self {
        Self { fd, nodeid: node.nodeid, id: node.id, slot: node.slot, synchronous: false }
    }

    /// The same, opened with some flags.
    pub(crate) fn with_flags(self, flags: i32) -> Self {
        Self { synchronous: is_synchronous(flags), ..self }
    }
}

/// Outcome of a write.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// Bytes written.
    pub bytes: usize,
    /// Whether it took set-id bits away, which the kernel does not know.
    pub attributes_changed: bool,
}

const SET_ID_BITS: u32 = libc::S_ISUID | libc::S_ISGID;

/// Whether writes with these flags are durable when they return, or go past the cache.
pub(crate) const fn is_synchronous(flags: i32) -> bool {
    // O_SYNC contains O_DSYNC.
    flags & (libc::O_DSYNC | libc::O_DIRECT) != 0
}

/// How a file is opened below, for flags above. Never for writing only, because copied ranges are read back; never
/// with `O_APPEND`, because the kernel above has found the offset under its own lock; never with `O_TRUNC`, which the
/// kernel sends as a change of attributes, after it has made sure that no program runs from the file; and `O_DIRECT` has
/// done its work above, the page cache below may serve.
pub(crate) fn backing_flags(flags: i32) -> OFlags {
    let access = if flags & libc::O_ACCMODE == libc::O_RDONLY { OFlags::RDONLY } else { OFlags::RDWR };
    let kept = flags & (libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME);
    access | OFlags::from_bits_retain(kept.cast_unsigned())
}

impl Mirror {
    /// Opens a file and returns a handle for it.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn open(&self, nodeid: u64, flags: i32) -> Result<u64> {
        let target = self.target(nodeid)?;
        let fd = self.open_backing(&target, backing_flags(flags))?;
        Ok(self.files.insert(OpenFile::new(&target.node, fd).with_flags(flags)))
    }

    /// Opens what a node stands for, for reading or writing.
    pub(crate) fn open_backing(&self, target: &Target<'_>, flags: OFlags) -> Result<OwnedFd> {
        match target.node.kind {
            Kind::File => {}
            Kind::Dir => return Err(FsError::IsDirectory),
            _ => return Err(FsError::Os(Errno::INVAL)),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        // Through the descriptor, not the handle: that works for removed files, too.
        Ok(openat(&self.proc_fds, DecInt::from_fd(&target.fd), flags, Mode::empty())?)
    }

    /// Closes a file. What is returned takes a while to drop: it frees a lot of space.
    #[must_use]
    pub fn release(&self, fh: u64) -> Option<impl Send + 'static> {
        self.files.remove(fh).filter(|file| is_heavy(&file.fd))
    }

    /// Reads into `buffer`; fewer bytes only at the end of the file.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn read(&self, fh: u64, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let file = self.files.get(fh).ok_or(FsError::NoHandle)?;
        read_full(&file.fd, offset, buffer)
    }

    /// Writes. `kill_set_id` is what the kernel says of the caller; `from_cache` marks pages of a shared mapping, which
    /// may come with a handle that is not open any more.
    ///
    /// # Errors
    /// The backing file system's; [`FsError::Refused`].
    pub fn write(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        kill_set_id: bool,
        from_cache: bool,
    ) -> Result<Written> {
        let file = match self.files.get(fh).filter(|file| file.nodeid == nodeid) {
            Some(file) => file,
            None if from_cache => {
                let target = self.target(nodeid)?;
                Arc::new(OpenFile::new(&target.node, self.open_backing(&target, OFlags::RDWR)?))
            }
            None => return Err(FsError::NoHandle),
        };
        if data.is_empty() {
            return Ok(Written { bytes: 0, attributes_changed: false });
        }
        let data = &data[..data.len().min(limits::WRITE_BYTES_MAX)];
        let intent = Intent::Range { file: file.id, offset, len: data.len() as u64 };
        self.change_content(&file, !kill_set_id, &intent, data.len(), |_| {
            let bytes = pwrite(&file.fd, data, offset)?;
            let len = u32::try_from(bytes).expect("at most WRITE_BYTES_MAX");
            Ok((bytes, Op::Write { file: file.id, offset, len }, &data[..bytes]))
        })
        .map(|(bytes, attributes_changed)| Written { bytes, attributes_changed })
    }

    /// What all changes of contents have in common. `change` makes the change, and says with what result, as which
    /// update, and with which data; it is given the size before. Also returns whether set-id bits were lost.
    ///
    /// `security.capability`, which the backing file system takes from a file that is written, is gone by then: the
    /// kernel above has removed it, by a request of its own, which is recorded like any other.
    pub(crate) fn change_content<'d, T>(
        &self,
        file: &OpenFile,
        keep_set_id: bool,
        intent: &Intent<'_>,
        data_bytes: usize,
        change: impl FnOnce(u64) -> Result<(T, Op<&'static [u8]>, &'d [u8])>,
    ) -> Result<(T, bool)> {
        let (pending, lost, guard) = self.reserve_content(file, intent, data_bytes)?;
        let before = fstat(&file.fd)?;
        let outcome = {
            let _set_id = SetId::keep(keep_set_id || before.st_mode & SET_ID_BITS == 0)?;
            change(u64::try_from(before.st_size).unwrap_or_default())
        };
        let after = read_back(&file.fd)?;
        let attrs = std::iter::once((file.id, attr(&after))).collect();
        let (result, op, data) = match outcome {
            Ok((result, op, data)) if !matches!(op, Op::Write { len: 0, .. }) => (result, op, data),
            // A plain write or copy changes nothing when it fails, or says how far it came.
            Err(error) if may_be_partial(&error) && (data_bytes == 0 || file.synchronous) => {
                drop((guard, lost));
                self.publish_again(file, intent, pending)
                    .map_err(|error| unrecorded("reading again what a change left that failed", error))?;
                return Err(error);
            }
            other => {
                // ext4 sets the times before it finds that it cannot do what it was asked for.
                if attr(&after) != attr(&before) {
                    let _stamp = pending.publish(Op::SetAttr { file: file.id }, attrs, &[]);
                }
                return other.map(|(result, ..)| (result, before.st_mode != after.st_mode));
            }
        };
        let _stamp = pending.publish(op, attrs, data);
        // The backing file system takes file capabilities away from what is written; unless the kernel did so before, by a
        // call of its own, that has to be recorded.
        if let Some(pending) = lost.filter(|_| !has_capability(&file.fd)) {
            let attrs = std::iter::once((file.id, attr(&after))).collect();
            let _stamp = pending.publish(Op::RemoveXattr { file: file.id, name: CAPABILITY }, attrs, &[]);
        }
        drop(guard);
        if file.synchronous {
            self.recorder.log_durably(self.volumes[file.slot].index, file.id);
        }
        Ok((result, before.st_mode != after.st_mode))
    }

    /// Reserves room for a change of content, and for the loss of a capability if the file has one; and locks the file.
    fn reserve_content<'a>(
        &'a self,
        file: &OpenFile,
        intent: &Intent<'_>,
        data_bytes: usize,
    ) -> Result<(Reserved<'a>, Option<Reserved<'a>>, Guard<'a>)> {
        let volume = &self.volumes[file.slot];
        let pending = self.reserve(volume, intent, 0, data_bytes)?;
        let guard = self.stripes.lock(&[file.id]);
        if !has_capability(&file.fd) {
            return Ok((pending, None, guard));
        }
        drop((pending, guard));
        let lost = Intent::Xattr { file: file.id, name: CAPABILITY };
        let mut both =
            self.reserve_all(volume, &[(*intent, 0, data_bytes), (lost, CAPABILITY.len(), 0)])?.into_iter();
        let (pending, lost) = (both.next().ok_or(FsError::Unrecorded)?, both.next());
        Ok((pending, lost, self.stripes.lock(&[file.id])))
    }

    /// Sets the size of an open file.
    pub(crate) fn truncate_open(&self, caller: Caller, file: &OpenFile, size: u64) -> Result<()> {
        let intent = Intent::Size { file: file.id };
        self.change_content(file, caller.keeps_set_id(), &intent, 0, |_| {
            ftruncate(&file.fd, size)?;
            Ok(((), Op::Truncate { file: file.id, size }, &[]))
        })?;
        Ok(())
    }

    /// Makes durable that a file was touched: for writes that shall be durable although the file was not opened so.
    pub fn log_durably(&self, fh: u64) {
        if let Some(file) = self.files.get(fh) {
            self.recorder.log_durably(self.volumes[file.slot].index, file.id);
        }
    }

    /// Makes a file durable.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn fsync(&self, fh: u64, data_only: bool) -> Result<()> {
        let file = self.files.get(fh).ok_or(FsError::NoHandle)?;
        // First, so that nothing becomes durable here that a power loss would not find in the log.
        self.recorder.log_durably(self.volumes[file.slot].index, file.id);
        Ok(if data_only { rustix::fs::fdatasync(&file.fd) } else { rustix::fs::fsync(&file.fd) }?)
    }

    /// Finds the next data or hole (`SEEK_DATA`, `SEEK_HOLE`).
    ///
    /// # Errors
    /// The backing file system's; `EINVAL` for anything else.
    pub fn lseek(&self, fh: u64, offset: i64, whence: i32) -> Result<u64> {
        let file = self.files.get(fh).ok_or(FsError::NoHandle)?;
        let offset = u64::try_from(offset).map_err(|_| FsError::Os(Errno::NXIO))?;
        let to = match whence {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(FsError::Os(Errno::INVAL)),
        };
        // Nobody uses the position of the descriptor, so it does not matter that this moves it.
        Ok(seek(&file.fd, to)?)
    }
}

/// Whether closing the last descriptor of an object may take long.
pub(crate) fn is_heavy(fd: &OwnedFd) -> bool {
    const HEAVY_BYTES: i64 = 16 << 20;
    fstat(fd).is_ok_and(|stat| stat.st_nlink == 0 && stat.st_size >= HEAVY_BYTES)
}

/// Reads until the buffer is full or the file ends.
pub(crate) fn read_full(fd: &OwnedFd, offset: u64, buffer: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match pread(fd, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(bytes) => done += bytes,
            Err(Errno::INTR) => {}
            Err(error) if done == 0 => return Err(error.into()),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// File capabilities.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

fn has_capability(fd: &OwnedFd) -> bool {
    rustix::fs::fgetxattr(fd, CAPABILITY, &mut [0_u8; 0][..]).is_ok()
}
