//! Changing and describing topics: the one way for Kafka requests and the admin API alike.
//!
//! Plans are made on the controller's shard against the image of that moment; see `controller`.

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use flumen_metadata::admin::{self, Fail, Live, PartitionStatus, Refused};
use flumen_metadata::{BrokerConfig, Command, MetadataImage, PartitionInfo};
use flumen_protocol::error_code::ErrorCode;

use crate::cluster::change::{Intent, change};
use crate::controller::{ControlError, METADATA_GROUP};
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

async fn commit(node: &Node, intent: Intent) -> Result<(), TopicError> {
    change(node, intent).await.map(drop)
}

pub async fn create_topic(
    node: &Node,
    name: &str,
    partitions: i32,
    replication_factor: i16,
    configs: BTreeMap<String, String>,
) -> Result<(), TopicError> {
    let name = name.to_string();
    commit(node, Intent::CreateTopic { name, partitions, replication_factor, configs }).await
}

/// Creates a topic that a client named and that does not exist, with the broker's defaults.
pub async fn auto_create(node: &Node, name: &str) -> Result<(), TopicError> {
    commit(node, Intent::AutoCreate { name: name.to_string() }).await
}

fn unknown(topic: &str) -> Refused {
    Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, format!("topic '{topic}' does not exist"))
}

pub async fn delete_topic(node: &Node, topic: &str) -> Result<(), TopicError> {
    commit(node, Intent::DeleteTopic { topic: topic.to_string() }).await
}

pub fn plan_deletion(image: &MetadataImage, config: &BrokerConfig, topic: &str) -> Result<Command, Refused> {
    let found = image.topics.get(topic).ok_or_else(|| unknown(topic))?;
    if !config.with_dynamic(image).delete_topic_enable {
        return Err(Refused::new(ErrorCode::TOPIC_DELETION_DISABLED, "delete.topic.enable is false"));
    }
    if found.internal {
        return Err(Refused::new(ErrorCode::INVALID_TOPIC_EXCEPTION, "internal topics cannot be deleted"));
    }
    Ok(Command::DeleteTopic { id: found.id })
}

pub async fn create_partitions(node: &Node, topic: &str, total: i32) -> Result<(), TopicError> {
    commit(node, Intent::CreatePartitions { topic: topic.to_string(), total }).await
}

pub async fn alter_configs(
    node: &Node,
    topic: &str,
    changes: BTreeMap<String, Option<String>>,
) -> Result<(), TopicError> {
    commit(node, Intent::AlterTopic { topic: topic.to_string(), changes }).await
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
    let own = node.config.node_id;
    let (leader_id, leader_epoch) = match &node.cluster {
        None => (own, gauges.leader_epoch.load(Ordering::Relaxed)),
        Some(cluster) => match node.leaders.get(group_id) {
            Some((leader, epoch)) if leader == own || cluster.members.is_reachable(leader) => (leader, epoch),
            Some((_, epoch)) => (-1, epoch),
            None => (-1, 0),
        },
    };
    // Where no leader was ever heard of, nobody is known to be in sync.
    let everybody = || node.image.load().nodes.keys().copied().collect();
    PartitionStatus {
        leader_id,
        lagging: node.leaders.lagging(group_id).unwrap_or_else(everybody),
        leader_epoch,
        // A replica that is damaged here is no matter to whoever asks for its leader elsewhere.
        damaged: gauges.damaged.load(Ordering::Relaxed) != 0 && (node.cluster.is_none() || leader_id == own),
        size_bytes: i64::try_from(gauges.size_bytes.load(Ordering::Relaxed)).unwrap_or(i64::MAX),
    }
}

/// What answers need to know of the cluster beside the metadata.
///
/// A node that hears no majority of those who decide about the metadata is the one that is cut off, and so is most likely one that had
/// to give up what it led. It must not tell clients that there is nobody else, or that nobody leads: librdkafka asks whom it is
/// connected to, and would stay with it. So all nodes are named then, and whoever led last, or else some other replica, is named as
/// the leader: a client that goes there hears what is true.
pub fn with_live<R>(node: &Node, answer: impl FnOnce(Live<'_>) -> R) -> R {
    let reachable = node.is_reachable();
    let (image, own) = (node.image.load(), node.config.node_id);
    let is_cut_off = node.cluster.as_ref().is_some_and(|cluster| cluster.members.is_cut_off(own));
    let up = |id: i32| is_cut_off || reachable(id);
    let controller_id = match &node.cluster {
        None => node.config.node_id,
        Some(_) => node.leaders.get(METADATA_GROUP).map_or(-1, |(leader, _)| leader),
    };
    let others: LazyCell<HashMap<u64, i32>, _> = LazyCell::new(|| {
        let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
        let other = |p: &PartitionInfo| p.holders().into_iter().find(|id| *id != own && up(*id));
        partitions.filter_map(|p| Some((p.group_id, other(p)?))).collect()
    });
    let status = |group: u64| {
        let mut status = status_of(node, group);
        if status.leader_id < 0 && (is_cut_off || node.leaders.is_given_up(group)) {
            let last = node.leaders.get(group).map(|(leader, _)| leader).filter(|id| *id >= 0 && *id != own);
            status.leader_id = last.or_else(|| others.get(&group).copied()).unwrap_or(-1);
        }
        status
    };
    answer(Live { controller_id, status: &status, is_up: &up })
}
