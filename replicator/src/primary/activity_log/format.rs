//! The bytes of an era's file: see the byte map of the [module](super).

use twinfs_core::id::{FileId, SessionId, VolumeIndex};
use twinfs_core::stamp::Timestamp;

use super::EraId;

/// The first bytes of every file of the log, of any version.
pub const ACTIVITY_MAGIC: [u8; 8] = *b"TWINACT\0";
/// The version that this program reads and writes.
pub const ACTIVITY_VERSION: u32 = 1;
/// What a batch starts at a multiple of, so that no write touches a block that an earlier sync made durable.
pub(super) const BLOCK_BYTES: u64 = 4096;
/// What disks write whole or not at all: every sector of the log can be told from a torn one.
pub(super) const SECTOR_BYTES: usize = 512;
const HEADER_BYTES: usize = 96;
const SUMMED_BYTES: usize = HEADER_BYTES - blake3::OUT_LEN;
const SUM_BYTES: usize = 16;
const SECTOR_HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 24;
/// Files that one sector names.
pub(super) const SECTOR_ENTRIES: usize = (SECTOR_BYTES - SECTOR_HEADER_BYTES) / ENTRY_BYTES;
const LAST: u8 = 1;
const EVERYTHING: u8 = 2;

const _: () = assert!(SECTOR_HEADER_BYTES + SECTOR_ENTRIES * ENTRY_BYTES == SECTOR_BYTES);

/// A file of a volume.
pub(super) type Entry = (VolumeIndex, FileId);

/// Keys the checksums of an era's sectors: those of another file of the log fail here.
#[derive(Debug, Clone, Copy)]
pub(super) struct EraKey([u8; blake3::KEY_LEN]);

/// What an era's file says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EraHeader {
    pub(super) session: SessionId,
    pub(super) era: EraId,
    pub(super) start: Timestamp,
    pub(super) salt: [u8; 16],
}

/// Why a file has no header that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadHeader {
    /// It is whole, and of a version that this program does not know.
    Version(u32),
    Damaged(&'static str),
}

impl EraHeader {
    /// The first block of the file, and the key of its sectors.
    pub(super) fn encode(&self) -> (Vec<u8>, EraKey) {
        let mut bytes = Vec::with_capacity(BLOCK_BYTES as usize);
        bytes.extend_from_slice(&ACTIVITY_MAGIC);
        bytes.extend_from_slice(&ACTIVITY_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(self.session.as_bytes());
        bytes.extend_from_slice(&self.era.0.to_le_bytes());
        bytes.extend_from_slice(&self.start.0.to_le_bytes());
        bytes.extend_from_slice(&self.salt);
        bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
        let key = EraKey(*blake3::hash(&bytes).as_bytes());
        bytes.resize(BLOCK_BYTES as usize, 0);
        (bytes, key)
    }

    /// Reads the header of a file.
    pub(super) fn decode(file: &[u8]) -> Result<(Self, EraKey), BadHeader> {
        let Some((block, _)) = file.split_at_checked(BLOCK_BYTES as usize) else {
            return Err(BadHeader::Damaged("the header ends too early"));
        };
        let (header, rest) = block.split_at(HEADER_BYTES);
        let mut fields = header;
        let magic: [u8; 8] = take(&mut fields);
        let version = u32::from_le_bytes(take(&mut fields));
        // In all versions the checksum stands there, so that rot is not taken for another version.
        if magic != ACTIVITY_MAGIC
            || *blake3::hash(&header[..SUMMED_BYTES]).as_bytes() != header[SUMMED_BYTES..]
        {
            return Err(BadHeader::Damaged("the header is not one, or its checksum is wrong"));
        }
        if version != ACTIVITY_VERSION {
            return Err(BadHeader::Version(version));
        }
        let zero: [u8; 4] = take(&mut fields);
        if zero != [0; 4] || rest.iter().any(|byte| *byte != 0) {
            return Err(BadHeader::Damaged("bytes after the header"));
        }
        let this = Self {
            session: SessionId::from_bytes(take(&mut fields)),
            era: EraId(u64::from_le_bytes(take(&mut fields))),
            start: Timestamp(u64::from_le_bytes(take(&mut fields))),
            salt: take(&mut fields),
        };
        Ok((this, EraKey(*blake3::hash(header).as_bytes())))
    }
}

/// Takes a field off bytes whose length was checked.
fn take<const N: usize>(fields: &mut &[u8]) -> [u8; N] {
    let (head, tail) = fields.split_first_chunk().expect("the caller checked the length of the whole");
    *fields = tail;
    *head
}

/// Bytes of a batch, zeros up to the end of its last block included.
pub(super) const fn batch_bytes(entries: usize) -> u64 {
    let sectors = if entries == 0 { 1 } else { entries.div_ceil(SECTOR_ENTRIES) };
    ((sectors * SECTOR_BYTES) as u64).next_multiple_of(BLOCK_BYTES)
}

/// The bytes of a batch that is to stand at byte `at`.
pub(super) fn encode_batch(
    key: &EraKey,
    number: u64,
    at: u64,
    entries: &[Entry],
    everything: bool,
) -> Vec<u8> {
    let mut bytes = vec![0; batch_bytes(entries.len()) as usize];
    let sectors = entries.len().div_ceil(SECTOR_ENTRIES).max(1);
    let first = at / SECTOR_BYTES as u64;
    for (index, sector) in bytes.chunks_exact_mut(SECTOR_BYTES).take(sectors).enumerate() {
        let from = index * SECTOR_ENTRIES;
        let held = &entries[from..entries.len().min(from + SECTOR_ENTRIES)];
        let last = if index + 1 == sectors { LAST } else { 0 };
        let flags = last | if everything { EVERYTHING } else { 0 };
        sector[16..24].copy_from_slice(&number.to_le_bytes());
        sector[24..28].copy_from_slice(&((first + index as u64) as u32).to_le_bytes());
        sector[28] = held.len() as u8;
        sector[29] = flags;
        for (place, (volume, file)) in sector[SECTOR_HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES).zip(held) {
            place[..2].copy_from_slice(&volume.0.to_le_bytes());
            place[4..].copy_from_slice(&file.to_bytes());
        }
        let sum = sum_of(key, sector);
        sector[..SUM_BYTES].copy_from_slice(&sum);
    }
    bytes
}

fn sum_of(key: &EraKey, sector: &[u8]) -> [u8; SUM_BYTES] {
    let mut sum = [0; SUM_BYTES];
    sum.copy_from_slice(&blake3::keyed_hash(&key.0, &sector[SUM_BYTES..]).as_bytes()[..SUM_BYTES]);
    sum
}

/// A sector that passed its checksum, but for the entries.
struct Sector {
    batch: u64,
    count: usize,
    last: bool,
    everything: bool,
}

fn parse_sector(key: &EraKey, sector: &[u8], place: u64) -> Option<Sector> {
    if sum_of(key, sector) != sector[..SUM_BYTES] {
        return None;
    }
    let mut fields = &sector[SUM_BYTES..SECTOR_HEADER_BYTES];
    let batch = u64::from_le_bytes(take(&mut fields));
    let at = u32::from_le_bytes(take(&mut fields));
    let [count, flags] = take(&mut fields);
    let sane = u64::from(at) == place
        && usize::from(count) <= SECTOR_ENTRIES
        && flags & !(LAST | EVERYTHING) == 0
        && *fields == [0; 2];
    sane.then_some(Sector {
        batch,
        count: count.into(),
        last: flags & LAST != 0,
        everything: flags & EVERYTHING != 0,
    })
}

/// What an era's file says.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Entries that were found; some more than once.
    pub(super) entries: Vec<Entry>,
    /// The era says "everything".
    pub(super) everything: bool,
    /// What is wrong, if entries may be missing.
    pub(super) damage: Option<&'static str>,
}

/// Reads all sectors after the header of a file.
///
/// A sector is zeros (never written) or passes its checksum; anything else is damage. Of the last batch any sectors may
/// be missing: its sync never returned. Of every other batch all must be there.
pub(super) fn scan(file: &[u8], key: &EraKey) -> Scan {
    let mut scan = Scan::default();
    // The batch that the last good sector belonged to, and where that batch must go on; `None` when it is whole.
    let mut batch = 0;
    let mut goes_on_at = None;
    let mut next_batch_at = BLOCK_BYTES;
    let mut whole = true;
    let sectors = file.chunks(SECTOR_BYTES).enumerate().skip(BLOCK_BYTES as usize / SECTOR_BYTES);
    for (index, bytes) in sectors {
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let at = (index * SECTOR_BYTES) as u64;
        let parsed = if bytes.len() == SECTOR_BYTES { parse_sector(key, bytes, index as u64) } else { None };
        let Some(sector) = parsed else {
            scan.damage.get_or_insert("a sector fails its checksum");
            continue;
        };
        if sector.batch == batch {
            whole &= goes_on_at == Some(at);
        } else {
            if sector.batch != batch + 1 || !whole || goes_on_at.is_some() {
                scan.damage.get_or_insert("a batch before the last one is not whole");
            }
            batch = sector.batch;
            whole = at == next_batch_at;
        }
        let end = at + SECTOR_BYTES as u64;
        goes_on_at = (!sector.last).then_some(end);
        next_batch_at = end.next_multiple_of(BLOCK_BYTES);
        scan.everything |= sector.everything;
        for entry in bytes[SECTOR_HEADER_BYTES..].chunks_exact(ENTRY_BYTES).take(sector.count) {
            let mut fields = entry;
            let volume = VolumeIndex(u16::from_le_bytes(take(&mut fields)));
            let _zero: [u8; 2] = take(&mut fields);
            match FileId::from_bytes(&take(&mut fields)) {
                Some(file) => scan.entries.push((volume, file)),
                None => {
                    scan.damage.get_or_insert("an entry names no file");
                }
            }
        }
    }
    scan
}
