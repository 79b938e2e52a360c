//! Full comparison of trees: names, kinds, modes, owners, times, link counts and topology, xattrs, contents, holes.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

/// Most data that a file may hold, holes not counted: a file system that hides the holes of a sparse file would have
/// terabytes of zeros read.
const DATA_BYTES_MAX: u64 = 4 << 30;

/// What is compared.
#[derive(Debug, Clone, Copy)]
pub struct Compare {
    /// Modification times, in nanoseconds.
    pub times: bool,
    /// Where the data of files begins and ends, at a granularity of 4 KiB.
    pub holes: bool,
    /// Link counts and link topology.
    pub links: bool,
}

impl Compare {
    /// Everything.
    pub const ALL: Self = Self { times: true, holes: false, links: true };
    /// Everything, and holes too: for trees on the same kind of file system.
    pub const WITH_HOLES: Self = Self { holes: true, ..Self::ALL };
    /// All but times: against a directory that was not copied but lived through the same operations.
    pub const NO_TIMES: Self = Self { times: false, ..Self::ALL };
}

/// A tree as text: a line for each object, by path. Equal trees have equal text.
pub type Listing = BTreeMap<Vec<u8>, String>;

/// The listing of a tree that stands still.
///
/// # Panics
/// If the tree changes meanwhile or cannot be read.
#[must_use]
pub fn listing(root: &Path, compare: Compare) -> Listing {
    try_listing(root, compare).unwrap_or_else(|error| panic!("cannot list {}: {error}", root.display()))
}

/// The listing of a tree that may change meanwhile: then it may fail, or show what never was.
///
/// # Errors
/// What the file system says.
pub fn try_listing(root: &Path, compare: Compare) -> Result<Listing, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let mut walk = Walk { compare, lines: BTreeMap::new(), first_names: HashMap::new() };
    let stat = rustix::fs::fstat(&dir)?;
    walk.object(b".", &stat, dir.as_fd(), None)?;
    walk.dir(b"", &dir)?;
    Ok(walk.lines)
}

/// Asserts that two trees are equal; prints the first differences otherwise.
///
/// # Panics
/// If they differ.
pub fn assert_equal(left: &Path, right: &Path, compare: Compare) {
    if let Some(difference) = difference(left, right, compare) {
        panic!("{} and {} differ:\n{difference}", left.display(), right.display());
    }
}

/// The first differences of two trees, or `None`.
#[must_use]
pub fn difference(left: &Path, right: &Path, compare: Compare) -> Option<String> {
    differences(&listing(left, compare), &listing(right, compare))
}

/// The first differences of two listings, or `None`.
#[must_use]
pub fn differences(left: &Listing, right: &Listing) -> Option<String> {
    if left == right {
        return None;
    }
    let mut text = String::new();
    let paths: std::collections::BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let different = paths.into_iter().filter(|path| left.get(*path) != right.get(*path));
    for path in different.take(8) {
        let line = |tree: &Listing| tree.get(path).cloned().unwrap_or("(absent)".into());
        let path_text = path.escape_ascii();
        let _ = write!(text, "{path_text}\n  left:  {}\n  right: {}\n", line(left), line(right));
    }
    Some(text)
}

struct Walk {
    compare: Compare,
    lines: Listing,
    first_names: HashMap<u64, Vec<u8>>,
}

impl Walk {
    fn dir(&mut self, prefix: &[u8], fd: &OwnedFd) -> Result<(), Errno> {
        let mut names = Vec::new();
        for entry in Dir::read_from(fd)? {
            let name = entry?.file_name().to_bytes().to_vec();
            // The replica's own directory is no part of the mirrored trees.
            if name != b"." && name != b".." && !(prefix.is_empty() && name == b".twinfs") {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let stat = rustix::fs::statat(fd, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW)?;
            let mut path = prefix.to_vec();
            path.extend_from_slice(&name);
            self.object(&path, &stat, fd.as_fd(), Some(&name))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let child = rustix::fs::openat(fd, name.as_slice(), flags, Mode::empty())?;
                path.push(b'/');
                self.dir(&path, &child)?;
            }
        }
        Ok(())
    }

    fn object(
        &mut self,
        path: &[u8],
        stat: &Stat,
        dir: BorrowedFd<'_>,
        name: Option<&[u8]>,
    ) -> Result<(), Errno> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut line = format!("{:o} {}:{}", stat.st_mode, stat.st_uid, stat.st_gid);
        if self.compare.times {
            let _ = write!(line, " mtime {}.{:09}", stat.st_mtime, stat.st_mtime_nsec);
        }
        if self.compare.links && kind != FileType::Directory {
            let first = self.first_names.entry(stat.st_ino).or_insert_with(|| path.to_vec());
            let _ = write!(line, " links {} of {}", stat.st_nlink, first.escape_ascii());
        }
        match (kind, name) {
            (FileType::RegularFile, Some(name)) => self.content(&mut line, stat, dir, name)?,
            (FileType::Symlink, Some(name)) => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
                let _ = write!(line, " -> {}", target.as_bytes().escape_ascii());
            }
            (FileType::CharacterDevice | FileType::BlockDevice, _) => {
                let _ = write!(line, " device {:x}", stat.st_rdev);
            }
            _ => {}
        }
        xattrs(&mut line, dir, name)?;
        self.lines.insert(path.to_vec(), line);
        Ok(())
    }

    fn content(&self, line: &mut String, stat: &Stat, dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        let size = stat.st_size as u64;
        let data = data_ranges(&fd, size);
        if data.iter().map(|(start, end)| end - start).sum::<u64>() > DATA_BYTES_MAX {
            return Err(Errno::FBIG);
        }
        // Zeros and holes read the same: hash the blocks that hold anything else, with their place.
        let mut hash = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        for &(start, end) in &data {
            let mut at = start / 4096 * 4096;
            while at < end {
                let want = buffer.len().min((end - at) as usize);
                let mut got = 0;
                while got < want {
                    match rustix::io::pread(&fd, &mut buffer[got..want], at + got as u64)? {
                        0 => break,
                        n => got += n,
                    }
                }
                if got == 0 {
                    break;
                }
                for (index, block) in buffer[..got].chunks(4096).enumerate() {
                    if block.iter().any(|byte| *byte != 0) {
                        hash.update(&(at + index as u64 * 4096).to_le_bytes());
                        hash.update(block);
                    }
                }
                at += got as u64;
            }
        }
        let _ = write!(line, " size {size} content {}", &hash.finalize().to_hex()[..16]);
        if self.compare.holes {
            let blocks: Vec<_> = data.iter().map(|(start, end)| (start / 4096, end.div_ceil(4096))).collect();
            let _ = write!(line, " data {blocks:?}");
        }
        Ok(())
    }
}

/// The ranges of a file that are not holes.
fn data_ranges(fd: &OwnedFd, size: u64) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(start) = rustix::fs::seek(fd, SeekFrom::Data(at)) else { break };
        let end = rustix::fs::seek(fd, SeekFrom::Hole(start)).unwrap_or(size);
        ranges.push((start, end));
        at = end;
    }
    ranges
}

fn xattrs(line: &mut String, dir: BorrowedFd<'_>, name: Option<&[u8]>) -> Result<(), Errno> {
    let held;
    let fd = match name {
        Some(name) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            held = rustix::fs::openat(dir, name, flags, Mode::empty())?;
            held.as_fd()
        }
        None => dir,
    };
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut names = vec![0u8; 65_536];
    let Ok(len) = rustix::fs::listxattr(&path, &mut names[..]) else { return Ok(()) };
    let mut entries = Vec::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.twinfs.") || name.starts_with(b"security.selinux") {
            continue;
        }
        let mut value = vec![0u8; 65_536];
        let len = rustix::fs::getxattr(&path, name, &mut value[..])?;
        entries.push(format!(" {}={}", name.escape_ascii(), value[..len].escape_ascii()));
    }
    entries.sort();
    entries.iter().for_each(|entry| line.push_str(entry));
    Ok(())
}

/// A hash of a listing, for ledgers.
#[must_use]
pub fn hash(listing: &Listing) -> String {
    let mut hash = blake3::Hasher::new();
    for (path, line) in listing {
        hash.update(path);
        hash.update(b"\0");
        hash.update(line.as_bytes());
        hash.update(b"\n");
    }
    hash.finalize().to_hex()[..32].to_owned()
}
