//! `load`: the produce generator. Many connections on one thread, pre-encoded batches, closed or open loop.
//!
//! The thread that calls [`run`] owns everything here (one tokio `current_thread` runtime with a `LocalSet`), so the
//! counters need no lock. Every connection keeps at most `in_flight` requests unanswered. Latency is measured from
//! the intended send time (open loop) or from the moment the request was queued for the socket (closed loop).

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, BytesMut};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::batch::{self, Template};
use crate::client::{CLIENT_ID, Client, error_name};
use crate::outbox::Outbox;
use crate::pace::{self, Due};
use crate::plan::{Keyed, Plan};
use crate::stats::{self, Cpu, Host};
use crate::wire::{self, Reader};

/// Answers to Produce are small; a larger claim means the peer does not speak Kafka.
const ANSWER_BYTES_MAX: usize = 16 << 20;
const READ_BYTES: usize = 64 << 10;
const REQUEST_TIMEOUT_MS: i32 = 30_000;
/// How long answers are awaited after the last request before they are counted as missing.
const LAST_ANSWERS_WAIT: Duration = Duration::from_secs(60);
/// Latencies beyond this are recorded as this.
const LATENCY_US_MAX: u64 = 600_000_000;
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
    /// Process id of the broker, for CPU and memory.
    #[arg(long)]
    pub pid: Option<u32>,
}

pub fn key_value(s: &str) -> Result<(String, String), String> {
    s.split_once('=').map(|(k, v)| (k.into(), v.into())).ok_or_else(|| format!("{s} is not key=value"))
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Latency {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
}

impl Latency {
    pub fn of(h: &Histogram<u64>) -> Self {
        let ms = |q: f64| h.value_at_quantile(q) as f64 / 1000.0;
        Self { p50_ms: ms(0.5), p99_ms: ms(0.99), p999_ms: ms(0.999), max_ms: h.max() as f64 / 1000.0 }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Broker {
    pub cpu: Cpu,
    pub cpu_s: f64,
    pub cpu_us_per_batch: f64,
    pub cpu_s_per_million_batches: f64,
    pub cpu_s_per_gb: f64,
    pub rss_before_mib: f64,
    pub rss_max_mib: f64,
    pub storage_bytes_per_batch_byte: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct LoadResult {
    pub config: LoadConfig,
    pub window_s: f64,
    pub requests: u64,
    pub batches: u64,
    pub batches_per_s: f64,
    pub mean_batch_bytes: f64,
    pub mb_per_s: f64,
    pub latency: Latency,
    /// Open loop: how late the generator itself was; a large figure spoils the latency above.
    pub generator_late: Latency,
    /// Failed batches of the whole run, by Kafka error.
    pub errors: BTreeMap<String, u64>,
    /// Requests never answered, and scheduled ones never sent.
    pub unanswered: u64,
    pub unsent: u64,
    pub batches_each_second: Vec<u64>,
    pub broker: Option<Broker>,
    pub generator_cpu_s: f64,
    /// The whole machine during the window, everything on it included.
    pub host: Host,
}

/// Counters of the whole run; one thread.
struct Totals {
    window: (Instant, Instant),
    requests: u64,
    batches: u64,
    bytes: u64,
    latency: Histogram<u64>,
    late: Histogram<u64>,
    errors: BTreeMap<i16, u64>,
    unanswered: u64,
    unsent: u64,
    each_second: Vec<u64>,
}

impl Totals {
    fn answered(&mut self, now: Instant, sent: &Sent) {
        if now < self.window.0 || now >= self.window.1 {
            return;
        }
        self.requests += 1;
        self.batches += u64::from(sent.batches);
        self.bytes += sent.bytes;
        self.latency.saturating_record((now - sent.intended).as_micros().min(LATENCY_US_MAX as u128) as u64);
        if let Some(slot) = self.each_second.get_mut((now - self.window.0).as_secs() as usize) {
            *slot += u64::from(sent.batches);
        }
    }
}

struct Sent {
    intended: Instant,
    batches: u32,
    bytes: u64,
}

pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("constant bounds are valid")
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, drive(config, started))
}

async fn drive(config: &LoadConfig, started: Option<Arc<AtomicBool>>) -> Result<LoadResult> {
    let mut control = Client::connect(&config.bootstrap).await?;
    control.ensure_topic(&config.topic, config.partitions, &config.topic_configs).await?;

    let key = (config.keyed != Keyed::None).then_some(&b"key-1234"[..]);
    let batch = batch::encode_filler(config.batch_records, config.record_bytes, key, now_ms());
    let deltas = batch::sequence_deltas(batch.len());
    let plan = Rc::new(Plan::new(
        config.keyed,
        config.partitions,
        config.partitions_per_request,
        config.partitions as u64,
    ));

    let mut connections = Vec::with_capacity(config.connections);
    for id in 0..config.connections {
        let template = if config.idempotent {
            let (producer_id, epoch) = control.producer_id().await?;
            Template::idempotent(&batch, producer_id, epoch, &deltas)
        } else {
            Template::plain(&batch)
        };
        let stream = TcpStream::connect(&config.bootstrap)
            .await
            .with_context(|| format!("connection {id} to {}", config.bootstrap))?;
        stream.set_nodelay(true)?;
        connections.push(Connection {
            id,
            stream,
            template,
            plan: plan.clone(),
            topic: config.topic.clone(),
            version: config.produce_version,
            acks: config.acks,
            sequences: if config.idempotent { vec![0; config.partitions] } else { Vec::new() },
            turn: 0,
            correlation_id: 0,
            in_flight: VecDeque::new(),
            in_flight_max: config.in_flight,
            out: Outbox::default(),
            input: BytesMut::with_capacity(READ_BYTES),
        });
    }

    let rss_before = config.pid.map(stats::rss_mib).transpose()?;
    let start = Instant::now();
    let w0 = start + Duration::from_secs_f64(config.warmup_seconds);
    let w1 = w0 + Duration::from_secs_f64(config.seconds);
    let totals = Rc::new(RefCell::new(Totals {
        window: (w0, w1),
        requests: 0,
        batches: 0,
        bytes: 0,
        latency: new_histogram(),
        late: new_histogram(),
        errors: BTreeMap::new(),
        unanswered: 0,
        unsent: 0,
        each_second: vec![0; config.seconds.ceil() as usize],
    }));
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
    let before = Sample::take(config.pid)?;
    let mut rss_max = rss_before.unwrap_or(0.0);
    while Instant::now() < w1 {
        let next = (Instant::now() + RSS_SAMPLE).min(w1);
        tokio::time::sleep_until(next.into()).await;
        if let Some(pid) = config.pid {
            rss_max = rss_max.max(stats::rss_mib(pid)?);
        }
    }
    let after = Sample::take(config.pid)?;
    for task in tasks {
        task.await.context("a connection's task failed")??;
    }

    let totals = totals.borrow();
    let window_s = (after.at - before.at).as_secs_f64();
    let cpu = after.broker.since(before.broker);
    let batches = totals.batches as f64;
    Ok(LoadResult {
        config: config.clone(),
        window_s,
        requests: totals.requests,
        batches: totals.batches,
        batches_per_s: batches / window_s,
        mean_batch_bytes: totals.bytes as f64 / batches.max(1.0),
        mb_per_s: totals.bytes as f64 / 1e6 / window_s,
        latency: Latency::of(&totals.latency),
        generator_late: Latency::of(&totals.late),
        errors: totals.errors.iter().map(|(code, n)| (error_name(*code), *n)).collect(),
        unanswered: totals.unanswered,
        unsent: totals.unsent,
        batches_each_second: totals.each_second.clone(),
        broker: config.pid.map(|_| Broker {
            cpu,
            cpu_s: cpu.total(),
            cpu_us_per_batch: cpu.total() * 1e6 / batches.max(1.0),
            cpu_s_per_million_batches: cpu.total() * 1e6 / batches.max(1.0),
            cpu_s_per_gb: cpu.total() * 1e9 / (totals.bytes as f64).max(1.0),
            rss_before_mib: rss_before.unwrap_or(0.0),
            rss_max_mib: rss_max,
            storage_bytes_per_batch_byte: before
                .written
                .zip(after.written)
                .map(|(b, a)| a.saturating_sub(b) as f64 / (totals.bytes as f64).max(1.0)),
        }),
        generator_cpu_s: after.own.since(before.own).total(),
        host: after.host.since(before.host),
    })
}

struct Sample {
    at: Instant,
    broker: Cpu,
    own: Cpu,
    written: Option<u64>,
    host: Host,
}

impl Sample {
    fn take(pid: Option<u32>) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            broker: pid.map(stats::cpu).transpose()?.unwrap_or_default(),
            own: stats::cpu(std::process::id())?,
            written: pid.and_then(stats::written_bytes),
            host: stats::host(),
        })
    }
}

struct Connection {
    id: usize,
    stream: TcpStream,
    template: Template,
    plan: Rc<Plan>,
    topic: String,
    version: i16,
    acks: i16,
    /// Next sequence of each partition; empty without idempotence.
    sequences: Vec<i32>,
    turn: u64,
    correlation_id: i32,
    in_flight: VecDeque<Sent>,
    in_flight_max: usize,
    out: Outbox,
    input: BytesMut,
}

enum Event {
    Read(usize),
    Due,
}

impl Connection {
    async fn run(mut self, due: Option<Rc<Due>>, end: Instant, totals: Rc<RefCell<Totals>>) -> Result<()> {
        let id = self.id;
        let work = self.work(due.as_deref(), end, &totals);
        let outcome = tokio::time::timeout_at((end + LAST_ANSWERS_WAIT).into(), work).await;
        match outcome {
            Ok(result) => result.with_context(|| format!("connection {id}"))?,
            Err(_) => totals.borrow_mut().unanswered += self.in_flight.len() as u64,
        }
        if let Some(due) = due {
            totals.borrow_mut().unsent += due.queue.borrow().len() as u64;
        }
        Ok(())
    }

    async fn work(&mut self, due: Option<&Due>, end: Instant, totals: &RefCell<Totals>) -> Result<()> {
        let mut now = Instant::now();
        loop {
            while self.in_flight.len() < self.in_flight_max && now < end {
                let intended = match due {
                    Some(due) => match due.queue.borrow_mut().pop_front() {
                        Some(at) => at,
                        None => break,
                    },
                    None => now,
                };
                if due.is_some() {
                    let late = now.saturating_duration_since(intended).as_micros() as u64;
                    totals.borrow_mut().late.saturating_record(late);
                }
                self.request(intended);
            }
            if self.in_flight.is_empty() && now >= end {
                return Ok(());
            }
            match self.event(due, end).await? {
                Event::Due => now = Instant::now(),
                Event::Read(0) => bail!("the broker closed the connection"),
                Event::Read(_) => {
                    now = Instant::now();
                    self.answers(now, &mut totals.borrow_mut())?;
                }
            }
        }
    }

    /// Waits until bytes have come, or until there is something to send.
    async fn event(&mut self, due: Option<&Due>, end: Instant) -> Result<Event> {
        let idle_end = self.in_flight.is_empty().then_some(end);
        let stream = &mut self.stream;
        let (out, input) = (&mut self.out, &mut self.input);
        let room = self.in_flight.len() < self.in_flight_max;
        let wait = poll_fn(|cx| {
            if let Poll::Ready(Err(e)) = out.poll_flush(cx, stream) {
                return Poll::Ready(Err(e));
            }
            if let (Some(due), true) = (due, room) {
                if !due.queue.borrow().is_empty() && Instant::now() < end {
                    return Poll::Ready(Ok(Event::Due));
                }
                due.wake_with(cx.waker());
            }
            input.reserve(READ_BYTES);
            poll_read(stream, cx, input).map_ok(Event::Read)
        });
        match idle_end {
            // Nothing will come from the broker, so the end of the run must wake us.
            Some(end) => match tokio::time::timeout_at(end.into(), wait).await {
                Ok(event) => Ok(event?),
                Err(_) => Ok(Event::Due),
            },
            None => Ok(wait.await?),
        }
    }

    fn request(&mut self, intended: Instant) {
        let partitions = self.plan.partitions(self.id, self.turn);
        self.turn += 1;
        let out = &mut self.out;
        out.seal();
        let batch_bytes = self.template.total_bytes();
        let buf = &mut out.scratch;
        wire::start_request(buf, wire::PRODUCE, self.version, self.correlation_id, CLIENT_ID);
        self.correlation_id = self.correlation_id.wrapping_add(1);
        buf.put_u8(0);
        buf.put_i16(self.acks);
        buf.put_i32(REQUEST_TIMEOUT_MS);
        wire::put_uvarint(buf, 2);
        wire::put_compact_str(buf, &self.topic);
        wire::put_uvarint(buf, partitions.len() as u32 + 1);
        // Large payloads leave `scratch`, so the length is known by arithmetic, not by looking back.
        let head = buf.len();
        let length_bytes = uvarint_bytes(batch_bytes as u32 + 1);
        let total = head + partitions.len() * (4 + length_bytes + batch_bytes + 1) + 2;
        buf[0..4].copy_from_slice(&((total - 4) as i32).to_be_bytes());
        for &p in partitions {
            let buf = &mut out.scratch;
            buf.put_i32(p as i32);
            wire::put_uvarint(buf, batch_bytes as u32 + 1);
            let sequence = match self.sequences.get_mut(p as usize) {
                Some(next) => {
                    let sequence = *next;
                    // Sequences wrap to 0 after i32::MAX, as Kafka counts them.
                    *next =
                        ((i64::from(sequence) + i64::from(self.template.record_count)) % (1 << 31)) as i32;
                    sequence
                }
                None => -1,
            };
            buf.put_slice(&self.template.header(sequence));
            out.payload(&self.template.records);
            out.scratch.put_u8(0);
        }
        out.scratch.put_slice(&[0, 0]);
        self.in_flight.push_back(Sent {
            intended,
            batches: partitions.len() as u32,
            bytes: (partitions.len() * batch_bytes) as u64,
        });
    }

    fn answers(&mut self, now: Instant, totals: &mut Totals) -> Result<()> {
        while self.input.len() >= 4 {
            let len = i32::from_be_bytes([self.input[0], self.input[1], self.input[2], self.input[3]]);
            ensure!((4..=ANSWER_BYTES_MAX as i32).contains(&len), "an answer claims {len} bytes");
            let whole = 4 + len as usize;
            if self.input.len() < whole {
                break;
            }
            let sent = self.in_flight.pop_front().context("an answer to no request")?;
            let mut correct = 0u32;
            let expected = self.correlation_id.wrapping_sub(self.in_flight.len() as i32 + 1);
            parse_answer(&self.input[4..whole], expected, self.version, |code| match code {
                0 => correct += 1,
                code => *totals.errors.entry(code).or_default() += 1,
            })?;
            let per_batch = sent.bytes / u64::from(sent.batches.max(1));
            let ok =
                Sent { intended: sent.intended, batches: correct, bytes: per_batch * u64::from(correct) };
            totals.answered(now, &ok);
            self.input.advance(whole);
        }
        Ok(())
    }
}

fn uvarint_bytes(mut v: u32) -> usize {
    let mut n = 1;
    while v >= 0x80 {
        v >>= 7;
        n += 1;
    }
    n
}

/// Reads once into the spare room of `buf`; polled anew each time, since a pending read holds nothing.
pub fn poll_read(
    stream: &mut TcpStream,
    cx: &mut std::task::Context<'_>,
    buf: &mut BytesMut,
) -> Poll<std::io::Result<usize>> {
    std::pin::pin!(stream.read_buf(buf)).poll(cx)
}

/// Walks a flexible Produce answer (versions 9 to 12) and reports each partition's error code.
pub fn parse_answer(
    frame: &[u8],
    correlation_id: i32,
    version: i16,
    mut code: impl FnMut(i16),
) -> Result<()> {
    let mut r = Reader(frame);
    ensure!(r.i32()? == correlation_id, "answers came out of order (version {version})");
    r.tags()?;
    for _ in 0..r.compact_len()?.unwrap_or(0) {
        r.compact_bytes()?;
        for _ in 0..r.compact_len()?.unwrap_or(0) {
            r.i32()?;
            code(r.i16()?);
            r.take(24)?;
            for _ in 0..r.compact_len()?.unwrap_or(0) {
                r.i32()?;
                r.compact_bytes()?;
                r.tags()?;
            }
            r.compact_bytes()?;
            r.tags()?;
        }
        r.tags()?;
    }
    r.i32()?;
    r.tags()
}

pub fn print(r: &LoadResult) {
    println!(
        "{:.0} batches/s  {:.0} bytes/batch  {:.1} MB/s  window {:.1} s",
        r.batches_per_s, r.mean_batch_bytes, r.mb_per_s, r.window_s
    );
    let l = &r.latency;
    println!(
        "latency ms p50 {:.2}  p99 {:.2}  p99.9 {:.2}  max {:.1}",
        l.p50_ms, l.p99_ms, l.p999_ms, l.max_ms
    );
    if r.config.mode == Mode::Open {
        println!("generator late ms p99 {:.2}  max {:.2}", r.generator_late.p99_ms, r.generator_late.max_ms);
    }
    if let Some(b) = &r.broker {
        println!(
            "broker {:.2} CPU-s  {:.2} us/batch  {:.2} CPU-s/GB  RSS {:.0} -> {:.0} MiB",
            b.cpu_s, b.cpu_us_per_batch, b.cpu_s_per_gb, b.rss_before_mib, b.rss_max_mib
        );
    }
    println!(
        "generator {:.2} CPU-s  host busy {:.2} s, steal {:.2} s",
        r.generator_cpu_s, r.host.busy_s, r.host.steal_s
    );
    for (error, n) in &r.errors {
        println!("error {error}: {n} batches");
    }
    if r.unanswered + r.unsent > 0 {
        println!("unanswered {}  unsent {}", r.unanswered, r.unsent);
    }
}
