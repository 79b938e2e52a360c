//! Arbitrary updates: every operation, with fields anywhere in their bounds.

use proptest::collection::vec;
use proptest::prelude::*;
use twinfs_core::id::{FileId, VolumeInstance};
use twinfs_core::limits;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{Attr, AttrList, Op, Update, is_file_name, is_xattr_name};

use super::stamp;

type Bytes = Box<[u8]>;

const KINDS: [u32; 7] = [0o100_000, 0o040_000, 0o120_000, 0o010_000, 0o140_000, 0o020_000, 0o060_000];
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Few files, so that updates speak of the same ones; and some from anywhere.
pub(crate) fn file_id() -> BoxedStrategy<FileId> {
    prop_oneof![
        4 => (1_u64..6).prop_map(super::file),
        1 => (1_u64.., any::<u64>(), any::<u32>()).prop_map(|(instance, ino, generation)| FileId {
            instance: VolumeInstance::new(instance).unwrap(),
            ino,
            generation,
        }),
    ]
    .boxed()
}

pub(crate) fn name() -> BoxedStrategy<Bytes> {
    prop_oneof![
        "[a-z]{1,8}".prop_map(|name| name.into_bytes().into_boxed_slice()),
        vec(any::<u8>(), 1..=limits::NAME_BYTES_MAX).prop_map(Vec::into_boxed_slice),
        Just(vec![b'x'; limits::NAME_BYTES_MAX].into_boxed_slice()),
    ]
    .prop_filter("a file name", |name| is_file_name(name))
    .boxed()
}

fn xattr_name() -> BoxedStrategy<Bytes> {
    name().prop_filter("an xattr name", |name| is_xattr_name(name)).boxed()
}

fn value() -> BoxedStrategy<Bytes> {
    prop_oneof![
        8 => vec(any::<u8>(), 0..64),
        1 => Just(vec![7; limits::XATTR_VALUE_BYTES_MAX]),
    ]
    .prop_map(Vec::into_boxed_slice)
    .boxed()
}

fn target() -> BoxedStrategy<Bytes> {
    prop_oneof![vec(1_u8.., 1..64), Just(vec![b'/'; limits::SYMLINK_BYTES_MAX])]
        .prop_map(Vec::into_boxed_slice)
        .boxed()
}

pub(crate) fn attr_of(kind: u32) -> BoxedStrategy<Attr> {
    (
        0_u32..=0o7777,
        any::<[u32; 3]>(),
        any::<u64>(),
        0..=limits::FILE_BYTES_MAX,
        any::<i64>(),
        0_u32..1_000_000_000,
    )
        .prop_map(move |(mode, [uid, gid, nlink], rdev, size, mtime_s, mtime_ns)| Attr {
            mode: kind | mode,
            uid,
            gid,
            nlink,
            rdev,
            size,
            mtime_s,
            mtime_ns,
        })
        .boxed()
}

fn any_attr() -> BoxedStrategy<Attr> {
    proptest::sample::select(&KINDS).prop_flat_map(attr_of).boxed()
}

fn range() -> BoxedStrategy<(u64, u64)> {
    prop_oneof![0_u64..10_000, 0..=limits::FILE_BYTES_MAX]
        .prop_flat_map(|offset| (Just(offset), 0..=limits::FILE_BYTES_MAX - offset))
        .boxed()
}

/// An operation, and the object whose attributes must come with it.
fn op() -> BoxedStrategy<(Op, Option<(FileId, Attr)>)> {
    let content = prop_oneof![
        (file_id(), 0_u64..1 << 40, 1_u32..5000).prop_map(|(file, offset, len)| Op::Write {
            file,
            offset,
            len
        }),
        (file_id(), 0..=limits::FILE_BYTES_MAX).prop_map(|(file, size)| Op::Truncate { file, size }),
        (file_id(), range(), any::<bool>()).prop_map(|(file, (offset, len), hole)| Op::Zero {
            file,
            offset,
            len,
            hole
        }),
        (file_id(), range()).prop_map(|(file, (offset, len))| Op::Collapse { file, offset, len }),
        (file_id(), range()).prop_map(|(file, (offset, len))| Op::Insert { file, offset, len }),
    ];
    let content = (content, attr_of(FILE)).prop_map(|(op, attr)| {
        let file = op.files()[0].unwrap();
        (op, Some((file, attr)))
    });
    let born = proptest::sample::select(&KINDS).prop_flat_map(|kind| {
        let target = if kind == SYMLINK { target().boxed() } else { Just(Bytes::default()).boxed() };
        (file_id(), name(), file_id(), target, attr_of(kind), any::<bool>()).prop_map(
            |(dir, name, file, target, attr, copied)| {
                let op =
                    if copied { Op::Object { file, target } } else { Op::Create { dir, name, file, target } };
                (op, Some((file, attr)))
            },
        )
    });
    let bare = prop_oneof![
        (file_id(), name(), file_id()).prop_map(|(dir, name, file)| Op::Link { dir, name, file }),
        (file_id(), name(), file_id()).prop_map(|(dir, name, file)| Op::Unlink { dir, name, file }),
        (file_id(), name(), file_id()).prop_map(|(dir, name, file)| Op::Bind { dir, name, file }),
        (file_id(), name(), file_id(), name(), file_id(), proptest::option::of(file_id())).prop_map(
            |(from_dir, from, to_dir, to, file, replaced)| Op::Rename {
                from_dir,
                from,
                to_dir,
                to,
                file,
                replaced
            }
        ),
        (file_id(), name(), file_id(), file_id(), name(), file_id()).prop_map(
            |(a_dir, a, a_file, b_dir, b, b_file)| Op::Exchange { a_dir, a, a_file, b_dir, b, b_file }
        ),
        (file_id(), xattr_name(), value()).prop_map(|(file, name, value)| Op::SetXattr { file, name, value }),
        (file_id(), xattr_name()).prop_map(|(file, name)| Op::RemoveXattr { file, name }),
        Just(Op::Complete),
        Just(Op::Resync),
        (file_id(), name()).prop_map(|(dir, name)| Op::Unbind { dir, name }),
    ];
    let bare = bare.prop_map(|op| (op, None));
    let attributes =
        (file_id(), any_attr()).prop_map(|(file, attr)| (Op::SetAttr { file }, Some((file, attr))));
    prop_oneof![5 => content, 2 => born, 8 => bare, 1 => attributes].boxed()
}

/// An update that the decoder must accept.
pub(crate) fn update(stamp: Stamp) -> BoxedStrategy<Update> {
    // Of the file kind, so that they agree with an operation on content that names the same file.
    (op(), vec((file_id(), attr_of(FILE)), 0..4))
        .prop_map(move |((op, needed), more)| {
            let mut attrs = AttrList::new();
            for (file, attr) in needed.into_iter().chain(more) {
                if attrs.get(file).is_none() {
                    attrs.push(file, attr);
                }
            }
            Update { stamp, op, attrs }
        })
        .boxed()
}

/// Updates in the order of [`stamp`], each with its data.
pub(crate) fn updates(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(Update, Vec<u8>)>> {
    vec((update(Stamp::default()), any::<u8>(), any::<bool>()), count).prop_map(|updates| {
        let stamped = updates.into_iter().enumerate().map(|(index, (mut update, seed, compressible))| {
            update.stamp = stamp(index as u64);
            let data = data(update.op.data_len() as usize, seed, compressible);
            (update, data)
        });
        stamped.collect()
    })
}

/// Bytes that zstd can, or cannot, make smaller.
pub(crate) fn data(len: usize, seed: u8, compressible: bool) -> Vec<u8> {
    if compressible {
        return vec![seed; len];
    }
    let mut state = u64::from(seed) + 1;
    let random = std::iter::repeat_with(|| {
        // A linear congruential generator (Knuth's MMIX constants); its upper bits look random to zstd.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    random.take(len).collect()
}
