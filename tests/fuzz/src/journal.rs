//! Journal segments: whole images, and logs written by a script, both with checksums that are right, so that what stands
//! behind them is reached. Written by the byte map in the journal's module, not with its code.

use std::sync::Arc;

use twinfs_core::id::{GroupNumber, SessionId, SetHash, SetNumber, VolumeInstance, VolumeName};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::update::sample_file;
use twinfs_replicator::replica::journal::{
    Commit, CommitBase, CommitVolume, Journal, JournalConfig, JournalError, Recovered, describe,
};
use twinfs_replicator::storage::{SimStorage, Storage};

use crate::{choice, chosen};

const SESSION: SessionId = SessionId::from_bytes([5; 16]);
const BLOCK: usize = 4096;
const HEADER: usize = 128;
const ENTRY_HEADER: usize = 64;
/// Images and logs are cut here: more bytes reach no more code.
const SEGMENT_BYTES_MAX: usize = 64 << 10;

fn name(number: u64) -> String {
    format!("{number:08}.seg")
}

fn open(storage: &SimStorage) -> Result<(Journal, Vec<Recovered>), JournalError> {
    let config = JournalConfig { segment_bytes: SEGMENT_BYTES_MAX as u64, floor_bytes: 0 };
    let (journal, recovery) = Journal::open(Arc::new(storage.clone()), SESSION, config)?;
    Ok((journal, recovery.collect::<Result<_, _>>()?))
}

/// Opens the journal and reads all of it; goes on with it if that can be done.
fn read(storage: &SimStorage) -> bool {
    for name in storage.list().unwrap() {
        let _ = describe(storage.open(&name).unwrap(), &mut String::new());
    }
    let Ok((mut journal, recovered)) = open(storage) else { return false };
    let reader = journal.reader();
    for entry in &recovered {
        if let Recovered::Set { at, bytes } = entry
            && let Ok(set) = reader.read_set(*at)
        {
            assert!(bytes.starts_with(&set));
        }
    }
    let next = commit(journal.last_commit().map_or(1, |last| last.group.0 + 1), u64::MAX >> 1);
    if journal.append_set(b"next").is_ok() && journal.append_commit(&next).is_ok() {
        journal.sync().unwrap();
        drop(journal);
        let (_, again) = open(&storage.restart()).expect("what was recovered once is recovered again");
        assert_eq!(again[..recovered.len()], recovered);
        assert_eq!(again.last(), Some(&Recovered::Commit(next)));
    }
    !recovered.is_empty()
}

fn commit(group: u64, time: u64) -> Commit {
    let volume = CommitVolume {
        volume: VolumeName::new("data").unwrap(),
        instance: VolumeInstance::new(9).unwrap(),
        root: sample_file(2),
        member: true,
        joins: group == 1,
        through: Seq(group),
        base: CommitBase {
            number: SetNumber(group),
            hash: SetHash([group as u8; 32]),
            last_seq: Seq(group),
            end: Timestamp(group),
        },
    };
    Commit { group: GroupNumber(group), time: Timestamp(time), volumes: vec![volume] }
}

fn keyed(key: blake3::Hash, bytes: &[u8]) -> [u8; 16] {
    blake3::keyed_hash(key.as_bytes(), bytes).as_bytes()[..16].try_into().unwrap()
}

/// Makes checksum and size of a segment's header right; the key of its entries.
fn heal_header(image: &mut [u8]) -> blake3::Hash {
    let len = image.len() as u64;
    image[16..32].copy_from_slice(SESSION.as_bytes());
    image[40..48].copy_from_slice(&len.to_le_bytes());
    // Near the end of the range the journal could not go on, which is no news.
    image[55] = 0;
    let sum = blake3::hash(&image[..96]);
    image[96..HEADER].copy_from_slice(sum.as_bytes());
    blake3::hash(&image[..HEADER])
}

/// Makes the checksums of an entry right; its length with padding.
fn heal_entry(key: blake3::Hash, entry: &mut [u8]) -> Option<usize> {
    let len = u32::from_le_bytes(entry.get(24..28)?.try_into().ok()?) as usize;
    let payload = keyed(key, entry.get(ENTRY_HEADER..ENTRY_HEADER.checked_add(len)?)?);
    entry[32..48].copy_from_slice(&payload);
    let header = keyed(key, &entry[..48]);
    entry[48..64].copy_from_slice(&header);
    Some(ENTRY_HEADER + len.next_multiple_of(8))
}

fn heal(image: &mut Vec<u8>) {
    image.truncate(SEGMENT_BYTES_MAX);
    let len = image.len().next_multiple_of(BLOCK).max(2 * BLOCK);
    image.resize(len, 0);
    image[HEADER..BLOCK].fill(0);
    let key = heal_header(image);
    let mut at = BLOCK;
    while at < image.len() {
        let is_entry = image[at..].starts_with(b"TWJE");
        let len = is_entry.then(|| heal_entry(key, &mut image[at..])).flatten();
        at = len.map_or((at + 1).next_multiple_of(BLOCK), |len| at + len);
    }
}

pub(crate) fn segment(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    let mut image = bytes.to_vec();
    if !how.is_multiple_of(2) {
        heal(&mut image);
    }
    let storage = SimStorage::new(1);
    storage.put(&name(1), &image);
    read(&storage)
}

/// Three batches in a segment of 16 KiB, without the zeros at its end.
fn real_segment() -> Vec<u8> {
    let storage = SimStorage::new(1);
    let config = JournalConfig { segment_bytes: 4 * BLOCK as u64, floor_bytes: 0 };
    let (mut journal, _) = Journal::open(Arc::new(storage.clone()), SESSION, config).unwrap();
    for group in 1..=3 {
        journal.append_set(&[group as u8; 40]).unwrap();
        journal.append_commit(&commit(group, group)).unwrap();
        journal.sync().unwrap();
    }
    storage.bytes(&name(1)).unwrap()
}

pub(crate) fn segment_seeds() -> Vec<Vec<u8>> {
    let image = real_segment();
    let one_batch = &image[..2 * BLOCK];
    vec![chosen(0, &image), chosen(1, &image), chosen(1, one_batch), chosen(1, &image[..BLOCK + 700])]
}

/// Writes segments as the script says.
struct Writer {
    storage: SimStorage,
    number: u64,
    image: Vec<u8>,
    key: blake3::Hash,
    entry: u64,
    synced: u64,
    salt: u8,
}

const SET: u8 = 1;
const BATCH: u8 = 4;
const SEGMENT: u8 = 5;

impl Writer {
    fn start(storage: SimStorage, number: u64, entry: u64, last_group: u8, salt: u8) -> Self {
        let mut image = vec![0; SEGMENT_BYTES_MAX];
        image[..8].copy_from_slice(b"TWINJRN\0");
        image[8] = 1;
        image[32..40].copy_from_slice(&number.to_le_bytes());
        image[48..56].copy_from_slice(&entry.to_le_bytes());
        image[56..72].fill(salt);
        image[72..88].fill(if number > 1 { salt - 1 } else { 0 });
        image[88] = last_group;
        let key = heal_header(&mut image);
        image.truncate(BLOCK);
        Self { storage, number, image, key, entry, synced: entry - 1, salt }
    }

    /// One step of the script: kind and flags, length, payload. Flags: 16 another number, 32 another place, 64 an older
    /// mark of what is durable, 128 a wrong checksum.
    fn step<'a>(&mut self, script: &'a [u8]) -> Option<&'a [u8]> {
        let ([op, len_low, len_high], rest) = script.split_first_chunk()?;
        let len = usize::from(u16::from_le_bytes([*len_low, *len_high])).min(rest.len());
        let (payload, rest) = rest.split_at(len);
        let flag = |bit: u8| u64::from(op & bit != 0);
        match op & 7 {
            BATCH => {
                let end = self.image.len().next_multiple_of(BLOCK);
                self.image.resize(end, 0);
                self.synced = self.entry - 1;
            }
            SEGMENT => {
                self.finish();
                let last_group = payload.first().copied().unwrap_or(0);
                let (number, entry) = (self.number + 1 + flag(32), self.entry + flag(16));
                *self = Self::start(
                    self.storage.clone(),
                    number,
                    entry,
                    last_group,
                    self.salt.wrapping_add(1).max(1),
                );
            }
            kind => {
                let at = self.image.len();
                let mut entry = vec![0; ENTRY_HEADER];
                entry[..4].copy_from_slice(b"TWJE");
                entry[4] = kind;
                entry[8..16].copy_from_slice(&(self.entry + flag(16)).to_le_bytes());
                entry[16..24].copy_from_slice(&(self.synced - flag(64).min(self.synced)).to_le_bytes());
                entry[24..28].copy_from_slice(&(payload.len() as u32).to_le_bytes());
                entry[28..32].copy_from_slice(&(at as u32 + 8 * flag(32) as u32).to_le_bytes());
                entry.extend_from_slice(payload);
                heal_entry(self.key, &mut entry);
                entry.resize(entry.len().next_multiple_of(8), 0);
                entry[40] ^= flag(128) as u8;
                self.image.extend_from_slice(&entry);
                self.entry += 1;
            }
        }
        Some(rest)
    }

    fn finish(&mut self) {
        self.image.resize(SEGMENT_BYTES_MAX, 0);
        self.storage.put(&name(self.number), &self.image);
    }
}

pub(crate) fn log(script: &[u8]) -> bool {
    let storage = SimStorage::new(1);
    let mut writer = Writer::start(storage.clone(), 1, 1, 0, 1);
    let mut rest = script;
    while let Some(after) = writer.step(rest)
        && writer.image.len() < SEGMENT_BYTES_MAX - BLOCK
        && writer.number < 5
    {
        rest = after;
    }
    writer.finish();
    read(&storage)
}

/// The payloads of commits in a segment that the journal wrote.
fn commits(image: &[u8]) -> Vec<Vec<u8>> {
    let starts = (0..image.len() - ENTRY_HEADER).filter(|at| image[*at..].starts_with(b"TWJE\x02"));
    starts
        .map(|at| {
            let len = u32::from_le_bytes(image[at + 24..at + 28].try_into().unwrap()) as usize;
            image[at + ENTRY_HEADER..at + ENTRY_HEADER + len].to_vec()
        })
        .collect()
}

pub(crate) fn log_seeds() -> Vec<Vec<u8>> {
    let step = |op: u8, payload: &[u8]| {
        let len = u16::try_from(payload.len()).unwrap().to_le_bytes();
        [&[op], &len[..], payload].concat()
    };
    let commits = commits(&real_segment());
    let [first, second, third] = <[Vec<u8>; 3]>::try_from(commits).unwrap();
    let batch = [step(SET, b"a set"), step(2, &first), step(BATCH, b""), step(SET, b"more")].concat();
    let two =
        [&batch[..], &step(2, &second), &step(SEGMENT, &[2]), &step(3, &second), &step(2, &third)].concat();
    let torn = [&batch[..], &step(SET | 128, b"torn"), &step(SET, b"after it")].concat();
    let gap = [&batch[..], &step(SET | 16, b"another number")].concat();
    vec![batch, two, torn, gap]
}
