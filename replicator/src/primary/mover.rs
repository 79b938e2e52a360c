//! The data mover: the one thread that owns a primary's [`Engine`], and the link to its replica.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use twinfs_certs::Identity;
use twinfs_core::id::{Epoch, SiteName};
use twinfs_core::limits;
use twinfs_core::session::Role;
use twinfs_core::session::sender::Sender;
use twinfs_core::stamp::Timestamp;

use super::activity_log::ActivityLog;
use super::chain::{SetMaker, SetVolume};
use super::clock::Reading;
pub use super::engine::{CopyProgress, Examined, Files, Stopped};
use super::engine::{Engine, EngineConfig, IDLE, Outlet};
use super::link::{self, HoldBack, Input, Outbox};
use super::sidefile::Capture;
use crate::status::Status;
use crate::transport::{CloseCode, Link};

/// How often the status is renewed, at most.
const STATUS_PERIOD: Duration = Duration::from_millis(20);

/// Where the replica is.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Its site.
    pub name: SiteName,
    /// `HOST:PORT`.
    pub address: String,
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
        let outlet = Outside { on_fenced: parts.on_fenced, link: None, wire_bytes_before: 0 };
        let engine = Engine::new(EngineConfig {
            capture: Arc::clone(&capture),
            log: parts.log,
            sender: parts.sender,
            maker: parts.maker,
            volumes: parts.volumes,
            files: parts.files,
            role: parts.role,
            epoch: parts.epoch,
            reason: parts.reason,
            examining: parts.examining,
            outlet,
        });
        let mover = Mover {
            engine,
            capture: Arc::clone(&capture),
            shared: Arc::clone(&shared),
            replica: parts.replica,
            incoming,
            published: None,
        };
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

    /// The instant up to which the replica has everything in its plain trees; zero unless the session is DUPLEX. While it is
    /// not, they may lack what was let go, and what a resync has not brought yet.
    #[must_use]
    pub fn both_have(&self) -> Timestamp {
        match self.capture.fill().suspended {
            true => Timestamp::ZERO,
            false => Timestamp(self.shared.both_have.load(Ordering::Acquire)),
        }
    }

    /// A scan has ended that [`PrimaryParts::examining`] announced.
    pub fn examined(&self, examined: Examined) {
        *lock(&self.shared.examined) = Some(examined);
        self.capture.poke();
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

/// The engine's way to its link.
struct Outside {
    on_fenced: Box<dyn Fn(Epoch) + Send>,
    link: Option<(Link, Outbox)>,
    /// Of links that are gone.
    wire_bytes_before: u64,
}

impl Outside {
    fn unlink(&mut self) {
        if let Some((link, _)) = self.link.take() {
            self.wire_bytes_before += link.bytes_sent() + link.bytes_received();
        }
    }

    fn wire_bytes(&self) -> u64 {
        let now = self.link.as_ref().map_or(0, |(link, _)| link.bytes_sent() + link.bytes_received());
        self.wire_bytes_before + now
    }
}

impl Outlet for Outside {
    fn say(&mut self, message: Vec<u8>) -> bool {
        self.link.as_ref().is_some_and(|(_, outbox)| outbox.control(message))
    }

    fn takes_tokens(&self) -> bool {
        self.link.as_ref().is_some_and(|(_, outbox)| outbox.takes_tokens())
    }

    fn tokens(&mut self, batch: Vec<u8>) -> bool {
        self.link.as_ref().is_some_and(|(_, outbox)| outbox.tokens(batch))
    }

    fn set(&mut self, set: Bytes) {
        if let Some((_, outbox)) = &self.link {
            outbox.set(set);
        }
    }

    fn hang_up(&mut self, why: &str) {
        if let Some((link, _)) = &self.link {
            link.close(CloseCode::MALFORMED, why);
        }
    }

    fn fenced(&mut self, epoch: Epoch) {
        (self.on_fenced)(epoch);
    }
}

struct Mover {
    engine: Engine<Outside>,
    capture: Arc<Capture>,
    shared: Arc<Shared>,
    replica: Option<Replica>,
    incoming: mpsc::Receiver<Input>,
    published: Option<Instant>,
}

impl Mover {
    fn run(mut self) -> Stopped {
        loop {
            self.take_inputs();
            let examined = lock(&self.shared.examined).take();
            if let Some(examined) = examined {
                self.engine.handle_examined(examined);
            }
            self.engine.settle(Reading::now());
            self.publish_status();
            if self.is_finished() {
                return self.engine.stop(Reading::now());
            }
            let wake = self.engine.next_wake();
            self.capture.wait_queued(wake.queued_bytes, Instant::now() + wake.after);
        }
    }

    fn take_inputs(&mut self) {
        while let Ok(input) = self.incoming.try_recv() {
            match input {
                Input::Linked(link, outbox) => {
                    tracing::info!(peer = %link.peer().name, address = %link.remote_address(), "connected");
                    self.engine.outlet().link = Some((link, outbox));
                    self.engine.handle_linked();
                }
                Input::Message(bytes) => self.engine.handle_message(&bytes, Reading::now()),
                Input::Unlinked(why) => {
                    self.engine.outlet().unlink();
                    self.engine.handle_unlinked(why);
                }
            }
        }
    }

    fn is_finished(&self) -> bool {
        let Some(deadline) = *lock(&self.shared.stop) else { return false };
        self.engine.is_finished() || Instant::now() >= deadline
    }

    fn publish_status(&mut self) {
        let wanted = self.shared.wanted.load(Ordering::Acquire);
        if !wanted && self.published.is_some_and(|published| published.elapsed() < STATUS_PERIOD) {
            return;
        }
        self.published = Some(Instant::now());
        self.shared.both_have.store(self.engine.both_have().0, Ordering::Release);
        let mut status = self.engine.status();
        let outside = self.engine.outlet();
        status.wire_bytes = outside.wire_bytes();
        let link = outside.link.as_ref().filter(|_| status.peer.connected);
        status.peer.rtt_ms = link.map(|(link, _)| link.rtt().as_secs_f64() * 1e3);
        status.peer.name = self.replica.as_ref().map(|replica| replica.name.to_string());
        status.peer.address = self.replica.as_ref().map(|replica| replica.address.clone());
        *lock(&self.shared.board) = Some(status);
        if wanted {
            self.shared.wanted.store(false, Ordering::Release);
        }
    }
}
