//! Fetches for a new replica, or one far behind, the records that its leader cannot send as entries, a piece at a time.
//!
//! One piece is asked for when the one before it is written, so that this takes the memory of two. What the leader compacts
//! meanwhile makes pieces of different logs, one of which might still have what the other has forgotten; then it begins again.
//! (It rarely does: leaders compact only what all replicas have.)

use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;
use flumen_storage::{ReceiveError, Received};
use tokio::time::{Instant, timeout};

use super::pace::{Direction, Limit, limit};
use super::requests::{self, Answered};
use crate::node::Node;
use crate::partition::{Offer, Partition};
use crate::shard::Shard;

/// One piece, unless one batch is larger: with two of them on the way for each partition that is fetched.
const PIECE_BYTES: usize = 1 << 20;
/// Before a leader that does not answer is asked again.
const PAUSE: Duration = Duration::from_millis(200);
/// A leader does not let a follower wait longer for a piece, which would ask for it again, than so.
const TURN_TIME_MAX: Duration = Duration::from_secs(10);
/// Of an answer: log start i64, term u64, compactions u64.
const HEAD_BYTES: usize = 24;

#[derive(Debug, thiserror::Error)]
enum FetchFailed {
    /// It is wanted no more, or another offer has come.
    #[error("another place is wanted")]
    NotWanted,
    #[error("the leader has it no longer as it offered it")]
    Gone,
    #[error("the leader compacted its log meanwhile")]
    Compacted,
    #[error(transparent)]
    Store(#[from] ReceiveError),
}

/// Runs until all is here, or it is given up.
pub(crate) async fn fetch(shard: Rc<Shard>, partition: Rc<Partition>, offer: Offer) {
    match try_fetch(&shard, &partition, &offer).await {
        Ok(received) => partition.fetched(&offer, received),
        Err(error) => {
            if !matches!(error, FetchFailed::NotWanted) {
                tracing::warn!(topic = %partition.topic, partition = partition.index, %error, "fetching a replica's records begins again");
            }
            partition.gave_up(&offer);
        }
    }
}

async fn try_fetch(
    shard: &Rc<Shard>,
    partition: &Rc<Partition>,
    offer: &Offer,
) -> Result<Received, FetchFailed> {
    let group_id = partition.group_id;
    let mut receiver = partition.log().receive(offer.log_start, offer.offset).await?;
    let mut stamp = None;
    while receiver.next_offset() < offer.offset {
        let here = shard.partition(group_id).is_some_and(|now| Rc::ptr_eq(&now, partition));
        if shard.is_stopping() || !here || !partition.still_wants(offer, receiver.next_offset()) {
            return Err(FetchFailed::NotWanted);
        }
        let mut body = BytesMut::with_capacity(24);
        body.put_u64(group_id);
        body.put_i64(receiver.next_offset());
        body.put_u64(offer.index);
        let Ok(Answered { code, mut body }) =
            shard.links.ask(offer.leader, requests::SHIP, body.freeze()).await
        else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        if code != 0 || body.len() < HEAD_BYTES {
            return Err(FetchFailed::Gone);
        }
        let (log_start, of) = (body.get_i64(), (body.get_u64(), body.get_u64()));
        if *stamp.get_or_insert(of) != of {
            return Err(FetchFailed::Compacted);
        }
        if log_start >= offer.offset {
            return Err(FetchFailed::Gone);
        }
        receiver.skip_to(log_start);
        if body.is_empty() {
            break;
        }
        let bytes = body.len();
        receiver.append(body).await?;
        let throttled = partition.throttled(Direction::Received);
        let limited = || limit(&shard.node, Direction::Received, &throttled, partition.index);
        let Limit { pace, rate, .. } = limited();
        pace.pay(Instant::now(), rate, bytes as i64);
        drop(pace.turn(|| limited().rate).await);
    }
    Ok(receiver.finish().await?)
}

pub(super) async fn answer(node: &Node, mut body: Bytes) -> Answered {
    if body.len() != 24 {
        return Answered { code: ErrorCode::INVALID_REQUEST.0, body: Bytes::new() };
    }
    let (group_id, from, index) = (body.get_u64(), body.get_i64(), body.get_u64());
    let piece = node.shards[node.shard_of(group_id)]
        .run(move |shard| async move {
            let partition = shard.partition(group_id)?;
            let throttled = partition.throttled(Direction::Sent);
            let limited = || limit(&shard.node, Direction::Sent, &throttled, partition.index);
            let Limit { pace, .. } = limited();
            let _turn = timeout(TURN_TIME_MAX, pace.turn(|| limited().rate)).await;
            let piece = partition.piece(from, index, PIECE_BYTES).await?;
            let bytes = piece.batches.iter().map(Bytes::len).sum::<usize>();
            pace.pay(Instant::now(), limited().rate, bytes as i64);
            Some(piece)
        })
        .await;
    match piece {
        Ok(Some(piece)) => {
            let length = piece.batches.iter().map(Bytes::len).sum::<usize>();
            let mut out = BytesMut::with_capacity(HEAD_BYTES + length);
            out.put_i64(piece.log_start);
            out.put_u64(piece.stamp.0);
            out.put_u64(piece.stamp.1);
            piece.batches.iter().for_each(|run| out.put_slice(run));
            Answered { code: 0, body: out.freeze() }
        }
        _ => Answered { code: ErrorCode::NOT_LEADER_OR_FOLLOWER.0, body: Bytes::new() },
    }
}
