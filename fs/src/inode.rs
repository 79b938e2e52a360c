//! The objects that the kernel knows.
//!
//! A node id is the object's inode number in the backing file system (the root of the mount is 1, as FUSE demands), so
//! programs see the inode numbers that they would see without the mirror. A node lives from its first lookup until the
//! kernel forgets it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twinfs_core::id::FileId;
use twinfs_core::limits;
use twinfs_core::update::Kind;

/// The node id of a mount's root directory.
pub const ROOT: u64 = 1;

const SHARDS: usize = 64;

/// What is known of a node, copied out of the table.
#[derive(Debug, Clone)]
pub struct NodeRef {
    /// Its number.
    pub nodeid: u64,
    /// Its name for life.
    pub id: FileId,
    /// Its volume's place in the mirror's list.
    pub slot: usize,
    /// What kind of object it is.
    pub kind: Kind,
    /// A descriptor that must be used for it, if it has one: that of a volume's root, or of a removed object, whose
    /// handle leads nowhere any more.
    pub pin: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Node {
    id: FileId,
    slot: usize,
    kind: Kind,
    pin: Option<Arc<OwnedFd>>,
    /// Lookups that the kernel has not forgotten; `None` for the root of a volume, which stays.
    lookups: Option<u64>,
    /// Where it was seen last: a hint for people.
    parent: u64,
    name: Box<[u8]>,
}

/// The table of nodes. Its locks are short: no system call is made under them.
#[derive(Debug)]
pub struct Nodes {
    shards: Box<[Mutex<HashMap<u64, Node>>]>,
}

impl Default for Nodes {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Nodes {
    fn shard(&self, nodeid: u64) -> MutexGuard<'_, HashMap<u64, Node>> {
        // The modulus makes it fit.
        let shard = (nodeid % SHARDS as u64) as usize;
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the root directory of a volume; it stays for ever.
    pub fn add_root(&self, nodeid: u64, id: FileId, slot: usize, fd: Arc<OwnedFd>) {
        let node = Node {
            id,
            slot,
            kind: Kind::Dir,
            pin: Some(fd),
            lookups: None,
            parent: nodeid,
            name: Box::default(),
        };
        self.shard(nodeid).insert(nodeid, node);
    }

    /// What is known of a node.
    #[must_use]
    pub fn get(&self, nodeid: u64) -> Option<NodeRef> {
        let shard = self.shard(nodeid);
        let node = shard.get(&nodeid)?;
        Some(NodeRef { nodeid, id: node.id, slot: node.slot, kind: node.kind, pin: node.pin.clone() })
    }

    /// Counts a lookup of an object under a name, and adds its node if it is new.
    pub fn learn(&self, nodeid: u64, id: FileId, slot: usize, kind: Kind, parent: u64, name: &[u8]) {
        let mut shard = self.shard(nodeid);
        let node = shard.entry(nodeid).or_insert_with(|| Node {
            id,
            slot,
            kind,
            pin: None,
            lookups: Some(0),
            parent,
            name: Box::default(),
        });
        let Some(lookups) = &mut node.lookups else { return };
        *lookups += 1;
        if node.id != id {
            // Somebody removed the old object behind the mount, and its number was given away again.
            (node.id, node.slot, node.kind, node.pin) = (id, slot, kind, None);
        }
        node.parent = parent;
        if *node.name != *name {
            node.name = name.into();
        }
    }

    /// Takes back `lookups` of a node. Returns the descriptor of a removed object that nobody knows any more: closing
    /// it may free a lot of space, and so take a while.
    #[must_use]
    pub fn forget(&self, nodeid: u64, lookups: u64) -> Option<Arc<OwnedFd>> {
        let mut shard = self.shard(nodeid);
        let left = shard.get_mut(&nodeid)?.lookups.as_mut()?;
        *left = left.saturating_sub(lookups);
        if *left > 0 { None } else { shard.remove(&nodeid)?.pin }
    }

    /// Notes that an object is gone. As long as the kernel knows the node, the descriptor keeps the inode alive, for
    /// those who have it open and so that its number is not given away.
    pub fn removed(&self, nodeid: u64, id: FileId, fd: &Arc<OwnedFd>) {
        if let Some(node) = self.shard(nodeid).get_mut(&nodeid).filter(|node| node.id == id) {
            node.pin = Some(fd.clone());
        }
    }

    /// Notes that an object was given another name.
    pub fn moved(&self, nodeid: u64, parent: u64, name: &[u8]) {
        if let Some(node) = self.shard(nodeid).get_mut(&nodeid).filter(|node| node.lookups.is_some()) {
            (node.parent, node.name) = (parent, name.into());
        }
    }

    /// The path of an object below its volume's root, as far as it is known: a hint for people. Empty for the root, and
    /// if it is not known. At most [`limits::PATH_HINT_BYTES_MAX`] bytes: longer ones are cut at the front.
    #[must_use]
    pub fn path(&self, nodeid: u64, id: FileId) -> Box<[u8]> {
        let mut reversed: Vec<u8> = Vec::new();
        let mut at = nodeid;
        // Each step adds at least two bytes, so this ends, even if names were moved around while it climbed.
        while reversed.len() <= limits::PATH_HINT_BYTES_MAX {
            let shard = self.shard(at);
            let Some(node) = shard.get(&at).filter(|node| at != nodeid || node.id == id) else {
                return Box::default();
            };
            if node.lookups.is_none() {
                break;
            }
            reversed.extend(node.name.iter().rev());
            reversed.push(b'/');
            at = node.parent;
        }
        reversed.truncate(limits::PATH_HINT_BYTES_MAX);
        if reversed.last() == Some(&b'/') {
            reversed.pop();
        }
        reversed.reverse();
        reversed.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::update::sample_file;

    fn null() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    fn table() -> Nodes {
        let nodes = Nodes::default();
        nodes.add_root(ROOT, sample_file(500), 0, null());
        nodes.learn(10, sample_file(10), 0, Kind::Dir, ROOT, b"dir");
        nodes.learn(11, sample_file(11), 0, Kind::File, 10, b"file");
        nodes
    }

    #[test]
    fn a_node_lives_as_long_as_the_kernel_counts() {
        let nodes = table();
        nodes.learn(11, sample_file(11), 0, Kind::File, 10, b"file");
        let fd = null();
        nodes.removed(11, sample_file(11), &fd);
        assert!(nodes.forget(11, 1).is_none(), "one lookup is left");
        assert!(nodes.get(11).unwrap().pin.is_some());
        assert!(Arc::ptr_eq(&nodes.forget(11, 1).expect("the last one"), &fd));
        assert!(nodes.get(11).is_none());
        nodes.removed(11, sample_file(11), &fd);
        assert_eq!(Arc::strong_count(&fd), 1, "an unknown object is not pinned");
        assert!(nodes.forget(ROOT, u64::MAX).is_none());
        assert!(nodes.get(ROOT).is_some(), "the root stays");
    }

    #[test]
    fn a_number_that_was_given_away_names_the_new_object() {
        let nodes = table();
        let newer = FileId { generation: 2, ..sample_file(11) };
        nodes.learn(11, newer, 0, Kind::Symlink, 10, b"link");
        assert_eq!(nodes.get(11).unwrap().id, newer);
        assert!(nodes.path(11, sample_file(11)).is_empty());
        assert_eq!(&*nodes.path(11, newer), b"dir/link");
        assert!(nodes.forget(11, 1).is_none());
        assert!(nodes.get(11).is_some(), "the kernel still holds one lookup");
    }

    #[test]
    fn paths_follow_moves_and_are_cut_at_the_front() {
        let nodes = table();
        assert_eq!(&*nodes.path(11, sample_file(11)), b"dir/file");
        assert!(nodes.path(ROOT, sample_file(500)).is_empty());
        nodes.moved(11, ROOT, b"moved");
        assert_eq!(&*nodes.path(11, sample_file(11)), b"moved");
        let mut parent = ROOT;
        for ino in 100..150 {
            nodes.learn(ino, sample_file(ino), 0, Kind::Dir, parent, &[b'x'; 255]);
            parent = ino;
        }
        let path = nodes.path(149, sample_file(149));
        assert!((limits::PATH_HINT_BYTES_MAX - 1..=limits::PATH_HINT_BYTES_MAX).contains(&path.len()));
        assert!(path.ends_with(&[b'x'; 255]));
        nodes.moved(100, 149, b"loop");
        assert!(nodes.path(149, sample_file(149)).len() <= limits::PATH_HINT_BYTES_MAX);
    }
}
