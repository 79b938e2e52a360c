//! The source is changed while it is not mounted: the next mount finds that, and mends the replica in one step.
#![allow(clippy::unwrap_used, reason = "tests may")]

use std::os::unix::fs::FileExt;

use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::tree::{self, Compare};

fn filled() -> Pair {
    let mut pair = Pair::start(Setup::default());
    fixture::fill(&pair.mount("data"), Amounts { files: 200, bytes: 20_000 }, 1);
    std::fs::create_dir_all(pair.mount("data").join("one/two")).unwrap();
    std::fs::write(pair.mount("data").join("one/two/file"), b"content").unwrap();
    std::fs::write(pair.mount("data").join("gone"), b"gone").unwrap();
    pair.wait_caught_up();
    pair.stop_primary();
    pair
}

#[test]
fn changes_behind_the_back_are_found_and_read_again() {
    let mut pair = filled();
    let shown = tree::listing(&pair.view("data"), Compare::ALL);
    let source = pair.source("data");
    let file = std::fs::File::options().write(true).open(source.join("one/two/file")).unwrap();
    file.write_all_at(b"CON", 0).unwrap();
    drop(file);
    std::fs::remove_file(source.join("gone")).unwrap();
    std::fs::create_dir(source.join("new")).unwrap();
    std::fs::write(source.join("new/inside"), b"inside").unwrap();
    std::os::unix::fs::symlink("inside", source.join("new/link")).unwrap();
    std::fs::rename(source.join("one/two"), source.join("moved")).unwrap();
    assert_eq!(tree::differences(&shown, &tree::listing(&pair.view("data"), Compare::ALL)), None);
    pair.start_primary();
    // Programs write on meanwhile.
    std::fs::write(pair.mount("data").join("moved/while it looks"), b"x").unwrap();
    pair.wait_duplex();
    pair.assert_converged();
    // It is a session like any other afterwards, and the next stop is clean.
    std::fs::write(pair.mount("data").join("after"), b"x").unwrap();
    pair.wait_caught_up();
    pair.assert_plain_trees();
}

#[test]
fn where_nothing_was_changed_nothing_is_read_again() {
    let mut pair = filled();
    let group = pair.sampler().group();
    for _ in 0..3 {
        pair.start_primary();
        pair.wait_duplex();
        assert_eq!(pair.sampler().group(), group, "nothing travels");
        assert!(pair.status("nyc")["reason"].is_null());
        pair.stop_primary();
    }
    pair.start_primary();
    pair.wait_duplex();
    pair.assert_plain_trees();
}
