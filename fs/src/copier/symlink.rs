//! Symlinks are published before the names that stand for them.
//!
//! Of any other object a replica can make an empty one when it hears a name of it, and fill it when its turn comes. A
//! symlink cannot be changed, so the replica must know all of it first: both for the walk, which publishes the names in a
//! directory before what they stand for, and for a program that moves a symlink which the walk has not reached.

use rustix::fs::{fstat, readlinkat};
use rustix::io::Errno;
use twinfs_core::limits;
use twinfs_core::update::{Intent, Kind, Op};

use super::object::{Halt, Step, attrs_of, publish};
use crate::errno::{FsError, Result};
use crate::mirror::{Mirror, Target};

impl Mirror {
    /// Publishes a symlink that the replica does not know yet. Called without any lock.
    pub(super) fn copy_symlink(&self, target: &Target<'_>) -> Step {
        let (file, volume) = (target.node.id, target.volume);
        let Some(state) = volume.copy.state() else { return Ok(()) };
        let link = readlinkat(&target.fd, c"", Vec::new())?.into_bytes();
        {
            let pending = self.reserve_for_copy(volume, &Intent::Attrs { file }, link.len(), 0)?;
            let _guard = self.stripes.lock(&[file]);
            let stat = fstat(&target.fd)?;
            if stat.st_nlink == 0 || !state.owes(file, Kind::Symlink) {
                return Ok(());
            }
            state.made(file);
            publish(pending, Op::Object { file, target: &link }, attrs_of(&[(file, &stat)]), &[])?;
        }
        self.copy_xattrs(target).inspect_err(|halt| {
            if let Halt::Failed(_) = halt {
                state.unmade(file);
            }
        })
    }

    /// The same for an operation that is going to publish a name of an object, if that is a symlink.
    ///
    /// # Errors
    /// The backing file system's.
    pub(crate) fn tell_of_symlink(&self, target: &Target<'_>) -> Result<()> {
        if !target.volume.copy.owes(target.node.id, target.node.kind) {
            return Ok(());
        }
        match self.copy_symlink(target) {
            // That it is gone, or that this site may not write, is for the operation to find out.
            Ok(()) | Err(Halt::Stopped | Halt::Closed | Halt::Failed(FsError::Os(Errno::NOENT))) => Ok(()),
            Err(Halt::Failed(error)) => Err(error),
        }
    }

    /// The same for what a name stands for.
    ///
    /// # Errors
    /// The backing file system's.
    pub(crate) fn tell_of_name(&self, dir: &Target<'_>, name: &[u8]) -> Result<()> {
        if !dir.volume.copy.is_on() {
            return Ok(());
        }
        match dir.volume.child(&dir.fd, name) {
            Ok(child) => self.tell_of_symlink(&dir.sibling(child)),
            Err(_) => Ok(()), // The operation finds that, too.
        }
    }
}

/// Makes attempts until one of them has told, before it took its locks, of every symlink that it found under them; `None`
/// if it has not, because the names were changed in between.
///
/// # Errors
/// Those of the attempts; [`FsError::Restless`].
pub(crate) fn until_told<T>(mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    for _ in 0..limits::LOOKUP_RETRIES_MAX {
        if let Some(told) = attempt()? {
            return Ok(told);
        }
    }
    Err(FsError::Restless)
}
