//! Programs that write while a site is killed under them: each in a thread of its own, stopped between two steps when
//! somebody wants to look, and started again when the mount that it works on died.

pub mod acknowledged;
pub mod churn;
pub mod fsx;
pub mod numbers;
pub mod pages;
pub mod rows;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use crate::process::wait_for;

/// The mount that a program worked on is dead. Whether its last call did anything is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

/// What a call on a mount says of it.
///
/// # Errors
/// [`Lost`] if the mount is dead.
pub fn unless_lost<T>(result: Result<T, Errno>) -> Result<Result<T, Errno>, Lost> {
    match result {
        Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::NODEV) => Err(Lost),
        // The disk below it.
        Err(Errno::IO | Errno::ROFS) => Err(Lost),
        other => Ok(other),
    }
}

/// What the standard library says of a call that has no other reason to fail.
///
/// # Errors
/// [`Lost`] if the mount is dead.
///
/// # Panics
/// If it failed for another reason.
pub fn expect_or_lost<T>(what: &str, result: io::Result<T>) -> Result<T, Lost> {
    let result = result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
    Ok(unless_lost(result)?.unwrap_or_else(|error| panic!("{what}: {error}")))
}

/// A program.
pub trait Load: Send {
    /// Opens what it works on, and goes on from what it finds there.
    ///
    /// # Errors
    /// [`Lost`] if the mount is not there, or not any more.
    fn connect(&mut self) -> Result<(), Lost>;

    /// Does one thing.
    ///
    /// # Errors
    /// [`Lost`] if the mount died.
    fn step(&mut self) -> Result<(), Lost>;

    /// Closes everything, so that nothing is in caches that could reach the mount later.
    fn disconnect(&mut self);
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Held for reading during each step.
    gate: RwLock<()>,
    connected: AtomicUsize,
    steps: AtomicUsize,
    /// Somebody wants all files closed.
    close: AtomicBool,
    /// Who has lost its mount shall leave it alone.
    stay_lost: AtomicBool,
    /// How often a mount died.
    lost: AtomicUsize,
}

/// Running programs. Dropped, they end.
#[derive(Debug)]
pub struct Loads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    count: usize,
}

/// As long as this lives, every program stands still, between two steps.
#[derive(Debug)]
pub struct Paused<'a> {
    _gate: RwLockWriteGuard<'a, ()>,
}

impl Loads {
    /// Starts programs, each with the pause that it makes after a step.
    #[must_use]
    pub fn start(loads: Vec<(Box<dyn Load>, Duration)>) -> Self {
        let shared = Arc::new(Shared::default());
        let count = loads.len();
        let threads = loads
            .into_iter()
            .map(|(mut load, pause)| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || run(&mut *load, pause, &shared))
            })
            .collect();
        Self { shared, threads, count }
    }

    /// Waits until every program works.
    ///
    /// # Panics
    /// If one never does, or has found an error.
    pub fn wait_connected(&self) {
        wait_for("all programs to work", || {
            self.check();
            (self.shared.connected.load(Ordering::Acquire) == self.count).then_some(())
        });
    }

    /// Waits until the programs have made some more steps.
    ///
    /// # Panics
    /// If they do not, or one has found an error.
    pub fn wait_steps(&self, steps: usize) {
        let goal = self.shared.steps.load(Ordering::Acquire) + steps;
        wait_for("the programs to do something", || {
            self.check();
            (self.shared.steps.load(Ordering::Acquire) >= goal).then_some(())
        });
    }

    /// Has programs that lose their mount from now on leave it alone, until [`Self::connect_again`].
    pub fn stay_lost(&self) {
        self.shared.stay_lost.store(true, Ordering::Release);
    }

    /// Ends that.
    pub fn connect_again(&self) {
        self.shared.stay_lost.store(false, Ordering::Release);
    }

    /// Waits until every program has lost its mount.
    ///
    /// # Panics
    /// If one does not, or has found an error.
    pub fn wait_lost(&self) {
        wait_for("all programs to lose their mount", || {
            self.check();
            (self.shared.connected.load(Ordering::Acquire) == 0).then_some(())
        });
    }

    /// How often a program has lost its mount.
    #[must_use]
    pub fn lost(&self) -> usize {
        self.shared.lost.load(Ordering::Acquire)
    }

    /// Stops all programs between two steps, until the result is dropped.
    ///
    /// # Panics
    /// If one has found an error.
    pub fn pause(&self) -> Paused<'_> {
        let gate = self.shared.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.check();
        Paused { _gate: gate }
    }

    /// Has all programs close their files, and stops them until the result is dropped.
    ///
    /// # Panics
    /// If one does not, or has found an error.
    pub fn rest(&self) -> Paused<'_> {
        self.shared.close.store(true, Ordering::Release);
        self.wait_lost();
        let paused = self.pause();
        self.shared.close.store(false, Ordering::Release);
        paused
    }

    fn check(&self) {
        assert!(!self.threads.iter().any(JoinHandle::is_finished), "a program has found an error");
    }
}

impl Drop for Loads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !std::thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

fn run(load: &mut dyn Load, pause: Duration, shared: &Shared) {
    let mut connected = false;
    while !shared.stop.load(Ordering::Acquire) {
        let gate = shared.gate.read().unwrap_or_else(PoisonError::into_inner);
        let close = shared.close.load(Ordering::Acquire);
        let works = match connected {
            true if close => {
                load.disconnect();
                false
            }
            true => load.step().is_ok(),
            false if close || shared.stay_lost.load(Ordering::Acquire) => false,
            false => load.connect().is_ok(),
        };
        if connected && works {
            shared.steps.fetch_add(1, Ordering::AcqRel);
        }
        match (connected, works) {
            (false, true) => _ = shared.connected.fetch_add(1, Ordering::AcqRel),
            (true, false) => {
                // Files of a dead mount keep it from going away.
                if !close {
                    load.disconnect();
                    shared.lost.fetch_add(1, Ordering::AcqRel);
                }
                shared.connected.fetch_sub(1, Ordering::AcqRel);
            }
            _ => {}
        }
        connected = works;
        drop(gate);
        std::thread::sleep(if works { pause } else { Duration::from_millis(5) });
    }
    if connected {
        load.disconnect();
    }
}
