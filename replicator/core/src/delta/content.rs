//! What a run of updates did to the content of one file.
//!
//! A sorted map of extents that never overlap, and a limit. Where no extent stands, the layer below shows through at the
//! same offset, but only below the limit: what lies at or above it was cut off at some time, and reads as zeros. So the
//! limit only ever falls, and cutting a file and extending it again leaves zeros between, whatever is below.
//!
//! `collapse` and `insert` move what follows. What the layer below contributes to that becomes extents of their own
//! ([`Source::Below`] at another offset), and the limit falls to where the move began.

use std::iter::Peekable;
use std::ops::Range;

use super::small_map::{Iter, SmallMap};
use super::{Piece, Source};

/// Estimated memory of one extent: its map entry, with the room that half-full nodes waste.
pub(super) const EXTENT_BYTES: usize = 80;

#[derive(Clone, Debug)]
struct Extent {
    /// Never zero.
    len: u64,
    source: Source,
}

#[derive(Clone)]
pub(super) struct Content {
    extents: SmallMap<u64, Extent>,
    /// Offset at and above which nothing below counts; `u64::MAX` if nothing was cut.
    limit: u64,
}

impl Content {
    /// Everything is as below.
    pub(super) fn untouched() -> Self {
        Self { extents: SmallMap::default(), limit: u64::MAX }
    }

    /// Nothing below counts.
    pub(super) fn empty() -> Self {
        Self { extents: SmallMap::default(), limit: 0 }
    }

    pub(super) fn limit(&self) -> Option<u64> {
        (self.limit != u64::MAX).then_some(self.limit)
    }

    pub(super) fn is_changed(&self) -> bool {
        self.limit != u64::MAX || !self.extents.is_empty()
    }

    pub(super) fn is_shifted(&self) -> bool {
        self.extents.iter().any(|(_, extent)| matches!(extent.source, Source::Below(_)))
    }

    pub(super) fn bytes(&self) -> usize {
        self.extents.len() * EXTENT_BYTES
    }

    /// The range now comes from `source`.
    pub(super) fn set(&mut self, offset: u64, len: u64, source: Source) {
        let end = offset.saturating_add(len);
        if offset == end {
            return;
        }
        self.clear(offset..end);
        // Above the limit no extent is needed to make zeros.
        let zero_end = if source == Source::Zero { end.min(self.limit) } else { end };
        if offset < zero_end {
            self.insert(offset, zero_end - offset, source);
        }
    }

    /// Everything from `size` on is cut off.
    pub(super) fn truncate(&mut self, size: u64) {
        self.clear(size..u64::MAX);
        self.limit = self.limit.min(size);
    }

    /// The range is cut out of a file that had `old_size` bytes; what follows moves down.
    pub(super) fn collapse(&mut self, offset: u64, len: u64, old_size: u64) {
        self.move_tail(offset.saturating_add(len)..old_size, offset, offset);
    }

    /// A hole is opened in a file that had `old_size` bytes; what follows moves up.
    pub(super) fn open_hole(&mut self, offset: u64, len: u64, old_size: u64) {
        self.move_tail(offset..old_size, offset.saturating_add(len), offset);
    }

    /// Cuts at `cut`, and puts what stood in `tail` at `to`.
    fn move_tail(&mut self, tail: Range<u64>, to: u64, cut: u64) {
        let from = tail.start;
        let moved: Vec<Piece> = self.pieces(tail).filter(|piece| piece.source != Source::Zero).collect();
        self.truncate(cut);
        for piece in moved {
            let start = to.saturating_add(piece.offset - from);
            let end = start.saturating_add(piece.len);
            if start < end {
                self.insert(start, end - start, piece.source);
            }
        }
    }

    /// What the range consists of, in order and without gaps.
    pub(super) fn pieces(&self, range: Range<u64>) -> Pieces<'_> {
        let first = self.extents.floor(&range.start).map_or(range.start, |(start, _)| *start);
        Pieces {
            extents: self.extents.iter_from(&first).peekable(),
            limit: self.limit,
            at: range.start,
            end: range.end,
        }
    }

    /// The extents with data or zeros.
    pub(super) fn changed(&self) -> impl Iterator<Item = Piece> {
        self.extents
            .iter()
            .map(|(offset, extent)| Piece { offset: *offset, len: extent.len, source: extent.source })
            .filter(|piece| !matches!(piece.source, Source::Below(_)))
    }

    /// Removes the extents of the range, and the parts in it of those that reach into it.
    fn clear(&mut self, range: Range<u64>) {
        if let Some((&start, extent)) = self.extents.floor(&range.start) {
            let (len, source) = (extent.len, extent.source);
            let end = start + len;
            if start < range.start && end > range.start {
                self.extents.insert(start, Extent { len: range.start - start, source });
                if end > range.end {
                    self.keep_tail(start, end, source, range.end);
                }
            }
        }
        loop {
            let first = self.extents.iter_from(&range.start).next();
            let Some((&start, extent)) = first.filter(|(start, _)| **start < range.end) else { return };
            let (end, source) = (start + extent.len, extent.source);
            self.extents.remove(&start);
            if end > range.end {
                self.keep_tail(start, end, source, range.end);
            }
        }
    }

    fn keep_tail(&mut self, start: u64, end: u64, source: Source, from: u64) {
        self.extents.insert(from, Extent { len: end - from, source: source.advanced(from - start) });
    }

    /// Puts an extent where none stands, joined with its neighbours if their sources continue each other.
    fn insert(&mut self, mut offset: u64, mut len: u64, mut source: Source) {
        if let Some((&start, left)) = self.extents.floor(&offset)
            && start + left.len == offset
            && left.source.continues(left.len, source, len)
        {
            (offset, len, source) = (start, left.len + len, left.source);
        }
        let end = offset + len;
        if let Some(right) = self.extents.get(&end)
            && source.continues(len, right.source, right.len)
        {
            len += right.len;
            self.extents.remove(&end);
        }
        self.extents.insert(offset, Extent { len, source });
    }
}

impl Source {
    /// The source `by` bytes on.
    pub(super) fn advanced(self, by: u64) -> Self {
        match self {
            Self::Journal(mut data) => {
                // An extent ends within 32 bits of data section: `continues` joins no longer ones.
                data.offset = data.offset.saturating_add(u32::try_from(by).unwrap_or(u32::MAX));
                Self::Journal(data)
            }
            Self::Zero => Self::Zero,
            Self::Below(offset) => Self::Below(offset.saturating_add(by)),
        }
    }

    /// Whether `len` bytes of this source and then `next_len` bytes of `next` are one run.
    pub(super) fn continues(self, len: u64, next: Self, next_len: u64) -> bool {
        match (self, next) {
            (Self::Journal(a), Self::Journal(b)) => {
                a.set == b.set
                    && u64::from(a.offset) + len == u64::from(b.offset)
                    && u64::from(b.offset) + next_len <= u64::from(u32::MAX)
            }
            (Self::Zero, Self::Zero) => true,
            (Self::Below(a), Self::Below(b)) => a.checked_add(len) == Some(b),
            _ => false,
        }
    }
}

/// Iterator over what a range of a file consists of.
pub(super) struct Pieces<'a> {
    extents: Peekable<Iter<'a, u64, Extent>>,
    limit: u64,
    at: u64,
    end: u64,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let offset = self.at;
        if offset >= self.end {
            return None;
        }
        while self.extents.next_if(|(start, extent)| **start + extent.len <= offset).is_some() {}
        let (end, source) = match self.extents.peek() {
            Some((start, extent)) if **start <= offset => {
                (**start + extent.len, extent.source.advanced(offset - **start))
            }
            next => {
                let gap_end = next.map_or(u64::MAX, |(start, _)| **start);
                if offset >= self.limit {
                    (gap_end, Source::Zero)
                } else {
                    (gap_end.min(self.limit), Source::Below(offset))
                }
            }
        };
        self.at = end.min(self.end);
        Some(Piece { offset, len: self.at - offset, source })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DataRef, SetLocation};
    use super::*;

    const SPACE: u64 = 300;

    /// One source for each byte, the size kept apart: the same semantics without any cleverness.
    struct Bytes {
        at: Vec<Source>,
        size: u64,
    }

    impl Bytes {
        fn new(size: u64) -> Self {
            let at = (0..SPACE).map(|o| if o < size { Source::Below(o) } else { Source::Zero }).collect();
            Self { at, size }
        }

        fn set(&mut self, offset: u64, len: u64, source: Source) {
            for i in 0..len {
                self.at[(offset + i) as usize] = source.advanced(i);
            }
        }

        fn truncate(&mut self, size: u64) {
            self.at[size as usize..].fill(Source::Zero);
            self.size = size;
        }

        fn collapse(&mut self, offset: u64, len: u64) {
            self.at.drain(offset as usize..(offset + len) as usize);
            self.at.resize(SPACE as usize, Source::Zero);
            self.size -= len;
        }

        fn open_hole(&mut self, offset: u64, len: u64) {
            for _ in 0..len {
                self.at.insert(offset as usize, Source::Zero);
            }
            self.at.truncate(SPACE as usize);
            self.size += len;
        }
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }
    }

    fn check(content: &Content, naive: &Bytes, below_size: u64, range: Range<u64>, what: &str) {
        let mut at = range.start;
        for piece in content.pieces(range.clone()) {
            assert_eq!(piece.offset, at, "{what}: no gap and no overlap");
            assert_ne!(piece.len, 0, "{what}: no empty piece");
            for i in 0..piece.len {
                let source = match piece.source.advanced(i) {
                    // Beyond its end the layer below reads as zeros.
                    Source::Below(o) if o >= below_size => Source::Zero,
                    source => source,
                };
                assert_eq!(source, naive.at[(at + i) as usize], "{what}: byte {} of {range:?}", at + i);
            }
            at += piece.len;
        }
        assert_eq!(at, range.end.max(range.start), "{what}: the range is covered");
    }

    fn one_run(seed: u64) {
        let mut random = Random(seed);
        let below_size = random.below(100);
        let (mut content, mut naive) = (Content::untouched(), Bytes::new(below_size));
        let mut data = 0;
        for step in 0..120 {
            let size = naive.size;
            match random.below(8) {
                0..3 => {
                    let (offset, len) = (random.below(120), 1 + random.below(9));
                    if random.below(3) != 0 {
                        data += 100;
                    }
                    let set = SetLocation { segment: 1, offset: random.below(2) };
                    let source = Source::Journal(DataRef { set, offset: data });
                    data += len as u32;
                    content.set(offset, len, source);
                    naive.set(offset, len, source);
                    naive.size = size.max(offset + len);
                }
                3 => {
                    let to = if random.below(4) == 0 { random.below(120) } else { size + random.below(4) };
                    content.truncate(to);
                    naive.truncate(to);
                }
                4 | 5 => {
                    let (offset, len) = (random.below(120), random.below(20));
                    content.set(offset, len, Source::Zero);
                    naive.set(offset, len, Source::Zero);
                }
                6 if size > 2 => {
                    let offset = random.below(size - 1);
                    let len = 1 + random.below(size - offset - 1);
                    content.collapse(offset, len, size);
                    naive.collapse(offset, len);
                }
                _ if size > 1 && size < 150 => {
                    let (offset, len) = (random.below(size), 1 + random.below(9));
                    content.open_hole(offset, len, size);
                    naive.open_hole(offset, len);
                }
                _ => {}
            }
            let what = format!("seed {seed} step {step}");
            check(&content, &naive, below_size, 0..SPACE, &what);
            let start = random.below(SPACE);
            check(&content, &naive, below_size, start..start + random.below(SPACE - start), &what);
            assert!(
                content.is_shifted()
                    || !content
                        .pieces(0..SPACE)
                        .any(|p| matches!(p.source, Source::Below(o) if o != p.offset)),
                "{what}"
            );
        }
    }

    #[test]
    fn extents_say_of_every_byte_what_a_naive_list_says() {
        (0..400).for_each(one_run);
    }

    #[test]
    fn sequential_data_of_one_set_is_one_extent() {
        let mut content = Content::untouched();
        let set = SetLocation { segment: 3, offset: 7 };
        for i in 0..100u32 {
            content.set(u64::from(i) * 10, 10, Source::Journal(DataRef { set, offset: 500 + 10 * i }));
        }
        let whole = Piece { offset: 0, len: 1000, source: Source::Journal(DataRef { set, offset: 500 }) };
        assert_eq!(content.changed().collect::<Vec<_>>(), [whole]);
    }

    #[test]
    fn zeros_above_the_limit_take_no_memory() {
        let mut content = Content::untouched();
        content.truncate(100);
        (0..50).for_each(|i| content.set(90 + 20 * i, 15, Source::Zero));
        let kept = Piece { offset: 90, len: 10, source: Source::Zero };
        assert_eq!(content.changed().collect::<Vec<_>>(), [kept]);
    }

    #[test]
    fn offsets_at_the_end_of_the_number_range_do_not_overflow() {
        let mut content = Content::untouched();
        content.set(u64::MAX - 1, 10, Source::Zero);
        content.set(u64::MAX, 10, Source::Zero);
        content.collapse(u64::MAX - 5, 100, u64::MAX);
        content.open_hole(10, u64::MAX - 3, u64::MAX);
        content.truncate(u64::MAX);
        assert!(content.pieces(0..u64::MAX).map(|piece| piece.len).sum::<u64>() == u64::MAX);
    }
}
