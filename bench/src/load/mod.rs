//! `load`: the produce generator. Many connections on one thread, pre-encoded batches, closed or open loop.
//!
//! The thread that calls [`run`] owns everything here (one tokio `current_thread` runtime with a `LocalSet`), so the
//! counters need no lock. Every connection keeps at most `in_flight` requests unanswered. Latency is measured from
//! the intended send time (open loop) or from the moment the request was queued for the socket (closed loop).

mod connection;
mod figures;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::batch::{self, Template};
use crate::client::{Client, LATEST, error_name};
use crate::pace::{self, Due};
use crate::plan::{Keyed, Plan};
use crate::route;
use crate::stats;
use connection::Connection;
pub use connection::{parse_answer, poll_read};
pub use figures::{Broker, Latency, LoadResult, Slice, new_histogram, print};
use figures::{Mark, SLICE, Sample, Totals};

const RSS_SAMPLE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The next request leaves when an answer has come: finds the saturation rate and the CPU per batch there.
    Closed,
    /// Requests leave on a schedule: the only honest latency.
    Open,
}

#[derive(Debug, Clone, Args, Serialize)]
pub struct LoadConfig {
    #[arg(long, default_value = "127.0.0.1:9092")]
    pub bootstrap: String,
    #[arg(long, default_value = "bench")]
    pub topic: String,
    #[arg(long, default_value_t = 100)]
    pub partitions: usize,
    #[arg(long, default_value_t = 50)]
    pub connections: usize,
    /// Unanswered requests per connection.
    #[arg(long, default_value_t = 1)]
    pub in_flight: usize,
    #[arg(long, default_value_t = 1)]
    pub batch_records: usize,
    /// Bytes of a record's value.
    #[arg(long, default_value_t = 1024)]
    pub record_bytes: usize,
    #[arg(long, value_enum, default_value = "closed")]
    pub mode: Mode,
    /// Batches a second over all connections; open loop only.
    #[arg(long, default_value_t = 10_000.0)]
    pub rate: f64,
    /// Length of the measured window.
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Stop after so many batches, however much time is left; closed loop only.
    #[arg(long)]
    pub batches: Option<u64>,
    /// Load before the window, not measured.
    #[arg(long, default_value_t = 2.0)]
    pub warmup_seconds: f64,
    #[arg(long, value_enum, default_value = "none")]
    pub keyed: Keyed,
    /// Partitions, and so batches, in one request.
    #[arg(long, default_value_t = 1)]
    pub partitions_per_request: usize,
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    pub acks: i16,
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub idempotent: bool,
    #[arg(long, default_value_t = 12)]
    pub produce_version: i16,
    /// Settings for the topic when it is created here: key=value, repeatable.
    #[arg(long = "topic-config", value_parser = key_value)]
    pub topic_configs: Vec<(String, String)>,
    /// Of the topic, when it is created here.
    #[arg(long, default_value_t = 1)]
    pub replication_factor: i16,
    /// Process ids of the brokers, for CPU and memory, which are summed up; repeatable.
    #[arg(long = "pid")]
    pub pids: Vec<u32>,
}

impl LoadConfig {
    /// 50 connections, 1 in flight, one record of 1 KiB in a batch, one batch in a request, 100 partitions, acks=all, closed
    /// loop: what most cells are a variation of.
    pub fn one_record_batches() -> LoadConfig {
        LoadConfig {
            bootstrap: String::new(),
            topic: String::new(),
            partitions: 100,
            connections: 50,
            in_flight: 1,
            batch_records: 1,
            record_bytes: 1024,
            mode: Mode::Closed,
            rate: 0.0,
            seconds: 10.0,
            batches: None,
            warmup_seconds: 2.0,
            keyed: Keyed::None,
            partitions_per_request: 1,
            acks: -1,
            idempotent: false,
            produce_version: 12,
            topic_configs: Vec::new(),
            replication_factor: 1,
            pids: Vec::new(),
        }
    }
}

pub fn key_value(s: &str) -> Result<(String, String), String> {
    s.split_once('=').map(|(k, v)| (k.into(), v.into())).ok_or_else(|| format!("{s} is not key=value"))
}

pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// Runs to the end on the calling thread. `started` is raised when the topic exists and load begins.
pub fn run(config: &LoadConfig, started: Option<Arc<AtomicBool>>) -> Result<LoadResult> {
    ensure!(config.acks != 0, "acks=0 has no answer to time; use 1 or -1");
    ensure!((9..=12).contains(&config.produce_version), "Produce versions 9 to 12 are spoken here");
    ensure!(config.partitions > 0 && config.connections > 0 && config.in_flight > 0, "nothing to do");
    ensure!(config.batch_records > 0, "a batch needs a record");
    ensure!(config.batches.is_none() || config.mode == Mode::Closed, "an open loop ends by time");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, drive(config, started))
}

/// Connections take turns with the brokers that lead something, and produce to what their broker leads.
async fn connect(config: &LoadConfig, control: &mut Client) -> Result<Vec<Connection>> {
    let key = (config.keyed != Keyed::None).then_some(&b"key-1234"[..]);
    let batch = batch::encode_filler(config.batch_records, config.record_bytes, key, now_ms());
    let deltas = batch::sequence_deltas(batch.len());
    let routes = route::routes(&config.bootstrap, &config.topic, config.partitions).await?;
    let plans: Vec<Rc<Plan>> = routes
        .iter()
        .map(|route| {
            let seed = config.partitions as u64;
            Rc::new(Plan::new(config.keyed, &route.partitions, config.partitions_per_request, seed))
        })
        .collect();
    let mut connections = Vec::with_capacity(config.connections);
    for id in 0..config.connections {
        let template = if config.idempotent {
            let (producer_id, epoch) = control.producer_id().await?;
            Template::idempotent(&batch, producer_id, epoch, &deltas)
        } else {
            Template::plain(&batch)
        };
        let at = id % routes.len();
        let address = &routes[at].address;
        let stream =
            TcpStream::connect(address).await.with_context(|| format!("connection {id} to {address}"))?;
        stream.set_nodelay(true)?;
        connections.push(Connection::new(id, stream, template, plans[at].clone(), config));
    }
    Ok(connections)
}

async fn drive(config: &LoadConfig, started: Option<Arc<AtomicBool>>) -> Result<LoadResult> {
    let mut control = Client::connect(&config.bootstrap).await?;
    control
        .ensure_topic(&config.topic, config.partitions, config.replication_factor, &config.topic_configs)
        .await?;
    // Metadata can name a leader before that leader knows; only an answer from it proves it.
    route::offsets(&config.bootstrap, &config.topic, config.partitions, LATEST).await?;
    let connections = connect(config, &mut control).await?;

    let rss_before = stats::rss_mib_of(&config.pids)?;
    let start = Instant::now();
    let w0 = start + Duration::from_secs_f64(config.warmup_seconds);
    let w1 = w0 + Duration::from_secs_f64(config.seconds);
    let totals = Rc::new(RefCell::new(Totals::new((w0, w1), config.batches)));
    if let Some(flag) = started {
        flag.store(true, std::sync::atomic::Ordering::Release);
    }

    let mut tasks = Vec::new();
    let mut dues = Vec::new();
    for connection in connections {
        let due = (config.mode == Mode::Open).then(|| Rc::new(Due::default()));
        dues.extend(due.clone());
        tasks.push(tokio::task::spawn_local(connection.run(due, w1, totals.clone())));
    }
    if config.mode == Mode::Open {
        let per_request = config.partitions_per_request.clamp(1, config.partitions) as f64;
        tokio::task::spawn_local(pace::run(dues, config.rate / per_request, start, w1));
    }

    tokio::time::sleep_until(w0.into()).await;
    let before = Sample::take(&config.pids)?;
    let mut marks = vec![Mark::take(&totals.borrow(), &config.pids)?];
    let mut rss_max = rss_before.unwrap_or(0.0);
    let mut next_mark = w0 + SLICE;
    while Instant::now() < w1 && !totals.borrow().spent() {
        let next = (Instant::now() + RSS_SAMPLE).min(next_mark).min(w1);
        tokio::time::sleep_until(next.into()).await;
        if Instant::now() >= next_mark {
            marks.push(Mark::take(&totals.borrow(), &config.pids)?);
            next_mark += SLICE;
        }
        rss_max = rss_max.max(stats::rss_mib_of(&config.pids)?.unwrap_or(0.0));
    }
    // What is left of the last slice, unless it is too short to say anything.
    if marks.last().is_some_and(|m| m.at.elapsed() > SLICE / 2) {
        marks.push(Mark::take(&totals.borrow(), &config.pids)?);
    }
    let after = Sample::take(&config.pids)?;
    let open_files = stats::open_files_of(&config.pids);
    for task in tasks {
        task.await.context("a connection's task failed")??;
    }

    let totals = totals.borrow();
    let window_s = (after.at - before.at).as_secs_f64();
    let cpu = after.broker.since(before.broker);
    let batches = totals.batches as f64;
    let mut latency = new_histogram();
    for h in &totals.latency {
        latency.add(h).context("histograms of one shape add up")?;
    }
    Ok(LoadResult {
        config: config.clone(),
        window_s,
        requests: totals.requests,
        batches: totals.batches,
        batches_per_s: batches / window_s,
        mean_batch_bytes: totals.bytes as f64 / batches.max(1.0),
        mb_per_s: totals.bytes as f64 / 1e6 / window_s,
        latency: Latency::of(&latency),
        generator_late: Latency::of(&totals.late),
        errors: totals.errors.iter().map(|(code, n)| (error_name(*code), *n)).collect(),
        unanswered: totals.unanswered,
        unsent: totals.unsent,
        acknowledged_batches: totals.acknowledged,
        slices: figures::slices(&marks, &totals.latency, config.batch_records),
        broker: (!config.pids.is_empty()).then(|| Broker {
            cpu,
            cpu_s: cpu.total(),
            cpu_us_per_batch: cpu.total() * 1e6 / batches.max(1.0),
            cpu_s_per_million_batches: cpu.total() * 1e6 / batches.max(1.0),
            cpu_s_per_gb: cpu.total() * 1e9 / (totals.bytes as f64).max(1.0),
            rss_before_mib: rss_before.unwrap_or(0.0),
            rss_max_mib: rss_max,
            open_files,
            storage_bytes_per_batch_byte: before
                .written
                .zip(after.written)
                .map(|(b, a)| a.saturating_sub(b) as f64 / (totals.bytes as f64).max(1.0)),
        }),
        generator_cpu_s: after.own.since(before.own).total(),
        host: after.host.since(before.host),
        // Threads that ended meanwhile take their time with them.
        kernel_threads_cpu_s: (after.kernel_threads_s - before.kernel_threads_s).max(0.0),
    })
}
