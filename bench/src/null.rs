//! `null`: a broker that frames, counts and acknowledges, and stores nothing. Its cost is the floor that no broker
//! with these sockets and this protocol can go below, and its latency is the noise of the machine.
//!
//! One thread, one task per connection. Fetch serves as many batches as were produced, each a copy of the first one
//! of its partition, without copying it. Input is trusted no further than lengths: a bad frame closes its connection.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use clap::Args;
use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::create_topics_response::CreatableTopicResult;
use kafka_protocol::messages::init_producer_id_response::InitProducerIdResponse;
use kafka_protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{
    ApiKey, ApiVersionsResponse, BrokerId, CreateTopicsRequest, CreateTopicsResponse, InitProducerIdRequest,
    ListOffsetsRequest, ListOffsetsResponse, MetadataRequest, MetadataResponse, ProducerId, RequestHeader,
    ResponseHeader, TopicName,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Message, StrBytes};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::LocalSet;

use crate::batch;
use crate::load::poll_read;
use crate::outbox::Outbox;
use crate::wire::{self, Reader};

const READ_BYTES: usize = 256 << 10;
/// Kafka's own default bound (`socket.request.max.bytes`).
const FRAME_BYTES_MAX: i32 = 100 << 20;
const FETCH_VERSION_MAX: i16 = 12;

#[derive(Debug, Clone, Args)]
pub struct NullConfig {
    #[arg(long, default_value = "127.0.0.1:9092")]
    pub listen: String,
    /// Partitions of a topic that nobody created.
    #[arg(long, default_value_t = 100)]
    pub partitions: usize,
}

#[derive(Default, Clone)]
struct Partition {
    end: i64,
    /// First batch produced, served for every later one.
    template: Option<(Bytes, i64)>,
}

struct State {
    host: String,
    port: i32,
    partitions_default: usize,
    topics: BTreeMap<Bytes, Vec<Partition>>,
    producer_ids: i64,
    produced: Rc<Notify>,
}

impl State {
    fn topic(&mut self, name: &[u8]) -> &mut Vec<Partition> {
        if !self.topics.contains_key(name) {
            let fresh = vec![Partition::default(); self.partitions_default];
            self.topics.insert(Bytes::copy_from_slice(name), fresh);
        }
        self.topics.get_mut(name).expect("just inserted")
    }
}

pub fn run(config: &NullConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind(&config.listen).await.context(config.listen.clone())?;
        let address = listener.local_addr()?;
        println!("null ready kafka={address}");
        let state = Rc::new(RefCell::new(State {
            host: address.ip().to_string(),
            port: i32::from(address.port()),
            partitions_default: config.partitions,
            topics: BTreeMap::new(),
            producer_ids: 0,
            produced: Rc::new(Notify::new()),
        }));
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let state = state.clone();
            tokio::task::spawn_local(async move {
                if let Err(e) = serve(stream, state).await {
                    eprintln!("null: connection closed: {e:#}");
                }
            });
        }
    })
}

async fn serve(mut stream: TcpStream, state: Rc<RefCell<State>>) -> Result<()> {
    let mut input = BytesMut::with_capacity(READ_BYTES);
    let mut out = Outbox::default();
    loop {
        let n = poll_fn(|cx| {
            if let Poll::Ready(Err(e)) = out.poll_flush(cx, &mut stream) {
                return Poll::Ready(Err(e));
            }
            input.reserve(READ_BYTES);
            poll_read(&mut stream, cx, &mut input)
        })
        .await?;
        if n == 0 {
            return Ok(());
        }
        while let Some(prefix) = input.first_chunk::<4>() {
            let len = i32::from_be_bytes(*prefix);
            ensure!((8..=FRAME_BYTES_MAX).contains(&len), "a frame claims {len} bytes");
            let whole = 4 + len as usize;
            if input.len() < whole {
                input.reserve(whole - input.len());
                break;
            }
            let key = i16::from_be_bytes([input[4], input[5]]);
            if key == wire::FETCH {
                let frame = input.split_to(whole).freeze().slice(4..);
                fetch(&frame, &mut out, &state).await?;
            } else {
                if key == wire::PRODUCE {
                    produce(&input[4..whole], &mut out, &mut state.borrow_mut())?;
                } else {
                    other(&input[4..whole], &mut out, &mut state.borrow_mut())?;
                }
                input.advance(whole);
            }
        }
    }
}

/// Any version: 3 to 8 (plain), 9 to 12 (compact), 13 (compact, topic id instead of name).
fn produce(frame: &[u8], out: &mut Outbox, state: &mut State) -> Result<()> {
    let mut r = Reader(frame);
    r.i16()?;
    let version = r.i16()?;
    let correlation_id = r.i32()?;
    r.bytes_i16()?;
    let flexible = version >= wire::PRODUCE_FLEXIBLE;
    if flexible {
        r.tags()?;
        r.compact_bytes()?;
    } else if version >= 3 {
        r.bytes_i16()?;
    }
    let acks = r.i16()?;
    r.i32()?;
    out.seal();
    let buf = &mut out.scratch;
    buf.put_i32(0);
    buf.put_i32(correlation_id);
    let count = |r: &mut Reader, flexible: bool| -> Result<usize> {
        if flexible { Ok(r.compact_len()?.unwrap_or(0)) } else { Ok(r.i32()?.max(0) as usize) }
    };
    let put_count = |buf: &mut BytesMut, n: usize| {
        if flexible { wire::put_uvarint(buf, n as u32 + 1) } else { buf.put_i32(n as i32) }
    };
    if flexible {
        buf.put_u8(0);
    }
    let topics = count(&mut r, flexible)?;
    put_count(buf, topics);
    for _ in 0..topics {
        let name = if version >= 13 {
            let id = r.take(16)?;
            buf.put_slice(id);
            id
        } else if flexible {
            let name = r.compact_bytes()?.context("no topic name")?;
            wire::put_uvarint(buf, name.len() as u32 + 1);
            buf.put_slice(name);
            name
        } else {
            let name = r.bytes_i16()?.context("no topic name")?;
            buf.put_i16(name.len() as i16);
            buf.put_slice(name);
            name
        };
        let known = state.topic(name);
        let partitions = count(&mut r, flexible)?;
        put_count(buf, partitions);
        for _ in 0..partitions {
            let index = r.i32()?;
            let records = if flexible { r.compact_bytes()? } else { r.bytes_i32()? };
            let records = records.unwrap_or_default();
            if flexible {
                r.tags()?;
            }
            let mut base = 0;
            if let Some(p) = usize::try_from(index).ok().and_then(|i| known.get_mut(i)) {
                base = p.end;
                if let Some(h) = batch::header(records) {
                    if p.template.is_none() && h.total_bytes <= records.len() {
                        p.template = Some((Bytes::copy_from_slice(&records[..h.total_bytes]), h.records));
                    }
                    p.end += h.records;
                }
            }
            buf.put_i32(index);
            buf.put_i16(0);
            buf.put_i64(base);
            if version >= 2 {
                buf.put_i64(-1);
            }
            if version >= 5 {
                buf.put_i64(0);
            }
            if version >= 8 {
                put_count(buf, 0);
                if flexible { buf.put_u8(0) } else { buf.put_i16(-1) }
            }
            if flexible {
                buf.put_u8(0);
            }
        }
        if flexible {
            r.tags()?;
            buf.put_u8(0);
        }
    }
    if version >= 1 {
        buf.put_i32(0);
    }
    if flexible {
        buf.put_u8(0);
    }
    if acks == 0 {
        buf.clear();
    } else {
        wire::finish_frame(buf, 0, 0);
        out.seal();
    }
    state.produced.notify_waiters();
    Ok(())
}

struct Wanted {
    topic: Bytes,
    partition: i32,
    offset: i64,
    bytes: i32,
}

async fn fetch(frame: &Bytes, out: &mut Outbox, state: &RefCell<State>) -> Result<()> {
    let mut r = Reader(frame);
    r.i16()?;
    let version = r.i16()?;
    ensure!(version == FETCH_VERSION_MAX, "the null broker fetches at version {FETCH_VERSION_MAX} only");
    let correlation_id = r.i32()?;
    r.bytes_i16()?;
    r.tags()?;
    r.i32()?;
    let max_wait_ms = r.i32()?.max(0) as u64;
    let min_bytes = r.i32()?;
    let max_bytes = r.i32()?;
    r.take(1 + 4 + 4)?;
    let mut wanted = Vec::new();
    for _ in 0..r.compact_len()?.unwrap_or(0) {
        let topic = Bytes::copy_from_slice(r.compact_bytes()?.context("no topic name")?);
        for _ in 0..r.compact_len()?.unwrap_or(0) {
            let partition = r.i32()?;
            r.i32()?;
            let offset = r.i64()?;
            r.take(4 + 8)?;
            let bytes = r.i32()?;
            r.tags()?;
            wanted.push(Wanted { topic: topic.clone(), partition, offset, bytes });
        }
        r.tags()?;
    }
    let produced = state.borrow().produced.clone();
    if min_bytes > 0 && max_wait_ms > 0 {
        let any = || {
            let state = state.borrow();
            wanted.iter().any(|w| {
                state
                    .topics
                    .get(&w.topic)
                    .and_then(|t| t.get(w.partition as usize))
                    .is_some_and(|p| p.end > w.offset)
            })
        };
        let news = async {
            while !any() {
                produced.notified().await;
            }
        };
        // A time-out is the ordinary end of a long poll.
        let _ = tokio::time::timeout(Duration::from_millis(max_wait_ms), news).await;
    }
    answer_fetch(correlation_id, &wanted, max_bytes, out, &state.borrow());
    Ok(())
}

fn answer_fetch(correlation_id: i32, wanted: &[Wanted], max_bytes: i32, out: &mut Outbox, state: &State) {
    out.seal();
    let mut budget = max_bytes as usize;
    // The frame's length is known only at the end, so its pieces are built apart and queued together.
    let mut pieces: Vec<Bytes> = Vec::new();
    let mut buf = BytesMut::new();
    buf.put_i32(0);
    buf.put_i32(correlation_id);
    buf.put_u8(0);
    buf.put_i32(0);
    buf.put_i16(0);
    buf.put_i32(0);
    let mut groups: Vec<&[Wanted]> = wanted.chunk_by(|a, b| a.topic == b.topic).collect();
    groups.retain(|g| !g.is_empty());
    wire::put_uvarint(&mut buf, groups.len() as u32 + 1);
    for group in groups {
        let topic = &group[0].topic;
        wire::put_uvarint(&mut buf, topic.len() as u32 + 1);
        buf.put_slice(topic);
        wire::put_uvarint(&mut buf, group.len() as u32 + 1);
        for w in group {
            let p = usize::try_from(w.partition).ok().and_then(|i| state.topics.get(topic)?.get(i));
            let end = p.map_or(0, |p| p.end);
            let mut take = 0;
            if let Some((template, records)) = p.and_then(|p| p.template.as_ref()) {
                let limit = budget.min(w.bytes.max(0) as usize);
                take = (limit / template.len()).min(((end - w.offset).max(0) / records) as usize);
                budget -= take * template.len();
            }
            buf.put_i32(w.partition);
            buf.put_i16(if p.is_some() { 0 } else { 3 });
            buf.put_i64(end);
            buf.put_i64(end);
            buf.put_i64(0);
            wire::put_uvarint(&mut buf, 1);
            buf.put_i32(-1);
            let template = p.and_then(|p| p.template.as_ref()).filter(|_| take > 0);
            wire::put_uvarint(&mut buf, template.map_or(0, |(t, _)| t.len() * take) as u32 + 1);
            if let Some((template, records)) = template {
                for i in 0..take as i64 {
                    buf.put_i64(w.offset + i * records);
                    pieces.push(buf.split().freeze());
                    pieces.push(template.slice(8..));
                }
            }
            buf.put_u8(0);
        }
        buf.put_u8(0);
    }
    buf.put_u8(0);
    let total: usize = pieces.iter().map(Bytes::len).sum::<usize>() + buf.len();
    let length = ((total - 4) as i32).to_be_bytes();
    match pieces.first_mut() {
        None => buf[..4].copy_from_slice(&length),
        Some(first) => {
            let mut head = BytesMut::from(&first[..]);
            head[..4].copy_from_slice(&length);
            *first = head.freeze();
        }
    }
    for piece in &pieces {
        out.payload(piece);
    }
    out.scratch.extend_from_slice(&buf);
    out.seal();
}

fn other(frame: &[u8], out: &mut Outbox, state: &mut State) -> Result<()> {
    let mut body = Bytes::copy_from_slice(frame);
    let key = ApiKey::try_from(i16::from_be_bytes([frame[0], frame[1]]))
        .map_err(|()| anyhow::anyhow!("unknown API key"))?;
    let version = i16::from_be_bytes([frame[2], frame[3]]);
    let header = RequestHeader::decode(&mut body, key.request_header_version(version))?;
    let correlation_id = header.correlation_id;
    match key {
        ApiKey::ApiVersions => {
            let (version, code) = if version > 4 { (0, 35) } else { (version, 0) };
            let api = |key: ApiKey, min: i16, max: i16| {
                ApiVersion::default().with_api_key(key as i16).with_min_version(min).with_max_version(max)
            };
            let response = ApiVersionsResponse::default().with_error_code(code).with_api_keys(vec![
                api(ApiKey::Produce, 0, 12),
                api(ApiKey::Fetch, FETCH_VERSION_MAX, FETCH_VERSION_MAX),
                api(ApiKey::ListOffsets, 1, ListOffsetsRequest::VERSIONS.max),
                api(ApiKey::Metadata, 0, MetadataRequest::VERSIONS.max),
                api(ApiKey::ApiVersions, 0, 4),
                api(ApiKey::CreateTopics, 2, CreateTopicsRequest::VERSIONS.max),
                api(ApiKey::InitProducerId, 0, 5),
            ]);
            answer(out, correlation_id, version, &response)
        }
        ApiKey::Metadata => {
            let request = MetadataRequest::decode(&mut body, version)?;
            let names: Vec<StrBytes> = match request.topics {
                Some(topics) => topics.into_iter().filter_map(|t| t.name.map(|n| n.0)).collect(),
                None => state
                    .topics
                    .keys()
                    .filter_map(|k| std::str::from_utf8(k).ok())
                    .map(|k| StrBytes::from_string(k.to_string()))
                    .collect(),
            };
            let topics = names
                .into_iter()
                .map(|name| {
                    // Only CreateTopics and Produce make a topic, so that the creator chooses its partitions.
                    let count = state.topics.get(name.as_bytes()).map(Vec::len);
                    MetadataResponseTopic::default()
                        .with_error_code(if count.is_some() { 0 } else { 3 })
                        .with_name(Some(TopicName(name)))
                        .with_partitions(
                            (0..count.unwrap_or(0) as i32)
                                .map(|p| {
                                    MetadataResponsePartition::default()
                                        .with_partition_index(p)
                                        .with_leader_id(BrokerId(1))
                                        .with_leader_epoch(0)
                                        .with_replica_nodes(vec![BrokerId(1)])
                                        .with_isr_nodes(vec![BrokerId(1)])
                                })
                                .collect(),
                        )
                })
                .collect();
            let response = MetadataResponse::default()
                .with_brokers(vec![
                    MetadataResponseBroker::default()
                        .with_node_id(BrokerId(1))
                        .with_host(StrBytes::from_string(state.host.clone()))
                        .with_port(state.port),
                ])
                .with_controller_id(BrokerId(1))
                .with_topics(topics);
            answer(out, correlation_id, version, &response)
        }
        ApiKey::CreateTopics => {
            let request = CreateTopicsRequest::decode(&mut body, version)?;
            let mut results = Vec::new();
            for t in request.topics {
                let count =
                    if t.num_partitions > 0 { t.num_partitions as usize } else { state.partitions_default };
                state
                    .topics
                    .entry(Bytes::copy_from_slice(t.name.0.as_bytes()))
                    .or_insert_with(|| vec![Partition::default(); count]);
                results.push(
                    CreatableTopicResult::default()
                        .with_name(t.name)
                        .with_num_partitions(count as i32)
                        .with_replication_factor(1),
                );
            }
            answer(out, correlation_id, version, &CreateTopicsResponse::default().with_topics(results))
        }
        ApiKey::InitProducerId => {
            InitProducerIdRequest::decode(&mut body, version)?;
            state.producer_ids += 1;
            let response = InitProducerIdResponse::default()
                .with_producer_id(ProducerId(state.producer_ids))
                .with_producer_epoch(0);
            answer(out, correlation_id, version, &response)
        }
        ApiKey::ListOffsets => {
            let request = ListOffsetsRequest::decode(&mut body, version)?;
            let topics = request
                .topics
                .into_iter()
                .map(|t| {
                    let known = state.topics.get(t.name.0.as_bytes());
                    let partitions = t
                        .partitions
                        .iter()
                        .map(|p| {
                            let end =
                                known.and_then(|k| k.get(p.partition_index as usize)).map_or(0, |p| p.end);
                            ListOffsetsPartitionResponse::default()
                                .with_partition_index(p.partition_index)
                                .with_offset(if p.timestamp == crate::client::EARLIEST { 0 } else { end })
                                .with_timestamp(-1)
                        })
                        .collect();
                    ListOffsetsTopicResponse::default().with_name(t.name).with_partitions(partitions)
                })
                .collect();
            answer(out, correlation_id, version, &ListOffsetsResponse::default().with_topics(topics))
        }
        key => bail!("the null broker does not serve {key:?}"),
    }
}

fn answer<R: Encodable + HeaderVersion>(
    out: &mut Outbox,
    correlation_id: i32,
    version: i16,
    response: &R,
) -> Result<()> {
    out.seal();
    let buf = &mut out.scratch;
    buf.put_i32(0);
    ResponseHeader::default().with_correlation_id(correlation_id).encode(buf, R::header_version(version))?;
    response.encode(buf, version)?;
    wire::finish_frame(buf, 0, 0);
    out.seal();
    Ok(())
}
