//! What goes into a sender and comes out of it.

use crate::id::{
    Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, SiteId, SiteName, VolumeIndex, VolumeInstance,
    VolumeName,
};
use crate::session::{ChainPoint, VolumeState};
use crate::stamp::{Seq, Stamp, Timestamp};

/// Who the primary is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SenderConfig {
    /// The session.
    pub session: SessionId,
    /// This site.
    pub site: SiteId,
    /// Its name.
    pub name: SiteName,
    /// The generation of the primary role.
    pub epoch: Epoch,
    /// This mount.
    pub incarnation: Incarnation,
}

/// What the primary knows of a volume: what it starts from, and what a clean stop keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SenderVolume<H> {
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree.
    pub instance: VolumeInstance,
    /// Its root directory.
    pub root: FileId,
    /// How far it is.
    pub state: VolumeState,
    /// Stamp of the mark that ended its copy, once that was issued.
    pub complete: Option<Stamp>,
    /// The end of what is acknowledged without a gap.
    pub acked: ChainPoint,
    /// Where the interval of that set ends.
    pub acked_end: Timestamp,
    /// Where the last interval ended: of the last issued set, or of a null set after it.
    pub end: Timestamp,
    /// The sets issued after `acked`, in order.
    pub issued: Vec<IssuedSet<H>>,
    /// Sets issued after those, in order, by a run that was killed: what they were is known, but not their bytes. The
    /// replica may have some of them; the updates of the others are still at hand, and will be in other sets.
    pub forgotten: Vec<(ChainPoint, Timestamp)>,
}

/// A set that was made. `H` is whatever the driver needs to send it again: its bytes, or where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedSet<H> {
    /// Its number.
    pub number: SetNumber,
    /// Its hash.
    pub hash: SetHash,
    /// Stamp of its first update.
    pub first: Stamp,
    /// Stamp of its last update.
    pub last: Stamp,
    /// Where its interval ends.
    pub end: Timestamp,
    /// Encoded bytes.
    pub bytes: u64,
    /// Stamp of the mark that ends the copy of its volume, if that is in it.
    pub complete: Option<Stamp>,
    /// The driver's.
    pub handle: H,
}

impl<H> IssuedSet<H> {
    pub(super) const fn point(&self) -> ChainPoint {
        ChainPoint { number: self.number, hash: self.hash, last_seq: self.last.seq }
    }

    /// Number of its updates.
    #[must_use]
    pub const fn updates(&self) -> u64 {
        self.last.seq.0 + 1 - self.first.seq.0
    }
}

/// The place of the next set in the chain of its volume: the fields of its header that the sender decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainLink {
    /// Its number; of a null set, the number of the set that it follows.
    pub number: SetNumber,
    /// Hash of the set before it.
    pub predecessor: SetHash,
    /// Sequence number of its first update; of a null set, of the next one to come.
    pub first_seq: Seq,
    /// Where its interval starts.
    pub start: Timestamp,
}

/// What a volume has captured that is in no set yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Backlog {
    /// Nothing.
    #[default]
    None,
    /// Updates.
    Some,
    /// Updates that fill a set.
    Full,
}

/// What the replica does not have yet, of the sets that were made. What the sidefile holds beyond them is the driver's
/// to add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Behind {
    /// Encoded bytes.
    pub bytes: u64,
    /// Record updates.
    pub records: u64,
    /// Record sets.
    pub sets: u64,
    /// Stamp time of the oldest update among them. The exposure is its age.
    pub oldest: Option<Timestamp>,
}

/// Everything of a volume up to here is durable at the replica: the sidefile may let go of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// The volume.
    pub volume: VolumeIndex,
    /// The last set.
    pub point: ChainPoint,
    /// The end of its interval.
    pub end: Timestamp,
}

/// After a restart the replica turned out to have what it had not acknowledged yet: the updates up to here are in no
/// set any more that this site has to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adopted {
    /// The volume.
    pub volume: VolumeIndex,
    /// The last update that the replica has.
    pub through: Seq,
}

/// The driver or the peer named a set or volume that does not exist, or at the wrong time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SenderError {
    /// There is no such volume.
    #[error("there is no volume {}", .0.0)]
    Volume(VolumeIndex),
    /// A set that is not the next of its volume was issued.
    #[error("record set {number} is not the next one, {next} is")]
    NotNext {
        /// The set.
        number: SetNumber,
        /// The next one.
        next: SetNumber,
    },
    /// The peer acknowledged what was never issued.
    #[error("record set {0} was acknowledged, but not made yet")]
    NotIssued(SetNumber),
    /// Acknowledged or acted upon without a connection.
    #[error("there is no connection")]
    NotConnected,
}

/// Updates were let go while the session was suspended: it can only go on with a resync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("changes were not kept while the session was suspended: it needs a resync")]
pub struct NeedsResync;
