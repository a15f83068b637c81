//! Leaders that hand over to another replica, wherever they are.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_metadata::admin::LeaderTransfer;
use flumen_protocol::error_code::ErrorCode;

use super::requests::{self, Answered};
use crate::node::Node;
use crate::partition::raft_id;

/// Has the leader of a partition begin to hand over. Whether it comes to that shows in who leads.
pub async fn hand_over(node: &Node, transfer: &LeaderTransfer) -> Result<(), ErrorCode> {
    let (group_id, to) = (transfer.group_id, raft_id(transfer.to));
    if transfer.from == node.config.node_id {
        return here(node, group_id, to).await;
    }
    let mut body = BytesMut::with_capacity(16);
    body.put_u64(group_id);
    body.put_u64(to);
    let (from, body) = (transfer.from, body.freeze());
    let asked = node
        .controller()
        .run(move |shard| async move { shard.links.ask(from, requests::HAND_OVER, body).await })
        .await;
    match asked {
        Ok(Ok(Answered { code: 0, .. })) => Ok(()),
        Ok(Ok(Answered { code, .. })) => Err(ErrorCode(code)),
        Ok(Err(_)) | Err(_) => Err(ErrorCode::BROKER_NOT_AVAILABLE),
    }
}

async fn here(node: &Node, group_id: u64, to: u64) -> Result<(), ErrorCode> {
    node.shards[node.shard_of(group_id)]
        .run(move |shard| async move {
            let partition = shard.partition(group_id).ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
            partition.transfer_leader(to).map_err(|_| ErrorCode::NOT_LEADER_OR_FOLLOWER)
        })
        .await
        .map_err(|_| ErrorCode::BROKER_NOT_AVAILABLE)?
}

/// What another node asked for.
pub(super) async fn answer(node: &Node, mut body: &[u8]) -> Answered {
    let outcome = if body.len() == 16 {
        here(node, body.get_u64(), body.get_u64()).await
    } else {
        Err(ErrorCode::INVALID_REQUEST)
    };
    Answered { code: outcome.err().map_or(0, |code| code.0), body: Bytes::new() }
}
