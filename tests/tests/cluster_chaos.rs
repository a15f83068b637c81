//! Clusters of three to five real processes in network namespaces under faults in an order of the seed's: nodes are killed,
//! alone, in pairs, all, while they start, stand still, are stopped in turn, are cut off in every shape, sit on a slow
//! link or a full or slow disk, wall clocks jump, ClickHouse dies, and partitions are moved meanwhile. After each fault the cluster serves again; at the
//! end the checker finds nothing, the replicas have the same bytes, and the exported table has each record once.
//!
//! A short form in `make test`; `make chaos` chooses with `CYCLES` and `SEED` how many faults, and which, and `PAUSE_MS`
//! for how long a node may stand still. `FLUMEN_SMALL` in every second seed turns small rings and snapshots of the metadata over.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::clock::Clock;
use flumen_tests::cluster::Cluster;
use flumen_tests::export::check_table;
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::Sender;
use flumen_tests::load::Load;
use flumen_tests::mount::Mount;
use flumen_tests::network::Network;
use flumen_tests::process::free_port;
use flumen_tests::slow_disk::SlowDisk;
use flumen_tests::witness::Witness;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;
const EXPORTED: &str = "clicks";
const DISK_MIB: u64 = 512;
/// Far from what retention keeps, and far more than anything else is timed by.
const JUMP_MS_MAX: i64 = 3_600_000;

#[derive(Debug)]
enum Fault {
    Kill(Vec<usize>),
    /// Killed again so long after it began to start.
    KillAtStart(usize, u64),
    StandStill(usize, u64),
    /// Each is stopped as an operator stops it, and started again.
    RollingRestart,
    /// A partition is to be on these nodes; whoever is named second dies on the way.
    Move(i32, Vec<i32>, Option<usize>),
    Cut(Cut, u64),
    /// The last node's disk has no room for so long.
    DiskFull(u64),
    /// It takes so many KiB a second, for so long.
    DiskSlow(u32, u64),
    /// A node's wall clock is so far from the machine's, until it jumps again; in milliseconds.
    ClockJumps(usize, i64),
    KillClickHouse,
}

#[derive(Debug)]
enum Cut {
    /// From everybody.
    Isolate(usize),
    FromNodes(usize),
    Between(usize, usize),
    OneWay(usize, usize),
    /// KiB a second.
    Slow(usize, u32),
}

struct Chaos {
    // Nodes go before their network and their disk.
    cluster: Cluster,
    clickhouse: ClickHouse,
    slow: Option<SlowDisk>,
    disk: Option<Mount>,
    clocks: Vec<Clock>,
    network: Option<Network>,
    random: StdRng,
    pause_ms_max: u64,
}

impl Chaos {
    fn fault(&mut self) -> Fault {
        let count = self.cluster.nodes.len();
        let random = &mut self.random;
        let mut nodes: Vec<usize> = (0..count).collect();
        nodes.shuffle(random);
        match random.random_range(0..23) {
            0..=2 => Fault::Kill(nodes[..1].to_vec()),
            3 => Fault::Kill(nodes[..2].to_vec()),
            4 => Fault::Kill(nodes),
            5 => Fault::KillAtStart(nodes[0], random.random_range(1..300)),
            6..=7 => Fault::StandStill(nodes[0], random.random_range(100..self.pause_ms_max)),
            8 => Fault::RollingRestart,
            9 => Fault::KillClickHouse,
            10 => Fault::DiskFull(random.random_range(500..4_000)),
            11..=15 => {
                let cut = match random.random_range(0..5) {
                    0 => Cut::Isolate(nodes[0]),
                    1 => Cut::FromNodes(nodes[0]),
                    2 => Cut::Between(nodes[0], nodes[1]),
                    3 => Cut::OneWay(nodes[0], nodes[1]),
                    _ => Cut::Slow(nodes[0], random.random_range(50..500)),
                };
                Fault::Cut(cut, random.random_range(500..8_000))
            }
            16 => Fault::DiskSlow(random.random_range(200..3_000), random.random_range(500..8_000)),
            17..=18 => Fault::ClockJumps(nodes[0], random.random_range(-JUMP_MS_MAX..JUMP_MS_MAX)),
            _ => {
                let target = nodes[..3].iter().map(|at| i32::try_from(*at).unwrap() + 1).collect();
                let dies = random.random_bool(0.5).then(|| random.random_range(0..count));
                Fault::Move(random.random_range(0..PARTITIONS), target, dies)
            }
        }
    }

    fn strike(&mut self, fault: &Fault) {
        let wait = |ms: u64| std::thread::sleep(Duration::from_millis(ms));
        let cluster = &mut self.cluster;
        match fault {
            Fault::Kill(nodes) => nodes.iter().for_each(|at| cluster.nodes[*at].kill_9()),
            Fault::KillAtStart(at, ms) => {
                cluster.nodes[*at].kill_9();
                cluster.nodes[*at].restart_and_kill(Duration::from_millis(*ms)).unwrap();
            }
            Fault::StandStill(at, ms) => {
                cluster.nodes[*at].pause().unwrap();
                wait(*ms);
                cluster.nodes[*at].resume().unwrap();
            }
            Fault::RollingRestart => {
                for node in &mut cluster.nodes {
                    assert!(node.stop().unwrap().success(), "a node did not stop cleanly");
                    node.restart().unwrap();
                }
            }
            Fault::Move(partition, target, dies) => {
                cluster
                    .until("a move to be taken", || {
                        cluster.reassign(TOPIC, *partition, Some(target)).ok().filter(|code| *code == 0)
                    })
                    .unwrap();
                if let Some(at) = dies {
                    wait(self.random.random_range(0..1_500));
                    cluster.nodes[*at].kill_9();
                }
            }
            Fault::Cut(cut, ms) => {
                let Some(network) = &mut self.network else { return };
                match *cut {
                    Cut::Isolate(at) => network.isolate(at),
                    Cut::FromNodes(at) => network.cut_from_nodes(at),
                    Cut::Between(one, other) => network.cut_between(one, other),
                    Cut::OneWay(from, to) => network.cut_one_way(from, to),
                    Cut::Slow(at, rate) => network.slow(at, rate),
                }
                .unwrap();
                wait(*ms);
                network.heal().unwrap();
            }
            Fault::DiskFull(ms) => {
                let Some(disk) = &self.disk else { return };
                fill(&disk.path.join("filler"));
                wait(*ms);
                std::fs::remove_file(disk.path.join("filler")).unwrap();
            }
            Fault::DiskSlow(kib, ms) => {
                let (Some(slow), Some(pid)) = (&self.slow, cluster.nodes.last().and_then(Flumen::pid)) else {
                    return;
                };
                slow.limit(pid, u64::from(*kib) << 10).unwrap();
                wait(*ms);
                slow.limit(pid, 0).unwrap();
            }
            Fault::ClockJumps(at, ms) => self.clocks[*at].set_ahead_ms(*ms).unwrap(),
            Fault::KillClickHouse => {
                self.clickhouse.kill_9();
                wait(1_000);
                self.clickhouse.restart().unwrap();
            }
        }
        // Whoever is dead stays so for a while, or for none at all.
        if self.random.random_bool(0.5) {
            wait(self.random.random_range(0..2_000));
        }
    }
}

/// Until nothing more can be written.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let mut bytes = vec![0; 1 << 20];
    while !bytes.is_empty() {
        match file.write(&bytes) {
            Ok(0) | Err(_) => bytes.truncate(bytes.len() / 2),
            Ok(_) => {}
        }
    }
}

/// Records for the export, which come until it is told to stop; then what was acknowledged of them.
struct Clicks {
    stopped: Arc<AtomicBool>,
    thread: JoinHandle<Sender>,
}

impl Clicks {
    fn start(kafka: &str) -> Clicks {
        let stopped = Arc::new(AtomicBool::new(false));
        let mut sender = Sender::new(kafka, &[("socket.timeout.ms", "4000")]).unwrap();
        let thread = {
            let stopped = stopped.clone();
            std::thread::spawn(move || {
                for id in 0.. {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let value = json!({ "id": id }).to_string();
                    sender.send(EXPORTED, &id.to_string(), value.as_bytes(), id).unwrap();
                    std::thread::sleep(Duration::from_millis(4));
                }
                sender.flush().unwrap();
                sender
            })
        };
        Clicks { stopped, thread }
    }

    fn finish(self) -> Sender {
        self.stopped.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn chaos(seed: u64, faults: usize, pause_ms_max: u64) {
    // Stays there when something is found.
    let dir = tempfile::tempdir().unwrap().keep();
    let nodes = 3 + usize::try_from(seed % 3).unwrap();
    let network = Network::new(nodes);
    let disk = Mount::ext4(&dir, DISK_MIB);
    if let Some(disk) = &disk {
        std::os::unix::fs::symlink(&disk.path, dir.join(format!("n{nodes}"))).unwrap();
    }
    let small = seed % 2 == 0;
    let environment = if small { vec![("FLUMEN_SMALL", "1".to_string())] } else { Vec::new() };
    let outside = network.as_ref().map_or_else(|| "127.0.0.1".to_string(), Network::outside);
    let clickhouse = ClickHouse::start_own_at(&dir, &outside, free_port()).unwrap();
    let url = format!("clickhouse.url={}", clickhouse.url);
    let settings = ["group.initial.rebalance.delay.ms=0", "default.replication.factor=3", &url];
    let clocks: Vec<Clock> = (1..=nodes).map(|id| Clock::new(&dir, &format!("n{id}")).unwrap()).collect();
    let slow = disk.as_ref().and_then(|disk| SlowDisk::new(&disk.path));
    let of_node = |at: usize| environment.iter().cloned().chain(clocks[at].environment()).collect();
    let cluster = Cluster::start_each_in(&dir, nodes, &settings, of_node, network.as_ref()).unwrap();
    let random = StdRng::seed_from_u64(seed);
    let mut chaos = Chaos { cluster, clickhouse, slow, disk, clocks, network, random, pause_ms_max };
    let configs = if small { json!({ "segment.bytes": "1048576" }) } else { json!({}) };
    chaos.cluster.create_topic(TOPIC, PARTITIONS, 3, &configs).unwrap();
    chaos.cluster.create_topic(EXPORTED, PARTITIONS, 3, &json!({})).unwrap();
    let export = json!({ "auto_create": true, "columns": "id UInt64", "target_lag_ms": 50 });
    let path = format!("/v1/exports/{EXPORTED}");
    chaos.cluster.any().unwrap().call("PUT", &path, Some(&export)).unwrap();
    let kafka = chaos.cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let clicks = Clicks::start(&kafka);
    let mut witnesses: Vec<Witness> =
        (0..2).map(|_| Witness::start(&kafka, TOPIC, "watchers").unwrap()).collect();
    chaos.cluster.progress(&load, "all well").unwrap();
    println!("seed {seed}, {nodes} nodes, {faults} faults, {}", dir.display());
    for number in 0..faults {
        let fault = chaos.fault();
        println!("{number}: {fault:?}");
        chaos.strike(&fault);
        chaos.cluster.restart_all().unwrap();
        chaos.cluster.progress(&load, "   served again").unwrap();
    }
    chaos.cluster.await_no_moves().unwrap();
    let clicks = clicks.finish();
    let acknowledged = clicks.reports().places.clone();
    assert_eq!((acknowledged.len() as u64, clicks.reports().failed.len()), (clicks.sent(), 0));
    let rows = || chaos.clickhouse.number(&format!("SELECT count() FROM {EXPORTED}")).unwrap_or(0);
    let all = || (rows() as usize >= acknowledged.len()).then_some(());
    chaos.cluster.until("all rows", all).unwrap();
    check_table(&chaos.clickhouse, EXPORTED, &acknowledged).unwrap();
    println!("{} rows, each once", acknowledged.len());
    chaos.cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
    drop(chaos);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_cluster_outlasts_faults_in_any_order() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let full = std::env::var_os("FLUMEN_TEST_FULL").is_some();
    let faults = number("CYCLES").unwrap_or(if full { 100 } else { 8 });
    let seeds = number("SEED").map_or(if full { 1..=3 } else { 1..=1 }, |seed| seed..=seed);
    for seed in seeds {
        chaos(seed, faults as usize, number("PAUSE_MS").unwrap_or(6_000).max(101));
    }
}
