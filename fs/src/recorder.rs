//! What the mirror tells of each change, and to whom.

use twinfs_core::id::VolumeIndex;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{AttrList, Intent, Note, Op};
use twinfs_replicator::primary::sidefile::{Capture, Refused, Reservation, Wanted};

/// Takes the updates of a mirror: the sidefile in production, a list in tests.
pub trait Recorder: Send + Sync + 'static {
    /// Reserves room for one update, and writes the intent: see [`Capture::reserve`]. Called without any lock held; a
    /// thread never holds two.
    ///
    /// # Errors
    /// [`Refused`] if this site may not write.
    fn reserve<'a>(
        &'a self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Box<dyn Pending + 'a>, Refused>;

    /// The same for several updates of one operation, all at once: see [`Capture::reserve_all`].
    ///
    /// # Errors
    /// [`Refused`] if this site may not write.
    fn reserve_all<'a>(
        &'a self,
        volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn Pending + 'a>>, Refused>;
}

/// Room for one update. Dropped, it becomes void: the operation failed and leaves no record.
#[must_use]
pub trait Pending {
    /// Notes what an operation on names found: see [`Reservation::note`].
    fn note(&self, note: Note);

    /// Stamps and publishes the update, unless the session is suspended: see [`Reservation::publish`]. Called under the locks of all that it touched.
    fn publish(self: Box<Self>, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Option<Stamp>;
}

impl Recorder for Capture {
    fn reserve<'a>(
        &'a self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Box<dyn Pending + 'a>, Refused> {
        Ok(Box::new(Self::reserve(self, volume, intent, meta_bytes, data_bytes)?))
    }

    fn reserve_all<'a>(
        &'a self,
        volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn Pending + 'a>>, Refused> {
        let reserved = Self::reserve_all(self, volume, wanted)?;
        Ok(reserved.into_iter().map(|reservation| Box::new(reservation) as _).collect())
    }
}

impl Pending for Reservation<'_> {
    fn note(&self, note: Note) {
        Reservation::note(self, note);
    }

    fn publish(self: Box<Self>, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        Reservation::publish(*self, op, attrs, data)
    }
}
