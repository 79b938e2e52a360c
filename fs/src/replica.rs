//! The replica's daemon: the replication session, the read-only mount, and – once promoted – the writable one.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, bail, ensure};
use twinfs_certs::Identity;
use twinfs_core::id::{Epoch, SessionId, SiteName, VolumeIndex};
use twinfs_core::session::Role;
use twinfs_core::session::receiver::Ordering;
use twinfs_core::stamp::Timestamp;
use twinfs_replicator::control::{self, Answer, Handler, Request};
use twinfs_replicator::primary::sidefile::{self, Capture, Start, StartVolume};
use twinfs_replicator::replica::driver::{PromoteMode, Promoted, Replica, ReplicaConfig};
use twinfs_replicator::site::{self, SiteDir, State};

use crate::daemon::{self, Ended, Mounts};
use crate::mirror::{self, Layout, Mirror, VolumeSource};
use crate::mount::{MountOptions, Mounted, Place};
use crate::primary::{is_apart, new_instance};
use crate::replica_view::{self, Report};

/// What `twinfs replica` was asked for.
#[derive(Debug)]
pub struct ReplicaArguments {
    /// The site directory.
    pub site: SiteDir,
    /// Where the volumes are shown, canonical.
    pub mountpoint: PathBuf,
    /// `ADDR:PORT`.
    pub listen: String,
    /// The only primary that may come.
    pub from: Option<SiteName>,
    /// Bytes that stay free on the file system of the site directory.
    pub free_space_floor: u64,
}

/// Runs the replica until a signal or an unmount ends it. Calls `ready` once the mount is usable.
///
/// # Errors
/// Why it does not start, or did not end cleanly, for the user.
pub fn run(arguments: ReplicaArguments, ready: &dyn Fn()) -> anyhow::Result<()> {
    let identity = Arc::new(twinfs_certs::load(arguments.site.path())?);
    let _lock = arguments.site.lock()?;
    let site = arguments.site.path().canonicalize().context("cannot use the site directory")?;
    ensure!(
        is_apart(&site, &arguments.mountpoint),
        "the site directory {} and the mount point {} contain one another",
        site.display(),
        arguments.mountpoint.display()
    );
    let listen = resolve(&arguments.listen)?;
    let state = state_of(&arguments, &identity)?;
    arguments.site.save_state(&state)?;
    let role = state.role;
    let from = arguments.from.clone().or_else(|| state.peer.clone());
    let replica = Arc::new(Replica::start(ReplicaConfig {
        site: arguments.site.clone(),
        state,
        identity: Arc::clone(&identity),
        listen,
        from,
        free_space_floor: arguments.free_space_floor,
        ordering: ordering(),
    })?);
    let daemon = Arc::new(Daemon {
        site: arguments.site.clone(),
        mountpoint: arguments.mountpoint.clone(),
        replica: Arc::clone(&replica),
        mounts: Mounts::new(Vec::new())?,
        shown: Mutex::new(None),
        taken_over: Mutex::new(None),
    });
    if role == Role::Promoted {
        // A promote that a crash cut short is finished here, by the same steps.
        let promoted = replica.promote(PromoteMode::Plain, &mut |_| {}).map_err(anyhow::Error::msg)?;
        daemon.take_over(&promoted)?;
    } else {
        daemon.show()?;
    }
    let control = control::Server::start(&arguments.site.control_socket(), Arc::clone(&daemon) as _)
        .context("cannot listen on the control socket")?;
    ready();
    match daemon.mounts.wait() {
        Ended::Signal(name) => tracing::info!(signal = name, "stopping"),
        Ended::Unmounted => tracing::info!("unmounted; stopping"),
    }
    drop(control);
    daemon.stop()
}

/// A test hook: `TWINFS_TEST_ORDER_BY_ARRIVAL=1` switches stamp ordering off, so that the order test can be seen to fail.
fn ordering() -> Ordering {
    if std::env::var_os("TWINFS_TEST_ORDER_BY_ARRIVAL").is_some_and(|value| value == "1") {
        tracing::warn!("stamp ordering is switched off: this is no mirror but a test");
        return Ordering::ByArrival;
    }
    Ordering::ByStamp
}

fn resolve(listen: &str) -> anyhow::Result<SocketAddr> {
    let mut found = listen.to_socket_addrs().with_context(|| format!("`{listen}` is not ADDR:PORT"))?;
    found.next().with_context(|| format!("`{listen}` means no address"))
}

fn state_of(arguments: &ReplicaArguments, identity: &Identity) -> anyhow::Result<State> {
    let mut state = match arguments.site.state()? {
        None => State::new(Role::Replica, Epoch { number: 0, site: identity.id() }),
        Some(state) => state,
    };
    let path = arguments.site.path().display();
    match state.role {
        Role::Replica | Role::Promoted => {}
        Role::Primary => bail!("{path} is the site of a primary: start it with `twinfs mount`"),
        Role::Fenced => bail!(
            "{path} is the site of an old primary that is FENCED; making it a replica (failback) is not in this version"
        ),
    }
    if let (Some(known), Some(from)) = (&state.peer, &arguments.from) {
        ensure!(known == from, "this replica is paired with the site {known}, not with {from}");
    }
    let (mountpoint, listen) = (arguments.mountpoint.clone(), arguments.listen.clone());
    state.replica = Some(site::ReplicaArguments { mountpoint, listen });
    Ok(state)
}

/// The running daemon, as its control socket sees it.
struct Daemon {
    site: SiteDir,
    mountpoint: PathBuf,
    replica: Arc<Replica>,
    mounts: Mounts,
    /// The read-only mount.
    shown: Mutex<Option<Arc<Mounted>>>,
    /// The writable mount's sidefile, once promoted.
    taken_over: Mutex<Option<Arc<Capture>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the small files below `.twinfs` say.
struct ReplicaReport(Arc<Replica>);

impl Report for ReplicaReport {
    fn lag(&self) -> String {
        let delay = self.0.status().and_then(|status| status.delay_seconds);
        delay.map_or("unknown".into(), |delay| format!("{delay:.2}"))
    }

    fn consistency_time(&self) -> String {
        let time = self.0.status().and_then(|status| status.consistency_time);
        time.unwrap_or_else(|| "none yet".into())
    }
}

impl Daemon {
    /// Mounts the read-only view.
    fn show(&self) -> anyhow::Result<()> {
        let report = Arc::new(ReplicaReport(Arc::clone(&self.replica)));
        let options = MountOptions { read_only: true, trusted: false, ..MountOptions::default() };
        let mounted =
            replica_view::mount(Arc::clone(self.replica.image()), report, &self.mountpoint, &options)
                .with_context(|| format!("cannot mount on {}", self.mountpoint.display()))?;
        let mounted = Arc::new(mounted);
        self.mounts.add(Arc::clone(&mounted));
        *lock(&self.shown) = Some(mounted);
        Ok(())
    }

    fn promote(&self, mode: PromoteMode, progress: &mut dyn FnMut(String)) -> Result<String, String> {
        let promoted = self.replica.promote(mode, progress)?;
        self.take_over(&promoted).map_err(|error| {
            format!(
                "the epoch {} is durable, but mounting failed: {error:#}; restart the daemon",
                promoted.epoch.number
            )
        })?;
        for volume in &promoted.unusable {
            progress(format!("Volume {volume} is unusable: its initial copy was not complete."));
        }
        let place = self.mountpoint.display();
        Ok(format!(
            "PROMOTED in epoch {}: {place} is writable, as of {}. There is no replica now (SUSPENDED).",
            promoted.epoch.number, promoted.time
        ))
    }

    /// Starts the capture layer over the plain trees and lets it take the place of the read-only mount: mounted beneath
    /// that one, which is then detached. New opens by the same path are writable; files opened before go on as they
    /// were.
    fn take_over(&self, promoted: &Promoted) -> anyhow::Result<()> {
        let mut taken_over = lock(&self.taken_over);
        if taken_over.is_some() {
            return Ok(());
        }
        ensure!(!promoted.volumes.is_empty(), "no volume was ever complete here");
        let capture = self.open_capture(promoted.volumes.len())?;
        let mut sources = Vec::new();
        for (index, (name, tree)) in (0..).map(VolumeIndex).zip(&promoted.volumes) {
            let root =
                mirror::open_source(tree).with_context(|| format!("cannot open {}", tree.display()))?;
            sources.push(VolumeSource { index, name: name.clone(), instance: new_instance()?, root });
        }
        let mirror = Arc::new(Mirror::new(sources, Arc::clone(&capture) as _, Layout::VolumeList)?);
        // What programs opened before goes on being the last group, also where the tree changes now.
        let image = Arc::clone(self.replica.image());
        image.keep_open_files();
        mirror.set_before_change(Arc::new(move |inode| image.before_change(inode)));
        let mount = |place| {
            let options = MountOptions { place, ..MountOptions::default() };
            crate::fuse::mount(Arc::clone(&mirror), &self.mountpoint, &options)
        };
        let shown = lock(&self.shown).take();
        let mounted = match shown {
            None => mount(Place::Over)?,
            Some(view) => match mount(Place::Beneath) {
                Ok(mounted) => {
                    self.mounts.add(Arc::new(mounted));
                    view.unmount().context("cannot detach the read-only mount")?;
                    *taken_over = Some(capture);
                    return Ok(());
                }
                Err(error) => {
                    tracing::info!(%error, "cannot mount beneath; detaching first");
                    view.unmount().context("cannot detach the read-only mount")?;
                    mount(Place::Over)?
                }
            },
        };
        self.mounts.add(Arc::new(mounted));
        *taken_over = Some(capture);
        Ok(())
    }

    /// A sidefile for a primary without a peer: it captures nothing until it gets one.
    fn open_capture(&self, volumes: usize) -> anyhow::Result<Arc<Capture>> {
        let path = self.site.sidefile()?;
        for old in self.site.sidefiles()? {
            std::fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        let session = SessionId::from_bytes(daemon::random()?);
        let volumes = vec![StartVolume::NEW; volumes];
        let start = Start { session, volumes: &volumes, floor: Timestamp::ZERO, limit: Timestamp(u64::MAX) };
        let capture = Capture::create(&path, sidefile::bytes_min(), &start)?;
        capture.suspend();
        Ok(Arc::new(capture))
    }

    fn stop(&self) -> anyhow::Result<()> {
        let mut failed = self.mounts.unmount_idle();
        failed.extend(self.mounts.detach());
        self.replica.stop();
        if let Some(capture) = lock(&self.taken_over).take() {
            capture.close()?;
        }
        match failed.pop() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Handler for Daemon {
    fn handle(&self, request: Request, progress: &mut dyn FnMut(String)) -> Answer {
        match request {
            Request::Status => match self.replica.status() {
                Some(status) => Answer::Status(Box::new(status)),
                None => Answer::Failed("the daemon is starting; ask again".into()),
            },
            Request::Promote { planned, force } => {
                let mode = match (planned, force) {
                    (true, _) => PromoteMode::Planned,
                    (false, true) => PromoteMode::Forced,
                    (false, false) => PromoteMode::Plain,
                };
                match self.promote(mode, progress) {
                    Ok(text) => Answer::Done(text),
                    Err(why) => Answer::Failed(why),
                }
            }
        }
    }
}
