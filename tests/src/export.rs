//! Waiting for an export: until it has settled everything, or says a certain thing.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::clickhouse::ClickHouse;
use crate::flumen::Flumen;
use crate::kafka::Place;

const POLL: std::time::Duration = std::time::Duration::from_millis(20);
/// Looks without any change before a wait is given up: two minutes, longer than any back-off.
const STALLED_LOOKS_MAX: u32 = 6_000;
/// Looks between two lines of progress.
const LOOKS_PER_LINE: u32 = 250;

/// Polls the export's status until it is as wanted. Gives up only when nothing changes any more.
pub fn until(
    broker: &Flumen,
    topic: &str,
    what: &str,
    mut wanted: impl FnMut(&Value) -> bool,
) -> anyhow::Result<Value> {
    let (mut looks, mut stalled) = (0u32, 0u32);
    let mut last = Value::Null;
    loop {
        // Just turned on, or a broker that is being restarted.
        let status = broker.get(&format!("/v1/exports/{topic}/status")).unwrap_or(Value::Null);
        if wanted(&status) {
            return Ok(status);
        }
        let now = serde_json::json!([
            status["state"],
            status["lag_records"],
            status["partitions"],
            status["last_error"]
        ]);
        stalled = if now == last { stalled + 1 } else { 0 };
        last = now;
        if stalled > STALLED_LOOKS_MAX {
            bail!("waited for {what}, and nothing moves: {}", serde_json::to_string_pretty(&status)?);
        }
        looks += 1;
        if looks.is_multiple_of(LOOKS_PER_LINE) {
            println!(
                "   waiting for {what}: {} lag={} rows={} {}",
                status["state"], status["lag_records"], status["rows_total"], status["last_error"]["message"]
            );
        }
        std::thread::sleep(POLL);
    }
}

pub fn until_state(broker: &Flumen, topic: &str, state: &str) -> anyhow::Result<Value> {
    until(broker, topic, &format!("state {state}"), |status| status["state"] == state)
}

/// Until every record that the topic holds now is settled.
pub fn until_settled(broker: &Flumen, topic: &str) -> anyhow::Result<Value> {
    let ends = broker.end_offsets(topic)?;
    until(broker, topic, "everything to be settled", |status| is_settled(status, &ends))
}

fn is_settled(status: &Value, ends: &[i64]) -> bool {
    let settled = settled_offsets(status);
    status["state"] == "running"
        && settled.len() == ends.len()
        && settled.iter().zip(ends).all(|(s, e)| s >= e)
}

pub fn settled_offsets(status: &Value) -> Vec<i64> {
    let partitions = status["partitions"].as_array().into_iter().flatten();
    partitions.filter_map(|p| p["settled_offset"].as_i64()).collect()
}

/// The table of a topic whose records are `{"id": number}`: exactly these, each at its place, none twice.
pub fn check_table(
    clickhouse: &ClickHouse,
    table: &str,
    expected: &BTreeMap<Place, u64>,
) -> anyhow::Result<()> {
    let rows = clickhouse
        .query(&format!("SELECT _partition, _offset, id FROM {table} ORDER BY _partition, _offset"))?;
    let mut found: BTreeMap<Place, u64> = BTreeMap::new();
    for line in rows.lines() {
        let mut fields = line.split('\t').map(str::parse::<i64>);
        let mut next = || fields.next().context("a row with too few fields")?.context("no number");
        let (partition, offset, id) = (next()?, next()?, next()?);
        let before = found.insert((i32::try_from(partition)?, offset), u64::try_from(id)?);
        ensure!(before.is_none(), "two rows of {partition} {offset}");
    }
    let missing = expected.iter().find(|(place, id)| found.get(place) != Some(id));
    let strange = found.iter().find(|(place, _)| !expected.contains_key(place));
    ensure!(
        missing.is_none() && strange.is_none(),
        "{table} has {} rows, {} are expected; missing or other: {missing:?}, never acknowledged: {strange:?}",
        found.len(),
        expected.len()
    );
    Ok(())
}
