use super::*;
use crate::primary::clock::Reading;
use twinfs_core::session::SuspendReason;
use twinfs_core::update::{self, Attr, Intent, Op, sample_file};

const SESSION: SessionId = SessionId::from_bytes([7; 16]);
const V: VolumeIndex = VolumeIndex(0);

fn start(volumes: &[StartVolume]) -> Start<'_> {
    Start { session: SESSION, volumes, floor: Timestamp::ZERO, limit: Timestamp(u64::MAX) }
}

fn sidefile(dir: &tempfile::TempDir) -> Capture {
    let capture =
        Capture::create(&dir.path().join("sidefile"), bytes_min(), &start(&[StartVolume::NEW; 2])).unwrap();
    capture.set_link_up(true);
    capture
}

fn attr() -> Attr {
    Attr { mode: 0o100_644, uid: 0, gid: 0, nlink: 1, rdev: 0, size: 0, mtime_s: 1, mtime_ns: 2 }
}

fn reserve(capture: &Capture, volume: VolumeIndex, bytes: usize) -> Reservation<'_> {
    let file = sample_file(5);
    capture.reserve(volume, &Intent::Range { file, offset: 0, len: bytes as u64 }, 256, bytes).unwrap()
}

fn publish(reservation: Reservation<'_>, data: &[u8]) -> Option<Stamp> {
    let file = sample_file(5);
    let op: Op<&[u8]> = Op::Write { file, offset: 0, len: data.len() as u32 };
    reservation.publish(op, [(file, attr())].into_iter().collect(), data)
}

fn write(capture: &Capture, volume: VolumeIndex, data: &[u8]) -> Option<Stamp> {
    publish(reserve(capture, volume, data.len()), data)
}

#[test]
fn updates_come_out_in_the_order_of_stamps_with_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    let early = reserve(&capture, V, 8);
    let first = write(&capture, VolumeIndex(1), b"first").unwrap();
    let failed = reserve(&capture, V, 8);
    let second = publish(early, b"second").unwrap();
    drop(failed);
    assert!(first < second);
    assert_eq!((first.seq, second.seq), (Seq(1), Seq(1)), "sequence numbers are dense for each volume");
    let cut = capture.cut(usize::MAX);
    assert!(cut.emptied && cut.end > second.time);
    assert_eq!(cut.updates.iter().map(|u| u.stamp).collect::<Vec<_>>(), [first, second]);
    for (captured, data) in cut.updates.iter().zip([&b"first"[..], b"second"]) {
        let (mut meta, mut bytes) = (Vec::new(), Vec::new());
        capture.copy_meta(captured, &mut meta);
        capture.copy_data(captured, &mut bytes);
        assert_eq!(update::decode(&meta, 0).unwrap().0.stamp, captured.stamp);
        assert_eq!(bytes, data);
    }
}

#[test]
fn no_cut_passes_an_update_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    let in_flight = reserve(&capture, V, 1);
    write(&capture, V, b"x").unwrap();
    let end = capture.cut(usize::MAX).end;
    assert!(publish(in_flight, b"y").unwrap().time > end);
}

#[test]
fn a_cut_by_size_ends_at_its_last_update() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    let stamps: Vec<_> = (0..3).map(|_| write(&capture, V, &[1; 1000]).unwrap()).collect();
    let cut = capture.cut(1500);
    assert_eq!((cut.updates.len(), cut.emptied, cut.end), (2, false, stamps[1].time));
}

#[test]
fn the_ring_wraps_and_fills_and_frees() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    let mut held = VecDeque::new();
    for round in 0..200u32 {
        let data = vec![round as u8; 100_000 + round as usize * 37];
        write(&capture, V, &data).unwrap();
        held.push_back((capture.cut(usize::MAX).updates, data));
        if held.len() > 20 {
            let (updates, data) = held.pop_front().unwrap();
            let mut bytes = Vec::new();
            capture.copy_data(&updates[0], &mut bytes);
            assert!(bytes == data, "round {round}: bytes were overwritten before their release");
            capture.release(&updates);
        }
    }
    while let Some((updates, _)) = held.pop_back() {
        capture.release(&updates);
    }
    assert_eq!(capture.fill().used, 0);
}

#[test]
fn without_a_link_a_full_sidefile_suspends_and_keeps_the_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    capture.set_link_up(false);
    let in_flight = reserve(&capture, V, 10);
    let mut kept = 0;
    while write(&capture, V, &[0; 500_000]).is_some() {
        kept += 1;
    }
    assert!(kept > 5);
    assert_eq!(capture.fill().overflow, Some(Overflow::LinkDown));
    assert_eq!(publish(in_flight, b"late"), None, "it would follow a dropped update");
    let cut = capture.cut(usize::MAX);
    assert_eq!(cut.updates.len(), kept);
    assert_eq!(
        cut.end,
        cut.updates.last().unwrap().stamp.time,
        "nothing is known after the last kept update"
    );
    capture.now();
    assert_eq!(capture.cut(usize::MAX).end, cut.end, "time stands still");
}

#[test]
fn what_was_published_outlives_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sidefile");
    let capture = sidefile(&dir);
    write(&capture, V, b"released").unwrap();
    capture.release(&capture.cut(usize::MAX).updates);
    let kept = [write(&capture, V, b"kept").unwrap(), write(&capture, VolumeIndex(1), b"too").unwrap()];
    std::mem::forget(reserve(&capture, V, 3));
    drop(capture);
    assert!(!Capture::was_clean(&path));

    let (again, survivors) = Capture::open(&path, &start(&[StartVolume::NEW; 2])).unwrap();
    assert_eq!((survivors.intents.len(), survivors.updates, survivors.dropped), (1, 2, false));
    let cut = again.cut(usize::MAX);
    assert_eq!(cut.updates.iter().map(|u| u.stamp).collect::<Vec<_>>(), kept);
    again.set_link_up(true);
    let next = write(&again, V, b"next").unwrap();
    assert_eq!(next.seq, kept[0].seq.next());
    assert!(next > kept[1]);
    again.release(&cut.updates);
    again.close().unwrap();
    assert!(Capture::was_clean(&path));
    let other = Start { session: SessionId::from_bytes([8; 16]), ..start(&[StartVolume::NEW; 2]) };
    assert!(matches!(Capture::open(&path, &other), Err(SidefileError::Damaged { .. })));
}

/// A sidefile with two updates and an intent, one word of it changed: it is refused, or used without harm.
#[test]
fn any_word_that_changed_is_refused_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sidefile");
    let capture = sidefile(&dir);
    write(&capture, V, b"some").unwrap();
    write(&capture, VolumeIndex(1), b"data").unwrap();
    std::mem::forget(reserve(&capture, V, 3));
    let (slots, ring_at) = (capture.slots, capture.ring_at);
    drop(capture);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let map = SharedMap::new(&file).unwrap();
    // Header, the first slots, and the start of the ring: whatever is used.
    let slots_at = HEADER_BYTES / WORD;
    let used = (0..64 + 2 * 24).chain(slots_at..slots_at + 4 * SLOT_WORDS);
    let used: Vec<usize> = used.chain(ring_at / WORD..ring_at / WORD + 100).collect();
    let before: Vec<u64> = used.iter().map(|at| map.words()[*at].load(Ordering::Relaxed)).collect();
    let mut refused = 0;
    let bits = [0, 1, 7, 16, 31, 33, 62, 63];
    for (word, bit) in used.iter().flat_map(|word| bits.map(|bit| (*word, bit))) {
        map.words()[word].fetch_xor(1 << bit, Ordering::Relaxed);
        match Capture::open(&path, &start(&[StartVolume::NEW; 2])) {
            Err(SidefileError::Damaged { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
            Ok((again, _)) => {
                let cut = again.cut(usize::MAX);
                let mut out = Vec::new();
                cut.updates.iter().for_each(|captured| again.copy_data(captured, &mut out));
                again.set_link_up(true);
                write(&again, V, b"next").unwrap();
                again.release(&cut.updates);
            }
        }
        used.iter().zip(&before).for_each(|(at, old)| map.words()[*at].store(*old, Ordering::Relaxed));
    }
    assert!(slots > 4 && refused > 100, "{refused}");
}

#[test]
fn what_waits_to_be_cut_can_be_looked_at_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    let stamps: Vec<_> = (0..3).map(|_| write(&capture, V, b"1").unwrap()).collect();
    let after =
        |time, max| capture.queued_after(time, max).iter().map(|captured| captured.stamp).collect::<Vec<_>>();
    assert_eq!(after(Timestamp::ZERO, 2), stamps[..2]);
    assert_eq!(after(stamps[1].time, 2), stamps[2..]);
    capture.cut(1);
    assert_eq!(after(Timestamp::ZERO, 9), stamps[1..]);
    let (end, idle) = capture.idle_volumes();
    assert_eq!(idle, [VolumeIndex(1)]);
    assert!(end > stamps[2].time && write(&capture, VolumeIndex(1), b"2").unwrap().time > end);
    capture.cut(usize::MAX);
    assert_eq!(after(Timestamp::ZERO, 9), []);
    assert_eq!(capture.idle_volumes().1, [V, VolumeIndex(1)]);
}

#[test]
fn a_hold_waits_for_what_is_under_way_and_a_fence_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    let in_flight = reserve(&capture, V, 1);
    assert!(!capture.hold(Duration::from_millis(1)));
    publish(in_flight, b"x").unwrap();
    assert!(capture.hold(Duration::from_secs(60)));
    std::thread::scope(|scope| {
        let held = scope.spawn(|| write(&capture, V, b"y"));
        capture.let_go();
        assert!(held.join().unwrap().is_some());
    });
    capture.fence();
    let refused = capture.reserve(V, &Intent::Attrs { file: sample_file(1) }, 100, 0);
    assert_eq!(refused.err(), Some(Refused::Fenced));
}

#[test]
fn no_stamp_reaches_the_durable_mark() {
    let dir = tempfile::tempdir().unwrap();
    let limit = Timestamp(Reading::now().real + 1_000_000);
    let volumes = [StartVolume::NEW; 2];
    let at_the_limit = Start { floor: Timestamp(limit.0 - 3), limit, ..start(&volumes) };
    let capture = Capture::create(&dir.path().join("sidefile"), bytes_min(), &at_the_limit).unwrap();
    let under_way = reserve(&capture, V, 4);
    assert!(write(&capture, V, b"last").is_some_and(|stamp| stamp.time < limit));
    while write(&capture, V, b"more").is_some_and(|stamp| stamp.time < limit) {}
    assert_eq!(write(&capture, V, b"none"), None, "dropped");
    assert_eq!(capture.fill().overflow, Some(Overflow::Site));
    assert_eq!(publish(under_way, b"data"), None, "nothing follows what was dropped");
    assert!(!capture.changes()[0].is_empty());
    capture.raise_limit(Timestamp(limit.0 + limits::STAMP_RESERVE_NS));
    assert_eq!(write(&capture, V, b"none"), None, "not before a resync");
    assert!(capture.hold(Duration::from_secs(60)));
    capture.release(&capture.cut(usize::MAX).updates);
    capture.resume(None).unwrap();
    capture.let_go();
    assert!(write(&capture, V, b"more").is_some_and(|stamp| stamp.time > limit));
}

#[test]
fn a_suspension_that_needs_a_person_is_not_taken_for_one_that_passes() {
    let dir = tempfile::tempdir().unwrap();
    let capture = sidefile(&dir);
    capture.suspend_while(Overflow::Site);
    capture.suspend_while(Overflow::TooSlow);
    assert_eq!(capture.fill().overflow, Some(Overflow::Site), "the first reason stays");
    capture.suspend();
    assert_eq!((capture.fill().suspended, capture.fill().overflow), (true, None));
    capture.suspend_while(Overflow::Site);
    assert_eq!(capture.fill().overflow, None);
}

#[test]
fn the_blocks_of_a_copy_with_holes_are_taken_again() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sidefile");
    drop(sidefile(&dir));
    let file = File::options().write(true).open(&path).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(8192).unwrap();
    file.set_len(bytes).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 < bytes);
    Capture::open(&path, &start(&[StartVolume::NEW; 2])).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 >= bytes);
}

#[test]
fn a_run_that_ends_before_its_first_timestamp_takes_none_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sidefile");
    let volumes = [StartVolume::NEW; 2];
    // Ahead of real time, as after a power loss.
    let mark = Timestamp(Reading::now().real + 10_000_000_000);
    let late = Start { floor: mark, ..start(&volumes) };
    drop(Capture::create_after_loss(&path, bytes_min(), &late).unwrap());
    let (again, survivors) = Capture::open(&path, &start(&volumes)).unwrap();
    assert!(again.now() > mark, "the clock went back");
    assert!(survivors.dropped, "what was lost is not noted yet");
}

#[test]
fn what_an_earlier_run_dropped_is_not_told_as_complete_up_to_now() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sidefile");
    let volumes = [StartVolume::NEW; 2];
    let capture = Capture::create(&path, bytes_min(), &start(&volumes)).unwrap();
    let stamp = write(&capture, V, b"kept").unwrap();
    capture.suspend();
    assert_eq!(write(&capture, V, b"dropped"), None);
    let dropped_at = capture.now();
    drop(capture);
    let (again, survivors) = Capture::open(&path, &start(&volumes)).unwrap();
    assert!(survivors.dropped);
    again.suspend_again(SuspendReason::Link, true);
    let cut = again.cut(usize::MAX);
    assert_eq!(cut.updates.last().map(|captured| captured.stamp), Some(stamp));
    assert!((stamp.time..dropped_at).contains(&cut.end), "{:?} is not before {dropped_at:?}", cut.end);
}
