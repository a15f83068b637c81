//! One group: its members, protocols, generation and committed offsets.
//!
//! [`Ctx`] carries what a step needs from the coordinator and what it gives back. Members keep the order in
//! which they joined (`seq`): the first one leads, and the next one inherits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use flumen_protocol::error_code::ErrorCode;

use crate::rebalance::{join_error, sync_error};
use crate::record::{OffsetCommitValue, OffsetsRecord};
use crate::subscription;
use crate::types::{GroupResponse, GroupState, GroupsConfig, Now, Output};

/// A deadline that is not set.
pub(crate) const NEVER: i64 = i64::MAX;
pub(crate) const CONSUMER_PROTOCOL_TYPE: &str = "consumer";

/// Shared by all groups of a coordinator for the length of one call, and the appends under way.
pub(crate) struct Ctx {
    pub config: GroupsConfig,
    pub now: Now,
    pub out: Vec<Output>,
    pub appends: BTreeMap<u64, PendingAppend>,
    pub next_append_id: u64,
    /// Groups that hold offsets of a transaction, by producer id.
    pub open_transactions: BTreeMap<i64, BTreeSet<Arc<str>>>,
    /// Groups by the time of their next deadline, or earlier: a heartbeat moves deadlines back without touching
    /// this, and the wake-up finds nothing to do and sets the next one.
    pub wakes: BTreeSet<(i64, Arc<str>)>,
}

pub(crate) struct PendingAppend {
    pub group: Arc<str>,
    pub kind: AppendKind,
}

pub(crate) enum AppendKind {
    /// Offsets of a transaction wait for its end.
    Commit {
        reply: Reply,
        offsets: Vec<(String, i32, Committed)>,
        producer_id: Option<i64>,
    },
    Assignment {
        generation: i32,
        assignments: BTreeMap<String, Bytes>,
    },
    StaticReplacement(Box<StaticReplacement>),
    Emptied {
        reply: Option<Reply>,
    },
    Tombstones {
        offsets: Vec<(String, i32)>,
        last: bool,
        whole_group: bool,
        reply: Option<Reply>,
    },
}

/// An answer that waits for its append.
pub(crate) struct Reply {
    pub token: u64,
    pub response: GroupResponse,
}

/// What it takes to undo the replacement of a static member whose record could not be appended.
pub(crate) struct StaticReplacement {
    pub generation: i32,
    pub token: u64,
    pub version: i16,
    pub old_member_id: String,
    pub new_member_id: String,
    pub old_protocols: Vec<(String, Bytes)>,
    pub old_rebalance_timeout_ms: i32,
    pub old_session_timeout_ms: i32,
    pub old_leader: String,
}

impl Ctx {
    pub fn reply(&mut self, token: u64, response: GroupResponse) {
        self.out.push(Output::Reply { token, response });
    }

    pub fn append(&mut self, group: &mut Group, records: Vec<OffsetsRecord>, kind: AppendKind) -> u64 {
        let append_id = self.next_append_id;
        self.next_append_id += 1;
        group.appends_in_flight += 1;
        // From here on the log may hold the group, whatever becomes of the append.
        group.persisted |= !matches!(kind, AppendKind::Commit { .. } | AppendKind::Tombstones { .. });
        self.appends.insert(append_id, PendingAppend { group: group.id.clone(), kind });
        self.out.push(Output::Append { append_id, records });
        append_id
    }

    /// Makes sure that the group is looked at no later than `at_ms`.
    pub fn wake_by(&mut self, group: &mut Group, at_ms: i64) {
        if at_ms < group.wake_at_ms {
            self.unschedule(group);
            group.wake_at_ms = at_ms;
            self.wakes.insert((at_ms, group.id.clone()));
        }
    }

    pub fn unschedule(&mut self, group: &mut Group) {
        if group.wake_at_ms != NEVER {
            self.wakes.remove(&(group.wake_at_ms, group.id.clone()));
            group.wake_at_ms = NEVER;
        }
    }

    /// By the steady clock.
    pub fn after(&self, delay_ms: i64) -> i64 {
        self.now.steady_ms.saturating_add(delay_ms.max(0)).min(NEVER - 1)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitingJoin {
    pub token: u64,
    pub version: i16,
}

pub(crate) struct Member {
    pub seq: u64,
    pub instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub rebalance_timeout_ms: i32,
    pub session_timeout_ms: i32,
    pub protocols: Vec<(String, Bytes)>,
    pub assignment: Bytes,
    /// Joined, but not told its id by a completed rebalance.
    pub is_new: bool,
    pub waiting_join: Option<WaitingJoin>,
    pub waiting_sync: Option<u64>,
    /// End of its session. Ignored while an old member waits inside a rebalance.
    pub deadline_ms: i64,
}

impl Member {
    pub fn metadata(&self, protocol: &str) -> Bytes {
        self.protocols
            .iter()
            .find(|(name, _)| name == protocol)
            .map(|(_, data)| data.clone())
            .unwrap_or_default()
    }

    pub fn can_expire(&self) -> bool {
        self.is_new || (self.waiting_join.is_none() && self.waiting_sync.is_none())
    }
}

/// Why and when a group waits for joins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JoinPhase {
    pub deadline_ms: i64,
    /// Some while an empty group gives its first members time: delay of this round and what may follow.
    pub initial: Option<(i64, i64)>,
}

/// A committed offset as kept in memory; -1 stands for an unknown epoch and for no expiry of its own.
#[derive(Clone, Debug)]
pub(crate) struct Committed {
    pub offset: i64,
    pub leader_epoch: i32,
    pub metadata: Box<str>,
    pub commit_timestamp_ms: i64,
    pub expire_timestamp_ms: i64,
    /// Which topic of that name it was committed for; zero where the record does not say.
    pub topic_id: u128,
    /// Place in the log, against other commits: a transaction may end after a later plain commit.
    pub seq: u64,
}

impl Committed {
    pub fn new(value: OffsetCommitValue, seq: u64) -> Self {
        Committed {
            seq,
            offset: value.offset,
            leader_epoch: value.leader_epoch,
            metadata: value.metadata.into(),
            commit_timestamp_ms: value.commit_timestamp_ms,
            expire_timestamp_ms: value.expire_timestamp_ms,
            topic_id: value.topic_id,
        }
    }
}

pub(crate) struct Group {
    pub id: Arc<str>,
    pub state: GroupState,
    pub generation: i32,
    pub protocol_type: Option<String>,
    pub protocol_name: Option<String>,
    pub leader: Option<String>,
    pub state_timestamp_ms: i64,
    pub members: BTreeMap<String, Member>,
    pub next_seq: u64,
    pub static_members: BTreeMap<String, String>,
    /// Ids handed out with MEMBER_ID_REQUIRED, and until when they hold.
    pub pending_members: BTreeMap<String, i64>,
    pub waiting_joins: usize,
    pub protocol_counts: BTreeMap<String, usize>,
    pub join_phase: Option<JoinPhase>,
    /// The state before PreparingRebalance was Empty: then only time ends the join phase.
    pub prepared_from_empty: bool,
    pub new_member_added: bool,
    pub pending_sync: BTreeSet<String>,
    pub sync_deadline_ms: i64,
    /// Topics of all members; None if not known.
    pub subscribed: Option<BTreeSet<String>>,
    pub assignment_append: Option<u64>,
    pub appends_in_flight: usize,
    /// The group's metadata may be in the log and needs a tombstone.
    pub persisted: bool,
    /// First error among the tombstone appends of a deletion.
    pub delete_error: ErrorCode,
    pub offsets: BTreeMap<String, BTreeMap<i32, Committed>>,
    /// By producer id: offsets of transactions that have not ended.
    pub txn_offsets: BTreeMap<i64, BTreeMap<(String, i32), Committed>>,
    pub wake_at_ms: i64,
}

impl Group {
    pub fn new(id: &str, now_ms: i64) -> Group {
        Group {
            id: id.into(),
            state: GroupState::Empty,
            generation: 0,
            protocol_type: None,
            protocol_name: None,
            leader: None,
            state_timestamp_ms: now_ms,
            members: BTreeMap::new(),
            next_seq: 0,
            static_members: BTreeMap::new(),
            pending_members: BTreeMap::new(),
            waiting_joins: 0,
            protocol_counts: BTreeMap::new(),
            join_phase: None,
            prepared_from_empty: false,
            new_member_added: false,
            pending_sync: BTreeSet::new(),
            sync_deadline_ms: NEVER,
            subscribed: None,
            assignment_append: None,
            appends_in_flight: 0,
            persisted: false,
            delete_error: ErrorCode::NONE,
            offsets: BTreeMap::new(),
            txn_offsets: BTreeMap::new(),
            wake_at_ms: NEVER,
        }
    }

    /// Nothing to remember and nothing under way.
    pub fn is_vacant(&self) -> bool {
        self.state == GroupState::Empty
            && self.members.is_empty()
            && self.pending_members.is_empty()
            && self.offsets.is_empty()
            && self.txn_offsets.is_empty()
            && self.appends_in_flight == 0
            && !self.persisted
    }

    pub fn transition(&mut self, ctx: &Ctx, state: GroupState) {
        self.state = state;
        self.state_timestamp_ms = ctx.now.wall_ms;
        if state != GroupState::PreparingRebalance {
            self.join_phase = None;
        }
    }

    // Members.

    pub fn is_leader(&self, member_id: &str) -> bool {
        self.leader.as_deref() == Some(member_id)
    }

    pub fn leader_or_empty(&self) -> &str {
        self.leader.as_deref().unwrap_or("")
    }

    pub fn in_join_order(&self) -> Vec<&str> {
        let mut ids: Vec<_> = self.members.iter().map(|(id, member)| (member.seq, id.as_str())).collect();
        ids.sort_unstable();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    pub fn first_joined(&self, mut wanted: impl FnMut(&Member) -> bool) -> Option<String> {
        self.members
            .iter()
            .filter(|(_, member)| wanted(member))
            .min_by_key(|(_, member)| member.seq)
            .map(|(id, _)| id.clone())
    }

    fn count_protocols(&mut self, protocols: &[(String, Bytes)], add: bool) {
        for (index, (name, _)) in protocols.iter().enumerate() {
            // A name offered twice is one vote.
            if protocols[..index].iter().any(|(earlier, _)| earlier == name) {
                continue;
            }
            if add {
                *self.protocol_counts.entry(name.clone()).or_default() += 1;
            } else if let Some(count) = self.protocol_counts.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    self.protocol_counts.remove(name);
                }
            }
        }
    }

    pub fn add(&mut self, member_id: String, mut member: Member, protocol_type: &str) {
        if self.members.is_empty() {
            self.protocol_type = Some(protocol_type.to_owned());
        }
        if self.leader.is_none() {
            self.leader = Some(member_id.clone());
        }
        member.seq = self.next_seq;
        self.next_seq += 1;
        self.waiting_joins += usize::from(member.waiting_join.is_some());
        self.count_protocols(&member.protocols, true);
        self.pending_members.remove(&member_id);
        if let Some(instance_id) = &member.instance_id {
            self.static_members.insert(instance_id.clone(), member_id.clone());
        }
        self.members.insert(member_id, member);
    }

    pub fn remove(&mut self, member_id: &str) -> Option<Member> {
        self.pending_members.remove(member_id);
        self.pending_sync.remove(member_id);
        if self.pending_sync.is_empty() {
            self.sync_deadline_ms = NEVER;
        }
        let member = self.members.remove(member_id)?;
        self.waiting_joins -= usize::from(member.waiting_join.is_some());
        self.count_protocols(&member.protocols, false);
        if let Some(instance_id) = &member.instance_id
            && self.static_members.get(instance_id).is_some_and(|id| id == member_id)
        {
            self.static_members.remove(instance_id);
        }
        if self.is_leader(member_id) {
            self.leader = self.first_joined(|_| true);
        }
        Some(member)
    }

    /// Removes a member and answers whatever it was waiting for.
    pub fn expel(&mut self, ctx: &mut Ctx, member_id: &str, error: ErrorCode) {
        if let Some(member) = self.remove(member_id) {
            if let Some(waiting) = member.waiting_join {
                ctx.reply(waiting.token, join_error(error, "", waiting.version));
            }
            if let Some(token) = member.waiting_sync {
                ctx.reply(token, sync_error(error));
            }
        }
    }

    /// The new id takes the old one's place, metadata, assignment and office.
    pub fn replace_static(&mut self, ctx: &mut Ctx, instance_id: &str, old_id: &str, new_id: &str) {
        let was_leader = self.is_leader(old_id);
        let was_pending_sync = self.pending_sync.remove(old_id);
        let Some(mut member) = self.members.remove(old_id) else { return };
        if let Some(waiting) = member.waiting_join.take() {
            self.waiting_joins -= 1;
            ctx.reply(waiting.token, join_error(ErrorCode::FENCED_INSTANCE_ID, old_id, waiting.version));
        }
        if let Some(token) = member.waiting_sync.take() {
            ctx.reply(token, sync_error(ErrorCode::FENCED_INSTANCE_ID));
        }
        if was_leader {
            self.leader = Some(new_id.to_owned());
        }
        if was_pending_sync {
            self.pending_sync.insert(new_id.to_owned());
        }
        self.static_members.insert(instance_id.to_owned(), new_id.to_owned());
        self.members.insert(new_id.to_owned(), member);
    }

    pub fn update(
        &mut self,
        member_id: &str,
        protocols: Vec<(String, Bytes)>,
        rebalance_timeout_ms: i32,
        session_timeout_ms: i32,
    ) {
        let Some(member) = self.members.get_mut(member_id) else { return };
        member.rebalance_timeout_ms = rebalance_timeout_ms;
        member.session_timeout_ms = session_timeout_ms;
        let old = std::mem::replace(&mut member.protocols, protocols.clone());
        self.count_protocols(&old, false);
        self.count_protocols(&protocols, true);
    }

    /// A member's next JoinGroup waits; an earlier one of the same member is told to look again.
    pub fn wait_join(&mut self, ctx: &mut Ctx, member_id: &str, waiting: WaitingJoin) {
        let Some(member) = self.members.get_mut(member_id) else { return };
        match member.waiting_join.replace(waiting) {
            Some(earlier) => ctx.reply(
                earlier.token,
                join_error(ErrorCode::REBALANCE_IN_PROGRESS, member_id, earlier.version),
            ),
            None => self.waiting_joins += 1,
        }
    }

    pub fn extend_session(&mut self, ctx: &mut Ctx, member_id: &str) {
        let Some(member) = self.members.get_mut(member_id) else { return };
        let deadline_ms = ctx.after(member.session_timeout_ms.into());
        member.deadline_ms = deadline_ms;
        ctx.wake_by(self, deadline_ms);
    }

    pub fn rebalance_timeout_ms(&self) -> i64 {
        self.members.values().map(|member| i64::from(member.rebalance_timeout_ms)).max().unwrap_or(0).max(0)
    }

    // Protocols.

    pub fn supports(&self, protocol_type: &str, protocols: &[(String, Bytes)]) -> bool {
        if self.state == GroupState::Empty {
            return !protocol_type.is_empty() && !protocols.is_empty();
        }
        let everyone = self.members.len();
        self.protocol_type.as_deref() == Some(protocol_type)
            && protocols
                .iter()
                .any(|(name, _)| self.protocol_counts.get(name).copied().unwrap_or(0) == everyone)
    }

    /// Every member votes for the first of its protocols that all support; the leader's order breaks ties.
    pub fn select_protocol(&self) -> Option<String> {
        let everyone = self.members.len();
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        for member in self.members.values() {
            let choice =
                member.protocols.iter().find(|(name, _)| self.protocol_counts.get(name) == Some(&everyone));
            if let Some((name, _)) = choice {
                *votes.entry(name).or_default() += 1;
            }
        }
        let most = *votes.values().max()?;
        let leader = self.leader.as_deref().and_then(|id| self.members.get(id));
        let preferred = leader
            .into_iter()
            .flat_map(|member| member.protocols.iter())
            .map(|(name, _)| name.as_str())
            .find(|name| votes.get(name) == Some(&most));
        preferred
            .or_else(|| votes.iter().find(|(_, count)| **count == most).map(|(name, _)| *name))
            .map(str::to_owned)
    }

    pub fn uses_consumer_protocol(&self) -> bool {
        self.protocol_type.as_deref() == Some(CONSUMER_PROTOCOL_TYPE)
    }

    pub fn compute_subscribed(&mut self) {
        self.subscribed = match &self.protocol_type {
            Some(_) if self.members.is_empty() => Some(BTreeSet::new()),
            Some(kind) if kind == CONSUMER_PROTOCOL_TYPE => {
                self.protocol_name.as_ref().and_then(|protocol| {
                    let mut topics = BTreeSet::new();
                    let read = self.members.values().try_for_each(|member| {
                        subscription::add_topics(&member.metadata(protocol), &mut topics)
                    });
                    read.is_ok().then_some(topics)
                })
            }
            _ => None,
        };
    }

    pub fn is_subscribed(&self, topic: &str) -> bool {
        match &self.subscribed {
            Some(topics) => topics.contains(topic),
            None => self.uses_consumer_protocol(),
        }
    }
}
