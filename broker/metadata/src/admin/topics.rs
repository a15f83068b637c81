//! CreateTopics, DeleteTopics, and the topics the broker makes by itself.

use std::collections::{BTreeMap, BTreeSet};

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::create_topics_request::{CreatableReplicaAssignment, CreatableTopic};
use kafka_protocol::messages::create_topics_response::{CreatableTopicConfigs, CreatableTopicResult};
use kafka_protocol::messages::delete_topics_response::DeletableTopicResult;
use kafka_protocol::messages::{
    BrokerId, CreateTopicsRequest, CreateTopicsResponse, DeleteTopicsRequest, DeleteTopicsResponse, TopicName,
};
use uuid::Uuid;

use super::{AdminPlan, Fail, Refused, text, topic_configs};
use crate::assignment::REPLICAS_MAX;
use crate::broker_config::BrokerConfig;
use crate::command::Command;
use crate::config_def::Layers;
use crate::image::{MetadataImage, TOPIC_PARTITIONS_MAX, Topic};
use crate::placement::{NodeHealth, Placer};
use crate::topic_config::{check_setting, check_together};
use crate::topic_name::{self, METADATA_TOPIC, OFFSETS_TOPIC};

/// Kafka's bound on one request: each partition is a log that must be made before the answer.
pub const PARTITIONS_PER_REQUEST_MAX: i32 = 10_000;

/// A topic that may be created, with defaults filled in and its replicas placed.
struct NewTopic {
    assignments: Vec<Vec<i32>>,
    configs: BTreeMap<String, String>,
}

impl NewTopic {
    fn command(self, name: &str, id: Uuid) -> Command {
        Command::CreateTopic {
            name: name.to_string(),
            id,
            assignments: self.assignments,
            configs: self.configs,
        }
    }

    fn partitions(&self) -> i32 {
        super::index_of(self.assignments.len())
    }

    fn replication_factor(&self) -> i16 {
        self.assignments.first().and_then(|replicas| i16::try_from(replicas.len()).ok()).unwrap_or(i16::MAX)
    }
}

/// `ids` gives one fresh id per topic of the request.
pub fn create_topics(
    request: &CreateTopicsRequest,
    version: i16,
    image: &MetadataImage,
    config: &BrokerConfig,
    health: NodeHealth<'_>,
    ids: impl IntoIterator<Item = Uuid>,
) -> AdminPlan<CreateTopicsResponse> {
    let config = config.with_dynamic(image);
    let mut placer = Placer::new(image, health);
    let mut ids = ids.into_iter();
    let mut commands = Vec::new();
    let mut results: Vec<CreatableTopicResult> = Vec::with_capacity(request.topics.len());
    let twice = repeated(request.topics.iter().map(|topic| topic.name.as_str()));
    let mut answered = BTreeSet::new();
    let mut planned = BTreeSet::new();
    let mut partitions_left = PARTITIONS_PER_REQUEST_MAX;
    for topic in &request.topics {
        let name = topic.name.as_str();
        if !answered.insert(name) {
            continue;
        }
        let result = CreatableTopicResult::default()
            .with_error_message(None)
            .with_name(topic.name.clone())
            .with_num_partitions(-1)
            .with_replication_factor(-1)
            .with_configs(Some(Vec::new()));
        let checked = if twice.contains(name) {
            Err(Refused::new(ErrorCode::INVALID_REQUEST, "Duplicate topic name."))
        } else {
            check_new_topic(topic, &planned, &mut placer, partitions_left, image, &config)
        };
        let checked = checked.and_then(|new| {
            partitions_left = partitions_left
                .checked_sub(new.partitions())
                .filter(|left| *left >= 0)
                .ok_or_else(too_many)?;
            let id = ids.next().ok_or_else(|| {
                Refused::new(
                    ErrorCode::UNKNOWN_SERVER_ERROR,
                    "The broker did not provide an id for the topic.",
                )
            })?;
            Ok((new, id))
        });
        results.push(match checked {
            Err(refused) => result.with_error_code(refused.code.0).with_error_message(refused.text()),
            Ok((new, id)) => {
                planned.insert(name.to_string());
                let mut result = result
                    .with_num_partitions(new.partitions())
                    .with_replication_factor(new.replication_factor());
                if version >= 5 {
                    result.configs = Some(created_configs(&new.configs, image, &config));
                }
                // A dry run too tells an id, as with Kafka; no topic ever has it.
                result.topic_id = id;
                if !request.validate_only {
                    commands.push(new.command(name, id));
                }
                result
            }
        });
    }
    AdminPlan { response: CreateTopicsResponse::default().with_topics(results), commands }
}

pub(super) fn too_many() -> Refused {
    let message = format!(
        "Excessively large number of partitions per request: at most {PARTITIONS_PER_REQUEST_MAX} can be created at once."
    );
    Refused::new(ErrorCode::POLICY_VIOLATION, message)
}

pub(super) fn repeated<'a>(names: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    names.filter(|name| !seen.insert(*name)).collect()
}

fn created_configs(
    overrides: &BTreeMap<String, String>,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Vec<CreatableTopicConfigs> {
    topic_configs(overrides, image, config)
        .into_iter()
        .map(|entry| {
            CreatableTopicConfigs::default()
                .with_name(text(&entry.name))
                .with_value(entry.value.as_deref().map(text))
                .with_read_only(entry.read_only)
                .with_config_source(entry.source as i8)
                .with_is_sensitive(entry.sensitive)
        })
        .collect()
}

fn check_new_topic(
    topic: &CreatableTopic,
    planned: &BTreeSet<String>,
    placer: &mut Placer,
    partitions_left: i32,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<NewTopic, Refused> {
    check_new_name(topic.name.as_str(), planned, image)?;
    let given = topic.configs.iter().map(|entry| (entry.name.as_str(), entry.value.as_deref()));
    let configs = check_new_configs(topic.name.as_str(), given, image, config)?;
    let assignments = if topic.assignments.is_empty() {
        place_counts(topic.num_partitions, topic.replication_factor, placer, partitions_left, config)?
    } else {
        check_assignments(topic, image)?
    };
    Ok(NewTopic { assignments, configs })
}

fn check_new_name(name: &str, planned: &BTreeSet<String>, image: &MetadataImage) -> Result<(), Refused> {
    topic_name::check(name).map_err(|reason| Refused::new(ErrorCode::INVALID_TOPIC_EXCEPTION, reason))?;
    if image.topics.contains_key(name) {
        let message = format!("Topic '{name}' already exists.");
        return Err(Refused::new(ErrorCode::TOPIC_ALREADY_EXISTS, message));
    }
    if name == METADATA_TOPIC {
        let message = format!("Creation of internal topic {METADATA_TOPIC} is prohibited.");
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, message));
    }
    let existing = image.topics.keys().chain(planned);
    if let Some(other) = topic_name::collision(name, existing) {
        let message = format!("Topic '{name}' collides with existing topic: {other}");
        return Err(Refused::new(ErrorCode::INVALID_TOPIC_EXCEPTION, message));
    }
    Ok(())
}

fn check_new_configs<'a>(
    topic: &str,
    given: impl Iterator<Item = (&'a str, Option<&'a str>)>,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<BTreeMap<String, String>, Refused> {
    let refuse = |message: String| Refused::new(ErrorCode::INVALID_CONFIG, message);
    let mut configs = if topic == OFFSETS_TOPIC { offsets_topic_configs(config) } else { BTreeMap::new() };
    for (name, value) in given {
        let Some(value) = value else {
            return Err(refuse(format!("Null value not supported for topic configs: {name}")));
        };
        if let Some(value) = check_setting(name, value, config).map_err(refuse)? {
            configs.insert(name.to_string(), value);
        }
    }
    let layers = Layers { fixed: &config.values, ..image.layers() };
    check_together(&configs, &layers, config).map_err(refuse)?;
    Ok(configs)
}

fn place_counts(
    partitions: i32,
    replication_factor: i16,
    placer: &mut Placer,
    partitions_max: i32,
    config: &BrokerConfig,
) -> Result<Vec<Vec<i32>>, Refused> {
    let replication_factor =
        if replication_factor == -1 { config.default_replication_factor } else { replication_factor };
    let partitions = if partitions == -1 { config.num_partitions } else { partitions };
    let Some(factor) = usize::try_from(replication_factor).ok().filter(|factor| *factor > 0) else {
        let message = "Replication factor must be larger than 0, or -1 to use the default value.";
        return Err(Refused::new(ErrorCode::INVALID_REPLICATION_FACTOR, message));
    };
    check_factor(factor, placer)?;
    let Some(count) = usize::try_from(partitions).ok().filter(|count| *count > 0) else {
        let message = "Number of partitions was set to an invalid non-positive value.";
        return Err(Refused::new(ErrorCode::INVALID_PARTITIONS, message));
    };
    if partitions > TOPIC_PARTITIONS_MAX.min(partitions_max) {
        return Err(too_many());
    }
    placer.place(&[], count, factor).ok_or_else(|| not_enough_nodes(factor, placer))
}

fn check_factor(replication_factor: usize, placer: &Placer) -> Result<(), Refused> {
    if replication_factor > placer.node_count() {
        return Err(not_enough_nodes(replication_factor, placer));
    }
    if replication_factor > REPLICAS_MAX {
        let message = format!("A partition can have {REPLICAS_MAX} replicas at most.");
        return Err(Refused::new(ErrorCode::INVALID_REPLICATION_FACTOR, message));
    }
    Ok(())
}

pub(super) fn not_enough_nodes(replication_factor: usize, placer: &Placer) -> Refused {
    let nodes = placer.node_count();
    let message = format!(
        "Unable to replicate the partition {replication_factor} time(s): The target replication factor of \
         {replication_factor} cannot be reached because only {nodes} broker(s) are registered."
    );
    Refused::new(ErrorCode::INVALID_REPLICATION_FACTOR, message)
}

pub(super) fn bad_assignment(message: impl Into<String>) -> Refused {
    Refused::new(ErrorCode::INVALID_REPLICA_ASSIGNMENT, message)
}

fn check_assignments(topic: &CreatableTopic, image: &MetadataImage) -> Result<Vec<Vec<i32>>, Refused> {
    if topic.replication_factor != -1 {
        let message =
            "A manual partition assignment was specified, but replication factor was not set to -1.";
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, message));
    }
    if topic.num_partitions != -1 {
        let message = "A manual partition assignment was specified, but numPartitions was not set to -1.";
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, message));
    }
    let factor = topic.assignments.first().map(|first| first.broker_ids.len());
    let mut by_index: BTreeMap<i32, &CreatableReplicaAssignment> = BTreeMap::new();
    for assignment in &topic.assignments {
        if by_index.insert(assignment.partition_index, assignment).is_some() {
            let message =
                format!("Found multiple manual assignments for partition {}.", assignment.partition_index);
            return Err(bad_assignment(message));
        }
        check_replicas(&assignment.broker_ids, factor, image)?;
    }
    if !by_index.keys().copied().eq(0..super::index_of(by_index.len())) {
        return Err(bad_assignment("Partitions should be a consecutive 0-based integer sequence."));
    }
    let ids = |one: &CreatableReplicaAssignment| one.broker_ids.iter().map(|id| id.0).collect();
    Ok(by_index.into_values().map(ids).collect())
}

/// Whether brokers may hold a partition, of a topic whose others have `factor` replicas.
pub(super) fn check_replicas(
    replicas: &[BrokerId],
    factor: Option<usize>,
    image: &MetadataImage,
) -> Result<(), Refused> {
    if replicas.is_empty() {
        return Err(bad_assignment("The manual partition assignment includes an empty replica list."));
    }
    let mut distinct = BTreeSet::new();
    for id in replicas.iter().map(|replica| replica.0) {
        if image.broker(id).is_none() {
            return Err(bad_assignment(format!(
                "The manual partition assignment includes broker {id}, but no such broker is registered."
            )));
        }
        if !distinct.insert(id) {
            return Err(bad_assignment(format!(
                "The manual partition assignment includes the broker {id} more than once."
            )));
        }
    }
    if replicas.len() > REPLICAS_MAX {
        return Err(bad_assignment(format!("A partition can have {REPLICAS_MAX} replicas at most.")));
    }
    if let Some(factor) = factor.filter(|factor| *factor != replicas.len()) {
        return Err(bad_assignment(format!(
            "The manual partition assignment includes a partition with {} replica(s), but this is not consistent with \
             previous partitions, which have {factor} replica(s).",
            replicas.len()
        )));
    }
    Ok(())
}

fn offsets_topic_configs(config: &BrokerConfig) -> BTreeMap<String, String> {
    // Group state decides who owns a partition, so it is never acknowledged before the disk has it.
    BTreeMap::from([
        ("cleanup.policy".to_string(), "compact".to_string()),
        ("compression.type".to_string(), "producer".to_string()),
        ("flumen.durability".to_string(), "durable".to_string()),
        ("segment.bytes".to_string(), config.offsets_topic_segment_bytes.to_string()),
    ])
}

/// Creates the topic of committed offsets; nothing when it exists. Fewer nodes than it should have replicas hold it
/// nevertheless: without it no group could be served.
pub fn plan_offsets_topic(
    image: &MetadataImage,
    config: &BrokerConfig,
    health: NodeHealth<'_>,
    id: Uuid,
) -> Vec<Command> {
    if image.topics.contains_key(OFFSETS_TOPIC) {
        return Vec::new();
    }
    let mut placer = Placer::new(image, health);
    let wanted = usize::try_from(config.offsets_topic_replication_factor).unwrap_or(1);
    let factor = wanted.clamp(1, REPLICAS_MAX).min(placer.node_count());
    let count = usize::try_from(config.offsets_topic_num_partitions).unwrap_or(1);
    let Some(assignments) = placer.place(&[], count, factor) else { return Vec::new() };
    let (name, configs) = (OFFSETS_TOPIC.to_string(), offsets_topic_configs(config));
    vec![Command::CreateTopic { name, id, assignments, configs }]
}

/// Creates a topic that a client asked for; nothing when it exists.
pub fn plan_auto_create(
    image: &MetadataImage,
    config: &BrokerConfig,
    health: NodeHealth<'_>,
    name: &str,
    id: Uuid,
) -> Result<Vec<Command>, Refused> {
    if image.topics.contains_key(name) {
        return Ok(Vec::new());
    }
    if name == OFFSETS_TOPIC {
        return Ok(plan_offsets_topic(image, config, health, id));
    }
    if !config.with_dynamic(image).auto_create_topics_enable {
        let message = format!("Topic '{name}' does not exist, and auto.create.topics.enable is false.");
        return Err(Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, message));
    }
    let asked = TopicToCreate { name, partitions: -1, replication_factor: -1, configs: &BTreeMap::new() };
    Ok(vec![plan_create_topic(image, config, health, asked, id)?])
}

/// A topic as callers ask for it that do not speak Kafka's protocol. -1 means the broker's default.
#[derive(Debug, Clone, Copy)]
pub struct TopicToCreate<'a> {
    pub name: &'a str,
    pub partitions: i32,
    pub replication_factor: i16,
    pub configs: &'a BTreeMap<String, String>,
}

pub fn plan_create_topic(
    image: &MetadataImage,
    config: &BrokerConfig,
    health: NodeHealth<'_>,
    asked: TopicToCreate<'_>,
    id: Uuid,
) -> Result<Command, Refused> {
    let TopicToCreate { name, partitions, replication_factor, configs } = asked;
    let config = config.with_dynamic(image);
    check_new_name(name, &BTreeSet::new(), image)?;
    let given = configs.iter().map(|(name, value)| (name.as_str(), Some(value.as_str())));
    let configs = check_new_configs(name, given, image, &config)?;
    let mut placer = Placer::new(image, health);
    let assignments =
        place_counts(partitions, replication_factor, &mut placer, PARTITIONS_PER_REQUEST_MAX, &config)?;
    Ok(NewTopic { assignments, configs }.command(name, id))
}

pub fn delete_topics(
    request: &DeleteTopicsRequest,
    version: i16,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> AdminPlan<DeleteTopicsResponse> {
    let enabled = config.with_dynamic(image).delete_topic_enable;
    let asked: Vec<(Option<&TopicName>, Uuid)> = if version >= 6 {
        request.topics.iter().map(|topic| (topic.name.as_ref(), topic.topic_id)).collect()
    } else {
        request.topic_names.iter().map(|name| (Some(name), Uuid::nil())).collect()
    };
    // A topic may be asked for twice, by its name and by its id as well.
    let resolved: Vec<Result<&Topic, Refused>> =
        asked.iter().map(|(name, id)| check_deletion(*name, *id, enabled, image)).collect();
    let twice: BTreeSet<Uuid> = {
        let mut seen = BTreeSet::new();
        let ids = resolved.iter().filter_map(|found| found.as_ref().ok().map(|topic| topic.id));
        ids.filter(|id| !seen.insert(*id)).collect()
    };
    let mut commands = Vec::new();
    let mut results = Vec::with_capacity(asked.len());
    let mut refused_twice = BTreeSet::new();
    let by_id: BTreeSet<Uuid> = asked.iter().map(|(_, id)| *id).filter(|id| !id.is_nil()).collect();
    for ((name, id), found) in asked.into_iter().zip(resolved) {
        if let Ok(topic) = &found
            && twice.contains(&topic.id)
        {
            // One answer for both.
            if refused_twice.insert(topic.id) {
                let refused = Refused::new(ErrorCode::INVALID_REQUEST, "Duplicate topic in the request.");
                results.push(
                    DeletableTopicResult::default()
                        .with_name(Some(TopicName(text(&topic.name))))
                        .with_topic_id(if by_id.contains(&topic.id) { topic.id } else { Uuid::nil() })
                        .with_error_code(refused.code.0)
                        .with_error_message(if version >= 5 { refused.text() } else { None }),
                );
            }
            continue;
        }
        let mut result = DeletableTopicResult::default().with_name(name.cloned());
        if version >= 6 {
            result.topic_id = id;
        }
        match found {
            Ok(topic) => {
                result.name = Some(TopicName(text(&topic.name)));
                if version >= 6 {
                    result.topic_id = topic.id;
                }
                commands.push(Command::DeleteTopic { id: topic.id });
            }
            Err(refused) => {
                result.error_code = refused.code.0;
                if version >= 5 {
                    result.error_message = refused.text();
                }
            }
        }
        results.push(result);
    }
    AdminPlan { response: DeleteTopicsResponse::default().with_responses(results), commands }
}

fn check_deletion<'a>(
    name: Option<&TopicName>,
    id: Uuid,
    enabled: bool,
    image: &'a MetadataImage,
) -> Result<&'a Topic, Refused> {
    let refuse = |code, message: &str| Err(Refused::new(code, message));
    if !enabled {
        return refuse(
            ErrorCode::TOPIC_DELETION_DISABLED,
            "Topic deletion is disabled (delete.topic.enable).",
        );
    }
    let topic = match name {
        Some(_) if !id.is_nil() => {
            return refuse(ErrorCode::INVALID_REQUEST, "You may not specify both topic name and topic id.");
        }
        None if id.is_nil() => {
            return refuse(ErrorCode::INVALID_REQUEST, "Neither topic name nor id were specified.");
        }
        Some(name) => match image.topics.get(name.as_str()) {
            Some(topic) => topic,
            None => {
                return refuse(
                    ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
                    "This server does not host this topic.",
                );
            }
        },
        None => match image.topic_by_id(&id) {
            Some(topic) => topic,
            None => return refuse(ErrorCode::UNKNOWN_TOPIC_ID, "This server does not host this topic ID."),
        },
    };
    if topic.internal {
        return refuse(
            ErrorCode::INVALID_REQUEST,
            "This topic is internal: it holds the state of all groups and cannot be deleted.",
        );
    }
    Ok(topic)
}

impl Fail for CreateTopicsResponse {
    fn fail(&mut self, error: ErrorCode) {
        for result in self.topics.iter_mut().filter(|result| result.error_code == 0) {
            *result = CreatableTopicResult::default()
                .with_error_message(None)
                .with_name(result.name.clone())
                .with_error_code(error.0)
                .with_num_partitions(-1)
                .with_replication_factor(-1)
                .with_configs(Some(Vec::new()));
        }
    }
}

impl Fail for DeleteTopicsResponse {
    fn fail(&mut self, error: ErrorCode) {
        for result in self.responses.iter_mut().filter(|result| result.error_code == 0) {
            result.error_code = error.0;
        }
    }
}
