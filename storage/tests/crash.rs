//! Crashes at any point, damage in any byte, disks that are full or broken.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use common::*;
use flumen_storage::*;
use proptest::prelude::*;

/// Recovers a copy and compares: what was acknowledged is there, once, at its offset.
fn verify(copy: &Path, acknowledged: &BTreeMap<u64, i64>) {
    let inspection = Inspection::open(copy).unwrap();
    inspection.verify(&mut |finding| assert_ne!(finding.severity, Severity::Damage, "{finding:?}")).unwrap();
    drop(inspection);
    let (data, mut found) = recover(copy);
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        for (id, end) in acknowledged {
            let group = found.remove(id).unwrap_or_else(|| panic!("group {id} is gone"));
            assert_eq!(group.health, GroupHealth::Ok);
            assert!(group.log_end_offset >= *end, "group {id}: {} of {end}", group.log_end_offset);
            let (start, end) = (group.log_start_offset, group.log_end_offset);
            let log = store.attach(group, GroupConfig::default());
            check_log(&log, start, end, 200_000).await;
            // And it goes on.
            log.set_high_watermark(end);
            let writer = Writer::new(&store, log);
            let end = writer.append(2, 20).await;
            check_log(&writer.log, end - 2, end, 100).await;
        }
    });
}

/// Several writers while another task copies the directory at arbitrary moments, as a crash would leave it.
fn crash_run(io: IoKind, seed: u64, os: bool) {
    let dir = tempfile::tempdir().unwrap();
    let copies = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let mut taken: Vec<(PathBuf, BTreeMap<u64, i64>)> = Vec::new();
    on_shard(async {
        let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
        let acknowledged = Rc::new(RefCell::new(BTreeMap::new()));
        let stop = Rc::new(Cell::new(false));
        let mut tasks = tokio::task::JoinSet::new();
        for id in 1..=5u64 {
            let durability = if os && id % 2 == 0 { Durability::Os } else { Durability::Durable };
            let config = GroupConfig { durability, segment_bytes: 400_000, ..GroupConfig::default() };
            let writer = Writer::new(&store, store.create(id, &format!("t-{id}"), config).unwrap());
            let (acknowledged, stop) = (acknowledged.clone(), stop.clone());
            let mut random = seed.wrapping_mul(id + 7);
            tasks.spawn_local(async move {
                while !stop.get() {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let size = (random >> 33) % 9000 + 10;
                    let end = writer.append((random >> 60) as i64 % 3 + 1, size as usize).await;
                    acknowledged.borrow_mut().insert(writer.log.group_id(), end);
                    if random >> 58 == 0 {
                        let start = writer.log.log_start_offset();
                        let _ = writer.log.advance_log_start(start + (end - start) / 2);
                    }
                }
            });
        }
        for k in 0..12u64 {
            for _ in 0..40 + seed.wrapping_mul(31 * k + 17) % 200 {
                store.next_durable(Lane::Durable, store.durable_lsn(Lane::Durable)).await.unwrap();
            }
            let target = copies.path().join(format!("{k}"));
            let at_that_time = acknowledged.borrow().clone();
            copy_dir(dir.path(), &target);
            taken.push((target, at_that_time));
        }
        stop.set(true);
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
    for (copy, acknowledged) in taken {
        verify(&copy, &acknowledged);
    }
}

#[test]
fn nothing_acknowledged_is_lost_in_a_crash() {
    for (io, seed) in [(IoKind::Uring, 1), (IoKind::Uring, 2), (IoKind::Sync, 3)] {
        crash_run(io, seed, false);
    }
}

#[test]
fn nor_with_both_lanes() {
    crash_run(IoKind::Uring, 11, true);
    crash_run(IoKind::Sync, 12, true);
}

/// A stopped (not cleanly) directory with three groups of `n` batches each, everything in the WAL or half of it moved.
fn written(n: usize, size: usize) -> (tempfile::TempDir, BTreeMap<u64, i64>) {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let mut ends = BTreeMap::new();
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let writers: Vec<Writer> = (1..=3)
            .map(|id| {
                Writer::new(&store, store.create(id, &format!("t-{id}"), GroupConfig::default()).unwrap())
            })
            .collect();
        for _ in 0..n {
            for writer in &writers {
                let end = writer.append(2, size).await;
                ends.insert(writer.log.group_id(), end);
            }
        }
    });
    (dir, ends)
}

fn wal_files(path: &Path) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> =
        std::fs::read_dir(path.join("wal/0")).unwrap().map(|entry| entry.unwrap().path()).collect();
    out.sort();
    out
}

#[test]
fn a_flip_inside_the_committed_range_is_reported_and_nothing_is_cut() {
    let (dir, ends) = written(20, 500);
    // Each commit is one block of one group here; the fourth commit belongs to one group only.
    let file = &wal_files(dir.path())[0];
    let mut bytes = std::fs::read(file).unwrap();
    bytes[6 * 4096 + 900] ^= 4;
    std::fs::write(file, &bytes).unwrap();
    let (data, found) = recover(dir.path());
    let damaged: Vec<u64> = found.values().filter(|g| !g.health.is_ok()).map(|g| g.group_id).collect();
    assert_eq!(damaged.len(), 1, "{found:?}");
    for (id, end) in &ends {
        if damaged.contains(id) {
            assert!(format!("{:?}", found[id].health).contains("damaged"));
        } else {
            assert_eq!(found[id].log_end_offset, *end);
        }
    }
    let kept: Vec<PathBuf> = std::fs::read_dir(dir.path().join("wal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("damaged"))
        .collect();
    assert_eq!(kept.len(), 1);
    let name = file.file_name().unwrap();
    assert_eq!(std::fs::read(kept[0].join(name)).unwrap(), bytes, "the ring is kept as it was");
    // It refuses to serve, now and after the next start; the others go on.
    drop(data);
    let (data, mut found) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        for id in 1..=3 {
            let log = store.attach(found.remove(&id).unwrap(), GroupConfig::default());
            if damaged.contains(&id) {
                assert!(!log.health().is_ok());
                assert!(log.read_cached(0, 1, 1).is_none());
                assert!(matches!(log.read(0, 1, 1).await, Err(ReadError::Damaged { .. })));
                let entry = Entry { index: 1, term: 1, payload: Payload::Control(bytes::Bytes::new()) };
                assert_eq!(log.stage(None, &[entry]), Err(StageError::Damaged));
            } else {
                check_log(&log, 0, ends[&id], 1000).await;
                Writer::new(&store, log).append(1, 10).await;
            }
        }
        // Deleting it is the way out when there is no replica.
        store.delete(damaged[0]).await.unwrap();
        store.shutdown().await.unwrap();
    });
    drop(data);
    assert_eq!(recover(dir.path()).1.len(), 2);
}

#[test]
fn a_torn_last_commit_is_cut_and_an_earlier_one_is_not() {
    let (dir, ends) = written(10, 500);
    let file = &wal_files(dir.path())[0];
    let whole = std::fs::read(file).unwrap();
    let blocks: Vec<usize> =
        (0..whole.len() / 4096).filter(|k| whole[k * 4096..].starts_with(b"FLWB")).collect();
    let last = *blocks.last().unwrap();
    assert!(blocks.len() > 20, "a commit for each append");
    // Its records, its header, its magic.
    for (block, at) in
        [(last, 1000), (last, 40), (last, 0), (last / 2, 900), (last / 2, 300), (blocks[0], 700)]
    {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        let mut bytes = whole.clone();
        bytes[block * 4096 + at] ^= 1;
        std::fs::write(&wal_files(copy.path())[0], &bytes).unwrap();
        for start in 0..2 {
            let (_, found) = recover(copy.path());
            let total: i64 = found.values().map(|group| group.log_end_offset).sum();
            let damaged = found.values().filter(|group| !group.health.is_ok()).count();
            if block == last {
                assert_eq!((damaged, total), (0, ends.values().sum::<i64>() - 2), "byte {at}");
            } else {
                assert!(damaged > 0, "block {block} byte {at} start {start}");
            }
        }
    }
}

#[test]
fn short_and_damaged_segments_are_reported() {
    for damage in 0..3 {
        let (dir, ends) = written(400, 2000);
        // Everything into segments.
        drop(recover(dir.path()));
        let segment = dir.path().join("log/t-2/00000000000000000000.log");
        let index = segment.with_extension("idx");
        let mut bytes = std::fs::read(&segment).unwrap();
        match damage {
            0 => bytes.truncate(bytes.len() - 10),
            1 => std::fs::remove_file(&index).unwrap(),
            // A batch's offset, noticed when the index is built again.
            _ => {
                std::fs::remove_file(&index).unwrap();
                let at = bytes.len() / 2;
                let one = flumen_protocol::record_batch::parse(&bytes).unwrap().total_bytes();
                bytes[at / one * one + 7] ^= 1;
            }
        }
        std::fs::write(&segment, &bytes).unwrap();
        let (data, mut found) = recover(dir.path());
        for id in [1, 3] {
            assert!(found[&id].health.is_ok() && found[&id].log_end_offset == ends[&id]);
        }
        let two = found.remove(&2).unwrap();
        assert_eq!(two.health.is_ok(), damage == 1, "{:?}", two.health);
        assert_eq!(std::fs::read(&segment).unwrap(), bytes, "left as it is");
        if damage == 1 {
            on_shard(async {
                let store = ShardStore::open(&data, small()).await.unwrap();
                let log = store.attach(two, GroupConfig::default());
                check_log(&log, 0, ends[&2], 5000).await;
            });
        }
    }
}

#[test]
fn a_damaged_batch_is_an_error_to_its_reader() {
    let (dir, ends) = written(400, 2000);
    let (data, mut found) = recover(dir.path());
    let segment = dir.path().join("log/t-2/00000000000000000000.log");
    let mut bytes = std::fs::read(&segment).unwrap();
    let one = flumen_protocol::record_batch::parse(&bytes).unwrap().total_bytes();
    bytes[100 * one + 16] = 9;
    std::fs::write(&segment, &bytes).unwrap();
    on_shard(async {
        let config = StoreConfig { cache_bytes: 0, ..small() };
        let store = ShardStore::open(&data, config).await.unwrap();
        let log = store.attach(found.remove(&2).unwrap(), GroupConfig::default());
        check_log(&log, 0, 200, 5000).await;
        assert!(matches!(log.read(200, ends[&2], 5000).await, Err(ReadError::Damaged { .. })));
        assert!(matches!(log.read(201, ends[&2], 5000).await, Err(ReadError::Damaged { .. })));
    });
}

#[test]
fn a_rotten_batch_is_found_by_its_reader_and_the_partition_refuses_from_then_on() {
    let (dir, ends) = written(400, 2000);
    let (data, mut found) = recover(dir.path());
    let segment = dir.path().join("log/t-2/00000000000000000000.log");
    let mut bytes = std::fs::read(&segment).unwrap();
    let one = flumen_protocol::record_batch::parse(&bytes).unwrap().total_bytes();
    // In the records: nothing that walks headers sees it.
    bytes[100 * one + 1000] ^= 0x10;
    std::fs::write(&segment, &bytes).unwrap();
    on_shard(async {
        let store = ShardStore::open(&data, StoreConfig { cache_bytes: 0, ..small() }).await.unwrap();
        let log = store.attach(found.remove(&2).unwrap(), GroupConfig::default());
        log.set_high_watermark(ends[&2]);
        check_log(&log, 0, 200, 1 << 20).await;
        assert!(log.health().is_ok());
        assert!(matches!(log.read(200, ends[&2], 5000).await, Err(ReadError::Damaged { .. })));
        assert!(log.damage().unwrap().contains("checksum"));
        assert!(!log.has_room(100), "asked before a batch is accepted");
        assert!(matches!(log.read(0, ends[&2], 5000).await, Err(ReadError::Damaged { .. })));
        store.shutdown().await.unwrap();
    });
    assert_eq!(std::fs::read(&segment).unwrap(), bytes, "left as it is");
}

#[test]
fn a_damaged_group_meta_is_known_by_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        for id in 1..=2 {
            let log = store.create(id, &format!("t-{id}.g{id}"), GroupConfig::default()).unwrap();
            Writer::new(&store, log).append(5, 100).await;
        }
        store.shutdown().await.unwrap();
    });
    drop(data);
    let meta = dir.path().join("log/t-2.g2/group.meta");
    let mut bytes = std::fs::read(&meta).unwrap();
    bytes[60] ^= 1;
    std::fs::write(&meta, &bytes).unwrap();
    for _ in 0..2 {
        let (_, found) = recover(dir.path());
        assert_eq!(found.len(), 2);
        assert!(found[&1].health.is_ok() && found[&1].log_end_offset == 5);
        assert!(!found[&2].health.is_ok() && found[&2].dir_name == "t-2.g2");
        assert!(dir.path().join("log/t-2.g2/00000000000000000000.log").exists());
    }
}

/// Recovery cut short at any of its steps comes to the same end: simulated by restoring some of the files it changes.
#[test]
fn recovery_can_be_repeated() {
    let (dir, ends) = written(300, 3000);
    let before = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), before.path());
    drop(recover(dir.path()));
    for mask in 0..8 {
        let mixed = tempfile::tempdir().unwrap();
        copy_dir(before.path(), mixed.path());
        // Segments are always ahead; metas of some groups; never the id of the WAL, which comes last.
        for id in 1..=3u64 {
            let (from, to) =
                (dir.path().join(format!("log/t-{id}")), mixed.path().join(format!("log/t-{id}")));
            for entry in std::fs::read_dir(&from).unwrap() {
                let name = entry.unwrap().file_name();
                if name != "group.meta" || mask & (1 << (id - 1)) != 0 {
                    std::fs::copy(from.join(&name), to.join(&name)).unwrap();
                }
            }
        }
        verify(mixed.path(), &ends);
    }
}

#[test]
fn a_failed_commit_poisons_and_is_never_acknowledged() {
    for io in [DiskKind::Uring, DiskKind::Sync] {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let mut acknowledged = 0;
        on_shard(async {
            let fail = Rc::new(Cell::new(false));
            let failing = fail.clone();
            let disk = Disk::open(io).unwrap().with_faults(Rc::new(move |op| {
                let hit =
                    failing.get() && op.kind == OpKind::Write && op.path.to_string_lossy().contains("wal");
                hit.then(|| io::Error::from_raw_os_error(5))
            }));
            let store = ShardStore::open_on(&data, small(), disk).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
            for _ in 0..20 {
                acknowledged = writer.append(1, 100).await;
            }
            fail.set(true);
            let seen = store.durable_lsn(Lane::Durable);
            let ((lane, lsn), _) = writer.stage(1, 100).unwrap();
            assert!(
                store
                    .next_durable(Lane::Durable, seen)
                    .await
                    .unwrap_err()
                    .reason
                    .contains("Input/output error")
            );
            fail.set(false);
            // Not tried again, and nothing more is taken.
            assert_eq!(writer.stage(1, 100), Err(StageError::Poisoned));
            assert!(store.next_durable(Lane::Durable, seen).await.is_err());
            assert!(lane == Lane::Durable && store.durable_lsn(lane) < lsn && store.stats().poisoned);
            assert!(matches!(store.create(2, "t-1", GroupConfig::default()), Err(CreateError::Poisoned(_))));
            assert!(store.shutdown().await.is_err());
        });
        drop(data);
        let (_, found) = recover(dir.path());
        assert_eq!(found[&1].log_end_offset, acknowledged);
    }
}

#[test]
fn a_failed_segment_sync_poisons() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let end = Cell::new(0);
    on_shard(async {
        let disk = Disk::open(DiskKind::Auto).unwrap().with_faults(Rc::new(|op| {
            let hit = op.kind == OpKind::Sync && op.path.extension().is_some_and(|e| e == "log");
            hit.then(|| io::Error::from_raw_os_error(5))
        }));
        let store = ShardStore::open_on(&data, small(), disk).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        while let Ok(((lane, lsn), base)) = writer.stage(1, 50_000) {
            let mut seen = store.durable_lsn(lane);
            while seen < lsn {
                match store.next_durable(lane, seen).await {
                    Ok(now) => seen = now,
                    Err(_) => return,
                }
            }
            end.set(base);
            writer.log.set_high_watermark(base);
        }
    });
    drop(data);
    let (_, found) = recover(dir.path());
    assert!(found[&1].log_end_offset >= end.get() && found[&1].health.is_ok());
}

#[test]
fn a_full_disk_turns_producers_away_and_comes_back() {
    for io in [DiskKind::Uring, DiskKind::Sync] {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        on_shard(async {
            let full = Rc::new(Cell::new(true));
            let is_full = full.clone();
            let disk = Disk::open(io).unwrap().with_faults(Rc::new(move |op| {
                let hit = is_full.get()
                    && op.kind == OpKind::Write
                    && op.path.extension().is_some_and(|e| e == "log");
                hit.then(|| io::Error::from_raw_os_error(28))
            }));
            let store = ShardStore::open_on(&data, small(), disk).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
            let mut end = 0;
            while writer.log.has_room(20_000) {
                end = writer.append(1, 20_000).await;
            }
            assert!(end > 80, "the WAL took {end}");
            // Accepted before, staged after: there is a margin for that, and hard states always fit.
            writer.stage(1, 20_000).unwrap();
            end += 1;
            while writer.stage(1, 20_000).is_ok() {
                end += 1;
            }
            assert_eq!(writer.stage(1, 20_000), Err(StageError::NoSpace));
            let lsn = writer.log.stage(Some(HardState { term: 9, vote: 1, commit: 5 }), &[]).unwrap();
            writer.durable(lsn).await;
            assert!(store.stats().no_space);
            // Reads go on.
            check_log(&writer.log, 0, end, 100_000).await;
            full.set(false);
            writer.log.set_high_watermark(end);
            for _ in 0..200 {
                end = writer.append(1, 20_000).await;
            }
            assert!(!store.stats().no_space);
            check_log(&writer.log, 0, end, 100_000).await;
            store.shutdown().await.unwrap();
        });
    }
}

/// Every file of a directory, largest parts first cut down so that flips hit something.
fn all_files(path: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for entry in entries {
        if entry.is_dir() { all_files(&entry, out) } else { out.push(entry) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Random bytes anywhere: no panic, and whatever is served is right.
    #[test]
    fn garbage_anywhere_never_panics_nor_lies(
        edits in prop::collection::vec((any::<u16>(), any::<u32>(), prop::collection::vec(any::<u8>(), 1..200), 0u8..4), 1..5)
    ) {
        thread_local! { static MADE: (tempfile::TempDir, BTreeMap<u64, i64>) = written(60, 4000); }
        let copy = tempfile::tempdir().unwrap();
        MADE.with(|(dir, _)| copy_dir(dir.path(), copy.path()));
        let mut files = Vec::new();
        all_files(copy.path(), &mut files);
        for (which, at, garbage, kind) in edits {
            let path = &files[usize::from(which) % files.len()];
            let Ok(mut bytes) = std::fs::read(path) else { continue };
            match kind {
                0 => bytes = garbage,
                1 if !bytes.is_empty() => { let at = at as usize % bytes.len(); bytes.truncate(at); }
                2 => bytes.extend_from_slice(&garbage),
                _ if !bytes.is_empty() => {
                    // Most of a ring is zeros; aim at what is written.
                    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |at| at + 1);
                    let at = at as usize % used;
                    for (slot, byte) in bytes[at..].iter_mut().zip(garbage) { *slot = byte; }
                }
                _ => {}
            }
            std::fs::write(path, bytes).unwrap();
        }
        let Ok(data) = DataDir::open(copy.path()) else { return Ok(()) };
        let Ok(groups) = data.recover(1 << 20) else { return Ok(()) };
        on_shard(async {
            let store = ShardStore::open(&data, small()).await.unwrap();
            for group in groups.into_iter().filter(|group| group.health.is_ok()) {
                let (start, end) = (group.log_start_offset, group.log_end_offset);
                let log = store.attach(group, GroupConfig::default());
                log.set_high_watermark(end);
                let mut at = start;
                while at < end {
                    let read = match log.read_cached(at, end, 10_000) {
                        Some(read) => Ok(read),
                        None => log.read(at, end, 10_000).await,
                    };
                    let Ok(read) = read else { break };
                    assert!(!read.is_empty());
                    for piece in read {
                        for found in flumen_protocol::record_batch::batches(&piece) {
                            let (header, _) = found.unwrap();
                            assert!(header.base_offset <= at && at < header.next_offset());
                            at = header.next_offset();
                        }
                    }
                }
                let _ = log.find_timestamp(1050, end).await;
                let _ = log.max_timestamp().await;
            }
            let _ = store.shutdown().await;
        });
        drop(data);
        if let Ok(data) = DataDir::open(copy.path()) { let _ = data.recover(0); }
    }
}
