//! Promote: how a replica becomes the primary.
//!
//! A promote first accounts for what is lost ([`super::loss`]). It then raises the epoch, durably, before anything else
//! can be written; from that instant the old primary's sets are refused, those in flight too. Then the plain trees are
//! made those of the last group. What comes after – the writable mount – is the file system layer's.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use twinfs_core::id::{Epoch, FileId, VolumeIndex, VolumeName};
use twinfs_core::limits;
use twinfs_core::loss::{Loss, Paths, VolumeKnowledge};
use twinfs_core::session::Role;
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::Kind;
use twinfs_core::wire::{Message, PromoteReady};

use super::engine::{Engine, Outlet};
use super::journal::Journal;
use super::loss::{self, Circumstances, Keeping, Report};
use crate::primary::clock::Reading;

/// How to promote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromoteMode {
    /// Only if the primary is not connected.
    Plain,
    /// Hold and drain the primary first: nothing is lost.
    Planned,
    /// Whatever the primary does.
    Forced,
}

/// A site that may take over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promoted {
    /// The new epoch, durable.
    pub epoch: Epoch,
    /// The consistency time: what the trees show.
    pub time: Timestamp,
    /// The volumes with their plain trees.
    pub volumes: Vec<(VolumeName, PathBuf)>,
    /// Volumes whose initial copy was not complete: unusable, and left where they are.
    pub unusable: Vec<VolumeName>,
}

/// Names who asked for a promote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Asker(pub u64);

/// What a promote tells who asked for it.
#[derive(Debug)]
pub enum TakeoverNews {
    /// A line for the user.
    Progress(String),
    /// The site may take over: epoch and tree are durable. Or why not.
    Decided(Result<Promoted, String>),
}

/// A planned promote under way.
#[derive(Debug)]
pub(super) struct Takeover {
    asker: Asker,
    /// On the boot clock, in nanoseconds.
    deadline_ns: u64,
    ready: Option<PromoteReady>,
}

impl<O: Outlet> Engine<O> {
    /// Somebody asks for a promote.
    pub fn handle_promote(&mut self, asker: Asker, mode: PromoteMode, now: Reading) {
        let decided = |engine: &mut Self, decided| engine.outlet.tell(asker, TakeoverNews::Decided(decided));
        if self.receiver.role() == Role::Promoted {
            let promoted = self.promoted();
            return decided(self, promoted);
        }
        if self.takeover.is_some() {
            return decided(self, Err("a planned promote is under way already".into()));
        }
        if self.receiver.progress().time == Timestamp::ZERO {
            return decided(
                self,
                Err("no volume was ever complete here: there is nothing to promote".into()),
            );
        }
        if let Some(repair) = self.state.repair.as_ref().filter(|repair| repair.torn) {
            return decided(
                self,
                Err(format!("{}; until then there is no group to promote", super::repair::words(repair))),
            );
        }
        let peer = self.current.as_ref().map(|current| current.peer.name.to_string());
        match (mode, peer) {
            (PromoteMode::Plain, Some(peer)) => decided(
                self,
                Err(format!(
                    "the primary {peer} is connected: use --planned to move without loss, or --force to cut it off"
                )),
            ),
            (PromoteMode::Planned, None) => decided(
                self,
                Err("the primary is not connected, so it cannot be drained: without it, use --force".into()),
            ),
            (PromoteMode::Planned, Some(peer)) => {
                let line = format!("Asking {peer} to hold new writes and to drain.");
                self.outlet.tell(asker, TakeoverNews::Progress(line));
                self.say(&Message::PromoteRequest);
                let deadline_ns = now.boot.saturating_add(limits::HANDOVER_NS_MAX);
                self.takeover = Some(Takeover { asker, deadline_ns, ready: None });
            }
            (PromoteMode::Plain | PromoteMode::Forced, _) => {
                // What has been delivered, and waits only for its turn, is not lost.
                self.append_waiting();
                self.commit();
                let taken = self.account(mode, asker, now).and_then(|()| self.take_over());
                decided(self, taken);
            }
        }
    }

    /// Tells what is lost, and keeps it on disk, durably: before the epoch, so that no promote is without its account.
    /// If it cannot be kept, a forced promote tells all of it instead, any other is refused.
    fn account(&mut self, mode: PromoteMode, asker: Asker, now: Reading) -> Result<(), String> {
        let (_, known) = self.receiver.paired().ok_or("this site was never paired with a primary")?;
        let shown = self.receiver.progress();
        let knowledge: Vec<VolumeKnowledge<'_>> = self.receiver.knowledge().collect();
        let loss = Loss::of(shown.time, &knowledge);
        let about = Circumstances {
            epoch: known.number + 1,
            promoted: Timestamp(now.real),
            planned: mode == PromoteMode::Planned,
            shown: shown.time,
            group: shown.group.0,
            heard_until: self.last_heard,
            damage: self.state.repair.as_ref().map(|repair| repair.why.clone()),
        };
        let mut report = Report::new(&loss, &knowledge, &about);
        let paths = Paths::new(self.locate(&loss), &knowledge);
        let mut first = Vec::new();
        let kept = self.keep(&mut report, &loss, &knowledge, paths.clone(), &mut first);
        let outlet = &mut self.outlet;
        let mut say = |line| outlet.tell(asker, TakeoverNews::Progress(line));
        report.lines(limits::LOSS_LINES_SHOWN).into_iter().for_each(&mut say);
        match kept {
            Ok(place) => {
                first.into_iter().for_each(&mut say);
                let rest = report.updates_known.saturating_sub(limits::LOSS_LINES_SHOWN as u64);
                if rest > 0 {
                    say(format!("  … and {rest} more: `twinfs loss` lists all."));
                }
                say(format!("The loss report is kept in {}.", place.display()));
                Ok(())
            }
            Err(error) if mode == PromoteMode::Forced => {
                tracing::error!(%error, "the loss report cannot be kept");
                let told = loss::each_line(&loss, &knowledge, paths, |line| {
                    say(format!("  {line}"));
                    Ok(())
                });
                told.expect("telling does not fail");
                say(format!("The loss report could not be kept ({error}): this was all of it."));
                Ok(())
            }
            Err(error) => Err(format!(
                "the loss report cannot be kept: {error}; nothing was changed; --force promotes without keeping it"
            )),
        }
    }

    /// Writes the report and what belongs to it; the first lines go to `first` too.
    fn keep(
        &self,
        report: &mut Report,
        loss: &Loss<'_>,
        knowledge: &[VolumeKnowledge<'_>],
        paths: Paths<'_>,
        first: &mut Vec<String>,
    ) -> std::io::Result<PathBuf> {
        let mut keeping = Keeping::begin(self.store.directory()?)?;
        loss::each_line(loss, knowledge, paths, |line| {
            if first.len() < limits::LOSS_LINES_SHOWN {
                first.push(format!("  {line}"));
            }
            keeping.line(line)
        })?;
        let sets = self.keep_sets(&mut keeping, report, knowledge);
        let no_room = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        if let Err(error) = sets.and_then(|()| if keeping.has_room()? { Ok(()) } else { Err(no_room()) }) {
            tracing::error!(%error, "the record sets that cannot be ordered are not kept");
            keeping.without_sets()?;
            report.sets.clear();
            report.sets_problem = Some(error.to_string());
        }
        if keeping.has_room()? { keeping.finish(report) } else { Err(no_room()) }
    }

    /// Copies the sets that came but are in no group, from the journal or, where that took no more, from memory. One that
    /// cannot be read is left out, and the report says so.
    fn keep_sets(
        &self,
        keeping: &mut Keeping,
        report: &mut Report,
        knowledge: &[VolumeKnowledge<'_>],
    ) -> std::io::Result<()> {
        let reader = self.journal.as_ref().map(Journal::reader);
        for (index, volume) in (0..).map(VolumeIndex).zip(knowledge).filter(|(_, volume)| volume.member) {
            for set in &volume.sets {
                let read = match (set.at, &reader) {
                    (Some(at), Some(reader)) => reader.read_set(at).map_err(|error| error.to_string()),
                    _ => self.unappended_set(index, set.number).ok_or("it is nowhere".into()),
                };
                match read {
                    Ok(bytes) => report.sets.push(keeping.set(volume.name, set.number.0, &bytes)?),
                    Err(why) => {
                        let why = format!("record set {} of volume {}: {why}", set.number, volume.name);
                        report.sets_problem.get_or_insert(why);
                    }
                }
            }
        }
        Ok(())
    }

    /// Where the files stand in the last group that lost updates are about. Looks through directories from the root on,
    /// for no longer than a promote may wait; a file that is not found is named by its FileId.
    fn locate(&self, loss: &Loss<'_>) -> HashMap<FileId, Box<[u8]>> {
        // The walk blocks, so the time that it takes is not among the inputs.
        let deadline = Instant::now() + Duration::from_nanos(limits::LOSS_WALK_NS_MAX);
        let mut found = HashMap::new();
        for (index, image) in (0..).map(VolumeIndex).zip(&self.image_index) {
            let mut wanted = loss.files(index);
            // A view is taken for one call only: checkpoints wait for it.
            wanted.retain(|file| self.image.view().node(*image, *file).is_ok_and(|node| node.attr.nlink > 0));
            let view = self.image.view();
            let root = view.members().find(|(at, ..)| at == image).map(|(.., root)| root);
            drop(view);
            let mut dirs = VecDeque::from_iter(root.map(|root| (root, Vec::new())));
            wanted.retain(|file| Some(*file) != root);
            while let Some((dir, path)) = dirs.pop_front()
                && !wanted.is_empty()
                && Instant::now() < deadline
            {
                for entry in self.image.view().list(*image, dir).unwrap_or_default() {
                    let mut below = path.clone();
                    if !below.is_empty() {
                        below.push(b'/');
                    }
                    below.extend_from_slice(&entry.name);
                    if wanted.remove(&entry.file) {
                        found.insert(entry.file, below.clone().into());
                    }
                    if entry.kind == Kind::Dir && below.len() <= limits::PATH_HINT_BYTES_MAX {
                        dirs.push_back((entry.file, below));
                    }
                }
            }
        }
        found
    }

    pub(super) fn handover_ready(&mut self, ready: PromoteReady) {
        if let Some(takeover) = &mut self.takeover {
            takeover.ready = Some(ready);
        }
    }

    pub(super) fn handover_refused(&mut self, why: &str) {
        if let Some(takeover) = self.takeover.take() {
            let decided = Err(format!("the primary refuses: {}", why.escape_debug()));
            self.outlet.tell(takeover.asker, TakeoverNews::Decided(decided));
        }
    }

    /// Looks whether a planned promote can go on.
    pub(super) fn advance_takeover(&mut self, now: Reading) {
        let Some(takeover) = &self.takeover else { return };
        let failed = if self.current.is_none() {
            Some("the connection to the primary broke off: nothing was changed here")
        } else if now.boot > takeover.deadline_ns {
            Some("the primary did not drain in time: nothing was changed here, and its writes go on")
        } else {
            None
        };
        let reached = takeover.ready.as_ref().is_some_and(|ready| self.receiver.has_reached(ready));
        if failed.is_none() && !reached {
            return;
        }
        let Some(takeover) = self.takeover.take() else { return };
        if let Some(why) = failed {
            self.outlet.tell(takeover.asker, TakeoverNews::Decided(Err(why.into())));
            return;
        }
        let asker = takeover.asker;
        let decided = self.account(PromoteMode::Planned, asker, now).and_then(|()| self.take_over());
        self.outlet.tell(asker, TakeoverNews::Decided(decided));
    }

    /// The epoch first, durable; then nothing of the old primary is taken any more; then the trees.
    fn take_over(&mut self) -> Result<Promoted, String> {
        let (_, known) = self.receiver.paired().ok_or("this site was never paired with a primary")?;
        let epoch = Epoch { number: known.number + 1, site: self.own_site };
        self.save_promoted(epoch).map_err(|error| format!("{error}; nothing was changed"))?;
        self.receiver.promote(epoch).map_err(|error| error.to_string())?;
        tracing::warn!(
            epoch = epoch.number,
            "promoted: the old primary's record sets are refused from now on"
        );
        self.say(&Message::PromoteDone(epoch));
        self.promoted()
    }

    /// What a promoted site has: also after a restart in the middle of a promote.
    fn promoted(&mut self) -> Result<Promoted, String> {
        let (_, epoch) = self.receiver.paired().ok_or("this site was never paired with a primary")?;
        self.image.checkpoint().map_err(|error| format!("the last checkpoint failed, try again: {error}"))?;
        let members = self.receiver.volumes().filter(|(.., member)| *member);
        let unusable = self.receiver.volumes().filter(|(.., member)| !*member);
        Ok(Promoted {
            epoch,
            time: self.receiver.progress().time,
            volumes: members.map(|(_, name, _)| (name.clone(), self.image.tree_path(name))).collect(),
            unusable: unusable.map(|(_, name, _)| name.clone()).collect(),
        })
    }
}
