use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::codec::CodecError;
use crate::nodes::NodeState;

fn node() -> NodeInfo {
    NodeInfo { id: 1, host: "localhost".into(), port: 9092, rack: None }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn set(pairs: &[(&str, Option<&str>)]) -> BTreeMap<String, Option<String>> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.map(str::to_string))).collect()
}

fn create(name: &str, id: u128, partitions: i32) -> Command {
    place(name, id, &vec![&[1][..]; usize::try_from(partitions).unwrap()])
}

fn place(name: &str, id: u128, assignments: &[&[i32]]) -> Command {
    let assignments = assignments.iter().map(|replicas| replicas.to_vec()).collect();
    Command::CreateTopic { name: name.into(), id: Uuid::from_u128(id), assignments, configs: BTreeMap::new() }
}

fn create_alone(name: &str, id: u128, partitions: i32) -> Command {
    Command::CreateTopicAlone {
        name: name.into(),
        id: Uuid::from_u128(id),
        partitions,
        replication_factor: 1,
        configs: BTreeMap::new(),
    }
}

fn register(id: i32) -> Command {
    Command::RegisterNode(NodeRecord {
        id,
        host: format!("h{id}"),
        port: 9092,
        rack: None,
        rpc_address: format!("h{id}:33145"),
        directory_id: Uuid::from_u128(9),
        boot_id: 7,
        version_max: 2,
        state: NodeState::Active,
    })
}

#[test]
fn topics_get_group_ids_that_are_never_reused() {
    let mut image = MetadataImage::empty(node());
    let applied = image.apply(&create("a", 1, 2)).unwrap();
    assert_eq!(applied.created.iter().map(|c| c.group_id).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(applied.created[1].dir_name, "a-1.g2");
    let applied = image.apply(&Command::DeleteTopic { id: Uuid::from_u128(1) }).unwrap();
    assert_eq!(applied.deleted.iter().map(|d| d.dir_name.as_str()).collect::<Vec<_>>(), ["a-0.g1", "a-1.g2"]);
    assert!(image.topics.is_empty() && image.topic_ids.is_empty());
    let applied = image.apply(&create("a", 2, 1)).unwrap();
    assert_eq!(applied.created[0].group_id, 3);
    let applied =
        image.apply(&Command::CreatePartitionsAlone { topic_id: Uuid::from_u128(2), total: 3 }).unwrap();
    let grown: Vec<_> = applied.created.iter().map(|c| (c.partition, c.group_id)).collect();
    assert_eq!(grown, [(1, 4), (2, 5)]);
    assert_eq!(image.topics["a"].partitions[2], PartitionInfo::at_rest(5, vec![1]));
    assert_eq!(image.next_group_id, 6);
}

#[test]
fn refused_commands_change_nothing() {
    let mut image = MetadataImage::empty(node());
    image.apply(&create("a", 1, 2)).unwrap();
    image.next_producer_id = i64::MAX - 5;
    let before = image.snapshot();
    let id = Uuid::from_u128(1);
    let other = Uuid::from_u128(9);
    for (command, error) in [
        (create("a", 2, 1), ApplyError::TopicExists("a".into())),
        (create("b", 1, 1), ApplyError::TopicIdExists(id)),
        (create("b", 0, 1), ApplyError::TopicIdExists(Uuid::nil())),
        (create("b", 2, 0), ApplyError::BadPartitionCount(0)),
        (create_alone("b", 2, 0), ApplyError::BadPartitionCount(0)),
        (create_alone("b", 2, i32::MAX), ApplyError::BadPartitionCount(i32::MAX)),
        (place("b", 2, &[&[1], &[]]), ApplyError::BadReplicas(vec![])),
        (place("b", 2, &[&[1, 2]]), ApplyError::BadReplicas(vec![1, 2])),
        (
            Command::CreatePartitions { topic_id: id, assignments: vec![] },
            ApplyError::NotMorePartitions { topic: "a".into(), has: 2, asked: 2 },
        ),
        (Command::DeleteTopic { id: other }, ApplyError::NoSuchTopic(other)),
        (
            Command::CreatePartitionsAlone { topic_id: id, total: 2 },
            ApplyError::NotMorePartitions { topic: "a".into(), has: 2, asked: 2 },
        ),
        (
            Command::CreatePartitionsAlone { topic_id: id, total: -1 },
            ApplyError::NotMorePartitions { topic: "a".into(), has: 2, asked: -1 },
        ),
        (Command::AllocateProducerIds { count: 0 }, ApplyError::BadProducerIdCount(0)),
        (Command::AllocateProducerIds { count: 6 }, ApplyError::IdsExhausted),
    ] {
        assert_eq!(image.apply(&command), Err(error), "{command:?}");
        assert_eq!(image.snapshot(), before, "{command:?}");
    }
    image.next_group_id = u64::MAX;
    assert_eq!(image.apply(&create("b", 2, 1)), Err(ApplyError::IdsExhausted));
    assert_eq!(image.topics.len(), 1);
}

#[test]
fn cluster_id_is_given_once() {
    let mut image = MetadataImage::empty(node());
    let created = |id: &str| Command::ClusterCreated { cluster_id: id.into() };
    image.apply(&created("x")).unwrap();
    image.apply(&created("x")).unwrap();
    assert_eq!(image.apply(&created("y")), Err(ApplyError::ClusterExists("x".into())));
    assert_eq!(image.cluster_id, "x");
}

#[test]
fn producer_id_blocks_do_not_overlap() {
    let mut image = MetadataImage::empty(node());
    let allocate = Command::AllocateProducerIds { count: 1000 };
    assert_eq!(image.apply(&allocate).unwrap().producer_id_start, Some(0));
    assert_eq!(image.apply(&allocate).unwrap().producer_id_start, Some(1000));
    let restored = MetadataImage::restore(node(), &image.snapshot()).unwrap();
    assert_eq!(restored.next_producer_id, 2000);
}

#[test]
fn configs_of_topics_and_brokers_reach_the_effective_ones() {
    let fixed = BrokerConfig::from_map(&map(&[("log.retention.hours", "1")])).unwrap();
    let mut image = MetadataImage::empty(node()).with_static_configs(&fixed);
    image.apply(&create("a", 1, 1)).unwrap();
    image.apply(&create("b", 2, 1)).unwrap();
    assert_eq!(image.topics["a"].effective.retention_ms, 3_600_000);
    let a = Uuid::from_u128(1);
    let applied = image
        .apply(&Command::SetTopicConfigs {
            topic_id: a,
            set: set(&[("retention.ms", Some("5")), ("gone", None)]),
        })
        .unwrap();
    assert_eq!(applied.configs_changed.as_deref(), Some("a"));
    assert_eq!(image.topics["a"].effective.retention_ms, 5);
    let brokers =
        |value| Command::SetBrokerConfigs { node_id: None, set: set(&[("log.retention.ms", value)]) };
    let applied = image.apply(&brokers(Some("9"))).unwrap();
    assert_eq!(applied.topics_reconfigured, ["b"]);
    assert!(applied.broker_configs_changed && applied.configs_changed.is_none());
    let of_node =
        Command::SetBrokerConfigs { node_id: Some(1), set: set(&[("log.retention.ms", Some("8"))]) };
    image.apply(&of_node).unwrap();
    let of_other =
        Command::SetBrokerConfigs { node_id: Some(2), set: set(&[("log.retention.ms", Some("7"))]) };
    assert_eq!(image.apply(&of_other).unwrap().topics_reconfigured, Vec::<String>::new());
    assert_eq!(image.topics["b"].effective.retention_ms, 8);
    let restored = MetadataImage::restore(node(), &image.snapshot()).unwrap();
    assert_eq!(restored.node_configs, image.node_configs);
    assert_eq!(restored.topics["b"].effective.retention_ms, 8);
    let clear = Command::SetBrokerConfigs { node_id: Some(1), set: set(&[("log.retention.ms", None)]) };
    image.apply(&clear).unwrap();
    assert_eq!(image.topics["b"].effective.retention_ms, 9);
    assert!(!image.node_configs.contains_key(&1));
    image.apply(&brokers(None)).unwrap();
    assert_eq!(image.topics["b"].effective.retention_ms, 3_600_000);
    assert_eq!(image.topics["a"].effective.retention_ms, 5);
}

#[test]
fn a_clone_does_not_see_later_changes() {
    let mut image = MetadataImage::empty(node());
    image.apply(&create("a", 1, 1)).unwrap();
    let published = image.clone();
    image.apply(&Command::DeleteTopic { id: Uuid::from_u128(1) }).unwrap();
    assert!(published.topics.contains_key("a") && published.topic_by_id(&Uuid::from_u128(1)).is_some());
    assert_eq!(published.partition_count(), 1);
}

#[test]
fn internal_topics_are_marked() {
    let mut image = MetadataImage::empty(node());
    image.apply(&create("__consumer_offsets", 1, 1)).unwrap();
    image.apply(&create("__mine", 2, 1)).unwrap();
    assert!(image.topics["__consumer_offsets"].internal && !image.topics["__mine"].internal);
}

/// The bytes that released versions wrote for a topic of one partition and, from the second version on, one group.
#[test]
fn snapshots_of_older_versions_are_read() {
    let mut old = b"FMI\x02".to_vec();
    // No cluster id, next group 2, no producer ids, no broker or node configs, one topic.
    old.extend([0, 2, 0, 0, 0, 1, 1, b'a']);
    old.extend(Uuid::from_u128(1).as_bytes());
    // One partition: group 1 on node 1. No configs.
    old.extend([1, 1, 1, 2, 0]);
    let first = [&b"FMI\x01"[..], &old[4..]].concat();
    old.extend([1, 1, b'g', 1, 1, b'x', 1, b'y']);

    let mut image = MetadataImage::empty(node());
    image.apply(&create("a", 1, 1)).unwrap();
    assert_eq!(MetadataImage::restore(node(), &first).unwrap().snapshot(), image.snapshot());
    image.apply(&Command::SetGroupConfigs { group: "g".into(), set: set(&[("x", Some("y"))]) }).unwrap();
    assert_eq!(MetadataImage::restore(node(), &old).unwrap().snapshot(), image.snapshot());
    old[3] = 4;
    assert_eq!(MetadataImage::restore(node(), &old).unwrap_err(), CodecError::UnknownVersion(4));
}

#[test]
fn the_third_version_of_snapshots_stays() {
    let mut image = MetadataImage::empty(node());
    for id in [1, 2] {
        image.apply(&register(id)).unwrap();
    }
    image.apply(&place("a", 1, &[&[1], &[1, 2]])).unwrap();
    image.apply(&move_to(1, 0, Some(&[2]))).unwrap();
    image.apply(&move_to(1, 0, None)).unwrap();
    image.apply(&Command::SetNodeState { id: 2, state: NodeState::Maintenance }).unwrap();
    image.apply(&Command::FinalizeVersion { version: 2 }).unwrap();
    let mut expected = b"FMI\x03".to_vec();
    expected.extend([0, 3, 0, 0, 0, 1, 1, b'a']);
    expected.extend(Uuid::from_u128(1).as_bytes());
    // Group 1 rests on node 1, is to be there, and an earlier target named node 2; group 2 rests on both.
    expected.extend([2, 1, 1, 2, 1, 1, 2, 1, 4, 2, 2, 2, 4, 0, 0]);
    // No groups, finalized version, nodes.
    expected.extend([0, 2, 2]);
    for (id, state) in [(1, 0), (2, 1)] {
        expected.extend([2 * id, 2, b'h', b'0' + id, 0x84, 0x47, 0, 8, b'h', b'0' + id]);
        expected.extend(b":33145");
        expected.extend(Uuid::from_u128(9).as_bytes());
        expected.extend([7, 2, state]);
    }
    assert_eq!(image.snapshot(), expected);
    let restored = MetadataImage::restore(node(), &expected).unwrap();
    assert_eq!((restored.nodes, restored.topics), (image.nodes, image.topics));
    assert_eq!(restored.finalized_version, 2);
}

fn move_to(topic: u128, partition: i32, target: Option<&[i32]>) -> Command {
    let target = target.map(<[i32]>::to_vec);
    Command::SetReplicas { topic_id: Uuid::from_u128(topic), partition, target }
}

fn reached(topic: u128, partition: i32, replicas: &[i32]) -> Command {
    Command::ReplicasReached { topic_id: Uuid::from_u128(topic), partition, replicas: replicas.to_vec() }
}

/// Two nodes read the log of a broker that was alone: for both the topic lies on that broker.
#[test]
fn what_a_lone_broker_made_lies_on_the_first_node_that_is_registered() {
    for reader in [1, 5] {
        let mut image = MetadataImage::empty(NodeInfo { id: reader, ..node() });
        image.apply(&create_alone("a", 1, 1)).unwrap();
        assert_eq!(image.brokers().iter().map(|broker| broker.id).collect::<Vec<_>>(), [reader]);
        for id in [1, 5] {
            image.apply(&register(id)).unwrap();
        }
        image.apply(&Command::CreatePartitionsAlone { topic_id: Uuid::from_u128(1), total: 2 }).unwrap();
        let partitions = &image.topics["a"].partitions;
        assert!(partitions.iter().all(|info| info.replicas == [1]), "{reader}: {partitions:?}");
    }
}

#[test]
fn nodes_come_back_keep_their_state_and_leave_empty() {
    let mut image = MetadataImage::empty(node());
    for id in [1, 2, 3] {
        image.apply(&register(id)).unwrap();
    }
    assert_eq!(image.apply(&register(-1)), Err(ApplyError::BadNodeId(-1)));
    image.apply(&place("a", 1, &[&[1, 2]])).unwrap();
    image.apply(&Command::SetNodeState { id: 2, state: NodeState::Decommissioning }).unwrap();
    assert_eq!(image.active_brokers(), 2);
    image.apply(&register(2)).unwrap();
    assert_eq!(image.nodes[&2].state, NodeState::Decommissioning);
    let Command::RegisterNode(mut copied) = register(2) else { unreachable!() };
    copied.directory_id = Uuid::from_u128(10);
    assert_eq!(image.apply(&Command::RegisterNode(copied)), Err(ApplyError::OtherDirectory(2)));
    let leave = Command::RemoveNode { id: 2 };
    assert_eq!(image.apply(&leave), Err(ApplyError::NodeHoldsReplicas { id: 2, replicas: 1 }));
    image.apply(&move_to(1, 0, Some(&[1, 3]))).unwrap();
    // The move is under way: the node still counts.
    assert_eq!(image.apply(&leave), Err(ApplyError::NodeHoldsReplicas { id: 2, replicas: 1 }));
    image.apply(&reached(1, 0, &[3, 1])).unwrap();
    assert_eq!(image.topics["a"].partitions[0], PartitionInfo::at_rest(1, vec![1, 3]));
    image.apply(&Command::SetBrokerConfigs { node_id: Some(2), set: set(&[("x", Some("y"))]) }).unwrap();
    assert!(image.apply(&leave).unwrap().nodes_changed);
    assert!(!image.nodes.contains_key(&2) && !image.node_configs.contains_key(&2));
    assert_eq!(image.apply(&leave), Err(ApplyError::NoSuchNode(2)));
    assert_eq!(image.apply(&place("b", 2, &[&[1, 2]])), Err(ApplyError::BadReplicas(vec![1, 2])));
    let mut alone = MetadataImage::empty(node());
    alone.apply(&register(1)).unwrap();
    assert_eq!(alone.apply(&Command::RemoveNode { id: 1 }), Err(ApplyError::LastNode(1)));
}

#[test]
fn a_move_that_is_given_up_is_a_move_back() {
    let mut image = MetadataImage::empty(node());
    for id in [1, 2, 3, 4] {
        image.apply(&register(id)).unwrap();
    }
    image.apply(&place("a", 1, &[&[1, 2]])).unwrap();
    assert_eq!(image.apply(&move_to(1, 0, None)), Ok(Applied::default()));
    let moved = image.apply(&move_to(1, 0, Some(&[3, 1]))).unwrap().moved;
    assert_eq!(
        (moved[0].holders_before.as_slice(), moved[0].holders.as_slice()),
        (&[1, 2][..], &[3, 1, 2][..])
    );
    let info = &image.topics["a"].partitions[0];
    assert_eq!((info.adding(), info.removing()), (vec![3], vec![2]));
    image.apply(&move_to(1, 0, None)).unwrap();
    let info = &image.topics["a"].partitions[0];
    // The group may count on node 3 already, so it keeps the log until the group does not.
    assert_eq!((info.goal(), info.holders(), info.removing()), (&[1, 2][..], vec![1, 2, 3], vec![3]));
    // Another target: nobody who might be in the group is forgotten.
    image.apply(&move_to(1, 0, Some(&[4]))).unwrap();
    assert_eq!(image.topics["a"].partitions[0].holders(), [4, 1, 2, 3]);
    let stale = Err(ApplyError::NotTheTarget { topic: "a".into(), partition: 0 });
    assert_eq!(image.apply(&reached(1, 0, &[1, 2])), stale);
    let moved = image.apply(&reached(1, 0, &[4])).unwrap().moved;
    assert_eq!(
        (moved[0].holders_before.as_slice(), moved[0].holders.as_slice()),
        (&[4, 1, 2, 3][..], &[4][..])
    );
    assert_eq!(image.apply(&reached(1, 0, &[4])), stale);
    assert!(image.apply(&move_to(1, 1, None)).is_err() && image.apply(&move_to(1, -1, None)).is_err());
    assert!(image.apply(&move_to(1, 0, Some(&[9]))).is_err());
}

#[test]
fn a_version_is_finalized_when_all_speak_it_and_nobody_older_comes_back() {
    let mut image = MetadataImage::empty(node());
    image.apply(&register(1)).unwrap();
    let finalize = |version| Command::FinalizeVersion { version };
    let too_old = |finalized| Err(ApplyError::VersionTooOld { id: 1, speaks: 2, finalized });
    assert_eq!(image.apply(&finalize(3)), too_old(3));
    image.apply(&finalize(2)).unwrap();
    assert_eq!(image.apply(&finalize(1)), Err(ApplyError::VersionGoesBack { from: 2, to: 1 }));
    let Command::RegisterNode(mut old) = register(1) else { unreachable!() };
    old.version_max = 1;
    let refused = Err(ApplyError::VersionTooOld { id: 1, speaks: 1, finalized: 2 });
    assert_eq!(image.apply(&Command::RegisterNode(old)), refused);
}

#[test]
fn damaged_snapshots_are_refused() {
    let mut image = MetadataImage::empty(node());
    image.apply(&create("a", 1, 1)).unwrap();
    let set = BTreeMap::from([("consumer.session.timeout.ms".to_string(), Some("50000".to_string()))]);
    image.apply(&Command::SetGroupConfigs { group: "g".into(), set }).unwrap();
    let good = image.snapshot();
    for length in 0..good.len() {
        assert!(MetadataImage::restore(node(), &good[..length]).is_err(), "{length}");
    }
    assert_eq!(
        MetadataImage::restore(node(), b"XYZ").unwrap_err(),
        CodecError::Inconsistent("this is not a metadata snapshot")
    );
    // The group id of its partition was never handed out.
    image.next_group_id = 1;
    let error = MetadataImage::restore(node(), &image.snapshot()).unwrap_err();
    assert_eq!(error, CodecError::Inconsistent("a partition's group id"));
}

/// Few names and ids, so that histories hit what exists.
fn step() -> impl Strategy<Value = Command> {
    let name = prop_oneof![Just("a"), Just("b"), Just("c.d"), Just("__consumer_offsets")];
    let id = (0u128..6).prop_map(Uuid::from_u128);
    let key = prop_oneof![Just("retention.ms"), Just("log.retention.ms"), Just("x")];
    let changes = proptest::collection::btree_map(
        key.prop_map(str::to_string),
        proptest::option::of((0u32..9).prop_map(|n| n.to_string())),
        0..3,
    );
    let group_changes = changes.clone();
    let replicas = proptest::collection::vec(0i32..4, 0..4);
    let some_replicas = proptest::option::of(replicas.clone());
    let assignments = proptest::collection::vec(replicas.clone(), 0..3);
    let more = assignments.clone();
    let state =
        prop_oneof![Just(NodeState::Active), Just(NodeState::Maintenance), Just(NodeState::Decommissioning)];
    prop_oneof![
        (0i32..4).prop_map(register),
        (0i32..4).prop_map(|id| Command::RemoveNode { id }),
        (0i32..4, state).prop_map(|(id, state)| Command::SetNodeState { id, state }),
        (name.clone(), id.clone(), assignments).prop_map(|(name, id, assignments)| {
            let configs = BTreeMap::new();
            Command::CreateTopic { name: name.into(), id, assignments, configs }
        }),
        (id.clone(), more)
            .prop_map(|(topic_id, assignments)| Command::CreatePartitions { topic_id, assignments }),
        (id.clone(), 0i32..3, some_replicas).prop_map(|(topic_id, partition, target)| Command::SetReplicas {
            topic_id,
            partition,
            target
        }),
        (id.clone(), 0i32..3, replicas).prop_map(|(topic_id, partition, replicas)| {
            Command::ReplicasReached { topic_id, partition, replicas }
        }),
        (0u16..4).prop_map(|version| Command::FinalizeVersion { version }),
        (name, id.clone(), -1i32..4, 0i16..3).prop_map(|(name, id, partitions, replication_factor)| {
            Command::CreateTopicAlone {
                name: name.into(),
                id,
                partitions,
                replication_factor,
                configs: BTreeMap::new(),
            }
        }),
        id.clone().prop_map(|id| Command::DeleteTopic { id }),
        (id.clone(), 0i32..6)
            .prop_map(|(topic_id, total)| { Command::CreatePartitionsAlone { topic_id, total } }),
        (id, changes.clone()).prop_map(|(topic_id, set)| Command::SetTopicConfigs { topic_id, set }),
        (proptest::option::of(0i32..3), changes)
            .prop_map(|(node_id, set)| Command::SetBrokerConfigs { node_id, set }),
        (-1i64..3).prop_map(|count| Command::AllocateProducerIds { count }),
        ("[gh]", group_changes).prop_map(|(group, set)| Command::SetGroupConfigs { group, set }),
    ]
}

fn check_invariants(image: &MetadataImage) {
    assert_eq!(image.topics.len(), image.topic_ids.len());
    let mut groups = std::collections::BTreeSet::new();
    for (name, topic) in image.topics.iter() {
        assert_eq!(image.topic_ids.get(&topic.id), Some(name));
        assert_eq!(*topic.effective, TopicConfig::resolve(&topic.configs, &image.layers()));
        for partition in &topic.partitions {
            assert!(partition.group_id > 0 && partition.group_id < image.next_group_id);
            assert!(groups.insert(partition.group_id));
            let holders = partition.holders();
            assert!(image.nodes.is_empty() || holders.iter().all(|id| image.nodes.contains_key(id)));
            assert!(partition.target.is_some() || partition.dropped.is_empty());
        }
    }
}

proptest! {
    #[test]
    fn histories_are_deterministic_and_survive_a_snapshot(
        steps in proptest::collection::vec(step(), 0..40),
        cut in 0usize..40,
    ) {
        let mut first = MetadataImage::empty(node());
        let mut second = MetadataImage::empty(node());
        for (at, command) in steps.iter().enumerate() {
            if at == cut {
                second = MetadataImage::restore(node(), &second.snapshot()).unwrap();
            }
            let before = first.snapshot();
            let outcome = first.apply(command);
            // What replicas replay went through the codec.
            let replayed = Command::decode(&command.encode()).unwrap();
            prop_assert_eq!(&outcome, &second.apply(&replayed));
            if outcome.is_err() {
                prop_assert_eq!(first.snapshot(), before);
            }
            check_invariants(&first);
            check_invariants(&second);
        }
        prop_assert_eq!(first.snapshot(), second.snapshot());
        prop_assert_eq!(&first.topics, &second.topics);
    }

    #[test]
    fn any_snapshot_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = MetadataImage::restore(node(), &bytes);
        for version in [1, 2, 3] {
            let mut marked = b"FMI".to_vec();
            marked.push(version);
            marked.extend(&bytes);
            if let Ok(image) = MetadataImage::restore(node(), &marked) {
                check_invariants(&image);
            }
        }
    }
}
