//! A sidefile in memory: what the simulator runs on.
//!
//! A mapping outlives a killed process because the kernel keeps the pages. Here [`Capture::image`] stands for that: the
//! bytes that another process would find at this very instant.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::layout::HEADER_BYTES;
use super::{Capture, RING_BYTES_PER_SLOT, SLOT_BYTES, SidefileError, Start, Survivors};
use crate::primary::clock::TimeSource;
use crate::sys::map::{SharedMap, WORD};

/// Stands for its path in errors.
const PATH: &str = "(memory)";

/// Smallest sidefile in memory: a few slots.
const BYTES_MIN: usize = HEADER_BYTES + 16 * (RING_BYTES_PER_SLOT + SLOT_BYTES);

fn memory(bytes: usize) -> Result<SharedMap, SidefileError> {
    let fail = |source| SidefileError::Io { path: PATH.into(), source };
    if bytes < BYTES_MIN {
        return Err(fail(io::ErrorKind::InvalidInput.into()));
    }
    SharedMap::anonymous(bytes).map_err(fail)
}

impl Capture {
    /// Makes a sidefile of `bytes` bytes (a multiple of 8) in memory, which takes its time from `time`. `lost` says that
    /// updates of the run before were lost: see [`create_after_loss`](Self::create_after_loss).
    ///
    /// # Errors
    /// [`SidefileError::Io`]: the size is none, or there is no memory.
    pub fn in_memory(
        bytes: usize,
        time: Arc<dyn TimeSource>,
        start: &Start<'_>,
        lost: bool,
    ) -> Result<Self, SidefileError> {
        let map = memory(bytes)?;
        Self::format(&map, start, lost);
        Self::over(Path::new(PATH), map, time, start)
    }

    /// All bytes of the sidefile, as another process would find them if this one were killed now.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.map.copy_out(0, self.map.words().len() * WORD, &mut bytes);
        bytes
    }

    /// Opens the sidefile of a run that was killed, from the [`image`](Self::image) that it left.
    ///
    /// # Errors
    /// [`SidefileError`]
    pub fn from_image(
        image: &[u8],
        time: Arc<dyn TimeSource>,
        start: &Start<'_>,
    ) -> Result<(Self, Survivors), SidefileError> {
        let map = memory(image.len())?;
        map.copy_in(0, image);
        Self::reopen(Path::new(PATH), map, time, start)
    }
}
