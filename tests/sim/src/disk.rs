//! One group's part of a disk: what survives a crash.

use bytes::Bytes;
use flumen_raft::{Entry, GroupStart, HardState, Membership, Outputs};

use crate::mutant::DriverMutant;

/// What one output wants stored.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub number: u64,
    hard_state: Option<HardState>,
    entries: Vec<Entry>,
    membership: Option<(u64, Membership)>,
    install: Option<(u64, u64, Membership, u64, i64)>,
}

impl Write {
    pub fn of(outputs: &Outputs) -> Write {
        let install = outputs.install.as_ref();
        Write {
            number: outputs.number,
            hard_state: outputs.hard_state,
            entries: outputs.entries.clone(),
            membership: outputs.membership.clone(),
            install: install.map(|i| {
                (i.index, i.term, i.membership.clone(), i.membership_index, snapshot_offset(&i.data))
            }),
        }
    }
}

/// A snapshot of the simulation is the offset at which the log begins.
pub(crate) fn snapshot_offset(data: &[u8]) -> i64 {
    data.try_into().map_or(0, i64::from_be_bytes)
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    pub hard_state: HardState,
    pub membership: Membership,
    pub membership_index: u64,
    pub before: (u64, u64),
    /// Offset at which the first entry begins.
    pub start_offset: i64,
    pub entries: Vec<Entry>,
}

impl Disk {
    pub fn write(&mut self, write: &Write, mutant: Option<DriverMutant>) {
        if let Some((index, term, membership, changed, offset)) = &write.install {
            (self.before, self.start_offset) = ((*index, *term), *offset);
            (self.membership, self.membership_index) = (membership.clone(), *changed);
            self.entries.clear();
        }
        if let Some(first) = write.entries.first() {
            let at = (first.index - self.before.0 - 1) as usize;
            if mutant == Some(DriverMutant::SkipsTruncation) {
                // Later indexes are written over one by one, and what stands behind stays.
                for entry in &write.entries {
                    let at = (entry.index - self.before.0 - 1) as usize;
                    if at < self.entries.len() {
                        self.entries[at] = entry.clone();
                    } else {
                        self.entries.push(entry.clone());
                    }
                }
            } else {
                self.entries.truncate(at);
                self.entries.extend(write.entries.iter().cloned());
            }
        }
        if let Some((index, membership)) = &write.membership {
            (self.membership, self.membership_index) = (membership.clone(), *index);
        }
        self.hard_state = write.hard_state.unwrap_or(self.hard_state);
    }

    /// Retention: entries up to `index` go.
    pub fn cut_front(&mut self, index: u64, start_offset: i64) {
        if index <= self.before.0 {
            return;
        }
        let count = ((index - self.before.0) as usize).min(self.entries.len());
        if let Some(last) = self.entries.drain(..count).next_back() {
            self.before = (last.index, last.term);
            self.start_offset = start_offset;
        }
    }

    pub fn start(&self, node_id: u64, seed: u64) -> GroupStart {
        let mut terms: Vec<(u64, u64)> = Vec::new();
        for entry in &self.entries {
            if terms.last().map_or(self.before.1, |(_, term)| *term) != entry.term {
                terms.push((entry.index, entry.term));
            }
        }
        let changes = self.entries.iter().filter(|e| e.is_membership && e.index > self.membership_index);
        let membership_entries: Vec<(u64, Bytes)> = changes.map(|e| (e.index, e.data.clone())).collect();
        let (last_index, last_term) = self.entries.last().map_or(self.before, |e| (e.index, e.term));
        GroupStart {
            node_id,
            membership: self.membership.clone(),
            membership_index: self.membership_index,
            membership_entries,
            hard_state: self.hard_state,
            before: self.before,
            terms,
            last_index,
            last_term,
            seed,
            // Groups of this world keep what they promise.
            abstains_below: 0,
        }
    }
}
