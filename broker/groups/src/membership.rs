//! JoinGroup, SyncGroup, Heartbeat and LeaveGroup.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bytes::Bytes;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::leave_group_response::MemberResponse;
use kafka_protocol::messages::{
    HeartbeatRequest, HeartbeatResponse, JoinGroupRequest, LeaveGroupRequest, LeaveGroupResponse,
    SyncGroupRequest,
};
use kafka_protocol::protocol::StrBytes;

use crate::coordinator::Coordinator;
use crate::group::{AppendKind, Ctx, Group, Member, Reply, StaticReplacement, WaitingJoin};
use crate::rebalance::{join_error, sync_error};
use crate::types::{
    Client, GroupResponse, GroupState, MAX_GROUPS, MAX_INSTANCE_ID_BYTES, MAX_MEMBER_ID_PREFIX_BYTES,
    MAX_MEMBERS_PER_LEAVE, MAX_PENDING_MEMBERS, MAX_PROTOCOLS_PER_MEMBER, MAX_STRING_BYTES,
    PROTOCOL_NAMED_MIN_VERSION, own_bytes, own_str,
};

/// A JoinGroup after its shape was checked, owning what the group will keep.
struct Joining<'a> {
    token: u64,
    version: i16,
    client: Client<'a>,
    member_id: StrBytes,
    instance_id: Option<String>,
    protocol_type: StrBytes,
    protocols: Vec<(String, Bytes)>,
    session_timeout_ms: i32,
    rebalance_timeout_ms: i32,
    fresh_id: u128,
}

impl Coordinator {
    pub(crate) fn join(
        &mut self,
        token: u64,
        client: Client<'_>,
        request: JoinGroupRequest,
        version: i16,
        fresh_id: u128,
    ) {
        let group_id = request.group_id.0.clone();
        let member_id = request.member_id.clone();
        if let Err(error) = self.check_join(&request) {
            return self.ctx.reply(token, join_error(error, &member_id, version));
        }
        let is_unknown = member_id.is_empty();
        if !self.groups.contains_key(&*group_id) {
            let error = if !is_unknown {
                Some(ErrorCode::UNKNOWN_MEMBER_ID)
            } else if self.groups.len() >= MAX_GROUPS {
                Some(ErrorCode::COORDINATOR_NOT_AVAILABLE)
            } else {
                None
            };
            if let Some(error) = error {
                return self.ctx.reply(token, join_error(error, &member_id, version));
            }
            let group = Group::new(&group_id, self.ctx.now.wall_ms);
            self.groups.insert(group.id.clone(), group);
        }
        if let Some(group) = self.groups.get_mut(&*group_id) {
            let joining = Joining {
                token,
                version,
                client,
                member_id,
                instance_id: request.group_instance_id.as_deref().map(str::to_owned),
                protocol_type: request.protocol_type,
                protocols: request
                    .protocols
                    .iter()
                    .map(|protocol| (protocol.name.to_string(), own_bytes(&protocol.metadata)))
                    .collect(),
                session_timeout_ms: request.session_timeout_ms,
                // Version 0 has one timeout for both.
                rebalance_timeout_ms: if request.rebalance_timeout_ms < 0 {
                    request.session_timeout_ms
                } else {
                    request.rebalance_timeout_ms
                },
                fresh_id,
            };
            join_group(group, &mut self.ctx, joining);
        }
        self.drop_if_vacant(&group_id);
    }

    fn check_join(&self, request: &JoinGroupRequest) -> Result<(), ErrorCode> {
        let config = &self.ctx.config;
        if request.group_id.is_empty() || request.group_id.len() > MAX_STRING_BYTES {
            return Err(ErrorCode::INVALID_GROUP_ID);
        }
        let timeouts = config.session_timeout_min_ms..=config.session_timeout_max_ms;
        if !timeouts.contains(&request.session_timeout_ms) {
            return Err(ErrorCode::INVALID_SESSION_TIMEOUT);
        }
        if request
            .group_instance_id
            .as_ref()
            .is_some_and(|id| id.is_empty() || id.len() > MAX_INSTANCE_ID_BYTES)
        {
            return Err(ErrorCode::INVALID_REQUEST);
        }
        let names = request.protocols.iter().map(|protocol| &protocol.name).chain([&request.protocol_type]);
        if request.protocols.len() > MAX_PROTOCOLS_PER_MEMBER
            || names.into_iter().any(|name| name.len() > MAX_STRING_BYTES)
        {
            return Err(ErrorCode::INCONSISTENT_GROUP_PROTOCOL);
        }
        Ok(())
    }

    pub(crate) fn sync(&mut self, token: u64, request: SyncGroupRequest, version: i16) {
        let named = request.protocol_type.is_some() && request.protocol_name.is_some();
        if version >= PROTOCOL_NAMED_MIN_VERSION && !named {
            return self.ctx.reply(token, sync_error(ErrorCode::INCONSISTENT_GROUP_PROTOCOL));
        }
        if request.group_id.is_empty() {
            return self.ctx.reply(token, sync_error(ErrorCode::INVALID_GROUP_ID));
        }
        let Some(group) = self.groups.get_mut(&**request.group_id) else {
            return self.ctx.reply(token, sync_error(ErrorCode::UNKNOWN_MEMBER_ID));
        };
        if let Err(error) = sync_group(group, &mut self.ctx, token, request) {
            self.ctx.reply(token, sync_error(error));
        }
    }

    pub(crate) fn heartbeat(&mut self, token: u64, request: HeartbeatRequest) {
        let error = self.heartbeat_error(&request).err().unwrap_or_default();
        let response = HeartbeatResponse::default().with_error_code(error.0);
        self.ctx.reply(token, GroupResponse::Heartbeat(response));
    }

    fn heartbeat_error(&mut self, request: &HeartbeatRequest) -> Result<(), ErrorCode> {
        if request.group_id.is_empty() {
            return Err(ErrorCode::INVALID_GROUP_ID);
        }
        let group = self.groups.get_mut(&**request.group_id).ok_or(ErrorCode::UNKNOWN_MEMBER_ID)?;
        check_member(
            group,
            &request.member_id,
            request.group_instance_id.as_deref(),
            Some(request.generation_id),
        )?;
        match group.state {
            GroupState::Empty | GroupState::Dead => Err(ErrorCode::UNKNOWN_MEMBER_ID),
            GroupState::PreparingRebalance => {
                group.extend_session(&mut self.ctx, &request.member_id);
                Err(ErrorCode::REBALANCE_IN_PROGRESS)
            }
            // Heartbeats may start before the leader's assignment is there.
            GroupState::CompletingRebalance | GroupState::Stable => {
                group.extend_session(&mut self.ctx, &request.member_id);
                Ok(())
            }
        }
    }

    pub(crate) fn leave(&mut self, token: u64, request: LeaveGroupRequest, version: i16) {
        let leaving: Vec<(StrBytes, Option<StrBytes>)> = if version <= 2 {
            vec![(request.member_id, None)]
        } else {
            request.members.into_iter().map(|member| (member.member_id, member.group_instance_id)).collect()
        };
        let group_error = if request.group_id.is_empty() {
            ErrorCode::INVALID_GROUP_ID
        } else if leaving.len() > MAX_MEMBERS_PER_LEAVE {
            ErrorCode::INVALID_REQUEST
        } else if self.groups.get(&**request.group_id).is_some_and(|group| group.state == GroupState::Dead) {
            ErrorCode::COORDINATOR_NOT_AVAILABLE
        } else {
            ErrorCode::NONE
        };
        if !group_error.is_none() {
            let response = LeaveGroupResponse::default().with_error_code(group_error.0);
            return self.ctx.reply(token, GroupResponse::Leave(response));
        }
        let mut members = Vec::with_capacity(leaving.len());
        let mut emptied = None;
        match self.groups.get_mut(&**request.group_id) {
            None => members.extend(leaving.into_iter().map(|(member_id, instance_id)| {
                leave_result(&member_id, instance_id.as_deref(), ErrorCode::UNKNOWN_MEMBER_ID)
            })),
            Some(group) => {
                let mut removed = false;
                for (member_id, instance_id) in leaving {
                    let result = leave_one(group, &mut self.ctx, &member_id, instance_id.as_deref());
                    removed |= result.is_ok();
                    let error = result.err().unwrap_or_default();
                    members.push(leave_result(&member_id, instance_id.as_deref(), error));
                }
                if removed {
                    emptied = group.after_removal(&mut self.ctx);
                }
            }
        }
        let response = if version <= 2 {
            let error_code = members.first().map_or(0, |member| member.error_code);
            LeaveGroupResponse::default().with_error_code(error_code)
        } else {
            LeaveGroupResponse::default().with_members(members)
        };
        let response = GroupResponse::Leave(response);
        // The last one to leave waits until the empty group is in the log.
        let waits = emptied.and_then(|append_id| self.ctx.appends.get_mut(&append_id));
        if let Some(append) = waits
            && let AppendKind::Emptied { reply, .. } = &mut append.kind
        {
            *reply = Some(Reply { token, response });
        } else {
            self.ctx.reply(token, response);
        }
        self.drop_if_vacant(&request.group_id);
    }
}

/// Member, instance and generation of a request against the group.
pub(crate) fn check_member(
    group: &Group,
    member_id: &str,
    instance_id: Option<&str>,
    generation: Option<i32>,
) -> Result<(), ErrorCode> {
    if group.state == GroupState::Dead {
        return Err(ErrorCode::COORDINATOR_NOT_AVAILABLE);
    }
    match instance_id {
        None if !group.members.contains_key(member_id) => return Err(ErrorCode::UNKNOWN_MEMBER_ID),
        None => {}
        Some(instance_id) => match group.static_members.get(instance_id) {
            None => return Err(ErrorCode::UNKNOWN_MEMBER_ID),
            Some(known) if known != member_id => return Err(ErrorCode::FENCED_INSTANCE_ID),
            Some(_) => {}
        },
    }
    match generation {
        Some(generation) if generation != group.generation => Err(ErrorCode::ILLEGAL_GENERATION),
        _ => Ok(()),
    }
}

fn has_room(group: &Group, ctx: &Ctx, member_id: &str) -> bool {
    let members_max = ctx.config.group_members_max;
    match group.state {
        GroupState::Empty | GroupState::Dead => true,
        // Counting those that wait lets a group above a lowered limit shed its last ones.
        GroupState::PreparingRebalance => {
            group.members.get(member_id).is_some_and(|member| member.waiting_join.is_some())
                || group.waiting_joins < members_max
        }
        GroupState::CompletingRebalance | GroupState::Stable => {
            group.members.contains_key(member_id) || group.members.len() < members_max
        }
    }
}

fn join_group(group: &mut Group, ctx: &mut Ctx, joining: Joining<'_>) {
    let (token, version, member_id) = (joining.token, joining.version, joining.member_id.clone());
    if !has_room(group, ctx, &member_id) {
        group.expel(ctx, &member_id, ErrorCode::GROUP_MAX_SIZE_REACHED);
        ctx.reply(token, join_error(ErrorCode::GROUP_MAX_SIZE_REACHED, "", version));
        group.maybe_complete_join(ctx);
        return;
    }
    let result = if group.state == GroupState::Dead {
        Err(ErrorCode::COORDINATOR_NOT_AVAILABLE)
    } else if !group.supports(&joining.protocol_type, &joining.protocols) {
        Err(ErrorCode::INCONSISTENT_GROUP_PROTOCOL)
    } else if member_id.is_empty() {
        join_new(group, ctx, joining)
    } else {
        join_known(group, ctx, joining)
    };
    if let Err(error) = result {
        ctx.reply(token, join_error(error, &member_id, version));
    }
}

fn join_new(group: &mut Group, ctx: &mut Ctx, joining: Joining<'_>) -> Result<(), ErrorCode> {
    let new_id = new_member_id(group, &joining);
    if let Some(instance_id) = &joining.instance_id {
        if let Some(old_id) = group.static_members.get(instance_id).cloned() {
            replace_static_member(group, ctx, joining, old_id, new_id);
        } else {
            add_member(group, ctx, joining, new_id);
        }
        return Ok(());
    }
    if joining.version < 4 {
        add_member(group, ctx, joining, new_id);
        return Ok(());
    }
    // The client must come back with its id, so that a retried first join leaves no ghost member behind.
    if group.pending_members.len() >= MAX_PENDING_MEMBERS {
        return Err(ErrorCode::GROUP_MAX_SIZE_REACHED);
    }
    let deadline_ms = ctx.after(joining.session_timeout_ms.into());
    ctx.reply(joining.token, join_error(ErrorCode::MEMBER_ID_REQUIRED, &new_id, joining.version));
    group.pending_members.insert(new_id, deadline_ms);
    ctx.wake_by(group, deadline_ms);
    Ok(())
}

fn join_known(group: &mut Group, ctx: &mut Ctx, joining: Joining<'_>) -> Result<(), ErrorCode> {
    let member_id = joining.member_id.clone();
    if group.pending_members.contains_key(&*member_id) {
        if joining.instance_id.is_some() {
            return Err(ErrorCode::UNKNOWN_MEMBER_ID);
        }
        let member_id = member_id.to_string();
        add_member(group, ctx, joining, member_id);
        return Ok(());
    }
    check_member(group, &member_id, joining.instance_id.as_deref(), None)?;
    let Some(member) = group.members.get(&*member_id) else { return Err(ErrorCode::UNKNOWN_MEMBER_ID) };
    let same_metadata = member.protocols == joining.protocols;
    // A response that got lost is given again; anything else asks for a rebalance.
    let repeat = match group.state {
        GroupState::PreparingRebalance => false,
        GroupState::CompletingRebalance => same_metadata,
        GroupState::Stable => same_metadata && !group.is_leader(&member_id),
        GroupState::Empty | GroupState::Dead => return Err(ErrorCode::UNKNOWN_MEMBER_ID),
    };
    if repeat {
        let response = group.current_generation(&member_id, joining.version, false);
        ctx.reply(joining.token, GroupResponse::Join(response));
        return Ok(());
    }
    group.update(&member_id, joining.protocols, joining.rebalance_timeout_ms, joining.session_timeout_ms);
    group.wait_join(ctx, &member_id, WaitingJoin { token: joining.token, version: joining.version });
    group.rebalance_or_complete_join(ctx);
    Ok(())
}

fn new_member_id(group: &Group, joining: &Joining<'_>) -> String {
    let prefix = joining.instance_id.as_deref().unwrap_or(joining.client.client_id);
    let mut end = prefix.len().min(MAX_MEMBER_ID_PREFIX_BYTES);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    let mut unique = joining.fresh_id;
    loop {
        let mut id = prefix[..end].to_owned();
        let hex = format!("{unique:032x}");
        for (from, to) in [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)] {
            let _ = write!(id, "-{}", &hex[from..to]);
        }
        if !group.members.contains_key(&id) && !group.pending_members.contains_key(&id) {
            return id;
        }
        // The caller's randomness repeats itself; ends because members are bounded.
        unique = unique.wrapping_add(1);
    }
}

fn add_member(group: &mut Group, ctx: &mut Ctx, joining: Joining<'_>, member_id: String) {
    if group.state == GroupState::PreparingRebalance && group.prepared_from_empty {
        group.new_member_added = true;
    }
    let member = Member {
        seq: 0,
        instance_id: joining.instance_id,
        client_id: bounded(joining.client.client_id),
        client_host: bounded(joining.client.client_host),
        rebalance_timeout_ms: joining.rebalance_timeout_ms,
        session_timeout_ms: joining.session_timeout_ms,
        protocols: joining.protocols,
        assignment: Bytes::new(),
        is_new: true,
        waiting_join: Some(WaitingJoin { token: joining.token, version: joining.version }),
        waiting_sync: None,
        deadline_ms: Group::new_member_deadline_ms(ctx),
    };
    let deadline_ms = member.deadline_ms;
    group.add(member_id, member, &joining.protocol_type);
    ctx.wake_by(group, deadline_ms);
    group.rebalance_or_complete_join(ctx);
}

/// Names of the client that do not fit a record are cut: they are shown, not compared.
fn bounded(text: &str) -> String {
    let mut end = text.len().min(MAX_STRING_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn replace_static_member(
    group: &mut Group,
    ctx: &mut Ctx,
    joining: Joining<'_>,
    old_id: String,
    new_id: String,
) {
    let Some(instance_id) = joining.instance_id else { return };
    let old_leader = group.leader_or_empty().to_owned();
    group.replace_static(ctx, &instance_id, &old_id, &new_id);
    let Some(member) = group.members.get(&new_id) else { return };
    let replacement = StaticReplacement {
        generation: group.generation,
        token: joining.token,
        version: joining.version,
        old_member_id: old_id,
        new_member_id: new_id.clone(),
        old_protocols: member.protocols.clone(),
        old_rebalance_timeout_ms: member.rebalance_timeout_ms,
        old_session_timeout_ms: member.session_timeout_ms,
        old_leader,
    };
    group.update(&new_id, joining.protocols, joining.rebalance_timeout_ms, joining.session_timeout_ms);
    group.extend_session(ctx, &new_id);
    group.wait_join(ctx, &new_id, WaitingJoin { token: joining.token, version: joining.version });
    match group.state {
        GroupState::Stable if group.select_protocol() == group.protocol_name => {
            // Same assignment under a new id: no rebalance, only the record must know it.
            let records = vec![group.metadata_record(None)];
            ctx.append(group, records, AppendKind::StaticReplacement(Box::new(replacement)));
        }
        // While completing, the leader may already be assigning to the old id: only a new round is safe.
        GroupState::Stable | GroupState::CompletingRebalance => {
            group.prepare_rebalance(ctx);
        }
        GroupState::PreparingRebalance | GroupState::Empty | GroupState::Dead => {
            group.maybe_complete_join(ctx);
        }
    }
}

fn sync_group(
    group: &mut Group,
    ctx: &mut Ctx,
    token: u64,
    request: SyncGroupRequest,
) -> Result<(), ErrorCode> {
    let member_id = &*request.member_id;
    check_member(group, member_id, request.group_instance_id.as_deref(), Some(request.generation_id))?;
    let differs = |asked: &Option<StrBytes>, known: &Option<String>| {
        asked.as_deref().is_some_and(|asked| Some(asked) != known.as_deref())
    };
    if differs(&request.protocol_type, &group.protocol_type)
        || differs(&request.protocol_name, &group.protocol_name)
    {
        return Err(ErrorCode::INCONSISTENT_GROUP_PROTOCOL);
    }
    match group.state {
        GroupState::Empty | GroupState::Dead => return Err(ErrorCode::UNKNOWN_MEMBER_ID),
        GroupState::PreparingRebalance => return Err(ErrorCode::REBALANCE_IN_PROGRESS),
        GroupState::CompletingRebalance | GroupState::Stable => {}
    }
    group.pending_sync.remove(member_id);
    if group.pending_sync.is_empty() {
        group.sync_deadline_ms = crate::group::NEVER;
    }
    if group.state == GroupState::Stable {
        let response = group.sync_response(member_id);
        ctx.reply(token, response);
        return Ok(());
    }
    if let Some(member) = group.members.get_mut(member_id)
        && let Some(earlier) = member.waiting_sync.replace(token)
    {
        ctx.reply(earlier, sync_error(ErrorCode::REBALANCE_IN_PROGRESS));
    }
    // A leader that repeats itself waits for the append of its first assignment.
    if group.is_leader(member_id) && group.assignment_append.is_none() {
        let mut assignments: BTreeMap<String, Bytes> =
            group.members.keys().map(|id| (id.clone(), Bytes::new())).collect();
        for assigned in &request.assignments {
            if let Some(assignment) = assignments.get_mut(&*assigned.member_id) {
                *assignment = own_bytes(&assigned.assignment);
            }
        }
        let records = vec![group.metadata_record(Some(&assignments))];
        let kind = AppendKind::Assignment { generation: group.generation, assignments };
        group.assignment_append = Some(ctx.append(group, records, kind));
    }
    Ok(())
}

fn leave_one(
    group: &mut Group,
    ctx: &mut Ctx,
    member_id: &str,
    instance_id: Option<&str>,
) -> Result<(), ErrorCode> {
    // Admin tools remove static members by their instance alone.
    if member_id.is_empty() {
        let known = instance_id.and_then(|id| group.static_members.get(id)).cloned();
        let known = known.ok_or(ErrorCode::UNKNOWN_MEMBER_ID)?;
        group.expel(ctx, &known, ErrorCode::UNKNOWN_MEMBER_ID);
        return Ok(());
    }
    if group.pending_members.remove(member_id).is_some() {
        return Ok(());
    }
    check_member(group, member_id, instance_id, None)?;
    group.expel(ctx, member_id, ErrorCode::UNKNOWN_MEMBER_ID);
    Ok(())
}

fn leave_result(member_id: &str, instance_id: Option<&str>, error: ErrorCode) -> MemberResponse {
    MemberResponse::default()
        .with_member_id(own_str(member_id))
        .with_group_instance_id(instance_id.map(own_str))
        .with_error_code(error.0)
}
