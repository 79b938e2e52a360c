//! What belongs to a thread, not to the process: its file system credentials, its umask; and truncation by path.

use std::ffi::CStr;
use std::io;

/// Gives the calling thread a umask, root and current directory of its own.
///
/// # Errors
/// What `unshare(2)` says.
pub fn unshare_fs() -> io::Result<()> {
    // SAFETY: CLONE_FS separates the umask and the current directory; memory and descriptors stay shared.
    if unsafe { libc::unshare(libc::CLONE_FS) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the user as whom this thread (and no other) makes files.
///
/// # Errors
/// `EPERM` if the thread may not do that.
pub fn set_fs_uid(uid: u32) -> io::Result<()> {
    // The wrappers of the C library change one thread only, too, but the raw call is what is meant.
    set_id(libc::SYS_setfsuid, uid)
}

/// Sets the group as which this thread (and no other) makes files.
///
/// # Errors
/// `EPERM` if the thread may not do that.
pub fn set_fs_gid(gid: u32) -> io::Result<()> {
    set_id(libc::SYS_setfsgid, gid)
}

fn set_id(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: both calls take one integer and touch no memory. They report nothing but the previous id: the second
    // call, with an id that cannot be set, reads back whether the first one worked.
    let now = unsafe {
        libc::syscall(call, libc::c_ulong::from(id));
        libc::syscall(call, libc::c_ulong::from(u32::MAX))
    };
    if now as u32 == id { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
}

/// `truncate(2)`. Unlike `ftruncate` it leaves the times alone when the size stays.
///
/// # Errors
/// What `truncate(2)` says.
pub fn truncate(path: &CStr, size: u64) -> io::Result<()> {
    let size = libc::off_t::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: the path is NUL-terminated, and the call touches no other memory.
    if unsafe { libc::truncate(path.as_ptr(), size) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
