//! What every thread of the process may see: configuration, the metadata image, handles to the shards.
//!
//! The image is immutable and replaced as a whole (one writer: the controller on shard 0), so a reader
//! on the hot path takes no lock. Everything mutable here is a counter or sits off the hot path.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use flumen_metadata::placement::NodeHealth;
use flumen_metadata::{BrokerConfig, MetadataImage};
use flumen_protocol::error_code::ErrorCode;

use crate::cluster::Cluster;
use crate::cluster::change::{Intent, change};
use crate::cluster::leaders::LeaderTable;
use crate::cluster::pace::CatchUp;
use crate::cluster::room::Room;
use crate::disk_space::DiskSpace;
use crate::export::Exports;
use crate::host::{self, Host};
use crate::mailbox::ShardHandle;
use crate::metrics::ShardMetrics;
use crate::partition::{PartitionGauges, raft_id};
use crate::progress::MoveProgress;
use crate::waits::Waits;

/// Producer ids are handed out from blocks of this size: one metadata write per so many producers.
const PRODUCER_ID_BLOCK: i64 = 1000;
/// The controller and the metadata group live on this shard.
pub const CONTROLLER_SHARD: usize = 0;

pub struct Node {
    pub config: BrokerConfig,
    pub data_dir: PathBuf,
    pub image: ArcSwap<MetadataImage>,
    pub shards: Vec<ShardHandle>,
    pub metrics: Vec<Arc<ShardMetrics>>,
    pub exports: Exports,
    pub disk: Arc<DiskSpace>,
    pub host: Arc<dyn Host>,
    pub started: Instant,
    ready: AtomicBool,
    pub waits: Arc<Waits>,
    pub leaders: LeaderTable,
    pub catch_up: CatchUp,
    /// Of the other nodes' disks.
    pub room: Room,
    /// None: alone.
    pub cluster: Option<Arc<Cluster>>,
    gauges: RwLock<HashMap<u64, Arc<PartitionGauges>>>,
    producer_ids: Mutex<Range<i64>>,
    producer_id_refill: tokio::sync::Mutex<()>,
}

impl Node {
    pub fn new(
        config: BrokerConfig,
        data_dir: PathBuf,
        image: MetadataImage,
        shards: Vec<ShardHandle>,
        exports: Exports,
        cluster: Option<Arc<Cluster>>,
    ) -> Node {
        let metrics = shards.iter().map(|_| Arc::new(ShardMetrics::default())).collect();
        Node {
            data_dir,
            image: ArcSwap::from_pointee(image),
            shards,
            metrics,
            exports,
            disk: Arc::default(),
            host: Arc::new(host::Process),
            started: Instant::now(),
            ready: AtomicBool::new(false),
            waits: Arc::default(),
            leaders: LeaderTable::new(config.node_id),
            catch_up: CatchUp::default(),
            room: Room::default(),
            cluster,
            gauges: RwLock::default(),
            producer_ids: Mutex::new(0..0),
            producer_id_refill: tokio::sync::Mutex::default(),
            config,
        }
    }

    /// In place of a process of its own.
    pub fn hosted_by(mut self, host: Arc<dyn Host>) -> Node {
        self.host = host;
        self
    }

    /// Of a process that said before there was a node what it waits for.
    pub fn that_waits(mut self, waits: Arc<Waits>) -> Node {
        self.waits = waits;
        self
    }

    /// What Raft calls this node: one more than its id, as 0 means nobody there.
    pub fn raft_id(&self) -> u64 {
        raft_id(self.config.node_id)
    }

    /// A partition's home never changes while the process runs.
    pub fn shard_of(&self, group_id: u64) -> usize {
        (group_id % self.shards.len() as u64) as usize
    }

    /// Serves Kafka's clients.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
        self.waits.end();
    }

    /// Knows a cluster, or is alone and serves: until then there is nothing that it could tell about either.
    pub fn knows_metadata(&self) -> bool {
        self.is_ready() || !self.image.load().nodes.is_empty()
    }

    pub fn controller(&self) -> &ShardHandle {
        &self.shards[CONTROLLER_SHARD]
    }

    /// Creates the gauges of a partition on first use.
    pub fn gauges_of(&self, group_id: u64) -> Arc<PartitionGauges> {
        if let Some(gauges) = self.gauges.read().expect("no panic under this lock").get(&group_id) {
            return gauges.clone();
        }
        self.gauges.write().expect("no panic under this lock").entry(group_id).or_default().clone()
    }

    pub fn show_progress(&self, group_id: u64, progress: Option<MoveProgress>) {
        *self.gauges_of(group_id).progress.lock().expect("no panic under this lock") = progress;
    }

    pub fn forget_gauges(&self, group_id: u64) {
        self.gauges.write().expect("no panic under this lock").remove(&group_id);
    }

    /// Whether a node runs, as far as this one can tell at the time of the question.
    pub fn is_up(&self) -> impl Fn(i32) -> bool + Send + 'static {
        let (own, cluster) = (self.config.node_id, self.cluster.clone());
        move |id| id == own || cluster.as_ref().is_some_and(|c| c.members.is_up(id))
    }

    /// Whether a node's disk has room, as far as it has said.
    pub fn has_room(&self) -> impl Fn(i32) -> bool + '_ {
        let (own, now) = (self.config.node_id, tokio::time::Instant::now());
        move |id| if id == own { !self.disk.is_low() } else { !self.room.is_short(id, now) }
    }

    /// For whoever places replicas.
    pub fn with_health<R>(&self, plan: impl FnOnce(NodeHealth<'_>) -> R) -> R {
        let (is_up, has_room) = (self.is_up(), self.has_room());
        plan(NodeHealth { is_up: &is_up, has_room: &has_room })
    }

    /// Whether clients can be sent to a node: it runs as far as this one can tell, or others say so whom this one hears.
    pub fn is_reachable(&self) -> impl Fn(i32) -> bool + Send + 'static {
        let (own, cluster) = (self.config.node_id, self.cluster.clone());
        move |id| id == own || cluster.as_ref().is_some_and(|c| c.members.is_reachable(id))
    }

    /// The shard with the fewest connections; the first of equals.
    pub fn least_loaded_shard(&self) -> usize {
        (0..self.shards.len()).min_by_key(|i| self.shards[*i].connections()).unwrap_or(0)
    }

    /// A producer id that was never handed out before, across restarts.
    pub async fn next_producer_id(self: &Arc<Self>) -> Result<i64, ErrorCode> {
        loop {
            if let Some(id) = self.producer_ids.lock().expect("no panic under this lock").next() {
                return Ok(id);
            }
            let _one_refill_at_a_time = self.producer_id_refill.lock().await;
            if !self.producer_ids.lock().expect("no panic under this lock").is_empty() {
                continue;
            }
            let done =
                change(self, Intent::ProducerIds { count: PRODUCER_ID_BLOCK }).await.map_err(|e| e.code)?;
            let start = done.producer_id_start.ok_or(ErrorCode::COORDINATOR_NOT_AVAILABLE)?;
            *self.producer_ids.lock().expect("no panic under this lock") = start..start + PRODUCER_ID_BLOCK;
        }
    }
}

/// Wall clock of a process, for record timestamps, retention and session deadlines; shards ask `Node::host`. Pure code gets it
/// as an argument.
pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
