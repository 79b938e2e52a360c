//! Writes the file of one era.

use std::sync::Arc;

use twinfs_core::id::SessionId;
use twinfs_core::limits;
use twinfs_core::stamp::Timestamp;

use super::EraId;
use super::format::{BLOCK_BYTES, EraHeader, EraKey, batch_bytes, encode_batch};
use super::set::Batch;
use crate::storage::{File, Storage, StorageError};

/// The file name of an era.
pub(super) fn era_name(era: EraId) -> String {
    format!("{:08}.era", era.0)
}

/// The name of an era's file that is being made.
pub(super) fn new_era_name(era: EraId) -> String {
    format!("{:08}.new", era.0)
}

/// The era of a file name and whether its file is whole; `None` for other files.
pub(super) fn era_of(name: &str) -> Option<(EraId, bool)> {
    let (number, suffix) = name.split_once('.')?;
    let era = EraId(number.parse().ok()?);
    (era_name(era) == name || new_era_name(era) == name).then_some((era, suffix == "era"))
}

/// Appends batches to the file of an era.
#[derive(Debug)]
pub(super) struct EraWriter {
    storage: Arc<dyn Storage>,
    session: SessionId,
    era: EraId,
    start: Timestamp,
    bytes_max: u64,
    file: File,
    key: EraKey,
    /// Where the next batch goes.
    at: u64,
    /// Where the file ends; from `at` on it holds zeros.
    size: u64,
    /// The number of the next batch.
    next: u64,
}

impl EraWriter {
    /// Makes the file of an era, with a first batch if that is not empty. When this returns it is durable, name and
    /// all.
    pub(super) fn create(
        storage: Arc<dyn Storage>,
        session: SessionId,
        era: EraId,
        start: Timestamp,
        first: &Batch,
        bytes_max: u64,
    ) -> Result<Self, StorageError> {
        let (header, key) = EraHeader { session, era, start, salt: storage.salt()? }.encode();
        let remains = new_era_name(era);
        let file = storage.create(&remains)?;
        let mut this =
            Self { storage, session, era, start, bytes_max, file, key, at: BLOCK_BYTES, size: 0, next: 1 };
        this.write(&header, 0)?;
        if first.is_empty() {
            this.file.sync_data()?;
        } else {
            this.append(first)?;
        }
        // A name is given to whole files only, so a file of that name without a whole header is damage.
        this.storage.rename(&remains, &era_name(era))?;
        this.storage.sync_dir()?;
        Ok(this)
    }

    pub(super) const fn era(&self) -> EraId {
        self.era
    }

    pub(super) const fn start(&self) -> Timestamp {
        self.start
    }

    /// Whether a batch would make the file longer than it may be.
    pub(super) const fn is_full_for(&self, batch: &Batch) -> bool {
        self.at + batch_bytes(batch.entries.len()) > self.bytes_max
    }

    /// Writes a batch and makes it durable. It starts with a block of its own, so that nothing durable is written
    /// again.
    pub(super) fn append(&mut self, batch: &Batch) -> Result<(), StorageError> {
        let bytes = encode_batch(&self.key, self.next, self.at, &batch.entries, batch.everything);
        let end = self.at + bytes.len() as u64;
        self.write(&bytes, self.at)?;
        self.file.sync_data()?;
        (self.at, self.next) = (end, self.next + 1);
        Ok(())
    }

    /// Writes the whole era into a new file, packed, in place of the old one.
    pub(super) fn pack(&mut self, all: &Batch) -> Result<(), StorageError> {
        let storage = Arc::clone(&self.storage);
        *self = Self::create(storage, self.session, self.era, self.start, all, self.bytes_max)?;
        Ok(())
    }

    /// Writes bytes, and zeros after them where the file ends: what is written over later needs no new block then,
    /// nor a new size, and so its sync does not wait for the file system's own journal.
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<(), StorageError> {
        let end = at + bytes.len() as u64;
        if end <= self.size {
            return self.file.write_at(&[bytes], at);
        }
        let size = end.next_multiple_of(limits::ACTIVITY_AHEAD_BYTES).min(self.bytes_max).max(end);
        self.file.write_at(&[bytes, &vec![0; (size - end) as usize]], at)?;
        self.size = size;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_eras_are_eras() {
        for number in [1, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(era_of(&era_name(EraId(number))), Some((EraId(number), true)));
            assert_eq!(era_of(&new_era_name(EraId(number))), Some((EraId(number), false)));
        }
        for other in ["1.era", "+0000001.era", "000000001.era", "00000001.seg", "00000001", "incomplete"] {
            assert_eq!(era_of(other), None, "{other}");
        }
    }
}
