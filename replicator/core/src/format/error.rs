//! Why bytes are not a record set, and why a set cannot be made.

use crate::stamp::Seq;
use crate::update::BadUpdate;

/// Why bytes are not a record set. The bytes come from a peer or a disk; nothing of them was used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSet {
    /// The first bytes are those of something else.
    #[error("this is not a record set")]
    Magic,
    /// Made by a version that this one does not know.
    #[error("record set format version {0} is not known here")]
    Version(u16),
    /// There are fewer or more bytes than the header says.
    #[error("a record set of {want} bytes has {have} bytes here")]
    Length {
        /// Bytes at hand.
        have: usize,
        /// Bytes that there should be, as far as it is known (of a header that is cut off: bytes of the header).
        want: usize,
    },
    /// The header was damaged.
    #[error("the checksum of the record set header is wrong")]
    HeaderChecksum,
    /// The header is whole, but says what cannot be.
    #[error("bad record set header: {0}")]
    Header(&'static str),
    /// The frame table was damaged, or is another set's.
    #[error("the hash of the record set body is wrong")]
    BodyHash,
    /// The frame table says what cannot be.
    #[error("bad frame table of a record set: {0}")]
    FrameTable(&'static str),
    /// A frame was damaged.
    #[error("the hash of frame {0} of a record set is wrong")]
    FrameHash(usize),
    /// A frame is as it was made, but is not the compressed form of as many bytes as it should be.
    #[error("frame {0} of a record set does not decompress to its length")]
    Frame(usize),
    /// A range of the data section that does not exist was asked for.
    #[error("the data section of a record set ends before the range")]
    DataRange,
    /// The file table says what cannot be.
    #[error("bad file table of a record set: {0}")]
    FileTable(&'static str),
    /// An update is not one.
    #[error(transparent)]
    Update(#[from] BadUpdate),
    /// An update does not fit the set in which it stands.
    #[error("update #{seq} does not belong into its record set: {what}")]
    Misplaced {
        /// The sequence number that is due at this place.
        seq: Seq,
        /// What is wrong.
        what: &'static str,
    },
}

/// Why a set cannot be made of what its maker gave.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The set must be finished before more can be added. Nothing was added.
    #[error("the record set has no room for another update")]
    Full,
    /// The update is not one.
    #[error(transparent)]
    Update(#[from] BadUpdate),
    /// The update does not follow the one before it.
    #[error("update #{0} does not follow the one before it in the record set")]
    Order(Seq),
    /// The update came with more or less data than it says.
    #[error("an update of {want} bytes came with {have} bytes of data")]
    Data {
        /// Bytes given.
        have: usize,
        /// Bytes that the update speaks of.
        want: usize,
    },
    /// The place of the set contradicts its contents, or itself.
    #[error(transparent)]
    Place(BadSet),
}
