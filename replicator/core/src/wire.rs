//! Messages between sites, other than record sets.
//!
//! A message is eight bytes of frame and a payload. Integers are little-endian.
//!
//! ```text
//! offset  bytes  meaning
//!      0      1  version of these messages, 1
//!      1      1  tag (below)
//!      2      2  zero
//!      4      4  length of the payload, at most MESSAGE_BYTES_MAX less the frame
//!      8      …  payload
//! ```
//!
//! A *label* is a 1-byte length and its bytes, a *text* a 2-byte length and UTF-8, an *epoch* a number (8) and a site
//! (16), a *point* of a volume's chain a set number (8), its hash (32) and its last sequence number (8), a *file* is
//! as in updates (20). Set, group and sequence numbers and times are at most `i64::MAX`.
//!
//! ```text
//! tag  message          from     payload
//!   1  hello            primary  protocol 2, session 16, site 16, label, epoch, incarnation 8, count 2, for each
//!                                volume: label, instance 8, root file, state 1, point acknowledged, oldest and
//!                                newest set that can still be sent 8 each
//!   2  welcome          replica  epoch, role 1, group 8, consistency time 8, applied time 8, damage 1, text if not 0, count 2, for each volume: label, member 1,
//!                                point durable, count 2, for each set beyond a gap: its number less the durable one 2
//!   3  refuse           both     code 1, epoch flag 1, epoch if 1, text
//!   4  ack              replica  volume 2, set number 8
//!   5  progress         replica  group 8, consistency time 8, applied time 8
//!   6  null set         primary  an encoded record set without updates
//!   7  tokens           primary  an encoded batch of write tokens
//!   8  promote request  replica  –
//!   9  promote ready    primary  end 8, count 2, for each volume: volume 2, set number 8
//!  10  promote refused  primary  text
//!  11  promote done     replica  epoch
//!  12  bye              both     text
//! ```
//!
//! Volume states are 0 pending, 1 copy, 2 duplex; roles 0 primary, 1 replica, 2 promoted, 3 fenced. Damage is 0 none, 1 what
//! the replica lacks was touched after its applied time, 2 it may lack anything. A volume's 2-byte index is its place in
//! the *welcome* of the connection.

mod codec;

use bytes::Bytes;

use crate::id::{
    Epoch, FileId, GroupNumber, Incarnation, SessionId, SetNumber, SiteId, SiteName, VolumeIndex,
    VolumeInstance, VolumeName,
};
use crate::limits;
use crate::session::{ChainPoint, Role, VolumeState};
use crate::stamp::Timestamp;

/// Version of the byte form of the messages.
pub const VERSION: u8 = 1;
/// Version of the protocol: of what the messages mean and when they are sent.
pub const PROTOCOL: u16 = 2;
/// Bytes of a message's frame.
pub const FRAME_BYTES: usize = 8;

/// A message between two sites.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Primary: who it is and what it has. The first message of a connection.
    Hello(Hello),
    /// Replica: what it has durable. The answer to a hello.
    Welcome(Welcome),
    /// This connection must not go on.
    Refuse(Refuse),
    /// Replica: a record set is durable.
    Ack(Ack),
    /// Replica: what is visible.
    Progress(Progress),
    /// Primary: a record set without updates, encoded; it only lets time advance.
    NullSet(Bytes),
    /// Primary: write tokens, encoded. May be lost without harm to anything but the loss report.
    Tokens(Bytes),
    /// Replica: hold new writes and drain, for a planned promote.
    PromoteRequest,
    /// Primary: writes are held, everything is acknowledged.
    PromoteReady(PromoteReady),
    /// Primary: no planned promote now, and why.
    PromoteRefused(Text),
    /// Replica: the new epoch is durable; the old primary is fenced.
    PromoteDone(Epoch),
    /// A clean stop, and why.
    Bye(Text),
}

/// What the primary says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// [`PROTOCOL`] of the primary.
    pub protocol: u16,
    /// The session.
    pub session: SessionId,
    /// The primary site.
    pub site: SiteId,
    /// Its name.
    pub name: SiteName,
    /// The generation of the primary role.
    pub epoch: Epoch,
    /// The mount that speaks.
    pub incarnation: Incarnation,
    /// The volumes of the session, in the order in which the primary counts them; names occur once.
    pub volumes: Vec<HelloVolume>,
}

/// What the primary says of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloVolume {
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree.
    pub instance: VolumeInstance,
    /// Its root directory.
    pub root: FileId,
    /// How far it is, as the primary sees it.
    pub state: VolumeState,
    /// The end of the part of its chain that the replica acknowledged without a gap.
    pub acked: ChainPoint,
    /// The oldest set that the primary can still send; one past the last set issued if it holds none.
    pub oldest: SetNumber,
    /// The newest set that the primary can send. What the replica has after it and beyond a gap was made by a run that
    /// was killed, and is made anew: the replica drops it.
    pub newest: SetNumber,
}

/// What the replica answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The epoch that the replica knows.
    pub epoch: Epoch,
    /// Its role.
    pub role: Role,
    /// Number of its last committed group.
    pub group: GroupNumber,
    /// Its consistency time.
    pub time: Timestamp,
    /// As in [`Progress::applied`].
    pub applied: Timestamp,
    /// Acknowledged sets are gone: the primary has to adopt the places that this welcome names, and to send again what the
    /// replica lacks.
    pub damage: Option<Damage>,
    /// The volumes of the session. Their order defines the volume indices of this connection; names occur once.
    pub volumes: Vec<WelcomeVolume>,
}

/// Why a replica lacks what it once acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Whether it may lack anything: it noticed that acknowledged sets are gone, and nothing tells how that came. Else it
    /// has everything up to every instant that it called applied.
    pub whole: bool,
    /// What was found, for people.
    pub why: Text,
}

/// What the replica holds of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WelcomeVolume {
    /// Its name.
    pub name: VolumeName,
    /// Whether it is visible and counts in the consistency time.
    pub member: bool,
    /// The end of the part of its chain that is durable without a gap.
    pub durable: ChainPoint,
    /// Sets beyond a gap that are durable too, rising; at most [`limits::PENDING_SETS_MAX`].
    pub beyond: Vec<SetNumber>,
}

/// A typed "no".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuse {
    /// Why, for the state machine.
    pub code: RefuseCode,
    /// The epoch that the refusing site knows, if it knows one.
    pub epoch: Option<Epoch>,
    /// Why, for people.
    pub text: Text,
}

/// Why a site refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefuseCode {
    /// The protocol version is not spoken here.
    Version = 1,
    /// The replica is paired with another session.
    UnknownSession = 2,
    /// The replica knows a higher epoch, or this one of another site.
    Fenced = 3,
    /// A set number is known with another hash, or a volume with another instance.
    Diverged = 4,
    /// The replica no longer has what it once acknowledged, and the primary no longer either.
    Lost = 5,
    /// A volume of the session is missing.
    VolumeMissing = 6,
    /// The site is no replica.
    NotReplica = 7,
    /// There are more volumes than a session can have.
    TooManyVolumes = 8,
    /// The other side broke the protocol.
    Protocol = 9,
    /// The site cannot go on: its journal is full or failed.
    Failed = 10,
}

impl RefuseCode {
    const ALL: [Self; 10] = [
        Self::Version,
        Self::UnknownSession,
        Self::Fenced,
        Self::Diverged,
        Self::Lost,
        Self::VolumeMissing,
        Self::NotReplica,
        Self::TooManyVolumes,
        Self::Protocol,
        Self::Failed,
    ];

    fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

/// A record set of the volume's chain is durable at the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ack {
    /// The volume: its place in the welcome.
    pub volume: VolumeIndex,
    /// The set.
    pub number: SetNumber,
}

/// What the replica shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Number of its last committed group.
    pub group: GroupNumber,
    /// Its consistency time.
    pub time: Timestamp,
    /// Every update up to this instant stands in its plain trees, durable: no damage to its journal takes that away.
    pub applied: Timestamp,
}

/// Everything that was captured is acknowledged, and no write is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromoteReady {
    /// The end of the last interval: nothing is stamped after it.
    pub end: Timestamp,
    /// The last set of each volume.
    pub finals: Vec<Ack>,
}

/// A short text for people, at most [`limits::TEXT_BYTES_MAX`] bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text(String);

impl Text {
    /// Takes a text, and cuts it at the bound.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > limits::TEXT_BYTES_MAX {
            let cut =
                (0..=limits::TEXT_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
            text.truncate(cut);
        }
        Self(text)
    }

    /// The text. It comes from a peer: escape it before it reaches a terminal.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Text {
    /// Escaped, so that a peer cannot steer a terminal or forge a log line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.escape_debug())
    }
}

/// Why bytes are not a message. They come from a peer; nothing of them was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// Written by a version that is not spoken here.
    #[error("a message of version {0}, this site speaks version {VERSION}")]
    Version(u8),
    /// A kind that this version does not know.
    #[error("a message of unknown kind {0}")]
    Tag(u8),
    /// Longer than any message of its kind can be.
    #[error("a message of {0} bytes is too long")]
    TooLong(u32),
    /// Not the bytes of such a message.
    #[error("bad message: {0}")]
    Malformed(&'static str),
}

/// The frame of a message, checked: read [`FRAME_BYTES`] bytes, then as many as it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    tag: u8,
    payload_len: u32,
}

impl Frame {
    /// Checks the first bytes of a message.
    ///
    /// # Errors
    /// [`BadMessage`] if no message of this version starts so.
    pub fn parse(bytes: &[u8; FRAME_BYTES]) -> Result<Self, BadMessage> {
        codec::parse_frame(bytes)
    }

    /// Bytes of the payload that follows; bounded by what a message of this kind can have.
    #[must_use]
    pub const fn payload_len(&self) -> usize {
        self.payload_len as usize
    }

    /// Parses the payload.
    ///
    /// # Errors
    /// [`BadMessage`]; never panics, and allocates no more than a small multiple of the payload.
    pub fn decode(&self, payload: &[u8]) -> Result<Message, BadMessage> {
        codec::decode(self.tag, self.payload_len, payload)
    }
}

impl Message {
    /// The encoded form, with its frame.
    ///
    /// # Panics
    /// If the message is beyond the bounds of [`limits`]: its maker is this site, which keeps them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// Parses one whole message.
    ///
    /// # Errors
    /// [`BadMessage`] unless `bytes` are exactly one message.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        let (frame, payload) =
            bytes.split_first_chunk().ok_or(BadMessage::Malformed("it ends within its frame"))?;
        Frame::parse(frame)?.decode(payload)
    }
}
