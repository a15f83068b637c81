use super::*;

fn alone(last_index: u64, last_term: u64) -> Group {
    let hard_state = HardState { term: last_term, vote: 1, commit: 0 };
    Group::start(&GroupStart::alone(1, hard_state, last_index, last_term, 7)).unwrap()
}

/// Stores everything at once and returns (entries stored, highest committed index).
fn drain(group: &mut Group) -> (Vec<Entry>, u64) {
    let (mut stored, mut committed) = (Vec::new(), 0);
    while let Some(outputs) = group.take_outputs() {
        stored.extend(outputs.entries.iter().cloned());
        committed = outputs.committed_index.unwrap_or(committed).max(committed);
        if outputs.must_persist() || outputs.number > 0 {
            group.on_persisted(outputs.number);
        }
    }
    (stored, committed)
}

#[test]
fn a_group_of_one_leads_after_campaign_and_commits_its_noop() {
    let mut group = alone(0, 0);
    group.campaign().unwrap();
    assert!(group.is_leader());
    assert_eq!(group.leader_epoch(), 1);
    let (stored, committed) = drain(&mut group);
    assert_eq!(stored.len(), 1);
    assert!(stored[0].data.is_empty());
    assert_eq!(committed, 1);
}

#[test]
fn proposals_take_consecutive_indexes_and_keep_their_buffer() {
    let mut group = alone(0, 0);
    group.campaign().unwrap();
    drain(&mut group);
    let payload = Bytes::from(vec![9u8; 100]);
    let (a, term) = group.propose(payload.clone()).unwrap();
    let (b, _) = group.propose(payload.clone()).unwrap();
    assert_eq!((a, b, term), (2, 3, 1));
    let (stored, committed) = drain(&mut group);
    assert_eq!(stored.len(), 2);
    assert_eq!(stored[0].data.as_ptr(), payload.as_ptr(), "the payload must not be copied");
    assert_eq!(committed, 3);
}

#[test]
fn nothing_commits_before_it_is_persisted() {
    let mut group = alone(0, 0);
    group.campaign().unwrap();
    drain(&mut group);
    group.propose(Bytes::from_static(b"x")).unwrap();
    let first = group.take_outputs().unwrap();
    assert_eq!(first.entries.len(), 1);
    assert_eq!(first.committed_index, None);
    assert!(group.take_outputs().is_none_or(|o| o.committed_index.is_none()));
    group.on_persisted(first.number);
    let second = group.take_outputs().unwrap();
    assert_eq!(second.committed_index, Some(2));
}

#[test]
fn a_restart_goes_on_after_the_last_index_in_a_higher_term() {
    let mut group = alone(41, 6);
    group.campaign().unwrap();
    assert_eq!(group.leader_epoch(), 7);
    let (stored, committed) = drain(&mut group);
    assert_eq!(stored[0].index, 42);
    assert_eq!(committed, 42);
    assert_eq!(group.propose(Bytes::from_static(b"x")).unwrap(), (43, 7));
}

#[test]
fn several_outputs_may_be_in_flight_and_commit_in_order() {
    let mut group = alone(0, 0);
    group.campaign().unwrap();
    drain(&mut group);
    let mut numbers = Vec::new();
    for i in 0..8u8 {
        group.propose(Bytes::from(vec![i])).unwrap();
        numbers.push(group.take_outputs().unwrap().number);
    }
    group.on_persisted(numbers[3]);
    assert_eq!(group.take_outputs().unwrap().committed_index, Some(5));
    group.on_persisted(numbers[7]);
    assert_eq!(group.take_outputs().unwrap().committed_index, Some(9));
}

#[test]
fn whoever_is_reluctant_stands_later_and_votes_at_once() {
    let of_three = || {
        let start = GroupStart {
            membership: Membership::of_voters([1, 2, 3]),
            ..GroupStart::alone(1, HardState::default(), 0, 0, 7)
        };
        Group::start(&start).unwrap()
    };
    let ticks_to_stand = |group: &mut Group| {
        (1u32..)
            .find(|_| {
                group.tick();
                drain(group);
                group.status().leadership.role == Role::Candidate
            })
            .unwrap()
    };
    let (mut willing, mut reluctant) = (of_three(), of_three());
    reluctant.set_reluctant(true);
    assert_eq!(ticks_to_stand(&mut reluctant), ticks_to_stand(&mut willing) + 20);
    // So it stands before all others only if those cannot.
    assert!(ticks_to_stand(&mut of_three()) < 20);
    let mut votes = of_three();
    votes.set_reluctant(true);
    let body = Body::VoteRequest {
        pre: false,
        forced: false,
        last_index: 0,
        last_term: 0,
        commit: 0,
        commit_term: 0,
    };
    votes.step(Message { from: 2, to: 1, term: 1, body }).unwrap();
    let mut answers = Vec::new();
    while let Some(outputs) = votes.take_outputs() {
        answers.extend(outputs.messages);
        votes.on_persisted(outputs.number);
    }
    let is_vote = |answer: &Message| matches!(answer.body, Body::VoteAnswer { granted: true, .. });
    assert!(answers.len() == 1 && is_vote(&answers[0]), "{answers:?}");
}
