//! Either daemon is killed, at every fail point and at random instants, while programs write. Afterwards the replica shows
//! exactly one committed group, nothing that a program was told is missing at the primary, mirroring goes on by itself,
//! and in the end both sites are equal in full.
//!
//! `TWINFS_ROUNDS` sets how many random instants there are, `TWINFS_FAIL_POINTS=NAME,…` selects fail points.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::{Duration, Instant};

use twinfs_replicator::failpoint::{FailPoint, Side};
use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::ops::Rng;
use twinfs_tests::pair::Pair;
use twinfs_tests::process::wait_for;
use twinfs_tests::scene::{Scene, setup, site};
use twinfs_tests::seed;

/// Points that only a pair that meets for the first time passes.
fn is_first(point: FailPoint) -> bool {
    matches!(point, FailPoint::Adopted | FailPoint::CopierObject | FailPoint::CopierComplete)
}

fn wanted(point: FailPoint) -> bool {
    let selected = std::env::var("TWINFS_FAIL_POINTS").ok();
    selected.is_none_or(|names| names.split(',').any(|name| name == point.name()))
}

/// How often a point is passed before the daemon dies there: no more often than it is surely passed soon.
fn passages(point: FailPoint, rng: &mut Rng) -> u64 {
    match point {
        FailPoint::StateSaved | FailPoint::SegmentWritten | FailPoint::SegmentNamed | FailPoint::Replayed => {
            1
        }
        FailPoint::FileWritten
        | FailPoint::Trimming
        | FailPoint::Trimmed
        | FailPoint::CheckpointSynced
        | FailPoint::CheckpointPrepared
        | FailPoint::CheckpointStarted
        | FailPoint::CheckpointContents
        | FailPoint::CheckpointDetached
        | FailPoint::CheckpointAttributes
        | FailPoint::CheckpointEmptied
        | FailPoint::CheckpointUnsynced
        | FailPoint::CheckpointWritten
        | FailPoint::CheckpointDone => 1 + rng.below(3),
        _ => 1 + rng.below(30),
    }
}

/// Every fail point is passed, and a daemon that dies there comes back.
#[test]
fn killed_at_every_fail_point() {
    for run in seed::runs("crash", "killed_at_every_fail_point", &[1], 1) {
        let _announced = run.announce();
        let mut scene = Scene::start(setup(), run.seed, true);
        let points = FailPoint::ALL.iter().filter(|point| wanted(**point) && !is_first(**point));
        for &point in (0..run.rounds).flat_map(|_| points.clone()) {
            let passages = passages(point, &mut scene.rng);
            let start = Instant::now();
            scene.work();
            let linger = scene.rng.pick(&[0, 200]);
            scene.kill(point.side(), Some((point, passages, linger)));
            scene.recover(point.side());
            scene.converge();
            println!("{}:{passages}:{linger}, {:.1} s", point.name(), start.elapsed().as_secs_f64());
        }
        scene.end();
    }
}

/// The same for the points that are passed when two sites meet.
#[test]
fn killed_when_they_meet() {
    for &point in FailPoint::ALL.iter().filter(|point| wanted(**point) && is_first(**point)) {
        let mut pair = Pair::new(setup());
        for volume in ["tree", "one", "two"] {
            fixture::fill(&pair.source(volume), Amounts { files: 100, bytes: 20_000 }, 1);
        }
        pair.fail_at(Some((site(point.side()), point.name().into())));
        pair.spawn("chi");
        pair.spawn("nyc");
        pair.wait_killed(site(point.side()));
        pair.fail_at(None);
        match point.side() {
            Side::Primary => pair.start_primary(),
            Side::Replica => pair.start_replica(),
        }
        wait_for("both daemons to answer", || {
            (pair.try_status("nyc").is_some() && pair.try_status("chi").is_some()).then_some(())
        });
        pair.wait_duplex();
        pair.assert_converged();
        pair.assert_plain_trees();
        println!("{}", point.name());
    }
}

/// Either daemon dies at any instant, one after the other, or both.
#[test]
fn killed_at_random_instants() {
    for run in seed::runs("crash", "killed_at_random_instants", &[2], 20) {
        let _announced = run.announce();
        let mut scene = Scene::start(setup(), run.seed, true);
        for round in 0..run.rounds {
            let start = Instant::now();
            scene.work();
            let both = scene.rng.below(4) == 0;
            let side = if round % 2 == 1 { Side::Primary } else { Side::Replica };
            scene.kill(side, None);
            if side == Side::Replica {
                scene.recover(side);
                // Once more, while it catches up.
                std::thread::sleep(Duration::from_millis(scene.rng.below(150)));
                scene.kill(side, None);
            }
            if both {
                scene.kill(if side == Side::Primary { Side::Replica } else { Side::Primary }, None);
                scene.pair.start_replica();
                scene.recover(Side::Primary);
            } else {
                scene.recover(side);
            }
            scene.converge();
            println!("round {round}: {side:?}, both {both}, {:.1} s", start.elapsed().as_secs_f64());
        }
        scene.end();
    }
}
