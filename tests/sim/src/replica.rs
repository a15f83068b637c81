//! One group on one broker: its log with offsets, and who waits for it. The part that `broker::partition` plays.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use flumen_raft::{Entry, Group, Membership};

use crate::disk::Disk;

pub(crate) const BATCH_BYTES: usize = 20;

/// Base offset, first value, number of records: a batch of the simulation.
pub(crate) fn batch(base: i64, value: u64, count: u32) -> Bytes {
    let mut out = BytesMut::with_capacity(BATCH_BYTES);
    out.put_i64(base);
    out.put_u64(value);
    out.put_u32(count);
    out.freeze()
}

/// (base offset, first value, number of records), or none for entries without offsets.
pub(crate) fn parse(entry: &Entry) -> Option<(i64, u64, u32)> {
    if entry.is_membership || entry.data.len() != BATCH_BYTES {
        return None;
    }
    let base = i64::from_be_bytes(entry.data[..8].try_into().ok()?);
    let value = u64::from_be_bytes(entry.data[8..16].try_into().ok()?);
    let count = u32::from_be_bytes(entry.data[16..20].try_into().ok()?);
    Some((base, value, count))
}

pub(crate) struct Waiting {
    pub index: u64,
    pub term: u64,
    pub client: usize,
    pub op: u64,
    pub base: i64,
}

pub(crate) struct Replica {
    pub group: Group,
    pub before: u64,
    pub start_offset: i64,
    pub log: Vec<Entry>,
    /// Log end offset behind each entry of `log`.
    pub ends: Vec<i64>,
    pub next_offset: i64,
    pub high_watermark: i64,
    pub committed: u64,
    pub waiting: VecDeque<Waiting>,
    /// Reads that ask for the end: token, client, op.
    pub asked: Vec<(u64, usize, u64)>,
    /// Outputs that wait for the disk, by number.
    pub members: Membership,
}

impl Replica {
    pub fn start(disk: &Disk, node_id: u64, seed: u64) -> Result<Replica, String> {
        let group = Group::start(&disk.start(node_id, seed)).map_err(|e| e.to_string())?;
        let mut replica = Replica {
            group,
            before: disk.before.0,
            start_offset: disk.start_offset,
            log: Vec::new(),
            ends: Vec::new(),
            next_offset: disk.start_offset,
            high_watermark: disk.start_offset,
            committed: disk.before.0,
            waiting: VecDeque::new(),
            asked: Vec::new(),
            members: disk.membership.clone(),
        };
        replica.append(&disk.entries)?;
        replica.next_offset = replica.log_end();
        // What was committed before the start is not told again.
        let committed = replica.group.status().applied_index;
        if let Some(at) = committed.checked_sub(replica.before + 1) {
            replica.committed = committed;
            replica.high_watermark = replica.ends.get(at as usize).copied().unwrap_or(replica.start_offset);
        }
        Ok(replica)
    }

    pub fn log_end(&self) -> i64 {
        self.ends.last().copied().unwrap_or(self.start_offset)
    }

    /// Takes entries into the log. The offset of a batch must be the end of what stands before it.
    pub fn append(&mut self, entries: &[Entry]) -> Result<(), String> {
        let Some(first) = entries.first() else { return Ok(()) };
        let at = (first.index - self.before - 1) as usize;
        if at > self.log.len() {
            return Err(format!("a gap before index {}", first.index));
        }
        self.log.truncate(at);
        self.ends.truncate(at);
        for entry in entries {
            let mut end = self.log_end();
            if let Some((base, _, count)) = parse(entry) {
                if base != end {
                    return Err(format!("index {} has offset {base}, the log ends at {end}", entry.index));
                }
                end += i64::from(count);
            }
            self.log.push(entry.clone());
            self.ends.push(end);
        }
        Ok(())
    }

    pub fn install(&mut self, index: u64, offset: i64) {
        (self.before, self.start_offset, self.next_offset) = (index, offset, offset);
        self.log.clear();
        self.ends.clear();
        self.committed = self.committed.max(index);
        self.high_watermark = self.high_watermark.max(offset);
    }

    pub fn cut_front(&mut self, index: u64) -> i64 {
        let count = ((index.saturating_sub(self.before)) as usize).min(self.log.len());
        if count > 0 {
            self.log.drain(..count);
            let end = self.ends.drain(..count).next_back();
            self.start_offset = end.unwrap_or(self.start_offset);
            self.before = index;
        }
        self.start_offset
    }

    /// The next that waits for an entry up to this one.
    pub fn answerable(&mut self, index: u64) -> Option<Waiting> {
        if self.waiting.front().is_some_and(|w| w.index <= index) { self.waiting.pop_front() } else { None }
    }

    pub fn entry(&self, index: u64) -> Option<&Entry> {
        self.log.get(index.checked_sub(self.before + 1)? as usize)
    }

    /// (offset, value) of records from an offset on, below another.
    pub fn records(&self, from: i64, upper: i64, max: usize) -> Vec<(i64, u64)> {
        let first = self.ends.partition_point(|end| *end <= from);
        let batches = self.log[first..].iter().filter_map(parse);
        batches
            .flat_map(|(base, value, count)| (0..u64::from(count)).map(move |n| (base + n as i64, value + n)))
            .filter(|(offset, _)| *offset >= from && *offset < upper)
            .take(max)
            .collect()
    }

    pub fn digest(&self, from: i64, upper: i64) -> u64 {
        let step = |hash: u64, n: u64| (hash ^ n).wrapping_mul(0x100_0000_01B3).rotate_left(23);
        let records = self.records(from, upper, usize::MAX);
        records.iter().fold(0xCBF2_9CE4, |hash, (offset, value)| step(step(hash, *offset as u64), *value))
    }
}
