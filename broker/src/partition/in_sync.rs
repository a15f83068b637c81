//! Which replicas of a partition are in sync, as its leader sees it. Pure; nothing is decided by it but what clients, operators
//! and whoever hands leaderships over are told: what is committed is on a majority in any case.
//!
//! As with Kafka's in-sync replicas, one that was down or fell behind is in sync again only when it has what was committed a
//! moment ago, and one that keeps up under load is not called behind for what is on its way.
//!
//! Nobody is in sync on trust. A new leader may know little of what is committed, and nothing of who lost its log meanwhile: in sync
//! is who has said, to it, that it has all that this leader began with. And what Raft knows of one that was down is what it had
//! before, so it has to be heard of again.

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
    /// Who was down and has not answered since.
    silent: BTreeSet<u64>,
    /// The term whose leadership this is about.
    epoch: i32,
    /// Where the log ended when it began, until the first look: so long every answer is one.
    began_at: Option<u64>,
    /// What was committed at the last look, if something waited to be.
    waited_at: Option<u64>,
    stalls: bool,
}

impl InSync {
    /// A leadership begins, unless that is known. All that the log has now may be committed, and `others` have to say that they
    /// have it.
    pub(super) fn begin(&mut self, epoch: i32, last: u64, others: impl IntoIterator<Item = u64>) -> bool {
        if self.epoch == epoch {
            return false;
        }
        *self = InSync {
            committed: VecDeque::from([last]),
            behind: others.into_iter().collect(),
            epoch,
            began_at: Some(last),
            ..InSync::default()
        };
        true
    }

    /// A replica answers. True where that is a reason to look at once (`look_first`).
    pub(super) fn answered(&mut self, id: u64) -> bool {
        self.silent.remove(&id);
        self.began_at.is_some() && self.behind.contains(&id)
    }

    /// Between the beginning and the first look: who is behind, if that is less than was known.
    pub(super) fn look_first<'a>(
        &mut self,
        peers: impl Iterator<Item = &'a PeerStatus>,
        is_up: impl Fn(u64) -> bool,
    ) -> Option<Vec<u64>> {
        let began_at = self.began_at?;
        let before = self.behind.len();
        for peer in peers.filter(|peer| peer.matched_index >= began_at && is_up(peer.id)) {
            if !self.fell.contains(&peer.id) {
                self.behind.remove(&peer.id);
            }
        }
        (self.behind.len() < before).then(|| self.behind())
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
        self.silent.insert(id);
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
        self.began_at = None;
        let is_behind = |peer: &&PeerStatus| {
            let must_have = if was_behind.contains(&peer.id) { lately } else { long_ago };
            let is_away = !is_up(peer.id) || fell.contains(&peer.id) || self.silent.contains(&peer.id);
            is_away || peer.matched_index < must_have
        };
        self.looked_at = peers.clone().map(|peer| peer.id).collect();
        self.behind = peers.filter(is_behind).map(|peer| peer.id).collect();
        self.committed.push_back(committed);
        if self.committed.len() > LOOKS {
            self.committed.pop_front();
        }
        self.behind.iter().copied().collect()
    }

    /// It was seen to keep up. Of one that came since the beginning nothing is known before the first look, and that is taken
    /// for it.
    pub(super) fn keeps_up(&self, id: u64) -> bool {
        (self.looked_at.is_empty() || self.looked_at.contains(&id)) && !self.behind.contains(&id)
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

    fn begun(epoch: i32, last: u64) -> InSync {
        let mut sync = InSync::default();
        assert!(sync.begin(epoch, last, [2, 3]));
        sync
    }

    #[test]
    fn one_that_was_down_comes_back_when_it_has_everything() {
        let mut sync = begun(1, 10);
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
        assert!(!sync.answered(3));
        assert_eq!(look(&mut sync, [80, 60], 80, &[]), [3]);
        assert_eq!(look(&mut sync, [80, 80], 80, &[]), [0; 0]);
    }

    /// Regression: what Raft knew of it was what it had before, and nothing was written since.
    #[test]
    fn one_that_was_down_has_to_be_heard_of_again() {
        let mut sync = begun(1, 10);
        assert_eq!(look(&mut sync, [10, 10], 10, &[]), [0; 0]);
        sync.down(3);
        for _ in 0..2 * LOOKS {
            assert_eq!(look(&mut sync, [10, 10], 10, &[]), [3]);
        }
        sync.answered(2);
        assert_eq!(look(&mut sync, [10, 10], 10, &[]), [3]);
        sync.answered(3);
        assert_eq!(look(&mut sync, [10, 10], 10, &[]), [0; 0]);
    }

    /// Regression: a leader that had just started knew of nothing that was committed, so one without a log had all of that.
    #[test]
    fn nobody_is_in_sync_before_it_has_said_so_to_this_leader() {
        let mut sync = begun(3, 500);
        assert_eq!(sync.behind(), [2, 3]);
        assert!(!sync.keeps_up(2) && sync.keeps_up(4), "4 is no member yet");
        let first = |sync: &mut InSync, matched: [u64; 2], down: &[u64]| {
            let peers = [peer(2, matched[0]), peer(3, matched[1])];
            sync.look_first(peers.iter(), |id| !down.contains(&id))
        };
        assert!(sync.answered(2));
        assert_eq!(first(&mut sync, [499, 0], &[]), None);
        assert_eq!(first(&mut sync, [500, 0], &[]), Some(vec![3]));
        assert!(!sync.answered(2) && sync.answered(3) && sync.keeps_up(2));
        assert_eq!(first(&mut sync, [500, 500], &[3]), None);
        // The same leadership is told again.
        assert!(!sync.begin(3, 700, [2, 3]));
        assert_eq!(look(&mut sync, [500, 499], 0, &[]), [3]);
        assert!(!sync.answered(3), "from here on it is looked at in time");
        assert_eq!(first(&mut sync, [500, 500], &[]), None);
        assert_eq!(look(&mut sync, [500, 500], 500, &[]), [0; 0]);
        // One that goes meanwhile is waited for until the next look.
        let mut sync = begun(4, 9);
        sync.down(3);
        sync.answered(3);
        assert_eq!(first(&mut sync, [9, 9], &[]), Some(vec![3]));
        // It was never down for the next leader, and is behind all the same.
        assert!(sync.begin(5, 10, [2, 3]));
        assert_eq!(look(&mut sync, [10, 0], 0, &[]), [3]);
    }

    /// Regression: all that it missed was written between two looks.
    #[test]
    fn one_that_was_down_between_two_looks_has_to_come_back_too() {
        let mut sync = begun(1, 2);
        assert_eq!(look(&mut sync, [2, 2], 2, &[]), [0; 0]);
        sync.down(3);
        sync.answered(3);
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
        let mut sync = begun(1, 0);
        for committed in (100..).step_by(100).take(10) {
            assert_eq!(look(&mut sync, [committed, committed - 100], committed, &[]), [0; 0]);
        }
        for _ in 1..LOOKS {
            assert_eq!(look(&mut sync, [2000, 900], 2000, &[]), [0; 0]);
        }
        assert_eq!(look(&mut sync, [2000, 900], 2000, &[]), [3]);
        // A new leader asks for what it had when it began.
        assert!(sync.begin(2, 2000, [2, 3]));
        assert_eq!(look(&mut sync, [2000, 1999], 2000, &[]), [3]);
    }
}
