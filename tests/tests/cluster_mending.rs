//! A replica whose log is damaged gets it again from the others, by itself, while clients go on: whether a start finds the damage or
//! a reader does, on a follower or on a leader.

use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::kafka::{ends_of, read_all};
use flumen_tests::load::Load;
use flumen_tests::segment_file;
use flumen_tests::witness::Witness;
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;

/// Of a partition, as node `at` sees it: its health, and who is in sync.
fn seen(cluster: &Cluster, at: usize, partition: usize) -> Option<(String, usize)> {
    let seen = cluster.nodes[at].get(&format!("/v1/cluster/partitions?topic={TOPIC}")).ok()?;
    let found = seen["partitions"].get(partition)?;
    Some((found["health"].as_str()?.to_string(), found["in_sync_replicas"].as_array()?.len()))
}

/// All replicas of a partition serve and are in sync, as everybody says, and its group has its three voters again.
fn await_mended(cluster: &Cluster, partition: usize) {
    let mended = || (0..3).all(|at| seen(cluster, at, partition) == Some(("ok".into(), 3)));
    cluster.until("the replica to be mended", || mended().then_some(())).unwrap();
}

fn await_logged(cluster: &Cluster, at: usize, line: &str) {
    cluster.until(line, || cluster.nodes[at].log().contains(line).then_some(())).unwrap();
}

#[test]
fn what_a_start_finds_damaged_comes_again_from_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses = vec![Witness::start(&kafka, TOPIC, "watchers").unwrap()];
    cluster.progress(&load, "all whole").unwrap();

    for partition in 0..2 {
        let at = cluster.leader_of(TOPIC, partition).unwrap();
        assert!(cluster.nodes[at].stop().unwrap().success());
        let data = cluster.nodes[at].data_dir.join("data");
        segment_file::cut_in_half(&segment_file::first_of(&data, &format!("{TOPIC}-{partition}")));
        cluster.nodes[at].restart().unwrap();
        cluster.progress(&load, &format!("node {} has half of partition {partition}", at + 1)).unwrap();
        await_logged(&cluster, at, "the damaged log goes; the replica joins its group with an empty one");
        await_mended(&cluster, partition);
        // It counts again: with another one down they are a majority.
        let other = (at + 1) % 3;
        cluster.nodes[other].kill_9();
        cluster.progress(&load, &format!("   mended, and node {} is down", other + 1)).unwrap();
        cluster.nodes[other].restart().unwrap();
        await_mended(&cluster, partition);
    }
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}

#[test]
fn a_leader_that_reads_nonsense_hands_over_and_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    // Small caches: old records are read from the file.
    let small = vec![("FLUMEN_SMALL", "1".to_string())];
    let mut cluster = Cluster::start_with(dir.path(), 3, &[], small).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    for _ in 0..10 {
        cluster.progress(&load, "all whole").unwrap();
    }
    let at = cluster.leader_of(TOPIC, 0).unwrap();
    assert!(cluster.nodes[at].stop().unwrap().success());
    let data = cluster.nodes[at].data_dir.join("data");
    cluster.nodes[at].restart().unwrap();
    let back = || (cluster.leader_of(TOPIC, 0).unwrap() == at).then_some(());
    cluster.until("it to lead again", back).unwrap();
    segment_file::ruin_first_batch(&segment_file::first_of(&data, &format!("{TOPIC}-0")));

    // Whoever reads from the beginning gets all of it, from another leader.
    let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
    assert_eq!(read_all(&kafka, TOPIC, &ends).unwrap().len() as i64, ends.iter().sum::<i64>());
    await_logged(&cluster, at, "the damaged log goes; the replica joins its group with an empty one");
    await_mended(&cluster, 0);
    cluster.progress(&load, "mended").unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut []).unwrap();
}
