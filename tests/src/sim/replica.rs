//! The simulated replica: the engine of production on a machine that fails, and its way out.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use twinfs_core::id::{Epoch, SiteId};
use twinfs_core::session::Role;
use twinfs_core::session::receiver::Ordering;
use twinfs_core::stamp::Timestamp;
use twinfs_replicator::primary::clock::Reading;
use twinfs_replicator::replica::engine::{
    Asker, ConnectionId, Engine, EngineConfig, Outlet, PromoteMode, StartError, TakeoverNews,
};
use twinfs_replicator::replica::image::{Image, ImageOptions};
use twinfs_replicator::replica::journal::JournalConfig;
use twinfs_replicator::site::State;
use twinfs_replicator::storage::Power;
use twinfs_replicator::transport::CloseCode;

use super::disk::Machine;

const OWN_SITE: SiteId = SiteId::from_bytes([2; 16]);

/// What the engine wants done.
#[derive(Debug)]
pub(crate) enum Wish {
    Say(ConnectionId, Vec<u8>),
    Close(ConnectionId),
    Checkpoint,
    Decided(Result<Timestamp, String>),
}

/// Takes the engine's wishes, as long as the power is on.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    wishes: Rc<RefCell<Vec<Wish>>>,
    power: Power,
}

impl Post {
    fn put(&self, wish: Wish) {
        if !self.power.is_off() {
            self.wishes.borrow_mut().push(wish);
        }
    }
}

impl Outlet for Post {
    fn say(&mut self, to: ConnectionId, message: Vec<u8>) {
        self.put(Wish::Say(to, message));
    }

    fn close(&mut self, connection: ConnectionId, _: CloseCode, _: &'static str) {
        self.put(Wish::Close(connection));
    }

    fn start_checkpoint(&mut self, _: &Arc<Image>) -> bool {
        self.put(Wish::Checkpoint);
        true
    }

    fn tell(&mut self, _: Asker, news: TakeoverNews) {
        if let TakeoverNews::Decided(decided) = news {
            self.put(Wish::Decided(decided.map(|promoted| promoted.time)));
        }
    }
}

/// How it is set up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) segment_bytes: u64,
    pub(crate) image: ImageOptions,
    pub(crate) ordering: Ordering,
}

/// A running replica.
pub(crate) struct Replica {
    pub(crate) machine: Machine,
    pub(crate) engine: Engine<Post>,
    wishes: Rc<RefCell<Vec<Wish>>>,
}

impl Replica {
    pub(crate) fn start(machine: &Machine, setup: Setup, now: u64) -> Result<Self, StartError> {
        let state = machine
            .state()?
            .unwrap_or_else(|| State::new(Role::Replica, Epoch { number: 0, site: OWN_SITE }));
        let wishes: Rc<RefCell<Vec<Wish>>> = Rc::default();
        let config = EngineConfig {
            store: Box::new(machine.clone()),
            state,
            own_site: OWN_SITE,
            journal: JournalConfig { segment_bytes: setup.segment_bytes, floor_bytes: 1 << 20 },
            ordering: setup.ordering,
            open_image: machine.open_image(setup.image),
            outlet: Post { wishes: Rc::clone(&wishes), power: machine.power.clone() },
        };
        let engine = Engine::recover(config, reading(now))?;
        Ok(Self { machine: machine.clone(), engine, wishes })
    }

    /// Promotes it whatever the primary does. Returns the consistency time that it goes on from.
    pub(crate) fn promote(&mut self, now: u64) -> Result<Timestamp, String> {
        self.engine.handle_promote(Asker(1), PromoteMode::Forced, reading(now));
        let decided = self.take_wishes().into_iter().find_map(|wish| match wish {
            Wish::Decided(decided) => Some(decided),
            Wish::Say(..) | Wish::Close(_) | Wish::Checkpoint => None,
        });
        decided.unwrap_or_else(|| Err("nothing was decided".to_owned()))
    }

    pub(crate) fn take_wishes(&self) -> Vec<Wish> {
        std::mem::take(&mut *self.wishes.borrow_mut())
    }
}

pub(crate) fn reading(now: u64) -> Reading {
    Reading { boot: now, real: now }
}
