//! A resync: nothing is shown before it is complete, whatever happens; and a primary whose change map covers the difference
//! goes on from wherever the replica stands.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod session_common;

use session_common::{
    Chain, Change, EPOCH, SESSION, TestSet, instance, make_set, root, sender_config, sender_volume,
    volume_name,
};
use twinfs_core::delta::SetLocation;
use twinfs_core::id::{Epoch, GroupNumber, SetNumber, SiteId, VolumeIndex, VolumeInstance};
use twinfs_core::limits;
use twinfs_core::loss::Loss;
use twinfs_core::session::handshake::ResumeError;
use twinfs_core::session::receiver::{Ordering, Receiver, ReceiverState, ReceiverVolume, Repair, SetRefusal};
use twinfs_core::session::sender::{Sender, SenderVolume};
use twinfs_core::session::{ChainPoint, Role, SessionState, SuspendReason, VolumeState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::{Ack, Damage, Progress, RefuseCode, Text, Welcome};

const A: VolumeIndex = VolumeIndex(0);
const B: VolumeIndex = VolumeIndex(1);

fn state(volumes: usize) -> ReceiverState {
    let volumes = (0..volumes).map(|index| ReceiverVolume {
        name: volume_name(index),
        instance: instance(index),
        root: root(index),
        member: true,
        base: ChainPoint::START,
        base_end: Timestamp::ZERO,
        through: Seq::ZERO,
    });
    ReceiverState {
        paired: Some((SESSION, EPOCH)),
        role: Role::Replica,
        group: GroupNumber(0),
        time: Timestamp::ZERO,
        volumes: volumes.collect(),
    }
}

fn take(receiver: &mut Receiver, volume: VolumeIndex, set: &TestSet) {
    receiver.handle_set(&set.header, set.hash, set.meta.clone()).unwrap();
    let at = SetLocation { segment: 0, offset: set.header.number.0 };
    receiver.handle_appended(volume, set.header.number, at).unwrap();
    receiver.handle_durable(volume, set.header.number).unwrap();
}

/// Forms and commits groups; returns their times and how many updates each has.
fn commit(receiver: &mut Receiver) -> Vec<(u64, usize)> {
    let mut groups = Vec::new();
    while let Some(plan) = receiver.poll_group() {
        let sets = plan.volumes.iter().flat_map(|volume| &volume.sets);
        groups.push((plan.time.0, sets.map(|set| set.range.len()).sum()));
        receiver.handle_committed(plan.number).unwrap();
    }
    groups
}

#[test]
fn all_of_a_resync_becomes_one_group_on_every_volume() {
    let mut receiver = Receiver::restore(state(2), Ordering::ByStamp);
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    let marked = [Change::write(10), Change::resync(20), Change::write(30)];
    take(&mut receiver, A, &a.set(&marked, 30));
    take(&mut receiver, B, &b.writes(&[15, 25]));
    assert_eq!(commit(&mut receiver), [(10, 1)], "what was let go before the mark may be as old as that");
    assert!(receiver.is_resyncing(A) && !receiver.is_resyncing(B));
    take(&mut receiver, A, &a.set(&[Change::write(40), Change::resync(50), Change::write(55)], 60));
    take(&mut receiver, B, &b.writes(&[41, 100]));
    assert_eq!(commit(&mut receiver), [], "begun again, it is the same resync");
    take(&mut receiver, A, &a.set(&[Change::complete(70), Change::write(80), Change::resync(90)], 95));
    assert_eq!(commit(&mut receiver), [(80, 10)], "another one begins");
    assert_eq!(receiver.progress().time, Timestamp(80));
    take(&mut receiver, A, &a.set(&[Change::complete(97)], 120));
    assert_eq!(commit(&mut receiver), [(100, 3)]);
    assert!(!receiver.is_resyncing(A));
}

#[test]
fn no_time_is_told_that_lies_between_what_was_let_go_and_the_mark() {
    let mut receiver = Receiver::restore(state(1), Ordering::ByStamp);
    let mut a = Chain::new(0);
    take(&mut receiver, A, &a.set(&[Change::write(10)], 12));
    assert_eq!(commit(&mut receiver), [(12, 1)]);
    // Suspended right after that, for long; then the resync begins.
    take(&mut receiver, A, &a.set(&[Change::resync(1000), Change::write(1001)], 1002));
    assert_eq!(commit(&mut receiver), []);
    assert_eq!(receiver.progress().time, Timestamp(12));
    // A promote now must not say that it knows what happened up to the mark.
    let knowledge: Vec<_> = receiver.knowledge().collect();
    assert_eq!(Loss::of(Timestamp(12), &knowledge).unknown_after, Timestamp(12));
    drop(knowledge);
    take(&mut receiver, A, &a.set(&[Change::complete(1003)], 1003));
    assert_eq!(commit(&mut receiver), [(1003, 3)]);
}

#[test]
fn a_restart_in_the_middle_of_a_resync_shows_nothing_of_it() {
    let mut a = Chain::new(0);
    let sets = [
        a.set(&[Change::write(10), Change::resync(20), Change::write(30)], 30),
        a.writes(&[40]),
        a.set(&[Change::complete(50), Change::write(60)], 60),
    ];
    let mut receiver = Receiver::restore(state(1), Ordering::ByStamp);
    sets[..2].iter().for_each(|set| take(&mut receiver, A, set));
    assert_eq!(commit(&mut receiver), [(10, 1)]);
    let mut kept = state(1);
    (kept.group, kept.time, kept.volumes[0].through) = (GroupNumber(1), Timestamp(10), Seq(1));
    let mut again = Receiver::restore(kept, Ordering::ByStamp);
    for set in &sets[..2] {
        let at = SetLocation { segment: 0, offset: set.header.number.0 };
        again.restore_set(&set.header, set.hash, set.meta.clone(), at).unwrap();
    }
    again.check_restored().unwrap();
    assert_eq!(commit(&mut again), []);
    assert!(again.is_resyncing(A));
    take(&mut again, A, &sets[2]);
    assert_eq!(commit(&mut again), [(60, 5)]);
}

#[test]
fn a_resync_that_cannot_be_held_is_refused_and_does_not_hang() {
    let large = |mut set: TestSet| {
        set.header.meta_len = limits::SET_META_BYTES_MAX as u32;
        set
    };
    let mut receiver = Receiver::restore(state(2), Ordering::ByStamp);
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    take(&mut receiver, A, &large(a.set(&[Change::write(10), Change::resync(20)], 20)));
    let refusal = (21..1000).find_map(|time| {
        let set = large(a.writes(&[time]));
        let refusal = receiver.handle_set(&set.header, set.hash, set.meta.clone()).err();
        if refusal.is_none() {
            let at = SetLocation { segment: 0, offset: time };
            receiver.handle_appended(A, set.header.number, at).unwrap();
        }
        refusal.map(|refusal| (refusal, set))
    });
    let (refusal, set) = refusal.expect("the bound is reached");
    assert_eq!(refusal, SetRefusal::Full, "what was before the mark can still make room");
    take(&mut receiver, B, &b.writes(&[2000]));
    assert_eq!(commit(&mut receiver), [(10, 1)]);
    assert_eq!(
        receiver.handle_set(&set.header, set.hash, set.meta.clone()),
        Err(SetRefusal::ResyncTooLarge(volume_name(0)))
    );
}

type TestSender = Sender<std::sync::Arc<TestSet>>;

/// A primary that remembers `issued` sets of its chain, `acked` of them acknowledged.
fn sender(sets: &[TestSet], acked: usize) -> TestSender {
    let mut volume: SenderVolume<_> = sender_volume(0);
    volume.state = VolumeState::Duplex;
    volume.acked = acked.checked_sub(1).map_or(ChainPoint::START, |at| sets[at].point());
    volume.issued = sets[acked..].iter().map(|set| set.clone().issued(10)).collect();
    Sender::new(sender_config(), vec![volume], Timestamp(1000))
}

fn welcome(receiver: &mut Receiver, sender: &TestSender) -> Welcome {
    let adoption = receiver.handle_hello(&sender.hello()).unwrap();
    receiver.handle_connected(&adoption)
}

fn writes(times: &[u64]) -> Vec<TestSet> {
    let mut chain = Chain::new(0);
    times.iter().map(|time| chain.writes(&[*time])).collect()
}

#[test]
fn a_primary_whose_map_covers_the_difference_adopts_what_the_replica_has() {
    let (ours, theirs) = (writes(&[10, 20, 30]), writes(&[10, 21, 31, 41, 51]));
    // The replica has more, less, or other sets.
    for (count, acked) in [(5, 3), (5, 0), (1, 3), (0, 2), (2, 2), (3, 1)] {
        let mut receiver = Receiver::restore(state(1), Ordering::ByStamp);
        theirs[..count].iter().for_each(|set| take(&mut receiver, A, set));
        let mut plain = sender(&ours, acked);
        let refused = receiver.handle_hello(&plain.hello()).is_err();
        assert!(refused || plain.handle_welcome(Timestamp(1000), &welcome(&mut receiver, &plain)).is_err());

        let mut sender = sender(&ours, acked);
        sender.suspend(SuspendReason::Error);
        sender.cover(Timestamp(1000));
        sender.handle_welcome(Timestamp(1000), &welcome(&mut receiver, &sender)).unwrap();
        let durable = receiver.view().volumes[0].durable;
        assert_eq!(sender.poll_restart(), Some(vec![durable.last_seq]));
        assert_eq!(sender.poll_restart(), None);
        assert!(sender.is_idle() && sender.needs_resync() && sender.poll_transmit().is_none());
        sender.resume_with_resync();
        assert_eq!(sender.session_state(), SessionState::Resync);

        let link = sender.link(A).unwrap();
        let changes = [Change::resync(1001), Change::write(1002), Change::complete(1003)];
        let set = make_set(0, link, &changes, 1003);
        take(&mut receiver, A, &set);
        sender.handle_issued(A, set.clone().issued(10)).unwrap();
        sender.handle_ack(Ack { volume: A, number: set.header.number }).unwrap();
        assert_eq!(sender.volume_state(A), Some(VolumeState::Resync), "it is not shown");
        assert_eq!(commit(&mut receiver).last(), Some(&(1003, count + 3)));
        let applied = Timestamp::ZERO;
        sender.handle_progress(Progress { group: GroupNumber(9), time: Timestamp(1003), applied });
        assert_eq!(sender.session_state(), SessionState::Duplex);
    }
}

#[test]
fn another_tree_a_higher_epoch_and_sets_beyond_a_gap_are_not_adopted() {
    let sets = writes(&[10, 20, 30]);
    let mut receiver = Receiver::restore(state(1), Ordering::ByStamp);
    take(&mut receiver, A, &sets[0]);
    let mut covered = sender(&sets, 1);
    covered.cover(Timestamp(1000));
    let mut other = covered.hello();
    other.volumes[0].instance = VolumeInstance::new(5).unwrap();
    assert!(receiver.handle_hello(&other).is_err());
    let good = welcome(&mut receiver, &covered);
    let fenced = Welcome { epoch: Epoch { number: 2, site: SiteId::from_bytes([9; 16]) }, ..good.clone() };
    assert!(matches!(covered.handle_welcome(Timestamp(1000), &fenced), Err(ResumeError::Fenced(_))));
    let mut beyond = good;
    beyond.volumes[0].durable = ChainPoint::START;
    beyond.volumes[0].beyond = vec![SetNumber(2)];
    let mut covered = sender(&sets, 1);
    covered.cover(Timestamp(1000));
    assert!(matches!(covered.handle_welcome(Timestamp(1000), &beyond), Err(ResumeError::Diverged { .. })));
    assert_eq!(covered.session_state(), SessionState::Diverged);
}

/// A replica whose journal was damaged: it has the first `count` sets, and says so.
fn damaged(sets: &[TestSet], count: usize, whole: bool) -> Receiver {
    let mut receiver = Receiver::restore(state(1), Ordering::ByStamp);
    sets[..count].iter().for_each(|set| take(&mut receiver, A, set));
    commit(&mut receiver);
    receiver.begin_repair(repair(&receiver, whole));
    receiver
}

fn repair(receiver: &Receiver, whole: bool) -> Repair {
    let damage = Damage { whole, why: Text::new("rot") };
    let view = receiver.view();
    Repair {
        damage,
        from: view.volumes.into_iter().map(|volume| (volume.name, volume.durable.last_seq)).collect(),
    }
}

fn meet(receiver: &mut Receiver, sender: &mut TestSender) {
    let hello = sender.hello();
    let adoption = receiver.handle_hello(&hello).unwrap();
    receiver.withdraw(&hello);
    let welcome = receiver.handle_connected(&adoption);
    sender.handle_welcome(Timestamp(1000), &welcome).unwrap();
}

#[test]
fn a_damaged_replica_is_gone_on_with_from_where_it_stands() {
    let sets = writes(&[10, 20, 30, 40]);
    for (count, acked) in [(0, 0), (0, 4), (1, 3), (2, 2), (3, 1)] {
        let mut receiver = damaged(&sets, count, count == 0);
        let mut sender = sender(&sets, acked);
        meet(&mut receiver, &mut sender);
        assert_eq!(sender.poll_damage().map(|damage| damage.whole), Some(count == 0));
        assert_eq!(sender.poll_damage(), None);
        assert_eq!(sender.poll_restart(), Some(vec![Seq(count as u64)]));
        assert!(sender.is_idle() && sender.needs_resync() && sender.poll_transmit().is_none());
        assert_eq!(sender.session_state(), SessionState::Suspended(SuspendReason::Link));

        // The connection breaks before anything came: it is all the same.
        meet(&mut receiver, &mut sender);
        assert!(sender.poll_damage().is_some() && sender.poll_restart().is_some());
        sender.resume_with_resync();
        let link = sender.link(A).unwrap();
        let begun = make_set(0, link, &[Change::resync(1001), Change::write(1002)], 1003);
        take(&mut receiver, A, &begun);
        sender.handle_issued(A, begun.clone().issued(10)).unwrap();
        assert_eq!(commit(&mut receiver), [], "nothing shows before all of it is there");
        assert_eq!(receiver.progress().time, Timestamp([0, 10, 20, 30][count]), "nobody knows more");
        assert!(receiver.damage().is_none() && !receiver.is_repaired());

        // From here on a connection that breaks costs nothing.
        meet(&mut receiver, &mut sender);
        assert!(sender.poll_damage().is_none() && sender.poll_restart().is_none() && sender.is_idle());
        let rest = make_set(0, sender.link(A).unwrap(), &[Change::write(1004), Change::complete(1005)], 1006);
        take(&mut receiver, A, &rest);
        assert_eq!(commit(&mut receiver), [(1006, 4)]);
        assert!(receiver.is_repaired());
        receiver.end_repair();
        assert!(receiver.repair().is_none() && !receiver.is_repaired());
    }
}

#[test]
fn a_damaged_replica_drops_what_lies_beyond_a_gap() {
    let sets = writes(&[10, 20, 30]);
    let mut receiver = damaged(&sets, 1, false);
    take(&mut receiver, A, &sets[2]);
    let mut sender = sender(&sets, 2);
    meet(&mut receiver, &mut sender);
    assert_eq!(receiver.durable_beyond(&volume_name(0)).count(), 0);
    assert_eq!(sender.poll_restart(), Some(vec![Seq(1)]));
}

#[test]
fn a_volume_of_which_the_damage_took_the_end_of_its_copy_is_copied_anew() {
    let sets = writes(&[10, 20]);
    let mut unfinished = state(1);
    unfinished.volumes[0].member = false;
    let mut receiver = Receiver::restore(unfinished, Ordering::ByStamp);
    take(&mut receiver, A, &sets[0]);
    receiver.begin_repair(repair(&receiver, false));
    let mut sender = sender(&sets, 2);
    meet(&mut receiver, &mut sender);
    assert!(sender.poll_restart().is_some());
    sender.resume_with_resync();
    assert_eq!(sender.volume_state(A), Some(VolumeState::Copy));
    let set = make_set(0, sender.link(A).unwrap(), &[Change::write(1001)], 1002);
    take(&mut receiver, A, &set);
    assert!(receiver.damage().is_none() && receiver.is_repaired(), "nothing of it shows");
}

#[test]
fn a_damaged_replica_is_no_excuse_for_another_tree_or_a_lower_epoch() {
    let sets = writes(&[10]);
    let receiver = damaged(&sets, 1, false);
    let mut other = sender(&sets, 1).hello();
    other.volumes[0].instance = VolumeInstance::new(5).unwrap();
    assert_eq!(receiver.handle_hello(&other).unwrap_err().code, RefuseCode::Diverged);
    let mut receiver = damaged(&sets, 1, false);
    let mut sender = sender(&sets, 1);
    let good = welcome(&mut receiver, &sender);
    let fenced = Welcome { epoch: Epoch { number: 2, site: SiteId::from_bytes([9; 16]) }, ..good };
    assert!(matches!(sender.handle_welcome(Timestamp(1000), &fenced), Err(ResumeError::Fenced(_))));
    assert!(sender.poll_damage().is_none() && sender.poll_restart().is_none());
}

#[test]
fn what_the_trees_hold_is_told() {
    let mut chain = Chain::new(0);
    let (first, null, second) = (chain.writes(&[10]), chain.null(15), chain.writes(&[20]));
    let mut receiver = Receiver::restore(state(1), Ordering::ByStamp);
    let sender = sender(&[], 0);
    assert_eq!(welcome(&mut receiver, &sender).applied, Timestamp::ZERO);
    take(&mut receiver, A, &first);
    commit(&mut receiver);
    assert_eq!(receiver.poll_progress().unwrap().applied, Timestamp::ZERO);
    receiver.handle_checkpointed(Timestamp(10), true);
    assert_eq!(receiver.poll_progress().unwrap().applied, Timestamp(10));
    receiver.handle_set(&null.header, null.hash, null.meta).unwrap();
    assert_eq!(commit(&mut receiver), []);
    assert_eq!(receiver.poll_progress().unwrap().applied, Timestamp(15), "nothing came that they lack");
    take(&mut receiver, A, &second);
    commit(&mut receiver);
    assert_eq!(receiver.poll_progress().unwrap().applied, Timestamp(10), "as far as they are durable");
    receiver.handle_checkpointed(Timestamp(20), true);
    receiver.handle_disconnected();
    assert_eq!(receiver.progress().applied, Timestamp(20));
}
