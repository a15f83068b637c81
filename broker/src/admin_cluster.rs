//! The admin API's view of the cluster: `/v1/cluster`, its health and partitions, `/v1/brokers`.
//!
//! Any node answers for the whole cluster.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, Query};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::admin_http::{Problem, config_text};
use crate::admin_process::Shared;
use crate::cluster::change::{Intent, change};
use crate::cluster_view;
use crate::node::Node;
use crate::topic_admin::with_live;

pub async fn cluster(Shared(node): Shared) -> Json<Value> {
    let image = node.image.load_full();
    let own = image.topics.values().filter(|t| !t.internal);
    let partitions = image.topics.values().flat_map(|t| &t.partitions);
    let size: u64 =
        partitions.clone().map(|p| node.gauges_of(p.group_id).size_bytes.load(Ordering::Relaxed)).sum();
    Json(json!({
        "cluster_id": image.cluster_id, "controller_id": with_live(&node, |live| live.controller_id),
        "controller_epoch": image.controller_epoch, "version": env!("CARGO_PKG_VERSION"),
        "brokers": image.brokers().len(), "topics": own.count(), "partitions": partitions.count(),
        "exports": node.exports.views().len(), "size_bytes": size,
    }))
}

/// `{"configs": {"flumen.catch.up.rate": 20000000}, "node_id": 3}`: of all brokers, or of one; null for the default.
pub async fn alter(Shared(node): Shared, Json(body): Json<Value>) -> Result<Json<Value>, Problem> {
    let configs = body["configs"].as_object().into_iter().flatten();
    let changes = configs.map(|(name, value)| (name.clone(), config_text(value))).collect();
    let node_id = body["node_id"].as_i64().and_then(|id| i32::try_from(id).ok());
    change(&node, Intent::AlterBrokers { node_id, changes }).await?;
    Ok(Json(json!({ "configs": body["configs"], "node_id": node_id })))
}

pub async fn health(Shared(node): Shared) -> Json<Value> {
    Json(cluster_view::overview(&node).await)
}

#[derive(Deserialize)]
pub struct Which {
    topic: Option<String>,
    #[serde(default)]
    unhealthy: bool,
}

pub async fn partitions(Shared(node): Shared, Query(which): Query<Which>) -> Result<Json<Value>, Problem> {
    if let Some(topic) = &which.topic
        && !node.image.load().topics.contains_key(topic)
    {
        return Err(
            Problem::not_found(format!("topic '{topic}' does not exist")).with_fix("flumen topic list")
        );
    }
    let found = cluster_view::partitions(&node, which.topic.as_deref(), which.unhealthy).await;
    Ok(Json(json!({ "partitions": found })))
}

pub async fn brokers(Shared(node): Shared) -> Json<Value> {
    Json(Value::Array(cluster_view::brokers(&node).await))
}

fn known(node: &Node, id: &str) -> Result<i32, Problem> {
    let ids: Vec<i32> = node.image.load().brokers().iter().map(|broker| broker.id).collect();
    let found = id.parse().ok().filter(|id| ids.contains(id));
    found.ok_or_else(|| {
        let detail = match ids[..] {
            [own] => format!("there is no broker {id}; the only one is {own}"),
            _ => format!("there is no broker {id}"),
        };
        Problem::not_found(detail).with_fix("flumen cluster brokers")
    })
}

pub async fn broker(Shared(node): Shared, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let id = known(&node, &id)?;
    let found = cluster_view::brokers(&node).await.into_iter().find(|broker| broker["node_id"] == id);
    Ok(Json(found.unwrap_or(Value::Null)))
}

/// `POST /v1/brokers/{id}:maintenance`, `:active`, `:decommission`; `DELETE /v1/brokers/{id}` removes one that holds nothing.
pub async fn broker_action(Shared(node): Shared, Path(what): Path<String>) -> Result<Json<Value>, Problem> {
    let (id, action) = what.split_once(':').unwrap_or((&what, ""));
    let id = known(&node, id)?;
    let intent = match action {
        "maintenance" => Intent::Maintenance { id, on: true },
        "active" => Intent::Maintenance { id, on: false },
        "decommission" => Intent::Decommission { id },
        other => {
            return Err(Problem::not_found(format!("'{other}' is not something a broker can do"))
                .with_fix("use one of :maintenance, :active, :decommission"));
        }
    };
    change(&node, intent).await?;
    let state = node.image.load().broker(id).map(|broker| broker.state.name());
    Ok(Json(json!({ "node_id": id, "membership_status": state })))
}

pub async fn remove_broker(Shared(node): Shared, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let id = known(&node, &id)?;
    change(&node, Intent::RemoveNode { id }).await?;
    Ok(Json(json!({ "node_id": id, "removed": true })))
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
        "rpc_tls": node.cluster.as_ref().map(|cluster| cluster.tls.is_some()),
    })
}
