//! What one broker asks of another, in frames of kind `Request` and `Answer`.

use std::time::Duration;

use bytes::Bytes;

/// Who are you? JSON of a `bootstrap::Presence` both ways. Answered to anybody who speaks the protocol.
pub const WHO: u16 = 1;
/// A request of a Kafka client, as it came, for the leader of the metadata; the answer is the client's.
pub const KAFKA: u16 = 2;
/// JSON of a `change::Intent`; the answer is a `change::Done`, or a code and a sentence.
pub const CHANGE: u16 = 3;
/// The metadata as a snapshot file holds it. A byte asks whoever leads the metadata: what it gives has everything in it that was
/// ever committed.
pub const METADATA: u16 = 4;
/// What a broker knows of itself, for the admin API.
pub const STATUS: u16 = 5;

/// Group and Raft number of the replica that is to lead it, 8 bytes each; code 0 when the leader tries to hand over.
pub const HAND_OVER: u16 = 6;
/// A batch of the broker's own for a log that another one leads: group id u64, batch; the answer is its offset, i64.
pub const APPEND: u16 = 7;
/// Group id u64, offset i64, bytes u32; the answer is high watermark i64, log start i64, batches.
pub const READ: u16 = 8;
/// Everything below is exported: group id u64, offset i64.
pub const LET_GO: u16 = 9;
/// Where logs begin, and below which offsets all replicas have them; see `floors`.
pub const FLOORS: u16 = 10;
/// Who the members of a group are: group id u64; the answer is the index of the entry that made it so, u64, and they. With a
/// term u64 behind the group id the leader of that term is asked, which need not have been confirmed.
pub const MEMBERS: u16 = 11;

/// What a leader cannot send as entries: group id u64, offset i64, and the index of the entry before the first that it can
/// send, u64; the answer is log start i64, term u64, number of compactions u64, batches, none when there are no more.
pub const SHIP: u16 = 12;
/// What a node leads that the asker does not hear: node id i32; the answer is as `hearsay` has it, or an error code where it is
/// not heard either.
pub const HEARSAY: u16 = 13;
/// A replica is damaged, or lacks its vote: group id u64, whether it is damaged u8, of the metadata the directory id, 16 bytes; the
/// answer of its leader is one byte, see `mending`.
pub const MEND: u16 = 14;

/// Whether a replica that lacks much may be sent so many bytes: group id u64, bytes i64 (negative: so many less than was asked
/// for before); the answer is how long to wait before asking again, in ms, u32, 0 for not at all.
pub const PACE: u16 = 15;

/// Whether the node that says it has no room on its disk: u8.
pub const ROOM: u16 = 16;

/// What is asked; a request of a Kafka client that is larger is not about metadata.
pub const REQUEST_BYTES_MAX: usize = 8 << 20;
/// Asked over one connection and not answered.
pub const UNANSWERED_MAX: usize = 256;
/// After so long whoever asked has given up.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Nothing was asked: no connection, or no room.
    #[error("the broker is not connected")]
    NotSent,
    /// Asked, and the answer will not come. What was asked for may have happened.
    #[error("the broker went away before it answered")]
    Lost,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// An error code of Kafka's, 0 for none.
    pub code: i16,
    pub body: Bytes,
}
