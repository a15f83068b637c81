//! ListOffsets, OffsetForLeaderEpoch, DeleteRecords: one question per partition, asked at its home.

use std::collections::BTreeSet;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use flumen_protocol::error_code::ErrorCode;
use futures_util::future::join_all;
use kafka_protocol::messages::delete_records_response::{
    DeleteRecordsPartitionResult, DeleteRecordsTopicResult,
};
use kafka_protocol::messages::list_offsets_request::ListOffsetsPartition;
use kafka_protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use kafka_protocol::messages::offset_for_leader_epoch_response::{
    EpochEndOffset, OffsetForLeaderTopicResult,
};
use kafka_protocol::messages::{
    DeleteRecordsRequest, DeleteRecordsResponse, ListOffsetsRequest, ListOffsetsResponse,
    OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse,
};

use tokio::time::{Instant, timeout};

use crate::dispatch::{Answer, Request, RequestError};
use crate::partition::{FetchError, OffsetAt, Partition};
use crate::shard::Shard;

/// Finds the partition's home and asks there.
pub(super) async fn at_home<T, F, Fut>(
    shard: &Rc<Shard>,
    topic: &str,
    index: i32,
    ask: F,
) -> Result<T, ErrorCode>
where
    T: Send + 'static,
    F: FnOnce(Rc<Partition>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T, FetchError>> + 'static,
{
    let group_id = {
        let image = shard.node.image.load();
        image
            .topics
            .get(topic)
            .and_then(|t| t.partition(index))
            .map(|p| p.group_id)
            .ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?
    };
    let answer = |outcome: Option<Result<T, FetchError>>| match outcome {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(error.code()),
        None => Err(ErrorCode::NOT_LEADER_OR_FOLLOWER),
    };
    let home = shard.node.shard_of(group_id);
    if home == shard.id {
        return match shard.partition(group_id) {
            Some(partition) => answer(Some(ask(partition).await)),
            None => answer(None),
        };
    }
    let outcome = shard.node.shards[home]
        .run(move |s| async move {
            match s.partition(group_id) {
                Some(partition) => Some(ask(partition).await),
                None => None,
            }
        })
        .await;
    answer(outcome.unwrap_or(None))
}

pub async fn list_offsets(request: &Request<'_>) -> Result<Answer, RequestError> {
    let list: ListOffsetsRequest = request.decode()?;
    let version = request.header.api_version;
    let mut response = ListOffsetsResponse::default();
    for topic in list.topics.into_iter().filter(|topic| !topic.partitions.is_empty()) {
        let mut answered = ListOffsetsTopicResponse::default().with_name(topic.name.clone());
        let mut seen = BTreeSet::new();
        let twice: BTreeSet<i32> =
            topic.partitions.iter().map(|p| p.partition_index).filter(|p| !seen.insert(*p)).collect();
        let mut refused_twice = BTreeSet::new();
        // Each asks a majority whether it leads: all at the same time.
        let name = topic.name.as_str();
        let found = topic.partitions.iter().map(|p| offset_of(request, version, name, p));
        for (p, found) in topic.partitions.iter().zip(join_all(found).await) {
            if twice.contains(&p.partition_index) {
                // One answer for both.
                if refused_twice.insert(p.partition_index) {
                    answered.partitions.push(
                        ListOffsetsPartitionResponse::default()
                            .with_partition_index(p.partition_index)
                            .with_error_code(ErrorCode::INVALID_REQUEST.0)
                            .with_offset(-1)
                            .with_timestamp(-1)
                            .with_leader_epoch(-1),
                    );
                }
                continue;
            }
            let mut out = ListOffsetsPartitionResponse::default()
                .with_partition_index(p.partition_index)
                .with_offset(-1)
                .with_timestamp(-1)
                .with_leader_epoch(-1);
            match found {
                Ok(Some(OffsetAt { offset, timestamp, leader_epoch })) => {
                    out.offset = offset;
                    out.timestamp = timestamp;
                    if version >= 4 {
                        out.leader_epoch = leader_epoch;
                    }
                }
                Ok(None) => {}
                Err(error) => out.error_code = error.0,
            }
            answered.partitions.push(out);
        }
        response.topics.push(answered);
    }
    request.answer(&response)
}

async fn offset_of(
    request: &Request<'_>,
    version: i16,
    topic: &str,
    p: &ListOffsetsPartition,
) -> Result<Option<OffsetAt>, ErrorCode> {
    let (timestamp, epoch) = (p.timestamp, p.current_leader_epoch);
    // Special timestamps came with versions; an older request that names one gets no offset.
    let known = match timestamp {
        -3 => version >= 7,
        -4 => version >= 8,
        -5 => version >= 9,
        -6 => version >= 11,
        t => t >= -2,
    };
    if !known {
        return Err(ErrorCode::UNSUPPORTED_VERSION);
    }
    at_home(request.shard, topic, p.partition_index, move |partition| async move {
        list_offset(&partition, epoch, timestamp).await
    })
    .await
}

/// One partition of a ListOffsets, where it lives.
pub async fn list_offset(
    partition: &Partition,
    current_epoch: i32,
    timestamp: i64,
) -> Result<Option<OffsetAt>, FetchError> {
    partition.check_epoch(current_epoch)?;
    partition.offset_at(timestamp).await
}

/// One partition of an OffsetForLeaderEpoch, where it lives: the largest epoch not above `epoch`, and where it ends.
pub async fn end_of_epoch(
    partition: &Partition,
    current_epoch: i32,
    epoch: i32,
) -> Result<(i32, i64), FetchError> {
    partition.check_epoch(current_epoch)?;
    partition.confirm_leads().await?;
    Ok(partition.epoch_end_offset(epoch))
}

pub async fn offset_for_leader_epoch(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: OffsetForLeaderEpochRequest = request.decode()?;
    let mut response = OffsetForLeaderEpochResponse::default();
    for topic in asked.topics {
        let mut answered = OffsetForLeaderTopicResult::default().with_topic(topic.topic.clone());
        let found = topic.partitions.iter().map(|p| {
            let (current, epoch) = (p.current_leader_epoch, p.leader_epoch);
            at_home(request.shard, topic.topic.as_str(), p.partition, move |partition| async move {
                end_of_epoch(&partition, current, epoch).await
            })
        });
        for (p, found) in topic.partitions.iter().zip(join_all(found).await) {
            let mut out = EpochEndOffset::default()
                .with_partition(p.partition)
                .with_leader_epoch(-1)
                .with_end_offset(-1);
            match found {
                Ok((epoch, end)) => {
                    out.leader_epoch = epoch;
                    out.end_offset = end;
                }
                Err(error) => out.error_code = error.0,
            }
            answered.partitions.push(out);
        }
        response.topics.push(answered);
    }
    request.answer(&response)
}

pub async fn delete_records(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DeleteRecordsRequest = request.decode()?;
    let until = Instant::now() + Duration::from_millis(u64::try_from(asked.timeout_ms).unwrap_or(0));
    let time_left = || until.saturating_duration_since(Instant::now());
    let mut response = DeleteRecordsResponse::default();
    for topic in asked.topics {
        let mut answered = DeleteRecordsTopicResult::default().with_name(topic.name.clone());
        let refused = {
            let image = request.shard.node.image.load();
            match image.topics.get(topic.name.as_str()) {
                Some(t) if t.internal => Some(ErrorCode::INVALID_TOPIC_EXCEPTION),
                // Kafka's rule: a topic that is only compacted keeps the latest of every key.
                Some(t) if !t.effective.deletes() => Some(ErrorCode::POLICY_VIOLATION),
                _ => None,
            }
        };
        for p in topic.partitions {
            let offset = p.offset;
            let found = match refused {
                Some(error) => Err(error),
                None => {
                    let deleted = at_home(
                        request.shard,
                        topic.name.as_str(),
                        p.partition_index,
                        move |partition| async move { partition.delete_records(offset).await },
                    );
                    // Without a majority it may happen later, or never.
                    timeout(time_left(), deleted).await.unwrap_or(Err(ErrorCode::REQUEST_TIMED_OUT))
                }
            };
            let mut out = DeleteRecordsPartitionResult::default()
                .with_partition_index(p.partition_index)
                .with_low_watermark(-1);
            match found {
                Ok(low_watermark) => out.low_watermark = low_watermark,
                Err(error) => out.error_code = error.0,
            }
            answered.partitions.push(out);
        }
        response.topics.push(answered);
    }
    request.answer(&response)
}
