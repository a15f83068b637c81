//! The cluster as a whole, as this node sees it: its nodes, its partitions, and what is wrong with them.
//!
//! The judgement is a pure function of what was looked at (`judge`). Every node says what it knows of itself
//! (`cluster_health`, `admin_cluster::this_broker`); nodes that do not answer are shown as the metadata has them. It keeps no
//! history and mends nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use flumen_metadata::{NodeState, PartitionInfo};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::admin_cluster::this_broker;
use crate::cluster::bootstrap::{CLOCKS_APART_MAX_MS, Presence, State};
use crate::cluster::joining::who_is;
use crate::cluster::requests::{self, Answered};
use crate::cluster_health::{self, Problem, Severity};
use crate::controller::METADATA_GROUP;
use crate::node::{Node, now_ms};
use crate::progress;
use crate::topic_admin::status_of;
use crate::waits::Wait;

/// Partitions that are named one by one; of a node that is down the first tell as much as all.
const NAMED_MAX: usize = 20;
/// A node that takes longer is shown as the metadata has it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// Who may be down is asked no longer than this: the health of the rest waits for it.
const PRESENCE_TIME_MAX: Duration = Duration::from_secs(1);

/// What a node tells another of itself.
pub async fn own_status(node: &Node) -> Value {
    let problems = cluster_health::problems(node).await;
    json!({
        "broker": this_broker(node), "problems": problems.iter().map(Problem::document).collect::<Vec<_>>(),
        "moves": progress::of_node(node), "clock_ms": now_ms(),
    })
}

async fn status_of_node(node: &Node, id: i32) -> Option<Value> {
    if id == node.config.node_id {
        return Some(own_status(node).await);
    }
    if !node.is_up()(id) {
        return None;
    }
    let asked = node
        .controller()
        .run(move |shard| async move { shard.links.ask(id, requests::STATUS, Bytes::new()).await });
    match timeout(ANSWER_TIME_MAX, asked).await {
        Ok(Ok(Ok(Answered { code: 0, body }))) => serde_json::from_slice(&body).ok(),
        _ => None,
    }
}

/// What another node answers.
enum Told {
    Status(Value),
    Waits(Wait),
    Nothing,
}

/// What a node waits for that does not answer as a member: its port says so to anybody, from its first moment on.
async fn wait_of_node(node: &Node, id: i32) -> Option<Wait> {
    let cluster = node.cluster.as_ref()?;
    let address = node.image.load().nodes.get(&id)?.rpc_address.clone();
    let (node_id, boot_id) = (node.config.node_id, cluster.boot_id);
    let own = Presence { node_id, boot_id, seeds: Vec::new(), state: State::Empty, waits: None, clock_ms: 0 };
    let answered = timeout(PRESENCE_TIME_MAX, who_is(&own, &address, cluster.tls.as_deref())).await;
    let presence = answered.ok()?.ok()?;
    presence.waits.filter(|_| presence.node_id == id)
}

/// All nodes, each with what it says of itself.
pub async fn brokers(node: &Node) -> Vec<Value> {
    let image = node.image.load_full();
    let (own, up) = (image.node.id, node.is_up());
    if image.nodes.is_empty() {
        return vec![this_broker(node)];
    }
    let all = image.nodes.values().map(|record| {
        let is_alive = up(record.id);
        let image = &image;
        async move {
            let status = status_of_node(node, record.id).await;
            let mut broker = status.map_or_else(
                || json!({ "node_id": record.id, "host": record.host, "port": record.port, "rack": record.rack }),
                |mut status| status["broker"].take(),
            );
            broker["rpc_address"] = json!(record.rpc_address);
            broker["membership_status"] = json!(record.state.name());
            broker["is_alive"] = json!(is_alive || record.id == own);
            broker["partitions"] = json!(image.replicas_on(record.id));
            broker
        }
    });
    join_all(all).await
}

/// A partition as it is just now.
struct Seen {
    leader_id: i32,
    in_sync: Vec<i32>,
    damaged: bool,
}

impl Seen {
    fn health(&self, info: &PartitionInfo) -> &'static str {
        match () {
            () if self.damaged => "damaged",
            () if self.leader_id < 0 => "leaderless",
            () if self.in_sync.len() < info.replicas.len() => "under_replicated",
            () => "ok",
        }
    }
}

fn see(node: &Node, info: &PartitionInfo) -> Seen {
    let status = status_of(node, info.group_id);
    let up = node.is_up();
    let alone = node.cluster.is_none();
    let is_in_sync = |id: &i32| {
        if alone { !status.damaged } else { up(*id) && !status.lagging.contains(id) }
    };
    let in_sync = info.replicas.iter().copied().filter(is_in_sync).collect();
    Seen { leader_id: status.leader_id, in_sync, damaged: status.damaged }
}

/// How far moves are, of one topic or of all, by group: as their leaders say, and those who fetch for them.
async fn moves(node: &Node, topic: Option<&str>) -> BTreeMap<u64, Value> {
    let image = node.image.load_full();
    let asked = image.topics.values().filter(|t| topic.is_none_or(|name| name == t.name));
    let moving = asked.flat_map(|topic| &topic.partitions).filter(|p| p.target.is_some());
    let mut ids = BTreeSet::new();
    for info in moving {
        ids.extend(Some(status_of(node, info.group_id).leader_id).filter(|id| *id >= 0));
        ids.extend(info.goal().iter().copied());
    }
    let ids: Vec<i32> = ids.into_iter().collect();
    let told = join_all(ids.iter().map(|id| status_of_node(node, *id))).await;
    let entries = |status: &Value, name: &str| -> Vec<(u64, Value)> {
        let all = status["moves"][name].as_array().into_iter().flatten();
        all.filter_map(|one| Some((one["group"].as_u64()?, one.clone()))).collect()
    };
    let mut found: BTreeMap<u64, Value> = BTreeMap::new();
    for status in told.iter().flatten() {
        found.extend(
            entries(status, "moves").into_iter().map(|(group, mut one)| (group, one["progress"].take())),
        );
    }
    for (id, status) in ids.iter().zip(&told).filter_map(|(id, status)| Some((*id, status.as_ref()?))) {
        for (group, one) in entries(status, "fetching") {
            let replicas = found.get_mut(&group).and_then(|progress| progress["replicas"].as_array_mut());
            if let Some(replica) = replicas.into_iter().flatten().find(|r| r["node_id"] == id) {
                progress::show_fetched(replica, one["next_offset"].as_i64().unwrap_or(0));
            }
        }
    }
    found
}

/// Every partition with where it is and how it is; `unhealthy` leaves out those that serve from all replicas. Offsets and
/// sizes are those of this node's replica.
pub async fn partitions(node: &Node, topic: Option<&str>, unhealthy: bool) -> Vec<Value> {
    let moves = moves(node, topic).await;
    let image = node.image.load_full();
    let mut found = Vec::new();
    for one in image.topics.values().filter(|t| topic.is_none_or(|name| name == t.name)) {
        for (index, info) in one.partitions.iter().enumerate() {
            let seen = see(node, info);
            let health = seen.health(info);
            if unhealthy && health == "ok" {
                continue;
            }
            let gauges = node.gauges_of(info.group_id);
            let is_here = image.nodes.is_empty() || info.is_held_by(image.node.id);
            let number = |value: i64| if is_here { json!(value) } else { Value::Null };
            let (fetched, fetch_end) = (&gauges.fetched.0, &gauges.fetched.1);
            let (fetched, fetch_end) = (fetched.load(Ordering::Relaxed), fetch_end.load(Ordering::Relaxed));
            let fetching = is_here && fetch_end > 0;
            let leads = seen.leader_id >= 0 && !seen.damaged;
            let size = i64::try_from(gauges.size_bytes.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
            found.push(json!({
                "topic": one.name, "partition": index, "internal": one.internal,
                "leader": if leads { json!(seen.leader_id) } else { Value::Null },
                "leader_epoch": status_of(node, info.group_id).leader_epoch,
                "replicas": info.replicas, "in_sync_replicas": seen.in_sync, "target_replicas": info.target,
                "shard": if is_here { json!(node.shard_of(info.group_id)) } else { Value::Null },
                "log_start_offset": number(gauges.log_start_offset.load(Ordering::Relaxed)),
                "high_watermark": number(gauges.high_watermark.load(Ordering::Relaxed)),
                "size_bytes": number(size),
                "fetching": fetching.then(|| json!({ "next_offset": fetched, "end_offset": fetch_end })),
                "move": moves.get(&info.group_id), "health": health,
            }));
        }
    }
    found
}

/// What there is to judge about the cluster beside what single nodes know of themselves.
#[derive(Debug, Default)]
struct Looked {
    asked_id: i32,
    controller_id: i32,
    down: Vec<DownNode>,
    /// Nodes that run and do not serve yet, as they say.
    waiting: BTreeSet<i32>,
    leaderless: Vec<String>,
    under_replicated: Vec<String>,
}

#[derive(Debug)]
struct DownNode {
    id: i32,
    address: String,
    replicas: usize,
}

fn look(node: &Node) -> Looked {
    let image = node.image.load_full();
    let up = node.is_up();
    let down = image.nodes.values().filter(|record| !up(record.id)).map(|record| DownNode {
        id: record.id,
        address: format!("{}:{}", record.host, record.port),
        replicas: image.replicas_on(record.id),
    });
    let mut looked = Looked {
        asked_id: image.node.id,
        controller_id: match &node.cluster {
            None => image.node.id,
            Some(_) => node
                .leaders
                .get(METADATA_GROUP)
                .map(|(leader, _)| leader)
                .filter(|leader| up(*leader))
                .unwrap_or(-1),
        },
        down: down.collect(),
        ..Looked::default()
    };
    for topic in image.topics.values() {
        for (index, info) in topic.partitions.iter().enumerate() {
            let place = || format!("{}/{index}", topic.name);
            match see(node, info).health(info) {
                "leaderless" | "damaged" => looked.leaderless.push(place()),
                "under_replicated" => looked.under_replicated.push(place()),
                _ => {}
            }
        }
    }
    looked
}

fn named(places: &[String]) -> String {
    let more = places.len().saturating_sub(NAMED_MAX);
    let first = places.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{first} and {more} more") } else { first }
}

fn judge(looked: &Looked) -> Vec<Problem> {
    let mut problems = Vec::new();
    let asked_id = looked.asked_id;
    if looked.controller_id < 0 {
        problems.push(Problem {
            code: "NO_CONTROLLER",
            severity: Severity::Error,
            node_id: asked_id,
            subject: "the metadata".to_string(),
            detail: "no node leads the metadata: a majority of the nodes that vote about it is not connected".to_string(),
            impact: "topics cannot be created or changed; producing and consuming go on where partitions have leaders"
                .to_string(),
            fix: "start the nodes that are down, or mend the network between the nodes".to_string(),
        });
    }
    for down in &looked.down {
        problems.push(Problem {
            code: "NODE_DOWN",
            severity: Severity::Error,
            node_id: down.id,
            subject: format!("node {}", down.id),
            detail: format!("node {} at {} is not connected to node {asked_id}", down.id, down.address),
            impact: format!("{} replicas are not kept up to date; with another failure they may have no leader", down.replicas),
            fix: format!(
                "start it again, it catches up by itself; if it is lost for good, flumen cluster decommission {} gives its \
                 replicas to others",
                down.id
            ),
        });
    }
    if !looked.leaderless.is_empty() && looked.controller_id >= 0 {
        problems.push(Problem {
            code: "PARTITIONS_WITHOUT_LEADER",
            severity: Severity::Error,
            node_id: asked_id,
            subject: format!("{} partitions", looked.leaderless.len()),
            detail: format!("no leader: {}", named(&looked.leaderless)),
            impact: "they can neither be written nor read until a majority of their replicas runs"
                .to_string(),
            fix: "start the nodes that hold them: flumen cluster partitions --unhealthy lists them"
                .to_string(),
        });
    }
    if !looked.under_replicated.is_empty() && looked.down.is_empty() && looked.waiting.is_empty() {
        problems.push(Problem {
            code: "PARTITIONS_BEHIND",
            severity: Severity::Warning,
            node_id: asked_id,
            subject: format!("{} partitions", looked.under_replicated.len()),
            detail: format!("not all replicas have everything: {}", named(&looked.under_replicated)),
            impact: "a failure of another node may leave them without a leader until these have caught up".to_string(),
            fix: "they catch up by themselves; if they do not, look at disk and network of the nodes that are behind"
                .to_string(),
        });
    }
    problems
}

/// The whole judgement as JSON, with the names that Redpanda's `health_overview` has for the same things.
pub async fn overview(node: &Node) -> Value {
    let image = node.image.load_full();
    let mut looked = look(node);
    let ids: Vec<i32> = image.brokers().iter().map(|broker| broker.id).collect();
    let told = join_all(ids.iter().map(|id| async move {
        match status_of_node(node, *id).await {
            Some(status) => Told::Status(status),
            None => wait_of_node(node, *id).await.map_or(Told::Nothing, Told::Waits),
        }
    }));
    let mut of_nodes: Vec<Value> = Vec::new();
    for (id, told) in ids.iter().zip(told.await) {
        match told {
            Told::Status(status) => {
                of_nodes.extend(status["problems"].as_array().into_iter().flatten().cloned());
                let ahead_ms = status["clock_ms"].as_i64().map_or(0, |clock_ms| clock_ms - now_ms());
                if ahead_ms.saturating_abs() > CLOCKS_APART_MAX_MS {
                    let apart = cluster_health::clocks_apart(*id, node.config.node_id, ahead_ms);
                    of_nodes.push(apart.document());
                }
            }
            Told::Waits(wait) => {
                looked.down.retain(|down| down.id != *id);
                looked.waiting.insert(*id);
                of_nodes.push(cluster_health::not_serving(*id, &wait).document());
            }
            Told::Nothing => {}
        }
    }
    let mut problems: Vec<Value> = Vec::new();
    if node.cluster.is_some() {
        problems.extend(judge(&looked).iter().map(Problem::document));
    }
    problems.append(&mut of_nodes);
    let mut reasons: Vec<Value> =
        problems.iter().filter(|p| p["severity"] == "error").map(|p| p["code"].clone()).collect();
    reasons.dedup();
    let first = |places: &[String]| places.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>();
    let in_state = |state: NodeState| -> Vec<i32> {
        image.brokers().iter().filter(|broker| broker.state == state).map(|broker| broker.id).collect()
    };
    json!({
        "is_healthy": reasons.is_empty(),
        "unhealthy_reasons": reasons,
        "problems": problems,
        "controller_id": looked.controller_id,
        "all_nodes": ids,
        "nodes_not_serving": problems
            .iter()
            .filter(|p| p["code"] == "NODE_NOT_SERVING")
            .map(|p| p["node_id"].clone())
            .collect::<Vec<_>>(),
        "nodes_down": looked.down.iter().map(|down| down.id).collect::<Vec<_>>(),
        "nodes_in_maintenance": in_state(NodeState::Maintenance),
        "nodes_decommissioning": in_state(NodeState::Decommissioning),
        "leaderless_count": looked.leaderless.len(),
        "leaderless_partitions": first(&looked.leaderless),
        "under_replicated_count": looked.under_replicated.len(),
        "under_replicated_partitions": first(&looked.under_replicated),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(looked: &Looked) -> Vec<&'static str> {
        judge(looked).iter().map(|p| p.code).collect()
    }

    #[test]
    fn a_node_that_is_down_is_one_problem_and_what_follows_from_it_another() {
        let down = || vec![DownNode { id: 2, address: "h:1".into(), replicas: 7 }];
        assert!(codes(&Looked { asked_id: 1, controller_id: 1, ..Looked::default() }).is_empty());
        let behind: Vec<String> = (0..30).map(|p| format!("t/{p}")).collect();
        let looked = Looked {
            asked_id: 1,
            controller_id: 1,
            down: down(),
            under_replicated: behind.clone(),
            ..Looked::default()
        };
        assert_eq!(codes(&looked), ["NODE_DOWN"], "that partitions lack a replica is the same problem");
        let problem = &judge(&looked)[0];
        assert_eq!(
            (problem.node_id, problem.detail.as_str()),
            (2, "node 2 at h:1 is not connected to node 1")
        );
        assert!(
            problem.fix.contains("flumen cluster decommission 2") && problem.impact.contains("7 replicas")
        );
        let looked = Looked { leaderless: vec!["t/0".into()], ..looked };
        assert_eq!(codes(&looked), ["NODE_DOWN", "PARTITIONS_WITHOUT_LEADER"]);
        let looked = Looked { controller_id: -1, ..looked };
        assert_eq!(codes(&looked), ["NO_CONTROLLER", "NODE_DOWN"]);
        let looked = Looked { controller_id: 1, under_replicated: behind, ..Looked::default() };
        let problems = judge(&looked);
        assert_eq!((problems[0].code, problems[0].severity), ("PARTITIONS_BEHIND", Severity::Warning));
        assert!(problems[0].detail.ends_with("t/19 and 10 more"), "{}", problems[0].detail);
    }
}
