//! Two sites on this machine: identities, daemons, mounts, and the link between them.

use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use twinfs_replicator::failpoint;

use crate::loop_fs::unmount;
use crate::process::{Daemon, PATIENCE, output, run, twinfs, wait_for};
use crate::relay::Relay;
use crate::sampler::Sampler;
use crate::tree::{self, Compare};

/// How a pair is set up.
#[derive(Debug, Default)]
pub struct Setup {
    /// Volumes as (name, directory below the pair's root); `("data", "src")` if empty.
    pub volumes: Vec<(&'static str, &'static str)>,
    /// Environment of both daemons: test hooks.
    pub env: Vec<(&'static str, String)>,
    /// Further arguments of `twinfs mount`.
    pub mount_args: Vec<String>,
    /// Further arguments of `twinfs replica`.
    pub replica_args: Vec<String>,
    /// Where everything stands; a temporary directory if `None`.
    pub root: Option<PathBuf>,
    /// Where the sources and the primary's site directory stand; at the root if `None`.
    pub primary_dir: Option<PathBuf>,
    /// Where the primary's site directory stands; beside the sources if `None`.
    pub primary_site: Option<PathBuf>,
    /// Where the replica's site directory stands; below the root if `None`.
    pub replica_site: Option<PathBuf>,
    /// Mount over the sources themselves.
    pub over_source: bool,
    /// Put a relay between the sites.
    pub relay: bool,
}

/// A primary site `nyc` and a replica site `chi`. Dropped, everything ends and nothing stays mounted.
#[derive(Debug)]
pub struct Pair {
    setup: Setup,
    root: PathBuf,
    temporary: Option<tempfile::TempDir>,
    /// The replica's UDP port on loopback.
    pub port: u16,
    /// The primary's daemon.
    pub primary: Option<Daemon>,
    /// The replica's daemon.
    pub replica: Option<Daemon>,
    relay: Option<Relay>,
    /// The daemon that shall kill itself, and where.
    fail_at: Option<(&'static str, String)>,
}

/// A UDP port on loopback that was free a moment ago.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free UDP port").port()
}

/// Everything that is mounted at `root` or below it, the newest first.
///
/// # Panics
/// If the kernel does not tell.
#[must_use]
pub fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the kernel tells what is mounted");
    let points = mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    points.filter(|point| point.starts_with(root)).collect()
}

impl Pair {
    /// Makes identities and empty sources; starts nothing.
    ///
    /// # Panics
    /// If a command fails.
    #[must_use]
    pub fn new(mut setup: Setup) -> Self {
        if setup.volumes.is_empty() {
            setup.volumes.push(("data", "src"));
        }
        let (root, temporary) = match &setup.root {
            Some(root) => (root.clone(), None),
            None => {
                let made = tempfile::Builder::new().prefix("twinfs-pair-").tempdir();
                let made = made.expect("a temporary directory");
                (made.path().to_owned(), Some(made))
            }
        };
        let port = free_port();
        let relay = setup.relay.then(|| Relay::start(port));
        let pair = Self { setup, root, temporary, port, primary: None, replica: None, relay, fail_at: None };
        for (volume, _) in &pair.setup.volumes {
            std::fs::create_dir_all(pair.source(volume)).expect("a source directory");
            std::fs::create_dir_all(pair.mount(volume)).expect("a mount point");
        }
        std::fs::create_dir_all(pair.view_root()).expect("a mount point");
        run(pair.command("init", "nyc").args(["--name", "nyc"]));
        run(pair.command("init", "chi").args(["--name", "chi", "--authority"]).arg(pair.site("nyc")));
        pair
    }

    /// Both daemons running, the initial copy done.
    ///
    /// # Panics
    /// If that does not come about.
    #[must_use]
    pub fn start(setup: Setup) -> Self {
        let mut pair = Self::new(setup);
        pair.start_replica();
        pair.start_primary();
        pair.wait_duplex();
        pair
    }

    /// Where everything stands.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A site directory.
    #[must_use]
    pub fn site(&self, name: &str) -> PathBuf {
        match (&self.setup.primary_site, &self.setup.replica_site) {
            (Some(path), _) if name == "nyc" => path.clone(),
            (_, Some(path)) if name == "chi" => path.clone(),
            _ if name == "nyc" => self.primary_dir().join("nyc.site"),
            _ => self.root.join(format!("{name}.site")),
        }
    }

    /// The source directory of a volume.
    #[must_use]
    pub fn source(&self, volume: &str) -> PathBuf {
        self.primary_dir().join(self.source_name(volume))
    }

    fn primary_dir(&self) -> &Path {
        self.setup.primary_dir.as_deref().unwrap_or(&self.root)
    }

    /// The primary's mount of a volume.
    #[must_use]
    pub fn mount(&self, volume: &str) -> PathBuf {
        match self.setup.over_source {
            true => self.source(volume),
            false => self.root.join(format!("{}.mnt", self.source_name(volume))),
        }
    }

    /// The replica's view of a volume.
    #[must_use]
    pub fn view(&self, volume: &str) -> PathBuf {
        self.view_root().join(volume)
    }

    /// The replica's mount point.
    #[must_use]
    pub fn view_root(&self) -> PathBuf {
        self.root.join("view")
    }

    /// The plain tree of a volume in the replica's site directory.
    #[must_use]
    pub fn image(&self, volume: &str) -> PathBuf {
        self.site("chi").join("image").join(volume).join("tree")
    }

    /// Reads of the view with their group.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        Sampler::new(&self.view_root())
    }

    /// The link.
    ///
    /// # Panics
    /// If the pair was set up without a relay.
    #[must_use]
    pub fn relay(&self) -> &Relay {
        self.relay.as_ref().expect("the pair has a relay")
    }

    fn source_name(&self, volume: &str) -> &str {
        let found = self.setup.volumes.iter().find(|(name, _)| *name == volume);
        found.expect("the volume belongs to the pair").1
    }

    fn volumes(&self) -> impl Iterator<Item = &str> {
        self.setup.volumes.iter().map(|(name, _)| *name)
    }

    /// A `twinfs` command on one of the sites.
    #[must_use]
    pub fn command(&self, verb: &str, site: &str) -> Command {
        let mut command = Command::new(twinfs());
        command.arg(verb).arg("--site").arg(self.site(site));
        command.envs(self.setup.env.iter().map(|(key, value)| (key, value)));
        if let Some((daemon, point)) = &self.fail_at
            && *daemon == site
        {
            command.env(failpoint::VARIABLE, point);
        }
        command
    }

    /// Has the next daemon of a site kill itself at a fail point, `NAME[:N[:MS]]`; `None`: no daemon.
    pub fn fail_at(&mut self, point: Option<(&'static str, String)>) {
        self.fail_at = point;
    }

    fn daemon(&mut self, site: &str) -> &mut Daemon {
        let daemon = if site == "nyc" { &mut self.primary } else { &mut self.replica };
        daemon.as_mut().expect("the daemon was started")
    }

    /// Kills the daemon of a site, if it has not died already.
    pub fn kill(&mut self, site: &str) {
        self.daemon(site).kill();
    }

    /// Waits until the daemon of a site has killed itself at its fail point.
    ///
    /// # Panics
    /// If it does not, or ends in another way.
    pub fn wait_killed(&mut self, site: &str) {
        let point = self.fail_at.clone();
        let start = Instant::now();
        while self.daemon(site).is_running() {
            assert!(start.elapsed() < PATIENCE, "the daemon of {site} never came to {point:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        let daemon = self.daemon(site);
        let status = daemon.wait();
        assert_eq!(
            status.signal(),
            Some(9),
            "the daemon of {site} ended with {status}:\n{}",
            daemon.log_text()
        );
    }

    /// The command that starts the replica.
    #[must_use]
    pub fn replica_command(&self) -> Command {
        let mut command = self.command("replica", "chi");
        command.arg(self.view_root()).arg("--listen").arg(format!("127.0.0.1:{}", self.port));
        command.args(["--from", "nyc"]).args(&self.setup.replica_args);
        command
    }

    /// The command that starts the primary.
    #[must_use]
    pub fn mount_command(&self) -> Command {
        let mut command = self.command("mount", "nyc");
        let direct = || format!("127.0.0.1:{}", self.port);
        let address = self.relay.as_ref().map_or_else(direct, Relay::address);
        command.arg("--to").arg(format!("chi@{address}"));
        for volume in self.volumes() {
            let source = self.source(volume).display().to_string();
            let mirror = match self.setup.over_source {
                true => format!("{volume}={source}"),
                false => format!("{volume}={source}:{}", self.mount(volume).display()),
            };
            command.arg("--mirror").arg(mirror);
        }
        command.args(&self.setup.mount_args);
        command
    }

    /// Sets a variable in the environment of the daemons that are started from now on.
    pub fn set_env(&mut self, key: &'static str, value: impl Into<String>) {
        self.setup.env.push((key, value.into()));
    }

    /// Starts the daemon of a site and does not wait until it answers.
    pub fn spawn(&mut self, site: &str) {
        let log = self.root.join(format!("{site}.log"));
        match site {
            "nyc" => self.primary = Some(Daemon::start(&mut self.mount_command(), &log)),
            _ => self.replica = Some(Daemon::start(&mut self.replica_command(), &log)),
        }
    }

    /// Starts the replica's daemon and waits until it answers.
    pub fn start_replica(&mut self) {
        self.spawn("chi");
        self.wait_running("chi");
        // A promoted site mounts its volumes there.
        wait_for("the replica's mount", || (!mounts_below(&self.view_root()).is_empty()).then_some(()));
    }

    /// Starts the primary's daemon and waits until it answers and its mounts are there.
    pub fn start_primary(&mut self) {
        self.spawn("nyc");
        self.wait_running("nyc");
        wait_for("the primary's mounts", || {
            let mounted = mounts_below(&self.root);
            self.volumes().all(|volume| mounted.contains(&self.mount(volume))).then_some(())
        });
    }

    fn wait_running(&mut self, site: &str) {
        let start = Instant::now();
        while self.try_status(site).is_none() {
            let daemon = self.daemon(site);
            assert!(daemon.is_running(), "the daemon of {site} ended:\n{}", daemon.log_text());
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "{site} does not answer:\n{}",
                daemon.log_text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a daemon that was spawned answers, or has died already.
    pub fn wait_running_or_dead(&mut self, site: &str) {
        wait_for("the daemon to start", || {
            let running = self.daemon(site).is_running();
            (!running || self.try_status(site).is_some()).then_some(())
        });
    }

    /// Ends the daemon of a site with SIGTERM, and asserts that it ended well.
    pub fn stop(&mut self, site: &str) {
        self.daemon(site).stop();
    }

    /// Ends the primary with SIGTERM, and asserts that it ended well.
    pub fn stop_primary(&mut self) {
        self.primary.take().expect("the primary runs").stop();
    }

    /// Ends the replica with SIGTERM, and asserts that it ended well.
    pub fn stop_replica(&mut self) {
        self.replica.take().expect("the replica runs").stop();
    }

    /// The status of a site, if its daemon answers.
    #[must_use]
    pub fn try_status(&self, site: &str) -> Option<Value> {
        let output = output(self.command("status", site).arg("--json"));
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("status prints JSON"))
    }

    /// The status of a site.
    ///
    /// # Panics
    /// If its daemon does not answer.
    #[must_use]
    pub fn status(&self, site: &str) -> Value {
        self.try_status(site).unwrap_or_else(|| panic!("{site} does not answer"))
    }

    /// A number from the status of a site.
    ///
    /// # Panics
    /// If its daemon does not answer, or not with a number of that name.
    #[must_use]
    pub fn number(&self, site: &str, name: &str) -> f64 {
        let status = self.status(site);
        status[name].as_f64().unwrap_or_else(|| panic!("{site} says {name} = {}", status[name]))
    }

    /// `twinfs status --check`: its exit code and its line.
    #[must_use]
    pub fn check(&self, site: &str, rpo_seconds: f64) -> (i32, String) {
        let output =
            output(self.command("status", site).args(["--check", "--rpo", &rpo_seconds.to_string()]));
        let line = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().unwrap_or(-1), line)
    }

    /// `twinfs promote` on the replica.
    #[must_use]
    pub fn promote(&self, arguments: &[&str]) -> Output {
        output(self.command("promote", "chi").args(arguments))
    }

    /// Waits until both sites say DUPLEX and all volumes are visible at the replica.
    pub fn wait_duplex(&self) {
        wait_for("DUPLEX on both sites", || {
            let duplex = ["nyc", "chi"].iter().all(|site| self.status(site)["session_state"] == "DUPLEX");
            (duplex && self.volumes().all(|volume| self.view(volume).exists())).then_some(())
        });
    }

    /// Waits until a site says what is wanted of its status.
    ///
    /// # Panics
    /// If it never does.
    pub fn wait_status(&self, site: &str, what: &str, ready: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let start = Instant::now();
        while start.elapsed() < crate::process::PATIENCE {
            last = self.status(site);
            if ready(&last) {
                return last;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("waited in vain until {site} says {what}; it says {last:#}");
    }

    /// Waits until everything written so far is visible at the replica.
    pub fn wait_caught_up(&self) {
        static MARKS: AtomicU64 = AtomicU64::new(0);
        for volume in self.volumes() {
            // A mark comes after everything before it.
            let mark = format!(".mark-{}", MARKS.fetch_add(1, Ordering::Relaxed));
            std::fs::write(self.mount(volume).join(&mark), b"mark").expect("the mount takes a file");
            wait_for("a mark at the replica", || self.view(volume).join(&mark).exists().then_some(()));
            std::fs::remove_file(self.mount(volume).join(&mark)).expect("the mark can go");
            wait_for("the mark to go", || (!self.view(volume).join(&mark).exists()).then_some(()));
        }
        self.wait_status("nyc", "that nothing is behind", |status| status["behind_records"] == 0);
    }

    /// Waits until replica and primary are equal in full.
    ///
    /// # Panics
    /// If they do not become equal.
    pub fn assert_converged(&self) {
        self.wait_caught_up();
        for volume in self.volumes() {
            tree::assert_equal(&self.mount(volume), &self.view(volume), Compare::ALL);
            if !self.setup.over_source {
                tree::assert_equal(&self.source(volume), &self.view(volume), Compare::ALL);
            }
        }
    }

    /// Stops both sites and compares the plain trees that they leave.
    ///
    /// # Panics
    /// If anything is left mounted, a daemon ends badly or the trees differ.
    pub fn assert_plain_trees(&mut self) {
        self.stop_primary();
        self.stop_replica();
        let left: Vec<_> = mounts_below(&self.root).into_iter().filter(|point| *point != self.root).collect();
        assert!(left.is_empty(), "still mounted: {left:?}");
        for volume in self.volumes() {
            tree::assert_equal(&self.source(volume), &self.image(volume), Compare::ALL);
        }
    }

    /// The processes of this pair, as far as they run: those that name one of its site directories.
    #[must_use]
    pub fn processes(&self, site: &str) -> Vec<Pid> {
        let site = self.site(site).to_string_lossy().into_owned();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == site.as_bytes())
        })
        .filter_map(Pid::from_raw)
        .collect()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        drop(self.primary.take());
        drop(self.replica.take());
        // Daemons in the background end when their mounts do. Not what the root itself may be mounted on.
        for point in mounts_below(&self.root).iter().filter(|point| **point != self.root) {
            unmount(point);
        }
        let start = Instant::now();
        for site in ["nyc", "chi"] {
            while !self.processes(site).is_empty() && start.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(20));
            }
            for pid in self.processes(site) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let keep = std::thread::panicking() && std::env::var_os("TWINFS_KEEP").is_some();
        if let Some(temporary) = self.temporary.take_if(|_| keep) {
            eprintln!("kept: {}", temporary.keep().display());
        }
    }
}
