//! What can still be read of a journal that is damaged.

use std::collections::BTreeMap;
use std::sync::Arc;

use twinfs_core::id::SessionId;
use twinfs_core::limits;

use super::reader::Table;
use super::recovery::check_place;
use super::segment::{Segment, segment_name, segment_number};
use super::{Journal, JournalError, JournalReader, Recovery};
use crate::storage::Storage;

impl Journal {
    /// Reads what can be trusted of a journal that does not open, or whose recovery ends early. Changes nothing. The
    /// recovery gives back entries as they were written, in their order, and always ends with an error: where the journal
    /// ends, or where the first segments that follow each other do. Of the entries that it gives back, some may be missing
    /// before the first, and record sets that have rotted are [`Rotten`](super::Recovered::Rotten).
    ///
    /// # Errors
    /// The storage's, and [`JournalError::UnknownVersion`]: a newer program may understand it.
    pub fn salvage(
        storage: &dyn Storage,
        session: SessionId,
    ) -> Result<(JournalReader, Recovery), JournalError> {
        let mut numbers: Vec<u64> = storage.list()?.iter().filter_map(|name| segment_number(name)).collect();
        numbers.sort_unstable();
        numbers.truncate(limits::JOURNAL_SEGMENTS_MAX);
        let mut segments: BTreeMap<u64, Arc<Segment>> = BTreeMap::new();
        for number in numbers {
            let before = segments.values().next_back();
            let is_next = before.is_none_or(|before| before.number() + 1 == number);
            let opened = Segment::open(storage.open(&segment_name(number))?, number);
            let opened = opened.and_then(|segment| {
                check_place(&segment, number, session, before)?;
                Ok(segment)
            });
            match opened {
                Ok(segment) if is_next => drop(segments.insert(number, segment)),
                Err(error) if !error.is_damage() => return Err(error),
                // Nothing follows what is missing; but what comes first may be one that nobody needs any more.
                _ if before.is_some() => break,
                _ => {}
            }
        }
        let recovery = Recovery::lenient(segments.values().cloned().collect());
        Ok((JournalReader::new(Arc::new(Table::new(segments))), recovery))
    }
}
