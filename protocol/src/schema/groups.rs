//! Layout of the requests of group members and of the tools that look at groups. Field order is wire order.

use super::Kind::*;
use super::{ANY, Field, Message, since, until};

pub(super) static OFFSET_COMMIT: Message = Message {
    fields: &[
        Field("group_id", String, ANY),
        Field("generation_id_or_member_epoch", I32, ANY),
        Field("member_id", String, ANY),
        Field("group_instance_id", NullableString, since(7)),
        Field("retention_time_ms", I64, until(4)),
        Field("topics", Structs(&OFFSET_COMMIT_TOPIC), ANY),
    ],
    tagged: &[],
};

static OFFSET_COMMIT_TOPIC: Message = Message {
    fields: &[Field("name", String, ANY), Field("partitions", Structs(&OFFSET_COMMIT_PARTITION), ANY)],
    tagged: &[],
};

static OFFSET_COMMIT_PARTITION: Message = Message {
    fields: &[
        Field("partition_index", I32, ANY),
        Field("committed_offset", I64, ANY),
        Field("committed_leader_epoch", I32, since(6)),
        Field("committed_metadata", NullableString, ANY),
    ],
    tagged: &[],
};

pub(super) static OFFSET_FETCH: Message = Message {
    fields: &[
        Field("group_id", String, until(7)),
        Field("topics", NullableStructs(&OFFSET_FETCH_TOPIC), until(7)),
        Field("groups", Structs(&OFFSET_FETCH_GROUP), since(8)),
        Field("require_stable", Bool, since(7)),
    ],
    tagged: &[],
};

static OFFSET_FETCH_TOPIC: Message = Message {
    fields: &[Field("name", String, until(7)), Field("partition_indexes", Int32s, until(7))],
    tagged: &[],
};

static OFFSET_FETCH_GROUP: Message = Message {
    fields: &[
        Field("group_id", String, since(8)),
        Field("member_id", NullableString, since(9)),
        Field("member_epoch", I32, since(9)),
        Field("topics", NullableStructs(&OFFSET_FETCH_TOPICS), since(8)),
    ],
    tagged: &[],
};

static OFFSET_FETCH_TOPICS: Message = Message {
    fields: &[Field("name", String, since(8)), Field("partition_indexes", Int32s, since(8))],
    tagged: &[],
};

pub(super) static FIND_COORDINATOR: Message = Message {
    fields: &[
        Field("key", String, until(3)),
        Field("key_type", I8, since(1)),
        Field("coordinator_keys", Strings, since(4)),
    ],
    tagged: &[],
};

pub(super) static JOIN_GROUP: Message = Message {
    fields: &[
        Field("group_id", String, ANY),
        Field("session_timeout_ms", I32, ANY),
        Field("rebalance_timeout_ms", I32, since(1)),
        Field("member_id", String, ANY),
        Field("group_instance_id", NullableString, since(5)),
        Field("protocol_type", String, ANY),
        Field("protocols", Structs(&JOIN_GROUP_PROTOCOL), ANY),
        Field("reason", NullableString, since(8)),
    ],
    tagged: &[],
};

static JOIN_GROUP_PROTOCOL: Message =
    Message { fields: &[Field("name", String, ANY), Field("metadata", Bytes, ANY)], tagged: &[] };

pub(super) static HEARTBEAT: Message = Message {
    fields: &[
        Field("group_id", String, ANY),
        Field("generation_id", I32, ANY),
        Field("member_id", String, ANY),
        Field("group_instance_id", NullableString, since(3)),
    ],
    tagged: &[],
};

pub(super) static LEAVE_GROUP: Message = Message {
    fields: &[
        Field("group_id", String, ANY),
        Field("member_id", String, until(2)),
        Field("members", Structs(&LEAVE_GROUP_MEMBER), since(3)),
    ],
    tagged: &[],
};

static LEAVE_GROUP_MEMBER: Message = Message {
    fields: &[
        Field("member_id", String, since(3)),
        Field("group_instance_id", NullableString, since(3)),
        Field("reason", NullableString, since(5)),
    ],
    tagged: &[],
};

pub(super) static SYNC_GROUP: Message = Message {
    fields: &[
        Field("group_id", String, ANY),
        Field("generation_id", I32, ANY),
        Field("member_id", String, ANY),
        Field("group_instance_id", NullableString, since(3)),
        Field("protocol_type", NullableString, since(5)),
        Field("protocol_name", NullableString, since(5)),
        Field("assignments", Structs(&SYNC_GROUP_ASSIGNMENT), ANY),
    ],
    tagged: &[],
};

static SYNC_GROUP_ASSIGNMENT: Message =
    Message { fields: &[Field("member_id", String, ANY), Field("assignment", Bytes, ANY)], tagged: &[] };

pub(super) static DESCRIBE_GROUPS: Message = Message {
    fields: &[Field("groups", Strings, ANY), Field("include_authorized_operations", Bool, since(3))],
    tagged: &[],
};

pub(super) static LIST_GROUPS: Message = Message {
    fields: &[Field("states_filter", Strings, since(4)), Field("types_filter", Strings, since(5))],
    tagged: &[],
};

pub(super) static DELETE_GROUPS: Message =
    Message { fields: &[Field("groups_names", Strings, ANY)], tagged: &[] };

pub(super) static OFFSET_DELETE: Message = Message {
    fields: &[Field("group_id", String, ANY), Field("topics", Structs(&OFFSET_DELETE_TOPIC), ANY)],
    tagged: &[],
};

static OFFSET_DELETE_TOPIC: Message = Message {
    fields: &[Field("name", String, ANY), Field("partitions", Structs(&OFFSET_DELETE_PARTITION), ANY)],
    tagged: &[],
};

static OFFSET_DELETE_PARTITION: Message =
    Message { fields: &[Field("partition_index", I32, ANY)], tagged: &[] };
