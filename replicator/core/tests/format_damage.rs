//! Damaged bytes are refused: wherever they are cut, whichever bit flips.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod format_common;

use bytes::Bytes;
use format_common::{config, place, sample, strategy};
use proptest::prelude::*;
use twinfs_core::id::VolumeName;
use twinfs_core::record_set::{BadSet, Builder, FrameIndex, SetPrefix, UnverifiedSet};
use twinfs_core::token::{Token, TokenBatch, encode_batch};
use twinfs_core::update;

fn sets() -> Vec<Vec<u8>> {
    let mut builder = Builder::new();
    let null = builder.finish(place(), 1).unwrap();
    let mut sets = vec![null.bytes.to_vec()];
    for level in [0, 3] {
        for (update, data) in &sample() {
            builder.push_update(update, data).unwrap();
        }
        let first = builder.files().next().unwrap();
        assert!(builder.add_path(first, &b"long/enough/to/compress/".repeat(20)[..479]));
        sets.push(builder.finish(place(), level).unwrap().bytes.to_vec());
    }
    assert!(sets[2].len() < sets[1].len(), "one of them is compressed");
    sets
}

/// Whether bytes are accepted in any of the ways in which a set is read.
fn accepted(bytes: &[u8]) -> bool {
    let _ = SetPrefix::parse(bytes).and_then(|prefix| {
        let table = bytes.get(prefix.table_range()).unwrap_or_default();
        FrameIndex::parse(&prefix, table)
    });
    UnverifiedSet(Bytes::copy_from_slice(bytes)).verify().is_ok()
}

#[test]
fn a_set_cut_anywhere_is_refused() {
    for set in sets() {
        assert!(set.len() <= 8192 && accepted(&set));
        for len in 0..set.len() {
            let error = UnverifiedSet(Bytes::copy_from_slice(&set[..len])).verify().unwrap_err();
            assert!(
                matches!(error, BadSet::Length { have, want } if have == len && want > len),
                "{len}: {error}"
            );
        }
        let longer = [&set[..], &[0]].concat();
        assert!(!accepted(&longer));
    }
}

#[test]
fn a_set_with_any_bit_flipped_is_refused() {
    for mut set in sets() {
        for bit in 0..set.len() * 8 {
            set[bit / 8] ^= 1 << (bit % 8);
            assert!(!accepted(&set), "bit {bit}");
            set[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn updates_and_tokens_with_any_bit_flipped_or_cut_do_not_panic() {
    let tokens: Vec<_> = sample().iter().map(|(update, _)| Token::of(update)).collect();
    let mut batch = Vec::new();
    encode_batch(&VolumeName::new("home").unwrap(), &tokens, &mut batch);
    for len in 0..batch.len() {
        assert!(TokenBatch::decode(&batch[..len]).is_err(), "{len}");
    }
    for bit in 0..batch.len() * 8 {
        let mut flipped = batch.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let _ = TokenBatch::decode(&flipped);
    }
    for (update, _) in sample() {
        let mut bytes = Vec::new();
        update::encode(&update, &mut bytes);
        for len in 0..bytes.len() {
            assert!(update::decode(&bytes[..len], 0).is_err(), "{len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // Where it is accepted, it is another update, and it is the update that its bytes say.
            if let Ok((found, len)) = update::decode(&flipped, 0) {
                let mut again = Vec::new();
                update::encode(&found, &mut again);
                assert_eq!(again, flipped[..len]);
            }
        }
    }
}

/// Random bytes that look like an update for a while.
fn nearly_an_update() -> impl Strategy<Value = Vec<u8>> {
    (any::<u32>(), 0_u8..20, 0_u8..6, prop::collection::vec(any::<u8>(), 0..400), any::<bool>()).prop_map(
        |(len, kind, attrs, rest, length_is_right)| {
            let len = if length_is_right { rest.len() as u32 + 8 } else { len };
            [&len.to_le_bytes()[..], &[kind, attrs, 0, 0], &rest].concat()
        },
    )
}

proptest! {
    #![proptest_config(config(4096))]

    #[test]
    fn random_bytes_decode_to_what_they_say_or_to_nothing(bytes in nearly_an_update()) {
        if let Ok((update, len)) = update::decode(&bytes, 0) {
            let mut again = Vec::new();
            update::encode(&update, &mut again);
            prop_assert_eq!(&again[..], &bytes[..len]);
        }
    }

    #[test]
    fn random_bytes_are_no_set_and_no_tokens(mut bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0..3) {
        match kind {
            0 => bytes.splice(0..bytes.len().min(12), *b"TWINSET\0\x01\0\xdd\0").for_each(drop),
            1 => bytes.splice(0..bytes.len().min(6), *b"\x01\0\x03\0\x01v").for_each(drop),
            _ => {}
        }
        prop_assert!(!accepted(&bytes));
        let _ = TokenBatch::decode(&bytes);
    }
}

proptest! {
    #![proptest_config(config(512))]

    #[test]
    fn a_changed_update_decodes_to_what_it_says_or_to_nothing(
        update in strategy::update(format_common::stamp(0)),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = Vec::new();
        update::encode(&update, &mut bytes);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok((update, len)) = update::decode(&bytes, 0) {
            let mut again = Vec::new();
            update::encode(&update, &mut again);
            prop_assert_eq!(&again[..], &bytes[..len]);
        }
    }
}
