//! Record sets, updates, and the file of sets that were not acknowledged.

use std::path::PathBuf;
use std::sync::OnceLock;

use bytes::Bytes;
use twinfs_core::format::{Builder, EncodedSet, SetPlace, UnverifiedSet, describe};
use twinfs_core::id::{
    Epoch, Incarnation, SessionId, SetHash, SetNumber, SiteId, VolumeInstance, VolumeName,
};
use twinfs_core::model::generate::{Change, Generator, Options};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::update::{self, sample_file};
use twinfs_replicator::primary::store;
use twinfs_replicator::site::SiteDir;

use crate::{choice, chosen, scratch};

const HEADER_FIXED: usize = 217;
const FRAME_BYTES: usize = 128 << 10;
const FRAME_ENTRY: usize = 36;
const RAW: u32 = 1 << 31;

/// Updates of all kinds, the first with sequence number 1.
pub(crate) fn changes(seed: u64, count: usize) -> Vec<Change> {
    let options = Options { write_bytes_max: 64, file_bytes: 512, copies: true, ..Options::default() };
    let mut generator = Generator::new(seed, options);
    let mut changes = generator.run(count);
    changes.append(&mut generator.copy());
    changes
}

pub(crate) fn place(number: u64, first: u64, end: Timestamp) -> SetPlace {
    SetPlace {
        session: SessionId::from_bytes([3; 16]),
        volume: VolumeName::new("data").unwrap(),
        instance: VolumeInstance::new(9).unwrap(),
        root: sample_file(2),
        epoch: Epoch { number: 1, site: SiteId::from_bytes([1; 16]) },
        incarnation: Incarnation(7),
        number: SetNumber(number),
        predecessor: if number == 1 { SetHash::NONE } else { SetHash([9; 32]) },
        first_seq: Seq(first),
        start: Timestamp::ZERO,
        end,
    }
}

pub(crate) fn set(changes: &[Change], number: u64, level: i32) -> EncodedSet {
    let mut builder = Builder::new();
    for change in changes {
        builder.push_update(&change.update, &change.data).unwrap();
    }
    let files: Vec<_> = builder.files().collect();
    for (index, file) in files.into_iter().enumerate() {
        builder.add_path(file, format!("dir/file-{index}").as_bytes());
    }
    let end = changes.last().map_or(Timestamp(1), |change| change.update.stamp.time);
    let first = changes.first().map_or(1, |change| change.update.stamp.seq.0);
    builder.finish(place(number, first, end), level).unwrap()
}

/// The numbers in a header, where there is one.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Makes the lengths and hashes of a set right, as far as its frame table tells where the frames are.
fn heal(bytes: &mut [u8]) -> Option<()> {
    let name_len = usize::from(*bytes.get(HEADER_FIXED - 1)?);
    let header_len = HEADER_FIXED + name_len;
    let body_len = u32::try_from(bytes.len().checked_sub(header_len)?).ok()?;
    bytes[10..12].copy_from_slice(&u16::try_from(header_len).ok()?.to_le_bytes());
    bytes[12..16].copy_from_slice(&body_len.to_le_bytes());
    let frames = |at| Some((word(bytes, at)? as usize).div_ceil(FRAME_BYTES));
    let count = frames(208)? + frames(212)?;
    let table = header_len..header_len + count.min(1 << 16) * FRAME_ENTRY;
    let mut at = table.end;
    for entry in table.clone().step_by(FRAME_ENTRY) {
        let len = (word(bytes, entry)? & !RAW) as usize;
        let hash = blake3::hash(bytes.get(at..at.checked_add(len)?)?);
        bytes.get_mut(entry + 4..entry + FRAME_ENTRY)?.copy_from_slice(hash.as_bytes());
        at += len;
    }
    let body_hash = blake3::hash(bytes.get(table)?);
    bytes[32..64].copy_from_slice(body_hash.as_bytes());
    seal(bytes, header_len);
    Some(())
}

/// Makes the checksum of the header right.
fn seal(bytes: &mut [u8], header_len: usize) {
    let checksum = blake3::hash(&[&bytes[..16], &bytes[32..header_len]].concat());
    bytes[16..32].copy_from_slice(&checksum.as_bytes()[..16]);
}

/// A set of one raw metadata and one raw data section, whose header and hashes are right: the rest is up to the bytes.
fn of_sections(bytes: &[u8]) -> Option<Vec<u8>> {
    let (updates, bytes) = bytes.split_first()?;
    let (meta_len, bytes) = bytes.split_first_chunk::<2>()?;
    let (meta, data) = bytes.split_at_checked(usize::from(u16::from_le_bytes(*meta_len)))?;
    // The header of a set that has just as many updates.
    let all = changes(1, 1);
    let mut set = set(&all[..1], 1, 0).bytes.to_vec();
    set.truncate(HEADER_FIXED + "data".len());
    set[108..112].copy_from_slice(&u32::from(*updates).to_le_bytes());
    set[200..208].copy_from_slice(&u64::from(u32::MAX).to_le_bytes());
    set[208..212].copy_from_slice(&u32::try_from(meta.len()).ok()?.to_le_bytes());
    set[212..216].copy_from_slice(&u32::try_from(data.len()).ok()?.to_le_bytes());
    for section in [meta, data] {
        for frame in section.chunks(FRAME_BYTES) {
            set.extend_from_slice(&(frame.len() as u32 | RAW).to_le_bytes());
            set.extend_from_slice(&[0; 32]);
        }
    }
    set.extend_from_slice(meta);
    set.extend_from_slice(data);
    heal(&mut set)?;
    Some(set)
}

/// Verifies a set, and reads all that can be read of it.
pub(crate) fn read_set(bytes: Bytes) -> bool {
    let Ok(set) = UnverifiedSet(bytes.clone()).verify() else { return false };
    assert_eq!(*set.bytes(), bytes);
    let Ok(meta) = set.meta() else { return false };
    let header = set.header();
    assert_eq!(meta.updates.len(), header.updates as usize);
    let mut text = String::new();
    describe(&set, &meta, &mut text).unwrap();
    for (update, at) in &meta.updates {
        assert!(update.stamp.time > header.start && update.stamp.time <= header.end);
        let len = update.op.data_len();
        assert!(at.checked_add(len).is_some_and(|end| end <= header.data_len));
        if let Ok(data) = set.data(*at, len) {
            assert_eq!(data.len(), len as usize);
        }
    }
    assert!(set.data(header.data_len, 1).is_err());
    true
}

pub(crate) fn record_set(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    let bytes = match how % 3 {
        0 => Some(bytes.to_vec()),
        1 => {
            let mut bytes = bytes.to_vec();
            heal(&mut bytes).map(|()| bytes)
        }
        _ => of_sections(bytes),
    };
    bytes.is_some_and(|bytes| read_set(bytes.into()))
}

pub(crate) fn record_set_seeds() -> Vec<Vec<u8>> {
    let changes = changes(1, 60);
    let (few, all) = (set(&changes[..4], 1, 0), set(&changes, 1, 3));
    let null = set(&[], 2, 0);
    let mut seeds = Vec::new();
    for set in [&few, &all, &null] {
        seeds.extend([chosen(0, &set.bytes), chosen(1, &set.bytes)]);
    }
    for changes in changes.chunks(6).take(12) {
        // Sequence numbers must start at 1, as in the header of `of_sections`.
        let renumbered: Vec<Change> = (1..)
            .zip(changes)
            .map(|(seq, change)| {
                let mut change = change.clone();
                change.update.stamp.seq = Seq(seq);
                change
            })
            .collect();
        let set = set(&renumbered, 1, 0);
        let verified = UnverifiedSet(set.bytes.clone()).verify().unwrap();
        let header = verified.header();
        let frames = &set.bytes[HEADER_FIXED + 4 + FRAME_ENTRY * (1 + usize::from(header.data_len > 0))..];
        let meta_len = u16::try_from(header.meta_len).unwrap().to_le_bytes();
        seeds.push([&[2, header.updates as u8], &meta_len[..], frames].concat());
    }
    seeds
}

pub(crate) fn update(bytes: &[u8]) -> bool {
    let owned = update::decode(bytes, 0);
    let borrowed = update::decode_borrowed(bytes, 0).map(|(update, len)| (update.into_owned(), len));
    assert_eq!(owned, borrowed);
    let _ = update::encoded_kind(bytes);
    let Ok((update, len)) = owned else { return false };
    let mut again = Vec::new();
    update::encode(&update, &mut again);
    assert_eq!(again, bytes[..len], "one update, one form");
    true
}

pub(crate) fn update_seeds() -> Vec<Vec<u8>> {
    let mut seen = std::collections::HashSet::new();
    let mut seeds = Vec::new();
    for change in changes(2, 300) {
        if seen.insert(change.update.op.kind()) {
            let mut bytes = Vec::new();
            update::encode(&change.update, &mut bytes);
            seeds.push(bytes);
        }
    }
    assert!(seen.len() >= 14, "{seen:?}");
    seeds
}

static SITE: OnceLock<PathBuf> = OnceLock::new();

pub(crate) fn unacknowledged(bytes: &[u8]) -> bool {
    let (how, bytes) = choice(bytes);
    let healed = [bytes, blake3::hash(bytes).as_bytes()].concat();
    let site = SiteDir::new(scratch(&SITE, |_| {}));
    std::fs::write(site.unacknowledged(), if how.is_multiple_of(2) { bytes } else { &healed }).unwrap();
    match store::load_sets(&site) {
        Ok(sets) => {
            assert!(sets.iter().all(|(_, set)| read_set(set.handle.clone())));
            !sets.is_empty()
        }
        Err(_) => false,
    }
}

pub(crate) fn unacknowledged_seeds() -> Vec<Vec<u8>> {
    let changes = changes(3, 20);
    let sets = [set(&changes[..5], 1, 0), set(&changes[5..], 2, 1)];
    let two = [&sets[0].bytes[..], &sets[1].bytes].concat();
    vec![
        chosen(1, &sets[0].bytes),
        chosen(1, &two),
        chosen(0, &[&two[..], blake3::hash(&two).as_bytes()].concat()),
    ]
}
