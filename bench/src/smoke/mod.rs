//! `smoke`: the same work for Flumen, Apache Kafka and the null broker in one session, in the order A B B A, and one
//! table at the end. Every broker starts on an empty directory; nothing else of it is kept between rounds.
//!
//! What the figures are and are not is in `bench/README.md`.

mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use crate::consume::{self, ConsumeConfig, ConsumeResult};
use crate::export::{self, ExportConfig, ExportResult, Shape};
use crate::load::{self, LoadConfig, LoadResult, Mode};
use crate::peer::{Peer, Side, Sides};
use crate::plan::Keyed;
use crate::stats::{self, Machine};
use crate::tail;
use table::Row;

/// After the first acknowledgement, before "idle" is read.
const SETTLE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Args, Serialize)]
pub struct SmokeConfig {
    #[command(flatten)]
    #[serde(flatten)]
    pub sides: Sides,
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
    let table = table::table(config, &rounds, export.as_ref());
    table::print(&table, &durability, &rounds, machine.cores);
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
        Side::Flumen => Peer::flumen(&config.sides.flumen, work, &[])?,
        Side::Kafka => Peer::kafka(&config.sides.bench_dir, config.sides.kafka_dir.as_deref(), work, &[])?,
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
        seconds: config.seconds,
        topic_configs: match side {
            Side::Flumen => config.flumen_topic_configs.clone(),
            Side::Kafka => config.kafka_topic_configs.clone(),
            Side::Null => Vec::new(),
        },
        pids: vec![peer.pid()],
        ..LoadConfig::one_record_batches()
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
    let (result, tail) = tail::with_tail(&big)?;
    eprintln!(
        "        big: {:.0} MB/s in, {:.0} MB/s out, {:.2} CPU-s/GB",
        result.mb_per_s,
        tail.mb_per_s,
        result.broker.as_ref().map_or(0.0, |b| b.cpu_s_per_gb)
    );
    loads.push(("big".into(), result));
    let drain = if config.full && side != Side::Null {
        Some(consume::run(
            &ConsumeConfig { topic: "small".into(), until_end: true, ..tail::config(&base) },
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

fn measure_export(config: &SmokeConfig, work: &Path) -> Result<ExportResult> {
    let engine = match &config.clickhouse {
        Some(_) => None,
        None => Some(Peer::clickhouse(&config.sides.flumen, work)?),
    };
    let url = match (&config.clickhouse, &engine) {
        (Some(url), _) => url.clone(),
        (None, Some(engine)) => format!("http://{}", engine.kafka),
        (None, None) => unreachable!("one of the two was just made"),
    };
    let mut broker = Peer::flumen(&config.sides.flumen, work, &[format!("clickhouse.url={url}")])?;
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
