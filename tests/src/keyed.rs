//! The records of a compacted topic of one partition: what was acknowledged of each key, and what must be there of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use crate::kafka::idempotent;

/// Keys that records have in turn.
const KEYS: u64 = 211;

/// A key and its value; none: deleted.
pub type Stored = (String, Option<Vec<u8>>);

/// What was acknowledged, by offset.
#[derive(Clone, Default)]
pub struct Acknowledged(Arc<Mutex<BTreeMap<i64, Stored>>>);

impl ClientContext for Acknowledged {}

impl ProducerContext for Acknowledged {
    type DeliveryOpaque = Box<Stored>;

    fn delivery(&self, result: &DeliveryResult<'_>, stored: Self::DeliveryOpaque) {
        let message = result.as_ref().expect("everything is acknowledged in the end");
        self.0.lock().expect("no panic under this lock").insert(message.offset(), *stored);
    }
}

/// The newest value of every key that is not deleted.
fn alive(records: &BTreeMap<i64, Stored>) -> BTreeMap<String, Vec<u8>> {
    let newest: BTreeMap<String, Option<Vec<u8>>> = records.values().cloned().collect();
    newest.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

impl Acknowledged {
    /// An idempotent producer that writes down here what becomes of its records.
    pub fn producer(&self, kafka: &str, settings: &[(&str, &str)]) -> ThreadedProducer<Acknowledged> {
        let usual = [("linger.ms", "2"), ("batch.size", "20000"), ("message.timeout.ms", "300000")];
        let config = idempotent(kafka, &[&usual, settings].concat());
        config.create_with_context(self.clone()).expect("a producer with these settings")
    }

    /// What is there of a compacted topic has the newest of every key, and nothing that was not acknowledged at its offset.
    pub fn check(&self, found: &BTreeMap<i64, Stored>) {
        let written = self.0.lock().expect("no panic under this lock");
        assert_eq!(alive(found), alive(&written));
        for (offset, stored) in found {
            assert_eq!(Some(stored), written.get(offset), "offset {offset}");
        }
    }
}

/// Sends the records with these numbers, and waits until they are acknowledged.
pub fn produce(
    producer: &ThreadedProducer<Acknowledged>,
    topic: &str,
    from: u64,
    count: u64,
    value_of: impl Fn(u64) -> Vec<u8>,
) {
    for n in from..from + count {
        let key = format!("key {}", (n * 7919) % KEYS);
        // Now and then a key is deleted.
        let value = (n % 17 != 3).then(|| value_of(n));
        let mut record = BaseRecord::with_opaque_to(topic, Box::new((key.clone(), value.clone()))).key(&key);
        if let Some(value) = &value {
            record = record.payload(value);
        }
        while let Err((_, back)) = producer.send(record) {
            record = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    producer.flush(Duration::from_secs(300)).expect("everything is acknowledged");
}

/// Everything from the beginning to the end of the partition. `on_error` hears of what a poll says beside records.
pub fn consume(kafka: &str, topic: &str, on_error: impl Fn(KafkaError)) -> BTreeMap<i64, Stored> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("check.crcs", "true")
        .set("log_level", "0")
        .create()
        .expect("a consumer with these settings");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Beginning).expect("a valid offset");
    consumer.assign(&list).expect("an assignment");
    let mut all = BTreeMap::new();
    loop {
        match consumer.poll(Duration::from_secs(1)) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(_))) => return all,
            Some(Err(error)) => on_error(error),
            Some(Ok(message)) => {
                let key = message.key().expect("every record has a key").to_vec();
                let key = String::from_utf8(key).expect("keys are text");
                let before = all.insert(message.offset(), (key, message.payload().map(<[u8]>::to_vec)));
                assert_eq!(before, None);
            }
        }
    }
}
