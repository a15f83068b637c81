//! The port for brokers: who connects is heard for one frame, judged, and handed to the shard that serves it.
//!
//! Runs on the main thread. What does not speak the protocol gets no byte back; a broker that may not come in is told why.
//! Who asks without naming a cluster is answered who this is (`requests::WHO`) and nothing else: that is how clusters come
//! about. It serves no member before the node is ready to (`Rpc::serve`).
//!
//! Bounds: `GREETING_MAX` connections that have not said who they are, each for `GREETING_TIME_MAX` and one small frame.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flumen_peer::{
    Answer, Frame, HELLO_BODY_MAX, Hello, Refusal, RefusalCode, Request, VERSION_MAX, VERSION_MIN, negotiate,
};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::bootstrap::{Presence, Standing, State};
use super::wire::{FrameReader, LinkError, write_frame};
use super::{inbound, node_id_of, requests};
use crate::node::Node;
use crate::partition::raft_id;

const GREETING_MAX: usize = 64;
const GREETING_TIME_MAX: Duration = Duration::from_secs(5);
/// Waiting after a failed accept, so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What the port says of this process: first as one that looks for a cluster, then as a member.
pub struct Rpc {
    own: Mutex<Presence>,
    node: OnceLock<Arc<Node>>,
}

impl Rpc {
    pub fn new(own: Presence) -> Arc<Rpc> {
        Arc::new(Rpc { own: Mutex::new(own), node: OnceLock::new() })
    }

    pub fn set_state(&self, state: State) {
        self.own.lock().expect("no panic under this lock").state = state;
    }

    /// What this node knows of the cluster is no older than its process.
    pub fn set_current(&self) {
        let mut own = self.own.lock().expect("no panic under this lock");
        if let State::Member { standing, .. } = &mut own.state {
            *standing = Standing::Current;
        }
    }

    /// From here on members are served.
    pub fn serve(&self, node: Arc<Node>) {
        let _ = self.node.set(node);
    }

    fn presence(&self) -> Presence {
        let mut own = self.own.lock().expect("no panic under this lock").clone();
        if let Some(node) = self.node.get()
            && let State::Member { nodes, .. } = &mut own.state
        {
            *nodes = node.image.load().nodes.keys().copied().collect();
        }
        own
    }
}

pub async fn accept(rpc: Arc<Rpc>, listener: TcpListener) {
    let greetings = Arc::new(Semaphore::new(GREETING_MAX));
    loop {
        // Whoever waits here waits in the kernel's queue, which is bounded too.
        let Ok(permit) = greetings.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "could not accept a broker's connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let rpc = rpc.clone();
        tokio::spawn(async move {
            let _permit = permit;
            match timeout(GREETING_TIME_MAX, greet(&rpc, stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error @ LinkError::Frame(_))) => {
                    tracing::warn!(%from, %error, "connection to the port for brokers closed")
                }
                Ok(Err(error)) => tracing::debug!(%from, %error, "connection to the port for brokers closed"),
                Err(_) => tracing::debug!(%from, "it did not say who it is in time"),
            }
        });
    }
}

async fn greet(rpc: &Rpc, stream: TcpStream) -> Result<(), LinkError> {
    stream.set_nodelay(true)?;
    let (mut reads, writes) = stream.into_split();
    let mut reader = FrameReader::new(BytesMut::new());
    let Frame::Hello(theirs) = reader.next_frame(&mut reads, HELLO_BODY_MAX).await? else {
        return Err(LinkError::Unexpected("something other than a hello"));
    };
    if theirs.cluster_id == [0; 16] {
        return tell_who(rpc, &mut reader, &mut reads, &writes).await;
    }
    // One that is not ready hears nothing: whoever is a member tries again.
    let Some(node) = rpc.node.get() else {
        return Err(LinkError::Unexpected("a member, before there is a node"));
    };
    match admit(node, &theirs) {
        Err(refusal) => {
            tracing::warn!(node = node_id_of(theirs.node_id), address = %theirs.address, %refusal, "a broker was refused");
            write_frame(&writes, &Frame::Refusal(refusal.clone()), 0).await?;
            Err(refusal.into())
        }
        Ok((peer, ours)) => {
            let shard = usize::from(theirs.shard) % node.shards.len();
            let outcome = hand_over(node, shard, peer, ours, reader, reads, writes).await;
            if outcome.is_err() {
                inbound::left(node, peer).await;
            }
            outcome
        }
    }
}

/// Whether a broker may come in. It counts as connected from here on.
fn admit(node: &Node, theirs: &Hello) -> Result<(inbound::Sender, Hello), Refusal> {
    let Some(cluster) = &node.cluster else {
        return Err(Refusal {
            code: RefusalCode::OtherCluster,
            sentence: "this broker is alone".to_string(),
        });
    };
    let image = node.image.load();
    let ours = cluster.hello(0, image.finalized_version);
    let version = negotiate(&ours, theirs)?;
    let node_id = node_id_of(theirs.node_id).ok_or_else(|| Refusal {
        code: RefusalCode::UnknownNode,
        sentence: format!("{} is no node id", theirs.node_id),
    })?;
    cluster.members.arrive(node_id, theirs.boot_id).map_err(|_| Refusal {
        code: RefusalCode::SameNode,
        sentence: format!(
            "another process is connected as node {node_id} (this one says it is at {}); stop one of them, or start it with an \
             empty data directory and another --node-id",
            theirs.address
        ),
    })?;
    Ok((inbound::Sender { node_id, boot_id: theirs.boot_id, version }, ours))
}

async fn hand_over(
    node: &Arc<Node>,
    shard: usize,
    peer: inbound::Sender,
    ours: Hello,
    reader: FrameReader,
    reads: OwnedReadHalf,
    writes: OwnedWriteHalf,
) -> Result<(), LinkError> {
    write_frame(&writes, &Frame::Hello(ours), 0).await?;
    let stream = reads.reunite(writes).map_err(|_| LinkError::Closed)?.into_std()?;
    let rest = reader.into_rest();
    node.shards[shard]
        .post(move |shard| inbound::start(shard, stream, rest, peer))
        .await
        .map_err(|_| LinkError::Closed)
}

async fn tell_who(
    rpc: &Rpc,
    reader: &mut FrameReader,
    reads: &mut OwnedReadHalf,
    writes: &OwnedWriteHalf,
) -> Result<(), LinkError> {
    let presence = rpc.presence();
    write_frame(writes, &Frame::Hello(stranger(&presence)), 0).await?;
    match reader.next_frame(reads, HELLO_BODY_MAX).await? {
        Frame::Request(Request { id, kind: requests::WHO, .. }) => {
            let body = Bytes::from(serde_json::to_vec(&presence).map_err(std::io::Error::other)?);
            write_frame(writes, &Frame::Answer(Answer { id, code: 0, body }), VERSION_MIN).await
        }
        _ => Err(LinkError::Unexpected("something other than a question")),
    }
}

/// The hello of one that names no cluster.
pub fn stranger(presence: &Presence) -> Hello {
    Hello {
        cluster_id: [0; 16],
        node_id: raft_id(presence.node_id),
        boot_id: presence.boot_id,
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        finalized_version: 0,
        format: super::DATA_FORMAT,
        shard: 0,
        address: String::new(),
    }
}
