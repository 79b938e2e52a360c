//! A network that delays, reorders what travels on streams of its own, and loses everything in flight when the connection
//! breaks.

use bytes::Bytes;
use twinfs_core::model::Random;

/// What travels.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// A control message; they keep their order.
    Control(Bytes),
    /// A batch of tokens; they keep their order.
    Tokens(Bytes),
    /// A record set, on a stream of its own.
    Set(Bytes),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Primary,
    Replica,
}

pub(crate) struct Network {
    /// The connection, if there is one.
    pub(crate) link: Option<u64>,
    links: u64,
    delay_ns: u64,
    jitter_ns: u64,
    /// When the last message arrives, for each direction, of control and of tokens.
    ordered: [[u64; 2]; 2],
}

impl Network {
    pub(crate) fn new(random: &mut Random) -> Self {
        let delay_ns = [20_000, 2_000_000, 30_000_000][random.below(3) as usize];
        Self {
            link: None,
            links: 0,
            delay_ns,
            jitter_ns: 1 + random.below(2 * delay_ns),
            ordered: [[0; 2]; 2],
        }
    }

    pub(crate) fn connect(&mut self) -> u64 {
        self.links += 1;
        self.link = Some(self.links);
        self.ordered = [[0; 2]; 2];
        self.links
    }

    /// When a packet arrives.
    pub(crate) fn arrival(&mut self, random: &mut Random, now: u64, to: Side, packet: &Packet) -> u64 {
        let arrival = now + self.delay_ns + random.below(self.jitter_ns);
        let stream = match packet {
            Packet::Control(_) => 0,
            Packet::Tokens(_) => 1,
            Packet::Set(_) => return arrival,
        };
        let last = &mut self.ordered[to as usize][stream];
        *last = arrival.max(*last + 1);
        *last
    }
}
