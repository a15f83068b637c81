//! Clusters that come of one node: what is left when a majority is lost for good, and a broker that ran alone until now.

use std::time::Duration;

use flumen_protocol::error_code::ErrorCode;
use flumen_tests::cluster::Cluster;
use flumen_tests::flumen::{CliOutput, Flumen, cli};
use flumen_tests::kafka::{ends_of, read_all};
use flumen_tests::load::Load;
use flumen_tests::wire::{Wire, text, topic_name};
use flumen_tests::witness::judge;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestTopic;
use kafka_protocol::messages::{
    FindCoordinatorRequest, MetadataRequest, OffsetCommitRequest, OffsetFetchRequest,
};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 2;
const SETTINGS: [&str; 2] = ["group.initial.rebalance.delay.ms=0", "offsets.topic.num.partitions=2"];

fn ok(output: &CliOutput) {
    assert!(output.success, "{}{}", output.stdout, output.stderr);
}

/// Answered by whoever coordinates the group.
fn at_coordinator<T>(cluster: &[&Flumen], mut ask: impl FnMut(&mut Wire) -> Option<T>) -> T {
    loop {
        for node in cluster.iter().filter(|node| node.is_running()) {
            let found = || {
                let request = FindCoordinatorRequest::default().with_key(text("g"));
                let answer = Wire::connect(&node.kafka).ok()?.ask(2, &request).ok()?;
                let address = format!("{}:{}", answer.host.as_str(), answer.port);
                (answer.error_code == 0).then(|| Wire::connect(&address).ok())?
            };
            if let Some(answer) = found().as_mut().and_then(&mut ask) {
                return answer;
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn commit(nodes: &[&Flumen], offset: i64) {
    let partition = OffsetCommitRequestPartition::default()
        .with_partition_index(0)
        .with_committed_offset(offset)
        .with_committed_metadata(Some(text("")));
    let topic =
        OffsetCommitRequestTopic::default().with_name(topic_name(TOPIC)).with_partitions(vec![partition]);
    let request = OffsetCommitRequest::default()
        .with_group_id(text("g").into())
        .with_generation_id_or_member_epoch(-1)
        .with_topics(vec![topic]);
    at_coordinator(nodes, |wire| {
        let code = wire.ask(7, &request).ok()?.topics[0].partitions[0].error_code;
        (code == ErrorCode::NONE.0).then_some(())
    });
}

fn committed(nodes: &[&Flumen]) -> i64 {
    let topic =
        OffsetFetchRequestTopic::default().with_name(topic_name(TOPIC)).with_partition_indexes(vec![0]);
    let request =
        OffsetFetchRequest::default().with_group_id(text("g").into()).with_topics(Some(vec![topic]));
    at_coordinator(nodes, |wire| {
        let answer = wire.ask(5, &request).ok()?;
        (answer.error_code == 0).then(|| answer.topics[0].partitions[0].committed_offset)
    })
}

fn all(cluster: &Cluster) -> Vec<&Flumen> {
    cluster.nodes.iter().collect()
}

/// `flumen cluster decommission` of each, then `remove` until it is done.
fn take_away(cluster: &Cluster, through: usize, nodes: &[&str]) {
    let ask = |arguments: &[&str]| cluster.nodes[through].cli(arguments).unwrap();
    for node in nodes {
        ok(&ask(&["cluster", "decommission", node]));
    }
    for node in nodes {
        cluster
            .until(&format!("node {node} to be removed"), || {
                ask(&["cluster", "remove", node]).success.then_some(())
            })
            .unwrap();
    }
}

#[test]
fn one_of_three_goes_on_when_two_are_lost_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &SETTINGS).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let mut load = Load::start_at(&cluster.kafka(), TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "three nodes").unwrap();
    commit(&all(&cluster), 17);
    load.finish().unwrap();
    let before = load.acknowledged();
    // What only the lost ones had would be lost, and nobody could tell a test what that is.
    cluster.await_caught_up(TOPIC, &ends_of(&cluster.kafka(), TOPIC, PARTITIONS).unwrap()).unwrap();
    cluster.kill_all();
    for lost in [1, 2] {
        std::fs::remove_dir_all(cluster.nodes[lost].data_dir.join("data")).unwrap();
    }

    let data = cluster.nodes[0].data_dir.join("data");
    let recover = |more: &[&str]| {
        let arguments = [&["debug", "recover", data.to_str().unwrap()], more].concat();
        cli(&arguments).unwrap()
    };
    let own = recover(&["--lost", "1,2"]);
    assert!(!own.success && own.stderr.contains("whose directory this is"), "{}", own.stderr);
    // One that is lost leaves a majority.
    let enough = recover(&["--lost", "3"]);
    ok(&enough);
    assert!(enough.stdout.contains("0 groups lost their majority"), "{}", enough.stdout);
    let told = recover(&["--lost", "2,3"]);
    assert!(!told.success && told.stderr.contains("nothing was changed"), "{}", told.stderr);
    assert!(
        told.stdout.contains(&format!("{TOPIC}-0.g")) && told.stdout.contains("goes on up to offset"),
        "{}",
        told.stdout
    );
    let done = recover(&["--lost", "2,3", "--accept-data-loss"]);
    ok(&done);
    assert!(done.stdout.contains("goes on with node 1 alone"), "{}", done.stdout);

    cluster.nodes[0].restart().unwrap();
    cluster.await_leaders(TOPIC).unwrap();
    assert_eq!(committed(&all(&cluster)[..1]), 17);
    let kafka = cluster.nodes[0].kafka.clone();
    let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
    judge(TOPIC, &before, &[], &read_all(&kafka, TOPIC, &ends).unwrap()).unwrap();

    // It is a cluster as any: it takes records, and others take the places of the lost ones.
    cluster.add().unwrap();
    cluster.add().unwrap();
    take_away(&cluster, 0, &["2", "3"]);
    cluster.nodes.remove(2);
    cluster.nodes.remove(1);
    let kafka = cluster.kafka();
    let mut more = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&more, "one old node and two new ones").unwrap();
    more.finish().unwrap();
    assert_eq!(committed(&all(&cluster)), 17);
    let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
    assert_eq!(ends.iter().sum::<i64>() as usize, before.len() + more.acknowledged().len());
    cluster.stop_all().unwrap();
    let compared = cluster.compare_replicas(TOPIC, &ends, 3).unwrap();
    println!("{compared} batches compared");
}

/// Two of five are left, and each has what the other lacks: the older of them voted for a leader of before in some groups, and
/// topics of three replicas lie on one of them only.
#[test]
fn two_of_five_go_on_when_three_are_lost_for_good() {
    const PAIRS: &str = "pairs";
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 5, &SETTINGS).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 5, &json!({})).unwrap();
    cluster.create_topic(PAIRS, 2, 3, &json!({})).unwrap();
    for (partition, replicas) in [(0, [1, 3, 4]), (1, [2, 4, 5])] {
        assert_eq!(cluster.reassign(PAIRS, partition, Some(&replicas)).unwrap(), 0);
    }
    cluster.await_no_moves().unwrap();
    let mut pairs = Load::start_at(&cluster.kafka(), PAIRS, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&pairs, "both have one").unwrap();
    pairs.finish().unwrap();
    cluster.await_caught_up(PAIRS, &ends_of(&cluster.kafka(), PAIRS, 2).unwrap()).unwrap();
    let mut load = Load::start_at(&cluster.kafka(), TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "five nodes").unwrap();
    commit(&all(&cluster), 17);
    // Node 1 misses the rest, in groups that it led and in others.
    cluster.nodes[0].pause().unwrap();
    cluster.progress(&load, "node 1 stands still").unwrap();
    load.finish().unwrap();
    let others = cluster.nodes[1..].iter().map(|node| node.kafka.as_str()).collect::<Vec<_>>().join(",");
    let ends = ends_of(&others, TOPIC, PARTITIONS).unwrap();
    cluster
        .until("node 2 to have all", || (cluster.nodes[1].end_offsets(TOPIC).ok()? == ends).then_some(()))
        .unwrap();
    cluster.kill_all();
    for lost in [2, 3, 4] {
        std::fs::remove_dir_all(cluster.nodes[lost].data_dir.join("data")).unwrap();
    }

    let data: Vec<String> =
        (0..2).map(|at| cluster.nodes[at].data_dir.join("data").display().to_string()).collect();
    let reports: Vec<String> =
        (1..3).map(|id| dir.path().join(format!("r{id}.json")).display().to_string()).collect();
    let recover = |at: usize, more: &[&str]| {
        cli(&[&["debug", "recover", &data[at], "--lost", "3,4,5"], more].concat()).unwrap()
    };
    // One alone could decide wrongly, and does nothing.
    let hasty = recover(0, &["--accept-data-loss"]);
    assert!(!hasty.success && hasty.stderr.contains("node 2 may have more of them"), "{}", hasty.stderr);
    for at in [0, 1] {
        ok(&recover(at, &["--report", &reports[at]]));
    }
    let wrong = recover(0, &["--others", &reports[0]]);
    assert!(!wrong.success && wrong.stderr.contains("no other node that is left"), "{}", wrong.stderr);
    let told = recover(0, &["--others", &reports[1]]);
    assert!(!told.success && told.stderr.contains("nothing was changed"), "{}", told.stderr);
    assert!(told.stdout.contains(&format!("{TOPIC}-0.g")), "{}", told.stdout);
    assert!(told.stdout.contains("votes for what node 2 has"), "{}", told.stdout);
    for at in [0, 1] {
        let done = recover(at, &["--others", &reports[1 - at], "--accept-data-loss"]);
        ok(&done);
        println!("node {}: {}", at + 1, done.stdout);
        assert!(done.stdout.contains("goes on with node 1, 2"), "{}", done.stdout);
        assert!(done.stdout.contains(&format!("goes on with node {} alone", at + 1)), "{}", done.stdout);
    }

    let (one, rest) = cluster.nodes.split_at_mut(1);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| rest[0].restart());
        one[0].restart().unwrap();
        other.join().unwrap().unwrap();
    });
    cluster.await_leaders(TOPIC).unwrap();
    cluster.await_leaders(PAIRS).unwrap();
    // Regression: as they were two of five they took themselves for cut off, and sent clients to those that are lost.
    for node in &cluster.nodes[..2] {
        let metadata = Wire::connect(&node.kafka).unwrap().ask(12, &MetadataRequest::default()).unwrap();
        let named: Vec<i32> = metadata.brokers.iter().map(|broker| broker.node_id.0).collect();
        assert_eq!(named, [1, 2]);
    }
    assert_eq!(committed(&all(&cluster)), 17);
    let kafka = cluster.nodes[..2].iter().map(|node| node.kafka.as_str()).collect::<Vec<_>>().join(",");
    for (topic, acknowledged) in [(TOPIC, load.acknowledged()), (PAIRS, pairs.acknowledged())] {
        let ends = ends_of(&kafka, topic, 2).unwrap();
        judge(topic, &acknowledged, &[], &read_all(&kafka, topic, &ends).unwrap()).unwrap();
    }

    for _ in 0..3 {
        cluster.add().unwrap();
    }
    take_away(&cluster, 0, &["3", "4", "5"]);
    cluster.nodes.drain(2..5);
    // Whoever of the two leads may go.
    let mut more = Load::start_at(&cluster.kafka(), TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&more, "two old nodes and three new ones").unwrap();
    for at in [0, 1] {
        cluster.nodes[at].kill_9();
        cluster.progress(&more, &format!("without node {}", at + 1)).unwrap();
        cluster.nodes[at].restart().unwrap();
    }
    more.finish().unwrap();
    assert_eq!(committed(&all(&cluster)), 17);
    let ends = ends_of(&cluster.kafka(), TOPIC, PARTITIONS).unwrap();
    assert_eq!(ends.iter().sum::<i64>() as usize, load.acknowledged().len() + more.acknowledged().len());
    let pairs_ends = ends_of(&cluster.kafka(), PAIRS, 2).unwrap();
    let healthy = || cluster.nodes[0].cli(&["cluster", "health"]).is_ok_and(|health| health.success);
    cluster.until("all to be in sync", || healthy().then_some(())).unwrap();
    cluster.stop_all().unwrap();
    let compared = cluster.compare_replicas(TOPIC, &ends, 5).unwrap();
    assert!(cluster.compare_replicas(PAIRS, &pairs_ends, 3).unwrap() > 0);
    println!("{compared} batches compared");
}

#[test]
fn a_broker_that_was_alone_founds_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let mut alone = Cluster::alone(dir.path(), &SETTINGS).unwrap();
    alone.create_topic(TOPIC, PARTITIONS, &json!({})).unwrap();
    let mut load = Load::start(&alone, TOPIC, false, Duration::from_millis(1)).unwrap();
    while load.acknowledged_count() < 500 {
        std::thread::sleep(Duration::from_millis(20));
    }
    load.finish().unwrap();
    let before = load.acknowledged();
    commit(&[&alone], 23);
    assert!(alone.stop().unwrap().success());

    let mut cluster = Cluster::found(dir.path(), &SETTINGS).unwrap();
    let kafka = cluster.kafka();
    let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
    judge(TOPIC, &before, &[], &read_all(&kafka, TOPIC, &ends).unwrap()).unwrap();
    assert_eq!(committed(&all(&cluster)), 23);

    for _ in 0..3 {
        cluster.add().unwrap();
    }
    for partition in 0..PARTITIONS {
        assert_eq!(cluster.reassign(TOPIC, partition, Some(&[1, 2, 3])).unwrap(), 0);
    }
    cluster.await_no_moves().unwrap();
    take_away(&cluster, 1, &["1"]);
    cluster.nodes[0].kill_9();
    cluster.await_leaders(TOPIC).unwrap();
    let kafka = cluster.nodes[1].kafka.clone();
    let mut more = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&more, "without the node that began").unwrap();
    more.finish().unwrap();
    assert_eq!(committed(&all(&cluster)), 23);
    let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
    assert_eq!(ends.iter().sum::<i64>() as usize, before.len() + more.acknowledged().len());
    cluster.stop_all().unwrap();
    let compared = cluster.compare_replicas(TOPIC, &ends, 3).unwrap();
    println!("{compared} batches compared");
}
