//! No lost acknowledgement: what the primary was told is durable is there after every crash, and so is every group that
//! was shown.

use std::collections::BTreeSet;

use twinfs_core::id::{GroupNumber, SetNumber};
use twinfs_replicator::replica::image::Image;

use crate::sim::primary::Primary;
use crate::sim::replica::Replica;

/// After a recovery.
pub(crate) fn check(primary: &Primary, replica: &Replica, newest: GroupNumber) -> Result<(), String> {
    let receiver = replica.engine.receiver();
    let known = receiver.view();
    for (volume, acked) in primary.names().iter().zip(&primary.acked) {
        let Some(found) = known.volumes.iter().find(|found| found.name == *volume) else {
            if acked.is_empty() {
                continue;
            }
            return Err(format!("lost acknowledgement: volume {volume} is not known any more"));
        };
        let beyond: BTreeSet<SetNumber> = receiver.durable_beyond(volume).collect();
        let lost = acked.range(found.durable.number.next()..).find(|number| !beyond.contains(number));
        if let Some(lost) = lost {
            return Err(format!("lost acknowledgement: set {lost} of {volume} is gone"));
        }
    }
    check_groups(replica.engine.image(), newest)
}

fn check_groups(image: &Image, newest: GroupNumber) -> Result<(), String> {
    if image.is_incomplete() {
        return Err("lost acknowledgement: groups that a checkpoint had begun to write are gone".to_owned());
    }
    let found = image.view().group();
    if found < newest {
        return Err(format!("lost acknowledgement: group {newest} was shown, the last one now is {found}"));
    }
    Ok(())
}
