//! A partition as one replica of several: what it hears from the others, what time does to it, and whether it leads.
//!
//! Nothing here waits. What Raft answers is carried out by `Partition::advance`.

use std::collections::BTreeSet;

use flumen_metadata::{Durability, MetadataImage, PartitionInfo};
use flumen_raft::{Body, Membership, Message, ProposeError, ReadError, Status, StepError, Target};
use tokio::sync::oneshot;

use super::fetch::FetchError;
use super::{Partition, raft_id};
use crate::cluster::floors::Floor;
use crate::cluster::node_id_of;

/// A new group's first replica stands for election in the first of so many ticks and again in the last, as the others may
/// have heard of the group later.
pub(super) const STAND_TICKS: u8 = 4;
/// Of a log's state, which is stored together with what it begins with; see the bounds in the store.
const SNAPSHOT_STATE_BYTES: usize = 64 << 10;

impl Partition {
    /// Leads; may not serve yet.
    pub fn is_leader(&self) -> bool {
        self.state.borrow().raft.is_leader()
    }

    /// What another replica says. A message that makes no sense is dropped, and so is one that there is no room for: Raft
    /// says it again.
    pub fn step(&self, from: u64, message: Message) {
        if self.damage().is_some()
            || self.joining.get()
            || message.from != from
            || !self.has_room_for(&message)
        {
            return;
        }
        let Some(message) = self.hold_back(message) else {
            self.stay_awake();
            return;
        };
        let is_answer = matches!(message.body, Body::AppendAccepted { .. } | Body::HeartbeatAnswer { .. });
        let outcome = self.state.borrow_mut().raft.step(message);
        match outcome {
            Ok(()) if is_answer && self.leads.get() => self.note_answer(from),
            Ok(()) | Err(StepError::UnknownPeer) => {}
            Err(error) => {
                tracing::warn!(topic = %self.topic, partition = self.index, from, %error, "a message of another replica was refused");
            }
        }
        self.advance();
        self.stay_awake();
    }

    /// Time passes for Raft; false when the group sleeps. `advance` has to follow.
    pub fn tick(&self) -> bool {
        if self.damage().is_some() || self.joining.get() {
            return false;
        }
        let mut state = self.state.borrow_mut();
        state.raft.set_reluctant(self.disk.is_low());
        let left = self.ticks_to_stand.get();
        if left > 0 {
            self.ticks_to_stand.set(left - 1);
            if (left == STAND_TICKS || left == 1) && state.raft.leader_id() == 0 {
                // A refusal means that it may not stand, and then the others do.
                let _ = state.raft.campaign();
            }
        }
        state.raft.tick()
    }

    /// Whether what a message brings can be stored: Raft takes it for granted.
    fn has_room_for(&self, message: &Message) -> bool {
        let (total, largest, count) = match &message.body {
            Body::Append { entries, .. } if !entries.is_empty() => {
                let lengths = || entries.iter().map(|entry| entry.data.len());
                (lengths().sum(), lengths().max().unwrap_or(0), entries.len())
            }
            // With the state that it becomes part of.
            Body::Snapshot { data, .. } => {
                (data.len() + SNAPSHOT_STATE_BYTES, data.len() + SNAPSHOT_STATE_BYTES, 1)
            }
            _ => return true,
        };
        !self.log.must_wait(total, largest, count) && self.log.has_room(largest)
    }

    /// Whether it may answer for the partition. A damaged replica knows nothing of its group: as far as Raft goes it is alone there.
    pub(crate) fn check_serves(&self) -> Result<(), FetchError> {
        if let Some(reason) = self.damage() {
            return Err(FetchError::Storage(reason.to_string()));
        }
        match (self.alone.get() || self.serves.get(), self.is_leader()) {
            (true, _) => Ok(()),
            (false, true) => Err(FetchError::NotYet),
            (false, false) => Err(FetchError::NotLeader),
        }
    }

    /// Waits until a majority has said that this replica still leads; what is committed now is then all that ever was
    /// acknowledged before the question. A leader that is cut off hears nothing, and ceases to lead after an election
    /// time-out.
    pub(crate) async fn confirm_leads(&self) -> Result<(), FetchError> {
        self.check_serves()?;
        if self.alone.get() {
            return Ok(());
        }
        let (confirmed, waits) = oneshot::channel();
        {
            let mut state = self.state.borrow_mut();
            let token = state.raft.confirm_read().map_err(|error| match error {
                ReadError::NotLeader => FetchError::NotLeader,
                ReadError::NotYet | ReadError::TooMany => FetchError::NotYet,
            })?;
            state.reads.push((token, confirmed));
        }
        self.advance();
        self.stay_awake();
        waits.await.map_err(|_| FetchError::NotLeader)
    }

    /// A group of one always serves, from its first moment on, unless its log is damaged.
    pub fn serves(&self) -> bool {
        self.check_serves().is_ok()
    }

    /// Asks for other members; only the leader can. Done when `raft_status` shows them, and no outgoing voters.
    pub fn propose_membership(&self, target: Target) -> Result<(), ProposeError> {
        if self.damage().is_some() {
            return Err(ProposeError::NotLeader);
        }
        self.state.borrow_mut().raft.propose_membership(target)?;
        self.advance();
        self.stay_awake();
        Ok(())
    }

    /// Hands the leadership to another voter; given up if that takes longer than an election.
    pub fn transfer_leader(&self, to: u64) -> Result<(), ProposeError> {
        self.state.borrow_mut().raft.transfer_leader(to)?;
        self.advance();
        self.stay_awake();
        Ok(())
    }

    pub fn raft_status(&self) -> Status {
        let mut status = self.state.borrow().raft.status();
        // Members that a loss of power could still take back are not to be relied on: others drop their logs then.
        status.change_pending |= !self.unforced.borrow().is_empty();
        status
    }

    pub(crate) fn is_joining(&self) -> bool {
        self.joining.get() && self.damage().is_none()
    }

    /// Damaged, and what is left of its log may go when others have all of it.
    pub(crate) fn may_begin_again(&self) -> bool {
        self.damage().is_some() && !self.keeps_its_log.get()
    }

    /// Its log has an entry that a loss of power does not take, and so the log is there for sure.
    pub(crate) async fn has_stored_for_sure(&self) -> bool {
        if self.damage().is_some() || self.joining.get() || self.raft_status().persisted_index == 0 {
            return false;
        }
        let is_durable = self.config.borrow().acknowledges() == Durability::Durable;
        // A log that cannot be forced stops the process elsewhere.
        is_durable || self.log.force().await.is_ok()
    }

    /// It takes part, or asks to, and does not vote.
    pub(crate) fn lacks_its_vote(&self) -> bool {
        self.joining.get() || !self.state.borrow().raft.membership().is_voter(self.node_id)
    }

    /// Who the members are, and the index of the entry that made it so.
    pub(crate) fn members(&self) -> (u64, Membership) {
        let raft = &self.state.borrow().raft;
        (raft.membership_index(), raft.membership().clone())
    }

    /// The leader of the group has told a new replica who the members are. As long as it is none of them it goes on asking.
    /// One that is said to vote has lost what it had promised to keep, and does not take part.
    pub(crate) fn join(&self, index: u64, membership: Membership) {
        if !self.is_joining() || !membership.contains(self.node_id) {
            return;
        }
        if membership.is_voter(self.node_id) {
            // Its vote is taken away, and it begins again: see `cluster::mending`.
            self.refuse("it votes in its group, and its log is gone");
            self.keeps_its_log.set(false);
            return;
        }
        let stored = flumen_storage::HardState::default();
        let started = super::group_that_joins(&self.log, self.node_id, self.group_id, index, &membership);
        let staged = self.log.stage_with(Some(stored), Some((index, membership.encode())), &[]);
        match (started, staged) {
            (Ok(group), Ok(_)) => self.state.borrow_mut().raft = group,
            // The log has no room now: it asks again.
            (Ok(_), Err(error)) => {
                tracing::warn!(topic = %self.topic, partition = self.index, %error, "a new replica has to wait");
                return;
            }
            (Err(error), _) => return self.refuse(&format!("its Raft group cannot start: {error}")),
        }
        self.joining.set(false);
        self.advance();
        self.stay_awake();
    }

    /// The number of the log in the store.
    pub(crate) fn store_id(&self) -> u64 {
        self.log.group_id()
    }

    /// Kafka ids of the other members, where this one leads them.
    pub(crate) fn followers(&self) -> Vec<i32> {
        let others = self.state.borrow().raft.membership().others(self.node_id);
        others.into_iter().filter_map(node_id_of).collect()
    }

    /// What followers should hear, with the leader's epoch; `None` where there is nothing new, unless it is asked for.
    pub(crate) fn floor_to_tell(&self, again: bool) -> Option<(i32, Floor)> {
        if self.alone.get() || !self.serves.get() || self.damage().is_some() {
            return None;
        }
        let everywhere = if self.config.borrow().compacts() { self.everywhere() } else { 0 };
        let floor =
            Floor { log_start: self.log_start_offset(), everywhere: everywhere.min(self.high_watermark()) };
        let is_new = self.told_floor.replace(Some(floor)) != Some(floor);
        (is_new || again).then(|| (self.leader_epoch(), floor))
    }

    /// Has every replica's log begin at `offset`, and waits until that is committed: whoever leads later has it, too. Where this is
    /// the only one, it is for those that come later, and in the log with whatever is stored next.
    pub(super) async fn commit_log_start(&self, offset: i64) -> Result<(), FetchError> {
        let (committed, waits) = oneshot::channel();
        let alone = self.alone.get();
        {
            let mut state = self.state.borrow_mut();
            let proposed = state.raft.propose(super::outputs::encode_log_start(offset));
            let (index, _term) = proposed.map_err(|_| FetchError::NotLeader)?;
            if !alone {
                state.starts_wanted.push((index, committed));
            }
        }
        self.advance();
        if alone {
            return Ok(());
        }
        self.stay_awake();
        waits.await.map_err(|_| FetchError::NotLeader)
    }

    /// The leader of this epoch says so. Nothing that is not committed here goes, nor what an export has not settled.
    pub(crate) fn hear_floor(&self, epoch: i32, floor: Floor) {
        if self.alone.get() || self.is_leader() || epoch != self.leader_epoch() || self.damage().is_some() {
            return;
        }
        self.everywhere_known.set(self.everywhere_known.get().max(floor.everywhere));
        self.advance_log_start(floor.log_start);
    }

    /// Lets the log begin at an offset, as far as it may.
    pub(super) fn advance_log_start(&self, offset: i64) {
        let to = offset.min(self.high_watermark()).min(self.hold_offset.get());
        if to > self.log_start_offset() {
            match self.log.advance_log_start(to) {
                Ok(_) => self.note_log_start(),
                // Told again.
                Err(error) => {
                    tracing::debug!(topic = %self.topic, partition = self.index, %error, "the log start stays");
                }
            }
            self.publish_gauges();
        }
    }

    /// All replicas have what lies below this offset, as far as is known here. Compaction loses the indexes by which others
    /// could be sent it.
    pub(super) fn everywhere(&self) -> i64 {
        if self.alone.get() {
            return i64::MAX;
        }
        if !self.serves.get() {
            // Only a leader hears how far the others are.
            return self.everywhere_known.get();
        }
        let status = self.raft_status();
        let behind = status.peers.iter().map(|peer| peer.matched_index).min().unwrap_or(0);
        if behind >= status.last_index { i64::MAX } else { self.log.end_of(behind).unwrap_or(0) }
    }

    /// The end of the log behind the entry of this index, where that is still known.
    pub fn end_of_entry(&self, index: u64) -> Option<i64> {
        self.log.end_of(index)
    }

    /// All have everything, and nothing happens.
    pub fn is_asleep(&self) -> bool {
        self.state.borrow().raft.is_asleep()
    }

    /// Another broker is gone; true when this partition has a replica there.
    pub fn on_node_down(&self, raft_id: u64) -> bool {
        let concerned = self.damage().is_none()
            && !self.joining.get()
            && self.state.borrow_mut().raft.on_node_down(raft_id);
        if concerned {
            self.note_lost(raft_id);
        }
        concerned
    }

    /// It may have lost its log, or says that it is damaged; for leaders.
    pub(crate) fn note_lost(&self, raft_id: u64) {
        if self.is_leader() {
            self.in_sync.borrow_mut().down(raft_id);
            let behind = self.in_sync.borrow().behind();
            self.tell_lagging(behind);
            self.let_go_of_reads();
        }
    }

    /// A follower says that it is there, and perhaps that it has more.
    fn note_answer(&self, from: u64) {
        if !self.in_sync.borrow_mut().answered(from) {
            return;
        }
        let Some(shard) = self.shard.upgrade() else { return };
        let (status, is_up) = (self.raft_status(), shard.node.is_up());
        let others = status.peers.iter().filter(|peer| peer.id != self.node_id);
        let is_up = |id: u64| node_id_of(id).is_some_and(&is_up);
        let behind = self.in_sync.borrow_mut().look_first(others, is_up);
        if let Some(behind) = behind {
            self.tell_lagging(behind);
            self.let_go_of_reads();
        }
    }

    /// Everybody who has a replica but one.
    pub(super) fn others_than(&self, leader_id: i32) -> Vec<i32> {
        let members = self.state.borrow().raft.membership().others(0);
        let mut others: BTreeSet<i32> = members.into_iter().filter_map(node_id_of).collect();
        if let Some(shard) = self.shard.upgrade() {
            let image = shard.node.image.load();
            others.extend(self.info_in(&image).into_iter().flat_map(|info| &info.replicas));
        }
        others.remove(&leader_id);
        others.into_iter().collect()
    }

    /// Raft's ids of the replicas that are not in sync, as the leader sees it.
    pub(crate) fn behind(&self) -> Vec<u64> {
        self.in_sync.borrow().behind()
    }

    /// Kafka ids of the members that were not seen to keep up.
    pub(crate) fn not_keeping_up(&self) -> Vec<i32> {
        let in_sync = self.in_sync.borrow();
        let others = self.state.borrow().raft.membership().others(self.node_id);
        others.into_iter().filter(|id| !in_sync.keeps_up(*id)).filter_map(node_id_of).collect()
    }

    /// Looks which followers are behind, and tells; for leaders.
    pub(crate) fn look_at_followers(&self, is_up: &dyn Fn(i32) -> bool) {
        let status = self.raft_status();
        let others = status.peers.iter().filter(|peer| peer.id != self.node_id);
        let is_up = |id: u64| node_id_of(id).is_some_and(is_up);
        let behind = {
            let mut in_sync = self.in_sync.borrow_mut();
            in_sync.watch_commits(status.committed_index, status.last_index);
            in_sync.look(others, status.committed_index, is_up)
        };
        self.tell_lagging(behind);
        self.let_go_of_reads();
    }

    fn tell_lagging(&self, behind: Vec<u64>) {
        if let Some(shard) = self.shard.upgrade() {
            let mut behind: Vec<i32> = behind.into_iter().filter_map(node_id_of).collect();
            behind.extend(self.voteless(&shard.node.image.load()));
            behind.sort_unstable();
            behind.dedup();
            shard.node.leaders.note_lagging(self.group_id, self.leader_epoch(), behind);
        }
    }

    /// Replicas of the metadata that have lost their vote (`cluster::mending`); none while a move changes who votes.
    fn voteless(&self, image: &MetadataImage) -> Vec<i32> {
        let at_rest = self.info_in(image).filter(|info| info.target.is_none());
        let replicas = at_rest.into_iter().flat_map(|info| &info.replicas).copied();
        let raft = &self.state.borrow().raft;
        replicas.filter(|id| !raft.membership().is_voter(raft_id(*id))).collect()
    }

    /// What the metadata says of this partition.
    pub(crate) fn info_in<'a>(&self, image: &'a MetadataImage) -> Option<&'a PartitionInfo> {
        let info = image.topics.get(&*self.topic)?.partition(self.index)?;
        (info.group_id == self.group_id).then_some(info)
    }

    /// Sees to it that the group is ticked for as long as it does not sleep. A group of one needs no time.
    pub(crate) fn stay_awake(&self) {
        let awake = {
            let raft = &self.state.borrow().raft;
            !self.joining.get() && !raft.is_asleep() && !raft.membership().has_only(self.node_id)
        };
        if awake && let Some(shard) = self.shard.upgrade() {
            shard.wake(self.slot.get());
        }
    }
}
