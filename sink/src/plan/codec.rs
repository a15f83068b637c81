//! Bytes of the export's records.
//!
//! One record: format version (1 byte), kind (1 byte), fields. Unsigned numbers are LEB128 varints, signed ones
//! zigzag first, strings and lists carry their length. Integrity is the log's business (it checksums its batches); this
//! code only promises that no bytes panic it or make it allocate more than a small multiple of their number. Pure.

use bytes::Bytes;

use super::{ExportState, MappingColumn, MappingRecord, OpenPlan, Origin, Plan, Range, Record, Rejected};
use crate::mapping::{MAX_COLUMNS, TimeUnit};
use crate::table::DefaultKind;

/// Raised when a field is added or changes its meaning; older versions stay readable.
pub const FORMAT_VERSION: u8 = 1;

/// Longest text in a record: a type of an enum with thousands of names.
const MAX_TEXT: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("the record ends early")]
    Truncated,
    #[error("format version {0} is newer than this broker's ({FORMAT_VERSION})")]
    Version(u8),
    #[error("record kind {0} is not known")]
    Kind(u8),
    #[error("{0} is out of bounds")]
    Bounds(&'static str),
    #[error("bytes follow the record")]
    Trailing,
}

const OPENED: u8 = 1;
const STARTED: u8 = 2;
const MAPPED: u8 = 3;
const PRODUCER: u8 = 4;
const PLANNED: u8 = 5;
const DEAD_LETTERS_WRITTEN: u8 = 6;
const REPAIRING: u8 = 7;
const SPLIT: u8 = 8;
const SETTLED: u8 = 9;
const SNAPSHOT: u8 = 10;

pub fn encode(record: &Record) -> Bytes {
    let mut w = Writer { out: vec![FORMAT_VERSION] };
    match record {
        Record::Opened { topic_id, sink_epoch, start, look_until } => {
            w.byte(OPENED);
            w.out.extend_from_slice(topic_id);
            w.unsigned(u64::from(*sink_epoch));
            w.offsets(start.iter().copied());
            w.offsets(look_until.iter().copied());
        }
        Record::Started { partition, offset } => {
            w.byte(STARTED);
            w.signed(i64::from(*partition));
            w.signed(*offset);
        }
        Record::Mapped(mapping) => {
            w.byte(MAPPED);
            w.mapping(mapping);
        }
        Record::Producer { id } => {
            w.byte(PRODUCER);
            w.signed(*id);
        }
        Record::Planned(plan) => {
            w.byte(PLANNED);
            w.plan(plan);
        }
        Record::DeadLettersWritten { seq } => {
            w.byte(DEAD_LETTERS_WRITTEN);
            w.unsigned(*seq);
        }
        Record::Repairing { seq, n, block_crc } => {
            w.byte(REPAIRING);
            w.unsigned(*seq);
            w.unsigned(u64::from(*n));
            w.unsigned(u64::from(*block_crc));
        }
        Record::Split { seq, into } => {
            w.byte(SPLIT);
            w.unsigned(*seq);
            w.unsigned(into.len() as u64);
            into.iter().for_each(|plan| w.plan(plan));
        }
        Record::Settled { seq } => {
            w.byte(SETTLED);
            w.unsigned(*seq);
        }
        Record::Snapshot(state) => {
            w.byte(SNAPSHOT);
            w.state(state);
        }
    }
    Bytes::from(w.out)
}

/// Whether a record is a snapshot, from its head alone.
pub fn is_snapshot(bytes: &[u8]) -> bool {
    matches!(bytes, [FORMAT_VERSION, SNAPSHOT, ..])
}

pub fn decode(bytes: &[u8]) -> Result<Record, CodecError> {
    let mut r = Reader { rest: bytes };
    let version = r.byte()?;
    if version != FORMAT_VERSION {
        return Err(CodecError::Version(version));
    }
    let record = match r.byte()? {
        OPENED => Record::Opened {
            topic_id: r.uuid()?,
            sink_epoch: r.u32("sink epoch")?,
            start: r.offsets()?,
            look_until: r.offsets()?,
        },
        STARTED => Record::Started { partition: r.i32("partition")?, offset: r.signed()? },
        MAPPED => Record::Mapped(r.mapping()?),
        PRODUCER => Record::Producer { id: r.signed()? },
        PLANNED => Record::Planned(r.plan()?),
        DEAD_LETTERS_WRITTEN => Record::DeadLettersWritten { seq: r.unsigned()? },
        REPAIRING => {
            Record::Repairing { seq: r.unsigned()?, n: r.u32("repair")?, block_crc: r.u32("checksum")? }
        }
        SPLIT => {
            let seq = r.unsigned()?;
            let plans = r.count(super::MAX_OPEN_PLANS, 30, "plans")?;
            let into = (0..plans).map(|_| r.plan()).collect::<Result<_, _>>()?;
            Record::Split { seq, into }
        }
        SETTLED => Record::Settled { seq: r.unsigned()? },
        SNAPSHOT => Record::Snapshot(Box::new(r.state()?)),
        kind => return Err(CodecError::Kind(kind)),
    };
    if r.rest.is_empty() { Ok(record) } else { Err(CodecError::Trailing) }
}

struct Writer {
    out: Vec<u8>,
}

impl Writer {
    fn byte(&mut self, byte: u8) {
        self.out.push(byte);
    }

    fn unsigned(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.out.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    fn signed(&mut self, value: i64) {
        self.unsigned(((value << 1) ^ (value >> 63)) as u64);
    }

    fn text(&mut self, text: &str) {
        self.unsigned(text.len() as u64);
        self.out.extend_from_slice(text.as_bytes());
    }

    fn offsets(&mut self, offsets: impl ExactSizeIterator<Item = (i32, i64)>) {
        self.unsigned(offsets.len() as u64);
        for (partition, offset) in offsets {
            self.signed(i64::from(partition));
            self.signed(offset);
        }
    }

    fn plan(&mut self, plan: &Plan) {
        self.out.extend_from_slice(&plan.topic_id);
        self.unsigned(u64::from(plan.sink_epoch));
        self.unsigned(plan.seq);
        self.unsigned(plan.ranges.len() as u64);
        for range in &plan.ranges {
            self.signed(i64::from(range.partition));
            self.signed(range.first);
            self.signed(range.last);
            self.unsigned(range.rows);
        }
        self.unsigned(plan.rows);
        self.unsigned(u64::from(plan.dead_letters));
        self.unsigned(plan.skipped);
        self.signed(i64::from(plan.dlq_first_sequence));
        self.unsigned(u64::from(plan.mapping_version));
        self.unsigned(u64::from(plan.encoder_version));
        self.unsigned(u64::from(plan.block_crc));
        self.unsigned(plan.block_bytes);
        match plan.origin {
            Origin::Log => self.byte(0),
            Origin::Split { parent } => {
                self.byte(1);
                self.unsigned(parent);
            }
        }
        self.unsigned(plan.rejected.len() as u64);
        for rejected in &plan.rejected {
            self.signed(i64::from(rejected.partition));
            self.signed(rejected.offset);
            self.signed(i64::from(rejected.ch_code));
        }
        self.signed(plan.server_started_s);
        self.byte(u8::from(plan.look_first));
    }

    fn mapping(&mut self, mapping: &MappingRecord) {
        self.unsigned(u64::from(mapping.version));
        self.text(&mapping.database);
        self.text(&mapping.table);
        self.unsigned(mapping.columns.len() as u64);
        for column in &mapping.columns {
            self.text(&column.name);
            self.text(&column.ty);
            self.byte(match column.default_kind {
                DefaultKind::None => 0,
                DefaultKind::Default => 1,
                DefaultKind::Materialized => 2,
                DefaultKind::Alias => 3,
                DefaultKind::Ephemeral => 4,
            });
        }
        self.unsigned(mapping.server_default_columns.len() as u64);
        mapping.server_default_columns.iter().for_each(|name| self.text(name));
        self.byte(u8::from(mapping.unknown_to_dead_letters));
        self.byte(u8::from(mapping.json_text_in_strings));
        self.byte(u8::from(mapping.truncate_time_fraction));
        self.byte(TimeUnit::ALL.iter().position(|unit| *unit == mapping.time_unit).unwrap_or(0) as u8);
        self.byte(u8::from(mapping.tombstones_to_dead_letters));
    }

    fn state(&mut self, state: &ExportState) {
        self.out.extend_from_slice(&state.topic_id);
        self.unsigned(u64::from(state.sink_epoch));
        self.unsigned(state.next_seq);
        self.offsets(state.planned.iter().map(|(p, o)| (*p, *o)));
        self.offsets(state.look_until.iter().map(|(p, o)| (*p, *o)));
        self.unsigned(state.open.len() as u64);
        for open in state.open.values() {
            self.plan(&open.plan);
            self.byte(u8::from(open.dead_letters_written));
            self.unsigned(u64::from(open.repairs));
            self.unsigned(u64::from(open.repair_crc));
        }
        self.signed(state.producer_id.unwrap_or(-1));
        self.signed(i64::from(state.dlq_next_sequence));
        self.unsigned(state.mappings.len() as u64);
        state.mappings.values().for_each(|mapping| self.mapping(mapping));
        self.byte(u8::from(state.mapping_version.is_some()));
        self.unsigned(u64::from(state.mapping_version.unwrap_or(0)));
        self.unsigned(state.rows);
        self.unsigned(state.dead_letters);
        self.unsigned(state.skipped);
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, CodecError> {
        let (&byte, rest) = self.rest.split_first().ok_or(CodecError::Truncated)?;
        self.rest = rest;
        Ok(byte)
    }

    fn flag(&mut self) -> Result<bool, CodecError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(CodecError::Bounds("flag")),
        }
    }

    fn uuid(&mut self) -> Result<[u8; 16], CodecError> {
        let (id, rest) = self.rest.split_first_chunk::<16>().ok_or(CodecError::Truncated)?;
        self.rest = rest;
        Ok(*id)
    }

    fn unsigned(&mut self) -> Result<u64, CodecError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                return Err(CodecError::Bounds("number"));
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(CodecError::Bounds("number"))
    }

    fn signed(&mut self) -> Result<i64, CodecError> {
        let value = self.unsigned()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, CodecError> {
        u32::try_from(self.unsigned()?).map_err(|_| CodecError::Bounds(what))
    }

    fn i32(&mut self, what: &'static str) -> Result<i32, CodecError> {
        i32::try_from(self.signed()?).map_err(|_| CodecError::Bounds(what))
    }

    /// A list's length: at most `max`, and no more than the bytes left can hold at `min_bytes` each.
    fn count(&mut self, max: usize, min_bytes: usize, what: &'static str) -> Result<usize, CodecError> {
        let count = usize::try_from(self.unsigned()?).map_err(|_| CodecError::Bounds(what))?;
        if count > max {
            return Err(CodecError::Bounds(what));
        }
        if count > self.rest.len() / min_bytes {
            return Err(CodecError::Truncated);
        }
        Ok(count)
    }

    fn text(&mut self) -> Result<String, CodecError> {
        let length = self.count(MAX_TEXT, 1, "text")?;
        let (text, rest) = self.rest.split_at_checked(length).ok_or(CodecError::Truncated)?;
        self.rest = rest;
        String::from_utf8(text.to_vec()).map_err(|_| CodecError::Bounds("text"))
    }

    fn offsets(&mut self) -> Result<Vec<(i32, i64)>, CodecError> {
        let count = self.count(super::MAX_RANGES, 2, "partitions")?;
        (0..count).map(|_| Ok((self.i32("partition")?, self.signed()?))).collect()
    }

    fn plan(&mut self) -> Result<Plan, CodecError> {
        let topic_id = self.uuid()?;
        let sink_epoch = self.u32("sink epoch")?;
        let seq = self.unsigned()?;
        let count = self.count(super::MAX_RANGES, 4, "ranges")?;
        let ranges = (0..count)
            .map(|_| {
                Ok(Range {
                    partition: self.i32("partition")?,
                    first: self.signed()?,
                    last: self.signed()?,
                    rows: self.unsigned()?,
                })
            })
            .collect::<Result<_, CodecError>>()?;
        let rows = self.unsigned()?;
        let dead_letters = self.u32("dead letters")?;
        let skipped = self.unsigned()?;
        let dlq_first_sequence = self.i32("dead-letter sequence")?;
        let mapping_version = self.u32("mapping version")?;
        let encoder_version = self.u32("encoder version")?;
        let block_crc = self.u32("checksum")?;
        let block_bytes = self.unsigned()?;
        let origin = match self.byte()? {
            0 => Origin::Log,
            1 => Origin::Split { parent: self.unsigned()? },
            _ => return Err(CodecError::Bounds("origin")),
        };
        let count = self.count(super::MAX_REJECTED_ROWS, 3, "rejected rows")?;
        let rejected = (0..count)
            .map(|_| {
                Ok(Rejected {
                    partition: self.i32("partition")?,
                    offset: self.signed()?,
                    ch_code: self.i32("code")?,
                })
            })
            .collect::<Result<_, CodecError>>()?;
        Ok(Plan {
            topic_id,
            sink_epoch,
            seq,
            ranges,
            rows,
            dead_letters,
            skipped,
            dlq_first_sequence,
            mapping_version,
            encoder_version,
            block_crc,
            block_bytes,
            origin,
            rejected,
            server_started_s: self.signed()?,
            look_first: self.flag()?,
        })
    }

    fn mapping(&mut self) -> Result<MappingRecord, CodecError> {
        let version = self.u32("mapping version")?;
        let (database, table) = (self.text()?, self.text()?);
        let count = self.count(MAX_COLUMNS, 3, "columns")?;
        let columns = (0..count)
            .map(|_| {
                Ok(MappingColumn {
                    name: self.text()?,
                    ty: self.text()?,
                    default_kind: match self.byte()? {
                        0 => DefaultKind::None,
                        1 => DefaultKind::Default,
                        2 => DefaultKind::Materialized,
                        3 => DefaultKind::Alias,
                        4 => DefaultKind::Ephemeral,
                        _ => return Err(CodecError::Bounds("default kind")),
                    },
                })
            })
            .collect::<Result<_, CodecError>>()?;
        let count = self.count(MAX_COLUMNS, 1, "columns")?;
        let server_default_columns = (0..count).map(|_| self.text()).collect::<Result<_, _>>()?;
        Ok(MappingRecord {
            version,
            database,
            table,
            columns,
            server_default_columns,
            unknown_to_dead_letters: self.flag()?,
            json_text_in_strings: self.flag()?,
            truncate_time_fraction: self.flag()?,
            time_unit: *TimeUnit::ALL
                .get(usize::from(self.byte()?))
                .ok_or(CodecError::Bounds("time unit"))?,
            tombstones_to_dead_letters: self.flag()?,
        })
    }

    fn state(&mut self) -> Result<ExportState, CodecError> {
        let topic_id = self.uuid()?;
        let sink_epoch = self.u32("sink epoch")?;
        let next_seq = self.unsigned()?;
        let planned = self.offsets()?.into_iter().collect();
        let look_until = self.offsets()?.into_iter().collect();
        // Splitting takes more plans than are ever started at once.
        let count = self.count(super::MAX_OPEN_PLANS * 100, 30, "open plans")?;
        let open = (0..count)
            .map(|_| {
                let plan = self.plan()?;
                let dead_letters_written = self.flag()?;
                let repairs = self.u32("repairs")?;
                let repair_crc = self.u32("checksum")?;
                Ok((plan.seq, OpenPlan { plan, dead_letters_written, repairs, repair_crc }))
            })
            .collect::<Result<_, CodecError>>()?;
        let producer_id = Some(self.signed()?).filter(|id| *id >= 0);
        let dlq_next_sequence = self.i32("dead-letter sequence")?;
        let count = self.count(super::MAX_OPEN_PLANS * 100, 8, "mappings")?;
        let mappings = (0..count)
            .map(|_| self.mapping().map(|mapping| (mapping.version, mapping)))
            .collect::<Result<_, _>>()?;
        let has_mapping = self.flag()?;
        let mapping_version = Some(self.u32("mapping version")?).filter(|_| has_mapping);
        Ok(ExportState {
            topic_id,
            sink_epoch,
            next_seq,
            planned,
            look_until,
            open,
            producer_id,
            dlq_next_sequence,
            mappings,
            mapping_version,
            rows: self.unsigned()?,
            dead_letters: self.unsigned()?,
            skipped: self.unsigned()?,
            records_since_snapshot: 0,
        })
    }
}
