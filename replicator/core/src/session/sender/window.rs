//! The sets of one volume that were issued and are not acknowledged without a gap.

use std::collections::VecDeque;

use super::IssuedSet;
use crate::id::SetNumber;
use crate::session::ChainPoint;
use crate::stamp::Timestamp;

#[derive(Debug)]
pub(super) struct Window<H> {
    acked: ChainPoint,
    /// Where the interval of that set ends.
    acked_end: Timestamp,
    /// Numbered from the one after `acked` on, without gaps.
    slots: VecDeque<Slot<H>>,
}

#[derive(Debug)]
struct Slot<H> {
    set: IssuedSet<H>,
    /// Its place in the order over all volumes.
    ordinal: u64,
    acked: bool,
}

impl<H> Window<H> {
    pub(super) const fn new(acked: ChainPoint, acked_end: Timestamp) -> Self {
        Self { acked, acked_end, slots: VecDeque::new() }
    }

    /// The end of what is acknowledged without a gap.
    pub(super) const fn acked(&self) -> ChainPoint {
        self.acked
    }

    /// Where the interval of the last set acknowledged without a gap ends.
    pub(super) const fn acked_end(&self) -> Timestamp {
        self.acked_end
    }

    /// The end of what was issued.
    pub(super) fn issued(&self) -> ChainPoint {
        self.slots.back().map_or(self.acked, |slot| slot.set.point())
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn push(&mut self, ordinal: u64, set: IssuedSet<H>) {
        self.slots.push_back(Slot { set, ordinal, acked: false });
    }

    /// The sets after [`acked`](Self::acked), also those acknowledged beyond a gap.
    pub(super) fn sets(&self) -> impl ExactSizeIterator<Item = &IssuedSet<H>> {
        self.slots.iter().map(|slot| &slot.set)
    }

    pub(super) fn iter_unacked(&self) -> impl Iterator<Item = &IssuedSet<H>> {
        self.slots.iter().filter(|slot| !slot.acked).map(|slot| &slot.set)
    }

    pub(super) fn unacked(&self, number: SetNumber) -> Option<&IssuedSet<H>> {
        let slot = self.slots.get(self.index_of(number)?)?;
        (!slot.acked).then_some(&slot.set)
    }

    /// The unacknowledged sets up to a number.
    pub(super) fn unacked_through(&self, through: SetNumber) -> Vec<SetNumber> {
        self.iter_unacked().map(|set| set.number).take_while(|number| *number <= through).collect()
    }

    /// Marks a set, and returns its place in the order over all volumes if that is news.
    pub(super) fn mark_acked(&mut self, number: SetNumber) -> Option<u64> {
        let at = self.index_of(number)?;
        let slot = self.slots.get_mut(at).filter(|slot| !slot.acked)?;
        slot.acked = true;
        let ordinal = slot.ordinal;
        while let Some(slot) = self.slots.front().filter(|slot| slot.acked) {
            (self.acked, self.acked_end) = (slot.set.point(), slot.set.end);
            self.slots.pop_front();
        }
        Some(ordinal)
    }

    fn index_of(&self, number: SetNumber) -> Option<usize> {
        usize::try_from(number.0.checked_sub(self.acked.number.0)?.checked_sub(1)?).ok()
    }
}
