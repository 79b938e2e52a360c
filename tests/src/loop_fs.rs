//! Journaled file systems on loop devices, made for one test and removed after it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{output, run, wait_for};

/// A file system on an image file, mounted below a temporary directory.
#[derive(Debug)]
pub struct LoopFs {
    dir: tempfile::TempDir,
    mounted: bool,
}

impl LoopFs {
    /// Makes and mounts one. `kind` is `ext4` or `xfs`; the image is sparse.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn new(kind: &str, bytes: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("twinfs-loop-").tempdir().expect("a temporary directory");
        let image = dir.path().join("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image file");
        // A small ext4 would have smaller blocks, and other holes than the directory that it is compared with.
        let blocks: &[&str] = if kind == "ext4" { &["-b", "4096"] } else { &[] };
        run(Command::new(format!("mkfs.{kind}")).arg("-q").args(blocks).arg(&image));
        let point = dir.path().join("mnt");
        std::fs::create_dir(&point).expect("a mount point");
        let mut fs = Self { dir, mounted: false };
        fs.mount();
        fs
    }

    fn mount(&mut self) {
        let image = self.dir.path().join("image");
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(self.path()));
        self.mounted = true;
    }

    /// Cuts the power of the disk (`XFS_IOC_GOINGDOWN`, which ext4 knows as well, without flushing the log): nothing that
    /// was not made durable will be there after [`Self::remount`], and every call fails until then. Calls under way may
    /// return success all the same.
    ///
    /// # Panics
    /// If the file system does not take the ioctl.
    pub fn cut_power(&self) {
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(self.path()));
    }

    /// Unmounts and mounts again: the journal of the file system is replayed. Nobody may use it meanwhile.
    ///
    /// # Panics
    /// If somebody does.
    pub fn remount(&mut self) {
        wait_for("everybody to let go of the file system", || {
            output(Command::new("umount").arg(self.path())).status.success().then_some(())
        });
        self.mounted = false;
        self.mount();
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        if self.mounted {
            unmount(&self.path());
        }
    }
}

/// Unmounts `path`, lazily if it is busy.
pub fn unmount(path: &Path) {
    if !output(Command::new("umount").arg(path)).status.success() {
        output(Command::new("umount").arg("-l").arg(path));
    }
}
