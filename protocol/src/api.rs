//! Which Kafka requests this broker speaks: keys, names, version ranges, and where flexible encoding begins.
//!
//! One coherent release is advertised, Kafka 4.1. A request key that is absent here is answered by closing the
//! connection, as Kafka does; what a request does is decided by its handler.

/// One request type. Versions from `first_flexible` on use compact lengths and tagged fields; `i16::MAX` = never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiSpec {
    pub key: i16,
    pub name: &'static str,
    pub min_version: i16,
    pub max_version: i16,
    pub first_flexible: i16,
}

/// `first_flexible` of a request that has no flexible version.
pub const NEVER_FLEXIBLE: i16 = i16::MAX;

/// The oldest Produce that is decoded. Older ones are advertised all the same, because librdkafka picks its message
/// format from the advertised range (KAFKA-18659).
pub const PRODUCE_DECODED_MIN_VERSION: i16 = 3;

pub const PRODUCE: i16 = 0;
pub const FETCH: i16 = 1;
pub const LIST_OFFSETS: i16 = 2;
pub const METADATA: i16 = 3;
pub const OFFSET_COMMIT: i16 = 8;
pub const OFFSET_FETCH: i16 = 9;
pub const FIND_COORDINATOR: i16 = 10;
pub const JOIN_GROUP: i16 = 11;
pub const HEARTBEAT: i16 = 12;
pub const LEAVE_GROUP: i16 = 13;
pub const SYNC_GROUP: i16 = 14;
pub const DESCRIBE_GROUPS: i16 = 15;
pub const LIST_GROUPS: i16 = 16;
pub const API_VERSIONS: i16 = 18;
pub const CREATE_TOPICS: i16 = 19;
pub const DELETE_TOPICS: i16 = 20;
pub const DELETE_RECORDS: i16 = 21;
pub const INIT_PRODUCER_ID: i16 = 22;
pub const OFFSET_FOR_LEADER_EPOCH: i16 = 23;
pub const DESCRIBE_ACLS: i16 = 29;
pub const DESCRIBE_CONFIGS: i16 = 32;
pub const ALTER_CONFIGS: i16 = 33;
pub const DESCRIBE_LOG_DIRS: i16 = 35;
pub const CREATE_PARTITIONS: i16 = 37;
pub const DELETE_GROUPS: i16 = 42;
pub const ELECT_LEADERS: i16 = 43;
pub const INCREMENTAL_ALTER_CONFIGS: i16 = 44;
pub const ALTER_PARTITION_REASSIGNMENTS: i16 = 45;
pub const LIST_PARTITION_REASSIGNMENTS: i16 = 46;
pub const OFFSET_DELETE: i16 = 47;
pub const DESCRIBE_CLIENT_QUOTAS: i16 = 48;
pub const ALTER_CLIENT_QUOTAS: i16 = 49;
pub const DESCRIBE_USER_SCRAM_CREDENTIALS: i16 = 50;
pub const DESCRIBE_QUORUM: i16 = 55;
pub const DESCRIBE_CLUSTER: i16 = 60;
pub const DESCRIBE_PRODUCERS: i16 = 61;
pub const LIST_CONFIG_RESOURCES: i16 = 74;
pub const DESCRIBE_TOPIC_PARTITIONS: i16 = 75;

const fn api(key: i16, name: &'static str, versions: (i16, i16), first_flexible: i16) -> ApiSpec {
    ApiSpec { key, name, min_version: versions.0, max_version: versions.1, first_flexible }
}

/// Every request served, sorted by key; ApiVersions answers with exactly this.
pub const SERVED: &[ApiSpec] = &[
    api(PRODUCE, "Produce", (0, 13), 9),
    api(FETCH, "Fetch", (4, 18), 12),
    api(LIST_OFFSETS, "ListOffsets", (1, 10), 6),
    api(METADATA, "Metadata", (0, 13), 9),
    api(OFFSET_COMMIT, "OffsetCommit", (2, 9), 8),
    api(OFFSET_FETCH, "OffsetFetch", (1, 9), 6),
    api(FIND_COORDINATOR, "FindCoordinator", (0, 6), 3),
    api(JOIN_GROUP, "JoinGroup", (0, 9), 6),
    api(HEARTBEAT, "Heartbeat", (0, 4), 4),
    api(LEAVE_GROUP, "LeaveGroup", (0, 5), 4),
    api(SYNC_GROUP, "SyncGroup", (0, 5), 4),
    api(DESCRIBE_GROUPS, "DescribeGroups", (0, 6), 5),
    api(LIST_GROUPS, "ListGroups", (0, 5), 3),
    api(API_VERSIONS, "ApiVersions", (0, 4), 3),
    api(CREATE_TOPICS, "CreateTopics", (2, 7), 5),
    api(DELETE_TOPICS, "DeleteTopics", (1, 6), 4),
    api(DELETE_RECORDS, "DeleteRecords", (0, 2), 2),
    api(INIT_PRODUCER_ID, "InitProducerId", (0, 5), 2),
    api(OFFSET_FOR_LEADER_EPOCH, "OffsetForLeaderEpoch", (2, 4), 4),
    api(DESCRIBE_ACLS, "DescribeAcls", (1, 3), 2),
    api(DESCRIBE_CONFIGS, "DescribeConfigs", (1, 4), 4),
    api(ALTER_CONFIGS, "AlterConfigs", (0, 2), 2),
    api(DESCRIBE_LOG_DIRS, "DescribeLogDirs", (1, 4), 2),
    api(CREATE_PARTITIONS, "CreatePartitions", (0, 3), 2),
    api(DELETE_GROUPS, "DeleteGroups", (0, 2), 2),
    api(ELECT_LEADERS, "ElectLeaders", (0, 2), 2),
    api(INCREMENTAL_ALTER_CONFIGS, "IncrementalAlterConfigs", (0, 1), 1),
    api(ALTER_PARTITION_REASSIGNMENTS, "AlterPartitionReassignments", (0, 1), 0),
    api(LIST_PARTITION_REASSIGNMENTS, "ListPartitionReassignments", (0, 0), 0),
    api(OFFSET_DELETE, "OffsetDelete", (0, 0), NEVER_FLEXIBLE),
    api(DESCRIBE_CLIENT_QUOTAS, "DescribeClientQuotas", (0, 1), 1),
    api(ALTER_CLIENT_QUOTAS, "AlterClientQuotas", (0, 1), 1),
    api(DESCRIBE_USER_SCRAM_CREDENTIALS, "DescribeUserScramCredentials", (0, 0), 0),
    api(DESCRIBE_QUORUM, "DescribeQuorum", (0, 2), 0),
    api(DESCRIBE_CLUSTER, "DescribeCluster", (0, 2), 0),
    api(DESCRIBE_PRODUCERS, "DescribeProducers", (0, 0), 0),
    api(LIST_CONFIG_RESOURCES, "ListConfigResources", (0, 1), 0),
    api(DESCRIBE_TOPIC_PARTITIONS, "DescribeTopicPartitions", (0, 0), 0),
];

pub fn spec(key: i16) -> Option<&'static ApiSpec> {
    SERVED.binary_search_by_key(&key, |spec| spec.key).ok().and_then(|at| SERVED.get(at))
}

/// Whether a request of this key and version is decoded. Narrower than what is advertised for Produce only.
pub fn supports(key: i16, version: i16) -> bool {
    if key == PRODUCE && version < PRODUCE_DECODED_MIN_VERSION {
        return false;
    }
    spec(key).is_some_and(|spec| (spec.min_version..=spec.max_version).contains(&version))
}

/// Whether the response header carries tagged fields. ApiVersions never does: a client reads that answer before it
/// knows what the broker speaks.
pub fn response_header_is_flexible(key: i16, version: i16) -> bool {
    key != API_VERSIONS && spec(key).is_some_and(|spec| version >= spec.first_flexible)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_ranges_make_sense() {
        assert!(SERVED.is_sorted_by(|a, b| a.key < b.key));
        for spec in SERVED {
            assert!(0 <= spec.min_version && spec.min_version <= spec.max_version, "{}", spec.name);
            assert_eq!(super::spec(spec.key), Some(spec));
        }
    }

    #[test]
    fn table_agrees_with_the_generated_messages() {
        use kafka_protocol::messages::ApiKey;
        for spec in SERVED {
            let key = ApiKey::try_from(spec.key).expect("known to kafka-protocol");
            assert_eq!(format!("{key:?}"), spec.name);
            let carried = key.valid_versions();
            let decoded_min =
                if spec.key == PRODUCE { PRODUCE_DECODED_MIN_VERSION } else { spec.min_version };
            assert!(carried.min <= decoded_min && spec.max_version <= carried.max, "{}", spec.name);
            for version in decoded_min..=spec.max_version {
                let flexible = version >= spec.first_flexible;
                assert_eq!(
                    key.request_header_version(version),
                    if flexible { 2 } else { 1 },
                    "{}",
                    spec.name
                );
                let response = i16::from(response_header_is_flexible(spec.key, version));
                assert_eq!(key.response_header_version(version), response, "{} {version}", spec.name);
            }
        }
    }

    #[test]
    fn produce_is_advertised_wider_than_it_is_served() {
        assert_eq!(spec(PRODUCE).map(|spec| spec.min_version), Some(0));
        assert!(
            !supports(PRODUCE, 2) && supports(PRODUCE, 3) && supports(PRODUCE, 13) && !supports(PRODUCE, 14)
        );
        assert!(!supports(4, 0) && !supports(-1, 0) && !supports(FETCH, -1));
    }
}
