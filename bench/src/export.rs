//! `export`: how fast, at what cost and how soon records become rows in ClickHouse.
//!
//! Two phases, each on a topic and table of its own. *Backlog*: the records are produced first, then the export is
//! turned on, so its CPU is the export's alone; ClickHouse is asked for `count()` until every row is there.
//! *Live*: records are produced on a schedule and ClickHouse is polled for the highest offset of each partition, so
//! a record's visibility is known to [`VISIBLE_POLL`]. The calling thread does everything but the live producing.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use crate::batch::{self, Record};
use crate::client::Client;
use crate::load::{self, Latency};
use crate::peer::produce_one;
use crate::stats::{self, Cpu};

const BATCH_ROWS: u64 = 500;
/// Small next to the target lag, large next to the query.
const VISIBLE_POLL: Duration = Duration::from_millis(20);
const COUNT_POLL: Duration = Duration::from_millis(100);
/// Without one new row for this long, the export is called stuck and its status is shown.
const STUCK: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// About 200 bytes of JSON.
    Small,
    /// About 1.5 KB of JSON.
    Large,
}

#[derive(Debug, Clone, Args, Serialize)]
pub struct ExportConfig {
    #[arg(long, default_value = "127.0.0.1:9092")]
    pub bootstrap: String,
    #[arg(long, default_value = "127.0.0.1:9644")]
    pub admin: String,
    /// ClickHouse's HTTP interface, as this program reaches it; the broker uses its own setting.
    #[arg(long, env = "CLICKHOUSE_URL", default_value = "http://127.0.0.1:8123", hide_env_values = true)]
    pub clickhouse: String,
    #[arg(long, default_value = "export_bench")]
    pub topic: String,
    #[arg(long, default_value_t = 16)]
    pub partitions: usize,
    /// Rows of the backlog; 0 leaves that phase out.
    #[arg(long, default_value_t = 1_000_000)]
    pub rows: u64,
    #[arg(long, value_enum, default_value = "small")]
    pub shape: Shape,
    /// Rows a second of the live phase, repeatable.
    #[arg(long = "live-rate")]
    pub live_rates: Vec<f64>,
    #[arg(long, default_value_t = 10.0)]
    pub live_seconds: f64,
    /// Process ids for CPU.
    #[arg(long)]
    pub pid: Option<u32>,
    #[arg(long)]
    pub engine_pid: Option<u32>,
    /// More settings of the export: key=value, repeatable.
    #[arg(long = "export-config", value_parser = load::key_value)]
    pub export_configs: Vec<(String, String)>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Backlog {
    pub rows: u64,
    pub seconds: f64,
    pub rows_per_s: f64,
    pub mean_row_bytes: f64,
    pub missing: i64,
    pub duplicates: i64,
    pub broker_cpu_s_per_million_rows: Option<f64>,
    pub engine_cpu_s_per_million_rows: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Live {
    pub rate: f64,
    pub rows: u64,
    pub visible: Latency,
    pub missing: i64,
    pub duplicates: i64,
    pub broker_cpu_s_per_million_rows: Option<f64>,
    pub engine_cpu_s_per_million_rows: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ExportResult {
    pub config: ExportConfig,
    pub backlog: Option<Backlog>,
    pub live: Vec<Live>,
}

const COLUMNS: &str = "id UInt64, store UInt32, item UInt32, kind LowCardinality(String), quantity Int32, \
                       price Decimal(10, 2), at DateTime64(3), register String, note String";

fn row(shape: Shape, id: u64, now_ms: i64, out: &mut Vec<u8>) {
    use std::io::Write;
    const KINDS: [&str; 4] = ["purchase", "return", "transfer", "adjustment"];
    const NOTE: &str = "shelf 4, counted twice; ";
    let mix = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let (store, item) = ((mix >> 40) % 2_000, (mix >> 16) % 50_000);
    let kind = KINDS[(mix >> 60) as usize % KINDS.len()];
    let quantity = (mix % 41) as i64 - 20;
    let (whole, cents) = (mix >> 8 & 0x1ff, mix >> 20 & 0x3f);
    let notes = if shape == Shape::Small { 3 } else { 56 };
    // Writing to a Vec cannot fail.
    let _ = write!(
        out,
        "{{\"id\":{id},\"store\":{store},\"item\":{item},\"kind\":\"{kind}\",\"quantity\":{quantity},\
         \"price\":{whole}.{cents:02},\"at\":{now_ms},\"register\":\"till-{}\",\"note\":\"",
        store % 30
    );
    for _ in 0..notes {
        out.extend_from_slice(NOTE.as_bytes());
    }
    out.extend_from_slice(b"\"}");
}

fn rows(shape: Shape, first: u64, count: u64) -> (bytes::Bytes, u64) {
    let now_ms = load::now_ms();
    let mut text = Vec::new();
    let mut ends = Vec::new();
    for id in first..first + count {
        row(shape, id, now_ms, &mut text);
        ends.push(text.len());
    }
    let mut from = 0;
    let records = ends.iter().map(|end| {
        let value = &text[from..*end];
        from = *end;
        Record { key: None, value }
    });
    (batch::encode(records, now_ms), text.len() as u64)
}

struct Http {
    agent: ureq::Agent,
    clickhouse: String,
    admin: String,
}

impl Http {
    fn new(config: &ExportConfig) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(60)))
            .http_status_as_error(false)
            .build()
            .into();
        Self { agent, clickhouse: config.clickhouse.clone(), admin: config.admin.clone() }
    }

    fn query(&self, sql: &str) -> Result<String> {
        let mut answer = self
            .agent
            .post(&self.clickhouse)
            .send(sql)
            .with_context(|| format!("ClickHouse at {}", self.clickhouse))?;
        let text = answer.body_mut().read_to_string()?;
        ensure!(answer.status().is_success(), "ClickHouse says {}: {text}\nto: {sql}", answer.status());
        Ok(text)
    }

    fn number(&self, sql: &str) -> Result<i64> {
        let text = self.query(sql)?;
        text.trim().parse().with_context(|| format!("not a number: {text}"))
    }

    fn enable(&self, topic: &str, extra: &[(String, String)]) -> Result<()> {
        let url = format!("http://{}/v1/exports/{topic}", self.admin);
        let mut body = json!({ "table": topic, "auto_create": true, "columns": COLUMNS });
        for (k, v) in extra {
            body[k] = json!(v);
        }
        let mut answer = self.agent.put(&url).send_json(&body).with_context(|| url.clone())?;
        let text = answer.body_mut().read_to_string()?;
        ensure!(answer.status().is_success(), "PUT {url}: {} {text}", answer.status());
        Ok(())
    }

    fn status(&self, topic: &str) -> String {
        let url = format!("http://{}/v1/exports/{topic}/status", self.admin);
        match self.agent.get(&url).call().map(|mut a| a.body_mut().read_json::<Value>()) {
            Ok(Ok(v)) => v.to_string(),
            Ok(Err(e)) => format!("{url}: {e}"),
            Err(e) => format!("{url}: {e}"),
        }
    }

    /// Rows too few and rows too many, by the unique id that every row carries.
    fn audit(&self, table: &str, rows: u64) -> Result<(i64, i64)> {
        let unique = self.number(&format!("SELECT uniqExact(id) FROM {table} FORMAT TabSeparated"))?;
        let count = self.number(&format!("SELECT count() FROM {table} FORMAT TabSeparated"))?;
        Ok((rows as i64 - unique, count - unique))
    }
}

struct Meter {
    config: ExportConfig,
    broker: Option<Cpu>,
    engine: Option<Cpu>,
}

impl Meter {
    fn start(config: &ExportConfig) -> Result<Self> {
        let cpu = |pid: Option<u32>| pid.map(stats::cpu).transpose();
        Ok(Self { config: config.clone(), broker: cpu(config.pid)?, engine: cpu(config.engine_pid)? })
    }

    fn per_million(&self, rows: u64) -> Result<(Option<f64>, Option<f64>)> {
        let per = |pid: Option<u32>, before: Option<Cpu>| -> Result<Option<f64>> {
            let (Some(pid), Some(before)) = (pid, before) else { return Ok(None) };
            Ok(Some(stats::cpu(pid)?.since(before).total() * 1e6 / rows.max(1) as f64))
        };
        Ok((per(self.config.pid, self.broker)?, per(self.config.engine_pid, self.engine)?))
    }
}

pub fn run(config: &ExportConfig) -> Result<ExportResult> {
    ensure!(config.partitions > 0, "no partitions");
    let safe = |c: char| c.is_ascii_alphanumeric() || c == '_';
    ensure!(config.topic.chars().all(safe), "the topic names a table: letters, digits and _ only");
    let http = Http::new(config);
    http.query("SELECT 1")?;
    let backlog = if config.rows > 0 { Some(backlog(config, &http)?) } else { None };
    let mut live_results = Vec::new();
    for (i, rate) in config.live_rates.iter().enumerate() {
        live_results.push(live(config, &http, i, *rate)?);
    }
    Ok(ExportResult { config: config.clone(), backlog, live: live_results })
}

fn backlog(config: &ExportConfig, http: &Http) -> Result<Backlog> {
    let topic = format!("{}_backlog", config.topic);
    http.query(&format!("DROP TABLE IF EXISTS {topic}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bytes = runtime.block_on(async {
        let mut client = Client::connect(&config.bootstrap).await?;
        client.ensure_topic(&topic, config.partitions, 1, &[]).await?;
        let (mut bytes, mut sent) = (0, 0);
        while sent < config.rows {
            let n = BATCH_ROWS.min(config.rows - sent);
            let (batch, text_bytes) = rows(config.shape, sent, n);
            let partition = (sent / BATCH_ROWS) as usize % config.partitions;
            produce_one(&mut client, &topic, partition as i32, &batch).await?;
            bytes += text_bytes;
            sent += n;
        }
        anyhow::Ok(bytes)
    })?;

    let meter = Meter::start(config)?;
    let start = Instant::now();
    http.enable(&topic, &config.export_configs)?;
    let (mut seen, mut news) = (0, Instant::now());
    loop {
        // The table may not be there in the first moments.
        let count = http.number(&format!("SELECT count() FROM {topic} FORMAT TabSeparated")).unwrap_or(0);
        if count >= config.rows as i64 {
            break;
        }
        if count > seen {
            (seen, news) = (count, Instant::now());
        } else if news.elapsed() > STUCK {
            bail!(
                "{seen} of {} rows, and none for {STUCK:?}; export status: {}",
                config.rows,
                http.status(&topic)
            );
        }
        std::thread::sleep(COUNT_POLL);
    }
    let seconds = start.elapsed().as_secs_f64();
    let (broker, engine) = meter.per_million(config.rows)?;
    let (missing, duplicates) = http.audit(&topic, config.rows)?;
    Ok(Backlog {
        rows: config.rows,
        seconds,
        rows_per_s: config.rows as f64 / seconds,
        mean_row_bytes: bytes as f64 / config.rows as f64,
        missing,
        duplicates,
        broker_cpu_s_per_million_rows: broker,
        engine_cpu_s_per_million_rows: engine,
    })
}

/// A batch that the broker has acknowledged.
struct Acked {
    partition: usize,
    last_offset: i64,
    at: Instant,
}

fn live(config: &ExportConfig, http: &Http, index: usize, rate: f64) -> Result<Live> {
    ensure!(rate > 0.0, "a live rate must be positive");
    let topic = format!("{}_live_{index}", config.topic);
    http.query(&format!("DROP TABLE IF EXISTS {topic}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        Client::connect(&config.bootstrap).await?.ensure_topic(&topic, config.partitions, 1, &[]).await
    })?;
    http.enable(&topic, &config.export_configs)?;

    // At low rates one record a batch; at high ones a batch every two milliseconds.
    let batch_rows = (rate / 500.0).ceil().max(1.0) as u64;
    let batches = (rate * config.live_seconds / batch_rows as f64).ceil() as u64;
    let total = batches * batch_rows;
    let meter = Meter::start(config)?;
    let (acked, answers) = mpsc::channel();
    let producer = std::thread::spawn({
        let (config, topic) = (config.clone(), topic.clone());
        move || produce_live(&config, &topic, rate, batch_rows, batches, &acked)
    });
    let mut waiting: Vec<VecDeque<Acked>> = (0..config.partitions).map(|_| VecDeque::new()).collect();
    let mut histogram = load::new_histogram();
    let (mut visible, mut news) = (0, Instant::now());
    let maxima =
        format!("SELECT _partition, max(_offset) FROM {topic} GROUP BY _partition FORMAT TabSeparated");
    while visible < batches {
        for a in answers.try_iter() {
            waiting[a.partition].push_back(a);
        }
        let answer = http.query(&maxima).unwrap_or_default();
        let now = Instant::now();
        for line in answer.lines() {
            let Some((p, offset)) = line.split_once('\t') else { continue };
            let (p, offset): (usize, i64) = (p.parse()?, offset.parse()?);
            let Some(queue) = waiting.get_mut(p) else { continue };
            while queue.front().is_some_and(|a| a.last_offset <= offset) {
                if let Some(a) = queue.pop_front() {
                    histogram.saturating_record(now.saturating_duration_since(a.at).as_micros() as u64);
                    (visible, news) = (visible + 1, now);
                }
            }
        }
        if news.elapsed() > STUCK {
            bail!(
                "{visible} of {batches} batches visible, and none for {STUCK:?}; status: {}",
                http.status(&topic)
            );
        }
        std::thread::sleep(VISIBLE_POLL);
    }
    producer.join().map_err(|_| anyhow::anyhow!("the live producer panicked"))??;
    let (broker, engine) = meter.per_million(total)?;
    let (missing, duplicates) = http.audit(&topic, total)?;
    Ok(Live {
        rate,
        rows: total,
        visible: Latency::of(&histogram),
        missing,
        duplicates,
        broker_cpu_s_per_million_rows: broker,
        engine_cpu_s_per_million_rows: engine,
    })
}

/// Offsets are counted here: this is the topic's only producer, and its batches to a partition go one by one.
fn produce_live(
    config: &ExportConfig,
    topic: &str,
    rate: f64,
    batch_rows: u64,
    batches: u64,
    acked: &mpsc::Sender<Acked>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::connect(&config.bootstrap).await?;
        let mut next = vec![0i64; config.partitions];
        let start = Instant::now();
        for i in 0..batches {
            let due = start + Duration::from_secs_f64((i * batch_rows) as f64 / rate);
            tokio::time::sleep_until(due.into()).await;
            let partition = i as usize % config.partitions;
            let (batch, _) = rows(config.shape, i * batch_rows, batch_rows);
            // From before the request: acknowledgement counts as waiting too.
            let at = Instant::now();
            produce_one(&mut client, topic, partition as i32, &batch).await?;
            next[partition] += batch_rows as i64;
            if acked.send(Acked { partition, last_offset: next[partition] - 1, at }).is_err() {
                break;
            }
        }
        Ok(())
    })
}

pub fn print(r: &ExportResult) {
    let per = |v: Option<f64>| v.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
    if let Some(b) = &r.backlog {
        println!(
            "backlog: {} rows of {:.0} bytes in {:.2} s = {:.0} rows/s; CPU-s per million rows: broker {}, engine {}; \
             missing {}, duplicates {}",
            b.rows,
            b.mean_row_bytes,
            b.seconds,
            b.rows_per_s,
            per(b.broker_cpu_s_per_million_rows),
            per(b.engine_cpu_s_per_million_rows),
            b.missing,
            b.duplicates
        );
    }
    for l in &r.live {
        println!(
            "live at {:.0} rows/s: visible p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms; CPU-s per million rows: broker \
             {}, engine {}; missing {}, duplicates {}",
            l.rate,
            l.visible.p50_ms,
            l.visible.p99_ms,
            l.visible.max_ms,
            per(l.broker_cpu_s_per_million_rows),
            per(l.engine_cpu_s_per_million_rows),
            l.missing,
            l.duplicates
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_json_of_the_named_size() {
        for (shape, low, high) in [(Shape::Small, 180, 240), (Shape::Large, 1_400, 1_600)] {
            for id in [0, 1, 999_999, u64::MAX / 3] {
                let mut out = Vec::new();
                row(shape, id, 1_800_000_000_000, &mut out);
                let v: Value = serde_json::from_slice(&out).unwrap();
                assert_eq!(v["id"].as_u64(), Some(id));
                assert_eq!(v.as_object().unwrap().len(), COLUMNS.replace("(10, 2)", "").split(',').count());
                assert!((low..=high).contains(&out.len()), "{} bytes", out.len());
            }
        }
    }
}
