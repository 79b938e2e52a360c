//! Measures how long a lone write takes to become visible at the replica, over loopback, beside what fdatasync takes on the
//! same disk in the same run. No test: it asserts nothing.
//!
//! `cargo run --release -p twinfs-tests --bin latency [WRITES [DIRECTORY]]`
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use twinfs_tests::ops::Rng;
use twinfs_tests::pair::{Pair, Setup};

/// A value of the sorted times, in milliseconds.
fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort();
    let at = (times.len() * percent / 100).min(times.len() - 1);
    times[at].as_secs_f64() * 1e3
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let writes: u64 = arguments.next().map_or(300, |text| text.parse().expect("a number of writes"));
    let root = arguments.next().map(PathBuf::from);
    let pair = Pair::start(Setup { root, ..Setup::default() });
    let file = File::create(pair.mount("data").join("f")).expect("the mount takes a file");
    file.write_all_at(&0u64.to_le_bytes(), 0).expect("the mount takes a write");
    pair.wait_caught_up();
    let view = File::open(pair.view("data").join("f")).expect("the view has the file");
    let native = File::create(pair.root().join("native")).expect("the directory takes a file");

    let mut random = Rng(1);
    let (mut visible, mut synced, mut written) = (Vec::new(), Vec::new(), Vec::new());
    for n in 1..=writes {
        std::thread::sleep(Duration::from_millis(20 + random.below(100)));
        let start = Instant::now();
        file.write_all_at(&n.to_le_bytes(), 0).expect("the mount takes a write");
        written.push(start.elapsed());
        let mut seen = [0; 8];
        while u64::from_le_bytes(seen) != n {
            view.read_exact_at(&mut seen, 0).expect("the view reads");
        }
        visible.push(start.elapsed());

        let start = Instant::now();
        native.write_all_at(&n.to_le_bytes(), 0).expect("the directory takes a write");
        native.sync_data().expect("fdatasync");
        synced.push(start.elapsed());
    }
    let limit = 10.0 + 3.0 * percentile(&mut synced, 99);
    println!("{writes} lone writes, milliseconds      p50      p99");
    for (what, times) in [
        ("write(2) on the mount", &mut written),
        ("visible at the replica", &mut visible),
        ("native write and fdatasync", &mut synced),
    ] {
        println!("{what:32} {:8.3} {:8.3}", percentile(times, 50), percentile(times, 99));
    }
    println!("goal: visible within 10 ms + 3 x fdatasync p99 = {limit:.3} ms");
}
