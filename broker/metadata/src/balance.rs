//! What a cluster does by itself: leaders go where they are preferred, nodes in maintenance lead nothing, nodes that leave
//! give their replicas away.
//!
//! Plans of one turn, bounded, made from what is there: nothing is remembered between turns, so that another controller
//! goes on. The shell decides when a turn is due, asks leaders to hand over, and commits the commands.

use std::collections::BTreeMap;

use crate::admin::{LeaderTransfer, Live, Refused};
use crate::assignment::PartitionInfo;
use crate::command::Command;
use crate::image::{MetadataImage, Topic};
use crate::nodes::{Broker, NodeState};
use crate::placement::{NodeHealth, Placer};

use flumen_protocol::error_code::ErrorCode;

/// Each makes producers of one partition look for their leader; so many at a time are not noticed.
pub const TRANSFERS_PER_TURN_MAX: usize = 32;
/// Partitions on their way at the same time: each reads and sends a whole log.
pub const MOVES_AT_ONCE_MAX: usize = 8;

/// Leaders that are to hand over next. Who has to leave a node comes before who may go home. A node whose disk is full is given
/// nothing, and what it leads it gives up by itself.
pub fn leader_transfers(
    image: &MetadataImage,
    live: Live<'_>,
    has_room: &dyn Fn(i32) -> bool,
) -> Vec<LeaderTransfer> {
    let mut leaders: BTreeMap<i32, usize> = BTreeMap::new();
    for info in image.topics.values().flat_map(|topic| &topic.partitions) {
        *leaders.entry((live.status)(info.group_id).leader_id).or_default() += 1;
    }
    let active = |id: i32| {
        (live.is_up)(id) && image.broker(id).is_some_and(|broker| broker.state == NodeState::Active)
    };
    let (mut leaving, mut home) = (Vec::new(), Vec::new());
    for topic in image.topics.values() {
        for (at, info) in topic.partitions.iter().enumerate() {
            let found = live.describe(info, image);
            let from = found.leader_id;
            if from < 0 || info.target.is_some() || !has_room(from) {
                continue;
            }
            let able = |id: i32| {
                id != from && active(id) && has_room(id) && found.in_sync.iter().any(|member| member.0 == id)
            };
            let preferred = info.replicas.first().copied().filter(|id| able(*id));
            let plan = |to| transfer(topic, at, info, from, to);
            if active(from) {
                home.extend(preferred.map(plan));
            } else {
                let least = |id: &i32| (leaders.get(id).copied().unwrap_or(0), *id);
                let others = info.replicas.iter().copied().filter(|id| able(*id));
                let Some(to) = preferred.or_else(|| others.min_by_key(least)) else { continue };
                *leaders.entry(to).or_default() += 1;
                leaving.push(plan(to));
            }
        }
    }
    leaving.append(&mut home);
    leaving.truncate(TRANSFERS_PER_TURN_MAX);
    leaving
}

fn transfer(topic: &Topic, at: usize, info: &PartitionInfo, from: i32, to: i32) -> LeaderTransfer {
    LeaderTransfer {
        topic: topic.name.clone(),
        partition: i32::try_from(at).unwrap_or(i32::MAX),
        group_id: info.group_id,
        from,
        to,
    }
}

/// Partitions that are to leave nodes next. What cannot go anywhere stays, see [`decommission_progress`].
///
/// A move to a node that began to leave later is changed where it stands: that node may be one that is lost, and the move
/// would wait for it for ever.
pub fn evacuations(image: &MetadataImage, health: NodeHealth<'_>) -> Vec<Command> {
    let leaving: Vec<i32> = image
        .brokers()
        .iter()
        .filter(|broker| broker.state == NodeState::Decommissioning)
        .map(|broker| broker.id)
        .collect();
    if leaving.is_empty() {
        return Vec::new();
    }
    let partitions = || image.topics.values().flat_map(|topic| &topic.partitions);
    let under_way = partitions().filter(|info| info.target.is_some()).count();
    let mut begun_max = MOVES_AT_ONCE_MAX.saturating_sub(under_way);
    let mut changed_max = MOVES_AT_ONCE_MAX;
    let mut placer = Placer::new(image, health);
    let mut commands = Vec::new();
    for topic in image.topics.values() {
        for (partition, info) in (0i32..).zip(&topic.partitions) {
            let left = if info.target.is_some() { &mut changed_max } else { &mut begun_max };
            if *left == 0 || !info.goal().iter().any(|id| leaving.contains(id)) {
                continue;
            }
            let kept: Vec<i32> = info.goal().iter().copied().filter(|id| !leaving.contains(id)).collect();
            let Some(target) = placer.place_again(&topic.partitions, &kept, info.goal().len()) else {
                continue;
            };
            *left -= 1;
            commands.push(Command::SetReplicas { topic_id: topic.id, partition, target: Some(target) });
        }
    }
    commands
}

/// How far a node is on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evacuation {
    /// Partitions that it still holds.
    pub replicas_left: usize,
    /// Those of them that are on their way to other nodes.
    pub moving: usize,
    /// Why the others cannot go, if that is so.
    pub blocked: Option<String>,
}

pub fn decommission_progress(image: &MetadataImage, id: i32) -> Evacuation {
    let held =
        || image.topics.values().flat_map(|topic| &topic.partitions).filter(|info| info.is_held_by(id));
    let moving = held().filter(|info| info.target.is_some() && !info.goal().contains(&id)).count();
    let active = image.brokers().iter().filter(|broker| broker.state == NodeState::Active).count();
    let most = held().filter(|info| info.goal().contains(&id)).map(|info| info.goal().len()).max();
    let blocked = most.filter(|most| *most > active).map(|most| not_enough(id, most, active));
    Evacuation { replicas_left: held().count(), moving, blocked }
}

fn not_enough(id: i32, replicas: usize, active: usize) -> String {
    format!(
        "partitions on node {id} have {replicas} replicas, and only {active} other node(s) may hold them: add a node first"
    )
}

/// The command that makes a node leave, or why it cannot.
pub fn plan_decommission(image: &MetadataImage, id: i32) -> Result<Option<Command>, Refused> {
    let node = known(image, id)?;
    if node.state == NodeState::Decommissioning {
        return Ok(None);
    }
    let others = image.brokers().iter().filter(|b| b.state == NodeState::Active && b.id != id).count();
    let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
    let most = partitions.filter(|info| info.is_held_by(id)).map(|info| info.goal().len()).max().unwrap_or(1);
    if most > others {
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, not_enough(id, most, others)));
    }
    Ok(Some(Command::SetNodeState { id, state: NodeState::Decommissioning }))
}

/// The command that puts a node into maintenance, or makes it active again: also one that was to leave.
pub fn plan_maintenance(image: &MetadataImage, id: i32, on: bool) -> Result<Option<Command>, Refused> {
    let node = known(image, id)?;
    let state = if on { NodeState::Maintenance } else { NodeState::Active };
    if on && node.state == NodeState::Decommissioning {
        let message = format!("node {id} is leaving the cluster; it hands over its leaders anyway");
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, message));
    }
    Ok((node.state != state).then_some(Command::SetNodeState { id, state }))
}

fn known(image: &MetadataImage, id: i32) -> Result<Broker<'_>, Refused> {
    // A lone broker has nowhere to send anybody.
    let known = image.nodes.contains_key(&id).then(|| image.broker(id)).flatten();
    known.ok_or_else(|| {
        Refused::new(ErrorCode::BROKER_NOT_AVAILABLE, format!("there is no node {id} in this cluster"))
    })
}

#[cfg(test)]
#[path = "balance_tests.rs"]
mod tests;
