//! Fetch: read what is committed, or wait for it. Records are never copied: the answer is a list of
//! slices that the writer hands to the kernel.
//!
//! Clients read from leaders. One that names its rack (KIP-392) is sent to a replica in it, where it then reads up to the high
//! watermark that this one knows; nobody else may read from a follower. Whoever is sent away hears who leads (KIP-951).
//!
//! Sessions are refused by answering session id 0, so every fetch is a full one.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_metadata::{CompressionType, NodeState};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::fetch::{
    FetchPartitionData, FetchTopicData, ZSTD_MIN_VERSION, encode_fetch_response,
    encode_fetch_response_with_endpoints,
};
use flumen_protocol::produce::TopicRef;
use kafka_protocol::messages::FetchRequest;
use tokio::time::Instant;

use crate::dispatch::{Answer, Request, RequestError};
use crate::handlers::leader_hints::{Hints, tells_leader};
use crate::node::Node;
use crate::partition::{DataWaiter, FetchError, Reading};
use crate::shard::Shard;

/// A client may ask to wait for days; the connection's other requests wait with it.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// Bytes of records in one answer, whatever the client asks for (Kafka's fetch.max.bytes of the broker).
const RESPONSE_BYTES_MAX: usize = 55 << 20;

#[derive(Clone, Copy)]
struct Item {
    slot: usize,
    group_id: u64,
    offset: i64,
    max_bytes: usize,
    leader_epoch: i32,
}

/// Where a client is, as far as it says.
#[derive(Clone)]
struct Reader {
    /// In the rack of this broker: it may read from followers.
    is_near: bool,
    /// Brokers in its rack, where that is another: replicas there are nearer to it.
    nearer: Vec<i32>,
}

impl Reader {
    fn of(node: &Node, rack: &str) -> Reader {
        if rack.is_empty() || node.cluster.is_none() {
            return Reader { is_near: false, nearer: Vec::new() };
        }
        if node.config.rack.as_deref() == Some(rack) {
            return Reader { is_near: true, nearer: Vec::new() };
        }
        let is_up = node.is_up();
        let image = node.image.load();
        let there = image.nodes.values().filter(|found| {
            found.rack.as_deref() == Some(rack) && found.state == NodeState::Active && is_up(found.id)
        });
        Reader { is_near: false, nearer: there.map(|found| found.id).collect() }
    }
}

pub async fn handle(request: &Request<'_>) -> Result<Answer, RequestError> {
    let shard = request.shard;
    let fetch: FetchRequest = request.decode()?;
    let version = request.header.api_version;
    let by_id = version >= 13;

    // Fetch sessions: a client that continues one we never gave is told so and starts over.
    if fetch.session_id != 0 && fetch.session_epoch > 0 {
        let answer = encode_fetch_response(
            version,
            request.header.correlation_id,
            0,
            ErrorCode::FETCH_SESSION_ID_NOT_FOUND,
            0,
            &[],
        );
        return Ok(Answer::Ready(answer));
    }

    let reader = Reader::of(&shard.node, if version >= 11 { fetch.rack_id.as_str() } else { "" });
    let mut topics: Vec<FetchTopicData> = Vec::with_capacity(fetch.topics.len());
    let mut items: Vec<Item> = Vec::new();
    {
        let image = shard.node.image.load();
        let mut slot = 0;
        for topic in fetch.topics.iter().filter(|topic| !topic.partitions.is_empty()) {
            let (name, found) = if by_id {
                let found = image.topic_ids.get(&topic.topic_id).and_then(|n| image.topics.get(n));
                (TopicRef::Id(topic.topic_id), found)
            } else {
                (TopicRef::Name(topic.topic.as_str().into()), image.topics.get(topic.topic.as_str()))
            };
            let missing =
                if by_id { ErrorCode::UNKNOWN_TOPIC_ID } else { ErrorCode::UNKNOWN_TOPIC_OR_PARTITION };
            // Kafka's rule: by the topic's configuration, not by what a batch holds. Clients that ask in old versions
            // and read zstd all the same exist (rskafka).
            let withheld = version < ZSTD_MIN_VERSION
                && found.is_some_and(|t| t.effective.compression_type == CompressionType::Zstd);
            let mut partitions = Vec::with_capacity(topic.partitions.len());
            for p in &topic.partitions {
                let info = found.map(|t| t.partition(p.partition));
                let error = match info {
                    Some(Some(_)) if withheld => ErrorCode::UNSUPPORTED_COMPRESSION_TYPE,
                    Some(Some(info)) => {
                        items.push(Item {
                            slot,
                            group_id: info.group_id,
                            offset: p.fetch_offset,
                            max_bytes: usize::try_from(p.partition_max_bytes).unwrap_or(0),
                            // Kafka's rule for Fetch alone: any negative epoch skips the check.
                            leader_epoch: p.current_leader_epoch.max(-1),
                        });
                        ErrorCode::NONE
                    }
                    Some(None) => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
                    None => missing,
                };
                partitions.push(empty(p.partition, error));
                slot += 1;
            }
            topics.push(FetchTopicData { topic: name, partitions });
        }
    }
    let max_bytes = usize::try_from(fetch.max_bytes).unwrap_or(0).min(RESPONSE_BYTES_MAX);
    let min_bytes = usize::try_from(fetch.min_bytes).unwrap_or(0);
    let wait = Duration::from_millis(u64::try_from(fetch.max_wait_ms).unwrap_or(0)).min(WAIT_MAX);
    let deadline = Instant::now() + wait;

    // The first read goes without waiters: a consumer that lags never pays for them. From the second on
    // they stand before the read, so that a record appended in between is not missed.
    let mut waiters = Waiters::none();
    let mut standing = false;
    let mut read;
    loop {
        read = read_all(shard, &reader, &items, max_bytes).await;
        let bytes: usize = read.iter().map(|r| r.bytes).sum();
        // A partition that does not exist waits with the others, as in Kafka: a consumer that has not heard yet of a
        // deleted topic must not turn into a busy loop. One that cannot be read is news.
        let errors = items.is_empty()
            || read.iter().any(|r| r.data.error != ErrorCode::NONE || r.data.preferred_read_replica >= 0);
        if bytes >= min_bytes || errors || Instant::now() >= deadline || shard.is_stopping() {
            break;
        }
        if standing {
            waiters.wait_until(deadline).await;
        }
        waiters = Waiters::stand(shard, &items).await;
        standing = true;
    }

    let mut sent = 0;
    let mut hints = Hints::default();
    let mut flat: Vec<&mut FetchPartitionData> =
        topics.iter_mut().flat_map(|t| t.partitions.iter_mut()).collect();
    for r in read {
        sent += r.bytes;
        if let Some(slot) = flat.get_mut(r.slot) {
            let partition = slot.partition;
            **slot = r.data;
            slot.partition = partition;
            if tells_leader(slot.error)
                && let Some(item) = items.iter().find(|item| item.slot == r.slot)
            {
                slot.current_leader = hints.leader_of(&shard.node, item.group_id);
            }
        }
    }
    shard.metrics.fetched(sent);
    let answer = encode_fetch_response_with_endpoints(
        version,
        request.header.correlation_id,
        0,
        ErrorCode::NONE,
        0,
        &topics,
        &hints.endpoints(&shard.node),
    );
    Ok(Answer::Ready(answer))
}

fn empty(partition: i32, error: ErrorCode) -> FetchPartitionData {
    FetchPartitionData {
        partition,
        error,
        high_watermark: -1,
        last_stable_offset: -1,
        log_start_offset: -1,
        aborted: None,
        preferred_read_replica: -1,
        current_leader: None,
        diverging_epoch: None,
        records: Vec::new(),
    }
}

struct ReadItem {
    slot: usize,
    bytes: usize,
    data: FetchPartitionData,
}

/// Reads all items, this shard's first, each shard's in the client's order, within one byte budget.
async fn read_all(shard: &Rc<Shard>, reader: &Reader, items: &[Item], max_bytes: usize) -> Vec<ReadItem> {
    let shards = shard.node.shards.len();
    let mut out = Vec::with_capacity(items.len());
    let mut budget = max_bytes;
    let mut any = false;
    for step in 0..shards {
        let home = (shard.id + step) % shards;
        let local = home == shard.id;
        let mine: Vec<Item> =
            items.iter().filter(|i| shard.node.shard_of(i.group_id) == home).copied().collect();
        if mine.is_empty() {
            continue;
        }
        let read = if local {
            read_here(shard, reader, mine, budget, any).await
        } else {
            let (fallback, reader) = (mine.clone(), reader.clone());
            match shard.node.shards[home]
                .run(move |s| async move { read_here(&s, &reader, mine, budget, any).await })
                .await
            {
                Ok(read) => read,
                Err(_) => fallback
                    .into_iter()
                    .map(|i| ReadItem {
                        slot: i.slot,
                        bytes: 0,
                        data: empty(0, ErrorCode::NOT_LEADER_OR_FOLLOWER),
                    })
                    .collect(),
            }
        };
        for r in read {
            budget = budget.saturating_sub(r.bytes);
            any |= r.bytes > 0;
            out.push(r);
        }
    }
    out
}

/// Partitions of one fetch that are read at one time: enough for a disk to work on several, and what a client may make the
/// shard hold for one request beyond its answer.
const READS_IN_FLIGHT: usize = 4;

/// An answer that has room for less than this is full: each further partition would cost a read for a batch or two.
const SCRAPS_BYTES: usize = 64 << 10;

/// Reads in the client's order, a few at a time. Each gets what the ones before it left of the budget; where they did not
/// use it, the next few get it.
async fn read_here(
    shard: &Rc<Shard>,
    reader: &Reader,
    items: Vec<Item>,
    mut budget: usize,
    mut any: bool,
) -> Vec<ReadItem> {
    let mut out = Vec::with_capacity(items.len());
    let mut left = items.into_iter().peekable();
    while left.peek().is_some() {
        let mut reserved = 0;
        let mut wave = Vec::with_capacity(READS_IN_FLIGHT);
        while wave.len() < READS_IN_FLIGHT {
            // With the budget reserved, those that follow wait for what this wave leaves of it.
            if !wave.is_empty() && reserved >= budget && budget > 0 {
                break;
            }
            let Some(item) = left.next() else { break };
            // The first partition with data always gives a whole batch, so that a batch larger than
            // every limit can still be read; later ones keep to the budget.
            let limit = item.max_bytes.min(budget - reserved);
            reserved += limit;
            let limit = if any || !wave.is_empty() { limit } else { limit.max(1) };
            wave.push(read_one(shard, reader, item, limit));
        }
        for (mut read, limit) in futures_util::future::join_all(wave).await {
            if any && read.bytes > limit {
                // Its first batch alone is over what is left: it comes first next time, and the answer is full.
                read.bytes = 0;
                read.data.records.clear();
                budget = 0;
            }
            any |= read.bytes > 0;
            budget = budget.saturating_sub(read.bytes);
            if any && budget < SCRAPS_BYTES {
                budget = 0;
            }
            out.push(read);
        }
    }
    out
}

async fn read_one(shard: &Rc<Shard>, reader: &Reader, item: Item, limit: usize) -> (ReadItem, usize) {
    let mut data = empty(0, ErrorCode::NONE);
    let mut bytes = 0;
    match read_partition(shard, reader, item, limit, &mut data).await {
        Ok(()) => bytes = data.records.iter().map(Bytes::len).sum(),
        Err(error) => data.error = error.code(),
    }
    (ReadItem { slot: item.slot, bytes, data }, limit)
}

async fn read_partition(
    shard: &Rc<Shard>,
    reader: &Reader,
    item: Item,
    limit: usize,
    data: &mut FetchPartitionData,
) -> Result<(), FetchError> {
    let partition = shard.partition(item.group_id).ok_or(FetchError::NotLeader)?;
    partition.check_epoch(item.leader_epoch)?;
    let slice = match partition.check_reader(reader.is_near)? {
        Reading::NothingYet => partition.nothing_yet(),
        Reading::AsFollower => partition.fetch(item.offset, limit).await?,
        Reading::AsLeader => match partition.follower_with(&reader.nearer, item.offset) {
            // No records: it asks there at once.
            Some(follower) => {
                data.preferred_read_replica = follower;
                partition.nothing_yet()
            }
            None => partition.fetch(item.offset, limit).await?,
        },
    };
    data.records = slice.records;
    data.high_watermark = slice.high_watermark;
    data.last_stable_offset = slice.high_watermark;
    data.log_start_offset = slice.log_start_offset;
    Ok(())
}

/// Where a waiting fetch stands: on its own shard directly, on others through a task there.
struct Waiters {
    local: Option<Rc<DataWaiter>>,
    remote: Vec<tokio::sync::oneshot::Receiver<()>>,
}

impl Waiters {
    fn none() -> Waiters {
        Waiters { local: None, remote: Vec::new() }
    }

    async fn stand(shard: &Rc<Shard>, items: &[Item]) -> Waiters {
        let mut waiters = Waiters::none();
        let shards = shard.node.shards.len();
        for home in 0..shards {
            let groups: Vec<u64> =
                items.iter().map(|i| i.group_id).filter(|g| shard.node.shard_of(*g) == home).collect();
            if groups.is_empty() {
                continue;
            }
            if home == shard.id {
                let waiter = Rc::new(DataWaiter::default());
                for group in groups {
                    if let Some(partition) = shard.partition(group) {
                        partition.wait_for_data(&waiter);
                    }
                }
                waiters.local = Some(waiter);
                continue;
            }
            let (mut fire, fired) = tokio::sync::oneshot::channel();
            let posted = shard.node.shards[home]
                .run(move |s| async move {
                    let waiter = Rc::new(DataWaiter::default());
                    for group in groups {
                        if let Some(partition) = s.partition(group) {
                            partition.wait_for_data(&waiter);
                        }
                    }
                    tokio::task::spawn_local(async move {
                        tokio::select! {
                            () = waiter.notify.notified() => { let _ = fire.send(()); }
                            // The fetch was answered or its connection closed.
                            () = fire.closed() => {}
                        }
                    });
                })
                .await;
            if posted.is_ok() {
                waiters.remote.push(fired);
            }
        }
        waiters
    }

    async fn wait_until(self, deadline: Instant) {
        let local = async {
            match &self.local {
                Some(waiter) => waiter.notify.notified().await,
                None => std::future::pending().await,
            }
        };
        let remote = async {
            if self.remote.is_empty() {
                std::future::pending::<()>().await;
            }
            let _ = futures_util::future::select_all(self.remote).await;
        };
        tokio::select! {
            () = local => {}
            () = remote => {}
            () = tokio::time::sleep_until(deadline) => {}
        }
    }
}
