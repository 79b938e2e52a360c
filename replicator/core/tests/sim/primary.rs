//! The simulated primary: programs that write, a sidefile, a mover, and the sender.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use twinfs_core::id::{SetNumber, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::sender::{Backlog, Sender};
use twinfs_core::session::{Role, VolumeState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::Token;
use twinfs_core::wire::{Message, PromoteReady};

use super::network::Packet;
use crate::session_common::{
    Change, Rng, TestSet, canonical, make_set, sender_config, sender_volume, update,
};

pub(crate) struct Primary {
    pub(crate) sender: Sender<Arc<TestSet>>,
    /// For each volume of the sender, which volume that is: the order changes with a restart.
    order: Vec<usize>,
    /// For each volume of the welcome, which volume that is.
    wire: Vec<usize>,
    /// What programs did, of each volume, for ever.
    pub(crate) changes: Vec<Vec<Change>>,
    /// What of it is in no set yet.
    uncut: Vec<VecDeque<Change>>,
    /// Where in what programs did each volume was whole.
    pub(crate) marks: Vec<Option<usize>>,
    /// When the copy of each volume begins and is whole.
    copies: Vec<(u64, u64)>,
    /// When a resync begins on every volume that was whole once, and when each of those under way is to end.
    outages: Vec<u64>,
    resyncs: Vec<Option<u64>>,
    last_time: u64,
    pub(crate) held: bool,
    final_end: Option<u64>,
    /// Sets of which the acknowledgement was heard, and sets sent on this connection and on earlier ones.
    acked: BTreeSet<(usize, SetNumber)>,
    sent_here: BTreeSet<(usize, SetNumber)>,
    sent_before: BTreeSet<(usize, SetNumber)>,
    set_updates_max: u64,
    update_bytes: u64,
    tokens: bool,
    until: u64,
}

impl Primary {
    pub(crate) fn new(rng: &mut Rng, until: u64) -> Self {
        let volumes = rng.within(1, 4) as usize;
        let copies = (0..volumes).map(|_| {
            let start = rng.below(until / 2);
            (start, rng.within(start + 1, until * 3 / 4))
        });
        let copies: Vec<_> = copies.collect();
        let outages = (0..rng.below(6)).map(|_| rng.within(until / 5, until * 9 / 10));
        Self {
            sender: Sender::new(sender_config(), (0..volumes).map(sender_volume).collect(), Timestamp(1)),
            order: (0..volumes).collect(),
            changes: vec![Vec::new(); volumes],
            uncut: vec![VecDeque::new(); volumes],
            marks: vec![None; volumes],
            outages: outages.collect(),
            copies,
            resyncs: vec![None; volumes],
            until,
            wire: Vec::new(),
            last_time: 0,
            held: false,
            final_end: None,
            acked: BTreeSet::new(),
            sent_here: BTreeSet::new(),
            sent_before: BTreeSet::new(),
            set_updates_max: rng.within(1, 30),
            update_bytes: rng.within(1, 1 << 20),
            tokens: rng.chance(70),
        }
    }

    pub(crate) fn volumes(&self) -> usize {
        self.order.len()
    }

    fn index_of(&self, volume: usize) -> VolumeIndex {
        VolumeIndex(
            self.order.iter().position(|known| *known == volume).expect("every volume is ordered") as u16
        )
    }

    /// A program writes. Returns the token to run ahead.
    pub(crate) fn write(&mut self, rng: &mut Rng, now: u64) -> Option<Packet> {
        let volume = rng.below(self.volumes() as u64) as usize;
        let started = self.sender.volume_state(self.index_of(volume)) != Some(VolumeState::Pending);
        (started && !self.held).then(|| self.capture(volume, now, Change::write(0)))
    }

    /// Copies begin and end when it is their time.
    pub(crate) fn copy(&mut self, now: u64) -> Vec<Packet> {
        let mut packets = Vec::new();
        for volume in 0..self.volumes() {
            let (start, end) = self.copies[volume];
            if now >= start {
                self.sender.handle_copy_started(self.index_of(volume)).expect("the volume exists");
            }
            if now >= end && self.marks[volume].is_none() {
                self.marks[volume] = Some(self.changes[volume].len());
                packets.push(self.capture(volume, now, Change::complete(0)));
            }
        }
        packets
    }

    /// Updates were let go and are read again: resyncs begin, some in the middle of another one, and end.
    pub(crate) fn resync(&mut self, rng: &mut Rng, now: u64, trace: &mut String) -> Vec<Packet> {
        let mut packets = Vec::new();
        let begins = self.outages.extract_if(.., |at| *at <= now).count() > 0;
        if begins {
            self.sender.handle_let_go();
            self.sender.resume_with_resync();
        }
        for volume in 0..self.volumes() {
            if begins && self.marks[volume].is_some() {
                let again = self.resyncs[volume].replace(rng.within(now, now.max(self.until)));
                trace.push_str(if again.is_some() { "resync again\n" } else { "resync begins\n" });
                packets.push(self.capture(volume, now, Change::resync(0)));
            } else if self.resyncs[volume].take_if(|end| *end <= now).is_some() {
                trace.push_str("resync ends\n");
                packets.push(self.capture(volume, now, Change::complete(0)));
            }
        }
        packets
    }

    fn capture(&mut self, volume: usize, now: u64, change: Change) -> Packet {
        self.last_time = now.max(self.last_time + 1);
        let change = Change { time: self.last_time, ..change };
        self.changes[volume].push(change);
        self.uncut[volume].push_back(change);
        let seq = Seq(self.changes[volume].len() as u64);
        Packet::Tokens(volume, vec![Token::of(&update(volume, seq, change))])
    }

    fn captured(&self) -> bool {
        self.uncut.iter().any(|uncut| !uncut.is_empty())
    }

    fn backlog(&self) -> Vec<Backlog> {
        let of = |volume: &usize| match self.uncut[*volume].len() as u64 {
            0 => Backlog::None,
            len if len >= 2 * self.set_updates_max => Backlog::Full,
            _ => Backlog::Some,
        };
        self.order.iter().map(of).collect()
    }

    pub(crate) fn has_tokens(&self) -> bool {
        self.tokens
    }

    /// When the mover wants to be woken.
    pub(crate) fn next_wake(&self) -> Option<u64> {
        self.sender.next_cut(&self.backlog()).map(|time| time.0)
    }

    /// Lets the mover work, and names what is to be sent.
    pub(crate) fn step(
        &mut self,
        rng: &mut Rng,
        now: u64,
        trace: &mut String,
    ) -> Result<Vec<Packet>, String> {
        let mut packets = Vec::new();
        if self.sender.is_cut_due(Timestamp(now), &self.backlog()) {
            self.cut(rng, now, &mut packets)?;
        }
        while let Some((index, set)) = self.sender.poll_transmit() {
            let key = (self.order[index.as_usize()], set.number);
            packets.push(Packet::Set(Arc::clone(&set.handle)));
            if self.acked.contains(&key) || !self.sent_here.insert(key) {
                return Err(format!("resend: set {key:?} was acknowledged, or sent on this connection"));
            }
            if !self.sent_before.insert(key) {
                trace.push_str(&format!("{now} primary sends again {} of volume {}\n", key.1, key.0));
            }
        }
        while self.sender.poll_released().is_some() {}
        if self.sender.in_flight_bytes() > limits::IN_FLIGHT_BYTES_MAX as u64 {
            return Err(format!("bounds: {} bytes are in flight", self.sender.in_flight_bytes()));
        }
        Ok(packets)
    }

    fn cut(&mut self, rng: &mut Rng, now: u64, packets: &mut Vec<Packet>) -> Result<(), String> {
        let end = now.max(self.last_time);
        self.last_time = end;
        let mut idle = true;
        for (index, volume) in (0..).map(VolumeIndex).zip(self.order.clone()) {
            while !self.uncut[volume].is_empty() && self.sender.can_issue(index) {
                idle = false;
                let count = rng.within(1, self.set_updates_max).min(self.uncut[volume].len() as u64) as usize;
                let changes: Vec<_> = self.uncut[volume].drain(..count).collect();
                let set_end = if self.uncut[volume].is_empty() { end } else { changes[count - 1].time };
                let link = self.sender.link(index).map_err(|e| e.to_string())?;
                let bytes = (self.update_bytes * count as u64).min(limits::SET_BYTES_MAX as u64);
                let set = make_set(volume, link, &changes, set_end).issued(bytes);
                self.sender.handle_issued(index, set).map_err(|e| e.to_string())?;
            }
            if self.uncut[volume].is_empty() {
                let link = self.sender.null_link(index).map_err(|e| e.to_string())?;
                if link.start < Timestamp(end) {
                    packets.push(Packet::Set(Arc::new(make_set(volume, link, &[], end))));
                    self.sender.handle_null_issued(index, Timestamp(end)).map_err(|e| e.to_string())?;
                }
            }
        }
        if self.held && !self.captured() {
            self.final_end.get_or_insert(end);
        }
        self.sender.handle_cut(Timestamp(now), idle);
        Ok(())
    }

    /// What a message of the replica leads to. `durable` says whether the replica really has a set.
    pub(crate) fn handle(
        &mut self,
        now: u64,
        message: Message,
        durable: impl Fn(usize, SetNumber) -> bool,
    ) -> Result<(), String> {
        let mut heard = Vec::new();
        match message {
            Message::Welcome(welcome) => {
                self.sender.handle_welcome(Timestamp(now), &welcome).map_err(|e| format!("resume: {e}"))?;
                self.sent_here.clear();
                self.wire = welcome.volumes.iter().map(|volume| canonical(&volume.name)).collect();
                for (volume, theirs) in self.wire.iter().zip(&welcome.volumes) {
                    let known = self.acked.range((*volume, SetNumber(0))..=(*volume, theirs.durable.number));
                    let from = known.last().map_or(1, |(_, number)| number.0);
                    let all =
                        (from..=theirs.durable.number.0).map(SetNumber).chain(theirs.beyond.iter().copied());
                    heard.extend(all.map(|number| (*volume, number)));
                }
            }
            Message::Refuse(refuse) => self.sender.handle_refuse(&refuse),
            Message::Ack(ack) => {
                self.sender.handle_ack(ack).map_err(|e| format!("ack: {e}"))?;
                heard.push((self.wire[ack.volume.as_usize()], ack.number));
            }
            Message::Progress(progress) => self.sender.handle_progress(progress),
            Message::PromoteRequest => self.held = true,
            Message::PromoteDone(epoch) => self.sender.handle_promoted(epoch),
            other => return Err(format!("unexpected at the primary: {other:?}")),
        }
        for (volume, number) in heard {
            if self.acked.insert((volume, number)) && !durable(volume, number) {
                return Err(format!("lost ack: set {number} of volume {volume} is not durable"));
            }
        }
        Ok(())
    }

    /// With writes held and nothing left to issue or acknowledge.
    pub(crate) fn promote_ready(&self) -> Option<PromoteReady> {
        self.sender.promote_ready(Timestamp(self.final_end?))
    }

    pub(crate) fn disconnect(&mut self) {
        self.sender.handle_disconnected();
        // The null sets that told the final end may be lost with the connection: tell it again.
        self.final_end = None;
    }

    /// A clean stop and start: the sidefile and the sender's state stay, the order of the volumes is another.
    pub(crate) fn restart(&mut self, now: u64) {
        let mut volumes: Vec<_> = self.order.iter().copied().zip(self.sender.state()).collect();
        volumes.rotate_left(1);
        self.order = volumes.iter().map(|(volume, _)| *volume).collect();
        let states = volumes.into_iter().map(|(_, state)| state).collect();
        self.sender = Sender::new(sender_config(), states, Timestamp(now));
    }

    /// Whether the replica is known to have and show everything.
    pub(crate) fn is_converged(&self) -> bool {
        let states = (0..self.volumes()).map(|volume| self.sender.volume_state(self.index_of(volume)));
        let mut states = states;
        !self.captured()
            && self.sender.behind().sets == 0
            && states.all(|state| state == Some(VolumeState::Duplex))
            && self.sender.progress().time
                >= Timestamp(self.changes.iter().filter_map(|c| c.last()).map(|c| c.time).max().unwrap_or(0))
    }

    pub(crate) fn is_fenced(&self) -> bool {
        self.sender.role() == Role::Fenced
    }
}
