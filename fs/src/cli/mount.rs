//! `twinfs mount`

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;

use anyhow::{Context, bail, ensure};
use clap::Args;
use twinfs_core::id::{SiteName, VolumeName};
use twinfs_core::limits;

use super::{SiteArg, daemon, need_root};
use crate::primary::{self, Mirrored, PrimaryArguments};

#[derive(Debug, Args)]
pub(super) struct Mount {
    #[command(flatten)]
    site: SiteArg,
    /// The directory to mirror
    #[arg(required_unless_present = "mirror", conflicts_with = "mirror")]
    source: Option<PathBuf>,
    /// Where to mount it; without it, over SOURCE itself
    mountpoint: Option<PathBuf>,
    /// The replica
    #[arg(long, value_name = "NAME@HOST:PORT")]
    to: Peer,
    /// Name of the volume; without it, SOURCE's last name
    #[arg(long, conflicts_with = "mirror")]
    volume: Option<VolumeName>,
    /// A volume of the session, instead of SOURCE; may be given several times, all share one consistency time
    #[arg(long, value_name = "VOL=SOURCE[:MOUNTPOINT]")]
    mirror: Vec<MirrorArg>,
    /// Go to the background once the mount is usable
    #[arg(long)]
    daemon: bool,
    /// Mount although processes hold SOURCE open; what they write past the mirror is lost to the replica
    #[arg(long)]
    force: bool,
    /// Size of the sidefile: what an outage of the link may accumulate
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = parse_bytes)]
    sidefile: u64,
    /// Compression level of zstd, 0 (none) to 19
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(i32).range(0..=19))]
    compression: i32,
}

/// `NAME@HOST:PORT`
#[derive(Debug, Clone)]
pub(super) struct Peer {
    name: SiteName,
    address: String,
}

impl FromStr for Peer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (name, address) = text.split_once('@').context("say NAME@HOST:PORT")?;
        let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        ensure!(matches!(port, Some(Ok(1..))), "`{address}` is not HOST:PORT");
        Ok(Self { name: SiteName::new(name)?, address: address.to_owned() })
    }
}

/// `VOL=SOURCE[:MOUNTPOINT]`
#[derive(Debug, Clone)]
struct MirrorArg {
    volume: VolumeName,
    source: PathBuf,
    mountpoint: Option<PathBuf>,
}

impl FromStr for MirrorArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (volume, paths) = text.split_once('=').context("say VOL=SOURCE or VOL=SOURCE:MOUNTPOINT")?;
        let (source, mountpoint) = match paths.split_once(':') {
            Some((source, mountpoint)) => (source, Some(mountpoint.into())),
            None => (paths, None),
        };
        ensure!(!source.is_empty(), "`{text}` names no SOURCE");
        Ok(Self { volume: VolumeName::new(volume)?, source: source.into(), mountpoint })
    }
}

impl Mount {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        need_root("mount")?;
        let mirrored = self.mirrored()?;
        if self.daemon && !daemon::is_detached() {
            let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
            command.args(std::env::args_os().skip(1));
            return daemon::detach(command, &self.site.site);
        }
        daemon::begin();
        daemon::start_logging();
        twinfs_replicator::failpoint::arm()?;
        primary::run(
            PrimaryArguments {
                site: self.site.dir(),
                mirrored,
                peer: self.to.name,
                address: self.to.address,
                force: self.force,
                sidefile_bytes: self.sidefile,
                level: self.compression,
            },
            &daemon::report_ready,
        )?;
        Ok(ExitCode::SUCCESS)
    }

    fn mirrored(&self) -> anyhow::Result<Vec<Mirrored>> {
        let mut all = Vec::new();
        if let Some(source) = &self.source {
            let source = real_dir(source)?;
            let volume = match &self.volume {
                Some(volume) => volume.clone(),
                None => volume_of(&source)?,
            };
            let mountpoint = self.mountpoint.as_deref().map(real_dir).transpose()?;
            all.push(Mirrored { volume, mountpoint: mountpoint.unwrap_or_else(|| source.clone()), source });
        }
        for mirror in &self.mirror {
            let source = real_dir(&mirror.source)?;
            let mountpoint = mirror.mountpoint.as_deref().map(real_dir).transpose()?;
            let mountpoint = mountpoint.unwrap_or_else(|| source.clone());
            all.push(Mirrored { volume: mirror.volume.clone(), source, mountpoint });
        }
        ensure!(all.len() <= limits::VOLUMES_MAX, "a session has at most {} volumes", limits::VOLUMES_MAX);
        for (at, one) in all.iter().enumerate() {
            for other in &all[at + 1..] {
                ensure!(one.volume != other.volume, "the volume {} is given twice", one.volume);
                let nested = one.source.starts_with(&other.source) || other.source.starts_with(&one.source);
                ensure!(
                    !nested,
                    "{} and {} contain one another: mirror the outer one",
                    one.source.display(),
                    other.source.display()
                );
            }
        }
        Ok(all)
    }
}

fn real_dir(path: &Path) -> anyhow::Result<PathBuf> {
    crate::mount::remove_dead(path).with_context(|| format!("cannot unmount {}", path.display()))?;
    let real = path.canonicalize().with_context(|| format!("cannot use {}", path.display()))?;
    ensure!(real.is_dir(), "{} is not a directory", path.display());
    Ok(real)
}

fn volume_of(source: &Path) -> anyhow::Result<VolumeName> {
    let name = source.file_name().map(|name| name.to_string_lossy().into_owned());
    match name.map(VolumeName::new) {
        Some(Ok(volume)) => Ok(volume),
        Some(Err(error)) => bail!("{error}; give the volume a name with --volume"),
        None => bail!("{} has no name: give the volume one with --volume", source.display()),
    }
}

/// Bytes, with an optional K, M, G or T (powers of 1024).
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B')
    {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1u64 << 40,
        _ => return Err("use a number of bytes, with K, M, G or T if you like".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "use a number of bytes, with K, M, G or T if you like")?;
    number.checked_mul(factor).ok_or_else(|| "that is too much".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_peers_parse() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("16M"), Ok(16 << 20));
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert!(
            parse_bytes("ten").is_err() && parse_bytes("9999999999T").is_err() && parse_bytes("").is_err()
        );
        let peer: Peer = "chi@[::1]:7717".parse().unwrap();
        assert_eq!((peer.name.as_str(), peer.address.as_str()), ("chi", "[::1]:7717"));
        for bad in ["chi", "chi@host", "chi@host:0", "@host:1", "c/hi@host:1"] {
            assert!(bad.parse::<Peer>().is_err(), "{bad}");
        }
        let mirror: MirrorArg = "db=/srv/db:/mnt".parse().unwrap();
        assert_eq!(mirror.mountpoint, Some("/mnt".into()));
        assert!("db=".parse::<MirrorArg>().is_err() && "db".parse::<MirrorArg>().is_err());
    }
}
