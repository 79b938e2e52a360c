//! `twinfs replica`

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Args;
use twinfs_core::id::SiteName;

use super::mount::parse_bytes;
use super::{SiteArg, daemon, need_root};
use crate::replica::{self, ReplicaArguments};

#[derive(Debug, Args)]
pub(super) struct Replica {
    #[command(flatten)]
    site: SiteArg,
    /// Where to show the mirrored volumes
    mountpoint: PathBuf,
    /// Where to wait for the primary
    #[arg(long, value_name = "ADDR:PORT")]
    listen: String,
    /// The primary; without it, the first one that comes and is of the same authority
    #[arg(long, value_name = "NAME")]
    from: Option<SiteName>,
    /// Go to the background once the mount is usable
    #[arg(long)]
    daemon: bool,
    /// Space to leave free on the file system of the site directory: the session suspends before it gets tighter
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_bytes)]
    free_space_floor: u64,
}

impl Replica {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        need_root("replica")?;
        crate::mount::remove_dead(&self.mountpoint)
            .with_context(|| format!("cannot unmount {}", self.mountpoint.display()))?;
        let mountpoint = self.mountpoint.canonicalize();
        let mountpoint =
            mountpoint.with_context(|| format!("cannot mount on {}", self.mountpoint.display()))?;
        if self.daemon && !daemon::is_detached() {
            let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
            command.args(std::env::args_os().skip(1));
            return daemon::detach(command, &self.site.site);
        }
        daemon::begin();
        daemon::start_logging();
        twinfs_replicator::failpoint::arm()?;
        let arguments = ReplicaArguments {
            site: self.site.dir(),
            mountpoint,
            listen: self.listen,
            from: self.from,
            free_space_floor: self.free_space_floor,
        };
        replica::run(arguments, &daemon::report_ready)?;
        Ok(ExitCode::SUCCESS)
    }
}
