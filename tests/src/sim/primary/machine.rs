//! The simulated machine of a primary: its clock, its disks, and the memory that outlives a process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::clock::{Reading, TimeSource};
use twinfs_replicator::primary::sidefile::Capture;
use twinfs_replicator::site::State;
use twinfs_replicator::storage::{self, Power, SimStorage, Storage, StorageError};

use crate::sim::disk::Loss;

const CONTROL_FILE: &str = "state.json";
const MARK_FILE: &str = "stamp-mark";

/// Virtual time.
#[derive(Debug, Default)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn set(&self, now: u64) {
        self.0.store(now, Ordering::Relaxed);
    }
}

impl TimeSource for Clock {
    fn read(&self) -> Reading {
        let now = self.0.load(Ordering::Relaxed);
        Reading { boot: now, real: now }
    }
}

pub(crate) struct Machine {
    pub(crate) power: Power,
    pub(crate) clock: Arc<Clock>,
    pub(crate) activity: SimStorage,
    control: SimStorage,
    /// The sidefile, as the last process left it: kept at the instant of its death.
    sidefile: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Machine {
    pub(crate) fn new(seed: u64) -> Self {
        let power = Power::default();
        let disk = |number| SimStorage::new(seed ^ number).powered_by(&power);
        Self {
            clock: Arc::default(),
            activity: disk(1),
            control: disk(2),
            sidefile: Arc::default(),
            power: power.clone(),
        }
    }

    /// The machine as it comes back.
    pub(crate) fn again(&self, loss: Loss) -> Self {
        let power = Power::default();
        let disk = |disk: &SimStorage, number: u64| match loss {
            Loss::Process => disk.restart(),
            Loss::Power(seed @ 0..=1) => disk.crash(seed),
            Loss::Power(seed) => disk.crash(seed.wrapping_add(number).max(2)),
        };
        let sidefile = self.sidefile().filter(|_| loss == Loss::Process);
        Self {
            clock: Arc::clone(&self.clock),
            activity: disk(&self.activity, 1).powered_by(&power),
            control: disk(&self.control, 2).powered_by(&power),
            sidefile: Arc::new(Mutex::new(sidefile)),
            power,
        }
    }

    /// The sidefile of this boot, if there is one.
    pub(crate) fn sidefile(&self) -> Option<Vec<u8>> {
        self.sidefile.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on the sidefile is what `capture` has in it at the instant of its death.
    pub(crate) fn keep(&self, capture: &Arc<Capture>) {
        let (capture, sidefile) = (Arc::clone(capture), Arc::clone(&self.sidefile));
        self.power.on_cut(Box::new(move || {
            *sidefile.lock().unwrap_or_else(PoisonError::into_inner) = Some(capture.image());
        }));
    }

    pub(crate) fn state(&self) -> Result<Option<State>, StorageError> {
        self.control.sync_dir()?;
        let text = self.control.bytes(CONTROL_FILE);
        Ok(text.map(|text| State::decode(&text).expect("the control file is replaced as a whole")))
    }

    pub(crate) fn save_state(&self, state: &State) -> Result<(), StorageError> {
        storage::replace_durably(&self.control, CONTROL_FILE, &state.encode().expect("a state is JSON"))
    }

    pub(crate) fn stamp_mark(&self) -> Result<Timestamp, StorageError> {
        self.control.sync_dir()?;
        let bytes = self.control.bytes(MARK_FILE).unwrap_or_default();
        let number = bytes.try_into().map_or(0, u64::from_le_bytes);
        Ok(Timestamp(number))
    }

    pub(crate) fn save_stamp_mark(&self, mark: Timestamp) -> Result<(), StorageError> {
        storage::replace_durably(&self.control, MARK_FILE, &mark.0.to_le_bytes())
    }
}
