//! The primary's daemon: sidefile, mirrors, mounts and the replication session, put together and taken apart.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use twinfs_certs::Identity;
use twinfs_core::change_map::ChangeMap;
use twinfs_core::id::{
    Epoch, FileId, Incarnation, SessionId, SiteName, VolumeIndex, VolumeInstance, VolumeName,
};
use twinfs_core::limits;
use twinfs_core::session::sender::{IssuedSet, SenderConfig, SenderVolume};
use twinfs_core::session::{ChainPoint, Role, SuspendReason, VolumeState as CopyState};
use twinfs_core::stamp::{Seq, Timestamp};
use twinfs_replicator::control::{self, Answer, Handler, Request};
use twinfs_replicator::failpoint::{self, FailPoint};
use twinfs_replicator::primary::activity_log::KeeperThread;
use twinfs_replicator::primary::chain::{PathHints, SetMaker, SetOrigin, SetVolume};
use twinfs_replicator::primary::clock::Reading;
use twinfs_replicator::primary::mover::{CopyProgress, Files, Primary, PrimaryParts, Replica};
use twinfs_replicator::primary::sidefile::{Capture, LeftIntent, Overflow, SitePart, Start, Survivors};
use twinfs_replicator::primary::start::{self, LastRun};
use twinfs_replicator::primary::store::{self, MarkKeeper};
use twinfs_replicator::site::{SiteDir, State, VolumeState, replace_durably};

use crate::activity::Activity;
use crate::copier::Copier;
use crate::copies::{self, Copies};
use crate::daemon::{self, Ended};
use crate::holders;
use crate::mirror::{self, Layout, Mirror, VolumeSource};
use crate::mount::{MountOptions, Mounted};
use crate::recorder::{Logged, Recorder};
use crate::scan::Scan;

/// How often, and after which pause, somebody who holds a source open is looked at again.
const DYING_LOOKS: u32 = 5;
const DYING_PAUSE: Duration = Duration::from_millis(200);
/// Longer than change times stand still.
const CHANGE_TIME_TICK: Duration = Duration::from_millis(40);
/// How long programs have to come into the hold, before a mount that they use is taken away.
const HOLD_PAUSE: Duration = Duration::from_millis(200);
/// How long a clean stop waits for the replica to take what is left; the rest is kept for the next start.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// A volume to mirror.
#[derive(Debug, Clone)]
pub struct Mirrored {
    /// Its name in the session.
    pub volume: VolumeName,
    /// The directory, canonical.
    pub source: PathBuf,
    /// Where it is mounted, canonical; may be the directory itself.
    pub mountpoint: PathBuf,
}

/// What `twinfs mount` was asked for.
#[derive(Debug)]
pub struct PrimaryArguments {
    /// The site directory.
    pub site: SiteDir,
    /// The volumes.
    pub mirrored: Vec<Mirrored>,
    /// The replica's site.
    pub peer: SiteName,
    /// `HOST:PORT`.
    pub address: String,
    /// Mount although processes hold a source open.
    pub force: bool,
    /// Size of the sidefile.
    pub sidefile_bytes: u64,
    /// Compression level.
    pub level: i32,
}

/// Runs the primary until a signal or an unmount ends it. Calls `ready` once the mounts are usable.
///
/// # Errors
/// Why it does not start, or did not end cleanly, for the user.
pub fn run(arguments: PrimaryArguments, ready: &dyn Fn()) -> anyhow::Result<()> {
    let identity = Arc::new(twinfs_certs::load(arguments.site.path())?);
    let _lock = arguments.site.lock()?;
    let state = state_of(&arguments, &identity)?;
    check_sources(&arguments)?;
    let running = Running::start(arguments, identity, state)?;
    ready();
    match running.mounts.wait() {
        Ended::Signal(name) => tracing::info!(signal = name, "stopping"),
        Ended::Unmounted => tracing::info!("unmounted; stopping"),
    }
    running.stop()
}

/// The control file as it shall be for this run.
fn state_of(arguments: &PrimaryArguments, identity: &Identity) -> anyhow::Result<State> {
    let site = arguments.site.path().display();
    let mut state = match arguments.site.state()? {
        None => State::new(Role::Primary, Epoch { number: 1, site: identity.id() }),
        Some(state) => state,
    };
    match state.role {
        Role::Primary | Role::Fenced => {}
        Role::Replica => bail!("{site} is the site of a replica: start it with `twinfs replica`"),
        Role::Promoted => bail!("{site} was promoted: start it with `twinfs replica`, as before"),
    }
    if let Some(peer) = &state.peer {
        ensure!(
            *peer == arguments.peer,
            "this session is paired with the site {peer}, not with {}: use another site directory for another pair",
            arguments.peer
        );
    }
    for known in &state.volumes {
        ensure!(
            arguments.mirrored.iter().any(|mirrored| mirrored.volume == known.name),
            "the volume {} ({}) belongs to this session and must be mounted with it: its part of the consistency time \
             would stand still",
            known.name,
            known.source.display()
        );
    }
    state.peer = Some(arguments.peer.clone());
    if state.session.is_none() {
        state.session = Some(SessionId::from_bytes(daemon::random()?));
    }
    Ok(state)
}

fn check_sources(arguments: &PrimaryArguments) -> anyhow::Result<()> {
    let site = arguments.site.path().canonicalize().context("cannot use the site directory")?;
    for mirrored in &arguments.mirrored {
        for path in [&mirrored.source, &mirrored.mountpoint] {
            ensure!(
                !site.starts_with(path) && !path.starts_with(&site),
                "the site directory {} and {} contain one another: twinfs would mirror its own journal",
                site.display(),
                path.display()
            );
        }
        for nested in holders::nested_mounts(&mirrored.source)? {
            tracing::warn!(mount = %nested.display(), "is mounted inside the source: not mirrored");
        }
        let holders = lasting_holders(&mirrored.source, arguments.force)
            .with_context(|| format!("cannot find out who uses {}", mirrored.source.display()))?;
        for holder in &holders {
            let (pid, name, path) = (holder.pid, &holder.name, holder.path.display());
            tracing::warn!(pid, name, %path, "holds the source open");
        }
        if !holders.is_empty() && !arguments.force {
            let mut list = String::new();
            for holder in &holders {
                list.push_str(&format!("\n  {} ({}): {}", holder.pid, holder.name, holder.path.display()));
            }
            bail!(
                "these processes hold {} open and would write past the mirror; stop them, or mount with --force:{list}",
                mirrored.source.display()
            );
        }
    }
    Ok(())
}

/// Who holds a source open for longer than a moment: a daemon that was killed needs one to go.
fn lasting_holders(source: &Path, force: bool) -> std::io::Result<Vec<holders::Holder>> {
    for _ in 0..if force { 0 } else { DYING_LOOKS } {
        let found = holders::holders(source)?;
        if found.is_empty() {
            return Ok(found);
        }
        std::thread::sleep(DYING_PAUSE);
    }
    holders::holders(source)
}

/// A volume with its mirror, before it is mounted.
struct Opened {
    mirrored: Mirrored,
    mirror: Arc<Mirror>,
    root: FileId,
    state: VolumeState,
}

/// What the mover asks the file system layer.
struct Layer {
    mirrors: Vec<Arc<Mirror>>,
    copies: Copies,
}

impl PathHints for Layer {
    fn path_of(&self, volume: VolumeIndex, file: FileId) -> Box<[u8]> {
        self.mirrors.get(volume.as_usize()).map_or_else(Box::default, |mirror| mirror.path_of(volume, file))
    }
}

impl Files for Layer {
    fn copy_progress(&self, volume: VolumeIndex) -> Option<CopyProgress> {
        self.copies.progress(volume)
    }

    fn start_resync(&self, volume: VolumeIndex, map: ChangeMap) {
        self.copies.start_resync(Arc::clone(&self.mirrors[volume.as_usize()]), volume, map);
    }

    fn stop_resync(&self, volume: VolumeIndex) -> Option<ChangeMap> {
        self.copies.stop_resync(volume)
    }

    fn resync_failed(&self, volume: VolumeIndex) -> bool {
        self.copies.resync_failed(volume)
    }

    fn restart_copy(&self, volume: VolumeIndex) {
        self.copies.restart_copy(Arc::clone(&self.mirrors[volume.as_usize()]), volume);
    }
}

/// A running primary.
struct Running {
    site: SiteDir,
    state: Arc<Mutex<State>>,
    capture: Arc<Capture>,
    activity: Activity,
    keeper: KeeperThread,
    scan: Option<Scan>,
    layer: Arc<Layer>,
    primary: Arc<Mutex<Option<Primary>>>,
    mark: MarkKeeper,
    mounts: daemon::Mounts,
    _control: control::Server,
}

impl Running {
    fn start(arguments: PrimaryArguments, identity: Arc<Identity>, mut state: State) -> anyhow::Result<Self> {
        let site = arguments.site.clone();
        let session = state.session.context("the session was given an identity")?;
        let sources = open_sources(&arguments.mirrored)?;
        let order = session_order(&state, &arguments.mirrored);
        let (capture, last_run) =
            open_sidefile(&site, session, &state, arguments.sidefile_bytes, order.len())?;
        let capture = Arc::new(capture);
        let activity = Activity::open(&site, session, capture.now())?;
        let recorder: Arc<dyn Recorder> =
            Arc::new(Logged::new(Arc::clone(&capture), Arc::clone(&activity.log)));
        // What the log of a run like this names is dealt with once both sites have all that is stamped from here on.
        activity.log.settle_found(capture.now());
        match &last_run {
            LastRun::Killed { survivors, .. } if !survivors.dropped => tracing::warn!(
                updates = survivors.updates,
                under_way = survivors.intents.len(),
                "the last run was killed; what it captured is in the sidefile, and goes to the replica now"
            ),
            LastRun::Lost { .. } => activity.report(),
            LastRun::Clean(_) | LastRun::Killed { .. } => {}
        }
        let suspended = start::suspension(&state, &last_run);
        let reason =
            suspended.map(|_| last_run.why_suspended().unwrap_or("since before the last stop").to_owned());
        let mark = MarkKeeper::start(site.clone(), Arc::clone(&capture))?;
        let opened = open_mirrors(&state, &arguments.mirrored, &order, sources, &recorder)?;
        let source = Source { site: &site, activity: &activity, opened: &opened };
        activity.name_queued(&capture);
        let covered = start::take_up(&capture, &last_run, suspended, &source)?;
        if suspended.is_some() {
            tracing::error!(reason, "the session is SUSPENDED: the mount works, but nothing is mirrored");
        }

        let config = SenderConfig {
            session,
            site: identity.id(),
            name: identity.name().clone(),
            epoch: state.epoch,
            incarnation: Incarnation(u64::from_le_bytes(daemon::random()?)),
        };
        let volumes: Vec<SetVolume> = opened
            .iter()
            .map(|opened| SetVolume {
                name: opened.state.name.clone(),
                instance: opened.state.instance,
                root: opened.root,
            })
            .collect();
        let origin = SetOrigin {
            session,
            epoch: state.epoch,
            incarnation: config.incarnation,
            level: arguments.level,
        };
        let sender_volumes = sender_volumes(&site, &opened, last_run.survivors())?;
        let mut sender = start::sender(config, sender_volumes, &capture, &last_run, suspended, covered);

        let layer = Arc::new(Layer {
            mirrors: opened.iter().map(|opened| Arc::clone(&opened.mirror)).collect(),
            copies: Copies::new(Arc::clone(&capture)),
        });
        let mut copies = Vec::new();
        for (index, opened) in (0..).map(VolumeIndex).zip(&opened) {
            let is_whole = sender.is_whole(index);
            if !is_whole && suspended.is_none() {
                sender.handle_copy_started(index)?;
                // A killed run has left none that would be true.
                let was_clean = matches!(last_run, LastRun::Clean(_));
                let saved = if was_clean { read_copy_state(&site, &opened.state.name)? } else { None };
                let prepared = Copier::prepare(&opened.mirror, index, saved.as_deref());
                let prepared = prepared
                    .with_context(|| format!("cannot go on with the copy of {}", opened.state.name))?;
                copies.push((index, prepared));
            }
        }

        let stopped_at = Some(state.stopped_at).filter(|at| {
            matches!(last_run, LastRun::Clean(_)) && *at > Timestamp::ZERO && state.role == Role::Primary
        });
        state.volumes = opened.iter().map(|opened| opened.state.clone()).collect();
        state.suspended = suspended;
        state.clean = false;
        site.save_state(&state)?;
        failpoint::pass(FailPoint::StateSaved);
        let role = state.role;
        if role == Role::Fenced {
            capture.fence();
            tracing::error!("this site is FENCED: another site is the primary; its mounts are read-only");
        }
        let epoch = state.epoch;
        let state = Arc::new(Mutex::new(state));
        let primary = Primary::start(PrimaryParts {
            capture: Arc::clone(&capture),
            log: Some(Arc::clone(&activity.log)),
            sender,
            maker: SetMaker::new(origin, volumes.clone()),
            volumes,
            files: Arc::clone(&layer) as _,
            replica: Some(Replica { name: arguments.peer, address: arguments.address }),
            identity,
            role,
            epoch,
            reason,
            examining: stopped_at.is_some(),
            on_fenced: remember_fence(site.clone(), Arc::clone(&state), Arc::clone(&capture)),
        })?;

        let mut mounts = Vec::new();
        for opened in &opened {
            let mounted = mount_one(opened).inspect_err(|_| undo(&mounts))?;
            mounts.push(mounted);
        }
        for (index, prepared) in copies {
            let mirror = Arc::clone(&opened[index.as_usize()].mirror);
            layer.copies.start_copy(mirror, prepared)?;
        }
        let primary = Arc::new(Mutex::new(Some(primary)));
        let scan = stopped_at.map(|stopped_at| start_scan(stopped_at, &layer, &primary)).transpose()?;
        let keeper = activity.keep(Arc::clone(&capture), layer.mirrors.clone(), Arc::clone(&primary))?;
        let control = control::Server::start(&site.control_socket(), Arc::new(Control(Arc::clone(&primary))))
            .context("cannot listen on the control socket")?;
        let mounts = daemon::Mounts::new(mounts)?;
        Ok(Self {
            site,
            state,
            capture,
            activity,
            keeper,
            scan,
            layer,
            primary,
            mark,
            mounts,
            _control: control,
        })
    }

    /// Ends cleanly: everything captured is kept, nothing stays mounted. If something cannot be written, the control file does
    /// not say that the end was clean, and the next start takes it for a kill: what was captured is in the sidefile, what
    /// was not in the activity log.
    fn stop(mut self) -> anyhow::Result<()> {
        let mut failed = self.mounts.unmount_idle();
        drop(self.scan.take());
        // Before the hold: their threads would wait in it.
        self.layer.copies.halt();
        if !self.capture.hold(STOP_PATIENCE) {
            tracing::warn!("operations under way do not end");
        }
        if self.mounts.are_left() {
            // A program that goes on while its mount is detached finds the bare mount point by its next path: a journal that
            // is not to be found there counts as removed. So all that change anything shall wait here before, and get an
            // error when this process ends.
            std::thread::sleep(HOLD_PAUSE);
            failed.extend(self.mounts.detach());
        }
        let names: Vec<VolumeName> =
            self.lock_state().volumes.iter().map(|volume| volume.name.clone()).collect();
        for (index, saved) in self.layer.copies.take_copies() {
            let path = self.site.copy_state(&names[index.as_usize()]);
            match saved {
                Some(state) => replace_durably(&path, &state)?,
                None => drop(std::fs::remove_file(path)),
            }
        }
        let primary = self.primary.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stopped = primary.and_then(|primary| primary.stop(STOP_PATIENCE));
        let stopped = stopped.context("the data mover ended early; the next start takes that for a crash")?;
        let sender = stopped.sender;
        let kept: Vec<SenderVolume<Bytes>> = sender.state().collect();
        store::save_sets(&self.site, kept.iter().flat_map(|volume| &volume.issued))?;
        for (_, updates) in stopped.rooms.iter().flatten() {
            self.capture.release(updates);
        }
        let mut state = self.lock_state().clone();
        drop(self.keeper);
        // A power loss after a clean stop must find nothing to lose.
        let flushed = self.activity.log.flush().map_err(anyhow::Error::from);
        let synced = self.layer.mirrors.iter().try_for_each(|mirror| mirror.sync());
        let safe = flushed.and(synced.context("cannot sync the source"));
        drop(self.mark);
        let last_seqs = self.capture.last_seqs();
        let mark = Timestamp(self.capture.now().0 + 1);
        self.capture.close()?;
        self.site.save_stamp_mark(mark)?;
        for ((volume, kept), last_seq) in state.volumes.iter_mut().zip(&kept).zip(last_seqs) {
            volume.state = kept.state;
            volume.complete = kept.complete;
            volume.acked_set = kept.acked.number;
            volume.acked_hash = kept.acked.hash;
            volume.acked_seq = kept.acked.last_seq;
            volume.acked_end = kept.acked_end;
            volume.end = kept.end;
            volume.last_seq = last_seq;
        }
        let fill = self.capture.fill();
        state.suspended = sender.suspended().or(fill.suspended.then_some(SuspendReason::Lag));
        if fill.overflow == Some(Overflow::Site) {
            // That passes: where this can be written, the rest can be again.
            state.suspended = Some(SuspendReason::Link);
        }
        if kept.iter().any(|volume| volume.state == CopyState::Resync) {
            state.suspended = state.suspended.or(Some(SuspendReason::Link));
        }
        for (volume, changes) in names.iter().zip(&stopped.changes) {
            let keep = state.suspended.is_some() && self.capture.is_covered();
            copies::save_changes(&self.site, volume, keep.then_some(changes))?;
        }
        state.clean = safe.is_ok();
        // A change time is as coarse as the system's tick: what came before the stop must not look as if it came after it.
        std::thread::sleep(CHANGE_TIME_TICK);
        if !stopped.examining {
            state.stopped_at = Timestamp(Reading::now().real);
        }
        self.site.save_state(&state)?;
        failed.extend(safe.err());
        match failed.pop() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn lock_state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a run begins from, beside the sidefile.
struct Source<'a> {
    site: &'a SiteDir,
    activity: &'a Activity,
    opened: &'a [Opened],
}

impl start::Source for Source<'_> {
    type Error = anyhow::Error;

    fn recover(&self, left: &LeftIntent) -> anyhow::Result<()> {
        let mirror = &self.opened[left.volume.as_usize()].mirror;
        mirror.recover(left).context("cannot read again what the last run had under way")
    }

    fn found(&self, left: &LeftIntent) -> anyhow::Result<Vec<FileId>> {
        let mirror = &self.opened[left.volume.as_usize()].mirror;
        mirror.found(left).context("cannot look up what the last run had under way")
    }

    fn logged_changes(&self, volume: VolumeIndex) -> ChangeMap {
        self.activity.changes(&self.opened[volume.as_usize()].mirror, volume)
    }

    fn kept_changes(&self, volume: VolumeIndex) -> anyhow::Result<Option<ChangeMap>> {
        copies::load_changes(self.site, &self.opened[volume.as_usize()].state.name)
    }
}

/// Makes durable that another site is the primary; again and again, if it cannot be written. (A start that does not know
/// of it is told by the other site, but lets programs write until then.)
fn remember_fence(
    site: SiteDir,
    state: Arc<Mutex<State>>,
    capture: Arc<Capture>,
) -> Box<dyn Fn(Epoch) + Send> {
    let known = Arc::clone(&state);
    let save = move || {
        let state = known.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = site.save_state(&state);
        let trouble = saved.as_ref().err().map(|error| format!("{error}: a new start would not know that"));
        capture.set_trouble(SitePart::State, trouble);
        saved.is_ok()
    };
    Box::new(move |epoch| {
        {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.role, state.epoch) = (Role::Fenced, epoch);
        }
        if save() {
            return;
        }
        tracing::error!("cannot remember that this site is FENCED; trying again");
        let save = save.clone();
        let again = move || {
            while !save() {
                std::thread::sleep(Duration::from_nanos(limits::SITE_AGAIN_NS));
            }
        };
        if let Err(error) = std::thread::Builder::new().name("fence".into()).spawn(again) {
            tracing::error!(%error, "there is no thread to try again");
        }
    })
}

/// Looks for what was changed since the last stop.
fn start_scan(
    stopped_at: Timestamp,
    layer: &Layer,
    primary: &Arc<Mutex<Option<Primary>>>,
) -> std::io::Result<Scan> {
    let since = Timestamp(stopped_at.0.saturating_sub(CHANGE_TIME_TICK.as_nanos() as u64 / 2));
    let primary = Arc::clone(primary);
    Scan::start(layer.mirrors.clone(), since, move |examined| {
        if let Some(primary) = &*primary.lock().unwrap_or_else(PoisonError::into_inner) {
            primary.examined(examined);
        }
    })
}

fn undo(mounts: &[Mounted]) {
    for mounted in mounts {
        drop(mounted.unmount());
    }
}

fn mount_one(opened: &Opened) -> anyhow::Result<Mounted> {
    let target = &opened.mirrored.mountpoint;
    let mounted = crate::fuse::mount(Arc::clone(&opened.mirror), target, &MountOptions::default());
    let mounted = mounted.with_context(|| format!("cannot mount on {}", target.display()))?;
    tracing::info!(volume = %opened.state.name, source = %opened.mirrored.source.display(), on = %target.display(), "mounted");
    Ok(mounted)
}

fn open_sources(mirrored: &[Mirrored]) -> anyhow::Result<Vec<OwnedFd>> {
    let open = |mirrored: &Mirrored| {
        mirror::open_source(&mirrored.source)
            .with_context(|| format!("cannot open {}", mirrored.source.display()))
    };
    mirrored.iter().map(open).collect()
}

/// For each volume in the session's order (known ones first, as before), its place in the arguments.
fn session_order(state: &State, mirrored: &[Mirrored]) -> Vec<usize> {
    let place = |name: &VolumeName| mirrored.iter().position(|mirrored| mirrored.volume == *name);
    let known: Vec<usize> = state.volumes.iter().filter_map(|volume| place(&volume.name)).collect();
    let new = (0..mirrored.len()).filter(|at| !known.contains(at));
    known.iter().copied().chain(new).collect()
}

/// Opens the sidefile that an earlier run left, or makes one.
fn open_sidefile(
    site: &SiteDir,
    session: SessionId,
    state: &State,
    bytes: u64,
    volumes: usize,
) -> anyhow::Result<(Capture, LastRun)> {
    let known = start::start_volumes(state, volumes);
    let mark = site.stamp_mark()?;
    let here = site.sidefile()?;
    for other in site.sidefiles()?.into_iter().filter(|path| *path != here) {
        if Capture::was_clean(&other) {
            std::fs::rename(&other, &here).context("cannot take over the sidefile of the last boot")?;
        } else {
            tracing::warn!(path = %other.display(), "the sidefile of a boot that ended without a clean stop is discarded");
            std::fs::remove_file(&other).context("cannot remove an outdated sidefile")?;
        }
    }
    let is_there = here.exists();
    let clean = if is_there { Capture::was_clean(&here) && state.clean } else { state.clean };
    let limit = start::stamp_limit(mark, is_there && !clean, Reading::now());
    site.save_stamp_mark(limit)?;
    let start = |floor| Start { session, volumes: &known, floor, limit };
    if !is_there && clean {
        return Ok((Capture::create(&here, bytes, &start(mark))?, LastRun::Clean(None)));
    }
    if !is_there {
        return Ok((Capture::create_after_loss(&here, bytes, &start(mark))?, LastRun::Lost { mark }));
    }
    // A sidefile knows the last timestamp; the mark lies ahead of it.
    let (capture, survivors) = Capture::open(&here, &start(if clean { mark } else { Timestamp::ZERO }))?;
    Ok((capture, if clean { LastRun::Clean(Some(survivors)) } else { LastRun::Killed { survivors, mark } }))
}

fn open_mirrors(
    state: &State,
    mirrored: &[Mirrored],
    order: &[usize],
    sources: Vec<OwnedFd>,
    recorder: &Arc<dyn Recorder>,
) -> anyhow::Result<Vec<Opened>> {
    let mut sources: Vec<Option<OwnedFd>> = sources.into_iter().map(Some).collect();
    let mut opened = Vec::new();
    for (index, at) in (0..).map(VolumeIndex).zip(order) {
        let mirrored = mirrored[*at].clone();
        let root = sources[*at].take().context("each source is used once")?;
        let known = state.volumes.iter().find(|volume| volume.name == mirrored.volume);
        let instance = match known {
            Some(known) => known.instance,
            None => new_instance()?,
        };
        let source = VolumeSource { index, name: mirrored.volume.clone(), instance, root };
        let mirror = Mirror::new(vec![source], Arc::clone(recorder), Layout::SingleVolume)?;
        let root = mirror.root_of(index).context("the volume was just opened")?;
        let state = match known {
            Some(known) => {
                ensure!(
                    (known.root_ino, known.root_generation) == (root.ino, root.generation),
                    "{} is another directory than the one that the volume {} mirrors (it was replaced or restored): \
                     DIVERGED; use another site directory to mirror it anew",
                    mirrored.source.display(),
                    known.name
                );
                VolumeState { source: mirrored.source.clone(), ..known.clone() }
            }
            None => VolumeState {
                name: mirrored.volume.clone(),
                source: mirrored.source.clone(),
                instance,
                root_ino: root.ino,
                root_generation: root.generation,
                state: CopyState::Pending,
                complete: None,
                acked_set: ChainPoint::START.number,
                acked_hash: ChainPoint::START.hash,
                acked_seq: Seq::ZERO,
                acked_end: Timestamp::ZERO,
                end: Timestamp::ZERO,
                last_seq: Seq::ZERO,
            },
        };
        opened.push(Opened { mirrored, mirror: Arc::new(mirror), root, state });
    }
    Ok(opened)
}

/// A random volume instance.
pub(crate) fn new_instance() -> anyhow::Result<VolumeInstance> {
    loop {
        if let Some(instance) = VolumeInstance::new(u64::from_le_bytes(daemon::random()?)) {
            return Ok(instance);
        }
    }
}

fn sender_volumes(
    site: &SiteDir,
    opened: &[Opened],
    survivors: Option<&Survivors>,
) -> anyhow::Result<Vec<SenderVolume<Bytes>>> {
    let mut kept: BTreeMap<VolumeName, Vec<IssuedSet<Bytes>>> = BTreeMap::new();
    for (volume, set) in store::load_sets(site)? {
        kept.entry(volume).or_default().push(set);
    }
    let volumes = opened.iter().enumerate().map(|(at, opened)| {
        let issued = kept.remove(&opened.state.name).unwrap_or_default();
        let chain = survivors.and_then(|survivors| survivors.volumes.get(at));
        start::sender_volume(&opened.state, opened.root, issued, chain)
    });
    Ok(volumes.collect())
}

fn read_copy_state(site: &SiteDir, volume: &VolumeName) -> anyhow::Result<Option<Vec<u8>>> {
    let path = site.copy_state(volume);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Answers the commands of a primary.
struct Control(Arc<Mutex<Option<Primary>>>);

impl Handler for Control {
    fn handle(&self, request: Request, _progress: &mut dyn FnMut(String)) -> Answer {
        match request {
            Request::Status => {
                let primary = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                match primary.as_ref().and_then(Primary::status) {
                    Some(status) => Answer::Status(Box::new(status)),
                    None => Answer::Failed("the daemon is starting or stopping; ask again".into()),
                }
            }
            Request::Promote { .. } => Answer::Failed(
                "this site is the primary: promote the replica, on its own machine (`twinfs promote`)".into(),
            ),
        }
    }
}

/// The site directory must not be inside a mirrored tree, nor around it.
pub(crate) fn is_apart(site: &Path, path: &Path) -> bool {
    !site.starts_with(path) && !path.starts_with(site)
}
