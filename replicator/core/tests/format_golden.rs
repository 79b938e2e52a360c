//! Version 1 as it was when it was first written. These bytes stand in journals: they must be readable for ever.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod format_common;

use format_common::forge::Forged;
use format_common::{hex, place, sample, unhex};
use twinfs_core::format::{Escaped, describe};
use twinfs_core::id::SetNumber;
use twinfs_core::record_set::{Builder, EncodedSet, SetPlace, UnverifiedSet};
use twinfs_core::stamp::Seq;
use twinfs_core::token::{Token, TokenBatch, encode_batch};
use twinfs_core::update::{Op, Update};

const SET: &str = "
5457494e534554000100dd0048020000f7cd5cfe9cd16e41afc61611725157f3
79a3b220c43fb996f50260f7ae25f97897389a75ffd34274af2a2a6ab44e035d
5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5eefcdab8967452301efcdab8967452301
0200000000000000070000000300000003000000000000005151515151515151
5151515151515151efbeedfe000000000c00000000000000abababababababab
abababababababababababababababababababababababab6500000000000000
0000faed5172861880f0f4f051728618fb0100000500000004686f6d65fb0100
80ad196c25efff1c84bb5db113e1ba1668e09e2533dc260a84c39785884c6e74
ae05000080ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5
624a67200f03000000efcdab89674523010200000000000000070000000000ef
cdab896745230128000000000000000700000003006f6c64efcdab8967452301
21000000000000000700000000008700000006010000e803faed517286186500
000000000000efcdab896745230102000000000000000700000003006e6577ef
cdab89674523012800000000000000070000000000efcdab8967452301280000
000000000007000000a4810000e8030000640000000100000000000000000000
00050000000000000000b955690000000015cd5b077800000001010000d007fa
ed517286186600000000000000efcdab89674523012800000000000000070000
00000000000000000005000000efcdab89674523012800000000000000070000
00a4810000e80300006400000001000000000000000000000005000000000000
0000b955690000000015cd5b07b300000009010000b80bfaed51728618670000
0000000000efcdab896745230102000000000000000700000003006e6577efcd
ab896745230102000000000000000700000003006f6c64efcdab896745230128
000000000000000700000001efcdab8967452301210000000000000007000000
efcdab8967452301020000000000000007000000ed410000e803000064000000
010000000000000000000000050000000000000000b955690000000015cd5b07
68656c6c6f
";

const HASH: &str = "e3799ef7070f4d86659396f1c02f324d7cfd17eb81f577dafd675ae849cfc2b0";

const NULL_SET: &str = "
5457494e534554000100dd0000000000292e0a8e3f11e59bf370db843d6f84cc
af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262
5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5eefcdab8967452301efcdab8967452301
0200000000000000070000000000000003000000000000005151515151515151
5151515151515151efbeedfe000000000c00000000000000e3799ef7070f4d86
659396f1c02f324d7cfd17eb81f577dafd675ae849cfc2b06800000000000000
80f0f4f05172861880f0f4f051728618000000000000000004686f6d65
";

/// The sample with 3000 bytes of data, compressed. Another zstd may write it in another way, but must read this.
const PACKED_SET: &str = "
5457494e534554000100dd000e010000abee2816b1d5559155a1b4c99ed39f12
a38af5f395cc3dd1c543df611fba0dac834f1027d0816249eac5fb0c791c2925
5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5eefcdab8967452301efcdab8967452301
0200000000000000070000000300000003000000000000005151515151515151
5151515151515151efbeedfe000000000c00000000000000abababababababab
abababababababababababababababababababababababab6500000000000000
0000faed5172861880f0f4f051728618f8010000b80b000004686f6d65af0000
00275ccc353ecd4851a85af356250544345a4497d8be511217bec870584a85f1
f217000000f0d836909405fd11de8a3f514834b1a09077304f217bbcf1f033a8
d4bb92825828b52ffd60f8002d0500c40503000000efcdab8967452301020007
0028218700000006010000e803faed51728618650203006e65772828a4810000
64000000010500b9556915cd5b0778010000d0076628010000b80bb300000009
67020203006f6c64012102ed4123201083915a375d42b4e14b2c86e110a281ea
8c59e03106db45031e5efa3b89b2c5f8a43385cc3b311e05d7d9b0f669b416d7
b0b4cd8671f262e4b0a0761f87cf99ec800d400928b52ffd60b80a6d00003074
77696e66730100af8b5f8a
";

const TOKENS: &str = "
0200030004686f6d6506e803faed517286186500000000000000efcdab896745
2301020000000000000007000000036e6577efcdab8967452301280000000000
00000700000001d007faed517286186600000000000000efcdab896745230128
00000000000000070000000000000000000000050000000000000009b80bfaed
517286186700000000000000efcdab8967452301020000000000000007000000
036e6577efcdab8967452301280000000000000007000000efcdab8967452301
020000000000000007000000036f6c64
";

const DESCRIPTION: &str = r#"record set 12 of volume home
  format       version 1, 805 bytes
  hash         e3799ef7070f4d86659396f1c02f324d7cfd17eb81f577dafd675ae849cfc2b0
  predecessor  abababababababababababababababababababababababababababababababab
  session      5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e
  epoch        3 of site 51515151515151515151515151515151
  incarnation  00000000feedbeef
  instance     0123456789abcdef, root 0123456789abcdef-2-7
  interval     after 2026-01-01T00:00:00.000000Z
               to    2026-01-01T00:00:00.050000Z
  updates      3, #101 to #103
  metadata     507 bytes, stored in 507, frames: 1
  data         5 bytes, stored in 5, frames: 1
files
  0123456789abcdef-2-7      the root of the volume
  0123456789abcdef-28-7     "old"
  0123456789abcdef-21-7     path not known
updates
  #101 2026-01-01T00:00:00.000001Z create "new" in 0123456789abcdef-2-7: 0123456789abcdef-28-7
      0123456789abcdef-28-7: file 0644, owner 1000:100, links 1, 5 bytes, modified 2026-01-01T00:00:00.123456Z
  #102 2026-01-01T00:00:00.000002Z write 0123456789abcdef-28-7 at 0, 5 bytes (data section at 0)
      0123456789abcdef-28-7: file 0644, owner 1000:100, links 1, 5 bytes, modified 2026-01-01T00:00:00.123456Z
  #103 2026-01-01T00:00:00.000003Z rename "new" in 0123456789abcdef-2-7 to "old" in 0123456789abcdef-2-7: 0123456789abcdef-28-7, over 0123456789abcdef-21-7
      0123456789abcdef-2-7: directory 0755, owner 1000:100, links 1, 5 bytes, modified 2026-01-01T00:00:00.123456Z
"#;

fn sample_set() -> EncodedSet {
    let mut builder = Builder::new();
    for (update, data) in &sample() {
        builder.push_update(update, data).unwrap();
    }
    assert!(builder.add_path(format_common::file(40), b"old"));
    builder.finish(place(), 0).unwrap()
}

fn large_sample() -> Vec<(Update, Vec<u8>)> {
    let mut updates = sample();
    updates[1].0.op = Op::Write { file: format_common::file(40), offset: 1 << 40, len: 3000 };
    updates[1].1 = b"twinfs".repeat(500);
    updates
}

fn after_sample() -> SetPlace {
    let set = sample_set();
    SetPlace {
        predecessor: set.hash,
        number: SetNumber(12),
        first_seq: Seq(104),
        start: set.header.end,
        end: set.header.end,
        ..place()
    }
}

#[test]
fn the_set_reads_as_ever() {
    let set = UnverifiedSet(unhex(SET).into()).verify().unwrap();
    assert_eq!(set.hash().to_string(), HASH);
    let (header, place) = (set.header(), place());
    assert_eq!(header.session, place.session);
    assert_eq!(header.volume, place.volume);
    assert_eq!((header.instance, header.root), (place.instance, place.root));
    assert_eq!((header.epoch, header.incarnation), (place.epoch, place.incarnation));
    assert_eq!((header.number, header.predecessor), (place.number, place.predecessor));
    assert_eq!((header.first_seq, header.updates, header.last_seq()), (Seq(101), 3, Seq(103)));
    assert_eq!((header.start, header.end), (place.start, place.end));
    let meta = set.meta().unwrap();
    let updates: Vec<_> = meta.updates.iter().map(|(update, _)| update.clone()).collect();
    assert_eq!(updates, sample().into_iter().map(|(update, _)| update).collect::<Vec<_>>());
    let files: Vec<_> = meta.files.iter().map(|hint| (hint.file.ino, &*hint.path)).collect();
    assert_eq!(files, [(2, &b""[..]), (40, b"old"), (33, b"")]);
    assert_eq!(set.data(0, header.data_len).unwrap(), b"hello");
}

#[test]
fn the_set_is_written_as_ever() {
    assert_eq!(hex(&sample_set().bytes), SET.trim());
}

#[test]
fn the_compressed_set_reads_as_ever() {
    let set = UnverifiedSet(unhex(PACKED_SET).into()).verify().unwrap();
    let meta = set.meta().unwrap();
    let updates: Vec<_> = meta.updates.into_iter().map(|(update, _)| update).collect();
    assert_eq!(updates, large_sample().into_iter().map(|(update, _)| update).collect::<Vec<_>>());
    assert_eq!(set.data(0, set.header().data_len).unwrap(), b"twinfs".repeat(500));
}

#[test]
fn the_null_set_is_as_ever() {
    let set = UnverifiedSet(unhex(NULL_SET).into()).verify().unwrap();
    assert_eq!(set.header().predecessor.to_string(), HASH);
    assert!(set.header().is_null());
    assert_eq!(hex(&Builder::new().finish(after_sample(), 3).unwrap().bytes), NULL_SET.trim());
}

#[test]
fn the_tokens_are_as_ever() {
    let tokens: Vec<_> = sample().iter().map(|(update, _)| Token::of(update)).collect();
    let volume = place().volume;
    let mut bytes = Vec::new();
    encode_batch(&volume, &tokens, &mut bytes);
    assert_eq!(hex(&bytes), TOKENS.trim());
    assert_eq!(TokenBatch::decode(&unhex(TOKENS)), Ok(TokenBatch { volume, tokens }));
}

/// The byte map, followed by code that shares nothing with the builder, gives the same bytes but for the path.
#[test]
fn the_byte_map_is_what_is_written() {
    let mut builder = Builder::new();
    for (update, data) in &sample() {
        builder.push_update(update, data).unwrap();
    }
    let built = builder.finish(place(), 0).unwrap();
    assert_eq!(hex(&built.bytes), hex(&Forged::of_updates(place(), &sample()).bytes()));
}

#[test]
fn a_set_can_be_shown_to_a_person() {
    let set = UnverifiedSet(unhex(SET).into()).verify().unwrap();
    let mut text = String::new();
    describe(&set, &set.meta().unwrap(), &mut text).unwrap();
    assert_eq!(text, DESCRIPTION);
    let null = UnverifiedSet(unhex(NULL_SET).into()).verify().unwrap();
    text.clear();
    describe(&null, &null.meta().unwrap(), &mut text).unwrap();
    assert!(text.starts_with("null set after record set 12 of volume home\n"), "{text}");
}

#[test]
fn no_name_can_do_anything_to_a_terminal() {
    let name = b"tidy \xc3\xa9\x1b[31m\n\"\\\xff\xe2\x80\xae";
    assert_eq!(Escaped(name).to_string(), r#""tidy é\u{1b}[31m\n\"\\\xff\u{202e}""#);
}
