//! The session's clock: the source of timestamps.
//!
//! It advances by the boot clock and is slewed towards real time, never stepped: a wall clock that jumps, by a second or
//! a year, reorders nothing. A high-water mark, made durable ahead of use, keeps stamps rising over reboots.

use rustix::time::{ClockId, clock_gettime};
use twinfs_core::limits;
use twinfs_core::stamp::Timestamp;

/// Largest correction towards real time, in nanoseconds per second.
const SLEW_NS_PER_S_MAX: i64 = 100_000_000;
/// Below this difference to real time nothing is corrected, in nanoseconds.
const SLEW_DEAD_BAND_NS: i64 = 1_000_000;
/// How often the difference to real time is looked at, in nanoseconds.
const SLEW_PERIOD_NS: u64 = 1_000_000_000;

/// Readings of the two system clocks, in nanoseconds. A parameter, so that tests can make clocks jump.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// `CLOCK_BOOTTIME`: steady, runs on during suspend.
    pub boot: u64,
    /// `CLOCK_REALTIME`.
    pub real: u64,
}

impl Reading {
    /// Reads the system's clocks.
    #[must_use]
    pub fn now() -> Self {
        let ns = |clock| {
            let t = clock_gettime(clock);
            u64::try_from(t.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec).unwrap_or(0)
        };
        Self { boot: ns(ClockId::Boottime), real: ns(ClockId::Realtime) }
    }
}

/// Where readings of the clocks come from: the system, or a simulation.
pub trait TimeSource: std::fmt::Debug + Send + Sync {
    /// Reads the clocks.
    fn read(&self) -> Reading;
}

/// The system's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemTime;

impl TimeSource for SystemTime {
    fn read(&self) -> Reading {
        Reading::now()
    }
}

/// Produces strictly rising timestamps.
#[derive(Debug)]
pub struct StampClock {
    /// Boot time and session time of the last adjustment.
    anchor: Reading,
    /// Current correction, in nanoseconds per second of boot time.
    slew: i64,
    last: Timestamp,
    /// No timestamp reaches this before it was raised (durably, by the owner).
    limit: Timestamp,
}

impl StampClock {
    /// Starts the clock: no timestamp is at or below `floor` (the durable high-water mark of earlier runs), and none
    /// reaches `limit`.
    #[must_use]
    pub fn new(now: Reading, floor: Timestamp, limit: Timestamp) -> Self {
        let real = now.real.max(floor.0 + 1);
        Self { anchor: Reading { boot: now.boot, real }, slew: 0, last: floor, limit }
    }

    /// Raises the limit, after the new high-water mark was made durable.
    pub fn raise_limit(&mut self, limit: Timestamp) {
        self.limit = self.limit.max(limit);
    }

    /// The limit that timestamps stay below.
    #[must_use]
    pub fn limit(&self) -> Timestamp {
        self.limit
    }

    /// The timestamp for an update, above every one before and below the limit; `None` if the limit leaves none.
    pub fn stamp(&mut self, now: Reading) -> Option<Timestamp> {
        let before = self.last;
        let stamp = self.tick(now);
        (stamp > before).then_some(stamp)
    }

    /// The time now: above every timestamp given before, unless the limit leaves none; then it stands still.
    pub fn tick(&mut self, now: Reading) -> Timestamp {
        let estimate = self.estimate(now);
        if now.boot.saturating_sub(self.anchor.boot) >= SLEW_PERIOD_NS {
            self.anchor = Reading { boot: now.boot, real: estimate };
            let behind = i64::try_from(i128::from(now.real) - i128::from(estimate)).unwrap_or(i64::MAX);
            self.slew = if behind.abs() < SLEW_DEAD_BAND_NS {
                0
            } else {
                behind.clamp(-SLEW_NS_PER_S_MAX, SLEW_NS_PER_S_MAX)
            };
        }
        // Short of the limit time stands still, but for its last digits, until the mark is durable.
        let capped = estimate.min(self.limit.0.saturating_sub(limits::STAMP_CREEP_NS));
        let next = capped.max(self.last.0 + 1).min(self.limit.0.saturating_sub(1));
        self.last = self.last.max(Timestamp(next));
        self.last
    }

    /// How far time can go on before the limit holds it back, in nanoseconds.
    #[must_use]
    pub fn ahead_ns(&self) -> u64 {
        self.limit.0.saturating_sub(limits::STAMP_CREEP_NS).saturating_sub(self.last.0)
    }

    /// The last timestamp given.
    #[must_use]
    pub fn last(&self) -> Timestamp {
        self.last
    }

    fn estimate(&self, now: Reading) -> u64 {
        let elapsed = i128::from(now.boot.saturating_sub(self.anchor.boot));
        let slewed = elapsed + elapsed * i128::from(self.slew) / 1_000_000_000;
        self.anchor.real.saturating_add(u64::try_from(slewed).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;
    const FAR: Timestamp = Timestamp(u64::MAX);

    #[test]
    fn a_stepped_wall_clock_neither_reorders_nor_jumps() {
        let year = 365 * 86_400 * S;
        let mut clock = StampClock::new(Reading { boot: S, real: 2 * year }, Timestamp::ZERO, FAR);
        let mut last = clock.tick(Reading { boot: S, real: 2 * year });
        for (second, real) in [(2, 3 * year), (3, year), (4, year), (5, 2 * year)] {
            let next = clock.tick(Reading { boot: second * S, real });
            assert!(next > last);
            assert!(next.ns_since(last) <= S + S / 10 + 1, "no step");
            assert!(next.ns_since(last) >= S - S / 10 - 1, "no standstill");
            last = next;
        }
    }

    #[test]
    fn it_follows_real_time() {
        let mut clock = StampClock::new(Reading { boot: 0, real: 100 * S }, Timestamp::ZERO, FAR);
        for second in 1..60 {
            clock.tick(Reading { boot: second * S, real: 102 * S + second * S });
        }
        let error = clock.last().0.abs_diff(102 * S + 59 * S);
        assert!(error < S / 100, "off by {error} ns");
    }

    #[test]
    fn it_starts_above_the_mark_and_stays_below_the_limit() {
        let mut clock = StampClock::new(Reading { boot: 0, real: S }, Timestamp(50 * S), Timestamp(51 * S));
        assert!(clock.tick(Reading { boot: 1, real: S }) > Timestamp(50 * S));
        let late = clock.tick(Reading { boot: 20 * S, real: 21 * S });
        assert!(late < Timestamp(51 * S));
        assert_eq!(clock.ahead_ns(), 0);
        clock.raise_limit(FAR);
        assert!(clock.tick(Reading { boot: 21 * S, real: 22 * S }) > Timestamp(51 * S));
    }

    #[test]
    fn at_the_limit_there_is_no_stamp_and_never_one_beyond() {
        let limit = Timestamp(50 * S + 3);
        let mut clock = StampClock::new(Reading { boot: 0, real: S }, Timestamp(50 * S), limit);
        let late = Reading { boot: 20 * S, real: 21 * S };
        assert_eq!(clock.stamp(late), Some(Timestamp(50 * S + 1)));
        assert_eq!(clock.tick(late), Timestamp(50 * S + 2));
        for _ in 0..3 {
            assert_eq!(clock.stamp(late), None);
            assert_eq!(clock.tick(late), Timestamp(50 * S + 2));
        }
        clock.raise_limit(Timestamp(60 * S));
        assert!(clock.stamp(late).is_some_and(|stamp| stamp > limit && stamp < Timestamp(60 * S)));
    }
}
