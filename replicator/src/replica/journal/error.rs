//! What can go wrong with a journal.

use twinfs_core::id::{GroupNumber, SessionId};

use crate::storage::StorageError;

/// Why a journal operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The storage below failed. If it was a write or a sync, the journal takes no more entries.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// There is no room. Nothing was appended; the same call may succeed after a trim, or once the disk has room.
    #[error(
        "the journal is full: it needs {needed} bytes, {free} are free on its file system, {floor} must stay free"
    )]
    Full {
        /// Bytes that the next segment takes.
        needed: u64,
        /// Bytes that the file system has.
        free: u64,
        /// Bytes that must stay free.
        floor: u64,
    },
    /// As many segments as there may be. Nothing was appended; a trim helps.
    #[error("the journal is full: it has {max} segments")]
    TooManySegments {
        /// The bound.
        max: usize,
    },
    /// An earlier write or sync failed, so nobody knows what the end of the log holds. Opening the journal again finds
    /// out.
    #[error("the journal takes no more entries: an earlier write or sync of it failed")]
    Poisoned,
    /// An entry that is empty, or larger than any may be.
    #[error("an entry of {bytes} bytes does not fit the journal")]
    EntrySize {
        /// Its payload.
        bytes: usize,
    },
    /// A commit that does not follow the one before it.
    #[error("group {group} cannot follow group {last} in the journal")]
    CommitOrder {
        /// The group of the last commit.
        last: GroupNumber,
        /// The group that was to follow.
        group: GroupNumber,
    },
    /// A commit that no reader would accept.
    #[error("a commit that is none: {what}")]
    BadCommit {
        /// What is wrong.
        what: &'static str,
    },
    /// What was durable is no longer as it was written: the medium lies, or somebody changed it.
    #[error("journal segment {segment} is damaged at byte {at}: {what}")]
    Damaged {
        /// The segment.
        segment: u64,
        /// Offset in it.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A segment between others is not there.
    #[error("journal segment {segment} is missing")]
    Missing {
        /// The segment.
        segment: u64,
    },
    /// A segment of another session.
    #[error("journal segment {segment} belongs to session {found}, not to {expected}")]
    ForeignSession {
        /// The segment.
        segment: u64,
        /// Its session.
        found: SessionId,
        /// The session of the journal.
        expected: SessionId,
    },
    /// A segment of a version that this program does not know.
    #[error("journal segment {segment} has format version {version}, which is not known here")]
    UnknownVersion {
        /// The segment.
        segment: u64,
        /// Its version.
        version: u32,
    },
    /// A configuration that cannot be.
    #[error("a journal segment cannot have {bytes} bytes")]
    SegmentSize {
        /// The size asked for.
        bytes: u64,
    },
}

impl JournalError {
    /// Whether the journal is not what was written. What the disk or the system refuses is no damage.
    #[must_use]
    pub const fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Missing { .. } | Self::ForeignSession { .. } => true,
            Self::Storage(_)
            | Self::Full { .. }
            | Self::TooManySegments { .. }
            | Self::Poisoned
            | Self::EntrySize { .. }
            | Self::CommitOrder { .. }
            | Self::BadCommit { .. }
            | Self::UnknownVersion { .. }
            | Self::SegmentSize { .. } => false,
        }
    }
}
