//! The broker: Kafka's protocol on one side, partitions and their logs on the other.
//!
//! Socket to disk: `net::connection` -> `dispatch` -> `handlers::produce` -> `partition::append` ->
//! `flumen_raft` -> `flumen_storage` -> `flumen_io`. See docs/ARCHITECTURE.md.
#![forbid(unsafe_code)]

mod admin_cluster;
pub mod admin_http;
mod admin_process;
pub mod balancer;
pub mod cli;
pub mod cluster;
mod cluster_health;
mod cluster_view;
pub mod controller;
pub mod coordinator;
pub mod disk_space;
pub mod dispatch;
pub mod export;
pub mod handlers;
pub mod host;
pub mod mailbox;
pub mod metadata_snapshots;
pub mod metrics;
mod metrics_text;
#[cfg(not(feature = "mutants"))]
mod mutant;
#[cfg(feature = "mutants")]
pub mod mutant;
pub mod net;
pub mod node;
pub mod partition;
pub mod peers;
pub mod progress;
pub mod server;
pub mod shard;
pub mod topic_admin;
pub mod waits;
