//! Frames: what is compressed, hashed and read on its own.

use std::ops::Range;

use super::header::frame_count;
use super::{Cursor, RAW_BIT, SetPrefix};
use crate::format::BadSet;
use crate::limits::{FRAME_BYTES, SET_FRAME_ENTRY_BYTES};

/// One frame of a record set: where it stands, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Its place in the frame table.
    pub number: usize,
    /// Offset of its stored bytes in the encoded set.
    pub stored_at: u32,
    /// Number of its stored bytes.
    pub stored_len: u32,
    /// Offset of its first raw byte in its section.
    pub raw_at: u32,
    /// Number of its raw bytes, at most [`FRAME_BYTES`].
    pub raw_len: u32,
    /// Whether it is stored raw.
    pub is_raw: bool,
    hash: [u8; 32],
}

impl Frame {
    /// Where its stored bytes stand in the encoded set.
    #[must_use]
    pub const fn stored_range(&self) -> Range<usize> {
        self.stored_at as usize..self.stored_at as usize + self.stored_len as usize
    }

    pub(super) fn verify(&self, stored: &[u8]) -> Result<(), BadSet> {
        if stored.len() == self.stored_len as usize && blake3::hash(stored) == self.hash {
            Ok(())
        } else {
            Err(BadSet::FrameHash(self.number))
        }
    }
}

/// Where each frame of a record set stands. Enough, with [`Unpacker`], to read a set's data at random.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameIndex {
    frames: Box<[Frame]>,
    meta_frames: usize,
    data_len: u32,
}

impl FrameIndex {
    /// Parses the frame table of the set that starts with `prefix`: the bytes at [`SetPrefix::table_range`].
    ///
    /// # Errors
    /// [`BadSet::Length`], [`BadSet::BodyHash`] or [`BadSet::FrameTable`].
    pub fn parse(prefix: &SetPrefix, table: &[u8]) -> Result<Self, BadSet> {
        let range = prefix.table_range();
        if table.len() != range.len() {
            return Err(BadSet::Length { have: table.len(), want: range.len() });
        }
        if blake3::hash(table) != *prefix.body_hash() {
            return Err(BadSet::BodyHash);
        }
        let header = prefix.header();
        let meta_frames = frame_count(header.meta_len);
        let mut stored_at = range.end;
        let mut frames = Vec::with_capacity(meta_frames + frame_count(header.data_len));
        for (number, entry) in table.chunks_exact(SET_FRAME_ENTRY_BYTES).enumerate() {
            let (section_len, place) = match number.checked_sub(meta_frames) {
                None => (header.meta_len, number),
                Some(place) => (header.data_len, place),
            };
            let raw_at = place * FRAME_BYTES;
            let raw_len = (section_len as usize - raw_at).min(FRAME_BYTES);
            let mut entry = Cursor(entry);
            let (Some(word), Some(hash)) = (entry.u32(), entry.array()) else {
                return Err(BadSet::FrameTable("it ends too early"));
            };
            let (stored_len, is_raw) = (word & !RAW_BIT, word & RAW_BIT != 0);
            let length_fits = if is_raw {
                stored_len as usize == raw_len
            } else {
                (1..raw_len).contains(&(stored_len as usize))
            };
            if !length_fits || stored_at + stored_len as usize > prefix.encoded_len() {
                return Err(BadSet::FrameTable("the length of a frame is out of range"));
            }
            frames.push(Frame {
                number,
                stored_at: small(stored_at),
                stored_len,
                raw_at: small(raw_at),
                raw_len: small(raw_len),
                is_raw,
                hash,
            });
            stored_at += stored_len as usize;
        }
        if stored_at != prefix.encoded_len() {
            return Err(BadSet::FrameTable("its frames do not fill the body"));
        }
        Ok(Self { frames: frames.into(), meta_frames, data_len: header.data_len })
    }

    /// The frames of the metadata section.
    #[must_use]
    pub fn meta_frames(&self) -> &[Frame] {
        &self.frames[..self.meta_frames]
    }

    /// The frames of the data section.
    #[must_use]
    pub fn data_frames(&self) -> &[Frame] {
        &self.frames[self.meta_frames..]
    }

    /// The frames that hold a range of the data section, in order; none if the range is empty.
    ///
    /// # Errors
    /// [`BadSet::DataRange`] if the data section ends before the range does.
    pub fn data_frames_of(&self, offset: u32, len: u32) -> Result<&[Frame], BadSet> {
        let end = offset.checked_add(len).filter(|end| *end <= self.data_len).ok_or(BadSet::DataRange)?;
        if len == 0 {
            return Ok(&[]);
        }
        Ok(&self.data_frames()[offset as usize / FRAME_BYTES..(end as usize).div_ceil(FRAME_BYTES)])
    }

    pub(super) fn frames(&self) -> &[Frame] {
        &self.frames
    }
}

/// Decompresses frames. Holds zstd's working memory, to be used again.
#[derive(Default)]
pub struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Unpacker {
    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Verifies the stored bytes of a frame and appends its raw bytes to `out`: exactly [`Frame::raw_len`] of them,
    /// whatever the stored bytes pretend to be.
    ///
    /// # Errors
    /// [`BadSet::FrameHash`] or [`BadSet::Frame`]; then `out` is as it was.
    pub fn unpack(&mut self, frame: &Frame, stored: &[u8], out: &mut Vec<u8>) -> Result<(), BadSet> {
        frame.verify(stored)?;
        self.unpack_verified(frame, stored, out)
    }

    pub(super) fn unpack_verified(
        &mut self,
        frame: &Frame,
        stored: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), BadSet> {
        let start = out.len();
        if frame.is_raw {
            out.extend_from_slice(stored);
            return Ok(());
        }
        // A slice of exactly the raw length: zstd stops with an error where a bomb would go on.
        out.resize(start + frame.raw_len as usize, 0);
        match self.zstd.decompress_to_buffer(stored, &mut out[start..]) {
            Ok(len) if len == frame.raw_len as usize => Ok(()),
            _ => {
                out.truncate(start);
                Err(BadSet::Frame(frame.number))
            }
        }
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

/// Compresses sections into frames. Holds zstd's working memory, to be used again.
pub(super) struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    level: Option<i32>,
    scratch: Box<[u8]>,
}

impl Packer {
    pub(super) fn new() -> Self {
        Self {
            zstd: zstd::bulk::Compressor::default(),
            level: None,
            scratch: vec![0; zstd::zstd_safe::compress_bound(FRAME_BYTES)].into(),
        }
    }

    /// Appends the frames of a section, and their entries in the frame table. Level 0 stores them raw.
    pub(super) fn pack(&mut self, section: &[u8], level: i32, table: &mut Vec<u8>, frames: &mut Vec<u8>) {
        for raw in section.chunks(FRAME_BYTES) {
            let compressed = self.compress(raw, level);
            let (stored, raw_bit) = match compressed {
                Some(len) => (&self.scratch[..len], 0),
                None => (raw, RAW_BIT),
            };
            table.extend_from_slice(&(small(stored.len()) | raw_bit).to_le_bytes());
            table.extend_from_slice(blake3::hash(stored).as_bytes());
            frames.extend_from_slice(stored);
        }
    }

    /// Compresses into the scratch buffer; `None` if that does not make it smaller.
    fn compress(&mut self, raw: &[u8], level: i32) -> Option<usize> {
        if level == 0 {
            return None;
        }
        if self.level != Some(level) {
            self.zstd.set_compression_level(level).ok()?;
            self.level = Some(level);
        }
        let len = self.zstd.compress_to_buffer(raw, &mut self.scratch[..]).ok()?;
        (len < raw.len()).then_some(len)
    }
}

fn small(len: usize) -> u32 {
    u32::try_from(len).expect("at most SET_BYTES_MAX")
}
