//! A replica gets what its leader cannot send as entries: the same records, and after a crash at any step the log that it had
//! before or this one.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use common::*;
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;
use flumen_storage::*;

const EVERYTHING: i64 = i64::MAX;

fn compacting(segment_bytes: u64) -> GroupConfig {
    let compaction = CompactionConfig { min_dirty_permille: 0, ..CompactionConfig::default() };
    GroupConfig {
        segment_bytes,
        retention_ms: -1,
        compaction: Some(compaction),
        direct: false,
        ..GroupConfig::default()
    }
}

/// Bytes by base offset.
type Batches = BTreeMap<i64, Bytes>;

async fn read_all(log: &GroupLog, from: i64, upper: i64) -> Batches {
    let (mut at, mut found) = (from, Batches::new());
    while at < upper {
        let pieces = log.read(at, upper, 1 << 20).await.unwrap();
        let before = at;
        for piece in pieces {
            for batch in record_batch::batches(&piece) {
                let (header, bytes) = batch.unwrap();
                at = header.next_offset();
                found.insert(header.base_offset, Bytes::copy_from_slice(bytes));
            }
        }
        if at == before {
            break;
        }
    }
    found
}

async fn append(store: &ShardStore, log: &GroupLog, key: &str, term: u64, size: usize) {
    let (base, index) = (log.log_end_offset(), log.last_index() + 1);
    let mut builder = BatchBuilder::new();
    builder.append(1_000 + base, Some(key.as_bytes()), Some(&vec![b'v'; size]), &[]);
    builder.leader_epoch(i32::try_from(term).unwrap()).producer(7, 0, i32::try_from(base).unwrap());
    let payload = Payload::Batch(builder.build(base).freeze());
    while !log.has_room(size + 200) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let hard = HardState { term, vote: 1, commit: index };
    let (lane, lsn) = log.stage(Some(hard), &[Entry { index, term, payload }]).unwrap();
    safe(store, lane, lsn).await;
    log.set_committed(index);
    log.set_high_watermark(log.log_end_offset());
}

async fn safe(store: &ShardStore, lane: Lane, lsn: Lsn) {
    while store.durable_lsn(lane) < lsn {
        store.next_durable(lane, store.durable_lsn(lane)).await.unwrap();
    }
}

/// One life of a data directory that ends as `kill -9` ends it, unless `work` stops the store.
fn life<T>(path: &Path, config: &GroupConfig, work: impl AsyncFnOnce(&ShardStore, &GroupLog) -> T) -> T {
    let mut found = Vec::new();
    let damage = Inspection::open(path).map(|inspection| {
        inspection.verify(&mut |finding| found.push(finding)).unwrap();
        found.retain(|finding| finding.severity == Severity::Damage);
    });
    assert!(damage.is_err() || found.is_empty(), "{found:?}");
    let (data, mut found) = recover(path);
    on_shard(async {
        let store = ShardStore::open(&data, StoreConfig { io: IoKind::Sync, ..small() }).await.unwrap();
        let log = match found.remove(&1) {
            None => store.create(1, "t-0", config.clone()).unwrap(),
            Some(group) => {
                assert!(group.health.is_ok(), "{:?}", group.health);
                let committed = group.hard_state.commit;
                let log = store.attach(group, config.clone());
                log.set_committed(committed);
                log.set_high_watermark(log.log_end_offset());
                log
            }
        };
        work(&store, &log).await
    })
}

/// A log of which compaction has left little, below the place from which entries can be sent.
fn leader(path: &Path) {
    let config = compacting(40_000);
    life(path, &config, async |store, log| {
        for k in 0..400 {
            append(store, log, &format!("key {}", k % 37), 1 + k / 100, 1000).await;
        }
        store.shutdown().await.unwrap();
    });
    life(path, &config, async |store, log| {
        for k in 0..40 {
            append(store, log, &format!("more {k}"), 6, 100).await;
        }
        let outcome = log.compact(1 << 40, EVERYTHING).await.unwrap();
        assert!(outcome.records_dropped > 200 && log.compactions() > 0, "{outcome:?}");
        append(store, log, "last", 7, 100).await;
        assert!(log.before().2 > 300, "{:?}", log.before());
        store.shutdown().await.unwrap();
    });
}

struct Offer {
    start: i64,
    before: (u64, u64, i64),
    batches: Batches,
    rest: Vec<Entry>,
    producers: Bytes,
}

fn offer(path: &Path) -> Offer {
    life(path, &compacting(40_000), async |store, log| {
        let before = log.before();
        let offer = Offer {
            start: log.log_start_offset(),
            before,
            batches: read_all(log, log.log_start_offset(), before.2).await,
            rest: log.read_entries(before.0 + 1, log.last_index() + 1, 1 << 20).await.unwrap(),
            producers: log.producers_at(before.2),
        };
        store.shutdown().await.unwrap();
        offer
    })
}

async fn receive(log: &GroupLog, offer: &Offer, in_one: usize) -> Received {
    let mut receiver = log.receive(offer.start, offer.before.2).await.unwrap();
    let batches: Vec<&Bytes> = offer.batches.values().collect();
    for some in batches.chunks(in_one) {
        receiver
            .append(some.iter().flat_map(|bytes| bytes.to_vec()).collect::<Vec<u8>>().into())
            .await
            .unwrap();
    }
    receiver.finish().await.unwrap()
}

fn beginning(offer: &Offer) -> Beginning {
    let (index, term, offset) = offer.before;
    Beginning {
        hard_state: HardState { term: 9, vote: 0, commit: index },
        index,
        term,
        offset,
        membership: (index, Bytes::from_static(b"members")),
        producers: offer.producers.clone(),
    }
}

/// The log is the leader's below the place, and goes on there.
async fn check(log: &GroupLog, offer: &Offer) {
    let (index, _, offset) = offer.before;
    assert_eq!((log.log_start_offset(), log.before().0), (offer.start, index));
    assert_eq!(read_all(log, offer.start, offset).await, offer.batches);
    for (base, batch) in &offer.batches {
        assert_eq!(log.epoch_at(*base), record_batch::parse(batch).unwrap().leader_epoch, "at {base}");
    }
}

fn old_log(path: &Path) -> Batches {
    life(path, &compacting(1 << 20), async |store, log| {
        for k in 0..30 {
            append(store, log, &format!("old {k}"), 1, 500).await;
        }
        store.shutdown().await.unwrap();
    });
    life(path, &compacting(1 << 20), async |_, log| read_all(log, 0, log.log_end_offset()).await)
}

fn files(path: &Path, ends: &str) -> Vec<PathBuf> {
    let dir = path.join("log/t-0");
    let all = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = all.filter(|path| path.to_str().unwrap().ends_with(ends)).collect();
    found.sort();
    found
}

#[test]
fn what_was_received_is_the_log() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    leader(from.path());
    let offer = offer(from.path());
    let config = compacting(1 << 20);
    for (round, in_one) in [1, 7, 1000].into_iter().enumerate() {
        let to = to.path().join(format!("{round}"));
        std::fs::create_dir_all(&to).unwrap();
        if round > 0 {
            old_log(&to);
        }
        life(&to, &config, async |store, log| {
            let received = receive(log, &offer, in_one).await;
            let (lane, lsn) = log.begin_with(&beginning(&offer), received).unwrap();
            // Readers find it at once, whatever its files are called.
            check(log, &offer).await;
            safe(store, lane, lsn).await;
            for entry in &offer.rest {
                log.stage(None, std::slice::from_ref(entry)).unwrap();
            }
            log.set_high_watermark(log.log_end_offset());
            while log.is_beginning() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            check(log, &offer).await;
            assert!(files(&to, ".received").is_empty());
        });
        // After it was killed, after a clean stop, and without indexes.
        for stop in [false, true, false] {
            life(&to, &config, async |store, log| {
                check(log, &offer).await;
                let rest = log.read_entries(offer.before.0 + 1, log.last_index() + 1, 1 << 20).await.unwrap();
                assert_eq!(rest, offer.rest);
                let known =
                    log.producers().producers().map(|(id, _, last, _)| (id, last)).collect::<Vec<_>>();
                assert_eq!(known, [(7, 440)]);
                if stop {
                    store.shutdown().await.unwrap();
                }
            });
            if stop {
                files(&to, ".idx").into_iter().for_each(|path| std::fs::remove_file(path).unwrap());
            }
        }
        life(&to, &config, async |store, log| {
            for k in 0..50 {
                append(store, log, &format!("new {k}"), 9, 30_000).await;
            }
            let outcome = log.compact(1 << 41, EVERYTHING).await.unwrap();
            assert!(outcome.segments_before > 0, "{outcome:?}");
            store.shutdown().await.unwrap();
        });
        life(&to, &config, async |_, log| {
            let all = read_all(log, 0, log.log_end_offset()).await;
            // Compacted as any log: of every key the newest.
            assert_eq!(all.len(), 37 + 40 + 1 + 50);
        });
    }
}

#[test]
fn a_crash_before_the_record_leaves_the_old_log() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    leader(from.path());
    let (offer, old) = (offer(from.path()), old_log(to.path()));
    let config = compacting(1 << 20);
    for whole in [false, true] {
        life(to.path(), &config, async |_, log| {
            if whole {
                drop(receive(log, &offer, 5).await);
            } else {
                let mut receiver = log.receive(offer.start, offer.before.2).await.unwrap();
                receiver.append(offer.batches.values().next().unwrap().clone()).await.unwrap();
            }
            assert_eq!(read_all(log, 0, 30).await, old);
        });
        assert!(!files(to.path(), if whole { ".received" } else { ".receiving" }).is_empty());
        life(to.path(), &config, async |_, log| assert_eq!(read_all(log, 0, 30).await, old));
        assert!(files(to.path(), ".received").is_empty() && files(to.path(), ".receiving").is_empty());
    }
}

#[test]
fn a_crash_after_the_record_leaves_the_new_log() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    leader(from.path());
    let offer = offer(from.path());
    old_log(to.path());
    let config = compacting(1 << 20);
    let (waiting, former) = (to.path().join("waiting"), to.path().join("former"));
    let live = to.path().join("live");
    copy_dir(&to.path().join("log"), &former.join("log"));
    std::fs::create_dir_all(&live).unwrap();
    for name in ["FORMAT", "log", "wal", "metadata"] {
        let from = to.path().join(name);
        if from.is_dir() {
            copy_dir(&from, &live.join(name));
        } else if from.exists() {
            std::fs::copy(&from, live.join(name)).unwrap();
        }
    }
    life(&live, &config, async |store, log| {
        let received = receive(log, &offer, 5).await;
        copy_dir(&live.join("log"), &waiting);
        let (lane, lsn) = log.begin_with(&beginning(&offer), received).unwrap();
        safe(store, lane, lsn).await;
        while log.is_beginning() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    });
    assert!(files(&live, ".received").is_empty() && !files(&live, ".log").is_empty());
    // Names that were not synced: those of before the record, and all that was there, with or without the new ones.
    for (number, keeps_new) in [false, true].into_iter().enumerate() {
        let again = to.path().join(format!("again-{number}"));
        copy_dir(&live, &again);
        if !keeps_new {
            std::fs::remove_dir_all(again.join("log")).unwrap();
        }
        copy_dir(&waiting, &again.join("log"));
        copy_dir(&former.join("log"), &again.join("log"));
        for restart in 0..2 {
            life(&again, &config, async |_, log| check(log, &offer).await);
            assert!(files(&again, ".received").is_empty(), "{restart}");
            let kept = files(&again, ".log").len();
            assert_eq!(kept, files(&live, ".log").len());
        }
        // One of them gone for good is damage, and not a log with a hole.
        if keeps_new {
            let lost = to.path().join("lost");
            copy_dir(&live, &lost);
            std::fs::remove_file(&files(&lost, ".log")[0]).unwrap();
            let (_, found) = recover(&lost);
            assert!(!found[&1].health.is_ok());
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    leader(from.path());
    let offer = offer(from.path());
    life(to.path(), &compacting(1 << 20), async |_, log| {
        let malformed = |result: Result<(), ReceiveError>| matches!(result, Err(ReceiveError::Malformed(_)));
        let batches: Vec<&Bytes> = offer.batches.values().collect();
        let mut receiver = log.receive(0, offer.before.2).await.unwrap();
        receiver.append(batches[1].clone()).await.unwrap();
        assert!(malformed(receiver.append(batches[0].clone()).await), "they go back");
        let mut receiver = log.receive(0, offer.before.2).await.unwrap();
        assert!(malformed(receiver.append(batches[0].slice(..70)).await), "a part of one");
        let mut rotten = batches[0].to_vec();
        *rotten.last_mut().unwrap() ^= 1;
        let mut receiver = log.receive(0, offer.before.2).await.unwrap();
        assert!(malformed(receiver.append(rotten.into()).await), "a wrong checksum");
        let mut receiver = log.receive(0, 5).await.unwrap();
        assert!(malformed(receiver.append(batches.last().copied().unwrap().clone()).await), "beyond the end");
        assert!(log.receive(5, 5).await.is_err());
        // What was received up to another place.
        let received = log.receive(0, offer.before.2 - 1).await.unwrap().finish().await.unwrap();
        assert!(log.begin_with(&beginning(&offer), received).is_err());
        // All that lay there has gone: an empty log that begins at its start.
        let received = log.receive(offer.start, offer.before.2).await.unwrap().finish().await.unwrap();
        log.begin_with(&beginning(&offer), received).unwrap();
        assert_eq!((log.log_start_offset(), log.log_end_offset()), (offer.start, offer.before.2));
        assert!(read_all(log, offer.start, offer.before.2).await.is_empty());
        assert!(log.receive(offer.start, offer.before.2).await.is_err(), "not now");
    });
}
