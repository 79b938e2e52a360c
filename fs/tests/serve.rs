//! Not a test by itself: mounts a mirror for programs from outside (pjdfstest, fsx, fio, databases), until somebody
//! unmounts it:
//!
//! ```text
//! TWINFS_SOURCE=/srv/data TWINFS_MOUNT=/srv/data cargo test -p twinfs --test serve -- --ignored
//! ```
#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use twinfs::fuse;
use twinfs::mount::MountOptions;
use twinfs_core::id::VolumeIndex;
use twinfs_core::stamp::Stamp;
use twinfs_core::update::{AttrList, Intent, Op};
use twinfs_replicator::primary::sidefile::{Refused, Wanted};

/// Forgets everything.
struct Nothing;

impl twinfs::recorder::Recorder for Nothing {
    fn reserve<'a>(
        &'a self,
        _volume: VolumeIndex,
        _intent: &Intent<'_>,
        _meta_bytes: usize,
        _data_bytes: usize,
    ) -> Result<Box<dyn twinfs::recorder::Pending + 'a>, Refused> {
        Ok(Box::new(Self))
    }

    fn reserve_all<'a>(
        &'a self,
        _volume: VolumeIndex,
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Box<dyn twinfs::recorder::Pending + 'a>>, Refused> {
        Ok(wanted.iter().map(|_| Box::new(Self) as _).collect())
    }
}

impl twinfs::recorder::Pending for Nothing {
    fn note(&self, _note: twinfs_core::update::Note) {}

    fn publish(self: Box<Self>, _op: Op<&[u8]>, _attrs: AttrList, _data: &[u8]) -> Option<Stamp> {
        None
    }
}

#[test]
#[ignore = "serves until it is unmounted"]
fn serve() {
    let directory =
        |key| PathBuf::from(std::env::var_os(key).expect("TWINFS_SOURCE and TWINFS_MOUNT are set"));
    let (source, mountpoint) = (directory("TWINFS_SOURCE"), directory("TWINFS_MOUNT"));
    let mirror = support::mirror_of(&source, Arc::new(Nothing));
    let mounted = fuse::mount(mirror, &mountpoint, &MountOptions::default()).unwrap();
    mounted.wait().unwrap();
}
