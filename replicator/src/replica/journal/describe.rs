//! Prints a journal segment for a person.

use std::fmt;
use std::sync::Arc;

use twinfs_core::format::v1::SetPrefix;

use super::JournalError;
use super::Withdrawn;
use super::entry::{Commit, EntryKind};
use super::segment::{ENTRIES_AT, Entry, Found, NUMBER_AT, Segment, Tail, Walk};
use crate::storage::{File, StorageError};

/// Why a segment could not be described.
#[derive(Debug, thiserror::Error)]
pub enum DescribeError {
    /// The file is no segment, or cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The description could not be written.
    #[error(transparent)]
    Output(#[from] fmt::Error),
}

impl From<StorageError> for DescribeError {
    fn from(error: StorageError) -> Self {
        Self::Journal(error.into())
    }
}

/// Writes what a segment says: its header, each entry in a line, and where and how the log ends in it.
///
/// # Errors
/// [`DescribeError`] if the file is no segment. A log that ends in damage is described up to there.
pub fn describe(file: File, out: &mut impl fmt::Write) -> Result<(), DescribeError> {
    // Only for messages; verified with the rest of the header.
    let mut number = [0; 8];
    if file.size()? >= ENTRIES_AT {
        file.read_at(&mut number, NUMBER_AT)?;
    }
    let segment = Segment::open(file, u64::from_le_bytes(number))?;
    let header = &segment.header;
    writeln!(out, "journal segment {}", header.number)?;
    writeln!(out, "  format       version {}, {} bytes", super::SEGMENT_VERSION, header.bytes)?;
    writeln!(out, "  session      {}", header.session)?;
    writeln!(out, "  first entry  {}", header.first_entry)?;
    writeln!(out, "  last group   {} before this segment", header.last_group)?;
    writeln!(out, "entries")?;
    let mut walk = Walk::new(Arc::clone(&segment));
    let why = loop {
        match walk.step()? {
            Found::Entry(entry) => describe_entry(&entry, out)?,
            Found::Nothing => break "nothing",
            Found::Junk(what) => break what,
        }
    };
    write!(out, "end of the log at byte {}: ", walk.at)?;
    match walk.tail()? {
        Tail::Blank => writeln!(out, "nothing was written after it")?,
        Tail::Torn { at } => {
            writeln!(out, "a batch torn by a crash follows ({why}; bytes from {at} on)")?;
        }
        Tail::WentOn { at } => {
            writeln!(out, "DAMAGED: {why}, but the log went on, as the entry at byte {at} proves")?;
        }
    }
    Ok(())
}

fn describe_entry(entry: &Entry, out: &mut impl fmt::Write) -> fmt::Result {
    write!(out, "  {:>8} at {:>8}  ", entry.number, entry.payload_at)?;
    match entry.kind {
        EntryKind::Set => describe_set(&entry.payload, out),
        EntryKind::Commit => describe_commit("commit", &entry.payload, out),
        EntryKind::Standing => describe_commit("standing commit", &entry.payload, out),
        EntryKind::Withdrawn => describe_withdrawn(&entry.payload, out),
    }
}

fn describe_set(payload: &[u8], out: &mut impl fmt::Write) -> fmt::Result {
    let prefix = match SetPrefix::parse(payload) {
        Ok(prefix) => prefix,
        Err(bad) => return writeln!(out, "record set of {} bytes, unreadable: {bad}", payload.len()),
    };
    let header = prefix.header();
    if header.is_null() {
        writeln!(out, "null set of volume {} after set {}, to {}", header.volume, header.number, header.end)
    } else {
        writeln!(
            out,
            "record set {} of volume {}, {} updates from #{}, {} bytes for {}, to {}",
            header.number,
            header.volume,
            header.updates,
            header.first_seq,
            payload.len(),
            u64::from(header.meta_len) + u64::from(header.data_len),
            header.end,
        )
    }
}

fn describe_withdrawn(payload: &[u8], out: &mut impl fmt::Write) -> fmt::Result {
    match Withdrawn::decode(payload) {
        Ok(Withdrawn { volume, numbers }) => {
            write!(out, "withdrawal of record sets of volume {volume}:")?;
            numbers.iter().try_for_each(|number| write!(out, " {number}"))?;
            writeln!(out)
        }
        Err(what) => writeln!(out, "withdrawal of {} bytes, unreadable: {what}", payload.len()),
    }
}

fn describe_commit(name: &str, payload: &[u8], out: &mut impl fmt::Write) -> fmt::Result {
    let commit = match Commit::decode(payload) {
        Ok(commit) => commit,
        Err(what) => return writeln!(out, "{name} of {} bytes, unreadable: {what}", payload.len()),
    };
    writeln!(out, "{name} of group {}, consistency time {}", commit.group, commit.time)?;
    for volume in &commit.volumes {
        let state = match (volume.member, volume.joins) {
            (_, true) => ", joins",
            (true, false) => "",
            (false, false) => ", no member yet",
        };
        writeln!(
            out,
            "{:24}{} through #{}, record sets through {}{state}",
            "", volume.volume, volume.through, volume.base.number
        )?;
    }
    Ok(())
}
