//! What goes wrong, and what operators do meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flumen_broker::balancer;
use flumen_broker::partition::{Partition, raft_id};
use flumen_io::simulated::{Crash, Fault};
use flumen_metadata::reassignment::Step;
use flumen_raft::Target;
use tokio::time::Instant;

use super::broker::{Broker, image_of, open};
use super::plan::quiet;
use super::world::World;

/// Every kind of fault, and everything else that must have happened in a set of runs for them to be worth anything.
pub const FAULTS: [&str; 56] = [
    "isolate one",
    "split in two",
    "one way",
    "partial",
    "loss",
    "delay",
    "duplicate",
    "reorder",
    "flipped bit",
    "kill",
    "kill in the middle of an operation",
    "power loss",
    "crash of all",
    "crash in recovery",
    "clean stop",
    "pause",
    "clock jump",
    "transfer",
    "move",
    "move reached",
    "move given up",
    "replica deleted",
    "replica begins over",
    "log lost",
    "damaged replica renewed",
    "records deleted",
    "snapshot",
    "batch sent again",
    "request given up",
    "producer started anew",
    "read from a follower",
    "reader behind the log start",
    "end asked",
    "beginning asked",
    "place of a time asked",
    "newest record asked",
    "end of an epoch asked",
    "leader could not be sure",
    "share given",
    "offset committed",
    "offsets fetched",
    "rebalance heard",
    "member left",
    "member died",
    "member stood still",
    "member forgotten",
    "instance fenced",
    "old generation refused",
    "commit of a stranger refused",
    "coordinator moved",
    "sync fails",
    "sync stalls",
    "write fails",
    "read fails",
    "no space",
    "torn sector",
];

/// Between two looks at how far moves are, as `balancer` takes them.
const TURN_INTERVAL: Duration = Duration::from_millis(200);
/// After the last fault, for damaged replicas to get their logs from others. Those that still refuse to serve are started again,
/// as an operator does: they have no others, or too few, or were mended a short while before.
const MENDING_MS: u64 = 3_000;
/// In a clean stop, for leaders to hand over.
const HAND_OVER_MS: u64 = 1_000;

/// With what the disks counted.
pub(super) fn counts(world: &World) -> BTreeMap<&'static str, u64> {
    let mut counts = world.network.borrow().counts.clone();
    let of_disks = [
        ("sync fails", Fault::SyncFails),
        ("sync stalls", Fault::SyncStalls),
        ("write fails", Fault::WriteFails),
        ("read fails", Fault::ReadFails),
        ("no space", Fault::NoSpace),
        ("torn sector", Fault::SectorTorn),
    ];
    for (name, fault) in of_disks {
        let count: u64 = world.brokers.iter().map(|broker| broker.machine.counters().of(fault)).sum();
        if count > 0 {
            counts.insert(name, count);
        }
    }
    counts
}

pub(super) async fn disturb(world: Rc<World>) {
    while world.faults.get() && world.is_sound() {
        tokio::time::sleep(Duration::from_millis(world.between(20, 700))).await;
        if world.faults.get() {
            one_fault(&world);
        }
    }
}

fn one_fault(world: &Rc<World>) {
    let theme = world.plan.theme;
    let broker = world.brokers[world.below(world.brokers.len() as u64) as usize].clone();
    let group = world.pick(&world.groups());
    let several = world.brokers.len() > 1;
    match world.below(18) {
        0..=1 if several => {
            let nodes: Vec<u64> = world.brokers.iter().map(|b| b.raft_id()).collect();
            world.with_rng(|rng, network| network.split(rng, &nodes));
        }
        2..=4 => world.network.borrow_mut().heal(),
        5 if several => {
            let (loss, twice, late, flip) =
                (world.below(100), world.below(80), world.below(60), world.below(20));
            let mut network = world.network.borrow_mut();
            network.loss_permille = loss;
            network.duplicate_permille = twice;
            network.late_permille = late;
            network.flip_permille = flip;
        }
        6..=8 if theme.kills() => {
            if world.below(2) == 0 {
                broker.machine.crash_now(broker.crash(world));
            } else {
                world.count("kill in the middle of an operation");
                broker.machine.crash_after(1 + world.below(300), broker.crash(world));
            }
        }
        9 if theme.kills() && world.below(3) == 0 => {
            world.count("crash of all");
            world.brokers.iter().for_each(|broker| broker.machine.crash_now(broker.crash(world)));
        }
        10 if theme.kills() => {
            tokio::task::spawn_local(stop_cleanly(world.clone(), broker));
        }
        11 if broker.boot().is_some() => {
            world.count("pause");
            broker.paused_until.set(Some(Instant::now() + Duration::from_millis(world.between(20, 4_000))));
        }
        12 => {
            world.count("clock jump");
            let jump = world.between(0, 1_200_000) as i64 - 600_000;
            broker.host.skew_ms.store(jump, Ordering::Relaxed);
        }
        13 if several => {
            let to = world.pick(&world.brokers.iter().map(|b| b.raft_id()).collect::<Vec<_>>());
            let for_job = world.clone();
            broker.post(move |shard| {
                let Some(partition) = shard.partition(group) else { return };
                if partition.transfer_leader(to).is_ok() {
                    for_job.count("transfer");
                }
            });
        }
        14..=15 if theme.moves() => begin_move(world, group),
        16 if !world.plan.keeps_groups(group) => delete_records(world, &broker, group),
        17 if theme.moves() => give_up_move(world, group),
        _ => {}
    }
}

fn delete_records(world: &Rc<World>, broker: &Broker, group: u64) {
    let (world, part, machine) = (world.clone(), world.between(1, 100), broker.machine.clone());
    broker.post(move |shard| {
        let Some(partition) = shard.partition(group).filter(|partition| partition.serves()) else { return };
        let (start, end) = (partition.log_start_offset(), partition.high_watermark());
        let to = start + (end - start) * part as i64 / 150;
        if to <= start {
            return;
        }
        world.heard.borrow_mut().delete(group, to);
        tokio::task::spawn_local(async move {
            if partition.delete_records(to).await.is_ok() {
                world.count("records deleted");
                // A process that is no more told nobody.
                if !machine.is_down() {
                    world.heard.borrow_mut().deleted(group, to);
                }
            }
        });
    });
}

/// As an operator does who asks for other replicas: the metadata knows, and the new ones are made.
fn begin_move(world: &Rc<World>, group: u64) {
    let mut ids: Vec<i32> = world.brokers.iter().map(|broker| broker.id).collect();
    for at in (1..ids.len()).rev() {
        ids.swap(at, world.below(at as u64 + 1) as usize);
    }
    ids.truncate(world.pick(&[1, 2, 3, 3, 3]));
    {
        let mut partitions = world.partitions.borrow_mut();
        let Some(info) = partitions.get_mut(&group) else { return };
        if info.target.is_some() {
            return;
        }
        info.target = Some(ids);
    }
    world.count("move");
    match_metadata(world, group);
}

/// Back to where it was; who was to get a replica keeps its log until the group does not count on it.
fn give_up_move(world: &Rc<World>, group: u64) {
    {
        let mut partitions = world.partitions.borrow_mut();
        let Some(info) = partitions.get_mut(&group) else { return };
        let Some(target) = info.target.clone() else { return };
        if target == info.replicas {
            return;
        }
        let gone: Vec<i32> = target.into_iter().filter(|id| !info.replicas.contains(id)).collect();
        info.dropped.extend(gone);
        info.dropped.sort_unstable();
        info.dropped.dedup();
        info.target = Some(info.replicas.clone());
    }
    world.count("move given up");
    match_metadata(world, group);
}

/// All brokers that run hear of the metadata, and open and delete what it says; the others do so when they start.
fn match_metadata(world: &Rc<World>, group: u64) {
    for broker in &world.brokers {
        let (for_job, id) = (world.clone(), broker.id);
        broker.post(move |shard| {
            shard.node.image.store(Arc::new(image_of(&for_job, id)));
            let info = for_job.partitions.borrow()[&group].clone();
            if info.is_held_by(id) {
                open(&for_job, shard, &info, None);
            } else if shard.partition(group).is_some() {
                for_job.count("replica deleted");
                let shard = shard.clone();
                tokio::task::spawn_local(async move { shard.delete(group).await });
            }
        });
    }
}

/// Takes the steps of moves where the leaders are.
pub(super) async fn move_replicas(world: Rc<World>) {
    while world.is_sound() {
        tokio::time::sleep(TURN_INTERVAL).await;
        for group in world.groups() {
            let info = world.partitions.borrow()[&group].clone();
            if info.target.is_none() {
                continue;
            }
            for broker in &world.brokers {
                let (for_job, info) = (world.clone(), info.clone());
                broker.post(move |shard| {
                    let Some(partition) = shard.partition(group).filter(|partition| partition.serves())
                    else {
                        return;
                    };
                    let raft_ids = |ids: BTreeSet<i32>| ids.into_iter().map(raft_id).collect();
                    match balancer::step_of(&info, &partition) {
                        Step::Wait(_) => {}
                        Step::Change { voters, learners } => {
                            let target = Target { voters: raft_ids(voters), learners: raft_ids(learners) };
                            let _ = partition.propose_membership(target);
                        }
                        Step::HandOver { to } => drop(partition.transfer_leader(raft_id(to))),
                        Step::Reached => reached(&for_job, group, info.goal()),
                    }
                });
            }
        }
    }
}

fn reached(world: &Rc<World>, group: u64, goal: &[i32]) {
    {
        let mut partitions = world.partitions.borrow_mut();
        let Some(info) = partitions.get_mut(&group) else { return };
        if info.target.as_deref() != Some(goal) {
            return;
        }
        info.replicas = goal.to_vec();
        info.target = None;
        info.dropped.clear();
    }
    world.count("move reached");
    match_metadata(world, group);
}

/// As a broker that is told to stop: hands over what it leads, then closes its log.
async fn stop_cleanly(world: Rc<World>, broker: Rc<Broker>) {
    let Some(boot) = broker.boot() else { return };
    let id = broker.raft_id();
    let until = world.now_ms() + HAND_OVER_MS;
    while world.now_ms() < until {
        let leads = broker.ask(move |shard| async move {
            let mut leads = false;
            for partition in shard.partitions().into_iter().filter(|partition| partition.serves()) {
                let status = partition.raft_status();
                let to = status.peers.iter().find(|peer| peer.id != id && peer.is_active && !peer.is_learner);
                if let Some(to) = to {
                    leads = true;
                    let _ = partition.transfer_leader(to.id);
                }
            }
            leads
        });
        if tokio::time::timeout(Duration::from_millis(HAND_OVER_MS), leads).await.ok().flatten() != Some(true)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    if broker.boot() != Some(boot) {
        return;
    }
    let stopped = broker.ask(|shard| async move { shard.shutdown().await.is_ok() });
    if stopped.await == Some(true) && broker.boot() == Some(boot) {
        world.count("clean stop");
        broker.stopped.set(true);
        broker.machine.crash_now(broker.crash(&world));
    } else if broker.boot() == Some(boot) {
        broker.machine.crash_now(Crash::Kill);
    }
}

/// No fault is left, and everybody runs.
pub(super) fn heal(world: &Rc<World>) {
    world.faults.set(false);
    world.network.borrow_mut().heal();
    for broker in &world.brokers {
        broker.machine.cancel_crash();
        broker.machine.set_rates(quiet());
        broker.machine.free_space();
        // A log that could not be made is made by the next start.
        start_again_if(world, broker, |partition| partition.is_none());
    }
    let world = world.clone();
    world.at(world.now() + MENDING_MS * 1_000, |world| {
        for broker in &world.brokers {
            start_again_if(world, broker, |partition| partition.is_some_and(|p| p.damage().is_some()));
        }
    });
}

fn start_again_if(
    world: &Rc<World>,
    broker: &Broker,
    is_wrong: impl Fn(Option<Rc<Partition>>) -> bool + 'static,
) {
    let (for_job, id, machine) = (world.clone(), broker.id, broker.machine.clone());
    broker.post(move |shard| {
        let partitions = for_job.partitions.borrow();
        let mut held = partitions.values().filter(|info| info.is_held_by(id));
        if held.any(|info| is_wrong(shard.partition(info.group_id))) {
            for_job.count("started again to heal");
            machine.crash_now(Crash::Kill);
        }
    });
}
