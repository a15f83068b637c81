use proptest::prelude::*;

use super::*;

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9._é-]{0,12}"
}

fn changes() -> impl Strategy<Value = BTreeMap<String, Option<String>>> {
    proptest::collection::btree_map(text(), proptest::option::of(text()), 0..4)
}

fn id() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

pub(crate) fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        text().prop_map(|cluster_id| Command::ClusterCreated { cluster_id }),
        (text(), id(), any::<i32>(), any::<i16>(), proptest::collection::btree_map(text(), text(), 0..4))
            .prop_map(|(name, id, partitions, replication_factor, configs)| {
                Command::CreateTopicAlone { name, id, partitions, replication_factor, configs }
            }),
        id().prop_map(|id| Command::DeleteTopic { id }),
        (id(), any::<i32>()).prop_map(|(topic_id, total)| Command::CreatePartitionsAlone { topic_id, total }),
        (id(), changes()).prop_map(|(topic_id, set)| Command::SetTopicConfigs { topic_id, set }),
        (proptest::option::of(any::<i32>()), changes())
            .prop_map(|(node_id, set)| Command::SetBrokerConfigs { node_id, set }),
        any::<i64>().prop_map(|count| Command::AllocateProducerIds { count }),
        (text(), changes()).prop_map(|(group, set)| Command::SetGroupConfigs { group, set }),
        node().prop_map(Command::RegisterNode),
        any::<i32>().prop_map(|id| Command::RemoveNode { id }),
        (any::<i32>(), state()).prop_map(|(id, state)| Command::SetNodeState { id, state }),
        (text(), id(), assignments(), proptest::collection::btree_map(text(), text(), 0..4)).prop_map(
            |(name, id, assignments, configs)| Command::CreateTopic { name, id, assignments, configs }
        ),
        (id(), assignments())
            .prop_map(|(topic_id, assignments)| Command::CreatePartitions { topic_id, assignments }),
        (id(), any::<i32>(), proptest::option::of(ids()))
            .prop_map(|(topic_id, partition, target)| Command::SetReplicas { topic_id, partition, target }),
        (id(), any::<i32>(), ids()).prop_map(|(topic_id, partition, replicas)| {
            Command::ReplicasReached { topic_id, partition, replicas }
        }),
        any::<u16>().prop_map(|version| Command::FinalizeVersion { version }),
    ]
}

fn ids() -> impl Strategy<Value = Vec<i32>> {
    proptest::collection::vec(any::<i32>(), 0..4)
}

fn assignments() -> impl Strategy<Value = Vec<Vec<i32>>> {
    proptest::collection::vec(ids(), 0..4)
}

fn state() -> impl Strategy<Value = NodeState> {
    prop_oneof![Just(NodeState::Active), Just(NodeState::Maintenance), Just(NodeState::Decommissioning)]
}

fn node() -> impl Strategy<Value = NodeRecord> {
    let place = (any::<i32>(), text(), any::<u16>(), proptest::option::of(text()), text());
    (place, id(), any::<u64>(), any::<u16>(), state()).prop_map(
        |((id, host, port, rack, rpc_address), directory_id, boot_id, version_max, state)| NodeRecord {
            id,
            host,
            port,
            rack,
            rpc_address,
            directory_id,
            boot_id,
            version_max,
            state,
        },
    )
}

proptest! {
    #[test]
    fn round_trip(command in command()) {
        let bytes = command.encode();
        prop_assert_eq!(Command::decode(&bytes), Ok(command));
        // No proper prefix is a command, nor is anything longer.
        for length in 0..bytes.len() {
            prop_assert!(Command::decode(&bytes[..length]).is_err());
        }
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert!(Command::decode(&longer).is_err());
    }

    #[test]
    fn any_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = Command::decode(&bytes);
        let mut with_version = vec![VERSION];
        with_version.extend(bytes);
        let _ = Command::decode(&with_version);
    }
}

#[test]
fn the_forms_of_a_lone_broker_stay() {
    let command = Command::CreateTopicAlone {
        name: "t".into(),
        id: Uuid::from_u128(1),
        partitions: 3,
        replication_factor: 1,
        configs: BTreeMap::from([("a".to_string(), "b".to_string())]),
    };
    let mut expected = vec![1, 1, 1, b't'];
    expected.extend([0; 15]);
    expected.extend([1, 6, 2, 1, 1, b'a', 1, b'b']);
    assert_eq!(command.encode(), expected);
    let mut expected = vec![1, 3];
    expected.extend([0; 15]);
    expected.extend([1, 10]);
    let command = Command::CreatePartitionsAlone { topic_id: Uuid::from_u128(1), total: 5 };
    assert_eq!(command.encode(), expected);
    assert_eq!(Command::decode(&[2, 0, 0]), Err(CodecError::UnknownVersion(2)));
    assert_eq!(Command::decode(&[1, 99]), Err(CodecError::UnknownCommand(99)));
}

#[test]
fn the_forms_of_a_cluster_stay() {
    let id = Uuid::from_u128(1);
    let mut uuid = vec![0; 15];
    uuid.push(1);
    let node = NodeRecord {
        id: 2,
        host: "h".into(),
        port: 9092,
        rack: Some("r".into()),
        rpc_address: "h:1".into(),
        directory_id: id,
        boot_id: 300,
        version_max: 1,
        state: NodeState::Maintenance,
    };
    let golden: [(Command, &[u8], &[u8]); 8] = [
        (
            Command::RegisterNode(node),
            &[1, 8, 4, 1, b'h', 0x84, 0x47, 1, 1, b'r', 3, b'h', b':', b'1'],
            &[0xac, 2, 1, 1],
        ),
        (Command::RemoveNode { id: 2 }, &[1, 9, 4], &[]),
        (Command::SetNodeState { id: 2, state: NodeState::Decommissioning }, &[1, 10, 4, 2], &[]),
        (
            Command::CreateTopic {
                name: "t".into(),
                id,
                assignments: vec![vec![1, 2], vec![2]],
                configs: BTreeMap::from([("a".to_string(), "b".to_string())]),
            },
            &[1, 11, 1, b't'],
            &[2, 2, 2, 4, 1, 4, 1, 1, b'a', 1, b'b'],
        ),
        (Command::CreatePartitions { topic_id: id, assignments: vec![vec![1, 2]] }, &[1, 12], &[1, 2, 2, 4]),
        (
            Command::SetReplicas { topic_id: id, partition: 3, target: Some(vec![1, 2]) },
            &[1, 13],
            &[6, 1, 2, 2, 4],
        ),
        (Command::ReplicasReached { topic_id: id, partition: 3, replicas: vec![2] }, &[1, 14], &[6, 1, 4]),
        (Command::FinalizeVersion { version: 200 }, &[1, 15, 0xc8, 1], &[]),
    ];
    for (command, before, after) in golden {
        let id: &[u8] = if after.is_empty() { &[] } else { &uuid };
        let expected = [before, id, after].concat();
        assert_eq!(command.encode(), expected, "{command:?}");
        assert_eq!(Command::decode(&expected), Ok(command));
    }
}
