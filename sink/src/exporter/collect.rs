//! Reading the log of all partitions, fairly, until a block is worth sending.
//!
//! Owns when a block ends (target lag, rows, bytes) and which partition is read first. Runs beside the delivery of the
//! block before it, on the same thread. Invariants: a read starts where the last one ended; no partition is read twice
//! before the others were offered a turn; nothing is remembered when it is dropped. It records nothing.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flumen_protocol::record_batch;

use super::board::Board;
use super::encode::{Encoded, Encoder, Input, Limits, Rules};
use crate::plan::{MAX_RANGES, Plan};
use crate::source::{Source, SourceError};

/// Bytes per turn of a partition.
const TURN_BYTES: usize = 1 << 20;
/// How long an idle export waits for a wake-up before it looks by itself.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// Between two looks while a block fills: short against the target lag, long against a look.
const LOOKS_PER_LINGER: u32 = 8;
const SHORTEST_LOOK: Duration = Duration::from_millis(5);

/// What the collector needs to know besides the log.
#[derive(Clone, Debug)]
pub struct CollectArgs {
    pub positions: BTreeMap<i32, i64>,
    pub limits: Limits,
    /// How long the first record seen may wait for company.
    pub linger: Duration,
    /// No insert before this: bounds the part rate.
    pub not_before: Instant,
    /// Which partition begins, counting from the lowest; differs from plan to plan.
    pub turn: usize,
}

pub struct Prepared {
    pub encoder: Encoder,
    pub encoded: Encoded,
}

pub enum CollectEnd {
    Prepared(Box<Prepared>),
    /// Partitions without a position.
    NewPartitions(Vec<i32>),
    Failed(SourceError),
}

struct Pending {
    first: i64,
    next: i64,
    last_stable_offset: i64,
    batches: Vec<Bytes>,
}

pub async fn collect<S: Source>(
    source: Rc<S>,
    board: Rc<RefCell<Board>>,
    mut encoder: Encoder,
    args: CollectArgs,
) -> CollectEnd {
    let mut pending: BTreeMap<i32, Pending> = BTreeMap::new();
    let mut order: VecDeque<i32> = VecDeque::new();
    let (mut records, mut bytes) = (0usize, 0usize);
    let mut first_seen: Option<Instant> = None;
    loop {
        let partitions = source.partitions().await;
        let new: Vec<i32> = partitions.iter().copied().filter(|p| !args.positions.contains_key(p)).collect();
        if !new.is_empty() {
            return CollectEnd::NewPartitions(new);
        }
        if order.len() != partitions.len() {
            let mut sorted = partitions;
            sorted.sort_unstable();
            let turn = if sorted.is_empty() { 0 } else { args.turn % sorted.len() };
            sorted.rotate_left(turn);
            order = sorted.into();
        }
        // One look: every partition gets turns until all are read out or the block is full.
        let mut open: VecDeque<i32> = order.clone();
        let full = |records: usize, bytes: usize| records >= args.limits.rows || bytes >= args.limits.bytes;
        while let Some(partition) = open.pop_front() {
            if full(records, bytes) {
                break;
            }
            let from = match (pending.get(&partition), args.positions.get(&partition)) {
                (Some(pending), _) => pending.next,
                (None, Some(position)) => *position,
                (None, None) => continue,
            };
            let read = match source.read(partition, from, TURN_BYTES).await {
                Ok(read) => read,
                Err(SourceError::NotAvailable { .. }) => continue,
                Err(e) => return CollectEnd::Failed(e),
            };
            board.borrow_mut().seen(partition, read.last_stable_offset, read.log_start_offset);
            let entry = pending.entry(partition).or_insert_with(|| Pending {
                first: from,
                next: from,
                last_stable_offset: read.last_stable_offset,
                batches: Vec::new(),
            });
            entry.last_stable_offset = read.last_stable_offset;
            let before = entry.next;
            for batch in read.batches {
                let Ok(header) = record_batch::parse(&batch) else {
                    return CollectEnd::Failed(SourceError::Broker(format!(
                        "the log handed out a damaged batch after offset {} of partition {partition}",
                        entry.next
                    )));
                };
                if header.base_offset >= read.last_stable_offset {
                    break;
                }
                if header.last_offset() < entry.next {
                    continue;
                }
                records = records.saturating_add(usize::try_from(header.record_count).unwrap_or(0));
                bytes = bytes.saturating_add(batch.len());
                entry.next = header.next_offset();
                entry.batches.push(batch);
            }
            if entry.batches.is_empty() {
                pending.remove(&partition);
            } else if entry.next > before {
                first_seen.get_or_insert_with(Instant::now);
                if entry.next < read.last_stable_offset {
                    open.push_back(partition);
                }
            }
        }
        let Some(seen) = first_seen else {
            let positions: Vec<(i32, i64)> = args.positions.iter().map(|(p, o)| (*p, *o)).collect();
            source.wait(&positions, IDLE_WAIT).await;
            // A source that returns early must not make this a busy loop.
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        let now = Instant::now();
        let due =
            if full(records, bytes) { args.not_before } else { args.not_before.max(seen + args.linger) };
        if now < due {
            let look = (args.linger / LOOKS_PER_LINGER).max(SHORTEST_LOOK);
            let wait = if full(records, bytes) { due - now } else { (due - now).min(look) };
            tokio::time::sleep(wait).await;
            if Instant::now() < due || !full(records, bytes) {
                continue;
            }
        }
        break;
    }
    let inputs: Vec<Input> = order
        .iter()
        .filter_map(|partition| {
            let pending = pending.remove(partition)?;
            let end = pending.last_stable_offset;
            Some(Input { partition: *partition, first: pending.first, end, batches: pending.batches })
        })
        .take(MAX_RANGES)
        .collect();
    let started = Instant::now();
    let encoded = encoder.encode(&inputs, &Rules::default(), Some(args.limits)).await;
    let metrics = board.borrow().metrics.clone();
    metrics.encode_us.fetch_add(u64::try_from(started.elapsed().as_micros()).unwrap_or(0), Relaxed);
    metrics.raw_bytes.fetch_add(encoded.raw_bytes, Relaxed);
    CollectEnd::Prepared(Box::new(Prepared { encoder, encoded }))
}

/// Reads a plan's ranges again.
pub async fn read_ranges<S: Source>(source: &S, plan: &Plan) -> Result<Vec<Input>, SourceError> {
    let mut inputs = Vec::with_capacity(plan.ranges.len());
    for range in &plan.ranges {
        let end = range.last.saturating_add(1);
        let mut input = Input { partition: range.partition, first: range.first, end, batches: Vec::new() };
        let mut next = range.first;
        while next < end {
            let read = source.read(range.partition, next, TURN_BYTES).await?;
            if read.last_stable_offset < end {
                return Err(SourceError::Broker(format!(
                    "partition {} ends at {} below planned offset {}",
                    range.partition, read.last_stable_offset, range.last
                )));
            }
            let before = next;
            for batch in read.batches {
                let header = record_batch::parse(&batch).map_err(|e| SourceError::Broker(e.to_string()))?;
                if header.base_offset >= end {
                    next = end;
                    break;
                }
                if header.last_offset() >= next {
                    next = header.next_offset();
                    input.batches.push(batch);
                }
            }
            if next == before {
                // Nothing is left in the range: its last offsets hold no record.
                break;
            }
        }
        inputs.push(input);
    }
    Ok(inputs)
}
