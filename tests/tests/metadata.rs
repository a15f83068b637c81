//! The metadata log and its snapshots: a start reads the newest snapshot and what came after it, whatever is damaged.

use std::path::PathBuf;

use flumen_tests::flumen::Flumen;
use flumen_tests::group_configs::{set_all, value_of};
use flumen_tests::wire::Wire;
use serde_json::json;

fn snapshots(flumen: &Flumen) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(flumen.data_dir.join("data/metadata"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "snapshot"))
        .collect();
    found.sort();
    found
}

/// Waits until a snapshot newer than `than` is there, and returns it.
fn next_snapshot(flumen: &Flumen, than: Option<&PathBuf>) -> PathBuf {
    loop {
        match snapshots(flumen).pop() {
            Some(newest) if Some(&newest) != than => return newest,
            _ => std::thread::yield_now(),
        }
    }
}

/// Commands that the last start replayed, as it said itself.
fn replayed(flumen: &Flumen) -> i64 {
    let log = flumen.log();
    let line = log.lines().filter(|l| l.contains("metadata loaded")).next_back().unwrap();
    line.rsplit_once("replayed=").unwrap().1.trim().parse().unwrap()
}

#[test]
fn a_start_reads_the_newest_whole_snapshot_and_what_came_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut flumen = Flumen::start(dir.path(), &[]).unwrap();
    flumen.create_topic("t", 3, &json!({ "retention.ms": "12345678" })).unwrap();
    let mut wire = Wire::connect(&flumen.kafka).unwrap();
    let mut newest = None;
    // Five times the interval: the history is longer than what any start replays.
    for round in 0..10 {
        set_all(&mut wire, 500, 45_000 + round + 1);
        if round % 2 == 1 {
            newest = Some(next_snapshot(&flumen, newest.as_ref()));
        }
    }
    set_all(&mut wire, 7, 60_000);
    let check = |flumen: &Flumen| {
        let mut wire = Wire::connect(&flumen.kafka).unwrap();
        assert_eq!((value_of(&mut wire, 6), value_of(&mut wire, 7)), ("60000".into(), "45010".into()));
        assert_eq!(value_of(&mut wire, 500), "45000", "never set");
        let topic = flumen.get("/v1/topics/t").unwrap();
        assert_eq!(topic["partition_list"].as_array().unwrap().len(), 3);
    };
    check(&flumen);
    flumen.kill_9();
    flumen.restart().unwrap();
    check(&flumen);
    assert!((7..1000).contains(&replayed(&flumen)), "{}", replayed(&flumen));
    assert_eq!(snapshots(&flumen).len(), 2, "the newest and one to fall back to");

    // Damage the newest: the start before it and a longer replay give the same.
    flumen.kill_9();
    let newest = newest.unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&newest, bytes).unwrap();
    flumen.restart().unwrap();
    check(&flumen);
    assert!((1000..2100).contains(&replayed(&flumen)), "{}", replayed(&flumen));
    // It made up for it at once.
    let repaired = next_snapshot(&flumen, snapshots(&flumen).first());
    flumen.kill_9();
    flumen.restart().unwrap();
    check(&flumen);
    assert!(replayed(&flumen) < 1000, "{repaired:?}");

    // Without any, a log that was cut says so instead of serving half a cluster.
    flumen.kill_9();
    for snapshot in snapshots(&flumen) {
        std::fs::remove_file(snapshot).unwrap();
    }
    let refused = flumen.restart().unwrap_err().to_string();
    assert!(refused.contains("no snapshot reaches it"), "{refused}");
}
