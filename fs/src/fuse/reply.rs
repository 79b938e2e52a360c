//! What both FUSE layers say to the kernel, in its terms.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileType, Generation, INodeNo, InitFlags, KernelConfig, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyXattr, TimeOrNow,
};
use twinfs_core::limits;
use twinfs_core::update::Kind;

use crate::errno::FsError;
use crate::mirror::{Attributes, Entry, SetTime};

/// Agrees with the kernel on what is needed of it, which `since` has at the latest, and on the size of requests.
pub(crate) fn negotiate(config: &mut KernelConfig, needed: &[InitFlags], since: &str) -> std::io::Result<()> {
    for flag in needed {
        config.add_capabilities(*flag).map_err(|flag| {
            std::io::Error::other(format!(
                "this kernel's FUSE is too old: it lacks {flag:?} ({since} has it)"
            ))
        })?;
    }
    // Reads may be as large.
    let max_write = u32::try_from(limits::WRITE_BYTES_MAX).expect("one MiB");
    config.set_max_write(max_write).map_err(|_| std::io::Error::other("the largest write is too large"))?;
    Ok(())
}

/// How long the kernel may believe what it is told is for the caller to say: `ttl`.
pub(crate) fn entry(reply: ReplyEntry, ttl: Duration, found: Result<Entry, FsError>) {
    match found {
        Ok(entry) => reply.entry(&ttl, &file_attr(&entry.attributes), Generation(entry.generation.into())),
        Err(error) => reply.error(error.into()),
    }
}

pub(crate) fn attr(reply: ReplyAttr, ttl: Duration, attributes: Result<Attributes, FsError>) {
    match attributes {
        Ok(attributes) => reply.attr(&ttl, &file_attr(&attributes)),
        Err(error) => reply.error(error.into()),
    }
}

pub(crate) fn empty(reply: ReplyEmpty, outcome: Result<(), FsError>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error.into()),
    }
}

pub(crate) fn data(reply: ReplyData, bytes: Result<impl AsRef<[u8]>, FsError>) {
    match bytes {
        Ok(bytes) => reply.data(bytes.as_ref()),
        Err(error) => reply.error(error.into()),
    }
}

pub(crate) fn lseek(reply: ReplyLseek, place: Result<u64, FsError>) {
    match place {
        Ok(at) => reply.offset(at.cast_signed()),
        Err(error) => reply.error(error.into()),
    }
}

/// Attributes with names: `size` is the room that the caller has, 0 if it asks for the length.
pub(crate) fn xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, FsError>) {
    match value {
        Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size as usize => reply.error(FsError::ShortBuffer.into()),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(error.into()),
    }
}

/// Attributes of nothing at all.
pub(crate) const fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub(crate) fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(Kind::of_mode(attributes.mode).unwrap_or(Kind::File)),
        perm: (attributes.mode & 0o7777) as u16,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        // FUSE has 32 bits for it, in the same encoding.
        rdev: attributes.rdev as u32,
        blksize: attributes.block_size,
        flags: 0,
    }
}

pub(crate) const fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

fn system_time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    at.and_then(|at| at.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

/// Undoes fuser's conversion of the kernel's seconds and nanoseconds, which for times before 1970 goes the wrong way
/// with the nanoseconds (fuser 0.18 subtracts them).
pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => SetTime::At(since.as_secs().cast_signed(), since.subsec_nanos()),
            Err(before) => {
                let before = before.duration();
                SetTime::At(-before.as_secs().cast_signed(), before.subsec_nanos())
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_go_both_ways() {
        for seconds in [-2_000_000_000, -1, 0, 1, 4_000_000_000] {
            for nanoseconds in [0, 1, 999_999_999] {
                let up = system_time((seconds, nanoseconds));
                let back = up.duration_since(UNIX_EPOCH).map_or_else(
                    |before| -i128::try_from(before.duration().as_nanos()).unwrap(),
                    |since| i128::try_from(since.as_nanos()).unwrap(),
                );
                assert_eq!(back, i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds));
                // As fuser reads what the kernel sends.
                let whole = Duration::new(seconds.unsigned_abs(), nanoseconds);
                let down = if seconds < 0 { UNIX_EPOCH - whole } else { UNIX_EPOCH + whole };
                assert_eq!(set_time(TimeOrNow::SpecificTime(down)), SetTime::At(seconds, nanoseconds));
            }
        }
    }
}
