//! A sorted map that is small when it holds little.
//!
//! Most objects of a delta have one extent and no name, so a tree node for each of their maps would be most of the
//! delta's memory. Up to [`FEW`] entries stand in a sorted vector, which is copied when a shared object changes; more go
//! to a persistent B-tree, where a change copies O(log n).

use std::borrow::Borrow;
use std::ops::Bound;

use imbl::OrdMap;

/// Entries up to which a map is a vector: as many as a leaf of the B-tree takes.
const FEW: usize = 16;

#[derive(Clone)]
pub(super) enum SmallMap<K, V> {
    Few(Vec<(K, V)>),
    Many(OrdMap<K, V>),
}

impl<K, V> Default for SmallMap<K, V> {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl<K: Ord + Clone, V: Clone> SmallMap<K, V> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few(few) => few.len(),
            Self::Many(many) => many.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Few(few) => Some(&few[find(few, key).ok()?].1),
            Self::Many(many) => many.get(key),
        }
    }

    /// Sets the value of `key` and returns the one that it had.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        match self {
            Self::Few(few) => match find(few, &key) {
                Ok(at) => return Some(std::mem::replace(&mut few[at].1, value)),
                Err(at) if few.len() < FEW => {
                    // Most vectors stay at one or two entries, where doubling would waste most of the room.
                    few.reserve_exact(1);
                    few.insert(at, (key, value));
                    return None;
                }
                Err(_) => {}
            },
            Self::Many(many) => return many.insert(key, value),
        }
        if let Self::Few(few) = self {
            let mut many: OrdMap<K, V> = few.drain(..).collect();
            many.insert(key, value);
            *self = Self::Many(many);
        }
        None
    }

    pub(super) fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Few(few) => find(few, key).ok().map(|at| few.remove(at).1),
            Self::Many(many) => many.remove(key),
        }
    }

    /// The entry with the greatest key at or below `key`.
    pub(super) fn floor<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        match self {
            Self::Few(few) => {
                let after = few.partition_point(|(k, _)| k.borrow() <= key);
                few[..after].last().map(|(k, v)| (k, v))
            }
            Self::Many(many) => many.get_prev(key),
        }
    }

    /// Entries in key order.
    pub(super) fn iter(&self) -> Iter<'_, K, V> {
        match self {
            Self::Few(few) => Iter::Few(few.iter()),
            Self::Many(many) => Iter::Many(many.range::<_, K>(..)),
        }
    }

    /// Entries with keys at or above `key`, in key order.
    pub(super) fn iter_from(&self, key: &K) -> Iter<'_, K, V> {
        match self {
            Self::Few(few) => {
                let before = few.partition_point(|(k, _)| k < key);
                Iter::Few(few[before..].iter())
            }
            Self::Many(many) => Iter::Many(many.range::<_, K>((Bound::Included(key), Bound::Unbounded))),
        }
    }
}

fn find<K: Borrow<Q>, V, Q: Ord + ?Sized>(few: &[(K, V)], key: &Q) -> Result<usize, usize> {
    few.binary_search_by(|(k, _)| k.borrow().cmp(key))
}

pub(super) enum Iter<'a, K, V> {
    Few(std::slice::Iter<'a, (K, V)>),
    Many(imbl::ordmap::RangedIter<'a, K, V, imbl::shared_ptr::DefaultSharedPtr>),
}

impl<'a, K: Ord, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Few(few) => few.next().map(|(k, v)| (k, v)),
            Self::Many(many) => many.next(),
        }
    }
}
