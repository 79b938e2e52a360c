//! Space of files: allocation, holes, copies of ranges.

use rustix::fs::{FallocateFlags, copy_file_range, fallocate, fstat};
use rustix::io::{Errno, pwrite};
use twinfs_core::limits;
use twinfs_core::update::{Intent, Op};

use crate::credentials::Caller;
use crate::errno::{FsError, Result};
use crate::mirror::{Mirror, unrecorded};
use crate::ops::data::{Written, read_full};

impl Mirror {
    /// Allocates, frees, zeroes or moves space of a file. Returns whether set-id bits were lost.
    ///
    /// # Errors
    /// The backing file system's; [`FsError::Unsupported`] for modes that cannot be mirrored.
    pub fn fallocate(&self, caller: Caller, fh: u64, offset: u64, len: u64, mode: u32) -> Result<bool> {
        let file = self.files.get(fh).ok_or(FsError::NoHandle)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        let keep = FallocateFlags::KEEP_SIZE;
        let moves = mode == FallocateFlags::COLLAPSE_RANGE || mode == FallocateFlags::INSERT_RANGE;
        let known = moves
            || mode == FallocateFlags::PUNCH_HOLE | keep
            || [FallocateFlags::empty(), FallocateFlags::ZERO_RANGE].contains(&(mode - keep));
        if !known {
            return Err(FsError::Unsupported);
        }
        let intent = Intent::Range { file: file.id, offset, len: if moves { u64::MAX } else { len } };
        let ((), lost) = self.change_content(&file, caller.keeps_set_id(), &intent, 0, |before| {
            fallocate(&file.fd, mode, offset, len)?;
            let after = fstat(&file.fd)?.st_size;
            let size = u64::try_from(after).unwrap_or_default();
            let op = match mode - keep {
                FallocateFlags::COLLAPSE_RANGE => Op::Collapse { file: file.id, offset, len },
                FallocateFlags::INSERT_RANGE => Op::Insert { file: file.id, offset, len },
                // Beyond the end there is nothing to be zeroed, and the attributes say where the end is.
                FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE if offset < size => {
                    let hole = mode.contains(FallocateFlags::PUNCH_HOLE);
                    Op::Zero { file: file.id, offset, len: len.min(size - offset), hole }
                }
                _ if size != before => Op::Truncate { file: file.id, size },
                _ => Op::SetAttr { file: file.id },
            };
            Ok(((), op, &[]))
        })?;
        Ok(lost)
    }

    /// Copies a range from one file to another, at most [`limits::WRITE_BYTES_MAX`] bytes at once, sharing blocks where
    /// the backing file system can. `buffer` is for reading back what was copied.
    ///
    /// # Errors
    /// The backing file system's. The caller falls back to reading and writing on `EXDEV`, `EINVAL` and `EOPNOTSUPP`.
    pub fn copy_range(
        &self,
        caller: Caller,
        from: (u64, u64),
        to: (u64, u64),
        len: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<Written> {
        let ((from, from_offset), (to, offset)) = (from, to);
        let source = self.files.get(from).ok_or(FsError::NoHandle)?;
        let file = self.files.get(to).ok_or(FsError::NoHandle)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(limits::WRITE_BYTES_MAX);
        buffer.clear();
        buffer.resize(len, 0);
        let buffer = buffer.as_mut_slice();
        let intent = Intent::Range { file: file.id, offset, len: len as u64 };
        let keep_set_id = caller.keeps_set_id();
        let (bytes, attributes_changed) = self.change_content(&file, keep_set_id, &intent, len, |_| {
            let (mut read_at, mut write_at) = (from_offset, offset);
            let copied = copy_file_range(&source.fd, Some(&mut read_at), &file.fd, Some(&mut write_at), len)?;
            let data = buffer.split_at_mut(copied).0;
            // The source may have changed while it was copied, so what counts is what arrived. If that cannot be read,
            // writing known bytes over it makes it known.
            if read_full(&file.fd, offset, data).ok() != Some(copied) {
                let again = read_full(&source.fd, from_offset, data)?;
                if pwrite(&file.fd, &data[..again], offset)? != copied {
                    return Err(unrecorded("reading back a copied range", FsError::Os(Errno::IO)));
                }
            }
            let bytes = u32::try_from(copied).expect("at most WRITE_BYTES_MAX");
            Ok((copied, Op::Write { file: file.id, offset, len: bytes }, &*data))
        })?;
        Ok(Written { bytes, attributes_changed })
    }
}
