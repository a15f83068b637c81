//! Nodes come and go, partitions move and leaders go home in a cluster of real processes, while an idempotent producer and a
//! consumer group go on. Afterwards the checker finds nothing, and the replicas have the same bytes.

use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::load::Load;
use flumen_tests::wire::{Wire, topic_name};
use flumen_tests::witness::Witness;
use kafka_protocol::messages::elect_leaders_request::TopicPartitions;
use kafka_protocol::messages::{ElectLeadersRequest, MetadataRequest};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 2;

fn wire(cluster: &Cluster) -> Wire {
    Wire::connect(&cluster.any().unwrap().kafka).unwrap()
}

/// Replicas of each partition, and the brokers, as clients are told.
fn described(cluster: &Cluster) -> (Vec<Vec<i32>>, Vec<i32>) {
    let request = MetadataRequest::default().with_topics(None);
    let answer = wire(cluster).ask(9, &request).unwrap();
    let topic = answer.topics.iter().find(|topic| topic.name.as_ref().is_some_and(|n| n.as_str() == TOPIC));
    let mut partitions: Vec<_> = topic
        .unwrap()
        .partitions
        .iter()
        .map(|p| (p.partition_index, p.replica_nodes.iter().map(|id| id.0).collect()))
        .collect();
    partitions.sort();
    let brokers = answer.brokers.iter().map(|broker| broker.node_id.0).collect();
    (partitions.into_iter().map(|(_, replicas)| replicas).collect(), brokers)
}

#[test]
fn partitions_move_to_a_new_node_and_leaders_go_home() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses = vec![Witness::start(&kafka, TOPIC, "watchers").unwrap()];
    cluster.progress(&load, "three nodes").unwrap();

    cluster.add().unwrap();
    cluster.until("node 4 to be known", || (described(&cluster).1 == [1, 2, 3, 4]).then_some(())).unwrap();
    let (before, _) = described(&cluster);
    assert!(before.iter().flatten().all(|id| *id != 4), "{before:?}");

    // The leader's replica goes to the new node, which is also to lead.
    let target = [4, before[0][1], before[0][2]];
    assert_eq!(cluster.reassign(TOPIC, 0, Some(&target)).unwrap(), 0);
    // Whoever is asked may not have heard of the move yet.
    cluster
        .until("the partition to be there", || (described(&cluster).0[0] == target).then_some(()))
        .unwrap();
    cluster.progress(&load, "partition 0 has moved").unwrap();

    // A move that is given up leaves everything where it was.
    assert_eq!(cluster.reassign(TOPIC, 1, Some(&[4])).unwrap(), 0);
    assert_eq!(cluster.reassign(TOPIC, 1, None).unwrap(), 0);
    cluster.await_no_moves().unwrap();
    cluster.until("it to be where it was", || (described(&cluster).0[1] == before[1]).then_some(())).unwrap();
    assert_eq!(cluster.reassign(TOPIC, 1, None).unwrap(), 85);
    assert_eq!(cluster.reassign(TOPIC, 1, Some(&[1, 9])).unwrap(), 39);

    let topics = vec![TopicPartitions::default().with_topic(topic_name(TOPIC)).with_partitions(vec![0])];
    let elect = ElectLeadersRequest::default().with_topic_partitions(Some(topics)).with_timeout_ms(10_000);
    cluster
        .until("node 4 to lead partition 0", || {
            let answer = wire(&cluster).ask(2, &elect).ok()?;
            // 84: it does already.
            let code = answer.replica_election_results[0].partition_result[0].error_code;
            matches!(code, 0 | 84).then_some(())
        })
        .unwrap();
    assert_eq!(cluster.leader_of(TOPIC, 0).unwrap(), 3);
    cluster.progress(&load, "node 4 leads").unwrap();

    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}

/// A node that had a replica once gets the whole log again, with every change of members that it has seen and missed.
#[test]
fn a_replica_that_was_given_up_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 4, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "four nodes").unwrap();
    for target in [[4, 3, 1], [1, 4, 2], [2, 3, 4], [3, 1, 2], [4, 1, 2], [2, 1, 3]] {
        assert_eq!(cluster.reassign(TOPIC, 0, Some(&target)).unwrap(), 0);
        // Whoever is asked may not have heard of the move yet.
        cluster
            .until("the partition to be there", || (described(&cluster).0[0] == target).then_some(()))
            .unwrap();
        cluster.progress(&load, &format!("partition 0 is on {target:?}")).unwrap();
        let health = cluster.any().unwrap().cli(&["cluster", "health"]).unwrap();
        assert!(!health.stdout.contains("PARTITION_DAMAGED"), "{}", health.stdout);
        // What a node believes of the members after it got the log is what it starts with.
        let leader = cluster.leader_of(TOPIC, 0).unwrap();
        cluster.nodes[leader].kill_9();
        cluster.progress(&load, &format!("node {} killed", leader + 1)).unwrap();
        cluster.nodes[leader].restart().unwrap();
    }
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut []).unwrap();
}
