//! The replica's mount shows, to real programs and system calls, exactly what the model says of the group.
//!
//! Needs root and /dev/fuse.

#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

#[allow(dead_code, reason = "the tests of the image need more of it")]
#[path = "../../replicator/tests/image/support.rs"]
mod image;

use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use image::{Journal, Site, run, tree_listing};
use twinfs::mount::{MountOptions, Mounted, Unmounted};
use twinfs::replica_view::{self, Report};
use twinfs_core::id::FileId;
use twinfs_core::model::generate::{Change, Generator, Options};
use twinfs_core::model::{Model, Random};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, AttrList, Op, Update, sample_file};
use twinfs_replicator::replica::image::Image;

struct Texts;

impl Report for Texts {
    fn lag(&self) -> String {
        "0.00".to_owned()
    }

    fn consistency_time(&self) -> String {
        "then".to_owned()
    }
}

/// An image, mounted; unmounted when it is dropped, also by a failing test.
struct Replica {
    image: Arc<Image>,
    journal: Arc<Journal>,
    volume: twinfs_core::id::VolumeIndex,
    mounted: Option<Mounted>,
    point: tempfile::TempDir,
    group: u64,
    applied: usize,
    _dir: tempfile::TempDir,
}

impl Replica {
    fn new(root: FileId, changes: Vec<Change>) -> Self {
        let Site { dir, journal, image, volume, .. } = Site::new(root, changes, Vec::new());
        let options = MountOptions { read_only: true, trusted: false, ..MountOptions::default() };
        let (image, point) = (Arc::new(image), tempfile::tempdir().unwrap());
        let mounted =
            replica_view::mount(Arc::clone(&image), Arc::new(Texts), point.path(), &options).unwrap();
        Self { image, journal, volume, mounted: Some(mounted), point, group: 0, applied: 0, _dir: dir }
    }

    fn apply_to(&mut self, end: usize) {
        self.group += 1;
        let group = self.journal.group(self.group, self.volume, self.applied..end, true);
        self.image.apply_group(&group).unwrap();
        self.applied = end;
    }

    fn volume_dir(&self) -> PathBuf {
        self.point.path().join("data")
    }

    fn report(&self, name: &str) -> String {
        std::fs::read_to_string(self.point.path().join(".twinfs").join(name)).unwrap()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let how = self.mounted.take().unwrap().unmount().unwrap();
        if !std::thread::panicking() {
            assert_eq!(how, Unmounted::Clean);
        }
    }
}

#[test]
fn the_mount_shows_what_the_model_says() {
    for seed in 0..4 {
        println!("seed {seed}");
        // Sparse files are read in full here.
        let options = Options { sparse: false, names_max: 30, ..Options::default() };
        let mut primary = Generator::new(seed, options);
        let root = primary.model().root();
        let mut random = Random::new(!seed);
        let (changes, cuts) = run(&mut primary, 150, seed % 2 == 1, &mut random);
        let mut replica = Replica::new(root, changes);
        let mut model = Model::new(root);
        assert_eq!(names(replica.point.path()), [".twinfs"], "before the first group no volume shows");
        while replica.applied < replica.journal.changes.len() {
            let wanted = replica.applied + 1 + random.below(40) as usize;
            let last = replica.journal.changes.len();
            let end = cuts.iter().copied().find(|cut| *cut >= wanted).unwrap_or(last);
            replica.journal.changes[replica.applied..end]
                .iter()
                .for_each(|change| model.apply(&change.update, &change.data));
            replica.apply_to(end);
            if random.one_in(3) {
                replica.image.checkpoint().unwrap();
            }
            let difference = model.listing().difference(&tree_listing(&replica.volume_dir()));
            assert!(difference.is_empty(), "seed {seed}, group {}:\n{difference}", replica.group);
            assert_eq!(replica.report("group"), format!("{}\n", replica.group));
        }
        assert_eq!(names(replica.point.path()), [".twinfs", "data"]);
        let reports = replica.point.path().join(".twinfs");
        assert_eq!(names(&reports), ["consistency_time", "group", "lag"]);
        assert_eq!(replica.report("lag"), "0.00\n");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const SCRIPT: &[u8] = b"#!/bin/sh\necho ran \"$1\"\n";

/// A file `f` that is a program, written again by the second group, removed by the third.
fn one_file() -> (FileId, Vec<Change>) {
    let (root, file) = (sample_file(2), sample_file(12));
    let attr = |nlink, size| Attr {
        mode: 0o100_755,
        uid: 0,
        gid: 0,
        nlink,
        rdev: 0,
        size,
        mtime_s: -5,
        mtime_ns: 999_999_999,
    };
    let dir = Attr { mode: 0o040_755, nlink: 2, ..attr(1, 4096) };
    let name: Box<[u8]> = (*b"f").into();
    let len = SCRIPT.len() as u32;
    let size = u64::from(len);
    let ops = [
        (
            Op::Create { dir: root, name: name.clone(), file, target: Box::default() },
            attr(1, 0),
            b"".as_slice(),
        ),
        (Op::Write { file, offset: 0, len }, attr(1, size), SCRIPT),
        (Op::Write { file, offset: 15, len: 3 }, attr(1, size), b"did"),
        (Op::Unlink { dir: root, name, file }, attr(0, size), b""),
    ];
    let changes = ops.into_iter().zip(1..).map(|((op, attr, data), seq)| {
        let stamp = Stamp { time: Timestamp(seq), seq: Seq(seq) };
        let attrs = AttrList::from_iter([(file, attr), (root, dir)]);
        Change { update: Update { stamp, op, attrs }, data: data.to_vec() }
    });
    (root, changes.collect())
}

#[test]
fn programs_read_map_and_run_what_shows() {
    let (root, changes) = one_file();
    let mut replica = Replica::new(root, changes);
    replica.apply_to(2);
    let path = replica.volume_dir().join("f");
    let output =
        |path: &Path| String::from_utf8(Command::new(path).arg("well").output().unwrap().stdout).unwrap();
    assert_eq!(output(&path), "ran well\n");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o755);
    let mut open = std::fs::File::open(&path).unwrap();
    assert_eq!(mapped(&path), SCRIPT);

    replica.apply_to(3);
    assert_eq!(output(&path), "did well\n");
    let changed = [&SCRIPT[..15], b"did", &SCRIPT[18..]].concat();
    assert_eq!(mapped(&path), changed, "a new mapping shows the new group");
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, changed, "so does an open file");

    replica.apply_to(4);
    assert!(!path.exists());
    replica.image.checkpoint().unwrap();
    open.seek(SeekFrom::Start(0)).unwrap();
    bytes.clear();
    open.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, changed, "a removed file is readable while it is open");
    assert_eq!(std::fs::read_dir(replica.volume_dir()).unwrap().count(), 0);
}

/// The content by way of a shared mapping, made by another program: to map is unsafe.
fn mapped(path: &Path) -> Vec<u8> {
    let python = "import mmap,sys; f=open(sys.argv[1],'rb'); \
                  sys.stdout.buffer.write(mmap.mmap(f.fileno(),0,mmap.MAP_SHARED,mmap.PROT_READ)[:])";
    let output = Command::new("python3").arg("-c").arg(python).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn nothing_can_be_written() {
    let (root, changes) = one_file();
    let mut replica = Replica::new(root, changes);
    replica.apply_to(2);
    let path = replica.volume_dir().join("f");
    let refused = |result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
    };
    refused(std::fs::write(&path, "x"));
    refused(std::fs::remove_file(&path));
    refused(std::fs::create_dir(replica.volume_dir().join("d")));
    refused(std::fs::create_dir(replica.point.path().join("d")));
    refused(std::fs::write(replica.point.path().join(".twinfs/group"), "7"));
    refused(std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)));
    refused(std::fs::rename(&path, replica.volume_dir().join("g")));
}
