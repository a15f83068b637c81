//! Which broker of several a client may read from, what one that was deposed still says, and who is called in sync.

use flumen_tests::cluster::Cluster;
use flumen_tests::kafka::{ends_of, read_all};
use flumen_tests::segment_file;
use flumen_tests::wire::{Wire, batch, produce, text, topic_name};
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::{BrokerId, FetchRequest, FetchResponse, ListOffsetsRequest};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use serde_json::json;

const NOT_LEADER_OR_FOLLOWER: i16 = 6;
const FENCED_LEADER_EPOCH: i16 = 74;
const UNKNOWN_LEADER_EPOCH: i16 = 75;
/// Topics go by name, leaders are told by tag.
const VERSION: i16 = 12;

fn fetch(wire: &mut Wire, rack: &str, epoch: i32) -> FetchResponse {
    let partition = FetchPartition::default()
        .with_partition(0)
        .with_fetch_offset(0)
        .with_current_leader_epoch(epoch)
        .with_partition_max_bytes(1 << 20);
    let topic = FetchTopic::default().with_topic(topic_name("t")).with_partitions(vec![partition]);
    let request =
        FetchRequest::default().with_max_bytes(1 << 20).with_rack_id(text(rack)).with_topics(vec![topic]);
    wire.ask(VERSION, &request).unwrap()
}

fn add(cluster: &Cluster, leader: usize, values: &[&str]) {
    let mut wire = Wire::connect(&cluster.nodes[leader].kafka).unwrap();
    let answer = wire.ask(9, &produce("t", 0, -1, Some(batch(values, |_| {})))).unwrap();
    assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
}

#[test]
fn clients_are_sent_to_whom_they_may_read_from() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["broker.rack=r{id}"]).unwrap();
    cluster.create_topic("t", 1, 3, &json!({})).unwrap();
    let leader = cluster.leader_of("t", 0).unwrap();
    let (follower, leader_id) = ((leader + 1) % 3, leader as i32 + 1);
    add(&cluster, leader, &["a", "b", "c"]);
    cluster.await_caught_up("t", &[3]).unwrap();

    let mut there = Wire::connect(&cluster.nodes[leader].kafka).unwrap();
    let mut here = Wire::connect(&cluster.nodes[follower].kafka).unwrap();
    let rack = format!("r{}", follower + 1);

    // Somebody without a rack, or of another, has no business with a follower, and hears who leads.
    let mut epoch = -1;
    for rack in ["", "elsewhere", &format!("r{leader_id}")] {
        let answer = fetch(&mut here, rack, -1);
        let partition = &answer.responses[0].partitions[0];
        assert_eq!(partition.error_code, NOT_LEADER_OR_FOLLOWER, "{rack}");
        assert_eq!(partition.current_leader.leader_id, BrokerId(leader_id));
        epoch = partition.current_leader.leader_epoch;
    }
    // The leader sends whoever is nearer to a follower there, and gives nothing.
    for near in ["", "elsewhere", &format!("r{leader_id}")] {
        let partition = &fetch(&mut there, near, epoch).responses[0].partitions[0];
        assert_eq!((partition.error_code, partition.preferred_read_replica.0), (0, -1), "{near}");
        assert!(partition.records.as_ref().is_some_and(|records| !records.is_empty()));
    }
    let partition = &fetch(&mut there, &rack, epoch).responses[0].partitions[0];
    assert_eq!((partition.error_code, partition.preferred_read_replica.0), (0, follower as i32 + 1));
    assert!(partition.records.as_ref().is_none_or(|records| records.is_empty()));
    let partition = &fetch(&mut here, &rack, epoch).responses[0].partitions[0];
    assert_eq!((partition.error_code, partition.high_watermark), (0, 3));
    assert!(partition.records.as_ref().is_some_and(|records| !records.is_empty()));
    // Epochs are fenced on both.
    for wire in [&mut there, &mut here] {
        let error = |answer: FetchResponse| answer.responses[0].partitions[0].error_code;
        assert_eq!(error(fetch(wire, &rack, epoch - 1)), FENCED_LEADER_EPOCH);
        assert_eq!(error(fetch(wire, &rack, epoch + 1)), UNKNOWN_LEADER_EPOCH);
    }

    // A real client follows.
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.kafka())
        .set("group.id", "near")
        .set("client.rack", &rack)
        .set("auto.offset.reset", "earliest")
        .create()
        .unwrap();
    consumer.subscribe(&["t"]).unwrap();
    let next = || loop {
        if let Some(Ok(message)) = consumer.poll(std::time::Duration::from_millis(100)) {
            return message.offset();
        }
    };
    assert_eq!([next(), next(), next()], [0, 1, 2]);
    add(&cluster, leader, &["d"]);
    assert_eq!(next(), 3);
    // Also when that follower goes.
    cluster.nodes[follower].kill_9();
    add(&cluster, leader, &["e"]);
    assert_eq!(next(), 4);
    let ends = ends_of(&cluster.kafka(), "t", 1).unwrap();
    assert_eq!(read_all(&cluster.kafka(), "t", &ends).unwrap().len(), 5);
}

/// The questions lie in the socket of a leader that is stopped; when it goes on, another has led and written.
#[test]
fn a_leader_that_was_deposed_does_not_tell_an_old_end() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic("t", 1, 3, &json!({})).unwrap();
    for round in 0..3 {
        let old = cluster.leader_of("t", 0).unwrap();
        add(&cluster, old, &["old"]);
        cluster.await_caught_up("t", &[2 * round + 1]).unwrap();
        let mut wire = Wire::connect(&cluster.nodes[old].kafka).unwrap();
        cluster.nodes[old].pause().unwrap();
        let partition = ListOffsetsPartition::default()
            .with_partition_index(0)
            .with_timestamp(-1)
            .with_current_leader_epoch(-1);
        let topic = ListOffsetsTopic::default().with_name(topic_name("t")).with_partitions(vec![partition]);
        let question = ListOffsetsRequest::default().with_replica_id(BrokerId(-1)).with_topics(vec![topic]);
        wire.send(7, &question).unwrap();
        let new = cluster
            .until("another leader", || {
                let leaders = cluster.nodes.iter().enumerate().filter(|(at, _)| *at != old);
                leaders
                    .filter_map(|(at, node)| {
                        let mut wire = Wire::connect(&node.kafka).ok()?;
                        let answer = wire.ask(9, &produce("t", 0, -1, Some(batch(&["new"], |_| {})))).ok()?;
                        (answer.responses[0].partition_responses[0].error_code == 0).then_some(at)
                    })
                    .next()
            })
            .unwrap();
        assert_ne!(new, old);
        cluster.nodes[old].resume().unwrap();
        let answer = wire.receive::<ListOffsetsRequest>(7).unwrap();
        let found = &answer.topics[0].partitions[0];
        assert!(
            found.error_code != 0 || found.offset == 2 * round + 2,
            "it leads no more, and tells {found:?}"
        );
        cluster.await_caught_up("t", &[2 * round + 2]).unwrap();
    }
}

/// Regression: a node was called in sync as soon as it was connected again.
#[test]
fn a_node_that_was_down_is_in_sync_when_it_has_everything() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic("t", 1, 3, &json!({})).unwrap();
    let leader = cluster.leader_of("t", 0).unwrap();
    let away = (leader + 1) % 3;
    let id = json!(away + 1);
    let in_sync = |cluster: &Cluster, at: usize| {
        let seen = cluster.nodes[at].get("/v1/cluster/partitions?topic=t").unwrap();
        seen["partitions"][0]["in_sync_replicas"].as_array().unwrap().contains(&id)
    };
    add(&cluster, leader, &["a"]);
    cluster.until("all in sync", || in_sync(&cluster, leader).then_some(())).unwrap();
    cluster.nodes[away].kill_9();
    let value = "v".repeat(500_000);
    for _ in 0..60 {
        add(&cluster, leader, &[&value]);
    }
    assert!(!in_sync(&cluster, leader));
    cluster.nodes[away].restart().unwrap();
    // The node itself does not know what it lacks before the leader has told it.
    for at in (0..3).filter(|at| *at != away) {
        cluster
            .until("it to be in sync", || {
                in_sync(&cluster, at).then(|| {
                    // All of it was committed while it was down, so it shows as soon as it is there.
                    let topic = cluster.nodes[away].get("/v1/topics/t").unwrap();
                    let end = topic["partition_list"][0]["high_watermark"].as_i64().unwrap();
                    assert_eq!(end, 61, "as node {} says", at + 1);
                })
            })
            .unwrap();
    }
}

/// Regression: a leader that had just started knew of nothing that was committed, and so a replica that had lost its log was called in
/// sync with it.
#[test]
fn a_node_without_its_log_is_not_in_sync_with_a_new_leader() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic("t", 1, 3, &json!({})).unwrap();
    let leader = cluster.leader_of("t", 0).unwrap();
    let value = "v".repeat(100_000);
    for _ in 0..20 {
        add(&cluster, leader, &[&value]);
    }
    cluster.await_caught_up("t", &[20]).unwrap();
    for round in 0..3 {
        // What is in the log of the shard comes back with it, so that has to go first.
        for _ in 0..2 {
            cluster.stop_all().unwrap();
            cluster.restart_all().unwrap();
            cluster.await_leaders("t").unwrap();
        }
        cluster.stop_all().unwrap();
        let empty = round % 3;
        let data = cluster.nodes[empty].data_dir.join("data");
        std::fs::remove_dir_all(segment_file::first_of(&data, "t-0").parent().unwrap()).unwrap();
        for node in &mut cluster.nodes {
            node.begin().unwrap();
        }
        let named = |at: usize| -> Option<Vec<i64>> {
            let seen = cluster.nodes[at].get("/v1/cluster/partitions?topic=t").ok()?;
            seen["partitions"][0]["in_sync_replicas"].as_array()?.iter().map(|id| id.as_i64()).collect()
        };
        let end = || -> Option<i64> {
            let topic = cluster.nodes[empty].get("/v1/topics/t").ok()?;
            topic["partition_list"][0]["high_watermark"].as_i64()
        };
        let mut whole = 0;
        cluster
            .until("it to be in sync again", || {
                for at in 0..3 {
                    let named = named(at).unwrap_or_default();
                    if named.contains(&(empty as i64 + 1)) {
                        assert_eq!(
                            end(),
                            Some(20),
                            "node {} says {named:?}, without node {}'s log",
                            at + 1,
                            empty + 1
                        );
                    }
                    whole = if named.len() == 3 { whole + 1 } else { 0 };
                }
                (whole >= 3).then_some(())
            })
            .unwrap();
    }
}
