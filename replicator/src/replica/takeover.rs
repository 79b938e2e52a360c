//! Promote: how a replica becomes the primary.
//!
//! A promote raises the epoch, durably, before anything else can be written; from that instant the old primary's sets
//! are refused, those in flight too. Then the plain trees are made those of the last group. What comes after – the
//! writable mount – is the file system layer's.

use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use twinfs_core::id::{Epoch, VolumeName};
use twinfs_core::limits;
use twinfs_core::session::Role;
use twinfs_core::stamp::Timestamp;
use twinfs_core::wire::{Message, PromoteReady};

use super::driver::{Driver, TakeoverNews};
use crate::primary::clock::Reading;
use crate::status::{Bytes, age_seconds};

/// How to promote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromoteMode {
    /// Only if the primary is not connected.
    Plain,
    /// Hold and drain the primary first: nothing is lost.
    Planned,
    /// Whatever the primary does.
    Forced,
}

/// A site that may take over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promoted {
    /// The new epoch, durable.
    pub epoch: Epoch,
    /// The consistency time: what the trees show.
    pub time: Timestamp,
    /// The volumes with their plain trees.
    pub volumes: Vec<(VolumeName, PathBuf)>,
    /// Volumes whose initial copy was not complete: unusable, and left where they are.
    pub unusable: Vec<VolumeName>,
}

/// A planned promote under way.
#[derive(Debug)]
pub(super) struct Takeover {
    news: Sender<TakeoverNews>,
    deadline: Instant,
    ready: Option<PromoteReady>,
}

impl Driver {
    pub(super) fn begin_takeover(&mut self, mode: PromoteMode, news: Sender<TakeoverNews>) {
        let decide = |decided| drop(news.send(TakeoverNews::Decided(decided)));
        if self.receiver.role() == Role::Promoted {
            return decide(self.promoted());
        }
        if self.takeover.is_some() {
            return decide(Err("a planned promote is under way already".into()));
        }
        if self.receiver.progress().time == Timestamp::ZERO {
            return decide(Err("no volume was ever complete here: there is nothing to promote".into()));
        }
        let peer = self.current.as_ref().map(|current| current.link.peer().name.to_string());
        match (mode, peer) {
            (PromoteMode::Plain, Some(peer)) => decide(Err(format!(
                "the primary {peer} is connected: use --planned to move without loss, or --force to cut it off"
            ))),
            (PromoteMode::Planned, None) => decide(Err(
                "the primary is not connected, so it cannot be drained: without it, use --force".into(),
            )),
            (PromoteMode::Planned, Some(peer)) => {
                let line = format!("Asking {peer} to hold new writes and to drain.");
                drop(news.send(TakeoverNews::Progress(line)));
                self.say(Message::PromoteRequest);
                let deadline = Instant::now() + Duration::from_nanos(limits::HANDOVER_NS_MAX);
                self.takeover = Some(Takeover { news, deadline, ready: None });
            }
            (PromoteMode::Plain | PromoteMode::Forced, _) => {
                for line in self.losses() {
                    drop(news.send(TakeoverNews::Progress(line)));
                }
                let decided = self.take_over();
                drop(news.send(TakeoverNews::Decided(decided)));
            }
        }
    }

    /// What a promote without the primary is known to lose, and from when on nothing is known.
    fn losses(&self) -> Vec<String> {
        let shown = self.receiver.progress();
        let now = Timestamp(Reading::now().real);
        let tokens = self.receiver.bare_tokens();
        let (pending, _) = self.pending();
        let mut lines = vec![format!(
            "Consistency time {} ({:.2} s ago), group {}.",
            shown.time,
            age_seconds(now, shown.time),
            shown.group
        )];
        lines.push(format!(
            "Known to be lost: {} updates ({}) of which only the write tokens came, {pending} updates that came but \
             cannot be ordered.",
            tokens.count + tokens.not_held,
            Bytes(tokens.bytes)
        ));
        let heard = self.last_heard.unwrap_or(shown.time).max(shown.time);
        lines.push(format!("Nothing is known of what the primary wrote after {heard}."));
        lines
    }

    pub(super) fn handover_ready(&mut self, ready: PromoteReady) {
        if let Some(takeover) = &mut self.takeover {
            takeover.ready = Some(ready);
        }
    }

    pub(super) fn handover_refused(&mut self, why: &str) {
        if let Some(takeover) = self.takeover.take() {
            let decided = Err(format!("the primary refuses: {}", why.escape_debug()));
            drop(takeover.news.send(TakeoverNews::Decided(decided)));
        }
    }

    /// Looks whether a planned promote can go on.
    pub(super) fn advance_takeover(&mut self) {
        let Some(takeover) = &self.takeover else { return };
        let failed = if self.current.is_none() {
            Some("the connection to the primary broke off: nothing was changed here")
        } else if Instant::now() > takeover.deadline {
            Some("the primary did not drain in time: nothing was changed here, and its writes go on")
        } else {
            None
        };
        let reached = takeover.ready.as_ref().is_some_and(|ready| self.receiver.has_reached(ready));
        if failed.is_none() && !reached {
            return;
        }
        let Some(takeover) = self.takeover.take() else { return };
        if let Some(why) = failed {
            drop(takeover.news.send(TakeoverNews::Decided(Err(why.into()))));
            return;
        }
        let line = "The primary is drained: 0 updates lost.".to_owned();
        drop(takeover.news.send(TakeoverNews::Progress(line)));
        let decided = self.take_over();
        drop(takeover.news.send(TakeoverNews::Decided(decided)));
    }

    /// The epoch first, durable; then nothing of the old primary is taken any more; then the trees.
    fn take_over(&mut self) -> Result<Promoted, String> {
        let (_, known) = self.receiver.paired().ok_or("this site was never paired with a primary")?;
        let epoch = Epoch { number: known.number + 1, site: self.own_site };
        self.save_promoted(epoch).map_err(|error| format!("{error}; nothing was changed"))?;
        self.receiver.promote(epoch).map_err(|error| error.to_string())?;
        tracing::warn!(
            epoch = epoch.number,
            "promoted: the old primary's record sets are refused from now on"
        );
        self.say(Message::PromoteDone(epoch));
        self.promoted()
    }

    /// What a promoted site has: also after a restart in the middle of a promote.
    fn promoted(&mut self) -> Result<Promoted, String> {
        let (_, epoch) = self.receiver.paired().ok_or("this site was never paired with a primary")?;
        self.image.checkpoint().map_err(|error| format!("the last checkpoint failed, try again: {error}"))?;
        self.published = None;
        self.publish_status();
        let members = self.receiver.volumes().filter(|(.., member)| *member);
        let unusable = self.receiver.volumes().filter(|(.., member)| !*member);
        Ok(Promoted {
            epoch,
            time: self.receiver.progress().time,
            volumes: members.map(|(_, name, _)| (name.clone(), self.image.tree_path(name))).collect(),
            unusable: unusable.map(|(_, name, _)| name.clone()).collect(),
        })
    }
}
