//! The header of a record set.

use super::{Cursor, FILE_COUNT_BYTES, MAGIC, VERSION};
use crate::format::BadSet;
use crate::id::{
    Epoch, FileId, Incarnation, SessionId, SetHash, SetNumber, SiteId, VolumeInstance, VolumeName,
};
use crate::limits;
use crate::record_set::SetHeader;
use crate::stamp::{Seq, Timestamp};
use crate::update::UPDATE_HEADER_BYTES;

/// Bytes of the header before the volume name.
pub(super) const FIXED_BYTES: usize = 217;
const CHECKSUM_AT: usize = 16;
const CHECKSUM_BYTES: usize = 16;

/// A record set's header, parsed and checked, with what is needed to find the set's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetPrefix {
    header: SetHeader,
    hash: SetHash,
    body_hash: [u8; 32],
    header_len: usize,
    body_len: usize,
}

impl SetPrefix {
    /// Parses the header at the start of `bytes`, which may end anywhere after it:
    /// [`limits::SET_HEADER_BYTES_MAX`] bytes are always enough.
    ///
    /// Everything in the header is checked, and its relations; the body is not looked at.
    ///
    /// # Errors
    /// [`BadSet::Length`] if the header is cut off, another [`BadSet`] if it is none.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadSet> {
        // What there is of the magic is looked at first, so that a short piece of something else is called that.
        let magic_len = bytes.len().min(MAGIC.len());
        if bytes[..magic_len] != MAGIC[..magic_len] {
            return Err(BadSet::Magic);
        }
        let cut_off = |want| BadSet::Length { have: bytes.len(), want };
        let mut fields = Cursor(bytes.get(MAGIC.len()..).unwrap_or_default());
        let version = fields.u16().ok_or(cut_off(FIXED_BYTES))?;
        if version != VERSION {
            return Err(BadSet::Version(version));
        }
        let header_len = usize::from(fields.u16().ok_or(cut_off(FIXED_BYTES))?);
        if !(FIXED_BYTES..=limits::SET_HEADER_BYTES_MAX).contains(&header_len) {
            return Err(BadSet::Header("its length is out of range"));
        }
        let bytes = bytes.get(..header_len).ok_or(cut_off(header_len))?;
        let mut fields = Cursor(&bytes[12..]);
        let early = BadSet::Header("it ends too early");
        let body_len = fields.u32().ok_or(early.clone())? as usize;
        let stored_checksum: [u8; CHECKSUM_BYTES] = fields.array().ok_or(early.clone())?;
        if checksum(bytes) != stored_checksum {
            return Err(BadSet::HeaderChecksum);
        }
        let body_hash = fields.array().ok_or(early.clone())?;
        let header = parse_fields(&mut fields).unwrap_or(Err(early))?;
        check_relations(&header).map_err(BadSet::Header)?;
        check_body_len(&header, body_len).map_err(BadSet::Header)?;
        Ok(Self { header, hash: hash_of(bytes), body_hash, header_len, body_len })
    }

    /// What the set says about itself.
    #[must_use]
    pub const fn header(&self) -> &SetHeader {
        &self.header
    }

    /// The hash of the set.
    #[must_use]
    pub const fn hash(&self) -> SetHash {
        self.hash
    }

    /// The hash that the frame table must have.
    pub(super) const fn body_hash(&self) -> &[u8; 32] {
        &self.body_hash
    }

    /// Bytes of the header.
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.header_len
    }

    /// Bytes of the whole set; at most [`limits::SET_BYTES_MAX`].
    #[must_use]
    pub const fn encoded_len(&self) -> usize {
        self.header_len + self.body_len
    }

    /// Where the frame table stands in the set.
    #[must_use]
    pub fn table_range(&self) -> std::ops::Range<usize> {
        let frames = frame_count(self.header.meta_len) + frame_count(self.header.data_len);
        self.header_len..self.header_len + frames * limits::SET_FRAME_ENTRY_BYTES
    }

    pub(super) fn into_header(self) -> SetHeader {
        self.header
    }
}

/// Number of frames of a section.
pub(super) const fn frame_count(section_len: u32) -> usize {
    (section_len as usize).div_ceil(limits::FRAME_BYTES)
}

/// Appends the header of a set whose body has the given length and hash, and returns the hash of the set.
///
/// # Errors
/// [`BadSet::Header`] if the fields contradict each other; then nothing was appended.
pub(super) fn encode(
    header: &SetHeader,
    body_len: usize,
    body_hash: [u8; 32],
    out: &mut Vec<u8>,
) -> Result<SetHash, BadSet> {
    check_relations(header).map_err(BadSet::Header)?;
    check_body_len(header, body_len).map_err(BadSet::Header)?;
    let name = header.volume.as_str().as_bytes();
    let header_len = u16::try_from(FIXED_BYTES + name.len()).expect("volume names are short");
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&header_len.to_le_bytes());
    out.extend_from_slice(&u32::try_from(body_len).expect("checked above").to_le_bytes());
    out.extend_from_slice(&[0; CHECKSUM_BYTES]);
    out.extend_from_slice(&body_hash);
    out.extend_from_slice(header.session.as_bytes());
    out.extend_from_slice(&header.instance.get().to_le_bytes());
    out.extend_from_slice(&header.root.to_bytes());
    out.extend_from_slice(&header.updates.to_le_bytes());
    out.extend_from_slice(&header.epoch.number.to_le_bytes());
    out.extend_from_slice(header.epoch.site.as_bytes());
    out.extend_from_slice(&header.incarnation.0.to_le_bytes());
    out.extend_from_slice(&header.number.0.to_le_bytes());
    out.extend_from_slice(&header.predecessor.0);
    out.extend_from_slice(&header.first_seq.0.to_le_bytes());
    out.extend_from_slice(&header.start.0.to_le_bytes());
    out.extend_from_slice(&header.end.0.to_le_bytes());
    out.extend_from_slice(&header.meta_len.to_le_bytes());
    out.extend_from_slice(&header.data_len.to_le_bytes());
    out.push(u8::try_from(name.len()).expect("volume names are short"));
    out.extend_from_slice(name);
    let bytes = &mut out[start..];
    let sum = checksum(bytes);
    bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_BYTES].copy_from_slice(&sum);
    Ok(hash_of(bytes))
}

/// Reads the fields from the session on; `None` if the bytes end too early.
fn parse_fields(fields: &mut Cursor<'_>) -> Option<Result<SetHeader, BadSet>> {
    let session = SessionId::from_bytes(fields.array()?);
    let Some(instance) = VolumeInstance::new(fields.u64()?) else {
        return Some(Err(BadSet::Header("no volume instance")));
    };
    let Some(root) = FileId::from_bytes(&fields.array()?) else {
        return Some(Err(BadSet::Header("a root of no volume instance")));
    };
    let updates = fields.u32()?;
    let epoch = Epoch { number: fields.u64()?, site: SiteId::from_bytes(fields.array()?) };
    let incarnation = Incarnation(fields.u64()?);
    let number = SetNumber(fields.u64()?);
    let predecessor = SetHash(fields.array()?);
    let first_seq = Seq(fields.u64()?);
    let (start, end) = (Timestamp(fields.u64()?), Timestamp(fields.u64()?));
    let (meta_len, data_len) = (fields.u32()?, fields.u32()?);
    let name_len = usize::from(fields.u8()?);
    let name = fields.slice(name_len)?;
    if !fields.0.is_empty() {
        return Some(Err(BadSet::Header("bytes left over")));
    }
    let name = std::str::from_utf8(name).ok().and_then(|name| VolumeName::new(name).ok());
    let Some(volume) = name else {
        return Some(Err(BadSet::Header("not a volume name")));
    };
    Some(Ok(SetHeader {
        session,
        volume,
        instance,
        root,
        epoch,
        incarnation,
        number,
        predecessor,
        first_seq,
        updates,
        start,
        end,
        meta_len,
        data_len,
    }))
}

/// Checks what the fields of a header have to do with each other, and with the limits.
fn check_relations(header: &SetHeader) -> Result<(), &'static str> {
    let null = header.is_null();
    if header.updates as usize > limits::SET_UPDATES_MAX {
        return Err("too many updates");
    }
    if header.meta_len as usize > limits::SET_META_BYTES_MAX
        || header.data_len as usize > limits::SET_DATA_BYTES_MAX
    {
        return Err("a section is too large");
    }
    if null && (header.meta_len != 0 || header.data_len != 0) {
        return Err("a null set with a body");
    }
    // This also bounds what a reader sets aside for the updates by bytes that really are there, once decompressed.
    let meta_len_min = FILE_COUNT_BYTES + header.updates as usize * UPDATE_HEADER_BYTES;
    if !null && (header.meta_len as usize) < meta_len_min {
        return Err("its metadata cannot hold its updates");
    }
    // Below the maximum, so that "the next one" can always be computed.
    let next_seq = header.first_seq.0.checked_add(u64::from(header.updates));
    if header.first_seq == Seq::ZERO || next_seq.is_none_or(|next| next == u64::MAX) {
        return Err("sequence numbers out of range");
    }
    if header.number.0 == u64::MAX || header.epoch.number == u64::MAX || header.end.0 > i64::MAX as u64 {
        return Err("a number or time is out of range");
    }
    if header.start > header.end || (!null && header.start == header.end) {
        return Err("its interval ends before it starts");
    }
    if !null && header.number.0 == 0 {
        return Err("a set without a number");
    }
    let followed = if null { header.number.0 } else { header.number.0 - 1 };
    if (followed == 0) != (header.predecessor == SetHash::NONE) {
        return Err("its number and its predecessor contradict each other");
    }
    Ok(())
}

/// Checks that a body of that length can be: each frame has at least a byte, and at most its raw length.
fn check_body_len(header: &SetHeader, body_len: usize) -> Result<(), &'static str> {
    let frames = frame_count(header.meta_len) + frame_count(header.data_len);
    let table_len = frames * limits::SET_FRAME_ENTRY_BYTES;
    let raw_len = header.meta_len as usize + header.data_len as usize;
    if (table_len + frames..=table_len + raw_len).contains(&body_len) {
        Ok(())
    } else {
        Err("the length of its body is out of range")
    }
}

fn checksum(header: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..CHECKSUM_AT]);
    hasher.update(&header[CHECKSUM_AT + CHECKSUM_BYTES..]);
    *hasher.finalize().as_bytes().first_chunk().expect("a BLAKE3 hash is longer")
}

fn hash_of(header: &[u8]) -> SetHash {
    SetHash(*blake3::hash(header).as_bytes())
}
