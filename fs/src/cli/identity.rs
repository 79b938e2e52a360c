//! `twinfs init`, `request`, `sign`, `import`

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use twinfs_core::id::SiteName;

use super::SiteArg;

/// Largest request or certificate file that is read, in bytes.
const PEM_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct Init {
    #[command(flatten)]
    site: SiteArg,
    /// Name of the site; its certificate proves it
    #[arg(long)]
    name: SiteName,
    /// Site directory (on this machine) whose authority signs; without it, this site makes the authority
    #[arg(long, value_name = "OTHER_SITE_DIR")]
    authority: Option<PathBuf>,
}

impl Init {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let identity = twinfs_certs::init(&self.site.site, &self.name, self.authority.as_deref())?;
        let made =
            if self.authority.is_some() { "" } else { " It made the authority that signs other sites." };
        println!("Site {} is ready in {}.{made}", identity.name(), self.site.site.display());
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Args)]
pub(super) struct Request {
    #[command(flatten)]
    site: SiteArg,
    /// Name of the site; its certificate will prove it
    #[arg(long)]
    name: SiteName,
}

impl Request {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        print(&twinfs_certs::request(&self.site.site, &self.name)?)
    }
}

#[derive(Debug, Args)]
pub(super) struct Sign {
    #[command(flatten)]
    site: SiteArg,
    /// The other site's request; `-` for standard input
    #[arg(value_name = "REQUEST")]
    request: PathBuf,
}

impl Sign {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let signed = twinfs_certs::sign(&self.site.site, &read(&self.request)?)?;
        eprintln!("Signed site {}. Bring the certificate there and run `twinfs import`.", signed.site.name);
        print(&signed.bundle_pem)
    }
}

#[derive(Debug, Args)]
pub(super) struct Import {
    #[command(flatten)]
    site: SiteArg,
    /// The signed certificate; `-` for standard input
    #[arg(value_name = "CERTIFICATE")]
    certificate: PathBuf,
}

impl Import {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let identity = twinfs_certs::import(&self.site.site, &read(&self.certificate)?)?;
        println!("Site {} is ready in {}.", identity.name(), self.site.site.display());
        Ok(ExitCode::SUCCESS)
    }
}

fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot print")?;
    Ok(ExitCode::SUCCESS)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = |source: &mut dyn Read, bytes: &mut Vec<u8>| source.take(PEM_BYTES_MAX).read_to_end(bytes);
    if path == Path::new("-") {
        read(&mut std::io::stdin().lock(), &mut bytes).context("cannot read standard input")?;
    } else {
        let mut file =
            std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        read(&mut file, &mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(bytes)
}
