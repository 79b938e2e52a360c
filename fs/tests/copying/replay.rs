//! What a replica with an empty tree shows after some records, and what stands in a directory.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use twinfs_core::delta::layers::{self, Content};
use twinfs_core::delta::{DataRef, Delta, SetLocation};
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::model::{ContentHasher, Entry, Listing, PAGE_BYTES};
use twinfs_core::update::{Attr, Kind, Op, Update, is_xattr_name};

pub type Record = (VolumeIndex, Update, Vec<u8>);

/// Folds all records, and lists what is there then.
pub fn replayed(root: FileId, records: &[Record]) -> Listing {
    let mut delta = Delta::default();
    let mut resyncing = false;
    for (number, (_, update, _)) in records.iter().enumerate() {
        let set = SetLocation { segment: number as u64, offset: 0 };
        let data = matches!(update.op, Op::Write { .. }).then_some(DataRef { set, offset: 0 });
        delta.fold(update, data);
        // All of a resync becomes one group.
        match update.op {
            Op::Resync => resyncing = true,
            Op::Complete => resyncing = false,
            _ => {}
        }
        for (file, attr) in update.attrs.iter().filter(|(_, attr)| attr.kind() == Some(Kind::Symlink)) {
            // A replica can make any other object before it knows what is in it.
            let known = resyncing || attr.nlink == 0 || !layers::tree_counts(&[&delta], *file);
            assert!(known, "record {number} names a symlink that was not copied: {update:?}");
        }
    }
    let layers = [&delta];
    let mut listing = Listing::default();
    let mut open = vec![(Vec::new(), root)];
    while let Some((path, file)) = open.pop() {
        let shown = path.escape_ascii().to_string();
        assert!(!layers::tree_counts(&layers, file), "/{shown} ({file}) was never copied");
        let attr = *layers::attr(&layers, file).expect("a copied object has attributes");
        for (name, child) in layers::names(&layers, file).said {
            let Some(child) = child else { continue };
            let mut path = path.clone();
            path.extend(if path.is_empty() { b"".as_slice() } else { b"/" });
            path.extend(name);
            open.push((path, child));
        }
        let mut content = ContentHasher::default();
        if attr.kind() == Some(Kind::File) {
            hash(&bytes_of(&layers, file, attr.size, records), &mut content);
        }
        let said = layers::xattrs(&layers, file).said.into_iter();
        let xattrs = said.filter_map(|(name, value)| Some((name.into(), value?.into()))).collect();
        let target = layers::target(&layers, file).unwrap_or_default().to_vec();
        listing.add(Entry { path, identity: file.ino, attr, target, xattrs, content });
    }
    listing
}

fn bytes_of(layers: &[&Delta], file: FileId, size: u64, records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in layers::resolve(layers, file, 0..size) {
        let len = piece.len as usize;
        match piece.content {
            Content::Journal(data) => {
                let from = &records[data.set.segment as usize].2[data.offset as usize..];
                bytes.extend(&from[..len]);
            }
            Content::Zero => bytes.resize(bytes.len() + len, 0),
            Content::Tree(_) => panic!("there is no tree below {file}"),
        }
    }
    bytes
}

fn hash(bytes: &[u8], content: &mut ContentHasher) {
    for (number, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        content.page(number as u64, page);
    }
}

/// Lists a directory.
pub fn walked(root: &Path) -> Listing {
    let mut listing = Listing::default();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let attr = Attr {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            nlink: meta.nlink() as u32,
            rdev: meta.rdev(),
            size: meta.size(),
            mtime_s: meta.mtime(),
            mtime_ns: meta.mtime_nsec() as u32,
        };
        let mut content = ContentHasher::default();
        let mut target = Vec::new();
        match attr.kind().unwrap() {
            Kind::File => {
                let mut bytes = vec![0; attr.size as usize];
                std::fs::File::open(&path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
                hash(&bytes, &mut content);
            }
            Kind::Dir => {
                open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            Kind::Symlink => target = std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            _ => {}
        }
        let xattrs = xattrs(&path);
        let path = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        listing.add(Entry { path, identity: meta.ino(), attr, target, xattrs, content });
    }
    listing
}

fn xattrs(path: &Path) -> BTreeMap<Box<[u8]>, Box<[u8]>> {
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    let names = names[..len].split(|byte| *byte == 0).filter(|name| is_xattr_name(name));
    names
        .map(|name| {
            let mut value = vec![0; 65_536];
            let len = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
            (name.into(), value[..len].into())
        })
        .collect()
}
