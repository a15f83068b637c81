//! Kafka on the wire: frames, headers, the hot-path codecs of Produce and Fetch, record batches, and the guard
//! that every other request passes before `kafka-protocol` may decode it.
//!
//! Everything here is pure: bytes in, values or bytes out, no sockets, clocks or threads, so any thread may call
//! it. Input may be hostile: nothing in this crate panics on it or allocates more than a small multiple of it.
//! What requests mean (topics, offsets, groups) is the broker's business and not known here.
#![forbid(unsafe_code)]

pub mod api;
pub mod compression;
pub mod error_code;
pub mod fetch;
pub mod frame;
pub mod guard;
pub mod header;
pub mod produce;
pub mod record;
pub mod record_batch;
mod record_check;
mod schema;
mod wire;
