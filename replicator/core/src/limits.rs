//! Every bound of twinfs. A queue, table, message, allocation or wait that is not bounded by a constant of this file
//! (or by a configured value checked against one) is a defect.

/// Longest file name, in bytes, as on Linux.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest symlink target that Linux can return, in bytes.
pub const SYMLINK_BYTES_MAX: usize = 4095;
/// Longest extended attribute name, in bytes.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Largest extended attribute value, in bytes.
pub const XATTR_VALUE_BYTES_MAX: usize = 65_536;
/// Largest offset or size of a file, as in `loff_t`.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// Most data that one write update carries, in bytes: the largest FUSE write that is negotiated.
pub const WRITE_BYTES_MAX: usize = 1 << 20;
/// Longest path hint of a file table, in bytes. Hints are for people; longer ones are cut at the front.
pub const PATH_HINT_BYTES_MAX: usize = 4096;
/// Most objects whose attributes one update sets (an exchange touches two files and two directories).
pub const UPDATE_ATTRS_MAX: usize = 4;
/// Largest encoded update without its data, in bytes: a `copied object` with a full xattr value.
pub const UPDATE_META_BYTES_MAX: usize = XATTR_VALUE_BYTES_MAX + 4 * 4096;

/// Raw bytes of one compressed frame: what a random read has to decompress.
pub const FRAME_BYTES: usize = 128 << 10;
/// Raw bytes (tables, updates and data) at which a record set is closed, however short its interval was.
pub const SET_RAW_BYTES_TARGET: usize = 4 << 20;
/// Most raw bytes of metadata in one record set.
pub const SET_META_BYTES_MAX: usize = 8 << 20;
/// Most raw bytes of data in one record set.
pub const SET_DATA_BYTES_MAX: usize = 8 << 20;
/// Most updates in one record set.
pub const SET_UPDATES_MAX: usize = 65_536;
/// Most frames in one record set.
pub const SET_FRAMES_MAX: usize =
    SET_META_BYTES_MAX.div_ceil(FRAME_BYTES) + SET_DATA_BYTES_MAX.div_ceil(FRAME_BYTES);
/// Largest encoded record set, in bytes. A frame that does not compress is stored, so the body never exceeds the raw size.
pub const SET_BYTES_MAX: usize =
    SET_HEADER_BYTES_MAX + 4 * SET_FRAMES_MAX + SET_META_BYTES_MAX + SET_DATA_BYTES_MAX;
/// Largest record set header, in bytes.
pub const SET_HEADER_BYTES_MAX: usize = 1024;

/// Longest site or volume name, in bytes.
pub const LABEL_BYTES_MAX: usize = 64;
/// Most volumes in one session.
pub const VOLUMES_MAX: usize = 256;
/// Largest control message between sites, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Most tokens in one token batch.
pub const TOKEN_BATCH_MAX: usize = 4096;
/// Most tokens that a replica holds for updates whose data has not arrived.
pub const TOKENS_HELD_MAX: usize = 1 << 20;

/// Most record sets that a replica holds out of order, for each volume.
pub const PENDING_SETS_MAX: usize = 1024;
/// Bytes of record sets that a primary has in flight, unacknowledged.
pub const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// Record sets that a primary has in flight, unacknowledged, for each volume.
pub const IN_FLIGHT_SETS_MAX: usize = 512;

/// Memory of the folded delta above which a checkpoint is due, in bytes.
pub const DELTA_BYTES_DEFAULT: usize = 64 << 20;
/// Size of a journal segment, in bytes.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// Default size of the sidefile, in bytes.
pub const SIDEFILE_BYTES_DEFAULT: u64 = 256 << 20;

/// Interval at which a busy session cuts record sets, in nanoseconds.
pub const INTERVAL_NS: u64 = 50_000_000;
/// Longest interval between null sets of an idle session, in nanoseconds.
pub const NULL_INTERVAL_NS_MAX: u64 = 500_000_000;

// The relations that the bounds above must keep.
const _: () = {
    assert!(UPDATE_META_BYTES_MAX >= 2 * NAME_BYTES_MAX + SYMLINK_BYTES_MAX + XATTR_VALUE_BYTES_MAX);
    assert!(SET_RAW_BYTES_TARGET + UPDATE_META_BYTES_MAX + WRITE_BYTES_MAX <= SET_META_BYTES_MAX);
    assert!(SET_RAW_BYTES_TARGET + WRITE_BYTES_MAX <= SET_DATA_BYTES_MAX);
    assert!(IN_FLIGHT_BYTES_MAX >= 2 * SET_BYTES_MAX);
    assert!((SET_BYTES_MAX as u64) * 2 <= SEGMENT_BYTES);
    assert!(PENDING_SETS_MAX >= IN_FLIGHT_SETS_MAX);
};
