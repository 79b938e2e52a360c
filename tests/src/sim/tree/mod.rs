//! A file system in memory below the trees of the replica's image, which forgets after a power cut what was not synced.
//!
//! There is a *live* state, which calls see, a *durable* one as of the last sync, and the list of changes between them. A
//! crash image is the durable state with some of the changes: of those to names, attributes and sizes the first ones, as
//! many as the seed says, for file systems journal them in order; and of each written page any version, whatever
//! became of other pages and of the names above, for data is written back when it pleases.
//!
//! What a checkpoint may get wrong on a real file system goes wrong here, too: names and contents spoil modification
//! times, a change of owner clears set-id bits, removed objects answer `ESTALE`, inode numbers are given away again at
//! once, with another generation, and directories are listed in an order that means nothing.

mod fs;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use twinfs_core::id::FileId;
use twinfs_core::model::{ContentHasher, Entry, Listing, PAGE_BYTES, Random};
use twinfs_core::update::{Attr, ID_XATTR, Kind, is_file_name, is_xattr_name};
use twinfs_replicator::replica::image::files::{
    Child, Extent, Local, NewObject, Place, Space, Stat, TreeStore,
};
use twinfs_replicator::replica::image::handle::Handle;
use twinfs_replicator::storage::{Power, Pulse};

use self::fs::{Change, Fs, Inode, Key, PAGE, SPOILT_MTIME};

/// A type of file handles that no file system has.
const HANDLE_KIND: i32 = 0x51;
#[derive(Debug, Default)]
struct State {
    live: Fs,
    durable: Fs,
    unsynced: Vec<Change>,
    /// `tree`, `staging` and `graveyard` of each volume.
    volumes: BTreeMap<String, [Key; 3]>,
    /// Freed inode numbers, the last one first to go.
    free: Vec<u64>,
    next_ino: u64,
    /// Never goes back, also not with a crash: handles of lost objects stay stale.
    generations: u64,
    power: Power,
}

/// The file system of all volumes. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct SimFs {
    state: Arc<Mutex<State>>,
}

impl SimFs {
    /// An empty one.
    pub(crate) fn new(power: &Power) -> Self {
        Self::of(State { power: power.clone(), ..State::default() })
    }

    fn of(state: State) -> Self {
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// The tree of a volume; empty, and durable at once, if there was none.
    pub(crate) fn open(&self, name: &str) -> SimTree {
        let mut state = self.lock();
        let places = match state.volumes.get(name) {
            Some(places) => *places,
            None => {
                let places = [(); 3].map(|()| state.make_place());
                state.volumes.insert(name.to_owned(), places);
                places
            }
        };
        SimTree { fs: self.clone(), places }
    }

    /// What a power cut leaves, for a machine with this power. Seed 0 loses everything that was not synced, seed 1 keeps
    /// everything, the others draw.
    pub(crate) fn crash(&self, seed: u64, power: &Power) -> Self {
        let state = self.lock();
        let mut random = Random::new(seed ^ 0x7472_6565);
        let mut fs = state.durable.clone();
        let meta =
            state.unsynced.iter().filter(|change| !matches!(change, Change::Write { .. })).count() as u64;
        // How many versions of each page survive, and how many other changes do.
        let mut pages: BTreeMap<(Key, u64), u64> = BTreeMap::new();
        for change in &state.unsynced {
            if let Change::Write { key, page, .. } = change {
                *pages.entry((*key, *page)).or_default() += 1;
            }
        }
        let mut draw = |count: u64| match seed {
            0 => 0,
            1 => count,
            _ => random.below(count + 1),
        };
        let mut meta = draw(meta);
        pages.values_mut().for_each(|count| *count = draw(*count));
        for change in &state.unsynced {
            let left = match change {
                Change::Write { key, page, .. } => pages.get_mut(&(*key, *page)).expect("all were counted"),
                _ => &mut meta,
            };
            if *left > 0 {
                *left -= 1;
                let _nothing_to_change = fs.apply(change);
            }
        }
        let next_ino = fs.inodes.keys().max().map_or(1, |last| last + 1);
        Self::of(State {
            durable: fs.clone(),
            live: fs,
            volumes: state.volumes.clone(),
            next_ino,
            generations: state.generations,
            power: power.clone(),
            ..State::default()
        })
    }

    /// The same file system as a new process finds it.
    pub(crate) fn restart(&self, power: &Power) -> Self {
        let old = self.lock();
        Self::of(State {
            live: old.live.clone(),
            durable: old.durable.clone(),
            unsynced: old.unsynced.clone(),
            volumes: old.volumes.clone(),
            free: old.free.clone(),
            next_ino: old.next_ino,
            generations: old.generations,
            power: power.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tree of one volume. Clones are the same tree.
#[derive(Debug, Clone)]
pub(crate) struct SimTree {
    fs: SimFs,
    places: [Key; 3],
}

impl SimTree {
    /// What stands below `tree/`.
    pub(crate) fn listing(&self) -> Listing {
        let state = self.lock();
        let mut listing = Listing::default();
        let mut open = vec![(Vec::new(), self.places[0].0)];
        while let Some((path, ino)) = open.pop() {
            let inode = &state.live.inodes[&ino];
            for (name, child) in &inode.names {
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                open.push(([&path, separator, name].concat(), *child));
            }
            let mut content = ContentHasher::default();
            inode.pages.iter().for_each(|(number, page)| content.page(*number, &page[..]));
            let xattrs = inode.xattrs.iter().filter(|(name, _)| is_xattr_name(name));
            listing.add(Entry {
                path,
                identity: ino,
                attr: inode.attr,
                target: inode.target.to_vec(),
                xattrs: xattrs.map(|(name, value)| (name.clone(), value.clone())).collect(),
                content,
            });
        }
        listing
    }

    /// Names in staging and in the graveyard.
    pub(crate) fn left_over(&self) -> Vec<String> {
        let state = self.lock();
        let mut found = Vec::new();
        for (place, (ino, _)) in ["tree", "staging", "graveyard"].iter().zip(&self.places).skip(1) {
            let names = state.live.inodes[ino].names.keys();
            found.extend(names.map(|name| format!("{place}/{}", name.escape_ascii())));
        }
        found
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.fs.lock()
    }

    /// Does what `make` finds to be a change, unless the power is off; in the middle of a cut it is done and fails.
    fn change<T>(&self, make: impl FnOnce(&mut State) -> Result<(Vec<Change>, T), Errno>) -> io::Result<T> {
        let mut state = self.lock();
        let pulse = state.power.change();
        if pulse == Pulse::Off {
            return Err(Errno::IO.into());
        }
        let (changes, answer) = make(&mut state)?;
        for change in changes {
            let done = state.live.apply(&change);
            assert!(done.is_some(), "{change:?} was checked before");
            state.unsynced.push(change);
        }
        if pulse == Pulse::Cut { Err(Errno::IO.into()) } else { Ok(answer) }
    }

    fn look<T>(&self, answer: impl FnOnce(&State) -> Result<T, Errno>) -> io::Result<T> {
        let state = self.lock();
        if state.power.is_off() {
            return Err(Errno::IO.into());
        }
        Ok(answer(&state)?)
    }
}

impl State {
    fn make_place(&mut self) -> Key {
        self.generations += 1;
        let ino = self.free.pop().unwrap_or(self.next_ino.max(1));
        self.next_ino = self.next_ino.max(ino + 1);
        let attr =
            Attr { mode: 0o040_700, uid: 0, gid: 0, nlink: 2, rdev: 0, size: PAGE, mtime_s: 0, mtime_ns: 0 };
        let inode = Arc::new(Inode::new(self.generations, attr, b""));
        self.durable.inodes.insert(ino, Arc::clone(&inode));
        self.live.inodes.insert(ino, inode);
        (ino, self.generations)
    }

    fn inode(&self, key: Key) -> Result<&Inode, Errno> {
        self.live.get(key).ok_or(Errno::STALE)
    }

    fn file(&self, key: Key) -> Result<&Inode, Errno> {
        let inode = self.inode(key)?;
        if inode.attr.kind() == Some(Kind::File) { Ok(inode) } else { Err(Errno::INVAL) }
    }

    fn dir(&self, key: Key) -> Result<&Inode, Errno> {
        let inode = self.inode(key)?;
        if inode.is_dir() { Ok(inode) } else { Err(Errno::NOTDIR) }
    }

    /// A directory in which a name is free.
    fn room(&self, dir: Key, name: &[u8]) -> Result<(), Errno> {
        if !is_file_name(name) {
            return Err(Errno::INVAL);
        }
        if self.dir(dir)?.names.contains_key(name) { Err(Errno::EXIST) } else { Ok(()) }
    }

    fn child(&self, dir: Key, name: &[u8]) -> Result<Key, Errno> {
        self.dir(dir)?;
        self.live.child(dir, name).ok_or(Errno::NOENT)
    }

    fn is_below(&self, dir: u64, top: u64) -> bool {
        let below = |ino: &u64| self.live.inodes.get(ino).is_some_and(|child| child.is_dir());
        let mut open = vec![top];
        while let Some(at) = open.pop() {
            if at == dir {
                return true;
            }
            open.extend(self.live.inodes[&at].names.values().filter(|ino| below(ino)));
        }
        false
    }
}

fn key(handle: &Handle) -> Key {
    let bytes = handle.to_bytes();
    let number =
        |at: usize| bytes.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    (number(4).unwrap_or(0), number(12).unwrap_or(0))
}

fn local((ino, generation): Key) -> Local {
    let bytes = [&HANDLE_KIND.to_le_bytes()[..], &ino.to_le_bytes(), &generation.to_le_bytes()].concat();
    Local { ino, handle: Handle::from_bytes(&bytes).expect("it has a good length") }
}

fn child(inode: &Inode, ino: u64) -> Child {
    Child { ino, kind: inode.attr.kind().expect("objects have kinds"), nlink: inode.attr.nlink.into() }
}

const fn mode_of(kind: Kind) -> u32 {
    match kind {
        Kind::File => 0o100_600,
        Kind::Dir => 0o040_700,
        Kind::Symlink => 0o120_777,
        Kind::Fifo => 0o010_600,
        Kind::Socket => 0o140_600,
        Kind::CharDevice => 0o020_600,
        Kind::BlockDevice => 0o060_600,
    }
}

impl TreeStore for SimTree {
    fn place(&self, place: Place) -> Local {
        local(self.places[place as usize])
    }

    fn create(&self, dir: &Handle, name: &[u8], new: NewObject<'_>) -> io::Result<Local> {
        let parent = key(dir);
        let made = self.change(|state| {
            state.room(parent, name)?;
            let ino = state.free.pop().unwrap_or(state.next_ino);
            state.next_ino = state.next_ino.max(ino + 1);
            state.generations += 1;
            let key = (ino, state.generations);
            let attr = Attr {
                mode: mode_of(new.kind),
                uid: 0,
                gid: 0,
                nlink: if new.kind == Kind::Dir { 2 } else { 1 },
                rdev: new.rdev,
                size: if new.kind == Kind::Dir { PAGE } else { new.target.len() as u64 },
                mtime_s: SPOILT_MTIME.0,
                mtime_ns: SPOILT_MTIME.1,
            };
            Ok((
                vec![Change::Create { key, attr, target: new.target.into(), dir: parent, name: name.into() }],
                key,
            ))
        })?;
        // Two system calls, and a crash may come between them.
        self.change(|_| {
            let value = Some(new.id.to_bytes().as_slice().into());
            Ok((vec![Change::SetXattr { key: made, name: ID_XATTR.into(), value }], ()))
        })?;
        Ok(local(made))
    }

    fn child(&self, dir: &Handle, name: &[u8]) -> io::Result<Option<Child>> {
        self.look(|state| match state.child(key(dir), name) {
            Ok(found) => Ok(Some(child(state.inode(found)?, found.0))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        })
    }

    fn child_local(&self, dir: &Handle, name: &[u8]) -> io::Result<Local> {
        self.look(|state| state.child(key(dir), name).map(local))
    }

    fn list(&self, dir: &Handle, each: &mut dyn FnMut(&[u8], Child)) -> io::Result<()> {
        let found = self.look(|state| {
            let mut found: Vec<_> =
                state.dir(key(dir))?.names.iter().map(|(name, ino)| (name.clone(), *ino)).collect();
            // Neither by name nor by number.
            found.sort_by_key(|(name, ino)| (ino.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7, name.clone()));
            let kind = |ino: u64| child(&state.live.inodes[&ino], ino).kind;
            Ok(found
                .into_iter()
                .map(|(name, ino)| (name, Child { ino, kind: kind(ino), nlink: 0 }))
                .collect::<Vec<_>>())
        })?;
        found.iter().for_each(|(name, child)| each(name, *child));
        Ok(())
    }

    fn link(&self, object: &Handle, dir: &Handle, name: &[u8]) -> io::Result<()> {
        let (object, dir) = (key(object), key(dir));
        self.change(|state| {
            if state.inode(object)?.is_dir() {
                return Err(Errno::PERM);
            }
            state.room(dir, name)?;
            Ok((vec![Change::Link { key: object, dir, name: name.into() }], ()))
        })
    }

    fn unlink(&self, dir: &Handle, name: &[u8], kind: Kind) -> io::Result<()> {
        let dir = key(dir);
        self.change(|state| {
            let found = state.child(dir, name)?;
            let inode = state.inode(found)?;
            match (inode.is_dir(), kind == Kind::Dir) {
                (true, false) => return Err(Errno::ISDIR),
                (false, true) => return Err(Errno::NOTDIR),
                _ if !inode.names.is_empty() => return Err(Errno::NOTEMPTY),
                _ => {}
            }
            if inode.is_dir() || inode.attr.nlink == 1 {
                state.free.push(found.0);
            }
            Ok((vec![Change::Unlink { dir, name: name.into() }], ()))
        })
    }

    fn rename(&self, from: (&Handle, &[u8]), to: (&Handle, &[u8])) -> io::Result<()> {
        let (from_dir, to_dir) = (key(from.0), key(to.0));
        self.change(|state| {
            let found = state.child(from_dir, from.1)?;
            state.room(to_dir, to.1)?;
            if state.inode(found)?.is_dir() && state.is_below(to_dir.0, found.0) {
                return Err(Errno::INVAL);
            }
            Ok((vec![Change::Rename { from_dir, from: from.1.into(), to_dir, to: to.1.into() }], ()))
        })
    }

    fn stat(&self, object: &Handle) -> io::Result<Stat> {
        self.look(|state| {
            let inode = state.inode(key(object))?;
            Ok(Stat { attr: inode.attr, ino: key(object).0, blocks: inode.pages.len() as u64 * (PAGE / 512) })
        })
    }

    fn read_at(&self, file: &Handle, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.look(|state| {
            let inode = state.file(key(file))?;
            let mut done = 0;
            while done < buf.len() {
                let at = offset + done as u64;
                let within = (at % PAGE) as usize;
                let len = (PAGE_BYTES - within).min(buf.len() - done);
                match inode.pages.get(&(at / PAGE)) {
                    Some(page) => buf[done..done + len].copy_from_slice(&page[within..within + len]),
                    None => buf[done..done + len].fill(0),
                }
                done += len;
            }
            // A write may leave more in a page than the file's size says.
            let rest = inode.attr.size.saturating_sub(offset).min(buf.len() as u64) as usize;
            buf[rest..].fill(0);
            Ok(())
        })
    }

    fn seek(&self, file: &Handle, offset: u64, want: Extent) -> io::Result<Option<u64>> {
        self.look(|state| {
            let inode = state.file(key(file))?;
            let is_data = |at: u64| at < inode.attr.size && inode.pages.contains_key(&(at / PAGE));
            if want == Extent::Data {
                let next = inode.pages.range(offset / PAGE..).next().map(|(page, _)| offset.max(page * PAGE));
                return Ok(next.filter(|at| *at < inode.attr.size));
            }
            let mut at = offset;
            while is_data(at) {
                at = (at / PAGE + 1) * PAGE;
            }
            Ok(Some(at.min(inode.attr.size.max(offset))))
        })
    }

    fn write_at(&self, file: &Handle, offset: u64, data: &[u8]) -> io::Result<()> {
        let key = key(file);
        self.change(|state| {
            state.file(key)?;
            Ok((writes(key, offset, data), ()))
        })
    }

    fn punch(&self, file: &Handle, offset: u64, len: u64) -> io::Result<()> {
        let key = key(file);
        self.change(|state| {
            let end = offset.saturating_add(len).min(state.file(key)?.attr.size);
            let change = (offset < end).then_some(Change::Punch { key, start: offset, end });
            Ok((change.into_iter().collect(), ()))
        })
    }

    fn set_len(&self, file: &Handle, len: u64) -> io::Result<()> {
        let key = key(file);
        self.change(|state| {
            state.file(key)?;
            Ok((vec![Change::SetLen { key, len }], ()))
        })
    }

    fn copy(&self, from: (&Handle, u64), to: (&Handle, u64), len: u64) -> io::Result<()> {
        let (source, target) = (key(from.0), key(to.0));
        self.change(|state| {
            let size = state.file(target)?.attr.size;
            let inode = state.file(source)?;
            let (start, end) = (from.1, from.1.saturating_add(len));
            let mut changes = Vec::new();
            let hole_end = to.1.saturating_add(len).min(size);
            if to.1 < hole_end {
                changes.push(Change::Punch { key: target, start: to.1, end: hole_end });
            }
            for (number, page) in inode.pages.range(start / PAGE..end.div_ceil(PAGE)) {
                let at = (number * PAGE).max(start);
                let stop = ((number + 1) * PAGE).min(end).min(inode.attr.size);
                if at < stop {
                    let bytes = &page[(at % PAGE) as usize..][..(stop - at) as usize];
                    changes.extend(writes(target, to.1 + (at - start), bytes));
                }
            }
            Ok((changes, ()))
        })
    }

    fn read_link(&self, object: &Handle) -> io::Result<Vec<u8>> {
        self.look(|state| {
            let inode = state.inode(key(object))?;
            if inode.attr.kind() == Some(Kind::Symlink) {
                Ok(inode.target.to_vec())
            } else {
                Err(Errno::INVAL)
            }
        })
    }

    fn set_owner_and_mode(&self, object: &Handle, attr: &Attr) -> io::Result<()> {
        let key = key(object);
        self.change(|state| {
            let old = state.inode(key)?.attr;
            let mut changes = Vec::new();
            if (old.uid, old.gid) != (attr.uid, attr.gid) {
                let mode = if old.kind() == Some(Kind::Dir) { old.mode } else { old.mode & !0o6000 };
                changes.push(Change::SetOwnerAndMode { key, mode, uid: attr.uid, gid: attr.gid });
            }
            let mode = if old.kind() == Some(Kind::Symlink) { old.mode } else { attr.mode };
            changes.push(Change::SetOwnerAndMode { key, mode, uid: attr.uid, gid: attr.gid });
            Ok((changes, ()))
        })
    }

    fn set_mtime(&self, object: &Handle, seconds: i64, nanoseconds: u32) -> io::Result<()> {
        let key = key(object);
        self.change(|state| {
            state.inode(key)?;
            Ok((vec![Change::SetMtime { key, seconds, nanoseconds }], ()))
        })
    }

    fn xattr(&self, object: &Handle, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.look(|state| Ok(state.inode(key(object))?.xattrs.get(name).map(|value| value.to_vec())))
    }

    fn xattrs(&self, object: &Handle) -> io::Result<Vec<Box<[u8]>>> {
        self.look(|state| {
            let names = state.inode(key(object))?.xattrs.keys();
            Ok(names.filter(|name| is_xattr_name(name)).cloned().collect())
        })
    }

    fn set_xattr(&self, object: &Handle, name: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let key = key(object);
        self.change(|state| {
            state.inode(key)?;
            Ok((vec![Change::SetXattr { key, name: name.into(), value: value.map(Into::into) }], ()))
        })
    }

    fn id(&self, object: &Handle) -> io::Result<Option<FileId>> {
        let value = self.xattr(object, ID_XATTR)?;
        Ok(value.and_then(|value| FileId::from_bytes(value.as_slice().try_into().ok()?)))
    }

    fn forget(&self, _: &Handle) {}

    fn hold(&self, _: &Handle) -> io::Result<Arc<OwnedFd>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn forget_all(&self) {}

    fn sync(&self) -> io::Result<()> {
        let mut state = self.lock();
        // A cut in its middle: any part of it may have become durable.
        if state.power.change() != Pulse::On {
            return Err(Errno::IO.into());
        }
        state.durable = state.live.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space::default())
    }
}

fn writes(key: Key, offset: u64, data: &[u8]) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let len = (PAGE_BYTES - within).min(data.len() - done);
        changes.push(Change::Write { key, page: at / PAGE, within, bytes: data[done..done + len].into() });
        done += len;
    }
    changes
}
