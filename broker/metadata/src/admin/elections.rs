//! ElectLeaders: which leaders are to hand over to the replica that is preferred.
//!
//! The answer says what is true once the leaders have handed over; the shell asks them, and [`ElectionPlan::refuse`] tells
//! of those that could not.

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::elect_leaders_response::{PartitionResult, ReplicaElectionResult};
use kafka_protocol::messages::{ElectLeadersRequest, ElectLeadersResponse, TopicName};

use super::{Live, Refused, index_of, partition_of, text};
use crate::image::MetadataImage;
use crate::nodes::NodeState;

const ELECTION_PREFERRED: i8 = 0;
const ELECTION_UNCLEAN: i8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderTransfer {
    pub topic: String,
    pub partition: i32,
    pub group_id: u64,
    pub from: i32,
    pub to: i32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ElectionPlan {
    pub response: ElectLeadersResponse,
    pub transfers: Vec<LeaderTransfer>,
}

impl ElectionPlan {
    /// The leader did not hand over.
    pub fn refuse(&mut self, transfer: &LeaderTransfer, refused: &Refused) {
        let topics = self.response.replica_election_results.iter_mut();
        for result in topics.filter(|topic| topic.topic.as_str() == transfer.topic) {
            let partitions = result.partition_result.iter_mut();
            for result in partitions.filter(|result| result.partition_id == transfer.partition) {
                result.error_code = refused.code.0;
                result.error_message = refused.text();
            }
        }
    }
}

pub fn elect_leaders(
    request: &ElectLeadersRequest,
    version: i16,
    image: &MetadataImage,
    live: Live<'_>,
) -> ElectionPlan {
    let kind = if version >= 1 { request.election_type } else { ELECTION_PREFERRED };
    let known_kind = matches!(kind, ELECTION_PREFERRED | ELECTION_UNCLEAN);
    let mut transfers: Vec<LeaderTransfer> = Vec::new();
    let mut elect = |topic: &str, index: i32| {
        if !known_kind {
            return Err(Refused::new(ErrorCode::INVALID_REQUEST, format!("Unknown election type {kind}")));
        }
        let transfer = elected(kind, topic, index, image, live)?;
        if !transfers.contains(&transfer) {
            transfers.push(transfer);
        }
        Ok(())
    };
    let result = |index: i32, outcome: Result<(), Refused>| {
        let result = PartitionResult::default().with_partition_id(index).with_error_message(None);
        match outcome {
            Ok(()) => result,
            Err(refused) => result.with_error_code(refused.code.0).with_error_message(refused.text()),
        }
    };
    let not_needed = |outcome: &Result<(), Refused>| {
        outcome.as_ref().is_err_and(|refused| refused.code == ErrorCode::ELECTION_NOT_NEEDED)
    };
    let results = match &request.topic_partitions {
        // Of all partitions only those are named for which something was to be done.
        None => image
            .topics
            .values()
            .map(|topic| {
                let partitions = (0..index_of(topic.partitions.len()))
                    .map(|index| (index, elect(&topic.name, index)))
                    .filter(|(_, outcome)| !not_needed(outcome))
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
                let partitions = partitions.map(|index| result(*index, elect(topic.topic.as_str(), *index)));
                ReplicaElectionResult::default()
                    .with_topic(topic.topic.clone())
                    .with_partition_result(partitions.collect())
            })
            .collect(),
    };
    let mut response = ElectLeadersResponse::default().with_replica_election_results(results);
    if version >= 1 && !known_kind {
        response.error_code = ErrorCode::INVALID_REQUEST.0;
    }
    ElectionPlan { response, transfers }
}

fn elected(
    kind: i8,
    topic: &str,
    index: i32,
    image: &MetadataImage,
    live: Live<'_>,
) -> Result<LeaderTransfer, Refused> {
    let info = partition_of(image, topic, index)?;
    let found = live.describe(info, image);
    let damaged = (live.status)(info.group_id).damaged;
    let not_needed =
        || Refused::new(ErrorCode::ELECTION_NOT_NEEDED, "Leader election not needed for topic partition.");
    if kind == ELECTION_UNCLEAN {
        // Raft elects by itself whoever has all that is committed, and nobody else.
        return Err(match found.leader_id {
            -1 if damaged && info.replicas.len() == 1 => Refused::new(
                ErrorCode::ELIGIBLE_LEADERS_NOT_AVAILABLE,
                "The log of the only replica is damaged; no election can mend it.",
            ),
            -1 => Refused::new(
                ErrorCode::ELIGIBLE_LEADERS_NOT_AVAILABLE,
                "No majority of the replicas runs; a leader is elected as soon as one does.",
            ),
            _ => not_needed(),
        });
    }
    let preferred = info.replicas.first().copied().unwrap_or(-1);
    let not_available = |why: &str| Refused::new(ErrorCode::PREFERRED_LEADER_NOT_AVAILABLE, why);
    if damaged && info.replicas.len() == 1 {
        return Err(not_available("The log of the only replica is damaged; no election can mend it."));
    }
    if found.leader_id == preferred {
        return Err(not_needed());
    }
    if found.leader_id < 0 {
        return Err(not_available("Nobody leads the partition just now who could hand it over."));
    }
    if !(live.is_up)(preferred) {
        return Err(not_available("The preferred leader does not run."));
    }
    if image.broker(preferred).is_none_or(|broker| broker.state != NodeState::Active) {
        return Err(not_available("The preferred leader is in maintenance or leaves the cluster."));
    }
    if !found.in_sync.iter().any(|id| id.0 == preferred) {
        return Err(not_available("The preferred leader has not caught up."));
    }
    Ok(LeaderTransfer {
        topic: topic.to_string(),
        partition: index,
        group_id: info.group_id,
        from: found.leader_id,
        to: preferred,
    })
}
