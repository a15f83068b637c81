//! Row 9: what partitions cost. The same load on 1 to 10,000 of them.

use std::time::Instant;

use anyhow::Result;

use super::figure::Measure;
use super::report::{Goal, Verdict, compare, own_ratio};
use super::rows_cost::no_settings;
use super::rows_latency::{LOAD, maximum_s};
use super::session::Session;
use super::variant::{DURABLE, KAFKA};
use super::{LogConfig, Row};
use crate::client::Client;
use crate::load::{LoadConfig, Mode};
use crate::peer::Side;

const CELLS: [(usize, &str); 3] =
    [(1, "1 partition"), (1_000, "1,000 partitions"), (10_000, "10,000 partitions")];
/// What both brokers together need to make the partitions of this row, for the estimate.
const CREATION_S: f64 = 60.0;

pub fn rows() -> Vec<Row> {
    vec![Row {
        number: 9,
        title: "1 to 10,000 partitions, open loop at half of Kafka's maximum, one-record batches of 1 KiB",
        estimate: |c: &LogConfig| {
            c.estimate(3.0, 3.0, 0.0) + maximum_s(c) + CREATION_S * if c.quick { 1.0 } else { 2.0 }
        },
        run: partitions,
    }]
}

fn partitions(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    let rate = s.kafka_max(&KAFKA)? * LOAD;
    s.rounds(9, false, no_settings, |r| {
        for v in r.mine(&[DURABLE, KAFKA]) {
            for (partitions, cell) in CELLS {
                // Kafka needs minutes to make so many and to write to each for the first time.
                if partitions == CELLS[2].0 && v.side == Side::Kafka && !r.session.config.full {
                    continue;
                }
                let open = LoadConfig { mode: Mode::Open, in_flight: 5, partitions, rate, ..r.shape() };
                let topic = super::session::topic_name(cell, &v);
                let took = create(&r.peer.kafka, &topic, partitions, &v.topic_configs(&[]))?;
                if partitions > 1 {
                    r.reading(&format!("{cell}: creation s"), &v, took);
                    r.touch(cell, &v, partitions)?;
                }
                r.load(cell, &v, open)?;
            }
        }
        Ok(())
    })?;
    let (one, most) = (CELLS[0].1, CELLS[2].1);
    let own = |what, goal, cell, m| own_ratio(s, 9, what, goal, (cell, one), m);
    let (cpu, p99) = (Measure::CpuSPerGb, Measure::Quantile(0.99));
    let pair = (&DURABLE, &KAFKA);
    let creation = format!("{}: creation s", CELLS[1].1);
    let made = |v| s.values(9, &creation, v);
    let of = |what, m| Verdict::own(9, what, Goal::Informs, &DURABLE, s.figure(9, most, &DURABLE, m), None);
    Ok(vec![
        own("CPU per GB, 10,000 partitions by 1", Goal::AtMost(1.3), most, cpu),
        own("p99, 10,000 partitions by 1", Goal::AtMost(1.3), most, p99),
        own("records delivered, 10,000 partitions by 1", Goal::Informs, most, Measure::DeliveredRecordsPerS),
        of("10,000 partitions: CPU-s per GB", cpu),
        of("10,000 partitions: p99 ms", p99),
        own("CPU per GB, 1,000 partitions by 1", Goal::Informs, CELLS[1].1, cpu),
        own("p99, 1,000 partitions by 1", Goal::Informs, CELLS[1].1, p99),
        compare(s, 9, "1,000 partitions: CPU-s per GB", Goal::Informs, CELLS[1].1, cpu, pair),
        compare(s, 9, "1,000 partitions: p99 ms", Goal::Informs, CELLS[1].1, p99, pair),
        Verdict::ratio(
            9,
            "seconds to make 1,000 partitions",
            Goal::Informs,
            (&DURABLE, &made(&DURABLE)),
            (&KAFKA, &made(&KAFKA)),
        ),
    ])
}

/// Seconds until every partition of a new topic has a leader that answers.
pub fn create(bootstrap: &str, topic: &str, partitions: usize, configs: &[(String, String)]) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::connect(bootstrap).await?;
        let began = Instant::now();
        client.ensure_topic(topic, partitions, 1, configs).await?;
        Ok(began.elapsed().as_secs_f64())
    })
}
