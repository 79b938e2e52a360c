//! Starting and stopping: every clean end leaves complete plain trees and nothing mounted; what would hurt is refused, with
//! a reason.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::Signal;
use twinfs_tests::fixture::{self, Amounts};
use twinfs_tests::ops::{Actor, Generator, Mix};
use twinfs_tests::pair::{Pair, Setup, mounts_below};
use twinfs_tests::process::{Background, output, run, twinfs, wait_for};
use twinfs_tests::tree::{self, Compare};

fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&all).into_owned()
}

/// Asserts that a command is refused, and that it says why in few words.
fn assert_refused(command: &mut Command, why: &[&str]) -> String {
    let output = output(command);
    let said = text(&output);
    assert!(!output.status.success(), "{command:?} went well: {said}");
    assert_ne!(output.status.code(), Some(101), "it panicked: {said}");
    for word in why {
        let found = said.to_lowercase().contains(&word.to_lowercase());
        assert!(found, "{command:?} does not say {word:?}: {said}");
    }
    said
}

fn random_work(root: &Path, seed: u64) {
    let mut generator = Generator::new(seed, Mix::default());
    let mut actor = Actor::new(root);
    for _ in 0..400 {
        let operation = generator.next_operation(root);
        let _ = actor.apply(&operation);
    }
}

/// Ends both daemons in the middle of work, each in its way; the trees must be complete and equal.
fn ends_cleanly(over_source: bool, end: impl Fn(&mut Pair, &str)) {
    let mut pair = Pair::start(Setup { over_source, ..Setup::default() });
    random_work(&pair.mount("data"), 11);
    let expected = tree::listing(&pair.mount("data"), Compare::ALL);
    end(&mut pair, "nyc");
    assert_eq!(mounts_below(&pair.source("data")).len(), 0);
    assert_eq!(tree::differences(&expected, &tree::listing(&pair.source("data"), Compare::ALL)), None);
    // What was captured before the end, but not sent, is sent at the next start.
    pair.start_primary();
    pair.wait_duplex();
    pair.assert_converged();
    let expected = tree::listing(&pair.mount("data"), Compare::ALL);
    end(&mut pair, "chi");
    assert_eq!(tree::differences(&expected, &tree::listing(&pair.image("data"), Compare::ALL)), None);
    end(&mut pair, "nyc");
    assert_eq!(mounts_below(pair.root()).len(), 0);
    assert!(pair.try_status("nyc").is_none() && pair.try_status("chi").is_none());
}

fn daemon<'a>(pair: &'a mut Pair, site: &str) -> &'a mut twinfs_tests::process::Daemon {
    let daemon = if site == "nyc" { &mut pair.primary } else { &mut pair.replica };
    daemon.as_mut().unwrap()
}

#[test]
fn sigterm_ends_cleanly() {
    ends_cleanly(false, |pair, site| daemon(pair, site).stop());
}

#[test]
fn sigint_ends_cleanly() {
    ends_cleanly(true, |pair, site| {
        let daemon = daemon(pair, site);
        daemon.signal(Signal::INT);
        let status = daemon.wait();
        assert!(status.success(), "{status}\n{}", daemon.log_text());
    });
}

#[test]
fn umount_ends_cleanly() {
    ends_cleanly(false, |pair, site| {
        let point = if site == "nyc" { pair.mount("data") } else { pair.view_root() };
        run(Command::new("umount").arg(&point));
        let daemon = daemon(pair, site);
        let status = daemon.wait();
        assert!(status.success(), "{status}\n{}", daemon.log_text());
    });
}

/// A program that works below the mount does not keep the daemon from ending, nor loses what it wrote.
#[test]
fn a_busy_mount_ends_all_the_same() {
    let mut pair = Pair::start(Setup::default());
    let file = File::create(pair.mount("data").join("held")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"held open", 0).unwrap();
    let view = File::open(pair.view_root().join(".twinfs/group")).unwrap();
    pair.stop_primary();
    pair.stop_replica();
    assert_eq!(mounts_below(pair.root()).len(), 0);
    assert_eq!(std::fs::read(pair.source("data").join("held")).unwrap(), b"held open");
    drop((file, view));
}

/// Databases note a change in a journal, change a file that they have open, and remove the journal by its path. If the mount
/// were gone by then, but not the open file, they would take the journal for removed, and the next start would undo what
/// they said is done.
#[test]
fn a_stop_never_comes_between_a_journal_and_its_removal() {
    let mut pair = Pair::start(Setup::default());
    let path = |name: &str| pair.mount("data").join(name);
    let (file, journal) = (path("file"), path("journal"));
    let kept = pair.source("data").join("journal");
    for round in 0..5 {
        let done = AtomicU64::new(0);
        let transact = |open: &File, n: u64| {
            std::fs::write(&journal, n.to_string())?;
            (0..20).try_for_each(|at| std::os::unix::fs::FileExt::write_all_at(open, b"new", at))?;
            match std::fs::remove_file(&journal) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => {
                    done.store(n, Ordering::Release);
                    Ok(())
                }
            }
        };
        std::thread::scope(|scope| {
            let open = File::create(&file).unwrap();
            let writer = scope.spawn(move || (1..).find_map(|n| transact(&open, n).err()));
            wait_for("transactions", || (done.load(Ordering::Acquire) > 20).then_some(()));
            pair.primary.as_mut().unwrap().stop();
            assert!(writer.join().unwrap().is_some(), "the mount is gone");
        });
        let (left, done) = (std::fs::read_to_string(&kept), done.into_inner());
        if let Ok(n) = &left {
            assert!(
                n.is_empty() || n.parse::<u64>().is_ok_and(|n| n > done),
                "round {round}: journal {n} is there, {done} are done"
            );
        }
        for left in [&kept, &journal] {
            drop(std::fs::remove_file(left));
        }
        pair.start_primary();
    }
}

#[test]
fn daemons_in_the_background() {
    let pair = Pair::new(Setup::default());
    fixture::fill(&pair.source("data"), Amounts { files: 50, bytes: 1000 }, 1);
    run(pair.replica_command().arg("--daemon"));
    assert!(pair.view_root().join(".twinfs/group").exists(), "the mount is usable when the command returns");
    run(pair.mount_command().arg("--daemon"));
    std::fs::write(pair.mount("data").join("new"), b"at once").unwrap();
    assert!(pair.mount("data").join("kinds").exists());
    pair.wait_duplex();
    pair.assert_converged();
    assert_eq!(pair.processes("nyc").len(), 1, "one process a daemon");

    // A second one on the same site is refused, in the background too.
    assert_refused(pair.mount_command().arg("--daemon"), &["running"]);
    assert_refused(pair.replica_command().arg("--daemon"), &["running"]);
    run(Command::new("umount").arg(pair.mount("data")));
    run(Command::new("umount").arg(pair.view_root()));
    for site in ["nyc", "chi"] {
        wait_for("the daemon to end", || pair.processes(site).is_empty().then_some(()));
    }
    tree::assert_equal(&pair.source("data"), &pair.image("data"), Compare::ALL);

    // Started where it cannot work, the command says so and returns.
    let mut command = pair.command("replica", "chi");
    command.arg(pair.root().join("absent")).args(["--listen", "127.0.0.1:0", "--daemon"]);
    assert_refused(&mut command, &["absent"]);
    assert!(pair.processes("chi").is_empty());
}

#[test]
fn only_root_may_mount() {
    let pair = Pair::new(Setup::default());
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(pair.root(), open).unwrap();
    // The command itself must be within reach of everybody.
    let own = pair.root().join("twinfs");
    std::fs::copy(twinfs(), &own).unwrap();
    for verb in ["mount", "replica"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&own).arg(verb);
        command.arg("--site").arg(pair.root().join("other.site"));
        match verb {
            "mount" => command.arg(pair.source("data")).args(["--to", "chi@127.0.0.1:1"]),
            _ => command.arg(pair.view_root()).args(["--listen", "127.0.0.1:0"]),
        };
        let said = assert_refused(&mut command, &["root"]);
        assert_eq!(said.trim().lines().count(), 1, "one line: {said}");
    }
}

#[test]
fn site_and_source_never_contain_one_another() {
    let pair = Pair::new(Setup::default());
    let site = pair.site("nyc");
    let to = ["--to", "chi@127.0.0.1:1"];
    // SOURCE around the site, SOURCE inside it, SOURCE the site itself.
    std::fs::create_dir(site.join("inside")).unwrap();
    for source in [pair.root().to_owned(), site.join("inside"), site.clone()] {
        let mut command = pair.command("mount", "nyc");
        command.arg(&source).arg(pair.mount("data")).args(to).args(["--volume", "v"]);
        assert_refused(&mut command, &["site"]);
    }
    // Not by a detour through a symlink either.
    std::os::unix::fs::symlink(pair.root(), pair.root().join("detour")).unwrap();
    let mut command = pair.command("mount", "nyc");
    command.arg(pair.root().join("detour/nyc.site/inside")).arg(pair.mount("data")).args(to);
    assert_refused(&mut command, &["site"]);
    assert_eq!(mounts_below(pair.root()).len(), 0);
}

#[test]
fn nonsense_is_refused() {
    let mut pair = Pair::new(Setup { volumes: vec![("one", "src1"), ("two", "src2")], ..Setup::default() });
    let source = |volume: &str| pair.source(volume).display().to_string();
    let mount = |mirrors: &[String]| {
        let mut command = pair.command("mount", "nyc");
        command.args(["--to", "chi@127.0.0.1:1"]);
        for mirror in mirrors {
            command.arg("--mirror").arg(mirror);
        }
        command
    };
    // The same name twice, the same tree twice, one tree within another, a tree that is not there, a file.
    assert_refused(&mut mount(&[format!("v={}", source("one")), format!("v={}", source("two"))]), &["v"]);
    assert_refused(&mut mount(&[format!("v={}", source("one")), format!("w={}", source("one"))]), &[]);
    std::fs::create_dir(pair.source("one").join("sub")).unwrap();
    let nested = format!("w={}/sub", source("one"));
    assert_refused(&mut mount(&[format!("v={}", source("one")), nested]), &[]);
    assert_refused(&mut mount(&[format!("v={}/absent", source("one"))]), &["absent"]);
    std::fs::write(pair.root().join("file"), b"").unwrap();
    assert_refused(&mut mount(&[format!("v={}", pair.root().join("file").display())]), &["file"]);
    assert_refused(&mut mount(&[format!("../v={}", source("one"))]), &[]);
    // No site at all.
    let mut command = Command::new(twinfs());
    command.args(["mount", "--to", "chi@127.0.0.1:1", "--site"]).arg(pair.root().join("no.site"));
    assert_refused(command.arg(pair.source("one")), &["init"]);
    assert_eq!(mounts_below(pair.root()).len(), 0);
    // A replica's site is no primary's, and the other way round.
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    pair.assert_plain_trees();
    let mut command = pair.command("mount", "chi");
    command.arg(pair.source("one")).args(["--to", "nyc@127.0.0.1:1"]);
    assert_refused(&mut command, &["replica"]);
    let mut command = pair.command("replica", "nyc");
    command.arg(pair.view_root()).args(["--listen", "127.0.0.1:0"]);
    assert_refused(&mut command, &["primary"]);
}

#[test]
fn processes_that_hold_the_source_are_named() {
    let mut pair = Pair::new(Setup { over_source: true, ..Setup::default() });
    std::fs::write(pair.source("data").join("held"), b"x").unwrap();
    let held = File::options().append(true).open(pair.source("data").join("held")).unwrap();
    let holder = Background::start(Command::new("sleep").arg("600").stdin(held));
    assert_refused(&mut pair.mount_command(), &["sleep", &holder.0.id().to_string(), "--force"]);
    assert_eq!(mounts_below(pair.root()).len(), 0);
    run(pair.mount_command().args(["--force", "--daemon"]));
    assert_eq!(mounts_below(&pair.source("data")).len(), 1);
    drop(holder);
    run(Command::new("umount").arg(pair.mount("data")));
    wait_for("the daemon to end", || pair.processes("nyc").is_empty().then_some(()));
    // A working directory counts as well as an open file.
    let holder = Background::start(Command::new("sleep").arg("600").current_dir(pair.source("data")));
    assert_refused(&mut pair.mount_command(), &[&holder.0.id().to_string()]);
    drop(holder);
    pair.start_primary();
    pair.stop_primary();
}

#[test]
fn nested_mounts_are_listed_as_not_mirrored() {
    let mut pair = Pair::new(Setup::default());
    let nested = pair.source("data").join("nested");
    std::fs::create_dir(&nested).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "twinfs-test"]).arg(&nested));
    std::fs::write(nested.join("not mirrored"), b"x").unwrap();
    pair.start_replica();
    pair.start_primary();
    pair.wait_duplex();
    let log = pair.primary.as_ref().unwrap().log_text();
    assert!(log.contains(&nested.display().to_string()) && log.contains("not mirrored"), "{log}");
    assert!(pair.view("data").join("nested").is_dir());
    assert!(!pair.view("data").join("nested/not mirrored").exists());
    std::fs::write(pair.mount("data").join("beside"), b"x").unwrap();
    pair.wait_caught_up();
    pair.stop_primary();
    pair.stop_replica();
    run(Command::new("umount").arg(&nested));
}

/// A file system whose handles are not stable: an overlay, as every container has one, knows none by default.
#[test]
fn a_backing_file_system_without_handles_is_refused() {
    let pair = Pair::new(Setup::default());
    let at = |name: &str| pair.root().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let options = format!(
        "nfs_export=off,index=off,lowerdir={},upperdir={},workdir={}",
        at("lower").display(),
        at("upper").display(),
        at("work").display()
    );
    run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(at("merged")));
    let mut command = pair.command("mount", "nyc");
    command.arg(at("merged")).arg(pair.mount("data")).args(["--to", "chi@127.0.0.1:1"]);
    assert_refused(&mut command, &["handle"]);
    run(Command::new("umount").arg(at("merged")));
}

/// Identities made on two machines: the key of the authority and those of the sites never travel.
#[test]
fn identities_by_request_and_signature() {
    let dir = tempfile::tempdir().unwrap();
    let site = |name: &str| dir.path().join(name);
    let twinfs = |verb: &str, name: &str| {
        let mut command = Command::new(twinfs());
        command.arg(verb).arg("--site").arg(site(name));
        command
    };
    run(twinfs("init", "nyc").args(["--name", "nyc"]));
    let request = run(twinfs("request", "chi").args(["--name", "chi"]));
    assert!(request.contains("BEGIN CERTIFICATE REQUEST") && !request.contains("PRIVATE"), "{request}");
    std::fs::write(site("chi.csr"), &request).unwrap();
    let signed = run(twinfs("sign", "nyc").arg(site("chi.csr")));
    assert!(signed.contains("BEGIN CERTIFICATE") && !signed.contains("PRIVATE"), "{signed}");
    std::fs::write(site("chi.pem"), &signed).unwrap();
    run(twinfs("import", "chi").arg(site("chi.pem")));
    // What does not fit is refused: again, for another site, garbage.
    assert_refused(twinfs("init", "nyc").args(["--name", "other"]), &[]);
    run(twinfs("request", "sfo").args(["--name", "sfo"]));
    assert_refused(twinfs("import", "sfo").arg(site("chi.pem")), &[]);
    std::fs::write(site("garbage"), b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    assert_refused(twinfs("import", "sfo").arg(site("garbage")), &[]);
    assert_refused(twinfs("sign", "nyc").arg(site("garbage")), &[]);
    assert_refused(twinfs("init", "bad").args(["--name", "../bad"]), &[]);
    let mode = |path| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap()) & 0o777;
    assert_eq!(mode(site("nyc")), 0o700);
    assert_eq!(mode(site("chi")), 0o700);
}
