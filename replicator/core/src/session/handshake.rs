//! What two sites decide when they meet.
//!
//! The primary says [`Hello`]; the replica answers with [`answer`], from what it has durable; the primary takes the
//! [`Welcome`](crate::wire::Welcome) with [`resume_point`], volume by volume. Both sides look for the same things: a higher epoch (then this
//! primary is fenced), a known number with another hash (then the pasts differ: DIVERGED, never taken for a duplicate),
//! and acknowledged sets that are gone.

use crate::id::{Epoch, FileId, SessionId, SetNumber, VolumeInstance, VolumeName};
use crate::limits;
use crate::session::{ChainPoint, Role};
use crate::wire::{Hello, HelloVolume, PROTOCOL, Refuse, RefuseCode, Text, WelcomeVolume};

/// What a replica knows of itself, all of it durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaView {
    /// The session it is paired with and the epoch it knows; none before the first contact.
    pub paired: Option<(SessionId, Epoch)>,
    /// What it is.
    pub role: Role,
    /// Acknowledged sets are gone: whatever the primary remembers, it has to go on from where this replica stands.
    pub damaged: bool,
    /// Its volumes, in its own order, which never changes: new ones come last.
    pub volumes: Vec<ReplicaVolume>,
}

/// What a replica knows of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaVolume {
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree at the primary.
    pub instance: VolumeInstance,
    /// Its root directory there.
    pub root: FileId,
    /// The end of what is durable without a gap.
    pub durable: ChainPoint,
}

/// What a replica has to make durable before it says welcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adoption {
    /// The session: its first contact pairs a replica.
    pub session: SessionId,
    /// The epoch, which may be higher than the known one.
    pub epoch: Epoch,
    /// Volumes that are new, to be added behind the known ones in this order.
    pub volumes: Vec<NewVolume>,
    /// Whether any of this differs from what the replica has durable already.
    pub changes: bool,
}

/// A volume that the replica hears of for the first time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// Its name.
    pub name: VolumeName,
    /// The life of its tree at the primary.
    pub instance: VolumeInstance,
    /// Its root directory there.
    pub root: FileId,
}

/// The replica's decision about a hello. To go on, make the adoption durable and hand it to the receiver, which then
/// has the welcome.
///
/// # Errors
/// The message with which to close the connection; then nothing changes at the replica.
pub fn answer(view: &ReplicaView, hello: &Hello) -> Result<Adoption, Refuse> {
    let known_epoch = view.paired.map(|(_, epoch)| epoch);
    let refuse = |code, text: String| Refuse { code, epoch: known_epoch, text: Text::new(text) };
    if hello.protocol != PROTOCOL {
        let text = format!("protocol version {} is not spoken here, only {PROTOCOL}", hello.protocol);
        return Err(refuse(RefuseCode::Version, text));
    }
    // Before the role: a promoted site must tell the old primary that it is fenced.
    if let Some((session, epoch)) = view.paired {
        if session != hello.session {
            let text = format!("paired with session {session}, not with {}", hello.session);
            return Err(refuse(RefuseCode::UnknownSession, text));
        }
        if epoch.fences(&hello.epoch) {
            return Err(refuse(RefuseCode::Fenced, format!("epoch {epoch} fences epoch {}", hello.epoch)));
        }
    }
    if view.role != Role::Replica {
        return Err(refuse(RefuseCode::NotReplica, format!("this site is {}", view.role)));
    }
    let mut volumes = Vec::new();
    for theirs in &hello.volumes {
        if let Some(ours) = view.volumes.iter().find(|ours| ours.name == theirs.name) {
            check_known(ours, theirs, view.damaged).map_err(|(code, text)| refuse(code, text))?;
            continue;
        }
        if theirs.acked != ChainPoint::START || theirs.oldest > SetNumber(1) {
            return Err(refuse(RefuseCode::Lost, lost_text(&theirs.name, ChainPoint::START, theirs)));
        }
        let (name, instance, root) = (theirs.name.clone(), theirs.instance, theirs.root);
        volumes.push(NewVolume { name, instance, root });
    }
    if let Some(ours) = view.volumes.iter().find(|ours| hello.volumes.iter().all(|v| v.name != ours.name)) {
        // Without it the consistency time would stand still for ever, and leaving it out would break the prefix.
        let text = format!("volume {} belongs to the session: mount it too, or unpair", ours.name);
        return Err(refuse(RefuseCode::VolumeMissing, text));
    }
    if view.volumes.len() + volumes.len() > limits::VOLUMES_MAX {
        let text = format!("a session has at most {} volumes", limits::VOLUMES_MAX);
        return Err(refuse(RefuseCode::TooManyVolumes, text));
    }
    let changes = view.paired != Some((hello.session, hello.epoch)) || !volumes.is_empty();
    Ok(Adoption { session: hello.session, epoch: hello.epoch, volumes, changes })
}

fn check_known(
    ours: &ReplicaVolume,
    theirs: &HelloVolume,
    damaged: bool,
) -> Result<(), (RefuseCode, String)> {
    let name = &ours.name;
    if (ours.instance, ours.root) != (theirs.instance, theirs.root) {
        let text =
            format!("volume {name} is another tree than the one mirrored here: it was restored or replaced");
        return Err((RefuseCode::Diverged, text));
    }
    if damaged {
        return Ok(());
    }
    if ours.durable.number == theirs.acked.number && ours.durable != theirs.acked {
        let text = format!("volume {name}: record set {} is another one here", ours.durable.number);
        return Err((RefuseCode::Diverged, text));
    }
    if ours.durable.number < theirs.acked.number || theirs.oldest > ours.durable.number.next() {
        return Err((RefuseCode::Lost, lost_text(name, ours.durable, theirs)));
    }
    Ok(())
}

fn lost_text(name: &VolumeName, ours: ChainPoint, theirs: &HelloVolume) -> String {
    format!(
        "volume {name}: this site has record sets up to {}, {} were acknowledged and the oldest at hand is {}",
        ours.number, theirs.acked.number, theirs.oldest
    )
}

/// Why a primary cannot go on with a replica, from its welcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// Another site has, or had, the primary role since: writes here must stop.
    #[error("the replica knows epoch {0}: this primary is fenced")]
    Fenced(Epoch),
    /// The other site is no replica.
    #[error("the other site is {0}")]
    NotReplica(Role),
    /// The replica has a set of that number that this primary did not make.
    #[error("volume {volume}: record set {number} of the replica is not the one of this site")]
    Diverged {
        /// The volume.
        volume: VolumeName,
        /// The set.
        number: SetNumber,
    },
    /// The replica has sets that this primary does not remember: it was reverted, or lost its tail.
    #[error("volume {volume}: the replica has record sets up to {durable}, this site made {issued}")]
    Ahead {
        /// The volume.
        volume: VolumeName,
        /// Last set of the replica.
        durable: SetNumber,
        /// Last set that this site remembers to have made.
        issued: SetNumber,
    },
    /// The replica lost what it had acknowledged, and it is no longer at hand here.
    #[error("volume {volume}: the replica acknowledged record set {acked} but only has {durable}")]
    Lost {
        /// The volume.
        volume: VolumeName,
        /// What it had acknowledged.
        acked: SetNumber,
        /// What it has.
        durable: SetNumber,
    },
    /// The lists of volumes differ.
    #[error("the replica's volumes are not those of the session: {0}")]
    Volumes(VolumeName),
}

impl ResumeError {
    /// Whether the two sites are who they should be and only differ in what they remember of a chain.
    #[must_use]
    pub const fn is_about_the_past(&self) -> bool {
        match self {
            Self::Diverged { .. } | Self::Ahead { .. } | Self::Lost { .. } => true,
            Self::Fenced(_) | Self::NotReplica(_) | Self::Volumes(_) => false,
        }
    }
}

/// What a primary knows of the chain of a volume: the last acknowledged point, and the sets issued after it.
#[derive(Debug, Clone)]
pub struct KnownChain<'a, I> {
    /// The volume.
    pub name: &'a VolumeName,
    /// The end of what is acknowledged without a gap.
    pub acked: ChainPoint,
    /// The points after it, one for each set that can be sent again, in order.
    pub issued: I,
}

/// The primary's decision about one volume of a welcome. Without an error it goes on by sending exactly those issued
/// sets that are neither at or before `theirs.durable` nor in `theirs.beyond`.
///
/// # Errors
/// [`ResumeError::Diverged`], [`Ahead`](ResumeError::Ahead) or [`Lost`](ResumeError::Lost).
pub fn resume_point<I: ExactSizeIterator<Item = ChainPoint>>(
    mut ours: KnownChain<'_, I>,
    theirs: &WelcomeVolume,
) -> Result<(), ResumeError> {
    let volume = || ours.name.clone();
    let durable = theirs.durable;
    let issued = SetNumber(ours.acked.number.0 + ours.issued.len() as u64);
    let last_named = theirs.beyond.last().copied().unwrap_or(durable.number);
    if durable.number < ours.acked.number {
        return Err(ResumeError::Lost {
            volume: volume(),
            acked: ours.acked.number,
            durable: durable.number,
        });
    }
    if last_named > issued {
        return Err(ResumeError::Ahead { volume: volume(), durable: last_named, issued });
    }
    let ahead = usize::try_from(durable.number.0 - ours.acked.number.0).unwrap_or(usize::MAX);
    let known = match ahead.checked_sub(1) {
        None => Some(ours.acked),
        Some(skip) => ours.issued.nth(skip),
    };
    if known != Some(durable) {
        return Err(ResumeError::Diverged { volume: volume(), number: durable.number });
    }
    Ok(())
}
