//! Reading record sets back from the journal.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use twinfs_core::delta::{DataRef, SetLocation};
use twinfs_core::format::v1::{Frame, FrameIndex, SetPrefix, Unpacker};
use twinfs_core::format::{BadSet, UnverifiedSet};
use twinfs_core::limits;

use super::segment::Segment;
use crate::storage::StorageError;

/// Bytes read at the start of a set: its header, and the frame table of all but the largest sets.
const START_BYTES: usize = 4096;
/// Decompressors kept for the next reads.
const UNPACKERS_MAX: usize = 4;

const _: () = assert!(START_BYTES >= limits::SET_HEADER_BYTES_MAX);

/// Why a record set, or a part of one, cannot be read back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The segment was trimmed before the reader was made, or never was.
    #[error("journal segment {segment} is not there")]
    NoSegment {
        /// The segment.
        segment: u64,
    },
    /// What stands there is not the record set that was appended: it rotted, or the place was never that of a set.
    #[error("the record set at byte {} of journal segment {}: {bad}", at.offset, at.segment)]
    Set {
        /// The place.
        at: SetLocation,
        /// What is wrong with it.
        #[source]
        bad: BadSet,
    },
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl From<ReadError> for io::Error {
    /// Damage is `InvalidData`, a segment that is not there `NotFound`; for the rest, what the system said.
    fn from(error: ReadError) -> Self {
        let kind = match &error {
            ReadError::NoSegment { .. } => io::ErrorKind::NotFound,
            ReadError::Set { .. } => io::ErrorKind::InvalidData,
            ReadError::Storage(StorageError::Io { errno, .. }) => return (*errno).into(),
            ReadError::Storage(StorageError::EndsEarly { .. }) => io::ErrorKind::InvalidData,
            ReadError::Storage(_) => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

type Segments = Arc<BTreeMap<u64, Arc<Segment>>>;

/// What all readers of a journal share. No lock is held over I/O, and never two of them.
#[derive(Debug)]
pub(super) struct Table {
    current: RwLock<Segments>,
    indexes: Mutex<Cache<SetLocation, Arc<FrameIndex>>>,
    frames: Mutex<Cache<(SetLocation, usize), Bytes>>,
    unpackers: Mutex<Vec<Unpacker>>,
}

impl Table {
    pub(super) fn new(segments: BTreeMap<u64, Arc<Segment>>) -> Self {
        Self {
            current: RwLock::new(Arc::new(segments)),
            indexes: Mutex::new(Cache::new(limits::JOURNAL_INDEX_CACHE_SETS)),
            frames: Mutex::new(Cache::new(limits::JOURNAL_FRAME_CACHE_BYTES)),
            unpackers: Mutex::new(Vec::new()),
        }
    }

    pub(super) fn set(&self, segments: BTreeMap<u64, Arc<Segment>>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(segments);
    }

    fn current(&self) -> Segments {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A panic of another thread leaves a cache as it was between two calls, which is good enough.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads record sets back, from any thread. What it returns was verified against the hashes in the set, so it is what
/// the primary sent.
#[derive(Debug, Clone)]
pub struct JournalReader {
    /// The segments when the reader was made: their files stay open, whatever is trimmed.
    kept: Segments,
    table: Arc<Table>,
}

impl JournalReader {
    pub(super) fn new(table: Arc<Table>) -> Self {
        Self { kept: table.current(), table }
    }

    /// Fills `buf` from the (uncompressed) data section of a record set. Reads the set's header and frame table and the
    /// frames that hold the range, as far as they are not cached.
    ///
    /// # Errors
    /// [`ReadError`]; what `buf` holds then is undefined.
    pub fn read(&self, at: DataRef, buf: &mut [u8]) -> Result<(), ReadError> {
        let bad = |bad| ReadError::Set { at: at.set, bad };
        let index = self.index(at.set)?;
        let len = u32::try_from(buf.len()).map_err(|_| bad(BadSet::DataRange))?;
        let frames = index.data_frames_of(at.offset, len).map_err(bad)?;
        let (mut rest, mut from) = (buf, at.offset);
        for frame in frames {
            let raw = self.frame(at.set, frame)?;
            let raw = &raw[(from - frame.raw_at) as usize..];
            let (head, tail) = rest.split_at_mut(raw.len().min(rest.len()));
            head.copy_from_slice(&raw[..head.len()]);
            from += u32::try_from(head.len()).expect("a frame is short");
            rest = tail;
        }
        Ok(())
    }

    /// Reads a whole record set, as it travelled, every frame verified.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_set(&self, at: SetLocation) -> Result<Bytes, ReadError> {
        let segment = self.segment(at.segment)?;
        let mut start = start_of_set(&segment, at)?;
        let prefix = SetPrefix::parse(&start).map_err(|bad| ReadError::Set { at, bad })?;
        let have = start.len().min(prefix.encoded_len());
        start.resize(prefix.encoded_len(), 0);
        segment.file.read_at(&mut start[have..], at.offset + have as u64)?;
        let set = UnverifiedSet(start.into()).verify().map_err(|bad| ReadError::Set { at, bad })?;
        Ok(set.bytes().clone())
    }

    fn segment(&self, number: u64) -> Result<Arc<Segment>, ReadError> {
        let kept = self.kept.get(&number).cloned();
        let found = kept.or_else(|| self.table.current().get(&number).cloned());
        found.ok_or(ReadError::NoSegment { segment: number })
    }

    fn index(&self, at: SetLocation) -> Result<Arc<FrameIndex>, ReadError> {
        if let Some(index) = lock(&self.table.indexes).get(&at) {
            return Ok(index);
        }
        let bad = |bad| ReadError::Set { at, bad };
        let segment = self.segment(at.segment)?;
        let mut start = start_of_set(&segment, at)?;
        let prefix = SetPrefix::parse(&start).map_err(bad)?;
        let table = prefix.table_range();
        if start.len() < table.end {
            let have = start.len();
            start.resize(table.end, 0);
            segment.file.read_at(&mut start[have..], at.offset + have as u64)?;
        }
        let index = Arc::new(FrameIndex::parse(&prefix, &start[table]).map_err(bad)?);
        lock(&self.table.indexes).insert(at, Arc::clone(&index), 1);
        Ok(index)
    }

    fn frame(&self, at: SetLocation, frame: &Frame) -> Result<Bytes, ReadError> {
        let key = (at, frame.number);
        if let Some(raw) = lock(&self.table.frames).get(&key) {
            return Ok(raw);
        }
        let segment = self.segment(at.segment)?;
        let mut stored = vec![0; frame.stored_len as usize];
        segment.file.read_at(&mut stored, at.offset + u64::from(frame.stored_at))?;
        let mut unpacker = lock(&self.table.unpackers).pop().unwrap_or_default();
        let mut raw = Vec::with_capacity(frame.raw_len as usize);
        let unpacked = unpacker.unpack(frame, &stored, &mut raw);
        let mut unpackers = lock(&self.table.unpackers);
        if unpackers.len() < UNPACKERS_MAX {
            unpackers.push(unpacker);
        }
        drop(unpackers);
        unpacked.map_err(|bad| ReadError::Set { at, bad })?;
        let raw = Bytes::from(raw);
        lock(&self.table.frames).insert(key, raw.clone(), raw.len());
        Ok(raw)
    }
}

/// The first bytes of a set, as many as there are before the end of its segment.
fn start_of_set(segment: &Segment, at: SetLocation) -> Result<Vec<u8>, ReadError> {
    let len = segment.header.bytes.saturating_sub(at.offset).min(START_BYTES as u64) as usize;
    let mut start = vec![0; len];
    segment.file.read_at(&mut start, at.offset)?;
    Ok(start)
}

/// Keeps what was used last, up to a total cost.
#[derive(Debug)]
struct Cache<K, V> {
    /// The value, its cost, and when it was used last.
    entries: HashMap<K, (V, usize, u64)>,
    by_use: BTreeMap<u64, K>,
    cost: usize,
    cost_max: usize,
    uses: u64,
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    fn new(cost_max: usize) -> Self {
        Self { entries: HashMap::new(), by_use: BTreeMap::new(), cost: 0, cost_max, uses: 0 }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        let (value, _, used) = self.entries.get_mut(key)?;
        self.uses += 1;
        self.by_use.remove(used);
        self.by_use.insert(self.uses, *key);
        *used = self.uses;
        Some(value.clone())
    }

    fn insert(&mut self, key: K, value: V, cost: usize) {
        self.uses += 1;
        self.cost += cost;
        self.by_use.insert(self.uses, key);
        if let Some((_, old_cost, used)) = self.entries.insert(key, (value, cost, self.uses)) {
            self.cost -= old_cost;
            self.by_use.remove(&used);
        }
        while self.cost > self.cost_max
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            if let Some((_, cost, _)) = self.entries.remove(&oldest) {
                self.cost -= cost;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_keeps_what_was_used_last() {
        let mut cache = Cache::new(10);
        for key in 0..5 {
            cache.insert(key, key * 10, 2);
        }
        assert_eq!(cache.get(&0), Some(0));
        cache.insert(5, 50, 3);
        let kept: Vec<u32> = (0..6).filter(|key| cache.get(key).is_some()).collect();
        assert_eq!(kept, [0, 3, 4, 5]);
        cache.insert(5, 51, 1);
        assert_eq!((cache.get(&5), cache.cost), (Some(51), 7));
        cache.insert(6, 60, 11);
        assert_eq!((cache.entries.len(), cache.by_use.len(), cache.cost), (0, 0, 0), "too large to keep");
    }
}
