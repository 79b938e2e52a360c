//! The primitive operations that the image needs on the objects of one volume.
//!
//! Checkpoint and view are written against [`TreeStore`] only, so that the same code runs over the plain tree of a real
//! file system ([`super::linux::LinuxTree`]) and over whatever a test puts in its place.
//!
//! Objects are named by file handles, never by paths: no rename of a directory above, and no symlink, can lead an
//! operation out of the tree. Names are single, verified file names.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use twinfs_core::id::FileId;
use twinfs_core::update::{Attr, Kind};

use super::handle::Handle;

/// A directory of the volume that is there from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The root of the plain tree.
    Tree,
    /// Where a checkpoint makes new objects and puts those that move, under the names of their FileIds.
    Staging,
    /// Where removed files stay while an open handle reads them.
    Graveyard,
}

/// An object in the image's file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Its inode number.
    pub ino: u64,
    /// Its file handle.
    pub handle: Handle,
}

/// What a name in a directory stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// The inode number.
    pub ino: u64,
    /// The kind.
    pub kind: Kind,
    /// Its link count.
    pub nlink: u64,
}

/// An object to make.
#[derive(Debug, Clone, Copy)]
pub struct NewObject<'a> {
    /// Its name for life, written into its [`twinfs_core::update::ID_XATTR`].
    pub id: FileId,
    /// What it is.
    pub kind: Kind,
    /// Device number, of device nodes.
    pub rdev: u64,
    /// Target, of symlinks.
    pub target: &'a [u8],
}

/// What the file system says of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Its attributes.
    pub attr: Attr,
    /// Its inode number.
    pub ino: u64,
    /// Blocks of 512 bytes that it takes.
    pub blocks: u64,
}

/// What a part of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Something was written there.
    Data,
    /// Nothing was; it reads as zeros.
    Hole,
}

/// Room in the image's file system, as `statvfs(3)` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are those of statvfs")]
pub struct Space {
    pub bsize: u64,
    pub frsize: u64,
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub namemax: u64,
}

/// The objects of one volume of the image.
///
/// Every operation fails with `ESTALE` if its object is gone, and with `EINVAL` for a name that is no plain file name.
/// All may be called from several threads at once; only the checkpoint changes anything.
pub trait TreeStore: Debug + Send + Sync {
    /// One of the directories that are always there.
    fn place(&self, place: Place) -> Local;

    /// Makes an object with its id, owned by root and accessible to nobody else.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken; else what the file system says.
    fn create(&self, dir: &Handle, name: &[u8], new: NewObject<'_>) -> io::Result<Local>;

    /// What a name stands for; `None` if nothing.
    ///
    /// # Errors
    /// What the file system says.
    fn child(&self, dir: &Handle, name: &[u8]) -> io::Result<Option<Child>>;

    /// The handle of what a name stands for.
    ///
    /// # Errors
    /// `ENOENT`, and what the file system says.
    fn child_local(&self, dir: &Handle, name: &[u8]) -> io::Result<Local>;

    /// Calls `each` with the names of a directory, `.` and `..` left out. No name is added or removed meanwhile.
    ///
    /// # Errors
    /// What the file system says.
    fn list(&self, dir: &Handle, each: &mut dyn FnMut(&[u8], Child)) -> io::Result<()>;

    /// Gives an object that is no directory a further name.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken; else what the file system says.
    fn link(&self, object: &Handle, dir: &Handle, name: &[u8]) -> io::Result<()>;

    /// Removes a name; of a directory (`Kind::Dir`), an empty one.
    ///
    /// # Errors
    /// `ENOENT`, and what the file system says.
    fn unlink(&self, dir: &Handle, name: &[u8], kind: Kind) -> io::Result<()>;

    /// Moves a name. Never replaces one.
    ///
    /// # Errors
    /// `EEXIST` if the new name is taken; else what the file system says.
    fn rename(&self, from: (&Handle, &[u8]), to: (&Handle, &[u8])) -> io::Result<()>;

    /// What the file system says of an object.
    ///
    /// # Errors
    /// What the file system says.
    fn stat(&self, object: &Handle) -> io::Result<Stat>;

    /// Fills `buf` from a file; what lies beyond its end reads as zeros.
    ///
    /// # Errors
    /// What the file system says.
    fn read_at(&self, file: &Handle, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The first byte at or after `offset` that is data, or else that is in a hole; all beyond the end of the file counts as
    /// one. `None` if there is none. A store that does not know holes has data everywhere.
    ///
    /// # Errors
    /// The file system's.
    fn seek(&self, file: &Handle, offset: u64, want: Extent) -> io::Result<Option<u64>> {
        let _ = file;
        Ok((want == Extent::Data).then_some(offset))
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// What the file system says.
    fn write_at(&self, file: &Handle, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes a range read as zeros, as a hole if that is possible, without changing the size.
    ///
    /// # Errors
    /// What the file system says.
    fn punch(&self, file: &Handle, offset: u64, len: u64) -> io::Result<()>;

    /// Sets the size of a file.
    ///
    /// # Errors
    /// What the file system says.
    fn set_len(&self, file: &Handle, len: u64) -> io::Result<()>;

    /// Copies a range of one file into another, holes as holes. What lies beyond the end of `from` counts as a hole, and
    /// a hole changes no size.
    ///
    /// # Errors
    /// What the file system says.
    fn copy(&self, from: (&Handle, u64), to: (&Handle, u64), len: u64) -> io::Result<()>;

    /// The target of a symlink.
    ///
    /// # Errors
    /// What the file system says.
    fn read_link(&self, object: &Handle) -> io::Result<Vec<u8>>;

    /// Sets owner, group and permissions.
    ///
    /// # Errors
    /// What the file system says.
    fn set_owner_and_mode(&self, object: &Handle, attr: &Attr) -> io::Result<()>;

    /// Sets the modification time.
    ///
    /// # Errors
    /// What the file system says.
    fn set_mtime(&self, object: &Handle, seconds: i64, nanoseconds: u32) -> io::Result<()>;

    /// The value of an extended attribute; `None` if there is none of that name.
    ///
    /// # Errors
    /// What the file system says.
    fn xattr(&self, object: &Handle, name: &[u8]) -> io::Result<Option<Vec<u8>>>;

    /// The names of the extended attributes that are mirrored.
    ///
    /// # Errors
    /// What the file system says.
    fn xattrs(&self, object: &Handle) -> io::Result<Vec<Box<[u8]>>>;

    /// Sets an extended attribute, or removes it if `value` is `None` (also if it is not there).
    ///
    /// # Errors
    /// What the file system says.
    fn set_xattr(&self, object: &Handle, name: &[u8], value: Option<&[u8]>) -> io::Result<()>;

    /// The id in an object's extended attribute; `None` if it is not one of twinfs's.
    ///
    /// # Errors
    /// What the file system says.
    fn id(&self, object: &Handle) -> io::Result<Option<FileId>>;

    /// Closes whatever is kept open of an object, so that its blocks are free once its last name is gone.
    fn forget(&self, object: &Handle);

    /// Holds an object: as long as the result lives, its handle is good, also without a name, and its inode number is not
    /// given away.
    ///
    /// # Errors
    /// What the file system says.
    fn hold(&self, object: &Handle) -> io::Result<Arc<OwnedFd>>;

    /// [`Self::forget`], of all objects of the image.
    fn forget_all(&self);

    /// Makes everything durable that was changed before.
    ///
    /// # Errors
    /// What the file system says, also of writes that failed since the last call.
    fn sync(&self) -> io::Result<()>;

    /// Room in the file system.
    ///
    /// # Errors
    /// What the file system says.
    fn space(&self) -> io::Result<Space>;
}
