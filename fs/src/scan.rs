//! Looks for changes that nobody captured: those that were made while a volume was not mounted.
//!
//! The tree is walked, and no file is read: what has a change time since the last stop may have changed, what has none did
//! not. That is a hint as good as the clock and the file system: a clock that was set back meanwhile, or a tree that was put
//! in place with its change times (an image of the file system), deceive it.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags, RawDir, fstat, openat};
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::Kind;
use twinfs_replicator::primary::mover::Examined;

use crate::errno::{FsError, Result};
use crate::mirror::{Attributes, Child, Mirror, Target, Volume};

/// A scan on a thread of its own. Dropped, it ends.
#[derive(Debug)]
pub struct Scan {
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Scan {
    /// Starts to look for objects that changed at or after `since`, in all volumes, and tells `done` what it finds; nothing
    /// if it was dropped before.
    ///
    /// # Errors
    /// The system's, if there can be no further thread.
    pub fn start(
        mirrors: Vec<Arc<Mirror>>,
        since: Timestamp,
        done: impl FnOnce(Examined) + Send + 'static,
    ) -> std::io::Result<Self> {
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let thread = std::thread::Builder::new().name("scan".to_owned()).spawn(move || {
            let volumes = (0..).map(VolumeIndex).zip(&mirrors);
            let found: Result<Option<Vec<_>>> =
                volumes.map(|(index, mirror)| mirror.changed_since(index, since, &stop)).collect();
            match found {
                Ok(Some(maps)) => done(Ok(maps)),
                Ok(None) => {}
                Err(error) => done(Err(format!(
                    "the source cannot be searched for changes that were made while it was not mounted: {error}"
                ))),
            }
        })?;
        Ok(Self { stopping, thread: Some(thread) })
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a scan has panicked");
        }
    }
}

impl Mirror {
    /// The objects of a volume that changed at or after an instant, by their change times; `None` if it was stopped.
    fn changed_since(
        &self,
        volume: VolumeIndex,
        since: Timestamp,
        stop: &AtomicBool,
    ) -> Result<Option<ChangeMap>> {
        let volume = self.volumes.iter().find(|known| known.index == volume).ok_or(FsError::NoNode)?;
        let mut map = ChangeMap::default();
        let mut left = vec![volume.root];
        if is_since(&Attributes::from(&fstat(&volume.root_fd)?), since) {
            map.note_whole(volume.root);
        }
        while let Some(dir) = left.pop() {
            if stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            // One that went away meanwhile went through the mount.
            let Some(dir) = self.object(volume, dir)? else { continue };
            each_child(volume, &dir, &mut |child| {
                if is_since(&Attributes::from(&child.stat), since) {
                    map.note_whole(child.id);
                }
                if child.kind == Kind::Dir {
                    left.push(child.id);
                }
            })?;
        }
        Ok(Some(map))
    }

    /// The objects in a directory that changed at or after an instant, by their change times. None, if it is no directory.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn children_changed_since(
        &self,
        volume: VolumeIndex,
        dir: FileId,
        since: Timestamp,
    ) -> Result<Vec<FileId>> {
        let volume = self.volumes.iter().find(|known| known.index == volume).ok_or(FsError::NoNode)?;
        let mut changed = Vec::new();
        if let Some(dir) = self.object(volume, dir)?.filter(|target| target.node.kind == Kind::Dir) {
            each_child(volume, &dir, &mut |child| {
                if is_since(&Attributes::from(&child.stat), since) {
                    changed.push(child.id);
                }
            })?;
        }
        Ok(changed)
    }
}

fn is_since(attributes: &Attributes, since: Timestamp) -> bool {
    let (seconds, ns) = attributes.ctime;
    u64::try_from(seconds).unwrap_or_default().saturating_mul(1_000_000_000) + u64::from(ns) >= since.0
}

/// Calls `take` for each object in a directory that belongs to the volume.
fn each_child(volume: &Volume, dir: &Target<'_>, take: &mut dyn FnMut(Child)) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOATIME;
    let opened = openat(&dir.fd, c".", flags, Mode::empty())?;
    let mut buffer = vec![MaybeUninit::uninit(); limits::DIR_BUFFER_BYTES];
    let mut entries = RawDir::new(&opened, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"."
            && name != b".."
            && let Some(child) = volume.child_if_any(dir, name)?
        {
            take(child);
        }
    }
    Ok(())
}
