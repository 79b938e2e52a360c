//! The way in which a database writes its log: page after page into a preallocated file, each made durable with fdatasync
//! before the next.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::acknowledged::Acknowledged;
use super::{Load, Lost, expect_or_lost};

const PAGE_BYTES: usize = 8192;
const PAGES: u64 = 64;

/// Writes page n to the place n modulo the file's length, for n = 1, 2, 3, …
#[derive(Debug)]
pub struct Pages {
    path: PathBuf,
    open: Option<File>,
    acknowledged: Acknowledged,
}

impl Pages {
    /// Makes the file, before anything runs. Also gives the ledger of the pages that are durable.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn create(path: &Path) -> (Self, Acknowledged) {
        let file = File::create(path).expect("a new file");
        for place in 0..PAGES {
            file.write_all_at(&page(0), place * PAGE_BYTES as u64).expect("room for a page");
        }
        file.sync_all().expect("the file can be made durable");
        let acknowledged = Acknowledged::default();
        let ledger = acknowledged.clone();
        (Self { path: path.to_owned(), open: None, acknowledged }, ledger)
    }
}

fn page(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(PAGE_BYTES / 8)
}

impl Load for Pages {
    fn connect(&mut self) -> Result<(), Lost> {
        let file = File::options().read(true).write(true).open(&self.path).map_err(|_| Lost)?;
        self.acknowledged.found(last_page(&self.path).map_err(|_| Lost)?, "the log of pages");
        self.open = Some(file);
        Ok(())
    }

    fn step(&mut self) -> Result<(), Lost> {
        let file = self.open.as_ref().ok_or(Lost)?;
        let n = self.acknowledged.last() + 1;
        expect_or_lost("a page", file.write_all_at(&page(n), n % PAGES * PAGE_BYTES as u64))?;
        expect_or_lost("fdatasync", file.sync_data())?;
        self.acknowledged.note(n);
        Ok(())
    }

    fn disconnect(&mut self) {
        self.open = None;
    }
}

/// The last page of a log.
///
/// # Errors
/// What the file system says.
///
/// # Panics
/// If an earlier page is missing. The one page that was under way may be torn, as on any disk.
pub fn last_page(path: &Path) -> std::io::Result<u64> {
    let bytes = std::fs::read(path)?;
    assert_eq!(bytes.len() as u64, PAGES * PAGE_BYTES as u64, "{}", path.display());
    let mut numbers = Vec::new();
    for (place, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        let words = page.chunks(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let words: Vec<u64> = words.collect();
        let (oldest, newest) = (words.iter().min(), words.iter().max());
        let (Some(&oldest), Some(&newest)) = (oldest, newest) else { continue };
        let fits = |n: u64| n == 0 || n % PAGES == place as u64;
        assert!(fits(oldest) && fits(newest), "{}: {oldest} and {newest} at {place}", path.display());
        numbers.push((oldest, newest));
    }
    let last = numbers.iter().map(|(oldest, _)| *oldest).max().unwrap_or(0);
    for n in last.saturating_sub(PAGES - 1).max(1)..=last {
        let (oldest, newest) = numbers[(n % PAGES) as usize];
        let torn = newest == last + 1 && oldest + PAGES == newest;
        assert!(
            (oldest, newest) == (n, n) || torn || oldest == 0 && newest == last + 1,
            "{}: page {n} of {last} is missing: {oldest} to {newest} stands there",
            path.display()
        );
    }
    Ok(last)
}
