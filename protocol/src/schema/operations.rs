//! Layout of the requests that operators' tools send: elections, reassignments, quotas, credentials, the quorum.

use super::Kind::*;
use super::{ANY, Field, Message, since};

pub(super) static DESCRIBE_ACLS: Message = Message {
    fields: &[
        Field("resource_type_filter", I8, ANY),
        Field("resource_name_filter", NullableString, ANY),
        Field("pattern_type_filter", I8, ANY),
        Field("principal_filter", NullableString, ANY),
        Field("host_filter", NullableString, ANY),
        Field("operation", I8, ANY),
        Field("permission_type", I8, ANY),
    ],
    tagged: &[],
};

pub(super) static ELECT_LEADERS: Message = Message {
    fields: &[
        Field("election_type", I8, since(1)),
        Field("topic_partitions", NullableStructs(&ELECT_LEADERS_TOPIC), ANY),
        Field("timeout_ms", I32, ANY),
    ],
    tagged: &[],
};

static ELECT_LEADERS_TOPIC: Message =
    Message { fields: &[Field("topic", String, ANY), Field("partitions", Int32s, ANY)], tagged: &[] };

pub(super) static ALTER_PARTITION_REASSIGNMENTS: Message = Message {
    fields: &[
        Field("timeout_ms", I32, ANY),
        Field("allow_replication_factor_change", Bool, since(1)),
        Field("topics", Structs(&ALTER_PARTITION_REASSIGNMENTS_TOPIC), ANY),
    ],
    tagged: &[],
};

static ALTER_PARTITION_REASSIGNMENTS_TOPIC: Message = Message {
    fields: &[
        Field("name", String, ANY),
        Field("partitions", Structs(&ALTER_PARTITION_REASSIGNMENTS_PARTITION), ANY),
    ],
    tagged: &[],
};

static ALTER_PARTITION_REASSIGNMENTS_PARTITION: Message = Message {
    fields: &[Field("partition_index", I32, ANY), Field("replicas", NullableInt32s, ANY)],
    tagged: &[],
};

pub(super) static LIST_PARTITION_REASSIGNMENTS: Message = Message {
    fields: &[
        Field("timeout_ms", I32, ANY),
        Field("topics", NullableStructs(&LIST_PARTITION_REASSIGNMENTS_TOPIC), ANY),
    ],
    tagged: &[],
};

static LIST_PARTITION_REASSIGNMENTS_TOPIC: Message =
    Message { fields: &[Field("name", String, ANY), Field("partition_indexes", Int32s, ANY)], tagged: &[] };

pub(super) static DESCRIBE_CLIENT_QUOTAS: Message = Message {
    fields: &[
        Field("components", Structs(&DESCRIBE_CLIENT_QUOTAS_COMPONENT), ANY),
        Field("strict", Bool, ANY),
    ],
    tagged: &[],
};

static DESCRIBE_CLIENT_QUOTAS_COMPONENT: Message = Message {
    fields: &[
        Field("entity_type", String, ANY),
        Field("match_type", I8, ANY),
        Field("match", NullableString, ANY),
    ],
    tagged: &[],
};

pub(super) static ALTER_CLIENT_QUOTAS: Message = Message {
    fields: &[Field("entries", Structs(&ALTER_CLIENT_QUOTAS_ENTRY), ANY), Field("validate_only", Bool, ANY)],
    tagged: &[],
};

static ALTER_CLIENT_QUOTAS_ENTRY: Message = Message {
    fields: &[
        Field("entity", Structs(&ALTER_CLIENT_QUOTAS_ENTITY), ANY),
        Field("ops", Structs(&ALTER_CLIENT_QUOTAS_OP), ANY),
    ],
    tagged: &[],
};

static ALTER_CLIENT_QUOTAS_ENTITY: Message = Message {
    fields: &[Field("entity_type", String, ANY), Field("entity_name", NullableString, ANY)],
    tagged: &[],
};

static ALTER_CLIENT_QUOTAS_OP: Message = Message {
    // The value is a double: any eight bytes are one.
    fields: &[Field("key", String, ANY), Field("value", I64, ANY), Field("remove", Bool, ANY)],
    tagged: &[],
};

pub(super) static DESCRIBE_USER_SCRAM_CREDENTIALS: Message = Message {
    fields: &[Field("users", NullableStructs(&DESCRIBE_USER_SCRAM_CREDENTIALS_USER), ANY)],
    tagged: &[],
};

static DESCRIBE_USER_SCRAM_CREDENTIALS_USER: Message =
    Message { fields: &[Field("name", String, ANY)], tagged: &[] };

pub(super) static DESCRIBE_QUORUM: Message =
    Message { fields: &[Field("topics", Structs(&DESCRIBE_QUORUM_TOPIC), ANY)], tagged: &[] };

static DESCRIBE_QUORUM_TOPIC: Message = Message {
    fields: &[
        Field("topic_name", String, ANY),
        Field("partitions", Structs(&DESCRIBE_QUORUM_PARTITION), ANY),
    ],
    tagged: &[],
};

static DESCRIBE_QUORUM_PARTITION: Message =
    Message { fields: &[Field("partition_index", I32, ANY)], tagged: &[] };

pub(super) static DESCRIBE_PRODUCERS: Message =
    Message { fields: &[Field("topics", Structs(&DESCRIBE_PRODUCERS_TOPIC), ANY)], tagged: &[] };

static DESCRIBE_PRODUCERS_TOPIC: Message =
    Message { fields: &[Field("name", String, ANY), Field("partition_indexes", Int32s, ANY)], tagged: &[] };

pub(super) static LIST_CONFIG_RESOURCES: Message =
    Message { fields: &[Field("resource_types", Int8s, since(1))], tagged: &[] };
