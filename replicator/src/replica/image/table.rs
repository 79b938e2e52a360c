//! The durable records of the image: which object of the tree is which file, and as of when the tree is.
//!
//! One redb database, `SITE/image/table.redb`:
//!
//! ```text
//! files      FileId (20 bytes)         → inode number (8), file handle ([`Handle::to_bytes`])
//! inodes     inode number              → FileId (20 bytes)
//! preimages  FileId (20 bytes)         → as in files: a copy of the file's content at the last checkpoint
//! attributes FileId (20 bytes)         → length of the volume's name (1), name, an encoded update that sets the attributes
//!                                        which the file had at the last checkpoint
//! state      "version", "tree", "started" → JSON
//! ```
//!
//! `tree` is what the tree holds for sure. `started` is what the checkpoint in progress makes of it: it is written before
//! the first change to anything that shows, so that after a crash nobody takes a tree half-way between the two for a
//! tree of any group.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use twinfs_core::id::{FileId, GroupNumber, VolumeName};
use twinfs_core::limits;
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::update::{self, Update};

use super::files::Local;
use super::handle::Handle;
use super::table_file::{self, TableFile};
use crate::storage::{File, Storage, StorageError};

type Id = [u8; FileId::BYTES];

const FILES: TableDefinition<'_, &Id, &[u8]> = TableDefinition::new("files");
const INODES: TableDefinition<'_, u64, &Id> = TableDefinition::new("inodes");
const PREIMAGES: TableDefinition<'_, &Id, &[u8]> = TableDefinition::new("preimages");
const ATTRIBUTES: TableDefinition<'_, &Id, &[u8]> = TableDefinition::new("attributes");
const STATE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("state");

/// The version of the database's layout.
const VERSION: &[u8] = b"1";

/// Why the file table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The database or its disk failed.
    #[error("the image's file table: {0}")]
    Database(#[source] Box<redb::Error>),
    /// The directory of the database, or a file in it, failed.
    #[error("the image's file table: {0}")]
    Storage(#[source] StorageError),
    /// An entry is not what was once written.
    #[error("the image's file table is damaged: {0}")]
    Damaged(&'static str),
    /// It was written by a version of twinfs that this one does not know.
    #[error("the image's file table has an unknown version")]
    Version,
}

impl TableError {
    /// Whether the database answers nothing any more, because its disk failed before.
    fn is_closed(&self) -> bool {
        matches!(self, Self::Database(error) if matches!(**error, redb::Error::PreviousIo))
    }

    /// Whether the file system has no room.
    pub(super) fn is_no_space(&self) -> bool {
        match self {
            Self::Storage(error) => error.is_no_space(),
            Self::Database(error) => match &**error {
                redb::Error::Io(error) => {
                    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<StorageError>());
                    inner.is_some_and(StorageError::is_no_space)
                }
                _ => false,
            },
            Self::Damaged(_) | Self::Version => false,
        }
    }
}

impl<E: Into<redb::Error>> From<E> for TableError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// As of when a volume's tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    /// The root directory of the volume.
    #[serde(with = "file_id")]
    pub root: FileId,
    /// The last update that it holds.
    pub seq: Seq,
    /// Whether the volume is a member of the session: copied in full, and visible.
    pub member: bool,
}

/// As of when the tree is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TreeState {
    /// The last group that it holds.
    pub group: GroupNumber,
    /// The consistency time of that group.
    pub time: Timestamp,
    /// Every volume.
    pub volumes: BTreeMap<VolumeName, VolumeState>,
}

/// Changes that become durable together.
#[derive(Debug, Default)]
pub struct Changes<'a> {
    /// Files whose object is new.
    pub put: &'a [(FileId, Local)],
    /// Files whose object is gone.
    pub remove: &'a [FileId],
    /// Files whose earlier content was kept aside.
    pub put_preimages: &'a [(FileId, Local)],
    /// Updates that set attributes as they were.
    pub put_attributes: &'a [(VolumeName, FileId, Update)],
    /// Whether neither earlier content nor earlier attributes are needed any longer.
    pub clear_earlier: bool,
    /// The new state of the tree.
    pub tree: Option<&'a TreeState>,
    /// The state that the checkpoint in progress will make.
    pub started: Option<&'a TreeState>,
}

/// The open database.
///
/// After a failure of its disk, redb answers nothing any more, not even reads. So a commit that fails opens the database
/// again, which brings it back to the commit before, like a crash.
#[derive(Debug)]
pub struct Table {
    storage: Arc<dyn Storage>,
    db: RwLock<Arc<Database>>,
    /// Held for a whole commit. Whoever finds the database failed waits for it, and looks again.
    committing: Mutex<()>,
}

impl Table {
    /// Opens the database in a directory, or makes an empty one there. A new one gets its name when it is whole: what a
    /// crash leaves of one that is being made could not be opened.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, TableError> {
        if !table_file::tidy(&*storage).map_err(TableError::Storage)? {
            let db = over(storage.create(table_file::NEW_NAME))?;
            let write = db.begin_write()?;
            write.open_table(FILES)?;
            write.open_table(INODES)?;
            write.open_table(PREIMAGES)?;
            write.open_table(ATTRIBUTES)?;
            write.open_table(STATE)?.insert("version", VERSION)?;
            write.commit()?;
            drop(db);
            storage.rename(table_file::NEW_NAME, table_file::NAME).map_err(TableError::Storage)?;
        }
        // The name may also be that of a process that died before it was durable.
        storage.sync_dir().map_err(TableError::Storage)?;
        let db = over(storage.open(table_file::NAME))?;
        let read = db.begin_read()?;
        let known = read.open_table(STATE)?.get("version")?.is_some_and(|version| version.value() == VERSION);
        drop(read);
        if !known {
            return Err(TableError::Version);
        }
        let db = RwLock::new(Arc::new(db));
        let table = Self { storage, db, committing: Mutex::new(()) };
        table.warm()?;
        Ok(table)
    }

    fn db(&self) -> Arc<Database> {
        Arc::clone(&self.db.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks the database; again, if a commit that failed has just closed it.
    fn ask<T>(&self, ask: impl Fn(&Database) -> Result<T, TableError>) -> Result<T, TableError> {
        match ask(&self.db()) {
            Err(error) if error.is_closed() => {
                drop(self.committing.lock().unwrap_or_else(PoisonError::into_inner));
                ask(&self.db())
            }
            answer => answer,
        }
    }

    /// Opens the database again after a failure: what the medium holds counts, not what is cached of it.
    fn reopen(&self) -> Result<(), TableError> {
        let file = self.storage.open(table_file::NAME).and_then(|file| file.settle().map(|()| file));
        let db = Arc::new(over(file)?);
        *self.db.write().unwrap_or_else(PoisonError::into_inner) = db;
        Ok(())
    }

    /// Commits what is there already: that reads the pages which every commit needs, so the first checkpoint costs no more
    /// than the others.
    fn warm(&self) -> Result<(), TableError> {
        let mut write = self.db().begin_write()?;
        write.set_quick_repair(true);
        write.open_table(STATE)?.insert("version", VERSION)?;
        Ok(write.commit()?)
    }

    /// The object of a file; `None` if the tree has none.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn local(&self, file: FileId) -> Result<Option<Local>, TableError> {
        self.ask(|db| {
            // The entry has to go before the transaction, or the writer may free its page.
            let read = db.begin_read()?;
            let table = read.open_table(FILES)?;
            let entry = table.get(&file.to_bytes())?;
            entry.map(|entry| decode(entry.value())).transpose()
        })
    }

    /// The files of inode numbers, in their order; `None` for an inode that is not of the image.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn files(&self, inos: impl Iterator<Item = u64>) -> Result<Vec<Option<FileId>>, TableError> {
        let inos: Vec<u64> = inos.collect();
        self.ask(|db| {
            let read = db.begin_read()?;
            let table = read.open_table(INODES)?;
            let file = |ino: &u64| {
                let entry = table.get(*ino)?;
                entry.map(|entry| FileId::from_bytes(entry.value()).ok_or(BAD_ID)).transpose()
            };
            inos.iter().map(file).collect()
        })
    }

    /// The file of an inode number; `None` for an inode that is not of the image.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn file(&self, ino: u64) -> Result<Option<FileId>, TableError> {
        Ok(self.files(std::iter::once(ino))?.pop().flatten())
    }

    /// The copies of earlier content that a checkpoint which did not end had made.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn preimages(&self) -> Result<BTreeMap<FileId, Local>, TableError> {
        let read = self.db().begin_read()?;
        let table = read.open_table(PREIMAGES)?;
        let mut found = BTreeMap::new();
        for entry in table.iter()? {
            let (id, local) = entry?;
            found.insert(FileId::from_bytes(id.value()).ok_or(BAD_ID)?, decode(local.value())?);
        }
        Ok(found)
    }

    /// Updates that set attributes as they were at the last checkpoint, of objects that one which did not end was to touch
    /// without saying their attributes.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn attributes(&self) -> Result<Vec<(VolumeName, Update)>, TableError> {
        let read = self.db().begin_read()?;
        let table = read.open_table(ATTRIBUTES)?;
        let parse = |bytes: &[u8]| {
            let (len, rest) = bytes.split_first()?;
            let (name, update) = rest.split_at_checked(usize::from(*len))?;
            let name = VolumeName::new(str::from_utf8(name).ok()?).ok()?;
            Some((name, update::decode(update, 0).ok()?.0))
        };
        let mut found = Vec::new();
        for entry in table.iter()? {
            let bad = TableError::Damaged("an entry has no attributes");
            found.push(parse(entry?.1.value()).ok_or(bad)?);
        }
        Ok(found)
    }

    /// The state of the tree, and the one that the last checkpoint was to make: the same if it ended.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn state(&self) -> Result<(TreeState, TreeState), TableError> {
        let read = self.db().begin_read()?;
        let table = read.open_table(STATE)?;
        let get = |key: &str| -> Result<TreeState, TableError> {
            let Some(entry) = table.get(key)? else { return Ok(TreeState::default()) };
            serde_json::from_slice(entry.value()).map_err(|_| TableError::Damaged("a state cannot be read"))
        };
        Ok((get("tree")?, get("started")?))
    }

    /// Makes changes durable, all or none.
    ///
    /// # Errors
    /// See [`TableError`]. What stood before stands; or, if the disk failed in the last step, perhaps the changes do. So they
    /// have to be such as may be committed again.
    pub fn commit(&self, changes: &Changes<'_>) -> Result<(), TableError> {
        let _whole = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = self.try_commit(changes);
        if done.as_ref().is_err_and(TableError::is_closed) {
            // It could not be opened after the last failure.
            self.reopen()?;
            done = self.try_commit(changes);
        }
        if let Err(error) = &done
            && let Err(again) = self.reopen()
        {
            tracing::error!(%error, %again, "the image's file table failed, and cannot be opened again yet");
        }
        done
    }

    fn try_commit(&self, changes: &Changes<'_>) -> Result<(), TableError> {
        let mut write = self.db().begin_write()?;
        // After a crash the database opens at once, however large it is; only amid a checkpoint it has to be read through,
        // which saves a third of what a small checkpoint writes.
        write.set_quick_repair(changes.tree.is_some());
        {
            let (mut files, mut inodes) = (write.open_table(FILES)?, write.open_table(INODES)?);
            for file in changes.remove {
                let id = file.to_bytes();
                let removed = files.remove(&id)?.map(|entry| decode(entry.value())).transpose()?;
                let Some(local) = removed else { continue };
                // A new file may have the inode number by now.
                let is_own = inodes.get(local.ino)?.is_some_and(|owner| *owner.value() == id);
                if is_own {
                    inodes.remove(local.ino)?;
                }
            }
            for (file, local) in changes.put {
                files.insert(&file.to_bytes(), &*encode(local))?;
                inodes.insert(local.ino, &file.to_bytes())?;
            }
            let mut preimages = write.open_table(PREIMAGES)?;
            let mut attributes = write.open_table(ATTRIBUTES)?;
            if changes.clear_earlier {
                preimages.retain(|_, _| false)?;
                attributes.retain(|_, _| false)?;
            }
            for (volume, file, earlier) in changes.put_attributes {
                let len = u8::try_from(volume.as_str().len()).expect("at most LABEL_BYTES_MAX bytes");
                let mut bytes = [&[len], volume.as_str().as_bytes()].concat();
                update::encode(earlier, &mut bytes);
                attributes.insert(&file.to_bytes(), &*bytes)?;
            }
            for (file, local) in changes.put_preimages {
                preimages.insert(&file.to_bytes(), &*encode(local))?;
            }
            let mut state = write.open_table(STATE)?;
            for (key, value) in [("tree", changes.tree), ("started", changes.started)] {
                if let Some(value) = value {
                    let json = serde_json::to_vec(value).expect("a map with text keys is JSON");
                    state.insert(key, &*json)?;
                }
            }
        }
        Ok(write.commit()?)
    }

    /// Forgets which object is which file, to be told anew.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn clear_files(&self) -> Result<(), TableError> {
        let write = self.db().begin_write()?;
        write.open_table(FILES)?.retain(|_, _| false)?;
        write.open_table(INODES)?.retain(|_, _| false)?;
        Ok(write.commit()?)
    }
}

fn over(file: Result<File, StorageError>) -> Result<Database, TableError> {
    open_sound(TableFile(file.map_err(TableError::Storage)?))
}

/// Opens the database and compares all its checksums, which redb by itself does not: it would take rot for handles and
/// groups. Costs some 0.2 µs a file.
fn open_sound(file: TableFile) -> Result<Database, TableError> {
    let open = || -> Result<(Database, bool), redb::Error> {
        let mut builder = Database::builder();
        builder.set_cache_size(limits::IMAGE_TABLE_CACHE_BYTES);
        let mut db = builder.create_with_backend(file)?;
        let sound = db.check_integrity()?;
        Ok((db, sound))
    };
    // Over some pages redb panics; here that says no more than that they are damaged.
    match std::panic::catch_unwind(AssertUnwindSafe(open)) {
        Ok(Ok((db, true))) => Ok(db),
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok((_, false))) | Err(_) => Err(TableError::Damaged("its checksums are wrong")),
    }
}

const BAD_ID: TableError = TableError::Damaged("an entry has no FileId");

fn encode(local: &Local) -> Vec<u8> {
    [&local.ino.to_le_bytes()[..], &local.handle.to_bytes()].concat()
}

fn decode(bytes: &[u8]) -> Result<Local, TableError> {
    bytes
        .split_first_chunk::<8>()
        .and_then(|(ino, handle)| {
            Some(Local { ino: u64::from_le_bytes(*ino), handle: Handle::from_bytes(handle)? })
        })
        .ok_or(TableError::Damaged("an entry has no file handle"))
}

/// A FileId as text, in JSON.
mod file_id {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};
    use twinfs_core::id::FileId;

    pub(super) fn serialize<S: Serializer>(file: &FileId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(file)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FileId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use twinfs_core::update::sample_file;

    use super::*;
    use rustix::io::Errno;

    use crate::storage::{Fault, Operation, RealStorage, SimStorage};

    /// Everything that the table tells.
    type Told = (Vec<Option<Local>>, Vec<Option<FileId>>, TreeState);

    fn open(dir: &Path) -> Result<Table, TableError> {
        Table::open(Arc::new(RealStorage::open(dir).unwrap()))
    }

    fn read_all(dir: &Path) -> Result<Told, TableError> {
        let table = open(dir)?;
        let locals = (0..100).map(|ino| table.local(sample_file(ino))).collect::<Result<_, _>>()?;
        let files = table.files(0..100)?;
        assert!(table.preimages()?.is_empty() && table.attributes()?.is_empty());
        Ok((locals, files, table.state()?.0))
    }

    #[test]
    fn a_flipped_bit_is_noticed_or_without_effect_wherever_it_is() {
        // In memory where there is room: each image is synced several times.
        let memory = Some(Path::new("/dev/shm")).filter(|dir| dir.is_dir());
        let dir = tempfile::tempdir_in(memory.unwrap_or(&std::env::temp_dir())).unwrap();
        let path = dir.path().join(table_file::NAME);
        let table = open(dir.path()).unwrap();
        let handle = Handle::from_bytes(&[1, 0, 0, 0, 5, 6, 7, 8]).unwrap();
        let local = |ino| (sample_file(ino), Local { ino, handle: handle.clone() });
        let (put, tree) = (
            (1..90).map(local).collect::<Vec<_>>(),
            TreeState { group: GroupNumber(7), ..TreeState::default() },
        );
        for tree in [None, Some(&tree)] {
            table.commit(&Changes { put: &put, tree, started: tree, ..Changes::default() }).unwrap();
        }
        drop(table);
        let whole = read_all(dir.path()).unwrap();
        let good = std::fs::read(&path).unwrap();
        let used: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).collect();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let mut refused = 0;
        for (count, at) in used.iter().step_by(used.len() / 500).enumerate() {
            file.set_len(good.len() as u64).unwrap();
            file.write_all_at(&good, 0).unwrap();
            file.write_all_at(&[good[*at] ^ (1 << (count % 8))], *at as u64).unwrap();
            match std::panic::catch_unwind(|| read_all(dir.path())) {
                Ok(Ok(found)) => assert_eq!(found, whole, "byte {at}"),
                Ok(Err(_)) => refused += 1,
                Err(_) => panic!("byte {at}: a panic"),
            }
        }
        assert!(refused > 10, "{refused}");
    }

    #[test]
    fn a_disk_that_fails_and_works_again_leaves_a_table_that_works() {
        let local = |ino| {
            let handle = Handle::from_bytes(&[1, 0, 0, 0, 5, 6, 7, 8]).unwrap();
            (sample_file(ino), Local { ino, handle })
        };
        let put = |table: &Table, inos: std::ops::Range<u64>| {
            table.commit(&Changes { put: &inos.map(local).collect::<Vec<_>>(), ..Changes::default() })
        };
        for (operation, errno) in [
            (Operation::Allocate, Errno::NOSPC),
            (Operation::Write, Errno::DQUOT),
            (Operation::Write, Errno::IO),
            (Operation::SyncData, Errno::IO),
        ] {
            let storage = SimStorage::new(1);
            let table = Table::open(Arc::new(storage.clone())).unwrap();
            put(&table, 1..10).unwrap();
            // The second one hits the attempt to open it again.
            for _ in 0..2 {
                storage.inject(Fault { operation, after: 0, errno });
            }
            // So many that the file has to grow.
            let failed = put(&table, 10..20_000).expect_err("the disk failed");
            assert_eq!(failed.is_no_space(), errno != Errno::IO, "{failed}");
            if operation == Operation::Allocate {
                assert_eq!(
                    table.local(sample_file(5)).unwrap(),
                    Some(local(5).1),
                    "it can be read meanwhile"
                );
            }
            while put(&table, 10..20_000).is_err() {}
            for ino in [5, 15, 19_999] {
                assert_eq!(table.local(sample_file(ino)).unwrap(), Some(local(ino).1), "{operation} {errno}");
            }
            drop(table);
            let again = Table::open(Arc::new(storage.crash(3))).unwrap();
            assert_eq!(again.local(sample_file(19_999)).unwrap(), Some(local(19_999).1));
        }
    }
}
