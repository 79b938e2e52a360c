//! Write tokens: a stamp with the address it wrote, without the data.
//!
//! Tokens run ahead of record sets on a stream of higher priority, so that a replica knows what it is about to lose
//! even while the data is still queued on the primary (the idea of write tokens is IBM's, for Extended Remote Copy).

use crate::id::FileId;
use crate::stamp::Stamp;
use crate::update::{Op, OpKind, Update};

/// The address of one update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// When, and where in its volume.
    pub stamp: Stamp,
    /// What it did.
    pub op: OpKind,
    /// The object it changed: the file, or the directory of the first name; none for marks about the whole volume.
    pub file: Option<FileId>,
    /// First byte and number of bytes, for operations on content; zero otherwise.
    pub range: (u64, u64),
    /// The first name, for operations on names; empty otherwise.
    pub name: Box<[u8]>,
}

impl Token {
    /// The token of an update.
    #[must_use]
    pub fn of<B: AsRef<[u8]>>(update: &Update<B>) -> Self {
        let range = match update.op {
            Op::Write { offset, len, .. } => (offset, u64::from(len)),
            Op::Truncate { size, .. } => (size, 0),
            Op::Zero { offset, len, .. }
            | Op::Collapse { offset, len, .. }
            | Op::Insert { offset, len, .. } => (offset, len),
            _ => (0, 0),
        };
        let name: &[u8] = match &update.op {
            Op::Create { name, .. }
            | Op::Link { name, .. }
            | Op::Unlink { name, .. }
            | Op::Bind { name, .. }
            | Op::Rename { from: name, .. }
            | Op::Exchange { a: name, .. }
            | Op::SetXattr { name, .. }
            | Op::RemoveXattr { name, .. } => name.as_ref(),
            _ => &[],
        };
        Self {
            stamp: update.stamp,
            op: update.op.kind(),
            file: update.op.files()[0],
            range,
            name: name.into(),
        }
    }
}
