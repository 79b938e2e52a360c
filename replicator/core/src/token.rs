//! Write tokens: a stamp with the address it wrote, without the data.
//!
//! Tokens run ahead of record sets on a stream of higher priority, so that a replica knows what it is about to lose
//! even while the data is still queued on the primary (the idea of write tokens is IBM's, for Extended Remote Copy).
//!
//! Tokens travel in batches, each of one volume. Integers are little-endian.
//!
//! ```text
//! offset  bytes  meaning
//!      0      2  version, 2 (version 1 lacked what names stand for)
//!      2      2  number of tokens, at most TOKEN_BATCH_MAX
//!      4      1  length of the volume name
//!      5      n  volume name
//!      …         tokens, in the order of their stamps:
//!      0      1    operation, numbered as in updates
//!      1      8    timestamp, ns
//!      9      8    sequence number
//!     17     20    file, unless the operation is about the whole volume
//!      …     16    offset and length, of an operation on content
//!      …  1 + n    length of the name, and the name, of an operation on names or extended attributes
//!      …     20    what the name stands for, of an operation on names
//!      … 20 + 1 + n    directory of the second name, length of that name, and the name, of a rename or an exchange
//!      …     20    what the second name stands for, of an exchange
//! ```

use crate::id::{FileId, VolumeName};
use crate::limits;
use crate::stamp::{Seq, Stamp, Timestamp};
use crate::update::{Op, OpKind, Update, is_file_name, is_xattr_name};

/// Version of the byte form of token batches.
pub const VERSION: u16 = 2;

/// The address of one update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// When, and where in its volume.
    pub stamp: Stamp,
    /// What it did.
    pub op: OpKind,
    /// The object it changed: the file, or the directory of the first name; none for marks about the whole volume.
    pub file: Option<FileId>,
    /// First byte and number of bytes, for operations on content; zero otherwise.
    pub range: (u64, u64),
    /// The first name, for operations on names; empty otherwise.
    pub name: Box<[u8]>,
    /// What the first name stands for, for operations on names (before a rename or an exchange).
    pub child: Option<FileId>,
    /// The second name, for a rename and an exchange.
    pub to: Option<Box<SecondName>>,
}

/// Where a name moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecondName {
    /// The directory.
    pub dir: FileId,
    /// The name.
    pub name: Box<[u8]>,
    /// What it stood for, if that changes places with the first.
    pub other: Option<FileId>,
}

impl Token {
    /// The token of an update.
    #[must_use]
    pub fn of<B: AsRef<[u8]>>(update: &Update<B>) -> Self {
        let range = match update.op {
            Op::Write { offset, len, .. } => (offset, u64::from(len)),
            Op::Truncate { size, .. } => (size, 0),
            Op::Zero { offset, len, .. }
            | Op::Collapse { offset, len, .. }
            | Op::Insert { offset, len, .. } => (offset, len),
            _ => (0, 0),
        };
        let name: &[u8] = match &update.op {
            Op::Create { name, .. }
            | Op::Link { name, .. }
            | Op::Unlink { name, .. }
            | Op::Bind { name, .. }
            | Op::Unbind { name, .. }
            | Op::Rename { from: name, .. }
            | Op::Exchange { a: name, .. }
            | Op::SetXattr { name, .. }
            | Op::RemoveXattr { name, .. } => name.as_ref(),
            _ => &[],
        };
        let second = |dir: FileId, name: &B, other| {
            Some(Box::new(SecondName { dir, name: name.as_ref().into(), other }))
        };
        let (child, to) = match &update.op {
            Op::Create { file, .. }
            | Op::Link { file, .. }
            | Op::Unlink { file, .. }
            | Op::Bind { file, .. } => (Some(*file), None),
            Op::Rename { to_dir, to, file, .. } => (Some(*file), second(*to_dir, to, None)),
            Op::Exchange { a_file, b_dir, b, b_file, .. } => {
                (Some(*a_file), second(*b_dir, b, Some(*b_file)))
            }
            _ => (None, None),
        };
        let (op, file) = (update.op.kind(), update.op.files()[0]);
        Self { stamp: update.stamp, op, file, range, name: name.into(), child, to }
    }

    /// Every file that it names.
    #[must_use]
    pub fn files(&self) -> [Option<FileId>; 4] {
        let to = self.to.as_deref();
        [self.file, self.child, to.map(|to| to.dir), to.and_then(|to| to.other)]
    }
}

/// Tokens of one volume, as they travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// The volume.
    pub volume: VolumeName,
    /// Its tokens, in the order of their stamps.
    pub tokens: Vec<Token>,
}

/// Why bytes are not a token batch. They come from a peer; nothing of them was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadTokens {
    /// Made by a version that this one does not know.
    #[error("token batch version {0} is not known here")]
    Version(u16),
    /// The batch says what cannot be.
    #[error("bad token batch at byte {at}: {what}")]
    Malformed {
        /// Offset in the batch.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
}

/// Appends a batch of the first of `tokens`, and returns how many it took: as many as
/// [`limits::TOKEN_BATCH_MAX`] and [`limits::TOKEN_BATCH_BYTES_MAX`] allow.
pub fn encode_batch(volume: &VolumeName, tokens: &[Token], out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    let volume = volume.as_str().as_bytes();
    out.push(u8::try_from(volume.len()).expect("volume names are short"));
    out.extend_from_slice(volume);
    let mut count = 0_u16;
    for token in tokens.iter().take(limits::TOKEN_BATCH_MAX) {
        let end = out.len();
        token.encode(out);
        if out.len() - start > limits::TOKEN_BATCH_BYTES_MAX {
            out.truncate(end);
            break;
        }
        count += 1;
    }
    out[start + 2..start + 4].copy_from_slice(&count.to_le_bytes());
    usize::from(count)
}

impl TokenBatch {
    /// Parses the bytes of exactly one batch, and checks every token as an update would be checked: known operations,
    /// plain names, ranges that fit a file, rising stamps.
    ///
    /// # Errors
    /// [`BadTokens`]; never panics, and allocates no more than a small multiple of the bytes given.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadTokens> {
        let mut reader = Reader { bytes, len: bytes.len() };
        let version = reader.u16()?;
        if version != VERSION {
            return Err(BadTokens::Version(version));
        }
        if bytes.len() > limits::TOKEN_BATCH_BYTES_MAX {
            return Err(reader.bad("too many bytes"));
        }
        let count = usize::from(reader.u16()?);
        let name_len = usize::from(reader.u8()?);
        let name = reader.slice(name_len)?;
        let name = std::str::from_utf8(name).ok().and_then(|name| VolumeName::new(name).ok());
        let volume = name.ok_or(reader.bad("not a volume name"))?;
        if count > limits::TOKEN_BATCH_MAX || count > reader.bytes.len() / TOKEN_BYTES_MIN {
            return Err(reader.bad("more tokens than there can be"));
        }
        let mut tokens: Vec<Token> = Vec::with_capacity(count);
        for _ in 0..count {
            let token = Token::decode(&mut reader)?;
            let last = tokens.last().map_or(Stamp::default(), |token| token.stamp);
            if token.stamp.time <= last.time || token.stamp.seq <= last.seq {
                return Err(reader.bad("stamps do not rise"));
            }
            tokens.push(token);
        }
        if !reader.bytes.is_empty() {
            return Err(reader.bad("bytes left over"));
        }
        Ok(Self { volume, tokens })
    }
}

/// Bytes of a token of which only operation and stamp are there.
const TOKEN_BYTES_MIN: usize = 17;

/// What the token of an operation has besides its file.
const fn has_range_and_name(op: OpKind) -> (bool, bool) {
    match op {
        OpKind::Write | OpKind::Truncate | OpKind::Zero | OpKind::Collapse | OpKind::Insert => (true, false),
        OpKind::Create
        | OpKind::Link
        | OpKind::Unlink
        | OpKind::Rename
        | OpKind::Exchange
        | OpKind::SetXattr
        | OpKind::RemoveXattr
        | OpKind::Bind
        | OpKind::Unbind => (false, true),
        OpKind::SetAttr | OpKind::Object | OpKind::Complete | OpKind::Resync => (false, false),
    }
}

/// How many objects and names an operation on names has besides the first name: what that stands for, the second name,
/// what that stands for.
const fn has_child_and_second(op: OpKind) -> (bool, bool, bool) {
    match op {
        OpKind::Create | OpKind::Link | OpKind::Unlink | OpKind::Bind => (true, false, false),
        OpKind::Rename => (true, true, false),
        OpKind::Exchange => (true, true, true),
        _ => (false, false, false),
    }
}

fn put_name(out: &mut Vec<u8>, name: &[u8]) {
    out.push(u8::try_from(name.len()).expect("names are at most NAME_BYTES_MAX long"));
    out.extend_from_slice(name);
}

impl Token {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.op as u8);
        out.extend_from_slice(&self.stamp.time.0.to_le_bytes());
        out.extend_from_slice(&self.stamp.seq.0.to_le_bytes());
        if let Some(file) = self.file {
            out.extend_from_slice(&file.to_bytes());
        }
        let (has_range, has_name) = has_range_and_name(self.op);
        if has_range {
            out.extend_from_slice(&self.range.0.to_le_bytes());
            out.extend_from_slice(&self.range.1.to_le_bytes());
        }
        if has_name {
            put_name(out, &self.name);
        }
        if let Some(child) = self.child {
            out.extend_from_slice(&child.to_bytes());
        }
        if let Some(to) = &self.to {
            out.extend_from_slice(&to.dir.to_bytes());
            put_name(out, &to.name);
            if let Some(other) = to.other {
                out.extend_from_slice(&other.to_bytes());
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, BadTokens> {
        let op = OpKind::from_u8(reader.u8()?).ok_or(reader.bad("unknown operation"))?;
        let stamp = Stamp { time: Timestamp(reader.u64()?), seq: Seq(reader.u64()?) };
        let is_mark = matches!(op, OpKind::Complete | OpKind::Resync);
        let file = if is_mark { None } else { Some(reader.file()?) };
        let (has_range, has_name) = has_range_and_name(op);
        let range = if has_range { (reader.u64()?, reader.u64()?) } else { (0, 0) };
        if range.0.checked_add(range.1).is_none_or(|end| end > limits::FILE_BYTES_MAX) {
            return Err(reader.bad("a range does not fit a file"));
        }
        let name_len = if has_name { usize::from(reader.u8()?) } else { 0 };
        let name = reader.slice(name_len)?;
        let good = match op {
            _ if !has_name => true,
            OpKind::SetXattr | OpKind::RemoveXattr => is_xattr_name(name),
            _ => is_file_name(name),
        };
        if !good {
            return Err(reader.bad("not a plain name"));
        }
        let (has_child, has_second, has_other) = has_child_and_second(op);
        let child = if has_child { Some(reader.file()?) } else { None };
        let to = if has_second { Some(Box::new(SecondName::decode(reader, has_other)?)) } else { None };
        Ok(Self { stamp, op, file, range, name: name.into(), child, to })
    }
}

impl SecondName {
    fn decode(reader: &mut Reader<'_>, has_other: bool) -> Result<Self, BadTokens> {
        let dir = reader.file()?;
        let len = usize::from(reader.u8()?);
        let name = reader.slice(len)?;
        if !is_file_name(name) {
            return Err(reader.bad("not a plain name"));
        }
        let other = if has_other { Some(reader.file()?) } else { None };
        Ok(Self { dir, name: name.into(), other })
    }
}

/// Reads fields and knows where it is, for messages.
struct Reader<'a> {
    bytes: &'a [u8],
    len: usize,
}

impl<'a> Reader<'a> {
    fn bad(&self, what: &'static str) -> BadTokens {
        BadTokens::Malformed { at: self.len - self.bytes.len(), what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadTokens> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or(self.bad("it ends too early"))?;
        self.bytes = tail;
        Ok(*head)
    }

    fn slice(&mut self, len: usize) -> Result<&'a [u8], BadTokens> {
        let (head, tail) = self.bytes.split_at_checked(len).ok_or(self.bad("it ends too early"))?;
        self.bytes = tail;
        Ok(head)
    }

    fn file(&mut self) -> Result<FileId, BadTokens> {
        let bytes = self.array()?;
        FileId::from_bytes(&bytes).ok_or(self.bad("a file of no volume instance"))
    }

    fn u8(&mut self) -> Result<u8, BadTokens> {
        self.array::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Result<u16, BadTokens> {
        self.array().map(u16::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, BadTokens> {
        self.array().map(u64::from_le_bytes)
    }
}
