//! The capture layer: a pass-through file system that records every change.
//!
//! It works on the backing directory by directory descriptors and file handles, never by paths, and can be called
//! without FUSE. Every change goes the same way:
//!
//! 1. **reserve** room in the sidefile, with the intent; writers are paced here, so no lock is held;
//! 2. **lock** the stripes of all objects that change ([`crate::stripes`]);
//! 3. the **backing call**; if it fails, the reservation is dropped and no record is left;
//! 4. **read back** the attributes of every object that was touched;
//! 5. **publish** the update with them, still under the locks; then unlock and reply.
//!
//! So the updates of any two operations that touch a common object are stamped in the order in which they took effect,
//! and replaying updates gives the exact state at each stamp.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::{AtFlags, Mode, OFlags, Stat, fstat, openat, statat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use twinfs_core::id::{FileId, VolumeIndex, VolumeInstance, VolumeName};
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{Attr, AttrList, Intent, Kind, Note, Op, UPDATE_HEADER_BYTES};
use twinfs_core::{limits, update};
use twinfs_replicator::failpoint::{self, FailPoint};
use twinfs_replicator::primary::sidefile::Wanted;

use crate::copier::CopySwitch;
use crate::errno::{FsError, Result};
use crate::fds::{Handles, PathFds};
use crate::handle::{HandleShape, NoHandles};
use crate::inode::{NodeRef, Nodes, ROOT};
use crate::ops::data::OpenFile;
use crate::ops::dir::OpenDir;
use crate::recorder::{Pending, Recorder};
use crate::stripes::{Guard, Stripes};

pub use crate::credentials::Caller;
pub use crate::ops::attr::{SetAttr, SetTime};
pub use crate::ops::data::Written;
pub use crate::ops::dir::DirItem;
pub use crate::ops::namespace::NewNode;

/// A directory to be mirrored, already opened by [`open_source`].
#[derive(Debug)]
pub struct VolumeSource {
    /// Its place in the session.
    pub index: VolumeIndex,
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree.
    pub instance: VolumeInstance,
    /// Its root directory, opened for reading.
    pub root: OwnedFd,
}

/// What the mount's root directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The root directory of the only volume.
    SingleVolume,
    /// A directory that cannot be changed and holds a directory for each volume, by its name. All volumes must lie in
    /// one file system, so that inode numbers are unique.
    VolumeList,
}

/// Why a mirror cannot be set up. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Handles of the backing file system are of no use.
    #[error("volume `{volume}` cannot be mirrored: {why}")]
    NoHandles {
        /// The volume.
        volume: VolumeName,
        /// Why.
        why: NoHandles,
    },
    /// A call failed.
    #[error("volume `{volume}`: {what}: {error}")]
    Os {
        /// The volume.
        volume: VolumeName,
        /// The call.
        what: &'static str,
        /// Its error.
        error: io::Error,
    },
    /// The list of volumes does not fit the layout.
    #[error("{0}")]
    Volumes(&'static str),
}

/// Opens the directory of a volume, before anything is mounted over it. What is mounted below it is not seen through
/// the descriptor, nor is what is mounted over it later: it is taken from a private copy of the mount.
///
/// # Errors
/// The system's: no such directory, or not the superuser.
pub fn open_source(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(rustix::fs::CWD, path, flags)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(&tree, c".", flags, Mode::empty())?)
}

/// Is told of every object that is going to change, by its inode number; of changes of names, the directories.
pub type BeforeChange = dyn Fn(u64) + Send + Sync;

/// The file system that records.
pub struct Mirror {
    pub(crate) volumes: Vec<Volume>,
    pub(crate) layout: Layout,
    pub(crate) nodes: Nodes,
    pub(crate) path_fds: PathFds,
    pub(crate) files: Handles<OpenFile>,
    pub(crate) dirs: Handles<OpenDir>,
    pub(crate) stripes: Stripes,
    pub(crate) started: (i64, u32),
    pub(crate) recorder: Arc<dyn Recorder>,
    before_change: OnceLock<Arc<BeforeChange>>,
    /// `/proc/self/fd`, through which an `O_PATH` descriptor is opened or changed.
    pub(crate) proc_fds: OwnedFd,
}

/// A mirrored directory tree.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) index: VolumeIndex,
    pub(crate) name: VolumeName,
    pub(crate) instance: VolumeInstance,
    pub(crate) root: FileId,
    pub(crate) root_node: u64,
    pub(crate) root_fd: Arc<OwnedFd>,
    pub(crate) shape: HandleShape,
    pub(crate) copy: CopySwitch,
    slot: usize,
    dev: u64,
}

/// A node with its volume and a descriptor for it (`O_PATH`, or better).
pub(crate) struct Target<'a> {
    pub(crate) node: NodeRef,
    pub(crate) volume: &'a Volume,
    pub(crate) fd: Arc<OwnedFd>,
}

impl Target<'_> {
    /// An object that was found in this directory.
    pub(crate) fn sibling(&self, child: Child) -> Self {
        let Child { fd, id, kind, .. } = child;
        let node = NodeRef { nodeid: id.ino, id, slot: self.node.slot, kind, pin: None };
        Self { node, volume: self.volume, fd: Arc::new(fd) }
    }
}

/// A child of a directory, just looked up.
pub(crate) struct Child {
    pub(crate) fd: OwnedFd,
    pub(crate) id: FileId,
    pub(crate) kind: Kind,
    pub(crate) stat: Stat,
}

/// Attributes of an object, as `stat(2)` tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of stat(2)")]
pub struct Attributes {
    pub ino: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
    pub blocks: u64,
    pub block_size: u32,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
}

/// An object as a lookup finds it.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Its node; its lookup was counted.
    pub nodeid: u64,
    /// Tells apart the objects that had one node id after each other.
    pub generation: u32,
    /// Its attributes.
    pub attributes: Attributes,
}

/// Bytes of an update without its names, values and data: header, at most five files, two ranges and a few lengths and
/// flags, and the attributes.
const UPDATE_BYTES: usize =
    UPDATE_HEADER_BYTES + 5 * FileId::BYTES + 32 + limits::UPDATE_ATTRS_MAX * (FileId::BYTES + Attr::BYTES);

/// Room for the update of an operation. Dropped, it becomes void.
#[must_use]
pub(crate) struct Reserved<'a> {
    pending: Box<dyn Pending + 'a>,
    copy: &'a CopySwitch,
}

impl Reserved<'_> {
    /// Notes what an operation on names found under its locks, right before it changes anything.
    pub(crate) fn note(&self, note: Note) {
        self.pending.note(note);
    }

    /// Publishes the update, unless the session is suspended, or a copy of the volume reads later what the operation did.
    /// Called under the locks of all that it touched.
    pub(crate) fn publish(self, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        failpoint::pass(FailPoint::BackingDone);
        let stamp = if self.copy.admits(&op, &attrs) { self.pending.publish(op, attrs, data) } else { None };
        failpoint::pass(FailPoint::Published);
        stamp
    }
}

impl Mirror {
    /// Sets up the mirror of some volumes, and tests that their file systems' handles work.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(
        volumes: Vec<VolumeSource>,
        recorder: Arc<dyn Recorder>,
        layout: Layout,
    ) -> Result<Self, SetupError> {
        if volumes.is_empty() || (layout == Layout::SingleVolume && volumes.len() > 1) {
            return Err(SetupError::Volumes("a mount shows one volume, or a list of at least one"));
        }
        let first = volumes[0].name.clone();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc_fds = openat(rustix::fs::CWD, c"/proc/self/fd", flags, Mode::empty()).map_err(|error| {
            SetupError::Os { volume: first, what: "opening /proc/self/fd", error: error.into() }
        })?;
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let mut mirror = Self {
            volumes: Vec::with_capacity(volumes.len()),
            layout,
            nodes: Nodes::default(),
            path_fds: PathFds::default(),
            files: Handles::default(),
            dirs: Handles::default(),
            stripes: Stripes::default(),
            started: (now.tv_sec, u32::try_from(now.tv_nsec).unwrap_or_default()),
            recorder,
            before_change: OnceLock::new(),
            proc_fds,
        };
        for (slot, source) in volumes.into_iter().enumerate() {
            let volume = Volume::open(source, slot, layout)?;
            if mirror.volumes.iter().any(|other| other.dev != volume.dev) {
                return Err(SetupError::Volumes("all volumes of one mount must lie in one file system"));
            }
            if mirror.volumes.iter().any(|other| other.instance == volume.instance) {
                return Err(SetupError::Volumes("two volumes have the same instance"));
            }
            mirror.nodes.add_root(volume.root_node, volume.root, slot, volume.root_fd.clone());
            mirror.volumes.push(volume);
        }
        Ok(mirror)
    }

    /// Makes everything durable that was changed before the call, for all volumes.
    ///
    /// # Errors
    /// The backing file system's. It is told once, and forgotten.
    pub fn sync(&self) -> io::Result<()> {
        self.volumes.iter().try_for_each(|volume| Ok(rustix::fs::syncfs(&volume.root_fd)?))
    }

    /// The root directory of a volume.
    #[must_use]
    pub fn root_of(&self, volume: VolumeIndex) -> Option<FileId> {
        self.volumes.iter().find(|known| known.index == volume).map(|volume| volume.root)
    }

    /// The path of a file below its volume's root, if it is known: a hint for people. See [`Nodes::path`].
    #[must_use]
    pub fn path_of(&self, volume: VolumeIndex, file: FileId) -> Box<[u8]> {
        match self.volumes.iter().find(|known| known.index == volume) {
            Some(volume) if file != volume.root => self.nodes.path(file.ino, file),
            _ => Box::default(),
        }
    }

    /// Whether a node is the directory that lists the volumes.
    pub(crate) fn is_list(&self, nodeid: u64) -> bool {
        self.layout == Layout::VolumeList && nodeid == ROOT
    }

    /// A node, with a descriptor to work on it.
    pub(crate) fn target(&self, nodeid: u64) -> Result<Target<'_>> {
        if self.is_list(nodeid) {
            return Err(FsError::VolumeList);
        }
        let node = self.nodes.get(nodeid).ok_or(FsError::NoNode)?;
        let volume = &self.volumes[node.slot];
        if let Some(fd) = &node.pin {
            return Ok(Target { fd: fd.clone(), volume, node });
        }
        if let Some(fd) = self.path_fds.get(node.id) {
            return Ok(Target { fd, volume, node });
        }
        match volume.shape.open(&volume.root_fd, node.id.ino, node.id.generation, libc::O_PATH) {
            Ok(fd) => {
                let fd = Arc::new(fd);
                self.path_fds.insert(node.id, fd.clone());
                // If the object was removed in between, its descriptor must not stay: see `gone`.
                if fstat(&fd)?.st_nlink == 0 {
                    self.path_fds.remove(node.id);
                }
                Ok(Target { fd, volume, node })
            }
            Err(error) => {
                // Removed in between: then it was given a descriptor.
                let node = self.nodes.get(nodeid).ok_or(error)?;
                let fd = node.pin.clone().ok_or(error)?;
                Ok(Target { fd, volume, node })
            }
        }
    }

    /// A directory in which `name` is to be changed.
    pub(crate) fn parent(&self, nodeid: u64, name: &[u8]) -> Result<Target<'_>> {
        let target = self.target(nodeid)?;
        if name.len() > limits::NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        if update::is_file_name(name) { Ok(target) } else { Err(FsError::BadName) }
    }

    /// Has `hook` called at the start of every change, with no lock held. Only the first call of this counts.
    pub fn set_before_change(&self, hook: Arc<BeforeChange>) {
        // It fails if there is one.
        let _ = self.before_change.set(hook);
    }

    /// Reserves room for an update. Every change begins here. `payload_bytes` is the length of all names and values in it.
    pub(crate) fn reserve<'a>(
        &'a self,
        volume: &'a Volume,
        intent: &Intent<'_>,
        payload_bytes: usize,
        data_bytes: usize,
    ) -> Result<Reserved<'a>> {
        let pending = self.reserve_for_copy(volume, intent, payload_bytes, data_bytes)?;
        Ok(Reserved { pending, copy: &volume.copy })
    }

    /// Reserves room for several updates of one operation, each with its intent and the bytes of names and values in it.
    pub(crate) fn reserve_all<'a>(
        &'a self,
        volume: &'a Volume,
        wanted: &[(Intent<'_>, usize, usize)],
    ) -> Result<Vec<Reserved<'a>>> {
        wanted.iter().for_each(|(intent, ..)| self.announce(intent));
        let wanted = wanted.iter().map(|(intent, payload_bytes, data_bytes)| Wanted {
            intent: *intent,
            meta_bytes: UPDATE_BYTES + payload_bytes,
            data_bytes: *data_bytes,
        });
        let wanted: Vec<_> = wanted.collect();
        let pending = self.recorder.reserve_all(volume.index, &wanted)?;
        Ok(pending.into_iter().map(|pending| Reserved { pending, copy: &volume.copy }).collect())
    }

    /// The same for an update of the volume's copy.
    pub(crate) fn reserve_for_copy<'a>(
        &'a self,
        volume: &Volume,
        intent: &Intent<'_>,
        payload_bytes: usize,
        data_bytes: usize,
    ) -> Result<Box<dyn Pending + 'a>> {
        self.announce(intent);
        Ok(self.recorder.reserve(volume.index, intent, UPDATE_BYTES + payload_bytes, data_bytes)?)
    }

    /// Tells whoever keeps earlier content what is about to change.
    fn announce(&self, intent: &Intent<'_>) {
        if let Some(before_change) = self.before_change.get() {
            intent.files().into_iter().flatten().for_each(|file| before_change(file.ino));
        }
    }

    /// An object by its id; `None` if it has no name any more.
    pub(crate) fn object<'a>(&self, volume: &'a Volume, id: FileId) -> Result<Option<Target<'a>>> {
        let fd = if id == volume.root {
            volume.root_fd.clone()
        } else {
            match volume.shape.open(&volume.root_fd, id.ino, id.generation, libc::O_PATH) {
                Ok(fd) => Arc::new(fd),
                Err(FsError::Os(Errno::STALE | Errno::NOENT) | FsError::NoNode) => return Ok(None),
                Err(error) => return Err(error),
            }
        };
        let stat = fstat(&fd)?;
        if stat.st_nlink == 0 {
            return Ok(None);
        }
        let kind = Kind::of_mode(stat.st_mode).ok_or(FsError::Foreign)?;
        let node = NodeRef { nodeid: id.ino, id, slot: volume.slot, kind, pin: None };
        Ok(Some(Target { node, volume, fd }))
    }

    /// Looks up a name and locks the directory and what it stands for. `also` is locked with them.
    ///
    /// The name is looked up before the lock is taken, and checked under it: descriptors keep inode numbers from being
    /// given away, so an equal number is the same object.
    pub(crate) fn lock_child(
        &self,
        dir: &Target<'_>,
        name: &[u8],
        also: &[FileId],
    ) -> Result<(Child, Guard<'_>)> {
        for _ in 0..limits::LOOKUP_RETRIES_MAX {
            let child = dir.volume.child(&dir.fd, name)?;
            let mut files = vec![dir.node.id, child.id];
            files.extend(also);
            let guard = self.stripes.lock(&files);
            if names(&dir.fd, name, Some(&child))? {
                return Ok((child, guard));
            }
        }
        Err(FsError::Restless)
    }

    /// Adds the node of an object that was found under a name, or counts one more lookup of it.
    pub(crate) fn learn(&self, dir: &Target<'_>, name: &[u8], child: Child) -> Entry {
        let Child { fd, id, kind, stat } = child;
        self.nodes.learn(id.ino, id, dir.node.slot, kind, dir.node.nodeid, name);
        self.path_fds.insert(id, Arc::new(fd));
        Entry { nodeid: id.ino, generation: id.generation, attributes: Attributes::from(&stat) }
    }

    /// Notes, under its lock, that an object's last name is gone. Its descriptor must not stay among the cached ones,
    /// or its space would not be freed; but while the kernel knows the node, the descriptor stands for it.
    pub(crate) fn gone(&self, child: Child) {
        self.nodes.removed(child.id.ino, child.id, &Arc::new(child.fd));
        self.path_fds.remove(child.id);
    }
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror")
            .field("volumes", &self.volumes)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl Volume {
    fn open(source: VolumeSource, slot: usize, layout: Layout) -> Result<Self, SetupError> {
        let VolumeSource { index, name, instance, root: fd } = source;
        let shape =
            HandleShape::probe(&fd).map_err(|why| SetupError::NoHandles { volume: name.clone(), why })?;
        let read = |error: FsError| SetupError::Os {
            volume: name.clone(),
            what: "reading its root directory",
            error: error.errno().into(),
        };
        let stat = fstat(&fd).map_err(|errno| read(errno.into()))?;
        let (ino, generation) = shape.identify(&fd, &stat).map_err(read)?;
        Ok(Self {
            index,
            instance,
            root: FileId { instance, ino, generation },
            root_node: if layout == Layout::SingleVolume { ROOT } else { ino },
            root_fd: Arc::new(fd),
            shape,
            copy: CopySwitch::default(),
            slot,
            dev: stat.st_dev,
            name,
        })
    }

    /// What a descriptor refers to.
    pub(crate) fn identify(&self, fd: OwnedFd) -> Result<Child> {
        let stat = fstat(&fd)?;
        if stat.st_dev != self.dev {
            return Err(FsError::Foreign);
        }
        let (ino, generation) = self.shape.identify(&fd, &stat)?;
        let kind = Kind::of_mode(stat.st_mode).ok_or(FsError::Foreign)?;
        Ok(Child { fd, id: FileId { instance: self.instance, ino, generation }, kind, stat })
    }

    /// Looks up a name in a directory.
    pub(crate) fn child(&self, dir: impl AsFd, name: &[u8]) -> Result<Child> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.identify(openat(dir, name, flags, Mode::empty())?)
    }

    /// The same; `None` if there is no such name, or it stands for an object of another file system.
    pub(crate) fn child_if_any(&self, dir: &Target<'_>, name: &[u8]) -> Result<Option<Child>> {
        match self.child(&dir.fd, name) {
            Ok(child) => Ok(Some(child)),
            Err(FsError::Os(Errno::NOENT) | FsError::Foreign) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The volume's place in its mirror's list.
    pub(crate) const fn slot(&self) -> usize {
        self.slot
    }
}

/// Whether a name stands for `child` (for nothing, if `None`).
pub(crate) fn names(dir: impl AsFd, name: &[u8], child: Option<&Child>) -> Result<bool> {
    match (statat(dir, name, AtFlags::SYMLINK_NOFOLLOW), child) {
        (Ok(stat), Some(child)) => Ok((stat.st_dev, stat.st_ino) == (child.stat.st_dev, child.stat.st_ino)),
        (Ok(_), None) => Ok(false),
        (Err(Errno::NOENT), child) => Ok(child.is_none()),
        (Err(error), _) => Err(error.into()),
    }
}

/// Reads back what an operation made of an object. The operation has happened: if this fails, it cannot be recorded
/// exactly, and somebody must know.
pub(crate) fn read_back(fd: impl AsFd) -> Result<Stat> {
    fstat(fd).map_err(|error| unrecorded("reading back attributes", error.into()))
}

/// Says that a change cannot be recorded. No supported file system is known to fail here.
pub(crate) fn unrecorded(what: &'static str, error: FsError) -> FsError {
    tracing::error!(%error, "{what} failed after a change was made: the mirror of this object is not exact any more");
    FsError::Unrecorded
}

/// The attributes that an update carries.
pub(crate) fn attr(stat: &Stat) -> Attr {
    Attributes::from(stat).into()
}

impl From<&Stat> for Attributes {
    fn from(stat: &Stat) -> Self {
        // The types of these fields differ between machines; the values fit all of them.
        #![allow(clippy::unnecessary_cast, clippy::useless_conversion)]
        Self {
            ino: stat.st_ino.into(),
            mode: stat.st_mode.into(),
            nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev.into(),
            size: u64::try_from(stat.st_size).unwrap_or_default(),
            blocks: stat.st_blocks as u64,
            block_size: stat.st_blksize as u32,
            atime: (stat.st_atime.into(), stat.st_atime_nsec as u32),
            mtime: (stat.st_mtime.into(), stat.st_mtime_nsec as u32),
            ctime: (stat.st_ctime.into(), stat.st_ctime_nsec as u32),
        }
    }
}

impl From<Attributes> for Attr {
    fn from(attributes: Attributes) -> Self {
        let Attributes { mode, uid, gid, nlink, rdev, size, mtime: (mtime_s, mtime_ns), .. } = attributes;
        Self { mode, uid, gid, nlink, rdev, size, mtime_s, mtime_ns }
    }
}
