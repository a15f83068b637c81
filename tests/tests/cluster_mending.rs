//! A replica whose log is damaged gets it again from the others, by itself, while clients go on: whether a start finds the damage or
//! a reader does, on a follower or on a leader. And so does a node whose log of the metadata is.

use std::time::Duration;

use flumen_tests::cluster::{Cluster, METADATA_TOPIC};
use flumen_tests::flumen::http;
use flumen_tests::kafka::{ends_of, read_all};
use flumen_tests::load::Load;
use flumen_tests::segment_file;
use flumen_tests::wire::{Wire, batch, produce};
use flumen_tests::witness::Witness;
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;
const QUIET: &str = "quiet";

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
    let found = || cluster.nodes[at].log().contains("this replica is to get its log again");
    let read = || {
        let ends = ends_of(&kafka, TOPIC, PARTITIONS).unwrap();
        assert_eq!(read_all(&kafka, TOPIC, &ends).unwrap().len() as i64, ends.iter().sum::<i64>());
    };
    // On a busy machine it may have lost the leadership again before it was asked.
    let ask = || {
        if !found() && cluster.leader_of(TOPIC, 0).unwrap() == at {
            read();
        }
        found().then_some(())
    };
    cluster.until("it to be asked for what is ruined", ask).unwrap();
    await_logged(&cluster, at, "the damaged log goes; the replica joins its group with an empty one");
    await_mended(&cluster, 0);
    cluster.progress(&load, "mended").unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut []).unwrap();
}

/// Nodes 1 to 3 vote about the metadata, and node `at` knows it.
fn await_all_vote(cluster: &Cluster, at: usize) -> i64 {
    let all = [1, 2, 3].into();
    cluster
        .until("all to vote about the metadata", || {
            let (voters, end) = cluster.quorum(at).ok()?;
            (voters == all).then_some(end)
        })
        .unwrap()
}

/// How often a node has thrown its metadata log away.
fn renewals(cluster: &Cluster, at: usize) -> usize {
    cluster.nodes[at].log().matches("the damaged metadata log goes").count()
}

#[test]
fn a_damaged_metadata_log_comes_again_from_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    for number in 0..20 {
        cluster.create_topic(&format!("more-{number}"), 1, 3, &json!({})).unwrap();
    }
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses = vec![Witness::start(&kafka, TOPIC, "watchers").unwrap()];
    cluster.progress(&load, "all whole").unwrap();

    // What a reader finds and what recovery finds; on whoever leads the metadata, and on one that does not.
    for (turn, ruin) in [segment_file::flip_a_bit, segment_file::cut_in_half].into_iter().enumerate() {
        let leader = || {
            let id = cluster.nodes[0].get("/v1/cluster").ok()?["controller_id"].as_u64()?;
            usize::try_from(id).ok()?.checked_sub(1)
        };
        let leader = cluster.until("a leader of the metadata", leader).unwrap();
        let at = (leader + turn) % 3;
        let others = [(at + 1) % 3, (at + 2) % 3];
        assert!(cluster.nodes[at].stop().unwrap().success());
        let log = format!("{METADATA_TOPIC}-0");
        ruin(&segment_file::first_of(&cluster.nodes[at].data_dir.join("data"), &log));
        let before = renewals(&cluster, at);
        // Alone with one other it waits: what is left of its log may be what makes a majority.
        cluster.nodes[others[0]].kill_9();
        cluster.nodes[at].begin().unwrap();
        await_logged(&cluster, at, "the metadata log of this node is damaged; it waits");
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(renewals(&cluster, at), before);
        cluster.nodes[at].kill_9();
        cluster.nodes[others[0]].restart().unwrap();
        cluster.progress(&load, &format!("the metadata log of node {} is ruined", at + 1)).unwrap();
        cluster.create_topic(&format!("meanwhile-{turn}"), 3, 2, &json!({})).unwrap();

        cluster.nodes[at].restart().unwrap();
        assert_eq!(renewals(&cluster, at), before + 1);
        cluster.progress(&load, "   and comes again").unwrap();
        await_all_vote(&cluster, at);
        await_mended(&cluster, 0);
        // It counts again: with another one down they are a majority, about the metadata too.
        cluster.nodes[others[1]].kill_9();
        cluster.progress(&load, &format!("   and node {} is down", others[1] + 1)).unwrap();
        cluster.create_topic(&format!("afterwards-{turn}"), 3, 2, &json!({})).unwrap();
        for name in [format!("meanwhile-{turn}"), format!("afterwards-{turn}")] {
            let found = || cluster.nodes[at].get(&format!("/v1/topics/{name}")).ok().map(drop);
            cluster.until("the topic", found).unwrap();
        }
        cluster.nodes[others[1]].restart().unwrap();
        await_mended(&cluster, 0);
    }
    let end = await_all_vote(&cluster, 0);
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
    assert!(cluster.compare_replicas(METADATA_TOPIC, &[end], 3).unwrap() > 20);
}

/// Ruins the metadata log of a node that does not run.
fn ruin_metadata(cluster: &Cluster, at: usize) {
    let data = cluster.nodes[at].data_dir.join("data");
    segment_file::cut_in_half(&segment_file::first_of(&data, &format!("{METADATA_TOPIC}-0")));
}

/// To the topic that is quiet from then on; node 2 is stopped after it and has no good metadata log any more. How many records that were.
fn write_once_and_ruin_metadata(cluster: &mut Cluster) -> usize {
    let mut load = Load::start_at(&cluster.kafka(), QUIET, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "what is written once").unwrap();
    load.finish().unwrap();
    assert!(cluster.nodes[1].stop().unwrap().success());
    ruin_metadata(cluster, 1);
    load.acknowledged().len()
}

#[test]
fn a_node_that_dies_while_its_metadata_log_is_mended_goes_on_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    for number in 0..20 {
        cluster.create_topic(&format!("topic-{number}"), 1, 3, &json!({})).unwrap();
    }
    // Only node 2 has it, and it was elsewhere before.
    cluster.create_topic(QUIET, 1, 1, &json!({})).unwrap();
    for id in [2, 1, 2] {
        assert_eq!(cluster.reassign(QUIET, 0, Some(&[id])).unwrap(), 0);
        cluster.await_no_moves().unwrap();
    }
    let acknowledged = write_once_and_ruin_metadata(&mut cluster);
    // In a second or so it asks, loses its vote, has a new log, is told the members, and gets the rest.
    for turn in 1..=12u64 {
        cluster.nodes[1].begin().unwrap();
        std::thread::sleep(Duration::from_millis(150 * turn));
        cluster.nodes[1].kill_9();
        cluster.create_topic(&format!("more-{turn}"), 1, 2, &json!({})).unwrap();
    }
    cluster.nodes[1].restart().unwrap();
    assert_eq!(renewals(&cluster, 1), 1);
    await_all_vote(&cluster, 1);

    // Once more, and it dies with a new log and without the metadata, and when that has just come.
    assert!(cluster.nodes[1].stop().unwrap().success());
    ruin_metadata(&cluster, 1);
    for place in ["metadata-written", "metadata-renamed"] {
        cluster.nodes[1].environment = vec![("FLUMEN_FAILPOINT", place.to_string())];
        let ended = cluster.nodes[1].restart_or_end().unwrap();
        assert!(ended.is_some_and(|status| !status.success()), "{place}: {ended:?}");
    }
    cluster.nodes[1].environment.clear();
    cluster.nodes[1].restart().unwrap();
    assert_eq!(renewals(&cluster, 1), 2);
    await_all_vote(&cluster, 1);
    let ends = ends_of(&cluster.kafka(), QUIET, 1).unwrap();
    assert_eq!(read_all(&cluster.kafka(), QUIET, &ends).unwrap().len(), acknowledged);

    // One that has no vote about the metadata has none to lose.
    let added = cluster.add().unwrap();
    assert!(cluster.nodes[added].stop().unwrap().success());
    ruin_metadata(&cluster, added);
    cluster.nodes[added].restart().unwrap();
    assert_eq!(renewals(&cluster, added), 1);

    cluster.nodes[2].kill_9();
    await_all_vote(&cluster, added);
    cluster.create_topic("last", 3, 2, &json!({})).unwrap();
    for at in [0, 1, added] {
        let found = || cluster.nodes[at].get("/v1/topics/last").ok().map(drop);
        cluster.until("the topic", found).unwrap();
    }
    cluster.nodes[2].restart().unwrap();
    let end = await_all_vote(&cluster, 0);
    cluster.stop_all().unwrap();
    assert!(cluster.compare_replicas(METADATA_TOPIC, &[end], 4).unwrap() > 10);
}

/// History that is gone through once more, from a log that is filled again, has this node delete what it was given again later.
#[test]
fn a_node_that_dies_before_the_metadata_came_does_not_go_through_history_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic(TOPIC, 1, 3, &json!({})).unwrap();
    // Only node 2 has it. Between its being made and its being moved lies more than one message of Raft's.
    cluster.create_topic(QUIET, 1, 1, &json!({})).unwrap();
    assert_eq!(cluster.reassign(QUIET, 0, Some(&[2])).unwrap(), 0);
    cluster.await_no_moves().unwrap();
    for turn in 0..80 {
        let long = vec![format!("0:{turn}"); 2000].join(",");
        let body = json!({ "configs": { "leader.replication.throttled.replicas": long } });
        cluster.nodes[0].call("PATCH", &format!("/v1/topics/{TOPIC}"), Some(&body)).unwrap();
    }
    for id in [1, 2] {
        assert_eq!(cluster.reassign(QUIET, 0, Some(&[id])).unwrap(), 0);
        cluster.await_no_moves().unwrap();
    }
    let acknowledged = write_once_and_ruin_metadata(&mut cluster);
    let data = cluster.nodes[1].data_dir.join("data");
    let before = segment_file::first_of(&data, &format!("{QUIET}-0"));

    cluster.nodes[1].environment = vec![("FLUMEN_FAILPOINT", "metadata-joined".to_string())];
    let ended = cluster.nodes[1].restart_or_end().unwrap();
    assert!(ended.is_some_and(|status| !status.success()), "{ended:?}");
    cluster.nodes[1].environment.clear();
    cluster.nodes[1].restart().unwrap();
    await_all_vote(&cluster, 1);
    assert_eq!(renewals(&cluster, 1), 1);
    assert_eq!(segment_file::first_of(&data, &format!("{QUIET}-0")), before, "it is another log");
    let ends = ends_of(&cluster.kafka(), QUIET, 1).unwrap();
    assert_eq!(read_all(&cluster.kafka(), QUIET, &ends).unwrap().len(), acknowledged);
}

/// Nobody reads old entries of the metadata but its leader, for a node that comes.
#[test]
fn a_leader_of_the_metadata_that_reads_nonsense_says_so_and_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    // Small caches and segments: old entries are read from files.
    let small = vec![("FLUMEN_SMALL", "1".to_string())];
    let mut cluster = Cluster::start_with(dir.path(), 3, &[], small.clone()).unwrap();
    cluster.create_topic(TOPIC, 1, 3, &json!({})).unwrap();
    for turn in 0..60 {
        let long = vec![format!("0:{turn}"); 1000].join(",");
        let body = json!({ "configs": { "leader.replication.throttled.replicas": long } });
        cluster.nodes[0].call("PATCH", &format!("/v1/topics/{TOPIC}"), Some(&body)).unwrap();
    }
    // Raft has nothing in memory then.
    cluster.stop_all().unwrap();
    cluster.restart_all().unwrap();
    let leader = || {
        let id = cluster.nodes[0].get("/v1/cluster").ok()?["controller_id"].as_u64()?;
        usize::try_from(id).ok()?.checked_sub(1)
    };
    let at = cluster.until("a leader of the metadata", leader).unwrap();
    let (down, other) = ((at + 1) % 3, (at + 2) % 3);
    cluster.nodes[down].kill_9();
    let wide = "v".repeat(100_000);
    let at_leader = cluster.leader_of(TOPIC, 0).unwrap();
    let mut wire = Wire::connect(&cluster.nodes[at_leader].kafka).unwrap();
    for _ in 0..50 {
        let answer = wire.ask(9, &produce(TOPIC, 0, -1, Some(batch(&[&wide], |_| {})))).unwrap();
        assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
    }
    let data = cluster.nodes[at].data_dir.join("data");
    segment_file::ruin_all_but_the_last(&segment_file::first_of(&data, &format!("{METADATA_TOPIC}-0")));

    let mut added = cluster.stranger(4, &[]);
    added.environment = small;
    added.begin().unwrap();
    await_logged(&cluster, at, "the metadata log of this node is damaged; it waits");
    // It decides nothing any more, and without the third nobody does.
    let codes = |at: usize| -> Vec<String> {
        let health = cluster.nodes[at].get("/v1/cluster/health").unwrap();
        let problems = health["problems"].as_array().unwrap().iter();
        problems.map(|problem| problem["code"].as_str().unwrap().to_string()).collect()
    };
    for node in [at, other] {
        let said = || {
            let codes = codes(node);
            let all = ["METADATA_DAMAGED", "NO_CONTROLLER", "NODE_DOWN"];
            all.iter().all(|code| codes.iter().any(|found| found == code)).then_some(())
        };
        cluster.until("everybody to say what is wrong", said).unwrap();
    }
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(renewals(&cluster, at), 0);
    assert_eq!(cluster.nodes[at].ended().unwrap(), None);
    let answer = wire.ask(9, &produce(TOPIC, 0, -1, Some(batch(&["last"], |_| {})))).unwrap();
    assert_eq!(answer.responses[0].partition_responses[0].error_code, 0, "partitions go on");

    // A start finds it, too.
    cluster.nodes[at].kill_9();
    cluster.nodes[at].begin().unwrap();
    let waits = || {
        let (status, said) =
            http("GET", &format!("http://{}/v1/cluster/health", cluster.nodes[at].admin), None).ok()?;
        (status == 503 && said.contains("its metadata log is damaged")).then_some(())
    };
    cluster.until("it to say what it waits for", waits).unwrap();
    cluster.nodes[at].kill_9();
    cluster.nodes[down].restart().unwrap();
    cluster.nodes[at].restart().unwrap();
    assert_eq!(renewals(&cluster, at), 1);
    // The new node may have got the vote that was free.
    let three = || (cluster.quorum(at).ok()?.0.len() == 3).then_some(());
    cluster.until("three to vote about the metadata", three).unwrap();
    let ready = || added.get("/v1/status/ready").ok().map(drop);
    cluster.until("the new node to serve", ready).unwrap();
    cluster.create_topic("last", 1, 3, &json!({})).unwrap();
}

/// Of a topic, as node `at` sees it: the health of its partitions.
fn health(cluster: &Cluster, at: usize, topic: &str) -> Option<Vec<String>> {
    let seen = cluster.nodes[at].get(&format!("/v1/cluster/partitions?topic={topic}")).ok()?;
    seen["partitions"].as_array()?.iter().map(|found| Some(found["health"].as_str()?.to_string())).collect()
}

/// A replica whose directory somebody removed may have said what made a record acknowledged: it does not vote as if it were new.
#[test]
fn a_log_that_is_gone_at_a_start_does_not_vote_before_it_came_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    cluster.create_topic(QUIET, 1, 3, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, QUIET, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "what is written once").unwrap();
    load.finish().unwrap();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "all whole").unwrap();
    // The log of the shard that begins now does not have what was before.
    assert!(cluster.nodes[1].stop().unwrap().success());
    cluster.nodes[1].restart().unwrap();
    cluster.progress(&load, "node 2 was restarted").unwrap();
    // What comes now is acknowledged by nodes 1 and 2.
    cluster.nodes[2].kill_9();
    cluster.progress(&load, "node 3 is down").unwrap();
    assert!(cluster.nodes[1].stop().unwrap().success());
    cluster.nodes[0].kill_9();
    let data = cluster.nodes[1].data_dir.join("data");
    for name in [format!("{TOPIC}-0"), format!("{QUIET}-0")] {
        std::fs::remove_dir_all(segment_file::first_of(&data, &name).parent().unwrap()).unwrap();
    }

    for at in [1, 2] {
        cluster.nodes[at].begin().unwrap();
    }
    let others_lead = || {
        let health = health(&cluster, 1, TOPIC)?;
        (health[1] != "leaderless" && health[2] != "leaderless").then_some(())
    };
    cluster.until("the other partitions to have leaders", others_lead).unwrap();
    std::thread::sleep(Duration::from_secs(5));
    for topic in [TOPIC, QUIET] {
        assert_eq!(health(&cluster, 2, topic).unwrap()[0], "leaderless", "{topic}");
    }
    await_logged(&cluster, 1, "the log of this replica is gone");

    cluster.nodes[0].restart().unwrap();
    cluster.progress(&load, "node 1 is back").unwrap();
    let begun = || cluster.nodes[1].log().matches("the replica joins its group with an empty one").count();
    cluster.until("both to begin again", || (begun() == 2).then_some(())).unwrap();
    await_mended(&cluster, 0);
    let whole = || health(&cluster, 0, QUIET).is_some_and(|health| health == ["ok"]);
    cluster.until("the other to be mended", || whole().then_some(())).unwrap();
    cluster.nodes[0].kill_9();
    cluster.progress(&load, "mended, and node 1 is down").unwrap();
    cluster.await_leaders(QUIET).unwrap();
    cluster.nodes[0].restart().unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut []).unwrap();
}
