//! What two sites decide when they meet.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod session_common;

use std::sync::Arc;

use session_common::{
    Chain, EPOCH, PRIMARY, REPLICA, SESSION, TestSet, instance, root, sender_config, sender_volume,
    volume_name,
};
use twinfs_core::delta::SetLocation;
use twinfs_core::id::{Epoch, SessionId, SetHash, SetNumber, VolumeIndex, VolumeInstance};
use twinfs_core::session::handshake::ResumeError;
use twinfs_core::session::receiver::{Ordering, Receiver, ReceiverState};
use twinfs_core::session::sender::{Sender, SenderVolume};
use twinfs_core::session::{ChainPoint, Role, SessionState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::{Hello, PROTOCOL, RefuseCode, Welcome};

const NOW: Timestamp = Timestamp(1000);

type TestSender = Sender<Arc<TestSet>>;

/// A sender of one volume that has issued these sets, of which the first `acked` are acknowledged.
fn sender(sets: &[TestSet], acked: usize) -> TestSender {
    let mut volume: SenderVolume<_> = sender_volume(0);
    volume.acked = acked.checked_sub(1).map_or(ChainPoint::START, |last| sets[last].point());
    volume.issued = sets[acked..].iter().map(|set| set.clone().issued(10)).collect();
    Sender::new(sender_config(), vec![volume], NOW)
}

fn sets(count: u64) -> Vec<TestSet> {
    let mut chain = Chain::new(0);
    (1..=count).map(|at| chain.writes(&[10 * at, 10 * at + 1])).collect()
}

fn hello() -> Hello {
    sender(&[], 0).hello()
}

/// A replica that was welcomed and has these sets durable.
fn replica(sets: &[&TestSet]) -> Receiver {
    let mut receiver = Receiver::restore(ReceiverState::UNPAIRED, Ordering::ByStamp);
    let adoption = receiver.handle_hello(&hello()).unwrap();
    assert!(adoption.changes);
    receiver.handle_connected(&adoption);
    for set in sets {
        receiver.handle_set(&set.header, set.hash, set.meta.clone()).unwrap();
        let at = SetLocation { segment: 0, offset: set.header.number.0 };
        receiver.handle_appended(VolumeIndex(0), set.header.number, at).unwrap();
        receiver.handle_durable(VolumeIndex(0), set.header.number).unwrap();
    }
    receiver
}

fn welcome(receiver: &mut Receiver, sender: &TestSender) -> Welcome {
    let adoption = receiver.handle_hello(&sender.hello()).unwrap();
    assert!(!adoption.changes);
    receiver.handle_connected(&adoption)
}

fn transmitted(sender: &mut TestSender) -> Vec<u64> {
    std::iter::from_fn(|| sender.poll_transmit().map(|(_, set)| set.number.0)).collect()
}

#[test]
fn exactly_what_the_replica_lacks_is_sent_again() {
    let sets = sets(6);
    let mut receiver = replica(&[&sets[0], &sets[1], &sets[3], &sets[5]]);
    for acked in 0..=2 {
        let mut sender = sender(&sets, acked);
        let welcome = welcome(&mut receiver, &sender);
        assert_eq!(welcome.volumes[0].durable, sets[1].point());
        assert_eq!(welcome.volumes[0].beyond, [SetNumber(4), SetNumber(6)]);
        sender.handle_welcome(NOW, &welcome).unwrap();
        assert_eq!(transmitted(&mut sender), [3, 5]);
        let released =
            sender.poll_released().map(|released| (released.point.number, released.point.last_seq));
        assert_eq!(released, (acked < 2).then_some((SetNumber(2), Seq(4))));
    }
}

#[test]
fn what_is_only_appended_is_not_claimed() {
    let sets = sets(2);
    let mut receiver = replica(&[&sets[0]]);
    receiver.handle_set(&sets[1].header, sets[1].hash, sets[1].meta.clone()).unwrap();
    receiver.handle_appended(VolumeIndex(0), SetNumber(2), SetLocation { segment: 0, offset: 9 }).unwrap();
    let mut sender = sender(&sets, 0);
    sender.handle_welcome(NOW, &welcome(&mut receiver, &sender)).unwrap();
    assert_eq!(transmitted(&mut sender), [2]);
}

#[test]
fn a_known_number_with_another_hash_is_divergence() {
    let (ours, mut other) = (sets(3), Chain::new(0));
    let theirs = other.writes(&[10, 12]);
    // The replica sees it, if the primary holds it acknowledged …
    let refuse = replica(&[&theirs]).handle_hello(&sender(&ours, 1).hello()).unwrap_err();
    assert_eq!((refuse.code, refuse.epoch), (RefuseCode::Diverged, Some(EPOCH)));
    // … and the primary otherwise; then it stays so.
    let mut sender = sender(&ours, 0);
    let error = sender.handle_welcome(NOW, &welcome(&mut replica(&[&theirs]), &sender)).unwrap_err();
    assert_eq!(error, ResumeError::Diverged { volume: volume_name(0), number: SetNumber(1) });
    assert_eq!(sender.session_state(), SessionState::Diverged);
    assert!(!sender.is_connected() && !sender.can_issue(VolumeIndex(0)));
}

#[test]
fn sets_that_one_side_forgot_are_noticed() {
    let all = sets(4);
    // A primary that was reverted to before what the replica has.
    let mut sender_ = sender(&all[..2], 1);
    let error = sender_.handle_welcome(NOW, &welcome(&mut replica(&[&all[0], &all[1], &all[2]]), &sender_));
    let ahead = ResumeError::Ahead { volume: volume_name(0), durable: SetNumber(3), issued: SetNumber(2) };
    assert_eq!(error, Err(ahead));
    // One that was reverted, and the replica only has a later set beyond a gap.
    let mut sender_ = sender(&all[..2], 1);
    let error = sender_.handle_welcome(NOW, &welcome(&mut replica(&[&all[0], &all[3]]), &sender_));
    assert!(matches!(error, Err(ResumeError::Ahead { durable: SetNumber(4), .. })));
    // A replica that lost what it had acknowledged: it says so itself, paired or not.
    for mut receiver in [replica(&[&all[0]]), Receiver::restore(ReceiverState::UNPAIRED, Ordering::ByStamp)] {
        let refuse = receiver.handle_hello(&sender(&all, 2).hello()).unwrap_err();
        assert_eq!(refuse.code, RefuseCode::Lost);
        receiver.handle_disconnected();
    }
    // And so does the primary, should the replica not notice.
    let mut sender_ = sender(&all, 2);
    let mut lying = welcome(&mut replica(&[&all[0], &all[1]]), &sender_);
    lying.volumes[0].durable = all[0].point();
    let lost = ResumeError::Lost { volume: volume_name(0), acked: SetNumber(2), durable: SetNumber(1) };
    assert_eq!(sender_.handle_welcome(NOW, &lying), Err(lost));
}

#[test]
fn epochs_fence() {
    let mut receiver = replica(&[]);
    let with_epoch = |number, site| Hello { epoch: Epoch { number, site }, ..hello() };
    for (number, site) in [(0, PRIMARY), (0, REPLICA), (1, REPLICA)] {
        let refuse = receiver.handle_hello(&with_epoch(number, site)).unwrap_err();
        assert_eq!((refuse.code, refuse.epoch), (RefuseCode::Fenced, Some(EPOCH)));
    }
    // A higher one is adopted, durably; then the old one is fenced.
    let adoption = receiver.handle_hello(&with_epoch(2, REPLICA)).unwrap();
    assert!(adoption.changes);
    receiver.handle_connected(&adoption);
    assert_eq!(receiver.handle_hello(&hello()).unwrap_err().code, RefuseCode::Fenced);
    // The old primary takes it from the refusal, and from a welcome.
    let higher = Epoch { number: 2, site: REPLICA };
    let mut old = sender(&[], 0);
    old.handle_refuse(&receiver.handle_hello(&hello()).unwrap_err());
    assert_eq!((old.role(), old.fenced_by()), (Role::Fenced, Some(higher)));
    let mut old = sender(&[], 0);
    let mut welcome = welcome(&mut replica(&[]), &old);
    welcome.epoch = higher;
    assert_eq!(old.handle_welcome(NOW, &welcome), Err(ResumeError::Fenced(higher)));
    assert_eq!(old.role(), Role::Fenced);
    // A refusal that only claims to fence does nothing of the kind.
    let mut same = sender(&[], 0);
    let claim = receiver.handle_hello(&with_epoch(1, PRIMARY)).unwrap_err();
    same.handle_refuse(&twinfs_core::wire::Refuse { epoch: Some(EPOCH), ..claim });
    assert_eq!(same.role(), Role::Primary);
}

#[test]
fn a_replica_is_paired_with_one_session_and_its_volumes() {
    let receiver = replica(&[]);
    let refused = |hello: Hello| receiver.handle_hello(&hello).map_err(|refuse| refuse.code).unwrap_err();
    assert_eq!(refused(Hello { protocol: PROTOCOL + 1, ..hello() }), RefuseCode::Version);
    assert_eq!(
        refused(Hello { session: SessionId::from_bytes([8; 16]), ..hello() }),
        RefuseCode::UnknownSession
    );
    assert_eq!(refused(Hello { volumes: Vec::new(), ..hello() }), RefuseCode::VolumeMissing);
    let mut other_tree = hello();
    other_tree.volumes[0].instance = VolumeInstance::new(5).unwrap();
    assert_eq!(refused(other_tree), RefuseCode::Diverged);
    let mut other_root = hello();
    other_root.volumes[0].root.ino += 1;
    assert_eq!(refused(other_root), RefuseCode::Diverged);
    let mut many = hello();
    for at in 1..=256 {
        let mut volume = many.volumes[0].clone();
        (volume.name, volume.instance, volume.root) = (volume_name(at), instance(at), root(at));
        many.volumes.push(volume);
    }
    assert_eq!(refused(many.clone()), RefuseCode::TooManyVolumes);
    many.volumes.pop();
    assert_eq!(receiver.handle_hello(&many).unwrap().volumes.len(), 255);
    // The primary wants its volumes, all of them and no others, from a replica.
    let mut sender = sender(&[], 0);
    let good = welcome(&mut replica(&[]), &sender);
    let not_replica = Welcome { role: Role::Promoted, ..good.clone() };
    assert_eq!(sender.handle_welcome(NOW, &not_replica), Err(ResumeError::NotReplica(Role::Promoted)));
    let none = Welcome { volumes: Vec::new(), ..good.clone() };
    assert_eq!(sender.handle_welcome(NOW, &none), Err(ResumeError::Volumes(volume_name(0))));
    let mut more = good.clone();
    more.volumes.push(more.volumes[0].clone());
    more.volumes[1].name = volume_name(1);
    assert_eq!(sender.handle_welcome(NOW, &more), Err(ResumeError::Volumes(volume_name(1))));
    assert_eq!(sender.handle_welcome(NOW, &good), Ok(()));
}

#[test]
fn a_hello_that_skips_sets_is_refused() {
    let sets = sets(3);
    let receiver = replica(&[&sets[0]]);
    let mut skipping = sender(&sets, 0).hello();
    skipping.volumes[0].oldest = SetNumber(2);
    assert!(receiver.handle_hello(&skipping).is_ok());
    skipping.volumes[0].oldest = SetNumber(3);
    assert_eq!(receiver.handle_hello(&skipping).unwrap_err().code, RefuseCode::Lost);
    let mut forged = sender(&sets, 1).hello();
    forged.volumes[0].acked.hash = SetHash([9; 32]);
    assert_eq!(receiver.handle_hello(&forged).unwrap_err().code, RefuseCode::Diverged);
    assert_eq!(receiver.paired(), Some((SESSION, EPOCH)));
}
