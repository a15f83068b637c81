//! Exports inside the broker: which topics are exported, and what the rest of the process may know of it.
//!
//! All exports run on one thread of their own (`manager`), not pinned and not a shard, so that decoding
//! a backlog never delays a produce. This file is the handle that every other thread holds: statuses to
//! read, and a word to say when the metadata changed.

mod admit;
mod manager;
mod source;
mod state_log;
mod state_trim;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, RwLock};

use flumen_metadata::{Command as MetadataCommand, ConfigKind, ExtraConfig, MetadataImage};
use flumen_sink::admission::Admission;
use flumen_sink::exporter::{ExportHandle, ResetError, ResetTo};
use flumen_sink::status::{ExportMetrics, ExportStatus, SampleValue, State};
use kafka_protocol::messages::GroupId;
use kafka_protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::protocol::StrBytes;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

pub use admit::NotAdmitted;
pub use manager::start;
pub(crate) use source::append;
pub use state_log::STATE_TOPIC;

/// Exports appear to Kafka tools as consumer groups with this prefix.
const GROUP_PREFIX: &str = "export.";
/// The topic configurations that are an export.
pub const CONFIG_PREFIX: &str = flumen_sink::config::PREFIX;
pub const ENABLE: &str = "flumen.clickhouse.enable";
pub const ENDPOINT: &str = "flumen.clickhouse.endpoint";
pub const PAUSED: &str = "flumen.clickhouse.paused";
/// Commands waiting for the manager. Metadata changes collapse into one look at the image, so a full
/// queue loses nothing but duplicates.
const COMMANDS_MAX: usize = 64;

pub(crate) enum Command {
    MetadataChanged,
    Admit {
        topic: String,
        configs: BTreeMap<String, String>,
        answer: oneshot::Sender<Result<Admission, NotAdmitted>>,
    },
    Reset {
        topic: String,
        positions: Vec<(i32, ResetTo)>,
        answer: oneshot::Sender<Result<(), ResetRefused>>,
    },
    /// Look again at once at what the export waits for.
    Resume {
        topic: String,
    },
    Stop {
        done: oneshot::Sender<()>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResetRefused {
    #[error("the topic is not exported, or its export could not be started; see its status")]
    NotExported,
    #[error(transparent)]
    Reset(ResetError),
    #[error("the broker is stopping")]
    Stopping,
}

/// What one export last said of itself.
#[derive(Clone)]
pub(crate) struct View {
    pub status: Arc<ExportStatus>,
    /// Absent for an export that could not be started.
    pub metrics: Option<Arc<ExportMetrics>>,
}

impl View {
    fn of(handle: &ExportHandle) -> View {
        View { status: handle.status(), metrics: Some(handle.metrics().clone()) }
    }

    /// The status, and the counters that it does not carry, under the names that it would use.
    fn document(&self) -> Value {
        let mut value = serde_json::to_value(&*self.status).unwrap_or(Value::Null);
        for sample in self.metrics.iter().flat_map(|m| m.samples()) {
            if let (SampleValue::Counter(n) | SampleValue::Gauge(n), true) =
                (&sample.value, sample.labels.is_empty())
                && let Some(name) = sample.name.strip_prefix("flumen_export_")
                && value.get(name).is_none()
            {
                value[name] = json!(n);
            }
        }
        value
    }
}

#[derive(Clone)]
pub struct Exports {
    views: Arc<RwLock<BTreeMap<String, View>>>,
    commands: mpsc::Sender<Command>,
}

impl Exports {
    pub fn new() -> (Exports, ExportCommands) {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        (Exports { views: Arc::default(), commands }, ExportCommands(receiver))
    }

    pub fn metadata_changed(&self) {
        // Full means that a look at the metadata is already due.
        let _ = self.commands.try_send(Command::MetadataChanged);
    }

    /// Asks what an export with these settings would guarantee, without changing anything.
    pub async fn admit(
        &self,
        topic: &str,
        configs: BTreeMap<String, String>,
    ) -> Result<Admission, NotAdmitted> {
        let stopping = || NotAdmitted::Away {
            message: "the broker is stopping".to_string(),
            fix: "ask again when it runs; nothing was changed".to_string(),
        };
        let (answer, receiver) = oneshot::channel();
        let command = Command::Admit { topic: topic.to_string(), configs, answer };
        self.commands.send(command).await.map_err(|_| stopping())?;
        receiver.await.map_err(|_| stopping())?
    }

    /// Of metadata changes that are about to be made, those that would turn on, or change, an export that cannot run,
    /// with the reason; by topic name. Only a server that answers refuses anything.
    pub async fn refusals(
        &self,
        image: &MetadataImage,
        commands: &[MetadataCommand],
    ) -> BTreeMap<String, String> {
        let mut refused = BTreeMap::new();
        for command in commands {
            let (name, before, set) = match command {
                MetadataCommand::SetTopicConfigs { topic_id, set } => {
                    let Some(topic) = image.topics.values().find(|t| t.id == *topic_id) else { continue };
                    (&topic.name, topic.configs.clone(), set.clone())
                }
                MetadataCommand::CreateTopic { name, configs, .. } => {
                    let set = configs.iter().map(|(k, v)| (k.clone(), Some(v.clone()))).collect();
                    (name, BTreeMap::new(), set)
                }
                _ => continue,
            };
            // Pausing must be possible whatever is wrong.
            if !set.keys().any(|key| key.starts_with(CONFIG_PREFIX) && key != PAUSED) {
                continue;
            }
            let mut after = before;
            for (key, value) in set {
                match value {
                    Some(value) => drop(after.insert(key, value)),
                    None => drop(after.remove(&key)),
                }
            }
            if after.get(ENABLE).map(String::as_str) != Some("true") {
                continue;
            }
            match self.admit(name, after).await {
                Ok(_) => {}
                Err(NotAdmitted::Away { message, .. }) => {
                    tracing::warn!(topic = name, message, "export turned on without having asked ClickHouse");
                }
                Err(refusal) => drop(refused.insert(name.clone(), refusal.sentence())),
            }
        }
        refused
    }

    /// Lets a paused export go on from other offsets, in a new epoch. Returns when that is recorded and visible.
    pub async fn reset(&self, topic: &str, positions: Vec<(i32, ResetTo)>) -> Result<(), ResetRefused> {
        let (answer, receiver) = oneshot::channel();
        let command = Command::Reset { topic: topic.to_string(), positions, answer };
        self.commands.send(command).await.map_err(|_| ResetRefused::Stopping)?;
        receiver.await.map_err(|_| ResetRefused::Stopping)?
    }

    /// A failed export looks again at once, instead of when its time comes or never.
    pub async fn resume(&self, topic: &str) {
        // An error means that the broker is stopping.
        let _ = self.commands.send(Command::Resume { topic: topic.to_string() }).await;
    }

    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Stop { done }).await.is_ok() {
            // An error means that the thread has already ended.
            let _ = stopped.await;
        }
    }

    /// Replaces what all exports say: one that is not named is gone.
    pub(crate) fn publish_all(&self, views: BTreeMap<String, View>) {
        *self.views.write().expect("no panic under this lock") = views;
    }

    pub(crate) fn publish(&self, topic: &str, view: View) {
        self.views.write().expect("no panic under this lock").insert(topic.to_string(), view);
    }

    fn view(&self, topic: &str) -> Option<View> {
        self.views.read().expect("no panic under this lock").get(topic).cloned()
    }

    pub(crate) fn views(&self) -> BTreeMap<String, View> {
        self.views.read().expect("no panic under this lock").clone()
    }

    pub fn status(&self, topic: &str) -> Option<Value> {
        self.view(topic).map(|v| v.document())
    }

    pub fn state(&self, topic: &str) -> Option<State> {
        self.view(topic).map(|v| v.status.state)
    }

    pub fn statuses(&self) -> Vec<(String, Value)> {
        self.views().into_iter().map(|(topic, view)| (topic, view.document())).collect()
    }

    pub fn all_settled(&self) -> Vec<(String, Vec<(i32, i64)>)> {
        self.views().into_iter().map(|(topic, view)| (topic, settled(&view))).collect()
    }

    /// The topic whose export `group` shows.
    pub fn topic_of(&self, group: &str) -> Option<String> {
        let topic = group.strip_prefix(GROUP_PREFIX)?;
        self.view(topic).map(|_| topic.to_string())
    }

    /// (topic, settled offsets) when `group` is the group of an export.
    pub fn settled_offsets(&self, group: &str) -> Option<(String, Vec<(i32, i64)>)> {
        let topic = group.strip_prefix(GROUP_PREFIX)?;
        self.view(topic).map(|v| (topic.to_string(), settled(&v)))
    }

    pub fn listed_groups(&self) -> Vec<ListedGroup> {
        self.views()
            .iter()
            .map(|(topic, view)| {
                ListedGroup::default()
                    .with_group_id(group_id(topic))
                    .with_protocol_type(StrBytes::from_static_str("consumer"))
                    .with_group_state(StrBytes::from_static_str(group_state(view)))
                    .with_group_type(StrBytes::from_static_str("classic"))
            })
            .collect()
    }

    pub fn described_group(&self, group: &str, image: &MetadataImage) -> Option<DescribedGroup> {
        let topic = group.strip_prefix(GROUP_PREFIX)?;
        let view = self.view(topic)?;
        let state = group_state(&view);
        let mut described = DescribedGroup::default()
            .with_group_id(group_id(topic))
            .with_group_state(StrBytes::from_static_str(state))
            .with_protocol_type(StrBytes::from_static_str("consumer"))
            .with_authorized_operations(i32::MIN);
        if state == STABLE {
            // One member has all partitions, those without a position as well, so that no tool overlooks them.
            let partitions = image.topics.get(topic).map_or(0, |t| t.partitions.len());
            let partitions: Vec<i32> = (0..i32::try_from(partitions).unwrap_or(i32::MAX)).collect();
            described.protocol_data = StrBytes::from_static_str("range");
            described.members.push(
                DescribedGroupMember::default()
                    .with_member_id(StrBytes::from_string(format!("flumen-export-{topic}")))
                    .with_client_id(StrBytes::from_static_str("flumen"))
                    .with_client_host(StrBytes::from_static_str("/127.0.0.1"))
                    .with_member_assignment(assignment(topic, &partitions)),
            );
        }
        Some(described)
    }
}

/// Offset per partition up to which everything is settled in ClickHouse.
fn settled(view: &View) -> Vec<(i32, i64)> {
    view.status.partitions.iter().map(|p| (p.partition, p.settled_offset)).collect()
}

/// The export's topic configurations, as the table of all topic configurations wants them.
pub fn topic_configs() -> &'static [ExtraConfig] {
    static TABLE: LazyLock<Vec<ExtraConfig>> = LazyLock::new(|| {
        flumen_sink::config::CONFIG_KEYS
            .iter()
            .map(|key| ExtraConfig {
                name: key.name,
                default: key.default,
                kind: match key.kind {
                    // A URL may hold a password: it is set like any other value and never shown.
                    _ if key.name == ENDPOINT => ConfigKind::Password,
                    flumen_sink::config::ConfigKind::Boolean => ConfigKind::Boolean,
                    flumen_sink::config::ConfigKind::Number { .. } => ConfigKind::Long,
                    _ => ConfigKind::String,
                },
                doc: key.doc,
                validate: flumen_sink::config::validate,
            })
            .collect()
    });
    &TABLE
}

/// The receiving end, handed to the manager's thread once.
pub struct ExportCommands(mpsc::Receiver<Command>);

fn group_id(topic: &str) -> GroupId {
    GroupId(StrBytes::from_string(format!("{GROUP_PREFIX}{topic}")))
}

const STABLE: &str = "Stable";

/// A running export is a group with a member; one that does not move has none, so that tools treat it
/// as they treat a stopped consumer.
fn group_state(view: &View) -> &'static str {
    match view.status.state {
        State::Paused | State::Failed | State::Stopped => "Empty",
        State::Starting | State::Running | State::BackingOff => STABLE,
    }
}

/// Consumer protocol assignment, version 0: version, topics with partitions, no user data.
fn assignment(topic: &str, partitions: &[i32]) -> bytes::Bytes {
    use bytes::BufMut;
    let mut out = bytes::BytesMut::new();
    out.put_i16(0);
    out.put_i32(1);
    out.put_i16(i16::try_from(topic.len()).unwrap_or(0));
    out.put_slice(topic.as_bytes());
    out.put_i32(i32::try_from(partitions.len()).unwrap_or(0));
    partitions.iter().for_each(|p| out.put_i32(*p));
    out.put_i32(-1);
    out.freeze()
}
