//! On whose behalf a thread works.
//!
//! The kernel has checked every permission before a request arrives (`default_permissions`), so operations run with
//! all rights, and supplementary groups, which FUSE does not tell, do not matter. Two things must be the caller's all
//! the same: new files belong to the caller, with its umask, so that default ACLs and set-group-id directories work as
//! they do without twinfs; and whoever lacks `CAP_FSETID` loses set-user-id and set-group-id bits by writing,
//! truncating and changing owners, which the backing file system decides by the capability of the thread.

use std::cell::OnceCell;
use std::io;

use rustix::fs::Mode;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use twinfs_replicator::sys::thread as sys;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// File system user.
    pub uid: u32,
    /// File system group.
    pub gid: u32,
}

impl Caller {
    /// The superuser.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };

    /// Whether to take the caller for one who keeps set-id bits. FUSE tells the user only, so a user that was granted
    /// `CAP_FSETID` alone is taken for one without.
    #[must_use]
    pub const fn keeps_set_id(self) -> bool {
        self.uid == 0
    }
}

thread_local! {
    /// The capabilities of this thread, once it is prepared.
    static PREPARED: OnceCell<CapabilitySets> = const { OnceCell::new() };
}

/// Prepares the calling thread: a umask of its own, and capabilities that stay when the user changes.
fn prepare() -> io::Result<CapabilitySets> {
    PREPARED.with(|prepared| {
        if let Some(sets) = prepared.get() {
            return Ok(*sets);
        }
        sys::unshare_fs()?;
        let bits = rustix::thread::capabilities_secure_bits()?;
        rustix::thread::set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
        let sets = rustix::thread::capabilities(None)?;
        Ok(*prepared.get_or_init(|| sets))
    })
}

/// While it lives, this thread makes files as the caller.
#[derive(Debug)]
#[must_use]
pub struct Making {
    caller: Caller,
    _this_thread: std::marker::PhantomData<*const ()>,
}

impl Making {
    /// Takes on the caller's identity and umask.
    ///
    /// # Errors
    /// `EPERM` if this process may not do that.
    pub fn files_of(caller: Caller, umask: u32) -> io::Result<Self> {
        prepare()?;
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        // From here on dropping it undoes what was done.
        let making = Self { caller, _this_thread: std::marker::PhantomData };
        if caller.gid != 0 {
            sys::set_fs_gid(caller.gid)?;
        }
        if caller.uid != 0 {
            sys::set_fs_uid(caller.uid)?;
        }
        Ok(making)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let user = if self.caller.uid == 0 { Ok(()) } else { sys::set_fs_uid(0) };
        let group = if self.caller.gid == 0 { Ok(()) } else { sys::set_fs_gid(0) };
        user.and(group).expect("a thread that took on another identity may always become root again");
    }
}

/// While it lives, this thread has no `CAP_FSETID`, if the caller has none: set-id bits clear as they do for the caller.
#[derive(Debug)]
#[must_use]
pub struct SetId {
    restore: Option<CapabilitySets>,
    _this_thread: std::marker::PhantomData<*const ()>,
}

impl SetId {
    /// Gives up the capability unless `keep`.
    ///
    /// # Errors
    /// `EPERM` if this process may not do that.
    pub fn keep(keep: bool) -> io::Result<Self> {
        let mut restore = None;
        if !keep {
            let sets = prepare()?;
            let effective = sets.effective - CapabilitySet::FSETID;
            rustix::thread::set_capabilities(None, CapabilitySets { effective, ..sets })?;
            restore = Some(sets);
        }
        Ok(Self { restore, _this_thread: std::marker::PhantomData })
    }
}

impl Drop for SetId {
    fn drop(&mut self) {
        if let Some(sets) = self.restore.take() {
            rustix::thread::set_capabilities(None, sets)
                .expect("a thread may always take back an effective capability that it is permitted");
        }
    }
}
