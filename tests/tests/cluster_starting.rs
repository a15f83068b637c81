//! A node that does not serve yet says what it waits for: at its own admin port, to its own command line, and to those who ask the
//! others.

use flumen_tests::cluster::{Cluster, METADATA_TOPIC};
use flumen_tests::flumen::{Flumen, http};
use flumen_tests::segment_file;
use serde_json::{Value, json};

/// What an admin port answers; none while nobody listens.
fn ask(node: &Flumen, path: &str) -> Option<(u16, Value)> {
    let (status, text) = http("GET", &format!("http://{}{path}", node.admin), None).ok()?;
    Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
}

/// Everything that a node says of itself while it waits for this.
fn check_waits(cluster: &Cluster, node: &Flumen, what: &str) {
    let said = || {
        let (status, said) = ask(node, "/v1/cluster/health")?;
        let says = |key: &str| said[key].as_str().unwrap_or_default();
        let is_it = says("detail").contains(what) && !says("fix").is_empty() && said["code"] == "NOT_SERVING";
        (status == 503 && is_it).then_some(())
    };
    cluster.until(&format!("the node to say: {what}"), said).unwrap();
    for path in ["/v1/topics", "/v1/cluster", "/v1/brokers", "/v1/exports", "/v1/cluster/partitions"] {
        let (status, said) = ask(node, path).unwrap();
        assert_eq!((status, &said["code"]), (503, &json!("NOT_SERVING")), "{path}: {said}");
    }
    let (status, said) = ask(node, "/v1/status/ready").unwrap();
    assert_eq!((status, &said["status"]), (503, &json!("starting")));
    assert!(said["waits_for"].as_str().unwrap().contains(what), "{said}");
    assert_eq!(ask(node, "/v1/status/live").unwrap().0, 200);
    assert_eq!(ask(node, "/version").unwrap().0, 200);
    let (status, metrics) = ask(node, "/metrics").unwrap();
    assert_eq!(status, 200);
    assert!(metrics.as_str().unwrap().contains("\nflumen_application_ready 0\n"), "{metrics}");
    for (arguments, code) in
        [(&["cluster", "health"][..], 10), (&["topic", "list"], 1), (&["cluster", "info"], 1)]
    {
        let told = node.cli(arguments).unwrap();
        assert_eq!(told.code, Some(code), "{arguments:?}: {}", told.stderr);
        assert!(told.stderr.contains(what) && told.stderr.contains("fix: "), "{}", told.stderr);
    }
    let told = node.cli(&["cluster", "health", "--format", "json"]).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&told.stdout).unwrap()["code"], json!("NOT_SERVING"));
}

#[test]
fn a_node_without_a_cluster_says_whom_it_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.kill_all();
    for node in &cluster.nodes {
        std::fs::remove_dir_all(node.data_dir.join("data")).unwrap();
    }
    // One that is to found a cluster, and one that is to join it.
    let mut joins = cluster.stranger(4, &[]);
    joins.begin().unwrap();
    check_waits(&cluster, &joins, "no seed of");
    cluster.nodes[0].begin().unwrap();
    let seeds: Vec<&str> = cluster.seeds.split(',').collect();
    let missing = format!("the seeds {}, {} do not answer yet", seeds[1], seeds[2]);
    check_waits(&cluster, &cluster.nodes[0], &missing);
    cluster.nodes[0].kill_9();
    cluster.restart_all().unwrap();
    for node in cluster.nodes.iter().chain([&joins]) {
        let ready =
            || ask(node, "/v1/status/ready").filter(|(status, _)| *status == 200).map(|(_, said)| said);
        let said = cluster.until("it to be ready", ready).unwrap();
        assert_eq!((&said["status"], &said["waits_for"]), (&json!("ready"), &Value::Null));
        let (_, metrics) = ask(node, "/metrics").unwrap();
        assert!(metrics.as_str().unwrap().contains("\nflumen_application_ready 1\n"));
    }
}

#[test]
fn a_node_that_waits_for_its_metadata_log_is_named_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    for number in 0..20 {
        cluster.create_topic(&format!("topic-{number}"), 1, 3, &json!({})).unwrap();
    }
    assert!(cluster.nodes[1].stop().unwrap().success());
    let data = cluster.nodes[1].data_dir.join("data");
    segment_file::cut_in_half(&segment_file::first_of(&data, &format!("{METADATA_TOPIC}-0")));
    cluster.nodes[2].kill_9();
    cluster.nodes[1].begin().unwrap();
    check_waits(&cluster, &cluster.nodes[1], "its metadata log is damaged");

    let named = || {
        let (_, health) = ask(&cluster.nodes[0], "/v1/cluster/health")?;
        (health["nodes_not_serving"] == json!([2])).then_some(health)
    };
    let health = cluster.until("the other to name it", named).unwrap();
    assert_eq!(health["nodes_down"], json!([3]), "{health}");
    let told = cluster.nodes[0].cli(&["cluster", "health"]).unwrap();
    assert_eq!(told.code, Some(10));
    assert!(told.stdout.contains("error[NODE_NOT_SERVING] broker 2"), "{}", told.stdout);
    assert!(told.stdout.contains("its metadata log is damaged"), "{}", told.stdout);

    cluster.nodes[2].restart().unwrap();
    let healthy =
        || (0..3).all(|at| cluster.nodes[at].cli(&["cluster", "health"]).is_ok_and(|told| told.success));
    cluster.until("all to be well", || healthy().then_some(())).unwrap();
}
