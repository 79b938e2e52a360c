use super::*;
use crate::update;

fn everything() -> Options {
    Options { copies: true, ..Options::default() }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| Generator::new(seed, everything()).run(500);
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn what_it_makes_could_have_travelled() {
    for seed in 0..20 {
        let mut last = Stamp::default();
        for change in Generator::new(seed, everything()).run(400) {
            let mut bytes = Vec::new();
            update::encode(&change.update, &mut bytes);
            assert_eq!(update::decode(&bytes, 0), Ok((change.update.clone(), bytes.len())), "seed {seed}");
            assert!(change.update.stamp.time > last.time && change.update.stamp.seq == last.seq.next());
            last = change.update.stamp;
        }
    }
}

#[test]
fn every_operation_and_every_hard_case_occurs() {
    let mut primary = Generator::new(1, everything());
    let mut kinds = std::collections::BTreeSet::new();
    let (mut over_existing, mut orphans_written, mut reused) = (0, 0, 0);
    for change in primary.run(6000) {
        kinds.insert(change.update.op.kind() as u8);
        let gone = |file| change.update.attrs.get(file).is_some_and(|attr| attr.nlink == 0);
        match change.update.op {
            Op::Rename { replaced: Some(_), .. } => over_existing += 1,
            Op::Write { file, .. } if gone(file) => orphans_written += 1,
            Op::Create { file, .. } if file.generation > 1 => reused += 1,
            _ => {}
        }
    }
    primary.copy().iter().for_each(|change| _ = kinds.insert(change.update.op.kind() as u8));
    assert_eq!(kinds, (1..=16).collect());
    assert!(over_existing > 50 && orphans_written > 50 && reused > 50);
    assert!(primary.model().objects().any(|(_, o)| o.is_file() && o.attr().nlink > 1));
}

#[test]
fn link_counts_and_sizes_are_those_of_a_real_tree() {
    for seed in 0..20 {
        let mut primary = Generator::new(seed, Options::default());
        primary.run(600);
        let bindings = primary.bindings();
        let parents = primary.parents();
        for (file, object) in primary.model().objects() {
            let links = bindings.iter().filter(|binding| binding.2 == file).count() as u32;
            let subdirs = parents.values().filter(|(dir, _)| *dir == file).count() as u32;
            let is_bound = links > 0 || file == primary.model().root();
            let nlink = if object.is_dir() && is_bound { 2 + subdirs } else { links };
            assert_eq!(object.attr().nlink, nlink, "seed {seed}, {file}");
            let end = object.pages.last_key_value().map_or(0, |(number, _)| number * PAGE_BYTES as u64);
            assert!(end <= object.attr().size, "seed {seed}, {file}: data beyond its end");
        }
    }
}

#[test]
fn a_copy_makes_the_same_tree() {
    for seed in 0..20 {
        let mut primary = Generator::new(seed, Options::default());
        primary.run(500);
        let before = primary.model().listing();
        let mut replica = Model::new(primary.model().root());
        for change in primary.copy() {
            replica.apply(&change.update, &change.data);
        }
        assert_eq!(before.difference(&replica.listing()), "", "seed {seed}");
        assert_eq!(before, replica.listing());
        assert_eq!(before.hash(), primary.model().listing().hash());
    }
}
