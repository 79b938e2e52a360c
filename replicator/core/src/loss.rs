//! The loss report: what a promote without the primary gives up, and from when on nobody knows.
//!
//! A replica knows more than it shows: updates that came but cannot be ordered, because something before them is missing,
//! and write tokens of updates that never came. What is listed here is exactly that. Besides, there is an instant, and
//! every update stamped at or before it is in the last group or listed. It is found like this:
//!
//! * The sequence numbers of a volume are dense. Known numbers that follow the last one of the last group without a gap
//!   leave no room for anything unknown: up to the stamp of the last of them, everything is known.
//! * Headers of record sets, and null sets, say for an instant which number was the last one up to it. If that number is
//!   in the run without a gap, everything up to the instant is known, though nothing may have happened.
//! * After a gap nothing of that is of use: what is missing was stamped between its neighbours, nobody knows where. Such
//!   gaps are listed with the number of updates that are in them.
//!
//! Over a session it is the earliest of these instants of all member volumes.
//!
//! Names in updates and tokens are followed in the order of their stamps, so that each update gets the path that its file
//! had when it happened ([`Paths`]).

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use crate::delta::SetLocation;
use crate::id::{FileId, SetNumber, VolumeIndex, VolumeName};
use crate::limits;
use crate::record_set::SetMeta;
use crate::stamp::{Seq, Stamp, Timestamp};
use crate::token::Token;
use crate::update::{Op, OpKind, Update};

/// What a replica knows of a volume beyond what it shows:
/// [`Receiver::knowledge`](crate::session::receiver::Receiver::knowledge).
#[derive(Debug)]
pub struct VolumeKnowledge<'a> {
    /// Its name.
    pub name: &'a VolumeName,
    /// Its root directory.
    pub root: FileId,
    /// Whether it shows. The others were never whole, so nothing is lost of them.
    pub member: bool,
    /// Sequence number of the last update in a committed group.
    pub through: Seq,
    /// The sets of which some updates are in no committed group, in the order of the chain.
    pub sets: Vec<KnownSet<'a>>,
    /// Tokens of updates after `through`, in their order, whether their data is here or not.
    pub tokens: Vec<&'a Token>,
    /// Tokens that came when there was no room for them.
    pub tokens_not_held: u64,
    /// Each says that every update stamped at or before the instant has this sequence number or a lower one.
    pub bounds: Vec<(Seq, Timestamp)>,
}

/// A record set that is at hand.
#[derive(Debug, Clone, Copy)]
pub struct KnownSet<'a> {
    /// Its number.
    pub number: SetNumber,
    /// What is in it.
    pub meta: &'a SetMeta,
    /// How many of its updates, from the first on, are in committed groups.
    pub grouped: usize,
    /// Where it stands in the journal, if it does.
    pub at: Option<SetLocation>,
}

/// An update that is known and not in the last group.
#[derive(Debug, Clone, Copy)]
pub struct LostUpdate<'a> {
    /// Its volume.
    pub volume: VolumeIndex,
    /// Its stamp.
    pub stamp: Stamp,
    /// What is known of it.
    pub known: Known<'a>,
}

/// How an update is known.
#[derive(Debug, Clone, Copy)]
pub enum Known<'a> {
    /// Its record set came: the data is held.
    Data(&'a Update, SetNumber),
    /// Only its token came.
    Token(&'a Token),
}

impl<'a> LostUpdate<'a> {
    const fn is_resync(&self) -> bool {
        match self.known {
            Known::Data(update, _) => matches!(update.op, Op::Resync),
            Known::Token(token) => matches!(token.op, OpKind::Resync),
        }
    }

    /// The address that it wrote.
    #[must_use]
    pub fn token(&self) -> Cow<'a, Token> {
        match self.known {
            Known::Data(update, _) => Cow::Owned(Token::of(update)),
            Known::Token(token) => Cow::Borrowed(token),
        }
    }

    /// The record set that holds its data; `None` if only its token came.
    #[must_use]
    pub const fn set(&self) -> Option<SetNumber> {
        match self.known {
            Known::Data(_, set) => Some(set),
            Known::Token(_) => None,
        }
    }

    /// Bytes that it wrote.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self.known {
            Known::Data(update, _) => u64::from(update.op.data_len()),
            Known::Token(token) if token.op == OpKind::Write => token.range.1,
            Known::Token(_) => 0,
        }
    }
}

/// Updates that are only known to exist, because the numbers around them are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The volume.
    pub volume: VolumeIndex,
    /// Sequence number of the first.
    pub first: Seq,
    /// Sequence number of the last.
    pub last: Seq,
    /// They were stamped after this instant …
    pub after: Timestamp,
    /// … and before this one.
    pub before: Timestamp,
}

impl Gap {
    /// How many updates that are.
    #[must_use]
    pub const fn updates(&self) -> u64 {
        self.last.0 - self.first.0 + 1
    }
}

/// The numbers of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeLoss {
    /// The volume.
    pub volume: VolumeIndex,
    /// Updates that are known and lost.
    pub updates: u64,
    /// Those of them of which the data is held.
    pub held: u64,
    /// Bytes that the known ones wrote.
    pub bytes: u64,
    /// Updates that are only known to exist.
    pub missing: u64,
    /// Everything of the volume up to here is in the last group or listed.
    pub unknown_after: Timestamp,
}

/// What is lost of the member volumes.
#[derive(Debug, Clone)]
pub struct Loss<'a> {
    /// Every update stamped at or before this instant is in the last group or in `updates`.
    pub unknown_after: Timestamp,
    /// The known ones, in the order of their stamps.
    pub updates: Vec<LostUpdate<'a>>,
    /// What is missing between them.
    pub gaps: Vec<Gap>,
    /// For each member volume its numbers, in the order of their indices.
    pub volumes: Vec<VolumeLoss>,
}

impl<'a> Loss<'a> {
    /// Works out what is lost. `shown` is the consistency time.
    ///
    /// Takes memory for each known update, of which the receiver holds no more than its bounds allow.
    #[must_use]
    pub fn of(shown: Timestamp, volumes: &[VolumeKnowledge<'a>]) -> Self {
        let mut loss =
            Self { unknown_after: shown, updates: Vec::new(), gaps: Vec::new(), volumes: Vec::new() };
        for (index, volume) in (0..).map(VolumeIndex).zip(volumes).filter(|(_, volume)| volume.member) {
            let from = loss.updates.len();
            loss.updates.extend(known(index, volume));
            let known = &loss.updates[from..];
            let unknown_after = complete_until(volume, known);
            let gaps = gaps(volume, known, index);
            loss.volumes.push(VolumeLoss {
                volume: index,
                updates: known.len() as u64,
                held: known.iter().filter(|update| update.set().is_some()).count() as u64,
                bytes: known.iter().fold(0, |sum: u64, update| sum.saturating_add(update.bytes())),
                missing: gaps.iter().fold(0, |sum: u64, gap| sum.saturating_add(gap.updates())),
                unknown_after,
            });
            loss.gaps.extend(gaps);
        }
        if let Some(earliest) = loss.volumes.iter().map(|volume| volume.unknown_after).min() {
            loss.unknown_after = earliest.max(shown);
        }
        loss.updates.sort_by_key(|update| update.stamp);
        loss
    }

    /// The files that the updates of a volume mention: those whose paths are worth looking for.
    #[must_use]
    pub fn files(&self, volume: VolumeIndex) -> HashSet<FileId> {
        let own = self.updates.iter().filter(|update| update.volume == volume);
        let files = own.flat_map(|update| match update.known {
            Known::Data(update, _) => update.op.files(),
            Known::Token(token) => token.files(),
        });
        files.flatten().collect()
    }
}

/// The known updates of a volume in their order: those that came, and between them the tokens of those that did not.
fn known<'a>(index: VolumeIndex, volume: &VolumeKnowledge<'a>) -> Vec<LostUpdate<'a>> {
    let mut all = Vec::new();
    let mut tokens = volume.tokens.iter().copied().peekable();
    let bare =
        |token: &'a Token| LostUpdate { volume: index, stamp: token.stamp, known: Known::Token(token) };
    for set in &volume.sets {
        for (update, _) in &set.meta.updates[set.grouped..] {
            while let Some(token) = tokens.next_if(|token| token.stamp.seq < update.stamp.seq) {
                all.push(bare(token));
            }
            // Its own token says nothing more.
            tokens.next_if(|token| token.stamp.seq == update.stamp.seq);
            let known = Known::Data(update, set.number);
            all.push(LostUpdate { volume: index, stamp: update.stamp, known });
        }
    }
    all.extend(tokens.map(bare));
    all
}

/// The latest instant for which it is certain that everything of the volume up to it is grouped or in `known`.
fn complete_until(volume: &VolumeKnowledge<'_>, known: &[LostUpdate<'_>]) -> Timestamp {
    let expected = (volume.through.next().0..).map(Seq);
    // Before a resync, updates were dropped that have no number: they only come, as one, with its end.
    let follows = |(update, seq): &(&LostUpdate<'_>, Seq)| update.stamp.seq == *seq && !update.is_resync();
    let run = known.iter().zip(expected).take_while(follows).last();
    let (last, time) =
        run.map_or((volume.through, Timestamp::ZERO), |(update, seq)| (seq, update.stamp.time));
    let proven = volume.bounds.iter().filter(|(seq, _)| *seq <= last).map(|(_, until)| *until);
    proven.fold(time, Timestamp::max)
}

fn gaps(volume: &VolumeKnowledge<'_>, known: &[LostUpdate<'_>], index: VolumeIndex) -> Vec<Gap> {
    let mut bounds = volume.bounds.clone();
    bounds.sort_unstable();
    let mut bounds = bounds.into_iter().peekable();
    let mut gaps = Vec::new();
    let (mut seq, mut after) = (volume.through, Timestamp::ZERO);
    for LostUpdate { stamp, .. } in known {
        while let Some((_, until)) = bounds.next_if(|(last, _)| *last <= seq) {
            after = after.max(until);
        }
        if stamp.seq > seq.next() {
            let (first, last) = (seq.next(), Seq(stamp.seq.0 - 1));
            gaps.push(Gap { volume: index, first, last, after, before: stamp.time });
        }
        (seq, after) = (stamp.seq, after.max(stamp.time));
    }
    gaps
}

/// Finds the path of each update's file as of its stamp. Feed it the updates in the order of their stamps.
#[derive(Debug, Clone, Default)]
pub struct Paths<'a> {
    /// Where files stand in the last group; of a root, the empty path.
    shown: HashMap<FileId, Box<[u8]>>,
    /// Where the primary saw files when it made a set.
    hints: HashMap<FileId, &'a [u8]>,
    /// The names that updates gave.
    named: HashMap<FileId, (FileId, Box<[u8]>)>,
}

impl<'a> Paths<'a> {
    /// Starts with where files stand in the last group, below the root of their volume; and with the hints in the sets
    /// that are held.
    #[must_use]
    pub fn new(shown: HashMap<FileId, Box<[u8]>>, volumes: &[VolumeKnowledge<'a>]) -> Self {
        let mut paths = Self { shown, ..Self::default() };
        for volume in volumes {
            paths.shown.insert(volume.root, Box::default());
            let files = volume.sets.iter().flat_map(|set| &set.meta.files);
            // The newest hint counts.
            paths
                .hints
                .extend(files.filter(|hint| !hint.path.is_empty()).map(|hint| (hint.file, &*hint.path)));
        }
        paths
    }

    /// What a token is about, below the volume's root: the file, or the name that it changed; and for a rename what the
    /// name became. `None` where a name is not known. Then follows the names that it gave.
    pub fn follow(&mut self, token: &Token) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
        let is_name = !token.name.is_empty() && !matches!(token.op, OpKind::SetXattr | OpKind::RemoveXattr);
        let path = match token.file {
            Some(dir) if is_name => self.name_in(dir, &token.name),
            Some(file) => self.of(file),
            None => None,
        };
        let to = token.to.as_ref().and_then(|to| self.name_in(to.dir, &to.name));
        match (token.op, token.file, token.child, &token.to) {
            (OpKind::Create | OpKind::Link | OpKind::Bind, Some(dir), Some(child), _) => {
                self.named.insert(child, (dir, token.name.clone()));
            }
            (OpKind::Rename | OpKind::Exchange, Some(dir), Some(child), Some(to)) => {
                self.named.insert(child, (to.dir, to.name.clone()));
                if let Some(other) = to.other {
                    self.named.insert(other, (dir, token.name.clone()));
                }
            }
            _ => {}
        }
        (path, to)
    }

    fn name_in(&self, dir: FileId, name: &[u8]) -> Option<Vec<u8>> {
        let mut path = self.of(dir)?;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Some(path)
    }

    fn of(&self, file: FileId) -> Option<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = file;
        let mut bytes = 0;
        // Names from a peer may lead in a circle.
        while let Some((dir, name)) = self.named.get(&at) {
            names.push(&**name);
            bytes += name.len() + 1;
            if bytes > limits::PATH_HINT_BYTES_MAX {
                return None;
            }
            at = *dir;
        }
        let start = self.shown.get(&at).map(|path| &**path).or_else(|| self.hints.get(&at).copied())?;
        let parts = std::iter::once(start).filter(|start| !start.is_empty()).chain(names.into_iter().rev());
        Some(parts.collect::<Vec<_>>().join(&b'/'))
    }
}
