//! Write tokens that are held for the loss report.

use std::collections::BTreeMap;
use std::ops::Add;

use crate::limits;
use crate::stamp::Seq;
use crate::token::Token;
use crate::update::OpKind;

/// Updates that are known by their tokens alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BareTokens {
    /// How many are held.
    pub count: u64,
    /// Bytes that they wrote.
    pub bytes: u64,
    /// How many came when there was no room to hold them.
    pub not_held: u64,
}

impl Add for BareTokens {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            bytes: self.bytes.saturating_add(other.bytes),
            not_held: self.not_held + other.not_held,
        }
    }
}

/// The tokens of a volume whose updates are in no committed group.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    by_seq: BTreeMap<Seq, Entry>,
    bare: BareTokens,
}

#[derive(Debug)]
struct Entry {
    token: Token,
    has_data: bool,
}

impl Tokens {
    pub(super) fn len(&self) -> usize {
        self.by_seq.len()
    }

    pub(super) fn bare(&self) -> BareTokens {
        self.bare
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn get(&self, seq: Seq) -> Option<(&Token, bool)> {
        self.by_seq.get(&seq).map(|entry| (&entry.token, entry.has_data))
    }

    pub(super) fn iter_bare(&self) -> impl Iterator<Item = &Token> {
        self.by_seq.values().filter(|entry| !entry.has_data).map(|entry| &entry.token)
    }

    /// All that are held, in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Token> {
        self.by_seq.values().map(|entry| &entry.token)
    }

    /// Takes a token, unless there is one of that number already or there is no room. `held` counts those of all
    /// volumes.
    pub(super) fn insert(&mut self, token: Token, has_data: bool, held: &mut usize) {
        if self.by_seq.contains_key(&token.stamp.seq) {
            return;
        }
        if *held >= limits::TOKENS_HELD_MAX {
            self.bare.not_held += 1;
            return;
        }
        *held += 1;
        if !has_data {
            self.bare.count += 1;
            self.bare.bytes = self.bare.bytes.saturating_add(written(&token));
        }
        self.by_seq.insert(token.stamp.seq, Entry { token, has_data });
    }

    /// A set with these updates came.
    pub(super) fn handle_data(&mut self, first: Seq, last: Seq) {
        for entry in self.by_seq.range_mut(first..=last).map(|(_, entry)| entry) {
            if !entry.has_data {
                entry.has_data = true;
                self.bare.count -= 1;
                self.bare.bytes = self.bare.bytes.saturating_sub(written(&entry.token));
            }
        }
    }

    /// Forgets what came of the updates after one.
    pub(super) fn drop_after(&mut self, last: Seq) {
        for entry in self.by_seq.split_off(&last.next()).into_values().filter(|entry| !entry.has_data) {
            self.bare.count -= 1;
            self.bare.bytes = self.bare.bytes.saturating_sub(written(&entry.token));
        }
    }

    /// Everything up to an update is in committed groups, and it was here.
    pub(super) fn drop_through(&mut self, through: Seq) {
        while let Some(entry) = self.by_seq.first_entry().filter(|entry| *entry.key() <= through) {
            entry.remove();
        }
    }
}

fn written(token: &Token) -> u64 {
    if token.op == OpKind::Write { token.range.1 } else { 0 }
}
