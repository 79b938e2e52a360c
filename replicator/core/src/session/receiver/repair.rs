//! A replica that lost what it had acknowledged, because its journal was damaged.
//!
//! It says so in each welcome until the primary has adopted its place in every chain: from then on record sets come that
//! follow it. A primary that adopts a place sends a *resync* mark first; so as long as what is missing is not here, no
//! group is cut, and the first group that goes beyond the place holds all of the repair.

use super::{Receiver, Volume};
use crate::id::VolumeName;
use crate::stamp::{Seq, Timestamp};
use crate::wire::Damage;

/// What is to be made good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// What was found.
    pub damage: Damage,
    /// The last update that is here, of each volume that was known then.
    pub from: Vec<(VolumeName, Seq)>,
}

impl Receiver {
    /// Begins a repair, or goes on with it after a restart. What was taken beyond a gap must be withdrawn with the next
    /// hello.
    pub fn begin_repair(&mut self, repair: Repair) {
        self.repair = Some(repair);
    }

    /// The repair that is under way.
    #[must_use]
    pub const fn repair(&self) -> Option<&Repair> {
        self.repair.as_ref()
    }

    /// The damage of which the primary has still to hear.
    #[must_use]
    pub fn damage(&self) -> Option<&Damage> {
        let adopted = |from: Seq, volume: &Volume| volume.chain.last_seq > from;
        self.repair.as_ref().filter(|repair| !self.all(repair, adopted)).map(|repair| &repair.damage)
    }

    /// Whether all that was missing is in committed groups. Then [`end_repair`](Self::end_repair).
    #[must_use]
    pub fn is_repaired(&self) -> bool {
        let committed = |from: Seq, volume: &Volume| {
            volume.chain.last_seq > from && (volume.through > from || !volume.member)
        };
        self.repair.as_ref().is_some_and(|repair| self.all(repair, committed))
    }

    /// Forgets the repair.
    pub fn end_repair(&mut self) {
        self.repair = None;
    }

    fn all(&self, repair: &Repair, holds: impl Fn(Seq, &Volume) -> bool) -> bool {
        self.volumes.iter().all(|volume| {
            let known = repair.from.iter().find(|(name, _)| *name == volume.name);
            known.is_none_or(|(_, from)| holds(*from, volume))
        })
    }

    /// Says what the plain trees hold, durably: everything up to `time`, or, with `whole`, everything that is visible.
    /// [`poll_progress`](Self::poll_progress) then tells the primary.
    pub fn handle_checkpointed(&mut self, time: Timestamp, whole: bool) {
        let before = self.progress().applied;
        (self.tree_time, self.tree_whole) = (self.tree_time.max(time), whole);
        self.progress_due |= self.connected && self.progress().applied > before;
    }
}
