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
/// Kafka needs eight minutes for 10,000 (`--full`). A tenth of partitions and bytes flatters it and still says enough.
const KAFKA_PARTITIONS: usize = 1_000;
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
            let fill = fill_bytes(c) as f64 / 100e6;
            EMPTY_STARTS as f64 + 2.0 * KAFKA_START_S + fill + if c.full { 500.0 } else { 90.0 }
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
        let few = v.side == Side::Kafka && !r.session.config.full;
        let outcome = after_kill(&mut r, &v, if few { KAFKA_PARTITIONS } else { PARTITIONS });
        outcome.map_err(|e| r.with_words(e))?;
    }
    // Goals are in seconds, not against Kafka; its figure stands beside.
    let line = |what: &str, goal, name: &str| {
        let of = |v: &Variant| s.values(12, name, v).figure();
        Verdict::own(12, what, goal, &DURABLE, of(&DURABLE), of(&KAFKA))
    };
    Ok(vec![
        line("empty: seconds to the first acknowledgement", Goal::AtMost(0.3), EMPTY),
        line("after kill -9: seconds to the first acknowledgement", Goal::AtMost(2.0), KILLED),
        line("  seconds until all partitions answered", Goal::Informs, KILLED_ALL),
        line("  partitions", Goal::Informs, KILLED_PARTITIONS),
        line("  GB on disk when killed", Goal::Informs, KILLED_GB),
        line("  resident MiB after the restart", Goal::Informs, KILLED_RSS),
        line("seconds to make that many partitions", Goal::Informs, CREATION),
    ])
}

const EMPTY: &str = "empty: s to first ack";
const KILLED: &str = "after kill -9: s to first ack";
const KILLED_ALL: &str = "after kill -9: s to all partitions";
const KILLED_PARTITIONS: &str = "after kill -9: partitions";
const CREATION: &str = "creation s";
const KILLED_GB: &str = "after kill -9: GB on disk";
const KILLED_RSS: &str = "after kill -9: resident MiB";

fn after_kill(r: &mut Round<'_, '_>, v: &Variant, partitions: usize) -> Result<()> {
    let made = create(&r.peer.kafka, TOPIC, partitions, &v.topic_configs(&[]))?;
    r.session.say(&format!("  {partitions} partitions made in {made:.1} s ({})", v.name));
    r.reading(CREATION, v, made);
    let bytes = fill_bytes(r.session.config) * partitions as u64 / PARTITIONS as u64;
    let batches = bytes / (FILL_RECORDS as u64 * 1024);
    let acknowledged = r.fill(TOPIC, v, partitions, batches, FILL_RECORDS)? * FILL_RECORDS as u64;
    let gigabytes = allocated_bytes(r.peer.data()) as f64 / 1e9;
    r.peer.crash_and_restart()?;
    let first = r.peer.first_ack_in(TOPIC, partitions as i32 - 1)?.as_secs_f64();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kept: i64 = runtime.block_on(async {
        let mut client = Client::connect(&r.peer.kafka).await?;
        anyhow::Ok(
            client.offsets(TOPIC, &(0..partitions as u32).collect::<Vec<_>>(), LATEST).await?.iter().sum(),
        )
    })?;
    let all = r.peer.spawned.elapsed().as_secs_f64();
    r.session.say(&format!(
        "  after kill -9 with {gigabytes:.1} GB, {}: first acknowledgement after {first:.2} s, all {partitions} partitions after {all:.2} s",
        v.name
    ));
    // One more for the record that timed the restart.
    ensure!(kept as u64 == acknowledged + 1, "{acknowledged} records were acknowledged, {kept} are there");
    r.reading(KILLED, v, first);
    r.reading(KILLED_PARTITIONS, v, partitions as f64);
    r.reading(KILLED_ALL, v, all);
    r.reading(KILLED_GB, v, gigabytes);
    r.reading(KILLED_RSS, v, crate::stats::rss_mib(r.peer.pid())?);
    Ok(())
}
