//! Real processes for tests and the demo: a broker, a ClickHouse, free ports, and the little HTTP that
//! is needed to ask them. Everything started here is killed when its handle is dropped.
#![forbid(unsafe_code)]

pub mod clickhouse;
pub mod clock;
pub mod cluster;
pub mod export;
pub mod flumen;
pub mod group_configs;
pub mod kafka;
pub mod keyed;
pub mod load;
pub mod mount;
pub mod network;
pub mod probe;
pub mod process;
pub mod segment_file;
pub mod slow_disk;
pub mod wire;
pub mod witness;
// The proxy of the export's own tests, shared and not written twice.
#[path = "../../sink/tests/support/proxy.rs"]
pub mod proxy;
