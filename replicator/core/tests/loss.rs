//! The loss report against a naive model: the true history is known, and of what was made of it some came, in any order.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod session_common;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use session_common::{
    Chain, Change, EPOCH, Rng, SESSION, TestSet, for_seeds, instance, root, update, volume_name,
};
use twinfs_core::delta::SetLocation;
use twinfs_core::id::{FileId, GroupNumber, VolumeIndex};
use twinfs_core::loss::{Gap, Known, Loss, Paths, VolumeKnowledge};
use twinfs_core::record_set::PathHint;
use twinfs_core::session::receiver::{Ordering, Receiver, ReceiverState, ReceiverVolume, Verdict};
use twinfs_core::session::{ChainPoint, Role};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::token::Token;
use twinfs_core::update::{AttrList, Op, Update, sample_file};

const A: VolumeIndex = VolumeIndex(0);

fn receiver(members: &[bool]) -> Receiver {
    let volumes = members.iter().enumerate().map(|(index, member)| ReceiverVolume {
        name: volume_name(index),
        instance: instance(index),
        root: root(index),
        member: *member,
        base: ChainPoint::START,
        base_end: Timestamp::ZERO,
        through: Seq::ZERO,
    });
    let state = ReceiverState {
        paired: Some((SESSION, EPOCH)),
        role: Role::Replica,
        group: GroupNumber(0),
        time: Timestamp::ZERO,
        volumes: volumes.collect(),
    };
    Receiver::restore(state, Ordering::ByStamp)
}

fn take(receiver: &mut Receiver, set: &TestSet) {
    let number = set.header.number;
    if let Verdict::Append(index) = receiver.handle_set(&set.header, set.hash, set.meta.clone()).unwrap() {
        let at = SetLocation { segment: 1, offset: number.0 };
        receiver.handle_appended(index, number, at).unwrap();
        receiver.handle_durable(index, number).unwrap();
    }
}

fn token(volume: usize, seq: u64, time: u64) -> Token {
    Token::of(&update(volume, Seq(seq), Change::write(time)))
}

/// What the primary did, and what it made of it.
struct World {
    /// Of each volume the times of its updates; the sequence number is one more than the place.
    history: Vec<Vec<u64>>,
    sent: Vec<Parcel>,
}

enum Parcel {
    Set(usize, Box<TestSet>),
    Tokens(usize, Vec<(u64, u64)>),
}

fn world(rng: &mut Rng) -> World {
    let volumes = rng.within(1, 3) as usize;
    let mut world = World { history: vec![Vec::new(); volumes], sent: Vec::new() };
    let mut chains: Vec<Chain> = (0..volumes).map(Chain::new).collect();
    let mut time = 1;
    for _ in 0..rng.within(1, 20) {
        let mut cut = vec![Vec::new(); volumes];
        for _ in 0..rng.below(12) {
            let volume = rng.below(volumes as u64) as usize;
            time += rng.within(1, 4);
            cut[volume].push(time);
            world.history[volume].push(time);
        }
        time += rng.below(4);
        for (volume, times) in cut.into_iter().enumerate() {
            let first = world.history[volume].len() - times.len() + 1;
            let addresses: Vec<_> = (first as u64..).zip(times.iter().copied()).collect();
            for batch in addresses.chunks(rng.within(1, 6) as usize) {
                world.sent.push(Parcel::Tokens(volume, batch.to_vec()));
            }
            let mut rest = &times[..];
            if rest.is_empty() {
                world.sent.push(Parcel::Set(volume, Box::new(chains[volume].null(time))));
            }
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rng.within(1, rest.len() as u64) as usize);
                let end = if later.is_empty() { time } else { now[now.len() - 1] };
                let changes: Vec<_> = now.iter().map(|time| Change::write(*time)).collect();
                world.sent.push(Parcel::Set(volume, Box::new(chains[volume].set(&changes, end))));
                rest = later;
            }
        }
    }
    world
}

/// What came of the updates of a volume, kept beside the receiver in the simplest way.
#[derive(Default, Clone)]
struct Came {
    grouped: u64,
    data: BTreeSet<u64>,
    tokens: BTreeSet<u64>,
    /// What sets, and what null sets, say of an instant: the last number up to it.
    said_by_sets: Vec<(u64, u64)>,
    said_by_nulls: Vec<(u64, u64)>,
}

impl Came {
    fn is_known(&self, seq: u64) -> bool {
        seq <= self.grouped || self.data.contains(&seq) || self.tokens.contains(&seq)
    }

    /// The latest instant for which something that came proves that nothing is missing up to it.
    fn proven(&self, history: &[u64], with_nulls: bool) -> u64 {
        let known = (1..=history.len() as u64).filter(|seq| self.is_known(*seq));
        let own = known.map(|seq| (seq, history[seq as usize - 1]));
        let nulls = self.said_by_nulls.iter().copied().filter(|_| with_nulls);
        let claims = own.chain(self.said_by_sets.iter().copied()).chain(nulls);
        let held = claims.filter(|(last, _)| (1..=*last).all(|seq| self.is_known(seq)));
        held.map(|(_, until)| until).max().unwrap_or(0)
    }
}

fn deliver(receiver: &mut Receiver, came: &mut [Came], parcel: &Parcel) {
    match parcel {
        Parcel::Tokens(volume, batch) => {
            let tokens = batch.iter().map(|(seq, time)| token(*volume, *seq, *time)).collect();
            receiver.handle_tokens(&volume_name(*volume), tokens).unwrap();
            came[*volume].tokens.extend(batch.iter().map(|(seq, _)| *seq));
        }
        Parcel::Set(volume, set) => {
            let (header, came) = (&set.header, &mut came[*volume]);
            let claims = [(header.first_seq.0 - 1, header.start.0), (header.last_seq().0, header.end.0)];
            if header.is_null() {
                receiver.handle_set(header, set.hash, set.meta.clone()).unwrap();
                came.said_by_nulls.extend(claims);
            } else {
                take(receiver, set);
                came.data.extend(header.first_seq.0..=header.last_seq().0);
                came.said_by_sets.extend(claims);
            }
        }
    }
}

fn check(world: &World, came: &[Came], receiver: &Receiver) -> Result<(), String> {
    let shown = receiver.progress().time;
    let knowledge: Vec<_> = receiver.knowledge().collect();
    let loss = Loss::of(shown, &knowledge);
    if !loss.updates.is_sorted_by_key(|update| update.stamp) {
        return Err("not in the order of stamps".into());
    }
    let mut listed: Vec<BTreeMap<u64, (u64, bool)>> = vec![BTreeMap::new(); came.len()];
    for lost in &loss.updates {
        let at = lost.volume.as_usize();
        let own = token(at, lost.stamp.seq.0, lost.stamp.time.0);
        if *lost.token() != own || lost.bytes() != 100 {
            return Err(format!("{:?} is told as {:?}", own, lost.token()));
        }
        listed[at].insert(lost.stamp.seq.0, (lost.stamp.time.0, matches!(lost.known, Known::Data(..))));
    }
    for (at, (history, came)) in world.history.iter().zip(came).enumerate() {
        let expected: BTreeMap<u64, (u64, bool)> = (1..)
            .zip(history)
            .filter(|(seq, _)| *seq > came.grouped && came.is_known(*seq))
            .map(|(seq, time)| (seq, (*time, came.data.contains(&seq))))
            .collect();
        if listed[at] != expected {
            return Err(format!("volume {at}: listed {:?}, expected {expected:?}", listed[at]));
        }
        for (seq, time) in (1..).zip(history).filter(|(_, time)| **time <= loss.unknown_after.0) {
            if !came.is_known(seq) {
                return Err(format!(
                    "volume {at}: {seq} at {time} is not known, unknown after {:?}",
                    loss.unknown_after
                ));
            }
        }
        check_gaps(at, history, &expected, came, &loss)?;
    }
    let earliest = |with_nulls| {
        let volumes = world.history.iter().zip(came);
        volumes.map(|(history, came)| came.proven(history, with_nulls)).min().unwrap_or(0).max(shown.0)
    };
    // A receiver need not remember every null set; sets and tokens it must.
    if !(earliest(false)..=earliest(true)).contains(&loss.unknown_after.0) {
        let bounds = (earliest(false), earliest(true));
        return Err(format!("unknown after {:?}, which should be in {bounds:?}", loss.unknown_after));
    }
    Ok(())
}

fn check_gaps(
    at: usize,
    history: &[u64],
    known: &BTreeMap<u64, (u64, bool)>,
    came: &Came,
    loss: &Loss<'_>,
) -> Result<(), String> {
    let last = known.keys().max().copied().unwrap_or(0);
    let missing: BTreeSet<u64> = (came.grouped + 1..last).filter(|seq| !came.is_known(*seq)).collect();
    let gaps = || loss.gaps.iter().filter(|gap| gap.volume.as_usize() == at);
    let told: BTreeSet<u64> = gaps().flat_map(|gap| gap.first.0..=gap.last.0).collect();
    let volume = loss.volumes.iter().find(|volume| volume.volume.as_usize() == at).unwrap();
    if told != missing || volume.missing != missing.len() as u64 {
        return Err(format!("volume {at}: gaps {told:?}, missing {missing:?}"));
    }
    for gap in gaps() {
        for seq in gap.first.0..=gap.last.0 {
            let time = history[seq as usize - 1];
            if time <= gap.after.0 || time >= gap.before.0 {
                return Err(format!("volume {at}: {seq} at {time} is not within {gap:?}"));
            }
        }
    }
    Ok(())
}

/// Some of what was sent comes, in a random order but roughly as it was sent; groups are formed in between, or not.
fn run(seed: u64) -> Result<(), String> {
    let mut rng = Rng(seed);
    let world = world(&mut rng);
    let mut receiver = receiver(&vec![true; world.history.len()]);
    let mut came = vec![Came::default(); world.history.len()];
    let (sets, tokens) = (rng.within(0, 100), rng.within(0, 100));
    let reach = rng.within(1, 20);
    let mut order: Vec<_> = (0..world.sent.len() as u64).map(|at| (at + rng.below(reach), at)).collect();
    order.sort_unstable();
    for (_, at) in order {
        let parcel = &world.sent[at as usize];
        let percent = if matches!(parcel, Parcel::Set(..)) { sets } else { tokens };
        if rng.chance(percent) {
            deliver(&mut receiver, &mut came, parcel);
        }
        if rng.chance(30)
            && let Some(plan) = receiver.poll_group()
        {
            receiver.handle_committed(plan.number).unwrap();
            for volume in &plan.volumes {
                came[volume.volume.as_usize()].grouped = volume.through.0;
            }
        }
        if rng.chance(20) {
            check(&world, &came, &receiver)?;
        }
    }
    check(&world, &came, &receiver)
}

#[test]
fn every_update_is_shown_or_listed_or_after_the_unknown_instant() {
    for_seeds("loss", "every_update_is_shown_or_listed_or_after_the_unknown_instant", 800, run);
}

#[test]
fn a_gap_ends_what_is_known_and_says_how_much_is_in_it() {
    let mut receiver = receiver(&[true]);
    let tokens = [(1, 10), (2, 20), (5, 50), (6, 60)].map(|(seq, time)| token(0, seq, time));
    receiver.handle_tokens(&volume_name(0), tokens.to_vec()).unwrap();
    let knowledge: Vec<_> = receiver.knowledge().collect();
    let loss = Loss::of(receiver.progress().time, &knowledge);
    assert_eq!(loss.unknown_after, Timestamp(20));
    let (after, before) = (Timestamp(20), Timestamp(50));
    assert_eq!(loss.gaps, [Gap { volume: A, first: Seq(3), last: Seq(4), after, before }]);
    let volume = loss.volumes[0];
    assert_eq!((volume.updates, volume.held, volume.bytes, volume.missing), (4, 0, 400, 2));
}

#[test]
fn a_volume_of_which_nothing_is_heard_holds_the_instant_back() {
    let mut receiver = receiver(&[true, true, false]);
    let (mut a, mut b) = (Chain::new(0), Chain::new(1));
    take(&mut receiver, &a.writes(&[10]));
    let null = b.null(12);
    receiver.handle_set(&null.header, null.hash, null.meta.clone()).unwrap();
    let plan = receiver.poll_group().unwrap();
    receiver.handle_committed(plan.number).unwrap();
    receiver.handle_tokens(&volume_name(0), vec![token(0, 2, 40)]).unwrap();
    let knowledge: Vec<_> = receiver.knowledge().collect();
    let loss = Loss::of(receiver.progress().time, &knowledge);
    let own: Vec<_> = loss.volumes.iter().map(|volume| volume.unknown_after.0).collect();
    // The third was never whole: it does not count.
    assert_eq!((loss.unknown_after.0, own), (12, vec![40, 12]));
}

fn name_token(seq: u64, op: Op) -> Token {
    let stamp = Stamp { time: Timestamp(seq), seq: Seq(seq) };
    Token::of(&Update { stamp, op, attrs: AttrList::new() })
}

#[test]
fn paths_follow_the_names_that_updates_give() {
    let (dir, file, other, hinted) = (sample_file(1), sample_file(2), sample_file(3), sample_file(4));
    let root = root(0);
    let mut set = Chain::new(0).writes(&[1]);
    set.meta.files = vec![PathHint { file: hinted, path: b"as/hinted"[..].into() }];
    let mut receiver = receiver(&[true]);
    take(&mut receiver, &set);
    let knowledge: Vec<VolumeKnowledge<'_>> = receiver.knowledge().collect();
    let shown = HashMap::from([(dir, Box::from(&b"dir"[..])), (other, Box::from(&b"other"[..]))]);
    let mut paths = Paths::new(shown, &knowledge);
    let mut follow = |op: Op| {
        let (path, to) = paths.follow(&name_token(1, op));
        let text = |path: Option<Vec<u8>>| path.map(|path| String::from_utf8(path).unwrap());
        (text(path), text(to))
    };
    let some = |text: &str| Some(text.to_owned());
    let name = |text: &str| Box::<[u8]>::from(text.as_bytes());
    let write = |file: FileId| Op::Write { file, offset: 0, len: 1 };
    assert_eq!(follow(write(hinted)), (some("as/hinted"), None));
    assert_eq!(follow(write(file)), (None, None), "nobody knows that file");
    let create = Op::Create { dir, name: name("new"), file, target: name("") };
    assert_eq!(follow(create), (some("dir/new"), None));
    assert_eq!(follow(write(file)), (some("dir/new"), None));
    let rename = |from, to, file| {
        let (from, to) = (name(from), name(to));
        Op::Rename { from_dir: dir, from, to_dir: root, to, file, replaced: None }
    };
    assert_eq!(follow(rename("new", "moved", file)), (some("dir/new"), some("moved")));
    assert_eq!(follow(write(file)), (some("moved"), None));
    let exchange = Op::Exchange {
        a_dir: root,
        a: name("moved"),
        a_file: file,
        b_dir: root,
        b: name("other"),
        b_file: other,
    };
    assert_eq!(follow(exchange), (some("moved"), some("other")));
    assert_eq!(follow(write(file)), (some("other"), None));
    assert_eq!(follow(write(other)), (some("moved"), None));
    // A circle, which no honest primary makes.
    follow(Op::Rename {
        from_dir: root,
        from: name("dir"),
        to_dir: file,
        to: name("x"),
        file: dir,
        replaced: None,
    });
    follow(Op::Rename { from_dir: root, from: name("f"), to_dir: dir, to: name("y"), file, replaced: None });
    assert_eq!(follow(write(file)), (None, None));
}
