//! What a killed process left half done.
//!
//! A mutation that was under way when the process was killed may or may not have taken place; nobody was answered, so
//! either is right, but the replica must hear of it if it did. Each intent that is left in the sidefile is therefore
//! looked at before anything else changes the volume: what it may have changed is read again and published, after
//! everything that was published before. The locks under which operations publish make sure that at most one of those
//! under way had touched an object.
//!
//! Operations on names leave a note of what they found, right before their call. So it can be told whether the call took
//! place, and it is published as the one update that it is.

use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fstat, readlinkat};
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::{Attr, AttrList, Intent, Kind, Note, Op, OpKind};
use twinfs_replicator::primary::sidefile::LeftIntent;

use crate::copier::next_data;
use crate::errno::{FsError, Result};
use crate::mirror::{Mirror, Target, Volume, attr};
use crate::ops::data::{CAPABILITY, read_full};
use crate::ops::xattr::{ACCESS_ACL, DEFAULT_ACL};

impl Mirror {
    /// Publishes what an operation may have changed that was under way when the process was killed. Call it before the
    /// volume is mounted; doing it again does no harm.
    ///
    /// # Errors
    /// The backing file system's: then it is not known whether the replica can be kept exact.
    pub fn recover(&self, left: &LeftIntent) -> Result<()> {
        let volume = self.volumes.iter().find(|volume| volume.index == left.volume).ok_or(FsError::NoNode)?;
        match left.intent() {
            Intent::Range { file, offset, len } => match self.object(volume, file)? {
                Some(target) => self.recover_range(&target, offset, len),
                None => Ok(()),
            },
            Intent::Size { file } => match self.object(volume, file)? {
                Some(target) => {
                    let size = size_of(&target)?;
                    self.publish_about(&target, &Op::Truncate { file, size })?;
                    self.recover_xattr(&target, CAPABILITY)
                }
                None => Ok(()),
            },
            Intent::Attrs { file } => match self.object(volume, file)? {
                Some(target) => self.publish_about(&target, &Op::SetAttr { file }),
                None => Ok(()),
            },
            Intent::Xattr { file, name } => match self.object(volume, file)? {
                Some(target) => self.recover_xattr(&target, name),
                None => Ok(()),
            },
            Intent::Acls { dir, name } => self.recover_acls(volume, dir, name),
            Intent::Names { first, second } => match left.note {
                Some(note) => self.recover_names(volume, first, second, note),
                None => Ok(()), // It had not come to its call.
            },
        }
    }

    /// What the names stand for now that an operation may have changed which was under way when the process was killed.
    ///
    /// # Errors
    /// As [`recover`](Self::recover).
    pub fn found(&self, left: &LeftIntent) -> Result<Vec<FileId>> {
        let volume = self.volumes.iter().find(|volume| volume.index == left.volume).ok_or(FsError::NoNode)?;
        let names = match left.intent() {
            Intent::Names { first, second } => [Some(first), second],
            _ => [None, None],
        };
        let mut found = Vec::new();
        for (dir, name) in names.into_iter().flatten() {
            if let Some(dir) = self.object(volume, dir)? {
                found.extend(volume.child_if_any(&dir, name)?.map(|child| child.id));
            }
        }
        Ok(found)
    }

    /// Publishes an update about one object, with its attributes.
    fn publish_about(&self, target: &Target<'_>, op: &Op<&[u8]>) -> Result<()> {
        let file = target.node.id;
        let payload = match op {
            Op::SetXattr { name, value, .. } => name.len() + value.len(),
            Op::RemoveXattr { name, .. } => name.len(),
            _ => 0,
        };
        let pending = self.reserve_for_copy(target.volume, &Intent::Attrs { file }, payload, 0)?;
        let attrs = std::iter::once((file, attr(&fstat(&target.fd)?))).collect();
        let _stamp = pending.publish(op.clone(), attrs, &[]);
        Ok(())
    }

    fn recover_range(&self, target: &Target<'_>, offset: u64, len: u64) -> Result<()> {
        let file = target.node.id;
        let size = size_of(target)?;
        if len == u64::MAX {
            // What follows may have moved.
            self.publish_about(target, &Op::Truncate { file, size })?;
        }
        let end = offset.saturating_add(len).min(size);
        let opened = self.open_backing(target, OFlags::RDONLY | OFlags::NOATIME)?;
        let mut at = offset;
        while at < end {
            let (start, len) = next_data(&opened, at)?.filter(|(start, _)| *start < end).unwrap_or((end, 0));
            if start > at {
                self.publish_about(target, &Op::Zero { file, offset: at, len: start - at, hole: true })?;
            }
            let len = len.min(usize::try_from(end - start).unwrap_or(usize::MAX));
            self.publish_data(target, &opened, start, len)?;
            at = start + len as u64;
        }
        self.publish_about(target, &Op::SetAttr { file })?;
        self.recover_xattr(target, CAPABILITY)
    }

    fn publish_data(&self, target: &Target<'_>, opened: &OwnedFd, offset: u64, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let file = target.node.id;
        let mut data = vec![0; len];
        // At most `next_data` gives at once, which is what an update may carry.
        let read = read_full(opened, offset, &mut data)?;
        if read == 0 {
            return Ok(());
        }
        let intent = Intent::Range { file, offset, len: len as u64 };
        let pending = self.reserve_for_copy(target.volume, &intent, 0, len)?;
        let attrs = std::iter::once((file, attr(&fstat(&target.fd)?))).collect();
        let op = Op::Write { file, offset, len: u32::try_from(read).map_err(|_| FsError::Unrecorded)? };
        let _stamp = pending.publish(op, attrs, &data[..read]);
        Ok(())
    }

    fn recover_xattr(&self, target: &Target<'_>, name: &[u8]) -> Result<()> {
        let file = target.node.id;
        match self.read_xattr(target, name)? {
            Some(value) => self.publish_about(target, &Op::SetXattr { file, name, value: &value }),
            None => self.publish_about(target, &Op::RemoveXattr { file, name }),
        }
    }

    fn recover_acls(&self, volume: &Volume, dir: FileId, name: &[u8]) -> Result<()> {
        let Some(dir) = self.object(volume, dir)? else { return Ok(()) };
        let Some(child) = volume.child_if_any(&dir, name)?.filter(|child| child.kind != Kind::Symlink) else {
            return Ok(());
        };
        let target = dir.sibling(child);
        for acl in [ACCESS_ACL, DEFAULT_ACL] {
            if self.xattr_len(&target, acl)?.is_some() {
                self.recover_xattr(&target, acl)?;
            }
        }
        Ok(())
    }

    fn recover_names(
        &self,
        volume: &Volume,
        first: (FileId, &[u8]),
        second: Option<(FileId, &[u8])>,
        note: Note,
    ) -> Result<()> {
        let Some(dir) = self.object(volume, first.0)? else { return Ok(()) };
        let there = volume.child_if_any(&dir, first.1)?;
        let stands_for = |file: Option<FileId>| there.as_ref().map(|child| child.id) == file;
        let (dir_id, name) = (dir.node.id, first.1);
        match (note.op, note.first, second) {
            (OpKind::Create, None, None) => {
                let Some(child) = &there else { return Ok(()) };
                let target = match child.kind {
                    Kind::Symlink => readlinkat(&child.fd, c"", Vec::new())?.into_bytes(),
                    _ => Vec::new(),
                };
                let op = Op::Create { dir: dir_id, name, file: child.id, target: &target };
                self.publish_names(volume, first, second, op, note)
            }
            (OpKind::Link, Some((file, _)), None) if stands_for(Some(file)) => {
                self.publish_names(volume, first, second, Op::Link { dir: dir_id, name, file }, note)
            }
            (OpKind::Unlink, Some((file, _)), None) if !stands_for(Some(file)) => {
                self.publish_names(volume, first, second, Op::Unlink { dir: dir_id, name, file }, note)
            }
            (OpKind::Rename | OpKind::Exchange, Some((file, _)), Some((to_dir, to))) => {
                let Some(other_dir) = self.object(volume, to_dir)? else { return Ok(()) };
                let moved = volume.child_if_any(&other_dir, to)?.is_some_and(|child| child.id == file);
                if !moved || stands_for(Some(file)) {
                    return Ok(());
                }
                let op = match note.second {
                    Some((b_file, _)) if note.op == OpKind::Exchange => {
                        Op::Exchange { a_dir: dir_id, a: name, a_file: file, b_dir: to_dir, b: to, b_file }
                    }
                    replaced => {
                        let replaced = replaced.map(|(file, _)| file);
                        Op::Rename { from_dir: dir_id, from: name, to_dir, to, file, replaced }
                    }
                };
                self.publish_names(volume, first, second, op, note)
            }
            _ => Ok(()),
        }
    }

    /// Publishes an operation on names, with the attributes of all that it names. Of what is gone, the kind is known.
    fn publish_names(
        &self,
        volume: &Volume,
        first: (FileId, &[u8]),
        second: Option<(FileId, &[u8])>,
        op: Op<&[u8]>,
        note: Note,
    ) -> Result<()> {
        let payload = first.1.len() + second.map_or(0, |(_, name)| name.len()) + limits::SYMLINK_BYTES_MAX;
        let pending = self.reserve_for_copy(volume, &Intent::Names { first, second }, payload, 0)?;
        let mut attrs = AttrList::new();
        for file in op.files().into_iter().flatten() {
            let kind = [note.first, note.second].into_iter().flatten().find(|(noted, _)| *noted == file);
            let there = self.object(volume, file)?.map(|target| fstat(&target.fd)).transpose()?;
            let found = there.map(|stat| attr(&stat)).or(kind.map(|(_, kind)| gone(kind)));
            if let Some(attr) = found {
                attrs.push(file, attr);
            }
        }
        let _stamp = pending.publish(op, attrs, &[]);
        Ok(())
    }
}

/// The attributes of an object that is no more.
const fn gone(kind: Kind) -> Attr {
    let mode = kind.mode_bits();
    Attr { mode, uid: 0, gid: 0, nlink: 0, rdev: 0, size: 0, mtime_s: 0, mtime_ns: 0 }
}

fn size_of(target: &Target<'_>) -> Result<u64> {
    Ok(u64::try_from(fstat(&target.fd)?.st_size).unwrap_or_default())
}
