//! Reading again what a change map names gives the state as it is then.
//!
//! A random history is suspended at some update; what follows is only noted. At the end the map's objects are read from
//! the final tree and applied to the tree as of the suspension, which must then be the final tree. `CHANGE_SEED=n cargo
//! test -p twinfs-core --test change_map` replays one seed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;

use twinfs_core::change_map::{BadChangeMap, Change, ChangeMap, TO_THE_END};
use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::model::generate::{self, Generator, Options};
use twinfs_core::model::{Model, PAGE_BYTES, Random};
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{Attr, AttrList, Kind, Op, Update, sample_file};

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("CHANGE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..count).collect(),
    }
}

fn replay(seed: u64) -> String {
    format!("replay: CHANGE_SEED={seed} cargo test -p twinfs-core --test change_map")
}

/// A tree that lags behind another one, and is told what the map names.
struct Reader<'a> {
    now: &'a Model,
    then: &'a mut Model,
}

impl Reader<'_> {
    fn say(&mut self, op: Op, attrs: &[FileId], data: &[u8]) {
        let attr_of = |file: &FileId| self.now.object(*file).map(|object| (*file, *object.attr()));
        let attrs: AttrList = attrs.iter().filter_map(attr_of).collect();
        self.then.apply(&Update { stamp: Stamp::default(), op, attrs }, data);
    }

    fn read(&mut self, file: FileId, change: &Change) {
        let here = self.now.object(file).filter(|object| object.attr().nlink > 0);
        let Some(here) = here.filter(|_| !change.is_gone()) else {
            if let Some(known) = self.then.object(file) {
                let attr = Attr { nlink: 0, ..*known.attr() };
                let attrs = [(file, attr)].into_iter().collect();
                self.then.apply(&Update { stamp: Stamp::default(), op: Op::SetAttr { file }, attrs }, &[]);
            }
            return;
        };
        if change.is_whole() {
            self.say(Op::Object { file, target: here.target().into() }, &[file], &[]);
            for (name, value) in here.xattrs() {
                self.say(Op::SetXattr { file, name: name.clone(), value: value.clone() }, &[file], &[]);
            }
            for name in here.names().keys() {
                self.name(file, name);
            }
            return self.content(file, 0, TO_THE_END);
        }
        for (start, end) in change.ranges() {
            self.content(file, start, end);
        }
        for name in change.xattrs() {
            match here.xattrs().get(name) {
                Some(value) => {
                    self.say(Op::SetXattr { file, name: name.into(), value: value.clone() }, &[file], &[])
                }
                None if self.then.object(file).is_some_and(|then| then.xattrs().contains_key(name)) => {
                    self.say(Op::RemoveXattr { file, name: name.into() }, &[file], &[]);
                }
                None => {}
            }
        }
        for name in change.names() {
            self.name(file, name);
        }
        self.say(Op::SetAttr { file }, &[file], &[]);
    }

    fn content(&mut self, file: FileId, start: u64, end: u64) {
        let here = self.now.object(file).expect("it is there");
        let size = here.attr().size;
        if here.attr().kind() != Some(Kind::File) {
            return;
        }
        if end == TO_THE_END {
            self.say(Op::Truncate { file, size }, &[file], &[]);
        }
        let end = end.min(size);
        if start >= end {
            return;
        }
        self.say(Op::Zero { file, offset: start, len: end - start, hole: true }, &[file], &[]);
        let page_bytes = PAGE_BYTES as u64;
        for (number, page) in here.pages().range(start / page_bytes..end.div_ceil(page_bytes)) {
            let (first, last) = (start.max(number * page_bytes), end.min((number + 1) * page_bytes));
            let within = (first % page_bytes) as usize..(last - number * page_bytes) as usize;
            let len = within.len() as u32;
            self.say(Op::Write { file, offset: first, len }, &[file], &page[within]);
        }
    }

    fn name(&mut self, dir: FileId, name: &[u8]) {
        match self.now.object(dir).and_then(|dir| dir.names().get(name)) {
            Some(file) => self.say(Op::Bind { dir, name: name.into(), file: *file }, &[dir], &[]),
            None => self.say(Op::Unbind { dir, name: name.into() }, &[dir], &[]),
        }
    }
}

/// Reads all that the map names; objects that are new come first, so that there is something to bind.
fn read_again(map: &ChangeMap, now: &Model, then: &mut Model) {
    let mut reader = Reader { now, then };
    let (whole, parts): (Vec<_>, Vec<_>) = map.objects().partition(|(_, change)| change.is_whole());
    for (file, change) in whole.into_iter().chain(parts) {
        reader.read(file, change);
    }
}

fn note(map: &mut ChangeMap, changes: &[generate::Change]) {
    changes.iter().for_each(|change| map.note(&change.update.op, &change.update.attrs));
}

fn check(seed: u64, what: &str, now: &Model, then: &Model) {
    let difference = now.listing().difference(&then.listing());
    assert!(difference.is_empty(), "{what}; {}\n- as it is, + as it was read\n{difference}", replay(seed));
}

#[test]
fn what_a_map_names_makes_the_old_state_the_new_one() {
    for seed in seeds(60) {
        let mut random = Random::new(seed);
        let mut generator = Generator::new(seed, Options::default());
        let before = random.below(300) as usize;
        generator.run(before.max(1));
        let mut then = generator.model().clone();
        let dropped = generator.run(1 + random.below(300) as usize);
        let mut map = ChangeMap::default();
        note(&mut map, &dropped);
        assert_eq!(ChangeMap::decode(&map.encode()).as_ref(), Ok(&map), "{}", replay(seed));
        let fine = map.clone();
        if random.one_in(2) {
            map.keep_bound(map.bytes() / (1 + random.below(12) as usize));
        }
        if map.is_everything() {
            map = fine;
        }
        read_again(&map, generator.model(), &mut then);
        check(seed, "after one level", generator.model(), &then);
    }
}

#[test]
fn a_level_that_was_interrupted_goes_on_in_the_next_one() {
    for seed in seeds(60) {
        let mut random = Random::new(seed);
        let mut generator = Generator::new(seed, Options::default());
        generator.run(1 + random.below(200) as usize);
        let mut then = generator.model().clone();
        let mut map = ChangeMap::default();
        for _ in 0..4 {
            note(&mut map, &generator.run(1 + random.below(150) as usize));
            // A part of the map is read; then updates are dropped again.
            let (mut left, mut read) = (std::mem::take(&mut map), ChangeMap::default());
            for _ in 0..random.below(20) {
                // As in `read_again`: nothing is bound that the old tree does not know.
                let Some(file) = left.objects().find(|(_, change)| change.is_whole()).map(|(file, _)| file)
                else {
                    break;
                };
                let change = left.take(file).unwrap();
                read.put_back(file, change);
            }
            read_again(&read, generator.model(), &mut then);
            note(&mut map, &generator.run(1 + random.below(100) as usize));
            left.merge(map);
            map = left;
            if random.one_in(3) {
                map = ChangeMap::decode(&map.encode()).unwrap();
            }
        }
        read_again(&map, generator.model(), &mut then);
        check(seed, "after interruptions", generator.model(), &then);
    }
}

fn attr(mode: u32, nlink: u32, size: u64) -> Attr {
    Attr { mode, uid: 0, gid: 0, nlink, rdev: 0, size, mtime_s: 0, mtime_ns: 0 }
}

const FILE: u32 = 0o100_644;
const DIR: u32 = 0o040_755;

#[test]
fn what_came_and_went_leaves_no_trace() {
    let (dir, file) = (sample_file(1), sample_file(2));
    let name: &[u8] = b"tmp";
    let dir_attr = (dir, attr(DIR, 2, 4096));
    let mut map = ChangeMap::default();
    let mut note = |op: Op<&[u8]>, nlink| {
        let attrs = [(file, attr(FILE, nlink, 9)), dir_attr].into_iter().collect();
        map.note(&op, &attrs);
    };
    note(Op::Create { dir, name, file, target: b"" }, 1);
    note(Op::Write { file, offset: 0, len: 9 }, 1);
    note(Op::Unlink { dir, name, file }, 0);
    note(Op::Write { file, offset: 0, len: 9 }, 0);
    assert_eq!(map.objects().map(|(file, _)| file).collect::<Vec<_>>(), [dir], "its time of modification");
    assert_eq!(map.object(dir).unwrap().names().len(), 0);
}

#[test]
fn two_thousand_random_blocks_are_read_at_their_size() {
    let (file, mut random, mut map) = (sample_file(1), Random::new(1), ChangeMap::default());
    let size = 10 << 30;
    let attrs = [(file, attr(FILE, 1, size))].into_iter().collect();
    let mut blocks = BTreeSet::new();
    while blocks.len() < 2000 {
        let block = random.below(size / 4096);
        blocks.insert(block);
        map.note(&Op::<&[u8]>::Write { file, offset: block * 4096, len: 4096 }, &attrs);
    }
    let bytes: u64 = map.object(file).unwrap().ranges().map(|(start, end)| end - start).sum();
    assert_eq!(bytes, 2000 * 4096);
}

#[test]
fn memory_is_bounded_whatever_happens() {
    let mut map = ChangeMap::default();
    let (dir, mut random) = (sample_file(1), Random::new(7));
    let mut most = 0;
    for number in 0..400_000_u64 {
        let file = sample_file(2 + number / 3);
        let attrs = [(file, attr(FILE, 1, 1 << 40))].into_iter().collect();
        map.note(&Op::<&[u8]>::Write { file, offset: random.below(1 << 40), len: 1 }, &attrs);
        let attrs = [(dir, attr(DIR, 2, 4096))].into_iter().collect();
        let name = format!("a name of some length that was never seen before: {number}");
        map.note(&Op::<&[u8]>::Link { dir, name: name.as_bytes(), file }, &attrs);
        most = most.max(map.bytes());
    }
    assert!(most <= limits::CHANGE_MAP_BYTES_MAX, "{most}");
    assert!(map.is_everything() || map.objects().len() == 133_335);
    map.keep_bound(1000);
    assert!(map.is_everything() && !map.is_empty() && map.bytes() == 0);
    map.note_whole(dir);
    assert!(map.objects().len() == 0);
    assert_eq!(ChangeMap::decode(&map.encode()), Ok(map));
}

#[test]
fn damaged_bytes_are_refused() {
    let mut generator = Generator::new(3, Options::default());
    let mut map = ChangeMap::default();
    note(&mut map, &generator.run(60));
    let bytes = map.encode();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(ChangeMap::decode(&damaged).is_err(), "byte {at}");
        assert!(ChangeMap::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn hostile_bytes_with_a_good_checksum_are_refused_or_harmless() {
    let mut generator = Generator::new(4, Options::default());
    let mut map = ChangeMap::default();
    note(&mut map, &generator.run(60));
    let bytes = map.encode();
    let body = &bytes[..bytes.len() - 32];
    let mut random = Random::new(9);
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut body = body.to_vec();
        for _ in 0..1 + random.below(3) {
            let at = 12 + random.below(body.len() as u64 - 12) as usize;
            body[at] = if random.one_in(4) { 0xff } else { random.next_u64() as u8 };
        }
        let hash = blake3::hash(&body);
        body.extend(hash.as_bytes());
        match ChangeMap::decode(&body) {
            // What is read is a map like any other.
            Ok(read) => assert_eq!(ChangeMap::decode(&read.encode()), Ok(read)),
            Err(BadChangeMap::Damaged(_)) => refused += 1,
            Err(BadChangeMap::Version(_)) => unreachable!("it was left alone"),
        }
    }
    assert!(refused > 1000);
}
