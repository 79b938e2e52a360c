//! Finding the end of the log, and giving its entries back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use twinfs_core::delta::SetLocation;
use twinfs_core::id::{GroupNumber, SessionId};
use twinfs_core::limits;

use super::Withdrawn;
use super::entry::{Commit, EntryKind, EntryNumber};
use super::segment::{
    ENTRIES_AT, Entry, Found, Segment, Tail, Walk, is_remains, segment_name, segment_number,
};
use super::{JournalError, check_order};
use crate::storage::Storage;

/// What a directory holds.
#[derive(Debug)]
pub(super) struct FoundLog {
    /// All segments, without a gap.
    pub(super) segments: BTreeMap<u64, Arc<Segment>>,
    /// The end of the log in the last one.
    pub(super) end: u64,
    /// The number that the next entry gets.
    pub(super) next: EntryNumber,
    /// Whether a torn batch follows.
    pub(super) torn: bool,
    pub(super) last_commit: Option<Commit>,
}

/// Opens all segments, checks that they belong together, and verifies the last one.
pub(super) fn find(storage: &dyn Storage, session: SessionId) -> Result<FoundLog, JournalError> {
    let names = storage.list()?;
    for name in names.iter().filter(|name| is_remains(name)) {
        storage.remove(name)?;
    }
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    numbers.sort_unstable();
    if numbers.len() > limits::JOURNAL_SEGMENTS_MAX {
        return Err(JournalError::TooManySegments { max: limits::JOURNAL_SEGMENTS_MAX });
    }
    let mut segments: BTreeMap<u64, Arc<Segment>> = BTreeMap::new();
    let last = numbers.last().copied();
    for number in numbers {
        let before = segments.values().next_back();
        if before.is_some_and(|before| before.number() + 1 != number) {
            return Err(JournalError::Missing { segment: number - 1 });
        }
        let file = storage.open(&segment_name(number))?;
        if Some(number) == last {
            // Whoever wrote it may have died before its last sync, or after one that failed.
            file.settle()?;
        }
        let segment = Segment::open(file, number)?;
        check_place(&segment, number, session, before)?;
        segments.insert(number, segment);
    }
    // The names, too, may be those of a process that died before its sync.
    storage.sync_dir()?;
    find_end(segments)
}

/// Checks that a segment stands where it should.
pub(super) fn check_place(
    segment: &Segment,
    number: u64,
    session: SessionId,
    before: Option<&Arc<Segment>>,
) -> Result<(), JournalError> {
    let header = &segment.header;
    if header.session != session {
        return Err(JournalError::ForeignSession {
            segment: number,
            found: header.session,
            expected: session,
        });
    }
    let follows = |before: &Arc<Segment>| {
        header.predecessor_salt == before.header.salt && header.first_entry >= before.header.first_entry
    };
    if header.number != number {
        return Err(segment.damaged(0, "its header has another number"));
    }
    if before.is_some_and(|before| !follows(before)) {
        return Err(segment.damaged(0, "it does not follow the segment before it"));
    }
    Ok(())
}

fn find_end(segments: BTreeMap<u64, Arc<Segment>>) -> Result<FoundLog, JournalError> {
    let Some(last) = segments.values().next_back() else {
        return Ok(FoundLog { segments, end: 0, next: EntryNumber::FIRST, torn: false, last_commit: None });
    };
    let mut walk = Walk::new(Arc::clone(last));
    let mut last_commit = None;
    while let Found::Entry(entry) = walk.step()? {
        last_commit = commit_of(&walk.segment, &entry)?.or(last_commit);
    }
    if last_commit.is_none() && last.header.last_group != GroupNumber(0) {
        return Err(last.damaged(ENTRIES_AT, "the commit that it starts with is not there"));
    }
    let torn = match walk.tail()? {
        Tail::Blank => false,
        Tail::Torn { .. } => true,
        Tail::WentOn { .. } => {
            return Err(last.damaged(walk.at, "an entry that was durable is no longer there"));
        }
    };
    let (end, next) = (walk.at, walk.next);
    Ok(FoundLog { segments, end, next, torn, last_commit })
}

/// The commit in an entry, if it is one.
fn commit_of(segment: &Segment, entry: &Entry) -> Result<Option<Commit>, JournalError> {
    match entry.kind {
        EntryKind::Set | EntryKind::Withdrawn => Ok(None),
        EntryKind::Commit | EntryKind::Standing => {
            Commit::decode(&entry.payload).map(Some).map_err(|what| segment.damaged(entry.payload_at, what))
        }
    }
}

/// An entry given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovered {
    /// Only ever the first: the last commit among the entries that were trimmed. All its updates stand in the
    /// checkpoint.
    Standing(Commit),
    /// A record set.
    Set {
        /// Where it stands.
        at: SetLocation,
        /// Its bytes as they travelled. The journal vouches for nothing but that they are those appended.
        bytes: Bytes,
    },
    /// A commit.
    Commit(Commit),
    /// Sets that were given back before count no longer; those that were trimmed are named, too.
    Withdrawn(Withdrawn),
    /// Only if that was asked for: a record set stood here, and it has rotted.
    Rotten,
}

/// Gives back the entries of a journal, one at a time, each verified. Holds one entry in memory. Nothing comes after
/// an error.
#[derive(Debug)]
pub struct Recovery {
    segments: VecDeque<Arc<Segment>>,
    walk: Option<Walk>,
    /// The number after the last entry.
    end: EntryNumber,
    torn: bool,
    last_commit: Option<Commit>,
    /// Whether nothing was given back yet.
    fresh: bool,
    /// Whether record sets that have rotted are passed over.
    lenient: bool,
}

impl Recovery {
    pub(super) const fn new(segments: VecDeque<Arc<Segment>>, end: EntryNumber, torn: bool) -> Self {
        Self { segments, walk: None, end, torn, last_commit: None, fresh: true, lenient: false }
    }

    /// What can be read of the segments of a damaged journal: up to the first place at which nobody knows what stood
    /// there. A record set that has rotted is passed over, as its header says what it was.
    pub(super) fn lenient(segments: VecDeque<Arc<Segment>>) -> Self {
        let end = EntryNumber(EntryNumber::RANGE.end);
        Self { lenient: true, ..Self::new(segments, end, false) }
    }

    /// Whether the log ended with a torn batch: a crash came while it was written. What it held was never
    /// acknowledged.
    #[must_use]
    pub const fn is_torn(&self) -> bool {
        self.torn
    }

    fn step(&mut self) -> Result<Option<Recovered>, JournalError> {
        loop {
            let Some(walk) = &mut self.walk else {
                let Some(segment) = self.segments.pop_front() else { return Ok(None) };
                // What was trimmed before the first one is not known.
                let last_group = self.last_commit.as_ref().map_or(GroupNumber(0), |last| last.group);
                if !self.fresh && segment.header.last_group != last_group {
                    return Err(segment.damaged(0, "another group was the last one before it"));
                }
                self.walk = Some(Walk::new(segment));
                continue;
            };
            // A segment ends where the next one says that it does.
            let end = self.segments.front().map_or(self.end, |next| next.header.first_entry);
            if walk.next == end {
                self.walk = None;
                continue;
            }
            let entry = match walk.step()? {
                Found::Entry(entry) => entry,
                Found::Nothing => return Err(walk.segment.damaged(walk.at, "an entry is not there")),
                Found::Junk(_) if self.lenient && walk.skip_set()? => {
                    self.fresh = false;
                    return Ok(Some(Recovered::Rotten));
                }
                Found::Junk(what) => return Err(walk.segment.damaged(walk.at, what)),
            };
            let segment = Arc::clone(&walk.segment);
            if let Some(recovered) = self.take(&segment, entry)? {
                self.fresh = false;
                return Ok(Some(recovered));
            }
        }
    }

    /// What the entry is to the reader; nothing if it only repeats.
    fn take(&mut self, segment: &Segment, entry: Entry) -> Result<Option<Recovered>, JournalError> {
        if entry.kind == EntryKind::Withdrawn {
            let withdrawn = Withdrawn::decode(&entry.payload);
            return withdrawn
                .map(|withdrawn| Some(Recovered::Withdrawn(withdrawn)))
                .map_err(|what| segment.damaged(entry.payload_at, what));
        }
        let Some(commit) = commit_of(segment, &entry)? else {
            let at = SetLocation { segment: segment.number(), offset: entry.payload_at };
            return Ok(Some(Recovered::Set { at, bytes: entry.payload }));
        };
        if entry.kind == EntryKind::Commit {
            check_order(self.last_commit.as_ref(), &commit)
                .map_err(|_| segment.damaged(entry.payload_at, "a commit that does not follow the last"))?;
            self.last_commit = Some(commit.clone());
            return Ok(Some(Recovered::Commit(commit)));
        }
        if entry.number != segment.header.first_entry {
            return Err(segment.damaged(entry.payload_at, "a standing commit inside a segment"));
        }
        match &self.last_commit {
            Some(last) if *last == commit => Ok(None),
            None if self.fresh => {
                self.last_commit = Some(commit.clone());
                Ok(Some(Recovered::Standing(commit)))
            }
            _ => Err(segment.damaged(entry.payload_at, "another commit was the last")),
        }
    }
}

impl Iterator for Recovery {
    type Item = Result<Recovered, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.step();
        if result.is_err() {
            self.walk = None;
            self.segments.clear();
        }
        result.transpose()
    }
}
