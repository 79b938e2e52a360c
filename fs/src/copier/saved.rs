//! The byte form in which an unfinished copy waits for the next run.
//!
//! ```text
//! offset  bytes  meaning (integers are little-endian)
//!      0      8  magic        8  4  version        12  20  root directory
//!     32      8  objects copied                    40   8  bytes copied
//!     48      8  number w of waiting objects       56   8  number c of copied objects
//!     64   20 w  waiting objects in the order of the walk: inode 8, generation 4, bytes of data 8
//!      …      …  copied objects, sorted: inode number less the one before (7 bits a byte, low ones first, the top bit
//!                says that more follow), generation 4
//!    end     32  BLAKE3 of everything before
//! ```

use twinfs_core::id::FileId;

use super::state::{Item, Key};

const MAGIC: &[u8; 8] = b"TWINCOPY";
const VERSION: u32 = 1;
const ITEM_BYTES: usize = 20;
const COPIED_BYTES_MIN: usize = 5;
const HASH_BYTES: usize = 32;

/// Why the state of a copy cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadCopyState {
    /// There is no such volume.
    #[error("there is no such volume")]
    NoVolume,
    /// It was saved by another version.
    #[error("the state of the copy has the unknown version {0}")]
    Version(u32),
    /// It was not saved like this.
    #[error("the state of the copy is damaged")]
    Damaged,
    /// It is that of another directory.
    #[error("the state of the copy belongs to another directory")]
    OtherVolume,
}

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Saved {
    pub(super) root: FileId,
    pub(super) files_copied: u64,
    pub(super) bytes_copied: u64,
    pub(super) waiting: Vec<Item>,
    /// Sorted when it is encoded.
    pub(super) copied: Vec<Key>,
}

impl Saved {
    pub(super) fn encode(mut self) -> Vec<u8> {
        self.copied.sort_unstable();
        let mut out = Vec::with_capacity(96 + self.waiting.len() * ITEM_BYTES + self.copied.len() * 7);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(self.root.to_bytes());
        let counts = [self.waiting.len() as u64, self.copied.len() as u64];
        for number in [self.files_copied, self.bytes_copied].into_iter().chain(counts) {
            out.extend(number.to_le_bytes());
        }
        for Item { key: (ino, generation), bytes } in self.waiting {
            out.extend(ino.to_le_bytes());
            out.extend(generation.to_le_bytes());
            out.extend(bytes.to_le_bytes());
        }
        let mut before = 0;
        for (ino, generation) in self.copied {
            put_number(&mut out, ino - before);
            out.extend(generation.to_le_bytes());
            before = ino;
        }
        let hash = blake3::hash(&out);
        out.extend(hash.as_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BadCopyState> {
        let (body, hash) = bytes
            .split_last_chunk::<HASH_BYTES>()
            .filter(|(body, _)| body.starts_with(MAGIC))
            .ok_or(BadCopyState::Damaged)?;
        let mut reader = Reader { rest: &body[MAGIC.len()..] };
        let version = u32::from_le_bytes(reader.take().ok_or(BadCopyState::Damaged)?);
        if version != VERSION {
            return Err(BadCopyState::Version(version));
        }
        if blake3::hash(body) != *hash {
            return Err(BadCopyState::Damaged);
        }
        reader.saved().filter(|_| reader.rest.is_empty()).ok_or(BadCopyState::Damaged)
    }
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*taken)
    }

    fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// A number of entries that have room in what is left.
    fn count(&mut self, entry_bytes: usize) -> Option<usize> {
        usize::try_from(self.long()?).ok().filter(|count| *count <= self.rest.len() / entry_bytes)
    }

    fn saved(&mut self) -> Option<Saved> {
        let root = FileId::from_bytes(&self.take()?)?;
        let (files_copied, bytes_copied) = (self.long()?, self.long()?);
        let (waits, copies) = (self.count(ITEM_BYTES)?, self.count(COPIED_BYTES_MIN)?);
        let mut waiting = Vec::with_capacity(waits);
        for _ in 0..waits {
            let key = (self.long()?, self.take().map(u32::from_le_bytes)?);
            waiting.push(Item { key, bytes: self.long()? });
        }
        let mut copied = Vec::with_capacity(copies);
        let mut ino = 0_u64;
        for _ in 0..copies {
            ino = ino.checked_add(self.number()?)?;
            copied.push((ino, self.take().map(u32::from_le_bytes)?));
        }
        Some(Saved { root, files_copied, bytes_copied, waiting, copied })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::update::sample_file;

    fn sample() -> Saved {
        Saved {
            root: sample_file(1),
            files_copied: 3,
            bytes_copied: 70_000,
            waiting: vec![Item { key: (9, 1), bytes: 5 }, Item { key: (4, 2), bytes: 0 }],
            copied: vec![(1, 1), (7, 5), (7, u32::MAX), (1 << 40, 3), (u64::MAX, 0)],
        }
    }

    #[test]
    fn what_is_saved_can_be_read() {
        let saved = sample();
        assert_eq!(Saved::decode(&saved.clone().encode()), Ok(saved));
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(Saved::decode(&damaged).is_err(), "byte {at}");
            assert!(Saved::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn counts_beyond_the_bytes_are_refused_whatever_the_checksum_says() {
        let encoded = sample().encode();
        for at in [48, 56] {
            let mut body = encoded[..encoded.len() - HASH_BYTES].to_vec();
            body[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            let hash = blake3::hash(&body);
            body.extend(hash.as_bytes());
            assert_eq!(Saved::decode(&body), Err(BadCopyState::Damaged));
        }
    }
}
