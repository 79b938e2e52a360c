//! The same random operations on the mount and on a plain directory: every call answers alike, and in the end the mount,
//! the plain directory, the backing directory and the replica are equal in full.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use twinfs_tests::loop_fs::LoopFs;
use twinfs_tests::ops::{Actor, Generator, Mix, Rng};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::relay::Link;
use twinfs_tests::seed;
use twinfs_tests::tree::{self, Compare};

const FS_BYTES: u64 = 8 << 30;
/// The kernel's FUSE refuses collapse and insert range before any file system hears of them.
const MIX: Mix = Mix { shifts: false, data_bytes_max: 9000, single_calls: false, names: 8, depth: 3 };

fn pair_on(fs: &LoopFs, relay: bool) -> Pair {
    std::fs::create_dir_all(fs.path().join("plain")).unwrap();
    Pair::start(Setup { root: Some(fs.path()), relay, ..Setup::default() })
}

fn differential(kind: &str, test: &'static str, seeds: &[u64]) {
    for run in seed::runs("differential", test, seeds, 3000) {
        let _announced = run.announce();
        let fs = LoopFs::new(kind, FS_BYTES);
        let mut pair = pair_on(&fs, false);
        let plain = fs.path().join("plain");
        let mut generator = Generator::new(run.seed, MIX);
        let mut actors = [Actor::new(&pair.mount("data")), Actor::new(&plain)];
        for round in 0..run.rounds {
            let operation = generator.next_operation(&plain);
            let [mirrored, expected] = actors.each_mut().map(|actor| actor.apply(&operation));
            assert_eq!(mirrored, expected, "round {round}: {operation:?}");
        }
        // With files still open that have no name any more, and then without.
        pair.assert_converged();
        drop(actors);
        tree::assert_equal(&pair.mount("data"), &plain, Compare::NO_TIMES);
        pair.assert_converged();
        pair.assert_plain_trees();
    }
}

#[test]
fn random_operations_on_ext4() {
    differential("ext4", "random_operations_on_ext4", &[1, 2]);
}

#[test]
fn random_operations_on_xfs() {
    differential("xfs", "random_operations_on_xfs", &[3, 4]);
}

/// The same, over a link that delays and loses packets, with several sets in flight: groups are large, sets overtake.
#[test]
fn random_operations_over_a_bad_link() {
    let test = "random_operations_over_a_bad_link";
    for run in seed::runs("differential", test, &[5], 3000) {
        let _announced = run.announce();
        let fs = LoopFs::new("ext4", FS_BYTES);
        let pair = pair_on(&fs, true);
        let delay = Duration::from_millis(15);
        pair.relay().set(Link { delay, loss_permille: 10, ..Link::default() });
        let plain = fs.path().join("plain");
        let mut generator = Generator::new(run.seed, MIX);
        let mut actors = [Actor::new(&pair.mount("data")), Actor::new(&plain)];
        for round in 0..run.rounds {
            let operation = generator.next_operation(&plain);
            let [mirrored, expected] = actors.each_mut().map(|actor| actor.apply(&operation));
            assert_eq!(mirrored, expected, "round {round}: {operation:?}");
        }
        drop(actors);
        tree::assert_equal(&pair.mount("data"), &fs.path().join("plain"), Compare::NO_TIMES);
        pair.assert_converged();
    }
}

/// What is hard within one group, below `root`; `round` makes the contents differ.
fn hard_cases(root: &Path, round: u64) {
    let at = |name: &str| root.join(name);
    let write = |name: &str, text: &str| std::fs::write(at(name), format!("{text} {round}")).unwrap();
    let rename = |from: &str, to: &str| std::fs::rename(at(from), at(to)).unwrap();
    let exchange = |a: &str, b: &str| renameat_with(CWD, at(a), CWD, at(b), RenameFlags::EXCHANGE).unwrap();

    // Swaps, in one call and in three.
    write("x", "x");
    write("y", "y");
    exchange("x", "y");
    rename("x", "z");
    rename("y", "x");
    rename("z", "y");
    // A file and a directory change places.
    std::fs::create_dir_all(at("box")).unwrap();
    write("box/in", "in");
    exchange("x", "box");
    exchange("x", "box");
    // A rotation of three directories, each with a file of the others' name.
    for name in ["r1", "r2", "r3"] {
        std::fs::create_dir_all(at(name)).unwrap();
        write(&format!("{name}/f"), name);
    }
    rename("r1", "r0");
    rename("r2", "r1");
    rename("r3", "r2");
    rename("r0", "r3");
    // Inverted parents: outer/inner becomes inner/outer, and again.
    std::fs::create_dir_all(at("outer/inner/deep")).unwrap();
    write("outer/inner/deep/f", "deep");
    write("outer/f", "outer");
    for (outer, inner) in [("outer", "inner"), ("inner", "outer")] {
        rename(&format!("{outer}/{inner}"), inner);
        rename(outer, &format!("{inner}/{outer}"));
    }
    // Unlink and recreate, also as another kind; the old file lives on behind a descriptor.
    write("same", "first");
    let held = File::options().read(true).write(true).open(at("same")).unwrap();
    std::fs::remove_file(at("same")).unwrap();
    write("same", "second");
    held.write_all_at(b"into nowhere", 3).unwrap();
    std::fs::remove_file(at("same")).unwrap();
    std::fs::create_dir(at("same")).unwrap();
    write("same/f", "third");
    std::fs::remove_file(at("same/f")).unwrap();
    std::fs::remove_dir(at("same")).unwrap();
    std::os::unix::fs::symlink(format!("target {round}"), at("same")).unwrap();
    std::fs::remove_file(at("same")).unwrap();
    held.set_len(1 << 20).unwrap();
    // Link and rename onto itself, and between two names of one file: nothing happens, no error for rename.
    write("l1", "linked");
    let _ = std::fs::remove_file(at("l2"));
    std::fs::hard_link(at("l1"), at("l2")).unwrap();
    assert!(std::fs::hard_link(at("l1"), at("l1")).is_err());
    assert!(std::fs::hard_link(at("l1"), at("l2")).is_err());
    rename("l1", "l1");
    rename("l1", "l2");
    rename("outer", "outer");
    exchange("l1", "l2");
    assert!(std::fs::rename(at("outer"), at("outer/inner/outer")).is_err());
    // Overwritten by rename while it is open, then written: the new one must not have it.
    write("over", "old");
    let old = File::options().write(true).open(at("over")).unwrap();
    write("new", "new");
    rename("new", "over");
    old.write_all_at(b"lost", 0).unwrap();
    // A directory replaces an empty one; a link outlives the first name and moves.
    let _ = std::fs::remove_dir_all(at("d2"));
    std::fs::create_dir_all(at("d1/sub")).unwrap();
    std::fs::create_dir(at("d2")).unwrap();
    rename("d1", "d2");
    std::fs::hard_link(at("over"), at("d2/sub/second")).unwrap();
    std::fs::remove_file(at("over")).unwrap();
    rename("d2/sub/second", "over");
    // A chain of short-lived names, the last one stays.
    write("chain0", "chain");
    for link in 0..20 {
        rename(&format!("chain{link}"), &format!("chain{}", link + 1));
    }
    rename("chain20", "chain");
}

fn bursts_of_hard_cases(link: Option<Link>, seed: u64) {
    let fs = LoopFs::new("ext4", FS_BYTES);
    let pair = pair_on(&fs, link.is_some());
    if let Some(link) = link {
        pair.relay().set(link);
    }
    let mut random = Rng(seed);
    for round in 0..60 {
        for root in [&pair.mount("data"), &fs.path().join("plain")] {
            hard_cases(root, round);
        }
        std::thread::sleep(Duration::from_millis(random.below(30)));
    }
    tree::assert_equal(&pair.mount("data"), &fs.path().join("plain"), Compare::NO_TIMES);
    pair.assert_converged();
}

#[test]
fn hard_cases_in_small_groups() {
    bursts_of_hard_cases(None, 1);
}

/// With a long way between the sites, a whole burst falls into one group.
#[test]
fn hard_cases_within_one_group() {
    bursts_of_hard_cases(Some(Link { delay: Duration::from_millis(80), ..Link::default() }), 2);
}

/// A program that gets this error falls back to copying, as it does on other file systems that lack the call.
#[test]
fn collapse_and_insert_range_are_refused() {
    let pair = Pair::start(Setup::default());
    let file = File::create(pair.mount("data").join("f")).unwrap();
    file.write_all_at(&[1; 20_000], 0).unwrap();
    for flags in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_eq!(rustix::fs::fallocate(&file, flags, 4096, 4096), Err(Errno::OPNOTSUPP));
    }
    assert_eq!(file.metadata().unwrap().len(), 20_000);
    pair.assert_converged();
}
