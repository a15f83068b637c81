//! Consumer groups over TCP: many members at once, and what becomes of offsets when their topic goes.

use std::collections::BTreeSet;

use bytes::Bytes;
use flumen_protocol::error_code::ErrorCode;
use flumen_tests::flumen::Flumen;
use flumen_tests::wire::{Wire, text, topic_name};
use kafka_protocol::messages::delete_topics_request::DeleteTopicState;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_delete_request::{
    OffsetDeleteRequestPartition, OffsetDeleteRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestTopic;
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::{
    DeleteTopicsRequest, DescribeGroupsRequest, GroupId, HeartbeatRequest, JoinGroupRequest,
    JoinGroupResponse, ListGroupsRequest, OffsetCommitRequest, OffsetDeleteRequest, OffsetFetchRequest,
    SyncGroupRequest,
};
use kafka_protocol::protocol::Request;
use serde_json::json;

const JOIN_VERSION: i16 = 9;
const SYNC_VERSION: i16 = 5;
const HEARTBEAT_VERSION: i16 = 4;

fn group(name: &str) -> GroupId {
    GroupId(text(name))
}

/// Asks again while the coordinator reads its log, as every client does.
fn ask_loaded<Q: Request>(
    wire: &mut Wire,
    version: i16,
    request: &Q,
    code: impl Fn(&Q::Response) -> i16,
) -> Q::Response {
    loop {
        let response = wire.ask(version, request).unwrap();
        if code(&response) != ErrorCode::COORDINATOR_LOAD_IN_PROGRESS.0 {
            return response;
        }
        std::thread::yield_now();
    }
}

struct Member {
    wire: Wire,
    id: String,
    generation: i32,
}

impl Member {
    /// As far as MEMBER_ID_REQUIRED.
    fn introduce(address: &str) -> Member {
        let mut member = Member { wire: Wire::connect(address).unwrap(), id: String::new(), generation: -1 };
        let request = member.join_request();
        let response = ask_loaded(&mut member.wire, JOIN_VERSION, &request, |r| r.error_code);
        assert_eq!(response.error_code, ErrorCode::MEMBER_ID_REQUIRED.0);
        member.id = response.member_id.to_string();
        member
    }

    fn join_request(&self) -> JoinGroupRequest {
        JoinGroupRequest::default()
            .with_group_id(group("crowd"))
            .with_session_timeout_ms(60_000)
            .with_rebalance_timeout_ms(60_000)
            .with_member_id(text(&self.id))
            .with_protocol_type(text("consumer"))
            .with_protocols(vec![
                JoinGroupRequestProtocol::default()
                    .with_name(text("range"))
                    .with_metadata(Bytes::from_static(&[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])),
            ])
    }

    fn send_join(&mut self) {
        let request = self.join_request();
        self.wire.send(JOIN_VERSION, &request).unwrap();
    }

    fn heartbeat(&mut self) -> ErrorCode {
        let request = HeartbeatRequest::default()
            .with_group_id(group("crowd"))
            .with_member_id(text(&self.id))
            .with_generation_id(self.generation);
        ErrorCode(self.wire.ask(HEARTBEAT_VERSION, &request).unwrap().error_code)
    }
}

/// Takes everybody's JoinGroup answer, lets the leader assign to each member its own id, and returns the generation.
fn complete(members: &mut [Member]) -> i32 {
    let joined: Vec<JoinGroupResponse> =
        members.iter_mut().map(|m| m.wire.receive::<JoinGroupRequest>(JOIN_VERSION).unwrap()).collect();
    let generations: BTreeSet<(i16, i32)> = joined.iter().map(|j| (j.error_code, j.generation_id)).collect();
    assert_eq!(generations.len(), 1, "one generation for all: {generations:?}");
    let generation = joined[0].generation_id;
    let ids: BTreeSet<&str> = members.iter().map(|m| m.id.as_str()).collect();
    for (member, join) in members.iter().zip(&joined) {
        assert_eq!(join.member_id.as_str(), member.id);
        assert_eq!(join.leader, joined[0].leader);
        let listed: BTreeSet<&str> = join.members.iter().map(|m| m.member_id.as_str()).collect();
        let expected = if join.leader.as_str() == member.id { ids.clone() } else { BTreeSet::new() };
        assert_eq!(listed, expected, "the leader hears of all members, the others of none");
    }
    let leader = joined[0].leader.to_string();
    let assignments: Vec<SyncGroupRequestAssignment> = ids
        .iter()
        .map(|id| {
            SyncGroupRequestAssignment::default()
                .with_member_id(text(id))
                .with_assignment(Bytes::copy_from_slice(id.as_bytes()))
        })
        .collect();
    for member in members.iter_mut() {
        member.generation = generation;
        let mut request = SyncGroupRequest::default()
            .with_group_id(group("crowd"))
            .with_generation_id(generation)
            .with_member_id(text(&member.id))
            .with_protocol_type(Some(text("consumer")))
            .with_protocol_name(Some(text("range")));
        if member.id == leader {
            request.assignments = assignments.clone();
        }
        member.wire.send(SYNC_VERSION, &request).unwrap();
    }
    for member in members.iter_mut() {
        let synced = member.wire.receive::<SyncGroupRequest>(SYNC_VERSION).unwrap();
        assert_eq!((synced.error_code, &synced.assignment[..]), (0, member.id.as_bytes()));
    }
    generation
}

#[test]
fn a_crowd_that_joins_at_once_ends_in_one_generation() {
    let dir = tempfile::tempdir().unwrap();
    // Long enough that no pause of a loaded machine splits the crowd: each new member starts it anew.
    let flumen = Flumen::start(dir.path(), &["group.initial.rebalance.delay.ms=500"]).unwrap();
    let mut members: Vec<Member> = (0..150).map(|_| Member::introduce(&flumen.kafka)).collect();
    for member in &mut members {
        member.send_join();
    }
    assert_eq!(complete(&mut members), 1);
    for member in &mut members {
        assert_eq!(member.heartbeat(), ErrorCode::NONE);
    }

    // As many again: the first ones hear of it from their heartbeats and come back.
    let mut late: Vec<Member> = (0..150).map(|_| Member::introduce(&flumen.kafka)).collect();
    for member in &mut late {
        member.send_join();
    }
    for member in &mut members {
        while member.heartbeat() != ErrorCode::REBALANCE_IN_PROGRESS {
            std::thread::yield_now();
        }
        member.send_join();
    }
    members.append(&mut late);
    assert_eq!(complete(&mut members), 2);
    for member in &mut members {
        assert_eq!(member.heartbeat(), ErrorCode::NONE);
    }
}

fn commit(wire: &mut Wire, name: &str, topic: &str, offset: i64) {
    let request = OffsetCommitRequest::default()
        .with_group_id(group(name))
        .with_generation_id_or_member_epoch(-1)
        .with_topics(vec![OffsetCommitRequestTopic::default().with_name(topic_name(topic)).with_partitions(
            vec![
                OffsetCommitRequestPartition::default()
                    .with_committed_offset(offset)
                    .with_committed_leader_epoch(-1),
            ],
        )]);
    let response = ask_loaded(wire, 8, &request, |r| r.topics[0].partitions[0].error_code);
    assert_eq!(response.topics[0].partitions[0].error_code, 0);
}

fn committed(wire: &mut Wire, name: &str, topic: &str) -> i64 {
    let request = OffsetFetchRequest::default().with_group_id(group(name)).with_topics(Some(vec![
        OffsetFetchRequestTopic::default().with_name(topic_name(topic)).with_partition_indexes(vec![0]),
    ]));
    let response = ask_loaded(wire, 7, &request, |r| r.error_code);
    assert_eq!(response.error_code, 0);
    response.topics[0].partitions[0].committed_offset
}

fn delete_topic(wire: &mut Wire, topic: &str) {
    let request = DeleteTopicsRequest::default()
        .with_timeout_ms(30_000)
        .with_topics(vec![DeleteTopicState::default().with_name(Some(topic_name(topic)))]);
    assert_eq!(wire.ask(6, &request).unwrap().responses[0].error_code, 0);
}

#[test]
fn offsets_go_with_their_topic() {
    let dir = tempfile::tempdir().unwrap();
    let mut flumen = Flumen::start(dir.path(), &[]).unwrap();
    for topic in ["a", "b"] {
        flumen.create_topic(topic, 1, &json!({})).unwrap();
    }
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    for name in ["g1", "g2", "g3"] {
        commit(&mut wire, name, "a", 5);
        commit(&mut wire, name, "b", 6);
    }
    delete_topic(&mut wire, "a");
    flumen.create_topic("a", 1, &json!({})).unwrap();
    for name in ["g1", "g2", "g3"] {
        assert_eq!((committed(&mut wire, name, "a"), committed(&mut wire, name, "b")), (-1, 6), "{name}");
    }

    // A restart later no coordinator is loaded, and nobody is there to hear of the deletion.
    flumen.kill_9();
    flumen.restart().unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    delete_topic(&mut wire, "b");
    flumen.create_topic("b", 1, &json!({})).unwrap();
    for name in ["g1", "g2", "g3"] {
        assert_eq!((committed(&mut wire, name, "a"), committed(&mut wire, name, "b")), (-1, -1), "{name}");
    }
    commit(&mut wire, "g1", "b", 1);
    flumen.kill_9();
    flumen.restart().unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    assert_eq!(committed(&mut wire, "g1", "b"), 1, "what was committed for the new topic stays");
}

#[test]
fn the_first_question_after_a_restart_finds_every_group() {
    let dir = tempfile::tempdir().unwrap();
    let mut flumen = Flumen::start(dir.path(), &[]).unwrap();
    flumen.create_topic("t", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let names: BTreeSet<String> = (0..40).map(|i| format!("group-{i}")).collect();
    for name in &names {
        commit(&mut wire, name, "t", 1);
    }
    for _ in 0..3 {
        flumen.kill_9();
        flumen.restart().unwrap();
        let mut wire = Wire::connect(&flumen.kafka).unwrap();
        let listed = wire.ask(5, &ListGroupsRequest::default()).unwrap();
        assert_eq!(listed.error_code, 0);
        assert_eq!(listed.groups.iter().map(|g| g.group_id.to_string()).collect::<BTreeSet<_>>(), names);
    }
}

#[test]
fn offsets_of_partitions_that_do_not_exist_are_not_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let flumen = Flumen::start(dir.path(), &["group.initial.rebalance.delay.ms=0"]).unwrap();
    flumen.create_topic("known", 1, &json!({})).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let commit = OffsetCommitRequest::default().with_group_id(group("g")).with_topics(vec![
        OffsetCommitRequestTopic::default()
            .with_name(topic_name("known"))
            .with_partitions(vec![OffsetCommitRequestPartition::default().with_committed_offset(5)]),
    ]);
    let answer = ask_loaded(&mut wire, 8, &commit, |r| r.topics[0].partitions[0].error_code);
    assert_eq!(answer.topics[0].partitions[0].error_code, 0);
    let partitions =
        [0, 9].map(|index| OffsetDeleteRequestPartition::default().with_partition_index(index)).to_vec();
    let delete = OffsetDeleteRequest::default().with_group_id(group("g")).with_topics(vec![
        OffsetDeleteRequestTopic::default()
            .with_name(topic_name("known"))
            .with_partitions(partitions.clone()),
        OffsetDeleteRequestTopic::default().with_name(topic_name("unknown")).with_partitions(partitions),
    ]);
    let answer = wire.ask(0, &delete).unwrap();
    let codes: Vec<_> = answer
        .topics
        .iter()
        .flat_map(|t| t.partitions.iter().map(|p| (t.name.to_string(), p.partition_index, p.error_code)))
        .collect();
    let unknown = ErrorCode::UNKNOWN_TOPIC_OR_PARTITION.0;
    let expected = [("known", 0, 0), ("known", 9, unknown), ("unknown", 0, unknown), ("unknown", 9, unknown)];
    assert_eq!(codes, expected.map(|(topic, index, code)| (topic.to_string(), index, code)));
    let ask = OffsetFetchRequest::default().with_group_id(group("g")).with_topics(None);
    let left = wire.ask(7, &ask).unwrap();
    assert!(left.topics.is_empty(), "{left:?}");
}

#[test]
fn a_described_group_tells_what_may_be_done_to_it_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let flumen = Flumen::start(dir.path(), &["group.initial.rebalance.delay.ms=0"]).unwrap();
    let mut member = Member::introduce(&flumen.kafka);
    member.send_join();
    member.wire.receive::<JoinGroupRequest>(JOIN_VERSION).unwrap();
    let describe = DescribeGroupsRequest::default().with_groups(vec![group("crowd")]);
    let plain = member.wire.ask(5, &describe).unwrap();
    assert_eq!((plain.groups[0].error_code, plain.groups[0].authorized_operations), (0, i32::MIN));
    let all = member.wire.ask(5, &describe.with_include_authorized_operations(true)).unwrap();
    // READ, DELETE, DESCRIBE, DESCRIBE_CONFIGS, ALTER_CONFIGS by their numbers in Kafka.
    let operations = [3, 6, 8, 10, 11].iter().fold(0, |bits, number| bits | 1 << number);
    assert_eq!(all.groups[0].authorized_operations, operations);
}
