//! Keeps a connection to the replica, and carries bytes between it and the mover.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use twinfs_certs::Identity;
use twinfs_core::id::SiteName;
use twinfs_core::limits;

use super::sidefile::Capture;
use crate::transport::{Event, Link, LinkEvents, quic};

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What the link tells the mover.
#[derive(Debug)]
pub(super) enum Input {
    /// A connection stands; nothing was said over it yet.
    Linked(Link, Outbox),
    /// The replica said something.
    Message(Bytes),
    /// No connection stands, or the one that stood is gone, and why.
    Unlinked(String),
}

/// What goes to the replica over one connection, in this order of priority; bounded.
#[derive(Debug)]
pub(super) struct Outbox {
    messages: mpsc::Sender<Outgoing>,
    sets: mpsc::UnboundedSender<Bytes>,
}

#[derive(Debug)]
enum Outgoing {
    Control(Bytes),
    Tokens(Bytes),
}

impl Outbox {
    /// Queues a control message. Returns whether there was room.
    pub(super) fn control(&self, message: impl Into<Bytes>) -> bool {
        self.messages.try_send(Outgoing::Control(message.into())).is_ok()
    }

    /// Whether there is room for tokens beside control messages.
    pub(super) fn takes_tokens(&self) -> bool {
        self.messages.capacity() > limits::OUTBOX_MESSAGES_MAX / 2
    }

    /// Queues a batch of tokens. Returns whether there was room.
    pub(super) fn tokens(&self, batch: Vec<u8>) -> bool {
        self.messages.try_send(Outgoing::Tokens(batch.into())).is_ok()
    }

    /// Queues a record set. The mover keeps the number of sets in flight within bounds.
    pub(super) fn set(&self, set: Bytes) {
        drop(self.sets.send(set));
    }
}

/// Connects to the replica again and again, until the mover is gone.
pub(super) async fn keep(
    target: String,
    peer: SiteName,
    identity: Arc<Identity>,
    inputs: mpsc::Sender<Input>,
    capture: Arc<Capture>,
    hold_back: HoldBack,
) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let why = match quic::connect(&target, &peer, &identity).await {
            Ok((link, events)) => {
                let since = tokio::time::Instant::now();
                let why = converse(link, events, &inputs, &capture, hold_back).await;
                if since.elapsed() > BACKOFF_MAX {
                    backoff = BACKOFF_MIN;
                }
                why
            }
            Err(error) => error.to_string(),
        };
        if inputs.send(Input::Unlinked(why)).await.is_err() {
            return;
        }
        capture.poke();
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Carries bytes until the connection ends; returns why it did.
async fn converse(
    link: Link,
    mut events: LinkEvents,
    inputs: &mpsc::Sender<Input>,
    capture: &Capture,
    hold_back: HoldBack,
) -> String {
    let (messages, queued) = mpsc::channel(limits::OUTBOX_MESSAGES_MAX);
    let (sets, queued_sets) = mpsc::unbounded_channel();
    let senders = [
        tokio::spawn(send_messages(link.clone(), queued)),
        tokio::spawn(send_sets(link.clone(), queued_sets, hold_back)),
    ];
    let mut gone = inputs.send(Input::Linked(link, Outbox { messages, sets })).await.is_err();
    let why = loop {
        if gone {
            break "the mover has stopped".to_owned();
        }
        capture.poke();
        match events.next().await {
            Ok(Event::Control(message)) => gone = inputs.send(Input::Message(message)).await.is_err(),
            Ok(Event::Tokens(_) | Event::Set(_)) => {
                break "the replica sent what only a primary sends".to_owned();
            }
            Err(error) => break error.to_string(),
        }
    };
    senders.iter().for_each(tokio::task::JoinHandle::abort);
    why
}

async fn send_messages(link: Link, mut queued: mpsc::Receiver<Outgoing>) {
    while let Some(outgoing) = queued.recv().await {
        let sent = match outgoing {
            Outgoing::Control(message) => link.send_control(&message).await,
            Outgoing::Tokens(batch) => link.send_tokens(&batch).await,
        };
        // Why the connection ended is reported by its reader.
        if sent.is_err() {
            return;
        }
    }
}

async fn send_sets(link: Link, mut queued: mpsc::UnboundedReceiver<Bytes>, hold_back: HoldBack) {
    let mut count = 0u64;
    while let Some(set) = queued.recv().await {
        count += 1;
        if hold_back.holds(count) {
            let link = link.clone();
            tokio::spawn(async move {
                tokio::time::sleep(HoldBack::DELAY).await;
                drop(link.send_set(set).await);
            });
        } else if link.send_set(set).await.is_err() {
            return;
        }
    }
}

/// A test hook: holds a share of the record sets back for a moment, so that they arrive out of order.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HoldBack {
    percent: u64,
}

impl HoldBack {
    /// Longer than an interval, so that the next set overtakes.
    const DELAY: Duration = Duration::from_millis(limits::INTERVAL_NS / 1_000_000 + 10);

    /// Reads the share, in percent, from the environment (`TWINFS_TEST_SHUFFLE_SETS`); none by default.
    #[must_use]
    pub(super) fn from_env() -> Self {
        let percent = std::env::var("TWINFS_TEST_SHUFFLE_SETS").ok().and_then(|text| text.parse().ok());
        Self { percent: percent.unwrap_or(0) }
    }

    /// Multiplying by a large odd number scatters consecutive counts evenly over the remainders.
    const fn holds(self, count: u64) -> bool {
        (count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % 100 < self.percent
    }
}
