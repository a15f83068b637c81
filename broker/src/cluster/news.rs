//! Tells the other nodes what this one leads, whenever that changes. Runs on the controller's shard, whose links also tell
//! everything when a connection begins.

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
