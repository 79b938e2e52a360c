//! What the daemons of both sites share: waiting for their end, taking mounts away, randomness.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::mount::{IDLE_LOOKS, IDLE_PAUSE, Mounted, Unmounted};

/// How often a daemon looks whether its mounts are still there.
const LOOK: Duration = Duration::from_millis(100);

/// Why a daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Signal(&'static str),
    /// Somebody unmounted all its mounts.
    Unmounted,
}

/// The mounts of a daemon, and the signals that end it.
#[derive(Debug)]
pub struct Mounts {
    mounted: Mutex<Vec<Arc<Mounted>>>,
    runtime: tokio::runtime::Runtime,
}

impl Mounts {
    /// Takes the mounts. From here on SIGTERM and SIGINT no longer kill the process: [`Self::wait`] returns instead.
    ///
    /// # Errors
    /// If signals cannot be waited for.
    pub fn new(mounted: Vec<Mounted>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let mounted = Mutex::new(mounted.into_iter().map(Arc::new).collect());
        Ok(Self { mounted, runtime: runtime.context("cannot wait for signals")? })
    }

    /// Adds a mount.
    pub fn add(&self, mounted: Arc<Mounted>) {
        self.all().push(mounted);
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<Mounted>>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the daemon is to end.
    pub fn wait(&self) -> Ended {
        self.runtime.block_on(async {
            let (mut terminate, mut interrupt) =
                match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
                    (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
                    (Err(error), _) | (_, Err(error)) => {
                        tracing::error!(%error, "cannot wait for signals: stopping");
                        return Ended::Signal("none");
                    }
                };
            loop {
                tokio::select! {
                    _ = terminate.recv() => return Ended::Signal("SIGTERM"),
                    _ = interrupt.recv() => return Ended::Signal("SIGINT"),
                    () = tokio::time::sleep(LOOK) => {}
                }
                if self.all().iter().all(|mounted| mounted.wait_for(Some(Duration::ZERO)).is_some()) {
                    return Ended::Unmounted;
                }
            }
        })
    }

    /// Takes away the mounts that nobody uses, the newest first. Returns what went wrong. Those in use are left: when
    /// what they capture is held, or there is nothing to hold, [`Self::detach`] is next.
    pub fn unmount_idle(&self) -> Vec<anyhow::Error> {
        let mut left = self.all().clone();
        let mut failed = Vec::new();
        for round in 0..IDLE_LOOKS {
            if round > 0 && !left.is_empty() {
                std::thread::sleep(IDLE_PAUSE);
            }
            for mounted in std::mem::take(&mut left).into_iter().rev() {
                match mounted.unmount_if_idle() {
                    Ok(Some(_)) => {}
                    Ok(None) => left.insert(0, mounted),
                    Err(error) => failed.push(cannot_unmount(error, &mounted)),
                }
            }
        }
        *self.all() = left;
        failed
    }

    /// Whether [`Self::unmount_idle`] has left any.
    pub fn are_left(&self) -> bool {
        !self.all().is_empty()
    }

    /// Takes the mounts that are left out of sight. Returns what went wrong.
    pub fn detach(&self) -> Vec<anyhow::Error> {
        let left = std::mem::take(&mut *self.all());
        let mut failed = Vec::new();
        for mounted in left.into_iter().rev() {
            let target = mounted.target().display();
            match mounted.detach() {
                Ok(Unmounted::Detached) => {
                    tracing::warn!(%target, "the mount is in use: its files fail for those who have them open");
                }
                Ok(_) => {}
                Err(error) => failed.push(cannot_unmount(error, &mounted)),
            }
        }
        failed
    }
}

fn cannot_unmount(error: std::io::Error, mounted: &Mounted) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("cannot unmount {}", mounted.target().display()))
}

/// Random bytes.
///
/// # Errors
/// If the kernel has none.
pub fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}
