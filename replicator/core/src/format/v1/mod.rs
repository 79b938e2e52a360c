//! Version 1 of the record set format.
//!
//! All integers are little-endian. A *section* is a run of raw bytes; each of the two sections is cut into frames of
//! [`limits::FRAME_BYTES`] raw bytes (the last one is shorter), and each frame is compressed by itself, so that a
//! random read decompresses only what it touches. A frame that zstd does not make smaller is stored as it is.
//!
//! ```text
//! offset  bytes  meaning
//!                HEADER
//!      0      8  magic "TWINSET\0"
//!      8      2  version, 1
//!     10      2  length of the header, 217 + n
//!     12      4  length of the body: frame table and frames
//!     16     16  checksum of the header: first 16 bytes of BLAKE3 over all other bytes of the header
//!     32     32  hash of the body: BLAKE3 over the frame table, which holds the hash of each frame
//!     64     16  session
//!     80      8  volume instance
//!     88     20  root directory (a file: instance 8, inode 8, generation 4)
//!    108      4  number of updates; 0 in a null set, which has no body
//!    112      8  epoch, number
//!    120     16  epoch, site
//!    136      8  incarnation
//!    144      8  number of the set in the chain of its volume
//!    152     32  hash of its predecessor: BLAKE3 over the predecessor's header
//!    184      8  sequence number of the first update
//!    192      8  start of the interval, ns
//!    200      8  end of the interval, ns
//!    208      4  raw length of the metadata section
//!    212      4  raw length of the data section
//!    216      1  length of the volume name
//!    217      n  volume name
//!                FRAME TABLE: for each frame, first those of the metadata, then those of the data
//!      0      4  stored length of the frame; top bit set: stored raw
//!      4     32  BLAKE3 over the stored frame
//!                FRAMES, as stored, in the order of the table
//!
//!                METADATA SECTION, raw
//!      0      4  number of files
//!      4      …  files: file 20, length 2, path hint; each file that the updates mention exactly once
//!      …      …  updates, encoded as in `update`, in the order of their stamps
//!                DATA SECTION, raw
//!      0      …  the data of the write updates, in the order of the updates
//! ```
//!
//! The hash of a set is BLAKE3 over its header. Through the hash of the body and the frame table it covers every byte.
//! Since each frame has a hash of its own, a frame that is read alone from a journal is verified, too.

mod builder;
mod frames;
mod header;
mod set;

pub use builder::{Builder, EncodedSet, SetPlace};
pub use frames::{Frame, FrameIndex, Unpacker};
pub use header::SetPrefix;
pub use set::{UnverifiedSet, VerifiedSet};

use crate::limits;

/// The first bytes of every record set, of any version.
pub const MAGIC: [u8; 8] = *b"TWINSET\0";
/// The version that this module reads and writes.
pub const VERSION: u16 = 1;

/// Bytes of a file in the file table, without its path hint.
const FILE_ENTRY_BYTES: usize = crate::id::FileId::BYTES + 2;
/// Bytes before the file table.
const FILE_COUNT_BYTES: usize = 4;
/// The bit of a frame's stored length that says that it is stored raw.
const RAW_BIT: u32 = 1 << 31;

// Bounds that are part of the format: to change them is to make a new version.
const _: () = {
    assert!(limits::FRAME_BYTES == 128 << 10);
    assert!(limits::SET_FRAME_ENTRY_BYTES == 4 + blake3::OUT_LEN);
    assert!(header::FIXED_BYTES + limits::LABEL_BYTES_MAX <= limits::SET_HEADER_BYTES_MAX);
    assert!(limits::LABEL_BYTES_MAX <= u8::MAX as usize);
    assert!(limits::SET_BYTES_MAX < RAW_BIT as usize);
    assert!(limits::PATH_HINT_BYTES_MAX <= u16::MAX as usize);
};

/// Takes integers off the front of bytes; `None` once they are used up.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}
