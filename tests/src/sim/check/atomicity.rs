//! Atomicity: what is shown equals, object by object and byte by byte, the tree that the model has at the group's last
//! update.

use std::collections::{BTreeMap, BTreeSet};

use twinfs_core::id::{FileId, GroupNumber, VolumeIndex, VolumeName};
use twinfs_core::model::{Model, Object, PAGE_BYTES};
use twinfs_core::update::Kind;
use twinfs_replicator::replica::image::Image;
use twinfs_replicator::replica::image::view::{View, ViewError};

use crate::sim::primary::desk::Volume;
use crate::sim::primary::history::History;

const PAGE: u64 = PAGE_BYTES as u64;
/// Files up to this size are read as a whole, of others what is written and its surroundings.
const WHOLE_BYTES: u64 = 128 << 10;

/// Models of what was shown last, to go on from.
#[derive(Default)]
pub(crate) struct Atomicity {
    models: BTreeMap<VolumeName, (usize, Model)>,
    checked: Option<GroupNumber>,
}

impl Atomicity {
    /// After a restart everything is looked at again.
    pub(crate) fn forget(&mut self) {
        self.checked = None;
    }

    /// Compares what is shown now with the model, if it was not compared before.
    pub(crate) fn check(&mut self, image: &Image, volumes: &[Volume]) -> Result<(), String> {
        let view = image.view();
        if self.checked == Some(view.group()) {
            return Ok(());
        }
        for (index, name, root) in view.members() {
            let volume = volumes.iter().map(|volume| &volume.history).find(|history| history.name == *name);
            let volume = volume.ok_or("atomicity: unknown volume")?;
            let time = view.consistency_time();
            let model = self.model(volume, volume.steps_at(time));
            compare(&view, index, root, model)
                .map_err(|why| format!("atomicity: {name} in group {} at {}: {why}", view.group(), time.0))?;
        }
        self.checked = Some(view.group());
        Ok(())
    }

    fn model(&mut self, volume: &History, steps: usize) -> &Model {
        let fresh = || (steps, volume.model_at(steps));
        let (at, model) = self.models.entry(volume.name.clone()).or_insert_with(fresh);
        if *at > steps {
            *model = volume.model_at(steps);
        } else {
            volume.advance(model, *at, steps);
        }
        *at = steps;
        model
    }
}

/// Compares a volume of a view with a model; says what differs first.
pub(crate) fn compare(view: &View, volume: VolumeIndex, root: FileId, model: &Model) -> Result<(), String> {
    let mut open: Vec<(Vec<u8>, FileId)> = vec![(Vec::new(), root)];
    let mut seen = BTreeSet::new();
    while let Some((path, file)) = open.pop() {
        let object = model.object(file).expect("only what the model has is walked");
        if !seen.insert(file) {
            continue;
        }
        compare_object(view, volume, file, object)
            .map_err(|why| format!("/{} ({file}): {why}", path.escape_ascii()))?;
        for (name, child) in object.names() {
            open.push(([&path, &b"/"[..], name].concat(), *child));
        }
    }
    Ok(())
}

fn compare_object(view: &View, volume: VolumeIndex, file: FileId, object: &Object) -> Result<(), String> {
    let answer = |error: ViewError| error.to_string();
    let (found, wanted) = (view.node(volume, file).map_err(answer)?.attr, *object.attr());
    let mut same = found;
    if object.is_dir() {
        // Each file system has its own idea of them.
        (same.size, same.nlink) = (wanted.size, wanted.nlink);
    }
    if same != wanted {
        return Err(format!("attributes are {found:?}, not {wanted:?}"));
    }
    let mut names = view.xattrs(volume, file).map_err(answer)?;
    names.sort();
    if !names.iter().eq(object.xattrs().keys()) {
        return Err(format!("{} extended attributes, not {}", names.len(), object.xattrs().len()));
    }
    for (name, wanted) in object.xattrs() {
        if view.xattr(volume, file, name).map_err(answer)?.as_deref() != Some(wanted) {
            return Err(format!("extended attribute {} differs", name.escape_ascii()));
        }
    }
    match wanted.kind() {
        Some(Kind::Dir) => compare_names(view, volume, file, object),
        Some(Kind::Symlink) if view.read_link(volume, file).map_err(answer)? != object.target() => {
            Err("its target differs".to_owned())
        }
        Some(Kind::File) => compare_content(view, volume, file, object),
        _ => Ok(()),
    }
}

fn compare_names(view: &View, volume: VolumeIndex, dir: FileId, object: &Object) -> Result<(), String> {
    let mut entries = view.list(volume, dir).map_err(|error| error.to_string())?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let wanted: Vec<(&[u8], FileId)> = object.names().iter().map(|(name, file)| (&**name, *file)).collect();
    let found: Vec<(&[u8], FileId)> = entries.iter().map(|entry| (&*entry.name, entry.file)).collect();
    if found != wanted {
        return Err(format!("its names are {found:?}, not {wanted:?}"));
    }
    for (name, file) in wanted {
        if view.lookup(volume, dir, name).map_err(|error| error.to_string())? != Some(file) {
            return Err(format!("{} is not found", name.escape_ascii()));
        }
    }
    Ok(())
}

fn compare_content(view: &View, volume: VolumeIndex, file: FileId, object: &Object) -> Result<(), String> {
    let size = object.attr().size;
    let read = |offset: u64, len: u64| {
        let len = len.min(size.saturating_sub(offset)) as usize;
        let found = view.read(volume, file, offset, len).map_err(|error| error.to_string())?;
        if found.len() != len {
            return Err(format!("{} bytes at {offset}, not {len}", found.len()));
        }
        let wanted = object.read(offset, len);
        match found.iter().zip(&wanted).position(|(a, b)| a != b) {
            Some(at) => Err(format!("its content differs at {}", offset + at as u64)),
            None => Ok(()),
        }
    };
    if size <= WHOLE_BYTES {
        return read(0, size);
    }
    let mut pages: BTreeSet<u64> = (0..8).chain([size / PAGE]).collect();
    for page in object.pages().keys() {
        pages.extend(page.saturating_sub(1)..=page + 1);
    }
    pages.into_iter().filter(|page| page * PAGE < size).try_for_each(|page| read(page * PAGE, PAGE))
}
