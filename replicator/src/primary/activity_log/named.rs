//! What a running log names, for a replica that lost what it had not written into its trees.

use std::collections::HashSet;

use super::found::read_era;
use super::writer::era_name;
use super::{ActivityError, ActivityLog, lock, share};
use crate::primary::activity_log::format::Entry;

/// What a log names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Named {
    /// The files, each once, sorted.
    pub files: Vec<Entry>,
    /// Files may be missing in the list: everything has to be compared.
    pub everything: bool,
}

impl ActivityLog {
    /// Everything that was touched before the call and is not released: all eras that are left. Reads the files of those
    /// that have ended.
    ///
    /// # Errors
    /// [`ActivityError`] if the log has failed, so that it does not name everything.
    pub fn named(&self) -> Result<Named, ActivityError> {
        let inner = &self.inner;
        inner.check()?;
        let (mut files, mut everything) = (HashSet::new(), false);
        // Held, so that no era ends or goes meanwhile.
        let eras = lock(&inner.eras);
        for ended in &eras.ended {
            let name = era_name(ended.era);
            let said =
                read_era(&inner.storage, inner.session, &name, ended.era, inner.config.file_bytes_max)?;
            everything |= said.everything;
            files.extend(said.entries);
        }
        let current = share(&inner.current);
        everything |= current.everything().is_some();
        files.extend(current.all());
        drop(current);
        drop(eras);
        // A failure after the check may have kept something from a file.
        inner.check()?;
        everything |= files.len() > inner.config.files_max;
        let mut files: Vec<Entry> = if everything { Vec::new() } else { files.into_iter().collect() };
        files.sort_unstable();
        Ok(Named { files, everything })
    }
}
