//! The loss report on disk: what a promote gave up, for people and programs to read later.
//!
//! ```text
//! SITE/loss/EPOCH/        0700, one for each promote, named by the number of the epoch that it began
//!   report.json           totals, for each volume too, gaps, and the record sets that are kept beside it
//!   updates.jsonl         a line of JSON for each lost update that is known, in the order of their stamps
//!   sets/VOLUME-NUMBER    record sets that came but could not be ordered, as they came: `twinfs inspect` prints one
//! ```
//!
//! It is made under another name, and stands in its place durably before the epoch does.

use std::fmt::{self, Write as _};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twinfs_core::id::{FileId, VolumeName};
use twinfs_core::limits;
use twinfs_core::loss::{Gap, Loss, LostUpdate, Paths, VolumeKnowledge};
use twinfs_core::stamp::Timestamp;
use twinfs_core::update::OpKind;

use crate::site::SiteDir;
use crate::status::Bytes;

/// The version of the report that this program writes and reads.
const REPORT_VERSION: u32 = 1;

/// Why a report cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LossError {
    /// The file system said no.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// It is not what this program writes.
    #[error("{path} is damaged or of another version: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// An instant on the session's clock, as text and as a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// UTC with microseconds.
    pub utc: String,
    /// Nanoseconds since the Unix epoch.
    pub ns: u64,
}

impl From<Timestamp> for Moment {
    fn from(time: Timestamp) -> Self {
        Self { utc: time.to_string(), ns: time.0 }
    }
}

/// What a promote gave up: the totals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    version: u32,
    /// The epoch that the promote began.
    pub epoch: u64,
    /// When that was, on this site's clock.
    pub promoted: Moment,
    /// Whether the primary was drained first: then nothing is lost.
    pub planned: bool,
    /// The consistency time: what the site shows and goes on from.
    pub consistency_time: Moment,
    /// The group that it is of.
    pub group: u64,
    /// Every update up to here is in the last group or listed; what the primary wrote later, nobody knows. `None` if it
    /// was drained.
    pub unknown_after: Option<Moment>,
    /// The latest instant of which anything was heard. Where it is later than `unknown_after`, something is missing in
    /// between.
    pub heard_until: Option<Moment>,
    /// Updates that are known and lost.
    pub updates_known: u64,
    /// Those of them of which the data is held.
    pub updates_held: u64,
    /// Bytes that the known ones wrote.
    pub bytes: u64,
    /// Updates that are only known to exist, because the numbers before and after them are known.
    pub updates_missing: u64,
    /// The member volumes.
    pub volumes: Vec<VolumeReport>,
    /// Volumes whose initial copy was not complete: nothing of them shows.
    pub unusable: Vec<VolumeName>,
    /// Where updates are missing; the first [`limits::LOSS_GAPS_LISTED_MAX`] of them.
    pub gaps: Vec<GapReport>,
    /// The record sets that are kept.
    pub sets: Vec<SetReport>,
    /// Why not all of them could be kept.
    pub sets_problem: Option<String>,
    /// The site's journal was damaged, and what that lost was not there again: what was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

/// The totals of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in the report")]
pub struct VolumeReport {
    pub name: VolumeName,
    pub updates_known: u64,
    pub updates_held: u64,
    pub bytes: u64,
    pub updates_missing: u64,
    pub tokens_not_held: u64,
    pub unknown_after: Moment,
}

/// A run of updates that are only known to exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct GapReport {
    pub volume: VolumeName,
    pub updates: u64,
    pub first_seq: u64,
    pub after: Moment,
    pub before: Moment,
}

/// A record set that is kept beside the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetReport {
    /// Its volume.
    pub volume: VolumeName,
    /// Its number in the chain.
    pub number: u64,
    /// Its file, below the report's directory.
    pub file: String,
    /// Its bytes, compressed.
    pub bytes: u64,
}

/// A lost update. Paths are below the volume's root. Where a path or a name is not UTF-8, the text shows what is and
/// the bytes stand beside it in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostLine {
    /// When it happened.
    pub time: Moment,
    /// Its number in the volume.
    pub seq: u64,
    /// Its volume.
    pub volume: VolumeName,
    /// What it did.
    pub operation: String,
    /// The file, or the name that it changed; `None` if only `file` is known.
    pub path: Option<String>,
    /// The bytes of the path, if they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_bytes: Option<String>,
    /// The file, or the directory of the name, as record sets name it.
    pub file: Option<FileId>,
    /// The name that was changed; or that of the extended attribute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The bytes of the name, if they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_bytes: Option<String>,
    /// What the name became, in a rename or an exchange.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The bytes of that, if they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_bytes: Option<String>,
    /// First byte, of an operation on content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Number of bytes, of an operation on content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// Whether its data is held.
    pub data_held: bool,
    /// The record set that it came in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<u64>,
}

/// What a report is made of, beside the loss itself.
#[derive(Debug)]
pub(super) struct Circumstances {
    pub(super) epoch: u64,
    pub(super) promoted: Timestamp,
    pub(super) planned: bool,
    pub(super) shown: Timestamp,
    pub(super) group: u64,
    pub(super) heard_until: Option<Timestamp>,
    pub(super) damage: Option<String>,
}

impl Report {
    pub(super) fn new(loss: &Loss<'_>, volumes: &[VolumeKnowledge<'_>], about: &Circumstances) -> Self {
        let name = |index: twinfs_core::id::VolumeIndex| volumes[index.as_usize()].name.clone();
        let gap = |gap: &Gap| GapReport {
            volume: name(gap.volume),
            updates: gap.updates(),
            first_seq: gap.first.0,
            after: gap.after.into(),
            before: gap.before.into(),
        };
        let sum = |of: fn(&twinfs_core::loss::VolumeLoss) -> u64| {
            loss.volumes.iter().fold(0, |sum: u64, volume| sum.saturating_add(of(volume)))
        };
        Self {
            version: REPORT_VERSION,
            epoch: about.epoch,
            promoted: about.promoted.into(),
            planned: about.planned,
            consistency_time: about.shown.into(),
            group: about.group,
            unknown_after: (!about.planned).then(|| loss.unknown_after.into()),
            heard_until: about.heard_until.map(Into::into),
            updates_known: sum(|volume| volume.updates),
            updates_held: sum(|volume| volume.held),
            bytes: sum(|volume| volume.bytes),
            updates_missing: sum(|volume| volume.missing),
            volumes: loss
                .volumes
                .iter()
                .map(|volume| VolumeReport {
                    name: name(volume.volume),
                    updates_known: volume.updates,
                    updates_held: volume.held,
                    bytes: volume.bytes,
                    updates_missing: volume.missing,
                    tokens_not_held: volumes[volume.volume.as_usize()].tokens_not_held,
                    unknown_after: volume.unknown_after.into(),
                })
                .collect(),
            unusable: volumes.iter().filter(|v| !v.member).map(|v| v.name.clone()).collect(),
            gaps: loss.gaps.iter().take(limits::LOSS_GAPS_LISTED_MAX).map(gap).collect(),
            sets: Vec::new(),
            sets_problem: None,
            damage: about.damage.clone(),
        }
    }

    /// The totals, for people: a line each, and one for each of the first `gaps_max` gaps.
    #[must_use]
    pub fn lines(&self, gaps_max: usize) -> Vec<String> {
        let shown = Timestamp(self.consistency_time.ns);
        let ago = Timestamp(self.promoted.ns).ns_since(shown) as f64 / 1e9;
        let mut lines = vec![
            format!("Consistency time {shown} ({ago:.2} s before the promote), group {}.", self.group),
            format!(
                "Known to be lost: {} updates ({}): {} that came but cannot be ordered, {} of which only the write \
                 tokens came.",
                self.updates_known,
                Bytes(self.bytes),
                self.updates_held,
                self.updates_known - self.updates_held
            ),
        ];
        if self.volumes.len() > 1 {
            lines.extend(self.volumes.iter().filter(|volume| volume.updates_known > 0).map(|volume| {
                format!(
                    "  volume {}: {} updates ({})",
                    volume.name,
                    volume.updates_known,
                    Bytes(volume.bytes)
                )
            }));
        }
        if self.updates_missing > 0 {
            lines.push(format!(
                "Between these, {} more updates happened of which neither data nor token came.",
                self.updates_missing
            ));
        }
        lines.extend(self.gaps.iter().take(gaps_max).map(|gap| {
            format!(
                "  volume {}: {} unknown updates after {} and before {}",
                gap.volume, gap.updates, gap.after.utc, gap.before.utc
            )
        }));
        match &self.unknown_after {
            None => lines.push("The primary was drained: 0 updates lost.".into()),
            Some(after) => lines.push(format!(
                "Nothing is known of what the primary wrote after {}; all up to then is shown or listed.",
                after.utc
            )),
        }
        if let Some(why) = &self.damage {
            lines.push(format!(
                "The journal here was damaged, so updates are lost that had come, and are not listed: {why}."
            ));
        }
        if let Some(why) = &self.sets_problem {
            lines.push(format!("Not all data that came but could not be ordered is kept: {why}."));
        }
        if !self.sets.is_empty() {
            lines.push(format!(
                "{} record sets that came but could not be ordered are kept; `twinfs inspect FILE` prints one.",
                self.sets.len()
            ));
        }
        lines
    }
}

impl LostLine {
    fn new(update: &LostUpdate<'_>, volume: &VolumeName, paths: &mut Paths<'_>) -> Self {
        let token = update.token();
        let (path, to) = paths.follow(&token);
        let is_range = matches!(
            token.op,
            OpKind::Write | OpKind::Truncate | OpKind::Zero | OpKind::Collapse | OpKind::Insert
        );
        // A path that is known has the name of what was changed in it.
        let is_xattr = matches!(token.op, OpKind::SetXattr | OpKind::RemoveXattr);
        let name = (!token.name.is_empty() && (is_xattr || path.is_none())).then(|| token.name.to_vec());
        let to = to.or_else(|| token.to.as_ref().map(|to| to.name.to_vec()));
        let ((path, path_bytes), (name, name_bytes), (to, to_bytes)) = (text(path), text(name), text(to));
        Self {
            time: token.stamp.time.into(),
            seq: token.stamp.seq.0,
            volume: volume.clone(),
            operation: token.op.to_string(),
            path,
            path_bytes,
            file: token.file,
            name,
            name_bytes,
            to,
            to_bytes,
            offset: is_range.then_some(token.range.0),
            length: (is_range && token.op != OpKind::Truncate).then_some(token.range.1),
            data_held: update.set().is_some(),
            set: update.set().map(|set| set.0),
        }
    }
}

impl fmt::Display for LostLine {
    /// One line for people; whatever a name holds, it stays one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {}  {}  ", self.time.utc, self.volume, self.operation)?;
        let shown = |text: &Option<String>, bytes: &Option<String>| {
            let raw = bytes.as_ref().and_then(|hex| from_hex(hex));
            raw.or_else(|| text.clone().map(String::into_bytes)).map(|raw| escaped(&raw))
        };
        match (shown(&self.path, &self.path_bytes), self.file) {
            (Some(path), _) if path.is_empty() => write!(f, ".")?,
            (Some(path), _) => write!(f, "{path}")?,
            (None, Some(file)) => write!(f, "FileId {file}")?,
            (None, None) => write!(f, "-")?,
        }
        if let Some(name) = shown(&self.name, &self.name_bytes) {
            write!(f, " name {name}")?;
        }
        if let Some(to) = shown(&self.to, &self.to_bytes) {
            write!(f, " -> {to}")?;
        }
        match (self.offset, self.length) {
            (Some(offset), Some(length)) => write!(f, "  {length} bytes at {offset}")?,
            (Some(size), None) => write!(f, "  to {size} bytes")?,
            _ => {}
        }
        match self.set {
            Some(set) => write!(f, "  (data held, in record set {set})"),
            None => write!(f, "  (only its token came)"),
        }
    }
}

/// Text for JSON, and the bytes in digits if the text does not say them.
fn text(raw: Option<Vec<u8>>) -> (Option<String>, Option<String>) {
    let Some(raw) = raw else { return (None, None) };
    match String::from_utf8(raw) {
        Ok(text) => (Some(text), None),
        Err(error) => {
            let hex = error.as_bytes().iter().fold(String::new(), |mut hex, byte| {
                // Writing to a string does not fail.
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            (Some(String::from_utf8_lossy(error.as_bytes()).into_owned()), Some(hex))
        }
    }
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
    digits.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect()
}

/// A name as a terminal may show it: control characters, backslashes and what is not UTF-8 are escaped.
fn escaped(raw: &[u8]) -> String {
    let mut shown = String::with_capacity(raw.len());
    for chunk in raw.utf8_chunks() {
        for char in chunk.valid().chars() {
            if char.is_control() || char == '\\' {
                shown.extend(char.escape_default());
            } else {
                shown.push(char);
            }
        }
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(shown, "\\x{byte:02x}");
        }
    }
    shown
}

/// Calls `each` with a line for each lost update, in their order.
///
/// # Errors
/// The first one of `each`; it is not called again then.
pub(super) fn each_line<'a>(
    loss: &Loss<'a>,
    volumes: &[VolumeKnowledge<'a>],
    mut paths: Paths<'a>,
    mut each: impl FnMut(&LostLine) -> io::Result<()>,
) -> io::Result<()> {
    for update in &loss.updates {
        let volume = &volumes[update.volume.as_usize()];
        each(&LostLine::new(update, volume.name, &mut paths))?;
    }
    Ok(())
}

/// A report that is being written, under a name that no reader looks for. Dropped unfinished, it goes.
#[derive(Debug)]
pub(super) struct Keeping {
    all: PathBuf,
    own: PathBuf,
    lines: BufWriter<File>,
    finished: bool,
}

impl Keeping {
    /// Below a site's directory.
    pub(super) fn begin(site: &Path) -> io::Result<Self> {
        let all = site.join("loss");
        let own = all.join("unfinished");
        match fs::remove_dir_all(&own) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let sets = own.join("sets");
        DirBuilder::new().recursive(true).mode(0o700).create(&sets)?;
        let lines = BufWriter::new(private(&own.join("updates.jsonl"))?);
        Ok(Self { all, own, lines, finished: false })
    }

    pub(super) fn line(&mut self, line: &LostLine) -> io::Result<()> {
        serde_json::to_writer(&mut self.lines, line)?;
        self.lines.write_all(b"\n")
    }

    /// Keeps a record set as it came.
    pub(super) fn set(&mut self, volume: &VolumeName, number: u64, bytes: &[u8]) -> io::Result<SetReport> {
        let file = format!("sets/{volume}-{number}");
        let mut out = private(&self.own.join(&file))?;
        out.write_all(bytes)?;
        out.sync_all()?;
        Ok(SetReport { volume: volume.clone(), number, file, bytes: bytes.len() as u64 })
    }

    /// Takes back the sets that were kept, to have room for the report itself.
    pub(super) fn without_sets(&mut self) -> io::Result<()> {
        let sets = self.own.join("sets");
        fs::remove_dir_all(&sets)?;
        DirBuilder::new().mode(0o700).create(sets)
    }

    /// Whether enough room is left for what a promote has to write after it.
    pub(super) fn has_room(&mut self) -> io::Result<bool> {
        self.lines.flush()?;
        let stat = rustix::fs::statvfs(&self.own)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize) >= limits::LOSS_FREE_BYTES_MIN)
    }

    /// Makes it durable and puts it into its place, where it is found; returns that place.
    pub(super) fn finish(mut self, report: &Report) -> io::Result<PathBuf> {
        self.lines.flush()?;
        self.lines.get_ref().sync_all()?;
        let mut text = serde_json::to_vec_pretty(report)?;
        text.push(b'\n');
        let mut file = private(&self.own.join("report.json"))?;
        file.write_all(&text)?;
        file.sync_all()?;
        for dir in [self.own.join("sets"), self.own.clone()] {
            File::open(dir)?.sync_all()?;
        }
        let place = self.all.join(report.epoch.to_string());
        // Of a promote that did not come to its epoch.
        match fs::remove_dir_all(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::rename(&self.own, &place)?;
        self.finished = true;
        File::open(&self.all)?.sync_all()?;
        File::open(self.all.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok(place)
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        if !self.finished {
            // What is left of it the next one takes away.
            let _ = fs::remove_dir_all(&self.own);
        }
    }
}

fn private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// A report that stands on disk.
#[derive(Debug)]
pub struct Kept {
    /// Its directory.
    pub dir: PathBuf,
    /// The totals.
    pub report: Report,
}

/// The report of the last promote of a site; `None` if it was never promoted.
///
/// # Errors
/// [`LossError`]
pub fn newest(site: &SiteDir) -> Result<Option<Kept>, LossError> {
    let all = site.path().join("loss");
    let known =
        site.state().map_err(|error| LossError::Damaged { path: all.clone(), why: error.to_string() })?;
    let epoch = known.map_or(0, |state| state.epoch.number);
    let fail = |path: &Path| {
        let path = path.to_owned();
        |source| LossError::Io { path, source }
    };
    let entries = match fs::read_dir(&all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(fail(&all))?,
    };
    let mut newest = None;
    for entry in entries {
        let name = entry.map_err(fail(&all))?.file_name();
        // One of a later epoch is of a promote that a crash cut short before it counted.
        let number =
            name.to_str().and_then(|name| name.parse::<u64>().ok()).filter(|number| *number <= epoch);
        newest = newest.max(number);
    }
    let Some(number) = newest else { return Ok(None) };
    let dir = all.join(number.to_string());
    let path = dir.join("report.json");
    let text = fs::read(&path).map_err(fail(&path))?;
    let damaged = |why| LossError::Damaged { path: path.clone(), why };
    let report: Report = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    if report.version != REPORT_VERSION {
        return Err(damaged(format!("version {} is not {REPORT_VERSION}", report.version)));
    }
    Ok(Some(Kept { dir, report }))
}

impl Kept {
    /// The lost updates that are known, in the order of their stamps.
    ///
    /// # Errors
    /// [`LossError`]; after one in the iterator nothing more comes.
    pub fn updates(&self) -> Result<impl Iterator<Item = Result<LostLine, LossError>>, LossError> {
        let path = self.dir.join("updates.jsonl");
        let file = File::open(&path).map_err(|source| LossError::Io { path: path.clone(), source })?;
        let mut reader = BufReader::new(file);
        let mut failed = false;
        Ok(std::iter::from_fn(move || {
            let mut line = Vec::new();
            let bounded = &mut (&mut reader).take(limits::LOSS_LINE_BYTES_MAX as u64);
            let read = bounded.read_until(b'\n', &mut line);
            if failed || matches!(read, Ok(0)) {
                return None;
            }
            let line = match read {
                Err(source) => Err(LossError::Io { path: path.clone(), source }),
                Ok(_) => serde_json::from_slice(&line)
                    .map_err(|error| LossError::Damaged { path: path.clone(), why: error.to_string() }),
            };
            failed = line.is_err();
            Some(line)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use twinfs_core::id::VolumeIndex;
    use twinfs_core::loss::Known;
    use twinfs_core::stamp::{Seq, Stamp};
    use twinfs_core::token::Token;
    use twinfs_core::update::{AttrList, Op, Update, sample_file};

    fn line(op: Op) -> LostLine {
        let stamp = Stamp { time: Timestamp(5), seq: Seq(7) };
        let token = Token::of(&Update { stamp, op, attrs: AttrList::new() });
        let shown = HashMap::from([(sample_file(1), Box::from(&b"d\xffr"[..]))]);
        let update = LostUpdate { volume: VolumeIndex(0), stamp, known: Known::Token(&token) };
        let volume = VolumeName::new("data").unwrap();
        LostLine::new(&update, &volume, &mut Paths::new(shown, &[]))
    }

    #[test]
    fn names_of_any_bytes_keep_a_line_a_line_and_lose_nothing() {
        let (dir, file) = (sample_file(1), sample_file(2));
        let name: Box<[u8]> = b"a\n\x1b[31m\\ \xc3\xa4".as_slice().into();
        let create = line(Op::Create { dir, name, file, target: Box::default() });
        let shown = create.to_string();
        assert!(shown.contains("create  d\\xffr/a\\n\\u{1b}[31m\\\\ \u{e4}  (only"), "{shown}");
        let text = serde_json::to_string(&create).unwrap();
        assert!(!text.contains('\n'));
        let back: LostLine = serde_json::from_str(&text).unwrap();
        let bytes = from_hex(back.path_bytes.as_ref().unwrap()).unwrap();
        assert_eq!(bytes, b"d\xffr/a\n\x1b[31m\\ \xc3\xa4");
        let write = line(Op::Write { file, offset: 4096, len: 10 });
        assert_eq!((write.path, write.offset, write.length), (None, Some(4096), Some(10)));
        let unknown = line(Op::Unlink { dir: file, name: b"x".as_slice().into(), file: dir });
        assert!(unknown.to_string().contains(&format!("FileId {file} name x")), "{unknown}");
    }
}
