//! Where exports keep their plans: topic `__flumen_exports`, one partition, one record per plan or
//! settlement, keyed by the id of the exported topic.
//!
//! Invariants: an exporter's records come back in the order in which `append` returned; what `load` returned
//! is all there is, because it waits for appends that are on their way. A snapshot stands for everything of its
//! export before it, so the log is cut below the oldest of the last snapshots (`state_trim`): the snapshot is durable
//! before the cut is made, and a cut that a crash undoes costs nothing but reading more.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use flumen_protocol::record::{BatchBuilder, decode_records};
use flumen_protocol::record_batch;
use flumen_sink::plan::codec;
use flumen_sink::source::{StateLog, StateLogError};
use uuid::Uuid;

use super::source;
use super::state_trim::StateTrim;
use crate::node::{Node, now_ms};
use crate::topic_admin;

pub const STATE_TOPIC: &str = "__flumen_exports";
/// Our own batches hold one record each.
const BATCH_BYTES_MAX: usize = 64 << 20;
/// Records here are the export's memory: they never expire, and they are durable whatever the default. Segments are
/// small, because a cut frees whole ones.
const TOPIC_CONFIGS: [(&str, &str); 4] = [
    ("retention.ms", "-1"),
    ("retention.bytes", "-1"),
    ("flumen.durability", "durable"),
    ("segment.bytes", "4194304"),
];

/// As many replicas as there are brokers, up to Kafka's usual number.
const REPLICAS_MAX: usize = 3;

pub struct TopicStateLog {
    pub node: Arc<Node>,
    pub group_id: u64,
    pub topic_id: Uuid,
    trim: Rc<RefCell<StateTrim>>,
    /// Offset of the record that was appended last.
    last: Cell<i64>,
}

impl TopicStateLog {
    pub fn new(
        node: Arc<Node>,
        group_id: u64,
        topic_id: Uuid,
        trim: Rc<RefCell<StateTrim>>,
    ) -> TopicStateLog {
        TopicStateLog { node, group_id, topic_id, trim, last: Cell::new(-1) }
    }
}

impl StateLog for TopicStateLog {
    async fn append(&self, record: Bytes) -> Result<(), StateLogError> {
        let offset =
            append(&self.node, self.group_id, self.topic_id, &record).await.map_err(StateLogError::Failed)?;
        self.last.set(offset);
        self.trim.borrow_mut().appended(self.topic_id, offset);
        Ok(())
    }

    fn truncate_before_snapshot(&self) {
        self.trim.borrow_mut().snapshot(self.topic_id, self.last.get());
    }
}

/// Appends one record and returns its offset.
pub async fn append(node: &Arc<Node>, group_id: u64, topic_id: Uuid, record: &[u8]) -> Result<i64, String> {
    let mut builder = BatchBuilder::new();
    builder.append(now_ms(), Some(topic_id.as_bytes()), Some(record), &[]);
    source::append(node, group_id, builder.build(0)).await
}

/// The Raft group of the state topic; creates the topic on first use.
pub async fn open(node: &Arc<Node>) -> Result<u64, String> {
    let find = || {
        let image = node.image.load();
        image.topics.get(STATE_TOPIC).and_then(|t| t.partitions.first()).map(|p| p.group_id)
    };
    if let Some(group_id) = find() {
        return Ok(group_id);
    }
    let configs = TOPIC_CONFIGS.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect();
    let replicas = node.image.load().brokers().len().min(REPLICAS_MAX);
    let replicas = i16::try_from(replicas).unwrap_or(1).max(1);
    let created = topic_admin::create_topic(node, STATE_TOPIC, 1, replicas, configs).await;
    find().ok_or_else(|| created.err().map_or_else(|| "not created".to_string(), |e| e.to_string()))
}

/// Whether this node leads the state topic. Whoever does runs the exports, all of them: a plan is recorded before it is
/// sent, and nobody else can record one.
pub async fn is_led_here(node: &Arc<Node>, group_id: u64) -> bool {
    let asked = node.shards[node.shard_of(group_id)]
        .run(move |s| async move { s.partition(group_id).is_some_and(|partition| partition.serves()) });
    asked.await.unwrap_or(false)
}

/// All records by exported topic, oldest first, and what of the log is needed.
pub async fn load(node: &Arc<Node>, group_id: u64) -> Result<(HashMap<Uuid, Vec<Bytes>>, StateTrim), String> {
    let mut records: HashMap<Uuid, Vec<Bytes>> = HashMap::new();
    let log = source::read_all(node, group_id).await?;
    let mut trim = StateTrim::new(log.start);
    for bytes in log.batches {
        for batch in record_batch::batches(&bytes) {
            let (_, batch) = batch.map_err(|e| e.to_string())?;
            let mut scratch = Vec::new();
            for record in decode_records(batch, &mut scratch, BATCH_BYTES_MAX).map_err(|e| e.to_string())? {
                let record = record.map_err(|e| e.to_string())?;
                let (Some(key), Some(value)) = (record.key, record.value) else { continue };
                let topic_id = Uuid::from_slice(key).map_err(|e| e.to_string())?;
                match codec::is_snapshot(value) {
                    true => trim.snapshot(topic_id, record.offset),
                    false => trim.appended(topic_id, record.offset),
                }
                records.entry(topic_id).or_default().push(Bytes::copy_from_slice(value));
            }
        }
    }
    Ok((records, trim))
}

/// Lets the log begin at `offset`.
pub async fn cut(node: &Arc<Node>, group_id: u64, offset: i64) -> Result<(), String> {
    node.shards[node.shard_of(group_id)]
        .run(move |s| async move {
            let partition = s.partition(group_id).ok_or_else(|| "not open".to_string())?;
            partition.delete_records(offset).await.map(drop).map_err(|e| e.to_string())
        })
        .await
        .map_err(|e| e.to_string())?
}
