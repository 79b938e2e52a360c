//! State machines of both ends.
//!
//! * [`sender`] – the primary: numbers the sets of each volume, keeps what is not acknowledged, and decides what has to
//!   be sent (again), and when the next interval ends.
//! * [`receiver`] – the replica: takes sets in any order, holds them until consistency groups can be formed, and says
//!   what belongs into each.
//! * [`handshake`] – what both decide when they meet: whether they belong together, and from where they go on.
//!
//! None of them does I/O or knows the time: the driver feeds `handle_*`, and after each such call asks every `poll_*`
//! until it has no more to say.

pub mod handshake;
pub mod receiver;
pub mod sender;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{SetHash, SetNumber};
use crate::stamp::Seq;

/// A place in the chain of a volume: a set, and where its updates end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainPoint {
    /// The set; zero before the first one.
    pub number: SetNumber,
    /// Its hash.
    pub hash: SetHash,
    /// Sequence number of its last update.
    pub last_seq: Seq,
}

impl ChainPoint {
    /// Before the first set.
    pub const START: Self = Self { number: SetNumber(0), hash: SetHash::NONE, last_seq: Seq::ZERO };
}

/// How far a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[repr(u8)]
pub enum VolumeState {
    /// Its copy has not begun.
    Pending = 0,
    /// Its initial copy runs; the replica does not show it.
    Copy = 1,
    /// It is a member: it counts in the consistency time and is visible.
    Duplex = 2,
    /// It is a member, and what changed while it was not mirrored is being sent. The replica shows its last image.
    Resync = 3,
}

impl VolumeState {
    pub(crate) fn from_u8(number: u8) -> Option<Self> {
        [Self::Pending, Self::Copy, Self::Duplex, Self::Resync].get(usize::from(number)).copied()
    }
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "PENDING",
            Self::Copy => "COPY",
            Self::Duplex => "DUPLEX",
            Self::Resync => "RESYNC",
        })
    }
}

/// What a site is in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[repr(u8)]
pub enum Role {
    /// Its applications write.
    Primary = 0,
    /// It receives, and shows what it received.
    Replica = 1,
    /// It was the replica and took over.
    Promoted = 2,
    /// It was the primary until another site took over.
    Fenced = 3,
}

impl Role {
    pub(crate) fn from_u8(number: u8) -> Option<Self> {
        [Self::Primary, Self::Replica, Self::Promoted, Self::Fenced].get(usize::from(number)).copied()
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "PRIMARY",
            Self::Replica => "REPLICA",
            Self::Promoted => "PROMOTED",
            Self::Fenced => "FENCED",
        })
    }
}

/// Why a session does not mirror at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum SuspendReason {
    /// A person asked for it.
    Operator,
    /// There is no connection, for longer than the sidefile lasts.
    Link,
    /// The link is slower than the writers, for longer than the sidefile lasts.
    Lag,
    /// The replica's journal has no room.
    Journal,
    /// A site failed or refuses.
    Error,
}

impl fmt::Display for SuspendReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operator => "OPERATOR",
            Self::Link => "LINK",
            Self::Lag => "LAG",
            Self::Journal => "JOURNAL",
            Self::Error => "ERROR",
        })
    }
}

/// State of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum SessionState {
    /// No volume's copy has begun.
    Pending,
    /// A volume is not a member yet.
    Copy,
    /// Every volume is a member.
    Duplex,
    /// What changed while the session was suspended is being sent.
    Resync,
    /// Nothing is sent, until it is resumed.
    Suspended(SuspendReason),
    /// The sites do not agree about their common past; a person has to look at it.
    Diverged,
}

impl fmt::Display for SessionState {
    /// Without the reason, which stands in a field of its own wherever states are printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "PENDING",
            Self::Copy => "COPY",
            Self::Duplex => "DUPLEX",
            Self::Resync => "RESYNC",
            Self::Suspended(_) => "SUSPENDED",
            Self::Diverged => "DIVERGED",
        })
    }
}
