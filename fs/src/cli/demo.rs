//! `twinfs demo`: two sites on this machine, through the public command line only.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::need_root;

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Keep the demo's directory afterwards
    #[arg(long)]
    keep: bool,
}

impl Demo {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        need_root("demo")?;
        let stage = Stage::build()?;
        let done = stage.play();
        let root = stage.root.clone();
        stage.strike();
        if self.keep || done.is_err() {
            println!("\nThe demo's directory stays: {}", root.display());
        } else {
            std::fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
        }
        done?;
        println!("\nDone: nothing is left behind.");
        Ok(ExitCode::SUCCESS)
    }
}

/// Directories and daemons of the demo.
struct Stage {
    root: PathBuf,
    program: PathBuf,
    port: u16,
    daemons: std::cell::RefCell<BTreeMap<&'static str, Child>>,
}

fn say(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

impl Stage {
    fn build() -> anyhow::Result<Self> {
        let root = std::env::temp_dir().join(format!("twinfs-demo-{}", std::process::id()));
        for name in ["data", "dr"] {
            std::fs::create_dir_all(root.join(name)).context("cannot make the demo's directory")?;
        }
        let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
        let program = std::env::current_exe().context("cannot find this program")?;
        Ok(Self { root, program, port, daemons: std::cell::RefCell::default() })
    }

    fn play(&self) -> anyhow::Result<()> {
        let (data, view) = (self.root.join("data"), self.root.join("dr/data"));
        say("1. Two sites: nyc makes the authority, chi is signed by it.");
        self.run("nyc", "init", &["--name", "nyc"])?;
        let authority = self.site("nyc").display().to_string();
        self.run("chi", "init", &["--name", "chi", "--authority", &authority])?;

        say("2. A directory with files in it, from before the mirror.");
        std::fs::create_dir(data.join("docs"))?;
        for number in 0..200 {
            std::fs::write(
                data.join(format!("docs/{number}.txt")),
                format!("document {number}\n").repeat(50),
            )?;
        }
        println!("   200 files in {}", data.display());

        say("3. The replica listens, the primary mounts the directory over itself.");
        let listen = format!("127.0.0.1:{}", self.port);
        self.start("chi", "replica", &[&self.root.join("dr").display().to_string(), "--listen", &listen])?;
        let source = data.display().to_string();
        self.start("nyc", "mount", &[&source, "--to", &format!("chi@{listen}")])?;
        let start = Instant::now();
        wait_for("the replica to show the directory", || view.join("docs/199.txt").exists())?;
        println!("   The initial copy was visible at chi, whole, {:.0} ms later.", ms(start));

        say("4. Programs write on nyc; chi follows.");
        let mut delays: Vec<f64> =
            (0..20).map(|number| one_write(&data, &view, number)).collect::<Result<_, _>>()?;
        delays.sort_by(f64::total_cmp);
        println!("   A write was visible at chi after {:.1} ms (median of 20).", delays[delays.len() / 2]);
        std::fs::rename(data.join("docs"), data.join("papers"))?;
        std::fs::hard_link(data.join("papers/1.txt"), data.join("one"))?;
        std::os::unix::fs::symlink("papers/2.txt", data.join("two"))?;
        self.run("nyc", "status", &[])?;

        say("5. The replica is read-only.");
        match std::fs::write(view.join("no"), "no") {
            Err(error) => println!("   Writing at chi: {error}"),
            Ok(()) => bail!("a write at the replica went through"),
        }

        say("6. Disaster: the primary is killed (SIGKILL).");
        wait_for("the replica to be equal", || listing(&data).ok() == listing(&view).ok())?;
        let before = listing(&data)?;
        self.kill("nyc")?;
        println!("   nyc is gone; {} objects were in its directory.", before.len());

        say("7. One command makes chi the primary.");
        let start = Instant::now();
        self.run("chi", "promote", &["--force"])?;
        std::fs::write(view.join("written-at-chi"), "after the disaster\n")?;
        println!("   From the command to the first write: {:.0} ms.", ms(start));
        self.run("chi", "status", &[])?;

        say("8. Was anything lost?");
        std::fs::remove_file(view.join("written-at-chi"))?;
        let after = listing(&view)?;
        for path in before.keys().chain(after.keys()) {
            ensure!(before.get(path) == after.get(path), "{} differs", path.display());
        }
        println!(
            "   {} objects compared (names, modes, owners, times, links, contents): all equal.",
            after.len()
        );
        Ok(())
    }

    fn site(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.site"))
    }

    fn command(&self, site: &str, verb: &str, arguments: &[&str]) -> Command {
        let shown: Vec<&str> = arguments.iter().filter(|argument| !argument.is_empty()).copied().collect();
        println!("   {site}# twinfs {verb} --site {} {}", self.site(site).display(), shown.join(" "));
        let mut command = Command::new(&self.program);
        command.arg(verb).arg("--site").arg(self.site(site)).args(shown);
        command
    }

    fn run(&self, site: &str, verb: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let output = self.command(site, verb, arguments).output()?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            println!("     {line}");
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`twinfs {verb}` failed: {errors}");
        Ok(())
    }

    /// Starts a daemon in the foreground, its log in the demo's directory, and waits until it answers.
    fn start(&self, site: &'static str, verb: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let log = std::fs::File::create(self.root.join(format!("{site}.log")))?;
        let child = self.command(site, verb, arguments).stdin(Stdio::null()).stderr(log).spawn()?;
        self.daemons.borrow_mut().insert(site, child);
        let answers = || {
            let mut status = Command::new(&self.program);
            status.args(["status", "--json", "--site"]).arg(self.site(site));
            status.output().is_ok_and(|output| output.status.success())
        };
        wait_for(&format!("the daemon of {site} (see {site}.log)"), answers)
    }

    fn kill(&self, site: &str) -> anyhow::Result<()> {
        if let Some(mut child) = self.daemons.borrow_mut().remove(site) {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Stops what runs and takes away what a killed daemon left mounted.
    fn strike(self) {
        for child in self.daemons.into_inner().values_mut() {
            if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
                // It may have ended by itself.
                let _ = kill_process(pid, Signal::TERM);
            }
            drop(child.wait());
        }
        for name in ["data", "dr"] {
            // Fails where nothing is mounted any more, which is what is wanted.
            let _ = unmount(self.root.join(name), UnmountFlags::DETACH);
        }
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn one_write(data: &Path, view: &Path, number: u32) -> anyhow::Result<f64> {
    let (name, text) = (format!("note-{number}"), format!("note {number}"));
    let start = Instant::now();
    std::fs::write(data.join(&name), &text)?;
    let seen = || std::fs::read_to_string(view.join(&name)).is_ok_and(|seen| seen == text);
    while !seen() {
        ensure!(start.elapsed() < PATIENCE, "waited in vain for {name} at the replica");
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(ms(start))
}

fn wait_for(what: &str, ready: impl Fn() -> bool) -> anyhow::Result<()> {
    let start = Instant::now();
    while !ready() {
        ensure!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Every object below a directory, with all that the mirror keeps of it.
fn listing(root: &Path) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            let contents = if meta.is_dir() {
                waiting.push(path.clone());
                String::new()
            } else if meta.is_symlink() {
                path.read_link()?.display().to_string()
            } else {
                std::fs::read_to_string(&path)?
            };
            let (mode, uid, gid, links) = (meta.mode(), meta.uid(), meta.gid(), meta.nlink());
            let (seconds, nanoseconds) = (meta.mtime(), meta.mtime_nsec());
            let text = format!("{mode:o} {uid}:{gid} {links} {seconds}.{nanoseconds:09} {contents}");
            found.insert(path.strip_prefix(root)?.to_owned(), text);
        }
    }
    Ok(found)
}
