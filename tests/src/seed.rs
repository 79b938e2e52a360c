//! Seeds of random tests: from the environment, from the file of seeds that once failed, or fixed ones.
//!
//! `TWINFS_SEED=N` runs one seed, `TWINFS_ROUNDS=N` sets how many operations (or rounds) a run has. A test that fails
//! prints the command that replays it. `tests/seeds.txt` keeps seeds that once failed: a line each, the test's name and
//! the seed; they run first, always.

use std::path::Path;

/// One run of a random test.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Everything random depends on this.
    pub seed: u64,
    /// How many operations or rounds.
    pub rounds: u64,
    test: &'static str,
    binary: &'static str,
}

/// A number from the environment.
///
/// # Panics
/// If the variable is set and no number.
#[must_use]
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// The runs of test `test` in `tests/tests/BINARY.rs`.
///
/// # Panics
/// If the environment or the file of seeds holds nonsense.
#[must_use]
pub fn runs(binary: &'static str, test: &'static str, seeds: &[u64], rounds: u64) -> Vec<Run> {
    let rounds = number("TWINFS_ROUNDS").unwrap_or(rounds);
    let seeds = match number("TWINFS_SEED") {
        Some(seed) => vec![seed],
        None => kept(test).into_iter().chain(seeds.iter().copied()).collect(),
    };
    seeds.into_iter().map(|seed| Run { seed, rounds, test, binary }).collect()
}

/// The seeds of a test that once failed.
///
/// # Panics
/// If the file of seeds holds nonsense.
#[must_use]
pub fn kept(test: &str) -> Vec<u64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds.txt");
    let text = std::fs::read_to_string(&path).expect("tests/seeds.txt is there");
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    lines
        .filter_map(|line| {
            let (name, seed) = line.split_once(' ').expect("a line of seeds.txt is a test's name and a seed");
            (name == test).then(|| seed.trim().parse().expect("a seed is a number"))
        })
        .collect()
}

impl Run {
    /// Announces the run; if the test panics before the result is dropped, says how to replay it.
    #[must_use]
    pub fn announce(self) -> Announced {
        println!("{}: seed {}, {} rounds", self.test, self.seed, self.rounds);
        Announced(self)
    }
}

/// A run under way.
#[derive(Debug)]
pub struct Announced(Run);

impl Drop for Announced {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Run { seed, rounds, test, binary } = self.0;
            eprintln!(
                "replay: TWINFS_SEED={seed} TWINFS_ROUNDS={rounds} cargo test -p twinfs-tests --test {binary} -- --exact {test}\n\
                 keep:   echo '{test} {seed}' >> tests/seeds.txt"
            );
        }
    }
}
