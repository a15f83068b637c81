//! CreatePartitions: topics only ever grow.

use std::collections::BTreeSet;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::create_partitions_request::CreatePartitionsTopic;
use kafka_protocol::messages::create_partitions_response::CreatePartitionsTopicResult;
use kafka_protocol::messages::{CreatePartitionsRequest, CreatePartitionsResponse};

use super::topics::{PARTITIONS_PER_REQUEST_MAX, bad_assignment, check_replicas, repeated, too_many};
use super::{AdminPlan, Fail, Refused};
use crate::command::Command;
use crate::image::{MetadataImage, TOPIC_PARTITIONS_MAX};

pub fn create_partitions(
    request: &CreatePartitionsRequest,
    image: &MetadataImage,
) -> AdminPlan<CreatePartitionsResponse> {
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
            check_growth(topic, image, &mut left)
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
    if let Some(assignments) = &topic.assignments {
        if super::index_of(assignments.len()) != added {
            return Err(bad_assignment(format!(
                "Attempted to add {added} additional partition(s), but only {} assignment(s) were specified.",
                assignments.len()
            )));
        }
        for assignment in assignments {
            check_replicas(&assignment.broker_ids, image)?;
        }
    }
    Ok(Command::CreatePartitions { topic_id: found.id, total: topic.count })
}

impl Fail for CreatePartitionsResponse {
    fn fail(&mut self, error: ErrorCode) {
        for result in self.results.iter_mut().filter(|result| result.error_code == 0) {
            result.error_code = error.0;
        }
    }
}
