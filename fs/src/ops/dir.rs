//! Reading directories.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, openat, seek, statat};
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::update::Kind;

use crate::errno::{FsError, Result};
use crate::inode::ROOT;
use crate::mirror::{Entry, Mirror};

/// An entry of a directory, as `readdir(3)` shows it.
#[derive(Debug)]
pub struct DirItem<'a> {
    /// Inode number.
    pub ino: u64,
    /// Where reading goes on after this entry.
    pub cookie: u64,
    /// What kind of object it is.
    pub kind: Kind,
    /// Its name; also `.` and `..`.
    pub name: &'a [u8],
}

/// An open directory.
#[derive(Debug)]
pub(crate) enum OpenDir {
    /// In the backing file system.
    Backing { fd: OwnedFd, volume: VolumeIndex, id: FileId, stream: Mutex<Stream> },
    /// The list of volumes.
    List,
}

/// Entries that were read and not yet passed on.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    entries: VecDeque<Item>,
    /// The position of the first of them.
    position: u64,
}

#[derive(Debug)]
struct Item {
    ino: u64,
    cookie: u64,
    kind: Option<Kind>,
    name: Box<[u8]>,
}

impl Mirror {
    /// Opens a directory and returns a handle for it.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn open_dir(&self, nodeid: u64) -> Result<u64> {
        if self.is_list(nodeid) {
            return Ok(self.dirs.insert(OpenDir::List));
        }
        let target = self.target(nodeid)?;
        // A descriptor of its own: the position in the directory belongs to it.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&target.fd, c".", flags, Mode::empty())?;
        let (volume, id) = (target.volume.index, target.node.id);
        Ok(self.dirs.insert(OpenDir::Backing { fd, volume, id, stream: Mutex::default() }))
    }

    /// Closes a directory.
    pub fn release_dir(&self, fh: u64) {
        self.dirs.remove(fh);
    }

    /// Makes a directory durable.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn fsync_dir(&self, fh: u64, data_only: bool) -> Result<()> {
        match &*self.dirs.get(fh).ok_or(FsError::NoHandle)? {
            OpenDir::Backing { fd, volume, id, .. } => {
                self.recorder.log_durably(*volume, *id);
                Ok(if data_only { rustix::fs::fdatasync(fd) } else { rustix::fs::fsync(fd) }?)
            }
            OpenDir::List => Ok(()),
        }
    }

    /// Reads entries from a position on (0, or the cookie of the last entry read) and passes them to `take`, until it
    /// says `false` (then it did not take that entry) or the directory ends.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn read_dir(&self, fh: u64, from: u64, take: &mut dyn FnMut(&DirItem<'_>) -> bool) -> Result<()> {
        let dir = self.dirs.get(fh).ok_or(FsError::NoHandle)?;
        let OpenDir::Backing { fd, stream, .. } = &*dir else {
            self.read_list(from, take);
            return Ok(());
        };
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.position != from {
            seek(fd, SeekFrom::Start(from))?;
            *stream = Stream { entries: VecDeque::new(), position: from };
        }
        loop {
            if stream.entries.is_empty() && !stream.fill(fd)? {
                return Ok(());
            }
            while let Some(item) = stream.entries.front() {
                let kind = match item.kind {
                    Some(kind) => kind,
                    None => match statat(fd, &*item.name, AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(stat) => Kind::of_mode(stat.st_mode).unwrap_or(Kind::File),
                        Err(_) => Kind::File,
                    },
                };
                let shown = DirItem { ino: item.ino, cookie: item.cookie, kind, name: &item.name };
                if !take(&shown) {
                    return Ok(());
                }
                stream.position = item.cookie;
                stream.entries.pop_front();
            }
        }
    }

    /// The same with attributes: each entry but `.` and `..` is looked up, and the lookup is counted if `take` takes it.
    ///
    /// # Errors
    /// The backing file system's.
    pub fn read_dir_plus(
        &self,
        nodeid: u64,
        fh: u64,
        from: u64,
        take: &mut dyn FnMut(&DirItem<'_>, Option<&Entry>) -> bool,
    ) -> Result<()> {
        self.read_dir(fh, from, &mut |item| {
            if item.name == b"." || item.name == b".." {
                return take(item, None);
            }
            // A name that is gone since it was read is passed over.
            let Ok(Some(entry)) = self.lookup(nodeid, item.name) else { return true };
            let taken = take(item, Some(&entry));
            if !taken {
                drop(self.forget(entry.nodeid, 1));
            }
            taken
        })
    }

    fn read_list(&self, from: u64, take: &mut dyn FnMut(&DirItem<'_>) -> bool) {
        let dots = [(ROOT, b".".as_slice()), (ROOT, b"..")];
        let volumes = self.volumes.iter().map(|volume| (volume.root_node, volume.name.as_str().as_bytes()));
        for ((ino, name), cookie) in dots.into_iter().chain(volumes).zip(1..) {
            if cookie > from && !take(&DirItem { ino, cookie, kind: Kind::Dir, name }) {
                return;
            }
        }
    }
}

impl Stream {
    /// Reads some entries; `false` at the end.
    fn fill(&mut self, fd: &OwnedFd) -> Result<bool> {
        let mut buffer = [const { MaybeUninit::uninit() }; limits::DIR_BUFFER_BYTES];
        let mut raw = RawDir::new(fd, &mut buffer);
        while let Some(entry) = raw.next() {
            let entry = entry?;
            self.entries.push_back(Item {
                ino: entry.ino(),
                cookie: entry.next_entry_cookie(),
                kind: kind_of(entry.file_type()),
                name: entry.file_name().to_bytes().into(),
            });
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(!self.entries.is_empty())
    }
}

const fn kind_of(file_type: FileType) -> Option<Kind> {
    Some(match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Unknown => return None,
    })
}
