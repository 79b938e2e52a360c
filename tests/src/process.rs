//! Processes that a test starts and must stop, by their id, whatever happens.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::watchdog;

/// How long a test waits for something that should happen soon. Reached only when it does not happen at all.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The `twinfs` command under test: built beside the test, in the same profile.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn twinfs() -> PathBuf {
    let own = std::env::current_exe().expect("the running program has a path");
    // Tests stand in target/PROFILE/deps, programs in target/PROFILE.
    let profile = own.ancestors().skip(1).find(|dir| !dir.ends_with("deps")).expect("target/PROFILE");
    let path = profile.join("twinfs");
    assert!(
        path.exists(),
        "{} is missing: build the workspace first (`cargo build --workspace`)",
        path.display()
    );
    path
}

/// A running command whose standard error goes to a log file. Dropped, it is killed.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Its log.
    pub log: PathBuf,
}

impl Daemon {
    /// Starts a command.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command, log: &Path) -> Self {
        watchdog::alive();
        let stderr = File::options().create(true).append(true).open(log).expect("the log can be written");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn();
        Self { child: child.expect("the command can be started"), log: log.to_owned() }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            // It may have ended already.
            let _ = kill_process(pid, signal);
        }
    }

    /// Whether it runs still.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "process {} does not end; its log:\n{}",
                self.pid(),
                self.log_text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it with SIGTERM and asserts that it ended well.
    ///
    /// # Panics
    /// If it did not.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "ended with {status}; its log:\n{}", self.log_text());
    }

    /// Kills it as the OOM killer would.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        drop(self.child.wait());
    }

    /// What it logged.
    #[must_use]
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() {
            self.signal(Signal::TERM);
            let start = Instant::now();
            while self.is_running() && start.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(10));
            }
            self.kill();
        }
        if std::thread::panicking() {
            eprintln!("---- {} ----\n{}", self.log.display(), self.log_text());
        }
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Panics
/// If it cannot be started or fails.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{errors}", output.status);
    text
}

/// Runs a command to its end, whatever that is.
///
/// # Panics
/// If it cannot be started.
pub fn output(command: &mut Command) -> Output {
    watchdog::alive();
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Waits until `ready` returns something.
///
/// # Panics
/// If it never does; `what` says what was waited for.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        watchdog::alive();
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A command in the background that is killed when this is dropped.
#[derive(Debug)]
pub struct Background(pub Child);

impl Background {
    /// Starts it.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A test program that `tests/run` installs from crates.io.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn installed_tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: tests/run installs it", path.display());
    path
}
