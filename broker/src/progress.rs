//! How far the replicas are that a move brings, and why they wait; as the leader of each partition sees it.
//!
//! Written by whoever drives the moves (`balancer`), read by the admin API of every node, which asks the leaders. It decides
//! nothing.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flumen_metadata::PartitionInfo;
use flumen_metadata::reassignment::Waiting;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::node_id_of;
use crate::node::Node;
use crate::partition::Partition;

/// A rate is that of the last seconds.
const RATE_WINDOW: Duration = Duration::from_secs(3);

/// Of one replica that is to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub node_id: i32,
    pub has_offset: i64,
    pub bytes_per_s: u64,
    pub waits_for: Option<String>,
}

/// Of a partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MoveProgress {
    pub replicas: Vec<Progress>,
    pub log_start: i64,
    /// All of them are to have what lies below, which grows.
    pub end: i64,
    pub size_bytes: u64,
    pub waits_for: Option<String>,
}

/// (group, node) and what was there at the beginning of the window.
#[derive(Default)]
pub struct Meters(BTreeMap<(u64, i32), Meter>);

struct Meter {
    since: Instant,
    from: i64,
    /// Offsets per second of the window before.
    rate: f64,
}

impl Meters {
    pub fn retain(&mut self, moves: impl Fn(u64) -> bool) {
        self.0.retain(|(group, _), _| moves(*group));
    }

    /// Offsets per second.
    fn measure(&mut self, group_id: u64, node_id: i32, offset: i64, now: Instant) -> f64 {
        let meter =
            self.0.entry((group_id, node_id)).or_insert(Meter { since: now, from: offset, rate: 0.0 });
        let passed = now.saturating_duration_since(meter.since);
        if passed >= RATE_WINDOW {
            meter.rate = (offset - meter.from).max(0) as f64 / passed.as_secs_f64();
            (meter.since, meter.from) = (now, offset);
        } else if meter.rate == 0.0 && !passed.is_zero() {
            return (offset - meter.from).max(0) as f64 / passed.as_secs_f64();
        }
        meter.rate
    }
}

/// What is to be told of a move whose next step waits for this, if it waits.
pub fn of_move(
    node: &Node,
    info: &PartitionInfo,
    partition: &Partition,
    waiting: Option<&Waiting>,
    meters: &mut Meters,
    now: Instant,
) -> MoveProgress {
    let status = partition.raft_status();
    let held_up = partition.held_up();
    let (up, has_room) = (node.is_up(), node.has_room());
    let (log_start, end) = (partition.log_start_offset(), partition.high_watermark());
    let size_bytes = partition.size_bytes();
    let bytes_of_offset = if end > log_start { size_bytes as f64 / (end - log_start) as f64 } else { 0.0 };
    let coming = info.goal().iter().copied().filter(|id| !info.replicas.contains(id));
    let replicas = coming.map(|node_id| {
        let peer = status.peers.iter().find(|peer| node_id_of(peer.id) == Some(node_id));
        let matched = peer.map_or(0, |peer| peer.matched_index);
        let has = if matched >= status.committed_index { Some(end) } else { partition.end_of_entry(matched) };
        let has_offset = has.unwrap_or(log_start).clamp(log_start, end);
        let rate = meters.measure(partition.group_id, node_id, has_offset, now);
        let waits_for = match () {
            () if !up(node_id) => Some(format!("node {node_id} has to be running")),
            () if !has_room(node_id) => Some(format!("room on the disk of node {node_id}")),
            () if held_up.contains(&node_id) => Some("the limit of the rate".to_string()),
            () => None,
        };
        Progress { node_id, has_offset, bytes_per_s: (rate * bytes_of_offset) as u64, waits_for }
    });
    let waits_for = match waiting {
        // That is what the replicas themselves say.
        None | Some(Waiting::CatchingUp { .. } | Waiting::NotHeardOf(_)) => None,
        Some(other) => Some(other.to_string()),
    };
    MoveProgress { replicas: replicas.collect(), log_start, end, size_bytes, waits_for }
}

impl MoveProgress {
    pub fn document(&self) -> Value {
        let bytes_of = |offset: i64| {
            let (have, all) = ((offset - self.log_start).max(0), self.end - self.log_start);
            if all > 0 { (self.size_bytes as f64 * have as f64 / all as f64) as u64 } else { 0 }
        };
        let replicas = self.replicas.iter().map(|one| {
            json!({
                "node_id": one.node_id, "log_start_offset": self.log_start, "offset": one.has_offset,
                "end_offset": self.end, "bytes": bytes_of(one.has_offset), "of_bytes": self.size_bytes,
                "bytes_per_second": one.bytes_per_s, "waits_for": one.waits_for,
            })
        });
        json!({ "replicas": replicas.collect::<Vec<_>>(), "waits_for": self.waits_for })
    }
}

/// Puts into a replica's document how far its node says that it is with what cannot be sent as entries.
pub fn show_fetched(replica: &mut Value, next: i64) {
    let number = |value: &Value| value.as_i64().unwrap_or(0);
    let (start, end) = (number(&replica["log_start_offset"]), number(&replica["end_offset"]));
    let has = next.min(end);
    if has > number(&replica["offset"]) && end > start {
        let bytes = number(&replica["of_bytes"]) as f64 * (has - start) as f64 / (end - start) as f64;
        replica["offset"] = json!(has);
        replica["bytes"] = json!(bytes as u64);
    }
}

/// What this node knows of moves: of the partitions that it leads, and what it fetches for replicas of its own. By group.
pub fn of_node(node: &Node) -> Value {
    let image = node.image.load();
    let mut moves = Vec::new();
    let mut fetching = Vec::new();
    for info in image.topics.values().flat_map(|topic| &topic.partitions).filter(|p| p.target.is_some()) {
        let gauges = node.gauges_of(info.group_id);
        let progress = gauges.progress.lock().expect("no panic under this lock").clone();
        if let Some(progress) = progress {
            moves.push(json!({ "group": info.group_id, "progress": progress.document() }));
        }
        let (next, end) = (&gauges.fetched.0, &gauges.fetched.1);
        if end.load(Ordering::Relaxed) > 0 {
            fetching.push(json!({ "group": info.group_id, "next_offset": next.load(Ordering::Relaxed) }));
        }
    }
    json!({ "moves": moves, "fetching": fetching })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_window() {
        let (mut meters, start) = (Meters::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(meters.measure(1, 4, 100, start), 0.0);
        assert_eq!(meters.measure(1, 4, 300, at(1000)), 200.0);
        assert_eq!(meters.measure(1, 4, 400, at(3000)), 100.0);
        assert_eq!(meters.measure(1, 4, 400, at(4000)), 100.0);
        assert_eq!(meters.measure(1, 4, 400, at(6000)), 0.0);
        meters.retain(|group| group != 1);
        assert!(meters.0.is_empty());
    }

    #[test]
    fn what_is_done_is_told_in_offsets_and_bytes() {
        let one = Progress { node_id: 4, has_offset: 150, bytes_per_s: 7, waits_for: Some("x".into()) };
        let progress =
            MoveProgress { replicas: vec![one], log_start: 100, end: 300, size_bytes: 4000, waits_for: None };
        let mut told = progress.document();
        let expected = json!({
            "node_id": 4, "log_start_offset": 100, "offset": 150, "end_offset": 300, "bytes": 1000,
            "of_bytes": 4000, "bytes_per_second": 7, "waits_for": "x",
        });
        assert_eq!(told["replicas"][0], expected);
        show_fetched(&mut told["replicas"][0], 120);
        assert_eq!(told["replicas"][0], expected, "it has more already");
        show_fetched(&mut told["replicas"][0], 200);
        assert_eq!(
            (&told["replicas"][0]["offset"], &told["replicas"][0]["bytes"]),
            (&json!(200), &json!(2000))
        );
        assert_eq!(MoveProgress::default().document(), json!({ "replicas": [], "waits_for": null }));
    }
}
