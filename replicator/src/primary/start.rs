//! How a run takes up what the one before it left: the order of its steps, without threads and files.
//!
//! 1. The sidefile is opened, or made: [`start_volumes`] is what the control file knows for it. How the last run ended
//!    follows from that: [`LastRun`].
//! 2. [`take_up`]: what was under way is found out, or what may differ is noted, before anything else changes a volume.
//! 3. [`sender_volume`] and [`sender`]: the session goes on from the newest that control file and sidefile know.

use bytes::Bytes;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{FileId, VolumeIndex};
use twinfs_core::session::sender::{IssuedSet, Sender, SenderConfig, SenderVolume};
use twinfs_core::session::{ChainPoint, SuspendReason};
use twinfs_core::stamp::Timestamp;

use super::clock::Reading;
use super::sidefile::{Capture, LeftIntent, StartVolume, SurvivingChain, Survivors};
use super::store;
use crate::site::{State, VolumeState};

/// How the run before this one ended.
#[derive(Debug)]
pub enum LastRun {
    /// It was stopped, or there was none.
    Clean(Option<Survivors>),
    /// Its process ended in some other way; the machine went on.
    Killed {
        /// What it left in the sidefile.
        survivors: Survivors,
        /// None of its stamps had reached this.
        mark: Timestamp,
    },
    /// The machine went down with it, and with what was in memory.
    Lost {
        /// None of its stamps had reached this.
        mark: Timestamp,
    },
}

impl LastRun {
    /// What it left in the sidefile, if there is one.
    #[must_use]
    pub const fn survivors(&self) -> Option<&Survivors> {
        match self {
            Self::Clean(survivors) => survivors.as_ref(),
            Self::Killed { survivors, .. } => Some(survivors),
            Self::Lost { .. } => None,
        }
    }

    /// If updates were lost, the instant that none of the run's stamps had reached.
    #[must_use]
    pub const fn lost_after(&self) -> Option<Timestamp> {
        match self {
            Self::Killed { survivors, mark } if survivors.dropped => Some(*mark),
            Self::Lost { mark } => Some(*mark),
            Self::Clean(_) | Self::Killed { .. } => None,
        }
    }

    /// If updates were lost, so that this run begins suspended, what status says of that.
    #[must_use]
    pub const fn why_suspended(&self) -> Option<&'static str> {
        match self {
            Self::Killed { survivors, .. } if survivors.dropped => {
                Some("the last run was killed while it was suspended: what changed is read again")
            }
            Self::Lost { .. } => Some("power failed: what may differ between the sites is read again"),
            Self::Clean(_) | Self::Killed { .. } => None,
        }
    }
}

/// Below which instant the timestamps of a run stay that begins with a durable mark of `mark`: the mark to make durable first.
///
/// Without a sidefile (`knows_last` is false) the clock goes on from the mark. A sidefile knows the last timestamp; then the mark
/// need not move for a run that may be killed at once, else a daemon that is started again and again drives it away from
/// real time.
#[must_use]
pub fn stamp_limit(mark: Timestamp, knows_last: bool, clocks: Reading) -> Timestamp {
    match knows_last {
        true => mark.max(store::mark_after(Timestamp::ZERO, clocks)),
        false => store::mark_after(mark, clocks),
    }
}

/// Why a run begins suspended, if it does. What the control file says of that was true when the run before began; since then
/// the sidefile knows better.
#[must_use]
pub fn suspension(state: &State, last_run: &LastRun) -> Option<SuspendReason> {
    match last_run {
        LastRun::Clean(_) => state.suspended,
        LastRun::Killed { survivors, .. } if !survivors.dropped => None,
        LastRun::Killed { .. } | LastRun::Lost { .. } => Some(SuspendReason::Link),
    }
}

/// Share of the sidefile in use above which there may be no room to tell what was under way.
const FULL: f64 = 0.5;

/// What the file system layer knows and does when a run begins.
pub trait Source {
    /// Why it cannot.
    type Error;

    /// Publishes what an operation may have changed that was under way when the process was killed.
    ///
    /// # Errors
    /// The source cannot be read: then it is not known whether the replica can be kept exact.
    fn recover(&self, left: &LeftIntent) -> Result<(), Self::Error>;

    /// What the names stand for now that an operation may have changed which was under way when the process was killed.
    ///
    /// # Errors
    /// As [`recover`](Self::recover).
    fn found(&self, left: &LeftIntent) -> Result<Vec<FileId>, Self::Error>;

    /// What may differ between the sites, by the activity log.
    fn logged_changes(&self, volume: VolumeIndex) -> ChangeMap;

    /// What a clean stop has kept of what the last run noted; `None` if it kept nothing.
    ///
    /// # Errors
    /// It cannot be read.
    fn kept_changes(&self, volume: VolumeIndex) -> Result<Option<ChangeMap>, Self::Error>;
}

/// Takes up what the last run left, before the volumes are served: suspends, with all that is known to be noted, if
/// `suspended` says so; else publishes what was under way. Returns whether the change maps name all that was dropped.
///
/// # Errors
/// Those of `source`.
pub fn take_up<S: Source>(
    capture: &Capture,
    last_run: &LastRun,
    suspended: Option<SuspendReason>,
    source: &S,
) -> Result<bool, S::Error> {
    let intents = || last_run.survivors().into_iter().flat_map(|survivors| &survivors.intents);
    let mut covered = false;
    if let Some(why) = suspended {
        covered = true;
        for index in (0..capture.last_seqs().len()).map(|at| VolumeIndex(at as u16)) {
            let map = match last_run {
                LastRun::Clean(_) => source.kept_changes(index)?,
                LastRun::Killed { .. } | LastRun::Lost { .. } => {
                    let mut map = source.logged_changes(index);
                    for left in intents().filter(|left| left.volume == index) {
                        note_left(&mut map, left);
                        // An object that was born with it stands in no log.
                        source.found(left)?.into_iter().for_each(|file| map.note_whole(file));
                    }
                    Some(map)
                }
            };
            match map {
                Some(map) => capture.merge_changes(index, map),
                None => covered = false,
            }
        }
        capture.suspend_again(why, covered);
    } else if capture.fullness() > FULL && intents().next().is_some() {
        // What is told of one operation must not be cut off in its middle: it is noted, and read again.
        for left in intents() {
            let mut map = ChangeMap::default();
            note_left(&mut map, left);
            source.found(left)?.into_iter().for_each(|file| map.note_whole(file));
            capture.merge_changes(left.volume, map);
        }
        capture.suspend_again(SuspendReason::Link, true);
        covered = true;
    } else {
        intents().try_for_each(|left| source.recover(left))?;
    }
    capture.settle_left();
    Ok(covered)
}

/// Notes what an operation may have changed of which nobody will look whether it did.
fn note_left(map: &mut ChangeMap, left: &LeftIntent) {
    let noted = left.note.into_iter().flat_map(|note| [note.first, note.second]).flatten();
    let named = left.intent().files().into_iter().flatten();
    named.chain(noted.map(|(file, _)| file)).for_each(|file| map.note_whole(file));
}

/// What the control file knows of each volume, for the sidefile; volumes of which it knows nothing come last.
#[must_use]
pub fn start_volumes(state: &State, count: usize) -> Vec<StartVolume> {
    let known = state.volumes.iter().map(|volume| StartVolume {
        last_seq: volume.last_seq,
        acked: acked_of(volume),
        end: volume.acked_end,
        complete: volume.complete,
    });
    let mut known: Vec<_> = known.collect();
    known.resize(count, StartVolume::NEW);
    known
}

fn acked_of(volume: &VolumeState) -> ChainPoint {
    ChainPoint { number: volume.acked_set, hash: volume.acked_hash, last_seq: volume.acked_seq }
}

/// What a session goes on from, of one volume: what the control file says, and the sets that a clean stop has kept; and
/// what the sidefile knows, which is newer if the last run was killed.
#[must_use]
pub fn sender_volume(
    state: &VolumeState,
    root: FileId,
    issued: Vec<IssuedSet<Bytes>>,
    chain: Option<&SurvivingChain>,
) -> SenderVolume<Bytes> {
    let mut volume = SenderVolume {
        name: state.name.clone(),
        instance: state.instance,
        root,
        state: state.state,
        complete: state.complete,
        acked: acked_of(state),
        acked_end: state.acked_end,
        end: state.end,
        issued,
        forgotten: Vec::new(),
    };
    if let Some(chain) = chain {
        if chain.acked.number > volume.acked.number {
            (volume.acked, volume.acked_end, volume.end) = (chain.acked, chain.end, chain.end);
        }
        volume.complete = volume.complete.or(chain.complete);
        volume.issued.retain(|set| set.number > volume.acked.number);
        let last = volume.issued.last().map_or(volume.acked.number, |set| set.number);
        volume.forgotten = chain.issued.iter().filter(|(point, _)| point.number > last).copied().collect();
    }
    volume
}

/// The session's state machine. `covered` is what [`take_up`] said.
#[must_use]
pub fn sender(
    config: SenderConfig,
    volumes: Vec<SenderVolume<Bytes>>,
    capture: &Capture,
    last_run: &LastRun,
    suspended: Option<SuspendReason>,
    covered: bool,
) -> Sender<Bytes> {
    let mut sender = Sender::new(config, volumes, capture.now());
    if let Some(mark) = last_run.lost_after() {
        sender.cover(mark);
    }
    // If a resync can make it good, what was captured before the suspension goes to the replica first.
    if let Some(reason) = suspended.filter(|reason| !(covered && is_passing(*reason))) {
        sender.handle_let_go();
        sender.suspend(reason);
    }
    sender
}

/// Whether a session goes on by itself when a replica is there again.
const fn is_passing(reason: SuspendReason) -> bool {
    match reason {
        SuspendReason::Link | SuspendReason::Lag | SuspendReason::Journal => true,
        SuspendReason::Operator | SuspendReason::Error => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::id::{Epoch, SiteId};
    use twinfs_core::session::Role;

    fn killed(dropped: bool) -> LastRun {
        let survivors = Survivors { volumes: Vec::new(), intents: Vec::new(), updates: 0, dropped };
        LastRun::Killed { survivors, mark: Timestamp(7) }
    }

    #[test]
    fn the_sidefile_knows_better_than_the_control_file_whether_something_was_dropped() {
        let mut state = State::new(Role::Primary, Epoch { number: 1, site: SiteId::from_bytes([1; 16]) });
        state.suspended = Some(SuspendReason::Lag);
        assert_eq!(suspension(&state, &LastRun::Clean(None)), Some(SuspendReason::Lag));
        // It began suspended, and went on since.
        assert_eq!(suspension(&state, &killed(false)), None);
        state.suspended = None;
        assert_eq!(suspension(&state, &killed(true)), Some(SuspendReason::Link));
        assert_eq!(suspension(&state, &LastRun::Lost { mark: Timestamp(7) }), Some(SuspendReason::Link));
        assert_eq!(killed(true).lost_after(), Some(Timestamp(7)));
        assert_eq!(killed(false).lost_after(), None);
    }

    #[test]
    fn the_mark_does_not_run_away_from_a_daemon_that_is_started_again_and_again() {
        let clocks = Reading { boot: 1, real: 1000 };
        let first = stamp_limit(Timestamp::ZERO, false, clocks);
        assert!(first.0 > 1000);
        assert_eq!((0..100).fold(first, |mark, _| stamp_limit(mark, true, clocks)), first);
        assert!(stamp_limit(first, false, clocks) > first, "without a sidefile the clock begins at the mark");
    }
}
