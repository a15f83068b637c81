//! An export to ClickHouse of a cluster of three real processes, whose leaders and whose exporting node are killed while
//! records come: at the end the table has each record once, and what is no row is a dead letter.

use std::collections::BTreeMap;

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::cluster::Cluster;
use flumen_tests::export::check_table;
use flumen_tests::kafka::{Sender, ends_of};
use flumen_tests::process::free_port;
use serde_json::{Value, json};

const TOPIC: &str = "clicks";
const PARTITIONS: i32 = 3;
/// One record in so many is no row.
const MALFORMED_EVERY: u64 = 100;
const RECORDS_PER_ROUND: u64 = 3_000;

fn send(sender: &mut Sender, from: u64) -> u64 {
    let to = from + RECORDS_PER_ROUND;
    for id in from..to {
        let value =
            if id % MALFORMED_EVERY == 0 { "no JSON".to_string() } else { json!({ "id": id }).to_string() };
        sender.send(TOPIC, &id.to_string(), value.as_bytes(), id).unwrap();
    }
    to
}

/// Position of the node on which the exports run.
fn exporting(cluster: &Cluster) -> usize {
    cluster.leader_of("__flumen_exports", 0).unwrap()
}

#[test]
fn the_table_is_exact_whoever_dies() {
    exports_exactly(3);
}

/// The node that exports reads partitions that only other nodes have.
#[test]
fn partitions_without_a_replica_on_the_exporting_node_are_exported_too() {
    exports_exactly(1);
}

fn exports_exactly(replication_factor: i16) {
    let dir = tempfile::tempdir().unwrap();
    let clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let url = format!("clickhouse.url={}", clickhouse.url);
    let mut cluster = Cluster::start(dir.path(), 3, &[&url, "default.replication.factor=3"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, replication_factor, &json!({})).unwrap();
    let export =
        json!({ "auto_create": true, "columns": "id UInt64", "target_lag_ms": 50, "flush_rows": 500 });
    cluster.any().unwrap().call("PUT", &format!("/v1/exports/{TOPIC}"), Some(&export)).unwrap();

    let mut sender = Sender::new(&cluster.kafka(), &[("socket.timeout.ms", "4000")]).unwrap();
    let rows = || clickhouse.number(&format!("SELECT count() FROM {TOPIC}")).unwrap_or(0);
    let mut sent = send(&mut sender, 0);
    sender.flush().unwrap();
    cluster.until("the first rows", || (rows() > 0).then_some(())).unwrap();
    for round in 0..3 {
        let before = rows();
        sent = send(&mut sender, sent);
        // In turn: who exports, and who leads a partition.
        let victim = if round == 1 { cluster.leader_of(TOPIC, 0).unwrap() } else { exporting(&cluster) };
        cluster.nodes[victim].kill_9();
        sent = send(&mut sender, sent);
        if replication_factor == 1 {
            // Nobody else has what lies there.
            cluster.nodes[victim].restart().unwrap();
        }
        sender.flush().unwrap();
        cluster.until("rows after the death of a node", || (rows() > before).then_some(())).unwrap();
        println!("round {round}: node {} killed, {sent} sent, {} rows", victim + 1, rows());
        if replication_factor > 1 {
            cluster.nodes[victim].restart().unwrap();
        }
    }
    let reports = sender.reports();
    assert_eq!((reports.places.len() as u64, reports.failed.len()), (sent, 0));

    let expected = sent - sent.div_ceil(MALFORMED_EVERY);
    cluster.until("all rows", || (rows() as u64 >= expected).then_some(())).unwrap();
    let dead = || ends_of(&cluster.kafka(), &format!("{TOPIC}.dlq"), 1).unwrap_or_default();
    cluster
        .until("all dead letters", || {
            (dead().iter().sum::<i64>() as u64 >= sent.div_ceil(MALFORMED_EVERY)).then_some(())
        })
        .unwrap();
    let rows: BTreeMap<(i32, i64), u64> = reports
        .places
        .iter()
        .filter(|(_, id)| **id % MALFORMED_EVERY != 0)
        .map(|(p, id)| (*p, *id))
        .collect();
    check_table(&clickhouse, TOPIC, &rows).unwrap();
    assert_eq!(dead().iter().sum::<i64>() as u64, sent.div_ceil(MALFORMED_EVERY), "dead letters");
    let status: Value =
        cluster.nodes[exporting(&cluster)].get(&format!("/v1/exports/{TOPIC}/status")).unwrap();
    assert_eq!(status["state"], "running", "{status}");
}
