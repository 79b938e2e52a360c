//! Changes that were made while the volumes were not mounted.
//!
//! Nobody captured them, so a scan of the trees looks for them in the background. Until it is done nothing that is new is
//! shipped: what programs write now may stand on changes that the replica has not heard of. If something is found, all
//! that was captured since goes into the change maps beside it, and a resync brings it as one group.

use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::VolumeIndex;
use twinfs_core::session::SuspendReason;
use twinfs_core::stamp::Seq;

use super::{Engine, Outlet};

/// What a scan has found of each volume, or why it could not end.
pub type Examined = Result<Vec<ChangeMap>, String>;

/// What status says meanwhile.
const EXAMINING: &str = "looking for changes that were made while the volumes were not mounted";

impl<O: Outlet> Engine<O> {
    /// At the start of a session: nothing is shipped before the scan has ended.
    pub(super) fn begin_examination(&mut self) {
        if self.examining && self.sender.suspended().is_none() && !self.capture.fill().suspended {
            self.sender.suspend(SuspendReason::Error);
            self.reason = Some(EXAMINING.to_owned());
        }
    }

    /// The scan has ended that [`EngineConfig::examining`](super::EngineConfig::examining) announced.
    pub fn handle_examined(&mut self, examined: Examined) {
        let maps = match examined {
            Ok(maps) => maps,
            Err(why) => {
                tracing::error!(%why, "the session stays SUSPENDED");
                self.reason = Some(why);
                return;
            }
        };
        self.examining = false;
        let was_suspended = self.capture.fill().suspended;
        if maps.iter().all(ChangeMap::is_empty) {
            tracing::info!("nothing was changed while the volumes were not mounted");
        } else {
            let objects: usize = maps.iter().map(|map| map.objects().len()).sum();
            tracing::warn!(objects, "the source was changed while it was not mounted: that is read again");
            if !was_suspended {
                self.capture.suspend_again(SuspendReason::Link, true);
                self.capture.give_up(&[]);
                // What was given up is in no set, so its numbers are free.
                self.resyncs.restart = Some(self.issued_seqs());
            }
            for (index, map) in (0..).map(VolumeIndex).zip(maps) {
                self.capture.merge_changes(index, map);
            }
        }
        if !was_suspended {
            self.end_examination();
        }
    }

    /// The last update of each volume that is in a set.
    fn issued_seqs(&self) -> Vec<Seq> {
        let links = self.volume_indices().map(|index| self.sender.link(index));
        links.map(|link| link.map_or(Seq::ZERO, |link| Seq(link.first_seq.0.saturating_sub(1)))).collect()
    }

    /// It was suspended for the scan alone, and nothing was let go that no map names.
    fn end_examination(&mut self) {
        self.reason = None;
        if self.sender.resume().is_err() {
            tracing::debug!("the session is suspended for another reason, too");
        }
    }

    /// For a clean stop: the next run begins with the same question.
    pub(super) fn leave_examination(&mut self) {
        if self.examining && !self.capture.fill().suspended {
            self.end_examination();
        }
    }
}
