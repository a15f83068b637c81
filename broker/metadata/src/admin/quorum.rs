//! DescribeQuorum: who has how much of the metadata log.

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_quorum_response::{
    Listener, Node, PartitionData, ReplicaState, TopicData,
};
use kafka_protocol::messages::{BrokerId, DescribeQuorumRequest, DescribeQuorumResponse, TopicName};

use super::text;
use crate::image::MetadataImage;
use crate::topic_name::METADATA_TOPIC;

/// The one listener, named as Kafka names it where nothing else is configured.
const LISTENER: &str = "PLAINTEXT";

/// Where the metadata log stands, which its leader looks up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuorumState {
    /// -1 when nobody is known to lead.
    pub leader_id: i32,
    pub leader_epoch: i32,
    pub high_watermark: i64,
    pub voters: Vec<QuorumReplica>,
    /// Who gets the log and does not vote.
    pub observers: Vec<QuorumReplica>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuorumReplica {
    pub id: i32,
    /// -1 as long as the leader has not heard of it.
    pub log_end_offset: i64,
    pub last_fetch_ms: i64,
    pub last_caught_up_ms: i64,
}

impl QuorumReplica {
    fn on_wire(&self, version: i16) -> ReplicaState {
        let state = ReplicaState::default()
            .with_replica_id(BrokerId(self.id))
            .with_log_end_offset(self.log_end_offset);
        if version < 1 {
            return state;
        }
        state
            .with_last_fetch_timestamp(self.last_fetch_ms)
            .with_last_caught_up_timestamp(self.last_caught_up_ms)
    }
}

pub fn describe_quorum(
    request: &DescribeQuorumRequest,
    version: i16,
    image: &MetadataImage,
    quorum: &QuorumState,
) -> DescribeQuorumResponse {
    let response = DescribeQuorumResponse::default().with_error_message(None);
    let known = match request.topics.as_slice() {
        [topic] => {
            topic.topic_name.as_str() == METADATA_TOPIC
                && matches!(topic.partitions.as_slice(), [partition] if partition.partition_index == 0)
        }
        _ => false,
    };
    if !known {
        let topics = request.topics.iter().map(|topic| {
            let partitions = topic.partitions.iter().map(|partition| {
                let message = "Only partition 0 of __cluster_metadata has a quorum to describe.";
                PartitionData::default()
                    .with_partition_index(partition.partition_index)
                    .with_error_code(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION.0)
                    .with_error_message((version >= 2).then(|| text(message)))
            });
            TopicData::default()
                .with_topic_name(topic.topic_name.clone())
                .with_partitions(partitions.collect())
        });
        return response.with_topics(topics.collect());
    }
    let mut partition = PartitionData::default()
        .with_error_message(None)
        .with_leader_id(BrokerId(quorum.leader_id))
        .with_leader_epoch(quorum.leader_epoch);
    if quorum.leader_id == image.node.id {
        partition = partition
            .with_high_watermark(quorum.high_watermark)
            .with_current_voters(quorum.voters.iter().map(|one| one.on_wire(version)).collect())
            .with_observers(quorum.observers.iter().map(|one| one.on_wire(version)).collect());
    } else {
        // Only the leader knows how far the others are.
        partition = partition.with_error_code(ErrorCode::NOT_LEADER_OR_FOLLOWER.0);
    }
    let topic = TopicData::default()
        .with_topic_name(TopicName(text(METADATA_TOPIC)))
        .with_partitions(vec![partition]);
    let response = response.with_topics(vec![topic]);
    if version < 2 {
        return response;
    }
    let named = quorum.voters.iter().chain(&quorum.observers).filter_map(|one| image.broker(one.id));
    let nodes = named.map(|broker| {
        let listener =
            Listener::default().with_name(text(LISTENER)).with_host(text(broker.host)).with_port(broker.port);
        Node::default().with_node_id(BrokerId(broker.id)).with_listeners(vec![listener])
    });
    response.with_nodes(nodes.collect())
}
