//! A node whose disk is full gives up what it leads, as its producers would only be told to come again.
//!
//! It says so to the others, who then neither hand it a leadership nor move a replica to it, and hands over each partition to a
//! replica in sync on a node that has room; so it does with the metadata. It stands for election later than the others
//! (`flumen_raft::Group::set_reluctant`), but it votes: a vote needs no room that the log does not keep for it, and with two full
//! disks of three there would be no leader otherwise. What nobody can take over it keeps, as a node that runs alone does. When
//! there is room again it says so, and the leaderships that prefer it come back with the others that go home.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use flumen_metadata::NodeState;
use flumen_raft::Status;
use tokio::time::Instant;

use super::requests::{self, Answered};
use crate::node::Node;
use crate::shard::Shard;

/// How often a node looks whether it has to say something, or to hand something over.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// What has not changed is said again so often, for those who missed it.
const AGAIN: Duration = Duration::from_secs(1);
/// Whoever has not said it again for so long may be another process by now.
const COUNTS_FOR: Duration = Duration::from_secs(5);
/// Hand-overs in one look of a shard: each takes some messages, and makes its producers ask who leads.
const HAND_OVERS_MAX: usize = 256;

/// Who has no room.
#[derive(Debug, Default)]
pub struct Room {
    short: Mutex<BTreeMap<i32, Instant>>,
}

impl Room {
    fn hear(&self, node_id: i32, is_short: bool, now: Instant) {
        let mut short = self.short.lock().expect("no panic under this lock");
        if !is_short {
            short.remove(&node_id);
        } else if short.insert(node_id, now).is_none() {
            tracing::warn!(node = node_id, "the disk of another node is full");
        }
    }

    pub fn is_short(&self, node_id: i32, now: Instant) -> bool {
        let short = self.short.lock().expect("no panic under this lock");
        short.get(&node_id).is_some_and(|at| now.saturating_duration_since(*at) < COUNTS_FOR)
    }
}

/// Says to the others whether this node has room, for as long as it has not, and once afterwards. On the controller's shard.
pub async fn tell(shard: Rc<Shard>) {
    let mut told: Option<(bool, Instant)> = None;
    while !shard.is_stopping() {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let (low, now) = (shard.node.disk.is_low(), Instant::now());
        let due = match told {
            None => low,
            Some((said, _)) if said != low => true,
            Some((said, at)) => said && now.saturating_duration_since(at) >= AGAIN,
        };
        if !due {
            continue;
        }
        told = Some((low, now));
        for node_id in shard.links.connected() {
            let shard = shard.clone();
            tokio::task::spawn_local(async move {
                let body = Bytes::copy_from_slice(&[u8::from(low)]);
                // One that misses it hears it again, or forgets it.
                let _ = shard.links.ask(node_id, requests::ROOM, body).await;
            });
        }
    }
}

pub(super) fn answer(node: &Node, from: i32, body: &[u8]) -> Answered {
    if let [is_short] = body {
        node.room.hear(from, *is_short != 0, Instant::now());
    }
    Answered { code: 0, body: Bytes::new() }
}

/// Hands over what this shard leads while the disk is full.
pub async fn give_up(shard: Rc<Shard>) {
    while !shard.is_stopping() {
        tokio::time::sleep(LOOK_INTERVAL).await;
        if !shard.node.disk.is_low() {
            continue;
        }
        let able = able_to_lead(&shard.node);
        let mut left = HAND_OVERS_MAX;
        for partition in shard.partitions().into_iter().filter(|p| p.is_leader()) {
            let behind = partition.behind();
            let Some(to) = successor(&partition.raft_status(), partition.group_id, &able, &behind) else {
                continue;
            };
            if left == 0 {
                break;
            }
            left -= 1;
            tracing::debug!(topic = %partition.topic, partition = partition.index, to = to as i64 - 1, "the disk is full: another node is to lead this");
            // A refusal means that it leads no more.
            let _ = partition.transfer_leader(to);
        }
        if left < HAND_OVERS_MAX {
            let partitions = HAND_OVERS_MAX - left;
            tracing::info!(
                shard = shard.id,
                partitions,
                "the disk is full: other nodes are to lead what this one leads"
            );
        }
    }
}

/// Raft's ids of the other nodes that may be given something to lead.
fn able_to_lead(node: &Node) -> BTreeSet<u64> {
    let image = node.image.load();
    let (up, has_room) = (node.is_up(), node.has_room());
    let others = image.nodes.values().filter(|other| other.id != node.config.node_id);
    let able = others.filter(|other| other.state == NodeState::Active && up(other.id) && has_room(other.id));
    able.map(|other| crate::partition::raft_id(other.id)).collect()
}

/// A voter in sync that has room; different ones for different groups, so that no node gets everything. None while it is on its
/// way.
fn successor(status: &Status, group_id: u64, able: &BTreeSet<u64>, behind: &[u64]) -> Option<u64> {
    let members = &status.membership;
    let may = |id: &&u64| able.contains(id) && !behind.contains(id) && **id != status.leadership.leader_id;
    let candidates: Vec<u64> = members.voters.iter().filter(may).copied().collect();
    if members.is_joint() || candidates.is_empty() || status.transfer_to.is_some() {
        return None;
    }
    Some(candidates[(group_id % candidates.len() as u64) as usize])
}

#[cfg(test)]
mod tests {
    use flumen_raft::Membership;

    use super::*;
    use crate::partition::leading;

    #[test]
    fn who_says_nothing_any_more_has_room() {
        let room = Room::default();
        let start = Instant::now();
        room.hear(2, true, start);
        assert!(room.is_short(2, start + AGAIN) && !room.is_short(3, start));
        assert!(!room.is_short(2, start + COUNTS_FOR));
        room.hear(2, true, start + COUNTS_FOR);
        assert!(room.is_short(2, start + COUNTS_FOR));
        room.hear(2, false, start + COUNTS_FOR);
        assert!(!room.is_short(2, start + COUNTS_FOR));
    }

    #[test]
    fn whoever_is_in_sync_and_has_room_takes_over() {
        let membership = Membership { learners: vec![4], ..Membership::of_voters([1, 2, 3]) };
        let mut status = leading(1, 9, membership, Vec::new());
        let successor = |status: &Status, group_id, able: &[u64], behind: &[u64]| {
            successor(status, group_id, &able.iter().copied().collect(), behind)
        };
        assert_eq!(successor(&status, 6, &[2, 3, 4], &[]), Some(2));
        assert_eq!(successor(&status, 7, &[2, 3, 4], &[]), Some(3));
        assert_eq!(successor(&status, 7, &[2, 3, 4], &[3]), Some(2));
        assert_eq!(successor(&status, 7, &[4], &[]), None, "a learner cannot lead");
        assert_eq!(successor(&status, 7, &[2], &[2]), None);
        status.transfer_to = Some(2);
        assert_eq!(successor(&status, 7, &[2, 3], &[]), None, "it is on its way");
    }
}
