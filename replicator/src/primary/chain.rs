//! From a cut of the sidefile to record sets.

use std::collections::VecDeque;

use bytes::Bytes;
use twinfs_core::format::{BuildError, Builder, SetPlace};
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SetNumber, VolumeIndex, VolumeInstance, VolumeName,
};
use twinfs_core::session::sender::{ChainLink, IssuedSet, Sender};
use twinfs_core::stamp::{Stamp, Timestamp};
use twinfs_core::update::{OpKind, encoded_kind};

use super::sidefile::{Capture, Captured, Cut};
use crate::failpoint::{self, FailPoint};

/// Where a file stands, for the file tables of record sets: names are hints for people.
pub trait PathHints: Send + Sync + 'static {
    /// The path of a file below its volume's root, or nothing if it is not known.
    fn path_of(&self, volume: VolumeIndex, file: FileId) -> Box<[u8]>;
}

/// What is the same in all sets of a mount.
#[derive(Debug, Clone)]
pub struct SetOrigin {
    /// The session.
    pub session: SessionId,
    /// The generation of the primary role.
    pub epoch: Epoch,
    /// This mount.
    pub incarnation: Incarnation,
    /// zstd's level; 0 stores.
    pub level: i32,
}

/// A volume, as its sets name it.
#[derive(Debug, Clone)]
pub struct SetVolume {
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree.
    pub instance: VolumeInstance,
    /// Its root directory.
    pub root: FileId,
}

/// The room that sets hold in the sidefile until the replica has them, for each volume in the order of its chain.
pub type Rooms = Vec<VecDeque<(SetNumber, Vec<Captured>)>>;

/// Makes record sets. Keeps its buffers between sets.
pub struct SetMaker {
    origin: SetOrigin,
    volumes: Vec<SetVolume>,
    builder: Builder,
    encoded: Vec<u8>,
}

impl std::fmt::Debug for SetMaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SetMaker").field("origin", &self.origin).finish_non_exhaustive()
    }
}

/// The sidefile, or what made it, is damaged: what it holds cannot become a record set.
#[derive(Debug, thiserror::Error)]
#[error("what was captured does not make a record set ({0}); the sidefile is damaged")]
pub struct BadCapture(#[from] pub BuildError);

impl SetMaker {
    /// A maker of the sets of one mount.
    #[must_use]
    pub fn new(origin: SetOrigin, volumes: Vec<SetVolume>) -> Self {
        Self { origin, volumes, builder: Builder::new(), encoded: Vec::new() }
    }

    /// Turns a cut into record sets: of each volume with updates, one or more that end at the cut, handed to `sender`; of
    /// each other volume a null set, so that time advances on all. Returns the null sets.
    ///
    /// # Errors
    /// [`BadCapture`] if the sidefile holds what is no update: memory or disk is damaged.
    pub fn issue(
        &mut self,
        capture: &Capture,
        sender: &mut Sender<Bytes>,
        rooms: &mut Rooms,
        cut: &Cut,
        hints: &dyn PathHints,
    ) -> Result<Vec<Bytes>, BadCapture> {
        let mut nulls = Vec::new();
        for index in (0..self.volumes.len()).map(|at| VolumeIndex(at as u16)) {
            let mine = |captured: &&Captured| captured.volume == index;
            let updates: Vec<Captured> = cut.updates.iter().filter(mine).copied().collect();
            if updates.is_empty() {
                let known = sender.null_link(index).expect("the sender has the same volumes").start;
                // A cut by size may end before an instant up to which an idle volume was vouched for.
                if known <= cut.end {
                    nulls.push(self.null(sender, index, cut.end)?);
                }
                continue;
            }
            let mut from = 0;
            let mut complete = None;
            for (at, captured) in updates.iter().enumerate() {
                self.encoded.clear();
                capture.copy_meta(captured, &mut self.encoded);
                if encoded_kind(&self.encoded) == Some(OpKind::Complete) {
                    complete = Some(captured.stamp);
                }
                self.builder.push(&self.encoded, |data| capture.copy_data(captured, data))?;
                let last = at + 1 == updates.len();
                if last || self.builder.is_full() {
                    let end = if last { cut.end } else { captured.stamp.time };
                    let number = self.finish(
                        capture,
                        index,
                        &updates[from..=at],
                        complete.take(),
                        end,
                        sender,
                        hints,
                    )?;
                    rooms[index.as_usize()].push_back((number, updates[from..=at].to_vec()));
                    from = at + 1;
                }
            }
        }
        Ok(nulls)
    }

    /// A null set: every update of the volume up to `end` is in the sets before it.
    ///
    /// # Errors
    /// [`BadCapture`], of a volume whose header is too large.
    pub fn null(
        &mut self,
        sender: &mut Sender<Bytes>,
        volume: VolumeIndex,
        end: Timestamp,
    ) -> Result<Bytes, BadCapture> {
        let place = sender.null_link(volume).expect("the sender has the same volumes");
        let set = self.builder.finish(self.place(volume, place, end), 0)?;
        sender.handle_null_issued(volume, end).expect("the sender has the same volumes");
        Ok(set.bytes)
    }

    #[expect(clippy::too_many_arguments, reason = "all that a set is made of")]
    fn finish(
        &mut self,
        capture: &Capture,
        volume: VolumeIndex,
        updates: &[Captured],
        complete: Option<Stamp>,
        end: Timestamp,
        sender: &mut Sender<Bytes>,
        hints: &dyn PathHints,
    ) -> Result<SetNumber, BadCapture> {
        failpoint::pass(FailPoint::Cut);
        let files: Vec<FileId> = self.builder.files().collect();
        for file in files {
            self.builder.add_path(file, &hints.path_of(volume, file));
        }
        let (first, last) = (updates[0].stamp, updates[updates.len() - 1].stamp);
        let place = sender.link(volume).expect("the sender has the same volumes");
        let set = self.builder.finish(self.place(volume, place, end), self.origin.level)?;
        let issued = IssuedSet {
            number: set.header.number,
            hash: set.hash,
            first,
            last,
            end,
            bytes: set.bytes.len() as u64,
            complete,
            handle: set.bytes,
        };
        capture.note_set(updates, issued.number, issued.hash, end);
        sender.handle_issued(volume, issued).expect("the place in the chain came from the sender");
        failpoint::pass(FailPoint::Issued);
        Ok(set.header.number)
    }

    fn place(&self, volume: VolumeIndex, link: ChainLink, end: Timestamp) -> SetPlace {
        let SetVolume { name, instance, root } = self.volumes[volume.as_usize()].clone();
        SetPlace {
            session: self.origin.session,
            volume: name,
            instance,
            root,
            epoch: self.origin.epoch,
            incarnation: self.origin.incarnation,
            number: link.number,
            predecessor: link.predecessor,
            first_seq: link.first_seq,
            start: link.start,
            end,
        }
    }
}
