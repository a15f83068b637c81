//! What brokers say to each other: frames, and nothing but frames. No sockets here, no clocks.
//!
//! ```text
//! 0        4      5       6         8             12         16
//! | "FLPR" | kind | flags | version | body length | checksum | body ...
//! ```
//!
//! All numbers of the header are big endian; the checksum is CRC-32C over the first twelve bytes and the body. Inside a body
//! numbers are LEB128 unless the length of them is fixed. The first frame on a connection, from both sides, is a `Hello` of
//! version 0, whose form never changes; the version of all others is what `negotiate` found.
//!
//! Invariants
//! - Every length and count is compared with what is there before anything is allocated for it. Messages of Raft come out one
//!   at a time. Decoding never panics, and never allocates more than a small multiple of the frame.
//! - Payloads are not copied: those that come in are slices of the frame, those that go out are segments of a vectored write.
//! - Nothing that does not begin like a frame is answered. No Kafka request does: its first four bytes are its length, and no
//!   broker takes one of 1.1 GiB.
//!
//! What this crate does not do: judge whether a message makes sense (`flumen_raft::Group::step` does), keep connections.
#![forbid(unsafe_code)]

mod frame;
mod hello;
mod raft_frame;
mod wire;

pub use frame::{
    Answer, BODY_MAX, CatchUp, CatchUpState, Frame, FrameError, HEADER_BYTES, HELLO_BODY_MAX, LEADS_MAX,
    Lead, RawFrame, Request, cut_frame,
};
pub use hello::{Hello, Refusal, RefusalCode, VERSION_MAX, VERSION_MIN, negotiate};
pub use raft_frame::{ENTRIES_MAX, ITEMS_MAX, RaftFrame, RaftItems};
pub use wire::DecodeError;
