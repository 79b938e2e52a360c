//! Record updates: one captured mutation with its stamp, and its byte form.
//!
//! An update is *absolute*: it says what is bound, set or written, never what to toggle, so applying it twice is
//! applying it once (only `collapse` and `insert` move data, and only the fold of a delta ever interprets those).
//! It carries the attributes of every object that it touched, as they were right after it, taken under the same locks.
//! Replaying updates in the order of their stamps therefore gives the primary's exact state at each stamp.
//!
//! The same bytes stand in the primary's sidefile, on the wire and in the journal. Integers are little-endian.
//!
//! ```text
//! offset  bytes  meaning
//!      0      4  length of this update without its data, these 24 bytes included
//!      4      1  operation (table below)
//!      5      1  number of attribute entries, 0 to 4
//!      6      2  zero
//!      8      8  timestamp, ns
//!     16      8  sequence number
//!     24      …  operation fields
//!      …   64 n  attribute entries: file (20), mode (4), uid (4), gid (4), nlink (4), rdev (8), size (8),
//!                mtime seconds (8), mtime nanoseconds (4)
//! ```
//!
//! A file is 20 bytes ([`FileId::to_bytes`]), a name is a 2-byte length and its bytes.
//!
//! ```text
//!  1 write       file, offset 8, length 4               the data stands in the data section, in the order of updates
//!  2 truncate    file, size 8
//!  3 zero        file, offset 8, length 8, hole 1       reads as zeros; `hole` frees the blocks
//!  4 collapse    file, offset 8, length 8               cuts a range out, what follows moves down
//!  5 insert      file, offset 8, length 8               opens a hole, what follows moves up
//!  6 create      dir, name, file, target (name)         kind and permissions in the attributes; target of a symlink
//!  7 link        dir, name, file
//!  8 unlink      dir, name, file                        also rmdir
//!  9 rename      dir, name, dir, name, file, replaced flag 1, replaced file if 1
//! 10 exchange    dir, name, file, dir, name, file
//! 11 attributes  file                                   the values stand in the attribute entries
//! 12 set xattr   file, name, length 4, value
//! 13 drop xattr  file, name
//! 14 object      file, target (name)                    copy: the object exists, empty; its content follows
//! 15 bind        dir, name, file                        copy: the name stands for the file
//! 16 complete    –                                      copy: the volume is whole as of this stamp
//! 17 resync      –                                      the volume is not whole from this stamp on, until complete
//! 18 unbind      dir, name                              resync: the name stands for nothing
//! ```

mod codec;
mod intent;

use std::fmt;

pub use codec::{BadUpdate, UPDATE_HEADER_BYTES, decode, decode_borrowed, encode, encoded_kind, patch_stamp};
pub use intent::{Intent, Note};

use crate::id::{FileId, VolumeInstance};
use crate::limits;
use crate::stamp::Stamp;

/// Attributes of an object after an update. Access times are not mirrored; change times cannot be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attr {
    /// `st_mode`: type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Link count.
    pub nlink: u32,
    /// Device number of a device node, as Linux encodes `st_rdev`; zero otherwise.
    pub rdev: u64,
    /// Bytes of a file (or of a symlink's target); what the file system says for a directory.
    pub size: u64,
    /// Modification time, seconds since the Unix epoch.
    pub mtime_s: i64,
    /// Modification time, nanoseconds within the second.
    pub mtime_ns: u32,
}

/// What kind of object a mode describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    File,
    Dir,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

impl Kind {
    /// The kind in the type bits of `mode` (`S_IFMT`); `None` for bits that no Linux object has.
    #[must_use]
    pub const fn of_mode(mode: u32) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o100_000 => Self::File,
            0o040_000 => Self::Dir,
            0o120_000 => Self::Symlink,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            0o020_000 => Self::CharDevice,
            0o060_000 => Self::BlockDevice,
            _ => return None,
        })
    }

    /// The type bits of a mode.
    #[must_use]
    pub const fn mode_bits(self) -> u32 {
        match self {
            Self::File => 0o100_000,
            Self::Dir => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
        }
    }
}

impl Attr {
    /// Bytes of the encoded form.
    pub const BYTES: usize = 44;

    /// The kind of the object. Decoded attributes always have one.
    #[must_use]
    pub const fn kind(&self) -> Option<Kind> {
        Kind::of_mode(self.mode)
    }
}

/// A mutation. `B` holds names and values: borrowed while capturing, owned after parsing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table of the module names every field")]
pub enum Op<B = Box<[u8]>> {
    /// Data written; a short write records what was written.
    Write { file: FileId, offset: u64, len: u32 },
    /// The size was set.
    Truncate { file: FileId, size: u64 },
    /// A range reads as zeros. Never changes the size by itself: the attributes say the size.
    Zero { file: FileId, offset: u64, len: u64, hole: bool },
    /// A range was cut out.
    Collapse { file: FileId, offset: u64, len: u64 },
    /// A hole was opened.
    Insert { file: FileId, offset: u64, len: u64 },
    /// An object was born under a name. `target` is empty unless it is a symlink.
    Create { dir: FileId, name: B, file: FileId, target: B },
    /// A further name.
    Link { dir: FileId, name: B, file: FileId },
    /// A name is gone (file or empty directory).
    Unlink { dir: FileId, name: B, file: FileId },
    /// A name moved, over `replaced` if that existed.
    Rename { from_dir: FileId, from: B, to_dir: FileId, to: B, file: FileId, replaced: Option<FileId> },
    /// Two names changed places: `a` was `a_file` and is now `b_file`.
    Exchange { a_dir: FileId, a: B, a_file: FileId, b_dir: FileId, b: B, b_file: FileId },
    /// Mode, owner or times were set.
    SetAttr { file: FileId },
    /// An extended attribute was set.
    SetXattr { file: FileId, name: B, value: B },
    /// An extended attribute was removed.
    RemoveXattr { file: FileId, name: B },
    /// Copy: the object exists, for now without content, names and xattrs, whatever was known of it before.
    Object { file: FileId, target: B },
    /// Copy: the name stands for the file.
    Bind { dir: FileId, name: B, file: FileId },
    /// Copy: the volume is whole as of this stamp.
    Complete,
    /// Resync: what the replica has and the updates from here on are not the volume's state before `Complete`.
    Resync,
    /// Resync: the name stands for nothing. What it stood for may live on under another name.
    Unbind { dir: FileId, name: B },
}

impl<B> Op<B> {
    /// Bytes that this update has in the data section.
    #[must_use]
    pub const fn data_len(&self) -> u32 {
        match self {
            Self::Write { len, .. } => *len,
            _ => 0,
        }
    }

    /// The operation's name, for people and for write tokens.
    #[must_use]
    pub const fn kind(&self) -> OpKind {
        match self {
            Self::Write { .. } => OpKind::Write,
            Self::Truncate { .. } => OpKind::Truncate,
            Self::Zero { .. } => OpKind::Zero,
            Self::Collapse { .. } => OpKind::Collapse,
            Self::Insert { .. } => OpKind::Insert,
            Self::Create { .. } => OpKind::Create,
            Self::Link { .. } => OpKind::Link,
            Self::Unlink { .. } => OpKind::Unlink,
            Self::Rename { .. } => OpKind::Rename,
            Self::Exchange { .. } => OpKind::Exchange,
            Self::SetAttr { .. } => OpKind::SetAttr,
            Self::SetXattr { .. } => OpKind::SetXattr,
            Self::RemoveXattr { .. } => OpKind::RemoveXattr,
            Self::Object { .. } => OpKind::Object,
            Self::Bind { .. } => OpKind::Bind,
            Self::Complete => OpKind::Complete,
            Self::Resync => OpKind::Resync,
            Self::Unbind { .. } => OpKind::Unbind,
        }
    }

    /// The same operation with its names and values turned into another form.
    #[must_use]
    pub fn map<C>(self, mut f: impl FnMut(B) -> C) -> Op<C> {
        match self {
            Self::Write { file, offset, len } => Op::Write { file, offset, len },
            Self::Truncate { file, size } => Op::Truncate { file, size },
            Self::Zero { file, offset, len, hole } => Op::Zero { file, offset, len, hole },
            Self::Collapse { file, offset, len } => Op::Collapse { file, offset, len },
            Self::Insert { file, offset, len } => Op::Insert { file, offset, len },
            Self::Create { dir, name, file, target } => {
                Op::Create { dir, name: f(name), file, target: f(target) }
            }
            Self::Link { dir, name, file } => Op::Link { dir, name: f(name), file },
            Self::Unlink { dir, name, file } => Op::Unlink { dir, name: f(name), file },
            Self::Rename { from_dir, from, to_dir, to, file, replaced } => {
                Op::Rename { from_dir, from: f(from), to_dir, to: f(to), file, replaced }
            }
            Self::Exchange { a_dir, a, a_file, b_dir, b, b_file } => {
                Op::Exchange { a_dir, a: f(a), a_file, b_dir, b: f(b), b_file }
            }
            Self::SetAttr { file } => Op::SetAttr { file },
            Self::SetXattr { file, name, value } => Op::SetXattr { file, name: f(name), value: f(value) },
            Self::RemoveXattr { file, name } => Op::RemoveXattr { file, name: f(name) },
            Self::Object { file, target } => Op::Object { file, target: f(target) },
            Self::Bind { dir, name, file } => Op::Bind { dir, name: f(name), file },
            Self::Complete => Op::Complete,
            Self::Resync => Op::Resync,
            Self::Unbind { dir, name } => Op::Unbind { dir, name: f(name) },
        }
    }

    /// Every file that the operation names, parents first.
    #[must_use]
    pub fn files(&self) -> [Option<FileId>; 4] {
        match *self {
            Self::Write { file, .. }
            | Self::Truncate { file, .. }
            | Self::Zero { file, .. }
            | Self::Collapse { file, .. }
            | Self::Insert { file, .. }
            | Self::SetAttr { file }
            | Self::SetXattr { file, .. }
            | Self::RemoveXattr { file, .. }
            | Self::Object { file, .. } => [Some(file), None, None, None],
            Self::Create { dir, file, .. }
            | Self::Link { dir, file, .. }
            | Self::Unlink { dir, file, .. }
            | Self::Bind { dir, file, .. } => [Some(dir), Some(file), None, None],
            Self::Rename { from_dir, to_dir, file, replaced, .. } => {
                [Some(from_dir), Some(to_dir), Some(file), replaced]
            }
            Self::Exchange { a_dir, a_file, b_dir, b_file, .. } => {
                [Some(a_dir), Some(b_dir), Some(a_file), Some(b_file)]
            }
            Self::Unbind { dir, .. } => [Some(dir), None, None, None],
            Self::Complete | Self::Resync => [None; 4],
        }
    }
}

/// The operation of an update, as a number and a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the table of the module explains every operation")]
pub enum OpKind {
    Write = 1,
    Truncate = 2,
    Zero = 3,
    Collapse = 4,
    Insert = 5,
    Create = 6,
    Link = 7,
    Unlink = 8,
    Rename = 9,
    Exchange = 10,
    SetAttr = 11,
    SetXattr = 12,
    RemoveXattr = 13,
    Object = 14,
    Bind = 15,
    Complete = 16,
    Resync = 17,
    Unbind = 18,
}

impl OpKind {
    const ALL: [Self; 18] = [
        Self::Write,
        Self::Truncate,
        Self::Zero,
        Self::Collapse,
        Self::Insert,
        Self::Create,
        Self::Link,
        Self::Unlink,
        Self::Rename,
        Self::Exchange,
        Self::SetAttr,
        Self::SetXattr,
        Self::RemoveXattr,
        Self::Object,
        Self::Bind,
        Self::Complete,
        Self::Resync,
        Self::Unbind,
    ];

    /// The operation of a number; `None` if this version knows no such operation.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::Truncate => "truncate",
            Self::Zero => "zero",
            Self::Collapse => "collapse",
            Self::Insert => "insert",
            Self::Create => "create",
            Self::Link => "link",
            Self::Unlink => "unlink",
            Self::Rename => "rename",
            Self::Exchange => "exchange",
            Self::SetAttr => "attributes",
            Self::SetXattr => "set-xattr",
            Self::RemoveXattr => "remove-xattr",
            Self::Object => "copy-object",
            Self::Bind => "copy-name",
            Self::Complete => "copy-complete",
            Self::Resync => "resync",
            Self::Unbind => "resync-no-name",
        })
    }
}

/// A captured mutation with its stamp and the attributes of what it touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update<B = Box<[u8]>> {
    /// When, and where in its volume.
    pub stamp: Stamp,
    /// What happened.
    pub op: Op<B>,
    /// The touched objects' attributes right after it; at most [`limits::UPDATE_ATTRS_MAX`].
    pub attrs: AttrList,
}

impl<B> Update<B> {
    /// Every file that the update mentions, in its operation and in its attribute entries; some more than once.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.op.files().into_iter().flatten().chain(self.attrs.iter().map(|(file, _)| *file))
    }
}

impl Update<&[u8]> {
    /// The same update with names and values of its own.
    #[must_use]
    pub fn into_owned(self) -> Update {
        Update { stamp: self.stamp, op: self.op.map(Box::from), attrs: self.attrs }
    }
}

/// Attributes of the objects that an update touched: a short list without an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AttrList {
    entries: [Option<(FileId, Attr)>; limits::UPDATE_ATTRS_MAX],
}

impl AttrList {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the attributes of `file`, or sets them anew if it stands in the list already (a rename within one
    /// directory). Returns whether there was room.
    pub fn push(&mut self, file: FileId, attr: Attr) -> bool {
        for entry in &mut self.entries {
            if entry.is_none_or(|(known, _)| known == file) {
                *entry = Some((file, attr));
                return true;
            }
        }
        false
    }

    /// The entries.
    pub fn iter(&self) -> impl Iterator<Item = &(FileId, Attr)> + Clone {
        self.entries.iter().flatten()
    }

    /// The attributes of `file`.
    #[must_use]
    pub fn get(&self, file: FileId) -> Option<&Attr> {
        self.iter().find(|(known, _)| *known == file).map(|(_, attr)| attr)
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl FromIterator<(FileId, Attr)> for AttrList {
    /// Takes the first [`limits::UPDATE_ATTRS_MAX`] entries.
    fn from_iter<I: IntoIterator<Item = (FileId, Attr)>>(entries: I) -> Self {
        let mut list = Self::new();
        for (file, attr) in entries {
            list.push(file, attr);
        }
        list
    }
}

/// Whether bytes are a name that may stand in a directory: not empty, `.` or `..`, no `/`, no NUL.
#[must_use]
pub fn is_file_name(name: &[u8]) -> bool {
    (1..=limits::NAME_BYTES_MAX).contains(&name.len())
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

/// The extended attribute in which a replica keeps the [`FileId`] of each object of its tree. Never mirrored.
pub const ID_XATTR: &[u8] = b"trusted.twinfs.id";

/// Whether an extended attribute is mirrored: a well-formed name outside twinfs's own.
#[must_use]
pub fn is_xattr_name(name: &[u8]) -> bool {
    (1..=limits::XATTR_NAME_BYTES_MAX).contains(&name.len())
        && !name.contains(&0)
        && !name.starts_with(b"trusted.twinfs.")
}

/// A file of no particular volume, for tests and examples.
#[must_use]
pub fn sample_file(ino: u64) -> FileId {
    FileId { instance: VolumeInstance::new(0x0077_17f5).expect("not zero"), ino, generation: 1 }
}
