//! A naive tree that updates are replayed on, and its comparison with a real one.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use twinfs_core::id::FileId;
use twinfs_core::update::{Attr, Kind, Op, Update};

/// An object of the tree.
#[derive(Debug, Clone, Default)]
pub struct Object {
    pub attr: Option<Attr>,
    pub data: Vec<u8>,
    pub target: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub names: BTreeMap<Vec<u8>, FileId>,
}

/// The tree.
#[derive(Debug, Clone)]
pub struct Tree {
    pub root: FileId,
    pub objects: HashMap<FileId, Object>,
    pub complete: bool,
    pub last_seq: u64,
}

impl Tree {
    pub fn new(root: FileId) -> Self {
        Self { root, objects: HashMap::from([(root, Object::default())]), complete: false, last_seq: 0 }
    }

    fn object(&mut self, file: FileId) -> &mut Object {
        self.objects.get_mut(&file).unwrap_or_else(|| panic!("an update names {file}, which was never made"))
    }

    fn bound(&self, dir: FileId, name: &[u8]) -> Option<FileId> {
        self.objects.get(&dir).and_then(|dir| dir.names.get(name)).copied()
    }

    /// Applies an update; it must fit what is there, exactly.
    pub fn apply(&mut self, update: &Update, data: &[u8]) {
        assert!(update.stamp.seq.0 > self.last_seq, "updates come in the order of their stamps");
        self.last_seq = update.stamp.seq.0;
        let size_after = |file: FileId| update.attrs.get(file).map(|attr| attr.size as usize);
        match &update.op {
            Op::Write { file, offset, .. } => {
                let (from, to) = (*offset as usize, *offset as usize + data.len());
                let content = &mut self.object(*file).data;
                content.resize(content.len().max(to), 0);
                content[from..to].copy_from_slice(data);
            }
            Op::Truncate { file, size } => self.object(*file).data.resize(*size as usize, 0),
            Op::Zero { file, offset, len, .. } => {
                let size = size_after(*file).expect("the size is known");
                let content = &mut self.object(*file).data;
                assert!(size >= content.len(), "zeroing does not shrink");
                content.resize(size, 0);
                let (from, to) = (*offset as usize, (*offset + *len) as usize);
                assert!(to <= size);
                content[from..to].fill(0);
            }
            Op::Collapse { file, offset, len } => {
                drop(self.object(*file).data.drain(*offset as usize..(*offset + *len) as usize));
            }
            Op::Insert { file, offset, len } => {
                let at = *offset as usize;
                self.object(*file).data.splice(at..at, std::iter::repeat_n(0, *len as usize));
            }
            Op::SetAttr { file } => assert!(self.objects.contains_key(file)),
            Op::SetXattr { file, name, value } => {
                self.object(*file).xattrs.insert(name.to_vec(), value.to_vec());
            }
            Op::RemoveXattr { file, name } => {
                self.object(*file).xattrs.remove(&**name);
            }
            Op::Object { file, target } => {
                self.objects.insert(*file, Object { target: target.to_vec(), ..Object::default() });
            }
            Op::Complete => self.complete = true,
            op => self.apply_names(op),
        }
        for (file, attr) in update.attrs.iter() {
            let object = self.object(*file);
            object.attr = Some(*attr);
        }
        if let (Some(file), true) = (update.op.files()[0], is_content(&update.op)) {
            let object = &self.objects[&file];
            let size = object.attr.expect("attributes come with content").size;
            assert_eq!(object.data.len() as u64, size, "the size after {update:?}");
        }
    }

    fn apply_names(&mut self, op: &Op) {
        match op {
            Op::Create { dir, name, file, target } => {
                assert_eq!(self.bound(*dir, name), None, "{op:?}");
                self.objects.insert(*file, Object { target: target.to_vec(), ..Object::default() });
                self.object(*dir).names.insert(name.to_vec(), *file);
            }
            Op::Link { dir, name, file } => {
                assert_eq!(self.bound(*dir, name), None, "{op:?}");
                assert!(self.objects.contains_key(file));
                self.object(*dir).names.insert(name.to_vec(), *file);
            }
            Op::Bind { dir, name, file } => {
                assert!(self.objects.contains_key(file), "{op:?}");
                self.object(*dir).names.insert(name.to_vec(), *file);
            }
            Op::Unlink { dir, name, file } => {
                let was = self.object(*dir).names.remove(&**name);
                assert!(was == Some(*file) || (was.is_none() && !self.complete), "{op:?}");
            }
            Op::Rename { from_dir, from, to_dir, to, file, replaced } => {
                let was = self.object(*from_dir).names.remove(&**from);
                let over = self.object(*to_dir).names.insert(to.to_vec(), *file);
                if self.complete {
                    assert_eq!((was, over), (Some(*file), *replaced), "{op:?}");
                }
            }
            Op::Exchange { a_dir, a, a_file, b_dir, b, b_file } => {
                let was_a = self.object(*a_dir).names.insert(a.to_vec(), *b_file);
                let was_b = self.object(*b_dir).names.insert(b.to_vec(), *a_file);
                if self.complete {
                    assert_eq!((was_a, was_b), (Some(*a_file), Some(*b_file)), "{op:?}");
                }
            }
            _ => unreachable!("the others are no operations on names"),
        }
    }

    /// Compares the tree with a real one, in full; the paths of all that differs.
    pub fn differences(&self, real: &Path) -> Vec<String> {
        let mut differences = Vec::new();
        self.compare(self.root, real, &mut differences);
        differences
    }

    fn compare(&self, file: FileId, real: &Path, differences: &mut Vec<String>) {
        let Some(object) = self.objects.get(&file) else {
            differences.push(format!("{}: {file} was never made", real.display()));
            return;
        };
        let mut check = |what: &str, ours: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            let (ours, theirs) = (format!("{ours:?}"), format!("{theirs:?}"));
            if ours != theirs {
                differences.push(format!("{}: {what} is {ours:.200}, not {theirs:.200}", real.display()));
            }
        };
        let stat = real.symlink_metadata().unwrap();
        check("inode", &file.ino, &stat.ino());
        let Some(attr) = object.attr.or((file == self.root).then(|| attr_of(&stat))) else {
            check("attributes", &"unknown", &"known");
            return;
        };
        check("attributes", &attr, &attr_of(&stat));
        check("xattrs", &object.xattrs, &xattrs(real));
        match attr.kind() {
            Some(Kind::File) => {
                let content = std::fs::read(real).unwrap();
                check("length", &object.data.len(), &content.len());
                check("content", &first_difference(&object.data, &content), &None::<usize>);
            }
            Some(Kind::Symlink) => {
                check(
                    "target",
                    &object.target,
                    &std::fs::read_link(real).unwrap().into_os_string().into_vec(),
                );
            }
            Some(Kind::Dir) => {
                let mut names: Vec<Vec<u8>> = std::fs::read_dir(real)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_vec())
                    .collect();
                names.sort();
                check("names", &object.names.keys().cloned().collect::<Vec<_>>(), &names);
                for name in names {
                    if let Some(child) = object.names.get(&name) {
                        self.compare(*child, &real.join(std::ffi::OsStr::from_bytes(&name)), differences);
                    }
                }
            }
            _ => {}
        }
    }
}

const fn is_content(op: &Op) -> bool {
    matches!(
        op,
        Op::Write { .. } | Op::Truncate { .. } | Op::Zero { .. } | Op::Collapse { .. } | Op::Insert { .. }
    )
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

fn attr_of(stat: &std::fs::Metadata) -> Attr {
    Attr {
        mode: stat.mode(),
        uid: stat.uid(),
        gid: stat.gid(),
        nlink: stat.nlink() as u32,
        rdev: stat.rdev(),
        size: stat.size(),
        mtime_s: stat.mtime(),
        mtime_ns: stat.mtime_nsec() as u32,
    }
}

/// All extended attributes of an object.
pub fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    let mut found = BTreeMap::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // How xfs keeps an ACL.
        if name.starts_with(b"trusted.SGI_ACL_") {
            continue;
        }
        let mut value = vec![0; 65_536];
        let len = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value.truncate(len);
        found.insert(name.to_vec(), value);
    }
    found
}
