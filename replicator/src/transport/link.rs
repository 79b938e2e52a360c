//! A connection between two sites that know each other, and what goes over it.
//!
//! ```text
//! stream                              opened by     begins with    then
//! one bidirectional, control          the primary   1 (answered)   messages: length (4, little-endian), bytes
//! one unidirectional, tokens          each side     2              messages likewise
//! one unidirectional per record set   each side     3              length (4), bytes, end of stream
//! ```
//!
//! **Nothing waits behind record sets.** Control has the highest priority, then tokens, then record sets, the older
//! before the newer. Priorities only rule what QUIC has already taken, and all streams share the windows of the
//! connection; so record sets on their way are bounded ([`limits::SETS_SENT_BYTES_MAX`]) well below the windows, and the
//! rest stays with the caller, where [`Link::send_set`] waits.
//!
//! **Nothing grows.** A receiver that does not keep up has at most [`limits::SETS_RECEIVED_BYTES_MAX`] of record sets
//! and [`limits::MESSAGES_QUEUED_MAX`] messages of each kind set aside. Then its streams are not read on, the windows
//! of QUIC close, and the sender waits.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, ReadExactError, RecvStream, SendStream, VarInt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use twinfs_certs::Site;
use twinfs_core::limits;

use super::error::{CloseCode, LinkError};

pub(super) const CONTROL: u8 = 1;
pub(super) const TOKENS: u8 = 2;
pub(super) const SET: u8 = 3;

const PRIORITY_CONTROL: i32 = i32::MAX;
const PRIORITY_TOKENS: i32 = i32::MAX - 1;

/// What arrived over a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A control message. They arrive in the order in which they were sent.
    Control(Bytes),
    /// A batch of tokens. They arrive in the order in which they were sent.
    Tokens(Bytes),
    /// A record set. They arrive in any order.
    Set(Bytes),
}

/// The sending end of a connection to another site, cheap to clone. When its last clone is dropped, or the
/// [`LinkEvents`] that came with it, the connection is closed.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    peer: Site,
    control: mpsc::Sender<Bytes>,
    tokens: mpsc::Sender<Bytes>,
    /// Permits are bytes of record sets that QUIC may still take.
    room: Arc<Semaphore>,
    sets_sent: AtomicU32,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.close(CloseCode::DONE, "done");
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("peer", &self.inner.peer).finish_non_exhaustive()
    }
}

/// The receiving end of a connection to another site.
pub struct LinkEvents {
    shared: Arc<Shared>,
    control: mpsc::Receiver<Bytes>,
    tokens: mpsc::Receiver<Bytes>,
    sets: mpsc::Receiver<ReceivedSet>,
}

impl Drop for LinkEvents {
    fn drop(&mut self) {
        self.shared.close(CloseCode::DONE, "done");
    }
}

impl fmt::Debug for LinkEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkEvents").finish_non_exhaustive()
    }
}

/// A record set that nobody has taken yet, with its share of the bounds.
struct ReceivedSet {
    bytes: Bytes,
    _budget: OwnedSemaphorePermit,
    _place: OwnedSemaphorePermit,
}

/// What sender, receiver and the tasks of a link share. It never holds the channels, so that these end when one of
/// their ends goes.
struct Shared {
    connection: Connection,
    /// Set before the connection is closed here for a fault of the peer.
    fault: OnceLock<LinkError>,
}

impl Shared {
    fn close(&self, code: CloseCode, reason: &str) {
        let reason = &reason.as_bytes()[..reason.len().min(limits::CLOSE_REASON_BYTES_MAX)];
        self.connection.close(VarInt::from_u32(code.0), reason);
    }

    fn malformed(&self, what: String) {
        self.fault.get_or_init(|| LinkError::Malformed(what.clone()));
        self.close(CloseCode::MALFORMED, &what);
    }

    async fn ended(&self) -> LinkError {
        let error = self.connection.closed().await;
        self.fault.get().cloned().unwrap_or_else(|| error.into())
    }
}

impl Link {
    /// Sends a control message, after all earlier ones and before everything else. Returns when it was queued; if the
    /// connection ends, it may not have arrived. May be cancelled: the message is then sent in full or not at all.
    ///
    /// # Errors
    /// [`LinkError::Unsendable`] beyond [`limits::MESSAGE_BYTES_MAX`]; otherwise the reason why the link ended.
    pub async fn send_control(&self, message: &[u8]) -> Result<(), LinkError> {
        self.send_message(&self.inner.control, "a control message", message).await
    }

    /// Sends a batch of tokens, after all earlier ones and before all record sets. Otherwise as
    /// [`send_control`](Self::send_control).
    ///
    /// # Errors
    /// As [`send_control`](Self::send_control).
    pub async fn send_tokens(&self, batch: &[u8]) -> Result<(), LinkError> {
        self.send_message(&self.inner.tokens, "a batch of tokens", batch).await
    }

    async fn send_message(
        &self,
        queue: &mpsc::Sender<Bytes>,
        what: &'static str,
        message: &[u8],
    ) -> Result<(), LinkError> {
        sendable(what, message.len(), limits::MESSAGE_BYTES_MAX)?;
        match queue.send(Bytes::copy_from_slice(message)).await {
            Ok(()) => Ok(()),
            // The writer only ends with the connection.
            Err(_) => Err(self.closed().await),
        }
    }

    /// Sends a record set on a stream of its own. Several may be under way; each goes out before those that were given
    /// later, but they arrive as they come. Waits for room among the record sets that have not reached the peer's
    /// machine; returns when QUIC has taken all bytes. May be cancelled: the set is then sent in full or not at all.
    ///
    /// # Errors
    /// [`LinkError::Unsendable`] beyond [`limits::SET_BYTES_MAX`]; otherwise the reason why the link ended.
    pub async fn send_set(&self, set: Bytes) -> Result<(), LinkError> {
        sendable("a record set", set.len(), limits::SET_BYTES_MAX)?;
        let bytes = u32::try_from(set.len()).expect("the bound is below 4 GiB");
        let room = self.inner.room.clone().acquire_many_owned(bytes).await;
        let room = room.expect("the semaphore is never closed");
        let Ok(stream) = self.inner.shared.connection.open_uni().await else {
            return Err(self.closed().await);
        };
        let number = self.inner.sets_sent.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_priority(set_priority(number));
        // A task of its own, because a stream that is dropped half-way looks finished to the peer, and because the
        // room is only free again when the peer's machine has all of it.
        let writing = tokio::spawn(async move {
            let sent = write_set(stream, set).await;
            sent.map(|stream| {
                tokio::spawn(async move {
                    let _ = stream.stopped().await;
                    drop(room);
                });
            })
        });
        match writing.await {
            Ok(Ok(())) => Ok(()),
            _ => Err(self.closed().await),
        }
    }

    /// The current estimate of the round trip time.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.inner.shared.connection.rtt()
    }

    /// Where the peer is now.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.shared.connection.remote_address()
    }

    /// The site at the other end, as its certificate proved it.
    #[must_use]
    pub fn peer(&self) -> &Site {
        &self.inner.peer
    }

    /// Bytes sent so far, as UDP payload: with all headers of QUIC, and with what was sent again.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.inner.shared.connection.stats().udp_tx.bytes
    }

    /// Bytes received so far, as UDP payload.
    #[must_use]
    pub fn bytes_received(&self) -> u64 {
        self.inner.shared.connection.stats().udp_rx.bytes
    }

    /// Closes the connection at once; what has not arrived is discarded. The peer is told code and reason (which is
    /// cut to [`limits::CLOSE_REASON_BYTES_MAX`]). Only the first close counts.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.inner.shared.close(code, reason);
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> LinkError {
        self.inner.shared.ended().await
    }
}

fn sendable(what: &'static str, bytes: usize, bytes_max: usize) -> Result<(), LinkError> {
    if (1..=bytes_max).contains(&bytes) {
        Ok(())
    } else {
        Err(LinkError::Unsendable { what, bytes, bytes_max })
    }
}

/// Older sets come first. After 2³⁰ sets the count begins again, which for a moment puts new sets before old ones.
fn set_priority(number: u32) -> i32 {
    -(i32::try_from(number & 0x3fff_ffff).expect("30 bits are left"))
}

impl LinkEvents {
    /// The next thing that arrived: control messages first, then tokens, then record sets. Once the connection has
    /// ended, what had arrived in full is given out before the error. May be cancelled without loss.
    ///
    /// # Errors
    /// The reason why the link ended; from then on always.
    pub async fn next(&mut self) -> Result<Event, LinkError> {
        tokio::select! {
            biased;
            Some(message) = self.control.recv() => Ok(Event::Control(message)),
            Some(batch) = self.tokens.recv() => Ok(Event::Tokens(batch)),
            Some(set) = self.sets.recv() => Ok(Event::Set(set.bytes)),
            else => Err(self.shared.ended().await),
        }
    }
}

#[cfg(test)]
impl LinkEvents {
    /// Control messages, batches of tokens and record sets that wait to be taken.
    pub(super) fn waiting(&self) -> (usize, usize, usize) {
        (self.control.len(), self.tokens.len(), self.sets.len())
    }
}

/// The streams that both sides set up before a connection becomes a link. Each had its first byte exchanged.
pub(super) struct Streams {
    pub(super) control_out: SendStream,
    pub(super) control_in: RecvStream,
    pub(super) tokens_out: SendStream,
}

/// Turns a connection into a link: starts the tasks that write and read its streams. They end with the connection.
pub(super) fn start(connection: Connection, peer: Site, streams: Streams) -> (Link, LinkEvents) {
    let Streams { control_out, control_in, tokens_out } = streams;
    let _ = control_out.set_priority(PRIORITY_CONTROL);
    let _ = tokens_out.set_priority(PRIORITY_TOKENS);
    let (control, control_queue) = mpsc::channel(limits::MESSAGES_QUEUED_MAX);
    let (tokens, tokens_queue) = mpsc::channel(limits::MESSAGES_QUEUED_MAX);
    tokio::spawn(write_messages(control_out, control_queue));
    tokio::spawn(write_messages(tokens_out, tokens_queue));

    let shared = Arc::new(Shared { connection, fault: OnceLock::new() });
    let (control_arrived, control_events) = mpsc::channel(limits::MESSAGES_QUEUED_MAX);
    let (tokens_arrived, tokens_events) = mpsc::channel(limits::MESSAGES_QUEUED_MAX);
    let (sets_arrived, sets_events) = mpsc::channel(limits::SETS_RECEIVED_MAX);
    let reader = Reader {
        shared: shared.clone(),
        tokens: Mutex::new(Some(tokens_arrived)),
        sets: sets_arrived,
        budget: Arc::new(Semaphore::new(limits::SETS_RECEIVED_BYTES_MAX)),
        places: Arc::new(Semaphore::new(limits::SETS_RECEIVED_MAX)),
    };
    tokio::spawn(read_control(shared.clone(), control_in, control_arrived));
    tokio::spawn(accept_streams(Arc::new(reader)));

    let inner = Inner {
        shared: shared.clone(),
        peer,
        control,
        tokens,
        room: Arc::new(Semaphore::new(limits::SETS_SENT_BYTES_MAX)),
        sets_sent: AtomicU32::new(0),
    };
    let events = LinkEvents { shared, control: control_events, tokens: tokens_events, sets: sets_events };
    (Link { inner: Arc::new(inner) }, events)
}

fn length_prefix(bytes: &Bytes) -> [u8; 4] {
    u32::try_from(bytes.len()).expect("every bound is below 4 GiB").to_le_bytes()
}

async fn write_messages(mut stream: SendStream, mut queue: mpsc::Receiver<Bytes>) {
    while let Some(message) = queue.recv().await {
        let prefix = Bytes::copy_from_slice(&length_prefix(&message));
        if stream.write_all_chunks(&mut [prefix, message]).await.is_err() {
            // Only the end of the connection stops the stream; whoever waits there reports it.
            return;
        }
    }
}

async fn write_set(mut stream: SendStream, set: Bytes) -> Result<SendStream, quinn::WriteError> {
    let mut head = BytesMut::with_capacity(5);
    head.extend_from_slice(&[SET]);
    head.extend_from_slice(&length_prefix(&set));
    stream.write_all_chunks(&mut [head.freeze(), set]).await?;
    // Fails only if the stream was stopped, which the caller sees as the end of the connection or not at all.
    let _ = stream.finish();
    Ok(stream)
}

/// Why a stream of the peer was not read to its end.
enum Fault {
    /// The connection ended, or nobody wants its events any more.
    Over,
    /// The peer broke the format.
    Malformed(String),
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(_) => Self::Over,
            other => Self::Malformed(other.to_string()),
        }
    }
}

impl From<ReadExactError> for Fault {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::Malformed("a stream ended early".into()),
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

struct Reader {
    shared: Arc<Shared>,
    /// Taken by the one stream of tokens.
    tokens: Mutex<Option<mpsc::Sender<Bytes>>>,
    sets: mpsc::Sender<ReceivedSet>,
    /// Permits are bytes of record sets that may still be set aside.
    budget: Arc<Semaphore>,
    /// Permits are record sets that may still be set aside.
    places: Arc<Semaphore>,
}

async fn accept_streams(reader: Arc<Reader>) {
    // The peer opens its stream of tokens first, so it gets its place before any record set.
    while let Ok(stream) = reader.shared.connection.accept_uni().await {
        let place = reader.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let reader = reader.clone();
        tokio::spawn(async move {
            if let Err(Fault::Malformed(what)) = reader.read_stream(stream, place).await {
                reader.shared.malformed(what);
            }
        });
    }
}

impl Reader {
    async fn read_stream(&self, mut stream: RecvStream, place: OwnedSemaphorePermit) -> Result<(), Fault> {
        let mut kind = [0];
        stream.read_exact(&mut kind).await?;
        match kind[0] {
            TOKENS => {
                let queue = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).take();
                let queue = queue.ok_or_else(|| Fault::Malformed("a second stream of tokens".into()))?;
                drop(place);
                read_messages(stream, queue).await
            }
            SET => self.read_set(stream, place).await,
            other => Err(Fault::Malformed(format!("a stream of unknown kind {other}"))),
        }
    }

    async fn read_set(&self, mut stream: RecvStream, place: OwnedSemaphorePermit) -> Result<(), Fault> {
        let length = read_length(&mut stream, limits::SET_BYTES_MAX).await?;
        let share = u32::try_from(length).expect("the bound is below 4 GiB");
        let budget = self.budget.clone().acquire_many_owned(share).await;
        let budget = budget.expect("the semaphore is never closed");
        let mut bytes = BytesMut::with_capacity(length);
        while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
            if chunk.bytes.len() > length - bytes.len() {
                return Err(Fault::Malformed("a record set is longer than announced".into()));
            }
            bytes.extend_from_slice(&chunk.bytes);
        }
        if bytes.len() != length {
            return Err(Fault::Malformed("a record set is shorter than announced".into()));
        }
        let set = ReceivedSet { bytes: bytes.freeze(), _budget: budget, _place: place };
        self.sets.send(set).await.map_err(|_| Fault::Over)
    }
}

async fn read_control(shared: Arc<Shared>, stream: RecvStream, queue: mpsc::Sender<Bytes>) {
    if let Err(Fault::Malformed(what)) = read_messages(stream, queue).await {
        shared.malformed(what);
    }
}

async fn read_messages(mut stream: RecvStream, queue: mpsc::Sender<Bytes>) -> Result<(), Fault> {
    loop {
        let length = read_length(&mut stream, limits::MESSAGE_BYTES_MAX).await?;
        let mut message = BytesMut::zeroed(length);
        stream.read_exact(&mut message).await?;
        queue.send(message.freeze()).await.map_err(|_| Fault::Over)?;
    }
}

async fn read_length(stream: &mut RecvStream, bytes_max: usize) -> Result<usize, Fault> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let length = u32::from_le_bytes(length) as usize;
    if (1..=bytes_max).contains(&length) {
        Ok(length)
    } else {
        Err(Fault::Malformed(format!("a length of {length} bytes, where 1 to {bytes_max} are allowed")))
    }
}
