//! Single situations of the Kafka protocol, each asked in every version that carries it: unknown topics and ids, bad names,
//! offsets out of range, bad acknowledgements, empty and null arrays, duplicates in a request.
//!
//! A probe sends one request (or a short exchange) over a connection of its own and keeps the decoded answer. The same
//! probes go to Flumen and to Apache Kafka: `tests/versions.rs` compares the error codes with a table recorded from
//! Kafka, `conformance/differential.sh` compares whole answers of two running brokers; `conformance/differential.expected.tsv`
//! names where they may differ.
//!
//! Probes depend only on what [`Bed::lay`] made and on each other's order within one run.

pub mod cluster;
pub mod configs;
pub mod fetching;
pub mod groups;
pub mod offsets;
pub mod operations;
pub mod producing;
pub mod topics;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use flumen_protocol::record::BatchBuilder;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{CreateTopicsRequest, MetadataRequest};
use kafka_protocol::protocol::Request;
use uuid::Uuid;

use crate::wire::{NoAnswer, Wire, batch, produce, text, topic_name};

/// A topic id that no topic has.
pub const NOBODY: Uuid = Uuid::from_u128(0xdead_beef_0000_4000_8000_0000_0000_0001);
/// Records that the bed puts into partition 0 of `plain`, in batches of three.
pub const PLAIN_RECORDS: i64 = 9;
/// When those records were made: far from every clock, so that answers are the same on every run.
pub const PLAIN_TIMESTAMP: i64 = 1_600_000_000_000;

type Run = Box<dyn Fn(&mut Bed, i16) -> anyhow::Result<String>>;

pub struct Probe {
    pub name: String,
    pub versions: (i16, i16),
    run: Run,
}

/// All probes, in the order in which they run.
pub fn all() -> Vec<Probe> {
    let mut probes = Probes(Vec::new());
    producing::add(&mut probes);
    fetching::add(&mut probes);
    offsets::add(&mut probes);
    cluster::add(&mut probes);
    topics::add(&mut probes);
    configs::add(&mut probes);
    groups::add(&mut probes);
    operations::add(&mut probes);
    probes.0
}

pub struct Probes(Vec<Probe>);

impl Probes {
    /// One request, built for each version.
    pub fn one<Q>(&mut self, name: &str, versions: (i16, i16), build: impl Fn(&Bed, i16) -> Q + 'static)
    where
        Q: Request,
        Q::Response: Debug,
    {
        self.exchange(name, versions, move |bed, version| {
            let request = build(bed, version);
            bed.ask(version, &request)
        });
    }

    /// Several requests; what is returned is compared.
    pub fn exchange(
        &mut self,
        name: &str,
        versions: (i16, i16),
        run: impl Fn(&mut Bed, i16) -> anyhow::Result<String> + 'static,
    ) {
        self.0.push(Probe { name: name.to_string(), versions, run: Box::new(run) });
    }
}

impl Probe {
    pub fn run(&self, bed: &mut Bed, version: i16) -> anyhow::Result<String> {
        match (self.run)(bed, version) {
            Err(e) if e.is::<NoAnswer>() => Ok(NoAnswer.to_string()),
            outcome => outcome.with_context(|| format!("{} v{version}", self.name)),
        }
    }
}

/// The topics that probes ask about.
pub struct Bed {
    pub address: String,
    pub ids: BTreeMap<String, Uuid>,
    /// Leader epoch of partitions that were never moved: 0 with Kafka, 1 here.
    pub epoch: i32,
    /// How long an answer may take before the probe is said to have none. Kafka leaves some requests unanswered.
    pub patience: Option<Duration>,
}

impl Bed {
    pub fn lay(address: &str, patience: Option<Duration>) -> anyhow::Result<Bed> {
        let mut bed = Bed { address: address.to_string(), ids: BTreeMap::new(), epoch: 0, patience };
        for (name, partitions, configs) in [
            // Its records are of a time that retention would not keep.
            ("plain", 3, &[("retention.ms", "-1")][..]),
            ("empty", 1, &[]),
            ("compacted", 1, &[("cleanup.policy", "compact")]),
            ("small", 1, &[("max.message.bytes", "1000")]),
            ("timed", 1, &[("message.timestamp.before.max.ms", "3600000")]),
            ("poisoned", 1, &[]),
            ("stamped", 1, &[("message.timestamp.type", "LogAppendTime")]),
            ("idempotent", 20, &[]),
            ("trimmed", 1, &[("retention.ms", "-1")]),
            ("dotted.name", 1, &[]),
        ] {
            bed.create(name, partitions, configs)?;
        }
        let mut wire = Wire::connect(address)?;
        for topic in ["plain", "trimmed"] {
            for at in 0..PLAIN_RECORDS / 3 {
                let mut builder = BatchBuilder::new();
                for i in 0..3 {
                    let stamp = PLAIN_TIMESTAMP + (at * 3 + i) * 1000;
                    builder.append(stamp, Some(b"key"), Some(b"value"), &[]);
                }
                let records = builder.build(0).freeze();
                // The leader of a new topic may take a moment.
                loop {
                    let answer = wire.ask(9, &produce(topic, 0, -1, Some(records.clone())))?;
                    match answer.responses[0].partition_responses[0].error_code {
                        0 => break,
                        3 | 5 | 6 => std::thread::yield_now(),
                        code => bail!("cannot fill {topic}: {code}"),
                    }
                }
            }
        }
        Ok(bed)
    }

    pub fn create(&mut self, name: &str, partitions: i32, configs: &[(&str, &str)]) -> anyhow::Result<()> {
        let configs = configs
            .iter()
            .map(|(k, v)| CreatableTopicConfig::default().with_name(text(k)).with_value(Some(text(v))))
            .collect();
        let request = CreateTopicsRequest::default().with_timeout_ms(30_000).with_topics(vec![
            CreatableTopic::default()
                .with_name(topic_name(name))
                .with_num_partitions(partitions)
                .with_replication_factor(1)
                .with_configs(configs),
        ]);
        let mut wire = Wire::connect(&self.address)?;
        let answer = wire.ask(5, &request)?;
        match answer.topics[0].error_code {
            0 => {}
            code => bail!("cannot create {name}: {code}"),
        }
        let ask = MetadataRequest::default()
            .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(topic_name(name)))]));
        loop {
            let found = wire.ask(12, &ask)?.topics.remove(0);
            if found.error_code == 0 && found.partitions.iter().all(|p| p.error_code == 0) {
                self.ids.insert(name.to_string(), found.topic_id);
                self.epoch = found.partitions[0].leader_epoch;
                return Ok(());
            }
            std::thread::yield_now();
        }
    }

    pub fn id(&self, topic: &str) -> Uuid {
        self.ids.get(topic).copied().unwrap_or(NOBODY)
    }

    /// The decoded answer, or `closed` when the broker ended the connection instead.
    pub fn ask<Q>(&mut self, version: i16, request: &Q) -> anyhow::Result<String>
    where
        Q: Request,
        Q::Response: Debug,
    {
        let mut wire = self.wire()?;
        wire.send(version, request)?;
        shown::<Q>(&mut wire, version)
    }

    pub fn wire(&self) -> anyhow::Result<Wire> {
        let mut wire = Wire::connect(&self.address)?;
        wire.set_patience(self.patience)?;
        Ok(wire)
    }
}

/// The answer to what was sent, as text.
pub fn shown<Q>(wire: &mut Wire, version: i16) -> anyhow::Result<String>
where
    Q: Request,
    Q::Response: Debug,
{
    Ok(match wire.receive_or_closed::<Q>(version)? {
        Some(answer) => format!("{answer:#?}"),
        None => "closed".to_string(),
    })
}

/// Every error code of an answer, in its order; `closed` for none at all.
pub fn codes(answer: &str) -> String {
    if answer == "closed" || answer == NoAnswer.to_string() {
        return answer.to_string();
    }
    let codes: Vec<&str> = answer
        .lines()
        .filter_map(|line| line.trim().strip_prefix("error_code: ")?.strip_suffix(','))
        .collect();
    if codes.is_empty() { "-".to_string() } else { codes.join(" ") }
}

/// Three records without keys, made now.
pub fn three() -> Bytes {
    batch(&["a", "b", "c"], |_| {})
}
