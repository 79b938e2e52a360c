//! `twinfs inspect`

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use twinfs_core::format::{UnverifiedSet, describe};
use twinfs_core::limits;
use twinfs_replicator::replica::journal;
use twinfs_replicator::storage::open_file;

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A record set or a journal segment
    file: PathBuf,
}

impl Inspect {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let shown = self.file.display();
        let file = std::fs::File::open(&self.file).with_context(|| format!("cannot open {shown}"))?;
        let mut bytes = Vec::new();
        let bound = limits::SET_BYTES_MAX as u64;
        file.take(bound).read_to_end(&mut bytes).with_context(|| format!("cannot read {shown}"))?;
        let mut text = String::new();
        if bytes.starts_with(&journal::SEGMENT_MAGIC) {
            journal::describe(open_file(&self.file)?, &mut text)?;
        } else {
            let set = match UnverifiedSet(bytes.into()).verify() {
                Ok(set) => set,
                Err(error) => bail!("{shown} is neither a journal segment nor a record set: {error}"),
            };
            let meta = set.meta().with_context(|| format!("{shown} is a record set with bad contents"))?;
            describe(&set, &meta, &mut text)?;
        }
        std::io::stdout().lock().write_all(text.as_bytes()).context("cannot print")?;
        Ok(ExitCode::SUCCESS)
    }
}
