//! The steps by which a partition's Raft group gets to where the metadata wants it.
//!
//! Asked of the group's leader, again and again, with what it sees: the answer is the next step and nothing is
//! remembered, so that any leader can go on where the last one stopped. New replicas first get the log without a vote;
//! once they have it, they and those who leave are exchanged in one joint change, so no majority is ever made of replicas
//! that are behind. A leader that is to leave hands over before it does.
//!
//! It proposes nothing and waits for nothing.

use std::collections::BTreeSet;

use crate::assignment::PartitionInfo;

/// A learner that lacks at most so many entries, and keeps up, may vote: what a majority then waits for is read and sent in
/// milliseconds.
pub const CAUGHT_UP_ENTRIES_MAX: u64 = 1000;

/// What the leader sees of its group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupView {
    pub leader: i32,
    pub voters: BTreeSet<i32>,
    pub learners: BTreeSet<i32>,
    /// A change of members is under way: the majorities of both sets count.
    pub is_joint: bool,
    /// Members with the number of committed entries that they lack; those that are not heard of are left out.
    pub behind: Vec<(i32, u64)>,
    /// Members that do not keep up, however few their entries are: entries may be large, and may come slowly.
    pub lagging: BTreeSet<i32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The members are those of the goal.
    Reached,
    Change {
        voters: BTreeSet<i32>,
        learners: BTreeSet<i32>,
    },
    HandOver {
        to: i32,
    },
    Wait(Waiting),
}

/// Why nothing can be done just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Waiting {
    #[error("a change of members waits for the majorities of both sets of replicas")]
    Joint,
    #[error("node {0} has to be running to get the log")]
    NotHeardOf(i32),
    #[error("node {id} still lacks {entries} entries")]
    CatchingUp { id: i32, entries: u64 },
    #[error("no replica that stays has caught up, so nobody can take over from node {0}")]
    NobodyToLead(i32),
    #[error("node {0} has to be running, as there would be no majority without it")]
    NoMajority(i32),
    #[error("the replica of node {0} is damaged, and without it there is no majority to take its vote away")]
    TooFewOthers(i32),
}

impl GroupView {
    fn behind_of(&self, id: i32) -> Option<u64> {
        self.behind.iter().find(|(member, _)| *member == id).map(|(_, entries)| *entries)
    }

    /// Who is missing for a majority of these voters, if they are others than now. Members may leave with those who are still
    /// there, and would leave a group behind that nothing can change any more.
    fn missing_of(&self, voters: &BTreeSet<i32>) -> Option<i32> {
        let is_heard_of = |id: i32| id == self.leader || self.behind_of(id).is_some();
        let silent: Vec<i32> = voters.iter().copied().filter(|id| !is_heard_of(*id)).collect();
        let enough = 2 * (voters.len() - silent.len()) > voters.len() || *voters == self.voters;
        silent.first().copied().filter(|_| !enough)
    }

    fn has_caught_up(&self, id: i32) -> bool {
        // One that has everything does so whatever was seen of it before.
        self.behind_of(id).is_some_and(|entries| {
            entries == 0 || (entries <= CAUGHT_UP_ENTRIES_MAX && !self.lagging.contains(&id))
        })
    }
}

pub fn next_step(info: &PartitionInfo, view: &GroupView) -> Step {
    if view.is_joint {
        return Step::Wait(Waiting::Joint);
    }
    let goal: BTreeSet<i32> = info.goal().iter().copied().collect();
    if view.voters == goal && view.learners.is_empty() {
        return Step::Reached;
    }
    let adding: BTreeSet<i32> = goal.difference(&view.voters).copied().collect();
    if !adding.is_subset(&view.learners) {
        return Step::Change { voters: view.voters.clone(), learners: adding };
    }
    for id in adding {
        match view.behind_of(id) {
            None => return Step::Wait(Waiting::NotHeardOf(id)),
            Some(entries) if !view.has_caught_up(id) => {
                return Step::Wait(Waiting::CatchingUp { id, entries });
            }
            Some(_) => {}
        }
    }
    if let Some(id) = view.missing_of(&goal) {
        return Step::Wait(Waiting::NoMajority(id));
    }
    if goal.contains(&view.leader) {
        return Step::Change { voters: goal, learners: BTreeSet::new() };
    }
    // The leader votes until somebody else leads: Raft cannot do without it in the middle of a change.
    let mut with_leader = goal;
    with_leader.insert(view.leader);
    if view.voters != with_leader || !view.learners.is_empty() {
        return Step::Change { voters: with_leader, learners: BTreeSet::new() };
    }
    match info.goal().iter().find(|id| view.has_caught_up(**id)) {
        Some(to) => Step::HandOver { to: *to },
        None => Step::Wait(Waiting::NobodyToLead(view.leader)),
    }
}

/// What the leader does for a member that lost its log, or has it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mending {
    /// It votes no more: its log may go, and a new one may join.
    Begin,
    Change {
        voters: BTreeSet<i32>,
        learners: BTreeSet<i32>,
    },
    Wait(Waiting),
    /// It votes, and has its log.
    Done,
}

/// For a partition that is not being moved, whose replica on node `id` is damaged, or whole and without a vote. Its vote goes before
/// its log does: a majority that counted on what it had said could otherwise be made without anybody who knows what that was.
pub fn mending_step(info: &PartitionInfo, view: &GroupView, id: i32, is_damaged: bool) -> Mending {
    if is_damaged {
        return without_damaged(view, id);
    }
    if view.is_joint {
        return Mending::Wait(Waiting::Joint);
    }
    if view.voters.contains(&id) {
        return Mending::Done;
    }
    match next_step(info, view) {
        Step::Change { voters, learners } => Mending::Change { voters, learners },
        Step::Wait(reason) => Mending::Wait(reason),
        // It is the goal of another that is missing; whoever leads is of the goal while nothing moves.
        Step::Reached | Step::HandOver { .. } => Mending::Done,
    }
}

/// The first half of it, which is the same for the metadata: its nodes get their votes as any that come.
pub fn without_damaged(view: &GroupView, id: i32) -> Mending {
    if view.is_joint {
        return Mending::Wait(Waiting::Joint);
    }
    if !view.voters.contains(&id) {
        return Mending::Begin;
    }
    let without = |set: &BTreeSet<i32>| set.iter().copied().filter(|member| *member != id).collect();
    let voters: BTreeSet<i32> = without(&view.voters);
    // The change itself takes a majority of those who voted before.
    match 2 * voters.len() > view.voters.len() {
        true => Mending::Change { voters, learners: without(&view.learners) },
        false => Mending::Wait(Waiting::TooFewOthers(id)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(ids: &[i32]) -> BTreeSet<i32> {
        ids.iter().copied().collect()
    }

    fn moving(replicas: &[i32], target: &[i32]) -> PartitionInfo {
        PartitionInfo { target: Some(target.to_vec()), ..PartitionInfo::at_rest(1, replicas.to_vec()) }
    }

    #[test]
    fn a_replica_is_replaced_without_a_majority_of_newcomers() {
        let info = moving(&[1, 2, 3], &[1, 2, 4]);
        let mut view = GroupView { leader: 1, voters: set(&[1, 2, 3]), ..GroupView::default() };
        view.behind = vec![(1, 0), (2, 0), (3, 0)];
        let step = next_step(&info, &view);
        assert_eq!(step, Step::Change { voters: set(&[1, 2, 3]), learners: set(&[4]) });
        view.learners = set(&[4]);
        assert_eq!(next_step(&info, &view), Step::Wait(Waiting::NotHeardOf(4)));
        view.behind.push((4, 5000));
        let waiting = Waiting::CatchingUp { id: 4, entries: 5000 };
        assert_eq!(next_step(&info, &view), Step::Wait(waiting));
        assert_eq!(waiting.to_string(), "node 4 still lacks 5000 entries");
        // Regression: few entries may be many bytes, which come slowly.
        (view.behind[3].1, view.lagging) = (800, set(&[4]));
        assert_eq!(next_step(&info, &view), Step::Wait(Waiting::CatchingUp { id: 4, entries: 800 }));
        (view.behind[3].1, view.lagging) = (0, set(&[4]));
        assert!(matches!(next_step(&info, &view), Step::Change { .. }));
        (view.behind[3].1, view.lagging) = (3, set(&[]));
        assert_eq!(next_step(&info, &view), Step::Change { voters: set(&[1, 2, 4]), learners: set(&[]) });
        view.is_joint = true;
        assert_eq!(next_step(&info, &view), Step::Wait(Waiting::Joint));
        view = GroupView { leader: 1, voters: set(&[1, 2, 4]), ..GroupView::default() };
        assert_eq!(next_step(&info, &view), Step::Reached);
    }

    #[test]
    fn a_leader_hands_over_before_it_leaves() {
        let info = moving(&[1], &[2]);
        let mut view = GroupView { leader: 1, voters: set(&[1]), ..GroupView::default() };
        assert_eq!(next_step(&info, &view), Step::Change { voters: set(&[1]), learners: set(&[2]) });
        (view.learners, view.behind) = (set(&[2]), vec![(1, 0), (2, 0)]);
        assert_eq!(next_step(&info, &view), Step::Change { voters: set(&[1, 2]), learners: set(&[]) });
        (view.voters, view.learners) = (set(&[1, 2]), set(&[]));
        assert_eq!(next_step(&info, &view), Step::HandOver { to: 2 });
        view.behind = vec![(1, 0), (2, 9999)];
        assert_eq!(next_step(&info, &view), Step::Wait(Waiting::NobodyToLead(1)));
        view.leader = 2;
        assert_eq!(next_step(&info, &view), Step::Change { voters: set(&[2]), learners: set(&[]) });
    }

    /// Regression: of three replicas one was damaged, another left, and the two that stayed had no majority ever again.
    #[test]
    fn nobody_leaves_who_is_needed_for_a_majority() {
        let info = moving(&[1, 2, 3], &[1, 3]);
        let mut view = GroupView { leader: 1, voters: set(&[1, 2, 3]), ..GroupView::default() };
        view.behind = vec![(1, 0), (2, 0)];
        assert_eq!(next_step(&info, &view), Step::Wait(Waiting::NoMajority(3)));
        view.leader = 2;
        assert_eq!(next_step(&info, &view), Step::Wait(Waiting::NoMajority(3)));
        (view.leader, view.behind) = (1, vec![(1, 0), (2, 0), (3, 5000)]);
        assert_eq!(next_step(&info, &view), Step::Change { voters: set(&[1, 3]), learners: set(&[]) });
    }

    #[test]
    fn a_move_that_was_given_up_drops_its_learner() {
        let mut info = moving(&[1, 2], &[1, 2]);
        info.dropped = vec![3];
        let view = GroupView { leader: 1, voters: set(&[1, 2]), learners: set(&[3]), ..GroupView::default() };
        assert_eq!(next_step(&info, &view), Step::Change { voters: set(&[1, 2]), learners: set(&[]) });
    }

    #[test]
    fn a_replica_loses_its_vote_before_its_log_and_gets_both_again() {
        let info = PartitionInfo::at_rest(1, vec![1, 2, 3]);
        let mut view = GroupView { leader: 1, voters: set(&[1, 2, 3]), ..GroupView::default() };
        view.behind = vec![(1, 0), (2, 0)];
        let step = mending_step(&info, &view, 3, true);
        assert_eq!(step, Mending::Change { voters: set(&[1, 2]), learners: set(&[]) });
        view.is_joint = true;
        assert_eq!(mending_step(&info, &view, 3, true), Mending::Wait(Waiting::Joint));
        view = GroupView { voters: set(&[1, 2]), is_joint: false, ..view };
        assert_eq!(mending_step(&info, &view, 3, true), Mending::Begin);
        let step = mending_step(&info, &view, 3, false);
        assert_eq!(step, Mending::Change { voters: set(&[1, 2]), learners: set(&[3]) });
        view.learners = set(&[3]);
        assert_eq!(mending_step(&info, &view, 3, false), Mending::Wait(Waiting::NotHeardOf(3)));
        // Damaged again before it votes again.
        assert_eq!(mending_step(&info, &view, 3, true), Mending::Begin);
        view.behind.push((3, 2));
        // Regression: few entries may be many bytes, here as in a move.
        view.lagging = set(&[3]);
        let waiting = Waiting::CatchingUp { id: 3, entries: 2 };
        assert_eq!(mending_step(&info, &view, 3, false), Mending::Wait(waiting));
        view.lagging.clear();
        let step = mending_step(&info, &view, 3, false);
        assert_eq!(step, Mending::Change { voters: set(&[1, 2, 3]), learners: set(&[]) });
        view = GroupView { voters: set(&[1, 2, 3]), learners: set(&[]), ..view };
        assert_eq!(mending_step(&info, &view, 3, false), Mending::Done);
        // Of two, one is no majority.
        let (info, voters) = (PartitionInfo::at_rest(1, vec![1, 3]), set(&[1, 3]));
        let step = mending_step(&info, &GroupView { voters, ..view }, 3, true);
        assert_eq!(step, Mending::Wait(Waiting::TooFewOthers(3)));
    }

    proptest! {
        /// From any members to any goal, with leaders that die on the way, in few steps.
        #[test]
        fn every_goal_is_reached(
            from in proptest::collection::btree_set(0i32..7, 1..5),
            to in proptest::collection::btree_set(0i32..7, 1..5),
            learners in proptest::collection::btree_set(0i32..7, 0..3),
            deaths in proptest::collection::vec(any::<bool>(), 20),
        ) {
            let ids = |set: &BTreeSet<i32>| set.iter().copied().collect::<Vec<_>>();
            let info = moving(&ids(&from), &ids(&to));
            let mut view = GroupView {
                leader: *from.first().unwrap(),
                learners: learners.difference(&from).copied().collect(),
                voters: from,
                ..GroupView::default()
            };
            let mut caught_up = view.voters.clone();
            for dies in deaths {
                view.behind = view.voters.union(&view.learners)
                    .map(|id| (*id, if caught_up.contains(id) { 0 } else { 99_999 })).collect();
                match next_step(&info, &view) {
                    Step::Reached => {
                        prop_assert_eq!(&view.voters, &to);
                        return Ok(());
                    }
                    Step::Change { voters, learners } => {
                        // Nobody votes who has not got the log.
                        prop_assert!(voters.is_subset(&caught_up));
                        prop_assert!(voters.contains(&view.leader));
                        (view.voters, view.learners) = (voters, learners);
                    }
                    Step::HandOver { to } => view.leader = to,
                    Step::Wait(Waiting::CatchingUp { id, .. }) => drop(caught_up.insert(id)),
                    Step::Wait(other) => prop_assert!(false, "{other}"),
                }
                if dies {
                    view.leader = *view.voters.last().unwrap();
                }
            }
            prop_assert!(false, "{view:?}");
        }
    }
}
