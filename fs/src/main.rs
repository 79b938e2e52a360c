//! The `twinfs` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    twinfs::cli::run()
}
