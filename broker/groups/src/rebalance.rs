//! The steps of a group between its states: from joins to a generation, from an assignment to stable members,
//! and what happens when time runs out.
//!
//! A step that empties the group returns the append that says so, for the caller to hang its answer on.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::join_group_response::JoinGroupResponseMember;
use kafka_protocol::messages::{JoinGroupResponse, SyncGroupResponse};

use crate::group::{AppendKind, Ctx, Group, JoinPhase, Member, NEVER};
use crate::record::{GroupMetadataValue, MemberValue, OffsetsRecord, group_metadata_key};
use crate::types::{GroupResponse, GroupState, NEW_MEMBER_JOIN_TIMEOUT_MS, own_str};

impl Group {
    pub fn can_rebalance(&self) -> bool {
        matches!(self.state, GroupState::Stable | GroupState::CompletingRebalance | GroupState::Empty)
    }

    /// Returns the append that a completed rebalance without members started.
    pub fn rebalance_or_complete_join(&mut self, ctx: &mut Ctx) -> Option<u64> {
        if self.can_rebalance() { self.prepare_rebalance(ctx) } else { self.maybe_complete_join(ctx) }
    }

    pub fn prepare_rebalance(&mut self, ctx: &mut Ctx) -> Option<u64> {
        if self.state == GroupState::CompletingRebalance {
            self.reset_assignments(ctx, ErrorCode::REBALANCE_IN_PROGRESS);
        }
        self.pending_sync.clear();
        self.sync_deadline_ms = NEVER;
        self.assignment_append = None;
        let initial = self.state == GroupState::Empty;
        self.prepared_from_empty = initial;
        self.transition(ctx, GroupState::PreparingRebalance);
        if !initial {
            return self.complete_join_or_wait(ctx);
        }
        let delay_ms = ctx.config.initial_rebalance_delay_ms.max(0);
        let remaining_ms = (self.rebalance_timeout_ms() - delay_ms).max(0);
        self.new_member_added = false;
        self.wait_for_joins(ctx, delay_ms, Some((delay_ms, remaining_ms)));
        None
    }

    fn wait_for_joins(&mut self, ctx: &mut Ctx, delay_ms: i64, initial: Option<(i64, i64)>) {
        // At least a millisecond, or a round that changes nothing would be due again at once; and members that start
        // together share their first generation even where no delay is configured, as with Kafka's timer of zero.
        let deadline_ms = ctx.after(delay_ms.max(1));
        self.join_phase = Some(JoinPhase { deadline_ms, initial });
        ctx.wake_by(self, deadline_ms);
    }

    fn all_joined(&self) -> bool {
        self.waiting_joins == self.members.len() && self.pending_members.is_empty()
    }

    fn complete_join_or_wait(&mut self, ctx: &mut Ctx) -> Option<u64> {
        if self.all_joined() {
            return self.complete_join(ctx);
        }
        let timeout_ms = self.rebalance_timeout_ms();
        self.wait_for_joins(ctx, timeout_ms, None);
        None
    }

    pub fn maybe_complete_join(&mut self, ctx: &mut Ctx) -> Option<u64> {
        let due =
            self.state == GroupState::PreparingRebalance && self.all_joined() && !self.prepared_from_empty;
        if due { self.complete_join(ctx) } else { None }
    }

    pub fn on_join_deadline(&mut self, ctx: &mut Ctx, initial: Option<(i64, i64)>) -> Option<u64> {
        if let Some((delay_ms, remaining_ms)) = initial
            && self.new_member_added
            && remaining_ms != 0
        {
            self.new_member_added = false;
            let next_ms = ctx.config.initial_rebalance_delay_ms.max(0).min(remaining_ms);
            self.wait_for_joins(ctx, next_ms, Some((next_ms, (remaining_ms - delay_ms).max(0))));
            return None;
        }
        self.complete_join(ctx)
    }

    pub fn complete_join(&mut self, ctx: &mut Ctx) -> Option<u64> {
        self.join_phase = None;
        // Static members keep their place until their session ends; the others had their time.
        let late: Vec<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.waiting_join.is_none() && member.instance_id.is_none())
            .map(|(id, _)| id.clone())
            .collect();
        for member_id in late {
            self.expel(ctx, &member_id, ErrorCode::UNKNOWN_MEMBER_ID);
        }
        if !self.elect_joined_leader() && !self.members.is_empty() {
            let timeout_ms = self.rebalance_timeout_ms();
            self.wait_for_joins(ctx, timeout_ms, None);
            return None;
        }
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        self.pending_sync.clear();
        self.sync_deadline_ms = NEVER;
        self.assignment_append = None;
        if self.members.is_empty() {
            self.protocol_name = None;
            self.leader = None;
            self.compute_subscribed();
            self.transition(ctx, GroupState::Empty);
            let records = vec![self.metadata_record(None)];
            let kind = AppendKind::Emptied { reply: None };
            return Some(ctx.append(self, records, kind));
        }
        self.protocol_name = Some(self.select_protocol().unwrap_or_default());
        self.compute_subscribed();
        self.transition(ctx, GroupState::CompletingRebalance);
        let ids: Vec<String> = self.in_join_order().into_iter().map(str::to_owned).collect();
        for member_id in &ids {
            self.complete_join_of(ctx, member_id, false);
            self.extend_session(ctx, member_id);
        }
        self.pending_sync = ids.into_iter().collect();
        self.sync_deadline_ms = ctx.after(self.rebalance_timeout_ms());
        let sync_deadline_ms = self.sync_deadline_ms;
        ctx.wake_by(self, sync_deadline_ms);
        None
    }

    /// Whether the leader waits for the generation; if the old one does not, the first member that does leads.
    fn elect_joined_leader(&mut self) -> bool {
        let Some(leader) = &self.leader else { return false };
        if self.members.get(leader).is_some_and(|member| member.waiting_join.is_some()) {
            return true;
        }
        match self.first_joined(|member| member.waiting_join.is_some()) {
            Some(id) => {
                self.leader = Some(id);
                true
            }
            None => false,
        }
    }

    /// Tells a waiting member the current generation.
    pub fn complete_join_of(&mut self, ctx: &mut Ctx, member_id: &str, skip_assignment: bool) {
        let Some(member) = self.members.get_mut(member_id) else { return };
        member.is_new = false;
        if let Some(waiting) = member.waiting_join.take() {
            self.waiting_joins -= 1;
            let response = self.current_generation(member_id, waiting.version, skip_assignment);
            ctx.reply(waiting.token, GroupResponse::Join(response));
        }
    }

    /// Ends a member's wait for its JoinGroup; the caller answers.
    pub fn take_waiting_join(&mut self, member_id: &str) {
        if let Some(member) = self.members.get_mut(member_id)
            && member.waiting_join.take().is_some()
        {
            self.waiting_joins -= 1;
        }
    }

    pub fn current_generation(
        &self,
        member_id: &str,
        version: i16,
        skip_assignment: bool,
    ) -> JoinGroupResponse {
        let members = if self.is_leader(member_id) { self.join_members() } else { Vec::new() };
        self.generation_head(member_id, version)
            .with_leader(own_str(self.leader_or_empty()))
            .with_members(members)
            .with_skip_assignment(skip_assignment)
    }

    /// Without leader and members.
    pub fn generation_head(&self, member_id: &str, version: i16) -> JoinGroupResponse {
        JoinGroupResponse::default()
            .with_generation_id(self.generation)
            .with_protocol_type(self.protocol_type.as_deref().map(own_str))
            .with_protocol_name(nullable_since_7(self.protocol_name.as_deref(), version))
            .with_member_id(own_str(member_id))
    }

    fn join_members(&self) -> Vec<JoinGroupResponseMember> {
        let protocol = self.protocol_name.as_deref().unwrap_or("");
        self.in_join_order()
            .into_iter()
            .filter_map(|id| self.members.get(id).map(|member| (id, member)))
            .map(|(id, member)| {
                JoinGroupResponseMember::default()
                    .with_member_id(own_str(id))
                    .with_group_instance_id(member.instance_id.as_deref().map(own_str))
                    .with_metadata(member.metadata(protocol))
            })
            .collect()
    }

    // Assignments.

    pub fn reset_assignments(&mut self, ctx: &mut Ctx, error: ErrorCode) {
        for member in self.members.values_mut() {
            member.assignment = Bytes::new();
        }
        self.propagate_assignments(ctx, error);
    }

    pub fn propagate_assignments(&mut self, ctx: &mut Ctx, error: ErrorCode) {
        let waiting: Vec<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.waiting_sync.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        for member_id in waiting {
            let response = if error.is_none() { self.sync_response(&member_id) } else { sync_error(error) };
            if let Some(member) = self.members.get_mut(&member_id)
                && let Some(token) = member.waiting_sync.take()
            {
                ctx.reply(token, response);
            }
            // Its session was not watched while it waited.
            self.extend_session(ctx, &member_id);
        }
    }

    pub fn sync_response(&self, member_id: &str) -> GroupResponse {
        let assignment = self.members.get(member_id).map(|member| member.assignment.clone());
        GroupResponse::Sync(
            SyncGroupResponse::default()
                .with_protocol_type(self.protocol_type.as_deref().map(own_str))
                .with_protocol_name(self.protocol_name.as_deref().map(own_str))
                .with_assignment(assignment.unwrap_or_default()),
        )
    }

    pub fn become_stable(&mut self, ctx: &mut Ctx) {
        self.transition(ctx, GroupState::Stable);
    }

    /// The group's record, with `assignments` where they are not yet the members' own.
    pub fn metadata_record(&self, assignments: Option<&BTreeMap<String, Bytes>>) -> OffsetsRecord {
        let protocol = self.protocol_name.as_deref().unwrap_or("");
        let members = self.in_join_order().into_iter().filter_map(|id| {
            let member = self.members.get(id)?;
            let assignment = match assignments {
                Some(assignments) => assignments.get(id).cloned().unwrap_or_default(),
                None => member.assignment.clone(),
            };
            Some(MemberValue {
                member_id: id.to_owned(),
                group_instance_id: member.instance_id.clone(),
                client_id: member.client_id.clone(),
                client_host: member.client_host.clone(),
                rebalance_timeout_ms: member.rebalance_timeout_ms,
                session_timeout_ms: member.session_timeout_ms,
                subscription: member.metadata(protocol),
                assignment,
            })
        });
        let value = GroupMetadataValue {
            protocol_type: self.protocol_type.clone().unwrap_or_default(),
            generation: self.generation,
            protocol: self.protocol_name.clone(),
            leader: self.leader.clone(),
            current_state_timestamp_ms: self.state_timestamp_ms,
            members: members.collect(),
        };
        OffsetsRecord { key: group_metadata_key(&self.id), value: Some(value.encode()) }
    }

    // Time.

    /// Handles everything that is due and asks for the next wake-up. The caller took the group out of the queue.
    pub fn on_wake(&mut self, ctx: &mut Ctx) {
        let now_ms = ctx.now.steady_ms;
        let gone: Vec<String> =
            self.pending_members.iter().filter(|(_, at)| **at <= now_ms).map(|(id, _)| id.clone()).collect();
        for member_id in gone {
            self.pending_members.remove(&member_id);
            self.maybe_complete_join(ctx);
        }
        let silent: Vec<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.deadline_ms <= now_ms && member.can_expire())
            .map(|(id, _)| id.clone())
            .collect();
        for member_id in silent {
            // Removing one may have completed a rebalance that renewed the others.
            let still = |member: &Member| member.deadline_ms <= now_ms && member.can_expire();
            if self.members.get(&member_id).is_some_and(still) {
                self.expel(ctx, &member_id, ErrorCode::UNKNOWN_MEMBER_ID);
                self.after_removal(ctx);
            }
        }
        if let Some(phase) = self.join_phase
            && phase.deadline_ms <= now_ms
            && self.state == GroupState::PreparingRebalance
        {
            self.on_join_deadline(ctx, phase.initial);
        }
        if self.sync_deadline_ms <= now_ms {
            self.on_sync_deadline(ctx);
        }
        let next_ms = self.next_deadline_ms();
        ctx.wake_by(self, next_ms);
    }

    fn on_sync_deadline(&mut self, ctx: &mut Ctx) {
        self.sync_deadline_ms = NEVER;
        if matches!(self.state, GroupState::CompletingRebalance | GroupState::Stable) {
            let missing = std::mem::take(&mut self.pending_sync);
            for member_id in &missing {
                self.expel(ctx, member_id, ErrorCode::UNKNOWN_MEMBER_ID);
            }
            if !missing.is_empty() {
                self.prepare_rebalance(ctx);
            }
        }
    }

    /// A member is gone: the others must share anew, or wait for one less.
    pub fn after_removal(&mut self, ctx: &mut Ctx) -> Option<u64> {
        match self.state {
            GroupState::Stable | GroupState::CompletingRebalance => self.prepare_rebalance(ctx),
            GroupState::PreparingRebalance => self.maybe_complete_join(ctx),
            GroupState::Empty | GroupState::Dead => None,
        }
    }

    fn next_deadline_ms(&self) -> i64 {
        let sessions =
            self.members.values().filter(|member| member.can_expire()).map(|member| member.deadline_ms);
        let pending = self.pending_members.values().copied();
        let join = self.join_phase.map(|phase| phase.deadline_ms);
        sessions.chain(pending).chain(join).chain([self.sync_deadline_ms]).min().unwrap_or(NEVER)
    }

    pub fn assert_consistent(&self, ctx: &Ctx) {
        let waiting = self.members.values().filter(|member| member.waiting_join.is_some()).count();
        assert_eq!(self.waiting_joins, waiting, "waiting joins are counted");
        let mut counts = self.protocol_counts.clone();
        for member in self.members.values() {
            let names: BTreeSet<&str> = member.protocols.iter().map(|(name, _)| name.as_str()).collect();
            for name in names {
                let count = counts.get_mut(name).expect("every offered protocol is counted");
                *count -= 1;
            }
        }
        assert!(counts.values().all(|count| *count == 0), "no protocol is counted that nobody offers");
        for (instance_id, member_id) in &self.static_members {
            let member = self.members.get(member_id).expect("a static member is a member");
            assert_eq!(member.instance_id.as_ref(), Some(instance_id));
        }
        let with_instance = self.members.values().filter(|member| member.instance_id.is_some()).count();
        assert_eq!(with_instance, self.static_members.len());
        assert!(self.pending_sync.iter().all(|id| self.members.contains_key(id)));
        match self.state {
            GroupState::Stable | GroupState::CompletingRebalance => {
                let leader = self.leader.as_ref().expect("a generation has a leader");
                assert!(self.members.contains_key(leader), "the leader is a member");
                let everyone = self.members.len();
                let protocol = self.protocol_name.as_ref().expect("a generation has a protocol");
                assert!(
                    self.members
                        .values()
                        .all(|member| member.protocols.iter().any(|(name, _)| name == protocol)),
                    "all {everyone} members know the protocol"
                );
                let syncing = self.members.values().any(|member| member.waiting_sync.is_some());
                assert!(
                    self.state == GroupState::CompletingRebalance || !syncing,
                    "stable members wait for nothing"
                );
            }
            GroupState::Empty | GroupState::Dead => {
                assert!(self.members.is_empty(), "an empty group is empty")
            }
            GroupState::PreparingRebalance => {
                assert!(self.join_phase.is_some(), "a join phase ends by itself");
                assert!(self.members.values().all(|member| member.waiting_sync.is_none()));
            }
        }
        for (producer_id, offsets) in &self.txn_offsets {
            assert!(!offsets.is_empty(), "a transaction without offsets is forgotten");
            assert!(ctx.open_transactions.get(producer_id).is_some_and(|groups| groups.contains(&self.id)));
        }
        assert!(self.wake_at_ms <= self.next_deadline_ms(), "every deadline is watched");
        assert!(self.wake_at_ms == NEVER || ctx.wakes.contains(&(self.wake_at_ms, self.id.clone())));
    }

    pub fn new_member_deadline_ms(ctx: &Ctx) -> i64 {
        ctx.after(NEW_MEMBER_JOIN_TIMEOUT_MS)
    }
}

fn nullable_since_7(text: Option<&str>, version: i16) -> Option<kafka_protocol::protocol::StrBytes> {
    match text {
        None if version >= 7 => None,
        text => Some(own_str(text.unwrap_or(""))),
    }
}

pub(crate) fn join_error(error: ErrorCode, member_id: &str, version: i16) -> GroupResponse {
    GroupResponse::Join(
        JoinGroupResponse::default()
            .with_error_code(error.0)
            .with_protocol_name(nullable_since_7(None, version))
            .with_member_id(own_str(member_id)),
    )
}

pub(crate) fn sync_error(error: ErrorCode) -> GroupResponse {
    GroupResponse::Sync(SyncGroupResponse::default().with_error_code(error.0))
}
