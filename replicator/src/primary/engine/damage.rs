//! A replica that lost what it had acknowledged.
//!
//! It has what its plain trees hold, and the eras of the activity log go only when that is all that they name: so what is
//! left of the log names whatever the replica lacks. That is read again, in one group.

use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::VolumeIndex;
use twinfs_core::wire::Damage;

use super::{Engine, Outlet};
use crate::primary::sidefile::Overflow;

impl<O: Outlet> Engine<O> {
    /// The replica's place was adopted because it lost something: suspends, and notes what that may be.
    pub(super) fn note_damage(&mut self, damage: &Damage) {
        if !self.capture.fill().suspended {
            self.capture.suspend_while(Overflow::LinkDown);
        }
        // It waits for the scan as every resync does.
        if self.examining {
            self.sender.suspend_for_resync();
        }
        let maps = self.lost(damage);
        let objects: usize = maps.iter().map(|map| map.objects().len()).sum();
        let everything = maps.iter().any(ChangeMap::is_everything);
        tracing::error!(why = %damage.why, objects, everything, "the replica lost what it had acknowledged");
        self.reason = Some(format!("the replica lost what it had acknowledged: {}", damage.why));
        for (index, map) in (0..).map(VolumeIndex).zip(maps) {
            self.capture.merge_changes(index, map);
        }
    }

    fn lost(&self, damage: &Damage) -> Vec<ChangeMap> {
        let mut maps = vec![ChangeMap::default(); self.volumes.len()];
        let named = self.log.as_ref().filter(|_| !damage.whole).map(|log| log.named());
        match named {
            Some(Ok(named)) if !named.everything => {
                for (volume, file) in named.files {
                    if let Some(map) = maps.get_mut(volume.as_usize()) {
                        map.note_whole(file);
                    }
                }
            }
            // Nobody knows what it lacks.
            _ => maps.iter_mut().for_each(ChangeMap::note_everything),
        }
        maps
    }
}
