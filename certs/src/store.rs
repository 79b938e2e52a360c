//! Files of a site directory: made private, atomic and durable; read within bounds.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::geteuid;
use twinfs_core::limits::IDENTITY_FILE_BYTES_MAX;

use crate::error::CertError;

pub(crate) const IDENTITY_DIR: &str = "identity";
pub(crate) const AUTHORITY_DIR: &str = "authority";
pub(crate) const KEY_FILE: &str = "key.pem";
pub(crate) const CERT_FILE: &str = "cert.pem";
pub(crate) const SITE_FILE: &str = "site.json";

const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// A file to be written. Only keys are secret; the directory around all of them is private in any case.
pub(crate) struct NewFile<'a> {
    pub(crate) name: &'static str,
    pub(crate) text: &'a str,
}

impl NewFile<'_> {
    fn mode(&self) -> u32 {
        if self.name == KEY_FILE { SECRET } else { PUBLIC }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CertError {
    let path = path.to_path_buf();
    move |source| CertError::Io { action, path, source }
}

/// Makes the site directory, or checks that the existing one is private and ours. An empty one is made private: it
/// was surely made for this; anything else is refused, because tightening it could shut others out of their files.
pub(crate) fn make_site_dir(site: &Path) -> Result<(), CertError> {
    if !site.exists() {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(site).map_err(io_error("create", site))?;
        if let Some(parent) = site.parent() {
            sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
        }
    } else if fs::read_dir(site).map_err(io_error("list", site))?.next().is_none() {
        fs::set_permissions(site, fs::Permissions::from_mode(0o700))
            .map_err(io_error("make private", site))?;
    }
    check_site_dir(site)
}

/// Checks that the site directory is private and ours.
pub(crate) fn check_site_dir(site: &Path) -> Result<(), CertError> {
    let meta = match fs::metadata(site) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Err(CertError::NoIdentity { site: site.into() }),
        other => other.map_err(io_error("look at", site))?,
    };
    if meta.uid() != geteuid().as_raw() {
        return Err(CertError::NotOwner { path: site.into(), owner: meta.uid() });
    }
    if meta.mode() & 0o077 != 0 {
        return Err(CertError::SiteDirOpen { path: site.into(), mode: meta.mode() & 0o7777 });
    }
    Ok(())
}

/// Puts a directory with `files` into the site directory, in one step. Never replaces one that is there.
pub(crate) fn install_dir(site: &Path, name: &str, files: &[NewFile<'_>]) -> Result<(), CertError> {
    let prefix = format!(".{name}.new-");
    remove_leftovers(site, &prefix)?;
    let staging = site.join(format!("{prefix}{}", std::process::id()));
    let result = fill_and_move(&staging, &site.join(name), files);
    if result.is_err() {
        // Best effort: the error that led here is the one to report, and the next install clears leftovers.
        let _ = fs::remove_dir_all(&staging);
    }
    result?;
    sync_dir(site)
}

fn fill_and_move(staging: &Path, target: &Path, files: &[NewFile<'_>]) -> Result<(), CertError> {
    DirBuilder::new().mode(0o700).create(staging).map_err(io_error("create", staging))?;
    for file in files {
        write_new(&staging.join(file.name), file)?;
    }
    sync_dir(staging)?;
    renameat_with(CWD, staging, CWD, target, RenameFlags::NOREPLACE).map_err(|errno| match errno {
        rustix::io::Errno::EXIST => CertError::Raced { path: target.into() },
        errno => io_error("create", target)(errno.into()),
    })
}

/// What an install that crashed left behind. One that is still running then fails to move its directory, and says so.
fn remove_leftovers(site: &Path, prefix: &str) -> Result<(), CertError> {
    for entry in fs::read_dir(site).map_err(io_error("list", site))? {
        let entry = entry.map_err(io_error("list", site))?;
        if starts_with(&entry.file_name(), prefix) {
            fs::remove_dir_all(entry.path()).map_err(io_error("remove", &entry.path()))?;
        }
    }
    Ok(())
}

fn starts_with(name: &OsStr, prefix: &str) -> bool {
    name.as_encoded_bytes().starts_with(prefix.as_bytes())
}

/// Puts a file into a directory in one step, over one that is there.
pub(crate) fn replace_file(dir: &Path, file: &NewFile<'_>) -> Result<(), CertError> {
    let staging = dir.join(format!(".{}.new", file.name));
    match fs::remove_file(&staging) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(io_error("remove", &staging)(e)),
        _ => {}
    }
    write_new(&staging, file)?;
    let target = dir.join(file.name);
    fs::rename(&staging, &target).map_err(io_error("replace", &target))?;
    sync_dir(dir)
}

fn write_new(path: &Path, file: &NewFile<'_>) -> Result<(), CertError> {
    let write = || {
        let mut out = OpenOptions::new().write(true).create_new(true).mode(file.mode()).open(path)?;
        out.write_all(file.text.as_bytes())?;
        out.sync_all()
    };
    write().map_err(io_error("write", path))
}

fn sync_dir(dir: &Path) -> Result<(), CertError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("make durable", dir))
}

/// Reads a file that should be small text; `None` if it does not exist.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, CertError> {
    let file = match File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(io_error("open", path))?,
    };
    let mut text = Vec::new();
    file.take(IDENTITY_FILE_BYTES_MAX as u64 + 1).read_to_end(&mut text).map_err(io_error("read", path))?;
    parse_text(&path.display().to_string(), &text).map(|text| Some(text.to_owned()))
}

/// Takes bytes that should be small text.
pub(crate) fn parse_text<'a>(what: &str, bytes: &'a [u8]) -> Result<&'a str, CertError> {
    if bytes.len() > IDENTITY_FILE_BYTES_MAX {
        return Err(CertError::malformed(what, format!("it is longer than {IDENTITY_FILE_BYTES_MAX} bytes")));
    }
    str::from_utf8(bytes).map_err(|_| CertError::malformed(what, "it is not text"))
}

/// Reads a key, and refuses one that others can read; `None` if it does not exist.
pub(crate) fn read_key(dir: &Path) -> Result<Option<(PathBuf, String)>, CertError> {
    let path = dir.join(KEY_FILE);
    let Some(text) = read_text(&path)? else { return Ok(None) };
    let mode = fs::metadata(&path).map_err(io_error("look at", &path))?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CertError::KeyOpen { path, mode });
    }
    Ok(Some((path, text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_site_dir_is_made_private_only_if_it_is_new_or_empty() {
        let scratch = tempfile::tempdir().unwrap();
        let new = scratch.path().join("a/b");
        make_site_dir(&new).unwrap();
        assert_eq!(mode(&new), 0o700);

        let empty = scratch.path().join("empty");
        DirBuilder::new().mode(0o755).create(&empty).unwrap();
        make_site_dir(&empty).unwrap();
        assert_eq!(mode(&empty), 0o700);

        let used = scratch.path().join("used");
        DirBuilder::new().mode(0o755).create(&used).unwrap();
        fs::write(used.join("x"), "x").unwrap();
        let refused = make_site_dir(&used);
        assert!(matches!(refused, Err(CertError::SiteDirOpen { mode: 0o755, .. })), "{refused:?}");
        assert_eq!(mode(&used), 0o755);
    }

    #[test]
    fn an_installed_dir_is_never_replaced_and_leftovers_go() {
        let scratch = tempfile::tempdir().unwrap();
        let site = scratch.path();
        fs::create_dir(site.join(".identity.new-1")).unwrap();
        let files = |text| [NewFile { name: KEY_FILE, text }, NewFile { name: CERT_FILE, text }];
        install_dir(site, IDENTITY_DIR, &files("one")).unwrap();
        assert!(matches!(install_dir(site, IDENTITY_DIR, &files("two")), Err(CertError::Raced { .. })));
        let names: Vec<_> = fs::read_dir(site).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [IDENTITY_DIR]);
        let key = site.join(IDENTITY_DIR).join(KEY_FILE);
        assert_eq!(fs::read_to_string(&key).unwrap(), "one");
        assert_eq!(mode(&key), 0o600);
    }

    #[test]
    fn long_files_are_not_read() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("big");
        fs::write(&path, vec![b'x'; IDENTITY_FILE_BYTES_MAX + 1]).unwrap();
        assert!(matches!(read_text(&path), Err(CertError::Malformed { .. })));
        assert!(read_text(&scratch.path().join("none")).unwrap().is_none());
    }
}
