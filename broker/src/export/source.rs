//! The log of an exported topic as the exporter sees it: reads, waits, dead letters. Every call hops to
//! the shard that owns the partition and back.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flumen_metadata::PartitionInfo;
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;
use flumen_sink::source::{DeadLetter, Source, SourceError, SourceRead};
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::cluster::remote_log::{self, RemoteError, append_anywhere};
use crate::node::{Node, now_ms};
use crate::partition::{Completion, DataWaiter, FetchError, Origin};
use crate::topic_admin;

/// A topic whose dead letters land in a topic that does not exist yet gives it one partition: their
/// order is that of the plans.
const DEAD_LETTER_PARTITIONS: i32 = 1;

/// How often partitions on other nodes are looked at for new records: a small request a partition.
const ELSEWHERE_LOOK: Duration = Duration::from_millis(50);

pub struct TopicSource {
    pub node: Arc<Node>,
    pub topic_id: Uuid,
}

impl TopicSource {
    fn group_of(&self, partition: i32) -> Result<u64, SourceError> {
        let image = self.node.image.load();
        let topic = image.topic_by_id(&self.topic_id).ok_or(SourceError::TopicDeleted)?;
        topic.partition(partition).map(|p| p.group_id).ok_or_else(|| SourceError::NotAvailable {
            partition,
            reason: "there is no such partition".to_string(),
        })
    }
}

impl TopicSource {
    fn holders(&self, partition: i32) -> Vec<i32> {
        let image = self.node.image.load();
        let topic = image.topic_by_id(&self.topic_id);
        let info = topic.and_then(|t| t.partition(partition));
        info.map(PartitionInfo::holders).unwrap_or_default()
    }

    /// Other nodes hold the partition, and this one does not.
    fn is_elsewhere(&self, partition: i32) -> bool {
        let holders = self.holders(partition);
        !holders.is_empty() && !holders.contains(&self.node.config.node_id)
    }

    async fn read_elsewhere(
        &self,
        partition: i32,
        group_id: u64,
        from: i64,
        max_bytes: usize,
    ) -> Result<SourceRead, SourceError> {
        match remote_log::read(&self.node, group_id, from, max_bytes).await {
            Ok(read) => Ok(SourceRead {
                batches: one_by_one(&[read.records]).map_err(SourceError::Broker)?,
                last_stable_offset: read.high_watermark,
                log_start_offset: read.log_start_offset,
            }),
            Err(RemoteError::OutOfRange { offset, start, end }) => Err(SourceError::OffsetOutOfRange {
                partition,
                offset,
                log_start_offset: start,
                last_stable_offset: end,
            }),
            Err(error) => Err(SourceError::NotAvailable { partition, reason: error.to_string() }),
        }
    }
}

impl Source for TopicSource {
    async fn partitions(&self) -> Vec<i32> {
        let image = self.node.image.load();
        image.topic_by_id(&self.topic_id).map_or_else(Vec::new, |topic| {
            (0..i32::try_from(topic.partitions.len()).unwrap_or(i32::MAX)).collect()
        })
    }

    async fn read(&self, partition: i32, from: i64, max_bytes: usize) -> Result<SourceRead, SourceError> {
        let group_id = self.group_of(partition)?;
        let read = self.node.shards[self.node.shard_of(group_id)]
            .run(move |s| async move {
                let found = s.partition(group_id)?;
                Some(found.fetch(from, max_bytes).await)
            })
            .await
            .map_err(|e| SourceError::Broker(e.to_string()))?;
        match read {
            None if self.is_elsewhere(partition) => {
                self.read_elsewhere(partition, group_id, from, max_bytes).await
            }
            None => Err(SourceError::NotAvailable {
                partition,
                reason: "it is being opened or deleted".to_string(),
            }),
            Some(Ok(slice)) => Ok(SourceRead {
                batches: one_by_one(&slice.records).map_err(SourceError::Broker)?,
                last_stable_offset: slice.high_watermark,
                log_start_offset: slice.log_start_offset,
            }),
            Some(Err(FetchError::OutOfRange { offset, start, end })) => Err(SourceError::OffsetOutOfRange {
                partition,
                offset,
                log_start_offset: start,
                last_stable_offset: end,
            }),
            // This replica is behind the one that was exported from before; it will come to where that was.
            Some(Err(FetchError::NotLeader)) => {
                Ok(SourceRead { batches: Vec::new(), last_stable_offset: from, log_start_offset: 0 })
            }
            Some(Err(error)) => Err(SourceError::Broker(error.to_string())),
        }
    }

    async fn wait(&self, positions: &[(i32, i64)], timeout: Duration) {
        // Nobody tells of what comes to partitions that are elsewhere.
        let elsewhere = self.node.cluster.is_some()
            && positions.iter().any(|(partition, _)| self.is_elsewhere(*partition));
        let timeout = if elsewhere { timeout.min(ELSEWHERE_LOOK) } else { timeout };
        let mut fired = Vec::new();
        for home in 0..self.node.shards.len() {
            let mine: Vec<(u64, i64)> = positions
                .iter()
                .filter_map(|(p, offset)| self.group_of(*p).ok().map(|g| (g, *offset)))
                .filter(|(g, _)| self.node.shard_of(*g) == home)
                .collect();
            if mine.is_empty() {
                continue;
            }
            let (mut fire, receiver) = oneshot::channel();
            let posted = self.node.shards[home]
                .post(move |s| {
                    let waiter = Rc::new(DataWaiter::default());
                    for (group, offset) in mine {
                        if let Some(partition) = s.partition(group) {
                            if partition.high_watermark() > offset {
                                waiter.notify.notify_one();
                            }
                            partition.wait_for_data(&waiter);
                        }
                    }
                    tokio::task::spawn_local(async move {
                        tokio::select! {
                            () = waiter.notify.notified() => { let _ = fire.send(()); }
                            () = fire.closed() => {}
                        }
                    });
                })
                .await;
            if posted.is_ok() {
                fired.push(receiver);
            }
        }
        if fired.is_empty() {
            tokio::time::sleep(timeout).await;
            return;
        }
        let _ = tokio::time::timeout(timeout, futures_util::future::select_all(fired)).await;
    }

    fn settled(&self, partition: i32, offset: i64) {
        let Ok(group_id) = self.group_of(partition) else { return };
        let node = self.node.clone();
        let holders = self.holders(partition);
        // Late is safe: too much is held for a moment. A reset moves it down, and finds at its next read if it was late.
        tokio::task::spawn_local(async move {
            let _ = node.shards[node.shard_of(group_id)]
                .post(move |s| {
                    if let Some(partition) = s.partition(group_id) {
                        partition.set_hold_offset(offset);
                    }
                })
                .await;
            if node.cluster.is_some() {
                remote_log::let_go(&node, group_id, &holders, offset).await;
            }
        });
    }

    async fn append_dead_letters(
        &self,
        topic: &str,
        producer_id: i64,
        producer_epoch: i16,
        first_sequence: i32,
        records: Vec<DeadLetter>,
    ) -> Result<(), SourceError> {
        let broker = |e: String| SourceError::Broker(e);
        if !self.node.image.load().topics.contains_key(topic) {
            let created =
                topic_admin::create_topic(&self.node, topic, DEAD_LETTER_PARTITIONS, -1, Default::default())
                    .await;
            if let Err(error) = created
                && !self.node.image.load().topics.contains_key(topic)
            {
                return Err(broker(error.to_string()));
            }
        }
        let mut builder = BatchBuilder::new();
        for record in &records {
            let headers: Vec<(&str, Option<&[u8]>)> =
                record.headers.iter().map(|(k, v)| (k.as_str(), Some(v.as_slice()))).collect();
            builder.append(record.timestamp_ms, record.key.as_deref(), record.value.as_deref(), &headers);
        }
        builder.producer(producer_id, producer_epoch, first_sequence);
        let group_id = self
            .node
            .image
            .load()
            .topics
            .get(topic)
            .and_then(|t| t.partitions.first())
            .map(|p| p.group_id)
            .ok_or_else(|| broker(format!("topic {topic} has no partition")))?;
        append_anywhere(&self.node, group_id, builder.build(0)).await.map(drop).map_err(broker)
    }

    async fn producer_id(&self) -> Result<i64, SourceError> {
        self.node.next_producer_id().await.map_err(|e| SourceError::Broker(e.to_string()))
    }
}

/// A fetch hands out runs of batches; the exporter takes them one by one.
fn one_by_one(runs: &[Bytes]) -> Result<Vec<Bytes>, String> {
    let batches = runs.iter().flat_map(|run| {
        let slice = |batch: &[u8]| run.slice_ref(batch);
        record_batch::batches(run).map(move |b| b.map(|(_, batch)| slice(batch)).map_err(|e| e.to_string()))
    });
    batches.collect()
}

/// Appends a batch of the broker's own and returns its offset when it is durable and committed.
pub async fn append(node: &Arc<Node>, group_id: u64, batch: bytes::BytesMut) -> Result<i64, String> {
    let (done, stored) = oneshot::channel();
    let (tell, told) = oneshot::channel();
    node.shards[node.shard_of(group_id)]
        .post(move |s| {
            let Some(partition) = s.partition(group_id) else {
                let _ = tell.send(Err("the partition is not open".to_string()));
                return;
            };
            let completion = Completion::Callback(Box::new(move || {
                let _ = done.send(());
            }));
            let appended = partition.append(batch, Origin::Broker, now_ms(), Some(completion));
            let appended = appended.map(|a| a.base_offset).map_err(|(error, _)| error.to_string());
            if let Err(error) = &appended {
                tracing::warn!(topic = %partition.topic, %error, "append refused");
            }
            let _ = tell.send(appended);
        })
        .await
        .map_err(|e| e.to_string())?;
    let stopping = "the broker is stopping";
    let offset = told.await.map_err(|_| stopping.to_string())??;
    stored.await.map_err(|_| stopping.to_string())?;
    Ok(offset)
}

pub struct WholeLog {
    pub start: i64,
    pub batches: Vec<Bytes>,
}

/// Reads a whole partition from its start, with everything that was appended before the call, committed or on its way
/// to be; used for small logs of the broker's own.
pub async fn read_all(node: &Arc<Node>, group_id: u64) -> Result<WholeLog, String> {
    node.shards[node.shard_of(group_id)]
        .run(move |s| async move {
            let Some(partition) = s.partition(group_id) else { return Err("not open".to_string()) };
            let end = partition.log_end_offset();
            while partition.high_watermark() < end {
                let waiter = Rc::new(DataWaiter::default());
                partition.wait_for_data(&waiter);
                waiter.notify.notified().await;
            }
            let start = partition.log_start_offset();
            let mut offset = start;
            let mut batches = Vec::new();
            while offset < end {
                let slice = partition.fetch(offset, 1 << 20).await.map_err(|e| e.to_string())?;
                let before = offset;
                for bytes in &slice.records {
                    for batch in flumen_protocol::record_batch::batches(bytes) {
                        let (header, _) = batch.map_err(|e| e.to_string())?;
                        offset = header.next_offset();
                    }
                }
                batches.extend(slice.records);
                if offset == before {
                    return Err(format!("the log ends at {offset} although it should reach {end}"));
                }
            }
            Ok(WholeLog { start, batches })
        })
        .await
        .map_err(|e| e.to_string())?
}
