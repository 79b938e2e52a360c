//! The simulated replica: a journal of which a crash may take the tail, checkpoints that trim it, and the receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use twinfs_core::delta::SetLocation;
use twinfs_core::id::{Epoch, SetNumber, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::ChainPoint;
use twinfs_core::session::receiver::{
    GroupPlan, Ordering, Receiver, ReceiverState, ReceiverVolume, SetRefusal, Verdict,
};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::{Message, PromoteReady};

use super::network::Packet;
use crate::session_common::{Change, REPLICA, Rng, TestSet, canonical, volume_name};

enum Entry {
    Set(VolumeIndex, Arc<TestSet>),
    Commit(GroupPlan),
}

/// What programs at the replica see: how many updates of each volume, and what the last group says.
#[derive(Clone, Default)]
struct View {
    shown: Vec<u64>,
    group: u64,
    time: Timestamp,
}

pub(crate) struct Replica {
    receiver: Receiver,
    ordering: Ordering,
    journal: BTreeMap<u64, Entry>,
    appended: u64,
    /// The last entry that no crash can take.
    synced: u64,
    /// Up to where the sync that runs will reach.
    syncing: Option<u64>,
    /// What the last checkpoint recorded, with the view of then.
    checkpoint: ReceiverState,
    checkpoint_view: View,
    view: View,
    durable: BTreeSet<(usize, SetNumber)>,
    lazy_percent: u64,
    pub(crate) promote_ready: Option<PromoteReady>,
    last_set: Option<Arc<TestSet>>,
}

impl Replica {
    pub(crate) fn new(rng: &mut Rng, ordering: Ordering) -> Self {
        Self {
            receiver: Receiver::restore(ReceiverState::UNPAIRED, ordering),
            ordering,
            journal: BTreeMap::new(),
            appended: 0,
            synced: 0,
            syncing: None,
            checkpoint: ReceiverState::UNPAIRED,
            checkpoint_view: View::default(),
            view: View::default(),
            durable: BTreeSet::new(),
            lazy_percent: rng.below(60),
            promote_ready: None,
            last_set: None,
        }
    }

    pub(crate) fn has_durable(&self, volume: usize, number: SetNumber) -> bool {
        self.durable.contains(&(volume, number))
    }

    pub(crate) fn handle(
        &mut self,
        now: u64,
        packet: Packet,
        trace: &mut String,
    ) -> Result<Option<Packet>, String> {
        match packet {
            Packet::Set(set) => self.handle_set(now, set, trace).map(|()| None),
            Packet::Tokens(volume, tokens) => {
                self.receiver.handle_tokens(&volume_name(volume), tokens).map_err(|e| e.to_string())?;
                Ok(None)
            }
            Packet::Message(bytes) => match Message::decode(&bytes).map_err(|e| e.to_string())? {
                Message::Hello(hello) => Ok(Some(self.answer(now, &hello, trace))),
                Message::PromoteReady(ready) => {
                    self.promote_ready = Some(ready);
                    Ok(None)
                }
                other => Err(format!("unexpected at the replica: {other:?}")),
            },
        }
    }

    fn answer(&mut self, now: u64, hello: &twinfs_core::wire::Hello, trace: &mut String) -> Packet {
        let adoption = match self.receiver.handle_hello(hello) {
            Ok(adoption) => adoption,
            Err(refuse) => {
                trace.push_str(&format!("{now} replica refuses: {}\n", refuse.text));
                return Packet::of(&Message::Refuse(refuse));
            }
        };
        // Durable before the welcome.
        self.checkpoint.paired = Some((adoption.session, adoption.epoch));
        for new in &adoption.volumes {
            self.checkpoint.volumes.push(ReceiverVolume {
                name: new.name.clone(),
                instance: new.instance,
                root: new.root,
                member: false,
                base: ChainPoint::START,
                base_end: Timestamp::ZERO,
                through: Seq::ZERO,
            });
            self.checkpoint_view.shown.push(0);
            self.view.shown.push(0);
        }
        Packet::of(&Message::Welcome(self.receiver.handle_connected(&adoption)))
    }

    fn handle_set(&mut self, now: u64, set: Arc<TestSet>, trace: &mut String) -> Result<(), String> {
        let before = self.receiver.sets_out_of_order();
        let verdict = self.receiver.handle_set(&set.header, set.hash, set.meta.clone());
        if self.receiver.sets_out_of_order() > before {
            trace.push_str(&format!("{now} out of order\n"));
        }
        let (volume, number) = (&set.header.volume, set.header.number);
        match verdict {
            Ok(Verdict::Append(index)) => {
                self.appended += 1;
                trace.push_str(&format!("{now} journal {} has {volume} {number}\n", self.appended));
                self.journal.insert(self.appended, Entry::Set(index, Arc::clone(&set)));
                let at = SetLocation { segment: 1, offset: self.appended };
                self.receiver.handle_appended(index, number, at).map_err(|e| e.to_string())?;
                self.last_set = Some(set);
            }
            Ok(Verdict::Duplicate(_)) => trace.push_str(&format!("{now} duplicate {volume} {number}\n")),
            Ok(Verdict::Null(_)) => {
                trace.push_str(&format!("{now} null {volume} {number} to {}\n", set.header.end.0));
            }
            Err(SetRefusal::TooOld { .. }) => {}
            Err(SetRefusal::Fenced { .. }) if self.receiver.role() != twinfs_core::session::Role::Replica => {
                trace.push_str(&format!("{now} fenced {volume} {number}\n"));
            }
            Err(refusal) => return Err(format!("refusal: {refusal}")),
        }
        Ok(())
    }

    /// Lets groups form; returns what is to be sent, and whether a sync is to be started.
    pub(crate) fn step(&mut self, rng: &mut Rng, now: u64, trace: &mut String) -> (Vec<Packet>, bool) {
        if !rng.chance(self.lazy_percent)
            && let Some(plan) = self.receiver.poll_group()
        {
            let within =
                plan.volumes.iter().flat_map(|v| &v.sets).any(|s| s.range.end < s.meta.updates.len());
            let within = if within { ", within a set" } else { "" };
            trace.push_str(&format!("{now} group {} at {}{within}\n", plan.number, plan.time.0));
            for joined in &plan.joins {
                trace.push_str(&format!("{now} volume {} joins\n", joined.0));
            }
            self.appended += 1;
            self.journal.insert(self.appended, Entry::Commit(plan));
        }
        let mut packets = Vec::new();
        while let Some(ack) = self.receiver.poll_ack() {
            packets.push(Packet::of(&Message::Ack(ack)));
        }
        if let Some(progress) = self.receiver.poll_progress() {
            packets.push(Packet::of(&Message::Progress(progress)));
        }
        let start = self.syncing.is_none() && self.appended > self.synced;
        if start {
            self.syncing = Some(self.appended);
        }
        (packets, start)
    }

    /// A sync is done: what was appended before it began is durable.
    pub(crate) fn handle_synced(&mut self) -> Result<(), String> {
        let Some(through) = self.syncing.take() else { return Ok(()) };
        let entries = self.journal.range(self.synced + 1..=through);
        let mut commits = Vec::new();
        for (_, entry) in entries {
            match entry {
                Entry::Set(index, set) => {
                    self.durable.insert((canonical(&set.header.volume), set.header.number));
                    self.receiver.handle_durable(*index, set.header.number).map_err(|e| e.to_string())?;
                }
                Entry::Commit(plan) => commits.push(plan.clone()),
            }
        }
        self.synced = through;
        for plan in commits {
            self.receiver.handle_committed(plan.number).map_err(|e| e.to_string())?;
            self.show(&plan)?;
        }
        Ok(())
    }

    /// Applies a group to the view, which must be what comes next.
    fn show(&mut self, plan: &GroupPlan) -> Result<(), String> {
        if plan.number.0 != self.view.group + 1 || plan.time < self.view.time {
            return Err(format!(
                "prefix: group {} at {} comes after {}",
                plan.number, plan.time.0, self.view.group
            ));
        }
        (self.view.group, self.view.time) = (plan.number.0, plan.time);
        for volume in &plan.volumes {
            let shown = &mut self.view.shown[volume.volume.as_usize()];
            for update in volume.sets.iter().flat_map(|set| &set.meta.updates[set.range.clone()]) {
                if update.0.stamp.seq.0 != *shown + 1 {
                    return Err(format!("prefix: update {} comes after #{shown}", update.0.stamp));
                }
                *shown += 1;
            }
        }
        Ok(())
    }

    /// Compares what is shown with what the programs did.
    pub(crate) fn check(&self, changes: &[Vec<Change>], marks: &[Option<usize>]) -> Result<(), String> {
        let progress = self.receiver.progress();
        if progress.group.0 != self.view.group {
            return Err(format!("atomicity: group {} is shown as {}", self.view.group, progress.group));
        }
        for (index, name, member) in self.receiver.volumes() {
            let volume = canonical(name);
            let shown = self.view.shown[index.as_usize()] as usize;
            let want = changes[volume].partition_point(|change| change.time <= progress.time.0);
            if member && shown != want {
                return Err(format!("prefix: {name} shows {shown} of {want} updates at {}", progress.time.0));
            }
            let shown = &changes[volume][..shown];
            let last_mark = shown.iter().rfind(|change| change.complete || change.resync);
            if member && last_mark.is_some_and(|mark| mark.resync) {
                return Err(format!("whole: {name} is shown in the middle of a resync"));
            }
            let resynced = changes[volume].iter().any(|change| change.resync);
            if !member && !resynced && marks[volume].is_some_and(|mark| shown.len() > mark) {
                return Err(format!("prefix: {name} is past its mark and has not joined"));
            }
        }
        let room = limits::HELD_BYTES_MAX;
        if self.receiver.held_bytes() > room {
            return Err(format!("bounds: {} bytes are held", self.receiver.held_bytes()));
        }
        Ok(())
    }

    pub(crate) fn disconnect(&mut self) {
        self.receiver.handle_disconnected();
        self.promote_ready = None;
    }

    /// A checkpoint: what is in committed groups need not stand in the journal any more.
    pub(crate) fn trim(&mut self, now: u64, trace: &mut String) {
        let progress = self.receiver.progress();
        self.checkpoint.group = progress.group;
        self.checkpoint.time = self.view.time;
        let members: Vec<bool> = self.receiver.volumes().map(|(_, _, member)| member).collect();
        for (at, volume) in self.checkpoint.volumes.iter_mut().enumerate() {
            let base = self.receiver.base(VolumeIndex(at as u16)).expect("the volume exists");
            (volume.base, volume.base_end) = base;
            volume.member = members[at];
            volume.through = Seq(self.view.shown[at]);
        }
        self.checkpoint_view = self.view.clone();
        let before = self.journal.len();
        self.journal.retain(|at, entry| match entry {
            Entry::Set(index, set) => {
                *at > self.synced || set.header.number > self.checkpoint.volumes[index.as_usize()].base.number
            }
            Entry::Commit(plan) => plan.number > progress.group,
        });
        let gone = before - self.journal.len();
        if gone > 0 {
            trace.push_str(&format!("{now} {gone} entries trimmed\n"));
        }
    }

    /// The site dies and starts again, from what is durable and perhaps some of what was not yet.
    pub(crate) fn crash(&mut self, rng: &mut Rng) -> Result<(), String> {
        let shown_before = (self.view.group, self.receiver.progress().group.0);
        let survives = self.synced + rng.below(self.appended - self.synced + 1);
        self.journal.retain(|at, _| *at <= survives);
        (self.appended, self.synced, self.syncing) = (survives, survives, None);
        self.promote_ready = None;
        let mut state = self.checkpoint.clone();
        self.view = self.checkpoint_view.clone();
        let plans: Vec<GroupPlan> = self.journal.values().filter_map(commit).cloned().collect();
        for plan in &plans {
            self.show(plan)?;
            (state.group, state.time) = (plan.number, plan.time);
            for volume in &plan.volumes {
                state.volumes[volume.volume.as_usize()].through = volume.through;
            }
            for joined in &plan.joins {
                state.volumes[joined.as_usize()].member = true;
            }
        }
        self.receiver = Receiver::restore(state, self.ordering);
        for (at, entry) in &self.journal {
            if let Entry::Set(_, set) = entry {
                let location = SetLocation { segment: 1, offset: *at };
                self.durable.insert((canonical(&set.header.volume), set.header.number));
                self.receiver
                    .restore_set(&set.header, set.hash, set.meta.clone(), location)
                    .map_err(|e| format!("restore: {e}"))?;
            }
        }
        self.receiver.check_restored().map_err(|(name, at)| format!("restore: {name} ends at {at}"))?;
        if self.view.group < shown_before.0.max(shown_before.1) {
            return Err(format!(
                "prefix: a shown group is gone: {shown_before:?} before, {}",
                self.view.group
            ));
        }
        Ok(())
    }

    /// Whether a planned promote may be done.
    pub(crate) fn has_reached(&self) -> bool {
        self.promote_ready.as_ref().is_some_and(|ready| self.receiver.has_reached(ready))
    }

    /// Takes over, if there is something to take over. A set of the old epoch that comes late is refused.
    pub(crate) fn promote(&mut self) -> Result<Option<Epoch>, String> {
        let Some((_, known)) = self.receiver.paired() else { return Ok(None) };
        let epoch = Epoch { number: known.number + 1, site: REPLICA };
        if self.receiver.promote(epoch).is_err() {
            return Ok(None);
        }
        if let Some(set) = self.last_set.clone() {
            let verdict = self.receiver.handle_set(&set.header, set.hash, set.meta.clone());
            if !matches!(verdict, Err(SetRefusal::Fenced { .. })) {
                return Err(format!("fence: a set of the old epoch: {verdict:?}"));
            }
        }
        match self.receiver.poll_group() {
            None => Ok(Some(epoch)),
            Some(plan) => Err(format!("fence: group {} forms after the promote", plan.number)),
        }
    }

    pub(crate) fn bare_tokens(&self) -> u64 {
        self.receiver.bare_tokens().count
    }
}

fn commit(entry: &Entry) -> Option<&GroupPlan> {
    match entry {
        Entry::Commit(plan) => Some(plan),
        Entry::Set(..) => None,
    }
}
