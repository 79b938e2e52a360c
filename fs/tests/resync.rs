//! Resyncs, while programs change the tree: a replica that lost a part of the updates, and is sent what a change map names,
//! has the same tree again.
//!
//! `TWINFS_SEED=7 cargo test -p twinfs --test resync` runs one seed only, `TWINFS_SEEDS=500` runs more.
#![allow(clippy::unwrap_used, reason = "tests may")]

mod copying;
mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use copying::actor::{Actor, plant};
use copying::replay::{Record, replayed, walked};
use support::{Tape, VOLUME, mirror_of};
use twinfs::copier::{Copier, CopyRoom, Room};
use twinfs::mirror::{Caller, Mirror, NewNode, SetAttr};
use twinfs_core::change_map::ChangeMap;
use twinfs_core::model::Random;
use twinfs_core::update::{Op, OpKind};

fn seeds(default: u64) -> Vec<u64> {
    let number = |key| std::env::var(key).ok().map(|text: String| text.parse().unwrap());
    match number("TWINFS_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("TWINFS_SEEDS").unwrap_or(default)).collect(),
    }
}

fn wait(copier: &Copier) {
    let begin = Instant::now();
    while !copier.has_ended() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the resync does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn compare(seed: u64, source: &Path, mirror: &Mirror, records: &[Record]) {
    let (there, here) = (walked(source), replayed(mirror.root_of(VOLUME).unwrap(), records));
    let difference = there.difference(&here);
    assert!(difference.is_empty(), "TWINFS_SEED={seed}: - the directory, + the replica\n{difference}");
}

/// Room as the tests want it: whenever the resync asks, programs act, on the same thread. So a seed says all.
struct Between {
    actor: Mutex<Actor>,
    /// Questions left until updates are not kept any more.
    left: AtomicU64,
}

impl CopyRoom for Between {
    fn wait(&self, _timeout: Duration) -> Room {
        let mut actor = self.actor.lock().unwrap();
        for _ in 0..actor.random.below(3) {
            actor.act();
        }
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Room::Closed;
        }
        if actor.random.one_in(10) { Room::Full } else { Room::Free }
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

/// A copy that nothing disturbs.
fn copied(mirror: &Arc<Mirror>) {
    let state = Copier::prepare(mirror, VOLUME, None).unwrap();
    let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
    wait(&copier);
    assert!(copier.stop().is_none());
}

#[test]
fn resyncs_that_are_interrupted_again_and_again_end_with_the_same_tree() {
    let mut interrupted = 0;
    for seed in seeds(12) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        plant(dir.path(), &mut random);
        let tape = Arc::new(Tape::default());
        let mirror = mirror_of(dir.path(), tape.clone());
        copied(&mirror);
        let mut records = tape.take();
        let actor = Mutex::new(Actor::new(mirror.clone(), random.next_u64(), 0));
        let room = Arc::new(Between { actor, left: AtomicU64::new(0) });
        for _outage in 0..2 {
            let mut left = ChangeMap::default();
            loop {
                tape.suspend();
                let budget = random.below(120);
                {
                    let mut actor = room.actor.lock().unwrap();
                    actor.budget = budget;
                    (0..budget).for_each(|_| actor.act());
                    actor.budget = 100;
                }
                let mut map = tape.resume(left);
                if random.one_in(4) {
                    map.keep_bound(map.bytes() / 3);
                }
                let state = Copier::prepare_resync(&mirror, VOLUME, map).unwrap();
                let questions = if random.one_in(2) { u64::MAX } else { random.below(150) };
                room.left.store(questions, Ordering::Relaxed);
                let copier = Copier::start(mirror.clone(), room.clone(), state).unwrap();
                wait(&copier);
                let complete = copier.is_complete();
                if !complete {
                    tape.suspend();
                }
                left = copier.leave();
                records.extend(tape.take());
                if complete {
                    assert!(left.is_empty());
                    break;
                }
                interrupted += 1;
            }
            assert_eq!(records.last().unwrap().1.op, Op::Complete);
            compare(seed, dir.path(), &mirror, &records);
            let mut actor = room.actor.lock().unwrap();
            actor.budget = 60;
            (0..60).for_each(|_| actor.act());
            records.extend(tape.take());
            compare(seed, dir.path(), &mirror, &records);
        }
    }
    assert!(interrupted > 0 || seeds(12).len() == 1, "no resync was interrupted");
}

#[test]
fn content_that_is_moved_under_a_resync_arrives() {
    for seed in seeds(40) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            for piece in 0..25 {
                let len = 1 + random.below(9000) as usize;
                let data = random.bytes(len);
                std::os::unix::fs::FileExt::write_all_at(&file, &data, piece * 20_480).unwrap();
            }
        }
        let tape = Arc::new(Tape::default());
        let mirror = mirror_of(dir.path(), tape.clone());
        copied(&mirror);
        let mut actor = Actor::new(mirror.clone(), random.next_u64(), 40);
        actor.content_only = true;
        tape.suspend();
        (0..40).for_each(|_| actor.act());
        actor.budget = 60;
        let map = tape.resume(ChangeMap::default());
        let room = Between { actor: Mutex::new(actor), left: AtomicU64::new(u64::MAX) };
        let state = Copier::prepare_resync(&mirror, VOLUME, map).unwrap();
        let copier = Copier::start(mirror.clone(), Arc::new(room), state).unwrap();
        wait(&copier);
        assert!(copier.is_complete() && copier.leave().is_empty());
        compare(seed, dir.path(), &mirror, &tape.take());
    }
}

#[test]
fn a_resync_beside_busy_threads_ends_with_the_same_tree() {
    for seed in seeds(5) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir().unwrap();
        plant(dir.path(), &mut random);
        let tape = Arc::new(Tape::default());
        let mirror = mirror_of(dir.path(), tape.clone());
        copied(&mirror);
        tape.suspend();
        let mut actor = Actor::new(mirror.clone(), random.next_u64(), 300);
        (0..300).for_each(|_| actor.act());
        let state = Copier::prepare_resync(&mirror, VOLUME, tape.resume(ChangeMap::default())).unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
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
            wait(&copier);
            assert!(copier.is_complete());
            ended.store(true, Ordering::Release);
        });
        compare(seed, dir.path(), &mirror, &tape.take());
    }
}

fn count(records: &[Record], kind: OpKind) -> usize {
    records.iter().filter(|(_, update, _)| update.op.kind() == kind).count()
}

#[test]
fn a_resync_sends_what_changed_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("large"), vec![7; 8 << 20]).unwrap();
    for number in 0..50 {
        std::fs::write(dir.path().join(format!("untouched{number}")), "content").unwrap();
    }
    let tape = Arc::new(Tape::default());
    let mirror = mirror_of(dir.path(), tape.clone());
    copied(&mirror);
    let mut records = tape.take();

    tape.suspend();
    let large = mirror.lookup(1, b"large").unwrap().unwrap().nodeid;
    let fh = mirror.open(large, libc::O_RDWR).unwrap();
    for block in [3, 4, 700, 1999_u64] {
        mirror.write(large, fh, block * 4096 + 100, b"changed", false, false).unwrap();
    }
    mirror.make(Caller::ROOT, 1, b"came and went", 0, NewNode::Dir { mode: 0o755 }).unwrap();
    mirror.remove(1, b"came and went", true).unwrap();
    mirror.rename(1, b"untouched1", 1, b"renamed", 0).unwrap();
    mirror.remove(1, b"untouched2", false).unwrap();
    let map = tape.resume(ChangeMap::default());
    assert_eq!(map.objects().len(), 4, "the root, the large file, the renamed and the removed one");
    let state = Copier::prepare_resync(&mirror, VOLUME, map).unwrap();
    let small = SetAttr { size: Some(0), ..SetAttr::default() };
    let other = mirror.lookup(1, b"untouched3").unwrap().unwrap().nodeid;
    mirror.setattr(Caller::ROOT, other, &small, None).unwrap();
    mirror.write(large, fh, 5 * 4096, b"not read yet", false, false).unwrap();
    let live = tape.take();
    assert_eq!(
        live.iter().map(|live| live.1.op.kind()).collect::<Vec<_>>(),
        [OpKind::Resync, OpKind::Truncate]
    );
    records.extend(live);
    let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
    wait(&copier);
    assert!(copier.is_complete());
    let sent = tape.take();
    let data: usize = sent.iter().map(|(_, _, data)| data.len()).sum();
    assert_eq!(data, 5 * 4096, "granules that changed, with the one that came in meanwhile");
    assert_eq!(count(&sent, OpKind::Object), 0);
    assert_eq!(count(&sent, OpKind::Bind), 1);
    assert_eq!(count(&sent, OpKind::Unbind), 2);
    records.extend(sent);
    compare(0, dir.path(), &mirror, &records);
}

#[test]
fn everything_is_read_again_if_the_map_says_so() {
    let dir = tempfile::tempdir().unwrap();
    plant(dir.path(), &mut Random::new(5));
    let tape = Arc::new(Tape::default());
    let mirror = mirror_of(dir.path(), tape.clone());
    copied(&mirror);
    let mut actor = Actor::new(mirror.clone(), 5, 200);
    tape.suspend();
    (0..200).for_each(|_| actor.act());
    let mut map = tape.resume(ChangeMap::default());
    map.note_everything();
    let state = Copier::prepare_resync(&mirror, VOLUME, map).unwrap();
    assert!(
        Copier::start(mirror.clone(), Arc::new(Always), state.clone()).unwrap().leave().is_everything()
            || state.is_complete()
    );
    let mut map = ChangeMap::default();
    map.note_everything();
    let state = Copier::prepare_resync(&mirror, VOLUME, tape.resume(map)).unwrap();
    let copier = Copier::start(mirror.clone(), Arc::new(Always), state).unwrap();
    wait(&copier);
    assert!(copier.is_complete() && copier.leave().is_empty());
    compare(5, dir.path(), &mirror, &tape.take());
}
