//! DescribeGroups, ListGroups and DeleteGroups, one group at a time.

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::protocol::StrBytes;

use crate::coordinator::Coordinator;
use crate::group::Reply;
use crate::offsets::{all_offsets, append_tombstones};
use crate::types::{GroupResponse, GroupState, own_str};

/// The only kind of group kept here.
const GROUP_TYPE: &str = "classic";

impl Coordinator {
    pub(crate) fn describe(&mut self, token: u64, group_id: &str, version: i16) {
        let described = DescribedGroup::default().with_group_id(own_str(group_id).into());
        let described = match self.groups.get(group_id) {
            Some(group) if group.state != GroupState::Dead => {
                let stable = group.state == GroupState::Stable;
                let protocol = group.protocol_name.as_deref().filter(|_| stable).unwrap_or("");
                let members = group
                    .in_join_order()
                    .into_iter()
                    .filter_map(|id| group.members.get(id).map(|member| (id, member)))
                    .map(|(id, member)| {
                        let described = DescribedGroupMember::default()
                            .with_member_id(own_str(id))
                            .with_group_instance_id(member.instance_id.as_deref().map(own_str))
                            .with_client_id(own_str(&member.client_id))
                            .with_client_host(own_str(&member.client_host));
                        if !stable {
                            return described;
                        }
                        described
                            .with_member_metadata(member.metadata(protocol))
                            .with_member_assignment(member.assignment.clone())
                    })
                    .collect();
                described
                    .with_group_state(StrBytes::from_static_str(group.state.name()))
                    .with_protocol_type(own_str(group.protocol_type.as_deref().unwrap_or("")))
                    .with_protocol_data(own_str(protocol))
                    .with_members(members)
            }
            // Tools before version 6 read the state alone.
            _ => {
                let described =
                    described.with_group_state(StrBytes::from_static_str(GroupState::Dead.name()));
                if version < 6 {
                    described
                } else {
                    let message = format!("Group {group_id} not found.");
                    described
                        .with_error_code(ErrorCode::GROUP_ID_NOT_FOUND.0)
                        .with_error_message(Some(StrBytes::from_string(message)))
                }
            }
        };
        self.ctx.reply(token, GroupResponse::Describe(described));
    }

    pub(crate) fn list(&mut self, token: u64, states_filter: &[StrBytes], types_filter: &[StrBytes]) {
        let admits = |filter: &[StrBytes], name: &str| {
            filter.is_empty() || filter.iter().any(|wanted| wanted.eq_ignore_ascii_case(name))
        };
        let listed = self
            .groups
            .values()
            .filter(|group| admits(types_filter, GROUP_TYPE) && admits(states_filter, group.state.name()))
            .map(|group| {
                ListedGroup::default()
                    .with_group_id(own_str(&group.id).into())
                    .with_protocol_type(own_str(group.protocol_type.as_deref().unwrap_or("")))
                    .with_group_state(StrBytes::from_static_str(group.state.name()))
                    .with_group_type(StrBytes::from_static_str(GROUP_TYPE))
            })
            .collect();
        self.ctx.reply(token, GroupResponse::List(listed));
    }

    pub(crate) fn delete_group(&mut self, token: u64, group_id: &str) {
        let error = match self.groups.get(group_id).map(|group| group.state) {
            None | Some(GroupState::Dead) => ErrorCode::GROUP_ID_NOT_FOUND,
            Some(GroupState::Empty) => ErrorCode::NONE,
            Some(_) => ErrorCode::NON_EMPTY_GROUP,
        };
        let reply = Reply { token, response: GroupResponse::Delete(error) };
        match self.groups.get_mut(group_id) {
            Some(group) if error.is_none() => {
                // A client that was promised an id finds its group gone and starts anew.
                group.pending_members.clear();
                let doomed = all_offsets(group, &self.ctx);
                append_tombstones(group, &mut self.ctx, doomed, true, Some(reply));
            }
            _ => self.ctx.reply(token, reply.response),
        }
        self.drop_if_vacant(group_id);
    }
}
