use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::codec::CodecError;

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
    Command::CreateTopic {
        name: name.into(),
        id: Uuid::from_u128(id),
        partitions,
        replication_factor: 1,
        configs: BTreeMap::new(),
    }
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
    let applied = image.apply(&Command::CreatePartitions { topic_id: Uuid::from_u128(2), total: 3 }).unwrap();
    let grown: Vec<_> = applied.created.iter().map(|c| (c.partition, c.group_id)).collect();
    assert_eq!(grown, [(1, 4), (2, 5)]);
    assert_eq!(image.topics["a"].partitions[2], PartitionInfo { group_id: 5, replicas: vec![1] });
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
        (create("b", 2, i32::MAX), ApplyError::BadPartitionCount(i32::MAX)),
        (Command::DeleteTopic { id: other }, ApplyError::NoSuchTopic(other)),
        (
            Command::CreatePartitions { topic_id: id, total: 2 },
            ApplyError::NotMorePartitions { topic: "a".into(), has: 2, asked: 2 },
        ),
        (
            Command::CreatePartitions { topic_id: id, total: -1 },
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

#[test]
fn snapshots_of_the_first_version_are_read() {
    let mut image = MetadataImage::empty(node());
    image.apply(&create("a", 1, 1)).unwrap();
    let mut first = image.snapshot();
    // The second version ends with the number of groups that have configurations: none.
    assert_eq!((first[3], first.pop()), (2, Some(0)));
    first[3] = 1;
    assert_eq!(MetadataImage::restore(node(), &first).unwrap().snapshot(), image.snapshot());
    first[3] = 3;
    assert_eq!(MetadataImage::restore(node(), &first).unwrap_err(), CodecError::UnknownVersion(3));
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
    prop_oneof![
        (name, id.clone(), -1i32..4, 0i16..3).prop_map(|(name, id, partitions, replication_factor)| {
            Command::CreateTopic {
                name: name.into(),
                id,
                partitions,
                replication_factor,
                configs: BTreeMap::new(),
            }
        }),
        id.clone().prop_map(|id| Command::DeleteTopic { id }),
        (id.clone(), 0i32..6).prop_map(|(topic_id, total)| Command::CreatePartitions { topic_id, total }),
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
        assert_eq!(topic.effective, TopicConfig::resolve(&topic.configs, &image.layers()));
        for partition in &topic.partitions {
            assert!(partition.group_id > 0 && partition.group_id < image.next_group_id);
            assert!(groups.insert(partition.group_id));
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
        }
        prop_assert_eq!(first.snapshot(), second.snapshot());
        prop_assert_eq!(&first.topics, &second.topics);
    }

    #[test]
    fn any_snapshot_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = MetadataImage::restore(node(), &bytes);
        for version in [1, 2] {
            let mut marked = b"FMI".to_vec();
            marked.push(version);
            marked.extend(&bytes);
            if let Ok(image) = MetadataImage::restore(node(), &marked) {
                check_invariants(&image);
            }
        }
    }
}
