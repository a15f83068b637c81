//! The admin API (`/v1`), metrics and health, on the main thread. JSON in, JSON out; errors are
//! problem+json with what happened (`detail`) and what to do (`fix`).
//!
//! Topic and export changes go through the same plans as their Kafka APIs, so that `kafka-configs`,
//! the CLI and this API write the same state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use flumen_metadata::Command;
use flumen_sink::admission::Admission;
use flumen_sink::config::redact_url;
use flumen_sink::exporter::{ResetError, ResetTo};

use crate::admin_cluster;
use crate::admin_process::{Admin, Shared};
use crate::export::{CONFIG_PREFIX, ENABLE, ENDPOINT, NotAdmitted, PAUSED, ResetRefused};
use crate::metrics_text;
use crate::node::Node;
use crate::topic_admin::{self, TopicError};

/// Bodies are configurations; nothing legitimate is near this.
const BODY_BYTES_MAX: usize = 1 << 20;

pub(crate) async fn serve(admin: Arc<Admin>, listener: TcpListener) {
    let app = Router::new()
        .route("/v1/topics", get(list_topics).post(create_topic))
        .route("/v1/topics/{topic}", get(describe_topic).delete(delete_topic).patch(alter_topic))
        .route("/v1/exports", get(list_exports))
        .route(
            "/v1/exports/{topic}",
            get(get_export).put(put_export).delete(delete_export).post(export_action),
        )
        .route("/v1/exports/{topic}/status", get(export_status))
        .route("/v1/status/ready", get(ready))
        .route("/v1/status/live", get(live))
        .route("/v1/cluster", get(admin_cluster::cluster).patch(admin_cluster::alter))
        .route("/v1/cluster/health", get(admin_cluster::health))
        .route("/v1/cluster/health_overview", get(admin_cluster::health))
        .route("/v1/cluster/partitions", get(admin_cluster::partitions))
        .route("/v1/brokers", get(admin_cluster::brokers))
        .route(
            "/v1/brokers/{id}",
            get(admin_cluster::broker)
                .post(admin_cluster::broker_action)
                .delete(admin_cluster::remove_broker),
        )
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .route("/public_metrics", get(metrics))
        .fallback(post(not_found).get(not_found).put(not_found).delete(not_found))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(admin);
    if let Err(error) = axum::serve(listener, app).await {
        tracing::error!(%error, "the admin API ended");
    }
}

/// What went wrong, and what to do about it.
#[derive(Debug)]
pub struct Problem {
    pub status: StatusCode,
    pub code: &'static str,
    pub detail: String,
    pub fix: Option<String>,
}

impl Problem {
    pub fn bad_request(detail: impl Into<String>) -> Problem {
        Problem { status: StatusCode::BAD_REQUEST, code: "INVALID_REQUEST", detail: detail.into(), fix: None }
    }

    pub fn not_found(detail: impl Into<String>) -> Problem {
        Problem { status: StatusCode::NOT_FOUND, code: "NOT_FOUND", detail: detail.into(), fix: None }
    }

    pub fn with_fix(mut self, fix: impl Into<String>) -> Problem {
        self.fix = Some(fix.into());
        self
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "type": "about:blank", "title": self.code, "status": self.status.as_u16(),
            "code": self.code, "detail": self.detail, "fix": self.fix,
        });
        (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
    }
}

impl From<TopicError> for Problem {
    fn from(error: TopicError) -> Problem {
        use flumen_protocol::error_code::ErrorCode;
        let status = match error.code {
            ErrorCode::UNKNOWN_TOPIC_OR_PARTITION | ErrorCode::UNKNOWN_TOPIC_ID => StatusCode::NOT_FOUND,
            ErrorCode::TOPIC_ALREADY_EXISTS => StatusCode::CONFLICT,
            ErrorCode::REQUEST_TIMED_OUT | ErrorCode::KAFKA_STORAGE_ERROR => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        Problem { status, code: error.code.name(), detail: error.message, fix: None }
    }
}

impl From<NotAdmitted> for Problem {
    fn from(refusal: NotAdmitted) -> Problem {
        let problem = |status, code, detail, fix| Problem { status, code, detail, fix };
        match refusal {
            NotAdmitted::Settings { message, fix } => {
                problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", message, fix)
            }
            NotAdmitted::Table { reasons, fixes } => {
                let fix = (!fixes.is_empty()).then(|| fixes.join("; "));
                problem(StatusCode::CONFLICT, "EXPORT_REFUSED", reasons.join("; "), fix)
            }
            NotAdmitted::Answer { message, fix } => {
                problem(StatusCode::BAD_GATEWAY, "CLICKHOUSE_REFUSED", message, Some(fix))
            }
            NotAdmitted::Away { message, fix } => {
                problem(StatusCode::BAD_GATEWAY, "CLICKHOUSE_AWAY", message, Some(fix))
            }
        }
    }
}

impl From<ResetRefused> for Problem {
    fn from(refused: ResetRefused) -> Problem {
        let (status, code) = match &refused {
            ResetRefused::NotExported | ResetRefused::Reset(ResetError::NoPartition(_)) => {
                (StatusCode::NOT_FOUND, "NOT_FOUND")
            }
            ResetRefused::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "STOPPING"),
            ResetRefused::Reset(ResetError::OutOfRange { .. }) => (StatusCode::BAD_REQUEST, "OUT_OF_RANGE"),
            ResetRefused::Reset(_) => (StatusCode::CONFLICT, "RESET_REFUSED"),
        };
        Problem { status, code, detail: refused.to_string(), fix: None }
    }
}

async fn not_found(uri: axum::http::Uri) -> Problem {
    Problem::not_found(format!("there is nothing at {}", uri.path()))
}

fn status(admin: &Admin) -> Json<Value> {
    let cluster_id = admin.node().map(|node| node.image.load().cluster_id.clone()).unwrap_or_default();
    let status = if admin.is_ready() { "ready" } else { "starting" };
    let waits_for = admin.wait().map(|wait| wait.detail);
    Json(
        json!({ "status": status, "cluster_id": cluster_id, "node_id": admin.node_id(), "waits_for": waits_for }),
    )
}

async fn live(State(admin): State<Arc<Admin>>) -> Json<Value> {
    status(&admin)
}

async fn ready(State(admin): State<Arc<Admin>>) -> (StatusCode, Json<Value>) {
    let code = if admin.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, status(&admin))
}

async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let text = metrics_text::render(admin.node(), admin.started()).await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn list_topics(Shared(node): Shared) -> Json<Value> {
    let image = node.image.load_full();
    let topics: Vec<Value> = image
        .topics
        .values()
        .map(|t| {
            let size: u64 = t
                .partitions
                .iter()
                .map(|p| node.gauges_of(p.group_id).size_bytes.load(Ordering::Relaxed))
                .sum();
            let export = node.exports.status(&t.name).map(|s| s["state"].clone());
            json!({
                "name": t.name, "id": t.id.to_string(), "partitions": t.partitions.len(),
                "internal": t.internal, "size_bytes": size, "export": export,
            })
        })
        .collect();
    Json(json!({ "topics": topics }))
}

async fn describe_topic(Shared(node): Shared, Path(topic): Path<String>) -> Result<Json<Value>, Problem> {
    let image = node.image.load_full();
    let found = image.topics.get(&topic).ok_or_else(|| {
        Problem::not_found(format!("topic '{topic}' does not exist"))
            .with_fix(format!("flumen topic create {topic}"))
    })?;
    let partitions = crate::cluster_view::partitions(&node, Some(&topic), false).await;
    let configs: Map<String, Value> = topic_admin::described_configs(&node, &topic)
        .into_iter()
        .map(|(name, value, source)| (name, json!({ "value": value, "source": source })))
        .collect();
    let (durability, meaning) = match found.effective.acknowledges() {
        flumen_metadata::Durability::Durable => {
            ("durable", "acknowledged after the disk has the records: survives kill -9 and power loss")
        }
        flumen_metadata::Durability::Os => {
            ("os", "acknowledged when the kernel has the records: survives kill -9, not power loss")
        }
        flumen_metadata::Durability::Memory => (
            "memory",
            "acknowledged when the process has the records: kill -9 and power loss take the last of them",
        ),
    };
    Ok(Json(json!({
        "name": found.name, "id": found.id.to_string(), "internal": found.internal,
        "partitions": found.partitions.len(), "partition_list": partitions,
        "durability": durability, "durability_meaning": meaning, "configs": configs,
        "export": node.exports.status(&topic),
    })))
}

/// Values of configurations come as JSON strings, numbers or booleans; Kafka knows only strings.
pub(crate) fn config_text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(s) => Some(s.clone()),
        other => Some(other.to_string()),
    }
}

async fn create_topic(
    Shared(node): Shared,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let name = body["name"].as_str().ok_or_else(|| Problem::bad_request("'name' is missing"))?.to_string();
    let number = |key: &str, default: i64| match &body[key] {
        Value::Null => Ok(default),
        value => {
            value.as_i64().ok_or_else(|| Problem::bad_request(format!("'{key}' must be a whole number")))
        }
    };
    let partitions = i32::try_from(number("partitions", -1)?)
        .map_err(|_| Problem::bad_request("'partitions' is out of range"))?;
    let replication = i16::try_from(number("replication_factor", -1)?)
        .map_err(|_| Problem::bad_request("'replication_factor' is out of range"))?;
    let configs: BTreeMap<String, String> = body["configs"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| config_text(v).map(|v| (k.clone(), v)))
        .collect();
    if configs.contains_key(ENABLE) {
        refuse_export(
            &node,
            &[Command::CreateTopic {
                name: name.clone(),
                id: uuid::Uuid::nil(),
                assignments: Vec::new(),
                configs: configs.clone(),
            }],
        )
        .await?;
    }
    let created = topic_admin::create_topic(&node, &name, partitions, replication, configs).await;
    let status = match created {
        Ok(()) => StatusCode::CREATED,
        Err(e)
            if e.code == flumen_protocol::error_code::ErrorCode::TOPIC_ALREADY_EXISTS
                && body["if_not_exists"] == Value::Bool(true) =>
        {
            StatusCode::OK
        }
        Err(e) => return Err(e.into()),
    };
    let partitions = node.image.load().topics.get(&name).map_or(0, |t| t.partitions.len());
    Ok((status, Json(json!({ "name": name, "partitions": partitions }))))
}

async fn delete_topic(Shared(node): Shared, Path(topic): Path<String>) -> Result<Json<Value>, Problem> {
    topic_admin::delete_topic(&node, &topic).await?;
    Ok(Json(json!({ "name": topic, "deleted": true })))
}

async fn alter_topic(
    Shared(node): Shared,
    Path(topic): Path<String>,
    Json(body): Json<Value>,
) -> Result<Json<Value>, Problem> {
    if let Some(configs) = body["configs"].as_object()
        && !configs.is_empty()
    {
        let changes: BTreeMap<_, _> = configs.iter().map(|(k, v)| (k.clone(), config_text(v))).collect();
        let topic_id = node.image.load().topics.get(&topic).map(|t| t.id);
        if let Some(topic_id) = topic_id {
            refuse_export(&node, &[Command::SetTopicConfigs { topic_id, set: changes.clone() }]).await?;
        }
        topic_admin::alter_configs(&node, &topic, changes).await?;
    }
    if let Some(partitions) = body["partitions"].as_i64() {
        let partitions =
            i32::try_from(partitions).map_err(|_| Problem::bad_request("'partitions' is out of range"))?;
        topic_admin::create_partitions(&node, &topic, partitions).await?;
    }
    Ok(Json(json!({ "name": topic, "altered": true })))
}

/// An export that ClickHouse cannot give is refused before anything is changed.
async fn refuse_export(node: &Arc<Node>, commands: &[Command]) -> Result<(), Problem> {
    let image = node.image.load_full();
    match node.exports.refusals(&image, commands).await.into_values().next() {
        None => Ok(()),
        Some(detail) => {
            Err(Problem { status: StatusCode::CONFLICT, code: "EXPORT_REFUSED", detail, fix: None })
        }
    }
}

async fn list_exports(Shared(node): Shared) -> Json<Value> {
    let exports: Vec<Value> = node
        .exports
        .statuses()
        .into_iter()
        .map(|(topic, mut status)| {
            status["topic"] = json!(topic);
            status
        })
        .collect();
    Json(json!({ "exports": exports }))
}

fn exported(node: &Arc<Node>, topic: &str) -> Result<BTreeMap<String, String>, Problem> {
    let image = node.image.load();
    let found = image
        .topics
        .get(topic)
        .ok_or_else(|| Problem::not_found(format!("topic '{topic}' does not exist")))?;
    let own: BTreeMap<String, String> = found
        .configs
        .iter()
        .filter(|(k, _)| k.starts_with(CONFIG_PREFIX))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    if own.get(ENABLE).map(String::as_str) == Some("true") {
        Ok(own)
    } else {
        Err(Problem::not_found(format!("topic '{topic}' is not exported"))
            .with_fix(format!("flumen export create {topic}")))
    }
}

async fn get_export(Shared(node): Shared, Path(topic): Path<String>) -> Result<Json<Value>, Problem> {
    let mut configs = exported(&node, &topic)?;
    if let Some(url) = configs.get_mut(ENDPOINT) {
        *url = redact_url(url);
    }
    Ok(Json(json!({ "topic": topic, "configs": configs, "status": node.exports.status(&topic) })))
}

async fn export_status(Shared(node): Shared, Path(topic): Path<String>) -> Result<Json<Value>, Problem> {
    exported(&node, &topic)?;
    // Turned on a moment ago, the export may not have reported yet.
    Ok(Json(node.exports.status(&topic).unwrap_or_else(|| json!({ "topic": topic, "state": "starting" }))))
}

/// `{"table": "orders", "auto_create": true}` -> `flumen.clickhouse.table`, `flumen.clickhouse.auto.create`.
fn export_changes(body: &Value) -> Result<BTreeMap<String, Option<String>>, Problem> {
    let object = match body {
        Value::Null => return Ok(BTreeMap::new()),
        Value::Object(object) => object,
        _ => return Err(Problem::bad_request("an export is a JSON object of settings")),
    };
    let mut changes = BTreeMap::new();
    for (key, value) in object {
        let key = match key.strip_prefix(CONFIG_PREFIX) {
            Some(rest) => rest.to_string(),
            None => key.replace('_', "."),
        };
        changes.insert(format!("{CONFIG_PREFIX}{key}"), config_text(value));
    }
    Ok(changes)
}

/// The settings that the export would have after `changes`.
fn merged(
    node: &Arc<Node>,
    topic: &str,
    changes: &BTreeMap<String, Option<String>>,
) -> Result<BTreeMap<String, String>, Problem> {
    let image = node.image.load();
    let found = image.topics.get(topic).ok_or_else(|| {
        Problem::not_found(format!("topic '{topic}' does not exist"))
            .with_fix(format!("flumen topic create {topic}"))
    })?;
    let mut all = found.configs.clone();
    for (key, value) in changes {
        match value {
            Some(value) => drop(all.insert(key.clone(), value.clone())),
            None => drop(all.remove(key)),
        }
    }
    all.insert(ENABLE.to_string(), "true".to_string());
    Ok(all)
}

async fn put_export(
    Shared(node): Shared,
    Path(topic): Path<String>,
    body: axum::body::Bytes,
) -> Result<Json<Value>, Problem> {
    let mut changes = export_changes(&parse_body(&body)?)?;
    changes.insert(ENABLE.to_string(), Some("true".to_string()));
    // PUT states the whole export: settings that it does not name go back to their defaults.
    {
        let image = node.image.load();
        for key in image.topics.get(&topic).into_iter().flat_map(|t| t.configs.keys()) {
            if key.starts_with(CONFIG_PREFIX) && !changes.contains_key(key) {
                changes.insert(key.clone(), None);
            }
        }
    }
    let admission = node.exports.admit(&topic, merged(&node, &topic, &changes)?).await?;
    topic_admin::alter_configs(&node, &topic, changes).await?;
    shown(&admission)
}

fn shown(admission: &Admission) -> Result<Json<Value>, Problem> {
    serde_json::to_value(admission).map(Json).map_err(|e| Problem::bad_request(e.to_string()))
}

fn parse_body(body: &[u8]) -> Result<Value, Problem> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    serde_json::from_slice(body).map_err(|e| Problem::bad_request(format!("the body is not JSON: {e}")))
}

async fn delete_export(Shared(node): Shared, Path(topic): Path<String>) -> Result<Json<Value>, Problem> {
    let changes = exported(&node, &topic)?.into_keys().map(|k| (k, None)).collect();
    topic_admin::alter_configs(&node, &topic, changes).await?;
    Ok(Json(json!({ "topic": topic, "deleted": true })))
}

/// `POST /v1/exports/{topic}:pause` and the like: the action is part of the last path segment.
async fn export_action(
    Shared(node): Shared,
    Path(segment): Path<String>,
    body: axum::body::Bytes,
) -> Result<Json<Value>, Problem> {
    let (topic, action) = segment
        .rsplit_once(':')
        .ok_or_else(|| Problem::not_found(format!("expected /v1/exports/{{topic}} and one of {ACTIONS}")))?;
    match action {
        "validate" => {
            let changes = export_changes(&parse_body(&body)?)?;
            shown(&node.exports.admit(topic, merged(&node, topic, &changes)?).await?)
        }
        "pause" | "resume" => {
            exported(&node, topic)?;
            let paused = (action == "pause").then(|| "true".to_string());
            let changes = BTreeMap::from([(PAUSED.to_string(), paused)]);
            topic_admin::alter_configs(&node, topic, changes).await?;
            if action == "resume" {
                node.exports.resume(topic).await;
            }
            Ok(Json(json!({ "topic": topic, "paused": action == "pause" })))
        }
        "reset" => {
            exported(&node, topic)?;
            let positions = positions(&node, topic, &parse_body(&body)?)?;
            node.exports.reset(topic, positions).await?;
            Ok(Json(node.exports.status(topic).unwrap_or(Value::Null)))
        }
        other => Err(Problem::not_found(format!("'{other}' is not something an export can do"))
            .with_fix(format!("use one of {ACTIONS}"))),
    }
}

const ACTIONS: &str = ":validate, :pause, :resume, :reset";

/// `{"to": "earliest"}`, `{"to": "latest"}` or `{"to": 1234}`, for all partitions or `"partition": 3`.
fn positions(node: &Arc<Node>, topic: &str, body: &Value) -> Result<Vec<(i32, ResetTo)>, Problem> {
    let to = match &body["to"] {
        Value::String(word) if word == "earliest" => ResetTo::Earliest,
        Value::String(word) if word == "latest" => ResetTo::Latest,
        Value::Number(n) if n.as_i64().is_some_and(|n| n >= 0) => {
            ResetTo::Offset(n.as_i64().unwrap_or_default())
        }
        _ => {
            return Err(Problem::bad_request("'to' is missing or not understood")
                .with_fix(r#"send {"to": "earliest"}, {"to": "latest"} or {"to": OFFSET, "partition": N}"#));
        }
    };
    let count = node.image.load().topics.get(topic).map_or(0, |t| t.partitions.len());
    let all = 0..i32::try_from(count).unwrap_or(i32::MAX);
    match &body["partition"] {
        Value::Null => Ok(all.map(|partition| (partition, to)).collect()),
        partition => {
            let known = partition.as_i64().and_then(|p| i32::try_from(p).ok()).filter(|p| all.contains(p));
            known.map(|partition| vec![(partition, to)]).ok_or_else(|| {
                Problem::bad_request(format!("topic '{topic}' has no partition {partition}"))
                    .with_fix(format!("its partitions are 0 to {}", all.end - 1))
            })
        }
    }
}
