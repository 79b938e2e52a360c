//! Ends a test that makes no step any more, and says where everybody stood.
//!
//! Everything that waits in this harness has a bound, but a call into a mount whose daemon does not answer has none: it
//! waits in the kernel, and whoever wants to join its thread waits with it. So each step of the harness is a sign of
//! life. When there has been none for [`SILENCE`], the state of all threads is written to standard error, and the
//! daemons are killed: then the calls fail, and so do the tests that made them.

use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Once};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long nothing may happen. Longer than any single command of a test takes.
pub const SILENCE: Duration = Duration::from_secs(300);
/// How long the tests then have to fail by themselves.
const LAST_WORDS: Duration = Duration::from_secs(120);

static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
/// When there was a sign of life last, in milliseconds since the beginning.
static SEEN: AtomicU64 = AtomicU64::new(0);

/// Says that something happened. The first call starts the watch.
pub fn alive() {
    static START: Once = Once::new();
    SEEN.store(BEGINNING.elapsed().as_millis() as u64, Ordering::Relaxed);
    START.call_once(|| drop(std::thread::Builder::new().name("watchdog".into()).spawn(watch)));
}

fn silence() -> Duration {
    BEGINNING.elapsed().saturating_sub(Duration::from_millis(SEEN.load(Ordering::Relaxed)))
}

fn watch() {
    while silence() < SILENCE {
        std::thread::sleep(Duration::from_secs(1));
    }
    let mut children = descendants();
    let mut text = format!("\nno test has made a step for {} s; everybody stands here:\n", SILENCE.as_secs());
    for pid in std::iter::once(std::process::id()).chain(children.iter().copied()) {
        describe(pid, &mut text);
    }
    // Past the capture of a test's output: this belongs to all of them.
    drop(std::io::stderr().write_all(text.as_bytes()));
    // Programs before the daemons that they wait for would be of no use: they cannot die.
    children.reverse();
    for pid in children.into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
        let _ = kill_process(pid, Signal::KILL);
    }
    std::thread::sleep(LAST_WORDS);
    drop(std::io::stderr().write_all(b"the tests do not end even so\n"));
    std::process::abort();
}

/// All processes that this one started, and those that they started, the oldest first.
fn descendants() -> Vec<u32> {
    let mut found = Vec::new();
    let mut left = vec![std::process::id()];
    while let Some(pid) = left.pop() {
        for task in tasks(pid) {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{task}/children"));
            let children: Vec<u32> = children
                .unwrap_or_default()
                .split_ascii_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect();
            found.extend(&children);
            left.extend(children);
        }
    }
    found
}

fn tasks(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What a process is, and for each of its threads where it stands in the kernel.
fn describe(pid: u32, text: &mut String) {
    // Not the command line: to read it could mean to wait for the very mount that does not answer.
    let dir = format!("/proc/{pid}");
    let program = std::fs::read_link(Path::new(&dir).join("exe")).unwrap_or_default();
    text.push_str(&format!("process {pid}, {}\n", program.display()));
    for task in tasks(pid) {
        let read =
            |name: &str| std::fs::read_to_string(format!("{dir}/task/{task}/{name}")).unwrap_or_default();
        let stat = read("stat");
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
        let frames = read("stack");
        let frames = frames.lines().map(|line| line.split("] ").last().unwrap_or(line));
        let frames: Vec<&str> =
            frames.map(|frame| frame.split('+').next().unwrap_or(frame)).take(8).collect();
        let (name, wait, call) = (read("comm"), read("wchan"), read("syscall"));
        let call = call.split(' ').next().unwrap_or_default().trim();
        text.push_str(&format!(
            "    {task} {} {state}, system call {call}, {wait}: {}\n",
            name.trim(),
            frames.join(" < ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn it_finds_and_describes_what_was_started() {
        let command = ["-c", "sleep 600; true"];
        let mut child = Command::new("sh").args(command).stdin(Stdio::null()).spawn().expect("a shell");
        let found = crate::process::wait_for("a grandchild", || {
            let found = descendants();
            (found.contains(&child.id()) && found.len() > 1).then_some(found)
        });
        let mut text = String::new();
        found.iter().for_each(|pid| describe(*pid, &mut text));
        for pid in found.iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::KILL);
        }
        drop(child.wait());
        assert!(text.contains("sleep S"), "{text}");
    }
}
