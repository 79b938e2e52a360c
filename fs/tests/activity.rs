//! The activity log under real programs: whatever they are told is durable is in the log, durably.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use twinfs::fuse;
use twinfs::mirror::{Layout, Mirror, VolumeSource, open_source};
use twinfs::mount::{MountOptions, Mounted};
use twinfs::recorder::Logged;
use twinfs_core::id::{SessionId, VolumeIndex, VolumeInstance, VolumeName};
use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::activity_log::{ActivityConfig, ActivityLog, Found};
use twinfs_replicator::primary::sidefile::{Capture, Start, StartVolume, bytes_min};
use twinfs_replicator::storage::{Fault, Operation, SimStorage};

const SESSION: SessionId = SessionId::from_bytes([7; 16]);

/// A mounted mirror with a sidefile and a log, which is flushed only when somebody asks for it.
struct Site {
    disk: SimStorage,
    capture: Arc<Capture>,
    log: Arc<ActivityLog>,
    mount: PathBuf,
    mounted: Option<Mounted>,
    _dir: tempfile::TempDir,
}

fn open(disk: &SimStorage) -> (ActivityLog, Found) {
    let config = ActivityConfig { flush_ns: None, ..ActivityConfig::default() };
    ActivityLog::open(Arc::new(disk.clone()), SESSION, Timestamp(1), config).unwrap()
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, mount) = (dir.path().join("source"), dir.path().join("mount"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&mount).unwrap();
        let start = Start {
            session: SESSION,
            volumes: &[StartVolume::NEW],
            floor: Timestamp::ZERO,
            limit: Timestamp(u64::MAX),
        };
        let capture = Arc::new(Capture::create(&dir.path().join("sidefile"), bytes_min(), &start).unwrap());
        let disk = SimStorage::new(1);
        let log = Arc::new(open(&disk).0);
        let volume = VolumeSource {
            index: VolumeIndex(0),
            name: VolumeName::new("data").unwrap(),
            instance: VolumeInstance::new(7).unwrap(),
            root: open_source(&source).unwrap(),
        };
        let recorder = Arc::new(Logged::new(Arc::clone(&capture), Arc::clone(&log)));
        let mirror = Arc::new(Mirror::new(vec![volume], recorder, Layout::SingleVolume).unwrap());
        let mounted = Some(fuse::mount(mirror, &mount, &MountOptions::default()).unwrap());
        Self { disk, capture, log, mount, mounted, _dir: dir }
    }

    /// Inode numbers that a start after a power loss is told.
    fn found(&self) -> BTreeSet<u64> {
        let (_, found) = open(&self.disk.crash(0));
        assert!(!found.everything);
        found.files.iter().map(|(_, file)| file.ino).collect()
    }

    /// A file with its entry in the log, in an era that went: nothing is known of it any more.
    fn forgotten_file(&self, name: &str) -> File {
        let file = File::create(self.mount.join(name)).unwrap();
        self.forget();
        file
    }

    fn forget(&self) {
        let era = self.log.end_era(&|| self.capture.now()).unwrap();
        self.log.release(era).unwrap();
        assert_eq!(self.found(), BTreeSet::new());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            let _ = mounted.unmount();
        }
    }
}

fn ino(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

#[test]
fn what_a_program_was_told_is_durable_is_in_the_log() {
    let site = Site::new();
    let again = |name: &str, flags: OFlags| {
        drop(site.forgotten_file(name));
        let path = site.mount.join(name);
        OpenOptions::new().write(true).custom_flags(flags.bits().cast_signed()).open(path).unwrap()
    };
    type Way = fn(&File);
    let write: Way = |file| file.write_all_at(&[7; 4096], 0).unwrap();
    let ways: [(&str, OFlags, Way); 8] = [
        ("fsync", OFlags::empty(), |file| file.sync_all().unwrap()),
        ("fdatasync", OFlags::empty(), |file| file.sync_data().unwrap()),
        ("sync", OFlags::SYNC, write),
        ("dsync", OFlags::DSYNC, write),
        ("direct", OFlags::DIRECT, write),
        ("truncate", OFlags::SYNC, |file| file.set_len(10).unwrap()),
        ("one write", OFlags::empty(), |file| {
            pwritev2(file, &[IoSlice::new(b"safe")], 0, ReadWriteFlags::DSYNC).unwrap();
        }),
        ("set later", OFlags::empty(), |file| {
            rustix::fs::fcntl_setfl(file, OFlags::DIRECT).unwrap();
            file.write_all_at(&[7; 4096], 0).unwrap();
        }),
    ];
    for (name, flags, safe) in ways {
        let file = again(name, flags);
        if flags.is_empty() {
            file.write_all_at(b"not yet", 0).unwrap();
            assert_eq!(site.found(), BTreeSet::new(), "{name}: a plain write promises nothing");
        }
        safe(&file);
        assert_eq!(site.found(), BTreeSet::from([ino(&file)]), "{name}");
    }
}

#[test]
fn names_are_in_the_log_with_their_directories() {
    let site = Site::new();
    let dir = site.mount.join("dir");
    fs::create_dir(&dir).unwrap();
    let file = site.forgotten_file("file");
    let (root, inside) = (File::open(&site.mount).unwrap(), File::open(&dir).unwrap());

    fs::rename(site.mount.join("file"), dir.join("file")).unwrap();
    assert_eq!(site.found(), BTreeSet::new());
    inside.sync_all().unwrap();
    assert_eq!(site.found(), BTreeSet::from([ino(&root), ino(&inside), ino(&file)]));

    site.forget();
    file.write_all_at(b"logged before", 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(site.found(), BTreeSet::from([ino(&file)]));
    fs::rename(dir.join("file"), site.mount.join("back")).unwrap();
    file.sync_all().unwrap();
    assert_eq!(site.found(), BTreeSet::from([ino(&root), ino(&inside), ino(&file)]), "with its new name");
}

#[test]
fn a_suspended_session_still_logs() {
    let site = Site::new();
    let file = site.forgotten_file("file");
    site.capture.suspend();
    file.write_all_at(b"dropped", 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(site.found(), BTreeSet::from([ino(&file)]));
}

#[test]
fn a_log_that_fails_suspends_the_session_and_programs_go_on() {
    let site = Site::new();
    let file = site.forgotten_file("file");
    site.disk.inject(Fault { operation: Operation::SyncData, after: 0, errno: Errno::IO });
    file.write_all_at(b"captured", 0).unwrap();
    assert!(!site.capture.fill().suspended);
    file.sync_all().expect("the program's own disk is well");
    assert!(site.capture.fill().suspended);
    file.write_all_at(b"dropped", 0).unwrap();
    file.sync_all().unwrap();
    assert!(open(&site.disk.crash(0)).1.everything);
}
