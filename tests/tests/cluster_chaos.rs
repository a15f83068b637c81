//! A cluster of four real processes under faults in an order of the seed's: nodes are killed, alone, in pairs, all, while they
//! start, stand still, and partitions are moved meanwhile. After each fault the cluster serves again; at the end the checker
//! finds nothing, and the replicas have the same bytes.
//!
//! In `make test-full` only; `CYCLES` and `SEED` choose how many faults, and which. `FLUMEN_SMALL` in every second seed turns small rings and
//! snapshots of the metadata over.

use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::load::Load;
use flumen_tests::witness::Witness;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;
const NODES: usize = 4;

#[derive(Debug)]
enum Fault {
    Kill(Vec<usize>),
    /// Killed again so long after it began to start.
    KillAtStart(usize, u64),
    StandStill(usize, u64),
    /// A partition is to be on these nodes; whoever is named second dies on the way.
    Move(i32, Vec<i32>, Option<usize>),
}

fn fault(random: &mut StdRng) -> Fault {
    let mut nodes: Vec<usize> = (0..NODES).collect();
    nodes.shuffle(random);
    match random.random_range(0..10) {
        0..=2 => Fault::Kill(nodes[..1].to_vec()),
        3 => Fault::Kill(nodes[..2].to_vec()),
        4 => Fault::Kill(nodes),
        5 => Fault::KillAtStart(nodes[0], random.random_range(1..300)),
        6 => Fault::StandStill(nodes[0], random.random_range(100..6_000)),
        _ => {
            let target = nodes[..3].iter().map(|at| i32::try_from(*at).unwrap() + 1).collect();
            let dies = random.random_bool(0.5).then(|| random.random_range(0..NODES));
            Fault::Move(random.random_range(0..PARTITIONS), target, dies)
        }
    }
}

fn strike(cluster: &mut Cluster, fault: &Fault, random: &mut StdRng) {
    match fault {
        Fault::Kill(nodes) => nodes.iter().for_each(|at| cluster.nodes[*at].kill_9()),
        Fault::KillAtStart(at, ms) => {
            cluster.nodes[*at].kill_9();
            cluster.nodes[*at].restart_and_kill(Duration::from_millis(*ms)).unwrap();
        }
        Fault::StandStill(at, ms) => {
            cluster.nodes[*at].pause().unwrap();
            std::thread::sleep(Duration::from_millis(*ms));
            cluster.nodes[*at].resume().unwrap();
        }
        Fault::Move(partition, target, dies) => {
            cluster
                .until("a move to be taken", || {
                    cluster.reassign(TOPIC, *partition, Some(target)).ok().filter(|code| *code == 0)
                })
                .unwrap();
            if let Some(at) = dies {
                std::thread::sleep(Duration::from_millis(random.random_range(0..1_500)));
                cluster.nodes[*at].kill_9();
            }
        }
    }
    // Whoever is dead stays so for a while, or for none at all.
    if random.random_bool(0.5) {
        std::thread::sleep(Duration::from_millis(random.random_range(0..2_000)));
    }
}

fn chaos(seed: u64, faults: usize) {
    // Stays there when something is found.
    let dir = tempfile::tempdir().unwrap().keep();
    let mut random = StdRng::seed_from_u64(seed);
    let small = seed % 2 == 0;
    let environment = if small { vec![("FLUMEN_SMALL", "1".to_string())] } else { Vec::new() };
    let settings = ["group.initial.rebalance.delay.ms=0"];
    let mut cluster = Cluster::start_with(&dir, NODES, &settings, environment).unwrap();
    let configs = if small { json!({ "segment.bytes": "1048576" }) } else { json!({}) };
    cluster.create_topic(TOPIC, PARTITIONS, 3, &configs).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses: Vec<Witness> =
        (0..2).map(|_| Witness::start(&kafka, TOPIC, "watchers").unwrap()).collect();
    println!("seed {seed}, {faults} faults, {}", dir.display());
    for number in 0..faults {
        let fault = fault(&mut random);
        println!("{number}: {fault:?}");
        strike(&mut cluster, &fault, &mut random);
        cluster.restart_all().unwrap();
        cluster.progress(&load, "   served again").unwrap();
    }
    cluster.await_no_moves().unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
    drop(cluster);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_cluster_outlasts_faults_in_any_order() {
    if !flumen_tests::cluster::only_in_full("a_cluster_outlasts_faults_in_any_order") {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let faults = number("CYCLES").unwrap_or(100);
    let seeds = number("SEED").map_or(1..=2, |seed| seed..=seed);
    for seed in seeds {
        chaos(seed, faults as usize);
    }
}
