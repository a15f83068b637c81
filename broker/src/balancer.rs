//! Moves replicas and leaders to where the metadata wants them.
//!
//! Two loops, whose rules are pure (`flumen_metadata::{reassignment, balance}`): every shard drives the groups that it leads
//! and that are on their way; the leader of the metadata empties nodes that leave, and asks leaders to hand over. Each
//! turn looks at what is there; nothing is remembered, so that any node goes on where another one stopped.
//!
//! It opens and deletes no logs: the controller does, as the metadata changes.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use flumen_metadata::admin::{LeaderTransfer, Refused};
use flumen_metadata::balance;
use flumen_metadata::reassignment::{GroupView, Step, Waiting, next_step};
use flumen_metadata::{MetadataImage, NodeState, PartitionInfo};
use flumen_protocol::error_code::ErrorCode;
use flumen_raft::{PeerStatus, ProposeError, Target};
use tokio::time::Instant;
use uuid::Uuid;

use crate::cluster::change::{Intent, change};
use crate::cluster::hand_over::hand_over;
use crate::cluster::node_id_of;
use crate::node::Node;
use crate::partition::{Partition, raft_id};
use crate::progress::{self, Meters, MoveProgress};
use crate::shard::Shard;
use crate::topic_admin::with_live;

/// A step of a move takes some round trips; looked at so often, a move of an empty partition takes about a second.
const TURN_INTERVAL: Duration = Duration::from_millis(200);
/// Leaders go to where they are preferred so often. A node that came back is busy catching up, and one that comes and goes
/// must not take leaders along each time.
const HOME_INTERVAL: Duration = Duration::from_secs(30);
/// How often whoever waits for a leader to hand over looks whether it has.
const HAND_OVER_LOOK: Duration = Duration::from_millis(20);

/// A partition that is on its way.
#[derive(Clone)]
struct Move {
    topic: Arc<str>,
    topic_id: Uuid,
    partition: i32,
    info: PartitionInfo,
}

fn moves_of(image: &MetadataImage) -> Vec<Move> {
    let mut moves = Vec::new();
    for topic in image.topics.values() {
        for (partition, info) in (0i32..).zip(&topic.partitions) {
            if info.target.is_some() {
                let (topic_id, info) = (topic.id, info.clone());
                moves.push(Move { topic: topic.name.as_str().into(), topic_id, partition, info });
            }
        }
    }
    moves
}

/// Drives the moves of the groups that this shard leads, until the shard stops.
pub async fn keep_moving(shard: Rc<Shard>) {
    let mut seen = shard.node.image.load_full();
    let mut moves = moves_of(&seen);
    let mut waiting: BTreeMap<u64, Waiting> = BTreeMap::new();
    let mut meters = Meters::default();
    let mut shown: BTreeSet<u64> = BTreeSet::new();
    while !shard.is_stopping() {
        tokio::time::sleep(TURN_INTERVAL).await;
        let now = shard.node.image.load_full();
        if !Arc::ptr_eq(&seen, &now) {
            moves = moves_of(&now);
            seen = now;
        }
        let is_move = |group: u64| moves.iter().any(|one| one.info.group_id == group);
        waiting.retain(|group, _| is_move(*group));
        meters.retain(is_move);
        let mut show: BTreeMap<u64, MoveProgress> = BTreeMap::new();
        for one in &moves {
            let Some(partition) = shard.partition(one.info.group_id) else { continue };
            if partition.serves() {
                take_step(&shard, one, &partition, &mut waiting).await;
                let group_id = one.info.group_id;
                let waits = waiting.get(&group_id);
                let now = Instant::now();
                let progress = progress::of_move(&shard.node, &one.info, &partition, waits, &mut meters, now);
                show.insert(group_id, progress);
            }
        }
        // Those that this broker no longer drives are not its to speak of.
        for group_id in shown.iter().filter(|group| !show.contains_key(group)) {
            shard.node.show_progress(*group_id, None);
        }
        shown = show.keys().copied().collect();
        for (group_id, progress) in show {
            shard.node.show_progress(group_id, Some(progress));
        }
    }
}

async fn take_step(
    shard: &Rc<Shard>,
    one: &Move,
    partition: &Partition,
    waiting: &mut BTreeMap<u64, Waiting>,
) {
    let group_id = one.info.group_id;
    let told = |error: &dyn std::fmt::Display| {
        tracing::warn!(topic = %one.topic, partition = one.partition, %error, "a step of a move failed; it is tried again");
    };
    let step = step_of(&one.info, partition);
    if !matches!(step, Step::Wait(_)) {
        waiting.remove(&group_id);
    }
    match step {
        Step::Wait(reason) => {
            if waiting.insert(group_id, reason) != Some(reason) {
                tracing::info!(topic = %one.topic, partition = one.partition, %reason, "a move waits");
            }
        }
        Step::Change { voters, learners } => {
            tracing::info!(topic = %one.topic, partition = one.partition, ?voters, ?learners, "the replicas of a partition change");
            let ids = |set: BTreeSet<i32>| set.into_iter().map(raft_id).collect();
            let target = Target { voters: ids(voters), learners: ids(learners) };
            match partition.propose_membership(target) {
                Ok(()) | Err(ProposeError::ChangePending | ProposeError::NoChange) => {}
                Err(error) => told(&error),
            }
        }
        Step::HandOver { to } => {
            if let Err(error) = partition.transfer_leader(raft_id(to)) {
                told(&error);
            }
        }
        Step::Reached => {
            // Nodes drop their logs upon this: whoever was deposed and does not know it yet must not say it.
            let leads = partition.confirm_leads().await.is_ok();
            if !leads || !matches!(step_of(&one.info, partition), Step::Reached) {
                return;
            }
            let reached = Intent::ReplicasReached {
                topic_id: one.topic_id.to_string(),
                partition: one.partition,
                replicas: one.info.goal().to_vec(),
            };
            if let Err(error) = change(&shard.node, reached).await {
                told(&error);
            }
        }
    }
}

/// What the leader of a partition that is on its way does next.
pub fn step_of(info: &PartitionInfo, partition: &Partition) -> Step {
    next_step(info, &view_of(partition))
}

/// What the leader sees of its group.
pub(crate) fn view_of(partition: &Partition) -> GroupView {
    let status = partition.raft_status();
    let ids = |ids: &[u64]| ids.iter().filter_map(|id| node_id_of(*id)).collect();
    let own = status.leadership.leader_id;
    // Raft takes a new member for active before it has heard of it; one that has nothing has not joined yet.
    let heard_of = |peer: &&PeerStatus| peer.id == own || (peer.is_active && peer.matched_index > 0);
    let behind = status.peers.iter().filter(heard_of).filter_map(|peer| {
        let lacks =
            if peer.id == own { 0 } else { status.committed_index.saturating_sub(peer.matched_index) };
        Some((node_id_of(peer.id)?, lacks))
    });
    GroupView {
        leader: node_id_of(own).unwrap_or(-1),
        voters: ids(&status.membership.voters),
        learners: ids(&status.membership.learners),
        // What is on its way would come after whatever is concluded from the members of now.
        is_joint: status.membership.is_joint() || status.change_pending,
        behind: behind.collect(),
        lagging: partition.not_keeping_up().into_iter().collect(),
    }
}

/// What the leader of the metadata does in a turn. `home` is when leaders were last sent to where they are preferred.
pub async fn balance(shard: &Rc<Shard>, home: &mut Instant) {
    let node = &shard.node;
    let image = node.image.load_full();
    if !node.with_health(|health| balance::evacuations(&image, health)).is_empty()
        && let Err(error) = change(node, Intent::Evacuate).await
    {
        tracing::warn!(%error, "replicas of a node that leaves could not be given to others; it is tried again");
    }
    let goes_home = home.elapsed() >= HOME_INTERVAL;
    let all_active = image.nodes.values().all(|node| node.state == NodeState::Active);
    if all_active && !goes_home {
        return;
    }
    if goes_home {
        *home = Instant::now();
    }
    let active = |id: i32| image.nodes.get(&id).is_some_and(|node| node.state == NodeState::Active);
    let has_room = node.has_room();
    let mut transfers = with_live(node, |live| balance::leader_transfers(&image, live, &has_room));
    transfers.retain(|transfer| goes_home || !active(transfer.from));
    for transfer in &transfers {
        if let Err(error) = hand_over(node, transfer).await {
            tracing::debug!(topic = transfer.topic, partition = transfer.partition, %error, "a leader did not hand over");
        }
    }
}

/// Has a leader hand over, and waits until the other one leads.
pub async fn transfer(node: &Node, transfer: &LeaderTransfer, deadline: Instant) -> Result<(), Refused> {
    let refused = |code| Refused::new(code, "The leader could not hand over.");
    hand_over(node, transfer).await.map_err(refused)?;
    while node.leaders.get(transfer.group_id).is_none_or(|(leader, _)| leader != transfer.to) {
        if Instant::now() >= deadline {
            let message = "The leader has been asked to hand over, and has not done so yet.";
            return Err(Refused::new(ErrorCode::REQUEST_TIMED_OUT, message));
        }
        tokio::time::sleep(HAND_OVER_LOOK).await;
    }
    Ok(())
}
