//! A replica that has committed records which its leader does not have, nor, as far as the leader knows, a majority.
//!
//! Topics that acknowledge from memory (`os`, `memory`) get there without a defect: the power went on several brokers, or on
//! some while this one was down, and the others went on with what they had left. Such a replica begins over: it asks the leader
//! who the members are, gives up its log in one record of the store, and is filled by the leader as any that lacks something.
//! Until its log has an entry of the leader's term it neither votes nor stands (`flumen_raft::Group::begin_over`). A crash
//! between the steps leaves the old replica or the empty one; see the table in ARCHITECTURE.md.
//!
//! In a topic of durability `durable` the same means that a disk forgot what it had said to have, or that files were copied:
//! nothing goes, the replica serves no more, and its operator is told what can be done.

use std::sync::atomic::Ordering;

use flumen_metadata::Durability;
use flumen_raft::{Contradiction, Install, Membership};
use flumen_storage::{Beginning, HardState, Lane, Lsn, ProducerState, StageError};

use super::Partition;
use crate::cluster::{joins, node_id_of};

/// Of the state with which the log begins; see the bounds in the store.
const BEGINNING_BYTES: usize = 64 << 10;

impl Partition {
    /// Raft found it. False: the partition serves no more.
    pub(super) fn contradicted(&self, found: Contradiction) -> bool {
        let leader = node_id_of(found.leader_id).unwrap_or(-1);
        if self.config.borrow().acknowledges() == Durability::Durable {
            let (from, to) = self.lost_offsets(&found);
            // For the next start to know it, too: what is not known to be committed may be replaced.
            let known = HardState { commit: found.committed_index, ..self.log.hard_state() };
            if let Err(error) = self.log.stage_with(Some(known), None, &[]) {
                tracing::warn!(topic = %self.topic, partition = self.index, %error, "what is committed could not be stored");
            }
            self.refuse(&format!(
                "offsets {from} to {to} are committed here, and broker {leader}, which leads in epoch {}, has committed \
                 others in their place. A disk lost what it had said to have, or files were copied; nothing was removed \
                 here. Either keep what the leader has: move this replica to another broker and back \
                 (kafka-reassign-partitions); or keep what is here: stop the other replicas' brokers, and run flumen debug \
                 recover in this directory",
                found.term
            ));
            return false;
        }
        let shard = self.shard.upgrade();
        let partition = shard.as_ref().and_then(|shard| shard.partition(self.group_id));
        if let (Some(shard), Some(partition), None) = (shard, partition, self.known_contradiction()) {
            *self.contradiction.borrow_mut() = Some(Box::new(found));
            tracing::info!(topic = %self.topic, partition = self.index, leader, "contradicts its leader, and asks who the members are");
            tokio::task::spawn_local(joins::ask_to_begin_over(shard, partition, found));
        }
        true
    }

    fn known_contradiction(&self) -> Option<Contradiction> {
        self.contradiction.borrow().as_deref().copied()
    }

    /// Committed offsets of this replica that its leader does not have: from the first, to the end.
    fn lost_offsets(&self, found: &Contradiction) -> (i64, i64) {
        let start = self.log.log_start_offset();
        let agreed = found.agreed_index.and_then(|index| self.log.end_of(index)).unwrap_or(start);
        (agreed.max(start), self.high_watermark())
    }

    /// Whether it makes sense to go on asking.
    pub(crate) fn still_contradicts(&self, found: &Contradiction) -> bool {
        let now = self.raft_status().leadership;
        // It may not have heard of that leader otherwise yet, or not lately.
        let of_this_term = now.term < found.term
            || (now.term == found.term && [0, found.leader_id].contains(&now.leader_id));
        let goes_on = of_this_term && self.damage().is_none() && self.known_contradiction() == Some(*found);
        if !goes_on {
            *self.contradiction.borrow_mut() = None;
        }
        goes_on
    }

    /// The leader has said who the members are. True: done; the replica is empty, and the leader fills it.
    pub(crate) fn begin_over(&self, found: &Contradiction, index: u64, membership: &Membership) -> bool {
        let has_room =
            !self.log.must_wait(BEGINNING_BYTES, BEGINNING_BYTES, 1) && self.log.has_room(BEGINNING_BYTES);
        if !has_room || self.log.is_beginning() {
            return false;
        }
        let (from, to) = self.lost_offsets(found);
        let begun = self.state.borrow_mut().raft.begin_over(found, index, membership);
        match begun {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                self.refuse(&format!("its Raft group cannot begin over: {error}"));
                return true;
            }
        }
        tracing::warn!(
            topic = %self.topic, partition = self.index, lost_records = to - from, from, to,
            leader = node_id_of(found.leader_id), durability = ?self.config.borrow().acknowledges(),
            "committed records that only this replica had left are lost: it gives up its log and is filled by its leader. \
             Topics of this durability acknowledge what lies in the memory of a majority of brokers; several of them lost \
             theirs (power, or a kill for `memory`), or some while this one was down"
        );
        *self.contradiction.borrow_mut() = None;
        self.advance();
        self.stay_awake();
        true
    }

    /// Has the log begin at nothing, as Raft put out.
    pub(super) fn store_begin_over(
        &self,
        install: &Install,
        hard_state: HardState,
    ) -> Result<(Lane, Lsn), StageError> {
        let abstains_below = self.state.borrow().raft.abstains_below();
        let beginning = Beginning {
            hard_state,
            index: 0,
            term: 0,
            offset: 0,
            membership: (install.membership_index, install.membership.encode_stored(abstains_below)),
            producers: ProducerState::default().encode(0, -1).into(),
        };
        let staged = self.log.begin_anew(&beginning)?;
        self.set_alone(install.membership.has_only(self.node_id));
        self.committed.set(Some(0));
        self.told_before.set(0);
        self.everywhere_known.set(0);
        self.forced.set((0, 0));
        *self.shipment.borrow_mut() = None;
        *self.turned_away.borrow_mut() = super::TurnedAway::default();
        let mut state = self.state.borrow_mut();
        state.uncommitted.clear();
        state.log_starts.clear();
        state.recovered = (0, 0);
        state.next_offset = 0;
        state.high_watermark = 0;
        drop(state);
        self.gauges.begun_over.fetch_add(1, Ordering::Relaxed);
        // Readers find that the log ends before their position, and ask the leader.
        self.wake_readers();
        self.publish_gauges();
        Ok(staged)
    }
}
