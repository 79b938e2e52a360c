//! What stands for `fs/src/recovery.rs`: what a killed process left half done is found out in the model, and published.

use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::model::Model;
use twinfs_core::update::{Attr, AttrList, Intent, Note, Op, OpKind};
use twinfs_replicator::primary::activity_log::Found;
use twinfs_replicator::primary::sidefile::LeftIntent;
use twinfs_replicator::primary::start;

use super::Sabotage;
use super::copier;
use super::desk::{Desk, Volume, Volumes, lock};
use super::history::History;

/// The process died in the middle.
#[derive(Debug)]
pub(crate) struct Died;

/// What a run begins from.
pub(crate) struct Source<'a> {
    pub(crate) desk: &'a Desk,
    pub(crate) volumes: &'a Volumes,
    pub(crate) found: &'a Found,
}

impl start::Source for Source<'_> {
    type Error = Died;

    fn recover(&self, left: &LeftIntent) -> Result<(), Died> {
        if self.desk.sabotage == Sabotage::DropIntents {
            return Ok(());
        }
        let mut volumes = lock(self.volumes);
        let volume = &mut volumes[left.volume.as_usize()];
        let Volume { tree, history, .. } = volume;
        let recovery = Recovery { desk: self.desk, index: left.volume, model: tree.live() };
        // What finds no room is noted instead: the session is suspended then.
        recovery.recover(history, left);
        if self.desk.is_dead() { Err(Died) } else { Ok(()) }
    }

    fn found(&self, left: &LeftIntent) -> Result<Vec<FileId>, Died> {
        let volumes = lock(self.volumes);
        let model = volumes[left.volume.as_usize()].tree.live();
        let names = match left.intent() {
            Intent::Names { first, second } => [Some(first), second],
            _ => [None, None],
        };
        let stands_for = |(dir, name): (FileId, &[u8])| model.object(dir)?.names().get(name).copied();
        Ok(names.into_iter().flatten().filter_map(stands_for).collect())
    }

    fn logged_changes(&self, volume: VolumeIndex) -> ChangeMap {
        let mut map = ChangeMap::default();
        if self.found.everything {
            map.note_everything();
        } else {
            let mine = self.found.files.iter().filter(|(index, _)| *index == volume);
            mine.for_each(|(_, file)| map.note_whole(*file));
        }
        map
    }

    fn kept_changes(&self, _: VolumeIndex) -> Result<Option<ChangeMap>, Died> {
        Ok(None)
    }
}

struct Recovery<'a> {
    desk: &'a Desk,
    index: VolumeIndex,
    model: &'a Model,
}

impl Recovery<'_> {
    /// Returns whether all of it was kept.
    fn recover(&self, history: &mut History, left: &LeftIntent) -> bool {
        match left.intent() {
            Intent::Range { file, offset, len } => {
                let Some(size) = self.attr(file).map(|attr| attr.size) else { return true };
                // What follows may have moved.
                let to_the_end = len == u64::MAX;
                (!to_the_end || self.about(history, Op::Truncate { file, size }))
                    && copier::range(
                        self.desk,
                        self.index,
                        history,
                        self.model,
                        (file, offset, offset.saturating_add(len)),
                    )
                    && self.about(history, Op::SetAttr { file })
            }
            Intent::Size { file } => match self.attr(file) {
                Some(attr) => self.about(history, Op::Truncate { file, size: attr.size }),
                None => true,
            },
            Intent::Attrs { file } => self.attr(file).is_none() || self.about(history, Op::SetAttr { file }),
            Intent::Xattr { file, name } => {
                let Some(object) = self.model.object(file) else { return true };
                let op = match object.xattrs().get(name) {
                    Some(value) => Op::SetXattr { file, name: name.into(), value: value.clone() },
                    None => Op::RemoveXattr { file, name: name.into() },
                };
                self.about(history, op)
            }
            Intent::Acls { .. } => true,
            Intent::Names { first, second } => match left.note {
                Some(note) => self.names(history, first, second, note),
                None => true, // It had not come to its call.
            },
        }
    }

    fn attr(&self, file: FileId) -> Option<Attr> {
        self.model.object(file).map(|object| *object.attr())
    }

    fn about(&self, history: &mut History, op: Op) -> bool {
        let attrs = op.files().into_iter().flatten().filter_map(|file| Some((file, self.attr(file)?)));
        let attrs = attrs.collect();
        self.desk.tell(self.index, history, op, attrs, &[])
    }

    fn names(
        &self,
        history: &mut History,
        (dir, name): (FileId, &[u8]),
        second: Option<(FileId, &[u8])>,
        note: Note,
    ) -> bool {
        let child = |dir: FileId, name: &[u8]| {
            self.model.object(dir).and_then(|object| object.names().get(name)).copied()
        };
        let there = child(dir, name);
        let op = match (note.op, note.first, second) {
            (OpKind::Create, None, None) => there.map(|file| {
                let target = self.model.object(file).map_or(&[][..], |object| object.target()).into();
                Op::Create { dir, name: name.into(), file, target }
            }),
            (OpKind::Link, Some((file, _)), None) => {
                (there == Some(file)).then(|| Op::Link { dir, name: name.into(), file })
            }
            (OpKind::Unlink, Some((file, _)), None) => {
                (there != Some(file)).then(|| Op::Unlink { dir, name: name.into(), file })
            }
            (OpKind::Rename | OpKind::Exchange, Some((file, _)), Some((to_dir, to))) => {
                let moved = child(to_dir, to) == Some(file) && there != Some(file);
                let (from, to) = (Box::from(name), Box::from(to));
                moved.then(|| match note.second {
                    Some((b_file, _)) if note.op == OpKind::Exchange => {
                        Op::Exchange { a_dir: dir, a: from, a_file: file, b_dir: to_dir, b: to, b_file }
                    }
                    replaced => {
                        let replaced = replaced.map(|(file, _)| file);
                        Op::Rename { from_dir: dir, from, to_dir, to, file, replaced }
                    }
                })
            }
            _ => None,
        };
        let Some(op) = op else { return true };
        let mut attrs = AttrList::new();
        for file in op.files().into_iter().flatten() {
            let noted = [note.first, note.second].into_iter().flatten().find(|(noted, _)| *noted == file);
            let gone = noted.map(|(_, kind)| {
                let mode = kind.mode_bits();
                Attr { mode, uid: 0, gid: 0, nlink: 0, rdev: 0, size: 0, mtime_s: 0, mtime_ns: 0 }
            });
            if let Some(attr) = self.attr(file).or(gone) {
                attrs.push(file, attr);
            }
        }
        self.desk.tell(self.index, history, op, attrs, &[])
    }
}
