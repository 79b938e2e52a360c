//! The byte form of updates: see the tables of the parent module.

use super::{Attr, AttrList, Kind, Op, OpKind, Update, is_file_name, is_xattr_name};
use crate::id::FileId;
use crate::limits;
use crate::stamp::{Seq, Stamp, Timestamp};

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
        Op::Unbind { dir, name } => {
            put_file(out, *dir);
            put_name(out, name.as_ref());
        }
        Op::Complete | Op::Resync => {}
    }
}

pub(super) fn put_file(out: &mut Vec<u8>, file: FileId) {
    out.extend_from_slice(&file.to_bytes());
}

pub(super) fn put_range(out: &mut Vec<u8>, file: FileId, offset: u64, len: u64) {
    put_file(out, file);
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
}

pub(super) fn put_name(out: &mut Vec<u8>, name: &[u8]) {
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
///
/// # Panics
/// If `encoded` is shorter than [`UPDATE_HEADER_BYTES`]; the caller made it with [`encode`].
pub fn patch_stamp(encoded: &mut [u8], stamp: Stamp) {
    encoded[8..16].copy_from_slice(&stamp.time.0.to_le_bytes());
    encoded[16..24].copy_from_slice(&stamp.seq.0.to_le_bytes());
}

/// The operation of an encoded update, without parsing the rest; `None` if it is none.
#[must_use]
pub fn encoded_kind(encoded: &[u8]) -> Option<OpKind> {
    encoded.get(4).copied().and_then(OpKind::from_u8)
}

/// Parses the update at the start of `bytes` and returns it with its encoded length. `at` is only for error messages.
///
/// What comes back is verified by itself: lengths and counts within [`limits`], names that are plain names, ranges that
/// fit a file, known object kinds, attributes for every object that needs them and
/// of the kind that the operation needs, a target if and only if the object is a symlink.
///
/// # Errors
/// [`BadUpdate`]; never panics, and allocates no more than the bytes given.
pub fn decode(bytes: &[u8], at: usize) -> Result<(Update, usize), BadUpdate> {
    decode_borrowed(bytes, at).map(|(update, len)| (update.into_owned(), len))
}

/// As [`decode`], but names and values borrow from `bytes`, so that nothing is allocated.
///
/// # Errors
/// [`BadUpdate`]; never panics.
pub fn decode_borrowed(bytes: &[u8], at: usize) -> Result<(Update<&[u8]>, usize), BadUpdate> {
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
    check_attrs(&op, &attrs).map_err(|what| reader.bad(what))?;
    Ok((Update { stamp, op, attrs }, len))
}

/// Checks that the attributes are there which a replay of the operation needs, and that they agree with it.
fn check_attrs<B: AsRef<[u8]>>(op: &Op<B>, attrs: &AttrList) -> Result<(), &'static str> {
    let kind_of = |file| attrs.get(file).and_then(Attr::kind);
    match *op {
        Op::Create { file, ref target, .. } | Op::Object { file, ref target } => match kind_of(file) {
            None => Err("the attributes of its object are missing"),
            Some(kind) if (kind == Kind::Symlink) == target.as_ref().is_empty() => {
                Err("a symlink without a target, or a target of something else")
            }
            Some(_) => Ok(()),
        },
        Op::Write { file, .. }
        | Op::Truncate { file, .. }
        | Op::Collapse { file, .. }
        | Op::Insert { file, .. } => match kind_of(file) {
            None => Err("the attributes of its object are missing"),
            Some(Kind::File) => Ok(()),
            Some(_) => Err("content of an object that is not a file"),
        },
        Op::Zero { file, .. } if kind_of(file).is_some_and(|kind| kind != Kind::File) => {
            Err("content of an object that is not a file")
        }
        Op::SetAttr { file } if kind_of(file).is_none() => Err("the attributes of its object are missing"),
        _ => Ok(()),
    }
}

fn decode_fields<'a>(kind: OpKind, r: &mut Reader<'a>) -> Result<Op<&'a [u8]>, BadUpdate> {
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
        OpKind::Resync => Op::Resync,
        OpKind::Unbind => Op::Unbind { dir: r.file()?, name: r.name()? },
    })
}

/// Reads fields and remembers where it is, for messages.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn bad(&self, what: &'static str) -> BadUpdate {
        BadUpdate { at: self.at, what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadUpdate> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or(self.bad("it ends too early"))?;
        self.bytes = tail;
        self.at += N;
        Ok(*head)
    }

    pub(super) fn slice(&mut self, len: usize) -> Result<&'a [u8], BadUpdate> {
        let (head, tail) = self.bytes.split_at_checked(len).ok_or(self.bad("it ends too early"))?;
        self.bytes = tail;
        self.at += len;
        Ok(head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, BadUpdate> {
        self.array::<1>().map(|[b]| b)
    }

    pub(super) fn u16(&mut self) -> Result<u16, BadUpdate> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, BadUpdate> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, BadUpdate> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, BadUpdate> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad("a flag is neither 0 nor 1")),
        }
    }

    pub(super) fn file(&mut self) -> Result<FileId, BadUpdate> {
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

    pub(super) fn name(&mut self) -> Result<&'a [u8], BadUpdate> {
        let len = usize::from(self.u16()?);
        let name = self.slice(len)?;
        if is_file_name(name) { Ok(name) } else { Err(self.bad("not a plain file name")) }
    }

    fn target(&mut self) -> Result<&'a [u8], BadUpdate> {
        let len = usize::from(self.u16()?);
        let target = self.slice(len)?;
        let good = target.len() <= limits::SYMLINK_BYTES_MAX && !target.contains(&0);
        if good { Ok(target) } else { Err(self.bad("not a symlink target")) }
    }

    fn xattr_name(&mut self) -> Result<&'a [u8], BadUpdate> {
        let len = usize::from(self.u16()?);
        let name = self.slice(len)?;
        if is_xattr_name(name) {
            Ok(name)
        } else {
            Err(self.bad("not an extended attribute that is mirrored"))
        }
    }

    fn value(&mut self) -> Result<&'a [u8], BadUpdate> {
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
