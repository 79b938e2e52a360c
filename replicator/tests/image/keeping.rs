//! What was opened before a promote stays as the last group left it, while programs change the plain tree.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use twinfs_core::id::FileId;
use twinfs_core::model::generate::Change;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, AttrList, Op, Update, sample_file};
use twinfs_replicator::replica::image::view::{OpenFile, ViewError};

use crate::support::Site;

/// Data, a hole, and data at the end.
const HOLE_BYTES: u64 = 3 << 20;
const SIZE: u64 = HOLE_BYTES + 6;

/// A site whose tree holds the files `a` and `b`, both alike but for their first byte.
struct Promoted {
    site: Site,
    root: FileId,
    a: FileId,
    b: FileId,
}

impl Promoted {
    fn new() -> Self {
        let (root, a, b) = (sample_file(2), sample_file(12), sample_file(13));
        let mut ops: Vec<(Op, FileId, u64, &[u8])> = Vec::new();
        for (file, name) in [(a, b"a"), (b, b"b")] {
            ops.push((
                Op::Create { dir: root, name: (*name).into(), file, target: Box::default() },
                file,
                0,
                b"",
            ));
            ops.push((Op::Write { file, offset: 0, len: 1 }, file, 1, name));
            ops.push((Op::Write { file, offset: HOLE_BYTES, len: 6 }, file, SIZE, b"before"));
            let value = (*b"old").into();
            ops.push((Op::SetXattr { file, name: (*b"user.x").into(), value }, file, SIZE, b""));
        }
        let changes = ops.into_iter().zip(1..).map(|((op, file, size, data), seq)| {
            let stamp = Stamp { time: Timestamp(seq), seq: Seq(seq) };
            let attrs =
                AttrList::from_iter([(file, attr(0o100_644, 1, size)), (root, attr(0o040_755, 2, 0))]);
            Change { update: Update { stamp, op, attrs }, data: data.to_vec() }
        });
        let changes: Vec<_> = changes.collect();
        let end = changes.len();
        let mut site = Site::new(root, changes, (0..=end).collect());
        site.apply_to(end);
        site.image.checkpoint().unwrap();
        Self { site, root, a, b }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.site.dir.path().join("image/data/tree").join(name)
    }

    fn inode(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().ino()
    }

    fn open(&self, file: FileId) -> OpenFile {
        self.site.image.view().open(self.site.volume, file).unwrap()
    }

    fn read(&self, file: FileId, offset: u64) -> Result<Vec<u8>, ViewError> {
        self.site.image.view().read(self.site.volume, file, offset, 100)
    }

    /// A change of content and attributes, as a program of the new primary makes it.
    fn change(&self, name: &str) {
        self.site.image.before_change(self.inode(name));
        let file = std::fs::File::options().write(true).open(self.path(name)).unwrap();
        file.write_all_at(b"changed", 0).unwrap();
        file.set_len(10).unwrap();
        rustix::fs::setxattr(self.path(name), "user.x", b"new", rustix::fs::XattrFlags::empty()).unwrap();
        rustix::fs::setxattr(self.path(name), "user.y", b"new", rustix::fs::XattrFlags::empty()).unwrap();
        rustix::fs::chmod(self.path(name), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    }

    fn graveyard(&self) -> Vec<PathBuf> {
        let found = std::fs::read_dir(self.site.dir.path().join("image/data/graveyard")).unwrap();
        found.map(|entry| entry.unwrap().path()).collect()
    }

    /// That the view shows a file as it was.
    fn check_kept(&self, file: FileId, name: &[u8]) {
        let (view, volume) = (self.site.image.view(), self.site.volume);
        assert_eq!(view.node(volume, file).unwrap().attr, attr(0o100_644, 1, SIZE));
        assert_eq!(view.read(volume, file, 0, 10).unwrap(), [name, &[0; 9]].concat());
        assert_eq!(view.read(volume, file, HOLE_BYTES - 1, 100).unwrap(), b"\0before");
        assert_eq!(view.read(volume, file, SIZE + 1, 1).unwrap(), b"");
        assert_eq!(view.xattrs(volume, file).unwrap(), [(*b"user.x").into()]);
        assert_eq!(view.xattr(volume, file, b"user.x").unwrap().unwrap(), b"old");
        assert_eq!(view.xattr(volume, file, b"user.y").unwrap(), None);
    }

    fn assert_gone(&self, file: FileId) {
        let (view, volume) = (self.site.image.view(), self.site.volume);
        assert!(matches!(view.node(volume, file), Err(ViewError::Gone)));
        assert!(matches!(view.read(volume, file, 0, 1), Err(ViewError::Gone)));
        assert!(matches!(view.open(volume, file), Err(ViewError::Gone)));
    }
}

fn attr(mode: u32, nlink: u32, size: u64) -> Attr {
    Attr { mode, uid: 0, gid: 0, nlink, rdev: 0, size, mtime_s: 1_700_000_000, mtime_ns: 5 }
}

#[test]
fn an_open_file_stays_what_it_was_when_it_is_changed() {
    let promoted = Promoted::new();
    let (open, image) = (promoted.open(promoted.a), &promoted.site.image);
    image.keep_open_files();
    promoted.check_kept(promoted.a, b"a");
    // A file that is not open is changed without a copy.
    promoted.change("b");
    assert!(promoted.graveyard().is_empty());
    promoted.check_kept(promoted.a, b"a");
    promoted.change("a");
    promoted.check_kept(promoted.a, b"a");
    promoted.change("a");
    promoted.check_kept(promoted.a, b"a");
    let copies = promoted.graveyard();
    assert_eq!(copies.len(), 1);
    let blocks = std::fs::metadata(&copies[0]).unwrap().blocks();
    assert!(blocks * 512 < HOLE_BYTES, "the hole takes no room: {blocks}");
    assert_eq!(std::fs::read(promoted.path("a")).unwrap(), b"changed\0\0\0");
    // Another reader of it may come, and the first may go.
    let again = promoted.open(promoted.a);
    drop(open);
    promoted.check_kept(promoted.a, b"a");
    drop(again);
    assert!(promoted.graveyard().is_empty());
    promoted.assert_gone(promoted.a);
    promoted.change("a");
    assert!(promoted.graveyard().is_empty());
}

#[test]
fn an_open_file_stays_when_its_name_goes() {
    let promoted = Promoted::new();
    let open = promoted.open(promoted.a);
    promoted.site.image.keep_open_files();
    promoted.site.image.before_change(promoted.inode(""));
    std::fs::remove_file(promoted.path("a")).unwrap();
    // An inode number that were free would be taken soon.
    for name in 0..100 {
        std::fs::write(promoted.path(&name.to_string()), "other").unwrap();
    }
    promoted.check_kept(promoted.a, b"a");
    assert!(promoted.graveyard().is_empty());
    drop(open);
    promoted.assert_gone(promoted.a);
}

#[test]
fn until_the_first_change_everything_shows_and_what_is_opened_is_kept() {
    let promoted = Promoted::new();
    let (image, volume) = (&promoted.site.image, promoted.site.volume);
    image.keep_open_files();
    assert_eq!(image.view().list(volume, promoted.root).unwrap().len(), 2);
    let open = promoted.open(promoted.a);
    // A promote that failed half-way is done again.
    image.keep_open_files();
    let view = image.view();
    promoted.change("a");
    promoted.check_kept(promoted.a, b"a");
    // No mixture of groups, also for those who hold a view or a directory of before.
    for view in [view, image.view()] {
        assert!(matches!(view.lookup(volume, promoted.root, b"b"), Err(ViewError::Gone)));
        assert!(matches!(view.list(volume, promoted.root), Err(ViewError::Gone)));
    }
    promoted.assert_gone(promoted.b);
    drop(open);
}

#[test]
fn without_a_promote_nothing_is_kept() {
    let promoted = Promoted::new();
    let open = promoted.open(promoted.a);
    promoted.site.image.before_change(promoted.inode("a"));
    assert!(promoted.graveyard().is_empty());
    promoted.check_kept(promoted.a, b"a");
    drop(open);
}

/// Wherever setting aside fails, the change goes on, and readers get an error and never anything newer.
#[test]
fn what_cannot_be_set_aside_is_unreadable() {
    for calls in 0..20 {
        let promoted = Promoted::new();
        let (open, image) = (promoted.open(promoted.a), &promoted.site.image);
        image.keep_open_files();
        promoted.site.meter.fail_after(calls);
        image.before_change(promoted.inode("a"));
        let failed = promoted.site.meter.has_failed();
        promoted.site.meter.fail_at.store(0, Ordering::SeqCst);
        promoted.change("a");
        if !failed {
            assert!(calls > 3, "only {calls} calls");
            promoted.check_kept(promoted.a, b"a");
            return;
        }
        let read = promoted.read(promoted.a, 0);
        assert!(matches!(&read, Err(ViewError::Tree(e)) if e.raw_os_error() == Some(libc::EIO)), "{read:?}");
        let node = promoted.site.image.view().node(promoted.site.volume, promoted.a).unwrap();
        assert_eq!(node.attr.size, SIZE);
        drop(open);
    }
    panic!("it never succeeds");
}

/// A read that had begun before the promote, or before the first change, and meets the tree after that.
#[test]
fn a_read_that_a_change_overtakes_is_done_again() {
    for promote_first in [true, false] {
        for is_open in [true, false] {
            let promoted = Promoted::new();
            let (open, image) = (is_open.then(|| promoted.open(promoted.a)), &promoted.site.image);
            if promote_first {
                image.keep_open_files();
            }
            let barrier = Arc::new(Barrier::new(2));
            *promoted.site.meter.read_barrier.lock().unwrap() = Some(Arc::clone(&barrier));
            let read = std::thread::scope(|scope| {
                let reader = scope.spawn(|| promoted.read(promoted.a, 0));
                barrier.wait();
                image.keep_open_files();
                promoted.change("a");
                barrier.wait();
                reader.join().unwrap()
            });
            match (is_open, read) {
                (true, Ok(bytes)) => assert_eq!(bytes, [&b"a"[..], &[0; 99]].concat()),
                (false, Err(ViewError::Gone)) => {}
                (_, other) => panic!("{promote_first} {is_open} {other:?}"),
            }
            drop(open);
        }
    }
}

/// Readers in a race with several writers see nothing but what was.
#[test]
fn a_race_shows_nothing_new() {
    for _ in 0..20 {
        let promoted = Promoted::new();
        let open = promoted.open(promoted.a);
        promoted.site.image.keep_open_files();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut rounds = 0;
                while !done.load(Ordering::SeqCst) || rounds == 0 {
                    promoted.check_kept(promoted.a, b"a");
                    rounds += 1;
                }
            });
            let writers = [scope.spawn(|| promoted.change("a")), scope.spawn(|| promoted.change("a"))];
            let written = writers.map(|writer| writer.join());
            done.store(true, Ordering::SeqCst);
            reader.join().unwrap();
            written.into_iter().for_each(|result| result.unwrap());
        });
        drop(open);
        assert!(promoted.graveyard().is_empty());
    }
}
