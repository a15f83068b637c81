//! A disk whose syncs fail: the broker acknowledges nothing that they were to make safe, says what happened, and ends with
//! status 74; on a disk that works again everything acknowledged is there. Needs the right to mount.

use flumen_tests::flumen::{Flumen, cli};
use flumen_tests::kafka::{Sender, read_between};
use flumen_tests::mount::FailingDisk;
use serde_json::json;

/// EX_IOERR.
const LOG_FAILED: i32 = 74;

/// What the disk holds; half of it is the rings of small sizes, metadata of the file systems, and what came before.
const DISK_MIB: u64 = 48;

/// Numbered records to a topic with this configuration until the broker dies of it.
fn write_until_it_ends(
    configs: &serde_json::Value,
    log_is_full: bool,
) -> Option<(tempfile::TempDir, FailingDisk, Flumen, Sender)> {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new(dir.path(), DISK_MIB)?;
    let small = vec![("FLUMEN_SMALL", "1".to_string())];
    if log_is_full {
        std::os::unix::fs::symlink("/dev/full", dir.path().join("broker.log")).unwrap();
    }
    let mut broker = Flumen::start_with(dir.path(), &[], &["--shards", "1"], small).unwrap();
    broker.create_topic("t", 2, configs).unwrap();
    // Without retries a producer shows what the broker answers; an answer that does not come counts as none.
    let once = [
        ("enable.idempotence", "false"),
        ("retries", "0"),
        ("message.timeout.ms", "5000"),
        ("batch.size", "60000"),
    ];
    let mut sender = Sender::new(&broker.kafka, &once).unwrap();
    let pad = "p".repeat(4 << 10);
    let status = loop {
        for _ in 0..400 {
            let number = sender.sent();
            sender.send("t", &key(number), format!("{number:010}{pad}").as_bytes(), number).unwrap();
        }
        sender.flush().unwrap();
        if let Some(status) = broker.ended().unwrap() {
            break status;
        }
        assert!(sender.sent() < 400 << 8, "its syncs do not fail");
    };
    if log_is_full {
        assert_eq!(status.code(), Some(LOG_FAILED));
        return Some((dir, disk, broker, sender));
    }
    let text = std::fs::read_to_string(dir.path().join("broker.log")).unwrap();
    let sentence = text.lines().find(|line| line.starts_with("flumen: ")).unwrap_or_default();
    println!("   after {} records: {status}, {sentence}", sender.sent());
    assert_eq!(status.code(), Some(LOG_FAILED), "{text}");
    assert!(sentence.contains("stopping without acknowledging what was in flight"), "{text}");
    Some((dir, disk, broker, sender))
}

/// Every second one has a key that comes again, so that compaction has something to do and something to keep.
fn key(number: u64) -> String {
    if number % 2 == 0 { number.to_string() } else { format!("again {}", number % 64) }
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(&value[..10]).unwrap().parse().unwrap()
}

/// Disks tried until one of them said so in time when it lost something. Two file systems and two loop devices stand behind
/// each, and now and then they report a sync as good and only the next one as failed; a program that writes one file and
/// syncs it sees the same. What they lost then must be seen by verify.
const DISKS: usize = 20;

fn acknowledged_is_there(configs: &serde_json::Value) {
    for _ in 0..DISKS {
        let Some((dir, disk, broker, sender)) = write_until_it_ends(configs, false) else { return };
        if everything_is_there(disk, broker, &sender, configs) {
            return;
        }
        drop(dir);
    }
    panic!("none of {DISKS} disks kept what it had called safe");
}

/// `false`: the disk lost what it had called safe, and that is said.
fn everything_is_there(
    mut disk: FailingDisk,
    mut broker: Flumen,
    sender: &Sender,
    configs: &serde_json::Value,
) -> bool {
    disk.repair().unwrap();
    let data = disk.path().display().to_string();
    let verified = cli(&["debug", "log", "verify", &data]).unwrap();
    println!("   verify: {}", verified.stdout.lines().last().unwrap_or_default());
    if !verified.success {
        assert!(verified.stdout.contains("DAMAGED"), "{}{}", verified.stdout, verified.stderr);
        return false;
    }
    broker.restart().unwrap();
    let ends = broker.end_offsets("t").unwrap();
    let found = read_between(&broker.kafka, "t", &[0, 0], &ends).unwrap();
    let found: std::collections::BTreeMap<_, _> =
        found.iter().map(|record| (record.place, number(&record.value))).collect();
    for (place, number) in &sender.reports().places {
        match found.get(place) {
            Some(there) => assert_eq!(there, number, "at {place:?}"),
            // What compaction took has something newer of its key behind it.
            None => {
                let newer = found.range(place..).any(|(at, n)| at.0 == place.0 && key(*n) == key(*number));
                let compacted = configs.get("cleanup.policy").is_some();
                assert!(
                    compacted && newer,
                    "{number} was acknowledged at {place:?}; the log ends at {ends:?}"
                );
            }
        }
    }
    // And it goes on.
    let mut sender = Sender::new(&broker.kafka, &[]).unwrap();
    sender.send("t", "k", b"0000000000 again", 0).unwrap();
    sender.flush().unwrap();
    assert!(sender.reports().failed.is_empty());
    assert!(broker.stop().unwrap().success());
    true
}

#[test]
fn what_was_acknowledged_outlives_a_disk_whose_syncs_fail() {
    acknowledged_is_there(&json!({ "segment.bytes": "1048576" }));
}

/// The sync that fails first may be that of a compacted segment: what the disk lost with it is not only its own.
#[test]
fn a_failed_sync_of_compaction_ends_the_broker_too() {
    acknowledged_is_there(&json!({
        "segment.bytes": "1048576", "cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.01"
    }));
}

/// Regression: it said that it had failed, panicked since nobody could be told, and stayed without a log.
#[test]
fn it_ends_also_when_its_last_words_cannot_be_written() {
    drop(write_until_it_ends(&json!({}), true));
}
