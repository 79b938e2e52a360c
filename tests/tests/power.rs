//! The power of either site is cut, on ext4 and xfs, while programs write: the file system below it stops at once, and
//! what was not made durable there is gone. What was acknowledged is not: to programs by fsync, to the primary by the
//! replica.
//!
//! The cut is the shutdown ioctl on a loop-mounted file system. It does not wait for calls under way, of which some return
//! success in error: `without_twinfs` shows what of that is not twinfs's doing, with the same programs and checks.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::{Duration, Instant};

use twinfs_tests::loads::fsx::Fsx;
use twinfs_tests::loads::pages::Pages;
use twinfs_tests::loads::rows::Rows;
use twinfs_tests::loads::{Load, Loads};
use twinfs_tests::loop_fs::LoopFs;
use twinfs_tests::ops::Rng;
use twinfs_tests::pair::Setup;
use twinfs_tests::scene::{Scene, setup};
use twinfs_tests::seed;

/// Room for segments of the journal beside what must stay free.
const BYTES: u64 = 2 << 30;

/// The native control: the programs straight on the file system.
fn without_twinfs(kind: &str, test: &'static str) {
    for run in seed::runs("power", test, &[1], 5) {
        let _announced = run.announce();
        let mut fs = LoopFs::new(kind, BYTES);
        let work = tempfile::tempdir().unwrap();
        std::fs::write(fs.path().join("mounted"), b"").unwrap();
        let mode = if run.seed.is_multiple_of(2) { "delete" } else { "wal" };
        let (rows_load, rows) = Rows::create(&fs.path().join("rows.db"), mode);
        let (pages_load, pages) = Pages::create(&fs.path().join("pages"));
        rustix::fs::syncfs(std::fs::File::open(fs.path()).unwrap()).unwrap();
        let loads: Vec<(Box<dyn Load>, _)> = vec![
            (Box::new(rows_load), Duration::from_millis(1)),
            (Box::new(pages_load), Duration::ZERO),
            (Box::new(Fsx::new(&fs.path().join("fsx"), work.path(), run.seed)), Duration::from_millis(50)),
        ];
        let loads = Loads::start(loads);
        let mut rng = Rng(run.seed);
        for _ in 0..run.rounds {
            loads.wait_connected();
            loads.wait_steps(20);
            std::thread::sleep(Duration::from_millis(rng.below(500)));
            loads.stay_lost();
            let at = Instant::now();
            rows.power_cut(at);
            pages.power_cut(at);
            fs.cut_power();
            loads.wait_lost();
            fs.remount();
            loads.connect_again();
        }
        loads.wait_connected();
        println!("{} rows, {} pages", rows.last(), pages.last());
        drop(loads);
    }
}

#[test]
fn without_twinfs_on_ext4() {
    without_twinfs("ext4", "without_twinfs_on_ext4");
}

#[test]
fn without_twinfs_on_xfs() {
    without_twinfs("xfs", "without_twinfs_on_xfs");
}

fn replica_loses_power(kind: &str, test: &'static str) {
    for run in seed::runs("power", test, &[1], 6) {
        let _announced = run.announce();
        let mut fs = LoopFs::new(kind, BYTES);
        let mut scene =
            Scene::start(Setup { replica_site: Some(fs.path().join("chi.site")), ..setup() }, run.seed, true);
        for round in 0..run.rounds {
            let start = Instant::now();
            scene.work();
            scene.cut_power_of_replica(&mut fs);
            // Once more, while it catches up.
            if scene.rng.below(2) == 0 {
                std::thread::sleep(Duration::from_millis(scene.rng.below(300)));
                scene.cut_power_of_replica(&mut fs);
            }
            scene.converge();
            println!("round {round}: {:.1} s", start.elapsed().as_secs_f64());
        }
        scene.end();
    }
}

#[test]
fn replica_loses_power_on_ext4() {
    replica_loses_power("ext4", "replica_loses_power_on_ext4");
}

#[test]
fn replica_loses_power_on_xfs() {
    replica_loses_power("xfs", "replica_loses_power_on_xfs");
}

fn primary_loses_power(kind: &str, test: &'static str) {
    for run in seed::runs("power", test, &[1], 6) {
        let _announced = run.announce();
        let mut fs = LoopFs::new(kind, BYTES);
        let mut scene = Scene::start(Setup { primary_dir: Some(fs.path()), ..setup() }, run.seed, false);
        for round in 0..run.rounds {
            let start = Instant::now();
            scene.work();
            scene.cut_power_of_primary(&mut fs);
            scene.converge();
            println!("round {round}: {:.1} s", start.elapsed().as_secs_f64());
        }
        scene.end();
    }
}

#[test]
fn primary_loses_power_on_ext4() {
    primary_loses_power("ext4", "primary_loses_power_on_ext4");
}

#[test]
fn primary_loses_power_on_xfs() {
    primary_loses_power("xfs", "primary_loses_power_on_xfs");
}
