//! Fetch.

use kafka_protocol::messages::FetchRequest;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use uuid::Uuid;

use super::{Bed, NOBODY, PLAIN_RECORDS, Probes, shown};
use crate::wire::topic_name;

const ALL: (i16, i16) = (4, 18);
/// Topics are named by id from here on.
const BY_ID: i16 = 13;

fn partition(index: i32, offset: i64) -> FetchPartition {
    FetchPartition::default()
        .with_partition(index)
        .with_fetch_offset(offset)
        .with_partition_max_bytes(1 << 20)
        .with_current_leader_epoch(-1)
}

fn topic(bed: &Bed, version: i16, name: &str, partitions: Vec<FetchPartition>) -> FetchTopic {
    let topic = FetchTopic::default().with_partitions(partitions);
    if version >= BY_ID { topic.with_topic_id(bed.id(name)) } else { topic.with_topic(topic_name(name)) }
}

fn request(version: i16, topics: Vec<FetchTopic>) -> FetchRequest {
    let request = FetchRequest::default()
        .with_max_wait_ms(0)
        .with_min_bytes(0)
        .with_max_bytes(1 << 20)
        .with_topics(topics);
    // No session is asked for: -1 says so.
    if version >= 7 { request.with_session_epoch(-1) } else { request }
}

fn at(bed: &Bed, version: i16, name: &str, index: i32, offset: i64) -> FetchRequest {
    request(version, vec![topic(bed, version, name, vec![partition(index, offset)])])
}

pub fn add(probes: &mut Probes) {
    for (what, offset) in [
        ("from the start", 0),
        ("inside a batch", 4),
        ("the last record", PLAIN_RECORDS - 1),
        ("at the end", PLAIN_RECORDS),
        ("beyond the end", PLAIN_RECORDS + 1),
        ("offset -1", -1),
        ("offset -2", -2),
        ("the largest offset", i64::MAX),
    ] {
        probes.one(&format!("Fetch/{what}"), ALL, move |bed, version| at(bed, version, "plain", 0, offset));
    }
    probes.one("Fetch/empty partition", ALL, |bed, version| at(bed, version, "empty", 0, 0));
    probes.one("Fetch/no topics", ALL, |_, version| request(version, Vec::new()));
    probes.one("Fetch/no partitions", ALL, |bed, version| {
        request(version, vec![topic(bed, version, "plain", Vec::new())])
    });
    probes.one("Fetch/unknown topic", ALL, |bed, version| at(bed, version, "nowhere", 0, 0));
    probes.one("Fetch/bad topic name", (4, 12), |bed, version| at(bed, version, "no name!", 0, 0));
    probes.one("Fetch/zero id", (13, 18), |_, version| {
        let topic = FetchTopic::default().with_topic_id(Uuid::nil()).with_partitions(vec![partition(0, 0)]);
        request(version, vec![topic])
    });
    probes.one("Fetch/unknown id beside a known one", (13, 18), |bed, version| {
        let nobody = FetchTopic::default().with_topic_id(NOBODY).with_partitions(vec![partition(0, 0)]);
        request(version, vec![nobody, topic(bed, version, "plain", vec![partition(0, 0)])])
    });
    for index in [3, -1, i32::MAX] {
        probes.one(&format!("Fetch/partition {index}"), ALL, move |bed, version| {
            at(bed, version, "plain", index, 0)
        });
    }
    probes.one("Fetch/several partitions", ALL, |bed, version| {
        let partitions = vec![partition(1, 0), partition(0, 6), partition(7, 0), partition(2, 5)];
        request(version, vec![topic(bed, version, "plain", partitions)])
    });
    for (what, shift) in [("right", 0), ("ahead", 5)] {
        probes.one(&format!("Fetch/leader epoch {what}"), (9, 18), move |bed, version| {
            let partition = partition(0, 0).with_current_leader_epoch(bed.epoch + shift);
            request(version, vec![topic(bed, version, "plain", vec![partition])])
        });
    }
    probes
        .one("Fetch/no bytes allowed", ALL, |bed, version| at(bed, version, "plain", 0, 0).with_max_bytes(0));
    probes.one("Fetch/no partition bytes allowed", ALL, |bed, version| {
        request(
            version,
            vec![topic(bed, version, "plain", vec![partition(0, 0).with_partition_max_bytes(0)])],
        )
    });
    probes
        .one("Fetch/one byte allowed", ALL, |bed, version| at(bed, version, "plain", 0, 0).with_max_bytes(1));
    probes.one("Fetch/isolation level 1", ALL, |bed, version| {
        at(bed, version, "plain", 0, 0).with_isolation_level(1)
    });
    probes.one("Fetch/isolation level 7", ALL, |bed, version| {
        at(bed, version, "plain", 0, 0).with_isolation_level(7)
    });
    probes.one("Fetch/unknown session", (7, 18), |bed, version| {
        at(bed, version, "plain", 0, 0).with_session_id(12_345).with_session_epoch(3)
    });
    probes.one("Fetch/end of an unknown session", (7, 18), |bed, version| {
        at(bed, version, "plain", 0, 6).with_session_id(12_345).with_session_epoch(-1)
    });
    probes.exchange("Fetch/waits for its time", ALL, |bed, version| {
        let mut wire = bed.wire()?;
        let fetch = at(bed, version, "empty", 0, 0).with_min_bytes(1).with_max_wait_ms(50);
        let started = std::time::Instant::now();
        wire.send(version, &fetch)?;
        let answer = shown::<FetchRequest>(&mut wire, version)?;
        anyhow::ensure!(started.elapsed().as_millis() >= 50, "answered after {:?}", started.elapsed());
        Ok(answer)
    });
}
