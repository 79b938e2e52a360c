//! The loss report of a promote: every acknowledged update that the replica lacks is listed, or later than the instant
//! after which nothing is known.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use twinfs_tests::ops::Rng;
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::{output, run, wait_for};
use twinfs_tests::relay::Link;

/// Stamps follow real time, but not to the last digit.
const CLOCK_ERROR_NS: u64 = 3_000_000;

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn loss(pair: &Pair) -> Value {
    let output = output(pair.command("loss", "chi").arg("--json"));
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn ns(instant: &Value) -> u64 {
    instant["ns"].as_u64().unwrap_or_else(|| panic!("{instant} is no instant"))
}

fn updates(report: &Value) -> &Vec<Value> {
    report["updates"].as_array().unwrap()
}

/// An acknowledged operation: its number, and when it began and returned, in nanoseconds of real time.
type Entry = (u64, u64, u64);

/// Calls `operation` with 0, 1, 2, … until it fails or is told to stop; a ledger, outside the mount, of those that
/// returned.
fn ledger(stop: &AtomicBool, mut operation: impl FnMut(u64) -> bool) -> Vec<Entry> {
    let mut entries = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let (number, begin) = (entries.len() as u64, now_ns());
        if !operation(number) {
            break;
        }
        entries.push((number, begin, now_ns()));
        // Apart by more than the clock's error.
        std::thread::sleep(Duration::from_millis(5));
    }
    entries
}

/// Ends the primary as a disaster does, and promotes.
fn disaster(pair: &mut Pair) -> String {
    pair.primary.as_mut().unwrap().kill();
    let output = pair.promote(&["--force"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    said
}

/// Writes so many MiB that do not compress.
fn write_mib(file: &File, count: u64) {
    let mut random = Rng(3);
    let mut block = vec![0; 1 << 20];
    for at in 0..count {
        block.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next_u64().to_le_bytes()));
        file.write_all_at(&block, at << 20).unwrap();
    }
}

fn append(file: &File, number: u64) -> bool {
    let record = number.to_le_bytes();
    file.write_all_at(&record, number * 8).and_then(|()| file.sync_all()).is_ok()
}

/// How many records of [`append`] a file holds; each must be in its place.
fn records(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap_or_default();
    assert_eq!(bytes.len() % 8, 0, "a record is torn");
    let in_place = |(at, record): (usize, &[u8])| record == (at as u64).to_le_bytes();
    assert!(bytes.chunks(8).enumerate().all(in_place), "records are a prefix");
    bytes.len() as u64 / 8
}

/// Checks the report against what a ledger of [`append`] says and what is there.
fn check_records(report: &Value, volume: &str, entries: &[Entry], kept: u64) {
    let unknown_after = ns(&report["unknown_after"]);
    let own = |update: &&Value| update["volume"] == volume && update["path"] == "log";
    let listed: BTreeMap<u64, u64> = updates(report)
        .iter()
        .filter(own)
        .filter(|update| update["operation"] == "write")
        .map(|update| {
            assert_eq!(update["length"], 8);
            (update["offset"].as_u64().unwrap() / 8, ns(&update["time"]))
        })
        .collect();
    for (number, time) in &listed {
        assert!(*number >= kept, "{volume}: {number} is there, and listed as lost");
        if let Some((_, begin, end)) = entries.get(*number as usize) {
            let at = begin - CLOCK_ERROR_NS..end + CLOCK_ERROR_NS;
            assert!(at.contains(time), "{volume}: {number} is listed with another time");
        }
    }
    for (number, begin, end) in entries.iter().filter(|(number, ..)| *number >= kept) {
        let is_unknown = end + CLOCK_ERROR_NS >= unknown_after;
        assert!(
            is_unknown || listed.contains_key(number),
            "{volume}: {number} ({begin} to {end}) is neither there nor listed; unknown after {unknown_after}"
        );
    }
    let covered =
        entries.iter().filter(|(number, ..)| *number >= kept && listed.contains_key(number)).count();
    println!("{volume}: {} acknowledged, {kept} there, {covered} listed as lost", entries.len());
}

#[test]
fn every_acknowledged_record_is_there_or_listed_or_after_the_unknown_instant() {
    let volumes = vec![("data", "src1"), ("more", "src2")];
    let mut pair = Pair::start(Setup { relay: true, volumes, ..Setup::default() });
    let logs = ["data", "more"].map(|volume| File::create(pair.mount(volume).join("log")).unwrap());
    let bulk = File::create(pair.mount("data").join("bulk")).unwrap();
    pair.wait_caught_up();
    let stop = AtomicBool::new(false);
    let (said, entries) = std::thread::scope(|scope| {
        let writers = logs.each_ref().map(|log| scope.spawn(|| ledger(&stop, |number| append(log, number))));
        std::thread::sleep(Duration::from_millis(300));
        // Data that does not compress fills the line; tokens pass it.
        pair.relay().set(Link { bandwidth: Some(256 << 10), ..Link::default() });
        write_mib(&bulk, 8);
        std::thread::sleep(Duration::from_millis(1500));
        pair.relay().cut(true);
        std::thread::sleep(Duration::from_millis(200));
        let said = disaster(&mut pair);
        stop.store(true, Ordering::Release);
        (said, writers.map(|writer| writer.join().unwrap()))
    });
    println!("{said}");
    let report = loss(&pair);
    for (volume, entries) in ["data", "more"].into_iter().zip(&entries) {
        let kept = records(&pair.view(volume).join("log"));
        check_records(&report, volume, entries, kept);
        assert!(
            (kept as usize) < entries.len(),
            "{volume}: the line was slow and then cut: something is lost"
        );
    }
    let bulk: Vec<_> = updates(&report).iter().filter(|update| update["path"] == "bulk").collect();
    assert!(!bulk.is_empty(), "the large writes are lost, and listed");
    assert!(ns(&report["unknown_after"]) > ns(&report["consistency_time"]), "tokens ran ahead");
    assert!(said.contains("twinfs loss"), "it prints the first ones and says where the rest is: {said}");

    // The same without a daemon, and for people.
    pair.stop_replica();
    assert_eq!(loss(&pair), report);
    let printed = output(&mut pair.command("loss", "chi"));
    let printed = String::from_utf8(printed.stdout).unwrap();
    let lines =
        printed.lines().filter(|line| line.contains("(only its token came)") || line.contains("(data held"));
    assert_eq!(lines.count(), updates(&report).len());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let dir = Path::new(report["directory"].as_str().unwrap()).to_owned();
    assert_eq!(
        (mode(&dir), mode(&dir.join("report.json")), mode(&dir.join("updates.jsonl"))),
        (0o700, 0o600, 0o600)
    );
}

/// The window of record sets in flight is full, so no interval ends; one volume writes nothing all the time.
#[test]
fn an_idle_volume_does_not_hold_the_unknown_instant_back() {
    let volumes = vec![("data", "src1"), ("idle", "src2")];
    let mut pair = Pair::start(Setup { relay: true, volumes, ..Setup::default() });
    let log = File::create(pair.mount("data").join("log")).unwrap();
    let bulk = File::create(pair.mount("data").join("bulk")).unwrap();
    pair.wait_caught_up();
    pair.relay().set(Link { bandwidth: Some(3 << 20), ..Link::default() });
    // More than the window holds.
    write_mib(&bulk, 96);
    std::thread::sleep(Duration::from_millis(1000));
    let first_late = now_ns();
    for number in 0..500 {
        assert!(append(&log, number));
        std::thread::sleep(Duration::from_millis(1));
    }
    wait_for("tokens of the late records", || (pair.number("chi", "tokens_held") >= 500.0).then_some(()));
    let said = disaster(&mut pair);
    let report = loss(&pair);
    assert!(ns(&report["consistency_time"]) < first_late, "they are not shown: {said}");
    assert!(ns(&report["unknown_after"]) > first_late, "nothing is lost of the idle volume: {said}");
}

fn sqlite(database: &Path, statement: &str) -> Output {
    output(Command::new("sqlite3").arg(database).arg(statement))
}

#[test]
fn every_acknowledged_row_is_there_or_listed_or_after_the_unknown_instant() {
    let mut pair = Pair::start(Setup { relay: true, ..Setup::default() });
    let database = pair.mount("data").join("rows.db");
    run(Command::new("sqlite3").arg(&database).arg("create table rows(n integer primary key, t text)"));
    pair.wait_caught_up();
    let stop = &AtomicBool::new(false);
    let entries = std::thread::scope(|scope| {
        let database = &database;
        let insert = |n: u64| {
            sqlite(database, &format!("insert into rows values({n}, hex(randomblob(2000)))")).status.success()
        };
        let writer = scope.spawn(move || ledger(stop, insert));
        std::thread::sleep(Duration::from_millis(500));
        pair.relay().set(Link { bandwidth: Some(48 << 10), ..Link::default() });
        std::thread::sleep(Duration::from_millis(2000));
        let said = disaster(&mut pair);
        stop.store(true, Ordering::Release);
        println!("{said}");
        writer.join().unwrap()
    });
    let there =
        sqlite(&pair.view("data").join("rows.db"), "pragma integrity_check; select n from rows order by n");
    let there = text(&there);
    let mut lines = there.lines();
    assert_eq!(lines.next(), Some("ok"), "{there}");
    let rows: Vec<u64> = lines.map(|line| line.parse().unwrap()).collect();
    assert!(rows.iter().copied().eq(0..rows.len() as u64), "what is missing is a newest suffix: {rows:?}");
    // A transaction may be there that had not returned when the primary died.
    assert!(rows.len() <= entries.len() + 1);

    let report = loss(&pair);
    let unknown_after = ns(&report["unknown_after"]);
    let written: Vec<u64> = updates(&report)
        .iter()
        .filter(|update| update["path"] == "rows.db" && update["operation"] == "write")
        .map(|update| ns(&update["time"]))
        .collect();
    let mut listed = 0;
    for (number, begin, end) in entries.iter().skip(rows.len()) {
        let at = begin - CLOCK_ERROR_NS..end + CLOCK_ERROR_NS;
        let is_listed = written.iter().any(|time| at.contains(time));
        listed += u64::from(is_listed);
        assert!(
            is_listed || end + CLOCK_ERROR_NS >= unknown_after,
            "row {number} ({begin} to {end}) is neither there nor listed; unknown after {unknown_after}"
        );
    }
    println!("{} rows acknowledged, {} there, {listed} listed as lost", entries.len(), rows.len());
    assert!(listed > 0, "the line was slow: some rows are lost, and their tokens came");
    // The journal of a transaction has a name only while it runs.
    let journal = updates(&report).iter().filter(|update| update["path"] == "rows.db-journal");
    assert!(journal.clone().any(|update| update["operation"] == "create"), "names are followed");
    assert!(
        journal.clone().any(|update| update["operation"] == "write"),
        "names are followed to what is written"
    );
}

/// Sets that came although an earlier one did not: they are kept, each a file that can be printed.
#[test]
fn what_came_but_cannot_be_ordered_is_kept() {
    let env = vec![("TWINFS_TEST_SHUFFLE_SETS", "50".to_owned())];
    let mut pair = Pair::start(Setup { relay: true, env, ..Setup::default() });
    let log = File::create(pair.mount("data").join("log")).unwrap();
    pair.wait_caught_up();
    let stop = AtomicBool::new(false);
    let entries = std::thread::scope(|scope| {
        let writer = scope.spawn(|| ledger(&stop, |number| append(&log, number)));
        // Until the line is cut at a moment when a set has come and one before it has not.
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(120));
            pair.relay().cut(true);
            std::thread::sleep(Duration::from_millis(30));
            let status = pair.status("chi");
            let number = |name: &str| status[name].as_u64().unwrap();
            if number("behind_records") > number("tokens_held") {
                break;
            }
            pair.relay().cut(false);
        }
        let said = disaster(&mut pair);
        stop.store(true, Ordering::Release);
        println!("{said}");
        writer.join().unwrap()
    });
    let report = loss(&pair);
    check_records(&report, "data", &entries, records(&pair.view("data").join("log")));
    let held: Vec<_> = updates(&report).iter().filter(|update| update["data_held"] == true).collect();
    assert!(!held.is_empty(), "{report:#}");
    let dir = Path::new(report["directory"].as_str().unwrap());
    let sets = report["sets"].as_array().unwrap();
    for update in held {
        let set = sets.iter().find(|set| set["number"] == update["set"]).unwrap();
        let file = dir.join(set["file"].as_str().unwrap());
        let inspect = output(Command::new(twinfs_tests::process::twinfs()).arg("inspect").arg(&file));
        assert!(inspect.status.success(), "{}", text(&inspect));
        assert!(text(&inspect).contains("log"), "{}", text(&inspect));
        assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o7777, 0o600);
    }
}

#[test]
fn a_report_that_cannot_be_kept_stops_no_forced_promote_and_is_printed_in_full() {
    let mut pair = Pair::start(Setup { relay: true, ..Setup::default() });
    let log = File::create(pair.mount("data").join("log")).unwrap();
    pair.wait_caught_up();
    assert_eq!(output(&mut pair.command("loss", "chi")).status.code(), Some(1), "nothing was promoted yet");
    // Nothing can be made below a plain file.
    std::fs::write(pair.site("chi").join("loss"), b"").unwrap();
    pair.relay().set(Link { bandwidth: Some(16 << 10), ..Link::default() });
    write_mib(&File::create(pair.mount("data").join("bulk")).unwrap(), 1);
    for number in 0..100 {
        append(&log, number);
    }
    wait_for("tokens", || (pair.number("chi", "tokens_held") >= 100.0).then_some(()));
    pair.primary.as_mut().unwrap().kill();
    wait_for("the replica to notice", || (pair.status("chi")["peer"]["connected"] == false).then_some(()));
    let refused = pair.promote(&[]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("--force"), "{}", text(&refused));
    assert_eq!(pair.status("chi")["role"], "REPLICA");

    let output = pair.promote(&["--force"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("could not be kept"), "{said}");
    let kept = records(&pair.view("data").join("log"));
    for number in kept..100 {
        assert!(said.contains(&format!("log  8 bytes at {}  ", number * 8)), "{number}: {said}");
    }
    assert_eq!(pair.status("chi")["role"], "PROMOTED");
}

#[test]
fn a_planned_promote_reports_that_nothing_is_lost() {
    let pair = Pair::start(Setup::default());
    std::fs::write(pair.mount("data").join("file"), b"x").unwrap();
    let output = pair.promote(&["--planned"]);
    assert!(output.status.success() && text(&output).contains("0 updates lost"), "{}", text(&output));
    let report = loss(&pair);
    assert_eq!((&report["planned"], &report["updates_known"]), (&Value::Bool(true), &0.into()));
    assert_eq!((&report["unknown_after"], updates(&report).len()), (&Value::Null, 0));
}
