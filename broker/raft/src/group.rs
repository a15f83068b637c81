//! The group itself: what goes into Raft, and what comes out in which order.

mod outputs;
mod over;
mod sleep;

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use protobuf::Message as _;
use raft::eraftpb::{Entry as RaftEntry, EntryType, Message as RaftMessage, MessageType, Snapshot};
use raft::{Config, RawNode, SnapshotStatus, StateRole};

use crate::contradiction::{Contradiction, Verdict};
use crate::hibernate::QUIET_TICKS;
use crate::membership::{Change, Membership, Target};
use crate::message::{Body, Known, Message, StepError, entry_to_raft};
use crate::mutant::{self, Mutant};
use crate::tail::Tail;
use crate::{
    ConfirmedRead, Entry, GroupStart, Leadership, PeerStatus, ProposeError, ReadError, Role, StartError,
    Status,
};

/// Ticks without a leader before a follower stands for election; drawn between this and twice this.
const ELECTION_TICKS: usize = 10;
/// So many more before one that is reluctant does: the others have stood twice by then.
const RELUCTANT_TICKS: usize = 20;
/// A leader speaks to its followers every this many ticks.
const HEARTBEAT_TICKS: usize = 3;
/// Entries in one message: large enough that a follower that catches up is not slowed by round trips, small enough that
/// messages of other groups on the same connection need not wait long.
const MESSAGE_BYTES_MAX: u64 = 256 << 10;
/// Messages to one follower without an answer; with the above 16 MiB.
const IN_FLIGHT_MAX: usize = 64;
/// Proposed and not committed, in a group of several; more of it only makes the answer late.
const UNCOMMITTED_BYTES_MAX: usize = 32 << 20;
/// Applied entries kept in memory for followers that are a little behind.
const TAIL_BYTES_MAX: usize = 1 << 20;
/// Raft's bytes of committed entries in one output: some thousand entries, as after a restart.
const COMMITTED_BYTES_MAX: u64 = 64 << 10;
const READS_MAX: usize = 1024;
/// A follower that was sent a snapshot and does not say that it has it is asked again after so many ticks. Raft itself would
/// wait for ever.
const SNAPSHOT_TICKS: u32 = 50;

pub struct Group {
    node: RawNode<Tail>,
    seed: u64,
    known_term: u64,
    known_vote: u64,
    membership: Membership,
    /// The entry that made it so. May lie ahead of the log after a snapshot, which brings the newest membership: that is as
    /// safe, as who lacks that entry is not elected by those who have it, and a majority of these members has.
    membership_index: u64,
    leadership: Leadership,
    /// Number of Raft's newest ready, above those of the Raft before it that was given up.
    ready_number: u64,
    number_base: u64,
    /// Outputs that carry something to store and are not reported stored, oldest first.
    unpersisted: VecDeque<u64>,
    persisted: u64,
    /// The last output that carried anything to store, and the last that carried a term or vote.
    last_stored: u64,
    last_voted: u64,
    /// Messages, each to leave when the output of that number is stored.
    kept_back: VecDeque<(u64, Message)>,
    released: Vec<Message>,
    /// Reads that the others confirmed, of which some wait until this node has applied what they rest on.
    confirmed: Vec<ConfirmedRead>,
    installing: Option<u64>,
    /// Followers that were sent a snapshot, and ticks since then.
    snapshots_sent: Vec<(u64, u32)>,
    /// (index, bytes) of what this leader proposed and is not committed; not kept in a group of one.
    proposed: VecDeque<(u64, usize)>,
    proposed_bytes: usize,
    next_read: u64,
    quiet_ticks: u32,
    asleep: bool,
    /// A group of one that must store its log before it may lead.
    campaign_later: bool,
    contradiction: Option<Box<Contradiction>>,
    over: Option<Box<over::Over>>,
    abstains_below: u64,
    abstained: over::Abstained,
    /// Leaves it to the others to stand for election first.
    reluctant: bool,
}

impl Group {
    pub fn start(start: &GroupStart) -> Result<Group, StartError> {
        let refuse = |what: String| Err(StartError(what));
        start.membership.check().map_err(|e| StartError(e.to_string()))?;
        if start.before.0 > start.last_index {
            return refuse(format!(
                "the log ends at {} and begins after {}",
                start.last_index, start.before.0
            ));
        }
        let first_change = start.membership_entries.first().map(|(index, _)| *index);
        // In a group of one, whatever is on this disk is on a majority of disks, so all of it is committed: up to the first
        // change of members, that is, from which on others may have a say.
        let all_committed = start.membership.is_alone(start.node_id) || mutant::is(Mutant::CommitsAllAtStart);
        let commit = match first_change {
            _ if !all_committed => start.hard_state.commit,
            None => start.last_index,
            Some(index) => start.hard_state.commit.max(index),
        };
        let commit = commit.max(start.before.0).max(start.membership_index).min(start.last_index);
        // Changes that were committed but not stored are applied again.
        let applied = first_change.map_or(commit, |index| commit.min(index - 1));
        if applied < start.before.0 {
            return refuse("a membership change lies before the beginning of the log".to_owned());
        }
        let config = Config {
            id: start.node_id,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            max_election_tick: 2 * ELECTION_TICKS + RELUCTANT_TICKS,
            applied,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: IN_FLIGHT_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let tail = Tail::new(start, commit);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&config, tail, &logger).map_err(|e| StartError(e.to_string()))?;
        let mut group = Group {
            seed: start.seed ^ start.node_id.wrapping_mul(0xD6E8_FEB8_6659_FD93),
            known_term: start.hard_state.term,
            known_vote: start.hard_state.vote,
            membership: start.membership.clone(),
            membership_index: start.membership_index,
            leadership: Leadership {
                role: Role::Follower,
                leader_id: 0,
                term: node.raft.term,
                may_serve: false,
            },
            node,
            ready_number: 0,
            number_base: 0,
            unpersisted: VecDeque::new(),
            persisted: 0,
            last_stored: 0,
            last_voted: 0,
            kept_back: VecDeque::new(),
            released: Vec::new(),
            confirmed: Vec::new(),
            installing: None,
            snapshots_sent: Vec::new(),
            proposed: VecDeque::new(),
            proposed_bytes: 0,
            next_read: 1,
            quiet_ticks: 0,
            asleep: false,
            campaign_later: false,
            contradiction: None,
            over: None,
            abstains_below: start.abstains_below,
            abstained: over::Abstained::default(),
            reluctant: false,
        };
        group.tame_randomness();
        Ok(group)
    }

    /// Stands for election at once. A group of one leads after this call (its outputs must still be stored).
    pub fn campaign(&mut self) -> Result<(), StartError> {
        self.wake();
        if self.abstains() {
            return Ok(());
        }
        if self.must_store_before_leading() {
            self.campaign_later = true;
            return Ok(());
        }
        let outcome = self.node.campaign().map_err(|e| StartError(e.to_string()));
        self.after_step();
        outcome
    }

    /// A replica that should not lead if another can: it stands for election later, and votes as ever.
    pub fn set_reluctant(&mut self, reluctant: bool) {
        if self.reluctant != reluctant {
            self.reluctant = reluctant;
            self.tame_randomness();
        }
    }

    /// Time passes. False when the group sleeps now and need not be ticked until it wakes.
    pub fn tick(&mut self) -> bool {
        if self.asleep {
            return false;
        }
        if self.campaign_later || (!self.is_leader() && self.must_store_before_leading()) {
            return true;
        }
        self.quiet_ticks = self.quiet_ticks.saturating_add(1);
        if self.abstains() {
            self.tick_without_standing();
            return true;
        }
        self.node.tick();
        self.look_after_snapshots();
        self.after_step();
        if self.quiet_ticks >= QUIET_TICKS && self.is_leader() && self.everybody_has_everything() {
            self.send_to_sleep();
        }
        !self.asleep
    }

    /// Raft wins the election of a group of one within the call, and then expects its whole log to be stored. And it panics
    /// where an election begins between a snapshot and the news that it is stored.
    fn must_store_before_leading(&self) -> bool {
        let unstored = !self.unpersisted.is_empty() || !self.node.raft.raft_log.unstable_entries().is_empty();
        self.installing.is_some() || (unstored && self.membership.is_alone(self.node.raft.id))
    }

    /// Appends an entry to the log of this leader and returns its (index, term).
    pub fn propose(&mut self, data: Bytes) -> Result<(u64, u64), ProposeError> {
        if !self.is_leader() {
            return Err(ProposeError::NotLeader);
        }
        if self.proposed_bytes > UNCOMMITTED_BYTES_MAX {
            return Err(ProposeError::Backlogged);
        }
        let bytes = data.len();
        let (index, term) = self.propose_entry(RaftEntry { data, ..RaftEntry::default() })?;
        if !self.membership.is_alone(self.node.raft.id) {
            self.proposed.push_back((index, bytes));
            self.proposed_bytes += bytes;
        }
        Ok((index, term))
    }

    /// Asks for other members. Complete when `Outputs::membership` says so, without outgoing voters.
    pub fn propose_membership(&mut self, target: Target) -> Result<(u64, u64), ProposeError> {
        target.check()?;
        if !self.is_leader() {
            return Err(ProposeError::NotLeader);
        }
        // Raft would take the proposal and silently make an empty entry of it.
        if self.node.raft.has_pending_conf() || self.membership.is_joint() {
            return Err(ProposeError::ChangePending);
        }
        let context = target.encode();
        let Some(steps) = Change::Target(target).steps_from(&self.membership) else {
            return Err(ProposeError::NoChange);
        };
        let data = steps.write_to_bytes().map_err(|_| ProposeError::ChangePending)?;
        let mut entry = RaftEntry { data: data.into(), context, ..RaftEntry::default() };
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        self.propose_entry(entry)
    }

    fn propose_entry(&mut self, entry: RaftEntry) -> Result<(u64, u64), ProposeError> {
        if self.node.raft.lead_transferee.is_some() {
            return Err(ProposeError::Transferring);
        }
        self.wake();
        let mut message = RaftMessage { from: self.node.raft.id, ..RaftMessage::default() };
        message.set_msg_type(MessageType::MsgPropose);
        message.set_entries(vec![entry].into());
        let before = self.node.raft.raft_log.last_index();
        // What is left to refuse is a leader that is no member, and such a one has stepped down.
        self.node.step(message).map_err(|_| ProposeError::NotLeader)?;
        let index = self.node.raft.raft_log.last_index();
        assert_eq!(index, before + 1, "a proposal must take exactly one index");
        Ok((index, self.node.raft.term))
    }

    /// Hands the leadership to a voter, after bringing it up to date. Given up after an election time-out.
    pub fn transfer_leader(&mut self, to: u64) -> Result<(), ProposeError> {
        if !self.is_leader() || !self.membership.voters.contains(&to) {
            return Err(ProposeError::NotLeader);
        }
        self.wake();
        self.node.transfer_leader(to);
        self.after_step();
        Ok(())
    }

    /// Asks the others whether this node still leads; the answer comes as a `ConfirmedRead` with the token. A read of a group
    /// that stops leading is never confirmed: whoever waits for it goes by `Outputs::leadership`.
    pub fn confirm_read(&mut self) -> Result<u64, ReadError> {
        if !self.is_leader() {
            return Err(ReadError::NotLeader);
        }
        if !self.may_serve() {
            return Err(ReadError::NotYet);
        }
        if self.node.raft.pending_read_count() >= READS_MAX {
            return Err(ReadError::TooMany);
        }
        self.wake();
        let token = self.next_read;
        self.next_read += 1;
        if mutant::is(Mutant::ConfirmsAlone) {
            let index = self.node.raft.raft_log.committed;
            self.confirmed.push(ConfirmedRead { token, index });
        } else {
            self.node.read_index(token.to_be_bytes().to_vec());
        }
        Ok(token)
    }

    /// A message of another replica. What it causes comes with the next outputs.
    pub fn step(&mut self, message: Message) -> Result<(), StepError> {
        let log = &self.node.raft.raft_log;
        message.check(&Known {
            id: self.node.raft.id,
            term: self.node.raft.term,
            is_leader: self.is_leader(),
            last_index: log.last_index(),
        })?;
        match &message.body {
            Body::Heartbeat { sleep: true, commit, .. } if self.agrees_to_sleep(&message, *commit) => {
                self.fall_asleep();
                return Ok(());
            }
            // Not work, but a sign that the other is awake: the leader tells it again to sleep, at its next tick.
            Body::Heartbeat { .. } | Body::HeartbeatAnswer { .. } => self.asleep = false,
            Body::TimeoutNow if self.abstains() => return Ok(()),
            Body::VoteRequest { last_term, .. } if !self.may_vote_for(message.from, *last_term) => {
                return Ok(());
            }
            Body::TimeoutNow if self.must_store_before_leading() => {
                self.campaign_later = true;
                return Ok(());
            }
            Body::Snapshot { membership, .. } if !membership.contains(self.node.raft.id) => {
                return Err(StepError::NotForUs);
            }
            _ => self.wake(),
        }
        let verdict = self.judge(&message);
        let prev = match &message.body {
            Body::Append { prev_index, .. } => *prev_index,
            Body::AppendRejected { index, hint_index, .. } if message.term == self.node.raft.term => {
                self.forget_what_it_had(message.from, *index, *hint_index);
                0
            }
            _ => 0,
        };
        if let Verdict::Contradicts { first, agreed_index } = verdict {
            self.contradicts(&message, first, agreed_index);
            return Ok(());
        }
        let (from, said) = (message.from, self.node.raft.msgs.len());
        let last_index = self.node.raft.raft_log.last_index();
        let lost_up_to = match &message.body {
            Body::Heartbeat { commit, .. } if *commit > last_index => Some((message.term, *commit)),
            _ => None,
        };
        let outcome = self.node.step(message.into_raft(last_index));
        self.answer_truly(from, prev, said, &verdict);
        if let Some((term, index)) = lost_up_to {
            self.tell_what_is_lost(from, term, index);
        }
        self.after_step();
        match outcome {
            Err(raft::Error::StepPeerNotFound) => Err(StepError::UnknownPeer),
            _ => Ok(()),
        }
    }

    /// What `Outputs::entries_wanted` asked for: from `low` on as many as the shell likes, none if it could not read.
    pub fn entries_read(&mut self, low: u64, entries: Vec<Entry>) {
        let entries = entries.into_iter().map(entry_to_raft).collect();
        for context in self.node.mut_store().take_read(low, entries) {
            self.node.on_entries_fetched(context);
        }
        self.node.mut_store().end_read();
        self.after_step();
    }

    /// What a follower needs that must begin after `index`: the last entry before those that the log has.
    pub fn offer_snapshot(&mut self, data: Bytes) {
        let tail = self.node.store();
        let index = tail.before_index();
        let Ok(term) = raft::Storage::term(tail, index) else { return };
        // Raft panics on a snapshot of nothing; nobody needs one, either.
        if index == 0 {
            return;
        }
        let mut with_index = BytesMut::with_capacity(8 + data.len());
        with_index.put_u64(self.membership_index);
        with_index.put_slice(&data);
        let mut snapshot = Snapshot { data: with_index.freeze(), ..Snapshot::default() };
        snapshot.mut_metadata().index = index;
        snapshot.mut_metadata().term = term;
        snapshot.mut_metadata().set_conf_state(self.membership.to_conf_state());
        self.node.mut_store().offer(snapshot);
    }

    /// A follower has, or has not, begun anew with the snapshot that it was sent.
    pub fn snapshot_done(&mut self, id: u64, ok: bool) {
        self.node.report_snapshot(id, if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
        self.after_step();
    }

    fn look_after_snapshots(&mut self) {
        let mut overdue = Vec::new();
        self.snapshots_sent.retain_mut(|(id, ticks)| {
            *ticks += 1;
            if *ticks >= SNAPSHOT_TICKS {
                overdue.push(*id);
            }
            *ticks < SNAPSHOT_TICKS
        });
        for id in overdue {
            // Nothing happens to one that has it meanwhile.
            self.node.report_snapshot(id, SnapshotStatus::Failure);
        }
    }

    /// Entries up to this index are gone from the segments.
    pub fn set_log_start(&mut self, before_index: u64) {
        let applied = self.node.raft.raft_log.applied;
        self.node.mut_store().set_before(before_index.min(applied));
    }

    /// The entry before the first that the log has, as Raft sees it; `offer_snapshot` is about this one.
    pub fn log_start(&self) -> u64 {
        self.node.store().before_index()
    }

    /// Messages to this replica were lost: what was sent on trust is sent again.
    pub fn report_unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
        self.after_step();
    }

    pub fn wake(&mut self) {
        self.asleep = false;
        self.quiet_ticks = 0;
    }

    /// Another broker is gone; true when this group has a replica there and is awake now.
    pub fn on_node_down(&mut self, id: u64) -> bool {
        let concerned = self.membership.contains(id);
        if concerned {
            self.wake();
            self.report_unreachable(id);
        }
        concerned
    }

    pub fn is_asleep(&self) -> bool {
        self.asleep
    }

    pub fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// Leads, and knows everything that was ever acknowledged.
    pub fn may_serve(&self) -> bool {
        self.is_leader() && (self.node.raft.apply_to_current_term() || mutant::is(Mutant::ServesEarly))
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

    /// The entry that made the membership what it is.
    pub fn membership_index(&self) -> u64 {
        self.membership_index
    }

    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    fn look_at_leadership(&self) -> Leadership {
        let raft = &self.node.raft;
        let role = match raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Follower => Role::Follower,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
        };
        Leadership { role, leader_id: raft.leader_id, term: raft.term, may_serve: self.may_serve() }
    }

    pub fn status(&self) -> Status {
        let raft = &self.node.raft;
        let mut peers = Vec::new();
        if self.is_leader() {
            peers.extend(raft.prs().iter().map(|(id, progress)| PeerStatus {
                id: *id,
                matched_index: progress.matched,
                next_index: progress.next_idx,
                is_active: progress.recent_active || *id == raft.id,
                is_learner: !self.membership.is_voter(*id),
            }));
            peers.sort_unstable_by_key(|peer| peer.id);
        }
        Status {
            leadership: self.look_at_leadership(),
            last_index: raft.raft_log.last_index(),
            persisted_index: raft.raft_log.persisted,
            committed_index: raft.raft_log.committed,
            applied_index: raft.raft_log.applied,
            membership: self.membership.clone(),
            change_pending: self.is_leader() && raft.has_pending_conf(),
            transfer_to: raft.lead_transferee,
            asleep: self.asleep,
            tail_bytes: self.node.store().bytes(),
            peers,
        }
    }

    fn after_step(&mut self) {
        self.tame_randomness();
    }

    fn tame_randomness(&mut self) {
        let term = self.node.raft.term;
        let mut x = self.seed ^ term.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x ^= x >> 33;
        x = x.wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        x ^= x >> 33;
        let spread = (x % ELECTION_TICKS as u64) as usize;
        let reluctance = if self.reluctant { RELUCTANT_TICKS } else { 0 };
        self.node.raft.set_randomized_election_timeout(ELECTION_TICKS + spread + reluctance);
    }
}
