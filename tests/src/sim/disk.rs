//! The simulated machine of a replica: one power for the disks of journal, control file, file table and trees.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use twinfs_replicator::replica::engine::{OpenImage, SiteStore};
use twinfs_replicator::replica::image::files::TreeStore;
use twinfs_replicator::replica::image::table::Table;
use twinfs_replicator::replica::image::{Image, ImageOptions, OpenStore};
use twinfs_replicator::site::{SiteError, State};
use twinfs_replicator::storage::{self, Power, SimStorage, Storage, StorageError};

use super::tree::SimFs;

const CONTROL_FILE: &str = "state.json";

/// How a machine comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The process died: everything written is there.
    Process,
    /// The power went: a crash image, drawn from this seed.
    Power(u64),
}

/// The directory of the journal, and which one was put aside last. That a directory has another name is durable at once.
#[derive(Debug)]
struct Journals {
    current: SimStorage,
    aside: u64,
}

/// Clones are the same machine.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) power: Power,
    journals: Arc<Mutex<Journals>>,
    control: SimStorage,
    table: SimStorage,
    pub(crate) trees: SimFs,
    /// A directory of the real machine, for the report of a promote.
    reports: Arc<OnceLock<PathBuf>>,
}

impl Machine {
    pub(crate) fn new(seed: u64) -> Self {
        let power = Power::default();
        let disk = |number| SimStorage::new(seed ^ number).powered_by(&power);
        Self {
            journals: Arc::new(Mutex::new(Journals { current: disk(1), aside: 0 })),
            control: disk(2),
            table: disk(3),
            trees: SimFs::new(&power),
            reports: Arc::default(),
            power: power.clone(),
        }
    }

    /// The machine as it comes back.
    pub(crate) fn again(&self, loss: Loss) -> Self {
        let power = Power::default();
        let disk = |disk: &SimStorage, number: u64| match loss {
            Loss::Process => disk.restart(),
            Loss::Power(seed @ 0..=1) => disk.crash(seed),
            Loss::Power(seed) => disk.crash(seed.wrapping_add(number).max(2)),
        };
        let trees = match loss {
            Loss::Process => self.trees.restart(&power),
            Loss::Power(seed) => self.trees.crash(seed, &power),
        };
        let current = disk(&self.journal_disk(), 1).powered_by(&power);
        let aside = self.journals().aside;
        Self {
            journals: Arc::new(Mutex::new(Journals { current, aside })),
            control: disk(&self.control, 2).powered_by(&power),
            table: disk(&self.table, 3).powered_by(&power),
            trees,
            reports: Arc::default(),
            power,
        }
    }

    fn journals(&self) -> MutexGuard<'_, Journals> {
        self.journals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory of the journal.
    pub(crate) fn journal_disk(&self) -> SimStorage {
        self.journals().current.clone()
    }

    /// Another machine with the same on its disks; this one goes on.
    pub(crate) fn fork(&self) -> Self {
        self.again(Loss::Process)
    }

    /// Keeps reports of a promote in a real directory.
    pub(crate) fn keep_reports(&self, dir: &Path) {
        // All of a run are kept in one place.
        let _ = self.reports.set(dir.to_owned());
    }

    /// The control file, if there is one, as the site directory of production reads it.
    pub(crate) fn state(&self) -> Result<Option<State>, StorageError> {
        self.control.sync_dir()?;
        let text = self.control.bytes(CONTROL_FILE);
        Ok(text.map(|text| State::decode(&text).expect("the control file is replaced as a whole")))
    }

    /// Opens the image over this machine.
    pub(crate) fn open_image(&self, options: ImageOptions) -> OpenImage {
        let machine = self.clone();
        Box::new(move |data| {
            let table = Table::open(Arc::new(machine.table.clone()))?;
            let open: OpenStore = Box::new(move |dir: &Path| {
                let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Ok(Arc::new(machine.trees.open(&name)) as Arc<dyn TreeStore>)
            });
            Image::open_over(PathBuf::from("/simulated/image"), table, data, options, open)
        })
    }
}

impl SiteStore for Machine {
    fn save_state(&self, state: &State) -> Result<(), SiteError> {
        let text = state.encode().expect("a state is JSON");
        storage::replace_durably(&self.control, CONTROL_FILE, &text).map_err(|error| SiteError::Io {
            action: "write",
            path: CONTROL_FILE.into(),
            source: error.into_io(),
        })
    }

    fn journal(&self) -> Result<Arc<dyn Storage>, StorageError> {
        Ok(Arc::new(self.journal_disk()))
    }

    fn set_journal_aside(&self, number: u64) -> Result<(), SiteError> {
        if self.power.is_off() {
            let source = io::ErrorKind::BrokenPipe.into();
            return Err(SiteError::Io { action: "rename", path: "journal".into(), source });
        }
        let mut journals = self.journals();
        if journals.aside < number {
            *journals = Journals { current: SimStorage::new(number).powered_by(&self.power), aside: number };
        }
        Ok(())
    }

    fn directory(&self) -> io::Result<&Path> {
        self.reports.get().map(PathBuf::as_path).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn free_bytes(&self) -> u64 {
        self.journal_disk().free_bytes().unwrap_or(0)
    }
}
