//! The power of a simulated machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The power of a simulated machine. What shares it – its disks – counts its changes together and goes off together.
#[derive(Debug, Clone, Default)]
pub struct Power {
    state: Arc<Mutex<PowerState>>,
}

#[derive(Default)]
struct PowerState {
    /// Operations that change something, so far.
    changes: u64,
    /// The change in the middle of which the power goes.
    cut_at: Option<u64>,
    off: bool,
    on_cut: Option<OnCut>,
}

/// Called at the instant at which the power goes.
type OnCut = Box<dyn FnOnce() + Send>;

impl std::fmt::Debug for PowerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { changes, cut_at, off, on_cut: _ } = self;
        f.debug_struct("PowerState")
            .field("changes", changes)
            .field("cut_at", cut_at)
            .field("off", off)
            .finish_non_exhaustive()
    }
}

/// What becomes of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// It happens.
    On,
    /// The power goes in its middle: what it would have written may or may not be there afterwards.
    Cut,
    /// The power is off: nothing happens any more.
    Off,
}

impl Power {
    /// Cuts the power in the middle of change number `change` (1 is the first one ever): it and everything after it
    /// fails.
    pub fn cut_at(&self, change: u64) {
        self.lock().cut_at = Some(change);
    }

    /// Has something looked at, or kept, as it is at the instant at which the power goes: what runs on until it notices must
    /// not change it any more.
    pub fn on_cut(&self, look: Box<dyn FnOnce() + Send>) {
        self.lock().on_cut = Some(look);
    }

    /// How many operations that change something were tried so far.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Whether it was cut.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.lock().off
    }

    /// To be called by each operation that changes something, before it does.
    #[must_use]
    pub fn change(&self) -> Pulse {
        let mut state = self.lock();
        if state.off {
            return Pulse::Off;
        }
        state.changes += 1;
        if state.cut_at == Some(state.changes) {
            state.off = true;
            let look = state.on_cut.take();
            drop(state);
            if let Some(look) = look {
                look();
            }
            return Pulse::Cut;
        }
        Pulse::On
    }

    fn lock(&self) -> MutexGuard<'_, PowerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
