//! Attributes: stat, chmod, chown, utimens, truncate by path, readlink, statfs.

use std::ffi::CString;
use std::os::fd::AsRawFd;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat, chownat,
    fstat, fstatvfs, readlinkat, utimensat,
};
use rustix::path::DecInt;
use twinfs_core::limits;
use twinfs_core::update::{Intent, Kind, Op};
use twinfs_replicator::sys::thread::truncate;

use crate::credentials::{Caller, SetId};
use crate::errno::{FsError, Result};
use crate::inode::ROOT;
use crate::mirror::{Attributes, Mirror, Target, attr, read_back};
use crate::ops::data::OpenFile;
use crate::ops::xattr::ACCESS_ACL;

/// A time to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The present.
    Now,
    /// Seconds since the Unix epoch, and nanoseconds.
    At(i64, u32),
}

/// Attributes to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub struct SetAttr {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
}

impl Mirror {
    /// The attributes of a node (or of an open file, which is quicker).
    ///
    /// # Errors
    /// The backing file system's.
    pub fn getattr(&self, nodeid: u64, fh: Option<u64>) -> Result<Attributes> {
        if self.is_list(nodeid) {
            return Ok(self.list_attributes());
        }
        let file = fh.and_then(|fh| self.files.get(fh)).filter(|file| file.nodeid == nodeid);
        let stat = match file {
            Some(file) => fstat(&file.fd)?,
            None => fstat(&self.target(nodeid)?.fd)?,
        };
        Ok(Attributes::from(&stat))
    }

    fn list_attributes(&self) -> Attributes {
        Attributes {
            ino: ROOT,
            mode: libc::S_IFDIR | 0o555,
            nlink: u32::try_from(2 + self.volumes.len()).unwrap_or(u32::MAX),
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            block_size: 4096,
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
        }
    }

    /// Sets attributes, and returns what they are then.
    ///
    /// # Errors
    /// The backing file system's. If several were to be set, the first ones may have been (and are recorded).
    pub fn setattr(&self, caller: Caller, nodeid: u64, set: &SetAttr, fh: Option<u64>) -> Result<Attributes> {
        if let Some(size) = set.size {
            let rest = SetAttr { size: None, ..*set };
            if rest.mode.is_some() || rest.uid.is_some() || rest.gid.is_some() {
                self.set_plain(caller, nodeid, &SetAttr { atime: None, mtime: None, ..rest })?;
            }
            self.set_size(caller, nodeid, size, fh)?;
            let times = SetAttr { atime: rest.atime, mtime: rest.mtime, ..SetAttr::default() };
            return if times == SetAttr::default() {
                self.getattr(nodeid, fh)
            } else {
                self.set_plain(caller, nodeid, &times)
            };
        }
        if *set == SetAttr::default() {
            return self.getattr(nodeid, fh);
        }
        self.set_plain(caller, nodeid, set)
    }

    fn set_size(&self, caller: Caller, nodeid: u64, size: u64, fh: Option<u64>) -> Result<()> {
        // With a handle it was ftruncate(2), without truncate(2), and only the former sets the times if the size stays.
        // Without a handle and to nothing it may also be open(2) with O_TRUNC, which sets the times, too.
        if let Some(file) = fh.and_then(|fh| self.files.get(fh)).filter(|file| file.nodeid == nodeid) {
            return self.truncate_open(caller, &file, size);
        }
        let target = self.target(nodeid)?;
        if size == 0 {
            let fd = self.open_backing(&target, OFlags::RDWR)?;
            return self.truncate_open(caller, &OpenFile::new(&target.node, fd), size);
        }
        if target.node.kind == Kind::Dir {
            return Err(FsError::IsDirectory);
        }
        let file = target.node.id;
        let path = fd_path(&target);
        let pending = self.reserve(target.volume, &Intent::Size { file }, 0, 0)?;
        let _guard = self.stripes.lock(&[file]);
        {
            let _set_id = SetId::keep(caller.keeps_set_id())?;
            truncate(&path, size)?;
        }
        let attrs = std::iter::once((file, attr(&read_back(&target.fd)?))).collect();
        let _stamp = pending.publish(Op::Truncate { file, size }, attrs, &[]);
        Ok(())
    }

    /// Sets owner, mode and times.
    fn set_plain(&self, caller: Caller, nodeid: u64, set: &SetAttr) -> Result<Attributes> {
        let target = self.target(nodeid)?;
        let file = target.node.id;
        for _ in 0..limits::LOOKUP_RETRIES_MAX {
            // The mode is a part of an access ACL: whoever changes the one changes the other.
            let acl_bytes = if set.mode.is_some() { self.xattr_len(&target, ACCESS_ACL)? } else { None };
            let payload = acl_bytes.map_or(0, |len| len + ACCESS_ACL.len());
            let intent = match acl_bytes {
                Some(_) => Intent::Xattr { file, name: ACCESS_ACL },
                None => Intent::Attrs { file },
            };
            let pending = self.reserve(target.volume, &intent, payload, 0)?;
            let _guard = self.stripes.lock(&[file]);
            if set.mode.is_some() && self.xattr_len(&target, ACCESS_ACL)? != acl_bytes {
                continue;
            }
            let (outcome, changed) = self.apply(caller, &target, set);
            let stat = if changed { read_back(&target.fd)? } else { fstat(&target.fd)? };
            if changed {
                let attrs = std::iter::once((file, attr(&stat))).collect();
                let acl = if acl_bytes.is_some() { self.read_xattr(&target, ACCESS_ACL)? } else { None };
                let op = match &acl {
                    Some(value) => Op::SetXattr { file, name: ACCESS_ACL, value: value.as_slice() },
                    None => Op::SetAttr { file },
                };
                let _stamp = pending.publish(op, attrs, &[]);
            }
            return outcome.map(|()| Attributes::from(&stat));
        }
        Err(FsError::Restless)
    }

    /// Makes the calls; also says whether any of them changed something.
    fn apply(&self, caller: Caller, target: &Target<'_>, set: &SetAttr) -> (Result<()>, bool) {
        let mut changed = false;
        let mut calls = || -> Result<()> {
            if set.uid.is_some() || set.gid.is_some() {
                let _set_id = SetId::keep(caller.keeps_set_id())?;
                let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
                chownat(&target.fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
                changed = true;
            }
            if let Some(mode) = set.mode {
                // The kernel has taken the set-group-id bit out already if the caller may not set it.
                let mode = Mode::from_raw_mode(mode & 0o7777);
                chmodat(&self.proc_fds, DecInt::from_fd(&target.fd), mode, AtFlags::empty())?;
                changed = true;
            }
            if set.atime.is_some() || set.mtime.is_some() {
                let times =
                    Timestamps { last_access: timespec(set.atime), last_modification: timespec(set.mtime) };
                utimensat(&self.proc_fds, DecInt::from_fd(&target.fd), &times, AtFlags::empty())?;
                changed = true;
            }
            Ok(())
        };
        let outcome = calls();
        (outcome, changed)
    }

    /// What a symbolic link says.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn readlink(&self, nodeid: u64) -> Result<Vec<u8>> {
        let target = self.target(nodeid)?;
        Ok(readlinkat(&target.fd, c"", Vec::new())?.into_bytes())
    }

    /// Space and inodes of the backing file system.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn statfs(&self, nodeid: u64) -> Result<StatVfs> {
        let slot = self.nodes.get(nodeid).map_or(0, |node| node.slot);
        Ok(fstatvfs(&self.volumes[slot].root_fd)?)
    }
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(seconds, nanoseconds)) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
    }
}

/// The path that leads to an open descriptor, for calls that take no descriptor.
pub(crate) fn fd_path(target: &Target<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", target.fd.as_raw_fd())).expect("a number has no NUL")
}
