//! Many Raft groups on several brokers, in one thread, with a clock, a network and disks of its own: a seed is a run.
//!
//! What is real: `flumen_raft` (the boundary and Raft below it) and `flumen_peer` (every message goes through bytes). What is
//! simulated: time, the network, the disk (what was not synced is lost in a crash), and the shell around a group, which does
//! what `broker::partition` does: gives offsets, stages, acknowledges. What is not here: the shard log itself, which has a
//! simulation of its own (`storage/crash-test`), and Kafka's wire.
//!
//! Invariants checked while it runs (`oracle.rs`): one leader a term, one vote a term across crashes, equal entries below
//! the commit index, an offset is the end of the entry before. Checked afterwards: the history of the clients, by
//! `flumen_checker`.
#![forbid(unsafe_code)]

mod broker;
mod clients;
mod disk;
mod mutant;
mod network;
mod oracle;
mod replica;
mod rng;
pub mod shards;
mod world;

pub use mutant::{DRIVER_MUTANTS, DriverMutant};
pub use world::{FAULTS, Report, Settings, run};
