//! The sidefile of a killed primary: a real one with words of it changed, as random bits or another program would.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use twinfs_core::id::{SessionId, SetHash, SetNumber, VolumeIndex};
use twinfs_core::session::ChainPoint;
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::{Intent, Kind, Note, OpKind, sample_file};
use twinfs_replicator::primary::sidefile::{Capture, Start, StartVolume, bytes_min};

use crate::scratch;
use crate::sets::changes;

const WORD: usize = 8;

/// The sidefile, and the words of it that say something.
struct Template {
    bytes: Vec<u8>,
    /// Offsets of words that are not zero, and of their neighbours.
    words: Vec<usize>,
}

static DIR: OnceLock<PathBuf> = OnceLock::new();
static TEMPLATE: OnceLock<Template> = OnceLock::new();

fn start(volumes: &[StartVolume]) -> Start<'_> {
    let session = SessionId::from_bytes([2; 16]);
    Start { session, volumes, floor: Timestamp::ZERO, limit: Timestamp(u64::MAX) }
}

fn path() -> PathBuf {
    scratch(&DIR, |_| {}).join("sidefile")
}

/// Two volumes, a dozen updates, one of them released, and an intent.
fn make(path: &Path) -> Template {
    let capture = Capture::create(path, bytes_min(), &start(&[StartVolume::NEW; 2])).unwrap();
    for (index, change) in changes(5, 12).into_iter().take(12).enumerate() {
        let intent = Intent::Attrs { file: sample_file(1) };
        let reserved = capture.reserve(VolumeIndex(index as u16 % 2), &intent, 70_000, change.data.len());
        reserved.unwrap().publish(change.update.op, change.update.attrs, &change.data).unwrap();
        if index == 0 {
            capture.release(&capture.cut(usize::MAX).updates);
        }
    }
    let names = Intent::Names { first: (sample_file(1), b"name"), second: None };
    let left = capture.reserve(VolumeIndex(0), &names, 100, 10).unwrap();
    left.note(Note { op: OpKind::Unlink, first: Some((sample_file(2), Kind::File)), second: None });
    std::mem::forget(left);
    drop(capture);
    let bytes = std::fs::read(path).unwrap();
    let said = |at: &usize| bytes[*at..*at + WORD] != [0; WORD];
    let near = |at: &usize| {
        (at.saturating_sub(WORD)..=at + WORD).step_by(WORD).any(|at| at + WORD <= bytes.len() && said(&at))
    };
    let words = (0..bytes.len()).step_by(WORD).filter(near).collect();
    Template { bytes, words }
}

/// Each change is a word's number, what to do with it, and a value. The same input gives the same file.
fn write(template: &Template, path: &Path, mut script: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let (first, last) = (template.words[0], template.words[template.words.len() - 1] + WORD);
    file.write_all_at(&template.bytes[first..last], first as u64).unwrap();
    while let Some(([index_low, index_high, op, value @ ..], rest)) = script.split_first_chunk::<11>() {
        script = rest;
        let index = usize::from(u16::from_le_bytes([*index_low, *index_high]));
        let at = template.words[index % template.words.len()];
        let mut old = [0; WORD];
        old.copy_from_slice(&template.bytes[at..at + WORD]);
        let (old, value) = (u64::from_le_bytes(old), u64::from_le_bytes(*value));
        let new = match op % 3 {
            0 => value,
            1 => old ^ value,
            _ => old.wrapping_add(value),
        };
        file.write_all_at(&new.to_le_bytes(), at as u64).unwrap();
    }
}

pub(crate) fn sidefile(script: &[u8]) -> bool {
    let path = path();
    let template = TEMPLATE.get_or_init(|| make(&path));
    write(template, &path, script);
    let _ = Capture::was_clean(&path);
    let Ok((capture, survivors)) = Capture::open(&path, &start(&[StartVolume::NEW; 2])) else { return false };
    assert!(survivors.intents.iter().all(|left| left.intent().encoded_len() <= Intent::BYTES_MAX));
    let _ = (capture.fill(), capture.queued(), capture.queued_after(Timestamp::ZERO, 4), capture.last_seqs());
    let cut = capture.cut(usize::MAX);
    if cut.updates.len() > 1 {
        capture.note_set(&cut.updates, SetNumber(1), SetHash::NONE, cut.end);
    }
    capture.acknowledge(VolumeIndex(1), ChainPoint::START, cut.end);
    for captured in &cut.updates {
        let (mut meta, mut data) = (Vec::new(), Vec::new());
        capture.copy_meta(captured, &mut meta);
        capture.copy_data(captured, &mut data);
        assert_eq!(meta.len() + data.len(), captured.bytes());
    }
    capture.release(&cut.updates);
    let intent = Intent::Attrs { file: sample_file(1) };
    drop(capture.reserve(VolumeIndex(1), &intent, 100, 10));
    capture.settle_left();
    true
}

pub(crate) fn sidefile_seeds() -> Vec<Vec<u8>> {
    let change =
        |index: u16, op: u8, value: u64| [&index.to_le_bytes()[..], &[op], &value.to_le_bytes()].concat();
    let mut seeds = vec![vec![0], change(u16::MAX, 1, 0)];
    seeds.extend((0..24).map(|index| change(index, 1, 0)));
    seeds
}
