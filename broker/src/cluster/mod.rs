//! What makes several brokers one cluster: who they are, how they reach each other, who leads what.
//!
//! ```text
//! bootstrap (pure) <- joining <- identity       before anything else: which cluster, under which id
//! listener -> inbound                           what others say, on the shard that serves it
//! stream <- tls, exposure                       over what: certificates of both sides, or none where none is needed
//! links                                         what this node says: one connection per shard to every other node
//! change                                        changes of the metadata, made here or by whoever leads it
//! leaders, members, hearsay                     what is known of the others, and what they know of each other
//! ```
//!
//! A broker that is started without `--rpc` has none of this: no port, no task, no tick.
//!
//! Invariants
//! - Nothing is acted on as a member of a cluster before the `cluster` file says so on the disk.
//! - A connection speaks for one process of one node; the first frame of both sides says which, and one that is of another
//!   cluster, of no node of this one, or of a second process under an id is refused in words.
//! - Every queue and buffer between brokers is bounded; what does not fit is dropped or refused, never waited for by a shard.

pub mod bootstrap;
pub mod change;
pub mod exposure;
pub mod floors;
pub mod forward;
pub mod hand_over;
pub mod hearsay;
pub mod identity;
pub mod inbound;
pub mod joining;
pub mod joins;
pub mod leaders;
pub mod leaving;
pub mod links;
pub mod listener;
pub mod members;
pub mod mending;
pub mod news;
pub mod pace;
pub mod remote_log;
pub mod requests;
pub mod room;
pub mod rpc_health;
pub mod ship;
mod stream;
pub mod tls;
mod tls_words;
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use flumen_metadata::MetadataImage;
use flumen_peer::{Hello, VERSION_MAX, VERSION_MIN};

use crate::partition::raft_id;
use exposure::Security;
use identity::Identity;
use members::Members;
use tls::RpcTls;

/// Of the data directory; a node that cannot read what another writes does not come together with it.
const DATA_FORMAT: u16 = 3;

/// What the command line says of the cluster.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Where other brokers reach this one.
    pub rpc: SocketAddr,
    /// What others are told of that, when it is not `rpc` itself: HOST:PORT.
    pub advertise_rpc: Option<String>,
    /// HOST:PORT of the brokers that found the cluster, or that a new one asks.
    pub seeds: Vec<String>,
    pub security: Security,
}

/// What a broker that belongs to a cluster knows beside the metadata.
#[derive(Debug)]
pub struct Cluster {
    pub identity: Identity,
    /// Of this process.
    pub boot_id: u64,
    /// Where others reach this node.
    pub address: String,
    pub members: Members,
    /// None: connections are plain.
    pub tls: Option<Arc<RpcTls>>,
    /// Others than this machine reach the port.
    pub is_exposed: bool,
}

impl Cluster {
    pub fn hello(&self, shard: usize, finalized_version: u16) -> Hello {
        Hello {
            cluster_id: self.identity.cluster_id.0,
            node_id: raft_id(self.identity.node_id),
            boot_id: self.boot_id,
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            finalized_version,
            format: DATA_FORMAT,
            shard: u16::try_from(shard).unwrap_or(u16::MAX),
            address: self.address.clone(),
        }
    }

    /// Whether a node is one of the cluster. A founder that is not in the metadata has not come yet, or was removed; the
    /// former only while not all have come.
    pub fn knows(&self, image: &MetadataImage, node_id: i32) -> bool {
        let young = image.nodes.len() < self.identity.founders.len();
        image.nodes.contains_key(&node_id)
            || (young && self.identity.founders.iter().any(|f| f.node_id == node_id))
    }

    /// Where the other nodes are, as far as is known: from the metadata, and before that from the founding.
    pub fn addresses(&self, image: &MetadataImage) -> BTreeMap<i32, String> {
        let mut addresses: BTreeMap<i32, String> = BTreeMap::new();
        let founders = self.identity.founders.iter().filter(|f| self.knows(image, f.node_id));
        addresses.extend(founders.map(|f| (f.node_id, f.address.clone())));
        addresses.extend(image.nodes.values().map(|n| (n.id, n.rpc_address.clone())));
        addresses.remove(&self.identity.node_id);
        addresses
    }
}

/// The node behind a number of Raft's.
pub fn node_id_of(raft_id: u64) -> Option<i32> {
    i32::try_from(raft_id.checked_sub(1)?).ok()
}

/// Random enough that two processes never have the same.
pub fn new_boot_id() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high ^ low.rotate_left(32)
}
