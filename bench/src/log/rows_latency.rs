//! Rows 6, 7, 8 and 11: latency and delivery in the open loop, at rates that come from Kafka's maximum in this session.

use anyhow::{Result, ensure};

use super::Row;
use super::figure::Measure;
use super::report::{Goal, Verdict, compare, own_ratio};
use super::rows_cost::no_settings;
use super::session::Session;
use super::variant::{DURABLE, KAFKA, KAFKA_FLUSH, NULL};
use crate::client::{Client, EARLIEST};
use crate::load::{LoadConfig, Mode};
use crate::peer::Side;
use crate::plan::Keyed;

pub fn rows() -> Vec<Row> {
    vec![
        Row {
            number: 6,
            title: "latency at half of Kafka's maximum, open loop, 50 connections, one-record batches of 1 KiB",
            estimate: |c| c.estimate(2.0, 3.0, 1.0) + maximum_s(c),
            run: latency,
        },
        Row {
            number: 7,
            title: "4, 50 and 500 producers that offer the same bytes",
            estimate: |c| c.estimate(3.0, 3.0, 0.0) + maximum_s(c),
            run: producers,
        },
        Row {
            number: 8,
            title: "keyed (uniform, zipf 0.99) against unkeyed at a fixed load",
            estimate: |c| c.estimate(3.0, 3.0, 0.0) + maximum_s(c),
            run: keyed,
        },
        Row {
            number: 11,
            title: "retention that deletes every few seconds, on against off",
            estimate: |c| c.estimate(3.0, 3.0, 0.0) + maximum_s(c),
            run: retention,
        },
    ]
}

/// Finding Kafka's maximum, once per session; counted for every row that may be the first to ask.
pub fn maximum_s(c: &super::LogConfig) -> f64 {
    c.estimate(0.0, 2.0, 0.0) / if c.quick { 1.0 } else { 2.0 * c.repeat.max(1) as f64 }
}

/// The share of Kafka's maximum that latency is measured at.
pub const LOAD: f64 = 0.5;

fn latency(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const SAME: &str = "half of Kafka's maximum";
    const FLUSHED: &str = "half of flush=1's maximum";
    let rate = s.kafka_max(&KAFKA)? * LOAD;
    let flushed_rate = s.kafka_max(&KAFKA_FLUSH)? * LOAD;
    s.rounds(6, true, no_settings, |r| {
        let open = LoadConfig { mode: Mode::Open, in_flight: 5, ..r.shape() };
        for v in r.mine(&[DURABLE, KAFKA, NULL]) {
            r.load(SAME, &v, LoadConfig { rate, ..open.clone() })?;
        }
        for v in r.mine(&[DURABLE, KAFKA_FLUSH]) {
            r.load(FLUSHED, &v, LoadConfig { rate: flushed_rate, ..open.clone() })?;
        }
        // What Kafka with a sync per append makes of the common rate; it is not expected to hold it.
        for v in r.mine(&[KAFKA_FLUSH]) {
            r.load(SAME, &v, LoadConfig { rate, ..open.clone() })?;
        }
        Ok(())
    })?;
    let q = Measure::Quantile;
    let same = |what, goal, m| compare(s, 6, what, goal, SAME, m, (&DURABLE, &KAFKA));
    let flush = (&DURABLE, &KAFKA_FLUSH);
    Ok(vec![
        same("p99.9 ms at half of Kafka's maximum", Goal::AtMost(1.0), q(0.999)),
        same("p99 ms", Goal::Informs, q(0.99)),
        same("p50 ms", Goal::Informs, q(0.5)),
        compare(
            s,
            6,
            "p99.9 ms against flush=1, at half of what that can hold",
            Goal::AtMost(0.1),
            FLUSHED,
            q(0.999),
            flush,
        ),
        compare(
            s,
            6,
            "p99.9 ms against flush=1, at half of Kafka's maximum",
            Goal::Informs,
            SAME,
            q(0.999),
            flush,
        ),
        compare(s, 6, "delivered records/s there", Goal::Informs, SAME, Measure::DeliveredRecordsPerS, flush),
    ])
}

/// What a producer has sent together after the `linger.ms` of Kafka 4's clients, within their `batch.size`.
fn lingered_records(records_per_s: f64, producers: usize) -> usize {
    const LINGER_S: f64 = 0.005;
    const BATCH_RECORDS_MAX: f64 = 16.0;
    (records_per_s / producers as f64 * LINGER_S).round().clamp(1.0, BATCH_RECORDS_MAX) as usize
}

fn producers(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const CELLS: [(usize, &str); 3] = [(4, "4 producers"), (50, "50 producers"), (500, "500 producers")];
    let records_per_s = s.kafka_max(&KAFKA)?;
    s.say(&format!("offered: {:.1} MB/s in records of 1 KiB", records_per_s * 1024.0 / 1e6));
    s.rounds(7, false, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA]) {
            for (connections, cell) in CELLS {
                let batch_records = lingered_records(records_per_s, connections);
                let rate = records_per_s / batch_records as f64;
                let open = LoadConfig {
                    mode: Mode::Open,
                    in_flight: 5,
                    connections,
                    batch_records,
                    rate,
                    ..r.shape()
                };
                r.load(cell, &v, open)?;
            }
        }
        Ok(())
    })?;
    let records = Measure::DeliveredRecordsPerS;
    let own = |what, goal, cell| own_ratio(s, 7, what, goal, (cell, CELLS[0].1), records);
    Ok(vec![
        own("records delivered by 50 producers, by those of 4", Goal::AtLeast(0.98), CELLS[1].1),
        own("records delivered by 500 producers, by those of 4", Goal::AtLeast(0.95), CELLS[2].1),
        compare(
            s,
            7,
            "500 producers: p99 ms",
            Goal::Informs,
            CELLS[2].1,
            Measure::Quantile(0.99),
            (&DURABLE, &KAFKA),
        ),
    ])
}

fn keyed(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    /// Records of a request: one batch of them unkeyed, a batch each keyed.
    const TOGETHER: usize = 20;
    const UNKEYED: &str = "unkeyed";
    let records_per_s = s.kafka_max(&KAFKA)? * LOAD;
    s.say(&format!("offered: {records_per_s:.0} records/s, {TOGETHER} in each request"));
    s.rounds(8, false, no_settings, |r| {
        let open = LoadConfig { mode: Mode::Open, in_flight: 5, ..r.shape() };
        for v in r.mine(&[DURABLE, KAFKA]) {
            let rate = records_per_s / TOGETHER as f64;
            r.load(UNKEYED, &v, LoadConfig { batch_records: TOGETHER, rate, ..open.clone() })?;
            for (cell, keyed) in [("keyed uniform", Keyed::Uniform), ("keyed zipf", Keyed::Zipf)] {
                let c = LoadConfig {
                    keyed,
                    partitions_per_request: TOGETHER,
                    rate: records_per_s,
                    ..open.clone()
                };
                r.load(cell, &v, c)?;
            }
        }
        Ok(())
    })?;
    let mut out = Vec::new();
    for cell in ["keyed uniform", "keyed zipf"] {
        let own = |what: &str, goal, m| {
            own_ratio(s, 8, &format!("{cell} by unkeyed: {what}"), goal, (cell, UNKEYED), m)
        };
        out.push(own("records delivered", Goal::AtLeast(0.98), Measure::DeliveredRecordsPerS));
        out.push(own("p99", Goal::AtMost(1.25), Measure::Quantile(0.99)));
    }
    for cell in [UNKEYED, "keyed uniform", "keyed zipf"] {
        let what = format!("{cell}: p99 ms");
        out.push(compare(s, 8, &what, Goal::Informs, cell, Measure::Quantile(0.99), (&DURABLE, &KAFKA)));
    }
    Ok(out)
}

/// How long a partition of the retention row takes to fill a segment.
const SEGMENT_S: f64 = 1.5;

/// As many partitions as make each of them fill a segment in that time.
fn filling_partitions(bytes_per_s: f64, segment_bytes: u64) -> usize {
    ((bytes_per_s * SEGMENT_S / segment_bytes as f64) as usize).max(1)
}

fn retention(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const ON: &str = "retention on";
    const OFF: &str = "retention off";
    /// The smallest that Kafka takes.
    const SEGMENT_BYTES: u64 = 1 << 20;
    let rate = s.kafka_max(&KAFKA)? * LOAD;
    let partitions = filling_partitions(rate * 1024.0, SEGMENT_BYTES);
    s.say(&format!("{partitions} partitions, each filling a segment of 1 MiB in about {SEGMENT_S} s"));
    let settings = |side| match side {
        // As eager as Flumen, which looks every second and removes files at once.
        Side::Kafka => {
            let settings = [
                "log.retention.check.interval.ms=1000",
                "log.segment.delete.delay.ms=1000",
                // It would look for the first time after half a minute.
                "log.initial.task.delay.ms=1000",
            ];
            settings.map(String::from).to_vec()
        }
        _ => Vec::new(),
    };
    s.rounds(11, false, settings, |r| {
        let open = LoadConfig {
            mode: Mode::Open,
            in_flight: 5,
            rate,
            partitions,
            // Long enough for several deletions in each partition.
            seconds: (r.session.config.seconds() * 1.5).max(5.0 * SEGMENT_S),
            ..r.shape()
        };
        for v in r.mine(&[DURABLE, KAFKA]) {
            let mut cells = [(OFF, "-1".to_string()), (ON, SEGMENT_BYTES.to_string())];
            if r.number % 2 == 0 {
                cells.reverse();
            }
            for (cell, bytes) in cells {
                let configs = [("segment.bytes", SEGMENT_BYTES.to_string()), ("retention.bytes", bytes)];
                let topic = r.cell(cell, &v, open.clone(), &configs, false)?.load.config.topic.clone();
                let deleted = deleted_records(&r.peer.kafka, &topic, partitions)?;
                r.reading(&format!("{cell}: records deleted"), &v, deleted as f64);
                ensure!(
                    cell == OFF || deleted > 0,
                    "{}: nothing was deleted, so the row says nothing",
                    v.name
                );
                ensure!(cell == ON || deleted == 0, "{}: {deleted} records went without retention", v.name);
            }
        }
        Ok(())
    })?;
    let on = |m| (ON, OFF, m);
    let own = |what, goal, (a, b, m)| own_ratio(s, 11, what, goal, (a, b), m);
    let deleted = format!("{ON}: records deleted");
    let of = |v| s.values(11, &deleted, v);
    Ok(vec![
        own("p99.9 on by off", Goal::AtMost(1.1), on(Measure::Quantile(0.999))),
        own("p99 on by off", Goal::Informs, on(Measure::Quantile(0.99))),
        own("CPU per batch on by off", Goal::Informs, on(Measure::CpuUsPerBatch)),
        compare(
            s,
            11,
            "p99.9 ms with retention",
            Goal::Informs,
            ON,
            Measure::Quantile(0.999),
            (&DURABLE, &KAFKA),
        ),
        Verdict::ratio(
            11,
            "records deleted",
            Goal::Informs,
            (&DURABLE, &of(&DURABLE)),
            (&KAFKA, &of(&KAFKA)),
        ),
    ])
}

fn deleted_records(bootstrap: &str, topic: &str, partitions: usize) -> Result<i64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::connect(bootstrap).await?;
        Ok(client.offsets(topic, &(0..partitions as u32).collect::<Vec<_>>(), EARLIEST).await?.iter().sum())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_producers_send_smaller_batches_of_the_same_bytes() {
        assert_eq!([4, 50, 500].map(|n| lingered_records(36_000.0, n)), [16, 4, 1]);
        assert_eq!(lingered_records(1.0, 500), 1);
    }

    #[test]
    fn the_load_is_spread_so_that_segments_fill_in_time() {
        assert_eq!(filling_partitions(18e6, 1 << 20), 25);
        assert_eq!(filling_partitions(1.0, 1 << 20), 1);
    }
}
