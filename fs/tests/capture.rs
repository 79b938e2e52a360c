//! The capture layer under real programs: what is recorded, replayed in the order of the stamps, gives exactly what is
//! there.
#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use support::actor::{Actor, Random};
use support::replay::Tree;
use support::{Mirrored, VOLUME};

/// Replays what was recorded since the last call, and compares it with what is there.
fn check(mirrored: &Mirrored, tree: &mut Tree, note: &str) {
    for (_, update, data) in mirrored.tape.take() {
        tree.apply(&update, &data);
    }
    let differences = tree.differences(&mirrored.source);
    assert!(differences.is_empty(), "{note}: {differences:#?}");
}

fn empty_tree(mirrored: &Mirrored) -> Tree {
    Tree { complete: true, ..Tree::new(mirrored.mirror.root_of(VOLUME).unwrap()) }
}

#[test]
fn replaying_one_program_gives_what_it_did() {
    let seed = std::env::var("TWINFS_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("replay with TWINFS_SEED={seed}");
    let mut mirrored = Mirrored::new();
    let mut tree = empty_tree(&mirrored);
    let mut actor = Actor::new(&mirrored.mountpoint, seed);
    for step in 0..3000 {
        actor.step();
        if step % 100 == 0 {
            check(&mirrored, &mut tree, &format!("seed {seed}, step {step}"));
        }
    }
    check(&mirrored, &mut tree, &format!("seed {seed}, at the end"));
    drop(actor);
    mirrored.unmount();
    check(&mirrored, &mut tree, &format!("seed {seed}, unmounted"));
}

#[test]
fn replaying_programs_side_by_side_gives_what_they_did() {
    let seed = std::env::var("TWINFS_SEED").map_or(2, |seed| seed.parse().unwrap());
    println!("replay with TWINFS_SEED={seed}");
    let mirrored = Mirrored::new();
    let mut tree = empty_tree(&mirrored);
    let mut seeds = Random(seed);
    for round in 0..5 {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let mut actor = Actor::new(&mirrored.mountpoint, seeds.next());
                scope.spawn(move || (0..300).for_each(|_| actor.step()));
            }
        });
        check(&mirrored, &mut tree, &format!("seed {seed}, round {round}"));
    }
}
