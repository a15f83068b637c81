//! Changing and describing topics: the one way for Kafka requests and the admin API alike.
//!
//! Plans are made on the controller's shard against the image of that moment; see `controller`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use flumen_metadata::admin::{self, Fail, Live, PartitionStatus, Refused, TopicToCreate};
use flumen_metadata::{BrokerConfig, Command, MetadataImage};
use flumen_protocol::error_code::ErrorCode;
use uuid::Uuid;

use crate::controller::ControlError;
use crate::node::Node;

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TopicError {
    pub code: ErrorCode,
    pub message: String,
}

impl From<Refused> for TopicError {
    fn from(refused: Refused) -> TopicError {
        TopicError { code: refused.code, message: refused.message }
    }
}

impl From<ControlError> for TopicError {
    fn from(error: ControlError) -> TopicError {
        TopicError { code: error.code(), message: error.to_string() }
    }
}

/// Plans on the controller, commits, and makes the answer a failure when the commit is one.
pub async fn commit_plan<R: Fail + Send + 'static>(
    node: &Node,
    plan: impl FnOnce(&MetadataImage, &BrokerConfig) -> (R, Vec<Command>) + Send + 'static,
) -> Result<R, ErrorCode> {
    node.controller()
        .run(move |shard| async move {
            let (mut response, outcome) = shard.controller().change(plan).await;
            if let Err(error) = outcome {
                tracing::warn!(%error, "metadata change failed");
                response.fail(error.code());
            }
            response
        })
        .await
        .map_err(|_| ErrorCode::NOT_CONTROLLER)
}

async fn commit(
    node: &Node,
    plan: impl FnOnce(&MetadataImage, &BrokerConfig) -> Result<Vec<Command>, Refused> + Send + 'static,
) -> Result<(), TopicError> {
    let stopped =
        |_| TopicError { code: ErrorCode::NOT_CONTROLLER, message: "the broker is stopping".to_string() };
    node.controller()
        .run(move |shard| async move {
            let (refused, outcome) = shard
                .controller()
                .change(|image, config| match plan(image, config) {
                    Ok(commands) => (None, commands),
                    Err(refused) => (Some(refused), Vec::new()),
                })
                .await;
            match refused {
                Some(refused) => Err(TopicError::from(refused)),
                None => outcome.map(drop).map_err(TopicError::from),
            }
        })
        .await
        .map_err(stopped)?
}

pub async fn create_topic(
    node: &Node,
    name: &str,
    partitions: i32,
    replication_factor: i16,
    configs: BTreeMap<String, String>,
) -> Result<(), TopicError> {
    let (name, id) = (name.to_string(), Uuid::new_v4());
    let up = node.is_up();
    commit(node, move |image, config| {
        let asked = TopicToCreate { name: &name, partitions, replication_factor, configs: &configs };
        admin::plan_create_topic(image, config, &up, asked, id).map(|command| vec![command])
    })
    .await
}

/// Creates a topic that a client named and that does not exist, with the broker's defaults.
pub async fn auto_create(node: &Node, name: &str) -> Result<(), TopicError> {
    let (name, id) = (name.to_string(), Uuid::new_v4());
    let up = node.is_up();
    commit(node, move |image, config| admin::plan_auto_create(image, config, &up, &name, id)).await
}

fn unknown(topic: &str) -> Refused {
    Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, format!("topic '{topic}' does not exist"))
}

pub async fn delete_topic(node: &Node, topic: &str) -> Result<(), TopicError> {
    let topic = topic.to_string();
    commit(node, move |image, config| {
        let found = image.topics.get(&topic).ok_or_else(|| unknown(&topic))?;
        if !config.with_dynamic(image).delete_topic_enable {
            return Err(Refused::new(ErrorCode::TOPIC_DELETION_DISABLED, "delete.topic.enable is false"));
        }
        if found.internal {
            return Err(Refused::new(
                ErrorCode::INVALID_TOPIC_EXCEPTION,
                "internal topics cannot be deleted",
            ));
        }
        Ok(vec![Command::DeleteTopic { id: found.id }])
    })
    .await
}

pub async fn create_partitions(node: &Node, topic: &str, total: i32) -> Result<(), TopicError> {
    let topic = topic.to_string();
    let up = node.is_up();
    commit(node, move |image, _| {
        admin::plan_partitions(image, &up, &topic, total).map(|command| vec![command])
    })
    .await
}

pub async fn alter_configs(
    node: &Node,
    topic: &str,
    changes: BTreeMap<String, Option<String>>,
) -> Result<(), TopicError> {
    let topic = topic.to_string();
    commit(node, move |image, config| admin::plan_topic_configs(image, config, &topic, &changes)).await
}

/// (name, value, source) of every configuration of a topic.
pub fn described_configs(node: &Arc<Node>, topic: &str) -> Vec<(String, String, String)> {
    let image = node.image.load();
    let Some(found) = image.topics.get(topic) else { return Vec::new() };
    admin::topic_configs(&found.configs, &image, &node.config)
        .into_iter()
        .map(|c| (c.name.to_string(), c.value.unwrap_or_default(), format!("{:?}", c.source).to_uppercase()))
        .collect()
}

/// What the metadata cannot know of a partition.
pub fn status_of(node: &Node, group_id: u64) -> PartitionStatus {
    let gauges = node.gauges_of(group_id);
    PartitionStatus {
        leader_id: node.config.node_id,
        in_sync: None,
        leader_epoch: gauges.leader_epoch.load(Ordering::Relaxed),
        damaged: gauges.damaged.load(Ordering::Relaxed) != 0,
        size_bytes: i64::try_from(gauges.size_bytes.load(Ordering::Relaxed)).unwrap_or(i64::MAX),
    }
}

/// What answers need to know of the cluster beside the metadata.
pub fn with_live<R>(node: &Node, answer: impl FnOnce(Live<'_>) -> R) -> R {
    let up = node.is_up();
    answer(Live { controller_id: node.config.node_id, status: &|group| status_of(node, group), is_up: &up })
}
