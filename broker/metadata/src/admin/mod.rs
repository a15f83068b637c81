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
mod log_dirs;
mod metadata;
mod operations;
mod partitions;
mod principals;
mod topic_partitions;
mod topics;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::protocol::StrBytes;

pub use api_versions::{answer_api_versions, api_versions};
pub use cluster::{describe_cluster, find_coordinator};
pub use config_alter::{alter_configs, incremental_alter_configs, plan_topic_configs};
pub use config_describe::{ConfigSynonym, DescribedConfig, broker_configs, describe_configs, topic_configs};
pub use log_dirs::{LogDir, describe_log_dirs};
pub use metadata::{MetadataPlan, metadata};
pub use operations::{
    QuorumState, alter_partition_reassignments, describe_quorum, elect_leaders, list_config_resources,
    list_partition_reassignments,
};
pub use partitions::create_partitions;
pub use principals::{
    alter_client_quotas, describe_acls, describe_client_quotas, describe_user_scram_credentials,
};
pub use topic_partitions::describe_topic_partitions;
pub use topics::{
    PARTITIONS_PER_REQUEST_MAX, create_topics, delete_topics, plan_auto_create, plan_create_topic,
    plan_offsets_topic,
};

use crate::command::Command;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PartitionStatus {
    pub leader_epoch: i32,
    /// Its log refuses to serve.
    pub damaged: bool,
    pub size_bytes: i64,
}

/// Looks a partition up by its Raft group.
pub type StatusOf<'a> = &'a dyn Fn(u64) -> PartitionStatus;

fn text(value: &str) -> StrBytes {
    StrBytes::from_string(value.to_string())
}

fn index_of(position: usize) -> i32 {
    i32::try_from(position).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests_configs;
#[cfg(test)]
mod tests_metadata;
#[cfg(test)]
mod tests_operations;
#[cfg(test)]
mod tests_topics;
