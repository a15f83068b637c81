//! Exports inside the broker: which topics are exported, and what the rest of the process may know of it.
//!
//! All exports run on one thread of their own (`manager`), not pinned and not a shard, so that decoding
//! a backlog never delays a produce. This file is the handle that every other thread holds: statuses to
//! read, and a word to say when the metadata changed.

mod manager;
mod source;
mod state_log;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, RwLock};

use axum::http::StatusCode;
use flumen_metadata::{ConfigKind, ExtraConfig};
use kafka_protocol::messages::GroupId;
use kafka_protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::protocol::StrBytes;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::admin_http::Problem;

pub use manager::start;

/// Exports appear to Kafka tools as consumer groups with this prefix.
const GROUP_PREFIX: &str = "export.";
/// Commands waiting for the manager. Metadata changes collapse into one look at the image, so a full
/// queue loses nothing but duplicates.
const COMMANDS_MAX: usize = 64;

pub(crate) enum Command {
    MetadataChanged,
    Validate {
        topic: String,
        configs: BTreeMap<String, String>,
        answer: oneshot::Sender<Result<Value, Problem>>,
    },
    Stop {
        done: oneshot::Sender<()>,
    },
}

/// What one export last said of itself.
#[derive(Clone, Default)]
pub(crate) struct View {
    pub status: Value,
    /// Offset per partition up to which everything is settled in ClickHouse.
    pub settled: Vec<(i32, i64)>,
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
    pub async fn validate(&self, topic: &str, configs: BTreeMap<String, String>) -> Result<Value, Problem> {
        let gone = || Problem {
            status: StatusCode::SERVICE_UNAVAILABLE,
            code: "STOPPING",
            detail: "the broker is stopping".to_string(),
            fix: None,
        };
        let (answer, receiver) = oneshot::channel();
        let command = Command::Validate { topic: topic.to_string(), configs, answer };
        self.commands.send(command).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }

    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Stop { done }).await.is_ok() {
            // An error means that the thread has already ended.
            let _ = stopped.await;
        }
    }

    pub(crate) fn publish(&self, topic: &str, view: View) {
        self.views.write().expect("no panic under this lock").insert(topic.to_string(), view);
    }

    pub(crate) fn forget(&self, topic: &str) {
        self.views.write().expect("no panic under this lock").remove(topic);
    }

    fn view(&self, topic: &str) -> Option<View> {
        self.views.read().expect("no panic under this lock").get(topic).cloned()
    }

    pub fn status(&self, topic: &str) -> Option<Value> {
        self.view(topic).map(|v| v.status)
    }

    pub fn statuses(&self) -> Vec<(String, Value)> {
        let views = self.views.read().expect("no panic under this lock");
        views.iter().map(|(topic, view)| (topic.clone(), view.status.clone())).collect()
    }

    pub fn all_settled(&self) -> Vec<(String, Vec<(i32, i64)>)> {
        let views = self.views.read().expect("no panic under this lock");
        views.iter().map(|(topic, view)| (topic.clone(), view.settled.clone())).collect()
    }

    /// (topic, settled offsets) when `group` is the group of an export.
    pub fn settled_offsets(&self, group: &str) -> Option<(String, Vec<(i32, i64)>)> {
        let topic = group.strip_prefix(GROUP_PREFIX)?;
        self.view(topic).map(|v| (topic.to_string(), v.settled))
    }

    pub fn listed_groups(&self) -> Vec<ListedGroup> {
        let views = self.views.read().expect("no panic under this lock");
        views
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

    pub fn described_group(&self, group: &str) -> Option<DescribedGroup> {
        let topic = group.strip_prefix(GROUP_PREFIX)?;
        let view = self.view(topic)?;
        let state = group_state(&view);
        let mut described = DescribedGroup::default()
            .with_group_id(group_id(topic))
            .with_group_state(StrBytes::from_static_str(state))
            .with_protocol_type(StrBytes::from_static_str("consumer"))
            .with_authorized_operations(i32::MIN);
        if state == "Stable" {
            let partitions: Vec<i32> = view.settled.iter().map(|(p, _)| *p).collect();
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

/// The export's topic configurations, as the table of all topic configurations wants them.
pub fn topic_configs() -> &'static [ExtraConfig] {
    static TABLE: LazyLock<Vec<ExtraConfig>> = LazyLock::new(|| {
        flumen_sink::config::CONFIG_KEYS
            .iter()
            .map(|key| ExtraConfig {
                name: key.name,
                default: key.default,
                kind: match key.kind {
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

/// A running export is a group with a member; one that does not move has none, so that tools treat it
/// as they treat a stopped consumer.
fn group_state(view: &View) -> &'static str {
    match view.status["state"].as_str() {
        Some("paused" | "failed") => "Empty",
        _ => "Stable",
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
