//! Exactly once, against the real engine: proxies that break inserts, kill -9 of the engine, crashes of the export.

mod support;

use std::time::Duration;

use flumen_sink::status::State;
use serde::Deserialize;
use support::{Engine, Fault, MemoryLog, MemoryTopic, Proxy, Random, Running, config, until_settled};

/// Every so many records one is malformed, on purpose.
const MALFORMED_EVERY: i64 = 997;

fn value(id: i64) -> Option<String> {
    Some(if id % MALFORMED_EVERY == 5 {
        format!("{{\"id\":{id},\"qty\":\"many\"}}")
    } else {
        format!("{{\"id\":{id},\"qty\":{},\"name\":\"item {}\"}}", id % 17, id % 50_000)
    })
}

fn produce(topic: &MemoryTopic, partitions: usize, first: i64, count: i64, batch: i64) {
    let ids: Vec<i64> = (first..first + count).collect();
    for (at, ids) in ids.chunks(batch as usize).enumerate() {
        let values: Vec<Option<String>> = ids.iter().map(|id| value(*id)).collect();
        topic.produce(at % partitions, &values);
    }
}

fn is_malformed(id: i64) -> bool {
    id % MALFORMED_EVERY == 5
}

const TABLE: &[(&str, &str)] = &[
    ("auto.create", "true"),
    ("columns", "id Int64, qty Int32, name String"),
    // Three parts per insert, so that a crash can leave some of them.
    ("partition.by", "id % 3"),
    ("audit.interval.ms", "0"),
    ("flush.rows", "2000"),
    ("target.lag.ms", "100"),
    ("max.inserts.per.second", "100"),
    ("insert.timeout.ms", "3000"),
];

#[derive(Debug, PartialEq, Deserialize)]
struct Totals {
    rows: u64,
    places: u64,
    ids: u64,
    sum: i64,
}

async fn check(engine: &Engine, topic: &MemoryTopic, table: &str, ids: i64) {
    let totals: Vec<Totals> = engine
        .client()
        .rows(&format!(
            "SELECT count() AS rows, uniqExact(_partition, _offset) AS places, uniqExact(id) AS ids, sum(id) AS sum \
             FROM {table}"
        ))
        .await
        .expect("the table can be read");
    let good: Vec<i64> = (0..ids).filter(|id| !is_malformed(*id)).collect();
    let rows = good.len() as u64;
    assert_eq!(totals, [Totals { rows, places: rows, ids: rows, sum: good.iter().sum() }]);
    let mut dead: Vec<String> = topic
        .dead_letters()
        .iter()
        .map(|letter| String::from_utf8(letter.value.clone().expect("a value").to_vec()).expect("text"))
        .collect();
    dead.sort();
    let mut expected: Vec<String> = (0..ids).filter(|id| is_malformed(*id)).filter_map(value).collect();
    expected.sort();
    assert_eq!(dead, expected);
}

fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

#[test]
fn proxy_faults_neither_lose_nor_double() {
    run(async {
        const IDS: i64 = 120_000;
        let engine = Engine::start();
        let proxy = Proxy::start(engine.port, 0x5eed_1234_abcd, Duration::from_secs(4)).await;
        let faults = [
            Fault::None,
            Fault::None,
            Fault::None,
            Fault::DropBefore,
            Fault::DropAfter,
            Fault::Refuse500,
            Fault::Commit502,
            Fault::CutBody,
            Fault::Twice,
            Fault::CutAnswer,
        ];
        proxy.set_faults(&faults);
        let topic = MemoryTopic::new(4);
        let log = MemoryLog::default();
        let export = Running::start(&topic, &log, &config("faults", TABLE), &proxy.url());
        produce(&topic, 4, 0, IDS, 500);
        until_settled(&export, &topic).await;
        export.stop().await;
        for fault in faults {
            eprintln!("{fault:?}: {}", proxy.happened(fault));
            assert!(proxy.happened(fault) > 0, "{fault:?} did not happen");
        }
        check(&engine, &topic, "faults", IDS).await;
    });
}

#[test]
fn late_commits_are_recognised() {
    run(async {
        const IDS: i64 = 20_000;
        let engine = Engine::start();
        let proxy = Proxy::start(engine.port, 77, Duration::from_millis(1500)).await;
        proxy.set_faults(&[Fault::Late, Fault::None, Fault::Late]);
        let topic = MemoryTopic::new(2);
        let log = MemoryLog::default();
        let mut pairs = TABLE.to_vec();
        pairs.push(("insert.timeout.ms", "300"));
        let export = Running::start(&topic, &log, &config("late", &pairs), &proxy.url());
        produce(&topic, 2, 0, IDS, 500);
        until_settled(&export, &topic).await;
        // The last of the late copies may still be on its way.
        while proxy.answered(Fault::Late) < proxy.happened(Fault::Late) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        export.stop().await;
        assert!(proxy.happened(Fault::Late) > 3);
        check(&engine, &topic, "late", IDS).await;
    });
}

#[test]
fn crashes_of_both_sides_neither_lose_nor_double() {
    run(async {
        const IDS: i64 = 150_000;
        let mut engine = Engine::start();
        let proxy = Proxy::start(engine.port, 4242, Duration::ZERO).await;
        proxy.set_faults(&[Fault::None, Fault::None, Fault::None, Fault::None, Fault::DropAfter]);
        let topic = MemoryTopic::new(5);
        let log = MemoryLog::default();
        let config = config("crashes", TABLE);
        let mut random = Random(0xdead_beef_0001);
        let mut export = Running::start(&topic, &log, &config, &proxy.url());
        let (mut produced, mut kills, mut crashes) = (0, 0, 0);
        while produced < IDS || !topic.all_settled() {
            if produced < IDS {
                produce(&topic, 5, produced, 5000, 250);
                produced += 5000;
            }
            let pause = Duration::from_millis(20 + random.below(400));
            tokio::time::sleep(pause).await;
            match random.below(3) {
                0 if kills < 25 => {
                    engine.kill();
                    kills += 1;
                    if random.below(2) == 0 {
                        tokio::time::sleep(Duration::from_millis(random.below(200))).await;
                    }
                    engine.run();
                }
                1 if crashes < 40 => {
                    export.crash().await;
                    crashes += 1;
                    export = Running::start(&topic, &log, &config, &proxy.url());
                }
                _ => {}
            }
            let status = export.handle.status();
            assert!(status.state != State::Failed, "the export failed: {:?}", status.last_error);
        }
        until_settled(&export, &topic).await;
        let status = export.handle.status();
        export.stop().await;
        eprintln!("{kills} kills, {crashes} crashes, last error {:?}", status.last_error);
        assert!(kills > 5 && crashes > 5);
        check(&engine, &topic, "crashes", produced).await;
    });
}
