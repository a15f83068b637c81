//! The cluster metadata: which topics exist, where their partitions live, what is configured.
//!
//! One writer applies commands; everybody else reads clones, which share what is large. Replicated state and the
//! node's own view of it (`node`, `static_configs`, `controller_epoch`) are kept apart: only the first is in a
//! snapshot.
//!
//! Invariants
//! - `topics` and `topic_ids` name the same topics.
//! - Group ids grow and are never reused: a deleted topic's log can never be taken for a new one's.
//! - A command either applies as a whole or leaves the image as it was.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use crate::assignment::{MovedPartition, PartitionInfo};
use crate::broker_config::BrokerConfig;
use crate::command::Command;
use crate::config_def::Layers;
use crate::nodes::{NODES_MAX, NodeRecord};
use crate::topic_config::TopicConfig;
use crate::topic_name;

/// Partitions of one topic: well over what one node can open, and small enough that a command cannot exhaust it.
pub const TOPIC_PARTITIONS_MAX: i32 = 100_000;
/// Producer ids in one block; a block is a few writes' worth, never a share of the whole space.
pub const PRODUCER_ID_BLOCK_MAX: i64 = 1_000_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    pub id: i32,
    pub host: String,
    pub port: u16,
    pub rack: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Topic {
    pub name: String,
    pub id: Uuid,
    pub partitions: Vec<PartitionInfo>,
    /// Overrides only, as committed.
    pub configs: BTreeMap<String, String>,
    /// What holds once overrides and broker defaults are put together.
    pub effective: Arc<TopicConfig>,
    pub internal: bool,
}

impl Topic {
    /// `None`: there is no such partition; clients send any number.
    pub fn partition(&self, index: i32) -> Option<&PartitionInfo> {
        self.partitions.get(usize::try_from(index).ok()?)
    }
}

#[derive(Debug, Clone)]
pub struct MetadataImage {
    pub cluster_id: String,
    /// Who reads this image.
    pub node: NodeInfo,
    /// Every registered node; empty as long as a broker knows of no cluster.
    pub nodes: Arc<BTreeMap<i32, NodeRecord>>,
    /// The version of the protocol between brokers that all nodes speak; 0 before any was agreed on.
    pub finalized_version: u16,
    /// Term of the metadata group, set by whoever leads it; not replicated state.
    pub controller_epoch: i32,
    pub topics: Arc<BTreeMap<String, Arc<Topic>>>,
    pub topic_ids: Arc<BTreeMap<Uuid, String>>,
    /// Raft group of the next partition. Starts at 1; 0 is the metadata group.
    pub next_group_id: u64,
    pub next_producer_id: i64,
    /// Dynamic configurations of all brokers.
    pub broker_configs: BTreeMap<String, String>,
    /// Dynamic configurations of single brokers, over those of all.
    pub node_configs: BTreeMap<i32, BTreeMap<String, String>>,
    /// Configurations of groups, by group id; only groups that have some.
    pub group_configs: Arc<BTreeMap<String, BTreeMap<String, String>>>,
    /// What this node's configuration file says; defaults of topics derive from it.
    pub(crate) static_configs: Arc<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedPartition {
    pub topic: String,
    pub topic_id: Uuid,
    pub partition: i32,
    pub group_id: u64,
    pub dir_name: String,
    pub replicas: Vec<i32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeletedPartition {
    pub topic: String,
    pub topic_id: Uuid,
    pub partition: i32,
    pub group_id: u64,
    pub dir_name: String,
}

/// What a command changed, for those who must make the world match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    pub created: Vec<CreatedPartition>,
    pub deleted: Vec<DeletedPartition>,
    /// Partitions that other nodes have to hold now.
    pub moved: Vec<MovedPartition>,
    /// A node was registered, removed or is in another state, or the finalized version is another.
    pub nodes_changed: bool,
    /// First id of the allocated block.
    pub producer_id_start: Option<i64>,
    /// The topic whose own configs were set.
    pub configs_changed: Option<String>,
    pub broker_configs_changed: bool,
    /// Every topic whose effective configuration is another now: the one above, or any number when a broker-level
    /// default moved.
    pub topics_reconfigured: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("the cluster already has the id {0}")]
    ClusterExists(String),
    #[error("topic '{0}' already exists")]
    TopicExists(String),
    #[error("topic id {0} is already in use")]
    TopicIdExists(Uuid),
    #[error("there is no topic with id {0}")]
    NoSuchTopic(Uuid),
    #[error("{0}")]
    BadName(String),
    #[error("{0} partitions are not possible: a topic has 1 to {TOPIC_PARTITIONS_MAX}")]
    BadPartitionCount(i32),
    #[error("topic '{topic}' has {has} partitions; {asked} would not be more")]
    NotMorePartitions { topic: String, has: usize, asked: i32 },
    #[error("replication factor {0} is not possible")]
    BadReplicationFactor(i16),
    #[error("a block of {0} producer ids is not possible")]
    BadProducerIdCount(i64),
    #[error("the ids are used up")]
    IdsExhausted,
    #[error("{0} is no node id")]
    BadNodeId(i32),
    #[error("there is no node {0}")]
    NoSuchNode(i32),
    #[error(
        "node {0} is known with another data directory: start it with that one, or give this one an id of its own"
    )]
    OtherDirectory(i32),
    #[error("a cluster has at most {NODES_MAX} nodes")]
    TooManyNodes,
    #[error("node {0} is the last one")]
    LastNode(i32),
    #[error("node {id} still holds {replicas} replica(s)")]
    NodeHoldsReplicas { id: i32, replicas: usize },
    #[error(
        "node {id} speaks version {speaks} of the protocol between brokers, and {finalized} is finalized"
    )]
    VersionTooOld { id: i32, speaks: u16, finalized: u16 },
    #[error("version {from} is finalized; {to} would go back")]
    VersionGoesBack { from: u16, to: u16 },
    #[error("the nodes {0:?} cannot hold a partition")]
    BadReplicas(Vec<i32>),
    #[error("topic '{topic}' has no partition {partition}")]
    NoSuchPartition { topic: String, partition: i32 },
    #[error("partition {topic}-{partition} is not to be there")]
    NotTheTarget { topic: String, partition: i32 },
}

/// Directory of a partition's log. The group id keeps a recreated topic apart from its predecessor.
pub fn dir_name(topic: &str, partition: i32, group_id: u64) -> String {
    format!("{topic}-{partition}.g{group_id}")
}

impl MetadataImage {
    pub fn empty(node: NodeInfo) -> Self {
        MetadataImage {
            cluster_id: String::new(),
            node,
            nodes: Arc::default(),
            finalized_version: 0,
            controller_epoch: 0,
            topics: Arc::default(),
            topic_ids: Arc::default(),
            next_group_id: 1,
            next_producer_id: 0,
            broker_configs: BTreeMap::new(),
            node_configs: BTreeMap::new(),
            group_configs: Arc::default(),
            static_configs: Arc::default(),
        }
    }

    /// Takes the node's configuration file into account, so that `log.retention.hours` and its like are defaults
    /// of every topic. Call it before commands are applied; later calls recompute.
    pub fn with_static_configs(mut self, config: &BrokerConfig) -> Self {
        self.static_configs = Arc::new(config.values.clone());
        self.reconfigure_all();
        self
    }

    pub fn topic_by_id(&self, id: &Uuid) -> Option<&Arc<Topic>> {
        self.topics.get(self.topic_ids.get(id)?)
    }

    pub fn partition_count(&self) -> usize {
        self.topics.values().map(|topic| topic.partitions.len()).sum()
    }

    /// Broker-level values in the order in which they count.
    pub(crate) fn layers(&self) -> Layers<'_> {
        Layers {
            node: self.node_configs.get(&self.node.id),
            cluster: &self.broker_configs,
            fixed: &self.static_configs,
        }
    }

    fn effective(&self, configs: &BTreeMap<String, String>) -> Arc<TopicConfig> {
        Arc::new(TopicConfig::resolve(configs, &self.layers()))
    }

    /// Deterministic: the outcome depends on the image and the command only. On error nothing has changed.
    pub fn apply(&mut self, command: &Command) -> Result<Applied, ApplyError> {
        match command {
            Command::ClusterCreated { cluster_id } => self.create_cluster(cluster_id),
            Command::CreateTopicAlone { name, id, partitions, replication_factor, configs } => {
                if *replication_factor < 1 {
                    return Err(ApplyError::BadReplicationFactor(*replication_factor));
                }
                self.create_topic(name, *id, &self.alone(*partitions)?, configs)
            }
            Command::CreateTopic { name, id, assignments, configs } => {
                self.create_topic(name, *id, assignments, configs)
            }
            Command::DeleteTopic { id } => self.delete_topic(*id),
            Command::CreatePartitionsAlone { topic_id, total } => {
                let more = self.more_alone(*topic_id, *total)?;
                self.create_partitions(*topic_id, &more)
            }
            Command::CreatePartitions { topic_id, assignments } => {
                self.create_partitions(*topic_id, assignments)
            }
            Command::SetTopicConfigs { topic_id, set } => self.set_topic_configs(*topic_id, set),
            Command::SetBrokerConfigs { node_id, set } => Ok(self.set_broker_configs(*node_id, set)),
            Command::AllocateProducerIds { count } => self.allocate_producer_ids(*count),
            Command::SetGroupConfigs { group, set } => Ok(self.set_group_configs(group, set)),
            Command::RegisterNode(record) => self.register_node(record),
            Command::RemoveNode { id } => self.remove_node(*id),
            Command::SetNodeState { id, state } => self.set_node_state(*id, *state),
            Command::SetReplicas { topic_id, partition, target } => {
                self.set_replicas(*topic_id, *partition, target.as_deref())
            }
            Command::ReplicasReached { topic_id, partition, replicas } => {
                self.replicas_reached(*topic_id, *partition, replicas)
            }
            Command::FinalizeVersion { version } => self.finalize_version(*version),
        }
    }

    fn create_cluster(&mut self, cluster_id: &str) -> Result<Applied, ApplyError> {
        if !self.cluster_id.is_empty() && self.cluster_id != cluster_id {
            return Err(ApplyError::ClusterExists(self.cluster_id.clone()));
        }
        self.cluster_id = cluster_id.to_string();
        Ok(Applied::default())
    }

    /// The founder's own replicas; which one it is becomes certain when the first node is registered.
    fn alone(&self, partitions: i32) -> Result<Vec<Vec<i32>>, ApplyError> {
        if !(1..=TOPIC_PARTITIONS_MAX).contains(&partitions) {
            return Err(ApplyError::BadPartitionCount(partitions));
        }
        let founder = self.nodes.keys().next().copied().unwrap_or(self.node.id);
        Ok((0..partitions).map(|_| vec![founder]).collect())
    }

    fn more_alone(&self, id: Uuid, total: i32) -> Result<Vec<Vec<i32>>, ApplyError> {
        let topic = self.find(id)?;
        if total > TOPIC_PARTITIONS_MAX {
            return Err(ApplyError::BadPartitionCount(total));
        }
        let has = topic.partitions.len();
        let added = i32::try_from(has).ok().and_then(|has| total.checked_sub(has)).filter(|added| *added > 0);
        let not_more = || ApplyError::NotMorePartitions { topic: topic.name.clone(), has, asked: total };
        self.alone(added.ok_or_else(not_more)?)
    }

    fn create_topic(
        &mut self,
        name: &str,
        id: Uuid,
        assignments: &[Vec<i32>],
        configs: &BTreeMap<String, String>,
    ) -> Result<Applied, ApplyError> {
        topic_name::check(name).map_err(ApplyError::BadName)?;
        if self.topics.contains_key(name) {
            return Err(ApplyError::TopicExists(name.to_string()));
        }
        if id.is_nil() || self.topic_ids.contains_key(&id) {
            return Err(ApplyError::TopicIdExists(id));
        }
        let mut topic = Topic {
            name: name.to_string(),
            id,
            partitions: Vec::new(),
            effective: self.effective(configs),
            configs: configs.clone(),
            internal: topic_name::is_internal(name),
        };
        let created = self.grow(&mut topic, assignments)?;
        Arc::make_mut(&mut self.topic_ids).insert(id, topic.name.clone());
        Arc::make_mut(&mut self.topics).insert(topic.name.clone(), Arc::new(topic));
        Ok(Applied { created, ..Applied::default() })
    }

    /// Gives the topic one partition for each assignment, with the next group ids.
    fn grow(
        &mut self,
        topic: &mut Topic,
        assignments: &[Vec<i32>],
    ) -> Result<Vec<CreatedPartition>, ApplyError> {
        let from = topic.partitions.len();
        let total = from.saturating_add(assignments.len());
        let total = i32::try_from(total).ok().filter(|total| (1..=TOPIC_PARTITIONS_MAX).contains(total));
        let total = total
            .ok_or(ApplyError::BadPartitionCount(i32::try_from(assignments.len()).unwrap_or(i32::MAX)))?;
        for replicas in assignments {
            self.check_replicas(replicas)?;
        }
        let end = self.next_group_id.checked_add(assignments.len() as u64).ok_or(ApplyError::IdsExhausted)?;
        let mut created = Vec::with_capacity(assignments.len());
        let indexes = total - i32::try_from(assignments.len()).unwrap_or(0)..total;
        for ((partition, group_id), replicas) in indexes.zip(self.next_group_id..end).zip(assignments) {
            topic.partitions.push(PartitionInfo::at_rest(group_id, replicas.clone()));
            created.push(CreatedPartition {
                topic: topic.name.clone(),
                topic_id: topic.id,
                partition,
                group_id,
                dir_name: dir_name(&topic.name, partition, group_id),
                replicas: replicas.clone(),
            });
        }
        self.next_group_id = end;
        Ok(created)
    }

    fn find(&self, id: Uuid) -> Result<Arc<Topic>, ApplyError> {
        self.topic_by_id(&id).cloned().ok_or(ApplyError::NoSuchTopic(id))
    }

    fn delete_topic(&mut self, id: Uuid) -> Result<Applied, ApplyError> {
        let topic = self.find(id)?;
        let deleted = (0i32..)
            .zip(&topic.partitions)
            .map(|(partition, info)| DeletedPartition {
                topic: topic.name.clone(),
                topic_id: id,
                partition,
                group_id: info.group_id,
                dir_name: dir_name(&topic.name, partition, info.group_id),
            })
            .collect();
        Arc::make_mut(&mut self.topics).remove(&topic.name);
        Arc::make_mut(&mut self.topic_ids).remove(&id);
        Ok(Applied { deleted, ..Applied::default() })
    }

    fn create_partitions(&mut self, id: Uuid, assignments: &[Vec<i32>]) -> Result<Applied, ApplyError> {
        let mut topic = (*self.find(id)?).clone();
        if assignments.is_empty() {
            let has = topic.partitions.len();
            let asked = i32::try_from(has).unwrap_or(i32::MAX);
            return Err(ApplyError::NotMorePartitions { topic: topic.name, has, asked });
        }
        let created = self.grow(&mut topic, assignments)?;
        Arc::make_mut(&mut self.topics).insert(topic.name.clone(), Arc::new(topic));
        Ok(Applied { created, ..Applied::default() })
    }

    fn set_topic_configs(
        &mut self,
        id: Uuid,
        set: &BTreeMap<String, Option<String>>,
    ) -> Result<Applied, ApplyError> {
        let mut topic = (*self.find(id)?).clone();
        merge(&mut topic.configs, set);
        topic.effective = self.effective(&topic.configs);
        let name = topic.name.clone();
        Arc::make_mut(&mut self.topics).insert(name.clone(), Arc::new(topic));
        Ok(Applied {
            configs_changed: Some(name.clone()),
            topics_reconfigured: vec![name],
            ..Applied::default()
        })
    }

    fn set_broker_configs(
        &mut self,
        node_id: Option<i32>,
        set: &BTreeMap<String, Option<String>>,
    ) -> Applied {
        match node_id {
            None => merge(&mut self.broker_configs, set),
            Some(id) => {
                let of_node = self.node_configs.entry(id).or_default();
                merge(of_node, set);
                if of_node.is_empty() {
                    self.node_configs.remove(&id);
                }
            }
        }
        let topics_reconfigured = self.reconfigure_all();
        Applied { broker_configs_changed: true, topics_reconfigured, ..Applied::default() }
    }

    fn set_group_configs(&mut self, group: &str, set: &BTreeMap<String, Option<String>>) -> Applied {
        let groups = Arc::make_mut(&mut self.group_configs);
        let of_group = groups.entry(group.to_string()).or_default();
        merge(of_group, set);
        if of_group.is_empty() {
            groups.remove(group);
        }
        Applied::default()
    }

    /// Recomputes what derives from broker-level values; returns the topics for which it matters.
    pub(crate) fn reconfigure_all(&mut self) -> Vec<String> {
        let changed: Vec<(String, Arc<TopicConfig>)> = self
            .topics
            .values()
            .map(|topic| (topic, self.effective(&topic.configs)))
            .filter(|(topic, effective)| topic.effective != *effective)
            .map(|(topic, effective)| (topic.name.clone(), effective))
            .collect();
        if changed.is_empty() {
            return Vec::new();
        }
        let topics = Arc::make_mut(&mut self.topics);
        let mut names = Vec::with_capacity(changed.len());
        for (name, effective) in changed {
            if let Some(topic) = topics.get_mut(&name) {
                Arc::make_mut(topic).effective = effective;
                names.push(name);
            }
        }
        names
    }

    fn allocate_producer_ids(&mut self, count: i64) -> Result<Applied, ApplyError> {
        if !(1..=PRODUCER_ID_BLOCK_MAX).contains(&count) {
            return Err(ApplyError::BadProducerIdCount(count));
        }
        let start = self.next_producer_id;
        self.next_producer_id = start.checked_add(count).ok_or(ApplyError::IdsExhausted)?;
        Ok(Applied { producer_id_start: Some(start), ..Applied::default() })
    }
}

fn merge(into: &mut BTreeMap<String, String>, set: &BTreeMap<String, Option<String>>) {
    for (key, value) in set {
        match value {
            Some(value) => drop(into.insert(key.clone(), value.clone())),
            None => drop(into.remove(key)),
        }
    }
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
