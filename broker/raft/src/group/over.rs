//! A replica whose committed entries its leader does not have: it is said (`Outputs::contradiction`), and, where the shell wants
//! that, the replica gives up its log and begins at nothing (`Group::begin_over`).
//!
//! What it had said to others it said of a log that is gone. So it keeps its term and its vote, and abstains until its log has an
//! entry of the leader's term or of a later one: then it has all that it and that leader had in common, of which its answers
//! may have committed something. Until then it does not stand, and votes only for those who have such an entry; entries that it
//! takes meanwhile count as those of any replica. Should nobody have one any more, abstaining would keep nothing and stop the
//! group for ever: it ends when all other voters have said so within a short time.

use std::cell::Cell;

use bytes::Bytes;
use raft::eraftpb::{Message as RaftMessage, MessageType};
use raft::{INVALID_ID, ProgressState};

use super::{ELECTION_TICKS, Group};
use crate::contradiction::{Contradiction, Own, Verdict};
use crate::membership::Membership;
use crate::message::{Body, Message};
use crate::{GroupStart, HardState, Install, Outputs, StartError};

/// Two voters that stand for election both say so within this.
const ABSTAINS_TICKS: u64 = 6 * ELECTION_TICKS as u64;

#[derive(Default)]
pub(super) struct Abstained {
    ticks: u64,
    /// Voters that have no entry of the term either, and when they said so last.
    without: Vec<(u64, u64)>,
}

/// A beginning that is not handed out yet, with the hard state that goes with it.
pub(super) struct Over {
    pub hard_state: HardState,
    pub install: Install,
}

impl Group {
    /// Whether what a leader sends fits what is committed here.
    pub(super) fn judge(&self, message: &Message) -> Verdict {
        let raft = &self.node.raft;
        if message.term < raft.term || (message.term == raft.term && self.is_leader()) {
            return Verdict::Agrees;
        }
        let log = &raft.raft_log;
        let known = Cell::new(true);
        let term_of = |index: u64| {
            log.term(index).unwrap_or_else(|_| {
                known.set(false);
                0
            })
        };
        let before = log.first_index() - 1;
        let own = Own {
            before: (before, term_of(before)),
            committed: (log.committed, term_of(log.committed)),
            term_of: &term_of,
        };
        let verdict = match &message.body {
            Body::Append { prev_index, prev_term, entries, .. } => {
                own.judge_entries((*prev_index, *prev_term), entries.iter().map(|entry| entry.term))
            }
            Body::Snapshot { index, term, .. } => own.judge_beginning(*index, *term),
            _ => Verdict::Agrees,
        };
        if known.get() { verdict } else { Verdict::Agrees }
    }

    /// The leader's entries are others than those that are committed here. Nobody is answered: the leader asks again with its
    /// heartbeats. What it has not committed itself another leader may still undo.
    pub(super) fn contradicts(&mut self, message: &Message, first: u64, agreed_index: Option<u64>) {
        let leader_commit = match &message.body {
            Body::Append { commit, .. } => *commit,
            Body::Snapshot { index, .. } => *index,
            _ => 0,
        };
        if leader_commit >= first {
            self.contradiction = Some(Box::new(Contradiction {
                leader_id: message.from,
                term: message.term,
                agreed_index,
                committed_index: self.node.raft.raft_log.committed,
            }));
        }
    }

    /// Raft answers an append below its commit index with that index; it is made to say no more than is known.
    pub(super) fn answer_truly(&mut self, from: u64, prev: u64, messages_before: usize, verdict: &Verdict) {
        let committed = self.node.raft.raft_log.committed;
        let is_answer = |message: &&mut RaftMessage| {
            message.get_msg_type() == MessageType::MsgAppendResponse
                && (message.to, message.index, message.reject) == (from, committed, false)
        };
        let answers = self.node.raft.msgs.iter_mut().skip(messages_before);
        for answer in answers.filter_map(|message| Some(message).filter(is_answer)) {
            match verdict {
                Verdict::AgreesUpTo(index) => answer.index = *index,
                Verdict::MayAgreeUpTo { index, term } => {
                    (answer.index, answer.reject) = (prev, true);
                    (answer.reject_hint, answer.log_term) = (*index, *term);
                }
                Verdict::Agrees | Verdict::Contradicts { .. } => {}
            }
        }
    }

    /// A leader tells of its commit index at most what it counts on here. That is more than there is: the end of the log was
    /// lost, and if nothing is written any more nobody else would notice.
    pub(super) fn tell_what_is_lost(&mut self, leader: u64, term: u64, index: u64) {
        let raft = &mut self.node.raft;
        if (raft.term, raft.leader_id) != (term, leader) || self.installing.is_some() {
            return;
        }
        let mut answer = RaftMessage { from: raft.id, to: leader, term, ..RaftMessage::default() };
        answer.set_msg_type(MessageType::MsgAppendResponse);
        (answer.reject, answer.index, answer.commit) = (true, index, raft.raft_log.committed);
        (answer.reject_hint, answer.log_term) = (raft.raft_log.last_index(), raft.raft_log.last_term());
        raft.msgs.push(answer);
    }

    /// A follower's log agrees with this leader's at most up to `hint`, and more was counted: it lost its end, or all. Raft
    /// takes such an answer for an old one, for ever. An old one makes it ask once more for what the follower has.
    pub(super) fn forget_what_it_had(&mut self, id: u64, rejected: u64, hint: u64) {
        let committed = self.node.raft.raft_log.committed;
        let Some(progress) = self.node.raft.mut_prs().get_mut(id) else { return };
        let lost = rejected >= progress.matched.min(committed) && hint < progress.matched;
        if lost && progress.state != ProgressState::Snapshot {
            progress.matched = 0;
            progress.become_probe();
            progress.next_idx = rejected + 1;
        }
    }

    /// Gives up the whole log, as its leader has committed other entries. `membership` is the leader's, as of the entry
    /// `membership_index`: changes up to that one are skipped as the log fills. False: it is not the time for that (another
    /// leader, another term).
    pub fn begin_over(
        &mut self,
        found: &Contradiction,
        membership_index: u64,
        membership: &Membership,
    ) -> Result<bool, StartError> {
        let raft = &self.node.raft;
        let (id, term) = (raft.id, raft.term);
        if (term, raft.leader_id) != (found.term, found.leader_id)
            || self.is_leader()
            || self.installing.is_some()
            || !membership.contains(id)
        {
            return Ok(false);
        }
        let hard_state = HardState { term, vote: raft.vote, commit: 0 };
        let start = GroupStart {
            node_id: id,
            membership: membership.clone(),
            membership_index,
            membership_entries: Vec::new(),
            hard_state,
            before: (0, 0),
            terms: Vec::new(),
            last_index: 0,
            last_term: 0,
            seed: 0,
            abstains_below: term,
        };
        let mut anew = Group::start(&start)?;
        let number = self.ready_number + 1;
        anew.seed = self.seed;
        (anew.number_base, anew.ready_number, anew.persisted) = (number, number, self.persisted);
        (anew.last_stored, anew.last_voted) = (number, number);
        anew.unpersisted.push_back(number);
        (anew.leadership, anew.next_read) = (self.leadership, self.next_read);
        let (membership, data) = (membership.clone(), Bytes::new());
        let install = Install { index: 0, term: 0, membership, membership_index, data };
        // Rare, and there are many groups.
        anew.over = Some(Box::new(Over { hard_state, install }));
        anew.after_step();
        *self = anew;
        Ok(true)
    }

    pub(super) fn take_over(&mut self, outputs: &mut Outputs) -> bool {
        let Some(over) = self.over.take() else { return false };
        (outputs.number, outputs.hard_state) = (self.number_base, Some(over.hard_state));
        outputs.install = Some(over.install);
        true
    }

    /// The term of which, or of a later one, the log must have an entry before this replica votes; 0 when it does.
    pub fn abstains_below(&self) -> u64 {
        let has_it = self.node.raft.raft_log.last_term() >= self.abstains_below;
        if has_it || self.membership.is_alone(self.node.raft.id) { 0 } else { self.abstains_below }
    }

    pub(super) fn may_vote_for(&mut self, id: u64, last_term: u64) -> bool {
        if last_term >= self.abstains_below() {
            return true;
        }
        let Abstained { ticks, without } = &mut self.abstained;
        without.retain(|(other, at)| *other != id && *at + ABSTAINS_TICKS > *ticks);
        without.push((id, *ticks));
        let voters = self.membership.voters.iter().chain(&self.membership.outgoing);
        let own_id = self.node.raft.id;
        let nobody_has_it =
            voters.filter(|voter| **voter != own_id).all(|voter| without.iter().any(|(id, _)| id == voter));
        if nobody_has_it {
            self.abstains_below = 0;
        }
        nobody_has_it
    }

    pub(super) fn abstains(&self) -> bool {
        self.abstains_below() > 0
    }

    /// Time passes for a replica that must not stand for election. Where no leader is heard of it asks as if it would, for others
    /// to know what it has; nobody counts the answers.
    pub(super) fn tick_without_standing(&mut self) {
        self.abstained.ticks += 1;
        let raft = &mut self.node.raft;
        raft.election_elapsed += 1;
        if raft.election_elapsed < 2 * ELECTION_TICKS {
            return;
        }
        let (id, term) = (raft.id, raft.term);
        raft.become_follower(term, INVALID_ID);
        let log = &raft.raft_log;
        let (last_index, last_term) = (log.last_index(), log.last_term());
        for to in self.membership.others(id).into_iter().filter(|other| self.membership.is_voter(*other)) {
            let (commit, commit_term) = (0, 0);
            let body =
                Body::VoteRequest { pre: true, forced: false, last_index, last_term, commit, commit_term };
            self.released.push(Message { from: id, to, term: term + 1, body });
        }
    }
}
