//! AlterPartitionReassignments and ListPartitionReassignments: where partitions are to be, and which are on their way.

use std::collections::BTreeSet;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::alter_partition_reassignments_request::ReassignablePartition;
use kafka_protocol::messages::alter_partition_reassignments_response::{
    ReassignablePartitionResponse, ReassignableTopicResponse,
};
use kafka_protocol::messages::list_partition_reassignments_response::{
    OngoingPartitionReassignment, OngoingTopicReassignment,
};
use kafka_protocol::messages::{
    AlterPartitionReassignmentsRequest, AlterPartitionReassignmentsResponse, BrokerId,
    ListPartitionReassignmentsRequest, ListPartitionReassignmentsResponse, TopicName,
};

use super::topics::{bad_assignment, check_replicas};
use super::{AdminPlan, Fail, Refused, index_of, partition_of, text};
use crate::assignment::PartitionInfo;
use crate::command::Command;
use crate::image::MetadataImage;
use crate::nodes::NodeState;

pub fn alter_partition_reassignments(
    request: &AlterPartitionReassignmentsRequest,
    version: i16,
    image: &MetadataImage,
) -> AdminPlan<AlterPartitionReassignmentsResponse> {
    let keep_factor = version >= 1 && !request.allow_replication_factor_change;
    let mut commands = Vec::new();
    let mut responses = Vec::with_capacity(request.topics.len());
    for topic in &request.topics {
        let partitions = topic.partitions.iter().map(|partition| {
            let answer = ReassignablePartitionResponse::default()
                .with_partition_index(partition.partition_index)
                .with_error_message(None);
            match reassign(image, topic.name.as_str(), partition, keep_factor) {
                Ok(command) => {
                    commands.extend(command);
                    answer
                }
                Err(refused) => answer.with_error_code(refused.code.0).with_error_message(refused.text()),
            }
        });
        let answer = ReassignableTopicResponse::default()
            .with_name(topic.name.clone())
            .with_partitions(partitions.collect());
        responses.push(answer);
    }
    let mut response =
        AlterPartitionReassignmentsResponse::default().with_error_message(None).with_responses(responses);
    if version >= 1 {
        response.allow_replication_factor_change = request.allow_replication_factor_change;
    }
    AdminPlan { response, commands }
}

/// The command that makes the partition go where it is wanted; none when it is there, or on its way.
fn reassign(
    image: &MetadataImage,
    topic: &str,
    partition: &ReassignablePartition,
    keep_factor: bool,
) -> Result<Option<Command>, Refused> {
    let index = partition.partition_index;
    let info = partition_of(image, topic, index)?;
    let topic_id = image.topics.get(topic).map(|topic| topic.id).unwrap_or_default();
    let command = |target| Some(Command::SetReplicas { topic_id, partition: index, target });
    let Some(wanted) = &partition.replicas else {
        if info.target.is_none() {
            let message = format!("No reassignment of {topic}-{index} is under way.");
            return Err(Refused::new(ErrorCode::NO_REASSIGNMENT_IN_PROGRESS, message));
        }
        return Ok(command(None));
    };
    check_replicas(wanted, None, image)?;
    let wanted: Vec<i32> = wanted.iter().map(|id| id.0).collect();
    let leaving = |id: &i32| image.broker(*id).is_some_and(|b| b.state == NodeState::Decommissioning);
    if let Some(id) = wanted.iter().find(|id| leaving(id) && !info.replicas.contains(id)) {
        return Err(bad_assignment(format!(
            "The manual partition assignment includes broker {id}, which is leaving the cluster."
        )));
    }
    if keep_factor && wanted.len() != info.replicas.len() {
        let message =
            format!("The replication factor is changed from {} to {}", info.replicas.len(), wanted.len());
        return Err(Refused::new(ErrorCode::INVALID_REPLICATION_FACTOR, message));
    }
    Ok(if info.goal() == wanted { None } else { command(Some(wanted)) })
}

impl Fail for AlterPartitionReassignmentsResponse {
    fn fail(&mut self, error: ErrorCode) {
        let partitions = self.responses.iter_mut().flat_map(|topic| &mut topic.partitions);
        for partition in partitions.filter(|partition| partition.error_code == 0) {
            partition.error_code = error.0;
        }
    }
}

pub fn list_partition_reassignments(
    request: &ListPartitionReassignmentsRequest,
    image: &MetadataImage,
) -> ListPartitionReassignmentsResponse {
    let under_way = |name: &str, wanted: Option<&BTreeSet<i32>>| {
        let topic = image.topics.get(name)?;
        let partitions: Vec<OngoingPartitionReassignment> = topic
            .partitions
            .iter()
            .enumerate()
            .map(|(at, info)| (index_of(at), info))
            .filter(|(index, info)| {
                info.target.is_some() && wanted.is_none_or(|wanted| wanted.contains(index))
            })
            .map(|(index, info)| ongoing(index, info))
            .collect();
        let topic = OngoingTopicReassignment::default().with_name(TopicName(text(name)));
        (!partitions.is_empty()).then(|| topic.with_partitions(partitions))
    };
    let topics = match &request.topics {
        None => image.topics.keys().filter_map(|name| under_way(name, None)).collect(),
        Some(topics) => topics
            .iter()
            .filter_map(|topic| {
                under_way(topic.name.as_str(), Some(&topic.partition_indexes.iter().copied().collect()))
            })
            .collect(),
    };
    ListPartitionReassignmentsResponse::default().with_error_message(None).with_topics(topics)
}

fn ongoing(index: i32, info: &PartitionInfo) -> OngoingPartitionReassignment {
    let ids = |ids: Vec<i32>| ids.into_iter().map(BrokerId).collect();
    OngoingPartitionReassignment::default()
        .with_partition_index(index)
        .with_replicas(ids(info.holders()))
        .with_adding_replicas(ids(info.adding()))
        .with_removing_replicas(ids(info.removing()))
}
