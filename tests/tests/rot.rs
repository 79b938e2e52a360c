//! The replica's journal rots: it shows what is certainly right, says so, and is repaired from the primary by itself.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use twinfs_replicator::failpoint::FailPoint;
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::wait_for;

/// Checkpoints only come when they are waited for.
const NEVER: &str = "3600000";
const OFTEN: &str = "100";

fn setup() -> Setup {
    let env = vec![("TWINFS_TEST_CHECKPOINT_MS", NEVER.into())];
    Setup { volumes: vec![("a", "src0"), ("b", "src1")], env, relay: true, ..Setup::default() }
}

/// Programs have written twice: what the replica's trees hold, and what only its journal holds.
fn written() -> Pair {
    let mut pair = Pair::new(setup());
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    write(&pair, "old");
    pair.wait_caught_up();
    // A clean stop checkpoints.
    pair.stop("chi");
    pair.start_replica();
    pair.wait_duplex();
    write(&pair, "new");
    pair.wait_caught_up();
    pair
}

fn write(pair: &Pair, text: &str) {
    for volume in ["a", "b"] {
        let mount = pair.mount(volume);
        for round in 0..20 {
            let dir = mount.join(format!("dir-{}", round % 4));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(format!("file-{round}")), text.repeat(1000 + round)).unwrap();
        }
        std::fs::write(mount.join(text), text).unwrap();
        // Something that is there in one of the two only, and something that moves.
        match text {
            "old" => std::fs::write(mount.join("goes"), text).unwrap(),
            _ => {
                std::fs::remove_file(mount.join("goes")).unwrap();
                std::fs::rename(mount.join("dir-3"), mount.join("dir-0/moved")).unwrap();
                std::fs::hard_link(mount.join("new"), mount.join("dir-1/link")).unwrap();
            }
        }
    }
}

fn segments(pair: &Pair) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(pair.site("chi").join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "seg"))
        .collect();
    found.sort();
    found
}

/// The entries of a kind in a segment: where their headers stand.
fn entries(segment: &Path, kind: u8) -> Vec<u64> {
    let bytes = std::fs::read(segment).unwrap();
    let blocks = (4096..bytes.len().saturating_sub(64)).step_by(8);
    blocks
        .filter(|at| bytes[*at..].starts_with(b"TWJE") && bytes[at + 4] == kind)
        .map(|at| at as u64)
        .collect()
}

fn flip(segment: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(segment).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

/// A commit somewhere in the second half of what is not in the trees rots.
fn rot(pair: &Pair, kind: u8) {
    let segment = segments(pair).pop().unwrap();
    let found = entries(&segment, kind);
    flip(&segment, found[found.len() * 3 / 4] + 70);
}

fn is_damaged(status: &serde_json::Value) -> bool {
    let reason = status["reason"].as_str().unwrap_or_default();
    status["session_state"] == "SUSPENDED"
        && reason.starts_with("ERROR: the journal is damaged (")
        && reason.contains("is read again from the primary")
}

/// What only the trees held, or a later group; but nothing that never was.
fn assert_whole(pair: &Pair) {
    for volume in ["a", "b"] {
        let view = pair.view(volume);
        assert_eq!(std::fs::read(view.join("old")).unwrap(), b"old");
        for round in 0..20 {
            let places = [format!("dir-{}", round % 4), "dir-0/moved".into()];
            let file = places.iter().map(|dir| view.join(dir).join(format!("file-{round}")));
            let found = file.filter_map(|path| std::fs::read(path).ok()).next().unwrap();
            let known = ["old", "new"].map(|text| text.repeat(1000 + round).into_bytes());
            // A file that was being written is empty, or shorter, in a group of its own.
            let is_one = known.iter().any(|known| known.starts_with(&found));
            assert!(is_one, "file-{round} of {volume} is none that was ever written");
        }
    }
}

#[test]
fn a_journal_that_rots_is_repaired_by_itself() {
    let mut pair = written();
    for kind in [2, 1] {
        let told = pair.number("nyc", "group");
        pair.relay().cut(true);
        pair.kill("chi");
        rot(&pair, kind);
        // Meanwhile programs go on.
        std::fs::write(pair.mount("a").join("meanwhile"), [kind]).unwrap();
        pair.start_replica();
        let status = pair.wait_status("chi", "what is going on", is_damaged);
        assert!(status["group"].as_f64().unwrap() < told, "{status}");
        assert_whole(&pair);
        let aside = pair.site("chi").join(format!("journal.damaged-{}", 3 - kind));
        assert!(aside.join("00000001.seg").exists());

        // It stays so over a restart, and the repair may be cut off.
        pair.kill("chi");
        pair.start_replica();
        pair.wait_status("chi", "the same", is_damaged);
        pair.relay().cut(false);
        pair.wait_duplex();
        pair.assert_converged();
        assert_eq!(std::fs::read(pair.view("a").join("meanwhile")).unwrap(), [kind]);
        // Something that can rot once more.
        std::fs::write(pair.mount("b").join("again"), [kind; 9000]).unwrap();
        for round in 0..8 {
            std::fs::write(pair.mount("b").join(format!("again-{round}")), [kind; 9000]).unwrap();
            pair.wait_caught_up();
        }
    }
    pair.assert_plain_trees();
}

#[test]
fn a_checkpoint_of_groups_that_rotted_shows_nothing_until_it_is_repaired() {
    let mut pair = written();
    pair.relay().cut(true);
    pair.kill("chi");
    pair.set_env("TWINFS_TEST_CHECKPOINT_MS", OFTEN);
    pair.fail_at(Some(("chi", format!("{}:3", FailPoint::CheckpointAttach.name()))));
    pair.spawn("chi");
    pair.wait_killed("chi");
    pair.fail_at(None);
    rot(&pair, 2);
    pair.start_replica();
    let status = pair.wait_status("chi", "what is going on", is_damaged);
    assert!(status["reason"].as_str().unwrap().contains("nothing can be shown"), "{status}");
    assert!(!pair.view("a").exists() && !pair.view("b").exists(), "a tree between two groups is not shown");
    let refused = pair.promote(&["--force"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("there is no group to promote"), "{why}");

    pair.relay().cut(false);
    pair.wait_duplex();
    pair.assert_converged();
    pair.assert_plain_trees();
}

#[test]
fn a_promote_amid_a_repair_gives_the_group_that_is_left_and_says_what_is_gone() {
    let mut pair = written();
    pair.relay().cut(true);
    pair.kill("chi");
    rot(&pair, 2);
    pair.start_replica();
    pair.wait_status("chi", "what is going on", is_damaged);
    let output = pair.promote(&["--force"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("The journal here was damaged"), "{text}");
    assert!(text.contains("Nothing is known of what the primary wrote after"), "{text}");
    wait_for("the writable mount", || std::fs::write(pair.view("a").join("on"), b"goes on").ok());
    assert_whole(&pair);
}
