//! What a leader reads for a replica that lacks much waits for its turn (`cluster/pace.rs`), so that producers do not notice.
//!
//! Invariants
//! - Nobody who is in sync is held up, nor anybody of whom it is not known yet.
//! - A replica that votes is held up only while a majority of every set of voters is in sync without it, and commits go on.
//!   So what the others acknowledge never waits for a limit. Whoever waits is let go as soon as that changes: it is looked at
//!   when a broker is lost, with every look at the followers, and whenever the replica answers a heartbeat.
//! - Heartbeats and everything that is in memory is sent as ever: only what is read from segments waits.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use flumen_metadata::ThrottledReplicas;
use flumen_raft::Status;
use tokio::sync::{MutexGuard, Notify};
use tokio::time::Instant;

use super::Partition;
use super::outputs::READ_BYTES_MAX;
use crate::cluster::node_id_of;
use crate::cluster::pace::{self, Direction, Grant, Limit, limit};
use crate::shard::Shard;

/// Parts of a second that one read is worth at most: a slow rate makes small pieces, not long pauses.
const READS_PER_S: u64 = 4;
const READ_BYTES_MIN: u64 = 64 << 10;

#[derive(Default)]
pub(super) struct CatchUps {
    /// Bytes of entries that the log has got since it was opened.
    appended: Cell<u64>,
    /// First entries of the reads under way, each with what lets it go before its turn.
    reads: RefCell<BTreeMap<u64, Rc<Notify>>>,
    /// Replicas that wait for a turn just now.
    held: RefCell<BTreeMap<u64, usize>>,
    /// Replica, and up to where of `appended` it has been sent without that counting.
    free_of_charge: RefCell<BTreeMap<u64, u64>>,
}

/// A read that may be done, how much it may bring, and who pays for it.
pub(super) struct Turn<'a> {
    _turn: Option<MutexGuard<'a, ()>>,
    payer: Option<u64>,
    pub bytes_max: usize,
}

impl CatchUps {
    pub(super) fn note_appended(&self, bytes: usize) {
        self.appended.set(self.appended.get() + bytes as u64);
    }

    /// Takes from what was appended meanwhile what need not be paid; returns the rest.
    fn charge(&self, replica: u64, bytes: u64) -> u64 {
        let appended = self.appended.get();
        let mut marks = self.free_of_charge.borrow_mut();
        let mark = marks.entry(replica).or_insert(appended);
        let free = (appended - *mark).min(bytes);
        *mark += free;
        bytes - free
    }

    fn would_be_free(&self, replica: u64, bytes: u64) -> bool {
        let appended = self.appended.get();
        self.free_of_charge.borrow().get(&replica).is_some_and(|mark| appended - mark >= bytes)
    }

    /// False: that read is under way.
    pub(super) fn begin(&self, low: u64) -> bool {
        let mut reads = self.reads.borrow_mut();
        let is_new = !reads.contains_key(&low);
        if is_new {
            reads.insert(low, Rc::default());
        }
        is_new
    }

    pub(super) fn end(&self, low: u64) {
        self.reads.borrow_mut().remove(&low);
    }

    fn hold(&self, replica: u64) -> Held<'_> {
        *self.held.borrow_mut().entry(replica).or_default() += 1;
        Held { of: self, replica }
    }
}

struct Held<'a> {
    of: &'a CatchUps,
    replica: u64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.of.held.borrow_mut();
        if let Some(count) = held.get_mut(&self.replica) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.replica);
            }
        }
    }
}

/// The replica for which entries from `low` on are read, if it may be held up. `behind`: who is not in sync.
fn whom_to_hold(
    status: &Status,
    own: u64,
    behind: &BTreeSet<u64>,
    commits_stall: bool,
    low: u64,
) -> Option<u64> {
    let members = &status.membership;
    let goes_on_without = |id: u64| {
        let counts = |voter: &&u64| **voter != id && !behind.contains(voter);
        let goes_on =
            |voters: &[u64]| voters.is_empty() || voters.iter().filter(counts).count() * 2 > voters.len();
        goes_on(&members.voters) && goes_on(&members.outgoing)
    };
    let may_be_held = |id: u64, is_learner: bool| {
        let is_voter = !is_learner || members.outgoing.contains(&id);
        let is_needed = is_voter && (!behind.contains(&id) || commits_stall || !goes_on_without(id));
        !is_needed && status.transfer_to != Some(id)
    };
    let mut held = None;
    for peer in status.peers.iter().filter(|peer| peer.id != own && peer.next_index == low) {
        if !may_be_held(peer.id, peer.is_learner) {
            return None;
        }
        held = held.or(Some(peer.id));
    }
    held
}

impl Partition {
    /// The replicas that its topic throttles.
    pub(crate) fn throttled(&self, direction: Direction) -> ThrottledReplicas {
        let config = self.config.borrow();
        match direction {
            Direction::Sent => config.leader_throttled.clone(),
            Direction::Received => config.follower_throttled.clone(),
        }
    }

    fn whom_to_hold(&self, low: u64) -> Option<u64> {
        let in_sync = self.in_sync.borrow();
        let behind = in_sync.behind().into_iter().collect();
        whom_to_hold(&self.raft_status(), self.node_id, &behind, in_sync.commits_stall(), low)
    }

    /// Kafka ids of the replicas that wait because of a limit.
    pub(crate) fn held_up(&self) -> Vec<i32> {
        self.catch_ups.held.borrow().keys().copied().filter_map(node_id_of).collect()
    }

    /// Something has changed: whoever must not be held up any more is not.
    pub(super) fn let_go_of_reads(&self) {
        let reads: Vec<(u64, Rc<Notify>)> =
            self.catch_ups.reads.borrow().iter().map(|(low, lets_go)| (*low, lets_go.clone())).collect();
        for (low, lets_go) in reads {
            if self.whom_to_hold(low).is_none() {
                lets_go.notify_one();
            }
        }
    }

    /// Waits until entries from `low` on may be read for whoever lacks them.
    pub(super) async fn await_read_turn<'a>(&self, shard: &'a Shard, low: u64) -> Turn<'a> {
        let free = || Turn { _turn: None, payer: None, bytes_max: READ_BYTES_MAX };
        let lets_go = self.catch_ups.reads.borrow().get(&low).cloned();
        let (Some(replica), Some(lets_go)) = (self.whom_to_hold(low), lets_go) else { return free() };
        let _held = self.catch_ups.hold(replica);
        tokio::select! {
            biased;
            () = lets_go.notified() => free(),
            turn = self.take_turn(shard, replica) => turn,
        }
    }

    async fn take_turn<'a>(&self, shard: &'a Shard, replica: u64) -> Turn<'a> {
        let node = &*shard.node;
        let throttled = self.throttled(Direction::Sent);
        let limited = || limit(node, Direction::Sent, &throttled, self.index);
        let Limit { pace, rate, is_asked } = limited();
        let bytes_max = (rate / READS_PER_S).clamp(READ_BYTES_MIN, READ_BYTES_MAX as u64);
        let turn = |turn| Turn { _turn: turn, payer: Some(replica), bytes_max: bytes_max as usize };
        if !is_asked && self.catch_ups.would_be_free(replica, bytes_max) {
            return turn(None);
        }
        let asked = i64::try_from(bytes_max).unwrap_or(i64::MAX);
        if let Some(node_id) = node_id_of(replica) {
            while let Grant::AskAgainIn(wait) = pace::ask(shard, node_id, self.group_id, asked).await {
                tokio::time::sleep(wait).await;
            }
        }
        turn(Some(pace.turn(|| limited().rate).await))
    }

    /// So much was read.
    pub(super) fn pay(&self, shard: &Rc<Shard>, turn: Turn<'_>, bytes: usize) {
        let Some(replica) = turn.payer else { return };
        let throttled = self.throttled(Direction::Sent);
        let Limit { pace, rate, is_asked } = limit(&shard.node, Direction::Sent, &throttled, self.index);
        let bytes = bytes as u64;
        let counts = if is_asked { bytes } else { self.catch_ups.charge(replica, bytes) };
        pace.pay(Instant::now(), rate, i64::try_from(counts).unwrap_or(i64::MAX));
        let asked = if turn._turn.is_some() { turn.bytes_max as u64 } else { 0 };
        if asked > counts
            && let Some(node_id) = node_id_of(replica)
        {
            let (shard, group_id) = (shard.clone(), self.group_id);
            let less = i64::try_from(asked - counts).unwrap_or(0);
            tokio::task::spawn_local(async move { pace::ask(&shard, node_id, group_id, -less).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use flumen_raft::{Membership, PeerStatus};

    use super::*;
    use crate::partition::leading;

    fn status(voters: &[u64], outgoing: &[u64], learners: &[u64]) -> Status {
        let membership = Membership {
            outgoing: outgoing.to_vec(),
            learners: learners.to_vec(),
            ..Membership::of_voters(voters)
        };
        let mut all: BTreeSet<u64> = voters.iter().chain(outgoing).chain(learners).copied().collect();
        all.remove(&1);
        let peer = |id| PeerStatus {
            id,
            matched_index: 10,
            next_index: 11,
            is_active: true,
            is_learner: !voters.contains(&id),
        };
        leading(1, 5000, membership, all.into_iter().map(peer).collect())
    }

    fn only(mut status: Status, id: u64) -> Status {
        status.peers.iter_mut().filter(|peer| peer.id != id).for_each(|peer| peer.next_index = 5001);
        status
    }

    fn held(status: &Status, behind: &[u64], stall: bool) -> Option<u64> {
        whom_to_hold(status, 1, &behind.iter().copied().collect(), stall, 11)
    }

    #[test]
    fn only_who_is_not_needed_is_held_up() {
        let three = || only(status(&[1, 2, 3], &[], &[]), 3);
        assert_eq!(held(&three(), &[3], false), Some(3));
        assert_eq!(held(&three(), &[], false), None, "in sync, or not known yet");
        assert_eq!(held(&three(), &[2, 3], false), None, "the other is lost: no majority without it");
        assert_eq!(held(&three(), &[3], true), None, "nothing is committed without it, whatever the reason");
        let mut handing_over = three();
        handing_over.transfer_to = Some(3);
        assert_eq!(held(&handing_over, &[3], false), None);
        assert_eq!(held(&only(status(&[1, 2], &[], &[]), 2), &[2], false), None, "two of two");
        // Two of five may be away; the third that is behind is needed.
        let five = || only(status(&[1, 2, 3, 4, 5], &[], &[]), 5);
        assert_eq!(held(&five(), &[4, 5], false), Some(5));
        assert_eq!(held(&five(), &[3, 4, 5], false), None);
        // Nobody waits for what was asked for.
        assert_eq!(held(&only(status(&[1, 2, 3], &[], &[]), 9), &[2, 3], false), None);
    }

    #[test]
    fn learners_are_always_held_up_and_those_who_leave_count() {
        let learner = only(status(&[1], &[], &[4]), 4);
        assert_eq!(held(&learner, &[], false), Some(4));
        assert_eq!(held(&learner, &[4], true), Some(4), "what is committed never waits for it");
        // On its way from 1, 2, 3 to 1, 4, 5: both majorities count.
        let joint = || only(status(&[1, 4, 5], &[1, 2, 3], &[]), 4);
        assert_eq!(held(&joint(), &[4], false), Some(4));
        assert_eq!(held(&joint(), &[4, 5], false), None);
        assert_eq!(held(&joint(), &[4, 2, 3], false), None, "the old ones have no majority");
        let leaves = only(status(&[1, 4, 5], &[1, 2, 3], &[]), 3);
        assert_eq!(held(&leaves, &[2, 3], false), None, "it is no voter of the new ones, but of the old");
    }

    #[test]
    fn somebody_in_sync_who_wants_the_same_is_not_held_up() {
        let mut both = status(&[1, 2, 3, 4, 5], &[], &[]);
        both.peers.iter_mut().filter(|peer| peer.id > 3).for_each(|peer| peer.next_index = 5001);
        assert_eq!(held(&both, &[3], false), None, "2 is in sync");
        assert_eq!(held(&both, &[2, 3], false), Some(2));
    }

    #[test]
    fn what_is_written_meanwhile_is_free() {
        let ups = CatchUps::default();
        ups.note_appended(1000);
        assert_eq!(ups.charge(2, 100), 100, "what was there before is not");
        ups.note_appended(150);
        assert!(ups.would_be_free(2, 150) && !ups.would_be_free(2, 151) && !ups.would_be_free(3, 1));
        assert_eq!((ups.charge(2, 100), ups.charge(2, 100)), (0, 50));
        assert!(ups.begin(7) && !ups.begin(7));
        ups.end(7);
        assert!(ups.begin(7));
        let held = (ups.hold(2), ups.hold(2));
        drop(held.0);
        assert_eq!(ups.held.borrow().len(), 1);
        drop(held.1);
        assert!(ups.held.borrow().is_empty());
    }
}
