//! Joining, syncing, heartbeats, leaving and static members, as Kafka's clients see them.

mod common;

use common::*;
use flumen_groups::*;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::LeaveGroupRequest;

fn error(code: i16) -> ErrorCode {
    ErrorCode(code)
}

fn members(rig: &mut Rig, group: &str, count: usize) -> Vec<String> {
    (0..count).map(|_| rig.member_id(group)).collect()
}

#[test]
fn many_join_at_once() {
    for count in [1, 2, 3, 10, 100] {
        let mut rig = Rig::new(config());
        let ids = members(&mut rig, "g", count);
        let (generation, leader) = rig.stable("g", &ids);
        assert_eq!(generation, 1);
        assert_eq!(leader, ids[0], "the first one leads");
        for id in &ids {
            assert_eq!(rig.beat("g", id, 1), ErrorCode::NONE);
        }
    }
}

#[test]
fn without_initial_delay_only_those_who_start_together_share_a_generation() {
    let mut rig = Rig::new(GroupsConfig { initial_rebalance_delay_ms: 0, ..config() });
    let ids = members(&mut rig, "g", 3);
    let together = [0, 1].map(|i: usize| rig.join(join("g", &ids[i], &["range"]), 9));
    rig.advance(1);
    // The second one came while the first was waiting: one more round for whoever comes with it.
    rig.advance(1);
    for token in together {
        assert_eq!(rig.joined(token).generation_id, 1);
    }
    let late = rig.join(join("g", &ids[2], &["range"]), 9);
    rig.advance(10);
    assert!(!rig.answered.contains(&late), "waits for the first two to join again");
}

#[test]
fn initial_delay_grows_with_new_members_up_to_the_rebalance_timeout() {
    let mut rig = Rig::new(config());
    let mut tokens = vec![rig.join(join("g", "", &["range"]).with_rebalance_timeout_ms(8_000), 3)];
    for _ in 0..3 {
        rig.advance(2_000);
        tokens.push(rig.join(join("g", "", &["range"]).with_rebalance_timeout_ms(8_000), 3));
    }
    assert!(tokens.iter().all(|token| !rig.answered.contains(token)));
    rig.advance(1_999);
    assert!(tokens.iter().all(|token| !rig.answered.contains(token)));
    rig.advance(1);
    for token in tokens {
        assert_eq!(rig.joined(token).generation_id, 1);
    }
}

#[test]
fn requests_are_checked() {
    let mut rig = Rig::new(config());
    let cases = [
        (join("", "", &["range"]), ErrorCode::INVALID_GROUP_ID),
        (join("g", "", &["range"]).with_session_timeout_ms(5_999), ErrorCode::INVALID_SESSION_TIMEOUT),
        (join("g", "", &["range"]).with_session_timeout_ms(1_800_001), ErrorCode::INVALID_SESSION_TIMEOUT),
        (join("g", "who", &["range"]), ErrorCode::UNKNOWN_MEMBER_ID),
        (join("g", "", &[]), ErrorCode::INCONSISTENT_GROUP_PROTOCOL),
        (join("g", "", &["range"]).with_protocol_type(s("")), ErrorCode::INCONSISTENT_GROUP_PROTOCOL),
    ];
    for (request, expected) in cases {
        let token = rig.join(request, 6);
        let response = rig.joined(token);
        assert_eq!(error(response.error_code), expected);
        assert_eq!((response.generation_id, response.protocol_name), (-1, Some(s(""))));
    }
    assert_eq!(rig.state("g"), None, "a refused join leaves no group");
    let token = rig.join(join("g", "", &[]), 7);
    assert_eq!(rig.joined(token).protocol_name, None);
    assert_eq!(rig.beat("", "m", 1), ErrorCode::INVALID_GROUP_ID);
    assert_eq!(rig.beat("g", "m", 1), ErrorCode::UNKNOWN_MEMBER_ID);
    let token = rig.sync(sync("g", "m", 1, &[]));
    assert_eq!(error(rig.synced(token).error_code), ErrorCode::UNKNOWN_MEMBER_ID);
    assert_eq!(rig.leave("g", &[("m", None)]), [ErrorCode::UNKNOWN_MEMBER_ID]);
}

#[test]
fn protocols_are_voted_on() {
    let mut rig = Rig::new(config());
    let first = rig.join(join("g", "", &["a", "b", "c"]), 3);
    let second = rig.join(join("g", "", &["c", "b"]), 3);
    let third = rig.join(join("g", "", &["b", "c"]), 3);
    let odd = rig.join(join("g", "", &["a"]), 3);
    assert_eq!(error(rig.joined(odd).error_code), ErrorCode::INCONSISTENT_GROUP_PROTOCOL);
    let kind = rig.join(join("g", "", &["b"]).with_protocol_type(s("connect")), 3);
    assert_eq!(error(rig.joined(kind).error_code), ErrorCode::INCONSISTENT_GROUP_PROTOCOL);
    rig.advance(10_000);
    for token in [first, second, third] {
        assert_eq!(rig.joined(token).protocol_name.as_deref(), Some("b"));
    }
}

#[test]
fn sync_checks_generation_and_protocol() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 2);
    let (generation, _) = rig.stable("g", &ids);
    for (request, expected) in [
        (sync("g", &ids[0], generation + 1, &[]), ErrorCode::ILLEGAL_GENERATION),
        (sync("g", "who", generation, &[]), ErrorCode::UNKNOWN_MEMBER_ID),
        (
            sync("g", &ids[0], generation, &[]).with_protocol_type(Some(s("connect"))),
            ErrorCode::INCONSISTENT_GROUP_PROTOCOL,
        ),
        (
            sync("g", &ids[0], generation, &[]).with_protocol_name(Some(s("sticky"))),
            ErrorCode::INCONSISTENT_GROUP_PROTOCOL,
        ),
        (sync("g", &ids[0], generation, &[]).with_protocol_name(Some(s("range"))), ErrorCode::NONE),
    ] {
        let token = rig.sync(request);
        assert_eq!(error(rig.synced(token).error_code), expected);
    }
    // From version 5 on a member has to say which protocol it means, before anything else is looked at.
    for request in [
        sync("g", &ids[0], generation, &[]),
        sync("g", &ids[0], generation, &[]).with_protocol_name(Some(s("range"))),
        sync("nobody", "who", 1, &[]),
        sync("", "who", 1, &[]),
    ] {
        let token = rig.send(GroupRequest::Sync { request, version: 5 });
        assert_eq!(error(rig.synced(token).error_code), ErrorCode::INCONSISTENT_GROUP_PROTOCOL);
    }
    assert_eq!(rig.beat("g", &ids[0], generation - 1), ErrorCode::ILLEGAL_GENERATION);
}

#[test]
fn a_third_member_makes_the_others_rejoin() {
    let mut rig = Rig::new(config());
    let mut ids = members(&mut rig, "g", 2);
    rig.stable("g", &ids);
    ids.push(rig.member_id("g"));
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::NONE, "an id alone is no rebalance");
    let token = rig.join(join("g", &ids[2], &["range"]), 9);
    assert!(rig.take(token).is_none());
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::REBALANCE_IN_PROGRESS);
    let first = rig.join(join("g", &ids[0], &["range"]), 9);
    let second = rig.join(join("g", &ids[1], &["range"]), 9);
    let leader = rig.joined(first).leader;
    assert_eq!(rig.joined(second).generation_id, 2);
    assert_eq!(rig.joined(token).generation_id, 2);
    assert_eq!(rig.beat("g", &ids[0], 2), ErrorCode::NONE, "heartbeats may start before the assignment");
    rig.sync_all("g", 2, &ids, &leader);
}

#[test]
fn leader_that_vanishes_in_a_rebalance_is_replaced() {
    let mut rig = Rig::new(config());
    let mut ids = members(&mut rig, "g", 3);
    rig.stable("g", &ids);
    ids.push(rig.member_id("g"));
    let tokens: Vec<u64> = ids[1..].iter().rev().map(|id| rig.join(join("g", id, &["range"]), 9)).collect();
    rig.advance(SESSION_MS + 1);
    for token in tokens {
        let response = rig.joined(token);
        assert_eq!((response.error_code, response.generation_id), (0, 2));
        assert_eq!(&*response.leader, ids[1].as_str());
    }
    assert_eq!(rig.beat("g", &ids[0], 2), ErrorCode::UNKNOWN_MEMBER_ID);
}

#[test]
fn members_that_do_not_rejoin_in_time_are_dropped() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 2);
    rig.stable("g", &ids);
    let token = rig.join(join("g", &ids[0], &["range"]), 9);
    for _ in 0..30 {
        rig.advance(2_000);
        if !rig.answered.contains(&token) {
            assert_eq!(rig.beat("g", &ids[1], 1), ErrorCode::REBALANCE_IN_PROGRESS);
        }
    }
    let response = rig.joined(token);
    assert_eq!((response.generation_id, response.members.len()), (2, 1));
    assert_eq!(rig.beat("g", &ids[1], 1), ErrorCode::UNKNOWN_MEMBER_ID);
}

#[test]
fn silence_ends_a_session_and_heartbeats_keep_it() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 2);
    rig.stable("g", &ids);
    for _ in 0..10 {
        rig.advance(SESSION_MS - 1);
        assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::NONE);
        assert_eq!(rig.beat("g", &ids[1], 1), ErrorCode::NONE);
    }
    rig.advance(SESSION_MS - 1);
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::NONE);
    rig.advance(1);
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::REBALANCE_IN_PROGRESS);
    assert_eq!(rig.beat("g", &ids[1], 1), ErrorCode::UNKNOWN_MEMBER_ID);
    // The last one goes, too: the empty group is in the log.
    rig.advance(SESSION_MS);
    assert_eq!(rig.state("g"), Some(GroupState::Empty));
    let Some(Logged::Record(last)) = rig.log.last() else { panic!() };
    let value = record::GroupMetadataValue::decode(last.value.as_ref().unwrap()).unwrap();
    assert_eq!((value.generation, value.members.len(), value.protocol), (2, 0, None));
    assert_eq!(value.protocol_type, "consumer");
}

#[test]
fn leader_that_never_syncs_is_dropped() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 2);
    let tokens: Vec<u64> = ids.iter().map(|id| rig.join(join("g", id, &["range"]), 9)).collect();
    rig.advance(10_000);
    tokens.into_iter().for_each(|token| assert_eq!(rig.joined(token).generation_id, 1));
    let follower = rig.sync(sync("g", &ids[1], 1, &[]));
    for _ in 0..12 {
        rig.advance(5_000);
        let _ = rig.beat("g", &ids[0], 1);
    }
    assert_eq!(error(rig.synced(follower).error_code), ErrorCode::REBALANCE_IN_PROGRESS);
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::UNKNOWN_MEMBER_ID);
    let token = rig.join(join("g", &ids[1], &["range"]), 9);
    let response = rig.joined(token);
    assert_eq!((response.generation_id, &*response.leader), (2, ids[1].as_str()));
}

#[test]
fn an_unused_member_id_expires() {
    let mut rig = Rig::new(config());
    let id = rig.member_id("g");
    rig.advance(SESSION_MS - 1);
    assert_eq!(rig.state("g"), Some(GroupState::Empty));
    rig.advance(1);
    assert_eq!(rig.state("g"), None);
    let token = rig.join(join("g", &id, &["range"]), 9);
    assert_eq!(error(rig.joined(token).error_code), ErrorCode::UNKNOWN_MEMBER_ID);
}

#[test]
fn a_promised_member_holds_up_the_rebalance_until_its_id_expires() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 1);
    rig.stable("g", &ids);
    let _promised = rig.member_id("g");
    let token = rig.join(join("g", &ids[0], &["range"]), 9);
    rig.advance(SESSION_MS - 1);
    assert!(!rig.answered.contains(&token));
    rig.advance(1);
    assert_eq!(rig.joined(token).generation_id, 2);
}

#[test]
fn leaving() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 3);
    rig.stable("g", &ids);
    let promised = rig.member_id("g");
    let result = rig.leave("g", &[(&ids[0], None), ("who", None), (&promised, None), ("", Some("i"))]);
    assert_eq!(
        result,
        [ErrorCode::NONE, ErrorCode::UNKNOWN_MEMBER_ID, ErrorCode::NONE, ErrorCode::UNKNOWN_MEMBER_ID]
    );
    assert_eq!(rig.beat("g", &ids[1], 1), ErrorCode::REBALANCE_IN_PROGRESS);
    let first = rig.join(join("g", &ids[1], &["range"]), 9);
    let second = rig.join(join("g", &ids[2], &["range"]), 9);
    assert_eq!(&*rig.joined(first).leader, ids[1].as_str());
    assert_eq!(rig.joined(second).generation_id, 2);
    // Old clients name themselves and get one code.
    for (id, expected) in [(&ids[1], 0), (&ids[1], 25)] {
        let request = LeaveGroupRequest::default().with_group_id(s("g").into()).with_member_id(s(id));
        let token = rig.send(GroupRequest::Leave { request, version: 1 });
        let Some(GroupResponse::Leave(response)) = rig.take(token) else { panic!() };
        assert_eq!(response.error_code, expected);
        encodes(&response, 1);
    }
    // The last one is answered when the empty group is in the log.
    rig.auto = false;
    let request = LeaveGroupRequest::default().with_group_id(s("g").into()).with_member_id(s(&ids[2]));
    let token = rig.send(GroupRequest::Leave { request, version: 1 });
    assert!(rig.take(token).is_none());
    rig.finish(1, Ok(()));
    assert!(matches!(rig.take(token), Some(GroupResponse::Leave(response)) if response.error_code == 0));
    assert_eq!(rig.state("g"), Some(GroupState::Empty));
}

#[test]
fn a_lost_response_is_given_again() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 2);
    let tokens: Vec<u64> = ids.iter().map(|id| rig.join(join("g", id, &["range"]), 9)).collect();
    rig.advance(10_000);
    tokens.into_iter().for_each(|token| assert_eq!(rig.joined(token).generation_id, 1));
    for (id, known) in [(&ids[0], 2), (&ids[1], 0)] {
        let token = rig.join(join("g", id, &["range"]), 9);
        let response = rig.joined(token);
        assert_eq!((response.generation_id, response.members.len()), (1, known));
    }
    rig.sync_all("g", 1, &ids, &ids[0]);
    // A follower without news changes nothing; the leader asks for a new round.
    let token = rig.join(join("g", &ids[1], &["range"]), 9);
    assert_eq!(rig.joined(token).generation_id, 1);
    let token = rig.join(join("g", &ids[0], &["range"]), 9);
    assert!(rig.take(token).is_none());
    assert_eq!(rig.state("g"), Some(GroupState::PreparingRebalance));
    // Joining twice leaves one waiting.
    let again = rig.join(join("g", &ids[0], &["range"]), 9);
    assert_eq!(error(rig.joined(token).error_code), ErrorCode::REBALANCE_IN_PROGRESS);
    let other = rig.join(join("g", &ids[1], &["range"]), 9);
    assert_eq!(rig.joined(again).generation_id, 2);
    assert_eq!(rig.joined(other).generation_id, 2);
}

#[test]
fn full_group_takes_no_more() {
    let mut rig = Rig::new(GroupsConfig { group_members_max: 2, ..config() });
    let ids = members(&mut rig, "g", 2);
    rig.stable("g", &ids);
    let token = rig.join(join("g", "", &["range"]), 9);
    assert_eq!(error(rig.joined(token).error_code), ErrorCode::GROUP_MAX_SIZE_REACHED);
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::NONE);
}

#[test]
fn an_assignment_counts_when_it_is_in_the_log() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 2);
    let tokens: Vec<u64> = ids.iter().map(|id| rig.join(join("g", id, &["range"]), 9)).collect();
    rig.advance(10_000);
    tokens.into_iter().for_each(|token| drop(rig.joined(token)));
    rig.auto = false;
    let follower = rig.sync(sync("g", &ids[1], 1, &[]));
    let leader = rig.sync(sync("g", &ids[0], 1, &[&ids[0], &ids[1], "stranger"]));
    assert_eq!(rig.appends.len(), 1);
    assert!(!rig.answered.contains(&leader));
    assert_eq!(rig.state("g"), Some(GroupState::CompletingRebalance));
    rig.finish(1, Err(ErrorCode::NOT_LEADER_OR_FOLLOWER));
    for token in [follower, leader] {
        assert_eq!(error(rig.synced(token).error_code), ErrorCode::NOT_COORDINATOR);
    }
    assert_eq!(rig.state("g"), Some(GroupState::PreparingRebalance));
    rig.auto = true;
    let tokens: Vec<u64> = ids.iter().map(|id| rig.join(join("g", id, &["range"]), 9)).collect();
    tokens.into_iter().for_each(|token| assert_eq!(rig.joined(token).generation_id, 2));
    rig.sync_all("g", 2, &ids, &ids[0]);
}

#[test]
fn an_assignment_overtaken_by_a_rebalance_is_dropped() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 1);
    let token = rig.join(join("g", &ids[0], &["range"]), 9);
    rig.advance(10_000);
    drop(rig.joined(token));
    rig.auto = false;
    let old = rig.sync(sync("g", &ids[0], 1, &[&ids[0]]));
    let newcomer = rig.join(join("g", "", &["range"]), 3);
    assert_eq!(error(rig.synced(old).error_code), ErrorCode::REBALANCE_IN_PROGRESS);
    let token = rig.join(join("g", &ids[0], &["range"]), 9);
    assert_eq!(rig.joined(token).generation_id, 2);
    let newcomer = rig.joined(newcomer).member_id;
    rig.finish(1, Ok(()));
    assert_eq!(rig.state("g"), Some(GroupState::CompletingRebalance));
    rig.auto = true;
    rig.sync_all("g", 2, &[ids[0].clone(), newcomer.to_string()], &ids[0]);
}

fn static_group(rig: &mut Rig) -> Vec<String> {
    let tokens: Vec<u64> = ["i0", "i1"].iter().map(|i| rig.join(join_static("g", "", i), 9)).collect();
    rig.advance(10_000);
    let ids: Vec<String> = tokens.into_iter().map(|token| rig.joined(token).member_id.to_string()).collect();
    assert!(ids[0].starts_with("i0-"));
    rig.sync_all("g", 1, &ids, &ids[0]);
    ids
}

#[test]
fn static_members_come_back_without_a_rebalance() {
    let mut rig = Rig::new(config());
    let ids = static_group(&mut rig);
    // The follower restarts.
    let token = rig.join(join_static("g", "", "i1"), 9);
    let response = rig.joined(token);
    let new_id = response.member_id.to_string();
    assert_ne!(new_id, ids[1]);
    assert_eq!((response.generation_id, &*response.leader, response.skip_assignment), (1, &*ids[0], false));
    assert_eq!(rig.beat_as("g", &ids[1], Some("i1"), 1), ErrorCode::FENCED_INSTANCE_ID);
    assert_eq!(rig.beat_as("g", &new_id, Some("i1"), 1), ErrorCode::NONE);
    assert_eq!(rig.beat("g", &ids[0], 1), ErrorCode::NONE);
    let token = rig.sync(sync("g", &new_id, 1, &[]).with_group_instance_id(Some(s("i1"))));
    assert_eq!(&rig.synced(token).assignment[..], ids[1].as_bytes());
    for request in [
        sync("g", &ids[1], 1, &[]).with_group_instance_id(Some(s("i1"))),
        sync("g", "", 1, &[]).with_group_instance_id(Some(s("i1"))),
    ] {
        let token = rig.sync(request);
        assert_eq!(error(rig.synced(token).error_code), ErrorCode::FENCED_INSTANCE_ID);
    }
    let token = rig.join(join_static("g", &ids[1], "i1"), 9);
    assert_eq!(error(rig.joined(token).error_code), ErrorCode::FENCED_INSTANCE_ID);
    let request = commit("g", &ids[1], 1, "topic", 1).with_group_instance_id(Some(s("i1")));
    let token = rig.commit(request, 8);
    assert_eq!(rig.committed(token), [ErrorCode::FENCED_INSTANCE_ID]);
    // The leader restarts: version 9 is told to skip the assignment, older ones that somebody else leads.
    let token = rig.join(join_static("g", "", "i0"), 9);
    let response = rig.joined(token);
    assert_eq!((&response.leader, response.skip_assignment), (&response.member_id, true));
    assert_eq!(response.members.len(), 2);
    let before = response.member_id;
    let token = rig.join(join_static("g", "", "i0"), 8);
    let response = rig.joined(token);
    assert_eq!((&response.leader, response.skip_assignment, response.members.len()), (&before, false, 0));
    // All of it survives a restart of the coordinator.
    rig.restart();
    assert_eq!(rig.beat_as("g", &response.member_id, Some("i0"), 1), ErrorCode::NONE);
    assert_eq!(rig.beat_as("g", &new_id, Some("i1"), 1), ErrorCode::NONE);
    assert_eq!(rig.beat_as("g", &ids[1], Some("i1"), 1), ErrorCode::FENCED_INSTANCE_ID);
}

#[test]
fn static_replacement_that_cannot_be_stored_is_undone() {
    let mut rig = Rig::new(config());
    let ids = static_group(&mut rig);
    rig.auto = false;
    let token = rig.join(join_static("g", "", "i1"), 9);
    assert!(!rig.answered.contains(&token));
    rig.finish(1, Err(ErrorCode::REQUEST_TIMED_OUT));
    let response = rig.joined(token);
    assert_eq!(error(response.error_code), ErrorCode::COORDINATOR_NOT_AVAILABLE);
    assert_eq!(rig.beat_as("g", &ids[1], Some("i1"), 1), ErrorCode::NONE);
    // Two restarts of one member in a row, answered in the order of the log.
    let first = rig.join(join_static("g", "", "i1"), 9);
    let second = rig.join(join_static("g", "", "i1"), 9);
    assert_eq!(error(rig.joined(first).error_code), ErrorCode::FENCED_INSTANCE_ID);
    rig.finish(2, Ok(()));
    assert_eq!(rig.joined(second).error_code, 0);
}

#[test]
fn static_members_stay_through_a_rebalance_they_miss() {
    let mut rig = Rig::new(config());
    let ids = static_group(&mut rig);
    let token = rig.join(join_static("g", "", "i2"), 9);
    let first = rig.join(join_static("g", &ids[0], "i0"), 9);
    for _ in 0..REBALANCE_MS / 5_000 {
        rig.advance(5_000);
        if !rig.answered.contains(&first) {
            assert_eq!(rig.beat_as("g", &ids[1], Some("i1"), 1), ErrorCode::REBALANCE_IN_PROGRESS);
        }
    }
    assert_eq!(rig.joined(first).members.len(), 3);
    assert_eq!(rig.joined(token).generation_id, 2);
    assert_eq!(rig.beat_as("g", &ids[1], Some("i1"), 2), ErrorCode::NONE);
    // Replaced while the others sync: the leader may know the old id only, so a new round begins.
    let sync_token = rig.sync(sync("g", &ids[0], 2, &[]).with_group_instance_id(Some(s("i0"))));
    assert!(rig.answered.contains(&sync_token));
    assert_eq!(rig.state("g"), Some(GroupState::Stable));
}

#[test]
fn static_replacement_while_completing_starts_over() {
    let mut rig = Rig::new(config());
    let tokens: Vec<u64> = ["i0", "i1"].iter().map(|i| rig.join(join_static("g", "", i), 9)).collect();
    rig.advance(10_000);
    let ids: Vec<String> = tokens.into_iter().map(|token| rig.joined(token).member_id.to_string()).collect();
    let follower = rig.sync(sync("g", &ids[1], 1, &[]).with_group_instance_id(Some(s("i1"))));
    let token = rig.join(join_static("g", "", "i1"), 9);
    assert_eq!(error(rig.synced(follower).error_code), ErrorCode::FENCED_INSTANCE_ID);
    assert_eq!(rig.state("g"), Some(GroupState::PreparingRebalance));
    let first = rig.join(join_static("g", &ids[0], "i0"), 9);
    assert_eq!(rig.joined(first).members.len(), 2);
    assert_eq!(rig.joined(token).generation_id, 2);
}

#[test]
fn static_members_leave_by_instance() {
    let mut rig = Rig::new(config());
    let ids = static_group(&mut rig);
    assert_eq!(rig.leave("g", &[(&ids[0], Some("i1"))]), [ErrorCode::FENCED_INSTANCE_ID]);
    assert_eq!(rig.leave("g", &[("", Some("i1"))]), [ErrorCode::NONE]);
    assert_eq!(rig.beat_as("g", &ids[1], Some("i1"), 1), ErrorCode::UNKNOWN_MEMBER_ID);
}

#[test]
fn rolling_bounce_of_dynamic_members() {
    let mut rig = Rig::new(config());
    let mut ids = members(&mut rig, "g", 5);
    let (mut generation, _) = rig.stable("g", &ids);
    for round in 0..5 {
        let gone = ids.remove(0);
        assert_eq!(rig.leave("g", &[(&gone, None)]), [ErrorCode::NONE]);
        ids.push(rig.member_id("g"));
        let tokens: Vec<u64> = ids.iter().map(|id| rig.join(join("g", id, &["range"]), 9)).collect();
        let responses: Vec<_> = tokens.into_iter().map(|token| rig.joined(token)).collect();
        generation += 1;
        assert!(responses.iter().all(|response| response.generation_id == generation), "round {round}");
        let leader = responses[0].leader.to_string();
        rig.sync_all("g", generation, &ids, &leader);
    }
}

#[test]
fn a_restarted_coordinator_goes_on_with_the_same_generation() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 3);
    rig.stable("g", &ids);
    let token = rig.commit(commit("g", &ids[0], 1, "topic", 42), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let before = rig.describe("g", 5);
    rig.advance(SESSION_MS - 1);
    rig.restart();
    assert_eq!(rig.describe("g", 5), before);
    assert_eq!(rig.fetch("g", "topic", 0).offset, 42);
    rig.advance(SESSION_MS - 1);
    for id in &ids {
        assert_eq!(rig.beat("g", id, 1), ErrorCode::NONE);
        let token = rig.sync(sync("g", id, 1, &[]));
        assert_eq!(&rig.synced(token).assignment[..], id.as_bytes());
    }
    // A follower that rejoins unchanged is not disturbed.
    let token = rig.join(join("g", &ids[2], &["range"]), 9);
    assert_eq!(rig.joined(token).generation_id, 1);
    rig.advance(SESSION_MS);
    assert_eq!(rig.state("g"), Some(GroupState::Empty));
}

#[test]
fn one_tick_settles_whatever_is_due_at_once() {
    let mut rig = Rig::new(config());
    let ids = members(&mut rig, "g", 100);
    rig.stable("g", &ids);
    rig.now_ms += 10 * SESSION_MS;
    let outputs = rig.coordinator.tick(rig.now_ms);
    rig.absorb(outputs);
    assert_eq!(rig.state("g"), Some(GroupState::Empty));
}
