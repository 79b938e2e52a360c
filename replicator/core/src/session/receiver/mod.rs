//! The replica's side of a session.
//!
//! A record set passes through it like this:
//!
//! 1. [`Receiver::handle_set`] looks at a verified set. On [`Verdict::Append`] the driver appends its bytes to the
//!    journal and says so with [`Receiver::handle_appended`].
//! 2. When the journal is durable up to there, the driver says so with [`Receiver::handle_durable`], and
//!    [`Receiver::poll_ack`] has the acknowledgement.
//! 3. [`Receiver::poll_group`] says what belongs into the next consistency group, as soon as one can be formed. The
//!    driver appends the COMMIT to the journal. When that *and everything before it* is durable (one `fdatasync` does
//!    for the sets and the COMMIT behind them), it says [`Receiver::handle_committed`], folds the group and shows it.
//!    [`Receiver::poll_progress`] then has what the primary should hear.
//!
//! Groups are numbered 1, 2, 3, …, one for each COMMIT. While volumes are being copied, there are groups that change
//! nothing visible: they only let the copied data leave the pending queue, and their time is the unchanged consistency
//! time. Before the first volume has joined that time is zero, and the replica shows no volume. When no member volume
//! has updates up to a new consistency time, that time is reached without a group: it is not durable, and after a
//! restart the consistency time is again that of the last group until the primary has sent its next sets.

mod group;
mod known;
mod repair;
mod tokens;
mod volume;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::delta::SetLocation;
use crate::id::{
    Epoch, FileId, GroupNumber, SessionId, SetHash, SetNumber, VolumeIndex, VolumeInstance, VolumeName,
};
use crate::limits;
use crate::record_set::{SetHeader, SetMeta};
use crate::session::handshake::{self, Adoption, NewVolume, ReplicaView, ReplicaVolume};
use crate::session::{ChainPoint, Role};
use crate::stamp::{Seq, Timestamp};
use crate::token::Token;
use crate::wire::{Ack, Hello, Progress, PromoteReady, Refuse, Welcome, WelcomeVolume};

pub use group::{GroupPlan, GroupSet, GroupVolume};
pub use repair::Repair;
pub use tokens::BareTokens;
use volume::{Held, Place, Volume};

/// How groups are formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ordering {
    /// By stamps: a group is everything up to the consistency time, over all volumes.
    #[default]
    ByStamp,
    /// As sets arrive, without looking at stamps, other volumes or gaps. This breaks the promise of the mirror; it is
    /// there so that tests of the order can be shown to fail.
    #[doc(hidden)]
    ByArrival,
}

/// What the journal and the checkpoint of a replica know, to start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverState {
    /// The session it is paired with and the epoch it knows; none before the first contact.
    pub paired: Option<(SessionId, Epoch)>,
    /// Its role.
    pub role: Role,
    /// Number of the last COMMIT.
    pub group: GroupNumber,
    /// Its consistency time.
    pub time: Timestamp,
    /// The volumes, in the order in which they became known.
    pub volumes: Vec<ReceiverVolume>,
}

impl ReceiverState {
    /// A replica before its first contact.
    pub const UNPAIRED: Self = Self {
        paired: None,
        role: Role::Replica,
        group: GroupNumber(0),
        time: Timestamp::ZERO,
        volumes: Vec::new(),
    };
}

/// What the journal and the checkpoint know of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverVolume {
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree at the primary.
    pub instance: VolumeInstance,
    /// Its root directory there.
    pub root: FileId,
    /// Whether it has joined.
    pub member: bool,
    /// A point of its chain up to which every set is in committed groups. The sets after it, as far as they are in
    /// the journal, must be handed to [`Receiver::restore_set`].
    pub base: ChainPoint,
    /// Where the interval of that set ends.
    pub base_end: Timestamp,
    /// Sequence number of the last update in a committed group.
    pub through: Seq,
}

/// What to do with a record set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is new: append it to the journal, then call [`Receiver::handle_appended`].
    Append(VolumeIndex),
    /// It is here already: drop it. If it is durable, it will be acknowledged again.
    Duplicate(VolumeIndex),
    /// It was a null set and has done its work: drop it.
    Null(VolumeIndex),
}

/// Why a record set was not taken. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetRefusal {
    /// Sets of that epoch are refused, those in flight too.
    #[error("a record set of epoch {theirs} is fenced by epoch {known}")]
    Fenced {
        /// What the replica knows.
        known: Epoch,
        /// What the set says.
        theirs: Epoch,
    },
    /// This site takes no sets: it was promoted, or is the primary.
    #[error("this site is {0} and takes no record sets")]
    NotReplica(Role),
    /// Made for another session.
    #[error("a record set of session {0}, with which this site is not paired")]
    WrongSession(SessionId),
    /// Made in an epoch that no handshake announced.
    #[error("a record set of epoch {0}, which no handshake announced")]
    WrongEpoch(Epoch),
    /// Of a volume that no handshake announced.
    #[error("a record set of volume {0}, which no handshake announced")]
    UnknownVolume(VolumeName),
    /// A known number or predecessor with another hash, or another tree: the pasts differ.
    #[error("volume {volume}: record set {number} contradicts what is known: {what}")]
    Diverged {
        /// The volume.
        volume: VolumeName,
        /// The set.
        number: SetNumber,
        /// What differs.
        what: &'static str,
    },
    /// It says what cannot be.
    #[error("volume {volume}: record set {number} is not well-formed: {what}")]
    Malformed {
        /// The volume.
        volume: VolumeName,
        /// The set.
        number: SetNumber,
        /// What is wrong.
        what: &'static str,
    },
    /// So far ahead of the last set without a gap that no primary within its bounds would have sent it.
    #[error("volume {volume}: record set {number} is too far ahead of {durable}")]
    TooFarAhead {
        /// The volume.
        volume: VolumeName,
        /// The set.
        number: SetNumber,
        /// The last set without a gap.
        durable: SetNumber,
    },
    /// So old that its hash is not remembered. A primary that heard the welcome does not send it.
    #[error("volume {volume}: record set {number} was taken long ago")]
    TooOld {
        /// The volume.
        volume: VolumeName,
        /// The set.
        number: SetNumber,
    },
    /// There is no room until a group is committed: keep the set, read no further sets of this volume, and offer it
    /// again after the next [`Receiver::handle_committed`].
    #[error("too many record sets wait for a consistency group")]
    Full,
    /// A resync does not fit into what this site holds for one group ([`limits::HELD_BYTES_MAX`]). A primary within its
    /// bounds ([`limits::RESYNC_UPDATES_MAX`]) gives it up before.
    #[error("the resync of volume {0} is larger than what one consistency group may hold")]
    ResyncTooLarge(VolumeName),
}

/// The driver named a set that was not taken, or a group that was not planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a record set or group that is at hand")]
pub struct Unknown;

/// Why a replica cannot take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PromoteError {
    /// It is not a replica with a past.
    #[error("this site has nothing to promote: it is {0} and shows no volume")]
    NotReady(Role),
    /// The epoch would not fence the old primary.
    #[error("epoch {0} does not fence the old primary")]
    Epoch(Epoch),
}

/// The replica's side of a session. See the [module](self) for how it is driven.
#[derive(Debug)]
pub struct Receiver {
    paired: Option<(SessionId, Epoch)>,
    role: Role,
    ordering: Ordering,
    volumes: Vec<Volume>,
    group: GroupNumber,
    /// What is visible holds every member's updates up to here. At least the last group's time.
    visible: Timestamp,
    planned: Option<group::Planned>,
    held_bytes: usize,
    arrivals: u64,
    connected: bool,
    acks: BTreeSet<Ack>,
    progress_due: bool,
    out_of_order: u64,
    repair: Option<Repair>,
    /// The plain trees hold everything up to here.
    tree_time: Timestamp,
    /// The plain trees hold everything that is visible.
    tree_whole: bool,
}

impl Receiver {
    /// Starts from what is durable. The journaled sets follow with [`restore_set`](Self::restore_set), in the order of
    /// the journal.
    #[must_use]
    pub fn restore(state: ReceiverState, ordering: Ordering) -> Self {
        let visible = state.time;
        Self {
            paired: state.paired,
            role: state.role,
            ordering,
            volumes: state.volumes.into_iter().map(|volume| Volume::restore(volume, visible)).collect(),
            group: state.group,
            visible,
            planned: None,
            held_bytes: 0,
            arrivals: 0,
            connected: false,
            acks: BTreeSet::new(),
            progress_due: false,
            out_of_order: 0,
            repair: None,
            tree_time: Timestamp::ZERO,
            tree_whole: false,
        }
    }

    /// Takes a set that stands in the journal, durable. Sets that are in committed groups, or before the base point,
    /// are recognised and do no harm.
    ///
    /// # Errors
    /// [`SetRefusal`] if the journal contradicts itself: it is damaged.
    pub fn restore_set(
        &mut self,
        header: &SetHeader,
        hash: SetHash,
        meta: SetMeta,
        at: SetLocation,
    ) -> Result<(), SetRefusal> {
        let index = self.volume_of(header)?;
        let Place::New = self.volumes[index.as_usize()].place(header, hash, &meta)? else {
            return Ok(());
        };
        self.hold(index, header, hash, meta);
        let volume = &mut self.volumes[index.as_usize()];
        volume.skip_grouped(header.number);
        let freed =
            volume.append(header.number, at, &mut self.arrivals).and_then(|()| volume.persist(header.number));
        self.held_bytes -= freed.expect("it was put there just now");
        Ok(())
    }

    /// Checks, once every journaled set was handed over, that none of a committed group is missing.
    ///
    /// # Errors
    /// The volume whose sets are missing, and the number of the last one that is there: the journal is damaged.
    pub fn check_restored(&self) -> Result<(), (VolumeName, SetNumber)> {
        let gap = self.volumes.iter().find(|volume| volume.through > volume.chain.last_seq);
        gap.map_or(Ok(()), |volume| Err((volume.name.clone(), volume.chain.number)))
    }

    /// What is durable, for [`handshake::answer`].
    #[must_use]
    pub fn view(&self) -> ReplicaView {
        let volumes = self.volumes.iter().map(|volume| ReplicaVolume {
            name: volume.name.clone(),
            instance: volume.instance,
            root: volume.root,
            durable: volume.durable,
        });
        let damaged = self.damage().is_some();
        ReplicaView { paired: self.paired, role: self.role, damaged, volumes: volumes.collect() }
    }

    /// The sets of a volume past a gap in what is durable that are durable too.
    pub fn durable_beyond(&self, volume: &VolumeName) -> impl Iterator<Item = SetNumber> {
        let known = self.volumes.iter().find(|known| known.name == *volume);
        known.into_iter().flat_map(Volume::durable_beyond)
    }

    /// The decision about a hello: make it durable if it [`changes`](Adoption::changes) anything, then call
    /// [`handle_connected`](Self::handle_connected).
    ///
    /// # Errors
    /// The message with which to close the connection.
    pub fn handle_hello(&self, hello: &Hello) -> Result<Adoption, Refuse> {
        handshake::answer(&self.view(), hello)
    }

    /// What the primary has no longer of the sets beyond gaps: a process that was killed had made them, and its next one
    /// makes others in their places. They are dropped here; make that durable before
    /// [`handle_connected`](Self::handle_connected). Everything that was appended must be durable. While there is a
    /// [`damage`](Self::damage) to tell, the primary will not go on with any of them.
    pub fn withdraw(&mut self, hello: &Hello) -> Vec<(VolumeIndex, Vec<SetNumber>)> {
        let mut withdrawn = Vec::new();
        let damaged = self.damage().is_some();
        for (index, volume) in (0..).map(VolumeIndex).zip(&mut self.volumes) {
            let Some(theirs) = hello.volumes.iter().find(|theirs| theirs.name == volume.name) else {
                continue;
            };
            let (numbers, freed) = volume.withdraw(if damaged { SetNumber(0) } else { theirs.newest });
            self.held_bytes -= freed;
            if !numbers.is_empty() {
                withdrawn.push((index, numbers));
            }
        }
        withdrawn
    }

    /// Takes over what was made durable, and has the welcome to send. Acknowledgements that an earlier connection did
    /// not take are dropped: the welcome says the same.
    pub fn handle_connected(&mut self, adoption: &Adoption) -> Welcome {
        if self.paired.is_some_and(|(_, epoch)| epoch != adoption.epoch) {
            // Tokens of another primary say nothing about this one's updates.
            self.volumes.iter_mut().for_each(|volume| volume.tokens.clear());
        }
        self.paired = Some((adoption.session, adoption.epoch));
        let is_new = |new: &&NewVolume| self.volumes.iter().all(|known| known.name != new.name);
        let new_volumes: Vec<_> = adoption.volumes.iter().filter(is_new).collect();
        for new in new_volumes {
            let state = ReceiverVolume {
                name: new.name.clone(),
                instance: new.instance,
                root: new.root,
                member: false,
                base: ChainPoint::START,
                base_end: Timestamp::ZERO,
                through: Seq::ZERO,
            };
            self.volumes.push(Volume::restore(state, self.visible));
        }
        self.connected = true;
        self.acks.clear();
        self.progress_due = false;
        let volumes = self.volumes.iter().map(|volume| WelcomeVolume {
            name: volume.name.clone(),
            member: volume.member,
            durable: volume.durable,
            beyond: volume.durable_beyond().collect(),
        });
        Welcome {
            epoch: adoption.epoch,
            role: self.role,
            group: self.group,
            time: self.visible,
            applied: self.progress().applied,
            damage: self.damage().cloned(),
            volumes: volumes.collect(),
        }
    }

    /// The connection is gone. Everything received stays.
    pub fn handle_disconnected(&mut self) {
        self.connected = false;
        self.acks.clear();
        self.progress_due = false;
    }

    /// Looks at a record set, in whatever order sets come.
    ///
    /// # Errors
    /// [`SetRefusal`]; nothing changed. All but [`Full`](SetRefusal::Full) and [`TooOld`](SetRefusal::TooOld) are
    /// reasons to close the connection, saying why.
    pub fn handle_set(
        &mut self,
        header: &SetHeader,
        hash: SetHash,
        meta: SetMeta,
    ) -> Result<Verdict, SetRefusal> {
        self.check_origin(header)?;
        let index = self.volume_of(header)?;
        let at = index.as_usize();
        if header.is_null() {
            self.volumes[at].handle_null(header)?;
            return Ok(Verdict::Null(index));
        }
        match self.volumes[at].place(header, hash, &meta)? {
            Place::New => {}
            Place::Known { durable } => {
                // A second acknowledgement is a courtesy: it is bounded, as a peer could ask for it for ever.
                if durable && self.connected && self.acks.len() < limits::PENDING_SETS_MAX {
                    self.acks.insert(Ack { volume: index, number: header.number });
                }
                return Ok(Verdict::Duplicate(index));
            }
            Place::Old => {
                return Err(SetRefusal::TooOld { volume: header.volume.clone(), number: header.number });
            }
        }
        if self.held_bytes + Held::charge(&meta, header) > limits::HELD_BYTES_MAX
            && !self.is_needed(index, header)
        {
            return Err(self.stuck_resync().map_or(SetRefusal::Full, SetRefusal::ResyncTooLarge));
        }
        if header.number != self.volumes[at].newest().next() {
            self.out_of_order += 1;
        }
        self.hold(index, header, hash, meta);
        Ok(Verdict::Append(index))
    }

    /// A set stands in the journal, not necessarily durable yet. From here on it may be part of groups, whose COMMIT
    /// stands behind it in the same journal.
    ///
    /// # Errors
    /// [`Unknown`] if the set was not taken.
    pub fn handle_appended(
        &mut self,
        volume: VolumeIndex,
        number: SetNumber,
        at: SetLocation,
    ) -> Result<(), Unknown> {
        let known = self.volumes.get_mut(volume.as_usize()).ok_or(Unknown)?;
        known.append(number, at, &mut self.arrivals)
    }

    /// A set that was appended is durable: it will be acknowledged. Persist first, then acknowledge.
    ///
    /// # Errors
    /// [`Unknown`] if the set was not appended.
    pub fn handle_durable(&mut self, volume: VolumeIndex, number: SetNumber) -> Result<(), Unknown> {
        let known = self.volumes.get_mut(volume.as_usize()).ok_or(Unknown)?;
        if known.is_durable(number) {
            return Ok(());
        }
        self.held_bytes -= known.persist(number)?;
        if self.connected {
            self.acks.insert(Ack { volume, number });
        }
        Ok(())
    }

    /// The next acknowledgement to send. Ask after [`handle_set`](Self::handle_set),
    /// [`handle_durable`](Self::handle_durable) and [`handle_committed`](Self::handle_committed), until there is none.
    pub fn poll_ack(&mut self) -> Option<Ack> {
        self.acks.pop_first()
    }

    /// What the primary should hear of what is visible, if that changed.
    pub fn poll_progress(&mut self) -> Option<Progress> {
        std::mem::take(&mut self.progress_due).then(|| self.progress())
    }

    /// What is visible.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let applied = if self.tree_whole { self.visible } else { self.tree_time };
        Progress { group: self.group, time: self.visible, applied }
    }

    /// Takes write tokens of a volume. Those whose updates are in committed groups are dropped at once, and those
    /// past [`limits::TOKENS_HELD_MAX`] are only counted.
    ///
    /// # Errors
    /// [`SetRefusal::UnknownVolume`].
    pub fn handle_tokens(&mut self, volume: &VolumeName, tokens: Vec<Token>) -> Result<(), SetRefusal> {
        let mut held: usize = self.volumes.iter().map(|volume| volume.tokens.len()).sum();
        let known = self.volumes.iter_mut().find(|known| known.name == *volume);
        known.ok_or_else(|| SetRefusal::UnknownVolume(volume.clone()))?.take_tokens(tokens, &mut held);
        Ok(())
    }

    /// How many updates are known by their tokens alone, over all volumes.
    #[must_use]
    pub fn bare_tokens(&self) -> BareTokens {
        self.volumes.iter().fold(BareTokens::default(), |sum, volume| sum + volume.tokens.bare())
    }

    /// The tokens of a volume whose updates have not arrived, in their order; of those that were held.
    pub fn bare_tokens_of(&self, volume: VolumeIndex) -> impl Iterator<Item = &Token> {
        self.volumes.get(volume.as_usize()).into_iter().flat_map(|volume| volume.tokens.iter_bare())
    }

    /// The token of an update that is not in a committed group, and whether its data is here.
    #[must_use]
    pub fn token(&self, volume: VolumeIndex, seq: Seq) -> Option<(&Token, bool)> {
        self.volumes.get(volume.as_usize())?.tokens.get(seq)
    }

    /// Whether everything of a planned promote is visible: every volume's last set, and the last interval's end.
    #[must_use]
    pub fn has_reached(&self, ready: &PromoteReady) -> bool {
        let reached = |(index, volume): (VolumeIndex, &Volume)| {
            let last = Ack { volume: index, number: volume.chain.number };
            volume.member && volume.is_empty() && ready.finals.contains(&last)
        };
        self.visible >= ready.end && (0..).map(VolumeIndex).zip(&self.volumes).all(reached)
    }

    /// Takes over: from here on every set is refused, those in flight too, and no further group is formed. The driver
    /// has made the epoch and the role durable before it calls this. A group that is under way may still be committed.
    ///
    /// # Errors
    /// [`PromoteError`]; nothing changed.
    pub fn promote(&mut self, epoch: Epoch) -> Result<(), PromoteError> {
        let known = self.paired.filter(|_| self.role == Role::Replica && self.members().next().is_some());
        let (session, known) = known.ok_or(PromoteError::NotReady(self.role))?;
        if !epoch.fences(&known) {
            return Err(PromoteError::Epoch(epoch));
        }
        self.paired = Some((session, epoch));
        self.role = Role::Promoted;
        Ok(())
    }

    /// Its role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The session and the epoch, once paired.
    #[must_use]
    pub fn paired(&self) -> Option<(SessionId, Epoch)> {
        self.paired
    }

    /// The volumes in the order of their indices, with whether they are members.
    pub fn volumes(&self) -> impl Iterator<Item = (VolumeIndex, &VolumeName, bool)> {
        (0..).map(VolumeIndex).zip(&self.volumes).map(|(index, volume)| (index, &volume.name, volume.member))
    }

    /// What a checkpoint has to record of a volume: the last point of its chain up to which every set is in committed
    /// groups, with the end of that set's interval. The journal may be trimmed up to that set.
    #[must_use]
    pub fn base(&self, volume: VolumeIndex) -> Option<(ChainPoint, Timestamp)> {
        self.volumes.get(volume.as_usize()).map(|volume| (volume.base, volume.base_end))
    }

    /// Whether a volume is being resynced: it shows what it showed before.
    #[must_use]
    pub fn is_resyncing(&self, volume: VolumeIndex) -> bool {
        self.volumes
            .get(volume.as_usize())
            .is_some_and(|volume| volume.member && volume.open_resync().is_some())
    }

    /// Memory charged for sets that wait for groups, in bytes; bounded by [`limits::HELD_BYTES_MAX`] and one set for
    /// each volume.
    #[must_use]
    pub const fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Sets that were not the next of their volume when they came.
    #[must_use]
    pub const fn sets_out_of_order(&self) -> u64 {
        self.out_of_order
    }

    fn members(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.iter().filter(|volume| volume.member)
    }

    fn check_origin(&self, header: &SetHeader) -> Result<(), SetRefusal> {
        let paired = self.paired.filter(|(session, _)| *session == header.session);
        let (_, known) = paired.ok_or(SetRefusal::WrongSession(header.session))?;
        if known.fences(&header.epoch) {
            return Err(SetRefusal::Fenced { known, theirs: header.epoch });
        }
        if self.role != Role::Replica {
            return Err(SetRefusal::NotReplica(self.role));
        }
        if known != header.epoch {
            return Err(SetRefusal::WrongEpoch(header.epoch));
        }
        Ok(())
    }

    fn volume_of(&self, header: &SetHeader) -> Result<VolumeIndex, SetRefusal> {
        let found =
            (0..).map(VolumeIndex).zip(&self.volumes).find(|(_, volume)| volume.name == header.volume);
        let (index, volume) = found.ok_or_else(|| SetRefusal::UnknownVolume(header.volume.clone()))?;
        if (volume.instance, volume.root) != (header.instance, header.root) {
            return Err(volume.diverged(header.number, "it is of another tree"));
        }
        Ok(index)
    }

    fn hold(&mut self, index: VolumeIndex, header: &SetHeader, hash: SetHash, meta: SetMeta) {
        self.held_bytes += self.volumes[index.as_usize()].hold(header, hash, Arc::new(meta));
    }

    /// A volume whose resync is all that stands before the next group, so that no room will ever come of one.
    fn stuck_resync(&self) -> Option<VolumeName> {
        let is_next = |volume: &Volume| volume.open_resync().is_some_and(|whole| self.visible >= whole);
        self.members().find(|volume| is_next(volume)).map(|volume| volume.name.clone())
    }

    /// Whether a set must be taken although the bound is reached, as without it no group could be formed: it is the
    /// next one of a volume of which nothing else could go into a group, and which holds the others back or none.
    fn is_needed(&self, index: VolumeIndex, header: &SetHeader) -> bool {
        let volume = &self.volumes[index.as_usize()];
        let holds_back = !volume.member || self.members().all(|other| other.frontier >= volume.frontier);
        holds_back && header.number == volume.chain.number.next() && !volume.has_ungrouped()
    }
}
