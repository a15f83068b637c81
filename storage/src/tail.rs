//! The newest entries of one partition in memory: those not yet in a segment, and behind them as many as the cache
//! budget allows. Pure; one `VecDeque`, no allocation per entry beyond its growth.
//!
//! Invariants: entries are consecutive in index and dense in offset; the first `flushed` of them are in a segment, the
//! others are in the WAL and here, and nowhere else.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::types::{GroupId, Lane};
use crate::wal_format::{BATCH, CONTROL, RecordHeader};

#[derive(Debug, Clone)]
pub struct TailEntry {
    pub index: u64,
    pub term: u64,
    pub base_offset: i64,
    /// Equal to `base_offset` for entries without records.
    pub next_offset: i64,
    pub max_timestamp: i64,
    pub bytes: Bytes,
    /// File of the WAL that has it, and its lane.
    pub file_seq: u64,
    pub lane: Lane,
}

impl TailEntry {
    pub fn is_batch(&self) -> bool {
        self.next_offset > self.base_offset
    }

    /// What stands before its bytes in the WAL.
    pub fn record(&self, group: GroupId) -> RecordHeader {
        let kind = if self.is_batch() { BATCH } else { CONTROL };
        RecordHeader { kind, group, index: self.index, term: self.term, offset: self.base_offset }
    }
}

/// Most groups have one entry or mark for as long as nobody writes to them, and there are thousands of groups; a deque would make
/// places for four with the first.
pub(crate) fn push_sparingly<T>(places: &mut VecDeque<T>, item: T) {
    if places.capacity() == 0 {
        places.reserve_exact(1);
    }
    places.push_back(item);
}

#[derive(Debug, Default)]
pub struct Tail {
    entries: VecDeque<TailEntry>,
    flushed: usize,
    unflushed_bytes: u64,
}

impl Tail {
    pub fn unflushed_bytes(&self) -> u64 {
        self.unflushed_bytes
    }

    pub fn unflushed(&self) -> impl Iterator<Item = &TailEntry> + '_ {
        self.entries.iter().skip(self.flushed)
    }

    pub fn first_unflushed(&self) -> Option<&TailEntry> {
        self.entries.get(self.flushed)
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &TailEntry> + '_ {
        self.entries.iter()
    }

    pub fn push(&mut self, entry: TailEntry) {
        debug_assert!(self.entries.back().is_none_or(|last| last.index + 1 == entry.index));
        self.unflushed_bytes += entry.bytes.len() as u64;
        push_sparingly(&mut self.entries, entry);
    }

    /// An entry that is in a segment already, to warm the cache at start.
    pub fn push_flushed(&mut self, entry: TailEntry) {
        debug_assert_eq!(self.flushed, self.entries.len());
        push_sparingly(&mut self.entries, entry);
        self.flushed += 1;
    }

    /// The next `count` entries are in a segment now.
    pub fn mark_flushed(&mut self, count: usize) {
        for entry in self.entries.iter().skip(self.flushed).take(count) {
            self.unflushed_bytes -= entry.bytes.len() as u64;
        }
        self.flushed = (self.flushed + count).min(self.entries.len());
    }

    /// Entries written again to a newer file of the WAL.
    pub fn move_unflushed(&mut self, mut place: impl FnMut(&TailEntry) -> (u64, Lane)) {
        for entry in self.entries.iter_mut().skip(self.flushed) {
            (entry.file_seq, entry.lane) = place(entry);
        }
    }

    /// Drops the oldest entry if it is in a segment; returns its size.
    pub fn evict(&mut self) -> Option<usize> {
        if self.flushed == 0 {
            return None;
        }
        self.flushed -= 1;
        let entry = self.entries.pop_front()?;
        // An idle partition keeps no memory for the entries it once had.
        if self.entries.is_empty() {
            self.entries = VecDeque::new();
        }
        Some(entry.bytes.len())
    }

    /// Removes entries from `index` on. Returns their bytes in all, and how many of those were not in a segment.
    pub fn truncate(&mut self, index: u64) -> (u64, u64) {
        let (mut all, mut unflushed) = (0, 0);
        while self.entries.back().is_some_and(|entry| entry.index >= index) {
            let position = self.entries.len() - 1;
            if let Some(entry) = self.entries.pop_back() {
                all += entry.bytes.len() as u64;
                if position >= self.flushed {
                    unflushed += entry.bytes.len() as u64;
                }
            }
        }
        self.unflushed_bytes -= unflushed;
        self.flushed = self.flushed.min(self.entries.len());
        (all, unflushed)
    }

    pub fn get(&self, index: u64) -> Option<&TailEntry> {
        let first = self.entries.front()?.index;
        self.entries.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }

    /// Whole batches from the one that holds `from`, ending at or before `upper`, up to `max_bytes` but at least one.
    /// `None` when the tail does not reach back to `from`.
    pub fn read(&self, from: i64, upper: i64, max_bytes: usize) -> Option<Vec<Bytes>> {
        if self.entries.front()?.base_offset > from {
            return None;
        }
        let start = self.entries.partition_point(|entry| entry.next_offset <= from);
        let mut out = Vec::new();
        let mut left = max_bytes;
        for entry in self.entries.range(start..) {
            if !entry.is_batch() {
                continue;
            }
            if entry.next_offset > upper || (entry.bytes.len() > left && !out.is_empty()) {
                break;
            }
            left = left.saturating_sub(entry.bytes.len());
            out.push(entry.bytes.clone());
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(index: u64, base: i64, records: i64, size: usize) -> TailEntry {
        TailEntry {
            index,
            term: 1,
            base_offset: base,
            next_offset: base + records,
            max_timestamp: base,
            bytes: Bytes::from(vec![index as u8; size]),
            file_seq: 0,
            lane: Lane::Durable,
        }
    }

    #[test]
    fn reading_and_limits() {
        let mut tail = Tail::default();
        assert!(tail.read(0, 10, 10).is_none());
        tail.push(entry(1, 10, 0, 0));
        tail.push(entry(2, 10, 5, 100));
        tail.push(entry(3, 15, 5, 100));
        tail.push(entry(4, 20, 0, 3));
        tail.push(entry(5, 20, 1, 100));
        assert!(tail.read(9, 100, 1000).is_none());
        assert_eq!(tail.read(12, 100, 1000).unwrap().len(), 3);
        assert_eq!(tail.read(12, 20, 1000).unwrap().len(), 2);
        assert_eq!(tail.read(12, 19, 1000).unwrap().len(), 1);
        assert_eq!(tail.read(15, 100, 1).unwrap().len(), 1);
        assert_eq!(tail.read(15, 100, 199).unwrap().len(), 1);
        assert_eq!(tail.read(15, 100, 200).unwrap().len(), 2);
        assert_eq!(tail.read(21, 100, 200).unwrap().len(), 0);
        assert_eq!(tail.unflushed_bytes(), 303);
        assert_eq!(tail.evict(), None);
        tail.mark_flushed(2);
        assert_eq!((tail.unflushed_bytes(), tail.first_unflushed().unwrap().index), (203, 3));
        assert_eq!((tail.evict(), tail.evict(), tail.evict()), (Some(0), Some(100), None));
        assert!(tail.read(12, 100, 1000).is_none());
        assert_eq!(tail.truncate(4), (103, 103));
        assert_eq!(tail.unflushed_bytes(), 100);
        assert_eq!(tail.get(3).unwrap().index, 3);
        assert!(tail.get(2).is_none() && tail.get(4).is_none());
    }

    proptest! {
        #[test]
        fn counts_stay_true(ops in prop::collection::vec((0u8..5, 0u64..8), 0..200)) {
            let mut tail = Tail::default();
            let (mut next, mut offset) = (1u64, 0i64);
            for (op, arg) in ops {
                match op {
                    0 | 1 => {
                        let records = (arg % 3) as i64;
                        tail.push(entry(next, offset, records, arg as usize * 10));
                        next += 1;
                        offset += records;
                    }
                    2 => tail.mark_flushed((arg as usize).min(tail.unflushed().count())),
                    3 => { tail.evict(); }
                    _ => {
                        let from = next.saturating_sub(arg).max(1);
                        if let Some(cut) = tail.get(from) {
                            offset = cut.base_offset;
                            next = from;
                            tail.truncate(from);
                        }
                    }
                }
                let sum: u64 = tail.unflushed().map(|e| e.bytes.len() as u64).sum();
                prop_assert_eq!(sum, tail.unflushed_bytes());
            }
        }
    }
}
