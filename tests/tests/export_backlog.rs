//! A backlog goes out in large blocks and is read once, whatever batches producers made of it.

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::export::until_settled;
use flumen_tests::flumen::{Flumen, http};
use flumen_tests::kafka::Sender;
use flumen_tests::process::free_port;
use serde_json::json;

fn metric(broker: &Flumen, name: &str) -> f64 {
    let (_, text) = http("GET", &format!("http://{}/metrics", broker.admin), None).unwrap();
    let lines = text.lines().filter(|l| l.starts_with(name));
    lines.map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[test]
fn a_backlog_is_read_once_and_sent_in_large_blocks() {
    const RECORDS: u64 = 60_000;
    const PARTITIONS: i32 = 4;
    let dir = tempfile::tempdir().unwrap();
    let clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let url = format!("clickhouse.url={}", clickhouse.url);
    let broker = Flumen::start(dir.path(), &[&url]).unwrap();
    broker.create_topic("t", PARTITIONS, &json!({})).unwrap();
    // Some hundred small batches in every megabyte of log.
    let mut sender =
        Sender::new(&broker.kafka, &[("batch.num.messages", "20"), ("linger.ms", "20")]).unwrap();
    let mut bytes = 0.0;
    for id in 0..RECORDS {
        let value = json!({ "id": id, "note": format!("{id:0>300}") }).to_string();
        bytes += value.len() as f64;
        sender.send("t", &id.to_string(), value.as_bytes(), id).unwrap();
    }
    sender.flush().unwrap();
    let export = json!({ "auto_create": true, "columns": "id UInt64, note String" });
    broker.call("PUT", "/v1/exports/t", Some(&export)).unwrap();
    until_settled(&broker, "t").unwrap();
    let counts =
        clickhouse.query("SELECT count(), uniqExact(id), uniqExact(_partition, _offset) FROM t").unwrap();
    assert_eq!(counts.trim(), format!("{RECORDS}\t{RECORDS}\t{RECORDS}"));
    let read = metric(&broker, "flumen_export_bytes_total{export=\"t\",topic=\"t\",kind=\"records\"}");
    let inserts = metric(&broker, "flumen_export_inserts_total");
    println!("   {bytes} bytes of records, {read} read, {inserts} inserts");
    // Keys and batch headers come on top, and what a full block leaves of its last batch is read again for the next.
    assert!(read < 1.3 * bytes, "{read} bytes were read of {bytes}");
    // 16 MiB a block.
    assert!(inserts <= (read / f64::from(16 << 20)).ceil() + 2.0, "{inserts} inserts for {bytes} bytes");
}
