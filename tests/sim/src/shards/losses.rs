//! Logs that are lost in part while a broker is down, as by a disk that was replaced or a hand that slipped: the replica finds that
//! out when it starts, refuses to serve, and gets its log again from the others (`flumen_broker::cluster::mending`).
//!
//! Nothing of what was acknowledged may go for it, of no durability, since only a replica of a partition whose others are all whole
//! is hit. What nobody would notice before it is read is not made here.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use flumen_broker::partition::raft_id;
use flumen_broker::shard::group_of;
use flumen_io::Mode;
use flumen_io::simulated::Crash;
use flumen_metadata::PartitionInfo;

use super::broker::{Broker, LOGS};
use super::world::World;

/// With fewer, nobody would be left to agree on what follows.
const REPLICAS_MIN: usize = 3;

pub(super) async fn lose_logs(world: Rc<World>) {
    while world.plan.loses_logs && world.faults.get() && world.is_sound() {
        tokio::time::sleep(Duration::from_millis(world.between(300, 2_000))).await;
        let group = world.pick(&world.groups());
        let broker = world.brokers[world.below(world.brokers.len() as u64) as usize].clone();
        let is_hit = |info: &PartitionInfo| {
            info.replicas.len() >= REPLICAS_MIN
                && info.replicas.contains(&broker.id)
                && info.target.is_none()
                && info.dropped.is_empty()
        };
        let info = || world.partitions.borrow()[&group].clone();
        if is_hit(&info())
            && is_whole(&world, group, &info()).await
            && is_hit(&info())
            && world.faults.get()
            && !world.is_voided(group)
            && broker.boot().is_some()
        {
            broker.loses.set(Some(group));
            broker.machine.crash_now(Crash::Kill);
        }
    }
}

/// Every replica runs, votes and has its log, as it says itself.
async fn is_whole(world: &World, group: u64, info: &PartitionInfo) -> bool {
    let mut wanted: Vec<u64> = info.replicas.iter().map(|id| raft_id(*id)).collect();
    wanted.sort_unstable();
    for id in &info.replicas {
        let asked = world.brokers[*id as usize].ask(move |shard| async move {
            let partition = shard.partition(group).filter(|partition| partition.damage().is_none())?;
            Some(partition.raft_status().membership)
        });
        let Some(mut members) = asked.await.flatten() else { return false };
        members.voters.sort_unstable();
        if members.is_joint() || members.voters != wanted {
            return false;
        }
    }
    true
}

/// By the name of its directory.
pub(super) fn group_of_dir(name: &str) -> Option<u64> {
    name.rsplit_once(".g").and_then(|(_, id)| id.parse().ok()).map(group_of)
}

/// The first segment is gone, or the last, or half of that; false when it had none, or none that counted.
pub(super) fn lose_log(world: &World, broker: &Broker, group: u64) {
    let files = broker.machine.file_system();
    let dirs = files.list(Path::new(LOGS)).unwrap_or_default();
    let mut logs: Vec<(PathBuf, u64)> = Vec::new();
    for dir in dirs.iter().filter(|dir| dir.is_dir && group_of_dir(&dir.name) == Some(group)) {
        let path = Path::new(LOGS).join(&dir.name);
        let listed = files.list(&path).unwrap_or_default();
        let segments = listed.iter().filter(|entry| entry.name.ends_with(".log") && entry.len > 0);
        logs.extend(segments.map(|entry| (path.join(&entry.name), entry.len)));
    }
    logs.sort();
    let what = world.below(3);
    let chosen = if what == 0 { logs.first() } else { logs.last() };
    let Some((path, len)) = chosen else { return };
    let lost = match what {
        2 => files.open(path, Mode { write: true, ..Mode::default() }).and_then(|file| file.set_len(len / 2)),
        _ => files.remove_file(path),
    };
    if lost.is_ok() {
        world.count("log lost");
        tracing::debug!(at_ms = world.now_ms(), broker = broker.id, ?path, what, "log lost");
        world.lost.borrow_mut().insert((broker.id, group));
    }
}
