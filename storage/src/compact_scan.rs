//! First half of a compaction pass: the dirty part of a log is read once, and what comes out is the newest offset of every
//! key, which transactions were aborted, and how far the pass may go. Pure; batches come in, in order.
//!
//! Keys of an open transaction wait for its marker: committed, they count as of their own offsets; aborted, they never do.
//! The pass ends below the first transaction that is still open. A key that was met above that end counts all the same:
//! its record is committed and stays, so what it supersedes may go.

use std::collections::BTreeMap;

use flumen_protocol::record::{Record, RecordsBuf};
use flumen_protocol::record_batch::BatchHeader;

use crate::compact_map::{KEYS_MAX, KeyHash, OffsetMap};

/// What a batch may unfold to; one that needs more is left as it is.
pub const DECOMPRESSED_MAX_BYTES: usize = 128 << 20;

/// Keys of open transactions, 24 bytes each; with more, the pass ends before the first open one.
const OPEN_KEYS_MAX: usize = KEYS_MAX;

/// Aborted transactions of one pass, 24 bytes each.
const ABORTED_MAX: usize = 100_000;

/// Producers of one pass, some 32 bytes each; there are never that many but when each of them writes one batch and goes.
const PRODUCERS_MAX: usize = KEYS_MAX;

/// A transaction that was aborted: its producer, and the offsets from its first batch to its marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted {
    pub producer_id: i64,
    pub first: i64,
    pub marker: i64,
}

#[derive(Debug)]
struct Open {
    first: i64,
    keys: Vec<(KeyHash, i64)>,
}

#[derive(Debug)]
pub struct Scan {
    pub map: OffsetMap,
    pub seed: u64,
    pub aborted: Vec<Aborted>,
    /// Epoch and last offset of the newest batch of every producer in what was scanned.
    pub producers: BTreeMap<i64, (i16, i64)>,
    keys_max: usize,
    open: BTreeMap<i64, Open>,
    open_keys: usize,
    /// Everything below it was seen.
    end: i64,
    buf: RecordsBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    Abort,
    Commit,
    /// Of a type that this version does not know; it ends nothing.
    Other,
}

/// What a control batch says.
pub fn marker_of(buf: &mut RecordsBuf, batch: &[u8]) -> Marker {
    let kind = |record: Record<'_>| {
        let key = record.key?;
        Some(i16::from_be_bytes([*key.get(2)?, *key.get(3)?]))
    };
    let first = buf.decode(batch, DECOMPRESSED_MAX_BYTES).ok().and_then(|mut records| records.next()?.ok());
    match first.and_then(kind) {
        Some(0) => Marker::Abort,
        Some(1) => Marker::Commit,
        _ => Marker::Other,
    }
}

impl Scan {
    /// `from`: where the dirty part begins. `keys_max`: `KEYS_MAX`, but in tests.
    pub fn new(seed: u64, from: i64, keys_max: usize) -> Self {
        Self {
            map: OffsetMap::default(),
            seed,
            aborted: Vec::new(),
            producers: BTreeMap::new(),
            keys_max,
            open: BTreeMap::new(),
            open_keys: 0,
            end: from,
            buf: RecordsBuf::new(),
        }
    }

    /// Takes the next batch. False: there is no room for its keys, and the pass ends before it. At least one batch is
    /// taken, so that every pass gets on.
    pub fn take(&mut self, header: &BatchHeader, batch: &[u8]) -> bool {
        let full = self.map.len() >= self.keys_max
            || self.open_keys >= OPEN_KEYS_MAX
            || self.producers.len() >= PRODUCERS_MAX
            || self.aborted.len() >= ABORTED_MAX;
        if full {
            return false;
        }
        self.end = header.next_offset();
        let producer_id = header.producer_id;
        if header.is_control() {
            let marker = marker_of(&mut self.buf, batch);
            if marker == Marker::Other {
                return true;
            }
            if let Some(open) = self.open.remove(&producer_id) {
                self.open_keys -= open.keys.len();
                match marker {
                    Marker::Abort => {
                        let marker = header.base_offset;
                        self.aborted.push(Aborted { producer_id, first: open.first, marker });
                    }
                    _ => open.keys.into_iter().for_each(|(key, offset)| self.map.put(key, offset)),
                }
            }
            return true;
        }
        if header.has_producer_id() {
            self.producers.insert(producer_id, (header.producer_epoch, header.last_offset()));
        }
        let transactional = header.is_transactional();
        if transactional {
            let first = header.base_offset;
            self.open.entry(producer_id).or_insert(Open { first, keys: Vec::new() });
        }
        // Records that cannot be read are kept as they are, and supersede nothing.
        let Some(keys) = keys_of(&mut self.buf, self.seed, batch) else { return true };
        match self.open.get_mut(&producer_id).filter(|_| transactional) {
            Some(open) => {
                self.open_keys += keys.len();
                open.keys.extend(keys);
            }
            None => keys.into_iter().for_each(|(key, offset)| self.map.put(key, offset)),
        }
        true
    }

    /// The pass compacts everything below this offset, which is between two batches.
    pub fn upper(&self) -> i64 {
        self.open.values().map(|open| open.first).fold(self.end, i64::min)
    }
}

fn keys_of(buf: &mut RecordsBuf, seed: u64, batch: &[u8]) -> Option<Vec<(KeyHash, i64)>> {
    let records = buf.decode(batch, DECOMPRESSED_MAX_BYTES).ok()?;
    let mut keys = Vec::new();
    for record in records {
        let record = record.ok()?;
        keys.extend(record.key.map(|key| (KeyHash::of(seed, key), record.offset)));
    }
    Some(keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flumen_protocol::record::BatchBuilder;
    use flumen_protocol::record_batch;

    fn take(scan: &mut Scan, builder: &BatchBuilder, base: i64) -> bool {
        let batch = builder.build(base);
        scan.take(&record_batch::parse(&batch).unwrap(), &batch)
    }

    fn data(producer: i64, keys: &[&str]) -> BatchBuilder {
        let mut builder = BatchBuilder::new();
        if producer >= 0 {
            builder.producer(producer, 0, 0).transactional();
        }
        for key in keys {
            builder.append(1, Some(key.as_bytes()), Some(b"v"), &[]);
        }
        builder
    }

    fn marker(producer: i64, kind: u8) -> BatchBuilder {
        let mut builder = BatchBuilder::new();
        builder.producer(producer, 0, -1).transactional().control();
        builder.append(1, Some(&[0, 0, 0, kind]), Some(&[0; 6]), &[]);
        builder
    }

    #[test]
    fn transactions_count_when_they_are_committed() {
        let mut scan = Scan::new(9, 0, KEYS_MAX);
        let at = |scan: &Scan, key: &str| scan.map.get(KeyHash::of(9, key.as_bytes()));
        assert!(take(&mut scan, &data(-1, &["a", "b"]), 0));
        assert!(take(&mut scan, &data(5, &["a"]), 2));
        assert_eq!((scan.upper(), at(&scan, "a")), (2, Some(0)));
        assert!(take(&mut scan, &data(6, &["b"]), 3));
        assert!(take(&mut scan, &data(-1, &["c"]), 4));
        assert!(take(&mut scan, &marker(6, 1), 5));
        assert_eq!((at(&scan, "b"), at(&scan, "c"), scan.upper()), (Some(3), Some(4), 2));
        // A marker of an unknown type ends nothing.
        assert!(take(&mut scan, &marker(5, 2), 6));
        assert_eq!(scan.upper(), 2);
        assert!(take(&mut scan, &marker(5, 0), 7));
        assert_eq!((at(&scan, "a"), scan.upper()), (Some(0), 8));
        assert_eq!(scan.aborted, [Aborted { producer_id: 5, first: 2, marker: 7 }]);
    }

    #[test]
    fn a_full_map_ends_the_pass_between_two_batches() {
        let mut scan = Scan::new(1, 10, 3);
        assert!(take(&mut scan, &data(-1, &["a", "b", "c", "d"]), 10));
        assert!(!take(&mut scan, &data(-1, &["e"]), 14));
        assert_eq!(scan.upper(), 14);
    }
}
