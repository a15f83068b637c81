//! The admin API's view of the cluster: `/v1/cluster`, its health and partitions, `/v1/brokers`.
//!
//! Lists everywhere, for one node now: what reads them need not change when there are more.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::admin_http::{Problem, Shared};
use crate::cluster_health;
use crate::node::Node;

pub async fn cluster(State(node): Shared) -> Json<Value> {
    let image = node.image.load_full();
    let own = image.topics.values().filter(|t| !t.internal);
    let partitions = image.topics.values().flat_map(|t| &t.partitions);
    let size: u64 =
        partitions.clone().map(|p| node.gauges_of(p.group_id).size_bytes.load(Ordering::Relaxed)).sum();
    Json(json!({
        "cluster_id": image.cluster_id, "controller_id": image.node.id,
        "controller_epoch": image.controller_epoch, "version": env!("CARGO_PKG_VERSION"),
        "brokers": 1, "topics": own.count(), "partitions": partitions.count(),
        "exports": node.exports.views().len(), "size_bytes": size,
    }))
}

pub async fn health(State(node): Shared) -> Json<Value> {
    Json(cluster_health::overview(&node).await)
}

#[derive(Deserialize)]
pub struct Which {
    topic: Option<String>,
    #[serde(default)]
    unhealthy: bool,
}

pub async fn partitions(State(node): Shared, Query(which): Query<Which>) -> Result<Json<Value>, Problem> {
    if let Some(topic) = &which.topic
        && !node.image.load().topics.contains_key(topic)
    {
        return Err(
            Problem::not_found(format!("topic '{topic}' does not exist")).with_fix("flumen topic list")
        );
    }
    let found = cluster_health::partitions(&node, which.topic.as_deref(), which.unhealthy);
    Ok(Json(json!({ "partitions": found })))
}

pub async fn brokers(State(node): Shared) -> Json<Value> {
    Json(json!([this_broker(&node)]))
}

pub async fn broker(State(node): Shared, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let own = node.image.load().node.id;
    if id.parse() == Ok(own) {
        return Ok(Json(this_broker(&node)));
    }
    Err(Problem::not_found(format!("there is no broker {id}; the only one is {own}"))
        .with_fix("flumen cluster brokers"))
}

pub(crate) fn this_broker(node: &Node) -> Value {
    let image = node.image.load();
    let shards: Vec<Value> = node
        .shards
        .iter()
        .enumerate()
        .map(|(id, s)| json!({ "shard": id, "connections": s.connections() }))
        .collect();
    let partitions: usize = image.topics.values().map(|t| t.partitions.len()).sum();
    json!({
        "node_id": image.node.id, "host": image.node.host, "port": image.node.port, "rack": image.node.rack,
        "membership_status": "active", "is_alive": true, "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": node.started.elapsed().as_secs(), "partitions": partitions,
        "connections": node.shards.iter().map(|s| s.connections()).sum::<usize>(),
        "data_dir": node.data_dir.display().to_string(), "disk_free_bytes": node.disk.free_bytes(),
        "disk_is_low": node.disk.is_low(), "shards": shards,
    })
}
