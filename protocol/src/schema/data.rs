//! Layout of the requests clients send while producing and consuming. Field order is wire order.

use super::Kind::*;
use super::{ANY, Field, Message, between, since, until};

pub(super) static FETCH: Message = Message {
    fields: &[
        Field("replica_id", I32, until(14)),
        Field("max_wait_ms", I32, ANY),
        Field("min_bytes", I32, ANY),
        Field("max_bytes", I32, ANY),
        Field("isolation_level", I8, ANY),
        Field("session_id", I32, since(7)),
        Field("session_epoch", I32, since(7)),
        Field("topics", Structs(&FETCH_TOPIC), ANY),
        Field("forgotten_topics_data", Structs(&FETCH_FORGOTTEN_TOPIC), since(7)),
        Field("rack_id", String, since(11)),
    ],
    tagged: &[
        (0, Field("cluster_id", NullableString, ANY)),
        (1, Field("replica_state", Struct(&FETCH_REPLICA_STATE), since(15))),
    ],
};

static FETCH_TOPIC: Message = Message {
    fields: &[
        Field("topic", String, until(12)),
        Field("topic_id", Uuid, since(13)),
        Field("partitions", Structs(&FETCH_PARTITION), ANY),
    ],
    tagged: &[],
};

static FETCH_PARTITION: Message = Message {
    fields: &[
        Field("partition", I32, ANY),
        Field("current_leader_epoch", I32, since(9)),
        Field("fetch_offset", I64, ANY),
        Field("last_fetched_epoch", I32, since(12)),
        Field("log_start_offset", I64, since(5)),
        Field("partition_max_bytes", I32, ANY),
    ],
    tagged: &[
        (0, Field("replica_directory_id", Uuid, since(17))),
        (1, Field("high_watermark", I64, since(18))),
    ],
};

static FETCH_FORGOTTEN_TOPIC: Message = Message {
    fields: &[
        Field("topic", String, between(7, 12)),
        Field("topic_id", Uuid, since(13)),
        Field("partitions", Int32s, since(7)),
    ],
    tagged: &[],
};

static FETCH_REPLICA_STATE: Message = Message {
    fields: &[Field("replica_id", I32, since(15)), Field("replica_epoch", I64, since(15))],
    tagged: &[],
};

pub(super) static LIST_OFFSETS: Message = Message {
    fields: &[
        Field("replica_id", I32, ANY),
        Field("isolation_level", I8, since(2)),
        Field("topics", Structs(&LIST_OFFSETS_TOPIC), ANY),
        Field("timeout_ms", I32, since(10)),
    ],
    tagged: &[],
};

static LIST_OFFSETS_TOPIC: Message = Message {
    fields: &[Field("name", String, ANY), Field("partitions", Structs(&LIST_OFFSETS_PARTITION), ANY)],
    tagged: &[],
};

static LIST_OFFSETS_PARTITION: Message = Message {
    fields: &[
        Field("partition_index", I32, ANY),
        Field("current_leader_epoch", I32, since(4)),
        Field("timestamp", I64, ANY),
    ],
    tagged: &[],
};

pub(super) static METADATA: Message = Message {
    fields: &[
        Field("topics", NullableStructs(&METADATA_TOPIC), ANY),
        Field("allow_auto_topic_creation", Bool, since(4)),
        Field("include_cluster_authorized_operations", Bool, between(8, 10)),
        Field("include_topic_authorized_operations", Bool, since(8)),
    ],
    tagged: &[],
};

static METADATA_TOPIC: Message = Message {
    fields: &[Field("topic_id", Uuid, since(10)), Field("name", NullableString, ANY)],
    tagged: &[],
};

pub(super) static API_VERSIONS: Message = Message {
    fields: &[
        Field("client_software_name", String, since(3)),
        Field("client_software_version", String, since(3)),
    ],
    tagged: &[],
};

pub(super) static DELETE_RECORDS: Message = Message {
    fields: &[Field("topics", Structs(&DELETE_RECORDS_TOPIC), ANY), Field("timeout_ms", I32, ANY)],
    tagged: &[],
};

static DELETE_RECORDS_TOPIC: Message = Message {
    fields: &[Field("name", String, ANY), Field("partitions", Structs(&DELETE_RECORDS_PARTITION), ANY)],
    tagged: &[],
};

static DELETE_RECORDS_PARTITION: Message =
    Message { fields: &[Field("partition_index", I32, ANY), Field("offset", I64, ANY)], tagged: &[] };

pub(super) static INIT_PRODUCER_ID: Message = Message {
    fields: &[
        Field("transactional_id", NullableString, ANY),
        Field("transaction_timeout_ms", I32, ANY),
        Field("producer_id", I64, since(3)),
        Field("producer_epoch", I16, since(3)),
    ],
    tagged: &[],
};

pub(super) static OFFSET_FOR_LEADER_EPOCH: Message = Message {
    fields: &[
        Field("replica_id", I32, since(3)),
        Field("topics", Structs(&OFFSET_FOR_LEADER_EPOCH_TOPIC), ANY),
    ],
    tagged: &[],
};

static OFFSET_FOR_LEADER_EPOCH_TOPIC: Message = Message {
    fields: &[
        Field("topic", String, ANY),
        Field("partitions", Structs(&OFFSET_FOR_LEADER_EPOCH_PARTITION), ANY),
    ],
    tagged: &[],
};

static OFFSET_FOR_LEADER_EPOCH_PARTITION: Message = Message {
    fields: &[
        Field("partition", I32, ANY),
        Field("current_leader_epoch", I32, ANY),
        Field("leader_epoch", I32, ANY),
    ],
    tagged: &[],
};
