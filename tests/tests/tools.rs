//! Test suites and programs of others on the mount; then the replica must be equal.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use twinfs_tests::loop_fs::LoopFs;
use twinfs_tests::pair::{Pair, Setup};
use twinfs_tests::process::{installed_tool, output, run, wait_for};
use twinfs_tests::seed;
use twinfs_tests::tree::{self, Compare};

/// A pair over ext4: what the scores of the suites are known for.
fn pair_on_ext4(relay: bool) -> (Pair, LoopFs) {
    let fs = LoopFs::new("ext4", 8 << 30);
    let pair = Pair::start(Setup { root: Some(fs.path()), relay, ..Setup::default() });
    (pair, fs)
}

const PJDFSTEST: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// The same score as on ext4.
#[test]
fn pjdfstest_passes() {
    let (mut pair, fs) = pair_on_ext4(false);
    let (dir, other) = (pair.mount("data").join("d"), fs.path().join("other"));
    let second = LoopFs::new("ext4", 1 << 30);
    for path in [&dir, &other] {
        std::fs::create_dir(path).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    // Suites of unprivileged users need the way there.
    for path in fs.path().ancestors().take(2).chain([&*pair.mount("data")]) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let config = pair.root().join("pjdfstest.toml");
    std::fs::write(&config, PJDFSTEST).unwrap();
    let mut command = Command::new(installed_tool("pjdfstest"));
    command.arg("-c").arg(&config).arg("-p").arg(&dir).arg("-s").arg(second.path());
    let output = output(&mut command);
    let text = String::from_utf8_lossy(&output.stdout);
    let summary = text.lines().find(|line| line.starts_with("Summary:")).unwrap_or("no summary");
    let mut failed = String::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| line.trim_end().ends_with("FAILED")) {
        let reason = text.lines().nth(at + 1).unwrap_or_default();
        let _ = writeln!(failed, "{line}\n    {reason}");
    }
    println!("{summary}");
    // As on ext4, but for link::link_count_max: the kernel has no way to ask a FUSE file system for its LINK_MAX, so that
    // case is skipped.
    let expected = "Summary: 0 failed, 14 skipped, 384 passed, 0 expected failures, 398 total";
    assert_eq!(summary, expected, "\n{failed}");
    pair.assert_converged();
    pair.assert_plain_trees();
}

const FSX: &str = "[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 5
punch_hole = 5
sendfile = 5
posix_fadvise = 1
copy_file_range = 5
";

/// All operations of fsx, five seeds; the replica's files have the same contents.
#[test]
fn fsx_passes() {
    let (mut pair, _fs) = pair_on_ext4(false);
    let config = pair.root().join("fsx.toml");
    std::fs::write(&config, FSX).unwrap();
    for run in seed::runs("tools", "fsx_passes", &[1, 2, 3, 4, 5], 20_000) {
        let _announced = run.announce();
        let file = pair.mount("data").join(format!("fsx{}", run.seed));
        let mut command = Command::new(installed_tool("fsx"));
        command.arg("-q").arg("-f").arg(&config).arg("-P").arg(pair.root());
        command.args(["-N", &run.rounds.to_string(), "-S", &run.seed.to_string()]).arg(&file);
        let output = output(&mut command);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let tail: Vec<&str> = text.lines().rev().take(40).collect();
        assert!(output.status.success(), "{}:\n{}", output.status, tail.join("\n"));
    }
    pair.assert_converged();
    pair.assert_plain_trees();
}

/// What fio writes is verified by it, in three ways to write; the replica's files are equal.
#[test]
fn fio_verifies() {
    let (mut pair, _fs) = pair_on_ext4(false);
    for (name, engine, more) in [
        ("psync", "psync", &["--fsync=64", "--bs=4k"][..]),
        ("mmap", "mmap", &["--bs=4k"]),
        ("direct", "libaio", &["--direct=1", "--iodepth=8", "--bs=8k"]),
        ("append", "psync", &["--bsrange=1k-64k", "--rw=write", "--file_append=0"]),
    ] {
        let mut command = Command::new("fio");
        command.args(["--size=24m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--numjobs=2"]);
        command.arg("--verify_state_save=0");
        command.args(["--randseed=7", "--output-format=terse", "--rw=randwrite", "--name", name]);
        command.arg(format!("--ioengine={engine}")).arg("--directory").arg(pair.mount("data")).args(more);
        run(&mut command);
    }
    pair.assert_converged();
    pair.assert_plain_trees();
}

fn sqlite(database: &Path, sql: &str) -> String {
    run(Command::new("sqlite3").args(["-batch", "-cmd", ".timeout 60000"]).arg(database).arg(sql))
}

/// Several processes share a database, in both modes of its journal.
#[test]
fn sqlite_works() {
    let (mut pair, _fs) = pair_on_ext4(false);
    for mode in ["delete", "wal"] {
        let database = pair.mount("data").join(format!("{mode}.db"));
        let create = format!(
            "PRAGMA journal_mode={mode}; CREATE TABLE log(worker INT, n INT); \
             CREATE TABLE sum(total INT); INSERT INTO sum VALUES(0);"
        );
        assert_eq!(sqlite(&database, &create).trim(), mode);
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let mut sql = String::new();
                for n in 0..50 {
                    let _ = write!(
                        sql,
                        "BEGIN IMMEDIATE; INSERT INTO log VALUES({worker},{n}); \
                         UPDATE sum SET total = total + 1; COMMIT;"
                    );
                }
                let mut command = Command::new("sqlite3");
                command.args(["-batch", "-cmd", ".timeout 60000"]).arg(&database).arg(sql);
                command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
            })
            .collect();
        for mut worker in workers {
            assert!(worker.wait().unwrap().success());
        }
        let ask = "PRAGMA integrity_check; SELECT count(*) FROM log; SELECT total FROM sum;";
        assert_eq!(sqlite(&database, ask), "ok\n200\n200\n");
        pair.assert_converged();
        let copy = pair.root().join(format!("{mode}.copy"));
        std::fs::copy(pair.view("data").join(format!("{mode}.db")), &copy).unwrap();
        assert_eq!(sqlite(&copy, ask), "ok\n200\n200\n");
    }
    pair.assert_plain_trees();
}

/// What the replica shows while a database is being written is what a crash would have left: it recovers.
#[test]
fn sqlite_recovers_from_a_replica_at_any_instant() {
    let (pair, _fs) = pair_on_ext4(true);
    for mode in ["delete", "wal"] {
        let database = pair.mount("data").join(format!("{mode}.db"));
        sqlite(
            &database,
            &format!("PRAGMA journal_mode={mode}; CREATE TABLE a(n INT); CREATE TABLE b(n INT);"),
        );
        pair.wait_caught_up();
        let mut sql = String::new();
        for n in 0..2000 {
            let _ = write!(sql, "BEGIN; INSERT INTO a VALUES({n}); INSERT INTO b VALUES({n}); COMMIT;");
        }
        let mut writer = Command::new("sqlite3");
        writer.args(["-batch"]).arg(&database).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut writer = twinfs_tests::process::Background::start(&mut writer);
        let mut input = writer.0.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || std::io::Write::write_all(&mut input, sql.as_bytes()).ok());
        for attempt in 0..5 {
            std::thread::sleep(Duration::from_millis(150));
            // With the link cut, the view stands still, wherever that is.
            pair.relay().cut(true);
            wait_for_rest(&pair);
            let copy = pair.root().join(format!("{mode}.{attempt}"));
            std::fs::create_dir(&copy).unwrap();
            run(Command::new("cp").arg("-a").arg(pair.view("data").join(".")).arg(&copy));
            pair.relay().cut(false);
            let ask = "PRAGMA integrity_check; SELECT count(*) = (SELECT count(*) FROM b), \
                       count(*) = ifnull(max(n), -1) + 1 FROM a;";
            assert_eq!(sqlite(&copy.join(format!("{mode}.db")), ask), "ok\n1|1\n", "attempt {attempt}");
        }
        drop(writer);
        feeder.join().unwrap();
    }
    pair.assert_converged();
}

/// Waits until the group does not change any more: the link is cut.
fn wait_for_rest(pair: &Pair) {
    wait_for("the view to stand still", || {
        let group = pair.sampler().group();
        std::thread::sleep(Duration::from_millis(200));
        (pair.sampler().group() == group).then_some(())
    });
}

/// A PostgreSQL server that a test runs as user `postgres`; dropped, it is stopped.
struct Postgres {
    bin: PathBuf,
    data: PathBuf,
    sockets: PathBuf,
}

impl Postgres {
    fn new(data: PathBuf, sockets: PathBuf) -> Self {
        let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
        let bin =
            versions.flatten().map(|entry| entry.path().join("bin")).max().expect("a version of PostgreSQL");
        Self { bin, data, sockets }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(self.bin.join(program));
        command.current_dir("/").env("PGHOST", &self.sockets).env("LC_ALL", "C");
        command
    }

    fn control(&self, action: &str) -> Command {
        let mut command = self.command("pg_ctl");
        let options = format!("-c listen_addresses= -c unix_socket_directories={}", self.sockets.display());
        command.arg("-D").arg(&self.data).args(["-w", "-t", "120", "-o", &options, "-m", "fast"]);
        command.arg("-l").arg(self.sockets.join("log")).arg(action);
        command
    }

    fn start(&self) {
        let output = output(&mut self.control("start"));
        let log = std::fs::read_to_string(self.sockets.join("log")).unwrap_or_default();
        assert!(output.status.success(), "{}\n{log}", String::from_utf8_lossy(&output.stderr));
    }

    fn ask(&self, sql: &str) -> String {
        run(self.command("psql").args(["-d", "postgres", "-X", "-A", "-t", "-c", sql]))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // It may not run.
        drop(output(&mut self.control("stop")));
    }
}

fn chown_postgres(path: &Path) {
    run(Command::new("chown").arg("postgres:postgres").arg(path));
}

/// The sums of pgbench's tables agree in every state that a transaction leaves.
const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches), \
     (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(tbalance) FROM pgbench_tellers), \
     (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";

/// initdb, pgbench; and a second server starts from what the replica shows at some instant, recovers, and has lost nothing
/// but the last moments.
#[test]
fn postgresql_works_and_recovers_from_the_replica() {
    let (mut pair, fs) = pair_on_ext4(true);
    for path in fs.path().ancestors().take(2).chain([&*pair.mount("data")]) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let data = pair.mount("data").join("pg");
    let sockets = pair.root().join("sockets");
    for path in [&data, &sockets] {
        std::fs::create_dir(path).unwrap();
        chown_postgres(path);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
    }
    let server = Postgres::new(data.clone(), sockets);
    run(server.command("initdb").args(["-A", "trust", "-E", "UTF8", "-D"]).arg(&data));
    server.start();
    run(server.command("pgbench").args(["-i", "-q", "-s", "2", "postgres"]));
    let bench = |seconds: &str| {
        let mut command = server.command("pgbench");
        command.args(["-c", "4", "-j", "2", "-n", "-T", seconds, "postgres"]);
        command
    };
    run(&mut bench("3"));
    pair.wait_caught_up();
    let committed: u64 = server.ask("SELECT count(*) FROM pgbench_history").trim().parse().unwrap();

    // While it goes on, the link is cut: the view stands still in the middle of it.
    let mut running = bench("6").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    pair.relay().cut(true);
    wait_for_rest(&pair);
    let copied = pair.root().join("copy");
    run(Command::new("cp").arg("-a").arg(pair.view("data").join("pg")).arg(&copied));
    pair.relay().cut(false);
    assert!(running.wait().unwrap().success(), "pgbench does not notice the link");

    // The lock file is that of the server on the mount.
    std::fs::remove_file(copied.join("postmaster.pid")).unwrap();
    let second_sockets = pair.root().join("sockets2");
    std::fs::create_dir(&second_sockets).unwrap();
    chown_postgres(&second_sockets);
    let second = Postgres::new(copied, second_sockets);
    second.start();
    assert_eq!(second.ask(SUMS), "t|t|t\n");
    let recovered: u64 = second.ask("SELECT count(*) FROM pgbench_history").trim().parse().unwrap();
    println!("{recovered} transactions recovered, {committed} were committed before");
    assert!(recovered > committed, "all of the first run, and some of the second");
    run(second.command("pg_amcheck").args(["--all", "--install-missing"]));
    drop(second);

    assert_eq!(server.ask(SUMS), "t|t|t\n");
    drop(server);
    pair.assert_converged();
    pair.assert_plain_trees();
}

/// A day at work: a repository with history is cloned, grows, is packed and checked; a program is compiled and runs.
#[test]
fn git_and_a_compiler_work() {
    let (mut pair, _fs) = pair_on_ext4(false);
    let work = pair.mount("data").join("work");
    std::fs::create_dir(&work).unwrap();
    let git = |dir: &Path, arguments: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(dir).args(["-c", "user.name=t", "-c", "user.email=t@localhost"]);
        run(command.args(["-c", "init.defaultBranch=main", "-c", "gc.auto=0"]).args(arguments))
    };
    let first = work.join("first");
    std::fs::create_dir(&first).unwrap();
    git(&first, &["init", "-q"]);
    for commit in 0..40 {
        for file in 0..5 {
            let path = first.join(format!("dir{}/file{file}.c", commit % 7));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = format!("int f{commit}_{file}(int x) {{ return x + {commit}; }}\n").repeat(1);
            std::fs::write(path, text).unwrap();
        }
        git(&first, &["add", "-A"]);
        git(&first, &["commit", "-q", "-m", &format!("commit {commit}")]);
    }
    git(&first, &["gc", "-q", "--aggressive", "--prune=now"]);
    git(&first, &["fsck", "--full", "--strict"]);
    let second = work.join("second");
    git(&work, &["clone", "-q", "--no-local", "first", "second"]);
    git(&second, &["checkout", "-q", "-b", "topic", "HEAD~10"]);
    std::fs::write(second.join("new"), "topic\n").unwrap();
    git(&second, &["add", "-A"]);
    git(&second, &["commit", "-q", "-m", "topic"]);
    git(&second, &["rebase", "-q", "main"]);
    git(&second, &["fsck", "--full"]);
    assert_eq!(git(&second, &["status", "--porcelain"]), "");

    std::fs::write(second.join("main.c"), "int f39_0(int); int main(void) { return f39_0(3) - 42; }\n")
        .unwrap();
    for (source, object) in [("main.c", "main.o"), ("dir4/file0.c", "f.o")] {
        run(Command::new("cc").current_dir(&second).args(["-c", "-O2", source, "-o", object]));
    }
    run(Command::new("cc").current_dir(&second).args(["-o", "program", "main.o", "f.o"]));
    run(&mut Command::new(second.join("program")));
    run(Command::new("tar").current_dir(&work).args(["-cf", "second.tar", "second"]));
    std::fs::create_dir(work.join("unpacked")).unwrap();
    run(Command::new("tar").current_dir(work.join("unpacked")).args(["-xpf", "../second.tar"]));
    tree::assert_equal(&second, &work.join("unpacked/second"), Compare { times: false, ..Compare::ALL });

    pair.assert_converged();
    run(Command::new("git")
        .args(["-c", "safe.directory=*", "-C"])
        .arg(pair.view("data").join("work/second"))
        .args(["fsck", "--full"]));
    pair.assert_plain_trees();
}
