//! What an export has promised and done, as a log of records, and the state that replaying them gives.
//!
//! Owns the records, their meaning and the decisions that follow from state alone; pure, any thread. Invariants: a plan
//! is recorded before a byte of it is sent; open plans of one partition never overlap; the settled offset of a
//! partition is the first offset of its oldest open plan, or where planning goes on if there is none, and it never
//! falls within an epoch; dead-letter sequences are handed out once. It does not read logs, build blocks or talk to a
//! server; how a single plan gets into the table is `settle`.

pub mod codec;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::column_type::ColumnType;
use crate::mapping::{MappingError, MappingOptions, RowMapping, TimeUnit, UnknownFields};
use crate::table::{Column, DefaultKind, TableSchema};

/// Partitions in one plan. Kafka clusters stop at some thousands of partitions per topic.
pub const MAX_RANGES: usize = 10_000;
/// Plans that may be open at once. Kept at five, for the dead-letter producer may repeat its last five batches.
pub const MAX_OPEN_PLANS: usize = 5;
/// A replaced plan is cut in two at a time; this many rows refused by the server in one plan mean that the table is
/// wrong, not the rows.
pub const MAX_REJECTED_ROWS: usize = 100;
/// Records between two snapshots: replay reads at most about this many.
pub const SNAPSHOT_EVERY: u64 = 1000;

/// Offsets of one partition, both ends included. Offsets without a record (compaction, markers) may lie inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub partition: i32,
    pub first: i64,
    pub last: i64,
    /// Rows of the block that come from this range.
    pub rows: u64,
}

/// A record that the server refused and that goes to the dead letters in the plan's next shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected {
    pub partition: i32,
    pub offset: i64,
    /// ClickHouse's exception code.
    pub ch_code: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Planned from the log. Its dead letters are all records that do not fit.
    Log,
    /// Replaces a part of this plan, which the server refused as a whole. The parent has already written the dead
    /// letters that the encoder found; this plan writes only those in `rejected`.
    Split { parent: u64 },
}

/// One insert, before it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub topic_id: [u8; 16],
    pub sink_epoch: u32,
    pub seq: u64,
    /// In the order in which their rows stand in the block.
    pub ranges: Vec<Range>,
    pub rows: u64,
    pub dead_letters: u32,
    /// Records passed over by configuration (tombstones).
    pub skipped: u64,
    pub dlq_first_sequence: i32,
    pub mapping_version: u32,
    pub encoder_version: u32,
    pub block_crc: u32,
    pub block_bytes: u64,
    pub origin: Origin,
    pub rejected: Vec<Rejected>,
    /// When the server that this plan is first sent to was started (its clock, seconds since 1970); 0 if not known.
    pub server_started_s: i64,
    /// Rows of these offsets may be in the table from before (replay): look before the first insert.
    pub look_first: bool,
}

impl Plan {
    /// The deduplication token of the plan's first attempt and of every resend of the same bytes.
    pub fn token(&self, cluster_id: &str) -> String {
        let (partition, first, last) =
            self.ranges.first().map_or((0, 0, 0), |r| (r.partition, r.first, r.last));
        let topic = self.topic_token(cluster_id);
        format!("{topic}{}/{}:{partition}:{first}-{last}", self.sink_epoch, self.seq)
    }

    /// What the tokens of all plans of the topic begin with, in every epoch.
    pub fn topic_token(&self, cluster_id: &str) -> String {
        format!("{cluster_id}/{}/", uuid::Uuid::from_bytes(self.topic_id))
    }

    /// The token of the n-th insert of only the missing rows.
    pub fn repair_token(&self, cluster_id: &str, n: u32) -> String {
        format!("{}~r{n}", self.token(cluster_id))
    }
}

/// Everything that decides bytes besides the log: kept so that an open plan can be encoded again after the table, the
/// configuration or the broker changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingRecord {
    pub version: u32,
    pub database: String,
    pub table: String,
    pub columns: Vec<MappingColumn>,
    pub server_default_columns: Vec<String>,
    pub unknown_to_dead_letters: bool,
    pub json_text_in_strings: bool,
    pub truncate_time_fraction: bool,
    pub time_unit: TimeUnit,
    pub tombstones_to_dead_letters: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingColumn {
    pub name: String,
    /// As `system.columns` spells it.
    pub ty: String,
    pub default_kind: DefaultKind,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingRecordError {
    #[error("recorded column {column}: {reason}")]
    Type { column: String, reason: String },
    #[error(transparent)]
    Mapping(#[from] MappingError),
}

impl MappingRecord {
    pub fn new(
        table: &TableSchema,
        options: &MappingOptions,
        tombstones_to_dead_letters: bool,
    ) -> Result<(MappingRecord, RowMapping), MappingError> {
        let mapping = RowMapping::new(table, options)?;
        let mut record = MappingRecord {
            version: 0,
            database: table.database.clone(),
            table: table.table.clone(),
            columns: table
                .columns
                .iter()
                .map(|c| MappingColumn {
                    name: c.name.clone(),
                    ty: c.ty.to_string(),
                    default_kind: c.default_kind,
                })
                .collect(),
            server_default_columns: options.server_default_columns.clone(),
            unknown_to_dead_letters: options.unknown_fields == UnknownFields::DeadLetter,
            json_text_in_strings: options.json_text_in_strings,
            truncate_time_fraction: options.truncate_time_fraction,
            time_unit: options.time_unit,
            tombstones_to_dead_letters,
        };
        // The record without its version names exactly what the bytes depend on.
        record.version = crc32c::crc32c(&codec::encode(&Record::Mapped(record.clone())));
        Ok((record, mapping))
    }

    pub fn row_mapping(&self) -> Result<RowMapping, MappingRecordError> {
        let columns = self
            .columns
            .iter()
            .map(|c| {
                let ty = ColumnType::parse(&c.ty).map_err(|e| MappingRecordError::Type {
                    column: c.name.clone(),
                    reason: e.to_string(),
                })?;
                Ok(Column { name: c.name.clone(), ty, default_kind: c.default_kind })
            })
            .collect::<Result<Vec<_>, MappingRecordError>>()?;
        let table = TableSchema {
            database: self.database.clone(),
            table: self.table.clone(),
            engine: String::new(),
            columns,
        };
        let options = MappingOptions {
            unknown_fields: if self.unknown_to_dead_letters {
                UnknownFields::DeadLetter
            } else {
                UnknownFields::Ignore
            },
            server_default_columns: self.server_default_columns.clone(),
            json_text_in_strings: self.json_text_in_strings,
            truncate_time_fraction: self.truncate_time_fraction,
            time_unit: self.time_unit,
        };
        Ok(RowMapping::new(&table, &options)?)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A new epoch: the first start, or a replay. Planning goes on at `start`; offsets below `look_until` may already
    /// be in the table and are looked up before they are inserted.
    Opened {
        topic_id: [u8; 16],
        sink_epoch: u32,
        start: Vec<(i32, i64)>,
        look_until: Vec<(i32, i64)>,
    },
    /// A partition that appeared after the export was opened.
    Started {
        partition: i32,
        offset: i64,
    },
    /// The mapping of plans recorded from here on.
    Mapped(MappingRecord),
    /// The dead-letter producer.
    Producer {
        id: i64,
    },
    Planned(Plan),
    DeadLettersWritten {
        seq: u64,
    },
    /// The n-th insert of missing rows, a block with this checksum, is about to be sent. Its token stands for these
    /// rows alone.
    Repairing {
        seq: u64,
        n: u32,
        block_crc: u32,
    },
    /// `seq` is replaced by these plans, which cover the same offsets.
    Split {
        seq: u64,
        into: Vec<Plan>,
    },
    Settled {
        seq: u64,
    },
    Snapshot(Box<ExportState>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenPlan {
    pub plan: Plan,
    pub dead_letters_written: bool,
    /// Number of the last insert of missing rows, and its block's checksum.
    pub repairs: u32,
    pub repair_crc: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportState {
    pub topic_id: [u8; 16],
    /// 0 until the export was opened for the first time.
    pub sink_epoch: u32,
    pub next_seq: u64,
    /// Where planning goes on.
    pub planned: BTreeMap<i32, i64>,
    pub look_until: BTreeMap<i32, i64>,
    pub open: BTreeMap<u64, OpenPlan>,
    pub producer_id: Option<i64>,
    pub dlq_next_sequence: i32,
    /// The current mapping and those that open plans need.
    pub mappings: BTreeMap<u32, MappingRecord>,
    pub mapping_version: Option<u32>,
    pub rows: u64,
    pub dead_letters: u64,
    pub skipped: u64,
    pub records_since_snapshot: u64,
}

/// A record that does not follow from the state: the state log is damaged or belongs to something else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("record {at}: {reason}")]
    Record { at: usize, reason: codec::CodecError },
    #[error("{what} for plan {seq}, which is not open")]
    NotOpen { what: &'static str, seq: u64 },
    #[error("plan {seq} recorded where {expected} is next")]
    Sequence { seq: u64, expected: u64 },
    #[error("plan {seq} takes offset {first} of partition {partition} where {expected} is next")]
    Gap { seq: u64, partition: i32, first: i64, expected: i64 },
    #[error("plan {seq} names mapping {version:08x}, which was not recorded")]
    Mapping { seq: u64, version: u32 },
    #[error("plan {seq} belongs to epoch {epoch}, the export is in {expected}")]
    Epoch { seq: u64, epoch: u32, expected: u32 },
    #[error("plan {seq} is malformed: {reason}")]
    Malformed { seq: u64, reason: &'static str },
}

/// Sequences run from 0 to `i32::MAX` and start over, as Kafka's do.
pub fn add_sequence(sequence: i32, records: u32) -> i32 {
    ((i64::from(sequence) + i64::from(records)) & i64::from(i32::MAX)) as i32
}

impl ExportState {
    /// The state after all these records. A snapshot stands for everything before it, and the log may begin in the
    /// middle of that, so replay starts at the last one; without one the records start at the beginning.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a [u8]>) -> Result<ExportState, StateError> {
        let records: Vec<&[u8]> = records.into_iter().collect();
        let from = records.iter().rposition(|bytes| codec::is_snapshot(bytes)).unwrap_or(0);
        let mut state = ExportState::default();
        for (at, bytes) in records.into_iter().enumerate().skip(from) {
            let record = codec::decode(bytes).map_err(|reason| StateError::Record { at, reason })?;
            state.apply(&record)?;
        }
        Ok(state)
    }

    pub fn is_opened(&self) -> bool {
        self.sink_epoch > 0
    }

    /// First offset of the partition that is not known to be in the table; `None` for a partition never started.
    pub fn settled(&self, partition: i32) -> Option<i64> {
        let planned = *self.planned.get(&partition)?;
        let open = self.open.values().flat_map(|open| &open.plan.ranges);
        Some(open.filter(|r| r.partition == partition).map(|r| r.first).fold(planned, i64::min))
    }

    /// Settled offsets of all partitions.
    pub fn settled_offsets(&self) -> BTreeMap<i32, i64> {
        let mut settled = self.planned.clone();
        for range in self.open.values().flat_map(|open| &open.plan.ranges) {
            if let Some(offset) = settled.get_mut(&range.partition) {
                *offset = (*offset).min(range.first);
            }
        }
        settled
    }

    /// Whether rows of these ranges may be in the table from an earlier epoch.
    pub fn must_look_first(&self, ranges: &[Range]) -> bool {
        ranges.iter().any(|r| self.look_until.get(&r.partition).is_some_and(|until| r.first < *until))
    }

    pub fn snapshot_due(&self) -> bool {
        self.records_since_snapshot >= SNAPSHOT_EVERY
    }

    pub fn snapshot(&self) -> Record {
        let mut state = self.clone();
        state.records_since_snapshot = 0;
        Record::Snapshot(Box::new(state))
    }

    /// The record that starts planning over at `start`: the first opening, or a replay. Whatever was planned before
    /// counts as perhaps in the table.
    pub fn reopen(
        &self,
        topic_id: [u8; 16],
        start: &BTreeMap<i32, i64>,
        look_until: &BTreeMap<i32, i64>,
    ) -> Record {
        let mut look = self.look_until.clone();
        for (partition, until) in look_until.iter().chain(&self.planned) {
            let entry = look.entry(*partition).or_insert(*until);
            *entry = (*entry).max(*until);
        }
        look.retain(|partition, until| start.get(partition).is_some_and(|from| from < until));
        Record::Opened {
            topic_id,
            sink_epoch: self.sink_epoch.saturating_add(1),
            start: start.iter().map(|(p, o)| (*p, *o)).collect(),
            look_until: look.into_iter().collect(),
        }
    }

    pub fn apply(&mut self, record: &Record) -> Result<(), StateError> {
        self.records_since_snapshot += 1;
        match record {
            Record::Opened { topic_id, sink_epoch, start, look_until } => {
                self.topic_id = *topic_id;
                self.sink_epoch = *sink_epoch;
                self.open.clear();
                self.planned.extend(start.iter().copied());
                self.look_until = look_until.iter().copied().collect();
            }
            Record::Started { partition, offset } => {
                self.planned.entry(*partition).or_insert(*offset);
            }
            Record::Mapped(mapping) => {
                self.mapping_version = Some(mapping.version);
                self.mappings.insert(mapping.version, mapping.clone());
                self.forget_mappings();
            }
            Record::Producer { id } => {
                self.producer_id = Some(*id);
                self.dlq_next_sequence = 0;
            }
            Record::Planned(plan) => self.plan(plan)?,
            Record::DeadLettersWritten { seq } => {
                self.open_plan(*seq, "dead letters")?.dead_letters_written = true;
            }
            Record::Repairing { seq, n, block_crc } => {
                let open = self.open_plan(*seq, "a repair")?;
                open.repairs = *n;
                open.repair_crc = *block_crc;
            }
            Record::Split { seq, into } => self.split(*seq, into)?,
            Record::Settled { seq } => {
                let open = self.open.remove(seq).ok_or(StateError::NotOpen { what: "settled", seq: *seq })?;
                self.rows += open.plan.rows;
                self.dead_letters += u64::from(open.plan.dead_letters);
                self.skipped += open.plan.skipped;
                self.forget_mappings();
            }
            Record::Snapshot(state) => *self = (**state).clone(),
        }
        Ok(())
    }

    fn plan(&mut self, plan: &Plan) -> Result<(), StateError> {
        self.check_plan(plan)?;
        for range in &plan.ranges {
            let expected = self.planned.get(&range.partition).copied();
            if expected != Some(range.first) {
                return Err(StateError::Gap {
                    seq: plan.seq,
                    partition: range.partition,
                    first: range.first,
                    expected: expected.unwrap_or(-1),
                });
            }
        }
        for range in &plan.ranges {
            self.planned.insert(range.partition, range.last.saturating_add(1));
        }
        self.insert_open(plan);
        Ok(())
    }

    fn check_plan(&self, plan: &Plan) -> Result<(), StateError> {
        let seq = plan.seq;
        if plan.seq != self.next_seq {
            return Err(StateError::Sequence { seq, expected: self.next_seq });
        }
        if plan.sink_epoch != self.sink_epoch {
            return Err(StateError::Epoch { seq, epoch: plan.sink_epoch, expected: self.sink_epoch });
        }
        if !self.mappings.contains_key(&plan.mapping_version) {
            return Err(StateError::Mapping { seq, version: plan.mapping_version });
        }
        let mut partitions: Vec<i32> = plan.ranges.iter().map(|r| r.partition).collect();
        partitions.sort_unstable();
        if partitions.windows(2).any(|w| w[0] == w[1]) {
            return Err(StateError::Malformed { seq, reason: "a partition occurs twice" });
        }
        if plan.ranges.is_empty() || plan.ranges.iter().any(|r| r.first < 0 || r.last < r.first) {
            return Err(StateError::Malformed { seq, reason: "an empty range" });
        }
        let rows = plan.ranges.iter().try_fold(0u64, |sum, r| sum.checked_add(r.rows));
        if rows != Some(plan.rows) {
            return Err(StateError::Malformed { seq, reason: "the rows of its ranges do not add up" });
        }
        Ok(())
    }

    fn insert_open(&mut self, plan: &Plan) {
        self.next_seq = plan.seq.saturating_add(1);
        if plan.dead_letters > 0 {
            self.dlq_next_sequence = add_sequence(plan.dlq_first_sequence, plan.dead_letters);
        }
        let open = OpenPlan {
            plan: plan.clone(),
            dead_letters_written: plan.dead_letters == 0,
            repairs: 0,
            repair_crc: 0,
        };
        self.open.insert(plan.seq, open);
    }

    fn split(&mut self, seq: u64, into: &[Plan]) -> Result<(), StateError> {
        let parent = self.open.get(&seq).ok_or(StateError::NotOpen { what: "a split", seq })?.plan.clone();
        if !covers(&parent.ranges, into) {
            return Err(StateError::Malformed { seq, reason: "its replacements cover other offsets" });
        }
        for plan in into {
            self.check_plan(plan)?;
            self.insert_open(plan);
        }
        self.open.remove(&seq);
        // What the parent wrote or passed over is not counted by its replacements.
        self.dead_letters += u64::from(parent.dead_letters);
        self.skipped += parent.skipped;
        Ok(())
    }

    fn open_plan(&mut self, seq: u64, what: &'static str) -> Result<&mut OpenPlan, StateError> {
        self.open.get_mut(&seq).ok_or(StateError::NotOpen { what, seq })
    }

    fn forget_mappings(&mut self) {
        let current = self.mapping_version;
        let open = &self.open;
        self.mappings.retain(|version, _| {
            Some(*version) == current || open.values().any(|o| o.plan.mapping_version == *version)
        });
    }
}

/// Whether the plans' ranges, put together per partition, are exactly `parent`.
fn covers(parent: &[Range], into: &[Plan]) -> bool {
    let mut pieces: BTreeMap<i32, Vec<(i64, i64)>> = BTreeMap::new();
    for range in into.iter().flat_map(|plan| &plan.ranges) {
        pieces.entry(range.partition).or_default().push((range.first, range.last));
    }
    if pieces.len() != parent.len() {
        return false;
    }
    parent.iter().all(|range| {
        let Some(pieces) = pieces.get_mut(&range.partition) else { return false };
        pieces.sort_unstable();
        let mut next = range.first;
        for (first, last) in pieces {
            if *first != next {
                return false;
            }
            next = last.saturating_add(1);
        }
        next == range.last.saturating_add(1)
    })
}

/// What wakes the exporter's planning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The broker started, or the export was resumed after any error.
    Recovered,
    /// A block is encoded and waits; how many records it holds.
    Prepared { records: u64 },
    /// A plan was settled.
    Settled,
}

/// What the exporter does next, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing is known of this plan's insert: settle it before anything else.
    Settle { seq: u64 },
    /// Record the prepared plan, then send it.
    Plan,
    /// Read from the log.
    Collect,
    /// Write a snapshot and let the log forget what came before.
    Snapshot,
}

/// The exporter's order of work, from the state alone.
pub fn next_step(state: &ExportState, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    let unsettled = || state.open.keys().map(|seq| Action::Settle { seq: *seq });
    match event {
        Event::Recovered => actions.extend(unsettled()),
        // A split leaves replacements behind: they go first, in order, for they hold the settled offset back.
        Event::Settled => {
            actions.extend(unsettled());
            if state.snapshot_due() {
                actions.push(Action::Snapshot);
            }
        }
        Event::Prepared { records } => {
            if records > 0 && state.open.len() < MAX_OPEN_PLANS {
                actions.push(Action::Plan);
            } else {
                actions.extend(unsettled());
            }
        }
    }
    if !actions.contains(&Action::Plan) {
        actions.push(Action::Collect);
    }
    actions
}
