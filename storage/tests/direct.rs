//! Large batches, which go straight to their segment: what is on the disk, what a crash at each step leaves, and what a
//! full or broken disk does.

mod common;

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use common::*;
use flumen_storage::*;

const LARGE: usize = 150_000;

fn config(os: bool) -> GroupConfig {
    let durability = if os { Durability::Os } else { Durability::Durable };
    GroupConfig { durability, segment_bytes: 1_000_000, ..GroupConfig::default() }
}

fn segments(root: &Path, dir: &str) -> Vec<(PathBuf, u64)> {
    let mut found: Vec<(PathBuf, u64)> = std::fs::read_dir(root.join("log").join(dir))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "log"))
        .map(|entry| (entry.path(), entry.metadata().unwrap().len()))
        .collect();
    found.sort();
    found
}

/// Appends without telling that anything is committed: nothing is moved out of the WAL.
async fn append_uncommitted(writer: &Writer, size: usize) -> i64 {
    let (number, end) = writer.stage(1, size).unwrap();
    writer.log.wait_persisted(number).await.unwrap();
    end
}

#[test]
fn they_are_written_once_and_survive_restarts() {
    for (io, os) in
        [(IoKind::Uring, false), (IoKind::Uring, true), (IoKind::Sync, false), (IoKind::Sync, true)]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut end = 0;
        for round in 0..4 {
            let (data, mut found) = recover(dir.path());
            on_shard(async {
                let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
                let log = match found.remove(&1) {
                    None => store.create(1, "t-0", config(os)).unwrap(),
                    Some(group) => {
                        assert_eq!((group.health.clone(), group.log_end_offset), (GroupHealth::Ok, end));
                        store.attach(group, config(os))
                    }
                };
                log.set_high_watermark(end);
                check_log(&log, 0, end, 1 << 20).await;
                let writer = Writer::new(&store, log.clone());
                for n in 0..30 {
                    end = writer.append(1, LARGE + n).await;
                }
                let stats = store.stats();
                let written = (stats.wal_bytes_written + stats.segment_bytes_written) as f64;
                let ratio = written / stats.bytes_appended as f64;
                assert!(ratio <= 1.1, "{ratio}: {stats:?}");
                // Among small ones, in whatever order they finish.
                for n in 0..20 {
                    writer.stage(1, if n % 3 == 0 { LARGE } else { 500 * n }).unwrap();
                }
                let (number, last) = writer.stage(2, 10).unwrap();
                end = last;
                log.wait_persisted(number).await.unwrap();
                log.set_high_watermark(end);
                check_log(&log, 0, end, 300_000).await;
                if round % 2 == 0 {
                    store.shutdown().await.unwrap();
                }
            });
            for (path, bytes) in segments(dir.path(), "t-0") {
                assert!(bytes <= 1_000_000, "{} {bytes}", path.display());
            }
        }
    }
}

/// Row "pointer committed, smaller batches before it still in the WAL": what is missing in front of it is filled in.
#[test]
fn a_crash_leaves_a_hole_before_it_that_recovery_fills() {
    for os in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let mut end = 0;
        on_shard(async {
            let store = ShardStore::open(&data, small()).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", config(os)).unwrap());
            for size in [100, 3000, LARGE, 50, LARGE, LARGE, 700_000, 20, LARGE, 5] {
                end = append_uncommitted(&writer, size).await;
            }
            check_log(&writer.log, 0, end, 1 << 20).await;
        });
        let (first, bytes) = segments(dir.path(), "t-0").remove(0);
        let head = std::fs::read(&first).unwrap()[..3000].to_vec();
        assert!(bytes > 3 * LARGE as u64 && head.iter().all(|byte| *byte == 0), "a hole");
        drop(data);
        // Cut short after the segments were written, and done again.
        let before = copy(dir.path());
        drop(recover(dir.path()));
        let mixed = copy(&before);
        copy_dir(&dir.path().join("log"), &mixed.join("log"));
        std::fs::remove_file(mixed.join("log/t-0/group.meta")).unwrap();
        let again = recover(&mixed).1.remove(&1).unwrap();
        assert_eq!((again.health, again.log_end_offset), (GroupHealth::Ok, end));
        drop(recover(dir.path()));
        let (data, mut found) = recover(dir.path());
        let group = found.remove(&1).unwrap();
        assert_eq!((group.health.clone(), group.log_end_offset), (GroupHealth::Ok, end));
        assert_eq!(segments(dir.path(), "t-0").len(), 2, "the layout is what it was");
        on_shard(async {
            let store = ShardStore::open(&data, small()).await.unwrap();
            let log = store.attach(group, config(os));
            log.set_high_watermark(end);
            check_log(&log, 0, end, 300_000).await;
            let end = Writer::new(&store, log.clone()).append(1, LARGE).await;
            check_log(&log, 0, end, 300_000).await;
        });
    }
}

/// Row "data written, pointer not committed": it was not acknowledged, and is cut.
#[test]
fn data_without_its_pointer_is_cut() {
    for os in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let mut end = 0;
        on_shard(async {
            let fail = Rc::new(Cell::new(false));
            let failing = fail.clone();
            let disk = Disk::open(DiskKind::Auto).unwrap().with_faults(Rc::new(move |op| {
                let wal = op.path.extension().is_some_and(|e| e == "wal");
                (failing.get() && wal && op.kind == OpKind::Write).then(|| io::Error::from_raw_os_error(5))
            }));
            let store = ShardStore::open_on(&data, small(), disk).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", config(os)).unwrap());
            writer.append(1, 100).await;
            end = writer.append(1, LARGE).await;
            fail.set(true);
            let (number, _) = writer.stage(1, LARGE).unwrap();
            assert!(writer.log.wait_persisted(number).await.is_err());
        });
        let before = segments(dir.path(), "t-0")[0].1;
        assert!(before > 2 * LARGE as u64);
        drop(data);
        let (data, mut found) = recover(dir.path());
        let group = found.remove(&1).unwrap();
        assert_eq!((group.health.clone(), group.log_end_offset), (GroupHealth::Ok, end));
        assert!(segments(dir.path(), "t-0")[0].1 < before);
        on_shard(async {
            let store = ShardStore::open(&data, small()).await.unwrap();
            let log = store.attach(group, config(os));
            log.set_high_watermark(end);
            check_log(&log, 0, end, 300_000).await;
        });
    }
}

/// Row "pointer committed, data rotten": it was acknowledged, so it is damage. Only a loss of power may take what the os
/// lane had not on the disk; then the log ends there.
#[test]
fn a_pointer_without_its_data_is_damage() {
    for (os, power_lost) in [(false, false), (false, true), (true, false), (true, true)] {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let mut ends = Vec::new();
        on_shard(async {
            let store = ShardStore::open(&data, small()).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", config(os)).unwrap());
            for size in [100, LARGE, LARGE, 300] {
                ends.push(append_uncommitted(&writer, size).await);
            }
        });
        drop(data);
        let (path, _) = segments(dir.path(), "t-0").remove(0);
        let mut bytes = std::fs::read(&path).unwrap();
        // In the second of the large ones.
        bytes[LARGE + 5000] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        if power_lost {
            another_boot(dir.path());
        }
        let (_, mut found) = recover(dir.path());
        let group = found.remove(&1).unwrap();
        if os && power_lost {
            assert_eq!((group.health, group.log_end_offset), (GroupHealth::Ok, ends[1]));
        } else {
            let GroupHealth::Damaged { reason } = &group.health else { panic!("{group:?}") };
            assert!(reason.contains("offset 2"), "{reason}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "left as it is");
        }
    }
}

/// Makes every block of the WALs look as if the machine had been started since.
fn another_boot(root: &Path) {
    for ring in std::fs::read_dir(root.join("wal")).unwrap().map(|entry| entry.unwrap().path()) {
        if !ring.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(ring).unwrap().map(|entry| entry.unwrap().path()) {
            let mut bytes = std::fs::read(&file).unwrap();
            for block in bytes.chunks_mut(4096).filter(|block| block.starts_with(b"FLWB")) {
                block[24..32].fill(7);
                let crc = crc32c::crc32c(&block[..332]);
                block[332..336].copy_from_slice(&crc.to_le_bytes());
            }
            std::fs::write(&file, bytes).unwrap();
        }
    }
}

#[test]
fn a_full_disk_delays_them_and_loses_nothing() {
    for os in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        on_shard(async {
            let full = Rc::new(Cell::new(false));
            let is_full = full.clone();
            let disk = Disk::open(DiskKind::Auto).unwrap().with_faults(Rc::new(move |op| {
                let segment = op.path.extension().is_some_and(|e| e == "log");
                (is_full.get() && segment && op.kind == OpKind::Write)
                    .then(|| io::Error::from_raw_os_error(28))
            }));
            let store = ShardStore::open_on(&data, small(), disk).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", config(os)).unwrap());
            let other = Writer::new(&store, store.create(2, "t-1", config(os)).unwrap());
            let end = writer.append(1, LARGE).await;
            full.set(true);
            let (number, _) = writer.stage(1, LARGE).unwrap();
            // Waits behind it, in its order.
            let (behind, _) = writer.stage(1, 10).unwrap();
            // Another partition does not wait.
            other.append(1, 10).await;
            while !store.stats().no_space {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            assert!(writer.log.persisted() < number);
            // While there is no space even large ones go through the WAL, which has its space already.
            other.append(1, LARGE).await;
            full.set(false);
            writer.log.wait_persisted(behind).await.unwrap();
            writer.log.set_high_watermark(end + 2);
            check_log(&writer.log, 0, end + 2, 1 << 20).await;
            check_log(&other.log, 0, 2, 1 << 20).await;
            store.shutdown().await.unwrap();
        });
        drop(data);
        let (_, found) = recover(dir.path());
        assert_eq!((found[&1].log_end_offset, found[&2].log_end_offset), (3, 2));
    }
}

#[test]
fn a_failed_sync_poisons_and_is_not_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let mut end = 0;
    on_shard(async {
        let fail = Rc::new(Cell::new(false));
        let failing = fail.clone();
        let disk = Disk::open(DiskKind::Auto).unwrap().with_faults(Rc::new(move |op| {
            let segment = op.path.extension().is_some_and(|e| e == "log");
            (failing.get() && segment && op.kind == OpKind::Sync).then(|| io::Error::from_raw_os_error(5))
        }));
        let store = ShardStore::open_on(&data, small(), disk).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", config(false)).unwrap());
        end = writer.append(1, LARGE).await;
        fail.set(true);
        let (number, _) = writer.stage(1, LARGE).unwrap();
        let (behind, _) = writer.stage(1, 10).unwrap();
        assert!(writer.log.wait_persisted(behind).await.is_err());
        assert!(writer.log.persisted() < number);
    });
    drop(data);
    let (_, found) = recover(dir.path());
    assert_eq!((found[&1].health.clone(), found[&1].log_end_offset), (GroupHealth::Ok, end));
}

/// Another leader's entries replace large ones, also while they are being written.
#[test]
fn they_are_replaced_like_any_other() {
    for os in [false, true] {
        for wait in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (data, _) = recover(dir.path());
            let entry = |index: u64, term, base, size| Entry {
                index,
                term,
                payload: Payload::Batch(batch(1, base, term, 1, size)),
            };
            on_shard(async {
                let store = ShardStore::open(&data, small()).await.unwrap();
                let log = store.create(1, "t-0", config(os)).unwrap();
                let entries: Vec<Entry> = (1..=8)
                    .map(|k| entry(k, 1, k as i64 - 1, if k % 2 == 0 { LARGE } else { 700 }))
                    .collect();
                let number = put(&log, Some(HardState { term: 1, vote: 1, commit: 1 }), &entries).unwrap();
                if wait {
                    log.wait_persisted(number).await.unwrap();
                } else {
                    tokio::task::yield_now().await;
                }
                let again = [entry(4, 2, 3, 900), entry(5, 2, 4, LARGE + 7), entry(6, 2, 5, 20)];
                put_safely(&log, Some(HardState { term: 2, vote: 1, commit: 3 }), &again).await;
                assert_eq!((log.last_index(), log.log_end_offset(), log.epoch_end_offset(1)), (6, 6, (1, 3)));
                check_log(&log, 0, 6, 1 << 20).await;
                log.set_high_watermark(6);
                put_safely(&log, None, &[entry(7, 2, 6, LARGE)]).await;
                log.set_high_watermark(7);
                check_log(&log, 0, 7, 1 << 20).await;
            });
            drop(data);
            let (data, mut found) = recover(dir.path());
            let group = found.remove(&1).unwrap();
            assert_eq!(
                (group.health.clone(), group.log_end_offset, group.last_term),
                (GroupHealth::Ok, 7, 2)
            );
            on_shard(async {
                let store = ShardStore::open(&data, StoreConfig { cache_bytes: 0, ..small() }).await.unwrap();
                let log = store.attach(group, config(os));
                log.set_high_watermark(7);
                let mut terms = Vec::new();
                for at in 0..7 {
                    let read = log.read(at, 7, 1).await.unwrap();
                    terms.push(flumen_protocol::record_batch::parse(&read[0]).unwrap().leader_epoch);
                }
                assert_eq!(terms, [1, 1, 1, 2, 2, 2, 2]);
                check_log(&log, 0, 7, 1 << 20).await;
            });
        }
    }
}

/// A copy that lives as long as the test.
fn copy(from: &Path) -> PathBuf {
    thread_local! { static KEPT: RefCell<Vec<tempfile::TempDir>> = const { RefCell::new(Vec::new()) }; }
    let to = tempfile::tempdir().unwrap();
    copy_dir(from, to.path());
    let path = to.path().to_owned();
    KEPT.with(|kept| kept.borrow_mut().push(to));
    path
}

#[test]
fn stopping_and_deleting_wait_for_nobody_forever() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let one = Writer::new(&store, store.create(1, "t-0", config(false)).unwrap());
        let two = Writer::new(&store, store.create(2, "t-1", config(false)).unwrap());
        for _ in 0..20 {
            one.stage(1, LARGE).unwrap();
            two.stage(1, LARGE).unwrap();
        }
        store.delete(2).await.unwrap();
        one.stage(1, 10).unwrap();
        store.shutdown().await.unwrap();
        assert!(one.log.persisted() > 0);
    });
    drop(data);
    let (_, found) = recover(dir.path());
    assert_eq!(found.len(), 1);
    // Not committed as far as the store knows, and safe all the same.
    assert_eq!(found[&1].log_end_offset, 21);
}

/// Restarts do not check again what was checked long ago: a group state in the WAL covers it.
#[test]
fn what_a_restart_looks_at_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let mut end = 0;
    on_shard(async {
        let config = StoreConfig { wal_file_bytes: 32 << 20, ..small() };
        let store = ShardStore::open(&data, config).await.unwrap();
        let log = store.create(1, "t-0", GroupConfig::default()).unwrap();
        let writer = Writer::new(&store, log);
        for _ in 0..72 {
            end = writer.append(1, 1 << 20).await;
        }
        // The flusher is behind by some turns.
        while store.stats().unflushed_bytes > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        writer.append(1, 1 << 20).await;
        end += 1;
        assert_eq!(store.stats().wal_files_retired, 0);
    });
    drop(data);
    let rot = |at: usize| {
        let copy = copy(dir.path());
        let (path, _) = segments(&copy, "t-0").remove(0);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        recover(&copy).1.remove(&1).unwrap()
    };
    let early = rot(30 << 20);
    assert_eq!((early.health, early.log_end_offset), (GroupHealth::Ok, end), "its reader will find it");
    assert!(!rot(72 << 20).health.is_ok());
}
