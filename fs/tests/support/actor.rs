//! Random programs: they do what programs do to a directory, by system calls, and take failures as they come.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, RenameFlags, XattrFlags};

/// SplitMix64: a seed gives the same run for ever.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// One program. Its names are few, so that it (and others beside it) meets what it made before.
pub struct Actor {
    root: PathBuf,
    random: Random,
    open: Vec<File>,
}

impl Actor {
    pub fn new(root: &Path, seed: u64) -> Self {
        Self { root: root.to_owned(), random: Random(seed), open: Vec::new() }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// Some path: up to two directories deep.
    fn path(&mut self) -> PathBuf {
        let mut path = self.root.clone();
        for _ in 0..self.below(3) {
            path.push(format!("d{}", self.below(3)));
        }
        match self.below(4) {
            0 => path.push(format!("d{}", self.below(3))),
            1 => path.push(std::ffi::OsStr::new("\u{fc} \n\t")),
            _ => path.push(format!("f{}", self.below(6))),
        }
        path
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let len = self.below(most) + 1;
        (0..len).map(|_| self.random.next() as u8).collect()
    }

    fn file(&mut self) -> Option<&File> {
        let open = self.open.len() as u64;
        if open == 0 {
            return None;
        }
        let which = self.below(open) as usize;
        Some(&self.open[which])
    }

    /// Does one thing. Failing is as good as anything else.
    pub fn step(&mut self) {
        let path = self.path();
        match self.below(24) {
            0..=2 => {
                if let Ok(mut file) = OpenOptions::new()
                    .create(true)
                    .read(true)
                    .write(true)
                    .truncate(self.random.below(4) == 0)
                    .custom_flags(libc::O_NONBLOCK)
                    .mode(0o600 + (self.random.below(0o200) as u32))
                    .open(&path)
                {
                    let _ = file.write_all(&self.bytes(3000));
                    self.open.push(file);
                }
            }
            3..=5 => {
                let (offset, bytes) = (self.below(40_000), self.bytes(9000));
                let _ = self.file().map(|file| file.write_at(&bytes, offset));
            }
            6 => {
                if let Ok(mut file) =
                    OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK).open(&path)
                {
                    let _ = file.write_all(&self.bytes(500));
                    let _ = file.write_all(&self.bytes(500));
                }
            }
            7 => {
                let size = self.below(50_000);
                let _ = self.file().map(|file| file.set_len(size));
            }
            8 => {
                let mode = [
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::ZERO_RANGE,
                    FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                ][self.below(5) as usize];
                let (offset, len) = (self.below(60_000), self.below(20_000) + 1);
                let _ = self.file().map(|file| rustix::fs::fallocate(file, mode, offset, len));
            }
            9 => {
                let (mut from, mut to, len) =
                    (self.below(30_000), self.below(30_000), self.below(20_000) as usize);
                let (Some(a), Some(b)) = (self.open.first(), self.open.last()) else { return };
                let _ = rustix::fs::copy_file_range(a, Some(&mut from), b, Some(&mut to), len);
            }
            10 => {
                let keep = self.below(4) as usize;
                let which = self.open.len().saturating_sub(keep);
                drop(self.open.drain(..which));
            }
            11 | 12 => drop(std::fs::create_dir(&path)),
            13 => drop(std::fs::remove_dir(&path)),
            14 => drop(std::fs::remove_file(&path)),
            15 => drop(symlink(format!("to {}", self.below(9)), &path)),
            16 => drop(std::fs::hard_link(&path, self.path())),
            17 | 18 => drop(std::fs::rename(&path, self.path())),
            19 => {
                let flags = [RenameFlags::EXCHANGE, RenameFlags::NOREPLACE][self.below(2) as usize];
                let _ = rustix::fs::renameat_with(CWD, &path, CWD, self.path(), flags);
            }
            20 => {
                let mode = [0o644, 0o4755, 0o2755, 0o1777, 0o700][self.below(5) as usize];
                let _ = std::fs::set_permissions(&path, PermissionsExt::from_mode(mode));
            }
            21 => {
                let owner = self.below(3) as u32;
                let _ = std::os::unix::fs::lchown(
                    &path,
                    Some(owner),
                    self.below(2).checked_sub(1).map(|_| owner),
                );
            }
            22 => {
                let name = format!("user.x{}", self.below(3));
                let value = self.bytes(200);
                if self.below(3) == 0 {
                    let _ = rustix::fs::lremovexattr(&path, name.as_str());
                } else {
                    let _ = rustix::fs::lsetxattr(&path, name.as_str(), &value, XattrFlags::empty());
                }
            }
            _ => {
                let kind =
                    [FileType::Fifo, FileType::Socket, FileType::CharacterDevice][self.below(3) as usize];
                let _ = rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(0o640), 0x103);
            }
        }
    }
}
