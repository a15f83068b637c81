//! Row 13: row 1 once more, sent by Java's own `ProducerPerformance` instead of our generator.
//!
//! A generator of one's own may flatter one's own broker; this one is Kafka's. Its batching is off, so that a record is
//! a batch as in row 1. One producer at a fixed rate: a JVM beside a broker leaves no room for saturation on two cores.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::report::{Goal, Verdict};
use super::rows_cost::no_settings;
use super::rows_partitions::create;
use super::session::{Round, Session, topic_name};
use super::variant::{DURABLE, KAFKA, Variant};
use super::{LogConfig, Row};
use crate::stats;

/// Low enough that answers come before the next record is due, so that requests stay as small as in row 1.
const RECORDS_PER_S: u64 = 3_000;
const PARTITIONS: usize = 100;

pub fn rows() -> Vec<Row> {
    vec![Row {
        number: 13,
        title: "row 1 with a real client: Java's ProducerPerformance, one producer, batching off, fixed rate",
        estimate: |c: &LogConfig| {
            let pairs = if c.quick { 2.0 } else { 4.0 };
            c.estimate(0.01, 0.01, 0.0) + pairs * (seconds(c) as f64 + 3.0)
        },
        run: java,
    }]
}

fn seconds(c: &LogConfig) -> u64 {
    (c.seconds() * 1.5).ceil() as u64
}

fn java(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    s.rounds(13, false, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA]) {
            perform(r, &v)?;
        }
        Ok(())
    })?;
    let line = |what: &str, goal, name: &str| {
        let of = |v: &Variant| s.values(13, name, v);
        Verdict::ratio(13, what, goal, (&DURABLE, &of(&DURABLE)), (&KAFKA, &of(&KAFKA)))
    };
    Ok(vec![
        line("real client: CPU us per record (one a batch)", Goal::AtMost(0.25), "CPU us per record"),
        line("real client: records/s", Goal::Informs, "records/s"),
        line("real client: mean batch bytes, as the client counts", Goal::Informs, "batch bytes"),
        line("real client: records per request", Goal::Informs, "records per request"),
        line("real client: p99 ms, as the client counts", Goal::Informs, "p99 ms"),
        line("real client: p99.9 ms, as the client counts", Goal::Informs, "p99.9 ms"),
    ])
}

fn perform(r: &mut Round<'_, '_>, v: &Variant) -> Result<()> {
    let topic = topic_name("java", v);
    create(&r.peer.kafka, &topic, PARTITIONS, &v.topic_configs(&[]))?;
    let records = RECORDS_PER_S * seconds(r.session.config);
    let before = stats::cpu(r.peer.pid())?;
    let mut command = Command::new(r.session.config.sides.bench_dir.join("kafka-tool.sh"));
    command.arg("org.apache.kafka.tools.ProducerPerformance");
    command.args(["--topic", &topic, "--record-size", "1024", "--print-metrics"]);
    command.args(["--num-records", &records.to_string(), "--throughput", &RECORDS_PER_S.to_string()]);
    command.args(["--producer-props", &format!("bootstrap.servers={}", r.peer.kafka), "acks=all"]);
    command.args(["linger.ms=0", "batch.size=0", "enable.idempotence=true"]);
    // A client that stays in the first compiler could not keep the rate.
    command.env("KAFKA_TOOL_OPTS", "-Xmx512m");
    if let Some(jars) = &r.session.config.sides.kafka_dir {
        command.env("KAFKA_DIR", jars);
    }
    let output = command.output().context("cannot run kafka-tool.sh")?;
    let cpu = stats::cpu(r.peer.pid())?.since(before).total();
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "ProducerPerformance: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let p = Performance::parse(&text).with_context(|| format!("not ProducerPerformance's words:\n{text}"))?;
    ensure!(p.records == records, "{} of {records} records were sent", p.records);
    let us = cpu * 1e6 / records as f64;
    r.session.say(&format!(
        "  ProducerPerformance, {}: {:.0} records/s, {:.0} B/batch, {:.2} records/request, {us:.1} us of broker CPU per record, p99/p99.9 {}/{} ms",
        v.name, p.records_per_s, p.batch_bytes, p.records_per_request, p.p99_ms, p.p999_ms
    ));
    r.reading("CPU us per record", v, us);
    r.reading("records/s", v, p.records_per_s);
    r.reading("batch bytes", v, p.batch_bytes);
    r.reading("records per request", v, p.records_per_request);
    r.reading("p99 ms", v, p.p99_ms);
    r.reading("p99.9 ms", v, p.p999_ms);
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Performance {
    records: u64,
    records_per_s: f64,
    p99_ms: f64,
    p999_ms: f64,
    batch_bytes: f64,
    records_per_request: f64,
}

impl Performance {
    /// The summary is the only line with a 99.9th percentile; metrics are `group:name:{tags} : value`.
    fn parse(text: &str) -> Option<Self> {
        let summary = text.lines().find(|l| l.contains(" ms 99.9th"))?;
        let before = |word: &str| -> Option<f64> {
            summary.split(word).next()?.trim_end().rsplit([' ', '(']).next()?.parse().ok()
        };
        let metric = |name: &str| -> Option<f64> {
            let line = text.lines().find(|l| l.starts_with(&format!("producer-metrics:{name}:")))?;
            line.rsplit(" : ").next()?.trim().parse().ok()
        };
        Some(Self {
            records: before("records sent")? as u64,
            records_per_s: before("records/sec")?,
            p99_ms: before("ms 99th")?,
            p999_ms: before("ms 99.9th")?,
            batch_bytes: metric("batch-size-avg")?,
            records_per_request: metric("records-per-request-avg")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_and_the_metrics_are_read() {
        let text = "4999 records sent, 999.8 records/sec (0.98 MB/sec), 1.1 ms avg latency, 200.0 ms max latency.\n\
            50000 records sent, 9999.8 records/sec (9.77 MB/sec), 0.90 ms avg latency, 200.00 ms max latency, 1 ms 50th, 2 ms 95th, 5 ms 99th, 9 ms 99.9th.\n\
            \n\
            Metric Name                                     Value\n\
            producer-metrics:batch-size-avg:{client-id=p}                 : 1091.500\n\
            producer-metrics:records-per-request-avg:{client-id=p}        : 1.040\n";
        let p = Performance::parse(text).unwrap();
        assert_eq!((p.records, p.records_per_s, p.p99_ms, p.p999_ms), (50_000, 9_999.8, 5.0, 9.0));
        assert_eq!((p.batch_bytes, p.records_per_request), (1_091.5, 1.04));
        assert_eq!(Performance::parse("no summary"), None);
    }
}
