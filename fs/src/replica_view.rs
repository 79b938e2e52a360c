//! The replica's mount: a thin, read-only adapter between fuser and the image's view.
//!
//! Nothing is cached by the kernel: each request is answered from exactly one group. A directory is listed as it was when
//! it was opened. A system call that is several requests (a path of several names, a read of more than 1 MiB) may see a
//! group for each, and a mapping of a file shows each page as of the group in which it was first touched.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::update::Kind;
use twinfs_replicator::replica::image::Image;
use twinfs_replicator::replica::image::files::Extent;
use twinfs_replicator::replica::image::view::{Node, OpenFile, View, ViewError};

use crate::errno::errno_of_view;
use crate::fds::Handles;
use crate::mount::{self, MountError, MountOptions, Mounted};

const TTL: Duration = Duration::ZERO;
const ROOT: u64 = 1;
/// The directory `.twinfs` and the files in it; every mirrored object has a larger number.
const REPORTS: u64 = 2;
const REPORT_DIR: &[u8] = b".twinfs";
const REPORT_FILES: [&[u8]; 3] = [b"group", b"lag", b"consistency_time"];
/// Numbers for objects whose natural number is taken.
const SPARE_NUMBERS: u64 = 1 << 63;

/// What the small files below `.twinfs` say, beside the group number.
pub trait Report: Send + Sync + 'static {
    /// Seconds between the consistency time and now.
    fn lag(&self) -> String;
    /// The consistency time.
    fn consistency_time(&self) -> String;
}

/// Mounts what the image shows.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(
    image: Arc<Image>,
    report: Arc<dyn Report>,
    target: &Path,
    options: &MountOptions,
) -> Result<Mounted, MountError> {
    let adapter = Adapter {
        image,
        report,
        nodes: Mutex::default(),
        files: Handles::default(),
        dirs: Handles::default(),
    };
    mount::mount(adapter, target, options, |_| {})
}

struct Adapter {
    image: Arc<Image>,
    report: Arc<dyn Report>,
    nodes: Mutex<Nodes>,
    files: Handles<Open>,
    dirs: Handles<Vec<Listed>>,
}

/// A name in a directory: node number, kind, name.
type Listed = (u64, FileType, Box<[u8]>);

/// An open file.
enum Open {
    /// A small file and its text, which is made anew when it is read from the start.
    Report {
        which: usize,
        text: Mutex<String>,
    },
    File {
        volume: VolumeIndex,
        file: FileId,
        _guard: OpenFile,
    },
}

/// Which object each node number stands for, as long as the kernel knows it.
#[derive(Default)]
struct Nodes {
    by_number: HashMap<u64, Known>,
    by_object: HashMap<(VolumeIndex, FileId), u64>,
    spare: u64,
}

struct Known {
    volume: VolumeIndex,
    file: FileId,
    lookups: u64,
}

/// What a node number stands for.
#[derive(Clone, Copy)]
enum Object {
    Root,
    Reports,
    Report(usize),
    File(VolumeIndex, FileId),
}

impl Nodes {
    /// The number of an object: made of its volume and its inode number at the primary, unless another object that the
    /// kernel still knows has that.
    fn number(&mut self, volume: VolumeIndex, file: FileId) -> u64 {
        if let Some(number) = self.by_object.get(&(volume, file)) {
            return *number;
        }
        let natural = ((u64::from(volume.0) + 1) << 48) ^ file.ino;
        let free = |number: u64| number > REPORTS + 3 && !self.by_number.contains_key(&number);
        if natural < SPARE_NUMBERS && free(natural) {
            return natural;
        }
        self.spare += 1;
        SPARE_NUMBERS + self.spare
    }

    fn learn(&mut self, volume: VolumeIndex, file: FileId) -> u64 {
        let number = self.number(volume, file);
        self.by_object.insert((volume, file), number);
        self.by_number.entry(number).or_insert(Known { volume, file, lookups: 0 }).lookups += 1;
        number
    }

    fn forget(&mut self, number: u64, lookups: u64) {
        let Some(known) = self.by_number.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            let object = (known.volume, known.file);
            self.by_object.remove(&object);
            self.by_number.remove(&number);
        }
    }
}

impl Adapter {
    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn object(&self, node: INodeNo) -> Result<Object, Errno> {
        match node.0 {
            ROOT => Ok(Object::Root),
            REPORTS => Ok(Object::Reports),
            number if (number - REPORTS - 1) < REPORT_FILES.len() as u64 => {
                Ok(Object::Report((number - REPORTS - 1) as usize))
            }
            number => match self.nodes().by_number.get(&number) {
                Some(known) => Ok(Object::File(known.volume, known.file)),
                None => Err(Errno::ESTALE),
            },
        }
    }

    fn report_text(&self, view: &View, which: usize) -> String {
        let text = match which {
            0 => view.group().to_string(),
            1 => self.report.lag(),
            _ => self.report.consistency_time(),
        };
        text + "\n"
    }

    fn attributes(&self, view: &View, object: Object, number: u64) -> Result<FileAttr, Errno> {
        match object {
            Object::Root => {
                Ok(plain(number, FileType::Directory, 0o755, 3 + view.members().count() as u32, 4096))
            }
            Object::Reports => Ok(plain(number, FileType::Directory, 0o555, 2, 4096)),
            Object::Report(which) => {
                let size = self.report_text(view, which).len() as u64;
                Ok(plain(number, FileType::RegularFile, 0o444, 1, size))
            }
            Object::File(volume, file) => {
                let node = view.node(volume, file).map_err(errno)?;
                Ok(file_attr(number, &node))
            }
        }
    }

    fn find(&self, view: &View, parent: INodeNo, name: &[u8]) -> Result<Object, Errno> {
        match self.object(parent)? {
            Object::Root if name == REPORT_DIR => Ok(Object::Reports),
            Object::Root => {
                let mut members = view.members();
                let found = members.find(|(_, volume, _)| volume.as_str().as_bytes() == name);
                found.map(|(volume, _, root)| Object::File(volume, root)).ok_or(Errno::ENOENT)
            }
            Object::Reports => {
                let found = REPORT_FILES.iter().position(|known| *known == name);
                found.map(Object::Report).ok_or(Errno::ENOENT)
            }
            Object::Report(_) => Err(Errno::ENOTDIR),
            Object::File(volume, dir) => {
                let found = view.lookup(volume, dir, name).map_err(errno)?;
                found.map(|file| Object::File(volume, file)).ok_or(Errno::ENOENT)
            }
        }
    }

    fn list(&self, view: &View, object: Object) -> Result<Vec<Listed>, Errno> {
        let mut entries: Vec<Listed> = vec![
            (ROOT, FileType::Directory, Box::from(&b"."[..])),
            (ROOT, FileType::Directory, Box::from(&b".."[..])),
        ];
        match object {
            Object::Root => {
                entries.push((REPORTS, FileType::Directory, REPORT_DIR.into()));
                for (volume, name, root) in view.members() {
                    let number = self.nodes().number(volume, root);
                    entries.push((number, FileType::Directory, name.as_str().as_bytes().into()));
                }
            }
            Object::Reports => {
                for (number, name) in (REPORTS + 1..).zip(REPORT_FILES) {
                    entries.push((number, FileType::RegularFile, name.into()));
                }
            }
            Object::Report(_) => return Err(Errno::ENOTDIR),
            Object::File(volume, dir) => {
                for entry in view.list(volume, dir).map_err(errno)? {
                    let number = self.nodes().number(volume, entry.file);
                    entries.push((number, file_type(entry.kind), entry.name));
                }
            }
        }
        Ok(entries)
    }

    /// The object of a call that only mirrored objects can answer.
    fn mirrored(&self, node: INodeNo) -> Result<(VolumeIndex, FileId), Errno> {
        match self.object(node)? {
            Object::File(volume, file) => Ok((volume, file)),
            Object::Root | Object::Reports | Object::Report(_) => Err(Errno::ENODATA),
        }
    }
}

fn errno(error: ViewError) -> Errno {
    errno_of_view(&error)
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

fn plain(number: u64, kind: FileType, perm: u16, nlink: u32, size: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn file_attr(number: u64, node: &Node) -> FileAttr {
    let attr = &node.attr;
    let time = time(attr.mtime_s, attr.mtime_ns);
    FileAttr {
        blocks: node.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev as u32,
        ..plain(
            number,
            attr.kind().map_or(FileType::RegularFile, file_type),
            (attr.mode & 0o7777) as u16,
            attr.nlink,
            attr.size,
        )
    }
}

fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(u64::from(nanoseconds))
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for flag in
            [InitFlags::FUSE_POSIX_ACL, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP]
        {
            config.add_capabilities(flag).map_err(|flag| {
                std::io::Error::other(format!(
                    "this kernel's FUSE is too old: it lacks {flag:?} (Linux 6.6 has it)"
                ))
            })?;
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let view = self.image.view();
        let found = self.find(&view, parent, name.as_bytes()).and_then(|object| {
            let (number, generation) = match object {
                Object::File(volume, file) => (0, Some((volume, file))),
                Object::Report(which) => (REPORTS + 1 + which as u64, None),
                Object::Reports => (REPORTS, None),
                Object::Root => (ROOT, None),
            };
            let attributes = self.attributes(&view, object, number)?;
            Ok(match generation {
                Some((volume, file)) => {
                    let ino = INodeNo(self.nodes().learn(volume, file));
                    (FileAttr { ino, ..attributes }, Generation(file.generation.into()))
                }
                None => (attributes, Generation(0)),
            })
        });
        match found {
            Ok((attributes, generation)) => reply.entry(&TTL, &attributes, generation),
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _request: &Request, node: INodeNo, lookups: u64) {
        self.nodes().forget(node.0, lookups);
    }

    fn getattr(&self, _request: &Request, node: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let view = self.image.view();
        match self.object(node).and_then(|object| self.attributes(&view, object, node.0)) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _request: &Request, node: INodeNo, reply: ReplyData) {
        let target = self.mirrored(node).and_then(|(volume, file)| {
            let view = self.image.view();
            view.read_link(volume, file).map_err(errno)
        });
        match target {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let view = self.image.view();
        let open = self.object(node).and_then(|object| match object {
            Object::Report(which) => Ok(Open::Report { which, text: Mutex::default() }),
            Object::File(volume, file) => {
                let guard = view.open(volume, file).map_err(errno)?;
                Ok(Open::File { volume, file, _guard: guard })
            }
            Object::Root | Object::Reports => Err(Errno::EISDIR),
        });
        match open {
            Ok(open) => reply.opened(FileHandle(self.files.insert(open)), FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error),
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
        let Some(open) = self.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        match &*open {
            Open::Report { which, text } => {
                let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
                if offset == 0 {
                    *text = self.report_text(&self.image.view(), *which);
                }
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                let to = from.saturating_add(size as usize).min(text.len());
                reply.data(&text.as_bytes()[from..to]);
            }
            Open::File { volume, file, .. } => {
                let len = (size as usize).min(limits::WRITE_BYTES_MAX);
                let read = self.image.view().read(*volume, *file, offset, len);
                match read {
                    Ok(bytes) => reply.data(&bytes),
                    Err(error) => reply.error(errno(error)),
                }
            }
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
        let Some(open) = self.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        let want = match whence {
            libc::SEEK_DATA => Extent::Data,
            libc::SEEK_HOLE => Extent::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let (Open::File { volume, file, .. }, Ok(offset)) = (&*open, u64::try_from(offset)) else {
            return reply.error(Errno::ENXIO);
        };
        match self.image.view().seek(*volume, *file, offset, want) {
            Ok(Some(found)) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(errno(error)),
        }
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
        drop(self.files.remove(fh.0));
        reply.ok();
    }

    fn opendir(&self, _request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let view = self.image.view();
        match self.object(node).and_then(|object| self.list(&view, object)) {
            Ok(entries) => reply.opened(FileHandle(self.dirs.insert(entries)), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(entries) = self.dirs.get(fh.0) else { return reply.error(Errno::EBADF) };
        for (at, (number, kind, name)) in entries.iter().enumerate().skip(offset as usize) {
            let number = if at == 0 { node.0 } else { *number };
            if reply.add(INodeNo(number), at as u64 + 1, *kind, OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        drop(self.dirs.remove(fh.0));
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _node: INodeNo, reply: ReplyStatfs) {
        match self.image.view().space() {
            Ok(space) => {
                let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
                reply.statfs(
                    space.blocks,
                    space.bfree,
                    space.bavail,
                    space.files,
                    space.ffree,
                    narrow(space.bsize),
                    narrow(space.namemax),
                    narrow(space.frsize),
                );
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn getxattr(&self, _request: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let value = self.mirrored(node).and_then(|(volume, file)| {
            let value = self.image.view().xattr(volume, file, name.as_bytes()).map_err(errno)?;
            value.ok_or(Errno::ENODATA)
        });
        reply_xattr(reply, size, value);
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let names = match self.mirrored(node) {
            Ok((volume, file)) => self.image.view().xattrs(volume, file).map_err(errno).map(|names| {
                // As every file system, it hides from others what only the administrator may read.
                let shown = names.iter().filter(|name| request.uid() == 0 || !name.starts_with(b"trusted."));
                shown.flat_map(|name| name.iter().copied().chain([0])).collect::<Vec<u8>>()
            }),
            Err(_) => Ok(Vec::new()),
        };
        reply_xattr(reply, size, names);
    }

    fn flush(
        &self,
        _request: &Request,
        _node: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(error),
    }
}
