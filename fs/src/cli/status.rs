//! `twinfs status`

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use twinfs_replicator::control::{self, Answer, ControlError, Request};
use twinfs_replicator::site::SiteDir;
use twinfs_replicator::status::{Health, Status};

use super::SiteArg;

#[derive(Debug, Args)]
pub(super) struct StatusCommand {
    #[command(flatten)]
    site: SiteArg,
    /// Print one JSON object
    #[arg(long, conflicts_with = "check")]
    json: bool,
    /// Print one line and exit 0, 1 or 2 as monitoring plugins do
    #[arg(long, requires = "rpo")]
    check: bool,
    /// The greatest acceptable delay, for --check
    #[arg(long, value_name = "SECONDS")]
    rpo: Option<f64>,
    /// Show it again every second until interrupted
    #[arg(short, long, conflicts_with_all = ["json", "check"])]
    watch: bool,
}

impl StatusCommand {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let site = self.site.dir();
        if let (true, Some(rpo)) = (self.check, self.rpo) {
            return Ok(check(&site, rpo));
        }
        loop {
            let status = ask(&site)?;
            let text = match (self.json, self.watch) {
                (true, _) => serde_json::to_string_pretty(&status)? + "\n",
                (false, true) => format!("\x1b[H\x1b[2J{status}"),
                (false, false) => status.to_string(),
            };
            let shown = std::io::stdout().write_all(text.as_bytes());
            if !self.watch || shown.is_err() {
                return super::printed(shown.map_err(Into::into));
            }
            std::io::stdout().flush()?;
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn check(site: &SiteDir, rpo: f64) -> ExitCode {
    let (health, line) = match ask(site) {
        Ok(status) => status.check(rpo),
        Err(error) => (Health::Critical, format!("TWINFS CRITICAL - {error:#}")),
    };
    println!("{line}");
    ExitCode::from(health as u8)
}

/// Asks the daemon of a site for its status.
pub(super) fn ask(site: &SiteDir) -> anyhow::Result<Status> {
    match control::ask(&site.control_socket(), &Request::Status, &mut |_| {}) {
        Ok(Answer::Status(status)) => Ok(*status),
        Ok(Answer::Failed(why)) => bail!("the daemon cannot tell its status: {why}"),
        Ok(other) => bail!("the daemon answered out of turn: {other:?}"),
        Err(error @ ControlError::NotRunning { .. }) => {
            let last = site.state().ok().flatten();
            let known = last.map_or("it has never run".to_owned(), |state| {
                format!("its last role was {}, in epoch {}", state.role, state.epoch.number)
            });
            Err(error).context(format!(
                "{known}; start it with `twinfs mount` (primary) or `twinfs replica` (replica)"
            ))
        }
        Err(error) => Err(error.into()),
    }
}
