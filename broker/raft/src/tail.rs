//! The end of the log as Raft wants to see it: entries that are not yet applied, in memory.
//!
//! Raft re-reads committed entries through this; everything before `first_index` lives in the segments.
//! In a group of one nobody asks for older entries, so they are forgotten as soon as they are applied.

use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState as RaftHardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

use crate::GroupStart;

pub(crate) struct Tail {
    initial: RaftState,
    /// Index and term of the entry just before `entries`.
    before_index: u64,
    before_term: u64,
    entries: VecDeque<Entry>,
}

impl Tail {
    pub(crate) fn new(start: &GroupStart, commit: u64) -> Tail {
        let hard_state = RaftHardState {
            term: start.hard_state.term.max(start.last_term),
            vote: start.hard_state.vote,
            commit,
            ..RaftHardState::default()
        };
        let conf_state = ConfState { voters: start.voters.clone(), ..ConfState::default() };
        Tail {
            initial: RaftState::new(hard_state, conf_state),
            before_index: start.last_index,
            before_term: start.last_term,
            entries: VecDeque::new(),
        }
    }

    pub(crate) fn append(&mut self, new: Vec<Entry>) {
        let Some(first) = new.first() else { return };
        assert!(first.index > self.before_index, "an applied entry cannot be replaced");
        // A new leader may replace what an old one left behind.
        while self.entries.back().is_some_and(|e| e.index >= first.index) {
            self.entries.pop_back();
        }
        assert_eq!(first.index, self.last() + 1, "the log must stay contiguous");
        self.entries.extend(new);
    }

    pub(crate) fn forget_until(&mut self, index: u64) {
        while self.entries.front().is_some_and(|e| e.index <= index) {
            if let Some(entry) = self.entries.pop_front() {
                self.before_index = entry.index;
                self.before_term = entry.term;
            }
        }
    }

    fn last(&self) -> u64 {
        self.before_index + self.entries.len() as u64
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
        _context: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low <= self.before_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        let from = (low - self.before_index - 1) as usize;
        let count = high.saturating_sub(low) as usize;
        let budget = max_size.into().unwrap_or(u64::MAX);
        let mut used = 0u64;
        let mut out = Vec::new();
        for entry in self.entries.iter().skip(from).take(count) {
            used = used.saturating_add(entry.data.len() as u64);
            if used > budget && !out.is_empty() {
                break;
            }
            out.push(entry.clone());
        }
        Ok(out)
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index == self.before_index {
            return Ok(self.before_term);
        }
        if index < self.before_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        self.entries
            .get((index - self.before_index - 1) as usize)
            .map(|e| e.term)
            .ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.before_index + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, _request_index: u64, _to: u64) -> Result<Snapshot> {
        // A follower that needs older entries is served from segments, never by a Raft snapshot of data.
        Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}
