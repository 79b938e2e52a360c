//! From file handles to [`FileId`]s and back.
//!
//! A file handle names an inode for life: its number and its generation. twinfs derives a [`FileId`] from it, and the
//! handle from the [`FileId`], so that no table and no open descriptor is needed for an object. That works for file
//! systems whose handles hold exactly that, in a known shape:
//!
//! ```text
//! file system        type   bytes (integers in the machine's order)
//! ext4, f2fs, xfs¹   0x01   inode 4, generation 4
//! tmpfs              0x01   generation 4, inode low 4, inode high 4
//! xfs                0x81   inode 8, generation 4
//! btrfs              0x4d   inode 8, subvolume 8, generation 4
//! ```
//!
//! ¹ if all its inode numbers fit 32 bits. Anything else is refused when a volume is opened, by name: file systems that
//! invent inode numbers (FAT, overlayfs) have handles that break when an inode leaves memory.
//!
//! [`FileId`]: twinfs_core::id::FileId

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Stat, fstat, fstatfs};
use twinfs_replicator::sys::handle::{self, RawHandle};

use crate::errno::{FsError, Result};

/// The shape of the handles of one file system (of one subvolume, for btrfs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandleShape {
    /// Inode (32 bits), generation.
    Ino32,
    /// Inode (64 bits), generation.
    Ino64,
    /// Generation, inode (64 bits).
    Tmpfs,
    /// Inode (64 bits), subvolume, generation.
    Btrfs {
        /// The subvolume.
        root: u64,
    },
}

/// Why a directory cannot be mirrored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoHandles {
    /// The file system is not one whose handles are known to be stable.
    #[error(
        "its file system ({0}) is not supported: twinfs needs stable file handles, \
         as ext4, xfs, btrfs, f2fs and tmpfs have them"
    )]
    FileSystem(String),
    /// A handle did not lead back to where it came from.
    #[error("its file system's handles do not work as expected: {0}")]
    RoundTrip(String),
}

const FILEID_INO32_GEN: i32 = 0x01;
const FILEID_XFS_64: i32 = 0x81;
const FILEID_BTRFS: i32 = 0x4d;

/// The file systems that are supported, by the magic numbers of `statfs(2)`.
const FILE_SYSTEMS: [(u64, &str); 5] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "f2fs"),
    (0x0102_1994, "tmpfs"),
];

impl HandleShape {
    /// Finds out the shape of the handles below a directory (opened for reading), and tries a handle: from the
    /// directory to its handle and back.
    ///
    /// # Errors
    /// [`NoHandles`] says why it cannot be mirrored.
    pub fn probe(root: impl AsFd) -> Result<Self, NoHandles> {
        let broken =
            |what: &str, error: &dyn std::fmt::Display| NoHandles::RoundTrip(format!("{what}: {error}"));
        let file_system = fstatfs(&root).map_err(|error| broken("statfs", &error))?;
        let magic = u64::try_from(file_system.f_type).unwrap_or_default();
        if !FILE_SYSTEMS.iter().any(|(known, _)| *known == magic) {
            return Err(NoHandles::FileSystem(format!("type {magic:#x}")));
        }
        let stat = fstat(&root).map_err(|error| broken("fstat", &error))?;
        let raw = handle::of_fd(&root).map_err(|error| broken("name_to_handle_at", &error))?;
        let shape = Self::of(&raw, stat.st_ino).ok_or_else(|| {
            NoHandles::RoundTrip(format!(
                "type {:#x} with {} bytes is unknown",
                raw.kind(),
                raw.bytes().len()
            ))
        })?;
        let (ino, generation) = shape.decode(&raw).expect("its shape was taken from it");
        let back = shape
            .open(&root, ino, generation, libc::O_PATH)
            .and_then(|fd| Ok(fstat(fd)?))
            .map_err(|error| broken("open_by_handle_at", &error))?;
        if (back.st_dev, back.st_ino) == (stat.st_dev, stat.st_ino) {
            Ok(shape)
        } else {
            Err(NoHandles::RoundTrip("a handle led to another inode".to_owned()))
        }
    }

    /// The shape of a handle of the inode `ino`.
    fn of(raw: &RawHandle, ino: u64) -> Option<Self> {
        let subvolume =
            raw.bytes().get(8..16).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
        let candidates = [
            Some(Self::Ino32),
            Some(Self::Ino64),
            Some(Self::Tmpfs),
            subvolume.map(|root| Self::Btrfs { root }),
        ];
        candidates
            .into_iter()
            .flatten()
            .find(|shape| shape.decode(raw).is_some_and(|(found, _)| found == ino))
    }

    /// Inode number and generation of a handle; `None` if it has another shape (or lies in another subvolume).
    fn decode(self, raw: &RawHandle) -> Option<(u64, u32)> {
        let word = |at: usize| {
            raw.bytes().get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes)
        };
        let long = |at: usize| {
            raw.bytes().get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes)
        };
        match (self, raw.kind(), raw.bytes().len()) {
            (Self::Ino32, FILEID_INO32_GEN, 8) => Some((u64::from(word(0)?), word(4)?)),
            (Self::Tmpfs, FILEID_INO32_GEN, 12) => {
                Some((u64::from(word(4)?) | u64::from(word(8)?) << 32, word(0)?))
            }
            (Self::Ino64, FILEID_XFS_64, 12) => Some((long(0)?, word(8)?)),
            (Self::Btrfs { root }, FILEID_BTRFS, 20) if long(8)? == root => Some((long(0)?, word(16)?)),
            _ => None,
        }
    }

    /// The handle of an inode; `None` for a number that the shape has no room for.
    fn encode(self, ino: u64, generation: u32) -> Option<RawHandle> {
        let mut bytes = Vec::with_capacity(20);
        let kind = match self {
            Self::Ino32 => {
                bytes.extend(u32::try_from(ino).ok()?.to_ne_bytes());
                bytes.extend(generation.to_ne_bytes());
                FILEID_INO32_GEN
            }
            Self::Tmpfs => {
                bytes.extend(generation.to_ne_bytes());
                bytes.extend(((ino & u64::from(u32::MAX)) as u32).to_ne_bytes());
                bytes.extend(((ino >> 32) as u32).to_ne_bytes());
                FILEID_INO32_GEN
            }
            Self::Ino64 => {
                bytes.extend(ino.to_ne_bytes());
                bytes.extend(generation.to_ne_bytes());
                FILEID_XFS_64
            }
            Self::Btrfs { root } => {
                bytes.extend(ino.to_ne_bytes());
                bytes.extend(root.to_ne_bytes());
                bytes.extend(generation.to_ne_bytes());
                FILEID_BTRFS
            }
        };
        RawHandle::new(kind, &bytes)
    }

    /// Inode number and generation of an open object (`O_PATH` is enough).
    ///
    /// # Errors
    /// [`FsError::Foreign`] if it belongs to another file system or subvolume; otherwise the system's.
    pub fn identify(self, fd: impl AsFd, stat: &Stat) -> Result<(u64, u32)> {
        let raw = handle::of_fd(fd)?;
        self.decode(&raw).filter(|(ino, _)| *ino == stat.st_ino).ok_or(FsError::Foreign)
    }

    /// Opens an inode. `mount` is any open file or directory of the file system, `flags` are those of `open(2)`.
    ///
    /// # Errors
    /// `ESTALE` if the object is gone; otherwise the system's.
    pub fn open(self, mount: impl AsFd, ino: u64, generation: u32, flags: i32) -> Result<OwnedFd> {
        let handle = self.encode(ino, generation).ok_or(FsError::NoNode)?;
        Ok(handle::open(mount, &handle, flags)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_reads_what_it_writes() {
        let (ino, generation) = (0x0102_0304, 0xa0b0_c0d0);
        for shape in
            [HandleShape::Ino32, HandleShape::Ino64, HandleShape::Tmpfs, HandleShape::Btrfs { root: 5 }]
        {
            let raw = shape.encode(ino, generation).unwrap();
            assert_eq!(shape.decode(&raw), Some((ino, generation)), "{shape:?}");
            assert_eq!(HandleShape::of(&raw, ino), Some(shape));
            assert_eq!(HandleShape::of(&raw, ino + 1), None, "the inode number is checked");
        }
        assert!(HandleShape::Ino32.encode(1 << 32, 0).is_none());
        let other = HandleShape::Btrfs { root: 6 }.encode(ino, generation).unwrap();
        assert_eq!(HandleShape::Btrfs { root: 5 }.decode(&other), None, "another subvolume is foreign");
    }

    #[test]
    fn unsupported_file_systems_are_refused_by_name() {
        let proc = std::fs::File::open("/proc").unwrap();
        let refused = HandleShape::probe(&proc).unwrap_err();
        assert!(matches!(refused, NoHandles::FileSystem(_)), "{refused}");
        assert!(refused.to_string().contains("0x9fa0"), "{refused}");
    }

    #[test]
    fn a_handle_leads_to_a_renamed_file_and_not_to_its_successor() {
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let shape =
            HandleShape::probe(&root).expect("the directory for temporary files is on a supported system");
        let path = dir.path().join("a");
        std::fs::write(&path, "one").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let (ino, generation) = shape.identify(&file, &fstat(&file).unwrap()).unwrap();
        std::fs::rename(&path, dir.path().join("b")).unwrap();
        let again = shape.open(&root, ino, generation, libc::O_RDONLY).unwrap();
        assert_eq!(std::io::read_to_string(std::fs::File::from(again)).unwrap(), "one");
        drop(file);
        std::fs::remove_file(dir.path().join("b")).unwrap();
        std::fs::write(&path, "two").unwrap();
        let gone = shape.open(&root, ino, generation, libc::O_RDONLY).unwrap_err();
        assert_eq!(gone, FsError::Os(rustix::io::Errno::STALE));
    }
}
