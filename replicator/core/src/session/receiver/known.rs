//! What the replica knows beyond what it shows, for the loss report.

use super::Receiver;
use crate::loss::{KnownSet, VolumeKnowledge};

impl Receiver {
    /// What is known of each volume beyond what is shown, in the order of their indices.
    pub fn knowledge(&self) -> impl Iterator<Item = VolumeKnowledge<'_>> {
        self.volumes.iter().map(|volume| VolumeKnowledge {
            name: &volume.name,
            root: volume.root,
            member: volume.member,
            through: volume.through,
            sets: volume
                .ungrouped()
                .map(|(number, held)| KnownSet {
                    number,
                    meta: &held.meta,
                    grouped: held.grouped,
                    at: held.at,
                })
                .collect(),
            tokens: volume.tokens.iter().filter(|token| token.stamp.seq > volume.through).collect(),
            tokens_not_held: volume.tokens.bare().not_held,
            // Only of a member it is true that everything up to the consistency time is in a group.
            bounds: volume.bounds().chain(volume.member.then_some((volume.through, self.visible))).collect(),
        })
    }
}
