//! What an export shows of itself: a status document and counters.
//!
//! Owns the shapes and the latency histogram. `ExportStatus` is built on the export thread and published whole;
//! `ExportMetrics` is written there and read by the metrics endpoint on any thread. No record values, no credentials.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use crate::admission::Guarantee;
use crate::breaker::BreakerState;
use crate::settle::{Alarm, Class};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Starting,
    Running,
    BackingOff,
    Paused,
    /// Waits for a person: the reason and the way out are in `last_error`.
    Failed,
    Stopped,
}

impl State {
    pub const ALL: [State; 6] =
        [State::Starting, State::Running, State::BackingOff, State::Paused, State::Failed, State::Stopped];

    pub fn as_str(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::BackingOff => "backing_off",
            State::Paused => "paused",
            State::Failed => "failed",
            State::Stopped => "stopped",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LastError {
    pub class: Option<Class>,
    pub alarm: Option<Alarm>,
    pub ch_code: Option<i32>,
    pub message: String,
    /// What to do.
    pub hint: String,
    pub first_seen_ms: i64,
    pub last_seen_ms: i64,
    pub count: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartitionStatus {
    pub partition: i32,
    /// First offset that is not known to be in the table.
    pub settled_offset: i64,
    /// Next offset to be put into a plan.
    pub planned_offset: i64,
    pub last_stable_offset: i64,
    pub log_start_offset: i64,
    pub lag_records: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StateChange {
    pub at_ms: i64,
    pub state: State,
    pub reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50_ms: f64,
    pub p99_ms: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OpenPlanStatus {
    pub seq: u64,
    pub rows: u64,
    pub dead_letters: u32,
    pub repairs: u32,
    /// Partition, first and last offset of each range.
    pub ranges: Vec<(i32, i64, i64)>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AuditStatus {
    pub last_ms: Option<i64>,
    pub missing_rows: u64,
    pub duplicate_rows: u64,
    pub repaired_rows: u64,
    /// Why missing rows are only counted.
    pub repairs_off: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ExportStatus {
    pub topic: String,
    pub endpoint: String,
    pub database: String,
    pub table: String,
    pub state: State,
    pub since_ms: i64,
    pub guarantee: Option<Guarantee>,
    pub warnings: Vec<String>,
    pub server_version: Option<String>,
    pub sink_epoch: u32,
    pub lag_records: i64,
    /// Age of the oldest record that is not settled, by when the export first saw it.
    pub lag_seconds: f64,
    pub target_lag_ms: u64,
    pub target_lag_met: bool,
    pub rows_total: u64,
    pub dead_letters_total: u64,
    pub skipped_total: u64,
    /// Over the last minute.
    pub rows_per_second: f64,
    pub bytes_per_second: f64,
    pub batch_rows: Percentile,
    pub insert: Percentiles,
    /// First seen by the export to acknowledged by ClickHouse.
    pub visibility: Percentiles,
    pub last_success_ms: Option<i64>,
    pub last_error: Option<LastError>,
    pub breaker: Option<BreakerState>,
    pub retry_in_ms: Option<u64>,
    pub dead_letter_topic: String,
    pub open_plans: Vec<OpenPlanStatus>,
    pub partitions: Vec<PartitionStatus>,
    pub audit: AuditStatus,
    /// Until when the log keeps what is not exported; absent if it keeps it until it is.
    pub log_holds_until_ms: Option<i64>,
    pub history: Vec<StateChange>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Percentile {
    pub p50: u64,
    pub p99: u64,
}

/// Buckets per doubling: 19 % between bounds.
const PER_DOUBLING: usize = 4;
/// From 1 to 2^24: milliseconds up to 4.6 hours, rows up to 16 million.
const BUCKETS: usize = 24 * PER_DOUBLING + 1;

/// Counts in buckets that grow by a fourth root of two.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, value: f64) {
        let at = (value.max(1.0).log2() * PER_DOUBLING as f64).ceil() as usize;
        if let Some(count) = self.counts.get_mut(at.min(BUCKETS - 1)) {
            *count += 1;
            self.total += 1;
        }
    }

    /// Upper bound of the bucket that holds the quantile; 0 if nothing was recorded.
    pub fn quantile(&self, q: f64) -> f64 {
        let wanted = (self.total as f64 * q).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return (at as f64 / PER_DOUBLING as f64).exp2();
            }
        }
        0.0
    }

    fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
    }
}

/// The last one to two minutes: percentiles that forget.
#[derive(Clone, Debug, Default)]
pub struct Recent {
    current: Histogram,
    previous: Histogram,
    since_ms: u64,
}

impl Recent {
    const TURN_MS: u64 = 60_000;

    pub fn record(&mut self, now_ms: u64, value: f64) {
        self.turn(now_ms);
        self.current.record(value);
    }

    fn turn(&mut self, now_ms: u64) {
        let age = now_ms.saturating_sub(self.since_ms);
        if age >= Self::TURN_MS {
            self.previous = if age < 2 * Self::TURN_MS {
                std::mem::take(&mut self.current)
            } else {
                self.current = Histogram::default();
                Histogram::default()
            };
            self.since_ms = now_ms;
        }
    }

    pub fn quantiles(&mut self, now_ms: u64) -> (f64, f64) {
        self.turn(now_ms);
        let mut both = self.previous.clone();
        both.add(&self.current);
        (both.quantile(0.5), both.quantile(0.99))
    }
}

/// Bounds of the histograms on /metrics, in seconds.
pub const LATENCY_BOUNDS_S: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

#[derive(Debug, Default)]
pub struct LatencyBuckets {
    /// One per bound, and one for the rest; not cumulative.
    pub counts: [AtomicU64; LATENCY_BOUNDS_S.len() + 1],
    pub sum_us: AtomicU64,
}

impl LatencyBuckets {
    pub fn record_ms(&self, ms: f64) {
        let at = LATENCY_BOUNDS_S.iter().position(|bound| ms / 1000.0 <= *bound);
        let at = at.unwrap_or(LATENCY_BOUNDS_S.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.sum_us.fetch_add((ms.max(0.0) * 1000.0) as u64, Relaxed);
    }
}

/// One sample for the metrics endpoint; labels besides `export` and `topic` come in `labels`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: &'static str,
    pub kind: &'static str,
    pub help: &'static str,
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
}

macro_rules! metrics {
    ($($field:ident $kind:literal $name:literal $help:literal;)*) => {
        /// Counters and gauges of one export.
        #[derive(Debug, Default)]
        pub struct ExportMetrics {
            $(#[doc = $help] pub $field: AtomicU64,)*
            pub insert_seconds: LatencyBuckets,
            pub visibility_seconds: LatencyBuckets,
        }

        impl ExportMetrics {
            fn plain_samples(&self, samples: &mut Vec<Sample>) {
                $(samples.push(Sample {
                    name: $name,
                    kind: $kind,
                    help: $help,
                    labels: Vec::new(),
                    value: self.$field.load(Relaxed) as f64,
                });)*
            }
        }
    };
}

metrics! {
    rows "counter" "flumen_export_rows_total" "Rows acknowledged by ClickHouse.";
    records "counter" "flumen_export_records_total" "Records settled, dead letters and skipped ones included.";
    raw_bytes "counter" "flumen_export_raw_bytes_total" "Bytes of record batches read for export.";
    block_bytes "counter" "flumen_export_block_bytes_total" "Bytes of Native blocks sent.";
    inserts "counter" "flumen_export_inserts_total" "Inserts acknowledged by ClickHouse.";
    insert_failures "counter" "flumen_export_insert_failures_total" "Inserts that failed or whose outcome was not clear.";
    retries "counter" "flumen_export_retries_total" "Inserts sent again.";
    ambiguous "counter" "flumen_export_ambiguous_total" "Plans whose outcome had to be looked up.";
    repaired_rows "counter" "flumen_export_repaired_rows_total" "Rows found missing after an insert and inserted again.";
    dead_letters "counter" "flumen_export_dlq_records_total" "Records written to the dead-letter topic.";
    skipped "counter" "flumen_export_skipped_records_total" "Tombstones passed over.";
    audit_missing_rows "counter" "flumen_export_audit_missing_rows_total" "Settled rows that the audit did not find.";
    audit_duplicate_rows "counter" "flumen_export_audit_duplicate_rows_total" "Rows that the audit found more than once.";
    lag_records "gauge" "flumen_export_lag_records" "Records below the last stable offset that are not settled.";
    lag_ms "gauge" "flumen_export_lag_milliseconds" "Age of the oldest unsettled record, since the export saw it.";
    open_plans "gauge" "flumen_export_open_plans" "Plans recorded and not settled.";
    breaker_open "gauge" "flumen_export_breaker_open" "1 while the circuit breaker keeps inserts back.";
    last_success_s "gauge" "flumen_export_last_success_timestamp_seconds" "When ClickHouse last acknowledged an insert.";
    encode_us "counter" "flumen_export_encode_microseconds_total" "Time spent decoding records and building blocks.";
    backoff_ms "counter" "flumen_export_backoff_milliseconds_total" "Time spent waiting after failures.";
    state "gauge" "flumen_export_state_code" "0 starting, 1 running, 2 backing off, 3 paused, 4 failed, 5 stopped.";
}

impl ExportMetrics {
    /// Everything for /metrics. Histograms come as Prometheus' cumulative buckets.
    pub fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        self.plain_samples(&mut samples);
        let now = self.state.load(Relaxed);
        for (code, state) in (0u64..).zip(State::ALL) {
            samples.push(Sample {
                name: "flumen_export_state",
                kind: "gauge",
                help: "1 for the state the export is in.",
                labels: vec![("state", state.as_str().to_owned())],
                value: f64::from(u8::from(code == now)),
            });
        }
        for (buckets, names, help) in [
            (
                &self.insert_seconds,
                [
                    "flumen_export_insert_seconds_bucket",
                    "flumen_export_insert_seconds_count",
                    "flumen_export_insert_seconds_sum",
                ],
                "Duration of inserts.",
            ),
            (
                &self.visibility_seconds,
                [
                    "flumen_export_visibility_seconds_bucket",
                    "flumen_export_visibility_seconds_count",
                    "flumen_export_visibility_seconds_sum",
                ],
                "From the export seeing a record to ClickHouse acknowledging it.",
            ),
        ] {
            let mut sum = 0;
            let bounds = LATENCY_BOUNDS_S.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
            for (bound, count) in bounds.zip(&buckets.counts) {
                sum += count.load(Relaxed);
                samples.push(Sample {
                    name: names[0],
                    kind: "histogram",
                    help,
                    labels: vec![("le", bound)],
                    value: sum as f64,
                });
            }
            let plain = |name, value| Sample { name, kind: "histogram", help, labels: Vec::new(), value };
            samples.push(plain(names[1], sum as f64));
            samples.push(plain(names[2], buckets.sum_us.load(Relaxed) as f64 / 1e6));
        }
        samples
    }
}

/// A status that other threads read whole.
#[derive(Debug, Default)]
pub struct Published {
    status: Mutex<std::sync::Arc<ExportStatus>>,
}

impl Published {
    pub fn get(&self) -> std::sync::Arc<ExportStatus> {
        // A panic while the lock was held leaves the old or the new status, both whole.
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, status: ExportStatus) {
        let status = std::sync::Arc::new(status);
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut histogram = Histogram::default();
        for value in 1..=1000 {
            histogram.record(f64::from(value));
        }
        let (p50, p99) = (histogram.quantile(0.5), histogram.quantile(0.99));
        assert!((500.0..=600.0).contains(&p50), "{p50}");
        assert!((990.0..=1190.0).contains(&p99), "{p99}");
        assert_eq!(Histogram::default().quantile(0.5), 0.0);
        histogram.record(f64::NAN);
        histogram.record(f64::INFINITY);
    }

    #[test]
    fn recent_forgets() {
        let mut recent = Recent::default();
        recent.record(0, 1000.0);
        recent.record(61_000, 10.0);
        assert!(recent.quantiles(61_000).1 >= 1000.0);
        assert!(recent.quantiles(130_000).1 <= 12.0);
        assert_eq!(recent.quantiles(400_000).1, 0.0);
    }

    #[test]
    fn samples_have_one_state_and_cumulative_buckets() {
        let metrics = ExportMetrics::default();
        metrics.state.store(3, Relaxed);
        metrics.insert_seconds.record_ms(30.0);
        metrics.insert_seconds.record_ms(3.0);
        let samples = metrics.samples();
        let on: Vec<&Sample> =
            samples.iter().filter(|s| s.name == "flumen_export_state" && s.value == 1.0).collect();
        assert_eq!(on.len(), 1);
        assert_eq!(on[0].labels, [("state", "paused".to_owned())]);
        let last = samples.iter().rfind(|s| s.name == "flumen_export_insert_seconds_bucket").map(|s| s.value);
        assert_eq!(last, Some(2.0));
    }
}
