//! Replicas that lost their log, or found it damaged, get it again from the others.
//!
//! A replica that has promised and cannot keep it must not count: its word may be what made an entry committed. So it first
//! tells everybody who has a replica (here); whoever leads takes its vote away, in a change of members as in a move, and says so
//! when that is committed; then the log goes, a new one joins as a new replica does (`joins`), and the leader gives it its vote
//! back once it has everything. Where a majority of the others is missing nothing happens, and what is on the disk stays.
//!
//! The rules are `flumen_metadata::reassignment::mending_step`. Each side asks again and remembers nothing: every step shows in
//! the members of the group. A partition that is being moved is left to the move, which gives votes; but that waits for a member whose
//! log is damaged. Runs on every shard of a broker in a cluster.
//!
//! The metadata goes the same way, but that its controller asks (`controller::mend`), before it starts anything, and that the
//! vote comes back as that of a new node does (`controller::upkeep`).
//!
//! Not mended: groups with two voters, of which no majority is left without the one that is damaged; what nobody has read since it
//! was ruined.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_metadata::PartitionInfo;
use flumen_metadata::reassignment::{Mending, mending_step, without_damaged};
use flumen_protocol::error_code::ErrorCode;
use flumen_raft::Target;
use tokio::time::Instant;
use uuid::Uuid;

use super::requests::{self, Answered};
use crate::balancer::view_of;
use crate::controller::METADATA_GROUP;
use crate::node::Node;
use crate::partition::{Partition, raft_id};
use crate::shard::Shard;

/// Between two looks. A step takes some round trips.
const INTERVAL: Duration = Duration::from_millis(500);
/// Groups that are mended in one turn: a broker that lost many gets them back one after another.
const PER_TURN_MAX: usize = 16;

/// A disk that ruins what it was just given gets it no more often than this.
const AGAIN_AFTER: Duration = Duration::from_secs(300);

/// The leader says: it votes no more, and may begin again with an empty log.
const BEGIN: u8 = 1;
/// The leader has done what there was to do, or there is something to wait for.
const WAIT: u8 = 0;

/// Runs for as long as the shard. `renew`: has a replica begin again, with an empty log.
pub async fn keep(shard: Rc<Shard>, renew: impl AsyncFn(&Rc<Shard>, &Partition)) {
    let mut told = BTreeSet::new();
    let mut renewed: BTreeMap<u64, Instant> = BTreeMap::new();
    while !shard.is_stopping() {
        tokio::time::sleep(INTERVAL).await;
        let in_need = in_need(&shard);
        told.retain(|group| in_need.iter().any(|(partition, _)| partition.group_id == *group));
        for (partition, info) in in_need.into_iter().take(PER_TURN_MAX) {
            if told.insert(partition.group_id) {
                let (topic, index) = (&partition.topic, partition.index);
                tracing::warn!(%topic, partition = index, "this replica is to get its log again from the others");
            }
            let may_begin = ask(&shard, &partition, &info).await == BEGIN && partition.may_begin_again();
            let lately = renewed.get(&partition.group_id).is_some_and(|at| at.elapsed() < AGAIN_AFTER);
            if may_begin && !lately {
                renewed.insert(partition.group_id, Instant::now());
                let (topic, index) = (&partition.topic, partition.index);
                let reason = partition.damage().unwrap_or_default().to_string();
                tracing::warn!(
                    %topic,
                    partition = index,
                    reason,
                    "the damaged log goes; the replica joins its group with an empty one"
                );
                renew(&shard, &partition).await;
            }
        }
    }
}

/// Partitions of this shard whose replica here is damaged, or empty and on its way to be a voter again.
fn in_need(shard: &Shard) -> Vec<(Rc<Partition>, PartitionInfo)> {
    let (image, own) = (shard.node.image.load(), shard.node.config.node_id);
    let mut found = Vec::new();
    for partition in shard.partitions() {
        if partition.group_id == METADATA_GROUP {
            // Its controller asks.
            continue;
        }
        if partition.may_begin_again() || (partition.damage().is_none() && partition.lacks_its_vote()) {
            let info = partition.info_in(&image).cloned();
            let counts_on_it = |info: &PartitionInfo| match &info.target {
                None => info.replicas.contains(&own) && info.replicas.len() > 1,
                Some(goal) => goal.contains(&own) && partition.damage().is_some(),
            };
            if let Some(info) = info.filter(counts_on_it) {
                partition.cease_if_damaged();
                found.push((partition, info));
            }
        }
    }
    found
}

/// Tells all other holders; the answer of the one that leads.
async fn ask(shard: &Rc<Shard>, partition: &Partition, info: &PartitionInfo) -> u8 {
    let mut question = BytesMut::with_capacity(9);
    question.put_u64(partition.group_id);
    question.put_u8(u8::from(partition.damage().is_some()));
    let others = info.holders().into_iter().filter(|id| *id != shard.node.config.node_id);
    tell(shard, others.collect(), question.freeze()).await
}

async fn tell(shard: &Rc<Shard>, others: Vec<i32>, question: Bytes) -> u8 {
    let mut answer = WAIT;
    for node_id in others {
        let answered = shard.links.ask(node_id, requests::MEND, question.clone()).await;
        if let Ok(Answered { code: 0, body }) = answered
            && body.first() == Some(&BEGIN)
        {
            answer = BEGIN;
        }
    }
    answer
}

/// Tells everybody who is connected that the metadata log of this directory is damaged; true when it may go.
pub(crate) async fn may_metadata_begin_again(shard: &Rc<Shard>, directory_id: Uuid) -> bool {
    let mut question = BytesMut::with_capacity(25);
    question.put_u64(METADATA_GROUP);
    question.put_u8(1);
    question.put_u128(directory_id.as_u128());
    tell(shard, shard.links.connected(), question.freeze()).await == BEGIN
}

/// As `Shard::renew`, alone among all that opens and closes partitions.
pub async fn renew_by_controller(shard: &Rc<Shard>, partition: &Partition) {
    let (topic, index) = (partition.topic.to_string(), partition.index);
    let made = shard.node.controller().run(move |s| async move { s.controller().renew(&topic, index).await });
    if made.await.is_err() {
        tracing::debug!(partition = index, "the broker stops");
    }
}

/// What another broker says of its replica. As a leader: does what is next for it; as a follower of a leader whose log is damaged:
/// stands for election.
pub(super) async fn answer(node: &Node, from: i32, mut body: Bytes) -> Answered {
    let failed = |code: ErrorCode| Answered { code: code.0, body: Bytes::new() };
    if body.len() != 9 && body.len() != 25 {
        return failed(ErrorCode::INVALID_REQUEST);
    }
    let (group_id, is_damaged) = (body.get_u64(), body.get_u8() != 0);
    let directory_id = (body.len() == 16).then(|| Uuid::from_u128(body.get_u128()));
    if group_id == METADATA_GROUP {
        // A copy of a node's directory is not that node: whose vote would go while it has its log.
        let image = node.image.load();
        let known = image.nodes.get(&from).map(|record| record.directory_id);
        if !is_damaged || directory_id.is_none() || directory_id != known {
            return failed(ErrorCode::CLUSTER_AUTHORIZATION_FAILED);
        }
    }
    let done = node.shards[node.shard_of(group_id)]
        .run(move |shard| async move {
            let partition = shard.partition(group_id)?;
            mend(&shard, &partition, from, is_damaged).await
        })
        .await;
    match done {
        Ok(Some(said)) => Answered { code: 0, body: Bytes::copy_from_slice(&[said]) },
        _ => failed(ErrorCode::NOT_LEADER_OR_FOLLOWER),
    }
}

async fn mend(shard: &Rc<Shard>, partition: &Rc<Partition>, from: i32, is_damaged: bool) -> Option<u8> {
    if !partition.is_leader() {
        if is_damaged && partition.raft_status().leadership.leader_id == raft_id(from) {
            // It says nothing to its followers any more, which may sleep.
            shard.node.leaders.hear_gone(partition.group_id, from);
            if partition.on_node_down(raft_id(from)) {
                partition.stay_awake();
                partition.advance();
            }
        }
        return None;
    }
    if is_damaged {
        // Whatever it had: it may have to stay as it is for long.
        partition.note_lost(raft_id(from));
    }
    // One that was deposed without knowing it would go by members of before.
    partition.confirm_leads().await.ok()?;
    let view = view_of(partition);
    let step = if partition.group_id == METADATA_GROUP {
        without_damaged(&view, from)
    } else {
        let info = partition.info_in(&shard.node.image.load()).cloned()?;
        let is_left_to_move = info.target.is_some() && !is_damaged;
        if is_left_to_move || !info.goal().contains(&from) {
            return Some(WAIT);
        }
        mending_step(&info, &view, from, is_damaged)
    };
    match step {
        Mending::Begin => Some(BEGIN),
        Mending::Wait(reason) => {
            tracing::debug!(topic = %partition.topic, partition = partition.index, node = from, %reason, "a replica waits for its log");
            Some(WAIT)
        }
        Mending::Done => Some(WAIT),
        Mending::Change { voters, learners } => {
            let (topic, index) = (&partition.topic, partition.index);
            tracing::info!(%topic, partition = index, node = from, ?voters, ?learners, "the members change for a replica that lost its log");
            let ids = |set: BTreeSet<i32>| set.into_iter().map(raft_id).collect();
            let target = Target { voters: ids(voters), learners: ids(learners) };
            if let Err(error) = partition.propose_membership(target) {
                tracing::debug!(%topic, partition = index, %error, "it is tried again");
            }
            Some(WAIT)
        }
    }
}
