//! The smoke run's table: one line per figure, goals, and what disturbed the cells.

use serde::Serialize;

use super::{Round, SmokeConfig};
use crate::export::ExportResult;
use crate::load::Mode;
use crate::peer::Side;
use crate::stats::NOISE_MAX;

/// One line of the table; lower is better unless `higher` is set.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    name: String,
    flumen: Option<f64>,
    kafka: Option<f64>,
    null: Option<f64>,
    ratio: Option<f64>,
    goal: String,
    pub(super) met: Option<bool>,
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|v| *v <= 0.0) {
        return None;
    }
    Some((values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp())
}

#[derive(Clone, Copy)]
enum Goal {
    /// At most this much; Kafka does not matter.
    AtMost(f64),
    /// At most Kafka's.
    NotAbove,
    /// At least Kafka's.
    NotBelow,
    Informs,
}

fn make_row(name: &str, goal: Goal, rounds: &[Round], value: impl Fn(&Round) -> Option<f64>) -> Row {
    let of = |side: Side| {
        let v: Option<Vec<f64>> = rounds.iter().filter(|r| r.side == side).map(&value).collect();
        v.and_then(|v| geometric_mean(&v))
    };
    finish_row(name, goal, of(Side::Flumen), of(Side::Kafka), of(Side::Null))
}

fn finish_row(name: &str, goal: Goal, flumen: Option<f64>, kafka: Option<f64>, null: Option<f64>) -> Row {
    let ratio = flumen.zip(kafka).map(|(f, k)| f / k);
    let (goal, met) = match goal {
        Goal::AtMost(limit) => (format!("<= {limit}"), flumen.map(|f| f <= limit)),
        Goal::NotAbove => ("<= 1x".into(), ratio.map(|r| r <= 1.0)),
        Goal::NotBelow => (">= 1x".into(), ratio.map(|r| r >= 1.0)),
        Goal::Informs => (String::new(), None),
    };
    Row { name: name.into(), flumen, kafka, null, ratio, goal, met }
}

pub(super) fn table(config: &SmokeConfig, rounds: &[Round], export: Option<&ExportResult>) -> Vec<Row> {
    let load = |r: &Round, cell: &str| r.loads.iter().find(|(n, _)| n == cell).map(|(_, l)| l.clone());
    let per_million = |r: &Round, cell: &str| Some(load(r, cell)?.broker?.cpu_s_per_million_batches);
    let rate = |r: &Round, cell: &str| Some(load(r, cell)?.batches_per_s);
    let mut rows = Vec::new();
    let mut add = |name: &str, goal: Goal, value: &dyn Fn(&Round) -> Option<f64>| {
        rows.push(make_row(name, goal, rounds, value));
    };
    add("1 KiB one-record batches, 50 connections, 1 in flight: CPU-s per million", Goal::NotAbove, &|r| {
        per_million(r, "small-1")
    });
    add("  batches/s", Goal::NotBelow, &|r| rate(r, "small-1"));
    add("the same, 5 in flight: CPU-s per million", Goal::NotAbove, &|r| per_million(r, "small-5"));
    add("  batches/s", Goal::NotBelow, &|r| rate(r, "small-5"));
    if config.full {
        for (cell, name) in [("keyed-uniform", "uniform"), ("keyed-zipf", "zipf")] {
            let title = format!("keyed {name}, 20 partitions per request: CPU-s per million batches");
            add(&title, Goal::NotAbove, &|r| per_million(r, cell));
            add("  batches/s", Goal::NotBelow, &|r| rate(r, cell));
        }
    }
    add("128 KiB batches, 4 connections, one tailing consumer: CPU-s per GB", Goal::NotAbove, &|r| {
        Some(load(r, "big")?.broker?.cpu_s_per_gb)
    });
    add("  produced MB/s", Goal::NotBelow, &|r| Some(load(r, "big")?.mb_per_s));
    add("  consumed MB/s", Goal::Informs, &|r| Some(r.tail.as_ref()?.mb_per_s));
    let open = format!("open loop, {:.0} batches/s, 50 connections: p50 ms", config.rate);
    add(&open, Goal::Informs, &|r| Some(load(r, "open")?.latency.p50_ms));
    add("  p99 ms", Goal::NotAbove, &|r| Some(load(r, "open")?.latency.p99_ms));
    add("  p99.9 ms", Goal::Informs, &|r| Some(load(r, "open")?.latency.p999_ms));
    add("  CPU-s per million batches", Goal::NotAbove, &|r| per_million(r, "open"));
    if config.full {
        add("drain of one-record batches: CPU-s per GB", Goal::NotAbove, &|r| {
            r.drain.as_ref()?.broker_cpu_s_per_gb
        });
        add("  MB/s", Goal::NotBelow, &|r| Some(r.drain.as_ref()?.mb_per_s));
    }
    add("resident memory idle, MiB", Goal::AtMost(64.0), &|r| Some(r.rss_idle_mib));
    add("resident memory loaded, MiB", Goal::NotAbove, &|r| Some(r.rss_loaded_mib));
    add("start to first acknowledgement, s", Goal::AtMost(0.5), &|r| Some(r.start_to_first_ack_s));
    let mut put = |name: &str, goal: Goal, value: Option<f64>| {
        rows.push(finish_row(name, goal, value, None, None));
    };
    if let Some(e) = export {
        if let Some(b) = &e.backlog {
            let name = format!("export of {} JSON rows of {:.0} bytes: rows/s", b.rows, b.mean_row_bytes);
            put(&name, Goal::Informs, Some(b.rows_per_s));
            put("  CPU-s per million rows, broker", Goal::Informs, b.broker_cpu_s_per_million_rows);
            put("  CPU-s per million rows, ClickHouse", Goal::Informs, b.engine_cpu_s_per_million_rows);
            put(
                "  missing + duplicated rows",
                Goal::AtMost(0.0),
                Some((b.missing.abs() + b.duplicates) as f64),
            );
        }
        for l in &e.live {
            put(
                &format!("export at {:.0} rows/s: visible p50 ms", l.rate),
                Goal::Informs,
                Some(l.visible.p50_ms),
            );
            put("  visible p99 ms", Goal::AtMost(1_000.0), Some(l.visible.p99_ms));
            put(
                "  missing + duplicated rows",
                Goal::AtMost(0.0),
                Some((l.missing.abs() + l.duplicates) as f64),
            );
        }
    }
    rows
}

fn number(v: Option<f64>) -> String {
    match v {
        None => "-".into(),
        Some(0.0) => "0".into(),
        Some(v) if v >= 1_000.0 => format!("{v:.0}"),
        Some(v) if v >= 10.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.2}"),
    }
}

pub(super) fn print(table: &[Row], durability: &[String; 2], rounds: &[Round], cores: usize) {
    println!();
    let width = table.iter().map(|r| r.name.len()).max().unwrap_or(0);
    println!("{:width$}  {:>9}  {:>9}  {:>7}  {:>9}  goal", "", "Flumen", "Kafka", "ratio", "null");
    for r in table {
        let met = match r.met {
            Some(true) => "ok",
            Some(false) => "MISSED",
            None => "",
        };
        println!(
            "{:width$}  {:>9}  {:>9}  {:>7}  {:>9}  {:6} {met}",
            r.name,
            number(r.flumen),
            number(r.kafka),
            r.ratio.map_or_else(|| "-".into(), |v| format!("{v:.2}x")),
            number(r.null),
            r.goal,
        );
    }
    println!();
    for line in durability {
        println!("{line}");
    }
    println!("null broker: stores nothing; the floor of this machine, these sockets and this protocol");
    for r in rounds {
        for (name, l) in &r.loads {
            if !l.errors.is_empty() || l.unanswered > 0 {
                println!("{:?} {name}: errors {:?}, unanswered {}", r.side, l.errors, l.unanswered);
            }
            if l.config.mode == Mode::Open && l.unsent > l.batches / 100 {
                println!(
                    "{:?} {name}: {} scheduled batches were never sent: not sustained",
                    r.side, l.unsent
                );
            }
            let share = l.foreign_share(cores);
            if share > NOISE_MAX {
                println!(
                    "{:?} {name}: {:.0} % of the machine was busy with something else",
                    r.side,
                    share * 100.0
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals() {
        let r = finish_row("a", Goal::NotAbove, Some(1.0), Some(2.0), None);
        assert_eq!((r.ratio, r.met), (Some(0.5), Some(true)));
        assert_eq!(finish_row("a", Goal::NotBelow, Some(1.0), Some(2.0), None).met, Some(false));
        assert_eq!(finish_row("a", Goal::AtMost(0.5), Some(0.6), None, None).met, Some(false));
        assert_eq!(finish_row("a", Goal::NotAbove, None, Some(2.0), None).met, None);
        assert!((geometric_mean(&[1.0, 4.0]).unwrap() - 2.0).abs() < 1e-12);
    }
}
