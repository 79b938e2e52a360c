//! Full disks on either site, under a program that writes all the time and gets no error that its own directory did not give.
//! The session is SUSPENDED and says why, and goes on by itself when there is room again.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use serde_json::Value;
use twinfs_tests::loop_fs::{LoopFs, unmount};
use twinfs_tests::ops::{Actor, Generator, Mix, Rng};
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::{run, wait_for};
use twinfs_tests::tree::{self, Compare};

const MIB: u64 = 1 << 20;

/// Takes all the room of a file system, to the last block, and what is freed later, too; dropped, it gives it back.
struct Filler {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    fn fill(dir: &Path) -> Self {
        let path = dir.join("filler");
        let mut file = File::create(&path).unwrap();
        let mut fill = move || {
            for size in [MIB as usize, 64 << 10, 4096, 512] {
                while file.write_all(&vec![0x5a; size]).and_then(|()| file.sync_data()).is_ok() {}
            }
        };
        fill();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                fill();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { path, stop, thread: Some(thread) }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
        drop(std::fs::remove_file(&self.path));
    }
}

/// A program that makes, changes, syncs, renames and removes files, and gets no error.
struct Program {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Program {
    fn start(dir: PathBuf) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            let mut random = Rng(9);
            while !stopping.load(Ordering::Relaxed) {
                let round = counted.fetch_add(1, Ordering::Relaxed);
                let name = dir.join(format!("file {}", round % 20));
                let file = File::options().create(true).truncate(false).write(true).open(&name).unwrap();
                file.write_all_at(&random.bytes(3000), round % 7 * 1000).unwrap();
                match round % 5 {
                    0 => file.sync_all().unwrap(),
                    1 => file.sync_data().unwrap(),
                    2 if name.exists() => {
                        std::fs::rename(&name, dir.join(format!("moved {}", round % 4))).unwrap()
                    }
                    3 if round % 3 == 0 => std::fs::remove_file(&name).unwrap(),
                    _ => {}
                }
            }
        });
        Self { stop, rounds, thread: Some(thread) }
    }

    /// Waits until it has done more.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_for("the program to go on", || {
            (self.rounds.load(Ordering::Relaxed) > before + 10).then_some(())
        });
    }

    fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().expect("a program got an error");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn is_suspended(status: &Value, what: &str) -> bool {
    let reason = status["reason"].as_str().unwrap_or_default();
    status["session_state"] == "SUSPENDED" && reason.contains(what) && reason.contains("when there is room")
}

fn is_well(status: &Value) -> bool {
    status["session_state"] == "DUPLEX" && status["reason"].is_null()
}

fn primary_on(disk: &LoopFs) -> Pair {
    let primary_site = Some(disk.path().join("nyc.site"));
    let mount_args = vec!["--sidefile".into(), (16 * MIB).to_string()];
    Pair::start(Setup { primary_site, mount_args, ..Setup::default() })
}

fn primarys_site_is_full_on(kind: &str, bytes: u64) {
    let disk = LoopFs::new(kind, bytes);
    let mut pair = primary_on(&disk);
    let program = Program::start(pair.mount("data"));
    program.goes_on();
    for _ in 0..2 {
        let filler = Filler::fill(&disk.path());
        let status = pair.wait_status("nyc", "SUSPENDED, and why", |status| is_suspended(status, "no space"));
        println!("{}", status["reason"]);
        assert_eq!(pair.check("nyc", 1e9).0, 2);
        let behind = pair.number("chi", "group");
        program.goes_on();
        std::fs::write(pair.mount("data").join("meanwhile"), format!("{behind}")).unwrap();
        drop(filler);
        pair.wait_status("nyc", "DUPLEX again", is_well);
        program.goes_on();
    }
    program.finish();
    pair.assert_converged();
    pair.assert_plain_trees();
}

#[test]
fn a_full_site_directory_of_the_primary_suspends_on_ext4() {
    primarys_site_is_full_on("ext4", 64 * MIB);
}

#[test]
fn a_full_site_directory_of_the_primary_suspends_on_xfs() {
    primarys_site_is_full_on("xfs", 320 * MIB);
}

/// Killed, and then told to stop, while nothing can be written: nothing of what changed is lost.
#[test]
fn a_primary_that_ends_on_a_full_site_directory_loses_nothing() {
    let disk = LoopFs::new("ext4", 64 * MIB);
    let mut pair = primary_on(&disk);
    for end in ["kill", "stop"] {
        std::fs::write(pair.mount("data").join("both have it"), end).unwrap();
        pair.assert_converged();
        let filler = Filler::fill(&disk.path());
        std::fs::write(pair.mount("data").join("early"), end).unwrap();
        pair.wait_status("nyc", "SUSPENDED, and why", |status| is_suspended(status, "no space"));
        std::fs::write(pair.mount("data").join("dropped"), end).unwrap();
        std::fs::remove_file(pair.mount("data").join("both have it")).unwrap();
        if end == "kill" {
            pair.kill("nyc");
            pair.primary = None;
        } else {
            let mut daemon = pair.primary.take().unwrap();
            daemon.signal(rustix::process::Signal::TERM);
            let status = daemon.wait();
            assert!(!status.success() && daemon.log_text().contains("no space left"), "it is said: {status}");
        }
        drop(filler);
        pair.start_primary();
        pair.wait_status("nyc", "DUPLEX again", is_well);
        pair.assert_converged();
    }
    pair.assert_plain_trees();
}

/// A mount that goes with the test.
struct Bound(PathBuf);

impl Bound {
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

/// The journal has room, the plain trees have not.
#[test]
fn a_checkpoint_on_a_full_disk_suspends_both_sites() {
    let disk = LoopFs::new("ext4", 64 * MIB);
    let roomy = tempfile::tempdir().unwrap();
    let replica_site = Some(disk.path().join("chi.site"));
    let env = vec![("TWINFS_TEST_CHECKPOINT_MS", "200".to_owned())];
    let mut pair = Pair::new(Setup { replica_site, env, ..Setup::default() });
    let bound = Bound::new(roomy.path(), &pair.site("chi").join("journal"));
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    std::fs::create_dir(pair.mount("data").join("dir")).unwrap();
    let program = Program::start(pair.mount("data").join("dir"));
    program.goes_on();
    for round in 0..2 {
        let filler = Filler::fill(&disk.path());
        let large = Rng(round).bytes(2 * MIB as usize);
        std::fs::write(pair.mount("data").join(format!("large {round}")), large).unwrap();
        let status =
            pair.wait_status("chi", "SUSPENDED, and why", |status| is_suspended(status, "plain trees"));
        println!("{}", status["reason"]);
        pair.wait_status("nyc", "the same", |status| is_suspended(status, "plain trees"));
        // What shows goes on to show.
        let shown = tree::listing(&pair.view("data"), Compare::ALL);
        program.goes_on();
        assert_eq!(tree::differences(&shown, &tree::listing(&pair.view("data"), Compare::ALL)), None);
        drop(filler);
        pair.wait_status("chi", "DUPLEX again", is_well);
        pair.wait_status("nyc", "DUPLEX again", is_well);
    }
    program.finish();
    pair.assert_converged();
    pair.assert_plain_trees();
    drop(bound);
}

/// Errors of the source's own directory go to the program as they are, and leave no record; a short write leaves the record
/// of what was written.
#[test]
fn a_full_source_gives_its_own_errors_and_stays_mirrored() {
    let disk = LoopFs::new("ext4", 64 * MIB);
    let site = tempfile::tempdir().unwrap();
    let primary_site = Some(site.path().join("nyc.site"));
    let mut pair = Pair::start(Setup { primary_dir: Some(disk.path()), primary_site, ..Setup::default() });
    let mount = pair.mount("data");
    let tree_dir = mount.join("tree");
    std::fs::create_dir(&tree_dir).unwrap();
    let mut generator = Generator::new(11, Mix::default());
    let mut actor = Actor::new(&tree_dir);
    let mut act = |pair: &Pair, operations| {
        for _ in 0..operations {
            let operation = generator.next_operation(&pair.source("data").join("tree"));
            let _ = actor.apply(&operation);
        }
    };
    act(&pair, 200);
    let mut random = Rng(12);
    // Data in every other block: to zero all of it takes room.
    let sieve = File::create(mount.join("sieve")).unwrap();
    for block in 0..2048 {
        sieve.write_all_at(&random.bytes(4096), block * 8192).unwrap();
    }
    for round in 0..3 {
        let path = mount.join(format!("flood {round}"));
        let file = File::create(&path).unwrap();
        let mut written = 0;
        // Odd sizes, so that the last write is a short one.
        let failed = loop {
            match file.write_at(&random.bytes(700_001), written) {
                Ok(bytes) => written += bytes as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(failed.raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()), "{failed}");
        assert_eq!(file.metadata().unwrap().len(), written, "what was answered is what is there");
        // Contents of a range in which a call failed on the way are read again.
        let failed = fallocate(&sieve, FallocateFlags::ZERO_RANGE, 2048 + round * 16384, 8 * MIB);
        assert_eq!(failed, Err(rustix::io::Errno::NOSPC));
        act(&pair, 150);
        assert!(is_well(&pair.status("nyc")), "{:#}", pair.status("nyc"));
        pair.wait_status("nyc", "that nothing is behind", |status| status["behind_records"] == 0);
        drop(file);
        if round < 2 {
            std::fs::remove_file(&path).unwrap();
            // A removed file goes when the kernel has let go of it.
            wait_for("room in the source", || std::fs::write(&path, [7; MIB as usize]).ok());
            std::fs::remove_file(&path).unwrap();
            act(&pair, 50);
            pair.assert_converged();
        }
    }
    // While it is full there is no room for marks, so the trees are waited for.
    let same = || {
        tree::differences(
            &tree::listing(&mount, Compare::ALL),
            &tree::listing(&pair.view("data"), Compare::ALL),
        )
    };
    wait_for("the replica to show the full source", || same().is_none().then_some(()));
    drop(actor);
    pair.assert_plain_trees();
}
