//! Prefix: what is shown is everything stamped up to the consistency time, and nothing later, over all volumes.

use std::collections::BTreeMap;

use twinfs_core::id::{GroupNumber, VolumeName};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_replicator::replica::image::Image;

use crate::sim::primary::desk::Volume;

/// What a group was when it was shown first.
type Shown = (Timestamp, Vec<(VolumeName, Seq)>);

/// Remembers the groups that were shown.
#[derive(Debug, Default)]
pub(crate) struct Prefix {
    groups: BTreeMap<GroupNumber, Shown>,
}

impl Prefix {
    /// Looks at what is shown now. `visible` is the consistency time that the session tells; it may be past the last
    /// group's if nothing happened in between.
    pub(crate) fn check(
        &mut self,
        image: &Image,
        visible: Timestamp,
        volumes: &[Volume],
    ) -> Result<(), String> {
        let view = image.view();
        let (group, time) = (view.group(), view.consistency_time());
        let mut members = Vec::new();
        for (index, name, _) in view.members() {
            let shown = image.volumes();
            let seq =
                shown.iter().find(|(at, ..)| *at == index).ok_or("prefix: a member is no volume")?.2.seq;
            let volume = volumes.iter().map(|volume| &volume.history).find(|history| history.name == *name);
            let volume = volume.ok_or("prefix: an unknown volume")?;
            let wanted = volume.seq_at(time);
            if seq != wanted {
                return Err(format!(
                    "prefix: group {group} at {time} holds {name} up to {seq}, not {wanted}"
                ));
            }
            if volume.seq_at(visible.max(time)) != wanted {
                return Err(format!("prefix: the time {visible} is told, and {name} is shown as of {time}"));
            }
            members.push((name.clone(), seq));
        }
        // A number means one state for ever, whatever crashed since.
        let shown = (time, members);
        match self.groups.get(&group) {
            Some(known) if *known != shown => {
                Err(format!("prefix: group {group} was {known:?} and is {shown:?} now"))
            }
            Some(_) => Ok(()),
            None => {
                let before = self.groups.last_key_value().map_or(&[][..], |(_, (_, members))| members);
                if before.iter().any(|(name, _)| shown.1.iter().all(|(other, _)| other != name)) {
                    return Err(format!("prefix: a volume of {before:?} does not show in group {group}"));
                }
                self.groups.insert(group, shown);
                Ok(())
            }
        }
    }

    /// The last group that was shown ever.
    pub(crate) fn newest(&self) -> GroupNumber {
        self.groups.last_key_value().map_or(GroupNumber(0), |(group, _)| *group)
    }
}
