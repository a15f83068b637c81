//! DescribeTopicPartitions: topics in name order, in pages of a bounded number of partitions.

use std::collections::BTreeSet;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_topic_partitions_response::{
    Cursor, DescribeTopicPartitionsResponsePartition, DescribeTopicPartitionsResponseTopic,
};
use kafka_protocol::messages::{
    BrokerId, DescribeTopicPartitionsRequest, DescribeTopicPartitionsResponse, TopicName,
};

use super::{Live, OPERATIONS_NOT_ASKED, TOPIC_OPERATIONS, index_of, text};
use crate::assignment::PartitionInfo;
use crate::image::{MetadataImage, Topic};
use crate::topic_name;

/// Partitions in one answer whatever the client asks for: Kafka's max.request.partition.size.limit.
pub const PARTITIONS_MAX: usize = 2000;

pub fn describe_topic_partitions(
    request: &DescribeTopicPartitionsRequest,
    image: &MetadataImage,
    live: Live<'_>,
) -> DescribeTopicPartitionsResponse {
    if let Some(cursor) = &request.cursor {
        let listed =
            request.topics.is_empty() || request.topics.iter().any(|topic| topic.name == cursor.topic_name);
        if !listed || cursor.partition_index < 0 {
            // Kafka's way to refuse the whole request: there is no code but those of the topics.
            let refused = request.topics.iter().map(|topic| {
                failed(topic.name.as_str(), ErrorCode::INVALID_REQUEST)
                    .with_topic_authorized_operations(OPERATIONS_NOT_ASKED)
            });
            return DescribeTopicPartitionsResponse::default().with_topics(refused.collect());
        }
    }
    let (from_topic, from_partition) = match &request.cursor {
        None => ("", 0),
        Some(cursor) => (cursor.topic_name.as_str(), usize::try_from(cursor.partition_index).unwrap_or(0)),
    };
    let names: BTreeSet<&str> = if request.topics.is_empty() {
        image.topics.keys().map(String::as_str).collect()
    } else {
        request.topics.iter().map(|topic| topic.name.as_str()).collect()
    };
    let mut left = usize::try_from(request.response_partition_limit).unwrap_or(0).clamp(1, PARTITIONS_MAX);
    let mut response = DescribeTopicPartitionsResponse::default();
    for name in names.into_iter().filter(|name| *name >= from_topic) {
        if left == 0 {
            response.next_cursor = Some(cursor(name, 0));
            break;
        }
        let Some(topic) = image.topics.get(name) else {
            response.topics.push(unknown(name));
            continue;
        };
        let first = if name == from_topic { from_partition } else { 0 };
        let end = first.saturating_add(left).min(topic.partitions.len());
        response.topics.push(describe(topic, first..end, image, live));
        left -= end.saturating_sub(first);
        if end < topic.partitions.len() {
            response.next_cursor = Some(cursor(name, end));
            break;
        }
    }
    response
}

fn cursor(topic: &str, partition: usize) -> Cursor {
    Cursor::default().with_topic_name(TopicName(text(topic))).with_partition_index(index_of(partition))
}

fn unknown(name: &str) -> DescribeTopicPartitionsResponseTopic {
    match topic_name::check(name) {
        Ok(()) => failed(name, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION),
        Err(_) => failed(name, ErrorCode::INVALID_TOPIC_EXCEPTION),
    }
}

fn failed(name: &str, error: ErrorCode) -> DescribeTopicPartitionsResponseTopic {
    DescribeTopicPartitionsResponseTopic::default()
        .with_error_code(error.0)
        .with_name(Some(TopicName(text(name))))
        .with_is_internal(topic_name::is_internal(name))
        .with_topic_authorized_operations(TOPIC_OPERATIONS)
}

fn describe(
    topic: &Topic,
    range: std::ops::Range<usize>,
    image: &MetadataImage,
    live: Live<'_>,
) -> DescribeTopicPartitionsResponseTopic {
    let partitions = topic
        .partitions
        .iter()
        .enumerate()
        .skip(range.start)
        .take(range.len())
        .map(|(index, info)| partition(index, info, image, live))
        .collect();
    DescribeTopicPartitionsResponseTopic::default()
        .with_name(Some(TopicName(text(&topic.name))))
        .with_topic_id(topic.id)
        .with_is_internal(topic.internal)
        .with_partitions(partitions)
        .with_topic_authorized_operations(TOPIC_OPERATIONS)
}

fn partition(
    index: usize,
    info: &PartitionInfo,
    image: &MetadataImage,
    live: Live<'_>,
) -> DescribeTopicPartitionsResponsePartition {
    let found = live.describe(info, image);
    DescribeTopicPartitionsResponsePartition::default()
        .with_error_code(found.error().0)
        .with_partition_index(index_of(index))
        .with_leader_id(BrokerId(found.leader_id))
        .with_leader_epoch(found.leader_epoch)
        .with_replica_nodes(found.replicas)
        .with_isr_nodes(found.in_sync)
        .with_offline_replicas(found.offline)
        .with_eligible_leader_replicas(Some(Vec::new()))
        .with_last_known_elr(Some(Vec::new()))
}
