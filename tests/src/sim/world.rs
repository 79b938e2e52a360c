//! Everything that happens, in the order of virtual time.

pub(crate) mod rot;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use twinfs_certs::Site;
use twinfs_core::model::Random;
use twinfs_core::session::receiver::Ordering;
use twinfs_core::wire::Message;
use twinfs_replicator::replica::engine::ConnectionId;
use twinfs_replicator::replica::image::ImageOptions;

use super::check::acknowledged;
use super::check::atomicity::Atomicity;
use super::check::bounds::Bounds;
use super::check::convergence;
use super::check::prefix::Prefix;
use super::disk::{Loss, Machine};
use super::network::{Network, Packet, Side};
use super::primary::{self, Primary};
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
    /// Crashes of the replica, at least.
    pub crashes: u64,
    /// How the replica forms groups: other than by stamps only to see that the checks object.
    pub ordering: Ordering,
    /// Whether the text of the trace is kept; its hash always is.
    pub text: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { operations: 300, crashes: 20, ordering: Ordering::ByStamp, text: false }
    }
}

/// What a run had in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Operations of programs.
    pub operations: u64,
    /// Crashes of the replica: of its process, and of its power.
    pub crashes: [u64; 2],
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
    Wake,
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
    crash_gap: u64,
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
        let primary = Primary::new(&mut random);
        let network = Network::new(&mut random);
        let setup = Setup {
            segment_bytes: [96 << 10, 256 << 10, 1 << 20][random.below(3) as usize],
            image: ImageOptions {
                delta_bytes_max: [20_000, 200_000, 64 << 20][random.below(3) as usize],
                checkpoint_interval: Duration::from_millis([20, 200, 2000][random.below(3) as usize]),
            },
            ordering: options.ordering,
        };
        let machine = Machine::new(random.next_u64());
        let operate_gap_ns = [MS / 10, MS, 20 * MS][random.below(3) as usize];
        let crash_gap = [60, 200, 500][random.below(3) as usize];
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
            crash_gap,
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
        for event in [Event::Restart, Event::Operate, Event::LinkDown] {
            self.at(1, event);
        }
        self.plan_crash();
        while let Some(((time, _), event)) = self.queue.pop_first() {
            self.now = time;
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
        self.hasher.update(&self.machine.power.changes().to_le_bytes());
        self.hasher.update(what.as_bytes());
        if self.options.text {
            let changes = self.machine.power.changes();
            writeln!(self.text, "{} {changes} {what}", self.now).expect("a string takes everything");
        }
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.events += 1;
        self.queue.insert((self.now + delay, self.events), event);
    }

    fn crashes(&self) -> u64 {
        self.figures.crashes.iter().sum()
    }

    /// Whether there were operations and crashes enough: from then on nothing fails any more.
    fn is_over(&mut self) -> bool {
        let over =
            self.figures.operations >= self.options.operations && self.crashes() >= self.options.crashes;
        if over && self.healed_at.is_none() {
            self.healed_at = Some(self.now);
            self.primary.complete(self.now);
            self.machine.power.cut_at(u64::MAX);
            self.note(|| "nothing fails any more".to_owned());
        }
        over
    }

    /// The power of the machine goes at one of its next changes.
    fn plan_crash(&mut self) {
        if self.healed_at.is_none() {
            // Often soon, so that recoveries and the first steps after them are hit.
            self.hurried = false;
            let gap = if self.random.one_in(6) { 12 } else { 2 * self.crash_gap };
            let at = self.machine.power.changes() + 1 + self.random.below(gap);
            self.machine.power.cut_at(at);
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Operate if self.healed_at.is_none() => {
                let packets = self.primary.operate(&mut self.random, self.now);
                self.figures.operations += 1;
                packets.into_iter().for_each(|packet| self.send(Side::Replica, packet));
                // As many operations as crashes call for.
                let ahead = self.figures.operations * self.options.crashes
                    > (self.crashes() + 2) * self.options.operations;
                if ahead && !self.hurried {
                    self.hurried = true;
                    let at = self.machine.power.changes() + 1 + self.random.below(200);
                    self.machine.power.cut_at(at);
                }
                let gap_ns = if ahead { 50 * MS } else { self.operate_gap_ns };
                let delay = 1 + self.random.below(2 * gap_ns);
                self.at(delay, Event::Operate);
            }
            Event::Operate => {}
            Event::Wake => self.wake_at = None,
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
                    replica.engine.handle_checkpointed(result);
                    self.figures.checkpoints += u64::from(ended);
                    if !ended && !self.machine.power.is_off() {
                        return Err("convergence: a checkpoint failed on a good disk".to_owned());
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
        let link = self.network.connect();
        let (name, id) = primary::site();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        replica.engine.handle_linked(ConnectionId(link), Site { name, id }, address);
        self.note(|| format!("connection {link}"));
        let hello = Message::Hello(self.primary.sender.hello()).encode();
        self.send(Side::Replica, Packet::Control(hello.into()));
    }

    /// Both sides notice at once; what is in flight is lost.
    fn link_down(&mut self) {
        if let Some(link) = self.network.link.take() {
            self.primary.sender.handle_disconnected();
            if let Some(replica) = &mut self.replica {
                replica.engine.handle_unlinked(ConnectionId(link), "the link was cut".to_owned());
            }
            self.note(|| format!("connection {link} is lost"));
        }
        let delay = 1 + self.random.below(50 * MS);
        self.at(delay, Event::LinkUp);
    }

    fn deliver(&mut self, link: u64, to: Side, packet: Packet) -> Result<(), String> {
        if to == Side::Primary {
            let Packet::Control(bytes) = packet else { return Err("refused: not a message".to_owned()) };
            let message = Message::decode(&bytes).map_err(|error| error.to_string())?;
            self.note(|| format!("the primary hears {message:?}"));
            return self.primary.handle(self.now, message);
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

    fn drive_primary(&mut self) -> Result<(), String> {
        let packets = self.primary.step(&mut self.random, self.now)?;
        packets.into_iter().for_each(|packet| self.send(Side::Replica, packet));
        if let Some(at) = self.primary.next_wake().map(|at| at.max(self.now + 1))
            && self.wake_at.is_none_or(|known| known > at)
        {
            self.wake_at = Some(at);
            self.at(at - self.now, Event::Wake);
        }
        Ok(())
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
        self.prefix.check(image, visible, &self.primary.volumes)?;
        if !self.machine.power.is_off() {
            self.atomicity.check(image, &self.primary.volumes)?;
            self.bounds.check(replica)?;
        }
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
        let loss = match self.random.below(10) {
            0..4 => Loss::Process,
            4 => Loss::Power(0),
            5 => Loss::Power(1),
            _ => Loss::Power(self.random.next_u64()),
        };
        self.figures.crashes[usize::from(loss != Loss::Process)] += 1;
        self.note(|| format!("crash: {loss:?}"));
        self.machine = self.machine.again(loss);
        self.plan_crash();
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
        self.settle_in(1);
        let delay = 1 + self.random.below(20 * MS);
        self.at(delay, Event::LinkUp);
        Ok(())
    }

    // ---- the end ----

    /// Whether everything has converged; then stops the replica and compares its trees, and starts it once more.
    fn end(&mut self) -> Result<bool, String> {
        let healed_at = self.healed_at.expect("it is over");
        if self.now > healed_at + HEALED_NS_MAX {
            let shown = self.primary.sender.progress();
            return Err(format!("convergence: {shown:?} is all that is shown"));
        }
        let Some(replica) = self.replica.as_mut().filter(|_| self.primary.is_converged()) else {
            return Ok(false);
        };
        if !replica.engine.receiver().bare_tokens().count.eq(&0) {
            return Err("convergence: bare tokens are left".to_owned());
        }
        replica.engine.stop();
        let segments = replica.engine.journal().map_or(0, |journal| journal.segments());
        if segments > 1 {
            return Err(format!("bounds: {segments} segments are left of the journal"));
        }
        convergence::check(&self.primary, replica)?;
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
