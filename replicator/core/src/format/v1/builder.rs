//! Makes record sets.

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;

use super::frames::Packer;
use super::{FILE_COUNT_BYTES, FILE_ENTRY_BYTES, header};
use crate::format::{BadSet, BuildError};
use crate::id::{Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, VolumeInstance, VolumeName};
use crate::limits;
use crate::record_set::SetHeader;
use crate::stamp::{Seq, Stamp, Timestamp};
use crate::update::{self, Update, is_file_name};

/// What the maker of a set knows and its contents do not tell. The fields are those of [`SetHeader`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of SetHeader say it")]
pub struct SetPlace {
    pub session: SessionId,
    pub volume: VolumeName,
    pub instance: VolumeInstance,
    pub root: FileId,
    pub epoch: Epoch,
    pub incarnation: Incarnation,
    pub number: SetNumber,
    pub predecessor: SetHash,
    pub first_seq: Seq,
    pub start: Timestamp,
    pub end: Timestamp,
}

/// A record set as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedSet {
    /// Its bytes.
    pub bytes: Bytes,
    /// The hash by which the next set of the volume names it.
    pub hash: SetHash,
    /// What it says about itself.
    pub header: SetHeader,
}

/// Collects updates, their data and the files that they mention, and makes a record set of them.
///
/// A builder is meant to be used again: it keeps its buffers and zstd's working memory, so that adding an update
/// allocates nothing once they have grown. Together they are bounded by the limits of a set.
///
/// For each set: [`push`](Self::push) until [`is_full`](Self::is_full) or the interval ends, then
/// [`add_path`](Self::add_path) for the [`files`](Self::files), then [`finish`](Self::finish). A set with no updates
/// becomes a null set.
pub struct Builder {
    updates: Vec<u8>,
    count: u32,
    first: Stamp,
    last: Stamp,
    data: Vec<u8>,
    files: FileTable,
    packer: Packer,
    meta: Vec<u8>,
    table: Vec<u8>,
    frames: Vec<u8>,
}

impl Builder {
    /// An empty builder.
    #[must_use]
    pub fn new() -> Self {
        Self {
            updates: Vec::new(),
            count: 0,
            first: Stamp::default(),
            last: Stamp::default(),
            data: Vec::new(),
            files: FileTable::default(),
            packer: Packer::new(),
            meta: Vec::new(),
            table: Vec::new(),
            frames: Vec::new(),
        }
    }

    /// Adds an update as [`update::encode`] made it, stamped. Of a write, `fill` is called to append the data to the
    /// buffer that it is given, straight from where the data stands; of anything else it is not called.
    ///
    /// # Errors
    /// [`BuildError`] if there is no room, or the update is none, is not the next one, or its data has not the length
    /// that it says. Then nothing was added.
    pub fn push(&mut self, encoded: &[u8], fill: impl FnOnce(&mut Vec<u8>)) -> Result<(), BuildError> {
        let (update, len) = update::decode_borrowed(encoded, self.updates.len())?;
        if len != encoded.len() {
            return Err(update::BadUpdate { at: len, what: "bytes left over" }.into());
        }
        self.check_order(update.stamp)?;
        let data_len = update.op.data_len() as usize;
        let entries_max = (limits::UPDATE_ATTRS_MAX + update.op.files().len()) * FILE_ENTRY_BYTES;
        if self.count as usize == limits::SET_UPDATES_MAX
            || self.meta_len() + entries_max + len > limits::SET_META_BYTES_MAX
            || self.data.len() + data_len > limits::SET_DATA_BYTES_MAX
        {
            return Err(BuildError::Full);
        }
        if data_len > 0 {
            let before = self.data.len();
            fill(&mut self.data);
            let have = self.data.len().saturating_sub(before);
            if have != data_len {
                self.data.truncate(before);
                return Err(BuildError::Data { have, want: data_len });
            }
        }
        update.files().for_each(|file| self.files.mention(file));
        self.updates.extend_from_slice(encoded);
        if self.count == 0 {
            self.first = update.stamp;
        }
        self.last = update.stamp;
        self.count += 1;
        Ok(())
    }

    /// Adds an update that is not encoded yet, with its data (empty unless it is a write).
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_update<B: AsRef<[u8]>>(&mut self, update: &Update<B>, data: &[u8]) -> Result<(), BuildError> {
        let want = update.op.data_len() as usize;
        if data.len() != want {
            return Err(BuildError::Data { have: data.len(), want });
        }
        let mut encoded = std::mem::take(&mut self.meta);
        encoded.clear();
        update::encode(update, &mut encoded);
        let result = self.push(&encoded, |buffer| buffer.extend_from_slice(data));
        self.meta = encoded;
        result
    }

    /// The files that the updates mention so far, each once, in the order of their first mention.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.files.entries.iter().map(|entry| entry.file)
    }

    /// Says where a mentioned file stands below the volume's root; the first path given for a file stays. A path that
    /// is too long is cut at the front. Returns whether it was taken: not if the file is not mentioned, the path is not
    /// one of plain names joined by `/`, or the set has no room for it; the file's hint then stays empty.
    pub fn add_path(&mut self, file: FileId, path: &[u8]) -> bool {
        let path = cut_path(path);
        self.meta_len() + path.len() <= limits::SET_META_BYTES_MAX
            && is_path_hint(path)
            && self.files.set_path(file, path)
    }

    /// Number of updates so far.
    #[must_use]
    pub const fn updates(&self) -> u32 {
        self.count
    }

    /// Whether there are no updates.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Raw bytes of the set so far: tables, updates and data.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        if self.is_empty() { 0 } else { self.meta_len() + self.data.len() }
    }

    /// Whether the set is to be finished before anything else is added. While it is not, [`push`](Self::push) has room
    /// for any update.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.raw_len() >= limits::SET_RAW_BYTES_TARGET || self.count as usize == limits::SET_UPDATES_MAX
    }

    /// Makes the set, and empties the builder for the next one. zstd compresses at `level`; 0 stores all as it is.
    ///
    /// # Errors
    /// [`BuildError::Place`] if `place` contradicts the updates or itself; the builder is then as it was.
    pub fn finish(&mut self, place: SetPlace, level: i32) -> Result<EncodedSet, BuildError> {
        if !self.is_empty()
            && (self.first.seq != place.first_seq
                || self.first.time <= place.start
                || self.last.time > place.end)
        {
            return Err(BuildError::Place(BadSet::Header("its updates are of another place or interval")));
        }
        self.pack(level);
        let header = self.header(place);
        let body_hash = *blake3::hash(&self.table).as_bytes();
        let body_len = self.table.len() + self.frames.len();
        let mut bytes = Vec::with_capacity(header::FIXED_BYTES + limits::LABEL_BYTES_MAX + body_len);
        let hash = header::encode(&header, body_len, body_hash, &mut bytes).map_err(BuildError::Place)?;
        bytes.extend_from_slice(&self.table);
        bytes.extend_from_slice(&self.frames);
        self.clear();
        Ok(EncodedSet { bytes: bytes.into(), hash, header })
    }

    /// Forgets the updates so far.
    pub fn clear(&mut self) {
        self.updates.clear();
        self.count = 0;
        self.data.clear();
        self.files.clear();
    }

    fn check_order(&self, stamp: Stamp) -> Result<(), BuildError> {
        let dense = self.last.seq.0.checked_add(1) == Some(stamp.seq.0);
        if self.count == 0 || (dense && stamp.time > self.last.time) {
            Ok(())
        } else {
            Err(BuildError::Order(stamp.seq))
        }
    }

    fn meta_len(&self) -> usize {
        FILE_COUNT_BYTES + self.files.encoded_len() + self.updates.len()
    }

    /// Puts the metadata section together and turns both sections into frames and a frame table.
    fn pack(&mut self, level: i32) {
        self.meta.clear();
        self.table.clear();
        self.frames.clear();
        if self.is_empty() {
            return;
        }
        self.files.encode(&mut self.meta);
        self.meta.extend_from_slice(&self.updates);
        self.packer.pack(&self.meta, level, &mut self.table, &mut self.frames);
        self.packer.pack(&self.data, level, &mut self.table, &mut self.frames);
    }

    fn header(&self, place: SetPlace) -> SetHeader {
        let section_len = |len| u32::try_from(len).expect("sections are bounded by the limits of a set");
        SetHeader {
            session: place.session,
            volume: place.volume,
            instance: place.instance,
            root: place.root,
            epoch: place.epoch,
            incarnation: place.incarnation,
            number: place.number,
            predecessor: place.predecessor,
            first_seq: place.first_seq,
            updates: self.count,
            start: place.start,
            end: place.end,
            meta_len: section_len(self.meta.len()),
            data_len: section_len(self.data.len()),
        }
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("updates", &self.count)
            .field("raw_len", &self.raw_len())
            .finish_non_exhaustive()
    }
}

/// The mentioned files in the order of their first mention, with their paths in one buffer.
#[derive(Default)]
struct FileTable {
    entries: Vec<FileEntry>,
    places: HashMap<FileId, usize>,
    paths: Vec<u8>,
}

struct FileEntry {
    file: FileId,
    path: Range<usize>,
}

impl FileTable {
    fn mention(&mut self, file: FileId) {
        // Runs of updates of one file are common, and cheap this way.
        if self.entries.last().is_some_and(|last| last.file == file) {
            return;
        }
        let place = self.entries.len();
        if *self.places.entry(file).or_insert(place) == place {
            self.entries.push(FileEntry { file, path: 0..0 });
        }
    }

    fn set_path(&mut self, file: FileId, path: &[u8]) -> bool {
        let Some(place) = self.places.get(&file) else { return false };
        let entry = &mut self.entries[*place];
        if !entry.path.is_empty() {
            return false;
        }
        let start = self.paths.len();
        self.paths.extend_from_slice(path);
        entry.path = start..self.paths.len();
        true
    }

    fn encoded_len(&self) -> usize {
        self.entries.len() * FILE_ENTRY_BYTES + self.paths.len()
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let count = u32::try_from(self.entries.len()).expect("bounded by the metadata of a set");
        out.extend_from_slice(&count.to_le_bytes());
        for entry in &self.entries {
            let len = u16::try_from(entry.path.len()).expect("hints are at most PATH_HINT_BYTES_MAX long");
            out.extend_from_slice(&entry.file.to_bytes());
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(&self.paths[entry.path.clone()]);
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.places.clear();
        self.paths.clear();
    }
}

/// Cuts a path to the length of a hint: whole components from its end.
fn cut_path(path: &[u8]) -> &[u8] {
    let Some(cut) = path.len().checked_sub(limits::PATH_HINT_BYTES_MAX).filter(|cut| *cut > 0) else {
        return path;
    };
    // The component in which the cut falls goes as a whole; none of it is left if the cut falls on its end.
    match path[cut - 1..].iter().position(|b| *b == b'/') {
        Some(slash) => &path[cut + slash..],
        None => &[],
    }
}

/// Whether a path hint is empty or plain names joined by `/`. Nobody follows it; but it is shown to people, who may.
pub(super) fn is_path_hint(path: &[u8]) -> bool {
    path.is_empty()
        || (path.len() <= limits::PATH_HINT_BYTES_MAX && path.split(|b| *b == b'/').all(is_file_name))
}
