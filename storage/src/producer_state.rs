//! Idempotent producers of one partition: what was their last sequence, and is this batch new, a repeat or a gap.
//!
//! Pure: batch headers and the time come in, verdicts go out. `GroupLog::stage` applies every staged batch, so the
//! state is a function of the log; the snapshot only saves reading old headers at start.
//!
//! What is not committed may be cut away again. For that much there is a way back (`apply_for_now`, `settle`): a producer is then
//! what it was before the batches that go, not unknown, which would let it write again what the log still has.
//!
//! Sequences run from 0 to `i32::MAX` and start over. Transactions are not tracked here.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};

use flumen_protocol::record_batch::BatchHeader;

/// Kafka clients keep at most five requests in flight, so a repeat is one of the last five batches.
pub const BATCHES_KEPT: usize = 5;

/// One id costs about 300 bytes; clients that mint an id per batch must not eat the shard's memory. The id that was
/// quiet longest makes room, as if it had expired.
pub const MAX_PRODUCERS_PER_GROUP: usize = 20_000;

pub const DEFAULT_EXPIRATION_MS: i64 = 86_400_000;

const SNAPSHOT_MAGIC: [u8; 4] = *b"FLPS";
const SNAPSHOT_VERSION: u16 = 2;
const SNAPSHOT_HEADER_BYTES: usize = 24;
const PRODUCER_BYTES: usize = 19;
const BATCH_BYTES: usize = 28;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptBatch {
    pub first_sequence: i32,
    pub last_sequence: i32,
    pub base_offset: i64,
    pub last_offset_delta: i32,
    /// Largest timestamp of the batch; what a repeat is answered with where the broker stamps the time.
    pub timestamp: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    last_timestamp: i64,
    batches: VecDeque<KeptBatch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Append,
    /// One of the last batches again: where it is, and its largest timestamp.
    Duplicate {
        base_offset: i64,
        timestamp: i64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProducerError {
    /// Kafka error 47.
    #[error("producer {producer_id} has epoch {current}, the batch has {got}")]
    InvalidEpoch { producer_id: i64, current: i16, got: i16 },
    /// Kafka error 45.
    #[error("producer {producer_id} should continue at sequence {expected}, the batch has {got}")]
    OutOfOrder { producer_id: i64, expected: i32, got: i32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("not a producer snapshot of this version")]
    Header,
    #[error("checksum mismatch")]
    Crc,
    #[error("malformed")]
    Malformed,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProducerState {
    producers: BTreeMap<i64, Producer>,
    /// What batches that are not committed changed, oldest first.
    way_back: VecDeque<Change>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    index: u64,
    base_offset: i64,
    producer_id: i64,
    before: Before,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Before {
    /// It was not known, or is another now.
    Other(Option<Box<Producer>>),
    /// A batch was added; which one it made go, and the timestamp before.
    Batch { gone: Option<KeptBatch>, last_timestamp: i64 },
    /// A control batch, or one without a sequence.
    Timestamp(i64),
}

fn sequence_after(sequence: i32) -> i32 {
    if sequence == i32::MAX { 0 } else { sequence + 1 }
}

impl ProducerState {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn len(&self) -> usize {
        self.producers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }

    /// Epoch and last sequence known for `producer_id`; the sequence is -1 before its first batch.
    pub fn producer(&self, producer_id: i64) -> Option<(i16, i32)> {
        self.producers
            .get(&producer_id)
            .map(|p| (p.epoch, p.batches.back().map_or(-1, |batch| batch.last_sequence)))
    }

    /// Ids with epoch, last sequence and last timestamp, in the order of ids.
    pub fn producers(&self) -> impl Iterator<Item = (i64, i16, i32, i64)> + '_ {
        self.producers.iter().map(|(id, p)| {
            (*id, p.epoch, p.batches.back().map_or(-1, |batch| batch.last_sequence), p.last_timestamp)
        })
    }

    /// What the log must keep for each producer's sake: its epoch, and the last offset of its newest batch of data, if
    /// it has written any; and of the newest one below `upper`, where that is known and another.
    pub fn newest_batches(&self, upper: i64) -> impl Iterator<Item = (i64, i16, Option<i64>)> + '_ {
        self.producers.iter().flat_map(move |(id, p)| {
            let ends =
                || p.batches.iter().rev().map(|batch| batch.base_offset + i64::from(batch.last_offset_delta));
            let newest = ends().next();
            let below = ends().find(|last| *last < upper).filter(|last| Some(*last) != newest);
            std::iter::once(newest).chain(below.map(Some)).map(|last| (*id, p.epoch, last))
        })
    }

    /// Whether a produced batch may be appended now. Batches without a producer id always may.
    pub fn check(&self, batch: &BatchHeader) -> Result<Verdict, ProducerError> {
        if !batch.has_producer_id() {
            return Ok(Verdict::Append);
        }
        // Markers carry no sequence; who may write them is the coordinator's matter.
        if batch.is_control() {
            return Ok(Verdict::Append);
        }
        let producer_id = batch.producer_id;
        let Some(producer) = self.producers.get(&producer_id) else {
            // Expired, truncated or new: any first sequence is taken, as Kafka does.
            return Ok(Verdict::Append);
        };
        if batch.producer_epoch < producer.epoch {
            return Err(ProducerError::InvalidEpoch {
                producer_id,
                current: producer.epoch,
                got: batch.producer_epoch,
            });
        }
        if batch.producer_epoch > producer.epoch {
            if batch.base_sequence != 0 {
                return Err(ProducerError::OutOfOrder { producer_id, expected: 0, got: batch.base_sequence });
            }
            return Ok(Verdict::Append);
        }
        let first = batch.base_sequence;
        let last = batch.last_sequence();
        if let Some(kept) = producer
            .batches
            .iter()
            .rev()
            .find(|kept| kept.first_sequence == first && kept.last_sequence == last)
        {
            return Ok(Verdict::Duplicate { base_offset: kept.base_offset, timestamp: kept.timestamp });
        }
        let Some(newest) = producer.batches.back() else { return Ok(Verdict::Append) };
        let expected = sequence_after(newest.last_sequence);
        if first != expected {
            return Err(ProducerError::OutOfOrder { producer_id, expected, got: first });
        }
        Ok(Verdict::Append)
    }

    /// As `apply`, for an entry that may be cut away before it is committed.
    pub fn apply_for_now(&mut self, batch: &BatchHeader, index: u64) {
        if !batch.has_producer_id() {
            return;
        }
        let before = match self.producers.get(&batch.producer_id) {
            Some(known) if known.epoch != batch.producer_epoch => {
                Before::Other(Some(Box::new(known.clone())))
            }
            Some(known) if batch.is_control() || batch.base_sequence < 0 => {
                Before::Timestamp(known.last_timestamp)
            }
            Some(known) => Before::Batch {
                gone: known.batches.front().filter(|_| known.batches.len() == BATCHES_KEPT).copied(),
                last_timestamp: known.last_timestamp,
            },
            None => Before::Other(None),
        };
        let (producer_id, base_offset) = (batch.producer_id, batch.base_offset);
        self.way_back.push_back(Change { index, base_offset, producer_id, before });
        self.apply(batch);
    }

    /// Entries up to `index` are committed.
    pub fn settle(&mut self, index: u64) {
        while self.way_back.front().is_some_and(|change| change.index <= index) {
            self.way_back.pop_front();
        }
    }

    fn go_back(&mut self, change: Change) {
        let Change { producer_id, before, .. } = change;
        match (before, self.producers.get_mut(&producer_id)) {
            (Before::Other(None), _) => {
                self.producers.remove(&producer_id);
            }
            (Before::Other(Some(known)), _) => {
                self.producers.insert(producer_id, *known);
            }
            (Before::Batch { gone, last_timestamp }, Some(producer)) => {
                producer.batches.pop_back();
                if let Some(gone) = gone {
                    producer.batches.push_front(gone);
                }
                producer.last_timestamp = last_timestamp;
            }
            (Before::Timestamp(last_timestamp), Some(producer)) => producer.last_timestamp = last_timestamp,
            // It expired meanwhile, or made room.
            (_, None) => {}
        }
    }

    /// Takes a batch that is in the log now, with its final base offset. Trusts `check`; a replayed log has passed it.
    pub fn apply(&mut self, batch: &BatchHeader) {
        if !batch.has_producer_id() {
            return;
        }
        if !self.producers.contains_key(&batch.producer_id) && self.producers.len() >= MAX_PRODUCERS_PER_GROUP
        {
            // A full scan, but only at the bound, and then once per new id.
            let quietest = self.producers.iter().min_by_key(|(_, p)| p.last_timestamp).map(|(id, _)| *id);
            if let Some(id) = quietest {
                self.producers.remove(&id);
            }
        }
        let producer = self.producers.entry(batch.producer_id).or_insert_with(|| Producer {
            epoch: batch.producer_epoch,
            last_timestamp: batch.max_timestamp,
            batches: VecDeque::new(),
        });
        if producer.epoch != batch.producer_epoch {
            producer.epoch = batch.producer_epoch;
            producer.batches.clear();
        }
        producer.last_timestamp = producer.last_timestamp.max(batch.max_timestamp);
        if batch.is_control() || batch.base_sequence < 0 {
            return;
        }
        if producer.batches.len() == BATCHES_KEPT {
            producer.batches.pop_front();
        }
        producer.batches.push_back(KeptBatch {
            first_sequence: batch.base_sequence,
            last_sequence: batch.last_sequence(),
            base_offset: batch.base_offset,
            last_offset_delta: batch.last_offset_delta,
            timestamp: batch.max_timestamp,
        });
    }

    /// Forgets batches at or above `offset`, after the log was cut there; returns whether there was no way back for any of them.
    /// Then a producer with none left becomes unknown, and older ones, which only the log still has, are missing here.
    pub fn truncate(&mut self, offset: i64) -> bool {
        while self.way_back.back().is_some_and(|change| change.base_offset >= offset) {
            let change = self.way_back.pop_back();
            change.into_iter().for_each(|change| self.go_back(change));
        }
        let mut forgot = false;
        self.producers.retain(|_, producer| {
            let had = producer.batches.len();
            producer.batches.retain(|batch| batch.base_offset < offset);
            forgot |= producer.batches.len() < had;
            had == 0 || !producer.batches.is_empty()
        });
        forgot
    }

    /// What no cut makes worthless: the state without what is not committed, and the offset before which it is that.
    /// `committed_end`: where that ends, as far as the caller can tell.
    pub fn settled(&self, committed_end: i64) -> (i64, Cow<'_, ProducerState>) {
        let mut settled = Cow::Borrowed(self);
        if !self.way_back.is_empty() {
            let settled = settled.to_mut();
            while let Some(change) = settled.way_back.pop_back() {
                settled.go_back(change);
            }
        }
        // What is in it must not be taken from the log once more.
        let batches = settled.producers.values().filter_map(|producer| producer.batches.back());
        let known = batches.map(|batch| batch.base_offset + i64::from(batch.last_offset_delta) + 1).max();
        let at = committed_end.max(known.unwrap_or(0));
        (self.way_back.front().map_or(at, |change| at.min(change.base_offset)), settled)
    }

    /// A snapshot of that. `epoch_at`: the leader epoch at an offset.
    pub fn encode_settled(&self, committed_end: i64, epoch_at: impl Fn(i64) -> i32) -> (i64, Vec<u8>) {
        let (at, settled) = self.settled(committed_end);
        (at, settled.encode(at, epoch_at(at - 1)))
    }

    /// Forgets producers that wrote nothing for `expiration_ms`. Returns how many.
    pub fn expire(&mut self, now_ms: i64, expiration_ms: i64) -> usize {
        let before = self.producers.len();
        self.producers.retain(|_, p| now_ms.saturating_sub(p.last_timestamp) < expiration_ms);
        before - self.producers.len()
    }

    /// How long a snapshot may be.
    pub fn encoded_len(&self) -> usize {
        SNAPSHOT_HEADER_BYTES + self.producers.len() * (PRODUCER_BYTES + BATCHES_KEPT * BATCH_BYTES) + 4
    }

    /// The state before `offset`, where a batch of `epoch` ends (-1: nothing does).
    pub fn encode(&self, offset: i64, epoch: i32) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_len());
        out.extend_from_slice(&SNAPSHOT_MAGIC);
        out.extend_from_slice(&SNAPSHOT_VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&offset.to_le_bytes());
        out.extend_from_slice(&epoch.to_le_bytes());
        out.extend_from_slice(&(self.producers.len() as u32).to_le_bytes());
        for (id, producer) in &self.producers {
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&producer.epoch.to_le_bytes());
            out.push(producer.batches.len() as u8);
            out.extend_from_slice(&producer.last_timestamp.to_le_bytes());
            for batch in &producer.batches {
                out.extend_from_slice(&batch.first_sequence.to_le_bytes());
                out.extend_from_slice(&batch.last_sequence.to_le_bytes());
                out.extend_from_slice(&batch.base_offset.to_le_bytes());
                out.extend_from_slice(&batch.last_offset_delta.to_le_bytes());
                out.extend_from_slice(&batch.timestamp.to_le_bytes());
            }
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a snapshot; returns the offset before which it is the state, and the leader epoch of the batch that ends
    /// there. A log that has another epoch there is not the one that this was taken of.
    pub fn decode(bytes: &[u8]) -> Result<(Self, i64, i32), SnapshotError> {
        let Some((body, crc)) = bytes.split_last_chunk::<4>() else { return Err(SnapshotError::Header) };
        if body.len() < SNAPSHOT_HEADER_BYTES
            || body[..4] != SNAPSHOT_MAGIC
            || body[4..6] != SNAPSHOT_VERSION.to_le_bytes()
        {
            return Err(SnapshotError::Header);
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(SnapshotError::Crc);
        }
        let mut cursor = crate::codec::Cursor::new(&body[8..]);
        let state = (|| {
            let offset = cursor.i64()?;
            let epoch = cursor.i32()?;
            let count = cursor.u32()?;
            let mut producers = BTreeMap::new();
            for _ in 0..count {
                let id = cursor.i64()?;
                let epoch = cursor.i16()?;
                let batch_count = cursor.u8()?;
                let last_timestamp = cursor.i64()?;
                let mut batches = VecDeque::new();
                for _ in 0..batch_count {
                    batches.push_back(KeptBatch {
                        first_sequence: cursor.i32()?,
                        last_sequence: cursor.i32()?,
                        base_offset: cursor.i64()?,
                        last_offset_delta: cursor.i32()?,
                        timestamp: cursor.i64()?,
                    });
                }
                if batches.len() > BATCHES_KEPT {
                    return None;
                }
                producers.insert(id, Producer { epoch, last_timestamp, batches });
            }
            cursor.is_empty().then_some((Self { producers, ..Self::default() }, offset, epoch))
        })();
        state.ok_or(SnapshotError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(id: i64, epoch: i16, sequence: i32, count: i32, offset: i64) -> BatchHeader {
        BatchHeader {
            base_offset: offset,
            batch_length: 49,
            leader_epoch: 0,
            magic: 2,
            crc: 0,
            attributes: 0,
            last_offset_delta: count - 1,
            base_timestamp: offset,
            max_timestamp: offset,
            producer_id: id,
            producer_epoch: epoch,
            base_sequence: sequence,
            record_count: count,
        }
    }

    #[test]
    fn repeats_gaps_and_epochs() {
        let mut state = ProducerState::new();
        // An unknown id may start anywhere.
        let first = header(7, 3, 40, 10, 100);
        assert_eq!(state.check(&first), Ok(Verdict::Append));
        state.apply(&first);
        assert_eq!(state.check(&first), Ok(Verdict::Duplicate { base_offset: 100, timestamp: 100 }));
        assert_eq!(
            state.check(&header(7, 3, 51, 1, 0)),
            Err(ProducerError::OutOfOrder { producer_id: 7, expected: 50, got: 51 })
        );
        assert_eq!(
            state.check(&header(7, 2, 50, 1, 0)),
            Err(ProducerError::InvalidEpoch { producer_id: 7, current: 3, got: 2 })
        );
        assert_eq!(
            state.check(&header(7, 4, 50, 1, 0)),
            Err(ProducerError::OutOfOrder { producer_id: 7, expected: 0, got: 50 })
        );
        for k in 1..=5 {
            let next = header(7, 3, 40 + 10 * k, 10, 100 + 10 * i64::from(k));
            assert_eq!(state.check(&next), Ok(Verdict::Append));
            state.apply(&next);
        }
        // The sixth last batch is no longer known as a repeat.
        assert!(matches!(state.check(&first), Err(ProducerError::OutOfOrder { .. })));
        assert!(matches!(
            state.check(&header(7, 3, 50, 10, 0)),
            Ok(Verdict::Duplicate { base_offset: 110, .. })
        ));
        // A repeat must have the same range.
        assert!(matches!(state.check(&header(7, 3, 50, 9, 0)), Err(ProducerError::OutOfOrder { .. })));
        let bumped = header(7, 4, 0, 1, 160);
        assert_eq!(state.check(&bumped), Ok(Verdict::Append));
        state.apply(&bumped);
        assert!(matches!(state.check(&header(7, 3, 100, 1, 0)), Err(ProducerError::InvalidEpoch { .. })));
        assert_eq!(state.check(&header(-1, -1, -1, 5, 0)), Ok(Verdict::Append));
    }

    #[test]
    fn sequence_wraps() {
        let mut state = ProducerState::new();
        state.apply(&header(1, 0, i32::MAX - 1, 2, 0));
        assert_eq!(state.producer(1), Some((0, i32::MAX)));
        assert_eq!(state.check(&header(1, 0, 0, 1, 0)), Ok(Verdict::Append));
        let mut state = ProducerState::new();
        state.apply(&header(1, 0, i32::MAX, 3, 0));
        assert_eq!(state.producer(1), Some((0, 1)));
        assert_eq!(state.check(&header(1, 0, 2, 1, 0)), Ok(Verdict::Append));
    }

    #[test]
    fn expiry_truncation_and_bound() {
        let mut state = ProducerState::new();
        state.apply(&header(1, 0, 0, 1, 1_000));
        state.apply(&header(2, 0, 0, 1, 2_000));
        assert_eq!(state.expire(2_500, 1_000), 1);
        assert_eq!(state.producer(1), None);
        state.apply(&header(2, 0, 1, 1, 2_001));
        state.truncate(2_001);
        assert_eq!(state.producer(2), Some((0, 0)));
        state.truncate(0);
        assert!(state.is_empty());
        for id in 0..MAX_PRODUCERS_PER_GROUP as i64 + 10 {
            state.apply(&header(id, 0, 0, 1, id));
        }
        assert_eq!(state.len(), MAX_PRODUCERS_PER_GROUP);
        assert_eq!(state.producer(9), None);
        assert!(state.producer(10).is_some());
    }

    /// Regression: a producer whose kept batches were all cut away was unknown, and could write again what the log had.
    #[test]
    fn a_cut_leads_back_to_what_the_log_has() {
        let mut state = ProducerState::new();
        for n in 0..8 {
            state.apply_for_now(&header(1, 0, n, 1, i64::from(n)), n as u64 + 1);
        }
        state.settle(3);
        let before = {
            let mut before = ProducerState::new();
            (0..3).for_each(|n| before.apply(&header(1, 0, n, 1, i64::from(n))));
            before
        };
        state.apply_for_now(&header(2, 0, 0, 1, 8), 9);
        state.apply_for_now(&header(1, 1, 0, 1, 9), 10);
        state.apply_for_now(&header(1, 1, 1, 1, 10), 11);
        // Regression: a snapshot of what is cut later was all that was left of producers whose records were deleted.
        let (at, snapshot) = state.encode_settled(8, |offset| offset as i32);
        assert_eq!(ProducerState::decode(&snapshot), Ok((before.clone(), 3, 2)));
        assert_eq!(at, 3);
        assert!(!state.truncate(9));
        assert_eq!(state.producer(1), Some((0, 7)));
        assert!(!state.truncate(3));
        assert_eq!(state, before);
        assert!(matches!(state.check(&header(1, 0, 0, 1, 0)), Ok(Verdict::Duplicate { base_offset: 0, .. })));
        assert_eq!(state.check(&header(1, 0, 3, 1, 0)), Ok(Verdict::Append));
        // What was settled has no way back.
        assert!(state.truncate(1));
    }

    proptest! {
        /// Whatever was written and cut, it is as if only what is left had been written.
        #[test]
        fn a_cut_is_as_if_it_had_not_been(
            batches in prop::collection::vec((0i64..3, 0i16..2, prop::bool::weighted(0.9)), 0..40),
            settled in 0usize..40,
            cut in 0usize..40,
        ) {
            let mut sequences: BTreeMap<(i64, i16), i32> = BTreeMap::new();
            let mut epochs: BTreeMap<i64, i16> = BTreeMap::new();
            let mut log = Vec::new();
            for (at, (id, bump, data)) in batches.into_iter().enumerate() {
                let epoch = epochs.entry(id).or_insert(0);
                *epoch += bump;
                let sequence = sequences.entry((id, *epoch)).or_insert(0);
                let mut batch = header(id, *epoch, *sequence, 1, at as i64);
                if data { *sequence += 1; } else { batch.attributes = 1 << 5; batch.base_sequence = -1; }
                log.push(batch);
            }
            let (settled, cut) = (settled.min(log.len()), cut.min(log.len()));
            let mut state = ProducerState::new();
            for (at, batch) in log.iter().enumerate() {
                state.apply_for_now(batch, at as u64 + 1);
                state.settle(settled.min(at + 1) as u64);
            }
            if cut >= settled {
                let (at, snapshot) = state.encode_settled(settled as i64, |_| 0);
                prop_assert!(at <= settled as i64);
                let (mut from_snapshot, ..) = ProducerState::decode(&snapshot).unwrap();
                log[at as usize..cut].iter().for_each(|batch| from_snapshot.apply(batch));
                prop_assert!(!state.truncate(cut as i64));
                state.settle(u64::MAX);
                let mut left = ProducerState::new();
                log[..cut].iter().for_each(|batch| left.apply(batch));
                prop_assert_eq!(&state, &left);
                prop_assert_eq!(from_snapshot, left);
            }
        }

        #[test]
        fn snapshot_round_trip(batches in prop::collection::vec((0i64..20, 0i16..3, any::<i32>(), 1i32..100), 0..200)) {
            let mut state = ProducerState::new();
            for (at, (id, epoch, sequence, count)) in batches.into_iter().enumerate() {
                state.apply(&header(id, epoch, sequence & i32::MAX, count, at as i64));
            }
            let bytes = state.encode(77, 3);
            prop_assert_eq!(ProducerState::decode(&bytes), Ok((state, 77, 3)));
        }

        #[test]
        fn damaged_snapshot_is_refused(at in 0usize..1000, bit in 0u8..8) {
            let mut state = ProducerState::new();
            for id in 0..5 { state.apply(&header(id, 0, 0, 1, id)); }
            let mut bytes = state.encode(5, 1);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(ProducerState::decode(&bytes).is_err());
        }

        #[test]
        fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(ProducerState::decode(&bytes).is_err());
        }
    }
}
