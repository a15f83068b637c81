//! The log: one write-ahead log per shard for all its partitions, per-partition segments behind it.
//!
//! Code map: `store` (one shard's storage: what the broker calls) -> `wal` (group commit) ->
//! `group` (a partition's tail, segments, producer state) -> `segment`; `wal_format`, `checkpoint`,
//! `producer_state`, `leader_epochs` are pure; `recovery` turns what a crash left into segments before
//! any shard starts. FORMAT.md has the bytes and the crash table.
//!
//! Invariants
//! - An entry is reported durable only after the write that holds it succeeded, with the durability that
//!   its group asks for. A failed write or sync poisons the store and is never retried.
//! - Entries leave the WAL for segments in log order and only below the high watermark; a WAL file is
//!   reused only after the segments it fed are synced and a checkpoint says so.
//! - Damage below what a checkpoint or a later WAL block vouches for is reported, never cut.
//!
//! What it does not do: give offsets, count votes, know topics.
#![forbid(unsafe_code)]

mod checkpoint;
mod data_dir;
mod entry;
mod error;
mod group;
mod leader_epochs;
pub mod producer_state;
mod recovery;
mod segment;
mod store;
mod wal;
mod wal_format;

pub use data_dir::DataDir;
pub use entry::{
    Durability, Entry, GroupConfig, GroupHealth, GroupId, HardState, Lane, Lsn, Payload, RecoveredGroup,
    StoreConfig, StoreStats,
};
pub use error::{CreateError, LogPoisoned, OpenError, ReadError, StageError};
pub use flumen_io::DiskKind as IoKind;
pub use group::GroupLog;
pub use producer_state::{ProducerError, ProducerState, Verdict};
pub use store::ShardStore;

#[cfg(test)]
mod tests;
