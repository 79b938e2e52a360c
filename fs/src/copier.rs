//! The initial copy of a volume, while programs go on writing.
//!
//! A thread walks the tree and publishes ordinary, stamped updates for what it finds: the object itself, its extended
//! attributes, its content in pieces, its names if it is a directory. Each is read and published under the object's
//! stripe, so the copy orders by itself against what programs do:
//!
//! * What is done to an object that the walk has not reached need not be published: it is read later. So is content that
//!   is written beyond the piece that was copied last. All other changes are published as ever.
//! * Names are always published, and an object that gets a new name is queued, in case the walk passes by its old one.
//! * A symlink is published before the first of its names: see `symlink`.
//! * An object born meanwhile is published from its birth on, so it counts as copied.
//!
//! When the queue is empty, the replica has what the volume has: that is published as the end of the copy.
//!
//! A **resync** is the same, but for what it reads: not the tree, but what a change map names, see `level` and `reread`.
//! Everything else counts as copied. The replica makes one group of all of it, so the order within it does not matter.
//!
//! [`Copier::prepare`] puts a copy in force, before the volume is mounted; [`Copier::start`] sets the walk going.

mod level;
mod object;
mod reread;
mod saved;
mod state;
mod symlink;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::VolumeIndex;
use twinfs_core::limits;
use twinfs_replicator::primary::mover::CopyProgress;
use twinfs_replicator::primary::sidefile::Capture;

pub use self::saved::BadCopyState;
pub use self::state::CopyState;
pub(crate) use self::state::CopySwitch;
pub(crate) use self::symlink::until_told;

pub(crate) use self::object::next_data;
use self::object::{Halt, Worker};
use crate::mirror::Mirror;

/// Whether a copy may take room for an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It may.
    Free,
    /// Programs need what is left.
    Full,
    /// Updates are not kept any more.
    Closed,
}

/// Who knows how much room there is: the sidefile in production.
pub trait CopyRoom: Send + Sync + 'static {
    /// Waits until there is room for the copy, at most `timeout`.
    fn wait(&self, timeout: Duration) -> Room;
}

impl CopyRoom for Capture {
    fn wait(&self, timeout: Duration) -> Room {
        let begin = Instant::now();
        match self.wait_copy_room(timeout) {
            true => Room::Free,
            // It only gives up before its time if nothing is kept any more.
            false if begin.elapsed() < timeout || self.fill().suspended => Room::Closed,
            false => Room::Full,
        }
    }
}

/// A copy that is being made, on a thread of its own. Dropped, it stops.
#[derive(Debug)]
pub struct Copier {
    mirror: Arc<Mirror>,
    state: Arc<CopyState>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Copier {
    /// Puts the copy of a volume in force: from now on the operations of programs heed it. Call this before the volume is
    /// mounted if the copy is to go on from what [`CopyState::save`] has returned, and at any time otherwise.
    ///
    /// A copy can go on if every update was published since it began, in order. After the session was suspended, that is
    /// not so: either begin again, or see to it that all that was changed meanwhile is published by other means.
    ///
    /// # Errors
    /// [`BadCopyState`]; nothing was changed.
    pub fn prepare(
        mirror: &Mirror,
        volume: VolumeIndex,
        resume: Option<&[u8]>,
    ) -> Result<Arc<CopyState>, BadCopyState> {
        let known = mirror.volumes.iter().find(|known| known.index == volume);
        let known = known.ok_or(BadCopyState::NoVolume)?;
        let state = Arc::new(CopyState::new(volume, known.root, resume)?);
        known.copy.turn_on(state.clone());
        Ok(state)
    }

    /// Puts the resync of a volume in force: from now on, operations of programs publish what the map does not name, and
    /// note what it names. No operation may be under way: call it while the sidefile holds them, after its *resync* mark.
    ///
    /// # Errors
    /// [`BadCopyState::NoVolume`].
    pub fn prepare_resync(
        mirror: &Mirror,
        volume: VolumeIndex,
        map: ChangeMap,
    ) -> Result<Arc<CopyState>, BadCopyState> {
        let known = mirror.volumes.iter().find(|known| known.index == volume);
        let known = known.ok_or(BadCopyState::NoVolume)?;
        let state = Arc::new(CopyState::resync(volume, known.root, map));
        known.copy.turn_on(state.clone());
        Ok(state)
    }

    /// Starts the thread that copies.
    ///
    /// # Errors
    /// The system's, if there can be no further thread.
    pub fn start(mirror: Arc<Mirror>, room: Arc<dyn CopyRoom>, state: Arc<CopyState>) -> io::Result<Self> {
        let stopping = Arc::new(AtomicBool::new(false));
        let slot = mirror.volumes.iter().position(|known| known.index == state.volume());
        let slot = slot.ok_or_else(|| io::Error::other("the copy belongs to another mirror"))?;
        let worker =
            Worker { mirror: mirror.clone(), state: state.clone(), room, stopping: stopping.clone(), slot };
        let thread = std::thread::Builder::new().name("copier".to_owned()).spawn(move || worker.run())?;
        Ok(Self { mirror, state, stopping, thread: Some(thread) })
    }

    /// How much is copied of what was found so far.
    #[must_use]
    pub fn progress(&self) -> CopyProgress {
        self.state.progress()
    }

    /// Whether the whole volume is copied, and that is published.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.state.is_complete()
    }

    /// Whether the thread has ended: the copy is complete, or updates are not kept any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops the thread, which takes well under a second, and returns the state to go on from; `None` if the copy is
    /// complete. Call this when the volume is not mounted any more: see [`CopyState::save`].
    #[must_use]
    pub fn stop(mut self) -> Option<Vec<u8>> {
        self.halt();
        self.state.save()
    }

    /// Stops the thread, and returns what is left of a resync's map, beside what programs have added to it: nothing if it is
    /// complete. From here on whatever they do is published, or noted where it is dropped.
    #[must_use]
    pub fn leave(mut self) -> ChangeMap {
        self.halt();
        let left = self.state.leave();
        if let Some(volume) = self.mirror.volumes.iter().find(|known| known.index == self.state.volume()) {
            volume.copy.turn_off(&self.state);
        }
        left
    }

    /// Takes a resync back that was prepared and could not be started.
    pub(crate) fn abandon(mirror: &Mirror, volume: VolumeIndex) {
        if let Some(known) = mirror.volumes.iter().find(|known| known.index == volume)
            && let Some(state) = known.copy.state()
        {
            drop(state.leave());
            known.copy.turn_off(&state);
        }
    }

    /// Stops the thread, in well under a second. What is done after that is for [`Self::stop`] or [`Self::leave`] to say.
    pub(crate) fn halt(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the thread of a copy has panicked");
            }
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.halt();
    }
}

impl Worker {
    fn run(&self) {
        loop {
            let step = match self.state.next() {
                Some(item) => self.copy(item),
                None => match self.complete() {
                    Ok(true) => return,
                    other => other.map(|_| ()),
                },
            };
            match step {
                Ok(()) => {}
                Err(Halt::Failed(error)) => {
                    tracing::warn!(%error, "an object cannot be copied; it will be tried again");
                    self.state.put_back();
                    // A wake-up before its time only means that it is tried again earlier.
                    std::thread::park_timeout(Duration::from_millis(limits::COPY_RETRY_MS));
                }
                Err(Halt::Stopped | Halt::Closed) => {
                    self.state.put_back();
                    return;
                }
            }
        }
    }
}
