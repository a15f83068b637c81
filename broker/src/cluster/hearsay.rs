//! What is known of nodes that this one does not hear, and others do: that they run, and what they lead.
//!
//! Two nodes may be cut off from each other and not from the third, nor from clients. Clients that ask one of the two are to be
//! sent to the other all the same; without this they would hear that it is down and that nobody leads what it leads, and
//! librdkafka stays with whom it asked. Runs on the controller's shard. Nothing but answers to clients comes of it: replicas,
//! placement and balancing go by whom this node hears itself.

use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;

use super::leaders::Led;
use super::requests::{self, Answered};
use crate::node::Node;
use crate::shard::Shard;

/// How often the others are asked, while there is a node that is not heard.
const INTERVAL: Duration = Duration::from_millis(500);
/// Group u64, epoch i32, number of replicas that are behind u32; then their ids, i32.
const LED_BYTES_MIN: usize = 16;
/// In one answer; who leads more than that is known in part.
const LED_MAX: usize = 200_000;
/// As many as a partition may have replicas, and a good deal more.
const LAGGING_MAX: usize = 64;

/// Runs for as long as a broker in a cluster.
pub async fn gather(shard: Rc<Shard>) {
    let node = shard.node.clone();
    let Some(cluster) = &node.cluster else { return };
    while !shard.is_stopping() {
        tokio::time::sleep(INTERVAL).await;
        let ids: Vec<i32> = node.image.load().nodes.keys().copied().collect();
        let (heard, unheard): (Vec<i32>, Vec<i32>) = ids
            .into_iter()
            .filter(|id| *id != node.config.node_id)
            .partition(|id| cluster.members.is_up(*id));
        for of in unheard {
            for teller in &heard {
                let mut question = BytesMut::new();
                question.put_i32(of);
                let told = shard.links.ask(*teller, requests::HEARSAY, question.freeze()).await;
                let leads = match told {
                    Ok(Answered { code: 0, body }) => decode(body),
                    _ => None,
                };
                cluster.members.note_told(*teller, of, leads.is_some());
                for led in leads.into_iter().flatten() {
                    node.leaders.hear(led.group_id, of, led.epoch, led.lagging);
                }
            }
        }
    }
}

/// What the node that is named leads, if this one hears it.
pub(super) fn answer(node: &Node, mut body: Bytes) -> Answered {
    let failed = |code: ErrorCode| Answered { code: code.0, body: Bytes::new() };
    let Ok(of) = body.try_get_i32() else { return failed(ErrorCode::INVALID_REQUEST) };
    let is_heard = node.cluster.as_ref().is_some_and(|cluster| cluster.members.is_up(of));
    if !is_heard {
        return failed(ErrorCode::BROKER_NOT_AVAILABLE);
    }
    Answered { code: 0, body: encode(&node.leaders.led_by(of)) }
}

fn encode(leads: &[Led]) -> Bytes {
    let mut out = BytesMut::with_capacity(leads.len().min(LED_MAX) * LED_BYTES_MIN);
    for led in leads.iter().take(LED_MAX) {
        out.put_u64(led.group_id);
        out.put_i32(led.epoch);
        let lagging = &led.lagging[..led.lagging.len().min(LAGGING_MAX)];
        out.put_u32(u32::try_from(lagging.len()).expect("a few"));
        lagging.iter().for_each(|id| out.put_i32(*id));
    }
    out.freeze()
}

fn decode(mut body: Bytes) -> Option<Vec<Led>> {
    let mut leads = Vec::with_capacity((body.len() / LED_BYTES_MIN).min(LED_MAX));
    while body.has_remaining() {
        let (group_id, epoch) = (body.try_get_u64().ok()?, body.try_get_i32().ok()?);
        let count = usize::try_from(body.try_get_u32().ok()?).ok().filter(|count| *count <= LAGGING_MAX)?;
        let lagging = (0..count).map(|_| body.try_get_i32().ok()).collect::<Option<Vec<i32>>>()?;
        leads.push(Led { group_id, epoch, lagging });
    }
    Some(leads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_comes_back_whole_or_not_at_all() {
        let leads = vec![
            Led { group_id: 7, epoch: 3, lagging: vec![] },
            Led { group_id: u64::MAX, epoch: 0, lagging: vec![2, 5] },
        ];
        let body = encode(&leads);
        assert_eq!(decode(body.clone()), Some(leads));
        assert_eq!(decode(Bytes::new()), Some(vec![]));
        let whole = [0, LED_BYTES_MIN, body.len()];
        for cut in (0..=body.len()).filter(|cut| !whole.contains(cut)) {
            assert_eq!(decode(body.slice(..cut)), None, "{cut}");
        }
        let mut endless = BytesMut::new();
        endless.put_u64(1);
        endless.put_i32(1);
        endless.put_u32(u32::MAX);
        assert_eq!(decode(endless.freeze()), None);
    }
}
