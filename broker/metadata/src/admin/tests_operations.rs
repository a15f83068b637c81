use kafka_protocol::messages::alter_client_quotas_request::{EntityData, EntryData};
use kafka_protocol::messages::alter_partition_reassignments_request::{
    ReassignablePartition, ReassignableTopic,
};
use kafka_protocol::messages::describe_client_quotas_request::ComponentData;
use kafka_protocol::messages::describe_quorum_request::{PartitionData, TopicData};
use kafka_protocol::messages::describe_user_scram_credentials_request::UserName;
use kafka_protocol::messages::elect_leaders_request::TopicPartitions;
use kafka_protocol::messages::{
    AlterClientQuotasRequest, AlterPartitionReassignmentsRequest, BrokerId, DescribeClientQuotasRequest,
    DescribeQuorumRequest, DescribeUserScramCredentialsRequest, ElectLeadersRequest,
    ListConfigResourcesRequest, ListPartitionReassignmentsRequest,
};

use super::testing::*;
use super::*;
use crate::image::MetadataImage;

const NOW_MS: i64 = 1_700_000_000_000;

fn quorum(ids: &[i32]) -> QuorumState {
    let replica = |id: &i32| QuorumReplica {
        id: *id,
        log_end_offset: 91,
        last_fetch_ms: NOW_MS,
        last_caught_up_ms: NOW_MS,
    };
    QuorumState {
        leader_id: NODE_ID,
        leader_epoch: 4,
        high_watermark: 90,
        voters: ids.iter().map(replica).collect(),
        observers: Vec::new(),
    }
}

fn quorum_of(name: &str, index: i32) -> DescribeQuorumRequest {
    let partition = PartitionData::default().with_partition_index(index);
    DescribeQuorumRequest::default()
        .with_topics(vec![TopicData::default().with_topic_name(topic(name)).with_partitions(vec![partition])])
}

#[test]
fn the_quorum_is_this_node_and_no_other_partition_has_one() {
    let image = image(&[("a", 1, 1)]);
    for version in 0..=2 {
        let ask = |name, index| {
            let request = wire(&quorum_of(name, index), version);
            wire(&describe_quorum(&request, version, &image, &quorum(&[NODE_ID])), version)
        };
        let answer = ask("__cluster_metadata", 0);
        let partition = &answer.topics[0].partitions[0];
        assert_eq!((partition.error_code, partition.leader_id.0, partition.leader_epoch), (0, NODE_ID, 4));
        assert_eq!((partition.high_watermark, partition.current_voters[0].log_end_offset), (90, 91));
        let caught_up = partition.current_voters[0].last_caught_up_timestamp;
        assert_eq!(caught_up, if version >= 1 { NOW_MS } else { -1 }, "{version}");
        let nodes: Vec<_> = answer.nodes.iter().map(|n| (n.node_id.0, n.listeners[0].port)).collect();
        assert_eq!(nodes, if version >= 2 { vec![(NODE_ID, 9092)] } else { vec![] });
        for (name, index) in [("__cluster_metadata", 1), ("a", 0)] {
            let answer = ask(name, index);
            assert_eq!((answer.error_code, answer.topics[0].partitions[0].error_code), (0, 3));
        }
    }
}

#[test]
fn elections_are_not_needed_where_the_log_is_whole() {
    let image = image(&[("a", 2, 1), ("b", 1, 2)]);
    let damaged_group = image.topics["a"].partitions[1].group_id;
    let status = |group| PartitionStatus { damaged: group == damaged_group, ..healthy(group) };
    for version in 0..=2 {
        let elect = |kind: i8, named: Option<(&str, Vec<i32>)>| {
            let topics = named.map(|(name, partitions)| {
                vec![TopicPartitions::default().with_topic(topic(name)).with_partitions(partitions)]
            });
            let mut request = ElectLeadersRequest::default().with_topic_partitions(topics);
            if version >= 1 {
                request.election_type = kind;
            }
            let answer = elect_leaders(&wire(&request, version), version, &image, live(&status));
            assert!(answer.transfers.is_empty());
            let answer = wire(&answer.response, version);
            let results = answer.replica_election_results.iter();
            let codes: Vec<_> = results
                .flat_map(|t| t.partition_result.iter().map(|p| (p.partition_id, p.error_code)))
                .collect();
            (answer.error_code, codes)
        };
        assert_eq!(elect(0, Some(("a", vec![0, 1, 2]))), (0, vec![(0, 84), (1, 80), (2, 3)]));
        assert_eq!(elect(0, Some(("nope", vec![0]))), (0, vec![(0, 3)]));
        assert_eq!(elect(0, None), (0, vec![(1, 80)]));
        if version >= 1 {
            assert_eq!(elect(1, Some(("a", vec![1]))), (0, vec![(1, 83)]));
            assert_eq!(elect(9, Some(("a", vec![1]))), (42, vec![(1, 42)]));
        }
    }
}

fn reassign(image: &MetadataImage, name: &str, index: i32, replicas: Option<&[i32]>) -> i16 {
    let partition = ReassignablePartition::default()
        .with_partition_index(index)
        .with_replicas(replicas.map(|ids| ids.iter().copied().map(BrokerId).collect()));
    let request = AlterPartitionReassignmentsRequest::default().with_topics(vec![
        ReassignableTopic::default().with_name(topic(name)).with_partitions(vec![partition]),
    ]);
    let mut codes = (0..=1).map(|version| {
        let answer = alter_partition_reassignments(&wire(&request, version), version, image);
        let answer = wire(&answer.response, version);
        assert_eq!(answer.error_code, 0);
        answer.responses[0].partitions[0].error_code
    });
    let code = codes.next().unwrap();
    assert!(codes.all(|other| other == code));
    code
}

#[test]
fn a_partition_may_only_be_assigned_to_where_it_is() {
    let image = image(&[("a", 1, 1)]);
    assert_eq!(reassign(&image, "a", 0, Some(&[NODE_ID])), 0);
    for wrong in [&[][..], &[7], &[NODE_ID, 7], &[NODE_ID, NODE_ID], &[-1], &[i32::MIN]] {
        assert_eq!(reassign(&image, "a", 0, Some(wrong)), 39, "{wrong:?}");
    }
    assert_eq!(reassign(&image, "a", 0, None), 85);
    assert_eq!((reassign(&image, "a", 1, None), reassign(&image, "b", 0, None)), (3, 3));
    assert!(
        wire(&list_partition_reassignments(&ListPartitionReassignmentsRequest::default(), &image), 0)
            .topics
            .is_empty()
    );
}

#[test]
fn config_resources_are_listed_by_kind() {
    let mut image = image(&[("a", 1, 1), ("b", 1, 2)]);
    let set = map(&[("share.session.timeout.ms", "45000")]).into_iter().map(|(k, v)| (k, Some(v))).collect();
    image.apply(&Command::SetGroupConfigs { group: "g".into(), set }).unwrap();
    let list = |version: i16, kinds: &[i8]| {
        let mut request = ListConfigResourcesRequest::default();
        if version >= 1 {
            request.resource_types = kinds.to_vec();
        }
        let answer = list_config_resources(&wire(&request, version), version, &image);
        let answer = wire(&answer, version);
        let found = answer.config_resources.iter();
        let found: Vec<_> = found.map(|r| (r.resource_type, r.resource_name.to_string())).collect();
        (answer.error_code, found)
    };
    assert_eq!(list(0, &[]), (0, vec![]));
    let everything = [(2, "a"), (2, "b"), (4, "1"), (8, "1"), (32, "g")];
    let everything: Vec<_> = everything.map(|(kind, name)| (kind, name.to_string())).into();
    assert_eq!(list(1, &[]), (0, everything));
    assert_eq!(list(1, &[32, 32, 16]), (0, vec![(32, "g".to_string())]));
    assert_eq!(list(1, &[4, 3]), (35, vec![]));
}

#[test]
fn no_quotas_no_credentials_no_acls() {
    let quotas = |components: &[(&str, i8, Option<&str>)]| {
        let components = components.iter().map(|(kind, match_type, name)| {
            ComponentData::default()
                .with_entity_type(s(kind))
                .with_match_type(*match_type)
                .with_match(name.map(s))
        });
        let request = DescribeClientQuotasRequest::default().with_components(components.collect());
        let answer = wire(&describe_client_quotas(&wire(&request, 1)), 1);
        assert_eq!(answer.entries.is_some(), answer.error_code == 0);
        assert!(answer.entries.iter().all(Vec::is_empty));
        answer.error_code
    };
    assert_eq!(quotas(&[]), 0);
    assert_eq!(quotas(&[("user", 0, Some("u")), ("client-id", 1, None)]), 0);
    assert_eq!(quotas(&[("user", 2, None), ("user", 2, None)]), 42);
    assert_eq!(quotas(&[("user", 0, None)]), 42);
    assert_eq!(quotas(&[("user", 2, Some("u"))]), 42);
    assert_eq!(quotas(&[("", 2, None)]), 42);
    assert_eq!(quotas(&[("house", 2, None)]), 35);

    let entity = EntityData::default().with_entity_type(s("user")).with_entity_name(None);
    let request = AlterClientQuotasRequest::default()
        .with_entries(vec![EntryData::default().with_entity(vec![entity])]);
    let answer = wire(&alter_client_quotas(&wire(&request, 1)), 1);
    assert_eq!((answer.entries[0].error_code, answer.entries[0].entity.len()), (42, 1));

    let users = |names: Option<&[&str]>| {
        let users = names.map(|n| n.iter().map(|n| UserName::default().with_name(s(n))).collect());
        let request = DescribeUserScramCredentialsRequest::default().with_users(users);
        let answer = wire(&describe_user_scram_credentials(&wire(&request, 0)), 0);
        assert_eq!(answer.error_code, 0);
        answer.results.iter().map(|r| (r.user.to_string(), r.error_code)).collect::<Vec<_>>()
    };
    assert_eq!(users(None), []);
    assert_eq!(users(Some(&["b", "a", "b"])), [("a".into(), 91), ("b".into(), 92)]);
    assert_eq!(wire(&describe_acls(), 2).error_code, 54);
}
