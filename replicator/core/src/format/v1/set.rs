//! Reads record sets: bytes from a peer or a disk become a set that can be relied on, or an error.

use std::collections::HashSet;

use bytes::Bytes;

use super::builder::is_path_hint;
use super::frames::{FrameIndex, Unpacker};
use super::header::SetPrefix;
use super::{Cursor, FILE_ENTRY_BYTES};
use crate::format::BadSet;
use crate::id::{FileId, SetHash};
use crate::record_set::{PathHint, SetHeader, SetMeta};
use crate::stamp::Seq;
use crate::update;

/// Bytes that somebody says are a record set.
#[derive(Debug, Clone)]
pub struct UnverifiedSet(pub Bytes);

impl UnverifiedSet {
    /// Checks everything that can be checked without decompressing: the header, its relations to itself and to the
    /// limits, the frame table, and the hash of every frame.
    ///
    /// # Errors
    /// [`BadSet`]; nothing was used, and nothing beyond the size of a frame table was allocated.
    pub fn verify(self) -> Result<VerifiedSet, BadSet> {
        let bytes = self.0;
        let prefix = SetPrefix::parse(&bytes)?;
        if bytes.len() != prefix.encoded_len() {
            return Err(BadSet::Length { have: bytes.len(), want: prefix.encoded_len() });
        }
        let index = FrameIndex::parse(&prefix, &bytes[prefix.table_range()])?;
        for frame in index.frames() {
            frame.verify(&bytes[frame.stored_range()])?;
        }
        Ok(VerifiedSet { hash: prefix.hash(), header: prefix.into_header(), index, bytes })
    }
}

/// A record set whose bytes are whole, just as its maker made them.
///
/// Its metadata may still be nonsense, if its maker was wrong or hostile: who takes a set must call [`Self::meta`]
/// before keeping it.
#[derive(Debug, Clone)]
pub struct VerifiedSet {
    bytes: Bytes,
    hash: SetHash,
    header: SetHeader,
    index: FrameIndex,
}

impl VerifiedSet {
    /// What the set says about itself.
    #[must_use]
    pub const fn header(&self) -> &SetHeader {
        &self.header
    }

    /// The hash of the set.
    #[must_use]
    pub const fn hash(&self) -> SetHash {
        self.hash
    }

    /// The set as it travelled.
    #[must_use]
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Where its frames stand.
    #[must_use]
    pub const fn frames(&self) -> &FrameIndex {
        &self.index
    }

    /// Decompresses and parses the metadata, and checks it in itself and against the header. Memory is bounded by
    /// [`crate::limits::SET_META_BYTES_MAX`] and [`crate::limits::SET_UPDATES_MAX`], whatever the frames pretend to hold.
    ///
    /// # Errors
    /// [`BadSet`]: the maker of the set was wrong or hostile.
    pub fn meta(&self) -> Result<SetMeta, BadSet> {
        self.meta_with(&mut Unpacker::new())
    }

    /// As [`Self::meta`], for those who read many sets.
    ///
    /// # Errors
    /// As [`Self::meta`].
    pub fn meta_with(&self, unpacker: &mut Unpacker) -> Result<SetMeta, BadSet> {
        if self.header.is_null() {
            return Ok(SetMeta { files: Vec::new(), updates: Vec::new() });
        }
        let mut section = Vec::new();
        for frame in self.index.meta_frames() {
            unpacker.unpack_verified(frame, &self.bytes[frame.stored_range()], &mut section)?;
        }
        let mut rest = Cursor(&section);
        let (files, known) = parse_files(&mut rest)?;
        let updates = self.parse_updates(rest.0, section.len() - rest.0.len(), &known)?;
        Ok(SetMeta { files, updates })
    }

    /// Decompresses a range of the data section.
    ///
    /// # Errors
    /// [`BadSet::DataRange`] if there is no such range, [`BadSet::Frame`] if a frame is not what it should be.
    pub fn data(&self, offset: u32, len: u32) -> Result<Vec<u8>, BadSet> {
        let frames = self.index.data_frames_of(offset, len)?;
        let (mut unpacker, mut raw) = (Unpacker::new(), Vec::new());
        for frame in frames {
            unpacker.unpack_verified(frame, &self.bytes[frame.stored_range()], &mut raw)?;
        }
        let skip = frames.first().map_or(0, |frame| offset - frame.raw_at) as usize;
        raw.truncate(skip + len as usize);
        raw.drain(..skip);
        Ok(raw)
    }

    fn parse_updates(
        &self,
        mut bytes: &[u8],
        mut at: usize,
        known: &HashSet<FileId>,
    ) -> Result<Vec<(update::Update, u32)>, BadSet> {
        let header = &self.header;
        let (mut data_at, mut last_time) = (0, header.start);
        let mut updates = Vec::with_capacity(header.updates as usize);
        for index in 0..u64::from(header.updates) {
            let due = Seq(header.first_seq.0 + index);
            let misplaced = |what| BadSet::Misplaced { seq: due, what };
            let (update, len) = update::decode(bytes, at)?;
            (bytes, at) = (&bytes[len..], at + len);
            if update.stamp.seq != due {
                return Err(misplaced("another sequence number"));
            }
            if update.stamp.time <= last_time || update.stamp.time > header.end {
                return Err(misplaced("its time is out of order or out of the interval"));
            }
            if !update.files().all(|file| known.contains(&file)) {
                return Err(misplaced("a file that is not in the file table"));
            }
            // The section is far smaller than 4 GiB, and one write too, so the sum cannot overflow before it is refused.
            let data_end = data_at + update.op.data_len();
            if data_end > header.data_len {
                return Err(misplaced("its data is missing"));
            }
            last_time = update.stamp.time;
            updates.push((update, data_at));
            data_at = data_end;
        }
        let what = match (bytes.is_empty(), data_at == header.data_len) {
            (true, true) => return Ok(updates),
            (false, _) => "bytes after the last update",
            (true, false) => "data after that of the last update",
        };
        Err(BadSet::Misplaced { seq: header.last_seq(), what })
    }
}

/// Reads the file table and moves `rest` behind it.
fn parse_files(rest: &mut Cursor<'_>) -> Result<(Vec<PathHint>, HashSet<FileId>), BadSet> {
    let bad = BadSet::FileTable;
    let count = rest.u32().ok_or(bad("it ends too early"))? as usize;
    if count > rest.0.len() / FILE_ENTRY_BYTES {
        return Err(bad("more files than it has room for"));
    }
    let (mut files, mut known) = (Vec::with_capacity(count), HashSet::with_capacity(count));
    for _ in 0..count {
        let (Some(file), Some(len)) = (rest.array(), rest.u16()) else {
            return Err(bad("it ends too early"));
        };
        let file = FileId::from_bytes(&file).ok_or(bad("a file of no volume instance"))?;
        let path = rest.slice(usize::from(len)).ok_or(bad("it ends too early"))?;
        if !is_path_hint(path) {
            return Err(bad("a path hint that is not one of plain names"));
        }
        if !known.insert(file) {
            return Err(bad("a file twice"));
        }
        files.push(PathHint { file, path: path.into() });
    }
    Ok((files, known))
}
