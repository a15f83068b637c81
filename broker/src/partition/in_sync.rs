//! Which replicas of a partition are in sync, as its leader sees it. Pure; nothing is decided by it but what clients, operators
//! and whoever hands leaderships over are told: what is committed is on a majority in any case.
//!
//! As with Kafka's in-sync replicas, one that was down or fell behind is in sync again only when it has what was committed a
//! moment ago, and one that keeps up under load is not called behind for what is on its way.

use std::collections::{BTreeSet, VecDeque};

use flumen_raft::PeerStatus;

/// A replica that lacks what was committed so many looks ago has fallen behind: two seconds, where one that keeps up takes
/// milliseconds.
const LOOKS: usize = 4;

#[derive(Default)]
pub(super) struct InSync {
    /// What was committed at the last looks, oldest first.
    committed: VecDeque<u64>,
    behind: BTreeSet<u64>,
    /// Who was looked at last.
    looked_at: BTreeSet<u64>,
    /// Who was down since the last look: what was committed then says nothing of what it missed.
    fell: BTreeSet<u64>,
    /// What was committed at the last look, if something waited to be.
    waited_at: Option<u64>,
    stalls: bool,
}

impl InSync {
    /// The leadership begins: what is committed now every replica has to have at the first look.
    pub(super) fn begin(&mut self, committed: u64) {
        self.committed = VecDeque::from([committed]);
        self.behind.clear();
        self.looked_at.clear();
        self.fell.clear();
        (self.waited_at, self.stalls) = (None, false);
    }

    /// Comes with every look.
    pub(super) fn watch_commits(&mut self, committed: u64, last: u64) {
        self.stalls = last > committed && self.waited_at == Some(committed);
        self.waited_at = (last > committed).then_some(committed);
    }

    /// Entries wait, and from one look to the next none was committed: somebody is missing who is not known to be behind.
    pub(super) fn commits_stall(&self) -> bool {
        self.stalls
    }

    /// It may have lost its log, for all that is known.
    pub(super) fn down(&mut self, id: u64) {
        self.behind.insert(id);
        self.fell.insert(id);
    }

    /// Who is behind. `peers`: all but the leader.
    pub(super) fn look<'a>(
        &mut self,
        peers: impl Iterator<Item = &'a PeerStatus> + Clone,
        committed: u64,
        is_up: impl Fn(u64) -> bool,
    ) -> Vec<u64> {
        let lately = self.committed.back().copied().unwrap_or(committed);
        let long_ago = self.committed.front().copied().unwrap_or(0);
        let was_behind = std::mem::take(&mut self.behind);
        let fell = std::mem::take(&mut self.fell);
        let is_behind = |peer: &&PeerStatus| {
            let must_have = if was_behind.contains(&peer.id) { lately } else { long_ago };
            !is_up(peer.id) || fell.contains(&peer.id) || peer.matched_index < must_have
        };
        self.looked_at = peers.clone().map(|peer| peer.id).collect();
        self.behind = peers.filter(is_behind).map(|peer| peer.id).collect();
        self.committed.push_back(committed);
        if self.committed.len() > LOOKS {
            self.committed.pop_front();
        }
        self.behind.iter().copied().collect()
    }

    /// It was seen to keep up. Before the first look nothing is known of anybody, and that is taken for it.
    pub(super) fn keeps_up(&self, id: u64) -> bool {
        self.looked_at.is_empty() || (self.looked_at.contains(&id) && !self.behind.contains(&id))
    }

    pub(super) fn behind(&self) -> Vec<u64> {
        self.behind.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(id: u64, matched_index: u64) -> PeerStatus {
        PeerStatus { id, matched_index, next_index: matched_index + 1, is_active: true, is_learner: false }
    }

    fn look(sync: &mut InSync, matched: [u64; 2], committed: u64, down: &[u64]) -> Vec<u64> {
        let peers = [peer(2, matched[0]), peer(3, matched[1])];
        sync.look(peers.iter(), committed, |id| !down.contains(&id))
    }

    #[test]
    fn one_that_was_down_comes_back_when_it_has_everything() {
        let mut sync = InSync::default();
        sync.begin(10);
        assert_eq!(look(&mut sync, [10, 10], 12, &[]), [0; 0]);
        assert_eq!(look(&mut sync, [20, 10], 20, &[3]), [3]);
        // Up again, and 20 entries are 20 MB.
        assert_eq!(look(&mut sync, [40, 10], 40, &[]), [3]);
        assert!(sync.keeps_up(2) && !sync.keeps_up(3) && !sync.keeps_up(4), "4 was not seen yet");
        assert_eq!(look(&mut sync, [60, 39], 60, &[]), [3]);
        assert_eq!(look(&mut sync, [80, 60], 80, &[]), [0; 0]);
        // It was away so shortly that no look saw it.
        sync.down(3);
        assert_eq!(sync.behind(), [3]);
        assert_eq!(look(&mut sync, [80, 60], 80, &[]), [3]);
        assert_eq!(look(&mut sync, [80, 80], 80, &[]), [0; 0]);
    }

    /// Regression: all that it missed was written between two looks.
    #[test]
    fn one_that_was_down_between_two_looks_has_to_come_back_too() {
        let mut sync = InSync::default();
        sync.begin(2);
        assert_eq!(look(&mut sync, [2, 2], 2, &[]), [0; 0]);
        sync.down(3);
        assert_eq!(look(&mut sync, [62, 2], 62, &[]), [3]);
        assert_eq!(look(&mut sync, [62, 61], 62, &[]), [3]);
        assert_eq!(look(&mut sync, [62, 62], 62, &[]), [0; 0]);
    }

    #[test]
    fn commits_stall_when_entries_wait_and_none_is_committed() {
        let mut sync = InSync::default();
        let mut looks = |committed, last| {
            sync.watch_commits(committed, last);
            sync.commits_stall()
        };
        assert!(!looks(5, 5) && !looks(5, 5) && !looks(5, 9), "nothing waited before");
        assert!(looks(5, 9) && looks(5, 12));
        assert!(!looks(6, 12) && looks(6, 12));
        assert!(!looks(12, 12));
    }

    #[test]
    fn what_is_on_its_way_does_not_count_for_a_while() {
        let mut sync = InSync::default();
        sync.begin(0);
        for committed in (100..).step_by(100).take(10) {
            assert_eq!(look(&mut sync, [committed, committed - 100], committed, &[]), [0; 0]);
        }
        for _ in 1..LOOKS {
            assert_eq!(look(&mut sync, [2000, 900], 2000, &[]), [0; 0]);
        }
        assert_eq!(look(&mut sync, [2000, 900], 2000, &[]), [3]);
        // A new leader asks for what was committed when it began.
        sync.begin(2000);
        assert_eq!(look(&mut sync, [2000, 1999], 2000, &[]), [3]);
    }
}
