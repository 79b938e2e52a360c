//! Puts a FUSE file system into the tree of mounts, and takes it out again.
//!
//! The mount is made with the new mount interface, because twinfs mounts over the very directory that it mirrors (whose
//! descriptor was taken before), and beneath another mount when a replica is promoted.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use fuser::{Config, Filesystem, Notifier, Session, SessionACL};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use rustix::process::{Resource, getrlimit, setrlimit};
use twinfs_core::limits;

/// How often a mount that is in use is looked at again, and after which pause: programs that look at every mount now and
/// then hold it for a moment.
pub const IDLE_LOOKS: u32 = 5;
/// See [`IDLE_LOOKS`].
pub const IDLE_PAUSE: Duration = Duration::from_millis(50);

/// Where a mount goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On top of what is there.
    Over,
    /// Beneath the mount that is there: it comes to light when that one is detached (Linux 6.5).
    Beneath,
}

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Threads that serve the kernel, 1 to [`limits::FUSE_THREADS_MAX`].
    pub threads: usize,
    /// Where the mount goes.
    pub place: Place,
    /// Nothing can be written through this mount.
    pub read_only: bool,
    /// Set-user-id programs and devices work. Not on a replica, whose bytes come from elsewhere.
    pub trusted: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            threads: cpus.clamp(2, limits::FUSE_THREADS_MAX),
            place: Place::Over,
            read_only: false,
            trusted: true,
        }
    }
}

/// Why mounting failed. Nothing is mounted.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct MountError {
    what: &'static str,
    error: io::Error,
}

impl MountError {
    pub(crate) fn new(what: &'static str, error: impl Into<io::Error>) -> Self {
        Self { what, error: error.into() }
    }

    /// The system's error.
    #[must_use]
    pub const fn os(&self) -> &io::Error {
        &self.error
    }
}

/// How a mount was taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone, and nobody uses it.
    Clean,
    /// It is out of sight, but programs have files of it open: it ends when they close them, or fails for them when the
    /// daemon ends.
    Detached,
    /// Somebody else had taken it away already, or put another mount over it.
    NotOurs,
}

/// A mounted file system. Dropping it does not unmount it.
pub struct Mounted {
    target: PathBuf,
    mount_id: u64,
    notifier: Notifier,
    end: Arc<End>,
}

/// How the threads that serve the kernel came to an end.
#[derive(Debug, Default)]
struct End {
    outcome: Mutex<Option<io::Result<()>>>,
    changed: Condvar,
}

/// Mounts a file system. `ready` is given the means to invalidate what the kernel caches, before any request comes.
///
/// # Errors
/// [`MountError`].
pub fn mount<F: Filesystem>(
    filesystem: F,
    target: &Path,
    options: &MountOptions,
    ready: impl FnOnce(Notifier),
) -> Result<Mounted, MountError> {
    raise_descriptor_limit();
    // The kernel resolves the target only at the end; the path must stand for the same directory at unmount.
    let target = target.canonicalize().map_err(|error| MountError::new("finding the mount point", error))?;
    let device: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|error| MountError::new("opening /dev/fuse", error))?
        .into();
    let mount = create(&device, options).map_err(|error| MountError::new("creating the mount", error))?;
    let mount_id = mount_id(&mount).map_err(|error| MountError::new("identifying the mount", error))?;
    let mut config = Config::default();
    config.n_threads = Some(options.threads.clamp(1, limits::FUSE_THREADS_MAX));
    config.clone_fd = true;
    let session = Session::from_fd(filesystem, device, SessionACL::All, config)
        .map_err(|error| MountError::new("greeting the kernel", error))?;
    let notifier = session.notifier();
    ready(notifier.clone());
    let end = Arc::new(End::default());
    let theirs = end.clone();
    std::thread::Builder::new()
        .name("twinfs-fuse".to_owned())
        .spawn(move || {
            let outcome = session.run();
            *theirs.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            theirs.changed.notify_all();
        })
        .map_err(|error| MountError::new("starting threads", error))?;
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if options.place == Place::Beneath {
        // MOVE_MOUNT_BENEATH
        flags |= MoveMountFlags::from_bits_retain(0x200);
    }
    // If this fails, dropping the detached mount ends the session, and its threads.
    move_mount(&mount, c"", CWD, &target, flags)
        .map_err(|error| MountError::new("attaching the mount", error))?;
    Ok(Mounted { target, mount_id, notifier, end })
}

fn create(device: &OwnedFd, options: &MountOptions) -> io::Result<OwnedFd> {
    let context = fsopen(c"fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    for (key, value) in [
        ("source", "twinfs"),
        ("subtype", "twinfs"),
        ("fd", device.as_raw_fd().to_string().as_str()),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
        ("max_read", limits::WRITE_BYTES_MAX.to_string().as_str()),
    ] {
        fsconfig_set_string(context, key, value)?;
    }
    fsconfig_set_flag(context, "allow_other")?;
    fsconfig_set_flag(context, "default_permissions")?;
    fsconfig_create(context)?;
    let mut attributes = MountAttrFlags::empty();
    if options.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    if !options.trusted {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    }
    Ok(fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Takes away what a killed daemon left mounted at `path`: a mount that nobody serves.
///
/// # Errors
/// The system's.
pub fn remove_dead(path: &Path) -> io::Result<()> {
    for _ in 0..limits::DEAD_MOUNTS_MAX {
        // What the kernel has cached of a dead mount's root must not make it look alive.
        match statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS) {
            Err(Errno::NOTCONN) => {
                tracing::warn!(path = %path.display(), "removing the mount of a daemon that was killed");
                unmount(path, UnmountFlags::DETACH)?;
            }
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// The number of the mount that an object was reached through, unique since boot.
fn mount_id(fd: impl AsFd) -> rustix::io::Result<u64> {
    // STATX_MNT_ID_UNIQUE (Linux 6.8); older kernels answer with STATX_MNT_ID if asked.
    let mask = StatxFlags::MNT_ID | StatxFlags::from_bits_retain(0x4000);
    Ok(statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, mask)?.stx_mnt_id)
}

/// Each file that a program opens takes a descriptor, so the soft limit (often 1024) must not stand in the way.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

impl Mounted {
    /// The mount point.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The means to invalidate what the kernel caches.
    #[must_use]
    pub const fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Waits until the mount is gone, whoever takes it away.
    ///
    /// # Errors
    /// What ended the threads that serve the kernel, if it was not that.
    pub fn wait(&self) -> io::Result<()> {
        self.wait_for(None).unwrap_or(Ok(()))
    }

    /// The same, for a while; `None` if it is still there.
    pub fn wait_for(&self, time: Option<Duration>) -> Option<io::Result<()>> {
        let outcome = self.end.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let there = |outcome: &mut Option<io::Result<()>>| outcome.is_none();
        let outcome = match time {
            None => self.end.changed.wait_while(outcome, there).unwrap_or_else(PoisonError::into_inner),
            Some(time) => {
                self.end
                    .changed
                    .wait_timeout_while(outcome, time, there)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        match &*outcome {
            None => None,
            Some(Ok(())) => Some(Ok(())),
            Some(Err(error)) => Some(Err(io::Error::new(error.kind(), error.to_string()))),
        }
    }

    /// Takes the mount away if nobody uses it; `None` if somebody does.
    ///
    /// # Errors
    /// The system's.
    pub fn unmount_if_idle(&self) -> io::Result<Option<Unmounted>> {
        if !self.is_on_top()? {
            return Ok(Some(Unmounted::NotOurs));
        }
        match unmount(&self.target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {
                let _ended = self.wait();
                Ok(Some(Unmounted::Clean))
            }
            Err(Errno::BUSY) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the mount out of sight, whoever uses it.
    ///
    /// # Errors
    /// The system's.
    pub fn detach(&self) -> io::Result<Unmounted> {
        if !self.is_on_top()? {
            return Ok(Unmounted::NotOurs);
        }
        unmount(&self.target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
        Ok(Unmounted::Detached)
    }

    /// Takes the mount away: cleanly if nobody uses it, else out of sight.
    ///
    /// # Errors
    /// The system's.
    pub fn unmount(&self) -> io::Result<Unmounted> {
        for _ in 0..IDLE_LOOKS {
            if let Some(how) = self.unmount_if_idle()? {
                return Ok(how);
            }
            std::thread::sleep(IDLE_PAUSE);
        }
        self.detach()
    }

    fn is_on_top(&self) -> io::Result<bool> {
        if self.wait_for(Some(Duration::ZERO)).is_some() {
            return Ok(false);
        }
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let top =
            rustix::fs::openat(CWD, &self.target, flags, rustix::fs::Mode::empty()).and_then(mount_id)?;
        Ok(top == self.mount_id)
    }
}

impl fmt::Debug for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounted")
            .field("target", &self.target)
            .field("mount_id", &self.mount_id)
            .finish_non_exhaustive()
    }
}
