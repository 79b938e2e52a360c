//! The data mover's engine: a primary's session without threads, links and clocks. It cuts intervals, has record sets made,
//! ships them, takes acknowledgements, and frees the sidefile.
//!
//! What happens comes in as calls of `handle_*`, the time is a parameter, and what the engine wants sent leaves through its
//! [`Outlet`] at the very instant at which it may. So the mover of a real primary and the simulator run the same code.
//!
//! After a batch of inputs call [`Engine::settle`], and again at the [`Wake`] that [`Engine::next_wake`] tells.

mod damage;
mod examine;
mod handover;
mod resync;
mod ship;
mod status;
mod suspension;
mod tokens;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{Epoch, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::sender::Sender;
use twinfs_core::session::{Role, SuspendReason};
use twinfs_core::stamp::Timestamp;
use twinfs_core::wire::{Message, Refuse, RefuseCode, Text};

use super::activity_log::{ActivityLog, Mark};
use super::chain::{PathHints, Rooms, SetMaker, SetVolume};
use super::clock::Reading;
use super::sidefile::Capture;
use crate::failpoint::{self, FailPoint};

pub use self::examine::Examined;

/// How long an engine sleeps at most while nothing happens.
pub const IDLE: Duration = Duration::from_millis(100);
/// How soon write tokens follow the updates that cannot be shipped at once.
const TOKEN_DELAY: Duration = Duration::from_millis(5);
/// What that means for those who use a site.
const FENCED: &str = "the mounts here are read-only, and what the other site lacks is kept";

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

/// What an engine wants done outside of it. It speaks over the newest connection that [`Engine::handle_linked`] told of.
pub trait Outlet {
    /// Queues a control message; they keep their order. Returns whether there was room.
    fn say(&mut self, message: Vec<u8>) -> bool;

    /// Whether there is room for tokens beside control messages.
    fn takes_tokens(&self) -> bool;

    /// Queues a batch of tokens. Returns whether there was room.
    fn tokens(&mut self, batch: Vec<u8>) -> bool;

    /// Queues a record set. The engine keeps the number of sets in flight within bounds.
    fn set(&mut self, set: Bytes);

    /// Ends the connection; [`Engine::handle_unlinked`] follows some time later.
    fn hang_up(&mut self, why: &str);

    /// Another site took over: makes that durable. Called once.
    fn fenced(&mut self, epoch: Epoch);
}

/// A session's parts, ready to be driven.
pub struct EngineConfig<O> {
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
    /// What the site is: primary or promoted.
    pub role: Role,
    /// The generation of the primary role.
    pub epoch: Epoch,
    /// Why the session is suspended from the start, for status.
    pub reason: Option<String>,
    /// A scan looks for changes that were made while the volumes were not mounted; [`Engine::handle_examined`] will tell.
    pub examining: bool,
    /// The way out.
    pub outlet: O,
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

/// When an engine is to be called again, if no input comes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wake {
    /// So many bytes are queued in the sidefile.
    pub queued_bytes: usize,
    /// So much time has passed.
    pub after: Duration,
}

/// How far the conversation with the replica is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Connection {
    None,
    /// Hello was said.
    Linked,
    /// The replica has told where it stands.
    Welcomed,
}

/// A primary's session. See the [module](self) for how it is driven.
pub struct Engine<O> {
    outlet: O,
    capture: Arc<Capture>,
    /// A scan looks for changes of which nobody knows.
    examining: bool,
    log: Option<Arc<ActivityLog>>,
    /// The entries up to this mark belong to sets that were made.
    logged: Mark,
    sender: Sender<Bytes>,
    maker: SetMaker,
    volumes: Vec<SetVolume>,
    files: Arc<dyn Files>,
    role: Role,
    epoch: Epoch,
    reason: Option<String>,
    connection: Connection,
    last_error: Option<String>,
    sets_sent: u64,
    /// All that was captured before the suspension is in sets.
    drained: bool,
    promote: Option<handover::Handover>,
    encoded: Vec<u8>,
    rooms: Rooms,
    resyncs: resync::Resyncs,
    /// The replica was sent the tokens of everything that it lacks and that was stamped up to here.
    tokened: Timestamp,
    /// When idle volumes were vouched for, beside the cuts.
    vouched: Timestamp,
}

impl<O: Outlet> Engine<O> {
    /// A session at its start, without a connection.
    #[must_use]
    pub fn new(config: EngineConfig<O>) -> Self {
        let rooms = config.volumes.iter().map(|_| VecDeque::new()).collect();
        let mut engine = Self {
            outlet: config.outlet,
            capture: config.capture,
            examining: config.examining,
            log: config.log,
            logged: Mark::default(),
            sender: config.sender,
            maker: config.maker,
            volumes: config.volumes,
            files: config.files,
            role: config.role,
            epoch: config.epoch,
            reason: config.reason.or_else(|| (config.role == Role::Fenced).then(|| FENCED.to_owned())),
            connection: Connection::None,
            last_error: None,
            sets_sent: 0,
            drained: false,
            promote: None,
            encoded: Vec::new(),
            rooms,
            resyncs: resync::Resyncs::default(),
            tokened: Timestamp::ZERO,
            vouched: Timestamp::ZERO,
        };
        engine.begin_examination();
        engine
    }

    /// The session's state machine.
    #[must_use]
    pub fn sender(&self) -> &Sender<Bytes> {
        &self.sender
    }

    /// The way out.
    pub fn outlet(&mut self) -> &mut O {
        &mut self.outlet
    }

    /// Does everything that inputs, updates and the time have made due: cuts, ships, suspends, begins or ends a resync, goes
    /// on with a planned promote, sends tokens.
    pub fn settle(&mut self, now: Reading) {
        if let Err(error) = self.ship() {
            tracing::error!(%error, "the session is suspended");
            self.reason = Some(error.to_string());
            self.capture.suspend();
            self.sender.suspend(SuspendReason::Error);
        }
        self.note_suspension();
        self.advance_resync(now);
        self.advance_handover(now);
        self.send_tokens();
    }

    /// When to settle again, if no input comes before.
    #[must_use]
    pub fn next_wake(&self) -> Wake {
        let (queued_bytes, queued, _) = self.capture.queued();
        let captured = queued > 0;
        let mut after = IDLE;
        if let Some(due) = self.sender.next_cut(&self.backlog(queued, queued_bytes)) {
            after = after.min(Duration::from_nanos(due.ns_since(self.capture.now())));
        }
        if captured && self.connection != Connection::None {
            after = after.min(TOKEN_DELAY);
        }
        if !self.sender.is_connected() || !self.may_issue() {
            // Only an input can change anything, and those who bring one poke.
            return Wake { queued_bytes: usize::MAX, after: after.max(TOKEN_DELAY) };
        }
        if self.sender.is_idle() {
            return Wake { queued_bytes: if captured { 0 } else { 1 }, after };
        }
        Wake { queued_bytes: limits::SET_RAW_BYTES_TARGET.max(queued_bytes + 1), after }
    }

    /// Whether waiting longer before [`Self::stop`] could bring nothing more to the replica.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let nothing_left = self.capture.queued().1 == 0 && self.sender.is_idle();
        nothing_left || !self.sender.is_connected()
    }

    /// Ends the session. No update may be published any more.
    pub fn stop(mut self, now: Reading) -> Stopped {
        self.say(Message::Bye(Text::new("the primary was stopped")));
        let changes = self.stop_resync(now);
        self.leave_examination();
        Stopped { sender: self.sender, rooms: self.rooms, examining: self.examining, changes }
    }

    // ---- inputs ----

    /// A connection stands, in place of an earlier one; nothing was said over it yet.
    pub fn handle_linked(&mut self) {
        self.connection = Connection::Linked;
        self.say(Message::Hello(self.sender.hello()));
    }

    /// No connection stands, or the one that stood is gone, and why.
    pub fn handle_unlinked(&mut self, why: String) {
        self.connection = Connection::None;
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

    /// The replica said something.
    pub fn handle_message(&mut self, bytes: &[u8], now: Reading) {
        if let Err(why) = self.take_message(bytes, now) {
            self.hang_up(&why);
        }
    }

    fn hang_up(&mut self, why: &str) {
        tracing::warn!(why, "closing the connection to the replica");
        self.last_error = Some(why.to_owned());
        if self.connection != Connection::None {
            self.outlet.hang_up(why);
        }
        self.sender.handle_disconnected();
        self.capture.set_link_up(false);
    }

    fn take_message(&mut self, bytes: &[u8], now: Reading) -> Result<(), String> {
        let message = Message::decode(bytes).map_err(|error| error.to_string())?;
        match message {
            Message::Welcome(welcome) => {
                let resumed = self.sender.handle_welcome(self.capture.now(), &welcome);
                self.check_fence();
                resumed.map_err(|error| error.to_string())?;
                // Noted before anything is let go: a run that is killed in between must know that the replica has it.
                self.release();
                while let Some(adopted) = self.sender.poll_adopted() {
                    self.capture.discard(adopted.volume, adopted.through);
                }
                if self.connection != Connection::None {
                    self.connection = Connection::Welcomed;
                }
                if self.sender.suspended() == Some(SuspendReason::Journal) && self.sender.resume().is_ok() {
                    tracing::info!("the replica takes record sets again");
                    self.reason = None;
                }
                self.last_error = None;
                self.capture.set_link_up(true);
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
            Message::PromoteRequest => self.begin_handover(now),
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
        // One that cannot write its disk says so again each time that it is asked.
        if self.reason.as_deref() != Some(refuse.text.as_str()) {
            tracing::error!(why = %refuse.text, "the replica refuses");
        }
        self.last_error = Some(format!("the replica refuses: {}", refuse.text));
        self.sender.handle_refuse(refuse);
        self.check_fence();
        if refuse.code == RefuseCode::Failed {
            self.reason = Some(refuse.text.to_string());
            // It does not say when that is over: it has to be asked again.
            self.outlet.hang_up("the replica refused");
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
        self.reason = Some(format!("another site took over in epoch {}: {FENCED}", epoch.number));
        tracing::error!(epoch = epoch.number, "another site took over: this one is FENCED; {FENCED}");
        self.outlet.fenced(epoch);
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

    fn say(&mut self, message: Message) {
        if self.connection != Connection::None && !self.outlet.say(message.encode()) {
            tracing::debug!("a control message found no room; the link is stuck");
        }
    }

    fn volume_indices(&self) -> impl Iterator<Item = VolumeIndex> + use<O> {
        (0..self.volumes.len()).map(|at| VolumeIndex(at as u16))
    }
}
