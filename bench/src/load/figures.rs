//! What a produce run leaves: counters while it runs, slices of about a second, and the result.
//!
//! Belongs to the generator's thread. Percentiles always come from merged histograms, never from averaged percentiles;
//! CPU and batches of a slice are read at the same moment, so that their quotient holds however late the reader was.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{LoadConfig, Mode};
use crate::stats::{self, Cpu, Host};

/// Latencies beyond this are recorded as this.
const LATENCY_US_MAX: u64 = 600_000_000;
/// Length of a slice: long enough for the kernel's 10 ms CPU ticks, short enough that a window has several.
pub const SLICE: Duration = Duration::from_secs(1);

pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("constant bounds are valid")
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
    pub open_files: Option<usize>,
    pub storage_bytes_per_batch_byte: Option<f64>,
}

/// About a second of the window.
#[derive(Debug, Clone, Serialize)]
pub struct Slice {
    pub seconds: f64,
    pub batches: u64,
    pub records: u64,
    pub bytes: u64,
    pub broker_cpu_s: Option<f64>,
    pub latency: Latency,
    /// Recorded values in microseconds with their counts, ascending: what percentiles over several slices need.
    #[serde(skip)]
    pub latency_us: Vec<(u64, u64)>,
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
    /// Batches acknowledged since the topic existed, warm-up included.
    pub acknowledged_batches: u64,
    pub slices: Vec<Slice>,
    pub broker: Option<Broker>,
    pub generator_cpu_s: f64,
    /// The whole machine during the window, everything on it included.
    pub host: Host,
    /// Part of `host`: the kernel's own threads (write-back, block device), which work for whoever wrote.
    pub kernel_threads_cpu_s: f64,
}

impl LoadResult {
    /// Share of the machine that was busy with something else than broker, generator and the kernel's threads.
    pub fn foreign_share(&self, cores: usize) -> f64 {
        let broker = self.broker.as_ref().map_or(0.0, |b| b.cpu_s);
        let ours = broker + self.generator_cpu_s + self.kernel_threads_cpu_s;
        let foreign = (self.host.busy_s - ours).max(0.0) + self.host.steal_s;
        foreign / (self.window_s * cores.max(1) as f64)
    }
}

pub(super) struct Sent {
    pub intended: Instant,
    pub batches: u32,
    pub bytes: u64,
}

/// Counters of the whole run; one thread.
pub(super) struct Totals {
    pub window: (Instant, Instant),
    pub requests: u64,
    pub batches: u64,
    pub bytes: u64,
    /// One histogram per slice of the window.
    pub latency: Vec<Histogram<u64>>,
    pub late: Histogram<u64>,
    pub errors: BTreeMap<i16, u64>,
    pub unanswered: u64,
    pub unsent: u64,
    pub acknowledged: u64,
    /// Batches that may still be sent; `None` without a limit.
    pub remaining: Option<u64>,
}

impl Totals {
    pub fn new(window: (Instant, Instant), batches_max: Option<u64>) -> Self {
        let slices = (window.1 - window.0).as_secs_f64() / SLICE.as_secs_f64();
        Self {
            window,
            requests: 0,
            batches: 0,
            bytes: 0,
            latency: (0..(slices.ceil() as usize).max(1)).map(|_| new_histogram()).collect(),
            late: new_histogram(),
            errors: BTreeMap::new(),
            unanswered: 0,
            unsent: 0,
            acknowledged: 0,
            remaining: batches_max,
        }
    }

    pub fn answered(&mut self, now: Instant, sent: &Sent) {
        self.acknowledged += u64::from(sent.batches);
        if now < self.window.0 || now >= self.window.1 {
            return;
        }
        self.requests += 1;
        self.batches += u64::from(sent.batches);
        self.bytes += sent.bytes;
        let at = ((now - self.window.0).as_secs_f64() / SLICE.as_secs_f64()) as usize;
        if let Some(slice) = self.latency.get_mut(at) {
            slice.saturating_record((now - sent.intended).as_micros().min(LATENCY_US_MAX as u128) as u64);
        }
    }

    /// Whether the limit on batches has been reached.
    pub fn spent(&self) -> bool {
        self.remaining == Some(0)
    }
}

/// Everything that is read at one moment.
pub(super) struct Sample {
    pub at: Instant,
    pub broker: Cpu,
    pub own: Cpu,
    pub written: Option<u64>,
    pub host: Host,
    pub kernel_threads_s: f64,
}

impl Sample {
    pub fn take(pids: &[u32]) -> anyhow::Result<Self> {
        Ok(Self {
            at: Instant::now(),
            broker: stats::cpu_of(pids)?.unwrap_or_default(),
            own: stats::cpu(std::process::id())?,
            written: stats::written_bytes_of(pids),
            host: stats::host(),
            kernel_threads_s: stats::kernel_threads_cpu_s(),
        })
    }
}

/// Counters at the end of a slice.
pub(super) struct Mark {
    pub at: Instant,
    pub batches: u64,
    pub bytes: u64,
    pub broker_cpu_s: Option<f64>,
}

impl Mark {
    pub fn take(totals: &Totals, pids: &[u32]) -> anyhow::Result<Self> {
        Ok(Self {
            broker_cpu_s: stats::cpu_of(pids)?.map(Cpu::total),
            at: Instant::now(),
            batches: totals.batches,
            bytes: totals.bytes,
        })
    }
}

pub(super) fn slices(marks: &[Mark], histograms: &[Histogram<u64>], batch_records: usize) -> Vec<Slice> {
    marks
        .windows(2)
        .enumerate()
        .map(|(i, w)| {
            let histogram = histograms.get(i);
            Slice {
                seconds: (w[1].at - w[0].at).as_secs_f64(),
                batches: w[1].batches - w[0].batches,
                records: (w[1].batches - w[0].batches) * batch_records as u64,
                bytes: w[1].bytes - w[0].bytes,
                broker_cpu_s: w[1].broker_cpu_s.zip(w[0].broker_cpu_s).map(|(b, a)| b - a),
                latency: histogram.map(Latency::of).unwrap_or_default(),
                latency_us: histogram.map_or_else(Vec::new, |h| {
                    h.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
                }),
            }
        })
        .collect()
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
        "generator {:.2} CPU-s  host busy {:.2} s, kernel threads {:.2} s, steal {:.2} s",
        r.generator_cpu_s, r.host.busy_s, r.kernel_threads_cpu_s, r.host.steal_s
    );
    for (error, n) in &r.errors {
        println!("error {error}: {n} batches");
    }
    if r.unanswered + r.unsent > 0 {
        println!("unanswered {}  unsent {}", r.unanswered, r.unsent);
    }
}
