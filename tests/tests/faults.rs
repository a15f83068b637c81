//! Clients that stall, a disk that is full, a start that cannot be: the broker says what happened and what to do, and
//! what can go on does.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::export::{until, until_settled};
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::{Sender, read_all};
use flumen_tests::mount::Mount;
use flumen_tests::process::{flumen_binary, free_port};
use serde_json::json;

fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn five_hundred_stalled_frames_cost_kilobytes_each() {
    const CLIENTS: u64 = 500;
    /// Claimed by each frame, the most that a frame may be.
    const CLAIMED: i32 = 100 << 20;
    const SENT: usize = 3 << 10;
    const ALLOWED_EACH: u64 = 48 << 10;
    let dir = tempfile::tempdir().unwrap();
    let broker = Flumen::start(dir.path(), &[]).unwrap();
    broker.create_topic("t", 4, &json!({})).unwrap();
    let mut sender = Sender::new(&broker.kafka, &[("message.timeout.ms", "20000")]).unwrap();
    let mut send = |from: u64, to: u64| {
        for number in from..to {
            let value = format!("{number:0>800}");
            sender.send("t", &number.to_string(), value.as_bytes(), number).unwrap();
        }
        sender.flush().unwrap();
        let reports = sender.reports();
        assert!(reports.failed.is_empty(), "{:?}", reports.failed.first());
    };
    // What serving costs by itself is there before the measurement.
    send(0, 20_000);
    let pid = broker.pid().unwrap();
    let before = resident_bytes(pid);
    let stalled: Vec<TcpStream> = (0..CLIENTS)
        .map(|_| {
            let mut stream = TcpStream::connect(&broker.kafka).unwrap();
            // A produce request, version 9: so far there is nothing wrong with it.
            let mut frame = CLAIMED.to_be_bytes().to_vec();
            frame.extend([0, 0, 0, 9, 0, 0, 0, 1, 0xff, 0xff, 0]);
            frame.resize(4 + SENT, 0x55);
            stream.write_all(&frame).unwrap();
            stream
        })
        .collect();
    // All of it has arrived when the broker has counted the connections and answered somebody after them.
    loop {
        let brokers = broker.get("/v1/brokers").unwrap();
        let shards = brokers[0]["shards"].as_array().unwrap();
        let connections: u64 = shards.iter().map(|s| s["connections"].as_u64().unwrap()).sum();
        if connections >= CLIENTS {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let started = Instant::now();
    send(20_000, 40_000);
    let took = started.elapsed();
    let ends = broker.end_offsets("t").unwrap();
    assert_eq!(read_all(&broker.kafka, "t", &ends).unwrap().len(), 40_000);
    let grown = resident_bytes(pid).saturating_sub(before);
    // The 20,000 records of the second half stay in the tail cache, as those of the first half do.
    let records = 20_000 * 900;
    let each = grown.saturating_sub(records) / CLIENTS;
    println!(
        "   {CLIENTS} stalled clients: {each} bytes each; healthy ones took {took:?} for 20,000 records"
    );
    assert!(each < ALLOWED_EACH, "{each} bytes for each stalled client, {grown} in all");
    drop(stalled);
    // Their connections go with them.
    loop {
        let brokers = broker.get("/v1/brokers").unwrap();
        let shards = brokers[0]["shards"].as_array().unwrap();
        if shards.iter().map(|s| s["connections"].as_u64().unwrap()).sum::<u64>() < 20 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_full_disk_stops_producers_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Mount::ext4(dir.path(), 640) else { return };
    let clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let url = format!("clickhouse.url={}", clickhouse.url);
    let broker = Flumen::start_at(&disk.path, free_port(), free_port(), &[&url], &["--shards", "1"]).unwrap();
    broker.create_topic("ballast", 1, &json!({})).unwrap();
    broker.create_topic("t", 2, &json!({})).unwrap();
    let export = json!({ "auto_create": true, "columns": "id UInt64, pad String", "target_lag_ms": 100 });
    broker.call("PUT", "/v1/exports/t", Some(&export)).unwrap();
    broker.call("POST", "/v1/exports/t:pause", None).unwrap();

    // Without retries, a producer shows what the broker answers.
    let once = [("enable.idempotence", "false"), ("retries", "0"), ("linger.ms", "20")];
    let pad = "p".repeat(16 << 10);
    let mut ballast = Sender::new(&broker.kafka, &once).unwrap();
    let mut sender = Sender::new(&broker.kafka, &once).unwrap();
    let mut number = 0;
    let mut send = |sender: &mut Sender, topic: &str, records: u64| {
        for _ in 0..records {
            let value = json!({ "id": number, "pad": pad }).to_string();
            sender.send(topic, &number.to_string(), value.as_bytes(), number).unwrap();
            number += 1;
        }
        sender.flush().unwrap();
    };
    send(&mut sender, "t", 1_000);
    let mut megabytes = 0;
    while ballast.reports().failed.is_empty() {
        send(&mut ballast, "ballast", 512);
        megabytes += 8;
        assert!(megabytes < 700, "the disk does not fill");
    }
    // Every producer is told, with an error that Kafka clients take as a reason to try again later.
    send(&mut sender, "t", 10);
    let refused = sender.reports().failed.clone();
    println!("   {megabytes} MB, then: {}", refused[0].0);
    assert_eq!(refused.len(), 10);
    assert!(refused.iter().all(|(error, _)| error.contains("Disk error")), "{refused:?}");
    let metrics = broker.get("/metrics").unwrap();
    assert!(metrics.as_str().unwrap().contains("flumen_storage_free_space_alert 1"));
    let health = broker.cli(&["cluster", "health"]).unwrap();
    assert_eq!(health.code, Some(10), "{}", health.stdout);
    assert!(health.stdout.contains("error[DISK_FULL]"), "{}", health.stdout);
    assert!(health.stdout.contains("flumen topic delete NAME"), "{}", health.stdout);

    // Somebody else takes the rest, to the last byte.
    let filler = std::fs::File::create(disk.path.join("filler")).unwrap();
    let mut taken = 0u64;
    while let Ok(n) = (&filler).write(&[0x5a; 64 << 10]) {
        taken += n as u64;
    }
    println!("   the last {} MB are taken", taken >> 20);
    assert!(taken > 0);

    // Reads go on, and everything acknowledged is there.
    let acknowledged: BTreeMap<_, _> = sender.reports().places.clone();
    assert_eq!(acknowledged.len(), 1_000);
    let ends = broker.end_offsets("t").unwrap();
    let read = read_all(&broker.kafka, "t", &ends).unwrap();
    let places: Vec<_> = acknowledged.keys().copied().collect();
    let mut found: Vec<_> = read.iter().map(|r| r.place).collect();
    found.sort_unstable();
    assert_eq!(found, places);

    // The export goes on: it writes its plans to the same disk.
    broker.call("POST", "/v1/exports/t:resume", None).unwrap();
    until_settled(&broker, "t").unwrap();
    let rows = clickhouse.query("SELECT count(), uniqExact(_partition, _offset) FROM t").unwrap();
    assert_eq!(rows.trim(), "1000\t1000");

    // Deletion goes on, and what it frees is for producers, whose retries then succeed by themselves.
    let mut patient = Sender::new(&broker.kafka, &[]).unwrap();
    patient.send("t", "k", br#"{"id": 77777, "pad": ""}"#, 77_777).unwrap();
    broker.call("DELETE", "/v1/topics/ballast", None).unwrap();
    patient.flush().unwrap();
    assert_eq!(patient.reports().places.len(), 1);
    until_settled(&broker, "t").unwrap();
    assert_eq!(clickhouse.number("SELECT count() FROM t WHERE id = 77777").unwrap(), 1);
    assert_eq!(broker.cli(&["cluster", "health"]).unwrap().code, Some(0));
    // A restart finds everything.
    let mut broker = broker;
    broker.kill_9();
    broker.restart().unwrap();
    let ends = broker.end_offsets("t").unwrap();
    assert_eq!(ends.iter().sum::<i64>(), 1_001);
    assert_eq!(read_all(&broker.kafka, "t", &ends).unwrap().len(), 1_001);
}

/// Starts a server that cannot start; its exit status and what it said.
/// Regression: a log file on a full disk made whoever had something to log panic, the writer of the log among them.
#[test]
fn a_log_file_that_cannot_be_written_to_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join("broker.log")).unwrap();
    let talkative = vec![("FLUMEN_LOG", "debug".to_string())];
    let mut broker = Flumen::start_with(dir.path(), &[], &[], talkative).unwrap();
    for life in 0..2 {
        let topic = format!("t{life}");
        broker.create_topic(&topic, 4, &json!({})).unwrap();
        let mut sender = Sender::new(&broker.kafka, &[]).unwrap();
        (0..1_000).for_each(|number| sender.send(&topic, "k", b"value", number).unwrap());
        sender.flush().unwrap();
        assert_eq!(sender.reports().places.len(), 1_000);
        assert_eq!(broker.end_offsets(&topic).unwrap().iter().sum::<i64>(), 1_000);
        assert!(broker.stop().unwrap().success());
        broker.restart().unwrap();
    }
    assert_eq!(broker.end_offsets("t0").unwrap().iter().sum::<i64>(), 1_000);
}

fn refused_start(arguments: &[&str]) -> (i32, String) {
    let mut child = Command::new(flumen_binary().unwrap())
        .arg("server")
        .args(arguments)
        .env("FLUMEN_LOG", "error")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if !line.is_empty() {
        let _ = child.kill();
        let _ = child.wait();
        panic!("it started with {arguments:?}: {line}");
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn start_in(data_dir: &Path, more: &[&str]) -> (i32, String) {
    let (kafka, admin) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let data_dir = data_dir.to_str().unwrap();
    refused_start(&[&["--data-dir", data_dir, "--kafka", &kafka, "--admin", &admin], more].concat())
}

#[test]
fn a_start_that_cannot_be_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let check = |what: &str, outcome: (i32, String), sentences: &[&str]| {
        println!("   {what}: exit {} {}", outcome.0, outcome.1.trim());
        assert_eq!(outcome.0, 1, "{what}: {}", outcome.1);
        for sentence in sentences {
            assert!(outcome.1.contains(sentence), "{what} should say '{sentence}': {}", outcome.1);
        }
        assert!(!outcome.1.contains("panicked"), "{}", outcome.1);
    };
    let good = dir.path().join("good");
    let broker = Flumen::start(&good, &[]).unwrap();
    let data = good.join("data");
    check(
        "second process",
        start_in(&data, &[]),
        &["another flumen process", "stop it or choose another --data-dir"],
    );
    let other = dir.path().join("other");
    let other_path = other.to_str().unwrap();
    let ports = |kafka: &str, admin: &str| {
        refused_start(&["--data-dir", other_path, "--kafka", kafka, "--admin", admin])
    };
    check(
        "kafka port in use",
        ports(&broker.kafka, "127.0.0.1:0"),
        &["for kafka", "--kafka HOST:PORT", &broker.kafka],
    );
    check("admin port in use", ports("127.0.0.1:0", &broker.admin), &["for admin", "--admin HOST:PORT"]);
    let sentences = ["192.0.2.1:9092", "does not have the address"];
    check("foreign address", ports("192.0.2.1:9092", "127.0.0.1:0"), &sentences);
    drop(broker);

    std::fs::write(data.join("FORMAT"), "99\n").unwrap();
    check("another version", start_in(&data, &[]), &["99", "start the version"]);
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("precious.txt"), "not ours").unwrap();
    check("somebody else's directory", start_in(&foreign, &[]), &["foreign", "empty"]);
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    check("a file", start_in(&file, &[]), &["file"]);
    if let Some(mount) = Mount::read_only(dir.path()) {
        let sentences = ["read-only", "make it writable or choose another --data-dir"];
        check("read-only file system", start_in(&mount.path.join("data"), &[]), &sentences);
    }

    check(
        "a bad name",
        start_in(&other, &["--set", "num.partition=3"]),
        &["num.partition", "num.partitions"],
    );
    check("a bad value", start_in(&other, &["--set", "num.partitions=many"]), &["num.partitions", "many"]);
    check("no value", start_in(&other, &["--set", "num.partitions"]), &["KEY=VALUE"]);
    let properties = dir.path().join("server.properties");
    std::fs::write(&properties, "# a comment\nnum.partitions=4\nlog.retention.hour=1\n").unwrap();
    let config = ["--config", properties.to_str().unwrap()];
    check("a bad name in a file", start_in(&other, &config), &["log.retention.hour", "log.retention.hours"]);
    std::fs::write(&properties, "num.partitions\n").unwrap();
    check("a bad line in a file", start_in(&other, &config), &["server.properties:1", "key=value"]);
    let absent = dir.path().join("absent.properties");
    check("no such file", start_in(&other, &["--config", absent.to_str().unwrap()]), &["absent.properties"]);
}

#[test]
fn an_export_that_cannot_be_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let address = clickhouse.url.strip_prefix("http://").unwrap().to_string();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let broker = Flumen::start(dir.path(), &[&format!("clickhouse.url={nobody}")]).unwrap();
    broker.create_topic("t", 1, &json!({})).unwrap();
    let mut sender = Sender::new(&broker.kafka, &[("message.timeout.ms", "20000")]).unwrap();
    let mut number = 0;
    let mut produce = || {
        for _ in 0..50 {
            sender.send("t", "k", json!({ "id": number }).to_string().as_bytes(), number).unwrap();
            number += 1;
        }
        sender.flush().unwrap();
        assert!(sender.reports().failed.is_empty(), "producers notice nothing");
    };
    produce();
    // Through the command line, which refuses before anything is changed.
    let refuse = |what: &str, arguments: &[&str], sentences: &[&str]| {
        let output = broker.cli(&[&["export", "create", "t"], arguments].concat()).unwrap();
        println!("   {what}: exit {:?} {}", output.code, output.stderr.trim());
        assert_eq!(output.code, Some(1), "{what}: {}", output.stdout);
        for sentence in sentences {
            assert!(output.stderr.contains(sentence), "{what} should say '{sentence}': {}", output.stderr);
        }
        assert!(!output.stderr.contains("hunter22"), "a password is shown: {}", output.stderr);
    };
    let create = ["--auto-create", "--columns", "id UInt64"];
    let with = |url: &str| -> Vec<String> {
        create.iter().map(|s| (*s).to_string()).chain(["--clickhouse".into(), url.into()]).collect()
    };
    let refuse_url = |what: &str, url: &str, sentences: &[&str]| {
        let arguments = with(url);
        refuse(what, &arguments.iter().map(String::as_str).collect::<Vec<_>>(), sentences);
    };
    let good = format!("http://{address}");
    refuse("nobody there", &create, &["127.0.0.1", "check that ClickHouse runs there"]);
    refuse_url("not a URL", "tcp://x:9000", &["http://"]);
    refuse_url("TLS", &format!("https://{address}"), &["TLS"]);
    refuse_url(
        "password",
        &format!("http://default:hunter22@{address}"),
        &["516", "check user and password"],
    );
    refuse_url(
        "database",
        &format!("http://{address}/?database=nowhere"),
        &["nowhere does not exist", "create the database"],
    );
    refuse("table", &["--clickhouse", &good], &["`default`.`t` does not exist", "auto.create=true"]);
    clickhouse.query("CREATE TABLE odd (id UInt64, _partition String, _offset Int64) ENGINE = MergeTree ORDER BY id SETTINGS non_replicated_deduplication_window = 9").unwrap();
    refuse(
        "column type",
        &["--clickhouse", &good, "--table", "odd"],
        &["_partition has type String", "integer type"],
    );
    refuse("columns", &["--clickhouse", &good, "--auto-create", "--columns", "id Int65"], &["column id"]);
    let output = broker.cli(&["export", "create", "absent"]).unwrap();
    assert_eq!(output.code, Some(3));
    assert!(output.stderr.contains("flumen topic create absent"), "{}", output.stderr);
    assert_eq!(broker.get("/v1/exports").unwrap()["exports"], json!([]), "refusals change nothing");

    // A server that is away refuses nothing where it cannot be asked: the export waits, and says so.
    let settings = json!({ "configs": {
        "flumen.clickhouse.enable": true, "flumen.clickhouse.auto.create": true,
        "flumen.clickhouse.columns": "id UInt64",
    } });
    broker.call("PATCH", "/v1/topics/t", Some(&settings)).unwrap();
    let status = until(&broker, "t", "the wait to show", |s| s["state"] == "backing_off").unwrap();
    assert!(status["last_error"]["hint"].as_str().unwrap().contains("check that it runs"), "{status}");
    produce();
    let shown = broker.cli(&["export", "status", "t"]).unwrap();
    assert_eq!(shown.code, Some(10));
    assert!(shown.stdout.contains("check that it runs"), "{}", shown.stdout);
    let health = broker.cli(&["cluster", "health"]).unwrap();
    assert_eq!(health.code, Some(0), "what mends itself is no alarm: {}", health.stdout);
    assert!(health.stdout.contains("warning[EXPORT_WAITS] broker 1: export of t"), "{}", health.stdout);

    // Trouble that comes later stops the export where it is, never the producers, and is over when it is put right.
    let endpoint = json!({ "configs": { "flumen.clickhouse.endpoint": good } });
    broker.call("PATCH", "/v1/topics/t", Some(&endpoint)).unwrap();
    until_settled(&broker, "t").unwrap();
    clickhouse.query("DROP TABLE t").unwrap();
    clickhouse.query("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id").unwrap();
    produce();
    let status = until(&broker, "t", "the refusal to show", |s| s["state"] == "failed").unwrap();
    let error = &status["last_error"];
    assert!(error["message"].as_str().unwrap().contains("No such column"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("restore it, then resume"), "{error}");
    let health = broker.cli(&["cluster", "health"]).unwrap();
    assert_eq!(health.code, Some(10), "{}", health.stdout);
    for sentence in
        ["error[EXPORT_FAILED] broker 1: export of t", "No such column", "restore it, then resume"]
    {
        assert!(health.stdout.contains(sentence), "'{sentence}' is not in {}", health.stdout);
    }
    produce();
    clickhouse.query("DROP TABLE t").unwrap();
    broker.call("POST", "/v1/exports/t:resume", None).unwrap();
    until_settled(&broker, "t").unwrap();
    assert_eq!(clickhouse.number("SELECT count() FROM t").unwrap(), 100);
    assert_eq!(broker.cli(&["cluster", "health"]).unwrap().code, Some(0));
}
