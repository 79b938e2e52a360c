//! What the mirror tells of each change, and to whom.

use std::sync::Arc;

use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{AttrList, Intent, Note, Op};
use twinfs_replicator::primary::activity_log::ActivityLog;
use twinfs_replicator::primary::sidefile::{Capture, Overflow, Refused, Reservation, Wanted};

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

    /// Makes durable that a file was touched. Called before a program is told that something of the file is durable, so
    /// that a power loss finds the file in the list of those to compare. Takes no time if it stands there already.
    fn log_durably(&self, _volume: VolumeIndex, _file: FileId) {}
}

/// Room for one update. Dropped, it becomes void: the operation failed and leaves no record.
#[must_use]
pub trait Pending {
    /// Notes what an operation on names found: see [`Reservation::note`].
    fn note(&self, note: Note);

    /// Stamps and publishes the update, unless the session is suspended: see [`Reservation::publish`]. Called under
    /// the locks of all that it touched.
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

/// The sidefile, with the activity log beside it: every file that an update touches is logged, also while the
/// session is suspended and the update itself is dropped.
#[derive(Debug)]
pub struct Logged {
    capture: Arc<Capture>,
    log: Arc<ActivityLog>,
}

impl Logged {
    /// Puts the two together.
    #[must_use]
    pub const fn new(capture: Arc<Capture>, log: Arc<ActivityLog>) -> Self {
        Self { capture, log }
    }
}

impl Recorder for Logged {
    fn reserve<'a>(
        &'a self,
        volume: VolumeIndex,
        intent: &Intent<'_>,
        meta_bytes: usize,
        data_bytes: usize,
    ) -> Result<Box<dyn Pending + 'a>, Refused> {
        let reservation = self.capture.reserve(volume, intent, meta_bytes, data_bytes)?;
        Ok(Box::new(LoggedPending { recorder: self, volume, reservation }))
    }

    fn reserve_all<'a>(
        &'a self,
        volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn Pending + 'a>>, Refused> {
        let reserved = self.capture.reserve_all(volume, wanted)?;
        let logged = |reservation| Box::new(LoggedPending { recorder: self, volume, reservation }) as _;
        Ok(reserved.into_iter().map(logged).collect())
    }

    fn log_durably(&self, volume: VolumeIndex, file: FileId) {
        // Programs get errors of their own directory only: what the log cannot take suspends the session.
        if self.log.flush_file(volume, file).is_err() {
            self.capture.suspend_while(Overflow::Site);
        }
    }
}

struct LoggedPending<'a> {
    recorder: &'a Logged,
    volume: VolumeIndex,
    reservation: Reservation<'a>,
}

impl Pending for LoggedPending<'_> {
    fn note(&self, note: Note) {
        self.reservation.note(note);
    }

    fn publish(self: Box<Self>, op: Op<&[u8]>, attrs: AttrList, data: &[u8]) -> Option<Stamp> {
        let Self { recorder: Logged { capture, log }, volume, reservation } = *self;
        let named = op.files();
        let others = attrs.iter().map(|(file, _)| *file).filter(|file| !named.contains(&Some(*file)));
        let files = named.into_iter().flatten().chain(others);
        // Held until the update has its stamp: see `Touched`.
        let touched = log.touch(volume, files);
        if touched.is_err() {
            // Before it is published, so that it is noted in the change map instead.
            capture.suspend_while(Overflow::Site);
        }
        reservation.publish(op, attrs, data)
    }
}
