//! What the tests of the store share: batches, a model of what was acknowledged, and stopping a store the hard way.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;

use bytes::Bytes;
use flumen_protocol::record::BatchBuilder;
use flumen_storage::*;

pub const IO_KINDS: [IoKind; 2] = [IoKind::Uring, IoKind::Sync];

pub fn small() -> StoreConfig {
    StoreConfig { wal_file_bytes: 1 << 20, wal_files_max: 3, cache_bytes: 1 << 20, ..StoreConfig::default() }
}

/// A batch of `records` records of `size` bytes whose content tells where it belongs.
pub fn batch(group: u64, base: i64, term: u64, records: i64, size: usize) -> Bytes {
    batch_at(group, base, term, records, size, 1_000 + base)
}

pub fn batch_at(group: u64, base: i64, term: u64, records: i64, size: usize, timestamp: i64) -> Bytes {
    let mut builder = BatchBuilder::new();
    for k in 0..records {
        let mut value = format!("{group}/{}/{term}/", base + k).into_bytes();
        value.resize(size.max(value.len()), b'x');
        builder.append(timestamp + k, None, Some(&value), &[]);
    }
    builder.leader_epoch(i32::try_from(term).unwrap());
    builder.build(base).freeze()
}

pub fn produced(id: i64, epoch: i16, sequence: i32, base: i64, records: i64) -> Bytes {
    let mut builder = BatchBuilder::new();
    for k in 0..records {
        builder.append(1_000 + base + k, None, Some(b"v"), &[]);
    }
    builder.producer(id, epoch, sequence);
    builder.leader_epoch(1);
    builder.build(base).freeze()
}

/// Runs a shard thread's worth of work and ends it without a clean stop, as kill -9 does (bytes handed to the kernel
/// stay).
pub fn on_shard<F: Future<Output = T>, T>(work: F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let out = local.block_on(&runtime, work);
    drop(local);
    drop(runtime);
    out
}

pub fn recover(path: &Path) -> (DataDir, BTreeMap<u64, RecoveredGroup>) {
    let dir = DataDir::open(path).unwrap();
    let groups = dir.recover(1 << 20).unwrap().into_iter().map(|group| (group.group_id, group)).collect();
    (dir, groups)
}

pub struct Writer {
    pub log: GroupLog,
    pub store: ShardStore,
    pub term: u64,
}

impl Writer {
    pub fn new(store: &ShardStore, log: GroupLog) -> Self {
        let term = log.hard_state().term + 1;
        Writer { log, store: store.clone(), term }
    }

    pub fn stage(&self, records: i64, size: usize) -> Result<((Lane, Lsn), i64), StageError> {
        let base = self.log.log_end_offset();
        let index = self.log.last_index() + 1;
        let payload = Payload::Batch(batch(self.log.group_id(), base, self.term, records, size));
        let hard = HardState { term: self.term, vote: 1, commit: index - 1 };
        let lsn = self.log.stage(Some(hard), &[Entry { index, term: self.term, payload }])?;
        Ok((lsn, base + records))
    }

    pub async fn append(&self, records: i64, size: usize) -> i64 {
        // As the broker: asks before it accepts, and waits where a client would try again.
        while !self.log.has_room(size * records as usize + 200) {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let (lsn, end) = self.stage(records, size).unwrap();
        self.durable(lsn).await;
        self.log.set_high_watermark(end);
        end
    }

    pub async fn durable(&self, (lane, lsn): (Lane, Lsn)) {
        while self.store.durable_lsn(lane) < lsn {
            self.store.next_durable(lane, self.store.durable_lsn(lane)).await.unwrap();
        }
    }
}

pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else if let Err(error) = std::fs::copy(entry.path(), &target) {
            // Deleted while it was copied.
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        }
    }
}

/// Reads a log from `from` to `upper` and checks that every offset is there once, with its own content.
pub async fn check_log(log: &GroupLog, from: i64, upper: i64, max_bytes: usize) {
    let mut at = from;
    while at < upper {
        let pieces = match log.read_cached(at, upper, max_bytes) {
            Some(pieces) => pieces,
            None => log.read(at, upper, max_bytes).await.unwrap(),
        };
        assert!(!pieces.is_empty(), "nothing at {at} below {upper}");
        for piece in pieces {
            for found in flumen_protocol::record_batch::batches(&piece) {
                let (header, bytes) = found.unwrap();
                assert!(flumen_protocol::record_batch::crc_ok(bytes));
                assert!(header.base_offset <= at && header.next_offset() > at, "{header:?} at {at}");
                let mut scratch = Vec::new();
                for record in flumen_protocol::record::decode_records(bytes, &mut scratch, 1 << 24).unwrap() {
                    let record = record.unwrap();
                    let want = format!("{}/{}/", log.group_id(), record.offset);
                    let value = record.value.unwrap();
                    assert!(value == b"v" || value.starts_with(want.as_bytes()), "offset {}", record.offset);
                }
                at = header.next_offset();
            }
        }
    }
    assert_eq!(at, upper);
}
