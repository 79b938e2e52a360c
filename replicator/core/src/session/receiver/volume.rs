//! One volume at the replica: its chain, and the sets that are held.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::tokens::Tokens;
use super::{ReceiverVolume, SetRefusal, Unknown};
use crate::delta::SetLocation;
use crate::id::{FileId, SetHash, SetNumber, VolumeInstance, VolumeName};
use crate::limits;
use crate::record_set::{SetHeader, SetMeta};
use crate::session::ChainPoint;
use crate::stamp::{Seq, Timestamp};
use crate::token::Token;
use crate::update::{Op, Update};

/// A set that is not yet altogether durable, without a gap before it, and in committed groups.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) hash: SetHash,
    predecessor: SetHash,
    first_seq: Seq,
    pub(super) last_seq: Seq,
    start: Timestamp,
    pub(super) end: Timestamp,
    pub(super) meta: Arc<SetMeta>,
    charge: usize,
    /// Where it stands in the journal, once it does.
    pub(super) at: Option<SetLocation>,
    pub(super) durable: bool,
    /// How many of its updates are in committed groups.
    pub(super) grouped: usize,
    /// Its place in the order of arrival.
    pub(super) arrival: u64,
}

impl Held {
    /// What holding a set costs, in bytes.
    pub(super) fn charge(meta: &SetMeta, header: &SetHeader) -> usize {
        limits::HELD_SET_BYTES + meta.updates.len() * size_of::<(Update, u32)>() + header.meta_len as usize
    }

    pub(super) fn is_grouped(&self) -> bool {
        self.grouped == self.meta.updates.len()
    }

    fn first_time(&self) -> Timestamp {
        self.meta.updates[0].0.stamp.time
    }

    fn begins_resync(&self) -> bool {
        matches!(self.meta.updates[0].0.op, Op::Resync)
    }
}

/// A null set that waits for the sets that it follows.
#[derive(Debug)]
struct PendingNull {
    number: SetNumber,
    hash: SetHash,
    last_seq: Seq,
    end: Timestamp,
}

/// A time in which a volume is not whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resync {
    /// The last instant up to which everything has come. What was let go before the mark may have happened right after it,
    /// and has no stamp.
    pub(super) whole: Timestamp,
    /// Stamp time of the mark that says that the volume is whole again, once that is here.
    pub(super) end: Option<Timestamp>,
}

/// What a set with that number is to a volume.
pub(super) enum Place {
    /// Not seen before, and it fits what is known.
    New,
    /// At hand already.
    Known { durable: bool },
    /// So old that its hash is not remembered: long in committed groups.
    Old,
}

#[derive(Debug)]
pub(super) struct Volume {
    pub(super) name: VolumeName,
    pub(super) instance: VolumeInstance,
    pub(super) root: FileId,
    pub(super) member: bool,
    /// The end of what stands in the journal without a gap.
    pub(super) chain: ChainPoint,
    chain_end: Timestamp,
    /// The end of what is durable without a gap; at or before `chain`.
    pub(super) durable: ChainPoint,
    /// Every update up to here has been delivered: the end of the chain, moved on by null sets.
    pub(super) frontier: Timestamp,
    null: Option<PendingNull>,
    /// By number; at most [`limits::PENDING_SETS_MAX`] past `durable`, and those before that are not grouped.
    pub(super) sets: BTreeMap<u64, Held>,
    /// Hashes of the last sets up to `chain`, the newest last.
    hashes: VecDeque<SetHash>,
    /// While it is copied: stamp time of the first mark in the chain that says that the volume is whole.
    pub(super) complete: Option<Timestamp>,
    /// Its resyncs in the chain that are not in committed groups, in order; only the last one can be open.
    pub(super) resyncs: Vec<Resync>,
    pub(super) through: Seq,
    pub(super) base: ChainPoint,
    pub(super) base_end: Timestamp,
    pub(super) tokens: Tokens,
}

impl Volume {
    pub(super) fn restore(state: ReceiverVolume, time: Timestamp) -> Self {
        Self {
            name: state.name,
            instance: state.instance,
            root: state.root,
            member: state.member,
            chain: state.base,
            chain_end: state.base_end,
            durable: state.base,
            // A member had delivered everything up to the group's time, be it by null sets that are gone.
            frontier: if state.member { state.base_end.max(time) } else { state.base_end },
            null: None,
            sets: BTreeMap::new(),
            hashes: VecDeque::from([state.base.hash]),
            complete: None,
            resyncs: Vec::new(),
            through: state.through.max(state.base.last_seq),
            base: state.base,
            base_end: state.base_end,
            tokens: Tokens::default(),
        }
    }

    pub(super) fn diverged(&self, number: SetNumber, what: &'static str) -> SetRefusal {
        SetRefusal::Diverged { volume: self.name.clone(), number, what }
    }

    fn malformed(&self, number: SetNumber, what: &'static str) -> SetRefusal {
        SetRefusal::Malformed { volume: self.name.clone(), number, what }
    }

    /// Where a set belongs; changes nothing.
    pub(super) fn place(
        &self,
        header: &SetHeader,
        hash: SetHash,
        meta: &SetMeta,
    ) -> Result<Place, SetRefusal> {
        let number = header.number;
        check_form(header, meta).map_err(|what| self.malformed(number, what))?;
        if let Some(held) = self.sets.get(&number.0) {
            return self.known(number, held.hash, hash, held.durable);
        }
        if number <= self.chain.number {
            let back = usize::try_from(self.chain.number.0 - number.0).unwrap_or(usize::MAX);
            let known = self.hashes.len().checked_sub(1).and_then(|last| last.checked_sub(back));
            return match known {
                // Not held any more, so it is durable.
                Some(at) => self.known(number, self.hashes[at], hash, true),
                None => Ok(Place::Old),
            };
        }
        if number.0 - self.durable.number.0 > limits::PENDING_SETS_MAX as u64 {
            let durable = self.durable.number;
            return Err(SetRefusal::TooFarAhead { volume: self.name.clone(), number, durable });
        }
        self.check_neighbours(header, hash, meta)?;
        Ok(Place::New)
    }

    fn known(
        &self,
        number: SetNumber,
        known: SetHash,
        hash: SetHash,
        durable: bool,
    ) -> Result<Place, SetRefusal> {
        if known == hash {
            Ok(Place::Known { durable })
        } else {
            Err(self.diverged(number, "another set has this number here"))
        }
    }

    /// Checks a new set against the sets around it, and against what null sets promised. So whatever stands in the
    /// chain has been checked when it came, and nothing has to be refused after it was journaled.
    fn check_neighbours(&self, header: &SetHeader, hash: SetHash, meta: &SetMeta) -> Result<(), SetRefusal> {
        let number = header.number;
        let refuse_time = || self.malformed(number, "it reaches into an interval that had ended");
        let first = &meta.updates[0].0.stamp;
        let before = if number == self.chain.number.next() {
            // Sets of committed groups are handed over again after a restart: those are older than the frontier.
            let is_new = first.seq > self.through;
            if (is_new && first.time <= self.frontier) || header.start < self.chain_end {
                return Err(refuse_time());
            }
            Some((self.chain.hash, self.chain.last_seq))
        } else {
            match self.sets.get(&(number.0 - 1)) {
                Some(before) if header.start < before.end => return Err(refuse_time()),
                before => before.map(|before| (before.hash, before.last_seq)),
            }
        };
        if before.is_some_and(|(hash, _)| hash != header.predecessor) {
            return Err(self.diverged(number, "it follows another set"));
        }
        if before.is_some_and(|(_, last_seq)| last_seq.next() != header.first_seq) {
            return Err(self.malformed(number, "its sequence numbers do not follow"));
        }
        if let Some(after) = self.sets.get(&(number.0 + 1)) {
            if after.predecessor != hash {
                return Err(self.diverged(number, "the set after it follows another one"));
            }
            if header.last_seq().next() != after.first_seq || header.end > after.start {
                return Err(self.malformed(number, "the set after it does not follow"));
            }
        }
        match &self.null {
            Some(null) if null.number.next() == number && first.time <= null.end => Err(refuse_time()),
            _ => Ok(()),
        }
    }

    /// Lets time advance, at once or when the sets that the null set follows have come.
    pub(super) fn handle_null(&mut self, header: &SetHeader) -> Result<(), SetRefusal> {
        let number = header.number;
        if number < self.chain.number {
            return Ok(());
        }
        if number.0 - self.durable.number.0 > limits::PENDING_SETS_MAX as u64 {
            let durable = self.durable.number;
            return Err(SetRefusal::TooFarAhead { volume: self.name.clone(), number, durable });
        }
        let known = if number == self.chain.number {
            Some((self.chain.hash, self.chain.last_seq))
        } else {
            self.sets.get(&number.0).map(|held| (held.hash, held.last_seq))
        };
        if known.is_some_and(|(hash, _)| hash != header.predecessor) {
            return Err(self.diverged(number, "a null set follows another one"));
        }
        if known.is_some_and(|(_, last_seq)| last_seq.next() != header.first_seq) {
            return Err(self.malformed(number, "a null set with another sequence number"));
        }
        if self.sets.get(&(number.0 + 1)).is_some_and(|after| after.first_time() <= header.end) {
            return Err(self.malformed(number, "a null set reaches into the next interval"));
        }
        if number == self.chain.number {
            self.frontier = self.frontier.max(header.end);
        } else if self.null.as_ref().is_none_or(|null| (null.number, null.end) <= (number, header.end)) {
            let (hash, last_seq, end) = (header.predecessor, header.last_seq(), header.end);
            self.null = Some(PendingNull { number, hash, last_seq, end });
        }
        Ok(())
    }

    /// Holds a set that was found new, and says what that costs.
    pub(super) fn hold(&mut self, header: &SetHeader, hash: SetHash, meta: Arc<SetMeta>) -> usize {
        let charge = Held::charge(&meta, header);
        self.tokens.handle_data(header.first_seq, header.last_seq());
        let held = Held {
            hash,
            predecessor: header.predecessor,
            first_seq: header.first_seq,
            last_seq: header.last_seq(),
            start: header.start,
            end: header.end,
            meta,
            charge,
            at: None,
            durable: false,
            grouped: 0,
            arrival: 0,
        };
        self.sets.insert(header.number.0, held);
        charge
    }

    /// After a restart: what of a set is in committed groups is not for further ones.
    pub(super) fn skip_grouped(&mut self, number: SetNumber) {
        if let Some(held) = self.sets.get_mut(&number.0) {
            let grouped = (self.through.0 + 1).saturating_sub(held.first_seq.0);
            held.grouped = usize::try_from(grouped).unwrap_or(usize::MAX).min(held.meta.updates.len());
        }
    }

    /// A set stands in the journal: the chain grows over it and what follows it.
    pub(super) fn append(
        &mut self,
        number: SetNumber,
        at: SetLocation,
        arrivals: &mut u64,
    ) -> Result<(), Unknown> {
        let held = self.sets.get_mut(&number.0).ok_or(Unknown)?;
        if held.at.is_none() {
            *arrivals += 1;
            held.arrival = *arrivals;
        }
        held.at = Some(at);
        while let Some(next) = self.sets.get(&self.chain.number.next().0).filter(|next| next.at.is_some()) {
            self.chain =
                ChainPoint { number: self.chain.number.next(), hash: next.hash, last_seq: next.last_seq };
            self.chain_end = next.end;
            let before = self.frontier;
            self.frontier = before.max(next.end);
            self.hashes.push_back(next.hash);
            let (meta, grouped) = (Arc::clone(&next.meta), next.grouped);
            self.take_marks(&meta, grouped, before);
            if self.hashes.len() > limits::KNOWN_HASHES_MAX {
                self.hashes.pop_front();
            }
        }
        match self.null.take() {
            Some(null) if null.number > self.chain.number => self.null = Some(null),
            // One that follows another set than ours says nothing; the next null set will be refused.
            Some(null) if null.number == self.chain.number && null.hash == self.chain.hash => {
                self.frontier = self.frontier.max(null.end);
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes where the volume is, and is not, whole. Before these updates it was, up to `whole`.
    fn take_marks(&mut self, meta: &SetMeta, grouped: usize, mut whole: Timestamp) {
        for (update, _) in &meta.updates[grouped..] {
            let time = update.stamp.time;
            match update.op {
                Op::Resync => {
                    // A resync that was interrupted begins again: it is one.
                    if self.resyncs.last().is_none_or(|last| last.end.is_some()) {
                        self.resyncs.push(Resync { whole, end: None });
                    }
                    if !self.member {
                        self.complete = None;
                    }
                }
                Op::Complete => {
                    if let Some(open) = self.resyncs.last_mut().filter(|last| last.end.is_none()) {
                        open.end = Some(time);
                    }
                    if !self.member {
                        self.complete = self.complete.or(Some(time));
                    }
                }
                _ => {}
            }
            whole = whole.max(time);
        }
    }

    /// The last instant before the resync in which `time` falls at which it was whole; `time` itself if it falls in none.
    pub(super) fn whole_at(&self, time: Timestamp) -> Timestamp {
        let within = |resync: &&Resync| resync.whole < time && resync.end.is_none_or(|end| time < end);
        self.resyncs.iter().find(within).map_or(time, |resync| resync.whole)
    }

    /// The last instant before its resync at which it was whole, if that has not come to an end.
    pub(super) fn open_resync(&self) -> Option<Timestamp> {
        self.resyncs.last().filter(|last| last.end.is_none()).map(|last| last.whole)
    }

    /// A group of that time is committed.
    pub(super) fn forget_resyncs(&mut self, time: Timestamp) {
        let member = self.member;
        // One that cannot be shown yet joins after the end of all of them.
        self.resyncs.retain(|resync| resync.end.is_none_or(|end| member && end > time));
    }

    pub(super) fn is_durable(&self, number: SetNumber) -> bool {
        number <= self.durable.number || self.sets.get(&number.0).is_some_and(|held| held.durable)
    }

    /// An appended set is durable. Returns the bytes that need not be held any more.
    pub(super) fn persist(&mut self, number: SetNumber) -> Result<usize, Unknown> {
        let held = self.sets.get_mut(&number.0).filter(|held| held.at.is_some()).ok_or(Unknown)?;
        held.durable = true;
        while let Some(next) = self.sets.get(&self.durable.number.next().0).filter(|next| next.durable) {
            self.durable =
                ChainPoint { number: self.durable.number.next(), hash: next.hash, last_seq: next.last_seq };
        }
        Ok(self.prune())
    }

    /// Drops the sets that are durable without a gap and altogether in committed groups, and moves the base over them.
    pub(super) fn prune(&mut self) -> usize {
        let mut freed = 0;
        while let Some(entry) = self.sets.first_entry() {
            let held = entry.get();
            if !held.is_grouped() || SetNumber(*entry.key()) > self.durable.number {
                break;
            }
            let number = SetNumber(*entry.key());
            self.base = ChainPoint { number, hash: held.hash, last_seq: held.last_seq };
            self.base_end = held.end;
            freed += entry.remove().charge;
        }
        freed
    }

    /// Drops the sets beyond a gap that are newer than `newest`. Returns them, and the bytes that need not be held.
    pub(super) fn withdraw(&mut self, newest: SetNumber) -> (Vec<SetNumber>, usize) {
        let from = newest.max(self.chain.number).next();
        let mut freed = 0;
        let gone = self.sets.split_off(&from.0);
        for held in gone.values() {
            freed += held.charge;
        }
        self.null.take_if(|null| null.number >= from);
        // Their numbers may be given to other updates; of those that are not, the primary tells again.
        self.tokens.drop_after(self.chain.last_seq);
        (gone.into_keys().map(SetNumber).collect(), freed)
    }

    /// Sets past a gap in what is durable that are durable too.
    pub(super) fn durable_beyond(&self) -> impl Iterator<Item = SetNumber> {
        let past = self.durable.number.next().0..;
        self.sets.range(past).filter(|(_, held)| held.durable).map(|(number, _)| SetNumber(*number))
    }

    /// The highest number at hand.
    pub(super) fn newest(&self) -> SetNumber {
        let held = self.sets.last_key_value().map_or(SetNumber(0), |(number, _)| SetNumber(*number));
        held.max(self.chain.number)
    }

    /// For each sequence number, an instant: every update stamped up to it has that number or a lower one. What headers
    /// say, of sets past a gap too, and null sets.
    pub(super) fn bounds(&self) -> impl Iterator<Item = (Seq, Timestamp)> {
        let sets = self.sets.values();
        // Before a resync, updates were dropped that have no number.
        let start = |held: &Held| (!held.begins_resync()).then_some((Seq(held.first_seq.0 - 1), held.start));
        let of_sets = sets.flat_map(move |held| start(held).into_iter().chain([(held.last_seq, held.end)]));
        let null = self.null.iter().map(|null| (null.last_seq, null.end));
        of_sets.chain(null).chain([(self.chain.last_seq, self.frontier)])
    }

    /// The sets of which some updates are in no committed group, with how many of each are.
    pub(super) fn ungrouped(&self) -> impl Iterator<Item = (SetNumber, &Held)> {
        let sets = self.sets.iter().filter(|(_, held)| !held.is_grouped());
        sets.map(|(number, held)| (SetNumber(*number), held))
    }

    /// Whether every set at hand is in committed groups.
    pub(super) fn is_empty(&self) -> bool {
        self.sets.values().all(Held::is_grouped)
    }

    /// Whether updates in the chain wait for a group.
    pub(super) fn has_ungrouped(&self) -> bool {
        self.sets.range(..=self.chain.number.0).any(|(_, held)| !held.is_grouped())
    }

    pub(super) fn take_tokens(&mut self, tokens: Vec<Token>, held: &mut usize) {
        let arrived: Vec<(Seq, Seq)> =
            self.sets.values().map(|held| (held.first_seq, held.last_seq)).collect();
        let chain_last = self.chain.last_seq;
        for token in tokens.into_iter().filter(|token| token.stamp.seq > self.through) {
            let seq = token.stamp.seq;
            let at = arrived.partition_point(|(_, last)| *last < seq);
            let has_data = seq <= chain_last || arrived.get(at).is_some_and(|(first, _)| *first <= seq);
            self.tokens.insert(token, has_data, held);
        }
    }
}

/// What a set must keep for groups to be right, whatever the byte format checked already.
fn check_form(header: &SetHeader, meta: &SetMeta) -> Result<(), &'static str> {
    let count = header.updates as usize;
    if header.number.0 == 0 || header.number.0 >= i64::MAX as u64 {
        return Err("its number is out of range");
    }
    if count == 0 || count > limits::SET_UPDATES_MAX || count != meta.updates.len() {
        return Err("its updates are not as many as it says");
    }
    if header.first_seq == Seq::ZERO || header.first_seq.0 >= i64::MAX as u64 {
        return Err("its sequence numbers are out of range");
    }
    let mut time = header.start;
    for ((update, _), seq) in meta.updates.iter().zip(header.first_seq.0..) {
        if update.stamp.seq != Seq(seq) {
            return Err("its sequence numbers have a gap");
        }
        if update.stamp.time <= time {
            return Err("its updates are not in the order of their times");
        }
        time = update.stamp.time;
    }
    if time > header.end { Err("an update is stamped after its interval") } else { Ok(()) }
}
