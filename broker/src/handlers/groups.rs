//! Group APIs: find the offsets partition that owns the group, ask its coordinator there, encode.
//!
//! Exports show up here as groups `export.<topic>`, so that every lag tool sees them. Nobody can join such a group;
//! setting its offsets while the export is paused is replay.

use std::rc::Rc;

use flumen_groups::{
    GroupRequest, GroupResponse, OffsetFetchGroup, OffsetFetchPartition, OffsetFetchResult, OffsetFetchTopic,
    coordinator_partition,
};
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::delete_groups_response::DeletableGroupResult;
use kafka_protocol::messages::describe_groups_response::DescribedGroup;
use kafka_protocol::messages::find_coordinator_response::Coordinator as CoordinatorEntry;
use kafka_protocol::messages::offset_delete_response::{
    OffsetDeleteResponsePartition, OffsetDeleteResponseTopic,
};
use kafka_protocol::messages::offset_fetch_response::{
    OffsetFetchResponseGroup, OffsetFetchResponsePartition, OffsetFetchResponsePartitions,
    OffsetFetchResponseTopic, OffsetFetchResponseTopics,
};
use kafka_protocol::messages::{
    BrokerId, DeleteGroupsRequest, DeleteGroupsResponse, DescribeGroupsRequest, DescribeGroupsResponse,
    FindCoordinatorRequest, FindCoordinatorResponse, HeartbeatRequest, HeartbeatResponse, JoinGroupRequest,
    JoinGroupResponse, LeaveGroupRequest, LeaveGroupResponse, ListGroupsRequest, ListGroupsResponse,
    OffsetCommitRequest, OffsetCommitResponse, OffsetDeleteRequest, OffsetDeleteResponse, OffsetFetchRequest,
    OffsetFetchResponse, SyncGroupRequest, SyncGroupResponse, TopicName,
};
use kafka_protocol::protocol::StrBytes;

use crate::cluster::change::{Intent, change};
use crate::coordinator::OFFSETS_TOPIC;
use flumen_sink::exporter::{ResetError, ResetTo};

use crate::dispatch::{Answer, Request, RequestError};
use crate::export::ResetRefused;
use crate::shard::Shard;
use crate::topic_admin::status_of;

/// Groups are "coordinated" by this key type; 1 is transactions, 2 share groups.
const KEY_TYPE_GROUP: i8 = 0;

/// Read, Delete, Describe, DescribeConfigs, AlterConfigs: without an authorizer, all that there are for a group.
const GROUP_OPERATIONS: i32 = 0b1101_0100_1000;

/// The Raft group of the offsets partition that owns `group`; creates the offsets topic on first use.
pub async fn home_of(shard: &Rc<Shard>, group: &str) -> Result<u64, ErrorCode> {
    let find = |shard: &Rc<Shard>| {
        let image = shard.node.image.load();
        image.topics.get(OFFSETS_TOPIC).map(|topic| {
            let partitions = i32::try_from(topic.partitions.len()).unwrap_or(i32::MAX);
            let index = coordinator_partition(group, partitions);
            topic.partitions.get(usize::try_from(index).unwrap_or(0)).map(|p| p.group_id)
        })
    };
    match find(shard) {
        Some(found) => return found.ok_or(ErrorCode::COORDINATOR_NOT_AVAILABLE),
        None => create_offsets_topic(shard).await?,
    }
    find(shard).flatten().ok_or(ErrorCode::COORDINATOR_NOT_AVAILABLE)
}

async fn create_offsets_topic(shard: &Rc<Shard>) -> Result<(), ErrorCode> {
    change(&shard.node, Intent::CreateOffsetsTopic).await.map(drop).map_err(|error| {
        tracing::warn!(%error, "cannot create {OFFSETS_TOPIC}");
        ErrorCode::COORDINATOR_NOT_AVAILABLE
    })
}

/// Asks the coordinator of `group`, wherever it lives.
async fn ask(request: &Request<'_>, group: &str, question: GroupRequest) -> Result<GroupResponse, ErrorCode> {
    let shard = request.shard;
    let group_id = home_of(shard, group).await?;
    let client_id = request.client_id().to_string();
    let client_host = format!("/{}", request.peer.address.ip());
    ask_partition(shard, group_id, client_id, client_host, question).await
}

/// Asks the coordinator of an offsets partition that this node leads.
pub async fn ask_partition(
    shard: &Rc<Shard>,
    group_id: u64,
    client_id: String,
    client_host: String,
    question: GroupRequest,
) -> Result<GroupResponse, ErrorCode> {
    let home = shard.node.shard_of(group_id);
    if home == shard.id {
        let shell = shard.coordinators.of(shard, group_id)?;
        return shell.request(&client_id, &client_host, question).await;
    }
    shard.node.shards[home]
        .run(move |s| async move {
            let shell = s.coordinators.of(&s, group_id)?;
            shell.request(&client_id, &client_host, question).await
        })
        .await
        .map_err(|_| ErrorCode::COORDINATOR_NOT_AVAILABLE)?
}

/// Whoever leads the offsets partition of the group.
async fn coordinating_node(shard: &Rc<Shard>, group: &str) -> Result<i32, ErrorCode> {
    let node = &shard.node;
    let leader = status_of(node, home_of(shard, group).await?).leader_id;
    if leader >= 0 && node.is_reachable()(leader) {
        Ok(leader)
    } else {
        Err(ErrorCode::COORDINATOR_NOT_AVAILABLE)
    }
}

pub async fn find_coordinator(request: &Request<'_>) -> Result<Answer, RequestError> {
    let find: FindCoordinatorRequest = request.decode()?;
    let version = request.header.api_version;
    let keys: Vec<StrBytes> = if version >= 4 { find.coordinator_keys } else { vec![find.key] };
    let image = request.shard.node.image.load_full();
    let mut response = FindCoordinatorResponse::default();
    let mut entries = Vec::with_capacity(keys.len());
    for key in keys {
        let found = if find.key_type != KEY_TYPE_GROUP {
            Err((ErrorCode::INVALID_REQUEST, "only consumer groups have coordinators here"))
        } else if key.is_empty() && version < 4 {
            Ok(image.node.id)
        } else {
            coordinating_node(request.shard, key.as_str())
                .await
                .map_err(|e| (e, "the offsets topic is not available"))
        };
        // A node that has just joined may lead before its address has come here.
        let found = found.and_then(|id| {
            let not_known = (ErrorCode::COORDINATOR_NOT_AVAILABLE, "the coordinator is not known here yet");
            image.broker(id).ok_or(not_known)
        });
        let mut entry = CoordinatorEntry::default().with_key(key);
        match found {
            Ok(broker) => {
                entry.node_id = BrokerId(broker.id);
                entry.host = StrBytes::from_string(broker.host.to_string());
                entry.port = i32::from(broker.port);
            }
            Err((code, message)) => {
                entry.node_id = BrokerId(-1);
                entry.port = -1;
                entry.error_code = code.0;
                entry.error_message = Some(StrBytes::from_static_str(message));
            }
        }
        entries.push(entry);
    }
    if version >= 4 {
        response.coordinators = entries;
    } else if let Some(entry) = entries.pop() {
        response.node_id = entry.node_id;
        response.host = entry.host;
        response.port = entry.port;
        response.error_code = entry.error_code;
        response.error_message = entry.error_message;
    }
    request.answer(&response)
}

pub async fn join(request: &Request<'_>) -> Result<Answer, RequestError> {
    let join: JoinGroupRequest = request.decode()?;
    let version = request.header.api_version;
    let group = join.group_id.0.to_string();
    let member_id = join.member_id.clone();
    if is_export(request, &group) {
        // The export is the only member its group can have.
        let mut response =
            JoinGroupResponse::default().with_error_code(ErrorCode::GROUP_AUTHORIZATION_FAILED.0);
        response.generation_id = -1;
        response.member_id = member_id;
        if version < 7 {
            response.protocol_name = Some(StrBytes::default());
        }
        return request.answer(&response);
    }
    match ask(request, &group, GroupRequest::Join { request: join, version }).await {
        Ok(GroupResponse::Join(response)) => request.answer(&response),
        other => {
            let mut response = JoinGroupResponse::default().with_error_code(error_of(other).0);
            response.generation_id = -1;
            response.member_id = member_id;
            if version < 7 {
                response.protocol_name = Some(StrBytes::default());
            }
            request.answer(&response)
        }
    }
}

pub async fn sync(request: &Request<'_>) -> Result<Answer, RequestError> {
    let sync: SyncGroupRequest = request.decode()?;
    let version = request.header.api_version;
    let group = sync.group_id.0.to_string();
    match ask(request, &group, GroupRequest::Sync { request: sync, version }).await {
        Ok(GroupResponse::Sync(response)) => request.answer(&response),
        other => request.answer(&SyncGroupResponse::default().with_error_code(error_of(other).0)),
    }
}

pub async fn heartbeat(request: &Request<'_>) -> Result<Answer, RequestError> {
    let heartbeat: HeartbeatRequest = request.decode()?;
    let version = request.header.api_version;
    let group = heartbeat.group_id.0.to_string();
    match ask(request, &group, GroupRequest::Heartbeat { request: heartbeat, version }).await {
        Ok(GroupResponse::Heartbeat(response)) => request.answer(&response),
        other => request.answer(&HeartbeatResponse::default().with_error_code(error_of(other).0)),
    }
}

pub async fn leave(request: &Request<'_>) -> Result<Answer, RequestError> {
    let leave: LeaveGroupRequest = request.decode()?;
    let version = request.header.api_version;
    let group = leave.group_id.0.to_string();
    match ask(request, &group, GroupRequest::Leave { request: leave, version }).await {
        Ok(GroupResponse::Leave(response)) => request.answer(&response),
        other => request.answer(&LeaveGroupResponse::default().with_error_code(error_of(other).0)),
    }
}

pub async fn offset_commit(request: &Request<'_>) -> Result<Answer, RequestError> {
    use kafka_protocol::messages::offset_commit_response::{
        OffsetCommitResponsePartition, OffsetCommitResponseTopic,
    };
    let mut commit: OffsetCommitRequest = request.decode()?;
    let version = request.header.api_version;
    let group = commit.group_id.0.to_string();
    let answer_all = |commit: &OffsetCommitRequest, error: ErrorCode| {
        let topics = commit
            .topics
            .iter()
            .map(|t| {
                let partitions = t
                    .partitions
                    .iter()
                    .map(|p| {
                        OffsetCommitResponsePartition::default()
                            .with_partition_index(p.partition_index)
                            .with_error_code(error.0)
                    })
                    .collect();
                OffsetCommitResponseTopic::default().with_name(t.name.clone()).with_partitions(partitions)
            })
            .collect();
        OffsetCommitResponse::default().with_topics(topics)
    };
    if let Some(topic) = request.shard.node.exports.topic_of(&group) {
        let error = reset_export(request, &topic, &commit).await.err().unwrap_or(ErrorCode::NONE);
        return request.answer(&answer_all(&commit, error));
    }
    // Partitions that do not exist are refused here: the coordinator does not know topics.
    let mut unknown = Vec::new();
    {
        let image = request.shard.node.image.load();
        for topic in &mut commit.topics {
            let found = image.topics.get(topic.name.as_str());
            let exists =
                |p: i32| found.is_some_and(|t| usize::try_from(p).is_ok_and(|p| p < t.partitions.len()));
            let missing: Vec<i32> =
                topic.partitions.iter().map(|p| p.partition_index).filter(|p| !exists(*p)).collect();
            if !missing.is_empty() {
                topic.partitions.retain(|p| exists(p.partition_index));
                unknown.push((topic.name.clone(), missing));
            }
        }
        commit.topics.retain(|t| !t.partitions.is_empty());
    }
    let retry = commit.clone();
    let mut response = if commit.topics.is_empty() && !unknown.is_empty() {
        OffsetCommitResponse::default()
    } else {
        match ask(request, &group, GroupRequest::OffsetCommit { request: commit, version }).await {
            Ok(GroupResponse::OffsetCommit(response)) => response,
            other => answer_all(&retry, error_of(other)),
        }
    };
    for (name, partitions) in unknown {
        let refused = partitions.into_iter().map(|p| {
            OffsetCommitResponsePartition::default()
                .with_partition_index(p)
                .with_error_code(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION.0)
        });
        match response.topics.iter_mut().find(|t| t.name == name) {
            Some(topic) => topic.partitions.extend(refused),
            None => response.topics.push(
                OffsetCommitResponseTopic::default().with_name(name).with_partitions(refused.collect()),
            ),
        }
    }
    request.answer(&response)
}

/// Offsets set from outside let a paused export go on from them: Kafka's tools for resetting a group are the tools for
/// replaying an export. All partitions or none.
async fn reset_export(
    request: &Request<'_>,
    topic: &str,
    commit: &OffsetCommitRequest,
) -> Result<(), ErrorCode> {
    if !commit.member_id.is_empty() || commit.generation_id_or_member_epoch >= 0 {
        return Err(ErrorCode::UNKNOWN_MEMBER_ID);
    }
    if commit.topics.iter().any(|t| t.name.as_str() != topic) {
        return Err(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
    }
    let positions: Vec<(i32, ResetTo)> = commit
        .topics
        .iter()
        .flat_map(|t| &t.partitions)
        .map(|p| (p.partition_index, ResetTo::Offset(p.committed_offset)))
        .collect();
    let refused = match request.shard.node.exports.reset(topic, positions).await {
        Ok(()) => return Ok(()),
        Err(refused) => refused,
    };
    tracing::warn!(topic, reason = %refused, client = request.client_id(), "offsets of the export were not reset");
    Err(match refused {
        // Kafka's answer to offsets for a group that has members.
        ResetRefused::Reset(ResetError::Running) => ErrorCode::NON_EMPTY_GROUP,
        ResetRefused::Reset(ResetError::OutOfRange { .. }) => ErrorCode::OFFSET_OUT_OF_RANGE,
        ResetRefused::Reset(ResetError::NoPartition(_)) => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        // Clients ask again by themselves.
        ResetRefused::Reset(ResetError::Unsettled(_)) => ErrorCode::COORDINATOR_LOAD_IN_PROGRESS,
        ResetRefused::Reset(ResetError::NotRecorded(_)) => ErrorCode::KAFKA_STORAGE_ERROR,
        ResetRefused::Reset(ResetError::NotStarted) | ResetRefused::NotExported => ErrorCode::INVALID_REQUEST,
        ResetRefused::Stopping => ErrorCode::COORDINATOR_NOT_AVAILABLE,
    })
}

/// Settled offsets of an export, in the shape of committed ones.
fn export_offsets(request: &Request<'_>, group: &OffsetFetchGroup) -> Option<OffsetFetchResult> {
    let (topic, offsets) = request.shard.node.exports.settled_offsets(group.group_id.as_str())?;
    let settled = |p: i32| offsets.iter().find(|(q, _)| *q == p).map_or(-1, |(_, offset)| *offset);
    let partition = |p: i32, offset: i64| OffsetFetchPartition {
        partition: p,
        offset,
        leader_epoch: -1,
        metadata: StrBytes::default(),
        error: ErrorCode::NONE,
    };
    let topics = match &group.topics {
        None => vec![OffsetFetchTopic {
            name: TopicName(StrBytes::from_string(topic)),
            partitions: offsets.iter().map(|(p, offset)| partition(*p, *offset)).collect(),
        }],
        Some(list) => list
            .iter()
            .map(|(name, partitions)| OffsetFetchTopic {
                name: name.clone(),
                partitions: partitions
                    .iter()
                    .map(|p| partition(*p, if name.0.as_str() == topic { settled(*p) } else { -1 }))
                    .collect(),
            })
            .collect(),
    };
    Some(OffsetFetchResult { error: ErrorCode::NONE, topics })
}

async fn fetch_group(request: &Request<'_>, group: OffsetFetchGroup) -> OffsetFetchResult {
    if let Some(settled) = export_offsets(request, &group) {
        return settled;
    }
    let name = group.group_id.to_string();
    match ask(request, &name, GroupRequest::OffsetFetch { group }).await {
        Ok(GroupResponse::OffsetFetch(found)) => found,
        other => OffsetFetchResult { error: error_of(other), topics: Vec::new() },
    }
}

pub async fn offset_fetch(request: &Request<'_>) -> Result<Answer, RequestError> {
    let fetch: OffsetFetchRequest = request.decode()?;
    let version = request.header.api_version;
    let mut response = OffsetFetchResponse::default();
    if version >= 8 {
        for group in fetch.groups {
            let group_id = group.group_id.clone();
            let found = fetch_group(
                request,
                OffsetFetchGroup {
                    group_id: group.group_id.0,
                    member_id: group.member_id,
                    member_epoch: group.member_epoch,
                    topics: group
                        .topics
                        .map(|list| list.into_iter().map(|t| (t.name, t.partition_indexes)).collect()),
                    require_stable: fetch.require_stable,
                },
            )
            .await;
            let topics = found
                .topics
                .into_iter()
                .map(|topic| {
                    let partitions = topic
                        .partitions
                        .into_iter()
                        .map(|p| {
                            OffsetFetchResponsePartitions::default()
                                .with_partition_index(p.partition)
                                .with_committed_offset(p.offset)
                                .with_committed_leader_epoch(p.leader_epoch)
                                .with_metadata(Some(p.metadata))
                                .with_error_code(p.error.0)
                        })
                        .collect();
                    OffsetFetchResponseTopics::default().with_name(topic.name).with_partitions(partitions)
                })
                .collect();
            response.groups.push(
                OffsetFetchResponseGroup::default()
                    .with_group_id(group_id)
                    .with_error_code(found.error.0)
                    .with_topics(topics),
            );
        }
        return request.answer(&response);
    }
    let asked: Option<Vec<(TopicName, Vec<i32>)>> =
        fetch.topics.map(|list| list.into_iter().map(|t| (t.name, t.partition_indexes)).collect());
    let group = OffsetFetchGroup {
        group_id: fetch.group_id.0,
        member_id: None,
        member_epoch: -1,
        topics: asked.clone(),
        require_stable: fetch.require_stable,
    };
    let mut found = fetch_group(request, group).await;
    // Before version 2 an error had no place of its own: it stands at every partition.
    if found.error != ErrorCode::NONE && version < 2 {
        let error = found.error;
        let refused = |partition| OffsetFetchPartition {
            partition,
            offset: -1,
            leader_epoch: -1,
            metadata: StrBytes::default(),
            error,
        };
        found.topics = asked
            .unwrap_or_default()
            .into_iter()
            .map(|(name, ps)| OffsetFetchTopic { name, partitions: ps.into_iter().map(refused).collect() })
            .collect();
    }
    if version >= 2 {
        response.error_code = found.error.0;
    }
    for topic in found.topics {
        let partitions = topic
            .partitions
            .into_iter()
            .map(|p| {
                OffsetFetchResponsePartition::default()
                    .with_partition_index(p.partition)
                    .with_committed_offset(p.offset)
                    .with_committed_leader_epoch(if version >= 5 { p.leader_epoch } else { -1 })
                    .with_metadata(Some(p.metadata))
                    .with_error_code(p.error.0)
            })
            .collect();
        response
            .topics
            .push(OffsetFetchResponseTopic::default().with_name(topic.name).with_partitions(partitions));
    }
    request.answer(&response)
}

pub async fn offset_delete(request: &Request<'_>) -> Result<Answer, RequestError> {
    let mut delete: OffsetDeleteRequest = request.decode()?;
    let group = delete.group_id.0.to_string();
    if is_export(request, &group) {
        let refused =
            OffsetDeleteResponse::default().with_error_code(ErrorCode::GROUP_AUTHORIZATION_FAILED.0);
        return request.answer(&refused);
    }
    // Partitions that do not exist are refused here: the coordinator does not know topics.
    let mut unknown = Vec::new();
    {
        let image = request.shard.node.image.load();
        for topic in &mut delete.topics {
            let found = image.topics.get(topic.name.as_str());
            let exists =
                |p: i32| found.is_some_and(|t| usize::try_from(p).is_ok_and(|p| p < t.partitions.len()));
            let missing: Vec<i32> =
                topic.partitions.iter().map(|p| p.partition_index).filter(|p| !exists(*p)).collect();
            topic.partitions.retain(|p| exists(p.partition_index));
            if !missing.is_empty() {
                unknown.push((topic.name.clone(), missing));
            }
        }
        delete.topics.retain(|topic| !topic.partitions.is_empty());
    }
    let mut response = match ask(request, &group, GroupRequest::OffsetDelete { request: delete }).await {
        Ok(GroupResponse::OffsetDelete(response)) => response,
        other => OffsetDeleteResponse::default().with_error_code(error_of(other).0),
    };
    if response.error_code != 0 {
        return request.answer(&response);
    }
    for (name, partitions) in unknown {
        let refused = partitions.into_iter().map(|p| {
            OffsetDeleteResponsePartition::default()
                .with_partition_index(p)
                .with_error_code(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION.0)
        });
        match response.topics.iter_mut().find(|t| t.name == name) {
            Some(topic) => topic.partitions.extend(refused),
            None => response.topics.push(
                OffsetDeleteResponseTopic::default().with_name(name).with_partitions(refused.collect()),
            ),
        }
    }
    request.answer(&response)
}

pub async fn list(request: &Request<'_>) -> Result<Answer, RequestError> {
    let list: ListGroupsRequest = request.decode()?;
    let (states, types) = (list.states_filter, list.types_filter);
    let mut response = ListGroupsResponse::default();
    for group_id in offsets_partitions(request.shard) {
        let question = GroupRequest::List { states_filter: states.clone(), types_filter: types.clone() };
        match ask_partition(request.shard, group_id, String::new(), String::new(), question).await {
            Ok(GroupResponse::List(groups)) => response.groups.extend(groups),
            other => response.error_code = error_of(other).0,
        }
    }
    for group in request.shard.node.exports.listed_groups() {
        let fits = |filter: &[StrBytes], value: &str| {
            filter.is_empty() || filter.iter().any(|f| f.eq_ignore_ascii_case(value))
        };
        if fits(&states, &group.group_state) && fits(&types, "classic") {
            response.groups.push(group);
        }
    }
    request.answer(&response)
}

pub async fn describe(request: &Request<'_>) -> Result<Answer, RequestError> {
    let describe: DescribeGroupsRequest = request.decode()?;
    let mut response = DescribeGroupsResponse::default();
    for group in describe.groups {
        let own = {
            let image = request.shard.node.image.load();
            request.shard.node.exports.described_group(group.0.as_str(), &image)
        };
        if let Some(described) = own {
            response.groups.push(described);
            continue;
        }
        let name = group.0.to_string();
        let question =
            GroupRequest::Describe { group_id: group.0.clone(), version: request.header.api_version };
        let described = match ask(request, &name, question).await {
            Ok(GroupResponse::Describe(described)) => described,
            other => DescribedGroup::default().with_group_id(group).with_error_code(error_of(other).0),
        };
        response.groups.push(described);
    }
    if describe.include_authorized_operations {
        for group in response.groups.iter_mut().filter(|group| group.error_code == 0) {
            group.authorized_operations = GROUP_OPERATIONS;
        }
    }
    request.answer(&response)
}

pub async fn delete(request: &Request<'_>) -> Result<Answer, RequestError> {
    let delete: DeleteGroupsRequest = request.decode()?;
    let mut response = DeleteGroupsResponse::default();
    for group in delete.groups_names {
        let name = group.0.to_string();
        let error = if is_export(request, &name) {
            // An export is ended by turning it off, not by deleting the group that shows it.
            ErrorCode::NON_EMPTY_GROUP
        } else {
            match ask(request, &name, GroupRequest::Delete { group_id: group.0.clone() }).await {
                Ok(GroupResponse::Delete(error)) => error,
                other => error_of(other),
            }
        };
        response.results.push(DeletableGroupResult::default().with_group_id(group).with_error_code(error.0));
    }
    request.answer(&response)
}

fn is_export(request: &Request<'_>, group: &str) -> bool {
    request.shard.node.exports.topic_of(group).is_some()
}

fn offsets_partitions(shard: &Rc<Shard>) -> Vec<u64> {
    let image = shard.node.image.load();
    image
        .topics
        .get(OFFSETS_TOPIC)
        .map_or_else(Vec::new, |t| t.partitions.iter().map(|p| p.group_id).collect())
}

/// The code of an answer that is not the one asked for.
fn error_of(outcome: Result<GroupResponse, ErrorCode>) -> ErrorCode {
    match outcome {
        Err(error) => error,
        Ok(_) => ErrorCode::UNKNOWN_SERVER_ERROR,
    }
}
