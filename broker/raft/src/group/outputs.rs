//! What comes out of Raft, in the order in which the shell must act on it.

use raft::eraftpb::{Entry as RaftEntry, EntryType, Message as RaftMessage, MessageType};
use raft::{INVALID_ID, Ready};

use super::{Group, TAIL_BYTES_MAX};
use crate::membership::{Change, Membership};
use crate::message::{INDEX_MAX, Message, entry_from_raft};
use crate::mutant::{self, Mutant};
use crate::{ConfirmedRead, HardState, Install, Outputs, Role};

impl Group {
    /// The next outputs, or `None` when there is nothing to do.
    pub fn take_outputs(&mut self) -> Option<Outputs> {
        let mut outputs =
            Outputs { contradiction: self.contradiction.take().map(|found| *found), ..Outputs::default() };
        if self.take_over(&mut outputs) {
            return Some(outputs);
        }
        let applied = self.node.raft.raft_log.applied;
        let confirmed = self.confirmed.iter().any(|read| read.index <= applied);
        let idle = self.released.is_empty()
            && !confirmed
            && outputs.contradiction.is_none()
            && !self.node.store().asks();
        if !self.node.has_ready() {
            if idle {
                return None;
            }
        } else {
            let ready = self.node.ready();
            self.take_ready(ready, &mut outputs);
        }
        outputs.messages.append(&mut self.released);
        let applied = self.node.raft.raft_log.applied;
        outputs.confirmed_reads = self.confirmed.extract_if(.., |read| read.index <= applied).collect();
        if self.node.store().asks() {
            (outputs.entries_wanted, outputs.snapshot_wanted_for) = self.node.mut_store().take_wanted();
        }
        let leadership = self.look_at_leadership();
        if leadership != self.leadership {
            if leadership.role != Role::Leader {
                self.node.mut_store().forget_wanted();
                self.proposed.clear();
                self.proposed_bytes = 0;
                self.confirmed.clear();
            }
            // Raft keeps the places of what it handed over; a group that nobody writes to had one entry, and there are thousands.
            let unstable = &mut self.node.raft.raft_log.unstable.entries;
            if unstable.is_empty() {
                unstable.shrink_to_fit();
            }
            self.leadership = leadership;
            outputs.leadership = Some(leadership);
        }
        Some(outputs)
    }

    fn take_ready(&mut self, mut ready: Ready, outputs: &mut Outputs) {
        self.ready_number = self.number_base + ready.number();
        let applied = self.node.raft.raft_log.applied;
        if let Some(hs) = ready.hs()
            && (hs.term, hs.vote) != (self.known_term, self.known_vote)
        {
            let mut hard_state = HardState { term: hs.term, vote: hs.vote, commit: hs.commit };
            (self.known_term, self.known_vote) = (hs.term, hs.vote);
            if mutant::is(Mutant::ForgetsVote) {
                hard_state.vote = 0;
            }
            if !mutant::is(Mutant::ForgetsTerm) {
                outputs.hard_state = Some(hard_state);
                self.last_voted = self.ready_number;
            }
        }
        if !ready.snapshot().is_empty() {
            let snapshot = ready.snapshot();
            let metadata = snapshot.get_metadata();
            let membership = Membership::from_conf_state(metadata.get_conf_state());
            let (ahead, data) = match snapshot.data.split_first_chunk::<8>() {
                Some((index, _)) => (u64::from_be_bytes(*index), snapshot.data.slice(8..)),
                None => (0, snapshot.data.clone()),
            };
            self.membership = membership.clone();
            self.membership_index = ahead.clamp(metadata.index, INDEX_MAX);
            outputs.install = Some(Install {
                index: metadata.index,
                term: metadata.term,
                membership,
                membership_index: self.membership_index,
                data,
            });
            self.installing = Some(metadata.index);
            self.node.mut_store().restart_after(metadata.index, metadata.term);
        }
        let entries = ready.take_entries();
        outputs.entries = entries.iter().map(entry_from_raft).collect();
        let committed = ready.take_committed_entries();
        outputs.committed_index = committed.last().map(|e| e.index);
        let mut messages = ready.take_messages();
        messages.extend(ready.take_persisted_messages());
        self.confirmed.extend(ready.take_read_states().iter().filter_map(|state| {
            let token = <[u8; 8]>::try_from(&state.request_ctx[..]).ok()?;
            Some(ConfirmedRead { token: u64::from_be_bytes(token), index: state.index })
        }));
        // From here on raft asks the tail for these entries, although they are not on disk yet.
        outputs.replaces = self.node.mut_store().append(entries, applied);
        self.node.advance_append_async(ready);
        for entry in committed.iter().filter(|e| e.get_entry_type() != EntryType::EntryNormal) {
            self.apply_membership(entry, outputs);
        }
        if let Some(index) = outputs.committed_index {
            self.node.advance_apply_to(index);
            self.let_go();
        }
        if outputs.must_persist() {
            outputs.number = self.ready_number;
            self.last_stored = self.ready_number;
            self.unpersisted.push_back(self.ready_number);
            if mutant::is(Mutant::CountsUnstored) {
                self.on_persisted(self.ready_number);
            }
        } else if self.unpersisted.is_empty() {
            self.node.on_persist_ready(self.ready_number - self.number_base);
        }
        self.keep_back_until_stored(messages);
    }

    fn apply_membership(&mut self, entry: &RaftEntry, outputs: &mut Outputs) {
        if entry.index <= self.membership_index {
            return;
        }
        let change = Change::decode(&entry_from_raft(entry).data);
        let steps = match &change {
            Ok(change) => change.steps_from(&self.membership),
            Err(error) => {
                outputs.fault = Some(format!("membership entry {}: {error}", entry.index));
                None
            }
        };
        if let Some(steps) = steps {
            match self.node.apply_conf_change(&steps) {
                Ok(state) => self.membership = Membership::from_conf_state(&state),
                Err(error) => {
                    outputs.fault = Some(format!("membership entry {}: {error}", entry.index));
                }
            }
        }
        self.membership_index = entry.index;
        self.node.mut_store().withdraw_offer();
        outputs.membership = Some((entry.index, self.membership.clone()));
        // Stored together, so that a restart never commits less than what its membership rests on.
        outputs.hard_state =
            Some(HardState { term: self.known_term, vote: self.known_vote, commit: entry.index });
        self.last_voted = self.ready_number;
        // Raft goes on leading a group that it is no member of, and panics on the next answer.
        if self.is_leader() && !self.membership.is_voter(self.node.raft.id) {
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, INVALID_ID);
        }
    }

    /// Called when it is known whether these outputs carry anything to store.
    fn keep_back_until_stored(&mut self, messages: Vec<RaftMessage>) {
        // Entries of a leader count for nothing until a majority says so, and the leader itself speaks through
        // `on_persisted`. Its term and vote must be stored before anybody hears of them: after a crash there would be a
        // second leader of that term, itself. (Raft alone gets this wrong where a single voter leads learners.)
        let after = if self.is_leader() { self.last_voted } else { self.last_stored };
        for message in messages {
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.note_snapshot(message.to);
            }
            self.kept_back.extend(Message::from_raft(message).map(|message| (after, message)));
        }
        self.release();
    }

    fn note_snapshot(&mut self, to: u64) {
        self.snapshots_sent.retain(|(id, _)| *id != to);
        self.snapshots_sent.push((to, 0));
    }

    fn release(&mut self) {
        while let Some((after, _)) = self.kept_back.front()
            && (*after <= self.persisted || mutant::is(Mutant::SendsEarly))
        {
            self.released.extend(self.kept_back.pop_front().map(|(_, message)| message));
        }
    }

    fn let_go(&mut self) {
        let applied = self.node.raft.raft_log.applied;
        let own_id = self.node.raft.id;
        let mut needless = applied;
        if self.is_leader() {
            let others = self.node.raft.prs().iter().filter(|(id, _)| **id != own_id);
            needless = others.map(|(_, progress)| progress.matched).fold(applied, u64::min);
        }
        while let Some((index, bytes)) = self.proposed.front().copied()
            && index <= applied
        {
            self.proposed.pop_front();
            self.proposed_bytes -= bytes;
        }
        self.node.mut_store().let_go(needless, applied, TAIL_BYTES_MAX);
    }

    /// The outputs with this number (and all before it) are on disk.
    pub fn on_persisted(&mut self, number: u64) {
        if number <= self.persisted {
            return;
        }
        self.persisted = number;
        while self.unpersisted.front().is_some_and(|first| *first <= number) {
            self.unpersisted.pop_front();
        }
        // Raft counts outputs without anything to store, too, and keeps a record of each until it is told.
        let told = if self.unpersisted.is_empty() { self.ready_number.max(number) } else { number };
        self.node.on_persist_ready(told.saturating_sub(self.number_base));
        if let Some(index) = self.installing
            && self.node.raft.raft_log.persisted >= index
        {
            self.installing = None;
            if self.node.raft.raft_log.applied < index {
                self.node.advance_apply_to(index);
            }
        }
        self.release();
        if self.campaign_later && !self.must_store_before_leading() {
            self.campaign_later = false;
            // A refusal means that it leads already.
            let _ = self.campaign();
        }
    }
}
