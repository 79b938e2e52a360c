//! The replica's side: what it takes, what it refuses, what it holds.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod session_common;

use session_common::{
    Chain, Change, EPOCH, PRIMARY, REPLICA, SESSION, TestSet, instance, root, update, volume_name,
};
use twinfs_core::delta::SetLocation;
use twinfs_core::id::{Epoch, GroupNumber, SessionId, SetHash, SetNumber, VolumeIndex, VolumeInstance};
use twinfs_core::limits;
use twinfs_core::session::receiver::{
    GroupPlan, Ordering, PromoteError, Receiver, ReceiverState, ReceiverVolume, SetRefusal, Verdict,
};
use twinfs_core::session::{ChainPoint, Role};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::Token;
use twinfs_core::wire::{Ack, Hello, HelloVolume, PROTOCOL, Progress, PromoteReady};

const A: VolumeIndex = VolumeIndex(0);

/// Makes something of a set that cannot be.
type Damage<'a> = &'a dyn Fn(&mut TestSet);

fn state(members: &[bool]) -> ReceiverState {
    let volumes = members.iter().enumerate().map(|(index, member)| ReceiverVolume {
        name: volume_name(index),
        instance: instance(index),
        root: root(index),
        member: *member,
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

fn receiver(members: &[bool]) -> Receiver {
    let mut receiver = Receiver::restore(state(members), Ordering::ByStamp);
    let volumes = (0..members.len()).map(|index| HelloVolume {
        name: volume_name(index),
        instance: instance(index),
        root: root(index),
        state: twinfs_core::session::VolumeState::Copy,
        acked: ChainPoint::START,
        oldest: SetNumber(1),
        newest: SetNumber(u64::MAX),
    });
    let hello = Hello {
        protocol: PROTOCOL,
        session: SESSION,
        site: PRIMARY,
        name: twinfs_core::id::SiteName::new("nyc").unwrap(),
        epoch: EPOCH,
        incarnation: session_common::INCARNATION,
        volumes: volumes.collect(),
    };
    let adoption = receiver.handle_hello(&hello).unwrap();
    receiver.handle_connected(&adoption);
    receiver
}

fn offer(receiver: &mut Receiver, set: &TestSet) -> Result<Verdict, SetRefusal> {
    receiver.handle_set(&set.header, set.hash, set.meta.clone())
}

fn at(offset: u64) -> SetLocation {
    SetLocation { segment: 1, offset }
}

/// Takes a set and appends it.
fn take(receiver: &mut Receiver, set: &TestSet) {
    let Ok(Verdict::Append(index)) = offer(receiver, set) else { panic!("{:?}", offer(receiver, set)) };
    receiver.handle_appended(index, set.header.number, at(set.header.number.0)).unwrap();
}

fn commit(receiver: &mut Receiver) -> GroupPlan {
    let plan = receiver.poll_group().unwrap();
    receiver.handle_committed(plan.number).unwrap();
    plan
}

fn acks(receiver: &mut Receiver) -> Vec<u64> {
    std::iter::from_fn(|| receiver.poll_ack()).map(|ack| ack.number.0).collect()
}

#[test]
fn a_set_is_acknowledged_once_it_is_durable_and_again_if_it_comes_again() {
    let mut chain = Chain::new(0);
    let sets = [chain.writes(&[10]), chain.writes(&[20]), chain.writes(&[30])];
    let mut receiver = receiver(&[true]);
    assert!(receiver.handle_appended(A, SetNumber(1), at(1)).is_err(), "it did not come yet");
    take(&mut receiver, &sets[2]);
    assert!(receiver.handle_durable(A, SetNumber(2)).is_err());
    assert_eq!(receiver.sets_out_of_order(), 1);
    assert_eq!(offer(&mut receiver, &sets[2]), Ok(Verdict::Duplicate(A)));
    assert_eq!(acks(&mut receiver), [0; 0], "nothing is durable");
    receiver.handle_durable(A, SetNumber(3)).unwrap();
    assert_eq!(acks(&mut receiver), [3]);
    assert_eq!(offer(&mut receiver, &sets[2]), Ok(Verdict::Duplicate(A)));
    assert_eq!(acks(&mut receiver), [3]);
    take(&mut receiver, &sets[0]);
    take(&mut receiver, &sets[1]);
    assert_eq!(acks(&mut receiver), [0; 0]);
    // A durable COMMIT makes durable what it stands behind.
    assert_eq!(commit(&mut receiver).volumes[0].sets.len(), 3);
    assert_eq!(acks(&mut receiver), [1, 2]);
    for set in &sets {
        assert_eq!(offer(&mut receiver, set), Ok(Verdict::Duplicate(A)));
    }
    assert_eq!(acks(&mut receiver), [1, 2, 3]);
    receiver.handle_disconnected();
    assert_eq!(offer(&mut receiver, &sets[0]), Ok(Verdict::Duplicate(A)));
    assert_eq!(acks(&mut receiver), [0; 0]);
}

#[test]
fn another_set_with_a_known_number_diverges() {
    let mut chain = Chain::new(0);
    let (first, mut fork) = (chain.writes(&[10]), chain.clone());
    let (second, other_second) = (chain.writes(&[20]), fork.writes(&[21]));
    let (third, other_third) = (chain.writes(&[30]), fork.writes(&[31]));
    let diverged = |verdict: Result<Verdict, SetRefusal>| matches!(verdict, Err(SetRefusal::Diverged { .. }));
    let mut receiver = receiver(&[true]);
    take(&mut receiver, &first);
    // Beyond a gap: the same number, and a predecessor that is not the right one.
    take(&mut receiver, &third);
    assert!(diverged(offer(&mut receiver, &other_third)));
    assert!(diverged(offer(&mut receiver, &other_second)));
    take(&mut receiver, &second);
    // In the chain, and in a committed group.
    assert!(diverged(offer(&mut receiver, &other_second)));
    commit(&mut receiver);
    assert!(diverged(offer(&mut receiver, &other_second)));
    assert!(diverged(offer(&mut receiver, &fork.writes(&[40]))));
    // A null set that follows another set.
    let mut wrong = chain.null(60);
    wrong.header.predecessor = SetHash([3; 32]);
    assert!(diverged(offer(&mut receiver, &wrong)));
    assert_eq!(offer(&mut receiver, &chain.null(60)), Ok(Verdict::Null(A)));
}

#[test]
fn strangers_are_refused() {
    let set = Chain::new(0).writes(&[10]);
    let mut receiver = receiver(&[true]);
    let mut with = |change: &dyn Fn(&mut TestSet)| {
        let mut set = set.clone();
        change(&mut set);
        offer(&mut receiver, &set).unwrap_err()
    };
    let session = SessionId::from_bytes([8; 16]);
    assert_eq!(with(&|set| set.header.session = session), SetRefusal::WrongSession(session));
    let higher = Epoch { number: 2, site: PRIMARY };
    assert_eq!(with(&|set| set.header.epoch = higher), SetRefusal::WrongEpoch(higher));
    for (number, site) in [(0, PRIMARY), (1, REPLICA)] {
        let theirs = Epoch { number, site };
        assert_eq!(with(&|set| set.header.epoch = theirs), SetRefusal::Fenced { known: EPOCH, theirs });
    }
    assert_eq!(with(&|set| set.header.volume = volume_name(7)), SetRefusal::UnknownVolume(volume_name(7)));
    let other = VolumeInstance::new(4).unwrap();
    assert!(matches!(with(&|set| set.header.instance = other), SetRefusal::Diverged { .. }));
    assert!(matches!(with(&|set| set.header.root.ino = 77), SetRefusal::Diverged { .. }));
    let mut unpaired = Receiver::restore(ReceiverState::UNPAIRED, Ordering::ByStamp);
    assert_eq!(offer(&mut unpaired, &set), Err(SetRefusal::WrongSession(SESSION)));
    take(&mut receiver, &set);
}

#[test]
fn what_cannot_be_is_refused() {
    let mut chain = Chain::new(0);
    let first = chain.writes(&[10, 11]);
    let set = chain.writes(&[20, 21]);
    let mut receiver = receiver(&[true]);
    take(&mut receiver, &first);
    let bad: [(&str, Damage<'_>); 12] = [
        ("number zero", &|set| set.header.number = SetNumber(0)),
        ("number too high", &|set| set.header.number = SetNumber(u64::MAX)),
        ("too many updates", &|set| set.header.updates = 3),
        ("too few updates", &|set| set.header.updates = 1),
        ("sequence zero", &|set| set.header.first_seq = Seq(0)),
        ("sequence too high", &|set| set.header.first_seq = Seq(u64::MAX)),
        ("gap in the sequence", &|set| set.meta.updates[1].0.stamp.seq = Seq(9)),
        ("sequence elsewhere", &|set| {
            set.header.first_seq = Seq(4);
            set.meta.updates[0].0.stamp.seq = Seq(4);
            set.meta.updates[1].0.stamp.seq = Seq(5);
        }),
        ("times out of order", &|set| set.meta.updates[1].0.stamp.time = Timestamp(20)),
        ("after its interval", &|set| set.meta.updates[1].0.stamp.time = Timestamp(22)),
        ("before its interval", &|set| set.header.start = Timestamp(20)),
        ("in the interval before", &|set| {
            set.header.start = Timestamp(10);
            set.meta.updates[0].0.stamp.time = Timestamp(11);
        }),
    ];
    for (what, change) in bad {
        let mut set = set.clone();
        change(&mut set);
        let verdict = offer(&mut receiver, &set);
        assert!(matches!(verdict, Err(SetRefusal::Malformed { .. })), "{what}: {verdict:?}");
    }
    // A null set that closes the interval closes it for good, whichever of the two comes first.
    let mut early = chain.clone();
    early.last = first.point();
    early.end = 11;
    offer(&mut receiver, &early.null(20)).unwrap();
    assert!(matches!(offer(&mut receiver, &set), Err(SetRefusal::Malformed { .. })));
    let later = early.writes(&[21]);
    take(&mut receiver, &later);
    let mut closing = chain.null(90);
    closing.header.number = SetNumber(1);
    closing.header.predecessor = first.hash;
    closing.header.first_seq = Seq(3);
    // That one is behind the chain now: it says nothing.
    assert_eq!(offer(&mut receiver, &closing), Ok(Verdict::Null(A)));
    assert_eq!(commit(&mut receiver).time, Timestamp(21));
}

#[test]
fn null_sets_wait_for_the_sets_that_they_follow() {
    let mut chain = Chain::new(0);
    let (first, second, null) = (chain.writes(&[10]), chain.writes(&[20]), chain.null(25));
    let third = chain.writes(&[30]);
    let mut receiver = receiver(&[true]);
    offer(&mut receiver, &null).unwrap();
    take(&mut receiver, &second);
    assert_eq!(receiver.poll_group(), None);
    assert_eq!(receiver.progress().time, Timestamp::ZERO);
    take(&mut receiver, &first);
    let plan = commit(&mut receiver);
    assert_eq!((plan.number, plan.time), (GroupNumber(1), Timestamp(25)));
    assert_eq!(
        receiver.poll_progress(),
        Some(Progress { group: GroupNumber(1), time: Timestamp(25), applied: Timestamp::ZERO })
    );
    // Time goes on without a group.
    chain.last = second.point();
    offer(&mut receiver, &chain.null(29)).unwrap();
    assert_eq!(receiver.poll_group(), None);
    assert_eq!(
        receiver.poll_progress(),
        Some(Progress { group: GroupNumber(1), time: Timestamp(29), applied: Timestamp::ZERO })
    );
    take(&mut receiver, &third);
    assert_eq!(commit(&mut receiver).time, Timestamp(30));
}

#[test]
fn a_group_ends_within_a_set_and_the_next_goes_on_there() {
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    let mut receiver = receiver(&[true, true]);
    take(&mut receiver, &a.writes(&[10, 20, 30, 40]));
    assert_eq!(receiver.poll_group(), None, "the other volume has delivered nothing");
    take(&mut receiver, &b.writes(&[25]));
    let plan = commit(&mut receiver);
    assert_eq!((plan.time, plan.volumes[0].sets[0].range.clone()), (Timestamp(25), 0..2));
    assert_eq!((plan.volumes[0].through, plan.volumes[1].through), (Seq(2), Seq(1)));
    offer(&mut receiver, &b.null(35)).unwrap();
    let plan = receiver.poll_group().unwrap();
    assert_eq!((plan.time, plan.volumes[0].sets[0].range.clone()), (Timestamp(35), 2..3));
    assert_eq!(plan.volumes.len(), 1);
    assert_eq!(plan.volumes[0].sets[0].at, at(1));
    // One at a time, and only the planned one.
    offer(&mut receiver, &b.null(50)).unwrap();
    assert_eq!(receiver.poll_group(), None);
    assert!(receiver.handle_committed(GroupNumber(3)).is_err());
    receiver.handle_committed(GroupNumber(2)).unwrap();
    assert_eq!(commit(&mut receiver).volumes[0].sets[0].range, 3..4);
    assert_eq!(receiver.held_bytes(), 0);
}

#[test]
fn a_copied_volume_flows_unseen_and_joins_with_a_group() {
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    let mut receiver = receiver(&[true, false]);
    take(&mut receiver, &b.writes(&[10, 12]));
    let plan = commit(&mut receiver);
    assert_eq!((plan.number, plan.time, plan.joins.len()), (GroupNumber(1), Timestamp::ZERO, 0));
    assert_eq!(plan.volumes[0].through, Seq(2));
    // The mark is there, but the member is behind it: what is before the mark goes on.
    let change = |time, complete| if complete { Change::complete(time) } else { Change::write(time) };
    take(&mut receiver, &b.set(&[change(14, false), change(20, true), change(22, false)], 24));
    let plan = commit(&mut receiver);
    assert_eq!((plan.time, plan.volumes[0].through), (Timestamp::ZERO, Seq(3)));
    take(&mut receiver, &a.writes(&[15, 30]));
    // The member is at 30, the volume has delivered up to 24: they meet there.
    let plan = commit(&mut receiver);
    assert_eq!((plan.time, plan.joins.as_slice()), (Timestamp(24), &[VolumeIndex(1)][..]));
    assert_eq!((plan.volumes[0].through, plan.volumes[1].through), (Seq(1), Seq(5)));
    assert!(receiver.volumes().all(|(_, _, member)| member));
    // From then on it holds the others back.
    assert_eq!(receiver.poll_group(), None);
    offer(&mut receiver, &b.null(30)).unwrap();
    assert_eq!(commit(&mut receiver).time, Timestamp(30));
}

#[test]
fn a_volume_that_is_behind_what_is_shown_joins_later() {
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    let mut receiver = receiver(&[true, false]);
    take(&mut receiver, &a.writes(&[10, 50]));
    assert_eq!(commit(&mut receiver).time, Timestamp(50));
    take(&mut receiver, &b.set(&[Change::complete(20)], 40));
    assert_eq!(receiver.poll_group(), None, "time would go back to 40");
    offer(&mut receiver, &b.null(50)).unwrap();
    let plan = commit(&mut receiver);
    assert_eq!((plan.time, plan.joins.len()), (Timestamp(50), 1));
}

#[test]
fn sets_too_far_ahead_and_too_old_are_refused() {
    let mut chain = Chain::new(0);
    let mut receiver = receiver(&[true]);
    let count = limits::PENDING_SETS_MAX as u64;
    let sets: Vec<_> = (1..=2 * count + 1).map(|time| chain.writes(&[time])).collect();
    let number = |number: u64| &sets[number as usize - 1];
    assert!(matches!(offer(&mut receiver, number(count + 1)), Err(SetRefusal::TooFarAhead { .. })));
    let mut null = chain.null(1 << 40);
    null.header.number = SetNumber(count + 1);
    assert!(matches!(offer(&mut receiver, &null), Err(SetRefusal::TooFarAhead { .. })));
    assert_eq!(offer(&mut receiver, number(count)), Ok(Verdict::Append(A)));
    for at in (1..count).chain(count + 1..=2 * count) {
        take(&mut receiver, number(at));
        if at + 1 == count {
            receiver.handle_appended(A, SetNumber(count), SetLocation { segment: 1, offset: count }).unwrap();
        }
        commit(&mut receiver);
    }
    let old = (1..=2 * count)
        .filter(|at| matches!(offer(&mut receiver, number(*at)), Err(SetRefusal::TooOld { .. })));
    assert_eq!(old.count() as u64, 2 * count - limits::KNOWN_HASHES_MAX as u64);
    assert_eq!(receiver.base(A), Some((number(2 * count).point(), Timestamp(2 * count))));
}

/// A peer that sends large metadata of one volume, and nothing of the other, fills the bound and no more; and the
/// bound does not stop the one set that lets time go on.
#[test]
fn what_is_held_is_bounded_and_the_bound_never_stops_time() {
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    let mut receiver = receiver(&[true, true]);
    let large = |mut set: TestSet| {
        set.header.meta_len = limits::SET_META_BYTES_MAX as u32;
        set
    };
    let mut full = None;
    for time in 1..1000 {
        let set = large(a.writes(&[time]));
        match offer(&mut receiver, &set) {
            Ok(_) => receiver.handle_appended(A, set.header.number, at(time)).unwrap(),
            Err(refusal) => {
                assert_eq!(refusal, SetRefusal::Full);
                full = Some(set);
                break;
            }
        }
    }
    let full = full.expect("the bound is reached");
    assert!(receiver.held_bytes() <= limits::HELD_BYTES_MAX);
    let (second, third) = (large(b.writes(&[2000])), large(b.writes(&[3000])));
    assert_eq!(offer(&mut receiver, &third), Err(SetRefusal::Full), "it is not the next one");
    take(&mut receiver, &second);
    assert_eq!(offer(&mut receiver, &third), Err(SetRefusal::Full), "a group can be formed first");
    assert_eq!(offer(&mut receiver, &full), Err(SetRefusal::Full));
    commit(&mut receiver);
    assert_eq!(offer(&mut receiver, &full), Ok(Verdict::Append(A)));
}

#[test]
fn tokens_wait_for_their_updates() {
    let mut chain = Chain::new(0);
    let (first, second) = (chain.writes(&[10, 20]), chain.writes(&[30]));
    let token = |seq, time| Token::of(&update(0, Seq(seq), Change::write(time)));
    let mut receiver = receiver(&[true]);
    take(&mut receiver, &first);
    let all = vec![token(1, 10), token(2, 20), token(3, 30), token(3, 30), token(9, 90)];
    receiver.handle_tokens(&volume_name(0), all.clone()).unwrap();
    let bare = receiver.bare_tokens();
    assert_eq!((bare.count, bare.bytes, bare.not_held), (2, 200, 0));
    assert_eq!(receiver.bare_tokens_of(A).map(|token| token.stamp.seq.0).collect::<Vec<_>>(), [3, 9]);
    assert_eq!(receiver.token(A, Seq(2)), Some((&all[1], true)));
    assert_eq!(receiver.token(A, Seq(3)), Some((&all[2], false)));
    take(&mut receiver, &second);
    assert_eq!(receiver.bare_tokens().count, 1);
    commit(&mut receiver);
    assert_eq!((receiver.token(A, Seq(2)), receiver.token(A, Seq(3))), (None, None));
    receiver.handle_tokens(&volume_name(0), all).unwrap();
    assert_eq!((receiver.token(A, Seq(2)), receiver.bare_tokens().count), (None, 1));
    assert!(receiver.handle_tokens(&volume_name(4), Vec::new()).is_err());
}

#[test]
fn a_planned_promote_is_reached_when_everything_is_shown() {
    let mut chain = Chain::new(0);
    let set = chain.writes(&[10]);
    let mut receiver = receiver(&[true]);
    let last = |number| Ack { volume: A, number: SetNumber(number) };
    let ready = |end, finals| PromoteReady { end: Timestamp(end), finals };
    take(&mut receiver, &set);
    assert!(!receiver.has_reached(&ready(10, vec![last(1)])), "nothing is shown");
    commit(&mut receiver);
    assert!(receiver.has_reached(&ready(10, vec![last(1)])));
    assert!(!receiver.has_reached(&ready(11, vec![last(1)])), "its time is not reached");
    assert!(!receiver.has_reached(&ready(10, vec![last(2)])) && !receiver.has_reached(&ready(10, vec![])));
    let own = Epoch { number: 1, site: REPLICA };
    assert_eq!(receiver.promote(EPOCH), Err(PromoteError::Epoch(EPOCH)), "one's own epoch fences nobody");
    let higher = Epoch { number: 2, ..own };
    assert_eq!(receiver.promote(higher), Ok(()));
    assert_eq!((receiver.role(), receiver.paired()), (Role::Promoted, Some((SESSION, higher))));
    let next = chain.writes(&[20]);
    assert_eq!(offer(&mut receiver, &next), Err(SetRefusal::Fenced { known: higher, theirs: EPOCH }));
    assert_eq!(receiver.promote(Epoch { number: 3, ..own }), Err(PromoteError::NotReady(Role::Promoted)));
    let mut empty = Receiver::restore(state(&[false]), Ordering::ByStamp);
    assert_eq!(empty.promote(higher), Err(PromoteError::NotReady(Role::Replica)));
}

#[test]
fn a_restart_goes_on_within_a_set_and_misses_nothing() {
    let mut chain = Chain::new(0);
    let sets = [chain.writes(&[10]), chain.writes(&[20, 30, 40]), chain.writes(&[50]), chain.writes(&[60])];
    let mut durable = state(&[true]);
    (durable.group, durable.time) = (GroupNumber(7), Timestamp(30));
    durable.volumes[0].base = sets[0].point();
    durable.volumes[0].base_end = sets[0].header.end;
    durable.volumes[0].through = Seq(3);
    let restore = |which: &[usize]| {
        let mut receiver = Receiver::restore(durable.clone(), Ordering::ByStamp);
        for which in which {
            let set = &sets[*which];
            receiver.restore_set(&set.header, set.hash, set.meta.clone(), at(*which as u64)).unwrap();
        }
        receiver
    };
    // The fourth is beyond a gap, the first is older than the base.
    let mut receiver = restore(&[0, 1, 3]);
    receiver.check_restored().unwrap();
    assert_eq!(
        receiver.progress(),
        Progress { group: GroupNumber(7), time: Timestamp(30), applied: Timestamp::ZERO }
    );
    assert_eq!(receiver.view().volumes[0].durable, sets[1].point());
    let plan = commit(&mut receiver);
    assert_eq!((plan.number, plan.time), (GroupNumber(8), Timestamp(40)));
    assert_eq!((plan.volumes[0].sets[0].number, plan.volumes[0].sets[0].range.clone()), (SetNumber(2), 2..3));
    assert_eq!(offer(&mut receiver, &sets[3]), Ok(Verdict::Duplicate(A)));
    take(&mut receiver, &sets[2]);
    assert_eq!(commit(&mut receiver).volumes[0].sets.len(), 2);
    // A journal in which the sets of a committed group are missing is damaged.
    assert_eq!(restore(&[]).check_restored(), Err((volume_name(0), SetNumber(1))));
    // As is one that contradicts itself.
    let mut fork = Chain::new(0);
    fork.writes(&[10]);
    let other = fork.writes(&[20, 31, 40]);
    let mut receiver = restore(&[1]);
    assert!(receiver.restore_set(&other.header, other.hash, other.meta, at(9)).is_err());
}
