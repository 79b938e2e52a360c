//! `twinfs loss`

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use twinfs_replicator::replica::loss::{self, Kept};

use super::SiteArg;

#[derive(Debug, Args)]
pub(super) struct Loss {
    #[command(flatten)]
    site: SiteArg,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Loss {
    /// Reads what the promote kept on disk, so it works with and without a daemon.
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let site = self.site.dir();
        let kept = loss::newest(&site)?.with_context(|| {
            format!("there is no loss report in {}: no promote was done here", site.path().display())
        })?;
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        let printed = if self.json { print_json(&kept, &mut out) } else { print(&kept, &mut out) };
        super::printed(printed.and_then(|()| out.flush().context("cannot print")))
    }
}

fn print(kept: &Kept, out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "Promoted {} into epoch {}.", kept.report.promoted.utc, kept.report.epoch)?;
    for line in kept.report.lines(usize::MAX) {
        writeln!(out, "{line}")?;
    }
    for update in kept.updates()? {
        writeln!(out, "  {}", update?)?;
    }
    for set in &kept.report.sets {
        writeln!(out, "Kept: {}", kept.dir.join(&set.file).display())?;
    }
    Ok(())
}

/// The report with all its updates, however many: they are passed on one by one.
fn print_json(kept: &Kept, out: &mut impl Write) -> anyhow::Result<()> {
    let mut head = serde_json::to_value(&kept.report)?;
    let fields = head.as_object_mut().context("a report is an object")?;
    fields.insert("directory".into(), kept.dir.display().to_string().into());
    let head = serde_json::to_string_pretty(&head)?;
    let open = head.trim_end().strip_suffix('}').context("a report is an object")?;
    write!(out, "{},\n  \"updates\": [", open.trim_end())?;
    let mut separator = "\n";
    for update in kept.updates()? {
        write!(out, "{separator}    {}", serde_json::to_string(&update?)?)?;
        separator = ",\n";
    }
    writeln!(out, "\n  ]\n}}")?;
    Ok(())
}
