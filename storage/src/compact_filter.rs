//! Second half of a compaction pass: what becomes of each batch of the log, from its start to the end of the pass. Pure.
//!
//! Offsets never change: a batch keeps its base and last offset whatever goes out of it. A batch goes when nothing is left
//! of it, unless it is the newest of its producer (in the log, or in the part that is compacted), whose epoch and sequence
//! it carries: then it stays without records, as Kafka does it. Where nothing goes, the batch keeps its very bytes. What
//! cannot be decoded stays as it is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use flumen_protocol::compression::Compression;
use flumen_protocol::record::{BatchBuilder, Record, RecordError, RecordsBuf};
use flumen_protocol::record_batch::BatchHeader;

use crate::compact_map::KeyHash;
use crate::compact_scan::{Aborted, DECOMPRESSED_MAX_BYTES, Marker, Scan, marker_of};
use crate::mutant::{self, Mutant};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    Goes,
    Stays,
    Replaced(Bytes),
}

#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Everything from here on stays as it is.
    pub upper: i64,
    pub now_ms: i64,
    pub delete_retention_ms: i64,
}

#[derive(Debug)]
pub struct Filter {
    scan: Scan,
    rules: Rules,
    /// Of every producer that the log knows: its epoch, and the last offset of its newest batch of data; and the same of the
    /// newest one below the end of the pass, which is the newest again should those above it be lost or replaced.
    newest: BTreeMap<i64, Vec<(i16, Option<i64>)>>,
    /// Aborted transactions of each producer in the part that was scanned, oldest first.
    aborted: BTreeMap<i64, VecDeque<Aborted>>,
    /// Producers of which this pass has met data that no marker has ended yet.
    unended: BTreeSet<i64>,
    buf: RecordsBuf,
    pub records_dropped: u64,
}

/// What one record comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Keep,
    KeepTombstone,
    Drop,
}

impl Filter {
    pub fn new(scan: Scan, rules: Rules, newest: impl Iterator<Item = (i64, i16, Option<i64>)>) -> Self {
        let mut aborted: BTreeMap<i64, VecDeque<Aborted>> = BTreeMap::new();
        for transaction in &scan.aborted {
            aborted.entry(transaction.producer_id).or_default().push_back(*transaction);
        }
        let mut carriers: BTreeMap<i64, Vec<(i16, Option<i64>)>> = BTreeMap::new();
        for (id, epoch, last) in newest {
            carriers.entry(id).or_default().push((epoch, last));
        }
        for (id, known) in &mut carriers {
            if mutant::is(Mutant::ForgetsProducers) {
                known.clear();
                continue;
            }
            known.extend(scan.producers.get(id).map(|(epoch, last)| (*epoch, Some(*last))));
        }
        Self {
            scan,
            rules,
            newest: carriers,
            aborted,
            unended: BTreeSet::new(),
            buf: RecordsBuf::new(),
            records_dropped: 0,
        }
    }

    /// Batches come in the order of the log.
    pub fn decide(&mut self, header: &BatchHeader, batch: &[u8]) -> Fate {
        if header.next_offset() > self.rules.upper {
            return Fate::Stays;
        }
        if header.is_control() { self.marker(header, batch) } else { self.data(header, batch) }
    }

    /// A marker stays while anything of its transaction does, and then for as long as a tombstone would.
    fn marker(&mut self, header: &BatchHeader, batch: &[u8]) -> Fate {
        if header.record_count == 0 {
            return self.left(header);
        }
        if marker_of(&mut self.buf, batch) == Marker::Other {
            return Fate::Stays;
        }
        let passed = |transaction: &Aborted| transaction.marker <= header.base_offset;
        if let Some(aborted) = self.aborted.get_mut(&header.producer_id) {
            while aborted.front().is_some_and(passed) {
                aborted.pop_front();
            }
        }
        if self.unended.remove(&header.producer_id) {
            return Fate::Stays;
        }
        match header.delete_horizon_ms() {
            Some(horizon) if self.rules.now_ms >= horizon => {
                self.records_dropped += u64::try_from(header.record_count).unwrap_or(0);
                self.left(header)
            }
            Some(_) => Fate::Stays,
            None => self.rebuilt(header, batch, self.horizon(), |_| Verdict::Keep).unwrap_or(Fate::Stays),
        }
    }

    fn data(&mut self, header: &BatchHeader, batch: &[u8]) -> Fate {
        let mut is_aborted = false;
        if header.is_transactional() {
            self.unended.insert(header.producer_id);
            let next = self.aborted.get(&header.producer_id).and_then(VecDeque::front);
            is_aborted = next.is_some_and(|transaction| header.base_offset >= transaction.first);
        }
        if is_aborted {
            self.records_dropped += u64::try_from(header.record_count).unwrap_or(0);
            return self.left(header);
        }
        let (map, seed) = (&self.scan.map, self.scan.seed);
        let expired = header.delete_horizon_ms().is_some_and(|horizon| self.rules.now_ms >= horizon);
        let verdict = |record: &Record<'_>| {
            // A record without a key has no place in a compacted log; produce refuses it.
            let Some(key) = record.key else { return Verdict::Drop };
            let newest = map.get(KeyHash::of(seed, key));
            match (record.value, newest) {
                (_, Some(newest)) if newest > record.offset => Verdict::Drop,
                (Some(_), Some(_)) if mutant::is(Mutant::DropsNewestOfKey) => Verdict::Drop,
                (Some(_), _) => Verdict::Keep,
                (None, _) if expired => Verdict::Drop,
                (None, _) => Verdict::KeepTombstone,
            }
        };
        let Ok((kept, tombstones)) = count(&mut self.buf, batch, verdict) else { return Fate::Stays };
        let total = header.record_count;
        self.records_dropped += u64::try_from(total - kept).unwrap_or(0);
        if kept == 0 {
            return self.left(header);
        }
        let horizon = (tombstones && header.delete_horizon_ms().is_none()).then(|| self.horizon());
        if kept == total && horizon.is_none() {
            return Fate::Stays;
        }
        rebuild(&mut self.buf, header, batch, horizon, verdict).unwrap_or(Fate::Stays)
    }

    fn horizon(&self) -> i64 {
        self.rules.now_ms.saturating_add(self.rules.delete_retention_ms)
    }

    fn rebuilt(
        &mut self,
        header: &BatchHeader,
        batch: &[u8],
        horizon: i64,
        verdict: impl Fn(&Record<'_>) -> Verdict,
    ) -> Result<Fate, RecordError> {
        rebuild(&mut self.buf, header, batch, Some(horizon), verdict)
    }

    /// Nothing is left of the batch but what it says of its producer.
    fn left(&self, header: &BatchHeader) -> Fate {
        let newest = self.newest.get(&header.producer_id).filter(|_| header.has_producer_id());
        let carries = newest.into_iter().flatten().any(|(epoch, last)| match last {
            Some(last) => !header.is_control() && header.last_offset() == *last,
            None => header.is_control() && header.producer_epoch == *epoch,
        });
        if !carries {
            return Fate::Goes;
        }
        if header.record_count == 0 {
            return Fate::Stays;
        }
        let Ok(mut builder) = BatchBuilder::replacing(header, None) else { return Fate::Stays };
        builder.compression(Compression::None).last_offset_delta(header.last_offset_delta);
        Fate::Replaced(builder.build(header.base_offset).freeze())
    }
}

/// How many records stay, and whether there are tombstones among them.
fn count(
    buf: &mut RecordsBuf,
    batch: &[u8],
    verdict: impl Fn(&Record<'_>) -> Verdict,
) -> Result<(i32, bool), RecordError> {
    let (mut kept, mut tombstones) = (0, false);
    for record in buf.decode(batch, DECOMPRESSED_MAX_BYTES)? {
        let verdict = verdict(&record?);
        kept += i32::from(verdict != Verdict::Drop);
        tombstones |= verdict == Verdict::KeepTombstone;
    }
    Ok((kept, tombstones))
}

fn rebuild(
    buf: &mut RecordsBuf,
    header: &BatchHeader,
    batch: &[u8],
    horizon: Option<i64>,
    verdict: impl Fn(&Record<'_>) -> Verdict,
) -> Result<Fate, RecordError> {
    let mut builder = BatchBuilder::replacing(header, horizon)?;
    let mut last = -1;
    for record in buf.decode(batch, DECOMPRESSED_MAX_BYTES)? {
        let record = record?;
        if verdict(&record) == Verdict::Drop {
            continue;
        }
        let delta = i32::try_from(record.offset - header.base_offset).map_err(|_| RecordError::Malformed)?;
        // Offsets that do not rise were not written by us: such a batch stays as it is.
        if delta <= last {
            return Err(RecordError::Malformed);
        }
        last = delta;
        builder.append_at(delta, record.timestamp, record.key, record.value, record.headers);
    }
    builder.last_offset_delta(header.last_offset_delta);
    Ok(Fate::Replaced(builder.build(header.base_offset).freeze()))
}
