//! The adapter between fuser and the [`Mirror`]: it unpacks a request, calls, and replies.
//!
//! Everything that the kernel may cache it may cache for long, because all changes pass through it. Only one change
//! happens behind its back: a write, copy or allocation that takes set-id bits away. The node's attributes are
//! then invalidated before the reply.

pub(crate) mod reply;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, Notifier, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use twinfs_core::limits;

use crate::errno::FsError;
use crate::mirror::{Caller, Mirror, NewNode, SetAttr};
use crate::mount::{self, MountError, MountOptions, Mounted};
use crate::ops::data::is_synchronous;
use crate::slow::Slow;

/// How long the kernel may believe what it was told.
const TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Mounts a mirror.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(mirror: Arc<Mirror>, target: &Path, options: &MountOptions) -> Result<Mounted, MountError> {
    let adapter = Adapter {
        mirror,
        slow: Slow::start().map_err(|error| MountError::new("starting threads", error))?,
        notifier: Arc::default(),
    };
    let notifier = adapter.notifier.clone();
    mount::mount(adapter, target, options, |ready| {
        // Nobody else sets it.
        let _ = notifier.set(ready);
    })
}

struct Adapter {
    mirror: Arc<Mirror>,
    slow: Slow,
    notifier: Arc<OnceLock<Notifier>>,
}

thread_local! {
    /// For data on its way to the kernel.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Adapter {
    /// Makes the kernel ask for the attributes of a node anew. The request in hand keeps the node from being evicted,
    /// so this does not wait for anything that waits for this thread.
    fn invalidate(&self, changed: bool, node: INodeNo) {
        if let Some(notifier) = self.notifier.get().filter(|_| changed)
            && let Err(error) = notifier.inval_inode(node, -1, 0)
        {
            tracing::debug!(%error, "the kernel did not take an invalidation");
        }
    }
}

/// How the kernel shall treat an open file's pages. Through its cache it cuts a write in two where that crosses into a
/// page of which it has only a part, and a consistency group may then end between the two. Where nothing is read, nothing
/// is gained by the cache either, so those writes come as they were made.
fn caching(direct: bool) -> FopenFlags {
    if direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::FOPEN_KEEP_CACHE }
}

fn writes_only(flags: i32) -> bool {
    flags & libc::O_ACCMODE == libc::O_WRONLY
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Not FUSE_ATOMIC_O_TRUNC: with it, open(2) would truncate a running program before the kernel says ETXTBSY.
        let needed = [
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ];
        reply::negotiate(config, &needed, "Linux 5.12")?;
        config.set_max_background(64).map_err(|_| std::io::Error::other("too many background requests"))?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.mirror.lookup(parent.0, name.as_bytes()) {
            Ok(Some(entry)) => reply::entry(reply, TTL, Ok(entry)),
            // "There is no such name" is an answer to be cached, too: node 0 says so.
            Ok(None) => reply.entry(&TTL, &reply::nothing(), Generation(0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn forget(&self, _request: &Request, node: INodeNo, lookups: u64) {
        if let Some(heavy) = self.mirror.forget(node.0, lookups) {
            self.slow.run(move || drop(heavy));
        }
    }

    fn getattr(&self, _request: &Request, node: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        reply::attr(reply, TTL, self.mirror.getattr(node.0, fh.map(|fh| fh.0)));
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(reply::set_time),
            mtime: mtime.map(reply::set_time),
        };
        reply::attr(reply, TTL, self.mirror.setattr(caller(request), node.0, &set, fh.map(|fh| fh.0)));
    }

    fn readlink(&self, _request: &Request, node: INodeNo, reply: ReplyData) {
        reply::data(reply, self.mirror.readlink(node.0));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let new = NewNode::Node { mode, rdev: rdev.into() };
        reply::entry(reply, TTL, self.mirror.make(caller(request), parent.0, name.as_bytes(), umask, new));
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let new = NewNode::Dir { mode };
        reply::entry(reply, TTL, self.mirror.make(caller(request), parent.0, name.as_bytes(), umask, new));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let new = NewNode::Symlink { target: target.as_os_str().as_bytes() };
        reply::entry(reply, TTL, self.mirror.make(caller(request), parent.0, name.as_bytes(), 0, new));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply::empty(reply, self.mirror.remove(parent.0, name.as_bytes(), false));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply::empty(reply, self.mirror.remove(parent.0, name.as_bytes(), true));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (name.as_bytes(), new_name.as_bytes());
        reply::empty(reply, self.mirror.rename(parent.0, from, new_parent.0, to, flags.bits()));
    }

    fn link(&self, _request: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        reply::entry(reply, TTL, self.mirror.link(node.0, parent.0, name.as_bytes()));
    }

    fn open(&self, _request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.mirror.open(node.0, flags.0) {
            Ok(fh) => {
                // The kernel takes file capabilities away, by a call of its own, only from what it writes through its
                // cache.
                let capable = || self.mirror.getxattr(node.0, b"security.capability").is_ok();
                let direct = writes_only(flags.0) && !capable();
                reply.opened(FileHandle(fh), caching(direct));
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.mirror.create(caller(request), parent.0, name.as_bytes(), mode, umask, flags) {
            Ok((entry, fh)) => {
                let (attr, generation) =
                    (reply::file_attr(&entry.attributes), Generation(entry.generation.into()));
                reply.created(&TTL, &attr, generation, FileHandle(fh), caching(writes_only(flags)));
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let size = (size as usize).min(limits::WRITE_BYTES_MAX);
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match self.mirror.read(fh.0, offset, &mut buffer[..size]) {
                Ok(bytes) => reply.data(&buffer[..bytes]),
                Err(error) => reply.error(error.into()),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let from_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        match self.mirror.write(node.0, fh.0, offset, data, kill, from_cache) {
            Ok(written) => {
                self.invalidate(written.attributes_changed, node);
                // The flags of this write: RWF_DSYNC and fcntl(2) set them for files that were not opened so.
                if is_synchronous(flags.0) {
                    self.mirror.log_durably(fh.0);
                }
                reply.written(u32::try_from(written.bytes).expect("at most WRITE_BYTES_MAX"));
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _node: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // There is nothing to do, and the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let heavy = self.mirror.release(fh.0);
        reply.ok();
        if let Some(file) = heavy {
            self.slow.run(move || drop(file));
        }
    }

    fn fsync(&self, _request: &Request, _node: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let mirror = self.mirror.clone();
        self.slow.run(move || reply::empty(reply, mirror.fsync(fh.0, data_only)));
    }

    fn fallocate(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let changed = self.mirror.fallocate(caller(request), fh.0, offset, length, mode.cast_unsigned());
        self.invalidate(changed == Ok(true), node);
        reply::empty(reply, changed.map(drop));
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _from: INodeNo,
        from_fh: FileHandle,
        from_offset: u64,
        to: INodeNo,
        to_fh: FileHandle,
        to_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (source, target) = ((from_fh.0, from_offset), (to_fh.0, to_offset));
        let copied = BUFFER
            .with_borrow_mut(|buffer| self.mirror.copy_range(caller(request), source, target, len, buffer));
        match copied {
            Ok(copied) => {
                self.invalidate(copied.attributes_changed, to);
                reply.written(u32::try_from(copied.bytes).expect("at most WRITE_BYTES_MAX"));
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn lseek(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        reply::lseek(reply, self.mirror.lseek(fh.0, offset, whence));
    }

    fn opendir(&self, _request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.mirror.open_dir(node.0) {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            Err(error) => reply.error(error.into()),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let read = self.mirror.read_dir(fh.0, offset, &mut |item| {
            !reply.add(
                INodeNo(item.ino),
                item.cookie,
                reply::file_type(item.kind),
                OsStr::from_bytes(item.name),
            )
        });
        match read {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error.into()),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let read = self.mirror.read_dir_plus(node.0, fh.0, offset, &mut |item, entry| {
            // The kernel takes the attributes of `.` and `..` for nothing.
            let mut attr =
                FileAttr { ino: INodeNo(item.ino), kind: reply::file_type(item.kind), ..reply::nothing() };
            let mut generation = 0;
            if let Some(entry) = entry {
                (attr, generation) = (reply::file_attr(&entry.attributes), entry.generation.into());
            }
            let name = OsStr::from_bytes(item.name);
            !reply.add(INodeNo(attr.ino.0), item.cookie, name, &TTL, &attr, Generation(generation))
        });
        match read {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error.into()),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.mirror.release_dir(fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let mirror = self.mirror.clone();
        self.slow.run(move || reply::empty(reply, mirror.fsync_dir(fh.0, data_only)));
    }

    fn statfs(&self, _request: &Request, node: INodeNo, reply: ReplyStatfs) {
        match self.mirror.statfs(node.0) {
            Ok(space) => reply.statfs(
                space.f_blocks,
                space.f_bfree,
                space.f_bavail,
                space.f_files,
                space.f_ffree,
                u32::try_from(space.f_bsize).unwrap_or(4096),
                u32::try_from(space.f_namemax).unwrap_or(255),
                u32::try_from(space.f_frsize).unwrap_or(4096),
            ),
            Err(error) => reply.error(error.into()),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let flags = flags.cast_unsigned();
        reply::empty(reply, self.mirror.setxattr(caller(request), node.0, name.as_bytes(), value, flags));
    }

    fn getxattr(&self, _request: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        reply::xattr(reply, size, self.mirror.getxattr(node.0, name.as_bytes()));
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        reply::xattr(reply, size, self.mirror.listxattr(caller(request), node.0));
    }

    fn removexattr(&self, _request: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply::empty(reply, self.mirror.removexattr(node.0, name.as_bytes()));
    }

    fn access(&self, _request: &Request, _node: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks by itself, and need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _node: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(FsError::NoIoctl.into());
    }
}
