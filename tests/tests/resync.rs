//! Resync: after an outage that the sidefile could not bridge, the session goes on by itself, and the replica shows its
//! last image until it shows the new one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use twinfs_tests::ops::{Actor, Generator, Mix, Rng};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::wait_for;
use twinfs_tests::relay::Link;
use twinfs_tests::tree::{self, Compare, Listing};

const MIB: u64 = 1 << 20;
const SIDEFILE: u64 = 16 * MIB;

fn pair() -> Pair {
    let mount_args = vec!["--sidefile".into(), SIDEFILE.to_string()];
    Pair::start(Setup { relay: true, mount_args, ..Setup::default() })
}

fn tree_of(pair: &Pair) -> PathBuf {
    let tree = pair.mount("data").join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    tree
}

fn act(pair: &Pair, generator: &mut Generator, actor: &mut Actor, operations: usize) {
    for _ in 0..operations {
        let operation = generator.next_operation(&pair.source("data").join("tree"));
        let _ = actor.apply(&operation);
    }
}

/// Writes until the session is suspended, with the link cut.
fn outage(pair: &Pair, random: &mut Rng) {
    pair.relay().cut(true);
    pair.wait_status("nyc", "that the link is down", |status| status["peer"]["connected"] == false);
    let file = File::create(pair.mount("data").join("flood")).unwrap();
    let mut at = 0;
    while at < 2 * SIDEFILE {
        file.write_all_at(&random.bytes(MIB as usize / 4), at).unwrap();
        at += MIB / 4;
    }
    pair.wait_status("nyc", "SUSPENDED", |status| status["session_state"] == "SUSPENDED");
}

/// What the replica shows, read within one group.
fn shown(pair: &Pair) -> Option<Listing> {
    let sampler = pair.sampler();
    let view = pair.view("data");
    sampler.sample(|| tree::try_listing(&view, Compare::ALL).ok()).and_then(|(_, listing)| listing)
}

#[test]
fn an_outage_ends_by_itself_and_shows_nothing_in_between() {
    let mut pair = pair();
    let mut random = Rng(5);
    let mut generator = Generator::new(5, Mix::default());
    let mut actor = Actor::new(&tree_of(&pair));
    act(&pair, &mut generator, &mut actor, 300);
    pair.assert_converged();
    for _ in 0..2 {
        outage(&pair, &mut random);
        act(&pair, &mut generator, &mut actor, 400);
        let new = tree::listing(&pair.mount("data"), Compare::ALL);
        pair.relay().cut(false);
        let mut met = Vec::new();
        wait_for("DUPLEX after the outage", || {
            met.push(pair.status("nyc")["session_state"].as_str().unwrap_or_default().to_owned());
            if pair.status("chi")["session_state"] == "RESYNC" {
                // Until it is complete, what was captured before the suspension is all that is shown.
                let listing = shown(&pair);
                let still = pair.status("chi")["session_state"] == "RESYNC";
                let is_new = listing.is_some_and(|seen| tree::differences(&seen, &new).is_none());
                assert!(!(still && is_new), "a resync that is not complete is shown");
            }
            (met.last().unwrap() == "DUPLEX").then_some(())
        });
        met.dedup();
        println!("states: {met:?}");
        pair.assert_converged();
    }
    drop(actor);
    pair.assert_plain_trees();
}

#[test]
fn programs_write_on_while_the_resync_runs() {
    let mut pair = pair();
    let mut random = Rng(6);
    let mut generator = Generator::new(6, Mix::default());
    let mut actor = Actor::new(&tree_of(&pair));
    act(&pair, &mut generator, &mut actor, 200);
    outage(&pair, &mut random);
    act(&pair, &mut generator, &mut actor, 300);
    pair.relay().cut(false);
    for _ in 0..200 {
        act(&pair, &mut generator, &mut actor, 5);
        if pair.status("nyc")["session_state"] == "DUPLEX" {
            break;
        }
    }
    pair.wait_status("nyc", "DUPLEX", |status| status["session_state"] == "DUPLEX");
    pair.assert_converged();
    drop(actor);
    pair.assert_plain_trees();
}

#[test]
fn what_was_noted_outlives_a_clean_stop() {
    let mut pair = pair();
    let mut random = Rng(7);
    std::fs::write(pair.mount("data").join("before"), b"mirrored").unwrap();
    pair.assert_converged();
    outage(&pair, &mut random);
    std::fs::rename(pair.mount("data").join("flood"), pair.mount("data").join("moved")).unwrap();
    pair.stop_primary();
    pair.start_primary();
    assert_eq!(pair.status("nyc")["session_state"], "SUSPENDED");
    std::fs::write(pair.mount("data").join("after"), b"dropped, too").unwrap();
    pair.relay().cut(false);
    pair.wait_status("nyc", "DUPLEX", |status| status["session_state"] == "DUPLEX");
    pair.assert_converged();
    pair.assert_plain_trees();
}

#[test]
fn a_promote_in_the_middle_gives_the_last_consistent_image() {
    let pair = pair();
    let mut random = Rng(8);
    let mut generator = Generator::new(8, Mix::default());
    let mut actor = Actor::new(&tree_of(&pair));
    act(&pair, &mut generator, &mut actor, 200);
    pair.assert_converged();
    outage(&pair, &mut random);
    act(&pair, &mut generator, &mut actor, 300);
    // So slow that the resync is met in the middle.
    pair.relay().set(Link { bandwidth: Some(6 * MIB), ..Link::default() });
    pair.relay().cut(false);
    pair.wait_status("chi", "RESYNC", |status| status["session_state"] == "RESYNC");
    let before = shown(&pair).expect("no group is shown during a resync");
    assert_eq!(pair.status("chi")["session_state"], "RESYNC", "it was read in the middle");
    let promoted = pair.promote(&["--force"]);
    assert!(promoted.status.success(), "{}", String::from_utf8_lossy(&promoted.stderr));
    let after = tree::listing(&pair.view("data"), Compare::ALL);
    assert_eq!(tree::differences(&before, &after), None);
    drop(actor);
}
