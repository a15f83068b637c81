//! `flumen debug log`, on what a real producer and a kill left; and Kafka's own dump tool on the same segments.

use std::path::{Path, PathBuf};

use flumen_tests::flumen::{Flumen, cli};
use flumen_tests::kafka::{Sender, java_tools, kafka_tool};
use serde_json::json;

fn segments(data: &Path, directory: &str) -> Vec<PathBuf> {
    let dirs = std::fs::read_dir(data.join("log")).unwrap().map(|e| e.unwrap().path());
    let named = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with(directory);
    let dir = dirs.into_iter().find(named).unwrap();
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut segments: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "log")).collect();
    segments.sort();
    segments
}

fn produce(broker: &Flumen, records: u64) {
    let settings = [("compression.type", "lz4"), ("batch.num.messages", "50")];
    let mut sender = Sender::new(&broker.kafka, &settings).unwrap();
    for id in 0..records {
        let value = format!("{id:0>200}");
        sender.send("t", &format!("k{id}"), value.as_bytes(), id).unwrap();
    }
    sender.flush().unwrap();
}

#[test]
fn verify_and_dump() {
    const RECORDS: u64 = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let place = data.to_str().unwrap();
    let mut broker = Flumen::start(dir.path(), &[]).unwrap();
    broker.create_topic("t", 2, &json!({ "segment.bytes": "1048576" })).unwrap();
    produce(&broker, RECORDS);

    let refused = cli(&["debug", "log", "verify", place]).unwrap();
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("another flumen process uses"), "{}", refused.stderr);

    broker.kill_9();
    let verified = cli(&["debug", "log", "verify", place, "--all"]).unwrap();
    assert!(verified.success, "{}{}", verified.stdout, verified.stderr);
    let wal = cli(&["debug", "log", "dump", place, "--wal"]).unwrap();
    assert!(wal.success && wal.stdout.contains("producerId: ") && wal.stdout.contains("state: counts"));

    // A start moves everything to segments, and a stop leaves nothing else.
    broker.restart().unwrap();
    assert!(broker.stop().unwrap().success());
    let verified = cli(&["debug", "log", "verify", place]).unwrap();
    assert!(verified.success && verified.stdout.contains("everything is whole"), "{}", verified.stdout);
    let mut offsets = 0;
    for partition in ["t-0", "t-1"] {
        let dump = ["debug", "log", "dump", place, "--partition", partition, "--records", "--print-data-log"];
        let dump = cli(&dump).unwrap();
        let records = dump.stdout.lines().filter(|l| l.starts_with("| offset: ") && l.contains(" key: k"));
        offsets += records.count() as u64;
    }
    assert_eq!(offsets, RECORDS);

    kafka_reads_the_same(&data, place);

    let segment = segments(&data, "t-1.").remove(0);
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let verified = cli(&["debug", "log", "verify", place]).unwrap();
    assert_eq!(verified.code, Some(1));
    assert!(verified.stdout.contains(&format!("DAMAGED  {}", segment.display())), "{}", verified.stdout);
}

fn kafka_reads_the_same(data: &Path, place: &str) {
    if !java_tools() {
        return;
    }
    let ours = cli(&["debug", "log", "dump", place, "--partition", "t-0"]).unwrap().stdout;
    let ours: Vec<&str> = ours.lines().filter(|line| line.starts_with("baseOffset: ")).collect();
    let mut theirs = 0;
    for segment in segments(data, "t-0.") {
        let arguments = ["--files", segment.to_str().unwrap(), "--deep-iteration"];
        let (success, text) = kafka_tool("org.apache.kafka.tools.DumpLogSegments", &arguments).unwrap();
        assert!(success, "{text}");
        let lines = text.lines().filter(|line| line.starts_with("baseOffset: "));
        for (line, own) in lines.zip(&ours[theirs..]) {
            let word = |line: &str, name: &str| {
                line.split(name).nth(1).map(|rest| rest.split(' ').next().unwrap_or("").to_owned())
            };
            for name in
                [" isvalid: ", " crc: ", "lastOffset: ", " producerId: ", " compresscodec: ", " size: "]
            {
                assert_eq!(word(line, name), word(own, name), "{name} of {line}\n{own}");
            }
            assert_eq!(word(line, " isvalid: ").as_deref(), Some("true"));
            theirs += 1;
        }
    }
    assert_eq!(theirs, ours.len());
}
