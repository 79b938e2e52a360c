//! The clock, the events, and the checks.

use std::collections::BTreeMap;

use twinfs_core::session::receiver::Ordering;
use twinfs_core::wire::Message;

use super::network::{Network, Packet, Side};
use super::primary::Primary;
use super::replica::Replica;
use crate::session_common::Rng;

const MS: u64 = 1_000_000;
/// How long a healed network may need until everything is everywhere.
const HEALED_NS_MAX: u64 = 300_000 * MS;

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    pub(crate) ordering: Ordering,
}

pub(crate) struct Run {
    pub(crate) outcome: Result<(), String>,
    pub(crate) trace: String,
}

enum Event {
    Write,
    Copy,
    Wake,
    Deliver { link: u64, to: Side, packet: Packet },
    Synced { life: u64 },
    LinkDown,
    LinkUp,
    ReplicaCrash,
    PrimaryRestart,
    Checkpoint,
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finale {
    Converge,
    PromotePlanned,
    PromoteForced,
}

struct World {
    rng: Rng,
    now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    events: u64,
    network: Network,
    primary: Primary,
    replica: Replica,
    /// Counts the replica's lives: a sync of an earlier one means nothing.
    life: u64,
    wake_at: Option<u64>,
    trace: String,
    finale: Finale,
    ready_sent: bool,
    chaos_until: u64,
    write_gap_ns: u64,
    trouble_gap_ns: u64,
    sync_ns: u64,
}

/// Runs one seed until both sites agree, or a check objects.
pub(crate) fn simulate(seed: u64, options: Options) -> Run {
    let mut rng = Rng(seed);
    let chaos_until = rng.within(500, 2500) * MS;
    let finale = [Finale::Converge, Finale::Converge, Finale::PromotePlanned, Finale::PromoteForced];
    let mut world = World {
        now: 0,
        queue: BTreeMap::new(),
        events: 0,
        network: Network::new(&mut rng),
        primary: Primary::new(&mut rng, chaos_until),
        replica: Replica::new(&mut rng, options.ordering),
        life: 0,
        wake_at: None,
        trace: String::new(),
        finale: finale[rng.below(4) as usize],
        ready_sent: false,
        chaos_until,
        write_gap_ns: rng.within(MS / 5, 8 * MS),
        trouble_gap_ns: rng.within(50, 600) * MS,
        sync_ns: rng.within(1, 30) * MS,
        rng,
    };
    let outcome = world.run();
    Run { outcome, trace: world.trace }
}

impl World {
    fn run(&mut self) -> Result<(), String> {
        for event in [Event::Write, Event::Copy, Event::LinkUp, Event::Checkpoint] {
            self.at(1, event);
        }
        for trouble in [|| Event::LinkDown, || Event::ReplicaCrash, || Event::PrimaryRestart] {
            let delay = self.rng.within(1, 2 * self.trouble_gap_ns);
            self.at(delay, trouble());
        }
        let mut promoted = false;
        while let Some(((time, _), event)) = self.queue.pop_first() {
            self.now = time;
            self.apply(event).map_err(|why| format!("{why} (at {time})"))?;
            self.settle().map_err(|why| format!("{why} (at {time})"))?;
            if self.now > self.chaos_until && self.finish(&mut promoted)? {
                self.log("the end");
                return Ok(());
            }
            if self.now > self.chaos_until + HEALED_NS_MAX {
                return Err(format!("convergence: {:?} was not reached", self.finale));
            }
        }
        Err("convergence: nothing is left to happen".to_owned())
    }

    fn log(&mut self, what: &str) {
        self.trace.push_str(&format!("{} {what}\n", self.now));
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.events += 1;
        self.queue.insert((self.now + delay, self.events), event);
    }

    fn send(&mut self, to: Side, packet: &Packet) {
        let Some(link) = self.network.link else { return };
        for arrival in self.network.send(&mut self.rng, self.now, to, packet) {
            self.at(arrival - self.now, Event::Deliver { link, to, packet: packet.clone() });
        }
    }

    fn is_chaos(&self) -> bool {
        self.now <= self.chaos_until
    }

    fn apply(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Write => {
                if self.is_chaos() {
                    let token = self.primary.write(&mut self.rng, self.now);
                    token.iter().for_each(|token| self.send_token(token));
                    let delay = self.rng.within(1, self.write_gap_ns);
                    self.at(delay, Event::Write);
                }
            }
            Event::Copy => {
                let mut tokens = self.primary.copy(self.now);
                tokens.extend(self.primary.resync(&mut self.rng, self.now, &mut self.trace));
                tokens.iter().for_each(|token| self.send_token(token));
                if self.is_chaos() {
                    self.at(10 * MS, Event::Copy);
                }
            }
            Event::Wake => self.wake_at = None,
            Event::Deliver { link, to, packet } if self.network.link == Some(link) => {
                self.deliver(to, packet)?
            }
            Event::Deliver { .. } => {}
            Event::Synced { life } if life == self.life => self.replica.handle_synced()?,
            Event::Synced { .. } => {}
            Event::LinkUp => self.link_up(),
            Event::Checkpoint => {
                self.replica.trim(self.now, &mut self.trace);
                let delay = self.rng.within(1, 300) * MS;
                self.at(delay, Event::Checkpoint);
            }
            Event::LinkDown | Event::ReplicaCrash | Event::PrimaryRestart => {
                if self.is_chaos() {
                    self.trouble(event)?;
                }
            }
        }
        Ok(())
    }

    fn trouble(&mut self, event: Event) -> Result<(), String> {
        match &event {
            Event::LinkDown => {}
            Event::ReplicaCrash => {
                self.log("replica crashes");
                self.life += 1;
                self.replica.crash(&mut self.rng)?;
            }
            _ => {
                self.log("primary restarts");
                self.primary.restart(self.now);
            }
        }
        self.link_down();
        let delay = self.rng.within(1, 2 * self.trouble_gap_ns);
        self.at(delay, event);
        Ok(())
    }

    fn link_up(&mut self) {
        if self.network.link.is_none() {
            self.network.connect();
            self.log("connected");
            let hello = Packet::of(&Message::Hello(self.primary.sender.hello()));
            self.send(Side::Replica, &hello);
        }
    }

    /// Both sides notice at once; what is in flight is lost.
    fn link_down(&mut self) {
        if self.network.link.take().is_some() {
            self.log("connection lost");
            self.primary.disconnect();
            self.replica.disconnect();
            let delay = self.rng.within(1, 100) * MS;
            self.at(delay, Event::LinkUp);
        }
    }

    fn send_token(&mut self, token: &Packet) {
        if self.primary.sender.is_connected() && self.primary.has_tokens() {
            self.send(Side::Replica, token);
        }
    }

    fn deliver(&mut self, to: Side, packet: Packet) -> Result<(), String> {
        match (to, packet) {
            (Side::Replica, packet) => {
                let answer = self.replica.handle(self.now, packet, &mut self.trace)?;
                answer.iter().for_each(|answer| self.send(Side::Primary, answer));
            }
            (Side::Primary, Packet::Message(bytes)) => {
                let message = Message::decode(&bytes).map_err(|e| e.to_string())?;
                self.log(&format!("primary hears {message:?}"));
                let replica = &self.replica;
                self.primary
                    .handle(self.now, message, |volume, number| replica.has_durable(volume, number))?;
                if self.primary.is_fenced() {
                    self.log("primary is fenced");
                }
            }
            (Side::Primary, other) => return Err(format!("unexpected at the primary: {other:?}")),
        }
        Ok(())
    }

    /// Asks every `poll` of both sides, and checks.
    fn settle(&mut self) -> Result<(), String> {
        let packets = self.primary.step(&mut self.rng, self.now, &mut self.trace)?;
        packets.iter().for_each(|packet| self.send(Side::Replica, packet));
        if let Some(wake_at) = self.primary.next_wake().map(|at| at.max(self.now + 1))
            && self.wake_at.is_none_or(|known| known > wake_at)
        {
            self.wake_at = Some(wake_at);
            self.at(wake_at - self.now, Event::Wake);
        }
        let (packets, sync) = self.replica.step(&mut self.rng, self.now, &mut self.trace);
        packets.iter().for_each(|packet| self.send(Side::Primary, packet));
        if sync {
            let (delay, life) = (self.rng.within(1, self.sync_ns), self.life);
            self.at(delay, Event::Synced { life });
        }
        self.replica.check(&self.primary.changes, &self.primary.marks)
    }

    /// After the chaos: works towards the finale, and says whether it is reached.
    fn finish(&mut self, promoted: &mut bool) -> Result<bool, String> {
        match self.finale {
            Finale::Converge => {
                let converged = self.primary.is_converged();
                if converged && self.replica.bare_tokens() > 0 {
                    return Err(format!("convergence: {} bare tokens are left", self.replica.bare_tokens()));
                }
                Ok(converged)
            }
            Finale::PromotePlanned => {
                if !*promoted && self.primary.is_converged() && !self.primary.held {
                    self.primary.held = true;
                    self.log("writes are held");
                }
                if self.primary.held
                    && !self.ready_sent
                    && let Some(ready) = self.primary.promote_ready()
                {
                    self.ready_sent = true;
                    self.log("everything is acknowledged");
                    self.send(Side::Replica, &Packet::of(&Message::PromoteReady(ready)));
                }
                if !*promoted && self.replica.has_reached() {
                    let epoch = self.replica.promote()?.ok_or("fence: a whole replica must promote")?;
                    *promoted = true;
                    self.log(&format!("promoted to {epoch}"));
                    self.send(Side::Primary, &Packet::of(&Message::PromoteDone(epoch)));
                }
                Ok(*promoted && self.primary.is_fenced())
            }
            Finale::PromoteForced => {
                if !*promoted {
                    let Some(epoch) = self.replica.promote()? else { return Ok(self.primary.is_converged()) };
                    *promoted = true;
                    self.log(&format!("promoted to {epoch}"));
                    // The old primary learns of it when it connects again.
                    self.link_down();
                }
                Ok(self.primary.is_fenced())
            }
        }
    }
}
