//! Rich requests of operators' tools; see `rich_request` of the parent.

use kafka_protocol::messages::*;

use super::*;

pub fn rich_request(key: i16, v: i16) -> RequestKind {
    match key {
        api::DESCRIBE_ACLS => RequestKind::DescribeAcls(
            DescribeAclsRequest::default()
                .with_resource_type_filter(2)
                .with_resource_name_filter(Some(s("clicks")))
                .with_pattern_type_filter(3)
                .with_principal_filter(Some(s("User:ann")))
                .with_host_filter(None)
                .with_operation(1)
                .with_permission_type(1)
                .with_unknown_tagged_field(TAG, tag()),
        ),
        api::ELECT_LEADERS => {
            use elect_leaders_request::TopicPartitions;
            let entry = |name: &str| {
                TopicPartitions::default()
                    .with_topic(topic(name))
                    .with_partitions(vec![0, 1, 2])
                    .with_unknown_tagged_field(TAG, tag())
            };
            let request = ElectLeadersRequest::default()
                .with_topic_partitions(Some(vec![entry("clicks"), entry("orders")]))
                .with_timeout_ms(1000)
                .with_unknown_tagged_field(TAG, tag());
            RequestKind::ElectLeaders(if v >= 1 { request.with_election_type(1) } else { request })
        }
        api::ALTER_PARTITION_REASSIGNMENTS => {
            use alter_partition_reassignments_request::{ReassignablePartition, ReassignableTopic};
            let partition = |index, replicas: Option<Vec<i32>>| {
                ReassignablePartition::default()
                    .with_partition_index(index)
                    .with_replicas(replicas.map(|ids| ids.into_iter().map(BrokerId).collect()))
                    .with_unknown_tagged_field(TAG, tag())
            };
            let entry = |name: &str| {
                ReassignableTopic::default()
                    .with_name(topic(name))
                    .with_partitions(vec![partition(0, Some(vec![1, 2])), partition(1, None)])
                    .with_unknown_tagged_field(TAG, tag())
            };
            let request = AlterPartitionReassignmentsRequest::default()
                .with_timeout_ms(1000)
                .with_topics(vec![entry("clicks"), entry("orders")])
                .with_unknown_tagged_field(TAG, tag());
            RequestKind::AlterPartitionReassignments(if v >= 1 {
                request.with_allow_replication_factor_change(false)
            } else {
                request
            })
        }
        api::LIST_PARTITION_REASSIGNMENTS => {
            use list_partition_reassignments_request::ListPartitionReassignmentsTopics;
            let entry = |name: &str| {
                ListPartitionReassignmentsTopics::default()
                    .with_name(topic(name))
                    .with_partition_indexes(vec![0, 1])
                    .with_unknown_tagged_field(TAG, tag())
            };
            RequestKind::ListPartitionReassignments(
                ListPartitionReassignmentsRequest::default()
                    .with_timeout_ms(1000)
                    .with_topics(Some(vec![entry("clicks"), entry("orders")]))
                    .with_unknown_tagged_field(TAG, tag()),
            )
        }
        api::DESCRIBE_CLIENT_QUOTAS => {
            use describe_client_quotas_request::ComponentData;
            let component = |kind: &str, match_type, name: Option<&str>| {
                ComponentData::default()
                    .with_entity_type(s(kind))
                    .with_match_type(match_type)
                    .with_match(name.map(s))
                    .with_unknown_tagged_field(TAG, tag())
            };
            RequestKind::DescribeClientQuotas(
                DescribeClientQuotasRequest::default()
                    .with_components(vec![component("user", 0, Some("ann")), component("client-id", 2, None)])
                    .with_strict(true)
                    .with_unknown_tagged_field(TAG, tag()),
            )
        }
        api::ALTER_CLIENT_QUOTAS => {
            use alter_client_quotas_request::{EntityData, EntryData, OpData};
            let entity = |name: Option<&str>| {
                EntityData::default()
                    .with_entity_type(s("user"))
                    .with_entity_name(name.map(s))
                    .with_unknown_tagged_field(TAG, tag())
            };
            let operation = |value: f64| {
                OpData::default()
                    .with_key(s("producer_byte_rate"))
                    .with_value(value)
                    .with_remove(value == 0.0)
                    .with_unknown_tagged_field(TAG, tag())
            };
            let entry = |name| {
                EntryData::default()
                    .with_entity(vec![entity(name), entity(None)])
                    .with_ops(vec![operation(1e6), operation(0.0)])
                    .with_unknown_tagged_field(TAG, tag())
            };
            RequestKind::AlterClientQuotas(
                AlterClientQuotasRequest::default()
                    .with_entries(vec![entry(Some("ann")), entry(None)])
                    .with_validate_only(true)
                    .with_unknown_tagged_field(TAG, tag()),
            )
        }
        api::DESCRIBE_USER_SCRAM_CREDENTIALS => {
            use describe_user_scram_credentials_request::UserName;
            let user =
                |name: &str| UserName::default().with_name(s(name)).with_unknown_tagged_field(TAG, tag());
            RequestKind::DescribeUserScramCredentials(
                DescribeUserScramCredentialsRequest::default()
                    .with_users(Some(vec![user("ann"), user("bob")]))
                    .with_unknown_tagged_field(TAG, tag()),
            )
        }
        api::DESCRIBE_QUORUM => {
            use describe_quorum_request::{PartitionData, TopicData};
            let partition = |index| {
                PartitionData::default().with_partition_index(index).with_unknown_tagged_field(TAG, tag())
            };
            let entry = |name: &str| {
                TopicData::default()
                    .with_topic_name(topic(name))
                    .with_partitions(vec![partition(0), partition(1)])
                    .with_unknown_tagged_field(TAG, tag())
            };
            RequestKind::DescribeQuorum(
                DescribeQuorumRequest::default()
                    .with_topics(vec![entry("__cluster_metadata"), entry("clicks")])
                    .with_unknown_tagged_field(TAG, tag()),
            )
        }
        api::DESCRIBE_PRODUCERS => {
            use describe_producers_request::TopicRequest;
            let entry = |name: &str| {
                TopicRequest::default()
                    .with_name(topic(name))
                    .with_partition_indexes(vec![0, 1])
                    .with_unknown_tagged_field(TAG, tag())
            };
            RequestKind::DescribeProducers(
                DescribeProducersRequest::default()
                    .with_topics(vec![entry("clicks"), entry("orders")])
                    .with_unknown_tagged_field(TAG, tag()),
            )
        }
        api::LIST_CONFIG_RESOURCES => {
            let request = ListConfigResourcesRequest::default().with_unknown_tagged_field(TAG, tag());
            RequestKind::ListConfigResources(if v >= 1 {
                request.with_resource_types(vec![2, 4, 16, 32])
            } else {
                request
            })
        }
        other => panic!("no rich request for key {other}"),
    }
}
