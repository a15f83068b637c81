//! What the store was told and what it has acknowledged, per partition; what may and what must be there after a crash.
//!
//! Pure. The store's promise is about an order: what was staged forms one sequence per partition, and a crash leaves a
//! beginning of it that includes everything acknowledged. So whatever is found must be the state after some number of
//! changes, and that number has a lower bound.

use std::collections::BTreeMap;

use bytes::Bytes;
use flumen_protocol::record_batch;
use flumen_storage::{HardState, LANES, Lane, Lsn};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub index: u64,
    pub term: u64,
    pub base: i64,
    pub next: i64,
    /// `None` for an entry without records.
    pub batch: Option<Bytes>,
    /// What such an entry says.
    pub control: Bytes,
}

/// Who the members are, as of the entry at an index.
pub type Membership = (u64, Bytes);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Create,
    Entry(Entry),
    Hard(HardState, Option<Membership>),
    /// The log begins anew after this, with producers that it has no batch of.
    Begin(Box<Log>),
    LogStart(i64),
    Delete,
}

#[derive(Debug, Clone)]
pub struct Step {
    pub change: Change,
    /// `None` where the store does not say; then the next one tells.
    pub commit: Option<(Lane, Lsn)>,
    /// The partition was to survive a loss of power when this was staged.
    pub durable: bool,
}

/// State of a log that exists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Log {
    /// Batches that it began with, which have no indexes; holes are between them.
    pub below: Vec<Entry>,
    pub entries: Vec<Entry>,
    pub hard: HardState,
    pub log_start: i64,
    /// Index, term and end of the entry before the first.
    pub before: (u64, u64, i64),
    pub membership: Option<Membership>,
    /// Producers that it began with: epoch, last sequence, base offset.
    pub brought: BTreeMap<i64, (i16, i32, i64)>,
    /// Producers that a crash was allowed to take, by the base offset of their last batch then.
    pub forgotten: BTreeMap<i64, i64>,
}

impl Log {
    pub fn last_index(&self) -> u64 {
        self.entries.last().map_or(self.before.0, |entry| entry.index)
    }

    pub fn last_term(&self) -> u64 {
        self.entries.last().map_or(self.before.1, |entry| entry.term)
    }

    pub fn log_end(&self) -> i64 {
        self.entries.last().map_or(self.before.2, |entry| entry.next)
    }

    pub fn entry(&self, index: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(index.checked_sub(self.before.0 + 1)?).ok()?)
    }

    /// Offset after the entry at `index`.
    pub fn end_of(&self, index: u64) -> i64 {
        self.entry(index).map_or(self.before.2, |entry| entry.next)
    }

    /// Batches that a reader of the whole log gets.
    pub fn batches(&self) -> impl Iterator<Item = &Entry> + '_ {
        self.all().filter(|entry| entry.batch.is_some() && entry.next > self.log_start)
    }

    pub fn all(&self) -> impl Iterator<Item = &Entry> + '_ {
        self.below.iter().chain(&self.entries)
    }

    /// The batch with `offset`, or the first one behind it.
    pub fn batch_at(&self, offset: i64) -> Option<&Entry> {
        let at = self.below.partition_point(|entry| entry.next <= offset);
        if let Some(below) = self.below.get(at) {
            return Some(below);
        }
        let at = self.entries.partition_point(|entry| entry.next <= offset);
        self.entries[at..].iter().find(|entry| entry.batch.is_some())
    }

    /// Entries that both have, from the first on.
    pub fn common(&self, other: &Log) -> u64 {
        if self.before != other.before {
            return self.before.0.min(other.before.0);
        }
        let same = self.entries.iter().zip(&other.entries).take_while(|(mine, theirs)| mine == theirs);
        self.before.0 + same.count() as u64
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Entry(entry) => {
                let kept = entry.index - 1 - self.before.0;
                self.entries.truncate(usize::try_from(kept).unwrap_or(usize::MAX));
                assert_eq!(self.last_index() + 1, entry.index, "the workload stages without gaps");
                self.entries.push(entry.clone());
            }
            Change::Hard(hard, membership) => {
                self.hard = *hard;
                self.membership = membership.clone().or(self.membership.take());
            }
            Change::Begin(log) => *self = (**log).clone(),
            Change::LogStart(offset) => self.log_start = self.log_start.max(*offset),
            Change::Create | Change::Delete => {}
        }
    }

    /// Last batch of every idempotent producer: epoch, last sequence, base offset.
    pub fn producers(&self) -> BTreeMap<i64, (i16, i32, i64)> {
        let mut found = self.brought.clone();
        for batch in self.all().filter_map(|entry| entry.batch.as_ref()) {
            if let Ok(header) = record_batch::parse_header(batch)
                && header.has_producer_id()
            {
                let last = (header.producer_epoch, header.last_sequence(), header.base_offset);
                found.insert(header.producer_id, last);
            }
        }
        found.retain(|id, (_, _, base)| self.forgotten.get(id).is_none_or(|forgotten| forgotten < base));
        found
    }
}

/// What a partition is as far as the test has told the store.
#[derive(Debug, Clone, Default)]
pub struct Partition {
    /// At the last restart, all of it durable; `None`: it does not exist.
    floor: Option<Log>,
    steps: Vec<Step>,
    /// Steps that were acknowledged, and those that a loss of power may not take either.
    acked: usize,
    safe: usize,
    now: Option<Log>,
}

fn fold(state: &mut Option<Log>, change: &Change) {
    match (change, &mut *state) {
        (Change::Create, _) => *state = Some(Log::default()),
        (Change::Delete, _) => *state = None,
        (_, Some(log)) => log.apply(change),
        (_, None) => unreachable!("nothing is staged to a partition that is not there"),
    }
}

impl Partition {
    pub fn stage(&mut self, change: Change, commit: Option<(Lane, Lsn)>, durable: bool) {
        fold(&mut self.now, &change);
        self.steps.push(Step { change, commit, durable });
    }

    /// The newest step was refused after all.
    pub fn take_back(&mut self) {
        self.steps.pop();
        self.now = self.floor.clone();
        let now = &mut self.now;
        self.steps.iter().for_each(|step| fold(now, &step.change));
    }

    /// The state at the last restart.
    pub fn floor(&self) -> Option<&Log> {
        self.floor.as_ref()
    }

    /// The state after everything staged.
    pub fn log(&self) -> Option<&Log> {
        self.now.as_ref()
    }

    /// The state after everything acknowledged.
    pub fn acknowledged(&self) -> Option<Log> {
        let mut state = self.floor.clone();
        self.steps[..self.acked].iter().for_each(|step| fold(&mut state, &step.change));
        state
    }

    /// Everything in this lane with this LSN or a lower one is done, the store says.
    pub fn acknowledge(&mut self, lane: Lane, done: Lsn) {
        let known = |step: &Step| step.commit.is_some_and(|(l, lsn)| l == lane && lsn <= done);
        let is_direct = |step: &Step| step.commit.is_some_and(|(l, _)| l == Lane::Direct);
        // A log start has its own record, which does not wait for what goes past the WAL.
        let overtakes = |at: usize| {
            matches!(self.steps[at].change, Change::LogStart(_))
                && self.steps[self.acked.min(at)..at]
                    .iter()
                    .any(|step| lane != Lane::Direct && is_direct(step))
        };
        let last = (0..self.steps.len()).rposition(|at| known(&self.steps[at]) && !overtakes(at));
        if let Some(last) = last {
            self.acked = self.acked.max(last + 1);
        }
        self.note_safe();
    }

    /// The deletion, which is the last there can be, was acknowledged: no restart brings it back, of either kind.
    pub fn acknowledge_deletion(&mut self) {
        self.stopped_cleanly();
    }

    fn note_safe(&mut self) {
        if let Some(last) = self.steps[..self.acked].iter().rposition(|step| step.durable) {
            self.safe = self.safe.max(last + 1);
        }
    }

    /// A clean stop leaves nothing to the kernel.
    pub fn stopped_cleanly(&mut self) {
        self.acked = self.steps.len();
        self.safe = self.acked;
    }

    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// All that was staged since the last restart is to survive a loss of power.
    pub fn is_durable(&self) -> bool {
        self.steps.iter().all(|step| step.durable)
    }

    /// Since the last restart it wrote to both lanes.
    pub fn has_two_lanes(&self) -> bool {
        let uses = |lane| self.steps.iter().any(|step| step.commit.is_some_and(|(l, _)| l == lane));
        // What goes past the logs may rest on either.
        LANES.into_iter().all(uses) || self.has_direct()
    }

    /// Since the last restart something of it went past the logs.
    pub fn has_direct(&self) -> bool {
        self.steps.iter().any(|step| step.commit.is_some_and(|(lane, _)| lane == Lane::Direct))
    }

    /// How many of the steps must be found.
    pub fn lower_bound(&self, power_loss: bool) -> usize {
        if power_loss { self.safe } else { self.acked }
    }

    /// How many steps are left without the newest commits that were acknowledged.
    pub fn before_last_commits(&self, count: usize) -> usize {
        let mut commits = Vec::new();
        for (at, step) in self.steps[..self.acked].iter().enumerate().rev() {
            if let Some(commit) = step.commit.filter(|commit| !commits.contains(commit)) {
                if commits.len() == count {
                    return at + 1;
                }
                commits.push(commit);
            }
        }
        0
    }

    /// The states after `from` steps and after each further one, the last one first, with the number of steps.
    pub fn states_from(&self, from: usize) -> Vec<(usize, Option<Log>)> {
        let mut state = self.floor.clone();
        self.steps[..from].iter().for_each(|step| fold(&mut state, &step.change));
        let mut found = vec![(from, state.clone())];
        for (at, step) in self.steps.iter().enumerate().skip(from) {
            fold(&mut state, &step.change);
            found.push((at + 1, state.clone()));
        }
        found.reverse();
        found
    }

    /// Recovery came to this state and made it durable.
    pub fn rebase(&mut self, state: Option<Log>) {
        *self = Self { floor: state.clone(), now: state, ..Self::default() };
    }
}
