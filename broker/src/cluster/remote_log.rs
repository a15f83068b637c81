//! Logs that other nodes lead or hold, for the broker's own parts: an export runs on one node, its partitions and its dead
//! letters lie anywhere.
//!
//! An append whose answer is lost may have happened: what is appended here is idempotent, and sent again.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;

use super::requests::{self, Answered, AskError};
use crate::export::append;
use crate::node::Node;
use crate::partition::{FetchError, FetchedSlice};

/// One read: a request of a follower's size, well below the largest frame.
const READ_BYTES_MAX: usize = 1 << 20;

/// What the leader of another partition read.
pub struct RemoteRead {
    pub high_watermark: i64,
    pub log_start_offset: i64,
    pub records: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("offset {offset} is outside {start} to {end}")]
    OutOfRange { offset: i64, start: i64, end: i64 },
    #[error("{0}")]
    NotNow(String),
}

fn not_now(reason: impl ToString) -> RemoteError {
    RemoteError::NotNow(reason.to_string())
}

/// The other node that leads the group; `None` when this one does, or there is no other.
fn led_elsewhere(node: &Node, group_id: u64) -> Option<i32> {
    node.cluster.as_ref()?;
    let (leader, _) = node.leaders.get(group_id)?;
    (leader >= 0 && leader != node.config.node_id).then_some(leader)
}

async fn ask(node: &Node, node_id: i32, kind: u16, body: Bytes) -> Result<Answered, RemoteError> {
    let asked = node
        .controller()
        .run(move |shard| async move { shard.links.ask(node_id, kind, body).await })
        .await
        .map_err(not_now)?;
    asked.map_err(|error| match error {
        AskError::NotSent => not_now(format!("node {node_id} is not connected")),
        AskError::Lost => not_now(format!("node {node_id} went away before it answered")),
    })
}

/// Appends a batch of the broker's own wherever its log is led. Returns its offset when it is committed.
pub async fn append_anywhere(node: &Arc<Node>, group_id: u64, batch: BytesMut) -> Result<i64, String> {
    let Some(leader) = led_elsewhere(node, group_id) else { return append(node, group_id, batch).await };
    let mut body = BytesMut::with_capacity(8 + batch.len());
    body.put_u64(group_id);
    body.put_slice(&batch);
    match ask(node, leader, requests::APPEND, body.freeze()).await.map_err(|e| e.to_string())? {
        Answered { code: 0, mut body } if body.len() == 8 => Ok(body.get_i64()),
        Answered { body, .. } => Err(String::from_utf8_lossy(&body).into_owned()),
    }
}

/// Reads a partition that this node does not hold, from its leader.
pub async fn read(
    node: &Node,
    group_id: u64,
    offset: i64,
    max_bytes: usize,
) -> Result<RemoteRead, RemoteError> {
    let leader = led_elsewhere(node, group_id).ok_or_else(|| not_now("nobody is known to lead it"))?;
    let mut body = BytesMut::with_capacity(20);
    body.put_u64(group_id);
    body.put_i64(offset);
    body.put_u32(u32::try_from(max_bytes.min(READ_BYTES_MAX)).unwrap_or(u32::MAX));
    let Answered { code, mut body } = ask(node, leader, requests::READ, body.freeze()).await?;
    match ErrorCode(code) {
        ErrorCode::NONE if body.len() >= 16 => {
            let (high_watermark, log_start_offset) = (body.get_i64(), body.get_i64());
            Ok(RemoteRead { high_watermark, log_start_offset, records: body })
        }
        ErrorCode::OFFSET_OUT_OF_RANGE if body.len() == 16 => {
            Err(RemoteError::OutOfRange { offset, start: body.get_i64(), end: body.get_i64() })
        }
        _ => Err(not_now(String::from_utf8_lossy(&body))),
    }
}

/// Tells the other nodes that hold the group that everything below `offset` is exported. One that does not hear it keeps
/// more than it needs, until the next time.
pub async fn let_go(node: &Node, group_id: u64, holders: &[i32], offset: i64) {
    for holder in holders.iter().filter(|id| **id != node.config.node_id) {
        let mut body = BytesMut::with_capacity(16);
        body.put_u64(group_id);
        body.put_i64(offset);
        if let Err(error) = ask(node, *holder, requests::LET_GO, body.freeze()).await {
            tracing::debug!(group_id, holder, %error, "what is exported could not be told");
        }
    }
}

pub(super) async fn answer_append(node: &Arc<Node>, mut body: Bytes) -> Answered {
    if body.len() <= 8 {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    }
    let group_id = body.get_u64();
    match append(node, group_id, BytesMut::from(&body[..])).await {
        Ok(offset) => Answered { code: 0, body: Bytes::copy_from_slice(&offset.to_be_bytes()) },
        Err(reason) => Answered { code: ErrorCode::NOT_LEADER_OR_FOLLOWER.0, body: reason.into() },
    }
}

pub(super) async fn answer_read(node: &Node, mut body: Bytes) -> Answered {
    if body.len() != 20 {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    }
    let (group_id, offset, max_bytes) = (body.get_u64(), body.get_i64(), body.get_u32());
    let max_bytes = usize::try_from(max_bytes).unwrap_or(0).min(READ_BYTES_MAX);
    let read = node.shards[node.shard_of(group_id)]
        .run(move |shard| async move {
            let partition = shard.partition(group_id).filter(|partition| partition.serves())?;
            Some(partition.fetch(offset, max_bytes).await)
        })
        .await;
    let refused = |code: ErrorCode, reason: String| Answered { code: code.0, body: reason.into() };
    match read {
        Ok(Some(Ok(slice))) => Answered { code: 0, body: written(&slice) },
        Ok(Some(Err(FetchError::OutOfRange { start, end, .. }))) => {
            let range = [start.to_be_bytes(), end.to_be_bytes()].concat();
            Answered { code: ErrorCode::OFFSET_OUT_OF_RANGE.0, body: range.into() }
        }
        Ok(Some(Err(error))) => refused(error.code(), error.to_string()),
        Ok(None) => {
            refused(ErrorCode::NOT_LEADER_OR_FOLLOWER, "this node does not lead the partition".into())
        }
        Err(stopped) => refused(ErrorCode::BROKER_NOT_AVAILABLE, stopped.to_string()),
    }
}

fn written(slice: &FetchedSlice) -> Bytes {
    let length = slice.records.iter().map(Bytes::len).sum::<usize>();
    let mut out = BytesMut::with_capacity(16 + length);
    out.put_i64(slice.high_watermark);
    out.put_i64(slice.log_start_offset);
    slice.records.iter().for_each(|run| out.put_slice(run));
    out.freeze()
}

pub(super) async fn answer_let_go(node: &Node, mut body: Bytes) -> Answered {
    if body.len() != 16 {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    }
    let (group_id, offset) = (body.get_u64(), body.get_i64());
    let _ = node.shards[node.shard_of(group_id)]
        .post(move |shard| {
            if let Some(partition) = shard.partition(group_id) {
                partition.set_hold_offset(offset);
            }
        })
        .await;
    Answered { code: 0, body: Bytes::new() }
}
