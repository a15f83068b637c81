//! A data directory as text: what each partition's segments and the write-ahead log hold, line by line.
//!
//! Offline like `inspect.rs`, of which this is the talkative side: prints what is there, whole or not, and judges nothing.
//! Batch lines have the words of Kafka's own dump tool. Record values may be secret, so they are printed only when asked for.

use std::path::Path;

use flumen_io::Mode;
use flumen_protocol::record::RecordsBuf;
use flumen_protocol::record_batch::{self, BatchHeader};

use crate::anew;
use crate::data_dir::open_error;
use crate::group_state::GroupState;
use crate::inspect::{Batches, Found, Inspection};
use crate::recovery;
use crate::types::{LANES, OpenError};
use crate::wal_format::{
    BATCH, BEGINNING, BEGINNING_WITH, CONTROL, GROUP_DELETE, GROUP_STATE, HARD_STATE, LOG_START, NOTHING,
    PRODUCERS, RecordHeader, judge, records, scan,
};

/// A batch that opens to more than that is described and not opened: no producer gets such a batch in.
const RECORDS_MAX_BYTES: usize = 256 << 20;

#[derive(Debug, Clone, Default)]
pub struct DumpOptions {
    /// Directory name or its beginning up to the group (`orders-0`); all partitions when absent.
    pub partition: Option<String>,
    /// Segments from the one that has this offset on.
    pub from_offset: i64,
    /// Each record: offset, time, sizes; with `values` its key and value too.
    pub records: bool,
    pub values: bool,
    /// The write-ahead log in place of the segments.
    pub wal: bool,
}

impl Inspection {
    /// Prints through `line`, which ends the dump by returning `false`.
    pub fn dump(&self, options: &DumpOptions, line: &mut dyn FnMut(String) -> bool) -> Result<(), OpenError> {
        if options.wal { self.dump_wal(options, line) } else { self.dump_segments(options, line) }
    }

    fn dump_segments(
        &self,
        options: &DumpOptions,
        line: &mut dyn FnMut(String) -> bool,
    ) -> Result<(), OpenError> {
        let wal = self.root().join("wal");
        let current = recovery::read_current(self.files(), &wal.join("current"))?;
        let mut states = recovery::read_states(self.files(), &wal, current)?;
        let log = self.root().join("log");
        let listed = self.files().list(&log).map_err(|e| open_error(&log, "listing", e))?;
        let mut names: Vec<String> = listed.into_iter().filter(|e| e.is_dir).map(|e| e.name).collect();
        names.sort_unstable();
        names.retain(|name| options.partition.as_ref().is_none_or(|wanted| is_named(name, wanted)));
        if names.is_empty()
            && let Some(wanted) = &options.partition
        {
            return Err(OpenError::Config(format!(
                "no partition {wanted} in {}; its directories are named <topic>-<partition>.g<group>",
                log.display()
            )));
        }
        for name in names {
            let dir = log.join(&name);
            if !line(format!("Partition {name}")) {
                return Ok(());
            }
            let entries = recovery::list(self.files(), &dir)?;
            let base = recovery::look_at(self.files(), &dir, &name, &entries, &mut states, current)?.base;
            let text = match (&base.state, base.is_saved) {
                (Some(state), true) => format!("  state of the last recovery: {}", describe_state(state)),
                (Some(state), false) => format!("  group.meta: {}", describe_state(state)),
                (None, _) => "  state: missing or damaged, or in the WAL alone".to_owned(),
            };
            if !line(text) {
                return Ok(());
            }
            let (segments, _) = self.segments(&dir)?;
            for (at, (name, len)) in segments.iter().enumerate() {
                if segments.get(at + 1).is_some_and(|(next, _)| next.base <= options.from_offset) {
                    continue;
                }
                let path = dir.join(name.log_file());
                if !line(format!("Dumping {}", path.display()))
                    || !self.dump_segment(&path, *len, options, line)?
                {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn dump_segment(
        &self,
        path: &Path,
        bytes: u64,
        options: &DumpOptions,
        line: &mut dyn FnMut(String) -> bool,
    ) -> Result<bool, OpenError> {
        let io = |error| open_error(path, "reading", error);
        let file = self.files().open(path, Mode::default()).map_err(io)?;
        let mut scratch = RecordsBuf::new();
        let mut batches = Batches::new(&file, bytes);
        loop {
            let position = batches.position();
            match batches.step().map_err(io)? {
                Found::End => return Ok(true),
                Found::Damaged(what) => {
                    // The rest of a segment that is being written is zeros up to what is reserved for it.
                    let left = bytes - position;
                    return Ok(line(format!(
                        "{left} bytes from position {position} on are no batch: {what}"
                    )));
                }
                Found::Batch(header, batch) => {
                    let valid = record_batch::crc_ok(batch);
                    if !line(format!("{} position: {position} isvalid: {valid}", describe_batch(&header)))
                        || (options.records && valid && !dump_records(batch, &mut scratch, options, line))
                    {
                        return Ok(false);
                    }
                }
            }
        }
    }

    fn dump_wal(&self, options: &DumpOptions, line: &mut dyn FnMut(String) -> bool) -> Result<(), OpenError> {
        let wal = self.root().join("wal");
        let Some(current) = recovery::read_current(self.files(), &wal.join("current"))? else {
            line("no WAL yet".to_owned());
            return Ok(());
        };
        let wal_id = current.wal_id;
        if !line(format!("WAL {wal_id:016x}")) {
            return Ok(());
        }
        let mut scratch = RecordsBuf::new();
        for (shard, lanes) in recovery::rings(self.files(), &wal, wal_id)? {
            for (lane, ring) in LANES.into_iter().zip(lanes) {
                let Some(ring) = ring else { continue };
                let clean = recovery::clean(self.files(), &ring, wal_id).is_some();
                let after = if clean { ": stopped cleanly, nothing in it counts" } else { "" };
                if !line(format!("Ring {} shard: {shard} lane: {lane:?}{after}", ring.display())) {
                    return Ok(());
                }
                let mut found = Vec::new();
                let mut files = Vec::new();
                for entry in self.files().list(&ring).map_err(|e| open_error(&ring, "listing", e))? {
                    let path = ring.join(&entry.name);
                    if entry.name.ends_with(".wal") {
                        let bytes = self.files().read(&path).map_err(|e| open_error(&path, "reading", e))?;
                        scan(&bytes, files.len(), wal_id, lane as u16, shard, &mut found);
                        files.push((entry.name, bytes));
                    }
                }
                let judged = judge(&found, false);
                let mut order: Vec<usize> = (0..found.len()).collect();
                order.sort_by_key(|k| found[*k].header.sequence);
                for k in order {
                    let block = &found[k];
                    let Some((file, bytes)) = files.get(block.file) else { continue };
                    let header = &block.header;
                    let what = match (block.payload_ok, judged.live.contains(&k)) {
                        (false, _) => "damaged",
                        (true, true) => "counts",
                        (true, false) => "retired",
                    };
                    let text = format!(
                        "commit: {} lsn: {} file: {file} fileSequence: {} payload: {} oldestLive: {} state: {what}",
                        header.sequence, header.lsn, header.file_seq, header.payload_len, header.oldest_live
                    );
                    if !line(text) {
                        return Ok(());
                    }
                    let end = block.payload_at + header.payload_len as usize;
                    let payload = bytes.get(block.payload_at..end).unwrap_or_default();
                    for record in records(if block.payload_ok { payload } else { &[] }) {
                        let Some((record, range)) = record else {
                            line("| a record that cannot be read".to_owned());
                            break;
                        };
                        let payload = payload.get(range).unwrap_or_default();
                        if !line(describe_record(&record, payload))
                            || (options.records
                                && record.kind == BATCH
                                && !dump_records(payload, &mut scratch, options, line))
                        {
                            return Ok(());
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// `orders-0.g12` is named by `orders-0.g12` and by `orders-0`.
fn is_named(directory: &str, wanted: &str) -> bool {
    directory == wanted || directory.rsplit_once(".g").is_some_and(|(name, _)| name == wanted)
}

fn describe_state(state: &GroupState) -> String {
    format!(
        "group: {} term: {} vote: {} commit: {} flushedIndex: {} flushedEnd: {} activeSegment: {} activeBytes: {} \
         logStart: {} lsn: {} durability: {}",
        state.group,
        state.hard_state.term,
        state.hard_state.vote,
        state.hard_state.commit,
        state.flushed_index,
        state.flushed_end,
        state.active_base,
        state.active_bytes,
        state.log_start,
        state.lsn,
        if state.os { "os" } else { "durable" }
    )
}

fn describe_batch(header: &BatchHeader) -> String {
    let codec =
        header.compression().map_or_else(|e| e.to_string(), |codec| format!("{codec:?}").to_lowercase());
    format!(
        "baseOffset: {} lastOffset: {} count: {} baseSequence: {} lastSequence: {} producerId: {} producerEpoch: {} \
         partitionLeaderEpoch: {} isTransactional: {} isControl: {} {}: {} size: {} magic: {} compresscodec: {codec} \
         crc: {}",
        header.base_offset,
        header.last_offset(),
        header.record_count,
        header.base_sequence,
        header.last_sequence(),
        header.producer_id,
        header.producer_epoch,
        header.leader_epoch,
        header.is_transactional(),
        header.is_control(),
        if header.log_append_time() { "LogAppendTime" } else { "CreateTime" },
        header.max_timestamp,
        header.total_bytes(),
        header.magic,
        header.crc
    )
}

fn describe_record(record: &RecordHeader, payload: &[u8]) -> String {
    let kind = match record.kind {
        BATCH => "batch",
        CONTROL => "control",
        HARD_STATE => "hardState",
        LOG_START => "logStart",
        GROUP_STATE => "groupState",
        GROUP_DELETE => "groupDelete",
        NOTHING => "nothing",
        PRODUCERS => "producers",
        BEGINNING => "beginning",
        BEGINNING_WITH => "beginningWith",
        _ => "unknown",
    };
    let mut text = format!(
        "| {kind} group: {} index: {} term: {} offset: {} size: {}",
        record.group,
        record.index,
        record.term,
        record.offset,
        payload.len()
    );
    let more = match record.kind {
        BATCH => record_batch::parse(payload).ok().map(|header| describe_batch(&header)),
        GROUP_STATE => GroupState::decode(payload).map(|state| describe_state(&state)),
        BEGINNING | BEGINNING_WITH => {
            anew::decode(payload, record.kind).map(|begun| describe_state(&begun.state))
        }
        _ => None,
    };
    if let Some(more) = more {
        text.push(' ');
        text.push_str(&more);
    }
    text
}

/// `false` when nobody listens any more.
fn dump_records(
    batch: &[u8],
    scratch: &mut RecordsBuf,
    options: &DumpOptions,
    line: &mut dyn FnMut(String) -> bool,
) -> bool {
    let records = match scratch.decode(batch, RECORDS_MAX_BYTES) {
        Ok(records) => records,
        Err(error) => return line(format!("| its records cannot be read: {error}")),
    };
    for record in records {
        let record = match record {
            Ok(record) => record,
            Err(error) => return line(format!("| a record that cannot be read: {error}")),
        };
        let size =
            |bytes: Option<&[u8]>| bytes.map_or(-1, |bytes| i64::try_from(bytes.len()).unwrap_or(i64::MAX));
        let names: Vec<String> =
            record.headers.clone().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
        let mut text = format!(
            "| offset: {} timestamp: {} keySize: {} valueSize: {} headerKeys: [{}]",
            record.offset,
            record.timestamp,
            size(record.key),
            size(record.value),
            names.join(",")
        );
        if options.values {
            // One line stays one line.
            let shown =
                |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\n', "\\n").replace('\r', "\\r");
            let shown = |bytes: Option<&[u8]>| bytes.map_or("null".to_owned(), shown);
            text.push_str(&format!(" key: {} payload: {}", shown(record.key), shown(record.value)));
        }
        if !line(text) {
            return false;
        }
    }
    true
}
