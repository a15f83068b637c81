//! What an export shows of itself: a status document and counters.
//!
//! Owns the shapes and the latency histogram. `ExportStatus` is built on the export thread and published whole;
//! `ExportMetrics` is written there and read by the metrics endpoint on any thread. No record values, no credentials.

use std::collections::BTreeMap;
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
    /// Why it is in this state.
    pub reason: String,
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

/// Bounds of the latency histograms on /metrics, in seconds.
pub const LATENCY_BOUNDS_S: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// Bounds of the batch-size histogram, in rows.
pub const BATCH_BOUNDS: [f64; 12] = [1.0, 10.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 1e7];
/// Kinds of errors counted one by one; there are some hundred codes, of which a server in trouble shows a few.
const MAX_ERROR_KINDS: usize = 64;

/// A histogram for /metrics. The sum is kept in thousandths.
#[derive(Debug)]
pub struct Buckets {
    bounds: &'static [f64; 12],
    /// One per bound, and one for the rest; not cumulative.
    counts: [AtomicU64; 13],
    sum_milli: AtomicU64,
}

impl Buckets {
    fn new(bounds: &'static [f64; 12]) -> Buckets {
        Buckets { bounds, counts: Default::default(), sum_milli: AtomicU64::new(0) }
    }

    pub fn record(&self, value: f64) {
        let at = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.sum_milli.fetch_add((value.max(0.0) * 1000.0) as u64, Relaxed);
    }

    fn value(&self) -> SampleValue {
        let mut count = 0;
        let mut cumulative = Vec::with_capacity(self.bounds.len());
        for (bound, own) in self.bounds.iter().zip(&self.counts) {
            count += own.load(Relaxed);
            cumulative.push((*bound, count));
        }
        count += self.counts[self.bounds.len()].load(Relaxed);
        SampleValue::Histogram { cumulative, count, sum: self.sum_milli.load(Relaxed) as f64 / 1000.0 }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum SampleValue {
    Counter(f64),
    Gauge(f64),
    Histogram {
        /// Upper bound and number of values at or below it.
        cumulative: Vec<(f64, u64)>,
        count: u64,
        sum: f64,
    },
}

/// One sample for the metrics endpoint; it adds the labels that name the export.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: &'static str,
    pub help: &'static str,
    pub labels: Vec<(&'static str, String)>,
    pub value: SampleValue,
}

macro_rules! metrics {
    ($($field:ident $kind:ident $name:literal $scale:literal $help:literal;)*) => {
        /// Counters and gauges of one export.
        #[derive(Debug)]
        pub struct ExportMetrics {
            $(#[doc = $help] pub $field: AtomicU64,)*
            /// Index into `State::ALL`.
            pub state: AtomicU64,
            /// Index into `BreakerState::ALL`.
            pub breaker: AtomicU64,
            pub raw_bytes: AtomicU64,
            pub block_bytes: AtomicU64,
            pub insert_seconds: Buckets,
            pub visibility_seconds: Buckets,
            pub batch_rows: Buckets,
            errors: Mutex<BTreeMap<(&'static str, i32), u64>>,
        }

        impl Default for ExportMetrics {
            fn default() -> ExportMetrics {
                ExportMetrics {
                    $($field: AtomicU64::new(0),)*
                    state: AtomicU64::new(0),
                    breaker: AtomicU64::new(0),
                    raw_bytes: AtomicU64::new(0),
                    block_bytes: AtomicU64::new(0),
                    insert_seconds: Buckets::new(&LATENCY_BOUNDS_S),
                    visibility_seconds: Buckets::new(&LATENCY_BOUNDS_S),
                    batch_rows: Buckets::new(&BATCH_BOUNDS),
                    errors: Mutex::default(),
                }
            }
        }

        impl ExportMetrics {
            fn plain_samples(&self, samples: &mut Vec<Sample>) {
                $(samples.push(Sample {
                    name: $name,
                    help: $help,
                    labels: Vec::new(),
                    value: SampleValue::$kind(self.$field.load(Relaxed) as f64 * $scale),
                });)*
            }
        }
    };
}

metrics! {
    rows Counter "flumen_export_rows_total" 1.0 "Rows settled in ClickHouse.";
    records Counter "flumen_export_records_total" 1.0 "Records settled, dead letters and skipped ones included.";
    inserts Counter "flumen_export_inserts_total" 1.0 "Inserts acknowledged by ClickHouse.";
    insert_failures Counter "flumen_export_insert_failures_total" 1.0 "Inserts that failed or whose outcome was not clear.";
    retries Counter "flumen_export_retries_total" 1.0 "Plans that had to be tried again later.";
    ambiguous Counter "flumen_export_ambiguous_total" 1.0 "Plans whose outcome had to be looked up.";
    repaired_rows Counter "flumen_export_repaired_rows_total" 1.0 "Rows found missing after an insert and inserted again.";
    dead_letters Counter "flumen_export_dlq_records_total" 1.0 "Records written to the dead-letter topic.";
    skipped Counter "flumen_export_skipped_records_total" 1.0 "Tombstones passed over.";
    audit_missing_rows Counter "flumen_export_audit_missing_rows_total" 1.0 "Settled rows that the audit did not find.";
    audit_duplicate_rows Counter "flumen_export_audit_duplicate_rows_total" 1.0 "Rows that the audit found more than once.";
    lag_records Gauge "flumen_export_lag_records" 1.0 "Records that are not settled yet.";
    lag_bytes Gauge "flumen_export_lag_bytes" 1.0 "Bytes of the records that are not settled yet, by the mean size of those that were exported.";
    lag_ms Gauge "flumen_export_lag_seconds" 0.001 "Age of the oldest record that is not settled, since the export saw it.";
    target_lag_met Gauge "flumen_export_target_lag_met" 1.0 "1 while the lag is within flumen.clickhouse.target.lag.ms.";
    inflight_bytes Gauge "flumen_export_inflight_bytes" 1.0 "Bytes of the block that is being inserted.";
    open_plans Gauge "flumen_export_open_plans" 1.0 "Plans recorded and not settled.";
    last_success_s Gauge "flumen_export_last_success_timestamp_seconds" 1.0 "When ClickHouse last acknowledged an insert.";
    encode_us Counter "flumen_export_encode_seconds_total" 0.000_001 "Time spent decoding records and building blocks.";
    backoff_ms Counter "flumen_export_backpressure_seconds_total" 0.001 "Time spent waiting after failures.";
}

impl ExportMetrics {
    /// Counts an error by its class and, where ClickHouse gave one, its code.
    pub fn error(&self, class: &'static str, ch_code: Option<i32>) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = (class, ch_code.unwrap_or(0));
        let kind =
            if errors.len() < MAX_ERROR_KINDS || errors.contains_key(&kind) { kind } else { ("other", 0) };
        *errors.entry(kind).or_default() += 1;
    }

    /// Everything for /metrics.
    pub fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        self.plain_samples(&mut samples);
        let mut one = |name, help, labels, value| samples.push(Sample { name, help, labels, value });
        let states = State::ALL.map(State::as_str);
        let breakers = BreakerState::ALL.map(BreakerState::as_str);
        for (name, help, all, now) in [
            ("flumen_export_state", "1 for the state the export is in.", &states[..], &self.state),
            (
                "flumen_export_breaker_state",
                "1 for the state of the circuit breaker.",
                &breakers[..],
                &self.breaker,
            ),
        ] {
            let now = now.load(Relaxed);
            for (code, state) in (0u64..).zip(all) {
                let labels = vec![("state", (*state).to_owned())];
                one(name, help, labels, SampleValue::Gauge(f64::from(u8::from(code == now))));
            }
        }
        for (kind, bytes) in [("records", &self.raw_bytes), ("blocks", &self.block_bytes)] {
            let help = "Bytes of record batches read, and of Native blocks acknowledged by ClickHouse.";
            let labels = vec![("kind", kind.to_owned())];
            one("flumen_export_bytes_total", help, labels, SampleValue::Counter(bytes.load(Relaxed) as f64));
        }
        for ((class, code), count) in self.errors.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let labels = vec![("class", (*class).to_owned()), ("ch_code", code.to_string())];
            let help = "Failures by class and ClickHouse's code, 0 where it gave none.";
            one("flumen_export_errors_total", help, labels, SampleValue::Counter(*count as f64));
        }
        for (name, help, buckets) in [
            ("flumen_export_insert_seconds", "Duration of acknowledged inserts.", &self.insert_seconds),
            (
                "flumen_export_visibility_seconds",
                "From the export seeing a record to ClickHouse acknowledging it.",
                &self.visibility_seconds,
            ),
            ("flumen_export_batch_rows", "Rows per acknowledged insert.", &self.batch_rows),
        ] {
            one(name, help, Vec::new(), buckets.value());
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
        metrics.lag_ms.store(1500, Relaxed);
        metrics.insert_seconds.record(0.03);
        metrics.insert_seconds.record(0.003);
        metrics.insert_seconds.record(1000.0);
        let samples = metrics.samples();
        let named = |name: &str| samples.iter().filter(|s| s.name == name).cloned().collect::<Vec<_>>();
        let on: Vec<Sample> =
            named("flumen_export_state").into_iter().filter(|s| s.value == SampleValue::Gauge(1.0)).collect();
        assert_eq!(on.len(), 1);
        assert_eq!(on[0].labels, [("state", "paused".to_owned())]);
        assert_eq!(named("flumen_export_lag_seconds")[0].value, SampleValue::Gauge(1.5));
        let SampleValue::Histogram { cumulative, count, sum } =
            &named("flumen_export_insert_seconds")[0].value
        else {
            panic!("a histogram");
        };
        assert_eq!((cumulative[0], cumulative[2], cumulative[11].1, *count), ((0.01, 1), (0.05, 2), 2, 3));
        assert_eq!(*sum, 1000.033);
    }

    #[test]
    fn errors_are_counted_by_kind_and_bounded() {
        let metrics = ExportMetrics::default();
        metrics.error("transient", None);
        (0..1000).for_each(|code| metrics.error("unknown", Some(code)));
        let errors: Vec<Sample> =
            metrics.samples().into_iter().filter(|s| s.name == "flumen_export_errors_total").collect();
        assert_eq!(errors.len(), MAX_ERROR_KINDS + 1);
        assert!(errors.iter().any(|s| s.labels[0].1 == "other"));
    }
}
