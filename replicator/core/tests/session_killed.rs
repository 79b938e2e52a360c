//! A primary's process is killed: its next one knows which sets were made, but not their bytes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod session_common;

use std::sync::Arc;

use session_common::{
    Change, EPOCH, Rng, TestSet, for_seeds, instance, make_set, root, sender_config, sender_volume,
    volume_name,
};
use twinfs_core::delta::SetLocation;
use twinfs_core::id::{GroupNumber, SetNumber, VolumeIndex};
use twinfs_core::session::handshake::ResumeError;
use twinfs_core::session::receiver::{Ordering, Receiver, ReceiverState, ReceiverVolume, Verdict};
use twinfs_core::session::sender::{Adopted, Sender};
use twinfs_core::session::{ChainPoint, Role, VolumeState};
use twinfs_core::stamp::{Seq, Timestamp};

const A: VolumeIndex = VolumeIndex(0);
const START: Timestamp = Timestamp(1);

type TestSender = Sender<Arc<TestSet>>;

fn replica() -> Receiver {
    let volume = ReceiverVolume {
        name: volume_name(0),
        instance: instance(0),
        root: root(0),
        member: true,
        base: ChainPoint::START,
        base_end: Timestamp::ZERO,
        through: Seq::ZERO,
    };
    let state = ReceiverState {
        paired: Some((session_common::SESSION, EPOCH)),
        role: Role::Replica,
        group: GroupNumber(0),
        time: Timestamp::ZERO,
        volumes: vec![volume],
    };
    Receiver::restore(state, Ordering::ByStamp)
}

/// Connects; returns how many sets the replica dropped.
fn connect(sender: &mut TestSender, receiver: &mut Receiver) -> Result<usize, ResumeError> {
    let hello = sender.hello();
    let adoption = receiver.handle_hello(&hello).unwrap();
    let withdrawn = receiver.withdraw(&hello).iter().map(|(_, numbers)| numbers.len()).sum();
    let welcome = receiver.handle_connected(&adoption);
    sender.handle_welcome(START, &welcome)?;
    Ok(withdrawn)
}

/// A set of `updates` updates whose first one has the sequence number as its time.
fn issue(sender: &mut TestSender, updates: u64) -> TestSet {
    let link = sender.link(A).unwrap();
    let times = (0..updates).map(|at| Change::write(link.first_seq.0 + at));
    let changes: Vec<_> = times.collect();
    let set = make_set(0, link, &changes, changes.last().unwrap().time);
    sender.handle_issued(A, set.clone().issued(100)).unwrap();
    set
}

fn deliver(receiver: &mut Receiver, set: &TestSet) {
    let verdict = receiver.handle_set(&set.header, set.hash, set.meta.clone());
    assert_eq!(verdict, Ok(Verdict::Append(A)), "set {}", set.header.number);
    let at = SetLocation { segment: 1, offset: set.header.number.0 };
    receiver.handle_appended(A, set.header.number, at).unwrap();
    receiver.handle_durable(A, set.header.number).unwrap();
}

#[test]
fn the_chain_goes_on_where_the_replica_is() {
    for_seeds("session_killed", "the_chain_goes_on_where_the_replica_is", 500, |seed| {
        let mut random = Rng(seed);
        let (mut sender, mut receiver) =
            (Sender::new(sender_config(), vec![sender_volume(0)], START), replica());
        connect(&mut sender, &mut receiver).unwrap();
        let mut updates = 0;
        for _life in 0..5 {
            let mut made: Vec<TestSet> =
                (0..random.below(8)).map(|_| issue(&mut sender, 1 + random.below(4))).collect();
            updates = made.last().map_or(updates, |set| set.header.last_seq().0);
            // What the killed process was told, and then what it was not told any more.
            let points: Vec<_> = made.iter().map(|set| (set.point(), set.header.end)).collect();
            random.shuffle(&mut made);
            made.truncate(random.below(9) as usize);
            made.iter().for_each(|set| deliver(&mut receiver, set));
            while let Some(ack) = receiver.poll_ack() {
                if random.chance(50) {
                    sender.handle_ack(ack).unwrap();
                }
            }
            let durable = receiver.view().volumes[0].durable;
            let kept = sender.state().next().unwrap();
            let mut volume = sender_volume(0);
            (volume.acked, volume.acked_end, volume.end) = (kept.acked, kept.acked_end, kept.acked_end);
            volume.forgotten =
                points.into_iter().filter(|(point, _)| point.number > kept.acked.number).collect();
            let was_ahead = durable.number > kept.acked.number;
            let beyond = made.iter().filter(|set| set.header.number > durable.number).count();
            sender = Sender::new(sender_config(), vec![volume], START);
            receiver.handle_disconnected();
            let withdrawn = connect(&mut sender, &mut receiver).map_err(|error| error.to_string())?;
            assert_eq!(withdrawn, beyond, "what lies beyond a gap is dropped");
            let adopted = was_ahead.then_some(Adopted { volume: A, through: durable.last_seq });
            assert_eq!(sender.poll_adopted(), adopted);
            assert_eq!(
                sender.poll_transmit().map(|(_, set)| set.number),
                None,
                "there are no bytes to send again"
            );
            // The updates that the replica lacks are made into other sets.
            while durable_seq(&receiver) < updates {
                let left = updates - durable_seq(&receiver);
                let set = issue(&mut sender, 1 + random.below(left));
                deliver(&mut receiver, &set);
                while let Some(ack) = receiver.poll_ack() {
                    sender.handle_ack(ack).unwrap();
                }
            }
            while sender.poll_released().is_some() {}
        }
        Ok(())
    });
}

fn durable_seq(receiver: &Receiver) -> u64 {
    receiver.view().volumes[0].durable.last_seq.0
}

#[test]
fn a_replica_that_is_ahead_of_all_that_is_known_has_diverged() {
    let (mut sender, mut receiver) = (Sender::new(sender_config(), vec![sender_volume(0)], START), replica());
    connect(&mut sender, &mut receiver).unwrap();
    let sets: Vec<_> = (0..3).map(|_| issue(&mut sender, 1)).collect();
    sets.iter().for_each(|set| deliver(&mut receiver, set));
    for (known, diverges) in [(3, false), (2, true)] {
        let mut volume = sender_volume(0);
        volume.forgotten = sets.iter().take(known).map(|set| (set.point(), set.header.end)).collect();
        let mut reverted: TestSender = Sender::new(sender_config(), vec![volume], START);
        let connected = connect(&mut reverted, &mut receiver);
        assert_eq!(matches!(connected, Err(ResumeError::Ahead { .. })), diverges, "{connected:?}");
    }
    // The same number, another past.
    let mut volume = sender_volume(0);
    volume.forgotten = sets.iter().map(|set| (set.point(), set.header.end)).collect();
    volume.forgotten[2].0.hash.0[0] ^= 1;
    let mut reverted: TestSender = Sender::new(sender_config(), vec![volume], START);
    assert!(matches!(connect(&mut reverted, &mut receiver), Err(ResumeError::Diverged { .. })));
}

#[test]
fn sets_that_a_clean_stop_kept_are_neither_dropped_nor_made_anew() {
    let (mut sender, mut receiver) = (Sender::new(sender_config(), vec![sender_volume(0)], START), replica());
    connect(&mut sender, &mut receiver).unwrap();
    let sets: Vec<_> = (0..3).map(|_| issue(&mut sender, 1)).collect();
    deliver(&mut receiver, &sets[2]);
    let kept: Vec<_> = sender.state().collect();
    let mut sender: TestSender = Sender::new(sender_config(), kept, START);
    receiver.handle_disconnected();
    assert_eq!(connect(&mut sender, &mut receiver).unwrap(), 0);
    assert_eq!(sender.poll_adopted(), None);
    let sent: Vec<_> = std::iter::from_fn(|| sender.poll_transmit().map(|(_, set)| set.number.0)).collect();
    assert_eq!(sent, [1, 2]);
}

#[test]
fn a_killed_copy_that_was_whole_becomes_duplex() {
    let mut volume = sender_volume::<Arc<TestSet>>(0);
    volume.complete = Some(twinfs_core::stamp::Stamp { time: Timestamp(5), seq: Seq(5) });
    let sender = Sender::new(sender_config(), vec![volume], START);
    assert_eq!(sender.volume_state(A), Some(VolumeState::Copy));
    assert!(sender.is_whole(A));
    assert_eq!(sender.link(A).unwrap().number, SetNumber(1));
}

#[test]
fn a_primary_that_was_taken_back_is_no_lost_tail() {
    let (mut sender, mut receiver) = (Sender::new(sender_config(), vec![sender_volume(0)], START), replica());
    connect(&mut sender, &mut receiver).unwrap();
    let sets: Vec<_> = (0..3).map(|_| issue(&mut sender, 1)).collect();
    sets.iter().for_each(|set| deliver(&mut receiver, set));
    let plan = receiver.poll_group().unwrap();
    receiver.handle_committed(plan.number).unwrap();
    // Power failed: no stamp had reached 3, or the replica heard from a future that never was here.
    for (mark, diverges) in [(Timestamp(3), false), (Timestamp(2), true)] {
        let mut lost: TestSender = Sender::new(sender_config(), vec![sender_volume(0)], START);
        lost.cover(mark);
        let connected = connect(&mut lost, &mut receiver);
        assert_eq!(connected.is_err(), diverges, "{connected:?}");
        assert_eq!(lost.session_state() == twinfs_core::session::SessionState::Diverged, diverges);
    }
}
