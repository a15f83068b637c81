//! ClickHouse is down, then refuses, while records keep coming: producers do not notice, retention keeps what is not
//! exported, the circuit breaker shows, and afterwards the lag drains to exactly the right rows.

use std::collections::BTreeMap;
use std::time::Duration;

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::export::{settled_offsets, until, until_settled};
use flumen_tests::flumen::{Flumen, http};
use flumen_tests::kafka::Sender;
use flumen_tests::process::free_port;
use flumen_tests::proxy::{Fault, Proxy};
use serde_json::{Value, json};

const TOPIC: &str = "clicks";
const PARTITIONS: usize = 3;

struct Load {
    sender: Sender,
    sent: u64,
}

impl Load {
    /// Sends a few megabytes and waits until all of it is acknowledged.
    fn send(&mut self, records: u64) {
        for id in self.sent..self.sent + records {
            let value = json!({ "id": id, "page": "x".repeat(1000) }).to_string();
            self.sender.send(TOPIC, &id.to_string(), value.as_bytes(), id).unwrap();
        }
        self.sent += records;
        self.sender.flush().unwrap();
        let failed = &self.sender.reports().failed;
        assert!(failed.is_empty(), "producers noticed: {failed:?}");
    }
}

/// Log start and settled offsets; retention must never be ahead.
fn check_hold(broker: &Flumen, status: &Value) -> Vec<i64> {
    let settled = settled_offsets(status);
    let topic = broker.get(&format!("/v1/topics/{TOPIC}")).unwrap();
    let starts: Vec<i64> = topic["partition_list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["log_start_offset"].as_i64().unwrap())
        .collect();
    for (start, settled) in starts.iter().zip(&settled) {
        assert!(start <= settled, "retention went to {starts:?}, the export is at {settled:?}");
    }
    starts
}

fn metric(broker: &Flumen, name: &str) -> f64 {
    let (_, text) = http("GET", &format!("http://{}/metrics", broker.admin), None).unwrap();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in /metrics"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn breaker(broker: &Flumen, state: &str) -> f64 {
    metric(
        broker,
        &format!("flumen_export_breaker_state{{export=\"{TOPIC}\",topic=\"{TOPIC}\",state=\"{state}\"}}"),
    )
}

#[test]
fn producers_and_records_outlast_clickhouse() {
    let dir = tempfile::tempdir().unwrap();
    let mut clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let proxy = Proxy::start_on_thread(clickhouse.port(), 4, Duration::ZERO);
    let url = format!("clickhouse.url=http://127.0.0.1:{}", proxy.port);
    let broker = Flumen::start(dir.path(), &[&url]).unwrap();
    // Retention would drop nearly everything at once: a megabyte, a second.
    let tiny = json!({ "segment.bytes": 1_048_576, "retention.bytes": 1_048_576, "retention.ms": 1000 });
    broker.create_topic(TOPIC, PARTITIONS as i32, &tiny).unwrap();
    let export = json!({
        "auto_create": true, "columns": "id UInt64, page String", "target_lag_ms": 50, "flush_rows": 5000,
    });
    broker.call("PUT", &format!("/v1/exports/{TOPIC}"), Some(&export)).unwrap();
    let sender = Sender::new(&broker.kafka, &[("message.timeout.ms", "20000")]).unwrap();
    let mut load = Load { sender, sent: 0 };
    load.send(3_000);
    until_settled(&broker, TOPIC).unwrap();
    assert_eq!(breaker(&broker, "closed"), 1.0);

    // Down.
    clickhouse.kill_9();
    load.send(9_000);
    let status = until(&broker, TOPIC, "the circuit breaker to open", |s| s["breaker"] == "open").unwrap();
    assert_eq!(status["state"], "backing_off");
    assert_eq!(status["last_error"]["class"], "ambiguous", "{status}");
    assert!(status["last_error"]["hint"].as_str().unwrap().contains("looked up"), "{status}");
    assert!(status["retry_in_ms"].as_u64().is_some(), "{status}");
    assert_eq!(breaker(&broker, "open"), 1.0);
    let shown = broker.cli(&["export", "status", TOPIC]).unwrap();
    assert_eq!(shown.code, Some(10));
    assert!(shown.stdout.contains("BREAKER      open"), "{}", shown.stdout);

    // Retention looks every second at segments that are all too old and too many.
    let marks = metric(&broker, "flumen_application_uptime_seconds");
    load.send(9_000);
    until(&broker, TOPIC, "retention to have looked a few times", |s| {
        check_hold(&broker, s);
        metric(&broker, "flumen_application_uptime_seconds") > marks + 3.0
    })
    .unwrap();
    assert_eq!(metric(&broker, &format!("flumen_export_lag_records{{export=\"{TOPIC}\"")), 18_000.0);

    // Up, but it refuses every insert.
    proxy.set_faults(&[Fault::Refuse500]);
    clickhouse.restart().unwrap();
    while proxy.happened(Fault::Refuse500) < 2 {
        std::thread::sleep(Duration::from_millis(20));
    }
    load.send(3_000);
    let status = until(&broker, TOPIC, "the refusal to show", |s| {
        s["last_error"]["message"].as_str().is_some_and(|m| m.contains("the proxy is unwell"))
    })
    .unwrap();
    check_hold(&broker, &status);

    // Well again.
    proxy.set_faults(&[]);
    let status = until_settled(&broker, TOPIC).unwrap();
    assert_eq!((&status["lag_records"], &status["breaker"]), (&json!(0), &json!("closed")));
    assert_eq!(status["retry_in_ms"], Value::Null);
    let rows = clickhouse
        .query(&format!("SELECT _partition, count(), uniqExact(_offset), min(_offset), max(_offset) FROM {TOPIC} GROUP BY _partition ORDER BY _partition"))
        .unwrap();
    let mut ends: BTreeMap<i32, i64> = BTreeMap::new();
    load.sender.reports().places.keys().for_each(|(p, _)| *ends.entry(*p).or_default() += 1);
    let expected: String = ends.iter().map(|(p, n)| format!("{p}\t{n}\t{n}\t0\t{}\n", n - 1)).collect();
    assert_eq!(rows, expected, "every offset of every partition once");
    assert_eq!(load.sent, 24_000);

    // What is exported may go.
    until(&broker, TOPIC, "retention to go on", |s| check_hold(&broker, s).iter().all(|start| *start > 0))
        .unwrap();
}
