//! Committed offsets: commit, fetch, delete, expire.
//!
//! A commit becomes visible when its append is done. A deletion names offsets whose commit is still under way,
//! too: the log orders the two, and so does `append_done`.

use std::sync::Arc;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::offset_commit_response::{
    OffsetCommitResponsePartition, OffsetCommitResponseTopic,
};
use kafka_protocol::messages::offset_delete_response::{
    OffsetDeleteResponsePartition, OffsetDeleteResponseTopic,
};
use kafka_protocol::messages::{
    OffsetCommitRequest, OffsetCommitResponse, OffsetDeleteRequest, OffsetDeleteResponse,
};
use kafka_protocol::protocol::StrBytes;

use crate::coordinator::Coordinator;
use crate::group::{AppendKind, Committed, Ctx, Group, Reply};
use crate::membership::check_member;
use crate::record::{OffsetCommitValue, OffsetsRecord, group_metadata_key, offset_commit_key};
use crate::transactions::is_unstable;
use crate::types::{
    GroupResponse, GroupState, MAX_APPENDS_IN_FLIGHT, MAX_GROUPS, MAX_OFFSETS_PER_COMMIT, MAX_STRING_BYTES,
    MAX_TOMBSTONES_PER_APPEND, OffsetFetchGroup, OffsetFetchPartition, OffsetFetchResult, OffsetFetchTopic,
    Output, own_str,
};

impl Coordinator {
    pub(crate) fn offset_commit(&mut self, token: u64, request: OffsetCommitRequest, version: i16) {
        self.commit(token, request, version, None);
    }

    /// With a producer id the offsets belong to its open transaction.
    pub(crate) fn commit(
        &mut self,
        token: u64,
        request: OffsetCommitRequest,
        version: i16,
        producer_id: Option<i64>,
    ) {
        match self.check_commit(&request, version, producer_id.is_some()) {
            Ok(()) => self.append_commit(token, &request, producer_id),
            Err(error) => {
                let response = commit_response(&request, |_, _, _| error);
                self.ctx.reply(token, GroupResponse::OffsetCommit(response));
            }
        }
        self.drop_if_vacant(&request.group_id);
    }

    fn check_commit(
        &mut self,
        request: &OffsetCommitRequest,
        version: i16,
        transactional: bool,
    ) -> Result<(), ErrorCode> {
        let group_id = &**request.group_id;
        if group_id.len() > MAX_STRING_BYTES {
            return Err(ErrorCode::INVALID_GROUP_ID);
        }
        let offsets: usize = request.topics.iter().map(|topic| topic.partitions.len()).sum();
        if offsets > MAX_OFFSETS_PER_COMMIT {
            return Err(ErrorCode::INVALID_COMMIT_OFFSET_SIZE);
        }
        if self.ctx.appends.len() >= MAX_APPENDS_IN_FLIGHT {
            return Err(ErrorCode::COORDINATOR_LOAD_IN_PROGRESS);
        }
        let generation = request.generation_id_or_member_epoch;
        if !self.groups.contains_key(group_id) {
            // Without a generation this is an admin tool or a consumer that assigns its own partitions.
            if generation >= 0 {
                let gone = ErrorCode::GROUP_ID_NOT_FOUND;
                return Err(if version >= 9 && !transactional {
                    gone
                } else {
                    ErrorCode::ILLEGAL_GENERATION
                });
            }
            if self.groups.len() >= MAX_GROUPS {
                return Err(ErrorCode::COORDINATOR_NOT_AVAILABLE);
            }
            let group = Group::new(group_id, self.ctx.now.wall_ms);
            self.groups.insert(group.id.clone(), group);
        }
        let Some(group) = self.groups.get_mut(group_id) else { return Err(ErrorCode::UNKNOWN_MEMBER_ID) };
        if group.state == GroupState::Dead {
            return Err(ErrorCode::COORDINATOR_NOT_AVAILABLE);
        }
        if generation < 0 && group.state == GroupState::Empty {
            return Ok(());
        }
        let instance_id = request.group_instance_id.as_deref();
        if generation < 0 && request.member_id.is_empty() && instance_id.is_none() {
            // Producers before KIP-447 do not know the members of the group they commit for.
            return if transactional { Ok(()) } else { Err(ErrorCode::UNKNOWN_MEMBER_ID) };
        }
        check_member(group, &request.member_id, instance_id, Some(generation))?;
        match group.state {
            _ if transactional => Ok(()),
            // The member knows the new generation but not yet its assignment.
            GroupState::CompletingRebalance => Err(ErrorCode::REBALANCE_IN_PROGRESS),
            _ => {
                group.extend_session(&mut self.ctx, &request.member_id);
                Ok(())
            }
        }
    }

    fn append_commit(&mut self, token: u64, request: &OffsetCommitRequest, producer_id: Option<i64>) {
        let Some(group) = self.groups.get_mut(&**request.group_id) else { return };
        let ctx = &mut self.ctx;
        let expire_timestamp_ms = match request.retention_time_ms {
            retention_ms if retention_ms < 0 => -1,
            retention_ms => ctx.now.wall_ms.saturating_add(retention_ms),
        };
        let metadata_max = ctx.config.offset_metadata_bytes_max;
        let seq = ctx.next_append_id;
        let mut records = Vec::new();
        let mut offsets = Vec::new();
        let response = commit_response(request, |topic, topic_id, partition| {
            let metadata = partition.committed_metadata.as_deref().unwrap_or("");
            if topic.is_empty() {
                return ErrorCode::UNKNOWN_TOPIC_ID;
            }
            if topic.len() > MAX_STRING_BYTES {
                return ErrorCode::UNKNOWN_TOPIC_OR_PARTITION;
            }
            if metadata.len() > MAX_STRING_BYTES
                || metadata.len() > metadata_max && metadata.encode_utf16().count() > metadata_max
            {
                return ErrorCode::OFFSET_METADATA_TOO_LARGE;
            }
            let value = OffsetCommitValue {
                offset: partition.committed_offset,
                leader_epoch: partition.committed_leader_epoch,
                metadata: metadata.to_owned(),
                commit_timestamp_ms: ctx.now.wall_ms,
                expire_timestamp_ms,
                topic_id,
            };
            let key = offset_commit_key(&group.id, topic, partition.partition_index);
            records.push(OffsetsRecord { key, value: Some(value.encode()) });
            offsets.push((topic.to_owned(), partition.partition_index, Committed::new(value, seq)));
            ErrorCode::NONE
        });
        let response = GroupResponse::OffsetCommit(response);
        if records.is_empty() {
            return ctx.reply(token, response);
        }
        let reply = Reply { token, response };
        ctx.append(group, records, AppendKind::Commit { reply, offsets, producer_id });
    }

    pub(crate) fn offset_fetch(&mut self, token: u64, asked: OffsetFetchGroup) {
        let group = self.groups.get(&*asked.group_id);
        let require_stable = asked.require_stable;
        let fetched = |topic: &str, partition: i32, committed: Option<&Committed>| {
            let unstable = require_stable && group.is_some_and(|group| is_unstable(group, topic, partition));
            if unstable { unstable_offset(partition) } else { fetched(partition, committed) }
        };
        let topics = match asked.topics {
            Some(topics) => topics
                .into_iter()
                .map(|(name, partitions)| {
                    let known = group.and_then(|group| group.offsets.get(name.as_str()));
                    let partitions = partitions
                        .into_iter()
                        .map(|partition| {
                            fetched(&name, partition, known.and_then(|known| known.get(&partition)))
                        })
                        .collect();
                    OffsetFetchTopic { name, partitions }
                })
                .collect(),
            None => group
                .into_iter()
                .flat_map(|group| &group.offsets)
                .map(|(name, partitions)| OffsetFetchTopic {
                    name: own_str(name).into(),
                    partitions: partitions
                        .iter()
                        .map(|(partition, committed)| fetched(name, *partition, Some(committed)))
                        .collect(),
                })
                .collect(),
        };
        let result = OffsetFetchResult { error: ErrorCode::NONE, topics };
        self.ctx.reply(token, GroupResponse::OffsetFetch(result));
    }

    pub(crate) fn offset_delete(&mut self, token: u64, request: OffsetDeleteRequest) {
        let group_error = match self.groups.get(&**request.group_id) {
            _ if request.group_id.is_empty() => ErrorCode::INVALID_GROUP_ID,
            None => ErrorCode::GROUP_ID_NOT_FOUND,
            Some(group) if group.state == GroupState::Dead => ErrorCode::GROUP_ID_NOT_FOUND,
            // Only what consumers subscribe to can be told from what they no longer use.
            Some(group) if group.state != GroupState::Empty && !group.uses_consumer_protocol() => {
                ErrorCode::NON_EMPTY_GROUP
            }
            Some(_) => ErrorCode::NONE,
        };
        let Some(group) = self.groups.get_mut(&**request.group_id).filter(|_| group_error.is_none()) else {
            let response = OffsetDeleteResponse::default().with_error_code(group_error.0);
            return self.ctx.reply(token, GroupResponse::OffsetDelete(response));
        };
        let mut doomed = Vec::new();
        let mut topics = Vec::with_capacity(request.topics.len());
        for topic in &request.topics {
            let subscribed = group.is_subscribed(&topic.name);
            let mut partitions = Vec::with_capacity(topic.partitions.len());
            for partition in &topic.partitions {
                let index = partition.partition_index;
                let error = if subscribed {
                    ErrorCode::GROUP_SUBSCRIBED_TO_TOPIC
                } else {
                    if is_committed(group, &self.ctx, &topic.name, index) {
                        doomed.push((topic.name.to_string(), index));
                    }
                    ErrorCode::NONE
                };
                partitions.push(
                    OffsetDeleteResponsePartition::default()
                        .with_partition_index(index)
                        .with_error_code(error.0),
                );
            }
            let name = own_str(&topic.name).into();
            topics.push(OffsetDeleteResponseTopic::default().with_name(name).with_partitions(partitions));
        }
        let response = GroupResponse::OffsetDelete(OffsetDeleteResponse::default().with_topics(topics));
        append_tombstones(group, &mut self.ctx, doomed, false, Some(Reply { token, response }));
    }

    /// Forgets the offsets of a topic that was deleted.
    pub fn remove_topic(&mut self, topic: &str) -> Vec<Output> {
        for group in self.groups.values_mut() {
            if group.state != GroupState::Dead {
                let known =
                    group.offsets.get(topic).into_iter().flat_map(|partitions| partitions.keys().copied());
                let coming = pending(group, &self.ctx).filter(|(name, _)| *name == topic);
                let doomed = known
                    .chain(coming.map(|(_, partition)| partition))
                    .map(|partition| (topic.to_owned(), partition))
                    .collect();
                append_tombstones(group, &mut self.ctx, doomed, false, None);
            }
        }
        self.take_outputs()
    }

    /// Forgets the offsets of topics that no longer exist, or exist anew under another id: their deletion may have
    /// come while nobody watched. `current` gives the id of the topic that has a name now.
    pub fn remove_outdated_topics(&mut self, current: impl Fn(&str) -> Option<u128>) -> Vec<Output> {
        for group in self.groups.values_mut() {
            let outdated = |topic: &str, committed: &Committed| match current(topic) {
                None => true,
                Some(id) => committed.topic_id != 0 && committed.topic_id != id,
            };
            let known = group.offsets.iter().flat_map(|(topic, partitions)| {
                partitions.iter().map(move |(partition, committed)| (topic, *partition, committed))
            });
            let held = group
                .txn_offsets
                .values()
                .flatten()
                .map(|((topic, partition), committed)| (topic, *partition, committed));
            let doomed = known
                .chain(held)
                .filter(|(topic, _, committed)| outdated(topic, committed))
                .map(|(topic, partition, _)| (topic.clone(), partition))
                .collect();
            append_tombstones(group, &mut self.ctx, doomed, false, None);
        }
        self.take_outputs()
    }

    /// Tombstones for offsets nobody used for the retention time, and for groups that have nothing left.
    pub(crate) fn expire_offsets(&mut self) {
        for group in self.groups.values_mut() {
            // What is being appended now was used now.
            if group.state == GroupState::Dead || group.appends_in_flight > 0 {
                continue;
            }
            let doomed = expired_offsets(group, &self.ctx);
            let left: usize = group.offsets.values().map(|partitions| partitions.len()).sum();
            let whole_group = group.state == GroupState::Empty
                && group.txn_offsets.is_empty()
                && group.pending_members.is_empty()
                && left == doomed.len();
            append_tombstones(group, &mut self.ctx, doomed, whole_group, None);
        }
        let ids: Vec<Arc<str>> =
            self.groups.values().filter(|group| group.is_vacant()).map(|group| group.id.clone()).collect();
        for group_id in ids {
            self.drop_if_vacant(&group_id);
        }
    }
}

fn commit_response(
    request: &OffsetCommitRequest,
    mut outcome: impl FnMut(
        &str,
        u128,
        &kafka_protocol::messages::offset_commit_request::OffsetCommitRequestPartition,
    ) -> ErrorCode,
) -> OffsetCommitResponse {
    let topics = request
        .topics
        .iter()
        .map(|topic| {
            let partitions = topic
                .partitions
                .iter()
                .map(|partition| {
                    OffsetCommitResponsePartition::default()
                        .with_partition_index(partition.partition_index)
                        .with_error_code(outcome(&topic.name, topic.topic_id.as_u128(), partition).0)
                })
                .collect();
            OffsetCommitResponseTopic::default()
                .with_name(own_str(&topic.name).into())
                .with_topic_id(topic.topic_id)
                .with_partitions(partitions)
        })
        .collect();
    OffsetCommitResponse::default().with_topics(topics)
}

fn fetched(partition: i32, committed: Option<&Committed>) -> OffsetFetchPartition {
    let (offset, leader_epoch, metadata) = match committed {
        Some(committed) => (committed.offset, committed.leader_epoch, own_str(&committed.metadata)),
        None => (-1, -1, StrBytes::new()),
    };
    OffsetFetchPartition { partition, offset, leader_epoch, metadata, error: ErrorCode::NONE }
}

/// The consumer must ask again when the transaction has ended.
fn unstable_offset(partition: i32) -> OffsetFetchPartition {
    OffsetFetchPartition { error: ErrorCode::UNSTABLE_OFFSET_COMMIT, ..fetched(partition, None) }
}

/// Offsets of the group whose commit is under way.
fn in_flight<'a>(group: &Group, ctx: &'a Ctx) -> impl Iterator<Item = (&'a str, i32)> {
    let group_id = group.id.clone();
    let appends = if group.appends_in_flight == 0 { None } else { Some(ctx.appends.values()) };
    appends
        .into_iter()
        .flatten()
        .filter(move |append| append.group == group_id)
        .filter_map(|append| match &append.kind {
            AppendKind::Commit { offsets, .. } => Some(offsets),
            _ => None,
        })
        .flatten()
        .map(|(topic, partition, _)| (topic.as_str(), *partition))
}

/// Offsets the log knows, or will, that are not visible yet.
fn pending<'a>(group: &'a Group, ctx: &'a Ctx) -> impl Iterator<Item = (&'a str, i32)> {
    let held = group.txn_offsets.values().flat_map(|offsets| offsets.keys());
    in_flight(group, ctx).chain(held.map(|(topic, partition)| (topic.as_str(), *partition)))
}

fn is_committed(group: &Group, ctx: &Ctx, topic: &str, partition: i32) -> bool {
    group.offsets.get(topic).is_some_and(|partitions| partitions.contains_key(&partition))
        || pending(group, ctx).any(|found| found == (topic, partition))
}

pub(crate) fn all_offsets(group: &Group, ctx: &Ctx) -> Vec<(String, i32)> {
    let mut all: Vec<(String, i32)> = group
        .offsets
        .iter()
        .flat_map(|(topic, partitions)| partitions.keys().map(move |partition| (topic.clone(), *partition)))
        .chain(pending(group, ctx).map(|(topic, partition)| (topic.to_owned(), partition)))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn expired_offsets(group: &Group, ctx: &Ctx) -> Vec<(String, i32)> {
    // Since when an offset is unused: in an empty group since it is empty, in a simple group since its commit,
    // and in a living consumer group since its commit if nobody subscribes to the topic any more.
    let simple = group.protocol_type.is_none();
    let empty_since = (group.state == GroupState::Empty && group.state_timestamp_ms >= 0)
        .then_some(group.state_timestamp_ms);
    let living = !simple && group.state != GroupState::Empty;
    if living
        && !(group.state == GroupState::Stable
            && group.uses_consumer_protocol()
            && group.subscribed.is_some())
    {
        return Vec::new();
    }
    let mut expired = Vec::new();
    for (topic, partitions) in &group.offsets {
        if living && group.is_subscribed(topic) {
            continue;
        }
        for (partition, committed) in partitions {
            let unused_since =
                if simple || living { None } else { empty_since }.unwrap_or(committed.commit_timestamp_ms);
            let due = if committed.expire_timestamp_ms >= 0 {
                ctx.now.wall_ms >= committed.expire_timestamp_ms
            } else {
                ctx.now.wall_ms.saturating_sub(unused_since) >= ctx.config.offsets_retention_ms
            };
            if due && !is_unstable(group, topic, *partition) {
                expired.push((topic.clone(), *partition));
            }
        }
    }
    expired
}

/// Tombstones in appends of bounded size; the last one carries the group's own and the reply.
pub(crate) fn append_tombstones(
    group: &mut Group,
    ctx: &mut Ctx,
    mut doomed: Vec<(String, i32)>,
    whole_group: bool,
    reply: Option<Reply>,
) {
    doomed.sort_unstable();
    doomed.dedup();
    let group_record = whole_group && group.persisted;
    if doomed.is_empty() && !group_record {
        if let Some(reply) = reply {
            ctx.reply(reply.token, reply.response);
        }
        return;
    }
    if whole_group {
        group.state = GroupState::Dead;
    }
    group.delete_error = ErrorCode::NONE;
    let mut reply = reply;
    loop {
        let rest = doomed.split_off(doomed.len().min(MAX_TOMBSTONES_PER_APPEND));
        let offsets = std::mem::replace(&mut doomed, rest);
        let last = doomed.is_empty();
        let mut records: Vec<OffsetsRecord> = offsets
            .iter()
            .map(|(topic, partition)| OffsetsRecord {
                key: offset_commit_key(&group.id, topic, *partition),
                value: None,
            })
            .collect();
        if last && group_record {
            records.push(OffsetsRecord { key: group_metadata_key(&group.id), value: None });
        }
        let reply = if last { reply.take() } else { None };
        ctx.append(group, records, AppendKind::Tombstones { offsets, last, whole_group, reply });
        if last {
            return;
        }
    }
}
