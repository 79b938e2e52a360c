//! The primary's side of a session.
//!
//! The mover, which cuts intervals and builds record sets, drives it like this:
//!
//! 1. [`Sender::hello`] is the first message of a connection, [`Sender::handle_welcome`] takes the answer. Then
//!    [`Sender::poll_transmit`] names the sets to send (again), and goes on to do so after each new set.
//! 2. When [`Sender::is_cut_due`] says so, the mover ends the interval at an instant T over all volumes. For each volume
//!    with updates up to T it makes sets, as long as [`Sender::can_issue`] lets it: it asks [`Sender::link`] for the
//!    place in the chain, builds, and calls [`Sender::handle_issued`]. For each other volume it makes a null set after
//!    [`Sender::null_link`], sends it, and calls [`Sender::handle_null_issued`]: without it the idle volume would hold
//!    the others back. At the end it calls [`Sender::handle_cut`].
//! 3. [`Sender::handle_ack`] takes acknowledgements in any order; [`Sender::poll_released`] says what the replica has
//!    without a gap, so that the sidefile may let go of it.
//!
//! What is in flight is counted over all volumes from the oldest unacknowledged set to the newest, including what was
//! acknowledged out of order in between. So a volume whose sets are late cannot let the others run ahead without
//! bound, and the replica never has to hold more than the window.

mod resync;
mod types;
mod window;

use std::collections::VecDeque;

use crate::id::{Epoch, FileId, SetNumber, VolumeIndex, VolumeInstance, VolumeName};
use crate::limits;
use crate::session::handshake::{self, KnownChain, ResumeError};
use crate::session::{ChainPoint, Role, SessionState, SuspendReason, VolumeState};
use crate::stamp::{Seq, Stamp, Timestamp};
use crate::wire::{
    Ack, Damage, Hello, HelloVolume, PROTOCOL, Progress, PromoteReady, Refuse, RefuseCode, Welcome,
};
pub use types::{
    Adopted, Backlog, Behind, ChainLink, IssuedSet, NeedsResync, Released, SenderConfig, SenderError,
    SenderVolume,
};
use window::Window;

#[derive(Debug)]
struct Volume<H> {
    name: VolumeName,
    instance: VolumeInstance,
    root: FileId,
    state: VolumeState,
    complete: Option<Stamp>,
    end: Timestamp,
    window: Window<H>,
    released_due: bool,
    /// Sets of a run that was killed, after those of the window.
    forgotten: Vec<(ChainPoint, Timestamp)>,
    adopted_due: bool,
}

/// The primary's side of a session. See the [module](self) for how it is driven.
#[derive(Debug)]
pub struct Sender<H> {
    config: SenderConfig,
    volumes: Vec<Volume<H>>,
    /// For each volume of the welcome, in its order, the volume here. Empty without a connection.
    wire: Vec<VolumeIndex>,
    /// Sets in the order in which they were issued, from the oldest unacknowledged one on, over all volumes.
    order: VecDeque<InFlight>,
    /// How many sets have left `order` at the front.
    order_base: u64,
    span_bytes: u64,
    transmit: VecDeque<(VolumeIndex, SetNumber)>,
    progress: Progress,
    last_cut: Timestamp,
    null_interval_ns: u64,
    suspended: Option<SuspendReason>,
    needs_resync: bool,
    /// A change map names all that the replica may lack, wherever it stands.
    covered: Option<Timestamp>,
    restarted: Option<Vec<Seq>>,
    damage: Option<Damage>,
    diverged: bool,
    fenced: Option<Epoch>,
}

#[derive(Debug)]
struct InFlight {
    volume: VolumeIndex,
    number: SetNumber,
    bytes: u64,
    acked: bool,
}

impl<H: Clone> Sender<H> {
    /// Starts from what was kept. `now` is on the session's clock, here and everywhere.
    #[must_use]
    pub fn new(config: SenderConfig, volumes: Vec<SenderVolume<H>>, now: Timestamp) -> Self {
        let mut sender = Self {
            config,
            volumes: Vec::new(),
            wire: Vec::new(),
            order: VecDeque::new(),
            order_base: 0,
            span_bytes: 0,
            transmit: VecDeque::new(),
            progress: Progress::default(),
            last_cut: now,
            null_interval_ns: limits::INTERVAL_NS,
            suspended: None,
            needs_resync: false,
            covered: None,
            restarted: None,
            damage: None,
            diverged: false,
            fenced: None,
        };
        let mut issued = Vec::new();
        for (index, volume) in (0..).map(VolumeIndex).zip(volumes) {
            issued.extend(volume.issued.into_iter().map(|set| (index, set)));
            sender.volumes.push(Volume {
                name: volume.name,
                instance: volume.instance,
                root: volume.root,
                // A run that was killed may not have had the time to say that its copy had begun.
                state: match volume.state {
                    VolumeState::Pending if volume.complete.is_some() => VolumeState::Copy,
                    state => state,
                },
                complete: volume.complete,
                end: volume.end,
                window: Window::new(volume.acked, volume.acked_end),
                released_due: false,
                adopted_due: false,
                forgotten: volume.forgotten,
            });
        }
        // As they were issued: no set of one volume overtakes an older one of another.
        issued.sort_by_key(|(_, set)| (set.first.time, set.number));
        for (index, set) in issued {
            sender.put_in_flight(index, set);
        }
        sender
    }

    /// What a clean stop has to keep of each volume, to start from without reading or sending anything twice.
    pub fn state(&self) -> impl Iterator<Item = SenderVolume<H>> {
        self.volumes.iter().map(|volume| SenderVolume {
            name: volume.name.clone(),
            instance: volume.instance,
            root: volume.root,
            state: volume.state,
            complete: volume.complete,
            acked: volume.window.acked(),
            acked_end: volume.window.acked_end(),
            end: volume.end,
            issued: volume.window.sets().cloned().collect(),
            forgotten: volume.forgotten.clone(),
        })
    }

    /// The first message of a connection.
    #[must_use]
    pub fn hello(&self) -> Hello {
        let volumes = self.volumes.iter().map(|volume| HelloVolume {
            name: volume.name.clone(),
            instance: volume.instance,
            root: volume.root,
            state: volume.state,
            // Whatever the replica has is right for one whose change map covers the rest.
            acked: if self.covered.is_some() { ChainPoint::START } else { volume.window.acked() },
            oldest: if self.covered.is_some() { SetNumber(1) } else { volume.window.acked().number.next() },
            newest: if self.covered.is_some() { SetNumber(0) } else { volume.window.issued().number },
        });
        Hello {
            protocol: PROTOCOL,
            session: self.config.session,
            site: self.config.site,
            name: self.config.name.clone(),
            epoch: self.config.epoch,
            incarnation: self.config.incarnation,
            volumes: volumes.collect(),
        }
    }

    /// The replica answered: goes on where it stands. [`poll_transmit`](Self::poll_transmit) then has exactly the sets
    /// that the replica lacks, the oldest first.
    ///
    /// # Errors
    /// [`ResumeError`]: close the connection. A fenced or diverged session stays so.
    pub fn handle_welcome(&mut self, now: Timestamp, welcome: &Welcome) -> Result<(), ResumeError> {
        self.handle_disconnected();
        let wire = match self.check_welcome(welcome) {
            _ if welcome.damage.is_some() => self.restart(now, welcome)?,
            Err(error) if self.is_covered(welcome) && error.is_about_the_past() => {
                self.restart(now, welcome)?
            }
            checked => checked.inspect_err(|error| self.note(error))?,
        };
        for (theirs, index) in welcome.volumes.iter().zip(&wire) {
            self.adopt(*index, theirs.durable);
            let numbers = self.volumes[index.as_usize()].window.unacked_through(theirs.durable.number);
            for number in numbers.into_iter().chain(theirs.beyond.iter().copied()) {
                self.mark_acked(*index, number);
            }
        }
        self.wire = wire;
        self.progress = Progress { group: welcome.group, time: welcome.time, applied: welcome.applied };
        self.update_states();
        // What is acknowledged among them is skipped when its turn comes.
        self.transmit = self.order.iter().map(|set| (set.volume, set.number)).collect();
        self.last_cut = now;
        self.null_interval_ns = limits::INTERVAL_NS;
        Ok(())
    }

    /// The replica refused. A fence and a divergence are remembered; after anything else try again later.
    pub fn handle_refuse(&mut self, refuse: &Refuse) {
        self.handle_disconnected();
        match refuse.code {
            RefuseCode::Fenced => {
                self.fenced = refuse.epoch.filter(|epoch| epoch.fences(&self.config.epoch)).or(self.fenced);
            }
            RefuseCode::Diverged | RefuseCode::Lost => self.diverged = true,
            RefuseCode::Failed => self.suspended = self.suspended.or(Some(SuspendReason::Journal)),
            _ => {}
        }
    }

    /// The connection is gone. What is unacknowledged stays.
    pub fn handle_disconnected(&mut self) {
        self.wire.clear();
        self.transmit.clear();
    }

    /// Another site took over (a planned promote is done): nothing is issued any more.
    pub fn handle_promoted(&mut self, epoch: Epoch) {
        if epoch.fences(&self.config.epoch) {
            self.fenced = Some(epoch);
        }
    }

    /// Whether there is room for another set of the volume now, and a connection to send it over.
    #[must_use]
    pub fn can_issue(&self, volume: VolumeIndex) -> bool {
        let room = self
            .volumes
            .get(volume.as_usize())
            .is_some_and(|volume| volume.window.len() < limits::IN_FLIGHT_SETS_MAX);
        let bytes_max = (limits::IN_FLIGHT_BYTES_MAX - limits::SET_BYTES_MAX) as u64;
        room && self.is_sending() && self.span_bytes <= bytes_max
    }

    /// The place of the volume's next set.
    ///
    /// # Errors
    /// [`SenderError::Volume`].
    pub fn link(&self, volume: VolumeIndex) -> Result<ChainLink, SenderError> {
        let null = self.null_link(volume)?;
        Ok(ChainLink { number: null.number.next(), ..null })
    }

    /// The place of a null set of the volume. The driver has made sure that every update of the volume up to the null
    /// set's end is in issued sets.
    ///
    /// # Errors
    /// [`SenderError::Volume`].
    pub fn null_link(&self, volume: VolumeIndex) -> Result<ChainLink, SenderError> {
        let known = self.volumes.get(volume.as_usize()).ok_or(SenderError::Volume(volume))?;
        let last = known.window.issued();
        Ok(ChainLink {
            number: last.number,
            predecessor: last.hash,
            first_seq: last.last_seq.next(),
            start: known.end,
        })
    }

    /// A set was made at the place that [`link`](Self::link) gave: it will be transmitted and held until it is
    /// acknowledged.
    ///
    /// # Errors
    /// [`SenderError`]; nothing changed.
    pub fn handle_issued(&mut self, volume: VolumeIndex, set: IssuedSet<H>) -> Result<(), SenderError> {
        let next = self.link(volume)?.number;
        if set.number != next {
            return Err(SenderError::NotNext { number: set.number, next });
        }
        if self.is_connected() {
            self.transmit.push_back((volume, set.number));
        }
        self.put_in_flight(volume, set);
        Ok(())
    }

    /// A null set was made and sent, with an interval that ends at `end`.
    ///
    /// # Errors
    /// [`SenderError::Volume`].
    pub fn handle_null_issued(&mut self, volume: VolumeIndex, end: Timestamp) -> Result<(), SenderError> {
        let known = self.volumes.get_mut(volume.as_usize()).ok_or(SenderError::Volume(volume))?;
        known.end = known.end.max(end);
        Ok(())
    }

    /// The next set to send, oldest first. Sets may travel on streams of their own and arrive in any order.
    pub fn poll_transmit(&mut self) -> Option<(VolumeIndex, &IssuedSet<H>)> {
        while let Some((volume, number)) = self.transmit.pop_front() {
            // It may have been acknowledged in between: a set is sent once on each connection at most.
            if self.volumes[volume.as_usize()].window.unacked(number).is_some() {
                let set = self.volumes[volume.as_usize()].window.unacked(number);
                return set.map(|set| (volume, set));
            }
        }
        None
    }

    /// A set is durable at the replica. Returns whether that is news.
    ///
    /// # Errors
    /// [`SenderError`]: the peer broke the protocol; close the connection.
    pub fn handle_ack(&mut self, ack: Ack) -> Result<bool, SenderError> {
        if !self.is_connected() {
            return Err(SenderError::NotConnected);
        }
        let index = *self.wire.get(ack.volume.as_usize()).ok_or(SenderError::Volume(ack.volume))?;
        let window = &self.volumes[index.as_usize()].window;
        if ack.number > window.issued().number || ack.number == SetNumber(0) {
            return Err(SenderError::NotIssued(ack.number));
        }
        if window.unacked(ack.number).is_none() {
            return Ok(false);
        }
        self.mark_acked(index, ack.number);
        self.update_states();
        Ok(true)
    }

    /// The replica says what it shows. What comes late, behind something newer, is ignored.
    pub fn handle_progress(&mut self, progress: Progress) {
        let known = self.progress;
        let rank = |progress: &Progress| (progress.group, progress.time, progress.applied);
        if self.is_connected() && rank(&known) < rank(&progress) {
            self.progress = progress;
            self.update_states();
        }
    }

    /// What the replica shows, as far as it is known.
    #[must_use]
    pub const fn progress(&self) -> Progress {
        self.progress
    }

    /// What the sidefile may let go of, for each volume where that grew.
    pub fn poll_released(&mut self) -> Option<Released> {
        let mut volumes = (0..).map(VolumeIndex).zip(&mut self.volumes);
        let (index, volume) = volumes.find(|(_, volume)| volume.released_due)?;
        volume.released_due = false;
        let acked = volume.window.acked();
        Some(Released { volume: index, point: acked, end: volume.window.acked_end() })
    }

    /// What the replica turned out to have of the sets of a run that was killed. Ask after each welcome, before anything
    /// is cut: the updates up to there must not be sent again.
    pub fn poll_adopted(&mut self) -> Option<Adopted> {
        let mut volumes = (0..).map(VolumeIndex).zip(&mut self.volumes);
        let (index, volume) = volumes.find(|(_, volume)| volume.adopted_due)?;
        volume.adopted_due = false;
        Some(Adopted { volume: index, through: volume.window.acked().last_seq })
    }

    /// Whether an interval should end now: at once when the pipe is idle, otherwise when it is as long as
    /// [`limits::INTERVAL_NS`] or a set is full; without updates, when the next null sets are due.
    ///
    /// `backlog` says of each volume, in their order, what is in no set yet. A volume without room in its window does
    /// not count: a cut would bring nothing of it. Ask again after each acknowledgement.
    #[must_use]
    pub fn is_cut_due(&self, now: Timestamp, backlog: &[Backlog]) -> bool {
        let backlog = self.issuable(backlog);
        let pipe_is_idle = self.order.is_empty();
        let at_once = backlog == Backlog::Full || (backlog == Backlog::Some && pipe_is_idle);
        at_once || self.cut_time(backlog).is_some_and(|due| now >= due)
    }

    /// When to ask [`is_cut_due`](Self::is_cut_due) again if nothing happens before; `None` while nothing is sent.
    #[must_use]
    pub fn next_cut(&self, backlog: &[Backlog]) -> Option<Timestamp> {
        self.cut_time(self.issuable(backlog))
    }

    /// An interval ended at `now` for all volumes; `idle` if all that came of it were null sets. Then the time to the
    /// next null sets doubles, up to [`limits::NULL_INTERVAL_NS_MAX`].
    pub fn handle_cut(&mut self, now: Timestamp, idle: bool) {
        self.last_cut = now;
        let next = if idle { self.null_interval_ns.saturating_mul(2) } else { limits::INTERVAL_NS };
        self.null_interval_ns = next.min(limits::NULL_INTERVAL_NS_MAX);
    }

    /// The copy of a volume begins.
    ///
    /// # Errors
    /// [`SenderError::Volume`].
    pub fn handle_copy_started(&mut self, volume: VolumeIndex) -> Result<(), SenderError> {
        let known = self.volumes.get_mut(volume.as_usize()).ok_or(SenderError::Volume(volume))?;
        if known.state == VolumeState::Pending {
            known.state = VolumeState::Copy;
        }
        Ok(())
    }

    /// Stops sending new sets. What is in flight goes on; the first reason stays.
    pub fn suspend(&mut self, reason: SuspendReason) {
        self.suspended = self.suspended.or(Some(reason));
    }

    /// Updates are let go that no set holds (the sidefile is full and the session suspended).
    pub fn handle_let_go(&mut self) {
        self.needs_resync = true;
    }

    /// Goes on after a suspension.
    ///
    /// # Errors
    /// [`NeedsResync`] if updates were let go: their sequence numbers are missing for ever.
    pub fn resume(&mut self) -> Result<(), NeedsResync> {
        if self.needs_resync {
            return Err(NeedsResync);
        }
        self.suspended = None;
        Ok(())
    }

    /// Why nothing new is sent, if so.
    #[must_use]
    pub const fn suspended(&self) -> Option<SuspendReason> {
        self.suspended
    }

    /// State of the session.
    #[must_use]
    pub fn session_state(&self) -> SessionState {
        let any = |state| self.volumes.iter().any(|volume| volume.state == state);
        match self.suspended {
            _ if self.diverged => SessionState::Diverged,
            Some(reason) => SessionState::Suspended(reason),
            None if any(VolumeState::Resync) => SessionState::Resync,
            None if any(VolumeState::Copy) || any(VolumeState::Pending) && any(VolumeState::Duplex) => {
                SessionState::Copy
            }
            None if any(VolumeState::Pending) || self.volumes.is_empty() => SessionState::Pending,
            None => SessionState::Duplex,
        }
    }

    /// State of a volume.
    #[must_use]
    pub fn volume_state(&self, volume: VolumeIndex) -> Option<VolumeState> {
        self.volumes.get(volume.as_usize()).map(|volume| volume.state)
    }

    /// Whether the copy of a volume has ended: its mark is made, durable at the replica or not.
    #[must_use]
    pub fn is_whole(&self, volume: VolumeIndex) -> bool {
        let volume = self.volumes.get(volume.as_usize());
        let is_member = |state| matches!(state, VolumeState::Duplex | VolumeState::Resync);
        volume.is_some_and(|volume| volume.complete.is_some() || is_member(volume.state))
    }

    /// Primary, or fenced.
    #[must_use]
    pub const fn role(&self) -> Role {
        if self.fenced.is_some() { Role::Fenced } else { Role::Primary }
    }

    /// The epoch that fences this primary.
    #[must_use]
    pub const fn fenced_by(&self) -> Option<Epoch> {
        self.fenced
    }

    /// Whether a replica has been welcomed and the connection stands.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !self.wire.is_empty()
    }

    /// What the replica lacks of the sets that were made.
    #[must_use]
    pub fn behind(&self) -> Behind {
        let mut behind = Behind::default();
        for volume in &self.volumes {
            for set in volume.window.iter_unacked() {
                behind.bytes += set.bytes;
                behind.records += set.updates();
                behind.sets += 1;
                behind.oldest =
                    Some(behind.oldest.map_or(set.first.time, |oldest| oldest.min(set.first.time)));
            }
        }
        behind
    }

    /// Whether every set that was made is acknowledged.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.order.is_empty()
    }

    /// Where the last interval ended.
    #[must_use]
    pub fn last_end(&self) -> Timestamp {
        self.volumes.iter().map(|volume| volume.end).max().unwrap_or_default()
    }

    /// Bytes from the oldest unacknowledged set to the newest; bounded by [`limits::IN_FLIGHT_BYTES_MAX`].
    #[must_use]
    pub const fn in_flight_bytes(&self) -> u64 {
        self.span_bytes
    }

    /// For a planned promote, once writes are held and an interval ended at `end` with nothing left to issue: what the
    /// replica has to reach. `None` while something is unacknowledged, or without a connection.
    #[must_use]
    pub fn promote_ready(&self, end: Timestamp) -> Option<PromoteReady> {
        let drained = self.is_connected() && self.order.is_empty();
        let last = |index: &VolumeIndex| self.volumes[index.as_usize()].window.issued().number;
        let finals =
            (0..).map(VolumeIndex).zip(&self.wire).map(|(volume, ours)| Ack { volume, number: last(ours) });
        drained.then(|| PromoteReady { end, finals: finals.collect() })
    }

    fn issuable(&self, backlog: &[Backlog]) -> Backlog {
        let volumes = (0..).map(VolumeIndex).zip(backlog);
        volumes
            .filter(|(index, _)| self.can_issue(*index))
            .map(|(_, backlog)| *backlog)
            .max()
            .unwrap_or_default()
    }

    fn cut_time(&self, issuable: Backlog) -> Option<Timestamp> {
        let interval_ns = if issuable == Backlog::None { self.null_interval_ns } else { limits::INTERVAL_NS };
        self.is_sending().then(|| Timestamp(self.last_cut.0.saturating_add(interval_ns)))
    }

    fn is_sending(&self) -> bool {
        self.is_connected() && self.suspended.is_none() && self.fenced.is_none() && !self.diverged
    }

    fn check_welcome(&self, welcome: &Welcome) -> Result<Vec<VolumeIndex>, ResumeError> {
        self.check_past(welcome, true)
    }

    /// As [`check_welcome`](Self::check_welcome); the chains are compared if `chains` says so.
    fn check_past(&self, welcome: &Welcome, chains: bool) -> Result<Vec<VolumeIndex>, ResumeError> {
        if welcome.epoch.fences(&self.config.epoch) {
            return Err(ResumeError::Fenced(welcome.epoch));
        }
        if welcome.role != Role::Replica {
            return Err(ResumeError::NotReplica(welcome.role));
        }
        let missing = self.volumes.iter().find(|ours| welcome.volumes.iter().all(|v| v.name != ours.name));
        if let Some(missing) = missing {
            return Err(ResumeError::Volumes(missing.name.clone()));
        }
        let mut wire = Vec::with_capacity(welcome.volumes.len());
        for theirs in &welcome.volumes {
            let mut found = (0..).map(VolumeIndex).zip(&self.volumes);
            let (index, ours) = found
                .find(|(_, ours)| ours.name == theirs.name)
                .ok_or_else(|| ResumeError::Volumes(theirs.name.clone()))?;
            if chains {
                let forgotten = ours.forgotten.iter().map(|(point, _)| *point);
                let made: Vec<_> = ours.window.sets().map(IssuedSet::point).chain(forgotten).collect();
                let acked = ours.window.acked();
                handshake::resume_point(
                    KnownChain { name: &ours.name, acked, issued: made.iter().copied() },
                    theirs,
                )?;
            }
            wire.push(index);
        }
        Ok(wire)
    }

    /// The first welcome after a run that was killed: the chain goes on after the last set whose bytes are at hand, or
    /// which the replica has. Its other sets are no more; the replica has dropped those that it had beyond a gap.
    fn adopt(&mut self, index: VolumeIndex, durable: ChainPoint) {
        let volume = &mut self.volumes[index.as_usize()];
        let forgotten = std::mem::take(&mut volume.forgotten);
        let Some((point, end)) = forgotten.into_iter().find(|(point, _)| *point == durable) else { return };
        let numbers = volume.window.unacked_through(durable.number);
        for number in numbers {
            self.mark_acked(index, number);
        }
        let volume = &mut self.volumes[index.as_usize()];
        volume.window = Window::new(point, end);
        volume.end = volume.end.max(end);
        (volume.released_due, volume.adopted_due) = (true, true);
    }

    fn put_in_flight(&mut self, index: VolumeIndex, set: IssuedSet<H>) {
        let volume = &mut self.volumes[index.as_usize()];
        volume.end = volume.end.max(set.end);
        volume.complete = volume.complete.or(set.complete);
        let (number, bytes) = (set.number, set.bytes);
        self.span_bytes += bytes;
        let ordinal = self.order_base + self.order.len() as u64;
        self.order.push_back(InFlight { volume: index, number, bytes, acked: false });
        volume.window.push(ordinal, set);
    }

    fn mark_acked(&mut self, index: VolumeIndex, number: SetNumber) {
        let volume = &mut self.volumes[index.as_usize()];
        let before = volume.window.acked().number;
        let Some(ordinal) = volume.window.mark_acked(number) else { return };
        volume.released_due |= volume.window.acked().number > before;
        let at = usize::try_from(ordinal - self.order_base).expect("unacknowledged sets are in flight");
        self.order[at].acked = true;
        while let Some(oldest) = self.order.front().filter(|oldest| oldest.acked) {
            self.span_bytes -= oldest.bytes;
            self.order.pop_front();
            self.order_base += 1;
        }
    }

    /// A volume is a member once its mark is durable at the replica and the consistency time has passed it.
    fn update_states(&mut self) {
        for volume in &mut self.volumes {
            let acked = volume.window.acked().last_seq;
            let joined =
                volume.complete.is_some_and(|mark| mark.seq <= acked && mark.time <= self.progress.time);
            if matches!(volume.state, VolumeState::Copy | VolumeState::Resync) && joined {
                volume.state = VolumeState::Duplex;
            }
        }
    }
}

impl<H> Sender<H> {
    fn note(&mut self, error: &ResumeError) {
        match error {
            ResumeError::Fenced(epoch) => self.fenced = Some(*epoch),
            ResumeError::Diverged { .. } | ResumeError::Ahead { .. } | ResumeError::Lost { .. } => {
                self.diverged = true;
            }
            ResumeError::NotReplica(_) | ResumeError::Volumes(_) => {}
        }
    }
}
