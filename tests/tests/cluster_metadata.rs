//! The metadata of nodes that were away for longer than the others keep its log, or that come new: they take it from another
//! node and go on from there.

use std::path::PathBuf;

use flumen_tests::cluster::Cluster;
use flumen_tests::flumen::Flumen;
use flumen_tests::group_configs::{set_all, value_of};
use flumen_tests::wire::Wire;
use serde_json::json;

const GROUPS: usize = 500;

/// Through any node.
fn wire_of(node: &Flumen) -> Wire {
    Wire::connect(&node.kafka).unwrap()
}

/// The oldest file that a node still has of its metadata log.
fn oldest_segment(node: &Flumen) -> Option<PathBuf> {
    let log = node.data_dir.join("data/log/__cluster_metadata-0.g0");
    let files = std::fs::read_dir(log).unwrap().map(|e| e.unwrap().path());
    files.filter(|p| p.extension().is_some_and(|e| e == "log")).min()
}

fn took_it_from_another(node: &Flumen) -> bool {
    let log = node.log();
    log.contains("metadata taken from another node")
}

#[test]
fn who_comes_late_takes_the_metadata_from_another_node() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic("before", 3, 3, &json!({})).unwrap();
    cluster.stop_all().unwrap();
    // Small rings and segments, so that the log is cut after some thousand commands.
    for node in &mut cluster.nodes {
        node.environment = vec![("FLUMEN_SMALL", "1".to_string())];
    }
    cluster.restart_all().unwrap();
    cluster.nodes[2].kill_9();
    cluster.create_topic("deleted", 3, 2, &json!({})).unwrap();
    let mut value = 45_000;
    let first = loop {
        value += 1;
        set_all(&mut wire_of(&cluster.nodes[value as usize % 2]), GROUPS, value);
        if let Some(first) = oldest_segment(&cluster.nodes[0]) {
            break first;
        }
    };
    cluster.nodes[0].call("DELETE", "/v1/topics/before", None).unwrap();
    cluster.create_topic("after", 3, 2, &json!({})).unwrap();
    while [0, 1].iter().any(|at| oldest_segment(&cluster.nodes[*at]).as_ref() == Some(&first)) {
        value += 1;
        set_all(&mut wire_of(&cluster.nodes[value as usize % 2]), GROUPS, value);
    }

    cluster.nodes[2].restart().unwrap();
    let added = cluster.add().unwrap();
    let check = |cluster: &Cluster| {
        for node in &cluster.nodes {
            assert_eq!(value_of(&mut wire_of(node), GROUPS - 1), value.to_string());
            assert!(node.get("/v1/topics/before").is_err() && node.get("/v1/topics/after").is_ok());
        }
    };
    check(&cluster);
    assert!(took_it_from_another(&cluster.nodes[2]) && took_it_from_another(&cluster.nodes[added]));
    let left = std::fs::read_dir(cluster.nodes[2].data_dir.join("data/log")).unwrap();
    let names: Vec<String> = left.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(
        !names.iter().any(|name| name.starts_with("before-")),
        "the topic was deleted meanwhile: {names:?}"
    );

    cluster.kill_all();
    cluster.restart_all().unwrap();
    check(&cluster);
    cluster.create_topic("last", 3, 3, &json!({})).unwrap();
}
