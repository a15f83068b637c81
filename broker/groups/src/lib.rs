//! Kafka's classic consumer groups and committed offsets, for one partition of `__consumer_offsets`.
//!
//! Owns what a group coordinator decides: who is a member, which generation is current, who leads, which
//! assignment and which offsets are committed, and the records that keep all this. Everything is pure: requests,
//! time and randomness are arguments, replies and appends are returned, so any thread may own a [`Coordinator`]
//! and one owner calls it at a time. The broker appends, replies, keeps the clock and routes groups to partitions
//! ([`coordinator_partition`]).
//!
//! Invariants: a token handed to [`Coordinator::handle`] is answered exactly once (now, after an append, or after
//! a rebalance); offsets become visible only when their append is done; a state that survives a restart was
//! appended before anyone was told about it.
//!
//! Not here: KIP-848 and share groups, authorization, topic ids (the broker resolves them), producer epochs (the
//! log checks them when it appends a transaction's offsets).
#![forbid(unsafe_code)]

mod admin;
mod coordinator;
mod group;
mod membership;
mod offsets;
mod rebalance;
pub mod record;
mod subscription;
mod transactions;
mod types;

pub use coordinator::Coordinator;
pub use record::OffsetsRecord;
pub use types::*;

/// The partition of `__consumer_offsets` that coordinates `group_id`: Java's `String.hashCode` without its sign.
pub fn coordinator_partition(group_id: &str, partitions: i32) -> i32 {
    let hash =
        group_id.encode_utf16().fold(0i32, |hash, unit| hash.wrapping_mul(31).wrapping_add(i32::from(unit)));
    (hash & i32::MAX).checked_rem(partitions).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::coordinator_partition;

    #[test]
    fn partition_is_that_of_java() {
        // "test".hashCode() is 3556498; "é𝄞" counts its surrogates one by one.
        assert_eq!(coordinator_partition("test", 50), 3_556_498 % 50);
        assert_eq!(coordinator_partition("", 50), 0);
        assert_eq!(coordinator_partition("é𝄞", i32::MAX), (0xe9 * 31 + 0xd834) * 31 + 0xdd1e);
        assert_eq!(coordinator_partition("x", 0), 0);
    }
}
