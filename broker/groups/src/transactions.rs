//! Offsets committed inside transactions: held back until the transaction's marker is in the log.
//!
//! The broker appends the records of a TxnOffsetCommit as a transactional batch of that producer, and calls
//! [`Coordinator::end_transaction`] when a marker of the producer is in this partition's log, both live and while
//! it loads. Between commit and marker, consumers that require stable offsets are told to ask again.

use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::{OffsetCommitRequest, TxnOffsetCommitRequest};

use crate::coordinator::Coordinator;
use crate::group::{Committed, Ctx, Group};
use crate::record::{OffsetCommitValue, RecordKey};
use crate::types::{Now, Output};

impl Coordinator {
    /// Answered with [`crate::GroupResponse::OffsetCommit`], whose topics and codes are those of the
    /// TxnOffsetCommit response. An append among the outputs belongs to the request's producer.
    pub fn txn_offset_commit(
        &mut self,
        token: u64,
        request: TxnOffsetCommitRequest,
        version: i16,
        now: impl Into<Now>,
    ) -> Vec<Output> {
        self.set_now(now.into());
        let producer_id = request.producer_id.0;
        let topics = request
            .topics
            .into_iter()
            .map(|topic| {
                let partitions = topic
                    .partitions
                    .into_iter()
                    .map(|partition| {
                        OffsetCommitRequestPartition::default()
                            .with_partition_index(partition.partition_index)
                            .with_committed_offset(partition.committed_offset)
                            .with_committed_leader_epoch(partition.committed_leader_epoch)
                            .with_committed_metadata(partition.committed_metadata)
                    })
                    .collect();
                OffsetCommitRequestTopic::default().with_name(topic.name).with_partitions(partitions)
            })
            .collect();
        let request = OffsetCommitRequest::default()
            .with_group_id(request.group_id)
            .with_member_id(request.member_id)
            .with_generation_id_or_member_epoch(request.generation_id)
            .with_group_instance_id(request.group_instance_id)
            .with_topics(topics);
        self.commit(token, request, version, Some(producer_id));
        self.take_outputs()
    }

    /// Replays one record of a transactional batch.
    pub fn load_transactional(
        &mut self,
        producer_id: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        record_timestamp_ms: i64,
    ) {
        let (group_id, topic, partition, value) = match (key.map(RecordKey::decode), value) {
            (Some(Ok(RecordKey::Offset { group, topic, partition })), Some(value)) => {
                (group, topic, partition, value)
            }
            _ => return self.load(key, value, record_timestamp_ms),
        };
        if let Ok(value) = OffsetCommitValue::decode(value) {
            let committed = Committed::new(value, self.next_seq());
            self.loaded_group(&group_id, record_timestamp_ms);
            if let Some(group) = self.groups.get_mut(group_id.as_str()) {
                hold_offset(group, &mut self.ctx, producer_id, topic, partition, committed);
            }
        }
    }

    /// A marker of `producer_id` is in the log: its offsets become visible, or never were.
    pub fn end_transaction(&mut self, producer_id: i64, committed: bool) {
        for group_id in self.ctx.open_transactions.remove(&producer_id).unwrap_or_default() {
            let Some(group) = self.groups.get_mut(&group_id) else { continue };
            let offsets = group.txn_offsets.remove(&producer_id).unwrap_or_default();
            if committed {
                for ((topic, partition), committed) in offsets {
                    apply_offset(group, topic, partition, committed);
                }
            }
            self.drop_if_vacant(&group_id);
        }
    }
}

/// Keeps the newer of two commits, by their place in the log.
pub(crate) fn apply_offset(group: &mut Group, topic: String, partition: i32, committed: Committed) {
    let partitions = group.offsets.entry(topic).or_default();
    if partitions.get(&partition).is_none_or(|known| known.seq <= committed.seq) {
        partitions.insert(partition, committed);
    }
}

pub(crate) fn hold_offset(
    group: &mut Group,
    ctx: &mut Ctx,
    producer_id: i64,
    topic: String,
    partition: i32,
    committed: Committed,
) {
    ctx.open_transactions.entry(producer_id).or_default().insert(group.id.clone());
    group.txn_offsets.entry(producer_id).or_default().insert((topic, partition), committed);
}

/// Whether an open transaction may still move this offset.
pub(crate) fn is_unstable(group: &Group, topic: &str, partition: i32) -> bool {
    // Few transactions are open on one group at a time, and the common case is none.
    group
        .txn_offsets
        .values()
        .any(|offsets| offsets.keys().any(|(name, index)| name == topic && *index == partition))
}
