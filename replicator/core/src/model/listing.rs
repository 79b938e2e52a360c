//! A tree as comparable text.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use super::PAGE_BYTES;
use crate::update::{Attr, Kind};

/// One name of a tree and what it stands for, to be [added](Listing::add) to a listing: from a model, or from a walk over
/// a real directory.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The path below the root, components joined by `/`; empty for the root itself.
    pub path: Vec<u8>,
    /// The same number for, and only for, hard links to one object: an inode number will do.
    pub identity: u64,
    /// The attributes. Size and link count of directories are not compared: each file system has its own idea of them.
    pub attr: Attr,
    /// The target of a symlink.
    pub target: Vec<u8>,
    /// The extended attributes.
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// The content of a file.
    pub content: ContentHasher,
}

/// Hashes the content of a file. Holes and written zeros make no difference, and holes cost nothing.
#[derive(Debug, Clone, Default)]
pub struct ContentHasher {
    hasher: blake3::Hasher,
}

impl ContentHasher {
    /// Takes a page, in rising order of page numbers. A short page, at the end of a file, stands for one filled up with
    /// zeros; pages of zeros may be left out.
    pub fn page(&mut self, number: u64, page: &[u8]) {
        let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if used > 0 {
            assert!(page.len() <= PAGE_BYTES, "a page of {} bytes", page.len());
            self.hasher.update(&number.to_le_bytes());
            self.hasher.update(&page[..used]);
            self.hasher.update(&[0; PAGE_BYTES][used..]);
        }
    }
}

/// A tree as text: a line for each name, with all that is mirrored of the object.
#[derive(Clone, Default)]
pub struct Listing {
    lines: BTreeMap<Vec<u8>, (u64, String)>,
}

impl Listing {
    /// Adds a name, in any order.
    pub fn add(&mut self, entry: Entry) {
        let mut line = String::new();
        describe(&entry, &mut line);
        self.lines.insert(entry.path, (entry.identity, line));
    }

    /// A hash of the whole, as 64 hexadecimal digits.
    #[must_use]
    pub fn hash(&self) -> String {
        blake3::hash(self.to_string().as_bytes()).to_hex().to_string()
    }

    /// The lines that differ, `-` before those only here and `+` before those only there; empty if there are none.
    #[must_use]
    pub fn difference(&self, other: &Self) -> String {
        let ours = BTreeSet::from_iter(self.finished());
        let theirs = BTreeSet::from_iter(other.finished());
        let removed = ours.difference(&theirs).map(|line| format!("- {line}\n"));
        let added = theirs.difference(&ours).map(|line| format!("+ {line}\n"));
        removed.chain(added).collect()
    }

    /// The lines with each further link naming the first.
    fn finished(&self) -> Vec<String> {
        let mut first: BTreeMap<u64, &[u8]> = BTreeMap::new();
        let mut lines = Vec::with_capacity(self.lines.len());
        for (path, (identity, line)) in &self.lines {
            let known = first.entry(*identity).or_insert(path);
            let link =
                if *known == path { String::new() } else { format!(" same-as /{}", known.escape_ascii()) };
            lines.push(format!("/{}{line}{link}", path.escape_ascii()));
        }
        lines
    }
}

impl PartialEq for Listing {
    /// Whether the text is the same: identities tell links apart, but are not compared themselves.
    fn eq(&self, other: &Self) -> bool {
        self.finished() == other.finished()
    }
}

impl Eq for Listing {}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.finished().iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl fmt::Debug for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn describe(entry: &Entry, line: &mut String) {
    let attr = &entry.attr;
    let kind = attr.kind();
    let mut add = |text: fmt::Arguments<'_>| line.write_fmt(text).expect("a string takes everything");
    add(format_args!(
        " {:06o} {}:{} mtime={}.{:09}",
        attr.mode, attr.uid, attr.gid, attr.mtime_s, attr.mtime_ns
    ));
    if kind != Some(Kind::Dir) {
        add(format_args!(" nlink={} size={}", attr.nlink, attr.size));
    }
    match kind {
        Some(Kind::File) => add(format_args!(" content={}", &entry.content.hasher.finalize().to_hex()[..16])),
        Some(Kind::Symlink) => add(format_args!(" -> {}", entry.target.escape_ascii())),
        Some(Kind::CharDevice | Kind::BlockDevice) => add(format_args!(" rdev={:x}", attr.rdev)),
        _ => {}
    }
    for (name, value) in &entry.xattrs {
        add(format_args!(" {}={}", name.escape_ascii(), value.escape_ascii()));
    }
}
