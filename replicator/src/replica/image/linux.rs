//! The plain tree of one volume on a Linux file system with stable file handles.
//!
//! No descriptor is held per object: a small cache keeps the ones used last. Every step goes from an open directory by
//! one plain name, symlinks are never followed. Extended attributes and modes of symlinks and special files, which must
//! not be opened, are reached through `/proc/self/fd` of an `O_PATH` descriptor.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::{self, AtFlags, FallocateFlags, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec};
use rustix::io::Errno;
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::{Attr, ID_XATTR, Kind, is_file_name, is_xattr_name};

use super::files::{Child, Extent, Local, NewObject, Place, Space, Stat, TreeStore};
use super::handle::Handle;

/// A volume's directory in the image: `tree/`, `staging/` and `graveyard/`.
#[derive(Debug)]
pub struct LinuxTree {
    /// `tree`, `staging`, `graveyard`.
    places: [Local; 3],
    /// Any object of the file system: what handles are opened by.
    mount: OwnedFd,
    open: Arc<OpenObjects>,
    /// Held for reading while a directory is listed, for writing while a name changes: a listing in several calls must
    /// not miss or double a name because the directory's format changed in between.
    names: RwLock<()>,
}

impl LinuxTree {
    /// Opens a volume's directory, and makes what is missing of it.
    ///
    /// # Errors
    /// What the file system says; `EOPNOTSUPP` if it has no file handles.
    pub fn open(dir: &Path, open_objects: &Arc<OpenObjects>) -> io::Result<Self> {
        match std::fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mount = fs::open(dir, flags, Mode::empty())?;
        let open = |name: &str| -> io::Result<Local> {
            let fresh = match fs::mkdirat(&mount, name, Mode::RWXU) {
                Err(Errno::EXIST) => false,
                result => result.map(|()| true)?,
            };
            let fd = fs::openat(&mount, name, flags, Mode::empty())?;
            if fresh {
                // What is made below must not inherit a default ACL of the site's directory.
                match fs::fremovexattr(&fd, "system.posix_acl_default") {
                    Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            local(&fd)
        };
        let places = [open("tree")?, open("staging")?, open("graveyard")?];
        let tree = Self { places, mount, open: Arc::clone(open_objects), names: RwLock::new(()) };
        // A file system whose handles cannot be opened again is refused here, not in the middle of a checkpoint.
        tree.path(&tree.places[0].handle)?;
        Ok(tree)
    }

    /// An `O_PATH` descriptor of an object.
    fn path(&self, handle: &Handle) -> io::Result<Arc<OwnedFd>> {
        if let Some(fd) = lock(&self.open.paths).get(handle) {
            return Ok(fd);
        }
        let fd = Arc::new(handle.open(&self.mount, OFlags::PATH | OFlags::NOFOLLOW)?);
        lock(&self.open.paths).insert(handle, &fd);
        Ok(fd)
    }

    /// A regular file, open for reading and writing. Anything else is refused: opening a device or a fifo has effects.
    fn file(&self, handle: &Handle) -> io::Result<Arc<OwnedFd>> {
        if let Some(fd) = lock(&self.open.files).get(handle) {
            return Ok(fd);
        }
        let path = self.path(handle)?;
        if Kind::of_mode(fs::fstat(&path)?.st_mode) != Some(Kind::File) {
            return Err(Errno::INVAL.into());
        }
        let fd = Arc::new(fs::open(proc_path(&path), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?);
        lock(&self.open.files).insert(handle, &fd);
        Ok(fd)
    }

    fn change_name(&self) -> std::sync::RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TreeStore for LinuxTree {
    fn place(&self, place: Place) -> Local {
        self.places[place as usize].clone()
    }

    fn create(&self, dir: &Handle, name: &[u8], new: NewObject<'_>) -> io::Result<Local> {
        let (dir, name) = (self.path(dir)?, plain(name)?);
        let private = Mode::RUSR | Mode::WUSR;
        match new.kind {
            Kind::Dir => fs::mkdirat(&dir, name, Mode::RWXU)?,
            Kind::Symlink => fs::symlinkat(new.target, &dir, name)?,
            kind => fs::mknodat(&dir, name, file_type(kind), private, new.rdev)?,
        }
        let fd = fs::openat(&dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        fs::setxattr(proc_path(&fd), ID_XATTR, &new.id.to_bytes(), fs::XattrFlags::empty())?;
        local(&fd)
    }

    fn child(&self, dir: &Handle, name: &[u8]) -> io::Result<Option<Child>> {
        let (dir, name) = (self.path(dir)?, plain(name)?);
        match fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            result => child(&result?).map(Some),
        }
    }

    fn child_local(&self, dir: &Handle, name: &[u8]) -> io::Result<Local> {
        let (dir, name) = (self.path(dir)?, plain(name)?);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        local(&fs::openat(&dir, name, flags, Mode::empty())?)
    }

    fn list(&self, dir: &Handle, each: &mut dyn FnMut(&[u8], Child)) -> io::Result<()> {
        let path = self.path(dir)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::openat(&path, c".", flags, Mode::empty())?;
        let _unchanging = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let mut room = vec![MaybeUninit::<u8>::uninit(); 64 << 10];
        let mut entries = RawDir::new(&fd, &mut room);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let kind = match kind_of(entry.file_type()) {
                Some(kind) => kind,
                // Some file systems do not tell kinds in their directories.
                None => child(&fs::statat(&path, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?)?.kind,
            };
            each(name, Child { ino: entry.ino(), kind, nlink: 0 });
        }
        Ok(())
    }

    fn link(&self, object: &Handle, dir: &Handle, name: &[u8]) -> io::Result<()> {
        let (object, dir, name) = (self.path(object)?, self.path(dir)?, plain(name)?);
        let _changing = self.change_name();
        Ok(fs::linkat(&object, c"", &dir, name, AtFlags::EMPTY_PATH)?)
    }

    fn unlink(&self, dir: &Handle, name: &[u8], kind: Kind) -> io::Result<()> {
        let (dir, name) = (self.path(dir)?, plain(name)?);
        let flags = if kind == Kind::Dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let _changing = self.change_name();
        Ok(fs::unlinkat(&dir, name, flags)?)
    }

    fn rename(&self, from: (&Handle, &[u8]), to: (&Handle, &[u8])) -> io::Result<()> {
        let (from_dir, to_dir) = (self.path(from.0)?, self.path(to.0)?);
        let _changing = self.change_name();
        let (from, to) = (plain(from.1)?, plain(to.1)?);
        Ok(fs::renameat_with(&from_dir, from, &to_dir, to, RenameFlags::NOREPLACE)?)
    }

    fn stat(&self, object: &Handle) -> io::Result<Stat> {
        let stat = fs::fstat(self.path(object)?)?;
        let attr = Attr {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
            rdev: stat.st_rdev,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime_s: stat.st_mtime,
            mtime_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        };
        Ok(Stat { attr, ino: stat.st_ino, blocks: u64::try_from(stat.st_blocks).unwrap_or(0) })
    }

    fn read_at(&self, file: &Handle, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let fd = self.file(file)?;
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&fd, &mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn seek(&self, file: &Handle, offset: u64, want: Extent) -> io::Result<Option<u64>> {
        let fd = self.file(file)?;
        let whence = match want {
            Extent::Data => SeekFrom::Data(offset),
            Extent::Hole => SeekFrom::Hole(offset),
        };
        match rustix::fs::seek(&fd, whence) {
            Ok(found) => Ok(Some(found)),
            // Beyond the end there is nothing but what reads as zeros.
            Err(Errno::NXIO) => Ok((want == Extent::Hole).then_some(offset)),
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, file: &Handle, offset: u64, data: &[u8]) -> io::Result<()> {
        write_all(&*self.file(file)?, offset, data)
    }

    fn punch(&self, file: &Handle, offset: u64, len: u64) -> io::Result<()> {
        let fd = self.file(file)?;
        punch(&fd, offset, len)
    }

    fn set_len(&self, file: &Handle, len: u64) -> io::Result<()> {
        Ok(fs::ftruncate(self.file(file)?, len)?)
    }

    fn copy(&self, from: (&Handle, u64), to: (&Handle, u64), len: u64) -> io::Result<()> {
        let (from_fd, to_fd) = (self.file(from.0)?, self.file(to.0)?);
        let (start, end) = (from.1, from.1.saturating_add(len));
        let target = |at: u64| to.1 + (at - start);
        let mut at = start;
        while at < end {
            let data = match fs::seek(&from_fd, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => end,
                result => result?.min(end),
            };
            if data > at {
                punch(&to_fd, target(at), data - at)?;
            }
            if data == end {
                break;
            }
            let hole = fs::seek(&from_fd, SeekFrom::Hole(data))?.min(end);
            copy_data(&from_fd, data, &to_fd, target(data), hole - data)?;
            at = hole;
        }
        Ok(())
    }

    fn read_link(&self, object: &Handle) -> io::Result<Vec<u8>> {
        Ok(fs::readlinkat(self.path(object)?, c"", Vec::new())?.into_bytes())
    }

    fn set_owner_and_mode(&self, object: &Handle, attr: &Attr) -> io::Result<()> {
        let path = self.path(object)?;
        let stat = fs::fstat(&path)?;
        let mut mode = stat.st_mode;
        if (stat.st_uid, stat.st_gid) != (attr.uid, attr.gid) {
            let (uid, gid) = (fs::Uid::from_raw(attr.uid), fs::Gid::from_raw(attr.gid));
            fs::chownat(&path, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            // A change of owner may have cleared the set-id bits.
            mode = fs::fstat(&path)?.st_mode;
        }
        if mode & 0o7777 != attr.mode & 0o7777 && Kind::of_mode(mode) != Some(Kind::Symlink) {
            fs::chmod(proc_path(&path), Mode::from_raw_mode(attr.mode & 0o7777))?;
        }
        Ok(())
    }

    fn set_mtime(&self, object: &Handle, seconds: i64, nanoseconds: u32) -> io::Result<()> {
        let path = self.path(object)?;
        let times = fs::Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: fs::UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
        };
        Ok(fs::utimensat(&path, c"", &times, AtFlags::EMPTY_PATH)?)
    }

    fn xattr(&self, object: &Handle, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let path = self.path(object)?;
        let mut room = vec![0; 256];
        loop {
            match fs::getxattr(proc_path(&path), name, &mut *room) {
                Ok(len) => {
                    room.truncate(len);
                    return Ok(Some(room));
                }
                Err(Errno::RANGE) if room.len() < limits::XATTR_VALUE_BYTES_MAX => {
                    room.resize(limits::XATTR_VALUE_BYTES_MAX, 0);
                }
                Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn xattrs(&self, object: &Handle) -> io::Result<Vec<Box<[u8]>>> {
        let path = self.path(object)?;
        let mut room = vec![0; 1024];
        let len = loop {
            match fs::listxattr(proc_path(&path), &mut *room) {
                Ok(len) => break len,
                Err(Errno::RANGE) if room.len() < limits::XATTR_VALUE_BYTES_MAX => {
                    room.resize(limits::XATTR_VALUE_BYTES_MAX, 0);
                }
                Err(Errno::OPNOTSUPP) => break 0,
                Err(error) => return Err(error.into()),
            }
        };
        let names = room[..len].split(|byte| *byte == 0).filter(|name| is_xattr_name(name));
        Ok(names.map(Into::into).collect())
    }

    fn set_xattr(&self, object: &Handle, name: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let path = self.path(object)?;
        match value {
            Some(value) => fs::setxattr(proc_path(&path), name, value, fs::XattrFlags::empty())?,
            None => match fs::removexattr(proc_path(&path), name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            },
        }
        Ok(())
    }

    fn id(&self, object: &Handle) -> io::Result<Option<FileId>> {
        let path = self.path(object)?;
        let mut room = [0; FileId::BYTES];
        match fs::getxattr(proc_path(&path), ID_XATTR, &mut room[..]) {
            Ok(FileId::BYTES) => Ok(FileId::from_bytes(&room)),
            Ok(_) | Err(Errno::NODATA | Errno::RANGE | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn forget(&self, object: &Handle) {
        lock(&self.open.paths).remove(object);
        lock(&self.open.files).remove(object);
    }

    fn hold(&self, object: &Handle) -> io::Result<Arc<OwnedFd>> {
        self.path(object)
    }

    fn forget_all(&self) {
        lock(&self.open.paths).fds.clear();
        lock(&self.open.files).fds.clear();
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fs::syncfs(&self.mount)?)
    }

    fn space(&self) -> io::Result<Space> {
        let stat = fs::fstatvfs(&self.mount)?;
        Ok(Space {
            bsize: stat.f_bsize,
            frsize: stat.f_frsize,
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            namemax: stat.f_namemax,
        })
    }
}

/// Checks once more what the decoder of updates has checked: a name from outside never becomes a path.
fn plain(name: &[u8]) -> io::Result<&[u8]> {
    if is_file_name(name) { Ok(name) } else { Err(Errno::INVAL.into()) }
}

/// The path by which calls without a descriptor form reach an `O_PATH` descriptor's object, symlinks included.
fn proc_path(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

fn local(fd: &OwnedFd) -> io::Result<Local> {
    Ok(Local { ino: fs::fstat(fd)?.st_ino, handle: Handle::of(fd)? })
}

fn child(stat: &fs::Stat) -> io::Result<Child> {
    let kind = Kind::of_mode(stat.st_mode).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Child { ino: stat.st_ino, kind, nlink: stat.st_nlink })
}

fn file_type(kind: Kind) -> fs::FileType {
    match kind {
        Kind::File => fs::FileType::RegularFile,
        Kind::Dir => fs::FileType::Directory,
        Kind::Symlink => fs::FileType::Symlink,
        Kind::Fifo => fs::FileType::Fifo,
        Kind::Socket => fs::FileType::Socket,
        Kind::CharDevice => fs::FileType::CharacterDevice,
        Kind::BlockDevice => fs::FileType::BlockDevice,
    }
}

fn kind_of(file_type: fs::FileType) -> Option<Kind> {
    Some(match file_type {
        fs::FileType::RegularFile => Kind::File,
        fs::FileType::Directory => Kind::Dir,
        fs::FileType::Symlink => Kind::Symlink,
        fs::FileType::Fifo => Kind::Fifo,
        fs::FileType::Socket => Kind::Socket,
        fs::FileType::CharacterDevice => Kind::CharDevice,
        fs::FileType::BlockDevice => Kind::BlockDevice,
        fs::FileType::Unknown => return None,
    })
}

fn write_all(fd: &OwnedFd, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        match rustix::io::pwrite(fd, &data[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn punch(fd: &OwnedFd, offset: u64, len: u64) -> io::Result<()> {
    let size = u64::try_from(fs::fstat(fd)?.st_size).unwrap_or(0);
    let len = len.min(size.saturating_sub(offset));
    if len == 0 {
        return Ok(());
    }
    match fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        result => return Ok(result?),
    }
    let zeros = vec![0; 1 << 20];
    let mut at = offset;
    while at < offset + len {
        let n = zeros.len().min(usize::try_from(offset + len - at).unwrap_or(usize::MAX));
        write_all(fd, at, &zeros[..n])?;
        at += n as u64;
    }
    Ok(())
}

fn copy_data(from: &OwnedFd, mut from_at: u64, to: &OwnedFd, mut to_at: u64, len: u64) -> io::Result<()> {
    let end = from_at + len;
    let mut room = Vec::new();
    while from_at < end {
        let n = usize::try_from(end - from_at).unwrap_or(usize::MAX).min(1 << 30);
        let (mut from_next, mut to_next) = (from_at, to_at);
        let copied = match fs::copy_file_range(from, Some(&mut from_next), to, Some(&mut to_next), n) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::XDEV | Errno::INVAL) => {
                room.resize(1 << 20, 0);
                let n = rustix::io::pread(from, &mut room[..n.min(1 << 20)], from_at)?;
                write_all(to, to_at, &room[..n])?;
                n
            }
            result => result?,
        };
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        from_at += copied as u64;
        to_at += copied as u64;
    }
    Ok(())
}

fn lock(cache: &Mutex<FdCache>) -> MutexGuard<'_, FdCache> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The descriptors that all volumes of an image keep open.
#[derive(Debug)]
pub struct OpenObjects {
    /// `O_PATH` descriptors.
    paths: Mutex<FdCache>,
    /// Regular files, open for reading and writing.
    files: Mutex<FdCache>,
}

impl Default for OpenObjects {
    fn default() -> Self {
        Self {
            paths: Mutex::new(FdCache::new(limits::IMAGE_PATH_FDS_MAX)),
            files: Mutex::new(FdCache::new(limits::IMAGE_FILE_FDS_MAX)),
        }
    }
}

/// Descriptors, of which the ones used last are kept.
#[derive(Debug)]
struct FdCache {
    fds: HashMap<Handle, (Arc<OwnedFd>, u64)>,
    fds_max: usize,
    uses: u64,
}

impl FdCache {
    fn new(fds_max: usize) -> Self {
        Self { fds: HashMap::with_capacity(fds_max), fds_max, uses: 0 }
    }

    fn get(&mut self, handle: &Handle) -> Option<Arc<OwnedFd>> {
        self.uses += 1;
        let (fd, used) = self.fds.get_mut(handle)?;
        *used = self.uses;
        Some(Arc::clone(fd))
    }

    fn insert(&mut self, handle: &Handle, fd: &Arc<OwnedFd>) {
        if self.fds.len() >= self.fds_max {
            // Dropping the older half at once makes the search for the oldest cheap on average.
            let mut uses: Vec<u64> = self.fds.values().map(|(_, used)| *used).collect();
            uses.sort_unstable();
            let median = uses[uses.len() / 2];
            self.fds.retain(|_, (_, used)| *used >= median);
        }
        self.uses += 1;
        self.fds.insert(handle.clone(), (Arc::clone(fd), self.uses));
    }

    fn remove(&mut self, handle: &Handle) {
        self.fds.remove(handle);
    }
}
