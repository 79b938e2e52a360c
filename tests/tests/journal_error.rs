//! The disk of the replica's journal fails, for real: the file system below it is shut down, after which every write and
//! every sync answers EIO. The journal is failed for good, that is said, nothing is acknowledged, and no program notices.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;

use twinfs_tests::loop_fs::{LoopFs, unmount};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::run;
use twinfs_tests::tree::{self, Compare};

/// A mount that goes with the test.
struct Bound(PathBuf);

impl Bound {
    /// Shows a directory at another place.
    fn new(from: &Path, to: &Path) -> Self {
        std::fs::create_dir_all(from).unwrap();
        std::fs::create_dir_all(to).unwrap();
        run(Command::new("mount").arg("--bind").args([from, to]));
        Self(to.to_owned())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

fn journal_fails_on(kind: &str) {
    let disk = LoopFs::new(kind, 2 << 30);
    let mut pair = Pair::new(Setup::default());
    let bound = Bound::new(&disk.path().join("journal"), &pair.site("chi").join("journal"));
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    std::fs::write(pair.mount("data").join("before"), b"mirrored").unwrap();
    pair.assert_converged();
    let group = pair.number("chi", "group");
    let shown = tree::listing(&pair.view("data"), Compare::ALL);

    run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(disk.path()));
    std::fs::write(pair.mount("data").join("after"), b"not acknowledged").unwrap();
    let is_error = |status: &serde_json::Value| {
        let reason = status["reason"].as_str().unwrap_or_default();
        status["session_state"] == "SUSPENDED" && reason.starts_with("ERROR: cannot ")
    };
    pair.wait_status("chi", "SUSPENDED(ERROR), and its cause", is_error);
    let behind = |status: &serde_json::Value| status["behind_records"].as_u64() > Some(0);
    pair.wait_status("nyc", "that updates are not durable there", behind);
    // Programs go on, whatever it takes the replica to find out again and again.
    for round in 0..20 {
        std::fs::write(pair.mount("data").join(format!("more {round}")), b"more").unwrap();
        assert!(is_error(&pair.status("chi")), "the first cause stays the reason");
        assert!(behind(&pair.status("nyc")), "nothing was acknowledged");
    }
    assert_eq!(pair.number("chi", "group"), group, "no group is shown that is not durable");
    assert_eq!(tree::differences(&shown, &tree::listing(&pair.view("data"), Compare::ALL)), None);

    // With another start, on a disk that works, the medium tells what there is, and the rest comes again.
    pair.stop_replica();
    drop(bound);
    let image = disk.path().with_file_name("image");
    unmount(&disk.path());
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(disk.path()));
    let _bound = Bound::new(&disk.path().join("journal"), &pair.site("chi").join("journal"));
    pair.start_replica();
    pair.assert_converged();
    assert!(pair.view("data").join("more 19").exists());
    pair.stop_primary();
    pair.stop_replica();
}

#[test]
fn a_journal_on_ext4_that_fails_is_failed_for_good_and_said() {
    journal_fails_on("ext4");
}

#[test]
fn a_journal_on_xfs_that_fails_is_failed_for_good_and_said() {
    journal_fails_on("xfs");
}
