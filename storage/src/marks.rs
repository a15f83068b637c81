//! What of a log its batches do not tell: where its indexes begin, its control entries, and where its terms change. Pure.
//!
//! Between two marks, entries are batches of one term with consecutive indexes; so the marks, the place where the log begins
//! and one known index in a segment give the index and the term of every batch, and other replicas can be sent all of it.
//! Marks are part of every group state.
//!
//! Invariants: marks rise in index, none lies at or before `before`; every control entry and every entry whose term is not
//! that of the one before it has a mark.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::codec::Cursor;
use crate::tail::push_sparingly;

/// A change of leader makes one mark of some nine bytes. Where there are more, the log begins further on for other replicas.
pub(crate) const MARKS_MAX: usize = 1024;
/// Of the control entries' payloads together: memberships have at most half a KiB each.
const PAYLOAD_BYTES_MAX: usize = 32 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    pub index: u64,
    pub term: u64,
    /// Where its batch begins, or the batch after it.
    pub offset: i64,
    /// The payload, if it is a control entry.
    pub control: Option<Bytes>,
}

/// The entry before the first that other replicas can be sent, and the offset after it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Before {
    pub index: u64,
    pub term: u64,
    pub offset: i64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    before: Before,
    marks: VecDeque<Mark>,
    payload_bytes: usize,
}

fn payload_len(mark: &Mark) -> usize {
    mark.control.as_ref().map_or(0, Bytes::len)
}

impl Marks {
    pub fn beginning(before: Before) -> Self {
        Self { before, ..Self::default() }
    }

    pub fn before(&self) -> Before {
        self.before
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Mark> + '_ {
        self.marks.iter()
    }

    fn add(&mut self, mark: Mark) {
        self.payload_bytes += payload_len(&mark);
        push_sparingly(&mut self.marks, mark);
    }

    /// An entry that follows what is there; it gets a mark if it needs one. `committed`: entries up to there stay.
    pub fn note(&mut self, index: u64, term: u64, offset: i64, control: Option<&Bytes>, committed: u64) {
        if control.is_none() && term == self.last_term() {
            return;
        }
        // A copy: the payload may be a piece of a whole WAL file, and lives as long as the log.
        let control = control.map(|bytes| Bytes::copy_from_slice(bytes));
        let mark = Mark { index, term, offset, control };
        self.add(mark);
        while self.marks.len() > MARKS_MAX || self.payload_bytes > PAYLOAD_BYTES_MAX {
            match self.marks.get(1) {
                Some(second) if second.index <= committed => {
                    let (index, offset) = (second.index - 1, second.offset);
                    self.raise(index, offset);
                }
                _ => break,
            }
        }
    }

    /// Entries from `index` on are gone.
    pub fn truncate(&mut self, index: u64, offset: i64) {
        while self.marks.back().is_some_and(|mark| mark.index >= index) {
            self.payload_bytes -= self.marks.pop_back().as_ref().map_or(0, payload_len);
        }
        if index <= self.before.index {
            // Nothing is known of what is left: it begins at its end. (A committed entry is never cut away.)
            self.before = Before { index: index - 1, term: 0, offset };
        }
    }

    /// The log begins after `index`, where the offset is `offset`.
    pub fn raise(&mut self, index: u64, offset: i64) {
        if index <= self.before.index {
            return;
        }
        let term = self.term_at(index).unwrap_or(self.before.term);
        while self.marks.front().is_some_and(|mark| mark.index <= index) {
            self.payload_bytes -= self.marks.pop_front().as_ref().map_or(0, payload_len);
        }
        self.before = Before { index, term, offset };
    }

    pub fn last_term(&self) -> u64 {
        self.marks.back().map_or(self.before.term, |mark| mark.term)
    }

    /// Position of the first mark above `index`.
    fn after(&self, index: u64) -> usize {
        self.marks.partition_point(|mark| mark.index <= index)
    }

    /// Term of an entry of the log; `None` before its beginning.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        if index < self.before.index {
            return None;
        }
        Some(self.after(index).checked_sub(1).map_or(self.before.term, |at| self.marks[at].term))
    }

    pub fn at(&self, index: u64) -> Option<&Mark> {
        self.after(index).checked_sub(1).map(|at| &self.marks[at]).filter(|mark| mark.index == index)
    }

    /// The index of the first batch at or after `index`.
    pub fn next_batch(&self, mut index: u64) -> u64 {
        let mut at = self.marks.partition_point(|mark| mark.index < index);
        while self.marks.get(at).is_some_and(|mark| mark.index == index && mark.control.is_some()) {
            index += 1;
            at += 1;
        }
        index
    }

    /// The index of the batch that is the `count`-th before the entry at `index`; `None` before the log's beginning.
    pub fn batches_back(&self, mut index: u64, count: u64) -> Option<u64> {
        for _ in 0..count {
            index -= 1;
            while self.at(index).is_some_and(|mark| mark.control.is_some()) {
                index -= 1;
            }
            if index <= self.before.index {
                return None;
            }
        }
        Some(index)
    }

    /// First index of every run of one term after `before`, and the term.
    pub fn terms(&self) -> Vec<(u64, u64)> {
        let mut last = self.before.term;
        let mut runs = Vec::new();
        for mark in &self.marks {
            if mark.term != last {
                runs.push((mark.index, mark.term));
                last = mark.term;
            }
        }
        runs
    }

    /// Those up to `index`, for a state that knows no more than that.
    pub fn up_to(&self, index: u64) -> Marks {
        let marks: VecDeque<Mark> = self.marks.iter().take(self.after(index)).cloned().collect();
        let payload_bytes = marks.iter().map(payload_len).sum();
        Marks { before: self.before, marks, payload_bytes }
    }

    /// index u64, term u64, offset i64 of `before`, number of marks u16; then per mark, as LEB128 numbers, what its index,
    /// term and offset are above those of the one before it, and 0 for a batch or 1 + length and the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.before.index.to_le_bytes());
        out.extend_from_slice(&self.before.term.to_le_bytes());
        out.extend_from_slice(&self.before.offset.to_le_bytes());
        // The bound is passed only while nothing is committed.
        let kept = self.marks.len().min(usize::from(u16::MAX));
        out.extend_from_slice(&(kept as u16).to_le_bytes());
        let Before { mut index, mut term, mut offset } = self.before;
        for mark in self.marks.iter().take(kept) {
            put(out, mark.index.wrapping_sub(index));
            put(out, mark.term.wrapping_sub(term));
            put(out, mark.offset.wrapping_sub(offset) as u64);
            (index, term, offset) = (mark.index, mark.term, mark.offset);
            match &mark.control {
                None => put(out, 0),
                Some(payload) => {
                    put(out, 1 + payload.len() as u64);
                    out.extend_from_slice(payload);
                }
            }
        }
    }

    pub fn decode(cursor: &mut Cursor<'_>) -> Option<Marks> {
        let before = Before { index: cursor.u64()?, term: cursor.u64()?, offset: cursor.i64()? };
        let mut marks = Marks::beginning(before);
        let count = cursor.u16()?;
        let Before { mut index, mut term, mut offset } = before;
        for _ in 0..count {
            let more = take(cursor)?;
            index = index.checked_add(more).filter(|_| more > 0)?;
            term = term.wrapping_add(take(cursor)?);
            offset = offset.wrapping_add(take(cursor)? as i64);
            let control = match take(cursor)? {
                0 => None,
                length => Some(Bytes::copy_from_slice(cursor.take(usize::try_from(length - 1).ok()?)?)),
            };
            let mark = Mark { index, term, offset, control };
            marks.add(mark);
        }
        Some(marks)
    }
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take(cursor: &mut Cursor<'_>) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = cursor.u8()?;
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            return None;
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Gives batches of a segment their indexes, in order, from where one is known.
#[derive(Debug, Clone)]
pub(crate) struct Numbering<'a> {
    marks: &'a Marks,
    /// Of the next entry, control or not.
    next: Option<u64>,
}

impl<'a> Numbering<'a> {
    pub fn new(marks: &'a Marks, next: Option<u64>) -> Self {
        let mut numbering = Self { marks, next: None };
        numbering.resume(next.unwrap_or(0));
        numbering
    }

    /// The next entry stands at `offset`: where the log begins, its index is known.
    pub fn meet(&mut self, offset: i64) {
        if self.next.is_none() && offset == self.marks.before().offset {
            self.next = Some(self.marks.before().index + 1);
        }
    }

    /// The index of the batch with `offset`, which is the next; 0 if it cannot be said.
    pub fn batch(&mut self, offset: i64) -> u64 {
        self.meet(offset);
        let Some(next) = self.next else { return 0 };
        let index = self.marks.next_batch(next);
        self.next = Some(index + 1);
        index
    }

    /// Whether `index` may be that of the entry at `offset` of a segment, where the batch, or the one before it, is of `term`.
    /// In a log that was cut since, all from there on has another term, or another place.
    pub fn may_be(&self, index: u64, term: u64, offset: i64) -> bool {
        if index <= self.marks.before().index {
            return true;
        }
        let of = |index: u64| self.marks.term_at(index);
        let after = self.marks.after(index);
        let fits_before = after.checked_sub(1).is_none_or(|at| self.marks.marks[at].offset <= offset);
        let fits_after = self.marks.marks.get(after).is_none_or(|next| next.offset >= offset);
        fits_before && fits_after && (of(index) == Some(term) || of(index - 1) == Some(term))
    }

    /// Of the next entry; 0 if it cannot be said.
    pub fn next(&self) -> u64 {
        self.next.unwrap_or(0)
    }

    /// `index` is that of the next entry; 0 says that nobody knows. Before the log begins there are no marks to count by.
    pub fn resume(&mut self, index: u64) {
        self.next = (index > self.marks.before().index).then_some(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Marks {
        let mut marks = Marks::beginning(Before { index: 4, term: 2, offset: 30 });
        for (index, term, offset, control) in [
            (5, 2, 30, None),
            (6, 3, 31, Some("")),
            (7, 3, 31, Some("members")),
            (8, 3, 31, None),
            (12, 5, 90, None),
        ] {
            marks.note(index, term, offset, control.map(Bytes::from).as_ref(), u64::MAX);
        }
        marks
    }

    fn round(marks: &Marks) -> Option<Marks> {
        let mut out = Vec::new();
        marks.encode(&mut out);
        let mut cursor = Cursor::new(&out);
        Marks::decode(&mut cursor).filter(|_| cursor.is_empty())
    }

    #[test]
    fn look_ups() {
        let marks = example();
        assert_eq!(marks.terms(), [(6, 3), (12, 5)]);
        let terms: Vec<_> = [3, 4, 5, 6, 11, 12, 99].map(|index| marks.term_at(index)).into();
        assert_eq!(terms, [None, Some(2), Some(2), Some(3), Some(3), Some(5), Some(5)]);
        assert_eq!([5, 6, 7, 8].map(|index| marks.next_batch(index)), [5, 8, 8, 8]);
        assert_eq!([1, 2, 5].map(|count| marks.batches_back(10, count)), [Some(9), Some(8), None]);
        assert_eq!(marks.batches_back(10, 3), Some(5));
        assert_eq!(marks.at(7).unwrap().control.as_deref(), Some(&b"members"[..]));
        assert!(marks.at(8).is_none() && marks.at(12).unwrap().control.is_none());
        let mut numbering = Numbering::new(&marks, None);
        let seen: Vec<u64> = [20, 30, 31, 40].map(|offset| numbering.batch(offset)).into();
        assert_eq!((seen, numbering.next()), (vec![0, 5, 8, 9], 10));
    }

    #[test]
    fn both_ends_are_cut() {
        let mut marks = example();
        marks.raise(7, 31);
        assert_eq!(
            (marks.before(), marks.terms()),
            (Before { index: 7, term: 3, offset: 31 }, vec![(12, 5)])
        );
        marks.truncate(12, 90);
        assert_eq!((marks.last_term(), marks.iter().count()), (3, 0));
        marks.truncate(5, 30);
        assert_eq!(marks.before(), Before { index: 4, term: 0, offset: 30 });
        assert_eq!(example().up_to(7).terms(), [(6, 3)]);
    }

    #[test]
    fn too_many_let_the_log_begin_later() {
        let mut marks = Marks::default();
        for term in 1..=MARKS_MAX as u64 + 3 {
            marks.note(term * 10, term, term as i64 * 100, None, u64::MAX);
        }
        assert_eq!(marks.iter().count(), MARKS_MAX);
        assert_eq!(marks.before(), Before { index: 39, term: 3, offset: 400 });
        assert_eq!(round(&marks), Some(marks.clone()));
        let payload = Bytes::from(vec![1; PAYLOAD_BYTES_MAX / 2]);
        for index in 1..4 {
            marks.note(100_000 + index, 2000, 1 << 40, Some(&payload), u64::MAX);
        }
        assert!(marks.payload_bytes <= PAYLOAD_BYTES_MAX);
        assert_eq!(marks.before(), Before { index: 100_001, term: 2000, offset: 1 << 40 });
    }

    proptest! {
        #[test]
        fn bytes_come_back(steps in prop::collection::vec((1u64..1 << 40, 0u64..3, 0i64..1 << 40, 0usize..3), 0..40)) {
            let mut marks = Marks::beginning(Before { index: 3, term: 1, offset: 7 });
            let (mut index, mut term, mut offset) = (3, 1, 7);
            for (more, up, on, control) in steps {
                (index, term, offset) = (index + more, term + up, offset + on);
                let control = (control > 0).then(|| Bytes::from(vec![9; control - 1]));
                marks.note(index, term, offset, control.as_ref(), 0);
            }
            prop_assert_eq!(round(&marks), Some(marks));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Marks::decode(&mut Cursor::new(&bytes));
        }
    }
}
