//! What partitions cost that nobody uses: little memory each, and no open file.
//!
//! 2,000 of them in `make test`, 10,000 in `make test-full` (`PARTITIONS` chooses another number), against one bound per
//! partition: 64 MiB above an empty broker for 10,000.

use flumen_tests::flumen::Flumen;
use serde_json::json;

const BYTES_EACH: u64 = (64 << 20) / 10_000;

/// What the allocator keeps of a start, however few partitions there are.
const START_BYTES: u64 = 10 << 20;

fn bound(count: u64) -> u64 {
    if count >= 10_000 { count * BYTES_EACH } else { count * BYTES_EACH + START_BYTES }
}

/// What the process itself has open, beside segments: rings, sockets, the lock. Segments of all partitions are cached in a
/// bounded number per shard; partitions without records have none.
const FILES_MORE_MAX: usize = 40;

fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn partitions() -> u64 {
    let full = std::env::var_os("FLUMEN_TEST_FULL").is_some();
    let chosen = std::env::var("PARTITIONS").ok().and_then(|text| text.parse().ok());
    chosen.unwrap_or(if full { 10_000 } else { 2_000 })
}

#[test]
fn idle_partitions_cost_little_memory_and_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut broker = Flumen::start_with(dir.path(), &[], &["--shards", "1"], Vec::new()).unwrap();
    let count = partitions();
    // The first of anything costs what the rest does not.
    broker.create_topic("first", 8, &json!({})).unwrap();
    let pid = broker.pid().unwrap();
    let (before, files) = (resident_bytes(pid), open_files(pid));
    let check = |when: &str, pid: u32, before: u64| {
        let grown = resident_bytes(pid).saturating_sub(before);
        let more = open_files(pid).saturating_sub(files);
        println!(
            "   {when}: {count} idle partitions take {} KiB, {} bytes each; {more} more files",
            grown >> 10,
            grown / count
        );
        assert!(grown <= bound(count), "{when}: {grown} bytes for {count} partitions");
        assert!(more <= FILES_MORE_MAX, "{when}: {more} more files are open");
    };
    for topic in 0..count.div_ceil(500) {
        let some = (count - topic * 500).min(500);
        broker.create_topic(&format!("t{topic}"), i32::try_from(some).unwrap(), &json!({})).unwrap();
    }
    check("created", pid, before);
    // Recovered ones are compared with a broker that lived the same life without them.
    let empty_dir = tempfile::tempdir().unwrap();
    let mut empty = Flumen::start_with(empty_dir.path(), &[], &["--shards", "1"], Vec::new()).unwrap();
    for broker in [&mut broker, &mut empty] {
        broker.kill_9();
        broker.restart().unwrap();
    }
    check("after kill -9", broker.pid().unwrap(), resident_bytes(empty.pid().unwrap()));
    for broker in [&mut broker, &mut empty] {
        assert!(broker.stop().unwrap().success());
        broker.restart().unwrap();
    }
    check("after a clean stop", broker.pid().unwrap(), resident_bytes(empty.pid().unwrap()));
}
