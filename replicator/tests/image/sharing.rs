//! Readers, groups and checkpoints at the same time; files that leave the tree while they are read; volumes that are
//! copied; and what a small write costs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use twinfs_core::id::{FileId, GroupNumber};
use twinfs_core::model::generate::{Change, Generator, Options};
use twinfs_core::model::{Model, Random};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, AttrList, Op, Update, sample_file};
use twinfs_replicator::replica::image::view::ViewError;

use crate::support::{Journal, Site, run, seeds, view_listing};

/// Every listing that is read while groups are applied and checkpoints run is that of one group.
#[test]
fn readers_see_whole_groups_while_checkpoints_run() {
    for seed in seeds(3) {
        println!("IMAGE_SEED={seed}");
        let options = Options { names_max: 25, sparse: false, ..Options::default() };
        let mut primary = Generator::new(seed, options);
        let root = primary.model().root();
        let (changes, cuts) = run(&mut primary, 500, true, &mut Random::new(seed));
        let mut site = Site::new(root, changes, cuts);
        let mut random = Random::new(!seed);
        // What each group must look like is known before the race.
        let (mut expected, mut ends, mut model) = (BTreeMap::new(), Vec::new(), Model::new(root));
        let mut applied = 0;
        while applied < site.journal.changes.len() {
            let end = site.cut(applied + 1 + random.below(12) as usize);
            site.journal.changes[applied..end].iter().for_each(|c| model.apply(&c.update, &c.data));
            applied = end;
            ends.push(end);
            expected.insert(GroupNumber(ends.len() as u64), (model.clone(), model.listing()));
        }
        let (image, journal, volume) = (&site.image, &site.journal, site.volume);
        let (done, expected) = (AtomicBool::new(false), &expected);
        std::thread::scope(|scope| {
            let stop = StopAtEnd(&done);
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        let view = image.view();
                        let Some((model, listing)) = expected.get(&view.group()) else { continue };
                        let difference = listing.difference(&view_listing(&view, model));
                        assert!(difference.is_empty(), "seed {seed}, group {}:\n{difference}", view.group());
                    }
                });
            }
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    image.checkpoint().unwrap();
                }
            });
            let mut from = 0;
            for (number, end) in ends.iter().enumerate() {
                let number = number as u64 + 1;
                image.apply_group(&journal.group(number, volume, from..*end, true)).unwrap();
                from = *end;
                let view = image.view();
                let (model, listing) = &expected[&GroupNumber(number)];
                let difference = listing.difference(&view_listing(&view, model));
                assert!(difference.is_empty(), "seed {seed}, group {number}:\n{difference}");
            }
            drop(stop);
        });
        site.model = model;
        site.image.checkpoint().unwrap();
        site.check_tree(&format!("seed {seed}"));
    }
}

/// Ends the other threads also when an assertion fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn attr(mode: u32, nlink: u32, size: u64) -> Attr {
    Attr { mode, uid: 0, gid: 0, nlink, rdev: 0, size, mtime_s: 5, mtime_ns: 6 }
}

/// Updates by hand on a root directory and one file.
fn changes(root: FileId, file: FileId, ops: Vec<(Op, Attr, &[u8])>) -> Vec<Change> {
    let stamped = ops.into_iter().zip(1..).map(|((op, attr, data), seq)| {
        let stamp = Stamp { time: Timestamp(seq), seq: Seq(seq) };
        let attrs = AttrList::from_iter([(file, attr), (root, self::attr(0o040_755, 2, 4096))]);
        Change { update: Update { stamp, op, attrs }, data: data.to_vec() }
    });
    stamped.collect()
}

fn create(root: FileId, file: FileId) -> Op {
    Op::Create { dir: root, name: (*b"f").into(), file, target: Box::default() }
}

#[test]
fn a_removed_file_is_readable_as_long_as_it_is_open() {
    let (root, file) = (sample_file(2), sample_file(12));
    let name: Box<[u8]> = (*b"f").into();
    let run = changes(
        root,
        file,
        vec![
            (create(root, file), attr(0o100_644, 1, 0), b""),
            (Op::Write { file, offset: 0, len: 6 }, attr(0o100_644, 1, 6), b"before"),
            (Op::Unlink { dir: root, name, file }, attr(0o100_644, 0, 6), b""),
            (Op::Write { file, offset: 3, len: 3 }, attr(0o100_644, 0, 6), b"ore"),
            (Op::Write { file, offset: 0, len: 3 }, attr(0o100_644, 0, 6), b"AFT"),
        ],
    );
    // The file is in the tree, only in the delta, or was in the tree and is removed, when it goes.
    for checkpoints in [[true, true, true], [false, true, true], [false, false, true], [true, false, false]] {
        let mut site = Site::new(root, run.clone(), (0..=5).collect());
        let checkpoint = |site: &Site, at: usize| {
            if checkpoints[at] {
                site.image.checkpoint().unwrap();
            }
        };
        site.apply_to(2);
        checkpoint(&site, 0);
        let open = site.image.view().open(site.volume, file).unwrap();
        site.apply_to(4);
        checkpoint(&site, 1);
        let read = |site: &Site| site.image.view().read(site.volume, file, 0, 100);
        assert_eq!(read(&site).unwrap(), b"before", "{checkpoints:?}");
        assert_eq!(site.image.view().node(site.volume, file).unwrap().attr.nlink, 0);
        assert!(matches!(site.image.view().open(site.volume, file), Err(ViewError::Gone)));
        site.apply_to(5);
        assert_eq!(read(&site).unwrap(), b"AFTore", "{checkpoints:?}");
        checkpoint(&site, 2);
        assert_eq!(read(&site).unwrap(), b"AFTore", "{checkpoints:?}");
        drop(open);
        site.image.checkpoint().unwrap();
        assert!(matches!(read(&site), Err(ViewError::Gone)));
        site.check_tree(&format!("{checkpoints:?}"));
    }
}

#[test]
fn one_byte_in_a_huge_file_costs_little() {
    let (root, file) = (sample_file(2), sample_file(12));
    let size = 1 << 30;
    let run = changes(
        root,
        file,
        vec![
            (create(root, file), attr(0o100_644, 1, 0), b""),
            (Op::Truncate { file, size }, attr(0o100_644, 1, size), b""),
            (Op::Write { file, offset: 777_777_777, len: 1 }, attr(0o100_644, 1, size), b"x"),
        ],
    );
    let mut site = Site::new(root, run, (0..=3).collect());
    site.apply_to(2);
    site.image.checkpoint().unwrap();
    site.meter.bytes.store(0, Ordering::SeqCst);
    site.apply_to(3);
    site.image.checkpoint().unwrap();
    let bytes = site.meter.bytes.load(Ordering::SeqCst);
    assert!((1..=64 << 10).contains(&bytes), "{bytes} bytes");
    assert_eq!(site.image.view().read(site.volume, file, 777_777_776, 3).unwrap(), b"\0x\0");
    site.check_tree("end");
}

/// A volume that is being copied goes into the tree as it comes, in any pieces, and shows only when it joins.
#[test]
fn a_copied_volume_shows_when_it_joins() {
    for seed in seeds(8) {
        println!("IMAGE_SEED={seed}");
        let mut random = Random::new(!seed);
        let mut primary = Generator::new(seed, Options::default());
        primary.run(300);
        let mut changes = primary.copy();
        for (change, seq) in changes.iter_mut().zip(1..) {
            change.update.stamp.seq = Seq(seq);
        }
        let root = primary.model().root();
        let end = changes.len();
        let mut site = Site::new(root, changes, (0..=end).collect());
        let journal: Arc<Journal> = Arc::clone(&site.journal);
        let mut at = 0;
        while at < end {
            let next = (at + 1 + random.below(40) as usize).min(end);
            site.group += 1;
            let group = journal.group(site.group, site.volume, at..next, false);
            site.image.apply_group(&group).unwrap();
            at = next;
            if random.one_in(2) {
                site.image.checkpoint().unwrap();
            }
            assert_eq!(site.image.view().members().count(), 0);
        }
        site.group += 1;
        site.image.apply_group(&journal.group(site.group, site.volume, end..end, true)).unwrap();
        site.model = primary.model().clone();
        site.applied = end;
        // The links of the last names are known when they are in the tree.
        if site.image.view().members().count() == 0 {
            assert!(site.image.checkpoint_due(0));
            site.image.checkpoint().unwrap();
        }
        site.check_view(&format!("seed {seed}"));
        site.image.checkpoint().unwrap();
        site.check_tree(&format!("seed {seed}"));
        site.restart();
        site.check_view(&format!("seed {seed}, restarted"));
    }
}

#[test]
fn what_does_not_follow_is_refused_and_changes_nothing() {
    use twinfs_replicator::replica::image::ImageError;
    let mut primary = Generator::new(3, Options::default());
    let root = primary.model().root();
    let (changes, cuts) = run(&mut primary, 60, false, &mut Random::new(3));
    let mut site = Site::new(root, changes, cuts);
    site.apply_to(20);
    let journal = Arc::clone(&site.journal);
    let gap = site.image.apply_group(&journal.group(2, site.volume, 25..30, true));
    assert!(matches!(gap, Err(ImageError::Gap { .. })));
    let back = site.image.apply_group(&journal.group(0, site.volume, site.applied..30, true));
    assert!(matches!(back, Err(ImageError::GroupOrder { .. })));
    // What the image has already is passed over.
    site.image.apply_group(&journal.group(1, site.volume, 0..site.applied, true)).unwrap();
    site.check_view("after refusals");
    let other = site.image.add_volume(&crate::support::volume_name(), sample_file(99));
    assert!(matches!(other, Err(ImageError::OtherRoot(_))));
}
