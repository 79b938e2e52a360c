//! Watches a replica's view all the time, also while its daemon dies and comes back: what it shows never goes back and is
//! never torn.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::loads::numbers::{self, Check};
use crate::process::wait_for;
use crate::sampler::Sampler;
use crate::tree::{self, Compare, Listing};

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    /// The view.
    pub view: PathBuf,
    /// The directory in it of which there is a ledger.
    pub churn: PathBuf,
    /// The two volumes in it with numbers.
    pub numbers: [PathBuf; 2],
}

/// What was seen.
#[derive(Debug)]
struct Seen {
    check: Check,
    group: u64,
    samples: u64,
    trees: BTreeMap<u64, Listing>,
    wrong: Vec<String>,
}

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watcher {
    /// Begins to watch; `seed` is that of the transfers.
    #[must_use]
    pub fn start(places: Places, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let check = Check::new(seed);
        let seen = Seen { check, group: 0, samples: 0, trees: BTreeMap::new(), wrong: Vec::new() };
        let seen = Arc::new(Mutex::new(seen));
        let (stopping, noting) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            let sampler = Sampler::new(&places.view);
            while !stopping.load(Ordering::Acquire) {
                if !look(&places, &sampler, &noting) {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        Self { stop, seen, thread: Some(thread) }
    }

    /// Waits until something new was seen: all of one group.
    ///
    /// # Panics
    /// If nothing is.
    pub fn wait_sample(&self) {
        let before = lock(&self.seen).samples;
        wait_for("a look at the view", || (lock(&self.seen).samples > before + 1).then_some(()));
    }

    /// The trees that were seen since the last call, by their groups.
    ///
    /// # Panics
    /// If anything that was seen is wrong.
    #[must_use]
    pub fn take_trees(&self) -> BTreeMap<u64, Listing> {
        let mut seen = lock(&self.seen);
        assert!(seen.wrong.is_empty(), "the view is wrong: {:#?}", &seen.wrong[..seen.wrong.len().min(5)]);
        std::mem::take(&mut seen.trees)
    }

    /// How much was seen.
    #[must_use]
    pub fn samples(&self) -> u64 {
        lock(&self.seen).samples
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the watcher found something torn");
        }
    }
}

/// Looks once; whether that gave a sample. What fails is passed over: the daemon may be dead.
fn look(places: &Places, sampler: &Sampler, seen: &Mutex<Seen>) -> bool {
    let Some(group) = sampler.try_group() else { return false };
    let Ok(read) = numbers::read(&places.numbers[0], &places.numbers[1]) else { return false };
    if sampler.try_group() != Some(group) {
        return false;
    }
    let known = lock(seen).trees.contains_key(&group);
    let tree = if known { None } else { tree::try_listing(&places.churn, Compare::ALL).ok() };
    let mut seen = lock(seen);
    seen.samples += 1;
    if group < seen.group {
        let wrong = format!("group {group} after group {}", seen.group);
        seen.wrong.push(wrong);
    }
    seen.group = seen.group.max(group);
    if let Some(wrong) = seen.check.check(&read) {
        seen.wrong.push(format!("group {group}: {wrong}"));
    }
    if let Some(tree) = tree
        && sampler.try_group() == Some(group)
    {
        seen.trees.insert(group, tree);
    }
    true
}
