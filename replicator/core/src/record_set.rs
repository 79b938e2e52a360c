//! The record set: the shipping unit.
//!
//! A record set holds the updates of one volume in one interval (or a part of it, when it was cut by size). It is
//! self-describing: header, file table, updates and data can be read with nothing else at hand. It names its
//! predecessor by hash, so that a lost, doubled or re-issued set is noticed. The bytes are made once, on the primary;
//! the same bytes go over the wire and into the journal. [`crate::format::v1`] lays them out.

pub use crate::format::{
    BadSet, BuildError, Builder, EncodedSet, Frame, FrameIndex, SetPlace, SetPrefix, Unpacker, UnverifiedSet,
    VerifiedSet,
};

use crate::id::{Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, VolumeInstance, VolumeName};
use crate::stamp::{Seq, Timestamp};
use crate::update::Update;

/// What a record set says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetHeader {
    /// The session it belongs to.
    pub session: SessionId,
    /// The volume, by its name in the session.
    pub volume: VolumeName,
    /// The life of the volume's tree at the primary.
    pub instance: VolumeInstance,
    /// The root directory of the volume.
    pub root: FileId,
    /// The generation of the primary role in which it was made.
    pub epoch: Epoch,
    /// The mount of the primary that made it.
    pub incarnation: Incarnation,
    /// Its number in the chain of its volume. A null set has no place in the chain: it repeats the number of the set
    /// that it follows.
    pub number: SetNumber,
    /// The hash of the set before it (of a null set: of the set that it follows).
    pub predecessor: SetHash,
    /// Sequence number of its first update; of a null set, one past the last update before it.
    pub first_seq: Seq,
    /// Number of updates; zero makes it a null set.
    pub updates: u32,
    /// Where its interval starts: after the end of the set before it.
    pub start: Timestamp,
    /// Where its interval ends: every update of the volume stamped at or before this instant is in this set or in one
    /// before it.
    pub end: Timestamp,
    /// Raw bytes of the metadata section (file table and updates).
    pub meta_len: u32,
    /// Raw bytes of the data section.
    pub data_len: u32,
}

impl SetHeader {
    /// Whether the set only lets time advance.
    #[must_use]
    pub const fn is_null(&self) -> bool {
        self.updates == 0
    }

    /// Sequence number of the last update (of the last before it, for a null set).
    #[must_use]
    pub const fn last_seq(&self) -> Seq {
        Seq(self.first_seq.0 + self.updates as u64 - 1)
    }
}

/// A file that a set mentions, with the path that it had when the set was made: a hint for people, never followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathHint {
    /// The file.
    pub file: FileId,
    /// Its path below the volume's root, components joined by `/`; empty if it was not known.
    pub path: Box<[u8]>,
}

/// The metadata section of a record set, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetMeta {
    /// Every file that the updates mention.
    pub files: Vec<PathHint>,
    /// The updates in the order of their stamps, each with the offset of its data in the data section.
    pub updates: Vec<(Update, u32)>,
}
