//! The file in which the table's database stands, on a [`Storage`].

use std::io;

use redb::StorageBackend;

use crate::storage::{File, Storage, StorageError};

/// The name of the database's file.
pub(super) const NAME: &str = "table.redb";
/// Under this name it is made.
pub(super) const NEW_NAME: &str = "table.redb.new";

/// An open file.
#[derive(Debug)]
pub(super) struct TableFile(pub(super) File);

impl StorageBackend for TableFile {
    fn len(&self) -> io::Result<u64> {
        self.0.size().map_err(StorageError::into_io)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(out, offset).map_err(StorageError::into_io)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let shorter = len < self.len()?;
        if shorter { self.0.truncate(len) } else { self.0.allocate(len) }.map_err(StorageError::into_io)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data().map_err(StorageError::into_io)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(&[data], offset).map_err(StorageError::into_io)
    }
}

/// Removes what a start that was cut short left of a new database. Answers whether there is a whole one.
pub(super) fn tidy(storage: &dyn Storage) -> Result<bool, StorageError> {
    let names = storage.list()?;
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    if has(NEW_NAME) {
        storage.remove(NEW_NAME)?;
    }
    Ok(has(NAME))
}
