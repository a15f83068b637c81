//! What the clients of a store do to it between two crashes, told to the model as it happens.
//!
//! A client picks a partition and does one of the things a broker does: append, vote, replace what is not committed,
//! commit, read, advance the log start, apply retention, compact, change the configuration, create, delete. What the store takes
//! goes into the model in the same turn, and what it acknowledges too.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_io::simulated::{Fault, Machine, Random};
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;
use flumen_storage::{
    AdvanceError, Beginning, CompactError, CompactionConfig, CreateError, DeleteError, Durability, Entry,
    GroupConfig, GroupId, GroupLog, HardState, Lane, Lsn, Payload, ProducerState, ReadError, ReceiveError,
    Received, ShardStore, StageError,
};
use tokio::sync::Notify;

use crate::check::{self, Mismatch};
use crate::model::{self, Change, Partition};
use crate::settings::Theme;

/// Ids of idempotent producers, few enough that each writes often.
const PRODUCERS: u64 = 3;

/// A partition and what the test knows of it.
pub struct Slot {
    pub model: Partition,
    pub dir_name: String,
    pub config: GroupConfig,
    pub store: usize,
    /// None while it is being deleted, after it refused to be, and when the store refuses to serve it.
    pub log: Option<GroupLog>,
    /// Entries up to here are committed: never replaced, and free to leave the WAL.
    pub commit: u64,
    /// Entries up to here were in segments before the last restart. The store knows where entries begin that it took from
    /// the WAL or since, and so replaces no others.
    pub settled: u64,
    /// A leader is elected after every start, before it writes anything.
    pub elected: bool,
    /// Sequence that each producer would use next.
    pub sequences: BTreeMap<i64, i32>,
    /// Compactions that are under way, and up to where one may have taken records out.
    pub compacting: u32,
    pub compacted_to: i64,
    /// How often it began at nothing.
    pub over: u64,
    /// It was told to go.
    pub deleting: bool,
    /// The store reported it damaged; only where the disk did damage.
    pub refused: bool,
}

pub struct World {
    pub machine: Machine,
    pub theme: Theme,
    pub random: Random,
    pub stores: Vec<ShardStore>,
    pub slots: BTreeMap<GroupId, Slot>,
    pub next_group: GroupId,
    pub partitions: u64,
    /// The partitions have members, and sometimes begin anew.
    pub replicated: bool,
    /// Some of them with what lies below another replica's entries.
    pub receives: bool,
    /// First broken promise.
    pub violation: Option<String>,
    /// A store took no more writes.
    pub poisoned: bool,
    /// A shard's log has failed: the broker ends its process then, with whatever other shards are doing.
    pub process_ends: Rc<Notify>,
    pub stage_count: u64,
    /// Passes of compaction that changed something or found that there was nothing to change.
    pub compactions: u64,
    pub begun: u64,
    /// Of those, at nothing.
    pub over: u64,
    pub received: u64,
}

impl Slot {
    /// Where compaction may have been; `None` for a partition whose topic never was a compacted one.
    pub fn bound(&self, id: GroupId) -> Option<i64> {
        is_keyed(id).then_some(self.compacted_to)
    }

    fn note_compactable(&mut self, high_watermark: i64) {
        if self.compacting > 0 {
            self.compacted_to = self.compacted_to.max(high_watermark);
        }
    }
}

pub type Shared = Rc<RefCell<World>>;

impl World {
    pub fn blame(&mut self, what: String) {
        // After the machine went down nothing counts; every call fails then.
        if self.violation.is_none() && !self.machine.is_down() {
            self.violation = Some(what);
        }
    }

    fn pick_slot(&mut self) -> Option<GroupId> {
        let ids: Vec<GroupId> =
            self.slots.iter().filter(|(_, slot)| slot.log.is_some()).map(|(id, _)| *id).collect();
        self.random.pick(&ids).copied()
    }

    /// A partition that could not be read when it had to be takes nothing more until the next start.
    fn may_be_refused(&self) -> bool {
        self.theme == Theme::Damage || self.machine.counters().of(Fault::ReadFails) > 0
    }

    fn take_out_of_service(&mut self, id: GroupId) {
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.log = None;
        }
    }

    /// Damage makes anything unreadable, and failed reads make some things so for once.
    fn may_not_read(&self, error: &ReadError) -> bool {
        match error {
            ReadError::Io(_) => self.machine.counters().of(Fault::ReadFails) > 0,
            ReadError::Damaged { .. } => self.may_be_refused(),
            ReadError::OutOfRange { .. } => false,
        }
    }
}

/// Every third partition has keys in its records, so that it can be compacted.
pub fn is_keyed(id: GroupId) -> bool {
    id % 3 == 0
}

/// Few enough that most records have a newer one behind them.
const KEYS: u64 = 12;

/// Every other partition has no other replica: nothing in it is ever replaced, and large runs may go past the WAL.
fn is_alone(id: GroupId) -> bool {
    id % 2 == 0
}

pub fn new_config(random: &mut Random, id: GroupId) -> GroupConfig {
    let keyed = is_keyed(id);
    let durability = match random.below(6) {
        0 => Durability::Os,
        1 => Durability::Memory,
        _ => Durability::Durable,
    };
    let compaction = (keyed && random.below(5) > 0).then(|| CompactionConfig {
        min_dirty_permille: u32::try_from(random.below(300)).unwrap_or(0),
        delete_retention_ms: i64::try_from(random.below(300)).unwrap_or(0),
        ..CompactionConfig::default()
    });
    // Only what is closed is compacted.
    let doublings = if keyed { 2 } else { 6 };
    GroupConfig {
        durability,
        segment_bytes: 8 << (10 + random.below(doublings)),
        retention_ms: -1,
        compaction,
        direct: is_alone(id),
        ..GroupConfig::default()
    }
}

/// A batch whose content tells where it belongs and which attempt wrote it.
fn batch(world: &mut World, id: GroupId, base: i64, term: u64, producer: Option<(i64, i32)>) -> (Bytes, i64) {
    let records = 1 + i64::try_from(world.random.below(4)).unwrap_or(0);
    let size = match world.random.below(20) {
        0 => 10_000 + world.random.below(30_000),
        1..=4 => 1_000 + world.random.below(6_000),
        _ => 10 + world.random.below(300),
    } as usize;
    let mut builder = BatchBuilder::new();
    let at = world.machine.now_ms();
    world.stage_count += 1;
    for k in 0..records {
        let mut value = format!("{id}/{}/{term}/{}/", base + k, world.stage_count).into_bytes();
        let fill = (world.stage_count % 251) as u8;
        value.resize(value.len().max(size / records as usize), fill);
        if is_keyed(id) {
            let key = format!("k{}", world.random.below(KEYS));
            // Now and then a tombstone.
            let value = (world.random.below(6) > 0).then_some(&value[..]);
            builder.append(at + k, Some(key.as_bytes()), value, &[]);
        } else {
            builder.append(at + k, None, Some(&value), &[]);
        }
    }
    if let Some((producer, sequence)) = producer {
        builder.producer(producer, 0, sequence);
    }
    builder.leader_epoch(i32::try_from(term).unwrap_or(i32::MAX));
    (builder.build(base).freeze(), records)
}

/// Stages entries from `first` on (replacing what is there), maybe with a hard state, and tells the model.
fn stage(
    world: &mut World,
    id: GroupId,
    first: u64,
    term: u64,
    count: u64,
    with_hard: bool,
) -> Option<(Lane, Lsn)> {
    let slot = world.slots.get(&id)?;
    let (log, durable) = (slot.log.clone()?, slot.config.durability == Durability::Durable);
    let state = slot.model.log()?.clone();
    let mut sequences = slot.sequences.clone();
    let replaces = first <= state.last_index();
    let mut offset = state.end_of(first - 1);
    let (mut entries, mut changes) = (Vec::new(), Vec::new());
    for k in 0..count {
        let index = first + k;
        let mut control = Bytes::new();
        let (payload, next, bytes) = if world.random.below(8) == 0 {
            let size = world.random.below(40) as usize;
            control = Bytes::from(vec![9; size]);
            (Payload::Control(control.clone()), offset, None)
        } else {
            // A client whose batch was replaced does not know; to keep sequences simple it is another one.
            let producer = (!replaces && world.random.below(2) == 0)
                .then(|| i64::try_from(world.random.below(PRODUCERS)).unwrap_or(0) + 100);
            let producer =
                producer.map(|producer| (producer, sequences.get(&producer).copied().unwrap_or(0)));
            let (bytes, records) = batch(world, id, offset, term, producer);
            if let Some((producer, sequence)) = producer {
                sequences.insert(producer, sequence + i32::try_from(records).unwrap_or(0));
            }
            (Payload::Batch(bytes.clone()), offset + records, Some(bytes))
        };
        changes.push(Change::Entry(model::Entry { index, term, base: offset, next, batch: bytes, control }));
        entries.push(Entry { index, term, payload });
        offset = next;
    }
    let slot = world.slots.get_mut(&id)?;
    let hard = with_hard.then(|| HardState { term, vote: 1 + term % 3, commit: slot.commit.min(first - 1) });
    let commit = slot.commit;
    let change = hard.is_some() && world.replicated && world.random.below(3) == 0;
    let membership = change.then(|| {
        let size = 1 + world.random.below(40) as usize;
        (commit, Bytes::from(vec![world.random.below(250) as u8; size]))
    });
    let slot = world.slots.get_mut(&id)?;
    changes.extend(hard.map(|hard| Change::Hard(hard, membership.clone())));
    if changes.is_empty() {
        return None;
    }
    let total: usize = entries.iter().map(|entry| entry.payload.bytes().len()).sum();
    let promised = count == 1 && !with_hard && !replaces && log.has_room(total);
    match log.stage_with(hard, membership, &entries) {
        Ok(commit) => {
            slot.sequences = sequences;
            // Who only votes does not lead.
            slot.elected |= count > 0;
            for change in changes {
                slot.model.stage(change, Some(commit), durable);
            }
            world
                .machine
                .note(&format!("{id} staged {first}+{count} term {term} hard {hard:?} at {commit:?}"));
            Some(commit)
        }
        Err(StageError::NoSpace) if promised => {
            world.blame(format!("group {id}: there was room for {total} bytes, and then there was none"));
            None
        }
        Err(StageError::NoSpace | StageError::TooLarge { .. }) => None,
        Err(StageError::Poisoned) => {
            world.poisoned = true;
            None
        }
        Err(StageError::Damaged) if world.may_be_refused() => {
            world.take_out_of_service(id);
            None
        }
        Err(error) => {
            world.blame(format!("group {id}: staging entries {first} to {}: {error}", first + count));
            None
        }
    }
}

fn term_of(state: &model::Log) -> u64 {
    state.hard.term.max(state.last_term()).max(1)
}

fn append(world: &mut World, id: GroupId) {
    let Some(slot) = world.slots.get(&id) else { return };
    let Some(state) = slot.model.log() else { return };
    let term = term_of(state) + u64::from(!slot.elected);
    let next = state.last_index() + 1;
    let count = 1 + world.random.below(3);
    // Entries of a term follow a hard state that knows it.
    let with_hard = state_is_behind(world, id, term) || world.random.below(2) == 0;
    stage(world, id, next, term, count, with_hard);
}

fn state_is_behind(world: &World, id: GroupId, term: u64) -> bool {
    world.slots.get(&id).and_then(|slot| slot.model.log()).is_some_and(|log| log.hard.term < term)
}

/// Raft voted, with nothing to append.
fn vote(world: &mut World, id: GroupId) {
    let Some(state) = world.slots.get(&id).and_then(|slot| slot.model.log()) else { return };
    let term = term_of(state) + world.random.below(2);
    stage(world, id, state_end(world, id) + 1, term, 0, true);
}

fn state_end(world: &World, id: GroupId) -> u64 {
    world.slots.get(&id).and_then(|slot| slot.model.log()).map_or(0, model::Log::last_index)
}

/// A new leader replaces what was not committed.
fn replace(world: &mut World, id: GroupId) {
    if is_alone(id) {
        return;
    }
    let Some(slot) = world.slots.get(&id) else { return };
    let Some(state) = slot.model.log() else { return };
    // Where the indexes of batches are kept, every place is found.
    let settled = if world.replicated && !is_keyed(id) { 0 } else { slot.settled };
    let (kept, last, term) = (slot.commit.max(settled), state.last_index(), term_of(state) + 1);
    if last <= kept {
        return;
    }
    let first = kept + 1 + world.random.below(last - kept);
    let count = 1 + world.random.below(2);
    stage(world, id, first, term, count, true);
}

/// Batches that another replica has below its entries, in any places, and where its entries begin: behind what is committed
/// here, as far as that goes by then.
fn shipped(world: &mut World, id: GroupId) -> Option<(i64, Vec<model::Entry>, i64)> {
    let slot = world.slots.get(&id).filter(|_| !is_alone(id))?;
    let state = slot.model.log()?;
    let (start, end, term) = (state.log_start, state.log_end(), term_of(state));
    let some =
        |random: &mut Random, below: i64| i64::try_from(random.below(below.max(1) as u64)).unwrap_or(0);
    let log_start = start + some(&mut world.random, end - start);
    let mut at = log_start;
    let mut batches = Vec::new();
    let count = 1 + world.random.below(8);
    for k in 1..=count {
        at += some(&mut world.random, 6);
        if k == count {
            at = at.max(end + 1 + some(&mut world.random, 60));
        }
        let (bytes, records) = batch(world, id, at, term, None);
        let (base, next) = (at, at + records);
        batches.push(model::Entry { index: 0, term, base, next, batch: Some(bytes), control: Bytes::new() });
        at = next;
    }
    Some((log_start, batches, at))
}

/// As `begin_anew`, with what another replica sends first.
async fn receive(world: &Shared, id: GroupId) {
    let (log, (log_start, batches, end)) = {
        let mut world = world.borrow_mut();
        let Some(log) = world.slots.get(&id).and_then(|slot| slot.log.clone()) else { return };
        if log.is_beginning() {
            return;
        }
        let Some(shipped) = shipped(&mut world, id) else { return };
        (log, shipped)
    };
    let in_one = 1 + world.borrow_mut().random.below(3) as usize;
    let received = async {
        let mut receiver = log.receive(log_start, end).await?;
        for some in batches.chunks(in_one) {
            let bytes = some.iter().filter_map(|entry| entry.batch.as_deref()).collect::<Vec<_>>().concat();
            receiver.append(bytes.into()).await?;
        }
        receiver.finish().await
    };
    let received = received.await;
    let mut world = world.borrow_mut();
    if world.machine.is_down() {
        return;
    }
    let counters = world.machine.counters();
    let may_fail = counters.of(Fault::ReadFails) + counters.of(Fault::WriteFails) > 0;
    match received {
        Ok(received) => begin(&mut world, id, Some((received, batches))),
        Err(ReceiveError::NoSpace | ReceiveError::Interrupted) => {}
        Err(ReceiveError::Poisoned(_)) => world.poisoned = true,
        Err(ReceiveError::Io { .. }) if may_fail => {}
        Err(error) => world.blame(format!("group {id} receives: {error}")),
    }
}

/// What others have begins further on than this log ends, or disagrees with what is not committed of it.
fn begin_anew(world: &mut World, id: GroupId) {
    begin(world, id, None);
}

fn begin(world: &mut World, id: GroupId, received: Option<(Received, Vec<model::Entry>)>) {
    // Nobody brings it what it does not have.
    if is_alone(id) {
        return;
    }
    let Some(slot) = world.slots.get(&id) else { return };
    let (Some(log), Some(state)) = (slot.log.clone(), slot.model.log()) else { return };
    if log.is_beginning() {
        return;
    }
    let last = state.last_index();
    let commit = slot.commit.max(slot.settled.min(last));
    let (committed_end, term) = (state.end_of(commit).max(state.log_start), term_of(state));
    let (membership, durable) = (state.membership.clone(), slot.config.durability == Durability::Durable);
    let index = commit + 1 + world.random.below(last - commit + 20);
    let (mut offset, old_start) =
        (committed_end + 1 + i64::try_from(world.random.below(100)).unwrap_or(0), state.log_start);
    if let Some((received, _)) = &received {
        if received.end() <= committed_end {
            // Raft would not take it any more.
            return;
        }
        offset = received.end();
    }
    let mut term = term + world.random.below(2);
    // Others lost what is committed here.
    let over = received.is_none() && world.random.below(4) == 0;
    let (mut index, hard_term) = (index, term);
    if over {
        (index, term, offset) = (0, 0, 0);
    }
    let mut producers = ProducerState::new();
    let mut brought = BTreeMap::new();
    let elsewhere = usize::try_from(world.random.below(PRODUCERS + 1)).unwrap_or(0);
    for producer in (100..).take(if over { 0 } else { elsewhere }) {
        let sequence = i32::try_from(world.random.below(1000)).unwrap_or(0);
        let mut builder = BatchBuilder::new();
        builder.append(world.machine.now_ms(), None, Some(b"elsewhere"), &[]);
        builder.producer(producer, 0, sequence);
        let bytes = builder.build(offset - 1);
        let header = record_batch::parse_header(&bytes).expect("a batch was built");
        producers.apply(&header);
        brought.insert(producer, (0, sequence, offset - 1));
    }
    let members = (index, Bytes::from(vec![world.random.below(250) as u8; 20]));
    let membership = if world.random.below(2) == 0 { members } else { membership.unwrap_or(members) };
    let hard = HardState { term: hard_term, vote: world.random.below(4), commit: index };
    let beginning = Beginning {
        hard_state: hard,
        index,
        term,
        offset,
        membership: membership.clone(),
        producers: producers.encode(offset, -1).into(),
    };
    let with = received.is_some();
    let (begun, log_start, below) = match received {
        Some((received, below)) => {
            let log_start = received.log_start().max(old_start);
            (log.begin_with(&beginning, received), log_start, below)
        }
        None => (log.begin_anew(&beginning), offset, Vec::new()),
    };
    let Some(slot) = world.slots.get_mut(&id) else { return };
    match begun {
        Ok(commit) => {
            slot.sequences =
                brought.iter().map(|(producer, (_, sequence, _))| (*producer, sequence + 1)).collect();
            (slot.commit, slot.settled) = (index, index);
            slot.elected = false;
            slot.over += u64::from(over);
            let state = model::Log {
                below,
                entries: Vec::new(),
                hard,
                log_start,
                before: (index, term, offset),
                membership: Some(membership),
                brought,
                forgotten: std::collections::BTreeMap::new(),
            };
            slot.model.stage(Change::Begin(Box::new(state)), Some(commit), durable);
            world.begun += 1;
            world.over += u64::from(over);
            world.received += u64::from(with);
            world
                .machine
                .note(&format!("{id} begins anew after {index} of term {term} at {offset}, {commit:?}"));
        }
        Err(StageError::NoSpace) => {}
        // Another receiver has begun since.
        Err(StageError::Gap { .. }) if with => {}
        Err(StageError::Poisoned) => world.poisoned = true,
        Err(StageError::Damaged) if world.may_be_refused() => world.take_out_of_service(id),
        Err(error) => world.blame(format!("group {id}: beginning anew after {index}: {error}")),
    }
}

/// A replica is behind and is sent some entries.
async fn read_entries(world: &Shared, id: GroupId) {
    let (log, low, high, max_bytes, before, commit) = {
        let mut world = world.borrow_mut();
        let Some(slot) = world.slots.get(&id) else { return };
        let (Some(log), Some(state)) = (slot.log.clone(), slot.model.log()) else { return };
        let (first, last, before, commit) =
            (log.before().0 + 1, state.last_index(), (state.before, slot.over), slot.commit);
        if first > last {
            return;
        }
        let low = first + world.random.below(last - first + 1);
        let high = low + 1 + world.random.below(last - low + 1);
        (log, low, high, 1 + world.random.below(60_000) as usize, before, commit)
    };
    let found = log.read_entries(low, high, max_bytes).await;
    let mut world = world.borrow_mut();
    let Some(slot) = world.slots.get(&id) else { return };
    let Some(state) = slot.model.log().filter(|state| (state.before, slot.over) == before) else { return };
    let verdict = match found {
        // They were replaced meanwhile, by fewer.
        Ok(found) if found.is_empty() && low > commit => Ok(()),
        Ok(found)
            if found.is_empty() || found[0].index != low || found.last().is_some_and(|e| e.index >= high) =>
        {
            let what = format!(
                "asked for entries {low} to {high}, got {}; they begin after {:?}",
                found.len(),
                log.before()
            );
            Err(Mismatch::Wrong(what))
        }
        // Others may have been replaced meanwhile.
        Ok(found) => found
            .iter()
            .filter(|entry| entry.index <= commit)
            .try_for_each(|entry| check::same_entry(state, entry)),
        // Compaction or retention took them meanwhile, or a cut.
        Err(ReadError::OutOfRange { .. }) if log.before().0 >= low => Ok(()),
        Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
        Err(ReadError::Io(error))
            if error.kind() == std::io::ErrorKind::NotFound && log.before().0 >= low =>
        {
            Ok(())
        }
        Err(error) if world.may_not_read(&error) => Ok(()),
        Err(error) => Err(Mismatch::Wrong(format!("reading entries from {low}: {error}"))),
    };
    match verdict {
        Ok(()) => {}
        Err(Mismatch::Noticeable(_)) if world.theme == Theme::Damage => {}
        Err(Mismatch::Noticeable(reason) | Mismatch::Wrong(reason)) => {
            world.blame(format!("group {id}: {reason}"));
        }
    }
}

/// What is acknowledged is committed: it may leave the WAL, and readers may see it.
fn commit(world: &mut World, id: GroupId) {
    let Some(slot) = world.slots.get_mut(&id) else { return };
    let (Some(log), Some(acked)) = (slot.log.clone(), slot.model.acknowledged()) else { return };
    // Entries that are acknowledged and were not replaced since; in memory that is all of them, at once.
    let common = match slot.config.durability {
        Durability::Memory => slot.model.log().map_or(0, model::Log::last_index),
        _ => slot.model.log().map_or(0, |now| now.common(&acked)),
    };
    if common > slot.commit {
        slot.commit = slot.commit + 1 + world.random.below(common - slot.commit);
    }
    let Some(end) = slot.model.log().map(|now| now.end_of(slot.commit)) else { return };
    log.set_committed(slot.commit);
    log.set_high_watermark(end);
    slot.note_compactable(log.high_watermark());
}

async fn compact(world: &Shared, id: GroupId) {
    let (log, now_ms, hold, keys_max) = {
        let mut world = world.borrow_mut();
        let now_ms = world.machine.now_ms();
        let keys_max = 1 + usize::try_from(world.random.below(2 * KEYS)).unwrap_or(0);
        let held = world.random.below(4) == 0;
        let Some(slot) = world.slots.get_mut(&id) else { return };
        let Some(log) = slot.log.clone().filter(|_| slot.config.compaction.is_some()) else { return };
        slot.compacting += 1;
        slot.note_compactable(log.high_watermark());
        let hold = if held { log.high_watermark() / 2 } else { i64::MAX };
        (log, now_ms, hold, keys_max)
    };
    let result = log.compact_bounded(now_ms, hold, keys_max).await;
    let mut world = world.borrow_mut();
    if world.machine.is_down() {
        return;
    }
    if let Some(slot) = world.slots.get_mut(&id) {
        slot.compacting -= 1;
    }
    world.machine.note(&format!("{id} compacted: {result:?}"));
    let counters = world.machine.counters();
    let may_fail = counters.of(Fault::ReadFails) + counters.of(Fault::WriteFails) > 0;
    match result {
        Ok(outcome) => world.compactions += u64::from(outcome.passes),
        Err(CompactError::Interrupted | CompactError::NoSpace) => {}
        Err(CompactError::Poisoned(_)) => world.poisoned = true,
        Err(CompactError::Io { .. }) if may_fail => {}
        Err(CompactError::Damaged { .. }) if world.may_be_refused() => {}
        Err(error) => world.blame(format!("compacting group {id}: {error}")),
    }
}

fn advance(world: &mut World, id: GroupId) {
    let Some(slot) = world.slots.get_mut(&id) else { return };
    let (Some(log), Some(state)) = (slot.log.clone(), slot.model.log()) else { return };
    let (start, end) = (state.log_start, log.high_watermark());
    if end <= start {
        return;
    }
    let to = start + 1 + i64::try_from(world.random.below((end - start) as u64 / 2 + 1)).unwrap_or(0);
    let to = to.min(end);
    let durable = slot.config.durability == Durability::Durable;
    match log.advance_log_start(to) {
        Ok(commit) => {
            slot.model.stage(Change::LogStart(to), Some(commit), durable);
            world.machine.note(&format!("{id} log start {to} at {commit:?}"));
        }
        Err(AdvanceError::Stage(StageError::NoSpace)) => {}
        Err(AdvanceError::Stage(StageError::Poisoned) | AdvanceError::Poisoned(_)) => world.poisoned = true,
        Err(AdvanceError::Stage(StageError::Damaged)) if world.may_be_refused() => {
            world.take_out_of_service(id)
        }
        Err(error) => world.blame(format!("group {id}: advancing the log start to {to}: {error}")),
    }
}

async fn retain(world: &Shared, id: GroupId) {
    let (log, now, hold) = {
        let mut world = world.borrow_mut();
        let world = &mut *world;
        let now = world.machine.now_ms();
        let Some(slot) = world.slots.get_mut(&id) else { return };
        let (Some(log), Some(state)) = (slot.log.clone(), slot.model.log()) else { return };
        let mut config = slot.config.clone();
        match world.random.below(3) {
            0 => config.retention_bytes = i64::try_from(world.random.below(60_000)).unwrap_or(0),
            1 => config.retention_ms = i64::try_from(world.random.below(400)).unwrap_or(0),
            _ => {}
        }
        log.set_config(config);
        let hold = if world.random.below(3) == 0 { state.log_start + 5 } else { i64::MAX };
        (log, now, hold)
    };
    let outcome = log.enforce_retention(now, hold).await;
    let mut world = world.borrow_mut();
    let world = &mut *world;
    // Others may have changed it while producers were written down, or deleted it.
    let Some(slot) = world.slots.get_mut(&id) else { return };
    let Some(before) = slot.model.log().map(|state| state.log_start) else { return };
    log.set_config(slot.config.clone());
    let durable = slot.config.durability == Durability::Durable;
    if outcome.log_start_offset > before {
        slot.model.stage(Change::LogStart(outcome.log_start_offset), None, durable);
        world.machine.note(&format!("{id} retention to {}", outcome.log_start_offset));
    }
    if outcome.log_start_offset > hold.max(before)
        || outcome.log_start_offset > log.high_watermark().max(before)
    {
        world.blame(format!("group {id}: retention went to {} beyond its bounds", outcome.log_start_offset));
    }
}

fn reconfigure(world: &mut World, id: GroupId) {
    let config = new_config(&mut world.random, id);
    let Some(slot) = world.slots.get_mut(&id) else { return };
    slot.config = config.clone();
    if let Some(log) = &slot.log {
        log.set_config(config);
    }
}

pub fn create_any(world: &mut World) {
    let id = world.next_group;
    let config = new_config(&mut world.random, id);
    // Names of deleted topics come back, numbers do not.
    let dir_name = format!("t-{}", world.random.below(world.partitions + 2));
    if world.slots.values().any(|slot| slot.dir_name == dir_name && slot.model.log().is_some()) {
        return;
    }
    create_as(world, id, dir_name, config);
}

pub fn create_as(world: &mut World, id: GroupId, dir_name: String, config: GroupConfig) {
    let store_at = usize::try_from(id % world.stores.len() as u64).unwrap_or(0);
    match world.stores[store_at].create(id, &dir_name, config.clone()) {
        Ok(log) => {
            world.next_group = world.next_group.max(id + 1);
            world.machine.note(&format!("{id} created as {dir_name}"));
            let mut model = Partition::default();
            // That it exists is durable whatever its topic asks for.
            model.stage(Change::Create, None, true);
            let slot = Slot {
                model,
                dir_name,
                config,
                store: store_at,
                log: Some(log),
                commit: 0,
                settled: 0,
                elected: false,
                sequences: BTreeMap::new(),
                compacting: 0,
                compacted_to: 0,
                over: 0,
                deleting: false,
                refused: false,
            };
            world.slots.insert(id, slot);
        }
        Err(CreateError::NoSpace | CreateError::Io { .. }) => {}
        // A deletion that could not be finished, or a creation that was refused half-way, holds the name until the
        // next start.
        Err(CreateError::DirectoryExists(_)) => {}
        Err(CreateError::Poisoned(_)) => world.poisoned = true,
        Err(error) => world.blame(format!("creating group {id} as {dir_name}: {error}")),
    }
}

async fn delete(world: &Shared, id: GroupId) {
    let store = {
        let mut world = world.borrow_mut();
        let Some(slot) = world.slots.get_mut(&id) else { return };
        // Another client may have been faster.
        if slot.log.take().is_none() {
            return;
        }
        slot.deleting = true;
        slot.model.stage(Change::Delete, None, true);
        let at = slot.store;
        world.machine.note(&format!("{id} delete"));
        world.stores[at].clone()
    };
    let result = store.delete(id).await;
    let mut world = world.borrow_mut();
    if world.machine.is_down() {
        return;
    }
    world.machine.note(&format!("{id} delete: {result:?}"));
    match result {
        Ok(()) => {
            if let Some(slot) = world.slots.get_mut(&id) {
                slot.model.acknowledge_deletion();
            }
        }
        Err(DeleteError::Poisoned(_)) => world.poisoned = true,
        // Renamed, which the next start takes for a deletion.
        Err(DeleteError::Stage(_)) => {}
        // Not even that: it is as it was.
        Err(DeleteError::Io { .. }) => {
            let log = store.group(id);
            if let Some(slot) = world.slots.get_mut(&id) {
                // It may have been configured meanwhile.
                if let Some(log) = &log {
                    log.set_config(slot.config.clone());
                }
                slot.log = log;
                slot.deleting = false;
                slot.model.take_back();
            }
        }
        Err(error) => world.blame(format!("deleting group {id}: {error}")),
    }
}

async fn read(world: &Shared, id: GroupId) {
    let (log, from, upper, max_bytes, before) = {
        let mut world = world.borrow_mut();
        let Some(log) = world.slots.get(&id).and_then(|slot| slot.log.clone()) else { return };
        let (start, end) = (log.log_start_offset(), log.high_watermark());
        if end <= start {
            return;
        }
        let from = start + i64::try_from(world.random.below((end - start) as u64)).unwrap_or(0);
        let before = world.slots.get(&id).and_then(|slot| Some((slot.model.log()?.before, slot.over)));
        (log, from, end, 1 + world.random.below(20_000) as usize, before)
    };
    let found = match log.read_cached(from, upper, max_bytes) {
        Some(found) => Ok(found),
        None => log.read(from, upper, max_bytes).await,
    };
    let mut world = world.borrow_mut();
    let Some(slot) = world.slots.get(&id) else { return };
    let Some(state) = slot.model.log() else { return };
    if Some((state.before, slot.over)) != before {
        // What it read is of a log that is no more.
        return;
    }
    let verdict = match found {
        Ok(found) => check::same_records(state, slot.bound(id), (from, upper), &found, false).map(drop),
        Err(ReadError::OutOfRange { .. }) if state.log_start > from => Ok(()),
        Err(error) if world.may_not_read(&error) => Ok(()),
        Err(error) => Err(Mismatch::Wrong(format!("reading from {from}: {error}"))),
    };
    match verdict {
        Ok(()) => {}
        Err(Mismatch::Noticeable(_)) if world.theme == Theme::Damage => {}
        Err(Mismatch::Noticeable(reason) | Mismatch::Wrong(reason)) => {
            world.blame(format!("group {id}: {reason}"));
        }
    }
}

/// Every other log that begins anew does so with what another replica sends.
fn receives(world: &Shared) -> bool {
    let mut world = world.borrow_mut();
    world.receives && world.random.below(2) == 0
}

/// One client, for a number of actions.
pub async fn client(world: Shared, actions: u64) {
    for _ in 0..actions {
        let (pause, action, id) = {
            let mut world = world.borrow_mut();
            if world.violation.is_some() || world.poisoned {
                return;
            }
            let pause = world.random.below(12);
            let extra = if world.replicated { world.random.below(60) } else { u64::MAX };
            (pause, if extra < 6 { 100 + extra } else { world.random.below(100) }, world.pick_slot())
        };
        match pause {
            0 => {
                let ms = 1 + world.borrow_mut().random.below(30);
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            1..=8 => {
                for _ in 0..pause {
                    tokio::task::yield_now().await;
                }
            }
            _ => {}
        }
        let Some(id) = id else {
            create_any(&mut world.borrow_mut());
            tokio::task::yield_now().await;
            continue;
        };
        match action {
            0..=44 => append(&mut world.borrow_mut(), id),
            45..=49 => vote(&mut world.borrow_mut(), id),
            50..=54 => replace(&mut world.borrow_mut(), id),
            55..=74 => commit(&mut world.borrow_mut(), id),
            75..=78 => advance(&mut world.borrow_mut(), id),
            79..=81 => retain(&world, id).await,
            82..=84 => reconfigure(&mut world.borrow_mut(), id),
            85..=86 => create_any(&mut world.borrow_mut()),
            87 => delete(&world, id).await,
            100 if receives(&world) => receive(&world, id).await,
            100 => begin_anew(&mut world.borrow_mut(), id),
            101.. => read_entries(&world, id).await,
            88..=90 if is_keyed(id) => compact(&world, id).await,
            _ => read(&world, id).await,
        }
    }
}

/// Hears what a lane of a store says is done, and tells the model.
pub async fn listener(world: Shared, at: usize, lane: Lane) {
    let store = world.borrow().stores[at].clone();
    let mut seen = 0;
    loop {
        let news = store.next_durable(lane, seen).await;
        let mut world = world.borrow_mut();
        if world.machine.is_down() {
            return;
        }
        match news {
            Ok(durable) => {
                if durable <= seen {
                    world.blame(format!("the durable LSN went from {seen} to {durable}"));
                    return;
                }
                seen = durable;
                world.machine.note(&format!("store {at} {lane:?} {durable}"));
                for slot in world.slots.values_mut().filter(|slot| slot.store == at) {
                    slot.model.acknowledge(lane, durable);
                }
            }
            Err(_) => {
                world.poisoned = true;
                // Not because of a clean stop.
                if store.stats().poisoned {
                    world.process_ends.notify_one();
                }
                return;
            }
        }
    }
}
