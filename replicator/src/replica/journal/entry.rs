//! Entries: their headers, and what a commit says.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use twinfs_core::id::{FileId, GroupNumber, SetHash, SetNumber, VolumeInstance, VolumeName};
use twinfs_core::limits;
use twinfs_core::stamp::{Seq, Timestamp};

use super::JournalError;
use super::segment::SegmentKey;

/// Bytes of an entry's header.
pub(super) const ENTRY_HEADER_BYTES: usize = 64;
/// Bytes to whose multiples entries are padded.
const ENTRY_ALIGN: usize = 8;
/// First bytes of an entry's header.
pub(super) const ENTRY_MAGIC: [u8; 4] = *b"TWJE";
/// Bytes of a checksum: BLAKE3, keyed by the segment and cut.
const SUM_BYTES: usize = 16;
/// Bytes of the header that its checksum covers.
const SUMMED_BYTES: usize = ENTRY_HEADER_BYTES - SUM_BYTES;

/// The running number of an entry: 1, 2, 3, … over all segments of a journal's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct EntryNumber(pub(super) u64);

impl EntryNumber {
    /// The first entry of a journal.
    pub(super) const FIRST: Self = Self(1);
    /// What a number may be: half the range is never reached, and leaves room to count on.
    pub(super) const RANGE: Range<u64> = 1..u64::MAX / 2;

    pub(super) const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    pub(super) const fn previous(self) -> Self {
        Self(self.0 - 1)
    }
}

impl fmt::Display for EntryNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What an entry holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum EntryKind {
    /// A record set, as it travelled.
    Set = 1,
    /// A commit: it ends a group.
    Commit = 2,
    /// The last commit before a segment began, repeated, so that the segments before it can go.
    Standing = 3,
    /// Record sets before it that count no longer.
    Withdrawn = 4,
}

impl EntryKind {
    const fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Set,
            2 => Self::Commit,
            3 => Self::Standing,
            4 => Self::Withdrawn,
            _ => return None,
        })
    }

    /// Largest payload, in bytes.
    pub(super) const fn payload_bytes_max(self) -> usize {
        match self {
            Self::Set => limits::SET_BYTES_MAX,
            Self::Commit | Self::Standing | Self::Withdrawn => limits::JOURNAL_CONTROL_BYTES_MAX,
        }
    }
}

/// An entry's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryHeader {
    pub(super) kind: EntryKind,
    pub(super) number: EntryNumber,
    /// Every entry up to this one was durable when this one was written. Zero: none.
    pub(super) synced: EntryNumber,
    pub(super) payload_len: u32,
    /// Offset of the header in its segment.
    pub(super) at: u32,
    pub(super) payload_sum: [u8; SUM_BYTES],
}

impl EntryHeader {
    /// The encoded form.
    pub(super) fn encode(&self, key: &SegmentKey) -> [u8; ENTRY_HEADER_BYTES] {
        let mut bytes = [0; ENTRY_HEADER_BYTES];
        bytes[..4].copy_from_slice(&ENTRY_MAGIC);
        bytes[4] = self.kind as u8;
        bytes[8..16].copy_from_slice(&self.number.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.synced.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.at.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.payload_sum);
        let sum = header_sum(&bytes, key);
        bytes[SUMMED_BYTES..].copy_from_slice(&sum);
        bytes
    }

    /// Reads the encoded form; `None` if it is not a header that was written in this segment.
    pub(super) fn decode(bytes: &[u8; ENTRY_HEADER_BYTES], key: &SegmentKey) -> Option<Self> {
        if bytes[..4] != ENTRY_MAGIC || bytes[SUMMED_BYTES..] != header_sum(bytes, key) {
            return None;
        }
        let (_, rest) = bytes.split_at(8);
        let (number, rest) = rest.split_first_chunk()?;
        let (synced, rest) = rest.split_first_chunk()?;
        let (payload_len, rest) = rest.split_first_chunk()?;
        let (at, rest) = rest.split_first_chunk()?;
        let (payload_sum, _) = rest.split_first_chunk()?;
        let header = Self {
            kind: EntryKind::of(bytes[4])?,
            number: EntryNumber(u64::from_le_bytes(*number)),
            synced: EntryNumber(u64::from_le_bytes(*synced)),
            payload_len: u32::from_le_bytes(*payload_len),
            at: u32::from_le_bytes(*at),
            payload_sum: *payload_sum,
        };
        let good = bytes[5..8] == [0; 3]
            && EntryNumber::RANGE.contains(&header.number.0)
            && header.synced < header.number
            && (1..=header.kind.payload_bytes_max()).contains(&(header.payload_len as usize));
        good.then_some(header)
    }

    /// Whether these are the bytes that the header speaks of.
    pub(super) fn matches(&self, payload: &[u8], key: &SegmentKey) -> bool {
        payload.len() == self.payload_len as usize && payload_sum(payload, key) == self.payload_sum
    }
}

fn header_sum(bytes: &[u8; ENTRY_HEADER_BYTES], key: &SegmentKey) -> [u8; SUM_BYTES] {
    cut(blake3::keyed_hash(key.as_bytes(), &bytes[..SUMMED_BYTES]))
}

/// The checksum of a payload.
pub(super) fn payload_sum(payload: &[u8], key: &SegmentKey) -> [u8; SUM_BYTES] {
    cut(blake3::keyed_hash(key.as_bytes(), payload))
}

fn cut(hash: blake3::Hash) -> [u8; SUM_BYTES] {
    *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
}

/// Bytes after a payload, zeros, that bring the next entry to its place.
pub(super) const fn padding(payload_len: usize) -> usize {
    payload_len.next_multiple_of(ENTRY_ALIGN) - payload_len
}

/// Bytes of an entry: header, payload, padding.
pub(super) const fn entry_len(payload_len: usize) -> u64 {
    (ENTRY_HEADER_BYTES + payload_len.next_multiple_of(ENTRY_ALIGN)) as u64
}

/// The end of a consistency group: once it is durable, the group is what the replica shows.
///
/// It stands alone: it names every volume that the replica knows and how far it goes there, so that the newest commit,
/// and the record sets that the journal still holds, are all that must be known after a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The group.
    pub group: GroupNumber,
    /// The consistency time: every update of every member volume stamped at or before it is in this group or in one
    /// before it.
    pub time: Timestamp,
    /// All volumes that the replica knows, members or not, each once; at most [`limits::VOLUMES_MAX`].
    pub volumes: Vec<CommitVolume>,
}

/// How far a commit goes in one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitVolume {
    /// The volume.
    pub volume: VolumeName,
    /// The life of its tree at the primary.
    pub instance: VolumeInstance,
    /// Its root directory there.
    pub root: FileId,
    /// Whether it is a member, from this group on or since an earlier one.
    pub member: bool,
    /// Whether it becomes a member with this group.
    pub joins: bool,
    /// The last update in this group or one before it.
    pub through: Seq,
    /// Where its chain of record sets stands.
    pub base: CommitBase,
}

/// A point of a volume's chain up to which every record set lies wholly in committed groups, the commit's own included.
/// With the sets that the journal still holds, it gives the end of the chain after a restart. So a trim must not go
/// beyond the first set after the base of the last commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitBase {
    /// The set; zero before the first one.
    pub number: SetNumber,
    /// Its hash.
    pub hash: SetHash,
    /// Sequence number of its last update.
    pub last_seq: Seq,
    /// Where its interval ends.
    pub end: Timestamp,
}

/// Bytes before the volumes of an encoded commit.
const COMMIT_FIXED_BYTES: usize = 18;
/// The flags of a volume in a commit.
const MEMBER: u8 = 1;
const JOINS: u8 = 2;

impl Commit {
    /// The encoded form, as the map of the journal's module says.
    pub(super) fn encode(&self) -> Result<Vec<u8>, JournalError> {
        let count = u16::try_from(self.volumes.len()).unwrap_or(u16::MAX);
        let mut bytes = Vec::with_capacity(COMMIT_FIXED_BYTES + 128 * self.volumes.len());
        bytes.extend_from_slice(&self.group.0.to_le_bytes());
        bytes.extend_from_slice(&self.time.0.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        for volume in &self.volumes {
            let name = volume.volume.as_str().as_bytes();
            bytes.push(u8::from(volume.member) * MEMBER + u8::from(volume.joins) * JOINS);
            bytes.push(u8::try_from(name.len()).expect("a volume name is short"));
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(&volume.instance.get().to_le_bytes());
            bytes.extend_from_slice(&volume.root.to_bytes());
            bytes.extend_from_slice(&volume.through.0.to_le_bytes());
            bytes.extend_from_slice(&volume.base.number.0.to_le_bytes());
            bytes.extend_from_slice(&volume.base.hash.0);
            bytes.extend_from_slice(&volume.base.last_seq.0.to_le_bytes());
            bytes.extend_from_slice(&volume.base.end.0.to_le_bytes());
        }
        // What a reader would refuse is not written.
        match Self::decode(&bytes) {
            Ok(_) => Ok(bytes),
            Err(what) => Err(JournalError::BadCommit { what }),
        }
    }

    /// Reads the encoded form, or says what is wrong.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(bytes);
        let group = GroupNumber(fields.counter()?);
        let time = Timestamp(fields.counter()?);
        let count = usize::from(u16::from_le_bytes(fields.array()?));
        if group.0 == 0 {
            return Err("a group number out of range");
        }
        if count > limits::VOLUMES_MAX {
            return Err("too many volumes");
        }
        let volumes = (0..count).map(|_| fields.volume()).collect::<Result<Vec<_>, _>>()?;
        if volumes.iter().map(|v| &v.volume).collect::<BTreeSet<_>>().len() != count {
            return Err("a volume twice");
        }
        if !fields.0.is_empty() {
            return Err("bytes left over after a commit");
        }
        Ok(Self { group, time, volumes })
    }
}

/// Takes fields off the front of bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or("a commit ends too early")?;
        self.0 = tail;
        Ok(*head)
    }

    fn slice(&mut self, len: usize) -> Result<&'a [u8], &'static str> {
        let (head, tail) = self.0.split_at_checked(len).ok_or("a commit ends too early")?;
        self.0 = tail;
        Ok(head)
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number or time that counts up from zero: half the range, so that adding to it never overflows.
    fn counter(&mut self) -> Result<u64, &'static str> {
        self.u64()
            .and_then(|value| if value <= u64::MAX / 2 { Ok(value) } else { Err("a number out of range") })
    }

    fn volume(&mut self) -> Result<CommitVolume, &'static str> {
        let [flags, name_len] = self.array()?;
        if flags & !(MEMBER | JOINS) != 0 || flags == JOINS {
            return Err("flags that contradict each other");
        }
        let name = std::str::from_utf8(self.slice(usize::from(name_len))?).ok();
        Ok(CommitVolume {
            volume: name.and_then(|name| VolumeName::new(name).ok()).ok_or("not a volume name")?,
            instance: VolumeInstance::new(self.u64()?).ok_or("no volume instance")?,
            root: FileId::from_bytes(&self.array()?).ok_or("a root of no volume instance")?,
            member: flags & MEMBER != 0,
            joins: flags & JOINS != 0,
            through: Seq(self.counter()?),
            base: CommitBase {
                number: SetNumber(self.counter()?),
                hash: SetHash(self.array()?),
                last_seq: Seq(self.counter()?),
                end: Timestamp(self.counter()?),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SegmentKey {
        SegmentKey::of(b"some header")
    }

    fn commit(volumes: usize) -> Commit {
        let volume = |i: usize| CommitVolume {
            volume: VolumeName::new(format!("{i:0>64}")).unwrap(),
            instance: VolumeInstance::new(7 + i as u64).unwrap(),
            root: twinfs_core::update::sample_file(i as u64),
            member: !i.is_multiple_of(3),
            joins: i % 3 == 2,
            through: Seq(1000 * i as u64),
            base: CommitBase {
                number: SetNumber(i as u64),
                hash: SetHash([i as u8; 32]),
                last_seq: Seq(999 * i as u64),
                end: Timestamp(i as u64),
            },
        };
        let volumes = (0..volumes).map(volume).collect();
        Commit { group: GroupNumber(3), time: Timestamp(99), volumes }
    }

    #[test]
    fn commits_survive_their_byte_form() {
        for volumes in [0, 1, 2, limits::VOLUMES_MAX] {
            let commit = commit(volumes);
            let bytes = commit.encode().unwrap();
            assert!(bytes.len() <= limits::JOURNAL_CONTROL_BYTES_MAX);
            assert_eq!(Commit::decode(&bytes), Ok(commit));
        }
        let largest = commit(limits::VOLUMES_MAX).encode().unwrap().len();
        assert_eq!(largest, limits::JOURNAL_CONTROL_BYTES_MAX, "the bound is tight");
    }

    #[test]
    fn commits_that_no_reader_accepts_are_not_written() {
        let mut twice = commit(1);
        twice.volumes.push(twice.volumes[0].clone());
        let mut none = commit(1);
        none.group = GroupNumber(0);
        let mut joins = commit(1);
        joins.volumes[0].joins = true;
        let mut far = commit(1);
        far.volumes[0].base.last_seq = Seq(1 << 63);
        for bad in [twice, none, joins, far, commit(limits::VOLUMES_MAX + 1), commit(70_000)] {
            assert!(matches!(bad.encode(), Err(JournalError::BadCommit { .. })));
        }
    }

    #[test]
    fn cut_and_longer_commits_are_refused() {
        let bytes = commit(2).encode().unwrap();
        for len in 0..bytes.len() {
            Commit::decode(&bytes[..len]).unwrap_err();
        }
        Commit::decode(&[bytes, vec![0]].concat()).unwrap_err();
    }

    #[test]
    fn a_header_is_bound_to_its_segment() {
        let header = EntryHeader {
            kind: EntryKind::Set,
            number: EntryNumber(5),
            synced: EntryNumber(4),
            payload_len: 3,
            at: 4096,
            payload_sum: payload_sum(b"abc", &key()),
        };
        let bytes = header.encode(&key());
        assert_eq!(EntryHeader::decode(&bytes, &key()), Some(header));
        assert!(header.matches(b"abc", &key()) && !header.matches(b"abd", &key()));
        assert_eq!(EntryHeader::decode(&bytes, &SegmentKey::of(b"another header")), None);
        for bit in 0..ENTRY_HEADER_BYTES * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(EntryHeader::decode(&flipped, &key()), None, "bit {bit}");
        }
        // Even with a right checksum.
        for (kind, len) in [(EntryKind::Set, 0), (EntryKind::Commit, limits::JOURNAL_CONTROL_BYTES_MAX + 1)] {
            let bad = EntryHeader { kind, payload_len: len as u32, ..header };
            assert_eq!(EntryHeader::decode(&bad.encode(&key()), &key()), None);
        }
        for number in [0, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
            let bad = EntryHeader { number: EntryNumber(number), synced: EntryNumber(0), ..header };
            assert_eq!(
                EntryHeader::decode(&bad.encode(&key()), &key()),
                None,
                "nobody can count on from {number}"
            );
        }
        let bad = EntryHeader { synced: EntryNumber(5), ..header };
        assert_eq!(EntryHeader::decode(&bad.encode(&key()), &key()), None);
    }
}
