//! Folded deltas over a tree show what the naive model shows.
//!
//! A random run is cut in three: the first part makes the tree, the second the frozen delta, the third the live delta.
//! Read through the layers, every object must be as the model says that applied all three. `DELTA_SEED=n cargo test -p
//! twinfs-core --test delta_fold` replays one seed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use twinfs_core::delta::layers::{self, Content};
use twinfs_core::delta::{DataRef, Delta, ObjectDelta, SetLocation, Source};
use twinfs_core::id::FileId;
use twinfs_core::model::generate::{Change, Generator, Options};
use twinfs_core::model::{Model, Object, Random};
use twinfs_core::update::Op;

/// Updates of one record set.
const SET_UPDATES: usize = 7;

/// The run in record sets, as it would stand in a journal.
struct Journal {
    changes: Vec<Change>,
    places: Vec<DataRef>,
    sets: Vec<Vec<u8>>,
}

impl Journal {
    fn new(changes: Vec<Change>) -> Self {
        let (mut places, mut sets) = (Vec::new(), Vec::new());
        for set in changes.chunks(SET_UPDATES) {
            let location = SetLocation { segment: 9, offset: sets.len() as u64 };
            let mut data = Vec::new();
            for change in set {
                places.push(DataRef { set: location, offset: data.len() as u32 });
                data.extend_from_slice(&change.data);
            }
            sets.push(data);
        }
        Self { changes, places, sets }
    }

    fn fold(&self, delta: &mut Delta, updates: std::ops::Range<usize>) {
        for (change, place) in self.changes[updates.clone()].iter().zip(&self.places[updates]) {
            let data = matches!(change.update.op, Op::Write { .. }).then_some(*place);
            delta.fold(&change.update, data);
        }
    }

    fn apply(&self, model: &mut Model, updates: std::ops::Range<usize>) {
        self.changes[updates].iter().for_each(|change| model.apply(&change.update, &change.data));
    }

    fn read(&self, data: DataRef, len: usize) -> &[u8] {
        &self.sets[data.set.offset as usize][data.offset as usize..][..len]
    }
}

/// A tree with layers over it, newest first.
struct View<'a> {
    journal: &'a Journal,
    layers: &'a [&'a Delta],
    tree: &'a Model,
}

impl View<'_> {
    /// The tree's object, which there must be if the layers leave anything to the tree.
    fn below(&self, file: FileId) -> &Object {
        assert!(layers::tree_counts(self.layers, file));
        self.tree.object(file).unwrap_or_else(|| panic!("{file} is neither born nor in the tree"))
    }

    fn read(&self, file: FileId, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        for piece in layers::resolve(self.layers, file, offset..offset + len as u64) {
            assert_eq!(piece.offset, offset + bytes.len() as u64, "no gap and no overlap");
            match piece.content {
                Content::Journal(data) => {
                    bytes.extend_from_slice(self.journal.read(data, piece.len as usize))
                }
                Content::Zero => bytes.resize(bytes.len() + piece.len as usize, 0),
                Content::Tree(at) => bytes.extend(self.below(file).read(at, piece.len as usize)),
            }
        }
        assert_eq!(bytes.len(), len, "the range is covered");
        bytes
    }

    fn names(&self, dir: FileId) -> BTreeMap<Box<[u8]>, FileId> {
        let merged = layers::names(self.layers, dir);
        let mut names = if merged.tree { self.below(dir).names().clone() } else { BTreeMap::new() };
        for (name, file) in merged.said {
            match file {
                Some(file) => _ = names.insert(name.into(), file),
                None => _ = names.remove(name),
            }
        }
        names
    }

    fn xattrs(&self, file: FileId) -> BTreeMap<Box<[u8]>, Box<[u8]>> {
        let merged = layers::xattrs(self.layers, file);
        let mut xattrs = if merged.tree { self.below(file).xattrs().clone() } else { BTreeMap::new() };
        for (name, value) in merged.said {
            match value {
                Some(value) => _ = xattrs.insert(name.into(), value.into()),
                None => _ = xattrs.remove(name),
            }
        }
        xattrs
    }

    fn check(&self, expected: &Model, random: &mut Random, what: &str) {
        for (file, object) in expected.objects() {
            let what = format!("{what}, {file}");
            let attr = layers::attr(self.layers, file).copied().unwrap_or_else(|| *self.below(file).attr());
            assert_eq!(attr, *object.attr(), "{what}");
            let target = layers::target(self.layers, file).unwrap_or_else(|| self.below(file).target());
            assert_eq!(target, object.target(), "{what}");
            assert_eq!(self.names(file), *object.names(), "{what}");
            assert_eq!(self.xattrs(file), *object.xattrs(), "{what}");
            for name in object.names().keys().map(|name| &**name).chain([b"n4".as_slice(), b"n5", b"n6"]) {
                let found = layers::lookup(self.layers, file, name);
                let found = found.unwrap_or_else(|| self.below(file).names().get(name).copied());
                assert_eq!(found, object.names().get(name).copied(), "{what}");
            }
            for (name, value) in object.xattrs() {
                let found = layers::xattr(self.layers, file, name);
                let found =
                    found.unwrap_or_else(|| self.below(file).xattrs().get(name).map(|value| &**value));
                assert_eq!(found, Some(&**value), "{what}");
            }
            if object.is_file() {
                self.check_content(file, object, random, &what);
            }
        }
    }

    fn check_content(&self, file: FileId, object: &Object, random: &mut Random, what: &str) {
        let check = |offset: u64, len: usize| {
            // Beyond the end of the file, layers say nothing that means anything.
            let len = len.min(usize::try_from(object.attr().size.saturating_sub(offset)).unwrap_or(len));
            assert!(
                self.read(file, offset, len) == object.read(offset, len),
                "{what}, {len} bytes at {offset}"
            );
        };
        for number in object.pages().keys() {
            check(number.saturating_sub(1) * 4096, 3 * 4096);
        }
        for piece in layers::resolve(self.layers, file, 0..object.attr().size) {
            check(piece.offset.saturating_sub(3), piece.len.min(10_000) as usize + 6);
            check((piece.offset + piece.len).saturating_sub(100), 100);
        }
        for _ in 0..4 {
            check(random.below(object.attr().size + 1), random.below(20_000) as usize);
        }
        check(0, 40_000);
    }
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("DELTA_SEED") {
        Ok(seed) => vec![seed.parse().expect("DELTA_SEED is a number")],
        Err(_) => (0..count).collect(),
    }
}

fn options(seed: u64) -> Options {
    Options {
        names_max: [8, 25, 60][seed as usize % 3],
        copies: seed % 2 == 1,
        shifts: seed % 5 != 4,
        ..Options::default()
    }
}

/// All that a delta says, as text.
fn text(delta: &Delta) -> String {
    let mut text = String::new();
    for (file, object) in delta.objects() {
        let size = object.attr().map_or(0, |attr| attr.size);
        _ = writeln!(text, "{file} {:?} {:?} gone {}", object.attr(), object.born(), object.is_gone());
        _ = writeln!(text, " {:?}", object.names().collect::<Vec<_>>());
        _ = writeln!(text, " {:?}", object.xattrs().collect::<Vec<_>>());
        _ = writeln!(text, " {:?} {:?}", object.below_limit(), object.changed().collect::<Vec<_>>());
        _ = writeln!(text, " {:?}", object.pieces(0..size).collect::<Vec<_>>());
    }
    text
}

#[test]
fn a_tree_with_two_layers_is_the_tree_after_the_whole_run() {
    for seed in seeds(45) {
        println!("DELTA_SEED={seed}");
        let mut random = Random::new(!seed);
        let mut primary = Generator::new(seed, options(seed));
        let journal = Journal::new(primary.run(300));
        let end = journal.changes.len();
        for _ in 0..4 {
            let checkpoint = random.below(end as u64 + 1) as usize;
            let freeze = checkpoint + random.below((end - checkpoint) as u64 + 1) as usize;
            let what = format!("seed {seed}, checkpoint at {checkpoint}, frozen at {freeze}");
            let mut tree = Model::new(primary.model().root());
            journal.apply(&mut tree, 0..checkpoint);
            let (mut frozen, mut live) = (Delta::default(), Delta::default());
            journal.fold(&mut frozen, checkpoint..freeze);
            let mut expected = tree.clone();
            journal.apply(&mut expected, checkpoint..freeze);
            View { journal: &journal, layers: &[&frozen], tree: &tree }.check(&expected, &mut random, &what);
            // On the way to the end, the live delta is looked at after each of a few groups.
            let mut at = freeze;
            while at < end {
                let next = (at + 1 + random.below(80) as usize).min(end);
                journal.fold(&mut live, at..next);
                journal.apply(&mut expected, at..next);
                at = next;
                let layers = [&live, &frozen];
                let what = format!("{what}, live to {at}");
                View { journal: &journal, layers: &layers, tree: &tree }.check(&expected, &mut random, &what);
            }
            assert_eq!(expected, *primary.model(), "{what}");
            // One delta of both parts says the same as the two layers.
            journal.fold(&mut frozen, freeze..end);
            View { journal: &journal, layers: &[&frozen], tree: &tree }.check(&expected, &mut random, &what);
        }
    }
}

#[test]
fn folding_a_run_twice_is_folding_it_once() {
    for seed in seeds(60) {
        println!("DELTA_SEED={seed}");
        let mut primary = Generator::new(seed, Options { shifts: false, ..options(seed) });
        let journal = Journal::new(primary.run(250));
        let end = journal.changes.len();
        let start = end / 3;
        let mut once = Delta::default();
        journal.fold(&mut once, start..end);
        // The redo may start anywhere in the run, as long as it comes to its end.
        for redo in [start, (start + end) / 2, end] {
            let mut twice = once.clone();
            journal.fold(&mut twice, redo..end);
            assert_eq!(text(&once), text(&twice), "seed {seed}, again from {redo}");
            assert_eq!(once.bytes(), twice.bytes(), "seed {seed}, again from {redo}");
        }
    }
}

#[test]
fn clones_never_change() {
    for seed in seeds(15) {
        println!("DELTA_SEED={seed}");
        let journal = Journal::new(Generator::new(seed, options(seed)).run(600));
        let mut live = Delta::default();
        let mut clones = Vec::new();
        for at in 0..journal.changes.len() {
            if at % 40 == 0 {
                clones.push((live.clone(), text(&live), live.bytes()));
            }
            journal.fold(&mut live, at..at + 1);
        }
        for (clone, before, bytes) in clones {
            assert!(text(&clone) == before && clone.bytes() == bytes, "seed {seed}");
        }
    }
}

#[test]
fn what_is_shifted_and_what_is_cut_is_enough_to_write_a_file_in_place() {
    for seed in seeds(40) {
        println!("DELTA_SEED={seed}");
        let mut primary = Generator::new(seed, Options { copies: false, ..options(seed) });
        let journal = Journal::new(primary.run(400));
        let (middle, end) = (journal.changes.len() / 2, journal.changes.len());
        let mut tree = Model::new(primary.model().root());
        journal.apply(&mut tree, 0..middle);
        let mut delta = Delta::default();
        journal.fold(&mut delta, middle..end);
        for (file, object) in delta.objects() {
            let expected = primary.model().object(file).expect("the run touched it");
            let (Some(below), false) = (tree.object(file), object.content_shifted()) else { continue };
            if !expected.is_file() {
                continue;
            }
            let len = 50_000.min(expected.attr().size as usize);
            let mut bytes = below.read(0, len);
            if let Some(limit) = object.below_limit() {
                bytes[len.min(limit as usize)..].fill(0);
            }
            for piece in object.changed().filter(|piece| piece.offset < len as u64) {
                let part = (piece.len as usize).min(len - piece.offset as usize);
                let place = &mut bytes[piece.offset as usize..][..part];
                match piece.source {
                    Source::Journal(data) => place.copy_from_slice(journal.read(data, part)),
                    Source::Zero => place.fill(0),
                    Source::Below(_) => panic!("seed {seed}: nothing below counts as changed"),
                }
            }
            assert!(bytes == expected.read(0, len), "seed {seed}, {file}");
            assert!(object.content_changed() || bytes == below.read(0, len), "seed {seed}, {file}");
        }
    }
}

#[test]
fn objects_without_a_name_are_told() {
    let mut directories = 0;
    for seed in seeds(30) {
        println!("DELTA_SEED={seed}");
        let mut primary = Generator::new(seed, Options { copies: false, ..options(seed) });
        let journal = Journal::new(primary.run(400));
        let (middle, end) = (journal.changes.len() / 2, journal.changes.len());
        let mut before = Model::new(primary.model().root());
        journal.apply(&mut before, 0..middle);
        let mut delta = Delta::default();
        journal.fold(&mut delta, middle..end);
        let bound = |model: &Model, file| {
            file == model.root() || model.objects().any(|(_, dir)| dir.names().values().any(|f| *f == file))
        };
        for (file, object) in primary.model().objects() {
            let lost =
                !bound(primary.model(), file) && (before.object(file).is_none() || bound(&before, file));
            let gone = delta.object(file).is_some_and(ObjectDelta::is_gone);
            assert!(!lost || gone, "seed {seed}, {file} lost its last name");
            assert!(!gone || !bound(primary.model(), file), "seed {seed}, {file} has a name");
            directories += usize::from(lost && object.is_dir());
        }
    }
    assert!(directories > 0 || std::env::var("DELTA_SEED").is_ok());
}

#[test]
fn the_estimate_of_memory_grows_with_what_is_held_and_falls_with_what_is_dropped() {
    let mut primary = Generator::new(11, Options::default());
    let journal = Journal::new(primary.run(2000));
    let mut delta = Delta::default();
    assert_eq!(delta.bytes(), 0);
    for at in 0..journal.changes.len() {
        journal.fold(&mut delta, at..at + 1);
        let counted: usize = delta.objects().map(|(_, object)| object.bytes()).sum();
        assert_eq!(delta.bytes(), counted, "after update {at}");
        for (file, object) in delta.objects() {
            let names: usize = object.names().map(|(name, _)| name.len() + size_of::<Option<FileId>>()).sum();
            let xattrs: usize = object.xattrs().map(|(n, v)| n.len() + v.map_or(0, <[u8]>::len)).sum();
            let extents = object.changed().count() * size_of::<(u64, u64, Source)>();
            let held = size_of::<ObjectDelta>() + names + xattrs + extents;
            assert!(object.bytes() >= held, "after update {at}: {file} holds {held}");
        }
    }
    let file = delta.objects().max_by_key(|(_, object)| object.changed().count()).expect("not empty").0;
    let attr = *delta.object(file).and_then(ObjectDelta::attr).expect("it was written");
    let before = delta.bytes();
    let stamp = primary.last_stamp();
    let op = Op::Truncate { file, size: 0 };
    delta.fold(&twinfs_core::update::Update { stamp, op, attrs: [(file, attr)].into_iter().collect() }, None);
    assert!(delta.bytes() < before);
}
