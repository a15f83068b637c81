//! Exactly once through the whole broker: records of a real client, a proxy that breaks inserts in every way it can,
//! kill -9 of the broker and of ClickHouse while it runs. What counts is asked of ClickHouse: every offset whose record
//! fits has one row, every other has one dead letter.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::export::{until, until_settled};
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::{Place, Sender, read_all};
use flumen_tests::process::free_port;
use flumen_tests::proxy::{Fault, Proxy, Random};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 6;
/// One record in so many does not fit the table.
const MALFORMED_EVERY: u64 = 997;

fn records() -> u64 {
    if std::env::var_os("FLUMEN_TEST_FULL").is_some() { 1_000_000 } else { 110_000 }
}

fn is_malformed(number: u64) -> bool {
    number % MALFORMED_EVERY == 3
}

fn value(number: u64) -> String {
    match (is_malformed(number), number % 3) {
        (false, _) => {
            json!({ "id": number, "qty": number % 17, "name": format!("item {}", number % 5000) }).to_string()
        }
        (true, 0) => format!("not JSON {number}"),
        (true, 1) => json!({ "id": number, "qty": 3_000_000_000u64, "name": "too many" }).to_string(),
        (true, _) => json!({ "id": number, "name": "no quantity" }).to_string(),
    }
}

#[test]
fn faults_and_kills_neither_lose_nor_double() {
    let dir = tempfile::tempdir().unwrap();
    let mut clickhouse = ClickHouse::start_own(dir.path(), free_port()).unwrap();
    let proxy = Proxy::start_on_thread(clickhouse.port(), 0x0dd_ba11_5eed, Duration::from_millis(2500));
    let faults = [
        Fault::DropBefore,
        Fault::DropAfter,
        Fault::Refuse500,
        Fault::Commit502,
        Fault::CutBody,
        Fault::Twice,
        Fault::Late,
        Fault::CutAnswer,
    ];
    let mut mix = vec![Fault::None; 20];
    mix.extend(faults);
    proxy.set_faults(&mix);

    let setting = format!("clickhouse.url=http://127.0.0.1:{}", proxy.port);
    let mut broker = Flumen::start(dir.path(), &[&setting]).unwrap();
    broker.create_topic(TOPIC, PARTITIONS, &json!({})).unwrap();
    let admission = broker
        .call(
            "PUT",
            &format!("/v1/exports/{TOPIC}"),
            Some(&json!({
                "auto_create": true, "columns": "id UInt64, qty Int32, name String",
                // Several parts per insert, so that a crash can leave some of them.
                "partition_by": "id % 3", "order_by": "id",
                "flush_rows": 1500, "target_lag_ms": 100, "max_inserts_per_second": 100,
                "insert_timeout_ms": 1500, "audit_interval_ms": 0,
            })),
        )
        .unwrap();
    assert_eq!(admission["guarantee"], "exactly_once", "{admission}");

    let total = records();
    let mut sender = Sender::new(&broker.kafka, &[]).unwrap();
    let mut random = Random(0xfeed_5eed);
    // Each kill comes when the export is in the middle of it: after so many records were sent.
    let kills = 8;
    let mut next_kill = 1;
    for number in 0..total {
        sender.send(TOPIC, &(number % 101).to_string(), value(number).as_bytes(), number).unwrap();
        if number == total * next_kill / (kills + 1) {
            let exported = until(&broker, TOPIC, "a row of the last stretch", |s| {
                s["rows_total"].as_u64().unwrap_or(0) > total * (next_kill - 1) / (kills + 1)
            })
            .unwrap();
            std::thread::sleep(Duration::from_millis(random.below(120)));
            println!("   {number} sent, {} exported: kill {next_kill}", exported["rows_total"]);
            match next_kill % 3 {
                0 => {
                    broker.kill_9();
                    clickhouse.kill_9();
                    clickhouse.restart().unwrap();
                    broker.restart().unwrap();
                }
                1 => {
                    broker.kill_9();
                    broker.restart().unwrap();
                }
                _ => {
                    clickhouse.kill_9();
                    clickhouse.restart().unwrap();
                }
            }
            next_kill += 1;
        }
    }
    sender.flush().unwrap();
    until_settled(&broker, TOPIC).unwrap();
    // Whatever is still held back arrives before the rows are counted.
    while proxy.answered(Fault::Late) < proxy.happened(Fault::Late) {
        std::thread::sleep(Duration::from_millis(20));
    }
    for fault in faults {
        println!("   {fault:?}: {}", proxy.happened(fault));
        assert!(proxy.happened(fault) > 0, "{fault:?} did not happen");
    }

    let reports = sender.reports();
    assert_eq!(
        (reports.places.len() as u64, reports.failed.len()),
        (total, 0),
        "{:?}",
        reports.failed.first()
    );
    let fits = |number: u64| !is_malformed(number);
    let expected: BTreeMap<Place, u64> =
        reports.places.iter().filter(|(_, n)| fits(**n)).map(|(p, n)| (*p, *n)).collect();
    let mut rows: BTreeMap<Place, u64> = BTreeMap::new();
    let mut doubled = 0;
    for line in clickhouse.query(&format!("SELECT _partition, _offset, id FROM {TOPIC}")).unwrap().lines() {
        let fields: Vec<i64> = line.split('\t').map(|f| f.parse().unwrap()).collect();
        doubled += usize::from(rows.insert((fields[0] as i32, fields[1]), fields[2] as u64).is_some());
    }
    let missing = expected.keys().filter(|place| !rows.contains_key(place)).count();
    println!("   rows {}, missing {missing}, duplicates {doubled}", rows.len());
    assert_eq!((missing, doubled), (0, 0));
    assert_eq!(rows, expected);

    let dead_letters = format!("{TOPIC}.dlq");
    let ends = broker.end_offsets(&dead_letters).unwrap();
    let letters = read_all(&broker.kafka, &dead_letters, &ends).unwrap();
    let malformed: BTreeMap<Place, u64> =
        reports.places.iter().filter(|(_, n)| is_malformed(**n)).map(|(p, n)| (*p, *n)).collect();
    let mut seen = BTreeSet::new();
    for letter in &letters {
        let header = |name: &str| letter.headers.get(name).unwrap_or_else(|| panic!("{name} is not there"));
        let place = (header("ch.partition").parse().unwrap(), header("ch.offset").parse().unwrap());
        assert!(seen.insert(place), "two dead letters of {place:?}");
        let number = malformed[&place];
        assert_eq!(letter.value, value(number).into_bytes(), "a dead letter is the record, whole");
        assert_eq!(header("ch.topic"), TOPIC);
        let (code, column) =
            (header("ch.error.code").as_str(), letter.headers.get("ch.column").map(String::as_str));
        let why = match number % 3 {
            0 => ("NOT_JSON", None),
            1 => ("OUT_OF_RANGE", Some("qty")),
            _ => ("MISSING_FIELD", Some("qty")),
        };
        assert_eq!((code, column), why);
    }
    assert_eq!(seen.len(), malformed.len(), "dead letters as many as malformed records");
    println!("   dead letters {}, malformed {}", seen.len(), malformed.len());
    let status = broker.get(&format!("/v1/exports/{TOPIC}/status")).unwrap();
    assert_eq!(status["dead_letters_total"].as_u64(), Some(malformed.len() as u64));
    assert_eq!(status["rows_total"].as_u64(), Some(expected.len() as u64));
    assert!(broker.stop().unwrap().success());
}
