//! A network that delays, reorders, doubles, and loses everything in flight when the connection breaks.

use std::sync::Arc;

use twinfs_core::token::Token;
use twinfs_core::wire::Message;

use crate::session_common::{Rng, TestSet};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Primary,
    Replica,
}

#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// A control message, as its bytes.
    Message(Vec<u8>),
    /// A record set or null set.
    Set(Arc<TestSet>),
    /// Write tokens of a volume.
    Tokens(usize, Vec<Token>),
}

impl Packet {
    pub(crate) fn of(message: &Message) -> Self {
        Self::Message(message.encode())
    }
}

pub(crate) struct Network {
    /// The connection, if there is one.
    pub(crate) link: Option<u64>,
    links: u64,
    /// Nothing reaches a side before the handshake does: that is one ordered stream.
    not_before: [u64; 2],
    delay_ns: u64,
    jitter_ns: u64,
    double_percent: u64,
}

impl Network {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        Self {
            link: None,
            links: 0,
            not_before: [0; 2],
            delay_ns: rng.within(10_000, 30_000_000),
            jitter_ns: rng.within(1, 40_000_000),
            double_percent: rng.below(30),
        }
    }

    pub(crate) fn connect(&mut self) -> u64 {
        self.links += 1;
        self.link = Some(self.links);
        self.not_before = [0; 2];
        self.links
    }

    /// When the copies of a packet arrive.
    pub(crate) fn send(&mut self, rng: &mut Rng, now: u64, to: Side, packet: &Packet) -> Vec<u64> {
        let handshake = matches!(packet, Packet::Message(bytes) if bytes[1] <= 3);
        let copies = if !handshake && rng.chance(self.double_percent) { 2 } else { 1 };
        let mut arrivals = Vec::new();
        for _ in 0..copies {
            let arrival = now + self.delay_ns + rng.below(self.jitter_ns);
            arrivals.push(arrival.max(self.not_before[to as usize]));
        }
        if handshake {
            self.not_before[to as usize] = arrivals[0] + 1;
        }
        arrivals
    }
}
