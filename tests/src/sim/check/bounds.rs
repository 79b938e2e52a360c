//! Bounds: memory of what waits and of what is shown, and room of the journal.

use twinfs_core::limits;

use crate::sim::replica::Replica;

/// The most of each that was seen.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bounds {
    held_bytes: usize,
    delta_bytes: usize,
    journal_segments: usize,
}

/// Segments that a journal whose image is checkpointed never needs in these runs.
const SEGMENTS_MAX: usize = 64;

impl Bounds {
    pub(crate) fn check(&mut self, replica: &Replica) -> Result<(), String> {
        let engine = &replica.engine;
        self.held_bytes = self.held_bytes.max(engine.receiver().held_bytes());
        self.delta_bytes = self.delta_bytes.max(engine.image().memory_bytes());
        self.journal_segments =
            self.journal_segments.max(engine.journal().map_or(0, |journal| journal.segments()));
        if self.held_bytes > limits::HELD_BYTES_MAX {
            return Err(format!("bounds: {} bytes of sets are held", self.held_bytes));
        }
        // One group may come on top: its size is that of what is in flight.
        let delta_max = engine.image().memory_bytes_max() + limits::IN_FLIGHT_BYTES_MAX;
        if self.delta_bytes > delta_max {
            return Err(format!("bounds: {} bytes of deltas", self.delta_bytes));
        }
        if self.journal_segments > SEGMENTS_MAX {
            return Err(format!("bounds: {} segments of the journal", self.journal_segments));
        }
        Ok(())
    }
}
