//! The port for brokers: who connects is heard for one frame, judged, and handed to the shard that serves it.
//!
//! Runs on the main thread. What does not speak the protocol gets no byte back; a broker that may not come in is told why.
//! With certificates (`tls`) nothing is said before the other side has shown its own, but to a broker that has none: that.
//! Who asks without naming a cluster is answered who this is (`requests::WHO`) and nothing else: that is how clusters come
//! about. It serves no member before the node is ready to (`Rpc::serve`).
//!
//! Bounds: `GREETING_MAX` connections that have not said who they are, each for `GREETING_TIME_MAX`, with one TLS handshake
//! (bounded in `tls`) and one small frame; `TOLD_MAX` sentences that are not to be logged again.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use flumen_peer::{
    Answer, Frame, HELLO_BODY_MAX, Hello, Refusal, RefusalCode, Request, VERSION_MAX, VERSION_MIN, negotiate,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::bootstrap::{Presence, Standing, State};
use super::stream::Stream;
use super::tls::RpcTls;
use super::wire::{FrameReader, LinkError, write_frame};
use super::{inbound, node_id_of, requests, tls_words};
use crate::node::{Node, now_ms};
use crate::partition::raft_id;
use crate::waits::Waits;

/// Five brokers of eight shards that all start now are fewer. Each may take 200 KiB while TLS begins.
const GREETING_MAX: usize = 64;
/// Whoever connects gives up after two seconds (`links`). The handshake of TLS has to be done in three of these.
const GREETING_TIME_MAX: Duration = Duration::from_secs(5);
/// Waiting after a failed accept, so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What the first byte of TLS says, a record with a message of a handshake; no frame begins like that.
const TLS_BEGINS: u8 = 0x16;
/// Sentences that were logged and need not be again so soon: a broker that may not come in tries every second.
const TOLD_MAX: usize = 64;
/// Of one address: more kinds of wrong no broker has, and whoever makes up new ones is not to fill the log.
const TOLD_EACH_MAX: usize = 8;
const TOLD_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// What the port says of this process: first as one that looks for a cluster, then as a member.
pub struct Rpc {
    own: Mutex<Presence>,
    node: OnceLock<Arc<Node>>,
    tls: Option<Arc<RpcTls>>,
    waits: Arc<Waits>,
}

impl Rpc {
    pub fn new(own: Presence, tls: Option<Arc<RpcTls>>, waits: Arc<Waits>) -> Arc<Rpc> {
        Arc::new(Rpc { own: Mutex::new(own), node: OnceLock::new(), tls, waits })
    }

    /// For whoever makes this process wait.
    pub fn waits(&self) -> &Waits {
        &self.waits
    }

    pub fn tls(&self) -> Option<&RpcTls> {
        self.tls.as_deref()
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
        own.waits = self.waits.get();
        own.clock_ms = now_ms();
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
    let told = Arc::new(Mutex::new(Told::default()));
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
        let (rpc, told) = (rpc.clone(), told.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let is_new = |error: &LinkError| {
                let mut told = told.lock().expect("no panic under this lock");
                told.is_new(from.ip(), &error.to_string(), Instant::now())
            };
            match timeout(GREETING_TIME_MAX, greet(&rpc, stream, from)).await {
                Ok(Ok(None)) => {}
                // Counted as connected: from here on nobody looks at the time, so that it is uncounted when it goes.
                Ok(Ok(Some(admitted))) => admitted.hand_over().await,
                Ok(Err(error @ (LinkError::Frame(_) | LinkError::Tls(_)))) if is_new(&error) => {
                    tracing::warn!(%from, %error, "connection to the port for brokers closed")
                }
                Ok(Err(error)) => tracing::debug!(%from, %error, "connection to the port for brokers closed"),
                Err(_) => tracing::debug!(%from, "it did not say who it is in time"),
            }
        });
    }
}

/// Which sentence was logged about which address, and when. Times are arguments.
#[derive(Default)]
struct Told(HashMap<(IpAddr, String), Instant>);

impl Told {
    fn is_new(&mut self, from: IpAddr, sentence: &str, now: Instant) -> bool {
        self.0.retain(|_, at| now.duration_since(*at) < TOLD_AGAIN_AFTER);
        let key = (from, sentence.to_string());
        let of_it = self.0.keys().filter(|(address, _)| *address == from).count();
        if self.0.contains_key(&key) || of_it >= TOLD_EACH_MAX {
            return false;
        }
        if self.0.len() >= TOLD_MAX {
            // Many addresses: the log may say a few things twice.
            self.0.clear();
        }
        self.0.insert(key, now);
        true
    }
}

/// A broker that may come in.
struct Admitted {
    node: Arc<Node>,
    shard: usize,
    peer: inbound::Sender,
    ours: Hello,
    reader: FrameReader,
    stream: Stream,
}

async fn greet(rpc: &Rpc, stream: TcpStream, from: SocketAddr) -> Result<Option<Admitted>, LinkError> {
    stream.set_nodelay(true)?;
    let mut stream = begin(rpc, stream, &format!("a peer at {}", from.ip())).await?;
    let mut reader = FrameReader::new(BytesMut::new());
    let Frame::Hello(theirs) = reader.next_frame(&mut stream.reads, HELLO_BODY_MAX).await? else {
        return Err(LinkError::Unexpected("something other than a hello"));
    };
    if theirs.cluster_id == [0; 16] {
        return tell_who(rpc, &mut reader, stream).await.map(|()| None);
    }
    // One that is not ready hears nothing: whoever is a member tries again.
    let Some(node) = rpc.node.get() else {
        return Err(LinkError::Unexpected("a member, before there is a node"));
    };
    match admit(node, &theirs) {
        Err(refusal) => {
            tracing::warn!(node = node_id_of(theirs.node_id), address = %theirs.address, %refusal, "a broker was refused");
            write_frame(&mut stream.writes, &Frame::Refusal(refusal.clone()), 0).await?;
            Err(refusal.into())
        }
        Ok((peer, ours)) => {
            let shard = usize::from(theirs.shard) % node.shards.len();
            Ok(Some(Admitted { node: node.clone(), shard, peer, ours, reader, stream }))
        }
    }
}

/// Plain or TLS, whichever this broker has. The first byte says which one the other side speaks.
async fn begin(rpc: &Rpc, stream: TcpStream, peer: &str) -> Result<Stream, LinkError> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Err(LinkError::Closed);
    }
    match (&rpc.tls, first[0]) {
        (None, TLS_BEGINS) => Err(LinkError::Tls(tls_words::of_tls_peer(peer))),
        (None, _) => Ok(Stream::plain(stream)),
        (Some(tls), TLS_BEGINS) => tls.accept(stream, peer).await.map(Stream::tls),
        (Some(_), _) => refuse_plain(Stream::plain(stream), peer).await,
    }
}

/// A broker without TLS is told so, and nothing else; whatever is no broker gets no byte.
async fn refuse_plain(mut stream: Stream, peer: &str) -> Result<Stream, LinkError> {
    let mut reader = FrameReader::new(BytesMut::new());
    let Frame::Hello(_) = reader.next_frame(&mut stream.reads, HELLO_BODY_MAX).await? else {
        return Err(LinkError::Unexpected("something other than a hello"));
    };
    let refusal = Refusal { code: RefusalCode::Plain, sentence: tls_words::PLAIN_IS_REFUSED.to_string() };
    write_frame(&mut stream.writes, &Frame::Refusal(refusal), 0).await?;
    Err(LinkError::Tls(tls_words::of_plain_peer(peer)))
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

impl Admitted {
    async fn hand_over(self) {
        let (node, peer) = (self.node.clone(), self.peer);
        if let Err(error) = self.try_hand_over().await {
            tracing::debug!(node = peer.node_id, %error, "a broker's connection ended before it was served");
            inbound::left(&node, peer).await;
        }
    }

    async fn try_hand_over(mut self) -> Result<(), LinkError> {
        write_frame(&mut self.stream.writes, &Frame::Hello(self.ours), 0).await?;
        let (stream, rest, peer) = (self.stream.detach()?, self.reader.into_rest(), self.peer);
        self.node.shards[self.shard]
            .post(move |shard| inbound::start(shard, stream, rest, peer))
            .await
            .map_err(|_| LinkError::Closed)
    }
}

async fn tell_who(rpc: &Rpc, reader: &mut FrameReader, stream: Stream) -> Result<(), LinkError> {
    let Stream { mut reads, mut writes } = stream;
    let presence = rpc.presence();
    write_frame(&mut writes, &Frame::Hello(stranger(&presence)), 0).await?;
    match reader.next_frame(&mut reads, HELLO_BODY_MAX).await? {
        Frame::Request(Request { id, kind: requests::WHO, .. }) => {
            let body = Bytes::from(serde_json::to_vec(&presence).map_err(std::io::Error::other)?);
            write_frame(&mut writes, &Frame::Answer(Answer { id, code: 0, body }), VERSION_MIN).await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_logged_once_per_address_and_again_when_it_lasts() {
        let mut told = Told::default();
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let began = Instant::now();
        let after = |ms| began + Duration::from_millis(ms);
        assert!(
            told.is_new(one, "a", began) && told.is_new(one, "b", began) && told.is_new(other, "a", began)
        );
        assert!(!told.is_new(one, "a", after(1_000)) && !told.is_new(one, "b", after(599_999)));
        assert!(told.is_new(one, "a", after(600_000)) && !told.is_new(one, "a", after(601_000)));
        let new = (0..100).filter(|n| told.is_new(other, &n.to_string(), after(602_000))).count();
        assert_eq!(new, TOLD_EACH_MAX);
        for n in 0..1_000_u32 {
            told.is_new(IpAddr::from(n.to_be_bytes()), "a", after(602_000));
            assert!(told.0.len() <= TOLD_MAX);
        }
    }
}
