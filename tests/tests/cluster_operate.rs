//! The steps of docs/OPERATE.md on real processes, while an idempotent producer and a consumer group go on: add a node, drain
//! one for a restart, take one away, replace one that is lost, restart all of them one after another; and what is refused.

use std::collections::BTreeSet;
use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::flumen::{CliOutput, Flumen};
use flumen_tests::load::Load;
use flumen_tests::wire::Wire;
use flumen_tests::witness::Witness;
use kafka_protocol::messages::MetadataRequest;
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 4;

/// Every node that holds a replica of anything, and every leader; offsets topic included.
fn holders_and_leaders(node: &Flumen) -> (BTreeSet<i32>, BTreeSet<i32>) {
    let request = MetadataRequest::default().with_topics(None);
    let answer = Wire::connect(&node.kafka).unwrap().ask(9, &request).unwrap();
    let partitions = || answer.topics.iter().flat_map(|topic| &topic.partitions);
    let holders = partitions().flat_map(|p| p.replica_nodes.iter().map(|id| id.0)).collect();
    (holders, partitions().map(|p| p.leader_id.0).collect())
}

fn ask(node: &Flumen, arguments: &[&str]) -> CliOutput {
    node.cli(arguments).unwrap()
}

fn ok(node: &Flumen, arguments: &[&str]) {
    let output = ask(node, arguments);
    assert!(output.success, "flumen {}: {}{}", arguments.join(" "), output.stdout, output.stderr);
}

/// `flumen cluster decommission`, waits, `flumen cluster remove`.
fn take_away(cluster: &Cluster, through: usize, id: i32) {
    let (node, name) = (&cluster.nodes[through], id.to_string());
    ok(node, &["cluster", "decommission", &name]);
    cluster
        .until(&format!("node {id} to be removed"), || {
            ask(node, &["cluster", "remove", &name]).success.then_some(())
        })
        .unwrap();
    let (holders, leaders) = holders_and_leaders(node);
    assert!(!holders.contains(&id) && !leaders.contains(&id), "{holders:?} {leaders:?}");
}

/// `Cluster` numbers its nodes from 1 on.
fn id_of(at: usize) -> i32 {
    i32::try_from(at + 1).unwrap()
}

/// `flumen cluster maintenance`, waits until the node leads nothing, and stops it.
fn drain(cluster: &mut Cluster, through: usize, at: usize) {
    let id = id_of(at);
    ok(&cluster.nodes[through], &["cluster", "maintenance", &id.to_string()]);
    cluster
        .until(&format!("node {id} to lead nothing"), || {
            (!holders_and_leaders(&cluster.nodes[through]).1.contains(&id)).then_some(())
        })
        .unwrap();
    assert!(cluster.nodes[at].stop().unwrap().success());
}

/// Starts it again, as one that may lead.
fn bring_back(cluster: &mut Cluster, through: usize, at: usize) {
    cluster.nodes[at].restart().unwrap();
    ok(&cluster.nodes[through], &["cluster", "maintenance", &id_of(at).to_string(), "--off"]);
}

fn start(dir: &std::path::Path) -> (Cluster, Load, Vec<Witness>) {
    let cluster = Cluster::start(dir, 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let witnesses = vec![Witness::start(&kafka, TOPIC, "watchers").unwrap()];
    cluster.progress(&load, "three nodes").unwrap();
    (cluster, load, witnesses)
}

#[test]
fn nodes_are_added_drained_and_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, mut load, mut witnesses) = start(dir.path());

    // Nobody could take over what a third of three holds.
    let refused = ask(&cluster.nodes[1], &["cluster", "decommission", "1"]);
    assert!(!refused.success && refused.stderr.contains("add a node first"), "{}", refused.stderr);

    cluster.add().unwrap();
    take_away(&cluster, 1, 1);
    cluster.progress(&load, "node 1 is taken away").unwrap();
    cluster.nodes[0].kill_9();
    cluster.progress(&load, "and stopped").unwrap();

    // Drained, a node can be stopped without anybody looking for a leader.
    drain(&mut cluster, 1, 2);
    cluster.progress(&load, "node 3 is stopped").unwrap();
    bring_back(&mut cluster, 1, 2);
    cluster.progress(&load, "and back").unwrap();

    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}

#[test]
fn a_lost_node_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, mut load, mut witnesses) = start(dir.path());
    cluster.nodes[2].kill_9();
    let lost = cluster.nodes[2].data_dir.clone();
    std::fs::remove_dir_all(lost.join("data")).unwrap();
    cluster.progress(&load, "node 3 and its disk are lost").unwrap();

    // Under its old id it would vote again for what it has forgotten.
    let early = cluster.nodes[2].restart_or_end().unwrap();
    assert!(early.is_some_and(|status| !status.success()), "{early:?}");
    let log = cluster.nodes[2].log();
    assert!(log.contains("never used"), "{log}");

    cluster.add().unwrap();
    take_away(&cluster, 0, 3);
    cluster.progress(&load, "node 4 has taken its place").unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}

#[test]
fn all_nodes_are_restarted_one_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, mut load, mut witnesses) = start(dir.path());
    for at in 0..3 {
        let other = (at + 1) % 3;
        drain(&mut cluster, other, at);
        bring_back(&mut cluster, other, at);
        // The next one only when this one has all: two that are behind are no majority.
        cluster
            .until("a healthy cluster", || {
                (ask(&cluster.nodes[other], &["cluster", "health"]).code == Some(0)).then_some(())
            })
            .unwrap();
        cluster.progress(&load, &format!("node {} was restarted", id_of(at))).unwrap();
    }
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}
