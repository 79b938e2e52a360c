//! Measures how long a lone write takes to become visible at the replica, over loopback, beside what fdatasync takes on the
//! same disk in the same run. No test: it asserts nothing.
//!
//! `cargo run --release -p twinfs-tests --bin latency [WRITES [FILES [DIRECTORY]]]`
//!
//! The writes go to FILES files in turn (1): a file that was not touched for a while has to be written into the activity
//! log first.
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
    let files: u64 = arguments.next().map_or(1, |text| text.parse().expect("a number of files"));
    let root = arguments.next().map(PathBuf::from);
    let pair = Pair::start(Setup { root, ..Setup::default() });
    let names: Vec<String> = (0..files).map(|n| format!("f{n}")).collect();
    let made = names.iter().map(|name| {
        let file = File::create(pair.mount("data").join(name)).expect("the mount takes a file");
        file.write_all_at(&0u64.to_le_bytes(), 0).expect("the mount takes a write");
        file
    });
    let made: Vec<File> = made.collect();
    pair.wait_caught_up();
    let seen_as = |name: &String| File::open(pair.view("data").join(name)).expect("the view has the file");
    let views: Vec<File> = names.iter().map(seen_as).collect();
    let native = File::create(pair.root().join("native")).expect("the directory takes a file");

    let mut random = Rng(1);
    let (mut visible, mut synced, mut written) = (Vec::new(), Vec::new(), Vec::new());
    let mut safe = Vec::new();
    for n in 1..=writes {
        std::thread::sleep(Duration::from_millis(20 + random.below(100)));
        let (file, view) = (&made[(n % files) as usize], &views[(n % files) as usize]);
        let start = Instant::now();
        file.write_all_at(&n.to_le_bytes(), 0).expect("the mount takes a write");
        written.push(start.elapsed());
        let mut seen = [0; 8];
        while u64::from_le_bytes(seen) != n {
            view.read_exact_at(&mut seen, 0).expect("the view reads");
        }
        visible.push(start.elapsed());

        let start = Instant::now();
        file.write_all_at(&n.to_le_bytes(), 8).expect("the mount takes a write");
        file.sync_data().expect("fdatasync");
        safe.push(start.elapsed());

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
        ("write and fdatasync on the mount", &mut safe),
        ("native write and fdatasync", &mut synced),
    ] {
        println!("{what:32} {:8.3} {:8.3}", percentile(times, 50), percentile(times, 99));
    }
    println!("goal: visible within 10 ms + 3 x fdatasync p99 = {limit:.3} ms");
}
