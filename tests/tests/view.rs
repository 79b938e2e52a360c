//! The replica's view: read-only in every respect, and it tells which group it shows.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::wait_for;
use twinfs_tests::tree::{self, Compare};

/// Longer than a replica puts off a checkpoint.
const UNTIL_CHECKPOINT: Duration = Duration::from_secs(8);

/// Every call that would change something below `root`, which holds what the fixture made.
fn mutations(root: &Path) -> Vec<(&'static str, Result<(), Errno>)> {
    let file = root.join("links/one");
    let dir = root.join("kinds/empty directory");
    let new = root.join("new");
    let mode = Mode::from_raw_mode(0o644);
    let time = Timespec { tv_sec: 1, tv_nsec: 1 };
    let times = Timestamps { last_access: time, last_modification: time };
    let open = |flags: OFlags| rustix::fs::openat(CWD, &file, flags, mode).map(drop);
    let user = (Some(Uid::from_raw(1)), Some(Gid::from_raw(1)));
    let exchange = RenameFlags::EXCHANGE;
    vec![
        ("open to write", open(OFlags::WRONLY)),
        ("open to read and write", open(OFlags::RDWR)),
        ("open to truncate", open(OFlags::RDONLY | OFlags::TRUNC)),
        ("open to append", open(OFlags::WRONLY | OFlags::APPEND)),
        ("create", rustix::fs::openat(CWD, &new, OFlags::CREATE | OFlags::RDWR, mode).map(drop)),
        ("mkdir", rustix::fs::mkdirat(CWD, &new, mode)),
        ("mknod", rustix::fs::mknodat(CWD, &new, FileType::Fifo, mode, 0)),
        ("symlink", rustix::fs::symlinkat("x", CWD, &new)),
        ("link", rustix::fs::linkat(CWD, &file, CWD, &new, AtFlags::empty())),
        ("unlink", rustix::fs::unlinkat(CWD, &file, AtFlags::empty())),
        ("rmdir", rustix::fs::unlinkat(CWD, &dir, AtFlags::REMOVEDIR)),
        ("rename", rustix::fs::renameat(CWD, &file, CWD, &new)),
        ("exchange", rustix::fs::renameat_with(CWD, &file, CWD, root.join("links/two"), exchange)),
        ("chmod", rustix::fs::chmod(&file, mode)),
        ("chown", rustix::fs::chown(&file, user.0, user.1)),
        ("utimens", rustix::fs::utimensat(CWD, &file, &times, AtFlags::empty())),
        ("setxattr", rustix::fs::setxattr(&file, "user.x", b"1", XattrFlags::empty())),
        ("removexattr", rustix::fs::removexattr(root.join("attributes/xattrs"), "user.empty")),
    ]
}

#[test]
fn nothing_can_be_changed() {
    let mut pair = Pair::new(Setup::default());
    fixture::fill(&pair.source("data"), Amounts { files: 100, bytes: 1000 }, 1);
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    pair.assert_converged();
    let before = tree::listing(&pair.view("data"), Compare::ALL);
    for (call, result) in mutations(&pair.view("data")) {
        assert_eq!(result, Err(Errno::ROFS), "{call}");
    }
    let mode = Mode::from_raw_mode(0o755);
    assert_eq!(rustix::fs::mkdirat(CWD, pair.view_root().join("volume"), mode), Err(Errno::ROFS));
    assert_eq!(rustix::fs::renameat(CWD, pair.view("data"), CWD, pair.view("other")), Err(Errno::ROFS));
    let own = pair.view_root().join(".twinfs/group");
    assert_eq!(std::fs::write(own, b"7").unwrap_err().raw_os_error(), Some(Errno::ROFS.raw_os_error()));
    assert_eq!(tree::differences(&before, &tree::listing(&pair.view("data"), Compare::ALL)), None);

    // Neither set-user-ID programs nor devices of the primary work here.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let point = pair.view_root().display().to_string();
    let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(&point)).unwrap();
    let options: Vec<&str> = line.split(' ').nth(3).unwrap().split(',').collect();
    for option in ["ro", "nosuid", "nodev"] {
        assert!(options.contains(&option), "{line}");
    }
    pair.assert_plain_trees();
}

#[test]
fn it_tells_its_group_its_time_and_its_lag() {
    let mut pair = Pair::start(Setup::default());
    pair.assert_converged();
    let own = pair.view_root().join(".twinfs");
    let read = |name: &str| std::fs::read_to_string(own.join(name)).unwrap();
    let first = pair.sampler().group();
    std::fs::write(pair.mount("data").join("f"), b"x").unwrap();
    wait_for("a later group", || (pair.sampler().group() > first).then_some(()));
    pair.wait_caught_up();
    let group = pair.sampler().group();
    assert!(pair.status("chi")["group"].as_u64().unwrap() >= group);
    let lag: f64 = read("lag").trim().trim_end_matches('s').trim().parse().unwrap();
    assert!((0.0..60.0).contains(&lag), "{lag}");
    let time = read("consistency_time");
    // A UTC timestamp with microseconds, as everywhere.
    assert!(time.trim().len() == 27 && time.trim().ends_with('Z'), "{time}");
    wait_for("the consistency time to advance", || (read("consistency_time") != time).then_some(()));
    // An open file does not keep what it once said.
    let open = File::open(own.join("consistency_time")).unwrap();
    let say = || {
        let mut bytes = [0; 100];
        let len = open.read_at(&mut bytes, 0).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    };
    let said = say();
    wait_for("the open file to say something else", || (say() != said).then_some(()));
    // It is there, but `ls -a` at most shows it; the volumes are what counts.
    assert!(own.join("group").is_file());
    pair.assert_plain_trees();
}

/// A file that is open at the replica goes on to show the newest group, and a file that goes away stays readable.
#[test]
fn open_files_follow_the_groups() {
    let mut pair = Pair::start(Setup::default());
    let (source, view) = (pair.mount("data").join("f"), pair.view("data").join("f"));
    std::fs::write(&source, b"first").unwrap();
    pair.wait_caught_up();
    let open = File::open(&view).unwrap();
    let read = || {
        let mut bytes = [0; 100];
        let len = open.read_at(&mut bytes, 0).unwrap();
        bytes[..len].to_vec()
    };
    assert_eq!(read(), b"first");
    File::options().write(true).open(&source).unwrap().write_all_at(b"second", 0).unwrap();
    wait_for("the second text", || (read() == b"second").then_some(()));
    std::fs::remove_file(&source).unwrap();
    wait_for("the name to go", || (!view.exists()).then_some(()));
    assert_eq!(read(), b"second");
    drop(open);
    pair.assert_converged();
    pair.assert_plain_trees();
}

/// One byte in a large file costs the replica a byte or so, not the file.
#[test]
fn a_small_write_to_a_large_file_is_cheap() {
    let mut pair = Pair::start(Setup::default());
    let path = pair.mount("data").join("large");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    let block = vec![5; 1 << 20];
    for at in 0..64 {
        file.write_all_at(&block, at << 24).unwrap();
    }
    pair.wait_caught_up();
    // A clean stop checkpoints what came before.
    pair.stop_replica();
    pair.start_replica();
    pair.wait_duplex();
    std::thread::sleep(Duration::from_secs(2));
    let pid = pair.replica.as_ref().unwrap().pid();
    let io = || {
        let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let value = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().parse().unwrap()
        };
        (value("rchar:"), value("wchar:"))
    };
    // What polling and the session itself cost, in the same time without the write.
    let (before, view) = (io(), File::open(pair.view("data").join("large")).unwrap());
    let mut byte = [0];
    view.read_at(&mut byte, (7 << 24) + 12_345).unwrap();
    assert_eq!(byte, [5]);
    std::thread::sleep(UNTIL_CHECKPOINT);
    let quiet = io();
    file.write_all_at(b"!", (7 << 24) + 12_345).unwrap();
    wait_for("the byte", || {
        view.read_at(&mut byte, (7 << 24) + 12_345).unwrap();
        (byte == *b"!").then_some(())
    });
    std::thread::sleep(UNTIL_CHECKPOINT);
    let after = io();
    let read = (after.0 - quiet.0).saturating_sub(quiet.0 - before.0);
    let written = (after.1 - quiet.1).saturating_sub(quiet.1 - before.1);
    println!("read {read} bytes, wrote {written} bytes");
    assert!(read + written <= 64 << 10, "read {read} bytes, wrote {written} bytes");
    drop((file, view));
    pair.assert_converged();
}
