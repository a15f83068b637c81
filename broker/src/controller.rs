//! The one writer of cluster metadata. Lives on shard 0 beside the metadata group (group id 0).
//!
//! A change is planned against the current image, appended to the metadata log as one record batch
//! (one record per command), and applied when committed; then the image is published to all threads and
//! the shards create or delete what it names. Answers go out after that, so that a topic that was
//! reported created can be written to.
//!
//! Invariants
//! - Changes are planned, committed and applied one at a time (`one_at_a_time`), so a plan never acts
//!   on an image that another plan has outdated.
//! - A snapshot and the metadata log from where it ends give the image; nothing else feeds it. The log is cut only
//!   below a snapshot that is not the newest, so a damaged newest one loses nothing.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use flumen_metadata::{Applied, BrokerConfig, Command, MetadataImage, TopicConfig};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record::{self, BatchBuilder};
use flumen_protocol::record_batch;
use flumen_storage::{RecoveredGroup, failpoint};
use tokio::sync::oneshot;

use crate::metadata_snapshots::{MetadataSnapshots, SnapshotError};
use crate::node::now_ms;
use crate::partition::{Completion, Origin, Partition, PartitionSpec};
use crate::shard::Shard;

/// The metadata group's own log, never listed as a topic.
pub const METADATA_GROUP: u64 = 0;
pub const METADATA_TOPIC: &str = "__cluster_metadata";
/// One read while the metadata log is replayed at start.
const REPLAY_READ_BYTES: usize = 1 << 20;
/// A metadata record is at most this long once decompressed; our own batches are not compressed.
const METADATA_BATCH_BYTES_MAX: usize = 16 << 20;

/// A snapshot is written after this many commands: replaying them takes milliseconds, and a snapshot of a large cluster
/// (some 100 bytes per partition) is worth as many.
const SNAPSHOT_INTERVAL_COMMANDS: i64 = 1000;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("metadata change refused: {0}")]
    Apply(String),
    #[error("the metadata log refused the change: {0}")]
    Append(ErrorCode),
    #[error("the outcome of a metadata change is unknown: the broker is stopping")]
    Unknown,
}

impl ControlError {
    pub fn code(&self) -> ErrorCode {
        match self {
            ControlError::Apply(_) => ErrorCode::INVALID_REQUEST,
            ControlError::Append(code) => *code,
            ControlError::Unknown => ErrorCode::REQUEST_TIMED_OUT,
        }
    }
}

pub struct Controller {
    shard: Rc<Shard>,
    log: Rc<Partition>,
    image: RefCell<MetadataImage>,
    one_at_a_time: tokio::sync::Mutex<()>,
    snapshots: MetadataSnapshots,
    /// Where the newest snapshot ends.
    snapshot_end: Cell<i64>,
    snapshot_under_way: Cell<bool>,
}

/// Groups that recovery found, taken out by the shards as the metadata names them.
pub type RecoveredGroups = Arc<Mutex<HashMap<u64, RecoveredGroup>>>;

impl Controller {
    /// Opens the metadata group and replays it. Fails when it is damaged: without metadata nothing
    /// can be served, and guessing would lose topics.
    pub async fn start(shard: &Rc<Shard>, recovered: &RecoveredGroups) -> Result<(), String> {
        let spec = PartitionSpec {
            topic: METADATA_TOPIC.into(),
            index: 0,
            group_id: METADATA_GROUP,
            config: TopicConfig::metadata_log(),
            replicas: vec![shard.node.config.node_id],
            exported: false,
        };
        let found = recovered.lock().expect("no panic under this lock").remove(&METADATA_GROUP);
        let fresh = found.is_none();
        let log = match found {
            Some(group) => shard.attach(spec, group),
            None => shard.create(spec).map_err(|e| format!("cannot create the metadata log: {e}"))?,
        };
        if let Some(reason) = log.damage() {
            return Err(format!(
                "the metadata log is damaged ({reason}); restore {METADATA_TOPIC}-0.g0 from a copy before starting"
            ));
        }
        let snapshots = MetadataSnapshots::open(&shard.node.data_dir).map_err(|e| e.to_string())?;
        let empty = (**shard.node.image.load()).clone();
        let newest = snapshots.newest(&empty.node).map_err(|e| e.to_string())?;
        let (start, end) = (log.log_start_offset(), log.high_watermark());
        let (snapshot_end, image) = match newest {
            Some((offset, image)) if (start..=end).contains(&offset) => {
                (offset, image.with_static_configs(&shard.node.config))
            }
            Some((offset, _)) => {
                return Err(format!(
                    "the newest metadata snapshot ends at {offset}, but the metadata log holds {start} to {end}: one of them is not of this broker, or lost its end"
                ));
            }
            None if start == 0 => (0, empty),
            None => {
                return Err(format!(
                    "the metadata log begins at {start} and no snapshot reaches it; restore {} from a copy",
                    shard.node.data_dir.join("metadata").display()
                ));
            }
        };
        let controller = Rc::new(Controller {
            shard: shard.clone(),
            log,
            image: RefCell::new(image),
            one_at_a_time: tokio::sync::Mutex::default(),
            snapshots,
            snapshot_end: Cell::new(snapshot_end),
            snapshot_under_way: Cell::new(false),
        });
        controller.replay(snapshot_end).await?;
        tracing::info!(snapshot_end, replayed = end - snapshot_end, "metadata loaded");
        shard.set_controller(controller.clone());
        if fresh {
            let cluster_id = new_cluster_id();
            controller
                .commit(vec![Command::ClusterCreated { cluster_id }])
                .await
                .map_err(|e| e.to_string())?;
        }
        controller.publish();
        controller.maybe_snapshot();
        Ok(())
    }

    /// Applies the log from `from` on, which is where a snapshot ended: between two batches.
    async fn replay(&self, from: i64) -> Result<(), String> {
        let mut offset = from;
        let end = self.log.high_watermark();
        while offset < end {
            let slice = self.log.fetch(offset, REPLAY_READ_BYTES).await.map_err(|e| e.to_string())?;
            let before = offset;
            for bytes in &slice.records {
                for batch in record_batch::batches(bytes) {
                    let (header, batch) = batch.map_err(|e| e.to_string())?;
                    offset = header.next_offset();
                    let mut scratch = Vec::new();
                    let records = record::decode_records(batch, &mut scratch, METADATA_BATCH_BYTES_MAX)
                        .map_err(|e| e.to_string())?;
                    for record in records {
                        let record = record.map_err(|e| e.to_string())?;
                        let command =
                            Command::decode(record.value.unwrap_or(&[])).map_err(|e| e.to_string())?;
                        self.image
                            .borrow_mut()
                            .apply(&command)
                            .map_err(|e| format!("metadata record {} does not apply: {e}", record.offset))?;
                    }
                }
            }
            if offset == before {
                return Err(format!("the metadata log ends at {offset} although it should reach {end}"));
            }
        }
        Ok(())
    }

    /// Plans a change against the current image and commits what it needs. `plan` returns its answer
    /// and the commands; no command, no write.
    pub async fn change<R>(
        self: &Rc<Self>,
        plan: impl FnOnce(&MetadataImage, &BrokerConfig) -> (R, Vec<Command>),
    ) -> (R, Result<Vec<Applied>, ControlError>) {
        let _turn = self.one_at_a_time.lock().await;
        let (answer, commands) = plan(&self.image.borrow(), &self.shard.node.config);
        let outcome = self.commit_locked(commands).await;
        (answer, outcome)
    }

    pub async fn commit(self: &Rc<Self>, commands: Vec<Command>) -> Result<Vec<Applied>, ControlError> {
        let _turn = self.one_at_a_time.lock().await;
        self.commit_locked(commands).await
    }

    async fn commit_locked(self: &Rc<Self>, commands: Vec<Command>) -> Result<Vec<Applied>, ControlError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        // Applied to a copy first: a command that does not apply must never reach the log.
        let mut next = self.image.borrow().clone();
        let mut applied = Vec::with_capacity(commands.len());
        for command in &commands {
            applied.push(next.apply(command).map_err(|e| ControlError::Apply(e.to_string()))?);
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
        self.log
            .append(builder.build(0), Origin::Broker, now, Some(completion))
            .map_err(|(error, _)| ControlError::Append(error.code()))?;
        committed.await.map_err(|_| ControlError::Unknown)?;
        *self.image.borrow_mut() = next;
        self.publish();
        self.maybe_snapshot();
        for change in &applied {
            self.carry_out(change).await;
        }
        self.shard.node.exports.metadata_changed();
        Ok(applied)
    }

    /// Starts a snapshot when enough has been committed since the last one. Called where the image holds everything
    /// below the high watermark: at start, and while a change has its turn.
    fn maybe_snapshot(self: &Rc<Self>) {
        let end = self.log.high_watermark();
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
                        && let Err(error) = controller.log.delete_records(offset).await
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

    fn publish(&self) {
        self.shard.node.image.store(Arc::new(self.image.borrow().clone()));
    }

    /// Makes the shards match the new image.
    async fn carry_out(&self, change: &Applied) {
        let node = &self.shard.node;
        for created in &change.created {
            let Some(spec) = self.spec_of(&created.topic, created.partition) else { continue };
            let made = node.shards[node.shard_of(spec.group_id)]
                .run(move |s| async move { s.create(spec).map(|_| ()).map_err(|e| e.to_string()) })
                .await;
            if let Ok(Err(error)) = made {
                // The metadata says that the partition exists; the next start creates it.
                tracing::error!(topic = %created.topic, partition = created.partition, %error, "cannot create the partition's log");
            }
        }
        for deleted in &change.deleted {
            let group_id = deleted.group_id;
            let _ = node.shards[node.shard_of(group_id)]
                .run(move |s| async move { s.delete(group_id).await })
                .await;
        }
        let mut deleted: Vec<&str> = change.deleted.iter().map(|d| d.topic.as_str()).collect();
        deleted.dedup();
        for topic in deleted {
            for shard in &node.shards {
                let topic = topic.to_string();
                let _ = shard.run(move |s| async move { s.coordinators.remove_topic(&topic).await }).await;
            }
        }
        for name in &change.topics_reconfigured {
            let found = self.image.borrow().topics.get(name).cloned();
            if let Some(topic) = found {
                for p in &topic.partitions {
                    let (group_id, config, exported) =
                        (p.group_id, topic.effective.clone(), is_exported(&topic));
                    let _ = node.shards[node.shard_of(group_id)]
                        .run(move |s| async move {
                            if let Some(partition) = s.partition(group_id) {
                                partition.set_config(config, exported);
                            }
                        })
                        .await;
                }
            }
        }
    }

    fn spec_of(&self, topic: &str, index: i32) -> Option<PartitionSpec> {
        let image = self.image.borrow();
        let found = image.topics.get(topic)?;
        let info = found.partitions.get(usize::try_from(index).ok()?)?;
        Some(PartitionSpec {
            topic: topic.into(),
            index,
            group_id: info.group_id,
            config: found.effective.clone(),
            replicas: vec![self.shard.node.config.node_id],
            exported: is_exported(found),
        })
    }
}

/// Whether retention has to wait for ClickHouse.
fn is_exported(topic: &flumen_metadata::Topic) -> bool {
    topic.configs.get("flumen.clickhouse.enable").is_some_and(|v| v == "true")
}

/// Opens every partition of the image that lives on this shard. Returns how many.
pub fn open_partitions(shard: &Rc<Shard>, recovered: &RecoveredGroups) -> Result<usize, String> {
    let image = shard.node.image.load_full();
    let mut opened = 0;
    for topic in image.topics.values() {
        let name: Arc<str> = topic.name.as_str().into();
        for (index, info) in topic.partitions.iter().enumerate() {
            if shard.node.shard_of(info.group_id) != shard.id {
                continue;
            }
            let spec = PartitionSpec {
                topic: name.clone(),
                index: i32::try_from(index).unwrap_or(i32::MAX),
                group_id: info.group_id,
                config: topic.effective.clone(),
                replicas: vec![shard.node.config.node_id],
                exported: is_exported(topic),
            };
            let found = recovered.lock().expect("no panic under this lock").remove(&info.group_id);
            match found {
                Some(group) => drop(shard.attach(spec, group)),
                // Named by the metadata, absent on disk: the crash came between the two.
                None => drop(shard.create(spec).map_err(|e| e.to_string())?),
            }
            opened += 1;
        }
    }
    Ok(opened)
}

/// 16 random bytes as Kafka prints them (URL-safe base64 without padding).
fn new_cluster_id() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bits = uuid::Uuid::new_v4().as_u128();
    // 22 digits of 6 bits; the last one carries the remaining 2 bits.
    (0..22)
        .map(|i| {
            let shift = 122 - 6 * i;
            let digit = if shift >= 0 { bits >> shift } else { bits << -shift };
            char::from(ALPHABET[(digit & 63) as usize])
        })
        .collect()
}
