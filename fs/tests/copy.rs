//! The initial copy, while programs change the tree: an empty replica that replays all records has the same tree.
//!
//! `TWINFS_SEED=7 cargo test -p twinfs --test copy` runs one seed only, `TWINFS_SEEDS=500` runs more.
#![allow(clippy::unwrap_used, reason = "tests may")]

mod copying;
mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use copying::actor::{Actor, plant};
use copying::replay::{Record, replayed, walked};
use support::{Tape, VOLUME, mirror_of};
use twinfs::copier::{BadCopyState, Copier, CopyRoom, Room};
use twinfs::mirror::{Caller, Mirror};
use twinfs_core::id::VolumeIndex;
use twinfs_core::model::Random;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{AttrList, Intent, Note, Op, OpKind};
use twinfs_replicator::primary::sidefile::{Refused, Wanted};

fn seeds(default: u64) -> Vec<u64> {
    let number = |key| std::env::var(key).ok().map(|text: String| text.parse().unwrap());
    match number("TWINFS_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("TWINFS_SEEDS").unwrap_or(default)).collect(),
    }
}

/// Waits until the thread of a copy has ended by itself.
fn wait(copier: &Copier) {
    let begin = Instant::now();
    while !copier.has_ended() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the copy does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn compare(seed: u64, source: &Path, mirror: &Mirror, records: &[Record]) {
    let (there, here) = (walked(source), replayed(mirror.root_of(VOLUME).unwrap(), records));
    let difference = there.difference(&here);
    assert!(difference.is_empty(), "TWINFS_SEED={seed}: - the directory, + the replica\n{difference}");
}

/// Room as the tests want it: whenever the copy asks, programs act, on the same thread. So a seed says all.
struct Between {
    actor: Mutex<Actor>,
    /// Questions left until updates are not kept any more.
    left: AtomicU64,
}

impl CopyRoom for Between {
    fn wait(&self, _timeout: Duration) -> Room {
        let mut actor = self.actor.lock().unwrap();
        for _ in 0..actor.random.below(4) {
            actor.act();
        }
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Room::Closed;
        }
        if actor.random.one_in(10) { Room::Full } else { Room::Free }
    }
}

#[test]
fn a_copy_that_is_interrupted_again_and_again_ends_with_the_same_tree() {
    let mut resumed = 0;
    for seed in seeds(20) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        plant(dir.path(), &mut random);
        let tape = Arc::new(Tape::default());
        let mirror = mirror_of(dir.path(), tape.clone());
        let actor = Mutex::new(Actor::new(mirror.clone(), random.next_u64(), 300));
        let mut room = Arc::new(Between { actor, left: AtomicU64::new(0) });
        let (mut mirror, mut saved): (_, Option<Vec<u8>>) = (mirror, None);
        loop {
            let state = Copier::prepare(&mirror, VOLUME, saved.as_deref()).unwrap();
            let left = if random.one_in(3) { u64::MAX } else { random.below(250) };
            room.left.store(left, Ordering::Relaxed);
            let copier = Copier::start(mirror.clone(), room.clone(), state).unwrap();
            wait(&copier);
            let (complete, progress) = (copier.is_complete(), copier.progress());
            saved = copier.stop();
            assert_eq!(saved.is_none(), complete);
            if complete {
                assert_eq!(progress.files_copied, progress.files_total);
                assert_eq!(progress.bytes_copied, progress.bytes_total);
                break;
            }
            resumed += 1;
            mirror = mirror_of(dir.path(), tape.clone());
            Arc::get_mut(&mut room).unwrap().actor.get_mut().unwrap().move_to(mirror.clone());
        }
        let mut records = tape.take();
        assert_eq!(records.last().unwrap().1.op, Op::Complete);
        compare(seed, dir.path(), &mirror, &records);
        let mut actor = room.actor.lock().unwrap();
        actor.budget = 100;
        (0..100).for_each(|_| actor.act());
        records.extend(tape.take());
        compare(seed, dir.path(), &mirror, &records);
        assert_eq!(records.iter().filter(|record| record.1.op == Op::Complete).count(), 1);
    }
    assert!(resumed > 0 || seeds(20).len() == 1, "no copy was interrupted");
}

#[test]
fn content_that_is_changed_on_both_sides_of_the_cursor_arrives() {
    for seed in seeds(60) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            // Each piece between two holes is copied by itself.
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            for piece in 0..25 {
                let len = 1 + random.below(9000) as usize;
                let data = random.bytes(len);
                file.write_all_at(&data, piece * 20_480).unwrap();
            }
        }
        let tape = Arc::new(Tape::default());
        let mirror = mirror_of(dir.path(), tape.clone());
        let mut actor = Actor::new(mirror.clone(), random.next_u64(), 60);
        actor.content_only = true;
        let room = Between { actor: Mutex::new(actor), left: AtomicU64::new(u64::MAX) };
        let state = Copier::prepare(&mirror, VOLUME, None).unwrap();
        let copier = Copier::start(mirror.clone(), Arc::new(room), state).unwrap();
        wait(&copier);
        assert!(copier.stop().is_none());
        compare(seed, dir.path(), &mirror, &tape.take());
    }
}

/// Always room.
struct Always;

impl CopyRoom for Always {
    fn wait(&self, _timeout: Duration) -> Room {
        std::thread::yield_now();
        Room::Free
    }
}

#[test]
fn a_copy_beside_busy_threads_ends_with_the_same_tree() {
    for seed in seeds(10) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        plant(dir.path(), &mut random);
        let tape = Arc::new(Tape::default());
        let mut mirror = mirror_of(dir.path(), tape.clone());
        let mut saved: Option<Vec<u8>> = None;
        loop {
            let state = Copier::prepare(&mirror, VOLUME, saved.as_deref()).unwrap();
            let ended = AtomicBool::new(false);
            let copier = std::thread::scope(|scope| {
                for _ in 0..3 {
                    let mut actor = Actor::new(mirror.clone(), random.next_u64(), 1000);
                    let ended = &ended;
                    scope.spawn(move || {
                        while !ended.load(Ordering::Acquire) && actor.budget > 0 {
                            actor.act();
                        }
                    });
                }
                let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
                if random.one_in(3) {
                    std::thread::sleep(Duration::from_micros(random.below(30_000)));
                } else {
                    wait(&copier);
                }
                ended.store(true, Ordering::Release);
                copier
            });
            saved = copier.stop();
            if saved.is_none() {
                break;
            }
            mirror = mirror_of(dir.path(), tape.clone());
        }
        compare(seed, dir.path(), &mirror, &tape.take());
    }
}

#[test]
fn what_the_copy_has_yet_to_read_is_not_recorded_twice() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "content").unwrap();
    std::fs::create_dir(dir.path().join("dir")).unwrap();
    let tape = Arc::new(Tape::default());
    let mirror = mirror_of(dir.path(), tape.clone());
    let state = Copier::prepare(&mirror, VOLUME, None).unwrap();
    let file = mirror.lookup(1, b"file").unwrap().unwrap().nodeid;
    let fh = mirror.open(file, libc::O_RDWR).unwrap();
    mirror.write(file, fh, 0, b"CON", false, false).unwrap();
    mirror.setxattr(Caller::ROOT, file, b"user.a", b"1", 0).unwrap();
    assert!(tape.take().is_empty(), "all that is read later");
    mirror.rename(1, b"dir", 1, b"moved", 0).unwrap();
    let kinds = |tape: &Tape| tape.take().iter().map(|(_, update, _)| update.op.kind()).collect::<Vec<_>>();
    assert_eq!(kinds(&tape), [OpKind::Rename], "names are always recorded");
    let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
    wait(&copier);
    assert_eq!(copier.progress().files_copied, 3);
    assert_eq!(copier.progress().bytes_copied, 7);
    assert!(copier.stop().is_none());
    let copied = kinds(&tape);
    assert_eq!(copied.last(), Some(&OpKind::Complete));
    assert_eq!(copied.iter().filter(|kind| **kind == OpKind::Object).count(), 3);
    assert_eq!(copied.iter().filter(|kind| **kind == OpKind::Write).count(), 1);
    mirror.write(file, fh, 0, b"CON", false, false).unwrap();
    assert_eq!(kinds(&tape), [OpKind::Write], "everything is recorded once the copy is complete");
}

/// Keeps nothing, like the sidefile of a suspended session.
struct Suspended;

impl twinfs::recorder::Recorder for Suspended {
    fn reserve<'a>(
        &'a self,
        _volume: VolumeIndex,
        _intent: &Intent<'_>,
        _meta_bytes: usize,
        _data_bytes: usize,
    ) -> Result<Box<dyn twinfs::recorder::Pending + 'a>, Refused> {
        Ok(Box::new(Self))
    }

    fn reserve_all<'a>(
        &'a self,
        _volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn twinfs::recorder::Pending + 'a>>, Refused> {
        Ok(wanted.iter().map(|_| Box::new(Self) as _).collect())
    }
}

impl twinfs::recorder::Pending for Suspended {
    fn note(&self, _note: Note) {}

    fn publish(self: Box<Self>, _op: Op<&[u8]>, _attrs: AttrList, _data: &[u8]) -> Option<Stamp> {
        None
    }
}

#[test]
fn a_copy_of_a_suspended_session_ends_incomplete() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = mirror_of(dir.path(), Arc::new(Suspended));
    let state = Copier::prepare(&mirror, VOLUME, None).unwrap();
    let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
    wait(&copier);
    assert!(!copier.is_complete());
    assert!(copier.stop().is_some());
}

#[test]
fn a_state_is_taken_for_its_own_volume_only() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tape = Arc::new(Tape::default());
    let (one, two) = (mirror_of(one.path(), tape.clone()), mirror_of(two.path(), tape));
    let saved = Copier::prepare(&one, VOLUME, None).unwrap().save().unwrap();
    assert!(Copier::prepare(&one, VOLUME, Some(&saved)).is_ok());
    assert_eq!(Copier::prepare(&two, VOLUME, Some(&saved)).unwrap_err(), BadCopyState::OtherVolume);
    assert_eq!(Copier::prepare(&two, VOLUME, Some(b"?")).unwrap_err(), BadCopyState::Damaged);
    assert_eq!(Copier::prepare(&two, VolumeIndex(1), None).unwrap_err(), BadCopyState::NoVolume);
}
