//! Row 10: a consumer that comes late. Alone, then beside producers at half of Kafka's maximum.
//!
//! The backlog is pushed out of the kernel's page cache first, for every broker alike, so that it really comes from the
//! disk; what a broker keeps in its own memory it keeps.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::figure::Samples;
use super::report::{Goal, Verdict};
use super::rows_cost::no_settings;
use super::rows_latency::{LOAD, maximum_s};
use super::session::{Round, Session, allocated_bytes, topic_name};
use super::variant::{DURABLE, KAFKA, Variant};
use super::{LogConfig, Row};
use crate::consume::{self, ConsumeConfig, Progress};
use crate::load::{LoadConfig, Mode, Slice};
use crate::tail;

const PARTITIONS: usize = 100;
/// The batch size of a client with its default settings.
const FILL_RECORDS: usize = 16;
/// Producers alone before the drain begins: what they are compared with.
const BASELINE_S: f64 = 4.0;
/// Caught up: no more is left than producers send in this time.
const LAG_S: f64 = 0.25;
/// Steps in which the speed of a drain is looked at, and the least time on either side of a change that is judged.
const STEP_S: f64 = 0.25;
const SIDE_S: f64 = 0.1;

pub fn rows() -> Vec<Row> {
    vec![Row {
        number: 10,
        title: "drain of a backlog from disk, alone and beside producers at half of Kafka's maximum",
        estimate: |c: &LogConfig| {
            let fill = backlog_bytes(c) as f64 / 1e6 * (1.0 / 100.0 + 1.0 / 80.0);
            let pairs = if c.quick { 1.0 } else { 2.0 };
            let drains = 2.0 * (10.0 + BASELINE_S + drain_window_s(c));
            c.estimate(0.01, 0.01, 0.0) + maximum_s(c) + pairs * (fill + drains)
        },
        run: drain,
    }]
}

fn backlog_bytes(c: &LogConfig) -> u64 {
    if c.quick { 600 << 20 } else { 2 << 30 }
}

/// How long producers go on beside a drain; one that has not ended by then is judged by what it did.
fn drain_window_s(c: &LogConfig) -> f64 {
    if c.quick { 10.0 } else { 20.0 }
}

fn drain(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    let rate = s.kafka_max(&KAFKA)? * LOAD;
    s.rounds(10, false, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA]) {
            let topic = topic_name("backlog", &v);
            let batches = backlog_bytes(r.session.config) / (FILL_RECORDS as u64 * 1024);
            r.fill(&topic, &v, PARTITIONS, batches, FILL_RECORDS)?;
            if let Some(storage) = r.storage()? {
                let cache = storage.cache_bytes;
                r.reading("tail cache, bytes", &v, cache);
                ensure!(
                    backlog_bytes(r.session.config) as f64 >= 3.0 * cache,
                    "the backlog is not three times the tail cache of {cache} bytes"
                );
            }
            alone(r, &v, &topic)?;
            beside_producers(r, &v, &topic, rate)?;
        }
        Ok(())
    })?;
    Ok(verdicts(s))
}

fn consumer(r: &Round<'_, '_>, topic: &str) -> ConsumeConfig {
    let load = LoadConfig { topic: topic.into(), partitions: PARTITIONS, ..r.shape() };
    tail::config(&load)
}

fn alone(r: &mut Round<'_, '_>, v: &Variant, topic: &str) -> Result<()> {
    for name in ["from disk", "from page cache"] {
        if name == "from disk" {
            evict(r.peer.data())?;
        }
        let result = consume::run(&ConsumeConfig { until_end: true, ..consumer(r, topic) }, None)?;
        let cpu_per_gb = result.broker_cpu_s_per_gb.context("the broker's CPU is known")?;
        r.session.say(&format!(
            "  drain {name}, {}: {:.0} MB/s, {:.0} MB per CPU-second, {:.0} bytes a fetch",
            v.name,
            result.mb_per_s,
            1_000.0 / cpu_per_gb,
            result.mean_fetch_bytes
        ));
        r.reading(&format!("{name}: MB per CPU-s"), v, 1_000.0 / cpu_per_gb);
        r.reading(&format!("{name}: MB/s"), v, result.mb_per_s);
        r.session.drains.push((format!("round {} {}, alone {name}", r.number, v.name), result));
    }
    Ok(())
}

fn beside_producers(r: &mut Round<'_, '_>, v: &Variant, topic: &str, rate: f64) -> Result<()> {
    evict(r.peer.data())?;
    let window = drain_window_s(r.session.config);
    let load = LoadConfig {
        topic: topic.into(),
        partitions: PARTITIONS,
        mode: Mode::Open,
        in_flight: 5,
        rate,
        seconds: BASELINE_S + window,
        ..r.shape()
    };
    let consumer =
        ConsumeConfig { until_lag: Some((rate * LAG_S) as u64), seconds: window, ..consumer(r, topic) };
    let started = Arc::new(AtomicBool::new(false));
    let producers = std::thread::spawn({
        let (load, started) = (load.clone(), started.clone());
        move || crate::load::run(&load, Some(started))
    });
    while !started.load(Ordering::Acquire) && !producers.is_finished() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_secs_f64(load.warmup_seconds + BASELINE_S));
    let drained = consume::run(&consumer, None);
    let produced = producers.join().map_err(|_| anyhow::anyhow!("the generator panicked"))??;
    let drained = drained.context("drain")?;

    let alone: &[Slice] = produced.slices.get(..BASELINE_S as usize).unwrap_or_default();
    let during: Vec<&Slice> = produced
        .slices
        .iter()
        .skip(BASELINE_S as usize)
        // At least the second in which it began, however short the drain was.
        .take((drained.seconds as usize).max(1))
        .collect();
    let mean = |slices: &[&Slice]| {
        let seconds: f64 = slices.iter().map(|s| s.seconds).sum();
        slices.iter().map(|s| s.batches as f64).sum::<f64>() / seconds
    };
    let baseline = mean(&alone.iter().collect::<Vec<_>>());
    let slowest = during.iter().map(|s| s.batches as f64 / s.seconds).fold(f64::INFINITY, f64::min);
    let bytes_per_record = drained.bytes as f64 / drained.records.max(1) as f64;
    let speed = Speed::of(&drained.progress, bytes_per_record, cache_bytes(r)?);
    r.session.say(&format!(
        "  drain beside {rate:.0} batches/s, {}: {:.0} MB/s for {:.1} s{}; producers at {:.1} % of before, slowest second {:.1} %",
        v.name,
        drained.mb_per_s,
        drained.seconds,
        if drained.reached { "" } else { ", NOT CAUGHT UP" },
        mean(&during) / baseline * 100.0,
        slowest / baseline * 100.0
    ));
    r.session.say(&format!("    MB/s over time: {}", speed.line()));
    r.reading("beside producers: MB/s", v, drained.mb_per_s);
    r.reading("beside producers: caught up", v, f64::from(u8::from(drained.reached)));
    r.reading("producers' rate by before", v, mean(&during) / baseline);
    r.reading("producers' slowest second by before", v, slowest / baseline);
    if speed.slowest.is_finite() {
        r.reading("slowest quarter of a second of the drain, MB/s", v, speed.slowest);
    }
    if let Some(ratio) = speed.cache_by_disk {
        r.reading("drain speed in the cache by on disk", v, ratio);
    }
    r.session.drains.push((format!("round {} {}, beside producers", r.number, v.name), drained));
    r.session.producers.push((format!("round {} {}, producers beside a drain", r.number, v.name), produced));
    Ok(())
}

/// What Flumen keeps in memory of its tails; nothing for the others.
fn cache_bytes(r: &Round<'_, '_>) -> Result<f64> {
    Ok(r.storage()?.map_or(0.0, |s| s.cache_bytes))
}

/// How a drain's speed went over time.
struct Speed {
    /// MB/s of each step.
    steps: Vec<f64>,
    slowest: f64,
    /// Speed once what is left fits the tail cache, by the speed before.
    cache_by_disk: Option<f64>,
}

impl Speed {
    fn of(progress: &[Progress], bytes_per_record: f64, cache_bytes: f64) -> Self {
        let rate = |a: &Progress, b: &Progress| (b.bytes - a.bytes) as f64 / 1e6 / (b.seconds - a.seconds);
        let mut steps = Vec::new();
        let mut from = progress.first();
        for p in progress.iter().skip(1) {
            if let Some(start) = from
                && p.seconds - start.seconds >= STEP_S
            {
                steps.push(rate(start, p));
                from = Some(p);
            }
        }
        // The answer to the first fetches does not know all ends yet.
        let known = |p: &&Progress| p.lag_records < u64::MAX / 2;
        let in_cache = |p: &Progress| p.lag_records as f64 * bytes_per_record <= cache_bytes;
        let known: Vec<&Progress> = progress.iter().filter(known).collect();
        let switch = known.iter().position(|p| in_cache(p));
        let cache_by_disk = switch.and_then(|at| {
            let (first, middle, last) = (known.first()?, known.get(at)?, known.last()?);
            let long_enough =
                middle.seconds - first.seconds >= SIDE_S && last.seconds - middle.seconds >= SIDE_S;
            long_enough.then(|| rate(middle, last) / rate(first, middle))
        });
        let slowest = steps.iter().copied().fold(f64::INFINITY, f64::min);
        Self { slowest, steps, cache_by_disk }
    }

    fn line(&self) -> String {
        self.steps.iter().map(|s| format!("{s:.0}")).collect::<Vec<_>>().join(" ")
    }
}

/// Writes back what is dirty below a directory and drops it from the page cache, through coreutils: both system calls
/// would need unsafe code here. Files that vanish meanwhile are no error, so only the size says what was asked.
fn evict(dir: &Path) -> Result<()> {
    ensure!(allocated_bytes(dir) > 0, "{} is empty", dir.display());
    let mut files = Vec::new();
    list(dir, &mut files);
    for file in &files {
        // conv=fdatasync writes nothing here but waits for what is dirty; nocache drops the whole file.
        let status = Command::new("dd")
            .arg(format!("of={}", file.display()))
            .args(["if=/dev/null", "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"])
            .status()
            .context("cannot run dd")?;
        ensure!(status.success() || !file.exists(), "dd could not evict {}", file.display());
    }
    Ok(())
}

fn list(dir: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(t) if t.is_dir() => list(&entry.path(), files),
            Ok(t) if t.is_file() && entry.metadata().is_ok_and(|m| m.len() > 0) => files.push(entry.path()),
            _ => {}
        }
    }
}

fn verdicts(s: &Session<'_>) -> Vec<Verdict> {
    let of = |name: &str, v: &Variant| -> Samples<'static> { s.values(10, name, v) };
    let against = |what: &str, goal, name: &str| {
        Verdict::ratio(10, what, goal, (&DURABLE, &of(name, &DURABLE)), (&KAFKA, &of(name, &KAFKA)))
    };
    let own = |what: &str, goal, name: &str| {
        Verdict::own(10, what, goal, &DURABLE, of(name, &DURABLE).figure(), of(name, &KAFKA).figure())
    };
    vec![
        against("alone, from disk: MB per CPU-second", Goal::AtLeast(1.4), "from disk: MB per CPU-s"),
        against("alone, from disk: MB/s", Goal::Informs, "from disk: MB/s"),
        against("alone, from page cache: MB per CPU-second", Goal::Informs, "from page cache: MB per CPU-s"),
        against("alone, from page cache: MB/s", Goal::Informs, "from page cache: MB/s"),
        against("beside producers: drained MB/s", Goal::AtLeast(2.0), "beside producers: MB/s"),
        own("caught up (1) or not (0)", Goal::AtLeast(1.0), "beside producers: caught up"),
        own("producers' rate while draining, by before", Goal::AtLeast(0.98), "producers' rate by before"),
        own(
            "producers' slowest second, by before",
            Goal::AtLeast(0.5),
            "producers' slowest second by before",
        ),
        own(
            "drain's slowest quarter of a second, MB/s",
            Goal::Informs,
            "slowest quarter of a second of the drain, MB/s",
        ),
        own(
            "drain speed in the tail cache, by on disk",
            Goal::AtLeast(0.8),
            "drain speed in the cache by on disk",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64, megabytes: u64, lag_records: u64) -> Progress {
        Progress { seconds, bytes: megabytes * 1_000_000, lag_records }
    }

    #[test]
    fn speed_over_time_and_across_the_switch() {
        let progress = [
            at(0.0, 0, u64::MAX),
            at(0.5, 50, 4_000),
            at(1.0, 100, 3_000),
            at(2.0, 300, 1_000),
            at(3.0, 350, 0),
        ];
        let s = Speed::of(&progress, 1_000.0, 1_000_000.0);
        assert_eq!(s.steps, [100.0, 100.0, 200.0, 50.0]);
        assert_eq!(s.slowest, 50.0);
        // 50 to 300 MB in 1.5 s from disk, then 50 MB in a second.
        assert!((s.cache_by_disk.unwrap() - 50.0 / (250.0 / 1.5)).abs() < 1e-9);
        assert_eq!(Speed::of(&progress, 1_000.0, 0.0).cache_by_disk, None);
        assert_eq!(Speed::of(&[], 1.0, 1.0).cache_by_disk, None);
    }

    #[test]
    fn eviction_keeps_every_byte() {
        let dir = std::env::temp_dir().join(format!("flumen-evict-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a")).unwrap();
        std::fs::write(dir.join("a/b"), b"kept").unwrap();
        evict(&dir).unwrap();
        let content = std::fs::read(dir.join("a/b")).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(content, b"kept");
    }
}
