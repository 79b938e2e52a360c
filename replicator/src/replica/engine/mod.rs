//! The receiver's engine: a replica's session without threads, links and clocks. It takes what arrives, has it ordered,
//! journals, commits, acknowledges, and shows.
//!
//! What happens comes in as calls of `handle_*`, the time is a parameter, and what the engine wants done outside goes
//! through its [`Outlet`] at the very instant at which it is true: an acknowledgement leaves after the sync that makes it
//! so. Its disk is behind traits: [`SiteStore`] for the control file, [`Storage`] for the journal, and whatever the
//! [`Image`] was opened over. So the driver of a real replica and the simulator run the same code.
//!
//! After a batch of inputs call [`Engine::settle`], and again whenever time has passed.

mod groups;
mod mending;
mod status;
mod trees;

use std::any::Any;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use twinfs_certs::Site;
use twinfs_core::format::{Unpacker, UnverifiedSet};
use twinfs_core::id::{SetHash, SetNumber, SiteId, SiteName, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::Role;
use twinfs_core::session::handshake::Adoption;
use twinfs_core::session::receiver::{GroupPlan, Ordering, Receiver, SetRefusal, Verdict};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::TokenBatch;
use twinfs_core::wire::{Hello, Message, Refuse, RefuseCode, Text};

use super::image::view::DataSource;
use super::image::{Image, ImageError};
use super::journal::{Journal, JournalConfig, JournalError, JournalReader, ReadError};
use super::recovery::{self, RecoveryError, Tracked};
use super::repair;
use super::takeover::Takeover;
pub use super::takeover::{Asker, PromoteMode, Promoted, TakeoverNews};
use crate::failpoint::{self, FailPoint};
use crate::primary::clock::Reading;
use crate::site::{ReceivedVolume, SiteError, State};
use crate::storage::{Storage, StorageError};
use crate::transport::{CloseCode, ListenError};

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum StartError {
    #[error(transparent)]
    Site(#[from] SiteError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("cannot open the journal: {0}")]
    Storage(#[from] StorageError),
    #[error("cannot open the journal: {0}")]
    Journal(#[from] JournalError),
    #[error("cannot open the image: {0}")]
    Image(#[from] ImageError),
    #[error("cannot recover the last state: {0}")]
    Recovery(#[from] RecoveryError),
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
}

/// Names a connection while it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// A share of the bounds of what may wait for the engine. Dropped when that has dealt with the input.
pub type Share = Box<dyn Any + Send>;

/// What an engine wants done outside of it.
pub trait Outlet {
    /// Sends a message over a connection. If there is no room for it, the peer does not read, and the connection is to be
    /// closed.
    fn say(&mut self, to: ConnectionId, message: Vec<u8>);

    /// Ends a connection; [`Engine::handle_unlinked`] follows some time later.
    fn close(&mut self, connection: ConnectionId, code: CloseCode, why: &'static str);

    /// Has [`Image::checkpoint`] called off the engine's path, then [`Engine::handle_checkpointed`] with its result.
    /// Answers whether that could be begun.
    fn start_checkpoint(&mut self, image: &Arc<Image>) -> bool;

    /// Tells who asked for a promote.
    fn tell(&mut self, asker: Asker, news: TakeoverNews);
}

/// What of a site's directory an engine needs beside its image.
pub trait SiteStore: Send {
    /// Replaces the control file, durably.
    ///
    /// # Errors
    /// [`SiteError`]; the old one stands then.
    fn save_state(&self, state: &State) -> Result<(), SiteError>;

    /// The journal's directory; made if it is not there.
    ///
    /// # Errors
    /// [`StorageError`]
    fn journal(&self) -> Result<Arc<dyn Storage>, StorageError>;

    /// The site's directory, where loss reports are kept.
    ///
    /// # Errors
    /// There is none on a file system of this machine.
    fn directory(&self) -> std::io::Result<&Path>;

    /// Puts the journal's directory aside under that number, durably, if that was not done before: the next
    /// [`journal`](Self::journal) is empty.
    ///
    /// # Errors
    /// [`SiteError`]; it can be tried again.
    fn set_journal_aside(&self, number: u64) -> Result<(), SiteError>;

    /// Bytes that are free on the journal's file system; zero if nobody knows.
    fn free_bytes(&self) -> u64;
}

/// Opens the image over the journal's data.
pub type OpenImage = Box<dyn FnOnce(Arc<dyn DataSource>) -> Result<Image, ImageError>>;

/// What an engine starts from.
pub struct EngineConfig<O> {
    /// The control file, and where the journal stands.
    pub store: Box<dyn SiteStore>,
    /// What is known from earlier runs.
    pub state: State,
    /// Who this site is.
    pub own_site: SiteId,
    /// How the journal uses its disk.
    pub journal: JournalConfig,
    /// How groups are formed.
    pub ordering: Ordering,
    /// Opens the image.
    pub open_image: OpenImage,
    /// The way out.
    pub outlet: O,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection of a primary.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    id: ConnectionId,
    pub(super) peer: Site,
    address: SocketAddr,
}

/// A set that was taken and for which the journal has had no room so far.
struct Unappended {
    volume: VolumeIndex,
    number: SetNumber,
    bytes: Bytes,
    hash: SetHash,
    last_seq: Seq,
    end: Timestamp,
    _share: Share,
}

/// A replica's session. See the [module](self) for how it is driven.
pub struct Engine<O> {
    pub(super) store: Box<dyn SiteStore>,
    pub(super) outlet: O,
    pub(super) own_site: SiteId,
    pub(super) state: State,
    pub(super) receiver: Receiver,
    pub(super) journal: Option<Journal>,
    journal_config: JournalConfig,
    pub(super) image: Arc<Image>,
    pub(super) image_index: Vec<VolumeIndex>,
    tracked: Vec<Tracked>,
    /// Connections that have not said hello yet, or were refused and are closing.
    strangers: Vec<Connection>,
    pub(super) current: Option<Connection>,
    unappended: VecDeque<Unappended>,
    /// Sets for which the receiver had no room.
    stalled: VecDeque<(ConnectionId, Bytes, Share)>,
    appended: Vec<(VolumeIndex, SetNumber)>,
    planned: Option<GroupPlan>,
    unpacker: Unpacker,
    checkpointing: bool,
    /// Why the journal takes nothing at present; `true` if for good.
    trouble: Option<(String, bool)>,
    tree_trouble: Option<trees::TreeTrouble>,
    pub(super) takeover: Option<Takeover>,
    sets_received: u64,
    pub(super) last_heard: Option<Timestamp>,
    last_error: Option<String>,
    last_peer: Option<SocketAddr>,
    data: Arc<JournalData>,
}

/// The journal's reader, as the image wants it.
#[derive(Debug, Default)]
struct JournalData {
    reader: Mutex<Option<JournalReader>>,
    /// What was found to have rotted.
    rot: Mutex<Option<String>>,
}

impl JournalData {
    fn read_from(&self, reader: JournalReader) {
        *lock(&self.reader) = Some(reader);
    }
}

impl DataSource for JournalData {
    fn read(&self, at: twinfs_core::delta::DataRef, buf: &mut [u8]) -> std::io::Result<()> {
        let reader = lock(&self.reader).clone();
        let reader = reader.ok_or(std::io::ErrorKind::NotFound)?;
        let read = reader.read(at, buf);
        if let Err(error @ ReadError::Set { .. }) = &read {
            lock(&self.rot).get_or_insert_with(|| error.to_string());
        }
        read.map_err(std::io::Error::other)
    }
}

impl<O: Outlet> Engine<O> {
    /// Recovers what is on disk.
    ///
    /// # Errors
    /// [`StartError`]
    pub fn recover(config: EngineConfig<O>, now: Reading) -> Result<Self, StartError> {
        let EngineConfig {
            store,
            mut state,
            own_site,
            journal: journal_config,
            ordering,
            open_image,
            outlet,
        } = config;
        if state.repair.as_ref().is_some_and(|repair| repair.setting_aside) {
            repair::begin_journal(&*store, &mut state, journal_config)?;
        }
        let opened = match state.session {
            Some(session) => Some(Journal::open(store.journal()?, session, journal_config)),
            None => None,
        };
        if let Some(Err(error)) = &opened
            && !error.is_damage()
        {
            return Err(error.clone().into());
        }
        let data = Arc::new(JournalData::default());
        if let Some(Ok((journal, _))) = &opened {
            data.read_from(journal.reader());
        }
        let image = Arc::new(open_image(Arc::clone(&data) as _)?);
        let image_index = state
            .received
            .iter()
            .map(|volume| image.add_volume(&volume.name, volume.root))
            .collect::<Result<Vec<_>, _>>()?;
        if state.repair.as_ref().is_some_and(|repair| repair.torn) {
            image.hide()?;
        }
        let restore = |state: &State, recovery| {
            recovery::restore(state, recovery, &image, &image_index, ordering, now.boot)
        };
        let restored = match opened {
            None => Ok((None, recovery::fresh(&state, ordering))),
            Some(Ok((journal, recovery))) => {
                restore(&state, recovery).map(|restored| (Some(journal), restored))
            }
            Some(Err(error)) => Err(RecoveryError::from(error)),
        };
        let (journal, mut restored) = match restored {
            // A promoted site has no primary that could send again what is missing.
            Err(found) if found.is_damage() && state.role == Role::Replica => {
                let parts = (&*image, &image_index[..]);
                let read_from = |reader| data.read_from(reader);
                let store = &*store;
                repair::set_aside(store, &mut state, parts, journal_config, &found, now.boot, read_from)?;
                if state.repair.as_ref().is_some_and(|repair| repair.torn) {
                    image.hide()?;
                }
                let session = state.session.expect("a journal belongs to a session");
                let (journal, recovery) = Journal::open(store.journal()?, session, journal_config)?;
                data.read_from(journal.reader());
                let restored = restore(&state, recovery)?;
                (Some(journal), restored)
            }
            restored => restored?,
        };
        repair::go_on(&state, &mut restored.receiver);
        let mut engine = Self {
            store,
            outlet,
            own_site,
            state,
            receiver: restored.receiver,
            journal,
            journal_config,
            image,
            image_index,
            tracked: restored.tracked,
            strangers: Vec::new(),
            current: None,
            unappended: VecDeque::new(),
            stalled: VecDeque::new(),
            appended: Vec::new(),
            planned: None,
            unpacker: Unpacker::new(),
            checkpointing: false,
            trouble: None,
            tree_trouble: None,
            takeover: None,
            sets_received: 0,
            last_heard: None,
            last_error: None,
            last_peer: None,
            data,
        };
        engine.end_repair();
        engine.tell_written();
        Ok(engine)
    }

    /// What the replica shows.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The session's state machine.
    #[must_use]
    pub fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    /// The journal, once there is one.
    #[must_use]
    pub fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// The connection of the primary that is being served.
    #[must_use]
    pub fn connection(&self) -> Option<ConnectionId> {
        self.current.as_ref().map(|current| current.id)
    }

    /// The way out.
    pub fn outlet(&mut self) -> &mut O {
        &mut self.outlet
    }

    /// Does everything that inputs and the time have made due: appends, commits, acknowledges, shows, begins a checkpoint,
    /// goes on with a promote.
    pub fn settle(&mut self, now: Reading) {
        self.append_waiting();
        self.commit();
        self.end_repair();
        self.notice_rot();
        self.checkpoint_if_due(now);
        self.advance_takeover(now);
    }

    /// Ends the session: everything acknowledged stays, and the plain trees become those of the last group.
    pub fn stop(&mut self) {
        self.commit();
        for connection in self.current.iter().chain(&self.strangers) {
            self.outlet.say(connection.id, Message::Bye(Text::new("the replica was stopped")).encode());
        }
        // The trees become those of the last group: stop twinfs cleanly and the files are simply there.
        if !self.image.is_incomplete()
            && let Err(error) = self.image.checkpoint()
        {
            tracing::error!(%error, "the last checkpoint failed; the next start redoes it from the journal");
        }
        self.trim();
        if let Some(connection) = self.current.take() {
            self.outlet.close(connection.id, CloseCode::DONE, "the replica was stopped");
        }
    }

    // ---- connections ----

    /// A primary of this authority is connected from an address; nothing was said yet.
    pub fn handle_linked(&mut self, id: ConnectionId, peer: Site, address: SocketAddr) {
        if self.strangers.len() >= limits::STRANGERS_MAX {
            self.outlet.close(id, CloseCode::BUSY, "too many connections");
        } else {
            self.strangers.push(Connection { id, peer, address });
        }
    }

    /// A connection is gone.
    pub fn handle_unlinked(&mut self, id: ConnectionId, why: String) {
        self.strangers.retain(|connection| connection.id != id);
        if self.is_current(id) {
            tracing::warn!(%why, "the primary is gone; what it sent stays");
            self.last_error = Some(why);
            self.take_current();
        }
    }

    fn is_current(&self, id: ConnectionId) -> bool {
        self.current.as_ref().is_some_and(|current| current.id == id)
    }

    fn take_current(&mut self) -> Option<Connection> {
        let connection = self.current.take()?;
        self.receiver.handle_disconnected();
        self.stalled.clear();
        Some(connection)
    }

    /// Closes a connection, saying why; nothing of what it sent last was used.
    fn refuse(&mut self, id: ConnectionId, refuse: Refuse) {
        let connection = if self.is_current(id) {
            self.take_current()
        } else {
            let at = self.strangers.iter().position(|connection| connection.id == id);
            at.map(|at| self.strangers.swap_remove(at))
        };
        let Some(connection) = connection else { return };
        let peer = &connection.peer.name;
        tracing::warn!(%peer, address = %connection.address, why = %refuse.text, "refused");
        self.last_error = Some(format!("refused {peer}: {}", refuse.text));
        self.outlet.say(id, Message::Refuse(refuse).encode());
        // The peer hangs up when it has read that; if it does not, the connection ends with the next bytes it sends.
        self.strangers.push(connection);
    }

    fn refuse_with(&mut self, id: ConnectionId, code: RefuseCode, text: String) {
        let epoch = self.receiver.paired().map(|(_, epoch)| epoch);
        self.refuse(id, Refuse { code, epoch, text: Text::new(text) });
    }

    /// A control message came.
    pub fn handle_message(&mut self, id: ConnectionId, bytes: &[u8]) {
        let message = match Message::decode(bytes) {
            Ok(message) => message,
            Err(error) => return self.refuse_with(id, RefuseCode::Protocol, error.to_string()),
        };
        match message {
            Message::Hello(hello) => self.handle_hello(id, &hello),
            _ if !self.is_current(id) => {}
            Message::NullSet(set) => self.handle_null(id, set),
            Message::Tokens(batch) => self.handle_tokens(id, &batch),
            Message::PromoteReady(ready) => self.handover_ready(ready),
            Message::PromoteRefused(text) => self.handover_refused(text.as_str()),
            Message::Refuse(refuse) => {
                tracing::warn!(why = %refuse.text, "the primary refuses");
                self.last_error = Some(format!("the primary refuses: {}", refuse.text));
            }
            Message::Bye(text) => self.last_error = Some(format!("the primary stopped: {text}")),
            Message::Welcome(_)
            | Message::Ack(_)
            | Message::Progress(_)
            | Message::PromoteRequest
            | Message::PromoteDone(_) => {
                self.refuse_with(id, RefuseCode::Protocol, "a primary sent what only a replica sends".into());
            }
        }
    }

    fn handle_hello(&mut self, id: ConnectionId, hello: &Hello) {
        let Some(at) = self.strangers.iter().position(|connection| connection.id == id) else { return };
        let peer = &self.strangers[at].peer;
        if (&peer.name, peer.id) != (&hello.name, hello.site) {
            let text = format!("its certificate says {}, its hello {}", peer.name, hello.name);
            return self.refuse_with(id, RefuseCode::Protocol, text);
        }
        // What was appended for an earlier connection counts for this one if it is durable.
        self.commit();
        if let Some((why, _)) = self.suspended() {
            let text = why.to_owned();
            return self.refuse_with(id, RefuseCode::Failed, text);
        }
        let mut answer = self.receiver.handle_hello(hello);
        if let Err(refuse) = &answer
            && refuse.code == RefuseCode::Lost
            && self.note_lost_end(hello, refuse.text.as_str())
        {
            answer = self.receiver.handle_hello(hello);
        }
        let adoption = match answer {
            Ok(adoption) => adoption,
            Err(refuse) => return self.refuse(id, refuse),
        };
        if let Err(error) = self.withdraw(hello) {
            self.journal_failed(&error);
            return self.refuse_with(id, RefuseCode::Failed, error.to_string());
        }
        if let Err(error) = self.adopt(&adoption, &hello.name) {
            return self.refuse_with(id, RefuseCode::Failed, error.to_string());
        }
        if let Some(old) = self.take_current() {
            tracing::info!(peer = %old.peer.name, "a newer connection takes the place of the old one");
            self.outlet.close(old.id, CloseCode::DONE, "a newer connection took its place");
        }
        let welcome = self.receiver.handle_connected(&adoption);
        let connection = self.strangers.swap_remove(at);
        tracing::info!(peer = %connection.peer.name, address = %connection.address, "connected");
        self.outlet.say(id, Message::Welcome(welcome).encode());
        self.last_peer = Some(connection.address);
        self.last_error = None;
        self.current = Some(connection);
    }

    /// Makes durable what a hello changes, before the welcome says so.
    fn adopt(&mut self, adoption: &Adoption, peer: &SiteName) -> Result<(), StartError> {
        if !adoption.changes {
            return Ok(());
        }
        let mut state = self.state.clone();
        state.session = Some(adoption.session);
        state.epoch = adoption.epoch;
        state.peer = Some(peer.clone());
        let mut index = Vec::new();
        for volume in &adoption.volumes {
            index.push(self.image.add_volume(&volume.name, volume.root)?);
            let (name, instance, root) = (volume.name.clone(), volume.instance, volume.root);
            state.received.push(ReceivedVolume { name, instance, root });
        }
        self.store.save_state(&state)?;
        self.state = state;
        self.image_index.extend(index);
        self.tracked.extend(adoption.volumes.iter().map(|_| Tracked::default()));
        if self.journal.is_none() {
            let (journal, _) = Journal::open(self.store.journal()?, adoption.session, self.journal_config)?;
            self.data.read_from(journal.reader());
            self.journal = Some(journal);
        }
        failpoint::pass(FailPoint::Adopted);
        Ok(())
    }

    pub(super) fn say(&mut self, message: &Message) {
        if let Some(connection) = &self.current {
            self.outlet.say(connection.id, message.encode());
        }
    }

    // ---- what arrives ----

    /// A batch of write tokens came.
    pub fn handle_tokens(&mut self, id: ConnectionId, bytes: &[u8]) {
        if !self.is_current(id) {
            return;
        }
        match TokenBatch::decode(bytes) {
            Ok(batch) => {
                let last = batch.tokens.last().map(|token| token.stamp.time);
                self.last_heard = self.last_heard.max(last);
                if let Err(error) = self.receiver.handle_tokens(&batch.volume, batch.tokens) {
                    self.refuse_with(id, RefuseCode::Protocol, error.to_string());
                }
            }
            Err(error) => self.refuse_with(id, RefuseCode::Protocol, error.to_string()),
        }
    }

    fn handle_null(&mut self, id: ConnectionId, bytes: Bytes) {
        let checked = UnverifiedSet(bytes).verify().and_then(|set| Ok((set.meta()?, set)));
        let (meta, set) = match checked {
            Ok(checked) => checked,
            Err(error) => return self.refuse_with(id, RefuseCode::Protocol, error.to_string()),
        };
        if !set.header().is_null() {
            let text = "a set with updates came as a null set".to_owned();
            return self.refuse_with(id, RefuseCode::Protocol, text);
        }
        self.last_heard = self.last_heard.max(Some(set.header().end));
        if let Err(error) = self.receiver.handle_set(set.header(), set.hash(), meta) {
            self.refuse_set(id, &error);
        }
    }

    /// A record set came.
    pub fn handle_set(&mut self, id: ConnectionId, bytes: Bytes, share: Share) {
        if !self.is_current(id) {
            return;
        }
        let checked = UnverifiedSet(bytes.clone()).verify();
        let checked = checked.and_then(|set| Ok((set.meta_with(&mut self.unpacker)?, set)));
        let (meta, set) = match checked {
            Ok(checked) => checked,
            Err(error) => return self.refuse_with(id, RefuseCode::Protocol, error.to_string()),
        };
        let header = set.header();
        match self.receiver.handle_set(header, set.hash(), meta) {
            Ok(Verdict::Append(volume)) => {
                self.sets_received += 1;
                self.last_heard = self.last_heard.max(Some(header.end));
                self.unappended.push_back(Unappended {
                    volume,
                    number: header.number,
                    bytes,
                    hash: set.hash(),
                    last_seq: header.last_seq(),
                    end: header.end,
                    _share: share,
                });
                self.append_waiting();
            }
            Ok(Verdict::Duplicate(_) | Verdict::Null(_)) => {}
            Err(SetRefusal::TooOld { .. }) => {}
            Err(SetRefusal::Full) => self.stalled.push_back((id, bytes, share)),
            Err(error) => self.refuse_set(id, &error),
        }
    }

    fn refuse_set(&mut self, id: ConnectionId, error: &SetRefusal) {
        let code = match error {
            SetRefusal::Fenced { .. } | SetRefusal::NotReplica(_) => RefuseCode::Fenced,
            SetRefusal::Diverged { .. } => RefuseCode::Diverged,
            _ => RefuseCode::Protocol,
        };
        self.refuse_with(id, code, error.to_string());
    }

    /// Offers the sets again for which the receiver had no room.
    fn retry_stalled(&mut self) {
        for (id, bytes, share) in std::mem::take(&mut self.stalled) {
            self.handle_set(id, bytes, share);
        }
    }

    /// Makes role and epoch of a promoted site durable.
    pub(super) fn save_promoted(&mut self, epoch: twinfs_core::id::Epoch) -> Result<(), SiteError> {
        let mut state = self.state.clone();
        (state.role, state.epoch) = (Role::Promoted, epoch);
        self.store.save_state(&state)?;
        self.state = state;
        Ok(())
    }
}
