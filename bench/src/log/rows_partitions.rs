//! Row 9: what partitions cost. The same load on 1 to 10,000 of them.

use std::time::Instant;

use anyhow::Result;

use super::figure::{Measure, Samples};
use super::report::{Goal, Verdict, compare, own_ratio};
use super::rows_cost::no_settings;
use super::rows_latency::{LOAD, maximum_s};
use super::session::Session;
use super::variant::{DURABLE, KAFKA};
use super::{LogConfig, Row};
use crate::client::Client;
use crate::load::{LoadConfig, Mode};

const CELLS: [(usize, &str); 4] =
    [(1, "1 partition"), (100, "100 partitions"), (1_000, "1,000 partitions"), (10_000, "10,000 partitions")];
/// What both brokers together need to make the partitions of this row, for the estimate.
const CREATION_S: f64 = 60.0;

pub fn rows() -> Vec<Row> {
    vec![Row {
        number: 9,
        title: "1 to 10,000 partitions, open loop at half of Kafka's maximum, one-record batches of 1 KiB",
        estimate: |c: &LogConfig| {
            c.estimate(4.0, 4.0, 0.0) + maximum_s(c) + CREATION_S * if c.quick { 1.0 } else { 2.0 }
        },
        run: partitions,
    }]
}

fn partitions(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    let rate = s.kafka_max(&KAFKA)? * LOAD;
    s.rounds(9, false, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA]) {
            for (partitions, cell) in CELLS {
                let open = LoadConfig { mode: Mode::Open, in_flight: 5, partitions, rate, ..r.shape() };
                let topic = super::session::topic_name(cell, &v);
                let took = create(&r.peer.kafka, &topic, partitions, &v.topic_configs(&[]))?;
                if partitions == CELLS[3].0 {
                    r.session.say(&format!("  {cell} made in {took:.1} s ({})", v.name));
                    r.reading("creation s", &v, took);
                }
                r.load(cell, &v, open)?;
            }
        }
        Ok(())
    })?;
    let (one, most) = (CELLS[0].1, CELLS[3].1);
    let own = |what, goal, cell, m| own_ratio(s, 9, what, goal, (cell, one), m);
    let (cpu, p99) = (Measure::CpuSPerGb, Measure::Quantile(0.99));
    let creation = |v| s.values(9, "creation s", v);
    let pair = (&DURABLE, &KAFKA);
    let made: (Samples<'_>, Samples<'_>) = (creation(&DURABLE), creation(&KAFKA));
    Ok(vec![
        own("CPU per GB, 10,000 partitions by 1", Goal::AtMost(1.3), most, cpu),
        own("p99, 10,000 partitions by 1", Goal::AtMost(1.3), most, p99),
        own("records delivered, 10,000 partitions by 1", Goal::Informs, most, Measure::DeliveredRecordsPerS),
        own("CPU per GB, 1,000 partitions by 1", Goal::Informs, CELLS[2].1, cpu),
        own("p99, 1,000 partitions by 1", Goal::Informs, CELLS[2].1, p99),
        compare(s, 9, "10,000 partitions: CPU-s per GB", Goal::Informs, most, cpu, pair),
        compare(s, 9, "10,000 partitions: p99 ms", Goal::Informs, most, p99, pair),
        Verdict::ratio(
            9,
            "seconds to make 10,000 partitions",
            Goal::Informs,
            (&DURABLE, &made.0),
            (&KAFKA, &made.1),
        ),
    ])
}

/// Seconds until every partition of a new topic has a leader that answers.
pub fn create(bootstrap: &str, topic: &str, partitions: usize, configs: &[(String, String)]) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::connect(bootstrap).await?;
        let began = Instant::now();
        client.ensure_topic(topic, partitions, configs).await?;
        Ok(began.elapsed().as_secs_f64())
    })
}
