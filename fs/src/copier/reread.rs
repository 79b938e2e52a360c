//! Reads again what changed of an object, and no more.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Advice, OFlags, fadvise, fstat};
use rustix::io::Errno;
use twinfs_core::change_map::{Change, TO_THE_END};
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::{Attr, AttrList, Intent, Kind, Op};

use super::object::{Halt, Life, Step, Worker, attrs_of, next_data, publish};
use crate::errno::FsError;
use crate::mirror::{Target, names};
use crate::ops::data::read_full;

/// What stands at a place of a file.
enum Piece {
    /// Data, which is in the buffer now: so many bytes.
    Data(usize),
    /// A hole up to here.
    Hole(u64),
    /// Data that came in after room was reserved.
    Surprise,
}

impl Worker {
    /// Publishes the parts of an object that changed, as they are now.
    pub(super) fn reread(&self, target: &Target<'_>, change: &Change) -> Step<Life> {
        if change.is_gone() || fstat(&target.fd)?.st_nlink == 0 {
            return Ok(Life::Gone);
        }
        if target.node.kind == Kind::File && change.ranges().len() > 0 {
            let opened = match self.mirror.open_backing(target, OFlags::RDONLY | OFlags::NOATIME) {
                Err(_) if fstat(&target.fd)?.st_nlink == 0 => return Ok(Life::Gone),
                other => other?,
            };
            if self.ranges(target, &opened, change.ranges().collect())? == Life::Gone {
                return Ok(Life::Gone);
            }
        }
        for name in change.xattrs() {
            self.wait_room()?;
            if !self.mirror.copy_xattr(target, name)? {
                self.no_xattr(target, name)?;
            }
        }
        for name in change.names() {
            self.reread_name(target, name)?;
        }
        self.attributes(target)
    }

    fn attributes(&self, target: &Target<'_>) -> Step<Life> {
        let file = target.node.id;
        let pending = self.reserve(&Intent::Attrs { file }, 0, 0)?;
        let _guard = self.mirror.stripes.lock(&[file]);
        let stat = fstat(&target.fd)?;
        if stat.st_nlink == 0 {
            return Ok(Life::Gone);
        }
        publish(pending, Op::SetAttr { file }, attrs_of(&[(file, &stat)]), &[])?;
        Ok(Life::Named)
    }

    /// Publishes ranges of a file's content, and what programs have moved meanwhile.
    fn ranges(&self, target: &Target<'_>, opened: &OwnedFd, ranges: Vec<(u64, u64)>) -> Step<Life> {
        let mut ranges = VecDeque::from(ranges);
        loop {
            if let Some(offset) = self.state.moved() {
                ranges.push_back((offset, TO_THE_END));
            }
            let Some((start, end)) = ranges.pop_front() else { return Ok(Life::Named) };
            // It may have been shorter: then nothing of what the replica has beyond its end counts.
            if end == TO_THE_END && self.cut_off(target)? == Life::Gone {
                return Ok(Life::Gone);
            }
            if self.range(target, opened, start, end)? == Life::Gone {
                return Ok(Life::Gone);
            }
        }
    }

    fn cut_off(&self, target: &Target<'_>) -> Step<Life> {
        let file = target.node.id;
        let pending = self.reserve(&Intent::Attrs { file }, 0, 0)?;
        let _guard = self.mirror.stripes.lock(&[file]);
        let stat = fstat(&target.fd)?;
        if stat.st_nlink == 0 {
            return Ok(Life::Gone);
        }
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        publish(pending, Op::Truncate { file, size }, attrs_of(&[(file, &stat)]), &[])?;
        Ok(Life::Named)
    }

    fn range(&self, target: &Target<'_>, opened: &OwnedFd, start: u64, end: u64) -> Step<Life> {
        let file = target.node.id;
        let (mut offset, mut buffer) = (start, Vec::new());
        loop {
            // Without the lock, to know how much room is needed; the kernel may read meanwhile, so that few wait for a disk
            // under the lock.
            let room = match next_data(opened, offset)? {
                Some((at, len)) if at == offset => clip(len, end - offset),
                _ => 0,
            };
            buffer.resize(room, 0);
            if let Some(len) = NonZeroU64::new(room as u64) {
                let _ = fadvise(opened, offset, Some(len), Advice::WillNeed);
            }
            let pending = self.reserve(&Intent::Range { file, offset, len: room as u64 }, 0, room)?;
            let _guard = self.mirror.stripes.lock(&[file]);
            let stat = fstat(&target.fd)?;
            if stat.st_nlink == 0 {
                return Ok(Life::Gone);
            }
            let end = end.min(u64::try_from(stat.st_size).unwrap_or_default());
            if offset >= end {
                return Ok(Life::Named);
            }
            let attrs = attrs_of(&[(file, &stat)]);
            match piece(opened, offset, end, &mut buffer)? {
                Piece::Surprise => {}
                Piece::Hole(to) => {
                    let op = Op::Zero { file, offset, len: to - offset, hole: true };
                    publish(pending, op, attrs, &[])?;
                    offset = to;
                }
                Piece::Data(len) => {
                    let bytes = u32::try_from(len).expect("at most WRITE_BYTES_MAX");
                    publish(pending, Op::Write { file, offset, len: bytes }, attrs, &buffer[..len])?;
                    self.state.advance(super::state::WHOLE, len as u64);
                    offset += len as u64;
                }
            }
        }
    }

    /// Publishes that an extended attribute is not there, unless it is by now: then whoever set it has published that.
    fn no_xattr(&self, target: &Target<'_>, name: &[u8]) -> Step {
        let file = target.node.id;
        let pending = self.reserve(&Intent::Attrs { file }, name.len(), 0)?;
        let _guard = self.mirror.stripes.lock(&[file]);
        if self.mirror.xattr_len(target, name)?.is_some() {
            return Ok(());
        }
        let attrs = attrs_of(&[(file, &fstat(&target.fd)?)]);
        publish(pending, Op::RemoveXattr { file, name }, attrs, &[])
    }

    /// Publishes what a name stands for now, or that it stands for nothing.
    fn reread_name(&self, dir: &Target<'_>, name: &[u8]) -> Step {
        if self.volume().child(&dir.fd, name).is_ok() {
            return self.name(dir, name);
        }
        let id = dir.node.id;
        let intent = Intent::Names { first: (id, name), second: None };
        let pending = self.reserve(&intent, name.len(), 0)?;
        let _guard = self.mirror.stripes.lock(&[id]);
        // If it is there by now, whoever made it has published that.
        if !names(dir.fd.as_fd(), name, None)? {
            return Ok(());
        }
        let attrs = attrs_of(&[(id, &fstat(&dir.fd)?)]);
        publish(pending, Op::Unbind { dir: id, name }, attrs, &[])
    }

    /// Publishes that an object is gone, if this is a resync: the replica may have it.
    pub(super) fn gone(&self, file: FileId) -> Step {
        if !self.state.is_resync() {
            return Ok(());
        }
        let pending = self.reserve(&Intent::Attrs { file }, 0, 0)?;
        // Of what kind it was is not known any more. It does not matter: all that counts is that it has no name.
        let attr =
            Attr { mode: libc::S_IFREG, uid: 0, gid: 0, nlink: 0, rdev: 0, size: 0, mtime_s: 0, mtime_ns: 0 };
        publish(pending, Op::SetAttr { file }, AttrList::from_iter([(file, attr)]), &[])
    }
}

fn clip(len: usize, most: u64) -> usize {
    len.min(usize::try_from(most).unwrap_or(usize::MAX)).min(limits::WRITE_BYTES_MAX)
}

/// What stands at `offset`, under the lock.
fn piece(opened: &OwnedFd, offset: u64, end: u64, buffer: &mut [u8]) -> Step<Piece> {
    let (at, len) = match next_data(opened, offset)? {
        Some((at, _)) if at >= end => return Ok(Piece::Hole(end)),
        Some(data) => data,
        None => return Ok(Piece::Hole(end)),
    };
    if at > offset {
        return Ok(Piece::Hole(at));
    }
    let len = clip(len, end - offset).min(buffer.len());
    if len == 0 {
        return Ok(Piece::Surprise);
    }
    if read_full(opened, offset, &mut buffer[..len])? < len {
        return Err(Halt::Failed(FsError::Os(Errno::IO)));
    }
    Ok(Piece::Data(len))
}
