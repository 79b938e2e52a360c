//! What the runs before left.

use std::collections::HashSet;
use std::sync::Arc;

use rustix::io::Errno;
use twinfs_core::id::{FileId, SessionId, VolumeIndex};
use twinfs_core::stamp::Timestamp;

use super::format::{BadHeader, Entry, EraHeader, scan};
use super::writer::era_of;
use super::{ActivityConfig, ActivityError, EraId};
use crate::storage::{Storage, StorageError};

/// The name of the mark that the log failed, and does not name everything.
pub(super) const INCOMPLETE: &str = "incomplete";

/// The file that gets that name: see the module's words about failures.
pub(super) const SPARE: &str = "incomplete.spare";

/// Makes the spare file. It is durable with the next sync of the directory.
pub(super) fn make_spare(storage: &dyn Storage) -> Result<(), StorageError> {
    match storage.create(SPARE) {
        Ok(_) | Err(StorageError::Io { errno: Errno::EXIST, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Leaves the mark, durably.
pub(super) fn mark_incomplete(storage: &dyn Storage) -> Result<(), StorageError> {
    match storage.rename(SPARE, INCOMPLETE) {
        Ok(()) => {}
        // It was renamed before, though perhaps not durably, or somebody removed it.
        Err(StorageError::Io { errno: Errno::NOENT, .. }) => match storage.create(INCOMPLETE) {
            Ok(_) | Err(StorageError::Io { errno: Errno::EXIST, .. }) => {}
            Err(error) => return Err(error),
        },
        Err(error) => return Err(error),
    }
    storage.sync_dir()
}

/// What the log said when it was opened: the files in which the sites may differ after a power loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The files, each once, sorted.
    pub files: Vec<(VolumeIndex, FileId)>,
    /// Files may be missing in the list: there were too many, or the log is damaged, or it could not be written.
    /// Then all volumes have to be compared as a whole.
    pub everything: bool,
    /// No update that the list stands for is older.
    pub since: Timestamp,
}

impl Found {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.everything
    }
}

/// What was found, and in which files.
pub(super) struct Gathered {
    pub(super) found: Found,
    /// All files of the log, to be removed once what they say stands elsewhere.
    pub(super) names: Vec<String>,
    /// The highest number of an era.
    pub(super) last: EraId,
}

/// Reads all files of a log.
pub(super) fn gather(
    storage: &Arc<dyn Storage>,
    session: SessionId,
    now: Timestamp,
    config: &ActivityConfig,
) -> Result<Gathered, ActivityError> {
    let mut files = HashSet::new();
    let mut found = Found { files: Vec::new(), everything: false, since: now };
    let mut gathered = Vec::new();
    let mut last = EraId(0);
    for name in storage.list()? {
        let era = match era_of(&name) {
            None if name != INCOMPLETE => continue,
            era => era,
        };
        match era {
            Some((era, is_whole)) => {
                last = last.max(era);
                if is_whole {
                    let said = read_era(storage, session, &name, era, config.file_bytes_max)?;
                    found.everything |= said.everything;
                    found.since = found.since.min(said.start);
                    for entry in said.entries {
                        if files.len() < config.files_max {
                            files.insert(entry);
                        } else {
                            found.everything |= !files.contains(&entry);
                        }
                    }
                }
            }
            None => {
                tracing::warn!("the activity log could not be written in an earlier run");
                found.everything = true;
            }
        }
        gathered.push(name);
    }
    found.files = files.into_iter().collect();
    found.files.sort_unstable();
    Ok(Gathered { found, names: gathered, last })
}

/// What one file says.
pub(super) struct Said {
    pub(super) entries: Vec<Entry>,
    pub(super) everything: bool,
    start: Timestamp,
}

/// Reads the file of an era. What cannot be read stands for everything.
pub(super) fn read_era(
    storage: &Arc<dyn Storage>,
    session: SessionId,
    name: &str,
    era: EraId,
    bytes_max: u64,
) -> Result<Said, ActivityError> {
    let damaged = |what: &dyn std::fmt::Display| {
        tracing::error!(file = name, %what, "the activity log is damaged: everything has to be compared");
        Ok(Said { entries: Vec::new(), everything: true, start: Timestamp::ZERO })
    };
    let bytes = match read_whole(storage, name, bytes_max) {
        Ok(bytes) => bytes,
        Err(error) => return damaged(&error),
    };
    let (header, key) = match EraHeader::decode(&bytes) {
        Ok(header) => header,
        Err(BadHeader::Version(version)) => return Err(ActivityError::UnknownVersion { era, version }),
        Err(BadHeader::Damaged(what)) => return damaged(&what),
    };
    if header.session != session || header.era != era {
        return damaged(&"it is the file of another session or era");
    }
    let scan = scan(&bytes, &key);
    if let Some(what) = scan.damage {
        tracing::error!(file = name, what, "the activity log is damaged: everything has to be compared");
    }
    let everything = scan.everything || scan.damage.is_some();
    Ok(Said { entries: scan.entries, everything, start: header.start })
}

/// Reads a file of at most about twice the bound: the last batch of an era may go past it.
fn read_whole(storage: &Arc<dyn Storage>, name: &str, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
    let file = storage.open(name)?;
    let size = file.size()?;
    if size > bytes_max.saturating_mul(2) {
        return Err(StorageError::TooMany { name: name.to_owned(), max: bytes_max as usize });
    }
    let mut bytes = vec![0; size as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}
