//! A SQLite writer that keeps count, outside the mount, of the transactions that returned.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::acknowledged::Acknowledged;
use super::{Load, Lost};
use crate::process::run;

/// Inserts rows 1, 2, 3, … into a table, each in a transaction of its own, and twice.
#[derive(Debug)]
pub struct Rows {
    database: PathBuf,
    open: Option<Client>,
    acknowledged: Acknowledged,
}

#[derive(Debug)]
struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(database: &Path) -> Self {
        // Without a terminal sqlite3 would keep its answers to itself until there are many.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "sqlite3", "-batch", "-bail", "-cmd", ".timeout 10000"]).arg(database);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("stdbuf and sqlite3 are installed");
        let input = child.stdin.take().expect("its input is a pipe");
        let output = BufReader::new(child.stdout.take().expect("its output is a pipe"));
        Self { child, input, output }
    }

    /// The answer, one line; `None` if the program ended.
    fn ask(&mut self, sql: &str) -> Option<String> {
        writeln!(self.input, "{sql}").ok()?;
        let mut line = String::new();
        self.output.read_line(&mut line).ok()?;
        (!line.is_empty()).then(|| line.trim().to_owned())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It closes the database if it can, and ends by itself if the mount is dead.
        drop(writeln!(self.input, ".quit"));
        drop(self.child.wait());
    }
}

impl Rows {
    /// A writer of a new database; `mode` is the mode of its journal. Also gives the ledger of the rows whose
    /// transactions returned.
    ///
    /// # Panics
    /// If the database cannot be made.
    #[must_use]
    pub fn create(database: &Path, mode: &'static str) -> (Self, Acknowledged) {
        let create = format!("PRAGMA journal_mode={mode}; CREATE TABLE a(n INT); CREATE TABLE b(n INT);");
        run(Command::new("sqlite3").arg("-batch").arg(database).arg(create));
        let acknowledged = Acknowledged::default();
        let ledger = acknowledged.clone();
        (Self { database: database.to_owned(), open: None, acknowledged }, ledger)
    }
}

impl Load for Rows {
    fn connect(&mut self) -> Result<(), Lost> {
        std::fs::metadata(&self.database).map_err(|_| Lost)?;
        let mut client = Client::start(&self.database);
        // EXTRA: after a power cut FULL may roll back a transaction that returned, if the journal is a file of its own.
        let last = client.ask("PRAGMA synchronous=EXTRA; SELECT ifnull(max(n), 0) FROM b;").ok_or(Lost)?;
        let last: u64 = last.parse().unwrap_or_else(|_| panic!("{}: {last:?}", self.database.display()));
        // The transaction that was cut off may have been committed.
        self.acknowledged.found(last, "the rows");
        self.open = Some(client);
        Ok(())
    }

    fn step(&mut self) -> Result<(), Lost> {
        let n = self.acknowledged.last() + 1;
        let client = self.open.as_mut().ok_or(Lost)?;
        let sql = format!(
            "BEGIN; INSERT INTO a VALUES({n}); INSERT INTO b VALUES({n}); COMMIT; SELECT 'done', {n};"
        );
        let answer = client.ask(&sql).ok_or(Lost)?;
        assert_eq!(answer, format!("done|{n}"), "{}", self.database.display());
        self.acknowledged.note(n);
        Ok(())
    }

    fn disconnect(&mut self) {
        self.open = None;
    }
}

/// The rows of a database that was copied out of a view: whole, each in both tables, without a gap.
///
/// # Panics
/// If the database is broken, or shows half a transaction.
#[must_use]
pub fn rows_of_copy(database: &Path) -> u64 {
    let ask = "PRAGMA integrity_check; SELECT count(*) = (SELECT count(*) FROM b), \
               count(*) = ifnull(max(n), 0), count(*) FROM a;";
    let said = run(Command::new("sqlite3").args(["-batch", "-cmd", ".timeout 10000"]).arg(database).arg(ask));
    let rows = said.trim().strip_prefix("ok\n1|1|").and_then(|rows| rows.parse().ok());
    rows.unwrap_or_else(|| panic!("{}: {said}", database.display()))
}
