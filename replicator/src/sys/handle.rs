//! File handles: names of inodes that survive renames, and reuse of the inode number does not fool them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Largest file handle that Linux makes, in bytes (`MAX_HANDLE_SZ`).
pub const HANDLE_BYTES_MAX: usize = 128;

/// A file handle as the kernel encodes it: what the bytes mean is up to the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawHandle {
    kind: i32,
    len: usize,
    bytes: [u8; HANDLE_BYTES_MAX],
}

impl RawHandle {
    /// A handle of a type and its bytes; `None` if there are too many.
    #[must_use]
    pub fn new(kind: i32, bytes: &[u8]) -> Option<Self> {
        let mut handle = Self { kind, len: bytes.len(), bytes: [0; HANDLE_BYTES_MAX] };
        handle.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(handle)
    }

    /// The file system's type of the handle.
    #[must_use]
    pub const fn kind(&self) -> i32 {
        self.kind
    }

    /// The opaque bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// `struct file_handle` with room for the largest one.
#[repr(C)]
struct Buffer {
    bytes: libc::c_uint,
    kind: libc::c_int,
    handle: [u8; HANDLE_BYTES_MAX],
}

/// The handle of the object that `fd` itself refers to (`O_PATH` is enough).
///
/// # Errors
/// `EOPNOTSUPP` if the file system has no handles; otherwise what `name_to_handle_at(2)` says.
pub fn of_fd(fd: impl AsFd) -> io::Result<RawHandle> {
    let mut buffer =
        Buffer { bytes: HANDLE_BYTES_MAX as libc::c_uint, kind: 0, handle: [0; HANDLE_BYTES_MAX] };
    let mut mount_id: libc::c_int = 0;
    let empty: &CStr = c"";
    // SAFETY: the path is NUL-terminated, and `buffer` has the layout of `struct file_handle` followed by as many bytes
    // as its first field says; the kernel writes no more than that, and one int to `mount_id`.
    let result = unsafe {
        libc::name_to_handle_at(
            fd.as_fd().as_raw_fd(),
            empty.as_ptr(),
            (&raw mut buffer).cast::<libc::file_handle>(),
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let len = (buffer.bytes as usize).min(HANDLE_BYTES_MAX);
    Ok(RawHandle { kind: buffer.kind, len, bytes: buffer.handle })
}

/// Opens the object of a handle. `mount` is an open file or directory (not `O_PATH`) of the same mount; `flags` are
/// those of `open(2)`, and `O_CLOEXEC` is added.
///
/// # Errors
/// `ESTALE` if the object is gone; `EPERM` without `CAP_DAC_READ_SEARCH`; otherwise what `open(2)` says.
pub fn open(mount: impl AsFd, handle: &RawHandle, flags: i32) -> io::Result<OwnedFd> {
    let mut buffer = Buffer { bytes: handle.len as libc::c_uint, kind: handle.kind, handle: handle.bytes };
    // SAFETY: `buffer` has the layout of `struct file_handle` and holds as many bytes as its first field says.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_fd().as_raw_fd(),
            (&raw mut buffer).cast::<libc::file_handle>(),
            flags | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
