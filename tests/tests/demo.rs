//! `twinfs demo`: the public command line only, two sites, the primary killed, the replica promoted, the trees compared.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::Command;

use twinfs_tests::pair::mounts_below;
use twinfs_tests::process::{output, twinfs};

#[test]
fn the_demo_shows_it_all() {
    // A directory for temporary files of our own, so that what the demo leaves behind can be found.
    let dir = tempfile::tempdir().unwrap();
    let output = output(Command::new(twinfs()).arg("demo").env("TMPDIR", dir.path()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{errors}", output.status);
    println!("{text}");
    for word in ["init", "mount", "replica", "status", "promote", "SIGKILL", "DUPLEX", "PROMOTED"] {
        assert!(text.contains(word), "the demo does not show {word}:\n{text}");
    }
    let mounts = mounts_below(Path::new("/"));
    let left: Vec<_> = mounts.iter().filter(|point| point.starts_with(dir.path())).collect();
    assert!(left.is_empty(), "still mounted: {left:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}
