//! Starting from a journal that is damaged.
//!
//! What is left of it – the groups of which everything is there – goes into the plain trees. What that is, and that
//! something is missing, then becomes durable in the control file, in one step; from there on the damaged journal is not
//! needed any more. It is put aside, and a new one begins with a COMMIT that says again where the trees stand. A crash
//! anywhere leads to the same: before the control file everything is done anew, after it nothing is looked at again.
//!
//! If a checkpoint had begun to write groups that are lost, the trees are between two groups and show nothing before the
//! primary has sent again all that was touched since the last checkpoint: see [`Image::hide`].

use twinfs_core::id::{GroupNumber, SetHash, SetNumber, VolumeIndex, VolumeName};
use twinfs_core::session::receiver::{self, Receiver};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::wire::{Damage, Text};

use super::engine::{SiteStore, StartError};
use super::image::Image;
use super::journal::{Commit, CommitBase, CommitVolume, Journal, JournalConfig, JournalReader};
use super::recovery::{self, RecoveryError};
use crate::site::{Repair, RepairVolume, State};

/// Saves what can be saved, remembers it, and begins a new journal. `read_from` is told where the image finds the data of
/// the groups meanwhile.
pub(super) fn set_aside(
    store: &dyn SiteStore,
    state: &mut State,
    (image, image_index): (&Image, &[VolumeIndex]),
    config: JournalConfig,
    found: &RecoveryError,
    now_ns: u64,
    read_from: impl FnOnce(JournalReader),
) -> Result<(), StartError> {
    let session = state.session.expect("a journal belongs to a session");
    let storage = store.journal()?;
    let (reader, entries) = Journal::salvage(&*storage, session)?;
    read_from(reader);
    let last = recovery::salvage(state, entries, image, image_index, now_ns)?;
    let torn = image.is_incomplete();
    if !torn {
        image.checkpoint()?;
    }
    let tree = image.checkpointed();
    let known = last.iter().flat_map(|commit| &commit.volumes);
    let volumes = state.received.iter().map(|received| {
        let held = tree.volumes.get(&received.name);
        let through = held.map_or(Seq::ZERO, |held| held.seq);
        let base = known.clone().find(|known| known.volume == received.name).map(|known| known.base);
        let (set, hash) = place(base, through, &received.name, state.journals_damaged);
        RepairVolume {
            name: received.name.clone(),
            member: held.is_some_and(|held| held.member),
            through,
            set,
            hash,
            end: base.map_or(Timestamp::ZERO, |base| base.end).min(tree.time),
        }
    });
    let mut next = state.clone();
    next.journals_damaged += 1;
    next.repair = Some(Repair {
        why: found.to_string(),
        whole: state.repair.as_ref().is_some_and(|earlier| earlier.whole),
        torn,
        setting_aside: true,
        group: tree.group,
        time: tree.time,
        volumes: volumes.collect(),
    });
    tracing::error!(
        why = %found,
        group = tree.group.0,
        time = %tree.time,
        torn,
        kept = format!("journal.damaged-{}", next.journals_damaged),
        "the journal is damaged: what is missing is read again from the primary"
    );
    store.save_state(&next)?;
    *state = next;
    begin_journal(store, state, config)
}

/// A set of the chain to go on from. The primary takes over any place, so it only has to be one that can be.
fn place(base: Option<CommitBase>, through: Seq, volume: &VolumeName, earlier: u64) -> (SetNumber, SetHash) {
    match base {
        _ if through == Seq::ZERO => (SetNumber(0), SetHash::NONE),
        Some(base) if (1..=through.0).contains(&base.number.0) => (base.number, base.hash),
        // No set is known that lies before.
        _ => {
            let text = format!("what damage {earlier} left of {volume} up to {through}");
            (SetNumber(1), SetHash(*blake3::hash(text.as_bytes()).as_bytes()))
        }
    }
}

/// Puts the damaged journal aside, if that was not done, and begins the new one.
pub(super) fn begin_journal(
    store: &dyn SiteStore,
    state: &mut State,
    config: JournalConfig,
) -> Result<(), StartError> {
    let (Some(session), Some(repair)) = (state.session, &state.repair) else { return Ok(()) };
    store.set_journal_aside(state.journals_damaged)?;
    let (mut journal, _) = Journal::open(store.journal()?, session, config)?;
    // Before the first group there is nothing to say.
    if journal.last_commit().is_none() && repair.group > GroupNumber(0) {
        journal.append_commit(&commit_of(state, repair))?;
        journal.sync()?;
    }
    let mut next = state.clone();
    next.repair.iter_mut().for_each(|repair| repair.setting_aside = false);
    store.save_state(&next)?;
    *state = next;
    Ok(())
}

/// The COMMIT of the group that is left. Its places are made up as far as they lie within a set.
fn commit_of(state: &State, repair: &Repair) -> Commit {
    let volumes = state.received.iter().filter_map(|received| {
        let left = repair.volumes.iter().find(|volume| volume.name == received.name)?;
        Some(CommitVolume {
            volume: received.name.clone(),
            instance: received.instance,
            root: received.root,
            member: left.member,
            joins: false,
            through: left.through,
            base: CommitBase { number: left.set, hash: left.hash, last_seq: left.through, end: left.end },
        })
    });
    Commit { group: repair.group, time: repair.time, volumes: volumes.collect() }
}

/// Has the receiver go on with the repair that the control file remembers.
pub(super) fn go_on(state: &State, receiver: &mut Receiver) {
    let Some(repair) = &state.repair else { return };
    let damage = Damage { whole: repair.whole, why: Text::new(repair.why.clone()) };
    let from = repair.volumes.iter().map(|volume| (volume.name.clone(), volume.through)).collect();
    receiver.begin_repair(receiver::Repair { damage, from });
}

/// What the control file remembers when the primary says that acknowledged sets are gone, of which nothing is known here.
pub(super) fn of_lost_end(state: &State, receiver: &Receiver, why: String) -> Repair {
    let shown = receiver.progress();
    let members: Vec<bool> = receiver.volumes().map(|(.., member)| member).collect();
    let volumes = receiver.view().volumes.into_iter().zip(members).map(|(volume, member)| RepairVolume {
        name: volume.name,
        member,
        through: volume.durable.last_seq,
        set: volume.durable.number,
        hash: volume.durable.hash,
        end: Timestamp::ZERO,
    });
    Repair {
        why,
        // The end of the journal may have gone, or the whole site may have been taken back.
        whole: true,
        torn: state.repair.as_ref().is_some_and(|earlier| earlier.torn),
        setting_aside: false,
        group: shown.group,
        time: shown.time,
        volumes: volumes.collect(),
    }
}

/// What a person reads of a repair that is under way.
pub(super) fn words(repair: &Repair) -> String {
    let Repair { why, torn, group, .. } = repair;
    let shown = match torn {
        true => "nothing can be shown".to_owned(),
        false => format!("showing group {group}"),
    };
    format!("the journal is damaged ({why}): {shown}; what is missing is read again from the primary")
}
