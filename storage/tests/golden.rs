//! Data directories that earlier versions wrote stay readable. The examples in `golden/` are never written again; a new
//! format version adds its own (`FLUMEN_WRITE_GOLDEN=<name> cargo test -p flumen-storage --test golden`).

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use common::*;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use flumen_storage::*;

/// Small enough for a repository, large enough for files of every kind.
fn config() -> StoreConfig {
    StoreConfig {
        wal_file_bytes: 256 << 10,
        wal_files_max: 3,
        cache_bytes: 64 << 10,
        ..StoreConfig::default()
    }
}

fn of(id: GroupId) -> GroupConfig {
    let durability = if id == 2 { Durability::Os } else { Durability::Durable };
    GroupConfig { durability, segment_bytes: 4 << 10, ..GroupConfig::default() }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.gz"))
}

/// Archive: per file a line `<length> <path>` and its bytes; compressed as one.
fn pack(dir: &Path) -> Vec<u8> {
    fn walk(path: &Path, out: &mut Vec<PathBuf>) {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for entry in entries {
            if entry.is_dir() { walk(&entry, out) } else { out.push(entry) }
        }
    }
    let mut files = Vec::new();
    walk(dir, &mut files);
    let mut out = GzEncoder::new(Vec::new(), Compression::best());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let name = file.strip_prefix(dir).unwrap().display().to_string();
        writeln!(out, "{} {name}", bytes.len()).unwrap();
        out.write_all(&bytes).unwrap();
    }
    out.finish().unwrap()
}

fn unpack(name: &str) -> tempfile::TempDir {
    let packed = std::fs::read(path_of(name)).unwrap();
    let mut bytes = Vec::new();
    GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let line_end = rest.iter().position(|byte| *byte == b'\n').unwrap();
        let line = std::str::from_utf8(&rest[..line_end]).unwrap();
        let (length, name) = line.split_once(' ').unwrap();
        let (content, after) = rest[line_end + 1..].split_at(length.parse().unwrap());
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        rest = after;
    }
    dir
}

/// The story that every example tells: three partitions, of which one is kept by the kernel and one is deleted; an
/// idempotent producer; a suffix replaced by a later leader; a log start that moved. A clean stop is one only if
/// everything is committed.
async fn tell(store: &ShardStore, all_committed: bool) {
    let mut writers: Vec<Writer> = (1..=3)
        .map(|id| Writer::new(store, store.create(id, &format!("t-{id}.g{id}"), of(id)).unwrap()))
        .collect();
    for k in 0..60 {
        for writer in &writers {
            writer.append(1 + k % 2, 150).await;
        }
    }
    for (k, writer) in writers[..2].iter().enumerate() {
        let log = &writer.log;
        let (index, base) = (log.last_index() + 1, log.log_end_offset());
        let payload = Payload::Batch(produced(7_000 + k as i64, 3, 40, base, 2));
        let at = log.stage(None, &[Entry { index, term: 1, payload }]).unwrap();
        writer.durable(at).await;
        log.set_high_watermark(base + 2);
        log.delete_below(20).await.unwrap();
        // Three that nobody committed, and what the next leader has in their place.
        for _ in 0..3 {
            let (at, _) = writer.stage(1, 30).unwrap();
            writer.durable(at).await;
        }
        let payload = Payload::Batch(batch(log.group_id(), base + 3, 4, 2, 40));
        let hard = HardState { term: 4, vote: 2, commit: index };
        let control =
            Entry { index: index + 3, term: 4, payload: Payload::Control(Bytes::from_static(b"no-op")) };
        let at = log.stage(Some(hard), &[Entry { index: index + 2, term: 4, payload }, control]).unwrap();
        writer.durable(at).await;
        if all_committed {
            let at = log.stage(Some(HardState { commit: index + 3, ..hard }), &[]).unwrap();
            writer.durable(at).await;
            log.set_high_watermark(base + 5);
        }
    }
    let gone = writers.pop().unwrap().log.group_id();
    store.delete(gone).await.unwrap();
}

fn check(name: &str, cleanly: bool) {
    let dir = unpack(name);
    let (data, mut found) = recover(dir.path());
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1, 2], "{name}");
    on_shard(async {
        let store = ShardStore::open(&data, config()).await.unwrap();
        for id in [1, 2] {
            let group = found.remove(&id).unwrap();
            assert_eq!(group.health, GroupHealth::Ok, "{name}");
            // 60 batches of 90 records, two of the producer, one that stayed and two of the next leader.
            assert_eq!((group.log_start_offset, group.log_end_offset), (20, 95), "{name}");
            assert_eq!((group.last_index, group.last_term), (64, 4), "{name}");
            let commit = if cleanly { 64 } else { 61 };
            assert_eq!(group.hard_state, HardState { term: 4, vote: 2, commit }, "{name}");
            assert_eq!(group.producers.producer(6_999 + id as i64), Some((3, 41)), "{name}");
            let log = store.attach(group, of(id));
            assert_eq!((log.epoch_at(90), log.epoch_at(92), log.epoch_at(93)), (1, 1, 4), "{name}");
            assert_eq!(log.epoch_end_offset(1), (1, 93), "{name}");
            check_log(&log, 20, 95, 300).await;
            log.set_high_watermark(95);
            assert_eq!(log.find_timestamp(1_050, 95).await.unwrap().map(|found| found.1), Some(50), "{name}");
            let writer = Writer::new(&store, log);
            assert_eq!(writer.append(1, 10).await, 96, "{name}");
        }
        store.shutdown().await.unwrap();
    });
}

fn write(name: &str, cleanly: bool) {
    let recovers = name.ends_with("recovered");
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = recover(dir.path());
    on_shard(async {
        let store = ShardStore::open(&data, config()).await.unwrap();
        tell(&store, cleanly).await;
        if cleanly {
            store.shutdown().await.unwrap();
        }
    });
    drop(data);
    if recovers {
        // Killed again before anything was written.
        drop(recover(dir.path()));
    }
    std::fs::write(path_of(name), pack(dir.path())).unwrap();
}

const EXAMPLES: [(&str, bool); 5] = [
    ("v1-killed", false),
    ("v1-stopped", true),
    ("v2-killed", false),
    ("v2-recovered", false),
    ("v2-stopped", true),
];

#[test]
fn directories_of_former_versions_stay_readable() {
    let wanted = std::env::var("FLUMEN_WRITE_GOLDEN").ok();
    for (name, cleanly) in EXAMPLES {
        if wanted.as_deref() == Some(name) {
            assert!(!path_of(name).exists(), "{name} exists, and examples are never written again");
            write(name, cleanly);
        }
        check(name, cleanly);
    }
}

/// The examples are of every kind of file there is, so that reading them proves something.
#[test]
fn examples_have_every_kind_of_file() {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for (name, _) in EXAMPLES {
        let dir = unpack(name);
        let mut open = vec![dir.path().to_owned()];
        while let Some(path) = open.pop() {
            for entry in std::fs::read_dir(path).unwrap() {
                let entry = entry.unwrap().path();
                if entry.is_dir() {
                    open.push(entry);
                    continue;
                }
                let kind = entry.extension().or(entry.file_name()).unwrap();
                let kind = kind.to_string_lossy();
                let kind = if kind.starts_with("states-") { "states" } else { &kind };
                *kinds.entry(kind.to_owned()).or_default() += 1;
            }
        }
    }
    for kind in ["FORMAT", "LOCK", "current", "wal", "states", "CLEAN", "meta", "log", "idx", "snapshot"] {
        assert!(kinds.contains_key(kind), "no {kind}: {kinds:?}");
    }
}
