//! What an export needs from the broker: the log of its topic, a dead-letter topic, and a durable log for its state.
//!
//! Owns the traits and the data that crosses them; no behaviour. All calls come from the export thread, so nothing
//! here needs `Send`: the broker's implementation hops to the owning shard. Invariants the implementation keeps: what
//! `read` returned for an offset range is returned byte for byte again as long as the range is unsettled; nothing at
//! or above the last stable offset is returned; a record that `append` reported durable survives a crash.
#![allow(async_fn_in_trait)]

use std::time::Duration;

use bytes::Bytes;

/// What one read brings.
#[derive(Clone, Debug, Default)]
pub struct SourceRead {
    /// Whole v2 batches in offset order, all below the last stable offset. The first may start before the offset
    /// asked for. Batches of aborted transactions are left out; control batches may be present or left out.
    pub batches: Vec<Bytes>,
    /// First offset that must not be exported yet.
    pub last_stable_offset: i64,
    /// First offset that the log still holds.
    pub log_start_offset: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The offset asked for lies outside the log, or the log was cut while it was read.
    #[error(
        "offset {offset} of partition {partition} is outside the log, which holds {log_start_offset} to {last_stable_offset}"
    )]
    OffsetOutOfRange { partition: i32, offset: i64, log_start_offset: i64, last_stable_offset: i64 },
    /// Another broker leads the partition now, or the topic is being moved; asked again later.
    #[error("partition {partition} is not available here: {reason}")]
    NotAvailable { partition: i32, reason: String },
    /// The topic is gone. The export stops.
    #[error("the topic does not exist any more")]
    TopicDeleted,
    /// The disk or the broker failed; tried again with back-off.
    #[error("the broker could not serve the export: {0}")]
    Broker(String),
}

/// A record that the table cannot take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    /// The record's own headers, then the `ch.*` headers that say why and where.
    pub headers: Vec<(String, Vec<u8>)>,
    pub timestamp_ms: i64,
}

pub trait Source {
    /// The topic's partitions that this broker leads, in any order.
    async fn partitions(&self) -> Vec<i32>;

    /// Batches from `from` on, about `max_bytes` of them but at least one if there is one below the last stable
    /// offset. At the last stable offset: no batches and no error.
    async fn read(&self, partition: i32, from: i64, max_bytes: usize) -> Result<SourceRead, SourceError>;

    /// Returns when any partition has data at or above its position, when a partition was added, or after `timeout`.
    /// Returning early is allowed.
    async fn wait(&self, positions: &[(i32, i64)], timeout: Duration);

    /// Everything below `offset` is settled. Retention, compaction and DeleteRecords may pass it, nothing above it.
    fn settled(&self, partition: i32, offset: i64);

    /// Appends all records as one batch of an idempotent producer, durable on return, creating the topic if it is
    /// absent and regardless of its `max.message.bytes`. A sequence that was appended before succeeds again.
    async fn append_dead_letters(
        &self,
        topic: &str,
        producer_id: i64,
        producer_epoch: i16,
        first_sequence: i32,
        records: Vec<DeadLetter>,
    ) -> Result<(), SourceError>;

    /// A producer id that nobody else has or will have.
    async fn producer_id(&self) -> Result<i64, SourceError>;

    /// Until when the log will hold what is not exported yet, in milliseconds since 1970; `None` if it holds it
    /// until it is exported. Shown in the status while ClickHouse is away.
    fn held_until_ms(&self) -> Option<i64> {
        None
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateLogError {
    /// Another broker owns the export now; this one stops at once.
    #[error("another broker has taken this export over")]
    Fenced,
    #[error("the export's state cannot be written: {0}")]
    Failed(String),
}

/// The export's own records, in order, as handed to `Exporter::recover`.
pub trait StateLog {
    /// Returns after the record is durable (on a quorum, where there is one).
    async fn append(&self, record: Bytes) -> Result<(), StateLogError>;

    /// The record appended last is a snapshot: everything before it may be dropped, at any later time or never.
    fn truncate_before_snapshot(&self);
}
