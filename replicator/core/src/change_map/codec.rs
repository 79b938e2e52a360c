//! The byte form in which a change map is kept. The bytes come from a disk: see the tests for what they may be.
//!
//! ```text
//! offset  bytes  meaning (integers are little-endian)
//!      0      8  magic        8  4  version        12  1  1 if everything may have changed
//!     13      8  number of objects
//!     21      …  objects, in the order of their identifiers:
//!                file 20 · flags 1 (1 attributes, 2 whole, 4 gone, 8 born)
//!                · ranges: number 4, start 8 and end 8 each, in order
//!                · extended attributes: number 4, length 2 and name each, in order
//!                · names: number 4, length 2, name, and 1 what it stood for each, in order
//!                  (0 not known, 1 nothing, 2 a file: 20 bytes follow)
//!    end     32  BLAKE3 of everything before
//! ```

use super::ranges::Ranges;
use super::{Before, Change, ChangeMap};
use crate::id::FileId;
use crate::limits;
use crate::update::{is_file_name, is_xattr_name};

const MAGIC: &[u8; 8] = b"TWINCHMP";
const VERSION: u32 = 1;
const HASH_BYTES: usize = 32;
/// Bytes of an object of which nothing is said.
const OBJECT_BYTES_MIN: usize = FileId::BYTES + 1 + 3 * 4;

/// Why bytes are no change map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadChangeMap {
    /// Another version wrote them.
    #[error("the change map has the unknown version {0}")]
    Version(u32),
    /// They were not written like this.
    #[error("the change map is damaged ({0})")]
    Damaged(&'static str),
}

impl ChangeMap {
    /// The byte form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.objects.len() * 2 * OBJECT_BYTES_MIN);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.push(u8::from(self.everything));
        out.extend((self.objects.len() as u64).to_le_bytes());
        for (file, change) in &self.objects {
            out.extend(file.to_bytes());
            put_change(&mut out, change);
        }
        let hash = blake3::hash(&out);
        out.extend(hash.as_bytes());
        out
    }

    /// Reads the byte form.
    ///
    /// # Errors
    /// [`BadChangeMap`]; never panics, and allocates no more than a small multiple of the bytes given.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadChangeMap> {
        let damaged = BadChangeMap::Damaged;
        let (body, hash) = bytes.split_last_chunk::<HASH_BYTES>().ok_or(damaged("too short"))?;
        let rest = body.strip_prefix(MAGIC).ok_or(damaged("not a change map"))?;
        let mut reader = Reader { rest };
        let version = u32::from_le_bytes(reader.array()?);
        if version != VERSION {
            return Err(BadChangeMap::Version(version));
        }
        if blake3::hash(body) != *hash {
            return Err(damaged("its checksum"));
        }
        reader.map()
    }
}

fn put_change(out: &mut Vec<u8>, change: &Change) {
    let flags = [change.attrs, change.whole, change.gone, change.born];
    out.push(flags.iter().enumerate().map(|(bit, flag)| u8::from(*flag) << bit).sum());
    put_count(out, change.ranges.len());
    for (start, end) in change.ranges.iter() {
        out.extend(start.to_le_bytes());
        out.extend(end.to_le_bytes());
    }
    put_count(out, change.xattrs.len());
    for name in &change.xattrs {
        put_name(out, name);
    }
    put_count(out, change.names.len());
    for (name, before) in &change.names {
        put_name(out, name);
        match before {
            Before::Unknown => out.push(0),
            Before::Was(None) => out.push(1),
            Before::Was(Some(file)) => {
                out.push(2);
                out.extend(file.to_bytes());
            }
        }
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend(u32::try_from(count).expect("the map's memory is bounded").to_le_bytes());
}

fn put_name(out: &mut Vec<u8>, name: &[u8]) {
    out.extend(u16::try_from(name.len()).expect("names are short").to_le_bytes());
    out.extend(name);
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadChangeMap> {
        let (taken, rest) =
            self.rest.split_first_chunk().ok_or(BadChangeMap::Damaged("it ends too early"))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn long(&mut self) -> Result<u64, BadChangeMap> {
        self.array().map(u64::from_le_bytes)
    }

    fn file(&mut self) -> Result<FileId, BadChangeMap> {
        FileId::from_bytes(&self.array()?).ok_or(BadChangeMap::Damaged("a file of no volume instance"))
    }

    fn name(&mut self) -> Result<&'a [u8], BadChangeMap> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        let (name, rest) =
            self.rest.split_at_checked(len).ok_or(BadChangeMap::Damaged("it ends too early"))?;
        self.rest = rest;
        Ok(name)
    }

    fn map(&mut self) -> Result<ChangeMap, BadChangeMap> {
        let damaged = BadChangeMap::Damaged;
        let everything = match self.array()? {
            [0] => false,
            [1] => true,
            _ => return Err(damaged("a flag is neither 0 nor 1")),
        };
        let count = self.long()?;
        if count > (self.rest.len() / OBJECT_BYTES_MIN) as u64 || everything && count > 0 {
            return Err(damaged("its number of objects"));
        }
        let mut map = ChangeMap { everything, ..ChangeMap::default() };
        for _ in 0..count {
            let file = self.file()?;
            if map.objects.last_key_value().is_some_and(|(last, _)| *last >= file) {
                return Err(damaged("its objects are not in order"));
            }
            let change = self.change()?;
            map.bytes += change.bytes();
            map.objects.insert(file, change);
        }
        if !self.rest.is_empty() {
            return Err(damaged("bytes left over"));
        }
        map.keep_bound(limits::CHANGE_MAP_BYTES_MAX);
        Ok(map)
    }

    fn change(&mut self) -> Result<Change, BadChangeMap> {
        let damaged = BadChangeMap::Damaged;
        let [flags] = self.array()?;
        if flags & !0xf != 0 {
            return Err(damaged("an unknown flag"));
        }
        let mut change = Change {
            attrs: flags & 1 != 0,
            whole: flags & 2 != 0,
            gone: flags & 4 != 0,
            born: flags & 8 != 0,
            ..Change::default()
        };
        change.ranges = self.ranges()?;
        for _ in 0..u32::from_le_bytes(self.array()?) {
            let name = self.name()?;
            if !is_xattr_name(name) || change.xattrs.last().is_some_and(|last| **last >= *name) {
                return Err(damaged("an extended attribute that is not mirrored, or out of order"));
            }
            change.xattrs.insert(name.into());
        }
        for _ in 0..u32::from_le_bytes(self.array()?) {
            let name = self.name()?;
            if !is_file_name(name) || change.names.last_key_value().is_some_and(|(last, _)| **last >= *name) {
                return Err(damaged("a name that is not plain, or out of order"));
            }
            let before = match self.array()? {
                [0] => Before::Unknown,
                [1] => Before::Was(None),
                [2] => Before::Was(Some(self.file()?)),
                _ => return Err(damaged("an unknown meaning of a name")),
            };
            change.names.insert(name.into(), before);
        }
        let detail =
            change.attrs || change.ranges.len() > 0 || !change.xattrs.is_empty() || !change.names.is_empty();
        let contradicts = change.whole && change.gone || !change.is_detailed() && detail;
        if contradicts || change.born && !change.whole {
            return Err(damaged("what it says of an object contradicts itself"));
        }
        Ok(change)
    }

    fn ranges(&mut self) -> Result<Ranges, BadChangeMap> {
        let count = u32::from_le_bytes(self.array()?);
        let (mut ranges, mut last) = (Ranges::default(), None);
        for _ in 0..count {
            let (start, end) = (self.long()?, self.long()?);
            let granule = limits::CHANGE_GRANULE_BYTES;
            let fits = start.is_multiple_of(granule) && (end.is_multiple_of(granule) || end == u64::MAX);
            if !fits || start >= end || last.is_some_and(|last| start <= last) {
                return Err(BadChangeMap::Damaged("its ranges are out of place"));
            }
            ranges.add(start, end);
            last = Some(end);
        }
        ranges.coarsen(limits::CHANGE_RANGES_MAX);
        Ok(ranges)
    }
}
