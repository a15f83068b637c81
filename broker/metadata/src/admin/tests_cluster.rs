//! Answers of a cluster of several nodes. Node 1 answers, nodes 1 to 3 are registered.

use kafka_protocol::messages::alter_partition_reassignments_request::{
    ReassignablePartition, ReassignableTopic,
};
use kafka_protocol::messages::create_partitions_request::{
    CreatePartitionsAssignment, CreatePartitionsTopic,
};
use kafka_protocol::messages::create_topics_request::{CreatableReplicaAssignment, CreatableTopic};
use kafka_protocol::messages::describe_quorum_request::{PartitionData, TopicData};
use kafka_protocol::messages::elect_leaders_request::TopicPartitions;
use kafka_protocol::messages::incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig};
use kafka_protocol::messages::metadata_response::MetadataResponsePartition;
use kafka_protocol::messages::{
    AlterPartitionReassignmentsRequest, BrokerId, CreatePartitionsRequest, CreateTopicsRequest,
    DescribeClusterRequest, DescribeConfigsRequest, DescribeLogDirsRequest, DescribeQuorumRequest,
    DescribeTopicPartitionsRequest, ElectLeadersRequest, IncrementalAlterConfigsRequest,
    ListPartitionReassignmentsRequest, MetadataRequest,
};
use uuid::Uuid;

use super::testing::*;
use super::*;
use crate::broker_config::BrokerConfig;
use crate::nodes::{NodeRecord, NodeState};
use crate::placement::NodeHealth;

fn cluster(nodes: i32, assignments: &[&[i32]]) -> MetadataImage {
    let mut image = image(&[]);
    for id in 1..=nodes {
        let record = NodeRecord {
            id,
            host: format!("broker{id}.example"),
            port: 9092,
            rack: Some(format!("r{id}")),
            rpc_address: String::new(),
            directory_id: Uuid::from_u128(1),
            boot_id: 1,
            version_max: 1,
            state: NodeState::Active,
        };
        image.apply(&Command::RegisterNode(record)).unwrap();
    }
    if !assignments.is_empty() {
        let assignments = assignments.iter().map(|replicas| replicas.to_vec()).collect();
        let (name, id, configs) = ("t".to_string(), Uuid::from_u128(1), map(&[]));
        image.apply(&Command::CreateTopic { name, id, assignments, configs }).unwrap();
    }
    image
}

fn ids(brokers: &[BrokerId]) -> Vec<i32> {
    brokers.iter().map(|id| id.0).collect()
}

fn led_by(leader_id: i32) -> impl Fn(u64) -> PartitionStatus {
    move |_| PartitionStatus { leader_id, leader_epoch: 3, ..PartitionStatus::default() }
}

fn without(down: &'static [i32]) -> impl Fn(i32) -> bool {
    move |id| !down.contains(&id)
}

fn asked(
    image: &MetadataImage,
    version: i16,
    leader: i32,
    down: &'static [i32],
) -> (Vec<i32>, MetadataResponsePartition) {
    let request = MetadataRequest::default().with_topics(if version == 0 { Some(Vec::new()) } else { None });
    let (status, is_up) = (led_by(leader), without(down));
    let live = Live { controller_id: 2, status: &status, is_up: &is_up };
    let plan = metadata(&wire(&request, version), version, image, &BrokerConfig::default(), live);
    let response = wire(&plan.response, version);
    if version >= 1 {
        assert_eq!(response.controller_id.0, 2);
    }
    let brokers = response.brokers.iter().map(|broker| broker.node_id.0).collect();
    (brokers, response.topics[0].partitions[0].clone())
}

#[test]
fn metadata_names_leaders_replicas_and_who_is_offline() {
    let image = cluster(3, &[&[2, 3, 1]]);
    for version in 0..=13 {
        let (brokers, partition) = asked(&image, version, 2, &[]);
        assert_eq!((brokers, partition.error_code, partition.leader_id.0), (vec![1, 2, 3], 0, 2));
        assert_eq!(
            (ids(&partition.replica_nodes), ids(&partition.isr_nodes)),
            (vec![2, 3, 1], vec![2, 3, 1])
        );

        // A follower is down: clients are not sent there, and nothing else changes.
        let (brokers, partition) = asked(&image, version, 2, &[3]);
        assert_eq!((brokers, partition.leader_id.0, ids(&partition.isr_nodes)), (vec![1, 2], 2, vec![2, 1]));
        if version == 0 {
            assert_eq!((partition.error_code, ids(&partition.replica_nodes)), (9, vec![2, 1]));
        } else {
            assert_eq!((partition.error_code, ids(&partition.replica_nodes)), (0, vec![2, 3, 1]));
        }
        if version >= 5 {
            assert_eq!(ids(&partition.offline_replicas), [3]);
        }

        // Nobody leads, or whoever led is down.
        for (leader, down) in [(-1, &[][..]), (2, &[2])] {
            let (_, partition) = asked(&image, version, leader, down);
            assert_eq!((partition.error_code, partition.leader_id.0), (5, -1), "{version}");
        }
    }
    let request = DescribeTopicPartitionsRequest::default().with_response_partition_limit(10);
    let (status, is_up) = (led_by(3), without(&[2]));
    let live = Live { controller_id: 2, status: &status, is_up: &is_up };
    let response = wire(&describe_topic_partitions(&request, &image, live), 0);
    let partition = &response.topics[0].partitions[0];
    assert_eq!((partition.leader_id.0, ids(&partition.offline_replicas)), (3, vec![2]));
    assert_eq!((ids(&partition.isr_nodes), partition.leader_epoch), (vec![3, 1], 3));
}

#[test]
fn what_the_leader_knows_of_its_followers_is_told() {
    let mut image = cluster(3, &[&[1, 2]]);
    let status = |_| PartitionStatus { lagging: vec![2], ..led_by(1)(0) };
    let live = Live { controller_id: 1, status: &status, is_up: &up };
    let info = image.topics["t"].partitions[0].clone();
    assert_eq!(ids(&live.describe(&info, &image).in_sync), [1]);
    // Where it moves to stands first; who is not there yet is not in sync.
    let target = Some(vec![3, 1]);
    image.apply(&Command::SetReplicas { topic_id: Uuid::from_u128(1), partition: 0, target }).unwrap();
    let info = image.topics["t"].partitions[0].clone();
    for (lagging, in_sync) in [(vec![], vec![1, 2]), (vec![2], vec![1]), (vec![3], vec![1, 2])] {
        let status = |_| PartitionStatus { lagging: lagging.clone(), ..led_by(1)(0) };
        let found = Live { controller_id: 1, status: &status, is_up: &up }.describe(&info, &image);
        assert_eq!((ids(&found.replicas), ids(&found.in_sync)), (vec![3, 1, 2], in_sync));
    }
}

#[test]
fn nodes_that_do_not_run_are_fenced() {
    let image = cluster(3, &[]);
    let (status, is_up) = (led_by(1), without(&[2]));
    let live = Live { controller_id: 3, status: &status, is_up: &is_up };
    for version in 0..=2 {
        for fenced_too in [false, true] {
            let mut request = DescribeClusterRequest::default();
            if version >= 2 {
                request.include_fenced_brokers = fenced_too;
            }
            let response = describe_cluster(&wire(&request, version), version, &image, live);
            let response = wire(&response, version);
            assert_eq!(response.controller_id.0, 3);
            let brokers: Vec<_> = response
                .brokers
                .iter()
                .map(|b| (b.broker_id.0, b.rack.as_deref().unwrap(), b.is_fenced))
                .collect();
            if version >= 2 && fenced_too {
                assert_eq!(brokers, [(1, "r1", false), (2, "r2", true), (3, "r3", false)]);
            } else {
                assert_eq!(brokers, [(1, "r1", false), (3, "r3", false)]);
            }
        }
    }
}

fn quorum_asked(
    image: &MetadataImage,
    quorum: &QuorumState,
) -> kafka_protocol::messages::DescribeQuorumResponse {
    let partitions = vec![PartitionData::default().with_partition_index(0)];
    let topics =
        vec![TopicData::default().with_topic_name(topic("__cluster_metadata")).with_partitions(partitions)];
    wire(&describe_quorum(&DescribeQuorumRequest::default().with_topics(topics), 2, image, quorum), 2)
}

#[test]
fn the_quorum_is_described_by_its_leader() {
    let image = cluster(4, &[]);
    let replica =
        |id| QuorumReplica { id, log_end_offset: 10 + i64::from(id), last_fetch_ms: 5, last_caught_up_ms: 4 };
    let mut quorum = QuorumState {
        leader_id: 1,
        leader_epoch: 7,
        high_watermark: 11,
        voters: (1..=3).map(replica).collect(),
        observers: vec![replica(4)],
    };
    let response = quorum_asked(&image, &quorum);
    let partition = &response.topics[0].partitions[0];
    let ends = |states: &[kafka_protocol::messages::describe_quorum_response::ReplicaState]| {
        states.iter().map(|state| (state.replica_id.0, state.log_end_offset)).collect::<Vec<_>>()
    };
    assert_eq!(ends(&partition.current_voters), [(1, 11), (2, 12), (3, 13)]);
    assert_eq!(ends(&partition.observers), [(4, 14)]);
    assert_eq!(response.nodes.len(), 4);
    assert_eq!(&*response.nodes[3].listeners[0].host, "broker4.example");
    quorum.leader_id = 2;
    let partition = &quorum_asked(&image, &quorum).topics[0].partitions[0];
    assert_eq!((partition.error_code, partition.leader_id.0), (6, 2));
}

#[test]
fn preferred_leaders_are_elected_where_they_can_lead() {
    let mut image = cluster(3, &[&[1, 2], &[2, 1], &[3, 1], &[2, 3]]);
    image.apply(&Command::SetNodeState { id: 3, state: NodeState::Maintenance }).unwrap();
    let elect = |leader: i32, down: &'static [i32], kind: i8| {
        let topics =
            vec![TopicPartitions::default().with_topic(topic("t")).with_partitions(vec![0, 1, 2, 3])];
        let request =
            ElectLeadersRequest::default().with_election_type(kind).with_topic_partitions(Some(topics));
        let (status, is_up) = (led_by(leader), without(down));
        let live = Live { controller_id: 1, status: &status, is_up: &is_up };
        let mut plan = elect_leaders(&wire(&request, 2), 2, &image, live);
        let codes = |response: &kafka_protocol::messages::ElectLeadersResponse| {
            let partitions = &response.replica_election_results[0].partition_result;
            partitions.iter().map(|partition| partition.error_code).collect::<Vec<_>>()
        };
        let (before, transfers) = (codes(&wire(&plan.response, 2)), plan.transfers.clone());
        for transfer in &transfers {
            plan.refuse(transfer, &Refused::new(ErrorCode::REQUEST_TIMED_OUT, "late"));
        }
        let moved: Vec<_> = transfers.iter().map(|t| (t.partition, t.from, t.to)).collect();
        (before, moved, codes(&plan.response))
    };
    // Led by 1: the first is home, the second goes, the third may not, the fourth has no replica there at all.
    assert_eq!(elect(1, &[], 0), (vec![84, 0, 80, 80], vec![(1, 1, 2)], vec![84, 7, 80, 80]));
    assert_eq!(elect(1, &[2], 0).0, [84, 80, 80, 80]);
    assert_eq!(elect(1, &[], 1).0, [84, 84, 84, 83]);
    assert_eq!(elect(-1, &[], 0).0, [80, 80, 80, 80]);
}

fn reassign(image: &MetadataImage, replicas: Option<&[i32]>, keep_factor: bool) -> (i16, Vec<Command>) {
    let partition = ReassignablePartition::default()
        .with_partition_index(0)
        .with_replicas(replicas.map(|ids| ids.iter().copied().map(BrokerId).collect()));
    let topics = vec![ReassignableTopic::default().with_name(topic("t")).with_partitions(vec![partition])];
    let request = AlterPartitionReassignmentsRequest::default()
        .with_topics(topics)
        .with_allow_replication_factor_change(!keep_factor);
    let mut plan = alter_partition_reassignments(&wire(&request, 1), 1, image);
    let code = wire(&plan.response, 1).responses[0].partitions[0].error_code;
    plan.response.fail(ErrorCode::NOT_CONTROLLER);
    assert_eq!(plan.response.responses[0].partitions[0].error_code, if code == 0 { 41 } else { code });
    (code, plan.commands)
}

fn listed(image: &MetadataImage) -> Vec<(i32, Vec<i32>, Vec<i32>, Vec<i32>)> {
    let response =
        wire(&list_partition_reassignments(&ListPartitionReassignmentsRequest::default(), image), 0);
    let partitions = response.topics.iter().flat_map(|topic| &topic.partitions);
    partitions
        .map(|p| (p.partition_index, ids(&p.replicas), ids(&p.adding_replicas), ids(&p.removing_replicas)))
        .collect()
}

#[test]
fn partitions_are_reassigned_and_moves_are_listed_and_given_up() {
    let mut image = cluster(4, &[&[1, 2], &[1, 2]]);
    for (wrong, code) in [(&[][..], 39), (&[1, 9], 39), (&[1, 1], 39), (&[-1], 39)] {
        assert_eq!(reassign(&image, Some(wrong), false), (code, vec![]), "{wrong:?}");
    }
    assert_eq!(reassign(&image, Some(&[1, 2]), true), (0, vec![]));
    assert_eq!(reassign(&image, Some(&[1, 2, 3]), true).0, 38);
    assert_eq!(reassign(&image, None, false).0, 85);
    assert_eq!(listed(&image), []);
    let (code, commands) = reassign(&image, Some(&[3, 1]), true);
    assert_eq!((code, commands.len()), (0, 1));
    image.apply(&commands[0]).unwrap();
    assert_eq!(reassign(&image, Some(&[3, 1]), true), (0, vec![]));
    assert_eq!(listed(&image), [(0, vec![3, 1, 2], vec![3], vec![2])]);
    let (code, commands) = reassign(&image, None, true);
    assert_eq!((code, commands.len()), (0, 1));
    image.apply(&commands[0]).unwrap();
    assert_eq!(listed(&image), [(0, vec![1, 2, 3], vec![], vec![3])]);
    image
        .apply(&Command::ReplicasReached { topic_id: Uuid::from_u128(1), partition: 0, replicas: vec![1, 2] })
        .unwrap();
    assert_eq!(listed(&image), []);
    image.apply(&Command::SetNodeState { id: 4, state: NodeState::Decommissioning }).unwrap();
    assert_eq!(reassign(&image, Some(&[1, 4]), true).0, 39);
}

#[test]
fn topics_are_placed_or_refused_by_the_number_of_nodes() {
    let mut image = cluster(3, &[]);
    let config = BrokerConfig::default();
    let new = |name: &str, partitions, factor| {
        CreatableTopic::default()
            .with_name(topic(name))
            .with_num_partitions(partitions)
            .with_replication_factor(factor)
    };
    let assigned = |name: &str, assignments: &[&[i32]]| {
        let assignments = (0..).zip(assignments).map(|(index, brokers)| {
            CreatableReplicaAssignment::default()
                .with_partition_index(index)
                .with_broker_ids(brokers.iter().copied().map(BrokerId).collect())
        });
        new(name, -1, -1).with_assignments(assignments.collect())
    };
    let create = |image: &MetadataImage, topics: Vec<CreatableTopic>, config: &BrokerConfig| {
        let request = CreateTopicsRequest::default().with_topics(topics);
        create_topics(&request, 7, image, config, NodeHealth::ALL_WELL, super::testing::ids())
    };
    let topics = vec![
        new("a", 3, 3),
        new("b", 1, 4),
        assigned("c", &[&[3, 1], &[2, 3]]),
        assigned("d", &[&[3, 1], &[2]]),
        assigned("e", &[&[4]]),
    ];
    let plan = create(&image, topics, &config);
    let codes: Vec<_> = plan.response.topics.iter().map(|t| (t.error_code, t.replication_factor)).collect();
    assert_eq!(codes, [(0, 3), (38, -1), (0, 2), (39, -1), (39, -1)]);
    assert_eq!(
        plan.response.topics[1].error_message.as_deref().unwrap(),
        "Unable to replicate the partition 4 time(s): The target replication factor of 4 cannot be reached because \
         only 3 broker(s) are registered."
    );
    commit(&mut image, &plan);
    let mut first: Vec<i32> = image.topics["a"].partitions.iter().map(|info| info.replicas[0]).collect();
    first.sort_unstable();
    assert_eq!(first, [1, 2, 3]);
    assert_eq!(image.topics["c"].partitions[1].replicas, [2, 3]);

    let three = super::testing::config(&[("default.replication.factor", "3")]);
    let plan = create(&image, vec![new("f", -1, -1)], &three);
    assert_eq!(plan.response.topics[0].replication_factor, 3);
    let offsets = plan_offsets_topic(&image, &config, NodeHealth::ALL_WELL, Uuid::from_u128(50));
    let applied = image.apply(&offsets[0]).unwrap();
    assert!(applied.created.iter().all(|created| created.replicas.len() == 3));

    let grow = |image: &MetadataImage, count, assignments: Option<&[&[i32]]>| {
        let assignments = assignments.map(|assignments| {
            let one = |ids: &&[i32]| {
                CreatePartitionsAssignment::default()
                    .with_broker_ids(ids.iter().copied().map(BrokerId).collect())
            };
            assignments.iter().map(one).collect()
        });
        let topics = vec![
            CreatePartitionsTopic::default()
                .with_name(topic("c"))
                .with_count(count)
                .with_assignments(assignments),
        ];
        create_partitions(
            &CreatePartitionsRequest::default().with_topics(topics),
            image,
            NodeHealth::ALL_WELL,
        )
    };
    assert_eq!(grow(&image, 3, Some(&[&[1]])).response.results[0].error_code, 39);
    assert_eq!(grow(&image, 3, Some(&[&[1, 4]])).response.results[0].error_code, 39);
    let plan = grow(&image, 3, Some(&[&[1, 2]]));
    commit(&mut image, &plan);
    assert_eq!(image.topics["c"].partitions[2].replicas, [1, 2]);
    let plan = grow(&image, 4, None);
    commit(&mut image, &plan);
    assert_eq!(image.topics["c"].partitions[3].replicas.len(), 2);
    for id in [2, 3] {
        image.apply(&Command::SetNodeState { id, state: NodeState::Decommissioning }).unwrap();
    }
    assert_eq!(grow(&image, 5, None).response.results[0].error_code, 38);
}

#[test]
fn each_node_tells_of_its_own_logs_and_configurations() {
    let image = cluster(3, &[&[2], &[1, 2], &[3]]);
    let dir = LogDir { path: "/d", total_bytes: -1, usable_bytes: -1 };
    let request = DescribeLogDirsRequest::default().with_topics(None);
    let response = wire(&describe_log_dirs(&request, 4, &image, dir, &healthy), 4);
    let partitions: Vec<_> =
        response.results[0].topics[0].partitions.iter().map(|p| p.partition_index).collect();
    assert_eq!(partitions, [1]);

    let config = BrokerConfig::default();
    let described = |name: &str| {
        let resource = kafka_protocol::messages::describe_configs_request::DescribeConfigsResource::default()
            .with_resource_type(4)
            .with_resource_name(s(name));
        let request = DescribeConfigsRequest::default().with_resources(vec![resource]);
        describe_configs(&request, &image, &config).results[0].error_code
    };
    assert_eq!((described("1"), described("2")), (0, 42));
    let altered = |name: &str| {
        let entry = AlterableConfig::default().with_name(s("log.retention.ms")).with_value(Some(s("5")));
        let resource = AlterConfigsResource::default()
            .with_resource_type(4)
            .with_resource_name(s(name))
            .with_configs(vec![entry]);
        let request = IncrementalAlterConfigsRequest::default().with_resources(vec![resource]);
        let plan = incremental_alter_configs(&request, &image, &config);
        (plan.response.responses[0].error_code, plan.commands.len())
    };
    // Whoever is asked: the metadata keeps it.
    assert_eq!((altered("1"), altered("2"), altered("4")), ((0, 1), (0, 1), (42, 0)));
}
