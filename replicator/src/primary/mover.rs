//! The data mover: the one thread that owns a primary's session. It cuts intervals, has record sets made, ships them,
//! takes acknowledgements, and frees the sidefile.

mod examine;
mod resync;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use twinfs_certs::Identity;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{Epoch, SiteName, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::sender::{Backlog, Sender};
use twinfs_core::session::{Role, SessionState, SuspendReason, VolumeState};
use twinfs_core::stamp::Timestamp;
use twinfs_core::token::{Token, encode_batch};
use twinfs_core::update;
use twinfs_core::wire::{Message, PromoteReady, Refuse, RefuseCode, Text};

use super::activity_log::{ActivityLog, Mark};
use super::chain::{PathHints, Rooms, SetMaker, SetVolume};
use super::link::{self, HoldBack, Input, Outbox};
use super::sidefile::{Capture, Captured, Overflow};
use crate::failpoint::{self, FailPoint};
use crate::status::{PeerStatus, Status, VolumeStatus, age_seconds};
use crate::transport::{CloseCode, Link};

pub use self::examine::Examined;

/// How long the mover sleeps at most while nothing happens.
const IDLE: Duration = Duration::from_millis(100);
/// How often the status is renewed, at most.
const STATUS_PERIOD: Duration = Duration::from_millis(20);
/// How soon write tokens follow the updates that cannot be shipped at once.
const TOKEN_DELAY: Duration = Duration::from_millis(5);

/// Bytes of updates that leave at once, in one packet, when nothing is in flight: their tokens would not be sooner.
const PACKET_BYTES: usize = 1024;

/// Where the replica is.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Its site.
    pub name: SiteName,
    /// `HOST:PORT`.
    pub address: String,
}

/// How far the initial copy of a volume is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// Objects sent.
    pub files_copied: u64,
    /// Objects found so far.
    pub files_total: u64,
    /// Bytes of data sent.
    pub bytes_copied: u64,
    /// Bytes of data found so far.
    pub bytes_total: u64,
}

/// What the file system layer tells the mover.
pub trait Files: PathHints {
    /// How far the initial copy of a volume is, if it runs or ran in this process.
    fn copy_progress(&self, volume: VolumeIndex) -> Option<CopyProgress>;

    /// Reads again what a change map names, mixed with what programs write, and publishes the end of that. Called under a
    /// hold of the sidefile, right after the *resync* mark.
    fn start_resync(&self, volume: VolumeIndex, map: ChangeMap);

    /// Ends the resync of a volume: returns what is left of its map, nothing if it is complete. `None` if there is none.
    fn stop_resync(&self, volume: VolumeIndex) -> Option<ChangeMap>;

    /// Whether a resync has ended without being complete, although updates are kept.
    fn resync_failed(&self, volume: VolumeIndex) -> bool;

    /// Begins the initial copy of a volume again: updates were dropped since it began. Called under a hold.
    fn restart_copy(&self, volume: VolumeIndex);
}

/// A session's parts, ready to be driven.
pub struct PrimaryParts {
    /// The sidefile.
    pub capture: Arc<Capture>,
    /// The activity log: no set is shipped before the entries of its updates are durable.
    pub log: Option<Arc<ActivityLog>>,
    /// The state machine.
    pub sender: Sender<Bytes>,
    /// What makes sets of cuts.
    pub maker: SetMaker,
    /// The volumes, in the session's order.
    pub volumes: Vec<SetVolume>,
    /// The file system layer.
    pub files: Arc<dyn Files>,
    /// The replica; `None` for a promoted site without a peer.
    pub replica: Option<Replica>,
    /// Who this site is.
    pub identity: Arc<Identity>,
    /// What the site is: primary or promoted.
    pub role: Role,
    /// The generation of the primary role.
    pub epoch: Epoch,
    /// Why the session is suspended from the start, for status.
    pub reason: Option<String>,
    /// A scan looks for changes that were made while the volumes were not mounted; [`Primary::examined`] will tell.
    pub examining: bool,
    /// Called once, on the mover's thread, when another site took over; it makes that durable.
    pub on_fenced: Box<dyn Fn(Epoch) + Send>,
}

impl std::fmt::Debug for PrimaryParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrimaryParts").field("volumes", &self.volumes).finish_non_exhaustive()
    }
}

/// A running primary session.
#[derive(Debug)]
pub struct Primary {
    capture: Arc<Capture>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Stopped>>,
    runtime: Option<Runtime>,
}

/// What a session leaves when it ends.
#[derive(Debug)]
pub struct Stopped {
    /// The state machine, with the sets that are not acknowledged: to be kept for the next run.
    pub sender: Sender<Bytes>,
    /// The room that these sets hold in the sidefile: to be released once they are kept.
    pub rooms: Rooms,
    /// It is not known whether the source was changed while it was not mounted: the next run has to look for that.
    pub examining: bool,
    /// What was dropped, or was read again only in part, of each volume.
    pub changes: Vec<ChangeMap>,
}

#[derive(Debug, Default)]
struct Shared {
    board: Mutex<Option<Status>>,
    /// Somebody asks for the state.
    wanted: AtomicBool,
    stop: Mutex<Option<Instant>>,
    /// What [`Primary::both_have`] answers.
    both_have: AtomicU64,
    examined: Mutex<Option<Examined>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Primary {
    /// Starts the session's threads.
    ///
    /// # Errors
    /// If the system has no threads or sockets left.
    pub fn start(parts: PrimaryParts) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("quic")
            .enable_all()
            .build()?;
        let (inputs, incoming) = mpsc::channel(limits::OUTBOX_MESSAGES_MAX);
        let capture = Arc::clone(&parts.capture);
        if let Some(replica) = parts.replica.clone() {
            let identity = Arc::clone(&parts.identity);
            let hold_back = HoldBack::from_env();
            let capture = Arc::clone(&capture);
            runtime.spawn(link::keep(replica.address, replica.name, identity, inputs, capture, hold_back));
        }
        let shared = Arc::new(Shared::default());
        let rooms = parts.volumes.iter().map(|_| VecDeque::new()).collect();
        let mut mover = Mover {
            capture: Arc::clone(&capture),
            examining: parts.examining,
            log: parts.log,
            logged: Mark::default(),
            shared: Arc::clone(&shared),
            sender: parts.sender,
            maker: parts.maker,
            volumes: parts.volumes,
            files: parts.files,
            replica: parts.replica,
            role: parts.role,
            epoch: parts.epoch,
            reason: parts.reason,
            on_fenced: parts.on_fenced,
            incoming,
            connection: None,
            last_error: None,
            sets_sent: 0,
            wire_bytes_before: 0,
            drained: false,
            promote: None,
            encoded: Vec::new(),
            rooms,
            resyncs: resync::Resyncs::default(),
            tokened: Timestamp::ZERO,
            vouched: Timestamp::ZERO,
            published: None,
        };
        if mover.examining && mover.sender.suspended().is_none() && !capture.fill().suspended {
            mover.sender.suspend(SuspendReason::Error);
            mover.reason = Some(examine::EXAMINING.to_owned());
        }
        let thread = std::thread::Builder::new().name("mover".into()).spawn(move || mover.run())?;
        Ok(Self { capture, shared, thread: Some(thread), runtime: Some(runtime) })
    }

    /// The session's state, as of now; as of a moment ago if the mover is busy.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        self.shared.wanted.store(true, Ordering::Release);
        self.capture.poke();
        let deadline = Instant::now() + IDLE;
        while self.shared.wanted.load(Ordering::Acquire) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        lock(&self.shared.board).clone()
    }

    /// The instant up to which the replica has everything in committed groups; zero unless the session is DUPLEX. While
    /// it is not, a group may lack what was let go, and what a resync has not brought yet.
    #[must_use]
    pub fn both_have(&self) -> Timestamp {
        match self.capture.fill().suspended {
            true => Timestamp::ZERO,
            false => Timestamp(self.shared.both_have.load(Ordering::Acquire)),
        }
    }

    /// Ends the session: ships what it can until `patience` is over, and returns the state to keep for the next run.
    /// No update may be published any more.
    pub fn stop(mut self, patience: Duration) -> Option<Stopped> {
        *lock(&self.shared.stop) = Some(Instant::now() + patience);
        self.capture.poke();
        let stopped = self.thread.take().and_then(|thread| thread.join().ok());
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_millis(500));
        }
        stopped
    }
}

struct Connection {
    link: Link,
    outbox: Outbox,
    welcomed: bool,
}

/// A planned promote under way.
#[derive(Debug)]
enum Handover {
    /// Writes are held; what was captured is being shipped.
    Draining { since: Instant },
    /// The replica was told that all is drained.
    Ready { since: Instant },
}

struct Mover {
    capture: Arc<Capture>,
    /// A scan looks for changes of which nobody knows.
    examining: bool,
    log: Option<Arc<ActivityLog>>,
    /// The entries up to this mark belong to sets that were made.
    logged: Mark,
    shared: Arc<Shared>,
    sender: Sender<Bytes>,
    maker: SetMaker,
    volumes: Vec<SetVolume>,
    files: Arc<dyn Files>,
    replica: Option<Replica>,
    role: Role,
    epoch: Epoch,
    reason: Option<String>,
    on_fenced: Box<dyn Fn(Epoch) + Send>,
    incoming: mpsc::Receiver<Input>,
    connection: Option<Connection>,
    last_error: Option<String>,
    sets_sent: u64,
    wire_bytes_before: u64,
    /// All that was captured before the suspension is in sets.
    drained: bool,
    promote: Option<Handover>,
    encoded: Vec<u8>,
    rooms: Rooms,
    resyncs: resync::Resyncs,
    /// The replica was sent the tokens of everything that it lacks and that was stamped up to here.
    tokened: Timestamp,
    /// When idle volumes were vouched for, beside the cuts.
    vouched: Timestamp,
    published: Option<Instant>,
}

impl Mover {
    fn run(mut self) -> Stopped {
        loop {
            self.take_inputs();
            self.take_examined();
            if let Err(error) = self.ship() {
                tracing::error!(%error, "the session is suspended");
                self.reason = Some(error.to_string());
                self.capture.suspend();
                self.sender.suspend(SuspendReason::Error);
            }
            self.note_suspension();
            self.advance_resync();
            self.advance_handover();
            self.send_tokens();
            self.publish_status();
            if self.is_finished() {
                return self.finish();
            }
            let (wake_at_bytes, deadline) = self.next_wake();
            self.capture.wait_queued(wake_at_bytes, deadline);
        }
    }

    // ---- inputs ----

    fn take_inputs(&mut self) {
        while let Ok(input) = self.incoming.try_recv() {
            match input {
                Input::Linked(link, outbox) => {
                    tracing::info!(peer = %link.peer().name, address = %link.remote_address(), "connected");
                    outbox.control(Message::Hello(self.sender.hello()).encode());
                    self.connection = Some(Connection { link, outbox, welcomed: false });
                }
                Input::Message(bytes) => {
                    if let Err(why) = self.handle_message(&bytes) {
                        self.hang_up(&why);
                    }
                }
                Input::Unlinked(why) => self.unlinked(why),
            }
        }
    }

    fn unlinked(&mut self, why: String) {
        if let Some(connection) = self.connection.take() {
            self.wire_bytes_before += connection.link.bytes_sent() + connection.link.bytes_received();
        }
        if self.last_error.as_ref() != Some(&why) {
            tracing::warn!(%why, "no connection to the replica; trying again");
        }
        // A refusal explains more than the closing of the connection that follows it.
        if self.last_error.is_none() || !self.sender.is_connected() && self.role == Role::Primary {
            self.last_error = Some(why);
        }
        self.sender.handle_disconnected();
        self.capture.set_link_up(false);
    }

    fn hang_up(&mut self, why: &str) {
        tracing::warn!(why, "closing the connection to the replica");
        self.last_error = Some(why.to_owned());
        if let Some(connection) = &self.connection {
            connection.link.close(CloseCode::MALFORMED, why);
        }
        self.sender.handle_disconnected();
        self.capture.set_link_up(false);
    }

    fn handle_message(&mut self, bytes: &[u8]) -> Result<(), String> {
        let message = Message::decode(bytes).map_err(|error| error.to_string())?;
        let now = self.capture.now();
        match message {
            Message::Welcome(welcome) => {
                let resumed = self.sender.handle_welcome(now, &welcome);
                self.check_fence();
                resumed.map_err(|error| error.to_string())?;
                while let Some(adopted) = self.sender.poll_adopted() {
                    self.capture.discard(adopted.volume, adopted.through);
                }
                if let Some(connection) = &mut self.connection {
                    connection.welcomed = true;
                }
                if self.sender.suspended() == Some(SuspendReason::Journal) && self.sender.resume().is_ok() {
                    tracing::info!("the replica takes record sets again");
                    self.reason = None;
                }
                self.last_error = None;
                self.capture.set_link_up(true);
                self.release();
                // What was on its way may be lost, and a replica that was started anew remembers no tokens.
                self.tokened = Timestamp::ZERO;
            }
            Message::Refuse(refuse) => self.refused(&refuse),
            Message::Ack(ack) => {
                self.sender.handle_ack(ack).map_err(|error| error.to_string())?;
                failpoint::pass(FailPoint::Acknowledged);
                self.release();
            }
            Message::Progress(progress) => self.sender.handle_progress(progress),
            Message::PromoteRequest => self.begin_handover(),
            Message::PromoteDone(epoch) => {
                self.sender.handle_promoted(epoch);
                self.check_fence();
            }
            Message::Bye(text) => {
                self.last_error = Some(format!("the replica stopped: {text}"));
            }
            Message::Hello(_)
            | Message::NullSet(_)
            | Message::Tokens(_)
            | Message::PromoteReady(_)
            | Message::PromoteRefused(_) => return Err("the replica sent what only a primary sends".into()),
        }
        Ok(())
    }

    fn refused(&mut self, refuse: &Refuse) {
        tracing::error!(why = %refuse.text, "the replica refuses");
        self.last_error = Some(format!("the replica refuses: {}", refuse.text));
        self.sender.handle_refuse(refuse);
        self.check_fence();
        if refuse.code == RefuseCode::Failed {
            self.reason = Some(refuse.text.to_string());
        }
        self.capture.set_link_up(false);
    }

    /// Another site may have become the primary: from that moment no write is let in here.
    fn check_fence(&mut self) {
        let Some(epoch) = self.sender.fenced_by() else { return };
        if self.role == Role::Fenced {
            return;
        }
        self.capture.fence();
        self.role = Role::Fenced;
        self.promote = None;
        self.reason = Some(format!("epoch {} belongs to another site", epoch.number));
        tracing::error!(
            epoch = epoch.number,
            "another site was promoted: this one is FENCED, its mounts are read-only"
        );
        (self.on_fenced)(epoch);
    }

    /// Frees the room of what the replica has without a gap.
    fn release(&mut self) {
        while let Some(released) = self.sender.poll_released() {
            let rooms = &mut self.rooms[released.volume.as_usize()];
            self.capture.acknowledge(released.volume, released.point, released.end);
            failpoint::pass(FailPoint::Released);
            while rooms.front().is_some_and(|(number, _)| *number <= released.point.number) {
                let (_, updates) = rooms.pop_front().expect("it was there just now");
                self.capture.release(&updates);
            }
        }
    }

    // ---- shipping ----

    fn ship(&mut self) -> Result<(), super::chain::BadCapture> {
        loop {
            let now = self.capture.now();
            let (queued_bytes, queued, _) = self.capture.queued();
            let due = self.sender.is_cut_due(now, &self.backlog(queued, queued_bytes)) && self.may_issue();
            if !due {
                break;
            }
            let is_idle = self.sender.is_idle();
            if !is_idle || queued_bytes > PACKET_BYTES {
                self.send_tokens();
            }
            let cut = self.capture.cut(limits::SET_RAW_BYTES_TARGET);
            self.logged = self.log.as_ref().map_or(self.logged, |log| log.mark());
            // More may have come in the meantime; its tokens follow.
            if is_idle && cut.updates.iter().map(Captured::bytes).sum::<usize>() <= PACKET_BYTES {
                self.tokened = self.tokened.max(cut.end);
            }
            let nulls =
                self.maker.issue(&self.capture, &mut self.sender, &mut self.rooms, &cut, &*self.files)?;
            self.sender.handle_cut(cut.end, cut.updates.is_empty());
            self.transmit();
            for null in nulls {
                self.say(Message::NullSet(null));
            }
            if cut.emptied {
                break;
            }
        }
        self.transmit();
        self.vouch_for_idle_volumes()
    }

    /// While the window is full no interval ends. Volumes that write nothing say so all the same: otherwise a loss report
    /// could not tell that nothing of theirs is lost.
    fn vouch_for_idle_volumes(&mut self) -> Result<(), super::chain::BadCapture> {
        let now = self.capture.now();
        let sends = self.sender.is_connected() && self.sender.suspended().is_none();
        if !sends || self.may_issue() || now.ns_since(self.vouched) < limits::INTERVAL_NS {
            return Ok(());
        }
        self.vouched = now;
        let (end, idle) = self.capture.idle_volumes();
        for volume in idle {
            let null = self.maker.null(&mut self.sender, volume, end)?;
            self.say(Message::NullSet(null));
        }
        Ok(())
    }

    /// What waits in the sidefile. It is one queue for all volumes, so each volume may have as much as all.
    fn backlog(&self, queued: usize, queued_bytes: usize) -> Vec<Backlog> {
        let backlog = match queued {
            0 => Backlog::None,
            _ if self.promote.is_some() || queued_bytes >= limits::SET_RAW_BYTES_TARGET => Backlog::Full,
            _ => Backlog::Some,
        };
        vec![backlog; self.volumes.len()]
    }

    fn may_issue(&self) -> bool {
        (0..self.volumes.len()).all(|at| self.sender.can_issue(VolumeIndex(at as u16)))
    }

    fn transmit(&mut self) {
        let Some(connection) = &self.connection else { return };
        // What the replica has must be in the log, because after a power loss this site may have it no more.
        if self.log.as_ref().is_some_and(|log| log.wait_durable(self.logged).is_err()) {
            self.capture.suspend();
            return;
        }
        while let Some((_, set)) = self.sender.poll_transmit() {
            connection.outbox.set(set.handle.clone());
            self.sets_sent += 1;
        }
    }

    fn say(&mut self, message: Message) {
        if let Some(connection) = &self.connection
            && !connection.outbox.control(message.encode())
        {
            tracing::debug!("a control message found no room; the link is stuck");
        }
    }

    /// Sends write tokens for what the replica lacks, whether it is in sets or not: those may wait long for the link, and
    /// the replica shall know of it.
    fn send_tokens(&mut self) {
        loop {
            let welcomed = |connection: &&Connection| connection.welcomed && connection.outbox.takes_tokens();
            let Some(connection) = self.connection.as_ref().filter(welcomed) else { return };
            let captured = self.untokened();
            let Some(last) = captured.last() else { return };
            for (at, volume) in self.volumes.iter().enumerate() {
                let mut tokens = Vec::new();
                for captured in captured.iter().filter(|captured| captured.volume.as_usize() == at) {
                    tokens.extend(token_of(&self.capture, captured, &mut self.encoded));
                }
                let mut rest = &tokens[..];
                while !rest.is_empty() {
                    let mut batch = Vec::new();
                    let taken = encode_batch(&volume.name, rest, &mut batch);
                    if !connection.outbox.tokens(batch) {
                        // All of them are sent again; the replica drops those that it has.
                        return;
                    }
                    rest = &rest[taken.max(1)..];
                }
            }
            self.tokened = last.stamp.time;
        }
    }

    /// The oldest updates whose tokens are still to be sent, in the order of their stamps: of sets first, as these were
    /// cut before what is still queued.
    fn untokened(&self) -> Vec<Captured> {
        let is_fresh = |captured: &&Captured| captured.stamp.time > self.tokened;
        let mut fresh: Vec<Captured> = Vec::new();
        for sets in &self.rooms {
            let from =
                sets.partition_point(|(_, updates)| !updates.last().is_some_and(|last| is_fresh(&last)));
            let updates = sets.range(from..).flat_map(|(_, updates)| updates).filter(is_fresh);
            fresh.extend(updates.take(limits::TOKEN_BATCH_MAX));
        }
        fresh.sort_unstable_by_key(|captured| captured.stamp);
        fresh.truncate(limits::TOKEN_BATCH_MAX);
        let after = fresh.last().map_or(self.tokened, |last| last.stamp.time);
        fresh.extend(self.capture.queued_after(after, limits::TOKEN_BATCH_MAX - fresh.len()));
        fresh
    }

    // ---- suspension ----

    fn note_suspension(&mut self) {
        let fill = self.capture.fill();
        if !fill.suspended || self.role == Role::Fenced {
            return;
        }
        if self.reason.is_none() {
            let why = match fill.overflow {
                Some(Overflow::LinkDown) => "the sidefile was full and no link drained it",
                Some(Overflow::TooSlow) => "the sidefile was full and the link too slow to drain it",
                None if self.log.as_ref().is_some_and(|log| log.failure().is_some()) => {
                    "the activity log cannot be written"
                }
                None => "it was suspended here",
            };
            tracing::error!(why, "the session is SUSPENDED: programs go on, their changes are not mirrored");
            self.reason = Some(why.into());
        }
        // What was captured before still goes to the replica; then nothing more.
        if !self.drained && self.capture.queued().1 == 0 && self.sender.is_connected() {
            self.drained = true;
            self.sender.handle_let_go();
            self.sender.suspend(suspend_reason(fill.overflow));
        }
    }

    // ---- planned promote ----

    fn begin_handover(&mut self) {
        let state = self.sender.session_state();
        if state != SessionState::Duplex || self.capture.fill().suspended {
            let text = format!("the session is {state}, not DUPLEX: something would be lost");
            self.say(Message::PromoteRefused(Text::new(text)));
            return;
        }
        tracing::info!("a planned promote begins: new writes are held");
        if !self.capture.hold(Duration::from_nanos(limits::HOLD_NS_MAX)) {
            self.capture.let_go();
            self.say(Message::PromoteRefused(Text::new("operations under way do not end; try again")));
            return;
        }
        self.promote = Some(Handover::Draining { since: Instant::now() });
    }

    fn advance_handover(&mut self) {
        let (since, ready) = match &self.promote {
            None => return,
            Some(Handover::Draining { since }) => (*since, false),
            Some(Handover::Ready { since }) => (*since, true),
        };
        if since.elapsed() > Duration::from_nanos(limits::HANDOVER_NS_MAX) {
            self.promote = None;
            self.capture.let_go();
            self.say(Message::PromoteRefused(Text::new("it took too long; writes go on at the primary")));
            tracing::warn!("the planned promote took too long: writes go on here");
            return;
        }
        if ready || self.capture.queued().1 > 0 || !self.sender.is_connected() {
            return;
        }
        let end = self.sender.last_end();
        if let Some(ready) = self.sender.promote_ready(end) {
            self.say(Message::PromoteReady(PromoteReady { end, ..ready }));
            self.promote = Some(Handover::Ready { since: Instant::now() });
        }
    }

    // ---- waiting ----

    fn next_wake(&self) -> (usize, Instant) {
        let now = Instant::now();
        let (queued_bytes, queued, _) = self.capture.queued();
        let captured = queued > 0;
        let mut deadline = now + IDLE;
        if let Some(due) = self.sender.next_cut(&self.backlog(queued, queued_bytes)) {
            deadline = deadline.min(now + Duration::from_nanos(due.ns_since(self.capture.now())));
        }
        if captured && self.connection.is_some() {
            deadline = deadline.min(now + TOKEN_DELAY);
        }
        if !self.sender.is_connected() || !self.may_issue() {
            // Only an input can change anything, and those who bring one poke.
            return (usize::MAX, deadline.max(now + TOKEN_DELAY));
        }
        if self.sender.is_idle() {
            return (if captured { 0 } else { 1 }, deadline);
        }
        (limits::SET_RAW_BYTES_TARGET.max(queued_bytes + 1), deadline)
    }

    fn is_finished(&self) -> bool {
        let Some(deadline) = *lock(&self.shared.stop) else { return false };
        let nothing_left = self.capture.queued().1 == 0 && self.sender.is_idle();
        nothing_left || !self.sender.is_connected() || Instant::now() >= deadline
    }

    fn finish(mut self) -> Stopped {
        self.say(Message::Bye(Text::new("the primary was stopped")));
        let changes = self.stop_resync();
        self.leave_examination();
        Stopped { sender: self.sender, rooms: self.rooms, examining: self.examining, changes }
    }

    // ---- status ----

    fn publish_status(&mut self) {
        let wanted = self.shared.wanted.load(Ordering::Acquire);
        if !wanted && self.published.is_some_and(|published| published.elapsed() < STATUS_PERIOD) {
            return;
        }
        self.published = Some(Instant::now());
        let is_duplex = self.sender.session_state() == SessionState::Duplex;
        let both_have = if is_duplex { self.sender.progress().time.0 } else { 0 };
        self.shared.both_have.store(both_have, Ordering::Release);
        let now = self.capture.now();
        let fill = self.capture.fill();
        let (queued_bytes, queued, queued_oldest) = self.capture.queued();
        let behind = self.sender.behind();
        let oldest = [behind.oldest, queued_oldest].into_iter().flatten().min();
        let progress = self.sender.progress();
        let known = progress.time > Timestamp::ZERO;
        let state = match self.sender.session_state() {
            state @ (SessionState::Diverged | SessionState::Suspended(_)) => state,
            _ if fill.suspended => SessionState::Suspended(suspend_reason(fill.overflow)),
            state => state,
        };
        let word = match state {
            SessionState::Suspended(reason) => Some(reason.to_string()),
            _ => None,
        };
        let reason = match (word, &self.reason) {
            (Some(word), Some(text)) => Some(format!("{word}: {text}")),
            (word, text) => word.or_else(|| text.clone()),
        };
        let volumes = self.volumes.iter().enumerate().map(|(at, volume)| {
            let index = VolumeIndex(at as u16);
            let copy = self.files.copy_progress(index).unwrap_or_default();
            VolumeStatus {
                name: volume.name.to_string(),
                state: self.sender.volume_state(index).unwrap_or(VolumeState::Pending).to_string(),
                files_copied: copy.files_copied,
                files_total: copy.files_total,
                bytes_copied: copy.bytes_copied,
                bytes_total: copy.bytes_total,
            }
        });
        let status = Status {
            role: self.role,
            session_state: state.to_string(),
            reason,
            epoch: self.epoch.number,
            group: progress.group.0,
            consistency_time: known.then(|| progress.time.to_string()),
            delay_seconds: known.then(|| age_seconds(now, progress.time)),
            exposure_seconds: oldest.map_or(0.0, |oldest| age_seconds(now, oldest)),
            behind_bytes: behind.bytes.max(self.unreleased_bytes()) + queued_bytes as u64,
            behind_records: behind.records + queued as u64,
            peer: self.peer_status(),
            volumes: volumes.collect(),
            wire_bytes: self.wire_bytes(),
            sets_sent: self.sets_sent,
            sets_received: 0,
            sets_out_of_order: 0,
            tokens_held: 0,
            store_bytes: fill.used,
            store_bytes_max: fill.size,
        };
        *lock(&self.shared.board) = Some(status);
        if wanted {
            self.shared.wanted.store(false, Ordering::Release);
        }
    }

    /// Bytes of updates, uncompressed, in sets that the replica does not have without a gap.
    fn unreleased_bytes(&self) -> u64 {
        let updates = self.rooms.iter().flatten().flat_map(|(_, updates)| updates);
        updates.map(|captured| captured.bytes() as u64).sum()
    }

    fn wire_bytes(&self) -> u64 {
        let now = self.connection.as_ref().map_or(0, |c| c.link.bytes_sent() + c.link.bytes_received());
        self.wire_bytes_before + now
    }

    fn peer_status(&self) -> PeerStatus {
        let connected = self.connection.as_ref().filter(|connection| connection.welcomed);
        PeerStatus {
            name: self.replica.as_ref().map(|replica| replica.name.to_string()),
            address: self.replica.as_ref().map(|replica| replica.address.clone()),
            connected: connected.is_some() && self.sender.is_connected(),
            rtt_ms: connected.map(|connection| connection.link.rtt().as_secs_f64() * 1e3),
            last_error: self.last_error.clone(),
        }
    }
}

fn suspend_reason(overflow: Option<Overflow>) -> SuspendReason {
    match overflow {
        Some(Overflow::LinkDown) => SuspendReason::Link,
        Some(Overflow::TooSlow) => SuspendReason::Lag,
        None => SuspendReason::Error,
    }
}

fn token_of(capture: &Capture, captured: &Captured, encoded: &mut Vec<u8>) -> Option<Token> {
    encoded.clear();
    capture.copy_meta(captured, encoded);
    // What does not decode will stop the session when its set is made.
    update::decode_borrowed(encoded, 0).ok().map(|(update, _)| Token::of(&update))
}
