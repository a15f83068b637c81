//! One file per family of Kafka APIs: decode, ask, encode. Rules live in the pure crates
//! (`flumen-metadata`, `flumen-groups`) and in `partition`; handlers only carry.
pub mod cluster;
pub mod configs;
pub mod fetch;
pub mod groups;
mod leader_hints;
pub mod offsets;
pub mod operations;
pub mod produce;
pub mod producer_id;
pub mod topics;
