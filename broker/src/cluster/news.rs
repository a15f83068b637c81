//! Tells the other nodes what this one leads and which replicas are behind, whenever that changes. Runs on the controller's
//! shard, whose links also tell everything when a connection begins; each shard looks at its own replicas (`watch`).

use std::rc::Rc;
use std::time::Duration;

use super::leaders::News;
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
/// Groups looked at before requests go first.
const GROUPS_PER_TURN: usize = 64;

/// Looks which replicas of the groups of this shard are behind.
pub async fn watch(shard: Rc<Shard>) {
    while !shard.is_stopping() {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let is_up = shard.node.is_up();
        for (at, partition) in shard.partitions().into_iter().enumerate() {
            if at % GROUPS_PER_TURN == GROUPS_PER_TURN - 1 {
                tokio::task::yield_now().await;
            }
            if partition.is_leader() {
                partition.look_at_followers(&is_up);
            }
        }
    }
}
