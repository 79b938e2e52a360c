//! The receiver's driver: the one thread that owns a replica's [`Engine`], and the links of its primaries.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc::{Receiver as Inputs, RecvTimeoutError, Sender as InputSender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Runtime;
use twinfs_certs::Identity;
use twinfs_core::id::SiteName;
use twinfs_core::session::receiver::Ordering;

use super::door::{self, Outbox};
use super::engine::{Asker, ConnectionId, Engine, EngineConfig, Outlet, Share, SiteStore, lock};
pub use super::engine::{PromoteMode, Promoted, StartError, TakeoverNews};
use super::image::{Image, ImageError, ImageOptions};
use super::journal::JournalConfig;
use crate::failpoint;
use crate::primary::clock::Reading;
use crate::site::{SiteDir, SiteError, State};
use crate::status::Status;
use crate::storage::{RealStorage, Storage, StorageError};
use crate::transport::{CloseCode, Link, quic};

/// How long the driver sleeps at most while nothing happens.
const IDLE: Duration = Duration::from_millis(100);
/// How often the status is renewed, at most.
const STATUS_PERIOD: Duration = Duration::from_millis(20);
/// Inputs that are dealt with between two syncs of the journal.
const BATCH_INPUTS_MAX: usize = 256;
/// Bytes of record sets that are journaled between two syncs.
const BATCH_BYTES_MAX: usize = 32 << 20;

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
        let image = Arc::clone(driver.engine.image());
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

impl SiteStore for SiteDir {
    fn save_state(&self, state: &State) -> Result<(), SiteError> {
        Self::save_state(self, state)
    }

    fn journal(&self) -> Result<Arc<dyn Storage>, StorageError> {
        Ok(Arc::new(RealStorage::open(&Self::journal(self))?))
    }

    fn set_journal_aside(&self, number: u64) -> Result<(), SiteError> {
        Self::set_journal_aside(self, number)
    }

    fn directory(&self) -> io::Result<&Path> {
        Ok(self.path())
    }

    fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(self.path()).map_or(0, |stat| stat.f_bavail * stat.f_frsize)
    }
}

/// The engine's way to its links, and to whoever waits for an answer.
struct Outside {
    inputs: InputSender<Input>,
    links: HashMap<ConnectionId, (Link, Outbox)>,
    /// Of links that are gone.
    wire_bytes_before: u64,
    askers: HashMap<Asker, InputSender<TakeoverNews>>,
    next_asker: u64,
    /// Decisions that nobody was told yet: the status says them first.
    decided: Vec<(InputSender<TakeoverNews>, TakeoverNews)>,
}

impl Outside {
    fn unlink(&mut self, id: ConnectionId) {
        if let Some((link, _)) = self.links.remove(&id) {
            self.wire_bytes_before += link.bytes_sent() + link.bytes_received();
        }
    }

    fn wire_bytes(&self) -> u64 {
        let links = self.links.values().map(|(link, _)| link.bytes_sent() + link.bytes_received());
        self.wire_bytes_before + links.sum::<u64>()
    }
}

impl Outlet for Outside {
    fn say(&mut self, to: ConnectionId, message: Vec<u8>) {
        if let Some((link, outbox)) = self.links.get(&to)
            && !outbox.say(message)
        {
            link.close(CloseCode::BUSY, "the primary does not read its acknowledgements");
        }
    }

    fn close(&mut self, connection: ConnectionId, code: CloseCode, why: &'static str) {
        if let Some((link, _)) = self.links.get(&connection) {
            link.close(code, why);
        }
        self.unlink(connection);
    }

    fn start_checkpoint(&mut self, image: &Arc<Image>) -> bool {
        let (image, inputs) = (Arc::clone(image), self.inputs.clone());
        let spawned = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            drop(inputs.send(Input::Checkpointed(image.checkpoint())));
        });
        if let Err(error) = &spawned {
            tracing::error!(%error, "no thread for a checkpoint; trying again");
        }
        spawned.is_ok()
    }

    fn tell(&mut self, asker: Asker, news: TakeoverNews) {
        if matches!(news, TakeoverNews::Decided(_)) {
            self.decided.extend(self.askers.remove(&asker).map(|heard| (heard, news)));
        } else if let Some(heard) = self.askers.get(&asker) {
            // Who asked may be gone.
            let _ = heard.send(news);
        }
    }
}

struct Driver {
    engine: Engine<Outside>,
    incoming: Inputs<Input>,
    shared: Arc<Shared>,
    published: Option<Instant>,
}

impl Driver {
    fn recover(
        config: ReplicaConfig,
        incoming: Inputs<Input>,
        inputs: InputSender<Input>,
        shared: Arc<Shared>,
    ) -> Result<Self, StartError> {
        let ReplicaConfig { site, state, ordering, free_space_floor, identity, .. } = config;
        let outlet = Outside {
            inputs,
            links: HashMap::new(),
            wire_bytes_before: 0,
            askers: HashMap::new(),
            next_asker: 0,
            decided: Vec::new(),
        };
        let path = site.path().to_owned();
        let config = EngineConfig {
            store: Box::new(site),
            state,
            own_site: identity.id(),
            journal: JournalConfig { floor_bytes: free_space_floor, ..journal_config() },
            ordering,
            open_image: Box::new(move |data| Image::open(&path, data, image_options())),
            outlet,
        };
        let engine = Engine::recover(config, Reading::now())?;
        let mut driver = Self { engine, incoming, shared, published: None };
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
                    self.engine.stop();
                    self.tell_decisions();
                    return;
                }
                self.handle(input);
                next = if inputs < BATCH_INPUTS_MAX && bytes < BATCH_BYTES_MAX {
                    self.incoming.try_recv().ok()
                } else {
                    None
                };
            }
            self.engine.settle(Reading::now());
            self.tell_decisions();
            self.publish_status();
        }
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Linked(id, link, outbox) => {
                let (peer, address) = (link.peer().clone(), link.remote_address());
                self.engine.outlet().links.insert(id, (link, outbox));
                self.engine.handle_linked(id, peer, address);
            }
            Input::Message(id, bytes, _share) => self.engine.handle_message(id, &bytes),
            Input::Tokens(id, bytes, _share) => self.engine.handle_tokens(id, &bytes),
            Input::Set(id, bytes, share) => self.engine.handle_set(id, bytes, share),
            Input::Unlinked(id, why) => {
                self.engine.handle_unlinked(id, why);
                self.engine.outlet().unlink(id);
            }
            Input::Promote(mode, news) => {
                let outside = self.engine.outlet();
                outside.next_asker += 1;
                let asker = Asker(outside.next_asker);
                outside.askers.insert(asker, news);
                self.engine.handle_promote(asker, mode, Reading::now());
                self.tell_decisions();
            }
            Input::Checkpointed(result) => self.engine.handle_checkpointed(result),
            Input::Status(asker) => {
                self.published = None;
                self.publish_status();
                // Who asked may have given up waiting.
                let _ = asker.send(());
            }
            Input::Stop => {}
        }
    }

    /// Tells those who asked for a promote how it ended, once the status says so too.
    fn tell_decisions(&mut self) {
        let decided = std::mem::take(&mut self.engine.outlet().decided);
        if !decided.is_empty() {
            self.published = None;
            self.publish_status();
        }
        for (heard, news) in decided {
            // Who asked may be gone.
            let _ = heard.send(news);
        }
    }

    fn publish_status(&mut self) {
        if self.published.is_some_and(|published| published.elapsed() < STATUS_PERIOD) {
            return;
        }
        self.published = Some(Instant::now());
        let mut status = self.engine.status(Reading::now());
        let current = self.engine.connection();
        let outside = self.engine.outlet();
        status.wire_bytes = outside.wire_bytes();
        let link = current.and_then(|id| outside.links.get(&id));
        status.peer.rtt_ms = link.map(|(link, _)| link.rtt().as_secs_f64() * 1e3);
        *lock(&self.shared.board) = Some(status);
    }
}
