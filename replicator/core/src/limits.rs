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
    SET_HEADER_BYTES_MAX + SET_FRAME_ENTRY_BYTES * SET_FRAMES_MAX + SET_META_BYTES_MAX + SET_DATA_BYTES_MAX;
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

/// Longest time that one write waits for room in the sidefile while the link is up, in nanoseconds; then the session is
/// suspended and programs go on at full speed.
pub const PACE_NS_MAX: u64 = 2_000_000_000;
/// Longest pause of one write while the sidefile is filling up, in nanoseconds.
pub const PACE_STEP_NS_MAX: u64 = 20_000_000;

/// Commands that one daemon answers at a time on its control socket.
pub const CONTROL_CONNECTIONS_MAX: usize = 16;
/// Longest line on the control socket, in bytes.
pub const CONTROL_LINE_BYTES_MAX: u64 = 1 << 20;

/// Control messages and token batches that wait for the link, and messages from it that wait for the mover.
pub const OUTBOX_MESSAGES_MAX: usize = 256;
/// Acknowledgements and other messages that wait for the link to a primary.
pub const ACKS_QUEUED_MAX: usize = 4096;
/// Bytes of record sets of one connection that wait for the replica's driver.
pub const SETS_QUEUED_BYTES_MAX: usize = IN_FLIGHT_BYTES_MAX + SET_BYTES_MAX;
/// Connections that have not said hello, or were refused, at a time.
pub const STRANGERS_MAX: usize = 16;
/// Longest wait for operations under way when new writes are held, in nanoseconds.
pub const HOLD_NS_MAX: u64 = 5_000_000_000;
/// Longest time that writes are held for a planned promote, in nanoseconds.
pub const HANDOVER_NS_MAX: u64 = 30_000_000_000;

/// Dead mounts, one on the other, that a start takes away.
pub const DEAD_MOUNTS_MAX: usize = 8;

/// How far ahead timestamps are reserved on disk, in nanoseconds.
pub const STAMP_RESERVE_NS: u64 = 10_000_000_000;
/// Of these, the last ones, in which time does not go on but by the updates that are stamped.
pub const STAMP_CREEP_NS: u64 = 100_000_000;
/// How soon a write in the site directory that failed is tried again, in nanoseconds.
pub const SITE_AGAIN_NS: u64 = 1_000_000_000;

/// Bytes of a frame's entry in the frame table of a record set.
pub const SET_FRAME_ENTRY_BYTES: usize = 36;
/// Largest encoded token batch, in bytes: a control message less the room for what wraps it.
pub const TOKEN_BATCH_BYTES_MAX: usize = MESSAGE_BYTES_MAX - 1024;

// Identities and transport.

/// Largest key, certificate, request or bundle file that is read, in bytes.
pub const IDENTITY_FILE_BYTES_MAX: usize = 64 << 10;
/// Longest wait for a connection to be set up, in milliseconds.
pub const HANDSHAKE_MS_MAX: u64 = 5_000;
/// Most connections that a listener sets up at once.
pub const HANDSHAKES_MAX: usize = 32;
/// Most addresses of one host that are tried.
pub const ADDRESSES_MAX: usize = 8;
/// Silence after which a connection counts as lost, in milliseconds.
pub const LINK_IDLE_MS_MAX: u64 = 5_000;
/// Interval at which an idle connection is kept alive, in milliseconds.
pub const LINK_KEEP_ALIVE_MS: u64 = 1_000;
/// Longest explanation with which a connection is closed, in bytes. It must fit into one packet.
pub const CLOSE_REASON_BYTES_MAX: usize = 512;
/// Control messages, and batches of tokens, that wait at each end of a connection.
pub const MESSAGES_QUEUED_MAX: usize = 4;
/// Record sets that may be on their way at once on one connection, each on a stream of its own.
pub const SET_STREAMS_MAX: u32 = 256;
/// Record sets received in full or in part that nobody has taken yet, for each connection.
pub const SETS_RECEIVED_MAX: usize = IN_FLIGHT_SETS_MAX;
/// Bytes of those.
pub const SETS_RECEIVED_BYTES_MAX: usize = IN_FLIGHT_BYTES_MAX;
/// Bytes of record sets that one connection has been given and that have not reached the peer's machine.
pub const SETS_SENT_BYTES_MAX: usize = 20 << 20;
/// Receive window of one stream, in bytes. At least one record set, so that a round trip never interrupts one.
pub const STREAM_WINDOW_BYTES: u32 = 17 << 20;
/// Receive window of one connection, in bytes; also the most that a sender buffers for one connection. 20 MiB of record
/// sets in flight fill 1.6 Gbit/s at 100 ms.
pub const LINK_WINDOW_BYTES: u32 = 32 << 20;
/// Kernel buffers asked for each UDP socket, in bytes.
pub const SOCKET_BUFFER_BYTES: usize = 8 << 20;

// ---- storage and journal ----

/// Most names in a storage directory.
pub const STORAGE_FILES_MAX: usize = 65_536;
/// Most segments of a journal: each keeps a file descriptor open.
pub const JOURNAL_SEGMENTS_MAX: usize = 8192;
/// Largest payload of a journal entry that is no record set, in bytes.
pub const JOURNAL_CONTROL_BYTES_MAX: usize = 18 + VOLUMES_MAX * (LABEL_BYTES_MAX + 94);
/// Bytes of appended entries that a journal gathers before it writes them, synced or not.
pub const JOURNAL_BUFFER_BYTES_MAX: usize = 1 << 20;
/// Largest record set that is copied into that buffer, in bytes; larger ones are written from where they are.
pub const JOURNAL_COPY_BYTES_MAX: usize = 64 << 10;
/// Decompressed frames that all readers of a journal keep, in bytes.
pub const JOURNAL_FRAME_CACHE_BYTES: usize = 4 << 20;
/// Frame tables of record sets that all readers of a journal keep.
pub const JOURNAL_INDEX_CACHE_SETS: usize = 512;
/// Default room that a journal leaves free on its file system, in bytes.
pub const JOURNAL_FLOOR_BYTES_DEFAULT: u64 = 256 << 20;

/// Damaged journals that stay, put aside, for a person to look at.
pub const DAMAGED_JOURNALS_KEPT: u64 = 2;

// The replica's image.

/// `O_PATH` descriptors that the image keeps open.
pub const IMAGE_PATH_FDS_MAX: usize = 1024;
/// Regular files that the image keeps open.
pub const IMAGE_FILE_FDS_MAX: usize = 256;
/// Bytes that a checkpoint copies from the journal to the tree at a time.
pub const CHECKPOINT_COPY_BYTES: usize = 1 << 20;
/// Memory that the image's file table may use for its cache, in bytes.
pub const IMAGE_TABLE_CACHE_BYTES: usize = 32 << 20;
/// Time after the first update that is not in the tree at which a checkpoint is due, in nanoseconds.
pub const CHECKPOINT_INTERVAL_NS: u64 = 5_000_000_000;

// The capture layer of the primary.

/// Locks that order the changes of files and directories.
pub const STRIPES: usize = 1024;
/// Objects that one operation locks at most: two directories and two children of a rename.
pub const STRIPES_HELD_MAX: usize = 4;
/// `O_PATH` descriptors that are kept open for the objects used last.
pub const PATH_FDS_MAX: usize = 1024;
/// Bytes of directory entries that one system call reads.
pub const DIR_BUFFER_BYTES: usize = 32 << 10;
/// Threads that serve requests of the kernel.
pub const FUSE_THREADS_MAX: usize = 4;
/// Threads for calls that wait for a disk.
pub const SLOW_THREADS: usize = 4;
/// Calls that may wait for a thread of [`SLOW_THREADS`].
pub const SLOW_CALLS_MAX: usize = 64;
/// Times that a namespace operation looks its names up again because they changed under it.
pub const LOOKUP_RETRIES_MAX: usize = 1000;
/// Processes or mounts that are listed to a person before the list is cut.
pub const HOLDERS_MAX: usize = 64;

// The relations that the bounds above must keep.
const _: () = {
    // A mark that cannot be raised is tried again a few times before time runs out.
    assert!(STAMP_RESERVE_NS / 4 > 2 * SITE_AGAIN_NS && STAMP_RESERVE_NS / 4 > STAMP_CREEP_NS);
    assert!(UPDATE_META_BYTES_MAX >= 2 * NAME_BYTES_MAX + SYMLINK_BYTES_MAX + XATTR_VALUE_BYTES_MAX);
    assert!(SET_RAW_BYTES_TARGET + UPDATE_META_BYTES_MAX + WRITE_BYTES_MAX <= SET_META_BYTES_MAX);
    assert!(SET_RAW_BYTES_TARGET + WRITE_BYTES_MAX <= SET_DATA_BYTES_MAX);
    assert!(IN_FLIGHT_BYTES_MAX >= 2 * SET_BYTES_MAX);
    assert!((SET_BYTES_MAX as u64) * 2 <= SEGMENT_BYTES);
    assert!(JOURNAL_SEGMENTS_MAX <= STORAGE_FILES_MAX);
    assert!(JOURNAL_COPY_BYTES_MAX < JOURNAL_BUFFER_BYTES_MAX);
    assert!((JOURNAL_CONTROL_BYTES_MAX as u64) < SEGMENT_BYTES / 256);
    assert!(PENDING_SETS_MAX >= IN_FLIGHT_SETS_MAX);
    // The largest set must pass every gate on its way.
    assert!(SETS_SENT_BYTES_MAX >= SET_BYTES_MAX && SETS_RECEIVED_BYTES_MAX >= SET_BYTES_MAX);
    assert!(STREAM_WINDOW_BYTES as usize >= SET_BYTES_MAX);
    // A primary that keeps its bound never fills what the replica sets aside, and so never shuts out tokens.
    assert!(SETS_RECEIVED_BYTES_MAX >= IN_FLIGHT_BYTES_MAX && SETS_RECEIVED_MAX >= IN_FLIGHT_SETS_MAX);
    // Record sets leave room for messages in the window, of which an eighth may not have been announced yet.
    assert!(
        LINK_WINDOW_BYTES as usize - LINK_WINDOW_BYTES as usize / 8 - SETS_SENT_BYTES_MAX
            >= 2 * MESSAGES_QUEUED_MAX * MESSAGE_BYTES_MAX
    );
    assert!(LINK_IDLE_MS_MAX >= 3 * LINK_KEEP_ALIVE_MS);
};

// Sessions and control messages.

/// Longest text for people in a control message, in bytes. Longer ones are cut.
pub const TEXT_BYTES_MAX: usize = 512;
/// Largest encoded null set, in bytes: it has a header and no body.
pub const NULL_SET_BYTES_MAX: usize = SET_HEADER_BYTES_MAX;
/// Memory of the sets that a replica holds for groups to come, in bytes. Past it a set is taken only if a group can be
/// formed with it at once, so that the bound never stops time.
pub const HELD_BYTES_MAX: usize = 256 << 20;
/// Fixed part of what one held set is charged with, in bytes.
pub const HELD_SET_BYTES: usize = 512;
/// Hashes of the latest sets of a volume's chain that a replica remembers, to tell a set that came twice from another
/// set with a known number.
pub const KNOWN_HASHES_MAX: usize = PENDING_SETS_MAX;

const _: () = {
    assert!(KNOWN_HASHES_MAX >= IN_FLIGHT_SETS_MAX);
    assert!(HELD_BYTES_MAX >= 2 * IN_FLIGHT_BYTES_MAX);
    // A welcome with every volume and every set beyond a gap must fit a message.
    assert!(
        VOLUMES_MAX * (LABEL_BYTES_MAX + 64 + 2 * PENDING_SETS_MAX) + TEXT_BYTES_MAX + 256
            <= MESSAGE_BYTES_MAX
    );
    assert!(PENDING_SETS_MAX < u16::MAX as usize);
    assert!(NULL_SET_BYTES_MAX <= MESSAGE_BYTES_MAX && TEXT_BYTES_MAX <= u16::MAX as usize);
};

// The initial copy.

/// Longest wait of a copy for room before it looks whether it is to stop, in milliseconds.
pub const COPY_ROOM_WAIT_MS: u64 = 100;
/// Pause of a copy after an object that could not be read, in milliseconds.
pub const COPY_RETRY_MS: u64 = 1_000;

// ---- change map and resync ----

/// Ranges of a change map begin and end at multiples of this many bytes.
pub const CHANGE_GRANULE_BYTES: u64 = 4096;
/// Most ranges that a change map holds of one file; then the smallest gaps between them are closed.
pub const CHANGE_RANGES_MAX: usize = 4096;
/// Memory of a change map, estimated, in bytes. Past it the map becomes coarser, and in the end says "everything".
pub const CHANGE_MAP_BYTES_MAX: usize = 64 << 20;
/// Updates of one resync, with what programs wrote meanwhile: the replica holds all of them for one group. A primary that
/// needs more gives the resync up, loudly.
pub const RESYNC_UPDATES_MAX: u64 = 200_000;
/// First pause before a resync that ran out of room is tried again, in nanoseconds; it doubles each time.
pub const RESYNC_PAUSE_NS: u64 = 1_000_000_000;
/// Longest such pause, in nanoseconds.
pub const RESYNC_PAUSE_NS_MAX: u64 = 60_000_000_000;

const _: () = {
    assert!(CHANGE_GRANULE_BYTES.is_power_of_two());
    assert!(RESYNC_PAUSE_NS <= RESYNC_PAUSE_NS_MAX);
};

// ---- the loss report ----

/// Lost updates that a promote prints; `twinfs loss` prints all.
pub const LOSS_LINES_SHOWN: usize = 20;
/// Gaps between known updates that a report names one by one; it counts all.
pub const LOSS_GAPS_LISTED_MAX: usize = 1000;
/// Longest time that a promote looks in the last group for the paths of files with lost updates, in nanoseconds. Files
/// that were not found by then are named by their FileIds.
pub const LOSS_WALK_NS_MAX: u64 = 3_000_000_000;
/// Room that a kept report leaves on its file system, in bytes: the new epoch and a sidefile must find a place.
pub const LOSS_FREE_BYTES_MIN: u64 = 8 << 20;
/// Longest line of a kept report, in bytes: two paths, each as text, where a byte may take six, and in digits.
pub const LOSS_LINE_BYTES_MAX: usize = 2 * 8 * (PATH_HINT_BYTES_MAX + 2 * NAME_BYTES_MAX) + 4096;

// Files of a site directory.

/// Largest control file, in bytes.
pub const CONTROL_FILE_BYTES_MAX: u64 = 8 << 20;

const _: () = {
    // A primary's volume has a path, which JSON may write six times as long, and less than a KiB beside it.
    assert!(CONTROL_FILE_BYTES_MAX >= VOLUMES_MAX as u64 * (6 * 4096 + 1024));
};

// The activity log of the primary.

/// Most files that one era of the activity log names. An era of more says "everything".
pub const ACTIVITY_FILES_MAX: usize = 1 << 20;
/// Bytes of an era's file past which it is written anew, packed.
pub const ACTIVITY_FILE_BYTES_MAX: u64 = 64 << 20;
/// Eras that the activity log keeps. While none may go, the last one goes on.
pub const ACTIVITY_ERAS_MAX: usize = 16;
/// Age at which an era of the activity log ends, in nanoseconds.
pub const ACTIVITY_ERA_NS: u64 = 5_000_000_000;
/// Longest time that an entry of the activity log waits for its write to begin, in nanoseconds.
pub const ACTIVITY_FLUSH_NS: u64 = 50_000_000;
/// Step in which an era's file grows ahead of its use, in bytes.
pub const ACTIVITY_AHEAD_BYTES: u64 = 64 << 10;
/// Locks that the set of files of an era is divided by.
pub const ACTIVITY_SHARDS: usize = 64;

const _: () = {
    // Packed, with 20 files in 512 bytes, an era always leaves half of its file to what comes.
    assert!((ACTIVITY_FILES_MAX.div_ceil(20) * 512 + 2 * 4096) as u64 <= ACTIVITY_FILE_BYTES_MAX / 2);
    assert!(ACTIVITY_ERAS_MAX >= 3 && ACTIVITY_ERAS_MAX < STORAGE_FILES_MAX);
    assert!(ACTIVITY_FLUSH_NS <= 100_000_000 / 2);
    assert!(ACTIVITY_SHARDS.is_power_of_two());
};
