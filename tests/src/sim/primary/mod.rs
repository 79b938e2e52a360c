//! The simulated primary: a history made up by the model's generator, cut into record sets, and the sender of production.
//! It never fails.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use twinfs_core::format::{Builder, EncodedSet, SetPlace};
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SetNumber, SiteId, SiteName, VolumeIndex, VolumeInstance,
    VolumeName,
};
use twinfs_core::model::generate::{self, Change, Generator};
use twinfs_core::model::{Model, Random};
use twinfs_core::session::sender::{Backlog, ChainLink, IssuedSet, Sender, SenderConfig, SenderVolume};
use twinfs_core::session::{ChainPoint, VolumeState};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::token::{self, Token};
use twinfs_core::update::Op;
use twinfs_core::wire::Message;

use super::network::Packet;

/// Updates between two snapshots of a model.
const SNAPSHOT_UPDATES: usize = 40;
/// Data of one set above which it is closed.
const SET_BYTES: usize = 40_000;

pub(crate) const SESSION: SessionId = SessionId::from_bytes([7; 16]);

pub(crate) fn site() -> (SiteName, SiteId) {
    (SiteName::new("primary").expect("a good name"), SiteId::from_bytes([1; 16]))
}

fn epoch() -> Epoch {
    Epoch { number: 1, site: site().1 }
}

const INCARNATION: Incarnation = Incarnation(0x5157);

/// A volume and all that ever happened to it.
pub(crate) struct History {
    pub(crate) name: VolumeName,
    instance: VolumeInstance,
    pub(crate) root: FileId,
    generator: Generator,
    /// By sequence number, from 1 on.
    changes: Vec<Change>,
    /// The model after so many changes.
    snapshots: Vec<(usize, Model)>,
    last: Model,
    /// The mark that ends the copy, until it is published.
    complete: Option<Change>,
    /// How many changes are in sets.
    cut: usize,
}

impl History {
    fn new(index: u64, seed: u64, options: &generate::Options) -> Self {
        let instance = VolumeInstance::new(100 + index).expect("it is not zero");
        let mut generator = Generator::new(seed, generate::Options { instance, ..options.clone() });
        let root = generator.model().root();
        let mut copy = generator.copy();
        let complete = copy.pop();
        let mut history = Self {
            name: VolumeName::new(format!("volume-{index}")).expect("a good name"),
            instance,
            root,
            generator,
            changes: Vec::new(),
            snapshots: vec![(0, Model::new(root))],
            last: Model::new(root),
            complete,
            cut: 0,
        };
        copy.into_iter().for_each(|change| history.publish(change, Timestamp(1)));
        history
    }

    fn publish(&mut self, mut change: Change, time: Timestamp) {
        change.update.stamp = Stamp { time, seq: Seq(self.changes.len() as u64 + 1) };
        self.last.apply(&change.update, &change.data);
        self.changes.push(change);
        if self.changes.len().is_multiple_of(SNAPSHOT_UPDATES) {
            self.snapshots.push((self.changes.len(), self.last.clone()));
        }
    }

    /// The last update stamped at or before `time`.
    pub(crate) fn seq_at(&self, time: Timestamp) -> Seq {
        Seq(self.changes.partition_point(|change| change.update.stamp.time <= time) as u64)
    }

    pub(crate) fn last_seq(&self) -> Seq {
        Seq(self.changes.len() as u64)
    }

    /// The tree after an update.
    pub(crate) fn model_at(&self, seq: Seq) -> Model {
        let at = seq.0 as usize;
        if at == self.changes.len() {
            return self.last.clone();
        }
        let before = self.snapshots.partition_point(|(count, _)| *count <= at) - 1;
        let (from, model) = &self.snapshots[before];
        let mut model = model.clone();
        self.changes[*from..at].iter().for_each(|change| model.apply(&change.update, &change.data));
        model
    }

    /// Goes on from a model of an earlier update.
    pub(crate) fn advance(&self, model: &mut Model, from: Seq, to: Seq) {
        let changes = &self.changes[from.0 as usize..to.0 as usize];
        changes.iter().for_each(|change| model.apply(&change.update, &change.data));
    }
}

pub(crate) struct Primary {
    pub(crate) sender: Sender<Bytes>,
    pub(crate) volumes: Vec<History>,
    builder: Builder,
    last_time: Timestamp,
    /// Operations so far.
    pub(crate) operations: u64,
    set_updates_max: u64,
    tokens: bool,
    /// For each volume of the welcome, which one that is.
    wire: Vec<usize>,
    /// Sets that the replica said are durable.
    pub(crate) acked: Vec<BTreeSet<SetNumber>>,
}

impl Primary {
    pub(crate) fn new(random: &mut Random) -> Self {
        let options = generate::Options {
            names_max: [6, 15, 30][random.below(3) as usize],
            write_bytes_max: [300, 3000, 9000][random.below(3) as usize],
            file_bytes: 24 << 10,
            sparse: random.one_in(3),
            shifts: !random.one_in(3),
            ..generate::Options::default()
        };
        let count = 1 + random.below(3);
        let volumes: Vec<_> =
            (0..count).map(|index| History::new(index, random.next_u64(), &options)).collect();
        let (name, site) = site();
        let config = SenderConfig { session: SESSION, site, name, epoch: epoch(), incarnation: INCARNATION };
        let known = volumes.iter().map(|volume| SenderVolume {
            name: volume.name.clone(),
            instance: volume.instance,
            root: volume.root,
            state: VolumeState::Copy,
            complete: None,
            acked: ChainPoint::START,
            acked_end: Timestamp::ZERO,
            end: Timestamp::ZERO,
            issued: Vec::new(),
            forgotten: Vec::new(),
        });
        Self {
            sender: Sender::new(config, known.collect(), Timestamp(1)),
            acked: vec![BTreeSet::new(); volumes.len()],
            volumes,
            builder: Builder::new(),
            last_time: Timestamp(1),
            operations: 0,
            set_updates_max: 1 + random.below(30),
            tokens: !random.one_in(3),
            wire: Vec::new(),
        }
    }

    /// Programs do something. Returns the tokens that run ahead.
    pub(crate) fn operate(&mut self, random: &mut Random, now: u64) -> Vec<Packet> {
        let index = random.below(self.volumes.len() as u64) as usize;
        let volume = &mut self.volumes[index];
        self.operations += 1;
        let changes = match volume.complete.take_if(|_| random.one_in(12)) {
            Some(complete) => vec![complete],
            None => volume.generator.step(),
        };
        let mut tokens = Vec::new();
        for change in changes {
            self.last_time = Timestamp(now.max(self.last_time.0 + 1 + random.below(3)));
            volume.publish(change, self.last_time);
            tokens.push(Token::of(&volume.changes[volume.changes.len() - 1].update));
        }
        if !self.tokens || !self.sender.is_connected() || tokens.is_empty() {
            return Vec::new();
        }
        let mut batch = Vec::new();
        token::encode_batch(&volume.name, &tokens, &mut batch);
        vec![Packet::Tokens(batch.into())]
    }

    /// Ends the copies that are still open.
    pub(crate) fn complete(&mut self, now: u64) {
        for volume in &mut self.volumes {
            if let Some(complete) = volume.complete.take() {
                self.last_time = Timestamp(now.max(self.last_time.0 + 1));
                volume.publish(complete, self.last_time);
            }
        }
    }

    fn backlog(&self) -> Vec<Backlog> {
        let of = |volume: &History| match volume.changes.len() - volume.cut {
            0 => Backlog::None,
            len if len as u64 >= 2 * self.set_updates_max => Backlog::Full,
            _ => Backlog::Some,
        };
        self.volumes.iter().map(of).collect()
    }

    /// When it wants to be woken.
    pub(crate) fn next_wake(&self) -> Option<u64> {
        self.sender.next_cut(&self.backlog()).map(|time| time.0)
    }

    /// Cuts if that is due, and names what is to be sent.
    pub(crate) fn step(&mut self, random: &mut Random, now: u64) -> Result<Vec<Packet>, String> {
        let mut packets = Vec::new();
        if self.sender.is_cut_due(Timestamp(now), &self.backlog()) {
            self.cut(random, now, &mut packets)?;
        }
        while let Some((_, set)) = self.sender.poll_transmit() {
            packets.push(Packet::Set(set.handle.clone()));
        }
        while self.sender.poll_released().is_some() {}
        Ok(packets)
    }

    fn cut(&mut self, random: &mut Random, now: u64, packets: &mut Vec<Packet>) -> Result<(), String> {
        let end = Timestamp(now.max(self.last_time.0));
        self.last_time = end;
        let mut idle = true;
        for at in 0..self.volumes.len() {
            let index = VolumeIndex(at as u16);
            while self.volumes[at].cut < self.volumes[at].changes.len() && self.sender.can_issue(index) {
                idle = false;
                let count = 1 + random.below(self.set_updates_max);
                let volume = &mut self.volumes[at];
                let rest = &volume.changes[volume.cut..];
                let mut bytes = 0;
                let taken = rest.iter().take(count as usize).take_while(|change| {
                    let before = bytes;
                    bytes += change.data.len();
                    before < SET_BYTES
                });
                let changes: VecDeque<Change> = taken.cloned().collect();
                volume.cut += changes.len();
                let last = volume.cut == volume.changes.len();
                self.issue(index, &changes, if last { Some(end) } else { None })?;
            }
            if self.volumes[at].cut == self.volumes[at].changes.len() {
                let link = self.sender.null_link(index).map_err(|e| e.to_string())?;
                if link.start < end {
                    let null = self.finish(at, link, end)?;
                    packets.push(Packet::Control(Message::NullSet(null.bytes).encode().into()));
                    self.sender.handle_null_issued(index, end).map_err(|e| e.to_string())?;
                }
            }
        }
        self.sender.handle_cut(Timestamp(now), idle);
        Ok(())
    }

    fn issue(
        &mut self,
        index: VolumeIndex,
        changes: &VecDeque<Change>,
        end: Option<Timestamp>,
    ) -> Result<(), String> {
        let mut complete = None;
        for change in changes {
            if change.update.op == Op::Complete {
                complete = Some(change.update.stamp);
            }
            self.builder.push_update(&change.update, &change.data).map_err(|e| e.to_string())?;
        }
        let (first, last) = (changes[0].update.stamp, changes[changes.len() - 1].update.stamp);
        let end = end.unwrap_or(last.time);
        let link = self.sender.link(index).map_err(|e| e.to_string())?;
        let set = self.finish(index.as_usize(), link, end)?;
        let issued = IssuedSet {
            number: set.header.number,
            hash: set.hash,
            first,
            last,
            end,
            bytes: set.bytes.len() as u64,
            complete,
            handle: set.bytes,
        };
        self.sender.handle_issued(index, issued).map_err(|e| e.to_string())
    }

    fn finish(&mut self, volume: usize, link: ChainLink, end: Timestamp) -> Result<EncodedSet, String> {
        let History { name, instance, root, .. } = &self.volumes[volume];
        let place = SetPlace {
            session: SESSION,
            volume: name.clone(),
            instance: *instance,
            root: *root,
            epoch: epoch(),
            incarnation: INCARNATION,
            number: link.number,
            predecessor: link.predecessor,
            first_seq: link.first_seq,
            start: link.start,
            end,
        };
        self.builder.finish(place, 1).map_err(|e| e.to_string())
    }

    /// The replica said something.
    pub(crate) fn handle(&mut self, now: u64, message: Message) -> Result<(), String> {
        match message {
            Message::Welcome(welcome) => {
                self.sender
                    .handle_welcome(Timestamp(now), &welcome)
                    .map_err(|error| format!("lost acknowledgement: the sites do not agree: {error}"))?;
                let place = |name: &VolumeName| self.volumes.iter().position(|volume| volume.name == *name);
                self.wire = welcome.volumes.iter().filter_map(|volume| place(&volume.name)).collect();
                for (volume, theirs) in self.wire.iter().zip(&welcome.volumes) {
                    let acked = &mut self.acked[*volume];
                    acked.extend((1..=theirs.durable.number.0).map(SetNumber));
                    acked.extend(&theirs.beyond);
                }
            }
            Message::Ack(ack) => {
                self.sender.handle_ack(ack).map_err(|error| format!("acknowledgement: {error}"))?;
                let volume = self.wire.get(ack.volume.as_usize()).ok_or("acknowledgement of no volume")?;
                self.acked[*volume].insert(ack.number);
            }
            Message::Progress(progress) => self.sender.handle_progress(progress),
            other => return Err(format!("refused: the replica says {other:?}")),
        }
        Ok(())
    }

    /// Whether the replica has and shows everything.
    pub(crate) fn is_converged(&self) -> bool {
        let cut = self.volumes.iter().all(|volume| volume.cut == volume.changes.len());
        let last = self.volumes.iter().filter_map(|volume| volume.changes.last());
        let time = last.map(|change| change.update.stamp.time).max().unwrap_or_default();
        cut && self.sender.is_idle() && self.sender.progress().time >= time
    }
}
