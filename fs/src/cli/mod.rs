//! The command line: a file for each command.
//!
//! Exit codes: 0 done, 1 refused or failed (the reason is on stderr), 2 wrong usage; `status --check` exits as monitoring
//! plugins do: 0 ok, 1 warning, 2 critical.

mod daemon;
mod demo;
mod identity;
mod inspect;
mod loss;
mod mount;
mod promote;
mod replica;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use twinfs_replicator::site::SiteDir;

/// Asynchronous, write-ordered mirror of a directory tree for disaster recovery.
#[derive(Debug, Parser)]
#[command(name = "twinfs", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create the identity of a site on this machine
    Init(identity::Init),
    /// Create a site's key and print a certificate request for its authority
    Request(identity::Request),
    /// Sign another site's request with this site's authority and print the certificate
    Sign(identity::Sign),
    /// Install a signed certificate
    Import(identity::Import),
    /// Primary: mount a directory whose changes are mirrored
    Mount(mount::Mount),
    /// Replica: receive a mirror and mount it read-only
    Replica(replica::Replica),
    /// Show how far behind the replica is
    Status(status::StatusCommand),
    /// Make this replica the primary
    Promote(promote::Promote),
    /// Print what the last promote of this site gave up
    Loss(loss::Loss),
    /// Print a record set or a journal segment for a person
    Inspect(inspect::Inspect),
    /// Show two sites on this machine, end to end, in under a minute
    Demo(demo::Demo),
}

/// The site directory, as every command takes it.
#[derive(Debug, Clone, Args)]
struct SiteArg {
    /// Site directory: identity, sidefile, journal, image, control socket
    #[arg(long = "site", value_name = "DIR", env = "TWINFS_SITE", default_value = "/var/lib/twinfs")]
    site: PathBuf,
}

impl SiteArg {
    /// The directory by its whole path: what a daemon says of it is read elsewhere.
    fn dir(&self) -> SiteDir {
        SiteDir::new(std::path::absolute(&self.site).unwrap_or_else(|_| self.site.clone()))
    }
}

/// How a command ends that has only something to show.
fn printed(result: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let is_broken_pipe = |error: &anyhow::Error| {
        let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    };
    match result {
        // Whoever read the first lines and went away has what was wanted.
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        done => done.map(|()| ExitCode::SUCCESS),
    }
}

/// Runs the command that the process was started with.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Init(command) => command.run(),
        Command::Request(command) => command.run(),
        Command::Sign(command) => command.run(),
        Command::Import(command) => command.run(),
        Command::Mount(command) => command.run(),
        Command::Replica(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Promote(command) => command.run(),
        Command::Loss(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Demo(command) => command.run(),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("twinfs: {error:#}");
            daemon::report_failure(&error);
            ExitCode::FAILURE
        }
    }
}

/// Refuses to go on unless the process is root.
fn need_root(command: &str) -> anyhow::Result<()> {
    anyhow::ensure!(rustix::process::geteuid().is_root(), "`twinfs {command}` needs root: run it with sudo");
    Ok(())
}
