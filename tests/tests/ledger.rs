//! The ledger test: the tree is hashed after every operation; every group that the replica shows equals exactly one entry,
//! in rising order.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use twinfs_tests::ledger::{Ledger, MIX, within_a_page};
use twinfs_tests::ops::{Actor, Generator, Rng};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::relay::Link;
use twinfs_tests::seed;
use twinfs_tests::tree::{self, Compare, Listing};

/// Performs the operations; a counter is written before each, so that no two states are equal.
fn write(pair: &Pair, seed: u64, rounds: u64, pause: Duration) -> Ledger {
    let (mount, source) = (pair.mount("data"), pair.source("data"));
    let counter = File::options().write(true).open(mount.join("counter")).unwrap();
    let mut generator = Generator::new(seed, MIX);
    let mut actor = Actor::new(&mount.join("tree"));
    let mut random = Rng(seed);
    let mut ledger = Ledger::default();
    ledger.enter(&source, || "the beginning".into());
    for round in 0..rounds {
        counter.write_all_at(&round.to_le_bytes(), 0).unwrap();
        ledger.enter(&source, || format!("counter {round}"));
        let mut operation = generator.next_operation(&source.join("tree"));
        within_a_page(&mut operation, &source.join("tree"));
        let result = actor.apply(&operation);
        ledger.enter(&source, || {
            let mut text = format!("{operation:?} -> {result:?}");
            text.truncate((0..=200).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
            text
        });
        // Now and then the reader gets a chance to read a whole tree within one group.
        if random.below(12) == 0 {
            std::thread::sleep(pause);
        }
    }
    ledger
}

/// Every group that was read whole, with its tree.
fn read(pair: &Pair, stop: &AtomicBool) -> BTreeMap<u64, (String, Listing)> {
    let sampler = pair.sampler();
    let mut seen = BTreeMap::new();
    let mut last_round = false;
    while !last_round {
        last_round = stop.load(Ordering::Acquire);
        if seen.contains_key(&sampler.group()) {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        let sample = sampler.sample(|| tree::try_listing(&pair.view("data"), Compare::ALL));
        if let Some((group, listing)) = sample {
            // Within one group nothing may fail.
            let listing = listing.unwrap_or_else(|error| panic!("group {group} cannot be read: {error}"));
            seen.insert(group, (tree::hash(&listing), listing));
        }
    }
    seen
}

fn every_group_is_in_the_ledger(test: &'static str, link: Option<Link>, pause: Duration, groups_min: usize) {
    for run in seed::runs("ledger", test, &[1], 3000) {
        let _announced = run.announce();
        let pair = Pair::start(Setup { relay: link.is_some(), ..Setup::default() });
        std::fs::create_dir(pair.mount("data").join("tree")).unwrap();
        std::fs::write(pair.mount("data").join("counter"), [0xff; 8]).unwrap();
        pair.wait_caught_up();
        if let Some(link) = link {
            pair.relay().set(link);
        }
        let stop = AtomicBool::new(false);
        let failed = Mutex::new(None);
        let (ledger, seen) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| read(&pair, &stop));
            let ledger = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let ledger = write(&pair, run.seed, run.rounds, pause);
                pair.wait_status("nyc", "that nothing is behind", |status| status["behind_records"] == 0);
                std::thread::sleep(Duration::from_millis(200));
                ledger
            }));
            stop.store(true, Ordering::Release);
            let seen = reader.join().unwrap();
            (ledger.map_err(|panic| *failed.lock().unwrap() = Some(panic)), seen)
        });
        if let Some(panic) = failed.into_inner().unwrap() {
            std::panic::resume_unwind(panic);
        }
        let ledger = ledger.unwrap();
        let places: HashMap<&String, usize> =
            ledger.hashes.iter().enumerate().map(|(place, hash)| (hash, place)).collect();
        assert_eq!(places.len(), ledger.hashes.len(), "no two entries are equal");
        let mut last = 0;
        let mut before = "nothing".to_owned();
        for (group, (hash, listing)) in &seen {
            let Some(place) = places.get(hash) else {
                let nearest = ledger.nearest(last, listing);
                panic!("group {group} shows what never was; the group seen before was {before}; {nearest}");
            };
            assert!(*place >= last, "group {group} goes back to {}, after {before}", ledger.what[*place]);
            last = *place;
            before = format!("entry {place}, {}", ledger.what[*place]);
        }
        println!("{} entries, {} groups seen", ledger.hashes.len(), seen.len());
        assert_eq!(last, ledger.hashes.len() - 1, "the last state arrived");
        assert!(seen.len() >= groups_min, "only {} groups were seen", seen.len());
    }
}

#[test]
fn every_group_is_an_entry_of_the_ledger() {
    let pause = Duration::from_millis(20);
    every_group_is_in_the_ledger("every_group_is_an_entry_of_the_ledger", None, pause, 100);
}

/// Over a long way the groups are few and large, and begin and end anywhere.
#[test]
fn every_large_group_is_an_entry_of_the_ledger() {
    let link = Link { delay: Duration::from_millis(20), loss_permille: 5, ..Link::default() };
    let test = "every_large_group_is_an_entry_of_the_ledger";
    every_group_is_in_the_ledger(test, Some(link), Duration::from_millis(1), 20);
}
