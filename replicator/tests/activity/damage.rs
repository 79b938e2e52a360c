//! Rot, and files that do not belong.

use twinfs_core::id::SessionId;
use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::activity_log::{ACTIVITY_MAGIC, ActivityError, ActivityLog};
use twinfs_replicator::storage::{SimStorage, Storage};

use super::{Name, config, era_files, found, names, open, set, touch};

/// Two eras: three batches, one of two sectors, and one batch. The second era's file has no room taken ahead, as if the
/// file system could not do that.
fn sample() -> (SimStorage, Vec<Name>) {
    let disk = SimStorage::new(3);
    let (log, _) = open(&disk).unwrap();
    for range in [0..3, 3..25, 25..26] {
        touch(&log, &names(range)).unwrap();
        log.flush().unwrap();
    }
    log.end_era(&|| Timestamp(2000)).unwrap();
    touch(&log, &names(20..40)).unwrap();
    log.flush().unwrap();
    // Most of a file is room taken ahead; a flip there is like another.
    for file in era_files(&disk) {
        let mut bytes = disk.bytes(&file).unwrap();
        let used = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
        bytes.truncate(used.next_multiple_of(4096) + 512);
        disk.put(&file, &bytes);
    }
    (disk, names(0..40))
}

#[test]
fn no_flipped_bit_hides_an_entry() {
    let (disk, all) = sample();
    let whole = found(&disk.crash(0));
    assert_eq!((whole.files.len(), whole.everything, whole.since), (all.len(), false, Timestamp(1000)));
    let files = era_files(&disk);
    assert_eq!(files.len(), 2);
    for file in files {
        let bytes = disk.bytes(&file).unwrap();
        for at in 0..bytes.len() {
            let image = disk.crash(0);
            let mut rotten = bytes.clone();
            rotten[at] ^= 1 << (at % 8);
            image.put(&file, &rotten);
            let found = found(&image);
            assert!(found.everything, "{file}, byte {at}");
            assert!(set(&found.files).is_subset(&set(&all)), "{file}, byte {at}");
        }
    }
}

#[test]
fn what_is_missing_in_the_middle_or_out_of_place_is_noticed() {
    let (disk, _) = sample();
    let file = era_files(&disk).remove(0);
    let bytes = disk.bytes(&file).unwrap();
    let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
        let image = disk.crash(0);
        let mut rotten = bytes.clone();
        change(&mut rotten);
        image.put(&file, &rotten);
        found(&image).everything
    };
    for lost in [4096..4608, 8192..8704, 8704..9216, 4096..12288] {
        assert!(damaged(&|bytes| bytes[lost.clone()].fill(0)), "sectors {lost:?} are gone");
    }
    assert!(!damaged(&|bytes| bytes[12288..12800].fill(0)), "the last batch may never have been synced");
    assert!(damaged(&|bytes| bytes.copy_within(8192..8704, 4096)), "a sector that stands elsewhere");
    assert!(damaged(&|bytes| bytes.extend_from_within(12288..16384)), "a batch that stands twice");
    assert!(damaged(&|bytes| bytes.truncate(4000)), "the header is cut");
    assert!(damaged(&|bytes| bytes.clear()), "the file is empty");
    assert!(damaged(&|bytes| *bytes = disk.bytes("00000002.era").unwrap()), "another era's file");
    assert!(damaged(&|bytes| bytes.resize(1 << 20, 0)), "it is longer than it can be");
}

#[test]
fn another_session_stands_for_everything_and_another_version_is_refused() {
    let (disk, _) = sample();
    let image = disk.crash(0);
    let storage: std::sync::Arc<dyn Storage> = std::sync::Arc::new(image);
    let other = SessionId::from_bytes([9; 16]);
    let (_, found) = ActivityLog::open(storage, other, Timestamp(1), config()).unwrap();
    assert!(found.everything);

    let image = disk.crash(0);
    let mut bytes = image.bytes("00000001.era").unwrap();
    bytes[8] = 2;
    let sum = *blake3::hash(&bytes[..64]).as_bytes();
    bytes[64..96].copy_from_slice(&sum);
    image.put("00000001.era", &bytes);
    assert!(matches!(open(&image), Err(ActivityError::UnknownVersion { version: 2, .. })));
    assert_eq!(image.list().unwrap(), disk.list().unwrap(), "nothing was changed");
}

/// The byte map of version 1 does not change.
#[test]
fn the_bytes_of_version_1() {
    let (disk, _) = sample();
    let bytes = disk.bytes("00000001.era").unwrap();
    assert_eq!(bytes[..8], ACTIVITY_MAGIC);
    assert_eq!(bytes[8..12], [1, 0, 0, 0]);
    assert_eq!(bytes[16..32], *b"a session's name");
    assert_eq!(bytes[32..40], 1_u64.to_le_bytes());
    assert_eq!(bytes[40..48], 1000_u64.to_le_bytes());
    let sector = &bytes[8704..9216];
    assert_eq!(sector[16..24], 2_u64.to_le_bytes(), "batch");
    assert_eq!(sector[24..28], 17_u32.to_le_bytes(), "place");
    assert_eq!(sector[28..32], [2, 1, 0, 0], "entries, last of its batch");
    let entry = &sector[32..56];
    assert_eq!(entry[..4], [2, 0, 0, 0], "volume 23 % 3");
    assert_eq!(entry[4..], super::name(23).1.to_bytes());
    let sum = blake3::hash(&bytes[..]).to_hex();
    assert_eq!(sum.as_str(), "05ffa4a5dfc03345812ff86efdf0c3737748530dde2042ef36ccf80806f3f5a9");
}
