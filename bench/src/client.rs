//! The slow path: one request at a time, for topics, offsets and producer ids. Hot paths write their own frames.
//!
//! Runs on the caller's tokio runtime. Does not retry on its own; the few waits here are bounded by name.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_partitions_request::CreatePartitionsTopic;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{
    BrokerId, CreatePartitionsRequest, CreateTopicsRequest, InitProducerIdRequest, ListOffsetsRequest,
    MetadataRequest, RequestHeader, ResponseHeader, TopicName,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const METADATA_VERSION: i16 = 12;
const CREATE_TOPICS_VERSION: i16 = 7;
const CREATE_PARTITIONS_VERSION: i16 = 3;
/// Kafka's controller refuses 10,000 records in one operation, and a partition is one of them.
const PARTITIONS_AT_ONCE: usize = 5_000;
const INIT_PRODUCER_ID_VERSION: i16 = 4;
const LIST_OFFSETS_VERSION: i16 = 7;

/// No honest answer to these requests is larger; a larger length means the peer does not speak Kafka.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// How often a fresh topic is asked for its leaders, 20 ms apart, before the broker is called broken: two minutes, since
/// ten thousand partitions take a while.
const LEADER_TRIES_MAX: u32 = 6_000;
const CREATE_TIMEOUT_MS: i32 = 60_000;
const LEADER_WAIT: Duration = Duration::from_millis(20);

pub const CLIENT_ID: &str = "flumen-bench";
pub const EARLIEST: i64 = -2;
pub const LATEST: i64 = -1;

pub struct Client {
    stream: TcpStream,
    correlation_id: i32,
}

pub fn error_name(code: i16) -> String {
    match ResponseError::try_from_code(code) {
        Some(e) => format!("{code} {e:?}"),
        None => format!("{code}"),
    }
}

/// Between two questions about so many partitions: an answer names them all, and asking must not become the load.
fn leader_wait(partitions: usize) -> Duration {
    LEADER_WAIT.max(Duration::from_micros(50) * partitions as u32)
}

fn topic_name(name: &str) -> TopicName {
    TopicName(StrBytes::from_string(name.to_string()))
}

impl Client {
    pub async fn connect(bootstrap: &str) -> Result<Self> {
        let stream =
            TcpStream::connect(bootstrap).await.with_context(|| format!("cannot connect to {bootstrap}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, correlation_id: 0 })
    }

    /// Sends one frame (length included) and returns the answer without its length.
    pub async fn exchange(&mut self, frame: &[u8]) -> Result<Bytes> {
        self.stream.write_all(frame).await?;
        let len = self.stream.read_i32().await.context("the broker closed the connection")?;
        ensure!((4..=FRAME_BYTES_MAX as i32).contains(&len), "an answer claims {len} bytes");
        let mut body = BytesMut::zeroed(len as usize);
        self.stream.read_exact(&mut body).await?;
        Ok(body.freeze())
    }

    pub async fn call<R: Request>(&mut self, request: &R, version: i16) -> Result<R::Response> {
        self.correlation_id += 1;
        let header = RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.correlation_id)
            .with_client_id(Some(StrBytes::from_static_str(CLIENT_ID)));
        let mut frame = BytesMut::new();
        frame.put_i32(0);
        header.encode(&mut frame, R::header_version(version))?;
        request.encode(&mut frame, version)?;
        crate::wire::finish_frame(&mut frame, 0, 0);
        let mut body = self.exchange(&frame).await?;
        let header = ResponseHeader::decode(&mut body, R::Response::header_version(version))?;
        ensure!(header.correlation_id == self.correlation_id, "answer to another request");
        R::Response::decode(&mut body, version)
    }

    /// Partitions of a topic that have a leader, or `None` when it does not exist.
    async fn led_partitions(&mut self, topic: &str) -> Result<Option<usize>> {
        let request = MetadataRequest::default()
            .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(topic_name(topic)))]))
            .with_allow_auto_topic_creation(false);
        let response = self.call(&request, METADATA_VERSION).await?;
        let Some(t) = response.topics.first() else { return Ok(None) };
        match t.error_code {
            0 => Ok(Some(t.partitions.iter().filter(|p| p.error_code == 0 && p.leader_id.0 >= 0).count())),
            3 => Ok(None),
            // Leaders are still being chosen.
            5 => Ok(Some(0)),
            code => bail!("Metadata for {topic}: {}", error_name(code)),
        }
    }

    /// Creates the topic when it is absent and waits until every partition has a leader.
    pub async fn ensure_topic(
        &mut self,
        topic: &str,
        partitions: usize,
        replication_factor: i16,
        configs: &[(String, String)],
    ) -> Result<()> {
        if self.led_partitions(topic).await?.is_none() {
            let configs = configs
                .iter()
                .map(|(k, v)| {
                    CreatableTopicConfig::default()
                        .with_name(StrBytes::from_string(k.clone()))
                        .with_value(Some(StrBytes::from_string(v.clone())))
                })
                .collect();
            let request = CreateTopicsRequest::default()
                .with_topics(vec![
                    CreatableTopic::default()
                        .with_name(topic_name(topic))
                        .with_num_partitions(partitions.min(PARTITIONS_AT_ONCE) as i32)
                        .with_replication_factor(replication_factor)
                        .with_configs(configs),
                ])
                .with_timeout_ms(CREATE_TIMEOUT_MS);
            let mut tries = 0;
            loop {
                let response = self.call(&request, CREATE_TOPICS_VERSION).await?;
                let t = response.topics.first().context("CreateTopics answered no topic")?;
                match t.error_code {
                    // 36: someone else was faster.
                    0 | 36 => break,
                    // Timed out, no registered broker, no controller: a broker that has only just started.
                    7 | 38 | 41 if tries < LEADER_TRIES_MAX => {
                        tries += 1;
                        tokio::time::sleep(LEADER_WAIT).await;
                    }
                    code => {
                        let why = t.error_message.as_ref().map(|m| m.as_str()).unwrap_or_default();
                        bail!("CreateTopics {topic}: {} {why}", error_name(code));
                    }
                }
            }
        }
        let mut made = partitions.min(PARTITIONS_AT_ONCE);
        loop {
            self.await_leaders(topic, made).await?;
            if made == partitions {
                break;
            }
            made = (made + PARTITIONS_AT_ONCE).min(partitions);
            self.grow_topic(topic, made).await?;
        }
        Ok(())
    }

    /// The brokers' addresses, and the address of each partition's leader.
    pub async fn leaders(&mut self, topic: &str, partitions: usize) -> Result<(Vec<String>, Vec<String>)> {
        let request = MetadataRequest::default()
            .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(topic_name(topic)))]))
            .with_allow_auto_topic_creation(false);
        for _ in 0..LEADER_TRIES_MAX {
            let response = self.call(&request, METADATA_VERSION).await?;
            let address = |id: BrokerId| {
                let broker = response.brokers.iter().find(|b| b.node_id == id)?;
                Some(format!("{}:{}", broker.host.as_str(), broker.port))
            };
            let mut leaders = vec![None; partitions];
            for p in response.topics.iter().flat_map(|t| &t.partitions).filter(|p| p.error_code == 0) {
                if let Some(slot) = usize::try_from(p.partition_index).ok().and_then(|i| leaders.get_mut(i)) {
                    *slot = address(p.leader_id);
                }
            }
            if let Some(leaders) = leaders.into_iter().collect::<Option<Vec<String>>>() {
                let brokers = response.brokers.iter().filter_map(|b| address(b.node_id)).collect();
                return Ok((brokers, leaders));
            }
            tokio::time::sleep(leader_wait(partitions)).await;
        }
        bail!("{topic} has partitions without a leader")
    }

    async fn await_leaders(&mut self, topic: &str, partitions: usize) -> Result<()> {
        for _ in 0..LEADER_TRIES_MAX {
            if self.led_partitions(topic).await?.is_some_and(|led| led >= partitions) {
                return Ok(());
            }
            tokio::time::sleep(leader_wait(partitions)).await;
        }
        bail!("{topic} did not get {partitions} led partitions in time (a topic of another size may exist)")
    }

    async fn grow_topic(&mut self, topic: &str, partitions: usize) -> Result<()> {
        let wanted = CreatePartitionsTopic::default()
            .with_name(topic_name(topic))
            .with_count(partitions as i32)
            .with_assignments(None);
        let request =
            CreatePartitionsRequest::default().with_topics(vec![wanted]).with_timeout_ms(CREATE_TIMEOUT_MS);
        for _ in 0..LEADER_TRIES_MAX {
            let response = self.call(&request, CREATE_PARTITIONS_VERSION).await?;
            let t = response.results.first().context("CreatePartitions answered no topic")?;
            match t.error_code {
                // 37: there are as many already, from a try that had timed out.
                0 | 37 => return Ok(()),
                7 | 38 | 41 => tokio::time::sleep(LEADER_WAIT).await,
                code => bail!("CreatePartitions {topic}: {}", error_name(code)),
            }
        }
        bail!("CreatePartitions {topic}: not in time")
    }

    pub async fn producer_id(&mut self) -> Result<(i64, i16)> {
        let request = InitProducerIdRequest::default()
            .with_transactional_id(None)
            .with_transaction_timeout_ms(60_000)
            .with_producer_id((-1).into())
            .with_producer_epoch(-1);
        for _ in 0..LEADER_TRIES_MAX {
            let r = self.call(&request, INIT_PRODUCER_ID_VERSION).await?;
            match r.error_code {
                0 => return Ok((r.producer_id.0, r.producer_epoch)),
                // Loading, not available, moving: all of a broker that has only just started.
                7 | 14 | 15 | 16 => tokio::time::sleep(LEADER_WAIT).await,
                code => bail!("InitProducerId: {}", error_name(code)),
            }
        }
        bail!("no producer id in time")
    }

    /// The offset of each of these partitions (ascending), which this broker leads, at `at` ([`EARLIEST`] or [`LATEST`]); waits for
    /// leaders that are not ready.
    pub async fn offsets(&mut self, topic: &str, partitions: &[u32], at: i64) -> Result<Vec<i64>> {
        let request = ListOffsetsRequest::default().with_replica_id(BrokerId(-1)).with_topics(vec![
            ListOffsetsTopic::default().with_name(topic_name(topic)).with_partitions(
                partitions
                    .iter()
                    .map(|p| {
                        ListOffsetsPartition::default()
                            .with_partition_index(*p as i32)
                            .with_current_leader_epoch(-1)
                            .with_timestamp(at)
                    })
                    .collect(),
            ),
        ]);
        let mut last = 0;
        for _ in 0..LEADER_TRIES_MAX {
            let r = self.call(&request, LIST_OFFSETS_VERSION).await?;
            let mut out = vec![0; partitions.len()];
            last = 0;
            for p in r.topics.iter().flat_map(|t| &t.partitions) {
                match p.error_code {
                    0 => {}
                    // Unknown yet, no leader yet, leader does not know yet, offset not available yet.
                    3 | 5 | 6 | 78 => last = p.error_code,
                    code => bail!("ListOffsets: {}", error_name(code)),
                }
                // Ascending, as they are asked for.
                if let Ok(at) = partitions.binary_search(&(p.partition_index as u32)) {
                    out[at] = p.offset;
                }
            }
            if last == 0 {
                return Ok(out);
            }
            tokio::time::sleep(leader_wait(partitions.len())).await;
        }
        bail!("ListOffsets of {topic}: {}", error_name(last))
    }
}
