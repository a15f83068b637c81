//! Shared by the integration tests: rich and default requests of every served key and version, seeded randomness,
//! and the mutations that hostile input is made of.
#![allow(dead_code)]

use bytes::{Bytes, BytesMut};
use flumen_protocol::api;
use kafka_protocol::messages::*;
use kafka_protocol::protocol::StrBytes;
use uuid::Uuid;

/// Every (key, version) that is decoded behind the guard.
pub fn guarded_versions() -> impl Iterator<Item = (i16, i16)> {
    api::SERVED
        .iter()
        .filter(|spec| spec.key != api::PRODUCE)
        .flat_map(|spec| (spec.min_version..=spec.max_version).map(|version| (spec.key, version)))
}

mod operations;

pub fn s(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_owned())
}

fn topic(text: &str) -> TopicName {
    TopicName(s(text))
}

fn group(text: &str) -> GroupId {
    GroupId(s(text))
}

const ID: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
const TAG: i32 = 100;

fn tag() -> Bytes {
    Bytes::from_static(b"tagged")
}

pub fn encode(request: &RequestKind, version: i16) -> Bytes {
    let mut body = BytesMut::new();
    request.encode(&mut body, version).expect("encodes");
    body.freeze()
}

/// A request with nothing set.
pub fn default_request(key: i16) -> RequestKind {
    match key {
        api::FETCH => RequestKind::Fetch(Default::default()),
        api::LIST_OFFSETS => RequestKind::ListOffsets(Default::default()),
        api::METADATA => RequestKind::Metadata(Default::default()),
        api::OFFSET_COMMIT => RequestKind::OffsetCommit(Default::default()),
        api::OFFSET_FETCH => RequestKind::OffsetFetch(Default::default()),
        api::FIND_COORDINATOR => RequestKind::FindCoordinator(Default::default()),
        api::JOIN_GROUP => RequestKind::JoinGroup(Default::default()),
        api::HEARTBEAT => RequestKind::Heartbeat(Default::default()),
        api::LEAVE_GROUP => RequestKind::LeaveGroup(Default::default()),
        api::SYNC_GROUP => RequestKind::SyncGroup(Default::default()),
        api::DESCRIBE_GROUPS => RequestKind::DescribeGroups(Default::default()),
        api::LIST_GROUPS => RequestKind::ListGroups(Default::default()),
        api::API_VERSIONS => RequestKind::ApiVersions(Default::default()),
        api::CREATE_TOPICS => RequestKind::CreateTopics(Default::default()),
        api::DELETE_TOPICS => RequestKind::DeleteTopics(Default::default()),
        api::DELETE_RECORDS => RequestKind::DeleteRecords(Default::default()),
        api::INIT_PRODUCER_ID => RequestKind::InitProducerId(Default::default()),
        api::OFFSET_FOR_LEADER_EPOCH => RequestKind::OffsetForLeaderEpoch(Default::default()),
        api::DESCRIBE_CONFIGS => RequestKind::DescribeConfigs(Default::default()),
        api::ALTER_CONFIGS => RequestKind::AlterConfigs(Default::default()),
        api::DESCRIBE_LOG_DIRS => RequestKind::DescribeLogDirs(Default::default()),
        api::CREATE_PARTITIONS => RequestKind::CreatePartitions(Default::default()),
        api::DELETE_GROUPS => RequestKind::DeleteGroups(Default::default()),
        api::INCREMENTAL_ALTER_CONFIGS => RequestKind::IncrementalAlterConfigs(Default::default()),
        api::OFFSET_DELETE => RequestKind::OffsetDelete(Default::default()),
        api::DESCRIBE_CLUSTER => RequestKind::DescribeCluster(Default::default()),
        api::DESCRIBE_TOPIC_PARTITIONS => RequestKind::DescribeTopicPartitions(Default::default()),
        api::DESCRIBE_ACLS => RequestKind::DescribeAcls(Default::default()),
        api::ELECT_LEADERS => RequestKind::ElectLeaders(Default::default()),
        api::ALTER_PARTITION_REASSIGNMENTS => RequestKind::AlterPartitionReassignments(Default::default()),
        api::LIST_PARTITION_REASSIGNMENTS => RequestKind::ListPartitionReassignments(Default::default()),
        api::DESCRIBE_CLIENT_QUOTAS => RequestKind::DescribeClientQuotas(Default::default()),
        api::ALTER_CLIENT_QUOTAS => RequestKind::AlterClientQuotas(Default::default()),
        api::DESCRIBE_USER_SCRAM_CREDENTIALS => RequestKind::DescribeUserScramCredentials(Default::default()),
        api::DESCRIBE_QUORUM => RequestKind::DescribeQuorum(Default::default()),
        api::DESCRIBE_PRODUCERS => RequestKind::DescribeProducers(Default::default()),
        api::LIST_CONFIG_RESOURCES => RequestKind::ListConfigResources(Default::default()),
        other => panic!("no default request for key {other}"),
    }
}

/// A request with every field of its version set, arrays of two and more, and unknown tags at every level.
pub fn rich_request(key: i16, v: i16) -> RequestKind {
    match key {
        api::FETCH => RequestKind::Fetch(rich_fetch(v)),
        api::LIST_OFFSETS => RequestKind::ListOffsets(rich_list_offsets(v)),
        api::METADATA => RequestKind::Metadata(rich_metadata(v)),
        api::OFFSET_COMMIT => RequestKind::OffsetCommit(rich_offset_commit(v)),
        api::OFFSET_FETCH => RequestKind::OffsetFetch(rich_offset_fetch(v)),
        api::FIND_COORDINATOR => RequestKind::FindCoordinator(rich_find_coordinator(v)),
        api::JOIN_GROUP => RequestKind::JoinGroup(rich_join_group(v)),
        api::HEARTBEAT => RequestKind::Heartbeat(
            HeartbeatRequest::default()
                .with_group_id(group("payments"))
                .with_generation_id(7)
                .with_member_id(s("member-1"))
                .with_group_instance_id((v >= 3).then(|| s("instance-1")))
                .with_unknown_tagged_field(TAG, tag()),
        ),
        api::LEAVE_GROUP => RequestKind::LeaveGroup(rich_leave_group(v)),
        api::SYNC_GROUP => RequestKind::SyncGroup(rich_sync_group(v)),
        api::DESCRIBE_GROUPS => RequestKind::DescribeGroups(
            DescribeGroupsRequest::default()
                .with_groups(vec![group("payments"), group("billing"), group("export.clicks")])
                .with_include_authorized_operations(v >= 3)
                .with_unknown_tagged_field(TAG, tag()),
        ),
        api::LIST_GROUPS => {
            let mut request = ListGroupsRequest::default().with_unknown_tagged_field(TAG, tag());
            if v >= 4 {
                request = request.with_states_filter(vec![s("Stable"), s("Empty")]);
            }
            if v >= 5 {
                request = request.with_types_filter(vec![s("classic"), s("consumer")]);
            }
            RequestKind::ListGroups(request)
        }
        api::API_VERSIONS => RequestKind::ApiVersions(
            ApiVersionsRequest::default()
                .with_client_software_name(s("a-client"))
                .with_client_software_version(s("1.2.3"))
                .with_unknown_tagged_field(TAG, tag()),
        ),
        api::CREATE_TOPICS => RequestKind::CreateTopics(rich_create_topics()),
        api::DELETE_TOPICS => RequestKind::DeleteTopics(rich_delete_topics(v)),
        api::DELETE_RECORDS => RequestKind::DeleteRecords(rich_delete_records()),
        api::INIT_PRODUCER_ID => {
            let mut request = InitProducerIdRequest::default()
                .with_transactional_id(Some(TransactionalId(s("tx-1"))))
                .with_transaction_timeout_ms(60_000)
                .with_unknown_tagged_field(TAG, tag());
            if v >= 3 {
                request = request.with_producer_id(ProducerId(5)).with_producer_epoch(2);
            }
            RequestKind::InitProducerId(request)
        }
        api::OFFSET_FOR_LEADER_EPOCH => RequestKind::OffsetForLeaderEpoch(rich_offset_for_leader_epoch(v)),
        api::DESCRIBE_CONFIGS => RequestKind::DescribeConfigs(rich_describe_configs(v)),
        api::ALTER_CONFIGS => RequestKind::AlterConfigs(rich_alter_configs()),
        api::DESCRIBE_LOG_DIRS => RequestKind::DescribeLogDirs(rich_describe_log_dirs()),
        api::CREATE_PARTITIONS => RequestKind::CreatePartitions(rich_create_partitions()),
        api::DELETE_GROUPS => RequestKind::DeleteGroups(
            DeleteGroupsRequest::default()
                .with_groups_names(vec![group("old-1"), group("old-2"), group("")])
                .with_unknown_tagged_field(TAG, tag()),
        ),
        api::INCREMENTAL_ALTER_CONFIGS => {
            RequestKind::IncrementalAlterConfigs(rich_incremental_alter_configs())
        }
        api::OFFSET_DELETE => RequestKind::OffsetDelete(rich_offset_delete()),
        api::DESCRIBE_CLUSTER => {
            let mut request = DescribeClusterRequest::default()
                .with_include_cluster_authorized_operations(true)
                .with_include_fenced_brokers(v >= 2)
                .with_unknown_tagged_field(TAG, tag());
            if v >= 1 {
                request = request.with_endpoint_type(2);
            }
            RequestKind::DescribeCluster(request)
        }
        api::DESCRIBE_TOPIC_PARTITIONS => {
            RequestKind::DescribeTopicPartitions(rich_describe_topic_partitions())
        }
        other => operations::rich_request(other, v),
    }
}

fn rich_fetch(v: i16) -> FetchRequest {
    use fetch_request::*;
    let partition = |index: i32| {
        let mut partition = FetchPartition::default()
            .with_partition(index)
            .with_current_leader_epoch(3)
            .with_fetch_offset(1000)
            .with_log_start_offset(5)
            .with_partition_max_bytes(1 << 20)
            .with_unknown_tagged_field(TAG, tag());
        if v >= 12 {
            partition = partition.with_last_fetched_epoch(2);
        }
        if v >= 17 {
            partition = partition.with_replica_directory_id(ID);
        }
        if v >= 18 {
            partition = partition.with_high_watermark(999);
        }
        partition
    };
    let fetch_topic = |name: &str| {
        FetchTopic::default()
            .with_topic(topic(name))
            .with_topic_id(ID)
            .with_partitions(vec![partition(0), partition(1), partition(2)])
            .with_unknown_tagged_field(TAG, tag())
    };
    let mut request = FetchRequest::default()
        .with_max_wait_ms(500)
        .with_min_bytes(1)
        .with_max_bytes(50 << 20)
        .with_isolation_level(1)
        .with_topics(vec![fetch_topic("clicks"), fetch_topic("orders")])
        .with_rack_id(s("rack-1"))
        .with_unknown_tagged_field(TAG, tag());
    if v >= 7 {
        let forgotten = |name: &str| {
            ForgottenTopic::default()
                .with_topic(topic(name))
                .with_topic_id(ID)
                .with_partitions(vec![4, 5])
                .with_unknown_tagged_field(TAG, tag())
        };
        request = request
            .with_session_id(9)
            .with_session_epoch(10)
            .with_forgotten_topics_data(vec![forgotten("gone"), forgotten("lost")]);
    }
    if v <= 14 {
        request = request.with_replica_id(BrokerId(2));
    } else {
        let state = ReplicaState::default()
            .with_replica_id(BrokerId(2))
            .with_replica_epoch(77)
            .with_unknown_tagged_field(TAG, tag());
        request = request.with_replica_state(state);
    }
    if v >= 12 {
        request = request.with_cluster_id(Some(s("cluster-1")));
    }
    request
}

fn rich_list_offsets(v: i16) -> ListOffsetsRequest {
    use list_offsets_request::*;
    let partition = |index| {
        ListOffsetsPartition::default()
            .with_partition_index(index)
            .with_current_leader_epoch(4)
            .with_timestamp(-1)
            .with_unknown_tagged_field(TAG, tag())
    };
    let entry = |name: &str| {
        ListOffsetsTopic::default()
            .with_name(topic(name))
            .with_partitions(vec![partition(0), partition(1)])
            .with_unknown_tagged_field(TAG, tag())
    };
    ListOffsetsRequest::default()
        .with_replica_id(BrokerId(-1))
        .with_isolation_level(i8::from(v >= 2))
        .with_topics(vec![entry("clicks"), entry("orders")])
        .with_timeout_ms(1000)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_metadata(v: i16) -> MetadataRequest {
    use metadata_request::MetadataRequestTopic;
    let entry = |name: &str| {
        let mut entry = MetadataRequestTopic::default()
            .with_name(Some(topic(name)))
            .with_unknown_tagged_field(TAG, tag());
        if v >= 10 {
            entry = entry.with_topic_id(ID);
        }
        entry
    };
    let mut topics = vec![entry("clicks"), entry("orders")];
    if v >= 10 {
        topics.push(entry("x").with_name(None));
    }
    MetadataRequest::default()
        .with_topics(Some(topics))
        .with_allow_auto_topic_creation(v < 4)
        .with_include_cluster_authorized_operations((8..=10).contains(&v))
        .with_include_topic_authorized_operations(v >= 8)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_offset_commit(v: i16) -> OffsetCommitRequest {
    use offset_commit_request::*;
    let partition = |index, metadata: Option<&str>| {
        OffsetCommitRequestPartition::default()
            .with_partition_index(index)
            .with_committed_offset(1234)
            .with_committed_leader_epoch(3)
            .with_committed_metadata(metadata.map(s))
            .with_unknown_tagged_field(TAG, tag())
    };
    let entry = |name: &str| {
        OffsetCommitRequestTopic::default()
            .with_name(topic(name))
            .with_partitions(vec![partition(0, Some("note")), partition(1, None)])
            .with_unknown_tagged_field(TAG, tag())
    };
    OffsetCommitRequest::default()
        .with_group_id(group("payments"))
        .with_generation_id_or_member_epoch(7)
        .with_member_id(s("member-1"))
        .with_group_instance_id((v >= 7).then(|| s("instance-1")))
        .with_retention_time_ms(1000)
        .with_topics(vec![entry("clicks"), entry("orders")])
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_offset_fetch(v: i16) -> OffsetFetchRequest {
    use offset_fetch_request::*;
    let mut request =
        OffsetFetchRequest::default().with_require_stable(v >= 7).with_unknown_tagged_field(TAG, tag());
    if v <= 7 {
        let entry = |name: &str| {
            OffsetFetchRequestTopic::default()
                .with_name(topic(name))
                .with_partition_indexes(vec![0, 1, 2])
                .with_unknown_tagged_field(TAG, tag())
        };
        return request
            .with_group_id(group("payments"))
            .with_topics(Some(vec![entry("clicks"), entry("orders")]));
    }
    let entry = |name: &str| {
        OffsetFetchRequestTopics::default()
            .with_name(topic(name))
            .with_partition_indexes(vec![0, 1, 2])
            .with_unknown_tagged_field(TAG, tag())
    };
    let member = |name: &str| {
        let mut member = OffsetFetchRequestGroup::default()
            .with_group_id(group(name))
            .with_topics(Some(vec![entry("clicks"), entry("orders")]))
            .with_unknown_tagged_field(TAG, tag());
        if v >= 9 {
            member = member.with_member_id(Some(s("member-1"))).with_member_epoch(4);
        }
        member
    };
    request = request.with_groups(vec![member("payments"), member("billing").with_topics(None)]);
    request
}

fn rich_find_coordinator(v: i16) -> FindCoordinatorRequest {
    let mut request = FindCoordinatorRequest::default()
        .with_key_type(i8::from(v >= 1))
        .with_unknown_tagged_field(TAG, tag());
    if v <= 3 {
        request = request.with_key(s("payments"));
    } else {
        request = request.with_coordinator_keys(vec![s("payments"), s("billing")]);
    }
    request
}

fn rich_join_group(v: i16) -> JoinGroupRequest {
    use join_group_request::JoinGroupRequestProtocol;
    let protocol = |name: &str| {
        JoinGroupRequestProtocol::default()
            .with_name(s(name))
            .with_metadata(Bytes::from_static(b"subscription bytes"))
            .with_unknown_tagged_field(TAG, tag())
    };
    JoinGroupRequest::default()
        .with_group_id(group("payments"))
        .with_session_timeout_ms(45_000)
        .with_rebalance_timeout_ms(300_000)
        .with_member_id(s("member-1"))
        .with_group_instance_id((v >= 5).then(|| s("instance-1")))
        .with_protocol_type(s("consumer"))
        .with_protocols(vec![protocol("range"), protocol("cooperative-sticky")])
        .with_reason((v >= 8).then(|| s("rejoin")))
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_leave_group(v: i16) -> LeaveGroupRequest {
    use leave_group_request::MemberIdentity;
    let member = |name: &str| {
        MemberIdentity::default()
            .with_member_id(s(name))
            .with_group_instance_id(Some(s("instance-1")))
            .with_reason((v >= 5).then(|| s("closing")))
            .with_unknown_tagged_field(TAG, tag())
    };
    let request =
        LeaveGroupRequest::default().with_group_id(group("payments")).with_unknown_tagged_field(TAG, tag());
    if v <= 2 {
        request.with_member_id(s("m"))
    } else {
        request.with_members(vec![member("m-1"), member("m-2")])
    }
}

fn rich_sync_group(v: i16) -> SyncGroupRequest {
    use sync_group_request::SyncGroupRequestAssignment;
    let assignment = |name: &str| {
        SyncGroupRequestAssignment::default()
            .with_member_id(s(name))
            .with_assignment(Bytes::from_static(b"assignment bytes"))
            .with_unknown_tagged_field(TAG, tag())
    };
    SyncGroupRequest::default()
        .with_group_id(group("payments"))
        .with_generation_id(8)
        .with_member_id(s("m-1"))
        .with_group_instance_id((v >= 3).then(|| s("instance-1")))
        .with_protocol_type((v >= 5).then(|| s("consumer")))
        .with_protocol_name((v >= 5).then(|| s("range")))
        .with_assignments(vec![assignment("m-1"), assignment("m-2")])
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_create_topics() -> CreateTopicsRequest {
    use create_topics_request::*;
    let assignment = |index| {
        CreatableReplicaAssignment::default()
            .with_partition_index(index)
            .with_broker_ids(vec![BrokerId(1), BrokerId(2), BrokerId(3)])
            .with_unknown_tagged_field(TAG, tag())
    };
    let config = |name: &str, value: Option<&str>| {
        CreatableTopicConfig::default()
            .with_name(s(name))
            .with_value(value.map(s))
            .with_unknown_tagged_field(TAG, tag())
    };
    let entry = |name: &str| {
        CreatableTopic::default()
            .with_name(topic(name))
            .with_num_partitions(-1)
            .with_replication_factor(-1)
            .with_assignments(vec![assignment(0), assignment(1)])
            .with_configs(vec![config("cleanup.policy", Some("compact")), config("retention.ms", None)])
            .with_unknown_tagged_field(TAG, tag())
    };
    CreateTopicsRequest::default()
        .with_topics(vec![entry("clicks"), entry("orders")])
        .with_timeout_ms(30_000)
        .with_validate_only(true)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_delete_topics(v: i16) -> DeleteTopicsRequest {
    use delete_topics_request::DeleteTopicState;
    let request =
        DeleteTopicsRequest::default().with_timeout_ms(30_000).with_unknown_tagged_field(TAG, tag());
    if v <= 5 {
        return request.with_topic_names(vec![topic("clicks"), topic("orders")]);
    }
    let state = |name: Option<&str>| {
        DeleteTopicState::default()
            .with_name(name.map(topic))
            .with_topic_id(ID)
            .with_unknown_tagged_field(TAG, tag())
    };
    request.with_topics(vec![state(Some("clicks")), state(None)])
}

fn rich_delete_records() -> DeleteRecordsRequest {
    use delete_records_request::*;
    let partition = |index| {
        DeleteRecordsPartition::default()
            .with_partition_index(index)
            .with_offset(100)
            .with_unknown_tagged_field(TAG, tag())
    };
    let entry = |name: &str| {
        DeleteRecordsTopic::default()
            .with_name(topic(name))
            .with_partitions(vec![partition(0), partition(1)])
            .with_unknown_tagged_field(TAG, tag())
    };
    DeleteRecordsRequest::default()
        .with_topics(vec![entry("clicks"), entry("orders")])
        .with_timeout_ms(1000)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_offset_for_leader_epoch(v: i16) -> OffsetForLeaderEpochRequest {
    use offset_for_leader_epoch_request::*;
    let partition = |index| {
        OffsetForLeaderPartition::default()
            .with_partition(index)
            .with_current_leader_epoch(5)
            .with_leader_epoch(4)
            .with_unknown_tagged_field(TAG, tag())
    };
    let entry = |name: &str| {
        OffsetForLeaderTopic::default()
            .with_topic(topic(name))
            .with_partitions(vec![partition(0), partition(1)])
            .with_unknown_tagged_field(TAG, tag())
    };
    let request = OffsetForLeaderEpochRequest::default()
        .with_topics(vec![entry("clicks"), entry("orders")])
        .with_unknown_tagged_field(TAG, tag());
    if v >= 3 { request.with_replica_id(BrokerId(-1)) } else { request }
}

fn rich_describe_configs(v: i16) -> DescribeConfigsRequest {
    use describe_configs_request::DescribeConfigsResource;
    let resource = |name: &str, keys: Option<Vec<StrBytes>>| {
        DescribeConfigsResource::default()
            .with_resource_type(2)
            .with_resource_name(s(name))
            .with_configuration_keys(keys)
            .with_unknown_tagged_field(TAG, tag())
    };
    DescribeConfigsRequest::default()
        .with_resources(vec![
            resource("clicks", Some(vec![s("retention.ms"), s("cleanup.policy")])),
            resource("orders", None),
        ])
        .with_include_synonyms(true)
        .with_include_documentation(v >= 3)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_alter_configs() -> AlterConfigsRequest {
    use alter_configs_request::*;
    let config = |name: &str, value: Option<&str>| {
        AlterableConfig::default()
            .with_name(s(name))
            .with_value(value.map(s))
            .with_unknown_tagged_field(TAG, tag())
    };
    let resource = |name: &str| {
        AlterConfigsResource::default()
            .with_resource_type(2)
            .with_resource_name(s(name))
            .with_configs(vec![config("retention.ms", Some("1")), config("x", None)])
            .with_unknown_tagged_field(TAG, tag())
    };
    AlterConfigsRequest::default()
        .with_resources(vec![resource("clicks"), resource("orders")])
        .with_validate_only(true)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_incremental_alter_configs() -> IncrementalAlterConfigsRequest {
    use incremental_alter_configs_request::*;
    let config = |name: &str, value: Option<&str>| {
        AlterableConfig::default()
            .with_name(s(name))
            .with_config_operation(1)
            .with_value(value.map(s))
            .with_unknown_tagged_field(TAG, tag())
    };
    let resource = |name: &str| {
        AlterConfigsResource::default()
            .with_resource_type(2)
            .with_resource_name(s(name))
            .with_configs(vec![config("retention.ms", Some("1")), config("x", None)])
            .with_unknown_tagged_field(TAG, tag())
    };
    IncrementalAlterConfigsRequest::default()
        .with_resources(vec![resource("clicks"), resource("orders")])
        .with_validate_only(true)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_describe_log_dirs() -> DescribeLogDirsRequest {
    use describe_log_dirs_request::DescribableLogDirTopic;
    let entry = |name: &str| {
        DescribableLogDirTopic::default()
            .with_topic(topic(name))
            .with_partitions(vec![0, 1, 2])
            .with_unknown_tagged_field(TAG, tag())
    };
    DescribeLogDirsRequest::default()
        .with_topics(Some(vec![entry("clicks"), entry("orders")]))
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_create_partitions() -> CreatePartitionsRequest {
    use create_partitions_request::*;
    let assignment = || {
        CreatePartitionsAssignment::default()
            .with_broker_ids(vec![BrokerId(1), BrokerId(2)])
            .with_unknown_tagged_field(TAG, tag())
    };
    let entry = |name: &str, assignments| {
        CreatePartitionsTopic::default()
            .with_name(topic(name))
            .with_count(12)
            .with_assignments(assignments)
            .with_unknown_tagged_field(TAG, tag())
    };
    CreatePartitionsRequest::default()
        .with_topics(vec![entry("clicks", Some(vec![assignment(), assignment()])), entry("orders", None)])
        .with_timeout_ms(1000)
        .with_validate_only(true)
        .with_unknown_tagged_field(TAG, tag())
}

fn rich_offset_delete() -> OffsetDeleteRequest {
    use offset_delete_request::*;
    let partition = |index| OffsetDeleteRequestPartition::default().with_partition_index(index);
    let entry = |name: &str| {
        OffsetDeleteRequestTopic::default()
            .with_name(topic(name))
            .with_partitions(vec![partition(0), partition(1)])
    };
    OffsetDeleteRequest::default()
        .with_group_id(group("payments"))
        .with_topics(vec![entry("clicks"), entry("orders")])
}

fn rich_describe_topic_partitions() -> DescribeTopicPartitionsRequest {
    use describe_topic_partitions_request::*;
    let entry =
        |name: &str| TopicRequest::default().with_name(topic(name)).with_unknown_tagged_field(TAG, tag());
    let cursor = Cursor::default()
        .with_topic_name(topic("clicks"))
        .with_partition_index(3)
        .with_unknown_tagged_field(TAG, tag());
    DescribeTopicPartitionsRequest::default()
        .with_topics(vec![entry("clicks"), entry("orders")])
        .with_response_partition_limit(2000)
        .with_cursor(Some(cursor))
        .with_unknown_tagged_field(TAG, tag())
}

/// SplitMix64: small, seeded, and the same on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// What is written over a body at each position: the lengths and counts an attacker would claim.
pub const CLAIMS: &[&[u8]] = &[
    &[0x7f, 0xff, 0xff, 0xff],
    &[0xff, 0xff, 0xff, 0xff],
    &[0xff, 0xff, 0xff, 0xfe],
    &[0x80, 0x00, 0x00, 0x00],
    &[0x00, 0xff, 0xff, 0xff],
    &[0x00, 0x01, 0x00, 0x00],
    &[0x7f, 0xff],
    &[0xff, 0xff],
    &[0x80, 0x00],
    // Varints: 2^32-1, 2^28-1, too long, not ended.
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0xff, 0xff, 0xff, 0x7f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80],
    &[0xff, 0x7f],
    &[0x00],
    &[0x01],
    &[0x02],
    &[0x7f],
    &[0xff],
];

/// Calls `check` with every truncation, every claim at every position (overwriting, and inserted), and `rounds` random
/// mutations of `original`.
pub fn mutate(original: &[u8], seed: u64, rounds: usize, mut check: impl FnMut(&[u8])) {
    for end in 0..original.len() {
        check(&original[..end]);
    }
    let mut scratch = Vec::with_capacity(original.len() + 8);
    for at in 0..original.len() {
        for claim in CLAIMS {
            scratch.clear();
            scratch.extend_from_slice(original);
            let end = (at + claim.len()).min(original.len());
            scratch[at..end].copy_from_slice(&claim[..end - at]);
            check(&scratch);
            scratch.clear();
            scratch.extend_from_slice(&original[..at]);
            scratch.extend_from_slice(claim);
            scratch.extend_from_slice(&original[at + 1..]);
            check(&scratch);
        }
    }
    let mut rng = Rng(seed);
    for _ in 0..rounds {
        scratch.clear();
        scratch.extend_from_slice(original);
        for _ in 0..=rng.below(4) {
            if scratch.is_empty() {
                break;
            }
            let at = rng.below(scratch.len());
            match rng.below(6) {
                0 => scratch[at] ^= 1 << rng.below(8),
                1 => scratch[at] = rng.next() as u8,
                2 => {
                    let claim = CLAIMS[rng.below(CLAIMS.len())];
                    let end = (at + claim.len()).min(scratch.len());
                    scratch[at..end].copy_from_slice(&claim[..end - at]);
                }
                3 => {
                    scratch.remove(at);
                }
                4 => scratch.insert(at, rng.next() as u8),
                _ => scratch.truncate(at),
            }
        }
        check(&scratch);
    }
}
