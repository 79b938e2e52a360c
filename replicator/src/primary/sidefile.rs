//! The sidefile: the ring of captured updates that no replica has made durable yet.

use twinfs_core::id::VolumeIndex;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{AttrList, Intent, Op};

/// The capture side of a session: what the file system layer calls for each mutation.
#[derive(Debug)]
pub struct Capture {}

/// Why a mutation may not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// This site is no primary any more.
    #[error("this site is FENCED: another site was promoted")]
    Fenced,
}

/// Room for one update: a slot with its intent, and space for its bytes. Dropped without [`Reservation::publish`], it
/// becomes void: the operation failed and left no record.
#[derive(Debug)]
#[must_use]
pub struct Reservation<'a> {
    capture: &'a Capture,
}

impl Capture {
    /// Reserves a slot and room, and writes the intent. Call it before taking any lock: this is where writers are paced.
    ///
    /// `meta_bytes` bounds the encoded update without data, `data_bytes` its data.
    ///
    /// # Errors
    /// [`Refused`] if this site may not write.
    pub fn reserve(
        &self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Reservation<'_>, Refused> {
        let _ = (volume, intent, meta_bytes, data_bytes);
        Ok(Reservation { capture: self })
    }
}

impl Reservation<'_> {
    /// Copies the update and its data, takes the stamp and publishes, in one atomic step. Call it under the locks of
    /// all that the operation changed, after the backing call, before the reply.
    pub fn publish<B: AsRef<[u8]>>(self, op: Op<B>, attrs: AttrList, data: &[u8]) -> Stamp {
        let _ = (self.capture, op, attrs, data);
        Stamp::default()
    }
}
