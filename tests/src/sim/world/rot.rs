//! The same world, with a journal that rots while the replica is down.
//!
//! What the replica shows then must be a state that was: the one at the consistency time that it tells, over all volumes.
//! It must say what it lost, to the primary too, and whoever starts it again must find the same. The repair itself is for
//! other tests.

use twinfs_core::wire::{Message, Welcome};
use twinfs_replicator::storage::Storage as _;

use super::{Event, Loss, Machine, Options, Packet, Replica, Side, Wish, World, acknowledged, reading};
use crate::sim::check::atomicity::Atomicity;

/// Operations before the journal rots.
const OPERATIONS: u64 = 120;
/// Groups that were shown by then, at least.
const GROUPS: u64 = 5;
/// Crashes while the replica finds out.
const CRASHES: u32 = 6;
const BLOCK: usize = 4096;

/// What came of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rotted {
    /// The replica noticed it by itself.
    pub noticed: u64,
    /// A checkpoint had begun to write groups that are gone: nothing shows.
    pub torn: u64,
    /// Groups that had been shown are gone.
    pub went_back: u64,
    /// The primary was told, of whatever.
    pub told: u64,
    /// Crashes while the damage was found and put aside.
    pub crashes: u64,
}

/// Lets a world run for a while, has the journal rot, and looks what is left.
///
/// # Errors
/// What was violated.
pub fn simulate_rot(seed: u64) -> Result<Rotted, String> {
    let mut world = World::new(seed, Options::default());
    for event in [Event::Restart, Event::StartPrimary, Event::Operate, Event::Chores, Event::LinkDown] {
        world.at(1, event);
    }
    world.plan_crash(Side::Replica);
    while world.figures.operations < OPERATIONS || world.prefix.newest().0 < GROUPS || world.replica.is_none()
    {
        let ((time, _), event) = world.queue.pop_first().ok_or("nothing is left to happen")?;
        world.now = time;
        world.primary.set_time(time);
        // Here the primary lives on.
        world.primary.power().cut_at(u64::MAX);
        world.apply(event)?;
        world.drive_primary()?;
        world.drive_replica()?;
    }
    world.rot()
}

impl World {
    fn rot(&mut self) -> Result<Rotted, String> {
        let mut rotted = Rotted::default();
        let replica = self.replica.take().expect("it runs");
        if self.random.one_in(2) {
            // In the middle of a checkpoint.
            let changes = self.machine.power.changes();
            self.machine.power.cut_at(changes + 1 + self.random.below(60));
            drop(replica.engine.image().checkpoint());
        }
        drop(replica);
        self.machine = self.machine.again(Loss::Process);
        let what = self.damage();
        let fail = |why: String| format!("{what}: {why}");
        let replica = self.start_rotten(&mut rotted).map_err(fail)?;
        let shown = self.check_rotten(&replica, &mut rotted).map_err(fail)?;
        drop(replica);
        // Whoever starts it again finds the same.
        self.machine = self.machine.again(Loss::Power(self.random.next_u64()));
        self.machine.power.cut_at(u64::MAX);
        let again =
            Replica::start(&self.machine, self.setup, self.now).map_err(|error| fail(error.to_string()))?;
        let mut same = Rotted::default();
        if self.check_rotten(&again, &mut same).map_err(fail)? != shown {
            return Err(fail("another start shows something else".into()));
        }
        if (same.noticed, same.torn) != (rotted.noticed, rotted.torn) {
            return Err(fail("another start says something else".into()));
        }
        rotted.told = u64::from(self.meet(again).map_err(fail)?);
        if rotted.noticed > rotted.told {
            return Err(fail("the primary is not told".into()));
        }
        Ok(rotted)
    }

    /// Starts with crashes, until it stands.
    fn start_rotten(&mut self, rotted: &mut Rotted) -> Result<Replica, String> {
        for round in 0..=CRASHES {
            let cut = if round == CRASHES { u64::MAX } else { 1 + self.random.below(40 << round) };
            self.machine.power.cut_at(cut);
            match Replica::start(&self.machine, self.setup, self.now) {
                Ok(replica) if !self.machine.power.is_off() => {
                    self.machine.power.cut_at(u64::MAX);
                    return Ok(replica);
                }
                Err(error) if !self.machine.power.is_off() => {
                    return Err(format!("it does not start: {error}"));
                }
                _ => {}
            }
            rotted.crashes += 1;
            self.machine = self.machine.again(Loss::Power(self.random.next_u64()));
        }
        Err("it does not start".into())
    }

    /// What shows is right, and not later than what was shown. Returns the group and whether anything shows.
    fn check_rotten(&mut self, replica: &Replica, rotted: &mut Rotted) -> Result<(u64, bool), String> {
        let image = replica.engine.image();
        let state = replica.machine.state().map_err(|error| error.to_string())?.ok_or("no control file")?;
        let view = image.view();
        let shows = view.members().next().is_some();
        match &state.repair {
            Some(repair) if repair.torn => {
                rotted.torn = 1;
                if shows {
                    return Err("a tree between two groups shows".into());
                }
            }
            // A tear is not told from rot in the last batch; nothing else is gone then.
            _ if image.is_incomplete() => return Err("nothing shows, and nobody knows why".into()),
            _ => {}
        }
        rotted.noticed = u64::from(state.repair.is_some());
        rotted.went_back = u64::from(view.group() < self.prefix.newest());
        if state.repair.is_none() && rotted.went_back == 0 {
            // What lies in the last batch only may be gone.
            let _ = acknowledged::check(&self.primary, replica, self.prefix.newest());
        }
        for (index, name, _) in view.members() {
            let truth = self.primary.truth();
            let volume = truth.iter().find(|volume| volume.history.name == *name);
            let wanted = volume.ok_or("an unknown volume")?.history.seq_at(view.consistency_time());
            let found = image.volumes().iter().find(|(at, ..)| *at == index).map(|(.., state)| state.seq);
            if found != Some(wanted) {
                return Err(format!("{name} shows {found:?}, not {wanted}"));
            }
        }
        Atomicity::default().check(image, &self.primary.truth())?;
        Ok((view.group().0, shows))
    }

    /// The primary comes. Whatever it remembers, it is welcome; returns whether it is told of a loss. Without that it goes
    /// on, so nothing that it was told is durable may be missing.
    fn meet(&mut self, mut replica: Replica) -> Result<bool, String> {
        self.machine.power.cut_at(u64::MAX);
        let before = acknowledged::check(&self.primary, &replica, self.prefix.newest());
        let (name, id) = super::primary::site();
        let link = twinfs_replicator::replica::engine::ConnectionId(1_000_000);
        let address = std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 1));
        replica.engine.handle_linked(link, twinfs_certs::Site { name, id }, address);
        drop(self.primary.take_packets());
        self.primary.unlinked();
        self.primary.linked();
        for packet in self.primary.take_packets() {
            if let Packet::Control(hello) = packet {
                replica.engine.handle_message(link, &hello);
            }
        }
        replica.engine.settle(reading(self.now));
        let welcome = self.welcome_of(&replica)?;
        match (welcome.damage.is_some(), before) {
            (false, Err(why)) if why.contains("set") => Err(format!("the primary is not told: {why}")),
            (damaged, _) => Ok(damaged),
        }
    }

    fn welcome_of(&self, replica: &Replica) -> Result<Welcome, String> {
        let mut told = Vec::new();
        for wish in replica.take_wishes() {
            if let Wish::Say(_, message) = wish {
                match Message::decode(&message) {
                    Ok(Message::Welcome(welcome)) => return Ok(welcome),
                    Ok(Message::Refuse(refuse)) => return Err(format!("refused: {}", refuse.text)),
                    other => told.push(format!("{other:?}")),
                }
            }
        }
        Err(format!("the primary gets no answer but {told:?}"))
    }

    /// Has something of the journal rot; says what.
    fn damage(&mut self) -> String {
        let disk = Machine::journal_disk(&self.machine);
        let names: Vec<String> =
            disk.list().unwrap_or_default().into_iter().filter(|name| name.ends_with(".seg")).collect();
        if names.is_empty() {
            return "no journal".into();
        }
        let name = &names[self.random.below(names.len() as u64) as usize];
        let mut bytes = disk.bytes(name).unwrap_or_default();
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
        // Entries of a kind: their headers stand at multiples of eight.
        let entries = |bytes: &[u8], kind: u8| -> Vec<usize> {
            let is_entry = |at: &usize| bytes[*at..].starts_with(b"TWJE") && bytes[*at + 4] == kind;
            (BLOCK..used.saturating_sub(64)).step_by(8).filter(is_entry).collect()
        };
        let what = match self.random.below(9) {
            0 => {
                disk.remove(name).expect("it is there");
                return format!("{name} is gone");
            }
            1 => {
                bytes.truncate(self.random.below(used as u64) as usize);
                format!("{name} ends at {}", bytes.len())
            }
            2 => {
                let at = self.random.below(used as u64) as usize / BLOCK * BLOCK;
                bytes[at..at + BLOCK].fill(0);
                format!("{name} has zeros at {at}")
            }
            3 => {
                let at = self.random.below(128) as usize;
                bytes[at] ^= 1 << self.random.below(8);
                format!("the header of {name} rots at {at}")
            }
            kind @ 4..=7 => {
                // A set (its frames are most of it), a commit, a standing commit.
                let found = entries(&bytes, [1, 1, 2, 3][kind as usize - 4]);
                let at = match found.len() {
                    0 => 0,
                    some => found[self.random.below(some as u64) as usize],
                };
                let within = if kind == 4 { 64 + self.random.below(400) } else { self.random.below(96) };
                let at = (at + within as usize).min(used - 1);
                bytes[at] ^= 1 << self.random.below(8);
                format!("{name} rots at {at}, kind {kind}")
            }
            _ => {
                let at = self.random.below(used as u64) as usize;
                bytes[at] ^= 1 << self.random.below(8);
                format!("{name} rots at {at}")
            }
        };
        disk.put(name, &bytes);
        what
    }
}
