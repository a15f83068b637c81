//! What operators' tools ask of the cluster: the metadata quorum, elections, reassignments, who is configured.
//!
//! Answers of a cluster in which every partition has one replica: elections are not needed, no reassignment is under way,
//! and the only assignment there can be is the one there is.

use std::collections::{BTreeMap, BTreeSet};

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::alter_partition_reassignments_request::ReassignablePartition;
use kafka_protocol::messages::alter_partition_reassignments_response::{
    ReassignablePartitionResponse, ReassignableTopicResponse,
};
use kafka_protocol::messages::describe_quorum_response::{
    Listener, Node, PartitionData, ReplicaState, TopicData,
};
use kafka_protocol::messages::elect_leaders_response::{PartitionResult, ReplicaElectionResult};
use kafka_protocol::messages::list_config_resources_response::ConfigResource;
use kafka_protocol::messages::{
    AlterPartitionReassignmentsRequest, AlterPartitionReassignmentsResponse, BrokerId, DescribeQuorumRequest,
    DescribeQuorumResponse, ElectLeadersRequest, ElectLeadersResponse, ListConfigResourcesRequest,
    ListConfigResourcesResponse, ListPartitionReassignmentsResponse, TopicName,
};

use super::config_describe::{
    RESOURCE_BROKER, RESOURCE_BROKER_LOGGER, RESOURCE_CLIENT_METRICS, RESOURCE_GROUP, RESOURCE_TOPIC,
};
use super::{Refused, StatusOf, index_of, text};
use crate::image::{MetadataImage, PartitionInfo};

const METADATA_TOPIC: &str = "__cluster_metadata";
/// The one listener, named as Kafka names it where nothing else is configured.
const LISTENER: &str = "PLAINTEXT";

const ELECTION_PREFERRED: i8 = 0;
const ELECTION_UNCLEAN: i8 = 1;

/// Where the metadata log stands, which the shell looks up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuorumState {
    pub leader_epoch: i32,
    pub high_watermark: i64,
    pub log_end_offset: i64,
    pub now_ms: i64,
}

pub fn describe_quorum(
    request: &DescribeQuorumRequest,
    version: i16,
    image: &MetadataImage,
    quorum: QuorumState,
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
    let node = &image.node;
    let mut voter =
        ReplicaState::default().with_replica_id(BrokerId(node.id)).with_log_end_offset(quorum.log_end_offset);
    if version >= 1 {
        // A leader has fetched and caught up with itself just now.
        voter = voter.with_last_fetch_timestamp(quorum.now_ms).with_last_caught_up_timestamp(quorum.now_ms);
    }
    let partition = PartitionData::default()
        .with_error_message(None)
        .with_leader_id(BrokerId(node.id))
        .with_leader_epoch(quorum.leader_epoch)
        .with_high_watermark(quorum.high_watermark)
        .with_current_voters(vec![voter]);
    let topic = TopicData::default()
        .with_topic_name(TopicName(text(METADATA_TOPIC)))
        .with_partitions(vec![partition]);
    let response = response.with_topics(vec![topic]);
    if version < 2 {
        return response;
    }
    let listener =
        Listener::default().with_name(text(LISTENER)).with_host(text(&node.host)).with_port(node.port);
    response.with_nodes(vec![Node::default().with_node_id(BrokerId(node.id)).with_listeners(vec![listener])])
}

pub fn elect_leaders(
    request: &ElectLeadersRequest,
    version: i16,
    image: &MetadataImage,
    status: StatusOf<'_>,
) -> ElectLeadersResponse {
    let kind = if version >= 1 { request.election_type } else { ELECTION_PREFERRED };
    let known_kind = matches!(kind, ELECTION_PREFERRED | ELECTION_UNCLEAN);
    let elected = |topic: &str, index: i32| match find(image, topic, index) {
        _ if !known_kind => Refused::new(ErrorCode::INVALID_REQUEST, format!("Unknown election type {kind}")),
        Err(refused) => refused,
        Ok(info) if status(info.group_id).damaged => Refused::new(
            if kind == ELECTION_PREFERRED {
                ErrorCode::PREFERRED_LEADER_NOT_AVAILABLE
            } else {
                ErrorCode::ELIGIBLE_LEADERS_NOT_AVAILABLE
            },
            "The log of the only replica is damaged; no election can mend it.",
        ),
        Ok(_) => {
            Refused::new(ErrorCode::ELECTION_NOT_NEEDED, "Leader election not needed for topic partition.")
        }
    };
    let result = |index: i32, outcome: Refused| {
        PartitionResult::default()
            .with_partition_id(index)
            .with_error_code(outcome.code.0)
            .with_error_message(outcome.text())
    };
    let results = match &request.topic_partitions {
        // Of all partitions only those are named for which something was to be done.
        None => image
            .topics
            .values()
            .map(|topic| {
                let partitions = (0..index_of(topic.partitions.len()))
                    .map(|index| (index, elected(&topic.name, index)))
                    .filter(|(_, outcome)| outcome.code != ErrorCode::ELECTION_NOT_NEEDED)
                    .map(|(index, outcome)| result(index, outcome))
                    .collect();
                ReplicaElectionResult::default()
                    .with_topic(TopicName(text(&topic.name)))
                    .with_partition_result(partitions)
            })
            .collect(),
        Some(topics) => topics
            .iter()
            .map(|topic| {
                let partitions = topic.partitions.iter();
                let partitions =
                    partitions.map(|index| result(*index, elected(topic.topic.as_str(), *index)));
                ReplicaElectionResult::default()
                    .with_topic(topic.topic.clone())
                    .with_partition_result(partitions.collect())
            })
            .collect(),
    };
    let response = ElectLeadersResponse::default().with_replica_election_results(results);
    if version >= 1 && !known_kind {
        return response.with_error_code(ErrorCode::INVALID_REQUEST.0);
    }
    response
}

fn find<'a>(image: &'a MetadataImage, topic: &str, index: i32) -> Result<&'a PartitionInfo, Refused> {
    let unknown = |message| Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, message);
    let found =
        image.topics.get(topic).ok_or_else(|| unknown(format!("Unable to find a topic named {topic}.")))?;
    usize::try_from(index)
        .ok()
        .and_then(|at| found.partitions.get(at))
        .ok_or_else(|| unknown(format!("Unable to find partition {topic}:{index}.")))
}

pub fn alter_partition_reassignments(
    request: &AlterPartitionReassignmentsRequest,
    version: i16,
    image: &MetadataImage,
) -> AlterPartitionReassignmentsResponse {
    let responses = request.topics.iter().map(|topic| {
        let partitions = topic.partitions.iter().map(|partition| {
            let answer = ReassignablePartitionResponse::default()
                .with_partition_index(partition.partition_index)
                .with_error_message(None);
            match reassigned(image, topic.name.as_str(), partition) {
                Ok(()) => answer,
                Err(refused) => answer.with_error_code(refused.code.0).with_error_message(refused.text()),
            }
        });
        ReassignableTopicResponse::default()
            .with_name(topic.name.clone())
            .with_partitions(partitions.collect())
    });
    let response = AlterPartitionReassignmentsResponse::default()
        .with_error_message(None)
        .with_responses(responses.collect());
    if version >= 1 {
        response.with_allow_replication_factor_change(request.allow_replication_factor_change)
    } else {
        response
    }
}

/// Whether the partition is where it is wanted; there is nowhere else for it to go.
fn reassigned(image: &MetadataImage, topic: &str, partition: &ReassignablePartition) -> Result<(), Refused> {
    let info = find(image, topic, partition.partition_index)?;
    let Some(wanted) = &partition.replicas else {
        return Err(Refused::new(
            ErrorCode::NO_REASSIGNMENT_IN_PROGRESS,
            format!("No reassignment of {topic}-{} is under way.", partition.partition_index),
        ));
    };
    let bad = |message: String| Err(Refused::new(ErrorCode::INVALID_REPLICA_ASSIGNMENT, message));
    if wanted.is_empty() {
        return bad("The manual partition assignment includes an empty replica list.".to_string());
    }
    let mut seen = BTreeSet::new();
    for id in wanted {
        if !seen.insert(id.0) {
            return bad(format!(
                "The manual partition assignment includes the broker {} more than once.",
                id.0
            ));
        }
        if id.0 != image.node.id {
            return bad(format!(
                "The manual partition assignment includes broker {}, but no such broker is registered.",
                id.0
            ));
        }
    }
    if wanted.iter().map(|id| id.0).eq(info.replicas.iter().copied()) {
        return Ok(());
    }
    bad(format!("Partition {topic}-{} cannot be moved by this broker.", partition.partition_index))
}

pub fn list_partition_reassignments() -> ListPartitionReassignmentsResponse {
    ListPartitionReassignmentsResponse::default().with_error_message(None)
}

/// Version 0 asks for client metrics, of which there are none; later ones name kinds, or none for all kinds.
pub fn list_config_resources(
    request: &ListConfigResourcesRequest,
    version: i16,
    image: &MetadataImage,
) -> ListConfigResourcesResponse {
    const ALL: [i8; 5] =
        [RESOURCE_TOPIC, RESOURCE_BROKER, RESOURCE_BROKER_LOGGER, RESOURCE_CLIENT_METRICS, RESOURCE_GROUP];
    let asked: BTreeSet<i8> = match version {
        0 => BTreeSet::from([RESOURCE_CLIENT_METRICS]),
        _ if request.resource_types.is_empty() => ALL.into_iter().collect(),
        _ => request.resource_types.iter().copied().collect(),
    };
    if !asked.iter().all(|kind| ALL.contains(kind)) {
        return ListConfigResourcesResponse::default().with_error_code(ErrorCode::UNSUPPORTED_VERSION.0);
    }
    let broker = || vec![image.node.id.to_string()];
    let mut by_kind: BTreeMap<i8, Vec<String>> = BTreeMap::new();
    for kind in asked {
        let names = match kind {
            RESOURCE_TOPIC => image.topics.keys().cloned().collect(),
            RESOURCE_BROKER | RESOURCE_BROKER_LOGGER => broker(),
            RESOURCE_GROUP => image.group_configs.keys().cloned().collect(),
            _ => Vec::new(),
        };
        by_kind.insert(kind, names);
    }
    let resources = by_kind.into_iter().flat_map(|(kind, names)| {
        names.into_iter().map(move |name| {
            let resource = ConfigResource::default().with_resource_name(text(&name));
            if version >= 1 { resource.with_resource_type(kind) } else { resource }
        })
    });
    ListConfigResourcesResponse::default().with_config_resources(resources.collect())
}
