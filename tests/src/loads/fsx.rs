//! fsx: it reads back what it wrote, and fails if that is not there.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::{Load, Lost};
use crate::process::{Background, PATIENCE, installed_tool};

// Without posix_fallocate: at times it asks for no bytes, and takes the refusal for a missing feature.
const CONFIG: &str = "[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 0
punch_hole = 5
sendfile = 5
posix_fadvise = 1
copy_file_range = 5
";

/// Runs it again and again, with one seed after the other.
#[derive(Debug)]
pub struct Fsx {
    file: PathBuf,
    /// Outside the mount.
    work: PathBuf,
    seed: u64,
}

impl Fsx {
    /// On a file; `work` is a directory outside the mount.
    ///
    /// # Panics
    /// If the directory takes no file.
    #[must_use]
    pub fn new(file: &Path, work: &Path, seed: u64) -> Self {
        std::fs::write(work.join("fsx.toml"), CONFIG).expect("a file for the configuration");
        Self { file: file.to_owned(), work: work.to_owned(), seed }
    }

    fn is_there(&self) -> bool {
        let Some(dir) = self.file.parent() else { return false };
        // A mount point without its mount is an empty directory, and a dead disk may be read from the cache.
        dir.join("mounted").exists() && std::fs::write(dir.join("probe"), b"").is_ok()
    }

    /// A number that no other mount ever has.
    fn mount(&self) -> Option<u64> {
        /// `STATX_MNT_ID_UNIQUE`
        const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
        let dir = self.file.parent()?;
        Some(statx(CWD, dir, AtFlags::empty(), UNIQUE).ok()?.stx_mnt_id)
    }

    /// Runs it to its end. With a dead disk below it, it may never come to one.
    fn run(&self) -> Result<(ExitStatus, String), Lost> {
        let log = self.work.join("fsx.log");
        let out = File::create(&log).expect("a log");
        let mut command = Command::new(installed_tool("fsx"));
        command.arg("-q").arg("-f").arg(self.work.join("fsx.toml")).arg("-P").arg(&self.work);
        command.args(["-N", "400", "-S", &self.seed.to_string()]).arg(&self.file);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out);
        let mount = self.mount();
        let mut running = Background::start(&mut command);
        let (start, mut look) = (Instant::now(), Duration::from_secs(2));
        loop {
            if let Some(status) = running.0.try_wait().expect("a child can be waited for") {
                return Ok((status, std::fs::read_to_string(&log).unwrap_or_default()));
            }
            if start.elapsed() > look {
                // The mount may be there again, another one: then the program waits for one that is dead.
                if !self.is_there() || self.mount() != mount {
                    return Err(Lost);
                }
                look *= 2;
                assert!(start.elapsed() < PATIENCE, "fsx with seed {} does not end", self.seed);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Load for Fsx {
    fn connect(&mut self) -> Result<(), Lost> {
        if self.is_there() { Ok(()) } else { Err(Lost) }
    }

    fn step(&mut self) -> Result<(), Lost> {
        self.seed += 1;
        let mount = self.mount();
        let (status, text) = self.run()?;
        if status.success() {
            return Ok(());
        }
        // It may have gone on in the next mount, which lacks what was in a mapping of the last one.
        if !self.is_there() || self.mount() != mount {
            return Err(Lost);
        }
        // The mount may be there again by now. SIGBUS is what a mapping of a file that cannot be read gives.
        let errors =
            ["ENOTCONN", "ECONNABORTED", "ENODEV", "EIO", "EROFS", "code: 5,", "code: 103,", "code: 107,"];
        if status.signal() == Some(7) || errors.iter().any(|error| text.contains(error)) {
            return Err(Lost);
        }
        panic!("fsx with seed {}: {status}\n{text}", self.seed);
    }

    fn disconnect(&mut self) {}
}
