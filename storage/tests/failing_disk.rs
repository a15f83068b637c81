//! What a store does when its disk does not: each case once failed in the crash tests, and stands here by itself.

mod common;

use std::path::Path;

use common::*;
use flumen_io::simulated::{Crash, Machine, Rates, Settings};
use flumen_storage::*;

const DIR: &str = "/data";
const ALWAYS: u32 = 1_000_000;

fn config() -> StoreConfig {
    StoreConfig { wal_file_bytes: 256 << 10, wal_files_max: 3, cache_bytes: 0, ..StoreConfig::default() }
}

fn start(machine: &Machine) -> (DataDir, Vec<RecoveredGroup>) {
    let dir = DataDir::open_on(machine.file_system(), Path::new(DIR)).unwrap();
    let found = dir.recover(0).unwrap();
    (dir, found)
}

fn crash(machine: &Machine, crash: Crash) {
    machine.crash_now(crash);
    machine.restart();
}

fn only(mut found: Vec<RecoveredGroup>) -> RecoveredGroup {
    assert_eq!(found.len(), 1);
    found.remove(0)
}

async fn open(dir: &DataDir) -> ShardStore {
    ShardStore::open(dir, config()).await.unwrap()
}

/// The place of a cut is read before anything changes: it was counted as cut, and the segment was not.
#[test]
fn a_cut_whose_place_cannot_be_read_is_refused_and_changes_nothing() {
    let machine = Machine::new(1, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        for _ in 0..20 {
            writer.append(1, 100).await;
        }
    });
    crash(&machine, Crash::Kill);
    let (dir, found) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let log = store.attach(only(found), GroupConfig::default());
        machine.set_rates(Rates { read_fails: ALWAYS, ..Rates::default() });
        let payload = Payload::Batch(batch(1, 19, 2, 1, 10));
        let replaces = [Entry { index: 20, term: 2, payload }];
        assert_eq!(log.stage(None, &replaces), Err(StageError::Damaged));
        machine.set_rates(Rates::default());
        assert_eq!((log.log_end_offset(), log.last_index(), log.last_term()), (20, 20, 1));
        store.shutdown().await.unwrap();
    });
    crash(&machine, Crash::PowerLoss);
    let (dir, found) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let log = store.attach(only(found), GroupConfig::default());
        check_log(&log, 0, 20, 1_000).await;
    });
}

/// After a failed sync the kernel calls the pages clean, so asking once more proves nothing.
#[test]
fn a_stop_after_a_failed_sync_is_no_clean_stop() {
    for durability in [Durability::Durable, Durability::Os] {
        let machine = Machine::new(2, Settings::default());
        let (dir, _) = start(&machine);
        on_shard(async {
            let store = open(&dir).await;
            let config = GroupConfig { durability, ..GroupConfig::default() };
            let writer = Writer::new(&store, store.create(1, "t-0", config).unwrap());
            for _ in 0..20 {
                writer.append(1, 100).await;
            }
            machine.set_rates(Rates { sync_fails: ALWAYS, ..Rates::default() });
            assert!(store.shutdown().await.is_err());
            machine.set_rates(Rates::default());
            assert!(
                store.shutdown().await.is_err(),
                "{durability:?}: the second try was taken for a success"
            );
        });
        assert!(!machine.file_system().exists(Path::new("/data/wal/0/CLEAN")));
        assert!(!machine.file_system().exists(Path::new("/data/log/t-0/group.meta")));
    }
}

/// A run that failed between making a WAL file and syncing its name leaves the syncing to the next.
#[test]
fn the_name_of_a_wal_file_is_synced_by_whoever_writes_to_it() {
    let machine = Machine::new(3, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        machine.set_rates(Rates { sync_fails: ALWAYS, ..Rates::default() });
        let log = store.create(1, "t-0", GroupConfig::default()).unwrap();
        assert!(store.next_durable(Lane::Durable, 0).await.is_err());
        drop(log);
    });
    machine.set_rates(Rates::default());
    crash(&machine, Crash::Kill);
    assert!(machine.file_system().exists(Path::new("/data/wal/0/00000000.wal")));
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let writer = Writer::new(&store, store.create(2, "t-1", GroupConfig::default()).unwrap());
        assert_eq!(writer.append(1, 100).await, 1);
    });
    crash(&machine, Crash::PowerLoss);
    let found = only(start(&machine).1);
    assert_eq!((found.group_id, found.log_end_offset, found.health), (2, 1, GroupHealth::Ok));
}

/// A segment that was begun on a full disk must not stay between two that count.
#[test]
fn a_segment_given_up_on_a_full_disk_is_removed() {
    let machine = Machine::new(4, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let small = GroupConfig { segment_bytes: 4 << 10, ..GroupConfig::default() };
        let writer = Writer::new(&store, store.create(1, "t-0", small).unwrap());
        for _ in 0..30 {
            writer.append(1, 1_000).await;
        }
        machine.fill_up();
        assert!(store.shutdown().await.is_err());
        machine.free_space();
    });
    let names = machine.file_system().list(Path::new("/data/log/t-0")).unwrap();
    assert!(names.iter().all(|entry| entry.len > 0 || !entry.name.ends_with(".log")), "{names:?}");
}

/// A snapshot beyond the end of the log is of a log that is gone; another with the same terms could grow to there.
#[test]
fn snapshots_beyond_the_end_are_removed() {
    let machine = Machine::new(5, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let writer = Writer::new(&store, store.create(1, "t-0", GroupConfig::default()).unwrap());
        writer.append(3, 100).await;
        store.shutdown().await.unwrap();
    });
    let stale = Path::new("/data/log/t-0/00000000000000000070.snapshot");
    machine.file_system().write(stale, b"of another log").unwrap();
    crash(&machine, Crash::Kill);
    assert_eq!(only(start(&machine).1).log_end_offset, 3);
    assert!(!machine.file_system().exists(stale));
    crash(&machine, Crash::PowerLoss);
    assert!(!machine.file_system().exists(stale), "and stay so");
}

/// Who wrote what is not taken from bytes that fail their checksum: duplicates would be let in by it.
#[test]
fn producers_are_not_rebuilt_from_a_rotten_batch() {
    let machine = Machine::new(6, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let log = store.create(1, "t-0", GroupConfig::default()).unwrap();
        let payload = Payload::Batch(produced(9, 0, 0, 0, 3));
        log.stage(Some(HardState { term: 1, vote: 1, commit: 0 }), &[Entry { index: 1, term: 1, payload }])
            .unwrap();
        log.stage(Some(HardState { term: 1, vote: 1, commit: 1 }), &[]).unwrap();
        store.next_durable(Lane::Durable, 0).await.unwrap();
        log.set_high_watermark(3);
        store.shutdown().await.unwrap();
    });
    let files = machine.file_system();
    let (log, snapshot) =
        ("/data/log/t-0/00000000000000000000.log", "/data/log/t-0/00000000000000000003.snapshot");
    let mut bytes = files.read(Path::new(log)).unwrap();
    // In the middle of the producer's number.
    bytes[46] ^= 4;
    files.write(Path::new(log), &bytes).unwrap();
    files.remove_file(Path::new(snapshot)).unwrap();
    crash(&machine, Crash::Kill);
    match only(start(&machine).1).health {
        GroupHealth::Damaged { reason } => assert!(reason.contains("wrong checksum"), "{reason}"),
        GroupHealth::Ok => panic!("a producer was made of a broken batch"),
    }
}

/// A partition that never had a record, beside an os ring that lost its middle, is no suspect.
#[test]
fn an_empty_directory_is_not_blamed_on_an_os_ring() {
    let machine = Machine::new(7, Settings::default());
    let (dir, _) = start(&machine);
    on_shard(async {
        let store = open(&dir).await;
        let config = GroupConfig { durability: Durability::Os, ..GroupConfig::default() };
        let writer = Writer::new(&store, store.create(1, "t-0", config).unwrap());
        for _ in 0..20 {
            writer.append(1, 100).await;
        }
    });
    let files = machine.file_system();
    let ring = Path::new("/data/wal/0-os/00000000.wal");
    let mut bytes = files.read(ring).unwrap();
    bytes[3 * 4096 + 400] ^= 1;
    files.write(ring, &bytes).unwrap();
    files.create_dir(Path::new("/data/log/t-1")).unwrap();
    crash(&machine, Crash::Kill);
    let found = only(start(&machine).1);
    assert!(matches!(found.health, GroupHealth::Damaged { .. }), "{:?}", found.health);
    assert_eq!(found.group_id, 1);
    assert!(!machine.file_system().exists(Path::new("/data/log/t-1")));
}
