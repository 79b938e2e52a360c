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
//! ```

use std::fmt;

use crate::id::{FileId, VolumeInstance};
use crate::limits;
use crate::stamp::{Seq, Stamp, Timestamp};

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
            Self::Complete => [None; 4],
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
}

impl OpKind {
    const ALL: [Self; 16] = [
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
    pub fn iter(&self) -> impl Iterator<Item = &(FileId, Attr)> {
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

/// Why bytes are not an update. The bytes come from a peer, a disk or a mapping; nothing of them was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bad record update at byte {at}: {what}")]
pub struct BadUpdate {
    /// Offset in the metadata section.
    pub at: usize,
    /// What is wrong.
    pub what: &'static str,
}

/// Bytes before the operation fields.
pub const UPDATE_HEADER_BYTES: usize = 24;

/// Appends the encoded form of an update, without data.
///
/// # Panics
/// Never for updates within the bounds of [`limits`]; the caller captured it, so it is within.
pub fn encode<B: AsRef<[u8]>>(update: &Update<B>, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.push(update.op.kind() as u8);
    out.push(u8::try_from(update.attrs.len()).expect("at most UPDATE_ATTRS_MAX entries"));
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&update.stamp.time.0.to_le_bytes());
    out.extend_from_slice(&update.stamp.seq.0.to_le_bytes());
    encode_fields(&update.op, out);
    for (file, attr) in update.attrs.iter() {
        put_file(out, *file);
        for word in [attr.mode, attr.uid, attr.gid, attr.nlink] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&attr.rdev.to_le_bytes());
        out.extend_from_slice(&attr.size.to_le_bytes());
        out.extend_from_slice(&attr.mtime_s.to_le_bytes());
        out.extend_from_slice(&attr.mtime_ns.to_le_bytes());
    }
    let len = u32::try_from(out.len() - start).expect("an update is at most UPDATE_META_BYTES_MAX long");
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
}

fn encode_fields<B: AsRef<[u8]>>(op: &Op<B>, out: &mut Vec<u8>) {
    match op {
        Op::Write { file, offset, len } => {
            put_file(out, *file);
            out.extend_from_slice(&offset.to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
        }
        Op::Truncate { file, size } => {
            put_file(out, *file);
            out.extend_from_slice(&size.to_le_bytes());
        }
        Op::Zero { file, offset, len, hole } => {
            put_range(out, *file, *offset, *len);
            out.push(u8::from(*hole));
        }
        Op::Collapse { file, offset, len } | Op::Insert { file, offset, len } => {
            put_range(out, *file, *offset, *len);
        }
        Op::Create { dir, name, file, target } => {
            put_binding(out, *dir, name.as_ref(), *file);
            put_name(out, target.as_ref());
        }
        Op::Link { dir, name, file } | Op::Unlink { dir, name, file } | Op::Bind { dir, name, file } => {
            put_binding(out, *dir, name.as_ref(), *file);
        }
        Op::Rename { from_dir, from, to_dir, to, file, replaced } => {
            put_file(out, *from_dir);
            put_name(out, from.as_ref());
            put_file(out, *to_dir);
            put_name(out, to.as_ref());
            put_file(out, *file);
            out.push(u8::from(replaced.is_some()));
            replaced.iter().for_each(|file| put_file(out, *file));
        }
        Op::Exchange { a_dir, a, a_file, b_dir, b, b_file } => {
            put_binding(out, *a_dir, a.as_ref(), *a_file);
            put_binding(out, *b_dir, b.as_ref(), *b_file);
        }
        Op::SetAttr { file } => put_file(out, *file),
        Op::SetXattr { file, name, value } => {
            put_file(out, *file);
            put_name(out, name.as_ref());
            let len = u32::try_from(value.as_ref().len()).expect("at most XATTR_VALUE_BYTES_MAX bytes");
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(value.as_ref());
        }
        Op::RemoveXattr { file, name } => {
            put_file(out, *file);
            put_name(out, name.as_ref());
        }
        Op::Object { file, target } => {
            put_file(out, *file);
            put_name(out, target.as_ref());
        }
        Op::Complete => {}
    }
}

fn put_file(out: &mut Vec<u8>, file: FileId) {
    out.extend_from_slice(&file.to_bytes());
}

fn put_range(out: &mut Vec<u8>, file: FileId, offset: u64, len: u64) {
    put_file(out, file);
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
}

fn put_name(out: &mut Vec<u8>, name: &[u8]) {
    let len = u16::try_from(name.len()).expect("names and targets are at most SYMLINK_BYTES_MAX long");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(name);
}

fn put_binding(out: &mut Vec<u8>, dir: FileId, name: &[u8], file: FileId) {
    put_file(out, dir);
    put_name(out, name);
    put_file(out, file);
}

/// Sets the stamp of an encoded update in place.
pub fn patch_stamp(encoded: &mut [u8], stamp: Stamp) {
    encoded[8..16].copy_from_slice(&stamp.time.0.to_le_bytes());
    encoded[16..24].copy_from_slice(&stamp.seq.0.to_le_bytes());
}

/// Parses the update at the start of `bytes` and returns it with its encoded length. `at` is only for error messages.
///
/// What comes back is verified by itself: lengths and counts within [`limits`], names that are plain names, ranges that
/// fit a file, known object kinds, attributes for every object that needs them.
///
/// # Errors
/// [`BadUpdate`]; never panics, and allocates no more than the bytes given.
pub fn decode(bytes: &[u8], at: usize) -> Result<(Update, usize), BadUpdate> {
    let mut reader = Reader { bytes, at };
    let len = reader.u32()? as usize;
    if !(UPDATE_HEADER_BYTES..=limits::UPDATE_META_BYTES_MAX).contains(&len) || len > bytes.len() {
        return Err(BadUpdate { at, what: "its length is out of range" });
    }
    reader.bytes = &bytes[4..len];
    let kind = OpKind::from_u8(reader.u8()?).ok_or(reader.bad("unknown operation"))?;
    let attr_count = reader.u8()?;
    if usize::from(attr_count) > limits::UPDATE_ATTRS_MAX || reader.u16()? != 0 {
        return Err(reader.bad("bad attribute count or reserved bytes"));
    }
    let stamp = Stamp { time: Timestamp(reader.u64()?), seq: Seq(reader.u64()?) };
    let op = decode_fields(kind, &mut reader)?;
    let mut attrs = AttrList::new();
    for _ in 0..attr_count {
        let file = reader.file()?;
        let attr = reader.attr()?;
        if attrs.get(file).is_some() || !attrs.push(file, attr) {
            return Err(reader.bad("attributes of one object twice"));
        }
    }
    if !reader.bytes.is_empty() {
        return Err(reader.bad("bytes left over"));
    }
    let needs_attr = match op {
        Op::Create { file, .. }
        | Op::Object { file, .. }
        | Op::Write { file, .. }
        | Op::Truncate { file, .. } => Some(file),
        Op::Collapse { file, .. } | Op::Insert { file, .. } | Op::SetAttr { file } => Some(file),
        _ => None,
    };
    if needs_attr.is_some_and(|file| attrs.get(file).is_none()) {
        return Err(reader.bad("the attributes of its object are missing"));
    }
    Ok((Update { stamp, op, attrs }, len))
}

fn decode_fields(kind: OpKind, r: &mut Reader<'_>) -> Result<Op, BadUpdate> {
    Ok(match kind {
        OpKind::Write => {
            let (file, offset, len) = (r.file()?, r.u64()?, r.u32()?);
            if len == 0 || len as usize > limits::WRITE_BYTES_MAX {
                return Err(r.bad("write length out of range"));
            }
            r.check_range(offset, u64::from(len))?;
            Op::Write { file, offset, len }
        }
        OpKind::Truncate => {
            let (file, size) = (r.file()?, r.u64()?);
            r.check_range(0, size)?;
            Op::Truncate { file, size }
        }
        OpKind::Zero => {
            let (file, offset, len) = r.range()?;
            let hole = r.flag()?;
            Op::Zero { file, offset, len, hole }
        }
        OpKind::Collapse => {
            let (file, offset, len) = r.range()?;
            Op::Collapse { file, offset, len }
        }
        OpKind::Insert => {
            let (file, offset, len) = r.range()?;
            Op::Insert { file, offset, len }
        }
        OpKind::Create => {
            let (dir, name, file) = (r.file()?, r.name()?, r.file()?);
            Op::Create { dir, name, file, target: r.target()? }
        }
        OpKind::Link => Op::Link { dir: r.file()?, name: r.name()?, file: r.file()? },
        OpKind::Unlink => Op::Unlink { dir: r.file()?, name: r.name()?, file: r.file()? },
        OpKind::Bind => Op::Bind { dir: r.file()?, name: r.name()?, file: r.file()? },
        OpKind::Rename => {
            let (from_dir, from) = (r.file()?, r.name()?);
            let (to_dir, to) = (r.file()?, r.name()?);
            let file = r.file()?;
            let replaced = if r.flag()? { Some(r.file()?) } else { None };
            Op::Rename { from_dir, from, to_dir, to, file, replaced }
        }
        OpKind::Exchange => Op::Exchange {
            a_dir: r.file()?,
            a: r.name()?,
            a_file: r.file()?,
            b_dir: r.file()?,
            b: r.name()?,
            b_file: r.file()?,
        },
        OpKind::SetAttr => Op::SetAttr { file: r.file()? },
        OpKind::SetXattr => Op::SetXattr { file: r.file()?, name: r.xattr_name()?, value: r.value()? },
        OpKind::RemoveXattr => Op::RemoveXattr { file: r.file()?, name: r.xattr_name()? },
        OpKind::Object => Op::Object { file: r.file()?, target: r.target()? },
        OpKind::Complete => Op::Complete,
    })
}

/// What a slot of the sidefile holds before its operation is done: enough to read again, after a crash, what the
/// operation may or may not have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent<'a> {
    /// A range of a file's content, and its attributes.
    Range {
        /// The file.
        file: FileId,
        /// First byte.
        offset: u64,
        /// Bytes; `u64::MAX` for "to the end".
        len: u64,
    },
    /// Attributes and extended attributes of an object.
    Attrs {
        /// The object.
        file: FileId,
    },
    /// One or two names, and the objects that they stand for.
    Names {
        /// A directory and a name in it.
        first: (FileId, &'a [u8]),
        /// The other side of a rename.
        second: Option<(FileId, &'a [u8])>,
    },
}

impl Intent<'_> {
    /// Largest encoded intent, in bytes.
    pub const BYTES_MAX: usize = 1 + 2 * (FileId::BYTES + 2 + limits::NAME_BYTES_MAX) + 1;

    /// Appends the encoded form: a tag, then the fields as in an update.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Range { file, offset, len } => {
                out.push(1);
                put_range(out, file, offset, len);
            }
            Self::Attrs { file } => {
                out.push(2);
                put_file(out, file);
            }
            Self::Names { first, second } => {
                out.push(if second.is_some() { 4 } else { 3 });
                for (dir, name) in [Some(first), second].into_iter().flatten() {
                    put_file(out, dir);
                    put_name(out, name);
                }
            }
        }
    }
}

/// Reads fields and remembers where it is, for messages.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn bad(&self, what: &'static str) -> BadUpdate {
        BadUpdate { at: self.at, what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadUpdate> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or(self.bad("it ends too early"))?;
        self.bytes = tail;
        self.at += N;
        Ok(*head)
    }

    fn slice(&mut self, len: usize) -> Result<Box<[u8]>, BadUpdate> {
        let (head, tail) = self.bytes.split_at_checked(len).ok_or(self.bad("it ends too early"))?;
        self.bytes = tail;
        self.at += len;
        Ok(head.into())
    }

    fn u8(&mut self) -> Result<u8, BadUpdate> {
        self.array::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Result<u16, BadUpdate> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, BadUpdate> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, BadUpdate> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, BadUpdate> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad("a flag is neither 0 nor 1")),
        }
    }

    fn file(&mut self) -> Result<FileId, BadUpdate> {
        let bytes = self.array()?;
        FileId::from_bytes(&bytes).ok_or(self.bad("a file of no volume instance"))
    }

    fn range(&mut self) -> Result<(FileId, u64, u64), BadUpdate> {
        let (file, offset, len) = (self.file()?, self.u64()?, self.u64()?);
        self.check_range(offset, len)?;
        Ok((file, offset, len))
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), BadUpdate> {
        match offset.checked_add(len) {
            Some(end) if end <= limits::FILE_BYTES_MAX => Ok(()),
            _ => Err(self.bad("a range does not fit a file")),
        }
    }

    fn name(&mut self) -> Result<Box<[u8]>, BadUpdate> {
        let len = usize::from(self.u16()?);
        let name = self.slice(len)?;
        if is_file_name(&name) { Ok(name) } else { Err(self.bad("not a plain file name")) }
    }

    fn target(&mut self) -> Result<Box<[u8]>, BadUpdate> {
        let len = usize::from(self.u16()?);
        let target = self.slice(len)?;
        let good = target.len() <= limits::SYMLINK_BYTES_MAX && !target.contains(&0);
        if good { Ok(target) } else { Err(self.bad("not a symlink target")) }
    }

    fn xattr_name(&mut self) -> Result<Box<[u8]>, BadUpdate> {
        let len = usize::from(self.u16()?);
        let name = self.slice(len)?;
        if is_xattr_name(&name) {
            Ok(name)
        } else {
            Err(self.bad("not an extended attribute that is mirrored"))
        }
    }

    fn value(&mut self) -> Result<Box<[u8]>, BadUpdate> {
        let len = self.u32()? as usize;
        if len > limits::XATTR_VALUE_BYTES_MAX {
            return Err(self.bad("an extended attribute is too large"));
        }
        self.slice(len)
    }

    fn attr(&mut self) -> Result<Attr, BadUpdate> {
        let attr = Attr {
            mode: self.u32()?,
            uid: self.u32()?,
            gid: self.u32()?,
            nlink: self.u32()?,
            rdev: self.u64()?,
            size: self.u64()?,
            mtime_s: i64::from_le_bytes(self.array()?),
            mtime_ns: self.u32()?,
        };
        let good = attr.kind().is_some()
            && attr.mode & !0o177_777 == 0
            && attr.size <= limits::FILE_BYTES_MAX
            && attr.mtime_ns < 1_000_000_000;
        if good { Ok(attr) } else { Err(self.bad("attributes out of range")) }
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
