//! The replica's mount: a read-only file system of what the image shows.
//!
//! ```text
//! MOUNTPOINT/VOL/…                      each member volume
//! MOUNTPOINT/.twinfs/group              number of the consistency group that shows
//! MOUNTPOINT/.twinfs/consistency_time   its consistency time
//! MOUNTPOINT/.twinfs/lag                how far that is behind
//! ```
//!
//! Each call takes one [`View`], answers from that alone, and drops it: a checkpoint waits for it. The kernel keeps neither
//! names nor attributes nor data, so whoever reads `group`, then anything else, then `group` again, and finds the same
//! number, has seen that one group. A system call that is several requests (a path of several names, a read of more than
//! 1 MiB) may see a group for each. The pages of a mapping stay as they were when they were first touched, until the file
//! is opened anew or a call finds it with another size or time.

mod adapter;
mod nodes;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::{Kind, is_xattr_name};
use twinfs_replicator::replica::image::Image;
use twinfs_replicator::replica::image::files::{Extent, Space};
use twinfs_replicator::replica::image::view::{OpenFile, View};

use self::nodes::{Nodes, Object};
use crate::errno::{FsError, Result};
use crate::fds::Handles;
use crate::mirror::{Attributes, Entry};
use crate::mount::{self, MountError, MountOptions, Mounted};
use crate::ops::xattr::TRUSTED;

const REPORT_DIR: &[u8] = b".twinfs";
/// What programs that ask for advice read at a time.
const BLOCK_SIZE: u32 = 4096;

/// What the files below `.twinfs` say that the view does not know.
pub trait Report: Send + Sync + 'static {
    /// Seconds from the consistency time to now, for `.twinfs/lag`.
    fn lag(&self) -> String;
    /// The consistency time, for `.twinfs/consistency_time`. While nothing is written it goes on without new groups.
    fn consistency_time(&self) -> String;
}

/// Mounts what the image shows. To be mounted read-only; if somebody makes the mount writable, changes are refused
/// nevertheless.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(
    image: Arc<Image>,
    report: Arc<dyn Report>,
    target: &Path,
    options: &MountOptions,
) -> Result<Mounted, MountError> {
    let files = Replica {
        image,
        report,
        nodes: Nodes::default(),
        files: Handles::default(),
        dirs: Handles::default(),
    };
    mount::mount(files, target, options, |_| {})
}

/// The files below `.twinfs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Topic {
    Group,
    Lag,
    ConsistencyTime,
}

impl Topic {
    const ALL: [Self; 3] = [Self::Group, Self::Lag, Self::ConsistencyTime];

    const fn name(self) -> &'static [u8] {
        match self {
            Self::Group => b"group",
            Self::Lag => b"lag",
            Self::ConsistencyTime => b"consistency_time",
        }
    }
}

/// The file system.
struct Replica {
    image: Arc<Image>,
    report: Arc<dyn Report>,
    nodes: Nodes,
    files: Handles<File>,
    dirs: Handles<Directory>,
}

/// An open file.
enum File {
    /// A report, and its text as of the last read from its beginning.
    Report { topic: Topic, text: Mutex<Vec<u8>> },
    /// A mirrored file, which can be read until it is closed.
    Mirrored { volume: VolumeIndex, file: FileId, _open: OpenFile },
}

/// An open directory, and its list as of the last read from its beginning.
struct Directory {
    number: u64,
    items: Mutex<Option<Arc<[Item]>>>,
}

/// A name in a directory.
struct Item {
    number: u64,
    kind: Kind,
    name: Box<[u8]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Replica {
    fn object(&self, number: u64) -> Result<Object> {
        self.nodes.get(number).ok_or(FsError::NoNode)
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Entry> {
        if name.len() > limits::NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        let dir = self.object(parent)?;
        let view = self.image.view();
        let found = match dir {
            Object::Root if name == REPORT_DIR => Some(Object::Reports),
            Object::Root => {
                let named = view.members().find(|(_, volume, _)| volume.as_str().as_bytes() == name);
                named.map(|(volume, _, root)| Object::Mirrored(volume, root))
            }
            Object::Reports => Topic::ALL.into_iter().find(|topic| topic.name() == name).map(Object::Report),
            Object::Report(_) => None,
            Object::Mirrored(volume, dir) => {
                view.lookup(volume, dir, name)?.map(|file| Object::Mirrored(volume, file))
            }
        };
        let object = found.ok_or(FsError::NO_ENTRY)?;
        let mut attributes = self.attributes(&view, object)?;
        drop(view);
        // Only now: what the kernel is not told of it will not forget.
        attributes.ino = self.nodes.learn(object, parent);
        let generation = match object {
            Object::Mirrored(_, file) => file.generation,
            Object::Root | Object::Reports | Object::Report(_) => 0,
        };
        Ok(Entry { nodeid: attributes.ino, generation, attributes })
    }

    fn getattr(&self, number: u64) -> Result<Attributes> {
        let object = self.object(number)?;
        let attributes = self.attributes(&self.image.view(), object)?;
        Ok(Attributes { ino: number, ..attributes })
    }

    /// All but the number.
    fn attributes(&self, view: &View, object: Object) -> Result<Attributes> {
        let own = |mode, nlink, size| {
            let Timestamp(time) = view.consistency_time();
            // Both fit: there are less than 2^35 seconds in 2^64 nanoseconds.
            let time = ((time / 1_000_000_000).cast_signed(), (time % 1_000_000_000) as u32);
            Attributes {
                ino: 0,
                mode,
                nlink,
                uid: 0,
                gid: 0,
                rdev: 0,
                size,
                blocks: 0,
                block_size: BLOCK_SIZE,
                atime: time,
                mtime: time,
                ctime: time,
            }
        };
        Ok(match object {
            Object::Root => {
                let volumes = u32::try_from(view.members().count()).expect("at most VOLUMES_MAX");
                own(0o040_755, 3 + volumes, 0)
            }
            Object::Reports => own(0o040_755, 2, 0),
            // It is no hole, so a block is said to be taken.
            Object::Report(topic) => {
                Attributes { blocks: 1, ..own(0o100_444, 1, self.text(view, topic).len() as u64) }
            }
            Object::Mirrored(volume, file) => {
                let node = view.node(volume, file)?;
                let time = (node.attr.mtime_s, node.attr.mtime_ns);
                Attributes {
                    ino: 0,
                    mode: node.attr.mode,
                    nlink: node.attr.nlink,
                    uid: node.attr.uid,
                    gid: node.attr.gid,
                    rdev: node.attr.rdev,
                    size: node.attr.size,
                    blocks: node.blocks,
                    block_size: BLOCK_SIZE,
                    atime: time,
                    mtime: time,
                    ctime: time,
                }
            }
        })
    }

    fn text(&self, view: &View, topic: Topic) -> Vec<u8> {
        let mut text = match topic {
            Topic::Group => view.group().to_string(),
            Topic::Lag => self.report.lag(),
            Topic::ConsistencyTime => self.report.consistency_time(),
        };
        text.push('\n');
        text.into_bytes()
    }

    fn readlink(&self, number: u64) -> Result<Vec<u8>> {
        match self.object(number)? {
            Object::Mirrored(volume, file) => Ok(self.image.view().read_link(volume, file)?),
            Object::Root | Object::Reports | Object::Report(_) => Err(FsError::WrongKind),
        }
    }

    fn open(&self, number: u64, flags: i32) -> Result<u64> {
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(FsError::ReadOnly);
        }
        let file = match self.object(number)? {
            Object::Root | Object::Reports => return Err(FsError::IsDirectory),
            Object::Report(topic) => File::Report { topic, text: Mutex::default() },
            Object::Mirrored(volume, file) => {
                let open = self.image.view().open(volume, file)?;
                File::Mirrored { volume, file, _open: open }
            }
        };
        Ok(self.files.insert(file))
    }

    fn read(&self, handle: u64, offset: u64, len: usize) -> Result<Vec<u8>> {
        let file = self.files.get(handle).ok_or(FsError::NoHandle)?;
        let len = len.min(limits::WRITE_BYTES_MAX);
        match &*file {
            File::Report { topic, text } => {
                let mut text = lock(text);
                if offset == 0 {
                    *text = self.text(&self.image.view(), *topic);
                }
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                Ok(text[from..][..len.min(text.len() - from)].to_vec())
            }
            File::Mirrored { volume, file, .. } => Ok(self.image.view().read(*volume, *file, offset, len)?),
        }
    }

    /// The first place from `offset` on that is data (`SEEK_DATA`) or in a hole (`SEEK_HOLE`).
    fn seek(&self, handle: u64, offset: i64, whence: i32) -> Result<u64> {
        let file = self.files.get(handle).ok_or(FsError::NoHandle)?;
        let want = match whence {
            libc::SEEK_DATA => Extent::Data,
            libc::SEEK_HOLE => Extent::Hole,
            _ => return Err(FsError::WrongKind),
        };
        let offset = u64::try_from(offset).map_err(|_| FsError::NOTHING_THERE)?;
        let found = match &*file {
            File::Report { topic, .. } => {
                let end = self.text(&self.image.view(), *topic).len() as u64;
                (offset < end).then_some(if want == Extent::Data { offset } else { end })
            }
            File::Mirrored { volume, file, .. } => self.image.view().seek(*volume, *file, offset, want)?,
        };
        found.ok_or(FsError::NOTHING_THERE)
    }

    fn open_dir(&self, number: u64) -> Result<u64> {
        if let Object::Mirrored(volume, dir) = self.object(number)? {
            self.image.view().node(volume, dir)?;
        }
        Ok(self.dirs.insert(Directory { number, items: Mutex::default() }))
    }

    /// Calls `add` with each name from `offset` on, and the offset after it, until it says that there is no more room.
    /// What `readdir(3)` finds is of one group, unless the program rewinds.
    fn read_dir(&self, handle: u64, offset: u64, add: &mut dyn FnMut(&Item, u64) -> bool) -> Result<()> {
        let dir = self.dirs.get(handle).ok_or(FsError::NoHandle)?;
        let items = {
            let mut items = lock(&dir.items);
            match &*items {
                Some(items) if offset > 0 => Arc::clone(items),
                _ => {
                    let listed = match self.list(dir.number) {
                        // A directory that was removed while it is open has no names.
                        Err(FsError::NoNode) => Arc::default(),
                        listed => listed?,
                    };
                    Arc::clone(items.insert(listed))
                }
            }
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (item, next) in items.iter().zip(1..).skip(from) {
            if add(item, next) {
                break;
            }
        }
        Ok(())
    }

    fn list(&self, number: u64) -> Result<Arc<[Item]>> {
        let object = self.object(number)?;
        let view = self.image.view();
        let mut found: Vec<(Object, Kind, Box<[u8]>)> = Vec::new();
        match object {
            Object::Root => {
                found.push((Object::Reports, Kind::Dir, REPORT_DIR.into()));
                let members = view.members().map(|(volume, name, root)| {
                    (Object::Mirrored(volume, root), Kind::Dir, name.as_str().as_bytes().into())
                });
                found.extend(members);
            }
            Object::Reports => {
                found
                    .extend(Topic::ALL.map(|topic| (Object::Report(topic), Kind::File, topic.name().into())));
            }
            Object::Report(_) => return Err(FsError::WrongKind),
            Object::Mirrored(volume, dir) => {
                let entries = view.list(volume, dir)?.into_iter();
                found.extend(
                    entries.map(|entry| (Object::Mirrored(volume, entry.file), entry.kind, entry.name)),
                );
            }
        }
        drop(view);
        let numbers = self.nodes.numbers(found.iter().map(|(object, ..)| *object));
        let named =
            numbers.into_iter().zip(found).map(|(number, (_, kind, name))| Item { number, kind, name });
        let own = [(number, &b"."[..]), (self.nodes.parent(number), b"..")];
        let own = own.into_iter().map(|(number, name)| Item { number, kind: Kind::Dir, name: name.into() });
        Ok(own.chain(named).collect())
    }

    fn getxattr(&self, number: u64, name: &[u8]) -> Result<Vec<u8>> {
        match self.object(number)? {
            Object::Mirrored(volume, file) if is_xattr_name(name) => {
                self.image.view().xattr(volume, file, name)?.ok_or(FsError::NO_XATTR)
            }
            _ => Err(FsError::NO_XATTR),
        }
    }

    /// The names that the user may see, each ended by a NUL.
    fn listxattr(&self, uid: u32, number: u64) -> Result<Vec<u8>> {
        let Object::Mirrored(volume, file) = self.object(number)? else { return Ok(Vec::new()) };
        let mut names = self.image.view().xattrs(volume, file)?;
        names.retain(|name| is_xattr_name(name) && (uid == 0 || !name.starts_with(TRUSTED)));
        Ok(names.iter().flat_map(|name| [name, &b"\0"[..]].concat()).collect())
    }

    fn statfs(&self) -> Result<Space> {
        Ok(self.image.view().space()?)
    }
}
