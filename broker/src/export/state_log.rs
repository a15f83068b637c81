//! Where exports keep their plans: topic `__flumen_exports`, one partition, one record per plan or
//! settlement, keyed by the id of the exported topic.
//!
//! Invariant: an exporter's records come back in the order in which `append` returned. A snapshot stands
//! for everything before it, so replay starts at the last one.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use flumen_protocol::record::{BatchBuilder, decode_records};
use flumen_protocol::record_batch;
use flumen_sink::source::{StateLog, StateLogError};
use uuid::Uuid;

use super::source;
use crate::node::{Node, now_ms};
use crate::topic_admin;

pub const STATE_TOPIC: &str = "__flumen_exports";
/// Our own batches hold one record each.
const BATCH_BYTES_MAX: usize = 64 << 20;

pub struct TopicStateLog {
    pub node: Arc<Node>,
    pub group_id: u64,
    pub topic_id: Uuid,
}

impl StateLog for TopicStateLog {
    async fn append(&self, record: Bytes) -> Result<(), StateLogError> {
        let mut builder = BatchBuilder::new();
        builder.append(now_ms(), Some(self.topic_id.as_bytes()), Some(&record), &[]);
        source::append(&self.node, self.group_id, builder.build(0)).await.map_err(StateLogError::Failed)
    }

    fn truncate_before_snapshot(&self) {
        // Other exports share the log and may not have a snapshot there yet. What is kept longer than
        // needed costs a few hundred bytes per insert and is read once at start.
    }
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
    // Records here are the export's memory: they never expire, and they are durable whatever the default.
    let configs = [("retention.ms", "-1"), ("retention.bytes", "-1"), ("flumen.durability", "durable")];
    let configs = configs.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect();
    let created = topic_admin::create_topic(node, STATE_TOPIC, 1, 1, configs).await;
    find().ok_or_else(|| created.err().map_or_else(|| "not created".to_string(), |e| e.to_string()))
}

/// All records by exported topic, oldest first.
pub async fn load(node: &Arc<Node>, group_id: u64) -> Result<HashMap<Uuid, Vec<Bytes>>, String> {
    let mut records: HashMap<Uuid, Vec<Bytes>> = HashMap::new();
    for bytes in source::read_all(node, group_id).await? {
        for batch in record_batch::batches(&bytes) {
            let (_, batch) = batch.map_err(|e| e.to_string())?;
            let mut scratch = Vec::new();
            for record in decode_records(batch, &mut scratch, BATCH_BYTES_MAX).map_err(|e| e.to_string())? {
                let record = record.map_err(|e| e.to_string())?;
                let (Some(key), Some(value)) = (record.key, record.value) else { continue };
                let topic_id = Uuid::from_slice(key).map_err(|e| e.to_string())?;
                records.entry(topic_id).or_default().push(Bytes::copy_from_slice(value));
            }
        }
    }
    Ok(records)
}
