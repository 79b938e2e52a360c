//! A ledger of all states of a small tree: what a replica shows must be one of its entries.

use std::path::Path;

use crate::ops::{Mix, Operation};
use crate::tree::{self, Compare, Listing};

/// A small tree, so that it can be hashed after every call, each of which changes it at most once.
pub const MIX: Mix = Mix { shifts: false, data_bytes_max: 3000, single_calls: true, names: 3, depth: 2 };

const PAGE: u64 = 4096;

/// What each state of the tree was, and which place it has in the order.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Hashes of the states.
    pub hashes: Vec<String>,
    /// The states.
    pub listings: Vec<Listing>,
    /// What led to each.
    pub what: Vec<String>,
}

impl Ledger {
    /// Enters the state of the tree after something was done.
    pub fn enter(&mut self, source: &Path, what: impl FnOnce() -> String) {
        let listing = tree::listing(source, Compare::ALL);
        let hash = tree::hash(&listing);
        // A call that failed or changed nothing leaves the state that is there already.
        if self.hashes.last() != Some(&hash) {
            self.hashes.push(hash);
            self.listings.push(listing);
            self.what.push(what());
        }
    }

    /// The entry after `place` that is most like a listing, and how they differ.
    #[must_use]
    pub fn nearest(&self, place: usize, listing: &Listing) -> String {
        let differing = |entry: &Listing| {
            let changed = entry.iter().filter(|(path, line)| listing.get(*path) != Some(line)).count();
            changed + listing.keys().filter(|path| !entry.contains_key(*path)).count()
        };
        let places = place..self.listings.len();
        let nearest = places.min_by_key(|at| differing(&self.listings[*at])).unwrap_or(place);
        let difference = tree::differences(&self.listings[nearest], listing).unwrap_or_default();
        let what = &self.what[nearest.saturating_sub(3)..(nearest + 3).min(self.what.len())];
        format!("most like entry {nearest} (left) of {what:#?}\n{difference}")
    }
}

/// Cuts a write at the end of its page: the kernel may hand a longer one to the mount in two parts, each of which is an update.
pub fn within_a_page(operation: &mut Operation, root: &Path) {
    let (at, data) = match operation {
        Operation::Write { offset, data, .. } | Operation::WriteHeld { offset, data, .. } => (*offset, data),
        Operation::Append { path, data } => {
            (std::fs::metadata(root.join(path)).map_or(0, |metadata| metadata.len()), data)
        }
        _ => return,
    };
    data.truncate((PAGE - at % PAGE) as usize);
}
