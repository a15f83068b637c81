//! A node of three whose disk is full: what it leads others lead, producers go on, it gets nothing back while it has no room, and
//! all of it is as before when it has.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use flumen_tests::cluster::Cluster;
use flumen_tests::load::Load;
use flumen_tests::mount::Mount;
use flumen_tests::witness::Witness;
use serde_json::{Value, json};

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 6;
const SINGLE: &str = "single";
/// Made while the disk is full.
const SPARED: &str = "spared";
const DISK_MIB: u64 = 512;

/// Takes everything, to the last byte.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    for size in [1 << 20, 4096] {
        while file.write_all(&vec![0x5a; size]).is_ok() {}
    }
}

#[test]
fn a_node_with_a_full_disk_gives_up_what_it_leads() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Mount::ext4(dir.path(), DISK_MIB) else { return };
    std::os::unix::fs::symlink(&disk.path, dir.path().join("n1")).unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &["group.initial.rebalance.delay.ms=0"]).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    cluster.create_topic(SINGLE, 3, 1, &json!({})).unwrap();
    let kafka = cluster.kafka();
    let mut load = Load::start_at(&kafka, TOPIC, false, Duration::from_millis(1)).unwrap();
    let mut witnesses = vec![Witness::start(&kafka, TOPIC, "watchers").unwrap()];
    cluster.progress(&load, "three nodes").unwrap();
    // Node 1 leads the metadata, too.
    let controller =
        || -> Option<i64> { cluster.nodes[1].get("/v1/cluster").ok()?["controller_id"].as_i64() };
    for id in ["2", "3"] {
        let set = cluster.nodes[0].cli(&["cluster", "maintenance", id]).unwrap();
        assert!(set.success, "{}", set.stderr);
    }
    cluster.until("node 1 to lead the metadata", || (controller()? == 1).then_some(())).unwrap();
    cluster
        .until("node 1 to lead everything", || {
            cluster.leaders(TOPIC).ok()?.iter().all(|id| *id == 1).then_some(())
        })
        .unwrap();
    for id in ["2", "3"] {
        let set = cluster.nodes[0].cli(&["cluster", "maintenance", id, "--off"]).unwrap();
        assert!(set.success, "{}", set.stderr);
    }

    fill(&disk.path.join("filler"));
    let began = Instant::now();
    cluster.progress(&load, "a full disk").unwrap();
    cluster
        .until("node 1 to lead nothing of it", || {
            cluster.leaders(TOPIC).ok()?.iter().all(|id| [2, 3].contains(id)).then_some(())
        })
        .unwrap();
    println!("others lead after {:.1?}", began.elapsed());
    cluster
        .until("another node to lead the metadata", || {
            controller().filter(|id| [2, 3].contains(id)).map(drop)
        })
        .unwrap();
    cluster.progress(&load, "others lead").unwrap();
    let health = cluster.nodes[1].cli(&["cluster", "health"]).unwrap();
    assert!(health.stdout.contains("error[DISK_FULL] broker 1"), "{}", health.stdout);
    // What only it has it still leads, and can be read there.
    assert!(cluster.leaders(SINGLE).unwrap().contains(&1));

    // New topics and partitions go elsewhere, as far as there is an elsewhere.
    cluster.create_topic(SPARED, 3, 2, &json!({})).unwrap();
    let grown = cluster.nodes[1].cli(&["topic", "alter", SPARED, "--partitions", "6"]).unwrap();
    assert!(grown.success, "{}", grown.stderr);
    let described = cluster.nodes[1].get(&format!("/v1/topics/{SPARED}")).unwrap();
    let placed: Vec<&Value> =
        described["partition_list"].as_array().unwrap().iter().map(|p| &p["replicas"]).collect();
    let on_1 = |replicas: &&&Value| replicas.as_array().unwrap().contains(&json!(1));
    assert!(placed.len() == 6 && placed.iter().filter(on_1).count() == 0, "{placed:?}");

    // A node dies meanwhile: whoever leads after that is again not the full one, as long as there is another.
    let moved = cluster.leaders(TOPIC).unwrap();
    assert!(moved.contains(&2) && moved.contains(&3), "{moved:?}");
    cluster.nodes[1].kill_9();
    cluster
        .until("node 3 to lead everything", || {
            cluster.leaders(TOPIC).ok()?.iter().all(|id| *id == 3).then_some(())
        })
        .unwrap();
    cluster.nodes[1].restart().unwrap();
    cluster.progress(&load, "node 2 is back").unwrap();
    // The balancer has had its turn by then.
    std::thread::sleep(Duration::from_secs(35));
    let leaders = cluster.leaders(TOPIC).unwrap();
    assert!(leaders.iter().all(|id| *id != 1), "{leaders:?}");

    std::fs::remove_file(disk.path.join("filler")).unwrap();
    cluster
        .until("node 1 to lead again", || cluster.leaders(TOPIC).ok()?.contains(&1).then_some(()))
        .unwrap();
    cluster.progress(&load, "there is room again").unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut witnesses).unwrap();
}
