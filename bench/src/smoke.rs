//! `smoke`: the same work for Flumen, Apache Kafka and the null broker in one session, in the order A B B A, and one
//! table at the end. Every broker starts on an empty directory; nothing else of it is kept between rounds.
//!
//! What the figures are and are not is in `bench/README.md`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use crate::consume::{self, ConsumeConfig, ConsumeResult};
use crate::export::{self, ExportConfig, ExportResult, Shape};
use crate::load::{self, LoadConfig, LoadResult, Mode};
use crate::peer::Peer;
use crate::plan::Keyed;
use crate::stats::{self, Machine};

/// After the first acknowledgement, before "idle" is read.
const SETTLE: Duration = Duration::from_secs(2);
/// The share of the machine that something else may use before the table says so.
const NOISE_MAX: f64 = 0.05;
const POLL: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Args, Serialize)]
pub struct SmokeConfig {
    /// The flumen binary.
    #[arg(long)]
    pub flumen: PathBuf,
    /// The directory of kafka.sh.
    #[arg(long, default_value = "bench")]
    pub bench_dir: PathBuf,
    /// Kafka's jars, when not in .cache/kafka.
    #[arg(long)]
    pub kafka_dir: Option<PathBuf>,
    /// Where brokers keep their data: one file system for all of them.
    #[arg(long, default_value = ".cache/bench")]
    pub work: PathBuf,
    /// Raw figures, as JSON.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Measured seconds of every cell.
    #[arg(long, default_value_t = 6.0)]
    pub seconds: f64,
    /// Seconds of load before the first cell of a broker; a JVM needs them.
    #[arg(long, default_value_t = 8.0)]
    pub first_warmup: f64,
    /// Batches a second of the open-loop cell, the same for everyone.
    #[arg(long, default_value_t = 8_000.0)]
    pub rate: f64,
    /// A B instead of A B B A.
    #[arg(long)]
    pub quick: bool,
    /// Also keyed cells and a drain.
    #[arg(long)]
    pub full: bool,
    /// Settings of Flumen's topics, e.g. flumen.durability=os.
    #[arg(long = "flumen-topic-config", value_parser = load::key_value)]
    pub flumen_topic_configs: Vec<(String, String)>,
    /// Settings of Kafka's topics, e.g. flush.messages=1.
    #[arg(long = "kafka-topic-config", value_parser = load::key_value)]
    pub kafka_topic_configs: Vec<(String, String)>,
    /// Also measure the export, against CLICKHOUSE_URL or the embedded engine.
    #[arg(long)]
    pub export: bool,
    #[arg(long, env = "CLICKHOUSE_URL", hide_env_values = true)]
    pub clickhouse: Option<String>,
    #[arg(long, default_value_t = 1_000_000)]
    pub export_rows: u64,
    /// Exit with 1 when a figure misses its goal.
    #[arg(long)]
    pub check: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Side {
    Flumen,
    Kafka,
    Null,
}

#[derive(Debug, Clone, Serialize)]
struct Round {
    side: Side,
    start_to_first_ack_s: f64,
    rss_idle_mib: f64,
    rss_loaded_mib: f64,
    loads: Vec<(String, LoadResult)>,
    tail: Option<ConsumeResult>,
    drain: Option<ConsumeResult>,
}

#[derive(Serialize)]
struct Report<'a> {
    unix_ms: i64,
    machine: Machine,
    config: &'a SmokeConfig,
    durability: [String; 2],
    rounds: &'a [Round],
    export: Option<&'a ExportResult>,
    table: Vec<Row>,
}

pub fn run(config: &SmokeConfig) -> Result<ExitCode> {
    let began = Instant::now();
    std::fs::create_dir_all(&config.work)
        .with_context(|| format!("cannot create {}", config.work.display()))?;
    let work = config.work.canonicalize()?;
    let machine = stats::machine(&work);
    println!(
        "{}, {} cores, {} GiB, Linux {}, data on {}",
        machine.cpu, machine.cores, machine.memory_gib, machine.kernel, machine.data_filesystem
    );
    if machine.data_filesystem == "tmpfs" {
        println!("warning: {} is memory; durability costs nothing there", work.display());
    }
    let order: &[Side] = if config.quick {
        &[Side::Flumen, Side::Kafka, Side::Null]
    } else {
        &[Side::Flumen, Side::Kafka, Side::Kafka, Side::Flumen, Side::Null]
    };
    let mut rounds = Vec::new();
    for (i, side) in order.iter().enumerate() {
        eprintln!("[{:>3.0} s] round {} of {}: {side:?}", began.elapsed().as_secs_f64(), i + 1, order.len());
        rounds.push(round(config, *side, &work).with_context(|| format!("round {} ({side:?})", i + 1))?);
    }
    let export = if config.export {
        eprintln!("[{:>3.0} s] export", began.elapsed().as_secs_f64());
        Some(measure_export(config, &work).context("export")?)
    } else {
        None
    };

    let durability = [
        durability(
            "Flumen",
            &config.flumen_topic_configs,
            "durable: acknowledged after the disk has it; survives kill -9 and power loss",
        ),
        durability(
            "Kafka",
            &config.kafka_topic_configs,
            "page cache (its default): acknowledged before the disk has it; survives kill -9, not power loss",
        ),
    ];
    let table = table(config, &rounds, export.as_ref());
    print(&table, &durability, &rounds, machine.cores);
    println!("took {:.0} s", began.elapsed().as_secs_f64());
    let missed = table.iter().any(|r| r.met == Some(false));
    if let Some(out) = &config.out {
        let report = Report {
            unix_ms: load::now_ms(),
            machine,
            config,
            durability,
            rounds: &rounds,
            export: export.as_ref(),
            table,
        };
        crate::write_json(Some(out), &report)?;
    }
    Ok(if config.check && missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn durability(name: &str, topic_configs: &[(String, String)], default: &str) -> String {
    let set: Vec<String> = topic_configs
        .iter()
        .filter(|(k, _)| k.starts_with("flush.") || k == "flumen.durability")
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    if set.is_empty() {
        format!("{name}: {default}")
    } else {
        format!("{name}: topics with {}", set.join(", "))
    }
}

fn round(config: &SmokeConfig, side: Side, work: &Path) -> Result<Round> {
    let mut peer = match side {
        Side::Flumen => Peer::flumen(&config.flumen, work, &[])?,
        Side::Kafka => Peer::kafka(&config.bench_dir, config.kafka_dir.as_deref(), work, &[])?,
        Side::Null => Peer::null(work)?,
    };
    let outcome = cells(config, side, &mut peer);
    outcome.with_context(|| format!("the broker's last words:\n{}", peer.log_tail()))
}

fn cells(config: &SmokeConfig, side: Side, peer: &mut Peer) -> Result<Round> {
    let start_to_first_ack_s = peer.first_ack()?.as_secs_f64();
    std::thread::sleep(SETTLE);
    let rss_idle_mib = stats::rss_mib(peer.pid())?;
    let first_warmup = if side == Side::Null { 1.0 } else { config.first_warmup };
    let base = LoadConfig {
        bootstrap: peer.kafka.clone(),
        topic: "small".into(),
        partitions: 100,
        connections: 50,
        in_flight: 1,
        batch_records: 1,
        record_bytes: 1024,
        mode: Mode::Closed,
        rate: 0.0,
        seconds: config.seconds,
        warmup_seconds: 2.0,
        keyed: Keyed::None,
        partitions_per_request: 1,
        acks: -1,
        idempotent: false,
        produce_version: 12,
        topic_configs: match side {
            Side::Flumen => config.flumen_topic_configs.clone(),
            Side::Kafka => config.kafka_topic_configs.clone(),
            Side::Null => Vec::new(),
        },
        pid: Some(peer.pid()),
    };
    let mut loads = Vec::new();
    let mut cell = |name: &str, c: LoadConfig| -> Result<()> {
        let r = load::run(&c, None).with_context(|| format!("cell {name}"))?;
        eprintln!(
            "        {name}: {:.0} batches/s, {:.1} MB/s, {:.1} us/batch, p99 {:.2} ms{}",
            r.batches_per_s,
            r.mb_per_s,
            r.broker.as_ref().map_or(0.0, |b| b.cpu_us_per_batch),
            r.latency.p99_ms,
            if r.errors.is_empty() { String::new() } else { format!(", ERRORS {:?}", r.errors) }
        );
        loads.push((name.to_string(), r));
        Ok(())
    };
    cell("small-1", LoadConfig { warmup_seconds: first_warmup, ..base.clone() })?;
    cell("small-5", LoadConfig { in_flight: 5, ..base.clone() })?;
    cell("open", LoadConfig { mode: Mode::Open, in_flight: 5, rate: config.rate, ..base.clone() })?;
    if config.full {
        let keyed = LoadConfig { topic: "keyed".into(), partitions_per_request: 20, ..base.clone() };
        cell("keyed-uniform", LoadConfig { keyed: Keyed::Uniform, ..keyed.clone() })?;
        cell("keyed-zipf", LoadConfig { keyed: Keyed::Zipf, ..keyed })?;
    }
    let big = LoadConfig {
        topic: "big".into(),
        partitions: 16,
        connections: 4,
        in_flight: 5,
        batch_records: 128,
        ..base.clone()
    };
    let (result, tail) = with_tail(&big)?;
    eprintln!(
        "        big: {:.0} MB/s in, {:.0} MB/s out, {:.2} CPU-s/GB",
        result.mb_per_s,
        tail.mb_per_s,
        result.broker.as_ref().map_or(0.0, |b| b.cpu_s_per_gb)
    );
    loads.push(("big".into(), result));
    let drain = if config.full && side != Side::Null {
        Some(consume::run(
            &ConsumeConfig { topic: "small".into(), until_end: true, ..tail_config(&base) },
            None,
        )?)
    } else {
        None
    };
    let rss_loaded_mib = loads
        .iter()
        .filter_map(|(_, r)| r.broker.as_ref())
        .map(|b| b.rss_max_mib)
        .fold(rss_idle_mib, f64::max);
    Ok(Round { side, start_to_first_ack_s, rss_idle_mib, rss_loaded_mib, loads, tail: Some(tail), drain })
}

fn tail_config(load: &LoadConfig) -> ConsumeConfig {
    ConsumeConfig {
        bootstrap: load.bootstrap.clone(),
        topic: load.topic.clone(),
        partitions: load.partitions,
        connections: 1,
        seconds: f64::from(u16::MAX),
        until_end: false,
        from: consume::From::Earliest,
        partition_max_bytes: 1 << 20,
        max_bytes: 8 << 20,
        max_wait_ms: 100,
        pid: load.pid,
    }
}

/// A load with one consumer that starts when it starts and stops when it stops.
fn with_tail(load: &LoadConfig) -> Result<(LoadResult, ConsumeResult)> {
    let (started, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let producer = std::thread::spawn({
        let (load, started) = (load.clone(), started.clone());
        move || load::run(&load, Some(started))
    });
    while !started.load(Ordering::Acquire) && !producer.is_finished() {
        std::thread::sleep(POLL);
    }
    let consumer = std::thread::spawn({
        let (config, stop) = (tail_config(load), stop.clone());
        move || consume::run(&config, Some(stop))
    });
    let produced = producer.join().map_err(|_| anyhow::anyhow!("the generator panicked"))?;
    stop.store(true, Ordering::Release);
    let consumed = consumer.join().map_err(|_| anyhow::anyhow!("the consumer panicked"))?;
    Ok((produced?, consumed.context("tailing consumer")?))
}

fn measure_export(config: &SmokeConfig, work: &Path) -> Result<ExportResult> {
    let engine = match &config.clickhouse {
        Some(_) => None,
        None => Some(Peer::clickhouse(&config.flumen, work)?),
    };
    let url = match (&config.clickhouse, &engine) {
        (Some(url), _) => url.clone(),
        (None, Some(engine)) => format!("http://{}", engine.kafka),
        (None, None) => unreachable!("one of the two was just made"),
    };
    let mut broker = Peer::flumen(&config.flumen, work, &[format!("clickhouse.url={url}")])?;
    broker.first_ack()?;
    let export = ExportConfig {
        bootstrap: broker.kafka.clone(),
        admin: broker.admin.clone().unwrap_or_default(),
        clickhouse: url,
        topic: "export_bench".into(),
        partitions: 16,
        rows: config.export_rows,
        shape: Shape::Small,
        // The retail stream of 50,000 a minute, and its 15-fold surge.
        live_rates: vec![833.0, 12_500.0],
        live_seconds: 8.0,
        pid: Some(broker.pid()),
        engine_pid: engine.as_ref().map(Peer::pid),
        export_configs: Vec::new(),
    };
    export::run(&export).with_context(|| format!("the broker's last words:\n{}", broker.log_tail()))
}

/// One line of the table; lower is better unless `higher` is set.
#[derive(Debug, Clone, Serialize)]
struct Row {
    name: String,
    flumen: Option<f64>,
    kafka: Option<f64>,
    null: Option<f64>,
    ratio: Option<f64>,
    goal: String,
    met: Option<bool>,
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|v| *v <= 0.0) {
        return None;
    }
    Some((values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp())
}

#[derive(Clone, Copy)]
enum Goal {
    /// At most this much; Kafka does not matter.
    AtMost(f64),
    /// At most Kafka's.
    NotAbove,
    /// At least Kafka's.
    NotBelow,
    Informs,
}

fn make_row(name: &str, goal: Goal, rounds: &[Round], value: impl Fn(&Round) -> Option<f64>) -> Row {
    let of = |side: Side| {
        let v: Option<Vec<f64>> = rounds.iter().filter(|r| r.side == side).map(&value).collect();
        v.and_then(|v| geometric_mean(&v))
    };
    finish_row(name, goal, of(Side::Flumen), of(Side::Kafka), of(Side::Null))
}

fn finish_row(name: &str, goal: Goal, flumen: Option<f64>, kafka: Option<f64>, null: Option<f64>) -> Row {
    let ratio = flumen.zip(kafka).map(|(f, k)| f / k);
    let (goal, met) = match goal {
        Goal::AtMost(limit) => (format!("<= {limit}"), flumen.map(|f| f <= limit)),
        Goal::NotAbove => ("<= 1x".into(), ratio.map(|r| r <= 1.0)),
        Goal::NotBelow => (">= 1x".into(), ratio.map(|r| r >= 1.0)),
        Goal::Informs => (String::new(), None),
    };
    Row { name: name.into(), flumen, kafka, null, ratio, goal, met }
}

fn table(config: &SmokeConfig, rounds: &[Round], export: Option<&ExportResult>) -> Vec<Row> {
    let load = |r: &Round, cell: &str| r.loads.iter().find(|(n, _)| n == cell).map(|(_, l)| l.clone());
    let per_million = |r: &Round, cell: &str| Some(load(r, cell)?.broker?.cpu_s_per_million_batches);
    let rate = |r: &Round, cell: &str| Some(load(r, cell)?.batches_per_s);
    let mut rows = Vec::new();
    let mut add = |name: &str, goal: Goal, value: &dyn Fn(&Round) -> Option<f64>| {
        rows.push(make_row(name, goal, rounds, value));
    };
    add("1 KiB one-record batches, 50 connections, 1 in flight: CPU-s per million", Goal::NotAbove, &|r| {
        per_million(r, "small-1")
    });
    add("  batches/s", Goal::NotBelow, &|r| rate(r, "small-1"));
    add("the same, 5 in flight: CPU-s per million", Goal::NotAbove, &|r| per_million(r, "small-5"));
    add("  batches/s", Goal::NotBelow, &|r| rate(r, "small-5"));
    if config.full {
        for (cell, name) in [("keyed-uniform", "uniform"), ("keyed-zipf", "zipf")] {
            let title = format!("keyed {name}, 20 partitions per request: CPU-s per million batches");
            add(&title, Goal::NotAbove, &|r| per_million(r, cell));
            add("  batches/s", Goal::NotBelow, &|r| rate(r, cell));
        }
    }
    add("128 KiB batches, 4 connections, one tailing consumer: CPU-s per GB", Goal::NotAbove, &|r| {
        Some(load(r, "big")?.broker?.cpu_s_per_gb)
    });
    add("  produced MB/s", Goal::NotBelow, &|r| Some(load(r, "big")?.mb_per_s));
    add("  consumed MB/s", Goal::Informs, &|r| Some(r.tail.as_ref()?.mb_per_s));
    let open = format!("open loop, {:.0} batches/s, 50 connections: p50 ms", config.rate);
    add(&open, Goal::Informs, &|r| Some(load(r, "open")?.latency.p50_ms));
    add("  p99 ms", Goal::NotAbove, &|r| Some(load(r, "open")?.latency.p99_ms));
    add("  p99.9 ms", Goal::Informs, &|r| Some(load(r, "open")?.latency.p999_ms));
    add("  CPU-s per million batches", Goal::NotAbove, &|r| per_million(r, "open"));
    if config.full {
        add("drain of one-record batches: CPU-s per GB", Goal::NotAbove, &|r| {
            r.drain.as_ref()?.broker_cpu_s_per_gb
        });
        add("  MB/s", Goal::NotBelow, &|r| Some(r.drain.as_ref()?.mb_per_s));
    }
    add("resident memory idle, MiB", Goal::AtMost(64.0), &|r| Some(r.rss_idle_mib));
    add("resident memory loaded, MiB", Goal::NotAbove, &|r| Some(r.rss_loaded_mib));
    add("start to first acknowledgement, s", Goal::AtMost(0.5), &|r| Some(r.start_to_first_ack_s));
    let mut put = |name: &str, goal: Goal, value: Option<f64>| {
        rows.push(finish_row(name, goal, value, None, None));
    };
    if let Some(e) = export {
        if let Some(b) = &e.backlog {
            let name = format!("export of {} JSON rows of {:.0} bytes: rows/s", b.rows, b.mean_row_bytes);
            put(&name, Goal::Informs, Some(b.rows_per_s));
            put("  CPU-s per million rows, broker", Goal::Informs, b.broker_cpu_s_per_million_rows);
            put("  CPU-s per million rows, ClickHouse", Goal::Informs, b.engine_cpu_s_per_million_rows);
            put(
                "  missing + duplicated rows",
                Goal::AtMost(0.0),
                Some((b.missing.abs() + b.duplicates) as f64),
            );
        }
        for l in &e.live {
            put(
                &format!("export at {:.0} rows/s: visible p50 ms", l.rate),
                Goal::Informs,
                Some(l.visible.p50_ms),
            );
            put("  visible p99 ms", Goal::AtMost(1_000.0), Some(l.visible.p99_ms));
            put(
                "  missing + duplicated rows",
                Goal::AtMost(0.0),
                Some((l.missing.abs() + l.duplicates) as f64),
            );
        }
    }
    rows
}

fn number(v: Option<f64>) -> String {
    match v {
        None => "-".into(),
        Some(0.0) => "0".into(),
        Some(v) if v >= 1_000.0 => format!("{v:.0}"),
        Some(v) if v >= 10.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.2}"),
    }
}

fn print(table: &[Row], durability: &[String; 2], rounds: &[Round], cores: usize) {
    println!();
    let width = table.iter().map(|r| r.name.len()).max().unwrap_or(0);
    println!("{:width$}  {:>9}  {:>9}  {:>7}  {:>9}  goal", "", "Flumen", "Kafka", "ratio", "null");
    for r in table {
        let met = match r.met {
            Some(true) => "ok",
            Some(false) => "MISSED",
            None => "",
        };
        println!(
            "{:width$}  {:>9}  {:>9}  {:>7}  {:>9}  {:6} {met}",
            r.name,
            number(r.flumen),
            number(r.kafka),
            r.ratio.map_or_else(|| "-".into(), |v| format!("{v:.2}x")),
            number(r.null),
            r.goal,
        );
    }
    println!();
    for line in durability {
        println!("{line}");
    }
    println!("null broker: stores nothing; the floor of this machine, these sockets and this protocol");
    for r in rounds {
        for (name, l) in &r.loads {
            if !l.errors.is_empty() || l.unanswered > 0 {
                println!("{:?} {name}: errors {:?}, unanswered {}", r.side, l.errors, l.unanswered);
            }
            if l.config.mode == Mode::Open && l.unsent > l.batches / 100 {
                println!(
                    "{:?} {name}: {} scheduled batches were never sent: not sustained",
                    r.side, l.unsent
                );
            }
            let broker = l.broker.as_ref().map_or(0.0, |b| b.cpu_s);
            let foreign = (l.host.busy_s - broker - l.generator_cpu_s).max(0.0) + l.host.steal_s;
            let share = foreign / (l.window_s * cores as f64);
            if share > NOISE_MAX {
                println!(
                    "{:?} {name}: {:.0} % of the machine was busy with something else",
                    r.side,
                    share * 100.0
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals() {
        let r = finish_row("a", Goal::NotAbove, Some(1.0), Some(2.0), None);
        assert_eq!((r.ratio, r.met), (Some(0.5), Some(true)));
        assert_eq!(finish_row("a", Goal::NotBelow, Some(1.0), Some(2.0), None).met, Some(false));
        assert_eq!(finish_row("a", Goal::AtMost(0.5), Some(0.6), None, None).met, Some(false));
        assert_eq!(finish_row("a", Goal::NotAbove, None, Some(2.0), None).met, None);
        assert!((geometric_mean(&[1.0, 4.0]).unwrap() - 2.0).abs() < 1e-12);
    }
}
