//! Members that come and go, followers that are far behind, and groups that sleep.

mod support;

use bytes::Bytes;
use flumen_raft::{AwakeSet, Body, Membership, ProposeError, Role, Target};
use support::{Disk, Net};

fn target(voters: &[u64], learners: &[u64]) -> Target {
    Target { voters: voters.to_vec(), learners: learners.to_vec() }
}

fn change(net: &mut Net, leader: u64, voters: &[u64], learners: &[u64]) {
    net.node(leader).group.propose_membership(target(voters, learners)).unwrap();
    net.settle();
}

/// A node that knows the group only by the members it was created with.
fn add_newcomer(net: &mut Net, id: u64) {
    let membership = net.nodes.values().next().unwrap().disk.membership.clone();
    net.add(id, Disk { membership, ..Disk::default() });
}

/// Three, of which 1 leads and 3 is cut off: the others have 31 entries, and retention took the leader's first twenty. Also the
/// term of the last one that went.
fn one_left_behind() -> (Net, u64) {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(3);
    for _ in 0..30 {
        net.propose(1, "x");
    }
    let leader = net.node(1);
    let term = leader.disk.entries[19].term;
    leader.disk.entries.drain(..20);
    leader.disk.before = (20, term);
    leader.group.set_log_start(20);
    (net, term)
}

#[test]
fn a_group_of_one_grows_to_three_and_moves_by_learners_and_joint_consensus() {
    let mut net = Net::of(&[1]);
    net.campaign(1);
    for _ in 0..20 {
        net.propose(1, "before");
    }
    for id in 2..=4 {
        add_newcomer(&mut net, id);
    }
    change(&mut net, 1, &[1], &[2, 3]);
    net.tick_all(4);
    assert_eq!(net.node(3).disk.last(), net.node(1).disk.last(), "learners have caught up");
    assert!(net.node(1).entries_read > 0, "from what memory no longer had");
    change(&mut net, 1, &[1, 2, 3], &[]);
    net.tick_all(4);
    assert_eq!(net.node(2).group.membership(), &Membership::of_voters([1, 2, 3]));
    // Replaces two of three at once; the old and the new majority are both needed in between.
    net.isolate(4);
    net.node(1).group.propose_membership(target(&[1, 4, 5], &[])).unwrap();
    net.settle();
    assert!(net.node(1).group.membership().is_joint());
    assert_eq!(net.node(1).group.propose_membership(target(&[1], &[])), Err(ProposeError::ChangePending));
    let committed = net.node(1).committed;
    net.propose(1, "needs both");
    assert_eq!(net.node(1).committed, committed, "4 and 5 are not there");
    net.heal();
    net.tick_all(6);
    assert!(net.node(1).committed > committed);
    assert_eq!(net.node(4).group.membership(), &Membership::of_voters([1, 4, 5]));
    assert!(!net.node(1).group.membership().is_joint());
}

#[test]
fn a_leader_that_is_removed_steps_down_and_the_others_go_on() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    change(&mut net, 1, &[2, 3], &[]);
    assert_eq!(net.role(1), Some(Role::Follower));
    net.tick_all(60);
    let leader = net.leaders();
    assert_eq!(leader.len(), 1);
    assert_ne!(leader[0], 1);
    net.propose(leader[0], "without it");
    assert_eq!(net.node(leader[0]).group.membership(), &Membership::of_voters([2, 3]));
    let disk = net.node(1).disk.clone();
    assert_eq!(disk.membership, Membership::of_voters([2, 3]), "and it knows that it is out");
}

#[test]
fn a_restart_has_the_members_it_had_and_applies_again_what_was_not_stored() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    change(&mut net, 1, &[1, 2, 3], &[4]);
    assert_eq!(net.node(2).disk.membership.learners, [4]);
    assert!(net.node(2).disk.hard_state.commit >= net.node(2).disk.membership_index);
    net.crash(2);
    assert_eq!(net.node(2).group.membership().learners, [4]);
    // As after a crash between the entry and the membership.
    let mut disk = net.node(3).disk.clone();
    disk.membership = Membership::of_voters([1, 2, 3]);
    disk.membership_index = 0;
    net.nodes.remove(&3);
    net.add(3, disk);
    net.tick_all(8);
    assert_eq!(net.node(3).group.membership().learners, [4]);
}

#[test]
fn a_group_of_one_does_not_count_alone_what_follows_a_change_of_members() {
    // The log has a change to three voters, and something behind it that only this disk has.
    let mut net = Net::of(&[1]);
    net.campaign(1);
    for id in 2..=3 {
        add_newcomer(&mut net, id);
    }
    change(&mut net, 1, &[1, 2, 3], &[]);
    net.tick_all(4);
    net.isolate(1);
    let alone = net.propose(1, "on one disk of three");
    let mut disk = net.node(1).disk.clone();
    disk.membership = Membership::of_voters([1]);
    disk.membership_index = 0;
    disk.hard_state.commit = 0;
    net.nodes.remove(&1);
    net.add(1, disk);
    net.node(1).group.campaign().unwrap();
    net.settle();
    net.tick(&[1], 30);
    assert!(net.node(1).committed < alone);
    assert_ne!(net.role(1), Some(Role::Leader));
    assert_eq!(net.node(1).group.membership().voters, [1, 2, 3]);
}

#[test]
fn a_follower_behind_the_beginning_of_the_log_starts_from_a_snapshot() {
    let (mut net, term) = one_left_behind();
    net.heal();
    net.tick_all(12);
    assert_eq!(net.node(1).snapshots_made, 1);
    assert_eq!(net.node(3).disk.before, (20, term));
    assert_eq!(net.nodes[&3].disk.entries, net.nodes[&1].disk.entries);
    net.propose(1, "y");
    assert_eq!(net.node(3).committed, 32);
    net.crash(3);
    net.tick_all(8);
    assert_eq!(net.node(3).committed, 32);
}

#[test]
fn changes_of_members_before_those_of_a_snapshot_are_not_applied_again() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(3);
    for _ in 0..10 {
        net.propose(1, "x");
    }
    for id in 4..=5 {
        add_newcomer(&mut net, id);
    }
    // Two at once: a joint membership in between.
    change(&mut net, 1, &[1, 2, 3], &[4]);
    change(&mut net, 1, &[1, 3, 4, 5], &[]);
    net.tick(&[1, 2, 4, 5], 8);
    assert_eq!(net.node(1).group.membership().voters, [1, 3, 4, 5]);
    // A leader that restarted knows the newest membership only.
    let leader = net.node(1);
    let term = leader.disk.entries[4].term;
    leader.disk.entries.drain(..5);
    leader.disk.before = (5, term);
    net.crash(1);
    net.heal();
    for id in [2, 4, 5] {
        let node = net.node(id);
        node.disk.entries.drain(..5);
        node.disk.before = (5, term);
        node.group.set_log_start(5);
    }
    net.tick_all(120);
    let leader = net.leaders()[0];
    // `Net::work` has checked that no group reported a fault.
    assert_eq!(net.nodes[&3].disk.before, (5, term));
    assert_eq!(net.nodes[&3].disk.entries, net.nodes[&leader].disk.entries);
    assert_eq!(net.node(3).group.membership().voters, [1, 3, 4, 5]);
    net.crash(3);
    assert_eq!(net.node(3).group.membership().voters, [1, 3, 4, 5]);
}

#[test]
fn a_newcomer_is_not_offered_the_snapshot_of_a_time_before_it_was_a_member() {
    let (mut net, _) = one_left_behind();
    net.heal();
    net.tick_all(12);
    assert_eq!(net.node(3).disk.before.0, 20);
    add_newcomer(&mut net, 4);
    change(&mut net, 1, &[1, 2, 3], &[4]);
    net.tick_all(12);
    assert_eq!(net.node(1).snapshots_made, 2);
    assert_eq!(net.nodes[&4].disk.entries, net.nodes[&1].disk.entries);
}

#[test]
fn a_snapshot_that_is_lost_is_sent_again() {
    let (mut net, _) = one_left_behind();
    net.heal();
    let is_snapshot = |m: &flumen_raft::Message| matches!(m.body, Body::Snapshot { .. });
    for _ in 0..20 {
        for id in [1, 2, 3] {
            net.node(id).group.tick();
            net.work(id);
        }
        net.queue.retain(|m| !is_snapshot(m));
        while let Some(message) = net.queue.pop_front() {
            let to = message.to;
            net.node(to).group.step(message).unwrap();
            net.work(to);
            net.queue.retain(|m| !is_snapshot(m));
        }
    }
    assert!(net.sent.iter().any(is_snapshot));
    assert_eq!(net.node(3).disk.last().0, 1);
    net.tick_all(70);
    assert_eq!(net.nodes[&3].disk.entries, net.nodes[&1].disk.entries);
}

#[test]
fn no_election_begins_while_a_snapshot_is_being_stored() {
    let (mut net, _) = one_left_behind();
    net.node(3).slow_disk = true;
    net.heal();
    net.tick_all(12);
    net.isolate(3);
    net.tick(&[3], 60);
    let term = net.node(1).group.term();
    net.node(3).group.step(flumen_raft::Message { from: 1, to: 3, term, body: Body::TimeoutNow }).unwrap();
    net.work(3);
    assert_eq!(net.node(3).disk.last().0, 1, "it is still being stored");
    net.node(3).slow_disk = false;
    net.persist(3);
    net.settle();
    assert_eq!(net.node(3).disk.last().0, 20);
    net.heal();
    net.tick_all(80);
    let leader = net.leaders()[0];
    assert_eq!(net.nodes[&3].disk.entries, net.nodes[&leader].disk.entries);
}

#[test]
fn memory_holds_what_followers_may_need_and_no_more() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(3);
    let big = Bytes::from(vec![7; 100_000]);
    for _ in 0..100 {
        net.node(1).group.propose(big.clone()).unwrap();
        net.settle();
    }
    let held = net.node(1).group.status().tail_bytes;
    assert!((1_000_000..1_300_000).contains(&held), "{held}");
    assert!(net.node(2).group.status().tail_bytes <= 200_000, "a follower keeps what is not applied");
    net.heal();
    net.tick_all(20);
    assert_eq!(net.node(3).disk.last().0, 101);
    net.propose(1, "end");
    net.tick_all(4);
    assert!(net.node(1).group.status().tail_bytes < 1000, "everybody has it");
}

#[test]
fn a_majority_that_does_not_answer_makes_proposals_wait() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(1);
    let big = Bytes::from(vec![7; 1 << 20]);
    let refused = (0..100).find_map(|n| Some((n, net.node(1).group.propose(big.clone()).err()?)));
    assert_eq!(refused, Some((33, ProposeError::Backlogged)));
    net.settle();
    net.heal();
    net.tick_all(40);
    let leader = net.leaders()[0];
    net.propose(leader, "goes on");
    assert!(net.node(leader).committed >= 2);
}

#[test]
fn a_quiet_group_sleeps_and_wakes_for_work_for_a_voter_and_for_a_dead_broker() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.propose(1, "a");
    net.tick_all(40);
    assert!(net.ids().iter().all(|id| net.nodes[id].group.is_asleep()));
    let sent = net.sent.len();
    net.tick_all(200);
    assert_eq!((net.sent.len(), net.leaders()), (sent, vec![1]), "silence, and nobody stands for election");
    net.propose(1, "b");
    assert!(net.ids().iter().all(|id| !net.nodes[id].group.is_asleep() && net.nodes[id].committed == 3));
    net.tick_all(40);
    assert!(net.node(2).group.is_asleep());
    // A follower that restarts asks for votes, gets none, and finds its leader.
    net.crash(3);
    net.tick_all(30);
    assert_eq!((net.leaders(), net.node(3).group.leader_id()), (vec![1], 1));
    net.tick_all(40);
    assert!(net.node(1).group.is_asleep());
    // Broker 1 dies: the connections tell, once for all groups.
    net.isolate(1);
    for id in [2, 3] {
        assert!(net.node(id).group.on_node_down(1));
        assert!(!net.node(id).group.on_node_down(77));
    }
    net.tick(&[2, 3], 40);
    assert_eq!(net.leaders().into_iter().filter(|id| *id != 1).count(), 1);
    // The old leader is told that the others are gone, and finds that it has no majority.
    net.node(1).group.on_node_down(2);
    net.tick(&[1], 25);
    assert_ne!(net.role(1), Some(Role::Leader));
}

#[test]
fn a_follower_that_lacks_something_does_not_go_to_sleep() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    let term = net.node(1).group.term();
    let body = Body::Heartbeat { commit: 9, read: None, sleep: true };
    net.node(2).group.step(flumen_raft::Message { from: 1, to: 2, term, body }).unwrap();
    net.settle();
    assert!(!net.node(2).group.is_asleep());
    assert!(!net.node(1).group.is_asleep());
}

#[test]
fn ten_thousand_quiet_groups_cost_nothing_to_tick() {
    const GROUPS: usize = 10_000;
    let disk = Disk { membership: Membership::of_voters([1]), ..Disk::default() };
    let mut groups: Vec<_> = (0..GROUPS)
        .map(|seed| {
            let mut start = disk.start(1);
            start.seed = seed as u64;
            flumen_raft::Group::start(&start).unwrap()
        })
        .collect();
    let mut awake = AwakeSet::default();
    for (slot, group) in groups.iter_mut().enumerate() {
        group.campaign().unwrap();
        while let Some(outputs) = group.take_outputs() {
            group.on_persisted(outputs.number);
        }
        awake.wake(slot);
        awake.wake(slot);
    }
    assert_eq!(awake.len(), GROUPS);
    for _ in 0..30 {
        awake.tick_all(|slot| {
            let stays = groups[slot].tick();
            while let Some(outputs) = groups[slot].take_outputs() {
                groups[slot].on_persisted(outputs.number);
            }
            stays
        });
    }
    assert!(awake.is_empty());
    groups[77].propose(Bytes::from_static(b"x")).unwrap();
    awake.wake(77);
    let mut ticked = Vec::new();
    awake.tick_all(|slot| {
        ticked.push(slot);
        groups[slot].tick()
    });
    assert_eq!((ticked, awake.len()), (vec![77], 1));
}
