//! Words shared by every part of the store and by its users: entries, hard state, configurations, errors.
//!
//! Plain data, no behaviour beyond defaults; nothing here touches the disk.

use bytes::Bytes;

use crate::producer_state::ProducerState;

/// Number of a Raft group. 0 is the metadata group; numbers are never used again after deletion.
pub type GroupId = u64;

/// Reported for a partition directory whose `group.meta` cannot be read and which the WAL does not name.
pub const UNKNOWN_GROUP: GroupId = u64::MAX;

/// Number of a commit: rising within a lane, different in the two lanes of a shard. Everything that was staged in a lane
/// under `Lsn <= ShardStore::durable_lsn(lane)` is as safe as its topic asked for.
pub type Lsn = u64;

/// The two write-ahead logs of a shard, and what goes past them. Each is acknowledged by itself: an `os` topic never waits
/// for the disk, and small records never for large runs of other partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    Durable,
    Os,
    /// Runs that go straight to their segments, of topics of both kinds; no log of its own.
    Direct,
}

/// Those with a log.
pub const LANES: [Lane; 2] = [Lane::Durable, Lane::Os];

/// All that `stage` may answer.
pub const COMMIT_LANES: [Lane; 3] = [Lane::Durable, Lane::Os, Lane::Direct];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardState {
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// One whole Kafka v2 batch with its final base offset and leader epoch.
    Batch(Bytes),
    /// A Raft entry without offsets: no-op or membership change.
    Control(Bytes),
}

impl Payload {
    pub fn bytes(&self) -> &Bytes {
        match self {
            Self::Batch(bytes) | Self::Control(bytes) => bytes,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub index: u64,
    pub term: u64,
    pub payload: Payload,
}

/// What Raft has to know of a log when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftStart {
    /// With what is known to be committed: more than was stored with it, where entries have moved to segments since.
    pub hard_state: HardState,
    pub last_index: u64,
    pub last_term: u64,
    /// As staged last, with the index of its entry.
    pub membership: Option<(u64, Bytes)>,
    /// Control entries after `before` which are not empty.
    pub controls: Vec<(u64, Bytes)>,
    /// Index and term of the entry before the first that `GroupLog::read_entries` has.
    pub before: (u64, u64),
    /// First index of every run of entries of one term after it, and the term.
    pub terms: Vec<(u64, u64)>,
}

/// With what a log begins that was brought from elsewhere: it stands for all entries up to `index`. Index, term and offset 0:
/// at nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beginning {
    pub hard_state: HardState,
    pub index: u64,
    pub term: u64,
    /// After the entry at `index`; the log start offset, too, unless what lies below was received (`GroupLog::begin_with`).
    pub offset: i64,
    pub membership: (u64, Bytes),
    /// A producer snapshot as of `offset`, from `GroupLog::producers_at`.
    pub producers: Bytes,
}

/// When an append counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// After the group commit reached the disk.
    #[default]
    Durable,
    /// After the kernel took it: survives a killed process, not a loss of power.
    Os,
    /// At once: what the process has in memory dies with it. The log stays in order: only an end of it is lost.
    Memory,
}

impl Durability {
    pub fn lane(self) -> Lane {
        match self {
            Self::Durable => Lane::Durable,
            Self::Os | Self::Memory => Lane::Os,
        }
    }
}

/// When and how a log keeps the last record of every key only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompactionConfig {
    /// Thousandths of the log that must be new before it is compacted again.
    pub min_dirty_permille: u32,
    /// A record stays at least this long, and waits at most so long for its compaction.
    pub min_lag_ms: i64,
    pub max_lag_ms: i64,
    /// Tombstones stay so long after the first compaction that met them.
    pub delete_retention_ms: i64,
}

impl Default for CompactionConfig {
    fn default() -> Self {
        Self {
            min_dirty_permille: 500,
            min_lag_ms: 0,
            max_lag_ms: i64::MAX,
            delete_retention_ms: 24 * 3600 * 1000,
        }
    }
}

/// Settings of one partition's log; -1 means without limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupConfig {
    pub durability: Durability,
    pub segment_bytes: u64,
    pub segment_ms: i64,
    pub retention_bytes: i64,
    pub retention_ms: i64,
    pub compaction: Option<CompactionConfig>,
    /// Large runs may go straight to their segments. Not for a partition with several replicas: what is in a segment was
    /// written before it was committed, and nothing may replace it.
    pub direct: bool,
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            durability: Durability::Durable,
            segment_bytes: 1 << 30,
            segment_ms: 7 * 24 * 3600 * 1000,
            retention_bytes: -1,
            retention_ms: 7 * 24 * 3600 * 1000,
            compaction: None,
            direct: true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoKind {
    /// io_uring where a probe of it works, pread and pwrite on a thread pool otherwise.
    #[default]
    Auto,
    Uring,
    Sync,
}

#[derive(Debug, Clone)]
pub struct StoreConfig {
    pub shard: usize,
    pub wal_file_bytes: u64,
    pub wal_files_max: usize,
    pub cache_bytes: usize,
    pub io: IoKind,
    /// See `direct.rs`: a batch of at least so many bytes may go straight to its segment, if as many of its partition as the
    /// second wait for theirs.
    pub direct_batch_bytes: usize,
    pub direct_run_bytes: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            shard: 0,
            wal_file_bytes: 32 << 20,
            wal_files_max: 4,
            cache_bytes: 64 << 20,
            io: IoKind::Auto,
            direct_batch_bytes: crate::direct::BATCH_BYTES,
            direct_run_bytes: crate::direct::RUN_BYTES,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupHealth {
    Ok,
    /// Bytes on disk are left as they are; the partition refuses to read and write.
    Damaged {
        reason: String,
    },
}

impl GroupHealth {
    pub fn is_ok(&self) -> bool {
        matches!(self, Self::Ok)
    }
}

/// One partition as found on disk at start. Hand it to `ShardStore::attach` on the shard that will own it.
#[derive(Debug)]
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
    pub(crate) restored: crate::recovery::Restored,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetentionOutcome {
    pub deleted_segments: usize,
    pub deleted_bytes: u64,
    pub log_start_offset: i64,
}

/// What a call of `GroupLog::compact` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompactionOutcome {
    /// 0: nothing was due.
    pub passes: u32,
    /// Everything below it was compared with everything below it.
    pub clean_offset: i64,
    pub segments_before: usize,
    pub segments_after: usize,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub records_dropped: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    #[error("no space left to write compacted segments")]
    NoSpace,
    #[error("damaged log: {reason}")]
    Damaged { reason: String },
    #[error("the log changed meanwhile, or is going away")]
    Interrupted,
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
}

/// Upper bounds, in microseconds, of the commit time buckets; the last bucket has none.
pub const COMMIT_BUCKETS_US: [u64; 12] =
    [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 100_000, 1_000_000];

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Batches as handed in by `stage`.
    pub bytes_appended: u64,
    pub batches_appended: u64,
    /// Including headers and padding.
    pub wal_bytes_written: u64,
    pub wal_commits: u64,
    pub segment_bytes_written: u64,
    pub segment_syncs: u64,
    /// What compaction read of segments, and wrote instead.
    pub compaction_bytes_read: u64,
    pub compaction_bytes_written: u64,
    pub compactions: u64,
    /// Batches held in memory, and the part of them that is not in a segment yet.
    pub cache_bytes: u64,
    pub unflushed_bytes: u64,
    pub wal_files_in_use: u64,
    pub wal_files_retired: u64,
    pub groups: u64,
    pub open_files: u64,
    /// The disk refused space for segments or WAL; appends are turned away once the ring is full.
    pub no_space: bool,
    pub poisoned: bool,
    /// Commits by the time of their write, see `COMMIT_BUCKETS_US`; one more bucket than bounds.
    pub commit_time_buckets: [u64; COMMIT_BUCKETS_US.len() + 1],
    pub commit_time_sum_us: u64,
    /// "io_uring" or "pread/pwrite", with the reason when the first was wanted.
    pub io: String,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path}: another flumen process uses this data directory; stop it or choose another --data-dir")]
    InUse { path: String },
    #[error(
        "{path}: data directory has format {found:?}, this program reads and writes {want:?}; start the version of \
         flumen that wrote it, or choose another --data-dir"
    )]
    Format { path: String, found: String, want: &'static str },
    #[error("{path}: not a directory; choose another --data-dir")]
    NotADirectory { path: String },
    #[error("{path}: has files but no FORMAT file, so it is no data directory; choose an empty one")]
    NotOurs { path: String },
    #[error("{path}: this process may not write here; make it writable or choose another --data-dir")]
    NotWritable { path: String },
    #[error("{path}: no space left on this disk; free some or choose another --data-dir")]
    NoSpace { path: String },
    #[error("{path}: {action} failed: {source}")]
    Io { path: String, action: &'static str, source: std::io::Error },
    #[error("data directory has not been recovered yet; recover() comes before the shards start")]
    NotRecovered,
    #[error("io_uring was asked for but does not work here: {0}")]
    Uring(String),
    #[error("{0}")]
    Config(String),
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("group {0} exists already")]
    GroupExists(GroupId),
    #[error("directory {0} exists already")]
    DirectoryExists(String),
    #[error("{0:?} cannot be a directory name")]
    BadName(String),
    #[error("no space left for the log")]
    NoSpace,
    #[error("the shard log failed and takes no more writes: {0}")]
    Poisoned(String),
    #[error("creating directory {path}: {source}")]
    Io { path: String, source: std::io::Error },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    #[error("no space left for the log")]
    NoSpace,
    #[error("the shard log failed and takes no more writes")]
    Poisoned,
    #[error("the partition's log is damaged and refuses writes")]
    Damaged,
    #[error("entry of {bytes} bytes; the WAL takes at most {limit}")]
    TooLarge { bytes: usize, limit: usize },
    #[error("the partition is being deleted")]
    Deleted,
    #[error("entry {index} does not continue the log: {reason}")]
    Gap { index: u64, reason: &'static str },
}

/// The shard log could not be written. Nothing after the last durable commit may be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the shard log failed and takes no more writes: {reason}")]
pub struct LogPoisoned {
    pub reason: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("offset out of range: the log has {start} to {end}")]
    OutOfRange { start: i64, end: i64 },
    #[error("damaged log: {reason}")]
    Damaged { reason: String },
    #[error("reading the log: {0}")]
    Io(#[from] std::io::Error),
}

/// Why batches of another replica could not be taken. Nothing of the log has changed.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("no space left for what another replica sends")]
    NoSpace,
    #[error("what another replica sent cannot be used: {0}")]
    Malformed(String),
    #[error("the log changed meanwhile, or is going away")]
    Interrupted,
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
}

#[derive(Debug, thiserror::Error)]
pub enum AdvanceError {
    #[error("offset {offset} is outside of the log, {start} to {end}")]
    OutOfRange { offset: i64, start: i64, end: i64 },
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
}

#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error("group {0} is not here")]
    Unknown(GroupId),
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
}

#[derive(Debug, thiserror::Error)]
pub enum ShutdownError {
    #[error(transparent)]
    Poisoned(#[from] LogPoisoned),
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
}
