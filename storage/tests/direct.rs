//! Large runs that go past the WAL, on the machine's own disk: written once, answered in order, there after a kill, and not
//! for those that would lose by it.

mod common;

use common::*;
use flumen_storage::*;

const LARGE: usize = 100_000;

/// A store whose partitions take turns with the WAL early, and does not turn it over meanwhile.
fn config(io: IoKind) -> StoreConfig {
    StoreConfig { io, wal_file_bytes: 8 << 20, direct_run_bytes: 2 * LARGE as u64, ..small() }
}

/// Bytes written to the WAL and to segments by what is between the calls.
fn written(store: &ShardStore) -> (u64, u64) {
    let stats = store.stats();
    (stats.wal_bytes_written, stats.segment_bytes_written)
}

#[test]
fn large_runs_are_written_once_and_are_there_after_a_kill() {
    for io in IO_KINDS {
        let dir = tempfile::tempdir().unwrap();
        let (data, _) = recover(dir.path());
        let end = on_shard(async {
            let store = ShardStore::open(&data, config(io)).await.unwrap();
            let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
            writer.append(1, 10).await;
            let before = written(&store);
            let mut lanes = Vec::new();
            let mut last = (Lane::Durable, 0);
            let mut end = 0;
            for k in 0..60 {
                // A small one follows where the large ones before it go.
                let size = if k % 10 == 9 { 100 } else { LARGE };
                let (commit, next) = writer.stage(1, size).unwrap();
                lanes.push(commit.0);
                (last, end) = (commit, next);
            }
            assert_eq!(lanes[0], Lane::Durable, "nothing waits yet");
            assert!(lanes[10..].iter().all(|lane| *lane == Lane::Direct), "{lanes:?}");
            writer.durable(last).await;
            writer.log.set_high_watermark(end);
            let (wal, segments) = written(&store);
            assert!(wal - before.0 < 3 * LARGE as u64, "the WAL got {} bytes", wal - before.0);
            assert!(segments - before.1 >= 54 * LARGE as u64);
            check_log(&writer.log, 0, end, 1 << 20).await;
            // With nothing on its way it is a commit of the WAL again.
            let (commit, end) = writer.stage(1, 100).unwrap();
            assert_eq!(commit.0, Lane::Durable);
            writer.durable(commit).await;
            end
        });
        drop(data);
        let (data, mut groups) = recover(dir.path());
        let group = groups.remove(&1).unwrap();
        assert_eq!((group.health.clone(), group.log_end_offset), (GroupHealth::Ok, end));
        on_shard(async {
            let store = ShardStore::open(&data, config(io)).await.unwrap();
            let log = store.attach(group, GroupConfig::default());
            log.set_high_watermark(end);
            check_log(&log, 0, end, 1 << 20).await;
        });
    }
}

#[test]
fn replicated_partitions_and_those_of_the_kernel_keep_to_the_wal() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, config(IoKind::Auto)).await.unwrap();
        let replicated = GroupConfig { direct: false, ..GroupConfig::default() };
        let os = GroupConfig { durability: Durability::Os, ..GroupConfig::default() };
        for (id, config) in [(1, replicated), (2, os)] {
            let writer = Writer::new(&store, store.create(id, &format!("t-{id}"), config).unwrap());
            let commits: Vec<_> = (0..20).map(|_| writer.stage(1, LARGE).unwrap().0).collect();
            assert!(commits.iter().all(|(lane, _)| *lane != Lane::Direct), "{commits:?}");
            writer.durable(*commits.last().unwrap()).await;
        }
    });
}

#[test]
fn a_clean_stop_takes_what_is_on_its_way_along() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    let end = on_shard(async {
        let store = ShardStore::open(&data, config(IoKind::Auto)).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        writer.append(1, 10).await;
        let (commit, end) = (0..30).map(|_| writer.stage(1, LARGE).unwrap()).last().unwrap();
        assert_eq!(commit.0, Lane::Direct);
        store.shutdown().await.unwrap();
        assert!(store.durable_lsn(Lane::Direct) >= commit.1);
        end
    });
    drop(data);
    let (_, groups) = recover(dir.path());
    assert_eq!(groups[&1].log_end_offset, end);
}

/// Regression: what came behind the first membership was written to a segment, and called committed by that.
#[test]
fn what_follows_a_membership_goes_to_the_wal_and_may_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, config(IoKind::Auto)).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        writer.append(1, 10).await;
        let (commit, _) = (0..10).map(|_| writer.stage(1, LARGE).unwrap()).last().unwrap();
        assert_eq!(commit.0, Lane::Direct);
        let log = &writer.log;
        let index = log.last_index() + 1;
        let hard = HardState { term: writer.term, vote: 1, commit: index - 1 };
        let members = Payload::Control("members".into());
        let entry = Entry { index, term: writer.term, payload: members.clone() };
        log.stage_with(Some(hard), Some((index, "two".into())), &[entry]).unwrap();
        let base = log.log_end_offset();
        let (commit, _) = (0..10).map(|_| writer.stage(1, LARGE).unwrap()).last().unwrap();
        writer.durable(commit).await;
        assert!(log.flushed_offset() <= 1, "nothing else is committed");
        let term = writer.term + 1;
        let replacing =
            Entry { index: log.last_index(), term, payload: Payload::Batch(batch(1, base + 9, term, 1, 10)) };
        let hard = HardState { term, ..hard };
        writer.durable(log.stage(Some(hard), &[replacing]).unwrap()).await;
        assert_eq!(log.last_term(), term);
    });
}

/// Regression: asked for again, a log start was answered before it was safe.
#[test]
fn a_log_start_on_its_way_is_no_sooner_safe_when_it_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, config(IoKind::Auto)).await.unwrap();
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        writer.append(1, 10).await;
        let (_, end) = (0..10).map(|_| writer.stage(1, LARGE).unwrap()).last().unwrap();
        let first = writer.log.advance_log_start(end).unwrap();
        let again = writer.log.advance_log_start(end).unwrap();
        assert_eq!((first.0, again.0), (Lane::Direct, Lane::Direct));
        writer.durable(again).await;
        assert!(store.durable_lsn(Lane::Direct) >= first.1);
    });
}
