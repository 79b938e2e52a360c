//! What a killed run left in the sidefile, as a list of the objects that it touched.

use twinfs_core::change_map::ChangeMap;
use twinfs_core::update;

use super::{Capture, Captured, lock};

impl Capture {
    /// What the updates touch that wait to be shipped, of each volume.
    #[must_use]
    pub fn touched_by_queue(&self) -> Vec<ChangeMap> {
        let waiting: Vec<Captured> = lock(&self.publish).queue.iter().cloned().collect();
        let mut maps = vec![ChangeMap::default(); self.changes().len()];
        let mut encoded = Vec::new();
        for captured in waiting {
            encoded.clear();
            self.copy_meta(&captured, &mut encoded);
            let Some(map) = maps.get_mut(captured.volume.as_usize()) else { continue };
            match update::decode_borrowed(&encoded, 0) {
                Ok((update, _)) => map.note(&update.op, &update.attrs),
                Err(_) => map.note_everything(),
            }
        }
        maps
    }
}
