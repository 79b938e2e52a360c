//! Promote: planned without loss, forced after the primary died, refused where it would hurt; and from then on there is one
//! primary.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::pair::{Pair, Setup, mounts_below};
use twinfs_tests::process::wait_for;
use twinfs_tests::tree::{self, Compare};

fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&all).into_owned()
}

fn errno(error: &std::io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

/// What is wrong if a path does not take writes as a plain directory does.
fn assert_writable(root: &Path) {
    let dir = root.join("written after the promote");
    // It may have been asked before.
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("file"), b"new").unwrap();
    std::fs::rename(dir.join("file"), dir.join("renamed")).unwrap();
    std::fs::hard_link(dir.join("renamed"), dir.join("linked")).unwrap();
    assert_eq!(std::fs::read(dir.join("linked")).unwrap(), b"new");
}

fn pair_with_data(setup: Setup) -> Pair {
    let mut pair = Pair::new(setup);
    fixture::fill(&pair.source("data"), Amounts { files: 200, bytes: 4 << 20 }, 1);
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    pair.assert_converged();
    pair
}

/// Appends one record after another until a write fails; each record is its number. Returns how many returned, and the
/// error.
fn append(path: &Path, stop: &AtomicBool) -> (u64, Option<std::io::Error>) {
    let file = match File::options().create(true).truncate(false).write(true).open(path) {
        Ok(file) => file,
        Err(error) => return (0, Some(error)),
    };
    let mut count = 0u64;
    while !stop.load(Ordering::Acquire) {
        if let Err(error) = file.write_all_at(&count.to_le_bytes(), count * 8) {
            return (count, Some(error));
        }
        count += 1;
    }
    (count, None)
}

/// How many records a file holds; each must be in its place.
fn records(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() % 8, 0, "a record is torn");
    for (at, record) in bytes.chunks(8).enumerate() {
        assert_eq!(u64::from_le_bytes(record.try_into().unwrap()), at as u64);
    }
    bytes.len() as u64 / 8
}

#[test]
fn a_forced_promote_after_the_primary_died() {
    let mut pair = pair_with_data(Setup::default());
    let stop = AtomicBool::new(false);
    let log = pair.mount("data").join("log");
    std::fs::write(pair.mount("data").join("kept open"), b"before").unwrap();
    pair.wait_caught_up();
    let mut old = File::open(pair.view("data").join("kept open")).unwrap();

    let (written, error) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| append(&log, &stop));
        std::thread::sleep(Duration::from_millis(700));
        pair.primary.as_mut().unwrap().kill();
        writer.join().unwrap()
    });
    assert!(error.is_some(), "the mount of a killed daemon takes no writes");
    wait_for("the replica to notice", || (pair.status("chi")["peer"]["connected"] == false).then_some(()));
    let group = pair.status("chi")["group"].as_u64().unwrap();
    let (code, line) = pair.check("chi", 3600.0);
    assert_ne!(code, 0, "a dead primary never looks healthy: {line}");

    let output = pair.promote(&["--force"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("lost"), "it says first what may be lost: {said}");
    let status = pair.status("chi");
    assert_eq!((&status["role"], &status["session_state"]), (&"PROMOTED".into(), &"SUSPENDED".into()));
    assert!(status["epoch"].as_u64() > Some(1), "{status:#}");
    assert!(status["group"].as_u64() >= Some(group), "{status:#}");

    let kept = records(&pair.view("data").join("log"));
    println!("{kept} of {written} records were there");
    // A record may have been written although its write had not returned when the daemon died.
    assert!(kept <= written + 1 && kept > 0, "{kept} of {written}");
    assert_writable(&pair.view("data"));
    std::fs::write(pair.view("data").join("kept open"), b"after!").unwrap();
    let mut seen = String::new();
    old.seek(SeekFrom::Start(0)).unwrap();
    old.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "before", "a file opened before keeps showing the last group");
    assert_eq!(std::fs::read(pair.view("data").join("kept open")).unwrap(), b"after!");
    drop(old);

    // A stop and a start later it is still the primary, and the tree is still what it was.
    let before = tree::listing(&pair.view("data"), Compare::ALL);
    pair.stop_replica();
    assert_eq!(tree::differences(&before, &tree::listing(&pair.image("data"), Compare::ALL)), None);
    pair.start_replica();
    assert_eq!(pair.status("chi")["role"], "PROMOTED");
    assert_eq!(tree::differences(&before, &tree::listing(&pair.view("data"), Compare::ALL)), None);
    assert_writable(&pair.view("data"));
}

#[test]
fn without_an_option_it_refuses_while_the_primary_is_connected() {
    let mut pair = pair_with_data(Setup::default());
    let output = pair.promote(&[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--planned") && said.contains("--force"), "it says what to do: {said}");
    assert!(said.contains("connected"), "it says why: {said}");
    assert_eq!(pair.status("chi")["role"], "REPLICA");
    std::fs::write(pair.mount("data").join("goes on"), b"x").unwrap();
    pair.assert_converged();

    // Both at once make no sense.
    assert_eq!(pair.promote(&["--planned", "--force"]).status.code(), Some(2));
    pair.assert_plain_trees();
}

#[test]
fn a_site_that_received_nothing_is_not_promoted() {
    let mut pair = Pair::new(Setup::default());
    pair.start_replica();
    for arguments in [&["--force"][..], &["--planned"], &[]] {
        let output = pair.promote(arguments);
        assert!(!output.status.success(), "{}", text(&output));
    }
    assert_eq!(pair.status("chi")["role"], "REPLICA");
    pair.stop_replica();
}

#[test]
fn a_planned_promote_loses_nothing() {
    let volumes = vec![("data", "src1"), ("more", "src2")];
    let mut pair = pair_with_data(Setup { volumes, ..Setup::default() });
    let stop = AtomicBool::new(false);
    let logs = [pair.mount("data").join("log"), pair.mount("more").join("log")];
    let (output, written) = std::thread::scope(|scope| {
        let writers = logs.each_ref().map(|log| scope.spawn(|| append(log, &stop)));
        std::thread::sleep(Duration::from_millis(500));
        let output = pair.promote(&["--planned"]);
        // Held writes must not wait for ever: they fail, or the writers are told to stop.
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Release);
        (output, writers.map(|writer| writer.join().unwrap()))
    });
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("0 updates lost"), "{said}");
    assert_eq!(pair.status("chi")["role"], "PROMOTED");
    wait_for("the old primary to be FENCED", || (pair.status("nyc")["role"] == "FENCED").then_some(()));

    for (volume, (count, error)) in ["data", "more"].into_iter().zip(&written) {
        let error = error.as_ref().unwrap_or_else(|| panic!("{volume}: a fenced mount takes writes"));
        assert_eq!(errno(error), Some(Errno::ROFS), "{volume}: {error}");
        assert!(*count > 100, "{volume}: the writer was busy: {count}");
        assert_eq!(
            records(&pair.view(volume).join("log")),
            *count,
            "{volume}: nothing is lost, nothing is added"
        );
        let error = std::fs::write(pair.mount(volume).join("late"), b"x").unwrap_err();
        assert_eq!(errno(&error), Some(Errno::ROFS));
        tree::assert_equal(&pair.mount(volume), &pair.view(volume), Compare::ALL);
        tree::assert_equal(&pair.source(volume), &pair.view(volume), Compare::ALL);
    }
    let (code, line) = pair.check("nyc", 3600.0);
    assert_eq!(code, 2, "a fenced site is critical: {line}");
    assert_writable(&pair.view("data"));
    assert!(!pair.mount("data").join("written after the promote").exists());

    // A fenced site stays so.
    pair.stop_primary();
    assert!(!pair.view("data").join("late").exists());
    assert_eq!(pair.status("chi")["role"], "PROMOTED");
}

#[test]
fn the_old_primary_is_refused_after_a_forced_promote() {
    let mut pair = pair_with_data(Setup { relay: true, ..Setup::default() });
    pair.relay().cut(true);
    std::fs::write(pair.mount("data").join("never arrives"), vec![7; 100_000]).unwrap();
    wait_for("the replica to notice", || (pair.status("chi")["peer"]["connected"] == false).then_some(()));
    let output = pair.promote(&[]);
    assert!(output.status.success() || text(&output).contains("--force"), "{}", text(&output));
    if !output.status.success() {
        let output = pair.promote(&["--force"]);
        assert!(output.status.success(), "{}", text(&output));
    }
    let before = tree::listing(&pair.view("data"), Compare::ALL);
    assert!(!pair.view("data").join("never arrives").exists());

    pair.relay().cut(false);
    std::fs::write(pair.mount("data").join("too late"), b"x").ok();
    pair.wait_status("nyc", "that it is no primary any more", |status| {
        status["role"] == "FENCED" || status["session_state"] == "DIVERGED"
    });
    let (code, line) = pair.check("nyc", 3600.0);
    assert_eq!(code, 2, "{line}");
    assert_eq!(tree::differences(&before, &tree::listing(&pair.view("data"), Compare::ALL)), None);
    let log = pair.replica.as_ref().unwrap().log_text();
    assert!(log.contains("epoch"), "the refusal is logged:\n{log}");

    // Started again, the old primary does not come back either, and says why.
    pair.stop_primary();
    pair.start_primary();
    let status = pair.wait_status("nyc", "that it is FENCED", |status| status["role"] == "FENCED");
    assert_eq!(status["session_state"], "SUSPENDED", "{status:#}");
    assert!(status["reason"].as_str().unwrap().contains("read-only"), "{status:#}");
    assert!(status["behind_records"].as_u64().unwrap() > 0, "what was never shipped is kept: {status:#}");
    let error = std::fs::write(pair.mount("data").join("late"), b"x").unwrap_err();
    assert_eq!(errno(&error), Some(Errno::ROFS));
    assert_eq!(std::fs::read(pair.mount("data").join("never arrives")).unwrap(), vec![7; 100_000]);
    pair.stop_primary();
    assert!(pair.source("data").join("never arrives").exists(), "what was written there stays there");
    assert_eq!(tree::differences(&before, &tree::listing(&pair.view("data"), Compare::ALL)), None);
}

#[test]
fn promote_starts_the_daemon_when_none_runs() {
    let mut pair = pair_with_data(Setup::default());
    let expected = tree::listing(&pair.view("data"), Compare::ALL);
    pair.stop_replica();
    pair.stop_primary();
    let output = pair.promote(&["--force"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(pair.status("chi")["role"], "PROMOTED");
    assert_eq!(tree::differences(&expected, &tree::listing(&pair.view("data"), Compare::ALL)), None);
    assert_writable(&pair.view("data"));

    // Once more: it is what it is.
    let epoch = pair.status("chi")["epoch"].clone();
    let output = pair.promote(&["--force"]);
    assert!(output.status.success() && text(&output).contains("PROMOTED"), "{}", text(&output));
    assert_eq!(pair.status("chi")["epoch"], epoch);
    assert_writable(&pair.view("data"));

    // The daemon in the background ends with its mounts.
    for point in mounts_below(&pair.view_root()) {
        twinfs_tests::process::run(std::process::Command::new("umount").arg(point));
    }
    wait_for("the daemon to end", || pair.processes("chi").is_empty().then_some(()));
    assert!(pair.image("data").join("written after the promote/linked").exists());
}

/// A replica whose daemon was killed is promoted from its journal alone.
#[test]
fn a_killed_replica_is_promoted_from_its_journal() {
    let mut pair = pair_with_data(Setup::default());
    std::fs::write(pair.mount("data").join("last"), b"last words").unwrap();
    pair.wait_caught_up();
    let expected = tree::listing(&pair.view("data"), Compare::ALL);
    pair.replica.take().unwrap().kill();
    pair.primary.as_mut().unwrap().kill();
    let output = pair.promote(&["--force"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(tree::differences(&expected, &tree::listing(&pair.view("data"), Compare::ALL)), None);
    assert_writable(&pair.view("data"));
}
