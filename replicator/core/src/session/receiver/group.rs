//! Forming consistency groups.
//!
//! A group is cut at the largest time that every member volume has delivered. A volume that is being copied does not
//! hold the others back, and whatever it has delivered before its *complete* mark goes along, unseen. At the first
//! group whose time reaches the mark, and up to whose time the volume itself has delivered everything, it joins: that
//! group then holds all its updates up to the group's time, as of every other member.
//!
//! A member that is being resynced is not whole until its *complete* mark: from the last instant on up to which it had delivered
//! everything before the *resync* mark came, for what was let go since then has no stamp. No group is cut in between, on
//! any volume: everything up to the complete mark becomes one group, and until then the replica shows what it showed, as of
//! the time of which that was true.

use std::ops::Range;
use std::sync::Arc;

use super::volume::{Held, Volume};
use super::{Ordering, Receiver, Unknown};
use crate::delta::SetLocation;
use crate::id::{GroupNumber, SetNumber, VolumeIndex};
use crate::record_set::SetMeta;
use crate::session::Role;
use crate::stamp::{Seq, Timestamp};

/// What belongs into a consistency group: the contents of a COMMIT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlan {
    /// Its number: one more than that of the group before it.
    pub number: GroupNumber,
    /// The consistency time once it is shown: never less than that of the group before it, equal if no member volume
    /// has an update in it. Zero as long as no volume has joined.
    pub time: Timestamp,
    /// The volumes with updates in it, in the order of their indices.
    pub volumes: Vec<GroupVolume>,
    /// Volumes that become members, and so visible, with it.
    pub joins: Vec<VolumeIndex>,
}

/// A volume's part of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupVolume {
    /// The volume.
    pub volume: VolumeIndex,
    /// Sequence number of its last update in this group.
    pub through: Seq,
    /// The sets, or parts of sets, to fold in this order.
    pub sets: Vec<GroupSet>,
}

/// A set's part of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSet {
    /// The set.
    pub number: SetNumber,
    /// Which of its updates, as a range of [`SetMeta::updates`]: a group may end within a set.
    pub range: Range<usize>,
    /// The set's metadata.
    pub meta: Arc<SetMeta>,
    /// Where the set stands in the journal.
    pub at: SetLocation,
}

/// What has to be done when the planned group is committed.
#[derive(Debug)]
pub(super) struct Planned {
    number: GroupNumber,
    time: Timestamp,
    /// For each part of a set: its volume, its number, and how many of its updates are then in committed groups.
    parts: Vec<(VolumeIndex, SetNumber, usize)>,
    joins: Vec<VolumeIndex>,
}

impl Receiver {
    /// The next group, if one can be formed and none is under way. Ask after [`handle_appended`](Self::handle_appended),
    /// after a null set and after [`handle_committed`](Self::handle_committed).
    ///
    /// A driver that asks less often gets larger groups. If there is nothing to commit, this may still move the
    /// consistency time: ask [`poll_progress`](Self::poll_progress), too.
    pub fn poll_group(&mut self) -> Option<GroupPlan> {
        if self.planned.is_some() || self.role != Role::Replica {
            return None;
        }
        let (time, joins) = self.cut();
        let mut plan = GroupPlan { number: self.group.next(), time, volumes: Vec::new(), joins };
        for (index, volume) in (0..).map(VolumeIndex).zip(&self.volumes) {
            let sets = match self.ordering {
                Ordering::ByArrival if volume.member => arrived(volume),
                _ if volume.member || plan.joins.contains(&index) => delivered(volume, |at| at <= time),
                // Not the mark itself: it belongs to the group with which the volume joins.
                _ => delivered(volume, |at| volume.complete.is_none_or(|mark| at < mark)),
            };
            if let Some(through) = sets.iter().map(GroupSet::through).max() {
                plan.volumes.push(GroupVolume { volume: index, through, sets });
            }
        }
        if plan.volumes.is_empty() && plan.joins.is_empty() {
            self.progress_due |= self.connected && time > self.visible;
            self.visible = time;
            return None;
        }
        let part = |volume: VolumeIndex, set: &GroupSet| (volume, set.number, set.range.end);
        self.planned = Some(Planned {
            number: plan.number,
            time,
            parts: plan.volumes.iter().flat_map(|v| v.sets.iter().map(move |s| part(v.volume, s))).collect(),
            joins: plan.joins.clone(),
        });
        Some(plan)
    }

    /// The planned group's COMMIT is durable, and so is everything before it in the journal. It may be shown now.
    ///
    /// # Errors
    /// [`Unknown`] if it is not the planned group.
    pub fn handle_committed(&mut self, number: GroupNumber) -> Result<(), Unknown> {
        let planned = self.planned.take_if(|planned| planned.number == number).ok_or(Unknown)?;
        for (index, set, grouped) in planned.parts {
            let volume = &mut self.volumes[index.as_usize()];
            let held =
                volume.sets.get_mut(&set.0).expect("a set stays until its updates are in committed groups");
            held.grouped = grouped;
            volume.through = volume.through.max(held.meta.updates[grouped - 1].0.stamp.seq);
            self.handle_durable(index, set).expect("only appended sets are in groups");
        }
        for index in planned.joins {
            let volume = &mut self.volumes[index.as_usize()];
            volume.member = true;
            volume.complete = None;
        }
        for volume in &mut self.volumes {
            volume.forget_resyncs(planned.time);
            self.held_bytes -= volume.prune();
            volume.tokens.drop_through(volume.through.min(volume.chain.last_seq));
        }
        self.group = planned.number;
        self.tree_whole = false;
        self.visible = planned.time;
        self.progress_due |= self.connected;
        Ok(())
    }

    /// The time of the next group, and the volumes that join with it.
    fn cut(&self) -> (Timestamp, Vec<VolumeIndex>) {
        // Never before what is visible: a volume that is behind that cannot join yet.
        let candidates = || {
            let volumes = (0..).map(VolumeIndex).zip(&self.volumes);
            volumes.filter(|(_, volume)| volume.frontier >= self.visible && !volume.member)
        };
        let joining = candidates().filter(|(_, volume)| volume.complete.is_some());
        let frontiers = self.members().chain(joining.map(|(_, volume)| volume)).map(|volume| volume.frontier);
        let mut time = frontiers.min().unwrap_or(self.visible);
        if self.ordering == Ordering::ByArrival {
            let newest =
                self.members().flat_map(|volume| volume.sets.values()).filter(|held| held.at.is_some());
            time = newest.map(|held| held.end).fold(time.max(self.visible), Timestamp::max);
            return (time, self.joining(time));
        }
        // Each step leads to a time before some resync, so this ends.
        while let Some(whole) = self.members().map(|volume| volume.whole_at(time)).find(|whole| *whole < time)
        {
            time = whole;
        }
        // A candidate whose mark is later than that was not the minimum, as its frontier is past its mark. So leaving
        // it out does not change the time.
        (time, self.joining(time))
    }

    /// The volumes that join with a group of that time.
    fn joining(&self, time: Timestamp) -> Vec<VolumeIndex> {
        let volumes = (0..).map(VolumeIndex).zip(&self.volumes);
        let joins = volumes.filter(|(_, volume)| {
            !volume.member
                && volume.frontier >= self.visible
                && volume.complete.is_some_and(|mark| mark <= time)
        });
        joins.map(|(index, _)| index).collect()
    }
}

impl GroupSet {
    /// The rest of a set, as far as `wanted`; `None` if that is nothing.
    fn of(number: u64, held: &Held, wanted: impl Fn(Timestamp) -> bool) -> Option<Self> {
        let end = held.meta.updates.partition_point(|(update, _)| wanted(update.stamp.time));
        (held.grouped < end).then(|| Self {
            number: SetNumber(number),
            range: held.grouped..end,
            meta: Arc::clone(&held.meta),
            at: held.at.expect("the chain only holds sets that stand in the journal"),
        })
    }

    fn through(&self) -> Seq {
        self.meta.updates[self.range.end - 1].0.stamp.seq
    }
}

/// What of a volume's chain is wanted, which is a prefix of it.
fn delivered(volume: &Volume, wanted: impl Fn(Timestamp) -> bool) -> Vec<GroupSet> {
    let chain = volume.sets.range(..=volume.chain.number.0).filter(|(_, held)| !held.is_grouped());
    chain.map_while(|(number, held)| GroupSet::of(*number, held, &wanted)).collect()
}

/// Everything at hand, gaps or not, as it came.
fn arrived(volume: &Volume) -> Vec<GroupSet> {
    let mut sets: Vec<_> = volume.sets.iter().filter(|(_, held)| held.at.is_some()).collect();
    sets.sort_by_key(|(_, held)| held.arrival);
    sets.into_iter().filter_map(|(number, held)| GroupSet::of(*number, held, |_| true)).collect()
}
