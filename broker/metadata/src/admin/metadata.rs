//! Metadata 0-13: topics by name or id, brokers, leaders. Names the topics that should be created on demand.

use std::collections::BTreeSet;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{BrokerId, MetadataRequest, MetadataResponse, TopicName};
use kafka_protocol::protocol::StrBytes;

use super::{CLUSTER_OPERATIONS, Live, OPERATIONS_NOT_ASKED, TOPIC_OPERATIONS, index_of, text};
use crate::broker_config::BrokerConfig;
use crate::image::{MetadataImage, Topic};
use crate::topic_name;

/// Topics may be asked for by id from this version on; 10 and 11 carry ids that must be zero.
const BY_ID_MIN_VERSION: i16 = 12;
/// Clients say whether topics may be created from here on; before, they always may.
const AUTO_CREATE_FLAG_MIN_VERSION: i16 = 4;

/// Topics that one request may bring into being; clients ask again for the others, which by then are fewer.
pub const AUTO_CREATE_PER_REQUEST_MAX: usize = 1000;

#[derive(Debug, Clone, PartialEq)]
pub struct MetadataPlan {
    pub response: MetadataResponse,
    /// Names to create with [`super::plan_auto_create`]; the caller then asks again against the new image. Valid,
    /// distinct, free of collisions with topics that exist.
    pub to_create: Vec<String>,
}

pub fn metadata(
    request: &MetadataRequest,
    version: i16,
    image: &MetadataImage,
    config: &BrokerConfig,
    live: Live<'_>,
) -> MetadataPlan {
    let asked = request.topics.as_deref();
    let all = match asked {
        None => true,
        Some(topics) => version == 0 && topics.is_empty(),
    };
    let mut answer = Answer {
        version,
        image,
        live,
        operations: if request.include_topic_authorized_operations && version >= 8 {
            TOPIC_OPERATIONS
        } else {
            OPERATIONS_NOT_ASKED
        },
        may_create: (version < AUTO_CREATE_FLAG_MIN_VERSION || request.allow_auto_topic_creation)
            && config.may_auto_create(image),
        to_create: BTreeSet::new(),
    };
    let topics = if all {
        image.topics.values().map(|topic| answer.found(topic)).collect()
    } else {
        let mut seen = BTreeSet::new();
        asked
            .unwrap_or_default()
            .iter()
            .filter(|topic| seen.insert((topic.topic_id, topic.name.as_deref().map(|name| name.as_bytes()))))
            .map(|topic| answer.asked(topic))
            .collect()
    };
    let mut response = MetadataResponse::default()
        .with_brokers(
            live.brokers(image)
                .into_iter()
                .map(|broker| {
                    MetadataResponseBroker::default()
                        .with_node_id(BrokerId(broker.id))
                        .with_host(text(broker.host))
                        .with_port(i32::from(broker.port))
                        .with_rack(broker.rack.map(text))
                })
                .collect(),
        )
        .with_cluster_id(Some(text(&image.cluster_id)))
        .with_controller_id(BrokerId(live.controller_id))
        .with_topics(topics);
    if request.include_cluster_authorized_operations && (8..=10).contains(&version) {
        response.cluster_authorized_operations = CLUSTER_OPERATIONS;
    }
    MetadataPlan { response, to_create: answer.to_create.into_iter().collect() }
}

struct Answer<'a> {
    version: i16,
    image: &'a MetadataImage,
    live: Live<'a>,
    operations: i32,
    may_create: bool,
    to_create: BTreeSet<String>,
}

impl Answer<'_> {
    fn asked(&mut self, topic: &MetadataRequestTopic) -> MetadataResponseTopic {
        let by_id = !topic.topic_id.is_nil();
        if by_id && self.version < BY_ID_MIN_VERSION {
            return self.failed(topic, ErrorCode::INVALID_REQUEST);
        }
        if by_id {
            return match self.image.topic_by_id(&topic.topic_id) {
                Some(found) => self.found(found),
                None => self.failed(topic, ErrorCode::UNKNOWN_TOPIC_ID),
            };
        }
        let Some(name) = &topic.name else { return self.failed(topic, ErrorCode::INVALID_REQUEST) };
        if let Some(found) = self.image.topics.get(name.as_str()) {
            return self.found(found);
        }
        let collides = || topic_name::collision(name, self.image.topics.keys()).is_some();
        if topic_name::check(name).is_err() || (self.may_create && collides()) {
            return self.failed(topic, ErrorCode::INVALID_TOPIC_EXCEPTION);
        }
        let room = self.to_create.len() < AUTO_CREATE_PER_REQUEST_MAX;
        if self.may_create && room && name.as_str() != topic_name::METADATA_TOPIC {
            self.to_create.insert(name.to_string());
        }
        self.failed(topic, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)
    }

    fn failed(&self, topic: &MetadataRequestTopic, error: ErrorCode) -> MetadataResponseTopic {
        let name = match &topic.name {
            Some(name) => Some(name.clone()),
            None if self.version >= BY_ID_MIN_VERSION => None,
            None => Some(TopicName(StrBytes::new())),
        };
        let internal = name.as_deref().is_some_and(|name| topic_name::is_internal(name));
        MetadataResponseTopic::default()
            .with_error_code(error.0)
            .with_name(name)
            .with_topic_id(topic.topic_id)
            .with_is_internal(internal)
            .with_topic_authorized_operations(OPERATIONS_NOT_ASKED)
    }

    fn found(&self, topic: &Topic) -> MetadataResponseTopic {
        let partitions = topic
            .partitions
            .iter()
            .enumerate()
            .map(|(index, info)| {
                let mut found = self.live.describe(info, self.image);
                let mut error = found.error();
                if self.version == 0 && !found.offline.is_empty() {
                    // Which replicas are offline has no field yet, and clients look every replica up among the brokers.
                    found.replicas.retain(|id| !found.offline.contains(id));
                    if error == ErrorCode::NONE {
                        error = ErrorCode::REPLICA_NOT_AVAILABLE;
                    }
                }
                MetadataResponsePartition::default()
                    .with_error_code(error.0)
                    .with_partition_index(index_of(index))
                    .with_leader_id(BrokerId(found.leader_id))
                    .with_leader_epoch(found.leader_epoch)
                    .with_replica_nodes(found.replicas)
                    .with_isr_nodes(found.in_sync)
                    .with_offline_replicas(found.offline)
            })
            .collect();
        MetadataResponseTopic::default()
            .with_name(Some(TopicName(text(&topic.name))))
            .with_topic_id(topic.id)
            .with_is_internal(topic.internal)
            .with_partitions(partitions)
            .with_topic_authorized_operations(self.operations)
    }
}
