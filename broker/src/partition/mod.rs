//! A partition: its Raft group, its log, and who waits for it. Lives on exactly one shard.
//!
//! Invariants
//! - log start offset <= high watermark <= log end offset, and none of them goes back.
//! - The log end offset moves in `append`, which gives every record its offset before Raft sees it; on a follower, with what
//!   the leader sends, and back when that takes the place of something.
//! - A produce is answered only when the high watermark has passed its last record, and the high
//!   watermark passes a record only when the shard log has it in the durability that the topic asks for.
//! - No borrow of `state` lives across an await.
//!
//! What it does not do: decide where it lives (metadata), parse requests (handlers), touch files (storage).

mod append;
mod catch_up;
mod fetch;
mod in_sync;
mod outputs;
mod over;
mod pending;
mod replica;
#[cfg(test)]
mod replica_tests;
mod shipping;
mod turned_away;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use flumen_metadata::{Durability, TopicConfig};
use flumen_raft::{Contradiction, Group, GroupStart, Membership};
use flumen_storage::{CompactError, CompactionConfig, GroupLog, RaftStart};
use tokio::sync::oneshot;

pub use append::{AppendError, Appended, Origin};
pub use fetch::{FetchError, FetchedSlice, OffsetAt, Reading};
pub use pending::{Completion, DataWaiter, ProduceInFlight};
pub(crate) use shipping::Offer;

use crate::cluster::floors::Floor;
use crate::disk_space::DiskSpace;
use crate::mutant::{self, Mutant};
use crate::progress::MoveProgress;
use crate::shard::Shard;
use catch_up::CatchUps;
use in_sync::InSync;
use pending::Pending;
use turned_away::{Place, TurnedAway};

/// What other threads may read of a partition: metrics, Metadata, DescribeLogDirs, lag.
#[derive(Default)]
pub struct PartitionGauges {
    pub leader_epoch: AtomicI32,
    pub log_start_offset: AtomicI64,
    pub high_watermark: AtomicI64,
    pub size_bytes: AtomicU64,
    /// A replica that fetches what its leader cannot send as entries has it up to the first, of all up to the second; 0, 0:
    /// none does.
    pub fetched: (AtomicI64, AtomicI64),
    /// How often this replica gave up committed records that its leader did not have.
    pub begun_over: AtomicU64,
    /// Of a move that this broker drives.
    pub progress: Mutex<Option<MoveProgress>>,
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
    /// Shared by the partitions of a topic.
    config: RefCell<Arc<TopicConfig>>,
    state: RefCell<State>,
    /// The only member: all that is on this disk is committed, and nobody else is told of it.
    alone: Cell<bool>,
    /// A new replica of a group that exists: it does not know the members, and takes part in nothing.
    joining: Cell<bool>,
    /// As Raft said last.
    leads: Cell<bool>,
    serves: Cell<bool>,
    /// Entries up to this index are committed, and the log is to be told.
    committed: Cell<Option<u64>>,
    /// Where Raft believes that the log begins.
    told_before: Cell<u64>,
    /// What it fetches from its leader, which cannot send it as entries.
    shipment: RefCell<Option<Box<shipping::Shipment>>>,
    /// As the leader said: all replicas have everything below.
    everywhere_known: Cell<i64>,
    /// What followers were told last.
    told_floor: Cell<Option<Floor>>,
    /// A new group's first replica stands for election in the next ticks.
    ticks_to_stand: Cell<u8>,
    /// The highest raft output number known to be durable, collected before raft is told once.
    persisted_number: Cell<u64>,
    persisted_dirty: Cell<bool>,
    /// As the log said in the topic's durability, which is not enough for votes.
    reported_number: Cell<u64>,
    /// Outputs with a term or vote that a loss of power could still take back, oldest first.
    unforced: RefCell<VecDeque<u64>>,
    /// The number of the raft output that was staged last.
    staged_number: Cell<u64>,
    /// Everything below this offset was forced to disk, at this time.
    forced: Cell<(i64, i64)>,
    /// Retention never passes this offset: what an enabled export has not settled yet.
    hold_offset: Cell<i64>,
    turned_away: RefCell<TurnedAway>,
    /// What its leader has in place of what is committed here, while it is asked who the members are.
    contradiction: RefCell<Option<Box<Contradiction>>>,
    in_sync: RefCell<InSync>,
    /// What is here must stay as it is, whatever others have: an operator decides.
    keeps_its_log: Cell<bool>,
    catch_ups: CatchUps,
    /// The leader epoch in which a producer's gap was seen last, and when first in it.
    first_gap: Cell<(i32, i64)>,
}

struct State {
    raft: Group,
    next_offset: i64,
    high_watermark: i64,
    /// Last index and end of the log that were there at the start, as far as they were not replaced: up to there
    /// `uncommitted` knows nothing.
    recovered: (u64, i64),
    /// (raft index, log end offset after it) of what is in the log and not committed.
    uncommitted: VecDeque<(u64, i64)>,
    /// Sorted by the high watermark they wait for.
    pending: VecDeque<Pending>,
    waiters: Vec<Weak<DataWaiter>>,
    /// (raft output number, who waits for that to be stored here) of produces that ask for no more.
    pending_here: VecDeque<(u64, Completion, Option<Place>)>,
    /// (token of Raft, who waits) for the news that this replica still leads.
    reads: Vec<(u64, oneshot::Sender<()>)>,
    /// (raft index, log start) of entries that say where the log begins, until they are committed.
    log_starts: VecDeque<(u64, i64)>,
    /// (raft index, who waits) for such an entry of this leader to be committed.
    starts_wanted: Vec<(u64, oneshot::Sender<()>)>,
}

/// Where and what a partition is, as the metadata says.
#[derive(Clone)]
pub struct PartitionSpec {
    pub topic: Arc<str>,
    pub index: i32,
    pub group_id: u64,
    pub config: Arc<TopicConfig>,
    /// Kafka ids of the brokers that have it as the metadata says: who votes as long as its log is empty. After that the
    /// log itself says who does.
    pub replicas: Vec<i32>,
    /// An export is turned on: nothing that it has not settled may go.
    pub exported: bool,
}

impl Partition {
    /// Takes over a log that recovery or creation handed out, and stands for election.
    pub fn open(shard: &Rc<Shard>, mut spec: PartitionSpec, log: GroupLog) -> Rc<Partition> {
        let node_id = shard.node.raft_id();
        let own = shard.node.config.node_id;
        // A log with a number of its own is of a replica that came when the group was there: the metadata may name it by now, but as
        // long as nobody has told it so it does not vote.
        if log.group_id() != spec.group_id && spec.replicas.iter().any(|id| *id != own) {
            spec.replicas.retain(|id| *id != own);
        }
        let found = log.raft_start();
        let log_starts = found.controls.iter();
        let log_starts =
            log_starts.filter_map(|(at, data)| Some((*at, outputs::decode_log_start(data)?))).collect();
        let (raft, fresh) = start_group(&spec, &log, found, node_id);
        let joins = fresh && !raft.membership().contains(node_id) && !mutant::is(Mutant::JoinsWithoutAsking);
        let alone = raft.membership().has_only(node_id);
        let votes_alone = raft.membership().is_alone(node_id);
        // The metadata may be ahead of the group, or behind it.
        log.set_config(group_config(&spec.config, alone));
        let (last_index, end) = (log.last_index(), log.log_end_offset());
        let committed = raft.status().committed_index;
        // In a group of one all that is there is committed.
        let high_watermark = if votes_alone || committed >= last_index {
            end
        } else {
            log.end_of(committed).unwrap_or(0).max(log.log_start_offset())
        };
        // A new group has no leader for a second if all wait for their time-outs.
        let eager =
            fresh && !votes_alone && spec.replicas.first().is_some_and(|first| raft_id(*first) == node_id);
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
                high_watermark,
                recovered: (last_index, end),
                uncommitted: VecDeque::new(),
                pending: VecDeque::new(),
                waiters: Vec::new(),
                pending_here: VecDeque::new(),
                reads: Vec::new(),
                log_starts,
                starts_wanted: Vec::new(),
            }),
            alone: Cell::new(alone),
            joining: Cell::new(joins),
            leads: Cell::new(false),
            serves: Cell::new(false),
            committed: Cell::new(None),
            told_before: Cell::new(0),
            shipment: RefCell::default(),
            everywhere_known: Cell::new(0),
            told_floor: Cell::new(None),
            ticks_to_stand: Cell::new(if eager { replica::STAND_TICKS } else { 0 }),
            persisted_number: Cell::new(0),
            persisted_dirty: Cell::new(false),
            reported_number: Cell::new(0),
            unforced: RefCell::default(),
            staged_number: Cell::new(0),
            forced: Cell::new((end, 0)),
            hold_offset: Cell::new(hold),
            turned_away: RefCell::default(),
            contradiction: RefCell::default(),
            in_sync: RefCell::default(),
            keeps_its_log: Cell::new(false),
            catch_ups: CatchUps::default(),
            first_gap: Cell::new((-1, 0)),
        });
        if partition.damage().is_none() {
            partition.log.set_committed(committed);
            partition.log.set_high_watermark(high_watermark);
            partition.committed.set((!alone).then_some(committed));
            partition.begin_where_told();
            if votes_alone {
                partition.state.borrow_mut().raft.campaign().expect("a group of one may always campaign");
            }
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

    /// The members are others now. What is written past the log of the shard is not replaced by anybody, so that is for a
    /// replica that has no other.
    pub(super) fn set_alone(&self, alone: bool) {
        if self.alone.replace(alone) != alone {
            self.log.set_config(group_config(&self.config.borrow(), alone));
        }
    }

    pub fn set_config(&self, config: Arc<TopicConfig>, exported: bool) {
        match (exported, self.hold_offset.get()) {
            (false, _) => self.hold_offset.set(i64::MAX),
            (true, i64::MAX) => self.hold_offset.set(self.log_start_offset()),
            (true, _) => {}
        }
        self.log.set_config(group_config(&config, self.alone.get()));
        *self.config.borrow_mut() = config;
    }

    /// How far the export is. Ignored once the export is turned off.
    pub fn set_hold_offset(&self, offset: i64) {
        if self.hold_offset.get() != i64::MAX {
            self.hold_offset.set(offset);
        }
    }

    pub async fn enforce_retention(&self, now_ms: i64) {
        if self.damage().is_some() || !self.config.borrow().deletes() {
            // Gauges tell of damage that a reader found.
            self.publish_gauges();
            return;
        }
        self.log.enforce_retention(now_ms, self.hold_offset.get().min(self.high_watermark())).await;
        self.note_log_start();
        self.publish_gauges();
    }

    /// Compacts the log if its topic is compacted and it is due; takes as long as that takes. Nothing that an export has
    /// not settled goes.
    pub async fn compact(&self, now_ms: i64) {
        if self.damage().is_some() || !self.config.borrow().compacts() {
            return;
        }
        let hold = self.hold_offset.get().min(self.high_watermark()).min(self.everywhere());
        match self.log.compact(now_ms, hold).await {
            Ok(done) if done.passes > 0 => {
                tracing::info!(topic = %self.topic, partition = self.index, ?done, "compacted");
            }
            Ok(_) | Err(CompactError::Interrupted) => {}
            Err(error) => {
                tracing::warn!(topic = %self.topic, partition = self.index, %error, "compaction ended early; it is tried again");
            }
        }
        self.note_log_start();
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
        // Lanes report by themselves, and what is durable in one says that all before it is.
        self.reported_number.set(self.reported_number.get().max(number));
        let unforced = self.unforced.borrow().front().map_or(u64::MAX, |first| first - 1);
        let stored = self.reported_number.get().min(unforced);
        self.persisted_number.set(self.persisted_number.get().max(stored));
        !self.persisted_dirty.replace(true)
    }

    /// Sees to it that a vote is not forgotten in a loss of power, which the durability of the topic would allow: there would
    /// be two leaders of one term, and logs that differ for ever. Until then it counts as not stored, and so does what follows.
    fn force_vote(&self, number: u64) {
        let (Some(shard), log, group_id) = (self.shard.upgrade(), self.log.clone(), self.group_id) else {
            return;
        };
        self.unforced.borrow_mut().push_back(number);
        tokio::task::spawn_local(async move {
            // A log that cannot be forced stops the process elsewhere.
            if log.force().await.is_ok()
                && let Some(partition) = shard.partition(group_id)
                && partition.store_id() == log.group_id()
            {
                partition.unforced.borrow_mut().retain(|waits| *waits > number);
                partition.note_persisted(0);
                partition.apply_persisted();
            }
        });
    }

    /// Tells raft what is durable and acts on what it answers.
    pub fn apply_persisted(&self) {
        self.persisted_dirty.set(false);
        let waits = {
            let mut state = self.state.borrow_mut();
            state.raft.on_persisted(self.persisted_number.get());
            !state.pending_here.is_empty()
        };
        self.advance();
        if waits || !self.alone.get() {
            self.complete_here();
            self.stay_awake();
        }
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

/// The Raft group of a log, and whether it is new: its members are those that the log has stored, or the replicas of a log
/// that has nothing yet. One that cannot start refuses to serve.
fn start_group(spec: &PartitionSpec, log: &GroupLog, found: RaftStart, node_id: u64) -> (Group, bool) {
    let hard_state = flumen_raft::HardState {
        term: found.hard_state.term,
        vote: found.hard_state.vote,
        commit: found.hard_state.commit,
    };
    let fresh = found.membership.is_none() && found.last_index == 0;
    let (last_index, last_term) = (found.last_index, found.last_term);
    let alone = || {
        let start = GroupStart::alone(node_id, hard_state, last_index, last_term, spec.group_id);
        Group::start(&start).expect("a group of one starts with any log")
    };
    if log.damage().is_some() {
        return (alone(), false);
    }
    let (membership_index, membership) = match &found.membership {
        Some((index, bytes)) => (*index, Membership::decode_stored(bytes)),
        None if fresh && !spec.replicas.is_empty() => {
            let voters: Vec<u64> = spec.replicas.iter().map(|id| raft_id(*id)).collect();
            (0, Ok((Membership::of_voters(voters), 0)))
        }
        // Written before it could have had other members.
        None => (0, Ok((Membership::of_voters([node_id]), 0))),
    };
    let is_change =
        |(index, data): &(u64, Bytes)| *index > membership_index && outputs::decode_log_start(data).is_none();
    let changes = found.controls.into_iter().filter(is_change).collect();
    let started = membership.map_err(|error| error.to_string()).and_then(|(membership, abstains_below)| {
        let start = GroupStart {
            node_id,
            membership: membership.clone(),
            membership_index,
            membership_entries: changes,
            hard_state,
            before: found.before,
            terms: found.terms,
            last_index,
            last_term,
            seed: spec.group_id,
            abstains_below,
        };
        let group = Group::start(&start).map_err(|error| error.to_string())?;
        if fresh && membership.contains(node_id) && !membership.is_alone(node_id) {
            // Before anything depends on it: what the metadata says may change later.
            let stored = flumen_storage::HardState::default();
            log.stage_with(Some(stored), Some((0, membership.encode())), &[])
                .map_err(|error| error.to_string())?;
        }
        Ok(group)
    });
    match started {
        Ok(group) => (group, fresh),
        Err(error) => {
            tracing::error!(topic = %spec.topic, partition = spec.index, error, "the replica cannot start");
            log.refuse(&format!("its Raft group cannot start: {error}"));
            (alone(), false)
        }
    }
}

/// The group of an empty log whose membership, as of the entry at `index`, was learned from the leader.
fn group_that_joins(
    log: &GroupLog,
    node_id: u64,
    group_id: u64,
    index: u64,
    membership: &Membership,
) -> Result<Group, String> {
    let found = log.raft_start();
    Group::start(&GroupStart {
        node_id,
        membership: membership.clone(),
        membership_index: index,
        membership_entries: Vec::new(),
        hard_state: flumen_raft::HardState::default(),
        before: found.before,
        terms: found.terms,
        last_index: found.last_index,
        last_term: found.last_term,
        seed: group_id,
        abstains_below: 0,
    })
    .map_err(|error| error.to_string())
}

/// A broker's number in Raft, where 0 is nobody.
pub fn raft_id(node_id: i32) -> u64 {
    u64::try_from(node_id).unwrap_or(0) + 1
}

/// What the store needs to know of a topic's configuration. `alone`: the partition has no other replica.
pub fn group_config(config: &TopicConfig, alone: bool) -> flumen_storage::GroupConfig {
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
        direct: alone,
        compaction: config.compacts().then(|| CompactionConfig {
            // Checked to be from 0 to 1.
            min_dirty_permille: (config.min_cleanable_dirty_ratio * 1000.0).round() as u32,
            min_lag_ms: config.min_compaction_lag_ms,
            max_lag_ms: config.max_compaction_lag_ms,
            delete_retention_ms: config.delete_retention_ms,
        }),
    }
}

/// For tests of what looks at a group: its leader, with all entries committed and nothing under way.
#[cfg(test)]
pub(crate) fn leading(
    leader_id: u64,
    last_index: u64,
    membership: Membership,
    peers: Vec<flumen_raft::PeerStatus>,
) -> flumen_raft::Status {
    use flumen_raft::{Leadership, Role};
    flumen_raft::Status {
        leadership: Leadership { role: Role::Leader, leader_id, term: 3, may_serve: true },
        last_index,
        persisted_index: last_index,
        committed_index: last_index,
        applied_index: last_index,
        membership,
        change_pending: false,
        transfer_to: None,
        asleep: false,
        tail_bytes: 0,
        peers,
    }
}
