//! The control socket: how `twinfs status`, `promote` and the others talk to the running daemon.
//!
//! One request and its answers a connection, each a line of JSON. Only root can open the socket (0600, in a directory of
//! 0700), so requests are trusted in meaning, but lines are bounded all the same.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use twinfs_core::limits;

use crate::status::Status;

/// What a command asks of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The session's state.
    Status,
    /// Make this replica the primary.
    Promote {
        /// Hold and drain the primary first, so that nothing is lost.
        planned: bool,
        /// Promote although the primary is connected.
        force: bool,
    },
}

/// A line from the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Something for the user to read while the work goes on.
    Progress(String),
    /// The state that was asked for; the last line.
    Status(Box<Status>),
    /// The work is done; the last line.
    Done(String),
    /// It was refused or failed, and why; the last line.
    Failed(String),
}

/// Why a command could not talk to the daemon.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No daemon runs on this site.
    #[error("no twinfs daemon is running on this site ({path} does not answer)")]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The conversation broke off.
    #[error("lost the daemon at {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The daemon speaks another language: most likely another version of twinfs.
    #[error("the daemon at {path} answered what this version does not understand: {why}")]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Who answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. Calls `progress` with lines for the user meanwhile; returns the last line.
    fn handle(&self, request: Request, progress: &mut dyn FnMut(String)) -> Answer;
}

/// The socket of a running daemon; dropped, it stops and removes the socket.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at `path`, mode 0600. A socket that a dead daemon left is replaced: the caller holds the site's lock.
    ///
    /// # Errors
    /// Those of binding a Unix socket.
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let active = Arc::new(());
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopping.load(Ordering::Acquire) {
                    break;
                }
                if Arc::strong_count(&active) > limits::CONTROL_CONNECTIONS_MAX {
                    continue;
                }
                let (handler, active) = (Arc::clone(&handler), Arc::clone(&active));
                let spawned = std::thread::Builder::new().name("control-answer".into()).spawn(move || {
                    if let Err(error) = answer(&stream, &*handler) {
                        tracing::debug!(%error, "a control connection broke off");
                    }
                    drop(active);
                });
                if let Err(error) = spawned {
                    tracing::warn!(%error, "cannot answer on the control socket");
                }
            }
        })?;
        Ok(Self { path: path.to_owned(), stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The accept loop looks at the flag when somebody connects.
        if UnixStream::connect(&self.path).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the control socket's thread panicked");
        }
        drop(std::fs::remove_file(&self.path));
    }
}

fn answer(stream: &UnixStream, handler: &dyn Handler) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(stream.take(limits::CONTROL_LINE_BYTES_MAX)).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(());
    }
    let last = match serde_json::from_str(&line) {
        Ok(request) => handler.handle(request, &mut |text| {
            // Whoever asked may have gone; the work goes on.
            drop(send(stream, &Answer::Progress(text)));
        }),
        Err(error) => Answer::Failed(format!("not a request that this version understands: {error}")),
    };
    send(stream, &last)
}

fn send(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Sends a request to the daemon behind the socket at `path`, hands its progress lines to `progress`, and returns its
/// last answer. Waits as long as the daemon works.
///
/// # Errors
/// [`ControlError`]
pub fn ask(path: &Path, request: &Request, progress: &mut dyn FnMut(&str)) -> Result<Answer, ControlError> {
    let lost = |source| ControlError::Io { path: path.to_owned(), source };
    let garbled = |why| ControlError::Garbled { path: path.to_owned(), why };
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ControlError::NotRunning { path: path.to_owned() }
        }
        _ => lost(error),
    })?;
    let mut line = serde_json::to_vec(request).map_err(|error| garbled(error.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(lost)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        reader.by_ref().take(limits::CONTROL_LINE_BYTES_MAX).read_line(&mut line).map_err(lost)?;
        if line.is_empty() {
            return Err(lost(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&line).map_err(|error| garbled(error.to_string()))? {
            Answer::Progress(text) => progress(&text),
            last => return Ok(last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request, progress: &mut dyn FnMut(String)) -> Answer {
            progress("working".into());
            Answer::Done(format!("{request:?}"))
        }
    }

    #[test]
    fn a_request_gets_its_progress_and_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        assert!(matches!(ask(&path, &Request::Status, &mut |_| {}), Err(ControlError::NotRunning { .. })));
        let server = Server::start(&path, Arc::new(Echo)).unwrap();
        let mut seen = Vec::new();
        let answer = ask(&path, &Request::Status, &mut |text| seen.push(text.to_owned())).unwrap();
        assert_eq!((answer, seen), (Answer::Done("Status".into()), vec!["working".to_owned()]));
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"nonsense\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("failed"), "{text}");
        drop(server);
        assert!(!path.exists());
    }
}
