//! How much of the state log is still needed. Pure: the manager tells it what was written and cuts the log as it says.
//!
//! Owns the rule alone. Invariants: nothing at or above an export's last snapshot is given up, nor anything of an export
//! that has none; an export whose topic is gone needs nothing.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

/// Records that stay whatever snapshots say: an export that starts again finds in them the plans that were settled in
/// the last minutes, which its audit still has to count.
pub const KEPT_RECORDS: i64 = 2_000;
/// A cut is worth its own record in the log from so many records on.
const CUT_RECORDS: i64 = 1_000;

#[derive(Debug, Default)]
pub struct StateTrim {
    start: i64,
    end: i64,
    /// Per exported topic, the first record that replay needs: its last snapshot, or its first record.
    needed: BTreeMap<Uuid, i64>,
}

impl StateTrim {
    pub fn new(start: i64) -> StateTrim {
        StateTrim { start, end: start, needed: BTreeMap::new() }
    }

    pub fn appended(&mut self, topic: Uuid, offset: i64) {
        self.needed.entry(topic).or_insert(offset);
        self.end = self.end.max(offset + 1);
    }

    /// The record at `offset` is a snapshot.
    pub fn snapshot(&mut self, topic: Uuid, offset: i64) {
        self.needed.insert(topic, offset);
        self.end = self.end.max(offset + 1);
    }

    /// Topics that no longer exist need nothing.
    pub fn retain(&mut self, live: &BTreeSet<Uuid>) {
        self.needed.retain(|topic, _| live.contains(topic));
    }

    /// Where the log may begin, if it is worth cutting it there.
    pub fn due(&self) -> Option<i64> {
        let needed = self.needed.values().copied().min().unwrap_or(self.end);
        let target = needed.min(self.end - KEPT_RECORDS);
        (target - self.start >= CUT_RECORDS).then_some(target)
    }

    pub fn cut(&mut self, start: i64) {
        self.start = start;
    }

    /// Exports that keep the log from being cut for want of a snapshot.
    pub fn laggards(&self) -> Vec<Uuid> {
        let oldest = self.end - KEPT_RECORDS - CUT_RECORDS;
        self.needed.iter().filter(|(_, offset)| **offset < oldest).map(|(topic, _)| *topic).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Uuid = Uuid::from_u128(1);
    const IDLE: Uuid = Uuid::from_u128(2);

    #[test]
    fn the_oldest_snapshot_and_the_last_records_stay() {
        let mut trim = StateTrim::new(0);
        trim.appended(IDLE, 0);
        (1..5_000).for_each(|offset| trim.appended(BUSY, offset));
        assert_eq!(trim.due(), None, "no export has a snapshot");
        assert_eq!(trim.laggards(), [BUSY, IDLE]);
        trim.snapshot(BUSY, 5_000);
        assert_eq!(trim.due(), None, "the idle one needs its first record");
        assert_eq!(trim.laggards(), [IDLE]);
        trim.snapshot(IDLE, 5_001);
        assert_eq!(trim.due(), Some(5_002 - KEPT_RECORDS));
        trim.cut(5_002 - KEPT_RECORDS);
        assert_eq!((trim.due(), trim.laggards()), (None, Vec::new()));
        (5_002..9_000).for_each(|offset| trim.appended(BUSY, offset));
        assert_eq!(trim.due(), Some(5_000), "never beyond a snapshot");
    }

    #[test]
    fn a_deleted_topic_holds_nothing() {
        let mut trim = StateTrim::new(100);
        trim.appended(IDLE, 100);
        (101..4_000).for_each(|offset| trim.appended(BUSY, offset));
        trim.snapshot(BUSY, 4_000);
        assert_eq!(trim.due(), None);
        trim.retain(&BTreeSet::from([BUSY]));
        assert_eq!(trim.due(), Some(4_001 - KEPT_RECORDS));
        trim.retain(&BTreeSet::new());
        assert_eq!(trim.due(), Some(4_001 - KEPT_RECORDS), "the last records stay for their own sake");
    }
}
