//! Writes the seeds of all targets, as DIRECTORY/TARGET/NUMBER, and prints the names of the targets.

use std::path::PathBuf;

use twinfs_fuzz::{CleanUp, TARGETS};

fn main() -> std::io::Result<()> {
    let _files = CleanUp;
    let dir = PathBuf::from(std::env::args_os().nth(1).expect("the directory for the seeds"));
    for target in &TARGETS {
        let dir = dir.join(target.name);
        std::fs::create_dir_all(&dir)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{number}")), seed)?;
        }
        println!("{}", target.name);
    }
    Ok(())
}
