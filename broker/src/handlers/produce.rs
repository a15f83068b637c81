//! Produce: the hot path. Decode without copying, group by home shard, append, answer when durable.
//!
//! Records of one connection reach a partition in the order in which they were sent: partitions of
//! this shard are appended before this function returns, those of other shards travel in one mailbox
//! message, and mailboxes keep order.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::header::RequestHeader;
use flumen_protocol::produce::{
    NodeEndpoint, ProducePartitionResult, ProduceRequest, TopicRef, ZSTD_MIN_VERSION, decode_produce,
    encode_produce_response_with_endpoints,
};
use flumen_protocol::record_batch;
use tokio::sync::oneshot;

use crate::dispatch::{Answer, Finished, Part, RequestError, Waiting};
use crate::handlers::leader_hints::{Hints, tells_leader};
use crate::node::Node;
use crate::partition::{Completion, Origin, ProduceInFlight};
use crate::shard::Shard;

pub type Results = Vec<ProducePartitionResult>;

/// Produce requests of one shard that wait for room in its log, oldest first. Bounded by what connections may have
/// unanswered.
#[derive(Default)]
pub struct ProduceLine {
    waiting: RefCell<VecDeque<InLine>>,
}

struct InLine {
    items: Vec<Item>,
    done: oneshot::Sender<Results>,
}

impl ProduceLine {
    fn is_empty(&self) -> bool {
        self.waiting.borrow().is_empty()
    }

    /// True when it is the first, so that somebody has to let the line in.
    fn push(&self, request: InLine) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        waiting.push_back(request);
        waiting.len() == 1
    }

    fn head<T>(&self, look: impl FnOnce(&InLine) -> T) -> Option<T> {
        self.waiting.borrow().front().map(look)
    }

    fn pop(&self) -> Option<InLine> {
        self.waiting.borrow_mut().pop_front()
    }
}

/// One record batch on its way to its partition.
pub struct Item {
    pub topic: u32,
    pub partition: i32,
    pub group_id: u64,
    /// The client waits for all replicas that must have it, or for the leader alone.
    pub for_all: bool,
    pub records: BytesMut,
}

pub async fn handle(
    shard: &Rc<Shard>,
    header: RequestHeader,
    frame: BytesMut,
) -> Result<Answer, RequestError> {
    let version = header.api_version;
    let frame_bytes = frame.len();
    let request = decode_produce(frame, header.body_offset, version).map_err(|e| {
        RequestError::Malformed { api_key: header.api_key, api_version: version, reason: e.to_string() }
    })?;
    let ProduceRequest { transactional_id, acks, topics, partitions, .. } = request;
    shard.metrics.produced(partitions.len(), frame_bytes);

    let mut failed: Results = Vec::new();
    let mut by_shard: Vec<Vec<Item>> = (0..shard.node.shards.len()).map(|_| Vec::new()).collect();
    {
        let image = shard.node.image.load();
        let resolved: Vec<_> = topics.iter().map(|t| resolve(&image, t)).collect();
        // One transactional batch makes the request transactional, as in Kafka; an id without one does not.
        let transactional = partitions.iter().any(|p| record_batch::starts_transactional(&p.records));
        for partition in partitions {
            let mut refuse = |error, message: Option<&str>| {
                failed.push(result(partition.topic, partition.partition, error, message));
            };
            if transactional && transactional_id.is_none() {
                refuse(ErrorCode::TRANSACTIONAL_ID_AUTHORIZATION_FAILED, None);
                continue;
            }
            if transactional {
                refuse(ErrorCode::INVALID_TXN_STATE, Some("transactions are not served"));
                continue;
            }
            let topic = match &resolved[partition.topic as usize] {
                Ok(topic) => topic,
                Err(error) => {
                    refuse(*error, None);
                    continue;
                }
            };
            let Some(info) = topic.partition(partition.partition) else {
                refuse(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, None);
                continue;
            };
            if topic.internal {
                refuse(
                    ErrorCode::INVALID_TOPIC_EXCEPTION,
                    Some("clients may not write to an internal topic"),
                );
                continue;
            }
            if !matches!(acks, -1..=1) {
                refuse(ErrorCode::INVALID_REQUIRED_ACKS, None);
                continue;
            }
            if version < ZSTD_MIN_VERSION && record_batch::starts_with_zstd(&partition.records) {
                refuse(
                    ErrorCode::UNSUPPORTED_COMPRESSION_TYPE,
                    Some("zstd takes Produce version 7 or later"),
                );
                continue;
            }
            by_shard[shard.node.shard_of(info.group_id)].push(Item {
                topic: partition.topic,
                partition: partition.partition,
                group_id: info.group_id,
                for_all: acks == -1,
                records: partition.records,
            });
        }
    }

    let mut parts = Vec::with_capacity(2);
    if !failed.is_empty() {
        parts.push(Part::Done(failed));
    }
    for (home, items) in by_shard.into_iter().enumerate() {
        if items.is_empty() {
            continue;
        }
        let (done, receiver) = oneshot::channel();
        if home == shard.id {
            append_all(shard, items, done);
        } else {
            shard.metrics.hopped();
            shard.node.shards[home]
                .post(move |target| append_all(target, items, done))
                .await
                .map_err(|_| RequestError::Unanswerable(ErrorCode::NOT_LEADER_OR_FOLLOWER))?;
        }
        parts.push(Part::Pending(receiver));
    }

    let (metrics, node) = (shard.metrics.clone(), shard.node.clone());
    let correlation_id = header.correlation_id;
    let finish = move |parts: Vec<Results>| {
        let mut results: Results = parts.into_iter().flatten().collect();
        let failures = results.iter().filter(|r| r.error != ErrorCode::NONE).count();
        metrics.produce_failures(failures);
        if acks == 0 {
            // Closing is the only way to tell: the client looks at its metadata again.
            return if failures == 0 { Finished::Silent } else { Finished::Close };
        }
        results.sort_by_key(|r| (r.topic, r.partition));
        let mut endpoints = Vec::new();
        if failures > 0 {
            endpoints = name_leaders(&node, &topics, &mut results);
        }
        let answer =
            encode_produce_response_with_endpoints(version, correlation_id, &topics, &results, 0, &endpoints);
        Finished::Send(answer.freeze())
    };
    Ok(Answer::Waiting(Waiting { parts, finish: Box::new(finish) }))
}

fn resolve(
    image: &flumen_metadata::MetadataImage,
    topic: &TopicRef,
) -> Result<std::sync::Arc<flumen_metadata::Topic>, ErrorCode> {
    match topic {
        TopicRef::Name(name) => {
            image.topics.get(&**name).cloned().ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)
        }
        TopicRef::Id(id) => image
            .topic_ids
            .get(id)
            .and_then(|name| image.topics.get(name))
            .cloned()
            .ok_or(ErrorCode::UNKNOWN_TOPIC_ID),
    }
}

/// Says who leads where this broker does not, and returns where those listen.
fn name_leaders(
    node: &Node,
    topics: &[TopicRef],
    results: &mut [ProducePartitionResult],
) -> Vec<NodeEndpoint> {
    let mut hints = Hints::default();
    let image = node.image.load();
    for result in results.iter_mut().filter(|result| tells_leader(result.error)) {
        let topic = resolve(&image, &topics[result.topic as usize]);
        if let Ok(topic) = topic
            && let Some(info) = topic.partition(result.partition)
        {
            result.current_leader = hints.leader_of(node, info.group_id);
        }
    }
    hints.endpoints(node)
}

fn result(topic: u32, partition: i32, error: ErrorCode, message: Option<&str>) -> ProducePartitionResult {
    ProducePartitionResult {
        topic,
        partition,
        error,
        base_offset: -1,
        log_append_time_ms: -1,
        log_start_offset: -1,
        error_message: message.map(Into::into),
        record_errors: Box::default(),
        current_leader: None,
    }
}

/// Appends what belongs to this shard, in order. Where the log takes no more until some of it has moved to segments, the
/// request waits in line, and with it all that come after it: the clients' own limits on unanswered requests slow them
/// down, and none of them sees an error.
pub fn append_all(shard: &Rc<Shard>, items: Vec<Item>, done: oneshot::Sender<Results>) {
    if shard.produce_line.is_empty() && !must_wait(shard, &items) {
        append_now(shard, items, done);
        return;
    }
    if shard.produce_line.push(InLine { items, done }) {
        tokio::task::spawn_local(let_in(shard.clone()));
    }
}

/// How often the head of the line looks whether there is room: a file of the log is free after some ten milliseconds.
const ROOM_POLL: Duration = Duration::from_millis(1);

async fn let_in(shard: Rc<Shard>) {
    while let Some(waits) = shard.produce_line.head(|head| must_wait(&shard, &head.items)) {
        if waits {
            tokio::time::sleep(ROOM_POLL).await;
        } else if let Some(InLine { items, done }) = shard.produce_line.pop() {
            append_now(&shard, items, done);
        }
    }
}

fn must_wait(shard: &Shard, items: &[Item]) -> bool {
    let total = items.iter().map(|item| item.records.len()).sum();
    let largest = items.iter().map(|item| item.records.len()).max().unwrap_or(0);
    // One partition of each durability would do; requests rarely name both.
    items
        .iter()
        .filter_map(|item| shard.partition(item.group_id))
        .any(|p| p.must_wait(total, largest, items.len()))
}

fn append_now(shard: &Rc<Shard>, items: Vec<Item>, done: oneshot::Sender<Results>) {
    let now = shard.node.host.now_ms();
    let results = items.iter().map(|i| result(i.topic, i.partition, ErrorCode::NONE, None)).collect();
    let in_flight = ProduceInFlight::new(results, done);
    for (slot, item) in items.into_iter().enumerate() {
        let Some(partition) = shard.partition(item.group_id) else {
            in_flight.fail(slot, ErrorCode::NOT_LEADER_OR_FOLLOWER, None);
            continue;
        };
        if item.records.is_empty() {
            in_flight.fail(slot, ErrorCode::INVALID_RECORD, Some("no records".into()));
            continue;
        }
        let completion = if item.for_all {
            Completion::Produce(in_flight.clone(), slot)
        } else {
            Completion::ProduceHere(in_flight.clone(), slot)
        };
        match partition.append(item.records, Origin::Client, now, Some(completion)) {
            Ok(appended) => {
                shard.metrics.appended(appended.last_offset - appended.base_offset + 1, appended.duplicate);
                in_flight.set(slot, |r| {
                    r.base_offset = appended.base_offset;
                    r.log_append_time_ms = appended.log_append_time_ms;
                    r.log_start_offset = appended.log_start_offset;
                });
            }
            Err((error, _completion)) => {
                tracing::debug!(topic = %partition.topic, partition = partition.index, %error, "produce refused");
                in_flight.set(slot, |r| {
                    r.record_errors = error.record_errors();
                    if error.tells_log_start() {
                        r.log_start_offset = partition.log_start_offset();
                    }
                });
                in_flight.fail(slot, error.code(), Some(error.to_string().into()));
            }
        }
    }
    in_flight.submitted();
}
