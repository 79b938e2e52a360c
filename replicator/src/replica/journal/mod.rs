//! The replica's journal: the log-structured store of record sets, kept compressed exactly as they travelled.
//!
//! The journal is one log over numbered segment files, `00000001.seg`, `00000002.seg`, …, of one size, whose space is
//! allocated before their first use. Entries are only ever appended; a segment goes as a whole, once everything in it
//! stands in a checkpoint, and its number and file are never used again.
//!
//! All integers are little-endian. Everything not named here is zero.
//!
//! ```text
//! offset  bytes  meaning
//!                SEGMENT HEADER, alone in the first 4096 bytes
//!      0      8  magic "TWINJRN\0"
//!      8      4  version, 1
//!     12      4  zero
//!     16     16  session
//!     32      8  number of the segment
//!     40      8  bytes of the segment
//!     48      8  number of its first entry
//!     56     16  salt: random
//!     72     16  salt of the segment before it; zeros in the first one ever
//!     88      8  number of the last group committed before it; zero if there was none
//!     96     32  BLAKE3 over the 96 bytes before, in every version
//!                BATCHES, each at a multiple of 4096: entries one after the other, each at a multiple of 8
//!      0      4  magic "TWJE"
//!      4      1  kind: 1 record set, 2 commit, 3 standing commit, 4 withdrawal
//!      5      3  zero
//!      8      8  number of the entry: 1, 2, 3, … over all segments
//!     16      8  number of the last entry that was durable when this one was made
//!     24      4  bytes of the payload
//!     28      4  offset of this header in the segment
//!     32     16  checksum of the payload
//!     48     16  checksum of the 48 bytes before
//!     64      …  payload, then zeros to a multiple of 8
//!                PAYLOAD of a record set: its bytes as they travelled
//!                PAYLOAD of a commit, and of a standing commit
//!      0      8  group
//!      8      8  consistency time, ns
//!     16      2  number of volumes
//!                for each volume:
//!      0      1  flags: 1 member, 2 joins with this group
//!      1      1  length n of its name
//!      2      n  name
//!      …      8  volume instance
//!      …     20  root directory
//!      …      8  sequence number of the last update committed
//!                base: a record set up to which all are committed as a whole
//!      …      8  its number; zero for none
//!      …     32  its hash
//!      …      8  sequence number of its last update
//!      …      8  end of its interval, ns
//!                PAYLOAD of a withdrawal: record sets of one volume, before it, that count no longer
//!      0      1  length n of the volume's name
//!      1      n  name
//!      …      8  number of each set, rising
//! ```
//!
//! The checksums of entries are BLAKE3, cut to 16 bytes and keyed by the BLAKE3 of the segment's header (all 128
//! bytes, with the salt), so that no entry passes in another segment.
//!
//! # What a crash leaves
//!
//! * An entry counts when [`Journal::sync`] returned. A batch (what is appended between two syncs) starts with a block
//!   of its own, so no later write touches what is durable.
//! * A segment is made under another name, `….new`, and gets its own once its size, its header and its first entry are
//!   durable; it is used once its name is durable, too; and all that is only done once every entry of the segment before
//!   it is durable. So `….new` files are remains, and a `….seg` file without a whole header is damage.
//! * The log ends before the first entry that is not there or fails a checksum. In the last segment, that is what a
//!   crash leaves of a batch that was never acknowledged, so everything from there on is disregarded, and the next
//!   entry starts a new segment, whose header says with which number: what was torn can never come back.
//! * It is damage, and reported, if something proves that the log once went on beyond its end: a later segment whose
//!   first entry is not the next one, a later batch that was written when the missing entry was durable, or an entry
//!   that stands where it was not written. So rot is not taken for a tear, except in the very last batch, where nothing
//!   on this disk can tell them apart; there the primary, which remembers what was acknowledged, notices.
//! * Each segment starts with the last commit repeated (the *standing* commit), so that it needs none before it.
//! * Segments are removed in order, each durably before the next: a missing one between others is damage.
//!
//! A failed write or sync is final for the journal: see [`crate::storage`]. Opening it again reads what the medium
//! really holds.

mod describe;
mod entry;
mod error;
mod reader;
mod recovery;
mod salvage;
mod segment;
mod withdrawn;

use std::collections::BTreeMap;
use std::sync::Arc;

use twinfs_core::delta::SetLocation;
use twinfs_core::id::{GroupNumber, SessionId};
use twinfs_core::limits;

pub use describe::{DescribeError, describe};
pub use entry::{Commit, CommitBase, CommitVolume};
pub use error::JournalError;
pub use reader::{JournalReader, ReadError};
pub use recovery::{Recovered, Recovery};
pub use segment::{SEGMENT_MAGIC, SEGMENT_VERSION};
pub use withdrawn::Withdrawn;

use crate::failpoint::{self, FailPoint};
use crate::storage::{Operation, Storage, StorageError};
use entry::{EntryHeader, EntryKind, EntryNumber, entry_len, padding, payload_sum};
use reader::Table;
use segment::{
    BLOCK_BYTES, ENTRIES_AT, Segment, SegmentHeader, is_segment_size, new_segment_name, segment_name,
};

/// The part of a segment, as a divisor, that record sets leave to commits: with a full disk, what was received can
/// still be committed, so that a checkpoint can make room.
const COMMIT_RESERVE_DIVISOR: u64 = 256;

/// How a journal uses its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalConfig {
    /// Size of new segments, in bytes: a multiple of 4096, at least two of them, at most
    /// [`limits::SEGMENT_BYTES`]. Only tests have a reason to make it smaller.
    pub segment_bytes: u64,
    /// Bytes that a new segment must leave free on the file system, unless a commit needs it.
    pub floor_bytes: u64,
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self { segment_bytes: limits::SEGMENT_BYTES, floor_bytes: limits::JOURNAL_FLOOR_BYTES_DEFAULT }
    }
}

/// Figures of a journal, since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalStats {
    /// Record sets appended.
    pub sets: u64,
    /// Bytes of those record sets.
    pub set_bytes: u64,
    /// Commits appended.
    pub commits: u64,
    /// Write calls.
    pub writes: u64,
    /// Bytes written by them, headers and padding included.
    pub written_bytes: u64,
    /// Syncs of segment files.
    pub syncs: u64,
    /// Segments made.
    pub segments_made: u64,
    /// Segments removed by trims.
    pub segments_trimmed: u64,
}

/// What a trim removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trimmed {
    /// Segments.
    pub segments: u64,
    /// Their bytes. Disk space is free once no reader keeps the segments open.
    pub bytes: u64,
}

/// The journal, open for appending. It has one owner and no threads; [`reader`](Self::reader) makes the part that can
/// be shared.
#[derive(Debug)]
pub struct Journal {
    storage: Arc<dyn Storage>,
    session: SessionId,
    config: JournalConfig,
    /// All segments, by number. The last one takes the entries.
    segments: BTreeMap<u64, Arc<Segment>>,
    table: Arc<Table>,
    tail: Option<Tail>,
    /// The bytes of the last segment from `tail.written` to `tail.end`.
    buffer: Vec<u8>,
    next: EntryNumber,
    last_commit: Option<Commit>,
    /// The payload of the last commit; empty if there is none.
    standing: Vec<u8>,
    failed: bool,
    stats: JournalStats,
}

/// The end of the log in the last segment.
#[derive(Debug)]
struct Tail {
    segment: Arc<Segment>,
    /// Where the next entry goes.
    end: u64,
    /// Up to where bytes were handed to the file.
    written: u64,
    /// Entries before this one are durable.
    synced_to: EntryNumber,
    /// A torn batch follows: no entry may go here any more.
    sealed: bool,
}

impl Journal {
    /// Opens the journal of a session in the directory `storage`, which holds nothing else; an empty directory is an
    /// empty journal. The second value gives back the entries, all of them durable, in the order in which they were
    /// appended; it may be read while new entries are appended.
    ///
    /// Only the last segment is read here, and the headers of all; the others are verified when the recovery comes to
    /// them.
    ///
    /// # Errors
    /// [`JournalError::Damaged`] and its kin if the journal cannot be trusted, or the storage's failure. Nothing was
    /// changed, but for the remains of segments whose making was cut short.
    pub fn open(
        storage: Arc<dyn Storage>,
        session: SessionId,
        config: JournalConfig,
    ) -> Result<(Self, Recovery), JournalError> {
        if !is_segment_size(config.segment_bytes) {
            return Err(JournalError::SegmentSize { bytes: config.segment_bytes });
        }
        let found = recovery::find(&*storage, session)?;
        let recovery = Recovery::new(found.segments.values().cloned().collect(), found.next, found.torn);
        let tail = found.segments.values().next_back().map(|segment| Tail {
            segment: Arc::clone(segment),
            end: found.end,
            written: found.end,
            synced_to: found.next,
            sealed: found.torn,
        });
        let standing = found.last_commit.as_ref().map_or(Ok(Vec::new()), Commit::encode)?;
        let journal = Self {
            storage,
            session,
            config,
            table: Arc::new(Table::new(found.segments.clone())),
            segments: found.segments,
            tail,
            buffer: Vec::new(),
            next: found.next,
            last_commit: found.last_commit,
            standing,
            failed: false,
            stats: JournalStats::default(),
        };
        Ok((journal, recovery))
    }

    /// Appends a record set, opaque here, and says where it stands. It is durable after the next [`sync`](Self::sync),
    /// and can be read after it.
    ///
    /// # Errors
    /// [`JournalError::Full`] or [`JournalError::TooManySegments`]: nothing was appended, and the call may be repeated
    /// later. [`JournalError::EntrySize`]; or a failure of the storage, which is final.
    pub fn append_set(&mut self, set: &[u8]) -> Result<SetLocation, JournalError> {
        let location = self.append(EntryKind::Set, set)?;
        self.stats.sets += 1;
        self.stats.set_bytes += set.len() as u64;
        Ok(location)
    }

    /// Appends a commit, which must follow the last one. The group may be shown after the next [`sync`](Self::sync).
    /// A commit may go where a record set may not: into the part of a segment kept for it, and below the free-space
    /// floor.
    ///
    /// # Errors
    /// [`JournalError::CommitOrder`] and [`JournalError::BadCommit`] for what cannot follow, else as
    /// [`append_set`](Self::append_set).
    pub fn append_commit(&mut self, commit: &Commit) -> Result<(), JournalError> {
        let payload = commit.encode()?;
        check_order(self.last_commit.as_ref(), commit)?;
        self.append(EntryKind::Commit, &payload)?;
        self.standing = payload;
        self.last_commit = Some(commit.clone());
        self.stats.commits += 1;
        Ok(())
    }

    /// Appends that record sets before it count no longer. Like a commit, it may go where a record set may not.
    ///
    /// # Errors
    /// As [`append_set`](Self::append_set).
    pub fn append_withdrawn(&mut self, withdrawn: &Withdrawn) -> Result<(), JournalError> {
        self.append(EntryKind::Withdrawn, &withdrawn.encode()).map(|_| ())
    }

    /// Makes everything appended so far durable: one write and one fdatasync for the batch, nothing if there is none.
    /// Only after it may anything be acknowledged or shown.
    ///
    /// # Errors
    /// [`JournalError::Full`] if the file system has no room after all; the call may be repeated. Any other failure is
    /// final.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        self.check()?;
        let Some(tail) = &mut self.tail else { return Ok(()) };
        if tail.synced_to == self.next {
            return Ok(());
        }
        // The next batch starts with a block of its own. Segments are whole blocks, so there is room for the zeros;
        // they are written, because a write that failed may have left other bytes there.
        let end = tail.end.next_multiple_of(BLOCK_BYTES);
        self.buffer.resize(self.buffer.len() + (end - tail.end) as usize, 0);
        tail.end = end;
        self.flush(&[])?;
        let tail = self.tail.as_mut().expect("it was there above");
        let synced = tail.segment.file.sync_data();
        tail.synced_to = self.next;
        self.stats.syncs += 1;
        synced.map_err(|error| self.fail(error))
    }

    /// Removes, oldest first, the segments before the one that holds `before`: everything before that place stands in
    /// a checkpoint. Readers that were made before keep what they can see.
    ///
    /// # Errors
    /// The storage's failure; segments removed before it stay removed.
    pub fn trim(&mut self, before: SetLocation) -> Result<Trimmed, JournalError> {
        self.check()?;
        let mut trimmed = Trimmed::default();
        while self.segments.len() > 1
            && let Some(first) = self.segments.first_entry()
            && *first.key() < before.segment
        {
            self.storage.remove(&segment_name(*first.key()))?;
            let segment = first.remove();
            self.table.set(self.segments.clone());
            trimmed.segments += 1;
            trimmed.bytes += segment.header.bytes;
            self.stats.segments_trimmed += 1;
            // Each by itself, so that no crash leaves a gap.
            self.storage.sync_dir().map_err(|error| self.fail(error))?;
        }
        Ok(trimmed)
    }

    /// What reads record sets back. It sees all segments that there are when it is made, even when they were trimmed
    /// since, and those made later, until they are trimmed.
    #[must_use]
    pub fn reader(&self) -> JournalReader {
        JournalReader::new(Arc::clone(&self.table))
    }

    /// The place after the last entry: everything appended so far stands before it.
    #[must_use]
    pub fn end(&self) -> SetLocation {
        self.tail.as_ref().map_or(SetLocation { segment: 1, offset: ENTRIES_AT }, |tail| SetLocation {
            segment: tail.segment.number(),
            offset: tail.end,
        })
    }

    /// The last commit appended, or found when the journal was opened.
    #[must_use]
    pub const fn last_commit(&self) -> Option<&Commit> {
        self.last_commit.as_ref()
    }

    /// Bytes of disk space that the segments take, used or not.
    #[must_use]
    pub fn bytes_used(&self) -> u64 {
        self.segments.values().map(|segment| segment.header.bytes).sum()
    }

    /// Number of segments.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Figures since the journal was opened.
    #[must_use]
    pub const fn stats(&self) -> JournalStats {
        self.stats
    }

    /// Whether an earlier failure was final.
    #[must_use]
    pub const fn is_poisoned(&self) -> bool {
        self.failed
    }

    const fn check(&self) -> Result<(), JournalError> {
        if self.failed { Err(JournalError::Poisoned) } else { Ok(()) }
    }

    /// Takes no more entries: what the medium holds is not known any more.
    fn fail(&mut self, error: StorageError) -> JournalError {
        self.failed = true;
        tracing::error!(%error, "the journal takes no more entries");
        error.into()
    }

    /// A failed write. Without room it may be repeated: the same bytes, or others whose header comes at the same
    /// place, will stand there before the next sync.
    fn write_failed(&mut self, error: StorageError) -> JournalError {
        if error.is_no_space() { self.full() } else { self.fail(error) }
    }

    fn full(&self) -> JournalError {
        JournalError::Full {
            needed: self.config.segment_bytes,
            free: self.storage.free_bytes().unwrap_or(0),
            floor: self.config.floor_bytes,
        }
    }

    fn append(&mut self, kind: EntryKind, payload: &[u8]) -> Result<SetLocation, JournalError> {
        self.check()?;
        let len = entry_len(payload.len());
        let bytes = payload.len();
        let reserve = self.reserve(kind);
        if bytes == 0 || bytes > kind.payload_bytes_max() {
            return Err(JournalError::EntrySize { bytes });
        }
        let fits = |tail: &Tail| !tail.sealed && tail.end + len + reserve <= tail.segment.header.bytes;
        if !self.tail.as_ref().is_some_and(fits) {
            if ENTRIES_AT + self.standing_len() + len + reserve > self.config.segment_bytes {
                return Err(JournalError::EntrySize { bytes });
            }
            self.roll(kind)?;
        }
        let copied = bytes <= limits::JOURNAL_COPY_BYTES_MAX;
        if copied && self.buffer.len() as u64 + len > limits::JOURNAL_BUFFER_BYTES_MAX as u64 {
            // Before the entry is taken, so that a refusal leaves it untaken.
            self.flush(&[])?;
        }
        let tail = self.tail.as_ref().expect("a roll makes a tail");
        let (at, segment) = (tail.end, tail.segment.number());
        let synced = tail.synced_to.previous();
        let header = seal(&tail.segment, kind, self.next, synced, payload, at);
        let pad = &[0; 8][..padding(bytes)];
        if copied {
            for part in [&header, payload, pad] {
                self.buffer.extend_from_slice(part);
            }
        } else {
            self.flush(&[&header, payload, pad])?;
        }
        let tail = self.tail.as_mut().expect("a roll makes a tail");
        tail.end = at + len;
        if !copied {
            tail.written = tail.end;
        }
        self.next = self.next.next();
        Ok(SetLocation { segment, offset: at + entry::ENTRY_HEADER_BYTES as u64 })
    }

    /// What an entry of that kind leaves free in a segment.
    const fn reserve(&self, kind: EntryKind) -> u64 {
        match kind {
            EntryKind::Set => self.config.segment_bytes / COMMIT_RESERVE_DIVISOR,
            EntryKind::Commit | EntryKind::Standing | EntryKind::Withdrawn => 0,
        }
    }

    /// Bytes that the standing commit takes in a new segment, with what brings the next batch to its place.
    const fn standing_len(&self) -> u64 {
        match self.standing.len() {
            0 => 0,
            len => entry_len(len).next_multiple_of(BLOCK_BYTES),
        }
    }

    /// Hands the buffer and what follows it to the file, in one write. If it fails, the buffer stays.
    fn flush(&mut self, more: &[&[u8]]) -> Result<(), JournalError> {
        let tail = self.tail.as_mut().expect("entries come after a segment");
        let mut parts: Vec<&[u8]> = vec![&self.buffer];
        parts.extend_from_slice(more);
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        if bytes == 0 {
            return Ok(());
        }
        if let Err(error) = tail.segment.file.write_at(&parts, tail.written) {
            return Err(self.write_failed(error));
        }
        tail.written += self.buffer.len() as u64;
        self.buffer.clear();
        self.stats.writes += 1;
        self.stats.written_bytes += bytes as u64;
        Ok(())
    }

    /// Starts a new segment, once everything before it is durable.
    fn roll(&mut self, kind: EntryKind) -> Result<(), JournalError> {
        if self.segments.len() >= limits::JOURNAL_SEGMENTS_MAX {
            return Err(JournalError::TooManySegments { max: limits::JOURNAL_SEGMENTS_MAX });
        }
        let needed = self.config.segment_bytes;
        let floor = if kind == EntryKind::Set { self.config.floor_bytes } else { 0 };
        if self.storage.free_bytes()? < needed.saturating_add(floor) {
            return Err(self.full());
        }
        self.sync()?;
        let before = self.tail.as_ref().map(|tail| tail.segment.header);
        let header = SegmentHeader {
            session: self.session,
            number: before.map_or(1, |before| before.number + 1),
            bytes: needed,
            first_entry: self.next,
            salt: self.storage.salt()?,
            predecessor_salt: before.map_or([0; 16], |before| before.salt),
            last_group: self.last_commit.as_ref().map_or(GroupNumber(0), |commit| commit.group),
        };
        let file = match self.storage.create(&new_segment_name(header.number)) {
            Ok(file) => file,
            Err(error) if error.is_no_space() => return Err(self.full()),
            Err(error) => return Err(self.fail(error)),
        };
        let (mut start, key) = header.encode();
        let segment = Arc::new(Segment { header, key, file });
        if !self.standing.is_empty() {
            let synced = self.next.previous();
            let header = seal(&segment, EntryKind::Standing, self.next, synced, &self.standing, ENTRIES_AT);
            start.extend_from_slice(&header);
            start.extend_from_slice(&self.standing);
            start.resize(start.len().next_multiple_of(BLOCK_BYTES as usize), 0);
            self.next = self.next.next();
        }
        if let Err(error) = self.prepare(&segment, &start) {
            self.next = header.first_entry;
            return Err(self.give_up_segment(header.number, error));
        }
        failpoint::pass(FailPoint::SegmentNamed);
        self.stats.segments_made += 1;
        self.segments.insert(header.number, Arc::clone(&segment));
        self.table.set(self.segments.clone());
        let end = start.len() as u64;
        self.tail = Some(Tail { segment, end, written: end, synced_to: self.next, sealed: false });
        Ok(())
    }

    /// Brings a new segment to the medium, whole, before it gets its name.
    fn prepare(&mut self, segment: &Segment, start: &[u8]) -> Result<(), StorageError> {
        segment.file.allocate(segment.header.bytes)?;
        segment.file.write_at(&[start], 0)?;
        segment.file.sync_data()?;
        self.stats.writes += 1;
        self.stats.written_bytes += start.len() as u64;
        self.stats.syncs += 1;
        let number = segment.number();
        failpoint::pass(FailPoint::SegmentWritten);
        self.storage.rename(&new_segment_name(number), &segment_name(number))?;
        self.storage.sync_dir()
    }

    /// Removes a segment that could not be made. Without room the journal goes on in the one before it: a new segment
    /// that did not get its name disturbs nobody, even if a crash brings it back.
    fn give_up_segment(&mut self, number: u64, error: StorageError) -> JournalError {
        let is_sync = |operation| matches!(operation, Operation::SyncData | Operation::SyncDir);
        match error {
            StorageError::NoSpace { operation, .. } if !is_sync(operation) => (),
            error => return self.fail(error),
        }
        match self.storage.remove(&new_segment_name(number)) {
            Ok(()) => self.full(),
            Err(error) => self.fail(error),
        }
    }
}

/// Makes the header of an entry.
fn seal(
    segment: &Segment,
    kind: EntryKind,
    number: EntryNumber,
    synced: EntryNumber,
    payload: &[u8],
    at: u64,
) -> [u8; entry::ENTRY_HEADER_BYTES] {
    let header = EntryHeader {
        kind,
        number,
        synced,
        payload_len: u32::try_from(payload.len()).expect("payloads are bounded far below 4 GiB"),
        at: u32::try_from(at).expect("a segment is far below 4 GiB"),
        payload_sum: payload_sum(payload, &segment.key),
    };
    header.encode(&segment.key)
}

/// Checks that a commit follows another.
fn check_order(last: Option<&Commit>, commit: &Commit) -> Result<(), JournalError> {
    match last {
        Some(last) if commit.group != last.group.next() || commit.time < last.time => {
            Err(JournalError::CommitOrder { last: last.group, group: commit.group })
        }
        _ => Ok(()),
    }
}
