//! A node that is stopped hands over what it leads first, so that nobody waits for an election.
//!
//! Bounded: whoever cannot take over within `HAND_OVER_TIME_MAX` is found by an election, as after a crash.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::node::Node;
use crate::partition::Partition;
use crate::shard::Shard;

const HAND_OVER_TIME_MAX: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// A transfer that did not come about is asked for again.
const LOOKS_PER_ATTEMPT: u32 = 25;

pub async fn hand_over_everything(node: &Node) {
    let deadline = Instant::now() + HAND_OVER_TIME_MAX;
    let mut looks = 0;
    while Instant::now() < deadline {
        let begin = looks % LOOKS_PER_ATTEMPT == 0;
        let mut left = 0;
        for shard in &node.shards {
            left += shard.run(move |shard| async move { hand_over(&shard, begin) }).await.unwrap_or(0);
        }
        if left == 0 {
            return;
        }
        looks += 1;
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    tracing::info!("not everything could be handed over; elections find the other leaders");
}

/// How many partitions of this shard are still to be handed over.
fn hand_over(shard: &Rc<Shard>, begin: bool) -> usize {
    let mut left = 0;
    for partition in shard.partitions().into_iter().filter(|p| p.is_leader()) {
        let Some(to) = successor(shard, &partition) else { continue };
        left += 1;
        if begin {
            // A refusal means that it leads no more.
            let _ = partition.transfer_leader(to);
        }
    }
    left
}

/// The replica that has most, of those on nodes that run.
fn successor(shard: &Shard, partition: &Partition) -> Option<u64> {
    let up = shard.node.is_up();
    let own = shard.node.raft_id();
    let status = partition.raft_status();
    let able = status
        .peers
        .iter()
        .filter(|peer| peer.id != own && !peer.is_learner && super::node_id_of(peer.id).is_some_and(&up));
    able.max_by_key(|peer| peer.matched_index).map(|peer| peer.id)
}
