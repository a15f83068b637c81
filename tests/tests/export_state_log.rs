//! The exports' state log is cut below the last snapshots: a busy export does not make it grow for ever, one that is idle
//! or turned off does not keep it from being cut, and none forgets where it was, whenever the broker dies.

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::export::{until, until_settled};
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::Sender;
use flumen_tests::process::free_port;
use serde_json::{Value, json};

const STATE_TOPIC: &str = "__flumen_exports";

/// Looks at a state log that grows no more, of 20 ms each: far more than the manager needs to look often enough.
const LOOKS_AFTER_MAX: u32 = 6_000;

fn state_log(broker: &Flumen) -> (i64, i64) {
    let described = broker.get(&format!("/v1/topics/{STATE_TOPIC}")).unwrap_or(Value::Null);
    let partition = &described["partition_list"][0];
    (partition["log_start_offset"].as_i64().unwrap_or(0), partition["high_watermark"].as_i64().unwrap_or(0))
}

#[test]
fn the_state_log_is_cut_and_nothing_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let url = format!("clickhouse.url={}", clickhouse.url);
    let mut broker = Flumen::start(dir.path(), &[&url]).unwrap();
    let kafka = broker.kafka.clone();
    let send = |topic: &str, count: u64| {
        let mut sender = Sender::new(&kafka, &[]).unwrap();
        for id in 0..count {
            sender.send(topic, "k", json!({ "id": id }).to_string().as_bytes(), id).unwrap();
        }
        sender.flush().unwrap();
    };
    let export = json!({
        "auto_create": true, "columns": "id UInt64", "target_lag_ms": 20, "audit_interval_ms": 0,
        // One row per insert: two state records per row.
        "flush_rows": 1, "max_inserts_per_second": 100,
    });
    for topic in ["busy", "idle", "off", "gone"] {
        broker.create_topic(topic, 1, &json!({})).unwrap();
        broker.call("PUT", &format!("/v1/exports/{topic}"), Some(&export)).unwrap();
        send(topic, 3);
        until_settled(&broker, topic).unwrap();
    }
    broker
        .call("PATCH", "/v1/topics/off", Some(&json!({ "configs": { "flumen.clickhouse.enable": null } })))
        .unwrap();
    broker.call("DELETE", "/v1/topics/gone", None).unwrap();

    send("busy", 2_300);
    let (mut kills, mut start, mut looks, mut looks_after) = (0, 0, 0u32, 0u32);
    let rows = |s: &Value| s["rows_total"].as_u64().unwrap_or(0);
    loop {
        let (now, end) = state_log(&broker);
        looks += 1;
        if looks.is_multiple_of(200) {
            println!("   state log {now} to {end}");
        }
        // Right at a cut, and in the middle of the way to one.
        if now > start || (kills == 0 && end > 1_500) {
            start = now;
            kills += 1;
            println!("   state log {now} to {end}: kill {kills}");
            broker.kill_9();
            broker.restart().unwrap();
            let at_least = now / 2;
            until(&broker, "busy", "it to go on", |s| rows(s) as i64 >= at_least && s["state"] == "running")
                .unwrap();
        }
        let status = broker.get("/v1/exports/busy/status").unwrap();
        // A status from before the records were noticed says that nothing lags.
        if rows(&status) >= 2_303 && status["lag_records"] == 0 && status["state"] == "running" {
            // A cut takes two of the manager's looks, seconds apart: the one asks for snapshots, the next finds them.
            if kills >= 2 {
                break;
            }
            looks_after += 1;
            assert!(looks_after < LOOKS_AFTER_MAX, "{end} records, all exported, and none was dropped");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    until_settled(&broker, "busy").unwrap();
    let (start, end) = state_log(&broker);
    assert!(start > 0, "{end} records and none was dropped");
    assert!(kills >= 2, "{kills} kills");

    // Every export goes on where it was, from what is left of the log.
    assert!(broker.stop().unwrap().success());
    broker.restart().unwrap();
    broker
        .call("PATCH", "/v1/topics/off", Some(&json!({ "configs": { "flumen.clickhouse.enable": "true" } })))
        .unwrap();
    for topic in ["busy", "idle", "off"] {
        send(topic, 4);
        until_settled(&broker, topic).unwrap();
        let sql = format!("SELECT count(), uniqExact(_offset), max(_offset) + 1 FROM {topic}");
        let n = if topic == "busy" { 2_307 } else { 7 };
        assert_eq!(clickhouse.query(&sql).unwrap().trim(), format!("{n}\t{n}\t{n}"), "{topic}");
    }
    println!("   state log {start} to {end}, {kills} kills");
}
