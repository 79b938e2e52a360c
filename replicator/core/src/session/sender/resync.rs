//! Going on after a suspension in which updates were let go.
//!
//! What was let go stands in a change map, which the driver has. It drives a resync like this:
//!
//! 1. Everything that was captured before the suspension is sent and acknowledged ([`Sender::is_idle`]); or, if the two
//!    sites do not agree about the past and the map covers that too, the replica's point is adopted: see
//!    [`Sender::cover`].
//! 2. [`Sender::resume_with_resync`]; the first update that is captured afterwards, on every volume, is the *resync* mark.
//! 3. What the map names is read again and captured, mixed with what programs write. At the end, the *complete* mark.
//! 4. When that is durable at the replica and shown, the volume is in DUPLEX again.

use std::collections::VecDeque;

use super::window::Window;
use super::{Sender, SenderError};
use crate::id::VolumeIndex;
use crate::session::handshake::ResumeError;
use crate::session::{ChainPoint, SuspendReason, VolumeState};
use crate::stamp::{Seq, Timestamp};
use crate::wire::{Damage, Welcome};

impl<H: Clone> Sender<H> {
    /// Says that a change map names all that a replica of this session may lack, wherever in the chain it stands: after a
    /// power loss, from the activity log. Then a replica that has more, or less, or other sets than this site remembers is
    /// no divergence: its point is adopted. Another tree, another session and a higher epoch stay what they are.
    ///
    /// Call it before [`hello`](Self::hello). The replica must not hold sets beyond a gap of an earlier run.
    /// `mark` is an instant that no stamp of the runs before has reached: a replica that shows something later heard of it
    /// from a future that this site was taken back from (a reverted machine), of which the map knows nothing.
    pub fn cover(&mut self, mark: Timestamp) {
        self.covered = Some(mark);
    }

    /// Whether the two sites may disagree about the past.
    pub(super) fn is_covered(&self, welcome: &Welcome) -> bool {
        self.covered.is_some_and(|mark| welcome.time <= mark)
    }

    /// Goes on from where the replica stands. The sets that were made are forgotten.
    pub(super) fn restart(
        &mut self,
        now: Timestamp,
        welcome: &Welcome,
    ) -> Result<Vec<VolumeIndex>, ResumeError> {
        let wire = self.check_past(welcome, false).inspect_err(|error| self.note(error))?;
        if let Some(theirs) = welcome.volumes.iter().find(|theirs| !theirs.beyond.is_empty()) {
            // Their numbers will be given to other sets.
            let (volume, number) = (theirs.name.clone(), theirs.beyond[0]);
            return Err(ResumeError::Diverged { volume, number }).inspect_err(|error| self.note(error));
        }
        let mut last_seqs = vec![Seq::ZERO; self.volumes.len()];
        for (theirs, index) in welcome.volumes.iter().zip(&wire) {
            let ours = &mut self.volumes[index.as_usize()];
            if theirs.member {
                // Its copy was complete, though this site does not remember.
                ours.state = VolumeState::Duplex;
            } else if welcome.damage.is_some() {
                // It may have joined, and that is lost.
                ours.complete = None;
                if ours.state != VolumeState::Pending {
                    ours.state = VolumeState::Copy;
                }
            }
            ours.window = Window::new(theirs.durable, now);
            ours.forgotten = Vec::new();
            ours.end = ours.end.max(now);
            ours.released_due = true;
            last_seqs[index.as_usize()] = theirs.durable.last_seq;
        }
        self.order_base += self.order.len() as u64;
        self.order = VecDeque::new();
        self.span_bytes = 0;
        self.restarted = Some(last_seqs);
        self.damage.clone_from(&welcome.damage);
        // Nothing goes on before the resync.
        self.suspended.get_or_insert(SuspendReason::Link);
        self.needs_resync = true;
        Ok(wire)
    }

    /// Whether the chain began again with the last welcome, and then the last sequence number that the replica has of each volume: what is
    /// captured next follows that, and what was captured before and not shipped belongs into the change map. Told once.
    pub fn poll_restart(&mut self) -> Option<Vec<Seq>> {
        self.restarted.take()
    }

    /// If the chain began again because the replica lost what it had acknowledged: what it says of that. The driver then
    /// has to note in the change map what the replica may lack; nothing goes on before the resync. Told once.
    pub fn poll_damage(&mut self) -> Option<Damage> {
        self.damage.take()
    }

    /// Has a suspension for any reason be one that a resync ends.
    pub fn suspend_for_resync(&mut self) {
        self.suspended = Some(SuspendReason::Link);
    }

    /// Whether the session can only go on with a resync.
    #[must_use]
    pub const fn needs_resync(&self) -> bool {
        self.needs_resync
    }

    /// Goes on after a suspension: every volume that was whole once is being resynced from here on. One whose copy was not
    /// complete is not, its copy begins again.
    pub fn resume_with_resync(&mut self) {
        (self.needs_resync, self.covered, self.suspended) = (false, None, None);
        for volume in &mut self.volumes {
            let is_member = matches!(volume.state, VolumeState::Duplex | VolumeState::Resync);
            // One whose copy is complete may be a member by now.
            if is_member || volume.complete.is_some() {
                (volume.state, volume.complete) = (VolumeState::Resync, None);
            }
        }
    }

    /// The end of what is acknowledged of a volume without a gap.
    ///
    /// # Errors
    /// [`SenderError::Volume`].
    pub fn acked(&self, volume: VolumeIndex) -> Result<ChainPoint, SenderError> {
        let known = self.volumes.get(volume.as_usize()).ok_or(SenderError::Volume(volume))?;
        Ok(known.window.acked())
    }
}
