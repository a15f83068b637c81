//! Idempotent producers: which batches of whom are in the log. Pure.
//!
//! Kafka's rules: the last five batches of a producer are remembered, a batch equal to one of them is a
//! duplicate, otherwise it must follow the last one; a new epoch starts at sequence 0; an unknown
//! producer may start anywhere (its state may have expired).

use std::collections::{BTreeMap, VecDeque};

use flumen_protocol::record_batch::BatchHeader;

/// Kafka's number of batches to retain: the most that a producer may have in flight.
const BATCHES_MAX: usize = 5;
/// Producers remembered per partition; the one that has been silent longest is forgotten beyond it, as if
/// it had expired. Bounds memory against clients that make a producer per record.
const PRODUCERS_MAX: usize = 100_000;
const SNAPSHOT_VERSION: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batch {
    first_sequence: i32,
    last_sequence: i32,
    base_offset: i64,
    timestamp: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    batches: VecDeque<Batch>,
    last_timestamp: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProducerState {
    producers: BTreeMap<i64, Producer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Append,
    Duplicate { base_offset: i64, log_append_time: i64 },
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProducerError {
    #[error("producer epoch {got} is older than {current}")]
    InvalidEpoch { got: i16, current: i16 },
    #[error("out of order sequence: expected {expected}, got {got}")]
    OutOfOrder { expected: i32, got: i32 },
}

fn next(sequence: i32) -> i32 {
    if sequence == i32::MAX { 0 } else { sequence + 1 }
}

impl ProducerState {
    /// What to do with a batch that has a producer id.
    pub fn check(&self, header: &BatchHeader) -> Result<Verdict, ProducerError> {
        let Some(producer) = self.producers.get(&header.producer_id) else { return Ok(Verdict::Append) };
        let got = header.base_sequence;
        if header.producer_epoch < producer.epoch {
            return Err(ProducerError::InvalidEpoch { got: header.producer_epoch, current: producer.epoch });
        }
        if header.producer_epoch > producer.epoch {
            return if got == 0 {
                Ok(Verdict::Append)
            } else {
                Err(ProducerError::OutOfOrder { expected: 0, got })
            };
        }
        let last = header.last_sequence();
        if let Some(same) =
            producer.batches.iter().find(|b| b.first_sequence == got && b.last_sequence == last)
        {
            return Ok(Verdict::Duplicate { base_offset: same.base_offset, log_append_time: same.timestamp });
        }
        match producer.batches.back() {
            Some(b) if next(b.last_sequence) != got => {
                Err(ProducerError::OutOfOrder { expected: next(b.last_sequence), got })
            }
            _ => Ok(Verdict::Append),
        }
    }

    /// Remembers a batch that is in the log; its header has the final base offset.
    pub fn apply(&mut self, header: &BatchHeader) {
        if !header.has_producer_id() {
            return;
        }
        if self.producers.len() >= PRODUCERS_MAX && !self.producers.contains_key(&header.producer_id) {
            let oldest =
                self.producers.iter().min_by_key(|(id, p)| (p.last_timestamp, **id)).map(|(id, _)| *id);
            oldest.map(|id| self.producers.remove(&id));
        }
        let producer = self.producers.entry(header.producer_id).or_insert_with(|| Producer {
            epoch: header.producer_epoch,
            batches: VecDeque::with_capacity(1),
            last_timestamp: header.max_timestamp,
        });
        if producer.epoch != header.producer_epoch {
            producer.epoch = header.producer_epoch;
            producer.batches.clear();
        }
        if header.is_control() || header.base_sequence < 0 {
            return;
        }
        if producer.batches.len() == BATCHES_MAX {
            producer.batches.pop_front();
        }
        producer.last_timestamp = producer.last_timestamp.max(header.max_timestamp);
        producer.batches.push_back(Batch {
            first_sequence: header.base_sequence,
            last_sequence: header.last_sequence(),
            base_offset: header.base_offset,
            timestamp: header.max_timestamp,
        });
    }

    /// Forgets producers that have been silent for `expiration_ms`.
    pub fn expire(&mut self, now_ms: i64, expiration_ms: i64) {
        self.producers.retain(|_, p| p.last_timestamp.saturating_add(expiration_ms) > now_ms);
    }

    pub fn len(&self) -> usize {
        self.producers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }

    /// Version, count, producers, CRC-32C of all before it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![SNAPSHOT_VERSION];
        out.extend((self.producers.len() as u32).to_le_bytes());
        for (id, p) in &self.producers {
            out.extend(id.to_le_bytes());
            out.extend(p.epoch.to_le_bytes());
            out.extend(p.last_timestamp.to_le_bytes());
            out.push(p.batches.len() as u8);
            for b in &p.batches {
                out.extend(b.first_sequence.to_le_bytes());
                out.extend(b.last_sequence.to_le_bytes());
                out.extend(b.base_offset.to_le_bytes());
                out.extend(b.timestamp.to_le_bytes());
            }
        }
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<ProducerState> {
        let (body, crc) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        if crc32c::crc32c(body).to_le_bytes() != crc || *body.first()? != SNAPSHOT_VERSION {
            return None;
        }
        let mut rest = &body[1..];
        let mut producers = BTreeMap::new();
        for _ in 0..u32::from_le_bytes(take(&mut rest)?) {
            let id = i64::from_le_bytes(take(&mut rest)?);
            let epoch = i16::from_le_bytes(take(&mut rest)?);
            let last_timestamp = i64::from_le_bytes(take(&mut rest)?);
            let [count] = take(&mut rest)?;
            let mut batches = VecDeque::new();
            for _ in 0..count {
                batches.push_back(Batch {
                    first_sequence: i32::from_le_bytes(take(&mut rest)?),
                    last_sequence: i32::from_le_bytes(take(&mut rest)?),
                    base_offset: i64::from_le_bytes(take(&mut rest)?),
                    timestamp: i64::from_le_bytes(take(&mut rest)?),
                });
            }
            producers.insert(id, Producer { epoch, batches, last_timestamp });
        }
        Some(ProducerState { producers })
    }
}

/// The next `N` bytes, or `None` when there are fewer.
pub(crate) fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(id: i64, epoch: i16, sequence: i32, count: i32, base_offset: i64) -> BatchHeader {
        let mut bytes = vec![0u8; 61];
        bytes[8..12].copy_from_slice(&49i32.to_be_bytes());
        bytes[16] = 2;
        bytes[23..27].copy_from_slice(&(count - 1).to_be_bytes());
        bytes[43..51].copy_from_slice(&id.to_be_bytes());
        bytes[51..53].copy_from_slice(&epoch.to_be_bytes());
        bytes[53..57].copy_from_slice(&sequence.to_be_bytes());
        bytes[57..61].copy_from_slice(&count.to_be_bytes());
        bytes[..8].copy_from_slice(&base_offset.to_be_bytes());
        flumen_protocol::record_batch::parse(&bytes).expect("a header")
    }

    #[test]
    fn a_retry_of_any_of_the_last_five_is_a_duplicate() {
        let mut state = ProducerState::default();
        for i in 0..7 {
            let b = batch(1, 0, i * 10, 10, i64::from(i) * 10);
            assert_eq!(state.check(&b), Ok(Verdict::Append));
            state.apply(&b);
        }
        for i in 2..7 {
            let verdict = state.check(&batch(1, 0, i * 10, 10, -1)).unwrap();
            assert!(
                matches!(verdict, Verdict::Duplicate { base_offset, .. } if base_offset == i64::from(i) * 10)
            );
        }
        assert!(matches!(
            state.check(&batch(1, 0, 10, 10, -1)),
            Err(ProducerError::OutOfOrder { expected: 70, got: 10 })
        ));
    }

    #[test]
    fn gaps_old_epochs_and_late_starts_are_refused() {
        let mut state = ProducerState::default();
        state.apply(&batch(1, 3, 0, 5, 0));
        assert!(matches!(state.check(&batch(1, 3, 6, 1, -1)), Err(ProducerError::OutOfOrder { .. })));
        assert!(matches!(state.check(&batch(1, 2, 5, 1, -1)), Err(ProducerError::InvalidEpoch { .. })));
        assert!(matches!(
            state.check(&batch(1, 4, 5, 1, -1)),
            Err(ProducerError::OutOfOrder { expected: 0, .. })
        ));
        assert_eq!(state.check(&batch(1, 4, 0, 1, -1)), Ok(Verdict::Append));
        assert_eq!(
            state.check(&batch(2, 9, 77, 1, -1)),
            Ok(Verdict::Append),
            "an unknown producer starts anywhere"
        );
    }

    #[test]
    fn sequences_wrap_to_zero() {
        let mut state = ProducerState::default();
        state.apply(&batch(1, 0, i32::MAX - 1, 2, 0));
        assert_eq!(state.check(&batch(1, 0, 0, 1, -1)), Ok(Verdict::Append));
        let mut state = ProducerState::default();
        state.apply(&batch(1, 0, i32::MAX, 3, 0));
        assert_eq!(state.check(&batch(1, 0, 2, 1, -1)), Ok(Verdict::Append));
    }

    #[test]
    fn a_snapshot_comes_back_and_a_flipped_bit_does_not() {
        let mut state = ProducerState::default();
        for id in 0..20 {
            state.apply(&batch(id, 1, 0, 3, id * 3));
            state.apply(&batch(id, 1, 3, 3, 100 + id * 3));
        }
        let bytes = state.encode();
        assert_eq!(ProducerState::decode(&bytes), Some(state));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(ProducerState::decode(&bad), None, "byte {at}");
            assert_eq!(ProducerState::decode(&bytes[..at]), None);
        }
    }

    #[test]
    fn silent_producers_expire() {
        let mut state = ProducerState::default();
        state.apply(&batch(1, 0, 0, 1, 0));
        state.expire(1_000, 2_000);
        assert_eq!(state.len(), 1);
        state.expire(5_000, 2_000);
        assert!(state.is_empty());
    }
}
