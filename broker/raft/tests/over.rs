//! Replicas of groups that do not keep what they promise: one has committed entries that the others lost, or lost what it had
//! acknowledged itself. Golden scripts, as `scenarios.rs`.

mod support;

use flumen_raft::{Contradiction, HardState, Membership, Target};
use support::{Net, is_append};

/// Node 1 has four entries and knows that all are committed; the others kept two, and node 2 stands for election.
fn led_without_the_first() -> Net {
    let mut net = Net::with_logs(&[(1, &[1, 1, 1, 1]), (2, &[1, 1]), (3, &[1, 1])]);
    let mut disk = net.node(1).disk.clone();
    disk.hard_state.commit = 4;
    net.nodes.remove(&1);
    net.add(1, disk);
    net.isolate(1);
    net.campaign(2);
    net
}

/// Node 1 has four entries and knows that all are committed; the others kept two, elected node 2, and it has committed more.
fn contradicting() -> (Net, u64) {
    let mut net = led_without_the_first();
    assert_eq!(net.leaders(), [2]);
    net.propose(2, "another");
    net.propose(2, "and another");
    let term = net.node(2).group.term();
    (net, term)
}

fn begin_over(net: &mut Net, id: u64) -> bool {
    let found = net.node(id).contradiction.take().expect("it contradicts");
    let (index, members) = (net.node(2).group.membership_index(), net.node(2).group.membership().clone());
    let begun = net.node(id).group.begin_over(&found, index, &members).unwrap();
    net.work(id);
    begun
}

fn all_equal(net: &Net) -> bool {
    net.nodes.values().all(|node| node.disk.entries == net.nodes[&2].disk.entries)
}

#[test]
fn a_replica_says_what_contradicts_it_and_begins_at_nothing() {
    let (mut net, term) = contradicting();
    net.heal();
    net.tick_all(6);
    let found = Contradiction { leader_id: 2, term, agreed_index: Some(2), committed_index: 4 };
    assert_eq!(net.node(1).contradiction, Some(found));
    // It keeps what it has until it is told, and the leader asks it once a heartbeat, not without end.
    assert_eq!(net.terms(1), [1, 1, 1, 1]);
    let asked = |net: &Net| net.sent.iter().filter(|m| is_append(m) && m.to == 1).count();
    let before = asked(&net);
    net.tick_all(30);
    assert!((1..=11).contains(&(asked(&net) - before)), "{} appends", asked(&net) - before);
    assert!(net.nodes.values().all(|node| node.refused.is_empty()));
    assert!(begin_over(&mut net, 1));
    net.tick_all(9);
    assert!(all_equal(&net));
    assert_eq!(net.nodes[&1].committed, net.nodes[&2].committed);
    assert_eq!((net.leaders(), net.node(1).group.abstains_below()), (vec![2], 0));
    // And takes part.
    net.isolate(3);
    net.propose(2, "with node 1");
    assert_eq!(net.nodes[&2].committed, net.nodes[&2].disk.last().0);
}

#[test]
fn a_leader_does_not_count_a_replica_that_contradicts_it() {
    let (mut net, _) = contradicting();
    let committed = net.node(2).committed;
    net.heal();
    net.isolate(3);
    for data in ["a", "b", "c"] {
        net.propose(2, data);
    }
    net.tick(&[1, 2], 6);
    assert_eq!(net.node(2).committed, committed, "node 1 has none of it, whatever its commit index");
    assert!(begin_over(&mut net, 1));
    net.tick(&[1, 2], 9);
    assert_eq!(net.nodes[&2].committed, net.nodes[&2].disk.last().0);
}

#[test]
fn what_the_leader_has_not_committed_itself_contradicts_nobody() {
    let mut net = led_without_the_first();
    // Its first entry is committed by node 3, and it has not heard of that.
    let disk = net.node(2).disk.clone();
    net.crash(2);
    assert_eq!(net.node(2).disk.last(), disk.last());
    net.heal();
    net.isolate(3);
    net.tick(&[1, 2], 60);
    assert_eq!(net.leaders(), [2], "node 1 votes as its log says");
    assert_eq!((net.node(1).contradiction, net.terms(1)), (None, vec![1, 1, 1, 1]));
    net.heal();
    net.tick_all(9);
    assert!(net.node(1).contradiction.is_some());
}

#[test]
fn a_crash_leaves_the_old_replica_or_one_that_abstains() {
    // Before it is on the disk: the old one, which contradicts again.
    let (mut net, term) = contradicting();
    net.heal();
    net.tick_all(6);
    net.node(1).slow_disk = true;
    assert!(begin_over(&mut net, 1));
    net.tick_all(6);
    net.crash(1);
    assert_eq!(net.terms(1), [1, 1, 1, 1]);
    net.tick_all(30);
    assert!(net.node(1).contradiction.is_some());
    // After that: an empty one.
    net.isolate(1);
    assert!(begin_over(&mut net, 1));
    net.crash(1);
    assert_eq!(net.terms(1), [] as [u64; 0]);
    assert_eq!(net.node(1).group.abstains_below(), term);
    assert!(net.node(1).disk.hard_state.term >= term);
    // It has nothing, so it would vote for anybody. Node 3 lost what node 2 and node 1 may have committed.
    net.node(3).disk.entries.truncate(2);
    net.crash(3);
    net.heal();
    net.isolate(2);
    net.node(1).group.campaign().unwrap();
    net.tick(&[1, 3], 100);
    assert!(net.leaders().iter().all(|id| *id == 2), "{:?}", net.leaders());
    net.heal();
    net.tick_all(60);
    assert!(all_equal(&net) && net.terms(1).contains(&term));
    assert_eq!(net.node(1).group.abstains_below(), 0);
    // Full again, it votes.
    let led = net.leaders();
    net.isolate(led[0]);
    let rest: Vec<u64> = net.ids().into_iter().filter(|id| *id != led[0]).collect();
    for id in &rest {
        net.node(*id).group.on_node_down(led[0]);
    }
    net.tick(&rest, 60);
    assert!(net.leaders().iter().any(|id| *id != led[0]));
}

/// Empty, and the only other voter of its group is the leader, which is started again.
fn two_voters_left() -> (Net, u64) {
    let (mut net, term) = contradicting();
    net.heal();
    net.tick_all(6);
    let two = Target { voters: vec![1, 2], learners: Vec::new() };
    net.node(2).group.propose_membership(two).unwrap();
    net.tick_all(6);
    assert_eq!(net.node(2).group.membership().voters, [1, 2]);
    net.nodes.remove(&3);
    assert!(begin_over(&mut net, 1));
    net.crash(1);
    assert_eq!((net.node(1).group.abstains_below(), net.terms(1).len()), (term, 0));
    (net, term)
}

/// Regression: the leader needed the vote of the replica that abstained, for ever.
#[test]
fn who_abstains_votes_for_those_who_have_what_it_lacks() {
    let (mut net, _) = two_voters_left();
    net.crash(2);
    net.tick_all(60);
    assert_eq!(net.leaders(), [2]);
    assert!(all_equal(&net) && !net.terms(1).is_empty());
}

#[test]
fn who_abstains_votes_when_nobody_has_what_it_lacks() {
    let (mut net, term) = two_voters_left();
    net.node(2).disk.entries.truncate(2);
    net.crash(2);
    assert!(net.node(2).disk.last().1 < term);
    net.tick_all(100);
    assert_eq!(net.leaders(), [2]);
    assert!(all_equal(&net) && net.terms(1).len() > 2);
}

#[test]
fn a_log_that_lost_the_mark_again_abstains_again() {
    let (mut net, term) = contradicting();
    net.heal();
    net.tick_all(6);
    assert!(begin_over(&mut net, 1));
    net.tick_all(9);
    assert_eq!(net.node(1).group.abstains_below(), 0);
    net.node(1).disk.entries.truncate(2);
    net.crash(1);
    assert_eq!(net.node(1).group.abstains_below(), term);
    net.tick_all(9);
    assert!(all_equal(&net));
}

/// What a leader believes of a follower may be more than is there.
#[test]
fn a_follower_that_lost_what_it_acknowledged_is_sent_it_again() {
    for keeps in [0, 2] {
        let mut net = Net::of(&[1, 2, 3]);
        net.campaign(2);
        for data in ["a", "b", "c", "d"] {
            net.propose(2, data);
        }
        let term = net.node(2).group.term();
        net.node(1).disk.entries.truncate(keeps);
        net.node(1).disk.hard_state = HardState { term, vote: 2, commit: 0 };
        net.crash(1);
        net.tick_all(12);
        assert_eq!((net.leaders(), net.node(2).group.term()), (vec![2], term));
        assert!(all_equal(&net), "{:?}", net.terms(1));
        net.propose(2, "e");
        assert!(all_equal(&net), "{:?}", net.terms(1));
    }
}

#[test]
fn it_is_for_the_leader_that_contradicted_and_for_members_only() {
    let (mut net, term) = contradicting();
    net.heal();
    net.tick_all(6);
    let found = net.node(1).contradiction.unwrap();
    let members = net.node(2).group.membership().clone();
    let group = &mut net.node(1).group;
    let others = [
        Contradiction { leader_id: 3, ..found },
        Contradiction { term: term - 1, ..found },
        Contradiction { term: term + 1, ..found },
    ];
    for other in others {
        assert!(!group.begin_over(&other, 0, &members).unwrap());
    }
    assert!(!group.begin_over(&found, 0, &Membership::of_voters([2, 3])).unwrap());
    assert!(!net.node(2).group.begin_over(&found, 0, &members).unwrap());
    assert_eq!(net.terms(1), [1, 1, 1, 1]);
}
