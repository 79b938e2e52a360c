//! Ranges of a file that changed: few, coalescing, on granules.

use std::collections::BTreeMap;

use crate::limits;

/// Where a range ends that reaches to the end of the file, and beyond: what was cut off there is gone.
pub const TO_THE_END: u64 = u64::MAX;

/// Disjoint ranges, in order, with a gap between any two.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Ranges {
    /// Start and end of each.
    map: BTreeMap<u64, u64>,
}

impl Ranges {
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (u64, u64)> {
        self.map.iter().map(|(start, end)| (*start, *end))
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// Adds a range, widened to granules.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let granule = limits::CHANGE_GRANULE_BYTES;
        let mut start = start - start % granule;
        let mut end = end.checked_next_multiple_of(granule).unwrap_or(TO_THE_END);
        // Whatever touches it becomes part of it.
        if let Some((before, reach)) = self.map.range(..=start).next_back().map(|(s, e)| (*s, *e))
            && reach >= start
        {
            (start, end) = (before, end.max(reach));
        }
        while let Some((next, reach)) = self.map.range(start..=end).next().map(|(s, e)| (*s, *e)) {
            end = end.max(reach);
            self.map.remove(&next);
        }
        self.map.insert(start, end);
    }

    /// Closes the smallest gaps until at most `max` ranges are left.
    pub(super) fn coarsen(&mut self, max: usize) {
        let surplus = self.map.len().saturating_sub(max.max(1));
        if surplus == 0 {
            return;
        }
        let pairs = self.map.iter().zip(self.map.iter().skip(1));
        let mut gaps: Vec<(u64, u64)> = pairs.map(|((_, end), (next, _))| (next - end, *next)).collect();
        gaps.select_nth_unstable(surplus - 1);
        for (_, next) in &gaps[..surplus] {
            let end = self.map.remove(next).expect("each gap ends where a range starts");
            let before = self.map.range_mut(..next).next_back();
            *before.expect("there is a range before each gap").1 = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Random;

    #[test]
    fn ranges_cover_what_was_added_and_touch_nothing_else() {
        let granule = limits::CHANGE_GRANULE_BYTES;
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let (mut ranges, mut plain) = (Ranges::default(), [false; 64]);
            for _ in 0..random.below(30) {
                let start = random.below(60 * granule);
                let end = start + random.below(4 * granule);
                ranges.add(start, end);
                if start < end {
                    plain[(start / granule) as usize..end.div_ceil(granule) as usize].fill(true);
                }
            }
            let mut covered = [false; 64];
            for (start, end) in ranges.iter() {
                covered[(start / granule) as usize..(end / granule) as usize].fill(true);
            }
            assert_eq!(covered, plain, "seed {seed}");
            let ends = ranges.iter().map(|range| range.1).zip(ranges.iter().skip(1));
            assert!(ends.into_iter().all(|(end, next)| end < next.0), "seed {seed}: no two touch");
        }
    }

    #[test]
    fn coarser_ranges_close_the_smallest_gaps() {
        let mut ranges = Ranges::default();
        for start in [0_u64, 2, 10, 13, 50] {
            ranges.add(start * 4096, start * 4096 + 1);
        }
        ranges.coarsen(3);
        let blocks: Vec<_> = ranges.iter().map(|(start, end)| (start / 4096, end / 4096)).collect();
        assert_eq!(blocks, [(0, 3), (10, 14), (50, 51)]);
        ranges.coarsen(0);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(0, 51 * 4096)]);
    }

    #[test]
    fn a_range_to_the_end_stays_one() {
        let mut ranges = Ranges::default();
        ranges.add(5000, TO_THE_END);
        ranges.add(9000, 100_000);
        ranges.add(u64::MAX - 5, u64::MAX - 1);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(4096, TO_THE_END)]);
    }
}
