//! Bounds: a full sidefile suspends and programs go on at full speed; a slow link paces them and loses nothing; a full disk
//! at the replica suspends and tears nothing.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use twinfs_tests::loop_fs::LoopFs;
use twinfs_tests::ops::Rng;
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::wait_for;
use twinfs_tests::relay::Link;
use twinfs_tests::tree::{self, Compare};

const MIB: u64 = 1 << 20;
const SIDEFILE: u64 = 16 * MIB;

fn small_sidefile() -> Vec<String> {
    vec!["--sidefile".into(), SIDEFILE.to_string()]
}

fn random_block(random: &mut Rng) -> Vec<u8> {
    let mut block = vec![0; MIB as usize / 4];
    block.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next_u64().to_le_bytes()));
    block
}

/// Writes `bytes` in quarters of a MiB; each write must succeed. Returns the longest time that one took.
fn write_through(file: &File, bytes: u64, random: &mut Rng) -> Duration {
    let mut longest = Duration::ZERO;
    let mut at = 0;
    while at < bytes {
        let block = random_block(random);
        let start = Instant::now();
        file.write_all_at(&block, at).unwrap();
        longest = longest.max(start.elapsed());
        at += block.len() as u64;
    }
    longest
}

#[test]
fn a_full_sidefile_suspends_and_programs_go_on() {
    let mut pair = Pair::start(Setup { relay: true, mount_args: small_sidefile(), ..Setup::default() });
    let mut random = Rng(1);
    std::fs::write(pair.mount("data").join("before"), b"mirrored").unwrap();
    pair.assert_converged();
    pair.relay().cut(true);
    pair.wait_status("nyc", "that the link is down", |status| status["peer"]["connected"] == false);
    let group = pair.status("chi")["group"].clone();
    let shown = tree::listing(&pair.view("data"), Compare::ALL);
    // What fits is captured; what comes after it is not, and nobody waits.
    std::fs::write(pair.mount("data").join("captured"), b"fits").unwrap();
    let file = File::create(pair.mount("data").join("flood")).unwrap();
    let longest = write_through(&file, 4 * SIDEFILE, &mut random);
    println!("the longest write took {longest:?}");
    let status = pair.wait_status("nyc", "SUSPENDED", |status| status["session_state"] == "SUSPENDED");
    let reason = status["reason"].as_str().unwrap();
    assert!(["LINK", "LAG"].iter().any(|word| reason.contains(word)), "{reason}");
    let (code, line) = pair.check("nyc", 1e9);
    assert_eq!(code, 2, "{line}");
    assert!(pair.number("nyc", "store_bytes") <= pair.number("nyc", "store_bytes_max"));
    // Some of the sidefile is for its slots.
    let max = pair.number("nyc", "store_bytes_max");
    assert!(max <= SIDEFILE as f64 && max >= SIDEFILE as f64 * 0.75, "{max}");
    // Everything goes on to work, and to be what was written.
    std::fs::create_dir(pair.mount("data").join("dir")).unwrap();
    std::fs::rename(pair.mount("data").join("flood"), pair.mount("data").join("dir/flood")).unwrap();
    assert_eq!(pair.status("chi")["group"], group);
    assert_eq!(tree::differences(&shown, &tree::listing(&pair.view("data"), Compare::ALL)), None);

    // Mended, the session goes on by itself: see `resync.rs`.
    pair.relay().cut(false);
    pair.wait_status("nyc", "DUPLEX", |status| status["session_state"] == "DUPLEX");
    assert!(pair.status("nyc")["reason"].is_null());
    pair.assert_converged();
    drop(file);
    pair.assert_plain_trees();
}

#[test]
fn a_slow_link_paces_writers_and_loses_nothing() {
    let mut pair = Pair::start(Setup { relay: true, mount_args: small_sidefile(), ..Setup::default() });
    pair.relay().set(Link { bandwidth: Some(12 * MIB), ..Link::default() });
    let file = File::create(pair.mount("data").join("stream")).unwrap();
    let longest = write_through(&file, 5 * SIDEFILE, &mut Rng(2));
    println!("the longest write took {longest:?}");
    assert_eq!(pair.status("nyc")["session_state"], "DUPLEX", "a slow link is no dead one");
    pair.assert_converged();
    drop(file);
    pair.assert_plain_trees();
}

#[test]
fn a_full_disk_at_the_replica_suspends_and_tears_nothing() {
    let small = LoopFs::new("ext4", 192 << 20);
    let replica_site = Some(small.path().join("chi.site"));
    let mut pair = Pair::start(Setup { replica_site, relay: true, ..Setup::default() });
    let mut random = Rng(3);
    // A pair of files that must be equal at every instant but for one step.
    let write_pair = |n: u64| {
        for name in ["a", "b"] {
            std::fs::write(pair.mount("data").join(name), format!("{n:20}")).unwrap();
        }
    };
    write_pair(0);
    pair.assert_converged();
    let file = File::create(pair.mount("data").join("flood")).unwrap();
    let mut n = 0;
    while pair.status("chi")["session_state"] != "SUSPENDED" {
        n += 1;
        assert!(n < 300, "a replica of 192 MiB took {n} MiB: {:#}", pair.status("chi"));
        for quarter in 0..4 {
            let block = random_block(&mut random);
            file.write_all_at(&block, n * MIB + quarter * block.len() as u64).unwrap();
        }
        write_pair(n);
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("suspended after {n} MiB");
    let reason = pair.status("chi")["reason"].clone();
    assert!(reason.as_str().is_some_and(|reason| reason.contains("JOURNAL")), "{reason}");
    assert_eq!(pair.check("chi", 1e9).0, 2);
    pair.wait_status("nyc", "SUSPENDED too", |status| status["session_state"] == "SUSPENDED");
    write_pair(n + 1);

    // What is shown is whole: one instant, readable in full, and the same after a restart.
    let view = pair.view("data");
    let number =
        |name: &str| -> u64 { std::fs::read_to_string(view.join(name)).unwrap().trim().parse().unwrap() };
    let (a, b) = (number("a"), number("b"));
    assert!((a == b || a == b + 1) && a > 0, "{a} {b}");
    // A checkpoint makes room in the journal, and the session goes on by itself; without a link it goes no further than
    // what has come.
    pair.relay().cut(true);
    let (group, shown) = wait_for("a listing of one group", || {
        let (group, listing) = pair.sampler().sample(|| tree::try_listing(&view, Compare::ALL).ok())?;
        Some((group, listing?))
    });
    let replica = pair.replica.as_mut().unwrap();
    replica.signal(rustix::process::Signal::TERM);
    let status = replica.wait();
    println!("the replica with the full disk ended with {status}");
    pair.replica = None;
    pair.start_replica();
    if pair.sampler().try_group() == Some(group) {
        assert_eq!(tree::differences(&shown, &tree::listing(&view, Compare::ALL)), None);
    }
    let (a_now, b_now) = (number("a"), number("b"));
    assert!((a_now == b_now || a_now == b_now + 1) && a_now >= a, "{a_now} {b_now}");
    drop(file);
    drop(pair);
}
