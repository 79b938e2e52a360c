//! What the tests of the capture layer share: a recorder that keeps a list, and a mirror over a temporary directory.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "this is a part of tests")]

pub mod actor;
pub mod replay;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use twinfs::fuse;
use twinfs::mirror::{Layout, Mirror, VolumeSource, open_source};
use twinfs::mount::{MountOptions, Mounted, Unmounted};
use twinfs::recorder::{Pending, Recorder};
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{VolumeIndex, VolumeInstance, VolumeName};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{AttrList, Intent, Note, Op, Update, sample_file};
use twinfs_replicator::primary::sidefile::{Refused, Wanted};

/// An update and its data.
pub type Record = (VolumeIndex, Update, Vec<u8>);

/// Keeps every update, in the order in which they were published.
#[derive(Debug, Default)]
pub struct Tape {
    records: Mutex<(u64, Vec<Record>)>,
    /// Set: nothing may be written any more.
    pub fenced: std::sync::atomic::AtomicBool,
    /// Set: updates are dropped, and noted here.
    dropped: Mutex<Option<ChangeMap>>,
}

struct Slot<'a> {
    tape: &'a Tape,
    volume: VolumeIndex,
    meta_bytes: usize,
    data_bytes: usize,
}

impl Tape {
    /// Takes what was recorded since the last call.
    pub fn take(&self) -> Vec<Record> {
        std::mem::take(&mut self.records.lock().unwrap().1)
    }

    /// Drops updates from now on, and notes what they touched.
    pub fn suspend(&self) {
        self.dropped.lock().unwrap().get_or_insert_default();
    }

    /// Keeps updates again; what was left of an earlier resync is merged into what was noted. Returns that.
    pub fn resume(&self, left: ChangeMap) -> ChangeMap {
        let mut map = left;
        map.merge(self.dropped.lock().unwrap().take().unwrap_or_default());
        let pending =
            self.reserve(VOLUME, &Intent::Names { first: (sample_file(1), b"-"), second: None }, 99, 0);
        let _stamp = pending.unwrap().publish(Op::Resync, AttrList::new(), &[]);
        map
    }
}

impl Tape {
    /// Puts what was taken back in front.
    pub fn put_back(&self, mut records: Vec<Record>) {
        let mut kept = self.records.lock().unwrap();
        records.append(&mut kept.1);
        kept.1 = records;
    }
}

impl Recorder for Tape {
    fn reserve<'a>(
        &'a self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Box<dyn Pending + 'a>, Refused> {
        if self.fenced.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(Refused::Fenced);
        }
        let mut encoded = Vec::new();
        intent.encode(&mut encoded);
        assert!(encoded.len() <= Intent::BYTES_MAX);
        Ok(Box::new(Slot { tape: self, volume, meta_bytes, data_bytes }))
    }

    fn reserve_all<'a>(
        &'a self,
        volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn Pending + 'a>>, Refused> {
        let each =
            |wanted: &Wanted<'_>| self.reserve(volume, &wanted.intent, wanted.meta_bytes, wanted.data_bytes);
        wanted.iter().map(each).collect()
    }
}

impl Pending for Slot<'_> {
    fn note(&self, _note: Note) {}

    fn publish(self: Box<Self>, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        if let Some(dropped) = self.tape.dropped.lock().unwrap().as_mut() {
            dropped.note(&op, &attrs);
            return None;
        }
        let mut records = self.tape.records.lock().unwrap();
        records.0 += 1;
        let number = records.0;
        let stamp = Stamp { time: Timestamp(number), seq: Seq(number) };
        let mut encoded = Vec::new();
        twinfs_core::update::encode(&Update { stamp, op, attrs }, &mut encoded);
        assert!(encoded.len() <= self.meta_bytes, "an update is longer than was reserved");
        assert!(data.len() <= self.data_bytes, "data is longer than was reserved");
        let (update, len) = twinfs_core::update::decode(&encoded, 0).expect("what is captured can be read");
        assert_eq!(len, encoded.len());
        assert_eq!(update.op.data_len() as usize, data.len());
        records.1.push((self.volume, update, data.to_vec()));
        Some(stamp)
    }
}

/// The index of the only volume.
pub const VOLUME: VolumeIndex = VolumeIndex(0);

/// A mirror of one directory.
pub fn mirror_of(source: &Path, recorder: Arc<dyn Recorder>) -> Arc<Mirror> {
    let volume = VolumeSource {
        index: VOLUME,
        name: VolumeName::new("data").unwrap(),
        instance: VolumeInstance::new(7).unwrap(),
        root: open_source(source).unwrap(),
    };
    Arc::new(Mirror::new(vec![volume], recorder, Layout::SingleVolume).unwrap())
}

/// A directory below the one for temporary files, its mirror mounted beside it, and what the mirror records.
pub struct Mirrored {
    pub source: PathBuf,
    pub mountpoint: PathBuf,
    pub tape: Arc<Tape>,
    pub mirror: Arc<Mirror>,
    mounted: Option<Mounted>,
    _dir: tempfile::TempDir,
}

impl Mirrored {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, mountpoint) = (dir.path().join("source"), dir.path().join("mount"));
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&mountpoint).unwrap();
        let tape = Arc::new(Tape::default());
        let mirror = mirror_of(&source, tape.clone());
        let mounted = fuse::mount(mirror.clone(), &mountpoint, &MountOptions::default()).unwrap();
        Self { source, mountpoint, tape, mirror, mounted: Some(mounted), _dir: dir }
    }

    /// Unmounts, cleanly.
    pub fn unmount(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            assert_eq!(mounted.unmount().unwrap(), Unmounted::Clean);
        }
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            let _ = mounted.unmount();
        }
    }
}
