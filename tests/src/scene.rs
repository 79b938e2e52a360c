//! A pair at work: programs write, a watcher looks at the view, daemons and disks fail. What must hold after each failure
//! stands here.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use twinfs_replicator::failpoint::{FailPoint, Side};

use crate::loads::acknowledged::Acknowledged;
use crate::loads::churn::{Book, Churn};
use crate::loads::fsx::Fsx;
use crate::loads::numbers::{self, Numbers, Written};
use crate::loads::pages::{self, Pages};
use crate::loads::rows::{Rows, rows_of_copy};
use crate::loads::{Load, Loads};
use crate::loop_fs::{LoopFs, unmount};
use crate::ops::Rng;
use crate::pair::{Pair, Setup};
use crate::process::{run, wait_for};
use crate::tree::{self, Compare, Listing};
use crate::watcher::{Places, Watcher};

/// The name of a side's site.
#[must_use]
pub fn site(side: Side) -> &'static str {
    match side {
        Side::Primary => "nyc",
        Side::Replica => "chi",
    }
}

/// Three volumes and a relay; checkpoints come often and segments are small, so that crashes fall into many of them.
#[must_use]
pub fn setup() -> Setup {
    let env =
        vec![("TWINFS_TEST_CHECKPOINT_MS", "250".into()), ("TWINFS_TEST_SEGMENT_BYTES", "8388608".into())];
    let volumes = vec![("tree", "src0"), ("one", "src1"), ("two", "src2")];
    Setup { volumes, env, relay: true, ..Setup::default() }
}

/// A pair at work.
#[derive(Debug)]
pub struct Scene {
    // In the order in which they end.
    watcher: Option<Watcher>,
    loads: Loads,
    /// The sites.
    pub pair: Pair,
    book: Book,
    written: Arc<Written>,
    exact: bool,
    /// How often programs had lost their mount when all was equal last, and whether they may have since.
    lost: usize,
    primary_died: bool,
    rows: Acknowledged,
    pages: Acknowledged,
    /// Rows and pages that the replica has shown.
    shown: [u64; 2],
    /// Random numbers.
    pub rng: Rng,
}

impl Scene {
    /// Starts everything. With `exact`, every state of the view is compared with a ledger. A primary that loses power
    /// goes back to what was durable there; what the replica showed before may then have never been, so for that only
    /// what was made durable is looked at.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(setup: Setup, seed: u64, exact: bool) -> Self {
        let pair = Pair::start(setup);
        let churn = pair.mount("tree").join("churn");
        std::fs::create_dir_all(churn.join("tree")).expect("a directory");
        std::fs::write(churn.join("counter"), [0xff; 8]).expect("a file");
        let two = pair.mount("two");
        std::fs::write(two.join("mounted"), b"").expect("a file");
        let (numbers, written) = Numbers::new(&pair.mount("one"), &two, seed);
        numbers.make_files();
        let mode = if seed.is_multiple_of(2) { "delete" } else { "wal" };
        let (rows_load, rows) = Rows::create(&two.join("rows.db"), mode);
        let (pages_load, pages) = Pages::create(&two.join("pages"));
        pair.wait_caught_up();
        let book = Book::default();
        let source = pair.source("tree").join("churn");
        book.turn(&source);
        let ledger = exact.then(|| book.clone());
        let mut loads: Vec<(Box<dyn Load>, _)> = vec![
            (Box::new(Churn::new(&churn, &source, seed, ledger)), Duration::from_millis(1)),
            (Box::new(rows_load), Duration::from_millis(5)),
            (Box::new(pages_load), Duration::from_millis(2)),
            (Box::new(Fsx::new(&two.join("fsx"), pair.root(), seed)), Duration::from_millis(50)),
        ];
        if exact {
            loads.push((Box::new(numbers), Duration::from_millis(1)));
        }
        let places = Places {
            view: pair.view_root(),
            churn: pair.view("tree").join("churn"),
            numbers: [pair.view("one"), pair.view("two")],
        };
        let watcher = exact.then(|| Watcher::start(places, seed));
        let (loads, rng) = (Loads::start(loads), Rng(seed));
        Self {
            watcher,
            loads,
            pair,
            book,
            written,
            exact,
            lost: 0,
            primary_died: false,
            rows,
            pages,
            shown: [0; 2],
            rng,
        }
    }

    /// Lets everything run for a moment.
    pub fn work(&mut self) {
        self.loads.wait_connected();
        self.loads.wait_steps(50);
        std::thread::sleep(Duration::from_millis(self.rng.below(1200)));
    }

    /// Kills the daemon of a site now; with a fail point, starts it anew, to die there at the
    /// given passage, after standing still for so many milliseconds.
    pub fn kill(&mut self, side: Side, point: Option<(FailPoint, u64, u64)>) {
        if side == Side::Primary {
            // Nobody may come between two mounts: SQLite would find no database beside the log that the next mount brings,
            // and remove the log.
            self.loads.stay_lost();
        }
        let Some((point, passage, linger)) = point else { return self.pair.kill(site(side)) };
        match point {
            // Replayed is only what was not checkpointed.
            FailPoint::Replayed => self.pair.kill(site(side)),
            _ => {
                // Files that programs have open when their mount is taken away are another test's concern.
                let rest = self.loads.rest();
                self.pair.stop(site(side));
                drop(rest);
            }
        }
        self.pair.fail_at(Some((site(side), format!("{}:{passage}:{linger}", point.name()))));
        self.pair.spawn(site(side));
        self.pair.wait_running_or_dead(site(side));
        self.loads.connect_again();
        self.pair.wait_killed(site(side));
        self.pair.fail_at(None);
        if side == Side::Primary {
            self.loads.stay_lost();
        }
    }

    /// Cuts the power of the replica, whose site directory stands on `fs`, and brings it back: what was not made durable
    /// is gone. It must have all of which the primary was told.
    pub fn cut_power_of_replica(&mut self, fs: &mut LoopFs) {
        // A sync under way may return success in error: see `CUT_RACE`. Nobody is told of it, as the link is cut before.
        self.pair.relay().cut(true);
        let told = self.told();
        std::thread::sleep(Duration::from_millis(self.rng.below(30)));
        fs.cut_power();
        self.pair.kill("chi");
        unmount(&self.pair.view_root());
        fs.remount();
        self.recover_replica(told);
    }

    /// Cuts the power of the primary, whose site directory and sources stand on `fs`, and brings it back, in another
    /// boot. What programs made durable must be there.
    pub fn cut_power_of_primary(&mut self, fs: &mut LoopFs) {
        self.loads.stay_lost();
        let at = Instant::now();
        self.rows.power_cut(at);
        self.pages.power_cut(at);
        fs.cut_power();
        self.pair.kill("nyc");
        for volume in ["tree", "one", "two"] {
            unmount(&self.pair.mount(volume));
        }
        fs.remount();
        let boot = self.rng.next_u64();
        self.pair.set_env("TWINFS_TEST_BOOT_ID", format!("{boot:016x}"));
        // The replica may have shown what is gone now, and will not any more.
        self.shown = [0; 2];
        self.recover_primary();
    }

    /// Starts a dead site again, checks it, and waits until it works.
    pub fn recover(&mut self, side: Side) {
        match side {
            Side::Primary => self.recover_primary(),
            Side::Replica => {
                self.pair.relay().cut(true);
                let told = self.told();
                self.recover_replica(told);
            }
        }
    }

    /// The last group of which the primary was told.
    #[must_use]
    pub fn told(&self) -> u64 {
        self.pair.status("nyc")["group"].as_u64().expect("a number")
    }

    /// Starts a dead replica again, with the link cut: what it shows now is what it had. It must have all of which the
    /// primary was told. Then the link is there again.
    ///
    /// # Panics
    /// If anything is wrong.
    pub fn recover_replica(&mut self, told: u64) {
        self.pair.start_replica();
        let group = self.pair.sampler().group();
        assert!(group >= told, "the primary was told of group {told}, the replica shows {group}");
        self.check_view();
        self.pair.relay().cut(false);
    }

    /// With the link cut. What was journaled and is in no group may still become one.
    fn check_view(&mut self) {
        let copy = self.pair.root().join("copy");
        let sampler = self.pair.sampler();
        let two = self.pair.view("two");
        let read = || {
            drop(std::fs::remove_dir_all(&copy));
            std::fs::create_dir(&copy).expect("a directory");
            for name in ["rows.db", "rows.db-journal", "rows.db-wal"] {
                let file = two.join(name);
                if file.exists() {
                    run(Command::new("cp").arg(file).arg(&copy));
                }
            }
            let pages = pages::last_page(&two.join("pages")).expect("the view can be read");
            (tree::listing(&self.pair.view("tree").join("churn"), Compare::ALL), pages)
        };
        let (group, (listing, pages)) = wait_for("the view to stand still", || sampler.sample(read));
        self.check_trees(Some((group, listing)));
        let shown = [rows_of_copy(&copy.join("rows.db")), pages];
        let acknowledged = [self.rows.last(), self.pages.last()];
        for at in 0..2 {
            assert!(
                shown[at] >= self.shown[at] && shown[at] <= acknowledged[at] + 1,
                "rows and pages: the replica shows {shown:?}, it has shown {:?}, {acknowledged:?} are acknowledged",
                self.shown
            );
        }
        self.shown = shown;
    }

    /// All that was seen of the tree is in the ledger, in this order.
    fn check_trees(&self, more: Option<(u64, Listing)>) {
        let Some(watcher) = &self.watcher else { return };
        watcher.wait_sample();
        let paused = self.loads.pause();
        let mut trees = watcher.take_trees();
        trees.extend(more);
        self.book.check(&trees);
        drop(paused);
    }

    /// Starts a killed primary again: programs go on by themselves, and find what they were told is there.
    fn recover_primary(&mut self) {
        self.pair.start_primary();
        self.loads.connect_again();
        self.loads.wait_connected();
        self.primary_died = true;
        let paused = self.loads.pause();
        if self.exact {
            self.check_numbers("the primary's tree", |pair, volume| pair.source(volume));
        }
        drop(paused);
        self.pair.wait_duplex();
    }

    fn check_numbers(&self, what: &str, place: impl Fn(&Pair, &str) -> PathBuf) {
        let roots = ["one", "two"].map(|volume| place(&self.pair, volume));
        let seen = numbers::read(&roots[0], &roots[1]).expect("the files can be read");
        numbers::assert_has(&self.written, &seen, what);
    }

    /// Mirroring goes on; when the programs rest, all is equal.
    ///
    /// # Panics
    /// If that is not so.
    pub fn converge(&mut self) {
        self.work();
        let rest = self.loads.rest();
        self.pair.assert_converged();
        if let Some(watcher) = &self.watcher {
            watcher.wait_sample();
            self.book.check(&watcher.take_trees());
            self.check_numbers("the replica, after all was equal", |pair, volume| pair.view(volume));
            self.book.turn(&self.pair.source("tree").join("churn"));
        }
        let lost = self.loads.lost();
        assert!(
            self.primary_died || lost == self.lost,
            "a program lost its mount, although the primary lived"
        );
        (self.lost, self.primary_died) = (lost, false);
        drop(rest);
    }

    /// Ends everything well.
    ///
    /// # Panics
    /// If it does not.
    pub fn end(self) {
        let Self { loads, watcher, mut pair, .. } = self;
        if let Some(watcher) = &watcher {
            println!("the view was seen {} times", watcher.samples());
        }
        drop(loads);
        drop(watcher);
        pair.wait_caught_up();
        pair.assert_plain_trees();
    }
}
