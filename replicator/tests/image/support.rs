//! What the tests of the image have in common: a journal in memory, listings of views and of real directories, and a tree
//! that counts and fails.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use rustix::fs::{SeekFrom, seek};
use twinfs_core::delta::{DataRef, SetLocation};
use twinfs_core::id::{FileId, GroupNumber, VolumeIndex, VolumeName};
use twinfs_core::model::generate::{Change, Generator};
use twinfs_core::model::{ContentHasher, Entry, Listing, Model, PAGE_BYTES, Random};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, AttrList, Kind, Op, Update, is_xattr_name};
use twinfs_replicator::replica::image::files::{Child, Local, NewObject, Place, Space, Stat, TreeStore};
use twinfs_replicator::replica::image::handle::Handle;
use twinfs_replicator::replica::image::linux::{LinuxTree, OpenObjects};
use twinfs_replicator::replica::image::view::{DataSource, View};
use twinfs_replicator::replica::image::{Group, Image, ImageError, ImageOptions, OpenStore};

pub(crate) fn volume_name() -> VolumeName {
    VolumeName::new("data").unwrap()
}

/// A run of updates, each a record set of its own.
pub(crate) struct Journal {
    pub(crate) changes: Vec<Change>,
}

impl DataSource for Journal {
    fn read(&self, at: DataRef, buf: &mut [u8]) -> io::Result<()> {
        let data = &self.changes[at.set.offset as usize].data;
        buf.copy_from_slice(&data[at.offset as usize..][..buf.len()]);
        Ok(())
    }
}

impl Journal {
    /// A group of the updates of one volume.
    pub(crate) fn group(
        &self,
        number: u64,
        volume: VolumeIndex,
        updates: std::ops::Range<usize>,
        joins: bool,
    ) -> Group {
        let updates = updates.map(|at| {
            let change = &self.changes[at];
            let set = SetLocation { segment: 1, offset: at as u64 };
            let data = matches!(change.update.op, Op::Write { .. }).then_some(DataRef { set, offset: 0 });
            (change.update.clone(), data)
        });
        Group {
            number: GroupNumber(number),
            time: Timestamp(number),
            volumes: vec![(volume, updates.collect())],
            joins: if joins { vec![volume] } else { Vec::new() },
        }
    }
}

/// The member volume as the view shows it. Of huge files, what is read is where the model has data, and around it.
pub(crate) fn view_listing(view: &View, model: &Model) -> Listing {
    let mut listing = Listing::default();
    let Some((volume, _, root)) = view.members().next() else { return listing };
    let mut open: Vec<(Vec<u8>, FileId)> = vec![(Vec::new(), root)];
    let mut numbers: BTreeMap<FileId, u64> = BTreeMap::new();
    while let Some((path, file)) = open.pop() {
        let node = view.node(volume, file).unwrap();
        let kind = node.attr.kind().unwrap();
        if kind == Kind::Dir {
            let mut seen = BTreeSet::new();
            for entry in view.list(volume, file).unwrap() {
                assert!(seen.insert(entry.name.clone()), "a name comes twice");
                assert_eq!(view.lookup(volume, file, &entry.name).unwrap(), Some(entry.file));
                assert_eq!(view.node(volume, entry.file).unwrap().attr.kind(), Some(entry.kind));
                open.push((join(&path, &entry.name), entry.file));
            }
            assert_eq!(view.lookup(volume, file, b"no such name").unwrap(), None);
        }
        let mut content = ContentHasher::default();
        if kind == Kind::File {
            let size = node.attr.size;
            let pages = size.div_ceil(PAGE_BYTES as u64);
            let mut wanted: BTreeSet<u64> = (0..pages.min(100)).chain(pages.checked_sub(1)).collect();
            for page in model.object(file).into_iter().flat_map(|object| object.pages().keys()) {
                wanted.extend(page.saturating_sub(1)..=page + 1);
            }
            for page in wanted {
                let bytes = view.read(volume, file, page * PAGE_BYTES as u64, PAGE_BYTES).unwrap();
                content.page(page, &bytes);
            }
        }
        let names = view.xattrs(volume, file).unwrap();
        let xattrs = names.into_iter().map(|name| {
            let value = view.xattr(volume, file, &name).unwrap().unwrap();
            (name, value.into())
        });
        let next = numbers.len() as u64;
        listing.add(Entry {
            path,
            identity: *numbers.entry(file).or_insert(next),
            attr: node.attr,
            target: if kind == Kind::Symlink { view.read_link(volume, file).unwrap() } else { Vec::new() },
            xattrs: xattrs.collect(),
            content,
        });
    }
    listing
}

/// A real directory, as any program sees it.
pub(crate) fn tree_listing(root: &Path) -> Listing {
    let mut listing = Listing::default();
    let mut open = vec![(Vec::new(), root.to_path_buf())];
    while let Some((path, real)) = open.pop() {
        let meta = std::fs::symlink_metadata(&real).unwrap();
        let attr = Attr {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            nlink: meta.nlink() as u32,
            rdev: meta.rdev(),
            size: meta.size(),
            mtime_s: meta.mtime(),
            mtime_ns: meta.mtime_nsec() as u32,
        };
        if meta.is_dir() {
            for entry in std::fs::read_dir(&real).unwrap() {
                let name = entry.unwrap().file_name();
                open.push((join(&path, name.as_bytes()), real.join(name)));
            }
        }
        let target = if meta.is_symlink() {
            std::fs::read_link(&real).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let content =
            if meta.is_file() { file_content(&real, meta.size()) } else { ContentHasher::default() };
        let xattrs = real_xattrs(&real);
        listing.add(Entry { path, identity: meta.ino(), attr, target, xattrs, content });
    }
    listing
}

fn file_content(path: &Path, size: u64) -> ContentHasher {
    let file = std::fs::File::open(path).unwrap();
    let (mut content, mut at) = (ContentHasher::default(), 0);
    while at < size {
        let Ok(data) = seek(&file, SeekFrom::Data(at)) else { break };
        let page = data / PAGE_BYTES as u64;
        let mut bytes = [0; PAGE_BYTES];
        let len = file.read_at(&mut bytes, page * PAGE_BYTES as u64).unwrap();
        content.page(page, &bytes[..len]);
        at = (page + 1) * PAGE_BYTES as u64;
    }
    content
}

fn real_xattrs(path: &Path) -> BTreeMap<Box<[u8]>, Box<[u8]>> {
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, &mut *names).unwrap();
    let names = names[..len].split(|byte| *byte == 0).filter(|name| is_xattr_name(name));
    names
        .map(|name| {
            let mut value = vec![0; 65_536];
            let len = rustix::fs::lgetxattr(path, name, &mut *value).unwrap();
            (name.into(), value[..len].into())
        })
        .collect()
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

/// Counts calls and bytes over all stores that it opened, and lets every call fail from a given one on.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub(crate) calls: AtomicU64,
    pub(crate) bytes: AtomicU64,
    /// The first call that fails, counted from 1; zero for none.
    pub(crate) fail_at: AtomicU64,
    /// Holds up the next read of a file: it waits twice before it reads.
    pub(crate) read_barrier: Mutex<Option<Arc<Barrier>>>,
}

impl Meter {
    fn call(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let fail_at = self.fail_at.load(Ordering::SeqCst);
        if fail_at != 0 && call >= fail_at { Err(io::Error::other("the machine is off")) } else { Ok(()) }
    }

    pub(crate) fn fail_after(&self, calls: u64) {
        self.fail_at.store(self.calls.load(Ordering::SeqCst) + calls + 1, Ordering::SeqCst);
    }

    pub(crate) fn has_failed(&self) -> bool {
        let fail_at = self.fail_at.load(Ordering::SeqCst);
        fail_at != 0 && self.calls.load(Ordering::SeqCst) >= fail_at
    }
}

#[derive(Debug)]
struct Probe {
    tree: LinuxTree,
    meter: Arc<Meter>,
}

macro_rules! pass {
    ($($name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> io::Result<$result> {
            self.meter.call()?;
            self.tree.$name($($arg),*)
        })*
    };
}

impl TreeStore for Probe {
    fn place(&self, place: Place) -> Local {
        self.tree.place(place)
    }

    fn forget(&self, object: &Handle) {
        self.tree.forget(object);
    }

    fn forget_all(&self) {
        self.tree.forget_all();
    }

    fn read_at(&self, file: &Handle, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.meter.bytes.fetch_add(buf.len() as u64, Ordering::SeqCst);
        self.meter.call()?;
        let barrier = self.meter.read_barrier.lock().unwrap().take();
        if let Some(barrier) = barrier {
            barrier.wait();
            barrier.wait();
        }
        self.tree.read_at(file, offset, buf)
    }

    fn write_at(&self, file: &Handle, offset: u64, data: &[u8]) -> io::Result<()> {
        self.meter.bytes.fetch_add(data.len() as u64, Ordering::SeqCst);
        if let Err(error) = self.meter.call() {
            // A write that a crash meets may be half done.
            self.tree.write_at(file, offset, &data[..data.len() / 2])?;
            return Err(error);
        }
        self.tree.write_at(file, offset, data)
    }

    fn copy(&self, from: (&Handle, u64), to: (&Handle, u64), len: u64) -> io::Result<()> {
        self.meter.bytes.fetch_add(2 * len, Ordering::SeqCst);
        if let Err(error) = self.meter.call() {
            self.tree.copy(from, to, len / 2)?;
            return Err(error);
        }
        self.tree.copy(from, to, len)
    }

    pass! {
        create(dir: &Handle, name: &[u8], new: NewObject<'_>) -> Local;
        child(dir: &Handle, name: &[u8]) -> Option<Child>;
        child_local(dir: &Handle, name: &[u8]) -> Local;
        list(dir: &Handle, each: &mut dyn FnMut(&[u8], Child)) -> ();
        link(object: &Handle, dir: &Handle, name: &[u8]) -> ();
        unlink(dir: &Handle, name: &[u8], kind: Kind) -> ();
        rename(from: (&Handle, &[u8]), to: (&Handle, &[u8])) -> ();
        stat(object: &Handle) -> Stat;
        punch(file: &Handle, offset: u64, len: u64) -> ();
        set_len(file: &Handle, len: u64) -> ();
        read_link(object: &Handle) -> Vec<u8>;
        set_owner_and_mode(object: &Handle, attr: &Attr) -> ();
        set_mtime(object: &Handle, seconds: i64, nanoseconds: u32) -> ();
        xattr(object: &Handle, name: &[u8]) -> Option<Vec<u8>>;
        xattrs(object: &Handle) -> Vec<Box<[u8]>>;
        set_xattr(object: &Handle, name: &[u8], value: Option<&[u8]>) -> ();
        id(object: &Handle) -> Option<FileId>;
        hold(object: &Handle) -> Arc<OwnedFd>;
        sync() -> ();
        space() -> Space;
    }
}

/// A site directory with an image in it, and the model that its view has to equal.
pub(crate) struct Site {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) journal: Arc<Journal>,
    pub(crate) image: Image,
    pub(crate) volume: VolumeIndex,
    pub(crate) meter: Arc<Meter>,
    pub(crate) model: Model,
    pub(crate) group: u64,
    pub(crate) applied: usize,
    /// Where a group may end: a copy of an object in several updates is whole.
    cuts: Vec<usize>,
    root: FileId,
}

impl Site {
    pub(crate) fn new(root: FileId, changes: Vec<Change>, cuts: Vec<usize>) -> Self {
        let dir = if std::env::var_os("IMAGE_TEST_ON_TMP").is_none() && Path::new("/dev/shm").is_dir() {
            tempfile::tempdir_in("/dev/shm").unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        Self::new_in(dir, root, changes, cuts)
    }

    pub(crate) fn new_in(
        dir: tempfile::TempDir,
        root: FileId,
        changes: Vec<Change>,
        cuts: Vec<usize>,
    ) -> Self {
        let journal = Arc::new(Journal { changes });
        let meter = Arc::new(Meter::default());
        let image = open(dir.path(), &journal, &meter).unwrap();
        let volume = image.add_volume(&volume_name(), root).unwrap();
        // The model's root has been so from the start; the tree's becomes so with the first update that says it.
        let attr = *Model::new(root).object(root).unwrap().attr();
        let tree = dir.path().join("image/data/tree");
        rustix::fs::chmod(&tree, rustix::fs::Mode::from_raw_mode(attr.mode & 0o7777)).unwrap();
        set_epoch(&tree);
        Self { dir, journal, image, volume, meter, model: Model::new(root), group: 0, applied: 0, cuts, root }
    }

    /// The first place at or after `end` where a group may end.
    pub(crate) fn cut(&self, end: usize) -> usize {
        self.cuts.iter().copied().find(|cut| *cut >= end).unwrap_or(self.journal.changes.len())
    }

    /// Applies updates up to `end`, or a little further, as one group.
    pub(crate) fn apply_to(&mut self, end: usize) {
        let end = self.cut(end);
        self.group += 1;
        let group = self.journal.group(self.group, self.volume, self.applied..end, true);
        self.image.apply_group(&group).unwrap();
        for change in &self.journal.changes[self.applied..end] {
            self.model.apply(&change.update, &change.data);
        }
        self.applied = end;
    }

    /// Ends without a word, and opens again; then applies from the journal what the tree lacks, up to where it was.
    pub(crate) fn restart(&mut self) {
        let journal = Arc::clone(&self.journal);
        let placeholder = tempfile::tempdir_in(self.dir.path()).unwrap();
        self.image = open(placeholder.path(), &journal, &Arc::default()).unwrap();
        self.meter = Arc::default();
        self.image = open(self.dir.path(), &journal, &self.meter).unwrap();
        self.volume = self.image.add_volume(&volume_name(), self.root).unwrap();
        let from = self.image.checkpointed().volumes[&volume_name()].seq.0 as usize;
        if from < self.applied {
            // In two groups, so that the first may be one that must not show.
            let middle = from + (self.applied - from) / 2;
            for (number, range) in [(self.group.max(1) - 1, from..middle), (self.group, middle..self.applied)]
            {
                self.image.apply_group(&journal.group(number, self.volume, range, true)).unwrap();
            }
        }
        assert!(!self.image.is_incomplete());
    }

    pub(crate) fn check_view(&self, what: &str) {
        let found = view_listing(&self.image.view(), &self.model);
        let difference = self.model.listing().difference(&found);
        assert!(difference.is_empty(), "{what}: the view differs from the model:\n{difference}");
    }

    /// The tree must be the model after everything was written; nothing may be left over beside it.
    pub(crate) fn check_tree(&self, what: &str) {
        let found = tree_listing(&self.dir.path().join("image/data/tree"));
        let difference = self.model.listing().difference(&found);
        assert!(difference.is_empty(), "{what}: the tree differs from the model:\n{difference}");
        for place in ["staging", "graveyard"] {
            let left = std::fs::read_dir(self.dir.path().join("image/data").join(place)).unwrap();
            let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
            assert!(left.is_empty(), "{what}: left over in {place}: {left:?}");
        }
    }
}

fn set_epoch(path: &Path) {
    let zero = rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: zero, last_modification: zero };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
}

pub(crate) fn open(dir: &Path, journal: &Arc<Journal>, meter: &Arc<Meter>) -> Result<Image, ImageError> {
    let (open_objects, meter) = (Arc::new(OpenObjects::default()), Arc::clone(meter));
    let open: OpenStore = Box::new(move |dir: &Path| {
        let tree = LinuxTree::open(dir, &open_objects)?;
        Ok(Arc::new(Probe { tree, meter: Arc::clone(&meter) }) as Arc<dyn TreeStore>)
    });
    Image::open_with(dir, Arc::clone(journal) as Arc<dyn DataSource>, ImageOptions::default(), open)
}

pub(crate) fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("IMAGE_SEED") {
        Ok(seed) => vec![seed.parse().expect("IMAGE_SEED is a number")],
        Err(_) => (0..count * std::env::var("IMAGE_SOAK").map_or(1, |n| n.parse().unwrap())).collect(),
    }
}

/// A random run, and the places in it where a group may end. Now and then an object is copied once more, as a copy of the
/// tree does while programs work on it.
pub(crate) fn run(
    primary: &mut Generator,
    updates: usize,
    copies: bool,
    random: &mut Random,
) -> (Vec<Change>, Vec<usize>) {
    let (mut changes, mut cuts) = (Vec::new(), Vec::new());
    while changes.len() < updates {
        changes.append(&mut primary.step());
        if copies && random.one_in(12) {
            let model = primary.model();
            let bound =
                model.objects().filter(|(file, object)| *file == model.root() || object.attr().nlink > 0);
            let bound: Vec<FileId> = bound.map(|(file, _)| file).collect();
            copy(model, random.pick(&bound).unwrap(), &mut changes);
        }
        cuts.push(changes.len());
    }
    for (change, seq) in changes.iter_mut().zip(1..) {
        change.update.stamp = Stamp { time: Timestamp(seq * 1000), seq: Seq(seq) };
    }
    (changes, cuts)
}

fn copy(model: &Model, file: FileId, changes: &mut Vec<Change>) {
    let object = model.object(file).unwrap();
    let mut emit = |op: Op, data: Vec<u8>| {
        let files = op.files().into_iter().flatten();
        let attrs = AttrList::from_iter(files.map(|file| (file, *model.object(file).unwrap().attr())));
        changes.push(Change { update: Update { stamp: Stamp::default(), op, attrs }, data });
    };
    emit(Op::Object { file, target: object.target().into() }, Vec::new());
    for (name, value) in object.xattrs() {
        emit(Op::SetXattr { file, name: name.clone(), value: value.clone() }, Vec::new());
    }
    for (number, page) in object.pages() {
        let offset = number * PAGE_BYTES as u64;
        let len = (object.attr().size - offset).min(PAGE_BYTES as u64);
        emit(Op::Write { file, offset, len: len as u32 }, page[..len as usize].to_vec());
    }
    for (name, child) in object.names() {
        emit(Op::Bind { dir: file, name: name.clone(), file: *child }, Vec::new());
    }
}
