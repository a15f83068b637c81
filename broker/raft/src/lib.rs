//! One Raft group, behind a boundary that knows nothing of files, sockets or clocks.
//!
//! The Kafka log is the Raft log: an entry is one record batch (or an empty entry, which takes an
//! index and no offset). The leader assigns base offset and leader epoch before it proposes, so the
//! payload that Raft carries is the payload that lands on disk.
//!
//! What this crate owns: votes, terms, indexes, which entries are committed. What it does not: bytes
//! on disk (`storage`), offsets (`broker::partition`), who talks to whom (the broker's network code).
//!
//! Invariants
//! - `propose` never forwards: a group that does not lead refuses (raft 0.7 would forward silently).
//! - Outputs must be made durable in the order in which `take_outputs` gave them.
//! - An entry is committed only after `on_persisted` was told of the outputs that carried it.
//! - The crate draws election time-outs from a thread RNG; this one overwrites them with a function of
//!   (seed, term) after each step, so that one seed gives one run.
#![forbid(unsafe_code)]

mod tail;

use bytes::Bytes;
use raft::eraftpb::{Entry as RaftEntry, EntryType, Message, MessageType};
use raft::{Config, RawNode, StateRole};

use tail::Tail;

/// Ticks without a leader before a follower stands for election; drawn between this and twice this.
const ELECTION_TICKS: usize = 10;
/// A leader speaks to its followers every this many ticks.
const HEARTBEAT_TICKS: usize = 3;

/// What must survive a crash before any message that depends on it leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
}

/// One log entry. `data` is a whole record batch, or empty for the no-op of a new leader.
#[derive(Clone, Debug)]
pub struct Entry {
    pub index: u64,
    pub term: u64,
    pub data: Bytes,
    /// Membership changes carry data that is no record batch.
    pub is_membership: bool,
}

/// What the shell must do after a step, in this order: store, then (when stored) tell `on_persisted`.
#[derive(Debug, Default)]
pub struct Outputs {
    pub number: u64,
    /// Present only when term or vote changed: a commit index alone is recomputed after a crash.
    pub hard_state: Option<HardState>,
    pub entries: Vec<Entry>,
    /// Entries up to this index are committed; `None` when nothing new is.
    pub committed_index: Option<u64>,
    /// Messages for the other voters. Empty in a group of one.
    pub messages: Vec<Message>,
}

impl Outputs {
    /// Whether anything here has to reach the disk.
    pub fn must_persist(&self) -> bool {
        self.hard_state.is_some() || !self.entries.is_empty()
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProposeError {
    #[error("this node does not lead the group")]
    NotLeader,
}

#[derive(Debug, thiserror::Error)]
#[error("raft group refused to start: {0}")]
pub struct StartError(String);

/// What recovery found of a group.
#[derive(Clone, Debug)]
pub struct GroupStart {
    /// Never 0; the id of this node among the voters.
    pub node_id: u64,
    pub voters: Vec<u64>,
    pub hard_state: HardState,
    pub last_index: u64,
    pub last_term: u64,
    /// Makes election time-outs differ between groups and repeat between runs.
    pub seed: u64,
}

pub struct Group {
    node: RawNode<Tail>,
    seed: u64,
    persisted_hard_state: HardState,
    voters: usize,
}

impl Group {
    pub fn start(start: &GroupStart) -> Result<Group, StartError> {
        // In a group of one, whatever is on this disk is on a majority of disks, so all of it is committed.
        let alone = start.voters.len() == 1;
        let commit = if alone { start.last_index } else { start.hard_state.commit.min(start.last_index) };
        let config = Config {
            id: start.node_id,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied: commit,
            max_size_per_msg: 1 << 20,
            max_inflight_msgs: 256,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let tail = Tail::new(start, commit);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&config, tail, &logger).map_err(|e| StartError(e.to_string()))?;
        let mut group = Group {
            node,
            seed: start.seed,
            persisted_hard_state: start.hard_state,
            voters: start.voters.len(),
        };
        group.tame_randomness();
        Ok(group)
    }

    /// Stands for election at once. A group of one leads after this call (its outputs must still be stored).
    pub fn campaign(&mut self) -> Result<(), StartError> {
        let outcome = self.node.campaign().map_err(|e| StartError(e.to_string()));
        self.tame_randomness();
        outcome
    }

    pub fn tick(&mut self) {
        self.node.tick();
        self.tame_randomness();
    }

    /// Appends an entry to the log of this leader and returns its (index, term).
    pub fn propose(&mut self, data: Bytes) -> Result<(u64, u64), ProposeError> {
        if !self.is_leader() {
            return Err(ProposeError::NotLeader);
        }
        let entry = RaftEntry { data, ..RaftEntry::default() };
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.node.raft.id;
        message.set_entries(vec![entry].into());
        let before = self.node.raft.raft_log.last_index();
        // The only refusals of a leader are a pending transfer and the uncommitted limit, neither of
        // which this boundary switches on.
        self.node.step(message).map_err(|_| ProposeError::NotLeader)?;
        let index = self.node.raft.raft_log.last_index();
        assert_eq!(index, before + 1, "a proposal must take exactly one index");
        Ok((index, self.node.raft.term))
    }

    /// The next outputs, or `None` when there is nothing to do.
    pub fn take_outputs(&mut self) -> Option<Outputs> {
        if !self.node.has_ready() {
            return None;
        }
        let mut ready = self.node.ready();
        let mut outputs = Outputs { number: ready.number(), ..Outputs::default() };
        if let Some(hs) = ready.hs() {
            let hard_state = HardState { term: hs.term, vote: hs.vote, commit: hs.commit };
            if hard_state.term != self.persisted_hard_state.term
                || hard_state.vote != self.persisted_hard_state.vote
            {
                outputs.hard_state = Some(hard_state);
            }
            self.persisted_hard_state = hard_state;
        }
        let entries = ready.take_entries();
        outputs.entries = entries
            .iter()
            .map(|e| Entry {
                index: e.index,
                term: e.term,
                data: e.data.clone(),
                is_membership: e.get_entry_type() != EntryType::EntryNormal,
            })
            .collect();
        outputs.committed_index = ready.committed_entries().last().map(|e| e.index);
        outputs.messages = ready.take_messages();
        outputs.messages.extend(ready.take_persisted_messages());
        // From here on raft asks the tail for these entries, although they are not on disk yet.
        self.node.mut_store().append(entries);
        self.node.advance_append_async(ready);
        if let Some(index) = outputs.committed_index {
            self.node.advance_apply_to(index);
            if self.voters == 1 {
                self.node.mut_store().forget_until(index);
            }
        }
        Some(outputs)
    }

    /// The outputs with this number (and all before it) are on disk.
    pub fn on_persisted(&mut self, number: u64) {
        self.node.on_persist_ready(number);
    }

    pub fn step(&mut self, message: Message) {
        // A message that raft refuses (unknown peer, old term) is dropped: the sender will repeat itself.
        let _ = self.node.step(message);
        self.tame_randomness();
    }

    pub fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// The leader epoch of Kafka is the term of Raft.
    pub fn leader_epoch(&self) -> i32 {
        i32::try_from(self.node.raft.term).unwrap_or(i32::MAX)
    }

    pub fn term(&self) -> u64 {
        self.node.raft.term
    }

    pub fn leader_id(&self) -> u64 {
        self.node.raft.leader_id
    }

    pub fn last_index(&self) -> u64 {
        self.node.raft.raft_log.last_index()
    }

    fn tame_randomness(&mut self) {
        let term = self.node.raft.term;
        let mut x = self.seed ^ term.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x ^= x >> 33;
        x = x.wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        x ^= x >> 33;
        let spread = (x % ELECTION_TICKS as u64) as usize;
        self.node.raft.set_randomized_election_timeout(ELECTION_TICKS + spread);
    }
}

#[cfg(test)]
mod tests;
