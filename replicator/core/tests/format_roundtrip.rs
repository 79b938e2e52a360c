//! What goes into the byte formats comes out again.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod format_common;

use format_common::{config, file, place, sample, stamp, strategy};
use proptest::prelude::*;
use twinfs_core::format::describe;
use twinfs_core::id::{SetHash, SetNumber, VolumeName};
use twinfs_core::limits;
use twinfs_core::record_set::{
    BuildError, Builder, FrameIndex, SetPlace, SetPrefix, Unpacker, UnverifiedSet, VerifiedSet,
};
use twinfs_core::stamp::Seq;
use twinfs_core::token::{Token, TokenBatch, encode_batch};
use twinfs_core::update::{self, Op, Update};

fn build(builder: &mut Builder, updates: &[(Update, Vec<u8>)], level: i32) -> VerifiedSet {
    for (update, data) in updates {
        builder.push_update(update, data).unwrap();
    }
    let set = builder.finish(place(), level).unwrap();
    let verified = UnverifiedSet(set.bytes.clone()).verify().unwrap();
    assert_eq!((verified.header(), verified.hash()), (&set.header, set.hash));
    assert_eq!(verified.bytes(), &set.bytes);
    verified
}

/// Reads a range as a journal does: the head of the set, its frame table, then one frame after the other.
fn read_at_random(bytes: &[u8], offset: u32, len: u32) -> Vec<u8> {
    let prefix = SetPrefix::parse(&bytes[..bytes.len().min(limits::SET_HEADER_BYTES_MAX)]).unwrap();
    assert_eq!(prefix.encoded_len(), bytes.len());
    let index = FrameIndex::parse(&prefix, &bytes[prefix.table_range()]).unwrap();
    let (mut unpacker, mut out) = (Unpacker::new(), Vec::new());
    for frame in index.data_frames_of(offset, len).unwrap() {
        let mut raw = Vec::new();
        unpacker.unpack(frame, &bytes[frame.stored_range()], &mut raw).unwrap();
        assert_eq!(raw.len(), frame.raw_len as usize);
        let start = offset.saturating_sub(frame.raw_at) as usize;
        let end = ((offset + len - frame.raw_at) as usize).min(raw.len());
        out.extend_from_slice(&raw[start..end]);
    }
    out
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn updates_come_back(update in strategy::update(stamp(0)), at in 0_usize..1000) {
        let mut bytes = Vec::new();
        update::encode(&update, &mut bytes);
        let len = bytes.len();
        prop_assert!(len <= limits::UPDATE_META_BYTES_MAX);
        bytes.extend_from_slice(b"what follows");
        prop_assert_eq!(update::decode(&bytes, at), Ok((update.clone(), len)));
        // Stamped later, it is the same update with another stamp.
        update::patch_stamp(&mut bytes, stamp(9));
        prop_assert_eq!(update::decode(&bytes, at), Ok((Update { stamp: stamp(9), ..update }, len)));
    }

    #[test]
    fn tokens_come_back(updates in strategy::updates(0..40)) {
        let tokens: Vec<_> = updates.iter().map(|(update, _)| Token::of(update)).collect();
        let volume = VolumeName::new("home").unwrap();
        let mut bytes = b"before".to_vec();
        prop_assert_eq!(encode_batch(&volume, &tokens, &mut bytes), tokens.len());
        prop_assert_eq!(TokenBatch::decode(&bytes[6..]), Ok(TokenBatch { volume, tokens }));
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn sets_come_back(
        updates in strategy::updates(1..40),
        level in 0_i32..4,
        cuts in any::<[prop::sample::Index; 4]>(),
    ) {
        let mut builder = Builder::new();
        let set = build(&mut builder, &updates, level);
        let meta = set.meta().unwrap();
        let all: Vec<u8> = updates.iter().flat_map(|(_, data)| data).copied().collect();
        prop_assert_eq!(set.data(0, set.header().data_len).unwrap(), &all[..]);
        prop_assert_eq!(meta.updates.len(), updates.len());
        for ((found, data_at), (update, data)) in meta.updates.iter().zip(&updates) {
            prop_assert_eq!(found, update);
            prop_assert_eq!(&set.data(*data_at, found.op.data_len()).unwrap(), data);
        }
        let mentioned: std::collections::BTreeSet<_> = updates.iter().flat_map(|(u, _)| u.files()).collect();
        let mut listed: Vec<_> = meta.files.iter().map(|hint| hint.file).collect();
        listed.sort();
        prop_assert_eq!(listed, mentioned.into_iter().collect::<Vec<_>>());
        for pair in cuts.chunks(2) {
            let mut ends = [pair[0].index(all.len() + 1), pair[1].index(all.len() + 1)];
            ends.sort_unstable();
            let [start, end] = ends;
            let read = read_at_random(set.bytes(), start as u32, (end - start) as u32);
            prop_assert_eq!(&read[..], &all[start..end]);
        }
        // Used again, a builder makes the same set of the same updates.
        let again = build(&mut builder, &updates, level);
        prop_assert_eq!(again.bytes(), set.bytes());
        // Every byte of it can be shown to a person.
        describe(&set, &meta, &mut String::new()).unwrap();
    }
}

#[test]
fn data_over_several_frames_can_be_read_at_random() {
    let len = limits::WRITE_BYTES_MAX as u32;
    let write = |index: u64| {
        let op = Op::Write { file: file(40), offset: index << 20, len };
        format_common::update(index, op, &[(file(40), format_common::attr(0o100_644))])
    };
    // The first half of the data can be compressed, the second cannot.
    let updates: Vec<_> =
        (0..4).map(|index| (write(index), strategy::data(len as usize, index as u8, index < 2))).collect();
    let set = build(&mut Builder::new(), &updates, 1);
    let frames = set.frames().data_frames();
    assert_eq!(frames.len(), 32);
    assert!(frames[..16].iter().all(|frame| !frame.is_raw && frame.stored_len < 1000));
    assert!(frames[16..].iter().all(|frame| frame.is_raw && frame.stored_len == 128 << 10));
    let all: Vec<u8> = updates.iter().flat_map(|(_, data)| data).copied().collect();
    let frame = limits::FRAME_BYTES as u32;
    for (offset, len) in [(0, 1), (frame - 1, 2), (16 * frame - 5, 10), (17 * frame, frame), (4 * len - 1, 1)]
    {
        let want = &all[offset as usize..(offset + len) as usize];
        assert_eq!(read_at_random(set.bytes(), offset, len), want);
        assert_eq!(set.data(offset, len).unwrap(), want);
        let touched = set.frames().data_frames_of(offset, len).unwrap().len() as u32;
        assert_eq!(touched, (offset + len - 1) / frame - offset / frame + 1);
    }
    assert!(set.data(4 * len, 1).is_err());
    assert!(set.data(u32::MAX, 2).is_err());
    assert_eq!(set.data(4 * len, 0).unwrap(), []);
}

#[test]
fn null_sets_have_no_body_and_may_be_the_first() {
    let first = SetPlace { number: SetNumber(0), predecessor: SetHash::NONE, first_seq: Seq(1), ..place() };
    for place in [place(), first] {
        let set = Builder::new().finish(place.clone(), 3).unwrap();
        assert_eq!(set.bytes.len(), 221);
        let verified = UnverifiedSet(set.bytes).verify().unwrap();
        assert!(verified.header().is_null());
        assert_eq!(verified.header().last_seq().next(), place.first_seq);
        assert_eq!(verified.meta().unwrap().updates, []);
        assert_eq!(verified.data(0, 0).unwrap(), []);
    }
}

#[test]
fn paths_are_hints_of_mentioned_files() {
    let mut builder = Builder::new();
    for (update, data) in &sample() {
        builder.push_update(update, data).unwrap();
    }
    assert_eq!(builder.files().collect::<Vec<_>>(), [file(2), file(40), file(33)]);
    assert!(!builder.add_path(file(99), b"not/mentioned"));
    for bad in [&b"/absolute"[..], b"a//b", b"a/", b"../up", b"a/./b", b"a\0b"] {
        assert!(!builder.add_path(file(40), bad), "{}", bad.escape_ascii());
    }
    // The longest path that fits as it is, and one that is cut between two components.
    let long = [&b"cut-me/"[..], &b"0123456/".repeat(511), b"01234567"].concat();
    assert_eq!(long.len() - 7, limits::PATH_HINT_BYTES_MAX);
    assert!(builder.add_path(file(40), &long));
    assert!(builder.add_path(file(33), &long[6 - 3..]));
    assert!(!builder.add_path(file(33), b"another"));
    let set = builder.finish(place(), 1).unwrap();
    let meta = UnverifiedSet(set.bytes).verify().unwrap().meta().unwrap();
    let paths: Vec<_> = meta.files.iter().map(|hint| &*hint.path).collect();
    assert_eq!(paths, [&b""[..], &long[7..], &long[7..]]);
}

#[test]
fn a_builder_refuses_what_would_make_a_bad_set_and_stays_as_it_was() {
    let updates = sample();
    let mut builder = Builder::new();
    builder.push_update(&updates[0].0, b"").unwrap();
    let before = builder.raw_len();
    let encoded = |update: &Update| {
        let mut bytes = Vec::new();
        update::encode(update, &mut bytes);
        bytes
    };
    let again = builder.push(&encoded(&updates[0].0), |_| panic!("no data"));
    assert_eq!(again, Err(BuildError::Order(Seq(101))));
    assert_eq!(builder.push_update(&updates[2].0, b""), Err(BuildError::Order(Seq(103))));
    let short = builder.push(&encoded(&updates[1].0), |buffer| buffer.extend_from_slice(b"hell"));
    assert_eq!(short, Err(BuildError::Data { have: 4, want: 5 }));
    assert!(matches!(builder.push(b"nonsense", |_| ()), Err(BuildError::Update(_))));
    let padded = [encoded(&updates[1].0), vec![0]].concat();
    assert!(matches!(builder.push(&padded, |_| ()), Err(BuildError::Update(_))));
    let elsewhere = SetPlace { first_seq: Seq(100), ..place() };
    assert!(matches!(builder.finish(elsewhere, 1), Err(BuildError::Place(_))));
    let later = SetPlace { start: stamp(0).time, ..place() };
    assert!(matches!(builder.finish(later, 1), Err(BuildError::Place(_))));
    let unchained = SetPlace { predecessor: SetHash::NONE, ..place() };
    assert!(matches!(builder.finish(unchained, 1), Err(BuildError::Place(_))));
    assert_eq!((builder.updates(), builder.raw_len()), (1, before));
    for (update, data) in &updates[1..] {
        builder.push_update(update, data).unwrap();
    }
    let set = builder.finish(place(), 1).unwrap();
    assert_eq!(set.bytes, build(&mut Builder::new(), &updates, 1).bytes());
    assert!(builder.is_empty() && builder.raw_len() == 0);
}

#[test]
fn a_builder_has_room_until_it_is_full() {
    // The largest updates there are, of new files each, with the longest paths.
    let mut builder = Builder::new();
    let mut pushed = 0;
    while !builder.is_full() {
        let (dir, object) = (file(10 * pushed + 1000), file(10 * pushed + 1001));
        let op = Op::SetXattr {
            file: object,
            name: vec![b'n'; 255].into(),
            value: vec![b'v'; limits::XATTR_VALUE_BYTES_MAX].into(),
        };
        let attr = format_common::attr(0o100_644);
        builder.push_update(&format_common::update(pushed, op, &[(dir, attr), (object, attr)]), b"").unwrap();
        builder.add_path(object, &b"0123456/".repeat(512)[..4095]);
        pushed += 1;
    }
    assert!(builder.raw_len() < limits::SET_META_BYTES_MAX);
    // Beyond that it takes more for a while, and then says so.
    let op = Op::Write { file: file(1), offset: 0, len: 1 << 20 };
    let refused = loop {
        let update = format_common::update(pushed, op.clone(), &[(file(1), format_common::attr(0o100_644))]);
        match builder.push_update(&update, &vec![0; 1 << 20]) {
            Ok(()) => pushed += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, BuildError::Full);
    let set = builder.finish(place(), 1).unwrap();
    assert_eq!(set.header.data_len as usize, limits::SET_DATA_BYTES_MAX);
    UnverifiedSet(set.bytes).verify().unwrap().meta().unwrap();
}

#[test]
fn tiny_updates_fill_a_set_by_their_number() {
    let mut builder = Builder::new();
    while !builder.is_full() {
        let update = format_common::update(u64::from(builder.updates()), Op::Complete, &[]);
        builder.push_update(&update, b"").unwrap();
    }
    assert_eq!(builder.updates() as usize, limits::SET_UPDATES_MAX);
    let next = format_common::update(u64::from(builder.updates()), Op::Complete, &[]);
    assert_eq!(builder.push_update(&next, b""), Err(BuildError::Full));
    let place = SetPlace { end: next.stamp.time, ..place() };
    let set = builder.finish(place, 1).unwrap();
    assert_eq!(
        UnverifiedSet(set.bytes).verify().unwrap().meta().unwrap().updates.len(),
        limits::SET_UPDATES_MAX
    );
}

#[test]
fn token_batches_take_no_more_than_their_bounds() {
    let volume = VolumeName::new("v".repeat(limits::LABEL_BYTES_MAX)).unwrap();
    let link = |index: u64, name: &[u8]| {
        Token::of(&format_common::update(
            index,
            Op::Link { dir: file(2), name: name.into(), file: file(3) },
            &[],
        ))
    };
    for (name, by_bytes) in [(&b"a"[..], false), (&[b'x'; 255], true)] {
        let tokens: Vec<_> = (0..5000).map(|index| link(index, name)).collect();
        let mut bytes = Vec::new();
        let taken = encode_batch(&volume, &tokens, &mut bytes);
        assert!(bytes.len() <= limits::TOKEN_BATCH_BYTES_MAX);
        assert_eq!(taken < limits::TOKEN_BATCH_MAX, by_bytes);
        let batch = TokenBatch::decode(&bytes).unwrap();
        assert_eq!(batch.tokens, tokens[..taken]);
    }
}
