//! What a shard says to the other nodes: one connection to each, kept up for as long as the metadata names the node.
//!
//! Carries, in this order: who leads what, requests, Raft's messages. Messages of many groups share a frame, and their
//! payloads are written from where they lie.
//!
//! Bounds: Raft's messages by the shard's outbox; requests by `requests::UNANSWERED_MAX`; who leads what by the groups that
//! this node leads. What waited for a connection that was not there is thrown away when one comes: Raft says it again.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flumen_peer::{BODY_MAX, Frame, HELLO_BODY_MAX, LEADS_MAX, Lead, RaftFrame, Request, negotiate};
use flumen_raft::{Body, Message};
use futures_util::future::LocalBoxFuture;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use super::leaders::Led;
use super::requests::{ANSWER_TIME_MAX, Answered, AskError, REQUEST_BYTES_MAX, UNANSWERED_MAX};
use super::stream::{Reads, Stream, Writes};
use super::wire::{ALIVE_INTERVAL, FrameReader, LinkError, write_frame};
use super::{Cluster, node_id_of};
use crate::partition::raft_id;
use crate::shard::Shard;

const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
/// Between attempts to connect: short at first, so that a broker that was started again is back at once.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);
/// Payloads in one frame. Heartbeats of other groups need not wait long behind it.
const FRAME_BYTES: usize = 1 << 20;

pub struct Link {
    node_id: i32,
    address: RefCell<String>,
    connected: Cell<bool>,
    requests: RefCell<VecDeque<Request>>,
    asked: RefCell<HashMap<u64, oneshot::Sender<Answered>>>,
    next_id: Cell<u64>,
    untold: RefCell<BTreeMap<u64, Led>>,
    /// Something is to be sent, or the link is to end.
    wake: Notify,
    ended: Cell<bool>,
    /// Why the last attempt failed, so that it is logged once.
    failure: RefCell<String>,
    /// The last attempt failed as the other node does not want this one.
    refused: Cell<bool>,
}

/// Carries requests where there are no connections: in a simulation, which has a network of its own.
pub trait Carrier {
    fn ask(
        &self,
        node_id: i32,
        kind: u16,
        body: Bytes,
    ) -> LocalBoxFuture<'static, Result<Answered, AskError>>;
}

#[derive(Default)]
pub struct Links {
    links: RefCell<BTreeMap<i32, Rc<Link>>>,
    carrier: OnceCell<Box<dyn Carrier>>,
}

impl Links {
    /// Once, and instead of `set`.
    pub fn carry_by(&self, carrier: Box<dyn Carrier>) {
        assert!(self.carrier.set(carrier).is_ok(), "requests have one carrier");
    }

    pub fn are_carried(&self) -> bool {
        self.carrier.get().is_some()
    }

    /// Makes the links those to these nodes.
    pub fn set(&self, shard: &Rc<Shard>, addresses: &BTreeMap<i32, String>) {
        let mut links = self.links.borrow_mut();
        links.retain(|node_id, link| {
            let stays = addresses.contains_key(node_id);
            if !stays {
                link.ended.set(true);
                link.wake.notify_one();
            }
            stays
        });
        for (node_id, address) in addresses {
            if let Some(link) = links.get(node_id) {
                // A connection that holds is to the right process; the address counts for the next.
                link.address.replace(address.clone());
                continue;
            }
            let link = Rc::new(Link::new(*node_id, address.clone()));
            links.insert(*node_id, link.clone());
            tokio::task::spawn_local(keep(shard.clone(), link));
        }
    }

    pub fn connected(&self) -> Vec<i32> {
        self.links.borrow().values().filter(|link| link.connected.get()).map(|link| link.node_id).collect()
    }

    /// A node is there: no more waiting before the next attempt to connect to it.
    pub fn nudge(&self, node_id: i32) {
        if let Some(link) = self.links.borrow().get(&node_id)
            && !link.connected.get()
        {
            link.wake.notify_one();
        }
    }

    /// Why this node is not wanted, when every node of the cluster says so.
    pub fn refusal(&self) -> Option<String> {
        let links = self.links.borrow();
        let all = !links.is_empty() && links.values().all(|link| link.refused.get());
        links.values().next().filter(|_| all).map(|link| link.failure.borrow().clone())
    }

    /// Tells everybody who is connected that this node leads these groups.
    pub fn tell(&self, leads: &[Led]) {
        for link in self.links.borrow().values().filter(|link| link.connected.get()) {
            link.untold.borrow_mut().extend(leads.iter().map(|led| (led.group_id, led.clone())));
            link.wake.notify_one();
        }
    }

    /// Asks a node, and waits for what it answers.
    pub async fn ask(&self, node_id: i32, kind: u16, body: Bytes) -> Result<Answered, AskError> {
        if let Some(carrier) = self.carrier.get() {
            return carrier.ask(node_id, kind, body).await;
        }
        let link = self.links.borrow().get(&node_id).cloned().ok_or(AskError::NotSent)?;
        link.ask(kind, body).await
    }
}

impl Link {
    fn new(node_id: i32, address: String) -> Link {
        Link {
            node_id,
            address: RefCell::new(address),
            connected: Cell::new(false),
            requests: RefCell::default(),
            asked: RefCell::default(),
            next_id: Cell::new(1),
            untold: RefCell::default(),
            wake: Notify::new(),
            ended: Cell::new(false),
            failure: RefCell::default(),
            refused: Cell::new(false),
        }
    }

    async fn ask(&self, kind: u16, body: Bytes) -> Result<Answered, AskError> {
        if !self.connected.get()
            || self.asked.borrow().len() >= UNANSWERED_MAX
            || body.len() > REQUEST_BYTES_MAX
        {
            return Err(AskError::NotSent);
        }
        let id = self.next_id.replace(self.next_id.get() + 1);
        let (answer, answered) = oneshot::channel();
        self.asked.borrow_mut().insert(id, answer);
        self.requests.borrow_mut().push_back(Request { id, kind, body });
        self.wake.notify_one();
        let outcome = timeout(ANSWER_TIME_MAX, answered).await;
        self.asked.borrow_mut().remove(&id);
        match outcome {
            Ok(Ok(answered)) => Ok(answered),
            Ok(Err(_)) | Err(_) => Err(AskError::Lost),
        }
    }

    /// Nothing of what was asked will be answered.
    fn disconnect(&self) {
        self.connected.set(false);
        self.asked.borrow_mut().clear();
        self.requests.borrow_mut().clear();
        self.untold.borrow_mut().clear();
    }
}

/// Connects again and again until the link is to end.
async fn keep(shard: Rc<Shard>, link: Rc<Link>) {
    let mut back_off = BACK_OFF_MIN;
    while !link.ended.get() && !shard.is_stopping() {
        match timeout(CONNECT_TIME_MAX, connect(&shard, &link)).await {
            Ok(Ok(connection)) => {
                back_off = BACK_OFF_MIN;
                link.failure.borrow_mut().clear();
                link.refused.set(false);
                let error = speak(&shard, &link, connection).await;
                link.disconnect();
                tracing::info!(node = link.node_id, shard = shard.id, %error, "connection to a broker ended");
                shard.on_node_down(raft_id(link.node_id));
            }
            Ok(Err(error)) => note_failure(&link, error.to_string(), matches!(error, LinkError::Refused(_))),
            Err(_) => {
                note_failure(&link, format!("no answer within {} s", CONNECT_TIME_MAX.as_secs()), false)
            }
        }
        drop(shard.outbox.take(raft_id(link.node_id)));
        if !link.ended.get() {
            let _ = timeout(back_off, link.wake.notified()).await;
            back_off = (back_off * 2).min(BACK_OFF_MAX);
        }
    }
}

fn note_failure(link: &Link, failure: String, refused: bool) {
    link.refused.set(refused);
    if *link.failure.borrow() != failure {
        tracing::warn!(node = link.node_id, address = %link.address.borrow(), failure, "cannot connect to a broker; trying again");
        link.failure.replace(failure);
    }
}

struct Connection {
    stream: Stream,
    reader: FrameReader,
    version: u16,
}

async fn connect(shard: &Shard, link: &Link) -> Result<Connection, LinkError> {
    let address = link.address.borrow().clone();
    let Some(cluster) = &shard.node.cluster else { return Err(LinkError::Closed) };
    let stream = Stream::connect(&address, cluster.tls.as_deref()).await?;
    let greeted = greet(shard, cluster, link, stream).await;
    greeted.map_err(|error| match &cluster.tls {
        Some(tls) => tls.explain(error, &format!("the broker at {address}")),
        None => error,
    })
}

async fn greet(
    shard: &Shard,
    cluster: &Cluster,
    link: &Link,
    mut stream: Stream,
) -> Result<Connection, LinkError> {
    let ours = cluster.hello(shard.id, shard.node.image.load().finalized_version);
    write_frame(&mut stream.writes, &Frame::Hello(ours.clone()), 0).await?;
    let mut reader = FrameReader::new(BytesMut::new());
    let theirs = match reader.next_frame(&mut stream.reads, HELLO_BODY_MAX).await? {
        Frame::Hello(theirs) => theirs,
        Frame::Refusal(refusal) => return Err(refusal.into()),
        _ => return Err(LinkError::Unexpected("something other than a hello")),
    };
    let version = negotiate(&ours, &theirs)?;
    if node_id_of(theirs.node_id) != Some(link.node_id) {
        return Err(LinkError::Unexpected("another node at its address"));
    }
    Ok(Connection { stream, reader, version })
}

async fn speak(shard: &Rc<Shard>, link: &Rc<Link>, connection: Connection) -> LinkError {
    let Connection { stream: Stream { mut reads, mut writes }, mut reader, version } = connection;
    drop(shard.outbox.take(raft_id(link.node_id)));
    link.connected.set(true);
    tracing::info!(node = link.node_id, shard = shard.id, "connected to a broker");
    if shard.id == crate::node::CONTROLLER_SHARD {
        let led = shard.node.leaders.led_here().into_iter();
        link.untold.borrow_mut().extend(led.map(|led| (led.group_id, led)));
    }
    let outcome = tokio::select! {
        outcome = send(shard, link, &mut writes, version) => outcome,
        outcome = take_answers(link, &mut reads, &mut reader) => outcome,
        () = shard.stop.notified() => Err(LinkError::Closed),
    };
    outcome.err().unwrap_or(LinkError::Closed)
}

async fn take_answers(link: &Link, reads: &mut Reads, reader: &mut FrameReader) -> Result<(), LinkError> {
    loop {
        match reader.next_frame(reads, BODY_MAX).await? {
            Frame::Answer(answer) => {
                // Whoever asked may have given up.
                if let Some(asked) = link.asked.borrow_mut().remove(&answer.id) {
                    let _ = asked.send(Answered { code: answer.code, body: answer.body });
                }
            }
            Frame::Alive { .. } => {}
            Frame::Refusal(refusal) => return Err(refusal.into()),
            _ => return Err(LinkError::Unexpected("a frame of a side that only answers")),
        }
    }
}

async fn send(shard: &Shard, link: &Link, writes: &mut Writes, version: u16) -> Result<(), LinkError> {
    let to = raft_id(link.node_id);
    let mut sequence = 0;
    let mut batch: VecDeque<Bytes> = VecDeque::new();
    while !link.ended.get() {
        collect_control(link, version, &mut batch);
        let messages = shard.outbox.take(to);
        if messages.is_empty() && batch.is_empty() {
            let woken = async {
                tokio::select! {
                    () = shard.outbox.wait(to) => {}
                    () = link.wake.notified() => {}
                }
            };
            if timeout(ALIVE_INTERVAL, woken).await.is_err() {
                sequence += 1;
                batch.extend(Frame::Alive { sequence }.encode(version));
                writes.write(&mut batch).await?;
            }
            continue;
        }
        for frame in raft_frames(shard.node.raft_id(), to, &messages) {
            batch.extend(Frame::Raft(frame).encode(version));
            writes.write(&mut batch).await?;
        }
        writes.write(&mut batch).await?;
    }
    Ok(())
}

fn collect_control(link: &Link, version: u16, batch: &mut VecDeque<Bytes>) {
    let untold = std::mem::take(&mut *link.untold.borrow_mut());
    let leads: Vec<Lead> = untold
        .into_iter()
        .filter_map(|(group, led)| {
            let lagging = led.lagging.into_iter().map(raft_id).collect();
            Some(Lead { group, epoch: u64::try_from(led.epoch).ok()?, lagging })
        })
        .collect();
    for part in leads.chunks(LEADS_MAX) {
        batch.extend(Frame::Leads(part.to_vec()).encode(version));
    }
    for request in link.requests.borrow_mut().drain(..) {
        batch.extend(Frame::Request(request).encode(version));
    }
}

/// The frames of what waits for a broker, oldest first.
pub fn raft_frames(from: u64, to: u64, messages: &[(u64, Message)]) -> Vec<RaftFrame> {
    let mut frames = Vec::new();
    let mut frame = RaftFrame::new(from, to);
    let mut bytes = 0;
    for (group_id, message) in messages {
        if bytes > FRAME_BYTES || !frame.push(*group_id, message) {
            frames.push(std::mem::replace(&mut frame, RaftFrame::new(from, to)));
            bytes = 0;
            // Into an empty frame everything fits.
            frame.push(*group_id, message);
        }
        bytes += payload_bytes(message);
    }
    if !frame.is_empty() {
        frames.push(frame);
    }
    frames
}

fn payload_bytes(message: &Message) -> usize {
    match &message.body {
        Body::Append { entries, .. } => entries.iter().map(|entry| entry.data.len()).sum(),
        Body::Snapshot { data, .. } => data.len(),
        _ => 0,
    }
}
