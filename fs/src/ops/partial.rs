//! Changes of contents that failed on the way: a full disk, a quota, a disk that fails.
//!
//! What a program asked for has not taken place, but a part of it may have: `fallocate` that zeroes or moves a range stops
//! where it finds no room, and a synchronous write that cannot be made durable stands in the page cache. No file system
//! says which part. So the range is read again, and published as what it is now. Until that is done the range on the
//! replica may be the one from before the call: of a range in which a call failed nothing is promised to anybody.

use rustix::io::Errno;
use twinfs_core::update::{AttrList, Intent, Op};

use crate::copier::next_data;
use crate::errno::{FsError, Result};
use crate::mirror::{Mirror, Reserved, Volume, attr, read_back};
use crate::ops::data::{OpenFile, read_full};

/// Whether a change may have been made in part although it failed so.
pub(crate) const fn may_be_partial(error: &FsError) -> bool {
    let FsError::Os(errno) = error else { return false };
    matches!(*errno, Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::INTR | Errno::NOMEM)
}

impl Mirror {
    /// Publishes what the range of a change that failed holds now, piece by piece, each under the lock of the file, and the
    /// size. Called without a lock. `stands` is the reservation of that change: while there is something left to do, a
    /// reservation stands whose intent names it, so that a process that is killed meanwhile leaves it to the next one.
    ///
    /// # Errors
    /// The backing file system's: then nobody knows what stands there. [`FsError::Refused`].
    pub(crate) fn publish_again<'a>(
        &'a self,
        file: &OpenFile,
        failed: &Intent<'_>,
        mut stands: Reserved<'a>,
    ) -> Result<()> {
        let (offset, end) = match failed {
            Intent::Range { offset, len, .. } => (*offset, offset.saturating_add(*len)),
            _ => (u64::MAX, u64::MAX),
        };
        let volume = &self.volumes[file.slot];
        let mut at = offset;
        while let Some(next) = self.publish_piece(volume, file, at, end)? {
            at = next;
            let left = Intent::Range { file: file.id, offset: at, len: end - at };
            stands = self.reserve(volume, &left, 0, 0)?;
        }
        drop(stands);
        Ok(())
    }

    /// Publishes a hole or a piece of data, and returns where it ends; `None` if it was the end, and the size was published.
    fn publish_piece(&self, volume: &Volume, file: &OpenFile, at: u64, end: u64) -> Result<Option<u64>> {
        let id = file.id;
        // Only so much room is taken as there is data at present.
        let expected = next_data(&file.fd, at)?.filter(|(start, _)| *start == at).map_or(0, |(_, len)| len);
        let room = expected.min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let intent = Intent::Range { file: id, offset: at, len: room as u64 };
        let pending = self.reserve(volume, &intent, 0, room)?;
        let _guard = self.stripes.lock(&[id]);
        let stat = read_back(&file.fd)?;
        let attrs: AttrList = std::iter::once((id, attr(&stat))).collect();
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        let end = end.min(size);
        if at >= end {
            let _stamp = pending.publish(Op::Truncate { file: id, size }, attrs, &[]);
            return Ok(None);
        }
        let (start, len) = next_data(&file.fd, at)?.filter(|(start, _)| *start < end).unwrap_or((end, 0));
        if start > at {
            let op = Op::Zero { file: id, offset: at, len: start - at, hole: true };
            let _stamp = pending.publish(op, attrs, &[]);
            return Ok(Some(start));
        }
        let mut data = vec![0; len.min(room).min(usize::try_from(end - at).unwrap_or(usize::MAX))];
        let read = read_full(&file.fd, at, &mut data)?;
        if read < data.len() {
            return Err(FsError::Os(Errno::IO));
        }
        if read > 0 {
            let len = u32::try_from(read).expect("at most WRITE_BYTES_MAX");
            let _stamp = pending.publish(Op::Write { file: id, offset: at, len }, attrs, &data);
        }
        // If there was a hole a moment ago, the next piece has room for it.
        Ok(Some(at + read as u64))
    }
}
