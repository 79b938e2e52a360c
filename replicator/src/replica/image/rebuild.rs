//! Repair of the image's records from what stands in the trees.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use twinfs_core::id::FileId;
use twinfs_core::update::Kind;

use super::ImageError;
use super::checkpoint::PREIMAGE;
use super::files::{Child, Local, Place, TreeStore};
use super::linux::{LinuxTree, OpenObjects};
use super::table::Changes;

/// Files that are put into the table at a time.
const BATCH: usize = 10_000;

/// Writes anew which object is which file, from the extended attributes of the objects. For when the file table is damaged,
/// or the image was copied to another file system. The image must not be open. Returns the number of objects found.
///
/// What the tree is as of cannot be told from its objects, so that record must be readable.
///
/// # Errors
/// See [`ImageError`].
pub fn rebuild(site_dir: &Path) -> Result<u64, ImageError> {
    let (dir, table) = super::open_table(site_dir)?;
    let (tree, _) = table.state()?;
    table.clear_files()?;
    let mut found = 0;
    for name in tree.volumes.keys() {
        let path = dir.join(name.as_str());
        let store = LinuxTree::open(&path, &OpenObjects::default().into())
            .map_err(|source| ImageError::Directory { path, source })?;
        let mut batch = Vec::new();
        let mut dirs = vec![store.place(Place::Tree), store.place(Place::Staging)];
        let root = dirs[0].clone();
        batch.extend(store.id(&root.handle)?.map(|file| (file, root)));
        while let Some(dir) = dirs.pop() {
            for (name, child) in list(&store, &dir)? {
                if name.starts_with(PREIMAGE.as_bytes()) {
                    continue;
                }
                let local = store.child_local(&dir.handle, &name)?;
                batch.extend(store.id(&local.handle)?.map(|file| (file, local.clone())));
                if child.kind == Kind::Dir {
                    dirs.push(local);
                }
            }
            if batch.len() >= BATCH || dirs.is_empty() {
                found += batch.len() as u64;
                table.commit(&Changes { put: &batch, ..Changes::default() })?;
                batch.clear();
            }
        }
    }
    Ok(found)
}

/// Removes what only a running replica needs: the graveyard, and copies of earlier content that no checkpoint needs.
pub(super) fn tidy(store: &dyn TreeStore, preimages: &BTreeMap<FileId, Local>) -> io::Result<()> {
    let (graveyard, staging) = (store.place(Place::Graveyard), store.place(Place::Staging));
    for (name, child) in list(store, &graveyard)? {
        store.unlink(&graveyard.handle, &name, child.kind)?;
    }
    for (name, child) in list(store, &staging)? {
        let known = preimages.values().any(|local| local.ino == child.ino);
        if name.starts_with(PREIMAGE.as_bytes()) && !known {
            store.unlink(&staging.handle, &name, child.kind)?;
        }
    }
    Ok(())
}

fn list(store: &dyn TreeStore, dir: &Local) -> io::Result<Vec<(Box<[u8]>, Child)>> {
    let mut entries = Vec::new();
    store.list(&dir.handle, &mut |name, child| entries.push((name.into(), child)))?;
    Ok(entries)
}
