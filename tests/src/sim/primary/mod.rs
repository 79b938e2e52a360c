//! The simulated primary: sidefile, mover, activity log and start of production, over trees that stand for a file system, on a
//! machine that fails.

pub(crate) mod copier;
pub(crate) mod desk;
pub(crate) mod history;
mod machine;
mod recovery;
mod tree;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SetNumber, SiteId, SiteName, VolumeIndex, VolumeInstance,
    VolumeName,
};
use twinfs_core::limits;
use twinfs_core::model::Random;
use twinfs_core::model::generate::{self, Generator};
use twinfs_core::session::sender::SenderConfig;
use twinfs_core::session::{ChainPoint, Role, SessionState, VolumeState as CopyState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::Message;
use twinfs_replicator::failpoint::{self, FailPoint};
use twinfs_replicator::primary::activity_log::{ActivityConfig, ActivityLog, Keeper, KeeperParts};
use twinfs_replicator::primary::chain::{PathHints, SetMaker, SetOrigin, SetVolume};
use twinfs_replicator::primary::clock::TimeSource;
use twinfs_replicator::primary::engine::{CopyProgress, Engine, EngineConfig, Files, Outlet};
use twinfs_replicator::primary::sidefile::{Capture, Start};
use twinfs_replicator::primary::start::{self, LastRun};
use twinfs_replicator::primary::store;
use twinfs_replicator::site::{State, VolumeState};
use twinfs_replicator::storage::Power;

use self::copier::Copying;
use self::desk::{Desk, Volume, Volumes, lock};
use self::history::History;
use self::machine::Machine;
use self::recovery::Source;
use self::tree::Tree;
use super::disk::Loss;
use super::network::Packet;

pub(crate) const SESSION: SessionId = SessionId::from_bytes([7; 16]);

/// How a primary is broken, to see that the checks object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sabotage {
    /// Not at all.
    #[default]
    Nothing,
    /// What is touched is not named in the activity log.
    ForgetEntries,
    /// What was under way when the process was killed is not looked at.
    DropIntents,
    /// A resync leaves out some of what its map names.
    SkipResync,
    /// A loss report leaves out what came last.
    ShortReport,
}

pub(crate) fn site() -> (SiteName, SiteId) {
    (SiteName::new("primary").expect("a good name"), SiteId::from_bytes([1; 16]))
}

fn epoch() -> Epoch {
    Epoch { number: 1, site: site().1 }
}

/// Takes what the engine wants sent, as long as the power is on.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    packets: Rc<RefCell<Vec<Packet>>>,
    power: Power,
    hung_up: Rc<RefCell<Option<String>>>,
    tokens: bool,
}

impl Post {
    fn put(&self, packet: Packet) -> bool {
        if !self.power.is_off() {
            self.packets.borrow_mut().push(packet);
        }
        true
    }
}

impl Outlet for Post {
    fn say(&mut self, message: Vec<u8>) -> bool {
        self.put(Packet::Control(message.into()))
    }

    fn takes_tokens(&self) -> bool {
        self.tokens
    }

    fn tokens(&mut self, batch: Vec<u8>) -> bool {
        self.put(Packet::Tokens(batch.into()))
    }

    fn set(&mut self, set: Bytes) {
        self.put(Packet::Set(set));
    }

    fn hang_up(&mut self, why: &str) {
        *self.hung_up.borrow_mut() = Some(why.to_owned());
    }

    fn fenced(&mut self, epoch: Epoch) {
        *self.hung_up.borrow_mut() = Some(format!("fenced by {epoch:?}"));
    }
}

/// What the engine asks the file system layer.
struct Layer {
    desk: Desk,
    volumes: Volumes,
}

impl PathHints for Layer {
    fn path_of(&self, _: VolumeIndex, _: FileId) -> Box<[u8]> {
        Box::default()
    }
}

impl Files for Layer {
    fn copy_progress(&self, _: VolumeIndex) -> Option<CopyProgress> {
        None
    }

    fn start_resync(&self, index: VolumeIndex, map: ChangeMap) {
        if self.desk.is_dead() {
            return;
        }
        let volume = &mut lock(&self.volumes)[index.as_usize()];
        // The mark was published right before.
        let mark = self.desk.capture.last_seqs()[index.as_usize()];
        let stamp = twinfs_core::stamp::Stamp { time: self.desk.capture.now(), seq: mark };
        volume.history.publish(stamp, None);
        volume.copied_again = true;
        volume.copying = Copying::resync(map, volume.tree.live());
    }

    fn stop_resync(&self, index: VolumeIndex) -> Option<ChangeMap> {
        if self.desk.is_dead() {
            return None;
        }
        let volume = &mut lock(&self.volumes)[index.as_usize()];
        match std::mem::take(&mut volume.copying) {
            Copying::Resync { waiting, .. } => Some(waiting),
            Copying::Copy { .. } | Copying::Nothing => None,
        }
    }

    fn resync_failed(&self, _: VolumeIndex) -> bool {
        false
    }

    fn restart_copy(&self, index: VolumeIndex) {
        if !self.desk.is_dead() {
            let volume = &mut lock(&self.volumes)[index.as_usize()];
            volume.copying = Copying::copy(volume.tree.live());
            volume.copied_again = true;
        }
    }
}

/// A process of the primary.
pub(crate) struct Process {
    pub(crate) engine: Engine<Post>,
    pub(crate) desk: Desk,
    keeper: Keeper,
    applied: Arc<Mutex<Timestamp>>,
    packets: Rc<RefCell<Vec<Packet>>>,
    hung_up: Rc<RefCell<Option<String>>>,
    flushed: u64,
    marked: u64,
}

/// The primary: what outlives its processes, and the one that runs.
pub(crate) struct Primary {
    pub(crate) volumes: Volumes,
    machine: Machine,
    pub(crate) process: Option<Process>,
    pub(crate) sidefile_bytes: usize,
    activity: ActivityConfig,
    tokens: bool,
    sabotage: Sabotage,
    /// Each process is an incarnation of its own.
    lives: u64,
    /// For each volume of the welcome, which one that is.
    wire: Vec<usize>,
    /// Sets that the replica said are durable.
    pub(crate) acked: Vec<BTreeSet<SetNumber>>,
    names: Vec<VolumeName>,
}

/// Why a start did not come to its end.
#[derive(Debug)]
pub(crate) struct StartFailed(pub(crate) String);

impl StartFailed {
    fn of(error: impl std::fmt::Debug) -> Self {
        Self(format!("{error:?}"))
    }
}

impl Primary {
    pub(crate) fn new(random: &mut Random, sabotage: Sabotage) -> Self {
        let options = generate::Options {
            names_max: [6, 15, 30][random.below(3) as usize],
            write_bytes_max: [300, 3000, 9000][random.below(3) as usize],
            file_bytes: 24 << 10,
            sparse: random.one_in(3),
            shifts: !random.one_in(3),
            ..generate::Options::default()
        };
        let count = 1 + random.below(3);
        let mut volumes = Vec::new();
        for index in 0..count {
            let instance = VolumeInstance::new(100 + index).expect("it is not zero");
            let options = generate::Options { instance, ..options.clone() };
            let mut generator = Generator::new(random.next_u64(), options);
            for _ in 0..random.below(15) {
                drop(generator.step());
            }
            let mut first = generator.model().clone();
            first.drop_unnamed();
            generator.go_on_from(first.clone());
            let name = VolumeName::new(format!("volume-{index}")).expect("a good name");
            volumes.push(Volume {
                history: History::new(name, first.clone()),
                tree: Tree::new(first),
                generator,
                unpublished: None,
                copying: Copying::Nothing,
                copied_again: false,
            });
        }
        Self {
            acked: vec![BTreeSet::new(); volumes.len()],
            names: volumes.iter().map(|volume| volume.history.name.clone()).collect(),
            volumes: Arc::new(Mutex::new(volumes)),
            machine: Machine::new(random.next_u64()),
            process: None,
            sidefile_bytes: [192 << 10, 256 << 10, 512 << 10][random.below(3) as usize],
            activity: ActivityConfig {
                files_max: 1000,
                file_bytes_max: 64 << 10,
                eras_max: 4,
                era_ns: [50_000_000, 500_000_000][random.below(2) as usize],
                flush_ns: None,
            },
            tokens: !random.one_in(3),
            sabotage,
            lives: 0,
            wire: Vec::new(),
        }
    }

    pub(crate) fn names(&self) -> &[VolumeName] {
        &self.names
    }

    /// What truly happened.
    pub(crate) fn truth(&self) -> std::sync::MutexGuard<'_, Vec<Volume>> {
        lock(&self.volumes)
    }

    pub(crate) fn power(&self) -> &Power {
        &self.machine.power
    }

    pub(crate) fn set_time(&self, now: u64) {
        self.machine.clock.set(now);
    }

    /// Has each fail point count as a change, so that the power may go there.
    fn observed<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let power = self.machine.power.clone();
        let pulse = move |_: FailPoint| {
            let _ = power.change();
        };
        failpoint::observe(Rc::new(pulse), || work(self))
    }

    // ---- start and death ----

    /// Starts a process, as `fs/src/primary.rs` does.
    pub(crate) fn start(&mut self) -> Result<String, StartFailed> {
        self.observed(Self::start_observed)
    }

    fn start_observed(&mut self) -> Result<String, StartFailed> {
        let machine = &self.machine;
        let mut state = match machine.state().map_err(StartFailed::of)? {
            Some(state) => state,
            None => {
                let mut state = State::new(Role::Primary, epoch());
                state.session = Some(SESSION);
                state
            }
        };
        let mark = machine.stamp_mark().map_err(StartFailed::of)?;
        let sidefile = machine.sidefile();
        let limit = start::stamp_limit(mark, sidefile.is_some(), machine.clock.read());
        machine.save_stamp_mark(limit).map_err(StartFailed::of)?;
        let known = start::start_volumes(&state, self.names.len());
        let time: Arc<dyn TimeSource> = Arc::clone(&machine.clock) as _;
        let begin = |floor| Start { session: SESSION, volumes: &known, floor, limit };
        let (capture, last_run) = match sidefile {
            None => {
                let capture = Capture::in_memory(self.sidefile_bytes, time, &begin(mark), !state.clean)
                    .map_err(StartFailed::of)?;
                (capture, if state.clean { LastRun::Clean(None) } else { LastRun::Lost { mark } })
            }
            Some(image) => {
                let (capture, survivors) =
                    Capture::from_image(&image, time, &begin(Timestamp::ZERO)).map_err(StartFailed::of)?;
                (capture, LastRun::Killed { survivors, mark })
            }
        };
        let capture = Arc::new(capture);
        machine.keep(&capture);
        let begin = capture.now();
        for volume in lock(&self.volumes).iter_mut() {
            volume.history.begin(begin, || capture.now());
        }
        let storage = Arc::new(machine.activity.clone());
        let (log, found) =
            ActivityLog::open(storage, SESSION, capture.now(), self.activity).map_err(StartFailed::of)?;
        let log = Arc::new(log);
        log.settle_found(capture.now());
        let suspended = start::suspension(&state, &last_run);
        let desk = Desk {
            capture: Arc::clone(&capture),
            log: Arc::clone(&log),
            power: machine.power.clone(),
            sabotage: self.sabotage,
        };
        let source = Source { desk: &desk, volumes: &self.volumes, found: &found };
        let covered = start::take_up(&capture, &last_run, suspended, &source).map_err(StartFailed::of)?;
        // What was under way is told of by now, or noted.
        for volume in lock(&self.volumes).iter_mut() {
            if let Some(change) = volume.unpublished.take() {
                let time = capture.now();
                volume.history.change(time, change);
            }
        }

        self.lives += 1;
        let (name, site) = site();
        let incarnation = Incarnation(0x5157 + self.lives);
        let config = SenderConfig { session: SESSION, site, name, epoch: epoch(), incarnation };
        let origin = SetOrigin { session: SESSION, epoch: epoch(), incarnation, level: 1 };
        let set_volumes = self.set_volumes();
        if state.volumes.is_empty() {
            state.volumes = set_volumes.iter().map(new_volume).collect();
        }
        let sender_volumes = state.volumes.iter().zip(&set_volumes).enumerate().map(|(at, (volume, set))| {
            let chain = last_run.survivors().and_then(|survivors| survivors.volumes.get(at));
            start::sender_volume(volume, set.root, Vec::new(), chain)
        });
        let sender_volumes = sender_volumes.collect();
        let mut sender = start::sender(config, sender_volumes, &capture, &last_run, suspended, covered);
        for (at, volume) in lock(&self.volumes).iter_mut().enumerate() {
            let index = VolumeIndex(at as u16);
            volume.copying = Copying::Nothing;
            if !sender.is_whole(index) && suspended.is_none() {
                sender.handle_copy_started(index).map_err(StartFailed::of)?;
                volume.copying = Copying::copy(volume.tree.live());
                volume.copied_again |= self.lives > 1;
            }
        }
        (state.suspended, state.clean) = (suspended, false);
        self.machine.save_state(&state).map_err(StartFailed::of)?;
        failpoint::pass(FailPoint::StateSaved);

        let packets: Rc<RefCell<Vec<Packet>>> = Rc::default();
        let hung_up: Rc<RefCell<Option<String>>> = Rc::default();
        let applied = Arc::new(Mutex::new(Timestamp::ZERO));
        let engine = Engine::new(EngineConfig {
            capture: Arc::clone(&capture),
            log: Some(Arc::clone(&log)),
            sender,
            maker: SetMaker::new(origin, set_volumes.clone()),
            volumes: set_volumes,
            files: Arc::new(Layer { desk: desk.clone(), volumes: Arc::clone(&self.volumes) }),
            role: Role::Primary,
            epoch: epoch(),
            reason: last_run.why_suspended().map(ToOwned::to_owned),
            examining: false,
            outlet: Post {
                packets: Rc::clone(&packets),
                power: self.machine.power.clone(),
                hung_up: Rc::clone(&hung_up),
                tokens: self.tokens,
            },
        });
        let keeper = self.keeper(&desk, &applied);
        let now = self.machine.clock.read().boot;
        self.process =
            Some(Process { engine, desk, keeper, applied, packets, hung_up, flushed: now, marked: now });
        let text = match &last_run {
            LastRun::Clean(_) => "clean".to_owned(),
            LastRun::Killed { survivors, .. } => format!(
                "killed, {} updates and {} intents left, dropped: {}",
                survivors.updates,
                survivors.intents.len(),
                survivors.dropped
            ),
            LastRun::Lost { .. } => {
                format!("power lost, {} files, everything: {}", found.files.len(), found.everything)
            }
        };
        if self.machine.power.is_off() { Err(StartFailed("it died".into())) } else { Ok(text) }
    }

    fn set_volumes(&self) -> Vec<SetVolume> {
        let of = |volume: &Volume| {
            let History { name, instance, root, .. } = &volume.history;
            SetVolume { name: name.clone(), instance: *instance, root: *root }
        };
        lock(&self.volumes).iter().map(of).collect()
    }

    fn keeper(&self, desk: &Desk, applied: &Arc<Mutex<Timestamp>>) -> Keeper {
        let (volumes, applied) = (Arc::clone(&self.volumes), Arc::clone(applied));
        let (power, capture) = (desk.power.clone(), Arc::clone(&desk.capture));
        let sync_backing = move || {
            if power.change() != twinfs_replicator::storage::Pulse::On {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            lock(&volumes).iter_mut().for_each(|volume| volume.tree.sync_all());
            Ok(())
        };
        Keeper::new(KeeperParts {
            log: Arc::clone(&desk.log),
            sync_backing: Box::new(sync_backing),
            applied: Box::new(move || *applied.lock().expect("nobody panics with it")),
            now: Box::new(move || capture.now()),
        })
    }

    /// The process is gone, and perhaps all that the power kept. Returns how many changes of programs were lost.
    pub(crate) fn die(&mut self, random: &mut Random, loss: Loss) -> usize {
        let process = self.process.take();
        let mut lost = 0;
        for (at, volume) in lock(&self.volumes).iter_mut().enumerate() {
            volume.copying = Copying::Nothing;
            if loss == Loss::Process {
                volume.tree.kill();
            } else {
                let index = VolumeIndex(at as u16);
                let log = process.as_ref().map(|process| &process.desk.log);
                lost += volume.tree.lose_power(random, volume.unpublished.is_some(), |file| {
                    log.is_some_and(|log| log.is_durable(index, file))
                });
            }
            volume.generator.go_on_from(volume.tree.live().clone());
        }
        self.machine = self.machine.again(loss);
        // Beyond a gap, the next process makes the sets anew.
        for acked in &mut self.acked {
            *acked = (1..).map(SetNumber).take_while(|number| acked.contains(number)).collect();
        }
        if loss != Loss::Process {
            self.reset_histories();
        }
        lost
    }

    /// After a power loss the trees are others, from an instant on that no stamp had reached.
    fn reset_histories(&mut self) {
        let mark = self.machine.stamp_mark().unwrap_or_default();
        for volume in lock(&self.volumes).iter_mut() {
            volume.unpublished = None;
            let time = Timestamp(mark.0.max(volume.history.last_time().0) + 1);
            volume.history.reset(time, volume.tree.live().clone());
        }
    }

    // ---- what it does ----

    /// A program does something. Returns whether it could.
    pub(crate) fn operate(&mut self, random: &mut Random) -> bool {
        self.observed(|primary| primary.operate_observed(random))
    }

    fn operate_observed(&mut self, random: &mut Random) -> bool {
        let Some(Process { desk, .. }) = &self.process else { return false };
        // Programs that would have to wait come again later: nobody waits in virtual time.
        if desk.capture.fullness() > 0.6 && desk.capture.is_link_up() {
            return false;
        }
        let mut volumes = lock(&self.volumes);
        let at = random.below(volumes.len() as u64) as usize;
        let (index, volume) = (VolumeIndex(at as u16), &mut volumes[at]);
        let (cut, syncs) = (random.one_in(2), random.one_in(5));
        let mut last = None;
        for change in volume.generator.step() {
            last = change.update.op.files()[0];
            if !desk.call(index, volume, change, cut) {
                return true;
            }
        }
        if let Some(file) = last.filter(|_| syncs) {
            desk.sync(index, volume, file, cut);
        }
        true
    }

    /// Threads do their work: copies, the activity log, the stamp mark.
    pub(crate) fn chores(&mut self, now: u64) -> Result<(), String> {
        self.observed(|primary| primary.chores_observed(now))
    }

    fn chores_observed(&mut self, now: u64) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let desk = &process.desk;
        for (at, volume) in lock(&self.volumes).iter_mut().enumerate() {
            for _ in 0..3 {
                if !copier::step(desk, VolumeIndex(at as u16), volume) {
                    break;
                }
            }
        }
        if now.saturating_sub(process.flushed) >= limits::ACTIVITY_FLUSH_NS {
            process.flushed = now;
            let flushed = desk.log.flush();
            *process.applied.lock().expect("nobody panics with it") = process.engine.both_have();
            let kept = process.keeper.step();
            if !desk.is_dead() {
                flushed.map_err(|error| format!("activity log: {error}"))?;
                kept.map_err(|error| format!("activity log: {error}"))?;
            }
        }
        if now.saturating_sub(process.marked) >= limits::STAMP_RESERVE_NS / 4 {
            process.marked = now;
            let mark = store::mark_after(desk.capture.now(), self.machine.clock.read());
            if self.machine.save_stamp_mark(mark).is_ok() {
                desk.capture.raise_limit(mark);
            }
        }
        Ok(())
    }

    pub(crate) fn linked(&mut self) {
        self.with_engine(|engine, _| engine.handle_linked());
    }

    pub(crate) fn unlinked(&mut self) {
        self.with_engine(|engine, _| engine.handle_unlinked("the link was cut".to_owned()));
    }

    pub(crate) fn settle(&mut self) {
        self.with_engine(|engine, now| engine.settle(now));
    }

    fn with_engine(
        &mut self,
        work: impl FnOnce(&mut Engine<Post>, twinfs_replicator::primary::clock::Reading),
    ) {
        let now = self.machine.clock.read();
        self.observed(|primary| {
            if let Some(process) = &mut primary.process {
                work(&mut process.engine, now);
            }
        });
    }

    /// When it wants to be woken.
    pub(crate) fn next_wake(&self, now: u64) -> Option<u64> {
        let Process { engine, desk, .. } = self.process.as_ref()?;
        let wake = engine.next_wake();
        let due = desk.capture.queued().0 >= wake.queued_bytes;
        Some(if due { now } else { now + wake.after.as_nanos() as u64 })
    }

    /// What it wants sent.
    pub(crate) fn take_packets(&self) -> Vec<Packet> {
        self.process
            .as_ref()
            .map_or_else(Vec::new, |process| std::mem::take(&mut *process.packets.borrow_mut()))
    }

    /// The replica said something.
    pub(crate) fn handle(&mut self, bytes: &[u8], message: &Message) -> Result<(), String> {
        match message {
            Message::Welcome(welcome) => {
                let place = |name: &VolumeName| self.names.iter().position(|known| known == name);
                self.wire = welcome.volumes.iter().filter_map(|volume| place(&volume.name)).collect();
                for (volume, theirs) in self.wire.iter().zip(&welcome.volumes) {
                    let acked = &mut self.acked[*volume];
                    let whole =
                        (1..).map(SetNumber).take_while(|number| acked.contains(number)).count() as u64;
                    if theirs.durable.number.0 < whole {
                        return Err(format!(
                            "lost acknowledgement: set {whole} of {} was acknowledged, the replica says {}",
                            theirs.name, theirs.durable.number
                        ));
                    }
                    acked.extend((1..=theirs.durable.number.0).map(SetNumber));
                    acked.extend(&theirs.beyond);
                }
            }
            Message::Ack(ack) => {
                let volume = self.wire.get(ack.volume.as_usize()).ok_or("acknowledgement of no volume")?;
                self.acked[*volume].insert(ack.number);
            }
            Message::Progress(_) => {}
            other => return Err(format!("refused: the replica says {other:?}")),
        }
        self.with_engine(|engine, now| engine.handle_message(bytes, now));
        let Some(process) = &self.process else { return Ok(()) };
        if let Some(why) = process.hung_up.borrow_mut().take() {
            return Err(format!("refused: the sites do not agree: {why}"));
        }
        match process.engine.sender().session_state() {
            SessionState::Diverged => {
                Err("refused: DIVERGED, and nothing happened that explains it".to_owned())
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn state(&self) -> String {
        self.process.as_ref().map_or_else(
            || "dead".to_owned(),
            |process| {
                let fill = process.desk.capture.fill();
                let sender = process.engine.sender();
                format!(
                    "{:?} suspended {:?} {fill:?} progress {:?}",
                    sender.session_state(),
                    sender.suspended(),
                    sender.progress()
                )
            },
        )
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.desk.capture.fill().suspended)
    }

    pub(crate) fn is_duplex(&self) -> bool {
        let sender = self.process.as_ref().map(|process| process.engine.sender());
        sender.is_some_and(|sender| sender.session_state() == SessionState::Duplex)
    }

    /// Whether the replica has and shows everything.
    pub(crate) fn is_converged(&self) -> bool {
        let Some(Process { engine, desk, .. }) = &self.process else { return false };
        let volumes = lock(&self.volumes);
        let time = volumes.iter().map(|volume| volume.history.last_time()).max().unwrap_or_default();
        let copied = volumes.iter().all(|volume| matches!(volume.copying, Copying::Nothing));
        copied
            && engine.sender().session_state() == SessionState::Duplex
            && engine.sender().is_idle()
            && !desk.capture.fill().suspended
            && desk.capture.queued().1 == 0
            && engine.sender().progress().time >= time
    }
}

/// A volume that was never mirrored.
fn new_volume(volume: &SetVolume) -> VolumeState {
    VolumeState {
        name: volume.name.clone(),
        source: "/simulated".into(),
        instance: volume.instance,
        root_ino: volume.root.ino,
        root_generation: volume.root.generation,
        state: CopyState::Pending,
        complete: None,
        acked_set: ChainPoint::START.number,
        acked_hash: ChainPoint::START.hash,
        acked_seq: Seq::ZERO,
        acked_end: Timestamp::ZERO,
        end: Timestamp::ZERO,
        last_seq: Seq::ZERO,
    }
}
