//! A shared file mapping, seen as atomic words.
//!
//! Every access is a relaxed (or, where asked for, ordered) atomic access of a 64-bit word, so concurrent use is never
//! undefined behaviour: two users of one range could at worst read each other's words. Copying by words costs about as
//! much as `memcpy`, which is far below the system call that produced the bytes.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of a word.
pub const WORD: usize = 8;

/// A `MAP_SHARED` mapping of a whole preallocated file, whose contents outlive the process; or memory of this process alone.
#[derive(Debug)]
pub struct SharedMap {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is plain memory that is accessed through atomics only.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `file`, whose blocks must be allocated (a store to a hole of a full file system would be fatal).
    ///
    /// # Errors
    /// Those of `fstat` and `mmap`; an empty or oddly sized file is `InvalidInput`.
    pub fn new(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        if len == 0 || len % WORD != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of this process.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        let base = NonNull::new(base.cast::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, words: len / WORD })
    }

    /// Zeroed memory of this process alone, for tests and simulations.
    ///
    /// # Errors
    /// Those of `mmap`; no bytes, or half a word, are `InvalidInput`.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(WORD) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of this process.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        let base = NonNull::new(base.cast::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, words: len / WORD })
    }

    /// The mapping as words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words` words long, lives as long as `self`, and is accessed only as
        // atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    /// Copies `bytes` to byte offset `at` (a multiple of 8). The rest of the last word becomes zero.
    ///
    /// # Panics
    /// If the range is outside the mapping or `at` is not aligned: the caller's arithmetic is broken.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        assert_eq!(at % WORD, 0, "ranges of the mapping are word-aligned");
        let words = &self.words()[at / WORD..][..bytes.len().div_ceil(WORD)];
        let mut chunks = bytes.chunks_exact(WORD);
        for (word, chunk) in words.iter().zip(&mut chunks) {
            let mut raw = [0; WORD];
            raw.copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(raw), Ordering::Relaxed);
        }
        let rest = chunks.remainder();
        if let (false, Some(last)) = (rest.is_empty(), words.last()) {
            let mut raw = [0; WORD];
            raw[..rest.len()].copy_from_slice(rest);
            last.store(u64::from_ne_bytes(raw), Ordering::Relaxed);
        }
    }

    /// Appends `len` bytes from byte offset `at` (a multiple of 8) to `out`.
    ///
    /// # Panics
    /// As [`Self::copy_in`].
    pub fn copy_out(&self, at: usize, len: usize, out: &mut Vec<u8>) {
        assert_eq!(at % WORD, 0, "ranges of the mapping are word-aligned");
        let words = &self.words()[at / WORD..][..len.div_ceil(WORD)];
        out.reserve(words.len() * WORD);
        let end = out.len() + len;
        for word in words {
            out.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        out.truncate(end);
    }

    /// Writes the dirty pages back and waits for them.
    ///
    /// # Errors
    /// Those of `msync`.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is exactly this mapping.
        unsafe {
            rustix::mm::msync(self.base.as_ptr().cast(), self.words * WORD, rustix::mm::MsyncFlags::SYNC)?;
        }
        Ok(())
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.words * WORD) };
        debug_assert!(unmapped.is_ok(), "unmapping a mapping of our own cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_neighbours_stay() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let map = SharedMap::new(&file).unwrap();
        map.copy_in(16, &[0xff; 24]);
        map.copy_in(16, b"hello, world");
        let mut out = b"<".to_vec();
        map.copy_out(16, 12, &mut out);
        assert_eq!(out, b"<hello, world");
        let mut after = Vec::new();
        map.copy_out(32, 8, &mut after);
        assert_eq!(after, [0xff; 8]);
    }
}
