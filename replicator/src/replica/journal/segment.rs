//! Segments: their names and headers, and the walk over their entries.

use std::sync::Arc;

use bytes::Bytes;
use twinfs_core::id::{GroupNumber, SessionId};
use twinfs_core::limits;

use super::JournalError;
use super::entry::{
    ENTRY_HEADER_BYTES, ENTRY_MAGIC, EntryHeader, EntryKind, EntryNumber, entry_len, padding,
};
use crate::storage::{File, StorageError};

/// The first bytes of every journal segment, of any version.
pub const SEGMENT_MAGIC: [u8; 8] = *b"TWINJRN\0";
/// The version that this program reads and writes.
pub const SEGMENT_VERSION: u32 = 1;
/// What a batch of entries starts at a multiple of, so that no sync rewrites a block that an earlier one made durable.
pub(super) const BLOCK_BYTES: u64 = 4096;
/// Where the entries start.
pub(super) const ENTRIES_AT: u64 = BLOCK_BYTES;
/// Bytes of the segment header; the rest of its block is zeros.
const HEADER_BYTES: usize = 128;
/// Where the number of the segment stands in the header.
pub(super) const NUMBER_AT: u64 = 32;
/// Bytes of the header that its checksum covers.
const SUMMED_BYTES: usize = HEADER_BYTES - blake3::OUT_LEN;
/// Bytes that the search for the end of the log reads at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// The file name of a segment.
pub(super) fn segment_name(number: u64) -> String {
    format!("{number:08}.seg")
}

/// The name of a segment that is being made.
pub(super) fn new_segment_name(number: u64) -> String {
    format!("{number:08}.new")
}

/// Whether a file is a segment whose making was cut short.
pub(super) fn is_remains(name: &str) -> bool {
    let number = name.strip_suffix(".new").and_then(|number| number.parse().ok());
    number.is_some_and(|number| new_segment_name(number) == name)
}

/// The number of the segment of that name; `None` for other files.
pub(super) fn segment_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".seg")?.parse().ok()?;
    (number > 0 && segment_name(number) == name).then_some(number)
}

/// Keys the checksums of a segment's entries. Made of the whole header, salt and all, so that an entry of any other
/// segment fails its checksum here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentKey([u8; blake3::KEY_LEN]);

impl SegmentKey {
    pub(super) fn of(header: &[u8]) -> Self {
        Self(*blake3::hash(header).as_bytes())
    }

    pub(super) const fn as_bytes(&self) -> &[u8; blake3::KEY_LEN] {
        &self.0
    }
}

/// What a segment says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) session: SessionId,
    pub(super) number: u64,
    /// Size of the segment.
    pub(super) bytes: u64,
    /// The number of its first entry: where the log left the segment before it.
    pub(super) first_entry: EntryNumber,
    pub(super) salt: [u8; 16],
    /// The salt of the segment before it; zeros in the first of a journal.
    pub(super) predecessor_salt: [u8; 16],
    /// The last group committed before it; zero if there was none.
    pub(super) last_group: GroupNumber,
}

/// Why the first block of a file is no segment header.
enum BadHeader {
    Version(u32),
    What(&'static str),
}

impl SegmentHeader {
    /// The first block of the segment, and the key of its entries.
    pub(super) fn encode(&self) -> (Vec<u8>, SegmentKey) {
        let mut bytes = Vec::with_capacity(BLOCK_BYTES as usize);
        bytes.extend_from_slice(&SEGMENT_MAGIC);
        bytes.extend_from_slice(&SEGMENT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(self.session.as_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.bytes.to_le_bytes());
        bytes.extend_from_slice(&self.first_entry.0.to_le_bytes());
        bytes.extend_from_slice(&self.salt);
        bytes.extend_from_slice(&self.predecessor_salt);
        bytes.extend_from_slice(&self.last_group.0.to_le_bytes());
        bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
        let key = SegmentKey::of(&bytes);
        bytes.resize(BLOCK_BYTES as usize, 0);
        (bytes, key)
    }

    fn decode(block: &[u8]) -> Result<(Self, SegmentKey), BadHeader> {
        let early = BadHeader::What("the header ends too early");
        let Some((header, rest)) = block.split_at_checked(HEADER_BYTES) else { return Err(early) };
        let mut fields = header;
        let magic: [u8; 8] = take(&mut fields);
        let version = u32::from_le_bytes(take(&mut fields));
        if magic != SEGMENT_MAGIC {
            return Err(BadHeader::What("this is no journal segment"));
        }
        // In every version, so that a version that rotted is not taken for a later one.
        if *blake3::hash(&header[..SUMMED_BYTES]).as_bytes() != header[SUMMED_BYTES..] {
            return Err(BadHeader::What("the checksum of the header is wrong"));
        }
        if version != SEGMENT_VERSION {
            return Err(BadHeader::Version(version));
        }
        let zero: [u8; 4] = take(&mut fields);
        let this = Self {
            session: SessionId::from_bytes(take(&mut fields)),
            number: u64::from_le_bytes(take(&mut fields)),
            bytes: u64::from_le_bytes(take(&mut fields)),
            first_entry: EntryNumber(u64::from_le_bytes(take(&mut fields))),
            salt: take(&mut fields),
            predecessor_salt: take(&mut fields),
            last_group: GroupNumber(u64::from_le_bytes(take(&mut fields))),
        };
        let sane = zero == [0; 4]
            && rest.iter().all(|b| *b == 0)
            && is_segment_size(this.bytes)
            && this.number > 0
            && this.number < u64::MAX / 2
            && EntryNumber::RANGE.contains(&this.first_entry.0);
        if !sane {
            return Err(BadHeader::What("the header says what cannot be"));
        }
        Ok((this, SegmentKey::of(header)))
    }
}

/// Takes a field off a header whose length was checked.
fn take<const N: usize>(fields: &mut &[u8]) -> [u8; N] {
    let (head, tail) = fields.split_first_chunk().expect("the fields of a header fill it");
    *fields = tail;
    *head
}

/// Whether a segment may have that size.
pub(super) const fn is_segment_size(bytes: u64) -> bool {
    bytes >= 2 * BLOCK_BYTES && bytes <= limits::SEGMENT_BYTES && bytes.is_multiple_of(BLOCK_BYTES)
}

/// A segment whose header was checked. It keeps its file open, so that it stays readable after a trim.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) header: SegmentHeader,
    pub(super) key: SegmentKey,
    pub(super) file: File,
}

impl Segment {
    /// Checks the header of a file.
    pub(super) fn open(file: File, number: u64) -> Result<Arc<Self>, JournalError> {
        let damaged = |at, what| JournalError::Damaged { segment: number, at, what };
        let size = file.size()?;
        if size > limits::SEGMENT_BYTES {
            return Err(damaged(size, "it is larger than a segment can be"));
        }
        let mut block = vec![0; size.min(BLOCK_BYTES) as usize];
        file.read_at(&mut block, 0)?;
        let (header, key) = SegmentHeader::decode(&block).map_err(|bad| match bad {
            BadHeader::Version(version) => JournalError::UnknownVersion { segment: number, version },
            BadHeader::What(what) => damaged(0, what),
        })?;
        if size != header.bytes {
            return Err(damaged(size.min(header.bytes), "its size is not what its header says"));
        }
        Ok(Arc::new(Self { header, key, file }))
    }

    pub(super) const fn number(&self) -> u64 {
        self.header.number
    }

    pub(super) fn damaged(&self, at: u64, what: &'static str) -> JournalError {
        JournalError::Damaged { segment: self.number(), at, what }
    }
}

/// The first byte that is not zero in a range of a file.
fn first_nonzero(file: &File, from: u64, to: u64) -> Result<Option<u64>, StorageError> {
    let mut chunk = vec![0; CHUNK_BYTES.min(to.saturating_sub(from) as usize)];
    let zeros = vec![0; chunk.len()];
    let mut at = from;
    while at < to {
        let len = CHUNK_BYTES.min((to - at) as usize);
        let chunk = &mut chunk[..len];
        file.read_at(chunk, at)?;
        // Compared as a whole, which is as fast as memory; nearly always it is all zeros.
        if *chunk != zeros[..len] {
            return Ok(chunk.iter().position(|b| *b != 0).map(|index| at + index as u64));
        }
        at += len as u64;
    }
    Ok(None)
}

/// A verified entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: EntryKind,
    pub(super) number: EntryNumber,
    /// Where its payload starts in the segment.
    pub(super) payload_at: u64,
    pub(super) payload: Bytes,
}

/// What stands at a place in a segment.
#[derive(Debug)]
pub(super) enum Found {
    /// An entry.
    Entry(Entry),
    /// The place of the next entry, and it was never written.
    Nothing,
    /// Something that is not the next entry.
    Junk(&'static str),
}

/// Walks over the entries of a segment.
#[derive(Debug, Clone)]
pub(super) struct Walk {
    pub(super) segment: Arc<Segment>,
    /// Where the next entry is looked for.
    pub(super) at: u64,
    /// The number that it must have.
    pub(super) next: EntryNumber,
}

impl Walk {
    pub(super) fn new(segment: Arc<Segment>) -> Self {
        let next = segment.header.first_entry;
        Self { segment, at: ENTRIES_AT, next }
    }

    /// Verifies the next entry and steps over it; stays where it is if there is none.
    pub(super) fn step(&mut self) -> Result<Found, StorageError> {
        let (file, end) = (&self.segment.file, self.segment.header.bytes);
        let mut start = [0; ENTRY_MAGIC.len()];
        if self.at < end {
            file.read_at(&mut start, self.at)?;
        }
        let batch_at = self.at.next_multiple_of(BLOCK_BYTES);
        if start == [0; 4] && self.at < batch_at {
            // The batch ended here; the next one starts with a block.
            if first_nonzero(file, self.at, batch_at)?.is_some() {
                return Ok(Found::Junk("bytes between two batches"));
            }
            self.at = batch_at;
            return self.step();
        }
        if self.at + ENTRY_HEADER_BYTES as u64 > end {
            return Ok(if start == [0; 4] { Found::Nothing } else { Found::Junk("an entry without room") });
        }
        let mut header = [0; ENTRY_HEADER_BYTES];
        file.read_at(&mut header, self.at)?;
        if header == [0; ENTRY_HEADER_BYTES] {
            return Ok(Found::Nothing);
        }
        let Some(header) = EntryHeader::decode(&header, &self.segment.key) else {
            return Ok(Found::Junk("no entry header"));
        };
        if header.number != self.next || u64::from(header.at) != self.at {
            return Ok(Found::Junk("another entry than the next"));
        }
        let len = header.payload_len as usize;
        let (payload_at, next_at) = (self.at + ENTRY_HEADER_BYTES as u64, self.at + entry_len(len));
        if next_at > end {
            return Ok(Found::Junk("an entry that is longer than its segment"));
        }
        let mut payload = vec![0; len + padding(len)];
        file.read_at(&mut payload, payload_at)?;
        if payload[len..].iter().any(|b| *b != 0) {
            return Ok(Found::Junk("bytes after an entry"));
        }
        payload.truncate(len);
        if !header.matches(&payload, &self.segment.key) {
            return Ok(Found::Junk("the checksum of an entry is wrong"));
        }
        self.at = next_at;
        self.next = header.number.next();
        Ok(Found::Entry(Entry {
            kind: header.kind,
            number: header.number,
            payload_at,
            payload: payload.into(),
        }))
    }

    /// Steps over a record set whose payload is not what was written, if its header is.
    pub(super) fn skip_set(&mut self) -> Result<bool, StorageError> {
        let end = self.segment.header.bytes;
        if self.at + ENTRY_HEADER_BYTES as u64 > end {
            return Ok(false);
        }
        let mut header = [0; ENTRY_HEADER_BYTES];
        self.segment.file.read_at(&mut header, self.at)?;
        let header = EntryHeader::decode(&header, &self.segment.key).filter(|header| {
            let stands = header.number == self.next && u64::from(header.at) == self.at;
            stands && header.kind == EntryKind::Set
        });
        let next = header.map(|header| (self.at + entry_len(header.payload_len as usize), header.number));
        let Some((next_at, number)) = next.filter(|(next_at, _)| *next_at <= end) else { return Ok(false) };
        (self.at, self.next) = (next_at, number.next());
        Ok(true)
    }

    /// Looks at what stands after the end of the log.
    pub(super) fn tail(&self) -> Result<Tail, StorageError> {
        let (file, end) = (&self.segment.file, self.segment.header.bytes);
        let Some(junk_at) = first_nonzero(file, self.at, end)? else { return Ok(Tail::Blank) };
        // Batches start with a block. One that was written when the next entry was durable proves that the log went
        // on; so does the next entry at another place, or any entry at another place than its own: a tear moves nothing.
        let mut at = junk_at / BLOCK_BYTES * BLOCK_BYTES;
        while at < end {
            let mut header = [0; ENTRY_HEADER_BYTES];
            file.read_at(&mut header, at)?;
            let proof = EntryHeader::decode(&header, &self.segment.key).is_some_and(|header| {
                header.synced >= self.next
                    || (header.number == self.next && at != self.at)
                    || u64::from(header.at) != at
            });
            if proof {
                return Ok(Tail::WentOn { at });
            }
            at += BLOCK_BYTES;
        }
        Ok(Tail::Torn { at: junk_at })
    }
}

/// What stands after the last entry that can be verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tail {
    /// Zeros.
    Blank,
    /// Bytes of entries that were being written when a crash came. Nobody was answered for them.
    Torn {
        /// The first of those bytes.
        at: u64,
    },
    /// An entry that proves that the log once went on.
    WentOn {
        /// Where that entry stands.
        at: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_segment_names_are_segments() {
        assert_eq!(segment_name(1), "00000001.seg");
        for number in [1, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(segment_number(&segment_name(number)), Some(number));
        }
        assert!(is_remains(&new_segment_name(7)) && !is_remains("7.new") && !is_remains(&segment_name(7)));
        for other in ["00000000.seg", "1.seg", "+0000001.seg", "000000001.seg", "00000001", "x.seg", ".seg"] {
            assert_eq!(segment_number(other), None, "{other}");
        }
    }
}
