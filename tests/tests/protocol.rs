//! Single rules of the protocol, asked of a real broker over TCP.

use flumen_protocol::compression::Compression;
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record::BatchBuilder;
use flumen_tests::flumen::Flumen;
use flumen_tests::wire::{Wire, batch, now_ms, produce, topic_name};
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::fetch_response::PartitionData;
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{FetchRequest, ListOffsetsRequest, MetadataRequest};
use serde_json::json;

fn broker(settings: &[&str]) -> (tempfile::TempDir, Flumen) {
    let dir = tempfile::tempdir().unwrap();
    let mut all = vec!["group.initial.rebalance.delay.ms=0"];
    all.extend_from_slice(settings);
    let flumen = Flumen::start(dir.path(), &all).unwrap();
    (dir, flumen)
}

/// Reads one partition by name, without waiting.
fn fetch(wire: &mut Wire, version: i16, topic: &str, offset: i64) -> PartitionData {
    let request = FetchRequest::default().with_min_bytes(0).with_max_bytes(1 << 20).with_topics(vec![
        FetchTopic::default().with_topic(topic_name(topic)).with_partitions(vec![
            FetchPartition::default().with_fetch_offset(offset).with_partition_max_bytes(1 << 20),
        ]),
    ]);
    let mut response = wire.ask(version, &request).unwrap();
    response.responses[0].partitions.remove(0)
}

#[test]
fn zstd_needs_versions_that_know_it() {
    let (_dir, flumen) = broker(&[]);
    flumen.create_topic("z", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let zstd = || {
        batch(&["compressed"; 20], |b| {
            b.compression(Compression::Zstd);
        })
    };
    let gzip = || {
        batch(&["compressed"; 20], |b| {
            b.compression(Compression::Gzip);
        })
    };
    // Made once: what they compress to depends on the time in them.
    let (zstd, gzip) = (zstd(), gzip());
    let (zstd, gzip) = (|| zstd.clone(), || gzip.clone());
    let mut error = |version, records| {
        let answer = wire.ask(version, &produce("z", 0, -1, Some(records))).unwrap();
        answer.responses[0].partition_responses[0].error_code
    };
    for version in 3..=6 {
        assert_eq!(error(version, zstd()), ErrorCode::UNSUPPORTED_COMPRESSION_TYPE.0, "v{version}");
    }
    assert_eq!(error(3, gzip()), 0);
    assert_eq!(error(7, zstd()), 0);
    assert_eq!(error(12, zstd()), 0);

    // What is fetched is decided by the topic's configuration, as Kafka does it: some clients ask in old versions and
    // read zstd all the same.
    let all = gzip().len() + 2 * zstd().len();
    flumen.create_topic("told", 1, &json!({ "compression.type": "zstd" })).unwrap();
    for version in 4..=12 {
        assert_eq!(fetch(&mut wire, version, "z", 0).records.map(|r| r.len()), Some(all), "v{version}");
        let code = if version < 10 { ErrorCode::UNSUPPORTED_COMPRESSION_TYPE } else { ErrorCode::NONE };
        assert_eq!(fetch(&mut wire, version, "told", 0).error_code, code.0, "v{version}");
    }
}

#[test]
fn a_refused_batch_names_the_records_to_blame() {
    let (_dir, flumen) = broker(&[]);
    flumen.create_topic("compacted", 1, &json!({ "cleanup.policy": "compact" })).unwrap();
    flumen.create_topic("timed", 1, &json!({ "message.timestamp.before.max.ms": "3600000" })).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let mut keys = BatchBuilder::new();
    let mut times = BatchBuilder::new();
    for i in 0..6i64 {
        let now = now_ms();
        keys.append(now, (i % 3 != 1).then_some(b"k"), Some(b"v"), &[]);
        times.append(if i == 0 || i == 4 { now - 7_200_000 } else { now }, None, Some(b"v"), &[]);
    }
    for (topic, records, code, blamed) in [
        ("compacted", keys.build(0), ErrorCode::INVALID_RECORD, [1, 4]),
        ("timed", times.build(0), ErrorCode::INVALID_TIMESTAMP, [0, 4]),
    ] {
        for version in 3..=12 {
            let request = produce(topic, 0, -1, Some(records.clone().freeze()));
            let answer = wire.ask(version, &request).unwrap().responses[0].partition_responses[0].clone();
            assert_eq!((answer.error_code, answer.base_offset), (code.0, -1));
            let named: Vec<i32> = answer.record_errors.iter().map(|e| e.batch_index).collect();
            assert_eq!(named, if version >= 8 { &blamed[..] } else { &[] }, "{topic} v{version}");
            assert_eq!(answer.error_message.is_some(), version >= 8);
        }
    }
}

#[test]
fn bytes_after_a_request_do_not_end_the_connection() {
    let (_dir, flumen) = broker(&[]);
    flumen.create_topic("t", 3, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let all = MetadataRequest::default().with_topics(None);
    let mut frame = wire.frame(13, &all).unwrap();
    frame.extend_from_slice(&[1, 0, 0]);
    let length = i32::try_from(frame.len() - 4).unwrap();
    frame[..4].copy_from_slice(&length.to_be_bytes());
    wire.send_raw(&frame).unwrap();
    let answer = wire.receive::<MetadataRequest>(13).unwrap();
    assert_eq!(answer.topics[0].partitions.len(), 3);
    assert_eq!(wire.ask(13, &all).unwrap().topics.len(), 1);
}

#[test]
fn idle_connections_are_closed_and_waiting_ones_are_not() {
    let (_dir, flumen) = broker(&["connections.max.idle.ms=300"]);
    flumen.create_topic("t", 1, &json!({})).unwrap();
    let mut idle = Wire::connect(&flumen.kafka).unwrap();
    idle.ask(13, &MetadataRequest::default().with_topics(None)).unwrap();
    // A long poll is longer than the limit and is answered all the same.
    let mut waiting = Wire::connect(&flumen.kafka).unwrap();
    let poll =
        FetchRequest::default().with_min_bytes(1).with_max_wait_ms(1500).with_max_bytes(1).with_topics(vec![
            FetchTopic::default()
                .with_topic(topic_name("t"))
                .with_partitions(vec![FetchPartition::default().with_partition_max_bytes(1)]),
        ]);
    waiting.send(12, &poll).unwrap();
    assert!(idle.receive_frame().unwrap().is_none(), "closed without a word");
    assert_eq!(waiting.receive::<FetchRequest>(12).unwrap().responses[0].partitions[0].error_code, 0);
}

#[test]
fn a_deleted_topic_does_not_make_consumers_spin() {
    let (_dir, flumen) = broker(&[]);
    flumen.create_topic("t", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let partitions = || vec![FetchPartition::default().with_partition_max_bytes(1000)];
    let topic = |name: &str| FetchTopic::default().with_topic(topic_name(name)).with_partitions(partitions());
    let poll = |names: &[&str], wait_ms: i32| {
        FetchRequest::default()
            .with_min_bytes(1)
            .with_max_wait_ms(wait_ms)
            .with_max_bytes(1000)
            .with_topics(names.iter().map(|n| topic(n)).collect())
    };
    // Beside a partition that is there, the missing one waits for the answer.
    let started = std::time::Instant::now();
    let answer = wire.ask(12, &poll(&["t", "gone"], 400)).unwrap();
    assert!(started.elapsed().as_millis() >= 400);
    let codes: Vec<i16> = answer.responses.iter().map(|r| r.partitions[0].error_code).collect();
    assert_eq!(codes, [0, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION.0]);
    // Alone there is nothing to wait for: were this to wait, the test would take an hour.
    for names in [&["gone"][..], &[]] {
        assert_eq!(wire.ask(12, &poll(names, 3_600_000)).unwrap().responses.len(), names.len());
    }
}

#[test]
fn an_error_of_the_log_tells_where_it_starts() {
    let (_dir, flumen) = broker(&[]);
    let configs = json!({"message.timestamp.before.max.ms": "3600000", "max.message.bytes": "1000"});
    flumen.create_topic("strict", 1, &configs).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let mut refused = |records| {
        let mut answer = wire.ask(9, &produce("strict", 0, -1, Some(records))).unwrap();
        let partition = answer.responses[0].partition_responses.remove(0);
        (partition.error_code, partition.base_offset, partition.log_start_offset)
    };
    // One old record between two new ones, which the header does not tell.
    let mut builder = BatchBuilder::new();
    for stamp in [now_ms(), now_ms() - 7_200_000, now_ms()] {
        builder.append(stamp, None, Some(b"x"), &[]);
    }
    let old = builder.build(0).freeze();
    assert_eq!(refused(old), (ErrorCode::INVALID_TIMESTAMP.0, -1, 0));
    // Size is looked at before the log is.
    let large = batch(&["y"; 2000], |_| {});
    assert_eq!(refused(large), (ErrorCode::MESSAGE_TOO_LARGE.0, -1, -1));
    assert_eq!(refused(batch(&["z"], |_| {})), (0, 0, 0));
}

#[test]
fn a_topic_without_partitions_is_not_answered() {
    let (_dir, flumen) = broker(&[]);
    flumen.create_topic("a", 1, &json!({})).unwrap();
    flumen.create_topic("b", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let fetch = FetchRequest::default().with_min_bytes(0).with_max_bytes(1 << 20).with_topics(vec![
        FetchTopic::default().with_topic(topic_name("a")),
        FetchTopic::default().with_topic(topic_name("b")).with_partitions(vec![FetchPartition::default()]),
    ]);
    let answered = wire.ask(12, &fetch).unwrap();
    let names: Vec<_> = answered.responses.iter().map(|t| t.topic.to_string()).collect();
    assert_eq!(names, ["b"]);
    let list = ListOffsetsRequest::default().with_topics(vec![
        ListOffsetsTopic::default().with_name(topic_name("a")),
        ListOffsetsTopic::default().with_name(topic_name("b")).with_partitions(vec![
            ListOffsetsPartition::default().with_timestamp(-2).with_current_leader_epoch(-1),
        ]),
    ]);
    let answered = wire.ask(7, &list).unwrap();
    assert_eq!(answered.topics.len(), 1);
    // The first offset of an empty log belongs to the epoch of what will be written there.
    let ask = MetadataRequest::default()
        .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(topic_name("b")))]));
    let epoch = wire.ask(12, &ask).unwrap().topics[0].partitions[0].leader_epoch;
    let earliest = &answered.topics[0].partitions[0];
    assert_eq!((earliest.offset, earliest.leader_epoch), (0, epoch));
}

#[test]
fn without_acks_an_error_closes_the_connection_and_a_success_says_nothing() {
    let (_dir, flumen) = broker(&["auto.create.topics.enable=false"]);
    flumen.create_topic("quiet", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    wire.send(9, &produce("quiet", 0, 0, Some(batch(&["a"], |_| {})))).unwrap();
    // The next answer on the connection is that of the next request.
    assert!(wire.ask(12, &MetadataRequest::default()).is_ok());
    wire.send(9, &produce("gone", 0, 0, Some(batch(&["a"], |_| {})))).unwrap();
    assert_eq!(wire.receive_frame().unwrap(), None);
}
