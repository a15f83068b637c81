//! From log ranges to a block and dead letters: a pure function of batches, mapping and rules.
//!
//! Owns the order of rows (ranges in the plan's order, offsets rising within each) and the choice between row, dead
//! letter and skipped record. Runs on the export thread and yields to it between batches, for an encode of 16 MiB takes
//! tens of milliseconds. Invariants: the same batches, mapping and rules give the same bytes; a range that was cut
//! short says so in its `last`; what lies at or above `end` is not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use flumen_protocol::record::decode_records;
use flumen_protocol::record_batch;

use crate::block::{BlockBuilder, RowMeta};
use crate::mapping::{RowMapping, Source as ColumnSource};
use crate::plan::{MappingRecord, MappingRecordError, Range, Rejected};
use crate::source::DeadLetter;

/// A batch may grow to this when it is decompressed; a batch that would grow further becomes one dead letter. Part of
/// the encoder's rules: changing it changes blocks.
const MAX_DECOMPRESSED: usize = 256 << 20;
/// A plan's dead letters travel as one batch; a plan is closed when they reach this size.
const MAX_DEAD_LETTER_BYTES: usize = 768 << 10;
const MAX_DEAD_LETTERS: usize = 10_000;
/// A larger record stays where it is, and its dead letter says where: the log takes no batch that is larger than a part
/// of its own files, and a record may be that large only by decompression.
const MAX_DEAD_LETTER: usize = 8 << 20;

pub const BATCH_UNREADABLE: &str = "BATCH_UNREADABLE";
pub const REFUSED_BY_SERVER: &str = "REFUSED_BY_CLICKHOUSE";

/// A mapping as plans name it, ready for use.
#[derive(Debug)]
pub struct MappingInUse {
    pub record: MappingRecord,
    pub rows: RowMapping,
    pub insert_sql: String,
    pub has_topic: bool,
}

impl MappingInUse {
    pub fn new(record: MappingRecord) -> Result<Rc<MappingInUse>, MappingRecordError> {
        let rows = record.row_mapping()?;
        let insert_sql = format!(
            "INSERT INTO {}.{} ({}) FORMAT Native",
            crate::ddl::quote_ident(&record.database),
            crate::ddl::quote_ident(&record.table),
            rows.insert_columns()
        );
        let has_topic = rows.columns().iter().any(|c| c.source == ColumnSource::Topic);
        Ok(Rc::new(MappingInUse { record, rows, insert_sql, has_topic }))
    }
}

/// A record on its way to the dead letters; the plan's sequence is added when it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub partition: i32,
    pub offset: i64,
    pub code: String,
    pub column: Option<String>,
    pub message: String,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub timestamp_ms: i64,
}

impl Refused {
    fn bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.key.as_ref().map_or(0, Bytes::len)
            + self.value.as_ref().map_or(0, Bytes::len)
            + self.message.len()
            + headers
            + 200
    }

    /// Bounds what the dead letter takes; the record itself is found at its offset.
    fn bounded(mut self) -> Refused {
        let bytes = self.bytes();
        if bytes > MAX_DEAD_LETTER {
            let value = self.value.take().map_or(0, |v| v.len());
            self.key = self.key.take().filter(|key| key.len() <= MAX_DEAD_LETTER / 8);
            self.headers = vec![("ch.value.left.out".to_owned(), value.to_string().into_bytes())];
        }
        self
    }

    pub fn dead_letter(self, topic: &str, seq: u64) -> DeadLetter {
        let mut headers = self.headers;
        let mut put = |name: &str, value: String| headers.push((name.to_owned(), value.into_bytes()));
        put("ch.error.code", self.code);
        put("ch.error.message", self.message);
        put("ch.topic", topic.to_owned());
        put("ch.partition", self.partition.to_string());
        put("ch.offset", self.offset.to_string());
        put("ch.plan.seq", seq.to_string());
        if let Some(column) = self.column {
            put("ch.column", column);
        }
        DeadLetter { key: self.key, value: self.value, headers, timestamp_ms: self.timestamp_ms }
    }
}

/// What of one partition goes into the block.
#[derive(Clone, Debug)]
pub struct Input {
    pub partition: i32,
    pub first: i64,
    /// First offset that is not taken.
    pub end: i64,
    pub batches: Vec<Bytes>,
}

/// How a plan's records are told apart.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The parent of a split plan has written these already.
    pub without_found_dead_letters: bool,
    pub rejected: Vec<Rejected>,
    /// Rows that are in the table already (repair).
    pub without: Option<BTreeSet<(i32, i64)>>,
    /// Also list the rows' places (split).
    pub list_rows: bool,
}

/// Where a block that is still being planned ends.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub rows: usize,
    pub bytes: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// Only those that were begun, each with what was taken of it.
    pub ranges: Vec<Range>,
    pub block: Bytes,
    pub rows: u64,
    pub refused: Vec<Refused>,
    pub skipped: u64,
    pub raw_bytes: u64,
    pub row_places: Vec<(i32, i64)>,
}

impl Encoded {
    /// Offsets covered.
    pub fn offsets(&self) -> u64 {
        self.ranges.iter().map(|r| (r.last - r.first + 1).unsigned_abs()).sum()
    }
}

/// Keeps its memory from block to block.
pub struct Encoder {
    topic: String,
    pub mapping: Rc<MappingInUse>,
    builder: BlockBuilder,
    scratch: Vec<u8>,
}

impl Encoder {
    pub fn new(topic: &str, mapping: Rc<MappingInUse>) -> Encoder {
        Encoder {
            topic: topic.to_owned(),
            builder: BlockBuilder::new(&mapping.rows),
            scratch: Vec::new(),
            mapping,
        }
    }

    /// Encodes the inputs in their order. With limits, stops when one is reached; without, takes everything.
    pub async fn encode(&mut self, inputs: &[Input], rules: &Rules, limits: Option<Limits>) -> Encoded {
        self.builder.clear();
        let mut out = Encoded::default();
        let rejected: BTreeMap<(i32, i64), i32> =
            rules.rejected.iter().map(|r| ((r.partition, r.offset), r.ch_code)).collect();
        let mut refused_bytes = 0;
        for input in inputs {
            let rows_before = self.builder.rows();
            let mut next = input.first;
            let mut full = false;
            for batch in &input.batches {
                full = self.batch(
                    input,
                    batch,
                    &mut next,
                    rules,
                    &rejected,
                    limits,
                    &mut out,
                    &mut refused_bytes,
                );
                out.raw_bytes += batch.len() as u64;
                if full || next >= input.end {
                    break;
                }
                tokio::task::yield_now().await;
            }
            // A rebuilt range keeps its end even if its last offsets hold no record (any more).
            if limits.is_none() {
                next = input.end;
            }
            if next > input.first {
                out.ranges.push(Range {
                    partition: input.partition,
                    first: input.first,
                    last: next - 1,
                    rows: (self.builder.rows() - rows_before) as u64,
                });
            }
            if full {
                break;
            }
        }
        out.rows = self.builder.rows() as u64;
        if out.rows > 0 {
            out.block = self.builder.finish();
        }
        out
    }

    /// Takes what it may of one batch; true if the block is full.
    #[allow(clippy::too_many_arguments)]
    fn batch(
        &mut self,
        input: &Input,
        batch: &Bytes,
        next: &mut i64,
        rules: &Rules,
        rejected: &BTreeMap<(i32, i64), i32>,
        limits: Option<Limits>,
        out: &mut Encoded,
        refused_bytes: &mut usize,
    ) -> bool {
        let unreadable = |next: i64, reason: String| Refused {
            partition: input.partition,
            offset: next,
            code: BATCH_UNREADABLE.to_owned(),
            column: None,
            message: reason,
            key: None,
            value: Some(batch.clone()),
            headers: Vec::new(),
            timestamp_ms: record_batch::parse_header(batch).map_or(-1, |h| h.max_timestamp),
        };
        let header = match record_batch::parse(batch) {
            Ok(header) => header,
            Err(e) => {
                // Without a header there is no end to skip to; the log never hands such a batch out.
                if !rules.without_found_dead_letters {
                    out.refused.push(unreadable(*next, format!("the batch has no readable header: {e}")));
                }
                *next = next.saturating_add(1).min(input.end);
                return false;
            }
        };
        if header.last_offset() < *next || header.base_offset >= input.end {
            return false;
        }
        let batch_end = header.next_offset().min(input.end);
        if header.is_control() {
            *next = batch_end.max(*next);
            return false;
        }
        let records = match decode_records(batch, &mut self.scratch, MAX_DECOMPRESSED) {
            Ok(records) => records,
            Err(e) => {
                if !rules.without_found_dead_letters {
                    let refused = unreadable(*next, format!("the batch cannot be read: {e}"));
                    let refused = refused.bounded();
                    *refused_bytes += refused.bytes();
                    out.refused.push(refused);
                }
                *next = batch_end.max(*next);
                return false;
            }
        };
        let tombstones_to_dead_letters = self.mapping.record.tombstones_to_dead_letters;
        for record in records {
            let record = match record {
                Ok(record) => record,
                Err(e) => {
                    if !rules.without_found_dead_letters {
                        let message = format!("a record of the batch cannot be read: {e}");
                        let refused = unreadable(*next, message).bounded();
                        *refused_bytes += refused.bytes();
                        out.refused.push(refused);
                    }
                    break;
                }
            };
            if record.offset < *next {
                continue;
            }
            if record.offset >= input.end {
                break;
            }
            if let Some(limits) = limits {
                let full = self.builder.rows() >= limits.rows
                    || self.builder.bytes() >= limits.bytes
                    || out.refused.len() >= MAX_DEAD_LETTERS
                    || *refused_bytes >= MAX_DEAD_LETTER_BYTES;
                if full {
                    return true;
                }
            }
            *next = record.offset.saturating_add(1);
            let place = (input.partition, record.offset);
            if record.value.is_none() && !tombstones_to_dead_letters {
                out.skipped += 1;
                continue;
            }
            if rules.without.as_ref().is_some_and(|without| without.contains(&place)) {
                continue;
            }
            let outcome = match rejected.get(&place) {
                Some(code) => Err((
                    format!("{REFUSED_BY_SERVER}_{code}"),
                    None,
                    format!("ClickHouse refused the row with code {code}"),
                )),
                None => {
                    let meta = RowMeta {
                        topic: &self.topic,
                        partition: input.partition,
                        offset: record.offset,
                        timestamp_ms: record.timestamp,
                        key: record.key,
                    };
                    self.builder
                        .push_json(&meta, record.value)
                        .map_err(|e| (e.code.to_owned(), e.column, e.message))
                }
            };
            match outcome {
                Ok(()) if rules.list_rows => out.row_places.push(place),
                Ok(()) => {}
                Err(_) if rules.without_found_dead_letters && !rejected.contains_key(&place) => {}
                Err((code, column, message)) => {
                    let refused = Refused {
                        partition: input.partition,
                        offset: record.offset,
                        code,
                        column,
                        message,
                        key: record.key.map(Bytes::copy_from_slice),
                        value: record.value.map(Bytes::copy_from_slice),
                        headers: record
                            .headers
                            .map(|(name, value)| {
                                (String::from_utf8_lossy(name).into_owned(), value.unwrap_or(&[]).to_vec())
                            })
                            .collect(),
                        timestamp_ms: record.timestamp,
                    }
                    .bounded();
                    *refused_bytes += refused.bytes();
                    out.refused.push(refused);
                }
            }
        }
        *next = batch_end.max(*next);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_letters_are_bounded_and_say_what_they_left_out() {
        let refused = |key: usize, value: usize| Refused {
            partition: 3,
            offset: 7,
            code: "NOT_JSON".to_owned(),
            column: None,
            message: "no".to_owned(),
            key: Some(vec![1; key].into()),
            value: Some(vec![2; value].into()),
            headers: vec![("h".to_owned(), vec![3; 10])],
            timestamp_ms: 0,
        };
        let small = refused(10, 1000);
        assert_eq!(small.clone().bounded(), small);
        let large = refused(10, MAX_DEAD_LETTER).bounded();
        assert_eq!((large.key.as_ref().map(Bytes::len), large.value.is_none()), (Some(10), true));
        assert_eq!(
            large.headers,
            [("ch.value.left.out".to_owned(), MAX_DEAD_LETTER.to_string().into_bytes())]
        );
        assert!(refused(MAX_DEAD_LETTER, 5).bounded().bytes() < 1000);
    }
}
