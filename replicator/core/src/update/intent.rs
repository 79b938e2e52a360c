//! What a slot of the sidefile holds before its operation is done.
//!
//! An intent is written before the operation takes any lock, and says what it may change: enough to read that again
//! after a crash. An operation on names also leaves a [`Note`] under its locks, right before the call that changes
//! something: with it, a look at the names tells whether the call took place.
//!
//! ```text
//! offset  bytes  meaning
//!      0      1  tag
//!      1      …  1 range     file 20, offset 8, length 8 (all bits set: to the end)
//!                2 attrs     file
//!                3 names     directory, name
//!                4 names     directory, name, directory, name
//!                5 size      file
//!                6 xattr     file, name
//!                7 acls      directory, name
//! ```
//!
//! A name is a 2-byte length and its bytes. Integers are little-endian.

use super::codec::{BadUpdate, Reader, put_file, put_name, put_range};
use super::{Kind, OpKind, is_xattr_name};
use crate::id::FileId;
use crate::limits;

/// What an operation may change.
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
    /// The size of a file, and its attributes.
    Size {
        /// The file.
        file: FileId,
    },
    /// Attributes of an object.
    Attrs {
        /// The object.
        file: FileId,
    },
    /// An extended attribute of an object, and its attributes.
    Xattr {
        /// The object.
        file: FileId,
        /// Which one.
        name: &'a [u8],
    },
    /// The ACLs that a new object inherits.
    Acls {
        /// The directory in which it is made.
        dir: FileId,
        /// Under this name.
        name: &'a [u8],
    },
    /// One or two names, and the objects that they stand for.
    Names {
        /// A directory and a name in it.
        first: (FileId, &'a [u8]),
        /// The other side of a rename.
        second: Option<(FileId, &'a [u8])>,
    },
}

impl<'a> Intent<'a> {
    /// Largest encoded intent, in bytes.
    pub const BYTES_MAX: usize = 1 + 2 * (FileId::BYTES + 2 + limits::NAME_BYTES_MAX) + 1;

    /// Bytes of the encoded form.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let name = |name: &[u8]| FileId::BYTES + 2 + name.len();
        1 + match *self {
            Self::Range { .. } => FileId::BYTES + 16,
            Self::Size { .. } | Self::Attrs { .. } => FileId::BYTES,
            Self::Xattr { name: only, .. } | Self::Acls { name: only, .. } => name(only),
            Self::Names { first, second: None } => name(first.1),
            Self::Names { first, second: Some(second) } => name(first.1) + name(second.1),
        }
    }

    /// Appends the encoded form.
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
            Self::Size { file } => {
                out.push(5);
                put_file(out, file);
            }
            Self::Xattr { file, name } => {
                out.push(6);
                put_file(out, file);
                put_name(out, name);
            }
            Self::Acls { dir, name } => {
                out.push(7);
                put_file(out, dir);
                put_name(out, name);
            }
        }
    }

    /// Reads an encoded intent.
    ///
    /// # Errors
    /// [`BadUpdate`] if it is none.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, BadUpdate> {
        let mut reader = Reader::new(bytes);
        let tag = reader.u8()?;
        let first = reader.file()?;
        let intent = match tag {
            1 => Self::Range { file: first, offset: reader.u64()?, len: reader.u64()? },
            2 => Self::Attrs { file: first },
            3 => Self::Names { first: (first, reader.name()?), second: None },
            4 => {
                let name = reader.name()?;
                Self::Names { first: (first, name), second: Some((reader.file()?, reader.name()?)) }
            }
            5 => Self::Size { file: first },
            6 => {
                let len = usize::from(reader.u16()?);
                let name = reader.slice(len)?;
                if !is_xattr_name(name) {
                    return Err(reader.bad("not the name of an extended attribute"));
                }
                Self::Xattr { file: first, name }
            }
            7 => Self::Acls { dir: first, name: reader.name()? },
            _ => return Err(reader.bad("no intent has this tag")),
        };
        if reader.is_empty() { Ok(intent) } else { Err(reader.bad("it goes on after its end")) }
    }

    /// The objects that are named, the directory of a name in its place.
    #[must_use]
    pub const fn files(&self) -> [Option<FileId>; 2] {
        match *self {
            Self::Range { file, .. }
            | Self::Size { file }
            | Self::Attrs { file }
            | Self::Xattr { file, .. } => [Some(file), None],
            Self::Acls { dir, .. } => [Some(dir), None],
            Self::Names { first, second } => {
                [Some(first.0), if let Some(second) = second { Some(second.0) } else { None }]
            }
        }
    }
}

/// What an operation on names found under its locks, right before it changes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// What it is going to do: create, link, unlink, rename or exchange.
    pub op: OpKind,
    /// What the first name stands for, and its kind; for a link, what it is going to stand for. None for a create.
    pub first: Option<(FileId, Kind)>,
    /// What the second name stands for, and its kind.
    pub second: Option<(FileId, Kind)>,
}

#[cfg(test)]
mod tests {
    use super::super::sample_file;
    use super::*;

    #[test]
    fn intents_come_back_and_nothing_else_does() {
        let (file, dir) = (sample_file(1), sample_file(2));
        let intents = [
            Intent::Range { file, offset: 5, len: u64::MAX },
            Intent::Size { file },
            Intent::Attrs { file },
            Intent::Xattr { file, name: b"user.a" },
            Intent::Acls { dir, name: b"new" },
            Intent::Names { first: (dir, b"a"), second: None },
            Intent::Names { first: (dir, b"a"), second: Some((file, &[b'x'; 255])) },
        ];
        for intent in intents {
            let mut bytes = Vec::new();
            intent.encode(&mut bytes);
            assert_eq!(bytes.len(), intent.encoded_len());
            assert!(bytes.len() <= Intent::BYTES_MAX);
            assert_eq!(Intent::decode(&bytes), Ok(intent));
            for len in 0..bytes.len() {
                assert!(Intent::decode(&bytes[..len]).is_err(), "{intent:?} cut to {len}");
            }
            bytes.push(0);
            assert!(Intent::decode(&bytes).is_err());
        }
        let mut bad = Vec::new();
        Intent::Names { first: (dir, b".."), second: None }.encode(&mut bad);
        assert!(Intent::decode(&bad).is_err());
    }
}
