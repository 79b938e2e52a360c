//! Places at which a daemon can be made to die, for the crash tests.
//!
//! `TWINFS_FAIL_POINT=NAME[:N[:MS]]` in a daemon's environment makes it kill itself, as the OOM killer would, when it
//! passes the place of that name for the N-th time (the first by default). Nothing is flushed, closed or unmounted.
//! The thread that comes there stands still for MS milliseconds first, while the others go on: what was shown or said
//! too early gets the time to be seen. Without the variable a passage costs one atomic load.
//!
//! The simulator has no process to kill. It [observes](observe) passages instead.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// The environment variable that names the place.
pub const VARIABLE: &str = "TWINFS_FAIL_POINT";

/// Which daemon passes a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `twinfs mount`
    Primary,
    /// `twinfs replica`
    Replica,
}

macro_rules! fail_points {
    ($($side:ident $name:literal $point:ident: $what:literal,)+) => {
        /// A place in a daemon.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum FailPoint {
            $(#[doc = $what] $point,)+
        }

        impl FailPoint {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$point,)+];

            /// Its name in the environment.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$point => $name,)+ }
            }

            /// The daemon that passes it.
            #[must_use]
            pub const fn side(self) -> Side {
                match self { $(Self::$point => Side::$side,)+ }
            }
        }
    };
}

fail_points! {
    Primary "reserved" Reserved: "A mutation has its slot, and the intent is written.",
    Primary "backing-done" BackingDone: "The backing call is done, its update is not published.",
    Primary "published" Published: "The update is published, the program has no answer.",
    Primary "cut" Cut: "Updates were cut from the sidefile, no set was made of them.",
    Primary "issued" Issued: "Sets were made, and given to no link.",
    Primary "acknowledged" Acknowledged: "An acknowledgement was taken, the room in the sidefile is not free yet.",
    Primary "released" Released: "The sidefile says that a set is acknowledged, its updates are still in it.",
    Primary "file-written" FileWritten: "A file of the site directory is durable beside the one that it shall replace.",
    Primary "state-saved" StateSaved: "The control file says that the session runs, no mount is there.",
    Primary "copier-object" CopierObject: "An object was published by the copy, its content and names were not.",
    Primary "copier-complete" CopierComplete: "All was copied, the end of the copy is not published.",
    Replica "adopted" Adopted: "What a hello brought is durable, the welcome was not sent.",
    Replica "appended" Appended: "A set was handed to the journal, not synced.",
    Replica "synced" Synced: "Sets are durable, not acknowledged.",
    Replica "commit-appended" CommitAppended: "A COMMIT was handed to the journal, not synced.",
    Replica "committed" Committed: "A COMMIT is durable, its group does not show.",
    Replica "shown" Shown: "A group shows, nobody was told.",
    Replica "segment-written" SegmentWritten: "A new segment of the journal is durable, without its name.",
    Replica "segment-named" SegmentNamed: "A new segment of the journal has its name.",
    Replica "trimming" Trimming: "A checkpoint is durable, the journal before it is still there.",
    Replica "trimmed" Trimmed: "The journal before a checkpoint was removed.",
    Replica "replayed" Replayed: "A group was applied again at the start.",
    Replica "checkpoint-prepared" CheckpointPrepared: "New objects stand in staging, the table does not know them.",
    Replica "checkpoint-started" CheckpointStarted: "The table says that a checkpoint has begun.",
    Replica "checkpoint-content" CheckpointContent: "The content of one file was written.",
    Replica "checkpoint-contents" CheckpointContents: "The contents of all files were written.",
    Replica "checkpoint-detached" CheckpointDetached: "All that moves was taken out of the tree.",
    Replica "checkpoint-attach" CheckpointAttach: "One name was put into the tree.",
    Replica "checkpoint-attributes" CheckpointAttributes: "Attributes were set.",
    Replica "checkpoint-emptied" CheckpointEmptied: "Staging is empty, the times of directories are not set.",
    Replica "checkpoint-unsynced" CheckpointUnsynced: "The tree is as it shall be, not synced.",
    Replica "checkpoint-synced" CheckpointSynced: "One volume's tree is durable.",
    Replica "checkpoint-written" CheckpointWritten: "All trees are durable, the table does not say so.",
    Replica "checkpoint-done" CheckpointDone: "The table says that the checkpoint is done.",
}

/// The place to die at, as its number plus one; zero if there is none.
static ARMED: AtomicU8 = AtomicU8::new(0);
/// How often it will be passed until then.
static LEFT: AtomicU32 = AtomicU32::new(0);
/// How long the thread stands still before it, in milliseconds.
static LINGER: AtomicU64 = AtomicU64::new(0);

/// The variable says nonsense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE}={0} is not NAME[:N[:MS]] with a known name")]
pub struct BadFailPoint(String);

/// Reads the environment. A daemon calls it once, as it starts.
///
/// # Errors
/// [`BadFailPoint`]
pub fn arm() -> Result<(), BadFailPoint> {
    let Ok(text) = std::env::var(VARIABLE) else { return Ok(()) };
    let (point, passages, linger) = parse(&text).ok_or(BadFailPoint(text))?;
    tracing::warn!(point = point.name(), passages, "a test has this daemon kill itself");
    LEFT.store(passages, Ordering::Relaxed);
    LINGER.store(linger, Ordering::Relaxed);
    ARMED.store(point as u8 + 1, Ordering::Release);
    Ok(())
}

fn parse(text: &str) -> Option<(FailPoint, u32, u64)> {
    let (name, numbers) = text.split_once(':').unwrap_or((text, "1"));
    let (passages, linger) = numbers.split_once(':').unwrap_or((numbers, "0"));
    let point = FailPoint::ALL.iter().copied().find(|point| point.name() == name)?;
    Some((point, passages.parse().ok().filter(|passages| *passages > 0)?, linger.parse().ok()?))
}

/// A number from a variable that only tests set. Nonsense counts as nothing.
#[must_use]
pub fn test_number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Passes a place.
#[inline]
pub fn pass(point: FailPoint) {
    match ARMED.load(Ordering::Acquire) {
        0 => {}
        OBSERVED => tell_observer(point),
        armed if armed == point as u8 + 1 => last_passage(point),
        _ => {}
    }
}

/// Says that some thread observes passages, in place of a point to die at.
const OBSERVED: u8 = u8::MAX;

/// Hears of each place that a thread passes.
pub type Observer = Rc<dyn Fn(FailPoint)>;

thread_local! {
    static OBSERVER: RefCell<Option<Observer>> = const { RefCell::new(None) };
}

/// Does some work, and has `observer` called for each place that this thread passes meanwhile. Nothing is observed in a
/// process that is to kill itself.
pub fn observe<T>(observer: Observer, work: impl FnOnce() -> T) -> T {
    /// Takes the observer away again, also if the work panics.
    struct Restore(Option<Observer>);
    impl Drop for Restore {
        fn drop(&mut self) {
            OBSERVER.set(self.0.take());
        }
    }
    // If it is armed already, it stays so.
    let _ = ARMED.compare_exchange(0, OBSERVED, Ordering::AcqRel, Ordering::Acquire);
    let _restore = Restore(OBSERVER.replace(Some(observer)));
    work()
}

#[cold]
fn tell_observer(point: FailPoint) {
    let observer = OBSERVER.with_borrow(Clone::clone);
    if let Some(observer) = observer {
        observer(point);
    }
}

#[cold]
fn last_passage(point: FailPoint) {
    if LEFT.fetch_sub(1, Ordering::AcqRel) == 1 {
        tracing::warn!(point = point.name(), "killed at a fail point");
        std::thread::sleep(Duration::from_millis(LINGER.load(Ordering::Relaxed)));
        // It cannot fail, and nothing would be left to do if it did.
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_differ() {
        assert_eq!(parse("synced"), Some((FailPoint::Synced, 1, 0)));
        assert_eq!(parse("checkpoint-attach:12:50"), Some((FailPoint::CheckpointAttach, 12, 50)));
        for nonsense in ["", "nowhere", "synced:", "synced:0", "synced:x", "synced:1:", "synced:1:2:3"] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
        for (at, point) in FailPoint::ALL.iter().enumerate() {
            assert_eq!(parse(point.name()), Some((*point, 1, 0)));
            assert_eq!(*point as usize, at);
        }
    }
}
