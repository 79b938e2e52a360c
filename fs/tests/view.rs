//! The replica's mount, as programs see it: after each group it is what the naive model says, and it cannot be changed.
//!
//! `VIEW_SEED=n cargo test -p twinfs --test view` replays one seed. Needs root and `/dev/fuse`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use twinfs::mount::{MountOptions, Mounted, Unmounted};
use twinfs::replica_view::{self, Report};
use twinfs_core::delta::{DataRef, SetLocation};
use twinfs_core::id::{FileId, GroupNumber, VolumeIndex, VolumeInstance, VolumeName};
use twinfs_core::limits;
use twinfs_core::model::generate::{Change, Generator, Options};
use twinfs_core::model::{ContentHasher, Entry, Listing, Model, PAGE_BYTES, Random};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::update::{Attr, AttrList, ID_XATTR, Op, Update, is_xattr_name, sample_file};
use twinfs_replicator::replica::image::view::DataSource;
use twinfs_replicator::replica::image::{Group, Image, ImageOptions};

/// The data of each volume's updates.
struct Journal(Vec<Vec<Change>>);

impl DataSource for Journal {
    fn read(&self, at: DataRef, buf: &mut [u8]) -> std::io::Result<()> {
        let data = &self.0[at.set.segment as usize][at.set.offset as usize].data;
        buf.copy_from_slice(&data[at.offset as usize..][..buf.len()]);
        Ok(())
    }
}

/// Tells how often it was asked.
#[derive(Default)]
struct Counter(AtomicU64);

impl Report for Counter {
    fn lag(&self) -> String {
        self.0.fetch_add(1, Ordering::SeqCst).to_string()
    }

    fn consistency_time(&self) -> String {
        "then".to_owned()
    }
}

/// An image, mounted, and the models that it has to equal.
struct Site {
    image: Arc<Image>,
    journal: Arc<Journal>,
    models: Vec<Model>,
    applied: Vec<usize>,
    group: u64,
    mountpoint: PathBuf,
    mounted: Option<Mounted>,
    _dir: tempfile::TempDir,
}

fn name(volume: usize) -> String {
    format!("volume-{volume}")
}

impl Site {
    fn new(volumes: Vec<(FileId, Vec<Change>)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mountpoint = dir.path().join("mount");
        std::fs::create_dir(&mountpoint).unwrap();
        let (roots, mut changes): (Vec<FileId>, Vec<_>) = volumes.into_iter().unzip();
        for volume in &mut changes {
            for (change, seq) in volume.iter_mut().zip(1..) {
                change.update.stamp = Stamp { time: Timestamp(seq * 1000), seq: Seq(seq) };
            }
        }
        let journal = Arc::new(Journal(changes));
        let data: Arc<dyn DataSource> = Arc::<Journal>::clone(&journal);
        let image = Arc::new(Image::open(dir.path(), data, ImageOptions::default()).unwrap());
        for (volume, root) in roots.iter().enumerate() {
            let at = image.add_volume(&VolumeName::new(name(volume)).unwrap(), *root).unwrap();
            assert_eq!(at.as_usize(), volume);
            // The model's root has been so from the start; the tree's becomes so with the first update that says it.
            let (tree, attr) = (
                dir.path().join("image").join(name(volume)).join("tree"),
                *Model::new(*root).object(*root).unwrap().attr(),
            );
            rustix::fs::chmod(&tree, rustix::fs::Mode::from_raw_mode(attr.mode & 0o7777)).unwrap();
            let zero = rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 };
            let times = rustix::fs::Timestamps { last_access: zero, last_modification: zero };
            rustix::fs::utimensat(rustix::fs::CWD, &tree, &times, rustix::fs::AtFlags::empty()).unwrap();
        }
        let options = MountOptions { threads: 2, read_only: true, trusted: false, ..MountOptions::default() };
        let report = Arc::new(Counter::default());
        let mounted = replica_view::mount(Arc::clone(&image), report, &mountpoint, &options).unwrap();
        Self {
            image,
            journal,
            models: roots.iter().map(|root| Model::new(*root)).collect(),
            applied: vec![0; roots.len()],
            group: 0,
            mountpoint,
            mounted: Some(mounted),
            _dir: dir,
        }
    }

    fn len(&self, volume: usize) -> usize {
        self.journal.0[volume].len()
    }

    /// Shows some more updates of some volumes as one group; those volumes are members from then on.
    fn apply(&mut self, counts: &[(usize, usize)]) {
        self.group += 1;
        let mut volumes = Vec::new();
        for (volume, count) in counts {
            let from = self.applied[*volume];
            let to = (from + count).min(self.len(*volume));
            let updates = (from..to).map(|at| {
                let Change { update, data } = &self.journal.0[*volume][at];
                self.models[*volume].apply(update, data);
                let set = SetLocation { segment: *volume as u64, offset: at as u64 };
                let data = matches!(update.op, Op::Write { .. }).then_some(DataRef { set, offset: 0 });
                (update.clone(), data)
            });
            volumes.push((VolumeIndex(*volume as u16), updates.collect()));
            self.applied[*volume] = to;
        }
        let joins = counts.iter().map(|(volume, _)| VolumeIndex(*volume as u16)).collect();
        let group = Group {
            number: GroupNumber(self.group),
            time: Timestamp(self.group * 1_000_000_000),
            volumes,
            joins,
        };
        self.image.apply_group(&group).unwrap();
    }

    fn path(&self, volume: usize, path: &str) -> PathBuf {
        self.mountpoint.join(name(volume)).join(path)
    }

    fn report(&self, what: &str) -> String {
        std::fs::read_to_string(self.mountpoint.join(".twinfs").join(what)).unwrap()
    }

    fn check(&self, volume: usize, what: &str) {
        let model = &self.models[volume];
        let found = listing(&self.path(volume, ""), model);
        let difference = model.listing().difference(&found);
        assert!(difference.is_empty(), "{what}: the mount differs from the model:\n{difference}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            let _ = mounted.unmount();
        }
    }
}

/// A volume as programs see it. Of huge files, what is read is where the model has data, and around it.
fn listing(root: &Path, model: &Model) -> Listing {
    let mut listing = Listing::default();
    let mut open = vec![(Vec::new(), root.to_path_buf(), Some(model.root()))];
    while let Some((path, real, file)) = open.pop() {
        let meta = std::fs::symlink_metadata(&real).unwrap();
        let object = file.and_then(|file| model.object(file));
        let (mut target, mut content) = (Vec::new(), ContentHasher::default());
        if meta.is_dir() {
            for entry in std::fs::read_dir(&real).unwrap() {
                let entry = entry.unwrap();
                let (name, below) = (entry.file_name(), std::fs::symlink_metadata(entry.path()).unwrap());
                assert_eq!(entry.metadata().unwrap().ino(), below.ino());
                assert_eq!(entry.file_type().unwrap(), below.file_type());
                let mut child = path.clone();
                child.extend((!path.is_empty()).then_some(b'/'));
                child.extend(name.as_bytes());
                let file = object.and_then(|object| object.names().get(name.as_bytes()).copied());
                open.push((child, real.join(name), file));
            }
            let no_such_name = std::fs::symlink_metadata(real.join("no such name"));
            assert_eq!(no_such_name.unwrap_err().raw_os_error(), Some(Errno::NOENT.raw_os_error()));
        } else if meta.is_symlink() {
            target = std::fs::read_link(&real).unwrap().as_os_str().as_bytes().to_vec();
        } else if meta.is_file() {
            content = file_content(&real, meta.size(), object.map(|object| object.pages()));
        }
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
        listing.add(Entry { path, identity: meta.ino(), attr, target, xattrs: xattrs(&real), content });
    }
    listing
}

fn file_content(path: &Path, size: u64, known: Option<&BTreeMap<u64, Box<[u8]>>>) -> ContentHasher {
    let file = File::open(path).unwrap();
    let mut content = ContentHasher::default();
    let pages = size.div_ceil(PAGE_BYTES as u64);
    let mut wanted: Vec<u64> = (0..pages.min(20)).chain(pages.checked_sub(1)).collect();
    wanted.extend(known.into_iter().flatten().flat_map(|(page, _)| page.saturating_sub(1)..=page + 1));
    wanted.sort_unstable();
    wanted.dedup();
    for page in wanted {
        let mut bytes = [0; PAGE_BYTES];
        let len = file.read_at(&mut bytes, page * PAGE_BYTES as u64).unwrap();
        content.page(page, &bytes[..len]);
    }
    content
}

fn xattr_names(path: &Path) -> Vec<Box<[u8]>> {
    let mut names = vec![0; limits::XATTR_VALUE_BYTES_MAX];
    let len = rustix::fs::llistxattr(path, &mut *names).unwrap();
    names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(Into::into).collect()
}

fn xattrs(path: &Path) -> BTreeMap<Box<[u8]>, Box<[u8]>> {
    let value = |name: Box<[u8]>| {
        assert!(is_xattr_name(&name), "{} shows", name.escape_ascii());
        let mut value = vec![0; limits::XATTR_VALUE_BYTES_MAX];
        let len = rustix::fs::lgetxattr(path, &*name, &mut *value).unwrap();
        (name, value[..len].into())
    };
    let own = rustix::fs::lgetxattr(path, ID_XATTR, &mut [0; 64][..]);
    assert_eq!(own, Err(Errno::NODATA), "what twinfs keeps for itself");
    xattr_names(path).into_iter().map(value).collect()
}

fn generated(seed: u64, updates: usize) -> (FileId, Vec<Change>) {
    let instance = VolumeInstance::new(seed).unwrap();
    let mut primary = Generator::new(seed, Options { instance, names_max: 30, ..Options::default() });
    (primary.model().root(), primary.run(updates))
}

/// Makes updates by hand; all attributes that matter are those of the model so far.
struct Hand {
    root: FileId,
    changes: Vec<Change>,
}

fn file_attr(mode: u32, nlink: u32, size: u64) -> Attr {
    Attr { mode: 0o100_000 | mode, uid: 0, gid: 0, nlink, rdev: 0, size, mtime_s: -5, mtime_ns: 7 }
}

impl Hand {
    fn new() -> Self {
        Self { root: sample_file(2), changes: Vec::new() }
    }

    fn push(&mut self, op: Op, attrs: impl IntoIterator<Item = (FileId, Attr)>, data: &[u8]) {
        let update = Update { stamp: Stamp::default(), op, attrs: AttrList::from_iter(attrs) };
        self.changes.push(Change { update, data: data.to_vec() });
    }

    /// A new file of the root directory, written in one piece.
    fn file(&mut self, name: &str, file: FileId, mode: u32, data: &[u8]) {
        let (dir, name) = (self.root, name.as_bytes().into());
        let attr = file_attr(mode, 1, 0);
        self.push(Op::Create { dir, name, file, target: Box::default() }, [(file, attr)], b"");
        self.write(file, mode, data);
    }

    fn write(&mut self, file: FileId, mode: u32, data: &[u8]) {
        let (len, size) = (data.len() as u32, data.len() as u64);
        let attr = file_attr(mode, 1, size);
        self.push(Op::Write { file, offset: 0, len }, [(file, attr)], data);
    }

    fn unlink(&mut self, name: &str, file: FileId, size: u64) {
        let (dir, name) = (self.root, name.as_bytes().into());
        let attr = file_attr(0o644, 0, size);
        self.push(Op::Unlink { dir, name, file }, [(file, attr)], b"");
    }
}

#[test]
fn the_mount_is_the_model_after_each_group() {
    let seeds = match std::env::var("VIEW_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => vec![1, 2, 3],
    };
    for seed in seeds {
        println!("VIEW_SEED={seed}");
        let mut random = Random::new(seed);
        let mut site = Site::new(vec![generated(seed, 240), generated(seed + 1000, 240)]);
        assert_eq!(site.report("group"), "0\n");
        assert_eq!(site.report("consistency_time"), "then\n");
        assert_eq!(names(&site.mountpoint), [".twinfs"]);
        while site.applied[0] < site.len(0) {
            let mut counts = vec![(0, 1 + random.below(60) as usize)];
            if site.group > 1 {
                counts.push((1, 1 + random.below(60) as usize));
            }
            site.apply(&counts);
            let what = format!("seed {seed}, group {}", site.group);
            assert_eq!(site.report("group"), format!("{}\n", site.group), "{what}");
            let volumes = if site.group > 2 { 2 } else { 1 };
            assert_eq!(names(&site.mountpoint).len(), 1 + volumes, "{what}: members");
            for volume in 0..volumes {
                site.check(volume, &what);
            }
            if random.one_in(3) {
                site.image.checkpoint().unwrap();
                for volume in 0..volumes {
                    site.check(volume, &format!("{what}, after a checkpoint"));
                }
            }
        }
        let mounted = site.mounted.take().unwrap();
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Clean);
        assert!(names(&site.mountpoint).is_empty());
        assert_eq!(Arc::strong_count(&site.image), 1, "nothing serves any longer");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

#[test]
fn reports_are_whole_and_as_of_the_read_from_their_beginning() {
    let (root, updates) = generated(1, 20);
    let mut site = Site::new(vec![(root, updates)]);
    site.apply(&[(0, 10)]);
    let mut found = names(&site.mountpoint.join(".twinfs"));
    found.sort();
    assert_eq!(found, ["consistency_time", "group", "lag"]);
    let mut file = File::open(site.mountpoint.join(".twinfs/group")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "1\n");
    site.apply(&[(0, 10)]);
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "1\n2\n", "an open report follows");

    // Who asks for holes is told that there is none.
    let seek = |at| rustix::fs::seek(&file, at);
    assert_eq!(seek(SeekFrom::Data(0)), Ok(0));
    assert_eq!(seek(SeekFrom::Hole(0)), Ok(2));
    assert_eq!(seek(SeekFrom::Data(2)), Err(Errno::NXIO));

    // A reader with a small buffer gets one text, though each new one differs.
    let lag = File::open(site.mountpoint.join(".twinfs/lag")).unwrap();
    let mut last = None;
    for _ in 0..20 {
        let (mut first, mut rest) = ([0; 1], [0; 16]);
        assert_eq!(lag.read_at(&mut first, 0).unwrap(), 1);
        let len = lag.read_at(&mut rest, 1).unwrap();
        let text = String::from_utf8([&first[..], &rest[..len]].concat()).unwrap();
        let number: u64 = text.strip_suffix('\n').unwrap().parse().unwrap();
        assert!(last.is_none_or(|last| number == last + 1), "{number} after {last:?}");
        last = Some(number);
    }
}

#[test]
fn nothing_can_be_changed_even_through_a_writable_mount() {
    let (root, file) = (sample_file(2), sample_file(10));
    let mut hand = Hand::new();
    hand.file("file", file, 0o666, b"content");
    let mut site = Site::new(vec![(root, hand.changes)]);
    site.apply(&[(0, 2)]);
    for writable in [false, true] {
        if writable {
            let flags = rustix::mount::MountFlags::BIND | rustix::mount::MountFlags::NOSUID;
            rustix::mount::mount_remount(&site.mountpoint, flags, c"").unwrap();
        }
        let (path, new) = (site.path(0, "file"), site.path(0, "new"));
        let open = std::fs::OpenOptions::new().write(true).open(&path).map(drop);
        let chmod = rustix::fs::chmod(&path, 0o600.into());
        let set = rustix::fs::setxattr(&path, "user.a", b"b", rustix::fs::XattrFlags::empty());
        let outcomes = [
            ("open", open),
            ("truncate", File::options().read(true).write(true).truncate(true).open(&path).map(drop)),
            ("create", File::create(&new).map(drop)),
            ("mkdir", std::fs::create_dir(&new)),
            ("symlink", std::os::unix::fs::symlink("x", &new)),
            ("link", std::fs::hard_link(&path, &new)),
            ("rename", std::fs::rename(&path, &new)),
            ("unlink", std::fs::remove_file(&path)),
            ("rmdir", std::fs::remove_dir(site.mountpoint.join(".twinfs"))),
            ("rename a volume", std::fs::rename(site.path(0, ""), site.mountpoint.join("other"))),
            ("create beside the volumes", File::create(site.mountpoint.join("other")).map(drop)),
            ("write a report", std::fs::write(site.mountpoint.join(".twinfs/group"), b"7")),
            ("chmod", chmod.map_err(Into::into)),
            ("setxattr", set.map_err(Into::into)),
        ];
        for (what, outcome) in outcomes {
            let error = outcome.expect_err(what);
            assert_eq!(
                error.raw_os_error(),
                Some(Errno::ROFS.raw_os_error()),
                "{what}, writable: {writable}: {error}"
            );
        }
    }
    site.check(0, "at the end");
}

#[test]
fn an_open_file_can_be_read_until_it_is_closed() {
    let data: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let (big, other) = (sample_file(10), sample_file(11));
    let mut hand = Hand::new();
    for part in data.chunks(limits::WRITE_BYTES_MAX).enumerate() {
        let (at, part) = part;
        if at == 0 {
            hand.file("big", big, 0o644, part);
            continue;
        }
        let offset = (at * limits::WRITE_BYTES_MAX) as u64;
        let size = offset + part.len() as u64;
        let attr = file_attr(0o644, 1, size);
        hand.push(Op::Write { file: big, offset, len: part.len() as u32 }, [(big, attr)], part);
    }
    let whole = hand.changes.len();
    hand.unlink("big", big, data.len() as u64);
    hand.file("big", other, 0o644, b"another");
    let mut site = Site::new(vec![(hand.root, hand.changes)]);
    site.apply(&[(0, whole)]);
    let path = site.path(0, "big");
    assert!(std::fs::read(&path).unwrap() == data);
    site.image.checkpoint().unwrap();
    let mut file = File::open(&path).unwrap();
    let ino = file.metadata().unwrap().ino();

    site.apply(&[(0, 10)]);
    for checkpointed in [false, true] {
        if checkpointed {
            site.image.checkpoint().unwrap();
        }
        let mut found = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut found).unwrap();
        assert!(found == data, "checkpointed: {checkpointed}");
        let meta = file.metadata().unwrap();
        assert_eq!((meta.nlink(), meta.len(), meta.ino()), (0, data.len() as u64, ino));
        assert_eq!(std::fs::read(&path).unwrap(), b"another");
        assert_ne!(std::fs::metadata(&path).unwrap().ino(), ino);
    }
    drop(file);
    site.check(0, "at the end");
}

#[test]
fn programs_run_from_the_mount_and_mappings_are_of_the_file_as_it_was_opened() {
    let [yes, no] = ["/bin/true", "/bin/false"].map(|path| std::fs::read(path).unwrap());
    let program = sample_file(10);
    let mut hand = Hand::new();
    hand.file("program", program, 0o755, &yes);
    hand.write(program, 0o755, &no);
    let mut site = Site::new(vec![(hand.root, hand.changes)]);
    let path = site.path(0, "program");
    // A shared mapping, as databases use it.
    let python = "import mmap,sys; f=open(sys.argv[1],'rb'); g=open(sys.argv[2],'rb'); \
                  m=mmap.mmap(f.fileno(),0,mmap.MAP_SHARED,mmap.PROT_READ); f.close(); \
                  sys.exit(m[:]!=g.read())";
    for (count, original, success) in [(2, "/bin/true", true), (1, "/bin/false", false)] {
        site.apply(&[(0, count)]);
        assert_eq!(std::process::Command::new(&path).status().unwrap().success(), success);
        let args = [OsStr::new("-c"), OsStr::new(python), path.as_os_str(), OsStr::new(original)];
        assert!(std::process::Command::new("python3").args(args).status().unwrap().success());
    }
}

#[test]
fn an_open_directory_follows_when_it_is_rewound_and_has_no_names_when_it_is_gone() {
    let (dir, file) = (sample_file(10), sample_file(11));
    let mut hand = Hand::new();
    let of_dir = |nlink| (dir, Attr { mode: 0o040_755, ..file_attr(0, nlink, 0) });
    let of_file = |nlink| (file, file_attr(0o644, nlink, 0));
    let root = hand.root;
    let [name, below] = [b"dir", b"one"].map(|name| Box::<[u8]>::from(&name[..]));
    let target = Box::<[u8]>::default();
    hand.push(
        Op::Create { dir: root, name: name.clone(), file: dir, target: target.clone() },
        [of_dir(2)],
        b"",
    );
    hand.push(Op::Create { dir, name: below.clone(), file, target }, [of_file(1)], b"");
    hand.push(Op::Unlink { dir, name: below, file }, [of_file(0)], b"");
    hand.push(Op::Unlink { dir: root, name, file: dir }, [of_dir(0)], b"");
    let mut site = Site::new(vec![(root, hand.changes)]);
    site.apply(&[(0, 1)]);
    let fd = File::open(site.path(0, "dir")).unwrap();
    let mut open = rustix::fs::Dir::new(fd).unwrap();
    let mut names = |rewind| {
        if rewind {
            open.rewind();
        }
        let names = open.by_ref().map(|entry| entry.unwrap().file_name().to_bytes().to_vec());
        names.filter(|name| !name.starts_with(b".")).collect::<Vec<_>>()
    };
    // Listed when it is read, not when it was opened: what a program sees is of the group that shows then.
    site.apply(&[(0, 1)]);
    assert_eq!(names(false), [b"one"]);
    site.apply(&[(0, 1)]);
    assert!(names(true).is_empty());
    site.apply(&[(0, 1)]);
    site.image.checkpoint().unwrap();
    assert!(names(true).is_empty());
    site.check(0, "at the end");
}
