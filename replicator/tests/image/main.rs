//! The image over real directories: what shows after each group, and what stands in the plain tree after a checkpoint, is
//! what the naive model says; also after a crash between any two steps.
//!
//! `IMAGE_SEED=n cargo test -p twinfs-replicator --test image` replays one seed. `IMAGE_TEST_ON_TMP=1` runs on the file
//! system of the temporary directory instead of in memory.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod keeping;
mod sharing;
mod support;

use support::{Site, run, seeds, tree_listing};
use twinfs_core::model::Random;
use twinfs_core::model::generate::{Generator, Options};

fn options(seed: u64) -> Options {
    Options { names_max: [8, 25, 60][seed as usize % 3], shifts: seed % 5 != 4, ..Options::default() }
}

fn site(seed: u64, updates: usize) -> Site {
    println!("IMAGE_SEED={seed}");
    let mut primary = Generator::new(seed, options(seed));
    let root = primary.model().root();
    let (changes, cuts) = run(&mut primary, updates, seed % 4 == 1, &mut Random::new(seed));
    Site::new(root, changes, cuts)
}

#[test]
fn the_view_is_the_model_after_each_group_and_the_tree_after_each_checkpoint() {
    for seed in seeds(24) {
        let mut random = Random::new(!seed);
        let mut site = site(seed, 300);
        while site.applied < site.journal.changes.len() {
            site.apply_to(site.applied + 1 + random.below(40) as usize);
            site.check_view(&format!("seed {seed}, group {}", site.group));
            match random.below(6) {
                0 | 1 => {
                    site.image.checkpoint().unwrap();
                    let what = format!("seed {seed}, checkpoint at group {}", site.group);
                    site.check_tree(&what);
                    site.check_view(&what);
                }
                2 => {
                    site.restart();
                    site.check_view(&format!("seed {seed}, restart at group {}", site.group));
                }
                _ => {}
            }
        }
        site.image.checkpoint().unwrap();
        site.check_tree(&format!("seed {seed}, end"));
    }
}

/// One crash at each step of one checkpoint, each on a site of its own.
#[test]
fn a_crash_between_any_two_steps_of_a_checkpoint_is_made_good() {
    for seed in seeds(3) {
        for crash_after in 0.. {
            let mut random = Random::new(seed << 32 | crash_after);
            let mut site = site(seed, 220);
            site.apply_to(120);
            site.image.checkpoint().unwrap();
            site.apply_to(200);
            site.meter.fail_after(crash_after);
            let ended = site.image.checkpoint().is_ok();
            let crashed = site.meter.has_failed();
            assert!(ended || crashed);
            let what = format!("seed {seed}, crash after {crash_after} steps");
            site.restart();
            site.check_view(&what);
            if random.one_in(2) {
                site.apply_to(site.applied + 1 + random.below(14) as usize);
                site.check_view(&format!("{what}, went on"));
            }
            site.image.checkpoint().unwrap();
            site.check_tree(&what);
            site.check_view(&what);
            if !crashed {
                assert!(crash_after > 50, "{crash_after} steps are few");
                break;
            }
        }
    }
}

/// Crashes after crashes, in the redo too, over a long run.
#[test]
fn crashes_one_after_the_other_are_made_good() {
    for seed in seeds(12) {
        let mut random = Random::new(!seed);
        let mut site = site(seed, 400);
        while site.applied < site.journal.changes.len() {
            site.apply_to(site.applied + 1 + random.below(30) as usize);
            let crash_after = random.below(150);
            site.meter.fail_after(crash_after);
            let what = format!("seed {seed}, group {}, crash after {crash_after} steps", site.group);
            if site.image.checkpoint().is_err() {
                site.restart();
                site.check_view(&what);
            } else {
                site.restart();
                site.check_tree(&what);
            }
        }
        site.image.checkpoint().unwrap();
        site.check_tree(&format!("seed {seed}, end"));
    }
}

#[test]
fn a_checkpoint_that_failed_can_be_repeated_without_a_restart() {
    for seed in seeds(6) {
        for fail_after in (0..200).step_by(17) {
            let mut site = site(seed, 90);
            site.apply_to(40);
            site.image.checkpoint().unwrap();
            site.apply_to(70);
            site.meter.fail_after(fail_after);
            let failed = site.image.checkpoint().is_err();
            site.meter.fail_at.store(0, std::sync::atomic::Ordering::SeqCst);
            let what = format!("seed {seed}, failed after {fail_after} steps: {failed}");
            site.check_view(&what);
            site.apply_to(90);
            site.check_view(&what);
            // The first writes what had been frozen, the second what came since.
            site.image.checkpoint().unwrap();
            site.check_view(&what);
            site.image.checkpoint().unwrap();
            site.check_tree(&what);
        }
    }
}

#[test]
fn the_tree_can_be_told_from_itself_when_the_table_is_lost() {
    let mut site = site(7, 200);
    site.apply_to(150);
    site.image.checkpoint().unwrap();
    let dir = site.dir.path().to_path_buf();
    let before = tree_listing(&dir.join("image/data/tree"));
    let (journal, volume, applied) = (std::sync::Arc::clone(&site.journal), site.volume, site.applied);
    let Site { dir: _keep, image, .. } = site;
    drop(image);
    let found = twinfs_replicator::replica::image::rebuild::rebuild(&dir).unwrap();
    assert!(found > 5);
    let image = support::open(&dir, &journal, &std::sync::Arc::default()).unwrap();
    image.apply_group(&journal.group(2, volume, applied..journal.changes.len(), true)).unwrap();
    image.checkpoint().unwrap();
    assert_ne!(before, tree_listing(&dir.join("image/data/tree")));
}
