//! The backing directory of a volume: a model in memory, as calls see it, and what of it a power loss would leave.
//!
//! Every change since the last sync stands in a list. A sync of a file makes the changes of that file durable, and all that
//! they build on: those of whatever they share an object with. What else survives a power loss is drawn, both ways: changes
//! are lost, and contents are written back that no attribute tells of. Of each object the changes that survive are the
//! first ones, for file systems journal them in order.

use std::collections::BTreeSet;

use twinfs_core::id::FileId;
use twinfs_core::model::generate::Change;
use twinfs_core::model::{Model, Random};
use twinfs_core::update::{AttrList, Op, Update};

struct Unsynced {
    change: Change,
    /// A sync made it durable.
    sure: bool,
}

impl Unsynced {
    fn files(&self) -> impl Iterator<Item = FileId> {
        self.change.update.files()
    }
}

pub(crate) struct Tree {
    live: Model,
    durable: Model,
    unsynced: Vec<Unsynced>,
}

impl Tree {
    pub(crate) fn new(model: Model) -> Self {
        Self { live: model.clone(), durable: model, unsynced: Vec::new() }
    }

    pub(crate) fn live(&self) -> &Model {
        &self.live
    }

    /// A call changes something.
    pub(crate) fn apply(&mut self, change: &Change) {
        self.live.apply(&change.update, &change.data);
        self.unsynced.push(Unsynced { change: change.clone(), sure: false });
    }

    /// `fsync(2)` of an object.
    pub(crate) fn sync(&mut self, file: FileId) {
        let mut needed = BTreeSet::from([file]);
        for unsynced in self.unsynced.iter_mut().rev() {
            if unsynced.files().any(|file| needed.contains(&file)) {
                needed.extend(unsynced.files());
                unsynced.sure = true;
            }
        }
    }

    /// `syncfs(2)`.
    pub(crate) fn sync_all(&mut self) {
        for Unsynced { change, .. } in self.unsynced.drain(..) {
            self.durable.apply(&change.update, &change.data);
        }
    }

    /// The programs and the mount are gone; the machine runs on. Objects that were only open go.
    pub(crate) fn kill(&mut self) {
        self.live.drop_unnamed();
    }

    /// Power fails. Of what no sync made durable, only changes to files that are `exposed` may survive; the last one not, if
    /// it is `unpublished`, for then the activity log does not know of it. Returns how many changes were lost.
    pub(crate) fn lose_power(
        &mut self,
        random: &mut Random,
        unpublished: bool,
        exposed: impl Fn(FileId) -> bool,
    ) -> usize {
        let keep_in = [0, 1, 2, 5][random.below(4) as usize];
        let mut model = std::mem::replace(&mut self.durable, Model::new(self.live.root()));
        // Of these a change was lost, so nothing later of them is there; of some more than bytes.
        let (mut lost, mut reshaped) = (BTreeSet::new(), BTreeSet::new());
        let mut count = 0;
        let last = self.unsynced.len();
        for (at, unsynced) in (1..).zip(std::mem::take(&mut self.unsynced)) {
            let exposed = unsynced.files().all(&exposed) && !(unpublished && at == last);
            let wanted = unsynced.sure || exposed && keep_in > 0 && (keep_in == 1 || !random.one_in(keep_in));
            let Change { update, data } = &unsynced.change;
            let follows = !unsynced.files().any(|file| lost.contains(&file));
            if wanted && follows && !makes_circle(&model, &update.op) {
                if !unsynced.sure && matches!(update.op, Op::Write { .. }) && random.one_in(4) {
                    write_attributes_only(&mut model, update);
                } else {
                    model.apply(update, data);
                }
                continue;
            }
            count += 1;
            if let Op::Write { file, offset, .. } = update.op {
                if exposed && !reshaped.contains(&file) && random.one_in(3) {
                    write_bytes_only(&mut model, file, offset, data);
                }
            } else {
                reshaped.extend(unsynced.files());
            }
            lost.extend(unsynced.files());
        }
        model.drop_unnamed();
        (self.live, self.durable) = (model.clone(), model);
        count
    }
}

/// Whether a directory would be put below itself: what forbade that was lost.
fn makes_circle(model: &Model, op: &Op) -> bool {
    let below = |file: FileId, dir: FileId| {
        let (mut open, mut seen) = (vec![file], BTreeSet::new());
        while let Some(at) = open.pop() {
            if at == dir {
                return true;
            }
            if seen.insert(at)
                && let Some(object) = model.object(at)
            {
                open.extend(object.names().values().filter(|file| model.object(**file).is_some()));
            }
        }
        false
    };
    match *op {
        Op::Rename { to_dir, file, .. } => below(file, to_dir),
        Op::Exchange { a_dir, a_file, b_dir, b_file, .. } => below(a_file, b_dir) || below(b_file, a_dir),
        _ => false,
    }
}

/// The size was journaled, the bytes were not written: there are zeros, or what was there before.
fn write_attributes_only(model: &mut Model, update: &Update) {
    let file = update.op.files()[0].expect("a write names its file");
    model.apply(&Update { stamp: update.stamp, op: Op::SetAttr { file }, attrs: update.attrs }, &[]);
}

/// The bytes were written in place, and nothing else tells of it.
fn write_bytes_only(model: &mut Model, file: FileId, offset: u64, data: &[u8]) {
    let Some(size) = model.object(file).map(|object| object.attr().size) else { return };
    let len = data.len().min(size.saturating_sub(offset) as usize);
    if len > 0 {
        let op = Op::Write { file, offset, len: len as u32 };
        model.apply(&Update { stamp: Default::default(), op, attrs: AttrList::new() }, &data[..len]);
    }
}
