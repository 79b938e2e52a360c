//! The primary's side: windows, acknowledgements, the rhythm of cuts, states.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod session_common;

use std::sync::Arc;

use session_common::{Change, EPOCH, REPLICA, TestSet, make_set, sender_config, sender_volume, volume_name};
use twinfs_core::id::{Epoch, GroupNumber, SetNumber, VolumeIndex};
use twinfs_core::limits;
use twinfs_core::session::sender::{Backlog, Released, Sender, SenderError};
use twinfs_core::session::{ChainPoint, Role, SessionState, SuspendReason, VolumeState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::{Ack, Progress, Refuse, RefuseCode, Text, Welcome, WelcomeVolume};

const A: VolumeIndex = VolumeIndex(0);
const B: VolumeIndex = VolumeIndex(1);
const START: Timestamp = Timestamp(1_000_000_000);

type TestSender = Sender<Arc<TestSet>>;

/// Two volumes, which the replica lists the other way round.
fn connected() -> TestSender {
    let mut sender = Sender::new(sender_config(), vec![sender_volume(0), sender_volume(1)], START);
    sender.handle_welcome(START, &welcome(Timestamp::ZERO)).unwrap();
    sender
}

fn welcome(time: Timestamp) -> Welcome {
    let volume = |index| WelcomeVolume {
        name: volume_name(index),
        member: false,
        durable: ChainPoint::START,
        beyond: Vec::new(),
    };
    Welcome {
        epoch: EPOCH,
        role: Role::Replica,
        group: GroupNumber(0),
        time,
        applied: Timestamp::ZERO,
        damage: None,
        volumes: vec![volume(1), volume(0)],
    }
}

fn issue(sender: &mut TestSender, volume: VolumeIndex, time: u64, bytes: u64) -> SetNumber {
    issue_change(sender, volume, Change::write(time), bytes)
}

fn issue_change(sender: &mut TestSender, volume: VolumeIndex, change: Change, bytes: u64) -> SetNumber {
    let link = sender.link(volume).unwrap();
    let set = make_set(volume.as_usize(), link, &[change], change.time).issued(bytes);
    let number = set.number;
    sender.handle_issued(volume, set).unwrap();
    number
}

/// An acknowledgement, with the replica's index of the volume.
fn ack(sender: &mut TestSender, volume: VolumeIndex, number: u64) -> Result<bool, SenderError> {
    sender.handle_ack(Ack { volume: VolumeIndex(1 - volume.0), number: SetNumber(number) })
}

fn after(ns: u64) -> Timestamp {
    Timestamp(START.0 + ns)
}

/// Volume, set and last update of what is released.
fn released(sender: &mut TestSender) -> Option<(VolumeIndex, u64, u64)> {
    let Released { volume, point, .. } = sender.poll_released()?;
    Some((volume, point.number.0, point.last_seq.0))
}

#[test]
fn acknowledgements_come_in_any_order() {
    let mut sender = connected();
    for time in [10, 20, 30] {
        issue(&mut sender, A, time, 100);
    }
    issue(&mut sender, B, 15, 1000);
    let sent: Vec<_> = std::iter::from_fn(|| sender.poll_transmit().map(|(v, s)| (v, s.number.0))).collect();
    assert_eq!(sent, [(A, 1), (A, 2), (A, 3), (B, 1)]);
    let behind = sender.behind();
    assert_eq!((behind.bytes, behind.records, behind.sets, behind.oldest), (1300, 4, 4, Some(Timestamp(10))));

    assert_eq!(ack(&mut sender, A, 3), Ok(true));
    assert_eq!(ack(&mut sender, A, 3), Ok(false));
    assert_eq!(sender.poll_released(), None, "there is a gap before it");
    assert_eq!(sender.in_flight_bytes(), 1300, "the window only moves over what has no gap before it");
    assert_eq!(ack(&mut sender, A, 1), Ok(true));
    assert_eq!(released(&mut sender), Some((A, 1, 1)));
    assert_eq!(sender.behind().oldest, Some(Timestamp(15)));
    assert_eq!(ack(&mut sender, A, 2), Ok(true));
    assert_eq!(released(&mut sender), Some((A, 3, 3)));
    assert_eq!(sender.in_flight_bytes(), 1000);
    assert_eq!(ack(&mut sender, B, 1), Ok(true));
    assert_eq!((sender.behind().sets, sender.in_flight_bytes()), (0, 0));

    // What was never made, or of no volume, is an offence.
    assert_eq!(ack(&mut sender, A, 4), Err(SenderError::NotIssued(SetNumber(4))));
    assert_eq!(ack(&mut sender, A, 0), Err(SenderError::NotIssued(SetNumber(0))));
    let stray = Ack { volume: VolumeIndex(2), number: SetNumber(1) };
    assert_eq!(sender.handle_ack(stray), Err(SenderError::Volume(VolumeIndex(2))));
    sender.handle_disconnected();
    assert_eq!(ack(&mut sender, A, 1), Err(SenderError::NotConnected));
}

#[test]
fn sets_are_chained_and_null_sets_repeat_the_last() {
    let mut sender = connected();
    let first = sender.link(A).unwrap();
    assert_eq!((first.number, first.first_seq, first.start), (SetNumber(1), Seq(1), Timestamp::ZERO));
    issue(&mut sender, A, 10, 1);
    let hash = sender.state().next().unwrap().issued[0].hash;
    let null = sender.null_link(A).unwrap();
    assert_eq!((null.number, null.predecessor, null.first_seq), (SetNumber(1), hash, Seq(2)));
    sender.handle_null_issued(A, Timestamp(50)).unwrap();
    let next = sender.link(A).unwrap();
    assert_eq!((next.number, next.predecessor, next.start), (SetNumber(2), hash, Timestamp(50)));
    let skipped = make_set(0, next, &[Change::write(60)], 60).issued(1);
    let skipped = twinfs_core::session::sender::IssuedSet { number: SetNumber(3), ..skipped };
    let refused = SenderError::NotNext { number: SetNumber(3), next: SetNumber(2) };
    assert_eq!(sender.handle_issued(A, skipped), Err(refused));
    assert_eq!(sender.link(VolumeIndex(2)), Err(SenderError::Volume(VolumeIndex(2))));
}

#[test]
fn the_window_is_bounded_over_all_volumes() {
    let mut sender = connected();
    issue(&mut sender, A, 1, 1);
    let mut time = 2;
    while sender.can_issue(B) {
        let number = issue(&mut sender, B, time, limits::SET_BYTES_MAX as u64);
        ack(&mut sender, B, number.0).unwrap();
        time += 1;
    }
    assert!(sender.in_flight_bytes() <= limits::IN_FLIGHT_BYTES_MAX as u64);
    assert!(!sender.can_issue(A), "the late set of the one volume holds the other back");
    ack(&mut sender, A, 1).unwrap();
    assert!(sender.can_issue(A) && sender.can_issue(B));
    assert_eq!(sender.in_flight_bytes(), 0);

    for _ in 0..limits::IN_FLIGHT_SETS_MAX {
        assert!(sender.can_issue(A));
        issue(&mut sender, A, time, 1);
        time += 1;
    }
    assert!(!sender.can_issue(A) && sender.can_issue(B), "the number of sets counts for each volume");
}

#[test]
fn a_clean_stop_keeps_what_is_not_acknowledged() {
    let mut sender = connected();
    for time in [10, 20, 30] {
        issue(&mut sender, A, time, 5);
    }
    sender.handle_null_issued(B, Timestamp(30)).unwrap();
    ack(&mut sender, A, 1).unwrap();
    ack(&mut sender, A, 3).unwrap();
    let volumes: Vec<_> = sender.state().collect();
    let again: TestSender = Sender::new(sender_config(), volumes.clone(), START);
    assert_eq!(again.state().collect::<Vec<_>>(), volumes);
    assert_eq!(again.link(A), sender.link(A));
    assert_eq!(again.link(B), sender.link(B));
    assert_eq!(volumes[0].issued.len(), 2);
}

#[test]
fn a_lone_write_is_cut_at_once_and_a_busy_pipe_waits_for_the_interval() {
    let mut sender = connected();
    let some = [Backlog::None, Backlog::Some];
    assert!(sender.is_cut_due(after(1), &some), "the pipe is idle");
    issue(&mut sender, B, after(1).0, 10);
    sender.handle_cut(after(1), false);
    assert!(!sender.is_cut_due(after(2), &some), "the pipe is busy");
    assert!(sender.is_cut_due(after(2), &[Backlog::Full, Backlog::None]), "a set is full");
    assert_eq!(sender.next_cut(&some), Some(after(1 + limits::INTERVAL_NS)));
    assert!(sender.is_cut_due(after(1 + limits::INTERVAL_NS), &some));
    ack(&mut sender, B, 1).unwrap();
    assert!(sender.is_cut_due(after(2), &some), "it is idle again");
    // A full volume without room must not cut for ever.
    for time in 0..limits::IN_FLIGHT_SETS_MAX as u64 {
        issue(&mut sender, A, after(100 + time).0, 10);
    }
    assert!(!sender.is_cut_due(after(3), &[Backlog::Full, Backlog::None]));
    sender.handle_disconnected();
    assert!(!sender.is_cut_due(after(u64::MAX / 2), &some));
    assert_eq!(sender.next_cut(&some), None);
}

#[test]
fn idle_null_sets_back_off() {
    let mut sender = connected();
    let none = [Backlog::None; 2];
    let (mut now, mut gaps) = (START, Vec::new());
    for _ in 0..6 {
        let due = sender.next_cut(&none).unwrap();
        assert!(!sender.is_cut_due(Timestamp(due.0 - 1), &none) && sender.is_cut_due(due, &none));
        gaps.push(due.ns_since(now) / 1_000_000);
        now = due;
        sender.handle_cut(now, true);
    }
    assert_eq!(gaps, [50, 100, 200, 400, 500, 500]);
    sender.handle_cut(now, false);
    assert_eq!(sender.next_cut(&none), Some(Timestamp(now.0 + limits::INTERVAL_NS)));
}

#[test]
fn a_volume_is_a_member_when_its_mark_is_durable_and_shown() {
    let mut sender = connected();
    let shows = |time| Progress { group: GroupNumber(time), time: Timestamp(time), applied: Timestamp::ZERO };
    assert_eq!(sender.session_state(), SessionState::Pending);
    sender.handle_copy_started(A).unwrap();
    sender.handle_copy_started(B).unwrap();
    assert_eq!(sender.session_state(), SessionState::Copy);
    issue_change(&mut sender, A, Change::complete(10), 1);
    sender.handle_progress(shows(10));
    assert_eq!(sender.volume_state(A), Some(VolumeState::Copy), "its mark is not acknowledged");
    ack(&mut sender, A, 1).unwrap();
    assert_eq!(sender.volume_state(A), Some(VolumeState::Duplex));
    assert_eq!(sender.session_state(), SessionState::Copy);
    issue_change(&mut sender, B, Change::complete(20), 1);
    ack(&mut sender, B, 1).unwrap();
    sender.handle_progress(shows(19));
    assert_eq!(sender.volume_state(B), Some(VolumeState::Copy), "the group with its mark is not shown");
    sender.handle_progress(shows(20));
    sender.handle_progress(shows(3));
    assert_eq!(sender.progress(), shows(20), "what comes late changes nothing");
    assert_eq!(sender.session_state(), SessionState::Duplex);
    sender.handle_copy_started(A).unwrap();
    assert_eq!(sender.volume_state(A), Some(VolumeState::Duplex), "a copy begins once");
}

#[test]
fn a_suspended_session_sends_nothing_and_remembers_what_it_let_go() {
    let mut sender = connected();
    sender.suspend(SuspendReason::Operator);
    sender.suspend(SuspendReason::Lag);
    assert_eq!(sender.session_state(), SessionState::Suspended(SuspendReason::Operator));
    assert!(!sender.can_issue(A) && !sender.is_cut_due(after(u64::MAX / 2), &[Backlog::Full; 2]));
    assert_eq!(sender.resume(), Ok(()));
    assert!(sender.can_issue(A));
    sender.suspend(SuspendReason::Link);
    sender.handle_let_go();
    assert!(sender.resume().is_err());
    assert_eq!(sender.session_state(), SessionState::Suspended(SuspendReason::Link));
    let mut sender = connected();
    sender.handle_refuse(&Refuse { code: RefuseCode::Failed, epoch: None, text: Text::new("full") });
    assert_eq!(sender.session_state(), SessionState::Suspended(SuspendReason::Journal));
}

#[test]
fn a_planned_promote_waits_for_every_acknowledgement() {
    let mut sender = connected();
    issue(&mut sender, A, 10, 1);
    assert_eq!(sender.promote_ready(Timestamp(30)), None);
    ack(&mut sender, A, 1).unwrap();
    let ready = sender.promote_ready(Timestamp(30)).unwrap();
    // In the replica's order.
    let last = |volume, number| Ack { volume: VolumeIndex(volume), number: SetNumber(number) };
    assert_eq!((ready.end, ready.finals), (Timestamp(30), vec![last(0, 0), last(1, 1)]));
    sender.handle_promoted(EPOCH);
    assert_eq!(sender.role(), Role::Primary, "its own epoch does not fence it");
    sender.handle_promoted(Epoch { number: 2, site: REPLICA });
    assert_eq!(sender.role(), Role::Fenced);
    assert!(!sender.can_issue(A));
}
