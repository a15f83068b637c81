//! What leaders tell their followers beside entries: where the log begins, and below which offset every replica has all of it.
//!
//! Neither is part of the Raft log. The first lets records go on followers that a client deleted on the leader; the second
//! lets followers compact, which loses the indexes by which other replicas could be sent what they lack. Who does not hear it
//! keeps more than it needs, until it is told again.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;
use tokio::time::MissedTickBehavior;

use super::requests::{self, Answered};
use crate::node::Node;
use crate::shard::Shard;

/// What has changed is told this often, and everything every so many times, for those who missed it.
const INTERVAL: Duration = Duration::from_secs(1);
const ALL_EVERY: u32 = 30;
/// group u64, epoch i32, log start i64, everywhere i64.
const FLOOR_BYTES: usize = 28;
/// In one request, well below what one may have.
const FLOORS_MAX: usize = 50_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    pub log_start: i64,
    /// All replicas have everything below.
    pub everywhere: i64,
}

/// Runs for as long as the shard of a broker in a cluster.
pub async fn keep_told(shard: Rc<Shard>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut round = 0u32;
    while !shard.is_stopping() {
        // Only time counts: whoever deletes often neither hastens nor delays that everything is told.
        let all = tokio::select! {
            biased;
            _ = ticks.tick() => {
                round = round.wrapping_add(1);
                round.is_multiple_of(ALL_EVERY)
            }
            () = shard.floors_changed.notified() => false,
        };
        let mut told: BTreeMap<i32, Vec<(u64, i32, Floor)>> = BTreeMap::new();
        for partition in shard.partitions() {
            if let Some((epoch, floor)) = partition.floor_to_tell(all) {
                for node_id in partition.followers() {
                    told.entry(node_id).or_default().push((partition.group_id, epoch, floor));
                }
            }
        }
        for (node_id, floors) in told {
            for some in floors.chunks(FLOORS_MAX) {
                // One that is away hears it when everything is told again.
                let _ = shard.links.ask(node_id, requests::FLOORS, encode(some)).await;
            }
        }
    }
}

fn encode(floors: &[(u64, i32, Floor)]) -> Bytes {
    let mut out = BytesMut::with_capacity(floors.len() * FLOOR_BYTES);
    for (group_id, epoch, floor) in floors {
        out.put_u64(*group_id);
        out.put_i32(*epoch);
        out.put_i64(floor.log_start);
        out.put_i64(floor.everywhere);
    }
    out.freeze()
}

fn decode(mut body: Bytes) -> Option<Vec<(u64, i32, Floor)>> {
    if !body.len().is_multiple_of(FLOOR_BYTES) {
        return None;
    }
    let mut floors = Vec::with_capacity(body.len() / FLOOR_BYTES);
    while body.has_remaining() {
        let (group_id, epoch) = (body.get_u64(), body.get_i32());
        floors.push((group_id, epoch, Floor { log_start: body.get_i64(), everywhere: body.get_i64() }));
    }
    Some(floors)
}

pub(super) async fn answer(node: &Node, body: Bytes) -> Answered {
    let Some(floors) = decode(body) else {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    };
    let mut by_shard: Vec<Vec<(u64, i32, Floor)>> = vec![Vec::new(); node.shards.len()];
    for floor in floors {
        by_shard[node.shard_of(floor.0)].push(floor);
    }
    for (home, floors) in by_shard.into_iter().enumerate().filter(|(_, floors)| !floors.is_empty()) {
        let heard = move |shard: &Rc<Shard>| {
            for (group_id, epoch, floor) in floors {
                if let Some(partition) = shard.partition(group_id) {
                    partition.hear_floor(epoch, floor);
                }
            }
        };
        // An error means that this broker is stopping.
        let _ = node.shards[home].post(heard).await;
    }
    Answered { code: 0, body: Bytes::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_come_back_whole() {
        let floors = vec![
            (7, 3, Floor { log_start: 10, everywhere: 900 }),
            (u64::MAX, 0, Floor { log_start: 0, everywhere: i64::MAX }),
        ];
        let body = encode(&floors);
        assert_eq!(decode(body.clone()), Some(floors));
        assert_eq!(decode(body.slice(..FLOOR_BYTES + 1)), None);
    }
}
