//! What truly happened to a volume, in the order in which it did: the changes of its tree, and the updates that told of them.

use twinfs_core::id::{FileId, VolumeInstance, VolumeName};
use twinfs_core::model::Model;
use twinfs_core::model::generate::Change;
use twinfs_core::stamp::{Seq, Stamp, Timestamp};
use twinfs_core::token::Token;

/// Changes between two snapshots of the model.
const SNAPSHOT_CHANGES: usize = 40;

/// What changed the tree.
enum Step {
    /// A program did.
    Change(Box<Change>),
    /// Power failed: this is what was left.
    Reset(Box<Model>),
}

/// An update as it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) stamp: Stamp,
    /// What it says; `None` for the mark of a resync, of which only the number is known.
    pub(crate) token: Option<Token>,
}

/// A volume and all that ever happened to it.
pub(crate) struct History {
    pub(crate) name: VolumeName,
    pub(crate) instance: VolumeInstance,
    pub(crate) root: FileId,
    /// In the order of their instants.
    steps: Vec<(Timestamp, Step)>,
    /// The model after so many steps.
    snapshots: Vec<(usize, Model)>,
    last: Model,
    /// The updates of the chain as it stands, from number 1 on.
    published: Vec<Published>,
    /// Updates whose numbers were given to others: a power loss took them, or they were given up.
    pub(crate) given_up: Vec<Published>,
}

impl History {
    pub(crate) fn new(name: VolumeName, first: Model) -> Self {
        let root = first.root();
        Self {
            name,
            instance: root.instance,
            root,
            steps: Vec::new(),
            snapshots: vec![(0, first.clone())],
            last: first,
            published: Vec::new(),
            given_up: Vec::new(),
        }
    }

    // ---- what happens ----

    /// A change took effect at an instant of the session's clock.
    pub(crate) fn change(&mut self, time: Timestamp, change: Change) {
        self.last.apply(&change.update, &change.data);
        self.step(time, Step::Change(Box::new(change)));
    }

    /// A process begins at an instant of the session's clock, before which all stamps lie that were ever given. The clock need
    /// not remember instants of which it only told the time: changes that nobody was told of get new ones.
    pub(crate) fn begin(&mut self, begin: Timestamp, mut now: impl FnMut() -> Timestamp) {
        let from = self.steps.partition_point(|(time, _)| *time < begin);
        self.steps[from..].iter_mut().for_each(|(time, _)| *time = now());
    }

    /// The tree is another one from an instant on.
    pub(crate) fn reset(&mut self, time: Timestamp, model: Model) {
        self.last = model.clone();
        self.step(time, Step::Reset(Box::new(model)));
    }

    fn step(&mut self, time: Timestamp, step: Step) {
        assert!(self.steps.last().is_none_or(|(last, _)| *last < time), "time goes on");
        self.steps.push((time, step));
        if self.steps.len().is_multiple_of(SNAPSHOT_CHANGES) {
            self.snapshots.push((self.steps.len(), self.last.clone()));
        }
    }

    /// An update was published.
    pub(crate) fn publish(&mut self, stamp: Stamp, token: Option<Token>) {
        let at = (stamp.seq.0 - 1) as usize;
        assert!(at <= self.published.len(), "numbers are dense");
        self.given_up.extend(self.published.drain(at..));
        self.published.push(Published { stamp, token });
    }

    // ---- what is asked ----

    /// How many steps had happened by then.
    pub(crate) fn steps_at(&self, time: Timestamp) -> usize {
        self.steps.partition_point(|(at, _)| *at <= time)
    }

    pub(crate) fn last_time(&self) -> Timestamp {
        self.steps.last().map_or(Timestamp::ZERO, |(time, _)| *time)
    }

    /// The instants of the programs' changes after one, up to another.
    pub(crate) fn changes_within(
        &self,
        after: Timestamp,
        until: Timestamp,
    ) -> impl Iterator<Item = Timestamp> {
        let steps = &self.steps[self.steps_at(after)..self.steps_at(until).max(self.steps_at(after))];
        steps.iter().filter(|(_, step)| matches!(step, Step::Change(_))).map(|(time, _)| *time)
    }

    /// The last update stamped at or before `time`.
    pub(crate) fn seq_at(&self, time: Timestamp) -> Seq {
        Seq(self.published.partition_point(|published| published.stamp.time <= time) as u64)
    }

    pub(crate) fn published(&self) -> &[Published] {
        &self.published
    }

    /// The tree after so many steps.
    pub(crate) fn model_at(&self, steps: usize) -> Model {
        if steps == self.steps.len() {
            return self.last.clone();
        }
        let before = self.snapshots.partition_point(|(count, _)| *count <= steps) - 1;
        let (from, model) = &self.snapshots[before];
        let mut model = model.clone();
        self.advance(&mut model, *from, steps);
        model
    }

    /// Goes on from the model after some steps.
    pub(crate) fn advance(&self, model: &mut Model, from: usize, to: usize) {
        for (_, step) in &self.steps[from..to] {
            match step {
                Step::Change(change) => model.apply(&change.update, &change.data),
                Step::Reset(left) => model.clone_from(left),
            }
        }
    }
}
