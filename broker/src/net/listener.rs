//! The one acceptor. Hands every connection to the shard that serves the fewest: Kafka clients hold
//! few, long connections, and letting the kernel hash them to cores leaves some cores idle.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::node::Node;

/// Waiting after a failed accept (out of file descriptors, mostly) so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

pub async fn accept(node: Arc<Node>, listener: TcpListener) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let stream = match stream.set_nodelay(true).and_then(|()| stream.into_std()) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%peer, %error, "connection lost before it was served");
                continue;
            }
        };
        let shard = node.least_loaded_shard();
        if node.shards[shard].hand_over(stream, peer).await.is_err() {
            return;
        }
    }
}
