//! Requests, responses, outputs and configuration of the coordinator, and every bound it keeps.

use bytes::Bytes;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_groups_response::DescribedGroup;
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::messages::{
    HeartbeatRequest, HeartbeatResponse, JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest,
    LeaveGroupResponse, OffsetCommitRequest, OffsetCommitResponse, OffsetDeleteRequest, OffsetDeleteResponse,
    SyncGroupRequest, SyncGroupResponse, TopicName,
};
use kafka_protocol::protocol::StrBytes;

use crate::record::OffsetsRecord;

/// Groups of one partition: far above any real cluster, low enough that a hostile client cannot fill the memory
/// with names.
pub const MAX_GROUPS: usize = 1 << 20;
/// Members that asked for an id and have not come back with it. Kafka has no bound here; each costs a timer.
pub const MAX_PENDING_MEMBERS: usize = 10_000;
/// Protocols one member may offer; clients send one to four.
pub const MAX_PROTOCOLS_PER_MEMBER: usize = 100;
/// Offsets of one OffsetCommit; the append's own size limit is usually met earlier.
pub const MAX_OFFSETS_PER_COMMIT: usize = 100_000;
/// Members named in one LeaveGroup; admin tools remove whole groups at once.
pub const MAX_MEMBERS_PER_LEAVE: usize = 100_000;
/// Appends under way at a time; commits beyond it are told to come again.
pub const MAX_APPENDS_IN_FLIGHT: usize = 1 << 16;
/// Tombstones of one append, so that deleting a wide group stays below the batch size limit.
pub const MAX_TOMBSTONES_PER_APPEND: usize = 1_000;
/// Strings of the record formats carry 16-bit lengths.
pub const MAX_STRING_BYTES: usize = i16::MAX as usize;
/// Kafka validates instance ids like topic names.
pub const MAX_INSTANCE_ID_BYTES: usize = 249;
/// What a member id takes over from the client id, before the unique part.
pub const MAX_MEMBER_ID_PREFIX_BYTES: usize = 512;
/// How long a member that never got its id may wait inside a rebalance: it cannot send heartbeats yet, and a
/// vanished one must not stay for ever (Kafka: 5 minutes, not configurable).
pub const NEW_MEMBER_JOIN_TIMEOUT_MS: i64 = 300_000;
/// How often expired offsets are looked for (Kafka's offsets.retention.check.interval.ms).
pub const OFFSETS_RETENTION_CHECK_INTERVAL_MS: i64 = 600_000;

/// From this version on a SyncGroup has to say which protocol it means.
pub const PROTOCOL_NAMED_MIN_VERSION: i16 = 5;

#[derive(Clone, Debug)]
pub struct GroupsConfig {
    pub session_timeout_min_ms: i32,
    pub session_timeout_max_ms: i32,
    pub initial_rebalance_delay_ms: i64,
    pub offset_metadata_bytes_max: usize,
    pub group_members_max: usize,
    pub offsets_retention_ms: i64,
}

impl Default for GroupsConfig {
    fn default() -> Self {
        GroupsConfig {
            session_timeout_min_ms: 6_000,
            session_timeout_max_ms: 1_800_000,
            initial_rebalance_delay_ms: 3_000,
            offset_metadata_bytes_max: 4_096,
            group_members_max: i32::MAX as usize,
            offsets_retention_ms: 7 * 24 * 3_600 * 1_000,
        }
    }
}

/// What time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Of a clock that never jumps and begins anywhere: sessions and rebalances end by it.
    pub steady_ms: i64,
    /// Of the wall clock, for what is kept and shown: when offsets were committed and expire, since when a group is empty.
    pub wall_ms: i64,
}

/// Where no clock jumps.
impl From<i64> for Now {
    fn from(now_ms: i64) -> Now {
        Now { steady_ms: now_ms, wall_ms: now_ms }
    }
}

/// Who sent a request, as describe shows it.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    pub client_id: &'a str,
    pub client_host: &'a str,
}

/// `version` is the request's API version. In an OffsetCommit the broker fills in the ids of the topics, which older
/// versions do not carry, and from version 10 on their names; a name left empty is answered with UNKNOWN_TOPIC_ID.
#[derive(Clone, Debug)]
pub enum GroupRequest {
    Join { request: JoinGroupRequest, version: i16 },
    Sync { request: SyncGroupRequest, version: i16 },
    Heartbeat { request: HeartbeatRequest, version: i16 },
    Leave { request: LeaveGroupRequest, version: i16 },
    OffsetCommit { request: OffsetCommitRequest, version: i16 },
    OffsetFetch { group: OffsetFetchGroup },
    OffsetDelete { request: OffsetDeleteRequest },
    Describe { group_id: StrBytes, version: i16 },
    List { states_filter: Vec<StrBytes>, types_filter: Vec<StrBytes> },
    Delete { group_id: StrBytes },
}

/// One group of an OffsetFetch. `topics: None` asks for everything committed.
#[derive(Clone, Debug, Default)]
pub struct OffsetFetchGroup {
    pub group_id: StrBytes,
    pub member_id: Option<StrBytes>,
    pub member_epoch: i32,
    pub topics: Option<Vec<(TopicName, Vec<i32>)>>,
    pub require_stable: bool,
}

#[derive(Clone, Debug)]
pub enum GroupResponse {
    Join(JoinGroupResponse),
    Sync(SyncGroupResponse),
    Heartbeat(HeartbeatResponse),
    Leave(LeaveGroupResponse),
    OffsetCommit(OffsetCommitResponse),
    OffsetFetch(OffsetFetchResult),
    OffsetDelete(OffsetDeleteResponse),
    Describe(DescribedGroup),
    List(Vec<ListedGroup>),
    Delete(ErrorCode),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct OffsetFetchResult {
    /// For the whole group; partitions have their own.
    pub error: ErrorCode,
    pub topics: Vec<OffsetFetchTopic>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct OffsetFetchTopic {
    pub name: TopicName,
    pub partitions: Vec<OffsetFetchPartition>,
}

/// Offset -1 (and leader epoch -1, empty metadata) where nothing is committed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OffsetFetchPartition {
    pub partition: i32,
    pub offset: i64,
    pub leader_epoch: i32,
    pub metadata: StrBytes,
    pub error: ErrorCode,
}

#[derive(Clone, Debug)]
pub enum Output {
    Reply {
        token: u64,
        response: GroupResponse,
    },
    /// To be appended as one batch, in the order given. Each is answered once by `append_done`: successes in
    /// the order of append ids, failures whenever they are known.
    Append {
        append_id: u64,
        records: Vec<OffsetsRecord>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GroupState {
    Empty,
    PreparingRebalance,
    CompletingRebalance,
    Stable,
    /// Its deletion is being appended.
    Dead,
}

impl GroupState {
    pub fn name(self) -> &'static str {
        match self {
            GroupState::Empty => "Empty",
            GroupState::PreparingRebalance => "PreparingRebalance",
            GroupState::CompletingRebalance => "CompletingRebalance",
            GroupState::Stable => "Stable",
            GroupState::Dead => "Dead",
        }
    }
}

/// What metrics show of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSummary<'a> {
    pub group_id: &'a str,
    pub state: GroupState,
    pub protocol_type: &'a str,
    pub members: usize,
}

/// State outlives the request frame, so it must not share its buffer.
pub(crate) fn own_str(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_owned())
}

pub(crate) fn own_bytes(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
