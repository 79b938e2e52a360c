//! Exact loss report: what a forced promote tells is compared with what truly happened.
//!
//! Every change of a program is in the last group, or listed, or later than the report's unknown instant. What is listed is
//! true – its number, time, operation, file and range – and is not in the last group; that its data is held is only said of
//! what was sent in the set that is named. What is counted as missing did happen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use twinfs_core::format::UnverifiedSet;
use twinfs_core::id::{SetNumber, VolumeName};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::token::Token;
use twinfs_core::update::OpKind;
use twinfs_replicator::replica::loss::{self, LostLine};
use twinfs_replicator::site::SiteDir;

use crate::sim::primary::desk::Volume;
use crate::sim::primary::history::{History, Published};
use crate::sim::replica::Replica;

/// The sets that were ever sent.
#[derive(Debug, Default)]
pub(crate) struct Sent(Vec<Bytes>);

/// Which updates a set had.
type Sets = BTreeMap<(VolumeName, SetNumber), BTreeSet<(Seq, Timestamp)>>;

impl Sent {
    pub(crate) fn note(&mut self, set: &Bytes) {
        self.0.push(set.clone());
    }

    fn sets(&self) -> Sets {
        let mut sets = Sets::new();
        for bytes in &self.0 {
            let set = UnverifiedSet(bytes.clone()).verify().expect("it was made a moment ago");
            let meta = set.meta().expect("it was made a moment ago");
            let header = set.header();
            let stamps = meta.updates.iter().map(|(update, _)| (update.stamp.seq, update.stamp.time));
            sets.entry((header.volume.clone(), header.number)).or_default().extend(stamps);
        }
        sets
    }
}

/// What was checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) listed: u64,
    pub(crate) missing: u64,
}

/// Promotes a replica, and checks what it tells. `short` leaves out the last line, to see that it is missed.
pub(crate) fn check(
    replica: &mut Replica,
    reports: &Path,
    now: u64,
    volumes: &[Volume],
    sent: &Sent,
    short: bool,
) -> Result<Counts, String> {
    replica.promote(now).map_err(|why| format!("loss: a forced promote is refused: {why}"))?;
    let site = SiteDir::new(reports);
    let state = replica.machine.state().map_err(|error| error.to_string())?.ok_or("loss: it has no state")?;
    site.save_state(&state).map_err(|error| error.to_string())?;
    let kept = loss::newest(&site).map_err(|error| error.to_string())?.ok_or("loss: there is no report")?;
    let lines = kept.updates().map_err(|error| error.to_string())?;
    let mut lines: Vec<LostLine> = lines.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let report = &kept.report;
    if short {
        lines.pop();
    }
    let shown = Timestamp(report.consistency_time.ns);
    let unknown_after = report.unknown_after.as_ref().map(|after| Timestamp(after.ns));
    let unknown_after = unknown_after.ok_or("loss: nobody was drained, and nothing is unknown")?;
    if lines.len() as u64 != report.updates_known || unknown_after < shown {
        return Err(format!("loss: {} lines, {} known", lines.len(), report.updates_known));
    }
    let sets = sent.sets();
    let members: BTreeSet<&VolumeName> = report.volumes.iter().map(|volume| &volume.name).collect();
    for history in
        volumes.iter().map(|volume| &volume.history).filter(|history| members.contains(&history.name))
    {
        let about = |why: String| format!("loss: {}: {why}", history.name);
        let own: Vec<&LostLine> = lines.iter().filter(|line| line.volume == history.name).collect();
        own.iter().try_for_each(|line| is_true(line, history, shown, &sets)).map_err(about)?;
        let listed: BTreeSet<Timestamp> = own.iter().map(|line| Timestamp(line.time.ns)).collect();
        if let Some(silent) = history.changes_within(shown, unknown_after).find(|time| !listed.contains(time))
        {
            return Err(about(format!(
                "a change at {} is not listed; shown is {}, unknown after {}",
                silent.0, shown.0, unknown_after.0
            )));
        }
    }
    for gap in &report.gaps {
        let history = volumes.iter().map(|volume| &volume.history).find(|history| history.name == gap.volume);
        let history = history.ok_or("loss: a gap is of no volume")?;
        let range = gap.first_seq..gap.first_seq + gap.updates;
        let missing = versions(history).filter(|published| {
            let Published { stamp, .. } = published;
            range.contains(&stamp.seq.0) && (gap.after.ns..=gap.before.ns).contains(&stamp.time.0)
        });
        let missing: BTreeSet<Seq> = missing.map(|published| published.stamp.seq).collect();
        if missing.len() as u64 != gap.updates {
            return Err(format!("loss: {}: {gap:?}, and {missing:?} happened", gap.volume));
        }
    }
    Ok(Counts { listed: lines.len() as u64, missing: report.updates_missing })
}

/// All updates that ever had a number.
fn versions(history: &History) -> impl Iterator<Item = &Published> {
    history.published().iter().chain(&history.given_up)
}

fn is_true(line: &LostLine, history: &History, shown: Timestamp, sets: &Sets) -> Result<(), String> {
    let (seq, time) = (Seq(line.seq), Timestamp(line.time.ns));
    if time <= shown {
        return Err(format!("{line:?} is in the last group, of {}", shown.0));
    }
    let same = |published: &&Published| published.stamp.seq == seq;
    let found = versions(history).filter(same).find(|published| match &published.token {
        Some(token) => published.stamp.time == time && describes(line, token),
        None => line.operation == OpKind::Resync.to_string(),
    });
    if found.is_none() {
        let known: Vec<_> = versions(history).filter(same).collect();
        return Err(format!("{line:?} never happened, but {known:?}"));
    }
    let Some(number) = line.set.map(SetNumber) else {
        return if line.data_held { Err(format!("{line:?} names no set")) } else { Ok(()) };
    };
    match sets.get(&(history.name.clone(), number)) {
        Some(updates) if line.data_held && updates.contains(&(seq, time)) => Ok(()),
        _ => Err(format!("{line:?}: that set was sent without it")),
    }
}

/// Whether a line says what the token of an update says.
fn describes(line: &LostLine, token: &Token) -> bool {
    let is_range = matches!(
        token.op,
        OpKind::Write | OpKind::Truncate | OpKind::Zero | OpKind::Collapse | OpKind::Insert
    );
    let has_length = is_range && token.op != OpKind::Truncate;
    line.operation == token.op.to_string()
        && line.file == token.file
        && line.offset == is_range.then_some(token.range.0)
        && line.length == has_length.then_some(token.range.1)
}
