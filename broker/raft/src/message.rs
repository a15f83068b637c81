//! Messages between the replicas of a group, in words of our own; Raft's protobuf types stay inside this crate.
//!
//! What comes from another broker is judged here (`Message::check`) before Raft sees it: Raft 0.7 panics on some of what
//! it never expects, and takes a message of term 0 for one of its own process, past every check of terms.

use bytes::Bytes;
use raft::eraftpb::{Entry as RaftEntry, EntryType, Message as RaftMessage, MessageType, Snapshot};

use crate::Entry;
use crate::membership::{Change, Membership};

/// Kafka's leader epochs are i32, and the term is the epoch.
pub const TERM_MAX: u64 = i32::MAX as u64;
/// Far above any log, far below where adding to an index could overflow.
pub const INDEX_MAX: u64 = 1 << 60;

/// Raft's mark of an election that a leader asked for; it overrides the lease of that leader.
const FORCED: &[u8] = b"CampaignTransfer";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub from: u64,
    pub to: u64,
    pub term: u64,
    pub body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Append {
        prev_index: u64,
        prev_term: u64,
        commit: u64,
        entries: Vec<Entry>,
    },
    /// The sender has everything up to `index`, on its disk.
    AppendAccepted {
        index: u64,
        commit: u64,
    },
    /// The sender has no entry like the one before `index`; its log may agree up to `hint_index`.
    AppendRejected {
        index: u64,
        hint_index: u64,
        hint_term: u64,
        commit: u64,
    },
    /// `read` names a read that waits for the answers; `sleep` says that nothing will follow until something happens.
    Heartbeat {
        commit: u64,
        read: Option<u64>,
        sleep: bool,
    },
    HeartbeatAnswer {
        commit: u64,
        read: Option<u64>,
    },
    /// `pre`: only asks whether the vote would be given. `forced`: the leader asked for this election.
    VoteRequest {
        pre: bool,
        forced: bool,
        last_index: u64,
        last_term: u64,
        commit: u64,
        commit_term: u64,
    },
    VoteAnswer {
        pre: bool,
        granted: bool,
        commit: u64,
        commit_term: u64,
    },
    /// Stand for election at once.
    TimeoutNow,
    /// The log before `index` is gone; begin after it.
    Snapshot {
        index: u64,
        term: u64,
        membership: Membership,
        data: Bytes,
    },
}

/// Why a message was not acted on. The first is a fact of life, the others mean a defect or a foe, and the last that this
/// replica or its leader lost what it had promised to keep.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StepError {
    #[error("from a replica that the group does not know")]
    UnknownPeer,
    #[error("not for this replica")]
    NotForUs,
    #[error("malformed: {0}")]
    Malformed(&'static str),
    #[error("replicas disagree about what is committed: {0}")]
    LostEntries(&'static str),
}

/// What the judgement of a message needs to know of the group.
pub(crate) struct Known {
    pub id: u64,
    pub term: u64,
    pub is_leader: bool,
    pub last_index: u64,
}

impl Message {
    pub(crate) fn check(&self, known: &Known) -> Result<(), StepError> {
        if self.to != known.id || self.from == known.id || self.from == 0 {
            return Err(StepError::NotForUs);
        }
        if self.term == 0 || self.term > TERM_MAX {
            return Err(StepError::Malformed("term"));
        }
        let index_ok = |index: u64| index <= INDEX_MAX;
        let ok = match &self.body {
            Body::Append { prev_index, prev_term, commit, entries } => {
                let mut index = *prev_index;
                let mut term = *prev_term;
                for entry in entries {
                    if entry.index != index + 1 || entry.term < term || entry.term > self.term {
                        return Err(StepError::Malformed("entries out of order"));
                    }
                    (index, term) = (entry.index, entry.term);
                }
                index_ok(index) && index_ok(*commit) && *prev_term <= self.term
            }
            Body::AppendAccepted { index, commit } => index_ok(*index) && index_ok(*commit),
            Body::AppendRejected { index, hint_index, hint_term, commit } => {
                index_ok(*index) && hint_index <= index && index_ok(*commit) && *hint_term <= TERM_MAX
            }
            Body::Heartbeat { commit, .. } | Body::HeartbeatAnswer { commit, .. } => index_ok(*commit),
            Body::VoteRequest { last_index, last_term, commit, .. } => {
                index_ok(*last_index) && index_ok(*commit) && *last_term <= TERM_MAX
            }
            Body::VoteAnswer { commit, .. } => index_ok(*commit),
            Body::TimeoutNow => true,
            Body::Snapshot { index, term, membership, .. } => {
                index_ok(*index)
                    && *index > 0
                    && *term > 0
                    && *term <= self.term
                    && membership.check().is_ok()
            }
        };
        if !ok {
            return Err(StepError::Malformed("index or term"));
        }
        self.check_against_log(known)
    }

    /// Raft would go on with numbers that cannot be. (Entries that would replace committed ones: see `contradiction`. This is
    /// the answer of a follower of an older version, which did not look at them.)
    fn check_against_log(&self, known: &Known) -> Result<(), StepError> {
        match &self.body {
            Body::AppendAccepted { index, .. }
                if known.is_leader && self.term == known.term && *index > known.last_index =>
            {
                Err(StepError::LostEntries("a follower has entries of this leader that it does not have"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn from_raft(mut message: RaftMessage) -> Option<Message> {
        let read = |context: &[u8]| <[u8; 8]>::try_from(context).ok().map(u64::from_be_bytes);
        let body = match message.get_msg_type() {
            MessageType::MsgAppend => Body::Append {
                prev_index: message.index,
                prev_term: message.log_term,
                commit: message.commit,
                entries: message.take_entries().iter().map(entry_from_raft).collect(),
            },
            MessageType::MsgAppendResponse if message.reject => Body::AppendRejected {
                index: message.index,
                hint_index: message.reject_hint,
                hint_term: message.log_term,
                commit: message.commit,
            },
            MessageType::MsgAppendResponse => {
                Body::AppendAccepted { index: message.index, commit: message.commit }
            }
            MessageType::MsgHeartbeat => {
                Body::Heartbeat { commit: message.commit, read: read(&message.context), sleep: false }
            }
            MessageType::MsgHeartbeatResponse => {
                Body::HeartbeatAnswer { commit: message.commit, read: read(&message.context) }
            }
            kind @ (MessageType::MsgRequestVote | MessageType::MsgRequestPreVote) => Body::VoteRequest {
                pre: kind == MessageType::MsgRequestPreVote,
                forced: &message.context[..] == FORCED,
                last_index: message.index,
                last_term: message.log_term,
                commit: message.commit,
                commit_term: message.commit_term,
            },
            kind @ (MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse) => {
                Body::VoteAnswer {
                    pre: kind == MessageType::MsgRequestPreVoteResponse,
                    granted: !message.reject,
                    commit: message.commit,
                    commit_term: message.commit_term,
                }
            }
            MessageType::MsgTimeoutNow => Body::TimeoutNow,
            MessageType::MsgSnapshot => {
                let mut snapshot = message.take_snapshot();
                let metadata = snapshot.take_metadata();
                Body::Snapshot {
                    index: metadata.index,
                    term: metadata.term,
                    membership: Membership::from_conf_state(metadata.get_conf_state()),
                    data: snapshot.take_data(),
                }
            }
            // The rest is for use inside one process, or forwards what this boundary never forwards.
            _ => return None,
        };
        Some(Message { from: message.from, to: message.to, term: message.term, body })
    }

    pub(crate) fn into_raft(self, last_index: u64) -> RaftMessage {
        let mut out = RaftMessage { from: self.from, to: self.to, term: self.term, ..RaftMessage::default() };
        let context = |read: Option<u64>| {
            read.map_or(Bytes::new(), |token| Bytes::copy_from_slice(&token.to_be_bytes()))
        };
        match self.body {
            Body::Append { prev_index, prev_term, commit, entries } => {
                out.set_msg_type(MessageType::MsgAppend);
                out.index = prev_index;
                out.log_term = prev_term;
                out.commit = commit;
                out.set_entries(entries.into_iter().map(entry_to_raft).collect::<Vec<_>>().into());
            }
            Body::AppendAccepted { index, commit } => {
                out.set_msg_type(MessageType::MsgAppendResponse);
                out.index = index;
                out.commit = commit;
            }
            Body::AppendRejected { index, hint_index, hint_term, commit } => {
                out.set_msg_type(MessageType::MsgAppendResponse);
                out.reject = true;
                out.index = index;
                out.reject_hint = hint_index;
                out.log_term = hint_term;
                out.commit = commit;
            }
            Body::Heartbeat { commit, read, .. } => {
                out.set_msg_type(MessageType::MsgHeartbeat);
                // The leader tells at most what this replica once had. Where a topic acknowledges from memory, a crash
                // may have taken the end of that; Raft would end the process over it.
                out.commit = commit.min(last_index);
                out.context = context(read);
            }
            Body::HeartbeatAnswer { commit, read } => {
                out.set_msg_type(MessageType::MsgHeartbeatResponse);
                out.commit = commit;
                out.context = context(read);
            }
            Body::VoteRequest { pre, forced, last_index, last_term, commit, commit_term } => {
                out.set_msg_type(if pre {
                    MessageType::MsgRequestPreVote
                } else {
                    MessageType::MsgRequestVote
                });
                out.index = last_index;
                out.log_term = last_term;
                out.commit = commit;
                out.commit_term = commit_term;
                if forced {
                    out.context = Bytes::from_static(FORCED);
                }
            }
            Body::VoteAnswer { pre, granted, commit, commit_term } => {
                out.set_msg_type(if pre {
                    MessageType::MsgRequestPreVoteResponse
                } else {
                    MessageType::MsgRequestVoteResponse
                });
                out.reject = !granted;
                out.commit = commit;
                out.commit_term = commit_term;
            }
            Body::TimeoutNow => out.set_msg_type(MessageType::MsgTimeoutNow),
            Body::Snapshot { index, term, membership, data } => {
                out.set_msg_type(MessageType::MsgSnapshot);
                let mut snapshot = Snapshot { data, ..Snapshot::default() };
                snapshot.mut_metadata().index = index;
                snapshot.mut_metadata().term = term;
                snapshot.mut_metadata().set_conf_state(membership.to_conf_state());
                out.set_snapshot(snapshot);
            }
        }
        out
    }
}

pub(crate) fn entry_from_raft(entry: &RaftEntry) -> Entry {
    let is_membership = entry.get_entry_type() != EntryType::EntryNormal;
    // What Raft must read of a change lies in `data` on the leader that proposed it; our own bytes lie in `context`.
    // Never empty, so that on disk it differs from the empty entry of a new leader.
    let data = match is_membership {
        false => entry.data.clone(),
        true if entry.context.is_empty() => Change::leave_bytes(),
        true => entry.context.clone(),
    };
    Entry { index: entry.index, term: entry.term, data, is_membership }
}

pub(crate) fn entry_to_raft(entry: Entry) -> RaftEntry {
    let mut out = RaftEntry { index: entry.index, term: entry.term, ..RaftEntry::default() };
    if entry.is_membership {
        out.set_entry_type(EntryType::EntryConfChangeV2);
        out.context = entry.data;
    } else {
        out.data = entry.data;
    }
    out
}
