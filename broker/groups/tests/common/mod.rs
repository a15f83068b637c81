//! A coordinator with its log beside it, driven one request at a time.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use flumen_groups::*;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_delete_request::{
    OffsetDeleteRequestPartition, OffsetDeleteRequestTopic,
};
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::*;
use kafka_protocol::protocol::{Encodable, StrBytes};

pub fn s(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_owned())
}

pub fn name(text: &str) -> TopicName {
    s(text).into()
}

pub const CLIENT: Client<'static> = Client { client_id: "cli", client_host: "/127.0.0.1" };
pub const SESSION_MS: i64 = 10_000;
pub const REBALANCE_MS: i64 = 60_000;

pub fn config() -> GroupsConfig {
    GroupsConfig { initial_rebalance_delay_ms: 3_000, group_members_max: 200, ..GroupsConfig::default() }
}

pub enum Logged {
    Record(OffsetsRecord),
    Transactional(i64, OffsetsRecord),
    Marker(i64, bool),
}

pub struct Rig {
    pub coordinator: Coordinator,
    pub config: GroupsConfig,
    pub now_ms: i64,
    pub token: u64,
    pub replies: BTreeMap<u64, GroupResponse>,
    pub answered: BTreeSet<u64>,
    pub appends: Vec<(u64, Vec<OffsetsRecord>)>,
    pub log: Vec<Logged>,
    /// Appends that belong to a producer's transaction.
    pub transactional: BTreeMap<u64, i64>,
    /// Whether appends finish by themselves.
    pub auto: bool,
    fresh: u128,
}

impl Rig {
    pub fn new(config: GroupsConfig) -> Rig {
        Rig {
            coordinator: Coordinator::new(config.clone()),
            config,
            now_ms: 1_000_000,
            token: 0,
            replies: BTreeMap::new(),
            answered: BTreeSet::new(),
            appends: Vec::new(),
            log: Vec::new(),
            transactional: BTreeMap::new(),
            auto: true,
            fresh: 0,
        }
    }

    pub fn absorb(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Reply { token, response } => {
                    assert!(token >= 1 && token <= self.token, "reply to a token never given: {token}");
                    assert!(self.answered.insert(token), "second reply to {token}: {response:?}");
                    self.replies.insert(token, response);
                }
                Output::Append { append_id, records } => {
                    assert!(!records.is_empty());
                    self.appends.push((append_id, records));
                }
            }
        }
        if self.auto {
            self.finish(usize::MAX, Ok(()));
        }
    }

    /// Completes up to `count` appends, oldest first.
    pub fn finish(&mut self, count: usize, result: Result<(), ErrorCode>) {
        for _ in 0..count {
            if self.appends.is_empty() {
                return;
            }
            let (append_id, records) = self.appends.remove(0);
            let producer_id = self.transactional.remove(&append_id);
            if result.is_ok() {
                self.log.extend(records.into_iter().map(|record| match producer_id {
                    Some(producer_id) => Logged::Transactional(producer_id, record),
                    None => Logged::Record(record),
                }));
            }
            let outputs = self.coordinator.append_done(append_id, result, self.now_ms);
            self.absorb(outputs);
        }
    }

    pub fn send(&mut self, request: GroupRequest) -> u64 {
        self.token += 1;
        self.fresh += 1;
        let outputs = self.coordinator.handle(self.token, CLIENT, request, self.fresh, self.now_ms);
        self.absorb(outputs);
        self.token
    }

    pub fn take(&mut self, token: u64) -> Option<GroupResponse> {
        self.replies.remove(&token)
    }

    /// Moves the clock, stopping at every deadline on the way.
    pub fn advance(&mut self, by_ms: i64) {
        let end_ms = self.now_ms + by_ms;
        while let Some(at_ms) = self.coordinator.next_deadline_ms()
            && at_ms <= end_ms
        {
            self.now_ms = self.now_ms.max(at_ms);
            let outputs = self.coordinator.tick(self.now_ms);
            self.absorb(outputs);
            let next = self.coordinator.next_deadline_ms();
            assert!(next.is_none_or(|next| next > self.now_ms), "a tick leaves nothing due");
        }
        self.now_ms = end_ms;
    }

    /// A new coordinator from what the log holds.
    pub fn restart(&mut self) {
        self.coordinator = Coordinator::new(self.config.clone());
        self.appends.clear();
        self.transactional.clear();
        for logged in &self.log {
            match logged {
                Logged::Record(record) => {
                    self.coordinator.load(Some(&record.key), record.value.as_deref(), self.now_ms);
                }
                Logged::Transactional(producer_id, record) => {
                    let value = record.value.as_deref();
                    self.coordinator.load_transactional(*producer_id, Some(&record.key), value, self.now_ms);
                }
                Logged::Marker(producer_id, committed) => {
                    self.coordinator.end_transaction(*producer_id, *committed);
                }
            }
        }
        self.coordinator.finish_load(self.now_ms);
    }

    pub fn state(&self, group: &str) -> Option<GroupState> {
        self.coordinator.group_states().find(|summary| summary.group_id == group).map(|summary| summary.state)
    }

    // Requests.

    pub fn join(&mut self, request: JoinGroupRequest, version: i16) -> u64 {
        self.send(GroupRequest::Join { request, version })
    }

    pub fn joined(&mut self, token: u64) -> JoinGroupResponse {
        match self.take(token) {
            Some(GroupResponse::Join(response)) => {
                for version in [2, 5, 6, 7, 9] {
                    if version == 9 || !response.skip_assignment {
                        encodes(&response, version);
                    }
                }
                response
            }
            other => panic!("no join response to {token}: {other:?}"),
        }
    }

    pub fn sync(&mut self, request: SyncGroupRequest) -> u64 {
        // Version 5 wants the protocol named.
        let named = request.protocol_type.is_some() && request.protocol_name.is_some();
        self.send(GroupRequest::Sync { request, version: if named { 5 } else { 4 } })
    }

    pub fn synced(&mut self, token: u64) -> SyncGroupResponse {
        match self.take(token) {
            Some(GroupResponse::Sync(response)) => {
                (0..=5).for_each(|version| encodes(&response, version));
                response
            }
            other => panic!("no sync response to {token}: {other:?}"),
        }
    }

    pub fn beat(&mut self, group: &str, member: &str, generation: i32) -> ErrorCode {
        self.beat_as(group, member, None, generation)
    }

    pub fn beat_as(
        &mut self,
        group: &str,
        member: &str,
        instance: Option<&str>,
        generation: i32,
    ) -> ErrorCode {
        let request = HeartbeatRequest::default()
            .with_group_id(s(group).into())
            .with_member_id(s(member))
            .with_group_instance_id(instance.map(s))
            .with_generation_id(generation);
        let token = self.send(GroupRequest::Heartbeat { request, version: 4 });
        match self.take(token) {
            Some(GroupResponse::Heartbeat(response)) => ErrorCode(response.error_code),
            other => panic!("{other:?}"),
        }
    }

    pub fn leave(&mut self, group: &str, members: &[(&str, Option<&str>)]) -> Vec<ErrorCode> {
        let members = members
            .iter()
            .map(|(id, instance)| {
                MemberIdentity::default().with_member_id(s(id)).with_group_instance_id(instance.map(s))
            })
            .collect();
        let request = LeaveGroupRequest::default().with_group_id(s(group).into()).with_members(members);
        let token = self.send(GroupRequest::Leave { request, version: 5 });
        match self.take(token) {
            Some(GroupResponse::Leave(response)) => {
                (3..=5).for_each(|version| encodes(&response, version));
                assert_eq!(response.error_code, 0);
                response.members.iter().map(|member| ErrorCode(member.error_code)).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn commit(&mut self, request: OffsetCommitRequest, version: i16) -> u64 {
        self.send(GroupRequest::OffsetCommit { request, version })
    }

    pub fn txn_commit(&mut self, producer_id: i64, request: OffsetCommitRequest) -> u64 {
        let topics = request.topics.iter().map(|topic| {
            let partitions = topic.partitions.iter().map(|partition| {
                txn_offset_commit_request::TxnOffsetCommitRequestPartition::default()
                    .with_partition_index(partition.partition_index)
                    .with_committed_offset(partition.committed_offset)
                    .with_committed_metadata(partition.committed_metadata.clone())
            });
            txn_offset_commit_request::TxnOffsetCommitRequestTopic::default()
                .with_name(topic.name.clone())
                .with_partitions(partitions.collect())
        });
        let request = TxnOffsetCommitRequest::default()
            .with_group_id(request.group_id.clone())
            .with_member_id(request.member_id.clone())
            .with_generation_id(request.generation_id_or_member_epoch)
            .with_producer_id(producer_id.into())
            .with_topics(topics.collect());
        self.token += 1;
        let outputs = self.coordinator.txn_offset_commit(self.token, request, 3, self.now_ms);
        for output in &outputs {
            if let Output::Append { append_id, .. } = output {
                self.transactional.insert(*append_id, producer_id);
            }
        }
        self.absorb(outputs);
        self.token
    }

    /// Writes a marker, after everything before it.
    pub fn end_transaction(&mut self, producer_id: i64, committed: bool) {
        self.finish(usize::MAX, Ok(()));
        self.log.push(Logged::Marker(producer_id, committed));
        self.coordinator.end_transaction(producer_id, committed);
    }

    pub fn committed(&mut self, token: u64) -> Vec<ErrorCode> {
        match self.take(token) {
            Some(GroupResponse::OffsetCommit(response)) => {
                encodes(&response, 9);
                let partitions = response.topics.iter().flat_map(|topic| &topic.partitions);
                partitions.map(|partition| ErrorCode(partition.error_code)).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn fetch(&mut self, group: &str, topic: &str, partition: i32) -> OffsetFetchPartition {
        let group = OffsetFetchGroup {
            group_id: s(group),
            topics: Some(vec![(name(topic), vec![partition])]),
            ..OffsetFetchGroup::default()
        };
        let token = self.send(GroupRequest::OffsetFetch { group });
        match self.take(token) {
            Some(GroupResponse::OffsetFetch(mut result)) => result.topics.remove(0).partitions.remove(0),
            other => panic!("{other:?}"),
        }
    }

    pub fn fetch_all(&mut self, group: &str) -> Vec<(String, i32, i64)> {
        let group = OffsetFetchGroup { group_id: s(group), ..OffsetFetchGroup::default() };
        let token = self.send(GroupRequest::OffsetFetch { group });
        match self.take(token) {
            Some(GroupResponse::OffsetFetch(result)) => result
                .topics
                .iter()
                .flat_map(|topic| {
                    topic.partitions.iter().map(|p| (topic.name.to_string(), p.partition, p.offset))
                })
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    pub fn delete_offsets(&mut self, group: &str, topic: &str, partitions: &[i32]) -> OffsetDeleteResponse {
        let partitions = partitions
            .iter()
            .map(|index| OffsetDeleteRequestPartition::default().with_partition_index(*index))
            .collect();
        let topic = OffsetDeleteRequestTopic::default().with_name(name(topic)).with_partitions(partitions);
        let request = OffsetDeleteRequest::default().with_group_id(s(group).into()).with_topics(vec![topic]);
        let token = self.send(GroupRequest::OffsetDelete { request });
        match self.take(token) {
            Some(GroupResponse::OffsetDelete(response)) => response,
            other => panic!("{other:?}"),
        }
    }

    pub fn delete(&mut self, group: &str) -> ErrorCode {
        let token = self.send(GroupRequest::Delete { group_id: s(group) });
        match self.take(token) {
            Some(GroupResponse::Delete(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    pub fn describe(&mut self, group: &str, version: i16) -> describe_groups_response::DescribedGroup {
        let token = self.send(GroupRequest::Describe { group_id: s(group), version });
        match self.take(token) {
            Some(GroupResponse::Describe(group)) => {
                let response = DescribeGroupsResponse::default().with_groups(vec![group.clone()]);
                let oldest = if group.error_message.is_some() { 6 } else { 0 };
                (oldest..=6).for_each(|version| encodes(&response, version));
                group
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn list(&mut self, states: &[&str], types: &[&str]) -> Vec<String> {
        let token = self.send(GroupRequest::List {
            states_filter: states.iter().map(|text| s(text)).collect(),
            types_filter: types.iter().map(|text| s(text)).collect(),
        });
        match self.take(token) {
            Some(GroupResponse::List(groups)) => {
                let response = ListGroupsResponse::default().with_groups(groups.clone());
                (0..=5).for_each(|version| encodes(&response, version));
                groups.iter().map(|group| group.group_id.to_string()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    // Whole steps.

    /// A member id, as clients of version 4 and later get it.
    pub fn member_id(&mut self, group: &str) -> String {
        let token = self.join(join(group, "", &["range"]), 9);
        let response = self.joined(token);
        assert_eq!(ErrorCode(response.error_code), ErrorCode::MEMBER_ID_REQUIRED);
        response.member_id.to_string()
    }

    /// Joins everybody and lets the leader assign to each member its own id.
    pub fn stable(&mut self, group: &str, members: &[String]) -> (i32, String) {
        let tokens: Vec<u64> =
            members.iter().map(|member| self.join(join(group, member, &["range"]), 9)).collect();
        self.advance(self.config.initial_rebalance_delay_ms.max(1) * 3);
        let responses: Vec<_> = tokens.iter().map(|token| self.joined(*token)).collect();
        let generation = responses[0].generation_id;
        let leader = responses[0].leader.to_string();
        for (response, member) in responses.iter().zip(members) {
            assert_eq!((response.error_code, response.generation_id), (0, generation));
            assert_eq!((&*response.member_id, &*response.leader), (member.as_str(), leader.as_str()));
            assert_eq!(response.members.len(), if *member == leader { members.len() } else { 0 });
        }
        self.sync_all(group, generation, members, &leader);
        assert_eq!(self.state(group), Some(GroupState::Stable));
        (generation, leader)
    }

    pub fn sync_all(&mut self, group: &str, generation: i32, members: &[String], leader: &str) {
        let mut tokens = Vec::new();
        for member in members.iter().filter(|member| *member != leader) {
            let token = self.sync(sync(group, member, generation, &[]));
            assert!(self.take(token).is_none(), "followers wait for the leader");
            tokens.push((token, member));
        }
        let all: Vec<&str> = members.iter().map(String::as_str).collect();
        tokens.push((
            self.sync(sync(group, leader, generation, &all)),
            members.iter().find(|m| *m == leader).unwrap(),
        ));
        for (token, member) in tokens {
            let response = self.synced(token);
            assert_eq!((response.error_code, &response.assignment[..]), (0, member.as_bytes()));
        }
    }
}

pub fn encodes(message: &impl Encodable, version: i16) {
    let mut out = bytes::BytesMut::new();
    message.encode(&mut out, version).unwrap_or_else(|error| panic!("version {version}: {error}"));
}

/// A consumer's subscription to `topic`, with its owned partitions left out.
pub fn subscription(topic: &str) -> Bytes {
    let mut out = vec![0, 0, 0, 0, 0, 1, 0, topic.len() as u8];
    out.extend_from_slice(topic.as_bytes());
    out.extend_from_slice(&[255; 4]);
    out.into()
}

pub fn join(group: &str, member: &str, protocols: &[&str]) -> JoinGroupRequest {
    let protocols = protocols
        .iter()
        .map(|name| {
            JoinGroupRequestProtocol::default().with_name(s(name)).with_metadata(subscription("topic"))
        })
        .collect();
    JoinGroupRequest::default()
        .with_group_id(s(group).into())
        .with_member_id(s(member))
        .with_session_timeout_ms(SESSION_MS as i32)
        .with_rebalance_timeout_ms(REBALANCE_MS as i32)
        .with_protocol_type(s("consumer"))
        .with_protocols(protocols)
}

pub fn join_static(group: &str, member: &str, instance: &str) -> JoinGroupRequest {
    join(group, member, &["range"]).with_group_instance_id(Some(s(instance)))
}

/// Assigns to each of `members` its own id.
pub fn sync(group: &str, member: &str, generation: i32, members: &[&str]) -> SyncGroupRequest {
    let assignments = members
        .iter()
        .map(|id| {
            SyncGroupRequestAssignment::default()
                .with_member_id(s(id))
                .with_assignment(Bytes::copy_from_slice(id.as_bytes()))
        })
        .collect();
    SyncGroupRequest::default()
        .with_group_id(s(group).into())
        .with_member_id(s(member))
        .with_generation_id(generation)
        .with_assignments(assignments)
}

pub fn commit(group: &str, member: &str, generation: i32, topic: &str, offset: i64) -> OffsetCommitRequest {
    let partition = OffsetCommitRequestPartition::default()
        .with_partition_index(0)
        .with_committed_offset(offset)
        .with_committed_leader_epoch(4)
        .with_committed_metadata(Some(s("meta")));
    let topic = OffsetCommitRequestTopic::default().with_name(name(topic)).with_partitions(vec![partition]);
    OffsetCommitRequest::default()
        .with_group_id(s(group).into())
        .with_member_id(s(member))
        .with_generation_id_or_member_epoch(generation)
        .with_topics(vec![topic])
}
