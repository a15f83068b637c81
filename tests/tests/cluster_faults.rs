//! Three real processes that are one cluster, with replication factor 3: leaders are killed, stand still and come back, all
//! die at once, while an idempotent producer and a consumer group go on. Afterwards the checker finds nothing, and the
//! replicas have the same bytes.

use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::load::Load;
use flumen_tests::witness::Witness;
use serde_json::json;

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
