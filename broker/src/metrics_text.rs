//! `GET /metrics`: everything a scrape asks for, gathered on the admin thread.
//!
//! Families are built anew for each scrape, so a deleted topic's series end with it and no label is
//! ever looked up on a shard. Per-partition series are capped: a scrape of a huge cluster must not
//! become a load of its own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use flumen_sink::status::{ExportMetrics, SampleValue, State};
use kafka_protocol::messages::ApiKey;
use prometheus::proto::{self, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::metrics::Times;
use crate::node::Node;
use crate::partition::PartitionGauges;

/// Partitions with series of their own; beyond it only the sums are given.
const PARTITION_SERIES_MAX: usize = 10_000;

/// Committed offset of a group, as the coordinators have it.
pub struct GroupOffset {
    pub group: String,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

struct Families {
    registry: Registry,
    /// Families that come whole.
    whole: RefCell<Vec<MetricFamily>>,
}

impl Families {
    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        let family = IntCounterVec::new(Opts::new(name, help), labels).expect("metric names are literals");
        self.registry.register(Box::new(family.clone())).expect("each family is registered once");
        family
    }

    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        let family = IntGaugeVec::new(Opts::new(name, help), labels).expect("metric names are literals");
        self.registry.register(Box::new(family.clone())).expect("each family is registered once");
        family
    }

    fn float(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        let family = GaugeVec::new(Opts::new(name, help), labels).expect("metric names are literals");
        self.registry.register(Box::new(family.clone())).expect("each family is registered once");
        family
    }
}

/// Of a process whose node does not exist yet only what there is to say of the process.
pub async fn render(node: Option<&Arc<Node>>, started: Instant) -> String {
    let groups = match node {
        Some(node) => committed_offsets(node).await,
        None => Vec::new(),
    };
    let families = Families { registry: Registry::new(), whole: RefCell::default() };
    process(&families, started, node.is_some_and(|node| node.is_ready()));
    if let Some(node) = node {
        disk(&families, node);
        shards(&families, node);
        partitions(&families, node);
        consumer_groups(&families, node, &groups);
        exports(&families, node);
    }
    let mut text = Vec::new();
    let mut all = families.registry.gather();
    all.extend(families.whole.take());
    if TextEncoder::new().encode(&all, &mut text).is_err() {
        return String::new();
    }
    String::from_utf8(text).unwrap_or_default()
}

async fn committed_offsets(node: &Arc<Node>) -> Vec<GroupOffset> {
    let mut all = Vec::new();
    for shard in &node.shards {
        let found = shard
            .run(|s| async move {
                let mut out = Vec::new();
                for shell in s.coordinators.all() {
                    shell.with_coordinator(|c| {
                        out.extend(c.lag_view().map(|(group, topic, partition, offset)| GroupOffset {
                            group: group.to_string(),
                            topic: topic.to_string(),
                            partition,
                            offset,
                        }));
                    });
                }
                out
            })
            .await;
        all.extend(found.unwrap_or_default());
    }
    for (topic, offsets) in node.exports.all_settled() {
        let group = format!("export.{topic}");
        all.extend(offsets.into_iter().map(|(partition, offset)| GroupOffset {
            group: group.clone(),
            topic: topic.clone(),
            partition,
            offset,
        }));
    }
    all
}

fn process(families: &Families, started: Instant, is_ready: bool) {
    families
        .gauge("flumen_application_build", "Version of the running binary", &["version"])
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
    families
        .float("flumen_application_uptime_seconds", "Seconds since the process started", &[])
        .with_label_values::<&str>(&[])
        .set(started.elapsed().as_secs_f64());
    families
        .gauge("flumen_application_ready", "1 once the broker serves clients", &[])
        .with_label_values::<&str>(&[])
        .set(i64::from(is_ready));
    if let Some(bytes) = resident_bytes() {
        families
            .gauge("flumen_memory_resident_bytes", "Resident memory of the process", &[])
            .with_label_values::<&str>(&[])
            .set(bytes);
    }
}

fn disk(families: &Families, node: &Node) {
    families
        .gauge("flumen_storage_disk_free_bytes", "Free bytes of the data directory's file system", &[])
        .with_label_values::<&str>(&[])
        .set(to_i64(node.disk.free_bytes()));
    families
        .gauge("flumen_storage_free_space_alert", "1 while producers are turned away for want of space", &[])
        .with_label_values::<&str>(&[])
        .set(i64::from(node.disk.is_low()));
}

/// Second field of statm, in pages of 4 KiB.
fn resident_bytes() -> Option<i64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    text.split_whitespace().nth(1)?.parse::<i64>().ok()?.checked_mul(4096)
}

fn shards(families: &Families, node: &Node) {
    let requests = families.counter("flumen_kafka_requests_total", "Requests by API", &["api"]);
    let seconds = families.float(
        "flumen_kafka_request_handling_seconds_total",
        "Time from a whole frame to its answer (produce: to the append), by API",
        &["api"],
    );
    let one = |name: &str, help: &str| families.counter(name, help, &["shard"]);
    let records = one("flumen_kafka_records_produced_total", "Records appended for clients");
    let batches = one("flumen_kafka_batches_produced_total", "Record batches received");
    let bytes =
        families.counter("flumen_kafka_request_bytes_total", "Bytes by direction", &["shard", "direction"]);
    let fetches = one("flumen_kafka_fetches_total", "Fetch requests answered");
    let duplicates =
        one("flumen_kafka_duplicate_batches_total", "Retries of idempotent producers recognised");
    let failed =
        one("flumen_kafka_failed_produces_total", "Partitions of produce requests answered with an error");
    let hops = one("flumen_shard_hops_total", "Produce requests handed to another shard");
    let wal = one("flumen_storage_wal_bytes_total", "Bytes written to the shard log");
    let commits = one("flumen_storage_wal_commits_total", "Group commits of the shard log");
    let segments = one("flumen_storage_segment_bytes_total", "Bytes written to segments");
    let compactions = one("flumen_storage_compactions_total", "Passes of compaction over a partition");
    let compacted = families.counter(
        "flumen_storage_compaction_bytes_total",
        "Bytes of segments that compaction read, and wrote instead",
        &["shard", "direction"],
    );
    let appended = one("flumen_storage_appended_bytes_total", "Bytes of batches appended");
    let cache = families.gauge("flumen_storage_cache_bytes", "Bytes held by the tail cache", &["shard"]);
    let full = families.gauge("flumen_storage_no_space", "1 while the disk is full", &["shard"]);
    let connections = families.gauge("flumen_kafka_connections", "Open client connections", &["shard"]);
    let mut handling = Vec::new();
    let mut commit_times = Vec::new();
    for (id, metrics) in node.metrics.iter().enumerate() {
        let shard = id.to_string();
        let l = &[shard.as_str()];
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        for (key, count, us) in metrics.requests() {
            let api = ApiKey::try_from(key).map_or_else(|()| key.to_string(), |k| format!("{k:?}"));
            requests.with_label_values(&[api.as_str()]).inc_by(count);
            seconds.with_label_values(&[api.as_str()]).add(us as f64 / 1e6);
        }
        handling.push(histogram(&[("shard", &shard)], metrics.handling_times()));
        commit_times.push(histogram(&[("shard", &shard)], metrics.commit_times()));
        records.with_label_values(l).inc_by(read(&metrics.records_in));
        batches.with_label_values(l).inc_by(read(&metrics.batches_in));
        bytes.with_label_values(&[shard.as_str(), "produce"]).inc_by(read(&metrics.bytes_in));
        bytes.with_label_values(&[shard.as_str(), "consume"]).inc_by(read(&metrics.bytes_out));
        fetches.with_label_values(l).inc_by(read(&metrics.fetches));
        duplicates.with_label_values(l).inc_by(read(&metrics.duplicates));
        failed.with_label_values(l).inc_by(read(&metrics.failed_produces));
        hops.with_label_values(l).inc_by(read(&metrics.hops));
        wal.with_label_values(l).inc_by(read(&metrics.wal_bytes));
        commits.with_label_values(l).inc_by(read(&metrics.wal_commits));
        segments.with_label_values(l).inc_by(read(&metrics.segment_bytes));
        compactions.with_label_values(l).inc_by(read(&metrics.compactions));
        compacted.with_label_values(&[shard.as_str(), "read"]).inc_by(read(&metrics.compaction_bytes_read));
        let written = read(&metrics.compaction_bytes_written);
        compacted.with_label_values(&[shard.as_str(), "written"]).inc_by(written);
        appended.with_label_values(l).inc_by(read(&metrics.appended_bytes));
        cache.with_label_values(l).set(to_i64(read(&metrics.cache_bytes)));
        full.with_label_values(l).set(to_i64(read(&metrics.no_space)));
        connections.with_label_values(l).set(to_i64(node.shards[id].connections() as u64));
    }
    let mut whole = families.whole.borrow_mut();
    whole.push(histograms(
        "flumen_kafka_request_handling_seconds",
        "Time from a whole frame to its answer (produce: to the append), all APIs",
        handling,
    ));
    whole.push(histograms(
        "flumen_storage_wal_commit_seconds",
        "Time of a group commit's write",
        commit_times,
    ));
}

fn labelled<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> Metric {
    let mut metric = Metric::default();
    let labels = labels.map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_string());
        pair.set_value(value.to_string());
        pair
    });
    metric.set_label(labels.collect());
    metric
}

fn buckets(cumulative: Vec<(f64, u64)>, count: u64, sum: f64) -> proto::Histogram {
    let mut histogram = proto::Histogram::default();
    let buckets = cumulative.into_iter().map(|(bound, count)| {
        let mut bucket = proto::Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(count);
        bucket
    });
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(count);
    histogram.set_sample_sum(sum);
    histogram
}

fn histogram(labels: &[(&str, &str)], times: Times) -> Metric {
    let mut metric = labelled(labels.iter().copied());
    let count = times.cumulative.last().map_or(0, |(_, count)| *count);
    metric.set_histogram(buckets(times.cumulative, count, times.sum_seconds));
    metric
}

fn histograms(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_string());
    family.set_help(help.to_string());
    family.set_field_type(MetricType::HISTOGRAM);
    family.set_metric(metrics);
    family
}

fn partitions(families: &Families, node: &Node) {
    let labels = &["topic", "partition"];
    let max = families.gauge("flumen_kafka_max_offset", "High watermark", labels);
    let start = families.gauge("flumen_kafka_log_start_offset", "First offset that can be read", labels);
    let size = families.gauge("flumen_kafka_partition_size_bytes", "Bytes of the partition's log", labels);
    let damaged = families.gauge("flumen_kafka_damaged_partitions", "Partitions that refuse to serve", &[]);
    let topics = families.gauge("flumen_kafka_topics", "Topics", &[]);
    let count = families.gauge("flumen_kafka_partitions", "Partitions", &[]);
    let image = node.image.load_full();
    let (mut total, mut bad) = (0usize, 0);
    for topic in image.topics.values() {
        for (index, info) in topic.partitions.iter().enumerate() {
            let gauges = node.gauges_of(info.group_id);
            total += 1;
            bad += i64::from(gauges.damaged.load(Ordering::Relaxed));
            if total > PARTITION_SERIES_MAX {
                continue;
            }
            let index = index.to_string();
            let l = &[topic.name.as_str(), index.as_str()];
            max.with_label_values(l).set(gauges.high_watermark.load(Ordering::Relaxed));
            start.with_label_values(l).set(gauges.log_start_offset.load(Ordering::Relaxed));
            size.with_label_values(l).set(to_i64(gauges.size_bytes.load(Ordering::Relaxed)));
        }
    }
    damaged.with_label_values::<&str>(&[]).set(bad);
    topics.with_label_values::<&str>(&[]).set(to_i64(image.topics.len() as u64));
    count.with_label_values::<&str>(&[]).set(to_i64(total as u64));
}

fn consumer_groups(families: &Families, node: &Node, groups: &[GroupOffset]) {
    let labels = &["group", "topic", "partition"];
    let committed =
        families.gauge("flumen_kafka_consumer_group_committed_offset", "Committed offset", labels);
    let lag =
        families.gauge("flumen_kafka_consumer_group_lag", "High watermark minus committed offset", labels);
    let sum = families.gauge("flumen_kafka_consumer_group_lag_sum", "Lag over all partitions", &["group"]);
    let max = families.gauge("flumen_kafka_consumer_group_lag_max", "Largest lag of a partition", &["group"]);
    let image = node.image.load_full();
    for g in groups {
        let Some(info) = image.topics.get(&g.topic).and_then(|t| t.partition(g.partition)) else {
            continue;
        };
        let end = node.gauges_of(info.group_id).high_watermark.load(Ordering::Relaxed);
        let behind = (end - g.offset).max(0);
        let partition = g.partition.to_string();
        let l = &[g.group.as_str(), g.topic.as_str(), partition.as_str()];
        committed.with_label_values(l).set(g.offset);
        lag.with_label_values(l).set(behind);
        sum.with_label_values(&[g.group.as_str()]).add(behind);
        let largest = max.with_label_values(&[g.group.as_str()]);
        largest.set(largest.get().max(behind));
    }
}

/// What every export counts of itself, and how many dead letters lie in its topic.
fn exports(families: &Families, node: &Node) {
    let mut by_name: BTreeMap<&'static str, MetricFamily> = BTreeMap::new();
    let pending =
        families.gauge("flumen_export_dlq_pending", "Records in the dead-letter topic", &["export", "topic"]);
    let image = node.image.load_full();
    for (topic, view) in node.exports.views() {
        // Every export is named after its topic; dashboards that know other exports ask by either label.
        let own = [("export", topic.clone()), ("topic", topic.clone())];
        let letters: i64 = image.topics.get(&view.status.dead_letter_topic).map_or(0, |t| {
            let held = |g: &PartitionGauges| {
                g.high_watermark.load(Ordering::Relaxed) - g.log_start_offset.load(Ordering::Relaxed)
            };
            t.partitions.iter().map(|p| held(&node.gauges_of(p.group_id))).sum()
        });
        pending.with_label_values(&[topic.as_str(), topic.as_str()]).set(letters);
        // One that could not be started counts nothing, but its state is told.
        let metrics = view.metrics.unwrap_or_else(|| {
            let failed = State::ALL.iter().position(|s| *s == view.status.state).unwrap_or(0);
            let metrics = ExportMetrics::default();
            metrics.state.store(failed as u64, Ordering::Relaxed);
            Arc::new(metrics)
        });
        for sample in metrics.samples() {
            let labels = own.iter().map(|(n, v)| (*n, v.as_str()));
            let mut metric = labelled(labels.chain(sample.labels.iter().map(|(n, v)| (*n, v.as_str()))));
            let kind = match sample.value {
                SampleValue::Counter(value) => {
                    let mut counter = proto::Counter::default();
                    counter.set_value(value);
                    metric.set_counter(counter);
                    MetricType::COUNTER
                }
                SampleValue::Gauge(value) => {
                    let mut gauge = proto::Gauge::default();
                    gauge.set_value(value);
                    metric.set_gauge(gauge);
                    MetricType::GAUGE
                }
                SampleValue::Histogram { cumulative, count, sum } => {
                    metric.set_histogram(buckets(cumulative, count, sum));
                    MetricType::HISTOGRAM
                }
            };
            let family = by_name.entry(sample.name).or_insert_with(|| {
                let mut family = MetricFamily::default();
                family.set_name(sample.name.to_string());
                family.set_help(sample.help.to_string());
                family.set_field_type(kind);
                family
            });
            family.mut_metric().push(metric);
        }
    }
    families.whole.borrow_mut().extend(by_name.into_values());
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
