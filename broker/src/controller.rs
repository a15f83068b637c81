//! The cluster metadata on this node. Lives on shard 0 beside the metadata group (group id 0).
//!
//! A change is planned on the node that leads the group, against its image, appended to the metadata log as one record batch
//! (one record per command), and applied when committed, here as on every other node (`apply`): the image is published to all
//! threads and the shards create or delete what it names. Answers go out after that, so that a topic that was
//! reported created can be written to.
//!
//! Invariants
//! - Changes are planned and committed one at a time (`one_at_a_time`), by a leader whose image has everything that the log
//!   has, so a plan never acts on an image that another plan has outdated.
//! - A batch of commands is one entry of Raft: it applies as a whole on every node, or on none.
//! - What a leader appended and did not see committed has an unknown outcome. It is neither repeated nor taken back.
//! - A snapshot and the metadata log from where it ends give the image; nothing else feeds it. The log is cut only
//!   below a snapshot that is not the newest, so a damaged newest one loses nothing.

mod apply;
mod held;
mod mend;
mod partitions;
mod upkeep;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use flumen_metadata::{Applied, BrokerConfig, Command, MetadataImage, TopicConfig, encode_snapshot_file};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record::BatchBuilder;
use flumen_storage::{RecoveredGroup, failpoint};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::cluster::change::{Done, Intent};
use crate::cluster::identity::ClusterId;
use crate::metadata_snapshots::{MetadataSnapshots, SnapshotError};
use crate::node::{Node, now_ms};
use crate::partition::{Completion, Origin, Partition, PartitionSpec};
use crate::shard::Shard;
use crate::topic_admin::TopicError;

/// The metadata group's own log, never listed as a topic.
pub const METADATA_GROUP: u64 = 0;
pub const METADATA_TOPIC: &str = "__cluster_metadata";

/// A snapshot is written after this many commands: replaying them takes milliseconds, and a snapshot of a large cluster
/// (some 100 bytes per partition) is worth as many.
const SNAPSHOT_INTERVAL_COMMANDS: i64 = 1000;
/// How often a leader that waits for its log to be applied looks whether it still leads.
const LEADERSHIP_LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("metadata change refused: {0}")]
    Apply(String),
    #[error("the metadata log refused the change: {0}")]
    Append(ErrorCode),
    #[error("this node does not lead the metadata")]
    NotController,
    #[error(
        "the outcome of a metadata change is unknown: the broker stopped, or ceased to lead the metadata"
    )]
    Unknown,
}

impl ControlError {
    pub fn code(&self) -> ErrorCode {
        match self {
            ControlError::Apply(_) => ErrorCode::INVALID_REQUEST,
            ControlError::Append(ErrorCode::NOT_LEADER_OR_FOLLOWER) | ControlError::NotController => {
                ErrorCode::NOT_CONTROLLER
            }
            ControlError::Append(code) => *code,
            ControlError::Unknown => ErrorCode::REQUEST_TIMED_OUT,
        }
    }
}

pub struct Controller {
    shard: Rc<Shard>,
    /// Another one after it was damaged (`mend`).
    log: RefCell<Rc<Partition>>,
    image: RefCell<MetadataImage>,
    /// Where the other nodes were when the newest snapshot was written, for as long as there is no image.
    lately_at: BTreeMap<i32, String>,
    /// The image holds everything below this offset. -1: nothing, and a snapshot has to come from another node first.
    applied: Cell<i64>,
    applied_more: Notify,
    /// Batches by base offset that a change of this node waits for, and what they changed, once applied.
    awaited: RefCell<BTreeMap<i64, Option<Vec<Applied>>>>,
    one_at_a_time: tokio::sync::Mutex<()>,
    /// Held while partitions are created and deleted.
    hands_on: tokio::sync::Mutex<()>,
    recovered: RecoveredGroups,
    /// Groups that have a log here, or had one, as `held` has written down; of a broker in a cluster.
    held: RefCell<Arc<BTreeSet<u64>>>,
    noting_held: tokio::sync::Mutex<()>,
    snapshots: MetadataSnapshots,
    /// Where the newest snapshot ends.
    snapshot_end: Cell<i64>,
    snapshot_under_way: Cell<bool>,
}

/// Groups that recovery found, taken out by the shards as the metadata names them.
pub type RecoveredGroups = Arc<Mutex<HashMap<u64, RecoveredGroup>>>;

fn spec_of_metadata(node: &Node) -> PartitionSpec {
    let mut config = TopicConfig::metadata_log();
    if failpoint::small() {
        config.segment_bytes = 8 << 10;
    }
    PartitionSpec {
        topic: METADATA_TOPIC.into(),
        index: 0,
        group_id: METADATA_GROUP,
        config: config.into(),
        replicas: match &node.cluster {
            None => vec![node.config.node_id],
            Some(cluster) => cluster.identity.founders.iter().map(|f| f.node_id).collect(),
        },
        exported: false,
    }
}

impl Controller {
    /// Opens the metadata group, replays what is known to be committed, and opens the partitions that it names. One that
    /// is damaged is replaced first by what the others have (`mend`), or it fails: without metadata nothing can be served, and
    /// guessing would lose topics.
    pub async fn start(shard: &Rc<Shard>, recovered: &RecoveredGroups) -> Result<(), String> {
        let node = &shard.node;
        let spec = spec_of_metadata(node);
        let found = recovered.lock().expect("no panic under this lock").remove(&METADATA_GROUP);
        let fresh = found.is_none();
        let log = match found {
            Some(group) => shard.attach(spec, group),
            None => shard.create(spec).map_err(|e| format!("cannot create the metadata log: {e}"))?,
        };
        let snapshots = MetadataSnapshots::open(&node.data_dir).map_err(|e| e.to_string())?;
        let held = match &node.cluster {
            Some(_) => {
                held::load(&node.data_dir).map_err(|e| format!("what logs were here cannot be read: {e}"))?
            }
            None => BTreeSet::new(),
        };
        let empty = (**node.image.load()).clone();
        let newest = snapshots.newest(&empty.node).map_err(|e| e.to_string())?;
        let lately_at = match (&node.cluster, &newest) {
            (Some(cluster), Some((_, image))) => cluster.addresses(image),
            _ => BTreeMap::new(),
        };
        let (start, end) = (log.log_start_offset(), log.log_end_offset());
        let (applied, image) = match newest {
            _ if log.damage().is_some() || snapshots.is_anew().map_err(|e| e.to_string())? => {
                (-1, empty.clone())
            }
            Some((offset, image)) if (start..=end).contains(&offset) => {
                (offset, image.with_static_configs(&node.config))
            }
            None if start == 0 => (0, empty.clone()),
            // The others have what this node lacks: its log began anew, and the snapshot did not come any more.
            _ if node.cluster.is_some() => (-1, empty.clone()),
            Some((offset, _)) => {
                return Err(format!(
                    "the newest metadata snapshot ends at {offset}, but the metadata log holds {start} to {end}: one of them is not of this broker, or lost its end"
                ));
            }
            None => {
                return Err(format!(
                    "the metadata log begins at {start} and no snapshot reaches it; restore {} from a copy",
                    node.data_dir.join("metadata").display()
                ));
            }
        };
        let controller = Rc::new(Controller {
            shard: shard.clone(),
            log: RefCell::new(log),
            image: RefCell::new(image),
            lately_at,
            applied: Cell::new(applied),
            applied_more: Notify::new(),
            awaited: RefCell::default(),
            one_at_a_time: tokio::sync::Mutex::default(),
            hands_on: tokio::sync::Mutex::default(),
            recovered: recovered.clone(),
            held: RefCell::new(Arc::new(held)),
            noting_held: tokio::sync::Mutex::default(),
            snapshots,
            snapshot_end: Cell::new(applied.max(0)),
            snapshot_under_way: Cell::new(false),
        });
        if applied >= 0
            && let Err(error) = controller.replay().await
            && controller.log().damage().is_none()
        {
            return Err(error);
        }
        if controller.log().damage().is_some() {
            // Nothing that it says is gone by, and nothing is opened before it is replaced.
            controller.mend_log().await?;
            controller.image.replace(empty);
            controller.applied.set(-1);
            controller.snapshot_end.set(0);
        }
        let replayed = (controller.applied.get() - applied).max(0);
        tracing::info!(snapshot_end = applied, replayed, "metadata loaded");
        shard.set_controller(controller.clone());
        controller.publish();
        controller.open_all().await?;
        tokio::task::spawn_local(controller.clone().follow());
        if node.cluster.is_some() {
            tokio::task::spawn_local(controller.clone().keep_up());
            tokio::task::spawn_local(controller.clone().keep_log_whole());
            tokio::task::spawn_local(controller.clone().keep_held_noted());
        } else if fresh {
            let cluster_id = ClusterId::random().to_string();
            controller
                .commit(vec![Command::ClusterCreated { cluster_id }])
                .await
                .map_err(|e| e.to_string())?;
        }
        controller.maybe_snapshot();
        Ok(())
    }

    /// Leads the metadata, and knows everything that was ever committed to it once it has applied what its log has.
    pub fn leads(&self) -> bool {
        let log = self.log();
        log.damage().is_none() && log.serves()
    }

    fn log(&self) -> Rc<Partition> {
        self.log.borrow().clone()
    }

    /// Returns when the image has everything below `offset`, or at the deadline.
    pub async fn wait_for(&self, offset: i64, deadline: Instant) {
        let _ = tokio::time::timeout_at(deadline, self.wait_until_applied(offset)).await;
    }

    pub async fn wait_until_applied(&self, offset: i64) {
        loop {
            let more = self.applied_more.notified();
            tokio::pin!(more);
            more.as_mut().enable();
            if self.applied.get() >= offset {
                return;
            }
            more.await;
        }
    }

    /// Waits until the image has all that this leader's log has.
    async fn catch_up_with_log(&self) -> Result<(), ControlError> {
        while self.leads() {
            let end = self.log().log_end_offset();
            if self.applied.get() >= end
                || timeout(LEADERSHIP_LOOK, self.wait_until_applied(end)).await.is_ok()
            {
                return Ok(());
            }
        }
        Err(ControlError::NotController)
    }

    /// Plans a change against the current image and commits what it needs. `plan` returns its answer
    /// and the commands; no command, no write. The answer counts for nothing when the outcome is an error.
    pub async fn change<R>(
        self: &Rc<Self>,
        plan: impl FnOnce(&MetadataImage, &BrokerConfig) -> (R, Vec<Command>),
    ) -> (R, Result<Vec<Applied>, ControlError>) {
        let _turn = self.one_at_a_time.lock().await;
        let ready = self.catch_up_with_log().await;
        let (answer, commands) = plan(&self.image.borrow(), &self.shard.node.config);
        let outcome = match ready {
            Ok(()) => self.commit_locked(commands).await,
            Err(error) => Err(error),
        };
        (answer, outcome)
    }

    pub async fn commit(self: &Rc<Self>, commands: Vec<Command>) -> Result<Vec<Applied>, ControlError> {
        self.change(|_, _| ((), commands)).await.1
    }

    /// Plans and commits what an intent asks for.
    pub async fn carry_out(self: &Rc<Self>, intent: &Intent) -> Result<Done, TopicError> {
        if let Intent::RemoveNode { id } = intent
            && *id == self.shard.node.config.node_id
            && self.shard.node.cluster.is_some()
        {
            // Asked for again until another leads, which a node that is to leave sees to.
            let message =
                format!("node {id} leads the metadata; it hands over after flumen cluster decommission {id}");
            return Err(TopicError { code: ErrorCode::NOT_CONTROLLER, message });
        }
        let node = &self.shard.node;
        let plan = |image: &MetadataImage, config: &BrokerConfig| {
            node.with_health(|health| intent.plan(image, config, health, Uuid::new_v4()))
        };
        let (refused, outcome) = self
            .change(|image, config| match plan(image, config) {
                Ok(commands) => (None, commands),
                Err(refused) => (Some(refused), Vec::new()),
            })
            .await;
        let applied = outcome.map_err(TopicError::from)?;
        if let Some(refused) = refused {
            return Err(refused.into());
        }
        let producer_id_start = applied.iter().find_map(|a| a.producer_id_start);
        Ok(Done { producer_id_start, offset: self.applied.get() })
    }

    async fn commit_locked(self: &Rc<Self>, commands: Vec<Command>) -> Result<Vec<Applied>, ControlError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        // Applied to a copy first: a command that does not apply must never reach the log.
        let mut next = self.image.borrow().clone();
        for command in &commands {
            next.apply(command).map_err(|e| ControlError::Apply(e.to_string()))?;
        }
        let now = now_ms();
        let mut builder = BatchBuilder::new();
        for command in &commands {
            builder.append(now, None, Some(&command.encode()), &[]);
        }
        let (done, committed) = oneshot::channel();
        let completion = Completion::Callback(Box::new(move || {
            let _ = done.send(());
        }));
        let appended = self
            .log()
            .append(builder.build(0), Origin::Broker, now, Some(completion))
            .map_err(|(error, _)| ControlError::Append(error.code()))?;
        self.awaited.borrow_mut().insert(appended.base_offset, None);
        if committed.await.is_ok() {
            self.wait_until_applied(appended.last_offset + 1).await;
        }
        let applied = self.awaited.borrow_mut().remove(&appended.base_offset);
        applied.flatten().ok_or(ControlError::Unknown)
    }

    /// Starts a snapshot when enough has been applied since the last one.
    fn maybe_snapshot(self: &Rc<Self>) {
        let end = self.applied.get();
        let interval = if failpoint::small() { 20 } else { SNAPSHOT_INTERVAL_COMMANDS };
        if end - self.snapshot_end.get() < interval || self.snapshot_under_way.replace(true) {
            return;
        }
        let (snapshots, image) = (self.snapshots.clone(), self.image.borrow().clone());
        let controller = self.clone();
        tokio::task::spawn_local(async move {
            // Files are written elsewhere: requests of this shard go on meanwhile.
            let written = tokio::task::spawn_blocking(move || snapshots.write(end, &image)).await;
            match written {
                Ok(Ok(not_needed_below)) => {
                    controller.snapshot_end.set(end);
                    if let Some(offset) = not_needed_below
                        && let Err(error) = controller.log().cut_below(offset).await
                    {
                        tracing::warn!(%error, "the metadata log could not be cut; it stays longer than it needs to be");
                    }
                }
                Ok(Err(error @ SnapshotError::Sync { .. })) => controller.shard.poison(&error.to_string()),
                // The log still has everything; the next commit tries again.
                Ok(Err(error)) => tracing::warn!(%error, "could not write a metadata snapshot"),
                Err(error) => tracing::warn!(%error, "writing a metadata snapshot failed"),
            }
            controller.snapshot_under_way.set(false);
        });
    }

    /// What another node needs that begins behind where the log does.
    pub fn snapshot_file(&self) -> Bytes {
        encode_snapshot_file(self.applied.get(), &self.image.borrow().snapshot()).into()
    }

    /// The same from whoever leads: everything that was committed before the question is in it.
    pub async fn current_snapshot_file(&self) -> Result<Bytes, ControlError> {
        if !self.leads() {
            return Err(ControlError::NotController);
        }
        self.log().confirm_leads().await.map_err(|_| ControlError::NotController)?;
        self.catch_up_with_log().await?;
        Ok(self.snapshot_file())
    }

    fn publish(&self) {
        let mut image = self.image.borrow().clone();
        image.controller_epoch = self.log().leader_epoch();
        self.shard.node.image.store(Arc::new(image));
    }
}
