//! Changes of the metadata, by intent: carried out here when this node leads the metadata, passed to whoever does otherwise.
//!
//! An intent is planned where it is carried out, against metadata that has everything committed; so nothing is decided by
//! what a follower knows. Runs on the controller's shard.
//!
//! A change whose leader went away before it answered has an unknown outcome and is not tried again here: it may have
//! happened. One that was refused because the node asked did not lead is tried again until `CHANGE_TIME_MAX`.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use flumen_metadata::admin::{self, Refused, TopicToCreate};
use flumen_metadata::balance;
use flumen_metadata::placement::NodeHealth;
use flumen_metadata::{BrokerConfig, Command, MetadataImage, NodeRecord, NodeState};
use flumen_protocol::error_code::ErrorCode;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use super::requests::{self, Answered, AskError};
use crate::controller::METADATA_GROUP;
use crate::node::Node;
use crate::shard::Shard;
use crate::topic_admin::{TopicError, plan_deletion};

/// Longer than it takes to elect another leader, shorter than clients wait.
const CHANGE_TIME_MAX: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// A node that knows no leader asks one that may; that one asks the leader.
const HOPS_MAX: u8 = 2;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Intent {
    CreateTopic {
        name: String,
        partitions: i32,
        replication_factor: i16,
        configs: BTreeMap<String, String>,
    },
    AutoCreate {
        name: String,
    },
    CreateOffsetsTopic,
    DeleteTopic {
        topic: String,
    },
    CreatePartitions {
        topic: String,
        total: i32,
    },
    AlterTopic {
        topic: String,
        changes: BTreeMap<String, Option<String>>,
    },
    /// Of all brokers, or of one.
    AlterBrokers {
        node_id: Option<i32>,
        changes: BTreeMap<String, Option<String>>,
    },
    ProducerIds {
        count: i64,
    },
    Register(Registration),
    /// A node keeps its replicas and leads nothing, or does everything again.
    Maintenance {
        id: i32,
        on: bool,
    },
    /// A node gives its replicas to others.
    Decommission {
        id: i32,
    },
    RemoveNode {
        id: i32,
    },
    /// The next partitions leave the nodes that leave.
    Evacuate,
    /// The leader of a partition sees that its members are those of the target.
    ReplicasReached {
        topic_id: String,
        partition: i32,
        replicas: Vec<i32>,
    },
}

/// A node that starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Registration {
    pub id: i32,
    pub host: String,
    pub port: u16,
    pub rack: Option<String>,
    pub rpc_address: String,
    pub boot_id: u64,
    pub directory_id: String,
    pub version_max: u16,
    /// The cluster has known this directory before.
    pub registered: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    pub producer_id_start: Option<i64>,
    /// Metadata below this offset has the change in it.
    pub offset: i64,
}

impl Intent {
    fn encode(&self, hops: u8) -> Result<Bytes, TopicError> {
        let json =
            serde_json::to_vec(self).map_err(|e| failed(ErrorCode::UNKNOWN_SERVER_ERROR, e.to_string()))?;
        let mut body = BytesMut::with_capacity(1 + json.len());
        body.put_u8(hops);
        body.put_slice(&json);
        Ok(body.freeze())
    }

    fn decode(body: &[u8]) -> Option<(u8, Intent)> {
        let (hops, json) = body.split_first()?;
        Some(((*hops).min(HOPS_MAX), serde_json::from_slice(json).ok()?))
    }

    /// What has to be written for it.
    pub fn plan(
        &self,
        image: &MetadataImage,
        config: &BrokerConfig,
        health: NodeHealth<'_>,
        id: Uuid,
    ) -> Result<Vec<Command>, Refused> {
        match self {
            Intent::CreateTopic { name, partitions, replication_factor, configs } => {
                let asked = TopicToCreate {
                    name,
                    partitions: *partitions,
                    replication_factor: *replication_factor,
                    configs,
                };
                admin::plan_create_topic(image, config, health, asked, id).map(|command| vec![command])
            }
            Intent::AutoCreate { name } => admin::plan_auto_create(image, config, health, name, id),
            Intent::CreateOffsetsTopic => Ok(admin::plan_offsets_topic(image, config, health, id)),
            Intent::DeleteTopic { topic } => plan_deletion(image, config, topic).map(|command| vec![command]),
            Intent::CreatePartitions { topic, total } => {
                admin::plan_partitions(image, health, topic, *total).map(|command| vec![command])
            }
            Intent::AlterTopic { topic, changes } => admin::plan_topic_configs(image, config, topic, changes),
            Intent::AlterBrokers { node_id, changes } => {
                admin::plan_broker_configs(image, config, *node_id, changes)
            }
            Intent::ProducerIds { count } => Ok(vec![Command::AllocateProducerIds { count: *count }]),
            Intent::Register(registration) => registration.plan(image),
            Intent::Maintenance { id, on } => {
                balance::plan_maintenance(image, *id, *on).map(|command| command.into_iter().collect())
            }
            Intent::Decommission { id } => {
                balance::plan_decommission(image, *id).map(|command| command.into_iter().collect())
            }
            Intent::Evacuate => Ok(balance::evacuations(image, health)),
            Intent::ReplicasReached { topic_id, partition, replicas } => {
                let topic_id = topic_id.parse().map_err(|_| {
                    Refused::new(ErrorCode::INVALID_REQUEST, format!("'{topic_id}' is no topic id"))
                })?;
                // Two leaders may have seen it, one after the other.
                let moving = image.topic_by_id(&topic_id).is_some_and(|topic| {
                    topic.partition(*partition).is_some_and(|info| info.target.as_ref() == Some(replicas))
                });
                let reached =
                    Command::ReplicasReached { topic_id, partition: *partition, replicas: replicas.clone() };
                Ok(moving.then_some(reached).into_iter().collect())
            }
            Intent::RemoveNode { id } => Ok(vec![Command::RemoveNode { id: *id }]),
        }
    }
}

impl Intent {
    /// Done twice it is as if it had been done once: it is asked for again when nobody can tell whether it was done, since the
    /// leader of the metadata went away.
    fn may_be_repeated(&self) -> bool {
        match self {
            Intent::Register(_)
            | Intent::Maintenance { .. }
            | Intent::Decommission { .. }
            | Intent::Evacuate
            | Intent::ReplicasReached { .. }
            | Intent::AlterTopic { .. }
            | Intent::AlterBrokers { .. }
            // Some ids are lost.
            | Intent::ProducerIds { .. } => true,
            Intent::CreateTopic { .. }
            | Intent::AutoCreate { .. }
            | Intent::CreateOffsetsTopic
            | Intent::DeleteTopic { .. }
            | Intent::CreatePartitions { .. }
            | Intent::RemoveNode { .. } => false,
        }
    }
}

impl Registration {
    fn plan(&self, image: &MetadataImage) -> Result<Vec<Command>, Refused> {
        let id = self.id;
        let refused =
            |sentence: String| Err(Refused::new(ErrorCode::DUPLICATE_BROKER_REGISTRATION, sentence));
        let Ok(directory_id) = self.directory_id.parse() else {
            return refused(format!("'{}' is no directory id", self.directory_id));
        };
        let known = image.nodes.get(&id);
        match known {
            None if self.registered => {
                return refused(format!(
                    "node {id} was removed from the cluster; give it an empty data directory and a --node-id that was never used"
                ));
            }
            Some(known) if known.directory_id != directory_id => {
                return refused(format!(
                    "node {id} is registered with another data directory, at {}; restore that, or, if it is lost, start this one \
                     with an empty directory and a --node-id that was never used and then run `flumen cluster decommission {id}`",
                    known.rpc_address
                ));
            }
            _ => {}
        }
        let record = NodeRecord {
            id,
            host: self.host.clone(),
            port: self.port,
            rack: self.rack.clone(),
            rpc_address: self.rpc_address.clone(),
            boot_id: self.boot_id,
            directory_id,
            version_max: self.version_max,
            state: known.map_or(NodeState::Active, |k| k.state),
        };
        Ok(if known == Some(&record) { Vec::new() } else { vec![Command::RegisterNode(record)] })
    }
}

fn failed(code: ErrorCode, message: impl Into<String>) -> TopicError {
    TopicError { code, message: message.into() }
}

/// Has the metadata changed, wherever that happens. What was changed is in this node's metadata when it returns.
pub async fn change(node: &Node, intent: Intent) -> Result<Done, TopicError> {
    let stopping = |_| failed(ErrorCode::NOT_CONTROLLER, "the broker is stopping");
    node.controller()
        .run(move |shard| async move { carry_out(&shard, intent, HOPS_MAX).await })
        .await
        .map_err(stopping)?
}

async fn carry_out(shard: &Rc<Shard>, intent: Intent, hops: u8) -> Result<Done, TopicError> {
    let controller = shard.controller();
    let deadline = Instant::now() + CHANGE_TIME_MAX;
    let mut turn = 0;
    loop {
        let outcome = if controller.leads() || shard.node.cluster.is_none() {
            controller.carry_out(&intent).await
        } else if hops > 0 {
            turn += 1;
            pass_on(shard, &intent, hops - 1, turn).await
        } else {
            Err(failed(ErrorCode::NOT_CONTROLLER, "no node that leads the metadata is known"))
        };
        match outcome {
            Err(error)
                if hops > 0
                    && Instant::now() < deadline
                    && (error.code == ErrorCode::NOT_CONTROLLER
                        || (error.code == ErrorCode::REQUEST_TIMED_OUT && intent.may_be_repeated())) =>
            {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            Ok(done) => {
                controller.wait_for(done.offset, deadline).await;
                return Ok(done);
            }
            other => return other,
        }
    }
}

async fn pass_on(shard: &Rc<Shard>, intent: &Intent, hops: u8, turn: usize) -> Result<Done, TopicError> {
    let not_now = |message: &str| Err(failed(ErrorCode::NOT_CONTROLLER, message));
    let connected = shard.links.connected();
    let leader = shard.node.leaders.get(METADATA_GROUP).map(|(leader, _)| leader);
    // Without a leader that is known, or one that is gone, the others are asked in turn.
    let to = match leader {
        Some(leader) if connected.contains(&leader) => leader,
        _ if connected.is_empty() => return not_now("no other broker is connected"),
        _ => connected[turn % connected.len()],
    };
    match shard.links.ask(to, requests::CHANGE, intent.encode(hops)?).await {
        Err(AskError::NotSent) => not_now("the leader of the metadata is not connected"),
        Err(AskError::Lost) => Err(failed(
            ErrorCode::REQUEST_TIMED_OUT,
            "the leader of the metadata went away before it answered; the change may have happened",
        )),
        Ok(Answered { code: 0, body }) => serde_json::from_slice(&body).map_err(|e| {
            failed(ErrorCode::UNKNOWN_SERVER_ERROR, format!("an answer that cannot be read: {e}"))
        }),
        Ok(Answered { code, body }) => Err(failed(ErrorCode(code), String::from_utf8_lossy(&body))),
    }
}

/// What another node asked for. One that the cluster does not know may only ask to be registered.
pub async fn answer(node: &Node, body: &[u8], known: bool) -> Answered {
    let outcome = match Intent::decode(body) {
        None => Err(failed(ErrorCode::INVALID_REQUEST, "a change that this version does not know")),
        Some((_, intent)) if !known && !matches!(intent, Intent::Register(_)) => {
            Err(failed(ErrorCode::CLUSTER_AUTHORIZATION_FAILED, "the node is not registered"))
        }
        Some((hops, intent)) => {
            let stopping = |_| failed(ErrorCode::NOT_CONTROLLER, "the broker is stopping");
            let run =
                node.controller().run(move |shard| async move { carry_out(&shard, intent, hops).await });
            run.await.map_err(stopping).and_then(|outcome| outcome)
        }
    };
    let outcome = outcome.and_then(|done| {
        serde_json::to_vec(&done).map_err(|e| failed(ErrorCode::UNKNOWN_SERVER_ERROR, e.to_string()))
    });
    match outcome {
        Ok(json) => Answered { code: 0, body: json.into() },
        Err(error) => Answered { code: error.code.0, body: error.message.into() },
    }
}

/// The metadata as this node has applied it, in the form of a snapshot file; or, if `current`, as nobody has more of it.
pub async fn answer_metadata(node: &Node, current: bool) -> Answered {
    let run = node.controller().run(move |shard| async move {
        let controller = shard.controller();
        match current {
            true => controller.current_snapshot_file().await,
            false => Ok(controller.snapshot_file()),
        }
    });
    match run.await {
        Ok(Ok(file)) => Answered { code: 0, body: file },
        Ok(Err(error)) => Answered { code: error.code().0, body: Bytes::new() },
        Err(_) => Answered { code: ErrorCode::BROKER_NOT_AVAILABLE.0, body: Bytes::new() },
    }
}
