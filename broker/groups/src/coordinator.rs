//! The coordinator of one `__consumer_offsets` partition: its groups, what is being appended, and time.
//!
//! Loading replays the partition's records in order; after that every change goes through an append. Successes
//! must reach `append_done` in the order of append ids, as a log completes them; failures may overtake.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flumen_protocol::error_code::ErrorCode;

use crate::group::Reply;
use crate::group::{AppendKind, Committed, Ctx, Group, Member, NEVER, PendingAppend, StaticReplacement};
use crate::rebalance::join_error;
use crate::record::{GroupMetadataValue, OffsetCommitValue, RecordKey};
use crate::transactions::{apply_offset, hold_offset};
use crate::types::{
    Client, GroupRequest, GroupResponse, GroupState, GroupSummary, GroupsConfig, Now,
    OFFSETS_RETENTION_CHECK_INTERVAL_MS, Output, own_str,
};

pub struct Coordinator {
    pub(crate) groups: BTreeMap<Arc<str>, Group>,
    pub(crate) ctx: Ctx,
    /// NEVER until the first call that tells the time.
    next_expiration_ms: i64,
}

impl Coordinator {
    pub fn new(config: GroupsConfig) -> Self {
        let ctx = Ctx {
            config,
            now: Now::from(0),
            out: Vec::new(),
            appends: BTreeMap::new(),
            next_append_id: 1,
            open_transactions: BTreeMap::new(),
            wakes: BTreeSet::new(),
        };
        Coordinator { groups: BTreeMap::new(), ctx, next_expiration_ms: NEVER }
    }

    // Loading.

    /// Replays one record. What cannot be read, or is kept for other coordinators, is skipped: one bad record
    /// must not take the groups of a whole partition away.
    pub fn load(&mut self, key: Option<&[u8]>, value: Option<&[u8]>, record_timestamp_ms: i64) {
        let Some(Ok(key)) = key.map(RecordKey::decode) else { return };
        match key {
            RecordKey::Offset { group, topic, partition } => match value {
                None => {
                    if let Some(group) = self.groups.get_mut(group.as_str()) {
                        remove_offset(group, &topic, partition);
                    }
                }
                Some(value) => {
                    if let Ok(value) = OffsetCommitValue::decode(value) {
                        let committed = Committed::new(value, self.next_seq());
                        let group = self.loaded_group(&group, record_timestamp_ms);
                        group.offsets.entry(topic).or_default().insert(partition, committed);
                    }
                }
            },
            RecordKey::Group { group } => match value {
                None => {
                    if let Some(group) = self.groups.get_mut(group.as_str()) {
                        let fresh = Group::new(&group.id.clone(), record_timestamp_ms);
                        replace_metadata(group, fresh);
                    }
                }
                Some(value) => {
                    if let Ok(value) = GroupMetadataValue::decode(value) {
                        let group = self.loaded_group(&group, record_timestamp_ms);
                        restore(group, value);
                    }
                }
            },
            RecordKey::Other { .. } => {}
        }
    }

    pub(crate) fn next_seq(&mut self) -> u64 {
        let seq = self.ctx.next_append_id;
        self.ctx.next_append_id += 1;
        seq
    }

    pub(crate) fn loaded_group(&mut self, group_id: &str, now_ms: i64) -> &mut Group {
        if !self.groups.contains_key(group_id) {
            let group = Group::new(group_id, now_ms);
            self.groups.insert(group.id.clone(), group);
        }
        self.groups.get_mut(group_id).expect("inserted above")
    }

    /// Members get a fresh session: nobody could hear their heartbeats in the meantime.
    pub fn finish_load(&mut self, now: impl Into<Now>) {
        self.set_now(now.into());
        self.groups.retain(|_, group| !group.is_vacant());
        for group in self.groups.values_mut() {
            group.compute_subscribed();
            let ids: Vec<String> = group.members.keys().cloned().collect();
            for member_id in ids {
                group.extend_session(&mut self.ctx, &member_id);
            }
            if group.state == GroupState::Stable && group.members.len() > self.ctx.config.group_members_max {
                group.prepare_rebalance(&mut self.ctx);
            }
        }
    }

    // Requests, appends, time.

    /// `fresh_id` is randomness of the caller, used when the request makes a member id.
    pub fn handle(
        &mut self,
        token: u64,
        client: Client<'_>,
        request: GroupRequest,
        fresh_id: u128,
        now: impl Into<Now>,
    ) -> Vec<Output> {
        self.set_now(now.into());
        match request {
            GroupRequest::Join { request, version } => self.join(token, client, request, version, fresh_id),
            GroupRequest::Sync { request, version } => self.sync(token, request, version),
            GroupRequest::Heartbeat { request, .. } => self.heartbeat(token, request),
            GroupRequest::Leave { request, version } => self.leave(token, request, version),
            GroupRequest::OffsetCommit { request, version } => self.offset_commit(token, request, version),
            GroupRequest::OffsetFetch { group } => self.offset_fetch(token, group),
            GroupRequest::OffsetDelete { request } => self.offset_delete(token, request),
            GroupRequest::Describe { group_id, version } => self.describe(token, &group_id, version),
            GroupRequest::List { states_filter, types_filter } => {
                self.list(token, &states_filter, &types_filter)
            }
            GroupRequest::Delete { group_id } => self.delete_group(token, &group_id),
        }
        self.take_outputs()
    }

    pub fn append_done(
        &mut self,
        append_id: u64,
        result: Result<(), ErrorCode>,
        now: impl Into<Now>,
    ) -> Vec<Output> {
        self.set_now(now.into());
        let Some(append) = self.ctx.appends.remove(&append_id) else { return Vec::new() };
        let group_id = append.group.clone();
        if let Some(group) = self.groups.get_mut(&group_id) {
            group.appends_in_flight -= 1;
            finish_append(group, &mut self.ctx, append_id, append, result);
            if group.state == GroupState::Dead && group.appends_in_flight == 0 {
                settle_deletion(group);
            }
        }
        self.drop_if_vacant(&group_id);
        self.take_outputs()
    }

    /// By the steady clock.
    pub fn next_deadline_ms(&self) -> Option<i64> {
        let wake = self.ctx.wakes.first().map_or(NEVER, |(at_ms, _)| *at_ms);
        let next_ms = wake.min(self.next_expiration_ms);
        (next_ms != NEVER).then_some(next_ms)
    }

    pub fn tick(&mut self, now: impl Into<Now>) -> Vec<Output> {
        self.set_now(now.into());
        let now_ms = self.ctx.now.steady_ms;
        // Each group once: what becomes due again right now waits for the next call.
        let mut due = Vec::new();
        while let Some((at_ms, _)) = self.ctx.wakes.first()
            && *at_ms <= now_ms
            && let Some((_, group_id)) = self.ctx.wakes.pop_first()
        {
            due.push(group_id);
        }
        for group_id in due {
            if let Some(group) = self.groups.get_mut(&group_id) {
                group.wake_at_ms = NEVER;
                group.on_wake(&mut self.ctx);
            }
            self.drop_if_vacant(&group_id);
        }
        if now_ms >= self.next_expiration_ms {
            self.next_expiration_ms = self.ctx.after(OFFSETS_RETENTION_CHECK_INTERVAL_MS);
            self.expire_offsets();
        }
        self.take_outputs()
    }

    pub(crate) fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.ctx.out)
    }

    pub(crate) fn set_now(&mut self, now: Now) {
        self.ctx.now = now;
        if self.next_expiration_ms == NEVER {
            self.next_expiration_ms = self.ctx.after(OFFSETS_RETENTION_CHECK_INTERVAL_MS);
        }
    }

    pub(crate) fn drop_if_vacant(&mut self, group_id: &str) {
        if let Some(group) = self.groups.get_mut(group_id)
            && group.is_vacant()
        {
            self.ctx.unschedule(group);
            self.groups.remove(group_id);
        }
    }

    /// Panics where the groups contradict themselves; for tests and for debugging a running broker.
    pub fn assert_consistent(&self) {
        for group in self.groups.values() {
            group.assert_consistent(&self.ctx);
        }
        let in_flight: usize = self.groups.values().map(|group| group.appends_in_flight).sum();
        assert_eq!(in_flight, self.ctx.appends.len(), "every append belongs to a group");
        for (at_ms, group_id) in &self.ctx.wakes {
            assert_eq!(
                self.groups.get(group_id).map(|group| group.wake_at_ms),
                Some(*at_ms),
                "stale wake-up"
            );
        }
    }

    // Views.

    /// Every committed offset: group, topic, partition, offset.
    pub fn lag_view(&self) -> impl Iterator<Item = (&str, &str, i32, i64)> {
        self.groups.values().flat_map(|group| {
            group.offsets.iter().flat_map(move |(topic, partitions)| {
                partitions.iter().map(move |(partition, committed)| {
                    (&*group.id, topic.as_str(), *partition, committed.offset)
                })
            })
        })
    }

    pub fn group_states(&self) -> impl Iterator<Item = GroupSummary<'_>> {
        self.groups.values().map(|group| GroupSummary {
            group_id: &group.id,
            state: group.state,
            protocol_type: group.protocol_type.as_deref().unwrap_or(""),
            members: group.members.len(),
        })
    }
}

fn restore(group: &mut Group, value: GroupMetadataValue) {
    let mut restored = Group::new(&group.id.clone(), value.current_state_timestamp_ms);
    restored.persisted = true;
    let protocol = value.protocol.clone().unwrap_or_default();
    for member in value.members {
        restored.add(
            member.member_id,
            Member {
                seq: 0,
                instance_id: member.group_instance_id,
                client_id: member.client_id,
                client_host: member.client_host,
                rebalance_timeout_ms: member.rebalance_timeout_ms,
                session_timeout_ms: member.session_timeout_ms,
                protocols: vec![(protocol.clone(), member.subscription)],
                assignment: member.assignment,
                is_new: false,
                waiting_join: None,
                waiting_sync: None,
                deadline_ms: NEVER,
            },
            &value.protocol_type,
        );
    }
    restored.generation = value.generation;
    restored.protocol_type = (!value.protocol_type.is_empty()).then_some(value.protocol_type);
    restored.protocol_name = value.protocol;
    if restored.members.is_empty() {
        restored.leader = None;
    } else {
        restored.state = GroupState::Stable;
        // A leader the members do not contain would never sync; the first one took its place above.
        restored.leader = value.leader.filter(|id| restored.members.contains_key(id)).or(restored.leader);
    }
    replace_metadata(group, restored);
}

/// Offsets have records of their own and stay.
fn replace_metadata(group: &mut Group, fresh: Group) {
    let old = std::mem::replace(group, fresh);
    group.offsets = old.offsets;
    group.txn_offsets = old.txn_offsets;
}

pub(crate) fn remove_offset(group: &mut Group, topic: &str, partition: i32) {
    if let Some(partitions) = group.offsets.get_mut(topic) {
        partitions.remove(&partition);
        if partitions.is_empty() {
            group.offsets.remove(topic);
        }
    }
    group.txn_offsets.retain(|_, offsets| {
        offsets.retain(|(name, index), _| name != topic || *index != partition);
        !offsets.is_empty()
    });
}

/// What the client hears when the group's record could not be appended.
pub(crate) fn append_error(error: ErrorCode) -> ErrorCode {
    match error {
        ErrorCode::UNKNOWN_TOPIC_OR_PARTITION
        | ErrorCode::NOT_ENOUGH_REPLICAS
        | ErrorCode::NOT_ENOUGH_REPLICAS_AFTER_APPEND
        | ErrorCode::REQUEST_TIMED_OUT => ErrorCode::COORDINATOR_NOT_AVAILABLE,
        ErrorCode::NOT_LEADER_OR_FOLLOWER | ErrorCode::KAFKA_STORAGE_ERROR => ErrorCode::NOT_COORDINATOR,
        ErrorCode::MESSAGE_TOO_LARGE | ErrorCode::RECORD_LIST_TOO_LARGE | ErrorCode::INVALID_FETCH_SIZE => {
            ErrorCode::UNKNOWN_SERVER_ERROR
        }
        other => other,
    }
}

fn finish_append(
    group: &mut Group,
    ctx: &mut Ctx,
    append_id: u64,
    append: PendingAppend,
    result: Result<(), ErrorCode>,
) {
    match append.kind {
        AppendKind::Commit { reply, offsets, producer_id } => {
            finish_commit(group, ctx, reply, offsets, producer_id, result);
        }
        AppendKind::Assignment { generation, assignments } => {
            let current = group.state == GroupState::CompletingRebalance && group.generation == generation;
            if !current || group.assignment_append != Some(append_id) {
                return;
            }
            group.assignment_append = None;
            match result {
                Ok(()) => {
                    for (member_id, assignment) in assignments {
                        if let Some(member) = group.members.get_mut(&member_id) {
                            member.assignment = assignment;
                        }
                    }
                    group.become_stable(ctx);
                    group.propagate_assignments(ctx, ErrorCode::NONE);
                }
                Err(error) => {
                    group.reset_assignments(ctx, append_error(error));
                    group.prepare_rebalance(ctx);
                }
            }
        }
        AppendKind::StaticReplacement(replacement) => {
            finish_replacement(group, ctx, *replacement, result);
        }
        AppendKind::Emptied { reply } => {
            if let Some(reply) = reply {
                let error = result.err().map(append_error).unwrap_or_default();
                ctx.reply(reply.token, with_error(reply.response, error));
            }
        }
        AppendKind::Tombstones { offsets, last, whole_group, reply } => {
            match result {
                Ok(()) => {
                    for (topic, partition) in offsets {
                        remove_offset(group, &topic, partition);
                    }
                    if whole_group && last {
                        group.persisted = false;
                    }
                }
                Err(error) if group.delete_error.is_none() => group.delete_error = append_error(error),
                Err(_) => {}
            }
            if last {
                let error = std::mem::take(&mut group.delete_error);
                if whole_group && !error.is_none() {
                    // The log may or may not hold the tombstones; the group lives on until told again.
                    group.state = GroupState::Empty;
                }
                if let Some(reply) = reply {
                    ctx.reply(reply.token, with_error(reply.response, error));
                }
            }
        }
    }
}

/// A deletion is through when nothing of it is under way. Commits that came before it were deleted with it.
fn settle_deletion(group: &mut Group) {
    group.state = GroupState::Empty;
    group.protocol_type = None;
    group.protocol_name = None;
    group.generation = 0;
}

fn with_error(mut response: GroupResponse, error: ErrorCode) -> GroupResponse {
    if !error.is_none() {
        match &mut response {
            GroupResponse::Delete(code) => *code = error,
            GroupResponse::OffsetDelete(response) => response.error_code = error.0,
            GroupResponse::Leave(response) => response.error_code = error.0,
            _ => {}
        }
    }
    response
}

fn finish_commit(
    group: &mut Group,
    ctx: &mut Ctx,
    mut reply: Reply,
    offsets: Vec<(String, i32, Committed)>,
    producer_id: Option<i64>,
    result: Result<(), ErrorCode>,
) {
    match result {
        Ok(()) => {
            for (topic, partition, committed) in offsets {
                match producer_id {
                    Some(producer_id) => hold_offset(group, ctx, producer_id, topic, partition, committed),
                    None => apply_offset(group, topic, partition, committed),
                }
            }
        }
        Err(error) => {
            let code = match append_error(error) {
                ErrorCode::UNKNOWN_SERVER_ERROR => ErrorCode::INVALID_COMMIT_OFFSET_SIZE,
                error => error,
            };
            if let GroupResponse::OffsetCommit(response) = &mut reply.response {
                let partitions = response.topics.iter_mut().flat_map(|topic| topic.partitions.iter_mut());
                for partition in partitions.filter(|partition| partition.error_code == 0) {
                    partition.error_code = code.0;
                }
            }
        }
    }
    ctx.reply(reply.token, reply.response);
}

fn finish_replacement(
    group: &mut Group,
    ctx: &mut Ctx,
    replacement: StaticReplacement,
    result: Result<(), ErrorCode>,
) {
    let new_id = &replacement.new_member_id;
    let waiting = group.members.get(new_id).and_then(|member| member.waiting_join);
    let current = group.state == GroupState::Stable && group.generation == replacement.generation;
    if !current || waiting.is_none_or(|waiting| waiting.token != replacement.token) {
        // A rebalance has begun, which counts this join; or the member was replaced again and answered then.
        return;
    }
    match result {
        Ok(()) if replacement.version >= 9 => {
            let is_leader = group.is_leader(new_id);
            group.complete_join_of(ctx, new_id, is_leader);
            group.extend_session(ctx, new_id);
        }
        Ok(()) => {
            // Older clients cannot skip the assignment: naming the old id as leader keeps them from making one.
            let response = group
                .generation_head(new_id, replacement.version)
                .with_leader(own_str(&replacement.old_leader));
            group.take_waiting_join(new_id);
            ctx.reply(replacement.token, GroupResponse::Join(response));
            group.extend_session(ctx, new_id);
        }
        Err(error) => {
            group.take_waiting_join(new_id);
            let instance_id = group.members.get(new_id).and_then(|member| member.instance_id.clone());
            group.update(
                new_id,
                replacement.old_protocols,
                replacement.old_rebalance_timeout_ms,
                replacement.old_session_timeout_ms,
            );
            if let Some(instance_id) = instance_id {
                group.replace_static(ctx, &instance_id, new_id, &replacement.old_member_id);
            }
            group.extend_session(ctx, &replacement.old_member_id);
            ctx.reply(replacement.token, join_error(append_error(error), "", replacement.version));
        }
    }
}
