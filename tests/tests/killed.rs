//! The primary is killed in the middle of its work: its next start ships what was captured, without a resync.
#![allow(clippy::unwrap_used, reason = "tests may")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use twinfs_tests::ops::{Actor, Generator, Mix, Rng};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::relay::Link;
use twinfs_tests::seed;

const MIX: Mix = Mix { shifts: false, data_bytes_max: 200_000, single_calls: false, names: 8, depth: 3 };

/// Changes the tree below `root` until it is told to stop, or nothing answers any more.
fn work(root: &Path, mut actor: Actor, seed: u64, stop: &AtomicBool) {
    let mut generator = Generator::new(seed, MIX);
    while !stop.load(Ordering::Relaxed) {
        let operation = generator.next_operation(root);
        if actor.apply(&operation) == Err(rustix::io::Errno::NOTCONN) {
            return;
        }
    }
}

fn rounds(test: &'static str, setup: impl Fn() -> Setup, link: Option<Link>) {
    for run in seed::runs("killed", test, &[1], 8) {
        let _announced = run.announce();
        let mut random = Rng(run.seed);
        let mut pair = Pair::start(setup());
        if let Some(link) = link {
            pair.relay().set(link);
        }
        for round in 0..run.rounds {
            let stop = AtomicBool::new(false);
            let roots: Vec<_> = (0..3).map(|at| pair.mount("data").join(format!("worker{at}"))).collect();
            roots.iter().for_each(|root| drop(std::fs::create_dir(root)));
            std::thread::scope(|scope| {
                for root in &roots {
                    let (seed, stop) = (random.next_u64(), &stop);
                    // Before the kill, however long a thread takes to start.
                    let actor = Actor::new(root);
                    scope.spawn(move || work(root, actor, seed, stop));
                }
                std::thread::sleep(Duration::from_millis(random.below(400)));
                let mut killed = pair.primary.take().unwrap();
                killed.kill();
                stop.store(true, Ordering::Relaxed);
            });
            pair.start_primary();
            pair.wait_duplex();
            std::fs::write(pair.mount("data").join("after"), round.to_string()).unwrap();
            if random.below(2) == 0 {
                pair.assert_converged();
            }
        }
        pair.assert_converged();
        pair.assert_plain_trees();
    }
}

#[test]
fn a_killed_primary_goes_on() {
    rounds("a_killed_primary_goes_on", Setup::default, None);
}

/// Sets arrive out of order, so the replica has some beyond a gap when the primary is killed.
#[test]
fn a_primary_that_is_killed_with_gaps_at_the_replica_goes_on() {
    let setup =
        || Setup { env: vec![("TWINFS_TEST_SHUFFLE_SETS", "7".to_owned())], relay: true, ..Setup::default() };
    let link = Link { delay: Duration::from_millis(10), loss_permille: 5, ..Link::default() };
    rounds("a_primary_that_is_killed_with_gaps_at_the_replica_goes_on", setup, Some(link));
}
