//! The copies and resyncs of a primary's volumes that are under way, and the change maps that wait for the next run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{VolumeIndex, VolumeName};
use twinfs_replicator::primary::mover::CopyProgress;
use twinfs_replicator::primary::sidefile::Capture;
use twinfs_replicator::site::{SiteDir, replace_durably};

use crate::copier::{Copier, CopyState};
use crate::mirror::Mirror;

/// What copies and rereads volumes, at most one thread for each.
#[derive(Debug)]
pub(crate) struct Copies {
    capture: Arc<Capture>,
    running: Mutex<BTreeMap<VolumeIndex, Running>>,
}

#[derive(Debug)]
enum Running {
    Copy(Copier),
    Resync(Copier),
    /// A resync that could not begin, with its map.
    Failed(ChangeMap),
}

impl Copies {
    pub(crate) fn new(capture: Arc<Capture>) -> Self {
        Self { capture, running: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeIndex, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a prepared copy going.
    pub(crate) fn start_copy(&self, mirror: Arc<Mirror>, state: Arc<CopyState>) -> std::io::Result<()> {
        let volume = state.volume();
        let copier = Copier::start(mirror, Arc::clone(&self.capture) as _, state)?;
        self.lock().insert(volume, Running::Copy(copier));
        Ok(())
    }

    /// Begins the copy of a volume anew.
    pub(crate) fn restart_copy(&self, mirror: Arc<Mirror>, volume: VolumeIndex) {
        self.lock().remove(&volume);
        let started = Copier::prepare(&mirror, volume, None)
            .map_err(anyhow::Error::from)
            .and_then(|state| Ok(self.start_copy(mirror, state)?));
        if let Err(error) = started {
            tracing::error!(%error, "the copy cannot begin again before the next start");
        }
    }

    pub(crate) fn start_resync(&self, mirror: Arc<Mirror>, volume: VolumeIndex, map: ChangeMap) {
        let state = match Copier::prepare_resync(&mirror, volume, map.clone()) {
            Ok(state) => state,
            Err(error) => {
                tracing::error!(%error, "the resync cannot begin");
                self.lock().insert(volume, Running::Failed(map));
                return;
            }
        };
        let running = match Copier::start(Arc::clone(&mirror), Arc::clone(&self.capture) as _, state) {
            Ok(copier) => Running::Resync(copier),
            Err(error) => {
                tracing::error!(%error, "the resync cannot begin");
                Copier::abandon(&mirror, volume);
                Running::Failed(map)
            }
        };
        self.lock().insert(volume, running);
    }

    /// Ends whatever runs for a volume; returns what is left of a resync.
    pub(crate) fn stop_resync(&self, volume: VolumeIndex) -> Option<ChangeMap> {
        let running = self.lock().remove(&volume)?;
        match running {
            Running::Copy(copier) => {
                drop(copier);
                None
            }
            Running::Resync(copier) => Some(copier.leave()),
            Running::Failed(map) => Some(map),
        }
    }

    pub(crate) fn resync_failed(&self, volume: VolumeIndex) -> bool {
        match self.lock().get(&volume) {
            Some(Running::Resync(copier)) => copier.has_ended() && !copier.is_complete(),
            Some(Running::Failed(_)) => true,
            Some(Running::Copy(_)) | None => false,
        }
    }

    pub(crate) fn progress(&self, volume: VolumeIndex) -> Option<CopyProgress> {
        match self.lock().get(&volume)? {
            Running::Copy(copier) | Running::Resync(copier) => Some(copier.progress()),
            Running::Failed(_) => None,
        }
    }

    /// Stops every thread, for good. What is left is for [`Self::take_copies`] and [`Self::stop_resync`].
    pub(crate) fn halt(&self) {
        for running in self.lock().values_mut() {
            if let Running::Copy(copier) | Running::Resync(copier) = running {
                copier.halt();
            }
        }
    }

    /// The states of the copies to go on from, `None` of those that are complete. Nothing may be published any more.
    pub(crate) fn take_copies(&self) -> Vec<(VolumeIndex, Option<Vec<u8>>)> {
        let mut running = self.lock();
        let copies: Vec<VolumeIndex> = running
            .iter()
            .filter(|(_, running)| matches!(running, Running::Copy(_)))
            .map(|(volume, _)| *volume)
            .collect();
        let taken = copies.into_iter().filter_map(|volume| Some((volume, running.remove(&volume)?)));
        let stopped = taken.filter_map(|(volume, running)| match running {
            Running::Copy(copier) => Some((volume, copier.stop())),
            Running::Resync(_) | Running::Failed(_) => None,
        });
        stopped.collect()
    }
}

fn path_of(site: &SiteDir, volume: &VolumeName) -> PathBuf {
    site.path().join("changes").join(volume.as_str())
}

/// Keeps what the next run has to read again; nothing, if nothing was dropped.
pub(crate) fn save_changes(
    site: &SiteDir,
    volume: &VolumeName,
    changes: Option<&ChangeMap>,
) -> anyhow::Result<()> {
    let path = path_of(site, volume);
    match changes {
        Some(changes) => Ok(replace_durably(&path, &changes.encode())?),
        None => match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        },
    }
}

/// What the last run kept; `None` if that is nothing.
pub(crate) fn load_changes(site: &SiteDir, volume: &VolumeName) -> anyhow::Result<Option<ChangeMap>> {
    let path = path_of(site, volume);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        Ok(bytes) => {
            let map = ChangeMap::decode(&bytes);
            Ok(Some(map.with_context(|| format!("{} cannot be used", path.display()))?))
        }
    }
}
