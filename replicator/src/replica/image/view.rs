//! The view: what the replica shows, as of one consistency group, and never anything else.
//!
//! A [`View`] is immutable: the deltas of its group over the plain tree. Whoever answers a call takes one view and
//! answers from that alone, so the answer is of exactly one group.
//!
//! The tree below does change, but only when a checkpoint writes a frozen delta into it, and every view that is alive
//! then has that delta as a layer of its own: whatever the checkpoint touches is masked by it. (A view that was taken
//! before the delta was frozen lacks some of it; so a checkpoint begins when none of those is left, see
//! `Alive::wait_for`.) What the deltas say nothing of, the checkpoint does not touch.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use twinfs_core::delta::layers::{self, Content};
use twinfs_core::delta::{DataRef, Delta};
use twinfs_core::id::{FileId, GroupNumber, VolumeIndex, VolumeName};
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::{Attr, Kind};

use super::files::{Extent, Local, Place, Space, TreeStore};
use super::keep::{Keeping, Kept, KeptFiles};
use super::table::{Table, TableError};

/// Where the bytes are that deltas refer to: the journal.
pub trait DataSource: Send + Sync {
    /// Fills `buf` from the place on.
    ///
    /// # Errors
    /// What the disk says; `InvalidData` if what stands there is damaged.
    fn read(&self, at: DataRef, buf: &mut [u8]) -> io::Result<()>;
}

/// Why a view has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The object is not in the view (any more).
    #[error("no such object in the view")]
    Gone,
    /// The operation does not fit the kind of the object.
    #[error("the object is of another kind")]
    WrongKind,
    /// The tree could not be read.
    #[error("the plain tree: {0}")]
    Tree(#[source] io::Error),
    /// The journal could not be read.
    #[error("the journal: {0}")]
    Journal(#[source] io::Error),
    /// The file table could not be read.
    #[error(transparent)]
    Table(#[from] TableError),
}

impl From<io::Error> for ViewError {
    /// An error of the plain tree.
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ESTALE) => Self::Gone,
            Some(libc::ENOTDIR) => Self::WrongKind,
            _ => Self::Tree(error),
        }
    }
}

/// What data and holes are told in, in bytes.
const SEEK_BLOCK: u64 = 4096;

/// Attributes of an object in a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// The object.
    pub file: FileId,
    /// Its attributes.
    pub attr: Attr,
    /// Blocks of 512 bytes that it takes, roughly: what is not in the tree yet is not counted.
    pub blocks: u64,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: Box<[u8]>,
    /// What it stands for.
    pub file: FileId,
    /// The kind of that.
    pub kind: Kind,
}

/// Copies of files as they were at the last checkpoint, of those whose content a checkpoint has to move: it changes the
/// files themselves in place, and moved content, unlike everything else in a delta, does not mask what it moved.
pub(super) type Preimages = HashMap<FileId, Local>;

/// One volume of a view.
#[derive(Clone)]
pub(super) struct VolumeView {
    pub(super) name: VolumeName,
    pub(super) root: FileId,
    pub(super) member: bool,
    pub(super) store: Arc<dyn TreeStore>,
    pub(super) live: Delta,
    /// What a checkpoint is writing into the tree.
    pub(super) frozen: Option<Delta>,
    pub(super) preimages: Arc<Preimages>,
}

/// What all views of an image have in common.
pub(super) struct Shared {
    pub(super) table: Table,
    pub(super) data: Arc<dyn DataSource>,
    pub(super) open: OpenFiles,
    pub(super) alive: Alive,
}

impl Shared {
    /// The object of the tree (or of the graveyard) that a file is.
    pub(super) fn local(&self, file: FileId) -> Result<Local, ViewError> {
        // The graveyard comes second: a checkpoint puts a file there before it takes it out of the table.
        match self.table.local(file)? {
            Some(local) => Ok(local),
            None => self.open.buried(file).ok_or(ViewError::Gone),
        }
    }
}

/// All member volumes as of one consistency group.
pub struct View {
    group: GroupNumber,
    time: Timestamp,
    volumes: Vec<VolumeView>,
    shared: Arc<Shared>,
    serial: u64,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View")
            .field("group", &self.group)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.shared.alive.end(self.serial);
    }
}

impl View {
    pub(super) fn new(
        shared: &Arc<Shared>,
        group: GroupNumber,
        time: Timestamp,
        volumes: Vec<VolumeView>,
    ) -> Self {
        Self { group, time, volumes, shared: Arc::clone(shared), serial: shared.alive.begin() }
    }

    /// A number that rises with each view that is shown.
    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// The group.
    #[must_use]
    pub fn group(&self) -> GroupNumber {
        self.group
    }

    /// The consistency time of the group: everything stamped up to it shows, nothing later.
    #[must_use]
    pub fn consistency_time(&self) -> Timestamp {
        self.time
    }

    /// The volumes that show, with their root directories.
    pub fn members(&self) -> impl Iterator<Item = (VolumeIndex, &VolumeName, FileId)> {
        let volumes = self.volumes.iter().enumerate().filter(|(_, volume)| volume.member);
        volumes.map(|(index, volume)| {
            let index = VolumeIndex(u16::try_from(index).expect("an image has at most VOLUMES_MAX volumes"));
            (index, &volume.name, volume.root)
        })
    }

    /// What a name in a directory stands for; `None` if nothing.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such directory.
    pub fn lookup(&self, volume: VolumeIndex, dir: FileId, name: &[u8]) -> Result<Option<FileId>, ViewError> {
        self.answer(dir, |_| Err(ViewError::Gone), || self.lookup_layered(volume, dir, name))
    }

    fn lookup_layered(
        &self,
        volume: VolumeIndex,
        dir: FileId,
        name: &[u8],
    ) -> Result<Option<FileId>, ViewError> {
        let layered = self.layered(volume)?;
        if let Some(said) = layers::lookup(&layered.deltas(), dir, name) {
            return Ok(said);
        }
        let local = self.local(dir)?;
        match layered.volume.store.child(&local.handle, name)? {
            Some(child) => Ok(self.shared.table.file(child.ino)?),
            None => Ok(None),
        }
    }

    /// Attributes of an object.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such object.
    pub fn node(&self, volume: VolumeIndex, file: FileId) -> Result<Node, ViewError> {
        self.answer(file, |kept| Ok(kept.node(file)), || self.node_layered(volume, file))
    }

    fn node_layered(&self, volume: VolumeIndex, file: FileId) -> Result<Node, ViewError> {
        let layered = self.layered(volume)?;
        let deltas = layered.deltas();
        let in_tree = if layers::tree_counts(&deltas, file) {
            match self.local(file) {
                Ok(local) => Some(layered.volume.store.stat(&local.handle)?),
                Err(ViewError::Gone) => None,
                Err(error) => return Err(error),
            }
        } else {
            None
        };
        let said = layers::attr(&deltas, file).copied();
        let mut attr = said.or(in_tree.map(|stat| stat.attr)).ok_or(ViewError::Gone)?;
        if layered.is_gone(file) || self.shared.open.is_buried(file) {
            attr.nlink = 0;
        }
        let blocks = in_tree.map_or(attr.size.div_ceil(512), |stat| stat.blocks);
        Ok(Node { file, attr, blocks })
    }

    /// The names of a directory, without `.` and `..`.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such directory.
    pub fn list(&self, volume: VolumeIndex, dir: FileId) -> Result<Vec<Entry>, ViewError> {
        self.answer(dir, |_| Err(ViewError::Gone), || self.list_layered(volume, dir))
    }

    fn list_layered(&self, volume: VolumeIndex, dir: FileId) -> Result<Vec<Entry>, ViewError> {
        let layered = self.layered(volume)?;
        let deltas = layered.deltas();
        let merged = layers::names(&deltas, dir);
        let mut entries = Vec::new();
        for (name, file) in &merged.said {
            let Some(file) = *file else { continue };
            let kind = match layers::attr(&deltas, file) {
                Some(attr) => attr.kind(),
                None => layered.volume.store.stat(&self.local(file)?.handle)?.attr.kind(),
            };
            entries.push(Entry { name: (*name).into(), file, kind: kind.ok_or(ViewError::WrongKind)? });
        }
        if merged.tree {
            let mut found: Vec<(Box<[u8]>, u64, Kind)> = Vec::new();
            let local = self.local(dir)?;
            layered.volume.store.list(&local.handle, &mut |name, child| {
                if !merged.said.contains_key(name) {
                    found.push((name.into(), child.ino, child.kind));
                }
            })?;
            let files = self.shared.table.files(found.iter().map(|(_, ino, _)| *ino))?;
            let known = found.into_iter().zip(files);
            entries
                .extend(known.filter_map(|((name, _, kind), file)| Some(Entry { name, file: file?, kind })));
        }
        Ok(entries)
    }

    /// The target of a symlink.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such object.
    pub fn read_link(&self, volume: VolumeIndex, file: FileId) -> Result<Vec<u8>, ViewError> {
        self.answer(file, Kept::read_link, || self.read_link_layered(volume, file))
    }

    fn read_link_layered(&self, volume: VolumeIndex, file: FileId) -> Result<Vec<u8>, ViewError> {
        let layered = self.layered(volume)?;
        if let Some(target) = layers::target(&layered.deltas(), file) {
            return Ok(target.to_vec());
        }
        Ok(layered.volume.store.read_link(&self.local(file)?.handle)?)
    }

    /// Up to `len` bytes of a file; fewer only at its end.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such object.
    pub fn read(
        &self,
        volume: VolumeIndex,
        file: FileId,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, ViewError> {
        self.answer(file, |kept| kept.read(offset, len), || self.read_layered(volume, file, offset, len))
    }

    fn read_layered(
        &self,
        volume: VolumeIndex,
        file: FileId,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, ViewError> {
        let node = self.node_layered(volume, file)?;
        if node.attr.kind() != Some(Kind::File) {
            return Err(ViewError::WrongKind);
        }
        let end = offset.saturating_add(len as u64).min(node.attr.size);
        let Some(len) = end.checked_sub(offset).and_then(|len| usize::try_from(len).ok()) else {
            return Ok(Vec::new());
        };
        let layered = self.layered(volume)?;
        let mut bytes = vec![0; len];
        let mut rest = &mut bytes[..];
        for piece in layers::resolve(&layered.deltas(), file, offset..end) {
            let piece_len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at_mut(piece_len);
            rest = after;
            match piece.content {
                Content::Journal(at) => self.shared.data.read(at, part).map_err(ViewError::Journal)?,
                Content::Zero => {}
                Content::Tree(at) => {
                    let kept = layered.volume.preimages.get(&file);
                    let local = kept.cloned().map_or_else(|| self.local(file), Ok)?;
                    layered.volume.store.read_at(&local.handle, at, part)?;
                }
            }
        }
        Ok(bytes)
    }

    /// The first place at or after `offset` that is data, or else that is in a hole (the end of a file counts as one), in
    /// blocks of 4 KiB. `None` if `offset` is at or beyond the end, or no data follows.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such object.
    pub fn seek(
        &self,
        volume: VolumeIndex,
        file: FileId,
        offset: u64,
        want: Extent,
    ) -> Result<Option<u64>, ViewError> {
        let size = self.node(volume, file)?.attr.size;
        if offset >= size {
            return Ok(None);
        }
        let find = |from: u64, want| self.seek_byte(volume, file, from, size, want);
        if want == Extent::Data {
            // Whole blocks, as file systems tell it.
            let found = find(offset / SEEK_BLOCK * SEEK_BLOCK, Extent::Data)?;
            return Ok(found.map(|found| offset.max(found / SEEK_BLOCK * SEEK_BLOCK)));
        }
        let mut from = offset;
        loop {
            let hole = find(from, Extent::Hole)?.unwrap_or(size);
            let block = if hole == offset { hole } else { hole.next_multiple_of(SEEK_BLOCK) };
            if block >= size {
                return Ok(Some(size));
            }
            match find(block, Extent::Data)? {
                Some(data) if data < (block + 1).next_multiple_of(SEEK_BLOCK) => from = data,
                _ => return Ok(Some(block)),
            }
        }
    }

    /// The same, byte by byte, below `size`.
    fn seek_byte(
        &self,
        volume: VolumeIndex,
        file: FileId,
        offset: u64,
        size: u64,
        want: Extent,
    ) -> Result<Option<u64>, ViewError> {
        if self.shared.open.kept(file).is_some() {
            return Ok((want == Extent::Data).then_some(offset));
        }
        let layered = self.layered(volume)?;
        for piece in layers::resolve(&layered.deltas(), file, offset..size) {
            let found = match (piece.content, want) {
                (Content::Journal(_), Extent::Data) | (Content::Zero, Extent::Hole) => Some(0),
                (Content::Journal(_), Extent::Hole) | (Content::Zero, Extent::Data) => None,
                (Content::Tree(at), _) => {
                    let kept = layered.volume.preimages.get(&file);
                    let local = kept.cloned().map_or_else(|| self.local(file), Ok)?;
                    let found = layered.volume.store.seek(&local.handle, at, want)?;
                    found.map(|found| found - at).filter(|skip| *skip < piece.len)
                }
            };
            if let Some(skip) = found {
                return Ok(Some(piece.offset + skip));
            }
        }
        Ok((want == Extent::Hole).then_some(size))
    }

    /// The value of an extended attribute; `None` if there is none of that name.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such object.
    pub fn xattr(
        &self,
        volume: VolumeIndex,
        file: FileId,
        name: &[u8],
    ) -> Result<Option<Vec<u8>>, ViewError> {
        self.answer(file, |kept| kept.xattr(name), || self.xattr_layered(volume, file, name))
    }

    fn xattr_layered(
        &self,
        volume: VolumeIndex,
        file: FileId,
        name: &[u8],
    ) -> Result<Option<Vec<u8>>, ViewError> {
        let layered = self.layered(volume)?;
        if let Some(said) = layers::xattr(&layered.deltas(), file, name) {
            return Ok(said.map(<[u8]>::to_vec));
        }
        Ok(layered.volume.store.xattr(&self.local(file)?.handle, name)?)
    }

    /// The names of all extended attributes.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if there is no such object.
    pub fn xattrs(&self, volume: VolumeIndex, file: FileId) -> Result<Vec<Box<[u8]>>, ViewError> {
        self.answer(file, Kept::xattrs, || self.xattrs_layered(volume, file))
    }

    fn xattrs_layered(&self, volume: VolumeIndex, file: FileId) -> Result<Vec<Box<[u8]>>, ViewError> {
        let layered = self.layered(volume)?;
        let deltas = layered.deltas();
        let merged = layers::xattrs(&deltas, file);
        let mut names: Vec<Box<[u8]>> = Vec::new();
        if merged.tree {
            let in_tree = layered.volume.store.xattrs(&self.local(file)?.handle)?;
            names.extend(in_tree.into_iter().filter(|name| !merged.said.contains_key(&**name)));
        }
        let said = merged.said.iter().filter(|(_, value)| value.is_some());
        names.extend(said.map(|(name, _)| Box::from(*name)));
        Ok(names)
    }

    /// Room in the image's file system.
    ///
    /// # Errors
    /// What the file system says.
    pub fn space(&self) -> Result<Space, ViewError> {
        match self.volumes.first() {
            Some(volume) => Ok(volume.store.space()?),
            None => Ok(Space::default()),
        }
    }

    /// Keeps a file readable until the result is dropped, though it may leave the view.
    ///
    /// # Errors
    /// [`ViewError::Gone`] if it has left the view already.
    pub fn open(&self, volume: VolumeIndex, file: FileId) -> Result<OpenFile, ViewError> {
        if self.node(volume, file)?.attr.nlink == 0 {
            return Err(ViewError::Gone);
        }
        let store = &self.layered(volume)?.volume.store;
        // The checkpoint that removes the file waits for this view to end before it asks what is open.
        self.shared.open.add(file, store);
        let open = OpenFile { shared: Arc::clone(&self.shared), file };
        if self.shared.open.keeping.is_on() {
            self.shared.keep(file, store)?;
        }
        Ok(open)
    }

    fn layered(&self, volume: VolumeIndex) -> Result<Layered<'_>, ViewError> {
        self.volumes.get(volume.as_usize()).map(|volume| Layered { volume }).ok_or(ViewError::Gone)
    }

    /// Answers for a kept file from what is kept, for any other from deltas and tree. Once the tree changes under the
    /// view, there is no other.
    fn answer<T>(
        &self,
        file: FileId,
        kept: impl Fn(&Kept) -> Result<T, ViewError>,
        layered: impl FnOnce() -> Result<T, ViewError>,
    ) -> Result<T, ViewError> {
        let open = &self.shared.open;
        if let Some(found) = open.kept(file) {
            return kept(&found);
        }
        if open.keeping.tree_changes() {
            return Err(ViewError::Gone);
        }
        let found = layered();
        if !open.keeping.tree_changes() {
            return found;
        }
        // What was read may be newer than the view. The file may have been kept meanwhile.
        open.kept(file).map_or(Err(ViewError::Gone), |found| kept(&found))
    }

    /// The trees of all volumes.
    pub(super) fn stores(&self) -> impl Iterator<Item = &dyn TreeStore> {
        self.volumes.iter().map(|volume| &*volume.store)
    }

    fn local(&self, file: FileId) -> Result<Local, ViewError> {
        self.shared.local(file)
    }
}

/// The deltas of a volume.
struct Layered<'a> {
    volume: &'a VolumeView,
}

impl<'a> Layered<'a> {
    fn deltas(&self) -> Vec<&'a Delta> {
        std::iter::once(&self.volume.live).chain(&self.volume.frozen).collect()
    }

    /// Whether the last name of an object is gone.
    fn is_gone(&self, file: FileId) -> bool {
        for object in self.deltas().iter().filter_map(|delta| delta.object(file)) {
            if object.is_gone() || object.born().is_some() {
                return object.is_gone();
            }
        }
        false
    }
}

/// A file that somebody reads.
pub struct OpenFile {
    shared: Arc<Shared>,
    file: FileId,
}

impl OpenFile {
    /// Holds a file that is open; `None` if it is not.
    pub(super) fn again(shared: &Arc<Shared>, file: FileId) -> Option<Self> {
        shared.open.add_again(file).then(|| Self { shared: Arc::clone(shared), file })
    }
}

impl std::fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OpenFile").field(&self.file).finish()
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.shared.open.remove(self.file);
    }
}

/// The files that somebody reads, and those of them that have left the tree for the graveyard.
#[derive(Default)]
pub(super) struct OpenFiles {
    pub(super) keeping: Keeping,
    state: Mutex<OpenState>,
}

#[derive(Default)]
pub(super) struct OpenState {
    pub(super) readers: HashMap<FileId, Readers>,
    buried: HashMap<FileId, (Arc<dyn TreeStore>, Local)>,
    pub(super) kept: KeptFiles,
}

/// Those who read a file.
pub(super) struct Readers {
    count: usize,
    /// The file's volume.
    pub(super) store: Arc<dyn TreeStore>,
}

impl OpenFiles {
    fn add(&self, file: FileId, store: &Arc<dyn TreeStore>) {
        let mut state = self.lock();
        let none = || Readers { count: 0, store: Arc::clone(store) };
        state.readers.entry(file).or_insert_with(none).count += 1;
    }

    fn remove(&self, file: FileId) {
        let mut state = self.lock();
        let Some(readers) = state.readers.get_mut(&file) else { return };
        readers.count -= 1;
        if readers.count > 0 {
            return;
        }
        state.readers.remove(&file);
        let kept = self.take_kept(&mut state.kept, file);
        let buried = state.buried.remove(&file);
        drop(state);
        if let Some(kept) = kept {
            kept.close(file);
        }
        if let Some((store, local)) = buried {
            remove_from_graveyard(&*store, file, &local);
        }
    }

    fn add_again(&self, file: FileId) -> bool {
        self.lock().readers.get_mut(&file).map(|readers| readers.count += 1).is_some()
    }

    /// Takes over an open file that has left the tree and stands in the graveyard.
    pub(super) fn bury(&self, store: &Arc<dyn TreeStore>, file: FileId, local: &Local) {
        self.lock().buried.insert(file, (Arc::clone(store), local.clone()));
    }

    pub(super) fn buried(&self, file: FileId) -> Option<Local> {
        self.lock().buried.get(&file).map(|(_, local)| local.clone())
    }

    pub(super) fn is_buried(&self, file: FileId) -> bool {
        self.lock().buried.contains_key(&file)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, OpenState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove_from_graveyard(store: &dyn TreeStore, file: FileId, local: &Local) {
    store.forget(&local.handle);
    let graveyard = store.place(Place::Graveyard);
    if let Err(error) = store.unlink(&graveyard.handle, file.to_string().as_bytes(), Kind::File) {
        // It costs room only until the next start, which empties the graveyard.
        tracing::warn!(%file, %error, "a closed file stays in the graveyard");
    }
}

/// Which views are still held.
#[derive(Default)]
pub(super) struct Alive {
    state: Mutex<AliveState>,
    ended: Condvar,
}

#[derive(Default)]
struct AliveState {
    last: u64,
    serials: BTreeSet<u64>,
}

impl Alive {
    fn begin(&self) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last += 1;
        let serial = state.last;
        state.serials.insert(serial);
        serial
    }

    fn end(&self, serial: u64) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).serials.remove(&serial);
        self.ended.notify_all();
    }

    /// Blocks until no view older than `serial` is held. Nobody holds one longer than a call takes.
    pub(super) fn wait_for(&self, serial: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.serials.first().is_some_and(|oldest| *oldest < serial) {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
