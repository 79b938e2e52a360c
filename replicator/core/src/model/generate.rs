//! Random runs of updates, as a primary could have captured them.
//!
//! A [`Generator`] has a [`Model`] and does to it what programs do to a file system, preferring what mirrors get wrong:
//! few names, so that they are unlinked and made again; swaps; a directory and its child that change places; renames over
//! existing names; hard links; files and directories that are open while their last name goes; sparse writes far out;
//! collapsed and inserted ranges; names of any bytes. The same seed and options give the same run.

use std::collections::BTreeMap;

use super::{Model, Object, PAGE_BYTES, Random};
use crate::id::{FileId, VolumeInstance};
use crate::limits;
use crate::stamp::{Seq, Stamp, Timestamp};
use crate::update::{Attr, AttrList, Op, Update, sample_file};

/// What a generator may do.
#[derive(Debug, Clone)]
pub struct Options {
    /// The tree that the files are born in.
    pub instance: VolumeInstance,
    /// The first update is stamped after this.
    pub start: Timestamp,
    /// Names above which it rather removes than creates.
    pub names_max: usize,
    /// Most data of one write, in bytes.
    pub write_bytes_max: usize,
    /// Size that files have as a rule, in bytes.
    pub file_bytes: u64,
    /// Writes and truncates far out, up to 2^40, which make sparse files.
    pub sparse: bool,
    /// Collapses and inserts.
    pub shifts: bool,
    /// Device nodes, FIFOs and sockets.
    pub special: bool,
    /// Now and then copies an object again, as a copy of the tree does while programs work on it. In between the object
    /// is incomplete.
    pub copies: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            instance: sample_file(0).instance,
            start: Timestamp::ZERO,
            names_max: 60,
            write_bytes_max: 12_000,
            file_bytes: 64 << 10,
            sparse: true,
            shifts: true,
            special: true,
            copies: false,
        }
    }
}

/// An update and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The update.
    pub update: Update,
    /// The data of a write; empty otherwise.
    pub data: Vec<u8>,
}

/// Makes random runs of valid updates.
#[derive(Debug, Clone)]
pub struct Generator {
    model: Model,
    options: Options,
    random: Random,
    last: Stamp,
    /// Objects whose last name went while somebody had them open.
    orphans: Vec<FileId>,
    /// Inode numbers to be used again, with the next generation.
    free: Vec<FileId>,
    next_ino: u64,
    /// How often the machine crashed: no generation comes again, whatever a crash took back.
    crashes: u32,
    made: Vec<Change>,
}

/// A directory, a name in it, and what it stands for.
type Binding = (FileId, Box<[u8]>, FileId);

impl Generator {
    /// Starts with an empty tree.
    #[must_use]
    pub fn new(seed: u64, options: Options) -> Self {
        let root = FileId { instance: options.instance, ino: 2, generation: 0 };
        Self {
            model: Model::new(root),
            random: Random::new(seed),
            last: Stamp { time: options.start, seq: Seq::ZERO },
            orphans: Vec::new(),
            free: Vec::new(),
            next_ino: 12,
            crashes: 0,
            made: Vec::new(),
            options,
        }
    }

    /// The tree after all updates that were returned.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Goes on from another tree: the machine crashed, and this is what was left. Programs have no file open any more.
    pub fn go_on_from(&mut self, model: Model) {
        self.model = model;
        self.crashes += 1;
        self.orphans.clear();
        self.free.clear();
        self.made.clear();
    }

    /// The stamp of the last update.
    #[must_use]
    pub fn last_stamp(&self) -> Stamp {
        self.last
    }

    /// Lets later updates be stamped after `time`, if it is later than the last stamp: for several volumes that take turns.
    pub fn advance_time(&mut self, time: Timestamp) {
        self.last.time = self.last.time.max(time);
    }

    /// Does one random thing and returns its updates: one as a rule, several for what takes several calls.
    pub fn step(&mut self) -> Vec<Change> {
        while self.made.is_empty() {
            self.try_something();
        }
        std::mem::take(&mut self.made)
    }

    /// Does random things until there are at least `count` updates.
    pub fn run(&mut self, count: usize) -> Vec<Change> {
        let mut run = Vec::with_capacity(count);
        while run.len() < count {
            run.append(&mut self.step());
        }
        run
    }

    /// Copies the whole tree, as an initial copy does that no program disturbs: applied to an empty model, the updates
    /// make the tree.
    pub fn copy(&mut self) -> Vec<Change> {
        let tree = self.model.clone();
        self.copy_object(&tree, tree.root);
        let mut open = vec![tree.root];
        let mut known = std::collections::BTreeSet::from([tree.root]);
        while let Some(dir) = open.pop() {
            for (name, child) in tree.objects[&dir].names() {
                if known.insert(*child) {
                    self.copy_object(&tree, *child);
                    open.extend(tree.objects[child].is_dir().then_some(*child));
                }
                self.emit(Op::Bind { dir, name: name.clone(), file: *child }, Touched::default(), Vec::new());
            }
        }
        self.emit(Op::Complete, Touched::default(), Vec::new());
        std::mem::take(&mut self.made)
    }

    fn try_something(&mut self) {
        let crowded = self.bindings().len() > self.options.names_max;
        match self.random.below(100) {
            0..16 if !crowded => self.create(),
            0..24 => self.unlink(),
            24..28 => self.link(),
            28..38 => self.rename(),
            38..42 => self.exchange(),
            42..44 => self.invert(),
            44..48 => self.recreate(),
            48..51 => self.replace(),
            51..69 => self.write(),
            69..75 => self.truncate(),
            75..80 => self.zero(),
            80..85 => self.shift(),
            85..91 => self.set_attr(),
            91..98 => self.xattr(),
            _ if self.options.copies => {
                if let Some((_, _, file)) = self.binding() {
                    self.copy_object(&self.model.clone(), file);
                    self.copy_names(&self.model.clone(), file);
                }
            }
            _ => self.write(),
        }
    }

    // Names.

    fn create(&mut self) {
        let dir = self.dir();
        if let Some(name) = self.free_name(dir) {
            let file = self.create_at(dir, name);
            if self.random.one_in(2) {
                self.write_to(file);
            }
        }
    }

    fn create_at(&mut self, dir: FileId, name: Box<[u8]>) -> FileId {
        let file = self.new_file();
        let permissions = [0o600, 0o644, 0o755, 0o4755, 0o1777][self.random.below(5) as usize];
        let kind = match self.random.below(20) {
            0..11 => 0o100_000,
            11..16 => 0o040_000,
            16..18 => 0o120_000,
            _ if !self.options.special => 0o100_000,
            18 => [0o010_000, 0o140_000][self.random.below(2) as usize],
            _ => [0o020_000, 0o060_000][self.random.below(2) as usize],
        };
        let target = if kind == 0o120_000 {
            let len = 1 + self.random.below(30) as usize;
            self.random.bytes(len).iter().map(|byte| byte | 1).collect()
        } else {
            Vec::new()
        };
        let is_dir = kind == 0o040_000;
        let attr = Attr {
            mode: kind | if kind == 0o120_000 { 0o777 } else { permissions },
            uid: [0, 1000][self.random.below(2) as usize],
            gid: [0, 1000, 65_534][self.random.below(3) as usize],
            nlink: if is_dir { 2 } else { 1 },
            rdev: if matches!(kind, 0o020_000 | 0o060_000) { 0x0103 } else { 0 },
            size: if is_dir { PAGE_BYTES as u64 } else { target.len() as u64 },
            mtime_s: 0,
            mtime_ns: 0,
        };
        let mut touched = Touched::default();
        touched.add(file, attr);
        touched.change(&self.model, dir, |attr| attr.nlink += u32::from(is_dir));
        self.emit(Op::Create { dir, name, file, target: target.into() }, touched, Vec::new());
        file
    }

    fn link(&mut self) {
        let dir = self.dir();
        let Some((_, _, file)) = self.binding() else { return };
        if self.model.objects[&file].is_dir() {
            return;
        }
        if let Some(name) = self.free_name(dir) {
            let mut touched = Touched::default();
            touched.change(&self.model, dir, |_| {});
            touched.keep(&self.model, file, |attr| attr.nlink += 1);
            self.emit(Op::Link { dir, name, file }, touched, Vec::new());
        }
    }

    fn unlink(&mut self) {
        if let Some((dir, name, file)) = self.binding()
            && self.model.objects[&file].names.is_empty()
        {
            self.unlink_at(dir, name, file);
        }
    }

    fn unlink_at(&mut self, dir: FileId, name: Box<[u8]>, file: FileId) {
        let is_dir = self.model.objects[&file].is_dir();
        let mut touched = Touched::default();
        touched.change(&self.model, dir, |attr| attr.nlink -= u32::from(is_dir));
        touched.keep(&self.model, file, unlinked);
        self.emit(Op::Unlink { dir, name, file }, touched, Vec::new());
        self.dropped(file);
    }

    fn rename(&mut self) {
        let Some((from_dir, from, file)) = self.binding() else { return };
        let to_dir = if self.random.one_in(3) { from_dir } else { self.dir() };
        let to = self.name();
        self.rename_to(from_dir, from, to_dir, to, file);
    }

    /// Renames if a kernel would; over another link to the same object it would do nothing.
    fn rename_to(&mut self, from_dir: FileId, from: Box<[u8]>, to_dir: FileId, to: Box<[u8]>, file: FileId) {
        let replaced = self.model.objects[&to_dir].names.get(&to).copied();
        let is_dir = self.model.objects[&file].is_dir();
        let fits = replaced.is_none_or(|replaced| {
            let object = &self.model.objects[&replaced];
            replaced != file && object.is_dir() == is_dir && object.names.is_empty()
        });
        if !fits || self.is_below(file, to_dir) {
            return;
        }
        let mut touched = Touched::default();
        touched.change(&self.model, from_dir, |attr| attr.nlink -= u32::from(is_dir));
        touched.change(&self.model, to_dir, |attr| attr.nlink += u32::from(is_dir && replaced.is_none()));
        touched.keep(&self.model, file, |_| {});
        if let Some(replaced) = replaced {
            touched.keep(&self.model, replaced, unlinked);
        }
        self.emit(Op::Rename { from_dir, from, to_dir, to, file, replaced }, touched, Vec::new());
        if let Some(replaced) = replaced {
            self.dropped(replaced);
        }
    }

    fn exchange(&mut self) {
        let (Some((a_dir, a, a_file)), Some((b_dir, b, b_file))) = (self.binding(), self.binding()) else {
            return;
        };
        if a_file == b_file || self.is_below(a_file, b_dir) || self.is_below(b_file, a_dir) {
            return;
        }
        let dirs = [a_file, b_file].map(|file| u32::from(self.model.objects[&file].is_dir()));
        let mut touched = Touched::default();
        touched.change(&self.model, a_dir, |attr| attr.nlink = attr.nlink + dirs[1] - dirs[0]);
        touched.change(&self.model, b_dir, |attr| attr.nlink = attr.nlink + dirs[0] - dirs[1]);
        touched.keep(&self.model, a_file, |_| {});
        touched.keep(&self.model, b_file, |_| {});
        self.emit(Op::Exchange { a_dir, a, a_file, b_dir, b, b_file }, touched, Vec::new());
    }

    /// A directory and one below it change places, by way of a third name.
    fn invert(&mut self) {
        let parents = self.parents();
        let inner = self.dir();
        let Some((outer, inner_name)) = parents.get(&inner).cloned() else { return };
        let Some((top, outer_name)) = parents.get(&outer).cloned() else { return };
        let Some(aside) = self.free_name(top) else { return };
        let Some(below) = self.free_name(inner) else { return };
        self.rename_to(outer, inner_name, top, aside.clone(), inner);
        self.rename_to(top, outer_name.clone(), inner, below, outer);
        self.rename_to(top, aside, top, outer_name, inner);
    }

    /// A name goes and comes back as something else.
    fn recreate(&mut self) {
        if let Some((dir, name, file)) = self.binding()
            && self.model.objects[&file].names.is_empty()
        {
            self.unlink_at(dir, name.clone(), file);
            let file = self.create_at(dir, name);
            self.write_to(file);
        }
    }

    /// The way editors save: write a new file, rename it over the old one.
    fn replace(&mut self) {
        let Some((dir, to, old)) = self.binding() else { return };
        if let Some(name) = self.free_name(dir)
            && self.model.objects[&old].is_file()
        {
            let file = self.create_at(dir, name.clone());
            self.write_to(file);
            self.rename_to(dir, name, dir, to, file);
        }
    }

    // Content.

    fn write(&mut self) {
        if let Some(file) = self.file() {
            self.write_to(file);
        }
    }

    fn write_to(&mut self, file: FileId) {
        let object = &self.model.objects[&file];
        if !object.is_file() {
            return;
        }
        let size = object.attr.size;
        let offset = self.offset(size);
        let len = 1 + self.random.below(self.options.write_bytes_max as u64) as usize;
        let len = if self.random.one_in(3) { 1 + len % 100 } else { len };
        let data = if self.random.one_in(10) { vec![0; len] } else { self.random.bytes(len) };
        self.write_at(file, offset, data);
    }

    fn write_at(&mut self, file: FileId, offset: u64, data: Vec<u8>) {
        let len = u32::try_from(data.len()).expect("at most WRITE_BYTES_MAX bytes");
        self.emit_content(
            Op::Write { file, offset, len },
            file,
            |size| size.max(offset + u64::from(len)),
            data,
        );
    }

    fn truncate(&mut self) {
        let Some(file) = self.file() else { return };
        let size = self.model.objects[&file].attr.size;
        let size = match self.random.below(4) {
            0 => 0,
            1 => self.random.below(size + 1),
            2 => size + self.random.below(10_000),
            _ => self.offset(size),
        };
        self.emit_content(Op::Truncate { file, size }, file, |_| size, Vec::new());
    }

    fn zero(&mut self) {
        let Some(file) = self.file() else { return };
        let size = self.model.objects[&file].attr.size;
        let (offset, len) = (self.offset(size), 1 + self.random.below(20_000));
        // To punch a hole never makes a file longer; to zero a range may.
        let hole = self.random.one_in(2);
        let end = if hole || self.random.one_in(2) { 0 } else { offset + len };
        self.emit_content(Op::Zero { file, offset, len, hole }, file, |size| size.max(end), Vec::new());
    }

    fn shift(&mut self) {
        let Some(file) = self.file() else { return };
        let page = PAGE_BYTES as u64;
        let pages = self.model.objects[&file].attr.size.div_ceil(page);
        if !self.options.shifts || pages < 2 {
            return;
        }
        // Among the first pages, where data is, even if the file ends far out.
        let first = self.random.below((pages - 1).min(20));
        let (offset, count) = (first * page, 1 + self.random.below(4).min(pages - 2 - first.min(pages - 2)));
        let len = count * page;
        if self.random.one_in(2) {
            self.emit_content(Op::Insert { file, offset, len }, file, |size| size + len, Vec::new());
        } else if offset + len < self.model.objects[&file].attr.size {
            self.emit_content(Op::Collapse { file, offset, len }, file, |size| size - len, Vec::new());
        }
    }

    fn emit_content(&mut self, op: Op, file: FileId, size: impl FnOnce(u64) -> u64, data: Vec<u8>) {
        let mut touched = Touched::default();
        touched.change(&self.model, file, |attr| attr.size = size(attr.size));
        self.emit(op, touched, data);
    }

    // Attributes.

    fn set_attr(&mut self) {
        let Some(file) = self.any() else { return };
        let what = self.random.below(3);
        let value = self.random.next_u64();
        let mut touched = Touched::default();
        touched.keep(&self.model, file, |attr| match what {
            0 if attr.mode & 0o170_000 != 0o120_000 => {
                attr.mode = attr.mode & 0o170_000 | (value % 0o10_000) as u32;
            }
            1 => (attr.uid, attr.gid) = ((value % 3) as u32, (value / 3 % 3) as u32),
            _ => {
                attr.mtime_s = (value % (4 << 30)) as i64 - (1 << 30);
                attr.mtime_ns = ((value >> 34) % 1_000_000_000) as u32;
            }
        });
        self.emit(Op::SetAttr { file }, touched, Vec::new());
    }

    fn xattr(&mut self) {
        let Some(file) = self.any() else { return };
        let object = &self.model.objects[&file];
        // `user.` is for files and directories only.
        let space = if object.is_file() || object.is_dir() { "user" } else { "trusted" };
        let name: Box<[u8]> = format!("{space}.x{}", self.random.below(4)).into_bytes().into();
        let known = object.xattrs.contains_key(&name);
        let len = if self.random.one_in(4) { 0 } else { self.random.below(200) as usize };
        let value = self.random.bytes(len).into();
        let mut touched = Touched::default();
        touched.keep(&self.model, file, |_| {});
        if known && self.random.one_in(3) {
            self.emit(Op::RemoveXattr { file, name }, touched, Vec::new());
        } else {
            self.emit(Op::SetXattr { file, name, value }, touched, Vec::new());
        }
    }

    // Copies.

    /// Sends an object as it is in `tree`, without names.
    fn copy_object(&mut self, tree: &Model, file: FileId) {
        let object: &Object = &tree.objects[&file];
        let mut touched = Touched::default();
        touched.add_exactly(file, object.attr);
        self.emit(Op::Object { file, target: object.target.clone() }, touched.clone(), Vec::new());
        for (name, value) in &object.xattrs {
            let op = Op::SetXattr { file, name: name.clone(), value: value.clone() };
            self.emit(op, touched.clone(), Vec::new());
        }
        for (number, page) in &object.pages {
            let offset = number * PAGE_BYTES as u64;
            let len = (object.attr.size - offset).min(PAGE_BYTES as u64) as u32;
            let data = page[..len as usize].to_vec();
            self.emit(Op::Write { file, offset, len }, touched.clone(), data);
        }
    }

    fn copy_names(&mut self, tree: &Model, dir: FileId) {
        for (name, file) in tree.objects[&dir].names() {
            self.emit(Op::Bind { dir, name: name.clone(), file: *file }, Touched::default(), Vec::new());
        }
    }

    // Stamping, choosing.

    fn emit(&mut self, op: Op, touched: Touched, data: Vec<u8>) {
        self.last.time.0 += 1 + self.random.below(20_000);
        self.last.seq = self.last.seq.next();
        let now = self.last.time.0;
        let attrs = touched.0.into_iter().map(|(file, (mut attr, changed))| {
            if changed {
                attr.mtime_s = (now / 1_000_000_000) as i64;
                attr.mtime_ns = (now % 1_000_000_000) as u32;
            }
            (file, attr)
        });
        let update = Update { stamp: self.last, op, attrs: AttrList::from_iter(attrs) };
        self.model.apply(&update, &data);
        self.made.push(Change { update, data });
    }

    fn new_file(&mut self) -> FileId {
        if self.random.one_in(2)
            && let Some(old) = self.free.pop()
        {
            return FileId { generation: old.generation + 1 + 1000 * self.crashes, ..old };
        }
        self.next_ino += 1;
        FileId { instance: self.options.instance, ino: self.next_ino, generation: 1 }
    }

    /// A name of the object is gone: perhaps somebody has it open, perhaps its inode is free.
    fn dropped(&mut self, file: FileId) {
        if self.model.objects[&file].attr.nlink > 0 {
            return;
        }
        if self.random.one_in(2) {
            self.orphans.push(file);
        } else {
            self.free.push(file);
        }
        if self.orphans.len() > 5 {
            self.free.push(self.orphans.remove(0));
        }
    }

    fn name(&mut self) -> Box<[u8]> {
        match self.random.below(40) {
            0 => vec![b'n'; limits::NAME_BYTES_MAX].into(),
            1 => b"\xff\n \\\x01".as_slice().into(),
            2 => b"-..".as_slice().into(),
            n => format!("n{}", n % 9).into_bytes().into(),
        }
    }

    fn free_name(&mut self, dir: FileId) -> Option<Box<[u8]>> {
        let name = self.name();
        (!self.model.objects[&dir].names.contains_key(&name)).then_some(name)
    }

    /// An offset in a file of `size` bytes, near its end, or far out.
    fn offset(&mut self, size: u64) -> u64 {
        match self.random.below(10) {
            0 if self.options.sparse => self.random.below(1 << 40),
            0 | 1 => size + self.random.below(9000),
            2 | 3 => size,
            _ => self.random.below(size.min(self.options.file_bytes) + 1),
        }
        .min(if self.options.sparse { 1 << 40 } else { self.options.file_bytes })
    }

    /// Every name of the tree. Objects that a copy left without names are not found.
    fn bindings(&self) -> Vec<Binding> {
        let mut found = Vec::new();
        let mut open = vec![self.model.root];
        while let Some(dir) = open.pop() {
            for (name, file) in &self.model.objects[&dir].names {
                found.push((dir, name.clone(), *file));
                open.extend(self.model.objects[file].is_dir().then_some(*file));
            }
        }
        found
    }

    fn binding(&mut self) -> Option<Binding> {
        let all = self.bindings();
        all.get(self.random.below(all.len() as u64) as usize).cloned()
    }

    fn dir(&mut self) -> FileId {
        let mut dirs = vec![self.model.root];
        dirs.extend(self.bindings().iter().map(|b| b.2).filter(|file| self.model.objects[file].is_dir()));
        self.random.pick(&dirs).unwrap_or(self.model.root)
    }

    /// A regular file, perhaps one without a name.
    fn file(&mut self) -> Option<FileId> {
        let mut files: Vec<FileId> = self.bindings().iter().map(|b| b.2).collect();
        files.extend(&self.orphans);
        files.retain(|file| self.model.objects[file].is_file());
        self.random.pick(&files)
    }

    /// Any object, perhaps one without a name.
    fn any(&mut self) -> Option<FileId> {
        if self.random.one_in(8) {
            return self.random.pick(&self.orphans);
        }
        if self.random.one_in(8) {
            return Some(self.model.root);
        }
        self.binding().map(|binding| binding.2)
    }

    /// The parent of each directory, and the directory's name there.
    fn parents(&self) -> BTreeMap<FileId, (FileId, Box<[u8]>)> {
        let dirs = self.bindings().into_iter().filter(|binding| self.model.objects[&binding.2].is_dir());
        dirs.map(|(dir, name, file)| (file, (dir, name))).collect()
    }

    /// Whether `dir` is `file`, or below it.
    fn is_below(&self, file: FileId, mut dir: FileId) -> bool {
        let parents = self.parents();
        loop {
            if dir == file {
                return true;
            }
            match parents.get(&dir) {
                Some((parent, _)) => dir = *parent,
                None => return false,
            }
        }
    }
}

fn unlinked(attr: &mut Attr) {
    let is_dir = attr.mode & 0o170_000 == 0o040_000;
    attr.nlink = if is_dir { 0 } else { attr.nlink - 1 };
}

/// The objects that an update touches: their attributes, and whether their modification time becomes that of the update.
#[derive(Clone, Default)]
struct Touched(BTreeMap<FileId, (Attr, bool)>);

impl Touched {
    fn add(&mut self, file: FileId, attr: Attr) {
        self.0.insert(file, (attr, true));
    }

    fn add_exactly(&mut self, file: FileId, attr: Attr) {
        self.0.insert(file, (attr, false));
    }

    /// Changes attributes and modification time.
    fn change(&mut self, model: &Model, file: FileId, change: impl FnOnce(&mut Attr)) {
        self.keep(model, file, change);
        self.0.entry(file).and_modify(|entry| entry.1 = true);
    }

    /// Changes attributes, but not the modification time.
    fn keep(&mut self, model: &Model, file: FileId, change: impl FnOnce(&mut Attr)) {
        change(&mut self.0.entry(file).or_insert((model.objects[&file].attr, false)).0);
    }
}

#[cfg(test)]
mod tests;
