//! The link: what status says while it is up, cut, mended; nothing is missing or doubled after it; strangers are refused,
//! and nobody else suffers.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use twinfs_tests::ops::{Actor, Generator, Mix, Rng};
use twinfs_tests::pair::{Pair, Setup, free_port};
use twinfs_tests::process::{Daemon, run, twinfs, wait_for};
use twinfs_tests::relay::Link;
use twinfs_tests::stranger;
use twinfs_tests::{seed, tree};

fn pair_with_relay() -> Pair {
    Pair::start(Setup { relay: true, ..Setup::default() })
}

/// Where the actor works: what it renames must not be the tests' own files.
fn tree_of(pair: &Pair) -> std::path::PathBuf {
    let tree = pair.mount("data").join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    tree
}

#[test]
fn an_idle_session_is_healthy_and_current() {
    let mut pair = pair_with_relay();
    std::fs::write(pair.mount("data").join("f"), b"x").unwrap();
    pair.assert_converged();
    std::thread::sleep(Duration::from_millis(1500));
    for site in ["nyc", "chi"] {
        let status = pair.status(site);
        assert_eq!(status["session_state"], "DUPLEX");
        assert_eq!(status["peer"]["connected"], true);
        assert_eq!(status["behind_bytes"], 0);
        assert_eq!(status["behind_records"], 0);
        assert_eq!(status["exposure_seconds"].as_f64(), Some(0.0));
        assert!(status["reason"].is_null() && status["consistency_time"].is_string(), "{status:#}");
        let (code, line) = pair.check(site, 5.0);
        assert!(code == 0 && line.starts_with("TWINFS OK"), "{code} {line}");
    }
    assert_eq!(pair.status("nyc")["role"], "PRIMARY");
    assert_eq!(pair.status("nyc")["peer"]["name"], "chi");
    assert_eq!(pair.status("chi")["role"], "REPLICA");
    assert_eq!(pair.status("chi")["peer"]["name"], "nyc");
    // Null sets let time advance, at most half a second apart; a busy machine may add some.
    let delays: Vec<f64> = (0..10).map(|_| pair.number("chi", "delay_seconds")).collect();
    let mut sorted = delays.clone();
    sorted.sort_by(f64::total_cmp);
    assert!(sorted[5] < 1.5, "the delay of an idle session stays near zero: {delays:?}");
    // An idle session writes nothing to the disks and little to the link.
    let sets = pair.status("nyc")["sets_sent"].clone();
    let bytes = pair.relay().bytes_to_target();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(pair.status("nyc")["sets_sent"], sets);
    assert!(pair.relay().bytes_to_target() - bytes < 64 << 10);
    // Plain output shows the same, in the words of the design.
    let text = run(&mut pair.command("status", "nyc"));
    for word in ["PRIMARY DUPLEX", "consistency time", "delay", "exposure", "behind", "chi"] {
        assert!(text.contains(word), "{text}");
    }
    assert!(text.lines().count() <= 24, "one screen");
    pair.assert_plain_trees();
}

#[test]
fn a_cut_link_shows_and_heals() {
    let mut pair = pair_with_relay();
    pair.assert_converged();
    pair.relay().cut(true);
    let time = pair.status("chi")["consistency_time"].clone();
    let mut generator = Generator::new(9, Mix::default());
    let mut actor = Actor::new(&tree_of(&pair));
    for _ in 0..500 {
        let operation = generator.next_operation(&pair.source("data").join("tree"));
        let _ = actor.apply(&operation);
    }
    std::fs::write(pair.mount("data").join("while it is cut"), vec![1; 3 << 20]).unwrap();
    pair.wait_status("nyc", "that the link is down", |status| status["peer"]["connected"] == false);
    pair.wait_status("chi", "that the link is down", |status| status["peer"]["connected"] == false);
    let stuck = pair.status("chi")["consistency_time"].clone();
    let first = pair.status("nyc");
    std::thread::sleep(Duration::from_millis(1200));
    std::fs::write(pair.mount("data").join("later"), vec![1; 1 << 20]).unwrap();
    let second = pair.status("nyc");
    let number = |status: &serde_json::Value, name: &str| status[name].as_f64().unwrap();
    assert!(number(&first, "behind_bytes") >= (3 << 20) as f64, "{first:#}");
    assert!(number(&first, "behind_records") > 100.0);
    assert!(number(&second, "exposure_seconds") >= number(&first, "exposure_seconds") + 1.0);
    assert!(number(&second, "behind_bytes") > number(&first, "behind_bytes"));
    assert!(number(&second, "delay_seconds") >= number(&first, "delay_seconds") + 1.0);
    assert!(second["peer"]["last_error"].is_string(), "{second:#}");
    // What was under way when the link was cut may have moved it by a moment; then it stands still.
    assert_eq!(pair.status("chi")["consistency_time"], stuck, "first {time}");
    for site in ["nyc", "chi"] {
        let (code, line) = pair.check(site, 3600.0);
        assert_eq!(code, 1, "within the objective, but the link is down: {line}");
        let (code, line) = pair.check(site, 0.5);
        assert_eq!(code, 2, "beyond the objective: {line}");
    }

    pair.relay().cut(false);
    pair.assert_converged();
    for site in ["nyc", "chi"] {
        let (code, line) = pair.check(site, 30.0);
        assert_eq!(code, 0, "{line}");
    }
    drop(actor);
    pair.assert_plain_trees();
}

#[test]
fn a_dead_primary_never_looks_healthy() {
    let mut pair = Pair::start(Setup::default());
    pair.assert_converged();
    pair.primary.as_mut().unwrap().kill();
    let (code, line) = pair.check("nyc", 3600.0);
    assert!(code == 2 && line.starts_with("TWINFS CRITICAL"), "no daemon: {code} {line}");
    pair.wait_status("chi", "that the primary is gone", |status| status["peer"]["connected"] == false);
    let (code, line) = pair.check("chi", 3600.0);
    assert_ne!(code, 0, "{line}");
    std::thread::sleep(Duration::from_secs(1));
    let (code, line) = pair.check("chi", 0.5);
    assert_eq!(code, 2, "the delay grows: {line}");
}

/// The link goes up and down while programs write, in every direction and at bad times: nothing is missing, nothing twice.
#[test]
fn a_flapping_link_loses_and_doubles_nothing() {
    for run in seed::runs("link", "a_flapping_link_loses_and_doubles_nothing", &[1], 12) {
        let _announced = run.announce();
        let mut pair = pair_with_relay();
        let mut random = Rng(run.seed);
        let mut generator = Generator::new(run.seed, Mix::default());
        let mut actor = Actor::new(&tree_of(&pair));
        let log = pair.mount("data").join("log");
        let mut expected = Vec::new();
        for flap in 0..run.rounds {
            for _ in 0..150 {
                let operation = generator.next_operation(&pair.source("data").join("tree"));
                let _ = actor.apply(&operation);
                // Appending twice, or not at all, would show.
                std::io::Write::write_all(
                    &mut std::fs::File::options().create(true).append(true).open(&log).unwrap(),
                    &expected.len().to_le_bytes(),
                )
                .unwrap();
                expected.extend_from_slice(&expected.len().to_le_bytes());
            }
            let link = match flap % 3 {
                0 => Link { cut: true, ..Link::default() },
                1 => Link { bandwidth: Some(1 << 20), delay: Duration::from_millis(20), ..Link::default() },
                _ => Link { loss_permille: 150, ..Link::default() },
            };
            pair.relay().set(link);
            std::thread::sleep(Duration::from_millis(random.below(600)));
            if random.below(2) == 0 {
                pair.relay().set(Link::default());
            }
        }
        pair.relay().set(Link::default());
        pair.assert_converged();
        assert_eq!(std::fs::read(pair.view("data").join("log")).unwrap(), expected);
        drop(actor);
        pair.assert_plain_trees();
    }
}

/// Either side is stopped and started at a bad time: with sets in flight, with sets unsent.
#[test]
fn restarts_under_load_lose_and_double_nothing() {
    for run in seed::runs("link", "restarts_under_load_lose_and_double_nothing", &[1], 6) {
        let _announced = run.announce();
        let mut pair = pair_with_relay();
        let delay = Duration::from_millis(10);
        pair.relay().set(Link { delay, bandwidth: Some(8 << 20), ..Link::default() });
        let mut random = Rng(run.seed);
        let mut generator = Generator::new(run.seed, Mix::default());
        for round in 0..run.rounds {
            let mut actor = Actor::new(&tree_of(&pair));
            for _ in 0..200 {
                let operation = generator.next_operation(&pair.source("data").join("tree"));
                let _ = actor.apply(&operation);
            }
            std::fs::write(pair.mount("data").join("large"), random.bytes(3 << 20)).unwrap();
            drop(actor);
            match round % 3 {
                0 => {
                    pair.stop_primary();
                    pair.start_primary();
                }
                1 => {
                    pair.stop_replica();
                    pair.start_replica();
                }
                _ => {
                    // The replica must come back from its journal alone.
                    pair.replica.take().unwrap().kill();
                    pair.start_replica();
                }
            }
        }
        pair.relay().set(Link::default());
        pair.assert_converged();
        pair.assert_plain_trees();
    }
}

/// A replica that comes back after a kill shows the group that it had, before any primary connects.
#[test]
fn a_killed_replica_comes_back_from_its_journal() {
    let mut pair = pair_with_relay();
    let mut generator = Generator::new(4, Mix::default());
    let mut actor = Actor::new(&tree_of(&pair));
    for _ in 0..600 {
        let operation = generator.next_operation(&pair.source("data").join("tree"));
        let _ = actor.apply(&operation);
    }
    drop(actor);
    pair.assert_converged();
    let expected = tree::listing(&pair.view("data"), tree::Compare::ALL);
    let group = pair.sampler().group();
    pair.relay().cut(true);
    pair.replica.take().unwrap().kill();
    pair.start_replica();
    wait_for("the volume", || pair.view("data").exists().then_some(()));
    assert!(pair.sampler().group() >= group);
    let found = tree::listing(&pair.view("data"), tree::Compare::ALL);
    assert_eq!(tree::differences(&expected, &found), None);
    pair.relay().cut(false);
    pair.assert_converged();
    pair.assert_plain_trees();
}

#[test]
fn strangers_are_refused_and_the_pair_goes_on() {
    let mut pair = Pair::start(Setup::default());
    let site = |name: &str| pair.root().join(format!("{name}.site"));
    let init = |name: &str, own: &str, authority: Option<&str>| {
        let mut command = std::process::Command::new(twinfs());
        command.arg("init").arg("--site").arg(site(own)).args(["--name", name]);
        if let Some(authority) = authority {
            command.arg("--authority").arg(site(authority));
        }
        run(&mut command);
    };
    // Another authority; the same authority but another site than the replica takes; a site that only borrows the name.
    init("sfo", "sfo", None);
    init("lax", "lax", Some("nyc"));
    init("nyc", "imposter", None);
    for (name, alpn, words) in [
        ("sfo", &b"twinfs/1"[..], &b""[..]),
        ("imposter", b"twinfs/1", b""),
        ("lax", b"twinfs/1", b""),
        ("nyc", b"twinfs/999", b""),
        ("nyc", b"h3", b"GET /"),
    ] {
        let log_before = pair.replica.as_ref().unwrap().log_text().len();
        let end = stranger::knock(&site(name), pair.port, alpn, words);
        println!("{name}, {}: {end:?}", alpn.escape_ascii());
        assert_ne!(end, Ok("nothing happened".to_owned()), "{name} is still connected");
        wait_for("a line in the log", || {
            let log = pair.replica.as_ref().unwrap().log_text();
            log[log_before..].contains("refuse").then_some(())
        });
    }
    stranger::throw_garbage(pair.port, 2000);

    let status = pair.status("chi");
    assert_eq!((&status["session_state"], &status["peer"]["name"]), (&"DUPLEX".into(), &"nyc".into()));
    std::fs::write(pair.mount("data").join("goes on"), b"x").unwrap();
    pair.assert_converged();
    let log = pair.replica.as_ref().unwrap().log_text();
    assert!(!log.contains("panic"), "{log}");
    pair.assert_plain_trees();
}

/// A peer with the right certificate that talks nonsense: refused, and the replica goes on.
#[test]
fn nonsense_from_the_right_site_changes_nothing() {
    let mut pair = Pair::start(Setup::default());
    std::fs::write(pair.mount("data").join("f"), b"x").unwrap();
    pair.assert_converged();
    pair.stop_primary();
    let expected = tree::listing(&pair.view("data"), tree::Compare::ALL);
    let mut random = Rng(3);
    let mut huge = u32::MAX.to_le_bytes().to_vec();
    huge.extend(random.bytes(100_000));
    for words in [&b""[..], b"\0", &[0xff; 3000], &huge] {
        let end = stranger::knock(&pair.site("nyc"), pair.port, b"twinfs/1", words);
        println!("{} bytes: {end:?}", words.len());
    }
    let found = tree::listing(&pair.view("data"), tree::Compare::ALL);
    assert_eq!(tree::differences(&expected, &found), None);
    let log = pair.replica.as_ref().unwrap().log_text();
    assert!(!log.contains("panic"), "{log}");
    pair.start_primary();
    std::fs::write(pair.mount("data").join("goes on"), b"x").unwrap();
    pair.assert_converged();
    pair.assert_plain_trees();
}

/// The primary asks for a site that the peer is not: it says so and goes on serving its programs.
#[test]
fn a_primary_does_not_talk_to_another_site_than_it_was_told() {
    let mut pair = Pair::new(Setup::default());
    pair.start_replica();
    let mut command = pair.command("mount", "nyc");
    command.arg(pair.source("data")).arg(pair.mount("data"));
    command.args(["--to", &format!("lax@127.0.0.1:{}", pair.port)]);
    pair.primary = Some(Daemon::start(&mut command, &pair.root().join("nyc.log")));
    wait_for("the mount", || pair.try_status("nyc"));
    let status =
        pair.wait_status("nyc", "why it is not connected", |status| status["peer"]["last_error"].is_string());
    let error = status["peer"]["last_error"].as_str().unwrap();
    assert!(error.contains("chi") && error.contains("lax"), "{error}");
    std::fs::write(pair.mount("data").join("f"), b"goes on").unwrap();
    assert!(!pair.view("data").exists());
    assert_ne!(pair.check("nyc", 3600.0).0, 0);
    pair.stop_primary();
    assert_eq!(std::fs::read(pair.source("data").join("f")).unwrap(), b"goes on");
}

/// Nobody listens yet: the primary serves its programs, and the copy happens when the replica comes.
#[test]
fn a_primary_waits_for_its_replica() {
    let mut pair = Pair::new(Setup::default());
    std::fs::write(pair.source("data").join("before"), b"x").unwrap();
    pair.start_primary();
    std::fs::write(pair.mount("data").join("meanwhile"), b"x").unwrap();
    assert_ne!(pair.check("nyc", 3600.0).0, 0);
    pair.start_replica();
    pair.wait_duplex();
    pair.assert_converged();
    pair.assert_plain_trees();
    // A port where something else listens does not matter either.
    let _socket = std::net::UdpSocket::bind(("127.0.0.1", free_port())).unwrap();
}
