//! Admin requests as pure functions: decoded request, image and configuration in; answer and commands out.
//!
//! The answer is what to send once the commands are committed. When they cannot be, [`Fail::fail`] rewrites what
//! would have succeeded. Nothing here proposes or waits.
//!
//! The generated responses default to empty text where Kafka sends null, so every success sets its message to none.

mod api_versions;
mod cluster;
mod config_alter;
mod config_describe;
mod config_resources;
mod elections;
mod log_dirs;
mod metadata;
mod partitions;
mod principals;
mod quorum;
mod reassignments;
mod topic_partitions;
mod topics;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::BrokerId;
use kafka_protocol::protocol::StrBytes;

pub use api_versions::{answer_api_versions, api_versions};
pub use cluster::describe_cluster;
pub use config_alter::{alter_configs, incremental_alter_configs, plan_broker_configs, plan_topic_configs};
pub use config_describe::{ConfigSynonym, DescribedConfig, broker_configs, describe_configs, topic_configs};
pub use config_resources::list_config_resources;
pub use elections::{ElectionPlan, LeaderTransfer, elect_leaders};
pub use log_dirs::{LogDir, describe_log_dirs};
pub use metadata::{MetadataPlan, metadata};
pub use partitions::{create_partitions, plan_partitions};
pub use principals::{
    alter_client_quotas, describe_acls, describe_client_quotas, describe_user_scram_credentials,
};
pub use quorum::{QuorumReplica, QuorumState, describe_quorum};
pub use reassignments::{alter_partition_reassignments, list_partition_reassignments};
pub use topic_partitions::describe_topic_partitions;
pub use topics::{
    PARTITIONS_PER_REQUEST_MAX, TopicToCreate, create_topics, delete_topics, plan_auto_create,
    plan_create_topic, plan_offsets_topic,
};

use crate::assignment::PartitionInfo;
use crate::command::Command;
use crate::image::MetadataImage;
use crate::nodes::Broker;

/// Sent where a client did not ask which operations it may do.
const OPERATIONS_NOT_ASKED: i32 = i32::MIN;
/// Read, Write, Create, Delete, Alter, Describe, DescribeConfigs, AlterConfigs: without an authorizer, all.
const TOPIC_OPERATIONS: i32 = 0b1101_1111_1000;
/// Create, Alter, Describe, ClusterAction, DescribeConfigs, AlterConfigs, IdempotentWrite.
const CLUSTER_OPERATIONS: i32 = 0b1_1111_1010_0000;

/// An answer, and the commands that must be committed before it is true.
#[derive(Debug, Clone, PartialEq)]
pub struct AdminPlan<R> {
    pub response: R,
    pub commands: Vec<Command>,
}

impl<R> AdminPlan<R> {
    pub fn into_parts(self) -> (R, Vec<Command>) {
        (self.response, self.commands)
    }
}

/// An answer whose commands could not be committed.
pub trait Fail {
    /// Turns every success into `error`; failures keep their reason.
    fn fail(&mut self, error: ErrorCode);
}

/// Why one topic or resource of a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub code: ErrorCode,
    pub message: String,
}

impl Refused {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Refused { code, message: message.into() }
    }

    fn text(&self) -> Option<StrBytes> {
        Some(StrBytes::from_string(self.message.clone()))
    }
}

/// What the shell knows of a partition and the metadata does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionStatus {
    /// -1 while nobody is known to lead.
    pub leader_id: i32,
    pub leader_epoch: i32,
    /// Replicas that are behind, as the leader says; the others that run are in sync.
    pub lagging: Vec<i32>,
    /// The log on this node refuses to serve.
    pub damaged: bool,
    /// Of the log on this node.
    pub size_bytes: i64,
}

impl Default for PartitionStatus {
    fn default() -> Self {
        PartitionStatus { leader_id: -1, leader_epoch: 0, lagging: Vec::new(), damaged: false, size_bytes: 0 }
    }
}

/// Looks a partition up by its Raft group.
pub type StatusOf<'a> = &'a dyn Fn(u64) -> PartitionStatus;
/// Whether a node runs, as far as this one can tell.
pub type IsUp<'a> = &'a dyn Fn(i32) -> bool;

/// What the shell knows of the cluster and the metadata does not.
#[derive(Clone, Copy)]
pub struct Live<'a> {
    /// Who leads the metadata group; -1 while nobody is known to.
    pub controller_id: i32,
    pub status: StatusOf<'a>,
    pub is_up: IsUp<'a>,
}

impl Live<'_> {
    /// Nodes that clients may be sent to.
    fn brokers<'i>(&self, image: &'i MetadataImage) -> Vec<Broker<'i>> {
        let mut brokers = image.brokers();
        brokers.retain(|broker| (self.is_up)(broker.id));
        brokers
    }

    pub(crate) fn describe(&self, info: &PartitionInfo, image: &MetadataImage) -> Described {
        let status = (self.status)(info.group_id);
        let replicas = info.holders();
        // A damaged log is as good as a node that is down; clients keep asking until it is mended.
        let is_offline = |id: &i32| !(self.is_up)(*id) || (status.damaged && *id == image.node.id);
        let offline: Vec<i32> = replicas.iter().copied().filter(|id| is_offline(id)).collect();
        let leads = replicas.contains(&status.leader_id) && !offline.contains(&status.leader_id);
        // Those that a move brings are none before it has come to its end, however much they have.
        let is_in_sync =
            |id: &i32| info.replicas.contains(id) && !status.lagging.contains(id) && !offline.contains(id);
        let in_sync = replicas.iter().copied().filter(is_in_sync).map(BrokerId).collect();
        Described {
            leader_id: if leads { status.leader_id } else { -1 },
            leader_epoch: status.leader_epoch,
            in_sync,
            offline: offline.into_iter().map(BrokerId).collect(),
            replicas: replicas.into_iter().map(BrokerId).collect(),
        }
    }
}

/// A partition as clients are told of it.
pub(crate) struct Described {
    /// -1 when nobody who runs leads it.
    pub(crate) leader_id: i32,
    leader_epoch: i32,
    replicas: Vec<BrokerId>,
    pub(crate) in_sync: Vec<BrokerId>,
    offline: Vec<BrokerId>,
}

impl Described {
    fn error(&self) -> ErrorCode {
        if self.leader_id < 0 { ErrorCode::LEADER_NOT_AVAILABLE } else { ErrorCode::NONE }
    }
}

fn partition_of<'a>(image: &'a MetadataImage, topic: &str, index: i32) -> Result<&'a PartitionInfo, Refused> {
    let unknown = |message| Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, message);
    let found =
        image.topics.get(topic).ok_or_else(|| unknown(format!("Unable to find a topic named {topic}.")))?;
    found.partition(index).ok_or_else(|| unknown(format!("Unable to find partition {topic}:{index}.")))
}

fn text(value: &str) -> StrBytes {
    StrBytes::from_string(value.to_string())
}

fn index_of(position: usize) -> i32 {
    i32::try_from(position).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests_cluster;
#[cfg(test)]
mod tests_configs;
#[cfg(test)]
mod tests_metadata;
#[cfg(test)]
mod tests_operations;
#[cfg(test)]
mod tests_topics;
