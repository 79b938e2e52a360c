//! The harness itself: the generator is deterministic, its operations succeed often enough, and a tree that differs in
//! any way is found.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps, XattrFlags};
use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::loop_fs::LoopFs;
use twinfs_tests::ops::{Actor, Generator, Mix};
use twinfs_tests::seed;
use twinfs_tests::tree::{self, Compare};

/// Runs a seed's operations on two directories; returns how many succeeded and failed, by kind of operation.
fn live(left: &Path, right: &Path, seed: u64, rounds: u64) -> BTreeMap<String, (u64, u64)> {
    let mut generator = Generator::new(seed, Mix::default());
    let mut actors = [Actor::new(left), Actor::new(right)];
    let mut counts: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for round in 0..rounds {
        let operation = generator.next_operation(left);
        let results = [actors[0].apply(&operation), actors[1].apply(&operation)];
        assert_eq!(results[0], results[1], "round {round}: {operation:?}");
        let text = format!("{operation:?}");
        let kind = text.split([' ', '{']).next().unwrap_or_default().to_owned();
        let count = counts.entry(kind).or_default();
        if results[0].is_ok() { count.0 += 1 } else { count.1 += 1 }
    }
    counts
}

fn directories_live_alike(kind: &str, test: &'static str) {
    let fs = LoopFs::new(kind, 4 << 30);
    for run in seed::runs("harness", test, &[1, 2], 4000) {
        let _announced = run.announce();
        let (left, right) = (fs.path().join("left"), fs.path().join("right"));
        std::fs::create_dir(&left).unwrap();
        std::fs::create_dir(&right).unwrap();
        let counts = live(&left, &right, run.seed, run.rounds);
        tree::assert_equal(&left, &right, Compare { holes: true, ..Compare::NO_TIMES });
        let (good, bad) = counts.values().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
        println!("{good} succeeded, {bad} failed: {counts:?}");
        assert!(good * 3 > bad, "operations succeed often enough");
        assert!(
            counts.iter().all(|(_, count)| count.0 >= run.rounds / 1000),
            "every kind succeeds at times: {counts:?}"
        );
        assert!(tree::listing(&left, Compare::ALL).len() > 5, "the tree is not empty");
        std::fs::remove_dir_all(&left).unwrap();
        std::fs::remove_dir_all(&right).unwrap();
    }
}

#[test]
fn two_directories_on_ext4_live_alike() {
    directories_live_alike("ext4", "two_directories_on_ext4_live_alike");
}

#[test]
fn two_directories_on_xfs_live_alike() {
    directories_live_alike("xfs", "two_directories_on_xfs_live_alike");
}

#[test]
fn the_same_seed_makes_the_same_operations() {
    let text = |seed, mix| {
        let dir = tempfile::tempdir().unwrap();
        let mut generator = Generator::new(seed, mix);
        let mut actor = Actor::new(dir.path());
        let mut text = String::new();
        for _ in 0..1000 {
            let operation = generator.next_operation(dir.path());
            text.push_str(&format!("{operation:?} -> {:?}\n", actor.apply(&operation)));
        }
        text
    };
    let any = text(5, Mix::default());
    assert_eq!(any, text(5, Mix::default()));
    assert_ne!(any, text(6, Mix::default()));
    assert!(any.contains("Invert {") && any.contains("CopyRange {"));
    let single = text(5, Mix { single_calls: true, ..Mix::default() });
    assert!(!single.contains("Invert {") && !single.contains("CopyRange {"));
}

/// A way to break one object of a tree.
type Damage = (&'static str, fn(&Path));

const DAMAGES: [Damage; 15] = [
    ("a byte", |root| open(root, "small/0/0/file 85").write_all_at(b"!", 0).unwrap()),
    ("a byte far out", |root| open(root, "sparse").write_all_at(b"!", (3 << 40) + 5 + 4999).unwrap()),
    ("a size", |root| open(root, "hole only").set_len((5 << 30) + 1).unwrap()),
    ("zeros instead of the end", |root| open(root, "zeros").set_len(99_999).unwrap()),
    ("a time by a nanosecond", |root| touch(root, "attributes/old", 1, 2)),
    ("the time of a directory", |root| touch(root, "attributes/old directory", 77, 78)),
    ("the time of a symlink", |root| touch(root, "attributes/old symlink", 78, 79)),
    ("a mode", |root| {
        rustix::fs::chmod(root.join("attributes/mode 4755"), Mode::from_raw_mode(0o755)).unwrap();
    }),
    ("an owner", |root| std::os::unix::fs::chown(root.join("attributes/owner 1"), Some(2), None).unwrap()),
    ("an xattr", |root| {
        rustix::fs::removexattr(root.join("attributes/xattrs"), "user.empty").unwrap();
    }),
    ("the value of an xattr", |root| {
        let path = root.join("attributes/xattrs");
        rustix::fs::setxattr(path, "trusted.root", b"no", XattrFlags::empty()).unwrap();
    }),
    ("an ACL", |root| {
        rustix::fs::removexattr(root.join("attributes/acl"), "system.posix_acl_default").unwrap();
    }),
    ("a symlink's target", |root| {
        std::fs::remove_file(root.join("kinds/symlink")).unwrap();
        std::os::unix::fs::symlink("../smalL", root.join("kinds/symlink")).unwrap();
    }),
    ("a copy instead of a link", |root| {
        std::fs::remove_file(root.join("links/two")).unwrap();
        std::fs::write(root.join("links/two"), b"linked").unwrap();
    }),
    ("a name", |root| std::fs::rename(root.join("names/..."), root.join("names/....")).unwrap()),
];

fn open(root: &Path, name: &str) -> std::fs::File {
    std::fs::File::options().write(true).open(root.join(name)).unwrap()
}

fn touch(root: &Path, name: &str, tv_sec: i64, tv_nsec: i64) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, root.join(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Times are left out of the comparison but where they are the damage: most damages change them too.
#[test]
fn every_way_to_differ_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let amounts = Amounts { files: 100, bytes: 1 << 20 };
    let pristine = dir.path().join("pristine");
    std::fs::create_dir(&pristine).unwrap();
    fixture::fill(&pristine, amounts, 7);
    for (what, damage) in DAMAGES {
        let before = tree::listing(&pristine, Compare::NO_TIMES);
        let with_times = tree::listing(&pristine, Compare::ALL);
        damage(&pristine);
        let after = tree::listing(&pristine, Compare::NO_TIMES);
        let found = match what.contains("time") {
            true => tree::differences(&with_times, &tree::listing(&pristine, Compare::ALL)),
            false => tree::differences(&before, &after),
        };
        assert!(found.is_some(), "{what} was not found");
    }
    assert_eq!(tree::difference(&pristine, &pristine, Compare::WITH_HOLES), None);
}
