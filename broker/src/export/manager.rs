//! The export thread: starts, reconfigures and stops one exporter per exported topic, as the metadata says.
//!
//! Runs on a thread of its own with a `current_thread` runtime. State: which exporters run, with which
//! configuration. A changed configuration stops the exporter and starts it anew from its state log. Nothing here waits
//! for ClickHouse: what does (admission, resets) runs as a task beside the loop, so that one server that does not answer
//! keeps no other export waiting.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flumen_sink::client::Endpoint;
use flumen_sink::config::ExportConfig;
use flumen_sink::exporter::{Before, ExportHandle, ExportSetup, Exporter, ResetTo};
use flumen_sink::plan::{ExportState, codec};
use flumen_sink::status::{ExportStatus, LastError, State};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::source::TopicSource;
use super::state_log::{self, TopicStateLog};
use super::state_trim::StateTrim;
use super::{Command, ExportCommands, ResetRefused, View, admit};
use crate::node::{Node, now_ms};

/// How often statuses are copied to where other threads read them.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(250);
/// How often the state log is looked at for records that nothing needs any more.
const TRIM_INTERVAL: Duration = Duration::from_secs(5);
/// How long an export that could not be started waits for the next try.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// An exporter ends within this, or is ended where it stands: what it recorded is whole either way.
const STOP_MAX: Duration = Duration::from_secs(10);

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

/// An export that is wanted and does not run.
struct Refused {
    topic: String,
    message: String,
    hint: String,
    since_ms: i64,
}

struct Manager {
    node: Arc<Node>,
    running: BTreeMap<Uuid, Running>,
    refused: BTreeMap<Uuid, Refused>,
    trim: Rc<RefCell<StateTrim>>,
    state_group: Option<u64>,
    retry_at: Instant,
}

impl Manager {
    fn new(node: Arc<Node>) -> Manager {
        Manager {
            node,
            running: BTreeMap::new(),
            refused: BTreeMap::new(),
            trim: Rc::default(),
            state_group: None,
            retry_at: Instant::now(),
        }
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        self.reconcile().await;
        let mut publish = tokio::time::interval(PUBLISH_INTERVAL);
        let mut trim = tokio::time::interval(TRIM_INTERVAL);
        for interval in [&mut publish, &mut trim] {
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::MetadataChanged) => self.reconcile().await,
                    Some(Command::Admit { topic, configs, answer }) => {
                        let node = self.node.clone();
                        tokio::task::spawn_local(async move {
                            let _ = answer.send(admit::admit(&node, &topic, &configs).await);
                        });
                    }
                    Some(Command::Reset { topic, positions, answer }) => self.reset(topic, positions, answer),
                    Some(Command::Resume { topic }) => self.resume(&topic).await,
                    Some(Command::Stop { done }) => {
                        for (_, export) in std::mem::take(&mut self.running) {
                            stop(export).await;
                        }
                        let _ = done.send(());
                        return;
                    }
                    None => return,
                },
                _ = publish.tick() => {
                    self.publish();
                    let ended = self.running.values().any(|e| e.task.is_finished());
                    if (ended || !self.refused.is_empty()) && Instant::now() >= self.retry_at {
                        self.reconcile().await;
                    }
                }
                _ = trim.tick() => self.trim_state().await,
            }
        }
    }

    /// Makes the running exporters those that the metadata asks for.
    async fn reconcile(&mut self) {
        self.retry_at = Instant::now() + RETRY_INTERVAL;
        let image = self.node.image.load_full();
        let mut wanted: BTreeMap<Uuid, ExportConfig> = BTreeMap::new();
        let mut refused: BTreeMap<Uuid, (String, String, String)> = BTreeMap::new();
        for topic in image.topics.values().filter(|t| !t.internal) {
            match ExportConfig::from_topic(&topic.name, &topic.configs) {
                Ok(Some(config)) => drop(wanted.insert(topic.id, config)),
                Ok(None) => {}
                Err(error) => {
                    let hint = "correct the topic's configuration".to_string();
                    refused.insert(topic.id, (topic.name.clone(), error.to_string(), hint));
                }
            }
        }
        if !self.is_for_here(!wanted.is_empty()).await {
            self.hand_over().await;
            return;
        }
        for (id, export) in &mut self.running {
            let Some(config) = wanted.get(id) else { continue };
            let as_wanted = ExportConfig { paused: config.paused, ..export.config.clone() };
            if export.config != *config && as_wanted == *config {
                // An error means that it has ended: it is started anew below.
                let _ = match config.paused {
                    true => export.handle.pause("flumen.clickhouse.paused is true").await,
                    false => export.handle.resume().await,
                };
                export.config = as_wanted;
            }
        }
        let mut before: BTreeMap<Uuid, Before> = BTreeMap::new();
        let outdated: Vec<Uuid> = self
            .running
            .iter()
            .filter(|(id, export)| wanted.get(id) != Some(&export.config) || export.task.is_finished())
            .map(|(id, _)| *id)
            .collect();
        for id in outdated {
            if let Some(export) = self.running.remove(&id) {
                let handle = export.handle.clone();
                stop(export).await;
                before.insert(id, handle.before());
            }
        }
        wanted.retain(|id, _| !self.running.contains_key(id));
        if !wanted.is_empty() {
            match self.load_state().await {
                Ok(mut records) => {
                    for (id, config) in wanted {
                        let topic = config.topic.clone();
                        let own = records.remove(&id).unwrap_or_default();
                        match self.start_one(id, config, own, before.remove(&id)) {
                            Ok(export) => drop(self.running.insert(id, export)),
                            Err((reason, hint)) => drop(refused.insert(id, (topic, reason, hint))),
                        }
                    }
                }
                Err(error) => {
                    let message = format!("the state of exports cannot be read or written: {error}");
                    let hint = "look at the broker's log and disk; the export is tried again by itself";
                    for (id, config) in wanted {
                        refused.insert(id, (config.topic, message.clone(), hint.to_string()));
                    }
                }
            }
        }
        self.take_refused(refused);
        self.publish();
    }

    /// Exports of a cluster run on one node, the one that leads their state.
    async fn is_for_here(&self, any: bool) -> bool {
        if self.node.image.load().brokers().len() < 2 {
            return true;
        }
        if !any && self.running.is_empty() {
            return true;
        }
        match state_log::open(&self.node).await {
            Ok(group_id) => state_log::is_led_here(&self.node, group_id).await,
            // Said where exports are started.
            Err(_) => self.running.is_empty(),
        }
    }

    /// Another node runs the exports now, and goes on from what is recorded.
    async fn hand_over(&mut self) {
        for (_, export) in std::mem::take(&mut self.running) {
            stop(export).await;
        }
        self.refused.clear();
        self.state_group = None;
        *self.trim.borrow_mut() = StateTrim::default();
        self.publish();
    }

    fn take_refused(&mut self, refused: BTreeMap<Uuid, (String, String, String)>) {
        let mut before = std::mem::take(&mut self.refused);
        for (id, (topic, message, hint)) in refused {
            let known = before.remove(&id).filter(|known| known.message == message);
            let since_ms = known.map_or_else(
                || {
                    tracing::warn!(topic, message, hint, "export not started");
                    now_ms()
                },
                |known| known.since_ms,
            );
            self.refused.insert(id, Refused { topic, message, hint, since_ms });
        }
    }

    /// Records by topic.
    async fn load_state(&mut self) -> Result<HashMap<Uuid, Vec<Bytes>>, String> {
        let group_id = state_log::open(&self.node).await?;
        let (records, trim) = state_log::load(&self.node, group_id).await?;
        // Later loads run beside exporters, whose appends `trim` hears of by itself.
        if self.state_group.is_none() {
            *self.trim.borrow_mut() = trim;
            self.state_group = Some(group_id);
        }
        Ok(records)
    }

    fn start_one(
        &self,
        topic_id: Uuid,
        config: ExportConfig,
        records: Vec<Bytes>,
        before: Option<Before>,
    ) -> Result<Running, (String, String)> {
        let endpoint = endpoint(&self.node, &config)?;
        let topic = config.topic.clone();
        let Some(group_id) = self.state_group else {
            return Err(("the state of exports is not open".to_string(), "report this defect".to_string()));
        };
        let setup = ExportSetup {
            cluster_id: self.node.image.load().cluster_id.clone(),
            topic_id: *topic_id.as_bytes(),
            config: config.clone(),
            endpoint,
            source: TopicSource { node: self.node.clone(), topic_id },
            state_log: TopicStateLog::new(self.node.clone(), group_id, topic_id, self.trim.clone()),
            records,
            before,
        };
        let (exporter, handle) = Exporter::recover(setup).map_err(|e| {
            let hint =
                "a newer broker may have written it: start that version; the records of the topic are safe";
            (e.to_string(), hint.to_string())
        })?;
        let task = tokio::task::spawn_local(exporter.run());
        tracing::info!(topic, "export started");
        Ok(Running { topic, config, handle, task })
    }

    /// A person has seen to what the export waits for.
    async fn resume(&mut self, topic: &str) {
        match self.running.values().find(|e| e.topic == topic && !e.config.paused) {
            Some(export) => {
                if export.handle.resume().await.is_err() {
                    self.reconcile().await;
                }
            }
            None => self.reconcile().await,
        }
    }

    fn reset(
        &self,
        topic: String,
        positions: Vec<(i32, ResetTo)>,
        answer: tokio::sync::oneshot::Sender<Result<(), ResetRefused>>,
    ) {
        let Some(export) = self.running.values().find(|e| e.topic == topic) else {
            let _ = answer.send(Err(ResetRefused::NotExported));
            return;
        };
        let (node, handle) = (self.node.clone(), export.handle.clone());
        tokio::task::spawn_local(async move {
            let outcome = match handle.reset(positions).await {
                Ok(outcome) => outcome.map_err(ResetRefused::Reset),
                Err(_) => Err(ResetRefused::NotExported),
            };
            // Whoever asked may ask for the new offsets next.
            if outcome.is_ok() {
                node.exports.publish(&topic, View::of(&handle));
            }
            let _ = answer.send(outcome);
        });
    }

    fn publish(&self) {
        let mut views = BTreeMap::new();
        for export in self.running.values() {
            let mut view = View::of(&export.handle);
            if export.task.is_finished() && view.status.state != State::Stopped {
                let status = ExportStatus {
                    state: State::Failed,
                    last_error: Some(problem(
                        "the export ended unexpectedly",
                        "see the broker's log for why; it is started again by itself",
                        now_ms(),
                    )),
                    ..(*view.status).clone()
                };
                view.status = Arc::new(status);
            }
            views.insert(export.topic.clone(), view);
        }
        for refused in self.refused.values() {
            let status = ExportStatus {
                topic: refused.topic.clone(),
                state: State::Failed,
                since_ms: refused.since_ms,
                last_error: Some(problem(&refused.message, &refused.hint, refused.since_ms)),
                ..ExportStatus::default()
            };
            views.insert(refused.topic.clone(), View { status: Arc::new(status), metrics: None });
        }
        self.node.exports.publish_all(views);
    }

    /// Cuts the state log where it may be cut, and asks for the snapshots that would let it be cut further.
    async fn trim_state(&mut self) {
        let Some(group_id) = self.state_group else { return };
        let live: BTreeSet<Uuid> = self.node.image.load().topics.values().map(|t| t.id).collect();
        self.trim.borrow_mut().retain(&live);
        let (due, laggards) = {
            let trim = self.trim.borrow();
            (trim.due(), trim.laggards())
        };
        if let Some(offset) = due {
            match state_log::cut(&self.node, group_id, offset).await {
                Ok(()) => self.trim.borrow_mut().cut(offset),
                Err(error) => tracing::warn!(%error, "the export state log cannot be cut; tried again"),
            }
        }
        let mut dormant = Vec::new();
        for id in laggards {
            match self.running.get(&id) {
                Some(export) if !export.task.is_finished() => export.handle.want_snapshot(),
                _ => dormant.push(id),
            }
        }
        if !dormant.is_empty()
            && let Err(error) = self.snapshot_dormant(group_id, &dormant).await
        {
            tracing::warn!(%error, "no snapshot of an export that is turned off; tried again");
        }
    }

    /// Exports that are turned off keep their positions; nobody but the manager writes their snapshots.
    async fn snapshot_dormant(&self, group_id: u64, dormant: &[Uuid]) -> Result<(), String> {
        let (mut records, _) = state_log::load(&self.node, group_id).await?;
        for id in dormant {
            let own = records.remove(id).unwrap_or_default();
            let state = ExportState::replay(own.iter().map(|b| &b[..])).map_err(|e| e.to_string())?;
            let snapshot = codec::encode(&state.snapshot());
            let offset = state_log::append(&self.node, group_id, *id, &snapshot).await?;
            self.trim.borrow_mut().snapshot(*id, offset);
        }
        Ok(())
    }
}

fn problem(message: &str, hint: &str, since_ms: i64) -> LastError {
    LastError {
        class: None,
        alarm: None,
        ch_code: None,
        message: message.to_string(),
        hint: hint.to_string(),
        first_seen_ms: since_ms,
        last_seen_ms: now_ms(),
        count: 1,
    }
}

async fn stop(export: Running) {
    let Running { topic, handle, mut task, .. } = export;
    // An error means that it has ended already.
    let _ = handle.stop().await;
    if tokio::time::timeout(STOP_MAX, &mut task).await.is_err() {
        tracing::warn!(
            topic,
            "the export did not stop by itself; its open inserts are looked up at the next start"
        );
        task.abort();
        let _ = task.await;
    }
    tracing::info!(topic, "export stopped");
}

/// The server of an export; what is wrong and what to do otherwise.
pub(super) fn endpoint(node: &Node, config: &ExportConfig) -> Result<Endpoint, (String, String)> {
    let url = match (&config.endpoint, &node.config.clickhouse_url) {
        (Some(own), _) => own.0.clone(),
        (None, Some(url)) => url.clone(),
        (None, None) => {
            return Err((
                "no ClickHouse is named".to_string(),
                "start the broker with --set clickhouse.url=http://HOST:8123, or set flumen.clickhouse.endpoint on \
                 the topic"
                    .to_string(),
            ));
        }
    };
    let endpoint = Endpoint::parse(&url).map_err(|e| {
        (e.to_string(), "correct flumen.clickhouse.endpoint, or the broker's clickhouse.url".to_string())
    })?;
    if config.endpoint.is_some() {
        // The broker's credentials go to the broker's server only.
        return Ok(endpoint);
    }
    let endpoint = endpoint.with_default_database(&node.config.clickhouse_database);
    let password = node.config.clickhouse_password.as_ref().map_or("", |p| p.reveal());
    Ok(match node.config.clickhouse_user.as_str() {
        // The URL may name user and password as well.
        "default" if password.is_empty() => endpoint,
        user => endpoint.with_user(user, password),
    })
}
