//! The shell around the group coordinators: one per partition of `__consumer_offsets`, on that
//! partition's shard. Decisions are made in `flumen-groups`; this file loads, appends, answers and
//! wakes up at deadlines.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use flumen_groups::{
    Client, Coordinator, GroupRequest, GroupResponse, GroupsConfig, Now, OffsetsRecord, Output,
};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record::{self, BatchBuilder};
use flumen_protocol::record_batch;
use kafka_protocol::messages::OffsetCommitRequest;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::node::Node;
use crate::partition::{Completion, Origin, Partition};
use crate::shard::Shard;

pub const OFFSETS_TOPIC: &str = "__consumer_offsets";
/// One read while a coordinator loads.
const LOAD_READ_BYTES: usize = 4 << 20;
/// A group metadata record holds the assignments of all members; a batch of them is never larger.
const LOAD_BATCH_BYTES_MAX: usize = 64 << 20;
/// A request that finds its coordinator reading waits this long before it is told to come again: usually the rest takes
/// less, and not every admin tool comes again. Short beside the request timeouts of clients, which start at seconds.
const LOAD_WAIT: Duration = Duration::from_secs(1);
/// After a read that failed.
const LOAD_AGAIN: Duration = Duration::from_millis(500);
/// Offset expiration and the like are looked at no less often than this.
const TICK_MAX: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct Coordinators {
    by_group: RefCell<BTreeMap<u64, Rc<GroupShell>>>,
}

pub struct GroupShell {
    partition: Rc<Partition>,
    coordinator: RefCell<Coordinator>,
    answers: RefCell<BTreeMap<u64, oneshot::Sender<GroupResponse>>>,
    next_token: Cell<u64>,
    /// All records are read: from here on deletions of topics have to be told.
    replayed: Cell<bool>,
    /// Requests are answered.
    loaded: Cell<bool>,
    load_ended: Notify,
    removed: Cell<bool>,
    deadline_moved: Notify,
    /// Appends whose outcome is not known yet.
    open_appends: RefCell<BTreeSet<u64>>,
    append_finished: Notify,
    node: Arc<Node>,
    made: Instant,
}

impl Coordinators {
    /// The coordinator of an offsets partition; made, and its log read, when the partition is opened.
    pub fn of(&self, shard: &Rc<Shard>, group_id: u64) -> Result<Rc<GroupShell>, ErrorCode> {
        if let Some(shell) = self.by_group.borrow().get(&group_id) {
            return Ok(shell.clone());
        }
        let partition = shard.partition(group_id).ok_or(ErrorCode::NOT_COORDINATOR)?;
        if partition.damage().is_some() {
            return Err(ErrorCode::COORDINATOR_NOT_AVAILABLE);
        }
        if !partition.serves() {
            return Err(ErrorCode::NOT_COORDINATOR);
        }
        let shell = Rc::new(GroupShell {
            partition,
            coordinator: RefCell::new(Coordinator::new(groups_config(&shard.node.config))),
            answers: RefCell::default(),
            next_token: Cell::new(1),
            replayed: Cell::new(false),
            loaded: Cell::new(false),
            load_ended: Notify::new(),
            removed: Cell::new(false),
            deadline_moved: Notify::new(),
            open_appends: RefCell::default(),
            append_finished: Notify::new(),
            node: shard.node.clone(),
            made: Instant::now(),
        });
        self.by_group.borrow_mut().insert(group_id, shell.clone());
        tokio::task::spawn_local(shell.clone().load_and_tick());
        Ok(shell)
    }

    pub fn remove(&self, group_id: u64) {
        if let Some(shell) = self.by_group.borrow_mut().remove(&group_id) {
            shell.removed.set(true);
            shell.deadline_moved.notify_one();
            // Appends may never come to their end.
            shell.append_finished.notify_waiters();
            shell.load_ended.notify_waiters();
            shell.answers.borrow_mut().clear();
        }
    }

    /// Forgets what was committed for a topic that was just deleted; done when the log has forgotten it too. A
    /// coordinator that is not loaded finds out when it is.
    pub async fn remove_topic(&self, topic: &str) {
        for shell in self.all() {
            shell.remove_topic(topic).await;
        }
    }

    pub fn all(&self) -> Vec<Rc<GroupShell>> {
        self.by_group.borrow().values().cloned().collect()
    }
}

fn groups_config(config: &flumen_metadata::BrokerConfig) -> GroupsConfig {
    GroupsConfig {
        session_timeout_min_ms: config.group_min_session_timeout_ms,
        session_timeout_max_ms: config.group_max_session_timeout_ms,
        initial_rebalance_delay_ms: i64::from(config.group_initial_rebalance_delay_ms),
        offset_metadata_bytes_max: config.offset_metadata_max_bytes,
        group_members_max: config.group_max_size,
        offsets_retention_ms: config.offsets_retention_ms,
    }
}

impl GroupShell {
    pub async fn request(
        self: &Rc<Self>,
        client_id: &str,
        client_host: &str,
        mut request: GroupRequest,
    ) -> Result<GroupResponse, ErrorCode> {
        if !self.loaded.get() {
            let _ = tokio::time::timeout(LOAD_WAIT, self.load_ended.notified()).await;
        }
        // What it took would be unknown to the one that came after it here.
        if self.removed.get() {
            return Err(ErrorCode::NOT_COORDINATOR);
        }
        if !self.loaded.get() {
            return Err(ErrorCode::COORDINATOR_LOAD_IN_PROGRESS);
        }
        if let GroupRequest::OffsetCommit { request, .. } = &mut request {
            self.identify_topics(request)?;
        }
        let token = self.next_token.get();
        self.next_token.set(token + 1);
        let (answer, receiver) = oneshot::channel();
        self.answers.borrow_mut().insert(token, answer);
        let host = &self.node.host;
        let fresh_id = u128::from(host.draw()) << 64 | u128::from(host.draw());
        let outputs = self.coordinator.borrow_mut().handle(
            token,
            Client { client_id, client_host },
            request,
            fresh_id,
            self.now(),
        );
        self.act(outputs);
        receiver.await.map_err(|_| ErrorCode::NOT_COORDINATOR)
    }

    fn now(&self) -> Now {
        let steady_ms = i64::try_from(self.made.elapsed().as_millis()).unwrap_or(i64::MAX);
        Now { steady_ms, wall_ms: self.node.host.now_ms() }
    }

    pub fn with_coordinator<R>(&self, look: impl FnOnce(&Coordinator) -> R) -> R {
        look(&self.coordinator.borrow())
    }

    /// Says which topics the offsets are for. Asked here and not where the request came in: on this thread a deletion
    /// is either in the image already, or its `remove_topic` comes after the commit and finds it.
    fn identify_topics(&self, commit: &mut OffsetCommitRequest) -> Result<(), ErrorCode> {
        let image = self.node.image.load();
        for topic in &mut commit.topics {
            topic.topic_id =
                image.topics.get(topic.name.as_str()).ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?.id;
        }
        Ok(())
    }

    async fn remove_topic(self: &Rc<Self>, topic: &str) {
        if self.replayed.get() {
            let outputs = self.coordinator.borrow_mut().remove_topic(topic);
            self.act_and_wait(outputs).await;
        }
    }

    /// As `act`, until what had to be appended is.
    async fn act_and_wait(self: &Rc<Self>, outputs: Vec<Output>) {
        let appends: Vec<u64> = outputs
            .iter()
            .filter_map(|output| match output {
                Output::Append { append_id, .. } => Some(*append_id),
                Output::Reply { .. } => None,
            })
            .collect();
        self.act(outputs);
        while !self.removed.get() && appends.iter().any(|id| self.open_appends.borrow().contains(id)) {
            self.append_finished.notified().await;
        }
    }

    fn act(self: &Rc<Self>, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Reply { token, response } => {
                    if let Some(answer) = self.answers.borrow_mut().remove(&token) {
                        // The member's connection may be gone; the group has moved on all the same.
                        let _ = answer.send(response);
                    }
                }
                Output::Append { append_id, records } => self.append(append_id, &records),
            }
        }
        self.deadline_moved.notify_one();
    }

    fn append(self: &Rc<Self>, append_id: u64, records: &[OffsetsRecord]) {
        let now = self.node.host.now_ms();
        let mut builder = BatchBuilder::new();
        for record in records {
            builder.append(now, Some(&record.key), record.value.as_deref(), &[]);
        }
        self.open_appends.borrow_mut().insert(append_id);
        let shell = self.clone();
        let completion = Completion::Callback(Box::new(move || shell.append_done(append_id, Ok(()))));
        let appended = self.partition.append(builder.build(0), Origin::Broker, now, Some(completion));
        if let Err((error, _)) = appended {
            tracing::warn!(partition = self.partition.index, %error, "group state could not be stored");
            self.append_done(append_id, Err(ErrorCode::COORDINATOR_NOT_AVAILABLE));
        }
    }

    fn append_done(self: &Rc<Self>, append_id: u64, result: Result<(), ErrorCode>) {
        // A callback may run while the coordinator is being asked (an append that is durable at once),
        // so its answer is acted on in a turn of its own.
        let shell = self.clone();
        tokio::task::spawn_local(async move {
            let outputs = shell.coordinator.borrow_mut().append_done(append_id, result, shell.now());
            shell.act(outputs);
            shell.open_appends.borrow_mut().remove(&append_id);
            shell.append_finished.notify_waiters();
        });
    }

    async fn load_and_tick(self: Rc<Self>) {
        while let Err(error) = self.load().await {
            if self.removed.get() || self.partition.damage().is_some() {
                tracing::error!(partition = self.partition.index, %error, "committed offsets could not be loaded; their groups stay unavailable here");
                return;
            }
            tracing::warn!(partition = self.partition.index, %error, "committed offsets could not be loaded; it is tried again");
            *self.coordinator.borrow_mut() = Coordinator::new(groups_config(&self.node.config));
            tokio::time::sleep(LOAD_AGAIN).await;
        }
        if self.removed.get() {
            return;
        }
        let outdated = {
            let mut coordinator = self.coordinator.borrow_mut();
            coordinator.finish_load(self.now());
            let image = self.node.image.load();
            coordinator.remove_outdated_topics(|topic| image.topics.get(topic).map(|t| t.id.as_u128()))
        };
        self.replayed.set(true);
        self.act_and_wait(outdated).await;
        self.loaded.set(true);
        self.load_ended.notify_waiters();
        while !self.removed.get() {
            let wait = self.coordinator.borrow().next_deadline_ms().map_or(TICK_MAX, |deadline| {
                Duration::from_millis(u64::try_from(deadline - self.now().steady_ms).unwrap_or(0))
                    .min(TICK_MAX)
            });
            tokio::select! {
                () = tokio::time::sleep(wait) => {
                    let outputs = self.coordinator.borrow_mut().tick(self.now());
                    if !outputs.is_empty() {
                        self.act(outputs);
                    }
                }
                () = self.deadline_moved.notified() => {}
            }
        }
    }

    async fn load(&self) -> Result<(), String> {
        let mut offset = self.partition.log_start_offset();
        let end = self.partition.high_watermark();
        while offset < end {
            let before = offset;
            let slice = self.partition.fetch(offset, LOAD_READ_BYTES).await.map_err(|e| e.to_string())?;
            for bytes in &slice.records {
                for batch in record_batch::batches(bytes) {
                    let (header, batch) = batch.map_err(|e| e.to_string())?;
                    offset = header.next_offset();
                    if header.is_control() {
                        continue;
                    }
                    let mut scratch = Vec::new();
                    let records = record::decode_records(batch, &mut scratch, LOAD_BATCH_BYTES_MAX)
                        .map_err(|e| e.to_string())?;
                    let mut coordinator = self.coordinator.borrow_mut();
                    for record in records {
                        let record = record.map_err(|e| e.to_string())?;
                        coordinator.load(record.key, record.value, record.timestamp);
                    }
                }
            }
            if offset == before {
                return Err(format!("the log ends at {offset} although it should reach {end}"));
            }
        }
        Ok(())
    }
}
