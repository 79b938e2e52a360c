//! Starting a replica from what it has on disk: control file, image, journal.

use std::collections::BTreeMap;
use std::sync::Arc;

use twinfs_core::delta::{DataRef, SetLocation};
use twinfs_core::format::{BadSet, UnverifiedSet, VerifiedSet};
use twinfs_core::id::{GroupNumber, SetHash, SetNumber, VolumeIndex, VolumeName};
use twinfs_core::record_set::SetMeta;
use twinfs_core::session::ChainPoint;
use twinfs_core::session::receiver::{Ordering, Receiver, ReceiverState, ReceiverVolume, SetRefusal};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::update::Update;

use super::image::{Group, Image, ImageError};
use super::journal::{Commit, CommitVolume, JournalError, Recovered, Recovery, Withdrawn};
use crate::failpoint::{self, FailPoint};
use crate::site::State;

/// Why a replica cannot start from what it has.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The journal is damaged, or the disk failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A record set in the journal is not as it was received.
    #[error("record set at byte {} of journal segment {}: {error}", at.offset, at.segment)]
    Set {
        /// Where it stands.
        at: SetLocation,
        /// What is wrong.
        error: BadSet,
    },
    /// The journal contradicts itself.
    #[error("the journal contradicts itself: {0}")]
    Contradiction(#[from] SetRefusal),
    /// The journal names a volume that the control file does not.
    #[error("the journal names the volume {0}, which this site does not know")]
    Volume(String),
    /// A commit stands in the journal, but not all that belongs to it.
    #[error("group {group} of the journal lacks updates after {last} of volume {volume}")]
    Incomplete {
        /// The group.
        group: GroupNumber,
        /// The volume.
        volume: String,
        /// The last update at hand.
        last: Seq,
    },
    /// Sets of committed groups that no checkpoint covers are not in the journal.
    #[error(
        "the journal lacks record sets of volume {volume} after {last}, which belong to committed groups"
    )]
    Lost {
        /// The volume.
        volume: VolumeName,
        /// The last set that is there.
        last: SetNumber,
    },
    /// The journal begins after groups that no checkpoint covers.
    #[error(
        "the journal begins at group {journal}, but the plain trees hold group {tree} only: its start is gone"
    )]
    Begun {
        /// The first group of the journal.
        journal: GroupNumber,
        /// The last group of the checkpoint.
        tree: GroupNumber,
    },
    /// The plain trees hold a group whose COMMIT is not in the journal: its end, or all of it, is gone.
    #[error(
        "the journal ends at group {journal}, but the plain trees hold group {tree}: the journal has lost its end"
    )]
    Behind {
        /// The last group of the journal.
        journal: GroupNumber,
        /// The last group of the checkpoint.
        tree: GroupNumber,
    },
    /// A checkpoint had begun to write groups that are not in the journal.
    #[error(
        "the journal ends at group {journal}, but a checkpoint had begun to write later ones into the plain trees"
    )]
    Torn {
        /// The last group of the journal.
        journal: GroupNumber,
    },
    /// The image cannot take a group.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl RecoveryError {
    /// Whether the journal is not what was written. What the disk or the system refuses is no damage.
    pub(super) const fn is_damage(&self) -> bool {
        match self {
            Self::Journal(error) => error.is_damage(),
            Self::Image(error) => matches!(error, ImageError::Gap { .. }),
            Self::Volume(_) => false,
            Self::Set { .. }
            | Self::Contradiction(_)
            | Self::Incomplete { .. }
            | Self::Lost { .. }
            | Self::Begun { .. }
            | Self::Torn { .. }
            | Self::Behind { .. } => true,
        }
    }
}

/// A record set that stands in the journal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Journaled {
    pub(super) hash: SetHash,
    pub(super) last_seq: Seq,
    pub(super) end: Timestamp,
    pub(super) at: SetLocation,
}

/// For each volume, the sets in the journal that no checkpoint covers, and the point of its chain up to which every set
/// is in committed groups.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    pub(super) sets: BTreeMap<SetNumber, Journaled>,
    pub(super) base: Option<(ChainPoint, Timestamp)>,
    pub(super) through: Seq,
    pub(super) member: bool,
}

impl Tracked {
    /// Moves the base over the sets that a commit through `through` covers.
    pub(super) fn commit(&mut self, through: Seq) {
        self.base = Some(self.base_after(through));
        self.through = through;
    }

    /// The base as it will be when everything through `through` is committed.
    pub(super) fn base_after(&self, through: Seq) -> (ChainPoint, Timestamp) {
        let start = self.base.unwrap_or((ChainPoint::START, Timestamp::ZERO));
        let next = start.0.number.next();
        let covered = self.sets.range(next..).take_while(|(_, set)| set.last_seq <= through);
        covered.last().map_or(start, |(number, set)| {
            (ChainPoint { number: *number, hash: set.hash, last_seq: set.last_seq }, set.end)
        })
    }

    /// Forgets sets that count no longer.
    pub(super) fn withdraw(&mut self, numbers: &[SetNumber]) {
        self.sets.retain(|number, _| !numbers.contains(number));
    }

    /// Forgets the sets that a checkpoint up to `seq` covers.
    pub(super) fn checkpointed(&mut self, seq: Seq) {
        self.sets.retain(|_, set| set.last_seq > seq);
    }
}

/// What a recovery gives back.
#[derive(Debug)]
pub(super) struct Restored {
    pub(super) receiver: Receiver,
    pub(super) tracked: Vec<Tracked>,
}

/// Replays the journal: groups into the image, what is in no group into the receiver.
pub(super) fn restore(
    state: &State,
    recovery: Recovery,
    image: &Image,
    image_index: &[VolumeIndex],
    ordering: Ordering,
    now_ns: u64,
) -> Result<Restored, RecoveryError> {
    let mut replay = Replay::new(state, image, image_index, now_ns);
    for recovered in recovery {
        replay.take(recovered?)?;
    }
    replay.finish(ordering)
}

/// Applies the groups of a damaged journal, as far as all that belongs to them is there. Returns the last commit of them,
/// or of those that were trimmed.
pub(super) fn salvage(
    state: &State,
    recovery: Recovery,
    image: &Image,
    image_index: &[VolumeIndex],
    now_ns: u64,
) -> Result<Option<Commit>, RecoveryError> {
    let mut replay = Replay::new(state, image, image_index, now_ns);
    for recovered in recovery {
        match recovered.map_err(RecoveryError::from).and_then(|recovered| replay.take(recovered)) {
            Err(error) if error.is_damage() => break,
            taken => taken?,
        }
    }
    Ok(replay.last)
}

/// A replica that has no journal yet.
pub(super) fn fresh(state: &State, ordering: Ordering) -> Restored {
    let paired = state.session.map(|session| (session, state.epoch));
    let state = ReceiverState { paired, role: state.role, ..ReceiverState::UNPAIRED };
    Restored { receiver: Receiver::restore(state, ordering), tracked: Vec::new() }
}

type WaitingSet = (VerifiedSet, Arc<SetMeta>, SetLocation);

struct Replay<'a> {
    state: &'a State,
    image: &'a Image,
    image_index: &'a [VolumeIndex],
    tracked: Vec<Tracked>,
    /// Sets with updates that are in no group so far.
    waiting: Vec<BTreeMap<SetNumber, WaitingSet>>,
    group: GroupNumber,
    time: Timestamp,
    /// The last commit of which everything was there.
    last: Option<Commit>,
    now_ns: u64,
}

impl<'a> Replay<'a> {
    fn new(state: &'a State, image: &'a Image, image_index: &'a [VolumeIndex], now_ns: u64) -> Self {
        let mut replay = Self {
            state,
            image,
            image_index,
            tracked: state.received.iter().map(|_| Tracked::default()).collect(),
            waiting: state.received.iter().map(|_| BTreeMap::new()).collect(),
            group: GroupNumber(0),
            time: Timestamp::ZERO,
            last: None,
            now_ns,
        };
        for (_, name, volume) in image.volumes() {
            if let Some(at) = state.received.iter().position(|received| received.name == name) {
                replay.tracked[at].member = volume.member;
                replay.tracked[at].through = volume.seq;
            }
        }
        replay
    }

    fn take(&mut self, recovered: Recovered) -> Result<(), RecoveryError> {
        match recovered {
            Recovered::Set { at, bytes } => self.set(at, bytes),
            Recovered::Standing(commit) => self.standing(&commit),
            Recovered::Commit(commit) => self.commit(&commit),
            Recovered::Withdrawn(withdrawn) => self.withdrawn(&withdrawn),
            // Whether it is missed turns out with the groups.
            Recovered::Rotten => Ok(()),
        }
    }

    fn index(&self, name: &VolumeName) -> Result<usize, RecoveryError> {
        let found = self.state.received.iter().position(|received| received.name == *name);
        found.ok_or_else(|| RecoveryError::Volume(name.to_string()))
    }

    fn set(&mut self, at: SetLocation, bytes: bytes::Bytes) -> Result<(), RecoveryError> {
        let bad = |error| RecoveryError::Set { at, error };
        let set = UnverifiedSet(bytes).verify().map_err(bad)?;
        let meta = set.meta().map_err(bad)?;
        let header = set.header();
        let volume = self.index(&header.volume)?;
        let journaled = Journaled { hash: set.hash(), last_seq: header.last_seq(), end: header.end, at };
        self.tracked[volume].sets.insert(header.number, journaled);
        self.waiting[volume].insert(header.number, (set, Arc::new(meta), at));
        Ok(())
    }

    fn withdrawn(&mut self, withdrawn: &Withdrawn) -> Result<(), RecoveryError> {
        let volume = self.index(&withdrawn.volume)?;
        self.tracked[volume].withdraw(&withdrawn.numbers);
        self.waiting[volume].retain(|number, _| !withdrawn.numbers.contains(number));
        Ok(())
    }

    /// A commit whose sets were trimmed: the checkpoint has all of it.
    fn standing(&mut self, commit: &Commit) -> Result<(), RecoveryError> {
        for volume in &commit.volumes {
            let index = self.index(&volume.volume)?;
            if self.have(self.image_index[index]) < volume.through {
                let tree = self.image.checkpointed().group;
                return Err(RecoveryError::Begun { journal: commit.group, tree });
            }
            let tracked = &mut self.tracked[index];
            tracked.base = Some(base_of(volume));
            tracked.through = tracked.through.max(volume.through);
            tracked.member |= volume.member;
        }
        (self.group, self.time) = (commit.group, commit.time);
        self.last = Some(commit.clone());
        Ok(())
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), RecoveryError> {
        let mut group = Group { number: commit.group, time: commit.time, ..Group::default() };
        for volume in &commit.volumes {
            let index = self.index(&volume.volume)?;
            let image = self.image_index[index];
            let last = self.fold_into(&mut group, index, image, volume.through);
            let have = self.have(image);
            if last.max(have) < volume.through {
                let volume = volume.volume.to_string();
                return Err(RecoveryError::Incomplete { group: commit.group, volume, last: last.max(have) });
            }
            let tracked = &mut self.tracked[index];
            tracked.base = Some(base_of(volume));
            tracked.through = volume.through;
            if volume.member && !tracked.member {
                tracked.member = true;
                group.joins.push(image);
            }
        }
        (self.group, self.time) = (commit.group, commit.time);
        // A group that shows already, in the checkpoint or above it, must not move the view back.
        if commit.group > self.image.view().group() {
            self.image.apply_group(&group)?;
            failpoint::pass(FailPoint::Replayed);
            if self.image.checkpoint_due(self.now_ns) {
                self.image.checkpoint()?;
            }
        }
        self.last = Some(commit.clone());
        Ok(())
    }

    /// The last update of a volume that the image has.
    fn have(&self, image: VolumeIndex) -> Seq {
        self.image.volumes().iter().find(|(at, ..)| *at == image).map_or(Seq::ZERO, |(.., state)| state.seq)
    }

    /// Adds the updates of a volume up to `through` that the image lacks; returns the last update at hand.
    fn fold_into(&mut self, group: &mut Group, index: usize, image: VolumeIndex, through: Seq) -> Seq {
        let mut updates = Vec::new();
        let mut last = Seq::ZERO;
        for (_, meta, at) in self.waiting[index].values() {
            for (update, offset) in meta.updates.iter().take_while(|(update, _)| update.stamp.seq <= through)
            {
                last = update.stamp.seq;
                updates.push((update.clone(), data_ref(update, *at, *offset)));
            }
        }
        self.waiting[index].retain(|_, (set, ..)| set.header().last_seq() > through);
        group.volumes.push((image, updates));
        last
    }

    fn finish(self, ordering: Ordering) -> Result<Restored, RecoveryError> {
        // Each segment starts with the last commit, so no trim takes it away, and no group is checkpointed before its
        // commit is durable.
        let tree = self.image.checkpointed().group;
        if tree > self.group {
            return Err(RecoveryError::Behind { journal: self.group, tree });
        }
        // Until a repair is complete that is known.
        let is_known = self.state.repair.as_ref().is_some_and(|repair| repair.torn);
        if self.image.is_incomplete() && !is_known {
            return Err(RecoveryError::Torn { journal: self.group });
        }
        let volumes = self.state.received.iter().zip(&self.tracked).map(|(received, tracked)| {
            let (base, base_end) = tracked.base.unwrap_or((ChainPoint::START, Timestamp::ZERO));
            ReceiverVolume {
                name: received.name.clone(),
                instance: received.instance,
                root: received.root,
                member: tracked.member,
                base,
                base_end,
                through: tracked.through,
            }
        });
        let state = ReceiverState {
            paired: self.state.session.map(|session| (session, self.state.epoch)),
            role: self.state.role,
            group: self.group,
            time: self.time,
            volumes: volumes.collect(),
        };
        let mut receiver = Receiver::restore(state, ordering);
        let mut rest: Vec<_> = self.waiting.into_iter().flat_map(BTreeMap::into_values).collect();
        rest.sort_by_key(|(.., at)| *at);
        for (set, meta, at) in rest {
            let meta = Arc::try_unwrap(meta).unwrap_or_else(|shared| (*shared).clone());
            receiver.restore_set(set.header(), set.hash(), meta, at)?;
        }
        receiver.check_restored().map_err(|(volume, last)| RecoveryError::Lost { volume, last })?;
        Ok(Restored { receiver, tracked: self.tracked })
    }
}

/// The point of a volume's chain that a commit names.
fn base_of(volume: &CommitVolume) -> (ChainPoint, Timestamp) {
    let base = volume.base;
    (ChainPoint { number: base.number, hash: base.hash, last_seq: base.last_seq }, base.end)
}

/// Where an update's data stands, if it has any.
pub(super) fn data_ref(update: &Update, at: SetLocation, offset: u32) -> Option<DataRef> {
    (update.op.data_len() > 0).then_some(DataRef { set: at, offset })
}
