//! Everything that happens, in the order of virtual time.

pub(crate) mod rot;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use twinfs_certs::Site;
use twinfs_core::format::UnverifiedSet;
use twinfs_core::model::Random;
use twinfs_core::session::receiver::Ordering;
use twinfs_core::stamp::Timestamp;
use twinfs_core::wire::Message;
use twinfs_replicator::replica::engine::ConnectionId;
use twinfs_replicator::replica::image::ImageOptions;

use super::check::acknowledged;
use super::check::atomicity::Atomicity;
use super::check::bounds::Bounds;
use super::check::convergence;
use super::check::loss::{self, Sent};
use super::check::prefix::Prefix;
use super::disk::{Loss, Machine};
use super::network::{Network, Packet, Side};
use super::primary::{self, Primary, Sabotage};
use super::replica::{Replica, Setup, Wish, reading};

const MS: u64 = 1_000_000;
/// How long the world may go on after the last trouble.
const HEALED_NS_MAX: u64 = 60_000 * MS;
/// A recovery that fails so often in a row does not end.
const RECOVERIES_MAX: u32 = 60;

/// How a run differs from the ordinary one.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Operations of programs at the primary, at least.
    pub operations: u64,
    /// Crashes of either side, at least.
    pub crashes: u64,
    /// Whether the primary loses its power too, and not only its process.
    pub primary_power: bool,
    /// How the replica forms groups: other than by stamps only to see that the checks object.
    pub ordering: Ordering,
    /// How the primary, or a check, is broken: only to see that the checks object.
    pub sabotage: Sabotage,
    /// Whether the text of the trace is kept; its hash always is.
    pub text: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            operations: 300,
            crashes: 20,
            primary_power: false,
            ordering: Ordering::ByStamp,
            sabotage: Sabotage::Nothing,
            text: false,
        }
    }
}

/// What a run had in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Operations of programs.
    pub operations: u64,
    /// Crashes of the replica: of its process, and of its power.
    pub crashes: [u64; 2],
    /// Crashes of the primary: of its process, and of its power.
    pub primary_crashes: [u64; 2],
    /// Crashes of the primary in the middle of a start.
    pub in_start: u64,
    /// Changes of programs that a power loss took.
    pub changes_lost: u64,
    /// Times that the sidefile was full, or that a start began suspended.
    pub suspensions: u64,
    /// Loss reports that were compared with the truth, and the updates listed in them.
    pub reports: [u64; 2],
    /// Crashes in the middle of a recovery.
    pub in_recovery: u64,
    /// Crashes in the middle of a checkpoint.
    pub in_checkpoint: u64,
    /// Checkpoints that ended.
    pub checkpoints: u64,
    /// Consistency groups shown.
    pub groups: u64,
    /// Connections lost without a crash.
    pub cuts: u64,
    /// Operations of the replica's disks that changed something.
    pub changes: u64,
}

/// What came of a run.
#[derive(Debug)]
pub struct Run {
    /// What was violated, if anything.
    pub outcome: Result<(), String>,
    /// Hash over everything that happened, for comparison of two runs.
    pub hash: blake3::Hash,
    /// What happened, as text, if it was asked for.
    pub text: String,
    /// What was in it.
    pub figures: Figures,
}

enum Event {
    Operate,
    Chores,
    Wake,
    StartPrimary,
    Deliver { link: u64, to: Side, packet: Packet },
    Settle { life: u64 },
    Checkpoint { life: u64 },
    Restart,
    LinkUp,
    LinkDown,
}

struct World {
    random: Random,
    options: Options,
    now: u64,
    events: u64,
    queue: BTreeMap<(u64, u64), Event>,
    primary: Primary,
    machine: Machine,
    replica: Option<Replica>,
    /// Counts the replica's processes.
    life: u64,
    settling: bool,
    setup: Setup,
    network: Network,
    wake_at: Option<u64>,
    operate_gap_ns: u64,
    /// How long the link stays down at most when it breaks.
    outage_ns: u64,
    crash_gap: u64,
    /// Whether the run ends with a forced promote.
    promotes: bool,
    sent: Sent,
    /// Loss reports are kept here; made when there is the first.
    reports: Option<tempfile::TempDir>,
    suspended: bool,
    /// The primary may crash: its copies are complete.
    armed: bool,
    /// Whether the next crash was brought forward, because crashes are behind.
    hurried: bool,
    /// When the last trouble was.
    healed_at: Option<u64>,
    prefix: Prefix,
    atomicity: Atomicity,
    bounds: Bounds,
    hasher: blake3::Hasher,
    text: String,
    figures: Figures,
}

/// Runs a world of its own until everything has converged, or a check objects.
#[must_use]
pub fn simulate(seed: u64, options: Options) -> Run {
    let mut world = World::new(seed, options);
    let outcome = world.run().map_err(|why| format!("{why} (at {} ns)", world.now));
    world.note(|| format!("the end: {outcome:?}"));
    Run { outcome, hash: world.hasher.finalize(), text: world.text, figures: world.figures }
}

impl World {
    fn new(seed: u64, options: Options) -> Self {
        let mut random = Random::new(seed);
        let primary = Primary::new(&mut random, options.sabotage);
        let network = Network::new(&mut random);
        let setup = Setup {
            // The largest set is what the sidefile holds.
            segment_bytes: primary.sidefile_bytes as u64
                + [64 << 10, 256 << 10, 1 << 20][random.below(3) as usize],
            image: ImageOptions {
                delta_bytes_max: [20_000, 200_000, 64 << 20][random.below(3) as usize],
                checkpoint_interval: Duration::from_millis([20, 200, 2000][random.below(3) as usize]),
            },
            ordering: options.ordering,
        };
        let machine = Machine::new(random.next_u64());
        let operate_gap_ns = [MS / 10, MS, 20 * MS][random.below(3) as usize];
        let outage_ns = [50 * MS, 50 * MS, 4000 * MS][random.below(3) as usize];
        let crash_gap = [60, 200, 500][random.below(3) as usize];
        let promotes = random.one_in(3);
        Self {
            options,
            now: 1000 * MS,
            events: 0,
            queue: BTreeMap::new(),
            primary,
            machine,
            replica: None,
            life: 0,
            settling: false,
            setup,
            network,
            wake_at: None,
            operate_gap_ns,
            outage_ns,
            crash_gap,
            promotes,
            sent: Sent::default(),
            reports: None,
            suspended: false,
            armed: false,
            hurried: false,
            healed_at: None,
            prefix: Prefix::default(),
            atomicity: Atomicity::default(),
            bounds: Bounds::default(),
            hasher: blake3::Hasher::new(),
            text: String::new(),
            figures: Figures::default(),
            random,
        }
    }

    fn run(&mut self) -> Result<(), String> {
        for event in [Event::Restart, Event::StartPrimary, Event::Operate, Event::Chores, Event::LinkDown] {
            self.at(1, event);
        }
        self.plan_crash(Side::Replica);
        while let Some(((time, _), event)) = self.queue.pop_first() {
            self.now = time;
            self.primary.set_time(time);
            self.apply(event)?;
            self.drive_primary()?;
            self.drive_replica()?;
            if self.is_over() && self.end()? {
                return Ok(());
            }
        }
        Err("convergence: nothing is left to happen".to_owned())
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        let what = what();
        self.hasher.update(&self.now.to_le_bytes());
        let changes = [self.primary.power().changes(), self.machine.power.changes()];
        for changes in changes {
            self.hasher.update(&changes.to_le_bytes());
        }
        self.hasher.update(what.as_bytes());
        if self.options.text {
            writeln!(self.text, "{} {changes:?} {what}", self.now).expect("a string takes everything");
        }
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.events += 1;
        self.queue.insert((self.now + delay, self.events), event);
    }

    fn crashes(&self) -> u64 {
        self.figures.crashes.iter().chain(&self.figures.primary_crashes).sum()
    }

    /// Whether there were operations and crashes enough: from then on nothing fails any more.
    fn is_over(&mut self) -> bool {
        let over =
            self.figures.operations >= self.options.operations && self.crashes() >= self.options.crashes;
        if over && self.healed_at.is_none() {
            self.healed_at = Some(self.now);
            self.primary.power().cut_at(u64::MAX);
            self.machine.power.cut_at(u64::MAX);
            self.note(|| "nothing fails any more".to_owned());
        }
        over
    }

    /// The power of a machine goes at one of its next changes.
    fn plan_crash(&mut self, side: Side) {
        // Often soon, so that recoveries and the first steps after them are hit.
        self.hurried = false;
        let often = if side == Side::Primary { 8 } else { 2 };
        let gap = if self.random.one_in(6) { 12 } else { often * self.crash_gap };
        self.crash_within(side, gap);
    }

    fn crash_within(&mut self, side: Side, changes: u64) {
        if self.healed_at.is_none() && (self.armed || side == Side::Replica) {
            let power = match side {
                Side::Primary => self.primary.power(),
                Side::Replica => &self.machine.power,
            };
            power.cut_at(power.changes() + 1 + self.random.below(changes));
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Operate if self.healed_at.is_none() => {
                if self.primary.operate(&mut self.random) {
                    self.figures.operations += 1;
                }
                if !self.armed && self.primary.is_duplex() {
                    self.armed = true;
                    self.plan_crash(Side::Primary);
                }
                // As many operations as crashes call for.
                let ahead = self.figures.operations * self.options.crashes
                    > (self.crashes() + 2) * self.options.operations;
                if ahead && !self.hurried {
                    let side =
                        if self.armed && self.random.one_in(2) { Side::Primary } else { Side::Replica };
                    self.crash_within(side, 200);
                    self.hurried = true;
                }
                let gap_ns = if ahead { 50 * MS } else { self.operate_gap_ns };
                let delay = 1 + self.random.below(2 * gap_ns);
                self.at(delay, Event::Operate);
            }
            Event::Chores => {
                self.primary.chores(self.now)?;
                let delay = 1 + self.random.below(10 * MS);
                self.at(delay, Event::Chores);
            }
            Event::StartPrimary => self.start_primary()?,
            Event::Operate => {}
            Event::Wake => {
                self.wake_at = None;
                self.primary.settle();
            }
            Event::Deliver { link, to, packet } => {
                if self.network.link == Some(link) {
                    self.deliver(link, to, packet)?;
                }
            }
            Event::Settle { life } => {
                if let Some(replica) = self.replica.as_mut().filter(|_| life == self.life) {
                    self.settling = false;
                    replica.engine.settle(reading(self.now));
                    // It looks again by itself, also when nothing comes.
                    self.settle_in(100 * MS);
                }
            }
            Event::Checkpoint { life } => {
                if let Some(replica) = self.replica.as_mut().filter(|_| life == self.life) {
                    let result = replica.engine.image().checkpoint();
                    let ended = result.is_ok();
                    let why = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
                    replica.engine.handle_checkpointed(result);
                    self.figures.checkpoints += u64::from(ended);
                    if !ended && !self.machine.power.is_off() {
                        return Err(format!("convergence: a checkpoint failed on a good disk: {why}"));
                    }
                    self.figures.in_checkpoint += u64::from(!ended);
                    self.note(|| format!("a checkpoint ended well: {ended}"));
                }
            }
            Event::Restart => self.restart()?,
            Event::LinkUp => self.link_up(),
            Event::LinkDown => {
                if self.healed_at.is_none() {
                    if self.network.link.is_some() {
                        self.figures.cuts += 1;
                    }
                    self.link_down();
                    let delay = 1 + self.random.below(4000 * MS);
                    self.at(delay, Event::LinkDown);
                }
            }
        }
        Ok(())
    }

    // ---- network ----

    fn send(&mut self, to: Side, packet: Packet) {
        let Some(link) = self.network.link else { return };
        let arrival = self.network.arrival(&mut self.random, self.now, to, &packet);
        self.at(arrival - self.now, Event::Deliver { link, to, packet });
    }

    fn link_up(&mut self) {
        let Some(replica) = self.replica.as_mut().filter(|_| self.network.link.is_none()) else {
            // Whoever restarts tries again.
            return;
        };
        if self.primary.process.is_none() {
            return;
        }
        let link = self.network.connect();
        let (name, id) = primary::site();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        replica.engine.handle_linked(ConnectionId(link), Site { name, id }, address);
        self.note(|| format!("connection {link}"));
        self.primary.linked();
    }

    /// Both sides notice at once; what is in flight is lost.
    fn link_down(&mut self) {
        if let Some(link) = self.network.link.take() {
            // What it has sent by now has left.
            self.primary.take_packets();
            self.primary.unlinked();
            if let Some(replica) = &mut self.replica {
                replica.engine.handle_unlinked(ConnectionId(link), "the link was cut".to_owned());
            }
            self.note(|| format!("connection {link} is lost"));
        }
        let outage_ns = if self.healed_at.is_none() { self.outage_ns } else { 50 * MS };
        let delay = 1 + self.random.below(outage_ns);
        self.at(delay, Event::LinkUp);
    }

    fn deliver(&mut self, link: u64, to: Side, packet: Packet) -> Result<(), String> {
        if to == Side::Primary {
            let Packet::Control(bytes) = packet else { return Err("refused: not a message".to_owned()) };
            let message = Message::decode(&bytes).map_err(|error| error.to_string())?;
            self.note(|| format!("the primary hears {message:?}"));
            self.primary.handle(&bytes, &message)?;
            self.primary.settle();
            return Ok(());
        }
        let Some(replica) = &mut self.replica else { return Ok(()) };
        let id = ConnectionId(link);
        match packet {
            Packet::Control(bytes) => replica.engine.handle_message(id, &bytes),
            Packet::Tokens(bytes) => replica.engine.handle_tokens(id, &bytes),
            Packet::Set(bytes) => replica.engine.handle_set(id, bytes, Box::new(())),
        }
        let delay = self.random.below(4 * MS);
        self.settle_in(delay);
        Ok(())
    }

    // ---- primary ----

    /// Sends what the engine wants sent, wakes it when it wants to be, and sees whether its power went.
    fn drive_primary(&mut self) -> Result<(), String> {
        for packet in self.primary.take_packets() {
            if let Packet::Set(set) = &packet {
                self.sent.note(set);
            }
            if self.options.text {
                let what = describe(&packet);
                self.note(|| format!("the primary sends {what}"));
            }
            self.send(Side::Replica, packet);
        }
        let suspended = self.primary.is_suspended();
        if suspended && !self.suspended {
            self.figures.suspensions += 1;
            self.note(|| "the primary is suspended".to_owned());
        }
        self.suspended = suspended;
        if self.primary.power().is_off() {
            return self.crash_primary();
        }
        if let Some(at) = self.primary.next_wake(self.now).map(|at| at.max(self.now + 1))
            && self.wake_at.is_none_or(|known| known > at)
        {
            self.wake_at = Some(at);
            self.at(at - self.now, Event::Wake);
        }
        Ok(())
    }

    fn draw_loss(&mut self) -> Loss {
        match self.random.below(10) {
            0..5 => Loss::Process,
            5 => Loss::Power(0),
            6 => Loss::Power(1),
            _ => Loss::Power(self.random.next_u64()),
        }
    }

    fn crash_primary(&mut self) -> Result<(), String> {
        self.figures.changes += self.primary.power().changes();
        let loss = if self.options.primary_power { self.draw_loss() } else { Loss::Process };
        self.figures.primary_crashes[usize::from(loss != Loss::Process)] += 1;
        self.link_down();
        let lost = self.primary.die(&mut self.random, loss);
        self.figures.changes_lost += lost as u64;
        self.note(|| format!("the primary crashes: {loss:?}, {lost} changes lost"));
        self.plan_crash(Side::Primary);
        let delay = 1 + self.random.below(200 * MS);
        self.at(delay, Event::StartPrimary);
        if self.random.one_in(8) && self.replica.is_some() && self.healed_at.is_none() {
            return self.crash();
        }
        Ok(())
    }

    fn start_primary(&mut self) -> Result<(), String> {
        let mut patience = 2 * self.crash_gap;
        for _ in 0..RECOVERIES_MAX {
            match self.primary.start() {
                Ok(how) => {
                    self.note(|| format!("the primary is back: {how}"));
                    let delay = 1 + self.random.below(20 * MS);
                    self.at(delay, Event::LinkUp);
                    return Ok(());
                }
                Err(_) if self.primary.power().is_off() => {
                    self.figures.in_start += 1;
                    self.crash_primary()?;
                    // It comes back at once.
                    self.queue.retain(|_, event| !matches!(event, Event::StartPrimary));
                    self.is_over();
                    patience = patience * 3 / 2;
                    if self.healed_at.is_none() {
                        self.primary.power().cut_at(1 + self.random.below(patience));
                    }
                }
                Err(error) => return Err(format!("start of the primary: {}", error.0)),
            }
        }
        Err("start of the primary: it does not end".to_owned())
    }

    // ---- replica ----

    fn settle_in(&mut self, delay: u64) {
        if !self.settling {
            self.settling = true;
            let life = self.life;
            self.at(delay, Event::Settle { life });
        }
    }

    /// Grants what the engine wishes, looks at what it shows, and sees whether its power went.
    fn drive_replica(&mut self) -> Result<(), String> {
        let Some(replica) = &self.replica else { return Ok(()) };
        let wishes = replica.take_wishes();
        self.look()?;
        for wish in wishes {
            match wish {
                Wish::Say(to, message) => {
                    if self.network.link == Some(to.0) {
                        self.send(Side::Primary, Packet::Control(Bytes::from(message)));
                    }
                }
                Wish::Close(connection) => {
                    if self.network.link == Some(connection.0) {
                        self.link_down();
                    }
                }
                Wish::Decided(_) => {}
                Wish::Checkpoint => {
                    let (delay, life) = (self.random.below(30 * MS), self.life);
                    self.at(delay, Event::Checkpoint { life });
                }
            }
        }
        if self.machine.power.is_off() { self.crash() } else { Ok(()) }
    }

    /// What is shown must be right, also in the instant before the power goes.
    fn look(&mut self) -> Result<(), String> {
        let Some(replica) = &self.replica else { return Ok(()) };
        let image = replica.engine.image();
        let before = self.prefix.newest();
        let visible = replica.engine.receiver().progress().time;
        let truth = self.primary.truth();
        self.prefix.check(image, visible, &truth)?;
        if !self.machine.power.is_off() {
            self.atomicity.check(image, &truth)?;
            self.bounds.check(replica)?;
        }
        drop(truth);
        let newest = self.prefix.newest();
        if newest > before {
            self.figures.groups += 1;
            self.note(|| format!("group {newest} shows"));
        }
        Ok(())
    }

    fn crash(&mut self) -> Result<(), String> {
        self.figures.changes += self.machine.power.changes();
        self.replica = None;
        self.life += 1;
        self.settling = false;
        self.link_down();
        let loss = self.draw_loss();
        self.figures.crashes[usize::from(loss != Loss::Process)] += 1;
        self.note(|| format!("crash: {loss:?}"));
        self.machine = self.machine.again(loss);
        self.plan_crash(Side::Replica);
        let delay = 1 + self.random.below(200 * MS);
        self.at(delay, Event::Restart);
        Ok(())
    }

    fn restart(&mut self) -> Result<(), String> {
        let mut patience = 2 * self.crash_gap;
        for _ in 0..RECOVERIES_MAX {
            match Replica::start(&self.machine, self.setup, self.now) {
                Ok(replica) => {
                    self.replica = Some(replica);
                    break;
                }
                Err(_) if self.machine.power.is_off() => {
                    self.figures.in_recovery += 1;
                    self.crash()?;
                    // It comes back at once.
                    self.queue.retain(|_, event| !matches!(event, Event::Restart));
                    self.is_over();
                    // A recovery that checkpoints needs many changes: leave it more each time.
                    patience = patience * 3 / 2;
                    if self.healed_at.is_none() {
                        self.machine.power.cut_at(1 + self.random.below(patience));
                    }
                }
                Err(error) => return Err(format!("recovery: {error}")),
            }
        }
        let Some(replica) = &self.replica else { return Err("recovery: it does not end".to_owned()) };
        self.atomicity.forget();
        acknowledged::check(&self.primary, replica, self.prefix.newest())?;
        let group = replica.engine.image().view().group();
        self.note(|| format!("the replica is back with group {group}"));
        if self.random.one_in(24) && self.healed_at.is_none() {
            // A replica that stands where this one stands is promoted; this one goes on.
            let mut fork =
                Replica::start(&self.fork()?, self.setup, self.now).map_err(|error| error.to_string())?;
            self.promote(&mut fork)?;
        }
        self.settle_in(1);
        let delay = 1 + self.random.below(20 * MS);
        self.at(delay, Event::LinkUp);
        Ok(())
    }

    // ---- the end ----

    fn fork(&mut self) -> Result<Machine, String> {
        let machine = self.machine.fork();
        machine.keep_reports(self.reports()?);
        Ok(machine)
    }

    fn reports(&mut self) -> Result<&Path, String> {
        if self.reports.is_none() {
            let memory = Path::new("/dev/shm");
            let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            self.reports = Some(dir.map_err(|error| error.to_string())?);
        }
        Ok(self.reports.as_ref().expect("it was just made").path())
    }

    /// Promotes a replica by force, and compares what it tells of the loss with the truth.
    fn promote(&mut self, replica: &mut Replica) -> Result<(), String> {
        if replica.engine.receiver().progress().time == Timestamp::ZERO {
            return Ok(());
        }
        let reports = self.reports()?.to_owned();
        let short = self.options.sabotage == Sabotage::ShortReport;
        let counts = loss::check(replica, &reports, self.now, &self.primary.truth(), &self.sent, short)?;
        self.figures.reports[0] += 1;
        self.figures.reports[1] += counts.listed;
        self.note(|| format!("promoted: {counts:?}"));
        Ok(())
    }

    /// Whether the run has ended: with a forced promote, or once everything has converged. Then stops the replica and compares
    /// its trees, and starts it once more.
    fn end(&mut self) -> Result<bool, String> {
        let healed_at = self.healed_at.expect("it is over");
        if self.now > healed_at + HEALED_NS_MAX {
            return Err(format!("convergence: the primary is {}", self.primary.state()));
        }
        if self.promotes {
            let Some(mut replica) = self.replica.take() else { return Ok(false) };
            let reports = self.reports()?.to_owned();
            replica.machine.keep_reports(&reports);
            self.promote(&mut replica)?;
            return Ok(true);
        }
        if !self.primary.is_converged() {
            return Ok(false);
        }
        let Some(replica) = self.replica.as_mut() else { return Ok(false) };
        if !replica.engine.receiver().bare_tokens().count.eq(&0) {
            return Err("convergence: bare tokens are left".to_owned());
        }
        replica.engine.stop();
        let segments = replica.engine.journal().map_or(0, |journal| journal.segments());
        if segments > 1 {
            return Err(format!("bounds: {segments} segments are left of the journal"));
        }
        convergence::check(&self.primary.truth(), replica)?;
        self.figures.changes += self.machine.power.changes();
        self.replica = None;
        self.life += 1;
        self.link_down();
        self.machine = self.machine.again(Loss::Power(0));
        self.restart()?;
        self.look()?;
        Ok(true)
    }
}

/// What travels, for the trace.
fn describe(packet: &Packet) -> String {
    let of_set = |bytes: &Bytes| match UnverifiedSet(bytes.clone()).verify() {
        Ok(set) => {
            let header = set.header();
            let ops: Vec<_> = set.meta().map_or_else(
                |_| Vec::new(),
                |meta| meta.updates.iter().map(|(update, _)| update.op.kind().to_string()).collect(),
            );
            let (volume, number, first, last) =
                (&header.volume, header.number, header.first_seq, header.last_seq());
            let (start, end) = (header.start.0, header.end.0);
            format!("set {number} of {volume}: {first} to {last}, {start} to {end}: {}", ops.join(" "))
        }
        Err(error) => error.to_string(),
    };
    match packet {
        Packet::Set(set) => of_set(set),
        Packet::Tokens(bytes) => format!("{} bytes of tokens", bytes.len()),
        Packet::Control(bytes) => match Message::decode(bytes) {
            Ok(Message::NullSet(set)) => format!("null {}", of_set(&set)),
            Ok(message) => format!("{message:?}").chars().take(60).collect(),
            Err(error) => error.to_string(),
        },
    }
}
