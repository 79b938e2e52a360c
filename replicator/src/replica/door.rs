//! Lets primaries in, and carries bytes between their links and the driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as driver;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use twinfs_core::limits;

use super::driver::Input;
use super::engine::{ConnectionId, Share};
use crate::transport::{Event, Link, LinkEvents, quic};

/// What goes to a primary: acknowledgements and other messages; bounded.
#[derive(Debug, Clone)]
pub(super) struct Outbox(mpsc::Sender<Bytes>);

impl Outbox {
    /// Queues a message. Returns whether there was room.
    pub(super) fn say(&self, message: impl Into<Bytes>) -> bool {
        self.0.try_send(message.into()).is_ok()
    }
}

/// Accepts connections until the runtime ends.
pub(super) async fn keep(mut listener: quic::Listener, inputs: driver::Sender<Input>) {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    loop {
        let (link, events) = listener.accept().await;
        let id = ConnectionId(NEXT.fetch_add(1, Ordering::Relaxed));
        tokio::spawn(converse(id, link, events, inputs.clone()));
    }
}

async fn converse(id: ConnectionId, link: Link, mut events: LinkEvents, inputs: driver::Sender<Input>) {
    let (outbox, mut queued) = mpsc::channel::<Bytes>(limits::ACKS_QUEUED_MAX);
    let talking = link.clone();
    let talker = tokio::spawn(async move {
        while let Some(message) = queued.recv().await {
            if talking.send_control(&message).await.is_err() {
                return;
            }
        }
    });
    let set_bytes = Arc::new(Semaphore::new(limits::SETS_QUEUED_BYTES_MAX));
    let messages = Arc::new(Semaphore::new(limits::OUTBOX_MESSAGES_MAX));
    let mut open = inputs.send(Input::Linked(id, link, Outbox(outbox))).is_ok();
    let mut why = "the replica has stopped".to_owned();
    while open {
        let event = match events.next().await {
            Ok(event) => event,
            Err(error) => {
                why = error.to_string();
                break;
            }
        };
        let (bounds, share) = match &event {
            Event::Set(set) => (&set_bytes, set.len()),
            Event::Control(_) | Event::Tokens(_) => (&messages, 1),
        };
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        // The semaphores are never closed, and no single share is larger than the whole.
        let Ok(share) = Arc::clone(bounds).acquire_many_owned(share).await else { break };
        let share: Share = Box::new(share);
        let input = match event {
            Event::Set(bytes) => Input::Set(id, bytes, share),
            Event::Control(bytes) => Input::Message(id, bytes, share),
            Event::Tokens(bytes) => Input::Tokens(id, bytes, share),
        };
        open = inputs.send(input).is_ok();
    }
    drop(inputs.send(Input::Unlinked(id, why)));
    talker.abort();
}
