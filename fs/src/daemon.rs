//! What the daemons of both sites share: waiting for their end, taking mounts away, randomness.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::mount::Mounted;

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

    /// Takes all mounts away, the newest first. Returns what went wrong.
    pub fn unmount(&self) -> Vec<anyhow::Error> {
        let all = self.all().clone();
        let failed = all.iter().rev().filter_map(|mounted| {
            let result = mounted.unmount();
            result.with_context(|| format!("cannot unmount {}", mounted.target().display())).err()
        });
        failed.collect()
    }
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
