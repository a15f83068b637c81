//! Compaction against a model: what is left has its offset and its order, the newest record of every key is there, and no
//! crash, reader or retention pass sees anything in between.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use common::*;
use flumen_io::simulated::{Crash, Machine, Settings};
use flumen_protocol::compression::Compression;
use flumen_protocol::record::{BatchBuilder, RecordsBuf};
use flumen_protocol::record_batch::{self, BatchHeader};
use flumen_storage::*;
use proptest::prelude::*;

const EVERYTHING: i64 = i64::MAX;

fn compacting(segment_bytes: u64) -> GroupConfig {
    let compaction = CompactionConfig { min_dirty_permille: 0, ..CompactionConfig::default() };
    GroupConfig { segment_bytes, retention_ms: -1, compaction: Some(compaction), ..GroupConfig::default() }
}

type Key = Vec<u8>;

/// All that was ever written, and the newest of it.
#[derive(Default, Clone)]
struct Model {
    records: BTreeMap<i64, (Key, Option<Vec<u8>>)>,
    end: i64,
    sequences: BTreeMap<i64, i32>,
    index: u64,
}

impl Model {
    fn newest(&self) -> BTreeMap<Key, (i64, Option<Vec<u8>>)> {
        self.records.iter().map(|(offset, (key, value))| (key.clone(), (*offset, value.clone()))).collect()
    }

    fn alive(&self) -> BTreeMap<Key, Vec<u8>> {
        self.newest().into_iter().filter_map(|(key, (_, value))| Some((key, value?))).collect()
    }

    fn batch(
        &mut self,
        records: &[(Key, Option<Vec<u8>>)],
        producer: i64,
        codec: Compression,
    ) -> BatchBuilder {
        let mut builder = BatchBuilder::new();
        builder.leader_epoch(1).compression(codec);
        for (key, value) in records {
            builder.append(1_000 + self.end, Some(key), value.as_deref(), &[("h", Some(b"x"))]);
            self.records.insert(self.end, (key.clone(), value.clone()));
            self.end += 1;
        }
        if producer >= 0 {
            let next = self.sequences.entry(producer).or_insert(0);
            builder.producer(producer, 0, *next);
            *next += i32::try_from(records.len()).unwrap();
        }
        builder
    }
}

/// Stages one batch and waits until it is committed.
async fn append(store: &ShardStore, log: &GroupLog, model: &mut Model, builder: &BatchBuilder) {
    let base = log.log_end_offset();
    model.index = log.last_index() + 1;
    let hard = HardState { term: 1, vote: 1, commit: model.index - 1 };
    let payload = Payload::Batch(builder.build(base).freeze());
    let bytes = payload.bytes().len();
    while !log.has_room(bytes) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let (lane, lsn) = log.stage(Some(hard), &[Entry { index: model.index, term: 1, payload }]).unwrap();
    while store.durable_lsn(lane) < lsn {
        store.next_durable(lane, store.durable_lsn(lane)).await.unwrap();
    }
    log.set_high_watermark(log.log_end_offset());
}

struct Found {
    records: BTreeMap<i64, (Key, Option<Vec<u8>>)>,
    headers: Vec<BatchHeader>,
}

impl Found {
    fn alive(&self) -> BTreeMap<Key, Vec<u8>> {
        let newest: BTreeMap<_, _> = self.records.values().cloned().collect();
        newest.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

/// The whole log as a consumer gets it, a few bytes at a time.
async fn read_all(log: &GroupLog, max_bytes: usize) -> Found {
    let (mut at, end) = (log.log_start_offset(), log.high_watermark());
    let mut found = Found { records: BTreeMap::new(), headers: Vec::new() };
    let mut buf = RecordsBuf::new();
    while at < end {
        let pieces = log.read(at, end, max_bytes).await.unwrap();
        assert!(!pieces.is_empty(), "nothing from {at} to {end}");
        for piece in pieces {
            for batch in record_batch::batches(&piece) {
                let (header, bytes) = batch.unwrap();
                assert!(
                    record_batch::crc_ok(bytes) && header.next_offset() > at && header.next_offset() <= end
                );
                for record in buf.decode(bytes, 1 << 24).unwrap() {
                    let record = record.unwrap();
                    assert_eq!(record.timestamp, 1_000 + record.offset, "timestamps stay");
                    assert_eq!(record.headers.clone().next(), Some((&b"h"[..], Some(&b"x"[..]))));
                    let (key, value) = (record.key.unwrap().to_vec(), record.value.map(<[u8]>::to_vec));
                    let last = found.records.last_key_value().map_or(-1, |(offset, _)| *offset);
                    assert!(record.offset > last, "offsets rise");
                    found.records.insert(record.offset, (key, value));
                }
                at = header.next_offset();
                found.headers.push(header);
            }
        }
    }
    assert_eq!(at, end);
    found
}

/// What is left is a part of what was written, with the newest of every key; below `clean` nothing else.
fn check(found: &Found, model: &Model, clean: i64) {
    for (offset, record) in &found.records {
        assert_eq!(Some(record), model.records.get(offset), "offset {offset}");
    }
    assert_eq!(found.alive(), model.alive());
    let below = |offset: i64| offset < clean;
    let mut seen = BTreeSet::new();
    for (offset, (key, _)) in found.records.iter().rev().filter(|(offset, _)| below(**offset)) {
        assert!(
            seen.insert(key.clone()),
            "key {key:?} has more than one record below {clean}, as at {offset}"
        );
    }
}

fn files_of(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> = std::fs::read_dir(dir.join("log/t-0"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().unwrap().ends_with(suffix))
        .collect();
    out.sort();
    out
}

fn is_compacted(path: &Path) -> bool {
    path.file_name().unwrap().to_str().unwrap().split('.').count() > 2
}

/// Opens the partition, works with it, and stops cleanly, so that everything is in segments.
fn life<T>(
    path: &Path,
    io: IoKind,
    config: &GroupConfig,
    work: impl AsyncFnOnce(&ShardStore, &GroupLog, RecoveredInfo) -> T,
) -> T {
    let (data, mut found) = recover(path);
    on_shard(async {
        let store = ShardStore::open(&data, StoreConfig { io, ..small() }).await.unwrap();
        let mut info = RecoveredInfo::default();
        let log = match found.remove(&1) {
            None => store.create(1, "t-0", config.clone()).unwrap(),
            Some(group) => {
                assert!(group.health.is_ok(), "{:?}", group.health);
                info.producers = group.producers.producers().map(|(id, _, last, _)| (id, last)).collect();
                let end = group.log_end_offset;
                let log = store.attach(group, config.clone());
                log.set_high_watermark(end);
                log
            }
        };
        let out = work(&store, &log, info).await;
        store.shutdown().await.unwrap();
        out
    })
}

#[derive(Default)]
struct RecoveredInfo {
    producers: BTreeMap<i64, i32>,
}

#[derive(Debug, Clone)]
struct Written {
    records: Vec<(u8, Option<u8>)>,
    producer: i64,
    codec: Compression,
}

fn written() -> impl Strategy<Value = Written> {
    let record = (0u8..24, prop::option::weighted(0.8, 0u8..255));
    let codec = prop_oneof![
        4 => Just(Compression::None),
        1 => Just(Compression::Lz4),
        1 => Just(Compression::Gzip),
        1 => Just(Compression::Zstd),
        1 => Just(Compression::Snappy)
    ];
    (prop::collection::vec(record, 1..8), -3i64..3, codec).prop_map(|(records, producer, codec)| Written {
        records,
        producer,
        codec,
    })
}

fn keyed(records: &[(u8, Option<u8>)]) -> Vec<(Key, Option<Vec<u8>>)> {
    records
        .iter()
        .map(|(key, value)| {
            (format!("key {key}").into_bytes(), value.map(|value| vec![value; usize::from(value)]))
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_is_left_is_what_the_model_says(
        rounds in prop::collection::vec(prop::collection::vec(written(), 1..40), 1..5),
        segment_bytes in 300u64..6_000,
        keys_max in prop_oneof![Just(1usize), 2usize..40],
        delete_retention_ms in prop_oneof![Just(0i64), Just(1i64 << 40)],
        max_bytes in prop_oneof![Just(1usize), Just(1usize << 20)],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut config = compacting(segment_bytes);
        config.compaction = config.compaction.map(|c| CompactionConfig { delete_retention_ms, ..c });
        let mut model = Model::default();
        for (number, batches) in rounds.iter().enumerate() {
            // Once through the tail and once without it, and without what recovery could take from beside the log.
            for path in if number > 0 { files_of(dir.path(), ".snapshot") } else { Vec::new() } {
                std::fs::remove_file(path).unwrap();
            }
            life(dir.path(), IoKind::Sync, &config, async |store, log, info| {
                for (id, next) in &model.sequences {
                    assert_eq!(info.producers.get(id), Some(&(next - 1)), "producer {id}");
                }
                let now_ms = 1_000_000 + number as i64;
                let outcome = log.compact_bounded(now_ms, EVERYTHING, keys_max).await.unwrap();
                let found = read_all(log, max_bytes).await;
                check(&found, &model, outcome.clean_offset);
                for written in batches {
                    let records = keyed(&written.records);
                    let builder = model.batch(&records, written.producer, written.codec);
                    append(store, log, &mut model, &builder).await;
                }
                check(&read_all(log, max_bytes).await, &model, outcome.clean_offset);
            });
        }
        // Until nothing more is due, and one restart later.
        for number in 0..2 {
            life(dir.path(), IoKind::Sync, &config, async |_, log, _| {
                for _ in 0..40 {
                    let now_ms = 1 << 30;
                    if log.compact_bounded(now_ms, EVERYTHING, keys_max).await.unwrap().passes == 0 {
                        break;
                    }
                }
                let all = files_of(dir.path(), ".log");
                let last = all.last().and_then(|path| path.file_name()?.to_str()?[..20].parse::<i64>().ok());
                check(&read_all(log, max_bytes).await, &model, last.unwrap_or(0));
            });
            if number == 0 {
                for path in files_of(dir.path(), ".idx") {
                    std::fs::remove_file(path).unwrap();
                }
            }
        }
    }
}

fn fill(model: &mut Model, keys: u32, value: u8, bytes: usize) -> BatchBuilder {
    let records: Vec<(Key, Option<Vec<u8>>)> =
        (0..keys).map(|key| (format!("key {key}").into_bytes(), Some(vec![value; bytes]))).collect();
    model.batch(&records, -1, Compression::None)
}

#[test]
fn a_busy_log_is_compacted_under_its_readers() {
    for io in IO_KINDS {
        let dir = tempfile::tempdir().unwrap();
        let config = compacting(300_000);
        let mut model = Model::default();
        life(dir.path(), io, &config, async |store, log, _| {
            // The ring takes 3 MiB: most of this is in segments when it is written, and none of it is in a group state
            // until compaction asks for one.
            for round in 0..60 {
                let builder = fill(&mut model, 50, round, 2000);
                append(store, log, &mut model, &builder).await;
            }
            while log.flushed_offset() < 2500 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            let before = log.size_bytes();
            let reader = tokio::task::spawn_local({
                let (log, model) = (log.clone(), model.clone());
                async move {
                    for max_bytes in [1, 200_000, 1, 5_000_000, 1] {
                        check(&read_all(&log, max_bytes).await, &model, 0);
                        let at = log.find_timestamp(1_000 + 2_999, 3_000).await.unwrap();
                        assert_eq!(at, Some((3_999, 2_999)));
                        assert_eq!(log.max_timestamp().await.unwrap(), Some((3_999, 2_999)));
                    }
                }
            });
            let outcome = log.compact(5_000, EVERYTHING).await.unwrap();
            assert_eq!(outcome.passes, 1);
            assert!(outcome.records_dropped > 2000 && outcome.clean_offset > 2000, "{outcome:?}");
            assert!(outcome.segments_after < outcome.segments_before, "{outcome:?}");
            assert!(log.size_bytes() < before / 3, "{} of {before}", log.size_bytes());
            assert_eq!(log.log_start_offset(), 0);
            reader.await.unwrap();
            let found = read_all(log, 1 << 20).await;
            check(&found, &model, outcome.clean_offset);
            // In a hole: the next batch that is left. Offsets of the time before are answered with it, too.
            let pieces = log.read(0, log.high_watermark(), 1).await.unwrap();
            let first = record_batch::parse(&pieces[0]).unwrap();
            assert_eq!(first.base_offset, found.headers[0].base_offset);
            assert!(first.base_offset > 1000, "{first:?}");
            let hit = log.find_timestamp(0, 3000).await.unwrap().unwrap();
            assert_eq!(hit.1, *found.records.first_key_value().unwrap().0);
            // Until nothing is new; the flusher may have added some.
            let mut clean = outcome.clean_offset;
            let mut passes = 1;
            loop {
                let again = log.compact(5_000, EVERYTHING).await.unwrap();
                if again.passes == 0 {
                    break;
                }
                assert!(again.clean_offset > clean, "{again:?}");
                clean = again.clean_offset;
                passes += 1;
            }
            assert_eq!(store.stats().compactions, passes);
        });
        // What was replaced is gone, at the latest now.
        life(dir.path(), io, &config, async |_, log, _| {
            check(&read_all(log, 1 << 20).await, &model, 0);
        });
        let names = files_of(dir.path(), ".log");
        assert!(names.iter().any(|path| is_compacted(path)) && names.len() < 8, "{names:?}");
        assert_eq!(files_of(dir.path(), ".compacting"), Vec::<PathBuf>::new());
    }
}

#[test]
fn what_is_compacted_leaves_the_memory_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let mut model = Model::default();
    on_shard(async {
        let config = StoreConfig { cache_bytes: 64 << 20, ..small() };
        let store = ShardStore::open(&data, config).await.unwrap();
        let log = store.create(1, "t-0", compacting(300_000)).unwrap();
        for round in 0..30 {
            let builder = fill(&mut model, 50, round, 2000);
            append(&store, &log, &mut model, &builder).await;
        }
        while log.flushed_offset() < 1000 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let before = store.stats().cache_bytes;
        assert!(log.read_cached(0, 1_500, 1).is_some());
        let clean = log.compact(5_000, EVERYTHING).await.unwrap().clean_offset;
        assert!(log.read_cached(0, 1_500, 1).is_none());
        assert!(log.read_cached(clean, 1_500, 1).is_some());
        assert!(store.stats().cache_bytes <= before - 2000 * (clean as u64 - 100));
        let found = read_all(&log, 1 << 20).await;
        check(&found, &model, clean);
        assert!(found.records.len() < 1_500 - clean as usize + 51);
    });
}

#[test]
fn tombstones_stay_for_their_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = compacting(1_000);
    config.compaction = config.compaction.map(|c| CompactionConfig { delete_retention_ms: 1_000, ..c });
    let mut model = Model::default();
    let gone = b"key 3".to_vec();
    let write = async |store: &ShardStore, log: &GroupLog, model: &mut Model, value: u8| {
        for _ in 0..3 {
            let builder = fill(model, 8, value, 100);
            append(store, log, model, &builder).await;
        }
    };
    life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
        write(store, log, &mut model, 1).await;
        let builder = model.batch(&[(gone.clone(), None)], -1, Compression::None);
        append(store, log, &mut model, &builder).await;
        let others: Vec<_> = (4..12u8).map(|k| (vec![k; 4], Some(vec![k; 900]))).collect();
        for record in others {
            let builder = model.batch(&[record], -1, Compression::None);
            append(store, log, &mut model, &builder).await;
        }
    });
    // Its time begins with the first pass that meets it.
    for (now_ms, kept, horizon) in
        [(50_000, true, Some(51_000)), (50_999, true, Some(51_000)), (51_000, false, None)]
    {
        life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
            let outcome = log.compact(now_ms, EVERYTHING).await.unwrap();
            assert!(outcome.passes > 0);
            let found = read_all(log, 1 << 20).await;
            check(&found, &model, outcome.clean_offset);
            let tombstone = found.records.values().any(|(key, value)| *key == gone && value.is_none());
            assert_eq!(tombstone, kept, "at {now_ms}");
            assert!(found.records.values().all(|(key, value)| *key != gone || value.is_none()));
            let horizons: Vec<i64> =
                found.headers.iter().filter_map(BatchHeader::delete_horizon_ms).collect();
            assert_eq!(horizons.first().copied(), horizon);
            // Something new, so that there is a next pass.
            for k in 0..2 {
                let builder = model.batch(&[(vec![9; 4], Some(vec![k; 900]))], -1, Compression::None);
                append(store, log, &mut model, &builder).await;
            }
        });
    }
}

fn marker(producer: i64, commit: bool) -> BatchBuilder {
    let mut builder = BatchBuilder::new();
    builder.producer(producer, 0, -1).transactional().control().leader_epoch(1);
    builder.append(1, Some(&[0, 0, 0, u8::from(commit)]), Some(&[0; 6]), &[]);
    builder
}

#[test]
fn transactions_are_respected() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = compacting(400);
    config.compaction = config.compaction.map(|c| CompactionConfig { delete_retention_ms: 1_000, ..c });
    let data = |producer: i64, sequence: i32, key: &str, value: &[u8]| {
        let mut builder = BatchBuilder::new();
        if producer >= 0 {
            builder.producer(producer, 0, sequence).transactional();
        }
        builder.append(1, Some(key.as_bytes()), Some(value), &[]).leader_epoch(1);
        builder
    };
    let mut model = Model::default();
    let records = async |log: &GroupLog| {
        let (mut at, end, mut out) = (0, log.high_watermark(), Vec::new());
        let mut buf = RecordsBuf::new();
        while at < end {
            for piece in log.read(at, end, 1 << 20).await.unwrap() {
                for batch in record_batch::batches(&piece) {
                    let (header, bytes) = batch.unwrap();
                    let values: Vec<Vec<u8>> = buf
                        .decode(bytes, 1 << 20)
                        .unwrap()
                        .map(|record| record.unwrap().value.unwrap()[..1].to_vec())
                        .collect();
                    out.push((header.base_offset, header.is_control(), values));
                    at = header.next_offset();
                }
            }
        }
        out
    };
    life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
        let batches = [
            data(-1, 0, "a", &[b'0'; 300]),
            // Aborted: it hides nothing, and goes.
            data(5, 0, "a", &[b'1'; 300]),
            data(6, 0, "b", &[b'2'; 300]),
            marker(5, false),
            marker(6, true),
            data(5, 1, "c", &[b'5'; 300]),
            marker(5, true),
            data(6, 1, "b", &[b'7'; 300]),
            marker(6, true),
            // Open: from here on nothing is touched.
            data(7, 0, "a", &[b'9'; 300]),
            data(-1, 0, "c", &[b'A'; 300]),
            data(-1, 0, "d", &[b'B'; 300]),
            data(-1, 0, "d", &[b'C'; 300]),
        ];
        for builder in batches {
            append(store, log, &mut model, &builder).await;
        }
    });
    let is = |kind: &[(i64, bool)], found: &[(i64, bool, Vec<Vec<u8>>)]| {
        let left: Vec<(i64, bool)> = found.iter().map(|(offset, control, _)| (*offset, *control)).collect();
        assert_eq!(left, kind, "{found:?}");
    };
    life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
        let outcome = log.compact(10_000, EVERYTHING).await.unwrap();
        assert_eq!(outcome.clean_offset, 9, "the first open transaction begins there");
        let found = records(log).await;
        // 5's record was superseded by one that was committed above the pass; its batch is the newest of its producer.
        let markers = [(3, true), (4, true), (6, true), (8, true)];
        let left = [(0, false), markers[0], markers[1], (5, false), markers[2], (7, false), markers[3]];
        let rest: Vec<_> = (9..13).map(|offset| (offset, false)).collect();
        is(&[&left[..], &rest].concat(), &found);
        assert_eq!(found[0].2, [b"0".to_vec()]);
        assert_eq!(found[3].2, Vec::<Vec<u8>>::new());
        // The transaction ends; its end makes everything but the last segment clean.
        append(store, log, &mut model, &marker(7, true)).await;
        for value in [b'E', b'F'] {
            append(store, log, &mut model, &data(-1, 0, "e", &[value; 300])).await;
        }
    });
    life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
        let outcome = log.compact(20_000, EVERYTHING).await.unwrap();
        assert!(outcome.clean_offset >= 14, "{outcome:?}");
        let found = records(log).await;
        // Markers 3 and 4 had nothing left of their transactions in this pass, and from now on wait for their time.
        let left: Vec<i64> = found.iter().map(|(offset, _, _)| *offset).collect();
        assert_eq!(left, [3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15]);
        append(store, log, &mut model, &data(-1, 0, "f", &[b'0'; 600])).await;
        append(store, log, &mut model, &data(-1, 0, "g", &[b'0'; 600])).await;
    });
    life(dir.path(), IoKind::Sync, &config, async |_, log, _| {
        log.compact(21_000, EVERYTHING).await.unwrap();
        let left: Vec<i64> = records(log).await.iter().map(|(offset, _, _)| *offset).collect();
        assert_eq!(left, [5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 17]);
    });
}

/// Compacts once to see how many steps it takes, then crashes in each of them.
#[test]
fn a_crash_leaves_the_old_or_the_new() {
    let settings = Settings::default();
    let config = compacting(4_000);
    let path = Path::new("/data");
    let open = |machine: &Machine| {
        let dir = DataDir::open_on(machine.file_system(), path).unwrap();
        let found = dir.recover(0).unwrap();
        (dir, found)
    };
    let mut crash_points = 0;
    for (seed, crash) in
        [(1, Crash::PowerLoss), (2, Crash::Kill), (3, Crash::PowerLoss), (4, Crash::PowerLoss)]
    {
        let mut step = 0;
        loop {
            let machine = Machine::new(seed * 10_007 + step, settings.clone());
            let mut model = Model::default();
            // Two lives of records, one compaction after the first: the second one meets compacted segments as well.
            for round in 0..2u8 {
                let (dir, mut found) = open(&machine);
                on_shard(async {
                    let store = ShardStore::open_on(&dir, small(), machine.disk()).await.unwrap();
                    let log = match found.pop() {
                        None => store.create(1, "t-0", config.clone()).unwrap(),
                        Some(group) => store.attach(group, config.clone()),
                    };
                    log.set_high_watermark(log.log_end_offset());
                    assert_eq!(log.compact(1_000, EVERYTHING).await.unwrap().passes, u32::from(round));
                    for k in 0..6 {
                        let builder = fill(&mut model, 10 + u32::from(round * 5), 10 * round + k, 120);
                        append(&store, &log, &mut model, &builder).await;
                    }
                    store.shutdown().await.unwrap();
                });
            }
            let (dir, mut found) = open(&machine);
            let ended = on_shard(async {
                let store = ShardStore::open_on(&dir, small(), machine.disk()).await.unwrap();
                let log = store.attach(found.pop().unwrap(), config.clone());
                log.set_high_watermark(model.end);
                machine.crash_after(step, crash);
                let logs = || {
                    let entries = machine.file_system().list(&path.join("log/t-0")).unwrap_or_default();
                    entries.iter().filter(|entry| entry.name.ends_with(".log")).count()
                };
                // To the removal of what was replaced: that must not outlive the names of what replaced it.
                let compacted = async {
                    let outcome = log.compact(2_000, EVERYTHING).await;
                    while !machine.is_down()
                        && outcome.as_ref().is_ok_and(|outcome| logs() > outcome.segments_after + 1)
                    {
                        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                    }
                    outcome
                };
                tokio::select! {
                    biased;
                    () = machine.down() => false,
                    outcome = compacted => {
                        assert!(machine.is_down() || outcome.unwrap().passes == 1);
                        !machine.is_down()
                    }
                }
            });
            drop((dir, found));
            machine.cancel_crash();
            machine.restart();
            let (dir, mut found) = open(&machine);
            on_shard(async {
                let group = found.pop().unwrap();
                assert!(group.health.is_ok(), "seed {seed}, step {step}: {:?}", group.health);
                let store = ShardStore::open_on(&dir, small(), machine.disk()).await.unwrap();
                let log = store.attach(group, config.clone());
                log.set_high_watermark(model.end);
                check(&read_all(&log, 1 << 20).await, &model, 0);
                let outcome = log.compact(3_000, EVERYTHING).await.unwrap();
                check(&read_all(&log, 1 << 20).await, &model, outcome.clean_offset);
                store.shutdown().await.unwrap();
            });
            drop(dir);
            let (_, found) = open(&machine);
            assert!(found[0].health.is_ok());
            let names: Vec<String> = machine
                .file_system()
                .list(&path.join("log/t-0"))
                .unwrap()
                .into_iter()
                .map(|e| e.name)
                .collect();
            assert!(names.iter().all(|name| !name.ends_with(".compacting")), "{names:?}");
            if ended {
                break;
            }
            step += 1;
            crash_points += 1;
        }
    }
    assert!(crash_points > 40, "{crash_points}");
}

#[test]
fn damage_to_compacted_segments_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let config = compacting(20_000);
    let mut model = Model::default();
    for round in 0..2 {
        life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
            for k in 0..20 {
                let builder = fill(&mut model, 20, k, 200 + usize::from(k));
                append(store, log, &mut model, &builder).await;
                let own = model.batch(&[(vec![round, k, 1], Some(vec![0; 500]))], -1, Compression::None);
                append(store, log, &mut model, &own).await;
            }
            log.compact(1_000, EVERYTHING).await.unwrap();
        });
    }
    // What was replaced is gone after this.
    drop(recover(dir.path()));
    let compacted: Vec<PathBuf> =
        files_of(dir.path(), ".log").into_iter().filter(|path| is_compacted(path)).collect();
    let segment = compacted.iter().find(|path| path.metadata().unwrap().len() > 2_000).unwrap();
    let bytes = std::fs::read(segment).unwrap();
    let batches: Vec<usize> = record_batch::batches(&bytes).map(|batch| batch.unwrap().1.len()).collect();
    assert!(batches.len() > 2);
    let index = segment.with_extension("idx");
    let verdict = |change: &dyn Fn(&Path)| {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        change(copy.path());
        // `flumen debug log verify` says the same as a start.
        let mut worst = Severity::Normal;
        let inspection = Inspection::open(copy.path()).unwrap();
        inspection.verify(&mut |finding| worst = worst.max(finding.severity)).unwrap();
        drop(inspection);
        let (_, found) = recover(copy.path());
        let health = found[&1].health.clone();
        assert_eq!(worst < Severity::Damage, health.is_ok(), "{worst:?} and {health:?}");
        health
    };
    let here = |root: &Path, path: &Path| root.join("log/t-0").join(path.file_name().unwrap());
    assert!(verdict(&|_| {}).is_ok());
    // Without its index it is read, and is what it was.
    assert!(verdict(&|root| std::fs::remove_file(here(root, &index)).unwrap()).is_ok());
    let rewrite = |new: Vec<u8>| {
        verdict(&|root: &Path| {
            std::fs::write(here(root, segment), &new).unwrap();
            let _ = std::fs::remove_file(here(root, &index));
        })
    };
    // A batch that is missing from the middle or the end, and an offset that still rises.
    let first = batches[0];
    assert!(!rewrite(bytes[first..].to_vec()).is_ok());
    assert!(!rewrite(bytes[..bytes.len() - batches.last().unwrap()].to_vec()).is_ok());
    let mut moved = bytes.clone();
    moved[7] ^= 1;
    assert!(!rewrite(moved).is_ok());
    // Cut short, with an index that knows how long it was.
    let short = bytes[..bytes.len() - batches.last().unwrap()].to_vec();
    assert!(!verdict(&|root| std::fs::write(here(root, segment), &short).unwrap()).is_ok());
    // A whole segment is missing.
    let gone = verdict(&|root| std::fs::remove_file(here(root, &compacted[compacted.len() - 1])).unwrap());
    assert!(!gone.is_ok());
    // Compaction reads everything again, and gives no rotten batch a good checksum.
    let copy = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), copy.path());
    let mut rotten = bytes.clone();
    rotten[first + 70] ^= 0x10;
    std::fs::write(here(copy.path(), segment), &rotten).unwrap();
    life(copy.path(), IoKind::Sync, &config, async |store, log, _| {
        for k in 0..6 {
            let builder = fill(&mut model, 60, k, 300);
            append(store, log, &mut model, &builder).await;
        }
    });
    let (data, mut found) = recover(copy.path());
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        let log = store.attach(found.remove(&1).unwrap(), config.clone());
        log.set_high_watermark(log.log_end_offset());
        let result = log.compact(1_000, EVERYTHING).await;
        assert!(matches!(result, Err(CompactError::Damaged { .. })), "{result:?}");
        assert!(log.damage().is_some());
    });
}

#[test]
fn lags_holds_and_retention_have_their_say() {
    let dir = tempfile::tempdir().unwrap();
    let config = compacting(2_000);
    let mut model = Model::default();
    life(dir.path(), IoKind::Sync, &config, async |store, log, _| {
        for k in 0..30 {
            let builder = fill(&mut model, 10, k, 50);
            append(store, log, &mut model, &builder).await;
        }
    });
    life(dir.path(), IoKind::Sync, &config, async |_, log, _| {
        let mut config = config.clone();
        // Timestamps are 1000 + offset, and offsets reach 300.
        let lag = |min_lag_ms, max_lag_ms, min_dirty_permille| CompactionConfig {
            min_lag_ms,
            max_lag_ms,
            min_dirty_permille,
            ..CompactionConfig::default()
        };
        config.compaction = Some(lag(1_000, i64::MAX, 0));
        log.set_config(config.clone());
        assert_eq!(log.compact(2_000, EVERYTHING).await.unwrap().passes, 0);
        let outcome = log.compact(2_100, EVERYTHING).await.unwrap();
        assert!(outcome.clean_offset > 50 && outcome.clean_offset <= 101, "{outcome:?}");
        config.compaction = Some(lag(0, 1_000, 1_000));
        log.set_config(config.clone());
        assert_eq!(log.compact(2_000, EVERYTHING).await.unwrap().passes, 0);
        let held = log.compact(3_000, 200).await.unwrap();
        assert!(held.clean_offset > outcome.clean_offset && held.clean_offset <= 200, "{held:?}");
        let all = log.compact(3_000, EVERYTHING).await.unwrap();
        assert!(all.clean_offset > 250, "{all:?}");
        check(&read_all(log, 1).await, &model, all.clean_offset);
        assert_eq!(log.log_start_offset(), 0, "compaction alone never moves it");
        // Both: what retention takes is gone whether it was compacted or not.
        config.retention_ms = 5_000;
        log.set_config(config.clone());
        let out = log.enforce_retention(6_285, EVERYTHING).await;
        assert!(out.deleted_segments > 0 && out.log_start_offset > 100, "{out:?}");
        let found = read_all(log, 1 << 20).await;
        assert!(found.records.keys().all(|offset| *offset >= out.log_start_offset));
        assert!(found.records.iter().all(|(offset, record)| model.records[offset] == *record));
    });
    let (_, found) = recover(dir.path());
    assert!(found[&1].health.is_ok() && found[&1].log_start_offset > 100);
}
