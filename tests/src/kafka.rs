//! The Kafka side of a test: a producer that remembers what was acknowledged, a reader of whole topics, Kafka's own tools.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, Headers, Message};
use rdkafka::producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};

use crate::process::repository;

/// Partition and offset, as acknowledged.
pub type Place = (i32, i64);

/// What came back of records that were sent, by the number that the test gave them.
#[derive(Default)]
pub struct Reports {
    pub places: BTreeMap<Place, u64>,
    /// The error and the number of each record that was refused for good.
    pub failed: Vec<(String, u64)>,
}

#[derive(Clone, Default)]
struct Delivery(Arc<Mutex<Reports>>);

impl ClientContext for Delivery {}

impl ProducerContext for Delivery {
    type DeliveryOpaque = Box<u64>;

    fn delivery(&self, result: &DeliveryResult<'_>, number: Self::DeliveryOpaque) {
        let mut reports = self.0.lock().expect("no panic under this lock");
        match result {
            Ok(message) => {
                let before = reports.places.insert((message.partition(), message.offset()), *number);
                assert_eq!(before, None, "two records were acknowledged at one offset");
            }
            Err((error, _)) => reports.failed.push((error.to_string(), *number)),
        }
    }
}

/// The configuration of an idempotent producer; of two settings with one name the later one holds.
pub(crate) fn idempotent(kafka: &str, settings: &[(&str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", kafka).set("enable.idempotence", "true");
    for (key, value) in settings {
        config.set(*key, *value);
    }
    config
}

/// An idempotent producer for one topic, whose retries outlast whatever a test does to the broker.
pub struct Sender {
    producer: ThreadedProducer<Delivery>,
    reports: Delivery,
    sent: u64,
}

impl Sender {
    pub fn new(kafka: &str, settings: &[(&str, &str)]) -> anyhow::Result<Sender> {
        let reports = Delivery::default();
        let usual = [
            ("linger.ms", "5"),
            ("message.timeout.ms", "600000"),
            ("reconnect.backoff.max.ms", "200"),
            ("retry.backoff.max.ms", "200"),
            ("queue.buffering.max.messages", "1000000"),
        ];
        let config = idempotent(kafka, &[&usual, settings].concat());
        Ok(Sender { producer: config.create_with_context(reports.clone())?, reports, sent: 0 })
    }

    /// Hands a record over; a full local queue is waited for.
    pub fn send(&mut self, topic: &str, key: &str, value: &[u8], number: u64) -> anyhow::Result<()> {
        let mut record = BaseRecord::with_opaque_to(topic, Box::new(number)).key(key).payload(value);
        loop {
            match self.producer.send(record) {
                Ok(()) => break,
                Err((error, back)) if error.rdkafka_error_code().is_some_and(is_full) => {
                    record = back;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err((error, _)) => bail!("cannot send: {error}"),
            }
        }
        self.sent += 1;
        Ok(())
    }

    /// Waits until everything sent is acknowledged or refused.
    pub fn flush(&self) -> anyhow::Result<()> {
        self.producer.flush(Duration::from_secs(600)).context("records were not acknowledged")
    }

    /// What `reports` locks, for whoever looks while somebody else sends.
    pub fn shared_reports(&self) -> Arc<Mutex<Reports>> {
        self.reports.0.clone()
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    pub fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.0.lock().expect("no panic under this lock")
    }
}

fn is_unreachable(code: rdkafka::types::RDKafkaErrorCode) -> bool {
    use rdkafka::types::RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure};
    matches!(code, AllBrokersDown | BrokerTransportFailure)
}

fn is_timed_out(error: &rdkafka::error::KafkaError) -> bool {
    error.rdkafka_error_code() == Some(rdkafka::types::RDKafkaErrorCode::OperationTimedOut)
}

/// What librdkafka says where no leader is named, or one that it cannot reach or that leads no more.
fn is_leaderless(code: rdkafka::types::RDKafkaErrorCode) -> bool {
    use rdkafka::types::RDKafkaErrorCode::{LeaderNotAvailable, NotLeaderForPartition, UnknownPartition};
    is_unreachable(code) || matches!(code, LeaderNotAvailable | NotLeaderForPartition | UnknownPartition)
}

fn is_full(code: rdkafka::types::RDKafkaErrorCode) -> bool {
    code == rdkafka::types::RDKafkaErrorCode::QueueFull
}

pub struct Record {
    pub place: Place,
    pub value: Vec<u8>,
    pub headers: BTreeMap<String, String>,
}

/// How often whoever is told that nobody leads a partition asks again: after a fault that is so for as long as an election and a
/// connection take. A topic that does not exist ends it.
const QUESTIONS_MAX: usize = 600;
const QUESTION_INTERVAL: Duration = Duration::from_millis(100);

/// Log start offset and high watermark of a partition, as its leader tells them.
fn watermarks(kafka: &str, topic: &str, partition: i32) -> anyhow::Result<(i64, i64)> {
    let mut asked = 0;
    loop {
        // A client that once heard of no leader answers this question from memory.
        let client: BaseConsumer = ClientConfig::new().set("bootstrap.servers", kafka).create()?;
        asked += 1;
        match client.fetch_watermarks(topic, partition, Duration::from_secs(10)) {
            Err(error) if asked < QUESTIONS_MAX && error.rdkafka_error_code().is_some_and(is_leaderless) => {}
            // It stays with a leader that it was told of, however long that one has been gone.
            Err(error) if asked < QUESTIONS_MAX && is_timed_out(&error) => {
                println!("   still waiting for the leader of {topic}/{partition}");
            }
            outcome => return Ok(outcome?),
        }
        std::thread::sleep(QUESTION_INTERVAL);
    }
}

/// High watermarks of a topic's partitions, as their leaders tell them.
pub fn ends_of(kafka: &str, topic: &str, partitions: i32) -> anyhow::Result<Vec<i64>> {
    (0..partitions).map(|partition| Ok(watermarks(kafka, topic, partition)?.1)).collect()
}

/// Every record of a topic up to these ends, one per partition, from the start of its log.
pub fn read_all(kafka: &str, topic: &str, ends: &[i64]) -> anyhow::Result<Vec<Record>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("check.crcs", "true")
        .create()?;
    let mut list = TopicPartitionList::new();
    let mut missing = 0;
    for (partition, end) in (0..).zip(ends) {
        let (start, _) = watermarks(kafka, topic, partition)?;
        missing += end - start;
        list.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&list)?;
    let mut all = Vec::new();
    while missing > 0 {
        let Some(message) = consumer.poll(Duration::from_secs(1)) else { continue };
        // One of several brokers may be away; the client asks the others.
        if message.as_ref().is_err_and(|e| e.rdkafka_error_code().is_some_and(is_unreachable)) {
            continue;
        }
        let message = message?;
        let headers = message.headers().map(|headers| {
            let text = |v: Option<&[u8]>| String::from_utf8_lossy(v.unwrap_or_default()).into_owned();
            headers.iter().map(|h| (h.key.to_string(), text(h.value))).collect()
        });
        all.push(Record {
            place: (message.partition(), message.offset()),
            value: message.payload().unwrap_or_default().to_vec(),
            headers: headers.unwrap_or_default(),
        });
        missing -= 1;
    }
    Ok(all)
}

/// What a reader gets of a topic between these offsets, one pair per partition; offsets may be missing, as they are after
/// compaction. Records that are there must be there now.
pub fn read_between(kafka: &str, topic: &str, from: &[i64], ends: &[i64]) -> anyhow::Result<Vec<Record>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("check.crcs", "true")
        .create()?;
    let mut list = TopicPartitionList::new();
    let mut left = std::collections::BTreeSet::new();
    for (partition, (from, end)) in (0..).zip(from.iter().zip(ends)) {
        if from < end {
            list.add_partition_offset(topic, partition, Offset::Offset(*from))?;
            left.insert(partition);
        }
    }
    consumer.assign(&list)?;
    let mut all = Vec::new();
    while !left.is_empty() {
        match consumer.poll(Duration::from_secs(1)) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(partition))) => drop(left.remove(&partition)),
            Some(message) => {
                let message = message?;
                let (partition, offset) = (message.partition(), message.offset());
                let end = ends[usize::try_from(partition)?];
                if offset < end {
                    let value = message.payload().unwrap_or_default().to_vec();
                    all.push(Record { place: (partition, offset), value, headers: BTreeMap::new() });
                }
                if offset + 1 >= end {
                    left.remove(&partition);
                }
            }
        }
    }
    Ok(all)
}

/// Whether Kafka's Java tools can run here; says so if not.
pub fn java_tools() -> bool {
    let found = |program: &str| -> Option<PathBuf> {
        std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(program)).find(|p| p.is_file())
    };
    let there = found("java").is_some() && found("mvn").is_some();
    if !there {
        println!("no Java and Maven here: Kafka's own tools were not run");
    }
    there
}

/// Runs one of Kafka's tools; its exit status and everything that it printed.
pub fn kafka_tool(class: &str, arguments: &[&str]) -> anyhow::Result<(bool, String)> {
    let script = repository().join("bench/kafka-tool.sh");
    let output = Command::new("bash").arg(script).arg(class).args(arguments).output()?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.success(), text))
}

/// One call of `clients/admin.py`, which is librdkafka's admin client; what it printed.
pub fn librdkafka_admin(kafka: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let python = repository().join(".cache/venv/bin/python");
    let script = repository().join("tests/clients/admin.py");
    let output = Command::new(&python)
        .arg(script)
        .arg(kafka)
        .args(arguments)
        .output()
        .with_context(|| format!("{} cannot be run; run `make setup`", python.display()))?;
    if !output.status.success() {
        bail!("admin.py {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}
