//! File operations of all kinds on a small tree, with a ledger of its states.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Load, Lost, expect_or_lost, unless_lost};
use crate::ledger::{Ledger, MIX, within_a_page};
use crate::ops::{Actor, Generator, Operation};
use crate::tree::{self, Compare, Listing};

/// The ledger that [`Churn`] writes.
#[derive(Debug, Clone, Default)]
pub struct Book(Arc<Mutex<Ledger>>);

impl Book {
    /// What stands in it.
    pub fn open(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a new page with the tree as it is. Only while [`Churn`] stands still.
    pub fn turn(&self, source: &Path) {
        let mut ledger = self.open();
        *ledger = Ledger::default();
        ledger.enter(source, || "the beginning of the round".into());
    }

    /// Checks trees that a replica showed, by their groups: each is an entry, in rising order.
    ///
    /// # Panics
    /// If that is not so.
    pub fn check(&self, seen: &BTreeMap<u64, Listing>) {
        let ledger = self.open();
        let places: HashMap<&String, usize> =
            ledger.hashes.iter().enumerate().map(|(place, hash)| (hash, place)).collect();
        let mut last = 0;
        for (group, listing) in seen {
            let Some(place) = places.get(&tree::hash(listing)) else {
                panic!("group {group} shows what never was; {}", ledger.nearest(last, listing));
            };
            assert!(
                *place >= last,
                "group {group} goes back to {}, after {}",
                ledger.what[*place],
                ledger.what[last]
            );
            last = *place;
        }
    }
}

/// Performs random operations; a counter is written before each, so that no two states are equal.
#[derive(Debug)]
pub struct Churn {
    mount: PathBuf,
    source: PathBuf,
    generator: Generator,
    open: Option<(File, Actor)>,
    round: u64,
    /// `None`: no ledger is kept.
    book: Option<Book>,
    /// The call that was cut off.
    undecided: Option<String>,
    touched: Vec<PathBuf>,
}

impl Churn {
    /// On a volume of its own.
    #[must_use]
    pub fn new(mount: &Path, source: &Path, seed: u64, book: Option<Book>) -> Self {
        Self {
            mount: mount.to_owned(),
            source: source.to_owned(),
            generator: Generator::new(seed, MIX),
            open: None,
            round: 0,
            book,
            undecided: None,
            touched: Vec::new(),
        }
    }

    /// Everything that a program was told is there, and of the call that was cut off at most what it was to do.
    fn check_source(&mut self) {
        let (Some(book), Some(what)) = (&self.book, self.undecided.take()) else { return };
        let mut ledger = book.open();
        let now = tree::listing(&self.source, Compare::ALL);
        if let Some(last) = ledger.listings.last() {
            let strange = unrelated(last, &now, &self.touched);
            assert!(
                strange.is_empty(),
                "the primary's tree lost what a program was told: {strange:?} changed, although only {what} was under \
                 way\n{}",
                tree::differences(last, &now).unwrap_or_default()
            );
        }
        ledger.enter(&self.source, || format!("cut off: {what}"));
    }
}

impl Load for Churn {
    fn connect(&mut self) -> Result<(), Lost> {
        // A mount point without its mount is an empty directory; the first start finds one in the mount too.
        let file = File::options().write(true).open(self.mount.join("counter")).map_err(|_| Lost)?;
        expect_or_lost("the tree", std::fs::metadata(self.mount.join("tree")))?;
        self.open = Some((file, Actor::new(&self.mount.join("tree"))));
        self.check_source();
        Ok(())
    }

    fn step(&mut self) -> Result<(), Lost> {
        let Some((counter, actor)) = &mut self.open else { return Err(Lost) };
        self.round += 1;
        let round = self.round;
        (self.undecided, self.touched) = (Some(format!("counter {round}")), vec!["counter".into()]);
        expect_or_lost("the counter", counter.write_all_at(&round.to_le_bytes(), 0))?;
        enter(&self.book, &self.source, || format!("counter {round}"));
        let mut operation = self.generator.next_operation(&self.source.join("tree"));
        within_a_page(&mut operation, &self.source.join("tree"));
        self.touched = paths(&operation).iter().map(|path| Path::new("tree").join(path)).collect();
        let mut text = format!("{operation:?}");
        text.truncate((0..=200).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
        self.undecided = Some(text.clone());
        let result = unless_lost(actor.apply(&operation))?;
        self.undecided = None;
        enter(&self.book, &self.source, || format!("{text} -> {result:?}"));
        Ok(())
    }

    fn disconnect(&mut self) {
        self.open = None;
    }
}

fn enter(book: &Option<Book>, source: &Path, what: impl FnOnce() -> String) {
    if let Some(book) = book {
        book.open().enter(source, what);
    }
}

/// The paths that an operation names; none if it works on what was opened before.
fn paths(operation: &Operation) -> Vec<PathBuf> {
    match operation {
        Operation::Link { from, to }
        | Operation::Rename { from, to, .. }
        | Operation::CopyRange { from, to, .. } => vec![from.clone(), to.clone()],
        Operation::Invert { outer, inner, aside } => vec![outer.clone(), inner.clone(), aside.clone()],
        Operation::WriteHeld { .. } | Operation::Release { .. } => Vec::new(),
        Operation::Create { path, .. }
        | Operation::Mkdir { path, .. }
        | Operation::Mknod { path, .. }
        | Operation::Symlink { path, .. }
        | Operation::Unlink { path }
        | Operation::Rmdir { path }
        | Operation::Write { path, .. }
        | Operation::Append { path, .. }
        | Operation::Truncate { path, .. }
        | Operation::Fallocate { path, .. }
        | Operation::Chmod { path, .. }
        | Operation::Chown { path, .. }
        | Operation::Times { path, .. }
        | Operation::SetXattr { path, .. }
        | Operation::RemoveXattr { path, .. }
        | Operation::Hold { path, .. }
        | Operation::Look { path } => vec![path.clone()],
    }
}

/// The paths that changed from `before` to `now` and have nothing to do with those that a call named: it may change
/// these, what is below them, the directories that they stand in, and further names of the same files. Of a call that
/// named none, all names of one file.
fn unrelated(before: &Listing, now: &Listing, named: &[PathBuf]) -> Vec<PathBuf> {
    let path_of = |name: &Vec<u8>| PathBuf::from(OsStr::from_bytes(name));
    let names: BTreeSet<&Vec<u8>> = before.keys().chain(now.keys()).collect();
    let changed: Vec<&Vec<u8>> =
        names.iter().copied().filter(|name| before.get(*name) != now.get(*name)).collect();
    let groups = |name: &Vec<u8>| -> Vec<String> {
        let lines = [before.get(name), now.get(name)].into_iter().flatten();
        lines.filter_map(|line| Some(line.split(" of ").nth(1)?.split(' ').next()?.to_owned())).collect()
    };
    let is_named = |path: &Path| {
        named.iter().any(|named| path.starts_with(named) || named.parent() == Some(path) || named == path)
    };
    let mut same: BTreeSet<String> =
        names.iter().filter(|name| is_named(&path_of(name))).flat_map(|name| groups(name)).collect();
    if named.is_empty() {
        same = changed.first().into_iter().flat_map(|name| groups(name)).collect();
    }
    let strange = changed.into_iter().filter(|name| {
        let path = path_of(name);
        !is_named(&path) && !groups(name).iter().any(|group| same.contains(group))
    });
    strange.map(path_of).collect()
}
