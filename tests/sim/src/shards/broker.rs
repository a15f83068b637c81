//! One broker: a machine with a disk, and a process on it that starts, is paused, dies and starts again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use flumen_broker::cluster::mending;
use flumen_broker::coordinator::OFFSETS_TOPIC;
use flumen_broker::export::Exports;
use flumen_broker::host::Host;
use flumen_broker::mailbox::{ShardHandle, ShardMessage};
use flumen_broker::node::Node;
use flumen_broker::partition::{Partition, PartitionSpec};
use flumen_broker::server::one_of_each;
use flumen_broker::shard::{Shard, group_of};
use flumen_io::simulated::{Crash, Fault, Machine, Settings as DiskSettings};
use flumen_metadata::{BrokerConfig, Durability, MetadataImage, NodeInfo, PartitionInfo, Topic, TopicConfig};
use flumen_storage::{DataDir, GroupHealth, Inspection, OpenError, RecoveredGroup, Severity, ShardStore};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio::time::{Instant, Sleep};

use super::plan::quiet;
use super::world::World;
use super::{losses, wires};

const DIR: &str = "/data";
/// Where the directories of partitions are.
pub(super) const LOGS: &str = "/data/log";
/// What clients write to.
pub(super) const TOPIC: &str = "t";
/// Where the wall clocks begin; a date in 2023.
pub(super) const EPOCH_MS: i64 = 1_700_000_000_000;
/// A start that fails so often for faults of the disk gets a sound one: what is tested then is that it works at last.
const TRIES_MAX: u32 = 6;
/// Stalled syncs last less than a leader is waited for, and more.
const STALL_MS: u64 = 1_500;

pub(super) type Job = Box<dyn FnOnce(&Rc<Shard>)>;

#[derive(Debug)]
pub(super) struct SimulatedHost {
    machine: Machine,
    started: Instant,
    pub skew_ms: AtomicI64,
    drawn: AtomicU64,
}

impl Host for SimulatedHost {
    fn now_ms(&self) -> i64 {
        let passed = i64::try_from(self.started.elapsed().as_millis()).unwrap_or(i64::MAX);
        EPOCH_MS + passed + self.skew_ms.load(Ordering::Relaxed)
    }

    fn draw(&self) -> u64 {
        self.drawn.fetch_add(1, Ordering::Relaxed)
    }

    fn log_failed(&self, _shard: usize, reason: &str) {
        self.machine.note(reason);
        self.machine.crash_now(Crash::Kill);
    }
}

pub(super) struct Broker {
    pub id: i32,
    pub machine: Machine,
    pub host: Arc<SimulatedHost>,
    process: RefCell<Option<Process>>,
    pub paused_until: Cell<Option<Instant>>,
    /// A clean stop is under way or done: what dies now has kept everything.
    pub stopped: Cell<bool>,
    /// A group whose log is not whole any more when the machine is there again.
    pub loses: Cell<Option<u64>>,
    boots: Cell<u64>,
}

struct Process {
    boot: u64,
    node: Arc<Node>,
    local: Rc<RefCell<Option<LocalSet>>>,
    inbox: mpsc::UnboundedSender<Job>,
    runner: tokio::task::JoinHandle<()>,
}

/// Lets the process run, unless it is paused or gone.
struct Paced {
    local: Rc<RefCell<Option<LocalSet>>>,
    broker: Rc<Broker>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Future for Paced {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if let Some(until) = self.broker.paused_until.get() {
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            if sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            self.sleep = None;
            self.broker.paused_until.set(None);
        }
        let local = self.local.clone();
        let mut slot = local.borrow_mut();
        match slot.as_mut() {
            Some(local) => Pin::new(local).poll(context),
            None => Poll::Ready(()),
        }
    }
}

impl Broker {
    pub fn new(id: i32, seed: u64, sector_bytes: usize, started: Instant) -> Broker {
        let settings = DiskSettings {
            sector_bytes,
            capacity_bytes: 1 << 30,
            rates: quiet(),
            stall_ms: STALL_MS,
            ..DiskSettings::default()
        };
        let machine = Machine::new(seed.wrapping_mul(31).wrapping_add(id as u64), settings);
        let host = Arc::new(SimulatedHost {
            machine: machine.clone(),
            started,
            skew_ms: AtomicI64::new(0),
            drawn: AtomicU64::new((id as u64) << 16 | 1),
        });
        Broker {
            id,
            machine,
            host,
            process: RefCell::default(),
            paused_until: Cell::new(None),
            stopped: Cell::new(false),
            loses: Cell::new(None),
            boots: Cell::new(0),
        }
    }

    pub fn raft_id(&self) -> u64 {
        self.id as u64 + 1
    }

    /// The number of the process that runs and can be heard.
    pub fn boot(&self) -> Option<u64> {
        self.process.borrow().as_ref().filter(|_| !self.machine.is_down()).map(|process| process.boot)
    }

    pub fn node(&self) -> Option<Arc<Node>> {
        self.process.borrow().as_ref().filter(|_| !self.machine.is_down()).map(|p| p.node.clone())
    }

    /// Has the process do something when it comes to it; false when there is none.
    pub fn post(&self, job: impl FnOnce(&Rc<Shard>) + 'static) -> bool {
        match &*self.process.borrow() {
            Some(process) if !self.machine.is_down() => process.inbox.send(Box::new(job)).is_ok(),
            _ => false,
        }
    }

    /// What the process answers; none when it died before anybody could hear of it.
    pub async fn ask<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        work: impl FnOnce(Rc<Shard>) -> F + 'static,
    ) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        let machine = self.machine.clone();
        let posted = self.post(move |shard| {
            let work = work(shard.clone());
            tokio::task::spawn_local(async move {
                let outcome = work.await;
                if !machine.is_down() {
                    let _ = answer.send(outcome);
                }
            });
        });
        if posted { answered.await.ok() } else { None }
    }

    /// Starts the process, and again whenever it has died.
    pub async fn supervise(self: Rc<Self>, world: Rc<World>) {
        loop {
            let mut tries = 0;
            while !self.start(&world, tries) {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(world.between(5, 200))).await;
                self.comes_up(&world);
            }
            self.machine.down().await;
            self.count_begun_over(&world);
            self.kill();
            let delay = match world.faults.get() {
                true if world.below(6) == 0 => world.between(1_000, 4_000),
                true => world.between(5, 900),
                false => 50,
            };
            tokio::time::sleep(Duration::from_millis(delay)).await;
            self.comes_up(&world);
        }
    }

    /// What its replicas had to give up since it started.
    fn count_begun_over(&self, world: &World) {
        let process = self.process.borrow();
        for group in world.groups() {
            let begun = process.as_ref().map(|process| process.node.gauges_of(group));
            for _ in 0..begun.map_or(0, |gauges| gauges.begun_over.load(Ordering::Relaxed)) {
                world.count("replica begins over");
            }
        }
    }

    fn kill(&self) {
        let process = self.process.borrow_mut().take();
        if let Some(process) = process {
            process.runner.abort();
            drop(process.local.borrow_mut().take());
        }
        self.paused_until.set(None);
    }

    /// The machine is there again; what it had not promised to keep may be gone.
    fn comes_up(&self, world: &World) {
        let crash = self.machine.restart();
        world.count(match crash {
            Crash::Kill => "kill",
            Crash::PowerLoss => "power loss",
        });
        tracing::debug!(at_ms = world.now_ms(), broker = self.id, ?crash, "comes up");
        if let Some(group) = self.loses.take() {
            self.machine.set_rates(quiet());
            losses::lose_log(world, self, group);
        }
        let sync_failed = self.machine.counters().of(Fault::SyncFails) > 0;
        let stopped = self.stopped.replace(false);
        for (group, info) in &*world.partitions.borrow() {
            let durability = world.plan.partitions[*group as usize - 1].config.durability;
            let kept = match durability {
                Durability::Durable => true,
                Durability::Os => (stopped || crash == Crash::Kill) && !sync_failed,
                Durability::Memory => stopped && !sync_failed,
            };
            if !kept && info.is_held_by(self.id) {
                world.voided.borrow_mut().insert(*group);
            }
        }
    }

    fn start(self: &Rc<Self>, world: &Rc<World>, tries: u32) -> bool {
        let sound = tries >= TRIES_MAX || !world.faults.get();
        self.machine.cancel_crash();
        self.machine.set_rates(quiet());
        if sound {
            self.machine.free_space();
        }
        if !sound {
            self.machine.set_rates(world.plan.theme.rates());
            if self.boots.get() > 0 && world.plan.theme.kills() && world.below(8) == 0 {
                world.count("crash in recovery");
                self.machine.crash_after(1 + world.below(150), self.crash(world));
            }
        }
        let cache = world.plan.store.cache_bytes;
        let opened = DataDir::open_on(self.machine.file_system(), Path::new(DIR)).and_then(|dir| {
            let found = dir.recover(cache)?;
            Ok((dir, found))
        });
        self.machine.cancel_crash();
        let (dir, found) = match opened {
            Ok(opened) if !self.machine.is_down() => opened,
            Ok(_) => return false,
            Err(_) if self.machine.is_down() => return false,
            Err(OpenError::Io { .. } | OpenError::NoSpace { .. }) if !sound => return false,
            Err(error) => {
                world.fail(format!("broker {} does not start: {error}", self.id));
                return false;
            }
        };
        for group in &found {
            let id = group_of(group.group_id);
            if let GroupHealth::Damaged { reason } = &group.health
                && !world.is_voided(id)
                && !world.lost.borrow().contains(&(self.id, id))
            {
                world.fail(format!("broker {} finds group {id} damaged: {reason}", self.id));
            }
        }
        self.run(world, dir, found);
        true
    }

    /// How a broker of this run may die.
    pub fn crash(&self, world: &World) -> Crash {
        if world.plan.theme.loses_power() && world.below(2) == 0 { Crash::PowerLoss } else { Crash::Kill }
    }

    /// The run is over: what a clean stop left on the disk is looked at as it lies there.
    pub fn ends(&self, world: &World, stopped: bool) {
        self.count_begun_over(world);
        self.kill();
        self.machine.restart();
        self.machine.set_rates(quiet());
        if stopped {
            self.inspect(world);
        }
    }

    /// What the store's own judge says of the directory.
    fn inspect(&self, world: &World) {
        let outcome = Inspection::open_on(self.machine.file_system(), DIR).and_then(|inspection| {
            inspection.verify(&mut |finding| {
                // What power took of a log that is not promised to outlive it stays damaged where nobody else has it.
                // Of a file in its directory, or of the directory itself.
                let mut dirs = Path::new(&finding.path).ancestors().take(2).filter_map(Path::file_name);
                let group = dirs.find_map(|dir| losses::group_of_dir(dir.to_str()?));
                let is_told = group.is_some_and(|group| world.is_voided(group));
                if finding.severity == Severity::Damage && !is_told {
                    world.fail(format!("broker {}: the directory is called damaged: {finding:?}", self.id));
                }
            })
        });
        if let Err(error) = outcome {
            world.fail(format!("broker {}: its directory cannot be inspected: {error}", self.id));
        }
    }

    fn run(self: &Rc<Self>, world: &Rc<World>, dir: DataDir, found: Vec<RecoveredGroup>) {
        let boot = self.boots.get() + 1;
        self.boots.set(boot);
        let config = BrokerConfig {
            node_id: self.id,
            group_min_session_timeout_ms: 0,
            group_initial_rebalance_delay_ms: world.plan.groups.first().map_or(0, |g| g.initial_delay_ms),
            ..BrokerConfig::default()
        };
        let (handle, mailbox) = ShardHandle::new();
        let (exports, _) = Exports::new();
        let node = Node::new(config, DIR.into(), image_of(world, self.id), vec![handle], exports, None);
        let node = Arc::new(node.hosted_by(self.host.clone()));
        let (inbox, jobs) = mpsc::unbounded_channel();
        let local = LocalSet::new();
        local.spawn_local(self.clone().serve(world.clone(), node.clone(), dir, found, mailbox, jobs));
        let local = Rc::new(RefCell::new(Some(local)));
        let paced = Paced { local: local.clone(), broker: self.clone(), sleep: None };
        let runner = tokio::task::spawn_local(paced);
        *self.process.borrow_mut() = Some(Process { boot, node, local, inbox, runner });
    }

    async fn serve(
        self: Rc<Self>,
        world: Rc<World>,
        node: Arc<Node>,
        dir: DataDir,
        found: Vec<RecoveredGroup>,
        mailbox: mpsc::Receiver<ShardMessage>,
        mut jobs: mpsc::UnboundedReceiver<Job>,
    ) {
        let store = match ShardStore::open(&dir, world.plan.store.clone()).await {
            Ok(store) => store,
            // The process ends.
            Err(_) => return self.machine.crash_now(Crash::Kill),
        };
        let shard = Shard::new(0, node, store);
        shard.links.carry_by(wires::carrier(&world, &self));
        let mut found: BTreeMap<u64, RecoveredGroup> = one_of_each(found, &dir).into_iter().collect();
        let held: Vec<PartitionInfo> =
            world.partitions.borrow().values().filter(|info| info.is_held_by(self.id)).cloned().collect();
        for info in held {
            open(&world, &shard, &info, found.remove(&info.group_id));
        }
        for orphan in found.into_values() {
            // The next start tries again.
            let _ = dir.remove_group(&orphan.dir_name);
        }
        for other in world.brokers.iter().filter(|other| other.id != self.id) {
            tokio::task::spawn_local(wires::send_raft(world.clone(), self.clone(), shard.clone(), other.id));
        }
        tokio::task::spawn_local(wires::tell_leads(world.clone(), self.clone(), shard.clone()));
        tokio::task::spawn_local(wires::watch_others(world.clone(), self.clone(), shard.clone()));
        let for_mending = (world.clone(), self.clone());
        tokio::task::spawn_local(mending::keep(shard.clone(), async move |shard, partition| {
            renew(&for_mending.0, &for_mending.1, shard, partition).await;
        }));
        let for_jobs = shard.clone();
        tokio::task::spawn_local(async move {
            while let Some(job) = jobs.recv().await {
                job(&for_jobs);
            }
        });
        shard.serve(mailbox).await;
    }
}

/// What the metadata says, to broker `id`.
pub(super) fn image_of(world: &World, id: i32) -> MetadataImage {
    let node = NodeInfo { id, host: "localhost".to_owned(), port: 9092, rack: None };
    let partitions = world.partitions.borrow();
    let topic = |name: &str, keeps_groups: bool| {
        let of_topic =
            partitions.values().filter(|info| world.plan.keeps_groups(info.group_id) == keeps_groups);
        let topic = Topic {
            name: name.to_owned(),
            id: Default::default(),
            // Groups count from one, and are numbered as they lie here.
            partitions: of_topic.cloned().collect(),
            configs: BTreeMap::new(),
            // Each partition has its own here.
            effective: TopicConfig::default().into(),
            internal: keeps_groups,
        };
        (name.to_owned(), Arc::new(topic))
    };
    let mut image = MetadataImage::empty(node);
    image.topics = Arc::new(BTreeMap::from([topic(TOPIC, false), topic(OFFSETS_TOPIC, true)]));
    image
}

fn spec_of(world: &World, info: &PartitionInfo) -> PartitionSpec {
    let (topic, first) = match world.plan.keeps_groups(info.group_id) {
        true => (OFFSETS_TOPIC, world.plan.data_partitions().len() as i32),
        false => (TOPIC, 0),
    };
    PartitionSpec {
        topic: topic.into(),
        index: info.group_id as i32 - 1 - first,
        group_id: info.group_id,
        config: world.plan.partitions[info.group_id as usize - 1].config.clone().into(),
        replicas: info.replicas.clone(),
        exported: false,
    }
}

/// As the controller does for a replica that is to get its log again.
async fn renew(world: &World, broker: &Broker, shard: &Rc<Shard>, partition: &Partition) {
    let info = world.partitions.borrow()[&partition.group_id].clone();
    if info.is_held_by(broker.id) {
        world.count("damaged replica renewed");
        if shard.renew(spec_of(world, &info)).await.is_err() {
            world.count("log not created");
        }
    }
}

/// As the controller does: from what recovery found, or anew. One that cannot be made now is made by the next start.
pub(super) fn open(world: &World, shard: &Rc<Shard>, info: &PartitionInfo, found: Option<RecoveredGroup>) {
    if shard.partition(info.group_id).is_some() {
        return;
    }
    let spec = spec_of(world, info);
    match found {
        Some(group) => drop(shard.attach(spec, group)),
        None if shard.create(spec).is_ok() => {}
        None => world.count("log not created"),
    }
}
