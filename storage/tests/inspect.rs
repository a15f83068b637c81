//! `Inspection`: nothing is wrong with what a store leaves, and every damaged byte is found.

mod common;

use std::path::{Path, PathBuf};

use common::*;
use flumen_storage::*;

/// Three partitions with several segments; `clean` as a stop leaves them, otherwise as kill -9 does.
fn filled(path: &Path, clean: bool) {
    let (data, _) = recover(path);
    on_shard(async {
        let store = ShardStore::open(&data, small()).await.unwrap();
        for id in 1..=3u64 {
            let config = GroupConfig { segment_bytes: 300_000, ..GroupConfig::default() };
            let writer = Writer::new(&store, store.create(id, &format!("t-{id}.g{id}"), config).unwrap());
            for _ in 0..400 {
                writer.append(3, 700).await;
            }
        }
        if clean {
            store.shutdown().await.unwrap();
        }
    });
}

fn verify(path: &Path) -> (Summary, Vec<Finding>) {
    let mut found = Vec::new();
    let summary = Inspection::open(path).unwrap().verify(&mut |finding| found.push(finding)).unwrap();
    (summary, found)
}

fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.to_str().unwrap().ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_a_store_leaves_is_whole() {
    for clean in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), clean);
        let (summary, found) = verify(dir.path());
        let bad: Vec<&Finding> = found.iter().filter(|f| f.severity != Severity::Normal).collect();
        assert!(bad.is_empty(), "clean {clean}: {bad:?}");
        assert_eq!((summary.damaged, summary.rebuilt, summary.partitions), (0, 0, 3));
        assert_eq!(summary.batches + summary.unflushed_entries, 1200, "{summary:?}");
        assert!(summary.segments >= 6 && summary.index_entries > 0 && summary.snapshots > 0, "{summary:?}");
        assert_eq!(summary.wal_commits > 0, !clean);
    }
}

#[test]
fn every_flipped_byte_of_a_segment_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), true);
    for path in files(dir.path(), ".log") {
        let length = std::fs::metadata(&path).unwrap().len() as usize;
        for at in [0, 7, 11, 13, 16, 17, 20, 60, 61, length / 2, length - 1] {
            // Kafka's checksum does not cover offset, length, epoch and magic: offset and magic are checked by
            // themselves, a wrong length by what follows, and the epoch (12 to 15) by nothing.
            if (12..16).contains(&at) {
                continue;
            }
            flip(&path, at);
            let (summary, found) = verify(dir.path());
            let here: Vec<&Finding> = found.iter().filter(|f| f.path == path).collect();
            assert!(
                here.iter().any(|f| f.severity == Severity::Damage),
                "{} at {at}: {found:?}",
                path.display()
            );
            assert!(summary.damaged > 0);
            flip(&path, at);
        }
    }
    assert_eq!(verify(dir.path()).0.damaged, 0);
}

#[test]
fn missing_and_shortened_segments_are_damage() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), true);
    for path in files(dir.path(), ".log") {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(verify(dir.path()).0.damaged > 0, "{} shortened", path.display());
        std::fs::remove_file(&path).unwrap();
        let first = path.to_str().unwrap().ends_with("00000000000000000000.log");
        // Without log start records the first segment may as well have been deleted by retention; a gap may not.
        assert!(first || verify(dir.path()).0.damaged > 0, "{} removed", path.display());
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(verify(dir.path()).0.damaged, 0);
    }
}

#[test]
fn what_can_be_made_again_is_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), true);
    for path in files(dir.path(), ".idx").into_iter().chain(files(dir.path(), ".snapshot")) {
        let length = std::fs::metadata(&path).unwrap().len() as usize;
        for at in [0, 9, 20, length - 5] {
            flip(&path, at);
            let (summary, found) = verify(dir.path());
            assert_eq!(summary.damaged, 0, "{} at {at}: {found:?}", path.display());
            assert!(found.iter().any(|f| f.path == path && f.severity == Severity::Rebuilt), "{found:?}");
            flip(&path, at);
        }
    }
    // And it is.
    for path in files(dir.path(), ".idx").into_iter().chain(files(dir.path(), ".snapshot")) {
        flip(&path, 20);
    }
    drop(recover(dir.path()));
    assert_eq!(verify(dir.path()).0.damaged, 0);
}

#[test]
fn damage_in_the_wal_is_found_before_a_start() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), false);
    let whole = verify(dir.path()).0;
    let mut caught = 0;
    for path in files(dir.path(), ".wal") {
        let bytes = std::fs::read(&path).unwrap();
        // The first block that counts of this file, and its neighbours.
        for at in (0..bytes.len()).step_by(4096).filter(|at| bytes[*at..].starts_with(b"FLWB")).step_by(7) {
            flip(&path, at + 400);
            let summary = verify(dir.path()).0;
            caught += u64::from(summary.damaged > 0);
            assert!(summary.damaged > 0 || summary.wal_commits <= whole.wal_commits);
            flip(&path, at + 400);
        }
    }
    assert!(caught > 10, "{caught}");
    assert_eq!(verify(dir.path()).0, whole);
}

#[test]
fn refuses_what_is_no_data_directory() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Inspection::open(dir.path()).err(), Some(OpenError::NotOurs { .. })));
    assert!(matches!(Inspection::open(dir.path().join("no")).err(), Some(OpenError::NotADirectory { .. })));
    filled(dir.path(), true);
    let running = DataDir::open(dir.path()).unwrap();
    assert!(matches!(Inspection::open(dir.path()).err(), Some(OpenError::InUse { .. })));
    drop(running);
    std::fs::write(dir.path().join("FORMAT"), "flumen 99\n").unwrap();
    assert!(matches!(Inspection::open(dir.path()).err(), Some(OpenError::Format { .. })));
}

#[test]
fn dumps_every_record_and_stops_when_told() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), false);
    let inspection = Inspection::open(dir.path()).unwrap();
    let dump = |options: DumpOptions| {
        let mut lines = Vec::new();
        inspection.dump(&options, &mut |line| {
            lines.push(line);
            true
        })?;
        Ok::<_, OpenError>(lines)
    };
    let wal = dump(DumpOptions { wal: true, ..DumpOptions::default() }).unwrap();
    let segments = dump(DumpOptions {
        partition: Some("t-2".to_owned()),
        records: true,
        values: true,
        ..DumpOptions::default()
    })
    .unwrap();
    let of_two = |line: &&String| line.starts_with("| batch group: 2 ");
    let last: i64 = wal
        .iter()
        .filter(of_two)
        .filter_map(|line| line.split("offset: ").nth(1)?.split(' ').next()?.parse().ok())
        .max()
        .unwrap();
    assert_eq!(last, 1197);
    let offsets: Vec<i64> = segments
        .iter()
        .filter(|line| line.starts_with("| offset"))
        .filter_map(|line| line.split(' ').nth(2)?.parse().ok())
        .collect();
    // From the first on without a gap; what is missing at the end is in the WAL.
    assert!(offsets.len() > 600 && offsets.iter().copied().eq(0..offsets.len() as i64), "{}", offsets.len());
    assert!(segments.iter().any(|line| line.contains("payload: 2/7/1/xxx")));
    let later = dump(DumpOptions {
        partition: Some("t-2.g2".to_owned()),
        from_offset: 600,
        ..DumpOptions::default()
    })
    .unwrap();
    assert!(later.len() < segments.len() && !later.iter().any(|line| line.contains("baseOffset: 0 ")));
    let unknown = dump(DumpOptions { partition: Some("u-0".to_owned()), ..DumpOptions::default() });
    assert!(unknown.unwrap_err().to_string().contains("no partition u-0"));
    let mut count = 0;
    inspection
        .dump(&DumpOptions::default(), &mut |_| {
            count += 1;
            count < 5
        })
        .unwrap();
    assert_eq!(count, 5);
}
