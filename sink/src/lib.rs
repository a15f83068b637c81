//! Export of topics to ClickHouse: record decoding, Native blocks, and plan-send-settle delivery.
#![forbid(unsafe_code)]

pub mod block;
pub mod column_type;
pub mod ddl;
pub mod infer;
pub mod json;
pub mod mapping;
pub mod table;
