//! Which object each node number stands for, as long as the kernel knows it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use twinfs_core::id::{FileId, VolumeIndex};

use super::Topic;

/// The root of the mount, as FUSE demands.
pub(super) const ROOT: u64 = 1;
/// The directory `.twinfs`. Its files follow; the numbers of mirrored objects are none of these.
pub(super) const REPORTS: u64 = 2;
const OWN_MAX: u64 = REPORTS + Topic::ALL.len() as u64;
/// This bit marks the numbers of objects whose natural number is taken.
const SPARE: u64 = 1 << 63;

/// What a node number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Object {
    /// The directory of the volumes.
    Root,
    /// The directory `.twinfs`.
    Reports,
    /// A file in that.
    Report(Topic),
    /// An object of a volume.
    Mirrored(VolumeIndex, FileId),
}

/// The table of mirrored objects that the kernel knows. Its lock is short: nothing is read from a disk under it.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    known: HashMap<u64, Known>,
    /// The objects that do not have their natural number.
    displaced: HashMap<(VolumeIndex, FileId), u64>,
}

#[derive(Debug)]
struct Known {
    object: (VolumeIndex, FileId),
    /// The directory in which it was found last.
    parent: u64,
    /// Lookups that the kernel has not forgotten.
    lookups: u64,
}

impl Nodes {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a number stands for; `None` if the kernel has forgotten it.
    pub(super) fn get(&self, number: u64) -> Option<Object> {
        match number {
            ROOT => Some(Object::Root),
            REPORTS => Some(Object::Reports),
            0 => None,
            _ if number <= OWN_MAX => {
                Topic::ALL.get((number - REPORTS - 1) as usize).copied().map(Object::Report)
            }
            _ => {
                self.table().known.get(&number).map(|known| Object::Mirrored(known.object.0, known.object.1))
            }
        }
    }

    /// The directory in which an object was found last.
    pub(super) fn parent(&self, number: u64) -> u64 {
        self.table().known.get(&number).map_or(ROOT, |known| known.parent)
    }

    /// The numbers that objects have, or would get.
    pub(super) fn numbers(&self, objects: impl IntoIterator<Item = Object>) -> Vec<u64> {
        let table = self.table();
        objects.into_iter().map(|object| table.number(object)).collect()
    }

    /// Counts a lookup of an object, and returns its number.
    pub(super) fn learn(&self, object: Object, parent: u64) -> u64 {
        let mut table = self.table();
        let number = table.number(object);
        if let Object::Mirrored(volume, file) = object {
            let object = (volume, file);
            let known = table.known.entry(number).or_insert(Known { object, parent, lookups: 0 });
            known.lookups += 1;
            known.parent = parent;
            if number != natural(volume, file) {
                table.displaced.insert(object, number);
            }
        }
        number
    }

    /// Takes back some lookups.
    pub(super) fn forget(&self, number: u64, lookups: u64) {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            let object = known.object;
            table.known.remove(&number);
            table.displaced.remove(&object);
        }
    }

    #[cfg(test)]
    fn len(&self) -> (usize, usize) {
        let table = self.table();
        (table.known.len(), table.displaced.len())
    }
}

impl Table {
    fn number(&self, object: Object) -> u64 {
        let (volume, file) = match object {
            Object::Root => return ROOT,
            Object::Reports => return REPORTS,
            Object::Report(topic) => return REPORTS + 1 + topic as u64,
            Object::Mirrored(volume, file) => (volume, file),
        };
        if let Some(number) = self.displaced.get(&(volume, file)) {
            return *number;
        }
        let suits = |number: &u64| {
            let known = self.known.get(number);
            *number > OWN_MAX && known.is_none_or(|known| known.object == (volume, file))
        };
        let natural = natural(volume, file);
        if suits(&natural) {
            return natural;
        }
        // Two files that had one inode number after each other, or that were born in different trees. The same spare
        // number each time, as far as possible: programs remember inode numbers.
        let mut hasher = DefaultHasher::new();
        (volume, file).hash(&mut hasher);
        let first = hasher.finish();
        let mut spare = (0..).map(|step| first.wrapping_add(step) | SPARE);
        spare.find(suits).expect("the kernel does not know 2^63 objects")
    }
}

/// Made of the volume and of the inode number at the primary, so that it is the same after a restart.
fn natural(volume: VolumeIndex, file: FileId) -> u64 {
    ((u64::from(volume.0) + 1) << 48) ^ file.ino
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::update::sample_file;

    fn object(volume: u16, ino: u64, generation: u32) -> Object {
        Object::Mirrored(VolumeIndex(volume), FileId { generation, ..sample_file(ino) })
    }

    #[test]
    fn each_object_has_one_number_and_each_number_one_object() {
        let nodes = Nodes::default();
        // The same inode in two volumes, two generations of it, and inodes that would lead to numbers in use.
        let objects = [
            object(0, 7, 1),
            object(0, 7, 2),
            object(0, 7, 3),
            object(1, 7, 1),
            object(0, (1 << 48) ^ ROOT, 1),
            object(0, (1 << 48) ^ (REPORTS + 2), 1),
            object(0, 1 << 48, 1),
            object(1, (1 << 48) ^ (2 << 48) ^ 7, 1),
        ];
        let numbers: Vec<u64> = objects.iter().map(|object| nodes.learn(*object, ROOT)).collect();
        let mut distinct = numbers.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), objects.len());
        assert_eq!(nodes.numbers(objects), numbers);
        for (object, number) in objects.iter().zip(&numbers) {
            assert_eq!(nodes.get(*number), Some(*object));
            assert_eq!(nodes.learn(*object, 9), *number);
            assert_eq!(nodes.parent(*number), 9);
        }
        // What is displaced stays so while the kernel knows it, and gets the same number later.
        nodes.forget(numbers[0], 2);
        assert_eq!(nodes.get(numbers[0]), None);
        assert_eq!(nodes.numbers([objects[1]]), [numbers[1]]);
        assert_eq!(nodes.learn(objects[0], ROOT), numbers[0]);
        nodes.forget(numbers[1], 2);
        assert_eq!(nodes.numbers([objects[1]]), [numbers[1]]);
        nodes.forget(numbers[0], 1);
        for number in &numbers[2..] {
            nodes.forget(*number, 1);
            assert!(nodes.get(*number).is_some());
            nodes.forget(*number, 1);
        }
        assert_eq!(nodes.len(), (0, 0));
    }

    #[test]
    fn own_objects_have_fixed_numbers() {
        let nodes = Nodes::default();
        let own = Topic::ALL.map(Object::Report).into_iter().chain([Object::Root, Object::Reports]);
        for object in own {
            assert_eq!(nodes.get(nodes.learn(object, ROOT)), Some(object));
        }
        assert_eq!(nodes.get(0), None);
        assert_eq!(nodes.get(OWN_MAX + 1), None);
        assert_eq!(nodes.len(), (0, 0));
    }
}
