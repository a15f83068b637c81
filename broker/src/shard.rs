//! One core: its partitions, its connections, its log, its mailbox.
//!
//! Runs on one pinned thread with a tokio `current_thread` runtime and a `LocalSet`; nothing in here is
//! `Send`. Six loops share the thread: the mailbox, the durability loop (tells raft what the disk has),
//! retention, compaction, forcing logs to disk, and one task per connection. A shard with nothing to do sleeps.
//!
//! Invariants
//! - A partition is opened once and closed once; its home shard is `group id % shards`.
//! - Raft hears of durability in the order in which entries were staged.
//! - A failed log stops the process: nothing from the failed range is acknowledged, ever.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use flumen_raft::{AwakeSet, Message};
use flumen_storage::{COMMIT_LANES, GroupLog, Lane, Lsn, RecoveredGroup, ShardStore};
use slab::Slab;
use tokio::sync::{Notify, mpsc};

use crate::balancer;
use crate::cluster::links::Links;
use crate::cluster::{floors, joins, mending};
use crate::controller::Controller;
use crate::coordinator::{Coordinators, OFFSETS_TOPIC};
use crate::handlers::produce::ProduceLine;
use crate::mailbox::ShardMessage;
use crate::metrics::ShardMetrics;
use crate::net::connection;
use crate::node::Node;
use crate::partition::{Partition, PartitionSpec, group_config};
use crate::peers::Outbox;

/// Raft's unit of time: a leader is missed after 10 to 20 of them, and speaks every third.
pub const TICK: Duration = Duration::from_millis(60);
/// How often retention looks at the partitions of a shard, and how many it looks at before it lets
/// requests go first.
const RETENTION_INTERVAL: Duration = Duration::from_secs(1);
const RETENTION_PARTITIONS_PER_TURN: usize = 32;
/// How often compaction looks for partitions that are due. It asks only those of compacted topics, and what it finds there
/// is some additions.
const COMPACTION_INTERVAL: Duration = Duration::from_secs(1);
/// How often flush.ms and flush.messages are looked at; they ask for no more than "about".
const FORCE_INTERVAL: Duration = Duration::from_millis(100);
const FORCES_PER_LOOK: u32 = 10;

pub struct Shard {
    pub id: usize,
    pub node: Arc<Node>,
    pub metrics: Arc<ShardMetrics>,
    pub coordinators: Coordinators,
    store: ShardStore,
    partitions: RefCell<HashMap<u64, Rc<Partition>>>,
    /// The same, by the numbers that `awake` knows them by.
    slots: RefCell<Slab<Rc<Partition>>>,
    awake: RefCell<AwakeSet>,
    somebody_woke: Notify,
    /// A client deleted records, and followers should hear of it.
    pub floors_changed: Notify,
    /// Messages for other brokers.
    pub outbox: Outbox,
    /// Connections to other brokers.
    pub links: Links,
    /// Per lane: (log position, group, raft output number) staged and not yet durable, in staging order.
    staged: [RefCell<VecDeque<(Lsn, u64, u64)>>; COMMIT_LANES.len()],
    controller: OnceCell<Rc<Controller>>,
    stopping: Cell<bool>,
    pub stop: Notify,
    pub produce_line: ProduceLine,
    /// Socket reads land here before frames are cut; one per shard, not per connection.
    pub scratch: RefCell<Vec<u8>>,
}

/// Bytes read from a socket in one call. Small requests of one client mostly fit, so that a frame
/// costs one system call; larger frames are read straight into their own buffer.
const SCRATCH_BYTES: usize = 256 << 10;

impl Shard {
    pub fn new(id: usize, node: Arc<Node>, store: ShardStore) -> Rc<Shard> {
        let metrics = node.metrics[id].clone();
        Rc::new(Shard {
            id,
            node,
            metrics,
            coordinators: Coordinators::default(),
            store,
            partitions: RefCell::default(),
            slots: RefCell::default(),
            awake: RefCell::default(),
            somebody_woke: Notify::new(),
            floors_changed: Notify::new(),
            outbox: Outbox::default(),
            links: Links::default(),
            staged: Default::default(),
            controller: OnceCell::new(),
            stopping: Cell::new(false),
            stop: Notify::new(),
            produce_line: ProduceLine::default(),
            scratch: RefCell::new(vec![0; SCRATCH_BYTES]),
        })
    }

    /// Runs until the mailbox closes.
    pub async fn serve(self: Rc<Self>, mut mailbox: mpsc::Receiver<ShardMessage>) {
        for lane in COMMIT_LANES {
            let watched = tokio::task::spawn_local(self.clone().watch_durability(lane));
            let shard = self.clone();
            tokio::task::spawn_local(async move {
                // Without it the shard only seems to live.
                if watched.await.is_err_and(|error| error.is_panic()) {
                    shard.poison("what tells of durability met a broken invariant");
                }
            });
        }
        tokio::task::spawn_local(self.clone().keep_ticking());
        if self.node.cluster.is_some() || self.links.are_carried() {
            tokio::task::spawn_local(floors::keep_told(self.clone()));
        }
        if self.node.cluster.is_some() {
            tokio::task::spawn_local(balancer::keep_moving(self.clone()));
            tokio::task::spawn_local(mending::keep(self.clone(), mending::renew_by_controller));
        }
        tokio::task::spawn_local(self.clone().keep_retention());
        tokio::task::spawn_local(self.clone().keep_compaction());
        tokio::task::spawn_local(self.clone().keep_forced());
        tokio::task::spawn_local(self.clone().publish_store_stats());
        while let Some(message) = mailbox.recv().await {
            match message {
                ShardMessage::Connection(stream, peer) => connection::start(&self, stream, peer),
                ShardMessage::Job(job) => job(&self),
            }
        }
    }

    pub fn partition(&self, group_id: u64) -> Option<Rc<Partition>> {
        self.partitions.borrow().get(&group_id).cloned()
    }

    pub fn partitions(&self) -> Vec<Rc<Partition>> {
        let mut all: Vec<_> = self.partitions.borrow().values().cloned().collect();
        all.sort_by_key(|p| p.group_id);
        all
    }

    pub fn controller(&self) -> Rc<Controller> {
        self.controller.get().expect("only the controller's shard is asked for it, after start").clone()
    }

    pub fn set_controller(&self, controller: Rc<Controller>) {
        assert!(self.controller.set(controller).is_ok(), "the controller starts once");
    }

    /// Opens a partition that recovery found.
    pub fn attach(self: &Rc<Self>, spec: PartitionSpec, recovered: RecoveredGroup) -> Rc<Partition> {
        let log = self.store.attach(recovered, group_config(&spec.config, self.is_alone(&spec)));
        self.insert(spec, log)
    }

    /// Creates a partition that is new.
    pub fn create(
        self: &Rc<Self>,
        spec: PartitionSpec,
    ) -> Result<Rc<Partition>, flumen_storage::CreateError> {
        if let Some(existing) = self.partition(spec.group_id) {
            return Ok(existing);
        }
        let log = self.create_log(&spec)?;
        Ok(self.insert(spec, log))
    }

    fn create_log(&self, spec: &PartitionSpec) -> Result<GroupLog, flumen_storage::CreateError> {
        // A replica that comes to a group that exists may have been here before, and the store never takes a number again.
        let returns = !spec.replicas.contains(&self.node.config.node_id);
        let id =
            if returns { number_of_its_own(spec.group_id, self.node.host.draw()) } else { spec.group_id };
        let dir_name = dir_name(&spec.topic, spec.index, id);
        self.store.create(id, &dir_name, group_config(&spec.config, self.is_alone(spec)))
    }

    fn is_alone(&self, spec: &PartitionSpec) -> bool {
        spec.replicas == [self.node.config.node_id]
            || (spec.replicas.is_empty() && self.node.cluster.is_none())
    }

    fn insert(self: &Rc<Self>, spec: PartitionSpec, log: GroupLog) -> Rc<Partition> {
        let group_id = spec.group_id;
        let partition = Partition::open(self, spec, log);
        partition.slot.set(self.slots.borrow_mut().insert(partition.clone()));
        partition.stay_awake();
        if partition.is_joining() {
            tokio::task::spawn_local(joins::join(self.clone(), partition.clone()));
        }
        let before = self.partitions.borrow_mut().insert(group_id, partition.clone());
        assert!(before.is_none(), "a partition is opened once");
        if &*partition.topic == OFFSETS_TOPIC && partition.damage().is_none() && partition.serves() {
            // Read now, so that the first request for a group does not find a coordinator that is still reading.
            drop(self.coordinators.of(self, group_id));
        }
        partition
    }

    pub async fn delete(&self, group_id: u64) {
        if let Some(partition) = self.remove(group_id) {
            self.node.forget_gauges(group_id);
            self.delete_log(&partition).await;
        }
    }

    /// In place of a partition's damaged log comes an empty one, whose replica asks who the members are. The new one is there before the
    /// old one goes; a start that finds both goes by the empty one (`server::one_of_each`).
    pub async fn renew(self: &Rc<Self>, mut spec: PartitionSpec) -> Result<(), flumen_storage::CreateError> {
        // It may have been deleted and made again since.
        if self.partition(spec.group_id).is_none_or(|partition| partition.damage().is_none()) {
            return Ok(());
        }
        let own = self.node.config.node_id;
        spec.replicas.retain(|id| *id != own);
        let log = self.create_log(&spec)?;
        let old = self.remove(spec.group_id);
        self.insert(spec, log);
        if let Some(old) = old {
            self.delete_log(&old).await;
        }
        Ok(())
    }

    fn remove(&self, group_id: u64) -> Option<Rc<Partition>> {
        let partition = self.partitions.borrow_mut().remove(&group_id)?;
        self.slots.borrow_mut().remove(partition.slot.get());
        self.coordinators.remove(group_id);
        Some(partition)
    }

    async fn delete_log(&self, partition: &Partition) {
        if let Err(error) = self.store.delete(partition.store_id()).await {
            let group_id = partition.group_id;
            tracing::warn!(group_id, %error, "a deleted partition's files remain; the next start removes them");
        }
    }

    /// A message that another broker sent for a partition of this shard. One for a partition that is not here (not yet, or not
    /// any more) is dropped: its sender says it again.
    pub fn deliver(&self, from: u64, group_id: u64, message: Message) {
        if let Some(partition) = self.partition(group_id) {
            partition.step(from, message);
        }
    }

    /// The connection to another broker broke, or it has not been heard of for long: whoever has a replica there wakes up.
    pub fn on_node_down(&self, raft_id: u64) {
        for partition in self.partitions() {
            if partition.on_node_down(raft_id) {
                partition.stay_awake();
                partition.advance();
            }
        }
    }

    /// The group in this slot is to be ticked until it sleeps again.
    pub(crate) fn wake(&self, slot: usize) {
        self.awake.borrow_mut().wake(slot);
        self.somebody_woke.notify_one();
    }

    /// Time passes for the groups that are awake.
    pub fn tick(&self) {
        let mut ticked = Vec::new();
        {
            let slots = self.slots.borrow();
            self.awake.borrow_mut().tick_all(|slot| {
                let Some(partition) = slots.get(slot) else { return false };
                ticked.push(partition.clone());
                partition.tick()
            });
        }
        for partition in ticked {
            partition.advance();
            partition.stay_awake();
        }
    }

    /// A shard of a broker that is alone has nobody awake, and sleeps.
    async fn keep_ticking(self: Rc<Self>) {
        while !self.is_stopping() {
            while self.awake.borrow().is_empty() {
                self.somebody_woke.notified().await;
            }
            tokio::time::sleep(TICK).await;
            self.tick();
        }
    }

    pub fn note_staged(&self, lane: Lane, lsn: Lsn, group_id: u64, number: u64) {
        self.staged[lane as usize].borrow_mut().push_back((lsn, group_id, number));
    }

    /// The log failed: say why and stop. Never retried into success. Does not return but where the host of the broker only makes
    /// sure that nobody hears of it any more.
    pub fn poison(&self, reason: &str) {
        tracing::error!(
            shard = self.id,
            reason,
            "the shard log failed; nothing unacknowledged is assumed stored"
        );
        self.node.host.log_failed(self.id, reason);
    }

    /// Stops taking requests and puts everything where the next start finds it quickly.
    pub async fn shutdown(&self) -> Result<(), String> {
        self.stopping.set(true);
        self.stop.notify_waiters();
        self.store.shutdown().await.map_err(|e| e.to_string())
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    async fn watch_durability(self: Rc<Self>, lane: Lane) {
        let mut seen = 0;
        let mut dirty: Vec<Rc<Partition>> = Vec::new();
        loop {
            match self.store.next_durable(lane, seen).await {
                Ok(lsn) => seen = lsn,
                Err(error) if self.is_stopping() => {
                    tracing::debug!(shard = self.id, %error, "log closed");
                    return;
                }
                Err(error) => return self.poison(&error.to_string()),
            }
            {
                let mut staged = self.staged[lane as usize].borrow_mut();
                let partitions = self.partitions.borrow();
                while staged.front().is_some_and(|(lsn, _, _)| *lsn <= seen) {
                    let Some((_, group_id, number)) = staged.pop_front() else { break };
                    if let Some(partition) = partitions.get(&group_id)
                        && partition.note_persisted(number)
                    {
                        dirty.push(partition.clone());
                    }
                }
            }
            for partition in dirty.drain(..) {
                partition.apply_persisted();
            }
        }
    }

    async fn keep_retention(self: Rc<Self>) {
        loop {
            tokio::time::sleep(RETENTION_INTERVAL).await;
            let expiration_ms =
                self.node.config.with_dynamic(&self.node.image.load()).producer_id_expiration_ms;
            for (i, partition) in self.partitions().into_iter().enumerate() {
                if i % RETENTION_PARTITIONS_PER_TURN == RETENTION_PARTITIONS_PER_TURN - 1 {
                    tokio::task::yield_now().await;
                }
                let now = self.node.host.now_ms();
                partition.enforce_retention(now).await;
                partition.expire_producers(now, expiration_ms);
            }
        }
    }

    /// One partition at a time: a shard reads and writes for compaction no faster than the store lets it.
    async fn keep_compaction(self: Rc<Self>) {
        if !self.node.config.log_cleaner_enable {
            return;
        }
        while !self.is_stopping() {
            tokio::time::sleep(COMPACTION_INTERVAL).await;
            for (i, partition) in self.partitions().into_iter().enumerate() {
                if i % RETENTION_PARTITIONS_PER_TURN == RETENTION_PARTITIONS_PER_TURN - 1 {
                    tokio::task::yield_now().await;
                }
                partition.compact(self.node.host.now_ms()).await;
            }
        }
    }

    async fn keep_forced(self: Rc<Self>) {
        while !self.is_stopping() {
            // Who they are is looked up more rarely: with many partitions, asking all of them costs more than the rest.
            let mut forced = self.partitions();
            forced.retain(|partition| partition.is_forced());
            for _ in 0..FORCES_PER_LOOK {
                tokio::time::sleep(FORCE_INTERVAL).await;
                for partition in &forced {
                    partition.keep_forced(self.node.host.now_ms()).await;
                }
            }
        }
    }

    async fn publish_store_stats(self: Rc<Self>) {
        loop {
            self.metrics.set_store_stats(&self.store.stats());
            tokio::time::sleep(RETENTION_INTERVAL).await;
        }
    }
}

/// Bits of a number in the store that are the Raft group; the others tell replicas of one group from each other that were
/// here one after the other.
const GROUP_BITS: u32 = 40;

fn number_of_its_own(group_id: u64, drawn: u64) -> u64 {
    // Never 0; the highest bit stays free.
    let which = (drawn & 0x7f_ffff).max(1);
    group_id | which << GROUP_BITS
}

/// The Raft group of a number in the store.
pub fn group_of(store_id: u64) -> u64 {
    if store_id == flumen_storage::UNKNOWN_GROUP { store_id } else { store_id & ((1 << GROUP_BITS) - 1) }
}

/// The directory of a partition; the group id makes a recreated topic's directory a different one.
pub fn dir_name(topic: &str, index: i32, group_id: u64) -> String {
    format!("{topic}-{index}.g{group_id}")
}
