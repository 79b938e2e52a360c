//! Who could write past the mirror: programs that hold the source directory open from before, and what is mounted below
//! it and so is not mirrored.
//!
//! A program is found by what it holds, wherever its own mounts show it: the path of each object is translated to the
//! path within the file system, by the mount through which the program reached it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxFlags, openat, statx};
use twinfs_core::limits;
use twinfs_replicator::sys::handle;

/// How a program holds a file or directory of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// As its current directory.
    CurrentDir,
    /// As its root directory.
    Root,
    /// A directory is open.
    OpenDir,
    /// A file is open for writing.
    OpenFile,
    /// A file is mapped, shared and writable.
    Mapped,
}

/// A program that holds a part of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// How it holds it.
    pub hold: Hold,
    /// What it holds, as the system shows it.
    pub path: PathBuf,
}

/// A line of `/proc/PID/mountinfo`.
struct Mount {
    id: u64,
    /// Directory of the file system that is shown.
    root: PathBuf,
    /// Where it is shown.
    point: PathBuf,
}

/// Lists the programs that hold `source`, or anything below it, in a way that lets them write. Not this one. At most
/// [`limits::HOLDERS_MAX`].
///
/// # Errors
/// The system's, for the source itself. What cannot be read of other programs (they come and go) is passed over.
pub fn holders(source: &Path) -> io::Result<Vec<Holder>> {
    let source = source.canonicalize()?;
    let stat = identify(&source)?;
    let place = within(&mounts(Path::new("/proc/self/mountinfo"))?, &stat, &source).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "the mount of the directory is not to be found")
    })?;
    let opened = openat(CWD, &source, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let tree = Tree { dev: (stat.stx_dev_major, stat.stx_dev_minor), place, source, opened };
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid != std::process::id() {
            tree.find_in(pid, &process.path(), &mut found);
        }
        if found.len() >= limits::HOLDERS_MAX {
            found.truncate(limits::HOLDERS_MAX);
            break;
        }
    }
    Ok(found)
}

/// Lists what is mounted below `source`. At most [`limits::HOLDERS_MAX`].
///
/// # Errors
/// The system's.
pub fn nested_mounts(source: &Path) -> io::Result<Vec<PathBuf>> {
    let source = source.canonicalize()?;
    let mut nested: Vec<PathBuf> = mounts(Path::new("/proc/self/mountinfo"))?
        .into_iter()
        .map(|mount| mount.point)
        .filter(|point| *point != source && point.starts_with(&source))
        .collect();
    nested.sort();
    nested.dedup();
    nested.truncate(limits::HOLDERS_MAX);
    Ok(nested)
}

/// The directory tree that is asked for: its file system, and its path within that.
struct Tree {
    dev: (u32, u32),
    place: PathBuf,
    /// The directory as this process sees it, and open for reading.
    source: PathBuf,
    opened: OwnedFd,
}

impl Tree {
    /// Looks at everything that a process holds.
    fn find_in(&self, pid: u32, process: &Path, found: &mut Vec<Holder>) {
        let mounts = mounts(&process.join("mountinfo")).unwrap_or_default();
        let mut note = |hold, link: &Path| {
            if let Some(path) = self.holds(&mounts, link) {
                let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
                found.push(Holder { pid, name: name.trim_end().to_owned(), hold, path });
            }
        };
        note(Hold::CurrentDir, &process.join("cwd"));
        note(Hold::Root, &process.join("root"));
        for fd in std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
            let link = fd.path();
            let Ok(stat) = identify(&link) else { continue };
            if u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR {
                note(Hold::OpenDir, &link);
            } else if is_writable(&process.join("fdinfo").join(fd.file_name())) {
                note(Hold::OpenFile, &link);
            }
        }
        for map in std::fs::read_to_string(process.join("maps")).unwrap_or_default().lines() {
            let mut fields = map.split_ascii_whitespace();
            let (Some(range), Some(access)) = (fields.next(), fields.next()) else { continue };
            if access.contains('w') && access.ends_with('s') {
                note(Hold::Mapped, &process.join("map_files").join(range));
            }
        }
    }

    /// The path of what a link of `/proc` leads to, if that is in the tree (and was not removed from it).
    fn holds(&self, mounts: &[Mount], link: &Path) -> Option<PathBuf> {
        let stat = identify(link).ok()?;
        if (stat.stx_dev_major, stat.stx_dev_minor) != self.dev || stat.stx_nlink == 0 {
            return None;
        }
        let path = std::fs::read_link(link).ok()?;
        let inside = match within(mounts, &stat, &path) {
            Some(place) => place.starts_with(&self.place),
            // It was reached through a mount that the program's own list does not show: a root directory or namespace
            // of its own, or a detached mount. What cannot be translated had better be reported once too often.
            None => self.seen_from_here(link).is_none_or(|seen| seen.starts_with(&self.source)),
        };
        inside.then_some(path)
    }

    /// The path of an object as it is reached through the source's own mount, by its file handle.
    fn seen_from_here(&self, link: &Path) -> Option<PathBuf> {
        let object = openat(CWD, link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let handle = handle::of_fd(&object).ok()?;
        let here = handle::open(&self.opened, &handle, OFlags::PATH.bits().cast_signed()).ok()?;
        std::fs::read_link(format!("/proc/self/fd/{}", here.as_raw_fd())).ok()
    }
}

fn identify(path: &Path) -> io::Result<Statx> {
    let mask = StatxFlags::TYPE | StatxFlags::NLINK | StatxFlags::MNT_ID;
    // Without asking servers: one of them may be dead.
    Ok(statx(CWD, path, AtFlags::STATX_DONT_SYNC, mask)?)
}

/// The path of an object within its file system.
fn within(mounts: &[Mount], stat: &Statx, path: &Path) -> Option<PathBuf> {
    let mount = mounts.iter().find(|mount| mount.id == stat.stx_mnt_id)?;
    Some(mount.root.join(path.strip_prefix(&mount.point).ok()?))
}

fn is_writable(fdinfo: &Path) -> bool {
    let info = std::fs::read_to_string(fdinfo).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or_default();
    flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY
}

fn mounts(file: &Path) -> io::Result<Vec<Mount>> {
    let lines = std::fs::read(file)?;
    Ok(lines.split(|byte| *byte == b'\n').filter_map(parse_mount).collect())
}

/// `36 35 98:0 /root /point options…`
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let (root, point) = (fields.nth(2)?, fields.next()?);
    Some(Mount { id, root: unescape(root), point: unescape(point) })
}

/// Blank, tab, newline and backslash stand as `\` and three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if *byte == b'\\' => {
                plain.push(escaped);
                rest = &after[3..];
            }
            _ => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = match self.hold {
            Hold::CurrentDir => "has as its current directory",
            Hold::Root => "has as its root directory",
            Hold::OpenDir => "has open the directory",
            Hold::OpenFile => "has open for writing",
            Hold::Mapped => "has mapped for writing",
        };
        let path: &OsStr = self.path.as_os_str();
        write!(f, "{} (process {}) {how} {}", self.name, self.pid, path.as_bytes().escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// Runs a shell command that says when it is ready, and ends with its input.
    fn run(command: &str) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", &format!("{command}; echo ready; read end")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.as_mut().unwrap()), &mut ready).unwrap();
        assert_eq!(ready, "ready\n");
        child
    }

    #[test]
    fn those_who_could_write_are_found_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (source, beside) = (dir.path().join("a b"), dir.path().join("a"));
        for each in [&source, &beside] {
            std::fs::create_dir(each).unwrap();
            std::fs::write(each.join("file"), "x").unwrap();
        }
        let at = |dir: &Path, command: &str| run(&command.replace('@', dir.to_str().unwrap()));
        let mut children = [
            (at(&source, "cd '@'"), Some(Hold::CurrentDir)),
            (at(&source, "exec 5<'@'"), Some(Hold::OpenDir)),
            (at(&source, "exec 5>>'@/file'"), Some(Hold::OpenFile)),
            (at(&source, "exec 5<'@/file'"), None),
            (at(&source, "exec 5>'@/gone'; rm '@/gone'"), None),
            (at(&beside, "cd '@'; exec 5>>file"), None),
        ];
        let found = holders(&source).unwrap();
        for (child, expected) in &mut children {
            let holds: Vec<Hold> =
                found.iter().filter(|holder| holder.pid == child.id()).map(|holder| holder.hold).collect();
            assert_eq!(holds, Vec::from_iter(*expected), "{found:?}");
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        assert!(found.iter().any(|holder| holder.to_string().contains("sh (process")));
        assert!(nested_mounts(&source).unwrap().is_empty());
    }

    #[test]
    fn mount_points_with_blanks_are_read() {
        let mount =
            parse_mount(br"36 35 98:0 / /srv/a\040b\134c rw,noatime master:1 - ext3 /dev/root rw").unwrap();
        assert_eq!((mount.id, mount.point.to_str()), (36, Some(r"/srv/a b\c")));
        assert!(parse_mount(b"36 35 98:0").is_none());
        assert!(!nested_mounts(Path::new("/")).unwrap().is_empty(), "/proc is mounted below the root");
    }
}
