//! Scenarios of the Raft paper and of etcd's tests, against our boundary: elections, logs that differ, the commit rule.

mod support;

use bytes::Bytes;
use flumen_raft::{Body, HardState, Membership, Message, ProposeError, ReadError, Role, StepError};
use support::{Disk, Net, is_append};

/// Figure 7: a leader of term 8 makes the logs (a) to (f) like its own, whatever they lack or have too much.
#[test]
fn figure_7_the_leader_makes_all_logs_equal_to_its_own() {
    let leader: &[u64] = &[1, 1, 1, 4, 4, 5, 5, 6, 6, 6];
    let mut net = Net::with_logs(&[
        (1, leader),
        (2, &[1, 1, 1, 4, 4, 5, 5, 6, 6]),
        (3, &[1, 1, 1, 4]),
        (4, &[1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6]),
        (5, &[1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7]),
        (6, &[1, 1, 1, 4, 4, 4, 4]),
        (7, &[1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]),
    ]);
    net.node(1).group.campaign().unwrap();
    net.settle();
    // In the paper the terms 7 of (d) were given out already.
    if net.leaders().is_empty() {
        net.campaign(1);
    }
    assert_eq!(net.leaders(), [1]);
    net.tick_all(6);
    let term = net.node(1).group.term();
    assert!(term >= 8);
    let expected: Vec<u64> = leader.iter().copied().chain([term]).collect();
    for id in net.ids() {
        assert_eq!(net.terms(id), expected, "node {id}");
        assert_eq!(net.node(id).committed, 11, "node {id}");
    }
}

/// Figure 8: an entry of an older term on a majority is not committed by counting; one of the own term commits both.
#[test]
fn figure_8_entries_of_older_terms_commit_only_with_one_of_the_own() {
    // (b) and (c): S1 led in term 2 and wrote index 2 to itself and S2; S5 led in term 3 and wrote its own index 2.
    let logs: &[(u64, &[u64])] = &[(1, &[1, 2]), (2, &[1, 2]), (3, &[1]), (4, &[1]), (5, &[1, 3])];
    let mut net = Net::with_logs(logs);
    net.split(&[1, 2, 3], &[4, 5]);
    // S1 is leader again, in a higher term, and brings index 2 to S3: on three of five, but the answers to the entry of its
    // own term never come.
    net.node(1).slow_disk = true;
    net.node(1).group.campaign().unwrap();
    net.work(1);
    net.persist(1);
    net.settle();
    net.persist(1);
    net.settle();
    assert_eq!(net.leaders(), [1]);
    assert!(!net.node(1).group.may_serve());
    assert_eq!(net.node(1).group.confirm_read(), Err(ReadError::NotYet));
    // The followers have index 2 and the no-op; S1 itself has its no-op only in memory, so it counts two of five with it.
    assert_eq!(net.node(3).disk.last().0, 3);
    // (e): with its own entry stored, all of it is committed, and S5 cannot win any more.
    net.node(1).slow_disk = false;
    net.persist(1);
    net.settle();
    assert_eq!(net.node(1).committed, 3);
    net.heal();
    net.isolate(1);
    for _ in 0..3 {
        net.campaign(5);
    }
    net.tick(&[2, 3, 4, 5], 60);
    let leader = net.leaders().into_iter().find(|id| *id != 1).expect("a leader of the other four");
    assert_ne!(leader, 5);
    assert_eq!(net.terms(leader)[1], 2, "the committed entry stays");
    // (d), on another run: where S1's own entry never reached anybody, S5 may replace index 2 everywhere.
    let mut net = Net::with_logs(logs);
    net.campaign(5);
    assert_eq!(net.leaders(), [5]);
    net.tick_all(4);
    for id in net.ids() {
        assert_eq!(net.terms(id)[..2], [1, 3], "node {id}");
    }
}

#[test]
fn only_a_candidate_with_everything_committed_wins() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(3);
    net.propose(1, "a");
    net.propose(1, "b");
    net.heal();
    net.isolate(1);
    net.campaign(3);
    assert_ne!(net.role(3), Some(Role::Leader), "it lacks committed entries");
    net.tick(&[2, 3], 60);
    assert_eq!(net.leaders().into_iter().filter(|id| *id != 1).collect::<Vec<_>>(), [2]);
    assert_eq!(net.node(3).disk.last(), net.node(2).disk.last());
}

#[test]
fn what_a_deposed_leader_wrote_alone_is_replaced_and_announced() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(1);
    for data in ["lost 1", "lost 2", "lost 3"] {
        net.propose(1, data);
    }
    assert_eq!(net.node(1).committed, 1);
    assert_eq!(net.node(1).disk.last().0, 4);
    net.tick(&[2, 3], 40);
    let leader = net.leaders().into_iter().find(|id| *id != 1).unwrap();
    net.propose(leader, "kept");
    net.heal();
    net.tick_all(6);
    // `Disk::store` has checked that the replacement was announced.
    let logs: Vec<_> = net.ids().iter().map(|id| net.nodes[id].disk.entries.clone()).collect();
    assert!(logs.iter().all(|log| *log == logs[0]));
    assert_eq!(logs[0].last().unwrap().data, "kept");
    assert_eq!(net.leaders(), [leader]);
}

#[test]
fn a_node_that_comes_back_does_not_disturb_a_leader() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    let term = net.node(1).group.term();
    net.isolate(3);
    net.tick_all(200);
    assert_eq!(net.node(3).group.term(), term, "asking for votes in vain raises no term");
    net.heal();
    net.tick_all(10);
    assert_eq!((net.leaders(), net.node(1).group.term()), (vec![1], term));
}

#[test]
fn a_leader_without_a_majority_steps_down_and_confirms_no_read() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    let token = net.node(1).group.confirm_read().unwrap();
    net.settle();
    assert_eq!(net.node(1).reads.iter().map(|r| (r.token, r.index)).collect::<Vec<_>>(), [(token, 1)]);
    net.isolate(1);
    net.node(1).group.confirm_read().unwrap();
    net.tick_all(25);
    assert_eq!(net.node(1).reads.len(), 1, "nobody confirmed the second");
    assert_ne!(net.role(1), Some(Role::Leader));
    assert_eq!(net.node(1).group.confirm_read(), Err(ReadError::NotLeader));
    assert_eq!(net.node(1).group.propose(Bytes::from_static(b"x")), Err(ProposeError::NotLeader));
}

#[test]
fn an_answer_that_waits_for_the_disk_does_not_leave_before() {
    let mut net = Net::of(&[1, 2, 3]);
    net.node(2).slow_disk = true;
    net.node(3).slow_disk = true;
    net.node(1).group.campaign().unwrap();
    net.settle();
    // The question whether they would vote changes nothing on a disk. The vote itself does.
    let votes = |net: &Net| {
        let is_vote = |m: &&Message| matches!(m.body, Body::VoteAnswer { pre: false, granted: true, .. });
        net.sent.iter().filter(is_vote).count()
    };
    assert_eq!((votes(&net), net.leaders()), (0, vec![]));
    net.persist(2);
    net.settle();
    assert_eq!((votes(&net), net.leaders()), (1, vec![1]));
    assert_eq!(net.node(2).disk.hard_state.vote, 1);
    // The no-op is on the leader's disk alone.
    assert!(!net.node(1).group.may_serve());
    net.persist(2);
    net.settle();
    assert!(net.node(1).group.may_serve());
    assert_eq!(net.node(1).committed, 1);
}

#[test]
fn a_leaders_entries_leave_before_its_own_disk_has_them_and_may_commit_without_it() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.node(1).slow_disk = true;
    let before = net.sent.iter().filter(|m| is_append(m)).count();
    net.propose(1, "a");
    assert!(net.sent.iter().filter(|m| is_append(m)).count() > before);
    assert_eq!(net.node(1).disk.last().0, 1);
    // Both followers have it; the leader tells of it once it can serve it from its own log.
    assert_eq!(net.node(1).committed, 1);
    net.persist(1);
    net.settle();
    assert_eq!(net.node(1).committed, 2);
}

#[test]
fn a_read_waits_until_the_leader_has_applied_what_it_rests_on() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.node(1).slow_disk = true;
    net.propose(1, "a");
    let token = net.node(1).group.confirm_read().unwrap();
    net.settle();
    assert_eq!((net.node(1).committed, net.node(1).reads.len()), (1, 0), "committed by the followers");
    net.persist(1);
    net.settle();
    assert_eq!(net.node(1).committed, 2);
    assert_eq!(net.node(1).reads.iter().map(|r| (r.token, r.index)).collect::<Vec<_>>(), [(token, 2)]);
}

#[test]
fn a_single_voter_stores_its_term_before_a_learner_hears_of_it() {
    let membership = Membership { voters: vec![1], learners: vec![2], ..Membership::default() };
    let disk = Disk { membership, ..Disk::default() };
    let mut net = Net::default();
    net.add(1, disk.clone());
    net.add(2, disk);
    net.node(1).slow_disk = true;
    net.node(1).group.campaign().unwrap();
    net.settle();
    assert_eq!(net.leaders(), [1]);
    assert!(net.sent.is_empty(), "after a crash there would be two leaders of term 1");
    net.persist(1);
    net.settle();
    assert_eq!(net.node(2).disk.last(), (1, 1));
    net.propose(1, "a");
    net.persist(1);
    net.settle();
    assert_eq!(net.node(2).disk.last(), (2, 1));
}

#[test]
fn a_vote_survives_a_crash_and_is_given_once() {
    let mut net = Net::of(&[1, 2, 3]);
    let ask = |from: u64| Message {
        from,
        to: 2,
        term: 7,
        body: Body::VoteRequest {
            pre: false,
            forced: false,
            last_index: 0,
            last_term: 0,
            commit: 0,
            commit_term: 0,
        },
    };
    net.node(2).group.step(ask(1)).unwrap();
    net.work(2);
    net.crash(2);
    assert_eq!(net.node(2).disk.hard_state, HardState { term: 7, vote: 1, commit: 0 });
    net.sent.clear();
    net.node(2).group.step(ask(3)).unwrap();
    net.work(2);
    net.node(2).group.step(ask(1)).unwrap();
    net.work(2);
    let answers: Vec<_> =
        net.sent.iter().map(|m| (m.to, matches!(m.body, Body::VoteAnswer { granted: true, .. }))).collect();
    assert_eq!(answers, [(3, false), (1, true)]);
}

#[test]
fn leadership_is_handed_over_and_proposals_wait() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    net.isolate(2);
    net.propose(1, "a");
    net.node(1).group.transfer_leader(2).unwrap();
    assert_eq!(net.node(1).group.propose(Bytes::from_static(b"b")), Err(ProposeError::Transferring));
    // Given up when the other does not answer for an election time-out.
    net.tick(&[1, 3], 12);
    assert_eq!(net.leaders(), [1]);
    net.propose(1, "b");
    net.heal();
    net.tick_all(4);
    net.node(1).group.transfer_leader(2).unwrap();
    net.settle();
    assert_eq!(net.leaders(), [2]);
    assert_eq!(net.node(2).disk.last().0, 4);
    assert_eq!(net.node(2).group.transfer_leader(9), Err(ProposeError::NotLeader));
}

#[test]
fn time_outs_differ_between_nodes_and_repeat_between_runs() {
    let first_candidate = || {
        let mut net = Net::of(&[1, 2, 3, 4, 5]);
        net.tick_all(30);
        (net.leaders(), net.node(1).group.term(), net.sent.len())
    };
    let run = first_candidate();
    assert_eq!(run.0.len(), 1);
    for _ in 0..3 {
        assert_eq!(first_candidate(), run);
    }
}

#[test]
fn messages_that_cannot_be_are_refused_and_end_nothing() {
    let mut net = Net::of(&[1, 2, 3]);
    net.campaign(1);
    let step = |net: &mut Net, from: u64, term: u64, body: Body| {
        let outcome = net.node(1).group.step(Message { from, to: 1, term, body });
        net.work(1);
        outcome
    };
    let term = net.node(1).group.term();
    let accepted = |index: u64| Body::AppendAccepted { index, commit: 0 };
    assert_eq!(step(&mut net, 2, 0, Body::TimeoutNow), Err(StepError::Malformed("term")));
    assert_eq!(step(&mut net, 2, u64::MAX, Body::TimeoutNow), Err(StepError::Malformed("term")));
    assert_eq!(step(&mut net, 1, term, accepted(1)), Err(StepError::NotForUs));
    assert_eq!(step(&mut net, 9, term, accepted(1)), Err(StepError::UnknownPeer));
    assert!(matches!(step(&mut net, 2, term, accepted(50)), Err(StepError::LostEntries(_))));
    assert!(matches!(step(&mut net, 2, term, accepted(u64::MAX)), Err(StepError::Malformed(_))));
    let rejected = Body::AppendRejected { index: u64::MAX, hint_index: u64::MAX, hint_term: 1, commit: 0 };
    assert!(matches!(step(&mut net, 2, term, rejected), Err(StepError::Malformed(_))));
    assert_eq!(net.leaders(), [1]);
    // A leader that believes this follower had more than it has: the log of a follower that lost its end.
    let heartbeat = Body::Heartbeat { commit: 40, read: None, sleep: false };
    net.node(2).group.step(Message { from: 1, to: 2, term, body: heartbeat }).unwrap();
    net.settle();
    assert_eq!(net.node(2).committed, 1);
    net.propose(1, "still alive");
    assert_eq!(net.node(1).committed, 2);
}
