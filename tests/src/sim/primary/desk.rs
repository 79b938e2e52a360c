//! What stands for the file system layer: it changes the trees and publishes, in the steps of production, and any of them may
//! be the last one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::model::generate::{Change, Generator};
use twinfs_core::stamp::Stamp;
use twinfs_core::token::Token;
use twinfs_core::update::{self, AttrList, Intent, Note, Op, OpKind, UPDATE_HEADER_BYTES, Update};
use twinfs_replicator::failpoint::{self, FailPoint};
use twinfs_replicator::primary::activity_log::ActivityLog;
use twinfs_replicator::primary::sidefile::{Capture, Reservation};
use twinfs_replicator::storage::{Power, Pulse};

use super::Sabotage;
use super::copier::Copying;
use super::history::History;
use super::tree::Tree;

/// A volume of the primary: it outlives its processes.
pub(crate) struct Volume {
    pub(crate) history: History,
    pub(crate) tree: Tree,
    pub(crate) generator: Generator,
    /// A change that is in the tree, and of which nothing was published: the process was killed in between.
    pub(crate) unpublished: Option<Change>,
    /// The copy or resync under way.
    pub(crate) copying: Copying,
    /// It was copied a second time, or resynced: what the replica has too much it need not have been told.
    pub(crate) copied_again: bool,
}

pub(crate) type Volumes = Arc<Mutex<Vec<Volume>>>;

pub(crate) fn lock(volumes: &Mutex<Vec<Volume>>) -> MutexGuard<'_, Vec<Volume>> {
    volumes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a process of the primary publishes.
#[derive(Clone)]
pub(crate) struct Desk {
    pub(crate) capture: Arc<Capture>,
    pub(crate) log: Arc<ActivityLog>,
    pub(crate) power: Power,
    pub(crate) sabotage: Sabotage,
}

impl Desk {
    pub(crate) fn is_dead(&self) -> bool {
        self.power.is_off()
    }

    /// Reserves room for an update. `None` if this site may not write any more.
    pub(crate) fn reserve(
        &self,
        index: VolumeIndex,
        intent: &Intent<'_>,
        op: &Op,
        attrs: &AttrList,
        data: &[u8],
    ) -> Option<Reservation<'_>> {
        let mut encoded = Vec::new();
        let update = Update { stamp: Stamp::default(), op: op.clone(), attrs: *attrs };
        update::encode(&update, &mut encoded);
        let meta_bytes = encoded.len().max(UPDATE_HEADER_BYTES);
        self.capture.reserve(index, intent, meta_bytes, data.len()).ok()
    }

    /// Names the files in the activity log, stamps and publishes, as the recorder of production does.
    pub(crate) fn publish(
        &self,
        index: VolumeIndex,
        history: &mut History,
        reservation: Reservation<'_>,
        op: &Op,
        attrs: &AttrList,
        data: &[u8],
    ) -> Option<Stamp> {
        let update = Update { stamp: Stamp::default(), op: op.clone(), attrs: *attrs };
        let files: Vec<FileId> = update.files().collect();
        let touched =
            (self.sabotage != Sabotage::ForgetEntries).then(|| self.log.touch(index, files.iter().copied()));
        if matches!(touched, Some(Err(_))) {
            self.capture.suspend();
        }
        let stamp = reservation.publish(op.clone(), *attrs, data)?;
        // After the death of the process this never was.
        if !self.is_dead() {
            history.publish(stamp, Some(Token::of(&Update { stamp, ..update })));
        }
        Some(stamp)
    }

    /// Reserves, reads nothing, and publishes at once: what the copier and the recovery do. Returns whether it is kept.
    pub(crate) fn tell(
        &self,
        index: VolumeIndex,
        history: &mut History,
        op: Op,
        attrs: AttrList,
        data: &[u8],
    ) -> bool {
        let file = op.files()[0].unwrap_or(history.root);
        let Some(reservation) = self.reserve(index, &Intent::Attrs { file }, &op, &attrs, data) else {
            return false;
        };
        if self.is_dead() {
            return false;
        }
        self.publish(index, history, reservation, &op, &attrs, data).is_some() && !self.is_dead()
    }

    /// A program's call: intent, change, activity log, stamp. Returns whether the program was answered.
    pub(crate) fn call(&self, index: VolumeIndex, volume: &mut Volume, change: Change, cut: bool) -> bool {
        let Change { update: Update { op, attrs, .. }, data } = &change;
        let (intent, note) = intent_of(volume, op);
        let Some(reservation) = self.reserve(index, &intent, op, attrs, data) else { return false };
        if let Some(note) = note.filter(|_| !self.is_dead()) {
            reservation.note(note);
        }
        if self.capture.fill().suspended && !self.is_dead() {
            self.log_ahead(index, &change);
        }
        match self.power.change() {
            Pulse::On => {}
            // In the middle of the call: it happened, or it did not.
            Pulse::Cut if cut => {
                volume.tree.apply(&change);
                volume.unpublished = Some(change);
                return false;
            }
            Pulse::Cut | Pulse::Off => return false,
        }
        volume.tree.apply(&change);
        failpoint::pass(FailPoint::BackingDone);
        if self.is_dead() {
            volume.unpublished = Some(change);
            return false;
        }
        let stamp = if volume.copying.admits(op, attrs) {
            self.publish(index, &mut volume.history, reservation, op, attrs, data)
        } else {
            drop(reservation);
            None
        };
        // What is let go takes effect at an instant, too.
        let time = stamp.map_or_else(|| self.capture.now(), |stamp| stamp.time);
        volume.history.change(time, change);
        failpoint::pass(FailPoint::Published);
        !self.is_dead()
    }

    /// What is let go is only known from the activity log, and of its last 100 ms a kill leaves nothing: see "What is not
    /// promised" in docs/guarantees.md. Here its thread is quicker than any program.
    fn log_ahead(&self, index: VolumeIndex, change: &Change) {
        if self.sabotage == Sabotage::ForgetEntries {
            return;
        }
        let files: Vec<FileId> = change.update.files().collect();
        let logged = self.log.touch(index, files.into_iter()).map(drop).and_then(|()| self.log.flush());
        if logged.is_err() {
            self.capture.suspend();
        }
    }

    /// A program's fsync.
    pub(crate) fn sync(&self, index: VolumeIndex, volume: &mut Volume, file: FileId, cut: bool) {
        // First, so that nothing becomes durable that a power loss would not find in the log.
        if self.log.flush_file(index, file).is_err() {
            self.capture.suspend();
        }
        match self.power.change() {
            Pulse::On => volume.tree.sync(file),
            Pulse::Cut if cut => volume.tree.sync(file),
            Pulse::Cut | Pulse::Off => {}
        }
    }
}

/// The intent of an operation, as the file system layer writes it, and what an operation on names finds.
fn intent_of<'a>(volume: &Volume, op: &'a Op) -> (Intent<'a>, Option<Note>) {
    let model = volume.tree.live();
    let kind = |file: FileId| {
        let attr = model.object(file).map(|object| *object.attr());
        attr.and_then(|attr| attr.kind()).map(|kind| (file, kind))
    };
    let note = |op: OpKind, first: Option<FileId>, second: Option<FileId>| {
        Some(Note { op, first: first.and_then(kind), second: second.and_then(kind) })
    };
    match op {
        Op::Write { file, offset, len } => {
            (Intent::Range { file: *file, offset: *offset, len: u64::from(*len) }, None)
        }
        Op::Zero { file, offset, len, .. } => {
            (Intent::Range { file: *file, offset: *offset, len: *len }, None)
        }
        Op::Collapse { file, offset, .. } | Op::Insert { file, offset, .. } => {
            (Intent::Range { file: *file, offset: *offset, len: u64::MAX }, None)
        }
        Op::Truncate { file, .. } => (Intent::Size { file: *file }, None),
        Op::SetXattr { file, name, .. } | Op::RemoveXattr { file, name } => {
            (Intent::Xattr { file: *file, name }, None)
        }
        Op::Create { dir, name, .. } => {
            (Intent::Names { first: (*dir, name), second: None }, note(OpKind::Create, None, None))
        }
        Op::Link { dir, name, file } => {
            (Intent::Names { first: (*dir, name), second: None }, note(OpKind::Link, Some(*file), None))
        }
        Op::Unlink { dir, name, file } => {
            (Intent::Names { first: (*dir, name), second: None }, note(OpKind::Unlink, Some(*file), None))
        }
        Op::Rename { from_dir, from, to_dir, to, file, replaced } => (
            Intent::Names { first: (*from_dir, from), second: Some((*to_dir, to)) },
            note(OpKind::Rename, Some(*file), *replaced),
        ),
        Op::Exchange { a_dir, a, a_file, b_dir, b, b_file } => (
            Intent::Names { first: (*a_dir, a), second: Some((*b_dir, b)) },
            note(OpKind::Exchange, Some(*a_file), Some(*b_file)),
        ),
        Op::SetAttr { file } => (Intent::Attrs { file: *file }, None),
        Op::Object { .. } | Op::Bind { .. } | Op::Unbind { .. } | Op::Complete | Op::Resync => {
            unreachable!("no program does that")
        }
    }
}
