//! What operators see of the cluster: the admin API and `flumen cluster`, of a broker that is well and of one that is not.

use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::Sender;
use flumen_tests::segment_file;
use serde_json::{Value, json};

const UNHEALTHY: i32 = 10;

fn produce(broker: &Flumen, topic: &str, records: u64) {
    let mut sender = Sender::new(&broker.kafka, &[("batch.num.messages", "50")]).unwrap();
    for id in 0..records {
        sender.send(topic, &format!("k{id}"), format!("{id:0>200}").as_bytes(), id).unwrap();
    }
    sender.flush().unwrap();
}

#[test]
fn a_healthy_cluster_describes_itself() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Flumen::start(dir.path(), &["broker.rack=r1"]).unwrap();
    broker.create_topic("orders", 3, &json!({})).unwrap();
    produce(&broker, "orders", 500);

    let cluster = broker.get("/v1/cluster").unwrap();
    assert_eq!(
        (&cluster["brokers"], &cluster["topics"], &cluster["controller_id"]),
        (&json!(1), &json!(1), &json!(1))
    );
    assert_eq!(cluster["cluster_id"].as_str().unwrap().len(), 22);
    assert!(cluster["partitions"].as_u64().unwrap() >= 3);

    for path in ["/v1/cluster/health", "/v1/cluster/health_overview"] {
        let health = broker.get(path).unwrap();
        assert_eq!((&health["is_healthy"], &health["problems"]), (&json!(true), &json!([])), "{health}");
        assert_eq!((&health["all_nodes"], &health["nodes_down"]), (&json!([1]), &json!([])));
    }

    let brokers = broker.get("/v1/brokers").unwrap();
    assert_eq!((brokers.as_array().unwrap().len(), &brokers[0]["rack"]), (1, &json!("r1")));
    assert!(brokers[0]["disk_free_bytes"].as_u64().unwrap() > 0);
    assert_eq!(broker.get("/v1/brokers/1").unwrap()["node_id"], json!(1));
    let missing = broker.get("/v1/brokers/7").unwrap_err().to_string();
    assert!(missing.contains("404") && missing.contains("there is no broker 7"), "{missing}");

    let partitions = broker.get("/v1/cluster/partitions?topic=orders").unwrap();
    let partitions = partitions["partitions"].as_array().unwrap();
    assert_eq!(partitions.len(), 3);
    let ends: i64 = partitions.iter().map(|p| p["high_watermark"].as_i64().unwrap()).sum();
    assert_eq!(ends, 500);
    assert!(
        partitions
            .iter()
            .all(|p| p["leader"] == 1 && p["in_sync_replicas"] == json!([1]) && p["health"] == "ok")
    );
    let unknown = broker.get("/v1/cluster/partitions?topic=nope").unwrap_err().to_string();
    assert!(unknown.contains("404"), "{unknown}");

    let info = broker.cli(&["cluster", "info"]).unwrap();
    assert!(info.success && info.stdout.contains(cluster["cluster_id"].as_str().unwrap()), "{}", info.stdout);
    let health = broker.cli(&["cluster", "health"]).unwrap();
    assert_eq!(health.code, Some(0), "{}{}", health.stdout, health.stderr);
    assert!(health.stdout.starts_with("HEALTHY     yes\n"), "{}", health.stdout);
    let brokers = broker.cli(&["cluster", "brokers"]).unwrap();
    let line = brokers.stdout.lines().nth(1).unwrap().to_string();
    assert!(line.starts_with("1 ") && line.contains(&broker.kafka) && line.contains(" active "), "{line}");
    let listed = broker.cli(&["cluster", "partitions", "orders"]).unwrap();
    assert_eq!(listed.stdout.lines().filter(|l| l.starts_with("orders ") && l.ends_with(" ok")).count(), 3);
    let none = broker.cli(&["cluster", "partitions", "--unhealthy"]).unwrap();
    assert_eq!(none.stdout.lines().count(), 1, "{}", none.stdout);
    let unknown = broker.cli(&["cluster", "partitions", "nope"]).unwrap();
    assert_eq!(unknown.code, Some(3), "{}", unknown.stderr);
    let json = broker.cli(&["cluster", "health", "--format", "json"]).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&json.stdout).unwrap()["is_healthy"], json!(true));
}

#[test]
fn damage_makes_it_unhealthy_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut broker = Flumen::start(dir.path(), &[]).unwrap();
    broker.create_topic("orders", 1, &json!({})).unwrap();
    broker.create_topic("other", 1, &json!({})).unwrap();
    produce(&broker, "orders", 2_000);
    produce(&broker, "other", 10);
    assert!(broker.stop().unwrap().success());
    segment_file::cut_in_half(&segment_file::first_of(&data, "orders-0"));
    broker.restart().unwrap();
    assert_eq!(broker.end_offsets("other").unwrap(), [10]);

    let health = broker.get("/v1/cluster/health").unwrap();
    assert_eq!(health["is_healthy"], json!(false), "{health}");
    assert_eq!(health["unhealthy_reasons"], json!(["PARTITION_DAMAGED"]));
    assert_eq!(health["leaderless_partitions"], json!(["orders/0"]));
    let told = broker.cli(&["cluster", "health"]).unwrap();
    assert_eq!(told.code, Some(UNHEALTHY), "{}{}", told.stdout, told.stderr);
    assert!(told.stderr.contains("not healthy: PARTITION_DAMAGED"), "{}", told.stderr);
    let verify = format!("flumen debug log verify {}", data.display());
    for sentence in ["error[PARTITION_DAMAGED] broker 1: orders-0", "refuses to serve", &verify] {
        assert!(told.stdout.contains(sentence), "'{sentence}' is not in {}", told.stdout);
    }
    let unhealthy = broker.cli(&["cluster", "partitions", "--unhealthy"]).unwrap();
    let lines: Vec<&str> = unhealthy.stdout.lines().skip(1).collect();
    assert!(
        lines.len() == 1 && lines[0].starts_with("orders ") && lines[0].ends_with("damaged"),
        "{lines:?}"
    );

    // One way out that it names.
    broker.call("DELETE", "/v1/topics/orders", None).unwrap();
    assert_eq!(broker.cli(&["cluster", "health"]).unwrap().code, Some(0));
}
