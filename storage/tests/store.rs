//! The store as the broker uses it: append, read, restart, retire, delete.

mod common;

use common::*;
use flumen_storage::*;

fn run_all(test: impl Fn(IoKind)) {
    for io in IO_KINDS {
        test(io);
    }
}

#[test]
fn appends_survive_restarts_clean_and_not() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let mut ends = [0i64; 3];
        for round in 0..6 {
            let (data, mut found) = recover(dir.path());
            assert_eq!(found.len(), if round == 0 { 0 } else { 3 });
            on_shard(async {
                let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
                for (k, end) in ends.iter_mut().enumerate() {
                    let id = k as u64 + 1;
                    let log = match found.remove(&id) {
                        None => store.create(id, &format!("t-{k}"), GroupConfig::default()).unwrap(),
                        Some(group) => {
                            assert_eq!(group.health, GroupHealth::Ok);
                            assert_eq!(group.log_end_offset, *end);
                            store.attach(group, GroupConfig::default())
                        }
                    };
                    assert_eq!(log.log_end_offset(), *end);
                    log.set_high_watermark(*end);
                    check_log(&log, 0, *end, 100_000).await;
                    let writer = Writer::new(&store, log.clone());
                    for n in 0..40 {
                        *end = writer.append(1 + n % 4, 50 + 3000 * (n as usize % 3)).await;
                    }
                    check_log(&log, 0, *end, 10_000).await;
                    assert_eq!(log.epoch_at(*end - 1), i32::try_from(writer.term).unwrap());
                }
                if round % 2 == 0 {
                    store.shutdown().await.unwrap();
                }
            });
        }
    });
}

#[test]
fn the_ring_goes_round_and_everything_stays() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let mut ends = Vec::new();
        let (data, _) = recover(dir.path());
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let config = GroupConfig { segment_bytes: 700_000, ..GroupConfig::default() };
            let writers: Vec<Writer> = (1..=7)
                .map(|id| Writer::new(&store, store.create(id, &format!("t-{id}"), config.clone()).unwrap()))
                .collect();
            // About 20 MiB through a ring of 3.
            for n in 0..3000usize {
                writers[n % 7].append(2, 1000 + n % 5000).await;
            }
            let stats = store.stats();
            assert!(stats.wal_files_retired > 5, "{stats:?}");
            assert!(stats.segment_bytes_written > 10 << 20, "{stats:?}");
            assert!(stats.cache_bytes <= 2 << 20, "{stats:?}");
            for writer in &writers {
                ends.push(writer.log.log_end_offset());
                check_log(&writer.log, 0, writer.log.log_end_offset(), 50_000).await;
                check_log(&writer.log, 0, writer.log.log_end_offset(), 3_000_000).await;
            }
        });
        drop(data);
        let (data, mut found) = recover(dir.path());
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            for (k, end) in ends.iter().enumerate() {
                let log = store.attach(found.remove(&(k as u64 + 1)).unwrap(), GroupConfig::default());
                assert_eq!(log.log_end_offset(), *end);
                check_log(&log, 0, *end, 1 << 20).await;
            }
            store.shutdown().await.unwrap();
        });
    });
}

#[test]
fn one_large_batch_and_limits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let config = StoreConfig { wal_file_bytes: 8 << 20, ..small() };
        let store = ShardStore::open(&data, config).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        writer.append(1, 3 << 20).await;
        writer.append(1, 10).await;
        let end = writer.append(1, 3 << 20).await;
        check_log(&writer.log, 0, end, 1).await;
        assert!(matches!(writer.stage(1, 8 << 20), Err(StageError::TooLarge { .. })));
        assert!(!writer.log.has_room(8 << 20));
        let gap = Entry { index: 9, term: 1, payload: Payload::Control(bytes::Bytes::new()) };
        assert!(matches!(writer.log.stage(None, &[gap]), Err(StageError::Gap { .. })));
        let wrong = Entry { index: 4, term: 1, payload: Payload::Batch(batch(1, 77, 1, 1, 5)) };
        assert!(matches!(writer.log.stage(None, &[wrong]), Err(StageError::Gap { .. })));
        assert!(matches!(
            writer.log.read(99, 100, 10).await,
            Err(ReadError::OutOfRange { start: 0, end: 3 })
        ));
        assert_eq!(writer.log.read(3, 100, 10).await.unwrap().len(), 0);
        assert!(matches!(store.create(1, "x", GroupConfig::default()), Err(CreateError::GroupExists(1))));
        assert!(matches!(
            store.create(2, "t-0", GroupConfig::default()),
            Err(CreateError::DirectoryExists(_))
        ));
        assert!(matches!(store.create(2, "../t", GroupConfig::default()), Err(CreateError::BadName(_))));
    });
}

#[test]
fn control_entries_take_an_index_and_no_offset() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let log = store.create(1, "t-0", GroupConfig::default()).unwrap();
        let control =
            |index| Entry { index, term: 3, payload: Payload::Control(bytes::Bytes::from_static(b"c")) };
        let data = |index, base| Entry { index, term: 3, payload: Payload::Batch(batch(1, base, 3, 2, 9)) };
        let hard = HardState { term: 3, vote: 7, commit: 4 };
        let lsn =
            log.stage(Some(hard), &[control(1), data(2, 0), control(3), data(4, 2), control(5)]).unwrap();
        Writer::new(&store, log.clone()).durable(lsn).await;
        assert_eq!((log.last_index(), log.log_end_offset()), (5, 4));
    });
    drop(data);
    let (data, mut found) = recover(dir.path());
    let group = found.remove(&1).unwrap();
    assert_eq!((group.last_index, group.last_term, group.log_end_offset), (5, 3, 4));
    assert_eq!(group.hard_state, HardState { term: 3, vote: 7, commit: 4 });
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let log = store.attach(group, GroupConfig::default());
        check_log(&log, 0, 4, 1).await;
    });
}

#[test]
fn a_suffix_is_replaced_in_memory_and_on_disk() {
    run_all(|io| {
        for restart_first in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (mut data, _) = recover(dir.path());
            let entry = |index: u64, term, base| Entry {
                index,
                term,
                payload: Payload::Batch(batch(1, base, term, 2, 500)),
            };
            on_shard(async {
                let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
                let log = store.create(1, "t-0", GroupConfig::default()).unwrap();
                let entries: Vec<Entry> = (1..=9).map(|k| entry(k, 1, 2 * (k as i64 - 1))).collect();
                let lsn = log.stage(Some(HardState { term: 1, vote: 1, commit: 3 }), &entries).unwrap();
                Writer::new(&store, log.clone()).durable(lsn).await;
                log.set_high_watermark(6);
                if !restart_first {
                    let lsn = log
                        .stage(Some(HardState { term: 2, vote: 2, commit: 3 }), &[entry(5, 2, 8)])
                        .unwrap();
                    Writer::new(&store, log.clone()).durable(lsn).await;
                    assert_eq!((log.last_index(), log.last_term(), log.log_end_offset()), (5, 2, 10));
                    check_log(&log, 0, 10, 1 << 20).await;
                }
            });
            for round in 0..2 {
                drop(data);
                let (reopened, mut found) = recover(dir.path());
                data = reopened;
                let group = found.remove(&1).unwrap();
                assert_eq!(group.health, GroupHealth::Ok);
                let replaced = !restart_first || round == 1;
                let want = if replaced { (5, 2, 10) } else { (9, 1, 18) };
                assert_eq!((group.last_index, group.last_term, group.log_end_offset), want);
                on_shard(async {
                    let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
                    let log = store.attach(group, GroupConfig::default());
                    if !replaced {
                        // All nine are in a segment now; the last five go.
                        let lsn = log
                            .stage(Some(HardState { term: 2, vote: 2, commit: 3 }), &[entry(5, 2, 8)])
                            .unwrap();
                        Writer::new(&store, log.clone()).durable(lsn).await;
                        assert_eq!(log.log_end_offset(), 10);
                    }
                    let read = log.read(8, 10, 1 << 20).await.unwrap();
                    let header = flumen_protocol::record_batch::parse(&read[0]).unwrap();
                    assert_eq!((header.leader_epoch, header.base_offset), (2, 8));
                    assert_eq!(log.epoch_end_offset(1), (1, 8));
                    check_log(&log, 0, 10, 1 << 20).await;
                    if round == 1 {
                        log.set_high_watermark(10);
                        store.shutdown().await.unwrap();
                    }
                });
            }
            drop(data);
            let (_, mut found) = recover(dir.path());
            assert_eq!(found.remove(&1).unwrap().log_end_offset, 10);
        }
    });
}

/// A reader that reads on in large pieces gets the next one fetched. What is cut off meanwhile must not come back by that.
#[test]
fn a_drain_gets_what_the_log_has_also_when_it_is_cut_meanwhile() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let config = StoreConfig { io, wal_file_bytes: 8 << 20, ..small() };
        let entry = |index: u64, term| {
            let payload = Payload::Batch(batch(1, index as i64 - 1, term, 1, 100_000));
            Entry { index, term, payload }
        };
        on_shard(async {
            let store = ShardStore::open(&data, config.clone()).await.unwrap();
            let log = store.create(1, "t-0", GroupConfig::default()).unwrap();
            for index in 1..=120 {
                let hard = HardState { term: 1, vote: 1, commit: 1 };
                let lsn = log.stage(Some(hard), &[entry(index, 1)]).unwrap();
                Writer::new(&store, log.clone()).durable(lsn).await;
            }
        });
        drop(data);
        // Now all of them are in a segment, and none in memory.
        let (data, mut found) = recover(dir.path());
        on_shard(async {
            let store = ShardStore::open(&data, config.clone()).await.unwrap();
            let log = store.attach(found.remove(&1).unwrap(), GroupConfig::default());
            assert_eq!(log.log_end_offset(), 120);
            check_log(&log, 0, 120, 1 << 20).await;
            // One that wants less than what was fetched for it, and one that has gone elsewhere.
            check_log(&log, 0, 40, 1 << 20).await;
            check_log(&log, 40, 120, 300_000).await;
            for (from, epochs) in [(20, 1), (20, 2)] {
                let first = log.read(0, 120, 1 << 20).await.unwrap();
                assert_eq!(first[0].len() / 100_000, 10);
                log.read(10, 120, 1 << 20).await.unwrap();
                if epochs == 2 {
                    // The piece from 20 on is on its way.
                    let hard = HardState { term: 2, vote: 2, commit: 1 };
                    let lsn = log.stage(Some(hard), &[entry(26, 2)]).unwrap();
                    Writer::new(&store, log.clone()).durable(lsn).await;
                    assert_eq!(log.log_end_offset(), 26);
                }
                let read = log.read(from, log.log_end_offset(), 4 << 20).await.unwrap();
                let pieces = read.iter().flat_map(|piece| flumen_protocol::record_batch::batches(piece));
                let headers: Vec<(i64, i32)> = pieces
                    .map(|found| found.map(|(header, _)| (header.base_offset, header.leader_epoch)).unwrap())
                    .collect();
                assert!(!headers.is_empty());
                for (offset, epoch) in headers {
                    assert_eq!(epoch, if epochs == 2 && offset >= 25 { 2 } else { 1 }, "at {offset}");
                    assert!(epochs == 1 || offset <= 25);
                }
            }
            check_log(&log, 0, 26, 1 << 20).await;
        });
    });
}

#[test]
fn uncommitted_entries_move_on_with_the_ring() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let stuck = Writer::new(&store, store.create(1, "stuck-0", GroupConfig::default()).unwrap());
        let (lsn, _) = stuck.stage(3, 100).unwrap();
        let (_, end) = stuck.stage(3, 100).unwrap();
        stuck.durable(lsn).await;
        let busy = Writer::new(&store, store.create(2, "busy-0", GroupConfig::default()).unwrap());
        for _ in 0..800 {
            busy.append(1, 10_000).await;
        }
        assert!(store.stats().wal_files_retired >= 4);
        check_log(&stuck.log, 0, end, 1 << 20).await;
    });
    drop(data);
    let (_, found) = recover(dir.path());
    assert_eq!(found[&1].log_end_offset, 6);
    assert_eq!(found[&2].log_end_offset, 800);
}

/// Regression: under load a third of the produces got a storage error, because the ring was full for a moment.
#[test]
fn a_full_ring_is_a_reason_to_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        let mut staged = None;
        while !writer.log.must_wait(10_000, 10_000, 1) {
            assert!(writer.log.has_room(10_000));
            staged = Some(writer.stage(1, 9_000).unwrap());
        }
        let (lsn, end) = staged.unwrap();
        assert!(end > 100, "{end}");
        assert!(
            writer.log.has_room(10_000),
            "the broker's own records have a part of the ring for themselves"
        );
        assert!(!writer.log.must_wait(1 << 30, 1 << 30, 1), "what never fits does not wait");
        // Committed, it moves to a segment, and there is room again.
        writer.durable(lsn).await;
        writer.log.set_high_watermark(end);
        while writer.log.must_wait(10_000, 10_000, 1) {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(writer.append(1, 9_000).await, end + 1);
    });
}

#[test]
fn os_durability_has_its_lane_and_changes_over() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let os = GroupConfig { durability: Durability::Os, ..GroupConfig::default() };
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let first = Writer::new(&store, store.create(1, "os-0", os.clone()).unwrap());
            let second = Writer::new(&store, store.create(2, "d-0", GroupConfig::default()).unwrap());
            for n in 0..600 {
                first.append(1, 5000).await;
                second.append(1, 3000).await;
                if n % 100 == 99 {
                    let durable = n % 200 == 99;
                    first.log.set_config(if durable { GroupConfig::default() } else { os.clone() });
                }
            }
            check_log(&first.log, 0, 600, 1 << 20).await;
        });
        drop(data);
        let (data, mut found) = recover(dir.path());
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            for id in 1..=2 {
                let log = store.attach(found.remove(&id).unwrap(), os.clone());
                assert_eq!(log.log_end_offset(), 600);
                check_log(&log, 0, 600, 1 << 20).await;
            }
        });
    });
}

#[test]
fn an_os_topic_does_not_wait_for_a_durable_commit() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let os = GroupConfig { durability: Durability::Os, ..GroupConfig::default() };
    on_shard(async {
        let config = StoreConfig {
            io: IoKind::Uring,
            wal_file_bytes: 16 << 20,
            direct_batch_bytes: usize::MAX,
            ..small()
        };
        let store = ShardStore::open(&data, config).await.unwrap();
        let slow = Writer::new(&store, store.create(1, "d-0", GroupConfig::default()).unwrap());
        let fast = Writer::new(&store, store.create(2, "os-0", os).unwrap());
        // That the partition exists is durable first; from its next record on it is the os lane's alone.
        let (first, _) = fast.stage(1, 100).unwrap();
        fast.durable(first).await;
        // Several commits of a megabyte each, one after the other.
        let (far, _) = (0..6).map(|_| slow.stage(1, 1 << 20).unwrap()).last().unwrap();
        let (near, _) = fast.stage(1, 100).unwrap();
        assert_eq!((far.0, near.0), (Lane::Durable, Lane::Os));
        fast.durable(near).await;
        assert!(store.durable_lsn(Lane::Durable) < far.1, "the os lane was reported first");
        slow.durable(far).await;
    });
}

/// A vote in the os lane, and the next one, after a change of durability, in a durable commit that began to fill before:
/// replay must end with the second.
#[test]
fn memory_is_written_later_and_only_its_end_is_lost() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let config = GroupConfig { durability: Durability::Memory, ..GroupConfig::default() };
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let log = store.create(1, "t-0", config.clone()).unwrap();
            let writer = Writer::new(&store, log.clone());
            // A term is never forgotten, so its commit does not wait.
            let end = writer.append(3, 100).await;
            // Nobody hurries these, and they are written all the same.
            let (lsn, next) = writer.stage(2, 100).unwrap();
            assert_eq!((lsn.0, next), (Lane::Os, end + 2));
            assert!(store.durable_lsn(lsn.0) < lsn.1);
            writer.durable(lsn).await;
            // Acknowledged from memory, and the process ends before anything else gets its turn.
            let (lsn, _) = writer.stage(4, 100).unwrap();
            log.set_high_watermark(9);
            assert!(store.durable_lsn(lsn.0) < lsn.1);
        });
        drop(data);
        let (data, mut found) = recover(dir.path());
        let group = found.remove(&1).unwrap();
        assert!(group.health.is_ok(), "{:?}", group.health);
        assert_eq!(group.log_end_offset, 5);
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let log = store.attach(group, config.clone());
            log.set_high_watermark(5);
            check_log(&log, 0, 5, 100).await;
            let writer = Writer::new(&store, log.clone());
            writer.append(1, 100).await;
            writer.stage(2, 100).unwrap();
            // What was forced is there, and a clean stop loses nothing.
            log.force().await.unwrap();
            log.set_high_watermark(8);
            writer.stage(2, 100).unwrap();
            log.set_high_watermark(10);
            store.shutdown().await.unwrap();
        });
        drop(data);
        let (_, found) = recover(dir.path());
        assert!(found[&1].health.is_ok());
        assert_eq!(found[&1].log_end_offset, 10);
    });
}

#[test]
fn records_keep_their_order_from_one_lane_to_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let os = GroupConfig { durability: Durability::Os, ..GroupConfig::default() };
    on_shard(async {
        let config = StoreConfig {
            io: IoKind::Uring,
            wal_file_bytes: 16 << 20,
            direct_batch_bytes: usize::MAX,
            ..small()
        };
        let store = ShardStore::open(&data, config).await.unwrap();
        let other = Writer::new(&store, store.create(1, "d-0", GroupConfig::default()).unwrap());
        let moved = store.create(2, "os-0", os).unwrap();
        let vote = |term| Some(HardState { term, vote: 1, commit: 0 });
        other.durable(moved.stage(vote(4), &[]).unwrap()).await;
        // A commit of a megabyte on its way, and one filling behind it.
        let _ = (0..3).map(|_| other.stage(1, 1 << 20).unwrap()).last();
        let (filling, _) = other.stage(1, 10).unwrap();
        let first = moved.stage(vote(5), &[]).unwrap();
        assert_eq!((filling.0, first.0), (Lane::Durable, Lane::Os));
        other.durable(first).await;
        moved.set_config(GroupConfig::default());
        let second = moved.stage(vote(6), &[]).unwrap();
        assert_eq!(second.0, Lane::Durable);
        assert!(second.1 > first.1 && first.1 > filling.1);
        other.durable(second).await;
    });
    drop(data);
    let (_, found) = recover(dir.path());
    assert_eq!(found[&2].hard_state.term, 6);
}

#[test]
fn producers_are_part_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..4i32 {
        let (data, mut found) = recover(dir.path());
        on_shard(async {
            let store = ShardStore::open(&data, small()).await.unwrap();
            let log = match found.remove(&1) {
                None => store.create(1, "t-0", GroupConfig::default()).unwrap(),
                Some(group) => {
                    assert_eq!(group.producers.producer(9), Some((0, round * 20 - 1)));
                    store.attach(group, GroupConfig::default())
                }
            };
            for k in 0..10 {
                let base = log.log_end_offset();
                let bytes = produced(9, 0, round * 20 + k * 2, base, 2);
                let header = flumen_protocol::record_batch::parse(&bytes).unwrap();
                assert_eq!(log.producers().check(&header), Ok(Verdict::Append));
                let entry = Entry { index: log.last_index() + 1, term: 1, payload: Payload::Batch(bytes) };
                let lsn = log.stage(None, &[entry]).unwrap();
                Writer::new(&store, log.clone()).durable(lsn).await;
                log.set_high_watermark(log.log_end_offset());
                assert!(matches!(log.producers().check(&header), Ok(Verdict::Duplicate { .. })));
            }
            match round {
                0 => store.shutdown().await.unwrap(),
                // Rebuilt from headers alone.
                1 => {
                    for entry in std::fs::read_dir(dir.path().join("log/t-0")).unwrap() {
                        let path = entry.unwrap().path();
                        if path.extension().is_some_and(|e| e == "snapshot" || e == "idx") {
                            std::fs::remove_file(path).unwrap();
                        }
                    }
                }
                _ => {}
            }
        });
    }
}

#[test]
fn retention_start_and_times() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let config = GroupConfig {
            segment_bytes: 100_000,
            retention_ms: -1,
            retention_bytes: -1,
            ..GroupConfig::default()
        };
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", config.clone()).unwrap());
            for _ in 0..1000 {
                writer.append(1, 2000).await;
            }
            let log = &writer.log;
            // Timestamps are 1000 + offset.
            assert_eq!(log.find_timestamp(1500, 1000).await.unwrap(), Some((1500, 500)));
            assert_eq!(log.find_timestamp(0, 1000).await.unwrap(), Some((1000, 0)));
            assert_eq!(log.find_timestamp(1999, 1000).await.unwrap(), Some((1999, 999)));
            assert_eq!(log.find_timestamp(1999, 999).await.unwrap(), None);
            assert_eq!(log.find_timestamp(2000, 1000).await.unwrap(), None);
            assert_eq!(log.max_timestamp().await.unwrap(), Some((1999, 999)));
            assert_eq!(log.enforce_retention(1 << 40, i64::MAX).await.deleted_segments, 0);
            let size = log.size_bytes();
            // Only what is in segments can be deleted, and the flusher need not keep up with the WAL.
            while log.flushed_offset() < 850 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            log.set_config(GroupConfig { retention_bytes: 1_000_000, ..config.clone() });
            let held = log.enforce_retention(3000, 200).await;
            assert!(held.log_start_offset <= 200 && held.deleted_segments > 0, "{held:?}");
            let out = log.enforce_retention(3000, i64::MAX).await;
            assert!(log.size_bytes() >= 1_000_000 && log.size_bytes() < size, "{out:?}");
            let start = log.log_start_offset();
            assert_eq!(start, out.log_start_offset);
            assert!(matches!(log.read(start - 1, 1000, 10).await, Err(ReadError::OutOfRange { .. })));
            check_log(log, start, 1000, 100_000).await;
            assert_eq!(log.find_timestamp(0, 1000).await.unwrap(), Some((1000 + start, start)));
            let lsn = log.advance_log_start(start + 3).unwrap();
            writer.durable(lsn).await;
            assert!(matches!(log.advance_log_start(1001), Err(AdvanceError::OutOfRange { .. })));
            assert_eq!(log.find_timestamp(0, 1000).await.unwrap(), Some((1003 + start, start + 3)));
            check_log(log, start + 3, 1000, 100_000).await;
            let config = GroupConfig { retention_ms: 1000, retention_bytes: -1, ..config.clone() };
            log.set_config(config);
            let out = log.enforce_retention(2800, i64::MAX).await;
            assert!(out.log_start_offset > 700 && out.log_start_offset <= 800, "{out:?}");
            // The commit that carries it.
            writer.durable(log.advance_log_start(out.log_start_offset).unwrap()).await;
        });
        drop(data);
        let (data, mut found) = recover(dir.path());
        let group = found.remove(&1).unwrap();
        assert!(group.log_start_offset > 700 && group.log_end_offset == 1000);
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let log = store.attach(group, GroupConfig { retention_ms: 1000, ..config.clone() });
            log.set_high_watermark(1000);
            check_log(&log, log.log_start_offset(), 1000, 100_000).await;
            // Everything is too old: even the last segment goes, and appending goes on at its end.
            assert_eq!(log.enforce_retention(1 << 40, i64::MAX).await.log_start_offset, 1000);
            assert_eq!(log.size_bytes(), 0);
            let writer = Writer::new(&store, log.clone());
            let end = writer.append(5, 100).await;
            assert_eq!(end, 1005);
            check_log(&log, 1000, 1005, 10).await;
            store.shutdown().await.unwrap();
        });
        drop(data);
        let (_, found) = recover(dir.path());
        assert_eq!((found[&1].log_start_offset, found[&1].log_end_offset), (1000, 1005));
    });
}

/// Emptying the busy lane's files must not keep the flusher from the quiet partition whose batches are the oldest.
#[test]
fn a_quiet_partition_does_not_hold_up_eviction() {
    run_all(|io| {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        on_shard(async {
            let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
            let quiet = Writer::new(&store, store.create(1, "t-1", GroupConfig::default()).unwrap());
            quiet.append(1, 100).await;
            let config = GroupConfig { durability: Durability::Os, ..GroupConfig::default() };
            let busy: Vec<Writer> = (2..202)
                .map(|id| Writer::new(&store, store.create(id, &format!("t-{id}"), config.clone()).unwrap()))
                .collect();
            let largest = std::cell::Cell::new(0);
            let all = busy.iter().map(|writer| async {
                for _ in 0..16 {
                    writer.append(1, 20_000).await;
                    largest.set(largest.get().max(store.stats().cache_bytes));
                }
            });
            futures_util::future::join_all(all).await;
            let largest = largest.get();
            // 64 MB went through; the budget is 1 MiB, the rings hold 3 MiB each, a run is up to 1 MiB.
            assert!(largest < 8 << 20, "{largest} bytes in the cache");
            quiet.append(1, 100).await;
            check_log(&quiet.log, 0, 2, 1000).await;
            check_log(&busy[7].log, 0, 16, 100_000).await;
        });
    });
}

#[test]
fn deletion_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let one = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        let two = Writer::new(&store, store.create(2, "t-1", GroupConfig::default()).unwrap());
        for _ in 0..100 {
            one.append(1, 10_000).await;
            two.append(1, 100).await;
        }
        store.delete(1).await.unwrap();
        assert!(matches!(store.delete(1).await, Err(DeleteError::Unknown(1))));
        assert!(matches!(one.stage(1, 1), Err(StageError::Deleted)));
        assert!(!dir.path().join("log/t-0").exists());
        // The name may be used again by another group.
        let three = Writer::new(&store, store.create(3, "t-0", GroupConfig::default()).unwrap());
        three.append(4, 10).await;
    });
    // Cut short in the middle of a deletion.
    std::fs::create_dir(dir.path().join("log/t-9.9.deleted")).unwrap();
    std::fs::rename(dir.path().join("log/t-1"), dir.path().join("log/t-1.2.deleted")).unwrap();
    drop(data);
    let (data, found) = recover(dir.path());
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [3]);
    assert_eq!(found[&3].log_end_offset, 4);
    let names: Vec<_> =
        std::fs::read_dir(dir.path().join("log")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["t-0"]);
    data.remove_group("t-0").unwrap();
    drop(data);
    assert!(recover(dir.path()).1.is_empty());
}

#[test]
fn the_number_of_shards_may_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut end = 0;
    for shards in [1usize, 4, 2, 3] {
        let (data, mut found) = recover(dir.path());
        for shard in 0..shards {
            let mine: Vec<u64> = (1..=8u64).filter(|id| *id as usize % shards == shard).collect();
            on_shard(async {
                let store = ShardStore::open(&data, StoreConfig { shard, ..small() }).await.unwrap();
                for id in mine {
                    let log = match found.remove(&id) {
                        Some(group) => store.attach(group, GroupConfig::default()),
                        None => store.create(id, &format!("t-{id}"), GroupConfig::default()).unwrap(),
                    };
                    assert_eq!(log.log_end_offset(), end);
                    let writer = Writer::new(&store, log);
                    for _ in 0..5 {
                        writer.append(2, 3000).await;
                    }
                }
                if shard == 0 {
                    store.shutdown().await.unwrap();
                }
            });
        }
        end += 10;
    }
    let (_, found) = recover(dir.path());
    assert!(found.len() == 8 && found.values().all(|group| group.log_end_offset == end));
}

#[test]
fn opening_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let data = DataDir::open(&path).unwrap();
    assert!(DataDir::open(&path).unwrap_err().to_string().contains("another flumen process"));
    on_shard(async {
        assert!(matches!(ShardStore::open(&data, small()).await, Err(OpenError::NotRecovered)));
    });
    drop(data);
    std::fs::write(path.join("FORMAT"), "flumen 99\n").unwrap();
    assert!(DataDir::open(&path).unwrap_err().to_string().contains("flumen 99"));
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(DataDir::open(&file).unwrap_err().to_string().contains("not a directory"));
    assert!(DataDir::open(file.join("below")).unwrap_err().to_string().contains("not a directory"));
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::create_dir(other.join("lost+found")).unwrap();
    drop(DataDir::open(&other).unwrap());
    let precious = dir.path().join("precious");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("thesis.txt"), "x").unwrap();
    assert!(matches!(DataDir::open(&precious), Err(OpenError::NotOurs { .. })));
    // What stands beside data is no longer asked about once FORMAT is there.
    std::fs::write(other.join("notes.txt"), "x").unwrap();
    drop(DataDir::open(&other).unwrap());
    std::fs::remove_file(other.join("FORMAT")).unwrap();
    assert!(matches!(DataDir::open(&other), Err(OpenError::NotOurs { .. })));
}

#[test]
fn a_stopped_store_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        writer.append(1, 10).await;
        store.shutdown().await.unwrap();
        assert_eq!(writer.stage(1, 1), Err(StageError::Poisoned));
        assert!(store.next_durable(Lane::Durable, store.durable_lsn(Lane::Durable)).await.is_err());
    });
}
