//! Start and stop, in order. Runs on the main thread, which then only accepts connections, serves the
//! admin API and waits for a signal.
//!
//! Start: configuration -> data directory (lock, format) -> ports (so that a port in use fails before
//! anything else is touched) -> admin API (which says what is waited for) -> cluster, if there is one -> recovery -> shards -> metadata -> partitions -> registered with
//! the cluster -> exports -> accept.
//! Stop: no new connections -> exports -> leaderships go to other nodes -> shards flush and close their logs -> exit 0.

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use flumen_metadata::{BrokerConfig, MetadataImage, NodeInfo};
use flumen_protocol::error_code::ErrorCode;
use flumen_storage::{DataDir, GroupHealth, RecoveredGroup, ShardStore, StoreConfig, failpoint};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::admin_http;
use crate::admin_process::Admin;
use crate::cluster::ClusterOptions;
use crate::cluster::bootstrap::{Presence, State, check_seeds};
use crate::cluster::change::{Intent, Registration, change};
use crate::cluster::exposure::{self, Security};
use crate::cluster::identity::Identity;
use crate::cluster::joining::find_cluster;
use crate::cluster::leaving::hand_over_everything;
use crate::cluster::listener::Rpc;
use crate::cluster::members::Members;
use crate::cluster::tls::{self, RpcTls};
use crate::cluster::{self, Cluster, hearsay, new_boot_id, news, room};
use crate::controller::{Controller, METADATA_GROUP, RecoveredGroups};
use crate::export::{self, Exports};
use crate::mailbox::{ShardHandle, ShardMessage};
use crate::net::listener;
use crate::node::{CONTROLLER_SHARD, Node};
use crate::shard::{Shard, group_of};
use crate::waits::Waits;

/// What the command line says.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    pub data_dir: PathBuf,
    pub kafka: SocketAddr,
    pub admin: SocketAddr,
    /// One per core when absent.
    pub shards: Option<usize>,
    pub config: BrokerConfig,
    /// One node, alone, when absent.
    pub cluster: Option<ClusterOptions>,
}

/// A shard that does not finish flushing by then is left to recovery, which loses nothing either.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);

pub fn run(options: ServerOptions) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut tls = None;
    if let Some(cluster) = &options.cluster {
        check_seeds(&cluster.seeds).map_err(anyhow::Error::msg)?;
        exposure::check(cluster.rpc, cluster.advertise_rpc.as_deref(), &cluster.security)
            .map_err(anyhow::Error::msg)?;
        if let Security::Tls(files) = &cluster.security {
            let loaded = RpcTls::load(files.clone()).map_err(anyhow::Error::msg)?;
            if let Some(address) = &cluster.advertise_rpc {
                loaded.serve_at(address).map_err(anyhow::Error::msg)?;
            }
            tls = Some(Arc::new(loaded));
        }
    }
    if let Err(error) = flumen_io::refuse_huge_pages() {
        tracing::warn!(%error, "huge pages stay on: latency rises for some milliseconds while memory grows");
    }
    // Read once, here: asked from a pinned thread, the list would have one core.
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let shard_count = options.shards.unwrap_or_else(|| default_shards(cores.len())).max(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let data_dir = Arc::new(DataDir::open(&options.data_dir)?);
        let kafka = bind(options.kafka, "kafka").await?;
        let admin = bind(options.admin, "admin").await?;
        let kafka_address = kafka.local_addr()?;
        let admin_address = admin.local_addr()?;
        // What a start waits for can be asked while it does.
        let waits = Arc::new(Waits::starting());
        let asked = Admin::new(options.config.node_id, waits.clone(), started);
        tokio::spawn(admin_http::serve(asked.clone(), admin));
        let member = match &options.cluster {
            None => None,
            Some(cluster) => {
                let listener = bind(cluster.rpc, "rpc").await?;
                Some(become_member(cluster, &options, tls, &waits, listener).await?)
            }
        };

        // What the caches will hold anyway need not be read again by the first fetches.
        let warm_bytes = StoreConfig::default().cache_bytes * shard_count;
        waits.say("it reads its logs", "none is needed: how long it takes depends on how much was written before it stopped");
        let recovered = recover(&data_dir, warm_bytes).await?;
        let recovered: RecoveredGroups = Arc::new(Mutex::new(one_of_each(recovered, &data_dir)));
        if let Some((cluster, _)) = &member {
            refuse_lost_log(&cluster.identity, &options.data_dir, &recovered)?;
        }
        let (host, port) = options.config.advertised(kafka_address);
        let image = MetadataImage::empty(NodeInfo {
            id: options.config.node_id,
            host,
            port,
            rack: options.config.rack.clone(),
        })
        .with_static_configs(&options.config);
        let (handles, mailboxes): (Vec<_>, Vec<_>) = (0..shard_count).map(|_| ShardHandle::new()).unzip();
        let (exports, export_commands) = Exports::new();
        let cluster = member.as_ref().map(|(cluster, _)| cluster.clone());
        let node = Node::new(
            options.config.clone(),
            options.data_dir.clone(),
            image,
            handles,
            exports,
            cluster,
        );
        let node = Arc::new(node.that_waits(waits.clone()));

        let mut threads = Vec::new();
        for (id, mailbox) in mailboxes.into_iter().enumerate() {
            let core = if shard_count <= cores.len() { cores.get(id).copied() } else { None };
            let (opened, is_open) = oneshot::channel();
            let (node, data_dir) = (node.clone(), data_dir.clone());
            let thread = std::thread::Builder::new()
                .name(format!("flumen-shard-{id}"))
                .spawn(move || shard_thread(id, core, node, data_dir, mailbox, opened))
                .context("cannot start a shard thread")?;
            threads.push(thread);
            is_open.await.context("a shard thread ended before it was ready")?.map_err(anyhow::Error::msg)?;
        }

        let for_controller = recovered.clone();
        on_shard(
            &node,
            CONTROLLER_SHARD,
            move |s| async move { Controller::start(&s, &for_controller).await },
        )
        .await?;
        // What is wrong with a cluster can be asked while a majority of it is missing.
        asked.serve(node.clone());
        if let Some((cluster, rpc)) = &member {
            rpc.serve(node.clone());
            for shard in &node.shards {
                let watch =
                    |shard: &std::rc::Rc<Shard>| drop(tokio::task::spawn_local(news::watch(shard.clone())));
                shard.post(watch).await?;
                let give_up =
                    |shard: &std::rc::Rc<Shard>| drop(tokio::task::spawn_local(room::give_up(shard.clone())));
                shard.post(give_up).await?;
            }
            let tell_and_ask = |shard: &std::rc::Rc<Shard>| {
                drop(tokio::task::spawn_local(news::tell(shard.clone())));
                drop(tokio::task::spawn_local(room::tell(shard.clone())));
                drop(tokio::task::spawn_local(hearsay::gather(shard.clone())));
            };
            node.controller().post(tell_and_ask).await?;
            waits.say(
                "the cluster has not confirmed that it is here, for which it needs the metadata of whoever leads it: a majority of the \
                 nodes that vote about the metadata has to run, of a new cluster of the seeds",
                "start the nodes that are down, or mend the network between the nodes",
            );
            register(&node, cluster).await?;
            rpc.set_current();
        }
        drop_orphans(&node, &data_dir).await?;
        let next_look = node.disk.look(&data_dir);
        tokio::spawn(watch_disk(node.clone(), data_dir.clone(), next_look));
        export::start(node.clone(), export_commands)?;

        // Whoever reads the ready line may ask for a clean stop at once.
        let stop = StopSignals::listen()?;
        tokio::spawn(listener::accept(node.clone(), kafka));
        node.set_ready();
        let took_ms = started.elapsed().as_millis();
        // Nobody may be there to read it; the broker serves all the same.
        let _ = writeln!(
            std::io::stdout(),
            "flumen ready kafka={kafka_address} admin={admin_address} took={took_ms}ms"
        );
        tracing::info!(kafka = %kafka_address, admin = %admin_address, shards = shard_count, "ready");

        stop.wait().await;
        tracing::info!("stopping");
        node.exports.stop().await;
        if node.cluster.is_some() {
            hand_over_everything(&node).await;
            // Whatever is removed while it does not run is noticed by the next start.
            node.controller().run(|shard| async move { shard.controller().note_held().await }).await?;
        }
        for shard in 0..shard_count {
            let stopped = tokio::time::timeout(
                SHUTDOWN_GRACE,
                node.shards[shard].run(|s| async move { s.shutdown().await }),
            )
            .await;
            match stopped {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => bail!("shard {shard} could not close its log cleanly: {error}"),
                Ok(Err(_)) => bail!("shard {shard} was gone before it could close its log"),
                Err(_) => tracing::warn!(shard, "still flushing; leaving the rest to recovery"),
            }
        }
        Ok(())
    })
}

/// One core stays free for what is not a shard: exports, the kernel's network and disk work, the acceptor. On two cores one
/// shard took 138,000 one-record batches a second at 6.7 us of CPU each where two took 85,000 at 12.3, in one run: every
/// hop between shards that both sleep costs two wake-ups, and every further log halves what a commit carries.
fn default_shards(cores: usize) -> usize {
    cores.saturating_sub(1).max(1)
}

/// On a thread of its own: what recovery needed for a moment goes back to the system with the thread's heap, and whoever asks
/// meanwhile hears what is waited for.
async fn recover(data_dir: &Arc<DataDir>, warm_bytes: usize) -> anyhow::Result<Vec<RecoveredGroup>> {
    let (done, recovered) = oneshot::channel();
    let of = data_dir.clone();
    let thread = std::thread::Builder::new().name("flumen-recovery".to_string()).spawn(move || {
        let _ = done.send(of.recover(warm_bytes));
    });
    let thread = thread.context("cannot start a thread")?;
    let recovered = recovered.await;
    if let Err(panic) = thread.join() {
        resume_unwind(panic);
    }
    Ok(recovered.context("recovery ended without a word")??)
}

async fn watch_disk(node: Arc<Node>, data_dir: Arc<DataDir>, mut next_look: Duration) {
    loop {
        tokio::time::sleep(next_look).await;
        next_look = node.disk.look(&data_dir);
    }
}

async fn bind(address: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let why = match error.kind() {
            std::io::ErrorKind::AddrInUse => "another process uses the port".to_string(),
            std::io::ErrorKind::AddrNotAvailable => "this machine does not have the address".to_string(),
            std::io::ErrorKind::PermissionDenied => "this user may not use the port".to_string(),
            _ => error.to_string(),
        };
        anyhow::anyhow!(
            "cannot listen on {address} for {what}: {why}; choose another with --{what} HOST:PORT"
        )
    })
}

async fn on_shard<T, F, Fut>(node: &Arc<Node>, shard: usize, work: F) -> anyhow::Result<T>
where
    T: Send + 'static,
    F: FnOnce(std::rc::Rc<Shard>) -> Fut + Send + 'static,
    Fut: std::future::Future<Output = Result<T, String>> + 'static,
{
    node.shards[shard].run(work).await?.map_err(anyhow::Error::msg)
}

fn shard_thread(
    id: usize,
    core: Option<core_affinity::CoreId>,
    node: Arc<Node>,
    data_dir: Arc<DataDir>,
    mailbox: mpsc::Receiver<ShardMessage>,
    opened: oneshot::Sender<Result<(), String>>,
) {
    if let Some(core) = core {
        core_affinity::set_for_current(core);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = opened.send(Err(format!("cannot start the runtime of shard {id}: {error}")));
            return;
        }
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let mut config = StoreConfig { shard: id, ..StoreConfig::default() };
        if failpoint::small() {
            (config.wal_file_bytes, config.cache_bytes) = (512 << 10, 2 << 20);
            (config.direct_batch_bytes, config.direct_run_bytes) = (4 << 10, 8 << 10);
        }
        match ShardStore::open(&data_dir, config).await {
            Ok(store) => {
                let shard = Shard::new(id, node, store);
                let _ = opened.send(Ok(()));
                shard.serve(mailbox).await;
            }
            Err(error) => {
                let _ = opened.send(Err(format!("cannot open the log of shard {id}: {error}")));
            }
        }
    });
}

/// Finds out which cluster this is, and answers others who ask, from here on.
async fn become_member(
    cluster: &ClusterOptions,
    options: &ServerOptions,
    tls: Option<Arc<RpcTls>>,
    waits: &Arc<Waits>,
    listener: TcpListener,
) -> anyhow::Result<(Arc<Cluster>, Arc<Rpc>)> {
    let (node_id, boot_id) = (options.config.node_id, new_boot_id());
    if let Some(tls) = &tls {
        tokio::spawn(tls::watch(tls.clone()));
    }
    let is_exposed = exposure::is_exposed(cluster.rpc, cluster.advertise_rpc.as_deref());
    if tls.is_none() && is_exposed {
        tracing::warn!("--rpc-plaintext: whoever reaches {} can act as a broker", cluster.rpc);
    }
    let seeds = cluster.seeds.clone();
    let own = Presence { node_id, boot_id, seeds, state: State::Empty, waits: None, clock_ms: 0 };
    let rpc = Rpc::new(own, tls.clone(), waits.clone());
    tokio::spawn(cluster::listener::accept(rpc.clone(), listener));
    let (identity, address) = find_cluster(cluster, node_id, boot_id, &options.data_dir, &rpc).await?;
    if let Some(tls) = &tls {
        tls.serve_at(&address).map_err(anyhow::Error::msg)?;
    }
    let cluster = Cluster { identity, boot_id, address, members: Members::default(), tls, is_exposed };
    Ok((Arc::new(cluster), rpc))
}

/// A member that lost its log would vote again for what it has voted for, and forget what it has acknowledged.
fn refuse_lost_log(
    identity: &Identity,
    data_dir: &std::path::Path,
    recovered: &RecoveredGroups,
) -> anyhow::Result<()> {
    let has_metadata = recovered.lock().expect("no panic under this lock").contains_key(&METADATA_GROUP);
    if identity.registered && !has_metadata {
        bail!(
            "{} belongs to node {} of cluster {}, and its log is gone; restore it, or, if it is lost, start with an empty \
             directory and a --node-id that was never used and then run `flumen cluster decommission {}`",
            data_dir.display(),
            identity.node_id,
            identity.cluster_id,
            identity.node_id
        );
    }
    Ok(())
}

/// Tells the cluster where this node is. When it is done the metadata here is no older than this process.
async fn register(node: &Arc<Node>, cluster: &Cluster) -> anyhow::Result<()> {
    let own = node.image.load().node.clone();
    let registration = Registration {
        id: own.id,
        host: own.host,
        port: own.port,
        rack: own.rack,
        rpc_address: cluster.address.clone(),
        boot_id: cluster.boot_id,
        directory_id: cluster.identity.directory_id.to_string(),
        version_max: flumen_peer::VERSION_MAX,
        registered: cluster.identity.registered,
    };
    let done = loop {
        match change(node, Intent::Register(registration.clone())).await {
            Ok(done) => break done,
            Err(error) if error.code == ErrorCode::DUPLICATE_BROKER_REGISTRATION => bail!(error.message),
            Err(error) => {
                let refused = node.controller().run(|shard| async move { shard.links.refusal() }).await?;
                if let Some(sentence) = refused {
                    bail!(sentence);
                }
                tracing::warn!(%error, "not registered yet: a majority of the founding nodes has to run");
            }
        }
    };
    let offset = done.offset;
    on_shard(node, CONTROLLER_SHARD, move |shard| async move {
        shard.controller().wait_until_applied(offset).await;
        Ok(())
    })
    .await?;
    if !cluster.identity.registered {
        Identity { registered: true, ..cluster.identity.clone() }.store(&node.data_dir)?;
    }
    Ok(())
}

/// By the Raft group. Of two logs of one group the empty one counts: a crash came after it was made in place of a damaged one, and
/// before that was gone (`Shard::renew`). Of two that have entries the one with more does, and the other is left alone.
pub fn one_of_each(recovered: Vec<RecoveredGroup>, data_dir: &DataDir) -> HashMap<u64, RecoveredGroup> {
    let mut found: HashMap<u64, RecoveredGroup> = HashMap::with_capacity(recovered.len());
    for group in recovered {
        let group_id = group_of(group.group_id);
        let Some(other) = found.remove(&group_id) else {
            found.insert(group_id, group);
            continue;
        };
        let is_damaged = |group: &RecoveredGroup| matches!(group.health, GroupHealth::Damaged { .. });
        let is_empty = |group: &RecoveredGroup| group.last_index == 0 && !is_damaged(group);
        let rank =
            |group: &RecoveredGroup| (is_empty(group), !is_damaged(group), group.last_term, group.last_index);
        let (stays, goes) = if rank(&group) > rank(&other) { (group, other) } else { (other, group) };
        if is_empty(&stays) {
            tracing::warn!(group_id, directory = %goes.dir_name, "removing a damaged log in whose place there is a new one");
            if let Err(error) = data_dir.remove_group(&goes.dir_name) {
                tracing::warn!(group_id, %error, "could not remove it; the next start tries again");
            }
        } else {
            tracing::error!(group_id, directory = %goes.dir_name, counts = %stays.dir_name, "two logs of one partition; this one is left alone");
        }
        found.insert(group_id, stays);
    }
    found
}

/// Logs that no topic names belong to topics whose deletion a crash interrupted, and those that went to other nodes have
/// been replaced there. A damaged one stays: it may be one that a topic would name if its number could be read.
async fn drop_orphans(node: &Arc<Node>, data_dir: &Arc<DataDir>) -> anyhow::Result<()> {
    let data_dir = data_dir.clone();
    on_shard(node, CONTROLLER_SHARD, move |shard| async move {
        shard
            .controller()
            .drop_orphans(move |group_id, group| {
                if let GroupHealth::Damaged { reason } = &group.health {
                    tracing::error!(group_id, directory = %group.dir_name, reason, "a damaged log that no topic names; left alone");
                    return;
                }
                tracing::info!(group_id, directory = %group.dir_name, "removing the log of a deleted topic");
                if let Err(error) = data_dir.remove_group(&group.dir_name) {
                    tracing::warn!(group_id, %error, "could not remove it; the next start tries again");
                }
            })
            .await;
        Ok(())
    })
    .await
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// From here on SIGTERM and SIGINT no longer end the process by themselves.
    fn listen() -> std::io::Result<StopSignals> {
        Ok(StopSignals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
