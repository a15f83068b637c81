//! What operators' tools ask: the metadata quorum, elections, reassignments, config resources, producers, quotas,
//! credentials. Rules are in `flumen_metadata::admin`.

use std::time::Duration;

use flumen_metadata::admin::{self, QuorumReplica, QuorumState};
use flumen_metadata::topic_name;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_producers_response::{
    PartitionResponse, ProducerState, TopicResponse,
};
use kafka_protocol::messages::{
    AlterClientQuotasRequest, AlterPartitionReassignmentsRequest, DescribeClientQuotasRequest,
    DescribeProducersRequest, DescribeProducersResponse, DescribeQuorumRequest,
    DescribeUserScramCredentialsRequest, ElectLeadersRequest, ListConfigResourcesRequest,
    ListPartitionReassignmentsRequest, ProducerId,
};
use kafka_protocol::protocol::StrBytes;

use tokio::time::Instant;

use super::offsets::at_home;
use crate::balancer;
use crate::cluster::node_id_of;
use crate::cluster::requests::ANSWER_TIME_MAX;
use crate::controller::METADATA_GROUP;
use crate::dispatch::{Answer, Request, RequestError};
use crate::node::now_ms;
use crate::topic_admin::{commit_plan, with_live};

pub async fn describe_quorum(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeQuorumRequest = request.decode()?;
    let node = &request.shard.node;
    let quorum = node
        .controller()
        .run(|shard| async move {
            let log = shard.partition(METADATA_GROUP)?;
            let (own, now) = (shard.node.config.node_id, now_ms());
            let status = log.raft_status();
            let up = shard.node.is_up();
            let replica = |raft_id: u64| {
                let id = node_id_of(raft_id).unwrap_or(-1);
                let peer = status.peers.iter().find(|peer| peer.id == raft_id);
                // What a replica lacks is known by entries; of those that have all the end of the log is the leader's.
                let has_all = id == own || peer.is_some_and(|p| p.matched_index >= status.last_index);
                let end = peer.filter(|p| p.matched_index > 0).map(|p| log.end_of_entry(p.matched_index));
                QuorumReplica {
                    id,
                    log_end_offset: if has_all { log.log_end_offset() } else { end.flatten().unwrap_or(-1) },
                    last_fetch_ms: if up(id) { now } else { -1 },
                    last_caught_up_ms: if has_all { now } else { -1 },
                }
            };
            Some(QuorumState {
                leader_id: node_id_of(status.leadership.leader_id).unwrap_or(-1),
                leader_epoch: log.leader_epoch(),
                high_watermark: log.high_watermark(),
                voters: status.membership.voters.iter().copied().map(replica).collect(),
                observers: status.membership.learners.iter().copied().map(replica).collect(),
            })
        })
        .await
        .ok()
        .flatten()
        // Only of a broker that is stopping: the connection ends with it.
        .ok_or_else(|| request.malformed("the metadata log has been closed".to_string()))?;
    let image = node.image.load();
    request.answer(&admin::describe_quorum(&asked, request.header.api_version, &image, &quorum))
}

pub async fn elect_leaders(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: ElectLeadersRequest = request.decode()?;
    let node = &request.shard.node;
    let image = node.image.load();
    let version = request.header.api_version;
    let mut plan = with_live(node, |live| admin::elect_leaders(&asked, version, &image, live));
    let deadline = Instant::now() + request_time(asked.timeout_ms);
    for transfer in std::mem::take(&mut plan.transfers) {
        if let Err(refused) = balancer::transfer(node, &transfer, deadline).await {
            plan.refuse(&transfer, &refused);
        }
    }
    request.answer(&plan.response)
}

/// What a client is ready to wait; another broker may have passed its request on, and waits no longer than this.
fn request_time(timeout_ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(timeout_ms).unwrap_or(0)).min(ANSWER_TIME_MAX / 2)
}

pub async fn alter_partition_reassignments(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: AlterPartitionReassignmentsRequest = request.decode()?;
    let version = request.header.api_version;
    let response = commit_plan(&request.shard.node, move |image, _| {
        admin::alter_partition_reassignments(&asked, version, image).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    request.answer(&response)
}

pub fn list_partition_reassignments(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: ListPartitionReassignmentsRequest = request.decode()?;
    let image = request.shard.node.image.load();
    request.answer(&admin::list_partition_reassignments(&asked, &image))
}

pub fn list_config_resources(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: ListConfigResourcesRequest = request.decode()?;
    let image = request.shard.node.image.load();
    request.answer(&admin::list_config_resources(&asked, request.header.api_version, &image))
}

pub fn describe_client_quotas(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeClientQuotasRequest = request.decode()?;
    request.answer(&admin::describe_client_quotas(&asked))
}

pub fn alter_client_quotas(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: AlterClientQuotasRequest = request.decode()?;
    request.answer(&admin::alter_client_quotas(&asked))
}

pub fn describe_user_scram_credentials(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeUserScramCredentialsRequest = request.decode()?;
    request.answer(&admin::describe_user_scram_credentials(&asked))
}

pub fn describe_acls(request: &Request<'_>) -> Result<Answer, RequestError> {
    request.answer(&admin::describe_acls())
}

/// Who has written to a partition lately, by what its log remembers of producers.
pub async fn describe_producers(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeProducersRequest = request.decode()?;
    let mut response = DescribeProducersResponse::default();
    for topic in asked.topics {
        let mut answered = TopicResponse::default().with_name(topic.name.clone());
        let bad_name = topic_name::check(topic.name.as_str()).err();
        for index in topic.partition_indexes {
            let out = PartitionResponse::default().with_partition_index(index).with_error_message(None);
            if let Some(reason) = &bad_name {
                let message = StrBytes::from_string(reason.to_string());
                answered.partitions.push(
                    out.with_error_code(ErrorCode::INVALID_TOPIC_EXCEPTION.0)
                        .with_error_message(Some(message)),
                );
                continue;
            }
            let found = at_home(request.shard, topic.name.as_str(), index, |partition| async move {
                Ok(partition.producers())
            })
            .await;
            answered.partitions.push(match found {
                Ok(producers) => out.with_active_producers(producers.into_iter().map(state_of).collect()),
                Err(error) => out.with_error_code(error.0),
            });
        }
        response.topics.push(answered);
    }
    request.answer(&response)
}

fn state_of((id, epoch, last_sequence, last_timestamp): (i64, i16, i32, i64)) -> ProducerState {
    ProducerState::default()
        .with_producer_id(ProducerId(id))
        .with_producer_epoch(i32::from(epoch))
        .with_last_sequence(last_sequence)
        .with_last_timestamp(last_timestamp)
        // No transaction has ended or is open: there are none.
        .with_coordinator_epoch(-1)
        .with_current_txn_start_offset(-1)
}
