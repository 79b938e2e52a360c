//! Files that stay open when the replica becomes a primary.
//!
//! From then on programs change the plain tree, while those that opened a file before go on reading what the last group
//! said of it. [`Image::keep_open_files`] starts that: of every open file it holds a descriptor, so that the file outlives
//! its names, and its attributes. [`Image::before_change`] is told of every change before it is made, and the first time
//! that one meets a kept file, it copies content and extended attributes aside, into the graveyard. The last reader's
//! close removes the copy.
//!
//! Whatever else the view could tell, it tells only as long as nothing was changed. After that there is no such object: a
//! walk through a directory that was opened earlier must not meet a mixture of groups.
//!
//! Nobody waits for readers. Who reads from the tree looks afterwards whether a change was announced meanwhile, and if so
//! takes back what was read and asks again.
//!
//! What it costs is bounded by what is open at the promote: one descriptor and some 300 bytes of memory for each open
//! file, and, of those that are changed, disk space for one copy (shared blocks, where the file system can) and memory for
//! the extended attributes.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinfs_core::id::FileId;
use twinfs_core::update::Kind;

use super::Image;
use super::files::{Local, NewObject, Place, Stat, TreeStore};
use super::view::{Node, OpenFiles, Shared, ViewError};

/// What the names of copies in the graveyard begin with.
const COPY: &str = "kept-";

type XattrList = Vec<(Box<[u8]>, Vec<u8>)>;

/// An open file, as the last group left it.
pub(super) struct Kept {
    store: Arc<dyn TreeStore>,
    local: Local,
    stat: Stat,
    content: Mutex<Content>,
    /// Keeps the file when its last name is gone, and its inode number from being given away.
    _held: Arc<OwnedFd>,
}

/// Where content and extended attributes are.
#[derive(Clone)]
enum Content {
    /// Where they always were.
    InTree,
    Aside(Arc<Aside>),
    /// They could not be set aside.
    Lost,
    /// Nobody reads any more.
    Closed,
}

struct Aside {
    /// The copy, of a regular file.
    copy: Option<Local>,
    xattrs: XattrList,
}

impl Kept {
    /// The attributes.
    pub(super) fn node(&self, file: FileId) -> Node {
        Node { file, attr: self.stat.attr, blocks: self.stat.blocks }
    }

    /// Up to `len` bytes; fewer only at the file's end.
    pub(super) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, ViewError> {
        if self.stat.attr.kind() != Some(Kind::File) {
            return Err(ViewError::WrongKind);
        }
        let rest = self.stat.attr.size.saturating_sub(offset);
        let len = len.min(usize::try_from(rest).unwrap_or(usize::MAX));
        let read = |local: &Local| {
            let mut bytes = vec![0; len];
            self.store.read_at(&local.handle, offset, &mut bytes).map(|()| bytes)
        };
        self.answer(|| read(&self.local), |aside| read(aside.copy.as_ref().unwrap_or(&self.local)))
    }

    /// The target of a symlink. It never changes.
    pub(super) fn read_link(&self) -> Result<Vec<u8>, ViewError> {
        Ok(self.store.read_link(&self.local.handle)?)
    }

    /// The value of an extended attribute.
    pub(super) fn xattr(&self, name: &[u8]) -> Result<Option<Vec<u8>>, ViewError> {
        let aside = |aside: &Aside| {
            let found = aside.xattrs.iter().find(|(known, _)| **known == *name);
            Ok(found.map(|(_, value)| value.clone()))
        };
        self.answer(|| self.store.xattr(&self.local.handle, name), aside)
    }

    /// The names of all extended attributes.
    pub(super) fn xattrs(&self) -> Result<Vec<Box<[u8]>>, ViewError> {
        let aside = |aside: &Aside| Ok(aside.xattrs.iter().map(|(name, _)| name.clone()).collect());
        self.answer(|| self.store.xattrs(&self.local.handle), aside)
    }

    /// Asks the tree, or what was set aside; if that happened while the tree was asked, its answer does not count.
    fn answer<T>(
        &self,
        in_tree: impl FnOnce() -> io::Result<T>,
        aside: impl FnOnce(&Aside) -> io::Result<T>,
    ) -> Result<T, ViewError> {
        let is_in_tree = || matches!(*self.content(), Content::InTree);
        if is_in_tree() {
            let found = in_tree();
            if is_in_tree() {
                return Ok(found?);
            }
        }
        let content = self.content().clone();
        match content {
            Content::Aside(found) => Ok(aside(&found)?),
            Content::Lost => Err(ViewError::Tree(io::Error::from_raw_os_error(libc::EIO))),
            Content::InTree | Content::Closed => Err(ViewError::Gone),
        }
    }

    /// Sets content and extended attributes aside, unless that was done before. Whoever comes meanwhile waits.
    fn set_aside(&self, file: FileId) {
        let mut content = self.content();
        if !matches!(*content, Content::InTree) {
            return;
        }
        *content = match self.copy(file) {
            Ok(aside) => Content::Aside(Arc::new(aside)),
            Err(error) => {
                tracing::error!(
                    %file, %error,
                    "a file changes that was opened before the promote, and what it was cannot be kept: its readers get EIO"
                );
                Content::Lost
            }
        };
    }

    fn copy(&self, file: FileId) -> io::Result<Aside> {
        let from = &self.local.handle;
        let mut xattrs = XattrList::new();
        for name in self.store.xattrs(from)? {
            if let Some(value) = self.store.xattr(from, &name)? {
                xattrs.push((name, value));
            }
        }
        if self.stat.attr.kind() != Some(Kind::File) {
            return Ok(Aside { copy: None, xattrs });
        }
        let graveyard = self.store.place(Place::Graveyard);
        let new = NewObject { id: file, kind: Kind::File, rdev: 0, target: &[] };
        let copy = self.store.create(&graveyard.handle, copy_name(file).as_bytes(), new)?;
        let size = self.stat.attr.size;
        let copied = self.store.copy((from, 0), (&copy.handle, 0), size);
        match copied.and_then(|()| self.store.set_len(&copy.handle, size)) {
            Ok(()) => Ok(Aside { copy: Some(copy), xattrs }),
            Err(error) => {
                self.remove_copy(file, &copy);
                Err(error)
            }
        }
    }

    fn remove_copy(&self, file: FileId, copy: &Local) {
        self.store.forget(&copy.handle);
        let graveyard = self.store.place(Place::Graveyard);
        if let Err(error) = self.store.unlink(&graveyard.handle, copy_name(file).as_bytes(), Kind::File) {
            // It costs room only until the next start, which empties the graveyard.
            tracing::warn!(%file, %error, "the copy of a closed file stays in the graveyard");
        }
    }

    /// The last reader has closed the file.
    pub(super) fn close(&self, file: FileId) {
        let content = std::mem::replace(&mut *self.content(), Content::Closed);
        if let Content::Aside(aside) = content
            && let Some(copy) = &aside.copy
        {
            self.remove_copy(file, copy);
        }
        self.store.forget(&self.local.handle);
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn copy_name(file: FileId) -> String {
    format!("{COPY}{file}")
}

/// The kept files.
#[derive(Default)]
pub(super) struct KeptFiles {
    files: HashMap<FileId, Arc<Kept>>,
    /// All volumes that one mount shows lie in one file system, so the number alone tells.
    by_inode: HashMap<u64, FileId>,
}

/// How far the promote has come, to be read without a lock.
#[derive(Default)]
pub(super) struct Keeping {
    phase: AtomicU8,
    /// Number of kept files, never less than there are.
    files: AtomicUsize,
}

impl Keeping {
    /// No file is kept.
    const OFF: u8 = 0;
    /// Open files are kept, and so is every file that is opened.
    const UNCHANGED: u8 = 1;
    /// Something of the tree may be other than the last group left it.
    const CHANGING: u8 = 2;

    /// Whether open files are to be kept.
    pub(super) fn is_on(&self) -> bool {
        self.phase.load(Ordering::SeqCst) != Self::OFF
    }

    /// Whether a change was announced. If not, whatever was read before the call is of the last group.
    pub(super) fn tree_changes(&self) -> bool {
        fence(Ordering::SeqCst);
        self.phase.load(Ordering::SeqCst) == Self::CHANGING
    }

    fn start(&self) {
        // It fails if that was done before.
        let _ = self.phase.compare_exchange(Self::OFF, Self::UNCHANGED, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Announces a change. Returns whether it is the first.
    fn announce(&self) -> bool {
        let (from, to) = (Self::UNCHANGED, Self::CHANGING);
        self.phase.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

impl OpenFiles {
    /// A file that is kept.
    pub(super) fn kept(&self, file: FileId) -> Option<Arc<Kept>> {
        if !self.keeping.is_on() {
            return None;
        }
        self.lock().kept.files.get(&file).cloned()
    }

    /// Adds a file, unless it was closed meanwhile.
    fn add_kept(&self, file: FileId, kept: Kept) -> Result<(), ViewError> {
        let mut state = self.lock();
        if !state.readers.contains_key(&file) || state.kept.files.contains_key(&file) {
            return Ok(());
        }
        // Counted first: whoever announces a change after the look at it below sees the number and comes for the file.
        self.keeping.files.fetch_add(1, Ordering::SeqCst);
        if self.keeping.tree_changes() {
            self.keeping.files.fetch_sub(1, Ordering::SeqCst);
            return Err(ViewError::Gone);
        }
        state.kept.by_inode.insert(kept.stat.ino, file);
        state.kept.files.insert(file, Arc::new(kept));
        Ok(())
    }

    /// Takes a file out of the kept ones, for the last reader, who then has to close it.
    pub(super) fn take_kept(&self, kept: &mut KeptFiles, file: FileId) -> Option<Arc<Kept>> {
        let found = kept.files.remove(&file)?;
        kept.by_inode.remove(&found.stat.ino);
        self.keeping.files.fetch_sub(1, Ordering::SeqCst);
        Some(found)
    }
}

impl Shared {
    /// Keeps an open file, if it is not kept already.
    pub(super) fn keep(&self, file: FileId, store: &Arc<dyn TreeStore>) -> Result<(), ViewError> {
        if self.open.kept(file).is_some() {
            return Ok(());
        }
        let local = self.local(file)?;
        let held = store.hold(&local.handle)?;
        let mut stat = store.stat(&local.handle)?;
        if self.open.is_buried(file) {
            stat.attr.nlink = 0;
        }
        let (store, content) = (Arc::clone(store), Mutex::new(Content::InTree));
        self.open.add_kept(file, Kept { store, local, stat, content, _held: held })
    }
}

impl Image {
    /// Keeps every file that is open in the view as it is, though the tree may change from now on. To be called at the
    /// promote, after the last checkpoint (so that the deltas are empty) and before anything else can change the tree.
    /// Files that are opened until the first change are kept, too; after that only those stay readable.
    ///
    /// A file that cannot be kept, for want of descriptors, is said in the log and becomes unreadable with the first change.
    /// For the bound of what is kept see the head of this module.
    pub fn keep_open_files(&self) {
        let open = &self.shared.open;
        open.keeping.start();
        // Whoever opens a file from here on sees that it has to be kept; whoever did before is on the list.
        let readers: Vec<_> =
            open.lock().readers.iter().map(|(file, reader)| (*file, Arc::clone(&reader.store))).collect();
        for (file, store) in readers {
            if let Err(error) = self.shared.keep(file, &store) {
                tracing::error!(%file, %error, "an open file cannot be kept; it becomes unreadable");
            }
        }
    }

    /// Announces a change to content or attributes of an object of the plain tree, by its inode number, or to the names of
    /// a directory. If it is a kept file, returns once what it was has been set aside, or cannot be: then its readers get
    /// an error, and the change goes on all the same. Cheap if nothing is kept.
    ///
    /// Takes locks of this module only, for as long as a copy takes.
    pub fn before_change(&self, inode: u64) {
        let open = &self.shared.open;
        if open.keeping.announce() {
            // Objects that programs remove from now on must not take room because a view once had a look at them.
            self.view().stores().for_each(|store| store.forget_all());
        }
        if open.keeping.files.load(Ordering::SeqCst) == 0 {
            return;
        }
        let found = {
            let state = open.lock();
            let file = state.kept.by_inode.get(&inode).copied();
            file.and_then(|file| state.kept.files.get(&file).map(|kept| (file, Arc::clone(kept))))
        };
        if let Some((file, kept)) = found {
            kept.set_aside(file);
        }
    }
}
