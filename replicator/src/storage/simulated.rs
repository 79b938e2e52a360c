//! A disk in memory that forgets, tears and reorders what was not synced.
//!
//! Each file has a *live* content (what reads see), a *durable* one (what was synced) and the list of changes between
//! them. [`SimStorage::crash`] draws what a power cut leaves: for each sector that changed since the last sync any of
//! its versions may have reached the medium, whatever became of the others. Sectors never tear inside. The same holds
//! for sizes and for names. All choices come from seeds: the same calls give the same bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::power::{Power, Pulse};
use super::{File, Operation, Storage, StorageError, StorageFile, Trust, check_name};

/// Bytes that a simulated disk writes whole or not at all.
pub const SECTOR_BYTES: usize = 512;

/// One failure to come.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The operation that fails. A write fails half done.
    pub operation: Operation,
    /// How many such operations succeed before it.
    pub after: u64,
    /// What it answers.
    pub errno: Errno,
}

/// How much of an operation happens before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// All of it; when the power goes in its middle, a crash image decides.
    Whole,
    /// Half of a write; nothing of any other operation.
    Half,
    /// The power is off.
    Nothing,
}

type Sector = Arc<[u8; SECTOR_BYTES]>;

/// A file's bytes; sectors never written read as zeros.
#[derive(Debug, Clone, Default)]
struct Content {
    size: u64,
    sectors: BTreeMap<u64, Sector>,
}

#[derive(Debug, Clone)]
enum Change {
    Size(u64),
    Truncate(u64),
    Sector(u64, Sector),
}

impl Content {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Size(size) => self.size = self.size.max(*size),
            Change::Truncate(size) => {
                self.size = *size;
                self.cut_at_size();
            }
            Change::Sector(number, sector) => {
                self.sectors.insert(*number, Arc::clone(sector));
            }
        }
    }

    /// Drops what stands beyond the size: a size that was lost takes it along.
    fn cut_at_size(&mut self) {
        self.sectors.split_off(&self.size.div_ceil(SECTOR_BYTES as u64));
        let (last, inside) = (self.size / SECTOR_BYTES as u64, (self.size % SECTOR_BYTES as u64) as usize);
        if let Some(sector) = self.sectors.get_mut(&last) {
            Arc::make_mut(sector)[inside..].fill(0);
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (number, inside) = (at / SECTOR_BYTES as u64, (at % SECTOR_BYTES as u64) as usize);
            let len = rest.len().min(SECTOR_BYTES - inside);
            let (head, tail) = rest.split_at_mut(len);
            match self.sectors.get(&number) {
                Some(sector) => head.copy_from_slice(&sector[inside..inside + len]),
                None => head.fill(0),
            }
            at += len as u64;
            rest = tail;
        }
    }

    /// The changes that writing `bytes` at `offset` makes, in order of offset.
    fn changes(&self, mut bytes: &[u8], offset: u64) -> Vec<Change> {
        let mut at = offset;
        let mut changes = Vec::new();
        while !bytes.is_empty() {
            let (number, inside) = (at / SECTOR_BYTES as u64, (at % SECTOR_BYTES as u64) as usize);
            let (head, tail) = bytes.split_at(bytes.len().min(SECTOR_BYTES - inside));
            let mut sector = self.sectors.get(&number).map_or([0; SECTOR_BYTES], |s| **s);
            sector[inside..inside + head.len()].copy_from_slice(head);
            changes.push(Change::Sector(number, Arc::new(sector)));
            at += head.len() as u64;
            bytes = tail;
        }
        changes.push(Change::Size(at));
        changes
    }
}

#[derive(Debug, Default)]
struct Inode {
    live: Content,
    durable: Content,
    unsynced: Vec<Change>,
}

type InodeNumber = u64;

#[derive(Debug, Default)]
struct Disk {
    inodes: BTreeMap<InodeNumber, Inode>,
    names: BTreeMap<String, InodeNumber>,
    durable_names: BTreeMap<String, InodeNumber>,
    unsynced_names: Vec<NameChange>,
    next_inode: InodeNumber,
    free_bytes: u64,
    faults: Vec<Fault>,
    power: Power,
    random: Random,
}

impl Disk {
    /// To be called first by every operation: answers how much of it happens, and its failure, if one is due.
    fn enter(&mut self, operation: Operation, name: &str) -> (Effect, Result<(), StorageError>) {
        let dead = StorageError::new(operation, name, Errno::IO);
        let pulse = match operation.changes() {
            true => self.power.change(),
            false if self.power.is_off() => Pulse::Off,
            false => Pulse::On,
        };
        match pulse {
            Pulse::On => {}
            Pulse::Cut => return (Effect::Whole, Err(dead)),
            Pulse::Off => return (Effect::Nothing, Err(dead)),
        }
        let mut failing = None;
        for (index, fault) in self.faults.iter_mut().enumerate().filter(|(_, f)| f.operation == operation) {
            match fault.after.checked_sub(1) {
                Some(after) => fault.after = after,
                None => failing = failing.or(Some(index)),
            }
        }
        match failing {
            Some(index) => {
                let errno = self.faults.remove(index).errno;
                (Effect::Half, Err(StorageError::new(operation, name, errno)))
            }
            None => (Effect::Whole, Ok(())),
        }
    }

    /// [`enter`](Self::enter) for operations that change nothing.
    fn look(&mut self, operation: Operation, name: &str) -> Result<(), StorageError> {
        self.enter(operation, name).1
    }

    fn inode(&mut self, number: InodeNumber) -> &mut Inode {
        self.inodes.get_mut(&number).expect("inodes are kept as long as their disk")
    }

    fn set_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.unsynced_names.push(change);
    }

    /// Takes room for a file that grows to `size`.
    fn reserve(&mut self, inode: InodeNumber, name: &str, size: u64) -> Result<(), StorageError> {
        let more = size.saturating_sub(self.inode(inode).live.size);
        match self.free_bytes.checked_sub(more) {
            Some(rest) => self.free_bytes = rest,
            None => return Err(StorageError::new(Operation::Allocate, name, Errno::NOSPC)),
        }
        Ok(())
    }

    fn change(&mut self, inode: InodeNumber, changes: &[Change]) {
        let inode = self.inode(inode);
        for change in changes {
            inode.live.apply(change);
        }
        inode.unsynced.extend_from_slice(changes);
    }
}

/// A name made or removed; or moved, which happens as a whole.
#[derive(Debug, Clone)]
struct NameChange {
    name: String,
    inode: Option<InodeNumber>,
    /// The name that goes when this one comes.
    from: Option<String>,
}

impl NameChange {
    fn new(name: &str, inode: Option<InodeNumber>) -> Self {
        Self { name: name.to_owned(), inode, from: None }
    }

    fn apply(&self, names: &mut BTreeMap<String, InodeNumber>) {
        if let Some(from) = &self.from {
            names.remove(from);
        }
        match self.inode {
            Some(inode) => names.insert(self.name.clone(), inode),
            None => names.remove(&self.name),
        };
    }
}

/// A simulated directory on a simulated disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct SimStorage {
    disk: Arc<Mutex<Disk>>,
}

impl SimStorage {
    /// An empty disk with 1 TiB of room.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::of(Disk { free_bytes: 1 << 40, random: Random(seed), ..Disk::default() })
    }

    fn of(disk: Disk) -> Self {
        Self { disk: Arc::new(Mutex::new(disk)) }
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the room that is left, in bytes.
    pub fn set_free_bytes(&self, bytes: u64) {
        self.lock().free_bytes = bytes;
    }

    /// Plans a failure.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Runs on this power from now on, instead of one of its own.
    #[must_use]
    pub fn powered_by(self, power: &Power) -> Self {
        self.lock().power = power.clone();
        self
    }

    /// [`Power::cut_at`]
    pub fn cut_power_at(&self, change: u64) {
        self.lock().power.cut_at(change);
    }

    /// [`Power::changes`]
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.lock().power.changes()
    }

    /// What the disk may hold after a power cut now. Seed 0 loses everything that was not synced, seed 1 keeps
    /// everything, the others draw.
    #[must_use]
    pub fn crash(&self, seed: u64) -> Self {
        let disk = self.lock();
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x7477_696e_6673);
        let policy = match seed {
            0 => Survival::Nothing,
            1 => Survival::Everything,
            _ if random.below(3) == 0 => Survival::Prefix,
            _ => Survival::Any,
        };
        let mut names = disk.durable_names.clone();
        let kept = policy.draw(&mut random, &disk.unsynced_names, |change| change.name.clone());
        kept.iter().for_each(|change| change.apply(&mut names));
        let mut image = Disk {
            free_bytes: disk.free_bytes,
            next_inode: disk.next_inode,
            random: random.clone(),
            ..Disk::default()
        };
        for inode in names.values() {
            let before = &disk.inodes[inode];
            let mut content = before.durable.clone();
            let key = |change: &Change| match change {
                Change::Size(_) | Change::Truncate(_) => u64::MAX,
                Change::Sector(number, _) => *number,
            };
            let kept = policy.draw(&mut random, &before.unsynced, key);
            kept.iter().for_each(|change| content.apply(change));
            content.cut_at_size();
            image
                .inodes
                .insert(*inode, Inode { live: content.clone(), durable: content, unsynced: Vec::new() });
        }
        image.durable_names.clone_from(&names);
        image.names = names;
        Self::of(image)
    }

    /// The same disk as a new process finds it after the old one died: everything written is there, synced or not,
    /// failed syncs are forgotten, and so are planned failures and power cuts.
    #[must_use]
    pub fn restart(&self) -> Self {
        let disk = self.lock();
        let copy = |inode: &Inode| Inode {
            live: inode.live.clone(),
            durable: inode.durable.clone(),
            unsynced: inode.unsynced.clone(),
        };
        Self::of(Disk {
            inodes: disk.inodes.iter().map(|(number, inode)| (*number, copy(inode))).collect(),
            names: disk.names.clone(),
            durable_names: disk.durable_names.clone(),
            unsynced_names: disk.unsynced_names.clone(),
            next_inode: disk.next_inode,
            free_bytes: disk.free_bytes,
            random: disk.random.clone(),
            ..Disk::default()
        })
    }

    /// All bytes of a file, as reads see them; `None` if there is no such file.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let disk = self.lock();
        let content = &disk.inodes[disk.names.get(name)?].live;
        let mut bytes = vec![0; usize::try_from(content.size).ok()?];
        content.read(&mut bytes, 0);
        Some(bytes)
    }

    /// Puts a durable file with these bytes there, in place of any other: how tests damage what was written.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let mut disk = self.lock();
        let mut content = Content::default();
        let changes = content.changes(bytes, 0);
        changes.iter().for_each(|change| content.apply(change));
        let number = disk.next_inode;
        disk.next_inode += 1;
        let inode = Inode { live: content.clone(), durable: content, unsynced: Vec::new() };
        disk.inodes.insert(number, inode);
        disk.names.insert(name.to_owned(), number);
        disk.durable_names.insert(name.to_owned(), number);
    }
}

/// Which unsynced changes reach the medium.
#[derive(Debug, Clone, Copy)]
enum Survival {
    Nothing,
    Everything,
    /// The first ones.
    Prefix,
    /// Of each key (sector, name) any version, independently.
    Any,
}

impl Survival {
    fn draw<T: Clone, K: Ord>(self, random: &mut Random, changes: &[T], key: impl Fn(&T) -> K) -> Vec<T> {
        let count = changes.len();
        match self {
            Self::Nothing => Vec::new(),
            Self::Everything => changes.to_vec(),
            Self::Prefix => changes[..random.below(count as u64 + 1) as usize].to_vec(),
            Self::Any => {
                let mut versions: BTreeMap<K, Vec<&T>> = BTreeMap::new();
                for change in changes {
                    versions.entry(key(change)).or_default().push(change);
                }
                let draw = |versions: &Vec<&T>| {
                    let survivor = random.below(versions.len() as u64 + 1) as usize;
                    survivor.checked_sub(1).map(|index| versions[index].clone())
                };
                versions.values().filter_map(draw).collect()
            }
        }
    }
}

impl Storage for SimStorage {
    fn create(&self, name: &str) -> Result<File, StorageError> {
        check_name(name)?;
        let mut disk = self.lock();
        let (effect, result) = disk.enter(Operation::Create, name);
        if disk.names.contains_key(name) {
            return result.and(Err(StorageError::new(Operation::Create, name, Errno::EXIST)));
        }
        let number = disk.next_inode;
        if effect == Effect::Whole {
            disk.next_inode += 1;
            disk.inodes.insert(number, Inode::default());
            disk.set_name(NameChange::new(name, Some(number)));
        }
        result.map(|()| self.file(name, number))
    }

    fn open(&self, name: &str) -> Result<File, StorageError> {
        check_name(name)?;
        let mut disk = self.lock();
        disk.look(Operation::Open, name)?;
        let number = *disk.names.get(name).ok_or(StorageError::new(Operation::Open, name, Errno::NOENT))?;
        Ok(self.file(name, number))
    }

    fn list(&self) -> Result<Vec<String>, StorageError> {
        let mut disk = self.lock();
        disk.look(Operation::List, "")?;
        Ok(disk.names.keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        check_name(name)?;
        let mut disk = self.lock();
        let (effect, result) = disk.enter(Operation::Remove, name);
        let Some(number) = disk.names.get(name).copied() else {
            return result.and(Err(StorageError::new(Operation::Remove, name, Errno::NOENT)));
        };
        if effect == Effect::Whole {
            disk.free_bytes += disk.inodes[&number].live.size;
            disk.set_name(NameChange::new(name, None));
        }
        result
    }

    fn rename(&self, name: &str, to: &str) -> Result<(), StorageError> {
        check_name(name)?;
        check_name(to)?;
        let mut disk = self.lock();
        let (effect, result) = disk.enter(Operation::Rename, name);
        let Some(number) = disk.names.get(name).copied() else {
            return result.and(Err(StorageError::new(Operation::Rename, name, Errno::NOENT)));
        };
        if effect == Effect::Whole {
            disk.set_name(NameChange { from: Some(name.to_owned()), ..NameChange::new(to, Some(number)) });
        }
        result
    }

    fn sync_dir(&self) -> Result<(), StorageError> {
        let mut disk = self.lock();
        disk.enter(Operation::SyncDir, "").1?;
        disk.durable_names = disk.names.clone();
        disk.unsynced_names.clear();
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64, StorageError> {
        let mut disk = self.lock();
        disk.look(Operation::Free, "")?;
        Ok(disk.free_bytes)
    }

    fn salt(&self) -> Result<[u8; 16], StorageError> {
        let mut disk = self.lock();
        disk.look(Operation::Salt, "")?;
        let mut salt = [0; 16];
        for half in salt.chunks_exact_mut(8) {
            half.copy_from_slice(&disk.random.next().to_le_bytes());
        }
        Ok(salt)
    }
}

impl SimStorage {
    fn file(&self, name: &str, inode: InodeNumber) -> File {
        Arc::new(SimFile { storage: self.clone(), name: name.to_owned(), inode, trust: Trust::default() })
    }
}

#[derive(Debug)]
struct SimFile {
    storage: SimStorage,
    name: String,
    inode: InodeNumber,
    trust: Trust,
}

impl StorageFile for SimFile {
    fn size(&self) -> Result<u64, StorageError> {
        let mut disk = self.storage.lock();
        disk.look(Operation::Size, &self.name)?;
        Ok(disk.inode(self.inode).live.size)
    }

    fn allocate(&self, size: u64) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        let mut disk = self.storage.lock();
        let (effect, result) = disk.enter(Operation::Allocate, &self.name);
        if effect == Effect::Whole {
            disk.reserve(self.inode, &self.name, size)?;
            disk.change(self.inode, &[Change::Size(size)]);
        }
        result
    }

    fn truncate(&self, size: u64) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        let mut disk = self.storage.lock();
        let (effect, result) = disk.enter(Operation::Truncate, &self.name);
        let less = disk.inode(self.inode).live.size.saturating_sub(size);
        if effect == Effect::Whole && less > 0 {
            disk.free_bytes += less;
            disk.change(self.inode, &[Change::Truncate(size)]);
        }
        result
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), StorageError> {
        let mut disk = self.storage.lock();
        disk.look(Operation::Read, &self.name)?;
        let content = &disk.inode(self.inode).live;
        let end = offset.saturating_add(buf.len() as u64);
        if end > content.size {
            return Err(StorageError::EndsEarly { name: self.name.clone(), end });
        }
        content.read(buf, offset);
        Ok(())
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        let bytes = parts.concat();
        let mut disk = self.storage.lock();
        let (effect, result) = disk.enter(Operation::Write, &self.name);
        let written = match effect {
            Effect::Whole => bytes.as_slice(),
            Effect::Half => &bytes[..bytes.len() / 2],
            Effect::Nothing => return result,
        };
        disk.reserve(self.inode, &self.name, offset + written.len() as u64)?;
        let changes = disk.inode(self.inode).live.changes(written, offset);
        disk.change(self.inode, &changes);
        result
    }

    fn sync_data(&self) -> Result<(), StorageError> {
        self.trust.check(&self.name)?;
        let mut disk = self.storage.lock();
        let (effect, result) = disk.enter(Operation::SyncData, &self.name);
        let inode = disk.inode(self.inode);
        if result.is_ok() {
            for change in inode.unsynced.drain(..) {
                inode.durable.apply(&change);
            }
        } else if effect == Effect::Half {
            // As Linux does it: the pages are marked clean, reads still see them, the medium never will.
            inode.unsynced.clear();
        }
        self.trust.after_sync(result)
    }

    fn settle(&self) -> Result<(), StorageError> {
        self.sync_data()?;
        let mut disk = self.storage.lock();
        let inode = disk.inode(self.inode);
        inode.live = inode.durable.clone();
        Ok(())
    }
}

/// SplitMix64 (Steele, Lea, Flood): small, seeded, good enough to draw faults.
#[derive(Debug, Clone, Default)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(storage: &SimStorage) -> File {
        let file = storage.create("f").unwrap();
        file.allocate(2048).unwrap();
        file.write_at(&[&[1; 1536]], 0).unwrap();
        file.sync_data().unwrap();
        storage.sync_dir().unwrap();
        file
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_any_mix_of_the_rest() {
        let storage = SimStorage::new(1);
        let file = written(&storage);
        file.write_at(&[&[2; 1536]], 256).unwrap();
        let sectors = |seed| {
            let bytes = storage.crash(seed).bytes("f").unwrap();
            assert_eq!(bytes[..256], [1; 256]);
            [bytes[256], bytes[512], bytes[1024], bytes[1536]]
        };
        assert_eq!(sectors(0), [1, 1, 1, 0]);
        assert_eq!(sectors(1), [2, 2, 2, 2]);
        let seen: std::collections::BTreeSet<_> = (0..200).map(sectors).collect();
        assert_eq!(seen.len(), 16, "every mix of four sectors happens");
        assert_eq!((0..20).map(sectors).collect::<Vec<_>>(), (0..20).map(sectors).collect::<Vec<_>>());
        file.sync_data().unwrap();
        assert!((0..50).all(|seed| sectors(seed) == [2; 4]));
    }

    #[test]
    fn names_and_sizes_are_durable_only_once_they_are_synced() {
        let storage = SimStorage::new(1);
        let old = written(&storage);
        storage.create("new").unwrap();
        storage.remove("f").unwrap();
        old.allocate(4096).unwrap();
        let seen: std::collections::BTreeSet<_> =
            (0..100).map(|seed| storage.crash(seed).list().unwrap()).collect();
        assert_eq!(seen.len(), 4);
        let size = |seed| storage.crash(seed).bytes("f").map(|bytes| bytes.len());
        assert!(
            (0..100).any(|seed| size(seed) == Some(2048)) && (0..100).any(|seed| size(seed) == Some(4096))
        );
        storage.sync_dir().unwrap();
        assert!((0..100).all(|seed| storage.crash(seed).list().unwrap() == ["new"]));
        storage.rename("new", "newer").unwrap();
        let seen: std::collections::BTreeSet<_> =
            (0..100).map(|seed| storage.crash(seed).list().unwrap()).collect();
        assert_eq!(
            seen.into_iter().flatten().collect::<Vec<_>>(),
            ["new", "newer"],
            "never both, never none"
        );
    }

    #[test]
    fn a_failed_sync_loses_what_reads_still_show() {
        let storage = SimStorage::new(1);
        let file = written(&storage);
        file.write_at(&[&[2; 512]], 0).unwrap();
        storage.inject(Fault { operation: Operation::SyncData, after: 0, errno: Errno::IO });
        assert!(matches!(file.sync_data(), Err(StorageError::Io { errno: Errno::IO, .. })));
        for result in [file.sync_data(), file.settle(), file.write_at(&[b"x"], 0), file.allocate(9000)] {
            assert_eq!(result, Err(StorageError::Failed { name: "f".to_owned() }));
        }
        let disk = storage.restart();
        assert_eq!(disk.bytes("f").unwrap()[0], 2, "the cache shows it");
        let file = disk.open("f").unwrap();
        file.sync_data().unwrap();
        assert_eq!(disk.crash(0).bytes("f").unwrap()[0], 1, "a sync that succeeds does not bring it back");
        file.settle().unwrap();
        assert_eq!(disk.bytes("f").unwrap()[0], 1);
    }

    #[test]
    fn a_power_cut_ends_everything_in_the_middle_of_a_change() {
        let storage = SimStorage::new(1);
        let file = written(&storage);
        let at = storage.changes() + 2;
        storage.cut_power_at(at);
        file.write_at(&[&[2; 512]], 0).unwrap();
        file.write_at(&[&[3; 512]], 512).unwrap_err();
        file.write_at(&[&[4; 512]], 1024).unwrap_err();
        file.sync_data().unwrap_err();
        storage.list().unwrap_err();
        let bytes = storage.crash(1).bytes("f").unwrap();
        assert_eq!([bytes[0], bytes[512], bytes[1024]], [2, 3, 1]);
    }

    #[test]
    fn a_full_disk_refuses_what_does_not_fit() {
        let storage = SimStorage::new(1);
        storage.set_free_bytes(4096);
        let file = written(&storage);
        assert_eq!(storage.free_bytes().unwrap(), 2048);
        assert!(file.allocate(4097).unwrap_err().is_no_space());
        assert!(file.write_at(&[&[1; 2049]], 2048).unwrap_err().is_no_space());
        file.write_at(&[&[1; 2048]], 2048).unwrap();
        storage.remove("f").unwrap();
        assert_eq!(storage.free_bytes().unwrap(), 4096);
    }
}
