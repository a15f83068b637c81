//! Row 12: from spawn to the first acknowledgement, empty and after kill -9 with 10,000 partitions and some GB.

use anyhow::{Result, ensure};

use super::report::{Goal, Verdict};
use super::rows_partitions::create;
use super::session::{Round, Session, allocated_bytes};
use super::variant::{DURABLE, KAFKA, Variant};
use super::{KAFKA_START_S, LogConfig, Row};
use crate::client::{Client, LATEST};
use crate::peer::Side;

const PARTITIONS: usize = 10_000;
/// Records of a batch while filling.
const FILL_RECORDS: usize = 16;
/// Empty starts of Flumen; Kafka has one in every other row too, and each is long enough to be read off once.
const EMPTY_STARTS: usize = 5;
const TOPIC: &str = "ten-thousand";

pub fn rows() -> Vec<Row> {
    vec![Row {
        number: 12,
        title: "start to first acknowledgement: empty, and after kill -9 with 10,000 partitions and some GB",
        estimate: |c: &LogConfig| {
            let fill = 2.0 * fill_bytes(c) as f64 / 100e6;
            EMPTY_STARTS as f64 + 2.0 * KAFKA_START_S + fill + 150.0
        },
        run: start,
    }]
}

fn fill_bytes(c: &LogConfig) -> u64 {
    if c.quick { 1 << 30 } else { 3 << 30 }
}

fn start(s: &mut Session<'_>) -> Result<Vec<Verdict>> {
    for n in 1..=EMPTY_STARTS {
        let mut r = s.begin(12, n, Side::Flumen, &[])?;
        let took = r.started.as_secs_f64();
        r.reading(EMPTY, &DURABLE, took);
    }
    for v in [DURABLE, KAFKA] {
        let mut r = s.begin(12, 1, v.side, &[])?;
        if v.side == Side::Kafka {
            let took = r.started.as_secs_f64();
            r.reading(EMPTY, &v, took);
        }
        let outcome = after_kill(&mut r, &v);
        outcome.map_err(|e| r.with_words(e))?;
    }
    let compare = |what: &str, goal: Option<f64>, name: &str| {
        let of = |v: &Variant| s.values(12, name, v);
        let mut line =
            Verdict::ratio(12, what, Goal::Informs, (&DURABLE, &of(&DURABLE)), (&KAFKA, &of(&KAFKA)));
        // The goal is in seconds, not against Kafka.
        if let Some(limit) = goal {
            let kafka = line.kafka;
            line = Verdict::own(12, what, Goal::AtMost(limit), &DURABLE, line.flumen, kafka);
        }
        line
    };
    Ok(vec![
        compare("empty: seconds to the first acknowledgement", Some(0.3), EMPTY),
        compare("10,000 partitions after kill -9: seconds to the first acknowledgement", Some(2.0), KILLED),
        compare("seconds until all of them answered", None, KILLED_ALL),
        compare("seconds to make 10,000 partitions", None, CREATION),
        compare("GB on disk when killed", None, KILLED_GB),
        compare("resident MiB after the restart", None, KILLED_RSS),
    ])
}

const EMPTY: &str = "empty: s to first ack";
const KILLED: &str = "after kill -9: s to first ack";
const KILLED_ALL: &str = "after kill -9: s to all partitions";
const CREATION: &str = "10,000 partitions: creation s";
const KILLED_GB: &str = "after kill -9: GB on disk";
const KILLED_RSS: &str = "after kill -9: resident MiB";

fn after_kill(r: &mut Round<'_, '_>, v: &Variant) -> Result<()> {
    let made = create(&r.peer.kafka, TOPIC, PARTITIONS, &v.topic_configs(&[]))?;
    r.session.say(&format!("  {PARTITIONS} partitions made in {made:.1} s ({})", v.name));
    r.reading(CREATION, v, made);
    let batches = fill_bytes(r.session.config) / (FILL_RECORDS as u64 * 1024);
    let acknowledged = r.fill(TOPIC, v, PARTITIONS, batches, FILL_RECORDS)? * FILL_RECORDS as u64;
    let gigabytes = allocated_bytes(r.peer.data()) as f64 / 1e9;
    r.peer.crash_and_restart()?;
    let first = r.peer.first_ack_in(TOPIC, PARTITIONS as i32 - 1)?.as_secs_f64();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kept: i64 = runtime.block_on(async {
        let mut client = Client::connect(&r.peer.kafka).await?;
        anyhow::Ok(client.offsets(TOPIC, PARTITIONS, LATEST).await?.iter().sum())
    })?;
    let all = r.peer.spawned.elapsed().as_secs_f64();
    r.session.say(&format!(
        "  after kill -9 with {gigabytes:.1} GB, {}: first acknowledgement after {first:.2} s, all {PARTITIONS} partitions after {all:.2} s",
        v.name
    ));
    // One more for the record that timed the restart.
    ensure!(kept as u64 == acknowledged + 1, "{acknowledged} records were acknowledged, {kept} are there");
    r.reading(KILLED, v, first);
    r.reading(KILLED_ALL, v, all);
    r.reading(KILLED_GB, v, gigabytes);
    r.reading(KILLED_RSS, v, crate::stats::rss_mib(r.peer.pid())?);
    Ok(())
}
