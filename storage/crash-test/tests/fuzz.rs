//! Recovery from arbitrary bytes in any file, under an allocator that counts: no panic, no lie that a reader could not
//! see, and a peak of memory below a small multiple of what lies in the directory.
//!
//! The directories are copies of one that a store left when it was killed, on simulated disks. Half of the changes repair
//! the checksum above them, so that what stands behind it is reached.

// The one counting allocator of the repository.
#[path = "../../../protocol/tests/support/counting_allocator.rs"]
mod counting_allocator;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use counting_allocator::peak_of;
use flumen_crash_test::paused;
use flumen_io::FileSystem;
use flumen_io::simulated::{Crash, Machine, Random, Settings};
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;
use flumen_storage::{
    DataDir, Durability, Entry, GroupConfig, GroupId, GroupLog, HardState, Payload, ReadError, ShardStore,
    StoreConfig,
};

const CASES: u64 = 12_000;
const THREADS: u64 = 2;

/// The promised bound. A ring is read whole, and what counts of it is written to segments, which here is memory too.
const PER_BYTE_MAX: usize = 4;
/// Pieces in which segments are read, of a few partitions one after the other, and buffers of a ring.
const FREE_BYTES: usize = 8 << 20;

type Files = BTreeMap<PathBuf, Vec<u8>>;

const DIR: &str = "/data";

fn config() -> StoreConfig {
    StoreConfig {
        wal_file_bytes: 256 << 10,
        wal_files_max: 3,
        cache_bytes: 64 << 10,
        ..StoreConfig::default()
    }
}

fn batch(base: i64, term: u64, producer: Option<i64>, size: usize) -> Bytes {
    let mut builder = BatchBuilder::new();
    builder.append(1_000 + base, None, Some(&vec![b'v'; size]), &[]);
    if let Some(producer) = producer {
        builder.producer(producer, 0, i32::try_from(base).unwrap());
    }
    builder.leader_epoch(i32::try_from(term).unwrap());
    builder.build(base).freeze()
}

fn stage(log: &GroupLog, index: u64, term: u64, base: i64, size: usize) {
    let payload = match index % 7 {
        0 => Payload::Control(Bytes::from_static(b"members")),
        _ => Payload::Batch(batch(base, term, (index % 2 == 0).then_some(7), size)),
    };
    // What is committed lags behind: the last ones are replaced.
    let hard = HardState { term, vote: 1, commit: index.saturating_sub(8) };
    log.stage(Some(hard), &[Entry { index, term, payload }]).unwrap();
}

async fn all_durable(store: &ShardStore, log: &GroupLog) {
    let (lane, lsn) = log.stage(None, &[]).unwrap();
    while store.durable_lsn(lane) < lsn {
        store.next_durable(lane, store.durable_lsn(lane)).await.unwrap();
    }
}

/// What a store left that was killed in its second run: segments with indexes, snapshots, states, and rings of both lanes.
fn template() -> Files {
    let machine = Machine::new(1, Settings::default());
    for run in 0..2u64 {
        let dir = DataDir::open_on(machine.file_system(), Path::new(DIR)).unwrap();
        let found = dir.recover(0).unwrap();
        paused(async {
            let store = ShardStore::open(&dir, config()).await.unwrap();
            let mut logs: Vec<GroupLog> = found
                .into_iter()
                .map(|group| (of(group.group_id), group))
                .map(|(of, group)| store.attach(group, of))
                .collect();
            if logs.is_empty() {
                logs =
                    (1..=4).map(|id| store.create(id, &format!("t-{id}.g{id}"), of(id)).unwrap()).collect();
            }
            for k in 0..100 {
                for log in &logs {
                    let (index, base) = (log.last_index() + 1, log.log_end_offset());
                    stage(log, index, run + 1, base, if k % 30 == 0 { 9_000 } else { 100 });
                    all_durable(&store, log).await;
                    if k < 95 {
                        log.set_high_watermark(log.log_end_offset());
                    }
                    if k == 50 {
                        log.advance_log_start(log.log_end_offset() / 2).unwrap();
                    }
                }
            }
            // The last ones are not committed, and replaced.
            stage(&logs[0], logs[0].last_index() - 1, run + 2, logs[0].log_end_offset() - 2, 50);
            all_durable(&store, &logs[0]).await;
            if run == 0 {
                store.shutdown().await.unwrap();
            }
        });
        machine.crash_now(Crash::Kill);
        machine.restart();
    }
    let files = machine.file_system();
    let mut out = Files::new();
    let mut open = vec![PathBuf::from(DIR)];
    while let Some(path) = open.pop() {
        for entry in files.list(&path).unwrap() {
            let below = path.join(&entry.name);
            if entry.is_dir {
                open.push(below);
            } else {
                let bytes = files.read(&below).unwrap();
                out.insert(below, bytes);
            }
        }
    }
    out
}

fn of(id: GroupId) -> GroupConfig {
    let durability = if id % 2 == 0 { Durability::Os } else { Durability::Durable };
    GroupConfig { durability, segment_bytes: 16 << 10, ..GroupConfig::default() }
}

fn put_crc(bytes: &mut [u8], covered: std::ops::Range<usize>, at: usize) {
    if let Some(crc) = bytes.get(covered).map(crc32c::crc32c)
        && let Some(place) = bytes.get_mut(at..at + 4)
    {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

/// Numbers that are at some end of something.
fn number(random: &mut Random) -> [u8; 8] {
    let some = [0, 1, u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) - 1, u64::from(u32::MAX), 1 << 31, 1 << 20];
    match random.below(2) {
        0 => random.pick(&some).copied().unwrap_or(0),
        _ => random.draw() >> random.below(64),
    }
    .to_le_bytes()
}

/// Writes over some bytes at `at`.
fn scribble(random: &mut Random, bytes: &mut [u8], at: usize) {
    let number = number(random);
    let len = 1 << random.below(4);
    for (place, byte) in bytes.iter_mut().skip(at).zip(&number[..len]) {
        *place = *byte;
    }
}

/// A change below a checksum, and the checksum of it.
fn change_inside(random: &mut Random, path: &Path, bytes: &mut [u8]) {
    let end = bytes.len();
    let below = |random: &mut Random, from: usize, to: usize| {
        from + random.below(to.saturating_sub(from).max(1) as u64) as usize
    };
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("wal") => {
            let blocks: Vec<usize> =
                (0..end).step_by(4096).filter(|at| bytes[*at..].starts_with(b"FLWB")).collect();
            let Some(at) = random.pick(&blocks).copied() else { return };
            let block = &mut bytes[at..];
            let payload = u32::from_le_bytes(block[12..16].try_into().unwrap_or_default()) as usize;
            let inside = payload.min(block.len() - 336);
            // Of records the headers are the interesting part; most are near the beginning of a block.
            let place = match random.below(3) {
                0 => below(random, 4, 332),
                1 => below(random, 336, 336 + inside.min(80)),
                _ => below(random, 336, 336 + inside),
            };
            scribble(random, block, place);
            let payload = u32::from_le_bytes(block[12..16].try_into().unwrap_or_default()) as usize;
            put_crc(block, 336..336usize.saturating_add(payload), 320);
            put_crc(block, 0..332, 332);
        }
        Some("idx") if end > 16 => {
            let entry = 16 + random.below((end as u64 - 16) / 40 + 1) as usize * 40;
            let place = below(random, entry, entry + 32);
            scribble(random, bytes, place);
            put_crc(bytes, entry..entry + 32, entry + 32);
        }
        Some("meta" | "snapshot") if end > 4 => {
            let place = below(random, 0, end - 4);
            scribble(random, bytes, place);
            put_crc(bytes, 0..end - 4, end - 4);
            if path.ends_with("group.meta") {
                let crc = u32::from_le_bytes(bytes[end - 4..].try_into().unwrap_or_default());
                let check = crc.rotate_right(15).wrapping_add(0xa282_ead8);
                bytes[end - 4..].copy_from_slice(&check.to_le_bytes());
            }
        }
        Some("log") if end > 61 => {
            let place = below(random, 0, end);
            scribble(random, bytes, place);
            let length = i32::from_be_bytes(bytes[8..12].try_into().unwrap_or_default());
            let total = usize::try_from(length).unwrap_or(0).saturating_add(12);
            if let Some(crc) = bytes.get(21..total).map(crc32c::crc32c) {
                bytes[17..21].copy_from_slice(&crc.to_be_bytes());
            }
        }
        _ => {}
    }
}

fn change(random: &mut Random, files: &mut Files) {
    let paths: Vec<PathBuf> = files.keys().cloned().collect();
    let Some(path) = random.pick(&paths).cloned() else { return };
    let other = random.pick(&paths).cloned().unwrap_or_else(|| path.clone());
    let garbage: Vec<u8> = (0..1 + random.below(300)).map(|_| random.draw() as u8).collect();
    let Some(bytes) = files.get_mut(&path) else { return };
    // Most of a ring is zeros; aim at what is written.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |at| at + 1);
    match random.below(16) {
        0 => *bytes = garbage,
        1 => bytes.truncate(random.below(used as u64) as usize),
        2 => bytes.extend_from_slice(&garbage),
        3 => drop(files.remove(&path)),
        4 => {
            let content = files.get(&other).cloned().unwrap_or_default();
            files.insert(path, content);
        }
        5 | 6 => {
            let at = random.below(used as u64) as usize;
            bytes.iter_mut().skip(at).zip(&garbage).for_each(|(place, byte)| *place = *byte);
        }
        7 => {
            let at = random.below(used as u64) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        _ => change_inside(random, &path, bytes),
    }
}

fn write_all(files: &FileSystem, content: &Files) {
    for (path, bytes) in content {
        files.create_dir_all(path.parent().unwrap()).unwrap();
        files.write(path, bytes).unwrap();
    }
}

/// Everything that readers get of a log is whole batches in order, however far they get.
async fn read_through(log: &GroupLog) {
    let (mut at, end) = (log.log_start_offset(), log.log_end_offset());
    log.set_high_watermark(end);
    while at < end {
        // What recovery took from a block that vouches for it is in memory, and clients check it for themselves.
        let (vouched, found) = match log.read_cached(at, end, 20_000) {
            Some(found) => (true, Ok(found)),
            None => (false, log.read(at, end, 20_000).await),
        };
        let Ok(found) = found else { break };
        assert!(!found.is_empty(), "nothing at {at} below {end}");
        for piece in found {
            for batch in record_batch::batches(&piece) {
                let (header, bytes) = batch.expect("what is served is whole batches");
                assert!(vouched || record_batch::crc_ok(bytes), "a bad checksum was served at {at}");
                assert!(header.base_offset <= at && at < header.next_offset(), "{at}: {header:?}");
                at = header.next_offset();
            }
        }
    }
    let _: Result<_, ReadError> = log.find_timestamp(1_050, end).await;
    let _ = log.max_timestamp().await;
}

fn recover_and_use(machine: &Machine) -> bool {
    let Ok(dir) = DataDir::open_on(machine.file_system(), Path::new(DIR)) else { return false };
    let Ok(found) = dir.recover(32 << 10) else { return false };
    paused(async {
        let store = ShardStore::open(&dir, config()).await.unwrap();
        for group in found.into_iter().filter(|group| group.health.is_ok()) {
            let id = group.group_id;
            let log = store.attach(group, of(id));
            read_through(&log).await;
            // And it goes on, where its numbers leave room for that.
            let (index, base) = (log.last_index(), log.log_end_offset());
            let term = log.hard_state().term.max(log.last_term());
            if index < 1 << 40 && base < 1 << 40 && term < 1 << 30 {
                let payload = Payload::Batch(batch(base, term, None, 10));
                let _ = log.stage(None, &[Entry { index: index + 1, term, payload }]);
            }
        }
        let _ = store.shutdown().await;
    });
    true
}

#[test]
fn arbitrary_bytes_never_panic_nor_take_much_memory() {
    let template = template();
    let kinds = ["wal", "log", "idx", "snapshot", "meta"];
    for kind in kinds {
        let of_kind = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == kind);
        assert!(template.keys().filter(of_kind).count() >= 2, "too few of .{kind}: {:?}", template.keys());
    }
    let (started, total) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (template, started, total) = (&template, &started, &total);
            scope.spawn(move || {
                for case in (thread..CASES).step_by(THREADS as usize) {
                    let mut random = Random::new(case);
                    let mut files = template.clone();
                    for _ in 0..1 + random.below(3) {
                        change(&mut random, &mut files);
                    }
                    let bytes: usize = files.values().map(Vec::len).sum();
                    let machine =
                        Machine::new(case, Settings { capacity_bytes: 64 << 20, ..Settings::default() });
                    write_all(&machine.file_system(), &files);
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        peak_of(|| recover_and_use(&machine))
                    }));
                    let (came_up, peak) = outcome.unwrap_or_else(|_| panic!("case {case} panicked"));
                    assert!(
                        peak <= bytes * PER_BYTE_MAX + FREE_BYTES,
                        "case {case}: {peak} bytes of memory for {bytes} in files"
                    );
                    started.fetch_add(u64::from(came_up), Ordering::Relaxed);
                    let done = total.fetch_add(1, Ordering::Relaxed) + 1;
                    if done.is_multiple_of(2_000) {
                        println!("{done} cases");
                    }
                }
            });
        }
    });
    let started = started.into_inner();
    println!("{started} of {CASES} directories came up");
    // Most damage is one partition's.
    assert!(started > CASES / 2);
}
