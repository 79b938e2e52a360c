//! File handles in the form in which the image keeps many of them: small, comparable, storable.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::OFlags;

use crate::sys::handle::{self, HANDLE_BYTES_MAX, RawHandle};

/// Names an object for as long as it exists, wherever it is moved. It means something only on the file system that made it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle {
    kind: i32,
    bytes: Box<[u8]>,
}

impl Handle {
    /// The handle of an open object (`O_PATH` is enough).
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the file system has no handles.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let raw = handle::of_fd(fd)?;
        Ok(Self { kind: raw.kind(), bytes: raw.bytes().into() })
    }

    /// Opens the object. `mount` is any open object of its file system, not `O_PATH`.
    ///
    /// # Errors
    /// `ESTALE` if the object is gone, and whatever opening may say.
    pub fn open(&self, mount: impl AsFd, flags: OFlags) -> io::Result<OwnedFd> {
        let raw = RawHandle::new(self.kind, &self.bytes).ok_or(io::ErrorKind::InvalidInput)?;
        handle::open(mount, &raw, flags.bits().cast_signed())
    }

    /// The encoded form: the type (4 bytes, little-endian), then the handle.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.kind.to_le_bytes(), &*self.bytes].concat()
    }

    /// Reads the encoded form; `None` if it is too short or too long.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (kind, bytes) = bytes.split_first_chunk::<4>()?;
        let good = (1..=HANDLE_BYTES_MAX).contains(&bytes.len());
        good.then(|| Self { kind: i32::from_le_bytes(*kind), bytes: bytes.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_survives_renames_and_dies_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "text").unwrap();
        let handle = Handle::of(std::fs::File::open(&a).unwrap()).unwrap();
        let handle = Handle::from_bytes(&handle.to_bytes()).unwrap();
        std::fs::rename(&a, &b).unwrap();
        let mount = std::fs::File::open(dir.path()).unwrap();
        let mut again = std::fs::File::from(handle.open(&mount, OFlags::RDONLY).unwrap());
        assert_eq!(io::read_to_string(&mut again).unwrap(), "text");
        drop(again);
        std::fs::remove_file(&b).unwrap();
        let error = handle.open(&mount, OFlags::RDONLY).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    }
}
