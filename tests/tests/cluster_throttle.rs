//! Replicas that are new or far behind get what they lack no faster than an operator lets them, and nobody else notices: Kafka's
//! own tool throttles a move, and a replica that its group cannot do without is not held up.

use std::time::{Duration, Instant};

use flumen_tests::cluster::Cluster;
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::{Sender, ends_of, java_tools, kafka_tool};
use flumen_tests::load::Load;
use flumen_tests::wire::Wire;
use kafka_protocol::messages::MetadataRequest;
use serde_json::{Value, json};

const TOPIC: &str = "orders";
/// Much of it, and nobody writes to it any more.
const BALLAST: &str = "ballast";
const RECORD_BYTES: usize = 100_000;

/// Writes so many megabytes that cannot be compressed to one partition.
fn fill(cluster: &Cluster, megabytes: u64) {
    let mut sender = Sender::new(&cluster.kafka(), &[("message.max.bytes", "900000")]).unwrap();
    let value = vec![0x5a; RECORD_BYTES];
    for number in 0..megabytes * 1_000_000 / RECORD_BYTES as u64 {
        sender.send(BALLAST, "k", &value, number).unwrap();
    }
    sender.flush().unwrap();
    assert!(sender.reports().failed.is_empty());
}

/// Replicas of the ballast that are in sync, as clients are told.
fn in_sync(node: &Flumen) -> Vec<i32> {
    let answer = Wire::connect(&node.kafka).unwrap().ask(9, &MetadataRequest::default().with_topics(None));
    let answer = answer.unwrap();
    let topic = answer.topics.iter().find(|t| t.name.as_ref().is_some_and(|n| n.as_str() == BALLAST));
    let mut ids: Vec<i32> = topic.unwrap().partitions[0].isr_nodes.iter().map(|id| id.0).collect();
    ids.sort_unstable();
    ids
}

/// What the cluster says of the move of the ballast's partition.
fn progress(node: &Flumen) -> Value {
    let answer = node.get(&format!("/v1/cluster/partitions?topic={BALLAST}")).unwrap();
    answer["partitions"][0]["move"]["replicas"][0].clone()
}

fn reassign(cluster: &Cluster, arguments: &[&str]) -> String {
    let kafka = cluster.kafka();
    let class = "org.apache.kafka.tools.reassign.ReassignPartitionsCommand";
    let (ok, text) = kafka_tool(class, &[&["--bootstrap-server", &kafka], arguments].concat()).unwrap();
    assert!(ok, "{text}");
    text
}

fn described(cluster: &Cluster, kind: &str, name: &str) -> String {
    let kafka = cluster.kafka();
    let arguments =
        ["--bootstrap-server", &kafka, "--describe", "--entity-type", kind, "--entity-name", name];
    kafka_tool("kafka.admin.ConfigCommand", &arguments).unwrap().1
}

#[test]
fn a_move_goes_as_fast_as_kafkas_tool_lets_it() {
    if !java_tools() {
        return;
    }
    const RATE: f64 = 2_000_000.0;
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 4, &[]).unwrap();
    cluster.create_topic(TOPIC, 2, 3, &json!({})).unwrap();
    cluster.create_topic(BALLAST, 1, 3, &json!({})).unwrap();
    assert_eq!(cluster.reassign(BALLAST, 0, Some(&[1, 2, 3])).unwrap(), 0);
    cluster.await_no_moves().unwrap();
    fill(&cluster, 120);
    let mut load = Load::start_at(&cluster.kafka(), TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "before the move").unwrap();

    let moves = dir.path().join("moves.json");
    let plan = json!({
        "version": 1, "partitions": [{ "topic": BALLAST, "partition": 0, "replicas": [4, 2, 3] }],
    });
    std::fs::write(&moves, plan.to_string()).unwrap();
    let file = ["--reassignment-json-file", moves.to_str().unwrap()];
    let rate = RATE.to_string();
    let text = reassign(&cluster, &[&["--execute", "--throttle", &rate][..], &file].concat());
    assert!(text.contains("The inter-broker throttle limit was set to"), "{text}");

    // It is held up, says so, and moves at that rate.
    let node = &cluster.nodes[1];
    let first = cluster
        .until("the move to be held up", || {
            let seen = progress(node);
            let waits = seen["waits_for"] == "the limit of the rate" && seen["bytes"].as_u64() > Some(0);
            waits.then_some(seen)
        })
        .unwrap();
    let began = Instant::now();
    assert_eq!(first["node_id"], 4);
    cluster.progress(&load, "beside the move").unwrap();
    std::thread::sleep(Duration::from_secs(5));
    let second = progress(node);
    let elapsed = began.elapsed().as_secs_f64();
    let moved = second["bytes"].as_f64().unwrap() - first["bytes"].as_f64().unwrap();
    println!("{moved} bytes in {elapsed} s: {second}");
    // One piece more may be on its way at each end.
    assert!(moved <= RATE * elapsed + 2.0 * 1048576.0, "{moved} bytes in {elapsed} s");
    let shown = node.cli(&["cluster", "partitions", BALLAST]).unwrap().stdout;
    assert!(shown.contains("ballast/0 goes to 4,2,3: node 4 has "), "{shown}");
    assert!(shown.contains("waits for: the limit of the rate"), "{shown}");
    let text = reassign(&cluster, &[&["--verify", "--preserve-throttles"][..], &file].concat());
    assert!(text.contains("still in progress"), "{text}");
    assert!(described(&cluster, "topics", BALLAST).contains("leader.replication.throttled.replicas=0:"));

    // Another rate counts at once; the tool takes everything away when the move is done.
    reassign(&cluster, &[&["--execute", "--additional", "--throttle", "500000000"][..], &file].concat());
    cluster.await_no_moves().unwrap();
    let text = reassign(&cluster, &[&["--verify"][..], &file].concat());
    assert!(text.contains("Reassignment of partition ballast-0 is completed."), "{text}");
    assert!(text.contains("Clearing topic-level throttles"), "{text}");
    assert!(!described(&cluster, "topics", BALLAST).contains("throttled"));
    assert!(!described(&cluster, "brokers", "1").contains("throttled"));
    cluster.progress(&load, "after the move").unwrap();

    let ends = ends_of(&cluster.kafka(), BALLAST, 1).unwrap();
    cluster.await_caught_up(BALLAST, &ends).unwrap();
    let mut cluster = cluster;
    cluster.check(TOPIC, 2, 3, &mut load, &mut []).unwrap();
    assert!(cluster.compare_replicas(BALLAST, &ends, 3).unwrap() > 0);
}

#[test]
fn a_replica_that_is_needed_is_not_held_up() {
    const MEGABYTES: u64 = 60;
    /// With it the catch-up takes an hour.
    const RATE: u64 = 16 << 10;
    const ATTEMPTS_MAX: u64 = 4;
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic(BALLAST, 1, 3, &json!({})).unwrap();
    cluster.nodes[2].kill_9();
    fill(&cluster, MEGABYTES);
    let set = cluster.nodes[0].cli(&["cluster", "catch-up-rate", &RATE.to_string()]).unwrap();
    assert!(set.success, "{}", set.stderr);
    let leader = cluster.leader_of(BALLAST, 0).unwrap();
    let mut load = Load::start_at(&cluster.kafka(), BALLAST, false, Duration::from_millis(1)).unwrap();

    // Held up, while the others acknowledge what comes. On a machine that is busy with something else they may take so long that
    // nothing is held up for a moment, as it must be when they are not enough: then once more.
    let mut attempts = 0;
    loop {
        attempts += 1;
        cluster.nodes[2].restart().unwrap();
        for turn in 0..5 {
            cluster.progress(&load, &format!("node 3 is held up, {turn}")).unwrap();
            std::thread::sleep(Duration::from_millis(500));
        }
        let all = cluster.nodes[leader].end_offsets(BALLAST).unwrap()[0];
        let has = cluster.nodes[2].end_offsets(BALLAST).unwrap()[0];
        println!("node 3 has {has} of {all}");
        if has < all / 2 {
            break;
        }
        assert!(attempts < ATTEMPTS_MAX, "{has} of {all}");
        cluster.nodes[2].kill_9();
        fill(&cluster, 2 * MEGABYTES * attempts);
    }
    cluster
        .until("the others to be in sync", || (in_sync(&cluster.nodes[leader]) == [1, 2]).then_some(()))
        .unwrap();

    // Without node 3 there is no majority now: it gets everything at once, however low the limit is.
    let other = 1 - leader;
    cluster.nodes[other].kill_9();
    let began = Instant::now();
    cluster.progress(&load, "node 3 is needed").unwrap();
    let by_the_limit = Duration::from_secs((MEGABYTES * 1_000_000 / RATE) / 2);
    assert!(began.elapsed() < by_the_limit, "{:?}", began.elapsed());
    cluster.nodes[other].restart().unwrap();
    let set = cluster.nodes[0].cli(&["cluster", "catch-up-rate", "default"]).unwrap();
    assert!(set.success, "{}", set.stderr);
    cluster.until("all in sync", || (in_sync(&cluster.nodes[0]) == [1, 2, 3]).then_some(())).unwrap();
    load.finish().unwrap();
    let ends = ends_of(&cluster.kafka(), BALLAST, 1).unwrap();
    cluster.await_caught_up(BALLAST, &ends).unwrap();
    cluster.stop_all().unwrap();
    assert!(cluster.compare_replicas(BALLAST, &ends, 3).unwrap() > 0);
}
