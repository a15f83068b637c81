//! The retail stream, end to end: purchases, returns, transfers and adjustments of 2,000 stores into
//! the broker, from there into ClickHouse, while both are killed with -9. Ends with the figures that
//! count, asked of ClickHouse itself, and a status that is 0 only when they are right. With `--nodes 3` the brokers are a
//! cluster, of which one node after another is killed.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Parser;
use flumen_tests::clickhouse::ClickHouse;
use flumen_tests::cluster::Cluster;
use flumen_tests::export::until_settled;
use flumen_tests::flumen::Flumen;
use flumen_tests::kafka::ends_of;
use flumen_tests::process::port_or_free;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer};
use serde_json::json;

const TOPIC: &str = "inventory";
const STORES: u32 = 2_000;
const ITEMS: u32 = 50_000;
const PARTITIONS: i32 = 8;
/// 50,000 events a minute, and fifteen times that in the middle third.
const BASE_PER_SECOND: f64 = 50_000.0 / 60.0;
const SURGE: f64 = 15.0;
/// One record in so many is malformed.
const MALFORMED_EVERY: u64 = 997;
/// Events that the restarting producer sends once more.
const RESENT: usize = 500;
/// Rows appended this long around a kill say how long recovery took, not how fast the export is.
const FAULT_WINDOW_MS: i64 = 6_000;

#[derive(Parser)]
struct Args {
    #[arg(long, env = "DEMO_SECONDS", default_value_t = 60)]
    seconds: u64,
    #[arg(long, default_value = "demo-data")]
    data_dir: PathBuf,
    /// Leave broker and ClickHouse running at the end
    #[arg(long)]
    keep: bool,
    /// Brokers; three of them hold every record three times
    #[arg(long, default_value_t = 1)]
    nodes: usize,
}

/// One broker, or several that are a cluster.
enum Brokers {
    One(Box<Flumen>),
    Several(Cluster),
}

impl Brokers {
    fn start(args: &Args, setting: &str) -> anyhow::Result<Brokers> {
        if args.nodes == 1 {
            let (kafka, admin) = (port_or_free(9092), port_or_free(9644));
            let broker = Flumen::start_at(&args.data_dir, kafka, admin, &[setting], &[])?;
            return Ok(Brokers::One(Box::new(broker)));
        }
        // The dead letters of an export are worth as much as its records.
        let factor = format!("default.replication.factor={}", args.nodes.min(3));
        Ok(Brokers::Several(Cluster::start(&args.data_dir, args.nodes, &[setting, &factor])?))
    }

    fn kafka(&self) -> String {
        match self {
            Brokers::One(broker) => broker.kafka.clone(),
            Brokers::Several(cluster) => cluster.kafka(),
        }
    }

    fn any(&self) -> anyhow::Result<&Flumen> {
        match self {
            Brokers::One(broker) => Ok(broker),
            Brokers::Several(cluster) => cluster.any(),
        }
    }

    /// The broker on which the export runs.
    fn exporting(&self) -> anyhow::Result<usize> {
        match self {
            Brokers::One(_) => Ok(0),
            Brokers::Several(cluster) => cluster.leader_of("__flumen_exports", 0),
        }
    }

    fn node(&mut self, at: usize) -> &mut Flumen {
        match self {
            Brokers::One(broker) => broker,
            Brokers::Several(cluster) => &mut cluster.nodes[at],
        }
    }

    fn create_topic(&self) -> anyhow::Result<()> {
        // LogAppendTime: `_timestamp` is when the broker took the record, so that latency is append to visible.
        let configs = json!({ "message.timestamp.type": "LogAppendTime" });
        match self {
            Brokers::One(broker) => broker.create_topic(TOPIC, PARTITIONS, &configs),
            Brokers::Several(cluster) => {
                let factor = i16::try_from(cluster.nodes.len().min(3))?;
                cluster.create_topic(TOPIC, PARTITIONS, factor, &configs)
            }
        }
    }

    /// Kills one with -9, waits until clients are served again, and starts it anew.
    fn strike(&mut self, at: usize) -> anyhow::Result<String> {
        let began = Instant::now();
        self.node(at).kill_9();
        if let Brokers::Several(cluster) = self {
            cluster.await_leaders(TOPIC)?;
            let led = began.elapsed();
            cluster.nodes[at].restart()?;
            return Ok(format!("others lead after {} ms, and node {} runs again", led.as_millis(), at + 1));
        }
        self.node(at).restart()?;
        Ok(format!("the broker answers again after {} ms", began.elapsed().as_millis()))
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        match self {
            Brokers::One(broker) => {
                let status = broker.stop()?;
                anyhow::ensure!(status.success(), "the broker did not stop cleanly: {status}");
                Ok(())
            }
            Brokers::Several(cluster) => cluster.stop_all(),
        }
    }
}

/// What the brokers acknowledged.
#[derive(Default)]
struct Acknowledged {
    events: HashSet<u64>,
    malformed: u64,
    failed: u64,
}

#[derive(Clone)]
struct Reports(Arc<Mutex<Acknowledged>>);

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    /// The event id; `None` for a malformed record.
    type DeliveryOpaque = Box<Option<u64>>;

    fn delivery(&self, result: &DeliveryResult<'_>, event: Self::DeliveryOpaque) {
        let mut acknowledged = self.0.lock().expect("no panic under this lock");
        match (result, *event) {
            (Ok(message), Some(id)) if message.offset() >= 0 => drop(acknowledged.events.insert(id)),
            (Ok(_), None) => acknowledged.malformed += 1,
            _ => acknowledged.failed += 1,
        }
    }
}

type Client = ThreadedProducer<Reports>;

fn client(kafka: &str, reports: &Reports) -> anyhow::Result<Client> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("enable.idempotence", "true")
        .set("linger.ms", "5")
        // The broker is killed on purpose: retries must outlast that.
        .set("message.timeout.ms", "300000")
        .set("reconnect.backoff.max.ms", "500")
        .set("retry.backoff.max.ms", "500")
        .set("queue.buffering.max.messages", "1000000")
        .create_with_context(reports.clone())?)
}

struct Event {
    id: u64,
    store: u32,
    body: String,
}

fn event(id: u64, rng: &mut StdRng) -> Event {
    let store = rng.random_range(1..=STORES);
    let item = rng.random_range(1..=ITEMS);
    let (kind, quantity) = match rng.random_range(0..100) {
        0..70 => ("purchase", -rng.random_range(1..=5)),
        70..80 => ("return", rng.random_range(1..=2)),
        80..95 => ("transfer", rng.random_range(-50..=50)),
        _ => ("adjustment", rng.random_range(-10..=10)),
    };
    let cents = rng.random_range(99..50_000);
    let body = json!({
        "event_id": id, "kind": kind, "store": store, "item": item, "quantity": quantity,
        "price": format!("{}.{:02}", cents / 100, cents % 100),
        "at": now_ms() as f64 / 1000.0,
        "register": format!("r{}", rng.random_range(1..=20)),
    })
    .to_string();
    Event { id, store, body }
}

fn malformed(n: u64) -> String {
    match n % 3 {
        0 => "this is not JSON".to_string(),
        1 => json!({ "event_id": n, "kind": "purchase", "store": 1, "item": 1, "quantity": 3_000_000_000u64,
                     "price": "1.00", "at": 0, "register": "r1" })
        .to_string(),
        _ => json!({ "event_id": n, "kind": "theft", "store": 1, "item": 1, "quantity": 1,
                     "price": "1.00", "at": 0, "register": "r1" })
        .to_string(),
    }
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

fn send(producer: &Client, key: &str, body: &str, id: Option<u64>) {
    let mut record = BaseRecord::with_opaque_to(TOPIC, Box::new(id)).key(key).payload(body);
    // A full local queue is back-pressure: the stream waits, it does not drop.
    while let Err((_, back)) = producer.send(record) {
        record = back;
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let _ = std::fs::remove_dir_all(&args.data_dir);
    std::fs::create_dir_all(&args.data_dir)?;

    println!("== starting");
    let mut clickhouse = ClickHouse::start(&args.data_dir, port_or_free(8123))?;
    let url_setting = format!("clickhouse.url={}", clickhouse.url);
    let mut brokers = Brokers::start(&args, &url_setting)?;
    let admin = brokers.any()?.admin.clone();
    println!("   kafka {}   admin http://{admin}   clickhouse {}", brokers.kafka(), clickhouse.url);

    clickhouse.query("DROP TABLE IF EXISTS inventory")?;
    clickhouse.query(
        "CREATE TABLE inventory (event_id UInt64, \
         kind Enum8('purchase' = 1, 'return' = 2, 'transfer' = 3, 'adjustment' = 4), store UInt32, item UInt32, \
         quantity Int32, price Decimal(10, 2), at DateTime64(3), register LowCardinality(String), \
         _partition Int32, _offset Int64, _timestamp DateTime64(3), _key String, \
         visible_at DateTime64(3) DEFAULT now64(3)) \
         ENGINE = MergeTree ORDER BY (store, item, at) \
         SETTINGS non_replicated_deduplication_window = 10000",
    )?;
    brokers.create_topic()?;
    let admission = brokers.any()?.call(
        "PUT",
        &format!("/v1/exports/{TOPIC}"),
        Some(&json!({ "table": TOPIC, "server_default_columns": "visible_at" })),
    )?;
    println!("   export {TOPIC} -> table {TOPIC}, guarantee: {}", admission["guarantee"]);

    let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));
    let faults = stream(&args, &mut brokers, &mut clickhouse, &Reports(acknowledged.clone()))?;

    println!("== waiting for ClickHouse to have everything");
    let exporting = brokers.exporting()?;
    until_settled(brokers.node(exporting), TOPIC)?;
    let outcome = {
        let acknowledged = acknowledged.lock().expect("no panic under this lock");
        check(&brokers.kafka(), &clickhouse, &acknowledged, &faults)?
    };

    if args.keep {
        println!("\n== left running; stop with Ctrl-C. Try:");
        println!("   kcat -b {} -C -t {TOPIC} -o -5 -e", brokers.kafka());
        println!("   curl '{}/?query=SELECT+count()+FROM+inventory'", clickhouse.url);
        println!("   curl http://{}/v1/exports/{TOPIC}/status", brokers.node(exporting).admin);
        println!("   target/release/flumen export status {TOPIC} --admin {}", brokers.node(exporting).admin);
        loop {
            std::thread::park();
        }
    }
    brokers.stop()?;
    if outcome { Ok(()) } else { bail!("a figure is wrong") }
}

#[derive(Clone, Copy)]
enum Fault {
    Producer,
    Leader,
    Exporter,
    ClickHouse,
    All,
}

/// Runs the stream with its surge and its kills; returns when (ms) something was killed.
fn stream(
    args: &Args,
    brokers: &mut Brokers,
    clickhouse: &mut ClickHouse,
    reports: &Reports,
) -> anyhow::Result<Vec<i64>> {
    println!(
        "== streaming for {} s: {:.0} events/s, {SURGE}x in the middle third",
        args.seconds, BASE_PER_SECOND
    );
    let seconds = args.seconds as f64;
    let mut rng = StdRng::seed_from_u64(7);
    let mut producer = client(&brokers.kafka(), reports)?;
    let mut recent: Vec<Event> = Vec::new();
    let (mut sent, mut bad) = (0u64, 0u64);
    let mut owed = 0.0;
    let mut faults = Vec::new();
    let mut plan = vec![
        (0.25, Fault::Producer, "restart the producer, which sends its last events again"),
        (0.45, Fault::Leader, "kill -9 the broker in the surge"),
        (0.75, Fault::ClickHouse, "kill -9 ClickHouse"),
    ];
    if args.nodes > 1 {
        plan[1].2 = "kill -9 the node that leads partition 0, in the surge";
        plan.insert(2, (0.6, Fault::Exporter, "kill -9 the node that exports"));
        plan.push((0.85, Fault::All, "kill -9 all nodes at once"));
    }
    let started = Instant::now();
    let mut last_tick = started;
    let mut next_report = 5.0;
    loop {
        let elapsed = started.elapsed().as_secs_f64();
        if elapsed >= seconds {
            break;
        }
        let part = elapsed / seconds;
        let rate =
            if (1.0 / 3.0..2.0 / 3.0).contains(&part) { BASE_PER_SECOND * SURGE } else { BASE_PER_SECOND };
        owed += rate * last_tick.elapsed().as_secs_f64();
        last_tick = Instant::now();
        while owed >= 1.0 {
            owed -= 1.0;
            sent += 1;
            if sent % MALFORMED_EVERY == 0 {
                bad += 1;
                send(&producer, "malformed", &malformed(bad), None);
            }
            let event = event(sent, &mut rng);
            send(&producer, &event.store.to_string(), &event.body, Some(event.id));
            if recent.len() >= RESENT {
                recent.clear();
            }
            recent.push(event);
        }
        if plan.first().is_some_and(|(at, _, _)| part >= *at) {
            let (_, fault, what) = plan.remove(0);
            println!("   {elapsed:5.1} s  {what}");
            let began = now_ms();
            match fault {
                Fault::Producer => {
                    producer.flush(Duration::from_secs(300))?;
                    producer = client(&brokers.kafka(), reports)?;
                    for event in &recent {
                        send(&producer, &event.store.to_string(), &event.body, Some(event.id));
                    }
                    println!("            {} events sent twice", recent.len());
                    continue;
                }
                Fault::Leader => {
                    let leader = match brokers {
                        Brokers::One(_) => 0,
                        Brokers::Several(cluster) => cluster.leader_of(TOPIC, 0)?,
                    };
                    println!("            {}", brokers.strike(leader)?);
                }
                Fault::Exporter => {
                    let exporting = brokers.exporting()?;
                    println!("            {}", brokers.strike(exporting)?);
                }
                Fault::All => {
                    if let Brokers::Several(cluster) = brokers {
                        cluster.kill_all();
                        cluster.restart_all()?;
                        println!("            all run again after {} ms", now_ms() - began);
                    }
                }
                Fault::ClickHouse if clickhouse.is_ours() => {
                    clickhouse.kill_9();
                    clickhouse.restart()?;
                    println!("            ClickHouse answers again after {} ms", now_ms() - began);
                }
                Fault::ClickHouse => continue,
            }
            faults.push(began);
        }
        if elapsed >= next_report {
            next_report += 5.0;
            println!("   {elapsed:5.1} s  {sent} events sent");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    producer.flush(Duration::from_secs(300)).context("records were not acknowledged")?;
    println!("   sent {sent} events and {bad} malformed records");
    Ok(faults)
}

fn check(
    kafka: &str,
    clickhouse: &ClickHouse,
    acknowledged: &Acknowledged,
    faults: &[i64],
) -> anyhow::Result<bool> {
    let rows = clickhouse.number("SELECT count() FROM inventory")?;
    let duplicates = clickhouse.number("SELECT count() - uniqExact(_partition, _offset) FROM inventory")?;
    let in_table: HashSet<u64> = clickhouse
        .query("SELECT DISTINCT event_id FROM inventory FORMAT TabSeparated")?
        .lines()
        .filter_map(|l| l.parse().ok())
        .collect();
    let missing = acknowledged.events.difference(&in_table).count();
    let dead_letters: i64 = ends_of(kafka, &format!("{TOPIC}.dlq"), 1)?.iter().sum();
    let log_records: i64 = ends_of(kafka, TOPIC, PARTITIONS)?.iter().sum();
    let outside_faults = faults
        .iter()
        .map(|at| {
            format!(
                " AND NOT (toUnixTimestamp64Milli(_timestamp) BETWEEN {} AND {})",
                at - FAULT_WINDOW_MS / 2,
                at + FAULT_WINDOW_MS
            )
        })
        .collect::<String>();
    let latency = |filter: &str| -> anyhow::Result<(i64, i64)> {
        let text = clickhouse.query(&format!(
            "SELECT toInt64(quantileExact(0.5)(l)), toInt64(quantileExact(0.99)(l)) FROM \
             (SELECT toUnixTimestamp64Milli(visible_at) - toUnixTimestamp64Milli(_timestamp) AS l \
              FROM inventory WHERE 1{filter})"
        ))?;
        let mut parts = text.trim().split('\t').filter_map(|p| p.parse().ok());
        Ok((parts.next().unwrap_or(-1), parts.next().unwrap_or(-1)))
    };
    let quiet = latency(&outside_faults)?;
    let all = latency("")?;

    println!("\n== from ClickHouse");
    println!("   rows                     {rows}   (records in the topic: {log_records})");
    println!("   missing                  {missing}   (acknowledged events without a row)");
    println!("   duplicates               {duplicates}   (rows beyond one per partition and offset)");
    println!(
        "   dead letters             {dead_letters}   (malformed records sent: {})",
        acknowledged.malformed
    );
    println!("   append to visible        p50 {} ms   p99 {} ms   outside the kills", quiet.0, quiet.1);
    println!("                            p50 {} ms   p99 {} ms   with them", all.0, all.1);
    println!("   stock, five stores with the most movements (each event counted once):");
    print!(
        "{}",
        clickhouse.query(
            "SELECT concat('     store ', toString(store)), count() AS movements, sum(quantity) AS stock \
             FROM (SELECT DISTINCT event_id, store, quantity FROM inventory) \
             GROUP BY store ORDER BY movements DESC, store LIMIT 5"
        )?
    );
    let mut wrong: BTreeMap<&str, String> = BTreeMap::new();
    if missing != 0 {
        wrong.insert("missing", format!("{missing} instead of 0"));
    }
    if duplicates != 0 {
        wrong.insert("duplicates", format!("{duplicates} instead of 0"));
    }
    if dead_letters as u64 != acknowledged.malformed {
        wrong.insert("dead letters", format!("{dead_letters} instead of {}", acknowledged.malformed));
    }
    if rows + dead_letters != log_records {
        wrong.insert("rows", format!("{rows} rows and {dead_letters} dead letters of {log_records} records"));
    }
    if acknowledged.failed != 0 {
        wrong.insert("acknowledgements", format!("{} records failed", acknowledged.failed));
    }
    if !(0..1000).contains(&quiet.1) {
        wrong.insert("latency", format!("p99 of {} ms outside the kills, should be below 1000", quiet.1));
    }
    for (what, how) in &wrong {
        println!("   WRONG: {what}: {how}");
    }
    println!("{}", if wrong.is_empty() { "\nall figures are right" } else { "\na figure is wrong" });
    Ok(wrong.is_empty())
}
