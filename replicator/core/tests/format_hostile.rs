//! Record sets of a wrong or hostile peer: every checksum and hash is right, what they cover is not.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod format_common;

use format_common::forge::{Forged, RAW, file_table};
use format_common::{attr, file, place, sample, stamp, update};
use twinfs_core::id::{FileId, SetHash, SetNumber};
use twinfs_core::limits;
use twinfs_core::record_set::{BadSet, SetMeta, SetPlace, UnverifiedSet};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::{BadTokens, Token, TokenBatch, encode_batch};
use twinfs_core::update::{self, Op, Update};

/// What a receiver does with a set before it takes it.
fn take(forged: &Forged) -> Result<SetMeta, BadSet> {
    UnverifiedSet(forged.bytes().into()).verify()?.meta()
}

fn honest() -> Forged {
    Forged::of_updates(place(), &sample())
}

fn section_of(files: &[FileId], updates: &[Vec<u8>]) -> Vec<u8> {
    let files: Vec<_> = files.iter().map(|file| (file.to_bytes(), Vec::new())).collect();
    [file_table(&files), updates.concat()].concat()
}

/// A set of one update, given by its bytes.
fn of_encoded(encoded: Vec<u8>, data: &[u8]) -> Forged {
    let files = [file(1), file(2), file(33), file(40)];
    Forged::of_sections(place(), 1, &section_of(&files, &[encoded]), data)
}

fn encoded(update: &Update) -> Vec<u8> {
    let mut bytes = Vec::new();
    update::encode(update, &mut bytes);
    bytes
}

#[test]
fn the_forger_can_write_honest_sets() {
    let meta = take(&honest()).unwrap();
    assert_eq!(meta.updates.into_iter().map(|(update, _)| update).collect::<Vec<_>>(), updates_of_sample());
}

fn updates_of_sample() -> Vec<Update> {
    sample().into_iter().map(|(update, _)| update).collect()
}

#[test]
fn headers_that_cannot_be_are_refused() {
    type Change = fn(&mut Forged);
    let changes: &[(&str, Change)] = &[
        ("no volume name", |set| set.volume = vec![]),
        ("a volume name that climbs", |set| set.volume = b"../etc".to_vec()),
        ("a volume name that is hidden", |set| set.volume = b".twinfs".to_vec()),
        ("a volume name that is too long", |set| set.volume = vec![b'a'; 65]),
        ("a volume name that is no text", |set| set.volume = vec![0xff, 0xfe]),
        ("a header that is longer than its fields", |set| set.header_len = Some(222)),
        ("a header that is shorter than its fields", |set| set.header_len = Some(218)),
        ("a header of nothing", |set| set.header_len = Some(0)),
        ("a header that never ends", |set| set.header_len = Some(u16::MAX)),
        ("a volume name that ends before the header", |set| set.volume_len = Some(3)),
        ("a volume name that ends after the header", |set| set.volume_len = Some(5)),
        ("no instance", |set| set.instance = 0),
        ("a root of no instance", |set| set.root = [0; 20]),
        ("more updates than a set has", |set| set.updates = 65_537),
        ("more updates than its metadata can hold", |set| set.updates = 1000),
        ("a huge number of updates", |set| set.updates = u32::MAX),
        ("a null set with a body", |set| set.updates = 0),
        ("huge metadata", |set| set.meta_len = u32::MAX),
        ("huge data", |set| set.data_len = u32::MAX),
        ("more data than its body can hold", |set| set.data_len = 8 << 20),
        ("less data than its body holds", |set| set.data_len = 0),
        ("sequence numbers from zero", |set| set.place.first_seq = Seq(0)),
        ("sequence numbers that overflow", |set| set.place.first_seq = Seq(u64::MAX - 1)),
        ("the last sequence numbers", |set| set.place.first_seq = Seq(u64::MAX - 3)),
        ("an interval that ends before it starts", |set| set.place.end = Timestamp(5)),
        ("an interval of no time", |set| set.place.end = set.place.start),
        ("an interval that never ends", |set| set.place.end = Timestamp(u64::MAX)),
        ("no number", |set| set.place.number = SetNumber(0)),
        ("the last number", |set| set.place.number = SetNumber(u64::MAX)),
        ("a first set with a predecessor", |set| set.place.number = SetNumber(1)),
        ("a later set without one", |set| set.place.predecessor = SetHash::NONE),
        ("the last epoch", |set| set.place.epoch.number = u64::MAX),
        ("a huge body", |set| set.body_len = Some(u32::MAX)),
        ("no body", |set| set.body_len = Some(0)),
    ];
    for (what, change) in changes {
        let mut set = honest();
        change(&mut set);
        let error = take(&set).unwrap_err();
        // With another header length, the checksum that the reader computes is over other bytes.
        let good = matches!(error, BadSet::Header(_) | BadSet::HeaderChecksum | BadSet::Length { .. });
        assert!(good, "{what}: {error}");
    }
}

#[test]
fn other_versions_are_called_by_their_number() {
    for version in [0, 2, u16::MAX] {
        let set = Forged { version, ..honest() };
        assert_eq!(take(&set), Err(BadSet::Version(version)));
    }
}

#[test]
fn frame_tables_that_lie_are_refused() {
    type Change = fn(&mut Forged);
    let changes: &[(&str, Change)] = &[
        ("a raw frame that is shorter than it says", |set| set.frames[0].1.truncate(3)),
        ("a raw frame that is longer than it says", |set| set.frames[0].1.push(0)),
        ("a raw frame that is said to be shorter", |set| set.frames[0].0 -= 1),
        ("a compressed frame as long as a raw one", |set| set.frames[0].0 &= !RAW),
        ("a frame of nothing", |set| set.frames[0].0 = 0),
        ("a frame of nearly everything", |set| set.frames[0].0 = !RAW),
        ("a frame too many", |set| set.frames.push((RAW, vec![]))),
        ("a frame too few", |set| drop(set.frames.pop())),
    ];
    for (what, change) in changes {
        let mut set = honest();
        change(&mut set);
        let error = take(&set).unwrap_err();
        let good = matches!(
            error,
            BadSet::FrameTable(_)
                | BadSet::Header(_)
                | BadSet::BodyHash
                | BadSet::Length { .. }
                | BadSet::FrameHash(_)
        );
        assert!(good, "{what}: {error}");
    }
    // Two frames whose lengths are both wrong, and whose sum is right.
    let mut set = honest();
    let moved = set.frames[0].1.pop().unwrap();
    set.frames[1].1.insert(0, moved);
    set.frames[0].0 -= 1;
    set.frames[1].0 += 1;
    assert!(matches!(take(&set), Err(BadSet::FrameTable(_))));
}

#[test]
fn a_body_under_the_header_of_another_set_is_refused() {
    // Frames and frame table agree with each other, and have the lengths of the ones that they stand for.
    let honest = honest().bytes();
    let mut updates = sample();
    updates[1].1 = b"HELLO".to_vec();
    let other = Forged::of_updates(place(), &updates).bytes();
    let swapped = [&honest[..221], &other[221..]].concat();
    assert_eq!(UnverifiedSet(swapped.into()).verify().unwrap_err(), BadSet::BodyHash);
}

#[test]
fn bytes_after_the_last_frame_are_refused() {
    let mut set = honest();
    let raw = vec![0; 1000];
    let packed = zstd::bulk::compress(&raw, 1).unwrap();
    set.data_len = 1000;
    set.frames[1] = (packed.len() as u32, packed);
    set.body_len = Some(set.bytes().len() as u32 - 221 + 1);
    let bytes = [set.bytes(), vec![0]].concat();
    let error = UnverifiedSet(bytes.into()).verify().unwrap_err();
    assert!(matches!(error, BadSet::FrameTable(_)), "{error}");
}

#[test]
fn tokens_that_cannot_be_are_refused() {
    let honest: Vec<_> = updates_of_sample().iter().map(Token::of).collect();
    let encode = |tokens: &[Token]| {
        let mut bytes = Vec::new();
        assert_eq!(encode_batch(&place().volume, tokens, &mut bytes), tokens.len());
        bytes
    };
    let with = |change: fn(&mut Vec<Token>)| {
        let mut tokens = honest.clone();
        change(&mut tokens);
        encode(&tokens)
    };
    let set_count = |count: u16| {
        let mut bytes = encode(&honest);
        bytes[2..4].copy_from_slice(&count.to_le_bytes());
        bytes
    };
    let xattr = |name: &[u8]| {
        let op = Op::RemoveXattr { file: file(40), name: name.into() };
        encode(&[Token::of(&update(0, op, &[]))])
    };
    let second = |name: &[u8]| {
        let mut tokens = honest.clone();
        tokens[2].to.as_mut().unwrap().name = name.into();
        encode(&tokens)
    };
    assert!(TokenBatch::decode(&encode(&honest)).is_ok() && TokenBatch::decode(&xattr(b"user.a")).is_ok());
    let cases = [
        ("a name that climbs", with(|tokens| tokens[0].name = (*b"..").into())),
        ("a name with a slash", with(|tokens| tokens[0].name = (*b"a/b").into())),
        ("no name", with(|tokens| tokens[2].name = [].into())),
        ("a second name that climbs", second(b"..")),
        ("no second name", second(b"")),
        ("an xattr of twinfs", xattr(b"trusted.twinfs.id")),
        ("a range at 2^63", with(|tokens| tokens[1].range = (1 << 63, 0))),
        ("a range that overflows", with(|tokens| tokens[1].range = (u64::MAX, 1))),
        ("sequence number zero", with(|tokens| tokens[0].stamp.seq = Seq(0))),
        ("a sequence number twice", with(|tokens| tokens[2].stamp.seq = tokens[1].stamp.seq)),
        ("a time twice", with(|tokens| tokens[2].stamp.time = tokens[1].stamp.time)),
        ("bytes left over", [encode(&honest), vec![0]].concat()),
        ("fewer tokens than it holds", set_count(2)),
        ("more tokens than it holds", set_count(4)),
        ("more tokens than a batch may hold", set_count(u16::MAX)),
    ];
    for (what, bytes) in cases {
        let error = TokenBatch::decode(&bytes).unwrap_err();
        assert!(matches!(error, BadTokens::Malformed { .. }), "{what}: {error}");
    }
    let mut bytes = encode(&honest);
    bytes[0] = 1;
    assert_eq!(TokenBatch::decode(&bytes), Err(BadTokens::Version(1)));
    bytes[0] = 2;
    bytes[5] = b'/';
    assert!(TokenBatch::decode(&bytes).is_err());
}

#[test]
fn zstd_bombs_are_refused() {
    // A GiB of zeros in some 32 KiB.
    let mut bomb = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    for _ in 0..1024 {
        std::io::Write::write_all(&mut bomb, &vec![0; 1 << 20]).unwrap();
    }
    let bomb = bomb.finish().unwrap();
    assert!(bomb.len() < limits::FRAME_BYTES, "{}", bomb.len());
    let compress = |raw: &[u8]| zstd::bulk::compress(raw, 3).unwrap();
    let stored = |bytes: &[u8]| (bytes.len() as u32, bytes.to_vec());
    let raw = honest().frames[0].1.clone();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], &[0; 4]].concat();
    let frames = [
        ("a GiB instead of a frame", 2 * limits::FRAME_BYTES, bomb.clone()),
        ("a byte more", limits::FRAME_BYTES, compress(&vec![0; limits::FRAME_BYTES + 1])),
        ("a byte less", limits::FRAME_BYTES, compress(&vec![0; limits::FRAME_BYTES - 1])),
        ("two frames, the second too much", limits::FRAME_BYTES, [compress(&raw), bomb].concat()),
        ("nothing but a skippable frame", limits::FRAME_BYTES, skippable),
        ("what zstd does not know", limits::FRAME_BYTES, vec![0xff; 50]),
        (
            "a frame that is cut off",
            limits::FRAME_BYTES,
            compress(&vec![7; limits::FRAME_BYTES])[..10].to_vec(),
        ),
    ];
    for (what, meta_len, frame) in frames {
        let mut set = honest();
        set.meta_len = meta_len as u32;
        let mut table = vec![stored(&frame)];
        if meta_len > limits::FRAME_BYTES {
            table.push(stored(&compress(&vec![0; limits::FRAME_BYTES])));
        }
        set.frames.splice(0..1, table);
        assert_eq!(take(&set), Err(BadSet::Frame(0)), "{what}");
    }
    // The same in the data section: found when it is read, and only so much is set aside for it.
    let mut set = honest();
    set.data_len = 100;
    set.frames[1] = stored(&compress(&vec![0; 1 << 20]));
    let verified = UnverifiedSet(set.bytes().into()).verify().unwrap();
    assert_eq!(verified.data(0, 100), Err(BadSet::Frame(1)));
}

#[test]
fn file_tables_that_cannot_be_are_refused() {
    let updates: Vec<u8> = updates_of_sample().iter().flat_map(encoded).collect();
    let known = [file(2), file(40), file(33)];
    let with_hint = |path: &[u8]| file_table(&known.map(|file| (file.to_bytes(), path.to_vec())));
    let tables = [
        ("a file twice", file_table(&[2, 40, 33, 2].map(|ino| (file(ino).to_bytes(), vec![])))),
        ("a file of no instance", file_table(&[([0; 20], vec![])])),
        ("a huge count", u32::MAX.to_le_bytes().to_vec()),
        ("a count of one more", [&4_u32.to_le_bytes()[..], &with_hint(b"")[4..]].concat()),
        ("an absolute path", with_hint(b"/etc/passwd")),
        ("a path that climbs", with_hint(b"a/../../b")),
        ("a path with NUL", with_hint(b"a\0b")),
        ("a path with an empty name", with_hint(b"a//b")),
        ("a path with a name that is too long", with_hint(&[b'x'; 256])),
        ("a path that is too long", with_hint(&b"x/".repeat(2049)[..4097])),
    ];
    for (what, table) in tables {
        let meta = [table, updates.clone()].concat();
        let error = take(&Forged::of_sections(place(), 3, &meta, b"hello")).unwrap_err();
        assert!(matches!(error, BadSet::FileTable(_) | BadSet::Update(_)), "{what}: {error}");
    }
    let meta = section_of(&known[..2], &[updates]);
    let error = take(&Forged::of_sections(place(), 3, &meta, b"hello")).unwrap_err();
    assert!(matches!(error, BadSet::Misplaced { seq: Seq(103), .. }), "{error}");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let long = [b'x'; 256];
    for name in [&b""[..], b".", b"..", b"a/b", b"/", b"../../etc/passwd", b"a\0b", &long] {
        let name = || name.into();
        let ops = [
            Op::Create { dir: file(2), name: name(), file: file(40), target: [].into() },
            Op::Link { dir: file(2), name: name(), file: file(40) },
            Op::Unlink { dir: file(2), name: name(), file: file(40) },
            Op::Bind { dir: file(2), name: name(), file: file(40) },
            Op::Rename {
                from_dir: file(2),
                from: name(),
                to_dir: file(2),
                to: (*b"to").into(),
                file: file(40),
                replaced: None,
            },
            Op::Rename {
                from_dir: file(2),
                from: (*b"from").into(),
                to_dir: file(2),
                to: name(),
                file: file(40),
                replaced: None,
            },
            Op::Exchange {
                a_dir: file(2),
                a: (*b"a").into(),
                a_file: file(40),
                b_dir: file(2),
                b: name(),
                b_file: file(33),
            },
        ];
        for op in ops {
            let kind = op.kind();
            let bytes = encoded(&update(0, op, &[(file(40), attr(0o100_644))]));
            let error = take(&of_encoded(bytes, b"")).unwrap_err();
            assert!(matches!(error, BadSet::Update(_)), "{kind}: {error}");
        }
    }
    for name in [&b""[..], b"user.a\0b", b"trusted.twinfs.id", &long] {
        let set = Op::SetXattr { file: file(40), name: name.into(), value: [].into() };
        let remove = Op::RemoveXattr { file: file(40), name: name.into() };
        for op in [set, remove] {
            let error = take(&of_encoded(encoded(&update(0, op, &[])), b"")).unwrap_err();
            assert!(matches!(error, BadSet::Update(_)), "{error}");
        }
    }
}

#[test]
fn values_out_of_range_are_refused() {
    const TOO_FAR: u64 = 1 << 63;
    let (it, good) = (file(40), attr(0o100_644));
    let with = |op: Op| update(0, op, &[(it, good)]);
    let with_attr = |attr| update(0, Op::SetAttr { file: it }, &[(it, attr)]);
    let object =
        |target: &[u8], attr| update(0, Op::Object { file: it, target: target.into() }, &[(it, attr)]);
    let updates = [
        ("a write at 2^63", with(Op::Write { file: it, offset: TOO_FAR, len: 1 })),
        ("a write past 2^63", with(Op::Write { file: it, offset: TOO_FAR - 1, len: 1 })),
        ("a write that overflows", with(Op::Write { file: it, offset: u64::MAX, len: 1 })),
        ("a write of nothing", with(Op::Write { file: it, offset: 0, len: 0 })),
        ("a write that is too large", with(Op::Write { file: it, offset: 0, len: (1 << 20) + 1 })),
        ("a huge write", with(Op::Write { file: it, offset: 0, len: u32::MAX })),
        ("a size of 2^63", with(Op::Truncate { file: it, size: TOO_FAR })),
        ("a hole to 2^63", with(Op::Zero { file: it, offset: 1, len: TOO_FAR - 1, hole: true })),
        ("a hole that overflows", with(Op::Zero { file: it, offset: 2, len: u64::MAX, hole: true })),
        ("a cut at 2^63", with(Op::Collapse { file: it, offset: TOO_FAR, len: 0 })),
        ("an insert of 2^63", with(Op::Insert { file: it, offset: 0, len: TOO_FAR })),
        ("attributes with a size of 2^63", with_attr(update::Attr { size: TOO_FAR, ..good })),
        ("a time with too many nanoseconds", with_attr(update::Attr { mtime_ns: 1_000_000_000, ..good })),
        ("an object of no kind", with_attr(attr(0o644))),
        ("an object of two kinds", with_attr(attr(0o170_644))),
        ("mode bits that do not exist", with_attr(attr(0o1_100_644))),
        ("a symlink to nowhere", object(b"", attr(0o120_777))),
        ("a symlink with NUL", object(b"a\0b", attr(0o120_777))),
        ("a symlink that is too long", object(&[b'x'; 4096], attr(0o120_777))),
        ("a file with a target", object(b"target", good)),
        ("a directory that is written to", {
            update(0, Op::Write { file: it, offset: 0, len: 5 }, &[(it, attr(0o040_755))])
        }),
        ("a write without attributes", update(0, Op::Write { file: it, offset: 0, len: 5 }, &[])),
        ("a birth without attributes", update(0, Op::Object { file: it, target: [].into() }, &[])),
        ("an xattr that is too large", {
            let value = vec![0; limits::XATTR_VALUE_BYTES_MAX + 1].into();
            update(0, Op::SetXattr { file: it, name: (*b"user.a").into(), value }, &[])
        }),
    ];
    for (what, update) in updates {
        let error = take(&of_encoded(encoded(&update), b"hello")).unwrap_err();
        assert!(matches!(error, BadSet::Update(_)), "{what}: {error}");
    }
}

#[test]
fn updates_that_cannot_be_are_refused() {
    let good = || encoded(&sample()[0].0);
    let change = |change: fn(&mut Vec<u8>)| {
        let mut bytes = good();
        change(&mut bytes);
        bytes
    };
    let set_len = |bytes: &mut Vec<u8>, len: usize| bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    let mut twice = good();
    let attrs = twice[twice.len() - 64..].to_vec();
    twice.extend_from_slice(&attrs);
    twice[5] = 2;
    let len = twice.len();
    set_len(&mut twice, len);
    let mut padded = [good(), vec![0]].concat();
    let len = padded.len();
    set_len(&mut padded, len);
    let mut flag = encoded(&sample()[2].0);
    let replaced = file(33).to_bytes();
    let at = flag.windows(20).position(|window| window == replaced).unwrap() - 1;
    flag[at] = 2;
    let cases = [
        ("attributes of one object twice", twice),
        ("bytes left over in an update", padded),
        ("a flag that is neither", flag),
        ("operation 0", change(|bytes| bytes[4] = 0)),
        ("an unknown operation", change(|bytes| bytes[4] = 19)),
        ("the last operation", change(|bytes| bytes[4] = 255)),
        ("too many attributes", change(|bytes| bytes[5] = 5)),
        ("attributes that are not there", change(|bytes| bytes[5] = 2)),
        ("reserved bytes in use", change(|bytes| bytes[6] = 1)),
        ("a length of nothing", change(|bytes| bytes[..4].fill(0))),
        ("a length of 23", change(|bytes| bytes[0] = 23)),
        ("a huge length", change(|bytes| bytes[..4].fill(0xff))),
        ("a length past the section", change(|bytes| bytes[0] += 1)),
        ("a directory of no instance", change(|bytes| bytes[24..32].fill(0))),
    ];
    for (what, bytes) in cases {
        let error = take(&of_encoded(bytes, b"")).unwrap_err();
        assert!(matches!(error, BadSet::Update(_)), "{what}: {error}");
    }
}

#[test]
fn updates_that_do_not_belong_into_the_set_are_refused() {
    let due = |set: &Forged| match take(set).unwrap_err() {
        BadSet::Misplaced { seq, .. } => seq,
        other => panic!("{other}"),
    };
    let with = |change: fn(&mut Vec<(Update, Vec<u8>)>)| {
        let mut updates = sample();
        change(&mut updates);
        Forged::of_updates(place(), &updates)
    };
    // A gap, a sequence number twice, and one that goes back.
    assert_eq!(due(&with(|updates| updates[1].0.stamp.seq = Seq(103))), Seq(102));
    assert_eq!(due(&with(|updates| updates[1].0.stamp.seq = Seq(101))), Seq(102));
    assert_eq!(due(&with(|updates| updates.swap(0, 1))), Seq(101));
    assert_eq!(due(&Forged::of_updates(SetPlace { first_seq: Seq(100), ..place() }, &sample())), Seq(100));
    // Times that stand still, go back, or are out of the interval: its start is not in it, its end is.
    assert_eq!(due(&with(|updates| updates[1].0.stamp.time = stamp(0).time)), Seq(102));
    assert_eq!(due(&with(|updates| updates[2].0.stamp.time = stamp(0).time)), Seq(103));
    let after = |time| Forged::of_updates(SetPlace { start: time, ..place() }, &sample());
    assert_eq!(due(&after(stamp(0).time)), Seq(101));
    let until = |time| Forged::of_updates(SetPlace { end: time, ..place() }, &sample());
    assert!(take(&until(stamp(2).time)).is_ok());
    assert_eq!(due(&until(Timestamp(stamp(2).time.0 - 1))), Seq(103));
    // Data that is missing, or too much.
    assert_eq!(due(&with(|updates| updates[1].1.truncate(4))), Seq(102));
    assert_eq!(due(&with(|updates| updates[1].1.push(0))), Seq(103));
    let huge = |index| {
        let op = Op::Write { file: file(40), offset: 0, len: 1 << 20 };
        (update(index, op, &[(file(40), attr(0o100_644))]), vec![])
    };
    let updates: Vec<_> = (0..5000).map(huge).collect();
    assert_eq!(due(&Forged::of_updates(place(), &updates)), Seq(101));
    // More updates than the header says, and fewer.
    let more = Forged { updates: 2, ..honest() };
    assert_eq!(due(&more), Seq(102));
    let fewer = Forged { updates: 4, ..honest() };
    assert!(matches!(take(&fewer), Err(BadSet::Update(_))));
}
