//! Programs that change a tree at random while it is copied.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, FallocateFlags, Mode, RenameFlags, XattrFlags};
use twinfs::mirror::{Caller, Mirror, NewNode, SetAttr, SetTime};
use twinfs_core::model::Random;
use twinfs_core::update::Kind;

const ROOT: u64 = 1;
const CALLER: Caller = Caller::ROOT;
const XATTRS: [&[u8]; 4] = [b"user.a", b"user.b", b"trusted.c", b"security.other"];
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";

/// user::rwx user:5:r-x group::r-x mask::r-x other::---
fn acl() -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, bits, id) in
        [(1_u16, 7_u16, u32::MAX), (2, 5, 5), (4, 5, u32::MAX), (16, 5, u32::MAX), (32, 0, u32::MAX)]
    {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

pub struct Actor {
    pub mirror: Arc<Mirror>,
    pub random: Random,
    /// Operations left.
    pub budget: u64,
    /// Whether nothing but contents of files is changed.
    pub content_only: bool,
    /// Node and handle.
    open: Vec<(u64, u64)>,
    trace: bool,
}

struct Found {
    dir: u64,
    name: Vec<u8>,
    node: u64,
    kind: Kind,
}

impl Actor {
    pub fn new(mirror: Arc<Mirror>, seed: u64, budget: u64) -> Self {
        let trace = std::env::var_os("TWINFS_TRACE").is_some();
        Self { mirror, random: Random::new(seed), budget, content_only: false, open: Vec::new(), trace }
    }

    /// Goes on with another mirror of the same tree.
    pub fn move_to(&mut self, mirror: Arc<Mirror>) {
        for (_, fh) in self.open.drain(..) {
            drop(self.mirror.release(fh));
        }
        self.mirror = mirror;
    }

    fn list(&self, dir: u64) -> Vec<(Vec<u8>, Kind)> {
        let mut found = Vec::new();
        let Ok(fh) = self.mirror.open_dir(dir) else { return found };
        let _ = self.mirror.read_dir(fh, 0, &mut |item| {
            if item.name != b"." && item.name != b".." {
                found.push((item.name.to_vec(), item.kind));
            }
            true
        });
        self.mirror.release_dir(fh);
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    fn dir(&mut self) -> u64 {
        let mut dir = ROOT;
        while !self.random.one_in(3) {
            let mut names = self.list(dir);
            names.retain(|(_, kind)| *kind == Kind::Dir);
            if names.is_empty() {
                break;
            }
            let at = self.random.below(names.len() as u64) as usize;
            match self.mirror.lookup(dir, &names[at].0) {
                Ok(Some(entry)) => dir = entry.nodeid,
                _ => break,
            }
        }
        dir
    }

    fn any(&mut self, wanted: impl Fn(Kind) -> bool) -> Option<Found> {
        for _ in 0..8 {
            let dir = self.dir();
            let mut names = self.list(dir);
            names.retain(|(_, kind)| wanted(*kind));
            if names.is_empty() {
                continue;
            }
            let at = self.random.below(names.len() as u64) as usize;
            let (name, kind) = names.swap_remove(at);
            if let Ok(Some(entry)) = self.mirror.lookup(dir, &name) {
                return Some(Found { dir, name, node: entry.nodeid, kind });
            }
        }
        None
    }

    fn name(&mut self) -> Vec<u8> {
        format!("n{}", self.random.below(24)).into_bytes()
    }

    /// An open file, one that was opened long ago or one that is found now.
    fn file(&mut self) -> Option<(u64, u64)> {
        if self.open.len() > 4 {
            let at = self.random.below(self.open.len() as u64) as usize;
            drop(self.mirror.release(self.open.swap_remove(at).1));
        }
        if !self.open.is_empty() && self.random.one_in(2) {
            return self.random.pick(&self.open);
        }
        let found = self.any(|kind| kind == Kind::File)?;
        let fh = self.mirror.open(found.node, libc::O_RDWR).ok()?;
        self.open.push((found.node, fh));
        Some((found.node, fh))
    }

    /// Does something. It may fail, as programs' calls do.
    pub fn act(&mut self) {
        if self.budget == 0 {
            return;
        }
        self.budget -= 1;
        let action = self.random.below(if self.content_only { 7 } else { 20 });
        let outcome = match action {
            0..=4 => self.write(),
            5 | 6 => self.space(),
            7 | 8 => self.attributes(),
            9 | 10 => self.xattr(),
            11 | 12 => self.make(),
            13 | 14 => self.unlink(),
            15 => self.link(),
            _ => self.rename(),
        };
        if self.trace {
            eprintln!("{action}: {outcome:?}");
        }
    }

    fn write(&mut self) -> Option<String> {
        let (node, fh) = self.file()?;
        let size = self.mirror.getattr(node, Some(fh)).ok()?.size;
        if self.random.one_in(6) {
            let (_, from) = self.file()?;
            let (at, to, len) =
                (self.random.below(size + 1), self.random.below(size + 9000), self.random.below(300_000));
            let done = self.mirror.copy_range(CALLER, (from, at), (fh, to), len, &mut Vec::new());
            return Some(format!("copy to {node} at {to}: {done:?}"));
        }
        let offset = self.random.below(size + 20_000);
        let most = if self.random.one_in(8) { 1 << 20 } else { 10_000 };
        let len = self.random.below(most);
        let data = self.random.bytes(len as usize);
        let done = self.mirror.write(node, fh, offset, &data, self.random.one_in(2), false);
        Some(format!("write {node} at {offset}: {done:?}"))
    }

    fn space(&mut self) -> Option<String> {
        let (node, fh) = self.file()?;
        let size = self.mirror.getattr(node, Some(fh)).ok()?.size;
        let (offset, len) = (self.random.below(size + 4096), 1 + self.random.below(200_000));
        let (block, blocks) = (offset / 4096 * 4096, (1 + len / 4096) * 4096);
        let flags = FallocateFlags::KEEP_SIZE;
        let (offset, len, mode) = match self.random.below(7) {
            0 => (offset, len, FallocateFlags::PUNCH_HOLE | flags),
            1 => (offset, len, FallocateFlags::ZERO_RANGE),
            2 => (offset, len, FallocateFlags::empty()),
            3 | 4 => (block, blocks, FallocateFlags::COLLAPSE_RANGE),
            5 => (block, blocks, FallocateFlags::INSERT_RANGE),
            _ => {
                let size = Some(offset);
                let fh = self.random.one_in(2).then_some(fh);
                let done = self.mirror.setattr(CALLER, node, &SetAttr { size, ..SetAttr::default() }, fh);
                return Some(format!("truncate {node} to {offset}: {}", done.is_ok()));
            }
        };
        let done = self.mirror.fallocate(CALLER, fh, offset, len, mode.bits());
        Some(format!("{mode:?} {node} at {offset} by {len}: {done:?}"))
    }

    fn attributes(&mut self) -> Option<String> {
        let found = self.any(|_| true)?;
        let mut set = SetAttr::default();
        match self.random.below(3) {
            0 if found.kind != Kind::Symlink => set.mode = Some(0o600 + self.random.below(0o100) as u32),
            1 => set.uid = Some(self.random.below(50) as u32),
            _ => set.mtime = Some(SetTime::At(self.random.below(1 << 31) as i64, 5)),
        }
        let done = self.mirror.setattr(CALLER, found.node, &set, None).is_ok();
        Some(format!("{set:?} {}: {done}", found.node))
    }

    fn xattr(&mut self) -> Option<String> {
        let found = self.any(|_| true)?;
        let (name, value) = match self.random.below(6) {
            0 => (DEFAULT_ACL, acl()),
            1 => (ACCESS_ACL, acl()),
            _ => {
                let name = self.random.pick(&XATTRS)?;
                let len = self.random.below(300) as usize;
                (name, self.random.bytes(len))
            }
        };
        let done = match self.random.below(3) {
            0 => self.mirror.removexattr(found.node, name),
            _ => self.mirror.setxattr(CALLER, found.node, name, &value, XattrFlags::empty().bits()),
        };
        Some(format!("xattr {} of {}: {done:?}", name.escape_ascii(), found.node))
    }

    fn make(&mut self) -> Option<String> {
        let (dir, name) = (self.dir(), self.name());
        let new = match self.random.below(5) {
            0 | 1 => NewNode::Dir { mode: 0o755 },
            2 => NewNode::Symlink { target: b"some/where" },
            3 => NewNode::Node { mode: libc::S_IFIFO | 0o600, rdev: 0 },
            _ => {
                let (entry, fh) = self.mirror.create(CALLER, dir, &name, 0o640, 0, libc::O_RDWR).ok()?;
                self.open.push((entry.nodeid, fh));
                return Some(format!("create {} in {dir}: {}", name.escape_ascii(), entry.nodeid));
            }
        };
        let done = self.mirror.make(CALLER, dir, &name, 0o22, new).map(|entry| entry.nodeid);
        Some(format!("make {} in {dir}: {done:?}", name.escape_ascii()))
    }

    fn unlink(&mut self) -> Option<String> {
        let found = self.any(|_| true)?;
        let done = self.mirror.remove(found.dir, &found.name, found.kind == Kind::Dir);
        Some(format!("unlink {} ({}) in {}: {done:?}", found.name.escape_ascii(), found.node, found.dir))
    }

    fn link(&mut self) -> Option<String> {
        let found = self.any(|kind| kind != Kind::Dir)?;
        let (dir, name) = (self.dir(), self.name());
        let done = self.mirror.link(found.node, dir, &name).is_ok();
        if done && self.random.one_in(2) {
            // A slow rename.
            let _ = self.mirror.remove(found.dir, &found.name, false);
        }
        Some(format!("link {} to {} in {dir}: {done}", found.node, name.escape_ascii()))
    }

    fn rename(&mut self) -> Option<String> {
        let found = self.any(|_| true)?;
        let (dir, name, flags) = match self.random.below(4) {
            0 => {
                let other = self.any(|_| true)?;
                (other.dir, other.name, RenameFlags::EXCHANGE)
            }
            1 => {
                let other = self.any(|kind| kind == found.kind)?;
                (other.dir, other.name, RenameFlags::empty())
            }
            _ => (self.dir(), self.name(), RenameFlags::empty()),
        };
        let done = self.mirror.rename(found.dir, &found.name, dir, &name, flags.bits());
        let (from, to) = (found.name.escape_ascii(), name.escape_ascii());
        Some(format!("rename {from} ({}) in {} to {to} in {dir}, {flags:?}: {done:?}", found.node, found.dir))
    }
}

/// Makes a tree with a bit of everything.
pub fn plant(root: &Path, random: &mut Random) {
    let mut dirs = vec![root.to_owned()];
    let mut files = Vec::new();
    for number in 0..18 {
        let within = dirs[random.below(dirs.len() as u64) as usize].clone();
        let dir = within.join(format!("d{number}"));
        std::fs::create_dir(&dir).unwrap();
        dirs.push(dir);
    }
    for number in 0..30 {
        let path = dirs[random.below(dirs.len() as u64) as usize].join(format!("f{number}"));
        let file = std::fs::File::create(&path).unwrap();
        let mut offset = 0;
        for _ in 0..random.below(4) {
            offset += random.below(if number < 4 { 2 << 20 } else { 60_000 });
            let len = random.below(if number < 4 { 1 << 21 } else { 50_000 });
            std::os::unix::fs::FileExt::write_all_at(&file, &random.bytes(len as usize), offset).unwrap();
            offset += len;
        }
        if random.one_in(2) {
            file.set_len(offset + random.below(100_000)).unwrap();
        }
        files.push(path);
    }
    for number in 0..8 {
        let dir = &dirs[random.below(dirs.len() as u64) as usize];
        let file = &files[random.below(files.len() as u64) as usize];
        std::fs::hard_link(file, dir.join(format!("h{number}"))).unwrap();
        std::os::unix::fs::symlink("over/there", dir.join(format!("s{number}"))).unwrap();
        let fifo = dir.join(format!("p{number}"));
        rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        for name in [b"user.a".as_slice(), b"trusted.c"] {
            let value = random.bytes(200);
            rustix::fs::setxattr(file, name, &value, XattrFlags::empty()).unwrap();
            rustix::fs::setxattr(dir, name, &value, XattrFlags::empty()).unwrap();
        }
        let link = dir.join(format!("s{number}"));
        rustix::fs::lsetxattr(&link, b"trusted.twinfs.id".as_slice(), b"hidden", XattrFlags::empty())
            .unwrap();
        rustix::fs::lsetxattr(&link, b"trusted.c".as_slice(), b"on a symlink", XattrFlags::empty()).unwrap();
    }
    let acl = acl();
    rustix::fs::setxattr(&dirs[1], DEFAULT_ACL, &acl, XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(&files[1], ACCESS_ACL, &acl, XattrFlags::empty()).unwrap();
}
