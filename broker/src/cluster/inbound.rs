//! What another broker says, on one connection of one of its shards, served on one shard here.
//!
//! Raft's messages go to the shards whose groups they are for: those of another shard take one mailbox message per frame.
//! Requests are answered beside them, in any order. The side that is spoken to shows that it lives, too.
//!
//! Bounds: `requests::UNANSWERED_MAX` requests at a time, each of `REQUEST_BYTES_MAX`; a full mailbox of a shard makes this
//! connection wait, and with it the sender.

use std::cell::Cell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use flumen_peer::{Answer, BODY_MAX, Frame, RaftFrame, Request};
use flumen_protocol::error_code::ErrorCode;
use flumen_raft::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::requests::{self, Answered};
use super::stream::{Detached, Reads, Stream, Writes};
use super::wire::{ALIVE_INTERVAL, FrameReader, LinkError, write_frame};
use super::{change, floors, hand_over, hearsay, joins, mending, node_id_of, pace, remote_log, room, ship};
use crate::dispatch;
use crate::net::connection::Peer;
use crate::node::Node;
use crate::partition::raft_id;
use crate::shard::Shard;

/// Who speaks, and in which version of the frames.
#[derive(Clone, Copy, Debug)]
pub struct Sender {
    pub node_id: i32,
    pub boot_id: u64,
    pub version: u16,
}

/// The connection is over: all shards hear of it, as their groups may sleep.
pub async fn left(node: &Arc<Node>, sender: Sender) {
    let Some(cluster) = &node.cluster else { return };
    cluster.members.leave(sender.node_id, sender.boot_id);
    for shard in &node.shards {
        let _ = shard.post(move |shard| shard.on_node_down(raft_id(sender.node_id))).await;
    }
}

pub fn start(shard: &Rc<Shard>, stream: Detached, rest: BytesMut, sender: Sender) {
    let shard = shard.clone();
    tokio::task::spawn_local(async move {
        for other in &shard.node.shards {
            let _ = other.post(move |shard| shard.links.nudge(sender.node_id)).await;
        }
        let attached = stream.peer_addr().and_then(|address| Ok((stream.attach()?, address)));
        let error = match attached {
            Ok((stream, address)) => serve(&shard, stream, address, rest, sender).await,
            Err(error) => error.into(),
        };
        tracing::info!(node = sender.node_id, shard = shard.id, %error, "a broker's connection ended");
        left(&shard.node, sender).await;
    });
}

async fn serve(
    shard: &Rc<Shard>,
    stream: Stream,
    address: SocketAddr,
    rest: BytesMut,
    sender: Sender,
) -> LinkError {
    let Stream { mut reads, mut writes } = stream;
    let (answers, to_send) = mpsc::channel(requests::UNANSWERED_MAX);
    let peer = Rc::new(Peer { address, forwarded: true });
    let outcome = tokio::select! {
        outcome = hear(shard, &mut reads, rest, sender, &peer, answers) => outcome,
        outcome = answer(&mut writes, to_send, sender.version) => outcome,
        () = shard.stop.notified() => Err(LinkError::Closed),
    };
    outcome.err().unwrap_or(LinkError::Closed)
}

async fn answer(
    writes: &mut Writes,
    mut answers: mpsc::Receiver<Answer>,
    version: u16,
) -> Result<(), LinkError> {
    let mut sequence = 0;
    loop {
        match timeout(ALIVE_INTERVAL, answers.recv()).await {
            Ok(Some(answer)) => writes.write(&mut frame_of(answer, version)).await?,
            Ok(None) => return Ok(()),
            Err(_) => {
                sequence += 1;
                write_frame(writes, &Frame::Alive { sequence }, version).await?;
            }
        }
    }
}

fn frame_of(answer: Answer, version: u16) -> VecDeque<Bytes> {
    Frame::Answer(answer).encode(version).into()
}

async fn hear(
    shard: &Rc<Shard>,
    reads: &mut Reads,
    rest: BytesMut,
    sender: Sender,
    peer: &Rc<Peer>,
    answers: mpsc::Sender<Answer>,
) -> Result<(), LinkError> {
    let mut reader = FrameReader::new(rest);
    let unanswered = Rc::new(Cell::new(0));
    loop {
        match reader.next_frame(reads, BODY_MAX).await? {
            Frame::Raft(raft) => deliver(shard, sender, &raft).await?,
            Frame::Alive { .. } | Frame::CatchUp(_) => {}
            Frame::Leads(leads) => {
                for lead in leads {
                    let epoch = i32::try_from(lead.epoch).map_err(|_| LinkError::Unexpected("an epoch"))?;
                    let lagging = lead.lagging.into_iter().filter_map(node_id_of).collect();
                    shard.node.leaders.hear(lead.group, sender.node_id, epoch, lagging);
                }
            }
            Frame::Request(request) => {
                serve_request(shard, sender, peer, request, &answers, &unanswered).await?
            }
            Frame::Hello(_) => return Err(LinkError::Unexpected("a hello")),
            Frame::Refusal(_) => return Err(LinkError::Unexpected("a refusal")),
            Frame::Answer(_) => return Err(LinkError::Unexpected("an answer")),
        }
    }
}

/// One that is not registered yet may ask to be, and nothing else; one that was removed has no say any more.
fn is_known(node: &Node, node_id: i32) -> bool {
    node.cluster.as_ref().is_some_and(|cluster| cluster.knows(&node.image.load(), node_id))
}

async fn deliver(shard: &Rc<Shard>, sender: Sender, raft: &RaftFrame) -> Result<(), LinkError> {
    let node = &shard.node;
    if node_id_of(raft.from) != Some(sender.node_id) || raft.to != node.raft_id() {
        return Err(LinkError::Unexpected("messages of other nodes"));
    }
    if !is_known(node, sender.node_id) {
        return Ok(());
    }
    let mut elsewhere: Vec<Vec<(u64, Message)>> = vec![Vec::new(); node.shards.len()];
    for item in raft.items() {
        let (group_id, message) = item?;
        match node.shard_of(group_id) {
            home if home == shard.id => shard.deliver(raft.from, group_id, message),
            home => elsewhere[home].push((group_id, message)),
        }
    }
    for (home, messages) in elsewhere.into_iter().enumerate().filter(|(_, messages)| !messages.is_empty()) {
        let from = raft.from;
        let job = move |shard: &Rc<Shard>| {
            messages.into_iter().for_each(|(group_id, message)| shard.deliver(from, group_id, message));
        };
        node.shards[home].post(job).await.map_err(|_| LinkError::Closed)?;
    }
    Ok(())
}

async fn serve_request(
    shard: &Rc<Shard>,
    sender: Sender,
    peer: &Rc<Peer>,
    request: Request,
    answers: &mpsc::Sender<Answer>,
    unanswered: &Rc<Cell<usize>>,
) -> Result<(), LinkError> {
    let id = request.id;
    if unanswered.get() >= requests::UNANSWERED_MAX || request.body.len() > requests::REQUEST_BYTES_MAX {
        let refused = Answer { id, code: ErrorCode::BROKER_NOT_AVAILABLE.0, body: Bytes::new() };
        return answers.send(refused).await.map_err(|_| LinkError::Closed);
    }
    unanswered.set(unanswered.get() + 1);
    let (shard, peer, answers, unanswered) =
        (shard.clone(), peer.clone(), answers.clone(), unanswered.clone());
    tokio::task::spawn_local(async move {
        let answered = carry_out(&shard, sender, &peer, request).await;
        unanswered.set(unanswered.get() - 1);
        // The asker may be gone.
        let _ = answers.send(Answer { id, code: answered.code, body: answered.body }).await;
    });
    Ok(())
}

/// What replicas ask each other; of the metadata that takes only what the image says of their partition.
pub async fn answer_of_replicas(node: &Node, from: i32, kind: u16, body: Bytes) -> Answered {
    match kind {
        requests::MEMBERS => joins::answer(node, body).await,
        requests::FLOORS => floors::answer(node, body).await,
        requests::HAND_OVER => hand_over::answer(node, &body).await,
        requests::PACE => pace::answer(node, body).await,
        requests::MEND => mending::answer(node, from, body).await,
        _ => Answered { code: ErrorCode::UNSUPPORTED_VERSION.0, body: Bytes::new() },
    }
}

// Two kinds of request with one number show here.
#[deny(unreachable_patterns)]
async fn carry_out(shard: &Rc<Shard>, sender: Sender, peer: &Peer, request: Request) -> Answered {
    let failed = |code: ErrorCode| Answered { code: code.0, body: Bytes::new() };
    let known = is_known(&shard.node, sender.node_id);
    match request.kind {
        requests::CHANGE => change::answer(&shard.node, &request.body, known).await,
        _ if !known => failed(ErrorCode::CLUSTER_AUTHORIZATION_FAILED),
        requests::KAFKA => {
            match dispatch::handle(shard, peer, BytesMut::from(&request.body[..])).await {
                Ok(dispatch::Answer::Ready(segments)) => Answered { code: 0, body: segments.concat().into() },
                // Produce and acks=0: no broker passes these on.
                Ok(_) => failed(ErrorCode::INVALID_REQUEST),
                Err(error) => {
                    tracing::debug!(%error, "a request that another broker passed on failed");
                    failed(ErrorCode::INVALID_REQUEST)
                }
            }
        }
        requests::METADATA => change::answer_metadata(&shard.node, !request.body.is_empty()).await,
        requests::APPEND => remote_log::answer_append(&shard.node, request.body).await,
        requests::READ => remote_log::answer_read(&shard.node, request.body).await,
        requests::LET_GO => remote_log::answer_let_go(&shard.node, request.body).await,
        requests::ROOM => room::answer(&shard.node, sender.node_id, &request.body),
        requests::HEARSAY => hearsay::answer(&shard.node, request.body),
        requests::SHIP => ship::answer(&shard.node, request.body).await,
        requests::MEMBERS | requests::FLOORS | requests::HAND_OVER | requests::PACE | requests::MEND => {
            answer_of_replicas(&shard.node, sender.node_id, request.kind, request.body).await
        }
        requests::STATUS => {
            let status = crate::cluster_view::own_status(&shard.node).await;
            Answered { code: 0, body: status.to_string().into() }
        }
        _ => failed(ErrorCode::UNSUPPORTED_VERSION),
    }
}
