//! Fuzzing of every decoder that sees bytes from a peer or a disk.
//!
//! A [`Target`] takes any bytes and must not panic, hang or use much memory, whatever they are; where a decoder accepts
//! them, it checks what must hold then. Most take the first byte as a choice of how to read the rest: as they are, or
//! *healed*, with lengths and checksums made right, so that the fuzzer gets behind the hashes.
//!
//! Seeds are made by the encoders at run time; none are stored. `tests/run fuzz` runs the targets under libFuzzer (the
//! program `fuzz`), an ordinary test runs the seeds alone.
#![allow(clippy::unwrap_used, reason = "a test, and what it makes itself can be unwrapped")]

mod identity;
mod journal;
mod message;
mod sets;
mod sidefile;
mod site;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use tempfile::TempDir;

/// A decoder.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Feeds it; whether it took the bytes for what they should be.
    pub run: fn(&[u8]) -> bool,
    /// Inputs to start from, most of which it takes.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All of them.
pub const TARGETS: [Target; 12] = [
    Target { name: "record-set", run: sets::record_set, seeds: sets::record_set_seeds },
    Target { name: "update", run: sets::update, seeds: sets::update_seeds },
    Target { name: "unacknowledged", run: sets::unacknowledged, seeds: sets::unacknowledged_seeds },
    Target { name: "message", run: message::message, seeds: message::message_seeds },
    Target { name: "tokens", run: message::tokens, seeds: message::token_seeds },
    Target { name: "segment", run: journal::segment, seeds: journal::segment_seeds },
    Target { name: "journal", run: journal::log, seeds: journal::log_seeds },
    Target { name: "sidefile", run: sidefile::sidefile, seeds: sidefile::sidefile_seeds },
    Target { name: "identity", run: identity::identity, seeds: identity::identity_seeds },
    Target { name: "control", run: site::control, seeds: site::control_seeds },
    Target { name: "state", run: site::state, seeds: site::state_seeds },
    Target { name: "copy-state", run: site::copy_state, seeds: site::copy_state_seeds },
];

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

static SCRATCH: Mutex<Vec<TempDir>> = Mutex::new(Vec::new());

/// A directory for the files of a target, made at its first use.
fn scratch(cell: &'static OnceLock<PathBuf>, fill: impl FnOnce(&Path)) -> &'static Path {
    cell.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path());
        let path = dir.path().to_owned();
        SCRATCH.lock().unwrap().push(dir);
        path
    })
}

/// Dropped, it removes the files of all targets, of which none may run any more. libFuzzer leaves no way to run anything
/// at its end: whoever calls it removes its `TMPDIR`.
#[derive(Debug)]
pub struct CleanUp;

impl Drop for CleanUp {
    fn drop(&mut self) {
        SCRATCH.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Takes the first byte: how to read the rest.
fn choice(bytes: &[u8]) -> (u8, &[u8]) {
    bytes.split_first().map_or((0, bytes), |(first, rest)| (*first, rest))
}

/// Puts a choice before the bytes.
fn chosen(choice: u8, bytes: &[u8]) -> Vec<u8> {
    [&[choice], bytes].concat()
}
