//! The replica's image: a plain tree for each volume as of the last checkpoint, and the folded deltas of what came after.
//!
//! ```text
//! SITE/image/table.redb          which object is which file, and as of when the trees are   (see [`table`])
//! SITE/image/VOL/tree/           the plain tree: ordinary files, nothing of twinfs but an xattr with each object's FileId
//! SITE/image/VOL/staging/        new and moving objects of a checkpoint
//! SITE/image/VOL/graveyard/      removed files that somebody still reads, and copies of changed ones after a promote
//! ```
//!
//! * [`Image::apply_group`] shows a group: it folds the group into the live deltas and swaps one pointer.
//! * [`Image::view`] is what shows, see [`view`].
//! * [`Image::checkpoint`] writes the deltas into the trees, while groups go on being shown.
//! * [`Image::keep_open_files`] and [`Image::before_change`] keep what was opened when the site becomes a primary, whose
//!   programs change the trees.
//!
//! Volumes that are no members of the session yet (they are being copied) are folded and checkpointed like the others, but
//! do not show before the group in which they join. (A copy may bind names without saying the attributes of what they stand
//! for. Then only the tree knows the link counts, once it has all names: a volume that joined shows after the checkpoint
//! that wrote the last of them.)

pub mod files;
pub mod handle;
pub mod linux;
pub mod rebuild;
pub mod table;
pub mod view;

mod checkpoint;
mod keep;
mod table_file;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use twinfs_core::delta::{DataRef, Delta};
use twinfs_core::id::{FileId, GroupNumber, VolumeIndex, VolumeName};
use twinfs_core::limits;
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_core::update::{ID_XATTR, Op, Update};

use self::checkpoint::VolumeCheckpoint;
use self::files::{Local, Place, TreeStore};
use self::linux::{LinuxTree, OpenObjects};
use self::table::{Changes, Table, TableError, TreeState, VolumeState};
use self::view::{Alive, DataSource, OpenFiles, Preimages, Shared, View, VolumeView};
use crate::failpoint::{self, FailPoint};
use crate::storage::RealStorage;

/// Why the image could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ImageError {
    #[error("the image's directory {path}: {source}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("the plain tree: {0}")]
    Tree(#[from] io::Error),
    #[error("the journal: {0}")]
    Journal(#[source] io::Error),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("volume {0} has another root now: its tree at the primary is not the one that was mirrored")]
    OtherRoot(VolumeName),
    #[error("more than {} volumes", limits::VOLUMES_MAX)]
    TooManyVolumes,
    #[error("no volume of number {0}")]
    NoVolume(u16),
    #[error("group {given} does not follow group {shown}")]
    GroupOrder { shown: GroupNumber, given: GroupNumber },
    #[error("volume {volume}: update {given} does not follow update {last}")]
    Gap { volume: VolumeName, last: Seq, given: Seq },
    #[error("volume {0} comes twice in one group")]
    TwoRuns(VolumeName),
    #[error("update {0} is a write without data")]
    NoData(Seq),
    #[error("groups are missing that an interrupted checkpoint had begun to write into the tree")]
    Incomplete,
    #[error("the updates name {0}, of which nothing is known")]
    Missing(FileId),
    #[error("the updates make {0} without saying what it is")]
    NoAttributes(FileId),
    #[error("the earlier content of {0} was not kept")]
    NoPreimage(FileId),
}

impl ImageError {
    /// What status says of a checkpoint that failed: what is wrong, and what helps.
    #[must_use]
    pub fn trouble(&self) -> String {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let full = match self {
            Self::Tree(error) => matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge),
            Self::Table(error) => error.is_no_space(),
            _ => false,
        };
        let until = if full { "there is room" } else { "they can be written" };
        format!(
            "the plain trees (image/ in the site directory) cannot be written: {self}; mirroring goes on when {until}"
        )
    }
}

/// What an administrator may set.
#[derive(Debug, Clone, Copy)]
pub struct ImageOptions {
    /// Memory of the live delta at which a checkpoint is due, in bytes.
    pub delta_bytes_max: usize,
    /// Age of the oldest update that is not in the tree at which a checkpoint is due.
    pub checkpoint_interval: Duration,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            delta_bytes_max: limits::DELTA_BYTES_DEFAULT,
            checkpoint_interval: Duration::from_nanos(limits::CHECKPOINT_INTERVAL_NS),
        }
    }
}

/// Updates of one volume in the order of their stamps, each with the place of its data in the journal.
pub type Run = Vec<(Update, Option<DataRef>)>;

/// A consistency group, and what volumes outside it have received meanwhile.
#[derive(Debug, Default)]
pub struct Group {
    /// Its number.
    pub number: GroupNumber,
    /// Its consistency time.
    pub time: Timestamp,
    /// The updates of each volume. Those that the image has already are passed over.
    pub volumes: Vec<(VolumeIndex, Run)>,
    /// Volumes that become members with this group.
    pub joins: Vec<VolumeIndex>,
}

/// How the volumes' directories are opened.
pub type OpenStore = Box<dyn Fn(&Path) -> io::Result<Arc<dyn TreeStore>> + Send + Sync>;

/// The replica image of all volumes of a session.
pub struct Image {
    dir: PathBuf,
    open_store: OpenStore,
    options: ImageOptions,
    shared: Arc<Shared>,
    /// Held for a whole checkpoint. Taken before `state`.
    checkpointing: Mutex<()>,
    /// Taken before `shown`.
    state: Mutex<State>,
    shown: Mutex<Arc<View>>,
}

struct State {
    group: GroupNumber,
    time: Timestamp,
    volumes: Vec<Volume>,
    /// What a checkpoint in progress makes of the tree.
    freezing: Option<TreeState>,
    /// What the tree is for sure.
    tree: TreeState,
    /// What the updates must reach before anything shows: an interrupted checkpoint has already put parts of it into the
    /// tree.
    required: TreeState,
    /// Like `tree`, once no view needs the journal before it.
    checkpointed: TreeState,
    /// Since when there are updates that are neither in the tree nor frozen, in nanoseconds.
    live_since: Option<u64>,
    /// The trees are of no group, and nothing shows.
    hidden: bool,
}

/// What a checkpoint writes into one volume's tree.
struct Frozen {
    /// Index of the volume.
    at: usize,
    name: VolumeName,
    store: Arc<dyn TreeStore>,
    delta: Delta,
    member: bool,
    preimages: Arc<Preimages>,
}

struct Volume {
    view: VolumeView,
    /// The last update that was folded.
    seq: Seq,
    /// The last of those that bound a name without saying the attributes of what it stands for.
    bound_seq: Seq,
    /// Since it joined: what the tree has to hold before the volume shows.
    shows_from: Seq,
}

impl Image {
    /// Opens the image of a site, and makes an empty one if there is none.
    ///
    /// After that, the groups after the one of [`Image::checkpointed`] have to be applied again from the journal. Nothing
    /// shows before they have reached the group that an interrupted checkpoint had begun to write.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(
        site_dir: &Path,
        data: Arc<dyn DataSource>,
        options: ImageOptions,
    ) -> Result<Self, ImageError> {
        let open_objects = Arc::new(OpenObjects::default());
        let open = move |dir: &Path| LinuxTree::open(dir, &open_objects).map(|tree| Arc::new(tree) as _);
        Self::open_with(site_dir, data, options, Box::new(open))
    }

    /// Like [`Image::open`], over other trees than plain ones.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open_with(
        site_dir: &Path,
        data: Arc<dyn DataSource>,
        options: ImageOptions,
        open_store: OpenStore,
    ) -> Result<Self, ImageError> {
        let (dir, table) = open_table(site_dir)?;
        Self::open_over(dir, table, data, options, open_store)
    }

    /// Like [`Image::open`], over a table that is open. `dir` is only what paths below the image begin with.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open_over(
        dir: PathBuf,
        table: Table,
        data: Arc<dyn DataSource>,
        options: ImageOptions,
        open_store: OpenStore,
    ) -> Result<Self, ImageError> {
        let (tree, required) = table.state()?;
        let (known, earlier) = (table.preimages()?, table.attributes()?);
        let shared = Arc::new(Shared { table, data, open: OpenFiles::default(), alive: Alive::default() });
        let mut volumes = Vec::new();
        for (name, volume) in &tree.volumes {
            let store = open_volume(&open_store, &dir, name)?;
            rebuild::tidy(&*store, &known)?;
            let mut view = volume_view(name, *volume, store, &known);
            // They mask what the interrupted checkpoint may have done to them, as they did then.
            let own = earlier.iter().filter(|(volume, _)| volume == name);
            own.for_each(|(_, earlier)| view.live.fold(earlier, None));
            volumes.push(Volume::new(view, volume.seq));
        }
        let shown = Arc::new(View::new(&shared, tree.group, tree.time, Vec::new()));
        let state = State {
            group: tree.group,
            time: tree.time,
            volumes,
            freezing: None,
            checkpointed: tree.clone(),
            tree,
            required,
            live_since: None,
            hidden: false,
        };
        let (checkpointing, shown) = (Mutex::new(()), Mutex::new(shown));
        let image = Self { dir, open_store, options, shared, checkpointing, state: Mutex::new(state), shown };
        let state = image.state();
        drop(image.show(&state));
        drop(state);
        Ok(image)
    }

    /// Where the plain tree of a volume stands.
    #[must_use]
    pub fn tree_path(&self, name: &VolumeName) -> PathBuf {
        self.dir.join(name.as_str()).join("tree")
    }

    /// Adds a volume that is to be copied, or finds the one of that name. Its index is good until the image is closed.
    ///
    /// # Errors
    /// [`ImageError::OtherRoot`] if the volume of that name has another root; else see [`ImageError`].
    pub fn add_volume(&self, name: &VolumeName, root: FileId) -> Result<VolumeIndex, ImageError> {
        let _no_checkpoint = lock(&self.checkpointing);
        let mut state = self.state();
        let found = state.volumes.iter().position(|volume| volume.view.name == *name);
        if let Some(at) = found {
            let same = state.volumes[at].view.root == root;
            return if same { Ok(index(at)) } else { Err(ImageError::OtherRoot(name.clone())) };
        }
        if state.volumes.len() >= limits::VOLUMES_MAX {
            return Err(ImageError::TooManyVolumes);
        }
        let store = open_volume(&self.open_store, &self.dir, name)?;
        let local = store.place(Place::Tree);
        store.set_xattr(&local.handle, ID_XATTR, Some(&root.to_bytes()))?;
        store.sync()?;
        let volume = VolumeState { root, seq: Seq::ZERO, member: false };
        let (mut tree, mut required) = (state.tree.clone(), state.required.clone());
        tree.volumes.insert(name.clone(), volume);
        required.volumes.insert(name.clone(), volume);
        self.shared.table.commit(&Changes {
            put: &[(root, local)],
            tree: Some(&tree),
            started: Some(&required),
            ..Changes::default()
        })?;
        (state.tree, state.required) = (tree, required);
        state.checkpointed.volumes.insert(name.clone(), volume);
        let view = volume_view(name, volume, store, &BTreeMap::new());
        state.volumes.push(Volume::new(view, Seq::ZERO));
        Ok(index(state.volumes.len() - 1))
    }

    /// The volumes, their roots, and the last update of each that was folded.
    #[must_use]
    pub fn volumes(&self) -> Vec<(VolumeIndex, VolumeName, VolumeState)> {
        let state = self.state();
        let volumes = state.volumes.iter().enumerate();
        volumes.map(|(at, volume)| (index(at), volume.view.name.clone(), volume.state())).collect()
    }

    /// Folds a group into the deltas and shows it, all or nothing. The group must be durable: what a checkpoint puts into
    /// the tree must come back after a crash.
    ///
    /// # Errors
    /// See [`ImageError`]; then nothing has changed.
    pub fn apply_group(&self, group: &Group) -> Result<(), ImageError> {
        let mut state = self.state();
        if group.number < state.group {
            return Err(ImageError::GroupOrder { shown: state.group, given: group.number });
        }
        let mut changed: Vec<(usize, Folded)> = Vec::new();
        for (at, updates) in &group.volumes {
            let at = at.as_usize();
            let volume = state.volume(at)?;
            if changed.iter().any(|(known, _)| *known == at) {
                return Err(ImageError::TwoRuns(volume.view.name.clone()));
            }
            changed.push((at, volume.fold(updates)?));
        }
        for at in &group.joins {
            state.volume(at.as_usize())?;
        }
        // Nothing can fail any more.
        for (at, folded) in changed {
            let volume = &mut state.volumes[at];
            (volume.view.live, volume.seq, volume.bound_seq) = (folded.live, folded.seq, folded.bound_seq);
        }
        for at in &group.joins {
            let volume = &mut state.volumes[at.as_usize()];
            if !volume.view.member {
                (volume.view.member, volume.shows_from) = (true, volume.bound_seq);
            }
        }
        (state.group, state.time) = (group.number, group.time);
        drop(self.show(&state));
        Ok(())
    }

    /// What shows now. Hold it for one call only: a checkpoint waits for it.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&lock(&self.shown))
    }

    /// Goes back to what the trees held after the last whole checkpoint, and shows nothing: groups are lost for good that
    /// an interrupted one had begun to write. Groups can be applied, none is written into the trees. The caller remembers
    /// this durably before it calls, and calls again after each start, until [`Image::reveal`].
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn hide(&self) -> Result<(), ImageError> {
        let mut state = self.state();
        let tree = state.tree.clone();
        state.hidden = true;
        for volume in &mut state.volumes {
            let Some(held) = tree.volumes.get(&volume.view.name) else { continue };
            volume.view.live = Delta::default();
            (volume.view.frozen, volume.view.member) = (None, held.member);
            (volume.seq, volume.bound_seq, volume.shows_from) = (held.seq, Seq::ZERO, Seq::ZERO);
        }
        (state.group, state.time, state.freezing) = (tree.group, tree.time, None);
        (state.required, state.live_since) = (tree.clone(), None);
        drop(self.show(&state));
        // What is said of the trees from here on is told by other means.
        Ok(self.shared.table.commit(&Changes { started: Some(&tree), ..Changes::default() })?)
    }

    /// Shows again: the groups that were applied since [`Image::hide`] say all of every object that may be half written.
    pub fn reveal(&self) {
        let mut state = self.state();
        state.hidden = false;
        drop(self.show(&state));
    }

    /// Whether everything that was applied stands in the trees, durably.
    #[must_use]
    pub fn is_written(&self) -> bool {
        let state = self.state();
        !state.hidden && state.as_tree().volumes == state.checkpointed.volumes
    }

    /// Whether groups are still missing that an interrupted checkpoint had begun to write; until then nothing shows.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        !self.state().is_complete()
    }

    /// Whether it is time for a checkpoint. `now_ns` is on any steady clock, in nanoseconds; the age of what is not in the
    /// tree counts from the first time that this is asked. Ask after each group.
    #[must_use]
    pub fn checkpoint_due(&self, now_ns: u64) -> bool {
        let mut state = self.state();
        if state.live_since.is_none() && state.volumes.iter().any(|volume| !volume.view.live.is_empty()) {
            state.live_since = Some(now_ns);
        }
        let interval_ns = u64::try_from(self.options.checkpoint_interval.as_nanos()).unwrap_or(u64::MAX);
        let full = state.live_bytes() >= self.options.delta_bytes_max;
        let old = state.live_since.is_some_and(|since| now_ns.saturating_sub(since) >= interval_ns);
        let awaited = state.volumes.iter().any(|volume| volume.shows_from > state.tree_seq(volume));
        state.is_complete() && (state.freezing.is_some() || full || old || awaited)
    }

    /// Estimated memory of all deltas, in bytes. Above [`Self::memory_bytes_max`], checkpoints do not keep up, and
    /// no group should be applied before the one in progress has ended.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let state = self.state();
        let frozen = state.volumes.iter().filter_map(|volume| volume.view.frozen.as_ref());
        state.live_bytes() + frozen.map(Delta::bytes).sum::<usize>()
    }

    /// The memory above which no group should be applied, in bytes.
    #[must_use]
    pub fn memory_bytes_max(&self) -> usize {
        2 * self.options.delta_bytes_max
    }

    /// As of when the plain trees are, durably. The journal up to there is not needed any longer.
    #[must_use]
    pub fn checkpointed(&self) -> TreeState {
        self.state().checkpointed.clone()
    }

    /// Writes everything that was applied by now into the plain trees, and makes it durable. Blocks; call it on a thread of
    /// its own. After an error it can be called again.
    ///
    /// # Errors
    /// See [`ImageError`]. What shows is right nevertheless.
    pub fn checkpoint(&self) -> Result<(), ImageError> {
        let _one_at_a_time = lock(&self.checkpointing);
        let Some((target, mut frozen)) = self.freeze()? else { return Ok(()) };

        // What shows is not touched yet.
        let (mut prepared, mut earlier) = (checkpoint::Prepared::default(), Vec::new());
        let mut runs = Vec::new();
        for volume in &frozen {
            let mut run = VolumeCheckpoint::new(&self.shared, &volume.store, &volume.delta, !volume.member);
            let own = run.prepare()?;
            prepared.new.extend(own.new);
            prepared.preimages.extend(own.preimages);
            let attributes = own.attributes.into_iter();
            earlier.extend(attributes.map(|(file, update)| (volume.name.clone(), file, update)));
            runs.push(run.pause());
        }
        failpoint::pass(FailPoint::CheckpointPrepared);
        // Durable before the first change to anything that shows, see `table`.
        self.shared.table.commit(&Changes {
            put: &prepared.new,
            put_preimages: &prepared.preimages,
            put_attributes: &earlier,
            started: Some(&target),
            ..Changes::default()
        })?;
        failpoint::pass(FailPoint::CheckpointStarted);
        let serial = self.mask(&mut frozen, &earlier, &prepared.preimages);
        self.shared.alive.wait_for(serial);

        let mut gone = Vec::new();
        for (volume, run) in frozen.iter().zip(runs) {
            let mut run = VolumeCheckpoint::resume(run, &self.shared, &volume.store, &volume.delta);
            run.write(&volume.preimages)?;
            gone.extend(run.gone()?);
            failpoint::pass(FailPoint::CheckpointSynced);
        }
        failpoint::pass(FailPoint::CheckpointWritten);
        self.shared.table.commit(&Changes {
            remove: &gone,
            clear_earlier: true,
            tree: Some(&target),
            ..Changes::default()
        })?;
        failpoint::pass(FailPoint::CheckpointDone);
        let serial = self.thaw(&target);
        // From here on nobody asks for earlier content, nor for what stands in the journal up to here.
        self.shared.alive.wait_for(serial);
        self.state().checkpointed = target;
        for volume in &frozen {
            VolumeCheckpoint::remove_preimages(&*volume.store, &volume.preimages);
        }
        Ok(())
    }

    /// Makes the live deltas the frozen ones, unless there are frozen ones of a checkpoint that failed. Returns the state
    /// that the tree shall get, and what is frozen; `None` if there is nothing to do.
    fn freeze(&self) -> Result<Option<(TreeState, Vec<Frozen>)>, ImageError> {
        let mut state = self.state();
        if !state.is_complete() {
            return Err(ImageError::Incomplete);
        }
        let target = match state.freezing.clone() {
            Some(target) => target,
            None => {
                let target = state.as_tree();
                if target.volumes == state.tree.volumes {
                    return Ok(None);
                }
                for volume in &mut state.volumes {
                    volume.view.frozen = Some(std::mem::take(&mut volume.view.live));
                }
                (state.freezing, state.live_since) = (Some(target.clone()), None);
                drop(self.show(&state));
                target
            }
        };
        let frozen = state.volumes.iter().enumerate().filter_map(|(at, volume)| {
            let view = &volume.view;
            let delta = view.frozen.clone().filter(|delta| !delta.is_empty())?;
            let name = view.name.clone();
            Some(Frozen {
                at,
                name,
                store: Arc::clone(&view.store),
                delta,
                member: view.member,
                preimages: Arc::clone(&view.preimages),
            })
        });
        Ok(Some((target, frozen.collect())))
    }

    /// Shows views that mask all that the checkpoint is going to change, also what its delta alone would not.
    fn mask(
        &self,
        frozen: &mut [Frozen],
        earlier: &[(VolumeName, FileId, Update)],
        preimages: &[(FileId, Local)],
    ) -> u64 {
        let mut state = self.state();
        for volume in frozen {
            let view = &mut state.volumes[volume.at].view;
            let own = earlier.iter().filter(|(name, ..)| *name == volume.name);
            own.for_each(|(_, _, earlier)| volume.delta.fold(earlier, None));
            let known = volume.preimages.iter().map(|(file, local)| (*file, local.clone()));
            volume.preimages = Arc::new(known.chain(preimages.iter().cloned()).collect());
            (view.frozen, view.preimages) = (Some(volume.delta.clone()), Arc::clone(&volume.preimages));
        }
        self.show(&state).1
    }

    /// Drops the frozen deltas: the tree has them.
    fn thaw(&self, target: &TreeState) -> u64 {
        let mut state = self.state();
        for volume in &mut state.volumes {
            volume.view.frozen = None;
            volume.view.preimages = Arc::default();
        }
        state.freezing = None;
        (state.tree, state.required) = (target.clone(), target.clone());
        self.show(&state).1
    }

    /// Swaps the pointer. Returns the view that was shown before, and the serial number of the new one.
    fn show(&self, state: &State) -> (Arc<View>, u64) {
        let complete = state.is_complete();
        let volumes = state.volumes.iter().map(|volume| VolumeView {
            member: complete && volume.shows(state.tree_seq(volume)),
            ..volume.view.clone()
        });
        let view = Arc::new(View::new(&self.shared, state.group, state.time, volumes.collect()));
        let serial = view.serial();
        (std::mem::replace(&mut *lock(&self.shown), view), serial)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl State {
    fn volume(&self, at: usize) -> Result<&Volume, ImageError> {
        self.volumes.get(at).ok_or(ImageError::NoVolume(u16::try_from(at).unwrap_or(u16::MAX)))
    }

    fn live_bytes(&self) -> usize {
        self.volumes.iter().map(|volume| volume.view.live.bytes()).sum()
    }

    fn as_tree(&self) -> TreeState {
        let volumes = self.volumes.iter().map(|volume| (volume.view.name.clone(), volume.state()));
        TreeState { group: self.group, time: self.time, volumes: volumes.collect() }
    }

    /// The last update of a volume that the tree holds.
    fn tree_seq(&self, volume: &Volume) -> Seq {
        self.tree.volumes.get(&volume.view.name).map_or(Seq::ZERO, |tree| tree.seq)
    }

    /// Whether every volume has what an interrupted checkpoint had begun to write. The number of the group does not count:
    /// groups without updates need not be durable.
    fn is_complete(&self) -> bool {
        !self.hidden
            && self.volumes.iter().all(|volume| {
                let required = self.required.volumes.get(&volume.view.name);
                required.is_none_or(|required| volume.seq >= required.seq)
            })
    }
}

/// What folding the updates of a group makes of a volume.
struct Folded {
    live: Delta,
    seq: Seq,
    bound_seq: Seq,
}

impl Volume {
    fn new(view: VolumeView, seq: Seq) -> Self {
        Self { view, seq, bound_seq: Seq::ZERO, shows_from: Seq::ZERO }
    }

    fn fold(&self, updates: &[(Update, Option<DataRef>)]) -> Result<Folded, ImageError> {
        let (mut live, mut seq, mut bound_seq) = (self.view.live.clone(), self.seq, self.bound_seq);
        for (update, data) in updates.iter().filter(|(update, _)| update.stamp.seq > self.seq) {
            if update.stamp.seq != seq.next() {
                let volume = self.view.name.clone();
                return Err(ImageError::Gap { volume, last: seq, given: update.stamp.seq });
            }
            seq = update.stamp.seq;
            match update.op {
                Op::Write { .. } if data.is_none() => return Err(ImageError::NoData(seq)),
                Op::Bind { file, .. } if update.attrs.get(file).is_none() => bound_seq = seq,
                _ => {}
            }
            live.fold(update, *data);
        }
        Ok(Folded { live, seq, bound_seq })
    }

    /// Whether the volume shows, over a tree that holds all updates up to `tree_seq`.
    fn shows(&self, tree_seq: Seq) -> bool {
        self.view.member && self.shows_from <= tree_seq
    }

    fn state(&self) -> VolumeState {
        VolumeState { root: self.view.root, seq: self.seq, member: self.view.member }
    }
}

fn volume_view(
    name: &VolumeName,
    volume: VolumeState,
    store: Arc<dyn TreeStore>,
    preimages: &BTreeMap<FileId, Local>,
) -> VolumeView {
    VolumeView {
        name: name.clone(),
        root: volume.root,
        member: volume.member,
        store,
        live: Delta::default(),
        frozen: None,
        preimages: Arc::new(preimages.iter().map(|(file, local)| (*file, local.clone())).collect()),
    }
}

/// Opens the table below a site's directory; returns the image's directory, too.
fn open_table(site_dir: &Path) -> Result<(PathBuf, Table), ImageError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let dir = site_dir.join("image");
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|source| ImageError::Directory { path: dir.clone(), source })?;
    let storage = RealStorage::open(&dir).map_err(TableError::Storage)?;
    let table = Table::open(Arc::new(storage))?;
    Ok((dir, table))
}

fn open_volume(open: &OpenStore, dir: &Path, name: &VolumeName) -> Result<Arc<dyn TreeStore>, ImageError> {
    let path = dir.join(name.as_str());
    open(&path).map_err(|source| ImageError::Directory { path, source })
}

fn index(at: usize) -> VolumeIndex {
    VolumeIndex(u16::try_from(at).expect("an image has at most VOLUMES_MAX volumes"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
