//! The receiver's driver: the one thread that owns a replica's session. It takes what arrives, has it ordered, journals,
//! commits, acknowledges, and shows.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver as Inputs, RecvTimeoutError, Sender as InputSender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Runtime;
use twinfs_certs::Identity;
use twinfs_core::format::{Unpacker, UnverifiedSet};
use twinfs_core::id::{Epoch, SetHash, SetNumber, SiteId, SiteName, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::Role;
use twinfs_core::session::handshake::Adoption;
use twinfs_core::session::receiver::{GroupPlan, Ordering, Receiver, SetRefusal, Verdict};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::TokenBatch;
use twinfs_core::wire::{Hello, Message, Refuse, RefuseCode, Text};

use super::door::{self, ConnectionId, Outbox, Share};
use super::image::view::DataSource;
use super::image::{Group, Image, ImageError, ImageOptions};
use super::journal::{Commit, CommitBase, CommitVolume, Journal, JournalConfig, JournalError, Withdrawn};
use super::recovery::{self, Journaled, RecoveryError, Tracked, data_ref};
use super::takeover::Takeover;
pub use super::takeover::{PromoteMode, Promoted};
use crate::failpoint::{self, FailPoint};
use crate::primary::clock::Reading;
use crate::site::{ReceivedVolume, SiteDir, SiteError, State};
use crate::status::{PeerStatus, Status, VolumeStatus, age_seconds};
use crate::storage::{RealStorage, StorageError};
use crate::transport::{CloseCode, Link, ListenError, quic};

/// How long the driver sleeps at most while nothing happens.
const IDLE: Duration = Duration::from_millis(100);
/// How often the status is renewed, at most.
const STATUS_PERIOD: Duration = Duration::from_millis(20);
/// Inputs that are dealt with between two syncs of the journal.
const BATCH_INPUTS_MAX: usize = 256;
/// Bytes of record sets that are journaled between two syncs.
const BATCH_BYTES_MAX: usize = 32 << 20;

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

/// How a replica is started.
#[derive(Debug)]
pub struct ReplicaConfig {
    /// Its site directory.
    pub site: SiteDir,
    /// What is known from earlier runs.
    pub state: State,
    /// Who it is.
    pub identity: Arc<Identity>,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The only primary that may come; `None` for any of the same authority.
    pub from: Option<SiteName>,
    /// Bytes that stay free on the journal's file system.
    pub free_space_floor: u64,
    /// How groups are formed: only tests have a reason not to take the default.
    pub ordering: Ordering,
}

/// A test hook: `TWINFS_TEST_SEGMENT_BYTES` makes segments small, so that some are made and trimmed in a short test.
fn journal_config() -> JournalConfig {
    let default = JournalConfig::default();
    let segment_bytes = failpoint::test_number("TWINFS_TEST_SEGMENT_BYTES").unwrap_or(default.segment_bytes);
    JournalConfig { segment_bytes, ..default }
}

/// A test hook: `TWINFS_TEST_CHECKPOINT_MS` makes checkpoints frequent, so that crashes fall into many of them.
fn image_options() -> ImageOptions {
    let default = ImageOptions::default();
    let interval = failpoint::test_number("TWINFS_TEST_CHECKPOINT_MS").map(Duration::from_millis);
    ImageOptions { checkpoint_interval: interval.unwrap_or(default.checkpoint_interval), ..default }
}

/// A running replica session.
#[derive(Debug)]
pub struct Replica {
    image: Arc<Image>,
    inputs: InputSender<Input>,
    shared: Arc<Shared>,
    threads: Mutex<Option<(JoinHandle<()>, Runtime)>>,
}

#[derive(Debug, Default)]
struct Shared {
    board: Mutex<Option<Status>>,
}

/// What reaches the driver.
#[derive(Debug)]
pub(super) enum Input {
    Linked(ConnectionId, Link, Outbox),
    Message(ConnectionId, Bytes, Share),
    Tokens(ConnectionId, Bytes, Share),
    Set(ConnectionId, Bytes, Share),
    Unlinked(ConnectionId, String),
    Promote(PromoteMode, InputSender<TakeoverNews>),
    Checkpointed(Result<(), ImageError>),
    Status(InputSender<()>),
    Stop,
}

/// What a promote tells who asked for it.
#[derive(Debug)]
pub enum TakeoverNews {
    /// A line for the user.
    Progress(String),
    /// The site may take over: epoch and tree are durable. Or why not.
    Decided(Result<Promoted, String>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Replica {
    /// Recovers what is on disk, shows it, and waits for a primary.
    ///
    /// # Errors
    /// [`StartError`]
    pub fn start(config: ReplicaConfig) -> Result<Self, StartError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("quic")
            .enable_all()
            .build()
            .map_err(StartError::Threads)?;
        let listener = {
            let _context = runtime.enter();
            quic::Listener::bind(config.listen, &config.identity, config.from.clone())?
        };
        let (inputs, incoming) = channel();
        let shared = Arc::new(Shared::default());
        let driver = Driver::recover(config, incoming, inputs.clone(), Arc::clone(&shared))?;
        let image = Arc::clone(&driver.image);
        runtime.spawn(door::keep(listener, inputs.clone()));
        let thread = std::thread::Builder::new()
            .name("receiver".into())
            .spawn(move || driver.run())
            .map_err(StartError::Threads)?;
        Ok(Self { image, inputs, shared, threads: Mutex::new(Some((thread, runtime))) })
    }

    /// What the replica shows.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The session's state, as of now; as of a moment ago if the driver is busy.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        let (renewed, heard) = channel();
        if self.inputs.send(Input::Status(renewed)).is_ok() {
            // Whether it came in time or not, the board has the newest there is.
            let _ = heard.recv_timeout(IDLE);
        }
        lock(&self.shared.board).clone()
    }

    /// Asks for a promote: refuses further sets, makes the epoch durable and the plain trees those of the last group.
    /// Blocks until that is decided; `progress` gets lines for the user meanwhile.
    ///
    /// # Errors
    /// Why it was refused or failed, for the user.
    pub fn promote(&self, mode: PromoteMode, progress: &mut dyn FnMut(String)) -> Result<Promoted, String> {
        let (news, heard) = channel();
        let stopped = || "the replica has stopped".to_owned();
        self.inputs.send(Input::Promote(mode, news)).map_err(|_| stopped())?;
        loop {
            match heard.recv().map_err(|_| stopped())? {
                TakeoverNews::Progress(line) => progress(line),
                TakeoverNews::Decided(decided) => return decided,
            }
        }
    }

    /// Ends the session: everything acknowledged stays, and the plain trees become those of the last group.
    pub fn stop(&self) {
        let Some((thread, runtime)) = lock(&self.threads).take() else { return };
        drop(self.inputs.send(Input::Stop));
        if thread.join().is_err() {
            tracing::error!("the receiver's thread panicked");
        }
        runtime.shutdown_timeout(Duration::from_millis(500));
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A connection of a primary.
pub(super) struct Connection {
    id: ConnectionId,
    pub(super) link: Link,
    outbox: Outbox,
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

pub(super) struct Driver {
    pub(super) site: SiteDir,
    pub(super) own_site: SiteId,
    pub(super) state: State,
    incoming: Inputs<Input>,
    inputs: InputSender<Input>,
    shared: Arc<Shared>,
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
    pub(super) trouble: Option<(String, bool)>,
    pub(super) takeover: Option<Takeover>,
    sets_received: u64,
    wire_bytes_before: u64,
    pub(super) last_heard: Option<Timestamp>,
    last_error: Option<String>,
    last_peer: Option<SocketAddr>,
    data: Arc<JournalData>,
    pub(super) published: Option<Instant>,
}

/// The journal's reader, as the image wants it.
#[derive(Debug)]
struct JournalData(Mutex<Option<super::journal::JournalReader>>);

impl DataSource for JournalData {
    fn read(&self, at: twinfs_core::delta::DataRef, buf: &mut [u8]) -> std::io::Result<()> {
        let reader = lock(&self.0).clone();
        let reader = reader.ok_or(std::io::ErrorKind::NotFound)?;
        reader.read(at, buf).map_err(std::io::Error::other)
    }
}

impl Driver {
    fn recover(
        config: ReplicaConfig,
        incoming: Inputs<Input>,
        inputs: InputSender<Input>,
        shared: Arc<Shared>,
    ) -> Result<Self, StartError> {
        let ReplicaConfig { site, state, ordering, free_space_floor, identity, .. } = config;
        let journal_config = JournalConfig { floor_bytes: free_space_floor, ..journal_config() };
        let opened = match state.session {
            Some(session) => {
                let storage = Arc::new(RealStorage::open(&site.journal())?);
                Some(Journal::open(storage, session, journal_config)?)
            }
            None => None,
        };
        let (journal, recovery) = opened.unzip();
        let data = Arc::new(JournalData(Mutex::new(journal.as_ref().map(Journal::reader))));
        let image = Arc::new(Image::open(site.path(), Arc::clone(&data) as _, image_options())?);
        let image_index = state
            .received
            .iter()
            .map(|volume| image.add_volume(&volume.name, volume.root))
            .collect::<Result<Vec<_>, _>>()?;
        let restored = match recovery {
            Some(recovery) => recovery::restore(&state, recovery, &image, &image_index, ordering)?,
            None => recovery::fresh(&state, ordering),
        };
        let mut driver = Self {
            site,
            own_site: identity.id(),
            state,
            incoming,
            inputs,
            shared,
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
            takeover: None,
            sets_received: 0,
            wire_bytes_before: 0,
            last_heard: None,
            last_error: None,
            last_peer: None,
            data,
            published: None,
        };
        driver.publish_status();
        Ok(driver)
    }

    fn run(mut self) {
        loop {
            let mut next = match self.incoming.recv_timeout(IDLE) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (mut inputs, mut bytes) = (0, 0);
            while let Some(input) = next {
                if let Input::Set(_, set, _) = &input {
                    bytes += set.len();
                }
                inputs += 1;
                if matches!(input, Input::Stop) {
                    self.stop();
                    return;
                }
                self.handle(input);
                next = if inputs < BATCH_INPUTS_MAX && bytes < BATCH_BYTES_MAX {
                    self.incoming.try_recv().ok()
                } else {
                    None
                };
            }
            self.append_waiting();
            self.commit();
            self.checkpoint_if_due();
            self.advance_takeover();
            self.publish_status();
        }
    }

    fn stop(&mut self) {
        self.commit();
        for connection in self.current.iter().chain(&self.strangers) {
            connection.outbox.say(Message::Bye(Text::new("the replica was stopped")).encode());
        }
        // The trees become those of the last group: stop twinfs cleanly and the files are simply there.
        if !self.image.is_incomplete()
            && let Err(error) = self.image.checkpoint()
        {
            tracing::error!(%error, "the last checkpoint failed; the next start redoes it from the journal");
        }
        self.trim();
        if let Some(connection) = self.current.take() {
            connection.link.close(CloseCode::DONE, "the replica was stopped");
        }
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Linked(id, link, outbox) => {
                if self.strangers.len() >= limits::STRANGERS_MAX {
                    link.close(CloseCode::BUSY, "too many connections");
                } else {
                    self.strangers.push(Connection { id, link, outbox });
                }
            }
            Input::Message(id, bytes, _share) => self.handle_message(id, &bytes),
            Input::Tokens(id, bytes, _share) => self.handle_tokens(id, &bytes),
            Input::Set(id, bytes, share) => self.handle_set(id, bytes, share),
            Input::Unlinked(id, why) => self.unlinked(id, why),
            Input::Promote(mode, news) => self.begin_takeover(mode, news),
            Input::Checkpointed(result) => self.checkpointed(result),
            Input::Status(asker) => {
                self.published = None;
                self.publish_status();
                // Who asked may have given up waiting.
                let _ = asker.send(());
            }
            Input::Stop => {}
        }
    }

    // ---- connections ----

    fn is_current(&self, id: ConnectionId) -> bool {
        self.current.as_ref().is_some_and(|current| current.id == id)
    }

    fn unlinked(&mut self, id: ConnectionId, why: String) {
        self.strangers.retain(|connection| connection.id != id);
        if self.is_current(id) {
            tracing::warn!(%why, "the primary is gone; what it sent stays");
            self.last_error = Some(why);
            self.drop_current();
        }
    }

    fn drop_current(&mut self) {
        if let Some(connection) = self.current.take() {
            self.wire_bytes_before += connection.link.bytes_sent() + connection.link.bytes_received();
            self.receiver.handle_disconnected();
            self.stalled.clear();
        }
    }

    /// Closes a connection, saying why; nothing of what it sent last was used.
    fn refuse(&mut self, id: ConnectionId, refuse: Refuse) {
        let connection = match self.current.take_if(|current| current.id == id) {
            Some(connection) => {
                self.receiver.handle_disconnected();
                self.stalled.clear();
                self.wire_bytes_before += connection.link.bytes_sent() + connection.link.bytes_received();
                connection
            }
            None => match self.strangers.iter().position(|connection| connection.id == id) {
                Some(at) => self.strangers.swap_remove(at),
                None => return,
            },
        };
        tracing::warn!(
            peer = %connection.link.peer().name,
            address = %connection.link.remote_address(),
            why = %refuse.text,
            "refused"
        );
        self.last_error = Some(format!("refused {}: {}", connection.link.peer().name, refuse.text));
        connection.outbox.say(Message::Refuse(refuse).encode());
        // The peer hangs up when it has read that; if it does not, the connection ends with the next bytes it sends.
        self.strangers.push(connection);
    }

    fn refuse_with(&mut self, id: ConnectionId, code: RefuseCode, text: String) {
        let epoch = self.receiver.paired().map(|(_, epoch)| epoch);
        self.refuse(id, Refuse { code, epoch, text: Text::new(text) });
    }

    fn handle_message(&mut self, id: ConnectionId, bytes: &[u8]) {
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
        let peer = self.strangers[at].link.peer();
        if (&peer.name, peer.id) != (&hello.name, hello.site) {
            let text = format!("its certificate says {}, its hello {}", peer.name, hello.name);
            return self.refuse_with(id, RefuseCode::Protocol, text);
        }
        // What was appended for an earlier connection counts for this one if it is durable.
        self.commit();
        if let Some((why, _)) = &self.trouble {
            let text = why.clone();
            return self.refuse_with(id, RefuseCode::Failed, text);
        }
        let adoption = match self.receiver.handle_hello(hello) {
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
        if let Some(old) = self.current.take() {
            tracing::info!(peer = %old.link.peer().name, "a newer connection takes the place of the old one");
            self.wire_bytes_before += old.link.bytes_sent() + old.link.bytes_received();
            self.receiver.handle_disconnected();
            self.stalled.clear();
            old.link.close(CloseCode::DONE, "a newer connection took its place");
        }
        let welcome = self.receiver.handle_connected(&adoption);
        let connection = self.strangers.swap_remove(at);
        tracing::info!(peer = %connection.link.peer().name, address = %connection.link.remote_address(), "connected");
        connection.outbox.say(Message::Welcome(welcome).encode());
        self.last_peer = Some(connection.link.remote_address());
        self.last_error = None;
        self.current = Some(connection);
    }

    /// Drops, durably, what the primary will make anew.
    fn withdraw(&mut self, hello: &Hello) -> Result<(), JournalError> {
        let withdrawn = self.receiver.withdraw(hello);
        for (volume, numbers) in withdrawn {
            let name = &self.state.received[volume.as_usize()].name;
            tracing::info!(volume = %name, sets = numbers.len(), "the primary makes record sets anew that came beyond a gap");
            self.unappended.retain(|set| set.volume != volume || !numbers.contains(&set.number));
            self.tracked[volume.as_usize()].withdraw(&numbers);
            if let Some(journal) = &mut self.journal {
                journal.append_withdrawn(&Withdrawn { volume: name.clone(), numbers })?;
            }
        }
        self.journal.as_mut().map_or(Ok(()), Journal::sync)
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
        self.site.save_state(&state)?;
        self.state = state;
        self.image_index.extend(index);
        self.tracked.extend(adoption.volumes.iter().map(|_| Tracked::default()));
        if self.journal.is_none() {
            let storage = Arc::new(RealStorage::open(&self.site.journal())?);
            let (journal, _) = Journal::open(storage, adoption.session, self.journal_config)?;
            *lock(&self.data.0) = Some(journal.reader());
            self.journal = Some(journal);
        }
        failpoint::pass(FailPoint::Adopted);
        Ok(())
    }

    // ---- what arrives ----

    fn handle_tokens(&mut self, id: ConnectionId, bytes: &[u8]) {
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

    fn handle_set(&mut self, id: ConnectionId, bytes: Bytes, share: Share) {
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

    // ---- journal and groups ----

    /// Appends what was taken to the journal, as far as it has room.
    pub(super) fn append_waiting(&mut self) {
        while let Some(waiting) = self.unappended.front() {
            let Some(journal) = &mut self.journal else { return };
            let at = match journal.append_set(&waiting.bytes) {
                Ok(at) => at,
                Err(error) => return self.journal_failed(&error),
            };
            failpoint::pass(FailPoint::Appended);
            let (volume, number) = (waiting.volume, waiting.number);
            let journaled =
                Journaled { hash: waiting.hash, last_seq: waiting.last_seq, end: waiting.end, at };
            self.tracked[volume.as_usize()].sets.insert(number, journaled);
            self.receiver.handle_appended(volume, number, at).expect("the receiver has just taken it");
            self.appended.push((volume, number));
            self.unappended.pop_front();
        }
        if self.trouble.as_ref().is_some_and(|(_, final_)| !final_) {
            tracing::info!("the journal has room again");
            self.trouble = None;
        }
    }

    /// The bytes of a set that was taken and for which the journal has had no room so far.
    pub(super) fn unappended_set(&self, volume: VolumeIndex, number: SetNumber) -> Option<Bytes> {
        let found = self.unappended.iter().find(|set| (set.volume, set.number) == (volume, number));
        found.map(|set| set.bytes.clone())
    }

    fn journal_failed(&mut self, error: &JournalError) {
        let passing = matches!(error, JournalError::Full { .. } | JournalError::TooManySegments { .. });
        let why = error.to_string();
        // What ended the session for good stays the reason: what follows from it says less, or sounds as if it passed.
        if !self.trouble.as_ref().is_some_and(|(known, is_final)| *is_final || *known == why) {
            tracing::error!(%why, "the session is SUSPENDED: nothing more is taken, what was shown stays");
            self.trouble = Some((why.clone(), !passing));
        }
        if passing && !self.checkpointing && !self.image.is_incomplete() {
            self.start_checkpoint();
        }
        if let Some(id) = self.current.as_ref().map(|current| current.id) {
            self.refuse_with(id, RefuseCode::Failed, why);
        }
    }

    /// Forms groups as long as there are any; each is committed, then shown. One sync makes sets and COMMIT durable:
    /// persist first, then acknowledge and show.
    pub(super) fn commit(&mut self) {
        loop {
            if self.planned.is_none() && self.trouble.is_none() {
                self.planned = self.receiver.poll_group();
            }
            if let Some(plan) = &self.planned {
                let commit = self.commit_entry(plan);
                let Some(journal) = &mut self.journal else { return };
                if journal.last_commit().is_none_or(|last| last.group < commit.group)
                    && let Err(error) = journal.append_commit(&commit)
                {
                    return self.journal_failed(&error);
                }
                failpoint::pass(FailPoint::CommitAppended);
            }
            if let Some(journal) = &mut self.journal
                && let Err(error) = journal.sync()
            {
                return self.journal_failed(&error);
            }
            for (volume, number) in std::mem::take(&mut self.appended) {
                failpoint::pass(FailPoint::Synced);
                self.receiver.handle_durable(volume, number).expect("it was appended");
            }
            let plan = self.planned.take();
            let more = plan.is_some();
            if let Some(plan) = plan
                && let Err(error) = self.show(&plan)
            {
                tracing::error!(%error, "a committed group cannot be shown; the view stays as it is");
                self.trouble = Some((error.to_string(), true));
                return;
            }
            if more {
                failpoint::pass(FailPoint::Shown);
            }
            self.answer();
            if !more {
                return;
            }
            // A group has made room.
            self.retry_stalled();
        }
    }

    /// Acknowledgements and progress.
    fn answer(&mut self) {
        while let Some(ack) = self.receiver.poll_ack() {
            self.say(Message::Ack(ack));
        }
        if let Some(progress) = self.receiver.poll_progress() {
            self.say(Message::Progress(progress));
        }
    }

    pub(super) fn say(&mut self, message: Message) {
        if let Some(connection) = &self.current
            && !connection.outbox.say(message.encode())
        {
            connection.link.close(CloseCode::BUSY, "the primary does not read its acknowledgements");
        }
    }

    fn commit_entry(&self, plan: &GroupPlan) -> Commit {
        let volumes = self.state.received.iter().enumerate().map(|(at, received)| {
            let tracked = &self.tracked[at];
            let mine = plan.volumes.iter().find(|volume| volume.volume.as_usize() == at);
            let through = mine.map_or(tracked.through, |volume| volume.through);
            let (point, end) = tracked.base_after(through);
            let joins = plan.joins.iter().any(|join| join.as_usize() == at);
            CommitVolume {
                volume: received.name.clone(),
                instance: received.instance,
                root: received.root,
                member: tracked.member || joins,
                joins,
                through,
                base: CommitBase { number: point.number, hash: point.hash, last_seq: point.last_seq, end },
            }
        });
        Commit { group: plan.number, time: plan.time, volumes: volumes.collect() }
    }

    fn show(&mut self, plan: &GroupPlan) -> Result<(), ImageError> {
        if self.image.memory_bytes() > 2 * limits::DELTA_BYTES_DEFAULT {
            self.wait_for_checkpoint();
        }
        failpoint::pass(FailPoint::Committed);
        let mut group = Group { number: plan.number, time: plan.time, ..Group::default() };
        for volume in &plan.volumes {
            let updates = volume.sets.iter().flat_map(|set| {
                let updates = &set.meta.updates[set.range.clone()];
                updates.iter().map(|(update, offset)| (update.clone(), data_ref(update, set.at, *offset)))
            });
            group.volumes.push((self.image_index[volume.volume.as_usize()], updates.collect()));
        }
        group.joins = plan.joins.iter().map(|volume| self.image_index[volume.as_usize()]).collect();
        self.image.apply_group(&group)?;
        for volume in &plan.volumes {
            self.tracked[volume.volume.as_usize()].commit(volume.through);
        }
        for volume in &plan.joins {
            self.tracked[volume.as_usize()].member = true;
            tracing::info!(volume = %self.state.received[volume.as_usize()].name, "the volume is whole and visible");
        }
        self.receiver.handle_committed(plan.number).expect("the receiver has planned it");
        Ok(())
    }

    // ---- checkpoints ----

    fn checkpoint_if_due(&mut self) {
        if !self.checkpointing && self.image.checkpoint_due() {
            self.start_checkpoint();
        }
    }

    fn start_checkpoint(&mut self) {
        let (image, inputs) = (Arc::clone(&self.image), self.inputs.clone());
        let spawned = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            drop(inputs.send(Input::Checkpointed(image.checkpoint())));
        });
        match spawned {
            Ok(_) => self.checkpointing = true,
            Err(error) => tracing::error!(%error, "no thread for a checkpoint; trying again"),
        }
    }

    fn checkpointed(&mut self, result: Result<(), ImageError>) {
        self.checkpointing = false;
        match result {
            Ok(()) => self.trim(),
            Err(error) => {
                tracing::error!(%error, "a checkpoint failed; the journal keeps its groups, trying again")
            }
        }
    }

    /// Memory is at its bound: nothing more is shown before the checkpoint has made room. Other inputs wait meanwhile.
    fn wait_for_checkpoint(&mut self) {
        if let Err(error) = self.image.checkpoint() {
            tracing::error!(%error, "a checkpoint failed although memory is short");
        }
    }

    /// Lets the journal go of what the plain trees have.
    fn trim(&mut self) {
        let tree = self.image.checkpointed();
        for (received, tracked) in self.state.received.iter().zip(&mut self.tracked) {
            if let Some(volume) = tree.volumes.get(&received.name) {
                tracked.checkpointed(volume.seq);
            }
        }
        let Some(journal) = &mut self.journal else { return };
        let oldest = self.tracked.iter().flat_map(|tracked| tracked.sets.values()).map(|set| set.at).min();
        failpoint::pass(FailPoint::Trimming);
        if let Err(error) = journal.trim(oldest.unwrap_or(journal.end())) {
            tracing::error!(%error, "the journal could not be trimmed");
        }
        failpoint::pass(FailPoint::Trimmed);
    }

    // ---- status ----

    pub(super) fn publish_status(&mut self) {
        if self.published.is_some_and(|published| published.elapsed() < STATUS_PERIOD) {
            return;
        }
        self.published = Some(Instant::now());
        let progress = self.receiver.progress();
        let shown = progress.time > Timestamp::ZERO;
        let now = Timestamp(Reading::now().real);
        let delay = shown.then(|| age_seconds(now, progress.time));
        let tokens = self.receiver.bare_tokens();
        let members = self.receiver.volumes().filter(|(.., member)| *member).count();
        let all = self.receiver.volumes().count();
        let (session_state, reason) = match (&self.trouble, self.receiver.role()) {
            (_, Role::Promoted) => ("SUSPENDED", Some("promoted, without a replica of its own".to_owned())),
            (Some((why, true)), _) => ("SUSPENDED", Some(format!("ERROR: {why}"))),
            (Some((why, false)), _) => ("SUSPENDED", Some(format!("JOURNAL: {why}"))),
            _ if all == 0 => ("PENDING", None),
            _ if self.receiver.volumes().any(|(volume, ..)| self.receiver.is_resyncing(volume)) => {
                ("RESYNC", None)
            }
            _ if members < all => ("COPY", None),
            _ => ("DUPLEX", None),
        };
        let state_of = |volume, member| match member {
            true if self.receiver.is_resyncing(volume) => "RESYNC",
            true => "DUPLEX",
            false => "COPY",
        };
        let volumes = self.receiver.volumes().map(|(volume, name, member)| VolumeStatus {
            name: name.to_string(),
            state: state_of(volume, member).to_owned(),
            files_copied: 0,
            files_total: 0,
            bytes_copied: 0,
            bytes_total: 0,
        });
        let connected = self.current.is_some();
        let (pending_records, pending_bytes) = self.pending();
        let status = Status {
            role: self.receiver.role(),
            session_state: session_state.to_owned(),
            reason,
            epoch: self.receiver.paired().map_or(0, |(_, epoch)| epoch.number),
            group: progress.group.0,
            consistency_time: shown.then(|| progress.time.to_string()),
            delay_seconds: delay,
            // What a silent primary has written since is not known here: at worst, everything since then.
            exposure_seconds: if connected { 0.0 } else { delay.unwrap_or(0.0) },
            behind_bytes: tokens.bytes + pending_bytes,
            behind_records: tokens.count + tokens.not_held + pending_records,
            peer: self.peer_status(),
            volumes: volumes.collect(),
            wire_bytes: self.wire_bytes_before
                + self.current.as_ref().map_or(0, |c| c.link.bytes_sent() + c.link.bytes_received()),
            sets_sent: 0,
            sets_received: self.sets_received,
            sets_out_of_order: self.receiver.sets_out_of_order(),
            tokens_held: tokens.count,
            store_bytes: self.journal.as_ref().map_or(0, Journal::bytes_used),
            store_bytes_max: self.journal_room(),
        };
        *lock(&self.shared.board) = Some(status);
    }

    /// Bytes that the journal could grow to, at present.
    fn journal_room(&self) -> u64 {
        let free = rustix::fs::statvfs(self.site.path()).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
        let used = self.journal.as_ref().map_or(0, Journal::bytes_used);
        used + free.saturating_sub(self.journal_config.floor_bytes)
    }

    /// Updates that were received and are in no group, and the bytes of their sets.
    fn pending(&self) -> (u64, u64) {
        let updates = self.tracked.iter().map(|tracked| {
            let last = tracked.sets.values().map(|set| set.last_seq).max().unwrap_or(tracked.through);
            last.0.saturating_sub(tracked.through.0)
        });
        (updates.sum(), self.receiver.held_bytes() as u64)
    }

    fn peer_status(&self) -> PeerStatus {
        let link = self.current.as_ref().map(|current| &current.link);
        PeerStatus {
            name: self.state.peer.as_ref().map(ToString::to_string),
            address: self.last_peer.map(|address| address.to_string()),
            connected: link.is_some(),
            rtt_ms: link.map(|link| link.rtt().as_secs_f64() * 1e3),
            last_error: self.last_error.clone(),
        }
    }

    /// Makes role and epoch of a promoted site durable.
    pub(super) fn save_promoted(&mut self, epoch: Epoch) -> Result<(), SiteError> {
        let mut state = self.state.clone();
        (state.role, state.epoch) = (Role::Promoted, epoch);
        self.site.save_state(&state)?;
        self.state = state;
        Ok(())
    }
}
