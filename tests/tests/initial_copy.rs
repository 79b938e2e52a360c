//! The initial copy: whatever a source holds arrives as it is, while programs go on writing; the volume appears whole; a
//! clean stop and start, of either side and in the middle, reads no file again and sends no acknowledged set again.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::ops::{Actor, Generator, Mix};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::wait_for;
use twinfs_tests::relay::Link;
use twinfs_tests::seed;
use twinfs_tests::tree::{self, Compare, Listing};

const AMOUNTS: Amounts = Amounts { files: 4000, bytes: 64 << 20 };

/// The listing of everything below the root that nobody changes during a test.
fn still(root: &Path) -> Listing {
    let mut all = Listing::new();
    for dir in ["small", "kinds", "names", "attributes", "links"] {
        for (path, line) in tree::listing(&root.join(dir), Compare::ALL) {
            all.insert([dir.as_bytes(), b"/", &path].concat(), line);
        }
    }
    all
}

/// Directories for programs to work in while the copy runs.
fn lively(root: &Path) {
    for dir in 0..40 {
        for file in 0..25 {
            let parent = root.join(format!("lively/{dir}/inner"));
            std::fs::create_dir_all(&parent).unwrap();
            std::fs::write(parent.join(format!("{file}")), format!("{dir} {file}").repeat(300)).unwrap();
        }
    }
    std::fs::create_dir_all(root.join("actor")).unwrap();
}

/// Renames, links and rewrites across directories that the copy has or has not passed yet. Returns how many rounds.
fn move_about(mount: &Path, stop: &AtomicBool) -> u64 {
    let lively = mount.join("lively");
    let mut round = 0u64;
    while !stop.load(Ordering::Acquire) {
        let (a, b) = (round * 7 % 40, (round * 11 + 20) % 40);
        let file = |dir: u64, name: u64| lively.join(format!("{dir}/inner/{name}"));
        // Whatever is not there any more makes a call fail; that is as good.
        let name = round % 25;
        let _ = std::fs::rename(file(a, name), lively.join(format!("{b}/moved {name} {round}")));
        let _ = std::fs::hard_link(file(b, name), lively.join(format!("{a}/linked {round}")));
        let _ = std::fs::rename(
            lively.join(format!("{a}/inner")),
            lively.join(format!("{b}/inner of {a} {round}")),
        );
        let _ = std::fs::rename(
            lively.join(format!("{b}/inner of {a} {round}")),
            lively.join(format!("{a}/inner")),
        );
        let _ = std::fs::write(file(b, (name + 1) % 25), format!("rewritten {round}"));
        let _ = std::fs::remove_file(file(a, (name + 2) % 25));
        if round.is_multiple_of(10) {
            let _ = std::fs::rename(lively.join(format!("{a}")), lively.join(format!("swap {round}")));
            let _ = std::fs::rename(lively.join(format!("{b}")), lively.join(format!("{a}")));
            let _ = std::fs::rename(lively.join(format!("swap {round}")), lively.join(format!("{b}")));
        }
        round += 1;
        std::thread::sleep(Duration::from_micros(300));
    }
    round
}

/// Watches the view until the volume appears; what stands still must be whole at once.
fn watch(view: &Path, expected: &Listing) {
    let data = view.join("data");
    wait_for("the volume to appear", || data.exists().then_some(()));
    if let Some(difference) = tree::differences(expected, &still(&data)) {
        panic!("the volume appeared before it was whole:\n{difference}");
    }
}

fn copy_under_load(over_source: bool, test: &'static str) {
    for run in seed::runs("initial_copy", test, &[1], 0) {
        let _announced = run.announce();
        let mut pair = Pair::new(Setup { over_source, relay: true, ..Setup::default() });
        fixture::fill(&pair.source("data"), AMOUNTS, run.seed);
        lively(&pair.source("data"));
        let expected = still(&pair.source("data"));
        // Slow enough that the copy takes a while.
        pair.relay().set(Link { bandwidth: Some(40 << 20), ..Link::default() });
        pair.start_replica();
        assert!(!pair.view("data").exists());
        pair.start_primary();
        let stop = AtomicBool::new(false);
        let mount = pair.mount("data");
        let (moved, acted) = std::thread::scope(|scope| {
            let mover = scope.spawn(|| move_about(&mount, &stop));
            let actor = scope.spawn(|| act(&mount.join("actor"), run.seed, &stop));
            let watcher = scope.spawn(|| watch(&pair.view_root(), &expected));
            watcher.join().unwrap();
            stop.store(true, Ordering::Release);
            (mover.join().unwrap(), actor.join().unwrap())
        });
        println!("while the copy ran: {moved} rounds of renames, {acted} random operations");
        assert!(moved > 100 && acted > 100, "programs went on working while the copy ran");
        pair.wait_duplex();
        let volume = &pair.status("nyc")["volumes"][0];
        assert_eq!((&volume["name"], &volume["state"]), (&"data".into(), &"DUPLEX".into()));
        assert!(volume["files_copied"].as_u64() > Some(4000), "{volume}");
        pair.assert_converged();
        pair.assert_plain_trees();
    }
}

fn act(root: &Path, seed: u64, stop: &AtomicBool) -> u64 {
    let mut generator = Generator::new(seed, Mix::default());
    let mut actor = Actor::new(root);
    let mut done = 0;
    while !stop.load(Ordering::Acquire) {
        let operation = generator.next_operation(root);
        let _ = actor.apply(&operation);
        done += 1;
        std::thread::sleep(Duration::from_micros(200));
    }
    done
}

#[test]
fn everything_arrives_while_programs_write() {
    copy_under_load(false, "everything_arrives_while_programs_write");
}

#[test]
fn a_directory_mounted_over_itself_is_copied_too() {
    copy_under_load(true, "a_directory_mounted_over_itself_is_copied_too");
}

/// Bytes that a process has read with system calls.
fn bytes_read(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

fn prepared(link: Link) -> Pair {
    let mut pair = Pair::new(Setup { relay: true, ..Setup::default() });
    fixture::fill(&pair.source("data"), AMOUNTS, 3);
    pair.relay().set(link);
    pair.start_replica();
    pair.start_primary();
    pair
}

#[test]
fn a_restart_after_the_copy_reads_and_sends_nothing_again() {
    let mut pair = prepared(Link::default());
    pair.wait_duplex();
    pair.assert_converged();
    let copied = pair.status("nyc")["volumes"][0]["files_copied"].clone();

    for (name, restart_primary) in [("the primary", true), ("the replica", false)] {
        let sent_before = pair.relay().bytes_to_target();
        if restart_primary {
            pair.stop_primary();
            pair.start_primary();
        } else {
            pair.stop_replica();
            pair.start_replica();
        }
        pair.wait_duplex();
        std::fs::write(pair.mount("data").join(format!("after {name}")), b"goes on").unwrap();
        pair.wait_caught_up();
        let sent = pair.relay().bytes_to_target() - sent_before;
        assert!(sent < 1 << 20, "a restart of {name} sent {sent} bytes");
        if restart_primary {
            let read = bytes_read(pair.primary.as_ref().unwrap().pid());
            assert!(read < AMOUNTS.bytes / 4, "a restart of {name} read {read} bytes");
            let status = pair.status("nyc");
            assert!(status["sets_sent"].as_u64() < Some(20), "{status:#}");
            let again = &status["volumes"][0]["files_copied"];
            assert!(
                *again == copied || *again == 0,
                "{again} files copied after the restart, {copied} before"
            );
        }
    }
    pair.assert_converged();
    pair.assert_plain_trees();
}

/// Stops one side in the middle of the copy, and returns once it runs again and the copy is complete.
fn interrupted(stop_primary: bool) {
    let mut pair = prepared(Link { bandwidth: Some(12 << 20), ..Link::default() });
    let mut read = 0;
    for part in 1..=2 {
        let enough = part * (16 << 20);
        wait_for("a part of the copy", || (pair.relay().bytes_to_target() > enough).then_some(()));
        assert_ne!(pair.status("nyc")["volumes"][0]["state"], "DUPLEX", "the copy is still under way");
        assert!(!pair.view("data").exists(), "nothing is visible yet");
        if stop_primary {
            read += bytes_read(pair.primary.as_ref().unwrap().pid());
            pair.stop_primary();
            pair.start_primary();
        } else {
            pair.stop_replica();
            pair.start_replica();
        }
        assert!(!pair.view("data").exists(), "nothing is visible yet");
    }
    pair.wait_duplex();
    read += bytes_read(pair.primary.as_ref().unwrap().pid());
    let sent = pair.relay().bytes_to_target();
    // All that the fixture holds, with its small files, some metadata and what was in flight at each stop.
    let (held, in_flight) = (AMOUNTS.bytes + AMOUNTS.files * 4096, 2 * (8 << 20));
    println!("sent {sent} bytes, read {read} bytes of about {held}");
    assert!(sent < held * 13 / 10 + in_flight, "sent {sent} bytes of {held}");
    assert!(read < held * 15 / 10 + in_flight, "read {read} bytes of {held}");
    pair.assert_converged();
    pair.assert_plain_trees();
}

#[test]
fn a_copy_goes_on_where_the_primary_stopped() {
    interrupted(true);
}

#[test]
fn a_copy_goes_on_where_the_replica_stopped() {
    interrupted(false);
}

/// Several volumes, filled differently: each appears whole, and neither waits for good for the other.
#[test]
fn several_volumes_are_copied_in_one_session() {
    let volumes = vec![("one", "src1"), ("two", "src2"), ("empty", "src3")];
    let mut pair = Pair::new(Setup { volumes, ..Setup::default() });
    fixture::fill(&pair.source("one"), Amounts { files: 500, bytes: 1 << 20 }, 1);
    fixture::fill(&pair.source("two"), Amounts { files: 100, bytes: 20 << 20 }, 2);
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    pair.assert_converged();
    let names = |root: PathBuf| {
        let mut names: Vec<_> =
            std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.retain(|name| name != ".twinfs");
        names.sort();
        names
    };
    assert_eq!(names(pair.view_root()), ["empty", "one", "two"]);
    pair.assert_plain_trees();
}
