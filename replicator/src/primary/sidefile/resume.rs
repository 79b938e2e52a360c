//! What a suspended session notes, and how capture goes on after it.
//!
//! While the session is suspended, updates are dropped, and what they touched is noted in the change map of their volume:
//! by whoever publishes, under the locks of all that the update touched. Capture goes on under a hold, when no operation
//! is under way: so each update is either in the map that is taken then, or follows the *resync* mark.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::session::SuspendReason;
use twinfs_core::stamp::Seq;
use twinfs_core::update::{self, AttrList, Intent, Op};

use super::{Capture, Captured, Mode, Overflow, Refused, W_DROPPED, lock};

/// What was dropped, of each volume.
#[derive(Debug)]
pub(super) struct Changes {
    /// **Lock order**: below all others.
    open: Mutex<Open>,
}

#[derive(Debug)]
struct Open {
    maps: Vec<ChangeMap>,
    /// Something was dropped that no map names: before this process began.
    uncovered: bool,
}

impl Changes {
    pub(super) fn new(volumes: usize) -> Self {
        let maps = vec![ChangeMap::default(); volumes];
        Self { open: Mutex::new(Open { maps, uncovered: false }) }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a dropped update.
    pub(super) fn note<B: AsRef<[u8]>>(&self, volume: VolumeIndex, op: &Op<B>, attrs: &AttrList) {
        if let Some(map) = self.lock().maps.get_mut(volume.as_usize()) {
            map.note(op, attrs);
        }
    }
}

/// Capture cannot go on: operations are under way, or it was never suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("capture is not suspended and held")]
pub struct NotHeld;

impl Capture {
    /// Suspends from the start, as an earlier run left it. `covered` says whether the maps that are merged name all that was
    /// dropped since. That may have been right after the last timestamp of the earlier run, so no later instant is told as one
    /// up to which nothing is missing.
    pub fn suspend_again(&self, reason: SuspendReason, covered: bool) {
        self.changes.lock().uncovered = !covered;
        let overflow = match reason {
            SuspendReason::Link => Some(Overflow::LinkDown),
            SuspendReason::Lag | SuspendReason::Journal => Some(Overflow::TooSlow),
            SuspendReason::Operator | SuspendReason::Error => None,
        };
        self.suspend_as_of(&mut lock(&self.ring), overflow, Some(self.begun));
    }

    /// Whether the change maps name all that was dropped.
    #[must_use]
    pub fn is_covered(&self) -> bool {
        !self.changes.lock().uncovered
    }

    /// Takes the change maps, one for each volume: what they name is about to be read again. New ones are opened.
    #[must_use]
    pub fn take_changes(&self) -> Vec<ChangeMap> {
        self.changes.lock().maps.iter_mut().map(std::mem::take).collect()
    }

    /// Adds what is older than the volume's open map: what a resync did not come to, or what an earlier run had noted.
    pub fn merge_changes(&self, volume: VolumeIndex, older: ChangeMap) {
        let mut open = self.changes.lock();
        if let Some(map) = open.maps.get_mut(volume.as_usize()) {
            let newer = std::mem::replace(map, older);
            map.merge(newer);
        }
    }

    /// Captures again, after [`hold`](Self::hold) has returned `true`. Until [`let_go`](Self::let_go), only the calling
    /// thread may publish. What was captured before the suspension is gone to the replica, or was given up.
    ///
    /// `last_seqs` are the sequence numbers to go on from, where the replica does not have all that this site captured.
    ///
    /// # Errors
    /// [`NotHeld`]; nothing changed.
    pub fn resume(&self, last_seqs: Option<&[Seq]>) -> Result<(), NotHeld> {
        let mut ring = lock(&self.ring);
        let mut publish = lock(&self.publish);
        let is_suspended = matches!(ring.mode, Mode::Suspended(_));
        if !is_suspended || !ring.held || ring.outstanding > 0 || !publish.queue.is_empty() {
            return Err(NotHeld);
        }
        ring.mode = Mode::Active;
        ring.passes = Some(std::thread::current().id());
        publish.closed = None;
        for (volume, last_seq) in last_seqs.into_iter().flatten().enumerate() {
            if let Some(known) = publish.last_seq.get_mut(volume) {
                *known = *last_seq;
            }
        }
        Ok(())
    }

    /// Publishes the mark that a volume is not whole until its resync is complete. After [`resume`](Self::resume), under the
    /// same hold and by the same thread.
    ///
    /// # Errors
    /// [`Refused`] if this site may not write.
    pub fn publish_resync(&self, volume: VolumeIndex, root: FileId) -> Result<(), Refused> {
        let reservation =
            self.reserve(volume, &Intent::Attrs { file: root }, update::UPDATE_HEADER_BYTES, 0)?;
        // It is only dropped if the session was suspended again, and then a later resync has a mark of its own.
        let _stamp = reservation.publish(Op::<&[u8]>::Resync, AttrList::new(), &[]);
        Ok(())
    }

    /// Gives up updates that were captured before the suspension and cannot be shipped any more: those that wait, and
    /// those of sets that were made. What they touched goes into the change maps.
    pub fn give_up(&self, shipped: &[Captured]) {
        let waiting: Vec<Captured> = {
            let mut publish = lock(&self.publish);
            publish.queued_bytes = 0;
            publish.queue.drain(..).collect()
        };
        let mut older = vec![ChangeMap::default(); self.changes.lock().maps.len()];
        let mut encoded = Vec::new();
        for captured in shipped.iter().chain(&waiting) {
            encoded.clear();
            self.copy_meta(captured, &mut encoded);
            let Some(map) = older.get_mut(captured.volume.as_usize()) else { continue };
            match update::decode_borrowed(&encoded, 0) {
                Ok((update, _)) => map.note(&update.op, &update.attrs),
                Err(_) => map.note_everything(),
            }
        }
        for (volume, map) in (0..).map(VolumeIndex).zip(older) {
            self.merge_changes(volume, map);
        }
        self.release(shipped);
        self.release(&waiting);
    }

    /// The replica has all that was dropped: from here on a run that is killed has lost nothing.
    pub fn settle_dropped(&self) {
        let ring = lock(&self.ring);
        if ring.mode == Mode::Active {
            self.map.words()[W_DROPPED].store(0, Ordering::Release);
        }
    }

    /// What stands in the volumes' open maps.
    #[must_use]
    pub fn changes(&self) -> Vec<ChangeMap> {
        self.changes.lock().maps.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::primary::sidefile::{Start, StartVolume};
    use twinfs_core::id::SessionId;
    use twinfs_core::stamp::{Stamp, Timestamp};
    use twinfs_core::update::{Attr, sample_file};

    const V: VolumeIndex = VolumeIndex(0);

    fn sidefile(dir: &tempfile::TempDir) -> Capture {
        let start = Start {
            session: SessionId::from_bytes([7; 16]),
            volumes: &[StartVolume::NEW; 2],
            floor: Timestamp::ZERO,
            limit: Timestamp(u64::MAX),
        };
        Capture::create(&dir.path().join("sidefile"), super::super::bytes_min(), &start).unwrap()
    }

    fn write(capture: &Capture, volume: VolumeIndex, ino: u64) -> Option<Stamp> {
        let file = sample_file(ino);
        let intent = Intent::Range { file, offset: 0, len: 4 };
        let attr =
            Attr { mode: 0o100_644, uid: 0, gid: 0, nlink: 1, rdev: 0, size: 4, mtime_s: 1, mtime_ns: 2 };
        let op: Op<&[u8]> = Op::Write { file, offset: 0, len: 4 };
        capture.reserve(volume, &intent, 256, 4).unwrap().publish(
            op,
            [(file, attr)].into_iter().collect(),
            b"data",
        )
    }

    fn named(map: &ChangeMap) -> Vec<u64> {
        map.objects().map(|(file, _)| file.ino).collect()
    }

    #[test]
    fn what_is_dropped_is_noted_and_capture_goes_on_after_the_mark() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        let kept = write(&capture, V, 1).unwrap();
        let early = capture.reserve(V, &Intent::Attrs { file: sample_file(2) }, 256, 0).unwrap();
        capture.suspend();
        assert_eq!(early.publish(Op::<&[u8]>::SetAttr { file: sample_file(2) }, AttrList::new(), &[]), None);
        assert_eq!(write(&capture, V, 3), None);
        assert_eq!(write(&capture, VolumeIndex(1), 4), None);
        assert_eq!(capture.resume(None), Err(NotHeld));
        assert!(capture.hold(Duration::from_secs(60)));
        assert_eq!(capture.resume(None), Err(NotHeld), "what was captured is not shipped");
        let cut = capture.cut(usize::MAX);
        assert_eq!(cut.updates.len(), 1);
        capture.release(&cut.updates);
        capture.resume(None).unwrap();
        let maps = capture.take_changes();
        assert_eq!(maps.iter().map(named).collect::<Vec<_>>(), [vec![2, 3], vec![4]]);
        std::thread::scope(|scope| {
            let held = scope.spawn(|| write(&capture, V, 5));
            std::thread::sleep(Duration::from_millis(10));
            capture.publish_resync(V, sample_file(1)).unwrap();
            capture.let_go();
            let after = held.join().unwrap().unwrap();
            assert_eq!(after.seq, Seq(3), "after the mark");
        });
        let cut = capture.cut(usize::MAX);
        assert_eq!(cut.updates.iter().map(|update| update.stamp.seq.0).collect::<Vec<_>>(), [2, 3]);
        assert!(cut.updates[0].stamp > kept && cut.end > cut.updates[1].stamp.time);
        assert_eq!(capture.changes(), vec![ChangeMap::default(); 2]);
    }

    #[test]
    fn what_is_given_up_is_noted_before_what_was_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let capture = sidefile(&dir);
        write(&capture, V, 1).unwrap();
        let shipped = capture.cut(usize::MAX).updates;
        write(&capture, V, 2).unwrap();
        capture.suspend();
        write(&capture, V, 3);
        capture.give_up(&shipped);
        assert_eq!((capture.fill().used, capture.queued().1), (0, 0));
        assert!(capture.hold(Duration::from_secs(60)));
        capture.resume(Some(&[Seq(40), Seq(50)])).unwrap();
        capture.publish_resync(V, sample_file(1)).unwrap();
        capture.let_go();
        assert_eq!(capture.cut(usize::MAX).updates[0].stamp.seq, Seq(41));
        assert_eq!(named(&capture.take_changes()[0]), [1, 2, 3]);
    }
}
