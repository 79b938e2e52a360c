//! A journal that is damaged, as seen by a running engine.

use twinfs_core::session::{ChainPoint, Role};
use twinfs_core::wire::Hello;

use super::{Engine, Outlet, lock};
use crate::replica::repair;

impl<O: Outlet> Engine<O> {
    /// Ends a repair whose group is committed.
    pub(super) fn end_repair(&mut self) {
        if !self.receiver.is_repaired() {
            return;
        }
        // The group that made all good is durable, and says so after a restart, too.
        self.image.reveal();
        let mut state = self.state.clone();
        state.repair = None;
        match self.store.save_state(&state) {
            Ok(()) => {
                tracing::info!("what the damaged journal had lost is there again");
                self.state = state;
                self.receiver.end_repair();
            }
            Err(error) => tracing::error!(%error, "the repair is complete, and cannot be forgotten yet"),
        }
    }

    /// A primary knows of acknowledged sets that are not here, though nothing here is damaged: the end of the journal
    /// rotted as a tear would. Remembers that durably; `false` if it cannot be made good.
    pub(super) fn note_lost_end(&mut self, hello: &Hello, why: &str) -> bool {
        let known = |volume: &_| self.state.received.iter().any(|received| received.name == *volume);
        let is_ours = hello.volumes.iter().all(|v| v.acked == ChainPoint::START || known(&v.name));
        if self.receiver.role() != Role::Replica || !is_ours {
            return false;
        }
        let mut state = self.state.clone();
        state.repair = Some(repair::of_lost_end(&state, &self.receiver, why.to_owned()));
        if let Err(error) = self.store.save_state(&state) {
            tracing::error!(%error, "cannot remember that acknowledged sets are gone");
            return false;
        }
        tracing::error!(why, "acknowledged record sets are gone: everything is compared with the primary");
        self.state = state;
        repair::go_on(&self.state, &mut self.receiver);
        true
    }

    /// Looks whether something in the journal turned out to have rotted when it was read. Its readers got an error; the
    /// next start finds it again, and repairs it.
    pub(super) fn notice_rot(&mut self) {
        if self.trouble.as_ref().is_some_and(|(_, is_final)| *is_final) {
            return;
        }
        let Some(found) = lock(&self.data.rot).clone() else { return };
        let why = format!("the journal is damaged ({found}): start the replica anew, and it is repaired");
        tracing::error!(%why, "the session is SUSPENDED: nothing more is taken, what was shown stays");
        self.trouble = Some((why.clone(), true));
        if let Some(id) = self.connection() {
            self.refuse_with(id, twinfs_core::wire::RefuseCode::Failed, why);
        }
    }

    /// Whether something in the journal cannot be read: then no checkpoint can be made.
    pub(super) fn is_rotten(&self) -> bool {
        lock(&self.data.rot).is_some()
    }

    /// Tells the receiver what the plain trees hold.
    pub(super) fn tell_written(&mut self) {
        let time = self.image.checkpointed().time;
        self.receiver.handle_checkpointed(time, self.image.is_written());
    }
}
