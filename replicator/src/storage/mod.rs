//! Flat files in one directory, behind a trait.
//!
//! What must survive a crash goes through [`Storage`], so that the same code runs over a real directory
//! ([`RealStorage`]) and over a simulated disk ([`SimStorage`]) that loses, tears and reorders whatever was not synced
//! (the idea of live, durable and crash images is redb's).
//!
//! The rules that both keep:
//!
//! * Nothing written is durable before [`StorageFile::sync_data`] returned; no name made or removed is durable before
//!   [`Storage::sync_dir`] returned.
//! * A failed sync is final for its file. The kernel reports a lost write-back once, then forgets it, so a second sync
//!   that succeeds would prove nothing: from then on every write and sync of that file answers
//!   [`StorageError::Failed`].

mod power;
mod real;
mod simulated;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::failpoint::{self, FailPoint};

pub use power::{Power, Pulse};
pub use real::{RealStorage, open_file};
pub use simulated::{Fault, SECTOR_BYTES, SimStorage};

/// A file of a [`Storage`].
pub type File = Arc<dyn StorageFile>;

/// What is done to a storage; for messages and for aiming faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Operation {
    OpenDir,
    Create,
    Open,
    List,
    Remove,
    Rename,
    SyncDir,
    Free,
    Salt,
    Size,
    Allocate,
    Truncate,
    Read,
    Write,
    SyncData,
}

impl Operation {
    /// Whether it changes what a crash leaves.
    const fn changes(self) -> bool {
        matches!(
            self,
            Self::Create
                | Self::Remove
                | Self::Rename
                | Self::SyncDir
                | Self::Allocate
                | Self::Truncate
                | Self::Write
                | Self::SyncData
        )
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenDir => "open directory",
            Self::Create => "create",
            Self::Open => "open",
            Self::List => "list",
            Self::Remove => "remove",
            Self::Rename => "rename",
            Self::SyncDir => "sync directory",
            Self::Free => "ask for the free space of",
            Self::Salt => "draw random bytes for",
            Self::Size => "ask for the size of",
            Self::Allocate => "allocate space for",
            Self::Truncate => "shorten",
            Self::Read => "read",
            Self::Write => "write",
            Self::SyncData => "sync",
        })
    }
}

/// Why a storage operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// The file system has no room. A write that answers this may have written a part.
    #[error("no space left to {operation} `{name}`")]
    NoSpace {
        /// What was tried.
        operation: Operation,
        /// The file.
        name: String,
    },
    /// The system refused.
    #[error("cannot {operation} `{name}`: {errno}")]
    Io {
        /// What was tried.
        operation: Operation,
        /// The file, or the directory.
        name: String,
        /// What the system said.
        #[source]
        errno: Errno,
    },
    /// A sync of this file failed before, so nobody knows what it holds on the medium.
    #[error("`{name}` cannot be trusted any more: an earlier sync of it failed")]
    Failed {
        /// The file.
        name: String,
    },
    /// The file is shorter than what was asked for.
    #[error("`{name}` ends before byte {end}")]
    EndsEarly {
        /// The file.
        name: String,
        /// One past the last byte that was asked for.
        end: u64,
    },
    /// A name that is not a plain file name.
    #[error("`{name}` is not a plain file name")]
    BadName {
        /// The name.
        name: String,
    },
    /// More files than the bound allows.
    #[error("more than {max} files in `{name}`")]
    TooMany {
        /// The directory.
        name: String,
        /// The bound.
        max: usize,
    },
}

impl StorageError {
    fn new(operation: Operation, name: &str, errno: Errno) -> Self {
        let name = name.to_owned();
        match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::NoSpace { operation, name },
            errno => Self::Io { operation, name, errno },
        }
    }

    /// As an error of the system.
    #[must_use]
    pub fn into_io(self) -> std::io::Error {
        match self {
            Self::Io { errno, .. } => errno.into(),
            Self::NoSpace { .. } => std::io::Error::new(std::io::ErrorKind::StorageFull, self),
            other => std::io::Error::other(other),
        }
    }

    /// What the user is told of it: the cause alone, and when it is gone.
    #[must_use]
    pub fn cause(&self) -> (String, &'static str) {
        match self {
            Self::NoSpace { .. } => ("no space left on device".to_owned(), "there is room"),
            Self::Io { errno, .. } => (errno.to_string(), "it can be written again"),
            other => (other.to_string(), "it can be written again"),
        }
    }

    /// Whether the file system has no room: the one failure after which trying again makes sense.
    #[must_use]
    pub const fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. })
    }
}

/// One directory of plain files.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Makes a new, empty file.
    ///
    /// # Errors
    /// If the name exists already, is not a plain file name, or the system refuses.
    fn create(&self, name: &str) -> Result<File, StorageError>;

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// If it does not exist, is no regular file, or the system refuses.
    fn open(&self, name: &str) -> Result<File, StorageError>;

    /// The names of all files, sorted.
    ///
    /// # Errors
    /// If the directory cannot be read, or holds more than
    /// [`STORAGE_FILES_MAX`](twinfs_core::limits::STORAGE_FILES_MAX) names.
    fn list(&self) -> Result<Vec<String>, StorageError>;

    /// Removes a name. Files that are open stay readable.
    ///
    /// # Errors
    /// If it does not exist or the system refuses.
    fn remove(&self, name: &str) -> Result<(), StorageError>;

    /// Gives a file another name, in one step: a crash leaves one of the two, unless the old name was not durable. A
    /// file that had the new name is replaced. Open files keep working.
    ///
    /// # Errors
    /// If there is no such file or the system refuses.
    fn rename(&self, name: &str, to: &str) -> Result<(), StorageError>;

    /// Makes all names made, changed and removed so far durable.
    ///
    /// # Errors
    /// If the system refuses; then nobody knows which names survive a crash.
    fn sync_dir(&self) -> Result<(), StorageError>;

    /// Bytes that can still be allocated without privileges.
    ///
    /// # Errors
    /// If the system refuses.
    fn free_bytes(&self) -> Result<u64, StorageError>;

    /// Sixteen fresh random bytes (from the seed, in a simulation).
    ///
    /// # Errors
    /// If the system has none.
    fn salt(&self) -> Result<[u8; 16], StorageError>;
}

/// An open file of a [`Storage`]. All methods may be called from several threads; offsets and sizes are bytes.
pub trait StorageFile: fmt::Debug + Send + Sync {
    /// Its size.
    ///
    /// # Errors
    /// If the system refuses.
    fn size(&self) -> Result<u64, StorageError>;

    /// Reserves space for `size` bytes and grows the file to it; new bytes read as zeros. Never shrinks.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`], or another refusal. The file may have grown by a part.
    fn allocate(&self, size: u64) -> Result<(), StorageError>;

    /// Makes the file shorter; nothing if it is not longer than `size`.
    ///
    /// # Errors
    /// The system's refusal.
    fn truncate(&self, size: u64) -> Result<(), StorageError>;

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// [`StorageError::EndsEarly`] if the file is too short, or the system's refusal.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), StorageError>;

    /// Writes all `parts`, one after the other, from `offset` on: one system call, unless it comes up short.
    ///
    /// # Errors
    /// The system's refusal. A part of the bytes may have been written.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> Result<(), StorageError>;

    /// Makes everything written so far durable, and the size.
    ///
    /// # Errors
    /// The system's refusal. It is final: see the module's rules.
    fn sync_data(&self) -> Result<(), StorageError>;

    /// Makes everything durable and forgets cached copies, so that the next reads tell what the medium holds. To be
    /// called before trusting a file that an earlier process wrote: after a failed sync the cache may still show bytes
    /// that never reached the medium.
    ///
    /// # Errors
    /// As [`sync_data`](Self::sync_data).
    fn settle(&self) -> Result<(), StorageError>;
}

/// Writes a file so that at every instant, also after a power cut, either the old or the new contents stand there.
///
/// # Errors
/// The storage's failure; unless it is that of the last step, the old contents stand there.
pub fn replace_durably(storage: &dyn Storage, name: &str, contents: &[u8]) -> Result<(), StorageError> {
    let temporary = format!("{name}.new");
    match storage.remove(&temporary) {
        Ok(()) | Err(StorageError::Io { errno: Errno::NOENT, .. }) => {}
        Err(error) => return Err(error),
    }
    let file = storage.create(&temporary)?;
    file.write_at(&[contents], 0)?;
    file.sync_data()?;
    failpoint::pass(FailPoint::FileWritten);
    storage.rename(&temporary, name)?;
    storage.sync_dir()
}

/// Remembers that a sync failed.
#[derive(Debug, Default)]
struct Trust {
    lost: AtomicBool,
}

impl Trust {
    /// Refuses if a sync failed before.
    fn check(&self, name: &str) -> Result<(), StorageError> {
        if self.lost.load(Ordering::Acquire) {
            Err(StorageError::Failed { name: name.to_owned() })
        } else {
            Ok(())
        }
    }

    /// Remembers the failure of a sync.
    fn after_sync(&self, result: Result<(), StorageError>) -> Result<(), StorageError> {
        if result.is_err() {
            self.lost.store(true, Ordering::Release);
        }
        result
    }
}

/// Checks that a name cannot leave its directory.
fn check_name(name: &str) -> Result<(), StorageError> {
    if twinfs_core::update::is_file_name(name.as_bytes()) {
        Ok(())
    } else {
        Err(StorageError::BadName { name: name.escape_debug().to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both implementations keep the same contract.
    fn contract(storage: &dyn Storage) {
        assert_eq!(storage.list().unwrap(), Vec::<String>::new());
        let file = storage.create("a.seg").unwrap();
        assert!(matches!(storage.create("a.seg"), Err(StorageError::Io { errno: Errno::EXIST, .. })));
        assert!(matches!(storage.open("b"), Err(StorageError::Io { errno: Errno::NOENT, .. })));
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "a\0b"] {
            assert!(matches!(storage.create(bad), Err(StorageError::BadName { .. })), "{bad:?}");
            assert!(matches!(storage.open(bad), Err(StorageError::BadName { .. })), "{bad:?}");
            assert!(matches!(storage.remove(bad), Err(StorageError::BadName { .. })), "{bad:?}");
            assert!(matches!(storage.rename("a.seg", bad), Err(StorageError::BadName { .. })), "{bad:?}");
        }

        file.allocate(10_000).unwrap();
        file.allocate(5).unwrap();
        assert_eq!(file.size().unwrap(), 10_000);
        file.write_at(&[b"hello ", b"", b"world"], 508).unwrap();
        file.sync_data().unwrap();
        storage.sync_dir().unwrap();
        file.settle().unwrap();
        let mut buf = [1; 16];
        file.read_at(&mut buf, 506).unwrap();
        assert_eq!(&buf, b"\0\0hello world\0\0\0");
        assert!(matches!(file.read_at(&mut buf, 9_990), Err(StorageError::EndsEarly { end: 10_006, .. })));
        file.read_at(&mut buf, 9_984).unwrap();
        assert_eq!(buf, [0; 16]);
        assert!(matches!(file.read_at(&mut buf, u64::MAX - 3), Err(StorageError::EndsEarly { .. })));
        file.write_at(&[b"end"], 10_000).unwrap();
        assert_eq!(file.size().unwrap(), 10_003);

        file.truncate(20_000).unwrap();
        assert_eq!(file.size().unwrap(), 10_003);
        file.truncate(512).unwrap();
        file.allocate(516).unwrap();
        let mut buf = [1; 8];
        file.read_at(&mut buf, 508).unwrap();
        assert_eq!(&buf, b"hell\0\0\0\0", "what was cut off does not come back");
        file.write_at(&[b"hello ", b"", b"world"], 508).unwrap();

        let mut buf = [1; 16];
        file.allocate(10_000).unwrap();
        storage.create("c").unwrap();
        assert_eq!(storage.list().unwrap(), ["a.seg", "c"]);
        storage.rename("c", "b").unwrap();
        assert!(matches!(storage.rename("c", "d"), Err(StorageError::Io { errno: Errno::NOENT, .. })));
        assert_eq!(storage.list().unwrap(), ["a.seg", "b"]);
        storage.remove("a.seg").unwrap();
        assert_eq!(storage.list().unwrap(), ["b"]);
        file.read_at(&mut buf, 508).unwrap();
        assert!(buf.starts_with(b"hello"), "a removed file stays readable while it is open");
        assert!(storage.free_bytes().unwrap() > 0);
        assert_ne!(storage.salt().unwrap(), storage.salt().unwrap());
    }

    #[test]
    fn real_storage_keeps_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        contract(&RealStorage::open(&dir.path().join("journal")).unwrap());
    }

    #[test]
    fn simulated_storage_keeps_the_contract() {
        contract(&SimStorage::new(1));
    }
}
