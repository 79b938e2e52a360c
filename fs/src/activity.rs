//! The activity log of a running primary: opened at its start, and looked after.

use std::sync::{Arc, Mutex, PoisonError};

use std::collections::HashSet;

use anyhow::Context;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{FileId, SessionId, VolumeIndex};
use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::activity_log::{
    ActivityConfig, ActivityLog, Found, Keeper, KeeperParts, KeeperThread,
};
use twinfs_replicator::primary::mover::Primary;
use twinfs_replicator::primary::sidefile::Capture;
use twinfs_replicator::site::SiteDir;
use twinfs_replicator::storage::RealStorage;

use crate::mirror::Mirror;

/// How far the clocks of sites and file systems may lie apart, in nanoseconds.
const CLOCK_MARGIN_NS: u64 = 30_000_000_000;

/// The log, and what the runs before left in it.
#[derive(Debug)]
pub struct Activity {
    /// The log.
    pub log: Arc<ActivityLog>,
    /// What has to be compared, if power failed. It stays in the log until [`ActivityLog::settle_found`].
    pub found: Found,
}

impl Activity {
    /// Opens the log of a site.
    ///
    /// # Errors
    /// If the directory cannot be used, or the log is of a newer version.
    pub fn open(site: &SiteDir, session: SessionId, now: Timestamp) -> anyhow::Result<Self> {
        let storage = Arc::new(RealStorage::open(&site.activity())?);
        let (log, found) = ActivityLog::open(storage, session, now, ActivityConfig::default())
            .context("cannot use the activity log")?;
        Ok(Self { log: Arc::new(log), found })
    }

    /// Tells what a power loss left to compare.
    pub fn report(&self) {
        let Found { files, everything, since } = &self.found;
        let files = files.len();
        tracing::warn!(files, everything, %since, "power was lost: these files may differ between the sites");
    }

    /// What has to be read again of a volume, so that the two sites are equal, wherever the replica stands: what the log
    /// names, and what came into its directories right before power failed, when the log was not yet written.
    #[must_use]
    pub fn changes(&self, mirror: &Mirror, volume: VolumeIndex) -> ChangeMap {
        let mut map = ChangeMap::default();
        if self.found.everything {
            map.note_everything();
            return map;
        }
        let mine = self.found.files.iter().filter(|(index, _)| *index == volume);
        let mut left: Vec<FileId> = mine.map(|(_, file)| *file).collect();
        left.iter().for_each(|file| map.note_whole(*file));
        let mut seen: HashSet<FileId> = left.iter().copied().collect();
        let since = Timestamp(self.found.since.0.saturating_sub(CLOCK_MARGIN_NS));
        while let Some(file) = left.pop() {
            match mirror.children_changed_since(volume, file, since) {
                Ok(children) => {
                    for child in children.into_iter().filter(|child| seen.insert(*child)) {
                        map.note_whole(child);
                        left.push(child);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a directory cannot be listed: the volume is compared as a whole");
                    map.note_everything();
                    return map;
                }
            }
        }
        map
    }

    /// Names what a killed run left in the sidefile: its log may have lacked the last of that, and it is shipped only now.
    pub fn name_queued(&self, capture: &Capture) {
        for (volume, map) in (0..).map(VolumeIndex).zip(capture.touched_by_queue()) {
            for (file, _) in map.objects() {
                // If the log cannot take it, nothing is shipped, and that is said there.
                drop(self.log.touch(volume, std::iter::once(file)));
            }
        }
    }

    /// Has eras end, and go when both sites have what they name.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn keep(
        &self,
        capture: Arc<Capture>,
        mirrors: Vec<Arc<Mirror>>,
        primary: Arc<Mutex<Option<Primary>>>,
    ) -> std::io::Result<KeeperThread> {
        let both_have = move || {
            let primary = primary.lock().unwrap_or_else(PoisonError::into_inner);
            primary.as_ref().map_or(Timestamp::ZERO, Primary::both_have)
        };
        Keeper::new(KeeperParts {
            log: Arc::clone(&self.log),
            sync_backing: Box::new(move || mirrors.iter().try_for_each(|mirror| mirror.sync())),
            applied: Box::new(both_have),
            now: Box::new(move || capture.now()),
        })
        .start()
    }
}
