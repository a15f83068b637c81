//! What was acknowledged is there after kill -9, once, at its offset, in its order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flumen_tests::flumen::Flumen;
use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::json;

/// (partition, offset) -> number, as acknowledged.
#[derive(Clone, Default)]
struct Acknowledged(Arc<Mutex<BTreeMap<(i32, i64), u64>>>);

impl ClientContext for Acknowledged {}

impl ProducerContext for Acknowledged {
    type DeliveryOpaque = Box<u64>;

    fn delivery(&self, result: &DeliveryResult<'_>, number: Self::DeliveryOpaque) {
        if let Ok(message) = result {
            let before = self.0.lock().unwrap().insert((message.partition(), message.offset()), *number);
            assert_eq!(before, None, "two records were acknowledged at one offset");
        }
    }
}

fn read_all(kafka: &str, topic: &str, ends: &[i64]) -> BTreeMap<(i32, i64), u64> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "reader")
        .set("enable.partition.eof", "false")
        .set("check.crcs", "true")
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    for p in 0..ends.len() as i32 {
        list.add_partition_offset(topic, p, Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut all = BTreeMap::new();
    let total: i64 = ends.iter().sum();
    while (all.len() as i64) < total {
        let Some(message) = consumer.poll(Duration::from_secs(1)) else { continue };
        let message = message.unwrap();
        let number = std::str::from_utf8(message.payload().unwrap()).unwrap()[..10].parse().unwrap();
        assert_eq!(all.insert((message.partition(), message.offset()), number), None);
    }
    all
}

fn kill_under_load(cycles: usize, durability: &str, shards: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let mut flumen = Flumen::start_at(
        dir.path(),
        flumen_tests::process::free_port(),
        flumen_tests::process::free_port(),
        &[],
        shards,
    )
    .unwrap();
    flumen.create_topic("t", 4, &json!({ "flumen.durability": durability })).unwrap();
    let acknowledged = Acknowledged::default();
    let producer: ThreadedProducer<Acknowledged> = ClientConfig::new()
        .set("bootstrap.servers", &flumen.kafka)
        .set("enable.idempotence", "true")
        .set("linger.ms", "1")
        .set("message.timeout.ms", "300000")
        .set("reconnect.backoff.max.ms", "200")
        .set("retry.backoff.max.ms", "200")
        .create_with_context(acknowledged.clone())
        .unwrap();
    let mut sent = 0u64;
    for cycle in 0..cycles {
        for _ in 0..3000 {
            let payload = format!("{sent:010}{}", "x".repeat((sent % 700) as usize));
            let key = (sent % 31).to_string();
            let mut record = BaseRecord::with_opaque_to("t", Box::new(sent)).key(&key).payload(&payload);
            while let Err((_, back)) = producer.send(record) {
                record = back;
                std::thread::sleep(Duration::from_millis(1));
            }
            sent += 1;
            if sent % 100 == 0 {
                std::thread::sleep(Duration::from_millis(1 + (cycle as u64 * 7) % 5));
            }
        }
        flumen.kill_9();
        flumen.restart().unwrap();
    }
    producer.flush(Duration::from_secs(300)).unwrap();
    let acknowledged = acknowledged.0.lock().unwrap().clone();
    assert_eq!(acknowledged.len() as u64, sent, "everything is acknowledged in the end");
    let ends = flumen.end_offsets("t").unwrap();
    let stored = read_all(&flumen.kafka, "t", &ends);
    assert_eq!(
        stored, acknowledged,
        "the log is what was acknowledged: no loss, no duplicate, no other offset"
    );
    assert!(flumen.stop().unwrap().success());
}

#[test]
fn durable_records_survive_kill_9() {
    kill_under_load(6, "durable", &[]);
}

#[test]
fn os_records_survive_kill_9() {
    kill_under_load(4, "os", &["--shards", "1"]);
}

#[test]
fn a_clean_stop_and_another_number_of_shards_keep_everything() {
    let dir = tempfile::tempdir().unwrap();
    let ports = (flumen_tests::process::free_port(), flumen_tests::process::free_port());
    let mut expected = BTreeMap::new();
    for shards in ["1", "3", "2"] {
        let mut flumen = Flumen::start_at(dir.path(), ports.0, ports.1, &[], &["--shards", shards]).unwrap();
        if expected.is_empty() {
            flumen.create_topic("t", 5, &json!({})).unwrap();
        }
        let acknowledged = Acknowledged::default();
        let producer: ThreadedProducer<Acknowledged> = ClientConfig::new()
            .set("bootstrap.servers", &flumen.kafka)
            .create_with_context(acknowledged.clone())
            .unwrap();
        for i in 0..500u64 {
            let payload = format!("{i:010}");
            producer
                .send(
                    BaseRecord::<str, str, _>::with_opaque_to("t", Box::new(i))
                        .key(&i.to_string())
                        .payload(&payload),
                )
                .map_err(|(e, _)| e)
                .unwrap();
        }
        producer.flush(Duration::from_secs(300)).unwrap();
        expected.extend(acknowledged.0.lock().unwrap().clone());
        let ends = flumen.end_offsets("t").unwrap();
        assert_eq!(read_all(&flumen.kafka, "t", &ends), expected, "with {shards} shards");
        assert!(flumen.stop().unwrap().success());
    }
}

/// What was acknowledged from memory may go with the process, but only from the end: what is left is a beginning of it,
/// and the log goes on behind that.
#[test]
fn memory_records_lose_at_most_their_end_to_kill_9() {
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<BTreeMap<(i32, i64), u64>>>);
    impl ClientContext for Seen {}
    impl ProducerContext for Seen {
        type DeliveryOpaque = Box<u64>;

        fn delivery(&self, result: &DeliveryResult<'_>, number: Self::DeliveryOpaque) {
            if let Ok(message) = result {
                self.0.lock().unwrap().insert((message.partition(), message.offset()), *number);
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = (flumen_tests::process::free_port(), flumen_tests::process::free_port());
    let mut flumen = Flumen::start_at(dir.path(), ports.0, ports.1, &[], &["--shards", "1"]).unwrap();
    flumen.create_topic("t", 2, &json!({ "flumen.durability": "memory" })).unwrap();
    let described = flumen.cli(&["topic", "describe", "t"]).unwrap();
    assert!(described.stdout.contains("DURABILITY  memory"), "{}", described.stdout);
    let (mut kept, mut sent) = (BTreeMap::new(), 0u64);
    for _ in 0..4 {
        let seen = Seen::default();
        let producer: ThreadedProducer<Seen> = ClientConfig::new()
            .set("bootstrap.servers", &flumen.kafka)
            .set("linger.ms", "0")
            .set("retries", "0")
            .set("message.timeout.ms", "5000")
            .create_with_context(seen.clone())
            .unwrap();
        // Killed while they come.
        while seen.0.lock().unwrap().len() < 3000 {
            let payload = format!("{sent:010}");
            let record = BaseRecord::<str, str, _>::with_opaque_to("t", Box::new(sent)).payload(&payload);
            sent += 1;
            if producer.send(record.key(&payload)).is_err() || sent % 50 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        flumen.kill_9();
        drop(producer);
        let mut acknowledged: BTreeMap<(i32, i64), u64> = seen.0.lock().unwrap().clone();
        acknowledged.extend(std::mem::take(&mut kept));
        flumen.restart().unwrap();
        let ends = flumen.end_offsets("t").unwrap();
        let stored = read_all(&flumen.kafka, "t", &ends);
        let mut lost = 0;
        for (place, number) in &acknowledged {
            match stored.get(place) {
                Some(found) => assert_eq!(found, number, "at {place:?}"),
                None => {
                    assert!(place.1 >= ends[place.0 as usize], "lost from the middle: {place:?}");
                    lost += 1;
                }
            }
        }
        assert!(lost < 3000, "{lost} lost: more than some milliseconds of them");
        kept = stored;
    }
    // A clean stop loses nothing.
    let before = flumen.end_offsets("t").unwrap();
    assert!(flumen.stop().unwrap().success());
    flumen.restart().unwrap();
    assert_eq!(flumen.end_offsets("t").unwrap(), before);
}
