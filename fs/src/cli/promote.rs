//! `twinfs promote`

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Args;
use twinfs_replicator::control::{self, Answer, ControlError, Request};
use twinfs_replicator::site::SiteDir;

use super::{SiteArg, daemon, need_root};

#[derive(Debug, Args)]
pub(super) struct Promote {
    #[command(flatten)]
    site: SiteArg,
    /// Hold new writes on the primary and drain it first: nothing is lost
    #[arg(long)]
    planned: bool,
    /// Promote although the primary is connected, or although nothing could be drained
    #[arg(long, conflicts_with = "planned")]
    force: bool,
}

impl Promote {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        need_root("promote")?;
        let site = self.site.dir();
        let request = Request::Promote { planned: self.planned, force: self.force };
        let mut show = |line: &str| println!("{line}");
        let answer = match control::ask(&site.control_socket(), &request, &mut show) {
            Err(ControlError::NotRunning { .. }) => {
                println!("No daemon is running on this site; starting it.");
                start_daemon(&site)?;
                control::ask(&site.control_socket(), &request, &mut show)?
            }
            answer => answer?,
        };
        match answer {
            Answer::Done(text) => {
                println!("{text}");
                Ok(ExitCode::SUCCESS)
            }
            Answer::Failed(why) => bail!("{why}"),
            other => bail!("the daemon answered out of turn: {other:?}"),
        }
    }
}

/// Starts the replica's daemon as it was started last.
fn start_daemon(site: &SiteDir) -> anyhow::Result<()> {
    let state = site.state()?.with_context(|| {
        format!("the site {} has never run: there is nothing to promote", site.path().display())
    })?;
    let arguments = state.replica.context("this site was never a replica: there is nothing to promote")?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.args(["replica", "--daemon", "--site"]).arg(site.path());
    command.arg(arguments.mountpoint).arg("--listen").arg(arguments.listen);
    daemon::detach(command, site.path())?;
    Ok(())
}
