//! The site directory: where everything of a site stands on disk, and its control file.
//!
//! ```text
//! SITE/                 0700; never inside a mirrored tree nor around it
//!   lock                held by the running daemon
//!   state.json          the control file: role, epoch, session, volumes (versioned, replaced atomically); JSON whose second
//!                       line is the BLAKE3 of all the other bytes
//!   stamp-mark          primary: no timestamp at or above this was given out; a number, and the first 16 digits of its BLAKE3
//!   sidefile-BOOTID     primary: captured updates that the replica lacks
//!   unacknowledged      primary: record sets that were made and not acknowledged when it stopped
//!   copy/VOLUME         primary: where a stopped initial copy goes on
//!   activity/           primary: files touched since the last point that both sites have for good
//!   journal/            replica: record sets as received
//!   journal.damaged-N/  replica: a journal that had rotted, for people to look at; twinfs does not need it any more
//!   image/              replica: the plain trees
//!   loss/EPOCH/         promoted site: what the promote gave up
//!   control.sock        0600; what `status`, `promote` and the others talk to
//!   identity/, authority/   see the crate `certs`
//! ```

mod repair;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use twinfs_core::id::{Epoch, FileId, SessionId, SetHash, SetNumber, SiteName, VolumeInstance, VolumeName};
use twinfs_core::limits;
use twinfs_core::session::{self, Role, SuspendReason};
use twinfs_core::stamp::{Seq, Stamp, Timestamp};

pub use self::repair::{Repair, RepairVolume};
use crate::storage::{self, RealStorage, StorageError};

/// The version of the control file that this program writes and reads.
const STATE_VERSION: u32 = 2;
/// What stands around the checksum of the control file.
const CHECKSUM: (&[u8], &[u8]) = (b"{\n  \"checksum\": \"", b"\",\n");
/// Digits of the checksum of the stamp mark.
const MARK_DIGITS: usize = 16;

/// Why the site directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// The file system said no.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// Another daemon runs on this site directory.
    #[error("another twinfs daemon is running on the site {path}; `twinfs status --site {path}` shows it")]
    Busy {
        /// The site directory.
        path: PathBuf,
    },
    /// The control file cannot be understood.
    #[error("the control file {path} is damaged or of another version: {why}; nothing was changed")]
    State {
        /// The control file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl SiteError {
    /// Whether the file system has no room.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

/// The control file: what a site must remember from run to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    /// What the site is.
    pub role: Role,
    /// The highest epoch that the site knows.
    pub epoch: Epoch,
    /// The session that it belongs to; `None` for a replica that no primary has met.
    pub session: Option<SessionId>,
    /// The peer that it is paired with, once known.
    pub peer: Option<SiteName>,
    /// The volumes, in the session's order.
    #[serde(default)]
    pub volumes: Vec<VolumeState>,
    /// The volumes that a replica has met, in the order in which it met them.
    #[serde(default)]
    pub received: Vec<ReceivedVolume>,
    /// The arguments of the command that started the daemon, so that it can be started again the same way.
    #[serde(default)]
    pub replica: Option<ReplicaArguments>,
    /// Why the session was suspended when it ended, if it was.
    #[serde(default)]
    pub suspended: Option<SuspendReason>,
    /// Whether the last run ended cleanly.
    pub clean: bool,
    /// When it did, by the system's clock: what changed since in a source, nobody captured. Zero if it never did.
    #[serde(default)]
    pub stopped_at: Timestamp,
    /// A replica's journal was damaged, and what that lost is not there again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<Repair>,
    /// How often a journal was put aside because it was damaged.
    #[serde(default)]
    pub journals_damaged: u64,
}

impl State {
    /// The state of a site that takes up a role.
    #[must_use]
    pub fn new(role: Role, epoch: Epoch) -> Self {
        Self {
            version: STATE_VERSION,
            role,
            epoch,
            session: None,
            peer: None,
            volumes: Vec::new(),
            received: Vec::new(),
            replica: None,
            suspended: None,
            clean: true,
            stopped_at: Timestamp::ZERO,
            repair: None,
            journals_damaged: 0,
        }
    }

    /// The control file's text.
    ///
    /// # Errors
    /// What cannot be written, such as a path that is not UTF-8.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| error.to_string())?;
        text.push(b'\n');
        let digits = blake3::hash(&text).to_hex();
        let rest = text.strip_prefix(b"{\n").expect("a map with entries, printed for people");
        Ok([CHECKSUM.0, digits.as_bytes(), CHECKSUM.1, rest].concat())
    }

    /// Reads the control file's text.
    ///
    /// # Errors
    /// What is wrong with it. One changed bit is enough: a flipped digit of an epoch would otherwise be believed.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let checked = || {
            let (digits, rest) = bytes.strip_prefix(CHECKSUM.0)?.split_at_checked(2 * blake3::OUT_LEN)?;
            let text = [b"{\n", rest.strip_prefix(CHECKSUM.1)?].concat();
            (blake3::hash(&text).to_hex().as_bytes() == digits).then_some(text)
        };
        let text = checked().ok_or("its checksum is wrong: it rotted, or was edited")?;
        let state: Self = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        if state.version != STATE_VERSION {
            return Err(format!("version {} is not {STATE_VERSION}", state.version));
        }
        Ok(state)
    }
}

/// The text of the stamp mark.
fn encode_mark(mark: Timestamp) -> String {
    let number = mark.0.to_string();
    format!("{number} {}\n", &blake3::hash(number.as_bytes()).to_hex()[..MARK_DIGITS])
}

/// Reads the text of the stamp mark; `None` if it is not as it was written.
fn decode_mark(text: &[u8]) -> Option<Timestamp> {
    let number = str::from_utf8(text).ok()?.split_once(' ')?.0;
    let mark = Timestamp(number.parse().ok()?);
    (encode_mark(mark).as_bytes() == text).then_some(mark)
}

/// What a primary remembers of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    /// Its name in the session.
    pub name: VolumeName,
    /// The directory that is mirrored.
    pub source: PathBuf,
    /// The life of the tree there.
    pub instance: VolumeInstance,
    /// Inode of the root of the tree when it was first mounted: another one is another tree.
    pub root_ino: u64,
    /// Generation of that inode.
    pub root_generation: u32,
    /// How far it is.
    pub state: session::VolumeState,
    /// Stamp of the mark that ended its copy, once that was issued.
    pub complete: Option<Stamp>,
    /// The last record set that the replica acknowledged without a gap.
    pub acked_set: SetNumber,
    /// The hash of that set, 64 hexadecimal digits.
    pub acked_hash: SetHash,
    /// The last update in it.
    pub acked_seq: Seq,
    /// Where its interval ended.
    pub acked_end: Timestamp,
    /// Where the last interval ended.
    pub end: Timestamp,
    /// The last update that was captured.
    pub last_seq: Seq,
}

/// What a replica remembers of a volume, beside what its journal and its image say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceivedVolume {
    /// Its name in the session.
    pub name: VolumeName,
    /// The life of its tree at the primary.
    pub instance: VolumeInstance,
    /// Its root directory there.
    pub root: FileId,
}

/// How a replica daemon was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaArguments {
    /// Where it shows its volumes.
    pub mountpoint: PathBuf,
    /// Where it listens.
    pub listen: String,
}

/// A site directory, not locked.
#[derive(Debug, Clone)]
pub struct SiteDir {
    path: PathBuf,
}

/// Held by the one daemon that runs on a site directory.
#[derive(Debug)]
pub struct SiteLock {
    _file: File,
}

impl SiteDir {
    /// Takes an existing site directory.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the journal stands.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    /// Where the activity log stands.
    #[must_use]
    pub fn activity(&self) -> PathBuf {
        self.path.join("activity")
    }

    /// Where the control socket stands.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Where the sidefile of this boot stands.
    ///
    /// # Errors
    /// [`SiteError::Io`] if the kernel does not tell the boot's identity.
    pub fn sidefile(&self) -> Result<PathBuf, SiteError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        // A test of power cuts cannot boot the machine: it names the boot.
        let boot = match std::env::var("TWINFS_TEST_BOOT_ID") {
            Ok(named) => named,
            Err(_) => fs::read_to_string(path).map_err(io_error("read", path))?,
        };
        Ok(self.path.join(format!("{SIDEFILE_PREFIX}{}", boot.trim())))
    }

    /// Every sidefile that stands here, of whatever boot.
    ///
    /// # Errors
    /// [`SiteError::Io`]
    pub fn sidefiles(&self) -> Result<Vec<PathBuf>, SiteError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("read", &self.path))? {
            let path = entry.map_err(io_error("read", &self.path))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            if name.is_some_and(|name| name.starts_with(SIDEFILE_PREFIX)) {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// Where the sets stand that were made and not acknowledged when the primary stopped.
    #[must_use]
    pub fn unacknowledged(&self) -> PathBuf {
        self.path.join("unacknowledged")
    }

    /// Where a stopped initial copy of a volume is remembered.
    #[must_use]
    pub fn copy_state(&self, volume: &VolumeName) -> PathBuf {
        self.path.join("copy").join(volume.as_str())
    }

    /// Takes the lock of the one daemon.
    ///
    /// # Errors
    /// [`SiteError::Busy`] if a daemon runs already, or [`SiteError::Io`].
    pub fn lock(&self) -> Result<SiteLock, SiteError> {
        let path = self.path.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(SiteLock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(SiteError::Busy { path: self.path.clone() }),
            Err(error) => Err(io_error("lock", &path)(error.into())),
        }
    }

    /// Reads the control file; `None` if the site has never run.
    ///
    /// # Errors
    /// [`SiteError`]
    pub fn state(&self) -> Result<Option<State>, SiteError> {
        let path = self.path.join("state.json");
        let Some(text) = read_small(&path)? else { return Ok(None) };
        // Whoever wrote it may have died before its name was durable; nothing may build on a name that a power cut takes.
        let settled = File::open(&self.path).and_then(|dir| dir.sync_all());
        settled.map_err(io_error("sync", &self.path))?;
        State::decode(&text).map(Some).map_err(|why| SiteError::State { path, why })
    }

    /// Replaces the control file, durably.
    ///
    /// # Errors
    /// [`SiteError::Io`]; the old one stands then.
    pub fn save_state(&self, state: &State) -> Result<(), SiteError> {
        let path = self.path.join("state.json");
        let text = state.encode().map_err(|why| SiteError::State { path: path.clone(), why })?;
        replace_durably(&path, &text)
    }

    /// Reads the mark below which timestamps were given out; zero if there is none.
    ///
    /// # Errors
    /// [`SiteError`]
    pub fn stamp_mark(&self) -> Result<Timestamp, SiteError> {
        let path = self.path.join("stamp-mark");
        let Some(text) = read_small(&path)? else { return Ok(Timestamp::ZERO) };
        let why = || "not a number of nanoseconds with its checksum".into();
        decode_mark(&text).ok_or_else(|| SiteError::State { path, why: why() })
    }

    /// Replaces that mark, durably.
    ///
    /// # Errors
    /// [`SiteError::Io`]
    pub fn save_stamp_mark(&self, mark: Timestamp) -> Result<(), SiteError> {
        replace_durably(&self.path.join("stamp-mark"), encode_mark(mark).as_bytes())
    }
}

const SIDEFILE_PREFIX: &str = "sidefile-";

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SiteError + use<> {
    let path = path.to_owned();
    move |source| SiteError::Io { action, path, source }
}

/// Reads a file that is small if it is what it should be; `None` if there is none.
fn read_small(path: &Path) -> Result<Option<Vec<u8>>, SiteError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limits::CONTROL_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() as u64 > limits::CONTROL_FILE_BYTES_MAX {
        let why = format!("it is longer than {} bytes", limits::CONTROL_FILE_BYTES_MAX);
        return Err(SiteError::State { path: path.to_owned(), why });
    }
    Ok(Some(bytes))
}

/// Writes a private file (0600) so that at every instant, also after a power cut, either the old or the new contents
/// stand there. Missing parent directories are made, 0700.
///
/// # Errors
/// [`SiteError::Io`]
pub fn replace_durably(path: &Path, contents: &[u8]) -> Result<(), SiteError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(io_error("make", parent))?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let write = || -> io::Result<()> {
        // The directory may be reached through a symlink; the storage does not follow one.
        let storage = RealStorage::open(&fs::canonicalize(parent)?).map_err(StorageError::into_io)?;
        storage::replace_durably(&storage, name, contents).map_err(StorageError::into_io)
    };
    write().map_err(io_error("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinfs_core::id::SiteId;

    #[test]
    fn the_control_file_comes_back_and_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteDir::new(dir.path());
        assert_eq!(site.state().unwrap(), None);
        let mut state = State::new(Role::Primary, Epoch { number: 1, site: SiteId::from_bytes([1; 16]) });
        state.session = Some(SessionId::from_bytes([2; 16]));
        site.save_state(&state).unwrap();
        assert_eq!(site.state().unwrap(), Some(state.clone()));
        state.version = 99;
        site.save_state(&state).unwrap();
        let refused = site.state().unwrap_err().to_string();
        assert!(refused.contains("version 99 is not 2"), "{refused}");
    }

    /// A state with something in every field.
    fn full() -> State {
        let instance = VolumeInstance::new(9).unwrap();
        let name = VolumeName::new("data").unwrap();
        let mut state = State::new(Role::Primary, Epoch { number: 3, site: SiteId::from_bytes([1; 16]) });
        state.session = Some(SessionId::from_bytes([2; 16]));
        state.peer = Some(SiteName::new("chi").unwrap());
        state.volumes.push(VolumeState {
            name: name.clone(),
            source: "/srv/data".into(),
            instance,
            root_ino: 2,
            root_generation: 7,
            state: session::VolumeState::Duplex,
            complete: Some(Stamp { time: Timestamp(5), seq: Seq(6) }),
            acked_set: SetNumber(12),
            acked_hash: SetHash([3; 32]),
            acked_seq: Seq(400),
            acked_end: Timestamp(9),
            end: Timestamp(1_767_225_600_000_000_000),
            last_seq: Seq(401),
        });
        let root = FileId { instance, ino: 2, generation: 7 };
        state.received.push(ReceivedVolume { name, instance, root });
        state.replica = Some(ReplicaArguments { mountpoint: "/mnt".into(), listen: "[::]:7".into() });
        state.suspended = Some(SuspendReason::Lag);
        state
    }

    #[test]
    fn a_flipped_bit_or_a_cut_in_the_control_file_is_noticed_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteDir::new(dir.path());
        site.save_state(&full()).unwrap();
        assert_eq!(site.state().unwrap(), Some(full()));
        let bytes = full().encode().unwrap();
        serde_json::from_slice::<serde_json::Value>(&bytes).expect("people's tools can read it");
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(State::decode(&damaged).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(State::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
        fs::write(dir.path().join("state.json"), vec![b' '; 10 << 20]).unwrap();
        assert!(matches!(site.state(), Err(SiteError::State { .. })));
    }

    #[test]
    fn a_flipped_bit_or_a_cut_in_the_stamp_mark_is_noticed_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteDir::new(dir.path());
        let mark = Timestamp(1_767_225_600_000_000_000);
        assert_eq!(site.stamp_mark().unwrap(), Timestamp::ZERO);
        site.save_stamp_mark(mark).unwrap();
        assert_eq!(site.stamp_mark().unwrap(), mark);
        let bytes = encode_mark(mark).into_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_mark(&damaged), None, "bit {bit}");
        }
        for len in 0..bytes.len() {
            fs::write(dir.path().join("stamp-mark"), &bytes[..len]).unwrap();
            assert!(matches!(site.stamp_mark(), Err(SiteError::State { .. })), "cut at {len}");
        }
    }

    #[test]
    fn one_daemon_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteDir::new(dir.path());
        let held = site.lock().unwrap();
        assert!(matches!(site.lock(), Err(SiteError::Busy { .. })));
        drop(held);
        site.lock().unwrap();
    }
}
