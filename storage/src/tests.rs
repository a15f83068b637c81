//! The store end to end: append, crash, recover, read. A crash is a copy of the directory taken while
//! the store runs: what the kernel had at that moment.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;

use crate::*;

fn batch(base_offset: i64, records: usize, fill: usize) -> Bytes {
    let mut builder = BatchBuilder::new();
    for i in 0..records {
        builder.append(
            1000 + base_offset + i as i64,
            None,
            Some(&vec![(base_offset % 251) as u8; fill]),
            &[],
        );
    }
    builder.build(base_offset).freeze()
}

fn on_shard<T>(work: impl AsyncFnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, work())
}

fn small() -> StoreConfig {
    StoreConfig { wal_file_bytes: 1 << 20, wal_files: 2, cache_bytes: 256 << 10, ..StoreConfig::default() }
}

fn config(durability: Durability) -> GroupConfig {
    GroupConfig { durability, segment_bytes: 1 << 20, ..GroupConfig::default() }
}

/// Appends `count` batches and waits until the last is durable; returns the durable end offset.
async fn append(store: &ShardStore, log: &GroupLog, count: usize, fill: usize) -> i64 {
    for _ in 0..count {
        let base = log.log_end_offset();
        let entry =
            Entry { index: log.last_index() + 1, term: 1, payload: Payload::Batch(batch(base, 3, fill)) };
        let (lane, lsn) = log.stage(None, &[entry]).unwrap();
        let mut seen = store.durable_lsn(lane);
        while seen < lsn {
            seen = store.next_durable(lane, seen).await.unwrap();
        }
        log.set_high_watermark(log.log_end_offset());
    }
    log.log_end_offset()
}

async fn check_all(log: &GroupLog, end: i64) {
    let mut offset = log.log_start_offset();
    while offset < end {
        let found = match log.read_cached(offset, end, 100_000) {
            Some(found) => found,
            None => log.read(offset, end, 100_000).await.unwrap(),
        };
        assert!(!found.is_empty(), "nothing at {offset} of {end}");
        for bytes in found {
            for b in record_batch::batches(&bytes) {
                let (header, raw) = b.unwrap();
                if header.last_offset() < offset {
                    continue;
                }
                assert_eq!(header.base_offset, offset);
                assert!(record_batch::crc_ok(raw));
                offset = header.next_offset();
            }
        }
    }
    assert_eq!(offset, end);
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn what_was_durable_is_there_after_a_crash_at_any_time() {
    for durability in [Durability::Durable, Durability::Os] {
        let dir = tempfile::tempdir().unwrap();
        let mut crashed = Vec::new();
        on_shard(async || {
            let data = Arc::new(DataDir::open(&dir.path().join("live")).unwrap());
            assert!(data.recover().unwrap().is_empty());
            let store = ShardStore::open(&data, small()).await.unwrap();
            let logs: Vec<_> = (1..4)
                .map(|g| store.create(g, &format!("t-{g}.g{g}"), config(durability)).unwrap())
                .collect();
            for round in 0..6 {
                let mut ends = Vec::new();
                for log in &logs {
                    ends.push(append(&store, log, 60, 1000 + round * 700).await);
                }
                let copy = dir.path().join(format!("crash-{round}"));
                copy_dir(&dir.path().join("live"), &copy);
                crashed.push((copy, ends));
            }
            for log in &logs {
                check_all(log, log.log_end_offset()).await;
            }
            assert!(store.stats().segment_bytes_written > 0, "the ring was small enough to be reused");
        });
        for (copy, ends) in crashed {
            on_shard(async || {
                let data = Arc::new(DataDir::open(&copy).unwrap());
                let found = data.recover().unwrap();
                assert_eq!(found.len(), 3);
                let store = ShardStore::open(&data, StoreConfig { shard: 7, ..small() }).await.unwrap();
                for (group, end) in found.into_iter().zip(&ends) {
                    assert_eq!(group.health, GroupHealth::Ok);
                    assert_eq!(group.log_end_offset, *end);
                    let log = store.attach(group, config(durability));
                    check_all(&log, *end).await;
                    append(&store, &log, 2, 10).await;
                    check_all(&log, end + 6).await;
                }
                store.shutdown().await.unwrap();
                drop(store);
            });
            on_shard(async || {
                let data = Arc::new(DataDir::open(&copy).unwrap());
                for (group, end) in data.recover().unwrap().into_iter().zip(&ends) {
                    assert_eq!((group.log_end_offset, group.health), (end + 6, GroupHealth::Ok));
                }
            });
        }
    }
}

/// One group with `batches` batches in the WAL only, crashed; returns its end offset.
fn crashed_log(path: &Path, batches: usize) -> i64 {
    on_shard(async || {
        let data = Arc::new(DataDir::open(path).unwrap());
        data.recover().unwrap();
        let store = ShardStore::open(&data, small()).await.unwrap();
        let log = store.create(1, "t-0.g1", config(Durability::Durable)).unwrap();
        append(&store, &log, batches, 100).await
    })
}

fn recover_one(path: &Path) -> RecoveredGroup {
    let data = DataDir::open(path).unwrap();
    data.recover().unwrap().pop().unwrap()
}

#[test]
fn a_torn_last_block_is_cut_and_damage_before_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    let end = crashed_log(&live, 20);
    let wal = fs::read_dir(live.join("wal/0-durable")).unwrap().next().unwrap().unwrap().path();
    let relative = wal.strip_prefix(&live).unwrap().to_path_buf();
    let bytes = fs::read(&wal).unwrap();
    // Twenty blocks of 4 KiB each: a commit per append.
    for (block, at) in [(19, 200), (19, 0), (10, 300), (10, 5), (0, 100)] {
        let copy = dir.path().join(format!("c-{block}-{at}"));
        copy_dir(&live, &copy);
        let mut bad = bytes.clone();
        bad[block * 4096 + at] ^= 0x40;
        fs::write(copy.join(&relative), &bad).unwrap();
        let found = recover_one(&copy);
        if block == 19 {
            assert_eq!((found.health, found.log_end_offset), (GroupHealth::Ok, end - 3));
        } else {
            assert!(matches!(found.health, GroupHealth::Damaged { .. }), "block {block} byte {at}");
            assert_eq!(
                fs::read(copy.join("wal/damaged-0-durable-0").join(wal.file_name().unwrap())).unwrap(),
                bad
            );
            assert!(matches!(recover_one(&copy).health, GroupHealth::Damaged { .. }), "it stays refused");
        }
    }
}

#[test]
fn damage_in_a_synced_segment_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    on_shard(async || {
        let data = Arc::new(DataDir::open(&live).unwrap());
        data.recover().unwrap();
        let store = ShardStore::open(&data, small()).await.unwrap();
        let log = store.create(1, "t-0.g1", config(Durability::Durable)).unwrap();
        append(&store, &log, 50, 1000).await;
        store.shutdown().await.unwrap();
    });
    let segment = live.join("log/t-0.g1/00000000000000000000.log");
    let good = fs::read(&segment).unwrap();
    fs::write(&segment, &good[..good.len() / 2]).unwrap();
    assert!(matches!(recover_one(&live).health, GroupHealth::Damaged { .. }), "a short segment");
    fs::remove_file(live.join("log/t-0.g1/DAMAGED")).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    fs::write(&segment, &flipped).unwrap();
    on_shard(async || {
        let data = Arc::new(DataDir::open(&live).unwrap());
        let store_group = data.recover().unwrap().pop().unwrap();
        let store = ShardStore::open(&data, small()).await.unwrap();
        let end = store_group.log_end_offset;
        let log = store.attach(store_group, config(Durability::Durable));
        let mut offset = 0;
        let error = loop {
            match log.read(offset, end, 4000).await {
                Ok(found) => {
                    for bytes in found {
                        offset = record_batch::batches(&bytes).last().unwrap().unwrap().0.next_offset();
                    }
                }
                Err(error) => break error,
            }
        };
        assert!(matches!(error, ReadError::Damaged(_)));
        assert!(matches!(log.health(), GroupHealth::Damaged { .. }));
    });
}

#[test]
fn sidecars_may_be_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    let end = crashed_log(&live, 20);
    let group = recover_one(&live);
    let producers = group.producers.clone();
    for entry in fs::read_dir(live.join("log/t-0.g1")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e != "log") {
            fs::remove_file(path).unwrap();
        }
    }
    let again = recover_one(&live);
    assert_eq!((again.log_end_offset, again.health, again.producers), (end, GroupHealth::Ok, producers));
}

#[test]
fn retention_keeps_what_is_held_and_the_log_start_survives() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    let start = on_shard(async || {
        let data = Arc::new(DataDir::open(&live).unwrap());
        data.recover().unwrap();
        let store = ShardStore::open(&data, small()).await.unwrap();
        let keep = GroupConfig { retention_bytes: 0, segment_bytes: 100_000, ..GroupConfig::default() };
        let log = store.create(1, "t-0.g1", keep).unwrap();
        let end = append(&store, &log, 600, 1000).await;
        assert!(log.log_start_offset() == 0);
        log.enforce_retention(0, 10);
        assert_eq!(log.log_start_offset(), 0, "the first segment holds offset 10");
        log.enforce_retention(0, end);
        let start = log.log_start_offset();
        assert!(start > 0 && start < end);
        assert!(matches!(log.read(0, end, 10).await, Err(ReadError::OutOfRange { .. })));
        check_all(&log, end).await;
        append(&store, &log, 1, 10).await;
        start
    });
    assert_eq!(recover_one(&live).log_start_offset, start);
}

#[test]
fn times_and_epochs_are_found() {
    let dir = tempfile::tempdir().unwrap();
    on_shard(async || {
        let data = Arc::new(DataDir::open(&dir.path().join("live")).unwrap());
        data.recover().unwrap();
        let store = ShardStore::open(&data, small()).await.unwrap();
        let log = store.create(1, "t-0.g1", config(Durability::Durable)).unwrap();
        let end = append(&store, &log, 500, 1000).await;
        // Record at offset o has timestamp 1000 + o.
        for offset in [0, 1, 2, 700, 1499] {
            assert_eq!(log.find_timestamp(1000 + offset, end).await.unwrap(), Some((1000 + offset, offset)));
        }
        assert_eq!(log.find_timestamp(0, end).await.unwrap(), Some((1000, 0)));
        assert_eq!(log.find_timestamp(999_999, end).await.unwrap(), None);
        assert_eq!(log.max_timestamp().await.unwrap(), Some((999 + end, end - 1)));
    });
}

#[test]
fn recovery_of_arbitrary_bytes_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    crashed_log(&live, 30);
    recover_one(&live);
    let mut seed = 42u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    for round in 0..120 {
        let copy = dir.path().join(format!("r{round}"));
        copy_dir(&live, &copy);
        let mut files = Vec::new();
        let mut stack = vec![copy.join("log"), copy.join("wal")];
        while let Some(path) = stack.pop() {
            for entry in fs::read_dir(path).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() {
                    stack.push(entry.path())
                } else {
                    files.push(entry.path())
                }
            }
        }
        let file = &files[random() as usize % files.len()];
        let mut bytes = fs::read(file).unwrap();
        for _ in 0..1 + random() % 20 {
            match random() % 3 {
                0 if !bytes.is_empty() => {
                    let at = random() as usize % bytes.len();
                    bytes[at] = random() as u8;
                }
                1 => bytes.truncate(random() as usize % (bytes.len() + 1)),
                _ => bytes.extend((0..random() % 200).map(|_| 0xFF)),
            }
        }
        fs::write(file, &bytes).unwrap();
        // An error or a damaged group is an answer; a panic is not.
        let _ = DataDir::open(&copy).unwrap().recover();
        fs::remove_dir_all(&copy).unwrap();
    }
}
