//! `consume`: a raw fetch consumer, for tailing behind a load and for draining a backlog.
//!
//! The calling thread owns everything. Every fetch names all its partitions (no fetch session), so the same work is
//! asked of every broker. Batches are walked by their headers; records are not decoded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, BytesMut};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::batch;
use crate::client::{CLIENT_ID, EARLIEST, LATEST, error_name};
use crate::route;
use crate::stats::{self, Cpu};
use crate::wire::{self, Reader};

const FETCH_VERSION: i16 = 12;
/// A frame beyond what was asked for by this much means the peer does not speak Kafka.
const FRAME_SLACK_BYTES: usize = 128 << 20;
/// An answer that takes longer never comes: `max_wait_ms` asks for one after a fraction of a second.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Distance of the points of a drain's progress.
const PROGRESS_STEP: Duration = Duration::from_millis(25);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    Earliest,
    Latest,
}

#[derive(Debug, Clone, Args, Serialize)]
pub struct ConsumeConfig {
    #[arg(long, default_value = "127.0.0.1:9092")]
    pub bootstrap: String,
    #[arg(long, default_value = "bench")]
    pub topic: String,
    #[arg(long, default_value_t = 100)]
    pub partitions: usize,
    /// To each broker that leads something.
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Stop at the offsets that were the end when this began, instead of by time.
    #[arg(long)]
    pub until_end: bool,
    /// Stop when no more than this many records are left to the moving end.
    #[arg(long, conflicts_with = "until_end")]
    pub until_lag: Option<u64>,
    #[arg(long, value_enum, default_value = "earliest")]
    pub from: From,
    #[arg(long, default_value_t = 1 << 20)]
    pub partition_max_bytes: i32,
    #[arg(long, default_value_t = 8 << 20)]
    pub max_bytes: i32,
    #[arg(long, default_value_t = 100)]
    pub max_wait_ms: i32,
    /// Process ids of the brokers, for CPU; repeatable.
    #[arg(long = "pid")]
    pub pids: Vec<u32>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ConsumeResult {
    pub seconds: f64,
    pub bytes: u64,
    pub records: u64,
    pub fetches: u64,
    pub mb_per_s: f64,
    pub mean_fetch_bytes: f64,
    pub broker_cpu_s_per_gb: Option<f64>,
    pub broker_cpu: Option<Cpu>,
    /// Whether `until_end` or `until_lag` was reached before time was up.
    pub reached: bool,
    /// How the first connection got on.
    pub progress: Vec<Progress>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Progress {
    pub seconds: f64,
    pub bytes: u64,
    pub lag_records: u64,
}

#[derive(Default)]
struct Count {
    bytes: u64,
    records: u64,
    fetches: u64,
}

/// Runs until time, end offsets or `stop`, on the calling thread.
pub fn run(config: &ConsumeConfig, stop: Option<Arc<AtomicBool>>) -> Result<ConsumeResult> {
    ensure!(config.partitions > 0 && config.connections > 0, "nothing to do");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let routes = route::routes(&config.bootstrap, &config.topic, config.partitions).await?;
        let offsets = |at| route::offsets(&config.bootstrap, &config.topic, config.partitions, at);
        let from = if config.from == From::Earliest { EARLIEST } else { LATEST };
        let begin = offsets(from).await?;
        let ends = match config.until_end {
            true => Some(offsets(LATEST).await?),
            false => None,
        };
        let before = stats::cpu_of(&config.pids)?;
        let start = Instant::now();
        let end = start + Duration::from_secs_f64(config.seconds);
        let stop = stop.unwrap_or_default();
        let mut tasks = Vec::new();
        let all = routes.len() * config.connections;
        for (route, c) in routes.iter().flat_map(|route| (0..config.connections).map(move |c| (route, c))) {
            let mine: Vec<Position> = (route.partitions.iter().skip(c))
                .step_by(config.connections)
                .map(|p| Position {
                    partition: *p as i32,
                    offset: begin[*p as usize],
                    end: ends.as_ref().map(|e| e[*p as usize]),
                    high_watermark: i64::MAX,
                })
                .collect();
            if mine.is_empty() {
                continue;
            }
            let (config, stop, address) = (config.clone(), stop.clone(), route.address.clone());
            tasks.push(tokio::task::spawn_local(async move {
                let mut f = Fetcher::connect(&address, mine).await?;
                let lag_max = config.until_lag.map(|lag| lag / all as u64);
                while !stop.load(Ordering::Acquire) {
                    f.reached = config.until_end && f.at_end() || lag_max.is_some_and(|max| f.lag() <= max);
                    if f.reached || !config.until_end && Instant::now() >= end {
                        break;
                    }
                    tokio::time::timeout(ANSWER_MAX, f.fetch(&config))
                        .await
                        .context("a Fetch was never answered")??;
                    f.note_progress(start, PROGRESS_STEP);
                }
                f.note_progress(start, Duration::ZERO);
                anyhow::Ok((f.count, f.reached, f.progress))
            }));
        }
        let mut sum = Count::default();
        let mut all_reached = true;
        let mut first_progress = None;
        for task in tasks {
            let (c, reached, progress) = task.await.context("a consumer's task failed")??;
            all_reached &= reached;
            first_progress.get_or_insert(progress);
            sum.bytes += c.bytes;
            sum.records += c.records;
            sum.fetches += c.fetches;
        }
        let seconds = start.elapsed().as_secs_f64();
        let cpu = stats::cpu_of(&config.pids)?.zip(before).map(|(after, before)| after.since(before));
        Ok(ConsumeResult {
            seconds,
            bytes: sum.bytes,
            records: sum.records,
            fetches: sum.fetches,
            mb_per_s: sum.bytes as f64 / 1e6 / seconds,
            mean_fetch_bytes: sum.bytes as f64 / sum.fetches.max(1) as f64,
            broker_cpu_s_per_gb: cpu.map(|c| c.total() * 1e9 / sum.bytes.max(1) as f64),
            broker_cpu: cpu,
            reached: all_reached,
            progress: first_progress.unwrap_or_default(),
        })
    })
}

struct Position {
    partition: i32,
    offset: i64,
    end: Option<i64>,
    /// As of the last answer; unknown (and so far away) before the first.
    high_watermark: i64,
}

struct Fetcher {
    stream: TcpStream,
    positions: Vec<Position>,
    /// Where the next request starts naming partitions: rotated, so that the byte limit starves none.
    first: usize,
    correlation_id: i32,
    input: BytesMut,
    count: Count,
    reached: bool,
    progress: Vec<Progress>,
}

impl Fetcher {
    async fn connect(address: &str, positions: Vec<Position>) -> Result<Self> {
        let stream = TcpStream::connect(address).await.context(address.to_string())?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            positions,
            first: 0,
            correlation_id: 0,
            input: BytesMut::new(),
            count: Count::default(),
            reached: false,
            progress: Vec::new(),
        })
    }

    /// Records between the positions and the ends as the last answers named them.
    fn lag(&self) -> u64 {
        let behind = |p: &Position| p.high_watermark.saturating_sub(p.offset).max(0) as u64;
        self.positions.iter().map(behind).fold(0, u64::saturating_add)
    }

    fn note_progress(&mut self, start: Instant, step: Duration) {
        let at = start.elapsed();
        let last = self.progress.last().map_or(0.0, |p| p.seconds);
        if at.as_secs_f64() - last >= step.as_secs_f64() {
            let (bytes, lag_records) = (self.count.bytes, self.lag());
            self.progress.push(Progress { seconds: at.as_secs_f64(), bytes, lag_records });
        }
    }

    fn at_end(&self) -> bool {
        self.positions.iter().all(|p| p.end.is_some_and(|e| p.offset >= e))
    }

    async fn fetch(&mut self, config: &ConsumeConfig) -> Result<()> {
        self.correlation_id += 1;
        let mut buf = BytesMut::new();
        wire::start_request(&mut buf, wire::FETCH, FETCH_VERSION, self.correlation_id, CLIENT_ID);
        buf.put_i32(-1);
        buf.put_i32(config.max_wait_ms);
        buf.put_i32(1);
        buf.put_i32(config.max_bytes);
        buf.put_u8(0);
        buf.put_i32(0);
        buf.put_i32(-1);
        wire::put_uvarint(&mut buf, 2);
        wire::put_compact_str(&mut buf, &config.topic);
        let n = self.positions.len();
        let open: Vec<usize> = (0..n)
            .map(|i| (self.first + i) % n)
            .filter(|i| self.positions[*i].end.is_none_or(|e| self.positions[*i].offset < e))
            .collect();
        self.first = (self.first + 1) % n;
        wire::put_uvarint(&mut buf, open.len() as u32 + 1);
        for i in open {
            let p = &self.positions[i];
            buf.put_i32(p.partition);
            buf.put_i32(-1);
            buf.put_i64(p.offset);
            buf.put_i32(-1);
            buf.put_i64(-1);
            buf.put_i32(config.partition_max_bytes);
            buf.put_u8(0);
        }
        // No forgotten topics, no rack, no tagged fields.
        buf.put_slice(&[0, 1, 1, 0]);
        wire::finish_frame(&mut buf, 0, 0);
        self.stream.write_all(&buf).await?;

        let len = self.stream.read_i32().await.context("the broker closed the connection")?;
        let max = config.max_bytes as usize + FRAME_SLACK_BYTES;
        let len = usize::try_from(len).ok().filter(|l| *l <= max).context("an impossible frame length")?;
        self.input.clear();
        self.input.reserve(len);
        while self.input.len() < len {
            let mut limited = (&mut self.stream).take((len - self.input.len()) as u64);
            if limited.read_buf(&mut self.input).await? == 0 {
                bail!("the broker closed the connection inside an answer");
            }
        }
        let input = std::mem::take(&mut self.input);
        let outcome = self.answer(&input[..]);
        self.input = input;
        outcome
    }

    fn answer(&mut self, frame: &[u8]) -> Result<()> {
        let mut r = Reader(frame);
        ensure!(r.i32()? == self.correlation_id, "answer to another request");
        r.tags()?;
        r.i32()?;
        let code = r.i16()?;
        ensure!(code == 0, "Fetch: {}", error_name(code));
        r.i32()?;
        self.count.fetches += 1;
        for _ in 0..r.compact_len()?.unwrap_or(0) {
            r.compact_bytes()?;
            for _ in 0..r.compact_len()?.unwrap_or(0) {
                let partition = r.i32()?;
                let code = r.i16()?;
                ensure!(code == 0, "Fetch of partition {partition}: {}", error_name(code));
                let high_watermark = r.i64()?;
                r.take(16)?;
                for _ in 0..r.compact_len()?.unwrap_or(0) {
                    r.take(16)?;
                    r.tags()?;
                }
                r.i32()?;
                let records = r.compact_bytes()?.unwrap_or_default();
                r.tags()?;
                self.take(partition, high_watermark, records)?;
            }
            r.tags()?;
        }
        Ok(())
    }

    fn take(&mut self, partition: i32, high_watermark: i64, mut records: &[u8]) -> Result<()> {
        let position = self
            .positions
            .iter_mut()
            .find(|p| p.partition == partition)
            .with_context(|| format!("partition {partition} was not asked for"))?;
        position.high_watermark = high_watermark;
        while let Some(h) = batch::header(records) {
            // Kafka may cut the last batch short at the byte limit.
            let Some((_, rest)) = records.split_at_checked(h.total_bytes) else { break };
            records = rest;
            let next = h.base_offset + h.records;
            ensure!(
                h.base_offset <= position.offset || self.count.records == 0,
                "partition {partition}: offset {} follows {}",
                h.base_offset,
                position.offset
            );
            if next > position.offset {
                self.count.records += (next - position.offset.max(h.base_offset)) as u64;
                self.count.bytes += h.total_bytes as u64;
                position.offset = next;
            }
        }
        Ok(())
    }
}
