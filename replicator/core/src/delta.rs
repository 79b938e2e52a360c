//! Net effect of a run of updates.

/// Where a record set stands in the replica's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetLocation {
    /// The journal segment.
    pub segment: u64,
    /// Offset of the set's first byte in the segment.
    pub offset: u64,
}

/// Where a byte of written data stands in the journal: in the data section of a record set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataRef {
    /// The record set.
    pub set: SetLocation,
    /// Offset in the set's (uncompressed) data section.
    pub offset: u32,
}
