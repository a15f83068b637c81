//! Words shared by the whole crate.

use bytes::Bytes;
use flumen_io::DiskKind as IoKind;

use crate::leader_epochs::LeaderEpochs;
use crate::producer_state::ProducerState;
use crate::segment::Segment;

/// A partition's Raft group. Never reused; 0 is the metadata group.
pub type GroupId = u64;

/// Position in one lane of a shard's WAL: the number of the commit block that holds the entry.
pub type Lsn = u64;

/// Each durability has a WAL of its own, so that entries that need no disk never wait for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    Durable,
    Os,
}

/// When an entry counts as stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The device has it: survives power loss.
    #[default]
    Durable,
    /// The kernel has it: survives the death of the process.
    Os,
}

impl Durability {
    pub(crate) fn lane(self) -> Lane {
        match self {
            Durability::Durable => Lane::Durable,
            Durability::Os => Lane::Os,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A whole Kafka v2 batch with its final base offset and leader epoch.
    Batch(Bytes),
    /// Takes an index and no offset.
    Control(Bytes),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub index: u64,
    pub term: u64,
    pub payload: Payload,
}

/// Per-group settings; -1 means no limit. Defaults are Kafka's.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    pub durability: Durability,
    pub segment_bytes: u64,
    pub segment_ms: i64,
    pub retention_bytes: i64,
    pub retention_ms: i64,
}

impl Default for GroupConfig {
    fn default() -> Self {
        GroupConfig {
            durability: Durability::Durable,
            segment_bytes: 1 << 30,
            segment_ms: 604_800_000,
            retention_bytes: -1,
            retention_ms: 604_800_000,
        }
    }
}

#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub shard: usize,
    /// Size of one WAL file.
    pub wal_file_bytes: u64,
    /// WAL files kept in normal operation; more are made while segments lag, see `wal`.
    pub wal_files: usize,
    /// Tail cache of the shard. Entries that are not yet in a segment are kept beyond it.
    pub cache_bytes: usize,
    pub io: IoKind,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            shard: 0,
            wal_file_bytes: 32 << 20,
            wal_files: 4,
            cache_bytes: 64 << 20,
            io: IoKind::Auto,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupHealth {
    Ok,
    Damaged { reason: String },
}

/// A group as recovery left it, ready to be attached to a shard.
pub struct RecoveredGroup {
    pub group_id: GroupId,
    pub dir_name: String,
    pub health: GroupHealth,
    pub hard_state: HardState,
    pub last_index: u64,
    pub last_term: u64,
    pub log_start_offset: i64,
    pub log_end_offset: i64,
    pub producers: ProducerState,
    pub(crate) leader_epochs: LeaderEpochs,
    pub(crate) segments: Vec<Segment>,
}

/// Running totals of one shard's store.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreStats {
    pub wal_bytes_written: u64,
    pub wal_commits: u64,
    pub segment_bytes_written: u64,
    pub bytes_appended: u64,
    pub cache_bytes: usize,
    pub no_space: bool,
}
