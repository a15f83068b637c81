//! One Raft group, behind a boundary that knows nothing of files, sockets or clocks.
//!
//! The Kafka log is the Raft log: an entry is one record batch (or an empty entry, which takes an
//! index and no offset). The leader assigns base offset and leader epoch before it proposes, so the
//! payload that Raft carries is the payload that lands on disk.
//!
//! What this crate owns: votes, terms, indexes, membership, which entries are committed. What it does not: bytes
//! on disk (`storage`), offsets (`broker::partition`), the form of messages on the wire (`broker/peer`), who talks to whom
//! (the broker's network code).
//!
//! Invariants
//! - `propose` never forwards: a group that does not lead refuses (raft 0.7 would forward silently).
//! - Outputs must be made durable in the order in which `take_outputs` gave them.
//! - An entry is committed only after `on_persisted` was told of the outputs that carried it.
//! - `Outputs::messages` may leave at once: one that speaks of what is not on the disk yet is kept back until `on_persisted`
//!   tells that it is. A leader's messages need not wait for its entries, but for its term and vote they do.
//! - A leader serves (`Leadership::may_serve`) only after an entry of its own term is committed.
//! - No message of another broker makes Raft panic: `Message::check` refuses what Raft does not expect.
//! - The crate draws election time-outs from a thread RNG; this one overwrites them with a function of
//!   (seed, node, term) after each step, so that one seed gives one run.
#![forbid(unsafe_code)]

mod contradiction;
mod group;
mod hibernate;
mod membership;
mod message;
pub mod mutant;
mod tail;

use bytes::Bytes;

pub use contradiction::Contradiction;
pub use group::Group;
pub use hibernate::AwakeSet;
pub use membership::{Change, MEMBERS_MAX, Membership, MembershipError, Target};
pub use message::{Body, INDEX_MAX, Message, StepError, TERM_MAX};

/// What must survive a crash before any message that depends on it leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
}

/// One log entry. `data` is a whole record batch, or empty for the no-op of a new leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub index: u64,
    pub term: u64,
    pub data: Bytes,
    /// Membership changes carry data that is no record batch, and never none.
    pub is_membership: bool,
}

/// What the shell must do after a step: store, then (when stored) tell `on_persisted`. The rest may be done at once.
#[derive(Debug, Default)]
pub struct Outputs {
    /// For `on_persisted`; 0 when there is nothing to store.
    pub number: u64,
    /// Present only when term or vote changed, or a membership was applied: a commit index alone is recomputed after a
    /// crash.
    pub hard_state: Option<HardState>,
    pub entries: Vec<Entry>,
    /// The first of `entries` stands in the place of one that was stored before: that one and all behind it are gone.
    pub replaces: bool,
    /// In place of the whole log, before anything else of these outputs.
    pub install: Option<Install>,
    /// Entries up to this index are committed; `None` when nothing new is.
    pub committed_index: Option<u64>,
    /// Messages for other replicas that may leave now. Empty in a group of one.
    pub messages: Vec<Message>,
    /// Present when any of it changed.
    pub leadership: Option<Leadership>,
    /// The membership after the entry of this index, which is committed. To be stored with `hard_state`.
    pub membership: Option<(u64, Membership)>,
    /// Entries to read from the segments, for `Group::entries_read`.
    pub entries_wanted: Vec<EntriesWanted>,
    /// Followers that need what the log no longer has; answered by `Group::offer_snapshot`.
    pub snapshot_wanted_for: Vec<u64>,
    /// Reads that may be answered from what is committed now; everything up to the index is.
    pub confirmed_reads: Vec<ConfirmedRead>,
    /// The leader has committed others in the place of entries that are committed here; it is not answered.
    pub contradiction: Option<Contradiction>,
    /// What no correct group ever says; the replica must not go on.
    pub fault: Option<String>,
}

impl Outputs {
    /// Whether anything here has to reach the disk.
    pub fn must_persist(&self) -> bool {
        self.hard_state.is_some() || !self.entries.is_empty() || self.install.is_some()
    }
}

/// The log of this replica begins anew after `index`: what came before is gone from the leader's log, too. With index 0 it
/// begins at nothing, and its leader sends it all that it has (`Group::begin_over`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Install {
    pub index: u64,
    pub term: u64,
    pub membership: Membership,
    /// The entry that made it so; may lie ahead of `index`.
    pub membership_index: u64,
    /// What the leader's shell gave to `offer_snapshot`: log start offset, producer states.
    pub data: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Follower,
    /// Also while it only asks whether it would get the votes.
    Candidate,
    Leader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    pub role: Role,
    /// 0 when unknown.
    pub leader_id: u64,
    pub term: u64,
    /// Leads, and an entry of its own term is committed: it knows everything that was ever acknowledged.
    pub may_serve: bool,
}

/// Entries `low..high` of the log, or a first part of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntriesWanted {
    pub low: u64,
    pub high: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfirmedRead {
    pub token: u64,
    pub index: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProposeError {
    #[error("this node does not lead the group")]
    NotLeader,
    #[error("the leadership is being handed to another node")]
    Transferring,
    #[error("too much waits for the other replicas")]
    Backlogged,
    #[error("a change of the members is not complete yet")]
    ChangePending,
    #[error("these are the members already")]
    NoChange,
    #[error("{0}")]
    Membership(#[from] MembershipError),
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReadError {
    #[error("this node does not lead the group")]
    NotLeader,
    #[error("no entry of this leader's term is committed yet")]
    NotYet,
    #[error("too many reads wait")]
    TooMany,
}

#[derive(Debug, thiserror::Error)]
#[error("raft group refused to start: {0}")]
pub struct StartError(String);

/// What recovery found of a group.
#[derive(Clone, Debug)]
pub struct GroupStart {
    /// Never 0; the id of this node among the voters.
    pub node_id: u64,
    /// As stored last, and the index of the entry that made it so (0: as created). It must be on the disk before that entry
    /// goes from the front of the log.
    pub membership: Membership,
    pub membership_index: u64,
    /// Membership entries of the log above `membership_index`, by index.
    pub membership_entries: Vec<(u64, Bytes)>,
    pub hard_state: HardState,
    /// Index and term of the entry before the first that the log still has.
    pub before: (u64, u64),
    /// First index of every run of entries of one term, and the term, after `before`.
    pub terms: Vec<(u64, u64)>,
    pub last_index: u64,
    pub last_term: u64,
    /// Makes election time-outs differ between groups and repeat between runs.
    pub seed: u64,
    /// As stored with the membership (`Membership::encode_stored`); 0 for a replica that never lost anything.
    pub abstains_below: u64,
}

impl GroupStart {
    /// A group of one that never had another member: nobody will ask for what it has already.
    pub fn alone(
        node_id: u64,
        hard_state: HardState,
        last_index: u64,
        last_term: u64,
        seed: u64,
    ) -> GroupStart {
        GroupStart {
            node_id,
            membership: Membership::of_voters([node_id]),
            membership_index: 0,
            membership_entries: Vec::new(),
            hard_state,
            before: (last_index, last_term),
            terms: Vec::new(),
            last_index,
            last_term,
            seed,
            abstains_below: 0,
        }
    }
}

/// For DescribeQuorum and the admin API.
#[derive(Clone, Debug)]
pub struct Status {
    pub leadership: Leadership,
    pub last_index: u64,
    pub persisted_index: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    pub membership: Membership,
    /// A leader's log may hold a change of members that is not applied yet.
    pub change_pending: bool,
    pub transfer_to: Option<u64>,
    pub asleep: bool,
    pub tail_bytes: usize,
    /// Known to a leader only.
    pub peers: Vec<PeerStatus>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    pub id: u64,
    pub matched_index: u64,
    pub next_index: u64,
    /// Heard of since the leader last looked whether it has a majority.
    pub is_active: bool,
    pub is_learner: bool,
}

#[cfg(test)]
mod tests;
