//! What stands for the copier: it reads the model, and mixes what it publishes with what programs do, by the rules of
//! `fs/src/copier`. An object is read in one step.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use twinfs_core::change_map::{Change, ChangeMap, TO_THE_END};
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::model::{Model, Object, PAGE_BYTES};
use twinfs_core::update::{Attr, AttrList, Kind, Op};

use super::Sabotage;
use super::desk::{Desk, Volume};
use super::history::History;

const PAGE: u64 = PAGE_BYTES as u64;

/// What is being copied of a volume.
#[derive(Debug, Default)]
pub(crate) enum Copying {
    /// Nothing: the replica has it, or nothing is kept.
    #[default]
    Nothing,
    /// The initial copy: what waits, and what the replica was told of.
    Copy { waiting: VecDeque<FileId>, told: BTreeSet<FileId> },
    /// What is left of a resync's map, and where it is.
    Resync { waiting: ChangeMap, last: Option<FileId> },
}

impl Copying {
    /// Begins the copy of a tree. Symlinks go first: they must be told before their names.
    pub(crate) fn copy(model: &Model) -> Self {
        let is_link = |file: &FileId| {
            model.object(*file).and_then(|object| object.attr().kind()) == Some(Kind::Symlink)
        };
        let (links, others): (Vec<_>, Vec<_>) = named(model).partition(is_link);
        Self::Copy { waiting: links.into_iter().chain(others).collect(), told: BTreeSet::new() }
    }

    pub(crate) fn resync(mut map: ChangeMap, model: &Model) -> Self {
        if map.is_everything() {
            map = ChangeMap::default();
            named(model).for_each(|file| map.note_whole(file));
        }
        map.settle();
        Self::Resync { waiting: map, last: None }
    }

    /// Whether a program's change has to be published; if not, it is noted, or will be read.
    pub(crate) fn admits(&mut self, op: &Op, attrs: &AttrList) -> bool {
        let of_one = match *op {
            Op::Write { file, .. }
            | Op::Truncate { file, .. }
            | Op::Zero { file, .. }
            | Op::Collapse { file, .. }
            | Op::Insert { file, .. }
            | Op::SetAttr { file }
            | Op::SetXattr { file, .. }
            | Op::RemoveXattr { file, .. } => Some(file),
            _ => None,
        };
        match (self, of_one) {
            (Self::Copy { told, .. }, Some(file)) => told.contains(&file),
            (Self::Copy { told, .. }, None) => {
                if let Op::Create { file, .. } = op {
                    told.insert(*file);
                }
                true
            }
            (Self::Resync { waiting, .. }, Some(file)) => match waiting.object(file) {
                Some(change) if !change.is_gone() => {
                    waiting.note(op, attrs);
                    false
                }
                _ => true,
            },
            (Self::Resync { .. } | Self::Nothing, _) => true,
        }
    }
}

/// Every object that has a name, and the root.
fn named(model: &Model) -> impl Iterator<Item = FileId> {
    let mut model = model.clone();
    model.drop_unnamed();
    let files: Vec<FileId> = model.objects().map(|(file, _)| file).collect();
    files.into_iter()
}

/// An object, if it has a name.
fn object(model: &Model, file: FileId) -> Option<&Object> {
    model.object(file).filter(|object| object.attr().nlink > 0)
}

/// Copies the next object, or ends the copy. Returns whether anything was done.
pub(crate) fn step(desk: &Desk, index: VolumeIndex, volume: &mut Volume) -> bool {
    let Volume { history, tree, copying, .. } = volume;
    if matches!(copying, Copying::Nothing) || desk.is_dead() {
        return false;
    }
    // Programs get the most of the room.
    if !desk.capture.wait_copy_room(Duration::ZERO) {
        return false;
    }
    let reader = Reader { desk, index, model: tree.live() };
    match copying {
        Copying::Nothing => return false,
        Copying::Copy { waiting, told } => {
            if let Some(file) = waiting.pop_front() {
                told.insert(file);
                if let Some(object) = object(reader.model, file) {
                    let whole = reader.whole(history, file, object);
                    if !whole {
                        waiting.push_front(file);
                    }
                }
                return true;
            }
        }
        Copying::Resync { waiting, last } => {
            if let Some(file) = waiting.next_after(*last) {
                let change = waiting.take(file).expect("the map has just named it");
                *last = Some(file);
                let skipped = desk.sabotage == Sabotage::SkipResync && file.ino % 4 == 1;
                if !skipped && !reader.changed(history, file, &change) {
                    waiting.put_back(file, change);
                }
                return true;
            }
        }
    }
    if desk.tell(index, history, Op::Complete, AttrList::new(), &[]) {
        *copying = Copying::Nothing;
    }
    true
}

struct Reader<'a> {
    desk: &'a Desk,
    index: VolumeIndex,
    model: &'a Model,
}

impl Reader<'_> {
    fn tell(&self, history: &mut History, op: Op, attrs: AttrList, data: &[u8]) -> bool {
        self.desk.tell(self.index, history, op, attrs, data)
    }

    fn attrs(&self, files: &[FileId]) -> AttrList {
        let found = files.iter().filter_map(|file| Some((*file, *self.model.object(*file)?.attr())));
        found.collect()
    }

    /// Publishes all of an object.
    fn whole(&self, history: &mut History, file: FileId, object: &Object) -> bool {
        let attrs = self.attrs(&[file]);
        self.tell(history, Op::Object { file, target: object.target().into() }, attrs, &[])
            && object.xattrs().iter().all(|(name, value)| {
                let op = Op::SetXattr { file, name: name.clone(), value: value.clone() };
                self.tell(history, op, attrs, &[])
            })
            && self.data(history, file, object, 0, object.attr().size, false)
            && self.tell(history, Op::SetAttr { file }, attrs, &[])
            && object.names().iter().all(|(name, child)| self.bind(history, file, name, *child))
    }

    /// Publishes the parts of an object that changed.
    fn changed(&self, history: &mut History, file: FileId, change: &Change) -> bool {
        let Some(object) = object(self.model, file).filter(|_| !change.is_gone()) else {
            // Of what kind it was does not matter: all that counts is that it has no name.
            let gone =
                Attr { mode: 0o100_000, uid: 0, gid: 0, nlink: 0, rdev: 0, size: 0, mtime_s: 0, mtime_ns: 0 };
            return self.tell(history, Op::SetAttr { file }, AttrList::from_iter([(file, gone)]), &[]);
        };
        if change.is_whole() {
            return self.whole(history, file, object);
        }
        let (attrs, size) = (self.attrs(&[file]), object.attr().size);
        change.ranges().all(|(start, end)| {
            let cut = end != TO_THE_END || self.tell(history, Op::Truncate { file, size }, attrs, &[]);
            cut && self.data(history, file, object, start, end.min(size), true)
        }) && change.xattrs().all(|name| {
            let op = match object.xattrs().get(name) {
                Some(value) => Op::SetXattr { file, name: name.into(), value: value.clone() },
                None => Op::RemoveXattr { file, name: name.into() },
            };
            self.tell(history, op, attrs, &[])
        }) && change.names().all(|name| match object.names().get(name) {
            Some(child) => self.bind(history, file, name, *child),
            None => self.tell(history, Op::Unbind { dir: file, name: name.into() }, attrs, &[]),
        }) && self.tell(history, Op::SetAttr { file }, attrs, &[])
    }

    fn bind(&self, history: &mut History, dir: FileId, name: &[u8], file: FileId) -> bool {
        self.tell(history, Op::Bind { dir, name: name.into(), file }, self.attrs(&[file, dir]), &[])
    }

    /// Publishes a range of a file's content, and its holes too where the replica may have something.
    fn data(
        &self,
        history: &mut History,
        file: FileId,
        object: &Object,
        start: u64,
        end: u64,
        holes: bool,
    ) -> bool {
        let attrs = self.attrs(&[file]);
        let mut at = start;
        let hole = |history: &mut History, from: u64, to: u64| {
            let op = Op::Zero { file, offset: from, len: to.saturating_sub(from), hole: true };
            !holes || from >= to || self.tell(history, op, attrs, &[])
        };
        for number in object.pages().range(start / PAGE..).map(|(number, _)| *number) {
            let (from, to) = ((number * PAGE).max(start), ((number + 1) * PAGE).min(end));
            if from >= to {
                break;
            }
            debug_assert!(to - from <= limits::WRITE_BYTES_MAX as u64);
            let data = object.read(from, (to - from) as usize);
            let op = Op::Write { file, offset: from, len: data.len() as u32 };
            if !hole(history, at, from) || !self.tell(history, op, attrs, &data) {
                return false;
            }
            at = to;
        }
        hole(history, at, end)
    }
}

/// Publishes content that an operation may have changed: see `recovery`.
pub(super) fn range(
    desk: &Desk,
    index: VolumeIndex,
    history: &mut History,
    model: &Model,
    (file, start, end): (FileId, u64, u64),
) -> bool {
    let reader = Reader { desk, index, model };
    let Some(object) = object(model, file) else { return true };
    reader.data(history, file, object, start, end.min(object.attr().size), true)
}
