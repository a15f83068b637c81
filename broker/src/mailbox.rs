//! Bounded messages between cores.
//!
//! A shard is reached only through its mailbox: one message per (request, target shard) there, one
//! back. Messages of one sender arrive in the order in which they were sent, which is what keeps the
//! produce requests of one connection in order when their partition lives elsewhere.

use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{mpsc, oneshot};

use crate::shard::Shard;

/// Requests that may wait for one shard. A full mailbox makes the sending connections wait, which
/// makes their clients wait: memory stays bounded by connections, not by load.
pub const MAILBOX_MESSAGES_MAX: usize = 4096;

pub type Job = Box<dyn FnOnce(&Rc<Shard>) + Send>;

pub enum ShardMessage {
    Connection(std::net::TcpStream, std::net::SocketAddr),
    Job(Job),
}

#[derive(Debug, thiserror::Error)]
#[error("the shard has stopped")]
pub struct ShardStopped;

pub struct ShardHandle {
    messages: mpsc::Sender<ShardMessage>,
    connections: AtomicUsize,
}

impl ShardHandle {
    pub fn new() -> (ShardHandle, mpsc::Receiver<ShardMessage>) {
        let (messages, receiver) = mpsc::channel(MAILBOX_MESSAGES_MAX);
        (ShardHandle { messages, connections: AtomicUsize::new(0) }, receiver)
    }

    /// Connections that this shard serves or is about to serve.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub fn connection_closed(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    pub async fn hand_over(
        &self,
        stream: std::net::TcpStream,
        peer: std::net::SocketAddr,
    ) -> Result<(), ShardStopped> {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.messages.send(ShardMessage::Connection(stream, peer)).await.map_err(|_| ShardStopped)
    }

    /// Runs `job` on the shard's thread. `job` itself must not block; it runs between two messages.
    pub async fn post(&self, job: impl FnOnce(&Rc<Shard>) + Send + 'static) -> Result<(), ShardStopped> {
        self.messages.send(ShardMessage::Job(Box::new(job))).await.map_err(|_| ShardStopped)
    }

    /// Runs an async function on the shard and waits for its answer.
    pub async fn run<T, F, Fut>(&self, work: F) -> Result<T, ShardStopped>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Shard>) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (answer, receiver) = oneshot::channel();
        self.post(move |shard| {
            let future = work(shard.clone());
            tokio::task::spawn_local(async move {
                // The asker may have gone away: its connection closed.
                let _ = answer.send(future.await);
            });
        })
        .await?;
        receiver.await.map_err(|_| ShardStopped)
    }
}
