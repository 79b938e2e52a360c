//! Files of a real directory, through file descriptors.

use std::ffi::CStr;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use twinfs_core::limits;

use super::{File, Operation, Storage, StorageError, StorageFile, Trust, check_name};

/// A real directory.
#[derive(Debug)]
pub struct RealStorage {
    dir: OwnedFd,
    /// For messages only.
    path: String,
}

impl RealStorage {
    /// Takes the directory `path`; makes it (mode 0700) if it is not there, durably.
    ///
    /// # Errors
    /// If it is a symlink or no directory, or the system refuses.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let shown = path.display().to_string();
        let err = |errno| StorageError::new(Operation::OpenDir, &shown, errno);
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) => {
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let parent = rustix::fs::open(parent, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
                parent.and_then(rustix::fs::fsync).map_err(err)?;
            }
            Err(Errno::EXIST) => (),
            Err(errno) => return Err(err(errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(err)?;
        Ok(Self { dir, path: shown })
    }

    fn open_at(&self, name: &str, operation: Operation, flags: OFlags) -> Result<File, StorageError> {
        check_name(name)?;
        let err = |errno| StorageError::new(operation, name, errno);
        let flags = flags | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(err)?;
        RealFile::shared(fd, name, operation)
    }
}

/// Opens one file read-only, wherever it stands: for looking into it.
///
/// # Errors
/// If it is no regular file, or the system refuses.
pub fn open_file(path: &Path) -> Result<File, StorageError> {
    let name = path.display().to_string();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| StorageError::new(Operation::Open, &name, errno))?;
    RealFile::shared(fd, &name, Operation::Open)
}

impl Storage for RealStorage {
    fn create(&self, name: &str) -> Result<File, StorageError> {
        self.open_at(name, Operation::Create, OFlags::CREATE | OFlags::EXCL)
    }

    fn open(&self, name: &str) -> Result<File, StorageError> {
        self.open_at(name, Operation::Open, OFlags::empty())
    }

    fn list(&self) -> Result<Vec<String>, StorageError> {
        let err = |errno| StorageError::new(Operation::List, &self.path, errno);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.dir).map_err(err)? {
            let entry = entry.map_err(err)?;
            let name: &CStr = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if names.len() == limits::STORAGE_FILES_MAX {
                return Err(StorageError::TooMany {
                    name: self.path.clone(),
                    max: limits::STORAGE_FILES_MAX,
                });
            }
            // A name that is not UTF-8 is none of ours; shown lossily it still is none of ours.
            names.push(name.to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        check_name(name)?;
        rustix::fs::unlinkat(&self.dir, name, rustix::fs::AtFlags::empty())
            .map_err(|errno| StorageError::new(Operation::Remove, name, errno))
    }

    fn rename(&self, name: &str, to: &str) -> Result<(), StorageError> {
        check_name(name)?;
        check_name(to)?;
        rustix::fs::renameat(&self.dir, name, &self.dir, to)
            .map_err(|errno| StorageError::new(Operation::Rename, name, errno))
    }

    fn sync_dir(&self) -> Result<(), StorageError> {
        rustix::fs::fsync(&self.dir).map_err(|errno| StorageError::new(Operation::SyncDir, &self.path, errno))
    }

    fn free_bytes(&self) -> Result<u64, StorageError> {
        let stat = rustix::fs::fstatvfs(&self.dir)
            .map_err(|errno| StorageError::new(Operation::Free, &self.path, errno))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn salt(&self) -> Result<[u8; 16], StorageError> {
        let mut salt = [0; 16];
        match getrandom::fill(&mut salt) {
            Ok(()) => Ok(salt),
            Err(_) => Err(StorageError::new(Operation::Salt, &self.path, Errno::IO)),
        }
    }
}

#[derive(Debug)]
struct RealFile {
    fd: OwnedFd,
    name: String,
    trust: Trust,
}

impl RealFile {
    /// Takes the descriptor of a regular file and nothing else (a device or fifo could block or misbehave).
    fn shared(fd: OwnedFd, name: &str, operation: Operation) -> Result<File, StorageError> {
        let err = |errno| StorageError::new(operation, name, errno);
        let stat = rustix::fs::fstat(&fd).map_err(err)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(err(Errno::INVAL));
        }
        Ok(Arc::new(Self { fd, name: name.to_owned(), trust: Trust::default() }))
    }

    fn err(&self, operation: Operation) -> impl Fn(Errno) -> StorageError + '_ {
        move |errno| StorageError::new(operation, &self.name, errno)
    }
}

impl StorageFile for RealFile {
    fn size(&self) -> Result<u64, StorageError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(self.err(Operation::Size))?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    fn allocate(&self, size: u64) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        let allocate = || rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, size);
        match rustix::io::retry_on_intr(allocate) {
            // Without fallocate the file is sparse: a write may meet a full disk later, and each sync stores a size.
            Err(Errno::OPNOTSUPP) if self.size()? < size => rustix::fs::ftruncate(&self.fd, size),
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => result,
        }
        .map_err(self.err(Operation::Allocate))
    }

    fn truncate(&self, size: u64) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        if self.size()? > size {
            rustix::fs::ftruncate(&self.fd, size).map_err(self.err(Operation::Truncate))?;
        }
        Ok(())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<(), StorageError> {
        let end = offset.saturating_add(buf.len() as u64);
        while !buf.is_empty() {
            if offset > limits::FILE_BYTES_MAX {
                return Err(StorageError::EndsEarly { name: self.name.clone(), end });
            }
            let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.fd, &mut *buf, offset))
                .map_err(self.err(Operation::Read))?;
            if read == 0 {
                return Err(StorageError::EndsEarly { name: self.name.clone(), end });
            }
            buf = &mut buf[read..];
            offset += read as u64;
        }
        Ok(())
    }

    fn write_at(&self, parts: &[&[u8]], mut offset: u64) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        let mut slices: Vec<IoSlice<'_>> =
            parts.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)).collect();
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwritev(&self.fd, left, offset))
                .map_err(self.err(Operation::Write))?;
            if written == 0 {
                return Err(StorageError::new(Operation::Write, &self.name, Errno::IO));
            }
            IoSlice::advance_slices(&mut left, written);
            offset += written as u64;
        }
        Ok(())
    }

    fn sync_data(&self) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        // Not retried on an interruption either: whether the first attempt reported and forgot an error is unknown.
        self.trust.after_sync(rustix::fs::fdatasync(&self.fd).map_err(self.err(Operation::SyncData)))
    }

    fn settle(&self) -> Result<(), StorageError> {
        self.sync_data()?;
        rustix::fs::fadvise(&self.fd, 0, None, Advice::DontNeed).map_err(self.err(Operation::Read))
    }
}
