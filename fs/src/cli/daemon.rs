//! Foreground and background: `--daemon` starts the same command again, detached, and waits until it says that its mount
//! is usable.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};

/// Set in the environment of the detached process.
const DETACHED: &str = "TWINFS_DETACHED";
const READY: &str = "ready";
const FAILED: &str = "failed: ";

static WAITED_FOR: AtomicBool = AtomicBool::new(false);

/// Whether this process was started by [`detach`].
pub(super) fn is_detached() -> bool {
    std::env::var_os(DETACHED).is_some()
}

/// Starts `command` (without `--daemon`, or with: a detached process ignores it) in a session of its own, its log
/// appended to `SITE/twinfs.log`, and returns once it is ready.
pub(super) fn detach(mut command: Command, site: &Path) -> anyhow::Result<ExitCode> {
    let log_path = site.join("twinfs.log");
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&log_path);
    let log = log.with_context(|| format!("cannot write the log {}", log_path.display()))?;
    let mut child = command
        .env(DETACHED, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the daemon")?;
    let stdout = child.stdout.take().context("the daemon has no standard output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    match line.trim_end() {
        READY => Ok(ExitCode::SUCCESS),
        text => {
            let exit = child.wait()?;
            match text.strip_prefix(FAILED) {
                Some(why) => bail!("{why}"),
                None => bail!("the daemon ended early ({exit}); see {}", log_path.display()),
            }
        }
    }
}

/// In a detached process: leaves the terminal's session. Elsewhere nothing.
pub(super) fn begin() {
    if is_detached() {
        WAITED_FOR.store(true, Ordering::Release);
        // Fails only for a process group leader, which a freshly started process is not.
        if let Err(error) = rustix::process::setsid() {
            tracing::warn!(%error, "the daemon stays in its parent's session");
        }
    }
}

/// Says that the mount is usable: the command that started the daemon returns.
pub(super) fn report_ready() {
    tell_starter(READY);
}

/// Says why the daemon does not start. Does nothing once it is ready, or in the foreground.
pub(super) fn report_failure(error: &anyhow::Error) {
    tell_starter(&format!("{FAILED}{}", format!("{error:#}").replace('\n', " ")));
}

fn tell_starter(line: &str) {
    if WAITED_FOR.swap(false, Ordering::AcqRel) {
        // The starter may be gone; then nobody is left to be told.
        drop(writeln!(std::io::stdout(), "{line}"));
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            // Nobody reads it any more; if it stays as it is, writes to it fail.
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    }
}

/// Logs to stderr; `RUST_LOG` selects what.
pub(super) fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,fuser=warn,quinn=warn,rustls=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
