//! Durable storage of partitions: a write-ahead log per shard, segments per partition, a tail cache between them.
//!
//! Owns every byte on disk (FORMAT.md says where each lies and who repairs what) and nothing else: Raft, offsets and
//! acknowledgements are the broker's. `DataDir` opens and recovers before the shards start; then each shard thread has a
//! `ShardStore`, and a `GroupLog` per partition. The rules are pure (`wal_format`, `replay`, `ring`, `group_state`,
//! `segment_index`, `segment_name`, `leader_epochs`, `marks`, `producer_state`, `tail`, `walk`, `compact_policy`, `compact_map`,
//! `compact_scan`, `compact_filter`), the rest carries them out.

#![forbid(unsafe_code)]

mod anew;
mod codec;
mod compact;
mod compact_filter;
mod compact_map;
mod compact_policy;
mod compact_scan;
mod data_dir;
mod direct;
mod dump;
mod entries;
/// Public for the broker, which has places of its own.
#[doc(hidden)]
pub mod failpoint;
mod flush;
mod group;
mod group_state;
mod inspect;
mod leader_epochs;
mod marks;
#[cfg(not(feature = "mutants"))]
mod mutant;
#[cfg(feature = "mutants")]
pub mod mutant;
mod producer_state;
mod read;
mod read_ahead;
mod recovery;
mod replay;
mod restore;
mod restore_numbers;
mod retention;
mod retire;
mod ring;
mod segment_index;
mod segment_name;
mod states_file;
mod stop;
mod store;
mod tail;
mod types;
mod wal;
/// Public for bench/micro alone, which counts the instructions of encoding a block.
#[doc(hidden)]
pub mod wal_format;
mod walk;

pub use data_dir::DataDir;
pub use dump::DumpOptions;
pub use group::{GroupLog, MEMBERSHIP_BYTES_MAX};
pub use inspect::{Finding, Inspection, Severity, Summary};
pub use producer_state::{
    BATCHES_KEPT, DEFAULT_EXPIRATION_MS, KeptBatch, MAX_PRODUCERS_PER_GROUP, ProducerError, ProducerState,
    SnapshotError, Verdict,
};
pub use store::ShardStore;
pub use types::*;

/// The disk and the file system that a store can be opened on instead of the machine's; see `ShardStore::open_on` and
/// `DataDir::open_on`.
pub use flumen_io::{Disk, DiskKind, FileSystem, Op, OpKind};
