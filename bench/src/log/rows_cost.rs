//! Rows 1 to 5: what a batch and a byte cost, and what durability costs.

use anyhow::Result;

use super::Row;
use super::figure::{Measure, Samples};
use super::report::{Goal, Verdict, compare};
use super::session::Session;
use super::variant::{DURABLE, KAFKA, KAFKA_FLUSH, NULL, OS, Variant};
use crate::load::LoadConfig;
use crate::peer::Side;
use crate::plan::Keyed;

pub fn rows() -> Vec<Row> {
    vec![
        Row {
            number: 1,
            title: "CPU per one-record batch of 1 KiB, 50 connections, 1 in flight, 100 partitions",
            estimate: |c| c.estimate(1.0, 1.0, 1.0),
            run: small,
        },
        Row {
            number: 2,
            title: "the same on 1,000 partitions, and keyed with 20 partitions per request",
            estimate: |c| c.estimate(2.5, 4.0, 2.0),
            run: spread,
        },
        Row {
            number: 3,
            title: "batches per second of the broker's CPU, 500 connections, 5 in flight",
            estimate: |c| c.estimate(1.0, 1.0, 1.0),
            run: many,
        },
        Row {
            number: 4,
            title: "CPU per GB, 128 KiB batches, 4 connections, one tailing consumer",
            estimate: |c| c.estimate(2.0, 1.0, 1.0),
            run: big,
        },
        Row {
            number: 5,
            title: "what durability costs: throughput on 100 partitions, 4 KiB batches, 5 in flight",
            estimate: |c| c.estimate(2.0, 2.0, 0.0),
            run: durability,
        },
    ]
}

pub fn no_settings(_: Side) -> Vec<String> {
    Vec::new()
}

const PAIR: (&Variant, &Variant) = (&DURABLE, &KAFKA);

fn small(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const CELL: &str = "50 connections";
    s.rounds(1, true, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA, NULL]) {
            r.load(CELL, &v, r.shape())?;
        }
        Ok(())
    })?;
    Ok(vec![
        compare(s, 1, "CPU us per batch", Goal::AtMost(0.25), CELL, Measure::CpuUsPerBatch, PAIR),
        above_null(s, 1, CELL),
        compare(s, 1, "batches/s", Goal::Informs, CELL, Measure::BatchesPerS, PAIR),
        compare(s, 1, "p99 ms", Goal::Informs, CELL, Measure::Quantile(0.99), PAIR),
    ])
}

/// The ratio without what sockets and protocol cost anybody.
fn above_null(s: &Session<'_>, row: u8, cell: &str) -> Verdict {
    let value = |v: &Variant| s.figure(row, cell, v, Measure::CpuUsPerBatch).map(|f| f.value);
    let above = |v: &Variant| {
        Samples::Values(value(v).zip(value(&NULL)).map(|(v, null)| v - null).into_iter().collect())
    };
    let what = "CPU us per batch above the null broker's";
    Verdict::ratio(row, what, Goal::Informs, (&DURABLE, &above(&DURABLE)), (&KAFKA, &above(&KAFKA)))
}

fn spread(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const WIDE: &str = "1,000 partitions";
    const KEYED: &str = "keyed, 20 per request";
    s.rounds(2, true, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA, NULL]) {
            r.touch(WIDE, &v, 1_000)?;
            r.load(WIDE, &v, LoadConfig { partitions: 1_000, ..r.shape() })?;
            let keyed = LoadConfig { keyed: Keyed::Uniform, partitions_per_request: 20, ..r.shape() };
            r.load(KEYED, &v, keyed)?;
        }
        Ok(())
    })?;
    let cpu = Measure::CpuUsPerBatch;
    Ok(vec![
        compare(s, 2, "1,000 partitions: CPU us per batch", Goal::AtMost(0.15), WIDE, cpu, PAIR),
        compare(s, 2, "1,000 partitions: batches/s", Goal::Informs, WIDE, Measure::BatchesPerS, PAIR),
        compare(
            s,
            2,
            "keyed, 20 partitions per request: CPU us per batch",
            Goal::AtMost(0.25),
            KEYED,
            cpu,
            PAIR,
        ),
        compare(s, 2, "keyed: batches/s", Goal::Informs, KEYED, Measure::BatchesPerS, PAIR),
    ])
}

fn many(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const CELL: &str = "500 connections, 5 in flight";
    s.rounds(3, true, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA, NULL]) {
            r.load(CELL, &v, LoadConfig { connections: 500, in_flight: 5, ..r.shape() })?;
        }
        Ok(())
    })?;
    let per_core = "batches/s per core (per second of the broker's CPU)";
    Ok(vec![
        compare(s, 3, per_core, Goal::AtLeast(4.0), CELL, Measure::BatchesPerCpuS, PAIR),
        compare(s, 3, "batches/s", Goal::Informs, CELL, Measure::BatchesPerS, PAIR),
        compare(s, 3, "p99 ms", Goal::Informs, CELL, Measure::Quantile(0.99), PAIR),
    ])
}

fn big(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const CELL: &str = "128 KiB batches";
    s.rounds(4, true, no_settings, |r| {
        for v in r.mine(&[OS, DURABLE, KAFKA, NULL]) {
            let c =
                LoadConfig { partitions: 16, connections: 4, in_flight: 5, batch_records: 128, ..r.shape() };
            r.load_with_tail(CELL, &v, c)?;
        }
        Ok(())
    })?;
    let cpu = |goal, v| compare(s, 4, "CPU-s per GB", goal, CELL, Measure::CpuSPerGb, (v, &KAFKA));
    let rate = |v| compare(s, 4, "produced MB/s", Goal::Informs, CELL, Measure::DeliveredMbPerS, (v, &KAFKA));
    // A consumer that falls behind makes a broker look cheap: how much of what was produced it got.
    let kept = |v: &Variant| {
        let share = s.cells(4, CELL, v).filter_map(|m| {
            let produced = m.load.acknowledged_batches as f64 * m.load.mean_batch_bytes;
            Some(m.tail.as_ref()?.bytes as f64 / produced)
        });
        Samples::Values(share.collect())
    };
    let consumed = "share of it that the consumer got";
    Ok(vec![
        cpu(Goal::AtMost(0.25), &OS),
        cpu(Goal::AtMost(0.3), &DURABLE),
        rate(&OS),
        rate(&DURABLE),
        Verdict::ratio(4, consumed, Goal::Informs, (&OS, &kept(&OS)), (&KAFKA, &kept(&KAFKA))),
        Verdict::ratio(4, consumed, Goal::Informs, (&DURABLE, &kept(&DURABLE)), (&KAFKA, &kept(&KAFKA))),
    ])
}

fn durability(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    const CELL: &str = "4 KiB batches";
    s.rounds(5, false, no_settings, |r| {
        for v in r.mine(&[DURABLE, OS, KAFKA, KAFKA_FLUSH]) {
            r.load(CELL, &v, LoadConfig { in_flight: 5, batch_records: 4, ..r.shape() })?;
        }
        Ok(())
    })?;
    let rate = |v: &Variant| s.samples(5, CELL, v, Measure::BatchesPerS);
    let judged = rate(&DURABLE).ratio(&rate(&OS));
    let kafka = rate(&KAFKA_FLUSH).ratio(&rate(&KAFKA));
    let what = "batches/s synced by not synced: durable / os, Kafka flush=1 / default";
    let against = |v: &Variant, k: &Variant| {
        Verdict::ratio(5, "batches/s", Goal::Informs, (v, &rate(v)), (k, &rate(k)))
    };
    Ok(vec![
        Verdict::own(5, what, Goal::AtLeast(0.8), &DURABLE, judged, kafka),
        against(&DURABLE, &KAFKA),
        against(&DURABLE, &KAFKA_FLUSH),
        against(&OS, &KAFKA),
    ])
}
