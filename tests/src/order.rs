//! What the order tests write and check: numbers that go to one file before another, and accounts with a constant sum.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::ops::Rng;

/// How many accounts there are.
pub const ACCOUNTS: usize = 10;
/// What each of them starts with.
pub const START_BALANCE: i64 = 1000;

/// The file that a transfer debits, the one that it credits, and the amount: the same for every reader of the seed.
#[derive(Debug, Clone)]
pub struct Transfers(pub Rng);

impl Transfers {
    /// The next transfer.
    pub fn next_transfer(&mut self) -> (usize, usize, i64) {
        let from = self.0.below(ACCOUNTS as u64) as usize;
        let to = (from + 1 + self.0.below(ACCOUNTS as u64 - 1) as usize) % ACCOUNTS;
        (from, to, self.0.below(50) as i64 + 1)
    }
}

/// An account as it stands in its file: the balance, and the number of the last transfer that touched it.
pub type Account = (i64, u64);

/// The file of an account.
#[must_use]
pub fn account_path(root: &Path, account: usize) -> PathBuf {
    root.join(format!("account{account}"))
}

/// Writes two numbers in one call.
///
/// # Errors
/// What the file system says.
pub fn write_numbers(file: &File, numbers: [u64; 2]) -> io::Result<()> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    file.write_all_at(&bytes, 0)
}

/// Reads them back.
///
/// # Errors
/// What the file system says.
///
/// # Panics
/// If there is anything but two numbers.
pub fn read_numbers(path: &Path) -> io::Result<[u64; 2]> {
    let bytes = std::fs::read(path)?;
    assert_eq!(bytes.len(), 16, "{} is torn", path.display());
    Ok([0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))))
}

/// Follows the transfers up to what a sample shows.
#[derive(Debug)]
pub struct Auditor {
    transfers: Transfers,
    /// All accounts after `done` transfers; the samples so far show no transfer after `done + 1`.
    accounts: [Account; ACCOUNTS],
    done: u64,
    next: (usize, usize, i64),
}

impl Auditor {
    /// Of the transfers of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut transfers = Transfers(Rng(seed));
        let next = transfers.next_transfer();
        Self { transfers, accounts: [(START_BALANCE, 0); ACCOUNTS], done: 0, next }
    }

    fn debit(&self) -> [Account; ACCOUNTS] {
        let (from, _, amount) = self.next;
        let mut accounts = self.accounts;
        accounts[from] = (accounts[from].0 - amount, self.done + 1);
        accounts
    }

    fn debit_and_credit(&self) -> [Account; ACCOUNTS] {
        let (_, to, amount) = self.next;
        let mut accounts = self.debit();
        accounts[to] = (accounts[to].0 + amount, self.done + 1);
        accounts
    }

    /// What is wrong with a sample, if anything: it must be the state after some transfer, or between a debit and its
    /// credit, and not before that of an earlier sample.
    pub fn check(&mut self, seen: &[Account; ACCOUNTS]) -> Option<String> {
        let last = seen.iter().map(|account| account.1).max().unwrap_or(0);
        while self.done + 1 < last {
            self.accounts = self.debit_and_credit();
            self.done += 1;
            self.next = self.transfers.next_transfer();
        }
        let right = match last > self.done {
            true => *seen == self.debit() || *seen == self.debit_and_credit(),
            false => self.done == 0 && *seen == self.accounts,
        };
        (!right).then(|| {
            let sum: i64 = seen.iter().map(|account| account.0).sum();
            let expected = self.debit_and_credit();
            format!("transfer {last}: the sum is {sum}; seen {seen:?}, expected {expected:?}")
        })
    }
}
