//! Committed offsets and the admin requests.

mod common;

use common::*;
use flumen_groups::*;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::OffsetDeleteRequest;

fn stable(rig: &mut Rig, group: &str, count: usize) -> Vec<String> {
    let ids: Vec<String> = (0..count).map(|_| rig.member_id(group)).collect();
    rig.stable(group, &ids);
    ids
}

#[test]
fn a_consumer_without_a_group_commits() {
    let mut rig = Rig::new(config());
    assert_eq!(rig.fetch("g", "topic", 0).offset, -1);
    rig.auto = false;
    let token = rig.commit(commit("g", "", -1, "topic", 42), 8);
    assert!(!rig.answered.contains(&token));
    assert_eq!(rig.fetch("g", "topic", 0).offset, -1, "not visible before it is in the log");
    rig.finish(1, Ok(()));
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let fetched = rig.fetch("g", "topic", 0);
    assert_eq!((fetched.offset, fetched.leader_epoch, &*fetched.metadata), (42, 4, "meta"));
    assert_eq!(rig.fetch_all("g"), [("topic".to_owned(), 0, 42)]);
    assert_eq!(rig.coordinator.lag_view().collect::<Vec<_>>(), [("g", "topic", 0, 42)]);
    let failing = rig.commit(commit("g", "", -1, "topic", 43), 8);
    rig.finish(1, Err(ErrorCode::NOT_LEADER_OR_FOLLOWER));
    assert_eq!(rig.committed(failing), [ErrorCode::NOT_COORDINATOR]);
    assert_eq!(rig.fetch("g", "topic", 0).offset, 42);
    rig.restart();
    assert_eq!(rig.fetch("g", "topic", 0).offset, 42);
    assert_eq!((rig.describe("g", 6).group_state, rig.describe("g", 6).protocol_type), (s("Empty"), s("")));
    // A group whose only commit fails leaves nothing behind.
    let failing = rig.commit(commit("h", "", -1, "topic", 43), 8);
    rig.finish(1, Err(ErrorCode::MESSAGE_TOO_LARGE));
    assert_eq!(rig.committed(failing), [ErrorCode::INVALID_COMMIT_OFFSET_SIZE]);
    assert_eq!(rig.state("h"), None);
}

#[test]
fn commits_are_checked() {
    let mut rig = Rig::new(config());
    let ids = stable(&mut rig, "g", 1);
    let long = OffsetCommitPiece::metadata(commit("g", &ids[0], 1, "topic", 1), &"é".repeat(4097));
    let fits = OffsetCommitPiece::metadata(commit("g", &ids[0], 1, "topic", 1), &"é".repeat(4096));
    for (request, version, expected) in [
        (commit("g", &ids[0], 1, "topic", 1), 8, ErrorCode::NONE),
        (commit("g", &ids[0], 2, "topic", 1), 8, ErrorCode::ILLEGAL_GENERATION),
        (commit("g", &ids[0], -1, "topic", 1), 8, ErrorCode::ILLEGAL_GENERATION),
        (commit("g", "who", 1, "topic", 1), 8, ErrorCode::UNKNOWN_MEMBER_ID),
        (commit("g", "", -1, "topic", 1), 8, ErrorCode::UNKNOWN_MEMBER_ID),
        (
            commit("g", &ids[0], 1, "topic", 1).with_group_instance_id(Some(s("i"))),
            8,
            ErrorCode::UNKNOWN_MEMBER_ID,
        ),
        (commit("none", "m", 1, "topic", 1), 8, ErrorCode::ILLEGAL_GENERATION),
        (commit("none", "m", 1, "topic", 1), 9, ErrorCode::GROUP_ID_NOT_FOUND),
        (commit("g", &ids[0], 1, "", 1), 10, ErrorCode::UNKNOWN_TOPIC_ID),
        (long, 8, ErrorCode::OFFSET_METADATA_TOO_LARGE),
        (fits, 8, ErrorCode::NONE),
    ] {
        let token = rig.commit(request.clone(), version);
        assert_eq!(rig.committed(token), [expected], "{request:?}");
    }
    // Inside a rebalance the old generation may still commit, the new one only with its assignment.
    let newcomer = rig.join(join("g", "", &["range"]), 3);
    let token = rig.commit(commit("g", &ids[0], 1, "topic", 7), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let token = rig.join(join("g", &ids[0], &["range"]), 9);
    assert_eq!(rig.joined(token).generation_id, 2);
    drop(rig.joined(newcomer));
    let token = rig.commit(commit("g", &ids[0], 2, "topic", 8), 8);
    assert_eq!(rig.committed(token), [ErrorCode::REBALANCE_IN_PROGRESS]);
    assert_eq!(rig.fetch("g", "topic", 0).offset, 7);
}

struct OffsetCommitPiece;
impl OffsetCommitPiece {
    fn metadata(
        mut request: kafka_protocol::messages::OffsetCommitRequest,
        text: &str,
    ) -> kafka_protocol::messages::OffsetCommitRequest {
        request.topics[0].partitions[0].committed_metadata = Some(s(text));
        request
    }
}

#[test]
fn committing_keeps_the_session() {
    let mut rig = Rig::new(config());
    let ids = stable(&mut rig, "g", 1);
    for offset in 0..5 {
        rig.advance(SESSION_MS - 1);
        let token = rig.commit(commit("g", &ids[0], 1, "topic", offset), 8);
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    }
    rig.advance(SESSION_MS);
    assert_eq!(rig.state("g"), Some(GroupState::Empty));
}

#[test]
fn deleting_offsets() {
    let mut rig = Rig::new(config());
    assert_eq!(ErrorCode(rig.delete_offsets("", "topic", &[0]).error_code), ErrorCode::INVALID_GROUP_ID);
    assert_eq!(ErrorCode(rig.delete_offsets("g", "topic", &[0]).error_code), ErrorCode::GROUP_ID_NOT_FOUND);
    let ids = stable(&mut rig, "g", 1);
    for topic in ["topic", "other"] {
        let token = rig.commit(commit("g", &ids[0], 1, topic, 5), 8);
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    }
    let refused = rig.delete_offsets("g", "topic", &[0]);
    assert_eq!((refused.error_code, refused.topics[0].partitions[0].error_code), (0, 86));
    let done = rig.delete_offsets("g", "other", &[0, 9]);
    assert!(done.topics[0].partitions.iter().all(|partition| partition.error_code == 0));
    assert_eq!(rig.fetch_all("g"), [("topic".to_owned(), 0, 5)]);
    rig.restart();
    assert_eq!(rig.fetch_all("g"), [("topic".to_owned(), 0, 5)]);
    assert_eq!(rig.delete_offsets("g", "topic", &[0]).topics[0].partitions[0].error_code, 86);
    // Once everybody is gone nothing is subscribed.
    assert_eq!(rig.leave("g", &[(&ids[0], None)]), [ErrorCode::NONE]);
    assert_eq!(rig.delete_offsets("g", "topic", &[0]).topics[0].partitions[0].error_code, 0);
    assert_eq!(rig.fetch_all("g"), []);
    // A group of another kind does not say what it uses.
    let token = rig.join(join("c", "", &["p"]).with_protocol_type(s("connect")), 3);
    rig.advance(10_000);
    drop(rig.joined(token));
    assert_eq!(ErrorCode(rig.delete_offsets("c", "topic", &[0]).error_code), ErrorCode::NON_EMPTY_GROUP);
    assert_eq!(rig.delete_offsets("g", "topic", &[0]).error_code, 0);
}

#[test]
fn deleting_groups() {
    let mut rig = Rig::new(config());
    assert_eq!(rig.delete("g"), ErrorCode::GROUP_ID_NOT_FOUND);
    let ids = stable(&mut rig, "g", 1);
    let token = rig.commit(commit("g", &ids[0], 1, "topic", 5), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    assert_eq!(rig.delete("g"), ErrorCode::NON_EMPTY_GROUP);
    assert_eq!(rig.leave("g", &[(&ids[0], None)]), [ErrorCode::NONE]);

    rig.auto = false;
    let commit_token = rig.commit(commit("g", "", -1, "late", 6), 8);
    let token = rig.send(GroupRequest::Delete { group_id: s("g") });
    assert_eq!(rig.appends.len(), 2);
    assert!(!rig.answered.contains(&token));
    // Until it is gone nobody enters.
    assert_eq!(rig.describe("g", 5).group_state, s("Dead"));
    let join_token = rig.join(join("g", "", &["range"]), 9);
    assert_eq!(ErrorCode(rig.joined(join_token).error_code), ErrorCode::COORDINATOR_NOT_AVAILABLE);
    let refused = rig.commit(commit("g", "", -1, "topic", 6), 8);
    assert_eq!(rig.committed(refused), [ErrorCode::COORDINATOR_NOT_AVAILABLE]);
    assert_eq!(rig.delete("g"), ErrorCode::GROUP_ID_NOT_FOUND);
    rig.finish(2, Ok(()));
    assert_eq!(rig.committed(commit_token), [ErrorCode::NONE]);
    assert!(matches!(rig.take(token), Some(GroupResponse::Delete(ErrorCode::NONE))));
    assert_eq!(rig.state("g"), None);
    rig.restart();
    assert_eq!(rig.state("g"), None, "the tombstones cover the commit that was under way");

    // A deletion that fails leaves the group as it was.
    rig.auto = true;
    let token = rig.commit(commit("g", "", -1, "topic", 7), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    rig.auto = false;
    let token = rig.send(GroupRequest::Delete { group_id: s("g") });
    rig.finish(1, Err(ErrorCode::NOT_LEADER_OR_FOLLOWER));
    assert!(matches!(rig.take(token), Some(GroupResponse::Delete(ErrorCode::NOT_COORDINATOR))));
    assert_eq!((rig.state("g"), rig.fetch("g", "topic", 0).offset), (Some(GroupState::Empty), 7));
}

#[test]
fn wide_groups_are_deleted_in_pieces() {
    let mut rig = Rig::new(config());
    let mut request = commit("g", "", -1, "topic", 1);
    let template = request.topics[0].partitions[0].clone();
    request.topics[0].partitions =
        (0..2_500).map(|index| template.clone().with_partition_index(index)).collect();
    let token = rig.commit(request, 8);
    assert_eq!(rig.committed(token).len(), 2_500);
    rig.auto = false;
    for failing in [Some(1), Some(0), None] {
        let token = rig.send(GroupRequest::Delete { group_id: s("g") });
        let pieces = rig.appends.len();
        for piece in 0..pieces {
            assert!(!rig.answered.contains(&token));
            assert!(rig.appends[0].1.len() <= MAX_TOMBSTONES_PER_APPEND + 1);
            let result = if failing == Some(piece) { Err(ErrorCode::REQUEST_TIMED_OUT) } else { Ok(()) };
            rig.finish(1, result);
        }
        let Some(GroupResponse::Delete(error)) = rig.take(token) else { panic!() };
        assert_eq!(error.is_none(), failing.is_none());
        assert_eq!(rig.state("g").is_none(), failing.is_none());
    }
    rig.restart();
    assert_eq!(rig.state("g"), None);
}

#[test]
fn offsets_of_a_deleted_topic_go() {
    let mut rig = Rig::new(config());
    for (group, topic) in [("a", "topic"), ("a", "other"), ("b", "topic")] {
        let token = rig.commit(commit(group, "", -1, topic, 3), 8);
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    }
    let outputs = rig.coordinator.remove_topic("topic");
    rig.absorb(outputs);
    assert_eq!(rig.coordinator.lag_view().collect::<Vec<_>>(), [("a", "other", 0, 3)]);
    assert_eq!(rig.state("b"), None);
    rig.restart();
    assert_eq!(rig.coordinator.lag_view().collect::<Vec<_>>(), [("a", "other", 0, 3)]);
}

#[test]
fn offsets_of_topics_that_went_or_came_anew_are_found_after_a_restart() {
    let mut rig = Rig::new(config());
    let of = |group: &str, topic: &str, id: u128| {
        let mut request = commit(group, "", -1, topic, 3);
        request.topics[0].topic_id = uuid::Uuid::from_u128(id);
        request
    };
    for request in [
        of("a", "gone", 1),
        of("a", "anew", 2),
        of("a", "kept", 3),
        of("a", "nameless", 0),
        of("b", "anew", 2),
    ] {
        let token = rig.commit(request, 8);
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    }
    rig.restart();
    let outputs = rig.coordinator.remove_outdated_topics(|topic| match topic {
        "anew" => Some(20),
        "kept" => Some(3),
        "nameless" => Some(4),
        _ => None,
    });
    rig.absorb(outputs);
    let kept = [("a", "kept", 0, 3), ("a", "nameless", 0, 3)];
    assert_eq!(rig.coordinator.lag_view().collect::<Vec<_>>(), kept);
    assert_eq!(rig.state("b"), None);
    rig.restart();
    assert_eq!(rig.coordinator.lag_view().collect::<Vec<_>>(), kept);
}

#[test]
fn unused_offsets_expire() {
    let mut rig = Rig::new(config());
    let retention_ms = rig.config.offsets_retention_ms;
    let token = rig.commit(commit("simple", "", -1, "topic", 3), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let token = rig.commit(commit("brief", "", -1, "topic", 3).with_retention_time_ms(1_000), 4);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let ids = stable(&mut rig, "left", 1);
    let token = rig.commit(commit("left", &ids[0], 1, "topic", 3), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let live = stable(&mut rig, "live", 1);
    assert_eq!(rig.beat("left", &ids[0], 1), ErrorCode::NONE);
    for topic in ["topic", "dropped"] {
        let token = rig.commit(commit("live", &live[0], 1, topic, 3), 8);
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    }
    let mut spent_ms = 0;
    let mut left_at_ms = None;
    while spent_ms < retention_ms * 2 {
        rig.advance(SESSION_MS - 1);
        spent_ms += SESSION_MS - 1;
        assert_eq!(rig.beat("live", &live[0], 1), ErrorCode::NONE);
        if spent_ms < retention_ms / 2 {
            assert_eq!(rig.beat("left", &ids[0], 1), ErrorCode::NONE);
        } else if left_at_ms.is_none() {
            assert_eq!(rig.leave("left", &[(&ids[0], None)]), [ErrorCode::NONE]);
            left_at_ms = Some(spent_ms);
        }
        let slack_ms = OFFSETS_RETENTION_CHECK_INTERVAL_MS + SESSION_MS;
        if spent_ms > slack_ms {
            assert_eq!(rig.state("brief"), None);
        }
        // The commit is a little older than the count.
        if spent_ms + 60_000 < retention_ms {
            assert!(rig.state("simple").is_some());
        } else if spent_ms > retention_ms + slack_ms {
            assert_eq!(rig.state("simple"), None);
        }
        if let Some(at_ms) = left_at_ms {
            if spent_ms < at_ms + retention_ms {
                assert!(rig.state("left").is_some());
            } else if spent_ms > at_ms + retention_ms + slack_ms {
                assert_eq!(rig.state("left"), None);
            }
        }
    }
    assert_eq!(rig.fetch_all("live"), [("topic".to_owned(), 0, 3)]);
    rig.restart();
    let left: Vec<_> = rig.coordinator.group_states().map(|group| group.group_id.to_owned()).collect();
    assert_eq!(left, ["live"]);
}

#[test]
fn describing_and_listing() {
    let mut rig = Rig::new(config());
    let unknown = rig.describe("g", 5);
    assert_eq!((unknown.error_code, &*unknown.group_state), (0, "Dead"));
    let unknown = rig.describe("g", 6);
    assert_eq!(
        (ErrorCode(unknown.error_code), &*unknown.group_state),
        (ErrorCode::GROUP_ID_NOT_FOUND, "Dead")
    );
    assert!(unknown.error_message.is_some());
    let ids = stable(&mut rig, "g", 2);
    let described = rig.describe("g", 6);
    assert_eq!(
        (&*described.group_state, &*described.protocol_type, &*described.protocol_data),
        ("Stable", "consumer", "range")
    );
    assert_eq!(described.members.len(), 2);
    assert_eq!(&described.members[0].member_assignment[..], ids[0].as_bytes());
    assert_eq!(described.members[0].member_metadata, subscription("topic"));
    assert_eq!((&*described.members[0].client_id, &*described.members[0].client_host), ("cli", "/127.0.0.1"));
    let token = rig.commit(commit("simple", "", -1, "topic", 3), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    assert_eq!(rig.list(&[], &[]), ["g", "simple"]);
    assert_eq!(rig.list(&["stable"], &["Classic"]), ["g"]);
    assert_eq!(rig.list(&["Empty", "PreparingRebalance"], &[]), ["simple"]);
    assert_eq!(rig.list(&[], &["consumer"]), [""; 0]);
    let _newcomer = rig.join(join("g", "", &["range"]), 3);
    let described = rig.describe("g", 6);
    assert_eq!((&*described.group_state, &*described.protocol_data), ("PreparingRebalance", ""));
    assert_eq!(described.members.len(), 3);
    assert!(described.members.iter().all(|m| m.member_metadata.is_empty() && m.member_assignment.is_empty()));
}

#[test]
fn records_of_other_coordinators_are_skipped() {
    let mut rig = Rig::new(config());
    let key = record::offset_commit_key("g", "topic", 0);
    rig.coordinator.load(None, Some(b"x"), 0);
    rig.coordinator.load(Some(&[0, 3, 1, 2]), Some(b"x"), 0);
    rig.coordinator.load(Some(&[0]), None, 0);
    rig.coordinator.load(Some(&key), Some(&[0, 9, 1]), 0);
    rig.coordinator.load(Some(&key), None, 0);
    rig.coordinator.load(Some(&record::group_metadata_key("g")), None, 0);
    rig.coordinator.finish_load(rig.now_ms);
    assert_eq!(rig.coordinator.group_states().count(), 0);
    let empty = OffsetDeleteRequest::default().with_group_id(s("g").into());
    let token = rig.send(GroupRequest::OffsetDelete { request: empty });
    assert!(rig.take(token).is_some());
}

fn stable_fetch(rig: &mut Rig, group: &str, topics: Option<&str>) -> Vec<(i64, ErrorCode)> {
    let group = OffsetFetchGroup {
        group_id: s(group),
        topics: topics.map(|topic| vec![(name(topic), vec![0])]),
        require_stable: true,
        ..OffsetFetchGroup::default()
    };
    let token = rig.send(GroupRequest::OffsetFetch { group });
    match rig.take(token) {
        Some(GroupResponse::OffsetFetch(result)) => result
            .topics
            .iter()
            .flat_map(|topic| topic.partitions.iter().map(|p| (p.offset, p.error)))
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn offsets_of_a_transaction_wait_for_its_end() {
    let mut rig = Rig::new(config());
    let token = rig.commit(commit("g", "", -1, "topic", 1), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    for (committed, expected) in [(true, 10), (false, 1)] {
        let mut rig = Rig::new(config());
        let token = rig.commit(commit("g", "", -1, "topic", 1), 8);
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
        let token = rig.txn_commit(7, commit("g", "", -1, "topic", 10));
        assert_eq!(rig.committed(token), [ErrorCode::NONE]);
        rig.restart();
        assert_eq!(rig.fetch("g", "topic", 0).offset, 1);
        for topics in [Some("topic"), None] {
            assert_eq!(stable_fetch(&mut rig, "g", topics), [(-1, ErrorCode::UNSTABLE_OFFSET_COMMIT)]);
        }
        rig.end_transaction(7, committed);
        assert_eq!(stable_fetch(&mut rig, "g", Some("topic")), [(expected, ErrorCode::NONE)]);
        rig.restart();
        assert_eq!(stable_fetch(&mut rig, "g", None), [(expected, ErrorCode::NONE)]);
    }
    // A plain commit after the transaction's own stays; a group of an aborted one leaves nothing.
    let token = rig.txn_commit(7, commit("g", "", -1, "topic", 10));
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let token = rig.commit(commit("g", "", -1, "topic", 11), 8);
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    let token = rig.txn_commit(7, commit("h", "", -1, "topic", 10));
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    rig.end_transaction(7, true);
    assert_eq!(rig.fetch("g", "topic", 0).offset, 11);
    assert_eq!(rig.fetch("h", "topic", 0).offset, 10);
    let token = rig.txn_commit(8, commit("i", "", -1, "topic", 10));
    assert_eq!(rig.committed(token), [ErrorCode::NONE]);
    assert_eq!(rig.state("i"), Some(GroupState::Empty));
    rig.end_transaction(8, false);
    assert_eq!(rig.state("i"), None);
}

#[test]
fn commits_of_a_transaction_are_fenced_by_generation() {
    let mut rig = Rig::new(config());
    let ids = stable(&mut rig, "g", 1);
    for (request, expected) in [
        (commit("g", &ids[0], 1, "topic", 1), ErrorCode::NONE),
        (commit("g", "", -1, "topic", 1), ErrorCode::NONE),
        (commit("g", &ids[0], 2, "topic", 1), ErrorCode::ILLEGAL_GENERATION),
        (commit("g", "who", 1, "topic", 1), ErrorCode::UNKNOWN_MEMBER_ID),
        (commit("none", "m", 1, "topic", 1), ErrorCode::ILLEGAL_GENERATION),
    ] {
        let token = rig.txn_commit(7, request);
        assert_eq!(rig.committed(token), [expected]);
    }
    // A deletion takes offsets of open transactions with it.
    assert_eq!(rig.leave("g", &[(&ids[0], None)]), [ErrorCode::NONE]);
    assert_eq!(rig.delete("g"), ErrorCode::NONE);
    rig.end_transaction(7, true);
    assert_eq!(rig.state("g"), None);
    rig.restart();
    assert_eq!(rig.state("g"), None);
}
