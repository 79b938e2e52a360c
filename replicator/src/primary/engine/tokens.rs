//! Write tokens: what the replica learns of updates whose data cannot be there yet.

use twinfs_core::limits;
use twinfs_core::token::{Token, encode_batch};
use twinfs_core::update;

use super::{Connection, Engine, Outlet};
use crate::primary::sidefile::{Capture, Captured};

impl<O: Outlet> Engine<O> {
    /// Sends write tokens for what the replica lacks, whether it is in sets or not: those may wait long for the link, and
    /// the replica shall know of it.
    pub(super) fn send_tokens(&mut self) {
        loop {
            if self.connection != Connection::Welcomed || !self.outlet.takes_tokens() {
                return;
            }
            let captured = self.untokened();
            let Some(last) = captured.last() else { return };
            for (at, volume) in self.volumes.iter().enumerate() {
                let mut tokens = Vec::new();
                for captured in captured.iter().filter(|captured| captured.volume.as_usize() == at) {
                    tokens.extend(token_of(&self.capture, captured, &mut self.encoded));
                }
                let mut rest = &tokens[..];
                while !rest.is_empty() {
                    let mut batch = Vec::new();
                    let taken = encode_batch(&volume.name, rest, &mut batch);
                    if !self.outlet.tokens(batch) {
                        // All of them are sent again; the replica drops those that it has.
                        return;
                    }
                    rest = &rest[taken.max(1)..];
                }
            }
            self.tokened = last.stamp.time;
        }
    }

    /// The oldest updates whose tokens are still to be sent, in the order of their stamps: of sets first, as these were
    /// cut before what is still queued.
    fn untokened(&self) -> Vec<Captured> {
        let is_fresh = |captured: &&Captured| captured.stamp.time > self.tokened;
        let mut fresh: Vec<Captured> = Vec::new();
        for sets in &self.rooms {
            let from =
                sets.partition_point(|(_, updates)| !updates.last().is_some_and(|last| is_fresh(&last)));
            let updates = sets.range(from..).flat_map(|(_, updates)| updates).filter(is_fresh);
            fresh.extend(updates.take(limits::TOKEN_BATCH_MAX));
        }
        fresh.sort_unstable_by_key(|captured| captured.stamp);
        fresh.truncate(limits::TOKEN_BATCH_MAX);
        let after = fresh.last().map_or(self.tokened, |last| last.stamp.time);
        fresh.extend(self.capture.queued_after(after, limits::TOKEN_BATCH_MAX - fresh.len()));
        fresh
    }
}

fn token_of(capture: &Capture, captured: &Captured, encoded: &mut Vec<u8>) -> Option<Token> {
    encoded.clear();
    capture.copy_meta(captured, encoded);
    // What does not decode will stop the session when its set is made.
    update::decode_borrowed(encoded, 0).ok().map(|(update, _)| Token::of(&update))
}
