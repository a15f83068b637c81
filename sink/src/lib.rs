//! Export of topics to ClickHouse: record decoding, Native blocks, and plan-send-settle delivery.
//!
//! The pure half decides (`config`, `plan`, `settle`, `breaker`, `mapping`, `block`, `admission::judge`); the shell
//! acts (`client`, `exporter`). The broker brings a `source::Source` and a `source::StateLog` per export and runs all
//! exports on one thread of their own, a tokio `current_thread` runtime with a `LocalSet`, so that an insert never
//! holds up a shard. What is promised, and when it is not, stands in `DELIVERY.md`.
#![forbid(unsafe_code)]

pub mod admission;
pub mod block;
pub mod breaker;
pub mod client;
pub mod column_type;
pub mod config;
pub mod ddl;
pub mod exporter;
pub mod infer;
pub mod json;
pub mod mapping;
pub mod plan;
pub mod settle;
pub mod source;
pub mod status;
pub mod table;
