//! Numbers that go to one file before the next, over two volumes, and transfers between accounts.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Load, Lost, expect_or_lost};
use crate::ops::Rng;
use crate::order::{
    ACCOUNTS, Account, Auditor, START_BALANCE, Transfers, account_path, read_numbers, write_numbers,
};

/// The files that get each number, in this order: the volume's place (0 or 1) and the name.
const CHAIN: [(usize, &str); 4] = [(0, "a"), (1, "b"), (1, "c"), (0, "d")];

/// What the writer was told is written.
#[derive(Debug, Default)]
pub struct Written {
    number: AtomicU64,
    transfers: AtomicU64,
}

/// Writes them.
#[derive(Debug)]
pub struct Numbers {
    roots: [PathBuf; 2],
    open: Option<Vec<File>>,
    accounts: Vec<File>,
    transfers: Transfers,
    next: (usize, usize, i64),
    balances: [i64; ACCOUNTS],
    written: Arc<Written>,
}

impl Numbers {
    /// On two volumes.
    #[must_use]
    pub fn new(one: &Path, two: &Path, seed: u64) -> (Self, Arc<Written>) {
        let mut transfers = Transfers(Rng(seed));
        let next = transfers.next_transfer();
        let written = Arc::new(Written::default());
        let roots = [one.to_owned(), two.to_owned()];
        let load = Self {
            roots,
            open: None,
            accounts: Vec::new(),
            transfers,
            next,
            balances: [START_BALANCE; ACCOUNTS],
            written: Arc::clone(&written),
        };
        (load, written)
    }

    /// Makes the files, before anything runs.
    ///
    /// # Panics
    /// If they cannot be made.
    pub fn make_files(&self) {
        for (volume, name) in CHAIN {
            let file = File::create(self.roots[volume].join(name)).expect("a new file");
            write_numbers(&file, [0, !0]).expect("room for two numbers");
        }
        for account in 0..ACCOUNTS {
            let file = File::create(account_path(&self.roots[0], account)).expect("a new file");
            write_numbers(&file, [START_BALANCE as u64, 0]).expect("room for two numbers");
        }
    }
}

impl Load for Numbers {
    fn connect(&mut self) -> Result<(), Lost> {
        let open = |path: PathBuf| File::options().write(true).open(path).map_err(|_| Lost);
        let chain = CHAIN.iter().map(|(volume, name)| open(self.roots[*volume].join(name)));
        let chain = chain.collect::<Result<Vec<_>, _>>()?;
        let accounts = (0..ACCOUNTS).map(|account| open(account_path(&self.roots[0], account)));
        self.accounts = accounts.collect::<Result<_, _>>()?;
        self.open = Some(chain);
        Ok(())
    }

    // A step that was cut off is done again, from its beginning and with the same numbers: they are absolute.
    fn step(&mut self) -> Result<(), Lost> {
        let Some(chain) = &self.open else { return Err(Lost) };
        let n = self.written.number.load(Ordering::Acquire) + 1;
        for file in chain {
            expect_or_lost("a number", write_numbers(file, [n, !n]))?;
        }
        self.written.number.store(n, Ordering::Release);
        let (from, to, amount) = self.next;
        let n = self.written.transfers.load(Ordering::Acquire) + 1;
        let debited = self.balances[from] - amount;
        let credited = self.balances[to] + amount;
        expect_or_lost("a debit", write_numbers(&self.accounts[from], [debited as u64, n]))?;
        expect_or_lost("a credit", write_numbers(&self.accounts[to], [credited as u64, n]))?;
        (self.balances[from], self.balances[to]) = (debited, credited);
        self.next = self.transfers.next_transfer();
        self.written.transfers.store(n, Ordering::Release);
        Ok(())
    }

    fn disconnect(&mut self) {
        self.open = None;
        self.accounts.clear();
    }
}

/// The files as they were read.
pub type Seen = ([u64; 4], [Account; ACCOUNTS]);

/// Reads the files below the roots of both volumes.
///
/// # Errors
/// What the file system says.
pub fn read(one: &Path, two: &Path) -> std::io::Result<Seen> {
    let roots = [one, two];
    let mut chain = [0; 4];
    for (at, (volume, name)) in CHAIN.iter().enumerate() {
        chain[at] = read_numbers(&roots[*volume].join(name))?[0];
    }
    let mut accounts = [(0, 0); ACCOUNTS];
    for (number, account) in accounts.iter_mut().enumerate() {
        let [balance, n] = read_numbers(&account_path(one, number))?;
        *account = (balance as i64, n);
    }
    Ok((chain, accounts))
}

/// Checks what was read of one consistent state, in the order of reading: none is before an earlier one.
#[derive(Debug)]
pub struct Check {
    auditor: Auditor,
    last: [u64; 4],
}

impl Check {
    /// Of the transfers of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { auditor: Auditor::new(seed), last: [0; 4] }
    }

    /// What is wrong, if anything.
    pub fn check(&mut self, (chain, accounts): &Seen) -> Option<String> {
        let torn = chain.windows(2).any(|two| two[0] < two[1]) || chain[0] > chain[3] + 1;
        let back = chain.iter().zip(&self.last).any(|(now, last)| now < last);
        let last = std::mem::replace(&mut self.last, *chain);
        if torn || back {
            return Some(format!("the numbers are {chain:?}, after {last:?}"));
        }
        self.auditor.check(accounts)
    }
}

/// Asserts that a tree has all that the writer was told is written. Only while the writer stands still.
///
/// # Panics
/// If it lacks something.
pub fn assert_has(written: &Written, seen: &Seen, where_: &str) {
    let (chain, accounts) = seen;
    let number = written.number.load(Ordering::Acquire);
    let transfers = written.transfers.load(Ordering::Acquire);
    let last = accounts.iter().map(|account| account.1).max().unwrap_or(0);
    assert!(
        chain.iter().all(|n| *n >= number) && last >= transfers,
        "{where_}: {number} and transfer {transfers} were written, {chain:?} and transfer {last} are there"
    );
}
