//! Whole brokers' shards in one thread: N of them, each on a disk of its own, with clients, from a seed.
//!
//! What is real: `broker::shard::Shard` with `broker::partition` (the driver of Raft, offsets, who waits, reads), the produce
//! line of its handlers, the group coordinators, `floors`, `joins` and hand-over between brokers, the rules by which replicas move, the frames of
//! `flumen_peer`, and the whole store. What is simulated: the disks (`flumen_io::simulated`), tokio's clock, the wall clock,
//! the network, and the controller, of whose metadata every broker hears at once. What is not here: Kafka's wire,
//! exports, compacted topics.
//!
//! A broker is a `LocalSet`: a kill drops it, a pause does not poll it. A crash freezes its disk in the middle of any
//! operation, and from that moment on nothing that it still does reaches anybody.
//!
//! Invariants checked: one leader a term and one vote a term, as the messages tell (`oracle.rs`); what clients saw
//! (`flumen_checker`, `questions.rs`); an idempotent producer never hears of a gap before its oldest batch; replicas are the same bytes;
//! recovery finds nothing damaged that was promised to be kept; what a clean stop leaves passes the store's own inspection; no
//! task panics.

mod broker;
mod consumer;
mod groups;
mod judge;
mod losses;
mod members;
mod nemesis;
mod plan;
mod producer;
mod questions;
mod wires;
mod world;

pub use nemesis::FAULTS;
pub use world::run;
