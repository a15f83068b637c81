//! What operators' tools ask of a cluster: the metadata quorum, elections, reassignments, quotas, credentials, producers.

use kafka_protocol::messages::alter_client_quotas_request::{EntityData, EntryData, OpData};
use kafka_protocol::messages::alter_partition_reassignments_request::{
    ReassignablePartition, ReassignableTopic,
};
use kafka_protocol::messages::describe_client_quotas_request::ComponentData;
use kafka_protocol::messages::describe_producers_request::TopicRequest;
use kafka_protocol::messages::describe_quorum_request::{PartitionData, TopicData};
use kafka_protocol::messages::describe_user_scram_credentials_request::UserName;
use kafka_protocol::messages::elect_leaders_request::TopicPartitions;
use kafka_protocol::messages::list_partition_reassignments_request::ListPartitionReassignmentsTopics;
use kafka_protocol::messages::{
    AlterClientQuotasRequest, AlterPartitionReassignmentsRequest, BrokerId, DescribeAclsRequest,
    DescribeClientQuotasRequest, DescribeProducersRequest, DescribeQuorumRequest,
    DescribeUserScramCredentialsRequest, ElectLeadersRequest, InitProducerIdRequest,
    ListConfigResourcesRequest, ListPartitionReassignmentsRequest, ProducerId,
};

use super::Probes;
use crate::wire::{batch, now_ms, produce, text, topic_name};

pub fn add(probes: &mut Probes) {
    quorum(probes);
    elections(probes);
    reassignments(probes);
    config_resources(probes);
    producers(probes);
    security(probes);
}

fn quorum(probes: &mut Probes) {
    let ask = |topics: &[(&str, i32)]| {
        let topics = topics
            .iter()
            .map(|(name, index)| {
                let partition = PartitionData::default().with_partition_index(*index);
                TopicData::default().with_topic_name(topic_name(name)).with_partitions(vec![partition])
            })
            .collect();
        DescribeQuorumRequest::default().with_topics(topics)
    };
    const METADATA: &str = "__cluster_metadata";
    let all = (0, 2);
    probes.exchange("DescribeQuorum/metadata", all, move |bed, version| {
        let mut answer = bed.wire()?.ask(version, &ask(&[(METADATA, 0)]))?;
        let partition = &mut answer.topics[0].partitions[0];
        let voter = &mut partition.current_voters[0];
        anyhow::ensure!(partition.leader_epoch > 0 && partition.high_watermark > 0, "{partition:?}");
        anyhow::ensure!(voter.log_end_offset >= partition.high_watermark, "{voter:?}");
        // Where it stands is not the same on any two brokers, and Kafka has a listener for controllers.
        (partition.leader_epoch, partition.high_watermark, voter.log_end_offset) = (0, 0, 0);
        if version >= 1 {
            let now = now_ms();
            for stamp in [&mut voter.last_fetch_timestamp, &mut voter.last_caught_up_timestamp] {
                anyhow::ensure!((now - 60_000..=now + 1).contains(stamp), "at {now}: {stamp}");
                *stamp = 0;
            }
        }
        for listener in answer.nodes.iter_mut().flat_map(|node| &mut node.listeners) {
            listener.name = text("listener");
        }
        Ok(format!("{answer:#?}"))
    });
    probes.one("DescribeQuorum/another partition", all, move |_, _| ask(&[(METADATA, 1)]));
    probes.one("DescribeQuorum/another topic", all, move |_, _| ask(&[("plain", 0)]));
    probes.one("DescribeQuorum/no topic", all, move |_, _| ask(&[]));
    probes.one("DescribeQuorum/two topics", all, move |_, _| ask(&[(METADATA, 0), ("plain", 0)]));
}

fn elections(probes: &mut Probes) {
    let all = (0, 2);
    let ask = |version: i16, kind: i8, topics: Option<Vec<(&str, Vec<i32>)>>| {
        let topics = topics.map(|topics| {
            topics
                .into_iter()
                .map(|(name, partitions)| {
                    TopicPartitions::default().with_topic(topic_name(name)).with_partitions(partitions)
                })
                .collect()
        });
        let request = ElectLeadersRequest::default().with_timeout_ms(30_000).with_topic_partitions(topics);
        if version >= 1 { request.with_election_type(kind) } else { request }
    };
    probes.one("ElectLeaders/preferred", all, move |_, v| ask(v, 0, Some(vec![("plain", vec![0, 1])])));
    probes.one("ElectLeaders/unclean", (1, 2), move |_, v| ask(v, 1, Some(vec![("plain", vec![0])])));
    probes.one("ElectLeaders/unknown kind", (1, 2), move |_, v| ask(v, 7, Some(vec![("plain", vec![0])])));
    probes.exchange("ElectLeaders/all", all, move |bed, v| {
        let answer = bed.wire()?.ask(v, &ask(v, 0, None))?;
        let plain = answer.replica_election_results.iter().find(|r| r.topic.as_str() == "plain");
        Ok(format!("error_code: {}, {plain:?}", answer.error_code))
    });
    probes.one("ElectLeaders/none", all, move |_, v| ask(v, 0, Some(vec![])));
    probes.one("ElectLeaders/unknown topic", all, move |_, v| ask(v, 0, Some(vec![("nowhere", vec![0])])));
    probes.one("ElectLeaders/unknown partition", all, move |_, v| ask(v, 0, Some(vec![("plain", vec![9])])));
}

fn reassignments(probes: &mut Probes) {
    let list = |topics: Option<Vec<(&str, Vec<i32>)>>| {
        let topics = topics.map(|topics| {
            topics
                .into_iter()
                .map(|(name, partitions)| {
                    ListPartitionReassignmentsTopics::default()
                        .with_name(topic_name(name))
                        .with_partition_indexes(partitions)
                })
                .collect()
        });
        ListPartitionReassignmentsRequest::default().with_timeout_ms(30_000).with_topics(topics)
    };
    let only = (0, 0);
    probes.one("ListPartitionReassignments/all", only, move |_, _| list(None));
    probes.one("ListPartitionReassignments/none", only, move |_, _| list(Some(vec![])));
    probes.one("ListPartitionReassignments/one", only, move |_, _| list(Some(vec![("plain", vec![0])])));
    probes.one("ListPartitionReassignments/unknown", only, move |_, _| {
        list(Some(vec![("nowhere", vec![0]), ("plain", vec![9])]))
    });

    let all = (0, 1);
    let alter = |topic: &str, partition: i32, replicas: Option<Vec<i32>>| {
        let partition = ReassignablePartition::default()
            .with_partition_index(partition)
            .with_replicas(replicas.map(|ids| ids.into_iter().map(BrokerId).collect()));
        AlterPartitionReassignmentsRequest::default().with_timeout_ms(30_000).with_topics(vec![
            ReassignableTopic::default().with_name(topic_name(topic)).with_partitions(vec![partition]),
        ])
    };
    for (what, topic, partition, replicas) in [
        ("the same replica", "plain", 0, Some(vec![1])),
        ("another replica", "plain", 0, Some(vec![7])),
        ("one replica more", "plain", 0, Some(vec![1, 7])),
        ("no replica", "plain", 0, Some(vec![])),
        ("replica twice", "plain", 0, Some(vec![1, 1])),
        ("negative replica", "plain", 0, Some(vec![-1])),
        ("cancel", "plain", 0, None),
        ("unknown topic", "nowhere", 0, Some(vec![1])),
        ("unknown partition", "plain", 9, Some(vec![1])),
    ] {
        probes.one(&format!("AlterPartitionReassignments/{what}"), all, move |_, _| {
            alter(topic, partition, replicas.clone())
        });
    }
    probes.one("AlterPartitionReassignments/factor fixed", (1, 1), move |_, _| {
        alter("plain", 0, Some(vec![1, 7])).with_allow_replication_factor_change(false)
    });
    probes.one("AlterPartitionReassignments/nothing", all, |_, _| {
        AlterPartitionReassignmentsRequest::default().with_timeout_ms(30_000)
    });
}

fn config_resources(probes: &mut Probes) {
    probes.one("ListConfigResources/v0", (0, 0), |_, _| ListConfigResourcesRequest::default());
    for (what, types) in [
        ("brokers", vec![4]),
        ("broker loggers", vec![8]),
        ("client metrics", vec![16]),
        ("an unknown type", vec![99]),
        ("one twice", vec![4, 4]),
    ] {
        probes.one(&format!("ListConfigResources/{what}"), (1, 1), move |_, _| {
            ListConfigResourcesRequest::default().with_resource_types(types.clone())
        });
    }
    probes.exchange("ListConfigResources/topics", (1, 1), |bed, version| {
        let mut wire = bed.wire()?;
        let answer =
            wire.ask(version, &ListConfigResourcesRequest::default().with_resource_types(vec![2]))?;
        let plain =
            answer.config_resources.iter().any(|r| &*r.resource_name == "plain" && r.resource_type == 2);
        Ok(format!("error_code: {}, plain is listed: {plain}", answer.error_code))
    });
    // With groups that have configurations and those that do not.
    probes.exchange("ListConfigResources/every type", (1, 1), |bed, version| {
        let mut wire = bed.wire()?;
        let answer = wire.ask(version, &ListConfigResourcesRequest::default())?;
        let mut types: Vec<i8> = answer.config_resources.iter().map(|r| r.resource_type).collect();
        types.sort_unstable();
        types.dedup();
        Ok(format!("error_code: {}, types {types:?}", answer.error_code))
    });
}

fn producers(probes: &mut Probes) {
    let ask = |topic: &str, partitions: Vec<i32>| {
        DescribeProducersRequest::default().with_topics(vec![
            TopicRequest::default().with_name(topic_name(topic)).with_partition_indexes(partitions),
        ])
    };
    let only = (0, 0);
    probes.one("DescribeProducers/none", only, move |_, _| ask("plain", vec![0]));
    probes.one("DescribeProducers/unknown topic", only, move |_, _| ask("nowhere", vec![0]));
    probes.one("DescribeProducers/unknown partition", only, move |_, _| ask("plain", vec![9]));
    probes.one("DescribeProducers/bad name", only, move |_, _| ask("no name!", vec![0]));
    probes.exchange("DescribeProducers/one", only, move |bed, version| {
        let mut wire = bed.wire()?;
        let nobody =
            InitProducerIdRequest::default().with_producer_id(ProducerId(-1)).with_producer_epoch(-1);
        let id = wire.ask(4, &nobody)?.producer_id;
        let records = batch(&["a", "b", "c"], |b| {
            b.producer(id.0, 0, 7);
        });
        wire.ask(9, &produce("stamped", 0, -1, Some(records)))?;
        let mut answer = wire.ask(version, &ask("stamped", vec![0]))?;
        let producers = &mut answer.topics[0].partitions[0].active_producers;
        producers.retain(|producer| producer.producer_id == id);
        for producer in producers {
            anyhow::ensure!((now_ms() - producer.last_timestamp).abs() < 60_000, "{producer:?}");
            producer.last_timestamp = 0;
        }
        Ok(format!("{answer:#?}"))
    });
}

fn security(probes: &mut Probes) {
    let component = |kind: &str, match_type: i8, name: Option<&str>| {
        DescribeClientQuotasRequest::default().with_components(vec![
            ComponentData::default()
                .with_entity_type(text(kind))
                .with_match_type(match_type)
                .with_match(name.map(text)),
        ])
    };
    let all = (0, 1);
    probes.one("DescribeClientQuotas/everything", all, |_, _| DescribeClientQuotasRequest::default());
    probes.one("DescribeClientQuotas/a client", all, move |_, _| component("client-id", 0, Some("c")));
    probes.one("DescribeClientQuotas/any user", all, move |_, _| component("user", 2, None));
    probes.one("DescribeClientQuotas/unknown entity", all, move |_, _| component("house", 2, None));
    probes.one("DescribeClientQuotas/empty entity", all, move |_, _| component("", 2, None));
    probes.one("DescribeClientQuotas/unknown match", all, move |_, _| component("user", 9, None));
    probes.one("DescribeClientQuotas/exact without a name", all, move |_, _| component("user", 0, None));
    probes.one("AlterClientQuotas/nothing", all, |_, _| AlterClientQuotasRequest::default());
    probes.one("AlterClientQuotas/a rate", all, |_, _| {
        let entity =
            EntityData::default().with_entity_type(text("client-id")).with_entity_name(Some(text("c")));
        let rate = OpData::default().with_key(text("producer_byte_rate")).with_value(1e6);
        AlterClientQuotasRequest::default()
            .with_validate_only(true)
            .with_entries(vec![EntryData::default().with_entity(vec![entity]).with_ops(vec![rate])])
    });

    let users = |names: Option<&[&str]>| {
        let users = names.map(|n| n.iter().map(|n| UserName::default().with_name(text(n))).collect());
        DescribeUserScramCredentialsRequest::default().with_users(users)
    };
    let only = (0, 0);
    probes.one("DescribeUserScramCredentials/all", only, move |_, _| users(None));
    probes.one("DescribeUserScramCredentials/none", only, move |_, _| users(Some(&[])));
    probes.one("DescribeUserScramCredentials/two", only, move |_, _| users(Some(&["ann", "bob"])));
    probes.one("DescribeUserScramCredentials/one twice", only, move |_, _| users(Some(&["ann", "ann"])));
    probes.one("DescribeUserScramCredentials/empty", only, move |_, _| users(Some(&[""])));

    probes.one("DescribeAcls/all", (1, 3), |_, _| {
        DescribeAclsRequest::default()
            .with_resource_type_filter(1)
            .with_pattern_type_filter(1)
            .with_operation(1)
            .with_permission_type(1)
            .with_resource_name_filter(None)
            .with_principal_filter(None)
            .with_host_filter(None)
    });
}
