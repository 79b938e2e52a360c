//! The bounds of the log.

use twinfs_core::limits;

/// The bounds of an activity log. Only tests have a reason to change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActivityConfig {
    /// Most files that one era names; past it the era says "everything".
    pub files_max: usize,
    /// Bytes past which the file of an era is written anew, packed. At least twice what `files_max` need.
    pub file_bytes_max: u64,
    /// Most eras.
    pub eras_max: usize,
    /// Age at which an era ends, in nanoseconds.
    pub era_ns: u64,
    /// How long entries gather before they are written, in nanoseconds; `None`: until somebody flushes.
    pub flush_ns: Option<u64>,
}

impl Default for ActivityConfig {
    fn default() -> Self {
        Self {
            files_max: limits::ACTIVITY_FILES_MAX,
            file_bytes_max: limits::ACTIVITY_FILE_BYTES_MAX,
            eras_max: limits::ACTIVITY_ERAS_MAX,
            era_ns: limits::ACTIVITY_ERA_NS,
            flush_ns: Some(limits::ACTIVITY_FLUSH_NS),
        }
    }
}
