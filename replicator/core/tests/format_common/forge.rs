//! Writes record sets by the byte map alone, whatever they say, with checksums and hashes that are right: what a wrong
//! or hostile peer with a valid certificate could send.

use twinfs_core::record_set::SetPlace;
use twinfs_core::update::{self, Update};

const FRAME: usize = 128 << 10;
pub(crate) const RAW: u32 = 1 << 31;

/// A frame as it stands in the set: the word of the frame table, and the stored bytes.
pub(crate) type StoredFrame = (u32, Vec<u8>);

/// A record set in parts; each part can be set to anything.
#[derive(Clone)]
pub(crate) struct Forged {
    pub(crate) version: u16,
    pub(crate) place: SetPlace,
    pub(crate) volume: Vec<u8>,
    pub(crate) volume_len: Option<u8>,
    pub(crate) instance: u64,
    pub(crate) root: [u8; 20],
    pub(crate) updates: u32,
    pub(crate) meta_len: u32,
    pub(crate) data_len: u32,
    pub(crate) frames: Vec<StoredFrame>,
    pub(crate) body_len: Option<u32>,
    pub(crate) header_len: Option<u16>,
}

impl Forged {
    /// A set of a metadata and a data section, stored raw, that says so.
    pub(crate) fn of_sections(place: SetPlace, updates: u32, meta: &[u8], data: &[u8]) -> Self {
        let raw = |section: &[u8]| -> Vec<StoredFrame> {
            section.chunks(FRAME).map(|frame| (frame.len() as u32 | RAW, frame.to_vec())).collect()
        };
        Self {
            version: 1,
            volume: place.volume.as_str().as_bytes().to_vec(),
            instance: place.instance.get(),
            root: place.root.to_bytes(),
            volume_len: None,
            place,
            updates,
            meta_len: meta.len() as u32,
            data_len: data.len() as u32,
            frames: [raw(meta), raw(data)].concat(),
            body_len: None,
            header_len: None,
        }
    }

    /// A set of updates and their data, with a right file table.
    pub(crate) fn of_updates(place: SetPlace, updates: &[(Update, Vec<u8>)]) -> Self {
        let mut files = Vec::new();
        for file in updates.iter().flat_map(|(update, _)| update.files()) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        let table: Vec<_> = files.iter().map(|file| (file.to_bytes(), Vec::new())).collect();
        let mut meta = file_table(&table);
        updates.iter().for_each(|(update, _)| update::encode(update, &mut meta));
        let data: Vec<u8> = updates.iter().flat_map(|(_, data)| data).copied().collect();
        Self::of_sections(place, updates.len() as u32, &meta, &data)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut table = Vec::new();
        for (word, stored) in &self.frames {
            table.extend_from_slice(&word.to_le_bytes());
            table.extend_from_slice(blake3::hash(stored).as_bytes());
        }
        let frames: Vec<u8> = self.frames.iter().flat_map(|(_, stored)| stored).copied().collect();
        let header_len = self.header_len.unwrap_or(217 + self.volume.len() as u16);
        let body_len = self.body_len.unwrap_or((table.len() + frames.len()) as u32);
        let place = &self.place;
        let body_hash = blake3::hash(&table);
        let parts: [&[u8]; 21] = [
            b"TWINSET\0",
            &self.version.to_le_bytes(),
            &header_len.to_le_bytes(),
            &body_len.to_le_bytes(),
            body_hash.as_bytes(),
            place.session.as_bytes(),
            &self.instance.to_le_bytes(),
            &self.root,
            &self.updates.to_le_bytes(),
            &place.epoch.number.to_le_bytes(),
            place.epoch.site.as_bytes(),
            &place.incarnation.0.to_le_bytes(),
            &place.number.0.to_le_bytes(),
            &place.predecessor.0,
            &place.first_seq.0.to_le_bytes(),
            &place.start.0.to_le_bytes(),
            &place.end.0.to_le_bytes(),
            &self.meta_len.to_le_bytes(),
            &self.data_len.to_le_bytes(),
            &[self.volume_len.unwrap_or(self.volume.len() as u8)],
            &self.volume,
        ];
        let mut header = parts.concat();
        let checksum = blake3::hash(&header);
        header.splice(16..16, checksum.as_bytes()[..16].iter().copied());
        [header, table, frames].concat()
    }
}

/// A file table as it stands at the start of the metadata section.
pub(crate) fn file_table(files: &[([u8; 20], Vec<u8>)]) -> Vec<u8> {
    let mut out = (files.len() as u32).to_le_bytes().to_vec();
    for (file, path) in files {
        out.extend_from_slice(file);
        out.extend_from_slice(&(path.len() as u16).to_le_bytes());
        out.extend_from_slice(path);
    }
    out
}
