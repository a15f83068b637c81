//! A partition: its Raft group, its log, and who waits for it. Lives on exactly one shard.
//!
//! Invariants
//! - log start offset <= high watermark <= log end offset, and none of them goes back.
//! - The log end offset moves only in `append`, which gives every record its offset before Raft sees it.
//! - A produce is answered only when the high watermark has passed its last record, and the high
//!   watermark passes a record only when the shard log has it in the durability that the topic asks for.
//! - No borrow of `state` lives across an await.
//!
//! What it does not do: decide where it lives (metadata), parse requests (handlers), touch files (storage).

mod append;
mod fetch;
mod pending;
mod replica;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};

use flumen_metadata::{Durability, TopicConfig};
use flumen_raft::{Group, GroupStart};
use flumen_storage::{CompactError, CompactionConfig, GroupLog, Payload};

pub use append::{AppendError, Appended, Origin};
pub use fetch::{FetchError, FetchedSlice, OffsetAt};
pub use pending::{Completion, DataWaiter, ProduceInFlight};

use crate::disk_space::DiskSpace;
use crate::shard::Shard;
use pending::Pending;

/// What other threads may read of a partition: metrics, Metadata, DescribeLogDirs, lag.
#[derive(Default)]
pub struct PartitionGauges {
    pub leader_epoch: AtomicI32,
    pub log_start_offset: AtomicI64,
    pub high_watermark: AtomicI64,
    pub size_bytes: AtomicU64,
    /// 1 when the log is damaged and the partition refuses to serve.
    pub damaged: AtomicI32,
}

pub struct Partition {
    pub topic: Arc<str>,
    pub index: i32,
    pub group_id: u64,
    pub gauges: Arc<PartitionGauges>,
    /// Of this broker in Raft.
    node_id: u64,
    /// Where the shard keeps it, for ticks.
    pub(crate) slot: Cell<usize>,
    shard: Weak<Shard>,
    disk: Arc<DiskSpace>,
    log: GroupLog,
    config: RefCell<TopicConfig>,
    state: RefCell<State>,
    /// The highest raft output number known to be durable, collected before raft is told once.
    persisted_number: Cell<u64>,
    persisted_dirty: Cell<bool>,
    /// The number of the raft output that was staged last.
    staged_number: Cell<u64>,
    /// Everything below this offset was forced to disk, at this time.
    forced: Cell<(i64, i64)>,
    /// Retention never passes this offset: what an enabled export has not settled yet.
    hold_offset: Cell<i64>,
}

struct State {
    raft: Group,
    next_offset: i64,
    high_watermark: i64,
    /// (raft index, log end offset after it) of what is proposed and not committed.
    uncommitted: VecDeque<(u64, i64)>,
    /// Sorted by the high watermark they wait for.
    pending: VecDeque<Pending>,
    waiters: Vec<Weak<DataWaiter>>,
}

/// Where and what a partition is, as the metadata says.
#[derive(Clone)]
pub struct PartitionSpec {
    pub topic: Arc<str>,
    pub index: i32,
    pub group_id: u64,
    pub config: TopicConfig,
    /// Kafka ids of the brokers that have it as the metadata says: who votes as long as its log is empty. After that the
    /// log itself says who does.
    pub replicas: Vec<i32>,
    /// An export is turned on: nothing that it has not settled may go.
    pub exported: bool,
}

impl Partition {
    /// Takes over a log that recovery or creation handed out, and stands for election.
    pub fn open(shard: &Rc<Shard>, spec: PartitionSpec, log: GroupLog) -> Rc<Partition> {
        let hard_state = log.hard_state();
        let node_id = raft_id(shard.node.config.node_id);
        let start = GroupStart::alone(
            node_id,
            flumen_raft::HardState {
                term: hard_state.term,
                vote: hard_state.vote,
                commit: hard_state.commit,
            },
            log.last_index(),
            log.last_term(),
            spec.group_id,
        );
        let raft = Group::start(&start).expect("recovered raft state is consistent by construction");
        let end = log.log_end_offset();
        // Until the export says how far it is, everything is held.
        let hold = if spec.exported { log.log_start_offset() } else { i64::MAX };
        let gauges = shard.node.gauges_of(spec.group_id);
        let partition = Rc::new(Partition {
            topic: spec.topic,
            index: spec.index,
            group_id: spec.group_id,
            gauges,
            node_id,
            slot: Cell::new(usize::MAX),
            shard: Rc::downgrade(shard),
            disk: shard.node.disk.clone(),
            log,
            config: RefCell::new(spec.config),
            state: RefCell::new(State {
                raft,
                next_offset: end,
                high_watermark: end,
                uncommitted: VecDeque::new(),
                pending: VecDeque::new(),
                waiters: Vec::new(),
            }),
            persisted_number: Cell::new(0),
            persisted_dirty: Cell::new(false),
            staged_number: Cell::new(0),
            forced: Cell::new((end, 0)),
            hold_offset: Cell::new(hold),
        });
        if partition.damage().is_none() {
            partition.log.set_high_watermark(end);
            partition.state.borrow_mut().raft.campaign().expect("a group of one may always campaign");
            partition.advance();
        }
        partition.publish_gauges();
        partition
    }

    /// Why it refuses to serve; found at start, or by a reader since.
    pub fn damage(&self) -> Option<&str> {
        self.log.damage()
    }

    pub fn log_start_offset(&self) -> i64 {
        self.log.log_start_offset()
    }

    pub fn high_watermark(&self) -> i64 {
        self.state.borrow().high_watermark
    }

    pub fn log_end_offset(&self) -> i64 {
        self.state.borrow().next_offset
    }

    pub fn leader_epoch(&self) -> i32 {
        self.state.borrow().raft.leader_epoch()
    }

    pub fn size_bytes(&self) -> u64 {
        self.log.size_bytes()
    }

    pub fn set_config(&self, config: TopicConfig, exported: bool) {
        match (exported, self.hold_offset.get()) {
            (false, _) => self.hold_offset.set(i64::MAX),
            (true, i64::MAX) => self.hold_offset.set(self.log_start_offset()),
            (true, _) => {}
        }
        self.log.set_config(group_config(&config));
        *self.config.borrow_mut() = config;
    }

    /// How far the export is. Ignored once the export is turned off.
    pub fn set_hold_offset(&self, offset: i64) {
        if self.hold_offset.get() != i64::MAX {
            self.hold_offset.set(offset);
        }
    }

    pub fn enforce_retention(&self, now_ms: i64) {
        if self.damage().is_some() || !self.config.borrow().deletes() {
            // Gauges tell of damage that a reader found.
            self.publish_gauges();
            return;
        }
        self.log.enforce_retention(now_ms, self.hold_offset.get().min(self.high_watermark()));
        self.publish_gauges();
    }

    /// Compacts the log if its topic is compacted and it is due; takes as long as that takes. Nothing that an export has
    /// not settled goes.
    pub async fn compact(&self, now_ms: i64) {
        if self.damage().is_some() || !self.config.borrow().compacts() {
            return;
        }
        let hold = self.hold_offset.get().min(self.high_watermark());
        match self.log.compact(now_ms, hold).await {
            Ok(done) if done.passes > 0 => {
                tracing::info!(topic = %self.topic, partition = self.index, ?done, "compacted");
            }
            Ok(_) | Err(CompactError::Interrupted) => {}
            Err(error) => {
                tracing::warn!(topic = %self.topic, partition = self.index, %error, "compaction ended early; it is tried again");
            }
        }
        self.publish_gauges();
    }

    pub fn expire_producers(&self, now_ms: i64, expiration_ms: i64) {
        self.log.producers().expire(now_ms, expiration_ms);
    }

    /// Ids with epoch, last sequence and last timestamp.
    pub fn producers(&self) -> Vec<(i64, i16, i32, i64)> {
        self.log.producers().producers().collect()
    }

    /// Called by the shard when the log has made outputs up to `number` durable; true when this
    /// partition was not already on the list of those to advance.
    pub fn note_persisted(&self, number: u64) -> bool {
        self.persisted_number.set(number);
        !self.persisted_dirty.replace(true)
    }

    /// Tells raft what is durable and acts on what it answers.
    pub fn apply_persisted(&self) {
        self.persisted_dirty.set(false);
        self.state.borrow_mut().raft.on_persisted(self.persisted_number.get());
        self.advance();
    }

    /// Runs raft's outputs: entries go to the shard log, commits move the high watermark.
    pub(crate) fn advance(&self) {
        let mut new_high_watermark = None;
        loop {
            let Some(mut outputs) = self.state.borrow_mut().raft.take_outputs() else { break };
            if !outputs.messages.is_empty()
                && let Some(shard) = self.shard.upgrade()
            {
                for message in outputs.messages.drain(..) {
                    shard.outbox.push(message.to, self.group_id, message);
                }
            }
            if outputs.must_persist() {
                let hard_state = outputs.hard_state.map(|hs| flumen_storage::HardState {
                    term: hs.term,
                    vote: hs.vote,
                    commit: hs.commit,
                });
                let entries: Vec<flumen_storage::Entry> = outputs
                    .entries
                    .into_iter()
                    .map(|e| flumen_storage::Entry {
                        index: e.index,
                        term: e.term,
                        payload: if e.data.is_empty() || e.is_membership {
                            Payload::Control(e.data)
                        } else {
                            Payload::Batch(e.data)
                        },
                    })
                    .collect();
                let from_memory = self.acknowledges_from_memory(hard_state);
                match self.log.stage(hard_state, &entries) {
                    Ok(_) if from_memory => {
                        self.staged_number.set(outputs.number);
                        self.persisted_number.set(outputs.number);
                        self.state.borrow_mut().raft.on_persisted(outputs.number);
                    }
                    Ok((lane, lsn)) => {
                        self.staged_number.set(outputs.number);
                        if let Some(shard) = self.shard.upgrade() {
                            shard.note_staged(lane, lsn, self.group_id, outputs.number);
                        }
                    }
                    // Raft already counts these entries in its log; the shard is about to stop, and
                    // whoever waits for them hears nothing, which is the truth: the outcome is unknown.
                    Err(error) => {
                        tracing::error!(topic = %self.topic, partition = self.index, %error, "the log refused an entry that raft had accepted");
                        if let Some(shard) = self.shard.upgrade() {
                            shard.poison(&error.to_string());
                        }
                        return;
                    }
                }
            }
            if let Some(index) = outputs.committed_index {
                let mut state = self.state.borrow_mut();
                while state.uncommitted.front().is_some_and(|(i, _)| *i <= index) {
                    if let Some((_, end)) = state.uncommitted.pop_front() {
                        assert!(end > state.high_watermark, "the high watermark never goes back");
                        state.high_watermark = end;
                        new_high_watermark = Some(end);
                    }
                }
            }
        }
        if let Some(high_watermark) = new_high_watermark {
            self.log.set_high_watermark(high_watermark);
            self.gauges.high_watermark.store(high_watermark, Ordering::Relaxed);
            self.complete(high_watermark);
        }
    }

    /// Whether what is staged next counts at once. Not a vote or a term, which must never be forgotten, and not before
    /// what was staged earlier and has to wait.
    fn acknowledges_from_memory(&self, hard_state: Option<flumen_storage::HardState>) -> bool {
        let known = self.log.hard_state();
        self.config.borrow().acknowledges() == Durability::Memory
            && self.staged_number.get() == self.persisted_number.get()
            && hard_state.is_none_or(|new| (new.term, new.vote) == (known.term, known.vote))
    }

    /// Whether flush.messages or flush.ms ask for more than the topic's durability does.
    pub fn is_forced(&self) -> bool {
        let config = self.config.borrow();
        config.acknowledges() != Durability::Durable
            && (config.flush_ms < i64::MAX || config.flush_messages < i64::MAX)
    }

    /// Forces the log to disk when flush.messages or flush.ms say so.
    pub async fn keep_forced(&self, now_ms: i64) {
        let (end, due) = {
            let config = self.config.borrow();
            let end = self.log_end_offset();
            let (forced, at_ms) = self.forced.get();
            let due =
                end - forced >= config.flush_messages || now_ms.saturating_sub(at_ms) >= config.flush_ms;
            (end, end > forced && due && self.damage().is_none())
        };
        // A log that cannot be forced stops the process elsewhere.
        if due && self.log.force().await.is_ok() {
            self.forced.set((end, now_ms));
        }
    }

    fn publish_gauges(&self) {
        self.gauges.damaged.store(i32::from(self.damage().is_some()), Ordering::Relaxed);
        self.gauges.leader_epoch.store(self.leader_epoch(), Ordering::Relaxed);
        self.gauges.log_start_offset.store(self.log.log_start_offset(), Ordering::Relaxed);
        self.gauges.high_watermark.store(self.high_watermark(), Ordering::Relaxed);
        self.gauges.size_bytes.store(self.log.size_bytes(), Ordering::Relaxed);
    }
}

/// A broker's number in Raft, where 0 is nobody.
pub fn raft_id(node_id: i32) -> u64 {
    u64::try_from(node_id).unwrap_or(0) + 1
}

/// What the store needs to know of a topic's configuration.
pub fn group_config(config: &TopicConfig) -> flumen_storage::GroupConfig {
    flumen_storage::GroupConfig {
        durability: match config.acknowledges() {
            flumen_metadata::Durability::Durable => flumen_storage::Durability::Durable,
            flumen_metadata::Durability::Os => flumen_storage::Durability::Os,
            flumen_metadata::Durability::Memory => flumen_storage::Durability::Memory,
        },
        segment_bytes: u64::try_from(config.segment_bytes).unwrap_or(1 << 30),
        // What is written to is not compacted, so it may not be written to for longer than compaction may wait.
        segment_ms: if config.compacts() {
            config.segment_ms.min(config.max_compaction_lag_ms)
        } else {
            config.segment_ms
        },
        retention_bytes: config.retention_bytes,
        retention_ms: config.retention_ms,
        compaction: config.compacts().then(|| CompactionConfig {
            // Checked to be from 0 to 1.
            min_dirty_permille: (config.min_cleanable_dirty_ratio * 1000.0).round() as u32,
            min_lag_ms: config.min_compaction_lag_ms,
            max_lag_ms: config.max_compaction_lag_ms,
            delete_retention_ms: config.delete_retention_ms,
        }),
    }
}
