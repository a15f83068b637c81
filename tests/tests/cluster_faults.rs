//! Three real processes that are one cluster, with replication factor 3: leaders are killed, stand still and come back, all
//! die at once, while an idempotent producer and a consumer group go on. Afterwards the checker finds nothing, and the
//! replicas have the same bytes.

use std::collections::BTreeMap;
use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::kafka::{ends_of, java_tools, kafka_tool, read_all};
use flumen_tests::load::Load;
use flumen_tests::witness::Witness;
use serde_json::{Value, json};

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;

#[test]
fn leaders_die_stand_still_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses: Vec<Witness> =
        (0..2).map(|_| Witness::start(&kafka, TOPIC, "watchers").unwrap()).collect();
    cluster.progress(&load, "a whole cluster").unwrap();

    for round in 0..3 {
        let leader = cluster.leader_of(TOPIC, round).unwrap();
        cluster.nodes[leader].kill_9();
        cluster.progress(&load, &format!("the leader of {round}, node {}, killed", leader + 1)).unwrap();
        cluster.nodes[leader].restart().unwrap();
        cluster.progress(&load, "and back").unwrap();
    }

    // A node that hangs: the others elect while it still believes to lead.
    let leader = cluster.leader_of(TOPIC, 0).unwrap();
    cluster.nodes[leader].pause().unwrap();
    cluster.progress(&load, &format!("the leader of 0, node {}, stands still", leader + 1)).unwrap();
    cluster.nodes[leader].resume().unwrap();
    cluster.progress(&load, "and goes on").unwrap();

    cluster.kill_all();
    cluster.restart_all().unwrap();
    cluster.progress(&load, "all killed at once").unwrap();

    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}

/// Kafka's own producer, whose idempotence is its default, and afterwards its consumer in a group.
#[test]
fn javas_clients_go_on_when_leaders_die() {
    const RECORDS: usize = 12_000;
    if !java_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let (count, bootstrap) = (RECORDS.to_string(), kafka.clone());
    // The tool turns retries off, which nobody does who wants his records.
    let config = dir.path().join("producer.properties");
    std::fs::write(&config, "retries=2147483647\nenable.idempotence=true\n").unwrap();
    let config = config.display().to_string();
    let producer = std::thread::spawn(move || {
        let arguments = ["--bootstrap-server", &bootstrap, "--topic", TOPIC, "--max-messages", &count];
        let more = ["--throughput", "1500", "--acks", "-1", "--producer.config", &config];
        kafka_tool("org.apache.kafka.tools.VerifiableProducer", &[&arguments[..], &more].concat())
    });
    let stored = || ends_of(&kafka, TOPIC, PARTITIONS).map_or(0, |ends| ends.iter().sum::<i64>());
    for round in 1..=3 {
        let target = round * RECORDS as i64 / 5;
        cluster.until("the producer to come on", || (stored() >= target).then_some(())).unwrap();
        let leader = cluster.leader_of(TOPIC, 0).unwrap();
        println!("node {} is killed after {} records", leader + 1, stored());
        cluster.nodes[leader].kill_9();
        let before = stored();
        cluster.until("records without it", || (stored() > before).then_some(())).unwrap();
        cluster.nodes[leader].restart().unwrap();
    }
    let (success, told) = producer.join().unwrap().unwrap();
    assert!(success, "{told}");
    let acknowledged: BTreeMap<(i32, i64), u64> = told
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|event| event["name"] == "producer_send_success")
        .map(|event| {
            let place = (event["partition"].as_i64().unwrap() as i32, event["offset"].as_i64().unwrap());
            (place, event["value"].as_str().unwrap().parse().unwrap())
        })
        .collect();
    assert_eq!(acknowledged.len(), RECORDS, "{}", &told[told.len().saturating_sub(2_000)..]);
    let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
    let found: BTreeMap<(i32, i64), u64> = read_all(&kafka, TOPIC, &ends)
        .unwrap()
        .into_iter()
        .map(|record| (record.place, String::from_utf8_lossy(&record.value).parse().unwrap()))
        .collect();
    assert!(found == acknowledged, "{} stored, {} acknowledged", found.len(), acknowledged.len());

    let arguments = ["--bootstrap-server", &kafka, "--topic", TOPIC, "--group-id", "java"];
    let more = ["--max-messages", &RECORDS.to_string(), "--reset-policy", "earliest"];
    let (success, told) =
        kafka_tool("org.apache.kafka.tools.VerifiableConsumer", &[&arguments[..], &more].concat()).unwrap();
    let consumed: i64 = told
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|event| event["name"] == "records_consumed")
        .map(|event| event["count"].as_i64().unwrap())
        .sum();
    assert!(success && consumed == RECORDS as i64, "{consumed}: {told}");
}
