//! Operations of which only the intent is left: what they did is found out, and published.
//!
//! `TWINFS_SEED=7 cargo test -p twinfs --test recovery` runs one seed only, `TWINFS_SEEDS=500` runs more.
#![allow(clippy::unwrap_used, reason = "tests may")]

mod copying;
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use copying::actor::{Actor, plant};
use copying::replay::{replayed, walked};
use support::{Tape, VOLUME, mirror_of};
use twinfs::copier::{Copier, CopyRoom, Room};
use twinfs::recorder::{Pending, Recorder};
use twinfs_core::id::{SessionId, VolumeIndex};
use twinfs_core::model::Random;
use twinfs_core::stamp::{Stamp, Timestamp};
use twinfs_core::update::{AttrList, Intent, Note, Op};
use twinfs_replicator::primary::sidefile::{
    Capture, Refused, Reservation, Start, StartVolume, Wanted, bytes_min,
};

const START: Start<'_> = Start {
    session: SessionId::from_bytes([1; 16]),
    volumes: &[StartVolume::NEW],
    floor: Timestamp::ZERO,
    limit: Timestamp(u64::MAX),
};

/// Publishes on a tape; the intents stand in a sidefile. Of some operations, nothing is published after their calls.
struct Forgetful {
    tape: Tape,
    capture: Capture,
    /// Updates that are still published before one is forgotten.
    left: AtomicU64,
}

struct Both<'a> {
    published: Box<dyn Pending + 'a>,
    reservation: Reservation<'a>,
    left: &'a AtomicU64,
}

impl Recorder for Forgetful {
    fn reserve<'a>(
        &'a self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Box<dyn Pending + 'a>, Refused> {
        let published = self.tape.reserve(volume, intent, meta_bytes, data_bytes)?;
        let reservation = self.capture.reserve(volume, intent, meta_bytes, data_bytes)?;
        Ok(Box::new(Both { published, reservation, left: &self.left }))
    }

    fn reserve_all<'a>(
        &'a self,
        volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn Pending + 'a>>, Refused> {
        let published = self.tape.reserve_all(volume, wanted)?;
        let reservations = self.capture.reserve_all(volume, wanted)?;
        let both = published.into_iter().zip(reservations);
        Ok(both
            .map(|(published, reservation)| Box::new(Both { published, reservation, left: &self.left }) as _)
            .collect())
    }
}

impl Pending for Both<'_> {
    fn note(&self, note: Note) {
        self.reservation.note(note);
    }

    fn publish(self: Box<Self>, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        let Self { published, reservation, left } = *self;
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return published.publish(op, attrs, data);
        }
        std::mem::forget(reservation);
        None
    }
}

struct Always;

impl CopyRoom for Always {
    fn wait(&self, _timeout: std::time::Duration) -> Room {
        Room::Free
    }
}

fn run(seed: u64, dir: &Path, sidefile: &Path) {
    let mut random = Random::new(seed);
    plant(dir, &mut random);
    let recorder = Arc::new(Forgetful {
        tape: Tape::default(),
        capture: Capture::create(sidefile, bytes_min(), &START).unwrap(),
        left: AtomicU64::new(u64::MAX),
    });
    let mirror = mirror_of(dir, recorder.clone());
    let state = Copier::prepare(&mirror, VOLUME, None).unwrap();
    let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
    while !copier.has_ended() {
        std::thread::yield_now();
    }
    assert!(copier.stop().is_none());
    let mut actor = Actor::new(mirror.clone(), random.next_u64(), u64::MAX);
    for round in 1..=40 {
        // From somewhere within an operation on, nothing is published: as if the process was killed there. Operations that
        // were under way beside it had not come to their calls.
        recorder.left.store(random.below(8), Ordering::Relaxed);
        let file = mirror.root_of(VOLUME).unwrap();
        let beside =
            recorder.capture.reserve(VOLUME, &Intent::Names { first: (file, b"x"), second: None }, 99, 0);
        std::mem::forget(beside);
        while recorder.left.load(Ordering::Relaxed) > 0 {
            actor.act();
        }
        actor.act();
        recorder.left.store(u64::MAX, Ordering::Relaxed);
        let (_, survivors) = Capture::open(sidefile, &START).unwrap();
        for left in &survivors.intents {
            mirror.recover(left).unwrap();
            // Killed again in the middle of it.
            if random.one_in(3) {
                mirror.recover(left).unwrap();
            }
        }
        recorder.capture.settle_left();
        if round % 8 != 0 {
            continue;
        }
        let mut records = recorder.tape.take();
        let (there, here) = (walked(dir), replayed(file, &records));
        let difference = there.difference(&here);
        assert!(
            difference.is_empty(),
            "TWINFS_SEED={seed}, round {round}: - the directory, + the replica\n{difference}\n{:?}\n{:?}",
            survivors.intents,
            records.split_off(records.len().saturating_sub(4))
        );
        recorder.tape.put_back(records);
    }
}

#[test]
fn what_was_under_way_is_found_out() {
    let number = |key| std::env::var(key).ok().map(|text: String| text.parse().unwrap());
    let seeds = match number("TWINFS_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("TWINFS_SEEDS").unwrap_or(6)).collect(),
    };
    for seed in seeds {
        let (dir, sidefile) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run(seed, dir.path(), &sidefile.path().join("sidefile"));
    }
}
