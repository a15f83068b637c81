//! CreatePartitions: topics only ever grow.

use std::collections::BTreeSet;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::create_partitions_request::CreatePartitionsTopic;
use kafka_protocol::messages::create_partitions_response::CreatePartitionsTopicResult;
use kafka_protocol::messages::{CreatePartitionsRequest, CreatePartitionsResponse};

use super::topics::{
    PARTITIONS_PER_REQUEST_MAX, bad_assignment, check_replicas, not_enough_nodes, repeated, too_many,
};
use super::{AdminPlan, Fail, Refused};
use crate::command::Command;
use crate::image::{MetadataImage, TOPIC_PARTITIONS_MAX, Topic};
use crate::placement::{NodeHealth, Placer};

pub fn create_partitions(
    request: &CreatePartitionsRequest,
    image: &MetadataImage,
    health: NodeHealth<'_>,
) -> AdminPlan<CreatePartitionsResponse> {
    let mut placer = Placer::new(image, health);
    let mut commands = Vec::new();
    let twice = repeated(request.topics.iter().map(|topic| topic.name.as_str()));
    let mut answered = BTreeSet::new();
    let mut left = PARTITIONS_PER_REQUEST_MAX;
    let mut results = Vec::with_capacity(request.topics.len());
    for topic in &request.topics {
        if !answered.insert(topic.name.as_str()) {
            continue;
        }
        let planned = if twice.contains(topic.name.as_str()) {
            Err(Refused::new(ErrorCode::INVALID_REQUEST, "Duplicate topic name."))
        } else {
            check_growth(topic, image, &mut placer, &mut left)
        };
        let result = CreatePartitionsTopicResult::default().with_name(topic.name.clone());
        results.push(match planned {
            Ok(command) => {
                commands.push(command);
                result
            }
            Err(refused) => result.with_error_code(refused.code.0).with_error_message(refused.text()),
        });
    }
    if request.validate_only {
        commands.clear();
    }
    AdminPlan { response: CreatePartitionsResponse::default().with_results(results), commands }
}

fn check_growth(
    topic: &CreatePartitionsTopic,
    image: &MetadataImage,
    placer: &mut Placer,
    left: &mut i32,
) -> Result<Command, Refused> {
    let found = image.topics.get(topic.name.as_str()).ok_or_else(|| {
        Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, "This server does not host this topic.")
    })?;
    let refuse = |message: String| Err(Refused::new(ErrorCode::INVALID_PARTITIONS, message));
    let has = super::index_of(found.partitions.len());
    if topic.count == has {
        return refuse(format!("Topic already has {has} partition(s)."));
    }
    if topic.count < has {
        return refuse(format!(
            "The topic {} currently has {has} partition(s); {} would not be an increase.",
            found.name, topic.count
        ));
    }
    if found.internal {
        let message = "The partition count of an internal topic is fixed: groups are assigned by it.";
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, message));
    }
    let added = topic.count - has;
    *left = left.checked_sub(added).filter(|left| *left >= 0).ok_or_else(too_many)?;
    if topic.count > TOPIC_PARTITIONS_MAX {
        return Err(too_many());
    }
    let Some(assignments) = &topic.assignments else {
        return grow(found, added, placer);
    };
    if super::index_of(assignments.len()) != added {
        return Err(bad_assignment(format!(
            "Attempted to add {added} additional partition(s), but only {} assignment(s) were specified.",
            assignments.len()
        )));
    }
    for assignment in assignments {
        check_replicas(&assignment.broker_ids, Some(factor_of(found)), image)?;
    }
    let ids = assignments.iter().map(|one| one.broker_ids.iter().map(|id| id.0).collect());
    Ok(Command::CreatePartitions { topic_id: found.id, assignments: ids.collect() })
}

/// What a topic's first partition has, its others are to have.
fn factor_of(topic: &Topic) -> usize {
    topic.partitions.first().map_or(1, |info| info.goal().len())
}

fn grow(topic: &Topic, added: i32, placer: &mut Placer) -> Result<Command, Refused> {
    let factor = factor_of(topic);
    let added = usize::try_from(added).unwrap_or(0);
    let assignments = placer.place(&topic.partitions, added, factor);
    let assignments = assignments.ok_or_else(|| not_enough_nodes(factor, placer))?;
    Ok(Command::CreatePartitions { topic_id: topic.id, assignments })
}

/// Lets a topic grow to `total` partitions, for callers that do not speak Kafka's protocol.
pub fn plan_partitions(
    image: &MetadataImage,
    health: NodeHealth<'_>,
    topic: &str,
    total: i32,
) -> Result<Command, Refused> {
    let found = image.topics.get(topic).ok_or_else(|| {
        Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, format!("topic '{topic}' does not exist"))
    })?;
    let has = super::index_of(found.partitions.len());
    if total <= has || total > PARTITIONS_PER_REQUEST_MAX {
        let message = format!("topic '{topic}' has {has} partitions; {total} is not more, or too many");
        return Err(Refused::new(ErrorCode::INVALID_PARTITIONS, message));
    }
    grow(found, total - has, &mut Placer::new(image, health))
}

impl Fail for CreatePartitionsResponse {
    fn fail(&mut self, error: ErrorCode) {
        for result in self.results.iter_mut().filter(|result| result.error_code == 0) {
            result.error_code = error.0;
        }
    }
}
