//! The power of a simulated machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The power of a simulated machine. What shares it – its disks – counts its changes together and goes off together.
#[derive(Debug, Clone, Default)]
pub struct Power {
    state: Arc<Mutex<PowerState>>,
}

#[derive(Debug, Default)]
struct PowerState {
    /// Operations that change something, so far.
    changes: u64,
    /// The change in the middle of which the power goes.
    cut_at: Option<u64>,
    off: bool,
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
            return Pulse::Cut;
        }
        Pulse::On
    }

    fn lock(&self) -> MutexGuard<'_, PowerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
