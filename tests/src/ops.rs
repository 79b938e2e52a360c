//! A seeded generator of file system operations, and an actor that performs them below a directory.
//!
//! Names come from a small pool, so that operations meet: unlink and recreate of one name, swaps, inverted parents,
//! links and renames onto themselves, files written after their last name is gone. An operation may fail; two actors
//! that live through the same operations must fail alike, and must see the same when they look.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

/// A small, fast, seeded generator of random numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// One of the items.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// Bytes that depend on the generator's state; about half of them compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        let compressible = self.below(2) == 0;
        let word = self.next_u64();
        while bytes.len() < len {
            let next = if compressible { word } else { self.next_u64() };
            bytes.extend_from_slice(&next.to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// An operation below some root.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the names of the fields say it")]
pub enum Operation {
    Create {
        path: PathBuf,
        mode: u32,
    },
    Mkdir {
        path: PathBuf,
        mode: u32,
    },
    Mknod {
        path: PathBuf,
        kind: FileType,
    },
    Symlink {
        path: PathBuf,
        target: String,
    },
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    Rmdir {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        flags: RenameFlags,
    },
    Write {
        path: PathBuf,
        offset: u64,
        data: Vec<u8>,
    },
    Append {
        path: PathBuf,
        data: Vec<u8>,
    },
    Truncate {
        path: PathBuf,
        size: u64,
    },
    Fallocate {
        path: PathBuf,
        flags: FallocateFlags,
        offset: u64,
        len: u64,
    },
    CopyRange {
        from: PathBuf,
        to: PathBuf,
        offset: u64,
        len: usize,
    },
    Chmod {
        path: PathBuf,
        mode: u32,
    },
    Chown {
        path: PathBuf,
        uid: u32,
        gid: u32,
    },
    Times {
        path: PathBuf,
        seconds: i64,
        nanoseconds: i64,
    },
    SetXattr {
        path: PathBuf,
        name: String,
        value: Vec<u8>,
    },
    RemoveXattr {
        path: PathBuf,
        name: String,
    },
    /// Opens a file and keeps it open, whatever becomes of its name.
    Hold {
        path: PathBuf,
        slot: u8,
    },
    WriteHeld {
        slot: u8,
        offset: u64,
        data: Vec<u8>,
    },
    Release {
        slot: u8,
    },
    /// Turns `outer/inner` into `inner/outer`.
    Invert {
        outer: PathBuf,
        inner: PathBuf,
        aside: PathBuf,
    },
    /// Reads a directory, a symlink or a file, with its attributes.
    Look {
        path: PathBuf,
    },
}

/// What the operations of a generator are like.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Whether collapse and insert range are made: not every file system has them.
    pub shifts: bool,
    /// Longest write, in bytes, but for one in thirty, which may be 64 times as long.
    pub data_bytes_max: u64,
    /// Whether every operation is one system call that changes at most once: no inversions, no copies of ranges.
    pub single_calls: bool,
    /// How many names a directory has to offer.
    pub names: usize,
    /// Deepest path.
    pub depth: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Self { shifts: true, data_bytes_max: 9000, single_calls: false, names: NAMES.len(), depth: 3 }
    }
}

/// Makes operations. It looks at the tree at times, so that most of them find what they need; the rest err, which is
/// part of the test.
#[derive(Debug)]
pub struct Generator {
    rng: Rng,
    mix: Mix,
    known: Known,
    until_look: u32,
}

/// What the generator last saw of the tree.
#[derive(Debug, Default)]
struct Known {
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "-g.tar.gz", "\u{fc}n\u{ef}-\u{2713} \\name"];
const BLOCK: u64 = 4096;
/// Operations between two looks at the tree.
const LOOK_AFTER: u32 = 8;

impl Generator {
    /// A generator; the same seed makes the same operations on the same tree.
    #[must_use]
    pub fn new(seed: u64, mix: Mix) -> Self {
        Self { rng: Rng(seed), mix, known: Known::default(), until_look: 0 }
    }

    /// A path, whatever is there.
    fn path(&mut self) -> PathBuf {
        let depth = 1 + self.rng.below(self.mix.depth) as usize;
        (0..depth).map(|_| self.rng.pick(&NAMES[..self.mix.names])).collect()
    }

    /// Mostly a path of one of those.
    fn one_of(&mut self, known: impl Fn(&Known) -> Vec<&PathBuf>) -> PathBuf {
        let found = known(&self.known);
        if found.is_empty() || self.rng.below(8) == 0 {
            return self.path();
        }
        found[self.rng.below(found.len() as u64) as usize].clone()
    }

    fn file(&mut self) -> PathBuf {
        self.one_of(|known| known.files.iter().collect())
    }

    fn dir(&mut self) -> PathBuf {
        self.one_of(|known| known.dirs.iter().collect())
    }

    fn no_dir(&mut self) -> PathBuf {
        self.one_of(|known| known.files.iter().chain(&known.others).collect())
    }

    fn any(&mut self) -> PathBuf {
        self.one_of(|known| known.files.iter().chain(&known.dirs).chain(&known.others).collect())
    }

    /// Mostly a place in a directory that is there, often taken already.
    fn place(&mut self) -> PathBuf {
        let depth = self.mix.depth as usize;
        let mut path = match self.rng.below(3) {
            0 => PathBuf::new(),
            _ => self.dir(),
        };
        while path.components().count() >= depth {
            path.pop();
        }
        path.join(self.rng.pick(&NAMES[..self.mix.names]))
    }

    fn look(&mut self, root: &Path) {
        self.known = Known::default();
        let mut pending = vec![PathBuf::new()];
        while let Some(dir) = pending.pop() {
            // Somebody else may change the tree meanwhile: then less is known.
            let Ok(entries) = std::fs::read_dir(root.join(&dir)) else { continue };
            let mut entries: Vec<_> = entries.flatten().collect();
            entries.sort_by_key(std::fs::DirEntry::file_name);
            for entry in entries {
                let path = dir.join(entry.file_name());
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => {
                        self.known.dirs.push(path.clone());
                        pending.push(path);
                    }
                    Ok(kind) if kind.is_file() => self.known.files.push(path),
                    _ => self.known.others.push(path),
                }
            }
        }
    }

    fn offset(&mut self) -> u64 {
        match self.rng.below(20) {
            0 => self.rng.below(1 << 40),
            1..=5 => self.rng.below(300_000),
            _ => self.rng.below(20_000),
        }
    }

    fn data(&mut self) -> Vec<u8> {
        let len = match self.rng.below(30) {
            0 => self.rng.below(64 * self.mix.data_bytes_max),
            _ => self.rng.below(self.mix.data_bytes_max),
        };
        self.rng.bytes(1 + len as usize)
    }

    /// The next operation; `root` is where it will be performed, or a tree that is equal.
    pub fn next_operation(&mut self, root: &Path) -> Operation {
        if self.until_look == 0 {
            self.look(root);
            self.until_look = LOOK_AFTER;
        }
        self.until_look -= 1;
        loop {
            let operation = self.any_operation();
            let several = matches!(operation, Operation::Invert { .. } | Operation::CopyRange { .. });
            if !(several && self.mix.single_calls) {
                return operation;
            }
        }
    }

    fn any_operation(&mut self) -> Operation {
        match self.rng.below(100) {
            0..=41 => self.namespace_operation(),
            42..=76 => self.data_operation(),
            77..=89 => self.attribute_operation(),
            90..=94 => Operation::Look { path: self.any() },
            _ => Operation::Invert {
                outer: self.dir(),
                inner: match self.rng.below(2) {
                    0 => self.dir(),
                    _ => self.place(),
                },
                aside: self.place(),
            },
        }
    }

    fn mode(&mut self) -> u32 {
        self.rng.pick(&[0o644, 0o600, 0o755, 0o4755, 0o1777, 0o000, 0o2770])
    }

    fn namespace_operation(&mut self) -> Operation {
        match self.rng.below(42) {
            0..=10 => Operation::Create { path: self.place(), mode: self.mode() },
            11..=17 => Operation::Mkdir { path: self.place(), mode: self.mode() },
            18..=19 => Operation::Mknod {
                path: self.place(),
                kind: self.rng.pick(&[FileType::Fifo, FileType::Socket, FileType::CharacterDevice]),
            },
            20..=21 => {
                // Never above the root: some lead to a name beside the link, some nowhere.
                let len = 1 + self.rng.below(200) as usize;
                let nowhere = "t/../".repeat(40)[..len].to_owned();
                let target = if self.rng.below(2) == 0 { self.rng.pick(&NAMES).into() } else { nowhere };
                Operation::Symlink { path: self.place(), target }
            }
            22..=25 => Operation::Link { from: self.no_dir(), to: self.place() },
            26..=30 => Operation::Unlink { path: self.no_dir() },
            31..=32 => Operation::Rmdir { path: self.dir() },
            _ => {
                let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE];
                let flags = flags[self.rng.pick(&[0, 0, 0, 1, 2, 2])];
                let to = if flags == RenameFlags::EXCHANGE { self.any() } else { self.place() };
                Operation::Rename { from: self.any(), to, flags }
            }
        }
    }

    fn data_operation(&mut self) -> Operation {
        let slot = self.rng.below(4) as u8;
        match self.rng.below(35) {
            0..=13 => Operation::Write { path: self.file(), offset: self.offset(), data: self.data() },
            14..=17 => Operation::Append { path: self.file(), data: self.data() },
            18..=20 => Operation::Truncate { path: self.file(), size: self.offset() },
            21..=25 => self.fallocate(),
            26..=27 => Operation::CopyRange {
                from: self.file(),
                to: self.file(),
                offset: self.offset(),
                len: 1 + self.rng.below(50_000) as usize,
            },
            28..=29 => Operation::Hold { path: self.file(), slot },
            30..=33 => Operation::WriteHeld { slot, offset: self.offset(), data: self.data() },
            _ => Operation::Release { slot },
        }
    }

    fn attribute_operation(&mut self) -> Operation {
        let path = self.any();
        let name = format!("{}.x{}", self.rng.pick(&["user", "trusted"]), self.rng.below(3));
        match self.rng.below(13) {
            0..=2 => Operation::Chmod { path, mode: self.mode() },
            3..=4 => Operation::Chown {
                path,
                uid: self.rng.below(3) as u32 * 500,
                gid: self.rng.below(3) as u32 * 500,
            },
            5..=6 => Operation::Times {
                path,
                seconds: self.rng.below(2_000_000_000) as i64,
                nanoseconds: self.rng.below(1_000_000_000) as i64,
            },
            7..=9 => {
                let len = self.rng.below(300) as usize;
                Operation::SetXattr { path, name, value: self.rng.bytes(len) }
            }
            _ => Operation::RemoveXattr { path, name },
        }
    }

    fn fallocate(&mut self) -> Operation {
        let keep = FallocateFlags::KEEP_SIZE;
        let kinds = [
            FallocateFlags::empty(),
            keep,
            FallocateFlags::PUNCH_HOLE | keep,
            FallocateFlags::ZERO_RANGE,
            FallocateFlags::ZERO_RANGE | keep,
            FallocateFlags::COLLAPSE_RANGE,
            FallocateFlags::INSERT_RANGE,
        ];
        let kind = self.rng.below(if self.mix.shifts { 7 } else { 5 }) as usize;
        let aligned = kind >= 5;
        let offset = if aligned { self.rng.below(5) * BLOCK } else { self.rng.below(40_000) };
        let len = if aligned { (1 + self.rng.below(3)) * BLOCK } else { 1 + self.rng.below(30_000) };
        Operation::Fallocate { path: self.file(), flags: kinds[kind], offset, len }
    }
}

/// Performs operations below a directory.
#[derive(Debug)]
pub struct Actor {
    root: OwnedFd,
    held: BTreeMap<u8, File>,
}

impl Actor {
    /// An actor below `root`.
    ///
    /// # Panics
    /// If the directory does not open.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, root, flags, Mode::empty()).expect("the actor's root opens");
        Self { root, held: BTreeMap::new() }
    }

    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        // A fifo or socket would block or fail in its own ways; a symlink would lead outside.
        let stat = rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        rustix::fs::openat(&self.root, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    fn existing(&self, path: &Path) -> Result<String, Errno> {
        use std::os::fd::AsRawFd;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let stat = rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            return Err(Errno::LOOP);
        }
        drop(rustix::fs::openat(&self.root, path, flags, Mode::empty())?);
        Ok(format!("/proc/self/fd/{}/{}", self.root.as_raw_fd(), path.display()))
    }

    /// Performs one operation. Returns what it saw: bytes written or copied, a digest of what was read.
    ///
    /// # Errors
    /// What the file system says.
    pub fn apply(&mut self, operation: &Operation) -> Result<u64, Errno> {
        let root = &self.root;
        match operation {
            Operation::Create { path, mode } => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(root, path, flags, Mode::from_raw_mode(*mode)).map(|_| 0)
            }
            Operation::Mkdir { path, mode } => {
                rustix::fs::mkdirat(root, path, Mode::from_raw_mode(*mode | 0o700)).map(|()| 0)
            }
            Operation::Mknod { path, kind } => {
                let device = if *kind == FileType::CharacterDevice { rustix::fs::makedev(1, 3) } else { 0 };
                rustix::fs::mknodat(root, path, *kind, Mode::from_raw_mode(0o640), device).map(|()| 0)
            }
            Operation::Symlink { path, target } => {
                rustix::fs::symlinkat(target.as_str(), root, path).map(|()| 0)
            }
            Operation::Link { from, to } => {
                rustix::fs::linkat(root, from, root, to, AtFlags::empty()).map(|()| 0)
            }
            Operation::Unlink { path } => rustix::fs::unlinkat(root, path, AtFlags::empty()).map(|()| 0),
            Operation::Rmdir { path } => rustix::fs::unlinkat(root, path, AtFlags::REMOVEDIR).map(|()| 0),
            Operation::Rename { from, to, flags } => {
                rustix::fs::renameat_with(root, from, root, to, *flags).map(|()| 0)
            }
            Operation::Invert { outer, inner, aside } => {
                rustix::fs::renameat(root, inner, root, aside)?;
                rustix::fs::renameat(root, outer, root, aside.join("under")).map(|()| 0)
            }
            Operation::Chmod { .. }
            | Operation::Chown { .. }
            | Operation::Times { .. }
            | Operation::SetXattr { .. }
            | Operation::RemoveXattr { .. } => self.apply_attributes(operation),
            Operation::Hold { path, slot } => {
                let file = File::from(self.open(path, OFlags::RDWR)?);
                self.held.insert(*slot, file);
                Ok(0)
            }
            Operation::Release { slot } => self.held.remove(slot).map(|_| 0).ok_or(Errno::BADF),
            Operation::Look { path } => self.look(path),
            _ => self.apply_data(operation),
        }
    }

    fn apply_data(&self, operation: &Operation) -> Result<u64, Errno> {
        match operation {
            Operation::Write { path, offset, data } => {
                write(&self.open(path, OFlags::WRONLY)?, *offset, data)
            }
            Operation::WriteHeld { slot, offset, data } => match self.held.get(slot) {
                Some(file) => write(file, *offset, data),
                None => Err(Errno::BADF),
            },
            Operation::Append { path, data } => {
                let fd = self.open(path, OFlags::WRONLY | OFlags::APPEND)?;
                rustix::io::write(&fd, data).map(|n| n as u64)
            }
            Operation::Truncate { path, size } => {
                rustix::fs::ftruncate(self.open(path, OFlags::WRONLY)?, *size).map(|()| 0)
            }
            Operation::Fallocate { path, flags, offset, len } => {
                rustix::fs::fallocate(self.open(path, OFlags::WRONLY)?, *flags, *offset, *len).map(|()| 0)
            }
            Operation::CopyRange { from, to, offset, len } => {
                let (from, to) = (self.open(from, OFlags::RDONLY)?, self.open(to, OFlags::WRONLY)?);
                let (mut source, mut target, mut done) = (0, *offset, 0);
                // How much one call copies is the file system's choice.
                while done < *len {
                    let rest = *len - done;
                    let n =
                        rustix::fs::copy_file_range(&from, Some(&mut source), &to, Some(&mut target), rest)?;
                    if n == 0 {
                        break;
                    }
                    done += n;
                }
                Ok(done as u64)
            }
            other => unreachable!("{other:?} is not about data"),
        }
    }

    fn apply_attributes(&self, operation: &Operation) -> Result<u64, Errno> {
        let root = &self.root;
        match operation {
            Operation::Chmod { path, mode } => {
                self.existing(path)?;
                rustix::fs::chmodat(root, path, Mode::from_raw_mode(*mode), AtFlags::empty())
            }
            Operation::Chown { path, uid, gid } => {
                let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
                rustix::fs::chownat(root, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            }
            Operation::Times { path, seconds, nanoseconds } => {
                let time = Timespec { tv_sec: *seconds, tv_nsec: *nanoseconds };
                let times = Timestamps { last_access: time, last_modification: time };
                rustix::fs::utimensat(root, path, &times, AtFlags::SYMLINK_NOFOLLOW)
            }
            Operation::SetXattr { path, name, value } => {
                rustix::fs::setxattr(self.existing(path)?, name.as_str(), value, XattrFlags::empty())
            }
            Operation::RemoveXattr { path, name } => {
                rustix::fs::removexattr(self.existing(path)?, name.as_str())
            }
            other => unreachable!("{other:?} is not about attributes"),
        }
        .map(|()| 0)
    }

    /// A digest of what a program sees at `path`.
    fn look(&self, path: &Path) -> Result<u64, Errno> {
        let stat = rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW)?;
        let mut hash = blake3::Hasher::new();
        let kind = FileType::from_raw_mode(stat.st_mode);
        let size = if kind == FileType::Directory { 0 } else { stat.st_size };
        for number in [stat.st_mode, stat.st_uid, stat.st_gid] {
            hash.update(&number.to_le_bytes());
        }
        hash.update(&size.to_le_bytes());
        match kind {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&self.root, path, flags, Mode::empty())?;
                let mut names = Vec::new();
                for entry in rustix::fs::Dir::read_from(&fd)? {
                    let entry = entry?;
                    names.push((entry.file_name().to_bytes().to_vec(), entry.file_type() as u32));
                }
                names.sort();
                for (name, kind) in names {
                    hash.update(&name).update(&[0]).update(&kind.to_le_bytes());
                }
            }
            FileType::Symlink => {
                hash.update(rustix::fs::readlinkat(&self.root, path, Vec::new())?.as_bytes());
            }
            FileType::RegularFile => {
                hash.update(&stat.st_nlink.to_le_bytes());
                let fd = self.open(path, OFlags::RDONLY)?;
                let mut buffer = vec![0; 1 << 16];
                let mut at = 0;
                // Enough of a sparse file to see a page that is stale.
                while at < 1 << 20 {
                    let n = rustix::io::pread(&fd, &mut buffer, at)?;
                    if n == 0 {
                        break;
                    }
                    hash.update(&buffer[..n]);
                    at += n as u64;
                }
            }
            _ => {}
        }
        let first = hash.finalize().as_bytes()[..8].try_into().expect("a hash has 32 bytes");
        Ok(u64::from_le_bytes(first))
    }
}

fn write(fd: impl AsFd, offset: u64, data: &[u8]) -> Result<u64, Errno> {
    let mut done = 0;
    while done < data.len() {
        done += rustix::io::pwrite(&fd, &data[done..], offset + done as u64)?;
    }
    Ok(done as u64)
}
