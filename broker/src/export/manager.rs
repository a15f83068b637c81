//! The export thread: starts, reconfigures and stops one exporter per exported topic, as the metadata says.
//!
//! Runs on a thread of its own with a `current_thread` runtime. State: which exporters run, with which
//! configuration. A changed configuration stops the exporter and starts it anew from its state log.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use bytes::Bytes;
use flumen_sink::admission;
use flumen_sink::client::{ClickHouse, Endpoint};
use flumen_sink::config::ExportConfig;
use flumen_sink::exporter::{ExportHandle, ExportSetup, Exporter};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::source::TopicSource;
use super::state_log::{self, TopicStateLog};
use super::{Command, ExportCommands, View};
use crate::admin_http::Problem;
use crate::node::Node;

/// How often statuses are copied to where other threads read them.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(250);
/// Records looked at when the columns of a table have to be guessed.
const SAMPLE_RECORDS: usize = 100;
const SAMPLE_BYTES: usize = 256 << 10;

struct Running {
    topic: String,
    config: ExportConfig,
    handle: ExportHandle,
    task: JoinHandle<()>,
}

pub fn start(node: Arc<Node>, commands: ExportCommands) -> std::io::Result<()> {
    std::thread::Builder::new().name("flumen-export".to_string()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "exports cannot run");
                return;
            }
        };
        tokio::task::LocalSet::new().block_on(&runtime, Manager::new(node).run(commands.0));
    })?;
    Ok(())
}

struct Manager {
    node: Arc<Node>,
    running: BTreeMap<Uuid, Running>,
    /// Topics whose configuration cannot be run, with the reason that was reported.
    refused: BTreeMap<Uuid, (String, String)>,
}

impl Manager {
    fn new(node: Arc<Node>) -> Manager {
        Manager { node, running: BTreeMap::new(), refused: BTreeMap::new() }
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        self.reconcile().await;
        let mut publish = tokio::time::interval(PUBLISH_INTERVAL);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::MetadataChanged) => self.reconcile().await,
                    Some(Command::Validate { topic, configs, answer }) => {
                        let _ = answer.send(validate(&self.node, &topic, &configs).await);
                    }
                    Some(Command::Stop { done }) => {
                        for (_, export) in std::mem::take(&mut self.running) {
                            stop(export).await;
                        }
                        let _ = done.send(());
                        return;
                    }
                    None => return,
                },
                _ = publish.tick() => self.publish(),
            }
        }
    }

    /// Makes the running exporters those that the metadata asks for.
    async fn reconcile(&mut self) {
        let image = self.node.image.load_full();
        let mut wanted: BTreeMap<Uuid, ExportConfig> = BTreeMap::new();
        self.refused.clear();
        for topic in image.topics.values().filter(|t| !t.internal) {
            match ExportConfig::from_topic(&topic.name, &topic.configs) {
                Ok(Some(config)) => drop(wanted.insert(topic.id, config)),
                Ok(None) => {}
                Err(error) => drop(self.refused.insert(topic.id, (topic.name.clone(), error.to_string()))),
            }
        }
        let outdated: Vec<Uuid> = self
            .running
            .iter()
            .filter(|(id, export)| wanted.get(id) != Some(&export.config) || export.task.is_finished())
            .map(|(id, _)| *id)
            .collect();
        for id in outdated {
            if let Some(export) = self.running.remove(&id) {
                let topic = export.topic.clone();
                stop(export).await;
                if !wanted.contains_key(&id) {
                    self.node.exports.forget(&topic);
                }
            }
        }
        wanted.retain(|id, _| !self.running.contains_key(id));
        if wanted.is_empty() {
            return;
        }
        let mut records = match self.load_state().await {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "the state of exports cannot be read; they do not start");
                for (id, config) in wanted {
                    self.refused
                        .insert(id, (config.topic, format!("the export state cannot be read: {error}")));
                }
                return;
            }
        };
        for (id, config) in wanted {
            let topic = config.topic.clone();
            let own = records.1.remove(&id).unwrap_or_default();
            match self.start_one(id, config, records.0, own) {
                Ok(export) => drop(self.running.insert(id, export)),
                Err(reason) => {
                    tracing::warn!(topic, reason, "export not started");
                    self.refused.insert(id, (topic, reason));
                }
            }
        }
    }

    async fn load_state(&self) -> Result<(u64, HashMap<Uuid, Vec<Bytes>>), String> {
        let group_id = state_log::open(&self.node).await?;
        Ok((group_id, state_log::load(&self.node, group_id).await?))
    }

    fn start_one(
        &self,
        topic_id: Uuid,
        config: ExportConfig,
        state_group: u64,
        records: Vec<Bytes>,
    ) -> Result<Running, String> {
        let endpoint = endpoint(&self.node, &config)?;
        let topic = config.topic.clone();
        let setup = ExportSetup {
            cluster_id: self.node.image.load().cluster_id.clone(),
            topic_id: *topic_id.as_bytes(),
            config: config.clone(),
            endpoint,
            source: TopicSource { node: self.node.clone(), topic_id },
            state_log: TopicStateLog { node: self.node.clone(), group_id: state_group, topic_id },
            records,
        };
        let (exporter, handle) = Exporter::recover(setup).map_err(|e| e.to_string())?;
        let task = tokio::task::spawn_local(exporter.run());
        tracing::info!(topic, "export started");
        Ok(Running { topic, config, handle, task })
    }

    fn publish(&self) {
        for export in self.running.values() {
            let status = export.handle.status();
            let settled = status.partitions.iter().map(|p| (p.partition, p.settled_offset)).collect();
            let mut value = serde_json::to_value(&*status).unwrap_or(Value::Null);
            for sample in export.handle.metrics().samples().iter().filter(|s| s.labels.is_empty()) {
                // Counters that the status document does not carry, under the names that it would use.
                if let Some(name) = sample.name.strip_prefix("flumen_export_")
                    && value.get(name).is_none()
                {
                    value[name] = json!(sample.value);
                }
            }
            self.node.exports.publish(&export.topic, View { status: value, settled });
        }
        for (topic, reason) in self.refused.values() {
            let status = json!({ "topic": topic, "state": "failed", "last_error": { "message": reason } });
            self.node.exports.publish(topic, View { status, settled: Vec::new() });
        }
    }
}

async fn stop(export: Running) {
    if export.handle.stop().await.is_ok() {
        // The task ends by itself within the exporter's own bound.
        let _ = export.task.await;
    }
    tracing::info!(topic = export.topic, "export stopped");
}

fn endpoint(node: &Node, config: &ExportConfig) -> Result<Endpoint, String> {
    let url = match (&config.endpoint, &node.config.clickhouse_url) {
        (Some(own), _) => own.0.clone(),
        (None, Some(url)) => url.clone(),
        (None, None) => {
            return Err("no ClickHouse is named: set clickhouse.url on the broker or flumen.clickhouse.endpoint on the topic".to_string());
        }
    };
    let endpoint = Endpoint::parse(&url).map_err(|e| e.to_string())?;
    Ok(match &node.config.clickhouse_password {
        // The broker's credentials go to the broker's server only.
        Some(password) if config.endpoint.is_none() => {
            endpoint.with_user(&node.config.clickhouse_user, password.reveal())
        }
        _ => endpoint,
    })
}

/// Says what an export with these settings would guarantee; an error when it would not run.
async fn validate(
    node: &Arc<Node>,
    topic: &str,
    configs: &BTreeMap<String, String>,
) -> Result<Value, Problem> {
    let config = ExportConfig::from_topic(topic, configs)
        .map_err(|e| Problem::bad_request(e.to_string()))?
        .ok_or_else(|| Problem::bad_request("the export is not enabled"))?;
    let endpoint = endpoint(node, &config).map_err(Problem::bad_request)?;
    let database = config.database.clone().unwrap_or_else(|| endpoint.database.clone());
    let samples = samples(node, topic).await;
    let samples: Vec<&[u8]> = samples.iter().map(AsRef::as_ref).collect();
    let server = ClickHouse::new(&endpoint);
    let admission = admission::admit(&server, &database, &config, &samples).await.map_err(|e| Problem {
        status: StatusCode::BAD_GATEWAY,
        code: "CLICKHOUSE",
        detail: format!("{}: {e}", endpoint.shown()),
        fix: Some(e.hint().to_string()),
    })?;
    if !admission.admitted {
        return Err(Problem {
            status: StatusCode::CONFLICT,
            code: "EXPORT_REFUSED",
            detail: admission.reasons.join("; "),
            fix: (!admission.fixes.is_empty()).then(|| admission.fixes.join("; ")),
        });
    }
    serde_json::to_value(&admission).map_err(|e| Problem::bad_request(e.to_string()))
}

/// Values of the first records of a topic.
async fn samples(node: &Arc<Node>, topic: &str) -> Vec<Bytes> {
    let groups: Vec<u64> = {
        let image = node.image.load();
        image.topics.get(topic).map_or_else(Vec::new, |t| t.partitions.iter().map(|p| p.group_id).collect())
    };
    let mut out = Vec::new();
    for group_id in groups {
        let read = node.shards[node.shard_of(group_id)]
            .run(move |s| async move {
                let partition = s.partition(group_id)?;
                partition.fetch(partition.log_start_offset(), SAMPLE_BYTES).await.ok()
            })
            .await;
        let Ok(Some(slice)) = read else { continue };
        for batch in slice.records.iter().flat_map(|b| flumen_protocol::record_batch::batches(b)).flatten() {
            let mut scratch = Vec::new();
            let Ok(records) = flumen_protocol::record::decode_records(batch.1, &mut scratch, 16 << 20) else {
                continue;
            };
            out.extend(records.flatten().filter_map(|r| r.value.map(Bytes::copy_from_slice)));
            if out.len() >= SAMPLE_RECORDS {
                out.truncate(SAMPLE_RECORDS);
                return out;
            }
        }
    }
    out
}
