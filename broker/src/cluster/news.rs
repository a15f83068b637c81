//! Tells the other nodes what this one leads and which replicas are behind, whenever that changes. Runs on the controller's
//! shard, whose links also tell everything when a connection begins; each shard looks at its own replicas (`watch`).

use std::rc::Rc;
use std::time::Duration;

use flumen_raft::PeerStatus;

use super::leaders::News;
use super::node_id_of;
use crate::partition::Partition;
use crate::shard::Shard;

/// After the first change others follow at once, when a broker starts or another dies; they go into one frame.
const GATHERING: Duration = Duration::from_millis(2);

pub async fn tell(shard: Rc<Shard>) {
    let leaders = &shard.node.leaders;
    while !shard.is_stopping() {
        leaders.news.notified().await;
        tokio::time::sleep(GATHERING).await;
        match leaders.take_news() {
            News::Of(leads) => shard.links.tell(&leads),
            News::Everything => shard.links.tell(&leaders.led_here()),
        }
    }
}

/// How often a leader looks whether its replicas keep up.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A replica that lacks at most so many entries is just getting them.
const ON_THE_WAY_MAX: u64 = 1000;
/// Groups looked at before requests go first.
const GROUPS_PER_TURN: usize = 64;

/// Looks which replicas of the groups of this shard are behind. All of a group that sleeps have everything.
pub async fn watch(shard: Rc<Shard>) {
    while !shard.is_stopping() {
        tokio::time::sleep(LOOK_INTERVAL).await;
        for (at, partition) in shard.partitions().into_iter().enumerate() {
            if at % GROUPS_PER_TURN == GROUPS_PER_TURN - 1 {
                tokio::task::yield_now().await;
            }
            if partition.is_leader() {
                let lagging = if partition.is_asleep() { Vec::new() } else { lagging(&partition) };
                shard.node.leaders.note_lagging(partition.group_id, partition.leader_epoch(), lagging);
            }
        }
    }
}

fn lagging(partition: &Partition) -> Vec<i32> {
    let status = partition.raft_status();
    // Whether it is heard of shows in its connections; Raft forgets at every election time-out who was.
    let behind = |peer: &&PeerStatus| peer.matched_index + ON_THE_WAY_MAX < status.committed_index;
    status.peers.iter().filter(behind).filter_map(|peer| node_id_of(peer.id)).collect()
}
