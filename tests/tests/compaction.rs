//! A compacted topic through real clients: what is read is what was written last under every key, at its offset, also
//! after kill -9; and committed offsets outlive the compaction of their topic.

use std::collections::BTreeMap;
use std::time::Duration;

use flumen_protocol::error_code::ErrorCode;
use flumen_tests::flumen::Flumen;
use flumen_tests::keyed::{self, Acknowledged, Stored};
use flumen_tests::wire::Wire;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestTopic;
use kafka_protocol::messages::{OffsetCommitRequest, OffsetFetchRequest, TopicName};
use kafka_protocol::protocol::StrBytes;
use rdkafka::producer::ThreadedProducer;
use serde_json::json;

fn producer(flumen: &Flumen, acknowledged: &Acknowledged) -> ThreadedProducer<Acknowledged> {
    let settings =
        [("compression.type", "lz4"), ("reconnect.backoff.max.ms", "200"), ("retry.backoff.max.ms", "200")];
    acknowledged.producer(&flumen.kafka, &settings)
}

/// Bytes that no codec makes small.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

fn produce(producer: &ThreadedProducer<Acknowledged>, from: u64, count: u64) {
    keyed::produce(producer, "c", from, count, |n| noise(n, 900));
}

/// Everything from the beginning to the end of the partition.
fn consume(flumen: &Flumen) -> BTreeMap<i64, Stored> {
    keyed::consume(&flumen.kafka, "c", |error| panic!("{error}"))
}

fn compactions(flumen: &Flumen) -> u64 {
    let text = flumen.get("/metrics").unwrap();
    let lines = text.as_str().unwrap().lines();
    lines
        .filter(|line| line.starts_with("flumen_storage_compactions_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64)
        .sum()
}

/// Until compaction has run again.
fn wait_for_compaction(flumen: &Flumen, seen: u64) -> u64 {
    loop {
        let now = compactions(flumen);
        if now > seen {
            return now;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_last_record_of_every_key_stays() {
    let dir = tempfile::tempdir().unwrap();
    let ports = (flumen_tests::process::free_port(), flumen_tests::process::free_port());
    let mut flumen = Flumen::start_at(dir.path(), ports.0, ports.1, &[], &["--shards", "1"]).unwrap();
    let configs = json!({ "cleanup.policy": "compact", "segment.bytes": "1048576", "min.cleanable.dirty.ratio": "0.2" });
    flumen.create_topic("c", 1, &configs).unwrap();
    let acknowledged = Acknowledged::default();
    let client = producer(&flumen, &acknowledged);
    let (mut sent, mut seen) = (0, 0);
    let mut last_size = 0;
    for round in 0..4 {
        produce(&client, sent, 6_000);
        sent += 6_000;
        seen = wait_for_compaction(&flumen, seen);
        let found = consume(&flumen);
        acknowledged.check(&found);
        assert!((found.len() as u64) < sent, "{} of {sent}", found.len());
        last_size = found.len();
        if round < 3 {
            // Sometimes in the middle of the next one: nothing tells when that begins.
            produce(&client, sent, 2_000);
            sent += 2_000;
            flumen.kill_9();
            flumen.restart().unwrap();
            seen = 0;
            acknowledged.check(&consume(&flumen));
        }
    }
    // What is not compacted yet is some segments, however much was written.
    assert!((last_size as u64) < sent / 2, "{last_size} of {sent}");
    assert!(seen > 0);
    assert_eq!(flumen.end_offsets("c").unwrap(), [sent as i64]);
    assert!(flumen.stop().unwrap().success());
    flumen.restart().unwrap();
    acknowledged.check(&consume(&flumen));
    let described = flumen.get("/v1/topics/c").unwrap();
    assert_eq!(described["partition_list"][0]["log_start_offset"], 0);
    assert_eq!(described["partition_list"][0]["health"], "ok");
}

fn commit(wire: &mut Wire, offset: i64, metadata: &str) -> i16 {
    let partition = OffsetCommitRequestPartition::default()
        .with_partition_index(0)
        .with_committed_offset(offset)
        .with_committed_metadata(Some(StrBytes::from_string(metadata.to_string())));
    let topic = OffsetCommitRequestTopic::default()
        .with_name(TopicName(StrBytes::from_static_str("t")))
        .with_partitions(vec![partition]);
    let request = OffsetCommitRequest::default()
        .with_group_id(StrBytes::from_static_str("g").into())
        .with_generation_id_or_member_epoch(-1)
        .with_topics(vec![topic]);
    wire.ask(7, &request).unwrap().topics[0].partitions[0].error_code
}

fn committed(wire: &mut Wire) -> (i64, usize) {
    let topic = OffsetFetchRequestTopic::default()
        .with_name(TopicName(StrBytes::from_static_str("t")))
        .with_partition_indexes(vec![0]);
    let request = OffsetFetchRequest::default()
        .with_group_id(StrBytes::from_static_str("g").into())
        .with_topics(Some(vec![topic]));
    loop {
        let answer = wire.ask(5, &request).unwrap();
        if answer.error_code == ErrorCode::NONE.0 {
            let partition = &answer.topics[0].partitions[0];
            return (partition.committed_offset, partition.metadata.as_ref().map_or(0, |text| text.len()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn committed_offsets_outlive_the_compaction_of_their_topic() {
    let dir = tempfile::tempdir().unwrap();
    let settings = ["offsets.topic.num.partitions=1", "offsets.topic.segment.bytes=1048576"];
    let mut flumen = Flumen::start_at(
        dir.path(),
        flumen_tests::process::free_port(),
        flumen_tests::process::free_port(),
        &settings,
        &["--shards", "1"],
    )
    .unwrap();
    flumen.create_topic("t", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let metadata = "m".repeat(4_000);
    let mut offset = 0;
    let mut seen = 0;
    // Until its topic was compacted twice: the second time reads what the first one wrote.
    while seen < 2 {
        for _ in 0..100 {
            offset += 1;
            loop {
                let code = commit(&mut wire, offset, &metadata);
                if code == ErrorCode::NONE.0 {
                    break;
                }
                let coming = [ErrorCode::COORDINATOR_LOAD_IN_PROGRESS, ErrorCode::NOT_COORDINATOR];
                let coming = coming.map(|code| code.0).contains(&code)
                    || code == ErrorCode::COORDINATOR_NOT_AVAILABLE.0;
                assert!(coming, "error {code}");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        seen = compactions(&flumen);
        assert!(offset < 1_000_000, "never compacted");
    }
    assert_eq!(committed(&mut wire), (offset, 4_000));
    drop(wire);
    flumen.kill_9();
    flumen.restart().unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    assert_eq!(committed(&mut wire), (offset, 4_000));
    let held = flumen.get("/v1/topics/__consumer_offsets").unwrap()["partition_list"][0].clone();
    let size = held["size_bytes"].as_i64().unwrap();
    // Each of the two passes left next to nothing of at least one segment; how much came since is up to the clock.
    assert!(size < offset * 4_200 - 1_000_000, "{size} bytes after {offset} commits of 4,000");
}
