//! Why the log cannot be used.

use super::EraId;
use crate::storage::StorageError;

/// Why the activity log cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ActivityError {
    /// A write, a sync or a removal failed. That is final for the era: nobody knows which entries are on the medium.
    #[error("the activity log failed: {0}")]
    Storage(#[from] StorageError),
    /// A file of the log was written by a newer version of this program.
    #[error("{era} of the activity log is of version {version}, which this program does not know")]
    UnknownVersion {
        /// The era.
        era: EraId,
        /// Its version.
        version: u32,
    },
}

impl ActivityError {
    /// What status says of a log that has failed: what is wrong, and what helps.
    #[must_use]
    pub fn trouble(&self) -> String {
        match self {
            Self::Storage(error) => {
                let (cause, until) = error.cause();
                format!(
                    "the activity log (activity/ in the site directory) cannot be written: {cause}; mirroring goes on \
                     when {until}"
                )
            }
            Self::UnknownVersion { .. } => self.to_string(),
        }
    }
}
