//! Cluster metadata as a deterministic state machine, and the pure half of the admin requests.
//!
//! Owns: [`MetadataImage`] and the [`Command`]s that change it (with their binary form), the tables of topic and
//! broker configurations, placement and the plans of moves, and functions that turn a decoded admin request into an answer and the commands to
//! commit first.
//!
//! Invariants
//! - No I/O, clock, randomness or threads: fresh ids are arguments. Any thread may call anything here.
//! - Applying the same commands in the same order gives the same image, byte for byte in its snapshot.
//! - Input from the wire or the disk never panics; what it may allocate is bounded by its own length or by a
//!   named constant.
//!
//! It does not propose, replicate or store commands, nor create logs: the broker does, told by [`Applied`].
#![forbid(unsafe_code)]

pub mod admin;
mod assignment;
pub mod balance;
pub mod broker_config;
pub mod broker_table;
mod codec;
mod command;
pub mod config_def;
pub mod group_table;
mod image;
mod nodes;
pub mod placement;
pub mod reassignment;
mod snapshot;
mod throttled;
pub mod topic_config;
pub mod topic_name;
pub mod topic_table;

pub use assignment::{MovedPartition, PartitionInfo, REPLICAS_MAX};
pub use broker_config::{BrokerConfig, ConfigError, Secret, TopicCheck};
pub use broker_table::{BROKER_CONFIGS, BrokerConfigDef};
pub use codec::CodecError;
pub use command::Command;
pub use config_def::{ConfigKind, ConfigSource, ExtraConfig};
pub use group_table::{GROUP_CONFIGS, GroupConfigDef};
pub use image::{Applied, ApplyError, CreatedPartition, DeletedPartition, MetadataImage, NodeInfo, Topic};
pub use nodes::{Broker, NODES_MAX, NodeRecord, NodeState};
pub use snapshot::{SnapshotFileError, decode_snapshot_file, encode_snapshot_file};
pub use throttled::ThrottledReplicas;
pub use topic_config::{CleanupPolicy, CompressionType, Durability, TimestampType, TopicConfig};
pub use topic_name::OFFSETS_TOPIC;
pub use topic_table::{TOPIC_CONFIGS, TopicConfigDef};
