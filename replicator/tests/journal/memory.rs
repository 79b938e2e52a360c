//! Files in memory that a test may change behind the journal's back. Nothing tears here, so an image opens in the time
//! that its hashes take: made for many thousands of damaged images.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};

use rustix::io::Errno;
use twinfs_replicator::storage::{File, Operation, SimStorage, Storage, StorageError, StorageFile};

type Bytes = Arc<RwLock<Vec<u8>>>;

/// A directory of such files. Clones are the same directory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<BTreeMap<String, Bytes>>>);

impl Memory {
    /// What a simulated disk holds.
    pub(crate) fn of(storage: &SimStorage) -> Self {
        let this = Self::default();
        for name in storage.list().unwrap() {
            this.put(&name, storage.bytes(&name).unwrap());
        }
        this
    }

    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        self.0.lock().unwrap().insert(name.to_owned(), Arc::new(RwLock::new(bytes)));
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        self.file(name).unwrap().read().unwrap().clone()
    }

    /// Changes a file in place.
    pub(crate) fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.file(name).unwrap().write().unwrap());
    }

    fn file(&self, name: &str) -> Option<Bytes> {
        self.0.lock().unwrap().get(name).cloned()
    }
}

fn refusal(operation: Operation, name: &str, errno: Errno) -> StorageError {
    StorageError::Io { operation, name: name.to_owned(), errno }
}

impl Storage for Memory {
    fn create(&self, name: &str) -> Result<File, StorageError> {
        if self.file(name).is_some() {
            return Err(refusal(Operation::Create, name, Errno::EXIST));
        }
        self.put(name, Vec::new());
        self.open(name)
    }

    fn open(&self, name: &str) -> Result<File, StorageError> {
        let bytes = self.file(name).ok_or_else(|| refusal(Operation::Open, name, Errno::NOENT))?;
        Ok(Arc::new(MemoryFile { name: name.to_owned(), bytes }))
    }

    fn list(&self) -> Result<Vec<String>, StorageError> {
        Ok(self.0.lock().unwrap().keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        let removed = self.0.lock().unwrap().remove(name);
        removed.map(drop).ok_or_else(|| refusal(Operation::Remove, name, Errno::NOENT))
    }

    fn rename(&self, name: &str, to: &str) -> Result<(), StorageError> {
        let mut files = self.0.lock().unwrap();
        let file = files.remove(name).ok_or_else(|| refusal(Operation::Rename, name, Errno::NOENT))?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn sync_dir(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64, StorageError> {
        Ok(1 << 40)
    }

    fn salt(&self) -> Result<[u8; 16], StorageError> {
        Ok([0x5a; 16])
    }
}

#[derive(Debug)]
struct MemoryFile {
    name: String,
    bytes: Bytes,
}

impl StorageFile for MemoryFile {
    fn size(&self) -> Result<u64, StorageError> {
        Ok(self.bytes.read().unwrap().len() as u64)
    }

    fn allocate(&self, size: u64) -> Result<(), StorageError> {
        let mut bytes = self.bytes.write().unwrap();
        let size = bytes.len().max(size as usize);
        bytes.resize(size, 0);
        Ok(())
    }

    fn truncate(&self, size: u64) -> Result<(), StorageError> {
        self.bytes.write().unwrap().truncate(size as usize);
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), StorageError> {
        let bytes = self.bytes.read().unwrap();
        let end = offset.saturating_add(buf.len() as u64);
        let range = usize::try_from(offset).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX);
        let found = bytes.get(range).ok_or(StorageError::EndsEarly { name: self.name.clone(), end })?;
        buf.copy_from_slice(found);
        Ok(())
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> Result<(), StorageError> {
        let (new, at) = (parts.concat(), offset as usize);
        let mut bytes = self.bytes.write().unwrap();
        let size = bytes.len().max(at + new.len());
        bytes.resize(size, 0);
        bytes[at..at + new.len()].copy_from_slice(&new);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn settle(&self) -> Result<(), StorageError> {
        Ok(())
    }
}
