//! What a replica remembers of a damaged journal until what that lost is there again.

use std::fs::{self, File};
use std::io;

use serde::{Deserialize, Serialize};
use twinfs_core::id::{GroupNumber, SetHash, SetNumber, VolumeName};
use twinfs_core::limits;
use twinfs_core::stamp::{Seq, Timestamp};

use super::{SiteDir, SiteError, io_error};

/// A repair that is under way, and the places from which it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repair {
    /// What was found.
    pub why: String,
    /// Whether anything may be missing, not only what came after the last checkpoint.
    pub whole: bool,
    /// A checkpoint had begun to write groups that are lost: the plain trees show nothing that ever was.
    pub torn: bool,
    /// The damaged journal may still stand in its place, and the new one may not have begun.
    pub setting_aside: bool,
    /// The group that is left.
    pub group: GroupNumber,
    /// Its consistency time.
    pub time: Timestamp,
    /// Every volume that was known then.
    pub volumes: Vec<RepairVolume>,
}

/// How far a volume is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairVolume {
    /// Its name.
    pub name: VolumeName,
    /// Whether it was a member.
    pub member: bool,
    /// The last update that is there.
    pub through: Seq,
    /// The last record set of its chain that is known to have been there.
    pub set: SetNumber,
    /// The hash of that set.
    pub hash: SetHash,
    /// Where its interval ended.
    pub end: Timestamp,
}

impl SiteDir {
    /// Puts the journal aside, as `journal.damaged-NUMBER`, unless that was done already. Of those put aside before, the
    /// newest stay.
    ///
    /// # Errors
    /// [`SiteError::Io`]; it may be done again.
    pub fn set_journal_aside(&self, number: u64) -> Result<(), SiteError> {
        let aside = |number: u64| self.path().join(format!("journal.damaged-{number}"));
        let (journal, to) = (self.journal(), aside(number));
        if fs::symlink_metadata(&to).is_err() {
            match fs::rename(&journal, &to) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("rename", &journal)(error));
                }
                _ => {}
            }
        }
        let settled = File::open(self.path()).and_then(|dir| dir.sync_all());
        settled.map_err(io_error("sync", self.path()))?;
        if let Some(old) = number.checked_sub(limits::DAMAGED_JOURNALS_KEPT)
            && let Err(error) = fs::remove_dir_all(aside(old))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %aside(old).display(), "an old damaged journal cannot be removed");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_set_aside_once_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteDir::new(dir.path());
        for number in 1..=4u64 {
            fs::create_dir(site.journal()).unwrap();
            fs::write(site.journal().join("seg"), number.to_string()).unwrap();
            site.set_journal_aside(number).unwrap();
            // The new journal stays where it is, though a crash has it done again.
            fs::create_dir(site.journal()).unwrap();
            site.set_journal_aside(number).unwrap();
            fs::remove_dir(site.journal()).unwrap();
        }
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["journal.damaged-3", "journal.damaged-4"]);
        assert_eq!(fs::read(dir.path().join("journal.damaged-3/seg")).unwrap(), b"3");
    }
}
