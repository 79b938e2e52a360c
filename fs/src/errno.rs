//! What can go wrong in a file system call, and the one map from that to error numbers.

use rustix::io::Errno;
use twinfs_replicator::primary::sidefile::Refused;
use twinfs_replicator::replica::image::view::ViewError;

/// Why an operation failed. Nothing was changed, and nothing was recorded, unless the variant says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// The backing file system refused.
    #[error("the backing file system says: {0}")]
    Os(#[from] Errno),
    /// This site may not write.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The kernel named a node that is not in the table, or whose object vanished behind the mount.
    #[error("no such node")]
    NoNode,
    /// The kernel named a handle that is not open.
    #[error("no such handle")]
    NoHandle,
    /// The object belongs to another file system (or subvolume) below the source directory; it is not mirrored.
    #[error("the object belongs to another file system")]
    Foreign,
    /// A link or rename from one volume to another.
    #[error("source and target are in different volumes")]
    CrossVolume,
    /// The directory that lists the volumes cannot be changed.
    #[error("the directory of volumes cannot be changed")]
    VolumeList,
    /// A name longer than any file system takes.
    #[error("the name is too long")]
    NameTooLong,
    /// Not a name that can stand in a directory.
    #[error("not a file name")]
    BadName,
    /// An extended attribute that twinfs keeps for itself: it can be neither seen nor set.
    #[error("the extended attribute is reserved for twinfs")]
    ReservedXattr,
    /// The answer does not fit the caller's buffer.
    #[error("the answer is longer than the caller's buffer")]
    ShortBuffer,
    /// A mode or flag that cannot be mirrored.
    #[error("not supported on a mirrored directory")]
    Unsupported,
    /// No such control operation.
    #[error("no such control operation")]
    NoIoctl,
    /// A file was expected, a directory found.
    #[error("is a directory")]
    IsDirectory,
    /// The names kept changing while the operation looked them up.
    #[error("the names kept changing")]
    Restless,
    /// An operation that does not fit the kind of the object.
    #[error("the object is of another kind")]
    WrongKind,
    /// The replica's view cannot be changed.
    #[error("the replica is read-only")]
    ReadOnly,
    /// The replica cannot read what it holds.
    #[error("the replica cannot read what it holds")]
    Unreadable,
    /// The change was made, but its result could not be read back, so it could not be recorded.
    #[error("a change was made that could not be recorded")]
    Unrecorded,
}

impl FsError {
    /// There is nothing of that name.
    pub(crate) const NO_ENTRY: Self = Self::Os(Errno::NOENT);
    /// There is no extended attribute of that name.
    pub(crate) const NO_XATTR: Self = Self::Os(Errno::NODATA);
    /// The file has nothing of what is sought at or after that offset.
    pub(crate) const NOTHING_THERE: Self = Self::Os(Errno::NXIO);

    /// The error number that a program gets to see.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::Os(errno) => errno,
            Self::Refused(Refused::Fenced) | Self::VolumeList | Self::ReadOnly => Errno::ROFS,
            Self::NoNode => Errno::STALE,
            Self::NoHandle => Errno::BADF,
            Self::Foreign | Self::CrossVolume => Errno::XDEV,
            Self::NameTooLong => Errno::NAMETOOLONG,
            Self::BadName | Self::WrongKind => Errno::INVAL,
            Self::ReservedXattr => Errno::PERM,
            Self::ShortBuffer => Errno::RANGE,
            Self::Unsupported => Errno::OPNOTSUPP,
            Self::NoIoctl => Errno::NOTTY,
            Self::IsDirectory => Errno::ISDIR,
            Self::Restless => Errno::BUSY,
            Self::Unrecorded | Self::Unreadable => Errno::IO,
        }
    }
}

impl From<std::io::Error> for FsError {
    fn from(error: std::io::Error) -> Self {
        Self::Os(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl From<ViewError> for FsError {
    fn from(error: ViewError) -> Self {
        match error {
            ViewError::Gone => Self::NoNode,
            ViewError::WrongKind => Self::WrongKind,
            ViewError::Tree(_) | ViewError::Journal(_) | ViewError::Table(_) => {
                tracing::error!(%error, "the replica cannot read what it holds");
                Self::Unreadable
            }
        }
    }
}

impl From<FsError> for fuser::Errno {
    fn from(error: FsError) -> Self {
        Self::from_i32(error.errno().raw_os_error())
    }
}

/// Outcome of a file system call.
pub type Result<T, E = FsError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_their_numbers_on_the_way_to_the_kernel() {
        let not_found = FsError::from(std::io::Error::from_raw_os_error(2));
        assert_eq!(not_found, FsError::Os(Errno::NOENT));
        assert_eq!(fuser::Errno::from(not_found).code(), 2);
        assert_eq!(FsError::Refused(Refused::Fenced).errno(), Errno::ROFS);
    }
}
