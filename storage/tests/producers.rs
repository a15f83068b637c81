//! Producers are known until they expire, whatever becomes of their records.

mod common;

use std::path::Path;
use std::time::Duration;

use common::*;
use flumen_io::simulated::{Crash, Machine, Settings};
use flumen_storage::*;

const DIR: &str = "/data";

const RING_BYTES: usize = 3 * (256 << 10);

fn config() -> StoreConfig {
    StoreConfig {
        wal_file_bytes: RING_BYTES as u64 / 3,
        wal_files_max: 3,
        cache_bytes: 0,
        ..StoreConfig::default()
    }
}

/// Others have replicas, so that what is not committed may be cut.
fn replicated() -> GroupConfig {
    GroupConfig { direct: false, ..GroupConfig::default() }
}

fn start(machine: &Machine) -> (DataDir, Vec<RecoveredGroup>) {
    let dir = DataDir::open_on(machine.file_system(), Path::new(DIR)).unwrap();
    let found = dir.recover(0).unwrap();
    (dir, found)
}

/// All before it is committed.
async fn stage(store: &ShardStore, log: &GroupLog, index: u64, term: u64, bytes: bytes::Bytes) {
    stage_behind(store, log, (index, term), index - 1, bytes).await;
}

async fn stage_behind(
    store: &ShardStore,
    log: &GroupLog,
    (index, term): (u64, u64),
    commit: u64,
    bytes: bytes::Bytes,
) {
    let entry = Entry { index, term, payload: Payload::Batch(bytes) };
    let staged = loop {
        let hard_state = HardState { term, vote: 1, commit };
        match log.stage(Some(hard_state), std::slice::from_ref(&entry)) {
            Ok(staged) => break staged,
            Err(StageError::NoSpace) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) => panic!("{error}"),
        }
    };
    let mut seen = 0;
    while seen < staged.1 {
        seen = store.next_durable(staged.0, seen).await.unwrap();
    }
}

/// Everything in the log is committed, and goes to segments once the ring is full of what another partition writes.
async fn flushed(store: &ShardStore, log: &GroupLog) -> Writer {
    log.set_committed(log.last_index());
    log.set_high_watermark(log.log_end_offset());
    let other = Writer::new(store, store.create(2, "t-2", GroupConfig::default()).unwrap());
    while log.flushed_offset() < log.log_end_offset() {
        other.append(1, 10_000).await;
    }
    other
}

/// Deletes everything but what is being written, or that too; and then the ring has nothing more of it.
async fn deleted(store: &ShardStore, log: &GroupLog, other: &Writer) {
    let out = log.enforce_retention(i64::MAX, i64::MAX).await;
    assert!(out.deleted_segments > 0, "{out:?}");
    let mut seen = 0;
    let staged = log.advance_log_start(out.log_start_offset).unwrap();
    while seen < staged.1 {
        seen = store.next_durable(staged.0, seen).await.unwrap();
    }
    for _ in 0..2 * RING_BYTES / 10_000 {
        other.append(1, 10_000).await;
    }
}

fn first(found: Vec<RecoveredGroup>) -> RecoveredGroup {
    found.into_iter().find(|group| group.group_id == 1).unwrap()
}

/// Regression: once a follower's log was cut, no snapshot of its producers was written until the next start, and retention took
/// the records that alone told of them.
#[test]
fn a_cut_does_not_end_their_snapshots() {
    let machine = Machine::new(1, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = ShardStore::open(&dir, config()).await.unwrap();
        let config = GroupConfig { segment_bytes: 16 << 10, retention_bytes: 1, ..replicated() };
        let log = store.create(1, "t-1", config).unwrap();
        stage(&store, &log, 1, 1, produced(9, 0, 0, 0, 3)).await;
        stage(&store, &log, 2, 1, produced(8, 0, 0, 3, 1)).await;
        // Of the next leader, in place of what was not committed.
        stage(&store, &log, 2, 2, batch(1, 3, 2, 1, 1_000)).await;
        for index in 3..100 {
            stage(&store, &log, index, 2, batch(1, index as i64 + 1, 2, 1, 1_000)).await;
        }
        let other = flushed(&store, &log).await;
        deleted(&store, &log, &other).await;
        assert_eq!(log.producers().producer(9), Some((0, 2)));
    });
    machine.crash_now(Crash::Kill);
    machine.restart();
    let found = first(start(&machine).1);
    assert!(found.log_start_offset > 3 && found.log_end_offset == 101);
    assert_eq!(found.producers.producer(9), Some((0, 2)), "its records are gone, and it has not expired");
    assert_eq!(found.producers.producer(8), None, "its record was cut off");
}

/// Regression: where the last segment was too old as well, nothing was left of those who had written to it.
#[test]
fn they_outlive_the_last_segment() {
    outlive_the_last_segment(Crash::Kill);
}

/// Regression: what knew of them then was not synced.
#[test]
fn they_outlive_a_loss_of_power_too() {
    outlive_the_last_segment(Crash::PowerLoss);
}

fn outlive_the_last_segment(crash: Crash) {
    let machine = Machine::new(2, Settings::default());
    let (dir, _) = start(&machine);
    // More than fit into a record beside the state of the partition.
    const PRODUCERS: i64 = 100;
    on_shard(async {
        let store = ShardStore::open(&dir, config()).await.unwrap();
        let config = GroupConfig { retention_ms: 1, ..replicated() };
        let log = store.create(1, "t-1", config).unwrap();
        for id in 0..PRODUCERS {
            stage(&store, &log, id as u64 + 1, 1, produced(id, 0, 0, id, 1)).await;
        }
        let other = flushed(&store, &log).await;
        deleted(&store, &log, &other).await;
    });
    machine.crash_now(crash);
    machine.restart();
    let found = first(start(&machine).1);
    assert_eq!((found.log_start_offset, found.log_end_offset), (PRODUCERS, PRODUCERS));
    let known = (0..PRODUCERS).filter(|id| found.producers.producer(*id) == Some((0, 0))).count();
    assert_eq!(known as i64, PRODUCERS);
}

/// Regression: where a clean stop left much that was not committed, and that was cut after the start, a producer was unknown whose
/// batch before it was committed, and could write that again.
#[test]
fn a_cut_after_a_clean_stop_leads_back() {
    let machine = Machine::new(3, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = ShardStore::open(&dir, config()).await.unwrap();
        let log = store.create(1, "t-1", replicated()).unwrap();
        stage(&store, &log, 1, 1, produced(9, 0, 0, 0, 3)).await;
        for index in 2..10 {
            let at = index as i64 + 1;
            stage_behind(&store, &log, (index, 1), 1, produced(9, 0, at as i32, at, 1)).await;
        }
        log.set_committed(1);
        log.set_high_watermark(3);
        store.shutdown().await.unwrap();
    });
    for crash in [Crash::PowerLoss, Crash::Kill] {
        machine.crash_now(crash);
        machine.restart();
        let (dir, found) = start(&machine);
        let found = first(found);
        assert_eq!(found.producers.producer(9), Some((0, 10)));
        if crash == Crash::Kill {
            on_shard(async {
                let store = ShardStore::open(&dir, config()).await.unwrap();
                let log = store.attach(found, replicated());
                stage_behind(&store, &log, (2, 2), 1, batch(1, 3, 2, 1, 10)).await;
                assert_eq!(log.producers().producer(9), Some((0, 2)));
            });
        }
    }
    machine.crash_now(Crash::Kill);
    machine.restart();
    assert_eq!(first(start(&machine).1).producers.producer(9), Some((0, 2)));
}
