//! The log as Raft wants to see it: the term of every index, and the newest entries themselves.
//!
//! Terms of the whole log are a short list of runs (`(first index, term)`, Kafka's leader epochs), so the bodies of entries
//! may go from memory as soon as they are applied and the other replicas have them. What a follower needs of older ones is
//! asked of the shell (`Wanted`), which reads segments and comes back with `Group::entries_read`.
//!
//! Invariants
//! - `terms` covers every index from `before_index + 1` to `last`, in rising order.
//! - Bodies are held for `loaded_from..=last`, without a gap; entries that are not applied are never let go.
//! - Raft's own questions (what is committed, is a membership change among it) are answered without bodies.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState as RaftHardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

use crate::mutant::{self, Mutant};
use crate::{EntriesWanted, GroupStart};

/// Changes of leader that a log remembers; a follower that agrees only with what is older begins anew. 256 KiB.
const RUNS_MAX: usize = 16_384;
/// Reads of old entries under way: one for every follower of a large group.
const WANTED_MAX: usize = 16;
/// Followers that wait for one read.
const WAITING_MAX: usize = 8;
/// Size of an entry without its body, for Raft's limit on what it takes at a time.
const HUSK_BYTES: u64 = 16;

struct Wanted {
    low: u64,
    high: u64,
    told: bool,
    waiting: Vec<GetEntriesContext>,
}

#[derive(Default)]
struct Outside {
    wanted: Vec<Wanted>,
    /// What the shell has read, while Raft takes it.
    read: Vec<Entry>,
    snapshot_for: Vec<u64>,
}

pub(crate) struct Tail {
    initial: RaftState,
    before_index: u64,
    before_term: u64,
    terms: VecDeque<(u64, u64)>,
    last: u64,
    loaded_from: u64,
    bodies: VecDeque<Entry>,
    bytes: usize,
    /// Membership changes below `loaded_from` that were not applied when the group started.
    memberships: BTreeMap<u64, Bytes>,
    snapshot: Option<Snapshot>,
    outside: RefCell<Outside>,
}

/// A group that nobody writes to holds one entry of its leader, and there are thousands of them: the first place is made for one
/// alone, where four would be.
fn reserve_one<T>(places: &mut VecDeque<T>) {
    if places.capacity() == 0 {
        places.reserve_exact(1);
    }
}

impl Tail {
    pub(crate) fn new(start: &GroupStart, commit: u64) -> Tail {
        let hard_state = RaftHardState {
            term: start.hard_state.term.max(start.last_term),
            vote: start.hard_state.vote,
            commit,
            ..RaftHardState::default()
        };
        let conf_state: ConfState = start.membership.to_conf_state();
        let (before_index, before_term) = start.before;
        Tail {
            initial: RaftState::new(hard_state, conf_state),
            before_index,
            before_term,
            terms: VecDeque::from(start.terms.clone()),
            last: start.last_index,
            loaded_from: start.last_index + 1,
            bodies: VecDeque::new(),
            bytes: 0,
            memberships: start.membership_entries.iter().cloned().collect(),
            snapshot: None,
            outside: RefCell::default(),
        }
    }

    /// Puts entries at the end, in place of what is there from the first of them on. True when something was replaced.
    pub(crate) fn append(&mut self, new: Vec<Entry>, applied: u64) -> bool {
        let Some(first) = new.first().map(|e| e.index) else { return false };
        assert!(first > applied, "an applied entry cannot be replaced");
        assert!(first > self.before_index && first <= self.last + 1, "the log must stay contiguous");
        let replaces = first <= self.last;
        if replaces {
            self.cut_from(first);
        }
        for entry in new {
            let newest = self.terms.back().copied().unwrap_or((self.before_index, self.before_term));
            let keeps = mutant::is(Mutant::KeepsReplacedTerms) && newest.0 >= entry.index;
            if newest.1 != entry.term && !keeps {
                reserve_one(&mut self.terms);
                self.terms.push_back((entry.index, entry.term));
            }
            self.bytes += entry.data.len();
            self.last = entry.index;
            reserve_one(&mut self.bodies);
            self.bodies.push_back(entry);
        }
        if self.terms.len() > RUNS_MAX && self.terms[1].0 <= applied + 1 {
            self.forget_oldest_run();
        }
        replaces
    }

    fn cut_from(&mut self, first: u64) {
        while self.bodies.back().is_some_and(|e| e.index >= first) {
            self.bytes -= self.bodies.pop_back().map_or(0, |e| e.data.len());
        }
        self.loaded_from = self.loaded_from.min(first);
        self.memberships.split_off(&first);
        if !mutant::is(Mutant::KeepsReplacedTerms) {
            while self.terms.back().is_some_and(|(index, _)| *index >= first) {
                self.terms.pop_back();
            }
        }
        self.last = first - 1;
    }

    fn forget_oldest_run(&mut self) {
        let oldest = self.terms.pop_front();
        if let (Some((_, term)), Some((next, _))) = (oldest, self.terms.front()) {
            (self.before_index, self.before_term) = (next - 1, term);
        }
    }

    /// Lets bodies go: those up to `needless` that nobody will ask for, and up to `applied` as many as are above `budget`.
    pub(crate) fn let_go(&mut self, needless: u64, applied: u64, budget: usize) {
        while let Some(front) = self.bodies.front() {
            if front.index > applied || (front.index > needless && self.bytes <= budget) {
                break;
            }
            self.bytes -= front.data.len();
            self.loaded_from = front.index + 1;
            self.bodies.pop_front();
        }
        while self.memberships.first_key_value().is_some_and(|(index, _)| *index <= applied) {
            self.memberships.pop_first();
        }
    }

    /// Entries up to `index`, which is applied, are gone from the segments.
    pub(crate) fn set_before(&mut self, index: u64) {
        if index <= self.before_index || index > self.last {
            return;
        }
        let Ok(term) = self.term(index) else { return };
        self.let_go(index, index, usize::MAX);
        while self.terms.get(1).is_some_and(|(first, _)| *first <= index + 1) {
            self.terms.pop_front();
        }
        if let Some(run) = self.terms.front_mut() {
            run.0 = run.0.max(index + 1);
        }
        if self.last == index {
            self.terms.clear();
        }
        (self.before_index, self.before_term) = (index, term);
        if self.snapshot.as_ref().is_some_and(|s| s.get_metadata().index < index) {
            self.snapshot = None;
        }
    }

    /// Begins anew after a snapshot.
    pub(crate) fn restart_after(&mut self, index: u64, term: u64) {
        (self.before_index, self.before_term, self.last, self.loaded_from) = (index, term, index, index + 1);
        self.terms.clear();
        self.bodies.clear();
        self.memberships.clear();
        self.bytes = 0;
        self.snapshot = None;
        self.forget_wanted();
    }

    pub(crate) fn offer(&mut self, snapshot: Snapshot) {
        self.snapshot = Some(snapshot);
    }

    /// The members changed: a follower that is not in a snapshot's membership could never begin with it.
    pub(crate) fn withdraw_offer(&mut self) {
        self.snapshot = None;
    }

    pub(crate) fn before_index(&self) -> u64 {
        self.before_index
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn forget_wanted(&mut self) {
        *self.outside.get_mut() = Outside::default();
    }

    /// Whether the shell has something to read or to make that it does not know of.
    pub(crate) fn asks(&self) -> bool {
        let outside = self.outside.borrow();
        !outside.snapshot_for.is_empty() || outside.wanted.iter().any(|w| !w.told)
    }

    pub(crate) fn take_wanted(&mut self) -> (Vec<EntriesWanted>, Vec<u64>) {
        let outside = self.outside.get_mut();
        let wanted = outside.wanted.iter_mut().filter(|w| !w.told);
        let wanted = wanted
            .map(|w| {
                w.told = true;
                EntriesWanted { low: w.low, high: w.high }
            })
            .collect();
        (wanted, std::mem::take(&mut outside.snapshot_for))
    }

    /// Takes what the shell has read from `low` on and says who waits for it. Entries that are no part of this log (it was
    /// cut meanwhile) are dropped; an empty list is a read that failed. Who waits asks again with the next heartbeat.
    pub(crate) fn take_read(&mut self, low: u64, read: Vec<Entry>) -> Vec<GetEntriesContext> {
        let fits = |(at, entry): (usize, &Entry)| {
            entry.index == low + at as u64 && self.term(entry.index).is_ok_and(|term| term == entry.term)
        };
        let fit = !read.is_empty() && read.iter().enumerate().all(fits);
        let outside = self.outside.get_mut();
        let Some(at) = outside.wanted.iter().position(|w| w.low == low) else { return Vec::new() };
        let wanted = outside.wanted.swap_remove(at);
        if !fit {
            return Vec::new();
        }
        outside.read = read;
        wanted.waiting
    }

    pub(crate) fn end_read(&mut self) {
        self.outside.get_mut().read = Vec::new();
    }

    /// Entries whose bodies Raft does not need: it asks what is committed, and whether a membership change is among it.
    fn husks(&self, low: u64, high: u64, max_size: u64) -> Result<Vec<Entry>> {
        let count = (high - low).min((max_size / HUSK_BYTES).max(1));
        let mut husks = Vec::with_capacity(usize::try_from(count).unwrap_or(usize::MAX));
        for index in low..low + count {
            let loaded = index.checked_sub(self.loaded_from).and_then(|at| self.bodies.get(at as usize));
            let mut husk = Entry { index, term: self.term(index)?, ..Entry::default() };
            if let Some(entry) = loaded {
                if entry.get_entry_type() != EntryType::EntryNormal {
                    husk = entry.clone();
                }
            } else if let Some(change) = self.memberships.get(&index) {
                husk.set_entry_type(EntryType::EntryConfChangeV2);
                husk.context = change.clone();
            }
            husks.push(husk);
        }
        Ok(husks)
    }

    fn ask_shell(&self, low: u64, high: u64, context: GetEntriesContext) {
        let mut outside = self.outside.borrow_mut();
        if let Some(wanted) = outside.wanted.iter_mut().find(|w| w.low == low) {
            if wanted.waiting.len() < WAITING_MAX {
                wanted.waiting.push(context);
            }
            // The shell may have put it off, and who asks now may be somebody who must not wait.
            wanted.told = false;
        } else if outside.wanted.len() < WANTED_MAX {
            let high = high.min(self.loaded_from);
            outside.wanted.push(Wanted { low, high, told: false, waiting: vec![context] });
        }
    }
}

impl Storage for Tail {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(self.initial.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low <= self.before_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let budget = max_size.into().unwrap_or(u64::MAX);
        if !context.can_async() {
            return self.husks(low, high, budget);
        }
        let limited = |entries: &mut dyn Iterator<Item = &Entry>| {
            let mut used = 0u64;
            let mut out = Vec::new();
            for entry in entries {
                used = used.saturating_add(entry.data.len() as u64);
                if used > budget && !out.is_empty() {
                    break;
                }
                out.push(entry.clone());
            }
            out
        };
        let count = (high - low) as usize;
        if low >= self.loaded_from {
            let from = (low - self.loaded_from) as usize;
            return Ok(limited(&mut self.bodies.iter().skip(from).take(count)));
        }
        let found = {
            let outside = self.outside.borrow();
            limited(&mut outside.read.iter().skip_while(|e| e.index < low).take(count))
        };
        if found.first().is_some_and(|entry| entry.index == low) {
            return Ok(found);
        }
        self.ask_shell(low, high, context);
        Err(Error::Store(StorageError::LogTemporarilyUnavailable))
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index == self.before_index {
            return Ok(self.before_term);
        }
        if index < self.before_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        if index > self.last {
            return Err(Error::Store(StorageError::Unavailable));
        }
        // Nearly every question is about the newest run.
        if let Some((first, term)) = self.terms.back()
            && *first <= index
        {
            return Ok(*term);
        }
        let at = self.terms.partition_point(|(first, _)| *first <= index);
        Ok(at.checked_sub(1).map_or(self.before_term, |at| self.terms[at].1))
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.before_index + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> Result<Snapshot> {
        if let Some(snapshot) = &self.snapshot
            && snapshot.get_metadata().index >= request_index.max(self.before_index)
        {
            return Ok(snapshot.clone());
        }
        let mut outside = self.outside.borrow_mut();
        if outside.snapshot_for.len() < WANTED_MAX && !outside.snapshot_for.contains(&to) {
            outside.snapshot_for.push(to);
        }
        Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}
