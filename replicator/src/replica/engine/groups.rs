//! Journal, groups and checkpoints.

use bytes::Bytes;
use twinfs_core::id::{SetNumber, VolumeIndex};
use twinfs_core::session::receiver::GroupPlan;
use twinfs_core::wire::{Hello, Message, RefuseCode};

use super::{Engine, Outlet};
use crate::failpoint::{self, FailPoint};
use crate::primary::clock::Reading;
use crate::replica::image::{Group, ImageError};
use crate::replica::journal::{Commit, CommitBase, CommitVolume, Journal, JournalError, Withdrawn};
use crate::replica::recovery::{Journaled, data_ref};

impl<O: Outlet> Engine<O> {
    /// Appends what was taken to the journal, as far as it has room.
    pub(in crate::replica) fn append_waiting(&mut self) {
        while let Some(waiting) = self.unappended.front() {
            let Some(journal) = &mut self.journal else { return };
            let at = match journal.append_set(&waiting.bytes) {
                Ok(at) => at,
                Err(error) => return self.journal_failed(&error),
            };
            failpoint::pass(FailPoint::Appended);
            let (volume, number) = (waiting.volume, waiting.number);
            let journaled =
                Journaled { hash: waiting.hash, last_seq: waiting.last_seq, end: waiting.end, at };
            self.tracked[volume.as_usize()].sets.insert(number, journaled);
            self.receiver.handle_appended(volume, number, at).expect("the receiver has just taken it");
            self.appended.push((volume, number));
            self.unappended.pop_front();
        }
        if self.trouble.as_ref().is_some_and(|(_, final_)| !final_) {
            tracing::info!("the journal has room again");
            self.trouble = None;
        }
    }

    /// The bytes of a set that was taken and for which the journal has had no room so far.
    pub(in crate::replica) fn unappended_set(&self, volume: VolumeIndex, number: SetNumber) -> Option<Bytes> {
        let found = self.unappended.iter().find(|set| (set.volume, set.number) == (volume, number));
        found.map(|set| set.bytes.clone())
    }

    /// Drops, durably, what the primary will make anew.
    pub(super) fn withdraw(&mut self, hello: &Hello) -> Result<(), JournalError> {
        let withdrawn = self.receiver.withdraw(hello);
        for (volume, numbers) in withdrawn {
            let name = &self.state.received[volume.as_usize()].name;
            tracing::info!(volume = %name, sets = numbers.len(), "the primary makes record sets anew that came beyond a gap");
            self.unappended.retain(|set| set.volume != volume || !numbers.contains(&set.number));
            self.tracked[volume.as_usize()].withdraw(&numbers);
            if let Some(journal) = &mut self.journal {
                journal.append_withdrawn(&Withdrawn { volume: name.clone(), numbers })?;
            }
        }
        self.journal.as_mut().map_or(Ok(()), Journal::sync)
    }

    pub(super) fn journal_failed(&mut self, error: &JournalError) {
        let passing = matches!(error, JournalError::Full { .. } | JournalError::TooManySegments { .. });
        let why = error.to_string();
        // What ended the session for good stays the reason: what follows from it says less, or sounds as if it passed.
        let known = self.trouble.as_ref().map(|(_, is_final)| *is_final);
        if known.is_none_or(|is_final| !is_final && !passing) {
            tracing::error!(%why, "the session is SUSPENDED: nothing more is taken, what was shown stays");
        }
        if known != Some(true) {
            self.trouble = Some((why.clone(), !passing));
        }
        if passing && !self.checkpointing && self.tree_trouble.is_none() && !self.image.is_incomplete() {
            self.start_checkpoint();
        }
        if let Some(id) = self.current.as_ref().map(|current| current.id) {
            self.refuse_with(id, RefuseCode::Failed, why);
        }
    }

    /// Forms groups as long as there are any; each is committed, then shown. One sync makes sets and COMMIT durable:
    /// persist first, then acknowledge and show.
    pub(in crate::replica) fn commit(&mut self) {
        loop {
            if self.planned.is_none() && self.suspended().is_none() {
                self.planned = self.receiver.poll_group();
            }
            if let Some(plan) = &self.planned {
                let commit = self.commit_entry(plan);
                let Some(journal) = &mut self.journal else { return };
                if journal.last_commit().is_none_or(|last| last.group < commit.group)
                    && let Err(error) = journal.append_commit(&commit)
                {
                    return self.journal_failed(&error);
                }
                failpoint::pass(FailPoint::CommitAppended);
            }
            if let Some(journal) = &mut self.journal
                && let Err(error) = journal.sync()
            {
                return self.journal_failed(&error);
            }
            for (volume, number) in std::mem::take(&mut self.appended) {
                failpoint::pass(FailPoint::Synced);
                self.receiver.handle_durable(volume, number).expect("it was appended");
            }
            let plan = self.planned.take();
            let more = plan.is_some();
            if let Some(plan) = plan
                && let Err(error) = self.show(&plan)
            {
                tracing::error!(%error, "a committed group cannot be shown; the view stays as it is");
                self.trouble = Some((error.to_string(), true));
                return;
            }
            if more {
                failpoint::pass(FailPoint::Shown);
            }
            self.answer();
            if !more {
                return;
            }
            // A group has made room.
            self.retry_stalled();
        }
    }

    /// Acknowledgements and progress.
    fn answer(&mut self) {
        while let Some(ack) = self.receiver.poll_ack() {
            self.say(&Message::Ack(ack));
        }
        if let Some(progress) = self.receiver.poll_progress() {
            self.say(&Message::Progress(progress));
        }
    }

    fn commit_entry(&self, plan: &GroupPlan) -> Commit {
        let volumes = self.state.received.iter().enumerate().map(|(at, received)| {
            let tracked = &self.tracked[at];
            let mine = plan.volumes.iter().find(|volume| volume.volume.as_usize() == at);
            let through = mine.map_or(tracked.through, |volume| volume.through);
            let (point, end) = tracked.base_after(through);
            let joins = plan.joins.iter().any(|join| join.as_usize() == at);
            CommitVolume {
                volume: received.name.clone(),
                instance: received.instance,
                root: received.root,
                member: tracked.member || joins,
                joins,
                through,
                base: CommitBase { number: point.number, hash: point.hash, last_seq: point.last_seq, end },
            }
        });
        Commit { group: plan.number, time: plan.time, volumes: volumes.collect() }
    }

    fn show(&mut self, plan: &GroupPlan) -> Result<(), ImageError> {
        if self.image.memory_bytes() > self.image.memory_bytes_max() {
            self.wait_for_checkpoint();
        }
        failpoint::pass(FailPoint::Committed);
        let mut group = Group { number: plan.number, time: plan.time, ..Group::default() };
        for volume in &plan.volumes {
            let updates = volume.sets.iter().flat_map(|set| {
                let updates = &set.meta.updates[set.range.clone()];
                updates.iter().map(|(update, offset)| (update.clone(), data_ref(update, set.at, *offset)))
            });
            group.volumes.push((self.image_index[volume.volume.as_usize()], updates.collect()));
        }
        group.joins = plan.joins.iter().map(|volume| self.image_index[volume.as_usize()]).collect();
        self.image.apply_group(&group)?;
        for volume in &plan.volumes {
            self.tracked[volume.volume.as_usize()].commit(volume.through);
        }
        for volume in &plan.joins {
            self.tracked[volume.as_usize()].member = true;
            tracing::info!(volume = %self.state.received[volume.as_usize()].name, "the volume is whole and visible");
        }
        self.receiver.handle_committed(plan.number).expect("the receiver has planned it");
        Ok(())
    }

    // ---- checkpoints ----

    pub(super) fn checkpoint_if_due(&mut self, now: Reading) {
        let waits = self.is_rotten() || self.must_trees_wait(now);
        if !self.checkpointing && !waits && self.image.checkpoint_due(now.boot) {
            self.start_checkpoint();
        }
    }

    fn start_checkpoint(&mut self) {
        self.checkpointing = self.outlet.start_checkpoint(&self.image);
    }

    /// The checkpoint that was begun has ended.
    pub fn handle_checkpointed(&mut self, result: Result<(), ImageError>) {
        self.checkpointing = false;
        match result {
            Ok(()) => {
                self.trees_written();
                self.trim();
                self.tell_written();
                self.answer();
            }
            Err(error) => self.trees_failed(&error),
        }
    }

    /// Memory is at its bound: nothing more is shown before the checkpoint has made room. Other inputs wait meanwhile.
    fn wait_for_checkpoint(&mut self) {
        if let Err(error) = self.image.checkpoint() {
            // This group is committed and has to show; no other one is formed before a checkpoint has succeeded.
            self.trees_failed(&error);
        }
    }

    /// Lets the journal go of what the plain trees have.
    pub(super) fn trim(&mut self) {
        let tree = self.image.checkpointed();
        for (received, tracked) in self.state.received.iter().zip(&mut self.tracked) {
            if let Some(volume) = tree.volumes.get(&received.name) {
                tracked.checkpointed(volume.seq);
            }
        }
        let Some(journal) = &mut self.journal else { return };
        let oldest = self.tracked.iter().flat_map(|tracked| tracked.sets.values()).map(|set| set.at).min();
        failpoint::pass(FailPoint::Trimming);
        if let Err(error) = journal.trim(oldest.unwrap_or(journal.end())) {
            tracing::error!(%error, "the journal could not be trimmed");
        }
        failpoint::pass(FailPoint::Trimmed);
    }
}
