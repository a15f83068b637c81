//! A node that is lost or leaves is replaced when its topics were compacted long ago: a new one gets what nobody can send as
//! entries, of a topic of the user's and of the one with the groups' offsets; also when it is killed in the middle of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flumen_protocol::error_code::ErrorCode;
use flumen_tests::cluster::Cluster;
use flumen_tests::keyed::{self, Acknowledged};
use flumen_tests::wire::{Wire, text, topic_name};
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestTopic;
use kafka_protocol::messages::{OffsetCommitRequest, OffsetFetchRequest};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::ThreadedProducer;
use serde_json::json;

const TOPIC: &str = "c";
const OFFSETS: &str = "__consumer_offsets";
const GROUPS: usize = 40;

fn producer(cluster: &Cluster, acknowledged: &Acknowledged) -> ThreadedProducer<Acknowledged> {
    acknowledged.producer(&cluster.kafka(), &[("log_level", "0")])
}

fn produce(producer: &ThreadedProducer<Acknowledged>, from: u64, count: u64) {
    keyed::produce(producer, TOPIC, from, count, |n| format!("{n} {}", "x".repeat(900)).into_bytes());
}

fn check(cluster: &Cluster, acknowledged: &Acknowledged) {
    // A broker may be away.
    acknowledged.check(&keyed::consume(&cluster.kafka(), TOPIC, |_| ()));
}

/// Answered by whoever coordinates.
fn at_coordinator<T>(cluster: &Cluster, mut ask: impl FnMut(&mut Wire) -> Option<T>) -> T {
    cluster
        .until("the groups' coordinator to answer", || {
            let leader = cluster.leaders(OFFSETS).ok()?.first().copied().filter(|id| *id > 0)?;
            let node = cluster.nodes.get(usize::try_from(leader - 1).ok()?)?;
            ask(&mut Wire::connect(&node.kafka).ok()?)
        })
        .unwrap()
}

fn commit(wire: &mut Wire, group: usize, offset: i64) -> Option<()> {
    let partition = OffsetCommitRequestPartition::default()
        .with_partition_index(0)
        .with_committed_offset(offset)
        .with_committed_metadata(Some(text(&"m".repeat(4_000))));
    let topic =
        OffsetCommitRequestTopic::default().with_name(topic_name(TOPIC)).with_partitions(vec![partition]);
    let request = OffsetCommitRequest::default()
        .with_group_id(text(&format!("g{group}")).into())
        .with_generation_id_or_member_epoch(-1)
        .with_topics(vec![topic]);
    let code = wire.ask(7, &request).ok()?.topics[0].partitions[0].error_code;
    (code == ErrorCode::NONE.0).then_some(())
}

fn committed(cluster: &Cluster) -> Vec<i64> {
    at_coordinator(cluster, |wire| {
        (0..GROUPS)
            .map(|group| {
                let topic = OffsetFetchRequestTopic::default()
                    .with_name(topic_name(TOPIC))
                    .with_partition_indexes(vec![0]);
                let request = OffsetFetchRequest::default()
                    .with_group_id(text(&format!("g{group}")).into())
                    .with_topics(Some(vec![topic]));
                let answer = wire.ask(5, &request).ok()?;
                (answer.error_code == 0).then(|| answer.topics[0].partitions[0].committed_offset)
            })
            .collect()
    })
}

/// Files of a replica whose names end so.
fn files(data: &Path, partition: &str, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(dirs) = std::fs::read_dir(data.join("data/log")) else { return Vec::new() };
    let named = |dir: &PathBuf| {
        let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(&format!("{partition}.g")) && !name.ends_with(".deleted")
    };
    let dirs = dirs.filter_map(|dir| Some(dir.ok()?.path())).filter(named);
    let inside = dirs.flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten());
    inside
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted))
        .collect()
}

fn is_compacted(name: &str) -> bool {
    name.ends_with(".log") && name.split('.').count() > 2
}

/// Commits and records until every running node has compacted both topics.
fn compact_everywhere(cluster: &Cluster, acknowledged: &Acknowledged) -> (u64, i64) {
    let client = producer(cluster, acknowledged);
    let (mut sent, mut offset) = (0, 0);
    loop {
        produce(&client, sent, 3_000);
        sent += 3_000;
        for _ in 0..10 {
            offset += 1;
            at_coordinator(cluster, |wire| (0..GROUPS).try_for_each(|group| commit(wire, group, offset)));
        }
        let all = cluster.nodes.iter().filter(|node| node.is_running()).all(|node| {
            [format!("{TOPIC}-0"), format!("{OFFSETS}-0")]
                .iter()
                .all(|partition| !files(&node.data_dir, partition, is_compacted).is_empty())
        });
        if all {
            return (sent, offset);
        }
        assert!(sent < 300_000, "never compacted");
    }
}

fn ok(cluster: &Cluster, through: usize, arguments: &[&str]) {
    let output = cluster.nodes[through].cli(arguments).unwrap();
    assert!(output.success, "flumen {}: {}{}", arguments.join(" "), output.stdout, output.stderr);
}

fn lead_from(cluster: &Cluster, id: i32, others: &[i32]) {
    for other in others {
        ok(cluster, 1, &["cluster", "maintenance", &other.to_string()]);
    }
    for topic in [TOPIC, OFFSETS] {
        cluster
            .until(&format!("node {id} to lead {topic}"), || {
                (cluster.leaders(topic).ok()? == [id]).then_some(())
            })
            .unwrap();
    }
    for other in others {
        ok(cluster, 1, &["cluster", "maintenance", &other.to_string(), "--off"]);
    }
}

fn start(dir: &Path) -> (Cluster, Acknowledged, i64) {
    let settings = [
        "group.initial.rebalance.delay.ms=0",
        "offsets.topic.num.partitions=1",
        "offsets.topic.segment.bytes=1048576",
        "log.cleaner.min.cleanable.ratio=0.2",
    ];
    let cluster = Cluster::start(dir, 3, &settings).unwrap();
    let configs = json!({ "cleanup.policy": "compact", "segment.bytes": "1048576" });
    cluster.create_topic(TOPIC, 1, 3, &configs).unwrap();
    let acknowledged = Acknowledged::default();
    // The first group brings its topic.
    let group: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.kafka())
        .set("group.id", "first")
        .set("log_level", "0")
        .create()
        .unwrap();
    cluster
        .until("the offsets topic", || {
            let _ = group.fetch_group_list(Some("first"), Duration::from_secs(1));
            let request = kafka_protocol::messages::FindCoordinatorRequest::default().with_key(text("g0"));
            let answer = Wire::connect(&cluster.nodes[0].kafka).ok()?.ask(2, &request).ok()?;
            (answer.error_code == 0).then_some(())
        })
        .unwrap();
    let (_, offset) = compact_everywhere(&cluster, &acknowledged);
    (cluster, acknowledged, offset)
}

#[test]
fn a_new_node_gets_what_was_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cluster, acknowledged, offset) = start(dir.path());
    let new = cluster.add().unwrap();

    // It dies when it has fetched everything, and again when that has become its log.
    let die_at = |cluster: &mut Cluster, place: &str| {
        cluster.nodes[new].kill_9();
        cluster.nodes[new].environment = vec![("FLUMEN_FAILPOINT", place.to_owned())];
        cluster.nodes[new].restart_or_end().unwrap();
    };
    die_at(&mut cluster, "received-synced");
    ok(&cluster, 1, &["cluster", "decommission", "1"]);
    let died = cluster.nodes[new].wait().unwrap();
    assert!(!died.success(), "{died}");
    println!("died with everything fetched");
    die_at(&mut cluster, "received-placed");
    let died = cluster.nodes[new].wait().unwrap();
    assert!(!died.success(), "{died}");
    println!("died with everything in place");
    cluster.nodes[new].environment.clear();
    cluster.nodes[new].restart().unwrap();

    cluster
        .until("node 1 to be removed", || {
            cluster.nodes[1].cli(&["cluster", "remove", "1"]).ok()?.success.then_some(())
        })
        .unwrap();
    cluster.nodes[0].kill_9();
    for partition in [format!("{TOPIC}-0"), format!("{OFFSETS}-0")] {
        assert!(!files(&cluster.nodes[new].data_dir, &partition, is_compacted).is_empty(), "{partition}");
        let left = files(&cluster.nodes[new].data_dir, &partition, |name| {
            name.ends_with(".received") || name.ends_with(".receiving")
        });
        assert!(left.is_empty(), "{left:?}");
    }
    check(&cluster, &acknowledged);
    assert_eq!(committed(&cluster), vec![offset; GROUPS]);

    // What it has is what the others had: from itself, also after it was killed and started again.
    lead_from(&cluster, 4, &[2, 3]);
    check(&cluster, &acknowledged);
    assert_eq!(committed(&cluster), vec![offset; GROUPS]);
    cluster.nodes[new].kill_9();
    cluster.nodes[new].restart().unwrap();
    let client = producer(&cluster, &acknowledged);
    produce(&client, 1_000_000, 3_000);
    lead_from(&cluster, 4, &[2, 3]);
    check(&cluster, &acknowledged);
    assert_eq!(committed(&cluster), vec![offset; GROUPS]);
}
