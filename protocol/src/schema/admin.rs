//! Layout of the requests that look after topics, configs and the cluster. Field order is wire order.

use super::Kind::*;
use super::{ANY, Field, Message, since, until};

pub(super) static CREATE_TOPICS: Message = Message {
    fields: &[
        Field("topics", Structs(&CREATE_TOPICS_TOPIC), ANY),
        Field("timeout_ms", I32, ANY),
        Field("validate_only", Bool, ANY),
    ],
    tagged: &[],
};

static CREATE_TOPICS_TOPIC: Message = Message {
    fields: &[
        Field("name", String, ANY),
        Field("num_partitions", I32, ANY),
        Field("replication_factor", I16, ANY),
        Field("assignments", Structs(&CREATE_TOPICS_ASSIGNMENT), ANY),
        Field("configs", Structs(&CREATE_TOPICS_CONFIG), ANY),
    ],
    tagged: &[],
};

static CREATE_TOPICS_ASSIGNMENT: Message =
    Message { fields: &[Field("partition_index", I32, ANY), Field("broker_ids", Int32s, ANY)], tagged: &[] };

static CREATE_TOPICS_CONFIG: Message =
    Message { fields: &[Field("name", String, ANY), Field("value", NullableString, ANY)], tagged: &[] };

pub(super) static DELETE_TOPICS: Message = Message {
    fields: &[
        Field("topics", Structs(&DELETE_TOPICS_TOPIC), since(6)),
        Field("topic_names", Strings, until(5)),
        Field("timeout_ms", I32, ANY),
    ],
    tagged: &[],
};

static DELETE_TOPICS_TOPIC: Message = Message {
    fields: &[Field("name", NullableString, since(6)), Field("topic_id", Uuid, since(6))],
    tagged: &[],
};

pub(super) static DESCRIBE_CONFIGS: Message = Message {
    fields: &[
        Field("resources", Structs(&DESCRIBE_CONFIGS_RESOURCE), ANY),
        Field("include_synonyms", Bool, ANY),
        Field("include_documentation", Bool, since(3)),
    ],
    tagged: &[],
};

static DESCRIBE_CONFIGS_RESOURCE: Message = Message {
    fields: &[
        Field("resource_type", I8, ANY),
        Field("resource_name", String, ANY),
        Field("configuration_keys", NullableStrings, ANY),
    ],
    tagged: &[],
};

pub(super) static ALTER_CONFIGS: Message = Message {
    fields: &[Field("resources", Structs(&ALTER_CONFIGS_RESOURCE), ANY), Field("validate_only", Bool, ANY)],
    tagged: &[],
};

static ALTER_CONFIGS_RESOURCE: Message = Message {
    fields: &[
        Field("resource_type", I8, ANY),
        Field("resource_name", String, ANY),
        Field("configs", Structs(&ALTER_CONFIGS_CONFIG), ANY),
    ],
    tagged: &[],
};

static ALTER_CONFIGS_CONFIG: Message =
    Message { fields: &[Field("name", String, ANY), Field("value", NullableString, ANY)], tagged: &[] };

pub(super) static DESCRIBE_LOG_DIRS: Message =
    Message { fields: &[Field("topics", NullableStructs(&DESCRIBE_LOG_DIRS_TOPIC), ANY)], tagged: &[] };

static DESCRIBE_LOG_DIRS_TOPIC: Message =
    Message { fields: &[Field("topic", String, ANY), Field("partitions", Int32s, ANY)], tagged: &[] };

pub(super) static CREATE_PARTITIONS: Message = Message {
    fields: &[
        Field("topics", Structs(&CREATE_PARTITIONS_TOPIC), ANY),
        Field("timeout_ms", I32, ANY),
        Field("validate_only", Bool, ANY),
    ],
    tagged: &[],
};

static CREATE_PARTITIONS_TOPIC: Message = Message {
    fields: &[
        Field("name", String, ANY),
        Field("count", I32, ANY),
        Field("assignments", NullableStructs(&CREATE_PARTITIONS_ASSIGNMENT), ANY),
    ],
    tagged: &[],
};

static CREATE_PARTITIONS_ASSIGNMENT: Message =
    Message { fields: &[Field("broker_ids", Int32s, ANY)], tagged: &[] };

pub(super) static INCREMENTAL_ALTER_CONFIGS: Message = Message {
    fields: &[
        Field("resources", Structs(&INCREMENTAL_ALTER_CONFIGS_RESOURCE), ANY),
        Field("validate_only", Bool, ANY),
    ],
    tagged: &[],
};

static INCREMENTAL_ALTER_CONFIGS_RESOURCE: Message = Message {
    fields: &[
        Field("resource_type", I8, ANY),
        Field("resource_name", String, ANY),
        Field("configs", Structs(&INCREMENTAL_ALTER_CONFIGS_CONFIG), ANY),
    ],
    tagged: &[],
};

static INCREMENTAL_ALTER_CONFIGS_CONFIG: Message = Message {
    fields: &[
        Field("name", String, ANY),
        Field("config_operation", I8, ANY),
        Field("value", NullableString, ANY),
    ],
    tagged: &[],
};

pub(super) static DESCRIBE_CLUSTER: Message = Message {
    fields: &[
        Field("include_cluster_authorized_operations", Bool, ANY),
        Field("endpoint_type", I8, since(1)),
        Field("include_fenced_brokers", Bool, since(2)),
    ],
    tagged: &[],
};

pub(super) static DESCRIBE_TOPIC_PARTITIONS: Message = Message {
    fields: &[
        Field("topics", Structs(&DESCRIBE_TOPIC_PARTITIONS_TOPIC), ANY),
        Field("response_partition_limit", I32, ANY),
        Field("cursor", NullableStruct(&DESCRIBE_TOPIC_PARTITIONS_CURSOR), ANY),
    ],
    tagged: &[],
};

static DESCRIBE_TOPIC_PARTITIONS_TOPIC: Message =
    Message { fields: &[Field("name", String, ANY)], tagged: &[] };

static DESCRIBE_TOPIC_PARTITIONS_CURSOR: Message =
    Message { fields: &[Field("topic_name", String, ANY), Field("partition_index", I32, ANY)], tagged: &[] };
