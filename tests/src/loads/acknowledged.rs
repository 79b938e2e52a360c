//! A ledger, outside the mount, of what a program was told is safe.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What was promised at the instant of a simulated power cut may have been promised in error: the ioctl that stops the
/// file system does not wait for calls under way, and some of these return success. So says a run without twinfs, too.
pub const CUT_RACE: Duration = Duration::from_millis(100);

/// Numbers that rise by one, each with the instant at which it was acknowledged.
#[derive(Debug, Clone, Default)]
pub struct Acknowledged(Arc<Mutex<Ledger>>);

#[derive(Debug, Default)]
struct Ledger {
    last: u64,
    recent: VecDeque<(Instant, u64)>,
    /// After a power cut, what must be there all the same.
    floor: Option<u64>,
}

impl Acknowledged {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a number.
    pub fn note(&self, number: u64) {
        let (mut ledger, now) = (self.lock(), Instant::now());
        ledger.last = number;
        ledger.recent.push_back((now, number));
        // All that is undecided, and one that is not.
        while ledger.recent.get(1).is_some_and(|(at, _)| now - *at > CUT_RACE) {
            ledger.recent.pop_front();
        }
    }

    /// The last number.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.lock().last
    }

    /// The power was cut at `at`: what was acknowledged just before is undecided.
    pub fn power_cut(&self, at: Instant) {
        let mut ledger = self.lock();
        let safe = ledger.recent.iter().filter(|(then, _)| at.saturating_duration_since(*then) > CUT_RACE);
        let floor = safe.map(|(_, number)| *number).max().unwrap_or(0);
        // A second cut, before anything was found again, takes nothing back that was safe at the first.
        ledger.floor = Some(ledger.floor.map_or(floor, |known| known.min(floor).max(known)));
    }

    /// After a crash: goes on from `found`, the last number that is there.
    ///
    /// # Panics
    /// If it lacks something that was acknowledged, or has more than the one number that was under way.
    pub fn found(&self, found: u64, what: &str) {
        let mut ledger = self.lock();
        let floor = ledger.floor.take().unwrap_or(ledger.last);
        assert!(
            found >= floor && found <= ledger.last + 1,
            "{what}: {found} is the last that is there; {floor} was safe, {} the last acknowledged",
            ledger.last
        );
        ledger.last = found;
        ledger.recent.clear();
        ledger.recent.push_back((Instant::now(), found));
    }
}
