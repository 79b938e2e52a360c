//! Writing a frozen delta of one volume into its plain tree.
//!
//! Each step sets a state and never toggles one, so the whole may be done again from the start, with the same delta or one
//! that goes further, after it was cut off anywhere. Two phases:
//!
//! [`VolumeCheckpoint::prepare`] touches nothing that shows: it makes new objects in staging, under the names of their
//! FileIds, and copies of files whose content the delta moves. The caller then makes the file table durable: from here
//! on, whatever object this checkpoint may attach can be found by its FileId after a crash.
//!
//! [`VolumeCheckpoint::write`] needs that every view which is held masks what the delta touches. It writes contents, in place
//! and nothing but the changed extents; takes every name that is not as it shall be out of the tree, objects that live on
//! going to staging; attaches what the names shall stand for; sets attributes; empties staging; and sets the times
//! of directories last.
//!
//! No order of detaching and attaching is needed beyond "first all of one, then all of the other": objects are reached by
//! handles and not by paths, and an edge that stands once all the wrong ones are gone is an edge of the final tree, so no
//! attach can close a circle.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use twinfs_core::delta::{DataRef, Delta, ObjectDelta, Piece, Source};
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{Attr, AttrList, Kind, Op, Update};

use super::ImageError;
use super::files::{Child, Local, NewObject, Place, Stat, TreeStore};
use super::handle::Handle;
use super::view::{OpenFile, Preimages, Shared};
use crate::failpoint::{self, FailPoint};

/// Names in staging that are no FileIds: earlier content, and objects that nobody needs.
pub(super) const PREIMAGE: &str = "preimage-";
const STALE: &str = "stale-";
/// Changing it changes the mode as well.
const ACL: &[u8] = b"system.posix_acl_access";

/// A checkpoint of one volume.
pub(super) struct VolumeCheckpoint<'a> {
    shared: &'a Arc<Shared>,
    store: &'a Arc<dyn TreeStore>,
    delta: &'a Delta,
    copying: bool,
    staging: Local,
    graveyard: Local,
    /// Objects that are known by now; `None` for files without one.
    locals: HashMap<FileId, Option<Local>>,
    /// Those that were made by this run: empty, without attributes.
    fresh: HashSet<FileId>,
    /// Files that have left the tree, and stay readable because somebody reads them. Held open here, too, so that none of
    /// them vanishes while it is written.
    kept: HashMap<FileId, OpenFile>,
}

/// What a checkpoint knows after its first phase.
pub(super) struct Paused {
    copying: bool,
    locals: HashMap<FileId, Option<Local>>,
    fresh: HashSet<FileId>,
}

/// What the file table lacks after the first phase.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// New objects.
    pub(super) new: Vec<(FileId, Local)>,
    /// Copies of earlier content.
    pub(super) preimages: Vec<(FileId, Local)>,
    /// Updates that set attributes as they are. They become part of the frozen delta.
    pub(super) attributes: Vec<(FileId, Update)>,
}

/// A name, and what it shall stand for.
struct Binding<'a> {
    dir: Local,
    name: &'a [u8],
    file: FileId,
}

impl<'a> VolumeCheckpoint<'a> {
    /// Of a volume that is being copied, names may come before the objects that they stand for: for these, `copying`
    /// makes empty objects, which the copy fills later. (Symlinks come before their names.)
    pub(super) fn new(
        shared: &'a Arc<Shared>,
        store: &'a Arc<dyn TreeStore>,
        delta: &'a Delta,
        copying: bool,
    ) -> Self {
        Self {
            copying,
            shared,
            store,
            delta,
            staging: store.place(Place::Staging),
            graveyard: store.place(Place::Graveyard),
            locals: HashMap::new(),
            fresh: HashSet::new(),
            kept: HashMap::new(),
        }
    }

    /// Makes new objects and copies of content that is going to move, and notes attributes that would be lost.
    pub(super) fn prepare(&mut self) -> Result<Prepared, ImageError> {
        let mut new = Vec::new();
        for (file, object) in self.delta.objects().filter(|(_, object)| !object.is_gone()) {
            let target = match object.born() {
                Some(target) => target,
                None if self.copying && is_placeable(object) && self.local(file)?.is_none() => b"",
                None => continue,
            };
            if let Some(local) = self.make(file, object, target)? {
                new.push((file, local));
            }
        }
        let known = self.shared.table.preimages()?;
        let mut preimages = Vec::new();
        for (file, _) in self.delta.objects().filter(|(_, object)| object.content_shifted()) {
            if known.contains_key(&file) {
                continue;
            }
            if let Some(local) = self.local(file)?
                && let Some(stat) = self.stat(&local)?
            {
                preimages.push((file, self.copy_aside(file, &local, stat.attr.size)?));
            }
        }
        if !preimages.is_empty() {
            self.store.sync()?;
        }
        Ok(Prepared { new, preimages, attributes: self.earlier_attributes()? })
    }

    /// The attributes of objects that the delta changes without saying their attributes. (So does the initial copy, when it
    /// binds names in a directory that an earlier checkpoint made.) The change would spoil the modification time.
    fn earlier_attributes(&mut self) -> Result<Vec<(FileId, Update)>, ImageError> {
        let mut found = Vec::new();
        for (file, object) in self.delta.objects() {
            let changed = object.content_changed() || object.names().next().is_some();
            if changed
                && object.attr().is_none()
                && let Some(local) = self.local(file)?
                && let Some(stat) = self.stat(&local)?
            {
                let attrs = AttrList::from_iter([(file, stat.attr)]);
                found.push((file, Update { stamp: Stamp::default(), op: Op::SetAttr { file }, attrs }));
            }
        }
        Ok(found)
    }

    /// What is known by now, to go on with.
    pub(super) fn pause(self) -> Paused {
        Paused { locals: self.locals, fresh: self.fresh, copying: self.copying }
    }

    /// Goes on, with a delta that has the noted attributes, too.
    pub(super) fn resume(
        paused: Paused,
        shared: &'a Arc<Shared>,
        store: &'a Arc<dyn TreeStore>,
        delta: &'a Delta,
    ) -> Self {
        Self { locals: paused.locals, fresh: paused.fresh, ..Self::new(shared, store, delta, paused.copying) }
    }

    /// Makes the tree what the delta says, with the copies of earlier content that were made before.
    pub(super) fn write(&mut self, preimages: &Preimages) -> Result<(), ImageError> {
        self.bury_open_files()?;
        for (file, object) in self.delta.objects() {
            if object.content_changed() && self.has_object(file, object) {
                self.write_content(file, object, preimages.get(&file))?;
                failpoint::pass(FailPoint::CheckpointContent);
            }
        }
        failpoint::pass(FailPoint::CheckpointContents);
        let bindings = self.detach_all()?;
        failpoint::pass(FailPoint::CheckpointDetached);
        let wanted: HashSet<FileId> = bindings.iter().map(|binding| binding.file).collect();
        for binding in &bindings {
            self.attach(binding, &wanted)?;
            failpoint::pass(FailPoint::CheckpointAttach);
        }
        for (file, object) in self.delta.objects() {
            if self.has_object(file, object) {
                self.set_attributes(file, object)?;
            }
        }
        failpoint::pass(FailPoint::CheckpointAttributes);
        self.empty_staging(preimages)?;
        failpoint::pass(FailPoint::CheckpointEmptied);
        for (file, object) in self.delta.objects().filter(|(_, object)| !object.is_gone()) {
            if let Some(attr) = object.attr().filter(|attr| attr.kind() == Some(Kind::Dir))
                && let Some(dir) = self.local(file)?
            {
                self.store.set_mtime(&dir.handle, attr.mtime_s, attr.mtime_ns)?;
            }
        }
        failpoint::pass(FailPoint::CheckpointUnsynced);
        Ok(self.store.sync()?)
    }

    /// The files that the tree does not have any more.
    pub(super) fn gone(&mut self) -> Result<Vec<FileId>, ImageError> {
        let mut gone = Vec::new();
        for (file, _) in self.delta.objects().filter(|(_, object)| object.is_gone()) {
            if let Some(local) = self.local(file)? {
                gone.push(file);
                self.store.forget(&local.handle);
            }
        }
        Ok(gone)
    }

    /// Removes the copies of earlier content. Only for when the new content is the tree's for good.
    pub(super) fn remove_preimages(store: &dyn TreeStore, preimages: &Preimages) {
        let staging = store.place(Place::Staging);
        for (file, local) in preimages {
            store.forget(&local.handle);
            let name = preimage_name(*file);
            if let Err(error) = absent(store.unlink(&staging.handle, name.as_bytes(), Kind::File)) {
                // The next checkpoint, or the next start, removes it.
                tracing::warn!(%file, %error, "earlier content stays in staging");
            }
        }
    }

    /// Whether an object stays, in the tree or in the graveyard.
    fn has_object(&self, file: FileId, object: &ObjectDelta) -> bool {
        !object.is_gone() || self.kept.contains_key(&file)
    }

    /// The object that is a file; `None` if there is none.
    fn local(&mut self, file: FileId) -> Result<Option<Local>, ImageError> {
        if let Some(local) = self.locals.get(&file) {
            return Ok(local.clone());
        }
        let local = match self.shared.table.local(file)? {
            Some(local) => Some(local),
            None => self.shared.open.buried(file),
        };
        self.locals.insert(file, local.clone());
        Ok(local)
    }

    /// Makes an object of the delta in staging, unless there is one that an earlier run made. Returns what the file table
    /// lacks.
    fn make(
        &mut self,
        file: FileId,
        object: &ObjectDelta,
        target: &[u8],
    ) -> Result<Option<Local>, ImageError> {
        let attr = object.attr().ok_or(ImageError::NoAttributes(file))?;
        let kind = attr.kind().ok_or(ImageError::NoAttributes(file))?;
        let new = NewObject { id: file, kind, rdev: attr.rdev, target };
        if let Some(local) = self.shared.table.local(file)?
            && self.fits(&local, new)?
        {
            self.locals.insert(file, Some(local));
            return Ok(None);
        }
        let name = file.to_string();
        let local = match self.store.create(&self.staging.handle, name.as_bytes(), new) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let old = self.store.child_local(&self.staging.handle, name.as_bytes())?;
                if self.fits(&old, new)? {
                    old
                } else {
                    self.set_aside(name.as_bytes(), old.ino)?;
                    self.fresh.insert(file);
                    self.store.create(&self.staging.handle, name.as_bytes(), new)?
                }
            }
            result => {
                self.fresh.insert(file);
                result?
            }
        };
        self.locals.insert(file, Some(local.clone()));
        Ok(Some(local))
    }

    /// Whether an object is there and the one that `new` would be.
    fn fits(&self, local: &Local, new: NewObject<'_>) -> Result<bool, ImageError> {
        // A crash may have taken the object, though not its entry in the table.
        let Some(stat) = self.stat(local)? else { return Ok(false) };
        let same = stat.attr.kind() == Some(new.kind)
            && (!matches!(new.kind, Kind::CharDevice | Kind::BlockDevice) || stat.attr.rdev == new.rdev)
            && self.store.id(&local.handle)? == Some(new.id);
        Ok(same && (new.kind != Kind::Symlink || self.store.read_link(&local.handle)? == new.target))
    }

    /// What an object is; `None` if it was removed.
    fn stat(&self, local: &Local) -> Result<Option<Stat>, ImageError> {
        match self.store.stat(&local.handle) {
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => Ok(None),
            // It may be there without a name as long as somebody holds it.
            result => Ok(Some(result?).filter(|stat| stat.attr.nlink > 0)),
        }
    }

    /// Frees a name in staging from something that nobody knows.
    fn set_aside(&self, name: &[u8], ino: u64) -> Result<(), ImageError> {
        let aside = format!("{STALE}{ino}");
        Ok(self.store.rename((&self.staging.handle, name), (&self.staging.handle, aside.as_bytes()))?)
    }

    fn copy_aside(&self, file: FileId, local: &Local, size: u64) -> Result<Local, ImageError> {
        let name = preimage_name(file);
        absent(self.store.unlink(&self.staging.handle, name.as_bytes(), Kind::File))?;
        let new = NewObject { id: file, kind: Kind::File, rdev: 0, target: &[] };
        let copy = self.store.create(&self.staging.handle, name.as_bytes(), new)?;
        self.store.copy((&local.handle, 0), (&copy.handle, 0), size)?;
        self.store.set_len(&copy.handle, size)?;
        Ok(copy)
    }

    /// Gives removed files that somebody reads a name in the graveyard.
    fn bury_open_files(&mut self) -> Result<(), ImageError> {
        for (file, object) in self.delta.objects().filter(|(_, object)| object.is_gone()) {
            let is_file = object.attr().and_then(Attr::kind).is_none_or(|kind| kind == Kind::File);
            let Some(open) = (if is_file { OpenFile::again(self.shared, file) } else { None }) else {
                continue;
            };
            let name = file.to_string();
            let local = if let Some(local) = self.local(file)? {
                exists(self.store.link(&local.handle, &self.graveyard.handle, name.as_bytes()))?;
                local
            } else if object.born().is_some() {
                let new = NewObject { id: file, kind: Kind::File, rdev: 0, target: &[] };
                exists(self.store.create(&self.graveyard.handle, name.as_bytes(), new).map(drop))?;
                self.store.child_local(&self.graveyard.handle, name.as_bytes())?
            } else {
                continue;
            };
            self.locals.insert(file, Some(local.clone()));
            self.shared.open.bury(self.store, file, &local);
            self.kept.insert(file, open);
        }
        Ok(())
    }

    fn write_content(
        &mut self,
        file: FileId,
        object: &ObjectDelta,
        preimage: Option<&Local>,
    ) -> Result<(), ImageError> {
        let Some(Local { handle, .. }) = self.local(file)? else { return Ok(()) };
        if object.attr().is_some_and(|attr| attr.kind() != Some(Kind::File)) {
            return Ok(());
        }
        let store = self.store;
        let mut size = if self.fresh.contains(&file) { 0 } else { store.stat(&handle)?.attr.size };
        let limit = object.below_limit().unwrap_or(u64::MAX);
        if limit < size {
            store.set_len(&handle, limit)?;
            size = limit;
        }
        let final_size = object.attr().map(|attr| attr.size);
        let clip = final_size.unwrap_or(limits::FILE_BYTES_MAX);
        let moved = object
            .content_shifted()
            .then(|| object.pieces(0..clip).filter(|p| matches!(p.source, Source::Below(_))));
        let pieces = object.changed().chain(moved.into_iter().flatten());
        for Piece { offset, len, source } in pieces {
            let len = len.min(clip.saturating_sub(offset));
            match source {
                Source::Journal(data) => {
                    self.write_data(&handle, offset, len, data)?;
                    size = size.max(offset + len);
                }
                Source::Zero => store.punch(&handle, offset, len.min(size.saturating_sub(offset)))?,
                // Below the limit the file still has what it had.
                Source::Below(_) if offset < limit => {}
                Source::Below(below) => {
                    let preimage = preimage.ok_or(ImageError::NoPreimage(file))?;
                    // Copying makes the file as long as the last data in the range, whichever that is.
                    store.copy((&preimage.handle, below), (&handle, offset), len)?;
                    size = store.stat(&handle)?.attr.size;
                }
            }
        }
        match final_size {
            Some(final_size) if final_size != size => Ok(store.set_len(&handle, final_size)?),
            _ => Ok(()),
        }
    }

    fn write_data(&self, file: &Handle, offset: u64, len: u64, from: DataRef) -> Result<(), ImageError> {
        let mut bytes =
            vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(limits::CHECKPOINT_COPY_BYTES)];
        let mut done = 0;
        while done < len {
            let n = bytes.len().min(usize::try_from(len - done).unwrap_or(usize::MAX));
            let past_end = || ImageError::Journal(io::ErrorKind::InvalidData.into());
            let at = u32::try_from(u64::from(from.offset) + done).map_err(|_| past_end())?;
            let at = DataRef { offset: at, ..from };
            self.shared.data.read(at, &mut bytes[..n]).map_err(ImageError::Journal)?;
            self.store.write_at(file, offset + done, &bytes[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    /// Takes every name out of the tree that does not stand for what it shall. Returns the names that lack something.
    fn detach_all(&mut self) -> Result<Vec<Binding<'a>>, ImageError> {
        let mut bindings = Vec::new();
        for (file, object) in self.delta.objects() {
            // Only directories have names, and a directory that was made and removed in between has no object.
            let is_dir =
                object.names().next().is_some() || object.attr().and_then(Attr::kind) == Some(Kind::Dir);
            let may_be_dir = is_dir || object.is_gone();
            let Some(dir) = (if may_be_dir { self.local(file)? } else { None }) else { continue };
            // A resync does not know of what kind something was that is gone. An earlier run may have removed it already.
            if object.is_gone() && self.stat(&dir)?.is_none_or(|stat| stat.attr.kind() != Some(Kind::Dir)) {
                continue;
            }
            for (name, wanted) in object.names() {
                let wanted = wanted.filter(|_| !object.is_gone());
                let found =
                    if self.fresh.contains(&file) { None } else { self.store.child(&dir.handle, name)? };
                let wanted_ino = match wanted {
                    Some(file) => Some(self.local(file)?.ok_or(ImageError::Missing(file))?.ino),
                    None => None,
                };
                if let Some(child) = found
                    && wanted_ino != Some(child.ino)
                {
                    self.detach(&dir, name, child)?;
                }
                if let Some(file) = wanted
                    && wanted_ino != found.map(|child| child.ino)
                {
                    bindings.push(Binding { dir: dir.clone(), name, file });
                }
            }
            // Of these, a name of which nothing is said is no name.
            if (object.is_gone() || object.born().is_some()) && !self.fresh.contains(&file) {
                self.detach_unsaid(&dir, object)?;
            }
        }
        Ok(bindings)
    }

    fn detach_unsaid(&mut self, dir: &Local, object: &ObjectDelta) -> Result<(), ImageError> {
        let mut unsaid: Vec<Box<[u8]>> = Vec::new();
        self.store.list(&dir.handle, &mut |name, _| {
            if object.name(name).is_none() {
                unsaid.push(name.into());
            }
        })?;
        for name in unsaid {
            if let Some(child) = self.store.child(&dir.handle, &name)? {
                self.detach(dir, &name, child)?;
            }
        }
        Ok(())
    }

    fn detach(&mut self, dir: &Local, name: &[u8], child: Child) -> Result<(), ImageError> {
        // The table does not tell: a crash may have brought back an object whose inode number had been given to another.
        let found = self.store.child_local(&dir.handle, name)?;
        let known = match self.store.id(&found.handle)? {
            Some(file) => self.local(file)?.filter(|local| *local == found).map(|local| (file, local)),
            None => None,
        };
        if child.kind == Kind::Dir {
            let aside = known.map_or_else(|| format!("{STALE}{}", child.ino), |(file, _)| file.to_string());
            let to = (&self.staging.handle, aside.as_bytes());
            return Ok(self.store.rename((&dir.handle, name), to)?);
        }
        // The last name of something that lives on moves to staging; any other name just goes.
        if let Some((file, local)) = known.filter(|_| child.nlink == 1)
            && !self.delta.object(file).is_some_and(ObjectDelta::is_gone)
        {
            let aside = file.to_string();
            exists(self.store.link(&local.handle, &self.staging.handle, aside.as_bytes()))?;
        }
        Ok(self.store.unlink(&dir.handle, name, child.kind)?)
    }

    /// Gives an object a name that is free: its name in staging moves there, or else it gets one more.
    fn attach(&mut self, binding: &Binding<'_>, wanted: &HashSet<FileId>) -> Result<(), ImageError> {
        let Binding { dir, name, file } = binding;
        let aside = file.to_string();
        let (from, to) = ((&self.staging.handle.clone(), aside.as_bytes()), (&dir.handle, *name));
        match self.store.rename(from, to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let local = self.local(*file)?.ok_or(ImageError::Missing(*file))?;
                if self.stat(&local)?.is_some_and(|stat| stat.attr.kind() == Some(Kind::Dir)) {
                    self.bring_out(*file, wanted)?;
                    return Ok(self.store.rename(from, to)?);
                }
                Ok(self.store.link(&local.handle, &dir.handle, name)?)
            }
            result => Ok(result?),
        }
    }

    /// Takes a directory out of one that is in staging for good: a resync of everything does not tell what is gone, nor what
    /// left it before.
    fn bring_out(&mut self, file: FileId, wanted: &HashSet<FileId>) -> Result<(), ImageError> {
        let (staging, aside) = (self.staging.handle.clone(), file.to_string());
        while self.store.child(&staging, aside.as_bytes())?.is_none() {
            let mut outer: Vec<Box<[u8]>> = Vec::new();
            self.store.list(&staging, &mut |name, child| {
                if child.kind == Kind::Dir {
                    outer.push(name.into());
                }
            })?;
            let stays = |name: &[u8]| {
                let file = str::from_utf8(name).ok().and_then(|name| name.parse::<FileId>().ok());
                file.is_some_and(|file| wanted.contains(&file))
            };
            outer.retain(|name| !stays(name));
            let mut moved = false;
            for name in outer {
                let dir = self.store.child_local(&staging, &name)?;
                let mut inner: Vec<(Box<[u8]>, Child)> = Vec::new();
                self.store.list(&dir.handle, &mut |name, child| {
                    if child.kind == Kind::Dir {
                        inner.push((name.into(), child));
                    }
                })?;
                for (name, child) in inner {
                    self.detach(&dir, &name, child)?;
                    moved = true;
                }
            }
            if !moved {
                return Err(ImageError::Missing(file));
            }
        }
        Ok(())
    }

    fn set_attributes(&mut self, file: FileId, object: &ObjectDelta) -> Result<(), ImageError> {
        let Some(Local { handle, .. }) = self.local(file)? else { return Ok(()) };
        let store = self.store;
        // The owner first: a change of it clears set-id bits and capabilities.
        if let Some(attr) = object.attr() {
            store.set_owner_and_mode(&handle, attr)?;
        }
        if object.born().is_some() && !self.fresh.contains(&file) {
            for name in store.xattrs(&handle)? {
                if object.xattr(&name).is_none() {
                    store.set_xattr(&handle, &name, None)?;
                }
            }
        }
        for (name, value) in object.xattrs() {
            store.set_xattr(&handle, name, value)?;
        }
        let Some(attr) = object.attr() else { return Ok(()) };
        if object.xattr(ACL).is_some() {
            store.set_owner_and_mode(&handle, attr)?;
        }
        if attr.kind() != Some(Kind::Dir) {
            store.set_mtime(&handle, attr.mtime_s, attr.mtime_ns)?;
        }
        Ok(())
    }

    /// Removes from staging what nobody needs any longer. Directories are emptied into staging first, so that their depth
    /// does not matter.
    fn empty_staging(&mut self, preimages: &Preimages) -> Result<(), ImageError> {
        let (store, staging) = (self.store, self.staging.handle.clone());
        loop {
            let mut found: Vec<Box<[u8]>> = Vec::new();
            store.list(&staging, &mut |name, _| found.push(name.into()))?;
            let mut removed = false;
            for name in found {
                let Some(child) = store.child(&staging, &name)? else { continue };
                if self.is_needed(&name, child, preimages)? {
                    continue;
                }
                if child.kind == Kind::Dir {
                    self.empty_into_staging(&store.child_local(&staging, &name)?)?;
                }
                store.unlink(&staging, &name, child.kind)?;
                removed = true;
            }
            if !removed {
                return Ok(());
            }
        }
    }

    /// Whether an entry of staging stays: earlier content, and objects that live but have no name in the tree. (The initial
    /// copy makes an object first and names it later, and a checkpoint may come in between.)
    fn is_needed(&mut self, name: &[u8], child: Child, preimages: &Preimages) -> Result<bool, ImageError> {
        if name.starts_with(PREIMAGE.as_bytes()) {
            return Ok(preimages.values().any(|local| local.ino == child.ino));
        }
        let Some(file) = str::from_utf8(name).ok().and_then(|name| name.parse::<FileId>().ok()) else {
            return Ok(false);
        };
        let only_name = child.kind == Kind::Dir || child.nlink == 1;
        let gone = self.delta.object(file).is_some_and(ObjectDelta::is_gone);
        Ok(only_name && !gone && self.local(file)?.is_some_and(|local| local.ino == child.ino))
    }

    fn empty_into_staging(&self, dir: &Local) -> Result<(), ImageError> {
        let mut below: Vec<(Box<[u8]>, Child)> = Vec::new();
        self.store.list(&dir.handle, &mut |name, child| below.push((name.into(), child)))?;
        for (name, child) in below {
            if child.kind == Kind::Dir {
                let aside = format!("{STALE}{}", child.ino);
                self.store.rename((&dir.handle, &name), (&self.staging.handle, aside.as_bytes()))?;
            } else {
                self.store.unlink(&dir.handle, &name, child.kind)?;
            }
        }
        self.store.forget(&dir.handle);
        Ok(())
    }
}

/// Whether an empty object can stand for it until more is known.
fn is_placeable(object: &ObjectDelta) -> bool {
    object.attr().and_then(Attr::kind).is_some_and(|kind| kind != Kind::Symlink)
}

fn preimage_name(file: FileId) -> String {
    format!("{PREIMAGE}{file}")
}

/// That a name is taken already is as good as taking it.
fn exists(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
}

/// That a name is gone already is as good as removing it.
fn absent(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}
