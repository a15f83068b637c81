//! Three real processes that are one cluster, with replication factor 3: leaders are killed, stand still and come back, all
//! die at once, while an idempotent producer and a consumer group go on. Afterwards the checker finds nothing, and the
//! replicas have the same bytes.

use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::kafka::{ends_of, read_all};
use flumen_tests::load::Load;
use flumen_tests::witness::{Witness, judge};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;
/// Acknowledged after each fault before the next one comes: it shows that the cluster serves again.
const PROGRESS: usize = 300;

/// Waits until so many more records were acknowledged.
fn progress(cluster: &Cluster, load: &Load, what: &str) {
    let target = load.acknowledged_count() + PROGRESS;
    let began = std::time::Instant::now();
    cluster.until(what, || (load.acknowledged_count() >= target).then_some(())).unwrap();
    println!("{what}: {PROGRESS} records after {:.1?}", began.elapsed());
}

/// Ends the load, and compares everything with everything.
fn check(cluster: &mut Cluster, load: &mut Load, witnesses: &mut [Witness]) {
    load.finish().unwrap();
    let acknowledged = load.acknowledged();
    let ends = ends_of(&cluster.kafka(), TOPIC, PARTITIONS).unwrap();
    assert_eq!(ends.iter().sum::<i64>(), acknowledged.len() as i64, "{ends:?}");
    let stored = read_all(&cluster.kafka(), TOPIC, &ends).unwrap();
    let seen = |witnesses: &[Witness]| {
        let all: std::collections::BTreeSet<_> =
            witnesses.iter().flat_map(|w| w.polled().into_iter().map(|p| p.place)).collect();
        all.len()
    };
    cluster
        .until("the group to have everything", || (seen(witnesses) >= acknowledged.len()).then_some(()))
        .unwrap();
    for witness in witnesses.iter_mut() {
        witness.finish().unwrap();
    }
    judge(TOPIC, &acknowledged, witnesses, &stored).unwrap();
    cluster.await_caught_up(TOPIC, &ends).unwrap();
    cluster.stop_all().unwrap();
    let compared = cluster.compare_replicas(TOPIC, &ends, cluster.nodes.len().min(3)).unwrap();
    println!("{} records, {compared} batches compared", acknowledged.len());
    assert!(compared > 0);
}

#[test]
fn leaders_die_stand_still_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses: Vec<Witness> =
        (0..2).map(|_| Witness::start(&kafka, TOPIC, "watchers").unwrap()).collect();
    progress(&cluster, &load, "a whole cluster");

    for round in 0..3 {
        let leader = cluster.leader_of(TOPIC, round).unwrap();
        cluster.nodes[leader].kill_9();
        progress(&cluster, &load, &format!("the leader of {round}, node {}, killed", leader + 1));
        cluster.nodes[leader].restart().unwrap();
        progress(&cluster, &load, "and back");
    }

    // A node that hangs: the others elect while it still believes to lead.
    let leader = cluster.leader_of(TOPIC, 0).unwrap();
    cluster.nodes[leader].pause().unwrap();
    progress(&cluster, &load, &format!("the leader of 0, node {}, stands still", leader + 1));
    cluster.nodes[leader].resume().unwrap();
    progress(&cluster, &load, "and goes on");

    cluster.kill_all();
    cluster.restart_all().unwrap();
    progress(&cluster, &load, "all killed at once");

    check(&mut cluster, &mut load, &mut witnesses);
}
