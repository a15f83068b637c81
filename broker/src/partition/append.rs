//! Admission to the log: check, give offsets, propose. Nothing here waits.
//!
//! An append is rejected (an error: nothing happened) or accepted; accepted is not yet durable, the
//! completion says when it is. If the process dies in between, the outcome is unknown to the client,
//! and an idempotent producer's retry finds out.

use bytes::BytesMut;

use flumen_metadata::TimestampType;
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::produce::RecordError as RecordRefusal;
use flumen_protocol::record::{self, Record, RecordError};
use flumen_protocol::record_batch::{self, BatchError, BatchHeader};
use flumen_raft::ProposeError;
use flumen_storage::{ProducerError, Verdict};

use super::turned_away::{HOLD_MS, Place, comes_after};
use super::{Completion, Partition};
use crate::mutant::{self, Mutant};

/// Decompressed bytes looked at when single records are checked (keys of compacted topics, timestamps that are out of
/// bounds); a larger batch is refused.
const DECODED_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Client,
    /// The broker's own records: no size limit of the topic, any batch attributes.
    Broker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub base_offset: i64,
    pub last_offset: i64,
    /// -1 unless the topic stamps records itself.
    pub log_append_time_ms: i64,
    pub log_start_offset: i64,
    pub duplicate: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    #[error("{0}")]
    Batch(#[from] BatchError),
    #[error("the batch of {size} bytes is larger than the {max} that max.message.bytes or the log allows")]
    TooLarge { size: usize, max: usize },
    #[error("one or more records have a timestamp outside the limits of the topic")]
    Timestamp { records: Box<[i32]> },
    #[error("{} records without a key, which a compacted topic does not take", .records.len())]
    KeyMissing { records: Box<[i32]> },
    #[error("{0}")]
    Producer(#[from] ProducerError),
    #[error("the log has no room: the disk is full, or does not keep up")]
    NoSpace,
    #[error("the log of this partition is damaged: {0}")]
    Damaged(String),
    #[error("this node does not lead the partition")]
    NotLeader,
    #[error("a batch of this producer that comes before was turned away, and has not come again")]
    Behind(ErrorCode),
}

impl AppendError {
    pub fn code(&self) -> ErrorCode {
        match self {
            AppendError::Batch(e) => e.code(),
            AppendError::TooLarge { .. } => ErrorCode::MESSAGE_TOO_LARGE,
            AppendError::Timestamp { .. } => ErrorCode::INVALID_TIMESTAMP,
            AppendError::KeyMissing { .. } => ErrorCode::INVALID_RECORD,
            AppendError::Producer(ProducerError::InvalidEpoch { .. }) => ErrorCode::INVALID_PRODUCER_EPOCH,
            AppendError::Producer(_) => ErrorCode::OUT_OF_ORDER_SEQUENCE_NUMBER,
            AppendError::NoSpace | AppendError::Damaged(_) => ErrorCode::KAFKA_STORAGE_ERROR,
            AppendError::NotLeader => ErrorCode::NOT_LEADER_OR_FOLLOWER,
            AppendError::Behind(code) => *code,
        }
    }

    /// The same batch may be taken later; clients send it again.
    fn is_for_now(&self) -> bool {
        matches!(
            self,
            AppendError::NoSpace | AppendError::NotLeader | AppendError::Damaged(_) | AppendError::Behind(_)
        )
    }

    /// Whether the answer says where the log starts: Kafka tells it with errors that its log found, not with those of
    /// framing, size, damage or leadership.
    pub fn tells_log_start(&self) -> bool {
        let framing = matches!(
            self,
            AppendError::Batch(
                BatchError::Truncated { .. }
                    | BatchError::TrailingBytes(_)
                    | BatchError::Empty
                    | BatchError::BadMagic(_)
            )
        );
        !framing
            && !matches!(
                self.code(),
                ErrorCode::MESSAGE_TOO_LARGE
                    | ErrorCode::CORRUPT_MESSAGE
                    | ErrorCode::KAFKA_STORAGE_ERROR
                    | ErrorCode::NOT_LEADER_OR_FOLLOWER
            )
    }

    /// Which records are to blame, where not the whole batch is.
    pub fn record_errors(&self) -> Box<[RecordRefusal]> {
        let (records, message) = match self {
            AppendError::Timestamp { records } => {
                (records, "the timestamp is outside the limits of the topic")
            }
            AppendError::KeyMissing { records } => {
                (records, "a compacted topic takes no record without a key")
            }
            _ => return Box::default(),
        };
        records.iter().map(|batch_index| RecordRefusal { batch_index: *batch_index, message }).collect()
    }
}

impl Partition {
    /// Appends one record batch. On success `completion` runs when the records are durable and
    /// committed; on error it is dropped and nothing was written.
    pub fn append(
        &self,
        records: BytesMut,
        origin: Origin,
        now_ms: i64,
        completion: Option<Completion>,
    ) -> Result<Appended, (AppendError, Option<Completion>)> {
        let checked =
            self.await_turn(&records, origin, now_ms).and_then(|()| self.admit(&records, origin, now_ms));
        let (header, known) = match checked {
            Ok(checked) => checked,
            Err(error) => {
                let place = if origin == Origin::Client { Place::of(&records) } else { None };
                return Err((self.turn_away(place, error), completion));
            }
        };
        let place = if origin == Origin::Client { Place::of_header(&header) } else { None };
        let outcome = self.append_admitted(records, (header, known), now_ms, completion, place);
        match outcome {
            Ok(appended) => {
                if let Some(place) = place {
                    self.turned_away.borrow_mut().took(place);
                }
                Ok(appended)
            }
            Err((error, completion)) => Err((self.turn_away(place, error), completion)),
        }
    }

    /// Whether the batch is behind one that was turned away and has not come again.
    fn await_turn(&self, records: &[u8], origin: Origin, now_ms: i64) -> Result<(), AppendError> {
        if origin != Origin::Client || self.turned_away.borrow().is_empty() {
            return Ok(());
        }
        let Some(place) = Place::of(records) else { return Ok(()) };
        let stored = |producer_id| self.log.producers().producer(producer_id);
        match self.turned_away.borrow_mut().must_hear(place, now_ms, stored) {
            Some(code) => Err(AppendError::Behind(code)),
            None => Ok(()),
        }
    }

    /// The batch in this place hears the error. If it comes again, what is behind it waits for it.
    fn turn_away(&self, place: Option<Place>, error: AppendError) -> AppendError {
        if let Some(place) = place
            && error.is_for_now()
        {
            self.turned_away.borrow_mut().note(place, error.code());
        }
        error
    }

    fn append_admitted(
        &self,
        mut records: BytesMut,
        (header, known): (BatchHeader, Option<Known>),
        now_ms: i64,
        completion: Option<Completion>,
        place: Option<Place>,
    ) -> Result<Appended, (AppendError, Option<Completion>)> {
        if let Some(Known { base_offset, log_append_time_ms }) = known {
            let last_offset = base_offset + i64::from(header.last_offset_delta);
            if let Some(completion) = completion {
                let need = if mutant::is(Mutant::AnswersDuplicatesAtOnce) { 0 } else { last_offset + 1 };
                self.wait_for_offset(need, completion, place);
            }
            return Ok(Appended {
                base_offset,
                last_offset,
                log_append_time_ms,
                log_start_offset: self.log_start_offset(),
                duplicate: true,
            });
        }
        let stamp = self.config.borrow().timestamp_type == TimestampType::LogAppendTime;
        if stamp {
            record_batch::set_log_append_time(&mut records, now_ms);
        }
        let base_offset;
        let last_offset;
        {
            let mut state = self.state.borrow_mut();
            base_offset = state.next_offset;
            last_offset = base_offset + i64::from(header.last_offset_delta);
            record_batch::set_base_offset(&mut records, base_offset);
            record_batch::set_leader_epoch(&mut records, state.raft.leader_epoch());
            let index = match state.raft.propose(records.freeze()) {
                Ok((index, _term)) => index,
                // The other replicas do not keep up: as when the log does not.
                Err(ProposeError::Backlogged) => return Err((AppendError::NoSpace, completion)),
                Err(_) => return Err((AppendError::NotLeader, completion)),
            };
            // Only an accepted proposal moves the log end offset.
            state.next_offset = last_offset + 1;
            // In a group of several, `advance` finds it among what it stores.
            if self.alone.get() {
                state.uncommitted.push_back((index, last_offset + 1));
            }
        }
        let here = match completion {
            Some(Completion::ProduceHere(request, slot)) if !self.alone.get() => Some((request, slot)),
            Some(Completion::Produce(request, slot))
                if !self.alone.get() && mutant::is(Mutant::AcknowledgesBeforeMajority) =>
            {
                Some((request, slot))
            }
            Some(completion) => {
                self.wait_for_offset(last_offset + 1, completion, place);
                None
            }
            None => None,
        };
        self.advance();
        if let Some((request, slot)) = here {
            self.wait_until_stored(Completion::ProduceHere(request, slot), place);
        }
        if !self.alone.get() {
            self.stay_awake();
        }
        Ok(Appended {
            base_offset,
            last_offset,
            log_append_time_ms: if stamp { now_ms } else { -1 },
            log_start_offset: self.log_start_offset(),
            duplicate: false,
        })
    }

    /// Whether the log takes no more until some of what it has moved to segments.
    pub fn must_wait(&self, total: usize, largest: usize, count: usize) -> bool {
        self.log.must_wait(total, largest, count)
    }

    fn admit(
        &self,
        records: &[u8],
        origin: Origin,
        now_ms: i64,
    ) -> Result<(BatchHeader, Option<Known>), AppendError> {
        if let Some(reason) = self.damage() {
            return Err(AppendError::Damaged(reason.to_string()));
        }
        // A new leader takes clients' batches before it may serve: its log knows what it has of them, and answers wait for its
        // first commit. Were some of a producer's batches refused until then and the next one not, the producer would take
        // the gap for lost batches, and send again, under another epoch, what was stored.
        let leads = self.serves.get() || (origin == Origin::Client && self.leads.get());
        if !self.alone.get() && !leads {
            return Err(AppendError::NotLeader);
        }
        let header = match origin {
            Origin::Client => record_batch::validate_produced(records)?,
            Origin::Broker => record_batch::parse(records)?,
        };
        if origin == Origin::Client {
            let config = self.config.borrow();
            let max = usize::try_from(config.max_message_bytes).unwrap_or(usize::MAX);
            let max = max.min(self.log.entry_bytes_max());
            if records.len() > max {
                return Err(AppendError::TooLarge { size: records.len(), max });
            }
            if config.timestamp_type == TimestampType::CreateTime {
                let early = now_ms.saturating_sub(config.timestamp_before_max_ms);
                let late = now_ms.saturating_add(config.timestamp_after_max_ms);
                let timestamp = header.max_timestamp;
                let out_of_bounds = timestamp > late || header.base_timestamp < early;
                // The header tells the largest timestamp but not the smallest, so a topic with a limit below has its
                // records looked at. -1 means that the producer gave none.
                let limited_below = config.timestamp_before_max_ms != i64::MAX;
                if timestamp != -1 && (out_of_bounds || limited_below) {
                    let records = indexes_of(records, |record| {
                        record.timestamp != -1 && !(early..=late).contains(&record.timestamp)
                    })?;
                    if out_of_bounds || !records.is_empty() {
                        return Err(AppendError::Timestamp { records });
                    }
                }
            }
            if config.compacts() {
                let records = indexes_of(records, |record| record.key.is_none())?;
                if !records.is_empty() {
                    return Err(AppendError::KeyMissing { records });
                }
            }
        }
        let verdict = match header.has_producer_id() {
            true => self.log.producers().check(&header),
            false => Ok(Verdict::Append),
        };
        if let Err(ProducerError::OutOfOrder { expected, got, .. }) = verdict
            && comes_after(got, expected)
            && self.is_new_leader(now_ms)
        {
            return Err(AppendError::Behind(ErrorCode::NOT_LEADER_OR_FOLLOWER));
        }
        if let Verdict::Duplicate { base_offset, timestamp } = verdict? {
            let stamped = self.config.borrow().timestamp_type == TimestampType::LogAppendTime;
            let log_append_time_ms = if stamped { timestamp } else { -1 };
            return Ok((header, Some(Known { base_offset, log_append_time_ms })));
        }
        let turned_away = origin == Origin::Client && self.disk.is_low();
        if turned_away || !self.log.has_room(records.len()) {
            return Err(AppendError::NoSpace);
        }
        Ok((header, None))
    }

    /// What comes before a gap may have been refused by the leader of before, and be on its way here.
    fn is_new_leader(&self, now_ms: i64) -> bool {
        if self.alone.get() {
            return false;
        }
        let epoch = self.leader_epoch();
        if self.first_gap.get().0 != epoch {
            self.first_gap.set((epoch, now_ms));
        }
        (0..HOLD_MS).contains(&now_ms.saturating_sub(self.first_gap.get().1))
    }
}

/// A batch that the log has already.
struct Known {
    base_offset: i64,
    log_append_time_ms: i64,
}

/// Places in the batch of the records that are `wrong`.
fn indexes_of(batch: &[u8], wrong: impl Fn(&Record<'_>) -> bool) -> Result<Box<[i32]>, AppendError> {
    let mut scratch = Vec::new();
    let records =
        record::decode_records(batch, &mut scratch, DECODED_BYTES_MAX).map_err(|e| unreadable(e, 0))?;
    let mut indexes = Vec::new();
    for (index, record) in (0..).zip(records) {
        if wrong(&record.map_err(|e| unreadable(e, index))?) {
            indexes.push(index);
        }
    }
    Ok(indexes.into())
}

/// What is said of a batch whose records had to be read and could not be.
fn unreadable(error: RecordError, index: i32) -> AppendError {
    AppendError::Batch(match error {
        RecordError::Batch(error) => error,
        RecordError::Malformed => BatchError::BadRecord { index },
        RecordError::TrailingBytes(bytes) => BatchError::BytesAfterRecords(bytes),
        // It came with a right checksum, but to a producer it is damage all the same.
        RecordError::Compression(_) => BatchError::BadCrc,
    })
}
